"""Evaluate a gated model: accuracy, executed MACs, what became of the frames, time.

    evaluation = evaluate(model, loader)
    print(evaluation.table())                            # Markdown
    evaluation.write_records(Path("videos.jsonl"))       # a line for each video and way of running
    pairs = [(videos, targets) for videos, targets, _ in loader]
    plot.accuracy_compute(curves(model, calibrate.encode(model, pairs)))

Costs are MACs (multiply-adds), the literature's "FLOPs".
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dynskip import calibrate, metrics
from dynskip._check import Lengths, Videos, with_lengths
from dynskip._targets import as_rows
from dynskip.activation import Activation, named_classes
from dynskip.errors import DynskipError
from dynskip.flops import FLOPsLookup
from dynskip.lazy import LazyVideo, Loaded
from dynskip.output import EncodedVideo, SkipOutput
from dynskip.rules import UNSEEN
from dynskip.wrapper import StopOrForward

MODES = ("dense", "gates", "gates + early termination")


class MeanLoad(NamedTuple):
    """Means over lazy videos: frames that were asked for, frames that were decoded for it, and milliseconds of that."""

    frames: float
    decoded: float
    milliseconds: float


@dataclass(frozen=True)
class Result:
    """How one way of running a model did on a set of videos.

    Attributes:
        mode: one of `MODES`.
        top1, top5: share of videos with a true class among the most probable ones; NaN for a model with one output.
        mean_ap: mean average precision as ActivityNet computes it.
        plain_ap: the same without interpolation, AR-Net's mmAP.
        compute: executed MACs.
        usage: what became of the frames.
        relevance: how well used frames match the annotated ones, where they are known.
        milliseconds: a video, network only.
        fallbacks: videos in which the gates used no frame.
        videos: number of videos.
        label_accuracy: with a sigmoid, the share of right decisions over all videos and classes; else `None`.
        loaded: of lazy videos, what their frames took on average; else `None`.
    """

    mode: str
    top1: float
    top5: float
    mean_ap: float
    plain_ap: float
    compute: metrics.ExecutedCompute
    usage: metrics.FrameUsage
    relevance: metrics.FrameRelevance | None
    milliseconds: float
    fallbacks: int
    videos: int
    label_accuracy: float | None = None
    loaded: MeanLoad | None = None


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        results: one for each way of running.
        records: plain values for each video and way of running: `video`, `mode`, `labels`, `correct` (whether the most
            probable class is one of them; with one output, whether the decision is right), `answer` (the classes that
            the model names, with their probabilities), `best` (the most probable classes), `gmacs`, `milliseconds`,
            `stopped_at` of each frame, `fallback_frame`, and where they are known the `relevant` parts, `[first frame,
            one after the last]`. Of lazy videos also `frames_loaded`, `frames_decoded` and `decode_milliseconds`.
        stage_names: names of the backbone's stages.
        setting: how it was measured, in words.
        unreadable: why lazy videos were left out: frames that the model needed could not be loaded.
    """

    results: Sequence[Result]
    records: Sequence[Mapping[str, Any]]
    stage_names: Sequence[str]
    setting: str
    unreadable: Sequence[str] = ()

    def table(self, full: bool = False) -> str:
        """Return a Markdown table, a row for each way of running.

        Args:
            full: with more metrics, and what each gate stopped.
        """
        rows = self.rows(full)
        lines = ["| | " + " | ".join(list(rows[0])[1:]) + " |", "|---|" + "---:|" * (len(rows[0]) - 1)]
        return "\n".join(lines + [f"| {' | '.join(row.values())} |" for row in rows])

    def rows(self, full: bool = False) -> list[dict[str, str]]:
        """Return the rows of the table as text by column, such as for a model card."""
        return [self._cells(result, full) for result in self.results]

    def report(self, full: bool = False) -> str:
        """Return the table, and what its numbers mean."""
        lines = [self.table(full), "", f"{self.results[0].videos} videos; {self.setting}."]
        lines.append("GMACs are 10^9 multiply-adds (the literature's GFLOPs), gates and head included.")
        if self.results[0].label_accuracy is not None:
            lines.append("labels: right decisions over all videos and classes, a class holding above probability 0.5.")
        if full:
            lines.append(
                "mAP is ActivityNet's, interpolated; plain mAP is not, as AR-Net's mmAP. All labels of a video count."
            )
        if full and any(result.relevance for result in self.results):
            lines.append("Precision and recall compare used frames with the annotated segments.")
        if any(result.loaded for result in self.results):
            lines.append("decoded: frames that were decoded for those looked at, and the time of the decoding threads.")
        if fallbacks := self.results[-1].fallbacks:
            lines.append(f"In {fallbacks} videos the gates used no frame; the furthest one was run to the end.")
        return "\n".join(lines)

    def write_records(self, file: Path) -> None:
        """Write a line of JSON for each record."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8")

    def _cells(self, r: Result, full: bool) -> dict[str, str]:
        row = {"mode": r.mode}
        if not math.isnan(r.top1):
            row["top-1 %"] = f"{100 * r.top1:.1f}"
        if r.label_accuracy is not None:
            row["labels %"] = f"{100 * r.label_accuracy:.1f}"
        row |= {
            "mAP %": f"{100 * r.mean_ap:.1f}",
            "GMACs/frame": f"{r.compute.per_frame:.4g}",
            "GMACs/video": f"{r.compute.per_video:.4g}",
            "used %": f"{100 * r.usage.used:.1f}",
            "stopped %": f"{100 * sum(r.usage.stopped):.1f}",
            "unseen %": f"{100 * r.usage.unseen:.1f}",
            "ms/video": f"{r.milliseconds:.1f}",
        }
        if r.loaded:
            row |= {"decoded/video": f"{r.loaded.decoded:.1f}", "decode ms/video": f"{r.loaded.milliseconds:.1f}"}
        if full:
            row["of dense %"] = f"{100 * r.compute.share:.1f}"
            if not math.isnan(r.top5):
                row["top-5 %"] = f"{100 * r.top5:.1f}"
            row["plain mAP %"] = f"{100 * r.plain_ap:.1f}"
            for name, share in zip(self.stage_names, r.usage.stopped, strict=True):
                row[f"stopped at {name} %"] = f"{100 * share:.1f}"
            if r.relevance:
                row["used: precision %"] = f"{100 * r.relevance.precision:.1f}"
                row["used: recall %"] = f"{100 * r.relevance.recall:.1f}"
        return row


def evaluate(
    model: StopOrForward,
    loader: Iterable[tuple[Any, Tensor, Sequence[str]]],
    modes: Sequence[str] = MODES,
    relevant: Mapping[str, Tensor] | None = None,
) -> Evaluation:
    """Run a model over videos in several ways, and measure each.

    Args:
        model: the model; it is set to eval mode.
        loader: batches of videos `(B, T, C, H, W)`, normalised and on the model's device, targets (`(B,)` class
            indices or `(B, K)` with ones; with one output, `(B,)` zeros and ones), and a key for each video. All
            videos have frames of one size. Videos of different length are padded, and are `(videos, lengths)` in the
            place of `videos`. A `LazyVideo` may take the place of a tensor.
        modes: which of `MODES`: every frame without gates, with gates, and also ending videos early.
        relevant: `(T,)` boolean, the frames that show the action, by the videos' keys; for each video, as many as it
            has frames.

    Returns:
        Results, records and tables.

    Raises:
        DynskipError: if there are no videos.
    """
    model.eval()
    outputs: dict[str, list[SkipOutput]] = {mode: [] for mode in modes}
    costs: dict[str, list[_Cost]] = {mode: [] for mode in modes}
    targets: list[Tensor] = []
    lengths: list[Tensor] = []
    keys: list[str] = []
    unreadable: list[str] = []
    for given, labels, names in loader:
        video, ends = with_lengths(given)
        while True:
            try:
                found = [_timed(model, video, mode, ends, first=not keys) for mode in modes] if len(video) else []
                break
            except DynskipError:
                if not isinstance(video, LazyVideo) or not video.failed:
                    raise
                unreadable += [str(error) for error in video.failed.values()]
                kept = [row for row in range(len(video)) if row not in video.failed]
                video, labels, names = video.rows(kept), labels[kept], [names[row] for row in kept]
                ends = None if ends is None else torch.as_tensor(ends)[kept]
        if not found:
            continue
        for mode, (output, taken) in zip(modes, found, strict=True):
            outputs[mode].append(output)
            costs[mode] += taken
        targets.append(as_rows(labels.cpu(), len(video), model.backbone.num_classes))
        size, device = (video.shape[-2], video.shape[-1]), outputs[modes[0]][-1].logits.device
        lengths.append(torch.full((len(video),), video.shape[1]) if ends is None else torch.as_tensor(ends).cpu())
        keys += names
    if not keys:
        raise DynskipError("There are no videos to evaluate, or none of them could be read.")
    lookup = model.lookup_for(size)
    results: list[Result] = []
    records: list[Mapping[str, Any]] = []
    for mode in modes:
        joined = {
            name: torch.cat([getattr(output, name) for output in outputs[mode]]).cpu()
            for name in ("probabilities", "macs", "fallback_frame")
        }
        rows = [row for output in outputs[mode] for row in output.stopped_at.cpu()]
        joined["stopped_at"] = pad_sequence(rows, batch_first=True, padding_value=UNSEEN)
        joined |= {"targets": torch.cat(targets), "lengths": torch.cat(lengths)}
        videos = _Videos(keys, relevant or {}, costs[mode], model.activation, **joined)
        results.append(_result(mode, videos, lookup))
        records += _records(mode, videos, model.class_names)
    batch = len(targets[0])
    setting = f"ms: network only, {batch} video{'s' * (batch > 1)} at a time, {machine(device)}"
    return Evaluation(results, records, model.backbone.stage_names, setting, unreadable)


@torch.no_grad()
def run(model: StopOrForward, video: Videos, mode: str, lengths: Lengths | None = None) -> SkipOutput:
    """Run a model in one of `MODES`; `video` is `(B, T, C, H, W)`, with `(B,)` lengths where it is padded."""
    terminator = model.terminator
    model.terminator = terminator if mode == MODES[2] else None
    try:
        output: SkipOutput = model(video, lengths=lengths, dense=mode == MODES[0])
        return output
    finally:
        model.terminator = terminator


class _Cost(NamedTuple):
    """What one video took: milliseconds of the network, and of a lazy video, what loading took."""

    milliseconds: float
    loaded: Loaded | None


def _timed(
    model: StopOrForward, video: Videos, mode: str, lengths: Lengths | None, first: bool
) -> tuple[SkipOutput, list[_Cost]]:
    """Run videos in one mode, and time the network."""
    device = next(model.parameters()).device
    if first:
        run(model, video, mode, lengths)  # first calls allocate and choose kernels: not timed
    begin = _clock(device)
    output = run(model, video, mode, lengths)
    seconds = _clock(device) - begin - (video.waited if isinstance(video, LazyVideo) else 0.0)
    loaded = video.loaded() if isinstance(video, LazyVideo) else [None] * len(video)
    return output, [_Cost(1000 * seconds / len(video), each) for each in loaded]


def curves(
    model: StopOrForward,
    encoded: Sequence[tuple[EncodedVideo, Tensor]],
    calibration: calibrate.Calibration | None = None,
    *,
    metric: calibrate.Metric = metrics.top_k_accuracy,
) -> dict[str, Sequence[calibrate.CurvePoint]]:
    """Return accuracy against cost for gates, for uniform and random frames, and for the dense network.

    Args:
        model: the model, in eval mode.
        encoded: videos as `calibrate.encode` returns them.
        calibration: what was found on these videos before, by the same metric; by default it is searched for now.
        metric: accuracy from probabilities `(V, K)` and targets of all videos.

    Returns:
        Curves by name, as `plot.accuracy_compute` and `calibrate.write_curves` take them.
    """
    calibration = calibration or calibrate.to_accuracy(model, encoded, 0.0, metric=metric)
    return {
        "gates": calibration.curve,
        "uniform frames": calibrate.uniform_frames(model, encoded, metric=metric),
        "random frames": calibrate.random_frames(model, encoded, metric=metric),
        "dense": [calibration.dense],
    }


def machine(device: str | torch.device) -> str:
    """Say what computes, and with which versions."""
    on_gpu = torch.device(device).type == "cuda"
    where = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    return f"{where}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"


@dataclass(frozen=True)
class _Videos:
    """What one way of running gave for `V` videos of up to `T` frames."""

    keys: Sequence[str]
    relevant: Mapping[str, Tensor]  # (T,) by key
    costs: Sequence[_Cost]
    activation: Activation
    targets: Tensor  # (V, K)
    lengths: Tensor  # (V,)
    probabilities: Tensor  # (V, K)
    stopped_at: Tensor  # (V, T)
    macs: Tensor  # (V,)
    fallback_frame: Tensor  # (V,)


def _result(mode: str, videos: _Videos, lookup: FLOPsLookup) -> Result:
    scores, targets, stages = videos.probabilities, videos.targets, len(lookup.per_stage)
    classes = scores.shape[1]
    marked = [row for row, key in enumerate(videos.keys) if key in videos.relevant]
    relevance = None
    if marked:
        used = videos.stopped_at[marked] == stages
        relevant = torch.zeros_like(used)
        for row, place in enumerate(marked):
            relevant[row, : int(videos.lengths[place])] = videos.relevant[videos.keys[place]]
        relevance = metrics.frame_relevance(used, relevant, videos.lengths[marked])
    return Result(
        mode=mode,
        top1=metrics.top_k_accuracy(scores, targets) if classes > 1 else math.nan,
        top5=metrics.top_k_accuracy(scores, targets, min(5, classes)) if classes > 1 else math.nan,
        mean_ap=metrics.mean_average_precision(scores, targets),
        plain_ap=metrics.mean_average_precision(scores, targets, interpolated=False),
        compute=metrics.executed_compute(videos.macs, videos.lengths, lookup),
        usage=metrics.frame_usage(videos.stopped_at, stages, videos.lengths),
        relevance=relevance,
        milliseconds=sum(cost.milliseconds for cost in videos.costs) / len(videos.keys),
        fallbacks=int((videos.fallback_frame >= 0).sum()),
        videos=len(videos.keys),
        label_accuracy=metrics.label_accuracy(scores, targets) if videos.activation == "sigmoid" else None,
        loaded=_mean_load([cost.loaded for cost in videos.costs if cost.loaded is not None]),
    )


def _mean_load(each: Sequence[Loaded]) -> MeanLoad | None:
    if not each:
        return None
    sums = sum(x.frames for x in each), sum(x.decoded for x in each), sum(x.milliseconds for x in each)
    return MeanLoad(*(total / len(each) for total in sums))


def _records(mode: str, videos: _Videos, class_names: Sequence[str] | None) -> list[dict[str, Any]]:
    names = class_names or [str(index) for index in range(videos.probabilities.shape[1])]
    records = []
    for row, key in enumerate(videos.keys):
        best = videos.probabilities[row].topk(min(5, len(names)))
        labels = videos.targets[row].nonzero().flatten().tolist()
        answer = named_classes(videos.probabilities[row], videos.activation)
        record = {
            "video": key,
            "mode": mode,
            "labels": [names[index] for index in labels],
            "correct": int(best.indices[0]) in labels if len(names) > 1 else list(answer) == labels,
            "answer": {names[index]: probability for index, probability in answer.items()},
            "best": {names[i]: p for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)},
            "gmacs": float(videos.macs[row]) / 1e9,
            "milliseconds": videos.costs[row].milliseconds,
            # A stage; their number where used, -1 where unseen.
            "stopped_at": videos.stopped_at[row, : int(videos.lengths[row])].tolist(),
            "fallback_frame": int(videos.fallback_frame[row]),  # -1 where frames were used
        }
        if (loaded := videos.costs[row].loaded) is not None:
            record |= {"frames_loaded": loaded.frames, "frames_decoded": loaded.decoded}
            record["decode_milliseconds"] = loaded.milliseconds
        if key in videos.relevant:
            steps = videos.relevant[key].long().diff(prepend=torch.zeros(1), append=torch.zeros(1))
            firsts, ends = (steps == 1).nonzero().flatten().tolist(), (steps == -1).nonzero().flatten().tolist()
            record["relevant"] = list(zip(firsts, ends, strict=True))
        records.append(record)
    return records


def _clock(device: torch.device) -> float:
    """Return seconds, once a GPU has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
