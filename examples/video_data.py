"""Videos and data sets for the examples: decode frames, read annotations, make batches."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torchvision.transforms.v2 as T
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dynskip import DynskipError

# ---------------------------------------------------------------------------------------------------------- videos


class VideoError(DynskipError):
    """A file that gives no frames."""


def read_frames(path: Path, num_frames: int, short_side: int, rng: random.Random | None = None) -> np.ndarray:
    """Decode `num_frames` frames spread evenly over a video.

    Args:
        path: a file that FFmpeg can read.
        num_frames: frames to return; a shorter video repeats some.
        short_side: pixels to scale the shorter side to.
        rng: draw each frame at random from its stretch of the video; by default the middle of the stretch.

    Returns:
        `(T, H, W, 3)` uint8 RGB frames.
    """
    offsets = [rng.random() if rng else 0.5 for _ in range(num_frames)]
    try:
        with OpenVideo(path) as (container, stream):
            # Headers lie and may be missing, so this is only a first guess at the number of frames.
            guess = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        for _ in range(2):
            wanted = [int(guess / num_frames * (i + offset)) for i, offset in enumerate(offsets)]
            kept: dict[int, np.ndarray] = {}
            count = 0
            with OpenVideo(path) as (container, stream):
                for frame in container.decode(stream):
                    if count in wanted:
                        kept[count] = _to_array(frame, short_side)
                    count += 1
            if count == guess and count:
                return np.stack([kept[i] for i in wanted])
            guess = count  # the decoder's word is final: pick again
    except av.error.FileNotFoundError:
        raise VideoError(f"{path}: no such file.") from None
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: not a readable video ({error}). Try to play or re-encode it.") from error
    raise VideoError(f"{path}: holds no video frame. Expected a file with at least one picture.")


class OpenVideo:
    """Open the best video stream of a file."""

    def __init__(self, path: Path) -> None:
        self.container = av.open(str(path), metadata_errors="ignore")
        stream = self.container.streams.best("video")
        if stream is None or self.container.format.name == "tty":  # FFmpeg plays plain text as a terminal recording
            self.container.close()
            raise VideoError(f"{path}: holds no video stream. Expected a video file such as .mp4, .mkv or .avi.")
        self.stream: Any = stream

    def __enter__(self) -> tuple[Any, Any]:
        return self.container, self.stream

    def __exit__(self, *_: object) -> None:
        self.container.close()


def _to_array(frame: Any, short_side: int) -> np.ndarray:
    scale = short_side / min(frame.width, frame.height)
    image = frame.reformat(max(round(frame.width * scale), 1), max(round(frame.height * scale), 1), format="rgb24")
    return np.rot90(image.to_ndarray(), round(frame.rotation / 90)).copy()  # phones store how they were held


# ------------------------------------------------------------------------------------------------------------ data


SPLITS = ("train", "val", "test")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".3gp", ".wmv")


@dataclass(frozen=True)
class Item:
    """One labelled video."""

    path: Path
    labels: tuple[str, ...]
    split: str


def load_items(data: Path, annotations: Path | None) -> list[Item]:
    """Read a data set: ActivityNet's JSON if `annotations` is given, else `labels.csv`."""
    return read_activitynet(annotations, data) if annotations else read_csv(data)


def read_csv(data: Path) -> list[Item]:
    """Read `path,label,split` rows from a CSV file, or from `labels.csv` in a folder; paths are relative to it."""
    file = data / "labels.csv" if data.is_dir() else data
    if not file.is_file():
        raise DynskipError(f"{file} does not exist. --data takes a folder with a labels.csv, or such a file.")
    try:
        with file.open(newline="", encoding="utf-8-sig") as handle:  # spreadsheets put a mark in front
            reader = csv.DictReader(handle, restval="")
            columns, rows = list(reader.fieldnames or []), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DynskipError(f"{file} is no CSV text in UTF-8 ({error}). Save it as CSV UTF-8.") from error
    missing = {"path", "label", "split"} - set(columns)
    if missing:
        raise DynskipError(
            f"{file} lacks the column {', '.join(sorted(missing))}. Its first line must name path, label and split; "
            f"it names {columns}."
        )
    items = []
    for number, row in enumerate(rows, start=2):
        if row["split"] not in SPLITS:
            raise DynskipError(
                f"{file}, line {number}: unknown split {row['split']!r}. Expected one of {', '.join(SPLITS)}."
            )
        if not row["path"] or not row["label"]:
            raise DynskipError(f"{file}, line {number}: path and label must not be empty.")
        items.append(Item(file.parent / row["path"], (row["label"],), row["split"]))
    absent = [item.path for item in items if not item.path.is_file()]
    if absent:
        raise DynskipError(
            f"{file} names {len(absent)} of {len(items)} videos that do not exist, the first being {absent[0]}. "
            "Paths are relative to the CSV file; correct them or leave these rows out."
        )
    return items


def read_activitynet(annotations: Path, videos: Path) -> list[Item]:
    """Read ActivityNet-v1.3's own JSON; videos are `<id>.*` or `v_<id>.*` in a folder."""
    try:
        database = json.loads(annotations.read_text(encoding="utf-8"))["database"]
        # A video often shows its action several times: its labels are the distinct names, in order.
        entries = [
            (name, entry["subset"], tuple(dict.fromkeys(str(segment["label"]) for segment in entry["annotations"])))
            for name, entry in database.items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DynskipError(
            f"{annotations} is no ActivityNet annotation file ({type(error).__name__}: {error}). Expected JSON whose "
            "'database' gives each video a 'subset' and 'annotations' with a 'label', as activity_net.v1-3.min.json."
        ) from error
    if not videos.is_dir():
        raise DynskipError(f"{videos} is no folder. With --annotations, --data is the folder of the videos.")
    files = {p.stem.removeprefix("v_"): p for p in sorted(videos.iterdir()) if p.suffix.lower() in VIDEO_SUFFIXES}
    items, absent = [], 0
    for name, subset, labels in entries:
        split = {"training": "train", "validation": "val"}.get(subset)
        if split is None or not labels:
            continue
        path = files.get(name.removeprefix("v_"))
        if path is None:
            absent += 1
            continue
        items.append(Item(path, labels, split))
    if not items:
        raise DynskipError(
            f"None of the {absent} annotated videos is in {videos}. Files are named <id>.mp4 or v_<id>.mp4."
        )
    if absent:
        print(f"{absent} of {absent + len(items)} annotated videos are not in {videos}; they are left out.")
    return items


def pick_split(items: Sequence[Item], split: str) -> list[Item]:
    """Return the items of one split; it must have some."""
    chosen = [item for item in items if item.split == split]
    if not chosen:
        found = sorted({item.split for item in items})
        raise DynskipError(f"The data has no videos of split {split!r}; it has {', '.join(found) or 'none at all'}.")
    return chosen


def held_out_split(items: Sequence[Item]) -> str | None:
    """The split to evaluate on: test, or val where there is no test."""
    found = {item.split for item in items}
    return next((split for split in ("test", "val") if split in found), None)


def class_names(items: Sequence[Item]) -> list[str]:
    """All label names, sorted; the position is the class index."""
    return sorted({label for item in items for label in item.labels})


@dataclass(frozen=True)
class Preprocessing:
    """How frames become the network's input."""

    size: int = 168
    num_frames: int = 16
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def short_side(self) -> int:
        """Pixels of the shorter side before cropping."""
        return round(self.size * 8 / 7)

    def crop(self, frames: np.ndarray, training: bool = False) -> Tensor:
        """Crop `(T, H, W, 3)` frames to `(T, 3, size, size)` uint8: the middle, or the same random part of each."""
        video = rearrange(torch.from_numpy(frames), "t h w c -> t c h w")
        if not training:
            return T.functional.center_crop(video, [self.size, self.size])
        augment = T.Compose(
            [T.RandomResizedCrop(self.size, scale=(0.5, 1.0), antialias=True), T.RandomHorizontalFlip()]
        )
        return augment(video)

    def normalize(self, video: Tensor) -> Tensor:
        """Scale uint8 pictures of shape `(..., 3, H, W)` to what the network was trained on."""
        scaled = T.functional.to_dtype(video, torch.float32, scale=True)
        return T.functional.normalize(scaled, list(self.mean), list(self.std))


CHOICES = 3  # frames kept in memory for each one that the network sees: early, middle and late in its stretch


class Clips(Dataset):
    """Videos as `(clip, class index, position)`; an unreadable one as its error message.

    Indexed by `(epoch, position)`, so that what is drawn at random depends on nothing else: not on the number of
    workers, and not on whether training was interrupted.
    """

    def __init__(
        self, items: Sequence[Item], classes: Sequence[str], prep: Preprocessing, training: bool, seed: int
    ) -> None:
        self.items, self.prep, self.training, self.seed = list(items), prep, training, seed
        index = {name: i for i, name in enumerate(classes)}
        unknown = sorted({label for item in items for label in item.labels} - set(index))
        if unknown:
            raise DynskipError(
                f"The data has {len(unknown)} classes that the model does not know, such as {unknown[0]!r}. It was "
                f"trained on {len(classes)} classes: {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}."
            )
        self.targets = [[index[label] for label in item.labels] for item in items]
        self.memory: list[np.ndarray | str] | None = None

    def load_into_memory(self) -> Clips:
        """Decode everything once and keep it; for sets that fit."""
        decoded = (self._decode(item.path, CHOICES * self.prep.num_frames, None) for item in self.items)
        self.memory = list(tqdm(decoded, "decode", len(self), leave=False, disable=None))
        return self

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int] | str:
        epoch, position = key
        seed = derive_seed(self.seed, epoch, position)
        rng = random.Random(seed) if self.training else None
        if self.memory is None:
            frames = self._decode(self.items[position].path, self.prep.num_frames, rng)
        else:
            frames = self.memory[position]
        if isinstance(frames, str):
            return frames
        if self.memory is not None:
            picks = [rng.randrange(CHOICES) if rng else CHOICES // 2 for _ in range(self.prep.num_frames)]
            frames = frames[[CHOICES * i + pick for i, pick in enumerate(picks)]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            video = self.prep.crop(frames, self.training)
        return video, self.targets[position][0], position

    def _decode(self, path: Path, num_frames: int, rng: random.Random | None) -> np.ndarray | str:
        try:
            return read_frames(path, num_frames, self.prep.short_side, rng)
        except VideoError as error:
            return str(error)


@dataclass
class Batch:
    """A batch of clips, and what could not be read."""

    video: Tensor  # (B, T, 3, H, W) uint8
    targets: Tensor  # (B,)
    positions: list[int]
    errors: list[str]


def collate(samples: list[tuple[Tensor, int, int] | str]) -> Batch:
    """Batch what could be read, and pass on what could not."""
    good = [sample for sample in samples if not isinstance(sample, str)]
    return Batch(
        video=torch.stack([video for video, _, _ in good]) if good else torch.empty(0),
        targets=torch.tensor([target for _, target, _ in good], dtype=torch.long),
        positions=[position for _, _, position in good],
        errors=[sample for sample in samples if isinstance(sample, str)],
    )


def batches(clips: Clips, batch_size: int, workers: int, epoch: int = 0) -> DataLoader:
    """Load clips in batches: shuffled by seed and epoch for training, in order otherwise."""
    order = list(range(len(clips)))
    if clips.training:
        random.Random(derive_seed(clips.seed, epoch)).shuffle(order)
    keys = [(epoch, position) for position in order]
    return DataLoader(clips, batch_size, sampler=keys, num_workers=workers, collate_fn=collate)


def derive_seed(*parts: int) -> int:
    """Mix whole numbers into one seed."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def report_unreadable(errors: Sequence[str]) -> None:
    """List every video that was left out."""
    distinct = sorted(set(errors))
    if distinct:
        print(f"\n{len(distinct)} unreadable videos were left out:")
        for error in distinct:
            print(f"  {error}")
