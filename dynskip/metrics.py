"""How good the predictions are, and what happened to the frames."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynskip.errors import DynskipError
from dynskip.output import UNSEEN


@dataclass(frozen=True)
class FrameUsage:
    """Shares of frames by what happened to them; together they sum to 1.

    Args:
        used: Share that passed every gate.
        stopped: Share stopped by each gate, one number per stage.
        unseen: Share never looked at.
    """

    used: float
    stopped: tuple[float, ...]
    unseen: float


def top_k_accuracy(scores: Tensor, targets: Tensor, k: int = 1) -> float:
    """Share of videos that have a label among their `k` best-scored classes.

    With several labels per video this is ActivityNet's Hit@k: one of them is enough. Among equal scores
    the lower class index counts as better. Videos without any label are left out.

    Args:
        scores: `(B, K)`, higher is better; logits and probabilities give the same result.
        targets: `(B,)` class indices, or `(B, K)` multi-hot.
        k: How many classes may be guessed, 1 to K.

    Returns:
        A number from 0 to 1.

    Raises:
        DynskipError: On wrong shapes or values, NaN scores, or when no video has a label.
    """
    scores, positives = _checked(scores, targets)
    num_classes = scores.shape[1]
    if not 1 <= k <= num_classes:
        raise DynskipError(f"k={k} is out of range; expected 1 to the number of classes, {num_classes}.")
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    hit = positives.gather(1, best).any(dim=1)
    return hit[positives.any(dim=1)].double().mean().item()


def mean_average_precision(scores: Tensor, targets: Tensor, interpolated: bool = True) -> float:
    """Average precision of ranking the videos by each class's score, averaged over classes.

    Classes that no video has are left out of the mean. Videos with equal scores enter the ranking together,
    so the result does not depend on the order of the rows.

    Args:
        scores: `(B, K)`, higher is better. Videos are compared with each other, so give softmax
            probabilities: logits have no common scale across videos and rank differently.
        targets: `(B,)` class indices, or `(B, K)` multi-hot.
        interpolated: True makes precision monotone in recall first, as ActivityNet's evaluation does (the
            area of VOC 2011); False is plain average precision, usually somewhat lower.

    Returns:
        A number from 0 to 1.

    Raises:
        DynskipError: On wrong shapes or values, NaN scores, or when no video has a label.

    Reference:
        Caba Heilbron et al., "ActivityNet", CVPR 2015; Everingham et al., "The PASCAL Visual Object Classes
        Challenge: A Retrospective", IJCV 2015.
    """
    scores, positives = _checked(scores, targets)
    present = positives.any(dim=0).nonzero().flatten().tolist()
    precisions = [_average_precision(scores[:, c], positives[:, c], interpolated) for c in present]
    return sum(precisions) / len(precisions)


def frame_usage(stopped_at: Tensor, num_stages: int) -> FrameUsage:
    """Count what happened to the frames of one or many videos.

    Args:
        stopped_at: `(B, T)` or `(T,)`: the stage a frame stopped after, `num_stages` if it was used,
            `UNSEEN` if it was never looked at.
        num_stages: Number of stages N of the model.

    Returns:
        The shares of all frames given.

    Raises:
        DynskipError: When `stopped_at` is empty, has another shape, or holds values outside -1 to N.

    Reference:
        Thesis Fig. 4.1.
    """
    if stopped_at.dim() not in (1, 2) or stopped_at.numel() == 0:
        raise DynskipError(f"stopped_at has shape {tuple(stopped_at.shape)}; expected (B, T) or (T,), not empty.")
    check_stopped_at(stopped_at, num_stages)
    # Shifted by one, because bincount cannot count UNSEEN = -1.
    counts = torch.bincount(stopped_at.flatten().cpu() - UNSEEN, minlength=num_stages + 2).double()
    unseen, *stopped, used = (counts / counts.sum()).tolist()
    return FrameUsage(used=used, stopped=tuple(stopped), unseen=unseen)


def check_stopped_at(stopped_at: Tensor, num_stages: int) -> None:
    """Raise DynskipError unless every entry is a whole number from UNSEEN to `num_stages`."""
    if num_stages < 1:
        raise DynskipError(f"num_stages={num_stages} is out of range; a model has at least one stage.")
    if not _is_integer(stopped_at):
        raise DynskipError(f"stopped_at is {stopped_at.dtype}; expected int64.")
    wrong = stopped_at[(stopped_at < UNSEEN) | (stopped_at > num_stages)]
    if wrong.numel():
        raise DynskipError(
            f"stopped_at holds {wrong[0].item()}, but with {num_stages} stages it goes from {UNSEEN} "
            f"(unseen) to {num_stages} (used). Give the number of stages of the model that made it."
        )


def _average_precision(scores: Tensor, positive: Tensor, interpolated: bool) -> float:
    ranked, order = scores.sort(descending=True)
    # A threshold can only fall between different scores, so a group of equal ones is a single step.
    last_of_group = torch.ones_like(positive)
    last_of_group[:-1] = ranked[:-1] != ranked[1:]
    retrieved = last_of_group.nonzero().flatten() + 1
    found = positive[order].cumsum(0)[last_of_group].double()
    precision = found / retrieved
    if interpolated:
        precision = precision.flip(0).cummax(0).values.flip(0)
    gained_recall = found.diff(prepend=found.new_zeros(1)) / found[-1]
    return (gained_recall * precision).sum().item()


def _checked(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and multi-hot targets, both `(B, K)`, on the CPU."""
    if scores.dim() != 2 or scores.numel() == 0:
        raise DynskipError(f"scores has shape {tuple(scores.shape)}; expected (B, K) with B and K at least 1.")
    if not scores.is_floating_point():
        raise DynskipError(f"scores is {scores.dtype}; expected floating point. Pass logits or probabilities.")
    scores, targets = scores.detach().cpu(), targets.detach().cpu()
    if scores.isnan().any():
        row = int(scores.isnan().any(dim=1).nonzero()[0])
        raise DynskipError(f"scores of row {row} contain NaN, which has no rank. Repair or leave out that video.")
    batch, num_classes = scores.shape
    if targets.shape not in ((batch,), (batch, num_classes)):
        raise DynskipError(
            f"targets has shape {tuple(targets.shape)}; expected, for scores {tuple(scores.shape)}, class "
            f"indices ({batch},) or multi-hot ({batch}, {num_classes})."
        )
    if targets.dim() == 1:
        if not _is_integer(targets):
            raise DynskipError(f"targets is {targets.dtype}; expected int64 class indices.")
        wrong = targets[(targets < 0) | (targets >= num_classes)]
        if wrong.numel():
            raise DynskipError(
                f"targets holds {wrong[0].item()}, but with {num_classes} classes it goes from 0 to "
                f"{num_classes - 1}. Leave out videos without a label."
            )
        positives = torch.nn.functional.one_hot(targets.long(), num_classes).bool()
    else:
        wrong = targets[(targets != 0) & (targets != 1)]
        if wrong.numel():
            raise DynskipError(f"Multi-hot targets hold {wrong[0].item()}; expected 0 or 1. Round soft labels.")
        positives = targets.bool()
    if not positives.any():
        raise DynskipError("No video has a label, so nothing can be measured. Check the multi-hot targets.")
    return scores, positives


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
