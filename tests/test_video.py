"""Frame sources, the cache of decoded frames, clips and their batches, and the check of a data set."""

from __future__ import annotations

import importlib
import itertools
import os
import random
import re
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import toy_model
from hypothesis import given
from hypothesis import strategies as st

import dynskip
from dynskip import DynskipError

av = pytest.importorskip("av")
for needed in ("PIL", "safetensors", "tqdm"):
    pytest.importorskip(needed)

from PIL import Image  # noqa: E402

from dynskip.video import (  # noqa: E402
    Clips,
    EvaluationLoader,
    FrameSource,
    Item,
    Preprocessing,
    Segment,
    VideoError,
    load_items,
    open_source,
    sample_frames,
    training_batches,
)
from dynskip.video.cache import FrameCache  # noqa: E402
from dynskip.video.check import check_videos, coverage, is_clean, report_on, summary  # noqa: E402
from dynskip.video.stick_figures import CLASSES, write_video  # noqa: E402

PREP = Preprocessing(size=16, num_frames=4)


@pytest.mark.parametrize("missing", ["av", "PIL", "safetensors", "tqdm"])
def test_without_the_extra_the_import_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dynskip.video")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"dynskip\.video needs {missing}\. Install dynskip with the extra `video`"):
        importlib.import_module("dynskip.video")


# -------------------------------------------------------------------------------------------------------- video files

BITS = 6


def write_numbered(path: Path, count: int, height: int = 32, width: int = 96, codec: str = "libx264") -> Path:
    """Write a video whose frames show their number: bars from left to right, white for a one."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(count):
            bars = [255 * (number >> bit & 1) for bit in range(BITS)]
            row = np.repeat(np.array(bars, np.uint8), width // BITS)
            pixels = np.broadcast_to(row[None, :, None], (height, width, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def numbers(frames: np.ndarray) -> list[int]:
    """Read the numbers that `write_numbered` drew."""
    _, height, width, _ = frames.shape
    centres = [int((bit + 0.5) * width / BITS) for bit in range(BITS)]
    ones = frames[:, height // 2, centres].mean(-1) > 127
    return [int(sum(2**bit for bit in range(BITS) if row[bit])) for row in ones]


def read_frames(path: Path, count: int, short_side: int, rng: random.Random | None = None) -> np.ndarray:
    return sample_frames(open_source(path), count, short_side, rng)


def half(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mjpeg")])
@pytest.mark.parametrize(("count", "wanted"), [(40, 16), (33, 4), (16, 16), (5, 8), (1, 3), (7, 1)])
def test_frames_are_spread_evenly(name: str, codec: str, count: int, wanted: int, tmp_path: Path) -> None:
    path = write_numbered(tmp_path / name, count, codec=codec)
    frames = read_frames(path, wanted, 32)
    assert frames.shape == (wanted, 32, 96, 3)
    assert frames.dtype == np.uint8
    assert numbers(frames) == [int((i + 0.5) * count / wanted) for i in range(wanted)]


def test_random_frames_come_from_their_parts(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "a.mp4", 40)
    drawn = [numbers(read_frames(path, 8, 32, random.Random(seed))) for seed in range(6)]
    assert all(5 * i <= number < 5 * i + 5 for picks in drawn for i, number in enumerate(picks))
    assert len({tuple(picks) for picks in drawn}) == 6
    assert drawn[2] == numbers(read_frames(path, 8, 32, random.Random(2)))


@pytest.mark.parametrize(("name", "codec", "claimed"), [("a.mkv", "libx264", 0), ("a.avi", "mjpeg", 40)])
def test_headers_are_not_believed(name: str, codec: str, claimed: int, tmp_path: Path) -> None:
    path = write_numbered(tmp_path / name, 40, codec=codec)
    if claimed:
        half(path)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == claimed
        count = sum(1 for _ in container.decode(video=0))
    assert count == 40 if not claimed else 10 < count < 30
    assert numbers(read_frames(path, 4, 32)) == [int((i + 0.5) * count / 4) for i in range(4)]


@pytest.mark.parametrize(
    ("height", "width", "short_side", "expected"),
    [(32, 96, 16, (16, 48)), (96, 48, 64, (128, 64)), (50, 60, 37, (37, 44)), (16, 384, 24, (24, 576))],
)
def test_short_side_is_scaled(
    height: int, width: int, short_side: int, expected: tuple[int, int], tmp_path: Path
) -> None:
    path = write_numbered(tmp_path / "a.mp4", 4, height, width)
    assert read_frames(path, 2, short_side).shape == (2, *expected, 3)


def test_pictures_are_turned_as_the_phone_was_held(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "a.mp4", 4)
    upright = read_frames(path, 4, 32)
    raw, one = path.read_bytes(), 1 << 16
    identity = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    track = raw.index(identity, raw.index(identity) + 1)  # the first one is the whole film's
    path.write_bytes(raw[:track] + clockwise + raw[track + len(identity) :])
    np.testing.assert_array_equal(read_frames(path, 4, 32), np.rot90(upright, -1, axes=(1, 2)))


def write_sound(path: Path, codec: str, form: str) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8000, layout="mono")
        silence = np.zeros((1, 4096), np.float32 if form == "fltp" else np.int16)
        frame = av.AudioFrame.from_ndarray(silence, format=form, layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_blank(path: Path) -> None:
    """The index is whole and the pictures are gone."""
    raw = write_numbered(path, 8).read_bytes()
    start, end = raw.index(b"mdat") + 4, raw.index(b"moov") - 4
    path.write_bytes(raw[:start] + b"\xff" * (end - start) + raw[end:])


def write_words(path: Path) -> None:
    path.write_bytes(b"no video\nat all\n" * 50)


def write_damaged_picture(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + np.random.default_rng(0).bytes(500))


BAD_VIDEOS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty.mp4": (Path.touch, "is empty .0 bytes.. Fetch it again"),
    "noise.mp4": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "not a readable video"),
    "words.mp4": (write_words, "holds no video stream|is text, no video"),
    "words.txt": (write_words, "holds no video stream|is text, no video"),
    "sound.mp4": (partial(write_sound, codec="aac", form="fltp"), "holds no video stream"),
    "sound.wav": (partial(write_sound, codec="pcm_s16le", form="s16"), "holds no video stream"),
    "cut.mp4": (lambda path: half(write_numbered(path, 30)), "is cut off: "),  # its index is at the end
    "blank.mp4": (write_blank, "not a readable video|holds no frame"),
    "words.png": (write_words, "is text, no picture"),
    "damaged.png": (write_damaged_picture, "not a readable picture .*Extract this video's frames again"),
    "gone.mp4": (lambda path: None, r"no such file"),
    "gone.png": (lambda path: None, r"no such file\."),
}


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_unreadable_files_are_named(name: str, tmp_path: Path) -> None:
    path, (make, message) = tmp_path / name, BAD_VIDEOS[name]
    make(path)
    with pytest.raises(VideoError, match=f"^{re.escape(str(path))}: ({message})"):
        read_frames(path, 4, 32)


# -------------------------------------------------------------------------------------- pictures, sources of one's own


def write_pictures(folder: Path, count: int, name: str = "image_{:05d}.jpg", size: tuple[int, int] = (32, 24)) -> Path:
    """Write pictures whose brightness tells their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", size, (10 * number,) * 3).save(folder / name.format(number + 1))
    return folder


def brightness(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 10) for frame in frames]


@pytest.mark.parametrize("name", ["image_{:05d}.jpg", "{:05d}.jpg", "img_{:05d}.png", "frame{:d}.webp"])
def test_frame_folders_are_read_in_the_order_of_their_numbers(name: str, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "video", 20, name)
    write_pictures(folder, 3, "flow_x_{:05d}.jpg")
    (folder / "notes.txt").write_text("not a picture")
    frames = read_frames(folder, 5, 12)
    assert frames.shape == (5, 12, 16, 3)
    assert brightness(frames) == [2, 6, 10, 14, 18]
    assert brightness(read_frames(folder, 40, 24)) == [i // 2 for i in range(40)]
    assert brightness(read_frames(folder / name.format(8), 3, 24)) == [7] * 3  # a picture is a video of one frame


def test_bad_frame_folders_are_named(tmp_path: Path) -> None:
    empty, mixed, damaged, sizes = (tmp_path / name for name in ("empty", "mixed", "damaged", "sizes"))
    empty.mkdir()
    write_pictures(write_pictures(mixed, 2), 2, "img_{:05d}.jpg")
    (write_pictures(damaged, 4) / "image_00002.jpg").write_bytes(b"\xff\xd8nothing\x00")
    write_pictures(write_pictures(sizes, 1), 1, "image_9{:d}.jpg", (50, 24))
    for folder, message in (
        (empty, "empty: holds no pictures. Expected one video's frames, such as image_00001.jpg"),
        (mixed, "mixed: holds pictures of 2 kinds, such as image_00002.jpg, img_00002.jpg. Expected one video's"),
        (damaged, "image_00002.jpg: not a readable picture"),
        (sizes, "sizes: its frames have different sizes"),
    ):
        with pytest.raises(VideoError, match=re.escape(message)):
            read_frames(folder, 4, 16)


class Made(FrameSource):
    """Frames of noise by their number, made when they are read; the length is a guess until then."""

    def __init__(self, path: Path, count: int = 10, claimed: int = 40) -> None:
        self.seed, self.count, self.length = int(path.stem), count, claimed

    def __len__(self) -> int:
        return self.length

    def read(self, numbers: Sequence[int], short_side: int) -> list[np.ndarray]:
        assert list(numbers) == sorted(set(numbers))
        self.length = self.count
        return [self.frame(number, short_side) for number in numbers if number < self.count]

    def frame(self, number: int, side: int) -> np.ndarray:
        return np.random.default_rng((self.seed, number)).integers(0, 256, (side, side, 3), np.uint8)


def made_items(count: int, split: str = "train") -> list[Item]:
    return [Item(Path(f"{i}"), ("abc"[i % 3],), split) for i in range(count)]


def test_a_source_of_ones_own() -> None:
    source = Made(Path("7"))
    frames = sample_frames(source, 5, 18)
    assert len(source) == 10  # it claimed 40
    np.testing.assert_array_equal(frames, [source.frame(number, 18) for number in (1, 3, 5, 7, 9)])
    clips = Clips(made_items(3), "abc", Preprocessing(size=16, num_frames=5), opener=Made)
    for i, sample in enumerate(clips[0, position] for position in range(3)):
        wanted = [Made(Path(str(i))).frame(number, 18)[1:17, 1:17] for number in (1, 3, 5, 7, 9)]
        assert sample.video is not None
        np.testing.assert_array_equal(sample.video.permute(0, 2, 3, 1), wanted)
        assert (sample.target, sample.position, sample.errors) == (i, i, ())
    with pytest.raises(VideoError, match="holds no frame"):
        sample_frames(Made(Path("7"), 0, 0), 4, 16)


# -------------------------------------------------------------------------------------------------------------- cache


class Counting:
    """Opens videos, and remembers which."""

    def __init__(self) -> None:
        self.opened: list[Path] = []

    def __call__(self, path: Path) -> FrameSource:
        self.opened.append(path)
        return open_source(path)


def videos(clips: Clips, epoch: int = 0) -> list[Any]:
    return [clips[epoch, i].video for i in range(len(clips))]


def assert_equal(one: Sequence[Any], other: Sequence[Any]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_clips_in_memory_and_from_the_cache_are_the_decoded_ones(data: Path, tmp_path: Path) -> None:
    items, opener = load_items(data)[:5], Counting()
    for training, epoch in itertools.product((True, False), (0, 3)):
        memory = Clips(items, CLASSES, PREP, training, 1).load_into_memory()
        for _ in range(2):  # written, then read
            cached = Clips(items, CLASSES, PREP, training, 1, tmp_path / "cache", opener)
            assert_equal(videos(memory, epoch), videos(cached, epoch))
        assert_equal(videos(memory, epoch), videos(cached.load_into_memory(), epoch))
    assert_equal(videos(Clips(items, CLASSES, PREP)), videos(cached))
    assert opener.opened == [item.path for item in items]  # each once
    assert len(list((tmp_path / "cache").iterdir())) == 5


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text"])
def test_damaged_entries_are_decoded_again(damage: str, data: Path, tmp_path: Path) -> None:
    path = load_items(data)[0].path
    cache = FrameCache(tmp_path, 4, 18)
    whole, count = cache.read(path, range(12))
    assert count == 24
    raw = cache.file(path).read_bytes()
    flipped = raw[:-100] + bytes([raw[-100] ^ 1]) + raw[-99:]
    damaged = {"empty": b"", "cut": raw[:-10], "flipped": flipped, "text": b"hello" * 9}
    cache.file(path).write_bytes(damaged[damage])
    with pytest.warns(UserWarning, match=r"is damaged \((.|\n)*\); .*\.mp4 is decoded again"):
        np.testing.assert_array_equal(cache.read(path, range(12))[0], whole)
    np.testing.assert_array_equal(cache.read(path, [3, 0, 3])[0], whole[[3, 0, 3]])


@pytest.mark.filterwarnings("error")
def test_replaced_videos_are_decoded_again(data: Path, tmp_path: Path) -> None:
    path, cache = tmp_path / "a.mp4", FrameCache(tmp_path / "cache", 4, 18)
    for item in load_items(data)[:2]:
        path.write_bytes(item.path.read_bytes())
        np.testing.assert_array_equal(cache.read(path, range(12))[0], read_frames(item.path, 12, 18))
    path.unlink()
    with pytest.raises(VideoError, match="no such file"):
        cache.read(path, [0])


@pytest.mark.parametrize("where", ["the folder", "an entry"])
def test_a_cache_that_cannot_be_written_costs_nothing_but_time(where: str, data: Path, tmp_path: Path) -> None:
    items, folder = load_items(data)[:3], tmp_path / "cache"
    if where == "the folder":
        folder.write_text("a file in its place")
    else:  # safetensors has one error for this and a full disk
        entry = FrameCache(folder, PREP.num_frames, PREP.short_side).file(items[0].path)
        entry.with_suffix(f".{os.getpid()}.part").mkdir(parents=True)
    clips = Clips(items, CLASSES, PREP, cache=folder)
    with pytest.warns(UserWarning, match=r"Could not write .*cache .*\. Going on without keeping more;") as warned:
        assert_equal(videos(clips), videos(Clips(items, CLASSES, PREP)))
    assert len(warned) == 1


# -------------------------------------------------------------------------------------------------- clips and batches


def test_preprocessing_travels_with_a_model(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    from helpers import save_tiny_sofnet

    prep = Preprocessing(48, 5, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    model = toy_model()
    assert Preprocessing.of(model) == replace(Preprocessing(), size=8)  # the backbone's, and defaults
    model.preprocessing = prep.to_dict()
    assert Preprocessing.of(model) == prep
    saved = dynskip.StopOrForward.from_pretrained(save_tiny_sofnet(tmp_path / "model", prep))
    assert Preprocessing.of(saved) == prep


def test_normalized_pixels_have_the_networks_mean_and_deviation() -> None:
    prep = Preprocessing(2, 1, (0.5, 0.4, 0.0), (0.5, 0.2, 1.0))
    pixels = torch.tensor([255, 102, 51], dtype=torch.uint8).view(3, 1, 1).expand(2, 3, 2, 2)
    wanted = torch.tensor([1.0, 0.0, 0.2]).view(3, 1, 1).expand(2, 3, 2, 2)
    torch.testing.assert_close(prep.normalize(pixels), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "frames"), [(0, 4), (16, 0)])
def test_empty_clips_are_refused(size: int, frames: int) -> None:
    with pytest.raises(DynskipError, match=f"A clip of {frames} frames of {size} pixels is empty; give at least 1"):
        Preprocessing(size, frames)


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf")])
def test_normalisation_divides_by_positive_numbers(std: float) -> None:
    with pytest.raises(DynskipError, match="std="):
        Preprocessing(std=(1.0, std, 1.0))


def test_labels_that_the_model_does_not_know() -> None:
    with pytest.raises(
        DynskipError, match=r"1 classes that the model does not know, such as 'c'\. It was .* 2 classes"
    ):
        Clips(made_items(3), "ab", PREP)
    with pytest.raises(DynskipError, match=r"no class names.*Set model\.class_names"):
        Clips(made_items(3), None, PREP)


def test_each_epoch_draws_one_of_several_labels() -> None:
    items = [Item(Path("0"), ("b", "a", "c"), "train"), Item(Path("1"), ("c",), "train")]
    training, testing = (Clips(items, "abc", PREP, flag, 1, opener=Made) for flag in (True, False))
    counts = np.bincount([int(training[epoch, 0].target) for epoch in range(150)], minlength=3)
    assert counts.min() > 30
    assert {training[epoch, 1].target for epoch in range(9)} == {2}
    assert testing[0, 0].target == testing[5, 0].target == 1
    assert testing.multi_hot([1, 0]).tolist() == [[0, 0, 1], [1, 1, 1]]


def test_what_is_drawn_follows_from_seed_epoch_and_video() -> None:
    items = made_items(7)
    clips, other = (Clips(items, "abc", PREP, True, seed, opener=Made) for seed in (3, 4))
    untouched = torch.get_rng_state()
    early, late, again, others = (videos(c, epoch)[5] for c, epoch in ((clips, 0), (clips, 1), (clips, 1), (other, 0)))
    assert not torch.equal(early, late)
    assert not torch.equal(early, others)
    assert torch.equal(late, again)
    assert torch.equal(torch.get_rng_state(), untouched)
    epochs = [training_batches(chosen, epoch, 2) for chosen in (clips, other) for epoch in (0, 1)]
    orders = [[p for batch in epoch for p in batch.positions] for epoch in epochs]
    assert len({tuple(order) for order in orders}) == 4
    assert all(len(set(order)) == 6 for order in orders)  # the seventh fills no batch


def test_batches_do_not_depend_on_the_number_of_workers() -> None:
    clips = Clips(made_items(11), "abc", PREP, True, 3, opener=Made)
    for alone, shared in zip(training_batches(clips, 1, 5), training_batches(clips, 1, 5, workers=2), strict=True):
        assert torch.equal(alone.video, shared.video)
        assert torch.equal(alone.targets, shared.targets)
        assert alone.positions == shared.positions


@given(
    st.integers(1, 14), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.integers(0, 9)
)
def test_processes_and_parts_share_the_steps_of_one(
    count: int, share: int, parts: int, processes: int, first: int, epoch: int
) -> None:
    clips, size = Clips(made_items(count), "abc", PREP, True, 4, opener=Made), share * parts * processes
    if count < size:
        with pytest.raises(DynskipError, match=f"{count} training videos and a step has {size}. Make it smaller"):
            training_batches(clips, epoch, size)
        return
    alone = [batch.positions for batch in training_batches(clips, epoch, size)]
    assert len(alone) == count // size
    shares = [
        [batch.positions for batch in training_batches(clips, epoch, size, parts, 0, first, process, processes)]
        for process in range(processes)
    ]
    assert all(len(positions) == share for batches in shares for positions in batches)
    shared = [position for batches in zip(*shares, strict=True) for positions in batches for position in positions]
    assert shared == list(itertools.chain(*alone))[first * share * processes :]


@pytest.mark.parametrize(("size", "parts", "processes"), [(5, 1, 2), (0, 1, 1), (6, 2, 2)])
def test_steps_that_cannot_be_shared(size: int, parts: int, processes: int) -> None:
    message = f"A step of {size} videos cannot be shared evenly by {processes} processes in {parts} parts"
    with pytest.raises(DynskipError, match=message):
        training_batches(Clips(made_items(9), "abc", PREP, True), 0, size, parts, processes=processes)


@pytest.mark.parametrize("how", ["decoded", "in memory", "cached"])
def test_unreadable_videos_are_replaced_in_training_and_left_out_in_evaluation(
    how: str, data: Path, tmp_path: Path
) -> None:
    items = load_items(data)[:4]
    for position, name in ((1, "words.txt"), (2, "cut.mp4")):
        BAD_VIDEOS[name][0](tmp_path / name)
        items[position] = replace(items[position], path=tmp_path / name)
    training, evaluated = (
        Clips(items, CLASSES, PREP, flag, cache=tmp_path / "cache" if how == "cached" else None)
        for flag in (True, False)
    )
    if how == "in memory":
        training.load_into_memory(), evaluated.load_into_memory()
    sample = training[0, 1]
    assert (sample.position, sample.target) == (3, CLASSES.index(items[3].labels[0]))
    assert [Path(error.partition(": ")[0]).name for error in sample.errors] == ["words.txt", "cut.mp4"]
    assert torch.equal(videos(training)[1], videos(training)[3])
    (batch,) = training_batches(training, 0, 4)
    assert batch.video.shape == (4, 4, 3, 16, 16)
    assert len(batch.errors) == 3  # both from the first one's place, one from the second's

    loader = EvaluationLoader(evaluated, batch_size=3)
    assert len(loader) == 2
    for _ in range(2):
        (first, targets, paths), (second, _, _) = loader
        assert paths == [str(items[0].path)]
        assert targets.tolist() == [[int(name in items[0].labels) for name in CLASSES]]
        torch.testing.assert_close(second[0], PREP.normalize(videos(evaluated)[3]))
        assert first.dtype == torch.float32
        assert len(loader.unreadable) == 2


def test_nothing_but_unreadable_videos(tmp_path: Path) -> None:
    items = [Item(tmp_path / name, ("a",), "train") for name in ("a.mp4", "b.mp4")]
    for item in items:
        write_words(item.path)
    (batch,) = training_batches(Clips(items, "a", PREP, True), 0, 2)
    assert (batch.positions, len(batch.errors)) == ([], 4)
    loader = EvaluationLoader(Clips(items, "a", PREP))
    assert list(loader) == []
    assert len(loader.unreadable) == 2


# -------------------------------------------------------------------------------------------------------------- check


def test_check_passes_a_whole_set_and_fills_the_cache(data: Path, tmp_path: Path) -> None:
    items, cache = load_items(data), FrameCache(tmp_path, 4, 18, opener := Counting())
    for _ in range(2):
        report = report_on(items, list(check_videos(items, cache)), 4, cache=True)
        assert is_clean(report)
        assert report["splits"]["train"]["videos_per_class"] == dict.fromkeys(sorted(CLASSES), 2)
        assert report["splits"]["test"]["frames"] == [24, 24, 24]
        assert report["missing"] == report["unreadable"] == report["short"] == report["not_in_cache"] == []
    assert len(list(tmp_path.iterdir())) == len(opener.opened) == 18


def test_check_lists_what_is_wrong(tmp_path: Path) -> None:
    for name, count in (("good", 10), ("brief", 2), ("lossy", 5), ("other", 10)):
        write_pictures(tmp_path / name, count)
    write_words(tmp_path / "bad.mp4")
    rows = [("good", "0", 10), ("brief", "01", 2), ("lossy", "1", 9), ("gone", "1", 50), ("bad.mp4", "1", 50)]
    items = [Item(tmp_path / path, tuple(labels), "train", num_frames=count) for path, labels, count in rows]
    segments = (Segment(6, 11, "2"), Segment(1, 3, "2"), Segment(2, 4, "2"))
    items.append(Item(tmp_path / "other", ("2",), "val", segments, duration=10.0, num_frames=10))
    assert [coverage(items[0]), coverage(items[-1])] == [None, pytest.approx(0.7)]
    report = report_on(items, list(check_videos(items)), 4, cache=False)
    assert (report["videos"], report["readable"]) == (6, 4)
    assert report["missing"] == [str(tmp_path / "gone")]
    assert [error.partition(": ")[0] for error in report["unreadable"]] == [str(tmp_path / "bad.mp4")]
    assert report["short"] == [f"{tmp_path / 'brief'}: 2 frames"]
    assert report["fewer_frames_than_annotated"] == [f"{tmp_path / 'lossy'}: 5 of 9"]
    assert report["several_labels"] == [str(tmp_path / "brief")]
    assert report["labels_without_training_videos"] == ["2"]
    assert report["splits"]["train"]["videos_per_class"] == {"0": 2, "1": 2}
    assert report["splits"]["val"]["mean_share_of_length_in_segments"] == pytest.approx(0.7)
    assert not is_clean(report)
    text = summary(report)
    assert "train: 3 of 5 videos, 2 classes of 2 to 2 videos, 2 to 10 frames (median 5)" in text
    assert f"1 cannot be read:\n  {tmp_path / 'bad.mp4'}: " in text
    assert "1 are missing:" in text
    assert "segments cover 70 % of 1 videos" in text


class Deadly(type(Path())):  # type: ignore[misc]
    """A path that kills whoever looks at it."""

    def exists(self, **_: Any) -> bool:
        os.kill(os.getpid(), signal.SIGKILL)
        return True


def test_a_process_that_dies_while_checking_is_reported(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", np.zeros((4, 32, 32, 3), np.uint8))
    items = [Item(tmp_path / "a.mp4", ("x",), "train"), Item(Deadly(tmp_path / "b"), ("x",), "train")]
    with pytest.raises(DynskipError, match=r"A process that reads videos died after [01] of 2: .*/b\b"):
        list(check_videos(items, workers=1))
