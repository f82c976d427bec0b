"""What each stage, gate and head costs, in MACs (multiply-adds)."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dynskip._modes import DrawingApart, in_mode
from dynskip.backbone import StagedBackbone
from dynskip.backbone.count import Count
from dynskip.consensus import Consensus
from dynskip.errors import DynskipError, lacks_memory
from dynskip.gates import parts_of

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class FLOPsLookup:
    """A table of costs: one frame through each stage, each gate and the head.

    `FLOPsLookup.measure` counts them with torch's own counter. You can also give a table by hand: the figures of a
    paper, or measured latency with its unit, so that the efficiency loss trains on milliseconds.

    A cost that is not known is NaN, and so is every cost that includes it.

    Args:
        per_stage: cost of each stage, without its gate.
        head: cost of what follows the last stage.
        gates: cost of each gate; zeros by default.
        steps: the part of each gate's cost that asking it again about a frame takes (its `step`); by default all of it.
            Only `speculative_macs` depends on it.
        shared: the part of each step that is done once a video when the gate looks at several frames of it; zeros by
            default. Only `speculative_macs` depends on it.
        stage_names: names of the stages; if given, they must be the backbone's.
        image_size: `(H, W)` that the table holds for; `None` for any.
        unit: what is counted; `"MACs"` are multiply-adds.

    Raises:
        DynskipError: if the table is empty, has a negative or infinite entry, or its parts differ in length.

    Reference:
        Thesis Eq. 3.10.

    Examples:
        >>> lookup = FLOPsLookup([10.0, 20.0, 30.0], head=1.0)
        >>> lookup.dense  # a frame that passes every gate
        61.0
        >>> lookup.cost(torch.tensor([[0, 3]]), torch.tensor([-1]))  # one frame stopped at the first gate, one used
        tensor([71.], dtype=torch.float64)
    """

    def __init__(
        self,
        per_stage: Sequence[float],
        head: float = 0.0,
        gates: Sequence[float] | None = None,
        *,
        steps: Sequence[float] | None = None,
        shared: Sequence[float] | None = None,
        stage_names: Sequence[str] | None = None,
        image_size: tuple[int, int] | None = None,
        unit: str = "MACs",
    ) -> None:
        zeros = [0.0] * len(per_stage)
        self.per_stage = _column(per_stage)
        self.gates = _column(zeros if gates is None else gates)
        self.steps = self.gates if steps is None else _column(steps)
        self.shared = _column(zeros if shared is None else shared)
        self.head = float(head)
        self.stage_names = tuple(stage_names) if stage_names is not None else None
        if image_size is not None and not (
            isinstance(image_size, tuple) and len(image_size) == 2 and min(image_size) > 0
        ):
            raise DynskipError(f"image_size={image_size!r} is no size; give (H, W) in pixels, or None for any size.")
        self.image_size = image_size
        self.unit = unit
        columns = (self.per_stage, self.gates, self.steps, self.shared)
        names = zeros if self.stage_names is None else self.stage_names
        if not zeros or any(len(column) != len(zeros) for column in (*columns, names)):
            raise DynskipError(
                f"A cost table needs one entry a stage: got {len(zeros)} stages, {len(self.gates)} gates, "
                f"{len(self.steps)} steps, {len(self.shared)} shared parts and stage names {self.stage_names}."
            )
        costs = [*torch.cat(columns).tolist(), self.head]
        if any(cost < 0 or math.isinf(cost) for cost in costs):
            raise DynskipError(f"Costs must be finite and not negative, or NaN where they are unknown; got {costs}.")

    @classmethod
    @torch.no_grad()
    def measure(
        cls,
        backbone: StagedBackbone,
        image_size: int | tuple[int, int],
        gates: Sequence[nn.Module] = (),
        consensus: Consensus | None = None,
    ) -> FLOPsLookup:
        """Count the MACs of one frame through each part.

        Convolutions and matrix products count, as torch's `FlopCounterMode` counts them. Counting runs on the meta
        device: nothing is computed. A model that cannot run there (it reads values, or has an operator of its own) is
        run on its own device instead, on one frame of random numbers, which hooks on its modules then see. If its cost
        depends on the data, the table has what that frame cost.

        Where a part has an operator for which torch's counter has no formula, its cost is NaN, and a warning names it.
        Register one (`torch.utils.flop_counter.register_flop_formula`), or fill in a table by hand.

        Args:
            backbone: the staged backbone.
            image_size: `(H, W)` of the frames, or one number for squares.
            gates: the gates, one a stage; none to leave their cost out.
            consensus: the consensus. What it does with each used frame (its `embed`) counts with the head.

        Returns:
            The table, in MACs.

        Raises:
            DynskipError: if the number of gates is not the number of stages, or a gate does not fit its stage.
        """
        if gates and len(gates) != backbone.num_stages:
            raise DynskipError(f"Got {len(gates)} gates for {backbone.num_stages} stages; give one for each stage.")
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        with DrawingApart():
            try:
                ghosts = [_on_meta(gate) for gate in gates]
                return cls._measured(_on_meta(backbone), size, ghosts, consensus and _on_meta(consensus))
            except Exception:  # the meta device lacks an operator, or has no values to look at
                parts = nn.ModuleList([backbone, *gates, *([] if consensus is None else [consensus])])
                with in_mode(parts, False):
                    return cls._measured(backbone, size, gates, consensus)

    @classmethod
    def _measured(
        cls, backbone: StagedBackbone, size: tuple[int, int], gates: Sequence[Any], consensus: Consensus | None
    ) -> FLOPsLookup:
        count, names = Count(backbone), backbone.stage_names
        carry = backbone.start(_images(backbone, 1, size))
        stage_macs, gate_macs = [], []
        for n, name in enumerate(names):
            macs, carry = count(f"stage {name!r}", backbone.run, n, carry)
            stage_macs.append(macs)
            if gates:
                this = f"Gate {n} ({type(gates[n]).__name__})"
                try:
                    gate_macs.append(_count_gate(count, this, gates[n], backbone.pool(n, carry)))
                except Exception as error:
                    if lacks_memory(error):
                        raise
                    raise DynskipError(
                        f"{this} cannot run after stage {name!r}: {error}. Build it for {backbone.num_features[n]} "
                        "input features."
                    ) from error
        head_macs, logits = count("the head", backbone.head, carry)
        if consensus is not None and consensus.embedded_features:
            macs, _ = count("the consensus", consensus.embed, logits)
            head_macs += macs
        whole, steps, shared = zip(*gate_macs, strict=True) if gates else (None, None, None)
        table = cls(stage_macs, head_macs, whole, steps=steps, shared=shared, stage_names=names, image_size=size)
        if count.unknown:
            warnings.warn(
                f"The cost of {', '.join(count.unknown)} is unknown, so it is NaN: torch cannot count "
                f"{', '.join(count.causes.values())}. Register a formula "
                "(torch.utils.flop_counter.register_flop_formula), or give the model a table: lookup=FLOPsLookup(...).",
                stacklevel=4,
            )
        return table

    @property
    def cumulative(self) -> Tensor:
        """Cost of a frame up to and including each gate, `(N,)`."""
        return (self.per_stage + self.gates).cumsum(0)

    @property
    def total(self) -> float:
        """Cost of a frame that passes every gate."""
        return float(self.cumulative[-1]) + self.head

    @property
    def dense(self) -> float:
        """Cost of a frame through the dense network, without gates."""
        return float(self.per_stage.sum()) + self.head

    @property
    def remaining(self) -> Tensor:
        """What a frame may still cost after each gate, `(N,)` (Eq. 3.10)."""
        return self.total - self.cumulative

    @property
    def by_outcome(self) -> Tensor:
        """Cost of a frame that is unseen, stopped by gate 0, ..., stopped by gate `N - 1`, or used, `(N + 2,)`."""
        return torch.cat([_column([0.0]), self.cumulative, _column([self.total])])

    @property
    def completion(self) -> Tensor:
        """Cost of running a frame to the end, without gates, after each gate has stopped it, `(N,)`."""
        return self.per_stage.sum() - self.per_stage.cumsum(0) + self.head

    @property
    def display_unit(self) -> tuple[float, str]:
        """A divisor that makes costs readable, and the unit that they are in then: GMACs, MMACs, or `unit`."""
        if self.unit != "MACs":
            return 1.0, self.unit
        return (1e9, "GMACs") if self.total >= 1e8 else (1e6, "MMACs")

    def cost(self, stopped_at: Tensor, fallback_frame: Tensor) -> Tensor:
        """Add up what was executed.

        Args:
            stopped_at: `(B, T)` index of the gate that stopped each frame, `N` for used ones, -1 for unseen ones.
            fallback_frame: `(B,)` the frame of each video that was run to the end although a gate stopped it; -1 for
                none.

        Returns:
            `(B,)` float64 executed cost of each video, gates and head included.
        """
        by_outcome, completion = (
            table.to(stopped_at.device, non_blocking=True) for table in (self.by_outcome, self.completion)
        )
        gate = stopped_at.gather(1, fallback_frame.clamp(min=0)[:, None]).squeeze(1)
        extra = completion[gate.clamp(0, len(self.per_stage) - 1)]
        return by_outcome[stopped_at + 1].sum(1) + torch.where(fallback_frame >= 0, extra, 0.0)

    def __repr__(self) -> str:
        """Show the table, in the unit of `display_unit`."""
        scale, unit = self.display_unit
        names = self.stage_names or [f"stage {n}" for n in range(len(self.per_stage))]
        parts = [f"{name} {cost / scale:.3f}" for name, cost in zip(names, self.per_stage.tolist(), strict=True)]
        size = "" if self.image_size is None else " at {}x{}".format(*self.image_size)
        return (
            f"FLOPsLookup({unit} a frame{size}: {', '.join(parts)}, head {self.head / scale:.3f}, "
            f"gates {float(self.gates.sum()) / scale:.4f}, total {self.total / scale:.3f})"
        )


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def _count_gate(count: Count, this: str, gate: Any, pooled: Tensor) -> tuple[float, float, float]:
    """Return the MACs of a gate on one frame, of its step, and the part of the step that several frames share."""
    parts, state, shared = parts_of(gate), gate.initial_state(1), 0.0
    embed, embedded = count(this, parts.embed, pooled)
    step, _ = count(this, parts.step, embedded, state)
    if parts.broadcasts:
        two_frames, _ = count(this, parts.step, embedded[:, None].expand(-1, 2, -1), state)
        shared = 2 * step - two_frames
    return embed + step, step, shared


def _images(backbone: StagedBackbone, batch: int, size: tuple[int, int]) -> Tensor:
    """Return images to count with, where the backbone is. They are always the same."""
    like = next((p for p in backbone.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, backbone.input_size[0], *size, generator=generator).to(like)


def _on_meta(module: ModuleT) -> ModuleT:
    """Copy a module to the meta device in eval mode, without copying its weights on the way."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.to("meta")
    ghost = copy.deepcopy(module, memo).eval()
    for part in ghost.modules():  # the user's hooks are for real frames
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return ghost
