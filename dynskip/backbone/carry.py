"""What travels between two stages, and how it is taken apart by sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Carry:
    """What travels between two stages: every value that later stages read, with how each relates to the batch.

    Args:
        values: the values; tensors, numbers, or nested tuples and lists of them.
        kinds: for each value `"static"` (the same for every batch), `("rows", k)` (a tensor with `k` rows a sample
            in dimension 0), `("size", k)` (the integer `k` times the batch size), or a tuple of kinds.
        batch: number of samples.
    """

    values: tuple[Any, ...]
    kinds: tuple[Any, ...]
    batch: int

    def select(self, index: Tensor) -> Carry:
        """Return the carry of some samples only.

        Args:
            index: `(M,)` positions, or a `(B,)` boolean mask; on the CPU or where the values are. A mask makes the
                host wait for its device, since it has to be counted.

        Returns:
            A carry of batch `M`. Memory layout (channels-last) is kept.
        """
        if index.dtype == torch.bool:
            index = index.nonzero().squeeze(1)
        devices = {tensor.device for tensor, rows in flatten(self.values, self.kinds) if rows}
        # Indexing with an index that lies on the CPU would make the host wait for the device. The other way round,
        # values on the CPU must not be picked before their index is there.
        positions = {device: index.to(device, non_blocking=index.device.type == "cpu") for device in devices}
        return Carry(_select(self.values, self.kinds, positions, len(index), self.batch), self.kinds, len(index))

    def __repr__(self) -> str:
        """Show shapes instead of values."""
        return f"Carry(batch {self.batch}: {', '.join(map(_shape, self.values))})"

    @staticmethod
    def cat(carries: Sequence[Carry]) -> Carry:
        """Join carries of the same boundary into one batch.

        Args:
            carries: at least one carry.

        Returns:
            A carry whose batch is the sum of theirs, in order.
        """
        first = carries[0]
        batch = sum(carry.batch for carry in carries)
        return Carry(_cat([carry.values for carry in carries], first.kinds, batch), first.kinds, batch)


def _select(value: Any, kind: Any, positions: dict[torch.device, Tensor], count: int, batch: int) -> Any:
    """Pick samples of one value: `count` of `batch`, whose positions are given on every device that a value is on."""
    if kind == "static":
        return value
    match kind:
        case ("size", factor):
            return factor * count
        case ("rows", 1):
            return value[positions[value.device]]
        case ("rows", _):
            return value.unflatten(0, (batch, -1))[positions[value.device]].flatten(0, 1)
    return _rebuild(value, [_select(v, k, positions, count, batch) for v, k in zip(value, kind, strict=True)])


def _cat(values: Sequence[Any], kind: Any, batch: int) -> Any:
    if kind == "static":
        return values[0]
    match kind:
        case ("size", factor):
            return factor * batch
        case ("rows", _):
            return torch.cat(list(values))
    return _rebuild(values[0], [_cat(parts, k, batch) for *parts, k in zip(*values, kind, strict=True)])


def with_sizes(carry: Carry) -> Carry:
    """Return a carry with its numbers read off a tensor: torch.compile would make a graph for every number."""
    row = next((v for v, k in zip(carry.values, carry.kinds, strict=True) if k == ("rows", 1)), None)
    if row is None:
        return carry
    batch = row.shape[0]
    values = tuple(
        kind[1] * batch if kind[:1] == ("size",) else value
        for value, kind in zip(carry.values, carry.kinds, strict=True)
    )
    return Carry(values, carry.kinds, batch)


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"[{', '.join(map(_shape, value))}]" if isinstance(value, tuple | list) else repr(value)


def _rebuild(like: Any, items: list[Any]) -> Any:
    return type(like)(items)


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
    return _rebuild(value, list(restore(value, kind, tensors, batch)))


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
        return _rebuild(value, [_swap_tensors(item, tensors) for item in value])
    return value
