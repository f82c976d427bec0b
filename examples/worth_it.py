"""When are gates worth it? One command says it for your videos: how accurate and how costly is each way to save?

    python examples/worth_it.py --data DIR --weights FILE --light-weights FILE --frames 64 --out runs/worth_it

DIR is a folder with labels.csv (path,label,split). All frames are encoded once and kept in OUT/features; the next call
with other settings takes minutes. Compared are:

    dense            all frames through the whole network
    uniform frames   fewer frames, evenly spread
    light network    a light network alone on small copies of the frames, of all or of fewer
    similarity gates frames much like the last used one stop after the first stage; nothing is trained
    gates            trained gates after a glance: the light network is their first stage

Classifiers and gates are fitted to the split train. The other videos are divided into two halves: what is chosen on one
is measured on the other. OUT/curves.png and OUT/curves.json have all settings; the last line says what to use. It may
say that gates are not worth it. Costs are MACs (multiply-adds).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor
from tqdm import tqdm

from dynskip import (
    FixedGate,
    FLOPsLookup,
    SimilarityGate,
    SoFLoss,
    StopOrForward,
    calibrate,
    glance,
    metrics,
    plot,
    sofnet,
    stage_model,
    video,
)
from dynskip.backbone.weights import load_weights
from dynskip.calibrate import CurvePoint
from dynskip.sofnet import Recipe
from dynskip.video import command
from dynskip.video.outputs import check_folders
from dynskip.video.stored import classifier, fit_linear

GATES = "gates after a glance"
TRAINING_PAYS = 0.8  # gates are advised up to this part of what the cheapest way without training costs


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = top.add_argument
    add("--data", type=Path, required=True, help="folder with labels.csv (path,label,split), or such a CSV file")
    add("--out", type=Path, required=True, help="folder for features, curves and picture")
    add("--size", type=int, default=168, help="height and width of the frames in pixels (default: 168)")
    add("--frames", type=int, default=64, help="frames of a video (default: 64)")
    add("--backbone", default="resnet50", help="any timm model (default: resnet50)")
    add("--weights", default="hub", help="of the backbone: 'hub' downloads timm's (default), or a FILE")
    add("--light", default="tf_efficientnet_lite0", help="the light network, any timm model (default: %(default)s)")
    add("--light-weights", default="hub", help="of the light network: 'hub' (default), or a FILE")
    add("--glance-size", type=int, default=96, help="pixels of the small copies' shorter side (default: 96)")
    add("--loss", type=float, default=0.01, help="accuracy that may be lost against the best (default: 0.01, a point)")
    add("--alpha", type=float, default=0.8, help="accuracy (1) against efficiency (0) (default: 0.8)")
    add("--epochs", type=int, default=20, help="epochs on the stored features (default: 20)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that decode videos (default: all cores)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    add("--seed", type=int, default=0, help="different seeds train differently (default: 0)")
    return top


class Setting(NamedTuple):
    """One way to run the network: chosen by what it does on validation videos, judged by what on test videos."""

    says: str
    val_accuracy: float
    val_macs: float
    hits: Tensor  # (V,) whether each test video's answer is right
    macs: float  # of a test video


Side = tuple[video.StoredFeatures, Tensor]  # videos' features and targets


def networks(args: argparse.Namespace, classes: int) -> tuple[Any, Any]:
    """Return the staged backbone and the light network, both with classifiers for these classes."""
    found = []
    for name, weights in ((args.backbone, args.weights), (args.light, args.light_weights)):
        found.append(timm.create_model(name, num_classes=classes, pretrained=weights == "hub"))
        if weights != "hub":
            load_weights(found[-1], weights)
    return stage_model(found[0], input_size=(3, args.size, args.size)), found[1]


def train_gates(model: StopOrForward, side: Side, args: argparse.Namespace) -> None:
    """Train gates and inner classifiers on stored features, with the thesis' losses."""
    features, targets = side
    recipe = Recipe(0, args.epochs, lr_drop=round(0.75 * args.epochs), temperature_decay=2.8 / args.epochs)
    criterion = SoFLoss(model.lookup_for(features.image_size), args.alpha, normalize=True).to(args.device)
    optimizer = torch.optim.AdamW(recipe.parameter_groups(model)[1]["params"], weight_decay=0.1)
    model.train()
    for epoch in tqdm(range(args.epochs), "train gates", leave=False, disable=None):
        model.temperature = recipe.temperature_at(epoch)
        optimizer.param_groups[0]["lr"] = recipe.lr_at(epoch)
        for rows in torch.randperm(len(targets)).split(64):
            with torch.no_grad():
                encoded = features.rows(model, rows)
            loss = criterion(model.decide(encoded), targets[rows].to(args.device)).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def by_frames(logits: Sequence[Tensor], sides: Sequence[Side], macs: float) -> list[Setting]:
    """Measure a network that costs `macs` a frame on more and more frames; `(V, T, K)` logits of val and test."""
    settings, frames = [], logits[0].shape[1]
    for count in range(1, frames + 1):
        at, cost = metrics.sample_times(count, frames).long(), count * macs
        val, test = (x[:, at].mean(1).argmax(-1) == y for x, (_, y) in zip(logits, sides, strict=True))
        settings.append(Setting(f"{count} of {frames}", val.double().mean().item(), cost, test.double(), cost))
    return settings


@torch.no_grad()
def by_thresholds(model: StopOrForward, sides: Sequence[Side]) -> list[Setting]:
    """Measure a gated model with the thresholds that no others beat on the validation videos."""
    stages, settings = model.backbone.num_stages, []

    def batches(side: Side) -> Any:
        features, targets = side
        own = replace(features, pooled=features.pooled[-stages:])  # without the glance where the model has none
        return [(own.rows(model, rows), targets[rows]) for rows in torch.arange(len(targets)).split(64)]

    val, test = map(batches, sides)
    for point in calibrate.to_accuracy(model, val, 1.0, per_gate=False).curve:
        point.apply(model)
        outputs = [model.decide(encoded) for encoded, _ in test]
        right = [output.logits.argmax(-1).cpu() == targets for output, (_, targets) in zip(outputs, test, strict=True)]
        macs = torch.cat([output.macs for output in outputs]).mean().item()
        ends = point.termination_threshold
        says = f"forward_threshold={point.forward_threshold[0]:.3g}" + (f", ending at {ends:.6g}" if ends else "")
        settings.append(Setting(says, point.accuracy, point.macs, torch.cat(right).double(), macs))
    return settings


def advise(ways: dict[str, list[Setting]], loss: float) -> str:
    """List what each way needs to come within `loss` of the best validation accuracy; the cheapest is the advice."""
    dense, limit = ways["dense"][0], max(each.val_accuracy for own in ways.values() for each in own) - loss - 1e-9
    lines, prices, gains = [], {}, {}
    for name, settings in ways.items():
        fine = [each for each in settings if each.val_accuracy >= limit]
        shown = min(fine, key=lambda each: each.val_macs) if fine else max(settings, key=lambda each: each.val_accuracy)
        gain = shown.hits - dense.hits
        told = f"{shown.hits.mean():.1%} right at {shown.macs / dense.macs:.1%} of the dense cost"
        gains[name] = f"{told}, {100 * gain.mean():+.1f} ± {100 * gain.std() / math.sqrt(len(gain)):.1f} points"
        lines.append(f"{name:<22}{gains[name]} ({shown.says}{'' if fine else '; the best it can'})")
        if fine:  # gates have to be trained, so they must save more than a little
            prices[name] = shown.val_macs * (1 if name == GATES else TRAINING_PAYS)
    best = min(prices, key=lambda name: prices[name])
    return "\n".join([*lines, f"Use {best}: {gains[best]} against dense (± one standard error)."])


def encode(model: StopOrForward, items: Sequence[video.Item], split: str, args: argparse.Namespace) -> Side:
    """Return the features and targets of a split; of several labels, the first one counts."""
    clips = video.Clips(video.pick_split(items, split), model.class_names, video.Preprocessing.of(model))
    features = video.encode_clips(model, clips, args.out / "features" / split, args.workers)
    return features, torch.tensor([clips.targets[position][0] for position in features.positions.tolist()])


def halves(side: Side) -> list[Side]:
    """Divide each class' videos in the middle, so that neighbours, which often share a source, stay together."""
    (whole, targets), found = side, []
    own = [(targets == k).nonzero().flatten() for k in targets.unique()]
    for half in (0, 1):
        rows = torch.cat([each.tensor_split(2)[half] for each in own])
        pooled = tuple(stage[rows] for stage in whole.pooled)
        part = replace(whole, pooled=pooled, embedding=whole.embedding[rows], positions=whole.positions[rows])
        found.append((part, targets[rows]))
    return found


def run(args: argparse.Namespace) -> None:
    """Encode, train, compare, and write curves, picture and advice."""
    check_folders(args.out)
    torch.manual_seed(args.seed)
    items = video.load_items(args.data)
    names = video.class_names(items)
    backbone, light = networks(args, len(names))
    small = stage_model(light, input_size=(3, args.glance_size, args.glance_size))
    light_macs = FLOPsLookup.measure(small, args.glance_size).dense
    light.reset_classifier(0)
    glanced = glance(backbone, light, args.glance_size)
    glanced.requires_grad_(False)
    model = sofnet(glanced, hidden=64, detach_inner=False, forward_bias=1.0).to(args.device)
    model.class_names = names
    known = backbone.model.pretrained_cfg
    model.preprocessing = video.Preprocessing(args.size, args.frames, known["mean"], known["std"]).to_dict()
    model.to(memory_format=torch.channels_last)
    train = encode(model, items, "train", args)
    held_out = halves(encode(model, items, video.held_out_split(items) or "test", args))
    video.fit_classifier(model, *train)
    light_head = torch.nn.Linear(train[0].pooled[0].shape[-1], len(names))
    fit_linear(light_head, train[0].pooled[0].mean(1), train[1], 0.03)
    with torch.no_grad():
        logits = [classifier(model)(features.embedding.to(args.device)).cpu() for features, _ in held_out]
        light_logits = [light_head(features.pooled[0]) for features, _ in held_out]
    train_gates(model, train, args)
    first, *others = backbone.num_features
    similar = StopOrForward(backbone, [SimilarityGate(first), *(FixedGate() for _ in others)]).eval()
    macs = similar.lookup_for((args.size, args.size)).dense
    frames = by_frames(logits, held_out, macs)
    ways = {
        "dense": frames[-1:],
        "uniform frames": frames,
        "the light network": by_frames(light_logits, held_out, light_macs),
        "similarity gates": by_thresholds(similar, held_out),
        GATES: by_thresholds(model, held_out),
    }
    curves = {name: [CurvePoint(x.hits.mean().item(), x.macs) for x in settings] for name, settings in ways.items()}
    calibrate.write_curves(args.out / "curves.json", curves)
    title = f"{len(held_out[1][1])} test videos of {args.frames} frames"
    plot.accuracy_compute(curves, title=title).savefig(args.out / "curves.png")
    share = metrics.relevant_share(torch.cat(logits), torch.cat([targets for _, targets in held_out]))
    print(f"{title}; dense, they take {args.frames * macs / 1e9:.4g} GMACs each.")
    print(f"About {share:.0%} of the frames show what the label says, or more.")
    print(advise(ways, args.loss))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parser().parse_args(arguments)
    interrupted = "The same command goes on; what is encoded stays."
    return command.run(lambda: run(args), interrupted, "Lower --workers, --size or --frames.")


if __name__ == "__main__":
    sys.exit(main())
