"""Lists of `path frames label` lines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dynskip.errors import DynskipError
from dynskip.video.annotations import Item, refuse, split_of, text_lines
from dynskip.video.names import VideoFolder
from dynskip.video.opening import open_source
from dynskip.video.source import VideoError


def read_lists(
    data: Path, annotations: Sequence[Path], names: Mapping[int, str], may_have_offsets: bool = True
) -> list[Item]:
    """Read `path frames label` lines as TSN, TSM, AR-Net and SoF-Net do; the file's name tells the split.

    Fields are separated by commas, semicolons or spaces. A path may contain spaces, and a line may have several labels.
    A label is a number from 0, named by the class list where there is one. Where a path ends in a number, the disk
    tells which number that is.

    Args:
        data: folder of the videos.
        annotations: the lists.
        names: the class list.
        may_have_offsets: refuse a list that may be one of `folder start count label`.

    Raises:
        DynskipError: if lines are no such lines, or can be read in two ways.
    """
    folder, items = VideoFolder(data), []
    for file in annotations:
        split, faults = split_of(file.name), []
        like_offsets: list[str] | None = (
            [] if may_have_offsets else None
        )  # lines that may be `folder start count label`
        for number, line in text_lines(file):
            separator = next((mark for mark in ";," if re.search(rf"{mark}\s*\d+$", line)), " ")
            fields = line.split(separator)
            tail = 0  # fields at the end that are numbers
            while tail < len(fields) - 1 and fields[-1 - tail].strip().isdecimal():
                tail += 1
            paths = {n: folder.find(separator.join(fields[:-n]).strip()) for n in range(tail, 1, -1)}
            there = [n for n, path in paths.items() if path.exists()]
            if len(there) > 1:
                meant = " or ".join(str(paths[n]) for n in there)
                faults.append(f"line {number}: {line[:80]!r} can mean {meant}; separate its fields by commas")
                continue
            if tail < 2 or (not there and folder.find(separator.join(fields[:-1]).strip()).exists()):
                faults.append(f"line {number}: {line[:80]!r} has fewer than two numbers after the path")
                continue
            numbers = there[0] if there else tail
            path = paths[numbers]
            num_frames, *labels = map(int, fields[-numbers:])
            if like_offsets is not None and len(labels) == 2 and (not there or _holds(path, num_frames, labels[0])):
                like_offsets += [line] * bool(there)
            else:  # all lines of such a list are of that form
                like_offsets = None
            if missing := [label for label in labels if names and label not in names]:
                faults.append(f"line {number}: label {missing[0]} is not in the class list")
                continue
            texts = tuple(dict.fromkeys(names.get(label, str(label)) for label in labels))
            items.append(Item(path, texts, split, num_frames=num_frames))
        if like_offsets:
            raise DynskipError(
                f"{file} can be read in two ways. {like_offsets[0]!r} is either `path frames label label`: then give "
                "the format as list-labels. Or it is `folder start count label`: such lists are not read. Give each "
                "clip a folder of its own (links to the pictures will do), and list `folder count label`."
            )
        refuse(
            file,
            faults,
            "Expected `path frames label`: a path, the number of its frames, and class numbers from 0, separated by "
            "one comma, semicolon or space each.",
        )
    return items


def _holds(folder: Path, start: int, count: int) -> bool:
    """Whether a folder has so many pictures from a number on; pictures are numbered from 0 or 1."""
    try:
        return folder.is_dir() and 0 < count <= len(open_source(folder)) + 1 - start
    except VideoError:
        return False
