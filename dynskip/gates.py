"""Gates decide, after each stage, whether a frame stops or goes forward.

A gate is any `nn.Module` with `initial_state(batch) -> state` and `forward(pooled, state) -> (logits, state)`. A state
is a tuple of tensors with the batch in dimension 0; its first tensor is the gate's hidden representation, which an
`InnerClassifier` may read (`hidden_features` wide). The wrapper, not the gate, decides which rows keep a new state.

A gate with `repeats_last = True` stops frames that show what the last used frame showed: they count as that frame once
more in the video's mean. Frames that other gates stop do not count.

A gate may also have `embed(pooled) -> (B, E)`, its work that no state has a part in, and `step(embedded, state)`, the
rest; `forward` is then one after the other. Stored videos have whole batches of frames embedded, each once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynskip.errors import DynskipError
from dynskip.inner import InnerClassifier

GateState = tuple[Tensor, ...]
Step: TypeAlias = Callable[[Tensor, GateState], tuple[Tensor, GateState]]
STOP, FORWARD = 0, 1
TINY = 1e-12  # keeps logarithms and quotients finite


class Gate(Protocol):
    """What the wrapper asks of a gate."""

    def initial_state(self, batch: int) -> GateState:
        """Return the state before the first frame, for `batch` videos."""

    def __call__(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Map `(B, C_n)` pooled features and a state to `(B, 2)` logits (stop, forward) and the next state."""


class PolicyGate(nn.Module):
    """Learned gate: a projection, a recurrent cell over the frames kept so far, and two logits.

    Args:
        in_features: channels `C_n` of the stage's pooled features.
        hidden: width of the projection and of the hidden state.
        temporal: `"lstm"` remembers earlier frames; `None` puts a fully connected layer in the cell's place (the
            thesis' ablation).
        forward_bias: what the forward logit starts with above the stop logit. Five unbiased gates would let one
            frame in 32 through; at 3.0 each gate starts by forwarding 95 % of the frames.

    Raises:
        DynskipError: if a width is not positive or `temporal` is unknown.

    Reference:
        Thesis Eq. 3.1-3.4.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int = 512,
        temporal: Literal["lstm"] | None = "lstm",
        forward_bias: float = 3.0,
    ) -> None:
        super().__init__()
        _check_widths(in_features=in_features, hidden=hidden)
        if temporal not in ("lstm", None):
            raise DynskipError(f"temporal={temporal!r} is unknown; use 'lstm', or None for a gate without memory.")
        self.in_features = in_features
        self.hidden = self.hidden_features = hidden
        self.temporal = temporal
        self.forward_bias = forward_bias
        self.project = nn.Linear(in_features, hidden)
        # A cell rather than nn.LSTM: it compiles, exports, and its multiply-adds are counted on every device.
        self.cell: Any = nn.LSTMCell(hidden, hidden) if temporal == "lstm" else nn.Linear(hidden, hidden)
        self.decide = _decision(hidden, forward_bias)

    def initial_state(self, batch: int) -> GateState:
        """Return the state before the first frame: zeros.

        Args:
            batch: number of videos.

        Returns:
            Hidden and cell state `(B, hidden)`; without memory, a hidden representation that nothing reads.
        """
        zeros = self.decide.weight.new_zeros(batch, self.hidden_features)
        return (zeros, zeros) if self.temporal == "lstm" else (zeros,)

    def forward(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Decide on one frame a video.

        Args:
            pooled: `(B, C_n)` pooled features.
            state: the state to decide from.

        Returns:
            `(B, 2)` logits (stop, forward), and the state after this frame.
        """
        return self.step(self.embed(pooled), state)

    def embed(self, pooled: Tensor) -> Tensor:
        """Do what does not depend on earlier frames.

        Args:
            pooled: `(B, C_n)` pooled features, in any order.

        Returns:
            `(B, 4 * hidden)` what the cell's own gates get from the frame; without memory, the `(B, hidden)` hidden
            representation.
        """
        x, cell = _linear(pooled, self.project.weight, self.project.bias), self.cell
        if self.temporal == "lstm":
            return _linear(x, cell.weight_ih, cell.bias_ih)
        return _linear(x, cell.weight, cell.bias).relu()

    def step(self, embedded: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Decide on one frame a video from what `embed` made of it.

        Args:
            embedded: what `embed` returned.
            state: the state to decide from.

        Returns:
            As `forward`.
        """
        if self.temporal is None:
            return self.decide(embedded), (embedded,)
        hidden, memory = state
        mixed = embedded + _linear(hidden, self.cell.weight_hh, self.cell.bias_hh)
        take, keep, new, show = mixed.chunk(4, 1)
        memory = keep.sigmoid() * memory + take.sigmoid() * new.tanh()
        hidden = show.sigmoid() * memory.tanh()
        return self.decide(hidden), (hidden, memory)

    def extra_repr(self) -> str:
        """Say what the gate reads and remembers."""
        return f"{self.in_features} -> {self.hidden_features}, temporal={self.temporal!r}"


class LinearGate(nn.Module):
    """Learned gate: two logits straight from the pooled features, without memory.

    Its hidden representation is the frame's pooled features.

    Args:
        in_features: channels `C_n` of the stage's pooled features.
        forward_bias: what the forward logit starts with above the stop logit, see `PolicyGate`.

    Raises:
        DynskipError: if the width is not positive.

    Reference:
        Veit and Belongie, "Convolutional networks with adaptive inference graphs", ECCV 2018, whose gates have a hidden
        layer besides.
    """

    def __init__(self, in_features: int, forward_bias: float = 3.0) -> None:
        super().__init__()
        _check_widths(in_features=in_features)
        self.in_features = self.hidden_features = in_features
        self.forward_bias = forward_bias
        self.decide = _decision(in_features, forward_bias)

    def initial_state(self, batch: int) -> GateState:
        """Return `(B, C_n)` zeros, which nothing reads."""
        return (self.decide.weight.new_zeros(batch, self.hidden_features),)

    def forward(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Decide on one frame a video; see `PolicyGate.forward`."""
        return self.decide(pooled), (pooled,)

    def extra_repr(self) -> str:
        """Say what the gate reads."""
        return f"{self.hidden_features}"


class PairwiseGate(nn.Module):
    """Learned gate over two frames: this one and the last used one, projected by the same layer.

    Its hidden representation is the frame's projection.

    Args:
        in_features: channels `C_n` of the stage's pooled features.
        hidden: width of the projection.
        forward_bias: what the forward logit starts with above the stop logit, see `PolicyGate`.

    Raises:
        DynskipError: if a width is not positive.

    Reference:
        After Ghodrati et al., "FrameExit: conditional early exiting for efficient video recognition", CVPR 2021, whose
        gates see a frame beside what was gathered before it.
    """

    def __init__(self, in_features: int, hidden: int = 64, forward_bias: float = 3.0) -> None:
        super().__init__()
        _check_widths(in_features=in_features, hidden=hidden)
        self.in_features = in_features
        self.hidden_features = hidden
        self.hidden = hidden
        self.forward_bias = forward_bias
        self.project = nn.Linear(in_features, hidden)
        self.decide = _decision(2 * hidden, forward_bias)

    def initial_state(self, batch: int) -> GateState:
        """Return `(B, hidden)` zeros in the place of a last used frame."""
        return (self.decide.weight.new_zeros(batch, self.hidden_features),)

    def forward(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Decide on one frame a video; see `PolicyGate.forward`."""
        hidden = self.project(pooled).relu()
        return self.decide(torch.cat([hidden, state[0].to(hidden.dtype)], 1)), (hidden,)

    def extra_repr(self) -> str:
        """Say what the gate reads and remembers."""
        return f"{self.in_features} -> 2 x {self.hidden_features}"


class SimilarityGate(nn.Module):
    """Stop frames that barely differ from the last used one. Needs no training, so it works on any finished model.

    The distance of pooled features is `|x - y| / (|x| + |y|)`: 0 for equal frames, at most 1. A frame stops up to
    `threshold`; the first frame has nothing before it and counts as 1. The forward probability is
    `distance / (distance + threshold)`.

    A frame that it stops counts as the last used one once more in the video's mean (`repeats_last`): a shot that stands
    still weighs as much as it lasts. With `state_update="reached"` the gate compares with the last frame that reached
    it, and stopped frames do not count.

    Its hidden representation is the frame's pooled features.

    Args:
        in_features: channels `C_n` of the stage's pooled features.
        threshold: largest distance that stops a frame, in (0, 1). Deeper stages need larger ones.

    Raises:
        DynskipError: if the width is not positive or the threshold out of range.
    """

    origin: Tensor
    repeats_last = True

    def __init__(self, in_features: int, threshold: float = 0.01) -> None:
        super().__init__()
        _check_widths(in_features=in_features)
        self.in_features = self.hidden_features = in_features
        self.threshold = _between(threshold, "threshold", "distances are 0 for equal frames and at most 1")
        # What the first frame is compared with; it also knows the device and dtype.
        self.register_buffer("origin", torch.zeros(in_features), persistent=False)

    def initial_state(self, batch: int) -> GateState:
        """Return `(B, C_n)` zeros, at distance 1 from any frame."""
        return (self.origin.repeat(batch, 1),)

    def forward(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Decide on one frame a video; see `PolicyGate.forward`."""
        x, last = _precise(pooled), _precise(state[0])
        distance = _norm(x - last) / (_norm(x) + _norm(last)).clamp(min=TINY)
        return _logarithms(distance, self.threshold).to(pooled.dtype), (pooled,)

    def extra_repr(self) -> str:
        """Show the rule."""
        return f"{self.hidden_features}, stop at distance <= {self.threshold}"


class ConfidenceGate(nn.Module):
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

    def __init__(
        self, in_features: int, num_classes: int, threshold: float = 0.9, stop: Literal["sure", "unsure"] = "sure"
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise DynskipError(f"num_classes={num_classes}: being sure of a class takes at least two classes.")
        if stop not in ("sure", "unsure"):
            raise DynskipError(f"stop={stop!r} is unknown; use 'sure' or 'unsure', the frames that are to stop.")
        self.threshold = _between(threshold, "threshold", f"the {self.measure} lies between them")
        self.stop = stop
        self.in_features = in_features
        self.num_classes = self.hidden_features = num_classes
        self.classifier = InnerClassifier(in_features, num_classes)

    def initial_state(self, batch: int) -> GateState:
        """Return `(B, K)` zeros, which nothing reads."""
        return (next(self.classifier.parameters()).new_zeros(batch, self.hidden_features),)

    def forward(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Decide on one frame a video; see `PolicyGate.forward`."""
        answer = self.classifier(pooled)
        logits = self.stop_if_sure(_precise(answer.detach())).to(answer.dtype)
        return logits if self.stop == "sure" else logits.flip(1), (answer,)

    def stop_if_sure(self, answer: Tensor) -> Tensor:
        """Return the `(B, 2)` logits of a gate that stops from the threshold on."""
        top, index = answer.max(1)
        others = answer.scatter(1, index[:, None], -math.inf).logsumexp(1)
        # Logarithms of odds, taken from the logits: a probability rounds to 1.
        return torch.stack([top - others, torch.full_like(top, _logit(self.threshold))], 1)

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


class FixedGate(nn.Module):
    """Forward every frame, or stop every frame, whatever the frame and the model's `forward_threshold`.

    For stages that are to have no say: `FixedGate()` after all stages but the first leaves the first gate alone in
    charge. It has no state and no hidden representation.

    Args:
        stop: whether frames stop; they go forward by default.
    """

    verdict: Tensor

    def __init__(self, stop: bool = False) -> None:
        super().__init__()
        self.stop = stop
        self.register_buffer("verdict", torch.tensor([50.0, -50.0] if stop else [-50.0, 50.0]), persistent=False)

    def initial_state(self, batch: int) -> GateState:
        """Return no tensors."""
        return ()

    def forward(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Decide on one frame a video; see `PolicyGate.forward`."""
        return self.verdict.expand(pooled.shape[0], 2), state

    def extra_repr(self) -> str:
        """Show the rule."""
        return "stop" if self.stop else "forward"


class RandomGate(nn.Module):
    """Forward a given share of the frames, at random: the baseline that a gate has to beat.

    A frame's draw depends on the frame and on how many frames of its video moved the state before it, on nothing else:
    the same video gets the same draws alone, in any batch and in any window. A frame that equals the one before it
    shares its fate until the state moves. `seed` and width decide how draws of two gates differ.

    Its state is its place in a sequence of numbers; there is nothing in it for an inner classifier.

    Args:
        in_features: channels `C_n` of the stage's pooled features.
        rate: share of the frames that reach the gate which it forwards, in (0, 1).
        seed: draws of gates with other seeds are others.

    Raises:
        DynskipError: if the width is not positive or the rate out of range.
    """

    direction: Tensor

    def __init__(self, in_features: int, rate: float, seed: int = 0) -> None:
        super().__init__()
        _check_widths(in_features=in_features)
        self.rate = _between(rate, "rate", "it is a share of frames; FixedGate forwards all or none")
        self.in_features = in_features
        self.seed = seed
        self.hidden_features = 1
        direction = torch.randn(in_features, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("direction", direction)

    def initial_state(self, batch: int) -> GateState:
        """Return the first place, `(B, 1)` zeros."""
        return (self.direction.new_zeros(batch, 1),)

    def forward(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Decide on one frame a video; see `PolicyGate.forward`."""
        x, place = _precise(pooled), _precise(state[0])
        projection = (x * self.direction).sum(1) / _norm(x).clamp(min=TINY)
        # Large enough a factor that frames of one video fall anywhere, small enough that rounding moves no draw.
        draw = torch.remainder(100 * projection + place[:, 0], 1.0).clamp(1e-6, 1 - 1e-6)
        logits = torch.stack([draw.logit(), torch.full_like(draw, _logit(self.rate))], 1)
        golden = (math.sqrt(5) - 1) / 2  # its multiples cover [0, 1) evenly
        return logits.to(pooled.dtype), (torch.remainder(place + golden, 1.0),)

    def extra_repr(self) -> str:
        """Show the rule."""
        return f"forward {self.rate:.0%} of the frames"


def in_two(gate: Any) -> tuple[Callable[[Tensor], Tensor], Step]:
    """Split a gate into what no state has a part in, and the rest; all of it is the rest where it does not say.

    Args:
        gate: the gate.

    Returns:
        `embed` and `step`, which one after the other are the gate.
    """
    classes = type(gate).__mro__
    levels = {
        name: i for i, c in reversed([*enumerate(classes)]) for name in ("forward", "embed", "step") if name in vars(c)
    }
    # A subclass with a `forward` of its own means that one, and hooks wait for it, too.
    if len(levels) < 3 or levels["forward"] < max(levels.values()) or gate._forward_hooks or gate._forward_pre_hooks:
        return lambda pooled: pooled, gate
    return gate.embed, gate.step


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Do what `F.linear` does; for few rows on a CPU, at the speed at which memory gives the weights.

    There `F.linear` reads weights at a third of that speed or less, and reading them is nearly all that a gate costs.
    """
    if (
        torch.compiler.is_compiling()  # compilers and exporters have kernels of their own
        or torch.is_grad_enabled()
        or x.device.type != "cpu"
        or not 0 < x.shape[0] <= 4
        or weight.shape[0] % 2
    ):
        return F.linear(x, weight, bias)
    columns = x.flatten().view(x.shape).t()  # a single row may have odd strides, which take a slow path
    return torch.bmm(weight.unflatten(0, (2, -1)), columns.expand(2, -1, -1)).flatten(0, 1).t() + bias


def exponential_temperature(epoch: float, initial: float = 5.0, decay: float = 0.045) -> float:
    """Anneal the temperature of the Gumbel-softmax: `initial * exp(-decay * epoch)`.

    Args:
        epoch: epochs of gate training so far.
        initial: temperature at epoch 0.
        decay: rate an epoch.

    Returns:
        The temperature.

    Reference:
        Thesis section 4.2; Jang et al., "Categorical reparameterization with Gumbel-softmax", ICLR 2017.
    """
    return initial * math.exp(-decay * epoch)


def _check_widths(**widths: int) -> None:
    if min(widths.values()) < 1:
        given = ", ".join(f"{name}={width}" for name, width in widths.items())
        raise DynskipError(f"Gate widths must be positive; got {given}.")


def _between(value: float, name: str, why: str) -> float:
    if not 0.0 < value < 1.0:
        raise DynskipError(f"{name}={value} is out of range; give a number between 0 and 1: {why}.")
    return value


def _decision(in_features: int, forward_bias: float) -> nn.Linear:
    layer = nn.Linear(in_features, 2)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([0.0, forward_bias]))
    return layer


def _precise(x: Tensor) -> Tensor:
    """Squares and exponentials overflow in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norm(x: Tensor) -> Tensor:
    return x.square().sum(1).sqrt()


def _logit(probability: float) -> float:
    return math.log(probability) - math.log1p(-probability)


def _logarithms(value: Tensor, threshold: float) -> Tensor:
    """Return `(B, 2)` logits with the forward probability `value / (value + threshold)`."""
    return torch.stack([torch.full_like(value, threshold), value.clamp(min=TINY)], 1).log()
