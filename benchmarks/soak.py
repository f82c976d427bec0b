"""Does serving many streams for long lose nothing, leak nothing and answer as each stream alone does?

    python benchmarks/soak.py --minutes 10 --json soak.json

Videos of random length start one after the other and end by themselves or early. Some fail: their source raises, or
sends a frame that does not fit. Every result is compared with the video run alone, and memory with what it was after a
tenth of the time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn

from dynskip import EarlyTerminator, PolicyGate, StopOrForward, VideoResult, stage_model

SIZE, LONGEST, FAULTS = 16, 24, ("raises", "nan", "shape", "dtype")


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
    model = StopOrForward(backbone, gates, terminator=EarlyTerminator(0.9, 3), state_update=state_update).eval()
    encoded = model.encode(torch.stack([video_of(number)[:3] for number in range(32)]))
    for gate, pooled in zip(gates, encoded.pooled, strict=True):
        gate.decide.weight.mul_(9)
        logits, _ = gate(pooled.flatten(0, 1), gate.initial_state(96))
        gate.decide.bias[1] -= logits.diff(dim=1).quantile(0.25)
    return model


def video_of(number: int) -> Tensor:
    """Return the video of a number, always the same."""
    source = torch.Generator().manual_seed(number)
    length = int(torch.randint(3, LONGEST, (1,), generator=source))
    colour = 1.5 * torch.randn(length, 3, 1, 1, generator=source, dtype=torch.float64)
    return colour + torch.randn(length, 3, SIZE, SIZE, generator=source, dtype=torch.float64)


def fault_of(number: int) -> tuple[str, int]:
    """Return how and at which frame the video of a number fails; -1 for one that does not."""
    draw = random.Random(number)
    return (draw.choice(FAULTS), draw.randrange(3)) if draw.random() < 0.1 else ("", -1)


def frames_of(number: int) -> Iterator[Tensor]:
    """Yield a video's frames, one of which may be faulty."""
    fault, at = fault_of(number)
    for t, frame in enumerate(video_of(number)):
        if t != at:
            yield frame
        elif fault == "raises":
            raise OSError(f"source {number} is gone")
        else:
            yield {"nan": frame * math.nan, "shape": frame[:2], "dtype": frame.float()}[fault]


def is_right(model: StopOrForward, result: VideoResult, number: int) -> bool:
    """Compare a stream's result with what the video gives alone."""
    alone, (_, faulty) = model.run_clip(video_of(number)[None], window=1), fault_of(number)
    seen = int(alone.seen.sum())
    if 0 <= faulty < seen:
        return result.error is not None and result.frames_seen == faulty
    counts = (result.error, result.frames_seen, result.frames_used, result.macs, result.fallback_frame)
    wanted = (None, seen, int(alone.used.sum()), float(alone.macs), int(alone.fallback_frame))
    return counts == wanted and torch.allclose(result.logits, alone.logits[0])


def resident_mb() -> float:
    """Return the memory that this process holds, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def soak(minutes: float, streams: int, state_update: str) -> dict[str, Any]:
    """Serve streams for a time; return what was counted and what went wrong."""
    model, begin, started = small_model(state_update), time.monotonic(), itertools.count()
    counts, problems, memory = Counter[str](), list[str](), list[float]()

    def arriving() -> Iterator[tuple[int, Iterator[Tensor]]]:
        while time.monotonic() < begin + 60 * minutes:
            number = next(started)
            yield number, frames_of(number)

    for event in model.serve_streams(arriving(), max_streams=streams):
        if not isinstance(event, VideoResult):
            counts["frames"] += 1
            continue
        counts["streams"] += 1
        counts["failed as they had to"] += event.error is not None
        counts["fallbacks"] += event.fallback_frame >= 0
        if not is_right(model, event, int(str(event.key))):
            problems.append(f"stream {event.key} differs from the video alone: {event}")
        if counts["streams"] % 100 == 0:
            passed = time.monotonic() - begin
            if passed > 6 * minutes:  # a tenth
                memory.append(resident_mb())
            common.progress(f"{passed:5.0f} s  {counts['streams']} streams  {len(problems)} wrong", end="")
    common.progress("")
    if (expected := next(started)) != counts["streams"]:
        problems.append(f"{expected} streams were started and {counts['streams']} answered")
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--state-update", choices=("used", "reached"), default="used")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are tiny
    found = soak(args.minutes, args.streams, args.state_update)
    found |= {"machine": common.machine("cpu"), "command": " ".join(sys.argv)}
    print(json.dumps(found, indent=2))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(bool(found["problems"]))


if __name__ == "__main__":
    main()
