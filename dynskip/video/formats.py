"""Annotation formats: one reader each, and `load_items`, which chooses among them."""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import math
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dynskip import metrics
from dynskip.errors import DynskipError
from dynskip.video.annotations import (
    SPLITS,
    Item,
    Segment,
    read_classes,
    read_rows,
    read_text,
    refuse,
    segment_faults,
    segmented,
    split_of,
)
from dynskip.video.lists import read_lists
from dynskip.video.names import VideoFolder, normal
from dynskip.video.opening import open_source
from dynskip.video.source import VideoError, sample_frames

AnnotationReader = Callable[[Path, Sequence[Path], Mapping[int, str]], list[Item]]
"""A function from the folder of the videos, the annotation files and a class list to items, missing videos included."""


def load_items(
    data: Path,
    annotations: Sequence[Path] = (),
    reader: str | AnnotationReader | None = None,
    classes: Path | None = None,
) -> list[Item]:
    """Read a data set, without the videos that are not there.

    Args:
        data: folder of the videos; for a plain CSV, the file or the folder of its `labels.csv`.
        annotations: the annotation files; none for a plain CSV in `data`.
        reader: name of a format in `FORMATS`, or a reader of your own; by default told from the annotation files.
        classes: class list (`index,name`, or a name a line), for annotations that number their labels, or to check
            names.

    Returns:
        The labelled videos that are there. A warning counts the others.

    Raises:
        DynskipError: if something is wrong with the annotations, or a video of a plain CSV is missing.
    """
    items = read_items(data, annotations, reader, classes)
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
    warnings.warn(f"{len(absent)} of {len(items)} annotated videos are not in {data}; they are left out.", stacklevel=2)
    return [item for item in items if item.path.exists()]


def read_items(
    data: Path,
    annotations: Sequence[Path] = (),
    reader: str | AnnotationReader | None = None,
    classes: Path | None = None,
) -> list[Item]:
    """Read a data set as `load_items` does, with the videos that are missing."""
    names = read_classes(classes) if classes else {}
    if not callable(reader):
        forms = {reader or guess_format(file) for file in annotations} or {"csv"}
        if len(forms) > 1:
            raise DynskipError(
                f"The annotation files look like several formats ({', '.join(sorted(forms))}); tell which."
            )
        (form,) = forms
        if form not in FORMATS:
            raise DynskipError(f"There is no format {form!r}; choose one of {', '.join(FORMATS)}, or give a reader.")
        if form != "csv" and not data.is_dir():
            raise DynskipError(f"{data} is no folder. Expected the folder of the videos that the annotations name.")
        reader = FORMATS[form]
    items = [_clean(item) for item in reader(data, annotations, names)]
    check_items(items, set(names.values()))
    return items


def _clean(item: Item) -> Item:
    """Bring labels that read alike to one spelling."""
    labels = tuple(dict.fromkeys(normal(label) for label in item.labels))
    return replace(item, labels=labels, segments=tuple(replace(s, label=normal(s.label)) for s in item.segments))


def check_items(items: Sequence[Item], names: set[str]) -> None:
    """Refuse videos that occur twice, under whatever path, and labels that cannot be right."""
    first: dict[str, Item] = {}
    for item in items:
        if (other := first.setdefault(os.path.realpath(item.path), item)) is not item:
            where = f"in {item.split}" if item.split == other.split else f"in {other.split} and in {item.split}"
            alias = "" if item.path == other.path else f", also as {item.path}"
            raise DynskipError(
                f"{other.path} occurs twice, {where}{alias}. Every video belongs to one split, with one entry."
            )
    labels = sorted({label for item in items for label in item.labels})
    if broken := [
        label for label in labels if not label or any(c in _CONTROLS for c in map(unicodedata.category, label))
    ]:
        raise DynskipError(f"{len(broken)} labels are empty or hold a line break or tab, such as {broken[0]!r}.")
    if unknown := [label for label in labels if label not in names] if names else []:
        close = difflib.get_close_matches(unknown[0], names, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise DynskipError(f"{len(unknown)} labels are not in the class list, such as {unknown[0]!r}.{hint}")


_CONTROLS = ("Cc", "Zl", "Zp")  # what starts a new line or cell in tables and pictures


def guess_format(file: Path) -> str:
    """Tell the format of an annotation file from its beginning."""
    begin = read_text(file)[:1000].lstrip()
    first = begin.partition("\n")[0].strip()
    if begin[:1] in "{[":
        return "activitynet"
    if first.startswith(("video,type", "video-name,")):
        return "thumos"
    return "csv" if {"path", "label", "split"} <= {name.strip(' "') for name in first.split(",")} else "list"


# ----------------------------------------------------------------------------------------------------- the readers


def read_csv(data: Path, annotations: Sequence[Path] = (), names: Mapping[int, str] | None = None) -> list[Item]:
    """Read `path,label,split` rows from a CSV file, or from `labels.csv` in a folder; paths are relative to it.

    A video with several labels has a row for each. One whose label is empty shows none of the classes.
    """
    items: list[Item] = []
    places: dict[tuple[str, str], int] = {}
    for file in annotations or [data / "labels.csv" if data.is_dir() else data]:
        if not file.is_file():
            raise DynskipError(f"{file} does not exist. Expected a folder with a labels.csv, or such a file.")
        folder = VideoFolder(file.parent)
        for number, row in read_rows(file, ["path", "label", "split"]):
            split, label = row["split"].strip(), normal(row["label"])
            if split not in SPLITS:
                raise DynskipError(
                    f"{file}, line {number}: unknown split {split!r}. Expected one of {', '.join(SPLITS)}."
                )
            if not row["path"]:
                raise DynskipError(f"{file}, line {number}: the path must not be empty.")
            path = folder.path(row["path"])
            key = os.path.realpath(path), split
            first = items[places[key]] if key in places else None
            if first is not None and label and first.labels and label not in first.labels:
                items[places[key]] = replace(first, labels=(*first.labels, label))
            else:  # a video that occurs twice is refused later, as in the other formats
                places[key] = len(items)
                items.append(Item(path, (label,) if label else (), split))
    return items


SUBSETS = {
    "training": "train", "train": "train", "validation": "val", "val": "val", "testing": "test", "test": "test",
}  # fmt: skip
KNOWN_KEYS = {
    "subset", "annotations", "duration", "resolution", "url",
    "duration_second", "duration_frame", "feature_frame", "fps",  # in processed copies
}  # fmt: skip


def read_activitynet(data: Path, annotations: Sequence[Path], names: Mapping[int, str]) -> list[Item]:
    """Read ActivityNet-v1.3's JSON, or THUMOS'14 in the same form (segment ends as text, no durations).

    A video's labels are the distinct names of its segments. Videos without any are left out: nothing can be learned
    from them.
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
            if entry["subset"] not in list(SUBSETS):  # a list, because it may be anything, such as not hashable
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
            if unnamed := [s.label for s in segments if not (isinstance(s.label, str) and s.label.strip())]:
                faults.append(f"{name}: label {unnamed[0]!r} is no name")
                continue
            faults += [f"{name}: {fault}" for fault in segment_faults(segments, duration)]
            items += segmented(folder.find(name), SUBSETS[entry["subset"]], segments, duration)
        refuse(
            file,
            faults,
            "Expected JSON whose 'database' gives each video a 'subset' and 'annotations' with a 'label' and a "
            "'segment' within its 'duration', as activity_net.v1-3.min.json.",
        )
    for key, count in sorted(unknown.items()):
        warnings.warn(f"The annotations have an unknown key {key!r} in {count} videos; it is ignored.", stacklevel=2)
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


def read_thumos(data: Path, annotations: Sequence[Path], names: Mapping[int, str]) -> list[Item]:
    """Read THUMOS'14's CSV files: `val_Annotation.csv` (used for training) and the test set's ground truth.

    The latter numbers its classes in alphabetical order, with -1 for segments to be ignored. The names come from the
    other file, or from a class list.
    """
    tables = []
    for file in annotations:
        numbered = read_text(file).startswith("video-name,")
        columns, known = (
            ("video-name t-init t-end video-duration video-frames label-idx", "f-init f-end frame-rate")
            if numbered
            else ("video type start end", "type_idx startFrame endFrame")
        )
        tables.append((file, read_rows(file, columns.split(), known.split())))
    types = {normal(row["type"]) for _, rows in tables for _, row in rows if "type" in row}
    classes = list(names.values()) or sorted(types - {"Ambiguous"})
    videos: dict[str, list[tuple[Segment, float | None, int | None]]] = {}
    faults: list[str] = []
    for file, rows in tables:
        for number, row in rows:
            try:
                if "type" in row:
                    video, label, ends = row["video"], row["type"], (row["start"], row["end"])
                    duration, frames = None, None
                else:
                    video, index, ends = row["video-name"], int(row["label-idx"]), (row["t-init"], row["t-end"])
                    duration, frames = float(row["video-duration"]), int(row["video-frames"])
                    label = "Ambiguous" if index < 0 else classes[index]
                segment = Segment(float(ends[0]), float(ends[1]), label)
                split_of(video)
            except ValueError as error:
                faults.append(f"{file.name}, line {number}: {error}")
                continue
            except IndexError:
                faults.append(f"{file.name}, line {number}: class {row['label-idx']} of {len(classes)} known ones")
                continue
            faults += [f"{file.name}, line {number}: {fault}" for fault in segment_faults([segment], duration)]
            videos.setdefault(video, []).append((segment, duration, frames))
    refuse(
        annotations[0],
        faults,
        "Numbered classes are named by val_Annotation.csv (give both files) or by a class list.",
    )
    folder, items = VideoFolder(data), []
    for video, entries in videos.items():
        split = "test" if split_of(video) == "test" else "train"  # its validation videos are trained on
        items += segmented(folder.find(video), split, [segment for segment, _, _ in entries], *entries[0][1:])
    return items


FORMATS: dict[str, AnnotationReader] = {
    "csv": read_csv,
    "activitynet": read_activitynet,
    "thumos": read_thumos,
    "list": read_lists,
    "list-labels": functools.partial(read_lists, may_have_offsets=False),
}


# ------------------------------------------------------------------------------------------------- relevant frames


def relevant_frames(items: Sequence[Item], num_frames: int, data: Path) -> dict[str, Tensor]:
    """Mark the sampled frames that show an annotated action.

    Segments come with the annotations, in seconds, or from a file `segments.csv` of `path,start,end` beside
    `labels.csv`, in frames from 0; the end is outside.

    Args:
        items: the videos.
        num_frames: frames sampled from each video, `T`.
        data: where `load_items` read them.

    Returns:
        `(T,)` boolean by a video's path, for the videos whose segments are known.

    Raises:
        DynskipError: if `segments.csv` cannot be read.
    """
    file = (data if data.is_dir() else data.parent) / "segments.csv"
    folder, parts = VideoFolder(file.parent), dict[str, list[tuple[float, float]]]()
    for number, row in read_rows(file, ["path", "start", "end"]) if file.is_file() else []:
        try:
            ends = float(row["start"]), float(row["end"])
            if not all(map(math.isfinite, ends)):
                raise ValueError(f"{row['start']} to {row['end']} is not finite")
        except ValueError as error:
            raise DynskipError(f"{file}, line {number}: start and end must be numbers of frames ({error}).") from error
        parts.setdefault(os.path.realpath(folder.path(row["path"])), []).append(ends)
    marks = {}
    for item in items:
        segments, length = [(s.start, s.end) for s in item.segments], item.duration
        if (real := os.path.realpath(item.path)) in parts:
            with contextlib.suppress(VideoError):  # reported where the clip is decoded
                source = open_source(item.path)
                sample_frames(source, 1, 8)  # now its length is the true one
                segments, length = parts[real], float(len(source))
        if segments and length:
            marks[str(item.path)] = metrics.relevant_frames(metrics.sample_times(num_frames, length), segments)
    return marks
