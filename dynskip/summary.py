"""A wrapped model in words: the table of stages that `summary()` returns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from dynskip.backbone import StagedBackbone
from dynskip.flops import FLOPsLookup


def stage_table(
    title: str,
    backbone: StagedBackbone,
    gates: Sequence[nn.Module],
    lookup: FLOPsLookup,
    thresholds: Sequence[float],
    rules: Sequence[str] = (),
) -> str:
    """Show what every stage and gate costs and how the gate decides, between a title and rules of the whole model."""
    scale, unit = lookup.display_unit
    total, head = lookup.total, lookup.head
    rows: list[tuple[str, ...]] = [("stage", "channels", "stage", "gate", "so far", "share", "the gate after it")]
    costs = torch.stack([lookup.per_stage, lookup.gates, lookup.cumulative], 1)
    for n, gate in enumerate(gates):
        shown = [f"{cost / scale:.3f}" for cost in costs[n].tolist()]
        share = f"{costs[n, -1] / total if total else 1:.1%}"
        rule = f"{type(gate).__name__}({gate.extra_repr()})"
        if thresholds[n] != 0.5:
            rule += f", forward above {thresholds[n]:g}"
        rows.append((backbone.stage_names[n], str(backbone.num_features[n]), *shown, share, rule))
    rows.append(("head", str(backbone.num_classes), f"{head / scale:.3f}", "", f"{total / scale:.3f}", "100.0%", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:-1]), rule]).rstrip()
        for name, *numbers, rule in rows
    ]
    size = "any size" if lookup.image_size is None else "{}x{}".format(*lookup.image_size)
    note = f"{unit} a frame of {size}" + (", in multiply-adds" if lookup.unit == "MACs" else "")
    dense = f"the dense network has {lookup.dense / scale:.4g}"
    unknown = ["nan: torch cannot count this cost; FLOPsLookup says what helps."] if math.isnan(total) else []
    return "\n".join([title, *lines, f"{note}; {dense}", *unknown, *rules])


def one_frame(lookup: FLOPsLookup) -> str:
    """Say what a frame that passes every gate costs."""
    scale, unit = lookup.display_unit
    size = "" if lookup.image_size is None else " of {}x{}".format(*lookup.image_size)
    note = " (multiply-adds)" if lookup.unit == "MACs" else ""
    return f"{lookup.total / scale:.4g} {unit} a frame{size}{note}"


def as_size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Read one number as the side of a square."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size
