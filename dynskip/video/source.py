"""Frame sources: where the frames of one video come from."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from dynskip.errors import DynskipError


class VideoError(DynskipError):
    """A file or folder that gives no frames."""


class FrameSource(ABC):
    """The frames of one video. Subclass it to read frames from anywhere else.

    The length may be an estimate until `read` has been called: headers of video files are often wrong. Whoever picks
    frames by the length picks again where reading has changed it, as `sample_frames` does.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of frames."""

    @abstractmethod
    def read(self, numbers: Sequence[int], short_side: int) -> list[np.ndarray]:
        """Return some frames.

        Args:
            numbers: which frames, counted from 0; in ascending order, each once.
            short_side: pixels to scale the shorter side to.

        Returns:
            A picture `(H, W, 3)`, uint8 RGB, for each number below the true number of frames.

        Raises:
            VideoError: if frames cannot be read.
        """


def sample_frames(
    source: FrameSource, num_frames: int, short_side: int, rng: random.Random | None = None
) -> np.ndarray:
    """Read frames spread evenly over a video.

    Args:
        source: the video.
        num_frames: frames to return; a shorter video repeats some.
        short_side: pixels to scale the shorter side to.
        rng: draw each frame at random from its part of the video; by default the middle of the part.

    Returns:
        `(T, H, W, 3)` uint8 RGB frames.

    Raises:
        VideoError: if frames cannot be read, there are none, or their sizes differ.
    """
    offsets = [rng.random() if rng else 0.5 for _ in range(num_frames)]
    count = -1
    while count != len(source):
        count = len(source)
        numbers = [int(count / num_frames * (i + offset)) for i, offset in enumerate(offsets)]
        chosen = sorted(set(numbers)) if count else []
        frames = dict(zip(chosen, source.read(chosen, short_side), strict=False))
    if not count:
        raise VideoError(f"{source} holds no frame. Expected at least one picture.")
    if len({frame.shape for frame in frames.values()}) > 1:
        raise VideoError(f"{source}: its frames have different sizes. Extract or encode them in one size.")
    return np.stack([frames[number] for number in numbers])
