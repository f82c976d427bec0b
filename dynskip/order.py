"""Frame orders: in which order the frames of a stored video are looked at.

A model looks at the frames one after the other, in *steps*. In time, step 3 is frame 3. In another order, it is another
frame. Gates, running answers and early ends follow the steps; what a call returns is in the video's own times.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dynskip._check import present, settings_of
from dynskip.errors import DynskipError
from dynskip.gates import parts_of
from dynskip.output import EncodedVideo, SkipOutput

# What an output says of each frame.
_OF_FRAMES = ("forward", "used", "stopped_at", "frame_logits", "gate_logits", "inner_logits", "evaluated")


class FrameOrder(nn.Module):
    """Base of frame orders, and the contract of yours: `forward` tells which frame comes in which step.

    It depends on the number of frames and on the order's own settings alone. Keep each argument of the constructor as
    an attribute of the same name: saved models are rebuilt from them.
    """

    def __init__(self) -> None:  # without the arguments that `nn.Module` takes, which no order keeps
        super().__init__()

    def forward(self, num_frames: int) -> Tensor:
        """Order the frames of a video.

        Args:
            num_frames: number of frames `T`, at least 1.

        Returns:
            `(T,)` int64, the number of the frame of each step: every number from 0 to `T - 1`, once.
        """
        raise NotImplementedError


class CoarseToFine(FrameOrder):
    """The middle of a video, its ends, then what lies between, ever finer: FrameExit's order for videos of any length.

    First come the middle frame `T // 2`, the first and the last one. Then the video is cut into 4 equal parts, then
    into 8, 16 and so on, while a part has two frames or more. Each time, the first frame of each part is looked at.
    Last come all other frames. Each time it goes from the middle outwards, the earlier of two equally far ones first,
    and frames that were looked at are left out. For ten frames this is FrameExit's 5, 0, 9, 2, 7, 4, 6, 3, 8, 1.

    Reference:
        Ghodrati et al., "FrameExit: conditional early exiting for efficient video recognition", CVPR 2021.
    """

    def forward(self, num_frames: int) -> Tensor:
        """Order the frames of a video; see `FrameOrder.forward`."""
        found, parts = [num_frames // 2, 0, num_frames - 1], 4
        while 2 * parts <= num_frames:
            found += [num_frames * part // parts for part in _outwards(parts)]
            parts *= 2
        return torch.tensor(list(dict.fromkeys(found + _outwards(num_frames))))


class RandomOrder(FrameOrder):
    """A random order, the same for all videos of as many frames.

    Args:
        seed: different seeds draw differently.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def forward(self, num_frames: int) -> Tensor:
        """Order the frames of a video; see `FrameOrder.forward`."""
        # Of the standard library, so that it can be repeated without torch.
        source = random.Random(str(self.seed))
        keys = [source.random() for _ in range(num_frames)]
        return torch.tensor(sorted(range(num_frames), key=keys.__getitem__))

    def extra_repr(self) -> str:
        """Show the seed."""
        return f"seed={self.seed}"


def check_order(order: Any, trained_in: str | None, gates: Sequence[nn.Module]) -> None:
    """Refuse what is no frame order, and tell where gates with memory were trained in another one."""
    if not isinstance(order, FrameOrder | None):
        raise DynskipError(f"order={order!r} is no frame order; give a FrameOrder such as CoarseToFine(), or None.")
    asked = settings_of(order)
    if trained_in not in ("unknown", asked) and any(parts_of(gate).has_memory for gate in gates):
        warnings.warn(
            f"The gates have memory and were trained on frames in the order {trained_in or 'of time'}. Now they see "
            f"them in the order {asked or 'of time'}; train them again in it, or set the order back.",
            stacklevel=4,
        )


def steps(order: FrameOrder | None, batch: int, frames: int, lengths: Tensor | None) -> Tensor | None:
    """Return which frame each step looks at, `(B, T)` on the host; `None` in time. Padding stays last.

    Args:
        order: the order; `None` in time.
        batch: videos `B`.
        frames: frames `T` of the batch, padding included.
        lengths: `(B,)` frames of each video, on the host; `None` for all.
    """
    if order is None:
        return None
    table = torch.arange(frames).repeat(batch, 1)
    lengths = torch.full((batch,), frames) if lengths is None else lengths
    for length in set(lengths.tolist()):
        table[lengths == length, :length] = _checked(order, length)
    return table


def in_steps(values: Tensor, table: Tensor | None) -> Tensor:
    """Arrange values of frames, `(B, T, ...)` in a video's own times, by the `(B, T)` table that `steps` returned."""
    if table is None:
        return values
    index = table.to(values.device, non_blocking=True)
    return torch.take_along_dim(values, index.view(index.shape + (1,) * (values.ndim - 2)), 1)


def looked_at(order: FrameOrder | None, encoded: EncodedVideo) -> tuple[EncodedVideo, Tensor | None]:
    """Arrange stored features by an order; return them, and the table that `steps` returned.

    Padding shows its video's first frame, so that all that is made of it, and left out, is finite.
    """
    batch, frames, _ = encoded.frame_logits.shape
    lengths = None if encoded.lengths is None else torch.as_tensor(encoded.lengths).cpu()
    table = steps(order, batch, frames, lengths)
    shown, own = table, encoded.lengths
    if lengths is not None:
        own = lengths.to(encoded.frame_logits.device, non_blocking=True)
        shown = torch.where(present(lengths, frames), torch.arange(frames) if table is None else table, 0)
    pooled = tuple(in_steps(features, shown) for features in encoded.pooled)
    frame_logits = in_steps(encoded.frame_logits, shown)
    return replace(encoded, pooled=pooled, frame_logits=frame_logits, lengths=own), table


def in_time(output: SkipOutput, table: Tensor | None) -> SkipOutput:
    """Put the output of a pass in steps back into the videos' own times."""
    if table is None:
        return output
    back, step = table.argsort(1), output.fallback_frame
    values = {name: getattr(output, name) for name in _OF_FRAMES}
    moved: dict[str, Any] = {name: in_steps(value, back) for name, value in values.items() if value is not None}
    frame = table.to(step.device, non_blocking=True).gather(1, step.clamp(min=0)[:, None]).squeeze(1)
    return replace(output, **moved, fallback_frame=torch.where(step < 0, -1, frame))


def _checked(order: FrameOrder, frames: int) -> Tensor:
    found = order(frames)
    if not isinstance(found, Tensor) or not torch.equal(found.cpu().sort().values, torch.arange(frames)):
        shown = found.tolist() if isinstance(found, Tensor) else found
        raise DynskipError(
            f"{type(order).__name__} gives {shown} for a video of {frames} frames. A frame order returns a tensor with "
            f"every number from 0 to {frames - 1} once."
        )
    return found.cpu()


def _outwards(count: int) -> list[int]:
    return sorted(range(count), key=lambda n: (abs(n - count // 2), n))
