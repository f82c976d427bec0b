"""How the recipes' command lines speak and end, and outputs that are tried before the work."""

from __future__ import annotations

import errno
import io
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

for needed in ("av", "matplotlib", "PIL", "safetensors", "tqdm"):
    pytest.importorskip(needed)

from dynskip import DynskipError, stage_model  # noqa: E402
from dynskip.errors import lacks_memory  # noqa: E402
from dynskip.video import Clips, Item, MachineError, Preprocessing, VideoError, command, memory, outputs  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------- ends


def fail(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


OUT = "error: Memory ran out "
ALLOCATOR = "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"
KILLED = "DataLoader worker (pid 7) is killed by signal: Killed. "
ENDS: dict[str, tuple[BaseException, int, str]] = {
    "ours": (DynskipError("a.csv has no rows."), 2, "error: a.csv has no rows."),
    "a file's": (VideoError("a.mp4: is empty."), 2, "error: a.mp4: is empty."),
    "the machine's": (MachineError("a.mp4: the drive failed."), 2, "error: a.mp4: the drive failed."),
    "the system's": (FileNotFoundError(2, "No such file", "a"), 2, "error: [Errno 2] No such file: 'a'"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "\nInterrupted. What is there stays."),
    "memory": (MemoryError("Unable to allocate 192. MiB"), 2, OUT + "(Unable to allocate 192. MiB). Less."),
    "no words": (MemoryError(), 2, OUT + "(no more was given). Less."),
    "torch's": (RuntimeError(f"{ALLOCATOR}\nstack"), 2, OUT + f"({ALLOCATOR}). Less."),
    "oneDNN's": (RuntimeError("could not create a primitive"), 2, OUT + "(could not create a primitive). Less."),
    "the GPU's": (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, OUT + "(CUDA out of memory."),
    "a library's": (ImportError("a.so: failed to map segment from shared object"), 2, OUT + "(a.so: failed"),
    "fork's": (OSError(errno.ENOMEM, "Cannot allocate memory"), 2, OUT),
    "a process's death": (RuntimeError(KILLED), 2, "error: A process that decodes videos was killed, most likely"),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_command_ends_with_a_line_and_a_code(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    error, code, line = ENDS[name]
    assert command.run(fail(error), "What is there stays.", "Less.") == code
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert said.strip().count("\n") == 0


def test_what_work_returns_is_the_exit_code() -> None:
    assert [command.run(work, "") for work in (lambda: None, lambda: 0, lambda: 1)] == [0, 0, 1]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape '[2]' is invalid for input of size 3"),
        RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback ..."),
        RuntimeError("could not create a primitive descriptor for a convolution"),
        KeyError("a"),
        TypeError("a"),
        ImportError("a.so: undefined symbol"),
    ],
)
def test_an_error_in_code_is_shown_whole(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        command.run(fail(error), "")
    assert caught.value is error
    assert not lacks_memory(error)


def test_a_state_of_another_version_is_told_in_a_line() -> None:
    state = nn.Linear(2, 3).state_dict()
    for wrong in ({"weight": state["weight"]}, {**state, "new": state["bias"]}, {"weight": state["weight"][:1]}):
        with (
            pytest.raises(
                DynskipError, match=r"^Cannot load the model of a\.pt: .*written with dynskip 9\.9"
            ) as caught,
            command.explained("the model of a.pt", "dynskip 9.9"),
        ):
            nn.Linear(2, 3).load_state_dict(wrong)
        assert "\n" not in str(caught.value)
        assert command.VERSIONS in str(caught.value)
    with command.explained("it", ""):
        nn.Linear(2, 3).load_state_dict(state)


# ------------------------------------------------------------------------------------------------------------- consoles

WORDS = "Grün 走る caf\udce9"
SCRIPT = f"""
import sys
from dynskip.video import command

def work():
    for _ in range(3):
        print({WORDS!r})
    print({WORDS!r}, file=sys.stderr)
    if "--wait" in sys.argv:
        sys.stdin.read()
        for number in range(100_000):
            print(number)
    print("done", file=sys.stderr)

sys.exit(command.run(work, ""))
"""
ROOT = str(Path(command.__file__).parents[2])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_letters_that_a_terminal_cannot_show_are_escaped(encoding: str) -> None:
    environment = {**os.environ, "PYTHONPATH": ROOT, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, env=environment)
    assert done.returncode == 0
    line = WORDS.encode(encoding, "backslashreplace")
    assert done.stdout.splitlines() == [line] * 3
    assert done.stderr.splitlines() == [line, b"done"]


def test_a_closed_pipe_ends_no_run() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "--wait"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": ROOT},
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()  # as `| head -0` does
    process.stdout = None
    _, errors = process.communicate(b"")
    assert process.returncode == 0
    assert errors.splitlines()[-1] == b"done"


def test_a_stream_of_another_kind_is_left_alone() -> None:
    stream = io.StringIO()  # a notebook's
    assert command.forgiving(stream) is stream


# -------------------------------------------------------------------------------------------------------------- outputs


def test_folders_are_made_and_left_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a").write_text("a")
    outputs.check_folders(tmp_path / "new" / "deep", tmp_path / "old", None)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a", "deep", "new", "old"]


def test_files_are_left_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    outputs.check_files(tmp_path / "new" / "a.json", tmp_path / "old.json", None, Path(os.devnull))
    outputs.check_pictures(tmp_path / "new" / "a.PNG", tmp_path / "b.svg", None)
    assert (tmp_path / "old.json").read_text() == "old"
    assert list((tmp_path / "new").iterdir()) == []


def test_what_cannot_be_written_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for check, name, message in (
        (outputs.check_folders, "file", "a file is where a folder is needed"),
        (outputs.check_folders, "file/deep", "a file is where a folder is needed"),
        (outputs.check_files, "file/a.json", "a file is where a folder is needed"),
        (outputs.check_files, ".", "it is a folder"),
        (outputs.check_files, "pipe", "it is a pipe that nobody reads"),
        (outputs.check_files, "a" * 300 + "/a.json", "its name is too long"),
        (outputs.check_pictures, "a.abc", r"no picture can be written as '\.abc'"),
        (outputs.check_pictures, "a", "no picture can be written as ''"),
    ):
        with pytest.raises(DynskipError, match=message) as caught:
            check(tmp_path / name)
        assert "Make room" not in str(caught.value)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EROFS, "read-only file system"),
        (errno.EACCES, "no permission to write there"),
        (errno.ENOSPC, r"the disk or your share of it is full: .* are free\)\. Make room"),
        (errno.EDQUOT, "Make room"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_folder_that_cannot_be_written(
    number: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    (tmp_path / "old").touch()
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr(os, "open", refuse)
    for check, path in (
        (outputs.check_folders, tmp_path),
        (outputs.check_files, tmp_path / "a"),
        (outputs.check_files, tmp_path / "old"),
        (outputs.check_pictures, tmp_path / "a.png"),
    ):
        with pytest.raises(DynskipError, match=f"Could not write .*{message}") as caught:
            check(path)
        assert ("Make room" in str(caught.value)) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_a_pipe_that_is_read_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    outputs.check_files(tmp_path / "pipe")
    os.close(reader)


def test_room_is_compared_with_what_will_be_written(tmp_path: Path) -> None:
    outputs.check_folders(tmp_path, needed=1)
    with pytest.raises(DynskipError, match=r"will take 1000000\.0 GB at least, and .* are free .*Make room"):
        outputs.check_folders(tmp_path, needed=10**15)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_whoever_wrote() -> None:
    def with_torch() -> None:
        with open("/dev/full", "wb") as file:
            torch.save({"a": torch.zeros(10**6)}, file)

    for write in (with_torch, lambda: Path("/dev/full").write_text("a" * 10**6)):
        with pytest.raises((OSError, RuntimeError)) as caught:
            write()
        assert "Make room." in str(outputs.cannot_write(Path("/dev/full"), caught.value))
    rust = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")  # safetensors
    assert "Make room." in str(outputs.cannot_write(Path("/dev/full"), rust))


# --------------------------------------------------------------------------------------------------------------- memory


def machine(root: Path, cgroup: str, **files: object) -> Path:
    """Write the files in which Linux tells of memory; `__` stands for a slash."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    1000 kB\nSwapFree: 0 kB\n")
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, content in files.items():
        file = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_DOT_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "left"),
    [
        ("", {}, 1_024_000),
        ("0::/\n", {"memory_DOT_max": "max", "memory_DOT_current": 5}, 1_024_000),
        ("0::/\n", {"memory_DOT_max": 700, "memory_DOT_current": 300, "memory_DOT_stat": "inactive_file 50"}, 450),
        ("0::/a/b\n", {"a__memory_DOT_max": 700, "a__memory_DOT_current": 300, "a__memory_DOT_stat": "anon 1"}, 400),
        (
            "5:cpu:/a\n4:memory,x:/a\n",
            {"memory__a__memory_DOT_limit_in_bytes": 80, "memory__a__memory_DOT_usage_in_bytes": 90,
             "memory__a__memory_DOT_stat": "inactive_file 1"},
            0,
        ),
    ],
)  # fmt: skip
def test_memory_that_is_left(cgroup: str, files: dict[str, object], left: int, tmp_path: Path) -> None:
    assert memory.memory_left(machine(tmp_path, cgroup, **files)) == left


def test_memory_is_not_limited_where_nothing_is_told(tmp_path: Path) -> None:
    assert memory.memory_left(tmp_path) == math.inf
    assert memory.memory_left() > 0


def test_videos_in_memory_are_counted_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nine videos of 48 frames of 1024 x 1024 pixels are 1.4 GB."""
    items = [Item(tmp_path / f"{number}.mp4", ("a",), "train") for number in range(9)]
    monkeypatch.setattr(memory, "memory_left", lambda: 9e8)
    with pytest.raises(DynskipError, match=r"9 videos takes 1\.4 GB .* and 900\.0 MB are left\..*--cache"):
        Clips(items, "a", Preprocessing(896, 16), True).load_into_memory()


class Hungry(nn.Module):
    """A network that gets no memory for its second layer."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.first, self.second, self.error = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), error

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.first(images)
        raise self.error


@pytest.mark.parametrize(
    "error",
    [MemoryError("no"), RuntimeError("could not create a primitive"), torch.OutOfMemoryError("CUDA out of memory.")],
)
def test_a_network_without_memory_does_not_refuse_a_size(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        stage_model(Hungry(error), ["first", "second"], input_size=(3, 8, 8))
    assert caught.value is error
    with pytest.raises(DynskipError, match="Hungry refuses images of 3x8x8"):
        stage_model(Hungry(RuntimeError("shapes do not fit")), ["first", "second"], input_size=(3, 8, 8))
