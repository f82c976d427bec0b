"""How long does a video take, against a dense TSN on the same backbone?

    python benchmarks/per_video.py --json per_video.json

The dense network is the timm model as it comes, on 16 frames: as one batch, as one batch laid out channels-last, or
frame by frame; also on larger frames (224 against 168). Optimised, both networks have BatchNorm folded, weights
channels-last, and are compiled: the dense network for its one batch size, the stages for any number of rows. Clips are
compared with the fastest of the eager dense runs of a size, and with the optimised one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import common
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from dynskip import StopOrForward
from dynskip.runtime.optimize import fold


@torch.no_grad()
def batched(network: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
    return network(frames).mean(0)


@torch.no_grad()
def one_by_one(network: nn.Module, frames: Tensor) -> Tensor:
    return torch.cat([network(frame[None]) for frame in frames]).mean(0)


def ways(dense: str) -> tuple[str, str, str]:
    """Name the eager runs of a dense network."""
    return dense, f"{dense}, channels-last", f"{dense}, frame by frame"


def optimised_dense(model: StopOrForward, frames: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return the dense network, made faster as `StopOrForward.optimize` does it, and the frames in its dtype."""
    on_gpu = frames.device.type == "cuda"
    folded = fold(model.backbone, frames).model.requires_grad_(False)
    if on_gpu:
        folded, frames = folded.bfloat16(), frames.bfloat16()
    compiled = torch.compile(folded, mode="reduce-overhead" if on_gpu else None, dynamic=False)
    with inductor_config.patch(freezing=not on_gpu):
        for _ in range(3):
            batched(compiled, frames)
    return compiled, frames


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--eager", action="store_true", help="leave out the optimised networks, which are compiled")
    args = parser.parse_args(argv)
    report = common.Report(__doc__, args)
    larger = round(args.size * 4 / 3)
    gmacs: dict[str, float] = {}
    functions: dict[str, Callable[[], Any]] = {}

    def plain(size: int) -> tuple[StopOrForward, Tensor]:
        model, video = common.build(args, size)
        network, frames = model.backbone.model, video[0]
        dense, clip = f"dense {size}", f"clip {size}"
        laid_out = frames.contiguous(memory_format=torch.channels_last)  # as the runtime lays them out on a CPU
        batch, channels_last, single = ways(dense)
        functions[batch] = lambda: batched(network, frames)
        functions[channels_last] = lambda: batched(network, laid_out)
        functions[single] = lambda: one_by_one(network, frames)
        functions[clip] = lambda: model(video)
        gmacs.update(dict.fromkeys(ways(dense), common.dense_gmacs(model, size)))
        gmacs[clip] = common.check(model, video)
        return model, video

    plain(larger)
    model, video = plain(args.size)
    large, dense, clip = f"dense {larger}", f"dense {args.size}", f"clip {args.size}"
    if not args.eager:
        fast, fast_video = common.optimised(model, video)
        dense_fast, fast_frames = optimised_dense(model, video[0])
        functions[f"{dense}, optimised"] = lambda: batched(dense_fast, fast_frames)
        functions[f"{clip}, optimised"] = lambda: fast(fast_video)
        gmacs |= {f"{name}, optimised": gmacs[name] for name in (dense, clip)}
    for name, times in common.interleaved(functions, 3 if args.quick else 15, args.device).items():
        report.add(name, times, gmacs[name])
    large, plainest = (report.fastest(*ways(name)) for name in (large, dense))
    report.compare(f"clip {larger}", large)
    report.compare(clip, plainest, 0.75)
    if not args.eager:
        report.compare(f"{clip}, optimised", f"{dense}, optimised", 0.80)
        report.compare(f"{clip}, optimised", plainest, 0.45)
        report.compare(clip, f"{dense}, optimised")
        report.compare(f"{clip}, optimised", large, 0.23)
    report.compare(clip, large, 0.37)
    report.finish()


if __name__ == "__main__":
    main()
