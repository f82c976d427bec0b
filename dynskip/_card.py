"""The model card: what a saved model is, how to use it, what it costs and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import timm
import torch

import dynskip

if TYPE_CHECKING:
    from dynskip._config import Wrapped

_CARD = """---
library_name: dynskip
pipeline_tag: {task}
tags: [dynskip, timm, dynamic-inference, early-exit]
---

# {name}

{what}

{facts}

## Use

```python
from dynskip import {wrapper}

model = {wrapper}.from_pretrained({name!r})
output = model({call}, normalised
print(output.probabilities, output.stopped_at, output.macs)
```

## Cost

```text
{costs}
```
"""
_VIDEOS = (
    "A video classifier that spends less compute on frames that do not need it: after each stage a gate decides, frame "
    "by frame, to stop or to go forward.",
    "video)  # (B, T, C, H, W)",
)
_IMAGES = (
    "An image classifier with exits: after each stage a gate decides, image by image, to answer here or to go forward.",
    "images)  # (B, C, H, W)",
)


def model_card(model: Wrapped, wrapper: str, results: Sequence[Mapping[str, object]], name: str) -> str:
    """Write the card of a model, in Markdown; `results` are its rows, `name` is what readers are told to load."""
    backbone, preprocessing = model.backbone, model.preprocessing or {}
    classes = f"{backbone.num_classes} classes"
    if model.class_names is not None:
        shown = ", ".join(model.class_names[:20]) + (", ..." if len(model.class_names) > 20 else "")
        classes += f": {shown}"
    network = f"`{backbone.origin['name']}` of timm"  # type: ignore[index]
    if (glance := backbone.glance) is not None:
        network += f" behind a glance of `{glance.light.origin['name']}` at {glance.size} pixels"
    facts = [
        f"Backbone: {network}, {backbone.num_stages} stages, {classes}.",
        f"Made with dynskip {dynskip.__version__}, timm {timm.__version__}, torch {torch.__version__}.",
    ]
    if model.activation == "sigmoid":
        facts.append("Probabilities are a sigmoid's: each class holds or not, on its own.")
    if preprocessing:
        facts.append(f"Preprocessing: {', '.join(f'{key} {value}' for key, value in preprocessing.items())}.")
    size = preprocessing.get("input_size", backbone.input_size)
    size = size if isinstance(size, int) else tuple(size)[-2:]
    what, call = _IMAGES if model.task == "image-classification" else _VIDEOS
    card = _CARD.format(
        task=model.task,
        name=name,
        what=what,
        facts="\n".join(f"- {fact}" for fact in facts),
        wrapper=wrapper,
        call=call,
        costs=model.summary(None if getattr(model, "_given_lookup", None) else size),
    )
    return card + _results(results) if results else card


def _results(rows: Sequence[Mapping[str, object]]) -> str:
    columns = list(dict.fromkeys(str(key) for row in rows for key in row))
    cells = [[row.get(column, "") for column in columns] for row in rows]
    lines: list[Sequence[object]] = [columns, ["---"] * len(columns), *cells]
    table = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join(["", "## Results", "", *table, ""])
