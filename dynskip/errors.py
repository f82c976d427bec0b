"""The one exception family that dynskip raises for input it cannot work with."""

from __future__ import annotations


class DynskipError(ValueError):
    """Something given to dynskip does not fit; the message says what, what was expected, and how to fix it."""
