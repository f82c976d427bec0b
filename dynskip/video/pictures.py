"""Pictures as the frames of a video: folders of extracted frames, and still pictures."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dynskip.video.causes import explain
from dynskip.video.source import FrameSource, VideoError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_WHITE = 65535  # of grey pictures of 16 bits
# A date and time, or seconds since 1970 with a fraction: each frame has another one before its last digits.
_TIME = re.compile(
    r"(.*?)(\d{4}([-_.]?)[01]\d\3[0-3]\d[-_.T ]?[0-2]\d([-_.:]?)[0-5]\d\4[0-5]\d(?:[-_.,]\d+)?|\d{9,}\.\d+)", re.DOTALL
)


class Pictures(FrameSource):
    """Pictures as the frames of a video, in the given order."""

    one_pass = ""

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
    """List a folder's extracted frames in order.

    Their names end in a number (`image_00001.jpg`, `img_1.png`, `00001.jpg`), are a number of seconds
    (`1700000000.040.png`), or end in a date and time (`cam_2026-11-26_10-30-05.jpg`).

    Args:
        folder: where they are. Files that are no pictures, and TSN's optical flow, are left out.

    Returns:
        The pictures.

    Raises:
        VideoError: if there are none, they are of several kinds, or two have the same number.
        MachineError: if this machine cannot read the folder.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_file())
    except OSError as error:
        raise explain(error, folder) from error
    files = [folder / name for name in names if not name.startswith("flow")]
    files = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES and re.search(r"\d$", file.stem)]
    if not files:
        raise VideoError(f"{folder}: holds no pictures. Expected one video's frames, such as image_00001.jpg.")
    if all(re.fullmatch(r"\d+\.\d+", file.stem) for file in files):
        return _in_order(folder, files, lambda stem: ("", Decimal(stem)))
    for split in (_number, _time):
        if len({split(file.stem)[0] for file in files}) == 1:
            return _in_order(folder, files, split)
    kinds = {_number(file.stem)[0]: file.name for file in files}
    raise VideoError(
        f"{folder}: holds pictures of {len(kinds)} kinds, such as {', '.join(list(kinds.values())[:3])}. Expected one "
        "video's frames, such as image_00001.jpg."
    )


def _number(stem: str) -> tuple[str, Any]:
    """Split a name that ends in digits into what is before its number, and the number."""
    number = re.findall(r"\d+", stem)[-1]
    return stem.removesuffix(number), int(number)


def _time(stem: str) -> tuple[str, Any]:
    """Split a name into what is before its time, and the time; one without a time is a kind of its own."""
    match = _TIME.fullmatch(stem)
    return (match[1], re.sub(r"\D", "", match[2])) if match else (stem, "")


def _in_order(folder: Path, files: Sequence[Path], split: Callable[[str], tuple[str, Any]]) -> list[Path]:
    placed: dict[Any, Path] = {}
    for file in files:
        twin = placed.setdefault(split(file.stem)[1], file)
        if twin is not file:
            raise VideoError(
                f"{folder}: {twin.name} and {file.name} have the same number. Expected the frames of one video; move "
                "the others to a folder of their own."
            )
    return [placed[place] for place in sorted(placed)]


def _read_picture(file: Path, short_side: int) -> np.ndarray:
    try:
        with Image.open(file) as stored:
            picture = _as_rgb(_upright(stored), file)
            scale = short_side / min(picture.size)
            width, height = (max(round(side * scale), 1) for side in picture.size)
            return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    except VideoError:
        raise
    # PIL raises SyntaxError for some damaged files.
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        raise explain(error, file, "picture") from error


def _upright(picture: Image.Image) -> Image.Image:
    """Turn a picture as its camera was held, which its EXIF notes tell."""
    picture.load()
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # damaged notes fail in any way, and are no reason to lose the picture
        return picture


def _as_rgb(picture: Image.Image, file: Path) -> Image.Image:
    """Return 8 bits of red, green and blue. What is transparent shows black, as video players show it."""
    if picture.mode.startswith("I"):  # grey of 16 bits, which older versions of Pillow keep as 32
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > _WHITE:
            raise VideoError(
                f"{file}: its pixels (mode {picture.mode}) go from {values.min()} to {values.max()}; expected 0 to "
                f"{_WHITE}. Scale them to 8 bits first."
            )
        grey = (values * 255 + _WHITE // 2) // _WHITE
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise VideoError(
            f"{file}: is of mode F, numbers whose white is not known. Scale its pixels to 8 bits (mode L) first."
        )
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture).convert("RGB")
    return picture.convert("RGB")
