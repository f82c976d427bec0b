"""What each stage, gate and head costs, in MACs (multiply-adds)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dynskip.backbone import StagedBackbone
from dynskip.errors import DynskipError
from dynskip.gates import parts_of

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class FLOPsLookup:
    """A table of costs: one frame through each stage, each gate and the head.

    `FLOPsLookup.measure` counts them with torch's own counter. A table can also be given by hand: a paper's figures, or
    measured latency with its unit named, so that the efficiency loss trains on milliseconds.

    Args:
        per_stage: cost of each stage, the gates not included.
        head: cost of what follows the last stage.
        gates: cost of each gate; none by default.
        steps: the part of each gate's cost that asking it again about a frame takes (its `step`), by default all of it;
            matters for `speculative_macs` alone.
        shared: the part of each step that is done once a video where the gate looks at several frames of it, by default
            nothing; matters for `speculative_macs` alone.
        stage_names: names of the stages, checked against the backbone's where given.
        image_size: `(H, W)` that the table holds for; `None` for any.
        unit: what is counted; `"MACs"` are multiply-adds.

    Raises:
        DynskipError: if the table is empty, has a negative or non-finite entry, or its parts differ in length.

    Reference:
        Thesis Eq. 3.10.
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
        self.per_stage = torch.tensor(list(per_stage), dtype=torch.float64)
        self.gates = torch.zeros_like(self.per_stage)
        if gates is not None:
            self.gates = torch.tensor(list(gates), dtype=torch.float64)
        self.steps = self.gates if steps is None else torch.tensor(list(steps), dtype=torch.float64)
        self.shared = torch.zeros_like(self.steps)
        if shared is not None:
            self.shared = torch.tensor(list(shared), dtype=torch.float64)
        self.head = float(head)
        self.stage_names = tuple(stage_names) if stage_names is not None else None
        if image_size is not None and not (isinstance(image_size, tuple) and len(image_size) == 2):
            raise DynskipError(f"image_size={image_size!r} is no size; give (H, W) in pixels, or None for any size.")
        self.image_size = image_size
        self.unit = unit
        stages = len(self.per_stage)
        named = stages if self.stage_names is None else len(self.stage_names)
        lengths = {stages, len(self.gates), len(self.steps), len(self.shared), named}
        if stages == 0 or len(lengths) > 1:
            raise DynskipError(
                f"A cost table needs one entry a stage: got {stages} stages, {len(self.gates)} gates, "
                f"{len(self.steps)} steps, {len(self.shared)} shared parts and stage names {self.stage_names}."
            )
        head_cost = torch.tensor([self.head], dtype=torch.float64)
        costs = torch.cat([self.per_stage, self.gates, self.steps, self.shared, head_cost])
        if not torch.isfinite(costs).all() or (costs < 0).any():
            raise DynskipError(f"Costs must be finite and not negative; got {costs.tolist()}.")

    @classmethod
    @torch.no_grad()
    def measure(
        cls, backbone: StagedBackbone, image_size: int | tuple[int, int], gates: Sequence[nn.Module] = ()
    ) -> FLOPsLookup:
        """Count the MACs of one frame through each part.

        Counted are convolutions and matrix products, as torch's `FlopCounterMode` counts them, on the meta device:
        nothing is computed, and no fused CPU kernel hides from the counter.

        Args:
            backbone: the staged backbone.
            image_size: `(H, W)` of the frames, or one number for squares.
            gates: the gates, one a stage; none to leave their cost out.

        Returns:
            The table, in MACs.

        Raises:
            DynskipError: if there are gates but not one for each stage, or one does not fit its stage.
        """
        if gates and len(gates) != backbone.num_stages:
            raise DynskipError(f"Got {len(gates)} gates for {backbone.num_stages} stages; give one for each stage.")
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        takes_channels_last(backbone)  # now, so that whoever counts what a run executes does not count the try
        staged = _on_meta(backbone)
        dtype = next((p.dtype for p in staged.parameters() if p.is_floating_point()), torch.float32)
        carry = staged.start(torch.empty(1, backbone.input_size[0], height, width, dtype=dtype, device="meta"))
        stage_macs, gate_macs, step_macs, shared_macs = [], [], [], []
        for n in range(backbone.num_stages):
            macs, carry = _count(staged.run, n, carry)
            stage_macs.append(macs)
            embed_macs = macs = shared = 0
            if gates:
                gate: Any = _on_meta(gates[n])
                try:
                    parts = parts_of(gate)
                    embed_macs, embedded = _count(parts.embed, staged.pool(n, carry))
                    macs, _ = _count(parts.step, embedded, gate.initial_state(1))
                    if parts.broadcasts:
                        twice, _ = _count(parts.step, embedded[:, None].expand(-1, 2, -1), gate.initial_state(1))
                        shared = 2 * macs - twice
                except Exception as error:
                    raise DynskipError(
                        f"Gate {n} ({type(gate).__name__}) cannot run after stage {backbone.stage_names[n]!r}: "
                        f"{error}. Build it for {backbone.num_features[n]} input features."
                    ) from error
            gate_macs.append(embed_macs + macs)
            step_macs.append(macs)
            shared_macs.append(shared)
        head_macs, _ = _count(staged.head, carry)
        return cls(
            stage_macs,
            head_macs,
            gate_macs,
            steps=step_macs,
            shared=shared_macs,
            stage_names=backbone.stage_names,
            image_size=(height, width),
        )

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
        """Cost of a frame through the plain backbone, without gates."""
        return float(self.per_stage.sum()) + self.head

    @property
    def remaining(self) -> Tensor:
        """What forwarding at each gate may still cost, `(N,)` (Eq. 3.10)."""
        return self.total - self.cumulative

    @property
    def by_outcome(self) -> Tensor:
        """Cost of a frame that is not looked at, is stopped by gate 0, ..., by gate `N - 1`, or is used, `(N + 2,)`."""
        zero = torch.zeros(1, dtype=torch.float64)
        return torch.cat([zero, self.cumulative, zero + self.total])

    @property
    def completion(self) -> Tensor:
        """What running a frame that each gate stopped to the end costs, without gates, `(N,)`."""
        return self.per_stage.sum() - self.per_stage.cumsum(0) + self.head

    @property
    def display_unit(self) -> tuple[float, str]:
        """What to divide costs by for people to read, and what they are counted in then: GMACs, MMACs, or `unit`."""
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
            `(B,)` float64 executed cost a video, gates and head included.
        """
        by_outcome, completion = (
            table.to(stopped_at.device, non_blocking=True) for table in (self.by_outcome, self.completion)
        )
        gate = stopped_at.gather(1, fallback_frame.clamp(min=0)[:, None]).squeeze(1)
        extra = completion[gate.clamp(0, len(self.per_stage) - 1)]
        return by_outcome[stopped_at + 1].sum(1) + torch.where(fallback_frame >= 0, extra, 0.0)

    def __repr__(self) -> str:
        """Show the table; MACs in thousands of millions, of small models in millions."""
        scale, unit = self.display_unit
        names = self.stage_names or [f"stage {n}" for n in range(len(self.per_stage))]
        parts = [f"{name} {cost / scale:.3f}" for name, cost in zip(names, self.per_stage.tolist(), strict=True)]
        size = "" if self.image_size is None else " at {}x{}".format(*self.image_size)
        return (
            f"FLOPsLookup({unit} a frame{size}: {', '.join(parts)}, head {self.head / scale:.3f}, "
            f"gates {float(self.gates.sum()) / scale:.4f}, total {self.total / scale:.3f})"
        )


@torch.no_grad()
def takes_channels_last(backbone: Any) -> bool:
    """Say whether a backbone takes images in channels-last memory; tried once, on the meta device, and remembered.

    Some modules take views that need the other layout, and raise.
    """
    if getattr(backbone, "channels_last", False) is None:
        ghost = _on_meta(backbone)
        dtype = next((p.dtype for p in ghost.parameters() if p.is_floating_point()), torch.float32)
        images = torch.empty(2, *backbone.input_size, dtype=dtype, device="meta", memory_format=torch.channels_last)
        try:
            ghost(images)
            backbone.channels_last = True
        except Exception:  # or an operation that the meta device has not
            backbone.channels_last = False
    return bool(getattr(backbone, "channels_last", False))


def _count(function: Callable[..., Any], *args: Any) -> tuple[int, Any]:
    with FlopCounterMode(display=False) as counter:
        result = function(*args)
    return counter.get_total_flops() // 2, result  # torch counts a multiply-add as two


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
