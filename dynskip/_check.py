"""Checks of what users pass in. The messages say how to fix it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from dynskip.errors import DynskipError
from dynskip.lazy import LazyVideo

if TYPE_CHECKING:
    from dynskip.backbone import StagedBackbone

Lengths: TypeAlias = Tensor | Sequence[int]
Videos: TypeAlias = Tensor | LazyVideo


class Checked(nn.Module):
    """A module that checks its settings whenever they are set."""

    def check_setting(self, name: str, value: Any) -> Any:
        """Refuse a value that makes no sense, or return the value to keep.

        Args:
            name: the attribute that is being set.
            value: its new value.
        """
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self.check_setting(name, value))


def check_positive(value: Any, name: str) -> float:
    """Refuse all but finite positive numbers."""
    if not (isinstance(value, int | float) and value is not True and 0 < value < float("inf")):
        raise DynskipError(
            f"{name}={value} has to be a finite positive number. A schedule that runs past its end may give others."
        )
    return value


def check_share(value: Any, name: str) -> float:
    """Refuse all but numbers from 0 to 1."""
    if not (isinstance(value, int | float) and 0.0 <= value <= 1.0):
        raise DynskipError(f"{name}={value} is out of range; give a number in [0, 1].")
    return value


def check_weight(value: Any, name: str) -> float:
    """Refuse all but 0 and finite positive numbers."""
    if not (isinstance(value, int | float) and 0.0 <= value < float("inf")):
        raise DynskipError(f"{name}={value} is out of range; give a weight, 0 or more.")
    return value


def check_eval(model: Any, what: str) -> None:
    """Refuse to skip while a part is in training mode: a frame's answer would depend on its batch."""
    for part in running_parts(model):
        for name, module in part.named_modules():
            # Quantised layers only do inference, but are built with `training` set.
            if module.training and not type(module).__module__.startswith("torch.ao.nn.quantized"):
                raise DynskipError(
                    f"{what} runs a model in evaluation mode, and {type(part).__name__}{'.' * bool(name)}{name} is in "
                    "training mode; call `model.eval()` first."
                )


def running_parts(model: Any) -> list[nn.Module]:
    """Return the parts of a model that run in evaluation."""
    return [part for part in (model.backbone, *model.deciders, model.terminator, model.consensus) if part is not None]


def settings_of(part: nn.Module | None) -> str | None:
    """Name a part's class and the numbers and strings among its arguments, which parts keep under their own names."""
    if part is None:
        return None
    values = ((name, getattr(part, name, None)) for name in inspect.signature(type(part)).parameters)
    shown = [f"{name}={value!r}" for name, value in values if isinstance(value, int | float | str)]
    return f"{type(part).__name__}({', '.join(shown)})"


def check_video(
    video: Any, backbone: StagedBackbone, lengths: Any = None, lazily: bool = False
) -> tuple[Any, Tensor | None]:
    """Return normalised videos `(B, T, C, H, W)` on the backbone's device, and their lengths on the host.

    A lazy video is loaded now, or `lazily` returned as it is.
    """
    if isinstance(video, LazyVideo):
        _check_lazy(video, backbone)
        if lazily:
            return video, check_lengths(lengths, *video.shape[:2])
        video = video.whole(check_lengths(lengths, *video.shape[:2]), next(backbone.parameters()).device)
    if isinstance(video, list | tuple):
        raise DynskipError(
            f"Videos must be one tensor (B, T, C, H, W); got {type(video).__name__}. Pad videos of different length, "
            "and say how long they are: `video = torch.nn.utils.rnn.pad_sequence(videos, batch_first=True)` and "
            "`lengths=[len(each) for each in videos]`."
        )
    hint = "Add a batch dimension with `video[None]` to a single video, and keep channels before height and width."
    moved = _check_batch(video, backbone, "video", ("B", "T"), hint)
    lengths = check_lengths(lengths, *video.shape[:2])
    refuse_not_finite(video, "video", "frame", real=None if lengths is None else present(lengths, video.shape[1]))
    return moved, lengths


def _check_lazy(video: LazyVideo, backbone: StagedBackbone) -> None:
    """Refuse a lazy video of another shape or dtype than the model takes."""
    channels, weight = backbone.input_size[0], next(backbone.parameters())
    if len(video.shape) != 5 or video.shape[2] != channels or 0 in video.shape:
        raise DynskipError(f"Videos must have shape (B, T, {channels}, H, W); got {tuple(video.shape)}.")
    if video.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        raise DynskipError(
            f"The lazy video gives {video.dtype} and the model is {weight.dtype}. Convert one of them: LazyClips takes "
            "dtype=..., or run under torch.autocast."
        )


def check_lengths(lengths: Any, batch: int, frames: int) -> Tensor | None:
    """Return how many frames each video of a padded batch has, `(B,)` int64 on the host; `None` for all."""
    if lengths is None:
        return None
    try:
        found = torch.as_tensor(lengths).cpu()
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if found.shape != (batch,) or not whole or not ((found >= 1) & (found <= frames)).all():
        raise DynskipError(
            f"lengths={lengths!r} does not fit {batch} videos padded to {frames} frames. Give one whole number from 1 "
            f"to {frames} for each video, its frames without padding: `lengths=[len(each) for each in videos]`."
        )
    return found.long()


def with_lengths(videos: Any) -> tuple[Any, Any]:
    """Take what a loader gives for videos apart: them, and their lengths where it gives `(videos, lengths)`."""
    pair = isinstance(videos, tuple | list) and len(videos) == 2 and getattr(videos[1], "ndim", 0) == 1
    return tuple(videos) if pair else (videos, None)


def present(lengths: Tensor, frames: int) -> Tensor:
    """Mark the frames of padded videos that are no padding: `(B, T)` boolean."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def check_images(images: Any, backbone: StagedBackbone) -> Tensor:
    """Return normalised images `(B, C, H, W)` on the backbone's device."""
    hint = "Add a batch dimension with `image[None]` to a single image; videos are for StopOrForward."
    return _check_batch(images, backbone, "image", ("B",), hint, ("image",))


def check_frames(frames: Any, backbone: StagedBackbone, batch: int) -> Tensor:
    """Return one normalised frame of each video, `(B, C, H, W)`. Looks for no NaN: on a GPU that would wait."""
    single = batch == 1 and getattr(frames, "ndim", 3) != 4
    hint = "Give one frame a video, with channels before height and width."
    pixels = _check_batch(frames, backbone, "frame", () if single else (batch,), hint)
    return pixels[None] if single else pixels


def _check_batch(
    value: Any, backbone: StagedBackbone, name: str, leading: tuple[str | int, ...], hint: str, dims: Sequence[str] = ()
) -> Tensor:
    """Refuse all but `(*leading, C, H, W)` pixels in the model's dtype; where `dims` names dimensions, finite ones."""
    weight = next(backbone.parameters(), value)
    _refuse_transforms(backbone, value, weight)
    if getattr(weight, "is_meta", False) and not getattr(value, "is_meta", False):
        raise DynskipError("The model is on the meta device and has no values: give it its weights first.")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise DynskipError(
            f"{name.capitalize()}s must be a floating-point tensor of normalised pixels; got {got}. Convert 8-bit "
            f"pixels with `{name}.float() / 255`, then subtract the model's mean and divide by its standard deviation."
        )
    shape, known = tuple(value.shape), (*leading, backbone.input_size[0])
    if len(shape) != len(known) + 2 or any(isinstance(n, int) and n != m for n, m in zip(known, shape, strict=False)):
        wanted = ", ".join(map(str, (*known, "H", "W")))
        raise DynskipError(f"{name.capitalize()}s must have shape ({wanted}); got {shape}. {hint}")
    if 0 in shape:
        raise DynskipError(f"The {name} is empty: shape {shape}. Every dimension has to be at least 1.")
    if value.dtype != weight.dtype and not torch.is_autocast_enabled(value.device.type):
        raise DynskipError(
            f"The {name} is {value.dtype} and the model {weight.dtype}. Convert one of them, for instance with "
            f"`{name}.to({weight.dtype})`, or run under torch.autocast."
        )
    if dims:
        refuse_not_finite(value, *dims)
    moved: Tensor = value.to(weight.device)
    return moved


def _refuse_transforms(backbone: StagedBackbone, *tensors: Any) -> None:
    """Refuse to run in a transform that cannot follow decisions about frames."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():  # type: ignore[attr-defined]
        raise DynskipError(
            "Which stages run depends on what is in the frames, so one graph cannot hold the model. `model.export` "
            "writes it as ONNX files, one a stage; torch.export and torch.jit.trace take `model.backbone`."
        )
    if torch.compiler.is_compiling():  # compilers cannot look into these tests
        return
    functorch = torch._C._functorch
    if any(isinstance(x, Tensor) and functorch.is_batchedtensor(x) for x in tensors):
        raise DynskipError(
            "torch.func.vmap cannot follow decisions about frames. Call the model on a batch of videos; vmap takes "
            "`model.backbone`."
        )
    if not backbone.training and any(isinstance(x, Tensor) and functorch.is_gradtrackingtensor(x) for x in tensors):
        raise DynskipError(
            "A model in evaluation mode skips, and has no gradients. Call `model.train()` before torch.func.grad."
        )


def refuse_not_finite(value: Tensor, *dims: str, real: Tensor | None = None) -> None:
    """Refuse NaN and infinite values; `dims` name the leading dimensions. Waits for the device.

    Where `real` is given, on the host, it marks what is looked at along the leading dimensions.
    """
    # One sum tells whether all is well. It may overflow, so look closer before refusing.
    if torch.isfinite(value.detach().sum(dtype=torch.float32)):
        return
    wrong = (~value.isfinite()).flatten(len(dims)).any(-1).cpu()
    bad = (wrong if real is None else wrong & real).nonzero().tolist()
    if not bad:
        return
    first = " of ".join(f"{name} {at}" for name, at in zip(reversed(dims), reversed(bad[0]), strict=True))
    raise DynskipError(
        f"There are NaN or infinite values in {len(bad)} {dims[-1]}s, the first being {first}. Check decoding and "
        "normalisation."
    )
