"""The search for thresholds, for a budget or an accuracy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from dynskip import rules
from dynskip.calibrate._cuts import LEVELS, Cuts, sigmoid
from dynskip.calibrate._points import Calibration, CurvePoint, Gated, OperatingPoint, check_fits
from dynskip.calibrate._replay import Batches, Metric, Replay, every_frame
from dynskip.errors import DynskipError
from dynskip.gates import logit
from dynskip.metrics import top_k_accuracy
from dynskip.output import SkipOutput

_STEPS = (1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128)  # of the search around the best point so far


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
    check_fits(point, model)
    ends = () if point.termination_threshold is None else (point.termination_threshold,)
    (replayed,) = Replay(model, batches, metric).points(point.forward_threshold, ends)
    return replayed


def _search(
    model: Gated,
    batches: Batches,
    per_gate: bool,
    metric: Metric,
    rank_against: Callable[[CurvePoint], Callable[[CurvePoint], tuple[float, ...]]],
) -> Calibration:
    """Sweep all gates from every frame to none, then go from the best point in ever smaller steps."""
    replayed = Replay(model, batches, metric)
    stages, own = model.backbone.num_stages, model.forward_threshold
    # Memory follows decisions, so logits are looked at both with every frame used and as the model stands.
    outputs = [*replayed.read((0.0,) * stages), *replayed.read(own)]
    margins = torch.cat([_margins(output) for output in outputs])
    plain = replayed.frames(every_frame)
    rank = rank_against(plain)
    tried = {own: replayed.points(own)}

    def best_in(setting: tuple[float, ...]) -> tuple[float, ...]:
        return max(map(rank, tried[setting]))

    def attempt(setting: tuple[float, ...]) -> None:
        if setting not in tried:
            tried[setting] = replayed.points(setting)

    def explore(cuts: Sequence[Cuts], moves: Sequence[Sequence[int]]) -> None:
        for i in range(LEVELS + 1):
            attempt(tuple(sigmoid(cut.at(i / LEVELS)) for cut in cuts))
        for step, moved, sign in itertools.product(_STEPS, moves, (-1, 1)):
            leader = max(tried, key=best_in)
            best = list(leader)
            for n in moved:
                best[n] = sigmoid(cuts[n].at(cuts[n].below(logit(best[n])) + sign * step))
            attempt(tuple(best))

    explore([Cuts(margins)] * stages, [range(stages)])
    if per_gate:
        explore([Cuts(margins[:, n]) for n in range(stages)], [range(stages), *([n] for n in range(stages))])
    points = list(itertools.chain.from_iterable(tried.values()))
    return Calibration(max(points, key=rank), _unbeaten(points), plain)


def _margins(output: SkipOutput) -> Tensor:
    """How far the forward logits lie above the stop logits, `(B * T, N)`; NaN where a gate was not asked."""
    assert output.gate_logits is not None
    return rules.margins(output.gate_logits).flatten(0, 1)


def _unbeaten(points: Iterable[OperatingPoint]) -> tuple[OperatingPoint, ...]:
    curve: list[OperatingPoint] = []
    for point in sorted(points, key=lambda point: (point.macs, -point.accuracy)):
        if not curve or point.accuracy > curve[-1].accuracy:
            curve.append(point)
    return tuple(curve)


def _least(dense: CurvePoint, max_loss: float) -> float:
    return dense.accuracy - max_loss - 1e-9  # shares of videos do not subtract exactly
