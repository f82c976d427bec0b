"""Evaluate a model on labelled videos: accuracy, executed MACs, what became of the frames, time.

    python examples/evaluate.py runs/mine/model --data DIR
    python examples/evaluate.py runs/mine/model --data DIR --budget 20 --curve curve.png
    python examples/evaluate.py runs/mine/model --data DIR --html report.html

MODEL is a folder that `save_pretrained` or a training recipe wrote. With --budget or --max-loss, thresholds are first
chosen on the split val. MACs are multiply-adds, the literature's "FLOPs".
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dynskip import DynskipError, EncodedVideo, StopOrForward, calibrate, evaluation, metrics, plot, report, video
from dynskip.video import command
from dynskip.video.outputs import check_files, check_folders, check_pictures


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = top.add_argument
    add("model", metavar="MODEL", help="folder of a saved model, or its name on the Hugging Face Hub")
    add("--data", type=Path, required=True, help="folder with labels.csv (path,label,split), or such a CSV file")
    add("--annotations", type=Path, nargs="+", default=[], metavar="FILE", help="annotation files of another format")
    add("--format", help="of the annotations: csv, activitynet, thumos, list, list-labels; by default told from them")
    add("--classes", type=Path, metavar="FILE", help="class list (index,name), for annotations that number classes")
    add("--cache", type=Path, metavar="DIR", help="keep decoded frames there, and use those that are there")
    add("--split", help="train, val or test; by default test, or val where there is no test")
    add("--threshold", type=float, help="probability that ends a video early, in place of the model's own")
    add("--min-frames", type=int, help="frames that are looked at in any case, in place of the model's own")
    add("--batch-size", type=int, default=1, help="videos at a time (default: 1, as the thesis times)")
    add(
        "--workers",
        type=int,
        default=min(os.cpu_count() or 1, 8),
        help="processes that decode, with --cache or --budget",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    aim = top.add_mutually_exclusive_group()
    aim.add_argument("--budget", type=float, metavar="GMACS", help="choose thresholds for this mean cost of a video")
    aim.add_argument("--max-loss", type=float, metavar="POINTS", help="or for at most so many points below dense")
    add("--curve", type=Path, metavar="PNG", help="with either: draw accuracy against cost; its data beside it, .csv")
    add("--usage", type=Path, metavar="PNG", help="draw what happened to the frames")
    add(
        "--html",
        type=Path,
        metavar="FILE",
        help="write all of it as one page, with curves and the best and worst videos",
    )
    add("--per-video", type=Path, metavar="FILE", help="write a line of JSON for each video and way of running")
    return top


def metric_of(model: StopOrForward) -> tuple[calibrate.Metric, str]:
    """Return what is maximised, and its name."""
    several = model.activation == "sigmoid"
    return (metrics.mean_average_precision, "mAP") if several else (metrics.top_k_accuracy, "top-1")


def encode(model: StopOrForward, loader: video.EvaluationLoader, name: str) -> list[tuple[EncodedVideo, torch.Tensor]]:
    """Encode videos as one batch if they are of one length: a search decides hundreds of times, batch by batch."""
    encoded = calibrate.encode(model, tqdm(loader, name, leave=False, disable=None))
    parts, targets = [part for part, _ in encoded], torch.cat([targets for _, targets in encoded])
    if any(part.lengths is not None for part in parts):
        return encoded
    pooled = tuple(torch.cat(stage) for stage in zip(*(part.pooled for part in parts), strict=True))
    logits = torch.cat([part.frame_logits for part in parts])
    return [(replace(parts[0], pooled=pooled, frame_logits=logits), targets)]


def choose_thresholds(model: StopOrForward, loader: video.EvaluationLoader, args: argparse.Namespace) -> None:
    """Set the model's thresholds for --budget or --max-loss on validation videos."""
    encoded = encode(model, loader, "calibrate")
    metric, name = metric_of(model)
    if args.budget is not None:
        calibration = calibrate.to_budget(model, encoded, 1e9 * args.budget, metric=metric)
    else:
        calibration = calibrate.to_accuracy(model, encoded, args.max_loss / 100, metric=metric)
    calibration.apply(model)
    point, dense = calibration.point, calibration.dense
    print(
        f"Calibrated on {sum(len(targets) for _, targets in encoded)} validation videos: {name} "
        f"{100 * point.accuracy:.1f} % at {point.macs / 1e9:.4g} GMACs/video (dense: {100 * dense.accuracy:.1f} % at "
        f"{dense.macs / 1e9:.4g}).\nFrames go forward above "
        f"{', '.join(f'{threshold:.4g}' for threshold in point.forward_threshold)}, videos end above "
        f"{point.termination_threshold}."
    )
    if args.curve:
        curves = evaluation.curves(model, encoded, calibration, metric=metric)
        calibrate.write_curves(args.curve.with_suffix(".csv"), curves)
        plot.accuracy_compute(curves, point, metric=name, title="Validation videos").savefig(args.curve)


def write_page(
    model: StopOrForward,
    found: evaluation.Evaluation,
    loader: video.EvaluationLoader,
    split: str,
    args: argparse.Namespace,
) -> None:
    """Write the page of an evaluation, with curves that are measured on the same videos, each in a part held out."""
    clips, notes = loader.clips, [f"Unreadable, left out: {text}" for text in (*loader.unreadable, *found.unreadable)]
    metric, name = metric_of(model)
    lines: dict[str, Sequence[calibrate.CurvePoint]] = {}
    try:
        encoded = encode(model, loader, "curve")
        own = range(sum(len(targets) for _, targets in encoded))  # each video is a group
        print("Thresholds are searched for the curve; this can take a minute.", file=sys.stderr)
        lines = {
            "gates": calibrate.curve(model, encoded, points=5, per_gate=False, metric=metric),
            "uniform frames": calibrate.uniform_frames(model, encoded, metric=metric, groups=own),
            "random frames": calibrate.random_frames(model, encoded, metric=metric, groups=own),
            "dense": [calibrate.dense(model, encoded, metric=metric, groups=own)],
        }
    except DynskipError as error:  # one video, or a model of unknown cost
        notes.append(f"There is no curve: {error}")
    places = {str(item.path): place for place, item in enumerate(clips.items)}

    def frames(key: str) -> np.ndarray | None:
        clip = clips[0, places[key]].video
        return None if clip is None else clip.permute(0, 2, 3, 1).numpy()

    given = {name.replace("_", " "): value for name, value in vars(args).items() if value not in (None, [], args.html)}
    settings = {**given, "split": split, "frames of a video": clips.prep.num_frames, "pixels": clips.prep.size}
    page = report.html_report(
        model,
        found,
        title=f"{Path(args.model).name} on {args.data.name}",
        frames=frames,
        curves=lines,
        metric=name,
        settings=settings,
        notes=notes,
    )
    args.html.write_text(page, encoding="utf-8")


def run(args: argparse.Namespace) -> int:
    """Calibrate if asked to, and evaluate; return 1 if some videos could not be read."""
    check_pictures(args.curve, args.usage)
    check_files(args.per_video, args.html, args.curve and args.curve.with_suffix(".csv"))
    check_folders(args.cache)
    model = StopOrForward.from_pretrained(args.model).to(args.device)
    for name in ("threshold", "min_frames"):
        if (value := getattr(args, name)) is not None:
            if model.terminator is None:
                raise DynskipError("The model reads every video to its end: it has no --threshold to set.")
            setattr(model.terminator, name, value)
    items = video.load_items(args.data, args.annotations, args.format, args.classes)
    split = args.split or video.held_out_split(items)
    if split is None:
        raise DynskipError("The data has no videos to test on. Say with --split train if you mean those.")

    def loader_of(split: str, batch_size: int, lazy: bool = False) -> video.EvaluationLoader:
        clips = video.Clips.of(model, video.pick_split(items, split), cache=args.cache)
        return video.EvaluationLoader(clips, batch_size, args.workers, args.device, lazy)

    if args.budget is not None or args.max_loss is not None:
        if split == "val":
            print("Thresholds are chosen and evaluated on the same videos: on others the result will be worse.")
        choose_thresholds(model, loader_of("val", 8), args)
    loader = loader_of(split, args.batch_size, lazy=args.cache is None)
    marks = video.relevant_frames(loader.clips.items, loader.clips.prep.num_frames, args.data)
    found = evaluation.evaluate(model, tqdm(loader, "evaluate", leave=False, disable=None), relevant=marks)
    print(f"\n{found.report(full=True)}")
    unreadable = [*loader.unreadable, *found.unreadable]
    for reason in unreadable:
        print(f"unreadable, left out: {reason}", file=sys.stderr)
    for note in loader.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.per_video:
        found.write_records(args.per_video)
    if args.html:
        write_page(model, found, loader_of(split, 8), split, args)
    if args.usage:
        plot.frame_usage(found.results[-1].usage, found.stage_names, title=f"{split}: frame usage").savefig(args.usage)
    return 1 if unreadable else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parser().parse_args(arguments)
    interrupted = "Nothing was written but what --cache keeps."
    return command.run(lambda: run(args), interrupted, "Lower --batch-size or --workers.")


if __name__ == "__main__":
    sys.exit(main())
