"""A wrapped model in words: the table of stages that `summary()` returns."""

from __future__ import annotations

from collections.abc import Sequence

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
    """Show what every stage and gate costs, and by what rule the gate decides.

    Args:
        title: first line.
        backbone: the model's backbone.
        gates: its gates, one a stage.
        lookup: costs of one frame.
        thresholds: forward threshold of every gate.
        rules: last lines, about the whole model.

    Returns:
        The text; costs are in GMACs or MMACs (multiply-adds), or in the unit of `lookup`.
    """
    scale, unit = lookup.display_unit
    total = lookup.total
    rows = [("stage", "channels", "stage", "gate", "so far", "share", "the gate after it")]
    stage_costs, gate_costs, costs_so_far = (x.tolist() for x in (lookup.per_stage, lookup.gates, lookup.cumulative))
    for n, gate in enumerate(gates):
        rule = f"{type(gate).__name__}({gate.extra_repr()})"
        if thresholds[n] != 0.5:
            rule += f", forward above {thresholds[n]:g}"
        costs = [f"{cost / scale:.3f}" for cost in (stage_costs[n], gate_costs[n], costs_so_far[n])]
        share = f"{costs_so_far[n] / total:.1%}" if total else ""
        rows.append((backbone.stage_names[n], str(backbone.num_features[n]), *costs, share, rule))
    rows.append(
        ("head", str(backbone.num_classes), f"{lookup.head / scale:.3f}", "", f"{total / scale:.3f}", "100.0%", "")
    )
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if k in (0, 6) else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    size = "any size" if lookup.image_size is None else "{}x{}".format(*lookup.image_size)
    note = f"{unit} a frame of {size}" + (", in multiply-adds" if lookup.unit == "MACs" else "")
    plain = f"the plain backbone has {lookup.dense / scale:.4g}"
    return "\n".join([title, *(line.rstrip() for line in lines), f"{note}; {plain}", *rules])


def one_frame(lookup: FLOPsLookup) -> str:
    """Say what a frame that passes every gate costs."""
    scale, unit = lookup.display_unit
    size = "" if lookup.image_size is None else " of {}x{}".format(*lookup.image_size)
    note = " (multiply-adds)" if lookup.unit == "MACs" else ""
    return f"{lookup.total / scale:.4g} {unit} a frame{size}{note}"


def as_size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Read one number as the side of a square."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size
