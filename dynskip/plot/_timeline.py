"""What became of the frames of one video, as a picture and as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynskip.errors import DynskipError
from dynskip.metrics import check_stopped_at
from dynskip.plot._style import (
    DARK,
    FALLBACK,
    FONT,
    LIGHT,
    MARGIN,
    RELEVANT,
    STOPPED,
    USED,
    Theme,
    draw_title,
    fitting_size,
    height_of_title,
    ink_on,
    open_canvas,
    rectangle,
    shade_of,
    write,
)
from dynskip.rules import UNSEEN

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_USED_STYLE = {"fill": False, "edgecolor": USED, "linewidth": 2}
_FALLBACK_STYLE = {"fill": False, "edgecolor": FALLBACK, "linewidth": 2, "linestyle": (0, (2, 1))}
_TILE, _GAP, _PER_LINE, _MIN_WIDTH = 0.75, 0.06, 16, 7.0
# In text: a stage is a digit, then a letter; what comes later shares the last one.
_STOP_SIGNS = "123456789abcdefghijklmnopqrstuvwxyz+"


def timeline(
    frames: Tensor | NDArray[np.uint8],
    stopped_at: Tensor | NDArray[np.int64] | Sequence[int],
    stage_names: Sequence[str],
    *,
    fallback_frame: int = -1,
    segments: Sequence[tuple[float, float]] | None = None,
    seconds: Tensor | NDArray[np.float64] | Sequence[float] | None = None,
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
        segments: `(start, end)` of each annotated segment, half-open, drawn as bars below the tiles: in seconds where
            `seconds` are given, else in frames, so that `(2, 5)` lies below frames 2 to 4.
        seconds: `(T,)` when each frame was taken, rising; written below the frames. A frame stands for the time up to
            half-way to its neighbours.
        title: Text above the picture; may have several lines.
        dark: Light text on dark ground.

    Returns:
        The figure.

    Raises:
        DynskipError: if matplotlib is missing, or lengths, types or values do not fit.

    Reference:
        Thesis Fig. 4.2.
    """
    import numpy as np

    images = np.asarray(frames.cpu() if isinstance(frames, Tensor) else frames)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or images.size == 0:
        raise DynskipError(
            f"frames is {images.dtype} of shape {images.shape}; expected uint8 of shape (T, H, W, 3) "
            "with T >= 1. Give the decoded pictures, not the normalised input of the model."
        )
    length, height, width, _ = images.shape
    decisions = torch.as_tensor(stopped_at).cpu()
    _check_length("stopped_at", decisions, length)
    check_stopped_at(decisions, len(stage_names))
    _check_fallback(fallback_frame, length)
    edges = _edges(seconds, length)
    spans = None if segments is None else [_checked_segment(segment, edges) for segment in segments]

    theme = DARK if dark else LIGHT
    tile_height = _TILE * height / width
    bar_height, label_height = 0.0 if spans is None else 0.16, 0.0 if seconds is None else 0.17
    line_height = 2 * tile_height + _GAP + bar_height + label_height + 0.16
    title_height = height_of_title(title)
    left = MARGIN + 0.22
    columns = min(length, _PER_LINE)
    figure_width = max(_MIN_WIDTH, left + columns * (_TILE + _GAP) - _GAP + MARGIN)
    figure_height = 2 * MARGIN + title_height + line_height * -(-length // _PER_LINE) + 0.18
    figure, axes = open_canvas(figure_width, figure_height, theme)
    draw_title(axes, title, left, theme)
    font = min(fitting_size(name, _TILE * 0.86, FONT) for name in stage_names)

    for start in range(0, length, _PER_LINE):
        top = figure_height - MARGIN - title_height - line_height * (start // _PER_LINE)
        bottom = top - 2 * tile_height - _GAP
        for row, name in enumerate(("input", "decision")):
            middle = top - tile_height / 2 - row * (tile_height + _GAP)
            write(axes, left - 0.14, middle, name, size=8, color=theme.muted, rotation=90)
        for column, t in enumerate(range(start, min(start + _PER_LINE, length))):
            x = left + column * (_TILE + _GAP)
            axes.imshow(images[t], extent=(x, x + _TILE, top - tile_height, top), aspect="auto")
            stage = int(decisions[t])
            if t == fallback_frame or stage == len(stage_names):
                axes.imshow(images[t], extent=(x, x + _TILE, bottom, bottom + tile_height), aspect="auto")
                _draw_frame(axes, x, bottom, tile_height, fallback=t == fallback_frame)
            else:
                if stage == UNSEEN:
                    label, colour, size = "exit", theme.unseen, FONT
                else:
                    label, colour, size = stage_names[stage], shade_of(stage, len(stage_names), theme), font
                rectangle(axes, x, bottom, _TILE, tile_height, facecolor=colour, edgecolor=theme.track)
                middle = bottom + tile_height / 2
                write(axes, x + _TILE / 2, middle, label, size=size, color=ink_on(colour))
            # What a tile stands for reaches over the gap to the next one, so that a segment is seen as one piece.
            reach = _TILE + (_GAP if column + 1 < _PER_LINE and t + 1 < length else 0.0)
            if spans is not None:
                rectangle(axes, x, bottom - 0.16, reach, 0.08, facecolor=theme.track)
                for first, last in _covered(spans, edges[t], edges[t + 1]):
                    bar = {"facecolor": RELEVANT, "linewidth": 0}
                    rectangle(axes, x + first * reach, bottom - 0.16, (last - first) * reach, 0.08, **bar)
            if seconds is not None:
                label, middle = _clock(float(seconds[t])), bottom - bar_height - 0.1
                write(axes, x + _TILE / 2, middle, label, size=fitting_size(label, _TILE, 7.0), color=theme.muted)
    _draw_legend(figure, decisions, len(stage_names), fallback_frame >= 0, spans is not None, left, theme)
    return figure


def timeline_text(
    stopped_at: Tensor | NDArray[np.int64] | Sequence[int],
    stage_names: Sequence[str],
    *,
    fallback_frame: int = -1,
    color: bool = False,
) -> str:
    """Write the timeline of one video as text, one character a frame, with a legend below.

    `#` is a used frame, a digit (then a letter) the number of the stage after which it stopped, `.` an unseen frame
    and `F` the fallback. Needs no matplotlib; plain ASCII, for terminals, logs and notebooks.

    Args:
        stopped_at: `(T,)`, one row of `SkipOutput.stopped_at`.
        stage_names: Names of the N stages, e.g. `model.backbone.stage_names`.
        fallback_frame: Index of the frame that was forwarded because no frame was used; -1 if none was.
        color: Colour the characters with ANSI escapes. Nothing is said by colour alone.

    Returns:
        Two lines.

    Raises:
        DynskipError: if shapes or values do not fit.
    """
    decisions = torch.as_tensor(stopped_at).cpu()
    if decisions.ndim != 1 or not len(decisions):
        shape = tuple(decisions.shape)
        raise DynskipError(f"stopped_at has shape {shape}; expected (T,) with T >= 1. Give one row of a SkipOutput's.")
    check_stopped_at(decisions, len(stage_names))
    _check_fallback(fallback_frame, len(decisions))
    codes = decisions.tolist()
    used, fallback = len(stage_names), -2  # the latter beside the values of `stopped_at`
    if fallback_frame >= 0:
        codes[fallback_frame] = fallback
    signs = {n: (_STOP_SIGNS[min(n, len(_STOP_SIGNS) - 1)], 214) for n in range(used)}  # with one of 256 colours
    signs |= {used: ("#", 36), fallback: ("F", 166), UNSEEN: (".", 242)}

    def paint(code: int) -> str:
        mark, shade = signs[code]
        return f"\x1b[38;5;{shade}m{mark}\x1b[0m" if color else mark

    def count(code: int, name: str) -> str:
        return f"{paint(code)} {name} ({codes.count(code)})" if code in codes else ""

    stopped = ", ".join(filter(None, (count(n, name) for n, name in enumerate(stage_names))))
    legend = (
        count(used, "used"),
        stopped and f"stopped after {stopped}",
        count(fallback, "fallback"),
        count(UNSEEN, "unseen"),
    )
    return "".join(map(paint, codes)) + "\n" + "   ".join(filter(None, legend))


def _draw_frame(axes: Axes, x: float, y: float, height: float, fallback: bool) -> None:
    """Frame a picture that reached the head; dashes and a name tell a fallback without colour."""
    style = {**(_FALLBACK_STYLE if fallback else _USED_STYLE), "linewidth": 3, "zorder": 3}
    inset = 0.02  # about half the line's width, so that the line stays within the tile
    rectangle(axes, x + inset, y + inset, _TILE - 2 * inset, height - 2 * inset, **style)
    if fallback:
        rectangle(axes, x, y, _TILE, 0.17, facecolor=FALLBACK, zorder=3)
        write(axes, x + _TILE / 2, y + 0.085, "fallback", size=8, color="white", zorder=4)


def _draw_legend(
    figure: Figure,
    decisions: Tensor,
    num_stages: int,
    fallback: bool,
    annotated: bool,
    left: float,
    theme: Theme,
) -> None:
    from matplotlib.patches import Patch

    stopped = (decisions >= 0) & (decisions < num_stages)
    entries: list[tuple[bool, str, dict[str, Any]]] = [
        (bool((decisions == num_stages).any()), "used", _USED_STYLE),
        (bool(stopped.any()), "stopped after the stage named", {"color": STOPPED}),
        (bool((decisions == UNSEEN).any()), "unseen", {"facecolor": theme.unseen, "edgecolor": theme.muted}),
        (fallback, "fallback", _FALLBACK_STYLE),
        (annotated, "annotated segment", {"color": RELEVANT}),
    ]
    handles = [Patch(label=label, **style) for occurs, label, style in entries if occurs]
    figure.legend(
        handles=handles,
        ncols=len(handles),
        loc="lower left",
        bbox_to_anchor=(left / figure.get_figwidth(), MARGIN / 2 / figure.get_figheight()),
        frameon=False,
        labelcolor=theme.ink,
        fontsize=FONT,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.3,
        columnspacing=1.5,
    )


def _check_fallback(frame: int, length: int) -> None:
    if not -1 <= frame < length:
        raise DynskipError(f"fallback_frame is {frame}; expected 0 to {length - 1}, or -1 if there is none.")


def _check_length(name: str, values: Tensor, length: int) -> None:
    if values.shape != (length,):
        raise DynskipError(f"{name} has shape {tuple(values.shape)}; expected ({length},), one a frame.")


def _edges(seconds: Tensor | NDArray[np.float64] | Sequence[float] | None, length: int) -> list[float]:
    """Where what each frame stands for begins, and where the last one's ends: `(T + 1,)` in seconds or frames."""
    if seconds is None:
        return [float(t) for t in range(length + 1)]
    times = torch.as_tensor(seconds, dtype=torch.float64).cpu()
    _check_length("seconds", times, length)
    if not times.isfinite().all() or not (times.diff() > 0).all():
        raise DynskipError("seconds must be finite and rise from frame to frame; give when each frame was taken.")
    between = (times[1:] + times[:-1]) / 2
    if length == 1:
        return [float(times[0]) - 0.5, float(times[0]) + 0.5]
    return [float(2 * times[0] - between[0]), *between.tolist(), float(2 * times[-1] - between[-1])]


def _checked_segment(segment: tuple[float, float], edges: list[float]) -> tuple[float, float]:
    start, end = map(float, segment)
    if not start < end or end <= edges[0] or start >= edges[-1]:
        raise DynskipError(
            f"The segment from {start:g} to {end:g} does not lie in this video, whose frames stand for {edges[0]:g} to "
            f"{edges[-1]:g}; give (start, end) with start < end, in seconds where `seconds` are given, else in frames."
        )
    return start, end


def _covered(spans: Sequence[tuple[float, float]], start: float, end: float) -> list[tuple[float, float]]:
    """Parts of what a frame stands for that lie in a segment, as shares from 0 to 1."""
    clipped = [(max(first, start), min(last, end)) for first, last in spans]
    return [((a - start) / (end - start), (b - start) / (end - start)) for a, b in clipped if a < b]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds, 1), 60)
    return f"{int(minutes)}:{rest:04.1f}" if minutes else f"{rest:.1f} s"
