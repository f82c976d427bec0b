"""Gates decide, after each stage, whether a frame stops or goes forward.

A gate is any `nn.Module` with `initial_state(batch) -> state` and `forward(pooled, state) -> (logits, state)`. A state
is a tuple of tensors with the batch in dimension 0; its first tensor is the gate's hidden representation, which an
`InnerClassifier` may read (`hidden_features` wide). The wrapper, not the gate, decides which rows keep a new state.

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

GateState = tuple[Tensor, ...]
Step: TypeAlias = Callable[[Tensor, GateState], tuple[Tensor, GateState]]
STOP, FORWARD = 0, 1


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
        if in_features < 1 or hidden < 1:
            raise DynskipError(f"Gate widths must be positive; got in_features={in_features}, hidden={hidden}.")
        if temporal not in ("lstm", None):
            raise DynskipError(f"temporal={temporal!r} is unknown; use 'lstm', or None for a gate without memory.")
        self.in_features = in_features
        self.hidden_features = hidden
        self.temporal = temporal
        self.project = nn.Linear(in_features, hidden)
        # A cell rather than nn.LSTM: it compiles, exports, and its multiply-adds are counted on every device.
        self.cell: Any = nn.LSTMCell(hidden, hidden) if temporal == "lstm" else nn.Linear(hidden, hidden)
        self.decide = nn.Linear(hidden, 2)
        with torch.no_grad():
            self.decide.bias.copy_(torch.tensor([0.0, forward_bias]))

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
