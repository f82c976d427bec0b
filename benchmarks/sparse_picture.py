"""Draws a long and sparse video, and what gates after a glance do with it. Nothing but rendered figures is shown.

    python benchmarks/sparse_picture.py --weights FILE --light FILE --data runs/figures --out docs/images/sparse.png

The set of stick figures is rendered to DATA, and its features are kept beside it. In its videos a figure does one of six
actions for a while; before and after there are empty scenes, title cards, drifting shapes and figures that stand or
walk by. Here such frames are put together into videos of 64 frames, of which 4 to 8 show an action. Classifier and gates
are trained on the split train as in `benchmarks/sparse.py`; the picture is of a video of the split test.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sparse
import torch
from compose_untrimmed import Composed, Plan

from dynskip import plot, sofnet, video

FRAMES, PLAN = 48, Plan(64, (4, 8), (3, 8))
KIND = sparse.Kind(PLAN, {}, 30, 0.2)
TEMPORAL_MARGIN = 1  # frames beside the action that are neither relevant nor material


def segments(data: Path, items: Sequence[video.Item]) -> list[tuple[int, int]]:
    """Return the first frame of each video's action, and the one after its last."""
    with (data / "segments.csv").open(newline="", encoding="utf-8") as handle:
        found = {data / row["path"]: (int(row["start"]), int(row["end"])) for row in csv.DictReader(handle)}
    return [found[item.path] for item in items]


def compose(features: Any, items: Sequence[video.Item], bounds: Any, split: str, copies: int, seed: int) -> Composed:
    """Put frames of the videos of a split together, around the action of each."""
    rng, own = random.Random(f"{split} {seed}"), [row for row, item in enumerate(items) if item.split == split]
    idle = [(row, range(0, bounds[row][0] - TEMPORAL_MARGIN)) for row in own]
    idle += [(row, range(bounds[row][1] + TEMPORAL_MARGIN, FRAMES)) for row in own]
    idle = [(row, frames) for row, frames in idle if len(frames) >= PLAN.stretch[0]]

    def filling(count: int) -> list[tuple[int, int]]:
        shots: list[tuple[int, int]] = []
        while len(shots) < count:
            row, frames = rng.choice(idle)
            length = min(rng.randint(*PLAN.stretch), len(frames), count - len(shots))
            first = frames[rng.randint(0, len(frames) - length)]
            shots += [(row, first + k) for k in range(length)]
        return shots

    shown, marks = [], []
    for row in [row for row in own for _ in range(copies)]:
        start, end = bounds[row]
        count = rng.randint(*PLAN.action)
        first, before = rng.randint(start, end - count), rng.randint(0, PLAN.steps - count)
        action = [(row, first + k) for k in range(count)]
        shown.append(filling(before) + action + filling(PLAN.steps - before - count))
        marks.append([before <= t < before + count for t in range(PLAN.steps)])
    clip, step = torch.tensor(shown).unbind(-1)
    names = [items[row].labels[0] for row in own for _ in range(copies)]
    classes = sorted(set(names))
    return Composed(
        features, clip, step, torch.tensor([classes.index(name) for name in names]), torch.tensor(marks), names
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, help in (
        ("weights", "ImageNet weights of resnet50_v1"),
        ("light", f"ImageNet weights of {sparse.LIGHT}"),
        ("data", "folder for the rendered set"),
        ("out", "picture to write"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, help=help)
    parser.add_argument("--train", type=int, default=12, help="videos a class to train on (default: 12)")
    args = parser.parse_args(arguments)
    video.render_set(args.data, train_per_class=args.train, test_per_class=2, size=sparse.SIZE)
    items = video.load_items(args.data)
    bounds, names = segments(args.data, items), video.class_names(items)
    plain, glanced, _ = sparse.networks(args, len(names))
    model = sofnet(glanced).to(memory_format=torch.channels_last)
    clips = video.Clips(items, names, video.Preprocessing(sparse.SIZE, FRAMES))
    features = video.encode_clips(model, clips, args.data / "features")

    def part(split: str, version: int = 0) -> Composed:
        return compose(features, items, bounds, split, 4, version)

    train, test = [part("train", -version) for version in range(1, 5)], part("test")
    sparse.fit_head(plain.model.get_classifier(), features.embedding, train, test)
    model = sparse.train_gates(glanced, KIND, part, 0, "gates")
    with torch.no_grad():
        output = model.decide(test.encoded(model, torch.arange(len(test.targets))))
    right = output.logits.argmax(-1) == test.targets
    dense = PLAN.steps * plain_cost(plain)
    for row in range(len(right)):
        print(
            row,
            names[test.targets[row]],
            bool(right[row]),
            int(output.used[row].sum()),
            int((output.used & test.relevant)[row].sum()),
            int(test.relevant[row].sum()),
            round(float(output.macs[row]) / dense, 3),
        )
