"""What does a SimilarityGate save on a finished classifier, without training, and how often is the answer the same?

    python benchmarks/similarity.py --data DIR --backbone resnet50_v1 --weights resnet50_v1.safetensors

One gate after the stem compares every second frame with the last used one; stages after it have no say. Its threshold
grows for as long as enough clips of the split `train` keep their answer, the most probable of the network's own
classes. Savings and agreement are those of the split `test`, where the frames that stop are really skipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

from dynskip import EncodedVideo, FixedGate, SimilarityGate, StopOrForward, stage_model
from dynskip.backbone.weights import load_weights
from dynskip.video import Item, Preprocessing, load_items, open_source, pick_split, sample_frames

THRESHOLDS = [0.0005 * 1.25**k for k in range(20)]  # 0.0005 to 0.035


def build(args: argparse.Namespace) -> StopOrForward:
    backbone = stage_model(args.backbone, input_size=(3, args.size, args.size))
    load_weights(backbone.model, args.weights)
    first, *others = backbone.num_features
    return StopOrForward(backbone, [SimilarityGate(first), *(FixedGate() for _ in others)]).eval().to(args.device)


def read(item: Item, args: argparse.Namespace) -> Tensor:
    """Read a `(1, T, 3, size, size)` normalised clip of every so many frames."""
    prep = Preprocessing(size=args.size)
    source = open_source(item.path)
    frames = sample_frames(source, max(len(source) // args.every, 1), prep.short_side)
    return prep.normalize(prep.crop(frames))[None].to(args.device)


@torch.no_grad()
def encode(model: StopOrForward, items: Sequence[Item], args: argparse.Namespace) -> list[EncodedVideo]:
    """Encode clips, or take them from the cache; only what the first gate and the answer need is kept."""
    stored = torch.load(args.cache, weights_only=True) if args.cache and args.cache.exists() else {}
    keys = [f"{item.path} {args.size} {args.every}" for item in items]
    for k, (key, item) in enumerate(zip(keys, items, strict=True)):
        if key not in stored:
            # A few frames at a time, which bounds the memory of long clips.
            parts = [model.encode(part) for part in read(item, args).split(16, dim=1)]
            stem, logits = [part.pooled[0] for part in parts], [part.frame_logits for part in parts]
            stored[key] = (torch.cat(stem, 1), torch.cat(logits, 1))
        common.progress(f"encoded {k + 1} of {len(items)} clips", end="")
    common.progress("")
    if args.cache:
        torch.save(stored, args.cache)
    return [encoded(model, stem, logits, args.size) for stem, logits in (stored[key] for key in keys)]


def encoded(model: StopOrForward, stem: Tensor, frame_logits: Tensor, size: int) -> EncodedVideo:
    """Put a clip's features together; nobody looks at those of later stages."""
    rest = [frame_logits.new_zeros(1).expand(*stem.shape[:2], c) for c in model.backbone.num_features[1:]]
    return EncodedVideo((stem, *rest), frame_logits, (size, size))


@torch.no_grad()
def tune(model: StopOrForward, clips: Sequence[EncodedVideo], wanted: float) -> dict[float, float]:
    """Set the gate's threshold; return the share of unchanged answers at every threshold that was tried."""
    agreement: dict[float, float] = {}
    chosen = THRESHOLDS[0]
    for threshold in THRESHOLDS:
        model.gates[0].threshold = threshold
        same = [same_answer(model.decide(clip).logits, clip.frame_logits) for clip in clips]
        agreement[threshold] = sum(same) / len(same)
        if agreement[threshold] < wanted:
            break
        chosen = threshold
    model.gates[0].threshold = chosen
    return agreement


def same_answer(logits: Tensor, frame_logits: Tensor) -> bool:
    """Whether a clip's answer is the one that the mean over all of its frames gives."""
    return bool((logits.argmax(-1) == frame_logits.mean(1).argmax(-1)).all())


def run(model: StopOrForward, items: Sequence[Item], dense: Sequence[EncodedVideo], args: Any) -> dict[str, float]:
    """Run clips, really skipping; return what was executed, and how often the answer is that of all frames."""
    frames, macs, same = 0, 0.0, 0
    for k, (item, clip) in enumerate(zip(items, dense, strict=True)):
        output = model.run_clip(read(item, args), window=1)  # runs nothing ahead of decisions
        macs += output.macs.item()
        same += same_answer(output.logits, clip.frame_logits)
        frames += output.used.shape[1]
        common.progress(f"ran {k + 1} of {len(items)} clips", end="")
    common.progress("")
    plain = frames * model.lookup_for((args.size, args.size)).dense
    return {
        "clips": len(items),
        "frames_a_clip": frames / len(items),
        "dense_gmacs_a_clip": plain / len(items) / 1e9,
        "gmacs_a_clip": macs / len(items) / 1e9,
        "saved": 1 - macs / plain,
        "same_answer": same / len(items),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with a labels.csv, or such a file")
    parser.add_argument("--weights", type=Path, required=True, help="weights of the backbone with their classifier")
    parser.add_argument("--every", type=int, default=2, help="take every so manyth frame")
    parser.add_argument(
        "--tune-every", type=int, default=3, help="choose the threshold on every so manyth training clip"
    )
    parser.add_argument("--wanted", type=float, default=0.97, help="share of them that has to keep its answer")
    parser.add_argument("--cache", type=Path, help="file to keep encoded clips in, for other runs on the same data")
    args = parser.parse_args(argv)
    items = load_items(args.data)
    train, test = pick_split(items, "train")[:: args.tune_every], pick_split(items, "test")
    if args.quick:
        train, test = train[:: max(len(train) // 12, 1)], test[:: max(len(test) // 12, 1)]
    report = common.Report(__doc__, args)
    # Without the paths of this machine.
    report.content["command"] = "python benchmarks/similarity.py --data DIR --weights FILE" + " --quick" * args.quick
    model = build(args)
    agreement = tune(model, encode(model, train, args), args.wanted)
    threshold = model.gates[0].threshold
    print(f"{model.gates[0]}, chosen on {len(train)} training clips: {agreement[threshold]:.1%} keep their answer")
    result = run(model, test, encode(model, test, args), args)
    report.content["results"] = {
        "image_size": args.size,
        "every_frame": args.every,
        "tuning_clips": len(train),
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
