"""Places to cut the gates' margins and the predictions' probabilities: the thresholds that are worth trying."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEVELS = 16  # steps of a sweep, from below all numbers to above them
_BOUND = 36.0  # of the forward logit above the stop logit; a probability has no digits for more


class Cuts:
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


def sigmoid(margin: float) -> float:
    return 1 / (1 + math.exp(-margin))
