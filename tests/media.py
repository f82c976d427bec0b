"""Small media files of many kinds, each made in a moment: codecs, containers, times, damage."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np

COUNT = 60  # frames of a file of the zoo


def picture(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """Coloured blocks that drift: something to predict for any codec, and another picture each time."""
    blocks = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    return np.roll(blocks.repeat(8, 0).repeat(8, 1), 3 * number, 1)


def write_video(
    path: Path,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    form: str | None = None,
    times: Sequence[int] | None = None,
    pictures: Sequence[np.ndarray] | None = None,
    aspect: tuple[int, int] | None = None,
    prepare: Callable[[Any], object] = lambda stream: None,
    **options: str,
) -> Path:
    """Encode pictures `(H, W, 3)`; `times` are milliseconds, `aspect` is a pixel's, and `options` are the codec's."""
    pictures = [picture(number) for number in range(COUNT)] if pictures is None else pictures
    with av.open(os.fspath(path), "w", format=form) as container:
        stream: Any = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        if aspect:
            stream.codec_context.sample_aspect_ratio = Fraction(*aspect)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        prepare(stream)
        for number, pixels_of in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_of), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def copy_packets(
    source: Path, target: Path, change: Callable[[int, Any], Any], form: str | None = None, **options: str
) -> Path:
    """Copy a video's packets without encoding again; `change(number, packet)` returns a packet or `None`."""
    with av.open(os.fspath(source)) as old, av.open(os.fspath(target), "w", format=form, options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate([packet for packet in old.demux(video=0) if packet.size]):
            if (changed := change(number, packet)) is not None:
                changed.stream = stream
                new.mux(changed)
    return target


def overwritten(number: int, packet: Any, which: int = 31) -> Any:
    """Damage one packet in the middle of a video: its first 24 bytes, and 16 in its middle."""
    if number != which:
        return packet
    content = bytearray(bytes(packet))
    content[len(content) // 2 : len(content) // 2 + 16] = bytes(16)
    content[:24] = b"\xff" * 24
    bad = av.Packet(bytes(content))
    bad.pts, bad.dts, bad.time_base, bad.duration = packet.pts, packet.dts, packet.time_base, packet.duration
    return bad


def missing(number: int, packet: Any, which: int = 31) -> Any:
    """Leave one packet out."""
    return None if number == which else packet


def joined(number: int, packet: Any) -> Any:
    """Begin between two key frames, as a recorder does that tunes in late."""
    return packet if number > 12 else None


def shifted(number: int, packet: Any, seconds: Fraction) -> Any:
    """Move a packet in time."""
    shift = int(seconds / packet.time_base)
    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
    return packet


def unmarked(number: int, packet: Any) -> Any:
    """Call every frame a key frame."""
    packet.is_keyframe = True
    return packet


def _copied(path: Path, change: Callable[[int, Any], Any], whole: Callable[[Path], Path], **options: str) -> Path:
    return copy_packets(whole(path.with_name(f"whole_{path.name}")), path, change, **options)


def _cut_off(path: Path) -> Path:
    """A download that stopped: the index is in front, and the second half is not there."""
    whole = write_video(path.with_name(f"whole_{path.name}"), g="10")
    copy_packets(whole, path, lambda _, packet: packet, movflags="faststart")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    return path


def _lost_cues(path: Path) -> Path:
    """A Matroska file whose table of key frames points nowhere."""
    raw = write_video(path, g="12").read_bytes()
    start = raw.rindex(b"\x1c\x53\xbb\x6b")
    path.write_bytes(raw[:start] + bytes(len(raw) - start))
    return path


def _flat(path: Path) -> Path:
    """Encoded pictures one after the other, without a container."""
    return write_video(path, form="h264", g="12", bf="2")


_UNEVEN = [33 * i for i in range(40)] + [3000 + 500 * i for i in range(COUNT - 40)]
_PAUSED = [33 * i + 4000 * (i > 25) for i in range(COUNT)]
_X265: dict[str, Any] = {"x265-params": "log-level=none:keyint=15:bframes=3"}
_X265_OPEN: dict[str, Any] = {"x265-params": "log-level=none:keyint=12:open-gop=1"}
_VP8: dict[str, Any] = {"g": "15", "auto-alt-ref": "1", "lag-in-frames": "10"}
_REFRESHED: dict[str, Any] = {"g": "12", "x264-params": "intra-refresh=1:bframes=0"}
_VP9: dict[str, Any] = {"g": "15", "deadline": "realtime", "cpu-used": "8"}
_OPEN: dict[str, Any] = {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}
x264, plain = partial(write_video, g="12"), partial(write_video, g="15", bf="0")
mpeg4 = partial(write_video, codec="mpeg4", g="12")
vp9 = partial(write_video, codec="libvpx-vp9", **_VP9)
x265 = partial(write_video, codec="libx265", **_X265)

# Whole files. Those of `ONE_PASS` cannot be sought exactly, and are decoded from their start.
WHOLE: dict[str, Callable[[Path], Path]] = {
    "x264.mp4": x264,
    "x264.mov": x264,
    "x264.mkv": x264,
    "x264.ts": partial(x264, form="mpegts"),
    "x264.flv": x264,
    "fragments.mp4": partial(_copied, change=lambda _, p: p, whole=x264, movflags="frag_keyframe+empty_moov"),
    "x265.mp4": x265,
    "x265_open.mkv": partial(write_video, codec="libx265", **_X265_OPEN),
    "vp9.webm": vp9,
    "vp8.webm": partial(write_video, codec="libvpx", **_VP8),
    "av1.mp4": partial(write_video, codec="libsvtav1", g="15", preset="12"),
    "mpeg4.avi": mpeg4,
    "mpeg4_b.mp4": partial(mpeg4, bf="2"),
    "mpeg4_b.avi": partial(mpeg4, bf="2"),
    "mpeg2.ts": partial(write_video, codec="mpeg2video", form="mpegts", g="12", bf="2"),
    "mpeg2.mpg": partial(write_video, codec="mpeg2video", g="12", bf="2"),
    "mjpeg.avi": partial(write_video, codec="mjpeg", pixels="yuvj420p"),
    "wmv2.wmv": partial(write_video, codec="wmv2", g="12"),
    "moves.gif": partial(write_video, codec="gif", pixels="rgb8"),
    "raw.y4m": partial(write_video, codec="rawvideo", form="yuv4mpegpipe"),
    "flat.h264": _flat,
    "open_gop.mp4": partial(write_video, **_OPEN),
    "open_gop.mkv": partial(write_video, **_OPEN),
    "refreshed.ts": partial(write_video, form="mpegts", **_REFRESHED),
    "one_key.mp4": partial(write_video, g="250"),
    "vfr.mkv": partial(x264, times=_UNEVEN),
    "vfr.mp4": partial(x264, times=_UNEVEN),
    "pause.mkv": partial(x264, times=_PAUSED),
    "edit_list.mp4": partial(
        _copied, change=partial(shifted, seconds=Fraction(-20, 25)), whole=plain, avoid_negative_ts="disabled"
    ),
    "late.ts": partial(_copied, change=partial(shifted, seconds=Fraction(10)), whole=x264),
    "lost_cues.mkv": _lost_cues,
    "all_keys.mkv": partial(_copied, change=unmarked, whole=plain),
    "all_keys_mpeg4.avi": partial(_copied, change=unmarked, whole=mpeg4),
}
DAMAGED: dict[str, Callable[[Path], Path]] = {
    f"{kind}_{name}": partial(_copied, change=change, whole=whole)
    for kind, change in (("broken", overwritten), ("missing", missing), ("joined", joined))
    for name, whole in (
        ("x264.mp4", plain), ("x264.mkv", x264), ("x265.mp4", x265), ("vp9.webm", vp9), ("mpeg4.avi", mpeg4),
        ("x264.ts", x264),
    )
} | {"cut_off.mp4": _cut_off}  # fmt: skip


def make(name: str, folder: Path) -> Path:
    """Make a file of the zoo."""
    return (WHOLE | DAMAGED)[name](folder / name)


def has_encoder(name: str) -> bool:
    """Whether this build of FFmpeg can make a file of the zoo."""
    maker: Any = (WHOLE | DAMAGED)[name]
    codecs = re.findall(r"codec='(\w+)'", repr(maker))
    try:
        return all(av.codec.Codec(codec, "w") for codec in codecs)
    except ValueError:
        return False
