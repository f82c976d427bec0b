"""How many frames a second come out of 1 to 64 streams, against full batches of the same work?

    python benchmarks/many_streams.py --json many_streams.json

Streams never end: each plays the schedule's frames, in an order of its own, again and again. They are compared with
the executed rows in full batches of the stages and the head, without gates or anything else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from statistics import median

import common
from torch import Tensor

from dynskip import FrameResult, StopOrForward

BATCH = 16


def endless(model: StopOrForward, video: Tensor, count: int, batch: int) -> Iterator[FrameResult]:
    """Serve `count` streams for ever."""
    orders = itertools.cycle(common.orders(common.ENDS_AFTER)[:, : common.ENDS_AFTER].tolist())
    sources = ([video[0, t] for t in order] for order in orders)
    for event in model.serve_streams(sources, max_streams=count, batch_size=batch):
        if isinstance(event, FrameResult):
            yield event


class Streams:
    """Streams that are run for a while at a time.

    Attributes:
        frames: frames in one run, some of every stream.
        stops: how many frames stopped at each gate, and how many were used, in all runs.
    """

    def __init__(self, model: StopOrForward, video: Tensor, count: int) -> None:
        self.frames = max(2 * count, 2 * common.ENDS_AFTER)
        self.stops = [0] * (model.backbone.num_stages + 1)
        self._results = endless(model, video, count, BATCH)

    def run(self) -> None:
        for result in itertools.islice(self._results, self.frames):
            self.stops[result.stopped_at] += 1

    def batched_ms(self, stage_ms: Sequence[float]) -> float:
        """Return the average time of a frame in full batches, whose stages and head take so long."""
        batches = [sum(self.stops[n:]) / BATCH for n in range(len(stage_ms))]
        return sum(a * b for a, b in zip(batches, stage_ms, strict=True)) / sum(self.stops)


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parser(__doc__, optimize=True).parse_args(argv)
    report = common.Report(__doc__, args)
    model, video = common.build(args, args.size, args.optimize)
    gmacs = common.check(model, video)
    parts = common.stage_runs(model.backbone, video[0], [BATCH] * (model.backbone.num_stages + 1))
    everything = {2**k: Streams(model, video, 2**k) for k in range(7)}
    functions = {f"part {n}": part for n, part in enumerate(parts)}
    functions |= {f"{count} streams": streams.run for count, streams in everything.items()}
    times = common.interleaved(functions, 2 if args.quick else 12, args.device)
    stage_ms = [median(times[f"part {n}"]) for n in range(len(parts))]
    for count, streams in everything.items():
        name = f"{count} streams"
        rate, batched = 1e3 * streams.frames / median(times[name]), 1e3 / streams.batched_ms(stage_ms)
        executed = streams.frames * gmacs / common.ENDS_AFTER
        report.add(name, times[name], executed, frames_per_s=rate, batched_frames_per_s=batched)
        report.ratio(f"{name} / full batches, no gates", rate / batched, ">= 0.9" if count in (16, 32) else None)
    report.finish()


if __name__ == "__main__":
    main()
