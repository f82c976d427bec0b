"""Gates for your videos in one command: train the backbone, fit gates to its stored features, calibrate, evaluate.

    python examples/train_gates.py --data DIR --out runs/mine
    python examples/train_gates.py --data DIR --out runs/mine --glance efficientnet_lite0    # where few frames matter
    python examples/train_gates.py --data DIR --out runs/frozen --weights FILE --epochs 0    # a finished classifier
    python examples/train_gates.py --demo                                                    # rendered videos

1. The backbone learns for --epochs to answer from any part of a video, without gates. With --epochs 0 it stays as it
   is, and a new last layer is fitted if its classes are others.
2. All frames of the training videos go through it once more, in --variants variants: the middle crop, and others drawn
   as in training. The features are kept in OUT/features.
3. Gates and inner classifiers are fitted to the features. An epoch takes seconds, even on a CPU.
4. All thresholds are chosen on validation videos: the cheapest within --max-loss of the network that looks at
   everything. Where the data have no split val beside the test videos, a fifth of the training videos is set aside.
5. OUT/model is measured on the test videos. evaluate.py, predict.py, stream_video.py and corpus_ray.py take it.

The same command goes on where it was stopped. MACs are multiply-adds, the literature's "FLOPs".
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dynskip import DynskipError, StopOrForward, calibrate, evaluation, glance, metrics, plot, sofnet, video
from dynskip.backbone import stage_model
from dynskip.backbone.weights import load_weights
from dynskip.losses import AnytimeLoss, SoFLoss, WorthLoss
from dynskip.sofnet import Recipe
from dynskip.video import command
from dynskip.video.outputs import check_folders, whole_file
from dynskip.video.stored import classifier

DEMO = {"backbone": "test_resnet", "weights": "none", "size": 48, "workers": 0, "lr": 3e-3, "epochs": 20}
VAL_SHARE = 0.2  # of the training videos, where there are no others to choose thresholds on
NEW_LAYER = 10  # learning rate of a new last layer over that of trained weights


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = top.add_argument
    add("--out", type=Path, default=Path("runs/gates"), help="folder for all that is made (default: runs/gates)")
    add("--demo", action="store_true", help="render videos to OUT/videos; train a tiny network on them")
    add("--data", type=Path, help="folder with labels.csv (path,label,split), or such a CSV file")
    add("--annotations", type=Path, nargs="+", default=[], metavar="FILE", help="annotation files of another format")
    add("--format", help="of the annotations: csv, activitynet, thumos, list, list-labels; by default told from them")
    add("--classes", type=Path, metavar="FILE", help="class list (index,name), for annotations that number classes")
    add("--groups", metavar="REGEX", help="what names a video's recording in its path: none is in two parts")
    add("--cache", type=Path, metavar="DIR", help="keep decoded frames there, and use those that are there")
    add("--size", type=int, default=168, help="height and width of the frames in pixels (default: 168)")
    add("--frames", type=int, default=16, help="frames of a video (default: 16)")
    add("--backbone", default="resnet50", help="any timm model (default: resnet50)")
    add("--weights", default="hub", help="'hub' downloads timm's (default), 'none' starts anew, or a FILE")
    add("--glance", metavar="NAME", help="light timm model that looks at a small copy of each frame first")
    add("--glance-size", type=int, default=96, help="shorter side of that copy in pixels (default: 96)")
    add("--glance-weights", default="hub", help="of the light model: as --weights")
    add("--activation", choices=("softmax", "sigmoid"), default="softmax", help="one class a video, or several")
    add("--epochs", type=int, default=8, help="of the backbone; 0 leaves it as it is (default: 8)")
    add("--lr", type=float, default=5e-5, help="of the backbone, a tenth in the last quarter (default: 0.00005)")
    add("--batch-size", type=int, default=8, help="videos of a step of the backbone (default: 8)")
    add("--variants", type=int, default=3, help="variants of each video that gates are fitted to (default: 3)")
    add("--hidden", type=int, default=64, help="width of the gates (default: 64)")
    add("--alpha", type=float, default=0.8, help="accuracy (1) against efficiency (0) (default: 0.8)")
    add("--gate-epochs", type=int, default=30, help="epochs on the stored features (default: 30)")
    add("--max-loss", type=float, default=0.0, help="points below all frames that thresholds may cost (default: 0)")
    add("--workers", type=int, default=min(os.cpu_count() or 1, 8), help="processes that decode videos")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    add("--seed", type=int, default=0, help="different seeds train differently (default: 0)")
    return top


# What each phase depends on: it goes on where these are the same, and is refused where not.
BACKBONE = ("size", "frames", "backbone", "weights", "activation", "epochs", "lr", "batch_size", "seed", "names")
GATES = (*BACKBONE, "glance", "glance_size", "variants", "hidden", "alpha", "gate_epochs")


def epochs(name: str, count: int, settings: Sequence[str], parts: dict[str, Any], args: Any) -> Iterator[int]:
    """Count epochs, and keep what they change in OUT/NAME.pt after each: a run goes on after the last whole one."""
    file = args.out / f"{name}.pt"
    own, first = {key: str(getattr(args, key)) for key in settings}, 0
    if file.exists():
        content = torch.load(file, map_location="cpu", weights_only=True)
        differ = [key for key, value in own.items() if content["settings"].get(key) != value]
        if changes := video.data_changes(content["videos"], args.videos):
            differ.append(f"videos{changes}")
        if differ:
            raise DynskipError(f"{file} has other settings: {', '.join(differ)}. Delete it, or choose another --out.")
        first = content["epoch"]
        for key, part in parts.items():
            part.load_state_dict(content[key])
    for epoch in tqdm(range(first, count), name, count, initial=first, leave=False, disable=None):
        torch.manual_seed(video.derive_seed(args.seed, epoch))
        yield epoch
        states = {key: part.state_dict() for key, part in parts.items()}
        with whole_file(file, "The same command goes on.") as opened:
            torch.save({"settings": own, "videos": args.videos, "epoch": epoch + 1, **states}, opened)


def build_model(args: argparse.Namespace) -> tuple[StopOrForward, bool]:
    """Return the model, and whether its classifier is new."""
    torch.manual_seed(args.seed)
    size, hub = (3, args.size, args.size), args.weights == "hub"
    backbone = stage_model(args.backbone, num_classes=len(args.names), input_size=size, pretrained=hub)
    network: Any = backbone.model
    published, new = network.pretrained_cfg, True
    if hub:
        new = published["num_classes"] != len(args.names)
    elif args.weights != "none":
        new = not load_weights(network, args.weights)
    if args.glance is not None:
        backbone = glance(backbone, args.glance, args.glance_size, pretrained=args.glance_weights == "hub")
        if args.glance_weights not in ("hub", "none"):
            load_weights(backbone.glance.light.model, args.glance_weights)
    model = sofnet(backbone, hidden=args.hidden, detach_inner=False, forward_bias=1.0, activation=args.activation)
    prep = video.Preprocessing(args.size, args.frames, tuple(published["mean"]), tuple(published["std"]))
    model.class_names, model.preprocessing = args.names, prep.to_dict()
    return model.to(args.device).to(memory_format=torch.channels_last), new


def recording(item: video.Item, args: argparse.Namespace) -> str:
    """Name what a video was cut from; by default, each is a recording of its own."""
    found = re.search(args.groups, str(item.path)) if args.groups else None
    return found[0] if found else str(item.path)


def divide(items: Sequence[video.Item], args: argparse.Namespace) -> list[video.Item]:
    """Return the items with a split val that is not the one to be tested on: set aside from train if need be."""
    if {"val", "test"} <= {item.split for item in items}:
        return list(items)
    groups = sorted({recording(item, args) for item in items if item.split == "train"})
    random.Random(args.seed).shuffle(groups)
    aside = set(groups[: max(1, round(VAL_SHARE * len(groups)))])
    # Where there was no test split, val is what is tested on.
    train, rest = ([item for item in items if (item.split == "train") is own] for own in (True, False))
    train = [replace(item, split="val") if recording(item, args) in aside else item for item in train]
    return train + [replace(item, split="test") for item in rest]


def train_backbone(model: StopOrForward, clips: video.Clips, new: bool, args: argparse.Namespace) -> None:
    """Train the network to answer from all frames, and from any part of them. Gates take no part."""
    network, last = model.backbone.model.requires_grad_(True), list(classifier(model).parameters())
    others = [parameter for parameter in network.parameters() if all(parameter is not own for own in last)]
    scratch = args.weights == "none"
    groups = [{"params": others, "scale": 1}, {"params": last, "scale": NEW_LAYER if new and not scratch else 1}]
    optimizer, criterion = torch.optim.AdamW(groups, args.lr, weight_decay=0.05), AnytimeLoss()
    for epoch in epochs("backbone", args.epochs, BACKBONE, {"network": network, "optimizer": optimizer}, args):
        model.train()
        for module in () if scratch else network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # its statistics stay those of the weights
        for group in optimizer.param_groups:
            group["lr"] = args.lr * group["scale"] * (0.1 if epoch >= 0.75 * args.epochs else 1)
        total = torch.zeros((), device=args.device)
        loader = video.training_batches(clips, epoch, args.batch_size, workers=args.workers)
        for batch in tqdm(loader, f"backbone, epoch {epoch + 1}", leave=False, disable=None):
            frames, lengths = clips.prep.normalize(batch.video.to(args.device)), batch.lengths
            loss = criterion(model(frames, lengths=lengths, dense=True), batch.targets.to(args.device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            total += loss.detach()
        note("backbone", epoch, {"loss": total.item() / len(loader)}, args)


def note(phase: str, epoch: int, values: dict[str, float], args: argparse.Namespace) -> None:
    """Add a line to the log; refuse a loss that is no number."""
    if not all(torch.tensor(value).isfinite() for value in values.values()):
        raise DynskipError(f"The loss became NaN or infinite in epoch {epoch + 1} of the {phase}. Lower --lr.")
    with (args.out / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps({"phase": phase, "epoch": epoch, **values}) + "\n")
    tqdm.write(f"{phase} {epoch + 1}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))


def targets_of(clips: video.Clips, features: video.StoredFeatures, device: str = "cpu") -> Tensor:
    """Return how much each class holds in the videos: all labels; for a softmax, with equal shares."""
    labels = clips.multi_hot(features.positions.tolist()).float().to(device)
    return labels if clips.activation == "sigmoid" else labels / labels.sum(1, keepdim=True)


def train_gates(model: StopOrForward, variants: Sequence[Any], clips: video.Clips, args: argparse.Namespace) -> None:
    """Fit gates and inner classifiers to stored features: the thesis' loss, with `WorthLoss` for self-supervision."""
    model.backbone.requires_grad_(False)
    count, lookup = args.gate_epochs, model.lookup_for((args.size, args.size))
    recipe = Recipe(0, count, lr_drop=round(0.75 * count), temperature_decay=2.8 / max(count, 1))
    criterion = SoFLoss(lookup, args.alpha, beta=1.0, normalize=True).to(args.device)
    worth = WorthLoss(lookup).to(args.device)
    optimizer = torch.optim.AdamW(recipe.parameter_groups(model)[1]["params"], weight_decay=0.1)
    parts = {"gates": model.gates, "inner": model.inner, "optimizer": optimizer}
    for epoch in epochs("gates", count, GATES, parts, args):
        model.train()
        model.temperature, optimizer.param_groups[0]["lr"] = recipe.temperature_at(epoch), recipe.lr_at(epoch)
        features, sums = variants[epoch % len(variants)], dict[str, float]()
        targets = targets_of(clips, features, args.device)
        for rows in torch.randperm(len(features)).split(64):
            output = model.decide(features.rows(model, rows))
            losses, told = criterion(output, targets[rows]), worth(output, targets[rows])
            optimizer.zero_grad()
            (losses.total + told).backward()
            optimizer.step()
            for name, value in {"used": output.used.float().mean(), **vars(losses), "worth": told}.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(rows) / len(features)
        note("gates", epoch, sums, args)


def choose_thresholds(model: StopOrForward, features: Any, clips: video.Clips, args: argparse.Namespace) -> None:
    """Set the thresholds of gates and terminator by a curve whose points are measured on videos not searched on."""
    positions = features.positions.tolist()
    targets = clips.multi_hot(positions)
    encoded = [(features.rows(model, rows), targets[rows]) for rows in torch.arange(len(features)).split(64)]
    several = model.activation == "sigmoid"
    metric, name = (metrics.mean_average_precision, "mAP") if several else (metrics.top_k_accuracy, "top-1")
    groups = [recording(clips.items[position], args) for position in positions]
    dense = calibrate.dense(model, encoded, metric=metric, groups=groups)
    curve = calibrate.curve(model, encoded, metric=metric, groups=groups)
    good = [point for point in curve if point.accuracy >= dense.accuracy - args.max_loss / 100 - 1e-9]
    point = min(good or curve[-1:], key=lambda point: point.macs)
    point.apply(model)
    low, high = point.band or (point.accuracy, point.accuracy)
    print(
        f"Thresholds chosen on {len(features)} validation videos: {name} {100 * point.accuracy:.1f} % ({100 * low:.1f} "
        f"to {100 * high:.1f}) at {point.macs / dense.macs:.0%} of the cost of all frames, which have "
        f"{100 * dense.accuracy:.1f} %."
    )
    ways = {"gates": curve, "uniform frames": calibrate.uniform_frames(model, encoded, metric=metric), "dense": [dense]}
    calibrate.write_curves(args.out / "curves.json", ways)
    plot.accuracy_compute(ways, point, metric=name, title="Validation videos").savefig(args.out / "curves.png")


def run(args: argparse.Namespace) -> None:
    """Do one phase after the other."""
    if args.data is None and not args.demo:
        raise DynskipError("Say with --data where the videos are, or try --demo.")
    if args.demo:
        args.data = video.render_set(args.out / "videos", train_per_class=50, test_per_class=30, seed=args.seed)
        args.cache = args.out / "cache"
    items = video.load_items(args.data, args.annotations, args.format, args.classes)
    args.names, args.videos = video.class_names(items, args.classes), video.list_videos(items, args.data)
    items = divide(items, args)
    model, new = build_model(args)

    def clips_of(split: str, training: bool = False) -> video.Clips:
        return video.Clips.of(model, video.pick_split(items, split), training, args.seed, args.cache)

    def encode(clips: video.Clips, name: str, epoch: int = 0) -> video.StoredFeatures:
        return video.encode_clips(model, clips, args.out / "features" / name, args.workers, epoch)

    middle, drawn, val = clips_of("train"), clips_of("train", training=True), clips_of("val")
    train_backbone(model, drawn, new, args)
    variants = [encode(middle, "variant0")]  # the draws of others are not those of the backbone's epochs
    variants += [encode(drawn, f"variant{k}", args.epochs + k) for k in range(1, args.variants)]
    if new and not args.epochs:
        video.fit_classifier(model, variants[0], targets_of(middle, variants[0]))
    train_gates(model, variants, middle, args)
    choose_thresholds(model.eval(), encode(val, "val"), val, args)
    rows = []
    if any(item.split == "test" for item in items):
        test = clips_of("test")
        marks = video.relevant_frames(test.items, test.prep.num_frames, args.data)
        loader = video.EvaluationLoader(test, 1, args.workers, args.device)
        found = evaluation.evaluate(model, tqdm(loader, "evaluate", leave=False, disable=None), relevant=marks)
        found.write_records(args.out / "videos.jsonl")
        print("\n".join(f"unreadable, left out: {error}" for error in loader.unreadable) + f"\n{found.report()}\n")
        rows = found.rows()
    shutil.rmtree(args.out / "model", ignore_errors=True)
    print(f"Model: {model.save_pretrained(args.out / 'model', results=rows)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    top = parser()
    if top.parse_args(arguments).demo:
        top.set_defaults(**DEMO)
    args = top.parse_args(arguments)

    def work() -> None:
        check_folders(args.out, args.cache)
        with video.hold_folder(args.out):  # one run at a time
            run(args)

    return command.run(work, "The same command goes on after the last whole epoch.", "Lower --workers or --batch-size.")


if __name__ == "__main__":
    sys.exit(main())
