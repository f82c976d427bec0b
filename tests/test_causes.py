"""Files that give no frames: each cause has its own words and advice, and the machine's faults are not the files'."""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av")
for needed in ("PIL", "safetensors", "tqdm"):
    pytest.importorskip(needed)

from PIL import Image  # noqa: E402

from dynskip.video import Item, MachineError, VideoError, open_source, sample_frames  # noqa: E402
from dynskip.video.cache import FrameCache  # noqa: E402
from dynskip.video.check import check_videos, is_clean, report_on, summary  # noqa: E402


def frames_of(path: Path, side: int = 16, count: int = 2) -> np.ndarray:
    return sample_frames(open_source(path), count, side)


def write_video(path: Path, codec: str = "libx264", options: dict[str, str] | None = None, count: int = 8) -> Path:
    with av.open(os.fspath(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(count):
            noise = np.random.default_rng(number).integers(0, 255, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode(None))
    return path


# ------------------------------------------------------------------------------------------------------ what files say


def encrypted(path: Path, codec: str) -> None:
    """Write a film as shops deliver it (Common Encryption)."""
    key = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "01" * 16, "encryption_kid": "fe" * 16}
    write_video(path, codec, key)


def cut(path: Path, front: bool) -> None:
    """Write a film whose last part was never fetched; its index is at the front or the back."""
    whole = write_video(path, options={"movflags": "faststart"} if front else {}).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def song(path: Path) -> None:
    """Write sound with a cover picture in ID3v2.3."""
    Image.new("RGB", (32, 32), "red").save(path.with_suffix(".png"))
    with av.open(os.fspath(path), "w", format="mp3") as container:
        stream = container.add_stream("mp3", rate=44100, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        silence.rate = 44100
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    cover = b"\0image/png\0\x03\0" + path.with_suffix(".png").read_bytes()
    frame = b"APIC" + struct.pack(">IH", len(cover), 0) + cover
    size = bytes((len(frame) >> shift) & 127 for shift in (21, 14, 7, 0))
    path.write_bytes(b"ID3\x03\0\0" + size + frame + path.read_bytes())


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty.mp4": (Path.touch, r"is empty \(0 bytes\)\. Fetch it again"),
    "page.mp4": (lambda p: p.write_text("<html>404</html>"), "is a web page, no video: its download failed"),
    "page.mkv": (lambda p: p.write_text("\ufeff\n<!DOCTYPE html>\n<p>caf\u00e9"), "is a web page, no video"),
    "page.png": (lambda p: p.write_text("<HTML>404"), "is a web page, no picture"),
    "list.mp4": (lambda p: p.write_text("a.mp4,jump,train\n"), "is text, no video"),
    "lfs.mp4": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
    "zeros.mp4": (lambda p: p.write_bytes(bytes(9999)), "begins with zeros: its download never got that far"),
    "noise.mp4": (lambda p: p.write_bytes(np.random.default_rng(0).bytes(5000)), "Try to play or re-encode it"),
    "cut.mp4": (lambda p: cut(p, front=False), r"is cut off: \d+ of at least \d+ bytes are there"),
    "drm.mp4": (lambda p: encrypted(p, "libx264"), r"is encrypted \(DRM\): .*encoding it again does not help"),
    "drm_mpeg4.mp4": (lambda p: encrypted(p, "mpeg4"), r"is encrypted \(DRM\)"),
    "song.mp3": (song, "holds no video, only a cover picture"),
    "pipe.mp4": (os.mkfifo, "is a pipe, .*stream_video.py"),
    "pipe.png": (os.mkfifo, "is a pipe"),
    "gone.mp4": (lambda p: None, r"no such file\.$"),
    "gone/a.mp4": (lambda p: p.parent.touch(), r"no such file\.$"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_file_is_told_by_its_own_fault(name: str, tmp_path: Path) -> None:
    make, message = FAULTS[name]
    make(tmp_path / name)
    with pytest.raises(VideoError, match=f"^{re.escape(str(tmp_path / name))}: .*{message}") as caught:
        frames_of(tmp_path / name)
    assert "\n" not in str(caught.value)
    if name != "noise.mp4":
        assert "re-encode" not in str(caught.value)
    (finding,) = check_videos([Item(tmp_path / name, ("a",), "train")])
    assert finding.missing == ("gone" in name)
    assert bool(finding.error) == ("gone" not in name)


def test_sockets_and_devices_are_no_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket has to be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.mp4")
        with pytest.raises(VideoError, match="is a socket"):
            open_source(Path("socket.mp4"))
    with pytest.raises(VideoError, match="is a device"):
        open_source(Path(os.devnull))


def test_a_film_whose_sound_has_a_cover_is_a_film(tmp_path: Path) -> None:
    """The cover comes first and is larger; the film is what is read."""
    picture = Image.new("RGB", (128, 128), "red")
    picture.save(tmp_path / "cover.png")
    with av.open(os.fspath(tmp_path / "film.mp4"), "w") as container:
        cover = container.add_stream("png", rate=1)
        cover.width = cover.height = 128
        cover.pix_fmt = "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic.value  # av 15 takes a number
        film = container.add_stream("libx264", rate=10)
        film.width, film.height, film.pix_fmt = 64, 48, "yuv420p"
        container.mux(cover.encode(av.VideoFrame.from_image(picture)))
        for _ in range(4):
            grey = np.full((48, 64, 3), 128, np.uint8)
            container.mux(film.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(film.encode(None))
    assert frames_of(tmp_path / "film.mp4", 48).shape == (2, 48, 64, 3)


# ------------------------------------------------------------------------------------------------ faults of the machine

MACHINE: dict[str, tuple[BaseException, str]] = {
    "permission": (PermissionError(errno.EACCES, "Permission denied"), "no permission to read it.*chmod"),
    "not permitted": (OSError(errno.EPERM, "Operation not permitted"), "no permission to read it"),
    "descriptors": (OSError(errno.EMFILE, "Too many open files"), r"this process has too many open files.*ulimit -n"),
    "all descriptors": (OSError(errno.ENFILE, "Too many open files in system"), "this machine has too many open files"),
    "disk": (OSError(errno.EIO, "Input/output error"), "disk or network drive.*failed.*Try again later"),
    "stale": (OSError(errno.ESTALE, "Stale file handle"), "disk or network drive.*failed"),
    "memory": (MemoryError("no more"), "memory ran out.*fewer workers"),
    "no memory": (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory ran out"),
}


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return write_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("name", MACHINE)
@pytest.mark.parametrize("call", ["av.open", "PIL.Image.open", "pathlib.Path.stat"])
def test_a_fault_of_the_machine_is_not_the_files(
    call: str, name: str, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, message = MACHINE[name]
    if call.startswith("PIL"):
        Image.new("RGB", (8, 8)).save(video := video.with_suffix(".png"))

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    items = [Item(video, ("a",), "train")]
    with monkeypatch.context() as patch:
        if not (call.endswith("stat") and isinstance(error, MemoryError)):
            patch.setattr(call, fail)
            with pytest.raises(MachineError, match=f"^{re.escape(str(video))}: .*{message}") as caught:
                frames_of(video)
            assert not isinstance(caught.value, VideoError)
            assert "re-encode" not in str(caught.value)
            findings = list(check_videos(items))
            report = report_on(items, findings, 4, cache=False)
            assert (report["unreadable"], report["missing"]) == ([], [])
            assert len(report["not_checked"]) == 1
            assert not is_clean(report)
            assert "1 could not be checked, which is this machine's fault" in summary(report)
    (finding,) = check_videos(items)
    assert finding.frames


def test_the_cache_tells_a_fault_of_the_machine(video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FrameCache(tmp_path / "cache", 4, 16)
    cache.read(video, range(4))

    stat = Path.stat

    def fail(path: Path, **options: Any) -> Any:
        if path == video:
            raise OSError(errno.EIO, "Input/output error")
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", fail)
    with pytest.raises(MachineError, match="disk or network drive"):
        cache.read(video, range(4))


# ------------------------------------------------------------------------------------------------------------ pictures


def save_all(folder: Path, *names: str, value: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.new("L", (8, 8), value).save(folder / name)
    return folder


def names_of(folder: Path) -> list[str]:
    source: Any = open_source(folder)
    return [file.name for file in source.files]


@pytest.mark.parametrize(
    "names",
    [
        ("img_9.png", "img_10.png", "img_00011.png"),
        ("1700000000.000.png", "1700000001.001.png", "1700000001.5.png"),  # times: one number each
        ("0.5.png", "9.25.png", "9.3.png", "10.1.png"),
        ("cam_1700000000.900.png", "cam_1700000001.100.png"),
        ("2026-11-26_10-30-59.png", "2026-11-26_10-31-05.png", "2026-11-27_00-00-00.png"),
        ("door_20261126T103005.png", "door_20261126T103105.png", "door_20261127T000000.png"),
        ("2026-11-26T10:30:05.250.png", "2026-11-26T10:31:00.000.png"),
    ],
)
def test_pictures_are_in_the_order_of_their_numbers(names: tuple[str, ...], tmp_path: Path) -> None:
    assert names_of(save_all(tmp_path, *reversed(names), "flow_x_00001.png", "cover.png")) == list(names)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("img_00001.png", "img_00002.png", "img_1.png"), "img_00001.png and img_1.png have the same number"),
        (("img_1.png", "img_1.jpg"), "img_1.jpg and img_1.png have the same number"),
        (("1.10.png", "1.1.png"), "1.1.png and 1.10.png have the same number"),
        (("2026-11-26_10-30-05.png", "20261126_103005.png"), "have the same number"),
        (("10_0001.png", "11_0001.png", "12_0001.png", "13_0001.png"), "4 kinds, such as 10_0001.png, 11_0001.png, 12"),
        (("v1.0001.png", "v2.0001.png"), "2 kinds, such as v1.0001.png, v2.0001.png"),
        (tuple(f"clip{n}_1.png" for n in range(300)), "300 kinds"),
    ],
)
def test_a_folder_of_several_videos_is_refused(names: tuple[str, ...], found: str, tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=found) as caught:
        names_of(save_all(tmp_path, *names))
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_pipes_in_a_folder_are_no_pictures(tmp_path: Path) -> None:
    os.mkfifo(save_all(tmp_path, "img_1.png") / "img_2.png")
    assert names_of(tmp_path) == ["img_1.png"]


@pytest.mark.parametrize("form", ["<u2", ">u2", "i4"])
def test_grey_pictures_of_16_bits_are_scaled(form: str, tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16)[None].repeat(8, 0)
    suffix = "png" if form == "<u2" else "tif"
    deep = Image.frombytes("I;16B", (64, 8), ramp.astype(form).tobytes()) if form == ">u2" else None
    (deep or Image.fromarray(ramp.astype(form))).save(tmp_path / f"deep.{suffix}")
    (tmp_path / f"deep.{suffix}").rename(tmp_path / "deep.png")  # Pillow looks at the content
    frame = frames_of(tmp_path / "deep.png", 8, 1)[0]
    np.testing.assert_array_equal(frame, np.rint(ramp / 257).astype(np.uint8)[..., None].repeat(3, -1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8), "is of mode F, numbers whose white is not known"),
        (np.arange(64, dtype=np.int32).reshape(8, 8) * 5000, "from 0 to 315000.*Scale them to 8 bits"),
    ],
)
def test_numbers_without_a_known_white_are_refused(values: np.ndarray, message: str, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "deep.tif")
    (tmp_path / "deep.tif").rename(tmp_path / "deep.png")
    with pytest.raises(VideoError, match=message):
        frames_of(tmp_path / "deep.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_the_camera_was_held(orientation: int, tmp_path: Path) -> None:
    upright = np.random.default_rng(0).integers(0, 255, (16, 32, 3), np.uint8)
    turned = (None, None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE",
              "ROTATE_270")[orientation]  # fmt: skip
    stored = Image.fromarray(upright)
    stored = stored.transpose(Image.Transpose[turned]) if turned else stored
    exif = stored.getexif()
    exif[0x112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(frames_of(tmp_path / "a.png")[0], upright)


def test_damaged_notes_lose_no_picture(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "white").save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff")
    assert frames_of(tmp_path / "a.png").min() == 255


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "palette", "key"])
def test_what_is_transparent_is_black(mode: str, tmp_path: Path) -> None:
    """A grey square on nothing, and under the nothing lies white or noise."""
    grey = np.full((16, 16), 200, np.uint8)
    grey[4:12, 4:12] = 128
    square = grey == 128
    if mode in ("palette", "key"):
        picture = Image.fromarray(grey)
        picture = picture.convert("P") if mode == "palette" else picture
        seen = picture.convert("RGB")
        transparent = picture.getpixel((0, 0))
        picture.save(tmp_path / "a.png", transparency=transparent)
    else:
        picture = Image.fromarray(np.dstack([grey, grey, grey, np.where(square, 255, 0)]).astype(np.uint8))
        picture.convert("RGBA" if mode == "PA" else mode).save(tmp_path / "a.png")
        seen = picture.convert("RGB")
    frame = frames_of(tmp_path / "a.png")[0]
    assert (frame[~square] == 0).all()
    np.testing.assert_array_equal(frame[square], np.asarray(seen)[square])


def test_half_of_an_alpha_is_half_of_the_light(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (200, 100, 50, 128)).save(tmp_path / "a.png")
    np.testing.assert_allclose(frames_of(tmp_path / "a.png")[0, 0, 0], [100, 50, 25], atol=1)


def test_a_picture_too_large_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    with pytest.raises(VideoError, match=r"a\.png: not a readable picture .*exceeds limit"):
        frames_of(tmp_path / "a.png")
