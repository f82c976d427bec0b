"""Shares of frames and costs of stages as bars, accuracy against cost as lines."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import dynskip.plot._style as _style
from dynskip._check import check_lengths
from dynskip.errors import DynskipError
from dynskip.flops import FLOPsLookup
from dynskip.metrics import FrameUsage, check_stopped_at
from dynskip.plot._style import DARK, FALLBACK, FONT, GATES, LIGHT, MARGIN, RELEVANT, STOPPED, USED, Canvas, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynskip.calibrate import CurvePoint

_BARS, _STEP, _THICKNESS = 4.5, 0.34, 0.22  # inches: the longest bar, from one bar to the next, and how thick
_BELOW = 0.08  # of accuracy, that is shown below the curves' best points at least
_CURVES = (RELEVANT, FALLBACK, USED, "#CC79A7", STOPPED, GATES)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # tell curves apart without colour


def frame_usage(
    usage: FrameUsage, stage_names: Sequence[str], *, title: str | None = None, dark: bool = False
) -> Figure:
    """Draw the shares of frames used, stopped after each stage, and unseen as horizontal bars.

    Args:
        usage: From `dynskip.metrics.frame_usage`.
        stage_names: Names of the N stages, e.g. `model.backbone.stage_names`.
        title: Text above the picture; may have several lines.
        dark: Light text on a dark background.

    Returns:
        The figure.

    Raises:
        DynskipError: if matplotlib is missing, or there are not as many names as stages.

    Reference:
        Thesis Fig. 4.1.
    """
    stages = len(usage.stopped)
    if stages != len(stage_names):
        raise DynskipError(
            f"stage_names has {len(stage_names)} names, but the usage counts {stages} stages. "
            "Take both from the same model."
        )
    theme = DARK if dark else LIGHT
    rows = [("used", usage.used, USED)]
    for n, (name, share) in enumerate(zip(stage_names, usage.stopped, strict=True)):
        rows.append((f"stopped after {name}", share, theme.shade(n, stages)))
    rows.append(("unseen", usage.unseen, theme.unseen))
    return _draw_bars([_Bar(*row, f"{100 * row[1]:.1f} %") for row in rows], title, theme)


def stage_macs(
    lookup: FLOPsLookup,
    stopped_at: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    title: str | None = None,
    dark: bool = False,
) -> Figure:
    """Draw what each stage costs a frame as horizontal bars, and how much of that was executed.

    With `stopped_at`, each filled bar is the mean cost executed a frame; unseen frames count with zero cost. It lies
    inside the cost of a used frame. The filled bars add up to the mean of `lookup.cost`, fallbacks included.

    Args:
        lookup: The cost table, e.g. `model.lookup_for((224, 224))`. MACs (multiply-adds) are written in GMACs, of small
            models in MMACs; another unit as it is.
        stopped_at: `(B, T)` or `(T,)`, as in `SkipOutput.stopped_at`; `None` draws the costs alone.
        lengths: `(B,)` frames of each video where they are padded (`SkipOutput.lengths`); `None` for all.
        title: Text above the picture; may have several lines.
        dark: Light text on a dark background.

    Returns:
        The figure.

    Raises:
        DynskipError: if matplotlib is missing, or `stopped_at` is empty or does not fit the table.
    """
    stages, theme = len(lookup.per_stage), DARK if dark else LIGHT
    names = lookup.stage_names or tuple(f"stage {n}" for n in range(stages))
    colours = [*(theme.shade(n, stages) for n in range(stages)), GATES, USED]
    scale, unit = lookup.display_unit
    full = torch.cat([lookup.per_stage, lookup.gates.sum()[None], lookup.per_stage.new_tensor([lookup.head])])
    executed = full if stopped_at is None else _executed(lookup, stopped_at, lengths)
    longest = float(full.nan_to_num().max()) or 1.0
    bars = []
    for name, cost, part, colour in zip(
        (*names, "gates", "head"), full.tolist(), executed.tolist(), colours, strict=True
    ):
        text = f"{cost / scale:.3g}" if stopped_at is None else f"{part / scale:.3g} of {cost / scale:.3g}"
        bars.append(_Bar(name, part / longest, colour, text, cost / longest))
    meaning = " (multiply-adds)" if lookup.unit == "MACs" else ""
    total = f"{float(executed.sum()) / scale:.3g} {unit}{meaning} a frame"
    if stopped_at is not None:
        total += f" executed; {lookup.total / scale:.3g} for a used frame, {lookup.dense / scale:.3g} without gates"
    return _draw_bars(bars, f"{title}\n{total}" if title else total, theme)


def accuracy_compute(
    curves: Mapping[str, Sequence[CurvePoint]],
    chosen: CurvePoint | None = None,
    *,
    metric: str = "top-1",
    title: str | None = None,
    dark: bool = False,
) -> Figure:
    """Draw accuracy against executed cost, one line a curve, with confidence bands where points have them.

    The axis of the accuracy shows where the curves' best points lie, and some way below. Lines that fall further leave
    the picture.

    Args:
        curves: Points by the name of their curve, such as those of `dynskip.calibrate`; a single point, such as the
            dense backbone, becomes a mark, its band an error bar. Bands are drawn for curves whose points all have one.
        chosen: A point to mark with a ring, such as `Calibration.point`.
        metric: Name of the accuracy, for the axis.
        title: Text above the picture; may have several lines.
        dark: Light text on a dark background.

    Returns:
        The figure; cost is in GMACs (10^9 multiply-adds) a video, accuracy in percent.

    Raises:
        DynskipError: if matplotlib is missing, or there is nothing to draw.
    """
    if not curves or not all(curves.values()):
        raise DynskipError(f"Every curve needs a point; got { ({name: len(c) for name, c in curves.items()}) }.")
    theme = DARK if dark else LIGHT
    columns = 2 if max(map(len, curves)) <= 26 else 1  # longer names would be cut
    width, left, right = 6.4, 0.75, 0.25
    bottom = 0.6 + 0.21 * -(-(len(curves) + (chosen is not None)) // columns)  # the axis' labels and the legend
    canvas = Canvas(width, bottom + 3.4, title, theme)
    height = canvas.figure.get_figheight()
    box = (left / width, bottom / height, 1 - (left + right) / width, 3.3 / height)
    axes = canvas.figure.add_axes(box, facecolor=theme.background)
    for (name, points), colour, marker in zip(
        curves.items(), itertools.cycle((*_CURVES, theme.ink)), itertools.cycle(_MARKERS), strict=False
    ):
        ordered = sorted(points, key=lambda point: point.macs)
        x, y = [point.macs / 1e9 for point in ordered], [100 * point.accuracy for point in ordered]
        axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.6, label=name, zorder=3)
        bands = [point.band for point in ordered if point.band is not None]
        if len(bands) == len(ordered):
            lowest, highest = ([100 * edge for edge in edges] for edges in zip(*bands, strict=True))
            if len(ordered) == 1:
                axes.vlines(x, lowest, highest, color=colour, linewidth=1.6, zorder=3)
                axes.scatter([x, x], [lowest, highest], marker="_", color=colour, zorder=3)  # caps
            else:
                axes.fill_between(x, lowest, highest, color=colour, alpha=0.18, linewidth=0, zorder=2)
    if chosen is not None:
        ring: dict[str, Any] = {"facecolors": "none", "edgecolors": theme.ink, "linewidths": 1.8}
        axes.scatter([chosen.macs / 1e9], [100 * chosen.accuracy], s=130, label="chosen", zorder=4, **ring)
    axes.set_xlim(left=0)
    axes.set_ylim(*_accuracy_range(curves, chosen))
    axes.set_xlabel("GMACs per video (10⁹ multiply-adds)", color=theme.ink, fontsize=FONT)
    axes.set_ylabel(f"{metric} %", color=theme.ink, fontsize=FONT)
    axes.tick_params(colors=theme.muted, labelsize=FONT - 1)
    axes.grid(color=theme.track, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.muted)
    canvas.legend(axes.get_legend_handles_labels()[0], left, 0.7 * MARGIN, ncols=columns)
    return canvas.figure


def _accuracy_range(curves: Mapping[str, Sequence[CurvePoint]], chosen: CurvePoint | None) -> tuple[float, float]:
    """Percent from below the worst of the curves' best points to the top: what lies far below tells nobody apart."""
    best = [max(points, key=lambda point: point.accuracy) for points in curves.values()]
    best += [chosen] if chosen is not None else []
    accuracies = [point.accuracy for point in best]
    edges = [point.band or (point.accuracy, point.accuracy) for point in itertools.chain(*curves.values(), best)]
    wanted = min(low for low, _ in (point.band or (point.accuracy,) * 2 for point in best))
    lowest = max(min(low for low, _ in edges), wanted - max(_BELOW, max(accuracies) - min(accuracies)))
    highest = max(high for _, high in edges)
    margin = 0.05 * (highest - lowest) or 0.01
    return 100 * (lowest - margin), 100 * (highest + margin)


def _executed(lookup: FLOPsLookup, stopped_at: Tensor, lengths: Tensor | None) -> Tensor:
    """Mean cost executed a frame in each stage, in the gates and in the head, `(N + 2,)`."""
    stages = len(lookup.per_stage)
    check_stopped_at(stopped_at, stages)
    decisions = torch.atleast_2d(stopped_at.cpu())
    depth = torch.arange(stages + 1)  # the last one is the head
    gated = (decisions[..., None] >= depth).sum(1).double()
    # Where no frame was used, the furthest one ran to the end, without gates.
    furthest = decisions.amax(1, keepdim=True)
    runs = (gated + ((furthest >= 0) & (depth > furthest))).sum(0)
    gates = gated[:, :stages].sum(0) @ lookup.gates
    costs = [runs[:stages] * lookup.per_stage, gates[None], runs[stages:] * lookup.head]
    lengths = None if lengths is None else check_lengths(lengths, *decisions.shape)
    executed: Tensor = torch.cat(costs) / (decisions.numel() if lengths is None else lengths.sum())
    return executed


class _Bar(NamedTuple):
    name: str
    length: float  # a share of the longest
    colour: str
    text: str
    track: float = 1.0  # length of the bar behind it


def _draw_bars(bars: Sequence[_Bar], title: str | None, theme: Theme) -> Figure:
    left = MARGIN + max(_style.text_width(bar.name) for bar in bars) + 0.15
    width = left + _BARS + 0.15 + max(_style.text_width(bar.text) for bar in bars) + MARGIN
    canvas = Canvas(width, 2 * MARGIN + _STEP * len(bars), title, theme)
    for i, bar in enumerate(bars):
        y = canvas.top - _STEP * (i + 0.5)
        bottom = y - _THICKNESS / 2
        canvas.write(left - 0.15, y, bar.name, ha="right")
        canvas.rectangle(left, bottom, _BARS * bar.track, _THICKNESS, facecolor=theme.track)
        style = {"facecolor": bar.colour, "edgecolor": theme.muted}
        canvas.rectangle(left, bottom, _BARS * bar.length, _THICKNESS, **style)
        canvas.write(width - MARGIN, y, bar.text, ha="right", color=theme.muted)
    return canvas.figure
