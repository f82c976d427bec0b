"""Where frames' features are, between the stages that they have been through and the next one."""

from __future__ import annotations

import torch
from torch import Tensor

from dynskip.backbone import Carry, StagedBackbone


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
        self._place = torch.zeros(frames, dtype=torch.long)  # batch << 32, plus the row in it

    def load(self, frames: Tensor, images: Tensor) -> None:
        """Take images in, `(M, C, H, W)`."""
        self.keep(frames, self.backbone.start(images), 0)

    def keep(self, frames: Tensor, carry: Carry, depth: int) -> None:
        """Keep what frames are now that they have been through so many stages."""
        free = next((i for i, batch in enumerate(self._batches) if batch is None), len(self._batches))
        self._batches[free : free + 1] = [carry]
        self._place[frames] = torch.arange(free << 32, (free << 32) + len(frames))
        self.depth[frames] = depth

    def let_go(self, pending: Tensor) -> None:
        """Free what no pending frame needs any more."""
        in_use = set((self._place[pending] >> 32).tolist())
        self._batches = [batch if i in in_use else None for i, batch in enumerate(self._batches)]

    def gather(self, frames: Tensor, device: torch.device) -> tuple[Carry, Tensor]:
        """Return frames of one depth as a batch, and which frame is in which row of it."""
        place = self._place[frames]
        number, row = divmod(int(place[0]), 1 << 32)
        batch = self._batches[number]
        assert batch is not None
        if row == 0 and batch.batch == len(frames) and torch.equal(place, torch.arange(len(frames)) + place[0]):
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
