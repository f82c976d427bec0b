"""One run at a time in an output folder."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from dynskip.errors import DynskipError


@contextlib.contextmanager
def hold_folder(folder: Path, needed: bool = True) -> Iterator[None]:
    """Keep other processes out of a folder while this one writes to it.

    The system holds the lock (on `folder/.lock`), so a process that dies gives it back.

    Args:
        folder: the folder; made if it is not there.
        needed: whether to do anything; of several processes of one run, the first one holds the folder.

    Raises:
        DynskipError: if another process holds it; the message names host and process.
        OSError: if the folder cannot be written.
    """
    if not needed:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            # A lock of the process, not of the open file: its workers do not inherit it, and so cannot outlive it.
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (ImportError, OSError) as error:
            if getattr(error, "errno", None) in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise DynskipError(
                    f"Another run writes to {folder}: {file.read().strip() or 'it has just begun'}. Wait until it "
                    "ends or stop it, or choose another folder."
                ) from None
            warnings.warn(f"{folder} cannot be locked ({error}). Start no other run there.", stacklevel=3)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        yield
