"""Dynamic inference for PyTorch vision models: spend less compute on frames that do not deserve it."""

from dynskip.backbone import Carry, StagedBackbone, stage_model
from dynskip.errors import DynskipError
from dynskip.flops import FLOPsLookup
from dynskip.gates import PolicyGate, exponential_temperature
from dynskip.inner import InnerClassifier
from dynskip.losses import (
    ClassificationLoss,
    EfficiencyLoss,
    InnerClassificationLoss,
    LossParts,
    PolicyGuidanceLoss,
    SelfSupervisionLoss,
    SoFLoss,
)
from dynskip.output import UNSEEN, EncodedVideo, SkipOutput
from dynskip.sofnet import sofnet
from dynskip.terminate import EarlyTerminator
from dynskip.wrapper import StopOrForward

__version__ = "0.1.0"

__all__ = [
    "UNSEEN",
    "Carry",
    "ClassificationLoss",
    "DynskipError",
    "EarlyTerminator",
    "EfficiencyLoss",
    "EncodedVideo",
    "FLOPsLookup",
    "InnerClassificationLoss",
    "InnerClassifier",
    "LossParts",
    "PolicyGate",
    "PolicyGuidanceLoss",
    "SelfSupervisionLoss",
    "SkipOutput",
    "SoFLoss",
    "StagedBackbone",
    "StopOrForward",
    "exponential_temperature",
    "sofnet",
    "stage_model",
]
