"""Where frames' features are, between the stages that they have been through and the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynskip.backbone import Carry, StagedBackbone
from dynskip.flops import takes_channels_last


class Features:
    """The carries of frames in flight, in the batches in which stages made them.

    Args:
        backbone: the backbone.
        frames: number of places.

    Attributes:
        depth: for each frame, the stages that it has been through, the head included; on the host.
    """

    def __init__(self, backbone: StagedBackbone, frames: int) -> None:
        self.backbone = backbone
        self.depth = torch.zeros(frames, dtype=torch.long)
        self._batches: list[Carry | None] = []
        self._whole: int | None = None  # the batch that was gathered last, if it was a whole one
        self._place = torch.zeros(frames, dtype=torch.long)  # batch << 32, plus the row in it

    def load(self, frames: Tensor, images: Tensor, pending: Tensor) -> None:
        """Take images in, `(M, C, H, W)`; what no pending frame needs any more is let go."""
        # What a few images gain from it does not pay for their way into that layout.
        if images.device.type == "cpu" and len(images) >= 4 and takes_channels_last(self.backbone):
            images = images.contiguous(memory_format=torch.channels_last)
        self._keep(frames, self.backbone.start(images), 0, pending)

    def _keep(self, frames: Tensor, carry: Carry, depth: int, pending: Tensor) -> None:
        self._let_go(pending)
        free = next((i for i, batch in enumerate(self._batches) if batch is None), len(self._batches))
        self._batches[free : free + 1] = [carry]
        self._place[frames] = torch.arange(free << 32, (free << 32) + len(frames))
        self.depth[frames] = depth

    def _let_go(self, pending: Tensor) -> None:
        in_use = set((self._place[pending] >> 32).tolist())
        self._batches = [batch if i in in_use else None for i, batch in enumerate(self._batches)]

    def move(self, frames: Tensor, carry: Carry, depth: int, pending: Tensor) -> None:
        """Keep what frames that were gathered are now, and let go what no pending frame needs any more."""
        if self._whole is not None:  # all of a batch moved on: what is in its place is the new one
            self._batches[self._whole] = carry
            self.depth[frames] = depth
            return
        self._keep(frames, carry, depth, pending)
        self._let_go(pending)

    def gather(self, frames: Tensor, device: torch.device) -> tuple[Carry, Tensor]:
        """Return frames of one depth as a batch, and which frame is in which row of it."""
        place = self._place[frames]
        number, row = divmod(int(place[0]), 1 << 32)
        batch = self._batches[number]
        assert batch is not None
        ordered = len(frames) == 1 or torch.equal(place, torch.arange(len(frames)) + place[0])
        self._whole = number if row == 0 and batch.batch == len(frames) and ordered else None
        if self._whole is not None:
            return batch, frames
        place, order = place.sort()
        rows = (place & 0xFFFFFFFF).to(device, non_blocking=True)
        numbers, counts = (place >> 32).unique_consecutive(return_counts=True)
        parts = []
        for number, some in zip(numbers.tolist(), rows.split(counts.tolist()), strict=True):
            batch = self._batches[number]
            assert batch is not None
            parts.append(batch if len(some) == batch.batch else batch.select(some))
        return parts[0] if len(parts) == 1 else Carry.cat(parts), frames[order]

    def row(self, frame: int, device: torch.device) -> Carry:
        """Copy one frame, so that the rest of its batch can go."""
        number, row = divmod(int(self._place[frame]), 1 << 32)
        batch = self._batches[number]
        assert batch is not None
        return batch.select(torch.tensor([row]).to(device, non_blocking=True))


@dataclass
class Furthest:
    """The stopped frame that got furthest. Without a used frame, its video's answer is made from it.

    Attributes:
        score: see `rules.score`.
        stopped_at: the gate that stopped it.
        frame: its number in the video.
        depth: the stages that it has been through, at least up to that gate.
        carry: what the next stage takes, of this frame alone.
    """

    score: float
    stopped_at: int
    frame: int
    depth: int
    carry: Carry


def run_to_end(backbone: StagedBackbone, frames: Sequence[Furthest]) -> Tensor:
    """Run stopped frames through the rest of the stages, and the head, without gates.

    Returns:
        `(M, K)` logits.
    """
    order = sorted(range(len(frames)), key=lambda i: frames[i].depth)
    carry: list[Carry] = []
    for n in range(backbone.num_stages):
        carry = [backbone.run(n, Carry.cat(carry))] if carry else []
        carry += [frames[i].carry for i in order if frames[i].depth == n + 1]
    logits = backbone.head(Carry.cat(carry))
    return logits[torch.tensor(order).argsort().to(logits.device, non_blocking=True)]
