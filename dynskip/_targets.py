"""Targets: which classes hold in each video of a batch, in one form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dynskip.errors import DynskipError


def as_rows(targets: Tensor, batch: int, classes: int) -> Tensor:
    """Return targets as rows: for each video how much each class holds, from 0 to 1.

    Args:
        targets: `(B,)` class indices of any integer dtype; or rows `(B, K)` of any dtype, multi-hot or soft. Of a
            single class, `(B,)` says for each video whether it holds. Values on the CPU are checked; elsewhere that
            would wait for the device.
        batch: number of videos `B`.
        classes: number of classes `K`.

    Returns:
        `(B, K)`, floating point, on the device of the targets.

    Raises:
        DynskipError: if shape, dtype or values do not fit.
    """
    given = f"{tuple(targets.shape)} {targets.dtype}"
    if classes == 1 and targets.ndim == 1:
        targets = targets[:, None]
    known = targets.device.type == "cpu" and targets.numel() > 0
    if targets.shape == (batch, classes) and not targets.is_complex():
        rows = targets if targets.is_floating_point() else targets.to(torch.get_default_dtype())
        if known and not ((rows >= 0) & (rows <= 1)).all():
            wrong = rows[~((rows >= 0) & (rows <= 1))][0].item()
            raise DynskipError(f"Targets hold {wrong:g}; give how much each class holds in a video, from 0 to 1.")
        return rows
    if targets.shape != (batch,) or targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise DynskipError(
            f"Targets must be {batch} class indices of shape (B,), integer, or rows of shape (B, K) = ({batch}, "
            f"{classes}) that say how much each class holds, from 0 to 1; got {given}."
        )
    index = targets.long()
    if known and not 0 <= int(index.min()) <= int(index.max()) < classes:
        raise DynskipError(
            f"Targets range from {int(index.min())} to {int(index.max())}, and there are {classes} classes (0 to "
            f"{classes - 1}). Build the model with as many classes as the labels have, and leave out videos without a "
            "label, or give them rows of zeros."
        )
    return F.one_hot(index, classes).to(torch.get_default_dtype())
