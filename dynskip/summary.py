"""A wrapped model in words: the per-stage table that `summary()` returns."""

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
    """Lay out what every stage and gate costs, and by what rule the gate decides.

    Args:
        title: what the model is.
        backbone: its backbone.
        gates: its gates, one a stage.
        lookup: costs of one frame.
        thresholds: forward threshold of every gate.
        rules: lines about the whole model, for the end.

    Returns:
        The text; costs are in GMACs or MMACs (multiply-adds), or in the table's own unit.
    """
    scale, unit = lookup.display_unit
    total = lookup.total
    rows = [("stage", "channels", "stage", "gate", "so far", "share", "the gate after it")]
    costs = zip(lookup.per_stage.tolist(), lookup.gates.tolist(), lookup.cumulative.tolist(), strict=True)
    for n, (stage, gate, so_far) in enumerate(costs):
        rule = one_line(gates[n]) + ("" if thresholds[n] == 0.5 else f", forward above {thresholds[n]:g}")
        rows.append(
            (backbone.stage_names[n], str(backbone.num_features[n]), *_costs(scale, total, stage, gate, so_far), rule)
        )
    rows.append(("head", str(backbone.num_classes), *_costs(scale, total, lookup.head, None, total), ""))
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
    """Take one number for squares."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def one_line(module: nn.Module) -> str:
    """Show a module without its parts."""
    return f"{type(module).__name__}({module.extra_repr()})"


def _costs(scale: float, total: float, own: float, gate: float | None, so_far: float) -> tuple[str, str, str, str]:
    share = so_far / total if total else 1.0
    return f"{own / scale:.3f}", "" if gate is None else f"{gate / scale:.3f}", f"{so_far / scale:.3f}", f"{share:.1%}"
