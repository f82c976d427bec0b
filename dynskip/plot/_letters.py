"""A font that has the letters: one rule for matplotlib's pictures and for those that Pillow draws."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynskip.errors import DynskipError


def matplotlib(module: str) -> Any:
    """Import a module of matplotlib, or say how to install it."""
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ModuleNotFoundError as error:
        raise DynskipError("Drawing needs matplotlib. Install dynskip with the extra `plot`.") from error


@dataclass(frozen=True)
class Font:
    """A font file, and the letters that it has.

    Attributes:
        path: the file, for `PIL.ImageFont.truetype` or `matplotlib.font_manager.FontProperties(fname=...)`.
        letters: code points.
    """

    path: str
    letters: frozenset[int]

    def has(self, text: str) -> bool:
        """Say whether it can draw all of a text."""
        return self.letters.issuperset(_drawn(text))

    def spell(self, text: str) -> str:
        r"""Return a text with escapes, such as `\\u8dd1`, for letters that would be drawn as boxes."""
        lacking = _drawn(text) - self.letters
        return "".join(_escaped(letter) if ord(letter) in lacking else letter for letter in text)

    def names(self, names: Sequence[str]) -> list[str]:
        """Return the names of classes, with the number of the class in front of those that it cannot draw."""
        return [name if self.has(name) else f"class {number} {name}" for number, name in enumerate(names)]


def find_font(text: str, named: Path | None = None) -> Font:
    """Choose a font that has all letters of a text, or else most of them, with a warning.

    Args:
        text: all that is to be drawn.
        named: a font file to use in any case.

    Returns:
        matplotlib's font if it has the letters; else the first of the installed ones that has the most of them.

    Raises:
        DynskipError: if matplotlib is missing, or the named file is no font.
    """
    return _find(frozenset(_drawn(text)), named)


@functools.cache
def _find(wanted: frozenset[int], named: Path | None) -> Font:
    best: Font | None = None
    for path in [str(named)] if named is not None else _installed():
        try:
            font = Font(path, _letters_of(path))
        except (OSError, RuntimeError) as error:
            if named is not None:
                raise DynskipError(f"{named} is no readable font ({error}). Name a .ttf or .otf file.") from error
            continue
        if best is None or len(wanted & font.letters) > len(wanted & best.letters):
            best = font
        if wanted <= font.letters:
            break
    if best is None:
        raise DynskipError("No font can be read. Install matplotlib again: it brings one.")
    lacking = "".join(letter for letter in map(chr, sorted(wanted - best.letters)) if letter.isprintable())
    if lacking:  # what is no letter, such as a byte of a name that is not UTF-8, no font has
        warnings.warn(
            f"{best.path} lacks the letters {_escaped(lacking)}, which are written otherwise. Install a font that has "
            "them (on Debian, fonts-noto-core and fonts-noto-cjk).",
            stacklevel=4,
        )
    return best


def _installed() -> Iterator[str]:
    """Yield font files: the one that matplotlib would take, then all others, upright and of usual weight first."""
    manager = matplotlib("font_manager")
    yield manager.findfont(manager.FontProperties())
    usual = ("normal", "regular", "book", "400", "500")
    # The font of last resort draws a box for every letter there is.
    fonts = [font for font in manager.fontManager.ttflist if not font.name.startswith("Last Resort")]
    yield from (
        path for _, _, path in sorted((f.style != "normal", str(f.weight) not in usual, f.fname) for f in fonts)
    )


@functools.cache
def _letters_of(path: str) -> frozenset[int]:
    return frozenset(matplotlib("ft2font").FT2Font(path).get_charmap())


def _drawn(text: str) -> set[int]:
    return {ord(letter) for letter in text if letter not in "\n\t "}


def _escaped(text: str) -> str:
    return text.encode("unicode_escape").decode()
