"""Why a file gives no frames: each cause has its own advice, and the machine's faults are told from the file's."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from dynskip.errors import DynskipError, lacks_memory
from dynskip.video.source import VideoError


class MachineError(DynskipError):
    """This machine cannot read a file now: no permission, memory or descriptors, or a disk that fails.

    It says nothing about the file. Whoever lists videos that cannot be read leaves such files out of the list.
    """


_NO_PERMISSION = (
    "you have no permission to read it. Ask its owner to run `chmod a+r` on it (and `chmod a+x` on its folders), or "
    "start as another user."
)
_DRIVE = "the disk or network drive that holds it failed ({error}). Try again later, and look at the drive."
_OF_THE_MACHINE = {
    errno.EACCES: _NO_PERMISSION,
    errno.EPERM: _NO_PERMISSION,
    errno.EMFILE: "this process has too many open files. Raise the limit (`ulimit -n 65536`), or use fewer workers.",
    errno.ENFILE: "this machine has too many open files. Close other programs, or use fewer workers.",
    **dict.fromkeys(
        (
            getattr(errno, name)
            for name in (
                "EIO", "ESTALE", "ETIMEDOUT", "ENXIO", "ENODEV", "EREMOTEIO", "ENOLINK", "EHOSTDOWN", "EHOSTUNREACH",
                "ENETDOWN", "ENETUNREACH", "ECONNRESET", "ECONNABORTED", "ENOTCONN", "EUCLEAN", "EBADMSG",
            )
            if hasattr(errno, name)
        ),
        _DRIVE,
    ),
}  # fmt: skip
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def explain(error: BaseException, address: Path | str, kind: str = "video") -> DynskipError:
    """Turn what went wrong with a file into an error that names the cause and what helps.

    Args:
        error: what was raised while it was opened or read.
        address: the file, or another address that FFmpeg opens.
        kind: what it should be, "video" or "picture".

    Returns:
        `VideoError` if the file is at fault, `MachineError` if this machine is.
    """
    number = getattr(error, "errno", None)
    if lacks_memory(error) or number == errno.ENOMEM:
        return MachineError(f"{address}: memory ran out ({error}). Use fewer workers, or smaller batches.")
    if "://" in str(address):
        return VideoError(f"{address}: cannot be opened ({error}). Check the address and the network.")
    if number in (errno.ENOENT, errno.ENOTDIR):
        return VideoError(f"{address}: no such file.")
    if number in _OF_THE_MACHINE:
        return MachineError(f"{address}: {_OF_THE_MACHINE[number].format(error=error)}")
    with contextlib.suppress(OSError):
        if os.path.isfile(address) and (fault := file_fault(Path(address))):
            return VideoError(f"{address}: {fault.format(kind=kind)}")
    advice = "Extract this video's frames again." if kind == "picture" else "Try to play or re-encode it."
    return VideoError(f"{address}: not a readable {kind} ({error}). {advice}")


def of_machine(error: BaseException) -> bool:
    """Whether an error while a file was read is this machine's fault, not the file's."""
    number = getattr(error, "errno", None)
    return lacks_memory(error) or number == errno.ENOMEM or number in _OF_THE_MACHINE


def check_regular(path: Path, mode: int) -> None:
    """Refuse, before it is opened, what is no regular file: a pipe would be waited for without end.

    Args:
        path: where it is.
        mode: its `st_mode`.

    Raises:
        VideoError: if it is a pipe, a socket or a device.
    """
    if (kind := _KINDS.get(stat.S_IFMT(mode))) is not None:
        raise VideoError(
            f"{path}: is {kind}, which can be read only once. Expected a file. Live sources are watched with "
            "examples/stream_video.py."
        )


def file_fault(path: Path) -> str | None:
    """Say what is wrong with a file that cannot be read, as far as its bytes tell; `{kind}` stands for what it is not.

    Args:
        path: a regular file.

    Returns:
        The cause and what helps, or `None`.

    Raises:
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        head, size = file.read(512), path.stat().st_size
        if not size:
            return "is empty (0 bytes). Fetch it again."
        if not any(head):
            return "begins with zeros: its download never got that far. Fetch it again."
        if head.startswith(b"version https://git-lfs"):
            return "is only a pointer to the file, which Git LFS keeps. Run `git lfs pull`."
        if (text := _as_text(head)) is not None:
            if text.lstrip().lower().startswith(("<!doctype", "<html", "<?xml", "<head", "<body")):
                return "is a web page, no {kind}: its download failed. Fetch it again."
            return "is text, no {kind}. Give the file itself."
        if not _is_mp4(head):
            return None
        if _is_encrypted(file, size):
            return ENCRYPTED
        if (end := _end(file, size)) > size:
            return f"is cut off: {size} of at least {end} bytes are there. Fetch it again."
    return None


def is_cut_off(path: Path) -> bool:
    """Whether an MP4 file goes on behind its end, as a download does that stopped."""
    with path.open("rb") as file:
        size = path.stat().st_size
        return _is_mp4(file.read(8)) and _end(file, size) > size


ENCRYPTED = (
    "is encrypted (DRM): only the shop's key shows its pictures, and encoding it again does not help. Get it without "
    "encryption."
)


def check_encryption(path: Path) -> None:
    """Refuse an MP4 file whose pictures are encrypted: some decoders make noise of them.

    Args:
        path: a regular file that FFmpeg could open.

    Raises:
        VideoError: if its container says that the pictures are encrypted.
    """
    with path.open("rb") as file:
        if _is_mp4(file.read(8)) and _is_encrypted(file, path.stat().st_size):
            raise VideoError(f"{path}: {ENCRYPTED}")


def _as_text(head: bytes) -> str | None:
    """Return the first bytes of a file as text, unless they are none."""
    if any(byte < 32 and byte not in b"\t\n\f\r\x1b" for byte in head):
        return None
    for cut in range(4):  # the last letter may be cut
        with contextlib.suppress(UnicodeDecodeError):
            return head[: len(head) - cut].decode("utf-8-sig")
    return None


def _is_mp4(head: bytes) -> bool:
    return head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp")


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, begin of content and end of the boxes of an MP4 file. The last one may end after the file."""
    while start + 8 <= end:
        file.seek(start)
        head = file.read(16)
        size, name, begin = int.from_bytes(head[:4], "big"), head[4:8], start + 8
        if size == 1 and len(head) == 16:
            (size,), begin = struct.unpack(">Q", head[8:]), start + 16
        elif size == 0:  # up to the end
            size = end - start
        if size < begin - start:
            return
        yield name, begin, start + size
        start += size


def _end(file: BinaryIO, size: int) -> int:
    """Return where the last box of an MP4 file ends."""
    return max((end for _, _, end in _boxes(file, 0, size)), default=0)


def _inside(file: BinaryIO, start: int, end: int, names: Sequence[bytes]) -> Iterator[bytes]:
    """Yield the names of the boxes that lie inside the named ones."""
    for name, begin, stop in _boxes(file, start, end):
        if not names:
            yield name
        elif name == names[0]:
            skipped = 8 if name == b"stsd" else 0  # its version, and how many entries it has
            yield from _inside(file, begin + skipped, min(stop, end), names[1:])


def _is_encrypted(file: BinaryIO, size: int) -> bool:
    return b"encv" in _inside(file, 0, size, (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd"))
