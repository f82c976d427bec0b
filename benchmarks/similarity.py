"""What does a SimilarityGate save on a finished classifier, without training, and how often is the answer the same?

    python benchmarks/similarity.py --data DIR --weights resnet50.safetensors --strides-in-1x1

One gate after the stem compares every second frame with the last used one; stages after it have no say. Its threshold
is the largest that keeps the most probable of the network's own classes on enough clips of the split `train`. Savings
and agreement are those of the split `test`, where the frames that stop are really skipped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import common
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from sofnet_activitynet import (
    Item,
    OpenVideo,
    Preprocessing,
    load_weights,
    move_strides,
    pick_split,
    read_csv,
    read_frames,
)

from dynskip import EncodedVideo, FixedGate, SimilarityGate, StopOrForward, stage_model

THRESHOLDS = [0.0005 * 1.25**k for k in range(20)]  # 0.0005 to 0.035


def build(args: argparse.Namespace) -> StopOrForward:
    backbone = stage_model(args.backbone, input_size=(3, args.size, args.size))
    if args.strides_in_1x1:
        move_strides(backbone.model)
    load_weights(backbone.model, args.weights)
    first, *others = backbone.num_features
    return StopOrForward(backbone, [SimilarityGate(first), *(FixedGate() for _ in others)]).eval().to(args.device)


def clips(items: Sequence[Item], args: argparse.Namespace) -> Iterator[Tensor]:
    """Read `(1, T, 3, size, size)` normalised clips of every so many frames."""
    prep = Preprocessing(size=args.size)
    for k, item in enumerate(items):
        with OpenVideo(item.path) as (_, stream):
            frames = max(stream.frames // args.every, 1)
        yield prep.normalize(prep.crop(read_frames(item.path, frames, prep.short_side)))[None].to(args.device)
        common.progress(f"{k + 1} of {len(items)} clips", end="")
    common.progress("")


@torch.no_grad()
def encode(model: StopOrForward, clip: Tensor) -> EncodedVideo:
    """Encode a clip a few frames at a time, which bounds the memory of long ones."""
    parts = [model.encode(part) for part in clip.split(16, dim=1)]
    pooled = tuple(torch.cat(stage, 1) for stage in zip(*(part.pooled for part in parts), strict=True))
    return EncodedVideo(pooled, torch.cat([part.frame_logits for part in parts], 1), parts[0].image_size)


@torch.no_grad()
def tune(model: StopOrForward, encoded: Sequence[EncodedVideo], wanted: float) -> dict[float, float]:
    """Set the gate's threshold; return the share of unchanged answers at every threshold that was tried."""
    agreement = {}
    for threshold in THRESHOLDS:
        model.gates[0].threshold = threshold
        same = [same_answer(model.decide(clip).logits, clip.frame_logits) for clip in encoded]
        agreement[threshold] = sum(same) / len(same)
    fine = [threshold for threshold, share in agreement.items() if share >= wanted]
    model.gates[0].threshold = max(fine, default=THRESHOLDS[0])
    return agreement


def same_answer(logits: Tensor, frame_logits: Tensor) -> bool:
    """Whether a clip's answer is the one that the mean over all of its frames gives."""
    return bool((logits.argmax(-1) == frame_logits.mean(1).argmax(-1)).all())


def some(items: Sequence[Item], count: int) -> list[Item]:
    """Take this many items, evenly spread."""
    return [items[k * len(items) // count] for k in range(min(count, len(items)))]


def run(model: StopOrForward, tested: Iterable[Tensor]) -> dict[str, float]:
    """Run clips densely and skipping; return what the skipping pass executed, and whether answers are the same."""
    frames, macs, dense, same, count = 0, 0.0, 0.0, 0, 0
    for clip in tested:
        output = model.run_clip(clip, window=1)  # runs nothing ahead of decisions
        size = (clip.shape[3], clip.shape[4])
        dense += clip.shape[1] * model.lookup_for(size).dense
        macs += output.macs.item()
        same += same_answer(output.logits, encode(model, clip).frame_logits)
        frames, count = frames + clip.shape[1], count + 1
    return {
        "clips": count,
        "frames_a_clip": frames / count,
        "dense_gmacs_a_clip": dense / count / 1e9,
        "gmacs_a_clip": macs / count / 1e9,
        "saved": 1 - macs / dense,
        "same_answer": same / count,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with a labels.csv, or such a file")
    parser.add_argument("--weights", type=Path, required=True, help="weights of the backbone with their classifier")
    parser.add_argument("--strides-in-1x1", action="store_true", help="for weights in Caffe's layout")
    parser.add_argument("--every", type=int, default=2, help="take every so manyth frame")
    parser.add_argument("--tune", type=int, default=90, help="training clips to choose the threshold on")
    parser.add_argument("--wanted", type=float, default=0.97, help="share of them that has to keep its answer")
    args = parser.parse_args(argv)
    items = read_csv(args.data)
    train, test = pick_split(items, "train"), pick_split(items, "test")
    report = common.Report(__doc__, args)
    layout = " --strides-in-1x1" if args.strides_in_1x1 else ""
    # Without the paths of this machine.
    report.content["command"] = f"python benchmarks/similarity.py --data DIR --weights FILE{layout}" + (
        " --quick" if args.quick else ""
    )
    model = build(args)
    tuning = some(train, min(args.tune, 12) if args.quick else args.tune)
    agreement = tune(model, [encode(model, clip) for clip in clips(tuning, args)], args.wanted)
    threshold = model.gates[0].threshold
    print(f"{model.gates[0]}, chosen on {len(tuning)} training clips: {agreement[threshold]:.1%} keep their answer")
    result = run(model, clips(some(test, 12) if args.quick else test, args))
    report.content["results"] = {
        "image_size": args.size,
        "every_frame": args.every,
        "tuning_clips": len(tuning),
        "wanted_on_tuning_clips": args.wanted,
        "agreement_on_tuning_clips": {f"{key:.5f}": value for key, value in agreement.items()},
        "threshold": threshold,
        **result,
    }
    print("{clips} test clips of {frames_a_clip:.1f} frames".format(**result), end=": ")
    print("{gmacs_a_clip:.1f} GMACs (multiply-adds) a clip, dense {dense_gmacs_a_clip:.1f}".format(**result))
    report.ratio("share of GMACs saved", result["saved"], ">= 0.25")
    report.ratio("share of clips with the same top-1", result["same_answer"], ">= 0.95")
    report.finish()


if __name__ == "__main__":
    main()
