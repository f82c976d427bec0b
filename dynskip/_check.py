"""Checks of what users pass in, with the messages that tell them what to do about it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynskip.backbone import StagedBackbone
from dynskip.errors import DynskipError


def check_video(video: Any, backbone: StagedBackbone) -> None:
    """Refuse what is no batch `(B, T, C, H, W)` of normalised videos for this backbone."""
    channels = backbone.input_size[0]
    _check_floating(video, "video")
    if video.ndim != 5 or video.shape[2] != channels:
        raise DynskipError(
            f"A video batch must have shape (B, T, {channels}, H, W); got {tuple(video.shape)}. Add a batch "
            "dimension with `video[None]` to a single video, and keep channels before height and width."
        )
    if 0 in video.shape:
        raise DynskipError(f"The video batch is empty: shape {tuple(video.shape)}. Give at least one video and frame.")
    _check_dtype(video, backbone, "video")
    if not _all_finite(video):
        bad = (~video.isfinite()).flatten(2).any(-1).nonzero().tolist()
        raise DynskipError(
            f"The video has NaN or infinite values in {len(bad)} frames, the first being frame {bad[0][1]} of "
            f"video {bad[0][0]}. Check decoding and normalisation."
        )


def check_frames(frames: Any, backbone: StagedBackbone, batch: int) -> None:
    """Refuse what is not one normalised frame for each of `batch` videos, `(B, C, H, W)`."""
    channels = backbone.input_size[0]
    _check_floating(frames, "frame")
    if frames.ndim != 4 or frames.shape[:2] != (batch, channels) or 0 in frames.shape:
        wanted = f"({channels}, H, W)" if batch == 1 else f"({batch}, {channels}, H, W), one frame a video"
        got = tuple(frames.shape[1:] if batch == 1 and frames.ndim > 1 and len(frames) == 1 else frames.shape)
        raise DynskipError(f"A frame must have shape {wanted}; got {got}. Keep channels before height and width.")
    _check_dtype(frames, backbone, "frame")
    if not _all_finite(frames):
        bad = (~frames.isfinite()).flatten(1).any(-1).nonzero().flatten().tolist()
        where = "" if batch == 1 else f" of videos {bad}"
        raise DynskipError(f"The frame{where} has NaN or infinite values. Check decoding and normalisation.")


def check_images(images: Any, backbone: StagedBackbone) -> None:
    """Refuse what is no batch `(B, C, H, W)` of normalised images for this backbone."""
    channels = backbone.input_size[0]
    _check_floating(images, "image batch")
    if images.ndim != 4 or images.shape[1] != channels or 0 in images.shape:
        raise DynskipError(
            f"An image batch must have shape (B, {channels}, H, W), with at least one image; got "
            f"{tuple(images.shape)}. Add a batch dimension with `image[None]` to a single image; videos are for "
            "StopOrForward."
        )
    _check_dtype(images, backbone, "image batch")
    if not _all_finite(images):
        bad = (~images.isfinite()).flatten(1).any(-1).nonzero().flatten().tolist()
        raise DynskipError(
            f"The image batch has NaN or infinite values in {len(bad)} images, the first being image {bad[0]}. Check "
            "decoding and normalisation."
        )


def _check_floating(value: Any, name: str) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise DynskipError(
            f"A {name} must be a floating-point tensor of normalised pixels; got {got}. Convert 8-bit frames with "
            f"`{name}.float() / 255`, then subtract the model's mean and divide by its standard deviation."
        )


def _check_dtype(value: Tensor, backbone: StagedBackbone, name: str) -> None:
    weight = next(backbone.parameters(), value)
    if value.dtype != weight.dtype and not torch.is_autocast_enabled(value.device.type):
        raise DynskipError(
            f"The {name} is {value.dtype} and the model {weight.dtype}. Convert one of them, for instance with "
            f"`{name}.to({weight.dtype})`, or run under torch.autocast."
        )


def _all_finite(value: Tensor) -> bool:
    # One reduction tells whether all is well; only where it overflows or is not, look closer.
    return bool(torch.isfinite(value.detach().sum(dtype=torch.float32))) or bool(value.isfinite().all())
