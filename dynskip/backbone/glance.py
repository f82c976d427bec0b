"""A glance first: a light network on a small copy of the frame, as the first stages of a backbone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynskip._modes import in_mode
from dynskip.backbone._fx import Segment, from_source
from dynskip.backbone.carry import Carry
from dynskip.backbone.check import probe_images
from dynskip.backbone.count import Count
from dynskip.backbone.cut import stage_model
from dynskip.backbone.staged import StagedBackbone
from dynskip.backbone.taken import check_unchanged
from dynskip.errors import DynskipError, lacks_memory

COMPARED = 2  # a glance must not cost more than so many stages of the backbone
# The stage behind the glance takes the images alone, as it always did, and not what the glance ended with.
_IMAGES_ALONE = """

behind_glance = forward


def forward(self, *values):
    return behind_glance(self, *values[:-1])
"""


def glance(backbone: StagedBackbone, light: str | nn.Module, size: int, **timm_kwargs: Any) -> StagedBackbone:
    """Put a light network in front of a backbone, so that the first gate decides from a glance at a small copy.

    Each frame is resized once (bilinear, antialiased) and goes through the light network, whose pooled features the
    first gate sees. The frame itself goes on to the backbone as it came. What is returned is a staged backbone like any
    other. It is made of what was given, not of copies; the light network gets the backbone's device, dtype and mode.

    Args:
        backbone: the staged backbone.
        light: the light network: a timm name, built without its classifier; a module that ends in features; or a staged
            backbone that does, all of whose stages then come first, each with a gate of its own.
        size: shorter side of the small copy in pixels. Frames that are smaller are taken as they are.
        **timm_kwargs: for a name, passed to `timm.create_model` (`pretrained`, ...).

    Returns:
        The backbone with one stage more, or with as many more as the light network has.

    Raises:
        DynskipError: if the light network refuses such images, ends in class logits instead of features, or costs more
            than the backbone's first two stages; or if the backbone has a glance already.
    """
    if type(size) is not int or size < 1:
        raise DynskipError(
            f"size={size!r} is no number of pixels; give the shorter side of the small copy, such as 96."
        )
    if backbone.glance is not None:
        raise DynskipError(
            "The backbone has a glance already. For more than one gate, give one light network with several stages, "
            "such as stage_model('efficientnet_lite0', num_stages=2, num_classes=0)."
        )
    network = light.model if isinstance(light, StagedBackbone) else light
    with_head = isinstance(light, StagedBackbone) and light.classifier is not None
    if classes := getattr(light if with_head else network, "num_classes", 0):
        raise DynskipError(
            f"{type(network).__name__} ends in {classes} class logits, and a glance needs the pooled features before "
            "them. Build it without a classifier (timm: num_classes=0)."
        )
    channels, height, width = backbone.input_size
    small = (channels, *small_size(height, width, size))
    try:
        match light:
            case StagedBackbone():
                staged, origin = light, light.model
            case str():
                staged = stage_model(light, num_stages=1, num_classes=0, input_size=small, **timm_kwargs)
                origin = staged.model
            case _:
                staged, origin = stage_model([light], head=nn.Identity(), input_size=small), light
        weight = next(backbone.parameters(), torch.empty(0))
        staged.to(weight.device, weight.dtype).train(backbone.training)
        with torch.no_grad(), in_mode(staged, False):
            staged(weight.new_zeros(1, *small))
    except Exception as error:
        if lacks_memory(error):
            raise
        name = light if isinstance(light, str) else type(network).__name__
        raise DynskipError(
            f"{name} for a glance at {_shape(small)}, copies of frames of {_shape(backbone.input_size)}: {error}"
        ) from error
    looking = Glance(staged, size, *_change(backbone.model, origin))
    looking.to(weight.device, weight.dtype)
    _check_cost(backbone, looking)
    return _in_front(looking, backbone)


class Glance(nn.Module):
    """The light stages, which carry the images along for the stages behind them.

    Attributes:
        light: the staged light network, which ends in features.
        size: shorter side of the small copy in pixels.
        scale: `(C, 1, 1)` factor from the backbone's normalised pixels to the light network's.
        shift: `(C, 1, 1)` what is added then.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, light: StagedBackbone, size: int, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.light = light
        self.size = size
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def shrink(self, images: Tensor) -> Tensor:
        """Return `(B, C, h, w)` small copies of `(B, C, H, W)` images, normalised as the light network expects."""
        height, width = images.shape[-2:]
        small = small_size(height, width, self.size)
        if small != (height, width):
            wide = images.to(torch.promote_types(images.dtype, torch.float32))  # CPUs resize no half precision
            images = F.interpolate(wide, small, mode="bilinear", antialias=True).to(images.dtype)
        return images * self.scale + self.shift

    def forward(self, stage: int, images: Tensor, *values: Any) -> tuple[Any, ...]:
        """Run a light stage on what the one before returned; its own pooled features come last."""
        light, batch = self.light, images.shape[0]
        if stage == 0:
            carry = Carry((self.shrink(images),), (("rows", 1),), batch)
        else:
            carry = Carry(values[:-1], light._kinds[light.model.training][stage - 1], batch)
        carry = light.run(stage, carry)
        if stage == light.num_stages - 1:
            return images, light.head(carry)
        return images, *carry.values, light.pool(stage, carry)

    def check_unchanged(self) -> None:
        """Raise where the light network is no longer what it was when it was cut."""
        check_unchanged(self.light.model, self.light._taken[self.light.model.training])

    def extra_repr(self) -> str:
        """Show the size."""
        return f"size={self.size}"


def small_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Return the size of the small copy of a frame: its shorter side is `size`, unless the frame is smaller."""
    shorter = min(height, width)
    if shorter <= size:
        return height, width
    return round(height * size / shorter), round(width * size / shorter)


def _change(model: nn.Module, light: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the factor and summand that turn pixels normalised for one model into those for another."""
    configs = [getattr(each, "pretrained_cfg", None) or {} for each in (model, light)]
    (mean, std), (light_mean, light_std) = (
        [torch.tensor(config.get(key) or ())[:, None, None] for key in ("mean", "std")] for config in configs
    )
    if not mean.shape == std.shape == light_mean.shape == light_std.shape != (0, 1, 1):
        return torch.ones(1, 1, 1), torch.zeros(1, 1, 1)  # nobody says how one of them is normalised
    return std / light_std, (mean - light_mean) / light_std


@torch.no_grad()
def _check_cost(backbone: StagedBackbone, looking: Glance) -> None:
    """Refuse a light network that costs more than the stages that it is to save."""
    image = probe_images(backbone.model, backbone.input_size)[1:2]
    count, behind, few = Count(backbone), 0.0, min(COMPARED, backbone.num_stages)
    with in_mode(backbone, False), in_mode(looking, False):
        small = looking.shrink(image)
        cost, _ = count("", looking.light, small)
        carry = backbone.start(image)
        for n in range(few):
            macs, carry = count("", backbone.run, n, carry)
            behind += macs
    if cost > behind:
        raise DynskipError(
            f"A glance at {_shape(small.shape[1:])} costs {cost / 1e6:.4g} MMACs a frame, more than the "
            f"{behind / 1e6:.4g} of the backbone's first {few} stages at {_shape(backbone.input_size)}, so it would "
            "save too little. Choose a lighter network, a smaller size, or fewer and larger stages (boundaries=... of "
            "stage_model)."
        )


def _in_front(looking: Glance, backbone: StagedBackbone) -> StagedBackbone:
    """Return a backbone of the light stages and those of the backbone."""
    light, segments = looking.light, {}
    for training, own in backbone._segments.items():
        looks = [_look(n, light._kinds[training]) for n in range(light.num_stages)]
        behind = from_source(own[0].source + _IMAGES_ALONE, own[0].uses, own[0].constants, own[0].overwrites)
        segments[training] = [*looks, behind, *own[1:]]
    names = [f"glance.{name}" for name in light.stage_names] if light.num_stages > 1 else ["glance"]
    whole = StagedBackbone(
        backbone.model,
        [*names, *backbone.stage_names],
        [],
        segments,
        dict(backbone.named_buffers(recurse=False)),
        backbone._taken,
        backbone.input_size,
        None,
        backbone.classifier,
        backbone.origin,
        looking,
    )
    whole._opened, whole.channels_last = backbone._opened, backbone.channels_last
    return whole


def _look(stage: int, kinds: Any) -> Segment:
    # The kinds of the values that cross tell the modes apart where they differ.
    source = f"def forward(self, images, *values):\n    return self({stage}, images, *values)  # {kinds}\n"
    return from_source(source, {}, (), root="glance")


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape))
