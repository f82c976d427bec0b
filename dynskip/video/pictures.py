"""Pictures as the frames of a video: folders of extracted frames, and still pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dynskip.video.source import FrameSource, VideoError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Pictures(FrameSource):
    """Pictures as the frames of a video, in the given order."""

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self.path, self.files = path, files

    def __str__(self) -> str:
        return str(self.path)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, numbers: Sequence[int], short_side: int) -> list[np.ndarray]:
        """Read the pictures of these numbers."""
        return [_read_picture(self.files[number], short_side) for number in numbers]


def list_pictures(folder: Path) -> list[Path]:
    """List a folder's extracted frames in order: `image_00001.jpg`, `img_00001.jpg`, `00001.jpg`, ..."""
    numbered: dict[str, dict[int, Path]] = {}
    for file in folder.iterdir():
        match = re.fullmatch(r"(.*?)(\d+)", file.stem)
        if match and file.suffix.lower() in PICTURE_SUFFIXES and not match[1].startswith("flow"):  # TSN's optical flow
            numbered.setdefault(match[1], {})[int(match[2])] = file
    if len(numbered) != 1:
        found = "no pictures" if not numbered else f"pictures of several kinds ({', '.join(sorted(numbered))})"
        raise VideoError(f"{folder}: holds {found}. Expected one video's frames, such as image_00001.jpg.")
    (frames,) = numbered.values()
    return [frames[number] for number in sorted(frames)]


def _read_picture(file: Path, short_side: int) -> np.ndarray:
    try:
        with Image.open(file) as picture:
            scale = short_side / min(picture.size)
            width, height = (max(round(side * scale), 1) for side in picture.size)
            return np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
    except FileNotFoundError:
        raise VideoError(f"{file}: no such file.") from None
    except (OSError, ValueError, SyntaxError) as error:  # PIL raises SyntaxError for some damaged files
        raise VideoError(f"{file}: not a readable picture ({error}). Extract this video's frames again.") from error
