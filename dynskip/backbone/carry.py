"""What travels between two stages, and how it is taken apart by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Carry:
    """What travels between two stages: every value that later stages read, and how each grows with the batch.

    Args:
        values: the values; tensors, numbers, or nested tuples and lists of them.
        kinds: for each value `"static"` (the same for every batch), `("rows", k)` (a tensor with `k` rows per
            sample in dimension 0), `("size", k)` (the integer `k` times the batch size), or a tuple of kinds.
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
        # Indexing with an index on the CPU would make the host wait for the device, so the index is copied there first.
        # A copy to the CPU has to wait, since values there must not be picked before their index has arrived.
        positions = {device: index.to(device, non_blocking=index.device.type == "cpu") for device in devices}

        def pick(kind: Any, value: Any) -> Any:
            match kind:
                case ("size", factor):
                    return factor * len(index)
                case ("rows", 1):
                    return value[positions[value.device]]
                case ("rows", _):
                    return value.unflatten(0, (self.batch, -1))[positions[value.device]].flatten(0, 1)
            return value

        return Carry(_map(pick, self.kinds, self.values), self.kinds, len(index))

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
        kinds, batch = carries[0].kinds, sum(carry.batch for carry in carries)

        def join(kind: Any, *values: Any) -> Any:
            match kind:
                case ("size", factor):
                    return factor * batch
                case ("rows", _):
                    return torch.cat(values)
            return values[0]

        return Carry(_map(join, kinds, *(carry.values for carry in carries)), kinds, batch)


def _map(function: Callable[..., Any], kind: Any, *values: Any) -> Any:
    """Rebuild nested values from `function(kind, *values)` of every value that is no tuple of kinds."""
    if kind == "static" or kind[:1] in (("rows",), ("size",)):
        return function(kind, *values)
    items = [_map(function, part_kind, *parts) for part_kind, *parts in zip(kind, *values, strict=True)]
    make = getattr(type(values[0]), "_make", type(values[0]))  # named tuples take their items one by one
    return make(items)


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"[{', '.join(map(_shape, value))}]" if isinstance(value, tuple | list) else repr(value)


def with_sizes(carry: Carry) -> Carry:
    """Return a carry whose numbers follow from a tensor's shape: torch.compile would make a graph for every number."""
    rows = [v.shape[0] for v, kind in zip(carry.values, carry.kinds, strict=True) if kind == ("rows", 1)]
    if not rows:
        return carry

    def put(kind: Any, value: Any) -> Any:
        return kind[1] * rows[0] if kind[0] == "size" else value  # looking at the value would be enough for a guard

    return Carry(_map(put, carry.kinds, carry.values), carry.kinds, rows[0])


def flatten(values: Any, kinds: Any) -> Iterator[tuple[Tensor, int]]:
    """Yield the tensors of nested values, each with its rows per sample (0: the same for every batch)."""
    for value, kind in zip(values, kinds, strict=True):
        if isinstance(value, Tensor):
            yield value, 0 if kind == "static" else kind[1]
        elif isinstance(value, tuple | list):
            yield from flatten(value, kind)


def restore(template: Any, kinds: Any, tensors: Iterator[Tensor], batch: int) -> tuple[Any, ...]:
    """Put tensors back where `flatten` took them from, and set the numbers that grow with the batch."""

    def put(kind: Any, value: Any) -> Any:
        if isinstance(value, Tensor):
            return next(tensors)
        return kind[1] * batch if kind[0] == "size" else value

    return _map(put, kinds, template)  # type: ignore[no-any-return]


def batch_of(values: Any, kinds: Any) -> int:
    """Return the number of samples that nested values hold."""
    return count_samples(flatten(values, kinds))


def count_samples(tensors: Iterable[tuple[Tensor, int]]) -> int:
    """Return the number of samples of tensors, given with their rows per sample."""
    # Take the tensor with the fewest rows per sample: dividing a size would stay in an exported graph as a guard.
    tensor, rows = min((pair for pair in tensors if pair[1]), key=lambda pair: pair[1])
    return tensor.shape[0] // rows
