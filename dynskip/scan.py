"""Decide frame by frame, each from the states that the used frames before it have made. Never waits for the device.

This links frames, so it is the only part that cannot be batched over them. All steps have the same shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynskip import rules
from dynskip.gates import GateState, Step


@dataclass
class Group:
    """Gates with memory that are asked in one step: `G` of them, or a single one, without that dimension."""

    gates: list[int]
    step: Step
    columns: Sequence[Tensor]  # of each column of frames, `(G, R, E)`: what the gates' stateless parts made of it
    state: GateState  # `(G, R, ...)`; the scan advances it
    together: bool = False  # whether there is a dimension `G`
    asked: int = 0  # how often they were asked about a frame of each video

    def states(self) -> dict[int, GateState]:
        """Return the state of each gate."""
        if not self.together:
            return {self.gates[0]: self.state}
        return {n: tuple(part[i] for part in self.state) for i, n in enumerate(self.gates)}


def scan(
    groups: Sequence[Group], gate_logits: Tensor, bounds: Tensor, depth: Tensor, on_host: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Decide on the frames of a window, in each video up to the first one that lacks a stage.

    Args:
        groups: the gates with memory; their states are advanced.
        gate_logits: `(R, W, N, 2)` the gates' logits so far, which are final for gates without memory.
        bounds: `(N,)` margins to exceed.
        depth: `(R, W)` stages that each frame has been through, the head included; `N + 2` where there is no frame to
            decide on.
        on_host: the same on the host.

    Returns:
        `(R, W)` the first gate that stops each frame, `N` for none; `(R, W)` whether that is final: neither the frame
        nor an earlier one lacks a stage; and the new gate logits.
    """
    stages, window = gate_logits.shape[2], depth.shape[1]
    present = depth < stages + 2
    # A used frame passes every gate, and has been through the head.
    depths, wanted = depth.unbind(1), torch.where(depth == stages + 1, stages, -1).unbind(1)
    deepest = torch.where(on_host < stages + 2, on_host, 0).clamp(max=stages).amax(0).tolist()
    start = next(column for column, stage in enumerate(deepest) if stage)
    going = torch.ones_like(depths[0], dtype=torch.bool)
    said, stops, goings = [], [torch.zeros_like(depths[0])] * start, [going] * start
    for column in range(start, window):
        if depth.device.type == "cpu" and not going.any():  # on a CPU, looking costs nothing
            break
        logits, proposed = _ask(groups, gate_logits, column, deepest[column])
        stop = rules.stopped(rules.forwards(rules.margins(logits), bounds[:, None]), 0)
        going = going & (stop < depths[column])
        used = going & (stop == wanted[column])
        for group, new in proposed:
            group.state = rules.keep(used[None] if group.together else used, new, group.state)
            group.asked += 1
        said.append(logits)
        stops.append(stop)
        goings.append(going)
    left = window - len(stops)
    columns = slice(start, start + len(said))
    gate_logits = gate_logits.clone()
    fresh = torch.stack(said, 2).permute(1, 2, 0, 3)
    gate_logits[:, columns] = torch.where(present[:, columns, None, None], fresh, gate_logits[:, columns])
    final = torch.stack(goings + [torch.zeros_like(going)] * left, 1) & present
    return torch.stack(stops + [stops[-1]] * left, 1), final, gate_logits


def _ask(
    groups: Sequence[Group], gate_logits: Tensor, column: int, deepest: int
) -> tuple[Tensor, list[tuple[Group, GateState]]]:
    """Return the gates' logits `(N, R, 2)` on a column of frames, and the states that gates with memory propose."""
    if groups and groups[0].together:
        logits, new = groups[0].step(groups[0].columns[column], groups[0].state)
        return logits.to(gate_logits.dtype), [(groups[0], new)]
    said, proposed = list(gate_logits[:, column].unbind(1)), []
    for group in groups:
        if group.gates[0] < deepest:
            logits, new = group.step(group.columns[column], group.state)
            said[group.gates[0]] = logits.to(gate_logits.dtype)
            proposed.append((group, new))
    return torch.stack(said), proposed
