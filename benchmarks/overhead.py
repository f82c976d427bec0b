"""What does the control loop add online, and how much faster is a stored clip than its frames one by one?

    python benchmarks/overhead.py --json overhead.json

Compared are a clip, a session that takes the same video frame by frame, and the stage runs of that session in a bare
loop: alone, and with the gates that the session asks.
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import torch
from torch import Tensor

from dynskip import StopOrForward


@torch.no_grad()
def bare(model: StopOrForward, frames: Tensor, gates: bool) -> None:
    """Run the stages that the schedule gives each frame, the head of used frames, and nothing else."""
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


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parser(__doc__, optimize=True).parse_args(argv)
    report = common.Report(__doc__, args)
    model, video = common.build(args, args.size, args.optimize)
    gmacs, output = common.check(model, video), model(video)
    decisions = common.online(model, video)
    if decisions != output.stopped_at[0, : common.ENDS_AFTER].tolist():
        raise RuntimeError(f"The clip decided {output.stopped_at[0].tolist()}, the session {decisions}.")
    functions = {
        "bare stages": lambda: bare(model, video[0], gates=False),
        "bare stages and gates": lambda: bare(model, video[0], gates=True),
        "online": lambda: common.online(model, video),
        "clip": lambda: model(video),
    }
    times = common.interleaved(functions, 3 if args.quick else 30, args.device)
    report.add("bare stages", times["bare stages"], common.stage_gmacs(model, args.size))
    report.add("bare stages and gates", times["bare stages and gates"], gmacs)
    report.add("online", times["online"], gmacs)
    report.add("clip", times["clip"], gmacs, ahead_gmacs=float(output.speculative_macs) / 1e9)
    report.compare("online", "bare stages and gates")
    report.compare("online", "bare stages", 1.05)
    report.compare("clip", "online", 0.3 if args.device == "cuda" else 0.8)
    report.finish()


if __name__ == "__main__":
    main()
