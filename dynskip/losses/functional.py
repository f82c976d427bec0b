"""The losses as pure functions over tensors: the terms of the thesis' loss, and others.

Targets are `(B,)` class indices of any integer dtype, or rows `(B, K)` that say how much each class holds, on any
device. With a softmax, rows are distributions (soft labels, mixup, label smoothing) and add up to 1. With a sigmoid
they are multi-hot or soft. A model with a single output has a sigmoid, and its targets are `(B,)` or `(B, 1)`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dynskip._check import present
from dynskip._targets import as_rows
from dynskip.activation import Activation
from dynskip.errors import DynskipError


def classification_loss(logits: Tensor, targets: Tensor, activation: Activation = "softmax") -> Tensor:
    """Cross-entropy of the videos' predictions, Eq. 3.9; with a sigmoid, the mean over classes of each one's.

    Args:
        logits: `(B, K)` video logits.
        targets: `(B,)` class indices or `(B, K)` rows.
        activation: how logits become probabilities.

    Returns:
        Scalar, mean over videos.

    Raises:
        DynskipError: if the targets do not fit the logits, or a softmax has only one class.
    """
    return cross_entropy(logits, targets, activation).mean()


def frames_loss(frame_logits: Tensor, frames: Tensor, targets: Tensor, activation: Activation = "softmax") -> Tensor:
    """Cross-entropy of the mean over some frames of each video, whatever a gate says of them.

    Args:
        frame_logits: `(B, T, K)` logits of the frames.
        frames: `(B, T)` boolean, those that count. The others may be NaN, and get no gradient.
        targets: `(B,)` class indices or `(B, K)` rows.
        activation: how logits become probabilities.

    Returns:
        Scalar, mean over videos; NaN if a video has no frame that counts.

    Raises:
        DynskipError: if the targets do not fit the logits, or a softmax has only one class.
    """
    wide = frame_logits.to(torch.promote_types(frame_logits.dtype, torch.float32))
    sums = torch.where(frames[..., None], wide, 0.0).sum(1)
    return classification_loss(sums / frames.sum(1, keepdim=True), targets, activation)


def random_parts(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a part of each video's frames in two ways; every number of frames is equally likely.

    Args:
        frames: `(B, T)` boolean, frames to draw from.

    Returns:
        Two `(B, T)` boolean: a random set of the frames, and the first ones, as many as another draw says.
    """
    total = frames.sum(1)
    draws = torch.rand(2, len(frames), device=frames.device, dtype=torch.float64)
    counts = (draws * total).floor() + 1
    order = torch.rand(frames.shape, device=frames.device).masked_fill(~frames, 2.0)
    drawn = order.argsort(1).argsort(1) < counts[0, :, None]
    return drawn & frames, (frames.cumsum(1) <= counts[1, :, None]) & frames


def anytime_loss(
    frame_logits: Tensor,
    targets: Tensor,
    activation: Activation = "softmax",
    lengths: Tensor | None = None,
    weight: float = 1.0,
) -> Tensor:
    """Cross-entropy of the mean over all frames, and over random parts of them: `L_all + weight (L_set + L_first) / 2`.

    So the answer is good whenever it is asked for. Parts are drawn anew in every call, see `random_parts`.

    Args:
        frame_logits: `(B, T, K)` logits of the frames, of any network.
        targets: `(B,)` class indices or `(B, K)` rows.
        activation: how logits become probabilities.
        lengths: `(B,)` frames of each video, where they are padded; `None` for all.
        weight: of the parts; 0 leaves the cross-entropy of all frames.

    Returns:
        Scalar, mean over videos.

    Raises:
        DynskipError: if the targets do not fit the logits, or a softmax has only one class.
    """
    batch, frames, _ = frame_logits.shape
    if lengths is None:
        real = torch.ones(batch, frames, dtype=torch.bool, device=frame_logits.device)
    else:
        real = present(lengths.to(frame_logits.device), frames)
    drawn, first = (frames_loss(frame_logits, part, targets, activation) for part in random_parts(real))
    return frames_loss(frame_logits, real, targets, activation) + weight * (drawn + first) / 2


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


def inner_classification_loss(
    inner_logits: Tensor, forward: Tensor, targets: Tensor, activation: Activation = "softmax"
) -> Tensor:
    """Cross-entropy of the inner classifiers where their gate forwarded, Eq. 3.13.

    Args:
        inner_logits: `(B, T, N, K)` logits of the inner classifiers.
        forward: `(B, T, N)` decisions; only a mask here, no gradient passes through them.
        targets: `(B,)` class indices or `(B, K)` rows.
        activation: how logits become probabilities.

    Returns:
        Scalar, the mean over videos of each video's mean over its forwarded gates; 0 for a video with none.

    Raises:
        DynskipError: if the targets do not fit the logits, or a softmax has only one class.
    """
    mask = forward.detach() > 0.5
    # Logits outside the mask may be NaN: replace them before the loss, not after.
    losses = cross_entropy(torch.where(mask[..., None], inner_logits, 0.0), targets, activation)
    return masked_mean(losses, mask, (1, 2)).mean()


def self_supervision_targets(
    inner_logits: Tensor, targets: Tensor, final_logits: Tensor | None = None, activation: Activation = "softmax"
) -> Tensor:
    """Pseudo-labels of the gates: forward where the next classifier is more confident of the truth, Eq. 3.14.

    The confidence in the truth is `exp(-L)`, with `L` the cross-entropy of `classification_loss`. Of a class index it
    is the probability of that class, as in the thesis. Of several labels it is the geometric mean over classes of the
    probability of what is true of each; of soft labels, the mean weighted by them.

    Args:
        inner_logits: `(B, T, N, K)` logits of the inner classifiers.
        targets: `(B,)` class indices or `(B, K)` rows.
        final_logits: `(B, T, K)` logits of the head; where given, the last gate is compared with it.
        activation: how logits become probabilities.

    Returns:
        `(B, T, N - 1)` labels in {0, 1} without gradient, or `(B, T, N)` with `final_logits`.

    Raises:
        DynskipError: if the targets do not fit the logits, or a softmax has only one class.
    """
    logits = inner_logits if final_logits is None else torch.cat([inner_logits, final_logits[:, :, None]], 2)
    losses = cross_entropy(logits.detach(), targets, activation)
    return (losses[..., 1:] < losses[..., :-1]).to(inner_logits.dtype)


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
    return masked_mean(losses, weighed(mask, weights))


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
    activation: Activation = "softmax",
    weights: Tensor | None = None,
) -> Tensor:
    """Kullback-Leibler divergence of the inner classifiers' answers from the head's. The head gets no gradient.

    With a sigmoid it is the mean over classes of the divergence of each one's two probabilities: it holds, or not.

    Args:
        inner_logits: `(B, T, N, K)` logits of the inner classifiers.
        final_logits: `(B, T, K)` logits of the head.
        temperature: divides all logits. The loss is multiplied by its square, so that gradients stay as large.
        mask: `(B, T, N)` boolean, where an inner classifier and the head ran; everywhere by default.
        activation: how logits become probabilities.
        weights: as in `efficiency_loss`.

    Returns:
        Scalar, mean over videos, frames and gates (over the mask where given; 0 if it is empty).

    Raises:
        DynskipError: if a softmax has only one class.

    Reference:
        Hinton et al., "Distilling the knowledge in a neural network", 2015; Phuong and Lampert, "Distillation-based
        training for multi-exit architectures", ICCV 2019.
    """
    if mask is None:
        mask = torch.ones_like(inner_logits[..., 0], dtype=torch.bool)
    # Logits outside the mask may be NaN: replace them before the loss, not after.
    student = torch.where(mask[..., None], inner_logits, 0.0) / temperature
    teacher = torch.where(mask[..., None], final_logits.detach()[:, :, None], 0.0) / temperature
    if activation == "sigmoid":
        truth = teacher.sigmoid()
        both = [F.binary_cross_entropy_with_logits(x, truth, reduction="none").mean(-1) for x in (student, teacher)]
        losses = both[0] - both[1]  # cross-entropy less entropy
    else:
        _refuse_one_class(student)
        losses = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return temperature**2 * masked_mean(losses, weighed(mask, weights))


def _rates(values: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean over videos and frames: `(B, T, M) -> (M,)`."""
    if weights is None:
        return values.mean((0, 1))
    return (values * weights[..., None].to(values)).sum((0, 1)) / weights.sum().to(values)


def weighed(mask: Tensor, weights: Tensor | None) -> Tensor:
    """Weigh a `(B, T, M)` mask by frames."""
    return mask if weights is None else mask * weights[..., None]


def cross_entropy(logits: Tensor, targets: Tensor, activation: Activation) -> Tensor:
    """Return the cross-entropy of each answer in float32 or better: logits `(B, ..., K) -> (B, ...)`."""
    batch, classes = logits.shape[0], logits.shape[-1]
    if activation == "softmax":
        _refuse_one_class(logits)
    rows = as_rows(targets, batch, classes)
    if activation == "softmax" and rows.device.type == "cpu" and not ((rows.sum(1) - 1).abs() < 0.01).all():
        wrong = rows.sum(1)[(rows.sum(1) - 1).abs().argmax()].item()
        raise DynskipError(
            f"The model's softmax says which one class holds, and a row of the targets adds up to {wrong:g}; expected "
            "1. Where several classes can hold at once, build the model with activation='sigmoid'; else divide each "
            "row by its sum."
        )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    truth = rows.to(wide).view(batch, *[1] * (logits.ndim - 2), classes).expand_as(wide)
    if activation == "sigmoid":
        return F.binary_cross_entropy_with_logits(wide, truth, reduction="none").mean(-1)
    # A class that does not hold may have a logit of minus infinity.
    return -(truth * torch.where(truth > 0, wide.log_softmax(-1), 0.0)).sum(-1)


def masked_mean(losses: Tensor, mask: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """Return the mean over what is in the mask; 0 where that is nothing."""
    return (losses * mask).sum(dims) / mask.sum(dims).clamp(min=1)


def _refuse_one_class(logits: Tensor) -> None:
    if logits.shape[-1] == 1:
        raise DynskipError(
            "The model has one output, and the softmax of a single logit is always 1, so there is nothing to learn. "
            "Build the model with activation='sigmoid', or give it two outputs, one of them for \"no\" (num_classes=2)."
        )
