"""Labelled videos as plain values, and the tools that annotation readers share."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynskip.errors import DynskipError
from dynskip.video.files import VIDEO_SUFFIXES

SPLITS = ("train", "val", "test")


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
    # Annotators mark ends by hand, up to a moment after the last frame.
    last = float("inf") if duration is None else 1.01 * duration + 0.5
    within = "the video" if duration is None else f"0 to {duration:g}"
    return [
        f"segment {s.start:g} to {s.end:g} seconds ({s.label}) does not lie within {within}"
        for s in segments
        if not 0 <= s.start < s.end <= last
    ]


def refuse(file: Path, faults: Sequence[str], advice: str) -> None:
    """Raise an error that lists the faults of an annotation file, if there are any."""
    if faults:
        more = f"\n  ... and {len(faults) - 5} more" * (len(faults) > 5)
        raise DynskipError(f"{file} has {len(faults)} faults:\n  " + "\n  ".join(faults[:5]) + f"{more}\n{advice}")


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
    """Read a CSV file that must have these columns; return each row with the number of its line."""
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


def read_classes(file: Path) -> dict[int, str]:
    """Read a class list: lines of `index,name` or `index name`, or one name a line, counted from 0."""
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
    """Finds the videos of a folder by name: `NAME` or `v_NAME`, with a video suffix or as a folder of frames."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._listed: dict[Path, dict[str, list[Path]]] = {}

    def find(self, name: str) -> Path:
        """Return where a video is, or where it would be.

        Raises:
            DynskipError: if two files could be meant.
        """
        exact = self.root / name
        if exact.exists():
            return exact
        found = self._list(exact.parent).get(self._key(exact.name), [])
        if len(found) > 1:
            raise DynskipError(f"{name!r} could be {found[0]} or {found[1]}. Keep one of them in the folder.")
        return found[0] if found else exact

    def _list(self, folder: Path) -> dict[str, list[Path]]:
        if folder not in self._listed:
            names: dict[str, list[Path]] = {}
            for path in sorted(folder.iterdir()) if folder.is_dir() else []:
                if path.suffix.lower() in VIDEO_SUFFIXES or path.is_dir():
                    stem = path.stem if path.suffix.lower() in VIDEO_SUFFIXES else path.name
                    names.setdefault(self._key(stem), []).append(path)
            self._listed[folder] = names
        return self._listed[folder]

    @staticmethod
    def _key(name: str) -> str:
        return re.sub(r"_\d{6}_\d{6}$", "", name.removeprefix("v_"))  # names of Kinetics files end in their times
