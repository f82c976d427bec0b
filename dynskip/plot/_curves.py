"""Accuracy against compute, as lines."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dynskip.errors import DynskipError
from dynskip.plot._style import (
    DARK,
    FALLBACK,
    FONT,
    LIGHT,
    MARGIN,
    RELEVANT,
    STOPPED,
    USED,
    draw_title,
    height_of_title,
    open_canvas,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynskip.calibrate import CurvePoint

_CURVES = (RELEVANT, FALLBACK, USED, "#CC79A7", STOPPED, "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # told apart without colour, too


def accuracy_compute(
    curves: Mapping[str, Sequence[CurvePoint]],
    chosen: CurvePoint | None = None,
    *,
    metric: str = "top-1",
    title: str | None = None,
    dark: bool = False,
) -> Figure:
    """Draw accuracy against executed compute, one line a curve.

    Args:
        curves: Points by the name of their curve, such as those of `dynskip.calibrate`; a single point, such as the
            dense backbone, becomes a mark.
        chosen: A point to mark with a ring, such as `Calibration.point`.
        metric: Name of the accuracy, for the axis.
        title: Text above the picture; may have several lines.
        dark: Light text on dark ground.

    Returns:
        The figure; compute is in GMACs (10^9 multiply-adds) a video, accuracy in percent.

    Raises:
        DynskipError: if matplotlib is missing, or there is nothing to draw.
    """
    if not curves or not all(curves.values()):
        raise DynskipError(f"Every curve needs a point; got { ({name: len(c) for name, c in curves.items()}) }.")
    theme = DARK if dark else LIGHT
    legend_columns = 2 if max(map(len, curves)) <= 26 else 1  # longer names would be cut
    width, legend_height = 6.4, 0.24 * -(-(len(curves) + (chosen is not None)) // legend_columns)
    left, right, bottom = 0.75, 0.25, 0.6 + legend_height
    height = 3.4 + height_of_title(title) + bottom
    figure, canvas = open_canvas(width, height, theme)
    draw_title(canvas, title, MARGIN, theme)
    box = (left / width, bottom / height, 1 - (left + right) / width, 3.3 / height)
    axes = figure.add_axes(box, facecolor=theme.background)
    for (name, points), colour, marker in zip(
        curves.items(), itertools.cycle(_CURVES), itertools.cycle(_MARKERS), strict=False
    ):
        ordered = sorted(points, key=lambda point: point.macs)
        x, y = [point.macs / 1e9 for point in ordered], [100 * point.accuracy for point in ordered]
        axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.6, label=name, clip_on=False, zorder=3)
    if chosen is not None:
        style: dict[str, Any] = {
            "facecolors": "none",
            "edgecolors": theme.ink,
            "linewidths": 1.8,
            "clip_on": False,
            "zorder": 4,
        }
        axes.scatter([chosen.macs / 1e9], [100 * chosen.accuracy], s=130, label="chosen", **style)
    axes.set_xlim(left=0)
    axes.set_xlabel("GMACs per video (10⁹ multiply-adds)", color=theme.ink, fontsize=FONT)
    axes.set_ylabel(f"{metric} %", color=theme.ink, fontsize=FONT)
    axes.tick_params(colors=theme.muted, labelsize=FONT - 1)
    axes.grid(color=theme.track, linewidth=0.8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.muted)
    figure.legend(
        *axes.get_legend_handles_labels(),
        ncols=legend_columns,
        loc="lower left",
        bbox_to_anchor=(left / width, 0.7 * MARGIN / height),
        frameon=False,
        labelcolor=theme.ink,
        fontsize=FONT,
        borderpad=0,
        borderaxespad=0,
    )
    return figure
