"""Videos and data sets for the examples: read annotations, decode frames, keep decoded frames, make batches."""

from __future__ import annotations

import contextlib
import csv
import difflib
import hashlib
import json
import os
import random
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torchvision.transforms.v2 as T
from einops import rearrange
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dynskip import DynskipError

# ---------------------------------------------------------------------------------------------------------- videos


class VideoError(DynskipError):
    """A file or folder that gives no frames."""


def read_frames(path: Path, num_frames: int, short_side: int, rng: random.Random | None = None) -> np.ndarray:
    """Decode `num_frames` frames spread evenly over a video.

    Args:
        path: a file that FFmpeg can read, or a folder of pictures whose names end in their numbers.
        num_frames: frames to return; a shorter video repeats some.
        short_side: pixels to scale the shorter side to.
        rng: draw each frame at random from its stretch of the video; by default the middle of the stretch.

    Returns:
        `(T, H, W, 3)` uint8 RGB frames.
    """
    return sample_frames(path, num_frames, short_side, rng)[0]


def sample_frames(
    path: Path, num_frames: int, short_side: int, rng: random.Random | None = None
) -> tuple[np.ndarray, int]:
    """Decode as `read_frames` does, and count all frames of the video."""
    offsets = [rng.random() if rng else 0.5 for _ in range(num_frames)]

    def spread(count: int) -> list[int]:
        return [int(count / num_frames * (i + offset)) for i, offset in enumerate(offsets)]

    if path.is_dir():
        pictures = list_pictures(path)
        kept = {i: _read_picture(pictures[i], short_side) for i in sorted(set(spread(len(pictures))))}
        return _stack(path, [kept[i] for i in spread(len(pictures))]), len(pictures)
    try:
        with OpenVideo(path) as (container, stream):
            # Headers lie and may be missing, so this is only a first guess at the number of frames.
            guess = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        for _ in range(2):
            wanted = set(spread(guess))
            kept = {}
            count = 0
            with OpenVideo(path) as (container, stream):
                for frame in container.decode(stream):
                    if count in wanted:
                        kept[count] = to_array(frame, short_side)
                    count += 1
            if count == guess and count:
                return _stack(path, [kept[i] for i in spread(count)]), count
            guess = count  # the decoder's word is final: pick again
    except av.error.FileNotFoundError:
        raise VideoError(f"{path}: no such file.") from None
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: not a readable video ({error}). Try to play or re-encode it.") from error
    raise VideoError(f"{path}: holds no video frame. Expected a file with at least one picture.")


PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def list_pictures(folder: Path) -> list[Path]:
    """List a folder's extracted frames in order: `image_00001.jpg`, `img_00001.jpg`, `00001.jpg`, ..."""
    numbered: dict[str, dict[int, Path]] = {}
    for file in folder.iterdir():
        match = re.fullmatch(r"(.*?)(\d+)", file.stem)
        if match and file.suffix.lower() in PICTURE_SUFFIXES and not match[1].startswith("flow"):  # TSN's optical flow
            numbered.setdefault(match[1], {})[int(match[2])] = file
    if len(numbered) != 1:
        found = "no pictures" if not numbered else f"pictures of several kinds ({', '.join(sorted(numbered))})"
        raise VideoError(f"{folder}: holds {found}. Expected one video's frames, such as image_00001.jpg.")
    (frames,) = numbered.values()
    return [frames[number] for number in sorted(frames)]


def _read_picture(file: Path, short_side: int) -> np.ndarray:
    try:
        with Image.open(file) as picture:
            scale = short_side / min(picture.size)
            size = tuple(max(round(side * scale), 1) for side in picture.size)
            return np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    except (OSError, ValueError, SyntaxError) as error:  # PIL's word for some damaged files
        raise VideoError(f"{file}: not a readable picture ({error}). Extract this video's frames again.") from error


def _stack(path: Path, frames: list[np.ndarray]) -> np.ndarray:
    if len({frame.shape for frame in frames}) > 1:
        raise VideoError(f"{path}: its frames have different sizes. Extract or encode them in one size.")
    return np.stack(frames)


class OpenVideo:
    """Open the best video stream of a file; `options` are those of `av.open`."""

    def __init__(self, path: Path | str, **options: Any) -> None:
        self.container = av.open(str(path), metadata_errors="ignore", **options)
        stream = self.container.streams.best("video")
        if stream is None or self.container.format.name == "tty":  # FFmpeg plays plain text as a terminal recording
            self.container.close()
            raise VideoError(f"{path}: holds no video stream. Expected a video file such as .mp4, .mkv or .avi.")
        self.stream: Any = stream

    def __enter__(self) -> tuple[Any, Any]:
        return self.container, self.stream

    def __exit__(self, *_: object) -> None:
        self.container.close()


def to_array(frame: Any, short_side: int) -> np.ndarray:
    """Turn a decoded frame into an upright RGB picture `(H, W, 3)`, uint8, whose shorter side has this length."""
    scale = short_side / min(frame.width, frame.height)
    image = frame.reformat(max(round(frame.width * scale), 1), max(round(frame.height * scale), 1), format="rgb24")
    return np.rot90(image.to_ndarray(), round(frame.rotation / 90)).copy()  # phones store how they were held


# ----------------------------------------------------------------------------------------------------- annotations


SPLITS = ("train", "val", "test")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".3gp", ".wmv")


@dataclass(frozen=True)
class Segment:
    """A stretch of a video that shows an action, in seconds."""

    start: float
    end: float
    label: str


@dataclass(frozen=True)
class Item:
    """One labelled video.

    Attributes:
        path: a video file, or a folder of extracted frames.
        labels: its distinct labels; the order is the annotation's.
        split: one of `SPLITS`.
        segments: where the labels apply, if the annotation tells.
        duration: seconds, if the annotation tells.
        num_frames: what the annotation tells; never relied on.
    """

    path: Path
    labels: tuple[str, ...]
    split: str
    segments: tuple[Segment, ...] = ()
    duration: float | None = None
    num_frames: int | None = None


def load_items(
    data: Path, annotations: Sequence[Path] = (), form: str | None = None, classes: Path | None = None
) -> list[Item]:
    """Read a data set, and leave out videos that are not there.

    Args:
        data: folder of the videos or frame folders; for a plain CSV the file, or the folder of its `labels.csv`.
        annotations: the annotation files; none for a plain CSV in `data`.
        form: one of `FORMATS`; by default told from the annotation files.
        classes: class list (`index,name`, or a name a line), for annotations that number their labels, or to check
            names.

    Returns:
        The videos that are there.

    Raises:
        DynskipError: if something is wrong with the annotations, or a video of a plain CSV is missing.
    """
    items = read_items(data, annotations, form, classes)
    absent = [item.path for item in items if not item.path.exists()]
    if not absent:
        return items
    if not annotations:
        raise DynskipError(
            f"{data} names {len(absent)} of {len(items)} videos that do not exist, the first being {absent[0]}. "
            "Paths are relative to the CSV file; correct them or leave these rows out."
        )
    if len(absent) == len(items):
        raise DynskipError(
            f"None of the {len(items)} annotated videos is in {data}; the first would be {absent[0]}. Files or frame "
            "folders are named as in the annotation, with or without v_ in front and a suffix such as .mp4."
        )
    # Web videos disappear, so hardly anybody has all of them.
    print(f"{len(absent)} of {len(items)} annotated videos are not in {data}; they are left out. `prepare` lists them.")
    return [item for item in items if item.path.exists()]


def read_items(
    data: Path, annotations: Sequence[Path] = (), form: str | None = None, classes: Path | None = None
) -> list[Item]:
    """Read a data set as `load_items` does, missing videos included."""
    names = read_classes(classes) if classes else {}
    forms = {form or guess_format(file) for file in annotations} or {"csv"}
    if len(forms) > 1:
        raise DynskipError(f"The annotation files look like several formats ({', '.join(sorted(forms))}); tell which.")
    (form,) = forms
    if form != "csv" and not data.is_dir():
        raise DynskipError(f"{data} is no folder. With --annotations, --data is the folder of the videos.")
    items = FORMATS[form](data, annotations, names)
    check_items(items, set(names.values()))
    return items


def guess_format(file: Path) -> str:
    """Tell the format of an annotation file from its beginning."""
    begin = read_text(file)[:1000].lstrip()
    first = begin.partition("\n")[0].strip()
    if begin[:1] in "{[":
        return "activitynet"
    if first.startswith(("video,type", "video-name,")):
        return "thumos"
    return "csv" if {"path", "label", "split"} <= set(first.split(",")) else "list"


def read_text(file: Path) -> str:
    """Read a text file, or say what is wrong with it."""
    try:
        return file.read_text(encoding="utf-8-sig")  # spreadsheets put a mark in front
    except FileNotFoundError:
        raise DynskipError(f"{file} does not exist. Give an annotation file or class list that does.") from None
    except IsADirectoryError:
        raise DynskipError(f"{file} is a folder. Give the annotation file or class list itself.") from None
    except UnicodeDecodeError as error:
        raise DynskipError(f"{file} is no text in UTF-8 ({error}). Save it as UTF-8.") from error


def read_rows(file: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Read a CSV file that has these columns as numbered lines."""
    try:
        reader = csv.DictReader(read_text(file).splitlines(), restval="")
        header = list(reader.fieldnames or [])
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise DynskipError(f"{file} is no CSV text ({error}). Save it as CSV UTF-8.") from error
    if missing := set(columns) - set(header):
        raise DynskipError(
            f"{file} lacks the column {', '.join(sorted(missing))}. Its first line must name "
            f"{', '.join(columns)}; it names {header}."
        )
    return rows


def refuse(file: Path, faults: Sequence[str], advice: str) -> None:
    """Raise an error that lists what is wrong with an annotation file, if something is."""
    if faults:
        more = f"\n  ... and {len(faults) - 5} more" * (len(faults) > 5)
        raise DynskipError(f"{file} has {len(faults)} faults:\n  " + "\n  ".join(faults[:5]) + f"{more}\n{advice}")


def read_classes(file: Path) -> dict[int, str]:
    """Read a class list: `index,name` or `index name` lines, or a name a line, counted from 0."""
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    numbered = [re.fullmatch(r"(\d+)(?:\s*[,;]\s*|\s+)(.+)", line) for line in lines]
    pairs = [(int(m[1]), m[2]) for m in numbered if m] if all(numbered) else list(enumerate(lines))
    for values in zip(*pairs, strict=True):
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise DynskipError(f"{file} lists {twice[0]!r} more than once. Every class has one line.")
    if not pairs:
        raise DynskipError(f"{file} is empty. Expected one class a line, as `index,name` or a name alone.")
    return dict(sorted(pairs))


class VideoFolder:
    """Finds videos by name: `<name>`, `v_<name>`, with a video suffix or as a folder of frames."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.listed: dict[Path, dict[str, list[Path]]] = {}

    def find(self, name: str) -> Path:
        """Return where a video is, or where it would be."""
        exact = self.root / name
        if exact.exists():
            return exact
        found = self._list(exact.parent).get(self._key(exact.name), [])
        if len(found) > 1:
            raise DynskipError(f"{name!r} could be {found[0]} or {found[1]}. Keep one of them in the folder.")
        return found[0] if found else exact

    def _list(self, folder: Path) -> dict[str, list[Path]]:
        if folder not in self.listed:
            names: dict[str, list[Path]] = {}
            for path in sorted(folder.iterdir()) if folder.is_dir() else []:
                if path.suffix.lower() in VIDEO_SUFFIXES or path.is_dir():
                    stem = path.stem if path.suffix.lower() in VIDEO_SUFFIXES else path.name
                    names.setdefault(self._key(stem), []).append(path)
            self.listed[folder] = names
        return self.listed[folder]

    @staticmethod
    def _key(name: str) -> str:
        return re.sub(r"_\d{6}_\d{6}$", "", name.removeprefix("v_"))  # Kinetics files carry their times


def read_csv(data: Path, annotations: Sequence[Path] = (), names: dict[int, str] | None = None) -> list[Item]:
    """Read `path,label,split` rows from a CSV file, or from `labels.csv` in a folder; paths are relative to it."""
    items = []
    for file in annotations or [data / "labels.csv" if data.is_dir() else data]:
        if not file.is_file():
            raise DynskipError(f"{file} does not exist. --data takes a folder with a labels.csv, or such a file.")
        for number, row in read_rows(file, ["path", "label", "split"]):
            if row["split"] not in SPLITS:
                raise DynskipError(
                    f"{file}, line {number}: unknown split {row['split']!r}. Expected one of {', '.join(SPLITS)}."
                )
            if not row["path"] or not row["label"]:
                raise DynskipError(f"{file}, line {number}: path and label must not be empty.")
            items.append(Item(file.parent / row["path"], (row["label"],), row["split"]))
    return items


SUBSETS = {
    "training": "train", "train": "train", "validation": "val", "val": "val", "testing": "test", "test": "test",
}  # fmt: skip
KNOWN_KEYS = {
    "subset", "annotations", "duration", "resolution", "url",
    "duration_second", "duration_frame", "feature_frame", "fps",  # in processed copies
}  # fmt: skip


def read_activitynet(data: Path, annotations: Sequence[Path], names: dict[int, str]) -> list[Item]:
    """Read ActivityNet-v1.3's JSON, or THUMOS'14 in the same form (segment ends as text, no durations).

    A video's labels are the distinct names of its segments. Videos without any have nothing to learn from and are left
    out, as are "Ambiguous" segments.
    """
    items, folder, unknown = [], VideoFolder(data), Counter[str]()
    for file in annotations:
        faults: list[str] = []
        for name, entry in _database(file).items():
            if not isinstance(entry, dict) or not {"subset", "annotations"} <= set(entry):
                keys = ", ".join(map(repr, entry)) if isinstance(entry, dict) else "no keys"
                faults.append(f"{name}: has {keys}; expected 'subset' and 'annotations'")
                continue
            unknown.update(set(entry) - KNOWN_KEYS)
            if entry["subset"] not in list(SUBSETS):  # it may be anything, and not hashable
                faults.append(f"{name}: unknown subset {entry['subset']!r}; expected one of {', '.join(SUBSETS)}")
                continue
            try:
                duration = entry.get("duration", entry.get("duration_second"))
                duration = None if duration is None else float(duration)
                segments = [
                    Segment(float(a["segment"][0]), float(a["segment"][1]), a["label"]) for a in entry["annotations"]
                ]
            except (KeyError, TypeError, ValueError, IndexError) as error:
                faults.append(f"{name}: its annotations need 'segment' [start, end] and 'label' ({error!r})")
                continue
            if unnamed := [s.label for s in segments if not (s.label and isinstance(s.label, str))]:
                faults.append(f"{name}: label {unnamed[0]!r} is no name")
                continue
            faults += [f"{name}: {fault}" for fault in segment_faults(segments, duration)]
            items += _segmented(folder.find(name), SUBSETS[entry["subset"]], segments, duration)
        refuse(
            file,
            faults,
            "Expected JSON whose 'database' gives each video a 'subset' and 'annotations' with a 'label' and a "
            "'segment' within its 'duration', as activity_net.v1-3.min.json.",
        )
    for key, count in sorted(unknown.items()):
        print(f"The annotations have an unknown key {key!r} in {count} videos; it is ignored.")
    return items


def _database(file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if twice:
            raise DynskipError(f"{file} has {twice[0]!r} more than once. Every video has one entry; merge them.")
        return dict(pairs)

    try:
        database = json.loads(read_text(file), object_pairs_hook=unique)["database"]
        if not isinstance(database, dict):
            raise TypeError(f"'database' is a {type(database).__name__}")
        return database
    except DynskipError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DynskipError(
            f"{file} is no ActivityNet annotation file ({type(error).__name__}: {error}). Expected JSON whose "
            "'database' gives each video a 'subset' and 'annotations', as activity_net.v1-3.min.json."
        ) from error


def _segmented(
    path: Path, split: str, segments: Iterable[Segment], duration: float | None, num_frames: int | None = None
) -> list[Item]:
    """Make one item of a video's segments, or none."""
    kept = tuple(segment for segment in segments if segment.label != "Ambiguous")
    labels = tuple(dict.fromkeys(segment.label for segment in kept))
    return [Item(path, labels, split, kept, duration, num_frames)] if kept else []


def segment_faults(segments: Sequence[Segment], duration: float | None) -> list[str]:
    """Say what is wrong with a video's segments."""
    # Annotated by hand: ends lie up to a moment behind the last frame.
    last = float("inf") if duration is None else 1.01 * duration + 0.5
    return [
        f"segment {s.start:g} to {s.end:g} seconds ({s.label}) does not lie within "
        f"{'the video' if duration is None else f'0 to {duration:g}'}"
        for s in segments
        if not 0 <= s.start < s.end <= last
    ]


def read_thumos(data: Path, annotations: Sequence[Path], names: dict[int, str]) -> list[Item]:
    """Read THUMOS'14's CSV files: `val_Annotation.csv` (used for training) and the test set's ground truth.

    The latter numbers its classes in alphabetical order, with -1 for segments to be ignored; the names come from the
    other file, or from a class list.
    """
    rows: dict[str, list[tuple[Segment, float | None, int | None]]] = {}
    named: list[tuple[Path, int, dict[str, str]]] = []
    numbered: list[tuple[Path, int, dict[str, str]]] = []
    for file in annotations:
        if read_text(file).startswith("video-name,"):
            columns = ["video-name", "t-init", "t-end", "video-duration", "video-frames", "label-idx"]
            numbered += [(file, number, row) for number, row in read_rows(file, columns)]
        else:
            named += [(file, number, row) for number, row in read_rows(file, ["video", "type", "start", "end"])]
    classes = list(names.values()) or sorted({row["type"] for *_, row in named} - {"Ambiguous"})
    faults: list[str] = []
    for file, number, row in named + numbered:
        try:
            if "type" in row:
                video, label, ends = row["video"], row["type"], (row["start"], row["end"])
                duration, frames = None, None
            else:
                video, index, ends = row["video-name"], int(row["label-idx"]), (row["t-init"], row["t-end"])
                duration, frames = float(row["video-duration"]), int(row["video-frames"])
                label = "Ambiguous" if index < 0 else classes[index]
            segment = Segment(float(ends[0]), float(ends[1]), label)
        except ValueError as error:
            faults.append(f"{file.name}, line {number}: {error}")
            continue
        except IndexError:
            faults.append(f"{file.name}, line {number}: class {row['label-idx']} of {len(classes)} known ones")
            continue
        faults += [f"{file.name}, line {number}: {fault}" for fault in segment_faults([segment], duration)]
        rows.setdefault(video, []).append((segment, duration, frames))
    refuse(
        annotations[0],
        faults,
        "Numbered classes are named by val_Annotation.csv (give both files with --annotations) or by --classes FILE.",
    )
    folder, items = VideoFolder(data), []
    for video, entries in rows.items():
        split = "test" if "test" in video else "train"
        segments = [segment for segment, _, _ in entries]
        items += _segmented(folder.find(video), split, segments, *entries[0][1:])
    return items


def read_lists(data: Path, annotations: Sequence[Path], names: dict[int, str]) -> list[Item]:
    """Read `path frames label` lines as TSN, TSM, AR-Net and SoF-Net do; the file's name tells the split.

    Fields are separated by `,` (one label a segment, as ActivityNet's), `;` or spaces, several labels in any form; a
    path may contain spaces. A label is a number from 0, named by the class list where there is one.
    """
    folder, items = VideoFolder(data), []
    for file in annotations:
        splits = [split for split in SPLITS if split in file.name.lower()]
        if len(splits) != 1:
            raise DynskipError(f"{file}: its name must tell the split: one of {', '.join(SPLITS)}. Rename it.")
        faults = []
        for number, line in enumerate(read_text(file).splitlines(), start=1):
            if not line.strip():
                continue
            separator = next((mark for mark in ";," if re.search(rf"{mark}\s*\d+\s*$", line)), " ")
            fields = line.strip().split(separator)
            tail = 0  # fields at the end that are numbers
            while tail < len(fields) - 1 and fields[-1 - tail].strip().isdecimal():
                tail += 1
            if tail < 2:
                faults.append(f"line {number}: {line.strip()[:80]!r}")
                continue
            # A number that ends a path looks like a number of frames: only the disk can tell.
            paths = {n: folder.find(separator.join(fields[:-n]).strip()) for n in range(tail, 1, -1)}
            tail = next((n for n, path in paths.items() if path.exists()), tail)
            num_frames, *labels = map(int, fields[-tail:])
            if missing := [label for label in labels if names and label not in names]:
                faults.append(f"line {number}: label {missing[0]} is not in the class list")
                continue
            texts = tuple(dict.fromkeys(names.get(label, str(label)) for label in labels))
            items.append(Item(paths[tail], texts, splits[0], num_frames=num_frames))
        refuse(
            file,
            faults,
            "Expected `path frames label`: a path, the number of its frames, and class "
            "numbers from 0, separated by one comma, semicolon or space each.",
        )
    return items


FORMATS: dict[str, Callable[[Path, Sequence[Path], dict[int, str]], list[Item]]] = {
    "csv": read_csv,
    "activitynet": read_activitynet,
    "thumos": read_thumos,
    "list": read_lists,
}


def check_items(items: Sequence[Item], names: set[str]) -> None:
    """Refuse videos that occur twice, and labels that the class list does not have."""
    first: dict[Path, Item] = {}
    for item in items:
        if (other := first.setdefault(item.path, item)) is not item:
            where = f"in {item.split}" if item.split == other.split else f"in {other.split} and in {item.split}"
            raise DynskipError(f"{item.path} occurs twice, {where}. Every video belongs to one split, with one entry.")
    unknown = sorted({label for item in items for label in item.labels} - names) if names else []
    if unknown:
        close = difflib.get_close_matches(unknown[0], names, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise DynskipError(f"{len(unknown)} labels are not in the class list, such as {unknown[0]!r}.{hint}")


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


def class_names(items: Sequence[Item], classes: Path | None = None) -> list[str]:
    """All classes; the position is the class index: as in the class list, or else all labels, sorted."""
    if classes is not None:
        return list(read_classes(classes).values())
    labels = {label for item in items for label in item.labels}
    return sorted(labels, key=lambda label: (not label.isdigit(), int(label) if label.isdigit() else 0, label))


# ------------------------------------------------------------------------------------------------ clips and batches


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


CHOICES = 3  # frames kept in memory or cache for each one that the network sees: early, middle and late in its stretch


class FrameCache:
    """Decoded, scaled frames in a folder: one file a video, written whole or not at all, checked when read.

    Args:
        folder: where the files are; made when the first one is written.
        num_frames: frames the network sees; `CHOICES` times as many are kept.
        short_side: pixels of the shorter side.
    """

    def __init__(self, folder: Path, num_frames: int, short_side: int) -> None:
        self.folder, self.num_frames, self.short_side = folder, CHOICES * num_frames, short_side
        self.writable = True

    def file(self, path: Path) -> Path:
        """Return the file that holds a video's frames."""
        key = hashlib.sha256(f"{path.resolve()}|{self.num_frames}|{self.short_side}".encode()).hexdigest()
        return self.folder / f"{key[:32]}.safetensors"

    def read(self, path: Path, picks: Sequence[int]) -> tuple[np.ndarray, int]:
        """Return some of a video's kept frames, and how many frames the video has; decode and keep it if need be.

        Raises:
            VideoError: if the video gives no frames.
        """
        if (kept := self._load(path, picks)) is not None:
            return kept
        frames, count = sample_frames(path, self.num_frames, self.short_side)
        if self.writable:
            self._store(path, frames, count)
        return frames[list(picks)], count

    def _load(self, path: Path, picks: Sequence[int]) -> tuple[np.ndarray, int] | None:
        file = self.file(path)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="np") as content:
                notes = content.metadata()
                if notes["source"] != _stamp(path):
                    return None  # the video was replaced
                kept, sums = content.get_slice("frames"), json.loads(notes["checksums"])
                frames = {pick: np.ascontiguousarray(kept[pick]) for pick in set(picks)}
            if any(zlib.crc32(frame.data) != sums[pick] for pick, frame in frames.items()):
                raise ValueError("its checksum is wrong")
            return np.stack([frames[pick] for pick in picks]), int(notes["count"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
            print(f"{file} is damaged ({error}); {path} is decoded again.", file=sys.stderr)
            return None

    def _store(self, path: Path, frames: np.ndarray, count: int) -> None:
        file = self.file(path)
        part = file.with_suffix(f".{os.getpid()}.part")  # others may write the same entry
        sums = json.dumps([zlib.crc32(frame.data) for frame in frames])
        notes = {"source": _stamp(path), "count": str(count), "checksums": sums}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"frames": frames}, part, notes)
            os.replace(part, file)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            self.writable = False
            print(
                f"Could not write to the cache {self.folder} ({error}). Going on without keeping more; what is there "
                "stays good. Make room for the rest.",
                file=sys.stderr,
            )


def _stamp(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:
        raise VideoError(f"{path}: no such file.") from None
    return f"{stat.st_size} {stat.st_mtime_ns}"


class Clips(Dataset):
    """Videos as `(clip, class index, position)`; an unreadable one as its error message.

    Indexed by `(epoch, position)`, so that what is drawn at random depends on nothing else: not on the number of
    workers or processes, and not on whether training was interrupted. Of a video with several labels, each epoch of
    training draws one: the expected loss is the cross-entropy against all of them with equal weights.
    """

    def __init__(
        self,
        items: Sequence[Item],
        classes: Sequence[str],
        prep: Preprocessing,
        training: bool,
        seed: int,
        cache: Path | None = None,
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
        self.cache = FrameCache(cache, prep.num_frames, prep.short_side) if cache is not None else None

    def load_into_memory(self) -> Clips:
        """Decode everything once and keep it; for sets that fit."""
        self.memory = [self._keep(item.path) for item in tqdm(self.items, "decode", leave=False, disable=None)]
        return self

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int] | str:
        epoch, position = key
        seed = derive_seed(self.seed, epoch, position)
        try:
            frames = self._frames(position, random.Random(seed) if self.training else None)
        except VideoError as error:
            return str(error)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            video = self.prep.crop(frames, self.training)
        labels = self.targets[position]
        draw = derive_seed(seed, len(labels)) % len(labels) if self.training else 0
        return video, labels[draw], position

    def _frames(self, position: int, rng: random.Random | None) -> np.ndarray:
        path, count = self.items[position].path, self.prep.num_frames
        if self.memory is None and self.cache is None:
            return read_frames(path, count, self.prep.short_side, rng)
        picks = [CHOICES * i + (rng.randrange(CHOICES) if rng else CHOICES // 2) for i in range(count)]
        if self.memory is None:
            assert self.cache is not None
            return self.cache.read(path, picks)[0]
        kept = self.memory[position]
        if isinstance(kept, str):
            raise VideoError(kept)
        return kept[picks]

    def _keep(self, path: Path) -> np.ndarray | str:
        count = CHOICES * self.prep.num_frames
        try:
            if self.cache is not None:
                return self.cache.read(path, range(count))[0]
            return read_frames(path, count, self.prep.short_side)
        except VideoError as error:
            return str(error)


@dataclass
class Batch:
    """A batch of clips, and what could not be read."""

    video: Tensor  # (B, T, 3, H, W) uint8
    targets: Tensor  # (B,)
    positions: list[int]
    errors: list[str]

    def pin_memory(self) -> Batch:
        """Move to memory that a GPU copies from faster."""
        return replace(self, video=self.video.pin_memory(), targets=self.targets.pin_memory())


def collate(samples: list[tuple[Tensor, int, int] | str]) -> Batch:
    """Batch what could be read, and pass on what could not."""
    good = [sample for sample in samples if not isinstance(sample, str)]
    return Batch(
        video=torch.stack([video for video, _, _ in good]) if good else torch.empty(0),
        targets=torch.tensor([target for _, target, _ in good], dtype=torch.long),
        positions=[position for _, _, position in good],
        errors=[sample for sample in samples if isinstance(sample, str)],
    )


def batches(
    clips: Clips,
    batch_size: int,
    workers: int,
    epoch: int = 0,
    first_step: int = 0,
    process: int = 0,
    processes: int = 1,
    pin_memory: bool = False,
) -> DataLoader:
    """Load clips in batches: shuffled by seed and epoch for training, in order otherwise.

    Args:
        clips: the videos.
        batch_size: videos a step, all processes together.
        workers: processes that decode.
        epoch: decides on the order and what is drawn.
        first_step: steps to leave out, since they have been done.
        process: which of the processes this is; each one gets its share of every step, which may be empty.
        processes: how many there are.
        pin_memory: whether batches will go to a GPU.
    """
    order = list(range(len(clips)))
    if clips.training:
        random.Random(derive_seed(clips.seed, epoch)).shuffle(order)
    steps = [order[i : i + batch_size] for i in range(0, len(order), batch_size)][first_step:]
    shares = [step[len(step) * process // processes : len(step) * (process + 1) // processes] for step in steps]
    keys = [[(epoch, position) for position in share] for share in shares]
    return DataLoader(clips, batch_sampler=keys, num_workers=workers, collate_fn=collate, pin_memory=pin_memory)


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
