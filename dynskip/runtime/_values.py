"""Crossing values of a carry, seen as a flat list of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def flatten(values: Any, kinds: Any) -> Iterator[tuple[Tensor, int]]:
    """Yield the tensors of nested values, each with its rows a sample (0: the same for every batch).

    Numbers are left out: they are either constant or follow from the batch size.
    """
    for value, kind in zip(values, kinds, strict=True):
        match kind:
            case "static":
                yield from ((tensor, 0) for tensor in _tensors(value))
            case ("rows", int(rows)):
                yield value, rows
            case ("size", int()):
                pass
            case _:
                yield from flatten(value, kind)


def batch_of(values: Any, kinds: Any) -> int:
    """Return the number of samples that nested values hold."""
    return count_samples(flatten(values, kinds))


def count_samples(tensors: Iterable[tuple[Tensor, int]]) -> int:
    """Return the number of samples of tensors with their rows a sample."""
    # The tensor with the fewest rows a sample: dividing a size would stay in an exported graph as a guard.
    tensor, rows = min((pair for pair in tensors if pair[1]), key=lambda pair: pair[1])
    return tensor.shape[0] // rows


def restore(template: Any, kinds: Any, tensors: Iterator[Tensor], batch: int) -> tuple[Any, ...]:
    """Put flat tensors back where `flatten` took them from, and numbers that grow with the batch to their value."""
    return tuple(_restore(value, kind, tensors, batch) for value, kind in zip(template, kinds, strict=True))


def _restore(value: Any, kind: Any, tensors: Iterator[Tensor], batch: int) -> Any:
    match kind:
        case "static":
            return _swap_tensors(value, tensors)
        case ("rows", int()):
            return next(tensors)
        case ("size", int(factor)):
            return factor * batch
    return type(value)(restore(value, kind, tensors, batch))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _swap_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple | list):
        return type(value)([_swap_tensors(item, tensors) for item in value])
    return value
