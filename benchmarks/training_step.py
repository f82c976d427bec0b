"""What do gates cost in training, in time and in memory, against a dense TSN?

    python benchmarks/training_step.py --json training_step.json

A step is forward, loss, backward and SGD with momentum: cross-entropy for the TSN, the mean of its frames' logits; the
whole of the thesis' loss for SoF-Net, inner classifiers included. Memory is the peak above what a process holds before
it builds its model, each in a process of its own (on a CPU measured on Linux alone).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from dynskip import LossParts, SoFLoss, sofnet
from dynskip.sofnet import Recipe

NAMES = ("dense TSN", "SoF-Net")


def training_step(name: str, args: argparse.Namespace) -> Callable[[], None]:
    """Return a function that trains a model for one step."""
    torch.manual_seed(0)
    model = sofnet(args.backbone, common.CLASSES).to(args.device).train()
    videos = torch.randn(args.videos, common.FRAMES, 3, args.size, args.size, device=args.device)
    labels = torch.arange(args.videos, device=args.device)
    network, criterion = model.backbone.model, SoFLoss(model.lookup_for((args.size, args.size)))
    trained = network if name == NAMES[0] else model
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3, momentum=Recipe.momentum)

    def loss() -> Tensor:
        if name == NAMES[0]:
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
    """Measure the memory of two steps, the second of which has the optimiser's state, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name, "--device", args.device, "--videos", str(args.videos)]
    command += ["--backbone", args.backbone, "--size", str(args.size)]
    # Freed memory goes back at once, so that what is left over from the first step does not hide the second's.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def print_peak_mib(name: str, args: argparse.Namespace) -> None:
    before = memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of what was imported
    step = training_step(name, args)
    for _ in range(2):
        step()
    if args.device == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        print(memory_mib("VmHWM") - before)


def memory_mib(name: str) -> float:
    """Read what Linux knows of this process: `VmRSS` is what it holds, `VmHWM` the peak of that."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**10


def forward_gmacs(args: argparse.Namespace) -> dict[str, float]:
    lookup = sofnet(args.backbone, common.CLASSES).lookup_for((args.size, args.size))
    frames = args.videos * common.FRAMES
    return {NAMES[0]: frames * lookup.dense / 1e9, NAMES[1]: frames * lookup.total / 1e9}


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--videos", type=int, help="videos in a batch; by default the thesis' 6, or 1 if --quick")
    parser.add_argument("--memory-of", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.videos = args.videos or (1 if args.quick else 6)
    if args.memory_of:
        print_peak_mib(args.memory_of, args)
        return
    report = common.Report(__doc__, args)
    memory = {name: peak_mib(name, args) for name in NAMES}
    steps = {name: training_step(name, args) for name in NAMES}
    times = common.interleaved(steps, 2 if args.quick else 5, args.device)
    gmacs = forward_gmacs(args)
    for name in NAMES:
        report.add(f"{name}, {args.videos} videos", times[name], gmacs[name], peak_mib=memory[name])
    tsn, sof = (f"{name}, {args.videos} videos" for name in NAMES)
    report.ratio("memory, SoF-Net / dense TSN", memory[NAMES[1]] / memory[NAMES[0]], "<= 1.05")
    report.compare(sof, tsn, 1.08)
    report.finish()


if __name__ == "__main__":
    main()
