"""Shares of frames and costs of stages as horizontal bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dynskip.errors import DynskipError
from dynskip.flops import FLOPsLookup
from dynskip.metrics import FrameUsage, check_stopped_at
from dynskip.plot._style import (
    DARK,
    FONT,
    GATES,
    LIGHT,
    MARGIN,
    USED,
    Theme,
    draw_title,
    height_of_title,
    open_canvas,
    rectangle,
    shade_of,
    text_width,
    write,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BARS, _STEP, _THICKNESS = 4.5, 0.34, 0.22  # the longest horizontal bar, from one to the next, and how thick


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
    theme = DARK if dark else LIGHT
    rows = [("used", usage.used, USED)]
    for n, (name, share) in enumerate(zip(stage_names, usage.stopped, strict=True)):
        rows.append((f"stopped after {name}", share, shade_of(n, len(stage_names), theme)))
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
    theme = DARK if dark else LIGHT
    scale, unit = (1e9, "GMACs") if lookup.unit == "MACs" else (1.0, lookup.unit)
    colours = [shade_of(n, stages, theme) for n in range(stages)] + [GATES, USED]
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


def _draw_bars(bars: Sequence[_Bar], title: str | None, theme: Theme) -> Figure:
    left = MARGIN + max(text_width(bar.name, FONT) for bar in bars) + 0.15
    title_height = height_of_title(title)
    figure_width = left + _BARS + 0.15 + max(text_width(bar.text, FONT) for bar in bars) + MARGIN
    figure_height = 2 * MARGIN + title_height + _STEP * len(bars)
    figure, axes = open_canvas(figure_width, figure_height, theme)
    draw_title(axes, title, MARGIN, theme)
    for i, bar in enumerate(bars):
        y = figure_height - MARGIN - title_height - _STEP * (i + 0.5)
        bottom = y - _THICKNESS / 2
        write(axes, left - 0.15, y, bar.name, ha="right", size=FONT, color=theme.ink)
        rectangle(axes, left, bottom, _BARS * bar.track, _THICKNESS, facecolor=theme.track)
        style = {"facecolor": bar.colour, "edgecolor": theme.muted}
        rectangle(axes, left, bottom, _BARS * bar.length, _THICKNESS, **style)
        write(axes, figure_width - MARGIN, y, bar.text, ha="right", size=FONT, color=theme.muted)
    return figure
