"""Learned gates, trained with the losses of `dynskip.losses`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynskip.errors import DynskipError
from dynskip.gates.base import Gate, GateState, Step, check_widths, is_plain


class PolicyGate(Gate):
    """Learned gate: a projection, a recurrent cell over the used frames, and two logits.

    Args:
        in_features: channels `C_n` of the stage's pooled features.
        hidden: width of the projection and of the hidden state.
        temporal: `"lstm"` remembers earlier frames; `None` takes a fully connected layer instead of the cell (the
            thesis' ablation).
        forward_bias: how far the forward logit starts above the stop logit. With 3.0 each gate starts by forwarding
            95 % of the frames. With 0.0, five gates would let one frame in 32 through.

    Raises:
        DynskipError: if a width is not positive or `temporal` is unknown.

    Reference:
        Thesis Eq. 3.1-3.4.

    Examples:
        >>> gate = PolicyGate(64, hidden=16)
        >>> logits, state = gate(torch.zeros(2, 64), gate.initial_state(2))
        >>> logits.softmax(1)[:, 1] > 0.5  # a new gate forwards most frames
        tensor([True, True])
    """

    broadcasts = True

    def __init__(
        self,
        in_features: int,
        hidden: int = 512,
        temporal: Literal["lstm"] | None = "lstm",
        forward_bias: float = 3.0,
    ) -> None:
        check_widths(in_features=in_features, hidden=hidden)
        super().__init__(hidden)
        if temporal not in ("lstm", None):
            raise DynskipError(f"temporal={temporal!r} is unknown; use 'lstm', or None for a gate without memory.")
        self.in_features = in_features
        self.hidden = hidden
        self.temporal = temporal
        self.forward_bias = forward_bias
        self.project = nn.Linear(in_features, hidden)
        # A cell rather than nn.LSTM: it compiles, exports, and its multiply-adds are counted on every device.
        self.cell: Any = nn.LSTMCell(hidden, hidden) if temporal == "lstm" else nn.Linear(hidden, hidden)
        self.decide = _decision(hidden, forward_bias)
        self.has_memory = temporal is not None

    def initial_state(self, batch: int) -> GateState:
        """Return zeros: hidden and cell state `(B, hidden)`; without memory, one `(B, hidden)` that nothing reads."""
        (zeros,) = super().initial_state(batch)
        return (zeros, zeros) if self.temporal == "lstm" else (zeros,)

    def embed(self, pooled: Tensor) -> Tensor:
        """Do what does not depend on earlier frames.

        Args:
            pooled: `(M, C_n)` pooled features, in any order.

        Returns:
            `(M, 4 * hidden)`, the frame's share of the sums in the cell. `(M, hidden)` without memory, and where hooks
            or the like on the cell need a call of the whole cell.
        """
        x = _call(self.project, pooled)
        if self.temporal is None:
            return _call(self.cell, x).relu()
        return _linear(x, self.cell.weight_ih, self.cell.bias_ih) if is_plain(self.cell, nn.LSTMCell) else x

    def step(self, embedded: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Decide from what `embed` returned; see `Gate.step`."""
        if self.temporal is None:
            return self.decide(embedded), (embedded,)
        if not is_plain(self.cell, nn.LSTMCell):
            return self._step_by_calling(embedded, state)
        hidden, memory = state
        mixed = _linear(hidden, self.cell.weight_hh, self.cell.bias_hh)
        if embedded.ndim == 3:
            mixed, memory = mixed[:, None], memory[:, None]
        hidden, memory = _cell(embedded + mixed, memory)
        return self.decide(hidden), (hidden, memory)

    def _step_by_calling(self, embedded: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        if embedded.ndim == 2:
            hidden, memory = self.cell(embedded, state)
            return self.decide(hidden), (hidden, memory)
        batch, frames = embedded.shape[:2]
        repeated = tuple(s.repeat_interleave(frames, 0, output_size=batch * frames) for s in state)
        logits, new = self._step_by_calling(embedded.flatten(0, 1), repeated)
        return logits.unflatten(0, (batch, frames)), tuple(s.unflatten(0, (batch, frames)) for s in new)

    @classmethod
    def step_together(cls, gates: Sequence[Any]) -> Step | None:
        """Return one `step` for several gates, with two batched products for all of them; see `Gate.step_together`."""
        alike = all(type(g) is PolicyGate and g.temporal == "lstm" and g.hidden == gates[0].hidden for g in gates)
        if not alike or not all(is_plain(g.cell, nn.LSTMCell) and is_plain(g.decide, nn.Linear) for g in gates):
            return None
        # Copies cost microseconds on a GPU. They are made anew each time, so they follow changes of the weights.
        weight = torch.stack([g.cell.weight_hh for g in gates]).transpose(1, 2)
        bias = torch.stack([g.cell.bias_hh for g in gates])[:, None]
        decide = torch.stack([g.decide.weight for g in gates]).transpose(1, 2)
        decide_bias = torch.stack([g.decide.bias for g in gates])[:, None]

        def step(embedded: Tensor, state: GateState) -> tuple[Tensor, GateState]:
            hidden, memory = _cell(torch.baddbmm(bias, state[0], weight) + embedded, state[1])
            return torch.baddbmm(decide_bias, hidden, decide), (hidden, memory)

        return step

    def extra_repr(self) -> str:
        """Say what the gate reads and remembers."""
        return f"{self.in_features} -> {self.hidden_features}, temporal={self.temporal!r}"


class LinearGate(Gate):
    """Learned gate without memory: two logits straight from the pooled features.

    Its hidden representation is the frame's pooled features.

    Args:
        in_features: channels `C_n` of the stage's pooled features.
        forward_bias: how far the forward logit starts above the stop logit, see `PolicyGate`.

    Raises:
        DynskipError: if the width is not positive.

    Reference:
        Veit and Belongie, "Convolutional networks with adaptive inference graphs", ECCV 2018. Their gates also have a
        hidden layer.
    """

    has_memory = False

    def __init__(self, in_features: int, forward_bias: float = 3.0) -> None:
        check_widths(in_features=in_features)
        super().__init__(in_features)
        self.in_features = in_features
        self.forward_bias = forward_bias
        self.decide = _decision(in_features, forward_bias)

    def step(self, embedded: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Decide from the features alone; see `Gate.step`."""
        return self.decide(embedded), (embedded,)

    def extra_repr(self) -> str:
        """Say what the gate reads."""
        return f"{self.in_features}"


class PairwiseGate(Gate):
    """Learned gate over two frames: this one and the last used one, projected by the same layer.

    Its hidden representation is the frame's projection.

    Args:
        in_features: channels `C_n` of the stage's pooled features.
        hidden: width of the projection.
        forward_bias: how far the forward logit starts above the stop logit, see `PolicyGate`.

    Raises:
        DynskipError: if a width is not positive.

    Reference:
        After Ghodrati et al., "FrameExit: conditional early exiting for efficient video recognition", CVPR 2021. Their
        gates compare a frame with what was gathered before it.
    """

    broadcasts = True

    def __init__(self, in_features: int, hidden: int = 64, forward_bias: float = 3.0) -> None:
        check_widths(in_features=in_features, hidden=hidden)
        super().__init__(hidden)
        self.in_features = in_features
        self.hidden = hidden
        self.forward_bias = forward_bias
        self.project = nn.Linear(in_features, hidden)
        self.decide = _decision(2 * hidden, forward_bias)

    def embed(self, pooled: Tensor) -> Tensor:
        """Project the frame; see `Gate.embed`."""
        return self.project(pooled).relu()  # type: ignore[no-any-return]

    def step(self, embedded: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Compare with the last used frame; see `Gate.step`."""
        last = state[0].to(embedded.dtype)
        if embedded.ndim == 3:
            last = last[:, None].expand_as(embedded)
        return self.decide(torch.cat([embedded, last], -1)), (embedded,)

    def extra_repr(self) -> str:
        """Say what the gate reads and remembers."""
        return f"{self.in_features} -> 2 x {self.hidden}"


def _cell(mixed: Tensor, memory: Tensor) -> GateState:
    """Advance an LSTM cell, given the sums that enter its gates."""
    take, keep, _, show = mixed.sigmoid().chunk(4, -1)  # one launch for three gates is worth the fourth's work
    memory = torch.addcmul(keep * memory, take, mixed.chunk(4, -1)[2].tanh())
    return show * memory.tanh(), memory


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    """Call a linear layer, through `_linear` where nothing is attached to the layer."""
    if is_plain(layer, nn.Linear):
        return _linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]
    return layer(x)  # type: ignore[no-any-return]


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Do what `F.linear` does, faster for few rows on a CPU.

    There, reading the weights is nearly all that a gate costs. `F.linear` reads them at a third of the memory's speed
    or less, `torch.bmm` at full speed.
    """
    if (
        torch.compiler.is_compiling()  # compilers and exporters have kernels of their own
        or torch.is_grad_enabled()
        or x.device.type != "cpu"
        or not 0 < x.shape[0] <= 4
        or weight.shape[0] % 2
    ):
        return F.linear(x, weight, bias)
    columns = x.flatten().view(x.shape).t()  # a single row may have odd strides, and these are slow
    return torch.bmm(weight.unflatten(0, (2, -1)), columns.expand(2, -1, -1)).flatten(0, 1).t() + bias


def exponential_temperature(epoch: float, initial: float = 5.0, decay: float = 0.045) -> float:
    """Anneal the temperature of the Gumbel-softmax: `initial * exp(-decay * epoch)`.

    Args:
        epoch: epochs of gate training so far.
        initial: temperature at epoch 0.
        decay: rate of the decay, per epoch.

    Returns:
        The temperature.

    Raises:
        DynskipError: if it is not positive. A large `decay` lets it underflow to 0.

    Reference:
        Thesis section 4.2; Jang et al., "Categorical reparameterization with Gumbel-softmax", ICLR 2017.
    """
    temperature = initial * math.exp(-decay * epoch)
    if not temperature > 0:
        raise DynskipError(
            f"The temperature is {temperature} in epoch {epoch}; it has to stay positive. Take a smaller `decay` than "
            f"{decay}, or a positive `initial`."
        )
    return temperature


def _decision(in_features: int, forward_bias: float) -> nn.Linear:
    layer = nn.Linear(in_features, 2)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([0.0, forward_bias]))
    return layer
