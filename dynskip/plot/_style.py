"""What all pictures share: colours, a canvas whose unit is the inch, and text that fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from dynskip.errors import DynskipError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Theme(NamedTuple):
    """Colours that differ between light and dark pictures."""

    background: str
    ink: str
    muted: str
    track: str
    unseen: str


LIGHT = Theme(background="#ffffff", ink="#1f2328", muted="#59636e", track="#e6e9ed", unseen="#24292f")
DARK = Theme(background="#0d1117", ink="#f0f3f6", muted="#9ea7b3", track="#21262d", unseen="#000000")
# Okabe and Ito's palette keeps its contrasts under the common forms of colour blindness.
USED, STOPPED, FALLBACK, RELEVANT, GATES = "#009E73", "#E69F00", "#D55E00", "#0072B2", "#56B4E9"

# All lengths are inches; drawing happens in an axes whose unit is the inch.
MARGIN = 0.15
FONT = 10.0


def open_canvas(width: float, height: float, theme: Theme) -> tuple[Figure, Axes]:
    """Make a figure of a size in inches, with axes over all of it whose unit is the inch."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DynskipError("Drawing needs matplotlib. Run `pip install 'dynskip[plot]'`.") from error
    figure = Figure(figsize=(width, height), dpi=150, facecolor=theme.background)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return figure, axes


def rectangle(axes: Axes, x: float, y: float, width: float, height: float, **style: Any) -> None:
    """Draw a rectangle from its lower left corner."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, **{"linewidth": 0.8, **style}))


def write(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    """Write text around a point."""
    axes.text(x, y, text, **{"ha": "center", "va": "center", "parse_math": False, **style})


def draw_title(axes: Axes, title: str | None, x: float, theme: Theme) -> None:
    """Write the title at the top, in letters small enough for the width, if there is one."""
    if title:
        width, height = axes.get_xlim()[1], axes.get_ylim()[1]
        size = min(fitting_size(line, width - x - MARGIN, 12.0) for line in title.splitlines())
        write(axes, x, height - MARGIN, title, ha="left", va="top", size=size, color=theme.ink)


def height_of_title(title: str | None) -> float:
    """Height in inches to leave for a title; 0 without one."""
    return 0.1 + 0.21 * len(title.splitlines()) if title else 0.0


def text_width(text: str, size: float) -> float:
    """Width in inches of one line of text at a font size in points."""
    from matplotlib.textpath import TextPath

    # A pair of dollar signs would be read as mathematics.
    path = TextPath((0, 0), text.replace("$", "S"), size=1)
    # Drawn letters come out a little wider, because their steps are rounded to pixels.
    return max(1.06 * path.get_extents().width, 0.1) * size / 72


def fitting_size(text: str, width: float, largest: float) -> float:
    """Font size in points with which one line of text fits a width in inches."""
    return min(largest, width / text_width(text, 1.0))


def shade_of(stage: int, num_stages: int, theme: Theme) -> str:
    """A colour that is the stronger the later a frame stopped."""
    weight = 0.25 + 0.75 * (stage + 1) / num_stages
    parts = zip(_channels(theme.background), _channels(STOPPED), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * weight):02x}" for a, b in parts)


def ink_on(colour: str) -> str:
    """Black or white, whichever is readable on a colour."""
    red, green, blue = _channels(colour)
    return LIGHT.ink if 0.299 * red + 0.587 * green + 0.114 * blue > 125 else DARK.ink


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
