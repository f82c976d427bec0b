"""The model card: what a saved model is, how to use it, what it costs and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import timm
import torch

import dynskip

if TYPE_CHECKING:
    from dynskip._config import Wrapped

_WHAT_IT_IS = (
    "A video classifier that spends less compute on frames that do not deserve it: after each stage a gate decides, "
    "frame by frame, to stop or to go forward.",
    "An image classifier with exits: after each stage a gate decides, image by image, to answer here or to go forward.",
)
_FRONT_MATTER = """---
library_name: dynskip
pipeline_tag: {task}
tags: [dynskip, timm, dynamic-inference, early-exit]
---"""


def model_card(model: Wrapped, wrapper: str, results: Sequence[Mapping[str, object]], name: str) -> str:
    """Write the card of a model.

    Args:
        model: the model.
        wrapper: name of the class that loads it.
        results: measured rows, each a mapping from column to value.
        name: what readers are told to load.

    Returns:
        The text, in Markdown.
    """
    backbone, images = model.backbone, model.task == "image-classification"
    preprocessing = model.preprocessing or {}
    size = tuple(preprocessing.get("input_size", backbone.input_size))[-2:]
    classes = f"{backbone.num_classes} classes"
    if model.class_names is not None:
        shown = ", ".join(model.class_names[:20]) + (", ..." if len(model.class_names) > 20 else "")
        classes += f": {shown}"
    facts = [
        f"Backbone: `{backbone.origin['name']}` of timm, {backbone.num_stages} stages, {classes}."  # type: ignore[index]
        f" Gates: {', '.join(dict.fromkeys(type(gate).__name__ for gate in model.gates))}.",
        *([] if images else _rules(model)),
        f"Made with dynskip {dynskip.__version__}, timm {timm.__version__}, torch {torch.__version__}.",
    ]
    if preprocessing:
        facts.append(f"Preprocessing: {', '.join(f'{key} {value}' for key, value in preprocessing.items())}.")
    sections = [
        _FRONT_MATTER.format(task=model.task),
        f"# {name}\n\n{_WHAT_IT_IS[images]}\n\n" + "\n".join(f"- {fact}" for fact in facts),
        f"## Use\n\n{_use(wrapper, name, images)}",
        f"## Cost of {'an image' if images else 'a frame'}\n\n{_costs(model, size)}",
    ]
    if results:
        columns = list(dict.fromkeys(str(key) for row in results for key in row))
        sections.append("## Results\n\n" + _table(columns, [[row.get(c, "") for c in columns] for row in results]))
    return "\n\n".join(sections) + "\n"


def _rules(model: Any) -> list[str]:
    """Tell what videos have and images have not."""
    terminator = model.terminator
    ends = "Every frame of a video is read."
    if terminator is not None:
        ends = f"Videos end early: {type(terminator).__name__}({getattr(terminator, 'extra_repr', str)()})."
    return [f"The gates' memory advances on {model.state_update} frames.", ends]


def _use(cls: str, name: str, images: bool) -> str:
    call = "model(images)  # (B, C, H, W), normalised" if images else "model(video)  # (B, T, C, H, W), normalised"
    lines = [f"from dynskip import {cls}", "", f"model = {cls}.from_pretrained({name!r})", f"output = {call}"]
    lines.append("print(output.probabilities, output.stopped_at, output.macs)")
    return "\n".join(["```python", *lines, "```"])


def _costs(model: Wrapped, size: tuple[int, int]) -> str:
    lookup = getattr(model, "_given_lookup", None) or model.lookup_for(size)
    scale, unit = (1e6, "MMACs") if lookup.unit == "MACs" else (1.0, lookup.unit)
    names = [*model.backbone.stage_names, "head"]
    parts = [*lookup.per_stage.tolist(), lookup.head]
    gates = [*lookup.gates.tolist(), 0.0]
    totals = [*lookup.cumulative.tolist(), lookup.total]
    rows = [
        [name, *(f"{cost / scale:,.3f}" for cost in costs)]
        for name, *costs in zip(names, parts, gates, totals, strict=True)
    ]
    where = "" if lookup.image_size is None else " at {}x{}".format(*lookup.image_size)
    note = "MMACs are millions of multiply-adds" if unit == "MMACs" else f"Costs are in {unit}"
    return f"{_table(['stage', unit, 'its gate', 'so far'], rows)}\n\n*{note}{where}.*"


def _table(columns: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
