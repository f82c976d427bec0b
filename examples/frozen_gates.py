"""Gates for a classifier that is finished: its backbone stays as it is, gates are trained on its stored features.

    python examples/frozen_gates.py --weights FILE --data DIR --out runs/frozen

Every frame is encoded once and its features are stored in OUT/features; after that an epoch takes seconds, even on a
CPU. Where the data have other classes, a new last layer is fitted first. The same command goes on where it was stopped.
Written is a folder OUT/model for evaluate.py, predict.py, stream_video.py and corpus_ray.py. MACs are multiply-adds,
the literature's "FLOPs".
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dynskip import DynskipError, SoFLoss, StopOrForward, evaluation, glance, sofnet, stage_model, video
from dynskip.backbone.weights import load_weights
from dynskip.sofnet import Recipe
from dynskip.video import command
from dynskip.video.outputs import check_folders


def parser() -> argparse.ArgumentParser:
    """Describe the command line; the defaults are those of docs/results.md."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = top.add_argument
    add("--out", type=Path, required=True, help="folder for features, log and trained model")
    add("--data", type=Path, required=True, help="folder with labels.csv (path,label,split), or such a CSV file")
    add("--annotations", type=Path, nargs="+", default=[], metavar="FILE", help="annotation files of another format")
    add("--format", help="of the annotations: csv, activitynet, thumos, list, list-labels; by default told from them")
    add("--classes", type=Path, metavar="FILE", help="class list (index,name), for annotations that number classes")
    add("--cache", type=Path, metavar="DIR", help="keep decoded frames there, and use those that are there")
    add("--size", type=int, default=168, help="height and width of the frames in pixels (default: 168)")
    add("--frames", type=int, default=16, help="frames of a video (default: 16)")
    add("--backbone", default="resnet50", help="any timm model (default: resnet50)")
    add("--weights", default="hub", help="of the backbone: 'hub' downloads timm's (default), or a FILE")
    add("--glance", metavar="NAME", help="light timm model that looks at a small copy of each frame first")
    add("--glance-size", type=int, default=96, help="shorter side of that copy in pixels (default: 96)")
    add("--glance-weights", default="hub", help="of the light model: as --weights")
    add("--activation", choices=("softmax", "sigmoid"), default="softmax", help="one class a video, or several")
    add("--hidden", type=int, default=64, help="width of the gates (default: 64)")
    add("--threshold", type=float, default=0.999, help="probability that ends a video early (default: 0.999)")
    add("--min-frames", type=int, default=3, help="frames that are looked at in any case (default: 3)")
    add("--alpha", type=float, default=0.9, help="accuracy (1) against efficiency (0) (default: 0.9)")
    add("--beta", type=float, default=0.9, help="inner classification (1) against self-supervision (0) (default: 0.9)")
    add("--epochs", type=int, default=40, help="epochs on the stored features (default: 40)")
    add("--lr", type=float, default=1e-3, help="learning rate of AdamW (default: 0.001)")
    add("--weight-decay", type=float, default=0.1, help="(default: 0.1)")
    add("--batch-size", type=int, default=64, help="videos of a step (default: 64)")
    add("--workers", type=int, default=min(os.cpu_count() or 1, 8), help="processes that decode videos")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    add("--seed", type=int, default=0, help="different seeds train differently (default: 0)")
    return top


def build_model(args: argparse.Namespace, classes: Sequence[str]) -> tuple[StopOrForward, bool]:
    """Return the model, and whether its classifier is new."""
    torch.manual_seed(args.seed)
    backbone = stage_model(
        args.backbone, num_classes=len(classes), input_size=(3, args.size, args.size), pretrained=args.weights == "hub"
    )
    network: Any = backbone.model
    published = network.pretrained_cfg
    new = published["num_classes"] != len(classes) if args.weights == "hub" else not load_weights(network, args.weights)
    if args.glance is not None:
        backbone = glance(backbone, args.glance, args.glance_size, pretrained=args.glance_weights == "hub")
        if args.glance_weights != "hub":
            load_weights(backbone.glance.light.model, args.glance_weights)
    backbone.requires_grad_(False)
    model = sofnet(
        backbone,
        hidden=args.hidden,
        detach_inner=False,
        forward_bias=0.0,
        threshold=args.threshold,
        min_frames=args.min_frames,
        activation=args.activation,
    )
    model.class_names = classes
    prep = video.Preprocessing(args.size, args.frames, tuple(published["mean"]), tuple(published["std"]))
    model.preprocessing = prep.to_dict()
    return model.to(args.device).to(memory_format=torch.channels_last), new


def train(model: StopOrForward, features: video.StoredFeatures, clips: video.Clips, args: Any) -> None:
    """Train gates and inner classifiers on stored features, with the loss of joint training."""
    recipe = Recipe(0, args.epochs, args.lr, weight_decay=args.weight_decay, temperature_decay=0.07)
    criterion = SoFLoss(model.lookup_for(features.image_size), args.alpha, args.beta).to(args.device)
    optimizer = torch.optim.AdamW(recipe.parameter_groups(model)[1]["params"], weight_decay=recipe.weight_decay)
    log, positions = [], features.positions.tolist()
    for epoch in tqdm(range(recipe.epochs), "train gates", leave=False, disable=None):
        torch.manual_seed(video.derive_seed(args.seed, epoch))
        model.train()
        model.temperature = recipe.temperature_at(epoch)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(epoch)
        if model.activation == "sigmoid":
            targets = clips.multi_hot(positions).to(args.device)
        else:  # of a video with several labels, an epoch draws one
            labels = [clips.targets[position] for position in positions]
            drawn = [own[video.derive_seed(args.seed, epoch, row) % len(own)] for row, own in enumerate(labels)]
            targets = torch.tensor(drawn, device=args.device)
        sums: dict[str, float] = {}
        for rows in torch.randperm(len(features)).split(args.batch_size):
            with torch.no_grad():
                encoded = features.rows(model, rows)
            output = model.decide(encoded)
            parts = criterion(output, targets[rows])
            optimizer.zero_grad()
            parts.total.backward()
            optimizer.step()
            answers = output.probabilities > 0.5 if targets.ndim == 2 else output.logits.argmax(-1)
            accuracy = (answers == targets[rows]).float().mean()
            for name, value in {"accuracy": accuracy, "used": output.used.float().mean(), **vars(parts)}.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(rows) / len(features)
        if not torch.tensor(sums["total"]).isfinite():
            raise DynskipError(f"The loss became {sums['total']} in epoch {epoch + 1}. Lower --lr.")
        log.append({"epoch": epoch, **sums})
        (args.out / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    print("last epoch: " + ", ".join(f"{name} {value:.3f}" for name, value in sums.items()))


def run(args: argparse.Namespace) -> None:
    """Encode, fit, train, evaluate, and write the model."""
    check_folders(args.out, args.cache)
    items = video.load_items(args.data, args.annotations, args.format, args.classes)
    model, new_classifier = build_model(args, video.class_names(items, args.classes))

    def clips_of(split: str) -> video.Clips:
        return video.Clips.of(model, video.pick_split(items, split), cache=args.cache)

    clips = clips_of("train")
    features = video.encode_clips(model, clips, args.out / "features" / "train", args.workers)
    if new_classifier:
        shares = clips.multi_hot(features.positions.tolist()).float()
        several = model.activation == "sigmoid"
        video.fit_classifier(model, features, shares if several else shares / shares.sum(1, keepdim=True))
    train(model, features, clips, args)
    rows = []
    if (split := video.held_out_split(items)) is not None:
        held_out = clips_of(split)
        marks = video.relevant_frames(held_out.items, held_out.prep.num_frames, args.data)
        loader = video.EvaluationLoader(held_out, 1, args.workers, args.device)
        found = evaluation.evaluate(model, tqdm(loader, "evaluate", leave=False, disable=None), relevant=marks)
        found.write_records(args.out / "videos.jsonl")
        print("\n".join(f"unreadable, left out: {error}" for error in loader.unreadable) + f"\n{found.report()}\n")
        rows = found.rows()
    shutil.rmtree(args.out / "model", ignore_errors=True)
    print(f"Model: {model.eval().save_pretrained(args.out / 'model', results=rows)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parser().parse_args(arguments)

    def work() -> None:
        with video.hold_folder(args.out):
            run(args)

    interrupted = "The same command goes on; what is encoded stays."
    return command.run(work, interrupted, "Lower --workers, --size, --frames or --batch-size.")


if __name__ == "__main__":
    sys.exit(main())
