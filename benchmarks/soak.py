"""Does a server of cameras run for long without falling behind, growing or mixing anything up?

    python benchmarks/soak.py --minutes 10 --cameras 64 --json soak.json

Synthetic cameras send ten frames a second each. From some moment on, some die, end, stall, or send damaged frames;
others are removed and added from another thread. A camera that has ended is added again. Every video is run again
alone, in a session, and has to give the same; every stream has to end for the reason that it had; no frame may be older
than the bound when it is decided; and memory has to stay what it was after a tenth of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import math
import random
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from torch import Tensor, nn

from dynskip import (
    DynskipError,
    EarlyTerminator,
    FrameResult,
    PolicyGate,
    StopOrForward,
    StreamEnd,
    StreamServer,
    VideoResult,
    stage_model,
)

SIZE, FRAMES_A_SECOND, RATES, IDLE = 16, 10.0, (1.0, 2.0, 4.0, None), 5.0
# How a camera goes wrong, and the error with which its stream then ends.
FAULTS: dict[str, type[Exception] | None] = {
    "": None,
    "dies": OSError,
    "ends": None,
    "stalls": DynskipError,
    "nan": DynskipError,
    "channels": DynskipError,
    "size": DynskipError,
    "dtype": DynskipError,
}


class Shot(NamedTuple):
    """A frame of a camera, and which one it is."""

    camera: str
    life: int
    number: int
    pixels: Tensor


def pictures(count: int) -> Tensor:
    """Return some pictures `(count, 3, SIZE, SIZE)`, always the same, that differ in colour and contrast."""
    source = torch.Generator().manual_seed(0)
    colour = 1.5 * torch.randn(count, 3, 1, 1, generator=source, dtype=torch.float64)
    return colour + torch.randn(count, 3, SIZE, SIZE, generator=source, dtype=torch.float64)


PICTURES = pictures(509)


@torch.no_grad()
def small_model(state_update: Any) -> StopOrForward:
    """Build a small network in float64 whose gates stop about a quarter of the frames that reach them."""
    torch.manual_seed(0)
    widths = (3, 8, 12, 16)
    stages = [nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.Tanh()) for a, b in itertools.pairwise(widths)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    network = nn.Sequential(*stages, head).double().eval()
    for parameter in network.parameters():
        parameter.mul_(3)
    backbone = stage_model(network, input_size=(3, SIZE, SIZE))
    gates = [PolicyGate(width, hidden=16, forward_bias=0.0).double() for width in backbone.num_features]
    model = StopOrForward(backbone, gates, terminator=EarlyTerminator(0.3, 3), state_update=state_update).eval()
    encoded = model.encode(pictures(96).unflatten(0, (32, 3)))
    for gate, pooled in zip(gates, encoded.pooled, strict=True):
        gate.decide.weight.mul_(9)
        logits, _ = gate(pooled.flatten(0, 1), gate.initial_state(96))
        gate.decide.bias[1] -= logits.diff(dim=1).quantile(0.25)
    return model


def fault_of(camera: str, life: int) -> str:
    """Return how a camera goes wrong in one of its lives."""
    draw = random.Random(f"{camera} {life}")
    return draw.choice(list(FAULTS)) if draw.random() < 0.7 else ""


def camera_of(camera: str, life: int, longest: float) -> Iterator[Shot]:
    """Yield a camera's frames, ten a second, until it goes wrong after some of at most `longest` seconds."""
    draw, fault = random.Random(f"{camera} {life} frames"), fault_of(camera, life)
    begin = time.monotonic()
    goes_wrong = int(FRAMES_A_SECOND * longest * draw.random()) if fault else math.inf
    for number in itertools.count():
        time.sleep(max(0.0, begin + number / FRAMES_A_SECOND - time.monotonic()))
        pixels = PICTURES[draw.randrange(len(PICTURES))]
        if number >= goes_wrong:
            if fault == "dies":
                raise OSError(f"{camera} is gone")
            if fault == "ends":
                return
            if fault == "stalls":
                time.sleep(2 * IDLE)
            pixels = damaged(pixels, fault, number)
        yield Shot(camera, life, number, pixels)


def damaged(pixels: Tensor, fault: str, number: int) -> Tensor:
    if fault == "nan":
        return pixels * math.nan
    if fault == "channels":
        return pixels[:2]
    if fault == "size":  # alternates, whichever frames are looked at
        return pixels[:, : SIZE - 1 - number % 7, :]
    return pixels.float() if fault == "dtype" else pixels


class Soak:
    """A server, the cameras that it is given, and what is found wrong."""

    def __init__(self, cameras: int, longest: float, state_update: str) -> None:
        model = small_model(state_update)
        self.session, self.server = model.stream(), StreamServer(model, max_streams=cameras)
        self.longest = longest  # seconds of a camera's life
        self.names = [f"camera {n}" for n in range(cameras)]
        self.lives: dict[str, list[int]] = {name: [] for name in self.names}  # that were begun
        self.ended, self.removed = Counter[str](), set[tuple[str, int]]()
        self.lock = threading.Lock()
        self.open: dict[str, list[FrameResult]] = {name: [] for name in self.names}
        self.counts, self.problems, self.lags = Counter[str](), list[str](), array("d")

    def add(self, name: str) -> None:
        """Begin a camera's next life, unless somebody else has done so."""
        number = self.names.index(name)
        with self.lock, contextlib.suppress(DynskipError):
            life, rate = len(self.lives[name]), RATES[number % len(RATES)]
            source = camera_of(name, life, self.longest)
            self.server.add(
                name, source, rate=rate, priority=number % 3, idle_timeout=IDLE, prepare=lambda shot: shot.pixels
            )
            self.lives[name].append(life)

    def remove(self, name: str) -> None:
        """End a camera's life."""
        with self.lock:
            if self.server.remove(name):
                self.removed.add((name, self.lives[name][-1]))

    def operate(self, end: float) -> None:
        """Remove and add cameras until it is time to stop."""
        draw = random.Random(0)
        while time.monotonic() < end:
            for name in (removed := draw.sample(self.names, max(1, len(self.names) // 16))):
                self.remove(name)
            if draw.random() < 0.5:  # else the loop adds them again once they have ended
                for name in removed:
                    self.add(name)
            time.sleep(min(1.0, self.longest / 10))
        self.removed |= {(name, lives[-1]) for name, lives in self.lives.items()}
        self.server.close()

    def look(self, event: FrameResult | VideoResult | StreamEnd) -> None:
        """Compare what the server tells with what it has to tell."""
        name = str(event.key)
        if isinstance(event, FrameResult):
            self.counts["frames decided"] += 1
            self.lags.append(event.lag or 0.0)
            self.open[name].append(event)
        elif isinstance(event, VideoResult):
            self.counts["videos"] += 1
            self.counts["fallbacks"] += event.fallback_frame >= 0
            if not self.is_right(event, self.open[name], self.ended[name]):
                self.problems.append(f"a video of {name} differs from the video alone: {event}")
            self.open[name] = []
        else:
            self.counts["streams"] += 1
            life, counters = self.ended[name], event.counters
            self.ended[name] += 1
            for field in ("frames_in", "frames_dropped", "frames_unseen"):
                self.counts[field.replace("_", " ")] += getattr(counters, field)
            if counters.frames_in != counters.frames_dropped + counters.frames_unseen + counters.frames_seen:
                self.problems.append(f"{name} lost count: {counters}")
            fault, found = fault_of(name, life), type(event.error) if event.error else None
            removed = (name, life) in self.removed and found is None
            self.counts[f"ended: {'removed' if removed else fault}"] += 1
            if not removed and (not fault or found != FAULTS[fault]):
                self.problems.append(f"{name} ended with {event.error!r}; its fault was {fault!r}")
            self.add(name)

    def is_right(self, result: VideoResult, frames: list[FrameResult], life: int) -> bool:
        """Compare a video with its frames alone."""
        shots = [frame.image for frame in frames]
        numbers = [shot.number for shot in shots]
        own = all((shot.camera, shot.life) == (result.key, life) for shot in shots)
        if not own or numbers != sorted(set(numbers)) or result.frames_seen != len(frames):
            return False
        self.session.reset()
        stopped_at = [int(self.session(shot.pixels).stopped_at) for shot in shots]
        if stopped_at != [frame.stopped_at for frame in frames]:
            return False
        if result.error is not None:
            return True
        alone = self.session.result()
        counts, wanted = (
            (each.frames_used, each.frames_seen, each.macs, each.fallback_frame) for each in (result, alone)
        )
        return counts == tuple(float(count) for count in wanted) and torch.allclose(result.logits, alone.logits[0])


def resident_mb() -> float:
    """Return the memory that this process holds, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def soak(minutes: float, cameras: int, state_update: str, bound: float) -> dict[str, Any]:
    """Serve cameras for a time; return what was counted and what went wrong."""
    begin = time.monotonic()
    it, memory, told = Soak(cameras, max(6 * minutes, 2.0), state_update), array("d"), 0.0
    for name in it.names:
        it.add(name)
    operator = threading.Thread(target=it.operate, args=(begin + 60 * minutes,))
    operator.start()
    with it.server:
        for event in it.server:
            it.look(event)
            if (passed := time.monotonic() - begin) > told + minutes:
                told = passed
                if passed > 6 * minutes:  # a tenth
                    memory.append(resident_mb())
                common.progress(f"{passed:5.0f} s  {it.counts['videos']} videos  {len(it.problems)} wrong", end="")
    common.progress("")
    operator.join()
    if sum(it.ended.values()) != sum(map(len, it.lives.values())):
        it.problems.append(f"{sum(map(len, it.lives.values()))} streams were begun and {sum(it.ended.values())} ended")
    lags = torch.tensor(it.lags, dtype=torch.float64).sort().values
    if lags[-1] > bound:
        it.problems.append(f"a frame was {lags[-1]:.3f} s old when it was decided; the bound is {bound} s")
    if memory and max(memory) > 1.05 * memory[0] + 20:
        it.problems.append(f"memory grew from {memory[0]:.0f} to {max(memory):.0f} MB")
    return {
        "state_update": state_update,
        "cameras": cameras,
        "seconds": round(time.monotonic() - begin, 1),
        **dict(sorted(it.counts.items())),
        "lag_seconds": {
            "p50": round(float(lags[len(lags) // 2]), 4),
            "p99": round(float(lags[len(lags) * 99 // 100]), 4),
            "max": round(float(lags[-1]), 4),
            "bound": bound,
        },
        "memory_mb": [round(mb, 1) for mb in memory[:: max(1, len(memory) // 20)]],
        "problems": it.problems[:20],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--cameras", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="five seconds and eight cameras")
    # A camera's last frame may wait for as long as priorities 0 to 2 allow, 2 s, and for the frames before it.
    parser.add_argument("--bound", type=float, default=3.0, help="seconds that a frame may be old when it is decided")
    parser.add_argument("--state-update", choices=("used", "reached"), default="used")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the tensors are tiny
    logging.getLogger("dynskip").setLevel(logging.ERROR)  # streams fail all the time
    minutes, cameras = (1 / 12, 8) if args.quick else (args.minutes, args.cameras)
    found = soak(minutes, cameras, args.state_update, args.bound)
    found |= {"machine": common.machine("cpu"), "command": " ".join(["python", *sys.argv])}
    print(json.dumps(found, indent=2))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(bool(found["problems"]))


if __name__ == "__main__":
    main()
