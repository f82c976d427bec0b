"""Measure a gated model on a split of videos: accuracy, executed MACs, what became of frames, time; as a table.

    outcomes = run_modes(model, clips, batch_size=1, workers=0, device="cpu")  # dense, gates, gates + early termination
    marks = relevant_frames(clips.items, num_frames, data)                    # where actions are annotated
    results = [summarise(model, clips, outcome, marks) for outcome in outcomes]
    print_results(results, 1, "cpu", model.backbone.stage_names)

`calibrated` chooses thresholds on validation videos first. Costs are MACs (multiply-adds).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from tqdm import tqdm
from video_data import Clips, Item, VideoError, batches, read_rows, report_unreadable, sample_frames

from dynskip import DynskipError, SkipOutput, StopOrForward, calibrate, metrics, plot

MODES = ("dense", "gates", "gates + early termination")


@dataclass
class Result:
    """How one way of running a model did on a set of videos."""

    name: str
    top1: float
    top5: float
    mean_ap: float  # ActivityNet's
    plain_ap: float  # not interpolated, AR-Net's
    compute: metrics.ExecutedCompute
    usage: metrics.FrameUsage
    relevance: metrics.FrameRelevance | None  # over the videos whose action is annotated
    milliseconds: float  # a video
    fallbacks: int
    videos: int  # that could be read


@dataclass
class Outcome:
    """What one way of running a model gave for each of `V` videos."""

    mode: str
    positions: list[int]  # of the videos in the data set; unreadable ones are left out
    probabilities: Tensor  # (V, K)
    stopped_at: Tensor  # (V, T)
    macs: Tensor  # (V,)
    milliseconds: list[float]  # each video's share of its batch
    fallbacks: int


def evaluate(
    model: StopOrForward, clips: Clips, batch_size: int, workers: int, device: str, modes: Sequence[str] = MODES
) -> list[Result]:
    """Run a model over a split in several ways, and measure each."""
    outcomes = run_modes(model, clips, batch_size, workers, device, modes)
    return [summarise(model, clips, outcome, {}) for outcome in outcomes]


def run_modes(
    model: StopOrForward, clips: Clips, batch_size: int, workers: int, device: str, modes: Sequence[str] = MODES
) -> list[Outcome]:
    """Run a model over a split: every frame without gates, with gates, and ending videos early."""
    model.to(device).eval()
    outputs: dict[str, list[SkipOutput]] = {mode: [] for mode in modes}
    milliseconds: dict[str, list[float]] = {mode: [] for mode in modes}
    positions: list[int] = []
    unreadable: list[str] = []
    for batch in tqdm(batches(clips, batch_size, workers), desc="evaluate", leave=False, disable=None):
        unreadable += batch.errors
        if not batch.positions:
            continue
        video = clips.prep.normalize(batch.video.to(device))
        for mode in modes:
            if not positions:
                run(model, video, mode)  # first calls allocate and choose kernels: not timed
            begin = clock(device)
            outputs[mode].append(run(model, video, mode))
            milliseconds[mode] += [1000 * (clock(device) - begin) / len(video)] * len(video)
        positions += batch.positions
    report_unreadable(unreadable)
    if not positions:
        raise DynskipError("None of the videos could be read, so there is nothing to evaluate.")
    return [
        Outcome(
            mode,
            positions,
            torch.cat([output.probabilities for output in outputs[mode]]).cpu(),
            torch.cat([output.stopped_at for output in outputs[mode]]).cpu(),
            torch.cat([output.macs for output in outputs[mode]]).cpu(),
            milliseconds[mode],
            int(sum(output.fallback.sum() for output in outputs[mode])),
        )
        for mode in modes
    ]


def summarise(model: StopOrForward, clips: Clips, outcome: Outcome, marks: dict[int, Tensor]) -> Result:
    """Measure what a way of running gave; `marks` are the relevant frames of videos, where known."""
    stages, stopped_at = model.backbone.num_stages, outcome.stopped_at
    targets = multi_hot(clips, outcome.positions, model.backbone.num_classes)
    lookup = model.lookup_for((clips.prep.size, clips.prep.size))
    marked = [row for row, position in enumerate(outcome.positions) if position in marks]
    relevance = None
    if marked:
        relevant = torch.stack([marks[outcome.positions[row]] for row in marked])
        relevance = metrics.frame_relevance(stopped_at[marked] == stages, relevant)
    return Result(
        name=outcome.mode,
        top1=metrics.top_k_accuracy(outcome.probabilities, targets),
        top5=metrics.top_k_accuracy(outcome.probabilities, targets, min(5, targets.shape[1])),
        mean_ap=metrics.mean_average_precision(outcome.probabilities, targets),
        plain_ap=metrics.mean_average_precision(outcome.probabilities, targets, interpolated=False),
        compute=metrics.executed_compute(outcome.macs, stopped_at.shape[1], lookup),
        usage=metrics.frame_usage(stopped_at, stages),
        relevance=relevance,
        milliseconds=sum(outcome.milliseconds) / len(targets),
        fallbacks=outcome.fallbacks,
        videos=len(targets),
    )


def multi_hot(clips: Clips, positions: Sequence[int], num_classes: int) -> Tensor:
    """All labels of some videos, `(V, K)`."""
    targets = torch.zeros(len(positions), num_classes, dtype=torch.long)
    for row, position in enumerate(positions):
        targets[row, clips.targets[position]] = 1
    return targets


def write_per_video(
    file: Path, clips: Clips, classes: Sequence[str], outcomes: Sequence[Outcome], marks: dict[int, Tensor]
) -> None:
    """Write a line of JSON for each video and way of running."""
    lines = []
    for outcome in outcomes:
        for row, position in enumerate(outcome.positions):
            item, best = clips.items[position], outcome.probabilities[row].topk(min(5, len(classes)))
            scores = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            line: dict[str, Any] = {
                "video": str(item.path),
                "mode": outcome.mode,
                "labels": item.labels,
                "correct": int(best.indices[0]) in clips.targets[position],
                "best": {classes[index]: probability for index, probability in scores},
                "gmacs": float(outcome.macs[row]) / 1e9,
                "milliseconds": outcome.milliseconds[row],
                "stopped_at": outcome.stopped_at[row].tolist(),  # a stage; their number where used, -1 where unseen
            }
            if position in marks:
                line["relevant"] = marks[position].long().tolist()
            lines.append(json.dumps(line) + "\n")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines), encoding="utf-8")


def relevant_frames(items: Sequence[Item], num_frames: int, data: Path) -> dict[int, Tensor]:
    """Mark the frames that show an annotated action: `(T,)` by a video's position, for the videos where it is known.

    Segments come with the annotations, in seconds, or from a file `segments.csv` of `path,start,end` beside
    `labels.csv`, in frames from 0; the end is outside.
    """
    file = (data if data.is_dir() else data.parent) / "segments.csv"
    stretches: dict[Path, list[tuple[float, float]]] = {}
    if file.is_file():
        for number, row in read_rows(file, ["path", "start", "end"]):
            try:
                stretches.setdefault(file.parent / row["path"], []).append((float(row["start"]), float(row["end"])))
            except ValueError as error:
                raise DynskipError(
                    f"{file}, line {number}: start and end must be numbers of frames ({error})."
                ) from error
    marks = {}
    for position, item in enumerate(items):
        segments, duration = [(s.start, s.end) for s in item.segments], item.duration
        if item.path in stretches:
            with contextlib.suppress(VideoError):  # reported where the clip is decoded
                segments, duration = stretches[item.path], float(sample_frames(item.path, 1, 8)[1])
        if segments and duration:
            marks[position] = metrics.relevant_frames(metrics.sample_times(num_frames, duration), segments)
    return marks


def calibrated(model: StopOrForward, clips: Clips, args: argparse.Namespace) -> None:
    """Set a model's thresholds for `--budget` or `--max-loss` on validation videos."""
    model.to(args.device).eval()
    unreadable: list[str] = []

    def videos() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in tqdm(batches(clips, 8, args.workers), desc="calibrate", leave=False, disable=None):
            unreadable.extend(batch.errors)
            if batch.positions:
                targets = multi_hot(clips, batch.positions, model.backbone.num_classes)
                yield clips.prep.normalize(batch.video.to(args.device)), targets

    encoded = calibrate.encode(model, videos())
    report_unreadable(unreadable)
    if args.budget is not None:
        calibration = calibrate.to_budget(model, encoded, 1e9 * args.budget)
    else:
        calibration = calibrate.to_accuracy(model, encoded, args.max_loss / 100)
    calibration.apply(model)
    point, dense = calibration.point, calibration.dense
    print(
        f"Calibrated on {sum(len(targets) for _, targets in encoded)} validation videos: top-1 "
        f"{100 * point.accuracy:.1f} % at {point.macs / 1e9:.4g} GMACs/video (dense: {100 * dense.accuracy:.1f} % at "
        f"{dense.macs / 1e9:.4g}).\nFrames go forward above {point.forward_threshold[0]:.4g}, videos end above "
        f"{point.termination_threshold}."
    )
    if args.curve:
        args.curve.parent.mkdir(parents=True, exist_ok=True)
        curves: dict[str, Sequence[calibrate.CurvePoint]] = {
            "gates": calibration.curve,
            "uniform frames": calibrate.uniform_frames(model, encoded),
            "random frames": calibrate.random_frames(model, encoded),
            "dense": [dense],
        }
        calibrate.write_curves(args.curve.with_suffix(".csv"), curves)
        plot.accuracy_compute(curves, point, title="Validation videos").savefig(args.curve)


@torch.no_grad()
def run(model: StopOrForward, video: Tensor, mode: str) -> SkipOutput:
    """Run a model in one of `MODES`."""
    terminator = model.terminator
    model.terminator = terminator if mode == MODES[2] else None
    try:
        output: SkipOutput = model(video, dense=mode == MODES[0])
        return output
    finally:
        model.terminator = terminator


def clock(device: str) -> float:
    """Seconds; waits for the GPU to finish what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def table(results: Sequence[Result], stage_names: Sequence[str] = ()) -> str:
    """Lay results out as a Markdown table; with names of the stages, the full one."""
    rows = [cells(result, stage_names) for result in results]
    lines = ["| | " + " | ".join(rows[0]) + " |", "|---|" + "---:|" * len(rows[0])]
    lines += [f"| {r.name} | " + " | ".join(row.values()) + " |" for r, row in zip(results, rows, strict=True)]
    return "\n".join(lines)


def cells(r: Result, stage_names: Sequence[str]) -> dict[str, str]:
    """Write a row of the table as text, by column."""
    row = {
        "top-1 %": f"{100 * r.top1:.1f}",
        "mAP %": f"{100 * r.mean_ap:.1f}",
        "GMACs/frame": f"{r.compute.per_frame:.4g}",
        "GMACs/video": f"{r.compute.per_video:.4g}",
        "used %": f"{100 * r.usage.used:.1f}",
        "stopped %": f"{100 * sum(r.usage.stopped):.1f}",
        "unseen %": f"{100 * r.usage.unseen:.1f}",
        "ms/video": f"{r.milliseconds:.1f}",
    }
    if not stage_names:
        return row
    row["of dense %"] = f"{100 * r.compute.share:.1f}"
    row["top-5 %"] = f"{100 * r.top5:.1f}"
    row["plain mAP %"] = f"{100 * r.plain_ap:.1f}"
    for name, share in zip(stage_names, r.usage.stopped, strict=True):
        row[f"stopped at {name} %"] = f"{100 * share:.1f}"
    if r.relevance:
        row["used: precision %"] = f"{100 * r.relevance.precision:.1f}"
        row["used: recall %"] = f"{100 * r.relevance.recall:.1f}"
    return row


def print_results(results: Sequence[Result], batch_size: int, device: str, stage_names: Sequence[str] = ()) -> None:
    """Print the table and what its numbers mean."""
    print(f"\n{table(results, stage_names)}\n")
    print(
        f"{results[0].videos} videos. GMACs are 10^9 multiply-adds (the literature's GFLOPs), gates "
        "and head included.\n"
        f"ms: network only, {batch_size} video{'s' * (batch_size > 1)} at a time, {machine(device)}."
    )
    if stage_names:
        print("mAP: ActivityNet's, interpolated; plain mAP: not so, AR-Net's mmAP. Both count all labels of a video.")
    if stage_names and any(result.relevance for result in results):
        print("Precision and recall: used frames against the annotated segments.")
    fallbacks = results[-1].fallbacks
    if fallbacks:
        print(f"In {fallbacks} videos the gates used no frame; the furthest one was run to the end, its cost counted.")


def machine(device: str) -> str:
    """Say what computes, and with which versions."""
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    return f"{where}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"
