"""Videos of which a model decodes only what it looks at, a few frames ahead, in threads of their own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynskip.errors import DynskipError
from dynskip.lazy import LazyVideo, Loaded
from dynskip.video.preprocessing import Preprocessing
from dynskip.video.source import SIZES_DIFFER, FrameSource, VideoError, read_spread, spread

AHEAD = 4  # frames of a video that are decoded before they are asked for


class LazyClips(LazyVideo):
    """Clips of frames spread over videos, as `Clips` gives them, but decoded when a model asks for them.

    Results are those of frames that are decoded up front. Frames are decoded in threads, `ahead` of the model, in no
    more threads than there are cores, over all clips of the process. A frame is scaled and cropped at once, and only
    that is kept. Close clips that are done, or use them in a `with` block.

    Args:
        sources: the videos.
        prep: how frames become input.
        device: where the model is.
        ahead: frames of a video that are decoded before they are asked for.
        dtype: the model's.

    Raises:
        VideoError: if a video cannot be opened or holds no frame. Later, if a frame that the model needs cannot be
            decoded.
    """

    def __init__(
        self,
        sources: Sequence[FrameSource],
        prep: Preprocessing,
        device: str | torch.device = "cpu",
        ahead: int = AHEAD,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if ahead < 0:
            raise DynskipError(f"ahead={ahead} is out of range; give at least 0 frames.")
        self._readers = [_Reader(source, prep, ahead) for source in sources]
        self._make(prep, device, dtype)

    def _make(self, prep: Preprocessing, device: str | torch.device, dtype: torch.dtype) -> None:
        self.prep, self.device, self.dtype = prep, device, dtype
        super().__init__((len(self._readers), prep.num_frames, 3, prep.size, prep.size))

    @property
    def sources(self) -> list[FrameSource]:
        """The videos; they tell what was damaged, and whether one was read in one pass."""
        return [reader.source for reader in self._readers]

    def expect(self, order: Tensor) -> None:
        """Start to decode in the order in which a run will ask for frames; see `LazyVideo.expect`."""
        for reader, row in zip(self._readers, order.tolist(), strict=True):
            reader.expect(row)

    def load(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """Return normalised frames; see `LazyVideo.load`.

        Raises:
            VideoError: if one cannot be decoded.
        """
        wanted = list(zip(rows.tolist(), numbers.tolist(), strict=True))
        for row in set(rows.tolist()):
            self._readers[row].aim([number for other, number in wanted if other == row])
        found = []
        for row, number in wanted:
            try:
                found.append(self._readers[row].get(number))
            except VideoError as error:
                self.failed[row] = error
                raise
        return self.prep.normalize(torch.stack(found).to(self.device)).to(self.dtype)

    def loaded(self) -> list[Loaded]:
        """Say what decoding took since a run began; see `LazyVideo.loaded`."""
        return [reader.cost(asked) for reader, asked in zip(self._readers, self.asked, strict=True)]

    @classmethod
    def joined(cls, clips: Sequence[LazyClips]) -> LazyClips:
        """Return several clips of the same kind as one batch, which shares what they have decoded."""
        batch = object.__new__(cls)
        batch._readers = [reader for each in clips for reader in each._readers]
        batch._make(clips[0].prep, clips[0].device, clips[0].dtype)
        return batch

    def rows(self, rows: Sequence[int]) -> LazyClips:
        """Return some of the videos, which share what has been decoded."""
        some = object.__new__(type(self))
        some._readers = [self._readers[row] for row in rows]
        some._make(self.prep, self.device, self.dtype)
        return some

    def pictures(self, row: int) -> np.ndarray:
        """Return the frames of a video that have been decoded, `(T, H, W, 3)` uint8; the others are black."""
        shown = np.zeros((self.prep.num_frames, self.prep.size, self.prep.size, 3), np.uint8)
        for number, frame in self._readers[row].decoded().items():
            shown[number] = frame.permute(1, 2, 0).numpy()
        return shown

    def close(self) -> None:
        """Stop decoding, and close the files."""
        for reader in self._readers:
            reader.close()

    def __enter__(self) -> LazyClips:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lazy_frames(
    source: FrameSource, prep: Preprocessing, device: str | torch.device = "cpu", ahead: int = 0
) -> Iterator[Tensor]:
    """Give the frames of a clip one by one, as `serve_streams` takes them; each is decoded when it is asked for.

    Args:
        source: the video.
        prep: how frames become input.
        device: where the model is.
        ahead: frames that are decoded before they are asked for, in a thread.

    Yields:
        `(3, size, size)` normalised frames.

    Raises:
        VideoError: if a frame cannot be decoded.
    """
    with LazyClips([source], prep, device, ahead) as clip:
        clip.begin(torch.arange(prep.num_frames)[None])
        for number in range(prep.num_frames):
            yield clip.load(torch.tensor([0]), torch.tensor([number]))[0]


class _Reader:
    """Decodes the frames of one clip in threads of the pool, one after the other. A frame's place is that in the clip.

    Whoever holds `_changed` may change what is below it. While `_busy`, the thread alone touches `_stream`.
    """

    def __init__(self, source: FrameSource, prep: Preprocessing, ahead: int) -> None:
        self.source, self._prep, self._ahead = source, prep, ahead
        # What goes by one number is decoded once. Sources that are read as a whole choose their frames themselves.
        self._whole = bool(source.one_pass)
        count = len(source)
        if not count and not self._whole:
            raise VideoError(f"{source} holds no frame. Expected at least one picture.")
        self._numbers = list(range(prep.num_frames)) if self._whole else spread(count, prep.num_frames)
        self._changed = threading.Condition()
        self._frames: dict[int, Tensor] = {}
        self._costs: dict[int, Loaded] = {}
        self._order: list[int] = []  # numbers to decode
        self._next = self._target = 0
        self._busy = self._closed = False
        self._error: BaseException | None = None
        self._shape: tuple[int, ...] | None = None
        self._stream: Any = None

    def expect(self, places: Sequence[int]) -> None:
        """Decode in this order, if that is not what it does already."""
        order = list(dict.fromkeys(self._numbers[place] for place in places))
        with self._changed:
            if self._error is None and [n for n in order if n not in self._frames] == self._order[self._next :]:
                self._aim(self._next)
                return
            while self._busy:
                self._target = 0
                self._changed.wait()
            self._restart([number for number in order if number not in self._frames])

    def aim(self, places: Sequence[int]) -> None:
        """Decode these frames, and a few ahead."""
        with self._changed:
            wanted = dict.fromkeys(self._numbers[place] for place in places)
            missing = [number for number in wanted if number not in self._frames]
            if not missing:
                return
            if self._error is None and set(missing) <= set(self._order[self._next :]):
                self._aim(max(self._order.index(number) for number in missing) + 1)
                return
            if self._error is not None and self._order[self._next] in missing:
                return  # `get` raises it
            while self._busy:
                self._target = 0
                self._changed.wait()
            self._restart(missing + [number for number in self._order[self._next :] if number not in missing])
            self._aim(len(missing))

    def get(self, place: int) -> Tensor:
        """Return a frame `(3, size, size)`, uint8, once it is decoded."""
        number = self._numbers[place]
        with self._changed:
            while number not in self._frames and (self._busy or self._error is None):
                self._changed.wait()
            if number in self._frames:
                return self._frames[number]
            assert self._error is not None
            raise self._error

    def cost(self, places: set[int]) -> Loaded:
        """Say what decoding some frames took."""
        with self._changed:
            costs = [self._costs[n] for n in {self._numbers[place] for place in places} if n in self._costs]
        return Loaded(len(places), sum(c.decoded for c in costs), sum(c.milliseconds for c in costs))

    def decoded(self) -> dict[int, Tensor]:
        """Return all frames that are there."""
        with self._changed:
            return {place: self._frames[n] for place, n in enumerate(self._numbers) if n in self._frames}

    def close(self) -> None:
        with self._changed:
            self._closed = True
            while self._busy:
                self._changed.wait()
            self._end_stream()

    def _restart(self, order: list[int]) -> None:
        self._end_stream()
        self._order, self._next, self._target, self._error = order, 0, 0, None
        self._aim(0)

    def _aim(self, count: int) -> None:
        """Decode so many of the ordered frames, and a few ahead."""
        self._target = max(self._target, min(count + self._ahead, len(self._order)))
        if self._next < self._target and not self._busy and self._error is None and not self._closed:
            self._busy = True
            _pool().submit(self._step)

    def _end_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _step(self) -> None:
        """Decode the next frame, in a thread. Each frame is a task of its own, so that videos take turns."""
        number, before, begin = self._order[self._next], self.source.decoded, time.thread_time()
        error = frame = None
        try:
            if self._stream is None:
                self._stream = self._read(self._order[self._next :])
            picture = next(self._stream)
            if self._shape not in (None, picture.shape):
                raise VideoError(f"{self.source}{SIZES_DIFFER}")
            self._shape = picture.shape
            frame = self._prep.crop(picture[None])[0]
        except BaseException as caught:
            error = caught
        milliseconds = 1000 * (time.thread_time() - begin)
        with self._changed:
            if frame is None:
                self._error, self._busy = error, False
            else:
                self._frames[number] = frame
                self._costs[number] = Loaded(1, self.source.decoded - before, milliseconds)
                self._next += 1
                if self._next == len(self._order):
                    self._end_stream()
                self._busy = self._next < self._target and not self._closed
                if self._busy:
                    _pool().submit(self._step)
            self._changed.notify_all()

    def _read(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        if not self._whole:
            yield from self.source.read_each(numbers, self._prep.short_side)
            return
        frames = read_spread(self.source, self._prep.num_frames, self._prep.short_side)
        for number in numbers:
            yield frames[number]


_POOLS: dict[int, ThreadPoolExecutor] = {}  # by process: threads do not survive a fork


def _pool() -> ThreadPoolExecutor:
    """Return the threads that decode for all clips: one a core."""
    if (pool := _POOLS.get(os.getpid())) is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        pool = _POOLS[os.getpid()] = ThreadPoolExecutor(cores, "decode")
    return pool
