"""What the recipes' command lines share: how they speak, and how they end."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import timm
import torch

import dynskip
from dynskip.errors import DynskipError, lacks_memory
from dynskip.video.loading import worker_fault

VERSIONS = f"dynskip {dynskip.__version__}, torch {torch.__version__}, timm {timm.__version__}"


def run(work: Callable[[], int | None], interrupted: str, memory: str = "") -> int:
    """Do the work of a command line, and end with one line whatever is wrong with what the user gave.

    An error in code is not caught: it ends the process with all that Python says of it.

    Args:
        work: does everything; it may return an exit code.
        interrupted: what stays after Ctrl-C, and how to go on.
        memory: what lowers the need of memory.

    Returns:
        The exit code: that of `work`, 2 after an error, 130 after Ctrl-C.
    """
    sys.stdout, sys.stderr = forgiving(sys.stdout), forgiving(sys.stderr)
    try:
        return work() or 0
    except KeyboardInterrupt:
        print(f"\nInterrupted. {interrupted}", file=sys.stderr)
        return 130
    except (DynskipError, OSError, MemoryError, RuntimeError, ImportError) as error:
        message = explain(error, memory)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2


def explain(error: BaseException, memory: str = "") -> str | None:
    """Say in one line what ended a command, or `None` if it is an error in code."""
    if isinstance(error, DynskipError):
        return str(error)
    if lacks_memory(error):
        first = str(error).splitlines()[0] if str(error) else "no more was given"
        return f"Memory ran out ({first}). {memory}".rstrip()
    if (fault := worker_fault(error)) is not None:
        return fault
    return str(error) if isinstance(error, OSError) else None


@contextlib.contextmanager
def explained(what: str, made_with: str) -> Iterator[None]:
    """Say of a state that cannot be loaded which versions wrote it: names of weights may have changed since.

    Args:
        what: what is loaded.
        made_with: the `VERSIONS` that it was written with.

    Raises:
        DynskipError: in place of what loading raises.
    """
    try:
        yield
    except Exception as error:
        # torch lists what is missing, unknown or of another shape below a first line.
        reason = " ".join(line.strip() for line in str(error).splitlines()[-1:])[:300]
        raise DynskipError(
            f"Cannot load {what}: {reason} It was written with {made_with}; here is {VERSIONS}. Use those versions, or "
            "the settings that it was written with."
        ) from error


class _Deaf(io.FileIO):
    """A file that swallows what nobody reads any more: `| head` is no reason to stop."""

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except BrokenPipeError:
            return memoryview(content).nbytes


def forgiving(stream: TextIO) -> TextIO:
    """Return a stream that escapes the letters it cannot show, and that may be closed at its other end."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream  # a notebook's
    if stream not in (sys.__stdout__, sys.__stderr__) or stream.isatty():
        stream.reconfigure(errors="backslashreplace")
        return stream
    stream.flush()
    raw = io.BufferedWriter(_Deaf(stream.fileno(), "w", closefd=False))
    # Errors are shown at once, results when there are many of them, as Python does.
    at_once = stream is sys.__stderr__ or stream.line_buffering
    return io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=at_once)
