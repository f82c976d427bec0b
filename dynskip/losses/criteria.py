"""Criteria over a wrapper's output: thin modules over the functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynskip.errors import DynskipError
from dynskip.flops import FLOPsLookup
from dynskip.gates import FORWARD, STOP
from dynskip.losses.functional import (
    budget_loss,
    classification_loss,
    distillation_loss,
    efficiency_loss,
    inner_classification_loss,
    self_supervision_loss,
    self_supervision_targets,
    target_rate_loss,
    usage_uniformity_loss,
)
from dynskip.output import SkipOutput


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
        inner = _inner(output)
        answered = ~inner.isnan().any(-1)  # a stage of an `EarlyExit` without an exit has no answer
        return inner_classification_loss(inner, output.forward * answered, targets)


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
        temperature: softens both answers; positive and finite.

    Raises:
        DynskipError: if the temperature is not positive or not finite.

    Reference:
        Phuong and Lampert, "Distillation-based training for multi-exit architectures", ICCV 2019.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not 0.0 < temperature < math.inf:
            raise DynskipError(
                f"temperature={temperature} is not positive and finite; 1 leaves the answers as they are."
            )
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
