"""Does serving many streams for long lose nothing, leak nothing and answer as each stream alone does?

Videos of random length start at random, end by themselves or early, and some fail: their source raises, or sends a
frame that does not fit. Every result is compared with the video run alone, and memory with what it was after the
first tenth of the time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynskip import EarlyTerminator, PolicyGate, StopOrForward, VideoResult, stage_model

SIZE, LONGEST, FAULTS = 16, 24, ("raises", "nan", "shape", "dtype")


def small_model(state_update: Any) -> StopOrForward:
    """Build a small network in float64 whose gates stop about a quarter of the frames, each at its own depth."""
    torch.manual_seed(0)
    widths = (3, 8, 12, 16)
    stages = [nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.Tanh()) for a, b in itertools.pairwise(widths)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    network = nn.Sequential(*stages, head).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    backbone = stage_model(network, input_size=(3, SIZE, SIZE))
    gates = [PolicyGate(width, hidden=16, forward_bias=0.0).double() for width in backbone.num_features]
    model = StopOrForward(backbone, gates, terminator=EarlyTerminator(0.9, 3), state_update=state_update).eval()
    with torch.no_grad():
        encoded = model.encode(torch.stack([video_of(number)[:3] for number in range(32)]))
        for gate, pooled in zip(gates, encoded.pooled, strict=True):
            gate.decide.weight.mul_(9)
            logits, _ = gate(pooled.flatten(0, 1), gate.initial_state(96))
            gate.decide.bias[1] -= (logits[:, 1] - logits[:, 0]).quantile(0.25)
    return model


def video_of(number: int) -> Tensor:
    """Make the video of a number, again and again the same."""
    source = torch.Generator().manual_seed(number)
    length = int(torch.randint(3, LONGEST, (1,), generator=source))
    colour = 1.5 * torch.randn(length, 3, 1, 1, generator=source, dtype=torch.float64)
    return colour + torch.randn(length, 3, SIZE, SIZE, generator=source, dtype=torch.float64)


def fault_of(number: int) -> tuple[str, int] | None:
    """Say how and at which frame the video of a number fails, if it does."""
    draw = random.Random(number)
    return (draw.choice(FAULTS), draw.randrange(3)) if draw.random() < 0.1 else None


def frames_of(number: int) -> Iterator[Tensor]:
    """Hand out a video's frames, with its fault."""
    fault = fault_of(number)
    for t, frame in enumerate(video_of(number)):
        match fault if fault and fault[1] == t else None:
            case ("raises", _):
                raise OSError(f"source {number} is gone")
            case ("nan", _):
                yield frame * math.nan
            case ("shape", _):
                yield frame[:2]
            case ("dtype", _):
                yield frame.float()
            case _:
                yield frame


def wrong(model: StopOrForward, result: VideoResult) -> str | None:
    """Say what is wrong about a stream's result."""
    assert isinstance(result.key, int)
    fault = fault_of(result.key)
    alone = model.run_clip(video_of(result.key)[None], window=1)
    if fault is not None and fault[1] < int(alone.seen.sum()):
        if result.error is None or result.frames_seen != fault[1]:
            return (
                f"stream {result.key} had to fail at frame {fault[1]}; saw {result.frames_seen}, error {result.error!r}"
            )
        return None
    if result.error is not None:
        return f"stream {result.key} failed: {result.error!r}"
    same = result.frames_seen == int(alone.seen.sum()) and result.frames_used == int(alone.used.sum())
    same = same and result.macs == float(alone.macs) and result.fallback_frame == int(alone.fallback_frame)
    return (
        None if same and torch.allclose(result.logits, alone.logits[0]) else f"stream {result.key} differs from alone"
    )


def resident_mb() -> float:
    """Return the memory that this process holds, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def soak(minutes: float, streams: int, state_update: str) -> dict[str, Any]:
    """Serve streams for a time; return what was counted and what went wrong."""
    model = small_model(state_update)
    begin = time.monotonic()
    until = begin + 60 * minutes
    started = 0

    def arriving() -> Iterator[tuple[int, Iterator[Tensor]]]:
        nonlocal started
        while time.monotonic() < until:
            started += 1
            yield started - 1, frames_of(started - 1)

    counts = Counter[str]()
    problems: list[str] = []
    memory: list[float] = []
    shown = begin
    for event in model.serve_streams(arriving(), max_streams=streams):
        if not isinstance(event, VideoResult):
            counts["frames"] += 1
            continue
        counts["streams"] += 1
        counts["failed as they had to"] += event.error is not None
        counts["fallbacks"] += event.fallback_frame >= 0
        if (problem := wrong(model, event)) is not None:
            problems.append(problem)
        now = time.monotonic()
        if now - shown > 2:
            shown = now
            if now - begin > 6 * minutes:  # a tenth
                memory.append(resident_mb())
            print(
                f"\r{now - begin:5.0f} s  {counts['streams']} streams  {len(problems)} wrong", end="", file=sys.stderr
            )
    print(file=sys.stderr)
    if counts["streams"] != started:
        problems.append(f"{started} streams were started and {counts['streams']} answered")
    if memory and max(memory) > 1.05 * memory[0] + 20:
        problems.append(f"memory grew from {memory[0]:.0f} to {max(memory):.0f} MB")
    return {
        "state_update": state_update,
        "seconds": round(time.monotonic() - begin, 1),
        **counts,
        "memory_mb": [round(memory[0], 1), round(max(memory), 1)] if memory else [],
        "problems": problems[:20],
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--state-update", choices=("used", "reached"), default="used")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are tiny
    found = soak(options.minutes, options.streams, options.state_update)
    found |= {"torch": torch.__version__, "machine": platform.machine(), "python": platform.python_version()}
    found["command"] = " ".join(sys.argv)
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(bool(found["problems"]))


if __name__ == "__main__":
    main()
