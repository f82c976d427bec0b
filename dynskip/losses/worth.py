"""What a frame was worth in the end, as the target of every gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynskip.losses.functional as functional
from dynskip.activation import Activation
from dynskip.flops import FLOPsLookup
from dynskip.losses.criteria import check_known, check_table
from dynskip.output import SkipOutput
from dynskip.rules import margins


def frame_worth(frame_logits: Tensor, targets: Tensor, activation: Activation = "softmax") -> Tensor:
    """Say how much each frame tells of the truth: the head's confidence in it, 0 at chance and 1 when it is certain.

    Args:
        frame_logits: `(B, T, K)` logits of the head.
        targets: `(B,)` class indices or `(B, K)` rows.
        activation: how logits become probabilities.

    Returns:
        `(B, T)` from 0 to 1, without gradient. The confidence is that of `self_supervision_targets`; chance is `1 / K`
        of a softmax, and a half of a sigmoid.

    Raises:
        DynskipError: if the targets do not fit the logits, or a softmax has only one class.
    """
    chance = 0.5 if activation == "sigmoid" else 1 / frame_logits.shape[-1]
    confidence = torch.exp(-functional.cross_entropy(frame_logits.detach(), targets, activation))
    return ((confidence - chance) / (1 - chance)).clamp(min=0.0)


def worth_loss(
    margins: Tensor, worth: Tensor, saved: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy between gates and what frames are worth, each mistake weighted by what it costs.

    To stop a frame that is worth 1 costs 1. To forward one that is worth 0 costs what stopping would have saved.

    Args:
        margins: `(B, T, N)` forward logit minus stop logit of the gates.
        worth: `(B, T)` from 0 to 1, see `frame_worth`.
        saved: `(N,)` share of a whole frame's cost that is left after each gate.
        mask: `(B, T, N)` boolean, where a gate and the head ran; everywhere by default.
        weights: as in `efficiency_loss`.

    Returns:
        Scalar, mean over videos, frames and gates (over the mask where given; 0 if it is empty).
    """
    if mask is None:
        mask = torch.ones_like(margins, dtype=torch.bool)
    # What is outside the mask may be NaN: replace it before the loss, not after.
    margins, worth = torch.where(mask, margins, 0.0), torch.where(mask, worth[..., None], 0.0)
    losses = worth * F.softplus(-margins) + (1 - worth) * saved.to(margins) * F.softplus(margins)
    return functional.masked_mean(losses, functional.weighed(mask, weights))


class WorthLoss(nn.Module):
    """Teach every gate whether the head will name the truth from this frame. Needs no labels of frames.

    The thesis' losses hardly reach the first gates: a decision there is judged by what all later gates make of the
    frame. This loss tells each gate directly what the frame is worth in the end. A frame that is stopped wrongly costs
    1, one that is forwarded wrongly the share of the cost that is left after the gate. So the first gates stop only
    what they are sure of. It takes the place of self-supervision, `SoFLoss(lookup, beta=1.0)`, and is added to it.

    Args:
        lookup: the cost table, read once as in `EfficiencyLoss`.

    Raises:
        DynskipError: if the table has unknown costs.
    """

    saved: Tensor

    def __init__(self, lookup: FLOPsLookup) -> None:
        super().__init__()
        check_known(lookup)
        self.register_buffer("saved", (lookup.remaining / lookup.total).float(), persistent=False)

    def forward(self, output: SkipOutput, targets: Tensor) -> Tensor:
        """Return the scalar loss of an output against `(B,)` class indices or `(B, K)` rows."""
        check_table(len(self.saved), output)
        assert output.gate_logits is not None  # the output of a whole model has them
        ran = output.evaluated & ~output.frame_logits.isnan().any(-1, keepdim=True)
        worth = frame_worth(output.frame_logits, targets, output.activation)
        return worth_loss(margins(output.gate_logits), worth, self.saved, ran, output.weights)

    def extra_repr(self) -> str:
        """Show what is left after each gate."""
        return f"saved {', '.join(f'{share:.3f}' for share in self.saved.tolist())}"
