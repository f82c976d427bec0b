"""A labelled set of rendered video files, for trying out dynamic inference without a download.

    root = render_set(Path("runs/figures"), train_per_class=40, test_per_class=10)
    items = load_items(root)

Every video is untrimmed: a stick figure does one of six actions in one part of it. The rest are shots in which nothing
relevant happens: an empty scene, drifting shapes, a title card, the figure standing or walking by. An action swings
between two key poses. There are six poses in a ring, and each class is one step of the ring: a frame that shows one
pose fits two classes, and only several frames together tell which. Colours, backgrounds, sizes and positions are drawn
independently of the class.
"""

from __future__ import annotations

import colorsys
import itertools
import json
import multiprocessing
import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dynskip.errors import DynskipError

VERSION = 1  # raise when the pictures change, so that sets on disk are rendered anew
FPS = 12
NUM_FRAMES = 48
MIN_FRAMES = 24  # the shortest action, 30 % of these, still shows both of its poses
MIN_SIZE = 32
SPLITS = ("train", "test")

# Angles in degrees from straight down, positive towards where the figure faces: torso (hip to neck), then the
# upper and lower part of near arm, far arm, near leg, far leg.
POSES = {
    "arms_up": (180, 156, 168, -156, -168, 5, 3, -5, -3),
    "star": (180, 98, 104, -98, -104, 40, 37, -40, -37),
    "lunge": (176, 128, 132, -52, -48, 78, -2, -52, -64),
    "plank": (103, 8, 0, 14, 4, -58, -60, -66, -64),
    "crouch": (148, 62, 100, 50, 88, 112, -28, 98, -34),
    "kick": (192, -58, -42, 44, 66, 98, 94, -2, 2),
}
NEUTRAL = (180, 12, 16, -12, -4, 5, 1, -5, -3)
ACTIONS = {
    "jumping_jack": ("arms_up", "star"),
    "side_lunge": ("star", "lunge"),
    "mountain_climber": ("lunge", "plank"),
    "squat_thrust": ("plank", "crouch"),
    "squat_kick": ("crouch", "kick"),
    "high_kick": ("kick", "arms_up"),
}
CLASSES = tuple(sorted(ACTIONS))

Array = NDArray[Any]


@dataclass(frozen=True)
class Job:
    """One video to render: which one of which set, and where it goes."""

    root: Path
    label: str
    split: str
    index: int
    seed: int
    size: int
    num_frames: int

    @property
    def path(self) -> str:
        """Path of the file inside the set, with forward slashes."""
        return f"videos/{self.label}/{self.split}_{self.index:04d}.mp4"


# Drawing. Lengths and positions are shares of the picture's side, x to the right and y down. Every shape is a
# rounded box (centre x, y, half width, half height, angle, radius): a disc and a limb are ones without area.


def _basis(coordinates: Array, count: int) -> Array:
    """Weights (len(coordinates), count) of a smooth interpolation between `count` values laid over 0..1."""
    distance = coordinates[:, None] * (count - 1) - np.arange(count)
    weights = np.exp(-1.5 * distance**2)
    return weights / weights.sum(1, keepdims=True)


def _coverage(shapes: Array, x: Array, y: Array) -> Array:
    """How much of every pixel each of the shapes (P, 6) covers, anti-aliased: (P, H, W)."""
    cx, cy, half_w, half_h, angle, radius = shapes.T.astype(np.float32)[:, :, None, None]
    dx, dy = x - cx, y[:, None] - cy
    out_w = np.maximum(np.abs(dx * np.cos(angle) + dy * np.sin(angle)) - half_w, 0)
    out_h = np.maximum(np.abs(dy * np.cos(angle) - dx * np.sin(angle)) - half_h, 0)
    return np.clip(0.5 + len(x) * (radius - np.sqrt(out_w * out_w + out_h * out_h)), 0, 1)


def _paint(image: Array, coverage: Array, colour: Array, opacity: float = 1.0) -> None:
    """Lay one colour over the image (3, H, W), in place, where any of the shapes (P, H, W) covers it."""
    image += (colour[:, None, None] - image) * (opacity * coverage.max(0))


def _colour(rng: np.random.Generator, luminance: float, vividness: float) -> Array:
    """A random hue (3,) at a given luminance."""
    rgb = np.array(colorsys.hsv_to_rgb(rng.random(), 1.0, 1.0))
    return np.clip(luminance + vividness * (rgb - rgb @ (0.3, 0.59, 0.11)), 0, 1).astype(np.float32)


class Scene:
    """A wall and a floor with a smooth gradient and uneven, low-frequency texture."""

    def __init__(self, rng: np.random.Generator, size: int, luminance: float) -> None:
        """Draw the colours and the texture."""
        self.pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
        shades, vividness = luminance + rng.uniform(-0.04, 0.04, 4), rng.uniform(0.05, 0.22, 4)
        corners = [_colour(rng, *pair) for pair in zip(shades, vividness, strict=True)]
        self.layers = [np.stack(corners, 1).reshape(3, 2, 2)]
        for count, strength in ((6, 0.02), (20, 0.012)):
            grey, tint = rng.normal(size=(1, count, count)), rng.normal(size=(3, count, count))
            self.layers.append((strength * (grey + 0.5 * tint)).astype(np.float32))
        self.horizon, self.floor = rng.uniform(0.7, 0.82), rng.uniform(0.75, 0.9)

    def draw(self, camera: Array) -> Array:
        """The empty scene (3, H, W), seen by a camera displaced by (x, y)."""
        x, y = self.pixels + camera[0], self.pixels + camera[1]
        image = sum(_basis(y, len(g[0])) @ g @ _basis(x, len(g[0])).T for g in self.layers)
        floor = np.clip((y - self.horizon) * 30, 0, 1)[:, None]
        return np.asarray(image * (1 - floor * (1 - self.floor)), dtype=np.float32)


class Actor:
    """A figure with fixed build and colours that can be drawn in any pose."""

    def __init__(self, rng: np.random.Generator, luminance: float, background: float) -> None:
        """Draw build and colours; the limbs stand out from a background of the given luminance."""
        self.height = rng.uniform(0.56, 0.74)
        self.mirror = rng.choice((-1, 1))
        self.ground = rng.uniform(max(0.84, 1.12 * self.height), 0.94)
        self.margin = 0.5 * self.height + 0.04
        self.shirt, self.trousers, self.skin = (_colour(rng, luminance, rng.uniform(0.1, 0.45)) for _ in range(3))
        self.rim = np.full(3, background + 0.35 * (background - luminance), np.float32).clip(0, 1)

    def draw(self, image: Array, pixels: Array, pose: Array, x: float, camera: Array) -> None:
        """Draw the figure standing at `x`, its lower foot on the ground, onto the image (3, H, W)."""
        steps = np.stack((np.sin(np.radians(pose)) * self.mirror, np.cos(np.radians(pose))), 1)
        lengths = np.array((0.30, 0.17, 0.16, 0.17, 0.16, 0.24, 0.23, 0.24, 0.23))
        radii = np.array((0.072, 0.046, 0.04, 0.046, 0.04, 0.054, 0.046, 0.054, 0.046, 0.098))
        steps *= lengths[:, None]
        neck = steps[0]
        shoulder, head = neck * 0.88, neck * 1.4
        starts = np.stack((neck * 0, shoulder, shoulder + steps[1], shoulder, shoulder + steps[3],
                           neck * 0, steps[5], neck * 0, steps[7], head))  # fmt: skip
        ends = starts + np.vstack((steps, np.zeros(2)))
        hip = np.array((x, self.ground - self.height * (ends[:9, 1] + radii[:9]).max())) - camera
        delta = (ends - starts) * self.height
        centres = hip + self.height * starts + delta / 2
        shapes = np.column_stack((centres, np.hypot(*delta.T) / 2, np.zeros(10), np.arctan2(*delta.T[::-1]),
                                  radii * self.height))  # fmt: skip
        shadow = np.array([(hip[0], self.ground - camera[1], 0.2 * self.height, 0.0, 0.0, 0.025)])
        _paint(image, _coverage(shadow, pixels, pixels), np.zeros(3, np.float32), 0.3)
        cover = _coverage(shapes, pixels, pixels)
        shapes[:, 5] += 0.014
        _paint(image, _coverage(shapes, pixels, pixels), self.rim, 0.8)
        for parts, colour, shade in (
            ((7, 8), self.trousers, 0.8), ((3, 4), self.shirt, 0.8), ((5, 6), self.trousers, 1.0),
            ((0,), self.shirt, 0.92), ((9,), self.skin, 1.0), ((1, 2), self.shirt, 1.0),
        ):  # fmt: skip
            _paint(image, cover[list(parts)], colour * np.float32(shade))


class Clutter:
    """Balls, boxes and bars that drift and turn."""

    def __init__(self, rng: np.random.Generator, count: int) -> None:
        """Draw shapes, colours, and their ways."""
        self.shapes, self.ways = np.zeros((count, 6)), np.zeros((count, 6))
        for shape, way in zip(self.shapes, self.ways, strict=True):
            reach = rng.uniform(0.06, 0.13)
            kind = rng.integers(3)
            half_w, half_h, radius = ((0, 0, reach), (reach, 0.7 * reach, 0.01), (2 * reach, 0, 0.02))[kind]
            shape[:] = rng.uniform(0, 1), rng.uniform(0, 0.9), half_w, half_h, rng.uniform(0, np.pi), radius
            way[:2], way[4] = rng.uniform(-0.02, 0.02, 2), rng.uniform(-0.1, 0.1)
        self.colours = [_colour(rng, rng.uniform(0.15, 0.55), rng.uniform(0.1, 0.3)) for _ in range(count)]

    def draw(self, image: Array, pixels: Array, frame: int, camera: Array) -> None:
        """Draw the shapes where they are at a frame onto the image (3, H, W)."""
        shapes = self.shapes + frame * self.ways - (*camera, 0, 0, 0, 0)
        for cover, colour in zip(_coverage(shapes, pixels, pixels), self.colours, strict=True):
            _paint(image, cover[None], colour)


def _title_card(rng: np.random.Generator, size: int) -> Array:
    """A picture (3, H, W) of rows of word-like bars on a plain ground."""
    luminance = rng.uniform(0.15, 0.85)
    scene = Scene(rng, size, luminance)
    scene.floor = 1.0  # no floor
    image = scene.draw(np.zeros(2))
    words = []
    height = rng.uniform(0.018, 0.035)
    for row in np.arange(rng.uniform(0.15, 0.4), rng.uniform(0.6, 0.9), 4 * height):
        x = rng.uniform(0.08, 0.25)
        while x < 0.8:
            half = min(rng.uniform(0.03, 0.11), (0.93 - x) / 2)
            words.append((x + half, row, half, height * 0.7, 0, 0.3 * height))
            x += 2 * half + 0.05
    ink = np.full(3, luminance < 0.5, np.float32)
    _paint(image, _coverage(np.array(words), scene.pixels, scene.pixels), ink, 0.9)
    return image


def _shots(rng: np.random.Generator, num_frames: int) -> Iterator[tuple[str, int, int]]:
    """Cut a video into (kind, start, end): one action, and two or three distractors of different kinds."""
    action = round(rng.uniform(0.3, 0.6) * num_frames)
    kinds = list(rng.permutation(["empty", "clutter", "idle", "title"])[: rng.integers(2, 4)])
    shortest = (num_frames - action) // 6 + 1
    spare = num_frames - action - shortest * len(kinds)
    cuts = np.sort(rng.integers(0, spare + 1, len(kinds) - 1))
    lengths = list(shortest + np.diff(cuts, prepend=0, append=spare))
    place = int(rng.integers(len(kinds) + 1))
    kinds.insert(place, "action")
    lengths.insert(place, action)
    ends = list(itertools.accumulate(int(n) for n in lengths))
    return zip(map(str, kinds), [0, *ends], ends, strict=False)


def draw_video(label: str, rng: np.random.Generator, size: int, num_frames: int) -> tuple[Array, int, int]:
    """Draw one video.

    Args:
        label: one of `CLASSES`.
        rng: the only source of chance.
        size: height and width in pixels.
        num_frames: length in frames.

    Returns:
        The frames `(T, H, W, 3)` as uint8, and where the action starts and ends (half-open, in frames).
    """
    background = rng.uniform(0.2, 0.4)  # always darker than the figure, which eases learning
    scene = Scene(rng, size, background)
    actor = Actor(rng, background + rng.uniform(0.45, 0.55), background)
    behind = Clutter(rng, int(rng.integers(1, 4)) if rng.random() < 0.4 else 0)
    drift, noise = rng.uniform(-0.06, 0.06, 2), rng.uniform(0.008, 0.025)
    poses = [np.array(POSES[name], float) for name in ACTIONS[label]]
    period, phase = rng.uniform(7, 11), rng.uniform(0, 2 * np.pi)
    frames = np.empty((num_frames, size, size, 3), np.uint8)
    shots = list(_shots(rng, num_frames))
    for kind, start, end in shots:
        clutter = Clutter(rng, int(rng.integers(3, 7))) if kind == "clutter" else behind
        title = _title_card(rng, size) if kind == "title" else None
        home = rng.uniform(actor.margin, 1 - actor.margin)
        away = np.clip(home + rng.uniform(-0.15, 0.15), actor.margin, 1 - actor.margin)
        walks = rng.random() < 0.5
        for t in range(start, end):
            camera = drift * (t / num_frames - 0.5) + 0.004 * np.sin(t * np.array((0.9, 0.7)) + phase)
            image = scene.draw(camera) if title is None else title.copy()
            if kind in ("action", "clutter"):
                clutter.draw(image, scene.pixels, t - start, camera)
            swing = np.cos(2 * np.pi * t / period + phase)
            progress = (t - start) / (end - start)
            if kind == "action":
                # The movement lingers in its two poses, and passes quickly between them.
                share = 0.5 - 0.5 * np.tanh(1.5 * swing) / np.tanh(1.5)
                pose = poses[0] + (poses[1] - poses[0]) * share
                actor.draw(image, scene.pixels, pose, home + (away - home) * progress, camera)
            elif kind == "idle" and walks:
                stride = swing * np.array((0, 20, 25, -20, -15, -24, -28, 24, 20))
                x = 0.5 + actor.mirror * (1.1 * progress - 0.55)
                actor.draw(image, scene.pixels, NEUTRAL + stride, x, camera)
            elif kind == "idle":
                actor.draw(image, scene.pixels, np.array(NEUTRAL) + 2 * swing, home, camera)
            image += noise * rng.standard_normal(image.shape, dtype=np.float32)
            frames[t] = np.rint(255 * np.clip(image, 0, 1)).transpose(1, 2, 0)
    return next((frames, start, end) for kind, start, end in shots if kind == "action")


def write_video(path: Path, frames: Array, fps: int = FPS) -> None:
    """Encode frames `(T, H, W, 3)`, uint8, as H.264 in an .mp4 file; the same frames give the same bytes."""
    unfinished = path.with_suffix(".part")
    bitexact = {"fflags": "+bitexact"}
    with av.open(str(unfinished), "w", format="mp4", container_options=bitexact) as container:
        # One thread, and no choices of x264 that depend on the processor or on what lies in memory.
        options = {"preset": "veryfast", "crf": "23", "x264-params": "threads=1:mbtree=0:cpu-independent=1"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, fps)
        stream.codec_context.thread_count = 1
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    os.replace(unfinished, path)


def _render(job: Job) -> tuple[int, int]:
    """Draw and write one video; where its action starts and ends."""
    rng = np.random.default_rng((job.seed, SPLITS.index(job.split), CLASSES.index(job.label), job.index))
    frames, start, end = draw_video(job.label, rng, job.size, job.num_frames)
    write_video(job.root / job.path, frames)
    return start, end


def _check(root: Path, train_per_class: int, test_per_class: int, seed: int, size: int, num_frames: int) -> None:
    for name, value, least in (
        ("train_per_class", train_per_class, 1), ("test_per_class", test_per_class, 1), ("seed", seed, 0),
        ("size", size, MIN_SIZE), ("num_frames", num_frames, MIN_FRAMES),
    ):  # fmt: skip
        if value < least:
            raise DynskipError(f"{name} is {value}, expected at least {least}; give a larger one.")
    if size % 2:
        raise DynskipError(f"size is {size}, but H.264 video needs an even one; use {size + 1}.")
    if root.exists() and not root.is_dir():
        raise DynskipError(f"{root} is a file, expected a folder to write videos into; name another path.")


def render_set(
    root: Path,
    *,
    train_per_class: int,
    test_per_class: int,
    seed: int = 0,
    size: int = 96,
    num_frames: int = NUM_FRAMES,
) -> Path:
    """Render a set of videos, unless `root` already holds the same one.

    Writes `videos/<class>/<split>_<index>.mp4`, `labels.csv` (`path,label,split`), `segments.csv`
    (`path,start,end`: the frames of the action, half-open) and, last, `set.json`, which marks it complete.
    A video depends only on seed, class, split, index, size and length, so a larger set contains the smaller.
    Larger sets are drawn in several processes: a script that calls this needs `if __name__ == "__main__":`.

    Args:
        root: folder to write into; made where missing.
        train_per_class: videos per class in the split `train`.
        test_per_class: videos per class in the split `test`.
        seed: another number gives other videos.
        size: height and width in pixels, even.
        num_frames: length of each video in frames, at 12 per second.

    Returns:
        `root`.

    Raises:
        DynskipError: if a number is out of range, or `root` is a file.
    """
    root = Path(root)
    _check(root, train_per_class, test_per_class, seed, size, num_frames)
    wanted = json.dumps({
        "version": VERSION, "train_per_class": train_per_class, "test_per_class": test_per_class,
        "seed": seed, "size": size, "num_frames": num_frames,
    })  # fmt: skip
    jobs = [
        Job(root, label, split, index, seed, size, num_frames)
        for label in CLASSES
        for split, count in zip(SPLITS, (train_per_class, test_per_class), strict=True)
        for index in range(count)
    ]
    jobs.sort(key=lambda job: job.path)
    manifest, labels, segments = (root / name for name in ("set.json", "labels.csv", "segments.csv"))
    complete = all(path.is_file() for path in (manifest, labels, segments, *(root / job.path for job in jobs)))
    if complete and manifest.read_text(encoding="utf-8") == wanted:
        return root
    manifest.unlink(missing_ok=True)
    for label in CLASSES:
        folder = root / "videos" / label
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.iterdir():
            if re.fullmatch(r"(train|test)_\d{4,}\.(mp4|part)", stale.name):
                stale.unlink()
    parts = list(tqdm(_render_all(jobs), "render", len(jobs), leave=False, disable=None))
    labels.write_text("path,label,split\n" + "".join(f"{job.path},{job.label},{job.split}\n" for job in jobs))
    rows = (f"{job.path},{start},{end}\n" for job, (start, end) in zip(jobs, parts, strict=True))
    segments.write_text("path,start,end\n" + "".join(rows))
    manifest.write_text(wanted, encoding="utf-8")  # last: half of it would not count as complete
    return root


def _render_all(jobs: list[Job]) -> Iterator[tuple[int, int]]:
    """Render all videos, in order; in several processes where that pays for starting them."""
    workers = min(os.cpu_count() or 1, 8)
    if workers == 1 or len(jobs) < 100:
        yield from map(_render, jobs)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_render, jobs, chunksize=4)
