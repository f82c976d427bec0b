"""Pictures of what was decided: the frames of one video, the shares over many, and accuracy against compute.

Needs matplotlib (`pip install 'dynskip[plot]'`). Figures are returned, never shown, and leave no global
state behind: save one with `figure.savefig("timeline.png")`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynskip.errors import DynskipError
from dynskip.metrics import FrameUsage, check_stopped_at
from dynskip.output import UNSEEN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from dynskip.calibrate import CurvePoint


class _Theme(NamedTuple):
    background: str
    ink: str
    muted: str
    track: str
    unseen: str


_LIGHT = _Theme(background="#ffffff", ink="#1f2328", muted="#59636e", track="#e6e9ed", unseen="#24292f")
_DARK = _Theme(background="#0d1117", ink="#f0f3f6", muted="#9ea7b3", track="#21262d", unseen="#000000")
# Okabe and Ito's palette keeps its contrasts under the common forms of colour blindness.
_USED, _STOPPED, _FALLBACK, _RELEVANT = "#009E73", "#E69F00", "#D55E00", "#0072B2"
_USED_STYLE = {"fill": False, "edgecolor": _USED, "linewidth": 2}
_FALLBACK_STYLE = {"fill": False, "edgecolor": _FALLBACK, "linewidth": 2, "linestyle": (0, (2, 1))}

_CURVES = (_RELEVANT, _FALLBACK, _USED, "#CC79A7", _STOPPED, "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # told apart without colour, too

# All lengths are inches; drawing happens in an axes whose unit is the inch.
_TILE, _GAP, _MARGIN, _PER_LINE, _MIN_WIDTH = 0.75, 0.06, 0.15, 16, 7.0
_FONT = 10.0


def timeline(
    frames: Tensor | NDArray[np.uint8],
    stopped_at: Tensor | NDArray[np.int64] | Sequence[int],
    stage_names: Sequence[str],
    *,
    fallback_frame: int = -1,
    relevant: Tensor | NDArray[np.bool_] | Sequence[bool] | None = None,
    title: str | None = None,
    dark: bool = False,
) -> Figure:
    """Draw the frames of one video, and below each what the model did with it.

    A used frame appears again, framed. A stopped one becomes a tile with the name of the stage it stopped
    after, in a stronger colour the later that was; an unseen one becomes a black tile "exit". Long videos
    continue on a new line every 16 frames.

    Args:
        frames: `(T, H, W, 3)` uint8 RGB, as decoded and before normalisation.
        stopped_at: `(T,)`, one row of `SkipOutput.stopped_at`.
        stage_names: Names of the N stages, e.g. `model.backbone.stage_names`.
        fallback_frame: Index of the frame that was forwarded because no frame was used; -1 if none was.
        relevant: `(T,)` bool, the frames inside an annotated segment; drawn as bars below the tiles.
        title: Text above the picture; may have several lines.
        dark: Light text on dark ground.

    Returns:
        The figure.

    Raises:
        DynskipError: When matplotlib is missing, or lengths, types or values do not fit.

    Reference:
        Thesis Fig. 4.2.
    """
    images = np.asarray(frames.cpu() if isinstance(frames, Tensor) else frames)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or images.size == 0:
        raise DynskipError(
            f"frames is {images.dtype} of shape {images.shape}, but must be uint8 of shape (T, H, W, 3) "
            "with T >= 1; pass the decoded pictures, not the normalised input of the model."
        )
    length, height, width, _ = images.shape
    decisions = torch.as_tensor(stopped_at).cpu()
    _check_length("stopped_at", decisions, length)
    check_stopped_at(decisions, len(stage_names))
    if not -1 <= fallback_frame < length:
        raise DynskipError(
            f"fallback_frame is {fallback_frame}, but must be from 0 to {length - 1}, or -1 if there is none."
        )
    marks = None if relevant is None else torch.as_tensor(relevant).cpu()
    if marks is not None:
        _check_length("relevant", marks, length)
        if marks.dtype != torch.bool:
            raise DynskipError(f"relevant is {marks.dtype}, but must be bool, one truth value per frame.")

    theme = _DARK if dark else _LIGHT
    tile_height = _TILE * height / width
    line_height = 2 * tile_height + _GAP + (0.0 if marks is None else 0.16) + 0.16
    title_height = _title_height(title)
    left = _MARGIN + 0.22
    columns = min(length, _PER_LINE)
    figure_width = max(_MIN_WIDTH, left + columns * (_TILE + _GAP) - _GAP + _MARGIN)
    figure_height = 2 * _MARGIN + title_height + line_height * -(-length // _PER_LINE) + 0.18
    figure, axes = _canvas(figure_width, figure_height, theme)
    _draw_title(axes, title, left, theme)
    font = min(_fitting_size(name, _TILE * 0.86, _FONT) for name in stage_names)

    for start in range(0, length, _PER_LINE):
        top = figure_height - _MARGIN - title_height - line_height * (start // _PER_LINE)
        bottom = top - 2 * tile_height - _GAP
        for row, name in enumerate(("input", "decision")):
            middle = top - tile_height / 2 - row * (tile_height + _GAP)
            _write(axes, left - 0.14, middle, name, size=8, color=theme.muted, rotation=90)
        for column, t in enumerate(range(start, min(start + _PER_LINE, length))):
            x = left + column * (_TILE + _GAP)
            axes.imshow(images[t], extent=(x, x + _TILE, top - tile_height, top), aspect="auto")
            stage = int(decisions[t])
            if t == fallback_frame or stage == len(stage_names):
                axes.imshow(images[t], extent=(x, x + _TILE, bottom, bottom + tile_height), aspect="auto")
                _draw_frame(axes, x, bottom, tile_height, fallback=t == fallback_frame)
            else:
                if stage == UNSEEN:
                    label, colour, size = "exit", theme.unseen, _FONT
                else:
                    label, colour, size = stage_names[stage], _shade(stage, len(stage_names), theme), font
                _rectangle(axes, x, bottom, _TILE, tile_height, facecolor=colour, edgecolor=theme.track)
                middle = bottom + tile_height / 2
                _write(axes, x + _TILE / 2, middle, label, size=size, color=_ink_on(colour))
            if marks is not None:
                # Bars of one kind join over the gap, so that a segment is seen as one piece.
                joined = column + 1 < _PER_LINE and t + 1 < length and marks[t] == marks[t + 1]
                bar = _TILE + (_GAP if joined else 0.0)
                colour = _RELEVANT if marks[t] else theme.track
                _rectangle(axes, x, bottom - 0.16, bar, 0.08, facecolor=colour)
    _draw_legend(figure, decisions, len(stage_names), fallback_frame >= 0, marks is not None, left, theme)
    return figure


def frame_usage(
    usage: FrameUsage, stage_names: Sequence[str], *, title: str | None = None, dark: bool = False
) -> Figure:
    """Draw the shares of frames used, stopped after each stage, and unseen as horizontal bars.

    Args:
        usage: From `dynskip.metrics.frame_usage`.
        stage_names: Names of the N stages, e.g. `model.backbone.stage_names`.
        title: Text above the picture; may have several lines.
        dark: Light text on dark ground.

    Returns:
        The figure.

    Raises:
        DynskipError: When matplotlib is missing, or there are not as many names as stages.

    Reference:
        Thesis Fig. 4.1.
    """
    if len(usage.stopped) != len(stage_names):
        raise DynskipError(
            f"stage_names has {len(stage_names)} names, but the usage counts {len(usage.stopped)} stages; "
            "take both from the same model."
        )
    theme = _DARK if dark else _LIGHT
    rows = [("used", usage.used, _USED)]
    for n, (name, share) in enumerate(zip(stage_names, usage.stopped, strict=True)):
        rows.append((f"stopped after {name}", share, _shade(n, len(stage_names), theme)))
    rows.append(("unseen", usage.unseen, theme.unseen))

    names_width = max(_text_width(name, _FONT) for name, _, _ in rows)
    left = _MARGIN + names_width + 0.15
    bars_width, step, thickness = 4.5, 0.34, 0.22
    title_height = _title_height(title)
    figure_width = left + bars_width + 0.75 + _MARGIN
    figure_height = 2 * _MARGIN + title_height + step * len(rows)
    figure, axes = _canvas(figure_width, figure_height, theme)
    _draw_title(axes, title, _MARGIN, theme)
    for i, (name, share, colour) in enumerate(rows):
        y = figure_height - _MARGIN - title_height - step * (i + 0.5)
        bottom = y - thickness / 2
        _write(axes, left - 0.15, y, name, ha="right", size=_FONT, color=theme.ink)
        _rectangle(axes, left, bottom, bars_width, thickness, facecolor=theme.track)
        style = {"facecolor": colour, "edgecolor": theme.muted}
        _rectangle(axes, left, bottom, bars_width * share, thickness, **style)
        percent = f"{100 * share:.1f} %"
        _write(axes, figure_width - _MARGIN, y, percent, ha="right", size=_FONT, color=theme.muted)
    return figure


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
        DynskipError: When matplotlib is missing, or there is nothing to draw.
    """
    if not curves or not all(curves.values()):
        raise DynskipError(f"Every curve needs a point; got { ({name: len(c) for name, c in curves.items()}) }.")
    theme = _DARK if dark else _LIGHT
    width, legend_height = 6.4, 0.24 * -(-(len(curves) + (chosen is not None)) // 2)
    left, right, bottom = 0.75, 0.25, 0.6 + legend_height
    height = 3.4 + _title_height(title) + bottom
    figure, canvas = _canvas(width, height, theme)
    _draw_title(canvas, title, _MARGIN, theme)
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
    axes.set_xlabel("GMACs per video (10⁹ multiply-adds)", color=theme.ink, fontsize=_FONT)
    axes.set_ylabel(f"{metric} %", color=theme.ink, fontsize=_FONT)
    axes.tick_params(colors=theme.muted, labelsize=_FONT - 1)
    axes.grid(color=theme.track, linewidth=0.8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.muted)
    figure.legend(
        *axes.get_legend_handles_labels(),
        ncols=2,
        loc="lower left",
        bbox_to_anchor=(left / width, 0.7 * _MARGIN / height),
        frameon=False,
        labelcolor=theme.ink,
        fontsize=_FONT,
        borderpad=0,
        borderaxespad=0,
    )
    return figure


def _canvas(width: float, height: float, theme: _Theme) -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DynskipError("Drawing needs matplotlib; install it: pip install 'dynskip[plot]'.") from error
    figure = Figure(figsize=(width, height), dpi=150, facecolor=theme.background)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return figure, axes


def _rectangle(axes: Axes, x: float, y: float, width: float, height: float, **style: Any) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, **{"linewidth": 0.8, **style}))


def _write(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    axes.text(x, y, text, **{"ha": "center", "va": "center", "parse_math": False, **style})


def _draw_frame(axes: Axes, x: float, y: float, height: float, fallback: bool) -> None:
    """Frame a picture that reached the head; dashes and a name tell a fallback without colour."""
    style = {**(_FALLBACK_STYLE if fallback else _USED_STYLE), "linewidth": 3, "zorder": 3}
    inset = 0.02  # about half the line's width, so that the line stays within the tile
    _rectangle(axes, x + inset, y + inset, _TILE - 2 * inset, height - 2 * inset, **style)
    if fallback:
        _rectangle(axes, x, y, _TILE, 0.17, facecolor=_FALLBACK, zorder=3)
        _write(axes, x + _TILE / 2, y + 0.085, "fallback", size=8, color="white", zorder=4)


def _draw_title(axes: Axes, title: str | None, x: float, theme: _Theme) -> None:
    if title:
        width, height = axes.get_xlim()[1], axes.get_ylim()[1]
        size = min(_fitting_size(line, width - x - _MARGIN, 12.0) for line in title.splitlines())
        _write(axes, x, height - _MARGIN, title, ha="left", va="top", size=size, color=theme.ink)


def _title_height(title: str | None) -> float:
    return 0.1 + 0.21 * len(title.splitlines()) if title else 0.0


def _draw_legend(
    figure: Figure,
    decisions: Tensor,
    num_stages: int,
    fallback: bool,
    marked: bool,
    left: float,
    theme: _Theme,
) -> None:
    from matplotlib.patches import Patch

    stopped = (decisions >= 0) & (decisions < num_stages)
    entries: list[tuple[bool, str, dict[str, Any]]] = [
        (bool((decisions == num_stages).any()), "used", _USED_STYLE),
        (bool(stopped.any()), "stopped after the stage named", {"color": _STOPPED}),
        (bool((decisions == UNSEEN).any()), "unseen", {"facecolor": theme.unseen, "edgecolor": theme.muted}),
        (fallback, "fallback", _FALLBACK_STYLE),
        (marked, "relevant", {"color": _RELEVANT}),
    ]
    handles = [Patch(label=label, **style) for occurs, label, style in entries if occurs]
    figure.legend(
        handles=handles,
        ncols=len(handles),
        loc="lower left",
        bbox_to_anchor=(left / figure.get_figwidth(), _MARGIN / 2 / figure.get_figheight()),
        frameon=False,
        labelcolor=theme.ink,
        fontsize=_FONT,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.3,
        columnspacing=1.5,
    )


def _check_length(name: str, values: Tensor, length: int) -> None:
    if values.shape != (length,):
        raise DynskipError(f"{name} has shape {tuple(values.shape)}, but must be ({length},), one per frame.")


def _text_width(text: str, size: float) -> float:
    """Width in inches of one line of text at a font size in points."""
    from matplotlib.textpath import TextPath

    # A pair of dollar signs would be read as mathematics.
    path = TextPath((0, 0), text.replace("$", "S"), size=1)
    # Drawn letters come out a little wider, because their steps are rounded to pixels.
    return max(1.06 * path.get_extents().width, 0.1) * size / 72


def _fitting_size(text: str, width: float, largest: float) -> float:
    return min(largest, width / _text_width(text, 1.0))


def _shade(stage: int, num_stages: int, theme: _Theme) -> str:
    """A colour that is the stronger the later a frame stopped."""
    weight = 0.25 + 0.75 * (stage + 1) / num_stages
    parts = zip(_channels(theme.background), _channels(_STOPPED), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * weight):02x}" for a, b in parts)


def _ink_on(colour: str) -> str:
    red, green, blue = _channels(colour)
    return _LIGHT.ink if 0.299 * red + 0.587 * green + 0.114 * blue > 125 else _DARK.ink


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
