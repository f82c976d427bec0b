"""Losses over a model's output: the terms of the thesis' loss, and others."""

from dynskip.losses.criteria import (
    BudgetLoss,
    ClassificationLoss,
    DistillationLoss,
    EfficiencyLoss,
    InnerClassificationLoss,
    LossParts,
    PolicyGuidanceLoss,
    SelfSupervisionLoss,
    SoFLoss,
    TargetRateLoss,
    UsageUniformityLoss,
)
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

__all__ = [
    "BudgetLoss",
    "ClassificationLoss",
    "DistillationLoss",
    "EfficiencyLoss",
    "InnerClassificationLoss",
    "LossParts",
    "PolicyGuidanceLoss",
    "SelfSupervisionLoss",
    "SoFLoss",
    "TargetRateLoss",
    "UsageUniformityLoss",
    "budget_loss",
    "classification_loss",
    "distillation_loss",
    "efficiency_loss",
    "inner_classification_loss",
    "self_supervision_loss",
    "self_supervision_targets",
    "target_rate_loss",
    "usage_uniformity_loss",
]
