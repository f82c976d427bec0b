"""The contract of a gate: what decides, after each stage, whether a frame stops or goes forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dynskip._check import Checked
from dynskip.errors import DynskipError

GateState: TypeAlias = tuple[Tensor, ...]
Step: TypeAlias = Callable[[Tensor, GateState], tuple[Tensor, GateState]]
STOP, FORWARD = 0, 1


class Gate(Checked):
    """Base of dynskip's gates, and the contract of yours: any `nn.Module` with `initial_state` and `forward` will do.

    A state is a tuple of tensors with the batch in dimension 0. Its first tensor is the gate's hidden representation,
    which an `InnerClassifier` may read (`hidden_features` wide). The wrapper, not the gate, decides which rows keep a
    new state.

    A subclass writes `forward`, or splits it: `embed` is the stateless part and runs once for each frame; `step` is the
    rest.

    Args:
        hidden_features: width of the hidden representation. The state is then this one tensor and starts from zeros.
            With 0 the gate has no state. Override `initial_state` for other states.

    Attributes:
        has_memory: whether logits depend on the state. Gates without memory decide on many frames at once. A gate with
            an empty state has no memory.
        repeats_last: whether a frame that this gate stops shows what the last used frame showed. The stopped frame then
            counts as the last used one once more in the video's answer. Frames that other gates stop do not count.
        broadcasts: whether `step` also takes a window of `S` frames with one state a video: `(B, S, E)` and `(B, ...)`
            give logits `(B, S, 2)` and states `(B, S, ...)`. The work on the state is then done once a video.
    """

    has_memory: bool = True
    repeats_last: bool = False
    broadcasts: bool = False
    origin: Tensor

    def __init__(self, hidden_features: int = 0) -> None:
        super().__init__()
        self.hidden_features = hidden_features
        if hidden_features:
            # A buffer follows the gate to its device and dtype. Layers may lose their `weight`, as quantised ones do.
            self.register_buffer("origin", torch.zeros(hidden_features), persistent=False)

    def initial_state(self, batch: int) -> GateState:
        """Return the state before the first frame.

        Args:
            batch: number of videos.

        Returns:
            Tensors with the batch in dimension 0.
        """
        return (self.origin.repeat(batch, 1),) if self.hidden_features else ()

    def forward(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Decide on one frame a video.

        A NaN stops the frame whatever the threshold, and so does a forward logit 100 or more below the stop logit. A
        forward logit 100 or more above it lets the frame go forward whatever the threshold (`dynskip.rules`).

        Args:
            pooled: `(B, C_n)` pooled features.
            state: the state to decide from.

        Returns:
            `(B, 2)` logits (stop, forward), and the state after this frame.
        """
        return self.step(self.embed(pooled), state)

    def embed(self, pooled: Tensor) -> Tensor:
        """Do the stateless part. By default there is none, and the features are returned.

        Args:
            pooled: `(M, C_n)` pooled features of frames in any order.

        Returns:
            `(M, E)` what `step` decides from.
        """
        return pooled

    def step(self, embedded: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Decide from what `embed` returned.

        Args:
            embedded: `(B, E)`, one frame a video; where the gate `broadcasts` also `(B, S, E)`.
            state: the state to decide from, one row a video.

        Returns:
            As `forward`; for `(B, S, E)` logits `(B, S, 2)` and states `(B, S, ...)`.
        """
        raise NotImplementedError

    @classmethod
    def step_together(cls, gates: Sequence[Any]) -> Step | None:
        """Return one `step` for several gates of this class, or `None` where they cannot be asked as one.

        On a GPU, one call for all gates takes a fraction of the launches of a call for each.

        Args:
            gates: the `G` gates, one after each stage.

        Returns:
            A function from `(G, B, E)` and states `(G, B, ...)` to logits `(G, B, 2)` and states `(G, B, ...)`.
        """
        return None


@dataclass(frozen=True)
class GateParts:
    """A gate as the rules and the engine see it.

    Attributes:
        embed: the stateless part, `(M, C_n) -> (M, E)`.
        step: the rest, see `Gate.step`.
        has_memory: as in `Gate`.
        broadcasts: as in `Gate`.
    """

    embed: Callable[[Tensor], Tensor]
    step: Step
    has_memory: bool
    broadcasts: bool


def parts_of(gate: Any) -> GateParts:
    """Split a gate into its stateless part and the rest. A gate that is not split is called whole, as `step`.

    Args:
        gate: the gate.

    Returns:
        Its parts; `embed`, then `step`, give what the gate gives.
    """
    levels = {
        name: level
        for level, cls in reversed([*enumerate(type(gate).__mro__)])
        for name in ("forward", "embed", "step")
        if name in vars(cls)
    }
    memory = getattr(gate, "has_memory", True) and len(gate.initial_state(1)) > 0
    # Hooks on the gate, and a `forward` of a subclass, take part only in a call of the whole gate.
    whole = len(levels) < 3 or levels["forward"] < max(levels.values())
    if whole or gate._forward_hooks or gate._forward_pre_hooks:
        return GateParts(_as_it_is, gate, memory, False)
    return GateParts(gate.embed, gate.step, memory, getattr(gate, "broadcasts", False))


def _as_it_is(pooled: Tensor) -> Tensor:
    return pooled


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether reading a layer's weights does what calling it does: no hooks, pruning, adapters or other code."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is kind and not any(hooks) and "forward" not in vars(layer)


def logit(probability: float) -> float:
    """Return the logarithm of the odds, `log(p / (1 - p))`."""
    if probability in (0.0, 1.0):
        return math.inf if probability else -math.inf
    return math.log(probability) - math.log1p(-probability)


def check_widths(**widths: int) -> None:
    """Refuse widths that are not positive."""
    if min(widths.values()) < 1:
        given = ", ".join(f"{name}={width}" for name, width in widths.items())
        raise DynskipError(f"Gate widths must be positive; got {given}.")
