"""The search for thresholds, for a budget or an accuracy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dynskip import rules
from dynskip.activation import confidence, probabilities
from dynskip.calibrate._points import Calibration, CurvePoint, Gated
from dynskip.calibrate._replay import Batches, Metric, Replay
from dynskip.errors import DynskipError
from dynskip.gates import logit
from dynskip.metrics import top_k_accuracy

_LEVELS = 16  # steps of a sweep, from below all numbers to above them
_STEPS = (1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128)  # of the search around the best point so far
_SATURATED = 36.0  # margin between a forward and a stop logit; probabilities cannot represent larger ones


def to_budget(
    model: Gated, batches: Batches, macs: float, *, per_gate: bool = False, metric: Metric = top_k_accuracy
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
        The choice and the curve. The model keeps the budget exactly on these videos, and approximately on similar ones.

    Raises:
        DynskipError: if there are no videos, something does not fit, the costs are unknown, or no thresholds keep the
            budget.
    """
    if not (macs > 0 and math.isfinite(macs)):
        raise DynskipError(f"The budget is {macs} MACs a video; expected a positive number. 20 GMACs are written 20e9.")

    def rank(point: CurvePoint) -> tuple[float, ...]:
        return (1, point.accuracy, -point.macs) if point.macs <= macs else (0, -point.macs)

    result = _search(Replay(model, batches, metric), per_gate, rank)
    if result.point.macs > macs:
        raise DynskipError(
            f"The budget of {macs:.4g} MACs a video cannot be kept: the least that any thresholds execute is "
            f"{result.point.macs:.4g}, and the dense backbone executes {result.dense.macs:.4g}. Raise the budget, give "
            "the model fewer or smaller frames, or a terminator with smaller min_frames."
        )
    return result


def to_accuracy(
    model: Gated, batches: Batches, max_loss: float, *, per_gate: bool = False, metric: Metric = top_k_accuracy
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
        DynskipError: if there are no videos, something does not fit, the costs are unknown, or no thresholds are as
            accurate.
    """
    if not 0 <= max_loss <= 1:
        raise DynskipError(f"max_loss is {max_loss}; expected 0 to 1. 0.01 is one point of accuracy.")
    replayed = Replay(model, batches, metric)
    dense = replayed.dense().accuracy
    least = dense - max_loss - 1e-9  # the difference of two shares is rounded

    def rank(point: CurvePoint) -> tuple[float, ...]:
        return (1, -point.macs, point.accuracy) if point.accuracy >= least else (0, point.accuracy)

    result = _search(replayed, per_gate, rank)
    if result.point.accuracy < least:
        raise DynskipError(
            f"No thresholds come within {max_loss} of the dense accuracy {dense:.4g}: the best reach "
            f"{result.point.accuracy:.4g}. Allow a larger loss, or train the gates."
        )
    return result


def _search(replayed: Replay, per_gate: bool, rank: Callable[[CurvePoint], tuple[float, ...]]) -> Calibration:
    """Sweep all gates from every frame to none, then go from the best point in ever smaller steps."""
    model = replayed.model
    stages, own = model.backbone.num_stages, model.forward_threshold
    tried: dict[tuple[float, ...], list[CurvePoint]] = {}

    def attempt(setting: tuple[float, ...]) -> None:
        if setting in tried:
            return
        decided, terminator = replayed.decide(setting), model.terminator
        ends: Sequence[float | None] = [None]
        if terminator is not None:
            each = [probabilities(running, model.activation)[:, terminator.min_frames :] for _, running in decided]
            levels = _Cuts(torch.cat([confidence(p, model.activation).flatten() for p in each])).sweep()
            ends = sorted({terminator.threshold, *(min(max(level, 1e-6), 1.0) for level in levels)})
        tried[setting] = [replayed.end(decided, setting, end) for end in ends]

    def explore(cuts: Sequence[_Cuts], moves: Sequence[Sequence[int]]) -> None:
        for places in zip(*(cut.sweep() for cut in cuts), strict=True):
            attempt(tuple(map(_sigmoid, places)))
        for step, moved, sign in itertools.product(_STEPS, moves, (-1, 1)):
            leader = max(tried, key=lambda setting: max(map(rank, tried[setting])))
            best = list(leader)
            for n in moved:
                best[n] = _sigmoid(cuts[n].at(cuts[n].below(logit(best[n])) + sign * step))
            attempt(tuple(best))

    attempt(own)
    if math.isnan(tried[own][0].macs):
        raise DynskipError(
            "The cost of the model is unknown, so no thresholds are the cheapest, and no budget can be kept. Give the "
            "model a table: lookup=FLOPsLookup([...])."
        )
    # Gates' memory depends on decisions, so margins come from two runs: with every frame used, and as the model is set.
    decided = [*replayed.decide((0.0,) * stages), *replayed.decide(own)]
    gate_logits = [output.gate_logits.flatten(0, 1) for output, _ in decided if output.gate_logits is not None]
    margins = rules.margins(torch.cat(gate_logits))  # NaN where a gate did not run
    explore([_Cuts(margins)] * stages, [range(stages)])
    if per_gate:
        explore([_Cuts(margins[:, n]) for n in range(stages)], [range(stages), *([n] for n in range(stages))])
    points = list(itertools.chain(*tried.values()))
    curve: list[CurvePoint] = []
    for point in sorted(points, key=lambda point: (point.macs, -point.accuracy)):
        if not curve or point.accuracy > curve[-1].accuracy:
            curve.append(point)
    return Calibration(max(points, key=rank), tuple(curve), replayed.dense())


class _Cuts:
    """Places to cut a set of numbers in two, half-way between neighbours, where rounding changes nothing."""

    def __init__(self, values: Tensor) -> None:
        # No threshold changes what saturated gates decide; and NaN is never below the limit.
        numbers, counts = values[values.abs() < _SATURATED].double().cpu().unique(return_counts=True)
        ends = torch.tensor([-_SATURATED, _SATURATED], dtype=torch.float64)
        self._places = torch.cat([ends[:1], (numbers[1:] + numbers[:-1]) / 2, ends[1:]])
        shares = counts.cumsum(0) / counts.sum() if len(numbers) else torch.ones(1)
        self._shares = torch.cat([torch.zeros(1), shares])

    def at(self, share: float) -> float:
        """Return the place below which the share of the numbers is nearest to this one."""
        return float(self._places[(self._shares - share).abs().argmin()])

    def below(self, place: float) -> float:
        """Return the share of the numbers that lie below a place."""
        index = int(torch.searchsorted(self._places, place))
        return float(self._shares[min(index, len(self._shares) - 1)])

    def sweep(self) -> list[float]:
        """Return evenly spread places, from below all numbers to above them."""
        return [self.at(i / _LEVELS) for i in range(_LEVELS + 1)]


def _sigmoid(margin: float) -> float:
    return 1 / (1 + math.exp(-margin))
