"""Pictures of what was decided: frames of one video, shares over many, costs of stages, accuracy against compute.

Needs matplotlib (`pip install 'dynskip[plot]'`), except for `timeline_text`. Figures are returned, never shown, and
leave no global state behind: save one with `figure.savefig("timeline.png")`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dynskip.errors import DynskipError
from dynskip.flops import FLOPsLookup
from dynskip.metrics import FrameUsage, check_stopped_at
from dynskip.output import UNSEEN

if TYPE_CHECKING:
    import numpy as np
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
_USED, _STOPPED, _FALLBACK, _RELEVANT, _GATES = "#009E73", "#E69F00", "#D55E00", "#0072B2", "#56B4E9"
_USED_STYLE = {"fill": False, "edgecolor": _USED, "linewidth": 2}
_FALLBACK_STYLE = {"fill": False, "edgecolor": _FALLBACK, "linewidth": 2, "linestyle": (0, (2, 1))}

_CURVES = (_RELEVANT, _FALLBACK, _USED, "#CC79A7", _STOPPED, "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # told apart without colour, too
# In text: a stage is a digit, then a letter; what comes later shares the last one.
_STOP_SIGNS = "123456789abcdefghijklmnopqrstuvwxyz+"

# All lengths are inches; drawing happens in an axes whose unit is the inch.
_TILE, _GAP, _MARGIN, _PER_LINE, _MIN_WIDTH = 0.75, 0.06, 0.15, 16, 7.0
_BARS, _STEP, _THICKNESS = 4.5, 0.34, 0.22  # the longest horizontal bar, from one to the next, and how thick
_FONT = 10.0


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

    theme = _DARK if dark else _LIGHT
    tile_height = _TILE * height / width
    bar_height, label_height = 0.0 if spans is None else 0.16, 0.0 if seconds is None else 0.17
    line_height = 2 * tile_height + _GAP + bar_height + label_height + 0.16
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
            # What a tile stands for reaches over the gap to the next one, so that a segment is seen as one piece.
            reach = _TILE + (_GAP if column + 1 < _PER_LINE and t + 1 < length else 0.0)
            if spans is not None:
                _rectangle(axes, x, bottom - 0.16, reach, 0.08, facecolor=theme.track)
                for first, last in _covered(spans, edges[t], edges[t + 1]):
                    bar = {"facecolor": _RELEVANT, "linewidth": 0}
                    _rectangle(axes, x + first * reach, bottom - 0.16, (last - first) * reach, 0.08, **bar)
            if seconds is not None:
                label, middle = _clock(float(seconds[t])), bottom - bar_height - 0.1
                _write(axes, x + _TILE / 2, middle, label, size=_fitting_size(label, _TILE, 7.0), color=theme.muted)
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
        DynskipError: if matplotlib is missing, or there are not as many names as stages.

    Reference:
        Thesis Fig. 4.1.
    """
    if len(usage.stopped) != len(stage_names):
        raise DynskipError(
            f"stage_names has {len(stage_names)} names, but the usage counts {len(usage.stopped)} stages. "
            "Take both from the same model."
        )
    theme = _DARK if dark else _LIGHT
    rows = [("used", usage.used, _USED)]
    for n, (name, share) in enumerate(zip(stage_names, usage.stopped, strict=True)):
        rows.append((f"stopped after {name}", share, _shade(n, len(stage_names), theme)))
    rows.append(("unseen", usage.unseen, theme.unseen))

    bars = [_Bar(name, share, colour, f"{100 * share:.1f} %") for name, share, colour in rows]
    return _draw_bars(bars, title, theme)


def stage_macs(
    lookup: FLOPsLookup, stopped_at: Tensor | None = None, *, title: str | None = None, dark: bool = False
) -> Figure:
    """Draw what each stage costs a frame as horizontal bars, and how much of that was executed.

    With `stopped_at`, a filled bar is the mean cost executed a frame (unseen frames count, with nothing), inside the
    cost of a frame that is used, and the bars add up to the mean of `lookup.cost`, fallbacks included.

    Args:
        lookup: The cost table, e.g. `model.lookup_for((224, 224))`; written in GMACs (10^9 multiply-adds) where it
            counts MACs, else in its own unit.
        stopped_at: `(B, T)` or `(T,)`, as in `SkipOutput.stopped_at`; `None` draws the costs alone.
        title: Text above the picture; may have several lines.
        dark: Light text on dark ground.

    Returns:
        The figure.

    Raises:
        DynskipError: if matplotlib is missing, or `stopped_at` is empty or does not fit the table.
    """
    stages = len(lookup.per_stage)
    names = lookup.stage_names or tuple(f"stage {n}" for n in range(stages))
    full = torch.cat([lookup.per_stage, lookup.gates.sum()[None], torch.tensor([lookup.head], dtype=torch.float64)])
    executed = full if stopped_at is None else _executed(lookup, stopped_at)
    theme = _DARK if dark else _LIGHT
    scale, unit = (1e9, "GMACs") if lookup.unit == "MACs" else (1.0, lookup.unit)
    colours = [_shade(n, stages, theme) for n in range(stages)] + [_GATES, _USED]
    longest = float(full.max()) or 1.0
    bars = []
    for name, cost, part, colour in zip(
        [*names, "gates", "head"], full.tolist(), executed.tolist(), colours, strict=True
    ):
        text = f"{cost / scale:.3g}" if stopped_at is None else f"{part / scale:.3g} of {cost / scale:.3g}"
        bars.append(_Bar(name, part / longest, colour, text, cost / longest))
    unit = f"{unit} (multiply-adds)" if lookup.unit == "MACs" else unit
    total = f"{float(executed.sum()) / scale:.3g} {unit} a frame"
    if stopped_at is not None:
        total += f" executed; {lookup.total / scale:.3g} for a used frame, {lookup.dense / scale:.3g} without gates"
    return _draw_bars(bars, f"{title}\n{total}" if title else total, theme)


def _executed(lookup: FLOPsLookup, stopped_at: Tensor) -> Tensor:
    """Mean cost executed a frame in each stage, in the gates and in the head, `(N + 2,)`."""
    stages = len(lookup.per_stage)
    decisions = torch.atleast_2d(stopped_at.cpu())
    if decisions.ndim != 2 or decisions.numel() == 0:
        shape = tuple(stopped_at.shape)
        raise DynskipError(f"stopped_at has shape {shape}; expected (B, T) or (T,), not empty.")
    check_stopped_at(decisions, stages)
    depth = torch.arange(stages + 1)  # the last one is the head
    runs = (decisions[..., None] >= depth).sum(1).double()
    gates = runs[:, :stages].sum(0) @ lookup.gates
    # Where no frame was used, the furthest one was run to the end, past the gates.
    furthest = decisions.amax(1, keepdim=True)
    runs += (furthest >= 0) & (furthest < stages) & (depth > furthest)
    stage_runs = runs.sum(0)
    costs = [stage_runs[:stages] * lookup.per_stage, gates[None], stage_runs[stages:] * lookup.head]
    executed: Tensor = torch.cat(costs) / decisions.numel()
    return executed


class _Bar(NamedTuple):
    name: str
    length: float  # a share of the longest
    colour: str
    text: str
    track: float = 1.0  # what the length is a part of


def _draw_bars(bars: Sequence[_Bar], title: str | None, theme: _Theme) -> Figure:
    left = _MARGIN + max(_text_width(bar.name, _FONT) for bar in bars) + 0.15
    title_height = _title_height(title)
    figure_width = left + _BARS + 0.15 + max(_text_width(bar.text, _FONT) for bar in bars) + _MARGIN
    figure_height = 2 * _MARGIN + title_height + _STEP * len(bars)
    figure, axes = _canvas(figure_width, figure_height, theme)
    _draw_title(axes, title, _MARGIN, theme)
    for i, bar in enumerate(bars):
        y = figure_height - _MARGIN - title_height - _STEP * (i + 0.5)
        bottom = y - _THICKNESS / 2
        _write(axes, left - 0.15, y, bar.name, ha="right", size=_FONT, color=theme.ink)
        _rectangle(axes, left, bottom, _BARS * bar.track, _THICKNESS, facecolor=theme.track)
        style = {"facecolor": bar.colour, "edgecolor": theme.muted}
        _rectangle(axes, left, bottom, _BARS * bar.length, _THICKNESS, **style)
        _write(axes, figure_width - _MARGIN, y, bar.text, ha="right", size=_FONT, color=theme.muted)
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
        DynskipError: if matplotlib is missing, or there is nothing to draw.
    """
    if not curves or not all(curves.values()):
        raise DynskipError(f"Every curve needs a point; got { ({name: len(c) for name, c in curves.items()}) }.")
    theme = _DARK if dark else _LIGHT
    legend_columns = 2 if max(map(len, curves)) <= 26 else 1  # longer names would be cut
    width, legend_height = 6.4, 0.24 * -(-(len(curves) + (chosen is not None)) // legend_columns)
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
        ncols=legend_columns,
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
        raise DynskipError("Drawing needs matplotlib. Run `pip install 'dynskip[plot]'`.") from error
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
    annotated: bool,
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
        (annotated, "annotated segment", {"color": _RELEVANT}),
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
