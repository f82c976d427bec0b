"""Head activations: how the logits of `K` classes become probabilities.

`"softmax"`: one class holds, and probabilities add up to 1. `"sigmoid"`: each class holds or not, on its own.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from dynskip.errors import DynskipError

Activation: TypeAlias = Literal["softmax", "sigmoid"]


def check_activation(value: Any) -> Activation:
    """Refuse all but the names of head activations."""
    if value not in get_args(Activation):
        raise DynskipError(
            f"activation={value!r} is unknown; use 'softmax', where one class holds, or 'sigmoid', where several can."
        )
    return value  # type: ignore[no-any-return]


def probabilities(logits: Tensor, activation: Activation) -> Tensor:
    """Return the class probabilities of logits, both `(..., K)`."""
    return logits.sigmoid() if activation == "sigmoid" else logits.softmax(-1)


def confidence(probabilities: Tensor, activation: Activation) -> Tensor:
    """Return how sure answers are, `(..., K) -> (...)`; NaN where one of their probabilities is.

    With a softmax it is the probability of the most probable class. With a sigmoid it is that of the least certain
    decision: of each class the probability that it holds, or that it does not, whichever is larger.
    """
    if activation == "sigmoid":
        return torch.maximum(probabilities, 1 - probabilities).amin(-1)
    return probabilities.amax(-1)


def named_classes(probabilities: Tensor, activation: Activation) -> dict[int, float]:
    """Return the classes that an answer `(K,)` names, with their probabilities, the most probable one first.

    With a softmax it is the most probable class. With a sigmoid it is every class that is more probable than not; there
    may be none.
    """
    ranked = probabilities.sort(descending=True)
    pairs = dict(zip(ranked.indices.tolist(), ranked.values.tolist(), strict=True))
    if activation == "sigmoid":
        return {index: probability for index, probability in pairs.items() if probability > 0.5}
    return dict(list(pairs.items())[:1])


def to_logits(values: Tensor, activation: Activation) -> Tensor:
    """Return finite logits whose probabilities are these, both `(..., K)`: the inverse of `probabilities`."""
    limits = torch.finfo(values.dtype)
    if activation == "sigmoid":
        return values.clamp(limits.tiny, 1 - limits.eps / 2).logit()
    return values.clamp(min=limits.tiny).log()
