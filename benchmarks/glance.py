"""How long does a video take with a glance, against a dense TSN, uniform frames, and the same gates without one?

    python benchmarks/glance.py --json benchmarks/results/glance.json

Everything runs in turns: timm's model on all frames of a video (dense) and on few of them (uniform), as one batch laid
out channels-last, and the clip runtime with gates that follow given decisions, with a glance and without. These are
the mean decisions of sparse.py's committed results. Weights are random, since time does not depend on them.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import common
import sparse
import torch
from per_video import batched, optimised_dense
from torch import Tensor

from dynskip import FLOPsLookup, StagedBackbone, StopOrForward, glance, sofnet, stage_model


def measured() -> dict[str, dict[str, Any]]:
    """Read decisions from the results of sparse.py, by the number of frames of a video.

    Returns:
        `with` and `without` a glance: how many frames each gate stops, and last how many are used, on average over the
        test videos of all runs. `uniform`: the fewest evenly spread frames that are as accurate as the gates after a
        glance; `None` if no number of frames is.
    """
    found = {}
    for kind, results in sparse.committed().items():
        budget, steps = sparse.KINDS[kind].budget, sparse.KINDS[kind].plan.steps
        glanced, plain = (
            [p for r in results if (p := sparse.choose(r["points"][method], "chosen", limit)) is not None]
            for method, limit in (("gates after a glance", budget), ("gates", math.inf))
        )
        accuracy = {
            row[0]["k"]: mean([hit for p in row for hit in sparse.hits(p)])
            for row in zip(*(r["points"]["uniform frames"] for r in results), strict=True)
        }
        goal = mean([hit for p in glanced for hit in sparse.hits(p)])
        found[str(steps)] = {
            "with": whole([p["frames"] for p in glanced], steps),
            "without": whole([p["frames"] for p in plain], steps),
            "uniform": next((k for k, own in accuracy.items() if own >= goal), None),
        }
    return found


def whole(frames: Sequence[Sequence[float]], steps: int) -> list[int]:
    """Round the means of numbers of frames to whole frames, `steps` in all; the first number, unseen ones, is zero."""
    means = [mean(column) for column in zip(*frames, strict=True)][1:]
    rounded = [int(each) for each in means]
    order = sorted(range(len(means)), key=lambda n: rounded[n] - means[n])
    for n in order[: steps - sum(rounded)]:
        rounded[n] += 1
    return rounded


def stops(counts: Sequence[int]) -> Tensor:
    """Return `stopped_at` of each frame: the used ones in the middle, as an action has it, the others around them."""
    others = [gate for gate, count in enumerate(counts[:-1]) for _ in range(count)]
    others = others[::2] + others[1::2]
    half = len(others) // 2
    return torch.tensor([*others[:half], *[len(counts) - 1] * counts[-1], *others[half:]])


def frames_of(count: int, size: int) -> Tensor:
    """Return a `(1, count, 3, size, size)` video whose frames random networks tell apart: by brightness, contrast."""
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(1, count, 3, size, size, generator=generator)
    video = video * torch.linspace(0.5, 2.0, count).view(count, 1, 1, 1)
    return video + 2 * torch.randn(count, 3, 1, 1, generator=generator)


@torch.no_grad()
def following(backbone: StagedBackbone, video: Tensor, counts: Sequence[int]) -> StopOrForward:
    """Put gates around a backbone that are evaluated and then overruled, so that they stop so many frames each."""
    if len(counts) != backbone.num_stages + 1 or sum(counts) != video.shape[1]:
        raise RuntimeError(f"{counts} are no decisions on {video.shape[1]} frames of {backbone.num_stages} gates.")
    model, wanted = sofnet(backbone, guidance=False).eval().to(video.device), stops(counts).to(video.device)
    pooled = model.encode(video).pooled
    gates = [common.ScheduledGate(model.gates[n], known[0], wanted > n) for n, known in enumerate(pooled)]
    return StopOrForward(backbone, gates).eval()


def uniform(given: dict[str, Any], count: str) -> str:
    """Name the run of the network without gates on few frames of a video."""
    return f"uniform, {given['uniform']} of {count} frames"


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__, optimize=True)
    parser.set_defaults(size=224)
    parser.add_argument("--light", default="efficientnet_lite0", help="the light network")
    parser.add_argument("--light-size", type=int, default=96, help="shorter side of the small copy in pixels")
    parser.add_argument("--decisions", type=Path, help="JSON file of other decisions, as `measured` returns them")
    args = parser.parse_args(argv)
    report = common.Report(__doc__, args)
    decisions = json.loads(args.decisions.read_text(encoding="utf-8")) if args.decisions else measured()
    report.content["decisions"] = decisions
    torch.manual_seed(0)
    backbone = stage_model(args.backbone, num_classes=common.CLASSES, zero_init_last=False).eval().to(args.device)
    backbones = {"with": glance(backbone, args.light, args.light_size), "without": backbone}
    dense = FLOPsLookup.measure(backbone, args.size).dense
    gmacs: dict[str, float] = {}
    functions: dict[str, Callable[[], Any]] = {}
    for count, given in decisions.items():
        video = frames_of(int(count), args.size).to(args.device)
        plain = {f"dense TSN, {count} frames": video[0]}
        if given["uniform"] is not None:
            few = torch.linspace(0, int(count) - 1, given["uniform"]).round().long()
            plain[uniform(given, count)] = video[0, few]
        for name, frames in plain.items():
            gmacs[name] = len(frames) * dense / 1e9
            network: Any = backbone.model
            if args.optimize:
                network, frames = optimised_dense(sofnet(backbone, guidance=False), frames)
            frames = frames.contiguous(memory_format=torch.channels_last)  # as the runtime lays them out on a CPU
            functions[name] = functools.partial(batched, network, frames)
        for kind, staged in backbones.items():
            name = f"gates {kind} a glance, {count} frames"
            model = following(staged, video, given[kind])
            if args.optimize:
                model, agreement = model.optimize(video)
                common.progress(str(agreement))
            output = model(video)
            if not torch.equal(output.stopped_at[0].cpu(), stops(given[kind])):
                raise RuntimeError(f"{name}: frames left the decisions.")
            gmacs[name], functions[name] = float(output.macs.mean()) / 1e9, functools.partial(model, video)
    for name, times in common.interleaved(functions, 2 if args.quick else 10, args.device).items():
        report.add(name, times, gmacs[name])
    for count, given in decisions.items():
        with_it = f"gates with a glance, {count} frames"
        for other in (f"gates without a glance, {count} frames", uniform(given, count), f"dense TSN, {count} frames"):
            if other in functions:
                report.compare(with_it, other)
    report.finish()


if __name__ == "__main__":
    main()
