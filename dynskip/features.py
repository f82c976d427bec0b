"""Where the features of frames in flight are, between two stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynskip.backbone import Carry, StagedBackbone


class Features:
    """The carries of frames in flight, in the batches in which stages made them.

    `pending` says on the host which frames wait for a decision. What none of them needs is let go.
    """

    def __init__(self, backbone: StagedBackbone, pending: Tensor) -> None:
        self.backbone, self.pending = backbone, pending
        # On the host, the stages that each frame has been through, the head included.
        self.depth = torch.zeros(len(pending), dtype=torch.long)
        self._batches: list[Carry | None] = []
        self._whole: int | None = None  # the batch that was gathered last, if it was a whole one
        self._place = torch.zeros(len(pending), dtype=torch.long)  # of each frame: batch << 32, plus the row in it

    def load(self, frames: Tensor, images: Tensor) -> None:
        """Take images in, `(M, C, H, W)`. Their frames are pending from now on."""
        carry = self.backbone.start(images)
        self.pending[frames] = True
        self._keep(frames, carry, 0)

    def move(self, frames: Tensor, carry: Carry, depth: int) -> None:
        """Keep what a stage made of the frames that were gathered last."""
        if self._whole is None:
            self._keep(frames, carry, depth)
        else:  # a whole batch moved on, so the new one takes its place
            self._batches[self._whole] = carry
            self.depth[frames] = depth

    def _keep(self, frames: Tensor, carry: Carry, depth: int) -> None:
        free = next((i for i, batch in enumerate(self._batches) if batch is None), len(self._batches))
        self._batches[free : free + 1] = [carry]
        self._place[frames] = torch.arange(free << 32, (free << 32) + len(frames))
        self.depth[frames] = depth
        in_use = set((self._place[self.pending] >> 32).tolist())
        self._batches = [batch if i in in_use else None for i, batch in enumerate(self._batches)]

    def gather(self, frames: Tensor, device: torch.device) -> tuple[Carry, Tensor]:
        """Return frames of one depth as a batch, and which frame is in which row of it."""
        place = self._place[frames]
        first, row = divmod(int(place[0]), 1 << 32)
        batch = self._batch(first)
        ordered = len(frames) == 1 or torch.equal(place, torch.arange(len(frames)) + place[0])
        self._whole = first if row == 0 and batch.batch == len(frames) and ordered else None
        if self._whole is not None:
            return batch, frames
        place, order = place.sort()
        rows = (place & 0xFFFFFFFF).to(device, non_blocking=True)
        numbers, counts = (place >> 32).unique_consecutive(return_counts=True)
        chosen = zip(map(self._batch, numbers.tolist()), rows.split(counts.tolist()), strict=True)
        parts = [batch if len(some) == batch.batch else batch.select(some) for batch, some in chosen]
        return parts[0] if len(parts) == 1 else Carry.cat(parts), frames[order]

    def row(self, frame: int, device: torch.device) -> Carry:
        """Copy one frame, so that the rest of its batch can be let go."""
        number, row = divmod(int(self._place[frame]), 1 << 32)
        return self._batch(number).select(torch.tensor([row]).to(device, non_blocking=True))

    def _batch(self, number: int) -> Carry:
        batch = self._batches[number]
        assert batch is not None
        return batch


@dataclass
class Furthest:
    """The stopped frame that got furthest. It answers for its video if no frame is used."""

    score: float  # see `rules.score`
    stopped_at: int
    frame: int  # its number in the video
    depth: int  # stages that it has been through, at least up to the gate that stopped it
    carry: Carry  # of this frame alone


def run_to_end(backbone: StagedBackbone, frames: Sequence[Furthest]) -> Tensor:
    """Run stopped frames through the rest of the stages and the head; return their `(M, K)` logits."""
    order = sorted(range(len(frames)), key=lambda i: frames[i].depth)
    carry: list[Carry] = []
    for n in range(backbone.num_stages):
        carry = [backbone.run(n, Carry.cat(carry))] if carry else []
        carry += [frames[i].carry for i in order if frames[i].depth == n + 1]
    logits = backbone.head(Carry.cat(carry))
    return logits[torch.tensor(order).argsort().to(logits.device, non_blocking=True)]
