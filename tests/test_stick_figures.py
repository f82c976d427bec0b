from __future__ import annotations

import csv
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynskip.errors import DynskipError

av = pytest.importorskip("av")
for needed in ("PIL", "safetensors", "tqdm"):
    pytest.importorskip(needed)

from dynskip.video import stick_figures  # noqa: E402

SMALL: dict[str, Any] = {"train_per_class": 2, "test_per_class": 1, "size": 48, "num_frames": 24}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stick_figures.render_set(tmp_path_factory.mktemp("small"), **SMALL)


def test_tables_list_every_video(small: Path) -> None:
    labels, segments = rows(small / "labels.csv"), rows(small / "segments.csv")
    assert list(labels[0]) == ["path", "label", "split"]
    assert list(segments[0]) == ["path", "start", "end"]
    paths = [row["path"] for row in labels]
    assert paths == sorted(paths) == [row["path"] for row in segments]
    assert set(paths) == {path.relative_to(small).as_posix() for path in small.rglob("*.mp4")}
    expected = {
        (label, split): SMALL[f"{split}_per_class"] for label in stick_figures.CLASSES for split in ("train", "test")
    }
    assert Counter((row["label"], row["split"]) for row in labels) == expected
    assert all(row["path"].startswith(f"videos/{row['label']}/{row['split']}_") for row in labels)


def test_videos_and_segments_have_the_stated_lengths(small: Path) -> None:
    for row in rows(small / "segments.csv"):
        start, end = int(row["start"]), int(row["end"])
        assert 0 <= start < end <= SMALL["num_frames"]
        assert 0.25 <= (end - start) / SMALL["num_frames"] <= 0.65
        with av.open(str(small / row["path"])) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.average_rate) == ("h264", stick_figures.FPS)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert np.stack(frames).shape == (SMALL["num_frames"], SMALL["size"], SMALL["size"], 3)


def test_decoded_frames_are_the_drawn_ones(tmp_path: Path) -> None:
    drawn, _, _ = stick_figures.draw_video("side_lunge", np.random.default_rng(3), 96, 24)
    stick_figures.write_video(tmp_path / "video.mp4", drawn)
    with av.open(str(tmp_path / "video.mp4")) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert np.abs(decoded.astype(float) - drawn).mean() < 8  # of 255: lossy, but the same picture


def test_each_class_is_one_step_of_the_ring_of_poses() -> None:
    assert len(stick_figures.CLASSES) == 6
    assert Counter(pose for pair in stick_figures.ACTIONS.values() for pose in pair) == dict.fromkeys(
        stick_figures.POSES, 2
    )


def test_same_seed_gives_the_same_bytes_in_larger_sets_and_several_processes(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    larger = digests(stick_figures.render_set(tmp_path, **{**SMALL, "train_per_class": 16}))  # 102 videos
    videos = {path: digest for path, digest in digests(small).items() if path.endswith(".mp4")}
    assert len(videos) == 18
    assert {path: larger[path] for path in videos} == videos


def test_other_seed_gives_other_videos(small: Path, tmp_path: Path) -> None:
    other = digests(stick_figures.render_set(tmp_path, **SMALL, seed=1))
    assert not any(digest == other[path] for path, digest in digests(small).items() if path.endswith(".mp4"))


def test_complete_set_is_left_alone(small: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    assert stick_figures.render_set(small, **SMALL) == small
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*")} == before


@pytest.mark.parametrize("damage", ["set.json missing", "set.json cut short", "video missing", "table missing"])
def test_incomplete_set_is_rendered_again(damage: str, tmp_path: Path) -> None:
    smallest = {**SMALL, "train_per_class": 1}
    before = digests(stick_figures.render_set(tmp_path, **smallest))
    manifest = tmp_path / "set.json"
    if damage == "set.json cut short":
        manifest.write_text(manifest.read_text()[:10])
    else:
        name = {"set.json missing": "set.json", "table missing": "segments.csv"}
        (tmp_path / name.get(damage, "videos/high_kick/test_0000.mp4")).unlink()
    stick_figures.render_set(tmp_path, **smallest)
    assert digests(tmp_path) == before


def test_interrupted_render_leaves_no_complete_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = stick_figures.write_video, []

    def interrupted(path: Path, frames: np.ndarray) -> None:
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt
        write(path, frames)

    monkeypatch.setattr(stick_figures, "write_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stick_figures.render_set(tmp_path, **SMALL)
    assert not (tmp_path / "set.json").exists()
    stick_figures.render_set(tmp_path, **SMALL)
    assert len(calls) == 4 + 18


def test_another_set_replaces_the_old_one_but_no_foreign_file(tmp_path: Path) -> None:
    stick_figures.render_set(tmp_path, **SMALL)
    foreign = tmp_path / "videos" / "high_kick" / "mine.mp4"
    foreign.write_bytes(b"")
    stick_figures.render_set(tmp_path, **{**SMALL, "train_per_class": 1})
    listed = {tmp_path / row["path"] for row in rows(tmp_path / "labels.csv")}
    assert set(tmp_path.rglob("*.mp4")) == listed | {foreign}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train_per_class": 0}, "train_per_class is 0, expected at least 1"),
        ({"test_per_class": 0}, "test_per_class is 0, expected at least 1"),
        ({"num_frames": 23}, "num_frames is 23, expected at least 24"),
        ({"size": 16}, "size is 16, expected at least 32"),
        ({"size": 49}, "size is 49, but H.264 video needs an even one; use 50"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
        ({"root": Path(__file__)}, "is a file, expected a folder"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DynskipError, match=message):
        stick_figures.render_set(**{"root": tmp_path / "set", **SMALL, **wrong})
    assert not (tmp_path / "set").exists()
