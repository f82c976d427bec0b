"""Choose thresholds for a budget or an accuracy, without training.

The backbone runs once on validation videos; what other thresholds would decide is replayed from its features, gates
with their memory included, so every point of a curve is what the model does with these thresholds.
"""

from __future__ import annotations

import copy
import csv
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from dynskip._fx import in_mode
from dynskip.backbone import StagedBackbone
from dynskip.errors import DynskipError
from dynskip.flops import FLOPsLookup
from dynskip.gates import FORWARD, STOP
from dynskip.metrics import top_k_accuracy
from dynskip.output import EncodedVideo, SkipOutput, fallback_frames, masked_output, mean_where, running_probabilities
from dynskip.terminate import EarlyTerminator, end_videos


class Gated(Protocol):
    """What this module asks of a model: `StopOrForward` and `EarlyExit` have it."""

    backbone: StagedBackbone
    forward_threshold: tuple[float, ...]

    def encode(self, frames: Tensor, /) -> EncodedVideo:
        """Run the whole backbone."""

    def decide(self, encoded: EncodedVideo, /) -> SkipOutput:
        """Gate every frame from its stored features."""

    def lookup_for(self, image_size: tuple[int, int], /) -> FLOPsLookup:
        """Return the cost table for frames of a size."""


Batches = Iterable[tuple[Tensor | EncodedVideo, Tensor]]
Metric = Callable[[Tensor, Tensor], float]

_LEVELS = 16  # steps of the first sweep, from every frame to none
_BOUND = 36.0  # of the forward logit above the stop logit; a probability has no digits for more
_STEPS = (1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128)  # of the search around the best point so far


@dataclass(frozen=True)
class CurvePoint:
    """What one way of classifying a set of videos reaches, and what it executes.

    Attributes:
        accuracy: by the metric asked for, top-1 by default; from 0 to 1.
        macs: mean executed MACs (multiply-adds) a video, gates and head included; in the cost table's unit.
    """

    accuracy: float
    macs: float


@dataclass(frozen=True)
class OperatingPoint(CurvePoint):
    """Thresholds of a model, and what it reaches and executes with them.

    Attributes:
        forward_threshold: forward probability that a frame must exceed, one a gate.
        termination_threshold: probability that ends a video; `None` reads every video to its end.
    """

    forward_threshold: tuple[float, ...]
    termination_threshold: float | None

    def apply(self, model: Gated) -> None:
        """Set a model's thresholds to these.

        Args:
            model: the model that was calibrated, or one with as many gates.

        Raises:
            DynskipError: if it has another number of gates, or no terminator to set.
        """
        _check_fits(self, model)
        model.forward_threshold, terminator = self.forward_threshold, _terminator(model)
        if terminator is None:
            return
        if self.termination_threshold is None:
            model.terminator = None  # type: ignore[attr-defined]
        else:
            terminator.threshold = self.termination_threshold


@dataclass(frozen=True)
class Calibration:
    """The thresholds chosen, and what else could be had.

    Attributes:
        point: the choice.
        curve: the points that no other one beats, from the cheapest to the most accurate.
        dense: the plain backbone on every frame, without gates.
    """

    point: OperatingPoint
    curve: tuple[OperatingPoint, ...]
    dense: CurvePoint

    def apply(self, model: Gated) -> None:
        """Set a model's thresholds to the chosen ones; see `OperatingPoint.apply`."""
        self.point.apply(model)


def to_budget(
    model: Gated,
    batches: Batches,
    macs: float,
    *,
    per_gate: bool = False,
    metric: Metric = top_k_accuracy,
) -> Calibration:
    """Find the most accurate thresholds within a budget. The model is left as it is: `apply` the result.

    Args:
        model: any gated model; its terminator, if it has one, is calibrated, too.
        batches: validation videos as `(videos, targets)`: `(B, T, C, H, W)` normalised frames or what `encode` returned
            for them, and what the metric takes, class indices `(B,)` or multi-hot `(B, K)`.
        macs: MACs (multiply-adds) that a video may cost on average; `20e9` are 20 GMACs.
        per_gate: search a threshold for each gate, which takes a few times as long. By default all gates share one.
        metric: accuracy from probabilities `(V, K)` and targets of all videos.

    Returns:
        The choice and the curve. On these videos the model keeps the budget exactly; on others, as far as they are
        alike.

    Raises:
        DynskipError: if there are no videos, something does not fit, or the model cannot be as cheap.
    """
    if not (macs > 0 and math.isfinite(macs)):
        raise DynskipError(f"The budget is {macs} MACs a video; expected a positive number. 20 GMACs are written 20e9.")

    def rank(point: CurvePoint) -> tuple[float, ...]:
        return (1, point.accuracy, -point.macs) if point.macs <= macs else (0, -point.macs)

    result = _search(model, batches, per_gate, metric, lambda dense: rank)
    if result.point.macs > macs:
        raise DynskipError(
            f"The budget of {macs:.4g} MACs a video cannot be kept: the least that any thresholds execute is "
            f"{result.point.macs:.4g}, and the dense backbone executes {result.dense.macs:.4g}. Raise the budget, give "
            "the model fewer or smaller frames, or a terminator with smaller min_frames."
        )
    return result


def to_accuracy(
    model: Gated,
    batches: Batches,
    max_loss: float,
    *,
    per_gate: bool = False,
    metric: Metric = top_k_accuracy,
) -> Calibration:
    """Find the cheapest thresholds that lose little accuracy against the plain backbone on every frame.

    Args:
        model: as in `to_budget`.
        batches: as in `to_budget`.
        max_loss: accuracy that may be lost; 0.01 is one point.
        per_gate: as in `to_budget`.
        metric: as in `to_budget`.

    Returns:
        The choice and the curve. The model is left as it is; `apply` the result.

    Raises:
        DynskipError: if there are no videos, something does not fit, or no thresholds are as accurate.
    """
    if not 0 <= max_loss <= 1:
        raise DynskipError(f"max_loss is {max_loss}; expected 0 to 1. 0.01 is one point of accuracy.")

    def rank_against(dense: CurvePoint) -> Callable[[CurvePoint], tuple[float, ...]]:
        least = _least(dense, max_loss)
        return lambda point: (1, -point.macs, point.accuracy) if point.accuracy >= least else (0, point.accuracy)

    result = _search(model, batches, per_gate, metric, rank_against)
    if result.point.accuracy < _least(result.dense, max_loss):
        raise DynskipError(
            f"No thresholds come within {max_loss} of the dense accuracy {result.dense.accuracy:.4g}: the best reach "
            f"{result.point.accuracy:.4g}. Allow a larger loss, or train the gates."
        )
    return result


def replay(model: Gated, batches: Batches, point: OperatingPoint, *, metric: Metric = top_k_accuracy) -> OperatingPoint:
    """Tell what thresholds give on other videos, such as a test set.

    Args:
        model: the model that was calibrated.
        batches: as in `to_budget`.
        point: the thresholds.
        metric: as in `to_budget`.

    Returns:
        The same thresholds, with accuracy and MACs on these videos.

    Raises:
        DynskipError: as `OperatingPoint.apply`; if there are no videos, or something does not fit.
    """
    _check_fits(point, model)
    ends = () if point.termination_threshold is None else (point.termination_threshold,)
    (replayed,) = _Replay(model, batches, metric).points(point.forward_threshold, ends)
    return replayed


@torch.no_grad()
def encode(model: Gated, batches: Batches) -> list[tuple[EncodedVideo, Tensor]]:
    """Run the backbone once on videos, and keep what gates and predictions need of it.

    Pass the result wherever this module takes videos, and the backbone does not run again.

    Args:
        model: the model; videos are moved to its device.
        batches: `(videos, targets)`, each a batch; videos that are encoded already stay as they are.

    Returns:
        The encoded batches, on the model's device.

    Raises:
        DynskipError: if there are no videos, or videos or targets do not fit.
    """
    device = next(model.backbone.parameters(), torch.empty(0)).device
    encoded = []
    with in_mode(cast(nn.Module, model), False):
        for batch in batches:
            if not isinstance(batch, Sequence) or len(batch) != 2:
                raise DynskipError(
                    f"Expected batches (videos, targets); got a {type(batch).__name__}. A DataLoader over pairs gives "
                    "such batches; for one batch, pass [(videos, targets)]."
                )
            videos, targets = batch
            if isinstance(videos, Tensor):
                videos = model.encode(videos.to(device))
            if not isinstance(videos, EncodedVideo):
                raise DynskipError(
                    f"Expected videos (B, T, C, H, W) or an EncodedVideo; got a {type(videos).__name__}. Decode and "
                    "normalise videos first."
                )
            videos = EncodedVideo(
                tuple(pooled.to(device) for pooled in videos.pooled), videos.frame_logits.to(device), videos.image_size
            )
            targets = torch.as_tensor(targets)
            if targets.ndim not in (1, 2) or len(targets) != len(videos.frame_logits):
                raise DynskipError(
                    f"Got targets {tuple(targets.shape)} for {len(videos.frame_logits)} videos; give one class index "
                    "a video, or one row of a multi-hot table."
                )
            if not all(part.isfinite().all() for part in (*videos.pooled, videos.frame_logits)):
                raise DynskipError("Features or logits have NaN or infinite values. Check the weights; encode again.")
            encoded.append((videos, targets))
    if not encoded:
        raise DynskipError(
            "There are no validation videos. Give an iterable of (videos, targets); a generator can be read only once."
        )
    return encoded


def dense(model: Gated, batches: Batches, *, metric: Metric = top_k_accuracy) -> CurvePoint:
    """Measure the plain backbone on every frame: what all others are compared with.

    Args:
        model: as in `to_budget`.
        batches: as in `to_budget`.
        metric: as in `to_budget`.

    Returns:
        Its accuracy and MACs.

    Raises:
        DynskipError: if there are no videos, or something does not fit.
    """
    return _Replay(model, batches, metric).frames(_every_frame)


def uniform_frames(model: Gated, batches: Batches, *, metric: Metric = top_k_accuracy) -> tuple[CurvePoint, ...]:
    """Measure the plain backbone on few frames of each video, spread evenly: a baseline for curves.

    Args:
        model: as in `to_budget`.
        batches: as in `to_budget`.
        metric: as in `to_budget`.

    Returns:
        One point for each number of frames, from one to all. Frames that are left out cost nothing.

    Raises:
        DynskipError: if there are no videos, or something does not fit.
    """

    def pick(count: int, batch: int, frames: int) -> Tensor:
        count = min(count, frames)
        picked = torch.zeros(batch, frames, dtype=torch.bool)
        picked[:, [int(frames / count * (i + 0.5)) for i in range(count)]] = True
        return picked

    return _by_frames(model, batches, metric, pick)


def random_frames(
    model: Gated, batches: Batches, *, seed: int = 0, metric: Metric = top_k_accuracy
) -> tuple[CurvePoint, ...]:
    """Measure the plain backbone on few frames of each video, drawn at random: a baseline for curves.

    Args:
        model: as in `to_budget`.
        batches: as in `to_budget`.
        seed: another number draws other frames.
        metric: as in `to_budget`.

    Returns:
        One point for each number of frames, from one to all. Frames that are left out cost nothing.

    Raises:
        DynskipError: if there are no videos, or something does not fit.
    """
    generator = torch.Generator().manual_seed(seed)

    def pick(count: int, batch: int, frames: int) -> Tensor:
        return torch.rand(batch, frames, generator=generator).argsort(1).argsort(1) < count

    return _by_frames(model, batches, metric, pick)


def write_curves(file: str | Path, curves: Mapping[str, Sequence[CurvePoint]]) -> None:
    """Write curves as data, for other programs.

    Args:
        file: `.json` for an object with a list of points a curve; `.csv` for a table with a row a point, one column for
            each gate's threshold.
        curves: points by the name of their curve.

    Raises:
        DynskipError: if the file's name ends otherwise.
    """
    path = Path(file)
    if path.suffix == ".json":
        data = {name: [asdict(point) for point in points] for name, points in curves.items()}
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        rows = [{"curve": name, **_flat(point)} for name, points in curves.items() for point in points]
        columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
    else:
        raise DynskipError(f"Cannot write curves to {path.name}: its name must end in .csv or .json.")


class _Replay:
    """Encoded videos, and what a model does on them."""

    def __init__(self, model: Gated, batches: Batches, metric: Metric) -> None:
        self.model, self.metric = model, metric
        self.repeats: tuple[bool, ...] = getattr(model, "repeats", ())  # images have none
        self.videos = encode(model, batches)
        targets = [target.cpu() for _, target in self.videos]
        if len({target.shape[1:] for target in targets}) > 1:
            raise DynskipError("Targets of some batches are class indices and of others multi-hot; give one kind.")
        self.targets = torch.cat(targets)

    @property
    def terminator(self) -> EarlyTerminator | None:
        """What ends videos, if anything does."""
        return _terminator(self.model)

    def read(self, forward_threshold: tuple[float, ...]) -> list[SkipOutput]:
        """Gate all videos, to their ends."""
        model: Any = self.model
        own, terminator = model.forward_threshold, self.terminator
        try:
            model.forward_threshold = forward_threshold
            if terminator is not None:
                model.terminator = None
            with torch.no_grad(), in_mode(model, False):
                return [model.decide(encoded) for encoded, _ in self.videos]
        finally:
            model.forward_threshold = own
            if terminator is not None:
                model.terminator = terminator

    def end(
        self,
        outputs: Sequence[SkipOutput],
        running: Sequence[Tensor],
        forward_threshold: tuple[float, ...],
        termination_threshold: float,
    ) -> OperatingPoint:
        """Measure videos that were read to their ends as if they ended early."""
        terminator = copy.copy(self.terminator)
        assert terminator is not None
        terminator.threshold = termination_threshold
        ended = []
        for (encoded, _), output, probabilities in zip(self.videos, outputs, running, strict=True):
            assert output.gate_logits is not None
            stopped_at = end_videos(terminator, probabilities, output.stopped_at)
            fallback = fallback_frames(stopped_at, stopped_at == output.num_stages, output.gate_logits)
            lookup = self.model.lookup_for(encoded.image_size)
            ended.append(
                masked_output(stopped_at, output.gate_logits, encoded.frame_logits, fallback, lookup, self.repeats)
            )
        return self.at(ended, forward_threshold, termination_threshold)

    def points(
        self, forward_threshold: tuple[float, ...], termination_thresholds: Sequence[float] | None = None
    ) -> list[OperatingPoint]:
        """Measure forward thresholds; if the model ends videos, with each of some termination thresholds."""
        outputs, terminator = self.read(forward_threshold), self.terminator
        if terminator is None or termination_thresholds == ():
            return [self.at(outputs, forward_threshold, None)]
        running = [
            running_probabilities(output.stopped_at, encoded.frame_logits, self.repeats)
            for output, (encoded, _) in zip(outputs, self.videos, strict=True)
        ]
        if termination_thresholds is None:
            cuts = _Cuts(torch.cat([part.amax(-1)[:, terminator.min_frames :].flatten() for part in running]))
            levels = {min(max(cuts.at(i / _LEVELS), 1e-6), 1.0) for i in range(_LEVELS + 1)}
            termination_thresholds = sorted({terminator.threshold, *levels})
        return [self.end(outputs, running, forward_threshold, threshold) for threshold in termination_thresholds]

    def at(
        self, outputs: Sequence[SkipOutput], forward_threshold: tuple[float, ...], termination_threshold: float | None
    ) -> OperatingPoint:
        """Measure what a model gave for all videos."""
        point = self.measure([output.logits for output in outputs], [output.macs for output in outputs])
        return OperatingPoint(point.accuracy, point.macs, forward_threshold, termination_threshold)

    def frames(self, pick: Callable[[int, int], Tensor]) -> CurvePoint:
        """Measure the plain backbone on some frames: `pick(B, T)` marks which."""
        logits, macs = [], []
        for encoded, _ in self.videos:
            picked = pick(*encoded.frame_logits.shape[:2]).to(encoded.frame_logits.device)
            logits.append(mean_where(picked, encoded.frame_logits))
            macs.append(picked.sum(1).double() * self.model.lookup_for(encoded.image_size).dense)
        return self.measure(logits, macs)

    def measure(self, logits: Sequence[Tensor], macs: Sequence[Tensor]) -> CurvePoint:
        """Compare all videos' answers with the targets."""
        probabilities = torch.cat([part.softmax(-1) for part in logits]).cpu()
        return CurvePoint(float(self.metric(probabilities, self.targets)), float(torch.cat(list(macs)).mean()))


class _Cuts:
    """Places to cut a set of numbers in two, half-way between neighbours, where rounding changes nothing."""

    def __init__(self, values: Tensor) -> None:
        # A NaN is a gate that was not asked. Beyond the bound, gates have made up their mind: no threshold tells apart.
        numbers, counts = values[values.abs() < _BOUND].double().cpu().unique(return_counts=True)
        ends = torch.tensor([-_BOUND, _BOUND], dtype=torch.float64)
        self._places = torch.cat([ends[:1], (numbers[1:] + numbers[:-1]) / 2, ends[1:]])
        shares = counts.cumsum(0) / counts.sum() if len(numbers) else torch.ones(1)
        self._shares = torch.cat([torch.zeros(1), shares])

    def at(self, share: float) -> float:
        """Return the place that most nearly this share of the numbers lie below."""
        return float(self._places[(self._shares - share).abs().argmin()])

    def below(self, place: float) -> float:
        """Return the share of the numbers that lie below a place."""
        index = int(torch.searchsorted(self._places, place))
        return float(self._shares[min(index, len(self._shares) - 1)])


def _search(
    model: Gated,
    batches: Batches,
    per_gate: bool,
    metric: Metric,
    rank_against: Callable[[CurvePoint], Callable[[CurvePoint], tuple[float, ...]]],
) -> Calibration:
    """Sweep all gates from every frame to none, then go from the best point in ever smaller steps."""
    replayed = _Replay(model, batches, metric)
    stages, own = model.backbone.num_stages, model.forward_threshold
    # Memory follows decisions, so logits are looked at both with every frame used and as the model stands.
    outputs = [*replayed.read((0.0,) * stages), *replayed.read(own)]
    margins = torch.cat([_margins(output) for output in outputs])
    plain = replayed.frames(_every_frame)
    rank = rank_against(plain)
    tried = {own: replayed.points(own)}

    def best_in(setting: tuple[float, ...]) -> tuple[float, ...]:
        return max(map(rank, tried[setting]))

    def attempt(setting: tuple[float, ...]) -> None:
        if setting not in tried:
            tried[setting] = replayed.points(setting)

    def explore(cuts: Sequence[_Cuts], moves: Sequence[Sequence[int]]) -> None:
        for i in range(_LEVELS + 1):
            attempt(tuple(_sigmoid(cut.at(i / _LEVELS)) for cut in cuts))
        for step, moved, sign in itertools.product(_STEPS, moves, (-1, 1)):
            leader = max(tried, key=best_in)
            best = list(leader)
            for n in moved:
                best[n] = _sigmoid(cuts[n].at(cuts[n].below(_logit(best[n])) + sign * step))
            attempt(tuple(best))

    explore([_Cuts(margins)] * stages, [range(stages)])
    if per_gate:
        explore([_Cuts(margins[:, n]) for n in range(stages)], [range(stages), *([n] for n in range(stages))])
    points = list(itertools.chain.from_iterable(tried.values()))
    return Calibration(max(points, key=rank), _unbeaten(points), plain)


def _sigmoid(margin: float) -> float:
    return 1 / (1 + math.exp(-margin))


def _logit(probability: float) -> float:
    return float(torch.tensor(probability, dtype=torch.float64).logit())


def _margins(output: SkipOutput) -> Tensor:
    """How far the forward logits lie above the stop logits, `(B * T, N)`; NaN where a gate was not asked."""
    assert output.gate_logits is not None
    return (output.gate_logits[..., FORWARD] - output.gate_logits[..., STOP]).flatten(0, 1)


def _terminator(model: Gated) -> EarlyTerminator | None:
    return getattr(model, "terminator", None)


def _check_fits(point: OperatingPoint, model: Gated) -> None:
    if len(point.forward_threshold) != model.backbone.num_stages:
        raise DynskipError(
            f"The point has thresholds for {len(point.forward_threshold)} gates and the model has "
            f"{model.backbone.num_stages}. Calibrate this model."
        )
    if point.termination_threshold is not None and _terminator(model) is None:
        raise DynskipError(
            "The point ends videos early and the model has no terminator. Give it the one it was calibrated with, "
            "such as `model.terminator = EarlyTerminator(min_frames=3)`."
        )


def _unbeaten(points: Iterable[OperatingPoint]) -> tuple[OperatingPoint, ...]:
    curve: list[OperatingPoint] = []
    for point in sorted(points, key=lambda point: (point.macs, -point.accuracy)):
        if not curve or point.accuracy > curve[-1].accuracy:
            curve.append(point)
    return tuple(curve)


def _least(dense: CurvePoint, max_loss: float) -> float:
    return dense.accuracy - max_loss - 1e-9  # shares of videos do not subtract exactly


def _by_frames(
    model: Gated, batches: Batches, metric: Metric, pick: Callable[[int, int, int], Tensor]
) -> tuple[CurvePoint, ...]:
    replayed = _Replay(model, batches, metric)
    most = max(encoded.frame_logits.shape[1] for encoded, _ in replayed.videos)
    return tuple(replayed.frames(partial(pick, count)) for count in range(1, most + 1))


def _every_frame(batch: int, frames: int) -> Tensor:
    return torch.ones(batch, frames, dtype=torch.bool)


def _flat(point: CurvePoint) -> dict[str, Any]:
    row = asdict(point)
    for n, threshold in enumerate(row.pop("forward_threshold", ())):
        row[f"forward_threshold_{n}"] = threshold
    return row
