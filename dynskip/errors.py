"""The one exception family that dynskip raises for input it cannot work with."""

from __future__ import annotations

import errno
import re


class DynskipError(ValueError):
    """Something given to dynskip does not fit; the message says what, what was expected, and how to fix it."""


# What the allocators of torch, oneDNN, C++ and the system say; torch raises RuntimeError for all of them.
_NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|cannot allocate memory|bad_alloc|bad allocation"
    r"|failed to map segment|could not create a (primitive(?! desc)|memory)",
    re.IGNORECASE,
)


def lacks_memory(error: BaseException) -> bool:
    """Say whether an error is about memory, and so says nothing about what was given."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # A library that cannot be loaded for a lack of memory is an ImportError.
    told = isinstance(error, RuntimeError | ImportError) and _NO_MEMORY.search(str(error)) is not None
    return told or isinstance(error, MemoryError)
