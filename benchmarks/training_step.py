"""What do gates cost in training, in time and in memory, against a dense TSN?

    python benchmarks/training_step.py --json training_step.json

A step is forward, loss, backward and SGD with momentum. The TSN is trained with cross-entropy on the mean of its
frames' logits, SoF-Net with the whole of the thesis' loss, inner classifiers included. Memory is the peak above what a
process holds before it builds its model, each in a process of its own (on a CPU, this needs Linux).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from dynskip import LossParts, SoFLoss, sofnet
from dynskip.sofnet import Recipe

TSN, SOFNET = "dense TSN", "SoF-Net"


def training_step(name: str, args: argparse.Namespace) -> Callable[[], None]:
    """Return a function that trains a model for one step."""
    torch.manual_seed(0)
    model = sofnet(args.backbone, common.CLASSES).to(args.device).train()
    videos = torch.randn(args.videos, common.FRAMES, 3, args.size, args.size, device=args.device)
    labels = torch.arange(args.videos, device=args.device)
    network, criterion = model.backbone.model, SoFLoss(model.lookup_for((args.size, args.size)))
    trained = network if name == TSN else model
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3, momentum=Recipe.momentum)

    def loss() -> Tensor:
        if name == TSN:
            frame_logits: Tensor = network(videos.flatten(0, 1))
            return F.cross_entropy(frame_logits.unflatten(0, videos.shape[:2]).mean(1), labels)
        parts: LossParts = criterion(model(videos), labels)
        return parts.total

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def peak_mib(name: str, args: argparse.Namespace) -> float:
    """Return the peak memory of two steps, the second of which has the optimiser's state."""
    before = memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the imports
    step = training_step(name, args)
    step()
    step()
    return torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else memory_mib("VmHWM") - before


def memory_mib(name: str) -> float:
    """Read what Linux knows of this process: `VmRSS` is the memory that it holds, `VmHWM` the peak of that."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**10


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--videos", type=int, help="videos in a batch; by default the thesis' 6, or 1 if --quick")
    args = parser.parse_args(argv)
    args.videos = args.videos or (1 if args.quick else 6)
    report = common.Report(__doc__, args)
    # Freed memory goes back at once, so that what is left over from the first step does not hide the second's.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # read by processes when they start
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = {name: pool.apply(peak_mib, (name, args)) for name in (TSN, SOFNET)}
    steps = {name: training_step(name, args) for name in (TSN, SOFNET)}
    times = common.interleaved(steps, 2 if args.quick else 5, args.device)
    lookup, frames = (
        sofnet(args.backbone, common.CLASSES).lookup_for((args.size, args.size)),
        args.videos * common.FRAMES,
    )
    for name, gmacs in {TSN: lookup.dense / 1e9, SOFNET: lookup.total / 1e9}.items():
        report.add(f"{name}, {args.videos} videos", times[name], frames * gmacs, peak_mib=memory[name])
    report.ratio("memory, SoF-Net / dense TSN", memory[SOFNET] / memory[TSN], "<= 1.05")
    report.compare(f"{SOFNET}, {args.videos} videos", f"{TSN}, {args.videos} videos", 1.08)
    report.finish()


if __name__ == "__main__":
    main()
