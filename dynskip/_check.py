"""Checks of what users pass in, with the messages that tell them what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynskip.errors import DynskipError

if TYPE_CHECKING:
    from dynskip.backbone import StagedBackbone


class Checked(nn.Module):
    """A module whose settings are checked whenever they are set, at construction and later."""

    def check_setting(self, name: str, value: Any) -> Any:
        """Refuse a value that makes no sense, or return what is to be kept in its place.

        Args:
            name: the attribute that is being set.
            value: its new value.
        """
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self.check_setting(name, value))


def check_positive(value: Any, name: str) -> float:
    """Refuse what is no finite positive number."""
    if not (isinstance(value, int | float) and 0 < value < float("inf")):
        raise DynskipError(
            f"{name}={value} has to be a finite positive number. A schedule that runs over its end gives others."
        )
    return value


def check_eval(model: Any, what: str) -> None:
    """Refuse to skip with a part in training mode: its answers depend on their neighbours and move statistics."""
    for part in running_parts(model):
        if not any(map(_in_training, part.modules())):
            continue
        name = next(name for name, module in part.named_modules() if _in_training(module))
        raise DynskipError(
            f"{what} runs a model in evaluation mode, and {type(part).__name__}{'.' * bool(name)}{name} is in training "
            "mode; call `model.eval()` first."
        )


def running_parts(model: Any) -> list[nn.Module]:
    """Return the parts of a model that run in evaluation."""
    parts = (model.backbone, *getattr(model, "exits", model.gates), model.terminator)
    return [part for part in parts if part is not None]


def _in_training(module: nn.Module) -> bool:
    # Quantised layers know inference alone, and are built with the flag of training.
    return module.training and not type(module).__module__.startswith("torch.ao.nn.quantized")


def check_video(video: Any, backbone: StagedBackbone) -> Tensor:
    """Return a batch `(B, T, C, H, W)` of normalised videos on the backbone's device; refuse what is none."""
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
    return to_device_of(backbone, video)


def check_frames(frames: Any, backbone: StagedBackbone, batch: int) -> Tensor:
    """Return one normalised frame for each of `batch` videos, `(B, C, H, W)`, on the backbone's device.

    Whether it is finite is not looked at, since on a GPU that would wait: see `refuse_not_finite`.
    """
    channels = backbone.input_size[0]
    _check_floating(frames, "frame")
    if frames.ndim != 4 or frames.shape[:2] != (batch, channels) or 0 in frames.shape:
        wanted = f"({channels}, H, W)" if batch == 1 else f"({batch}, {channels}, H, W), one frame a video"
        got = tuple(frames.shape[1:] if batch == 1 and frames.ndim > 1 and len(frames) == 1 else frames.shape)
        raise DynskipError(f"A frame must have shape {wanted}; got {got}. Keep channels before height and width.")
    _check_dtype(frames, backbone, "frame")
    return to_device_of(backbone, frames)


def refuse_not_finite(frames: Tensor, batch: int) -> None:
    """Refuse frames of which some have NaN or infinite values. Waits for the device."""
    if not _all_finite(frames):
        videos = (~frames.isfinite()).flatten(1).any(-1).nonzero().flatten().tolist()
        where = "" if batch == 1 else f" of videos {videos}"
        raise DynskipError(f"The frame{where} has NaN or infinite values. Check decoding and normalisation.")


def to_device_of(module: nn.Module, value: Tensor) -> Tensor:
    """Move a tensor to where a module's parameters are."""
    parameter = next(module.parameters(), None)
    return value if parameter is None or parameter.device == value.device else value.to(parameter.device)


def check_images(images: Any, backbone: StagedBackbone) -> Tensor:
    """Return a batch `(B, C, H, W)` of normalised images on the backbone's device; refuse what is none."""
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
    return to_device_of(backbone, images)


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
