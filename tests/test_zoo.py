"""Frames that are read one by one are those of a full decode, on files of many kinds, whole and damaged."""

from __future__ import annotations

import functools
import random
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("av")
for needed in ("PIL", "safetensors", "tqdm"):
    pytest.importorskip(needed)

import av  # noqa: E402
import media  # noqa: E402

from dynskip.video import Item, VideoError, open_source, sample_frames, to_array  # noqa: E402
from dynskip.video.check import check_video  # noqa: E402
from dynskip.video.files import VideoFile, pixel_aspect  # noqa: E402

SIDE = 24
# Frames cannot be told by their packets' times, so that the file is decoded as a whole.
ONE_PASS = {"flat.h264", "vp8.webm", *(f"joined_{name}" for name in ("x264.mp4", "x264.mkv", "vp9.webm"))}
ONE_PASS |= {"joined_mpeg4.avi", "joined_x264.ts"}
# What their packets promise does not come after a seek: the whole file is decoded after all.
ASTRAY = {"refreshed.ts", "mpeg2.mpg"}
# Too few key frames to gain from.
NO_GAIN = {"one_key.mp4", "moves.gif", "fragments.mp4"}


def full_decode(path: Path) -> list[tuple[int | None, np.ndarray]]:
    """Decode a file from its start, and leave out what is damaged."""
    frames = []
    with av.open(str(path)) as container:
        stream: Any = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            try:
                frames += [(frame.pts, to_array(frame, SIDE, pixel_aspect(stream))) for frame in packet.decode()]
            except av.error.FFmpegError:
                continue
    return frames


def shown(source: VideoFile, path: Path) -> list[np.ndarray]:
    """Return what a full decode shows at the time of each frame: a lost one shows the last one before it."""
    frames = full_decode(path)
    if source.index.one_pass:
        return [frame for _, frame in frames]
    found, number = [], 0
    latest, until = frames[0][1], -1
    for moment in source.index.times:
        while number < len(frames) and (time := frames[number][0] or 0) <= moment:
            if time > until:  # what comes late is not shown
                latest, until = frames[number][1], time
            number += 1
        found.append(latest)
    return found


@functools.cache
def made(name: str, folder: Path) -> tuple[Path, list[np.ndarray]]:
    if not media.has_encoder(name):
        pytest.skip("this build of FFmpeg cannot make such a file")
    path = media.make(name, folder)
    return path, shown(VideoFile(path), path)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


def assert_same(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", media.WHOLE)
def test_any_frames_are_those_of_a_full_decode(name: str, zoo: Path) -> None:
    path, wanted = made(name, zoo)
    source, rng = VideoFile(path), random.Random(0)
    assert len(source) == len(wanted) == (40 if name == "edit_list.mp4" else media.COUNT)
    assert (source.one_pass != "") == (name in ONE_PASS)
    for count in (1, 3, 8, 20):
        numbers = sorted(rng.sample(range(len(wanted)), count))
        source = VideoFile(path)
        assert_same(source.read(numbers, SIDE), [wanted[number] for number in numbers])
        rng.shuffle(numbers)
        assert_same(list(VideoFile(path).read_each(numbers, SIDE)), [wanted[number] for number in numbers])
    assert_same(VideoFile(path).read(range(len(wanted)), SIDE), wanted)
    assert VideoFile(path).check() == ""
    two = VideoFile(path)
    two.read([len(wanted) // 3, len(wanted) - 4], SIDE)
    if name not in ONE_PASS | ASTRAY | NO_GAIN:
        assert two.decoded < len(wanted) / 1.5


@pytest.mark.parametrize("name", media.DAMAGED)
def test_damage_costs_frames_and_not_the_video(name: str, zoo: Path) -> None:
    path, wanted = made(name, zoo)
    rng, source = random.Random(0), VideoFile(path)
    for count in (1, 3, 8):
        numbers = sorted(rng.sample(range(len(wanted)), count))
        assert_same(VideoFile(path).read(numbers, SIDE), [wanted[number] for number in numbers])
        rng.shuffle(numbers)
        assert_same(list(VideoFile(path).read_each(numbers, SIDE)), [wanted[number] for number in numbers])
    damage = source.check()
    assert len(source) == len(wanted)
    kind, codec = name.split("_", 1)
    if kind == "broken" and codec != "x264.ts":
        assert damage.startswith(f"damaged: 1 of {media.COUNT} packets, ")
    if kind == "missing" and codec == "x265.mp4" and len(full_decode(path)) < len(wanted):  # its decoder says nothing
        assert damage.startswith("damaged: packets are missing, ")
    if kind == "cut":
        assert f"cut off: {len(wanted)} of {media.COUNT} frames are there" in damage
    if damage:
        with pytest.warns(UserWarning, match=r"damaged: |cut off: "):
            sample_frames(source, len(wanted), SIDE)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sample_frames(source, len(wanted), SIDE)


@given(
    st.lists(st.integers(0, 39), min_size=1, max_size=12), st.sampled_from(["open_gop.mp4", "vfr.mkv", "edit_list.mp4"])
)
def test_any_order_of_frames(zoo: Path, numbers: list[int], name: str) -> None:
    path, wanted = made(name, zoo)
    source = VideoFile(path)
    assert_same(list(source.read_each(numbers, SIDE)), [wanted[number] for number in numbers])


def test_a_frame_costs_what_lies_between_it_and_its_key_frame(zoo: Path) -> None:
    path, _ = made("vp9.webm", zoo)  # a key frame every 15 frames, and none is left out
    for numbers, decoded in (([15], 1), ([20], 6), ([20, 22], 8), ([20, 47], 6 + 3), ([47, 20], 3 + 6), ([3, 5], 6)):
        source = VideoFile(path)
        frames = source.read_each(numbers, SIDE)
        assert source.decoded == 0  # nothing is decoded before a frame is asked for
        list(frames)
        assert source.decoded == decoded


def test_lost_frames_are_refused_where_they_are_too_many(zoo: Path) -> None:
    path, wanted = made("broken_x265.mp4", zoo)
    lost = len(wanted) - len(full_decode(path))  # builds of FFmpeg differ in what they salvage
    assert len(wanted) == 60
    assert lost > 0
    damage = f"damaged: 1 of 60 packets, {lost} frame{'s' * (lost > 1)} lost"
    VideoFile(path, lost / 60).read([40], SIDE)
    with pytest.raises(VideoError, match=f"{damage}: more than the share of 0.0 that"):
        VideoFile(path, 0.0).read([40], SIDE)
    VideoFile(path, 0.0).read([20], SIDE)  # before the damage
    finding = check_video(Item(path, (), "train"))
    assert (finding.frames, finding.damage) == (60, damage)


def test_a_file_that_ends_a_seek_elsewhere_is_decoded_from_its_start(zoo: Path) -> None:
    path, wanted = made("refreshed.ts", zoo)
    source = VideoFile(path)
    assert not source.one_pass
    assert_same(source.read([30], SIDE), [wanted[30]])
    assert source.one_pass == "seeking did not give the frames that its packets promise"


@pytest.mark.parametrize(("aspect", "size", "wanted"), [
    ((64, 45), (90, 72), (48, 85)), ((4, 3), (144, 108), (48, 85)), ((1, 1), (128, 72), (48, 85)),
    ((1, 2), (96, 96), (96, 48)), ((100, 1), (96, 48), (48, 96)),
])  # fmt: skip
def test_pixels_have_the_shape_that_players_show(
    aspect: tuple[int, int], size: tuple[int, int], wanted: tuple[int, int], tmp_path: Path
) -> None:
    pictures = [np.full((size[1], size[0], 3), 100, np.uint8)] * 3
    path = media.write_video(tmp_path / "a.mp4", pictures=pictures, aspect=aspect)
    assert sample_frames(open_source(path), 2, 48).shape == (2, *wanted, 3)


@pytest.mark.parametrize(("height", "space"), [(96, None), (96, 1), (96, 6), (720, None), (720, 6), (720, 1)])
@pytest.mark.parametrize("limit", [1, 2])  # FFmpeg's numbers: BT.709 is 1, BT.601 is 6; limited range is 1, full is 2
def test_colours_are_those_that_players_show(height: int, space: int | None, limit: int, tmp_path: Path) -> None:
    colours = [(255, 255, 255), (0, 0, 0), (200, 30, 40), (30, 160, 60), (20, 40, 220)]
    true = {1: "ITU709", 6: "ITU601", None: "ITU709" if height > 576 else "ITU601"}[space]
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=5, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = height, height, "yuv420p"
        stream.codec_context.color_range = limit
        if space is not None:
            stream.codec_context.colorspace = space
        for colour in colours:
            plain = av.VideoFrame.from_ndarray(np.full((height, height, 3), colour, np.uint8), format="rgb24")
            frame: Any = plain.reformat(format="yuv420p", dst_colorspace=true, src_color_range=2, dst_color_range=limit)
            frame.colorspace = 2 if space is None else space
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for found, colour in zip(VideoFile(path).read(range(5), 24), colours, strict=True):
        assert np.abs(found[12, 12].astype(int) - colour).max() <= 4


@pytest.mark.parametrize(("matrix", "turned"), [
    ((0, 1, -1, 0), lambda x: np.rot90(x, -1)), ((0, -1, 1, 0), lambda x: np.rot90(x)),
    ((-1, 0, 0, -1), lambda x: x[::-1, ::-1]), ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
    ((1, 0, 0, -1), lambda x: x[::-1]), ((0, 1, 1, 0), lambda x: x.transpose(1, 0, 2)),
])  # fmt: skip
def test_pictures_are_turned_and_mirrored(matrix: tuple[int, int, int, int], turned: Any, tmp_path: Path) -> None:
    path = media.write_video(tmp_path / "a.mp4", pictures=[media.picture(number) for number in range(3)])
    upright = VideoFile(path).read([1], 24)[0]
    raw, one = path.read_bytes(), 1 << 16
    a, b, c, d = (one * value for value in matrix)
    identity = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    track = raw.index(identity, raw.index(identity) + 1)  # the first one is the whole film's
    path.write_bytes(raw[:track] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + raw[track + 36 :])
    np.testing.assert_array_equal(VideoFile(path).read([1], 24)[0], turned(upright))
