"""Gates that follow a rule and need no training (the confidence gates' classifiers do)."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dynskip.activation import Activation, check_activation
from dynskip.errors import DynskipError
from dynskip.gates.base import Gate, GateState, check_widths, logit
from dynskip.inner import InnerClassifier

TINY = 1e-12  # keeps logarithms and quotients finite


class _Rule(Gate):
    """A gate with one setting, strictly between 0 and 1."""

    setting = "threshold"
    range_reason: str

    def check_setting(self, name: str, value: Any) -> Any:
        if name == self.setting and not (isinstance(value, int | float) and 0.0 < value < 1.0):
            raise DynskipError(f"{name}={value} is out of range; give a number between 0 and 1: {self.range_reason}.")
        return super().check_setting(name, value)


class SimilarityGate(_Rule):
    """Stop frames that barely differ from the last used one. Needs no training, so it works on any finished model.

    The distance of pooled features `x` and `y` is `|x - y| / (|x| + |y|)`: 0 for equal frames, at most 1. A frame stops
    up to `threshold`. The first frame has nothing before it; its distance is 1. The forward probability is
    `distance / (distance + threshold)`.

    A frame that it stops counts as the last used one once more in the video's answer (`repeats_last`), so a still shot
    weighs as much as it lasts. With `state_update="reached"` the gate compares with the last frame that reached it, and
    stopped frames do not count.

    Its hidden representation is the frame's pooled features. Distances are computed in float32. Features in half
    precision have only two to three digits, so a threshold below 0.01 then stops only frames that differ by rounding.

    Args:
        in_features: channels `C_n` of the stage's pooled features.
        threshold: largest distance that stops a frame, in (0, 1). Deeper stages need larger ones.

    Raises:
        DynskipError: if the width is not positive or the threshold out of range.

    Examples:
        >>> gate = SimilarityGate(3, threshold=0.1)
        >>> frame = torch.tensor([[1.0, 2.0, 3.0]])
        >>> logits, state = gate(frame, gate.initial_state(1))
        >>> bool(logits[0, 1] > logits[0, 0])  # the first frame goes forward
        True
        >>> logits, state = gate(frame, state)
        >>> bool(logits[0, 1] > logits[0, 0])  # the same frame again stops
        False
    """

    repeats_last = True
    broadcasts = True
    range_reason = "distances are 0 for equal frames and at most 1"

    def __init__(self, in_features: int, threshold: float = 0.01) -> None:
        check_widths(in_features=in_features)
        super().__init__(in_features)
        self.in_features = in_features
        self.threshold = threshold

    def step(self, embedded: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Compare with the last used frame; see `Gate.step`."""
        # The first frame is compared with zeros, which are at distance 1 from any frame.
        x, last = _precise(embedded), _precise(state[0])
        if x.ndim == 3:
            last = last[:, None]
        distance = _norm(x - last) / (_norm(x) + _norm(last)).clamp(min=TINY)
        return _logarithms(distance, self.threshold), (embedded,)

    def extra_repr(self) -> str:
        """Show the rule."""
        return f"{self.in_features}, stop at distance <= {self.threshold}"


class ConfidenceGate(_Rule):
    """Stop frames of whose class an inner classifier is sure, or those of which it is not.

    Still images leave where the classifier is sure (`EarlyExit`). In a video a stopped frame adds nothing to the
    answer, so there `stop="unsure"` is useful: it leaves out frames that show little. The rule is not trained, but its
    classifier is, see `docs/gates.md`.

    With the measure `"confidence"`, the forward probability is 0.5 at the threshold and moves with the odds of the
    confidence. With `"entropy"` (and `stop="sure"`) it is `entropy / (entropy + threshold)`.

    With `activation="sigmoid"` the classifier is sure once it has decided every class. It can be sure that none holds.

    Its hidden representation is the classifier's `(B, K)` logits. In `StopOrForward`, give `nn.Identity()` as the inner
    classifier to see them as `inner_logits`.

    Args:
        in_features: channels `C_n` of the stage's pooled features.
        num_classes: number of classes `K`, at least 2 for a softmax.
        threshold: confidence or entropy at which the decision changes, in (0, 1); by default 0.9 for confidence and
            0.1 for entropy.
        stop: which frames stop, `"sure"` or `"unsure"` ones. At the threshold itself a frame stops.
        measure: what tells how sure the classifier is. `"confidence"` is the probability of the most probable class;
            with a sigmoid, that of the least certain decision whether a class holds. `"entropy"` is that of the class
            probabilities, divided by the entropy of equal probabilities: 0 where the classifier is sure, 1 where it
            knows nothing; with a sigmoid, the mean over classes of the entropy of "it holds, or not", in bits.
        activation: how the classifier's logits become probabilities; the model's, see `StopOrForward`.

    Attributes:
        classifier: maps pooled features to class logits. Replace it where you have one already.

    Raises:
        DynskipError: if a width is not positive, or an argument out of range.

    Reference:
        Confidence: Huang et al., "Multi-scale dense networks for resource efficient image classification", ICLR 2018.
        Entropy: Teerapittayanon et al., "BranchyNet: fast inference via early exiting from deep neural networks", ICPR
        2016.
    """

    has_memory = False
    range_reason = "confidence and relative entropy lie between them"

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        threshold: float | None = None,
        stop: Literal["sure", "unsure"] = "sure",
        measure: Literal["confidence", "entropy"] = "confidence",
        activation: Activation = "softmax",
    ) -> None:
        super().__init__(num_classes)
        if num_classes < 2 and activation == "softmax":
            raise DynskipError(
                f"num_classes={num_classes}: being sure of a class takes at least two classes, or activation='sigmoid'."
            )
        self.stop = stop
        self.measure = measure
        self.activation: Activation = activation
        self.threshold = {"confidence": 0.9, "entropy": 0.1}[measure] if threshold is None else threshold
        self.in_features = in_features
        self.num_classes = num_classes
        self.classifier = InnerClassifier(in_features, num_classes)

    def check_setting(self, name: str, value: Any) -> Any:
        """Refuse rules, measures and activations that are unknown, and thresholds out of range."""
        if name == "stop" and value not in ("sure", "unsure"):
            raise DynskipError(f"stop={value!r} is unknown; use 'sure' or 'unsure', the frames that are to stop.")
        if name == "measure" and value not in ("confidence", "entropy"):
            raise DynskipError(f"measure={value!r} is unknown; use 'confidence' or 'entropy'.")
        return check_activation(value) if name == "activation" else super().check_setting(name, value)

    def forward(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Decide on one frame a video; see `Gate.forward`."""
        answer = self.classifier(pooled)
        measured = self._entropy if self.measure == "entropy" else self._confidence
        logits = measured(_precise(answer.detach()))
        return logits if self.stop == "sure" else logits.flip(1), (answer,)

    def _confidence(self, answer: Tensor) -> Tensor:
        """Return the `(B, 2)` logits of a gate that stops from the threshold on."""
        # Logarithms of odds, computed from the logits, because a probability rounds to 1.
        if self.activation == "sigmoid":
            odds = answer.abs().amin(1)
        else:
            top, index = answer.max(1)
            odds = top - answer.scatter(1, index[:, None], -math.inf).logsumexp(1)
        return torch.stack([odds, torch.full_like(odds, logit(self.threshold))], 1)

    def _entropy(self, answer: Tensor) -> Tensor:
        """Return the `(B, 2)` logits of a gate that stops up to the threshold."""
        if self.activation == "sigmoid":
            entropy = F.binary_cross_entropy_with_logits(answer, answer.sigmoid(), reduction="none").mean(1)
            most = math.log(2)
        else:
            logarithms = answer.log_softmax(1)
            entropy, most = -(logarithms.exp() * logarithms).sum(1), math.log(self.num_classes)
        return _logarithms(entropy / most, self.threshold)

    def extra_repr(self) -> str:
        """Show the rule."""
        sure = (self.measure == "confidence") == (self.stop == "sure")
        return f"stop at {self.measure} {'>=' if sure else '<='} {self.threshold}"


class EntropyGate(ConfidenceGate):
    """Old name of `ConfidenceGate(..., measure="entropy")`, for one release."""

    def __init__(
        self, in_features: int, num_classes: int, threshold: float = 0.1, stop: Literal["sure", "unsure"] = "sure"
    ) -> None:
        new = 'ConfidenceGate(..., measure="entropy")'
        warnings.warn(f"EntropyGate goes away after this release; use {new}.", DeprecationWarning, stacklevel=2)
        super().__init__(in_features, num_classes, threshold, stop, measure="entropy")


class FixedGate(Gate):
    """Forward every frame, or stop every frame, whatever the frame and the model's `forward_threshold`.

    For stages that are not to decide: with `FixedGate()` after all stages but the first, the first gate decides alone.
    It has no state and no hidden representation.

    Args:
        stop: whether frames stop; they go forward by default.
    """

    verdict: Tensor
    has_memory = False

    def __init__(self, stop: bool = False) -> None:
        super().__init__()
        self.stop = stop
        self.register_buffer("verdict", torch.tensor([50.0, -50.0] if stop else [-50.0, 50.0]), persistent=False)

    def check_setting(self, name: str, value: Any) -> Any:
        """Refuse to become another gate."""
        if name == "stop" and hasattr(self, "stop") and value != self.stop:
            raise DynskipError(f"A FixedGate stays what it was built as; put FixedGate(stop={value}) in its place.")
        return super().check_setting(name, value)

    def forward(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Decide on one frame a video; see `Gate.forward`."""
        return self.verdict.expand(pooled.shape[0], 2), state

    def extra_repr(self) -> str:
        """Show the rule."""
        return "stop" if self.stop else "forward"


class RandomGate(_Rule):
    """Forward a given share of the frames, at random: the baseline that a gate has to beat.

    A frame's draw depends only on its features and on how many frames of its video moved the state before it. So in
    float32 and float64 the same video gets the same draws alone, in any batch and in any window. In half precision the
    features themselves differ between batch sizes, enough to change some draws. A frame that equals the one before it
    gets the same decision until the state moves. Different seeds, and different widths, draw differently.

    Its state is its place in a sequence of numbers. An inner classifier learns nothing from it.

    Args:
        in_features: channels `C_n` of the stage's pooled features.
        rate: share of the frames that reach the gate which it forwards, in (0, 1).
        seed: different seeds draw differently.

    Raises:
        DynskipError: if the width is not positive or the rate out of range.
    """

    direction: Tensor
    setting = "rate"
    range_reason = "it is a share of frames; FixedGate forwards all or none"

    def __init__(self, in_features: int, rate: float, seed: int = 0) -> None:
        check_widths(in_features=in_features)
        super().__init__(hidden_features=1)
        self.rate = rate
        self.in_features = in_features
        self.seed = seed
        self.register_buffer("direction", torch.empty(in_features))
        # On the CPU, so that a seed draws the same on any device.
        self.direction.copy_(torch.randn(in_features, generator=torch.Generator().manual_seed(seed), device="cpu"))

    def forward(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Decide on one frame a video; see `Gate.forward`."""
        x, place = _precise(pooled), _precise(state[0])
        projection = (x * self.direction).sum(1) / _norm(x).clamp(min=TINY)
        # The factor spreads frames of one video over [0, 1), and is too small for rounding to change a draw.
        draw = torch.remainder(100 * projection + place[:, 0], 1.0).clamp(1e-6, 1 - 1e-6)
        logits = torch.stack([draw.logit(), torch.full_like(draw, logit(self.rate))], 1)
        golden = (math.sqrt(5) - 1) / 2  # its multiples cover [0, 1) evenly
        return logits, (torch.remainder(place + golden, 1.0),)

    def extra_repr(self) -> str:
        """Show the rule."""
        return f"forward {self.rate:.0%} of the frames"


def _precise(x: Tensor) -> Tensor:
    """Widen half precision, where squares and exponentials overflow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norm(x: Tensor) -> Tensor:
    return x.square().sum(-1).sqrt()


def _logarithms(value: Tensor, threshold: float) -> Tensor:
    """Return `(..., 2)` logits with the forward probability `value / (value + threshold)`."""
    return torch.stack([torch.full_like(value, threshold), value.clamp(min=TINY)], -1).log()
