"""How decoded frames become a network's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2 as T
from torch import Tensor

from dynskip.errors import DynskipError


@dataclass(frozen=True)
class Preprocessing:
    """How frames become the network's input.

    Attributes:
        size: height and width of the frames in pixels.
        num_frames: frames of a clip.
        mean: mean of each channel, of pixels in [0, 1].
        std: standard deviation of each channel.
    """

    size: int = 168
    num_frames: int = 16
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.size < 1 or self.num_frames < 1:
            raise DynskipError(f"A clip of {self.num_frames} frames of {self.size} pixels is empty; give at least 1.")
        if not all(0 < std < float("inf") for std in self.std):
            raise DynskipError(f"std={self.std} has to hold a finite number above 0 for each channel.")

    @classmethod
    def of(cls, model: Any) -> Preprocessing:
        """Read what a saved model says of its input (`model.preprocessing`)."""
        known = model.preprocessing or {}
        return cls(
            known.get("input_size", model.backbone.input_size)[-1],
            known.get("num_frames", cls.num_frames),
            tuple(known.get("mean", cls.mean)),
            tuple(known.get("std", cls.std)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return values for `model.preprocessing`, which are saved with the model."""
        return {
            "input_size": (3, self.size, self.size),
            "num_frames": self.num_frames,
            "mean": self.mean,
            "std": self.std,
        }

    @property
    def short_side(self) -> int:
        """Pixels of the shorter side before cropping."""
        return round(self.size * 8 / 7)

    @property
    def clip_bytes(self) -> int:
        """Bytes of a clip before it is normalised."""
        return self.num_frames * 3 * self.size**2

    def crop(self, frames: np.ndarray, training: bool = False) -> Tensor:
        """Crop frames to squares: the middle, or in training the same random part of each, at random mirrored.

        Args:
            frames: `(T, H, W, 3)` uint8.
            training: whether to crop at random.

        Returns:
            `(T, 3, size, size)` uint8.
        """
        # Torch warns of arrays that may not be written to, as Pillow's.
        video = torch.from_numpy(frames if frames.flags.writeable else frames.copy()).permute(0, 3, 1, 2)
        if not training:
            return T.functional.center_crop(video, [self.size, self.size]).contiguous()
        augment = T.Compose(
            [T.RandomResizedCrop(self.size, scale=(0.5, 1.0), antialias=True), T.RandomHorizontalFlip()]
        )
        return augment(video)

    def normalize(self, video: Tensor) -> Tensor:
        """Scale uint8 pictures `(..., 3, H, W)` to what the network was trained on."""
        scaled = T.functional.to_dtype(video, torch.float32, scale=True)
        return T.functional.normalize(scaled, list(self.mean), list(self.std))
