"""Outputs of a command, tried before its work starts, and why one could not be written."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dynskip.errors import DynskipError
from dynskip.plot._letters import matplotlib

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_WHY = {
    errno.EROFS: ("it is on a read-only file system", "Name another place."),
    **dict.fromkeys((errno.EACCES, errno.EPERM), ("you have no permission to write there", "Name another place.")),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), ("a file is where a folder is needed", "Name another place.")),
    errno.EISDIR: ("it is a folder", "Name a file."),
    errno.ENAMETOOLONG: ("its name is too long", "Name a shorter one."),
    errno.ENXIO: ("it is a pipe that nobody reads", "Start its reader first, or name a file."),
}


def check_folders(*folders: Path | None, needed: int = 0) -> None:
    """Make folders, and try whether files can be written there.

    Args:
        *folders: where files will be written; `None` is passed over.
        needed: bytes that will be written to each, at least.

    Raises:
        DynskipError: if one cannot be made or written to, or has not enough room.
    """
    for folder in filter(None, folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                free = shutil.disk_usage(folder).free
        except OSError as error:
            raise cannot_write(folder, error) from error
        if free < needed:
            raise DynskipError(
                f"{folder} will take {size_of(needed)} at least, and {size_of(free)} are free on its disk. Make room, "
                "or name a folder on another disk."
            )


def check_files(*files: Path | None) -> None:
    """Try whether files can be written. What they hold is left as it is.

    Args:
        *files: what will be written; `None` is passed over.

    Raises:
        DynskipError: if one cannot be written, or is a pipe that nobody reads.
    """
    for file in filter(None, files):
        try:
            if not file.exists():
                check_folders(file.parent)
                continue
            # A pipe without a reader would be waited for.
            os.close(os.open(file, os.O_WRONLY | os.O_APPEND | getattr(os, "O_NONBLOCK", 0)))
        except OSError as error:
            raise cannot_write(file, error) from error


def check_pictures(*files: Path | None) -> None:
    """Try whether pictures can be written: the file, and the format that its name ends in.

    Args:
        *files: what will be written; `None` is passed over.

    Raises:
        DynskipError: if one cannot be written.
    """
    known = matplotlib("backend_bases").FigureCanvasBase.get_supported_filetypes()
    for file in filter(None, files):
        if file.suffix.lower().removeprefix(".") not in known:
            raise DynskipError(f"{file}: no picture can be written as {file.suffix!r}. Name a .png, .pdf or .svg.")
        check_files(file)


@contextlib.contextmanager
def whole_file(file: Path, then: str = "") -> Iterator[BinaryIO]:
    """Open a file that takes its place when all of it is written, so that it is there whole or not at all.

    Args:
        file: the file.
        then: what to do after an error.

    Yields:
        The unfinished file, `file.part`.

    Raises:
        DynskipError: if it cannot be written. What was there before stays.
    """
    unfinished = file.with_name(f"{file.name}.part")
    try:
        with unfinished.open("wb") as opened:
            yield opened
        os.replace(unfinished, file)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError
        unfinished.unlink(missing_ok=True)
        raise cannot_write(file, error, then) from error


def cannot_write(path: Path, error: BaseException, then: str = "") -> DynskipError:
    """Say why something could not be written. The advice to make room belongs to a full disk alone.

    Args:
        path: what was written.
        error: what was raised.
        then: what to do after that.

    Returns:
        The error to raise.
    """
    number = _errno(error)
    if number in _FULL:
        free = "the disk or your share of it is full"
        with contextlib.suppress(OSError):
            free += f": {size_of(shutil.disk_usage(path if path.is_dir() else path.parent).free)} are free"
        why, advice = free, "Make room."
    else:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        why, advice = _WHY.get(number or 0, (first, "Look at the folder and its disk, or name another place."))
    return DynskipError(f"Could not write {path} ({why}). {advice} {then}".rstrip())


def size_of(count: float) -> str:
    """Write a number of bytes for reading."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _errno(error: BaseException | None) -> int | None:
    """Return the system's number of what went wrong, which some libraries only write into their message."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if match := re.search(r"(?:os error|Os { code:) (\d+)", str(error)):  # safetensors, newer and older
            return int(match[1])
        error = error.__cause__ or error.__context__
    return None
