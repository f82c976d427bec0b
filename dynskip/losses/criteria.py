"""Criteria over a model's output: thin modules over `functional`, which says what targets are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dynskip.losses.functional as functional
from dynskip._check import Checked, check_positive, check_share, check_weight
from dynskip.errors import DynskipError
from dynskip.flops import FLOPsLookup
from dynskip.gates import FORWARD, STOP
from dynskip.output import SkipOutput


class ClassificationLoss(nn.Module):
    """Cross-entropy of the videos' predictions (Eq. 3.9); with a sigmoid, the mean over classes of each one's."""

    def forward(self, output: SkipOutput, targets: Tensor) -> Tensor:
        """Return the scalar loss of an output against `(B,)` class indices or `(B, K)` rows."""
        return functional.classification_loss(output.logits, targets, output.activation)


class AnytimeLoss(Checked):
    """Train a network to answer well from all frames and from parts of them: `L_all + weight (L_set + L_first) / 2`.

    Cross-entropies of the mean over all frames, over a random set of them, and over the first ones; any number of
    frames is equally likely. It trains backbones without gates, `model(video, dense=True)`, so that gates and early
    termination may then leave frames out. The mean is that of logits, whatever the model's consensus. A skipping pass
    lacks logits of frames, and its loss is NaN.

    Args:
        weight: of the parts, 0 or more; 0 leaves the cross-entropy of all frames.

    Raises:
        DynskipError: if the weight is out of range.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def check_setting(self, name: str, value: Any) -> Any:
        """Refuse a weight out of range."""
        return check_weight(value, name) if name == "weight" else super().check_setting(name, value)

    def forward(self, output: SkipOutput, targets: Tensor) -> Tensor:
        """Return the scalar loss of an output against `(B,)` class indices or `(B, K)` rows."""
        return functional.anytime_loss(output.frame_logits, targets, output.activation, output.lengths, self.weight)

    def extra_repr(self) -> str:
        """Show the weight."""
        return f"weight={self.weight:g}"


class EfficiencyLoss(nn.Module):
    """Mean remaining cost at the gates that forward (Eq. 3.11).

    Args:
        lookup: the cost table. MACs are scaled to GMACs, as in the thesis; other units are taken as they are. It is
            read once: make the loss anew after a change of the model's layers.
        normalize: divide by the cost of a whole frame instead, so that a weight also suits other backbones.

    Raises:
        DynskipError: if the table has unknown costs.

    Reference:
        Thesis Eq. 3.10-3.11.
    """

    remaining: Tensor

    def __init__(self, lookup: FLOPsLookup, normalize: bool = False) -> None:
        super().__init__()
        scale, self.unit = (1e9, "GMACs") if lookup.unit == "MACs" else (1.0, lookup.unit)
        check_known(lookup)
        if normalize:
            scale, self.unit = lookup.total, "of a whole frame"
        self.register_buffer("remaining", (lookup.remaining / scale).float(), persistent=False)

    def forward(self, output: SkipOutput) -> Tensor:
        """Return the scalar loss of an output."""
        check_table(len(self.remaining), output)
        return functional.efficiency_loss(output.forward, self.remaining, output.weights)

    def extra_repr(self) -> str:
        """Show what forwarding at each gate may cost."""
        return f"remaining {', '.join(f'{cost:.4g}' for cost in self.remaining.tolist())} {self.unit}"


class InnerClassificationLoss(nn.Module):
    """Cross-entropy of the inner classifiers where their gate forwarded (Eq. 3.13)."""

    def forward(self, output: SkipOutput, targets: Tensor) -> Tensor:
        """Return the scalar loss of an output against `(B,)` class indices or `(B, K)` rows."""
        inner = _inner(output)
        answered = ~inner.isnan().any(-1)  # a stage of an `EarlyExit` without an exit has no answer
        return functional.inner_classification_loss(inner, output.forward * answered, targets, output.activation)


class SelfSupervisionLoss(nn.Module):
    """Teach gates to forward where the next inner classifier is more confident of the truth (Eq. 3.14-3.15).

    Args:
        supervise_last: also teach the last gate, by comparing its inner classifier with the network's head (the thesis
            leaves it out).
    """

    def __init__(self, supervise_last: bool = False) -> None:
        super().__init__()
        self.supervise_last = supervise_last

    def forward(self, output: SkipOutput, targets: Tensor) -> Tensor:
        """Return the scalar loss of an output against `(B,)` class indices or `(B, K)` rows."""
        final = output.frame_logits if self.supervise_last else None
        labels = functional.self_supervision_targets(_inner(output), targets, final, output.activation)
        taught = labels.shape[2]
        if taught == 0:
            raise DynskipError("Self-supervision compares each gate with the next one; it needs at least two gates.")
        assert output.gate_logits is not None  # an output with inner logits has them
        margins = output.gate_logits[..., FORWARD] - output.gate_logits[..., STOP]
        ran = torch.cat([output.evaluated, ~output.frame_logits.isnan().any(-1, keepdim=True)], -1)
        mask = ran[..., :-1] & ran[..., 1:]
        return functional.self_supervision_loss(margins[..., :taught], labels, mask[..., :taught], output.weights)

    def extra_repr(self) -> str:
        """Show the option."""
        return f"supervise_last={self.supervise_last}"


class PolicyGuidanceLoss(Checked):
    """`beta` times inner classification plus `1 - beta` times self-supervision (Eq. 3.12).

    Args:
        beta: weight in [0, 1]; 0.9 in the thesis.
        self_supervision: the second term; `SelfSupervisionLoss()` by default.

    Raises:
        DynskipError: if `beta` is out of range.
    """

    def __init__(self, beta: float = 0.9, self_supervision: SelfSupervisionLoss | None = None) -> None:
        super().__init__()
        self.beta = beta
        self.inner = InnerClassificationLoss()
        self.self_supervision = self_supervision or SelfSupervisionLoss()

    def check_setting(self, name: str, value: Any) -> Any:
        """Refuse a weight out of range."""
        return check_share(value, name) if name == "beta" else super().check_setting(name, value)

    def parts(self, output: SkipOutput, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inner classification and the self-supervision loss, unweighted."""
        return self.inner(output, targets), self.self_supervision(output, targets)

    def forward(self, output: SkipOutput, targets: Tensor) -> Tensor:
        """Return the scalar loss of an output against `(B,)` class indices or `(B, K)` rows."""
        inner, self_supervision = self.parts(output, targets)
        return self.beta * inner + (1 - self.beta) * self_supervision

    def extra_repr(self) -> str:
        """Show the weight."""
        return f"beta={self.beta:g}"


class TargetRateLoss(Checked):
    """Keep each gate's forward rate near a target (ConvNet-AIG).

    Args:
        target: wanted share of frames that a gate forwards, in [0, 1]; one number for all gates, or one a gate.

    Raises:
        DynskipError: if a target is out of range.

    Reference:
        Veit and Belongie, "Convolutional networks with adaptive inference graphs", ECCV 2018.
    """

    target: Tensor

    def __init__(self, target: float | Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("target", self.check_setting("target", target), persistent=False)

    def check_setting(self, name: str, value: Any) -> Any:
        """Refuse targets out of range; return them as a tensor."""
        if name == "target" and not isinstance(value, Tensor):
            targets = value if isinstance(value, Sequence) and value else (value,)
            value = torch.tensor([check_share(each, name) for each in targets], dtype=torch.float64)
        return super().check_setting(name, value)

    def forward(self, output: SkipOutput) -> Tensor:
        """Return the scalar loss of an output."""
        if len(self.target) not in (1, output.num_stages):
            raise DynskipError(
                f"Got {len(self.target)} target rates for {output.num_stages} gates; give one number or one a gate."
            )
        return functional.target_rate_loss(output.forward, self.target, output.weights)

    def extra_repr(self) -> str:
        """Show the targets."""
        return f"target={', '.join(f'{t:g}' for t in self.target.tolist())}"


class UsageUniformityLoss(nn.Module):
    """Keep all outcomes of a frame (stopped by each gate, used) equally frequent, so that none disappears (AR-Net).

    Reference:
        Meng et al., "AR-Net: adaptive frame resolution for efficient action recognition", ECCV 2020.
    """

    def forward(self, output: SkipOutput) -> Tensor:
        """Return the scalar loss of an output."""
        return functional.usage_uniformity_loss(output.forward, output.weights)


class BudgetLoss(Checked):
    """Penalise cost above a budget, and nothing below it.

    Args:
        lookup: the cost table, read once as in `EfficiencyLoss`.
        budget: what a frame may cost on average, as a share of the dense network's, in (0, 1].

    Raises:
        DynskipError: if the budget is out of range, or the table has unknown costs.

    Reference:
        After Verelst and Tuytelaars, "Dynamic convolutions", CVPR 2020.
    """

    costs: Tensor

    def __init__(self, lookup: FLOPsLookup, budget: float) -> None:
        super().__init__()
        check_known(lookup)
        self.budget = budget
        self.head = lookup.head / lookup.dense
        self.register_buffer("costs", (lookup.per_stage + lookup.gates) / lookup.dense, persistent=False)

    def check_setting(self, name: str, value: Any) -> Any:
        """Refuse a budget out of range."""
        if name == "budget" and not (isinstance(value, int | float) and 0.0 < value <= 1.0):
            raise DynskipError(f"budget={value} is out of range; give a share of the dense network's cost in (0, 1].")
        return super().check_setting(name, value)

    def forward(self, output: SkipOutput) -> Tensor:
        """Return the scalar loss of an output: the share of the dense network's cost above the budget."""
        check_table(len(self.costs), output)
        return functional.budget_loss(output.forward, self.costs, self.head, self.budget, output.weights)

    def extra_repr(self) -> str:
        """Show the budget."""
        return f"budget={self.budget:g} of the dense cost"


class DistillationLoss(Checked):
    """Teach inner classifiers to answer as the head does, wherever both ran. Needs no labels.

    Args:
        temperature: softens both answers; positive and finite.

    Raises:
        DynskipError: if the temperature is not positive or not finite.

    Reference:
        Phuong and Lampert, "Distillation-based training for multi-exit architectures", ICCV 2019.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def check_setting(self, name: str, value: Any) -> Any:
        """Refuse a temperature that is not positive and finite."""
        return check_positive(value, name) if name == "temperature" else super().check_setting(name, value)

    def forward(self, output: SkipOutput) -> Tensor:
        """Return the scalar loss of an output."""
        inner, final = _inner(output), output.frame_logits
        ran = ~(inner.isnan().any(-1) | final.isnan().any(-1)[..., None])
        return functional.distillation_loss(inner, final, self.temperature, ran, output.activation, output.weights)

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
        all_frames: cross-entropy of the mean over all frames; 0 without a weight for it, as in the thesis.
    """

    total: Tensor
    classification: Tensor
    efficiency: Tensor
    inner: Tensor
    self_supervision: Tensor
    all_frames: Tensor

    def __repr__(self) -> str:
        """Show only the numbers."""
        return f"LossParts({', '.join(f'{name}={float(value.detach()):.4g}' for name, value in vars(self).items())})"


torch.export.register_dataclass(LossParts)  # for wrappers of modules, see `dynskip.output`


class SoFLoss(Checked):
    """The whole loss of SoF-Net: `alpha L_cls + (1 - alpha) L_eff + L_pg` (Eq. 3.8), and `all_frames L_all` if wished.

    Args:
        lookup: the cost table for `EfficiencyLoss`.
        alpha: weight of classification, in [0, 1]; efficiency has the rest. 0.9 in the thesis.
        beta: weight of inner classification, in [0, 1]; self-supervision has the rest. 0.9 in the thesis. `None` leaves
            the guidance out (the ablation), and needs no inner classifiers.
        normalize: as in `EfficiencyLoss`.
        all_frames: weight of `L_all`, the cross-entropy of the mean over all frames, used or not; 0 or more. The thesis
            has 0. Where the backbone is trained, too, frames that stop teach it nothing otherwise.

    Raises:
        DynskipError: if a weight is out of range.
    """

    def __init__(
        self,
        lookup: FLOPsLookup,
        alpha: float = 0.9,
        beta: float | None = 0.9,
        normalize: bool = False,
        all_frames: float = 0.0,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.all_frames = all_frames
        self.classification = ClassificationLoss()
        self.efficiency = EfficiencyLoss(lookup, normalize)
        self.guidance = PolicyGuidanceLoss(beta) if beta is not None else None

    def check_setting(self, name: str, value: Any) -> Any:
        """Refuse a weight out of range."""
        if name == "all_frames":
            return check_weight(value, name)
        return check_share(value, name) if name == "alpha" else super().check_setting(name, value)

    def forward(self, output: SkipOutput, targets: Tensor) -> LossParts:
        """Return the total and its parts for an output against `(B,)` class indices or `(B, K)` rows."""
        classification, efficiency = self.classification(output, targets), self.efficiency(output)
        total = self.alpha * classification + (1 - self.alpha) * efficiency
        inner = self_supervision = all_frames = torch.zeros_like(total)
        if self.guidance is not None:
            inner, self_supervision = self.guidance.parts(output, targets)
            total = total + self.guidance.beta * inner + (1 - self.guidance.beta) * self_supervision
        if self.all_frames:
            ran = ~output.frame_logits.isnan().any(-1)  # all of them in training
            all_frames = functional.frames_loss(output.frame_logits, ran, targets, output.activation)
            total = total + self.all_frames * all_frames
        return LossParts(total, classification, efficiency, inner, self_supervision, all_frames)

    def extra_repr(self) -> str:
        """Show the weights."""
        return f"alpha={self.alpha:g}, all_frames={self.all_frames:g}"


def check_known(lookup: FLOPsLookup) -> None:
    """Refuse a table with unknown costs."""
    if math.isnan(lookup.total):
        raise DynskipError(
            f"The cost table has unknown costs, and the loss would be NaN: {lookup}. Fill them in: FLOPsLookup([...])."
        )


def check_table(stages: int, output: SkipOutput) -> None:
    """Refuse an output of a model with another number of stages."""
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
