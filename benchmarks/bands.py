"""What does accuracy cost, and how sure is that? SoF-Net, FrameExit's order and gates, uniform and random frames.

    python benchmarks/bands.py --data DIR --weights FILE --cache DIR    # measures, writes the results, draws them
    python benchmarks/bands.py                                          # draws the results

Data, features and training are those of `ablation.py` at 168 x 168 with seed 0. FrameExit's curve has `PairwiseGate`s,
which are trained and run on frames from coarse to fine, and ends videos early as SoF-Net's does. Curves are those of
`calibrate.curve` on the test part: thresholds are chosen on four fifths of the test videos and measured on the others.
Videos whose actions were filmed in one session are never in both, and are drawn together for the bands. All gates share
a threshold, which keeps the search short.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ablation
import common

from dynskip import (
    CoarseToFine,
    EarlyTerminator,
    FixedGate,
    InnerClassifier,
    PairwiseGate,
    StopOrForward,
    calibrate,
    plot,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "bands.json"
PICTURE = ROOT / "docs" / "images" / "bands.svg"
RUN = ablation.Run("gates")


def measure(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Train both models and measure all curves."""
    data, model = ablation.prepare(RUN, args)
    test = data.parts["test"]
    widths, classes = model.backbone.num_features, model.backbone.num_classes
    pairwise = StopOrForward(
        model.backbone,
        [PairwiseGate(width, ablation.HIDDEN, forward_bias=0.0) for width in widths],
        inner=[InnerClassifier(ablation.HIDDEN, classes) for _ in widths],
        order=CoarseToFine(),
    )
    plain = StopOrForward(model.backbone, [FixedGate() for _ in widths]).eval()
    batches = test.batches(plain)
    curves = {
        "uniform frames": calibrate.uniform_frames(plain, batches, groups=test.groups),
        "random frames": calibrate.random_frames(plain, batches, groups=test.groups),
        "dense": (calibrate.dense(plain, batches, groups=test.groups),),
    }
    for name, gated in (("SoF-Net", model), ("FrameExit order, PairwiseGate", pairwise)):
        ablation.train_gates(RUN, data.training, gated)
        gated.eval().terminator = EarlyTerminator(ablation.THRESHOLD, ablation.MIN_FRAMES)
        curves[name] = calibrate.curve(gated, test.batches(gated), points=6, per_gate=False, groups=test.groups)
        common.progress(name)
    return {name: [asdict(point) for point in points] for name, points in curves.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with labels.csv, see ablation.py")
    parser.add_argument("--weights", type=Path, help="ImageNet weights of resnet50_v1")
    parser.add_argument("--cache", type=Path, help="folder for encoded clips")
    args = parser.parse_args(arguments)
    if args.data is not None:
        content = {"machine": common.machine("cpu"), "curves": measure(args)}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["curves"]
    curves = {name: [calibrate.CurvePoint(**point) for point in points] for name, points in found.items()}
    for name, points in curves.items():
        print(name)
        for point in points:
            edges = " to ".join(f"{100 * edge:.1f}" for edge in point.band or ())
            print(f"  {point.macs / 1e9:5.1f} GMACs: {100 * point.accuracy:.1f} % ({edges})")
    title = "Test videos, with 90 % bands"
    common.save_pair(lambda dark: plot.accuracy_compute(curves, title=title, dark=dark), PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
