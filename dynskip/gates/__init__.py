"""Gates decide, after each stage, whether a frame stops or goes forward."""

from dynskip.gates.base import FORWARD, STOP, Gate, GateParts, GateState, Step, logit, parts_of
from dynskip.gates.learned import LinearGate, PairwiseGate, PolicyGate, exponential_temperature
from dynskip.gates.rules import ConfidenceGate, EntropyGate, FixedGate, RandomGate, SimilarityGate

__all__ = [
    "FORWARD",
    "STOP",
    "ConfidenceGate",
    "EntropyGate",
    "FixedGate",
    "Gate",
    "GateParts",
    "GateState",
    "LinearGate",
    "PairwiseGate",
    "PolicyGate",
    "RandomGate",
    "SimilarityGate",
    "Step",
    "exponential_temperature",
    "logit",
    "parts_of",
]
