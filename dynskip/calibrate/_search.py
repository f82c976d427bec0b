"""The search for thresholds, for a budget, an accuracy, or a whole curve."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Hashable, Sequence

import torch

from dynskip.calibrate._cuts import Cuts, Decided, as_parameters, as_termination, end_cuts, margin_cuts, sigmoid
from dynskip.calibrate._groups import folds, numbered
from dynskip.calibrate._points import Calibration, CurvePoint, Gated, Termination
from dynskip.calibrate._replay import Batches, Groups, Metric, Outcome, Replay
from dynskip.errors import DynskipError
from dynskip.gates import logit
from dynskip.metrics import top_k_accuracy

_STEPS = (1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)  # of the search around the best point so far
_ENDS = 8  # terminations that are tried with each setting of the gates, evenly spread over what is observed

Rank = Callable[[CurvePoint], tuple[float, ...]]
"""What is searched for: the larger, the better."""


def to_budget(
    model: Gated,
    batches: Batches,
    macs: float,
    *,
    per_gate: bool = True,
    metric: Metric = top_k_accuracy,
    groups: Groups = None,
) -> Calibration:
    """Find the most accurate thresholds within a budget. The model is left as it is: `apply` the result.

    Args:
        model: any gated model; its terminator, if it has one, is calibrated, too.
        batches: validation videos as `(videos, targets)`: `(B, T, C, H, W)` normalised frames or what `encode` returned
            for them, and what the metric takes, class indices `(B,)` or multi-hot `(B, K)`.
        macs: MACs (multiply-adds) that a video may cost on average; `20e9` are 20 GMACs.
        per_gate: search a threshold for each gate. If false, all gates share one, which is several times faster.
        metric: accuracy from probabilities `(V, K)` and targets of all videos.
        groups: with them, the search is also repeated on four fifths of the videos at a time and measured on the rest
            (`Calibration.held_out`). They name for each video what it belongs to, such as the recording that it was cut
            from: no group is in both parts. `range(V)` makes each video a group of its own.

    Returns:
        The choice and the curve. The model keeps the budget exactly on these videos, and approximately on similar ones.

    Raises:
        DynskipError: if there are no videos, something does not fit, the costs are unknown, or no thresholds keep the
            budget.
    """
    if not (macs > 0 and math.isfinite(macs)):
        raise DynskipError(f"The budget is {macs} MACs a video; expected a positive number. 20 GMACs are written 20e9.")
    result = _calibrate(Replay(model, batches, metric), lambda _: _within(macs), per_gate, groups)
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
    per_gate: bool = True,
    metric: Metric = top_k_accuracy,
    groups: Groups = None,
) -> Calibration:
    """Find the cheapest thresholds that lose little accuracy against the dense network.

    These videos lose no more than `max_loss`; others may. `to_risk` finds thresholds that come with a guarantee.

    Args:
        model: as in `to_budget`.
        batches: as in `to_budget`.
        max_loss: accuracy that may be lost; 0.01 is one point.
        per_gate: as in `to_budget`.
        metric: as in `to_budget`.
        groups: as in `to_budget`.

    Returns:
        The choice and the curve. The model is left as it is; `apply` the result.

    Raises:
        DynskipError: if there are no videos, something does not fit, the costs are unknown, or no thresholds are as
            accurate.
    """
    if not 0 <= max_loss <= 1:
        raise DynskipError(f"max_loss is {max_loss}; expected 0 to 1. 0.01 is one point of accuracy.")

    def least(replayed: Replay) -> float:
        return replayed.point(replayed.dense()).accuracy - max_loss - 1e-9  # the difference of two shares is rounded

    replayed = Replay(model, batches, metric)
    result = _calibrate(replayed, lambda part: at_least(least(part)), per_gate, groups)
    if result.point.accuracy < least(replayed):
        raise DynskipError(
            f"No thresholds come within {max_loss} of the dense accuracy {result.dense.accuracy:.4g}: the best reach "
            f"{result.point.accuracy:.4g}. Allow a larger loss, or train the gates."
        )
    return result


def curve(
    model: Gated,
    batches: Batches,
    *,
    points: int = 8,
    per_gate: bool = True,
    metric: Metric = top_k_accuracy,
    groups: Groups = None,
) -> tuple[CurvePoint, ...]:
    """Measure accuracy against cost on videos that were not searched, with confidence bands.

    For each of several budgets, thresholds are searched on four fifths of the videos and measured on the rest, five
    times, so that every video is measured with thresholds that it had no part in. Bands hold 90 % of the accuracies
    that one gets by drawing the videos again (500 times with replacement, whole groups at a time).

    Args:
        model: as in `to_budget`.
        batches: as in `to_budget`.
        points: number of budgets, evenly spread from the cheapest thresholds to the most accurate ones.
        per_gate: as in `to_budget`.
        metric: as in `to_budget`.
        groups: as in `to_budget`; by default, each video is a group of its own.

    Returns:
        The points, from the smallest budget to the largest. Their thresholds are those that all videos together give.

    Raises:
        DynskipError: if there are no videos, something does not fit, or the costs are unknown.

    Reference:
        Varma and Simon, "Bias in error estimation when using cross-validation for model selection", BMC Bioinformatics
        2006; Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 1979.
    """
    if points < 1:
        raise DynskipError(f"points={points}; a curve has at least one.")
    replayed = Replay(model, batches, metric)
    groups = range(len(replayed.targets)) if groups is None else groups
    known = _front(search(replayed, [], per_gate))
    lowest, highest = known[0].macs, known[-1].macs
    ranks = [_within(lowest + (highest - lowest) * n / max(points - 1, 1)) for n in range(points)]
    found = search(replayed, ranks, per_gate)
    chosen = [max(found, key=rank) for rank in ranks]
    return tuple(dict.fromkeys(_held_out(replayed, lambda _: ranks, chosen, per_gate, groups)))


def at_least(accuracy: float) -> Rank:
    """Rank points by cost among those that reach an accuracy."""
    return lambda point: (1, -point.macs, point.accuracy) if point.accuracy >= accuracy else (0, point.accuracy)


def search(replayed: Replay, ranks: Sequence[Rank], per_gate: bool) -> list[CurvePoint]:
    """Sweep all gates from every frame to none, then go from each rank's best point in ever smaller steps.

    Thresholds are places between observed margins, and steps are shares of these margins. Each time, all terminations
    are tried, so that gates and terminator are chosen together.
    """
    model = replayed.model
    own, terminator = model.forward_threshold, model.terminator
    found: dict[tuple[float, ...], list[CurvePoint]] = {}

    def attempt(setting: tuple[float, ...]) -> None:
        if setting in found:
            return
        decided = replayed.decide(setting)
        cuts = end_cuts(replayed, decided)
        tried = [{name: cut.at(level / _ENDS) for name, cut in cuts.items()} for level in range(_ENDS)]
        tried.append({name: getattr(terminator, name) for name in cuts})
        note(decided, setting, [*dict.fromkeys([None, *(as_termination(replayed, each) for each in tried)])])

    def note(decided: Decided, setting: tuple[float, ...], ends: Sequence[Termination]) -> None:
        outcomes = replayed.outcomes(decided, ends)
        points = [replayed.point(each, setting, end) for each, end in zip(outcomes, ends, strict=True)]
        found.setdefault(setting, []).extend(points)

    def leader(rank: Rank) -> CurvePoint:
        return max(itertools.chain(*found.values()), key=rank)

    def explore(cuts: Sequence[Cuts], moves: Sequence[Sequence[int]]) -> None:
        for places in zip(*(cut.sweep() for cut in cuts), strict=True):
            attempt(tuple(map(sigmoid, places)))
        for step, rank, moved, sign in itertools.product(_STEPS, ranks, moves, (-1, 1)):
            best = list(leader(rank).forward_threshold)
            for n in moved:
                best[n] = sigmoid(cuts[n].moved(logit(best[n]), sign * step))
            attempt(tuple(best))

    def end_better(rank: Rank) -> None:
        setting = leader(rank).forward_threshold
        decided = replayed.decide(setting)
        for step, (name, cut), sign in itertools.product(_STEPS, end_cuts(replayed, decided).items(), (-1, 1)):
            parameters = as_parameters(max(found[setting], key=rank).termination_threshold)
            if parameters:
                moved = {**parameters, name: cut.moved(parameters[name], sign * step)}
                note(decided, setting, [as_termination(replayed, moved)])

    attempt(own)
    if math.isnan(found[own][0].macs):
        raise DynskipError(
            "The cost of the model is unknown, so no thresholds are the cheapest, and no budget can be kept. Give the "
            "model a table: lookup=FLOPsLookup([...])."
        )
    together, single = margin_cuts(replayed)
    gates = [n for n, cut in enumerate(single) if not cut.empty]
    if gates:
        explore([together] * len(own), [gates])
    if gates and per_gate:
        explore(single, [gates, *([n] for n in gates)])
    for rank in ranks:
        end_better(rank)
    return [*itertools.chain(*found.values())]


def _within(macs: float) -> Rank:
    return lambda point: (1, point.accuracy, -point.macs) if point.macs <= macs else (0, -point.macs)


def _calibrate(replayed: Replay, aim: Callable[[Replay], Rank], per_gate: bool, groups: Groups) -> Calibration:
    rank = aim(replayed)
    points = search(replayed, [rank], per_gate)
    choice = max(points, key=rank)
    held_out = None
    if groups is not None:
        (held_out,) = _held_out(replayed, lambda part: [aim(part)], [choice], per_gate, groups)
    return Calibration(choice, tuple(_front(points)), replayed.point(replayed.dense()), held_out)


def _held_out(
    replayed: Replay,
    aims: Callable[[Replay], Sequence[Rank]],
    chosen: Sequence[CurvePoint],
    per_gate: bool,
    groups: Sequence[Hashable],
) -> list[CurvePoint]:
    """Search without a fold and measure on it, fold by fold; return the chosen points with what comes out together."""
    measured = copy.copy(replayed)
    measured.groups = numbered(groups, len(replayed.targets))
    rows = folds(measured.groups)
    outcomes: list[list[Outcome]] = [[] for _ in chosen]
    for own in rows:
        rest = replayed.rows(torch.cat([other for other in rows if other is not own]))
        part, ranks = replayed.rows(own), aims(rest)
        points = search(rest, ranks, per_gate)
        for rank, parts in zip(ranks, outcomes, strict=True):
            parts.append(part.run(max(points, key=rank)))
    order = torch.cat(rows).argsort()
    joined = [Outcome(*(torch.cat(values)[order] for values in zip(*parts, strict=True))) for parts in outcomes]
    return [
        measured.point(outcome, point.forward_threshold, point.termination_threshold)
        for outcome, point in zip(joined, chosen, strict=True)
    ]


def _front(points: Sequence[CurvePoint]) -> list[CurvePoint]:
    """Return the points that no other one beats, from the cheapest to the most accurate."""
    front: list[CurvePoint] = []
    for point in sorted(points, key=lambda point: (point.macs, -point.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front
