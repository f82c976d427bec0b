"""A folder of decoded frames."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dynskip.video.causes import explain
from dynskip.video.names import stamp
from dynskip.video.opening import open_source
from dynskip.video.outputs import cannot_write
from dynskip.video.source import FrameSource, sample_frames

DECODING = 2  # goes up when the same file gives other frames: what was kept of earlier versions is made again
CHOICES = 3  # frames kept for each one that the network sees: early, middle and late in its part of the video


class FrameCache:
    """Decoded, scaled frames in a folder: one file a video, written whole or not at all, checked when read.

    Args:
        folder: where the files are; made when the first one is written.
        num_frames: frames the network sees; `CHOICES` times as many are kept.
        short_side: pixels of the shorter side.
        opener: how a video is opened.
    """

    def __init__(
        self,
        folder: Path,
        num_frames: int,
        short_side: int,
        opener: Callable[[Path], FrameSource] = open_source,
    ) -> None:
        self.folder, self.num_frames, self.short_side, self.opener = folder, CHOICES * num_frames, short_side, opener
        self.writable = True

    def file(self, path: Path) -> Path:
        """Return the file that holds a video's frames."""
        key = os.fsencode(path.resolve()) + f"|{self.num_frames}|{self.short_side}".encode()
        return self.folder / f"{hashlib.sha256(key).hexdigest()[:32]}.safetensors"

    def read(self, path: Path, picks: Sequence[int]) -> tuple[np.ndarray, int]:
        """Return some of a video's kept frames; decode and keep them if need be.

        Args:
            path: the video.
            picks: which of the kept frames, from 0.

        Returns:
            `(T, H, W, 3)` uint8 frames, and how many frames the video has.

        Raises:
            VideoError: if the video gives no frames.
        """
        made_from = _made_from(path)  # before it is decoded: it may be replaced meanwhile
        if (kept := self._load(path, picks, made_from)) is not None:
            return kept
        source = self.opener(path)
        frames = sample_frames(source, self.num_frames, self.short_side)
        if self.writable:
            self._store(path, frames, len(source), made_from)
        return frames[list(picks)], len(source)

    def _load(self, path: Path, picks: Sequence[int], made_from: str) -> tuple[np.ndarray, int] | None:
        file = self.file(path)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="np") as content:
                notes = content.metadata()
                if notes["source"] != made_from:
                    return None  # the video was replaced
                kept, sums = content.get_slice("frames"), json.loads(notes["checksums"])
                frames = {pick: np.ascontiguousarray(kept[pick]) for pick in set(picks)}
            if any(zlib.crc32(frame.data) != sums[pick] for pick, frame in frames.items()):
                raise ValueError("its checksum is wrong")
            return np.stack([frames[pick] for pick in picks]), int(notes["count"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
            warnings.warn(f"{file} is damaged ({error}); {path} is decoded again.", stacklevel=2)
            return None

    def _store(self, path: Path, frames: np.ndarray, count: int, made_from: str) -> None:
        file = self.file(path)
        part = file.with_suffix(f".{os.getpid()}.part")  # others may write the same entry
        sums = json.dumps([zlib.crc32(frame.data) for frame in frames])
        notes = {"source": made_from, "count": str(count), "checksums": sums}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"frames": frames}, part, notes)
            os.replace(part, file)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            self.writable = False
            warnings.warn(
                str(cannot_write(self.folder, error, "Going on without keeping more; what is there stays good.")),
                stacklevel=2,
            )


def kept_bytes(videos: int, num_frames: int, short_side: int) -> int:
    """Return the bytes that the kept frames of videos take at least; those of wide videos take more.

    Args:
        videos: how many.
        num_frames: frames the network sees.
        short_side: pixels of the shorter side.
    """
    return videos * CHOICES * num_frames * 3 * short_side**2


def _made_from(path: Path) -> str:
    try:
        return f"{DECODING} {stamp(path)}"
    except OSError as error:
        raise explain(error, path) from error
