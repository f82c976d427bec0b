"""Early termination: stop reading a video once its prediction is sure."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynskip.errors import DynskipError
from dynskip.output import UNSEEN


class EarlyTerminator(nn.Module):
    """End a video when its most probable class passes a threshold, after more than `min_frames` frames.

    Args:
        threshold: probability that the prediction has to exceed, in (0, 1].
        min_frames: frames that are looked at in any case; the next one is the first that can end the video.

    Raises:
        DynskipError: if the threshold or the number of frames is out of range.

    Reference:
        Thesis Eq. 3.7 (`rho`, `T_min`).
    """

    def __init__(self, threshold: float = 0.999, min_frames: int = 3) -> None:
        super().__init__()
        if not 0.0 < threshold <= 1.0:
            raise DynskipError(
                f"Termination threshold {threshold} is no probability; give one in (0, 1], such as 0.999."
            )
        if min_frames < 0:
            raise DynskipError(
                f"min_frames={min_frames} is negative; give the frames to look at in any case, such as 3."
            )
        self.threshold = threshold
        self.min_frames = min_frames

    def forward(self, probabilities: Tensor, frames_seen: Tensor) -> Tensor:
        """Say which videos are finished.

        Args:
            probabilities: `(B, K)` running prediction of each video; NaN where no frame has been used yet.
            frames_seen: `(B,)` frames looked at so far, stopped ones included.

        Returns:
            `(B,)` boolean, true where the video ends here.
        """
        # A NaN compares false: a video without a prediction goes on.
        return (probabilities.amax(-1) > self.threshold) & (frames_seen > self.min_frames)

    def extra_repr(self) -> str:
        """Show the rule."""
        return f"probability > {self.threshold}, after more than {self.min_frames} frames"


def end_videos(terminator: nn.Module, running: Tensor, stopped_at: Tensor) -> Tensor:
    """Mark the frames after the one that ends each video as unseen.

    Args:
        terminator: the rule.
        running: `(B, T, K)` probabilities after each frame (`running_probabilities`).
        stopped_at: `(B, T)` what became of each frame when videos are read to the end.

    Returns:
        `(B, T)` what becomes of each frame when videos end early.
    """
    batch, frames, _ = running.shape
    seen = torch.arange(1, frames + 1, device=running.device).repeat(batch)
    ends = terminator(running.flatten(0, 1), seen).view(batch, frames)
    return stopped_at.masked_fill(ends.cumsum(1) - ends.long() > 0, UNSEEN)
