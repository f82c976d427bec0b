"""How much faster is a stored clip than its frames one by one, with the same decisions?

python benchmarks/clip_online.py --json clip_online.json
"""

from __future__ import annotations

from collections.abc import Sequence

import common
from torch import Tensor

from dynskip import StopOrForward


def online(model: StopOrForward, video: Tensor) -> list[int]:
    """Return what became of each frame."""
    session = model.stream()
    steps = []
    for frame in video[0]:
        steps.append(session(frame))
        if steps[-1].ended.item():
            break
    return [int(step.stopped_at) for step in steps]


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parser(__doc__, optimize=True).parse_args(argv)
    report = common.Report(__doc__, args)
    model, video = common.build(args, args.size, args.optimize)
    gmacs, output = common.check(model, video), model(video)
    decisions = online(model, video)
    if output.stopped_at[0, : len(decisions)].tolist() != decisions:
        raise SystemExit(f"Clip decided {output.stopped_at[0].tolist()} and online {decisions}.")
    ahead = float(output.speculative_macs) / 1e9
    times = common.interleaved(
        {"clip": lambda: model(video), "online": lambda: online(model, video)},
        rounds=3 if args.quick else 30,
        device=args.device,
    )
    report.add("clip", times["clip"], gmacs, ahead_gmacs=ahead)
    report.add("online", times["online"], gmacs)
    report.compare("clip", "online", 0.3 if args.device == "cuda" else 0.8)
    report.finish()


if __name__ == "__main__":
    main()
