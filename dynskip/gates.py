"""Gates decide, after each stage, whether a frame stops or goes forward.

A gate is any `nn.Module` with `initial_state(batch) -> state` and `forward(pooled, state) -> (logits, state)`. A state
is a tuple of tensors with the batch in dimension 0; its first tensor is the gate's hidden representation, which an
`InnerClassifier` may read (`hidden_features` wide). The wrapper, not the gate, decides which rows keep a new state.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from dynskip.errors import DynskipError

GateState = tuple[Tensor, ...]
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
        self.cell = nn.LSTMCell(hidden, hidden) if temporal == "lstm" else nn.Linear(hidden, hidden)
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
        x = self.project(pooled)
        new = self.cell(x, state) if self.temporal == "lstm" else (self.cell(x).relu(),)
        return self.decide(new[0]), new

    def extra_repr(self) -> str:
        """Say what the gate reads and remembers."""
        return f"{self.in_features} -> {self.hidden_features}, temporal={self.temporal!r}"


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
