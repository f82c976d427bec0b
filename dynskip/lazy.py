"""Lazy videos: frames are loaded when a model asks for them, so what it never looks at is never loaded."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Loaded:
    """What loading the frames of one video took since a run began.

    Attributes:
        frames: frames that the model asked for.
        decoded: frames that were decoded for it, those included that others needed.
        milliseconds: of the thread that decoded them.
    """

    frames: int
    decoded: int = 0
    milliseconds: float = 0.0


class LazyVideo(ABC):
    """Base of videos that are loaded frame by frame, and the contract of yours. Models take one in a tensor's place.

    `dynskip.video.LazyClips` reads video files this way. A subclass sets `shape` and writes `load`; it may also write
    `expect`, `loaded` and `rows`.

    Attributes:
        shape: `(B, T, C, H, W)`.
        dtype: of the frames.
        asked: for each video, the frames that were asked for since a run began.
        waited: seconds that the caller waited for frames since a run began.
        failed: why frames could not be loaded, by row; such a video is left out of an evaluation.
    """

    dtype: torch.dtype = torch.float32

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = torch.Size(shape)
        self.failed: dict[int, Exception] = {}
        self._reset()

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def load(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """Load frames.

        Args:
            rows: `(M,)` int64 on the host, the video of each frame.
            numbers: `(M,)` int64 on the host, its number in the video.

        Returns:
            `(M, C, H, W)` normalised frames, on any device.
        """

    def expect(self, order: Tensor) -> None:  # noqa: B027 (it need not be written)
        """Hear in which order a run will ask for frames, so that some can be loaded ahead.

        Args:
            order: `(B, T)` numbers of frames on the host. A video that ends early asks for the first ones only.
        """

    def loaded(self) -> list[Loaded]:
        """Say what loading took since a run began, for each video."""
        return [Loaded(len(numbers)) for numbers in self.asked]

    def rows(self, rows: Sequence[int]) -> LazyVideo:
        """Return some of the videos."""
        raise NotImplementedError(f"{type(self).__name__} cannot be taken apart: write its method `rows`.")

    def begin(self, order: Tensor) -> None:
        """Begin a run: what is counted, is counted from here on."""
        self._reset()
        self.expect(order)

    def take(self, rows: Tensor, numbers: Tensor, device: Any) -> Tensor:
        """Load frames onto a device, and count them."""
        begin = time.perf_counter()
        frames: Tensor = self.load(rows, numbers).to(device)
        self.waited += time.perf_counter() - begin
        for row, number in zip(rows.tolist(), numbers.tolist(), strict=True):
            self.asked[row].add(number)
        return frames

    def whole(self, lengths: Tensor | None, device: Any) -> Tensor:
        """Load all frames; padding is zeros."""
        batch, frames = self.shape[:2]
        everything = torch.arange(frames).expand(batch, -1)
        self.begin(everything)
        ends = torch.full((batch,), frames) if lengths is None else lengths
        rows, numbers = (everything < ends[:, None]).nonzero().unbind(1)
        found = self.take(rows, numbers, device)
        video = found.new_zeros(self.shape)
        return video.index_put((rows.to(device), numbers.to(device)), found)

    def _reset(self) -> None:
        self.asked: list[set[int]] = [set() for _ in range(self.shape[0])]
        self.waited = 0.0
