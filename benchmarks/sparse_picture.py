"""Draws a long and sparse video, and what gates after a glance do with it. Only rendered figures are shown.

    python benchmarks/sparse_picture.py --weights FILE --light FILE --data runs/figures --out docs/images/sparse.png

The set of stick figures is rendered to DATA, and its features are kept there. In each of its videos a figure does one
of six actions for a while; before and after are empty scenes, title cards, drifting shapes, figures that stand or walk
by. Frames of them are put together into videos of 64 frames, of which 4 to 8 show an action. A classifier and gates
are trained on the split train as in `benchmarks/sparse.py`. The picture is of a test video that is answered rightly,
the one at the median of the costs; frames go forward with a probability above 0.7.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Sequence
from pathlib import Path

import common
import numpy as np
import sparse
import torch
from compose_untrimmed import Composed, Plan
from matplotlib.figure import Figure

from dynskip import FLOPsLookup, plot, sofnet, video
from dynskip.video.stick_figures import NUM_FRAMES

FRAMES, PLAN = 24, Plan(64, (4, 8), (3, 8))
KIND = sparse.Kind(PLAN, {"train": 3, "test": 3}, 30, 0.2)


def compose(data: Path, features: video.StoredFeatures, items: Sequence[video.Item], split: str, seed: int) -> Composed:
    """Put frames of the videos of a split together, around the action of each."""
    with (data / "segments.csv").open(newline="", encoding="utf-8") as handle:
        rows = {data / row["path"]: (int(row["start"]), int(row["end"])) for row in csv.DictReader(handle)}
    scale, rng = FRAMES / NUM_FRAMES, random.Random(f"{split} {seed}")
    bounds = {k: [round(edge * scale) for edge in rows[x.path]] for k, x in enumerate(items) if x.split == split}
    idle = [(k, part) for k, (a, b) in bounds.items() for part in (range(a - 1), range(b + 1, FRAMES)) if len(part) > 2]

    def stretch(clip: int, frames: range, count: int) -> list[tuple[int, int]]:
        first = rng.randint(0, len(frames) - count)
        return [(clip, step) for step in frames[first : first + count]]

    def filling(left: int) -> list[tuple[int, int]]:
        shown: list[tuple[int, int]] = []
        while len(shown) < left:
            clip, frames = rng.choice(idle)
            shown += stretch(clip, frames, min(rng.randint(*PLAN.stretch), len(frames), left - len(shown)))
        return shown

    shown, relevant, names = [], [], []
    for clip, (start, end) in [each for each in bounds.items() for _ in range(KIND.copies[split])]:
        count = min(rng.randint(*PLAN.action), end - start)
        before = rng.randint(0, PLAN.steps - count)
        action = stretch(clip, range(start, end), count)
        shown.append(filling(before) + action + filling(PLAN.steps - before - count))
        relevant.append([before <= t < before + count for t in range(PLAN.steps)])
        names.append(items[clip].labels[0])
    clips, steps = torch.tensor(shown).unbind(-1)
    targets = torch.tensor([sorted(set(names)).index(name) for name in names])
    return Composed(features, clips, steps, targets, torch.tensor(relevant), names)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="ImageNet weights of resnet50_v1")
    parser.add_argument("--light", type=Path, required=True, help=f"ImageNet weights of {sparse.LIGHT}")
    parser.add_argument("--data", type=Path, required=True, help="folder for the rendered set")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    args = parser.parse_args(arguments)
    video.render_set(args.data, train_per_class=10, test_per_class=2, size=sparse.SIZE)
    items = video.load_items(args.data)
    plain, glanced, _ = sparse.networks(args, len(video.class_names(items)))
    prep = video.Preprocessing(sparse.SIZE, FRAMES)
    clips = video.Clips(items, video.class_names(items), prep)
    model = sofnet(glanced).to(memory_format=torch.channels_last)
    features = video.encode_clips(model, clips, args.data / "features")

    def part(split: str, version: int = 0) -> Composed:
        return compose(args.data, features, items, split, version)

    test = part("test")
    sparse.fit_head(plain.model.get_classifier(), features.embedding, [part("train", -k) for k in range(1, 5)], test)
    model = sparse.train_gates(glanced, KIND, part, 0, "gates")
    model.forward_threshold = 0.7
    with torch.no_grad():
        output = model.decide(test.encoded(model, torch.arange(len(test.targets))))
    right = (output.logits.argmax(-1) == test.targets).nonzero().flatten()
    row = int(right[output.macs[right].argsort()[len(right) // 2]])
    decoded = {
        clip: video.sample_frames(video.open_source(items[clip].path), FRAMES, prep.short_side)
        for clip in test.clip[row].tolist()
    }
    shown = zip(test.clip[row].tolist(), test.step[row].tolist(), strict=True)
    frames = np.stack([decoded[clip][step] for clip, step in shown])
    marked = test.relevant[row].nonzero().flatten().tolist()
    share = float(output.macs[row]) / (PLAN.steps * FLOPsLookup.measure(plain, sparse.SIZE).dense)
    title = f"{PLAN.steps} frames, {len(marked)} of them of the action: {100 * share:.0f} % of the dense cost"
    names = ("glance", *(f"res{n}" for n in range(1, 6)))

    def draw(dark: bool) -> Figure:
        return plot.timeline(
            frames, output.stopped_at[row], names, segments=[(marked[0], marked[-1] + 1)], title=title,
            fallback_frame=int(output.fallback_frame[row]), dark=dark,
        )  # fmt: skip

    common.save_pair(draw, args.out)
    print(
        f"{len(right)} of {len(test.targets)} test videos right; used {output.used.float().mean():.1%} of the frames."
    )


if __name__ == "__main__":
    main()
