"""Compose untrimmed videos out of trimmed clips: one action inside stretches in which nothing relevant happens.

    python benchmarks/compose_untrimmed.py --data DIR --out half --irrelevant HorseRace Surfing
    python benchmarks/compose_untrimmed.py --data DIR --out long --irrelevant HorseRace Surfing --steps 64 --action 4 8

DIR is a folder with `labels.csv` (path,label,split). Some of its classes stay labels; the `--irrelevant` ones only ever
appear as material around the action. A clip is cut into 16 steps. A video has so many `--steps`: some of one label clip
in a row, and before and after them stretches of irrelevant clips of the same split. By default 4 to 10 of 16 steps (25
to 62 %) are the action. The second command makes long and sparse videos, in which one step of ten is.

As many uniformly sampled frames as the video has steps are frames that uniform sampling of the clips gives, 16 of each.
So features of clips can be put together into features of videos without encoding any frame twice
(`benchmarks/ablation.py`, `benchmarks/sparse.py`).

Training clips are split once more, into train and val; clips of one group (filmed in one session: `_g07_` in UCF-101's
names) stay together, and no clip is in two splits. Everything follows from the seed. Written are the videos,
`labels.csv`, which makes them a data set as any other, and `segments.csv` with the frames of the action
(path,start,end; the end is excluded).
"""

from __future__ import annotations

import argparse
import csv
import random
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop
from tqdm import tqdm

from dynskip import DynskipError, EncodedVideo, StopOrForward
from dynskip.video import Item, StoredFeatures, load_items, open_source, sample_frames
from dynskip.video.stick_figures import write_video
from dynskip.video.stored import classifier

CLIP_STEPS = 16
PICTURES_A_STEP = 5  # odd, so that a step's middle is one of its pictures
FPS = 10
GROUP = r"_(g\d+)_"


@dataclass(frozen=True)
class Plan:
    """Steps of a video, and the fewest and most of them in a row of the action and of an irrelevant clip."""

    steps: int = 16
    action: tuple[int, int] = (4, 10)
    stretch: tuple[int, int] = (2, 5)

    def __post_init__(self) -> None:
        for name, (low, high), most in (
            ("action", self.action, min(self.steps, CLIP_STEPS)),
            ("stretch", self.stretch, CLIP_STEPS),
        ):
            if not 1 <= low <= high <= most:
                raise DynskipError(
                    f"--{name} {low} {high} cannot be taken; give the fewest and the most steps, from 1 to {most}: a "
                    f"clip has {CLIP_STEPS} steps, and a video {self.steps}."
                )


@dataclass(frozen=True)
class Shot:
    """Some steps of a clip in a row."""

    clip: Item
    first: int
    count: int


@dataclass(frozen=True)
class Composition:
    """One untrimmed video: shots one after the other, of which one shows the action."""

    name: str
    label: str
    split: str
    shots: tuple[Shot, ...]
    action: int  # which of the shots

    @property
    def segment(self) -> tuple[int, int]:
        """First step of the action, and the one after its last."""
        start = sum(shot.count for shot in self.shots[: self.action])
        return start, start + self.shots[self.action].count

    @property
    def steps(self) -> list[tuple[Item, int]]:
        """The clip and step shown in each of the video's steps."""
        return [(shot.clip, shot.first + k) for shot in self.shots for k in range(shot.count)]


def split_by_group(items: Sequence[Item], folds: int, fold: int) -> list[Item]:
    """Make every so manieth group the split test, whatever its class, and the others the split train."""
    found = [re.search(GROUP, item.path.name) for item in items]
    if not all(found):
        raise DynskipError("Clips are divided by the camera group in their names, as in v_Archery_g07_c01.mp4.")
    numbers = [int(each[1][1:]) for each in found if each]
    return [
        replace(item, split="test" if number % folds == fold else "train")
        for item, number in zip(items, numbers, strict=True)
    ]


def split_off_validation(items: Sequence[Item], share: float, seed: int, group: str = GROUP) -> list[Item]:
    """Move about a share of each class's training clips to the split val, whole groups at a time."""
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        if item.split == "train":
            found = re.search(group, item.path.name)
            groups.setdefault((item.labels[0], found[1] if found else item.path.name), []).append(item)
    chosen: set[Item] = set()
    for label in sorted({label for label, _ in groups}):
        own = sorted(key for key in groups if key[0] == label)
        random.Random(f"{seed} {label}").shuffle(own)
        for key in own[: max(1, round(share * len(own)))]:
            chosen.update(groups[key])
    return [replace(item, split="val") if item in chosen else item for item in items]


def compose(
    items: Sequence[Item], irrelevant: Sequence[str], copies: int, seed: int, plan: Plan = Plan()
) -> list[Composition]:
    """Plan `copies` videos around every clip of a label class.

    Args:
        items: clips, each in its split.
        irrelevant: classes that are material only.
        copies: videos a label clip.
        seed: another number gives other videos.
        plan: what videos are made of.

    Returns:
        The videos in the order of the clips.

    Raises:
        DynskipError: if classes are unknown, or a split has label clips but nothing irrelevant.
    """
    classes = {item.labels[0] for item in items}
    unknown = sorted(set(irrelevant) - classes)
    if unknown or not classes - set(irrelevant):
        raise DynskipError(
            f"The data has the classes {', '.join(sorted(classes))}; --irrelevant names some of them and leaves at "
            f"least one, but got {', '.join(irrelevant)}."
        )
    material = {
        split: [item for item in items if item.split == split and item.labels[0] in irrelevant]
        for split in {item.split for item in items}
    }
    compositions = []
    for item in items:
        if item.labels[0] in irrelevant:
            continue
        if not material[item.split]:
            raise DynskipError(
                f"Split {item.split!r} has no clip of {', '.join(irrelevant)} to put around its actions."
            )
        for copy in range(copies):
            rng = random.Random(f"{seed} {item.labels[0]} {item.path.name} {copy}")
            count = rng.randint(*plan.action)
            before = rng.randint(0, plan.steps - count)
            lead = _filling(material[item.split], before, plan.stretch, rng)
            action = Shot(item, rng.randint(0, CLIP_STEPS - count), count)
            trail = _filling(material[item.split], plan.steps - count - before, plan.stretch, rng)
            name = f"{item.labels[0]}/{item.path.stem}_{copy}"
            compositions.append(Composition(name, item.labels[0], item.split, (*lead, action, *trail), len(lead)))
    return compositions


def _filling(clips: Sequence[Item], steps: int, stretch: tuple[int, int], rng: random.Random) -> list[Shot]:
    shots = []
    while steps:
        count = min(rng.randint(*stretch), steps)
        shots.append(Shot(rng.choice(clips), rng.randint(0, CLIP_STEPS - count), count))
        steps -= count
    return shots


def frames_of(compositions: Sequence[Composition], rows: Mapping[Path, int]) -> tuple[Tensor, Tensor]:
    """Return the row of the clip, and the step of it, that each frame of videos of equal length shows: two `(V, T)`."""
    clip = torch.tensor([[rows[item.path] for item, _ in composition.steps] for composition in compositions])
    return clip, torch.tensor([[step for _, step in composition.steps] for composition in compositions])


def relevant_frames(compositions: Sequence[Composition]) -> Tensor:
    """Mark the frames of each video that show its action, `(V, T)`."""
    relevant = torch.zeros(len(compositions), len(compositions[0].steps), dtype=torch.bool)
    for marks, composition in zip(relevant, compositions, strict=True):
        marks[slice(*composition.segment)] = True
    return relevant


@dataclass
class Composed:
    """Videos out of the features of clips, which are looked up a batch at a time, so that they take no memory."""

    features: StoredFeatures  # of clips, `CLIP_STEPS` frames each
    clip: Tensor  # (V, T) row of the clip that each frame shows
    step: Tensor  # (V, T) step of it
    targets: Tensor  # (V,)
    relevant: Tensor  # (V, T) the frames of the action
    clips: list[str]  # name of the clip that shows the action, a video each

    @classmethod
    def of(cls, compositions: Sequence[Composition], features: StoredFeatures, items: Sequence[Item]) -> Composed:
        """Look videos up in the features of items. Classes are numbered in alphabetical order."""
        clip, step = frames_of(compositions, {item.path: row for row, item in enumerate(items)})
        classes = sorted({each.label for each in compositions})
        targets = torch.tensor([classes.index(each.label) for each in compositions])
        names = [each.shots[each.action].clip.path.stem for each in compositions]
        return cls(features, clip, step, targets, relevant_frames(compositions), names)

    def batches(self) -> tuple[Tensor, ...]:
        """Return the rows of all videos, 64 at a time."""
        rows: tuple[Tensor, ...] = torch.arange(len(self.targets)).split(64)
        return rows

    def encoded(self, model: StopOrForward, rows: Tensor) -> EncodedVideo:
        """Return some videos as `decide` takes them; a model without a glance takes the last stages alone."""
        at = self.clip[rows], self.step[rows]
        pooled = tuple(stage[at] for stage in self.features.pooled[-model.backbone.num_stages :])
        with torch.no_grad():
            return EncodedVideo(pooled, classifier(model)(self.features.embedding[at]), self.features.image_size)

    def means(self, frames: Tensor) -> Tensor:
        """Return the mean over each video's frames of clips' features `(clips, CLIP_STEPS, D)`."""
        return torch.cat([frames[self.clip[rows], self.step[rows]].mean(1) for rows in self.batches()])


def pictures(composition: Composition, short_side: int) -> np.ndarray:
    """Return the video's pictures `(steps * PICTURES_A_STEP, H, W, 3)`, all of the size of the action's clip."""
    decoded = {
        shot.clip: sample_frames(open_source(shot.clip.path), CLIP_STEPS * PICTURES_A_STEP, short_side)
        for shot in composition.shots
    }
    height, width = (side // 2 * 2 for side in decoded[composition.shots[composition.action].clip].shape[1:3])
    shots = []
    for shot in composition.shots:
        begin = shot.first * PICTURES_A_STEP
        frames = torch.from_numpy(decoded[shot.clip][begin : begin + shot.count * PICTURES_A_STEP])
        shots.append(center_crop(frames.permute(0, 3, 1, 2), [height, width]).permute(0, 2, 3, 1))
    return torch.cat(shots).numpy()


def write_set(compositions: Sequence[Composition], out: Path, short_side: int = 240) -> None:
    """Write videos, `labels.csv` and `segments.csv`; the lists come last, when all videos are there."""
    for composition in tqdm(compositions, "compose", leave=False, disable=None):
        file = out / f"{composition.name}.mp4"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_video(file, pictures(composition, short_side), FPS)
    for name, columns in (("labels.csv", ("path", "label", "split")), ("segments.csv", ("path", "start", "end"))):
        with (out / name).open("w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle)
            writer.writerow(columns)
            for composition in compositions:
                start, end = (step * PICTURES_A_STEP for step in composition.segment)
                values = {"label": composition.label, "split": composition.split, "start": start, "end": end}
                writer.writerow([f"{composition.name}.mp4", *(values[column] for column in columns[1:])])


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--data", type=Path, required=True, help="folder with labels.csv (path,label,split)")
    result.add_argument("--out", type=Path, required=True, help="new folder for the videos")
    result.add_argument("--irrelevant", nargs="+", required=True, metavar="CLASS", help="classes that are no labels")
    result.add_argument("--steps", type=int, default=Plan.steps, help="of a video (default: 16)")
    for name, own, of in (("action", Plan.action, "the action"), ("stretch", Plan.stretch, "an irrelevant clip")):
        help = f"fewest and most steps of {of} in a row (default: {own[0]} {own[1]})"
        result.add_argument(f"--{name}", type=int, nargs=2, default=own, metavar=("LOW", "HIGH"), help=help)
    result.add_argument("--copies", type=int, default=1, help="videos around each label clip")
    result.add_argument("--val", type=float, default=0.2, help="share of the training groups to split off")
    result.add_argument("--seed", type=int, default=0)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        if (args.out / "labels.csv").exists():
            raise DynskipError(f"{args.out} holds a data set already; choose another --out.")
        plan = Plan(args.steps, tuple(args.action), tuple(args.stretch))
        items = split_off_validation(load_items(args.data), args.val, args.seed)
        compositions = compose(items, args.irrelevant, args.copies, args.seed, plan)
        write_set(compositions, args.out)
    except (DynskipError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = {split: sum(c.split == split for c in compositions) for split in ("train", "val", "test")}
    print(f"Wrote {counts} to {args.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
