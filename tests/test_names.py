"""Which video a name means, what a video is known by, and which files of a folder are videos."""

from __future__ import annotations

import os
import time
import unicodedata
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from dynskip import DynskipError

for needed in ("av", "PIL", "safetensors", "tqdm"):
    pytest.importorskip(needed)

import av  # noqa: E402
from PIL import Image  # noqa: E402

from dynskip.video import VideoError, load_items, open_source, open_video, sample_frames  # noqa: E402
from dynskip.video.cache import FrameCache  # noqa: E402
from dynskip.video.names import VideoFolder, counts_text, find_videos, stamp  # noqa: E402
from dynskip.video.stick_figures import write_video  # noqa: E402

FIRST, SECOND = "abcdEFGH-12_000010_000020", "abcdEFGH-12_000040_000050"


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"video")
    return path


def picture(path: Path, value: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((24, 32, 3), value, np.uint8)).save(path)
    return path


# -------------------------------------------------------------------------------------------------------- finding names


@pytest.mark.parametrize(
    ("name", "there", "found"),
    [
        (FIRST, [FIRST, SECOND], FIRST),
        (SECOND, [FIRST, SECOND], SECOND),
        (SECOND, [FIRST], None),
        (f"v_{SECOND}", [FIRST], None),
        (f"{SECOND}.mp4", [FIRST], None),
        ("abcdEFGH-12", [FIRST], FIRST),  # the only one that fits
        ("door_261126_103000", ["door_261126_101500"], None),
        ("abcdEFGH-12", [FIRST, "abcdEFGH-12"], "abcdEFGH-12"),
        ("v_abcdEFGH-12", ["abcdEFGH-12"], "abcdEFGH-12"),
        ("abcdEFGH-12.mp4", ["v_abcdEFGH-12"], "v_abcdEFGH-12"),
        ("abcdEFGH-12", ["ABCDEFGH-12"], None),  # names of web videos differ in case
    ],
)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_name_with_times_means_these_times(
    kind: str, name: str, there: list[str], found: str | None, tmp_path: Path
) -> None:
    if kind == "folder" and name.endswith(".mp4"):
        return
    for stem in there:
        if kind == "file":
            touch(tmp_path / "drumming" / f"{stem}.mp4")
        else:
            (tmp_path / "drumming" / stem).mkdir(parents=True)
    path = VideoFolder(tmp_path).find(f"drumming/{name}")
    assert (path.name.removesuffix(".mp4") if path.exists() else None) == found


def test_a_name_that_two_videos_fit_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / f"{FIRST}.mp4"), touch(tmp_path / f"{SECOND}.mp4")
    with pytest.raises(DynskipError, match=r"'abcdEFGH-12' could be .*_000010_000020\.mp4 or .*_000040_000050\.mp4"):
        VideoFolder(tmp_path).find("abcdEFGH-12")


Form = Literal["NFC", "NFD"]


@pytest.mark.parametrize("written", ["NFC", "NFD"])
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_names_are_found_in_the_other_unicode_form(written: Form, stored: Form, tmp_path: Path) -> None:
    folder, name = "süß", "Grün 走る"
    path = touch(tmp_path / unicodedata.normalize(stored, folder) / f"{unicodedata.normalize(stored, name)}.mp4")
    asked = unicodedata.normalize(written, f"{folder}/{name}")
    assert VideoFolder(tmp_path).find(asked) == VideoFolder(tmp_path).path(f"{asked}.mp4") == path
    (tmp_path / "labels.csv").write_text(f"path,label,split\n{asked}.mp4,a,train\n", encoding="utf-8")
    (tmp_path / "segments.csv").write_text(f"path,start,end\n{asked}.mp4,0,1\n", encoding="utf-8")
    assert [item.path for item in load_items(tmp_path)] == [path]


def test_both_unicode_forms_side_by_side_are_two_videos(tmp_path: Path) -> None:
    paths = [touch(tmp_path / "\u00e9.mp4"), touch(tmp_path / "e\u0301.mp4")]
    if len(list(tmp_path.iterdir())) == 2:  # some file systems have one form
        assert [VideoFolder(tmp_path).path(path.name) for path in paths] == paths


# ------------------------------------------------------------------------------------------------------ names as paths

ODD = (
    "match:final.mp4",
    "10:30.mp4",
    "2026-11-26T10:30:05.mp4",
    "file:plain.mp4",
    "concat:a|b.mp4",
    "-a.mp4",
    "%d.mp4",
)


def test_names_with_colons_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "plain.mp4", np.zeros((2, 32, 32, 3), np.uint8))
    for number, name in enumerate(ODD, start=1):
        write_video(tmp_path / "made.mp4", np.full((2, 32, 32, 3), 25 * number, np.uint8))
        (tmp_path / "made.mp4").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for folder in (Path(), tmp_path):
        (tmp_path / "labels.csv").write_text("path,label,split\n" + "".join(f"{name},a,train\n" for name in ODD))
        means = [sample_frames(open_source(item.path), 1, 32).mean() for item in load_items(folder)]
        assert means == pytest.approx([25 * number for number in range(1, len(ODD) + 1)], abs=4)
    with open_video("file:plain.mp4") as (container, stream):  # as a string it is an address
        assert next(container.decode(stream)).to_ndarray(format="gray").mean() < 30


# ------------------------------------------------------------------------------------------------------------ identity


def extract(folder: Path, value: int) -> None:
    for number in range(1, 6):
        picture(folder / f"img_{number:05}.png", value)


def test_pictures_that_were_extracted_again_are_noticed(tmp_path: Path) -> None:
    cache, folder = FrameCache(tmp_path / "cache", 2, 24), tmp_path / "video"
    for value in (20, 220):  # the same names and sizes, and the folder's own time stays
        extract(folder, value)
        assert cache.read(folder, [0])[0].mean() == value
    known = stamp(folder)
    os.utime(folder)
    assert stamp(folder) == known
    (folder / "img_00003.png").unlink()
    assert stamp(folder) != known


def test_frames_of_another_way_to_decode_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    def opener(path: Path) -> object:
        opened.append(path)
        return open_source(path)

    path, cache = picture(tmp_path / "a.png", 7), FrameCache(tmp_path / "cache", 2, 24, opener)  # type: ignore[arg-type]
    for version, times in ((1, 1), (1, 1), (2, 2), (2, 2)):
        monkeypatch.setattr("dynskip.video.cache.DECODING", version)
        cache.read(path, [0])
        assert len(opened) == times


def test_a_video_that_is_replaced_while_it_is_decoded_is_decoded_again(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", 7)

    def opener(path: Path) -> object:
        source = open_source(path)
        frames = source.read([0], 24)
        source.read = lambda *_: frames  # type: ignore[method-assign]
        time.sleep(0.02)
        picture(path, 99)  # after its frames were read, before they are kept
        return source

    assert FrameCache(tmp_path / "cache", 2, 24, opener).read(path, [0])[0].mean() == 7  # type: ignore[arg-type]
    assert FrameCache(tmp_path / "cache", 2, 24).read(path, [0])[0].mean() == 99


def test_a_name_that_is_not_utf8_can_be_kept(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    try:
        picture(tmp_path / "made.png", 7).rename(path)
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    cache = FrameCache(tmp_path / "cache", 2, 24)
    for _ in range(2):
        assert cache.read(path, [0])[0].mean() == 7
    assert cache.file(path).is_file()


# ------------------------------------------------------------------------------------------------------- a whole folder


def test_all_videos_of_a_folder_are_found_and_the_rest_is_counted(tmp_path: Path) -> None:
    corpus, disk = tmp_path / "corpus", tmp_path / "disk"
    names = ("a.mp4", "00001.MTS", "00002.m2ts", "rec.ts", "c.vob", "e.gif", "f.f4v", "g.y4m", "in/h.MOV")
    paths = [touch(corpus / name) for name in names]
    for name in ("a.srt", "b.SRT", "README", "in/notes.txt", "cover.jpg"):
        touch(corpus / name)
    touch(disk / "b.mp4")
    (corpus / "0_again").symlink_to(corpus, target_is_directory=True)  # a circle, which sorts before the rest
    (corpus / "more").symlink_to(disk, target_is_directory=True)
    (corpus / "more too").symlink_to(disk, target_is_directory=True)
    (corpus / "gone.mp4").symlink_to(disk / "gone.mp4")
    videos, left_out = find_videos(corpus)
    assert videos == sorted([*paths, corpus / "more" / "b.mp4"])
    assert left_out == {".srt": 2, "no suffix": 1, ".txt": 1, ".jpg": 1, ".mp4": 1}
    assert counts_text(left_out).startswith(".srt 2, ")


FORMS = {
    ".mts": ("mpegts", "libx264"), ".m2ts": ("mpegts", "libx264"), ".ts": ("mpegts", "libx264"),
    ".vob": ("vob", "mpeg2video"), ".mpg": ("mpeg", "mpeg1video"), ".f4v": ("f4v", "libx264"),
    ".3g2": ("3g2", "mpeg4"), ".mxf": ("mxf", "mpeg2video"), ".ogv": ("ogg", "libtheora"), ".nut": ("nut", "mpeg4"),
    ".wmv": ("asf", "wmv2"), ".h264": ("h264", "libx264"), ".hevc": ("hevc", "libx265"), ".ivf": ("ivf", "libvpx"),
    ".y4m": ("yuv4mpegpipe", "rawvideo"), ".gif": ("gif", "gif"), ".mjpeg": ("mjpeg", "mjpeg"),
    ".apng": ("apng", "apng"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", FORMS)
def test_every_kind_of_video_is_found_and_read(suffix: str, tmp_path: Path) -> None:
    form, codec = FORMS[suffix]
    if codec not in av.codecs_available or form not in av.formats_available:
        pytest.skip(f"this FFmpeg cannot write {form} with {codec}")
    path = tmp_path / f"clip{suffix.upper()}"
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = 64, 48
        pixels = {"gif": "rgb8", "apng": "rgb24", "mjpeg": "yuvj420p"}
        stream.pix_fmt = pixels.get(codec, "yuv420p")
        for number in range(5):
            ground = np.full((48, 64, 3), 40 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(ground, format="rgb24")))
        container.mux(stream.encode(None))
    assert find_videos(tmp_path) == ([path], {})
    assert VideoFolder(tmp_path).find("clip") == path
    assert sample_frames(open_source(path), 2, 24).shape == (2, 24, 32, 3)


def test_what_is_not_there_has_no_stamp(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        stamp(tmp_path / "gone.mp4")
    with pytest.raises(VideoError, match="no such file"):
        FrameCache(tmp_path, 2, 24).read(tmp_path / "gone.mp4", [0])
