"""Dynamic inference for PyTorch vision models: spend less compute on frames that do not deserve it."""

from dynskip.backbone import Carry, StagedBackbone, stage_model
from dynskip.backbone.glance import glance
from dynskip.consensus import (
    AttentionMean,
    Consensus,
    MaxOfLogits,
    MeanOfLogits,
    MeanOfProbabilities,
    TopKMean,
)
from dynskip.early_exit import EarlyExit
from dynskip.errors import DynskipError
from dynskip.flops import FLOPsLookup
from dynskip.gates import (
    ConfidenceGate,
    EntropyGate,
    FixedGate,
    Gate,
    LinearGate,
    PairwiseGate,
    PolicyGate,
    RandomGate,
    SimilarityGate,
    exponential_temperature,
)
from dynskip.inner import InnerClassifier
from dynskip.lazy import LazyVideo
from dynskip.losses import (
    AnytimeLoss,
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
    WorthLoss,
)
from dynskip.order import CoarseToFine, FrameOrder, RandomOrder
from dynskip.output import EncodedVideo, FrameResult, SkipOutput, VideoResult
from dynskip.rules import UNSEEN
from dynskip.runtime.clip import LookAhead
from dynskip.runtime.counters import StreamCounters
from dynskip.runtime.mailbox import Mailbox
from dynskip.runtime.online import Session
from dynskip.runtime.serving import StreamEnd, StreamServer
from dynskip.sofnet import sofnet
from dynskip.terminate import EarlyTerminator
from dynskip.wrapper import StopOrForward

__version__ = "0.2.0"

__all__ = [
    "UNSEEN",
    "AnytimeLoss",
    "AttentionMean",
    "BudgetLoss",
    "Carry",
    "ClassificationLoss",
    "CoarseToFine",
    "ConfidenceGate",
    "Consensus",
    "DistillationLoss",
    "DynskipError",
    "EarlyExit",
    "EarlyTerminator",
    "EfficiencyLoss",
    "EncodedVideo",
    "EntropyGate",
    "FLOPsLookup",
    "FixedGate",
    "FrameOrder",
    "FrameResult",
    "Gate",
    "InnerClassificationLoss",
    "InnerClassifier",
    "LazyVideo",
    "LinearGate",
    "LookAhead",
    "LossParts",
    "Mailbox",
    "MaxOfLogits",
    "MeanOfLogits",
    "MeanOfProbabilities",
    "PairwiseGate",
    "PolicyGate",
    "PolicyGuidanceLoss",
    "RandomGate",
    "RandomOrder",
    "SelfSupervisionLoss",
    "Session",
    "SimilarityGate",
    "SkipOutput",
    "SoFLoss",
    "StagedBackbone",
    "StopOrForward",
    "StreamCounters",
    "StreamEnd",
    "StreamServer",
    "TargetRateLoss",
    "TopKMean",
    "UsageUniformityLoss",
    "VideoResult",
    "WorthLoss",
    "exponential_temperature",
    "glance",
    "sofnet",
    "stage_model",
]
