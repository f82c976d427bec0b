"""Places for thresholds: between the values that are observed, counted in shares of these values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynskip import rules
from dynskip.calibrate._points import Termination
from dynskip.calibrate._replay import Replay
from dynskip.errors import DynskipError
from dynskip.output import SkipOutput

_LEVELS = 16  # steps of a sweep, from below all numbers to above them
_SATURATED = 36.0  # margin between a forward and a stop logit; probabilities cannot represent larger ones

Decided = Sequence[tuple[SkipOutput, Tensor]]


class Cuts:
    """Places to cut a set of numbers in two, half-way between neighbours, where rounding changes nothing.

    Args:
        values: the numbers.
        lowest: a place below all of them.
        highest: a place that none of them exceeds.
    """

    def __init__(self, values: Tensor, lowest: float, highest: float) -> None:
        numbers, counts = values.double().cpu().unique(return_counts=True)
        ends = torch.tensor([lowest, highest], dtype=torch.float64)
        self._places = torch.cat([ends[:1], (numbers[1:] + numbers[:-1]) / 2, ends[1:]])
        shares = counts.cumsum(0) / counts.sum() if len(numbers) else torch.ones(1)
        self._shares = torch.cat([torch.zeros(1), shares])
        self.empty = len(numbers) == 0  # then no threshold changes anything

    def at(self, share: float) -> float:
        """Return the place below which the share of the numbers is nearest to this one."""
        return float(self._places[(self._shares - share).abs().argmin()])

    def below(self, place: float) -> float:
        """Return the share of the numbers that lie below a place."""
        index = int(torch.searchsorted(self._places, place))
        return float(self._shares[min(index, len(self._shares) - 1)])

    def moved(self, place: float, step: float) -> float:
        """Return the place that lies a share of the numbers above this one, or below it."""
        return self.at(self.below(place) + step)

    def sweep(self) -> list[float]:
        """Return evenly spread places, from below all numbers to above them."""
        return [self.at(i / _LEVELS) for i in range(_LEVELS + 1)]


def margin_cuts(replayed: Replay) -> tuple[Cuts, list[Cuts]]:
    """Return places among all gates' margins, and among those of each gate."""
    # Gates' memory depends on decisions, so margins come from two runs: with every frame used, and as the model is set.
    own = replayed.model.forward_threshold
    decided = [*replayed.decide((0.0,) * len(own)), *replayed.decide(own)]
    gate_logits = [output.gate_logits.flatten(0, 1) for output, _ in decided if output.gate_logits is not None]
    margins = rules.margins(torch.cat(gate_logits))  # NaN where a gate did not run

    def cuts(values: Tensor) -> Cuts:
        # No threshold changes what saturated gates decide; and NaN is never below the limit.
        return Cuts(values[values.abs() < _SATURATED], -_SATURATED, _SATURATED)

    return cuts(margins), [cuts(margins[:, n]) for n in range(len(own))]


def end_cuts(replayed: Replay, decided: Decided) -> dict[str, Cuts]:
    """Return places for each parameter of the terminator, among what it is compared with; empty without one."""
    model, terminator = replayed.model, replayed.model.terminator
    scores: dict[str, list[Tensor]] = {}
    if terminator is not None:
        for _, running in decided:
            for name, values in rules.end_scores(terminator, running, model.activation).items():
                scores.setdefault(name, []).append(values[:, terminator.min_frames :].flatten())
    found = {name: torch.cat(values) for name, values in scores.items()}
    found = {name: values[values.isfinite()] for name, values in found.items()}
    # Nothing exceeds the largest value. Half-way from the smallest one to zero lies below it, a probability as well.
    return {
        name: Cuts(values, float(values.min() - values.min().abs() / 2), float(values.max()))
        for name, values in found.items()
        if len(values)
    }


def as_termination(replayed: Replay, parameters: Mapping[str, float]) -> Termination:
    """Return a terminator's parameters as a point keeps them; `None` if there are none or it refuses them."""
    try:
        for name, value in parameters.items():
            assert replayed.model.terminator is not None
            replayed.model.terminator.check_setting(name, value)
    except DynskipError:
        return None
    return parameters["threshold"] if [*parameters] == ["threshold"] else tuple(parameters.items()) or None


def as_parameters(termination: Termination) -> dict[str, float]:
    """Return what `as_termination` was made from."""
    if isinstance(termination, tuple):
        return dict(termination)
    return {} if termination is None else {"threshold": termination}


def sigmoid(margin: float) -> float:
    """Return the forward probability of a margin."""
    return 1 / (1 + math.exp(-margin))
