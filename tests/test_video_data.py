from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dynskip import DynskipError

for needed in ("av", "matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(needed)

import prepare_data  # noqa: E402
import sofnet_activitynet as example  # noqa: E402
import stick_figures  # noqa: E402
import video_data  # noqa: E402
from video_data import Item, Segment  # noqa: E402

PREP = video_data.Preprocessing(size=16, num_frames=4)


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"video")
    return path


def write_pictures(folder: Path, count: int, name: str = "image_{:05d}.jpg", size: tuple[int, int] = (32, 24)) -> Path:
    """Write pictures whose brightness tells their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", size, (10 * number,) * 3).save(folder / name.format(number + 1))
    return folder


def brightness(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 10) for frame in frames]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    return stick_figures.render_set(root, train_per_class=1, test_per_class=1, size=32, num_frames=24)


# -------------------------------------------------------------------------------------------------- extracted frames


@pytest.mark.parametrize("name", ["image_{:05d}.jpg", "{:05d}.jpg", "img_{:05d}.png", "frame{:d}.webp"])
def test_frame_folders_are_read_in_the_order_of_their_numbers(name: str, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "video", 20, name)
    write_pictures(folder, 3, "flow_x_{:05d}.jpg")
    (folder / "notes.txt").write_text("not a picture")
    frames = video_data.read_frames(folder, 5, 12)
    assert frames.shape == (5, 12, 16, 3)
    assert brightness(frames) == [2, 6, 10, 14, 18]
    assert brightness(video_data.read_frames(folder, 40, 24)) == [i // 2 for i in range(40)]
    drawn = brightness(video_data.read_frames(folder, 4, 12, random.Random(1)))
    assert all(5 * i <= number < 5 * i + 5 for i, number in enumerate(drawn))


def test_bad_frame_folders_are_named(tmp_path: Path) -> None:
    empty, mixed, damaged, sizes = (tmp_path / name for name in ("empty", "mixed", "damaged", "sizes"))
    empty.mkdir()
    write_pictures(write_pictures(mixed, 2), 2, "img_{:05d}.jpg")
    (write_pictures(damaged, 4) / "image_00002.jpg").write_bytes(b"nothing")
    write_pictures(sizes, 1)
    write_pictures(sizes, 1, "image_9{:d}.jpg", (50, 24))
    for folder, message in (
        (empty, "empty: holds no pictures. Expected one video's frames, such as image_00001.jpg"),
        (mixed, "mixed: holds pictures of several kinds (image_, img_)"),
        (damaged, "image_00002.jpg: not a readable picture"),
        (sizes, "sizes: its frames have different sizes"),
    ):
        with pytest.raises(video_data.VideoError, match=re.escape(message)):
            video_data.read_frames(folder, 4, 16)


# ------------------------------------------------------------------------------------------------------- annotations


def write_json(file: Path, database: dict[str, Any]) -> Path:
    file.write_text(json.dumps({"database": database, "taxonomy": [], "version": "VERSION 1.3"}))
    return file


def entry(subset: str, *segments: tuple[Any, Any, str], **more: Any) -> dict[str, Any]:
    annotations = [{"segment": [start, end], "label": label} for start, end, label in segments]
    return {"subset": subset, "annotations": annotations, **more}


def test_activitynet_keeps_segments_and_finds_files_and_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "videos"
    folder = write_pictures(videos / "v_b", 3)
    touch(videos / "v_-a.mkv")
    file = write_json(
        tmp_path / "anet.json",
        {
            "-a": entry("training", (1.5, 9, "Polo"), (10, 20.2, "Archery"), (30, 31, "Polo"), duration=31.0, rating=5),
            "b": entry("validation", (0, 4, "Polo"), duration=8),
            "gone": entry("validation", (0, 4, "Polo"), duration=8),
            "hidden": entry("testing", duration=8),
        },
    )
    first, second = video_data.load_items(videos, [file])
    segments = (Segment(1.5, 9, "Polo"), Segment(10, 20.2, "Archery"), Segment(30, 31, "Polo"))
    assert first == Item(videos / "v_-a.mkv", ("Polo", "Archery"), "train", segments, 31.0)
    assert (second.path, second.split, second.duration) == (folder, "val", 8)
    text = capsys.readouterr().out
    assert "unknown key 'rating' in 1 videos; it is ignored" in text
    assert "1 of 3 annotated videos are not in" in text
    assert len(video_data.read_items(videos, [file])) == 3


@pytest.mark.parametrize(
    ("database", "message"),
    [
        ({"a": entry("train1", (0, 1, "x"))}, "a: unknown subset 'train1'; expected one of training, train"),
        ({"a": {"subset": "training", "anotations": []}}, "a: has 'subset', 'anotations'; expected 'subset' and 'anno"),
        (
            {"a": entry("training", (5, 12, "x"), duration=10)},
            "segment 5 to 12 seconds (x) does not lie within 0 to 10",
        ),
        ({"a": entry("training", (-1, 2, "x"))}, "segment -1 to 2 seconds (x) does not lie within the video"),
        ({"a": entry("training", (3, 2, "x"), duration=10)}, "segment 3 to 2 seconds (x)"),
        ({"a": entry("training", ("one", 2, "x"))}, "a: its annotations need 'segment' [start, end] and 'label'"),
        ({"a": entry("training", (0, 1, None))}, "a: label None is no name"),  # type: ignore[arg-type]
        ({"a": entry("training", (0, 1, ""))}, "a: label '' is no name"),
        ({"a": entry("training", (0, 1, ["x"]))}, "a: label ['x'] is no name"),  # type: ignore[arg-type]
        ({"a": {"subset": ["training"], "annotations": []}}, "a: unknown subset ['training']; expected one of"),
        ({"a": entry("training", (0, 1, "x")), "v_a": entry("validation", (0, 1, "x"))}, "occurs twice, in train and"),
        ({str(i): entry("nowhere") for i in range(9)}, "has 9 faults"),
        ({str(i): entry("nowhere") for i in range(9)}, "... and 4 more"),
    ],
)
def test_faults_of_annotations_are_named(database: dict[str, Any], message: str, tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4")
    with pytest.raises(DynskipError, match=re.escape(message)):
        video_data.load_items(tmp_path, [write_json(tmp_path / "anet.json", database)])


def test_repeated_json_entries_are_not_lost_silently(tmp_path: Path) -> None:
    one = json.dumps(entry("training", (0, 1, "x")))
    (tmp_path / "anet.json").write_text(f'{{"database": {{"a": {one}, "a": {one}}}}}')
    with pytest.raises(
        DynskipError, match=r"anet\.json has 'a' more than once\. Every video has one entry; merge them\.$"
    ):
        video_data.load_items(tmp_path, [tmp_path / "anet.json"])


def test_segment_ends_a_moment_after_the_video_are_usual(tmp_path: Path) -> None:
    video = touch(tmp_path / "a.mp4")
    file = write_json(tmp_path / "anet.json", {"a": entry("training", (5, 10.3, "x"), duration=10)})
    assert [item.path for item in video_data.load_items(tmp_path, [file])] == [video]


def test_two_files_of_one_name_are_ambiguous(tmp_path: Path) -> None:
    touch(tmp_path / "v_a.mp4"), touch(tmp_path / "a.mkv")
    file = write_json(tmp_path / "anet.json", {"a": entry("training", (0, 1, "x"))})
    with pytest.raises(DynskipError, match=r"'a' could be .*a\.mkv or .*v_a\.mp4\. Keep one"):
        video_data.load_items(tmp_path, [file])


def test_labels_are_checked_against_a_class_list(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4")
    classes = tmp_path / "classInd.txt"
    classes.write_text("0,Archery\n1,Ballet\n")
    file = write_json(tmp_path / "anet.json", {"a": entry("training", (0, 1, "Balet"))})
    with pytest.raises(DynskipError, match=r"1 labels are not in the class list, such as 'Balet'\. Did you mean 'Ball"):
        video_data.load_items(tmp_path, [file], classes=classes)
    assert video_data.class_names([], classes) == ["Archery", "Ballet"]


def test_thumos_json_has_text_for_times_and_no_durations(tmp_path: Path) -> None:
    touch(tmp_path / "video_test_0000896.mp4"), touch(tmp_path / "video_validation_0000051.mp4")
    database = {
        "video_test_0000896": entry("test", ("18.6", "24.8", "HighJump"), ("30", "31", "Ambiguous")),
        "video_validation_0000051": entry("train", ("67.5", "75.9", "Billiards"), ("1.0", "2.0", "Diving")),
    }
    test, train = video_data.load_items(tmp_path, [write_json(tmp_path / "thumos_gt.json", database)])
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
    named, numbered = tmp_path / "val_Annotation.csv", tmp_path / "groundtruth.csv"
    named.write_text(THUMOS_NAMED)
    numbered.write_text(THUMOS_NUMBERED)
    billiards, archery, test = video_data.load_items(tmp_path, [named, numbered])
    assert (billiards.labels, len(billiards.segments), billiards.split) == (("Billiards",), 2, "train")
    assert archery.labels == ("Archery",)
    assert (test.labels, test.split, test.duration, test.num_frames) == (("Archery", "Billiards"), "test", 149.0, 4470)
    with pytest.raises(DynskipError, match=r"groundtruth\.csv, line 3: class 0 of 0 known ones(.|\n)*give both files"):
        video_data.load_items(tmp_path, [numbered])
    (tmp_path / "classes.txt").write_text("Archery\nBilliards\n")
    assert video_data.load_items(tmp_path, [numbered], classes=tmp_path / "classes.txt") == [test]
    numbered.write_text(THUMOS_NUMBERED.replace("60,61", "60,261"))
    with pytest.raises(DynskipError, match=r"line 4: segment 60 to 261 seconds \(Billiards\) does not lie within 0 to"):
        video_data.load_items(tmp_path, [named, numbered])


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
    file = tmp_path / "some_train_split.txt"
    file.write_text(f"{line}\n\n")
    assert video_data.load_items(tmp_path, [file]) == [Item(expected, labels, "train", num_frames=frames)]


def test_missing_videos_of_lists_are_read_as_far_as_can_be_told(tmp_path: Path) -> None:
    file = tmp_path / "actnet_val_split.txt"
    file.write_text("gone,5531,82,7\nvery/long way/gone 60 5\n")
    assert video_data.read_items(tmp_path, [file]) == [
        Item(tmp_path / "gone", ("82", "7"), "val", num_frames=5531),
        Item(tmp_path / "very/long way/gone", ("5",), "val", num_frames=60),
    ]


@pytest.mark.parametrize(
    ("name", "content", "classes", "message"),
    [
        ("train.txt", "a 60\n", None, "has 1 faults:\n  line 1: 'a 60'\nExpected `path frames label`"),
        ("train.txt", "a 60 5\nb 60 kick\n", None, "line 2: 'b 60 kick'"),
        ("train.txt", "a  60  5\n", None, "separated by one comma, semicolon or space each."),
        ("train.txt", "a 60 2\n", "0,x\n1,y\n", "line 1: label 2 is not in the class list"),
        ("train.txt", "a 60 1\na 60 1\n", None, "occurs twice, in train. Every video belongs to one split"),
        ("list.txt", "a 60 1\n", None, "its name must tell the split: one of train, val, test"),
        ("trainval.txt", "a 60 1\n", None, "its name must tell the split"),
        ("train.txt", "a 60 1\n", "0,x\n0,y\n", "lists 0 more than once"),
        ("train.txt", "a 60 1\n", "x\ny\nx\n", "lists 'x' more than once"),
        ("train.txt", "a 60 1\n", "", "is empty. Expected one class a line"),
        ("train.txt", b"\xff\xfe a 60 1\n", None, "is no text in UTF-8"),
    ],
)
def test_faults_of_lists_are_named(
    name: str, content: str | bytes, classes: str | None, message: str, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    if classes is not None:
        (tmp_path / "classes.txt").write_text(classes)
    with pytest.raises(DynskipError, match=re.escape(message)):
        video_data.load_items(
            tmp_path, [tmp_path / name], classes=tmp_path / "classes.txt" if classes is not None else None
        )


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
    (tmp_path / "classInd.txt").write_text(text)
    classes = video_data.read_classes(tmp_path / "classInd.txt")
    assert classes == expected
    assert video_data.class_names([], tmp_path / "classInd.txt") == list(expected.values())


def test_numbers_as_labels_are_in_numerical_order() -> None:
    items = [Item(Path(), (label,), "train") for label in ("10", "9", "2", "b", "a")]
    assert video_data.class_names(items) == ["2", "9", "10", "a", "b"]


def test_lists_of_several_splits_and_a_class_list(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "x_train.txt").write_text("a,60,1,1\n")
    (tmp_path / "x_val.txt").write_text("b,60,0\n")
    (tmp_path / "classInd.txt").write_text("0,zero\n1,one\n")
    files = [tmp_path / "x_train.txt", tmp_path / "x_val.txt"]
    items = video_data.load_items(tmp_path, files, classes=tmp_path / "classInd.txt")
    assert [(item.path.name, item.labels, item.split) for item in items] == [
        ("a", ("one",), "train"),
        ("b", ("zero",), "val"),
    ]


@pytest.mark.parametrize("splits", [("train", "train"), ("train", "test")])
def test_a_video_belongs_to_one_split_once(splits: tuple[str, str], tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4")
    rows = "".join(f"a.mp4,kick,{split}\n" for split in splits)
    (tmp_path / "labels.csv").write_text(f"path,label,split\n{rows}")
    with pytest.raises(DynskipError, match=r"a\.mp4 occurs twice, in train"):
        video_data.load_items(tmp_path)


def test_a_folder_in_the_place_of_annotations(tmp_path: Path) -> None:
    with pytest.raises(DynskipError, match=r"is a folder\. Give the annotation file or class list itself"):
        video_data.load_items(tmp_path, [tmp_path])


def test_formats_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "val_Annotation.csv").write_text(THUMOS_NAMED)
    (tmp_path / "train.txt").write_text("a 60 1\n")
    with pytest.raises(DynskipError, match=r"several formats \(list, thumos\)"):
        video_data.load_items(tmp_path, [tmp_path / "val_Annotation.csv", tmp_path / "train.txt"])


# ------------------------------------------------------------------------------------------------- cache and batches


def clips_of(data: Path, training: bool, cache: Path | None = None) -> video_data.Clips:
    return video_data.Clips(video_data.read_csv(data), stick_figures.CLASSES, PREP, training, seed=1, cache=cache)


def videos(clips: video_data.Clips, epoch: int = 0) -> list[torch.Tensor]:
    return [sample[0] for i in range(len(clips)) if not isinstance(sample := clips[epoch, i], str)]


def test_cached_frames_are_the_decoded_ones(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for training in (True, False):
        memory = clips_of(data, training).load_into_memory()
        for _ in range(2):  # written, then read
            cached = clips_of(data, training, tmp_path / "cache")
            assert len(videos(cached)) == 12
            assert all(torch.equal(a, b) for a, b in zip(videos(memory, 3), videos(cached, 3), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(videos(clips_of(data, False)), videos(cached), strict=True))
    assert len(list((tmp_path / "cache").iterdir())) == 12

    def fail(*_: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(video_data, "sample_frames", fail)
    assert len(videos(clips_of(data, True, tmp_path / "cache"), 7)) == 12
    assert clips_of(data, False, tmp_path / "cache").load_into_memory().memory


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text"])
def test_damaged_entries_are_decoded_again(
    damage: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = video_data.read_csv(data)[0].path
    cache = video_data.FrameCache(tmp_path, 4, 18)
    whole, count = cache.read(path, range(12))
    assert count == 24
    raw = cache.file(path).read_bytes()
    middle = bytearray(raw)
    middle[-100] ^= 1
    damaged = {"empty": b"", "cut": raw[:-10], "flipped": bytes(middle), "text": b"hello" * 9}
    cache.file(path).write_bytes(damaged[damage])
    np.testing.assert_array_equal(cache.read(path, range(12))[0], whole)
    assert re.search(r"is damaged \(.*\); .*\.mp4 is decoded again", capsys.readouterr().err)
    np.testing.assert_array_equal(cache.read(path, [3, 0, 3])[0], whole[[3, 0, 3]])
    assert capsys.readouterr().err == ""


def test_replaced_videos_are_decoded_again(data: Path, tmp_path: Path) -> None:
    one, other = (item.path for item in video_data.read_csv(data)[:2])
    path = tmp_path / "a.mp4"
    cache = video_data.FrameCache(tmp_path / "cache", 4, 18)
    seen = []
    for source in (one, other):
        path.write_bytes(source.read_bytes())
        seen.append(cache.read(path, range(12))[0])
    assert not np.array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[1], video_data.read_frames(other, 12, 18))
    path.unlink()
    with pytest.raises(video_data.VideoError, match="no such file"):
        cache.read(path, [0])


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file in its place")
    clips = clips_of(data, False, tmp_path / "cache")
    assert all(torch.equal(a, b) for a, b in zip(videos(clips), videos(clips_of(data, False)), strict=True))
    assert capsys.readouterr().err.count("Could not write to the cache") == 1


def test_each_epoch_draws_one_of_several_labels(data: Path) -> None:
    path = video_data.read_csv(data)[0].path
    items = [Item(path, ("b", "a", "c"), "train"), Item(path, ("c",), "train")]
    training, testing = (
        video_data.Clips(items, "abc", PREP, flag, seed=1).load_into_memory() for flag in (True, False)
    )
    drawn = [training[epoch, 0][1] for epoch in range(150)]
    counts = np.bincount(np.array(drawn, int))
    assert len(counts) == 3
    assert counts.min() > 30
    assert {training[epoch, 1][1] for epoch in range(9)} == {2}
    assert testing[0, 0][1] == testing[5, 0][1] == 1
    assert training.targets == [[1, 0, 2], [2]]


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 5), st.integers(0, 3), st.integers(0, 9))
def test_processes_share_the_steps_of_one(videos: int, size: int, processes: int, first: int, epoch: int) -> None:
    clips = video_data.Clips([Item(Path(str(i)), ("a",), "train") for i in range(videos)], "a", PREP, True, seed=4)
    alone: Any = video_data.batches(clips, size, 0, epoch).batch_sampler
    shares: list[Any] = [
        video_data.batches(clips, size, 0, epoch, first, rank, processes).batch_sampler for rank in range(processes)
    ]
    assert sorted(position for step in alone for _, position in step) == list(range(videos))
    assert [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == alone[first:]
    assert all(max(map(len, parts)) - min(map(len, parts)) <= 1 for parts in zip(*shares, strict=True))


# ----------------------------------------------------------------------------------------------------------- prepare


def prepare(*arguments: object) -> int:
    return example.main(["prepare", "--frames", "4", "--size", "16", "--workers", "0", *map(str, arguments)])


def test_prepare_passes_a_whole_set_and_fills_the_cache(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report_file, cache = tmp_path / "reports" / "prepare.json", tmp_path / "cache"
    assert prepare("--data", data, "--report", report_file, "--cache", cache) == 0
    assert "12 of 12 videos can be read." in capsys.readouterr().out
    report = json.loads(report_file.read_text())
    assert report["splits"]["train"]["videos_per_class"] == dict.fromkeys(sorted(stick_figures.CLASSES), 1)
    assert report["splits"]["test"]["frames"] == [24, 24, 24]
    assert report["missing"] == report["unreadable"] == report["short"] == report["not_in_cache"] == []
    assert len(list(cache.iterdir())) == 12
    monkeypatch.setattr(video_data, "sample_frames", None)  # everything comes from the cache
    assert prepare("--data", data, "--report", report_file, "--cache", cache) == 0


def test_prepare_lists_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "frames"
    write_pictures(root / "good", 10)
    write_pictures(root / "brief", 2)
    write_pictures(root / "lossy", 5)
    write_pictures(root / "other", 10)
    touch(root / "bad.mp4")
    (tmp_path / "train.txt").write_text("good 10 0\nbrief 2 0 1\nlossy 9 1\ngone 50 1\nbad 50 1\n")
    (tmp_path / "val.txt").write_text("other 10 2\n")
    lists = ["--annotations", tmp_path / "train.txt", tmp_path / "val.txt"]
    assert prepare("--data", root, *lists, "--report", tmp_path / "r.json") == 1
    text = capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["videos"], report["readable"]) == (6, 4)
    assert report["missing"] == [str(root / "gone")]
    assert [error.partition(": ")[0] for error in report["unreadable"]] == [str(root / "bad.mp4")]
    assert report["short"] == [f"{root / 'brief'}: 2 frames"]
    assert report["fewer_frames_than_annotated"] == [f"{root / 'lossy'}: 5 of 9"]
    assert report["several_labels"] == [str(root / "brief")]
    assert report["labels_without_training_videos"] == ["2"]
    assert report["splits"]["train"]["videos_per_class"] == {"0": 2, "1": 2}
    assert f"1 cannot be read:\n  {root / 'bad.mp4'}: " in text
    assert "1 are missing:" in text


def test_prepare_measures_what_segments_cover(tmp_path: Path) -> None:
    path = write_pictures(tmp_path / "a", 8)
    segments = (Segment(6, 11, "x"), Segment(1, 3, "x"), Segment(2, 4, "y"))
    item = Item(path, ("x", "y"), "train", segments, duration=10.0)
    assert prepare_data.coverage(item) == pytest.approx(0.7)
    bare = Item(tmp_path / "b", ("x",), "train")
    assert prepare_data.coverage(bare) is None
    findings = prepare_data.check_videos([item, bare], None, 0)
    report = prepare_data.report_on([item, bare], findings, 4, cache=False)
    assert report["splits"]["train"]["mean_share_of_length_in_segments"] == pytest.approx(0.7)
    assert "segments cover 70 % of 1 videos" in prepare_data.summary(report)


class Deadly(type(Path())):  # type: ignore[misc]
    """A path that kills whoever looks at it."""

    def exists(self, **_: Any) -> bool:
        os.kill(os.getpid(), signal.SIGKILL)
        return True


def test_a_process_that_dies_while_preparing_is_reported(tmp_path: Path) -> None:
    items = [Item(write_pictures(tmp_path / "a", 4), ("x",), "train"), Item(Deadly(tmp_path / "b"), ("x",), "train")]
    with pytest.raises(DynskipError, match=r"A process that reads videos died after [01] of 2: .*/b\b"):
        prepare_data.check_videos(items, None, 1)
