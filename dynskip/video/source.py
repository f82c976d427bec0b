"""Frame sources: where the frames of one video come from."""

from __future__ import annotations

import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from dynskip.errors import DynskipError

SIZES_DIFFER = ": its frames have different sizes. Extract or encode them in one size."


class VideoError(DynskipError):
    """A file or folder that gives no frames."""


class FrameSource(ABC):
    """The frames of one video. Subclass it to read frames from anywhere else.

    The length may be an estimate until `read` has been called: headers of video files are often wrong. Whoever picks
    frames by the length picks again where reading has changed it, as `sample_frames` does.

    Attributes:
        damage: what of the video is lost, as far as it has been read; empty where nothing is.
        one_pass: why the video is read as a whole, whichever frames are wanted; empty where single frames can be read.
            A source of your own that reads single frames at little cost, and whose length is exact, sets it to "".
        decoded: frames that have been decoded, those included that others needed; 0 where that is not counted.
    """

    damage: str = ""
    one_pass: str = "its source reads all frames at once"
    decoded: int = 0

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

    def read_each(self, numbers: Sequence[int], short_side: int) -> Iterator[np.ndarray]:
        """Give some frames one by one; where `one_pass` is empty, a frame is read when it is asked for.

        Args:
            numbers: which frames, in any order.
            short_side: as in `read`.

        Yields:
            A picture for each number, as `read` returns it.

        Raises:
            VideoError: as `read`.
        """
        if not self.one_pass:
            for number in numbers:
                yield from self.read([number], short_side)
            return
        chosen = sorted(set(numbers))
        found = dict(zip(chosen, self.read(chosen, short_side), strict=False))
        for number in numbers:
            yield found[number]

    def check(self) -> str:
        """Read the video from start to end; return what of it is lost, empty where nothing is.

        Raises:
            VideoError: if it cannot be read.
        """
        sample_frames(self, 1, 32)
        return self.damage


def notes_on(source: FrameSource) -> list[str]:
    """Say what is worth telling of a video that was read: what is lost, and why it was read in one pass."""
    one_pass = source.one_pass and f"was decoded from its start, since {source.one_pass}"
    return [note for note in (source.damage, one_pass) if note]


def spread(count: int, num_frames: int, rng: random.Random | None = None) -> list[int]:
    """Return numbers of frames spread evenly over a video of `count` frames, as `sample_frames` reads them."""
    offsets = [rng.random() if rng else 0.5 for _ in range(num_frames)]
    return [int(count / num_frames * (i + offset)) for i, offset in enumerate(offsets)]


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
        VideoError: if frames cannot be read, there are none, or their sizes differ. A warning tells what is damaged.
    """
    frames = read_spread(source, num_frames, short_side, rng)
    if source.damage:
        warnings.warn(f"{source}: {source.damage}.", stacklevel=2)
    return frames


def read_spread(source: FrameSource, num_frames: int, short_side: int, rng: random.Random | None = None) -> np.ndarray:
    """As `sample_frames`, without a warning: for callers who tell the damage themselves."""
    state, count = rng.getstate() if rng else None, -1
    while count != len(source):
        count = len(source)
        if rng and state:
            rng.setstate(state)  # the same draws, for another length
        numbers = spread(count, num_frames, rng)
        chosen = sorted(set(numbers)) if count else []
        frames = dict(zip(chosen, source.read(chosen, short_side), strict=False))
    if not count:
        raise VideoError(f"{source} holds no frame. Expected at least one picture.")
    if len({frame.shape for frame in frames.values()}) > 1:
        raise VideoError(f"{source}{SIZES_DIFFER}")
    return np.stack([frames[number] for number in numbers])
