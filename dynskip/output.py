"""What a pass over videos decided, predicted and cost, and the rules by which a prediction follows from decisions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynskip.flops import FLOPsLookup
from dynskip.gates import FORWARD, STOP

UNSEEN = -1  # `stopped_at` of a frame that was never looked at, because the video had ended


@dataclass
class SkipOutput:
    """What a pass over videos decided, predicted and cost. What was not evaluated is masked, never invented.

    Attributes:
        logits: `(B, K)` logits of each video: the mean over its used frames (Eq. 3.6), each as often as gates with
            `repeats_last` say that it is shown.
        forward: `(B, T, N)` decisions, 1 forward and 0 stop; straight-through in training, 0 where a gate was not
            evaluated.
        used: `(B, T)` boolean, frames that passed every gate.
        stopped_at: `(B, T)` index of the gate that stopped the frame; `N` for used frames, -1 for unseen ones.
        frame_logits: `(B, T, K)` logits of each frame (Eq. 3.5), NaN where not computed.
        gate_logits: `(B, T, N, 2)` logits (stop, forward), NaN where not evaluated; `None` without gates.
        inner_logits: `(B, T, N, K)` logits of the inner classifiers, NaN where their gate was not evaluated; `None`
            when they did not run (they serve training; the skipping pass leaves them out).
        macs: `(B,)` float64 executed cost of each video in the lookup's unit (MACs), gates and head included.
        fallback_frame: `(B,)` where no frame was used, the frame that was run to the end in their place; else -1.
        evaluated: `(B, T, N)` boolean, gates that ran: all of them in training, those a frame reached in eval.
        speculative_macs: `(B,)` float64 what was executed beyond `macs` to run several frames at a time: frames looked
            at ahead of decisions that then went otherwise. Zero unless stored videos are really skipped.
    """

    logits: Tensor
    forward: Tensor
    used: Tensor
    stopped_at: Tensor
    frame_logits: Tensor
    gate_logits: Tensor | None
    inner_logits: Tensor | None
    macs: Tensor
    fallback_frame: Tensor
    evaluated: Tensor
    speculative_macs: Tensor = None  # type: ignore[assignment]  # zeros like `macs`, which are not known here

    def __repr__(self) -> str:
        """Say what happened, in counts."""
        batch, frames, stages = self.forward.shape
        used, unseen = int(self.used.sum()), int((~self.seen).sum())
        return (
            f"SkipOutput({batch} videos of {frames} frames, {stages} stages, {self.logits.shape[-1]} classes: {used} "
            f"frames used, {batch * frames - used - unseen} stopped, {unseen} unseen; mean macs "
            f"{float(self.macs.mean()):.4g})"
        )

    def __post_init__(self) -> None:
        if self.speculative_macs is None:
            self.speculative_macs = torch.zeros_like(self.macs)

    @property
    def num_stages(self) -> int:
        """Number of stages `N`."""
        return self.forward.shape[-1]

    @property
    def probabilities(self) -> Tensor:
        """`(B, K)` class probabilities of each video."""
        return self.logits.softmax(-1)

    @property
    def fallback(self) -> Tensor:
        """`(B,)` boolean, videos of which no frame was used."""
        return self.fallback_frame >= 0

    @property
    def seen(self) -> Tensor:
        """`(B, T)` boolean, frames that were looked at."""
        return self.stopped_at != UNSEEN


@dataclass
class EncodedVideo:
    """Everything that gates and the video's prediction need of a dense backbone pass.

    With a frozen backbone, store it once and train gates on it in seconds per epoch.

    Attributes:
        pooled: for each of `N` stages `(B, T, C_n)` pooled features.
        frame_logits: `(B, T, K)` logits of every frame.
        image_size: `(H, W)` of the frames, for the cost table.
    """

    pooled: tuple[Tensor, ...]
    frame_logits: Tensor
    image_size: tuple[int, int]

    def __repr__(self) -> str:
        """Show sizes instead of values."""
        batch, frames, classes = self.frame_logits.shape
        channels = ", ".join(str(features.shape[-1]) for features in self.pooled)
        size = "x".join(map(str, self.image_size))
        return f"EncodedVideo({batch} videos of {frames} frames of {size}: channels {channels}, {classes} classes)"


def masked_output(
    stopped_at: Tensor,
    gate_logits: Tensor,
    frame_logits: Tensor,
    fallback_frame: Tensor,
    lookup: FLOPsLookup,
    repeats: Sequence[bool],
    inner_logits: Tensor | None = None,
) -> SkipOutput:
    """Make the output of a skipping pass; whatever the tensors hold that the decisions did not ask for is masked."""
    depth = torch.arange(gate_logits.shape[2], device=stopped_at.device)
    evaluated, used = depth <= stopped_at[..., None], stopped_at == gate_logits.shape[2]
    answered = answered_by(used, fallback_frame)
    return SkipOutput(
        logits=mean_where(answered, frame_logits, times_counted(stopped_at, repeats)),
        forward=(depth < stopped_at[..., None]).to(gate_logits.dtype),
        used=used,
        stopped_at=stopped_at,
        frame_logits=frame_logits.masked_fill(~answered[..., None], math.nan),
        gate_logits=gate_logits.masked_fill(~evaluated[..., None], math.nan),
        inner_logits=None if inner_logits is None else inner_logits.masked_fill(~evaluated[..., None], math.nan),
        macs=lookup.cost(stopped_at, used),
        fallback_frame=fallback_frame,
        evaluated=evaluated,
    )


def depth_score(stopped_at: Tensor, logits: Tensor) -> Tensor:
    """Order stopped frames by how far they got, then by how nearly their gate forwarded them."""
    margin = logits[..., FORWARD].detach().double() - logits[..., STOP].detach().double()
    # Rises with the forward probability, from 0 to 1. A softmax would do, but its last digit depends on where in a
    # batch a row stands, and equal frames have to stay equal in every batch.
    nearness = 0.5 + 0.5 * margin / (1 + margin.abs())
    return stopped_at.double() + nearness.clamp(max=1 - 1e-12)


def fallback_frames(stopped_at: Tensor, used: Tensor, gate_logits: Tensor) -> Tensor:
    """Choose, for videos without a used frame, the frame that answers in their place; -1 for other videos."""
    last = stopped_at.clamp(0, gate_logits.shape[2] - 1)
    at_stop = gate_logits.detach().gather(2, last[..., None, None].expand(-1, -1, 1, 2)).squeeze(2)
    score = depth_score(stopped_at, at_stop)  # an unseen frame scores below 0
    return torch.where(used.any(1), -1, score.argmax(1))


def answered_by(used: Tensor, fallback_frame: Tensor) -> Tensor:
    """Mark the frames whose logits make the prediction: the used ones, or else the fallback."""
    frames = torch.arange(used.shape[1], device=used.device)
    return used | (frames == fallback_frame[:, None])


def counted_as(stopped_at: Tensor, repeats: Sequence[bool]) -> Tensor:
    """Say which frame's logits each frame adds to its video's mean, `(B, T)`; -1 for none.

    Args:
        stopped_at: `(B, T)` what became of each frame.
        repeats: for each of `N` gates, whether frames that it stops count as the last used one.
    """
    frames = torch.arange(stopped_at.shape[1], device=stopped_at.device)
    last_used = torch.where(stopped_at == len(repeats), frames, -1).cummax(1).values
    counts = torch.tensor([False, *repeats, True], device=stopped_at.device)  # unseen, each gate, used
    return torch.where(counts[stopped_at + 1], last_used, -1)


def times_counted(stopped_at: Tensor, repeats: Sequence[bool]) -> Tensor:
    """Say how often each frame's logits count in its video's mean, `(B, T)`; 1 for frames that nothing repeats."""
    source = counted_as(stopped_at, repeats)
    counts = torch.zeros_like(stopped_at).scatter_add(1, source.clamp(min=0), (source >= 0).long())
    return counts.clamp(min=1)


def mean_where(mask: Tensor, frame_logits: Tensor, times: Tensor | None = None) -> Tensor:
    """Average the logits of each video's marked frames, each counted once or so many times."""
    weights = mask.long() if times is None else mask * times
    wide = frame_logits.to(sum_dtype(frame_logits.dtype))
    total = torch.where(mask[..., None], wide * weights[..., None], 0.0).sum(1)
    return (total / weights.sum(1, keepdim=True)).to(frame_logits.dtype)


def running_probabilities(stopped_at: Tensor, frame_logits: Tensor, repeats: Sequence[bool]) -> Tensor:
    """Predict each video after each of its frames, from those so far: `(B, T, K)`, NaN before the first used one."""
    source = counted_as(stopped_at, repeats)
    added = frame_logits.gather(1, source.clamp(min=0)[..., None].expand(-1, -1, frame_logits.shape[-1]))
    added = torch.where(source[..., None] >= 0, added, 0.0).to(sum_dtype(frame_logits.dtype))
    # Added one by one, as frames arrive: a cumulative sum rounds differently.
    total = torch.stack(list(itertools.accumulate(added.unbind(1))), 1)
    return (total / (source >= 0).cumsum(1)[..., None]).softmax(-1)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums over frames need more digits than half precision has."""
    return torch.promote_types(dtype, torch.float32)
