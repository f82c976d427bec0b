"""From a file to its answer: what does a stored video cost, decoding included?

    python benchmarks/file_to_answer.py --json file_to_answer.json

Three pipelines, each from the file on disk to the answer, on 16 frames spread over the video: a dense network after one
pass over the file, a dense network after seeking to each frame, and ours, which decodes what it looks at. Ours follows
the schedule of `common`: its gates are evaluated, then overruled, and the video ends after 14 frames. Times are CPU
time of the whole process, all threads together; wall-clock time stands beside. The files are made here, H.264 with
B-frames: a segment is encoded once, and its packets are written again and again up to the video's length.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import common
import numpy as np
import plot
import torch

from dynskip import StopOrForward
from dynskip.video import LazyClips, Preprocessing, open_video, to_array
from dynskip.video.files import VideoFile, pixel_aspect

RATE = 30
LENGTHS = {"10 s": 10, "2 min": 120, "1 h": 3600}
SHAPES = {"360p": (640, 360), "720p": (1280, 720)}
DISTANCES = (12, 60, 250)


def drawn(number: int, width: int, height: int, ground: np.ndarray) -> np.ndarray:
    """A moving camera over a coloured ground, a box that crosses it, and a little noise."""
    left, top = int(32 + 31 * math.sin(number / 20)), int(32 + 31 * math.cos(number / 33))
    picture = ground[top : top + height, left : left + width].copy()
    at = 7 * number % (width - width // 8)
    picture[height // 4 : height // 2, at : at + width // 8] = (3 * number) % 256
    noise = np.random.default_rng(number).integers(-6, 7, (height // 4, width // 4, 1), np.int16)
    noisy: np.ndarray = np.clip(picture + noise.repeat(4, 0).repeat(4, 1), 0, 255)
    return noisy.astype(np.uint8)


def make(path: Path, seconds: int, distance: int, shape: str) -> None:
    """Write a video of so many seconds, with a key frame every `distance` frames."""
    width, height = SHAPES[shape]
    blocks = np.random.default_rng(0).integers(30, 220, (height // 16 + 5, width // 16 + 5, 3), np.uint8)
    ground = blocks.repeat(16, 0).repeat(16, 1)
    total = seconds * RATE
    segment = min(300 // distance * distance, total)  # begins with a key frame
    options = {"g": str(distance), "preset": "fast", "x264-params": "scenecut=0:open-gop=0"}
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        packets = []
        for number in range(segment):
            frame = av.VideoFrame.from_ndarray(drawn(number, width, height, ground), format="rgb24")
            packets += stream.encode(frame)
        packets += stream.encode(None)
        kept = [(bytes(packet), packet.pts, packet.dts, packet.is_keyframe) for packet in packets]
        base = packets[0].time_base
        step = round(segment / (RATE * base))
        for number in range(total):
            again, (content, pts, dts, key) = number // segment, kept[number % segment]
            packet = av.Packet(content)
            packet.stream, packet.time_base = stream, base
            packet.pts, packet.dts = pts + again * step, dts + again * step
            packet.is_keyframe = key
            container.mux(packet)


def one_pass(path: Path, prep: Preprocessing) -> torch.Tensor:
    """Read the clip in one pass over the file, as most pipelines do."""
    with open_video(path) as (container, stream):
        count = stream.frames
        wanted = {int(count / prep.num_frames * (i + 0.5)) for i in range(prep.num_frames)}
        stream.codec_context.thread_count = 1
        aspect, frames = pixel_aspect(stream), []
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                frames.append(to_array(frame, prep.short_side, aspect))
    return prep.normalize(prep.crop(np.stack(frames)))[None]


def measure(pipeline: Callable[[], Any]) -> tuple[float, float]:
    """Return milliseconds of CPU time, and of wall-clock time."""
    cpu, wall = time.process_time(), time.perf_counter()
    pipeline()
    return 1000 * (time.process_time() - cpu), 1000 * (time.perf_counter() - wall)


def ours(model: StopOrForward, path: Path, prep: Preprocessing) -> tuple[int, int]:
    """Classify a file lazily; return the frames that were asked for, and decoded."""
    with LazyClips([VideoFile(path)], prep) as clip:
        output = model(clip)
        output.logits.sum().item()
        loaded = clip.loaded()[0]
    return loaded.frames, loaded.decoded


@torch.no_grad()
def scheduled(args: argparse.Namespace, path: Path, prep: Preprocessing) -> StopOrForward:
    """Return a model that follows the schedule on the clip of a file."""
    model, _ = common.build(args, args.size)
    with LazyClips([VideoFile(path)], prep) as clip:
        pooled = model.encode(clip).pooled
    stops = torch.tensor(common.schedule(len(pooled)))
    gates: list[Any] = [
        common.ScheduledGate(gate.gate, known[0], stops > n)
        for n, (gate, known) in enumerate(zip(model.gates, pooled, strict=True))
    ]
    return StopOrForward(model.backbone, gates, terminator=model.terminator).eval()


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--distances", nargs="+", type=int, choices=DISTANCES, default=list(DISTANCES))
    args = parser.parse_args(argv)
    report = common.Report(__doc__, args)
    prep = Preprocessing(args.size, common.FRAMES)
    rows = [
        (shape, length, distance) for length in args.lengths for shape in args.shapes for distance in args.distances
    ]
    with tempfile.TemporaryDirectory() as folder:
        for shape, length, distance in rows:
            path = Path(folder) / "video.mp4"
            make(path, LENGTHS[length], distance, shape)
            row(args, report, path, prep, f"{length}, {shape}, key {distance}")
    report.finish()
    print(plot.files([report.content]))


@torch.no_grad()
def row(args: argparse.Namespace, report: common.Report, path: Path, prep: Preprocessing, name: str) -> None:
    """Measure the three pipelines on one file, in turns."""
    model = scheduled(args, path, prep)
    network = model.backbone.model
    counted: dict[str, tuple[int, int]] = {}

    def dense(frames: torch.Tensor) -> None:
        network(frames[0]).mean(0).sum().item()

    def seeking() -> None:
        source = VideoFile(path)
        with LazyClips([source], prep) as clip:
            dense(clip.whole(None, "cpu"))
            counted["seeking"] = clip.loaded()[0].frames, clip.loaded()[0].decoded

    def lazily() -> None:
        counted["ours"] = ours(model, path, prep)

    pipelines: dict[str, Callable[[], Any]] = {
        "one pass": lambda: dense(one_pass(path, prep)),
        "seeking": seeking,
        "ours": lazily,
    }
    counted["one pass"] = (common.FRAMES, len(VideoFile(path)))
    times: dict[str, list[tuple[float, float]]] = {key: [] for key in pipelines}
    lazily()  # allocates, and chooses kernels
    for _ in range(1 if args.quick or name.startswith("1 h") else 3):
        for key, pipeline in pipelines.items():
            times[key].append(measure(pipeline))
    if counted["ours"][0] != common.ENDS_AFTER:
        raise RuntimeError(f"{name}: {counted['ours'][0]} frames were asked for, and {common.ENDS_AFTER} looked at.")
    gmacs = {"ours": float(model(clip_of(path, prep)).macs[0]) / 1e9}
    for key, measured in times.items():
        cpu, wall = zip(*measured, strict=True)
        asked, decoded = counted[key]
        extra = {"wall_ms": sorted(wall)[len(wall) // 2], "frames": asked, "decoded": decoded}
        report.add(f"{name}: {key}", cpu, gmacs.get(key, common.dense_gmacs(model, args.size)), **extra)
    wanted = 0.25 if name.startswith("2 min, 720p") else 1.0
    report.compare(f"{name}: ours", f"{name}: one pass", wanted)


def clip_of(path: Path, prep: Preprocessing) -> torch.Tensor:
    with LazyClips([VideoFile(path)], prep) as clip:
        return clip.whole(None, "cpu")


if __name__ == "__main__":
    main()
