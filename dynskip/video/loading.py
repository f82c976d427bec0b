"""Batches from processes that decode: they fail with a message, never hang, and leave Ctrl-C to their parent."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dynskip.errors import DynskipError
from dynskip.video.outputs import size_of

BatchT = TypeVar("BatchT")
PATIENCE = 300.0  # seconds without a batch until it is told; hours of video take minutes to decode
TOLD = 12  # times that it is told before the run ends
SHARED_MEMORY = "/dev/shm"
_AHEAD = 2  # batches that each process may have ready, as torch has it
_DYING = 5.0  # seconds for a process whose connection broke to be seen as dead

_MORE_SHARED_MEMORY = (
    "Use fewer --workers (0 needs none of it) or smaller batches, or give a container more: `docker run --shm-size 8g` "
    "or `--ipc host`."
)
_FAULTS = (
    (
        r"is killed by signal: Killed",
        "A process that decodes videos was killed, most likely because memory ran out. Use fewer --workers or smaller "
        "batches.",
    ),
    (
        r"is killed by signal: Bus error|unable to (allocate|resize|open|mmap) shared memory|unable to write to file",
        f"Shared memory ({SHARED_MEMORY}), in which processes hand over batches, is full. {_MORE_SHARED_MEMORY}",
    ),
    (
        r"is killed by signal: (Segmentation fault|Aborted|Floating point|Illegal)",
        "A process that decodes videos crashed: a damaged file can do that. examples/prepare_data.py --workers 1 finds "
        "it.",
    ),
    (
        r"is killed by signal",
        "A process that decodes videos was stopped from outside. Start the command again.",
    ),
    (
        r"DataLoader worker \(pid.* exited unexpectedly",  # "(pid 1)" from a signal handler, else "(pid(s) 1)"
        "A process that decodes videos ended by itself. What it wrote above says why; with --workers 0 the error is "
        "shown.",
    ),
    (
        r"Too many open files|received \d+ items of ancdata",
        "This process has too many open files. Raise the limit (`ulimit -n 65536`), or use fewer --workers.",
    ),
)


def worker_fault(error: BaseException) -> str | None:
    """Say what happened to a process that decodes, and what helps.

    Args:
        error: what torch raised.

    Returns:
        The cause in a sentence or two, or `None` where it is something else, such as an error in code.
    """
    if not isinstance(error, RuntimeError) or str(error).startswith("Caught "):
        return None  # "Caught ... in DataLoader worker process" goes before an error in code
    # That a process "exited unexpectedly" may have a cause that says more: "is killed by signal: Killed".
    text = f"{error.__cause__ or ''}\n{error}".strip()
    first = text.partition("\n")[0]
    return next((f"{told} ({first})" for pattern, told in _FAULTS if re.search(pattern, text)), None)


class BatchLoader(Generic[BatchT]):
    """Batches of a data set, decoded ahead by processes.

    Args:
        dataset: what is indexed by keys.
        keys: the keys of each batch.
        collate: makes a batch of samples.
        batch_bytes: bytes of a batch.
        workers: processes that decode; 0 decodes in this one.
        pin_memory: whether batches are moved to memory that a GPU copies from faster.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        keys: Sequence[Sequence[Any]],
        collate: Callable[[Sequence[Any]], BatchT],
        batch_bytes: int,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.dataset, self.keys, self.collate = dataset, keys, collate
        self.batch_bytes, self.workers, self.pin_memory = batch_bytes, min(workers, len(keys)), pin_memory

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[BatchT]:
        if self.workers:
            check_shared_memory(self.batch_bytes * min(_AHEAD * self.workers + 1, len(self.keys)))  # and the one in use
        loader = DataLoader(
            _Telling(self.dataset),
            batch_sampler=self.keys,  # type: ignore[arg-type]
            num_workers=self.workers,
            collate_fn=_Handing(self.collate, share=self.workers > 0),
            pin_memory=self.pin_memory,
            timeout=PATIENCE if self.workers else 0,
        )
        own, others = set[Any](), set(multiprocessing.active_children())
        try:
            with ignoring_interrupts():  # one that came meanwhile is raised at its end
                batches = iter(loader)
                own = set(multiprocessing.active_children()) - others
            for number in range(len(self.keys)):
                batch = self._next(batches, number, own)
                if isinstance(batch, DynskipError):
                    raise batch
                yield batch
        except BaseException:  # Ctrl-C, or nobody asks for the rest: torch would wait for videos that take minutes
            _end(own)
            raise

    def _next(self, batches: Iterator[Any], number: int, processes: Collection[Any]) -> Any:
        for told in range(TOLD):
            try:
                return next(batches)
            except (RuntimeError, EOFError, OSError) as error:
                if "DataLoader timed out" not in str(error):
                    if (fault := worker_fault(_death(processes, error) or error)) is not None:
                        raise DynskipError(fault) from error
                    raise
                minutes = (told + 1) * PATIENCE / 60
                warnings.warn(
                    f"Batch {number + 1} of {len(self.keys)} has not come for {minutes:g} minutes, while all processes "
                    "that decode live. Very long videos take so long; else a disk or network drive may be stuck.",
                    stacklevel=3,
                )
        raise DynskipError(
            f"Batch {number + 1} of {len(self.keys)} did not come for {TOLD * PATIENCE / 60:g} minutes. Look at the "
            "disk or network drive that holds the videos; with --workers 0 the process shows where it waits."
        )


class _Telling(Dataset[Any]):
    """A data set that hands over our own errors as they are: torch would wrap them in a traceback."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except DynskipError as error:
            return error


class _Handing:
    """Collates, and moves the batch into shared memory at once, where a lack of it is an error.

    Left to torch, a thread would do it later, die alone, and be waited for without end.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], Any], share: bool) -> None:
        self.collate, self.share = collate, share

    def __call__(self, samples: Sequence[Any]) -> Any:
        for sample in samples:
            if isinstance(sample, DynskipError):
                return sample
        batch = self.collate(samples)
        try:
            for value in vars(batch).values() if self.share else ():
                if isinstance(value, Tensor):
                    value.share_memory_()
        except RuntimeError as error:
            if (fault := worker_fault(error)) is None:
                raise
            return DynskipError(fault)
        return batch


def check_shared_memory(needed: int) -> None:
    """Refuse batches that shared memory cannot hold: containers often have 64 MB of it.

    Args:
        needed: bytes.

    Raises:
        DynskipError: if less is free.
    """
    if not os.path.isdir(SHARED_MEMORY):
        return  # systems that keep it elsewhere
    if (free := shutil.disk_usage(SHARED_MEMORY).free) < needed:
        raise DynskipError(
            f"Shared memory ({SHARED_MEMORY}), in which processes hand over batches, has {size_of(free)} free, and the "
            f"batches that are decoded ahead take {size_of(needed)}. {_MORE_SHARED_MEMORY}"
        )


def _death(processes: Collection[Any], error: Exception) -> RuntimeError | None:
    """Which process died of what, in torch's words, if that is why torch raised `error`.

    Torch reads from processes while they die: it then raises what the socket said, or takes a killed process for one
    that ended by itself.
    """
    if not processes or str(error).startswith("Caught "):  # an error in code: nobody died
        return None
    with contextlib.suppress(RuntimeError):  # torch says the same from a signal handler, at any moment
        ended = wait([process.sentinel for process in processes], _DYING)
        for process in processes:
            if process.sentinel in ended:
                process.join()  # its files are closed a moment before its exit code is there
    for process in processes:
        who, code = f"DataLoader worker (pid {process.pid})", process.exitcode or 0
        if code < 0:
            return RuntimeError(f"{who} is killed by signal: {signal.strsignal(-code)}.")
        if code > 0:
            return RuntimeError(f"{who} exited unexpectedly with exit code {code}.")
    return None


def _end(processes: Collection[Any]) -> None:
    """End processes. Torch watches its own, and would raise an error for each in the place of the one at hand."""
    watched = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if watched else None
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(5)
    finally:
        if watched:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


@contextlib.contextmanager
def ignoring_interrupts() -> Iterator[None]:
    """Start processes that leave Ctrl-C to this one: they inherit what is blocked here. It waits here, meanwhile."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # starting it later would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
