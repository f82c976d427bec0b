"""How much memory is left: of the machine, of the container, of the process."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from dynskip.errors import DynskipError
from dynskip.video.outputs import size_of


def check_memory(needed: int, what: str, advice: str) -> None:
    """Refuse what will not fit.

    Args:
        needed: bytes, at least.
        what: what takes them.
        advice: what to do instead.

    Raises:
        DynskipError: if fewer are left.
    """
    if (left := memory_left()) < needed:
        raise DynskipError(f"{what} takes {size_of(needed)} of memory at least, and {size_of(left)} are left. {advice}")


def memory_left(root: Path = Path("/")) -> float:
    """Return the bytes that this process may still take; infinite where the system does not tell.

    Args:
        root: where the system's files are.
    """
    left = [math.inf]
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                left.append(1024 * int(line.split()[1]))
    with contextlib.suppress(OSError, ValueError):
        left += _left_in_groups(root)
    with contextlib.suppress(OSError, ValueError, ImportError):
        import resource  # not on Windows

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if sys.platform == "linux" and limit != resource.RLIM_INFINITY:
            pages = int((root / "proc/self/statm").read_text().split()[0])
            left.append(limit - pages * resource.getpagesize())
    return max(min(left), 0)


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield what is left in this process's control groups, which limit containers and jobs."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        if controllers and "memory" not in controllers.split(","):
            continue
        limit, used = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        group = top / name.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):
                most = int((folder / f"memory.{limit}").read_text())
                yield most - int((folder / f"memory.{used}").read_text()) + _given_back(folder)
            if folder == top:
                break


def _given_back(group: Path) -> int:
    """Return the bytes of files in memory, which the system gives back when they are needed."""
    counts = dict(line.split(" ", 1) for line in (group / "memory.stat").read_text().splitlines())
    return int(counts.get("inactive_file", 0))
