"""What gates are compared with: the plain backbone on all frames, on evenly spread ones and on random ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dynskip.calibrate._points import CurvePoint, Gated
from dynskip.calibrate._replay import Batches, Metric, Replay, every_frame
from dynskip.metrics import top_k_accuracy


def dense(model: Gated, batches: Batches, *, metric: Metric = top_k_accuracy) -> CurvePoint:
    """Measure the plain backbone on every frame: what all others are compared with.

    Args:
        model: as in `to_budget`.
        batches: as in `to_budget`.
        metric: as in `to_budget`.

    Returns:
        Its accuracy and MACs.

    Raises:
        DynskipError: if there are no videos, or something does not fit.
    """
    return Replay(model, batches, metric).frames(every_frame)


def uniform_frames(model: Gated, batches: Batches, *, metric: Metric = top_k_accuracy) -> tuple[CurvePoint, ...]:
    """Measure the plain backbone on few frames of each video, spread evenly: a baseline for curves.

    Args:
        model: as in `to_budget`.
        batches: as in `to_budget`.
        metric: as in `to_budget`.

    Returns:
        One point for each number of frames, from one to all. Frames that are left out cost nothing.

    Raises:
        DynskipError: if there are no videos, or something does not fit.
    """

    def pick(count: int, batch: int, frames: int) -> Tensor:
        count = min(count, frames)
        picked = torch.zeros(batch, frames, dtype=torch.bool)
        picked[:, [int(frames / count * (i + 0.5)) for i in range(count)]] = True
        return picked

    return _by_frames(model, batches, metric, pick)


def random_frames(
    model: Gated, batches: Batches, *, seed: int = 0, metric: Metric = top_k_accuracy
) -> tuple[CurvePoint, ...]:
    """Measure the plain backbone on few frames of each video, drawn at random: a baseline for curves.

    Args:
        model: as in `to_budget`.
        batches: as in `to_budget`.
        seed: another number draws other frames.
        metric: as in `to_budget`.

    Returns:
        One point for each number of frames, from one to all. Frames that are left out cost nothing.

    Raises:
        DynskipError: if there are no videos, or something does not fit.
    """
    generator = torch.Generator().manual_seed(seed)

    def pick(count: int, batch: int, frames: int) -> Tensor:
        return torch.rand(batch, frames, generator=generator).argsort(1).argsort(1) < count

    return _by_frames(model, batches, metric, pick)


def _by_frames(
    model: Gated, batches: Batches, metric: Metric, pick: Callable[[int, int, int], Tensor]
) -> tuple[CurvePoint, ...]:
    replayed = Replay(model, batches, metric)
    most = max(encoded.frame_logits.shape[1] for encoded, _ in replayed.videos)
    return tuple(replayed.frames(partial(pick, count)) for count in range(1, most + 1))
