"""What all pictures share: colours, a canvas whose unit is the inch, and text that fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from dynskip.plot._letters import Font, find_font
from dynskip.plot._letters import matplotlib as matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette keeps its contrasts under the common forms of colour blindness.
USED, STOPPED, FALLBACK, RELEVANT, GATES = "#009E73", "#E69F00", "#D55E00", "#0072B2", "#56B4E9"
MARGIN = 0.15  # in inches, like all lengths
FONT = 10.0  # in points


class Theme(NamedTuple):
    """Colours that differ between light and dark pictures."""

    background: str
    ink: str
    muted: str
    track: str
    unseen: str

    def shade(self, stage: int, num_stages: int) -> str:
        """Colour of frames that stopped after a stage: stronger for later stages."""
        weight = 0.25 + 0.75 * (stage + 1) / num_stages
        parts = zip(_channels(self.background), _channels(STOPPED), strict=True)
        return "#" + "".join(f"{round(a + (b - a) * weight):02x}" for a, b in parts)


LIGHT = Theme(background="#ffffff", ink="#1f2328", muted="#59636e", track="#e6e9ed", unseen="#24292f")
DARK = Theme(background="#0d1117", ink="#f0f3f6", muted="#9ea7b3", track="#3d444d", unseen="#000000")


class Canvas:
    """A figure with axes over all of it whose unit is the inch, and a title at its top.

    `height` is without the title, which is written in letters small enough for the width.
    """

    def __init__(self, width: float, height: float, title: str | None, theme: Theme, left: float = MARGIN) -> None:
        title = title or ""
        lines = title.splitlines()
        self.theme, self.top = theme, height - MARGIN
        full_height = height + 0.1 + 0.21 * len(lines) if lines else height
        self.figure: Figure = matplotlib("figure").Figure((width, full_height), dpi=150, facecolor=theme.background)
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, full_height))
        self.axes.set_axis_off()
        if lines:
            size = min(fitting_size(line, width - left - MARGIN, 12.0) for line in lines)
            self.write(left, full_height - MARGIN, title, ha="left", va="top", size=size)

    def rectangle(self, x: float, y: float, width: float, height: float, **style: Any) -> None:
        """Draw a rectangle from its lower left corner."""
        self.axes.add_patch(matplotlib("patches").Rectangle((x, y), width, height, **{"linewidth": 0.8, **style}))

    def write(self, x: float, y: float, text: str, **style: Any) -> None:
        """Write text around a point."""
        font = find_font(text)
        style = {"ha": "center", "va": "center", "size": FONT, "color": self.theme.ink, **style}
        self.axes.text(x, y, font.spell(text), parse_math=False, fontproperties=properties(font), **style)

    def legend(self, handles: list[Any], x: float, y: float, **style: Any) -> None:
        """Draw a legend from its lower left corner."""
        style |= {"bbox_to_anchor": (x, y), "bbox_transform": self.figure.dpi_scale_trans, "labelcolor": self.theme.ink}
        style |= {"loc": "lower left", "frameon": False, "fontsize": FONT, "borderpad": 0, "borderaxespad": 0}
        for text in self.figure.legend(handles=handles, **style).get_texts():
            font = find_font(text.get_text())
            text.set(text=font.spell(text.get_text()), fontproperties=properties(font, FONT))


def properties(font: Font, size: float | None = None) -> Any:
    """Return a font as matplotlib takes it."""
    return matplotlib("font_manager").FontProperties(fname=font.path, size=size)


def text_width(text: str, size: float = FONT) -> float:
    """Width in inches of one line of text at a font size in points."""
    font = find_font(text)
    # A pair of dollar signs would be read as mathematics.
    path = matplotlib("textpath").TextPath((0, 0), font.spell(text).replace("$", "S"), size=1, prop=properties(font))
    width: float = path.get_extents().width
    # Letters are drawn a little wider, because their positions are rounded to pixels.
    return max(1.06 * width, 0.1) * size / 72


def fitting_size(text: str, width: float, largest: float) -> float:
    """Font size in points with which one line of text fits a width in inches."""
    return min(largest, width / text_width(text, 1.0))


def ink_on(colour: str) -> str:
    """Black or white: the one that is readable on a colour."""
    red, green, blue = _channels(colour)
    return LIGHT.ink if 0.299 * red + 0.587 * green + 0.114 * blue > 125 else DARK.ink


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
