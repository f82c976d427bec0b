"""Gates that follow a rule and need no training (the confidence gates' classifiers do)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from dynskip.errors import DynskipError
from dynskip.gates.base import Gate, GateState, between_0_and_1, check_widths, logit
from dynskip.inner import InnerClassifier

TINY = 1e-12  # keeps logarithms and quotients finite


class SimilarityGate(Gate):
    """Stop frames that barely differ from the last used one. Needs no training, so it works on any finished model.

    The distance of pooled features is `|x - y| / (|x| + |y|)`: 0 for equal frames, at most 1. A frame stops up to
    `threshold`; the first frame has nothing before it and counts as 1. The forward probability is
    `distance / (distance + threshold)`.

    A frame that it stops counts as the last used one once more in the video's mean (`repeats_last`): a shot that stands
    still weighs as much as it lasts. With `state_update="reached"` the gate compares with the last frame that reached
    it, and stopped frames do not count.

    Its hidden representation is the frame's pooled features. Distances are computed in float32, but features in half
    precision carry two to three digits: a threshold below 0.01 then stops frames that differ in their rounding alone.

    Args:
        in_features: channels `C_n` of the stage's pooled features.
        threshold: largest distance that stops a frame, in (0, 1). Deeper stages need larger ones.

    Raises:
        DynskipError: if the width is not positive or the threshold out of range.
    """

    origin: Tensor
    repeats_last = True
    broadcasts = True

    def __init__(self, in_features: int, threshold: float = 0.01) -> None:
        super().__init__()
        check_widths(in_features=in_features)
        self.in_features = self.hidden_features = in_features
        self.threshold = threshold
        # What the first frame is compared with; it also knows the device and dtype.
        self.register_buffer("origin", torch.zeros(in_features), persistent=False)

    def initial_state(self, batch: int) -> GateState:
        """Return `(B, C_n)` zeros, at distance 1 from any frame."""
        return (self.origin.repeat(batch, 1),)

    def forward(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Decide on one frame a video; see `Gate.forward`."""
        return self.step(self.embed(pooled), state)

    def embed(self, pooled: Tensor) -> Tensor:
        """Return the features as they are."""
        return pooled

    def step(self, embedded: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Compare with the last used frame; see `PolicyGate.step`."""
        x, last = _precise(embedded), _precise(state[0])
        if x.ndim == 3:
            last = last[:, None]
        distance = _norm(x - last) / (_norm(x) + _norm(last)).clamp(min=TINY)
        return _logarithms(distance, self.threshold), (embedded,)

    def check_setting(self, name: str, value: Any) -> Any:
        """Refuse thresholds that no distance can have."""
        if name == "threshold":
            return between_0_and_1(value, name, "distances are 0 for equal frames and at most 1")
        return super().check_setting(name, value)

    def extra_repr(self) -> str:
        """Show the rule."""
        return f"{self.hidden_features}, stop at distance <= {self.threshold}"


class ConfidenceGate(Gate):
    """Stop frames of whose class an inner classifier is sure, or else those of which it is not.

    Still images leave where they are sure (`EarlyExit`). In a video, where a stopped frame adds nothing to the answer,
    `stop="unsure"` leaves out frames that show little. The rule itself is not trained, its classifier is: see
    `docs/gates.md`. The forward probability is 0.5 at the threshold and moves with the odds of the confidence.

    Its hidden representation is the classifier's `(B, K)` logits: in `StopOrForward`, give `nn.Identity()` as the inner
    classifier to see them as `inner_logits`.

    Args:
        in_features: channels `C_n` of the stage's pooled features.
        num_classes: number of classes `K`, at least 2.
        threshold: probability of the most probable class, in (0, 1).
        stop: `"sure"` stops from the threshold on, `"unsure"` up to it.

    Attributes:
        classifier: maps pooled features to class logits; put another module in its place where you have one.

    Raises:
        DynskipError: if a width is not positive, or an argument out of range.

    Reference:
        Huang et al., "Multi-scale dense networks for resource efficient image classification", ICLR 2018.
    """

    measure = "confidence"
    has_memory = False

    def __init__(
        self, in_features: int, num_classes: int, threshold: float = 0.9, stop: Literal["sure", "unsure"] = "sure"
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise DynskipError(f"num_classes={num_classes}: being sure of a class takes at least two classes.")
        if stop not in ("sure", "unsure"):
            raise DynskipError(f"stop={stop!r} is unknown; use 'sure' or 'unsure', the frames that are to stop.")
        self.threshold = threshold
        self.stop = stop
        self.in_features = in_features
        self.num_classes = self.hidden_features = num_classes
        self.classifier = InnerClassifier(in_features, num_classes)

    def initial_state(self, batch: int) -> GateState:
        """Return `(B, K)` zeros, which nothing reads."""
        return (next(self.classifier.parameters()).new_zeros(batch, self.hidden_features),)

    def forward(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Decide on one frame a video; see `Gate.forward`."""
        answer = self.classifier(pooled)
        logits = self.stop_if_sure(_precise(answer.detach()))
        return logits if self.stop == "sure" else logits.flip(1), (answer,)

    def check_setting(self, name: str, value: Any) -> Any:
        """Refuse thresholds that lie outside what is measured."""
        if name == "threshold":
            return between_0_and_1(value, name, f"the {self.measure} lies between them")
        return super().check_setting(name, value)

    def stop_if_sure(self, answer: Tensor) -> Tensor:
        """Return the `(B, 2)` logits of a gate that stops from the threshold on."""
        top, index = answer.max(1)
        others = answer.scatter(1, index[:, None], -math.inf).logsumexp(1)
        # Logarithms of odds, taken from the logits: a probability rounds to 1.
        return torch.stack([top - others, torch.full_like(top, logit(self.threshold))], 1)

    def extra_repr(self) -> str:
        """Show the rule."""
        sure = (self.measure == "confidence") == (self.stop == "sure")
        return f"stop at {self.measure} {'>=' if sure else '<='} {self.threshold}"


class EntropyGate(ConfidenceGate):
    """As `ConfidenceGate`, with the entropy of the class probabilities as what tells how sure a classifier is.

    Entropy is divided by that of equal probabilities, so it lies between 0, sure, and 1. `stop="sure"` stops up to the
    threshold. The forward probability (for `"sure"`) is `entropy / (entropy + threshold)`.

    Args:
        in_features: channels `C_n` of the stage's pooled features.
        num_classes: number of classes `K`, at least 2.
        threshold: entropy, in (0, 1).
        stop: `"sure"` stops up to the threshold, `"unsure"` from it on.

    Raises:
        DynskipError: if a width is not positive, or an argument out of range.

    Reference:
        Teerapittayanon et al., "BranchyNet: fast inference via early exiting from deep neural networks", ICPR 2016.
    """

    measure = "entropy"

    def __init__(
        self, in_features: int, num_classes: int, threshold: float = 0.1, stop: Literal["sure", "unsure"] = "sure"
    ) -> None:
        super().__init__(in_features, num_classes, threshold, stop)

    def stop_if_sure(self, answer: Tensor) -> Tensor:
        """Return the `(B, 2)` logits of a gate that stops up to the threshold."""
        logarithms = answer.log_softmax(1)
        entropy = -(logarithms.exp() * logarithms).sum(1) / math.log(self.num_classes)
        return _logarithms(entropy, self.threshold)


class FixedGate(Gate):
    """Forward every frame, or stop every frame, whatever the frame and the model's `forward_threshold`.

    For stages that are to have no say: `FixedGate()` after all stages but the first leaves the first gate alone in
    charge. It has no state and no hidden representation.

    Args:
        stop: whether frames stop; they go forward by default.
    """

    verdict: Tensor
    has_memory = False

    def __init__(self, stop: bool = False) -> None:
        super().__init__()
        self.stop = stop
        self.register_buffer("verdict", torch.tensor([50.0, -50.0] if stop else [-50.0, 50.0]), persistent=False)

    def initial_state(self, batch: int) -> GateState:
        """Return no tensors."""
        return ()

    def forward(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Decide on one frame a video; see `Gate.forward`."""
        return self.verdict.expand(pooled.shape[0], 2), state

    def extra_repr(self) -> str:
        """Show the rule."""
        return "stop" if self.stop else "forward"


class RandomGate(Gate):
    """Forward a given share of the frames, at random: the baseline that a gate has to beat.

    A frame's draw depends on its features and on how many frames of its video moved the state before it, on nothing
    else: in float32 and float64, the same video gets the same draws alone, in any batch and in any window. In half
    precision, features differ between batch sizes by more than a draw may, so there some draws differ. A frame that
    equals the one before it shares its fate until the state moves. Different seeds, and different widths, draw
    differently.

    Its state is its place in a sequence of numbers; there is nothing in it for an inner classifier.

    Args:
        in_features: channels `C_n` of the stage's pooled features.
        rate: share of the frames that reach the gate which it forwards, in (0, 1).
        seed: different seeds draw differently.

    Raises:
        DynskipError: if the width is not positive or the rate out of range.
    """

    direction: Tensor

    def __init__(self, in_features: int, rate: float, seed: int = 0) -> None:
        super().__init__()
        check_widths(in_features=in_features)
        self.rate = rate
        self.in_features = in_features
        self.seed = seed
        self.hidden_features = 1
        direction = torch.randn(in_features, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("direction", direction)

    def initial_state(self, batch: int) -> GateState:
        """Return the first place, `(B, 1)` zeros."""
        return (self.direction.new_zeros(batch, 1),)

    def forward(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Decide on one frame a video; see `Gate.forward`."""
        x, place = _precise(pooled), _precise(state[0])
        projection = (x * self.direction).sum(1) / _norm(x).clamp(min=TINY)
        # Large enough a factor that frames of one video fall anywhere, small enough that rounding moves no draw.
        draw = torch.remainder(100 * projection + place[:, 0], 1.0).clamp(1e-6, 1 - 1e-6)
        logits = torch.stack([draw.logit(), torch.full_like(draw, logit(self.rate))], 1)
        golden = (math.sqrt(5) - 1) / 2  # its multiples cover [0, 1) evenly
        return logits, (torch.remainder(place + golden, 1.0),)

    def check_setting(self, name: str, value: Any) -> Any:
        """Refuse rates that are no share."""
        if name == "rate":
            return between_0_and_1(value, name, "it is a share of frames; FixedGate forwards all or none")
        return super().check_setting(name, value)

    def extra_repr(self) -> str:
        """Show the rule."""
        return f"forward {self.rate:.0%} of the frames"


def _precise(x: Tensor) -> Tensor:
    """Squares and exponentials overflow in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norm(x: Tensor) -> Tensor:
    return x.square().sum(-1).sqrt()


def _logarithms(value: Tensor, threshold: float) -> Tensor:
    """Return `(..., 2)` logits with the forward probability `value / (value + threshold)`."""
    return torch.stack([torch.full_like(value, threshold), value.clamp(min=TINY)], -1).log()
