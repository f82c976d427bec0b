"""Annotation formats, class lists and relevant frames. Files are made up after the real ones' first lines."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dynskip import DynskipError

for needed in ("av", "PIL", "safetensors", "tqdm"):
    pytest.importorskip(needed)

from dynskip.video import (  # noqa: E402
    Item,
    Segment,
    class_names,
    data_changes,
    held_out_split,
    list_videos,
    load_items,
    pick_split,
    read_items,
)
from dynskip.video.annotations import read_classes  # noqa: E402
from dynskip.video.formats import relevant_frames  # noqa: E402
from dynskip.video.stick_figures import write_video  # noqa: E402


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"video")
    return path


def write(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def write_json(file: Path, database: Any) -> Path:
    return write(file, json.dumps({"database": database, "taxonomy": [], "version": "VERSION 1.3"}))


def entry(subset: Any, *segments: tuple[Any, Any, Any], **more: Any) -> dict[str, Any]:
    annotations = [{"segment": [start, end], "label": label} for start, end, label in segments]
    return {"subset": subset, "annotations": annotations, **more}


# ---------------------------------------------------------------------------------------------------------- plain CSV


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.csv", '\ufeffpath,label,split\r\na.mp4,"a, b",train\r\nb.mp4,c,val\r\n')
    wanted = [Item(touch(tmp_path / "a.mp4"), ("a, b",), "train"), Item(touch(tmp_path / "b.mp4"), ("c",), "val")]
    assert load_items(file) == load_items(tmp_path / "elsewhere", [file]) == wanted
    assert load_items(file.rename(tmp_path / "labels.csv").parent) == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"labels\.csv does not exist\. Expected a folder with a labels\.csv, or such a file"),
        ("", r"lacks the column label, path, split"),
        (
            "path,label,split\na.mp4,kick,train\na.mp4,jump, rope,train,b.mp4,kick,test\n",
            r"has 1 faults:\n  line 3: 7 fields for 3 columns: 'a\.mp4,jump, rope,train,b.*\nA line has one row",
        ),
        ("path,label,label,split\na.mp4,kick,jump,train\n", r"column 'label' is named 2 times"),
        ('path,label,split\na.mp4,"kick,train\nb.mp4,kick,test\n', r"is no CSV text \(line 3: .*quotes must be closed"),
        ('path,label,split\na.mp4,"jump\nrope",train\n', r"labels are empty or hold a line break .* 'jump\\nrope'"),
        ("path,label,split\na.mp4,jump\u2028rope,train\n", r"hold a line break or tab, such as 'jump\\u2028rope'"),
        ("path,label\na.mp4,kick\n", r"lacks the column split\. Its first line must name path, label, split; it names"),
        ("path,label,split\na.mp4,kick,training\n", r"line 2: unknown split 'training'\. Expected one of train, val"),
        ("path,label,split\na.mp4,kick,train\na.mp4,kick\n", r"line 3: unknown split ''"),
        ("path,label,split\na.mp4,kick,train\na.mp4,,train\n", r"a\.mp4 occurs twice, in train\. Every video"),
        ("path,label,split\n,kick,train\n", r"line 2: the path must not be empty"),
        (
            "path,label,split\na.mp4,kick,train\ngone.mp4,kick,test\n",
            r"names 1 of 2 videos that do not exist, the first being .*gone\.mp4\. Paths are relative to the CSV",
        ),
        ("path,label,split\na.mp4,kick,train\na.mp4,kick,train\n", r"a\.mp4 occurs twice, in train\. Every video"),
        ("path,label,split\na.mp4,kick,train\na.mp4,kick,test\n", r"a\.mp4 occurs twice, in train and in test"),
        (b"path,label,split\na.mp4,\xe9l\xe9ment,train\n", r"labels\.csv.*UTF-8"),
        (f'path,label,split\n"{"x" * 200_000}",a,train\n', r"labels\.csv is no CSV text"),
    ],
)
def test_faults_of_a_csv_are_named(content: str | bytes | None, message: str, tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4")
    if content is not None:
        write(tmp_path / "labels.csv", content)
    with pytest.raises(DynskipError, match=message):
        load_items(tmp_path)


ODD_NAMES = ("one\u2028two.mp4", "a\x85b.mp4", "line\nbreak.mp4", "form\x0cfeed.mp4", "a\rb.mp4", "10:30.mp4", " a.mp4")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_names_with_odd_characters_are_whole(end: str, tmp_path: Path) -> None:
    rows = [f'"{touch(tmp_path / name).name}",kick,train{end}' for name in ODD_NAMES]
    write(tmp_path / "labels.csv", f"path,label,split{end}" + "".join(rows))
    assert [item.path.name for item in load_items(tmp_path)] == list(ODD_NAMES)
    # A list has one entry a line.
    listed = [name for name in ODD_NAMES[:-1] if "\n" not in name]
    file = write(tmp_path / "train.txt", "".join(f"{name} 60 1{end}" for name in listed))
    assert [item.path.name for item in load_items(tmp_path, [file])] == listed
    classes = write(tmp_path / "classes.txt", f"jump\u2028rope{end}kick{end}")
    assert read_classes(classes) == {0: "jump\u2028rope", 1: "kick"}


def test_unknown_columns_of_a_csv_are_named(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4")
    write(tmp_path / "labels.csv", "path, label ,split,lable,,\na.mp4, kick , train,jump,,\n,,,,,\n")
    with pytest.warns(UserWarning, match=r"labels\.csv has an unknown column 'lable'; it is ignored"):
        assert load_items(tmp_path) == [Item(tmp_path / "a.mp4", ("kick",), "train")]


def test_labels_that_read_alike_are_one_class(tmp_path: Path) -> None:
    labels = ["jump", "jump ", "caf\u00e9", "cafe\u0301", "Jump"]
    rows = [f"{touch(tmp_path / f'{i}.mp4').name},{label},train\n" for i, label in enumerate(labels)]
    write(tmp_path / "labels.csv", "path,label,split\n" + "".join(rows) + "0.mp4,jump\u00a0,train\n1.mp4,up,train\n")
    with pytest.raises(DynskipError, match="occurs twice"):  # the same row twice
        load_items(tmp_path)
    write(tmp_path / "labels.csv", "path,label,split\n" + "".join(rows) + "1.mp4,up,train\n")
    items = load_items(tmp_path, classes=write(tmp_path / "classes.txt", "jump\nJump\ncafe\u0301 \nup\n"))
    wanted = [("jump",), ("jump", "up"), ("caf\u00e9",), ("caf\u00e9",), ("Jump",)]
    assert [item.labels for item in items] == wanted
    file = write_json(tmp_path / "anet.json", {"0": entry("train", (0, 1, "jump "), (1, 2, "jump"))})
    (item,) = load_items(tmp_path, [file])
    assert item.labels == ("jump",)
    assert {segment.label for segment in item.segments} == {"jump"}


@pytest.mark.parametrize("other", ["../here/a.mp4", "./a.mp4", "link.mp4", "more/a.mp4", "{root}/a.mp4"])
def test_one_video_under_two_names_is_one_video(other: str, tmp_path: Path) -> None:
    root = tmp_path / "here"
    touch(root / "a.mp4")
    (root / "link.mp4").symlink_to("a.mp4")
    (root / "more").symlink_to(root, target_is_directory=True)
    second = other.format(root=root)
    write(root / "labels.csv", f"path,label,split\na.mp4,kick,train\n{second},jump,test\n")
    with pytest.raises(DynskipError, match=r"a\.mp4 occurs twice, in train and in test"):
        load_items(root)
    write(root / "labels.csv", f"path,label,split\na.mp4,kick,train\n{second},jump,train\n")
    assert load_items(root) == [Item(root / "a.mp4", ("kick", "jump"), "train")]


def test_splits() -> None:
    items = [Item(Path(split), ("a",), split) for split in ("train", "val", "train")]
    assert pick_split(items, "train") == items[::2]
    assert [held_out_split(items), held_out_split(items[::2])] == ["val", None]
    assert held_out_split([*items, Item(Path(), ("a",), "test")]) == "test"
    with pytest.raises(DynskipError, match=r"no videos of split 'test'; it has train, val"):
        pick_split(items, "test")
    with pytest.raises(DynskipError, match=r"no videos of split 'test'; it has none at all"):
        pick_split([], "test")


# -------------------------------------------------------------------------------------------------------- ActivityNet


def test_activitynet_keeps_segments_and_finds_files_and_folders(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    folder = videos / "v_b"
    folder.mkdir(parents=True)
    touch(videos / "v_-a.mkv"), touch(videos / "c.mp4"), touch(videos / "hidden.mp4")
    file = write_json(
        tmp_path / "anet.json",
        {
            "-a": entry("training", (1.5, 9, "Polo"), (10, 20.2, "Archery"), (30, 31, "Polo"), duration=31.0, rating=5),
            "b": entry("validation", (0, 4, "Polo"), duration=8),
            "v_c": entry("validation", (5, 10.3, "Polo"), duration_second=10),  # ends a moment after the video: usual
            "gone": entry("validation", (0, 4, "Polo"), duration=8),
            "hidden": entry("testing", duration=8),  # without a label there is nothing to learn
        },
    )
    with pytest.warns(UserWarning, match="annota") as warned:
        items = load_items(videos, [file])
    segments = (Segment(1.5, 9, "Polo"), Segment(10, 20.2, "Archery"), Segment(30, 31, "Polo"))
    assert items == [
        Item(videos / "v_-a.mkv", ("Polo", "Archery"), "train", segments, 31.0),
        Item(folder, ("Polo",), "val", (Segment(0, 4, "Polo"),), 8),
        Item(videos / "c.mp4", ("Polo",), "val", (Segment(5, 10.3, "Polo"),), 10),
    ]
    first, second = (str(warning.message) for warning in warned)
    assert "unknown key 'rating' in 1 videos; it is ignored" in first
    assert re.search(r"1 of 4 annotated videos are not in .*; they are left out", second)
    with pytest.warns(UserWarning, match="rating"):
        assert len(read_items(videos, [file])) == 4


@pytest.mark.parametrize(
    ("database", "message"),
    [
        ({"a": entry("train1", (0, 1, "x"))}, "a: unknown subset 'train1'; expected one of training, train"),
        ({"a": entry(["training"])}, "a: unknown subset ['training']; expected one of"),
        ({"a": {"subset": "training", "anotations": []}}, "a: has 'subset', 'anotations'; expected 'subset' and 'anno"),
        ({"a": 3}, "has 1 faults:\n  a: has no keys; expected 'subset' and 'annotations'"),
        (
            {"a": entry("training", (5, 12, "x"), duration=10)},
            "segment 5 to 12 seconds (x) does not lie within 0 to",
        ),
        ({"a": entry("training", (-1, 2, "x"))}, "segment -1 to 2 seconds (x) does not lie within the video"),
        ({"a": entry("training", (3, 2, "x"), duration=10)}, "segment 3 to 2 seconds (x)"),
        ({"a": entry("training", (0, float("inf"), "x"))}, "segment 0 to inf seconds (x) does not lie within"),
        (
            {"a": entry("training", (0, 1, "x"), duration=float("inf"))},
            "a: duration inf is no finite number of seconds",
        ),
        (
            {"a": entry("training", (0, 1, "x"), duration=float("nan"))},
            "a: duration nan is no finite number of seconds",
        ),
        ({"a": entry("training", (0, 1, "x"), duration=-1)}, "a: duration -1 is no finite number of seconds above 0"),
        ({"a": entry("training", (0, 1, " "))}, "a: label ' ' is no name"),
        ({"a": entry("training", ("one", 2, "x"))}, "a: its annotations need 'segment' [start, end] and 'label'"),
        ({"a": {"subset": "train", "annotations": [{"segment": [1, 2]}]}}, "and 'label' (KeyError('label'))"),
        ({"a": entry("training", (0, 1, None))}, "a: label None is no name"),
        ({"a": entry("training", (0, 1, ""))}, "a: label '' is no name"),
        ({"a": entry("training", (0, 1, ["x"]))}, "a: label ['x'] is no name"),
        ({"a": entry("training", (0, 1, "x")), "v_a": entry("validation", (0, 1, "x"))}, "occurs twice, in train and"),
        ({str(i): entry("nowhere") for i in range(9)}, "has 9 faults"),
        ({str(i): entry("nowhere") for i in range(9)}, "... and 4 more"),
        ({"gone": entry("training", (0, 1, "x"))}, "None of the 1 annotated videos is in"),
        ({"two": entry("training", (0, 1, "x"))}, "'two' could be "),
        ([], "is no ActivityNet annotation file (TypeError: 'database' is a list). Expected JSON whose"),
        ("{", "is no ActivityNet annotation file (JSONDecodeError: "),
        ('{"videos": {}}', "is no ActivityNet annotation file (KeyError: 'database'). Expected JSON whose 'database'"),
        ("[1]", "is no ActivityNet annotation file"),
        ('{"database": {"a": 1, "a": 2}}', "anet.json has 'a' more than once. Every video has one entry; merge them."),
        (None, "anet.json does not exist. Give an annotation file"),
    ],
)
def test_faults_of_activitynet_are_named(database: Any, message: str, tmp_path: Path) -> None:
    for name in ("a.mp4", "two.mkv", "v_two.mp4"):
        touch(tmp_path / name)
    file = tmp_path / "anet.json"
    if isinstance(database, str):
        write(file, database)
    elif database is not None:
        write_json(file, database)
    with pytest.raises(DynskipError, match=re.escape(message)):
        load_items(tmp_path, [file])


# ------------------------------------------------------------------------------------------------------------- THUMOS


def test_thumos_json_has_text_for_times_and_no_durations(tmp_path: Path) -> None:
    touch(tmp_path / "video_test_0000896.mp4"), touch(tmp_path / "video_validation_0000051.mp4")
    database = {
        "video_test_0000896": entry("test", ("18.6", "24.8", "HighJump"), ("30", "31", "Ambiguous")),
        "video_validation_0000051": entry("train", ("67.5", "75.9", "Billiards"), ("1.0", "2.0", "Diving")),
    }
    test, train = load_items(tmp_path, [write_json(tmp_path / "thumos_gt.json", database)])
    assert test == Item(tmp_path / "video_test_0000896.mp4", ("HighJump",), "test", (Segment(18.6, 24.8, "HighJump"),))
    assert (train.labels, train.split) == (("Billiards", "Diving"), "train")


THUMOS_NAMED = """video,type,type_idx,start,end,startFrame,endFrame
video_validation_0000051,Billiards,12,67.5,75.9,2025,2277
video_validation_0000051,Billiards,12,80,81,2400,2430
video_validation_0000052,Archery,7,1.0,2.5,30,75
video_validation_0000053,Ambiguous,102,1.0,2.5,30,75
"""
THUMOS_NUMBERED = """video-name,t-init,t-end,f-init,f-end,video-duration,frame-rate,video-frames,label-idx
video_test_0000278,0.0,1.4,0,42,215.166667,30.0,6455,-1
video_test_0000324,49.2,53.5,1476,1605,149.0,30.0,4470,0
video_test_0000324,60,61,1800,1830,149.0,30.0,4470,1
"""


def test_thumos_csv_files_name_one_anothers_classes(tmp_path: Path) -> None:
    for number in ("validation_0000051", "validation_0000052", "validation_0000053", "test_0000278", "test_0000324"):
        touch(tmp_path / f"video_{number}.mp4")
    named = write(tmp_path / "val_Annotation.csv", THUMOS_NAMED)
    numbered = write(tmp_path / "groundtruth.csv", THUMOS_NUMBERED)
    billiards, archery, test = load_items(tmp_path, [named, numbered])
    assert (billiards.labels, len(billiards.segments), billiards.split) == (("Billiards",), 2, "train")
    assert archery.labels == ("Archery",)
    assert (test.labels, test.split, test.duration, test.num_frames) == (("Archery", "Billiards"), "test", 149.0, 4470)
    with pytest.raises(DynskipError, match=r"groundtruth\.csv, line 3: class 0 of 0 known ones(.|\n)*give both files"):
        load_items(tmp_path, [numbered])
    assert load_items(tmp_path, [numbered], classes=write(tmp_path / "classes.txt", "Archery\nBilliards\n")) == [test]
    numbered.write_text(THUMOS_NUMBERED.replace("149.0", "inf"))
    with pytest.raises(DynskipError, match=r"line 3: duration inf is no finite number"):
        load_items(tmp_path, [named, numbered])
    numbered.write_text(THUMOS_NUMBERED.replace("video_test_", "video_contest_"))
    with pytest.raises(DynskipError, match=r"line 2: video_contest_0000278 must tell the split by one of the words"):
        load_items(tmp_path, [named, numbered])
    numbered.write_text(THUMOS_NUMBERED.replace("60,61", "60,261"))
    with pytest.raises(DynskipError, match=r"line 4: segment 60 to 261 seconds \(Billiards\) does not lie within 0 to"):
        load_items(tmp_path, [named, numbered])
    numbered.write_text(THUMOS_NUMBERED.replace("60,61", "sixty,61"))
    with pytest.raises(DynskipError, match=r"groundtruth\.csv, line 4: could not convert"):
        load_items(tmp_path, [named, numbered])


# --------------------------------------------------------------------------------------------------------- list files

LINES = {
    "comma, a label a segment": ("PLek2e8NlKc,5531,82,82", "PLek2e8NlKc", 5531, ("82",)),
    "comma, several labels": ("PLek2e8NlKc,5531,82,7,82", "PLek2e8NlKc", 5531, ("82", "7")),
    "v_ in the list": ("v_sJFgo9H6zNo 4169 33", "v_sJFgo9H6zNo", 4169, ("33",)),
    "v_ on the disk": ("sJFgo9H6zNo 4169 33", "v_sJFgo9H6zNo", 4169, ("33",)),
    "starts with a dash": ("-tcD0doI-vo 142 0", "-tcD0doI-vo", 142, ("0",)),
    "several labels and spaces": ("v_a 300 5 6", "v_a", 300, ("5", "6")),
    "spaces in the path": ("val/air drumming/7L 1_000000_000010 6 0", "val/air drumming/7L 1_000000_000010", 6, ("0",)),
    "Kinetics' times on the disk": ("7LSJ2Ryv1a8 299 0", "7LSJ2Ryv1a8_000000_000010", 299, ("0",)),
    "semicolon": ("val/air drumming/x;60;3", "val/air drumming/x", 60, ("3",)),
    "number for a path": ("34870 37 24", "34870", 37, ("24",)),
    "number at the end of a path": ("walk/clip 3 60 5", "walk/clip 3", 60, ("5",)),
    "comma in the path": ("walk, run/x 60 5", "walk, run/x", 60, ("5",)),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
@pytest.mark.parametrize("kind", ["folder", ".mp4"])
def test_lists_are_split_from_the_right(case: str, kind: str, tmp_path: Path) -> None:
    line, path, frames, labels = LINES[case]
    expected = tmp_path / path
    if kind == "folder":
        expected.mkdir(parents=True)
    else:
        expected = touch(tmp_path / f"{path}{kind}")
    file = write(tmp_path / "some_train_split.txt", f"{line}\n\n")
    assert load_items(tmp_path, [file]) == [Item(expected, labels, "train", num_frames=frames)]


def test_missing_videos_of_lists_are_read_as_far_as_can_be_told(tmp_path: Path) -> None:
    file = write(tmp_path / "actnet_val_split.txt", "gone,5531,82,7\nvery/long way/gone 60 5\n")
    assert read_items(tmp_path, [file]) == [
        Item(tmp_path / "gone", ("82", "7"), "val", num_frames=5531),
        Item(tmp_path / "very/long way/gone", ("5",), "val", num_frames=60),
    ]


def test_lists_of_several_splits_and_a_class_list(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    files = [write(tmp_path / "x_train.txt", "a,60,1,1\n"), write(tmp_path / "x_val.txt", "b,60,0\n")]
    first, second = load_items(tmp_path, files, classes=write(tmp_path / "classInd.txt", "0,zero\n1,one\n"))
    assert (first.path.name, first.labels, first.split) == ("a", ("one",), "train")
    assert (second.path.name, second.labels, second.split) == ("b", ("zero",), "val")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("latest_train.txt", "train"),
        ("Contest-Training.v2.txt", "train"),
        ("interval_val.txt", "val"),
        ("trains.valid.txt", "val"),
        ("val_validation.txt", "val"),
        ("train2_testing.txt", "test"),
    ],
)
def test_whole_words_of_a_lists_name_tell_the_split(name: str, split: str, tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4")
    (item,) = load_items(tmp_path, [write(tmp_path / name, "a 60 1\n")])
    assert item.split == split


def frame_folder(folder: Path, count: int) -> Path:
    for number in range(1, count + 1):
        touch(folder / f"img_{number:05}.jpg")
    return folder


def test_lists_with_offsets_are_refused_with_both_readings(tmp_path: Path) -> None:
    frame_folder(tmp_path / "test_imgs", 11), frame_folder(tmp_path / "other", 11)
    file = write(tmp_path / "train.txt", "test_imgs 2 5 127\nother 0 9 3\ngone 4 6 3\n")
    both = r"two ways\. 'test_imgs 2 5 127' is either `path frames label label`.*list-labels\. Or .*`folder start count"
    with pytest.raises(DynskipError, match=both):
        load_items(tmp_path, [file])
    with pytest.warns(UserWarning, match="1 of 3 annotated"):
        items = load_items(tmp_path, [file], "list-labels")
    assert [(item.num_frames, item.labels) for item in items] == [(2, ("5", "127")), (0, ("9", "3"))]


@pytest.mark.parametrize(
    "lines",
    [
        "a 11 5 7\nb 11 7 5\n",  # pictures from number 11 on, where 11 are
        "a 2 5 7\nb 11 5\n",  # not three numbers in every line
        "a 2 5 7\nb 11 5 6 7\n",
        "a 2 5 7\nfile 2 5 7\n",  # no folder
        "a 2 11 7\nb 2 5 7\n",  # more pictures than there are
        "a 2 5 7\ngone 20 5\n",
    ],
)
@pytest.mark.filterwarnings("ignore:1 of 2 annotated")
def test_lists_with_two_labels_are_told_from_lists_with_offsets(lines: str, tmp_path: Path) -> None:
    frame_folder(tmp_path / "a", 11), frame_folder(tmp_path / "b", 11), touch(tmp_path / "file.mp4")
    items = load_items(tmp_path, [write(tmp_path / "train.txt", lines)])
    assert len(items[0].labels) == 2


@pytest.mark.parametrize(
    ("name", "content", "classes", "message"),
    [
        ("train.txt", "a 60\n", None, "has 1 faults:\n  line 1: 'a 60' has fewer than two numbers after the"),
        ("train.txt", "a 60 5\nb 60 kick\n", None, "line 2: 'b 60 kick'"),
        ("train.txt", "a  60  5\n", None, "separated by one comma, semicolon or space each."),
        ("train.txt", "a 60 2\n", "0,x\n1,y\n", "line 1: label 2 is not in the class list"),
        ("train.txt", "a 60 1\na 60 1\n", None, "occurs twice, in train. Every video belongs to one split"),
        ("contest.txt", "a 60 1\n", None, "contest.txt must tell the split by one of the words train, training, val"),
        ("interval_list.txt", "a 60 1\n", None, "between _, - or dots; it has none of them. Rename it."),
        ("trainval.txt", "a 60 1\n", None, "it has none of them"),
        ("train-val.txt", "a 60 1\n", None, "it has train and val. Rename it."),
        ("train.txt", "clip 3 60\n", None, "line 1: 'clip 3 60' has fewer than two numbers after the path"),
        ("train.txt", "both 3 60 5\n", None, "line 1: 'both 3 60 5' can mean "),
        ("train.txt", "a 60 1\n", "0,x\n0,y\n", "lists 0 more than once"),
        ("train.txt", "a 60 1\n", "x\ny\nx\n", "lists 'x' more than once"),
        ("train.txt", "a 60 1\n", "", "is empty. Expected one class a line"),
        ("train.txt", b"\xff\xfe a 60 1\n", None, "is no text in UTF-8"),
    ],
)
def test_faults_of_lists_are_named(
    name: str, content: str | bytes, classes: str | None, message: str, tmp_path: Path
) -> None:
    for folder in ("a", "clip 3", "both", "both 3"):
        (tmp_path / folder).mkdir()
    listed = write(tmp_path / "classes.txt", classes) if classes is not None else None
    with pytest.raises(DynskipError, match=re.escape(message)):
        load_items(tmp_path, [write(tmp_path / name, content)], classes=listed)


# --------------------------------------------------------------------------------------------- what a run remembers


def test_data_are_compared_by_path_label_and_split(tmp_path: Path) -> None:
    names = [f"{i}.mp4" for i in range(5)] + ["one\u2028two.mp4", os.fsdecode(b"caf\xe9.mp4")]
    items = [Item(tmp_path / name, ("a",), "train") for name in names]
    torch.save(list_videos(items, tmp_path / "labels.csv"), tmp_path / "last.pt")  # as a checkpoint keeps it
    before = torch.load(tmp_path / "last.pt", weights_only=True)
    moved = [replace(item, path=tmp_path / "x" / ".." / item.path.name) for item in items]
    assert data_changes(before, list_videos(moved, tmp_path)) == ""
    assert data_changes(before, list_videos(items[::-1], tmp_path)) == " (the same in another order)"
    other = [*items[4:], Item(tmp_path / "new.mp4", (), "train")]
    other[0] = replace(other[0], labels=("a", "b"), split="test")
    assert data_changes(before, list_videos(other, tmp_path)) == (
        " (1 added: new.mp4; 4 gone: 0.mp4, 1.mp4, 2.mp4, ...; "
        "1 with another label or split: 4.mp4 (a, b, test, not a, train))"
    )


# ------------------------------------------------------------------------------------------- class lists and readers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0,Applying sunscreen\n1,Archery\n", {0: "Applying sunscreen", 1: "Archery"}),
        ("1 ApplyEyeMakeup\n2 ApplyLipstick\n", {1: "ApplyEyeMakeup", 2: "ApplyLipstick"}),
        ("air drumming\nyoga\n", {0: "air drumming", 1: "yoga"}),
        ("2,b\n0,a, or so\n", {0: "a, or so", 2: "b"}),
    ],
)
def test_class_lists(text: str, expected: dict[int, str], tmp_path: Path) -> None:
    file = write(tmp_path / "classInd.txt", text)
    assert read_classes(file) == expected
    assert class_names([], file) == list(expected.values())


def test_classes_without_a_list_are_sorted_numbers_first() -> None:
    items = [Item(Path(), labels, "train") for labels in (("10", "9"), ("2",), ("b", "a"))]
    assert class_names(items) == ["2", "9", "10", "a", "b"]


def test_labels_are_checked_against_a_class_list(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4")
    classes = write(tmp_path / "classInd.txt", "0,Archery\n1,Ballet\n")
    file = write_json(tmp_path / "anet.json", {"a": entry("training", (0, 1, "Balet"))})
    with pytest.raises(DynskipError, match=r"1 labels are not in the class list, such as 'Balet'\. Did you mean 'Ball"):
        load_items(tmp_path, [file], classes=classes)


def test_what_the_format_cannot_be_told_from(tmp_path: Path) -> None:
    thumos, listed = write(tmp_path / "val_Annotation.csv", THUMOS_NAMED), write(tmp_path / "train.txt", "a 60 1\n")
    video = touch(tmp_path / "a.mp4")
    for data, files, reader, message in (
        (tmp_path, [tmp_path], None, r"is a folder\. Give the annotation file or class list itself"),
        (tmp_path, [thumos, listed], None, r"several formats \(list, thumos\); tell which"),
        (
            tmp_path,
            [listed],
            "parquet",
            r"no format 'parquet'; choose one of csv, activitynet, thumos, list, list-labels, or",
        ),
        (video, [listed], None, r"a\.mp4 is no folder\. Expected the folder of the videos"),
    ):
        with pytest.raises(DynskipError, match=message):
            load_items(data, files, reader)
    assert load_items(tmp_path, [listed], "list") == load_items(tmp_path, [listed])


def test_a_reader_of_ones_own(tmp_path: Path) -> None:
    def read_ucf(data: Path, files: Sequence[Path], names: Mapping[int, str]) -> list[Item]:
        lines = [(file, line.split()) for file in files for line in file.read_text().splitlines()]
        return [Item(data / path, (names[int(label)],), file.stem[:-6]) for file, (path, label) in lines]

    video = touch(tmp_path / "Archery" / "v_1.avi")
    file = write(tmp_path / "trainlist01.txt", "Archery/v_1.avi 1\nArchery/v_2.avi 1\n")
    classes = write(tmp_path / "classInd.txt", "1 Archery\n")
    with pytest.warns(UserWarning, match="1 of 2 annotated videos are not in"):
        assert load_items(tmp_path, [file], read_ucf, classes) == [Item(video, ("Archery",), "train")]
    write(classes, "1 Ballet\n")
    write(file, "Archery/v_1.avi 1\n" * 2)
    with pytest.raises(DynskipError, match="occurs twice, in train"):  # what a reader gives is checked, too
        load_items(tmp_path, [file], read_ucf, classes)


# --------------------------------------------------------------------------------------------------- relevant frames


def test_relevant_frames_come_from_annotations_or_segments_csv(tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    write_video(video, np.zeros((20, 32, 32, 3), np.uint8))
    seconds = Item(tmp_path / "b.mp4", ("x",), "test", (Segment(2, 4, "x"), Segment(6, 7, "x")), 8.0)
    endless, bare = Item(tmp_path / "c", ("x",), "test", (Segment(2, 4, "x"),)), Item(tmp_path / "d", ("x",), "test")
    broken = Item(touch(tmp_path / "broken.mp4"), ("x",), "test")
    items = [Item(video, ("x",), "test"), seconds, endless, bare, broken]
    assert {key: marks.tolist() for key, marks in relevant_frames(items, 4, tmp_path).items()} == {
        str(seconds.path): [False, True, False, False]  # frames are shown at 1, 3, 5 and 7 seconds
    }
    labels = write(tmp_path / "labels.csv", "path,label,split\n")
    # In frames: they are taken at 2.5, 7.5, 12.5 and 17.5. The end is outside.
    write(
        tmp_path / "segments.csv",
        f"path,start,end\na.mp4,0,5\n../{tmp_path.name}/a.mp4,12,17.5\nbroken.mp4,0,3\nunlisted.mp4,0,3\n",
    )
    for data in (tmp_path, labels):
        marks = relevant_frames(items, 4, data)
        assert set(marks) == {str(video), str(seconds.path)}
        assert marks[str(video)].tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,start,end\na.mp4,1,x\n", r"segments\.csv, line 2: start and end must be numbers of frames"),
        ("path,start,end\na.mp4,1,inf\n", r"line 2: start and end must be numbers of frames \(1 to inf is not finite"),
        ("path,start,end\na.mp4,nan,3\n", r"line 2: start and end must be numbers of frames \(nan to 3 is not finite"),
        ("path,start\na.mp4,1\n", r"segments\.csv lacks the column end"),
        ("path,start,end\na.mp4,5,5\n", r"from 5\.0 to 5\.0 has no length"),
    ],
)
def test_faults_of_segments_csv_are_named(content: str, message: str, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", np.zeros((8, 32, 32, 3), np.uint8))
    write(tmp_path / "segments.csv", content)
    with pytest.raises(DynskipError, match=message):
        relevant_frames([Item(tmp_path / "a.mp4", ("x",), "test")], 4, tmp_path)
