"""What does the control loop add to the stages that it runs, online, one video at a time?

    python benchmarks/overhead.py --json overhead.json

Compared are a session, frame by frame, and the same stage runs (and the head's) in a bare loop; also with every gate in
the loop that the session asks.
"""

from __future__ import annotations

from collections.abc import Sequence

import clip_online
import common
import torch
from torch import Tensor

from dynskip import StopOrForward


@torch.no_grad()
def bare(model: StopOrForward, frames: Sequence[Tensor], gates: bool) -> None:
    """Run what the schedule says of each frame, and nothing else."""
    stages, backbone = model.backbone.num_stages, model.backbone
    states = [gate.initial_state(1) for gate in model.gates]
    for frame, stop in zip(frames[: common.ENDS_AFTER], common.schedule(stages), strict=False):
        carry = backbone.start(frame[None])
        for n in range(min(stop + 1, stages)):
            carry = backbone.run(n, carry)
            if gates:
                model.gates[n](backbone.pool(n, carry), states[n])
        if stop == stages:
            backbone.head(carry)


def stage_gmacs(model: StopOrForward, size: int) -> float:
    """Return what the schedule executes in stages and the head alone."""
    lookup, stages = model.lookup_for((size, size)), model.backbone.num_stages
    done = common.schedule(stages)[: common.ENDS_AFTER]
    return sum(float(lookup.per_stage[: n + 1].sum()) + (lookup.head if n == stages else 0.0) for n in done) / 1e9


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parser(__doc__, optimize=True).parse_args(argv)
    report = common.Report(__doc__, args)
    model, video = common.build(args, args.size, args.optimize)
    frames, gmacs = list(video[0]), common.check(model, video)
    times = common.interleaved(
        {
            "bare stages": lambda: bare(model, frames, gates=False),
            "bare stages and gates": lambda: bare(model, frames, gates=True),
            "online": lambda: clip_online.online(model, video),
        },
        rounds=3 if args.quick else 30,
        device=args.device,
    )
    report.add("bare stages", times["bare stages"], stage_gmacs(model, args.size))
    report.add("bare stages and gates", times["bare stages and gates"], gmacs)
    report.add("online", times["online"], gmacs)
    report.compare("online", "bare stages and gates")
    report.compare("online", "bare stages", 1.05)
    report.finish()


if __name__ == "__main__":
    main()
