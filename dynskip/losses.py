"""Criteria over a wrapper's output: thin modules over pure functions, the terms of the thesis' loss and others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynskip.errors import DynskipError
from dynskip.flops import FLOPsLookup
from dynskip.gates import FORWARD, STOP
from dynskip.output import SkipOutput


def classification_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the videos' predictions, Eq. 3.9.

    Args:
        logits: `(B, K)` video logits.
        targets: `(B,)` class indices.

    Returns:
        Scalar, mean over videos.

    Raises:
        DynskipError: if the targets do not fit the logits.
    """
    _check_targets(targets, logits.shape[0], logits.shape[-1])
    return F.cross_entropy(logits, targets)


def efficiency_loss(forward: Tensor, remaining: Tensor) -> Tensor:
    """Mean cost that forwarding may still cause, Eq. 3.11.

    Args:
        forward: `(B, T, N)` decisions in [0, 1].
        remaining: `(N,)` cost of the rest of the network after each gate, in the unit of your choice (the thesis:
            GMACs).

    Returns:
        Scalar in that unit, mean over videos, frames and gates.
    """
    return (forward * remaining.to(forward)).mean()


def inner_classification_loss(inner_logits: Tensor, forward: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the inner classifiers where their gate forwarded, Eq. 3.13.

    Args:
        inner_logits: `(B, T, N, K)` logits of the inner classifiers.
        forward: `(B, T, N)` decisions; only a mask here, no gradient passes through them.
        targets: `(B,)` class indices.

    Returns:
        Scalar, the mean over videos of each video's mean over its forwarded gates; 0 for a video with none.

    Raises:
        DynskipError: if the targets do not fit the logits.
    """
    batch, frames, stages, classes = inner_logits.shape
    _check_targets(targets, batch, classes)
    mask = forward.detach() > 0.5
    # Masked-out logits may be NaN (never evaluated): replace them before the loss, not after.
    logits = torch.where(mask[..., None], inner_logits, 0.0)
    expanded = targets[:, None, None].expand(batch, frames, stages)
    losses = F.cross_entropy(logits.flatten(0, 2), expanded.flatten(), reduction="none").view_as(mask)
    count = mask.sum((1, 2))
    return ((losses * mask).sum((1, 2)) / count.clamp(min=1)).mean()


def self_supervision_targets(inner_logits: Tensor, targets: Tensor, final_logits: Tensor | None = None) -> Tensor:
    """Pseudo-labels of the gates: forward where the next classifier is surer of the true class, Eq. 3.14.

    Args:
        inner_logits: `(B, T, N, K)` logits of the inner classifiers.
        targets: `(B,)` class indices.
        final_logits: `(B, T, K)` logits of the head; where given, the last gate is compared with it.

    Returns:
        `(B, T, N - 1)` labels in {0, 1} without gradient, or `(B, T, N)` with `final_logits`.
    """
    logits = inner_logits if final_logits is None else torch.cat([inner_logits, final_logits[:, :, None]], 2)
    index = targets[:, None, None, None].expand(*logits.shape[:3], 1)
    probability = logits.detach().softmax(-1).gather(-1, index).squeeze(-1)
    return (probability[..., 1:] > probability[..., :-1]).to(inner_logits.dtype)


def self_supervision_loss(margins: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Binary cross-entropy between gates and their pseudo-labels, Eq. 3.15.

    Args:
        margins: `(B, T, M)` forward logit minus stop logit of the first `M` gates.
        labels: `(B, T, M)` pseudo-labels in {0, 1}.
        mask: `(B, T, M)` boolean, where a gate and the classifier after it ran; everywhere by default.

    Returns:
        Scalar, mean over videos, frames and gates (over the mask where given; 0 if it is empty).
    """
    if mask is None:
        return F.binary_cross_entropy_with_logits(margins, labels)
    losses = F.binary_cross_entropy_with_logits(torch.where(mask, margins, 0.0), labels, reduction="none")
    return (losses * mask).sum() / mask.sum().clamp(min=1)


def target_rate_loss(forward: Tensor, target: Tensor) -> Tensor:
    """Squared distance of each gate's forward rate from its target.

    Args:
        forward: `(B, T, N)` decisions in [0, 1].
        target: `(N,)` wanted share of frames that each gate forwards.

    Returns:
        Scalar, sum over gates; a rate is the mean over all videos and frames of the batch.

    Reference:
        Veit and Belongie, "Convolutional networks with adaptive inference graphs", ECCV 2018 (ConvNet-AIG).
    """
    return (forward.mean((0, 1)) - target.to(forward)).square().sum()


def usage_uniformity_loss(forward: Tensor) -> Tensor:
    """Squared distance of what becomes of frames from all outcomes being equally frequent.

    A frame has `N + 1` outcomes: it is stopped by one of the gates, or used.

    Args:
        forward: `(B, T, N)` decisions in [0, 1].

    Returns:
        Scalar, sum over outcomes; a share is the mean over all videos and frames of the batch.

    Reference:
        Meng et al., "AR-Net: adaptive frame resolution for efficient action recognition", ECCV 2020.
    """
    passed = forward.cumprod(-1)
    shares = (F.pad(passed, (1, 0), value=1.0) - F.pad(passed, (0, 1))).mean((0, 1))
    return (shares - 1 / len(shares)).square().sum()


def budget_loss(forward: Tensor, costs: Tensor, head: float, budget: float) -> Tensor:
    """Cost of a frame above a budget; zero below it.

    Args:
        forward: `(B, T, N)` decisions in [0, 1].
        costs: `(N,)` cost of each stage with its gate.
        head: cost of what follows the last gate, in the same unit.
        budget: cost a frame may have on average, in the same unit.

    Returns:
        Scalar in that unit, the mean over all videos and frames of the batch, less the budget, if that is positive.

    Reference:
        After Verelst and Tuytelaars, "Dynamic convolutions", CVPR 2020, whose hinges bound the cost of single blocks.
    """
    reached = F.pad(forward.cumprod(-1), (1, 0), value=1.0).mean((0, 1))
    cost = (reached[:-1] * costs.to(forward)).sum() + reached[-1] * head
    return (cost - budget).clamp(min=0.0)


def distillation_loss(
    inner_logits: Tensor, final_logits: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Kullback-Leibler divergence of the inner classifiers' answers from the head's, which is only read.

    Args:
        inner_logits: `(B, T, N, K)` logits of the inner classifiers.
        final_logits: `(B, T, K)` logits of the head.
        temperature: divides all logits; the loss is scaled by its square to keep gradients as large.
        mask: `(B, T, N)` boolean, where an inner classifier and the head ran; everywhere by default.

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
    return temperature**2 * (losses * mask).sum() / mask.sum().clamp(min=1)


class ClassificationLoss(nn.Module):
    """Cross-entropy of the videos' predictions (Eq. 3.9)."""

    def forward(self, output: SkipOutput, targets: Tensor) -> Tensor:
        """Return the scalar loss of an output against `(B,)` class indices."""
        return classification_loss(output.logits, targets)


class EfficiencyLoss(nn.Module):
    """Mean remaining cost at the gates that forward (Eq. 3.11).

    Args:
        lookup: the cost table. MACs are scaled to GMACs, as in the thesis; other units are taken as they are.
        normalize: divide by the cost of a whole frame instead, so that a weight carries over to other backbones.

    Reference:
        Thesis Eq. 3.10-3.11.
    """

    remaining: Tensor

    def __init__(self, lookup: FLOPsLookup, normalize: bool = False) -> None:
        super().__init__()
        scale, self.unit = (1e9, "GMACs") if lookup.unit == "MACs" else (1.0, lookup.unit)
        if normalize:
            scale, self.unit = lookup.total, "of a whole frame"
        self.register_buffer("remaining", (lookup.remaining / scale).float(), persistent=False)

    def forward(self, output: SkipOutput) -> Tensor:
        """Return the scalar loss of an output."""
        _check_table(len(self.remaining), output)
        return efficiency_loss(output.forward, self.remaining)

    def extra_repr(self) -> str:
        """Show what forwarding at each gate may cost."""
        return f"remaining {', '.join(f'{cost:.4g}' for cost in self.remaining.tolist())} {self.unit}"


class InnerClassificationLoss(nn.Module):
    """Cross-entropy of the inner classifiers where their gate forwarded (Eq. 3.13)."""

    def forward(self, output: SkipOutput, targets: Tensor) -> Tensor:
        """Return the scalar loss of an output against `(B,)` class indices."""
        return inner_classification_loss(_inner(output), output.forward, targets)


class SelfSupervisionLoss(nn.Module):
    """Teach gates to forward where the next inner classifier is surer of the true class (Eq. 3.14-3.15).

    Args:
        supervise_last: compare the last inner classifier with the network's head, so that the last gate is taught, too
            (the thesis leaves it out).
        on_sample: penalise the straight-through sample (two possible values) instead of the forward probability.
    """

    def __init__(self, supervise_last: bool = False, on_sample: bool = False) -> None:
        super().__init__()
        self.supervise_last = supervise_last
        self.on_sample = on_sample

    def forward(self, output: SkipOutput, targets: Tensor) -> Tensor:
        """Return the scalar loss of an output against `(B,)` class indices."""
        inner = _inner(output)
        _check_targets(targets, inner.shape[0], inner.shape[-1])
        if inner.shape[2] < 2 and not self.supervise_last:
            raise DynskipError("Self-supervision compares each gate with the next one; it needs at least two gates.")
        if self.on_sample or output.gate_logits is None:
            margins = 2 * output.forward - 1
        else:
            margins = output.gate_logits[..., FORWARD] - output.gate_logits[..., STOP]
        mask = output.evaluated
        if self.supervise_last:
            labels = self_supervision_targets(inner, targets, output.frame_logits)
            mask = mask & torch.cat([mask[..., 1:], ~output.frame_logits.isnan().any(-1, keepdim=True)], -1)
        else:
            labels = self_supervision_targets(inner, targets)
            margins, mask = margins[..., :-1], mask[..., :-1] & mask[..., 1:]
        return self_supervision_loss(margins, labels, mask)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"supervise_last={self.supervise_last}, on_sample={self.on_sample}"


class PolicyGuidanceLoss(nn.Module):
    """`beta` times inner classification plus `1 - beta` times self-supervision (Eq. 3.12).

    Args:
        beta: weight in [0, 1]; 0.9 in the thesis.
        self_supervision: the second term; `SelfSupervisionLoss()` by default.

    Raises:
        DynskipError: if `beta` is out of range.
    """

    def __init__(self, beta: float = 0.9, self_supervision: SelfSupervisionLoss | None = None) -> None:
        super().__init__()
        self.beta = _weight("beta", beta)
        self.inner = InnerClassificationLoss()
        self.self_supervision = self_supervision or SelfSupervisionLoss()

    def parts(self, output: SkipOutput, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inner classification and the self-supervision loss, unweighted."""
        return self.inner(output, targets), self.self_supervision(output, targets)

    def forward(self, output: SkipOutput, targets: Tensor) -> Tensor:
        """Return the scalar loss of an output against `(B,)` class indices."""
        inner, self_supervision = self.parts(output, targets)
        return self.beta * inner + (1 - self.beta) * self_supervision

    def extra_repr(self) -> str:
        """Show the weight."""
        return f"beta={self.beta:g}"


class TargetRateLoss(nn.Module):
    """Keep each gate's forward rate near a target (ConvNet-AIG).

    Args:
        target: wanted share of frames that a gate forwards, in [0, 1]; one for all gates or one a gate.

    Raises:
        DynskipError: if a target is out of range.

    Reference:
        Veit and Belongie, "Convolutional networks with adaptive inference graphs", ECCV 2018.
    """

    target: Tensor

    def __init__(self, target: float | Sequence[float]) -> None:
        super().__init__()
        targets = tuple(target) if isinstance(target, Sequence) else (target,)
        if not targets or not all(0.0 <= t <= 1.0 for t in targets):
            raise DynskipError(f"target={target} is out of range; give shares of frames in [0, 1].")
        self.register_buffer("target", torch.tensor(targets, dtype=torch.float64), persistent=False)

    def forward(self, output: SkipOutput) -> Tensor:
        """Return the scalar loss of an output."""
        if len(self.target) not in (1, output.num_stages):
            raise DynskipError(
                f"Got {len(self.target)} target rates for {output.num_stages} gates; give one number or one a gate."
            )
        return target_rate_loss(output.forward, self.target)

    def extra_repr(self) -> str:
        """Show the targets."""
        return f"target={', '.join(f'{t:g}' for t in self.target.tolist())}"


class UsageUniformityLoss(nn.Module):
    """Keep all outcomes of a frame (stopped by each gate, used) equally frequent, so that none dies out (AR-Net).

    Reference:
        Meng et al., "AR-Net: adaptive frame resolution for efficient action recognition", ECCV 2020.
    """

    def forward(self, output: SkipOutput) -> Tensor:
        """Return the scalar loss of an output."""
        return usage_uniformity_loss(output.forward)


class BudgetLoss(nn.Module):
    """Penalise cost above a budget, and nothing below it.

    Args:
        lookup: the cost table.
        budget: what a frame may cost on average, as a share of the plain backbone's cost, in (0, 1].

    Raises:
        DynskipError: if the budget is out of range.

    Reference:
        After Verelst and Tuytelaars, "Dynamic convolutions", CVPR 2020.
    """

    costs: Tensor

    def __init__(self, lookup: FLOPsLookup, budget: float) -> None:
        super().__init__()
        if not 0.0 < budget <= 1.0:
            raise DynskipError(f"budget={budget} is out of range; give a share of the backbone's cost in (0, 1].")
        self.budget = budget
        self.head = lookup.head / lookup.dense
        shares = (lookup.per_stage + lookup.gates) / lookup.dense
        self.register_buffer("costs", shares, persistent=False)

    def forward(self, output: SkipOutput) -> Tensor:
        """Return the scalar loss of an output: the share of the plain backbone's cost above the budget."""
        _check_table(len(self.costs), output)
        return budget_loss(output.forward, self.costs, self.head, self.budget)

    def extra_repr(self) -> str:
        """Show the budget."""
        return f"budget={self.budget:g} of the plain backbone"


class DistillationLoss(nn.Module):
    """Teach inner classifiers to answer as the head does, wherever both ran; no labels are needed.

    Args:
        temperature: softens both answers; positive.

    Raises:
        DynskipError: if the temperature is not positive.

    Reference:
        Phuong and Lampert, "Distillation-based training for multi-exit architectures", ICCV 2019.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0.0:
            raise DynskipError(f"temperature={temperature} is not positive; 1 leaves the answers as they are.")
        self.temperature = temperature

    def forward(self, output: SkipOutput) -> Tensor:
        """Return the scalar loss of an output."""
        inner, final = _inner(output), output.frame_logits
        ran = ~(inner.isnan().any(-1) | final.isnan().any(-1)[..., None])
        return distillation_loss(inner, final, self.temperature, ran)

    def extra_repr(self) -> str:
        """Show the temperature."""
        return f"temperature={self.temperature:g}"


@dataclass
class LossParts:
    """The scalar terms of a loss, unweighted, and their weighted total.

    Attributes:
        total: what to call `backward` on (Eq. 3.8).
        classification: Eq. 3.9.
        efficiency: Eq. 3.11, in the lookup's unit (GMACs) or normalised.
        inner: Eq. 3.13; 0 without guidance.
        self_supervision: Eq. 3.15; 0 without guidance.
    """

    total: Tensor
    classification: Tensor
    efficiency: Tensor
    inner: Tensor
    self_supervision: Tensor

    def __repr__(self) -> str:
        """Show the numbers alone."""
        return f"LossParts({', '.join(f'{name}={float(value.detach()):.4g}' for name, value in vars(self).items())})"


class SoFLoss(nn.Module):
    """The whole loss of SoF-Net: `alpha L_cls + (1 - alpha) L_eff + L_pg` (Eq. 3.8).

    Args:
        lookup: the cost table for `EfficiencyLoss`.
        alpha: accuracy against efficiency, in [0, 1]; 0.9 in the thesis.
        beta: inner classification against self-supervision, in [0, 1]; 0.9 in the thesis. `None` leaves the guidance
            out (the ablation), and needs no inner classifiers.
        normalize: as in `EfficiencyLoss`.

    Raises:
        DynskipError: if a weight is out of range.
    """

    def __init__(
        self, lookup: FLOPsLookup, alpha: float = 0.9, beta: float | None = 0.9, normalize: bool = False
    ) -> None:
        super().__init__()
        self.alpha = _weight("alpha", alpha)
        self.classification = ClassificationLoss()
        self.efficiency = EfficiencyLoss(lookup, normalize)
        self.guidance = PolicyGuidanceLoss(beta) if beta is not None else None

    def forward(self, output: SkipOutput, targets: Tensor) -> LossParts:
        """Return the total and its parts for an output against `(B,)` class indices."""
        classification, efficiency = self.classification(output, targets), self.efficiency(output)
        total = self.alpha * classification + (1 - self.alpha) * efficiency
        if self.guidance is None:
            zero = torch.zeros_like(total)
            return LossParts(total, classification, efficiency, zero, zero)
        inner, self_supervision = self.guidance.parts(output, targets)
        beta = self.guidance.beta
        total = total + beta * inner + (1 - beta) * self_supervision
        return LossParts(total, classification, efficiency, inner, self_supervision)

    def extra_repr(self) -> str:
        """Show the weight."""
        return f"alpha={self.alpha:g}"


def _weight(name: str, value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise DynskipError(f"{name}={value} is out of range; it balances two losses and lies in [0, 1].")
    return value


def _check_table(stages: int, output: SkipOutput) -> None:
    if output.num_stages != stages:
        raise DynskipError(
            f"The cost table has {stages} stages and the output {output.num_stages}; measure a table for this model."
        )


def _inner(output: SkipOutput) -> Tensor:
    if output.inner_logits is None:
        raise DynskipError(
            "This loss reads inner classifiers, and the output has none. Build the model with `inner=[...]`, and "
            "take the output of a training pass or of `decide`; the skipping pass leaves inner classifiers out."
        )
    return output.inner_logits


def _check_targets(targets: Tensor, batch: int, classes: int) -> None:
    if targets.shape != (batch,) or targets.is_floating_point():
        raise DynskipError(
            f"Targets must be {batch} class indices of shape (B,), integer; got {tuple(targets.shape)} {targets.dtype}."
        )
    if targets.device.type == "cpu" and batch and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise DynskipError(
            f"Targets range from {int(targets.min())} to {int(targets.max())}, and the model has {classes} classes "
            f"(0 to {classes - 1}). Build the model with as many classes as the labels have."
        )
