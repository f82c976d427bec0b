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
from dynskip.runtime.online import FrameStep, Prediction, Session
from dynskip.runtime.streams import FrameResult, VideoResult
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
    "FrameResult",
    "FrameStep",
    "InnerClassificationLoss",
    "InnerClassifier",
    "LossParts",
    "PolicyGate",
    "PolicyGuidanceLoss",
    "Prediction",
    "SelfSupervisionLoss",
    "Session",
    "SkipOutput",
    "SoFLoss",
    "StagedBackbone",
    "StopOrForward",
    "VideoResult",
    "exponential_temperature",
    "sofnet",
    "stage_model",
]
