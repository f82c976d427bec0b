"""The contract of a gate: what decides, after each stage, whether a frame stops or goes forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from dynskip._check import Checked
from dynskip.errors import DynskipError

GateState: TypeAlias = tuple[Tensor, ...]
Step: TypeAlias = Callable[[Tensor, GateState], tuple[Tensor, GateState]]
STOP, FORWARD = 0, 1


class Gate(Checked):
    """Base of dynskip's gates, and the contract of yours: any `nn.Module` with these methods will do.

    A state is a tuple of tensors with the batch in dimension 0. Its first tensor is the gate's hidden representation,
    which an `InnerClassifier` may read (`hidden_features` wide). The wrapper, not the gate, decides which rows keep a
    new state.

    A gate may split its work: `embed(pooled)` is the stateless part, batched over frames and done once for each;
    `step(embedded, state)` is the rest. `forward` is then one after the other.

    Attributes:
        has_memory: whether logits depend on the state. Without memory, verdicts on many frames are given at once. An
            empty state is none.
        repeats_last: whether a frame that this gate stops shows what the last used frame showed. It then counts as that
            frame once more in the video's mean; frames that other gates stop do not count.
        broadcasts: whether `step` also takes a window of frames with one state a video: `(B, S, E)` and `(B, ...)` give
            logits `(B, S, 2)` and states `(B, S, ...)`. The work on the state is then done once a video.
    """

    has_memory: bool = True
    repeats_last: bool = False
    broadcasts: bool = False

    def initial_state(self, batch: int) -> GateState:
        """Return the state before the first frame.

        Args:
            batch: number of videos.

        Returns:
            Tensors with the batch in dimension 0.
        """
        raise NotImplementedError

    def forward(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Decide on one frame a video.

        A NaN, and a forward logit 100 or more below the stop logit, stop the frame whatever the threshold; a forward
        logit 100 or more above it lets the frame go forward whatever the threshold (`dynskip.rules`).

        Args:
            pooled: `(B, C_n)` pooled features.
            state: the state to decide from.

        Returns:
            `(B, 2)` logits (stop, forward), and the state after this frame.
        """
        raise NotImplementedError

    @classmethod
    def step_together(cls, gates: Sequence[Any]) -> Step | None:
        """Return one `step` for several gates of this class, or `None` where they cannot be asked as one.

        It maps `(G, B, E)` and states `(G, B, ...)` to logits `(G, B, 2)` and states `(G, B, ...)`, where `G` is the
        number of gates. On a GPU this takes a fraction of the launches of one gate after the other.

        Args:
            gates: the gates, one after each stage.
        """
        return None


@dataclass(frozen=True)
class GateParts:
    """A gate as the rules and the engine see it.

    Attributes:
        embed: the stateless part, `(M, C_n) -> (M, E)`.
        step: the rest.
        has_memory: as in `Gate`.
        broadcasts: as in `Gate`.
    """

    embed: Callable[[Tensor], Tensor]
    step: Step
    has_memory: bool
    broadcasts: bool


def parts_of(gate: Any) -> GateParts:
    """Split a gate into its stateless part and the rest; all of it is the rest where it does not say.

    Args:
        gate: the gate.

    Returns:
        Its parts; `embed` and `step`, one after the other, are the gate.
    """
    levels = {
        name: level
        for level, cls in reversed([*enumerate(type(gate).__mro__)])
        for name in ("forward", "embed", "step")
        if name in vars(cls)
    }
    memory = getattr(gate, "has_memory", True) and len(gate.initial_state(1)) > 0
    # A subclass with a `forward` of its own means that one, and hooks on the gate wait for it, too.
    whole = len(levels) < 3 or levels["forward"] < max(levels.values())
    if whole or gate._forward_hooks or gate._forward_pre_hooks:
        return GateParts(lambda pooled: pooled, gate, memory, False)
    return GateParts(gate.embed, gate.step, memory, getattr(gate, "broadcasts", False))


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether nothing is attached to a layer that waits for its call: hooks, pruning, adapters, other weights."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is kind and not any(hooks)


def logit(probability: float) -> float:
    """Return by how much the logit of this probability lies above that of the opposite."""
    if probability in (0.0, 1.0):
        return math.inf if probability else -math.inf
    return math.log(probability) - math.log1p(-probability)


def between_0_and_1(value: Any, name: str, why: str) -> float:
    """Refuse what is not strictly between 0 and 1."""
    if not (isinstance(value, int | float) and 0.0 < value < 1.0):
        raise DynskipError(f"{name}={value} is out of range; give a number between 0 and 1: {why}.")
    return value


def check_widths(**widths: int) -> None:
    """Refuse widths that are not positive."""
    if min(widths.values()) < 1:
        given = ", ".join(f"{name}={width}" for name, width in widths.items())
        raise DynskipError(f"Gate widths must be positive; got {given}.")
