"""The losses as pure functions over tensors: the terms of the thesis' loss, and others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dynskip.errors import DynskipError


def classification_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the videos' predictions, Eq. 3.9.

    Args:
        logits: `(B, K)` video logits.
        targets: `(B,)` class indices, on any device.

    Returns:
        Scalar, mean over videos.

    Raises:
        DynskipError: if the targets do not fit the logits, or there is only one class.
    """
    return F.cross_entropy(logits, _fitting(targets, logits))


def efficiency_loss(forward: Tensor, remaining: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cost that forwarding may still cause, Eq. 3.11.

    Args:
        forward: `(B, T, N)` decisions in [0, 1].
        remaining: `(N,)` cost of the rest of the network after each gate, in any unit (the thesis: GMACs).
        weights: `(B, T)` what each frame weighs, `SkipOutput.weights`; the same by default.

    Returns:
        Scalar in that unit, mean over videos, frames and gates.
    """
    return (_rates(forward, weights) * remaining.to(forward)).mean()


def inner_classification_loss(inner_logits: Tensor, forward: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the inner classifiers where their gate forwarded, Eq. 3.13.

    Args:
        inner_logits: `(B, T, N, K)` logits of the inner classifiers.
        forward: `(B, T, N)` decisions; only a mask here, no gradient passes through them.
        targets: `(B,)` class indices, on any device.

    Returns:
        Scalar, the mean over videos of each video's mean over its forwarded gates; 0 for a video with none.

    Raises:
        DynskipError: if the targets do not fit the logits, or there is only one class.
    """
    targets = _fitting(targets, inner_logits)
    mask = forward.detach() > 0.5
    # Logits outside the mask may be NaN: replace them before the loss, not after.
    logits = torch.where(mask[..., None], inner_logits, 0.0)
    expanded = targets[:, None, None].expand(mask.shape)
    losses = F.cross_entropy(logits.flatten(0, 2), expanded.flatten(), reduction="none").view_as(mask)
    count = mask.sum((1, 2))
    return ((losses * mask).sum((1, 2)) / count.clamp(min=1)).mean()


def self_supervision_targets(inner_logits: Tensor, targets: Tensor, final_logits: Tensor | None = None) -> Tensor:
    """Pseudo-labels of the gates: forward where the next classifier is more confident of the true class, Eq. 3.14.

    Args:
        inner_logits: `(B, T, N, K)` logits of the inner classifiers.
        targets: `(B,)` class indices, on any device.
        final_logits: `(B, T, K)` logits of the head; where given, the last gate is compared with it.

    Returns:
        `(B, T, N - 1)` labels in {0, 1} without gradient, or `(B, T, N)` with `final_logits`.

    Raises:
        DynskipError: if the targets do not fit the logits, or there is only one class.
    """
    targets = _fitting(targets, inner_logits)
    logits = inner_logits if final_logits is None else torch.cat([inner_logits, final_logits[:, :, None]], 2)
    index = targets[:, None, None, None].expand(*logits.shape[:3], 1)
    probability = logits.detach().softmax(-1).gather(-1, index).squeeze(-1)
    return (probability[..., 1:] > probability[..., :-1]).to(inner_logits.dtype)


def self_supervision_loss(
    margins: Tensor, labels: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy between gates and their pseudo-labels, Eq. 3.15.

    Args:
        margins: `(B, T, M)` forward logit minus stop logit of the first `M` gates.
        labels: `(B, T, M)` pseudo-labels in {0, 1}.
        mask: `(B, T, M)` boolean, where a gate and the classifier after it ran; everywhere by default.
        weights: as in `efficiency_loss`.

    Returns:
        Scalar, mean over videos, frames and gates (over the mask where given; 0 if it is empty).
    """
    if mask is None:
        mask = torch.ones_like(margins, dtype=torch.bool)
    losses = F.binary_cross_entropy_with_logits(torch.where(mask, margins, 0.0), labels, reduction="none")
    return _mean(losses, mask, weights)


def target_rate_loss(forward: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Squared distance of each gate's forward rate from its target.

    Args:
        forward: `(B, T, N)` decisions in [0, 1].
        target: `(N,)` wanted share of frames that each gate forwards.
        weights: as in `efficiency_loss`.

    Returns:
        Scalar, sum over gates; a rate is the mean over all videos and frames of the batch.

    Reference:
        Veit and Belongie, "Convolutional networks with adaptive inference graphs", ECCV 2018 (ConvNet-AIG).
    """
    return (_rates(forward, weights) - target.to(forward)).square().sum()


def usage_uniformity_loss(forward: Tensor, weights: Tensor | None = None) -> Tensor:
    """Squared distance of the outcomes' shares from equal shares.

    A frame has `N + 1` outcomes: one of the gates stops it, or it is used.

    Args:
        forward: `(B, T, N)` decisions in [0, 1].
        weights: as in `efficiency_loss`.

    Returns:
        Scalar, sum over outcomes; a share is the mean over all videos and frames of the batch.

    Reference:
        Meng et al., "AR-Net: adaptive frame resolution for efficient action recognition", ECCV 2020.
    """
    passed = forward.cumprod(-1)
    shares = _rates(F.pad(passed, (1, 0), value=1.0) - F.pad(passed, (0, 1)), weights)
    return (shares - 1 / len(shares)).square().sum()


def budget_loss(forward: Tensor, costs: Tensor, head: float, budget: float, weights: Tensor | None = None) -> Tensor:
    """Cost of a frame above a budget; 0 below it.

    Args:
        forward: `(B, T, N)` decisions in [0, 1].
        costs: `(N,)` cost of each stage with its gate.
        head: cost of what follows the last gate, in the same unit.
        budget: cost a frame may have on average, in the same unit.
        weights: as in `efficiency_loss`.

    Returns:
        Scalar in that unit: the mean cost over all videos and frames of the batch less the budget, or 0 if negative.

    Reference:
        After Verelst and Tuytelaars, "Dynamic convolutions", CVPR 2020, whose hinges bound the cost of single blocks.
    """
    reached = _rates(F.pad(forward.cumprod(-1), (1, 0), value=1.0), weights)
    cost = (reached[:-1] * costs.to(forward)).sum() + reached[-1] * head
    return (cost - budget).clamp(min=0.0)


def distillation_loss(
    inner_logits: Tensor,
    final_logits: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Kullback-Leibler divergence of the inner classifiers' answers from the head's. The head gets no gradient.

    Args:
        inner_logits: `(B, T, N, K)` logits of the inner classifiers.
        final_logits: `(B, T, K)` logits of the head.
        temperature: divides all logits. The loss is multiplied by its square, so that gradients stay as large.
        mask: `(B, T, N)` boolean, where an inner classifier and the head ran; everywhere by default.
        weights: as in `efficiency_loss`.

    Returns:
        Scalar, mean over videos, frames and gates (over the mask where given; 0 if it is empty).

    Reference:
        Hinton et al., "Distilling the knowledge in a neural network", 2015; Phuong and Lampert, "Distillation-based
        training for multi-exit architectures", ICCV 2019.
    """
    if mask is None:
        mask = torch.ones_like(inner_logits[..., 0], dtype=torch.bool)
    # Logits outside the mask may be NaN: replace them before the loss, not after.
    student = torch.where(mask[..., None], inner_logits, 0.0) / temperature
    teacher = torch.where(mask[..., None], final_logits.detach()[:, :, None], 0.0) / temperature
    losses = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return temperature**2 * _mean(losses, mask, weights)


def _rates(values: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean over videos and frames: `(B, T, M) -> (M,)`."""
    if weights is None:
        return values.mean((0, 1))
    return (values * weights[..., None].to(values)).sum((0, 1)) / weights.sum().to(values)


def _mean(losses: Tensor, mask: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean over what is in the `(B, T, M)` mask; 0 where that is nothing."""
    counts = mask if weights is None else mask * weights[..., None].to(losses)
    return (losses * counts).sum() / counts.sum().clamp(min=1)


def _fitting(targets: Tensor, logits: Tensor) -> Tensor:
    """Return class indices `(B,)` on the device of the logits `(B, ..., K)`. Refuse indices that do not fit them."""
    batch, classes = logits.shape[0], logits.shape[-1]
    if classes == 1:
        raise DynskipError(
            "The model has one output, and the softmax of a single logit is always 1, so there is nothing to learn. "
            'Give the model two outputs, one of them for "no" (num_classes=2).'
        )
    if targets.shape != (batch,) or targets.is_floating_point():
        raise DynskipError(
            f"Targets must be {batch} class indices of shape (B,), integer; got {tuple(targets.shape)} {targets.dtype}."
        )
    if targets.device.type == "cpu" and batch and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise DynskipError(
            f"Targets range from {int(targets.min())} to {int(targets.max())}, and the model has {classes} classes "
            f"(0 to {classes - 1}). Build the model with as many classes as the labels have."
        )
    return targets.to(logits.device)
