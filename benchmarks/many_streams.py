"""How many frames a second come out of 1 to 64 streams, against full batches of the same work?

    python benchmarks/many_streams.py --json many_streams.json

Streams never end: each plays the schedule's frames, in an order of its own, again and again. The ideal is the time that
the stages and the head need, in full batches and without gates or anything else, for the rows that were executed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import common
import torch
from torch import Tensor

from dynskip import FrameResult, StopOrForward

BATCH = 16


class Streams:
    """Any number of streams, run for a while at a time.

    Attributes:
        done: for each place where a frame can stop, or get to the end, how many did since `run` was called first.
    """

    def __init__(self, model: StopOrForward, video: Tensor, count: int) -> None:
        self.count = count
        self.done = [0] * (model.backbone.num_stages + 1)
        self._events = model.serve_streams(
            (videos(video[0], first) for first in itertools.count()), max_streams=count, batch_size=BATCH
        )

    @property
    def frames(self) -> int:
        """Frames in one run: some of every stream."""
        return max(2 * self.count, 2 * common.ENDS_AFTER)

    def run(self) -> None:
        left = self.frames
        for event in self._events:
            if isinstance(event, FrameResult):
                self.done[event.stopped_at] += 1
                left -= 1
                if not left:
                    return


def videos(frames: Tensor, first: int) -> list[Tensor]:
    """Return the frames that are looked at, from another first one."""
    return [frames[(first + t) % common.ENDS_AFTER] for t in range(common.ENDS_AFTER)]


@torch.no_grad()
def stage_runs(model: StopOrForward, frames: Tensor) -> dict[str, Callable[[], Any]]:
    """Return a run of every stage, and of the head, on a full batch."""
    backbone = model.backbone
    carry = backbone.start(frames[torch.arange(BATCH) % len(frames)])
    runs: dict[str, Callable[[], Any]] = {}
    for n in range(backbone.num_stages):
        runs[f"stage {n}"] = torch.no_grad()(lambda n=n, carry=carry: backbone.run(n, carry))
        carry = backbone.run(n, carry)
    runs["head"] = torch.no_grad()(lambda: backbone.head(carry))
    return runs


def ideal_ms(done: Sequence[int], runs: dict[str, float]) -> float:
    """Return what a frame takes on average in full batches; `runs` are milliseconds of each stage and the head."""
    *stages, head = runs.values()
    reached = [sum(done[n:]) for n in range(len(stages))]
    whole = sum(rows * run for rows, run in zip(reached, stages, strict=True)) + done[-1] * head
    return whole / BATCH / sum(done)


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parser(__doc__, optimize=True).parse_args(argv)
    report = common.Report(__doc__, args)
    model, video = common.build(args, args.size, args.optimize)
    gmacs = common.check(model, video)
    everything = {f"{2**k} streams": Streams(model, video, 2**k) for k in range(7)}
    runs = stage_runs(model, video[0])
    functions = {**runs, **{name: streams.run for name, streams in everything.items()}}
    times = common.interleaved(functions, 2 if args.quick else 12, args.device)
    medians = {name: median(times[name]) for name in runs}
    for name, streams in everything.items():
        per_second = 1e3 * streams.frames / median(times[name])
        ideal = 1e3 / ideal_ms(streams.done, medians)
        frames_gmacs = streams.frames * gmacs / common.ENDS_AFTER
        report.add(name, times[name], frames_gmacs, frames_per_s=per_second, ideal_frames_per_s=ideal)
        wanted = ">= 0.9" if streams.count in (16, 32) else None
        report.ratio(f"{name} / ideal", per_second / ideal, wanted)
    report.finish()


if __name__ == "__main__":
    main()
