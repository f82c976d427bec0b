"""How long does a video take, against a dense TSN on the same backbone?

    python benchmarks/per_video.py --json per_video.json

The dense network is the untouched timm model, its 16 frames as one batch or frame by frame. Optimised, both have
BatchNorm folded, weights channels-last, and are compiled: the dense network as one graph for its one batch size, the
stages for any number of rows.
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

LARGER = 4 / 3  # 224 to 168


def batched(network: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
    with torch.no_grad():
        return network(frames).mean(0)


def one_by_one(network: nn.Module, frames: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([network(frame[None])[0] for frame in frames]).mean(0)


def optimised_dense(model: StopOrForward, frames: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return the dense network made faster in the way of `StopOrForward.optimize`, and the frames as it takes them."""
    on_gpu = frames.device.type == "cuda"
    folded = fold(model.backbone, frames).model.requires_grad_(False)
    if on_gpu:
        folded, frames = folded.bfloat16(), frames.bfloat16()
    compiled = torch.compile(folded, mode="reduce-overhead" if on_gpu else None, dynamic=False)
    with inductor_config.patch(freezing=not on_gpu):
        for _ in range(3):
            batched(compiled, frames)
    return compiled, frames


def plain(model: StopOrForward, video: Tensor, size: int) -> dict[str, Callable[[], Any]]:
    network, frames = model.backbone.model, video[0]
    return {
        f"dense {size}": lambda: batched(network, frames),
        f"dense {size}, frame by frame": lambda: one_by_one(network, frames),
        f"clip {size}": lambda: model(video),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--eager", action="store_true", help="leave the optimised ones out, which take time to compile")
    args = parser.parse_args(argv)
    report = common.Report(__doc__, args)
    sizes = (args.size, round(LARGER * args.size))
    gmacs: dict[str, float] = {}
    functions: dict[str, Callable[[], Any]] = {}
    for size in reversed(sizes):
        model, video = common.build(args, size)
        functions |= plain(model, video, size)
        dense = common.FRAMES * model.lookup_for((size, size)).dense / 1e9
        gmacs |= {
            f"dense {size}": dense,
            f"dense {size}, frame by frame": dense,
            f"clip {size}": common.check(model, video),
        }
    small, large = (f"dense {size}" for size in sizes)
    clip = f"clip {args.size}"
    if not args.eager:
        fast, fast_video = common.optimised(model, video)
        dense_fast, fast_frames = optimised_dense(model, video[0])
        functions |= {
            f"{small}, optimised": lambda: batched(dense_fast, fast_frames),
            f"{clip}, optimised": lambda: fast(fast_video),
        }
        gmacs |= {f"{small}, optimised": gmacs[small], f"{clip}, optimised": gmacs[clip]}
    for name, times in common.interleaved(functions, 3 if args.quick else 15, args.device).items():
        report.add(name, times, gmacs[name])
    report.compare(clip, large, 0.37)
    report.compare(clip, small, 0.75)
    if not args.eager:
        report.compare(f"{clip}, optimised", large, 0.23)
        report.compare(f"{clip}, optimised", small, 0.45)
        report.compare(f"{clip}, optimised", f"{small}, optimised", 0.80)
    report.finish()


if __name__ == "__main__":
    main()
