"""Labelled videos as plain values, and the tools that annotation readers share."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynskip.errors import DynskipError
from dynskip.video.names import normal

SPLITS = ("train", "val", "test")


_SPLIT_WORDS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Segment:
    """A part of a video that shows an action, in seconds."""

    start: float
    end: float
    label: str


@dataclass(frozen=True)
class Item:
    """One labelled video.

    Attributes:
        path: a video file, a folder of extracted frames, or a picture.
        labels: its distinct labels, in the order of the annotation; none if it shows none of the classes.
        split: one of `SPLITS`.
        segments: where the labels apply, if the annotation tells.
        duration: seconds, if the annotation tells.
        num_frames: number of frames, if the annotation tells; never relied on.
    """

    path: Path
    labels: tuple[str, ...]
    split: str
    segments: tuple[Segment, ...] = ()
    duration: float | None = None
    num_frames: int | None = None


def pick_split(items: Sequence[Item], split: str) -> list[Item]:
    """Return the items of one split.

    Raises:
        DynskipError: if there are none.
    """
    chosen = [item for item in items if item.split == split]
    if not chosen:
        found = sorted({item.split for item in items})
        raise DynskipError(f"The data has no videos of split {split!r}; it has {', '.join(found) or 'none at all'}.")
    return chosen


def held_out_split(items: Sequence[Item]) -> str | None:
    """Return the split to evaluate on: test, or val where there is no test, or `None`."""
    found = {item.split for item in items}
    return next((split for split in ("test", "val") if split in found), None)


def class_names(items: Sequence[Item], classes: Path | None = None) -> list[str]:
    """Return the names of all classes in the order of their indices.

    Args:
        items: the labelled videos; by default the classes are their labels, sorted.
        classes: a class list, whose order counts.
    """
    if classes is not None:
        return list(read_classes(classes).values())
    labels = {label for item in items for label in item.labels}
    return sorted(labels, key=lambda label: (not label.isdigit(), int(label) if label.isdigit() else 0, label))


def list_videos(items: Sequence[Item], data: Path) -> list[tuple[str, tuple[str, ...], str]]:
    """Return what a run remembers of its data: each video's path within `data`, its labels and its split."""
    root = data if data.is_dir() else data.parent
    return [(Path(os.path.relpath(item.path, root)).as_posix(), item.labels, item.split) for item in items]


def data_changes(before: Sequence[Sequence[Any]], now: Sequence[Sequence[Any]]) -> str:
    """Say how data differ from what they were.

    Args:
        before: what `list_videos` returned then.
        now: what it returns now.

    Returns:
        Which videos were added, are gone or have another label, in brackets; nothing if all is the same.
    """
    old, new = ({path: (*labels, split) for path, labels, split in videos} for videos in (before, now))
    kinds = {
        "added": [path for path in new if path not in old],
        "gone": [path for path in old if path not in new],
        "with another label or split": [
            f"{path} ({', '.join(new[path])}, not {', '.join(old[path])})"
            for path in new
            if new[path] != old.get(path, new[path])
        ],
    }
    found = [
        f"{len(paths)} {kind}: {', '.join(paths[:3])}" + ", ..." * (len(paths) > 3)
        for kind, paths in kinds.items()
        if paths
    ]
    if not found and list(before) != list(now):
        found = ["the same in another order"]
    return f" ({'; '.join(found)})" if found else ""


# ------------------------------------------------------------------------------------------ what readers are made of


def segmented(
    path: Path, split: str, segments: Iterable[Segment], duration: float | None, num_frames: int | None = None
) -> list[Item]:
    """Return one item for a video's segments, or none: "Ambiguous" ones do not count."""
    kept = tuple(segment for segment in segments if segment.label != "Ambiguous")
    labels = tuple(dict.fromkeys(segment.label for segment in kept))
    return [Item(path, labels, split, kept, duration, num_frames)] if kept else []


def segment_faults(segments: Sequence[Segment], duration: float | None) -> list[str]:
    """Say which of a video's segments cannot be right."""
    if duration is not None and not 0 < duration < math.inf:
        return [f"duration {duration:g} is no finite number of seconds above 0"]
    # Annotators mark ends by hand, up to a moment after the last frame.
    last = float("inf") if duration is None else 1.01 * duration + 0.5
    within = "the video" if duration is None else f"0 to {duration:g}"
    return [
        f"segment {s.start:g} to {s.end:g} seconds ({s.label}) does not lie within {within}"
        for s in segments
        if not (0 <= s.start < s.end <= last and s.end < math.inf)
    ]


def split_of(name: str) -> str:
    """Tell the split by a whole word in a name, such as `actnet_train_split.txt`.

    Raises:
        DynskipError: if no word tells it, or words tell several.
    """
    words = [word for word in re.split(r"[\W_]+", name.lower()) if word in _SPLIT_WORDS]
    if len({_SPLIT_WORDS[word] for word in words}) != 1:
        raise DynskipError(
            f"{name} must tell the split by one of the words {', '.join(_SPLIT_WORDS)}, between _, - or dots; it has "
            f"{' and '.join(words) or 'none of them'}. Rename it."
        )
    return _SPLIT_WORDS[words[0]]


def refuse(file: Path, faults: Sequence[str], advice: str) -> None:
    """Raise an error that lists the faults of an annotation file, if there are any."""
    if faults:
        more = f"\n  ... and {len(faults) - 5} more" * (len(faults) > 5)
        raise DynskipError(f"{file} has {len(faults)} faults:\n  " + "\n  ".join(faults[:5]) + f"{more}\n{advice}")


def read_text(file: Path) -> str:
    """Read a text file as it is, or say what is wrong with it."""
    try:
        return file.read_bytes().decode("utf-8-sig")  # spreadsheets put a mark in front
    except FileNotFoundError:
        raise DynskipError(f"{file} does not exist. Give an annotation file or class list that does.") from None
    except IsADirectoryError:
        raise DynskipError(f"{file} is a folder. Give the annotation file or class list itself.") from None
    except UnicodeDecodeError as error:
        raise DynskipError(f"{file} is no text in UTF-8 ({error}). Save it as UTF-8.") from error


def text_lines(file: Path) -> list[tuple[int, str]]:
    """Read a text of one entry a line; return each that is not blank with its number, without spaces around it."""
    # Not `splitlines`, which also splits at characters that names may hold, such as U+2028.
    lines = enumerate(read_text(file).split("\n"), start=1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def read_rows(file: Path, columns: Sequence[str], known: Sequence[str] = ()) -> list[tuple[int, dict[str, str]]]:
    """Read a CSV file that must have these columns; return each row with the number of its line.

    Args:
        file: the file.
        columns: what its first line must name.
        known: further columns that it may have. A warning names any others.

    Raises:
        DynskipError: if a column is missing or named twice, or a row has more fields than there are columns.
    """
    reader = csv.reader(io.StringIO(read_text(file), newline=""), strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        header = [name.strip() for name in next(reader, [])]
        while header and not header[-1]:  # spreadsheets end lines with commas
            header.pop()
        faults = [f"column {name!r} is named {count} times" for name, count in Counter(header).items() if count > 1]
        for fields in reader:
            if any(fields[len(header) :]):
                text = ",".join(fields)[:80]
                faults.append(f"line {reader.line_num}: {len(fields)} fields for {len(header)} columns: {text!r}")
            elif any(fields):
                fields += [""] * (len(header) - len(fields))
                rows.append((reader.line_num, dict(zip(header, fields, strict=False))))
    except csv.Error as error:
        raise DynskipError(
            f"{file} is no CSV text (line {reader.line_num}: {error}). Save it as CSV UTF-8; quotes must be closed."
        ) from error
    if missing := set(columns) - set(header):
        raise DynskipError(
            f"{file} lacks the column {', '.join(sorted(missing))}. Its first line must name "
            f"{', '.join(columns)}; it names {header}."
        )
    refuse(file, faults, "A line has one row, and a field with commas stands in quotes.")
    for name in header:
        if name not in (*columns, *known):
            warnings.warn(f"{file} has an unknown column {name!r}; it is ignored.", stacklevel=2)
    return rows


def read_classes(file: Path) -> dict[int, str]:
    """Read a class list: lines of `index,name` or `index name`, or one name a line, counted from 0."""
    lines = [normal(line) for _, line in text_lines(file)]
    numbered = [re.fullmatch(r"(\d+)(?:\s*[,;]\s*|\s+)(.+)", line) for line in lines]
    pairs = [(int(m[1]), m[2]) for m in numbered if m] if all(numbered) else list(enumerate(lines))
    for values in zip(*pairs, strict=True):
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise DynskipError(f"{file} lists {twice[0]!r} more than once. Every class has one line.")
    if not pairs:
        raise DynskipError(f"{file} is empty. Expected one class a line, as `index,name` or a name alone.")
    return dict(sorted(pairs))
