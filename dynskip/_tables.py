"""Rows of tables: some, by an index, or all, by `None` and without a copy."""

from __future__ import annotations

import torch
from torch import Tensor


def take(table: Tensor, rows: Tensor | None) -> Tensor:
    """Return some rows, or the table itself."""
    return table if rows is None else table[rows]


def put(table: Tensor, rows: Tensor | None, value: Tensor) -> None:
    """Write some rows, or all of them, in place."""
    if rows is None:
        table.copy_(value)
    else:
        table[rows] = value


def at_column(table: Tensor, column: Tensor) -> Tensor:
    """Take one column of each row."""
    index = column.view(column.shape + (1,) * (table.ndim - 2)).expand(-1, 1, *table.shape[2:])
    return table.gather(1, index).squeeze(1)


def is_range(values: Tensor, count: int) -> bool:
    """Whether these are the numbers from 0 to `count - 1`, in order."""
    return len(values) == count > 0 and (count == 1 or torch.equal(values, torch.arange(count)))
