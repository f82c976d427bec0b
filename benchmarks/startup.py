"""How long does it take to stage a model, in forward passes of three images?

    OMP_NUM_THREADS=1 python benchmarks/startup.py

Building the model, which timm does, is not counted.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import common
import timm
import torch

from dynskip import stage_model

BACKBONES = ("resnet50", "vit_small_patch16_224", "convnext_tiny")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=BACKBONES, help="timm names")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    print(__doc__.splitlines()[0])
    for name in args.backbones:
        model: Any = timm.create_model(name).eval()
        images = torch.randn(3, *model.pretrained_cfg["input_size"])
        runs: dict[str, Callable[[], Any]] = {
            "forward": torch.no_grad()(functools.partial(model, images)),
            "verified": functools.partial(stage_model, model),
            "not verified": functools.partial(stage_model, model, verify=False),
        }
        best = {key: min(times) for key, times in common.interleaved(runs, args.rounds, "cpu").items()}
        print(
            f"{name:<24} a forward takes {best['forward']:.0f} ms; staging {best['verified'] / best['forward']:.2f} "
            f"forwards, with verify=False {best['not verified'] / best['forward']:.2f}"
        )


if __name__ == "__main__":
    main()
