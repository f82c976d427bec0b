"""Head activations: how the logits of `K` classes become probabilities.

`"softmax"`: one class holds, and probabilities add up to 1. `"sigmoid"`: each class holds or not, on its own.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

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


def to_logits(values: Tensor, activation: Activation) -> Tensor:
    """Return logits whose probabilities are these, both `(..., K)`: the inverse of `probabilities`."""
    return values.logit() if activation == "sigmoid" else values.log()
