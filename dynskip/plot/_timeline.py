"""What became of the frames of one video, as a picture and as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import dynskip.plot._style as _style
from dynskip.errors import DynskipError
from dynskip.metrics import check_stopped_at
from dynskip.plot._style import DARK, FALLBACK, FONT, LIGHT, MARGIN, RELEVANT, STOPPED, USED, Canvas
from dynskip.rules import UNSEEN

if TYPE_CHECKING:
    import numpy as np
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
    after, in a stronger colour for later stages; an unseen one becomes a black tile "unseen". Long videos
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
        dark: Light text on a dark background.

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
    decisions = _checked(stopped_at, len(stage_names), fallback_frame, length)
    edges = _edges(seconds, length)
    for start, end in segments or ():
        if not start < end or end <= edges[0] or start >= edges[-1]:
            raise DynskipError(
                f"The segment from {start:g} to {end:g} does not lie in this video, whose frames stand for "
                f"{edges[0]:g} to {edges[-1]:g}; give (start, end) with start < end, in seconds where `seconds` are "
                "given, else in frames."
            )

    theme = DARK if dark else LIGHT
    tile_height = _TILE * height / width
    bar_height, label_height = 0.0 if segments is None else 0.16, 0.0 if seconds is None else 0.17
    line_height = 2 * tile_height + _GAP + bar_height + label_height + 0.16
    left = MARGIN + 0.22
    figure_width = max(_MIN_WIDTH, left + min(length, _PER_LINE) * (_TILE + _GAP) - _GAP + MARGIN)
    figure_height = 2 * MARGIN + line_height * -(-length // _PER_LINE) + 0.18
    canvas = Canvas(figure_width, figure_height, title, theme, left)
    font = min(_style.fitting_size(name, _TILE * 0.86, FONT) for name in stage_names)

    for t, (image, stage) in enumerate(zip(images, decisions, strict=True)):
        line, column = divmod(t, _PER_LINE)
        x, top = left + column * (_TILE + _GAP), canvas.top - line_height * line
        bottom = top - 2 * tile_height - _GAP
        if column == 0:
            for row, name in enumerate(("input", "decision")):
                middle = top - tile_height / 2 - row * (tile_height + _GAP)
                canvas.write(left - 0.14, middle, name, size=8, color=theme.muted, rotation=90)
        canvas.axes.imshow(image, extent=(x, x + _TILE, top - tile_height, top), aspect="auto")
        if t == fallback_frame or stage == len(stage_names):
            canvas.axes.imshow(image, extent=(x, x + _TILE, bottom, bottom + tile_height), aspect="auto")
            _draw_frame(canvas, x, bottom, tile_height, fallback=t == fallback_frame)
        else:
            if stage == UNSEEN:
                label, colour, size = "unseen", theme.unseen, FONT
            else:
                label, colour, size = stage_names[stage], theme.shade(stage, len(stage_names)), font
            canvas.rectangle(x, bottom, _TILE, tile_height, facecolor=colour, edgecolor=theme.track)
            canvas.write(x + _TILE / 2, bottom + tile_height / 2, label, size=size, color=_style.ink_on(colour))
        if segments is not None:
            # The bar reaches over the gap to the next tile, so that a segment is seen as one piece.
            reach = _TILE + (_GAP if column + 1 < _PER_LINE and t + 1 < length else 0.0)
            canvas.rectangle(x, bottom - 0.16, reach, 0.08, facecolor=theme.track)
            scale = reach / (edges[t + 1] - edges[t])
            for start, end in segments:
                first, last = (scale * (min(max(edge, edges[t]), edges[t + 1]) - edges[t]) for edge in (start, end))
                if first < last:
                    canvas.rectangle(x + first, bottom - 0.16, last - first, 0.08, facecolor=RELEVANT, linewidth=0)
        if seconds is not None:
            label, middle = _clock(float(seconds[t])), bottom - bar_height - 0.1
            canvas.write(x + _TILE / 2, middle, label, size=_style.fitting_size(label, _TILE, 7.0), color=theme.muted)

    stopped = any(0 <= stage < len(stage_names) for stage in decisions)
    entries: list[tuple[bool, str, dict[str, Any]]] = [
        (len(stage_names) in decisions, "used", _USED_STYLE),
        (stopped, "stopped after the stage named", {"color": STOPPED}),
        (UNSEEN in decisions, "unseen", {"facecolor": theme.unseen, "edgecolor": theme.muted}),
        (fallback_frame >= 0, "fallback", _FALLBACK_STYLE),
        (segments is not None, "annotated segment", {"color": RELEVANT}),
    ]
    patches = [_style.matplotlib("patches").Patch(label=label, **style) for occurs, label, style in entries if occurs]
    canvas.legend(patches, left, MARGIN / 2, ncols=len(patches), handlelength=1.3, columnspacing=1.5)
    return canvas.figure


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
        color: Colour the characters with ANSI escapes. Colour repeats what the characters say.

    Returns:
        Two lines.

    Raises:
        DynskipError: if shapes or values do not fit.
    """
    used, fallback = len(stage_names), -2  # the latter is none of the values of `stopped_at`
    codes = _checked(stopped_at, used, fallback_frame)
    if fallback_frame >= 0:
        codes[fallback_frame] = fallback
    # Each with one of 256 colours.
    signs = {n: (_STOP_SIGNS[min(n, len(_STOP_SIGNS) - 1)], 214) for n in range(used)}
    signs |= {used: ("#", 36), fallback: ("F", 166), UNSEEN: (".", 242)}

    def paint(code: int) -> str:
        sign, shade = signs[code]
        return f"\x1b[38;5;{shade}m{sign}\x1b[0m" if color else sign

    def count(code: int, name: str) -> list[str]:
        return [f"{paint(code)} {name} ({codes.count(code)})"] if code in codes else []

    stopped = [entry for n, name in enumerate(stage_names) for entry in count(n, name)]
    legend = count(used, "used")
    if stopped:
        legend.append("stopped after " + ", ".join(stopped))
    legend += count(fallback, "fallback") + count(UNSEEN, "unseen")
    return "".join(map(paint, codes)) + "\n" + "   ".join(legend)


def _checked(stopped_at: Any, num_stages: int, fallback_frame: int, length: int | None = None) -> list[int]:
    decisions = torch.as_tensor(stopped_at)
    if decisions.ndim != 1 or length not in (None, len(decisions)):
        raise DynskipError(
            f"stopped_at has shape {tuple(decisions.shape)}; expected ({length or 'T'},), one a frame. Give one row of "
            "a SkipOutput's."
        )
    check_stopped_at(decisions, num_stages)
    if not -1 <= fallback_frame < len(decisions):
        raise DynskipError(
            f"fallback_frame is {fallback_frame}; expected 0 to {len(decisions) - 1}, or -1 if there is none."
        )
    codes: list[int] = decisions.tolist()
    return codes


def _draw_frame(canvas: Canvas, x: float, y: float, height: float, fallback: bool) -> None:
    """Frame a picture that reached the head; dashes and a name mark a fallback without colour."""
    style = {**(_FALLBACK_STYLE if fallback else _USED_STYLE), "linewidth": 3, "zorder": 3}
    inset = 0.02  # about half the line's width, so that the line stays within the tile
    canvas.rectangle(x + inset, y + inset, _TILE - 2 * inset, height - 2 * inset, **style)
    if fallback:
        canvas.rectangle(x, y, _TILE, 0.17, facecolor=FALLBACK, zorder=3)
        canvas.write(x + _TILE / 2, y + 0.085, "fallback", size=8, color="white", zorder=4)


def _edges(seconds: Any, length: int) -> list[float]:
    """Where the time of each frame begins, and where that of the last one ends: `(T + 1,)` in seconds or frames."""
    if seconds is None:
        return [float(t) for t in range(length + 1)]
    times = torch.as_tensor(seconds, dtype=torch.float64).cpu()
    if times.shape != (length,):
        raise DynskipError(f"seconds has shape {tuple(times.shape)}; expected ({length},), one a frame.")
    gaps = times.diff()
    if not times.isfinite().all() or not (gaps > 0).all():
        raise DynskipError("seconds must be finite and rise from frame to frame; give when each frame was taken.")
    if length == 1:
        gaps = torch.ones(1)
    edges: list[float] = torch.cat([times - gaps[[0, *range(length - 1)]] / 2, times[-1:] + gaps[-1:] / 2]).tolist()
    return edges


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds, 1), 60)
    return f"{int(minutes)}:{rest:04.1f}" if minutes else f"{rest:.1f} s"
