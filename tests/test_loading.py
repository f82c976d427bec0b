"""Batches from processes that decode: their faults are told, nothing is waited for without end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_sharer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

for needed in ("av", "PIL", "safetensors", "tqdm"):
    pytest.importorskip(needed)

from dynskip import DynskipError  # noqa: E402
from dynskip.video import Item, MachineError, check, loading  # noqa: E402
from dynskip.video.loading import BatchLoader, worker_fault  # noqa: E402


@dataclass
class Numbers:
    values: Tensor
    notes: list[str]


def collate(samples: Any) -> Numbers:
    return Numbers(torch.stack(list(samples)), ["a"])


class Made(Dataset[Tensor]):
    """Numbers, and something that happens before number 3 in a process that decodes."""

    def __init__(self, happening: Callable[[], object] = lambda: None) -> None:
        self.happening = happening

    def __getitem__(self, key: int) -> Tensor:
        if key == 3:
            self.happening()
        return torch.full((4, 4), float(key))


def loader(happening: Callable[[], object] = lambda: None, workers: int = 1) -> BatchLoader[Numbers]:
    return BatchLoader(Made(happening), [[0, 1], [2, 3], [4]], collate, 128, workers)


@pytest.mark.parametrize("workers", [0, 1, 2, 9])
def test_batches_come_in_order(workers: int) -> None:
    for _ in range(2):
        assert [batch.values[:, 0, 0].tolist() for batch in loader(workers=workers)] == [[0, 1], [2, 3], [4]]
    assert len(loader()) == 3


def fail(error: BaseException) -> Callable[[], object]:
    def happen() -> None:
        raise error

    return happen


@pytest.mark.parametrize("workers", [0, 1])
def test_our_own_errors_come_as_they_are(workers: int) -> None:
    with pytest.raises(MachineError) as caught:
        list(loader(fail(MachineError("a.mp4: the drive failed.")), workers))
    assert str(caught.value) == "a.mp4: the drive failed."


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_code_is_shown_whole(workers: int) -> None:
    with pytest.raises(RuntimeError, match=r"shape '\[2\]' is invalid") as caught:
        list(loader(fail(RuntimeError("shape '[2]' is invalid for input of size 3")), workers))
    assert worker_fault(caught.value) is None
    if workers:
        assert "line" in str(caught.value)  # where it happened


def kill(number: int) -> Callable[[], object]:
    def happen() -> None:
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        time.sleep(60)

    return happen


FAULTS: dict[str, tuple[Callable[[], object], str]] = {
    "killed": (kill(signal.SIGKILL), "was killed, most likely because memory ran out.*fewer --workers"),
    "bus": (kill(signal.SIGBUS), r"Shared memory \(/dev/shm\).* is full.*--shm-size"),
    "crashed": (kill(signal.SIGSEGV), "crashed: a damaged file can do that.*prepare_data.py --workers 1"),
    "stopped": (kill(signal.SIGTERM), "stopped from outside"),
    "left": (lambda: os._exit(3), "ended by itself.*--workers 0"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_process_that_dies_is_told_by_its_cause(name: str) -> None:
    happening, message = FAULTS[name]
    with pytest.raises((DynskipError, RuntimeError)) as caught:  # a signal may arrive anywhere
        list(loader(happening))
    told = str(caught.value) if isinstance(caught.value, DynskipError) else worker_fault(caught.value)
    assert re.search(message, str(told))
    assert "\n" not in str(told)
    others = [other for other in FAULTS if other != name]
    assert not any(re.search(FAULTS[other][1], str(told)) for other in others)


@pytest.mark.parametrize("told", [True, False], ids=["told", "untold"])
@pytest.mark.parametrize("closed", [True, False], ids=["dying", "dead"])
@pytest.mark.parametrize("name", ["killed", "left"])
def test_a_batch_of_a_process_that_dies_is_told_by_its_cause(name: str, closed: bool, told: bool) -> None:
    """Its batch lies ready, in memory that only the process hands out; in threads, torch is not told of a death."""
    happening, message = FAULTS[name]

    def happen() -> None:
        sharer: Any = resource_sharer._resource_sharer  # type: ignore[attr-defined]
        while sharer._listener is None:  # until a batch is handed over
            time.sleep(0.01)
        time.sleep(0.1)
        if closed:
            sharer._listener.close()
            time.sleep(0.2)
        happening()

    def run() -> None:
        for _ in BatchLoader(Made(happen), [[0], [1], [3]], collate, 128, 1):
            time.sleep(0.2)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, () if told else {signal.SIGCHLD})
    try:
        with pytest.raises((DynskipError, RuntimeError)) as caught:
            run()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert re.search(message, worker_fault(caught.value) or str(caught.value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)", "--shm-size"),
        ("Too many open files. Communication with the workers is no longer possible.", "ulimit -n"),
        ("received 0 items of ancdata", "ulimit -n"),
        ("DataLoader worker (pid(s) 1, 2) exited unexpectedly", "ended by itself"),
        ("DataLoader worker (pid 1) exited unexpectedly with exit code 3. Details are lost", "ended by itself"),
        ("mat1 and mat2 shapes cannot be multiplied", None),
        ("Caught RuntimeError in DataLoader worker process 0.\n...: Too many open files", None),
    ],
)
def test_what_torch_says_of_its_processes(text: str, message: str | None) -> None:
    told = worker_fault(RuntimeError(text))
    assert told is None if message is None else message in str(told)
    assert worker_fault(ValueError(text)) is None


def test_small_shared_memory_is_told_before_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's 64 MB, and batches of 24 videos of 16 frames at 168 pixels."""

    usage = type("Usage", (), {"free": 64 * 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    batch = 24 * 16 * 3 * 168**2
    keys = [[number] for number in range(100)]
    with pytest.raises(DynskipError, match=r"has 67\.1 MB free, .* take 292\.6 MB.*--workers.*--shm-size 8g"):
        next(iter(BatchLoader(Made(), keys, collate, batch, 4)))
    assert len(list(BatchLoader(Made(), keys, collate, batch, 0))) == 100  # needs none
    assert len(list(BatchLoader(Made(), keys[:2], collate, batch // 2, 9))) == 2  # never more than there are batches
    monkeypatch.setattr(loading, "SHARED_MEMORY", "/nowhere")  # systems that keep it elsewhere
    assert len(list(BatchLoader(Made(), keys[:2], collate, batch, 1))) == 2


def test_shared_memory_that_runs_out_is_an_error_and_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Tensor) -> Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(Tensor, "share_memory_", full)
    with pytest.raises(DynskipError, match=r"Shared memory .* is full.*--shm-size"):
        list(loader())


def test_batches_lie_in_shared_memory_before_they_are_handed_over() -> None:
    handing = loading._Handing(collate, share=True)
    assert handing([torch.zeros(3)]).values.is_shared()


def test_a_batch_that_does_not_come_is_told_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PATIENCE", 0.5)
    monkeypatch.setattr(loading, "TOLD", 2)
    with (
        pytest.warns(
            UserWarning, match=r"Batch 2 of 3 has not come for .* while all processes that decode live"
        ) as told,
        pytest.raises(DynskipError, match=r"Batch 2 of 3 did not come .*--workers 0"),
    ):
        list(loader(lambda: time.sleep(60)))
    assert len(told) == 2


def test_a_batch_that_comes_late_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PATIENCE", 1.0)
    monkeypatch.setattr(loading, "TOLD", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [len(batch.values) for batch in loader(lambda: time.sleep(2))] == [2, 2, 1]


SCRIPT = """
import signal, sys, time
from pathlib import Path
from dynskip.video import FrameSource, Item, Clips, Preprocessing, training_batches, command
from dynskip.video.cache import FrameCache
from dynskip.video.check import check_videos

class Slow(FrameSource):
    def __init__(self, path): pass
    def __len__(self): return 1
    def read(self, numbers, side):
        Path(sys.argv[1]).touch()
        time.sleep(60)

def load():
    clips = Clips(items, "a", Preprocessing(8, 2), True, opener=Slow)
    list(training_batches(clips, 0, 2, workers=2))

def look():
    list(check_videos(items, FrameCache(Path("cache"), 2, 8, Slow), workers=2))

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # commands in the background start without it
    items = [Item(Path(__file__), ("a",), "train")] * 4
    sys.exit(command.run({"load": load, "check": look}[sys.argv[2]], "What is there stays."))
"""


@pytest.mark.parametrize("work", ["load", "check"])
def test_ctrl_c_is_told_once_and_without_tracebacks(work: str, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SCRIPT)
    started = tmp_path / "started"
    process = subprocess.Popen(
        [sys.executable, tmp_path / "slow.py", started, work],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(loading.__file__).parents[2])},
    )  # fmt: skip
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # to the whole group, as a terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "Interrupted. What is there stays."


@pytest.mark.parametrize(
    "work",
    [
        lambda folder: list(loader(lambda: time.sleep(600), workers=2)),
        lambda folder: list(check.check_videos([Item(folder / "none.mp4", ("a",), "train")] * 4, workers=2)),
    ],
)
def test_ctrl_c_while_processes_are_started_ends_them(
    work: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignoring = loading.ignoring_interrupts

    @contextlib.contextmanager
    def pressed() -> Iterator[None]:
        with ignoring():
            yield
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loading, "ignoring_interrupts", pressed)
    monkeypatch.setattr(check, "ignoring_interrupts", pressed)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    others = set(multiprocessing.active_children())
    try:
        with pytest.raises(KeyboardInterrupt) as raised:
            work(tmp_path)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert raised.tb is not None  # what it holds is not cleared away by chance
    for process in set(multiprocessing.active_children()) - others:
        process.join(60)
        assert not process.is_alive()
