"""One run at a time in an output folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dynskip import DynskipError

for needed in ("av", "PIL", "safetensors", "tqdm"):
    pytest.importorskip(needed)
pytest.importorskip("fcntl")

from dynskip.video.lock import hold_folder  # noqa: E402

OTHER = """
import multiprocessing, sys, time
from pathlib import Path
from dynskip.video.lock import hold_folder

with hold_folder(Path(sys.argv[1])):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(60)
"""


def test_the_second_process_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    command = [sys.executable, "-c", textwrap.dedent(OTHER), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        worker = int(other.stdout.readline())
        for _ in range(2):  # asking does not change the answer
            holder = rf"Another run writes to .*run: process {other.pid} on {socket.gethostname()}, since 20"
            with pytest.raises(DynskipError, match=holder), hold_folder(folder):
                pytest.fail("two at a time")
        other.kill()
        other.wait()
        with hold_folder(folder):  # dead, though a process that it started lives on
            os.kill(worker, 0)
        os.kill(worker, signal.SIGKILL)


def test_a_folder_is_given_back(tmp_path: Path) -> None:
    for _ in range(2):
        with hold_folder(tmp_path):
            pass
    with pytest.raises(RuntimeError, match="mine"), hold_folder(tmp_path):
        raise RuntimeError("mine")
    command = [sys.executable, "-c", OTHER.replace("time.sleep(60)", "sys.exit()").split("    worker")[0] + "    pass"]
    subprocess.run([*command, str(tmp_path)], check=True)


def test_other_processes_of_a_run_need_no_lock(tmp_path: Path) -> None:
    with hold_folder(tmp_path / "run", needed=False):
        assert not (tmp_path / "run").exists()


def test_where_files_cannot_be_locked_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", fails)
    with pytest.warns(UserWarning, match="cannot be locked .*No locks available.* Start no other run there"):  # noqa: SIM117
        with hold_folder(tmp_path):
            pass
