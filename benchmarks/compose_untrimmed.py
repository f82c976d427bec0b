"""Compose untrimmed videos out of trimmed clips: one action inside stretches in which nothing relevant happens.

    python benchmarks/compose_untrimmed.py --data DIR --out untrimmed --irrelevant HorseRace PlayingViolin

DIR is a folder with `labels.csv` (path,label,split). Some of its classes stay labels; the `--irrelevant` ones only ever
appear as material around the action. A clip is cut into 16 steps. A video has 16 steps, too: 4 to 10 (25 to 62 %) of
one label clip in a row, and before and after them stretches of irrelevant clips of the same split. Its 16 uniformly
sampled frames are therefore frames that uniform sampling of the clips gives, so features of clips can be put together
into features of videos without encoding any frame twice (`benchmarks/ablation.py`).

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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.v2.functional import center_crop
from tqdm import tqdm

from dynskip import DynskipError
from dynskip.video import Item, load_items, open_source, sample_frames
from dynskip.video.stick_figures import write_video

STEPS = 16
ACTION_STEPS = (4, 10)  # 25 to 62.5 % of the video
STRETCH_STEPS = (2, 5)  # of one irrelevant clip in a row
PICTURES_A_STEP = 5  # odd, so that a step's middle is one of its pictures
FPS = 10
GROUP = r"_(g\d+)_"


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


def compose(items: Sequence[Item], irrelevant: Sequence[str], copies: int, seed: int) -> list[Composition]:
    """Plan `copies` videos around every clip of a label class.

    Args:
        items: clips, each in its split.
        irrelevant: classes that are material only.
        copies: videos a label clip.
        seed: another number gives other videos.

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
            count = rng.randint(*ACTION_STEPS)
            before = rng.randint(0, STEPS - count)
            lead = _filling(material[item.split], before, rng)
            action = Shot(item, rng.randint(0, STEPS - count), count)
            trail = _filling(material[item.split], STEPS - count - before, rng)
            name = f"{item.labels[0]}/{item.path.stem}_{copy}"
            compositions.append(Composition(name, item.labels[0], item.split, (*lead, action, *trail), len(lead)))
    return compositions


def _filling(clips: Sequence[Item], steps: int, rng: random.Random) -> list[Shot]:
    shots = []
    while steps:
        count = min(rng.randint(*STRETCH_STEPS), steps)
        shots.append(Shot(rng.choice(clips), rng.randint(0, STEPS - count), count))
        steps -= count
    return shots


def pictures(composition: Composition, short_side: int) -> np.ndarray:
    """Return the video's pictures `(STEPS * PICTURES_A_STEP, H, W, 3)`, all of the size of the action's clip."""
    decoded = {
        shot.clip: sample_frames(open_source(shot.clip.path), STEPS * PICTURES_A_STEP, short_side)
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
    result.add_argument("--copies", type=int, default=1, help="videos around each label clip")
    result.add_argument("--val", type=float, default=0.2, help="share of the training groups to split off")
    result.add_argument("--seed", type=int, default=0)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        if (args.out / "labels.csv").exists():
            raise DynskipError(f"{args.out} holds a data set already; choose another --out.")
        items = split_off_validation(load_items(args.data), args.val, args.seed)
        compositions = compose(items, args.irrelevant, args.copies, args.seed)
        write_set(compositions, args.out)
    except (DynskipError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = {split: sum(c.split == split for c in compositions) for split in ("train", "val", "test")}
    print(f"Wrote {counts} to {args.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
