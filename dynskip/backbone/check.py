"""Checks of a cut: sizes that a model takes, values that can be taken apart by sample, stages that equal the model."""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynskip._modes import in_mode
from dynskip.backbone._fx import BY_HAND
from dynskip.backbone.carry import Carry, flatten
from dynskip.errors import DynskipError

if TYPE_CHECKING:
    from dynskip.backbone.staged import StagedBackbone


def probe_images(model: nn.Module, input_size: tuple[int, int, int], batch: int) -> Tensor:
    """Return up to 3 images to try a model with. They are always the same; a smaller batch is the start of a larger."""
    like = next(model.parameters(), torch.empty(0))
    images = torch.randn(3, *input_size, generator=torch.Generator().manual_seed(0))[:batch]
    return images.to(like.device, like.dtype)


def fitting_size(model: nn.Module, given: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """Return the size to cut at, once the model has taken images of it."""
    sizes = [given] if given is not None else _likely_sizes(model)
    for size in sizes:
        try:
            with torch.no_grad(), in_mode(model, False):
                model(probe_images(model, size, 2))
        except Exception as error:
            refusal = error
        else:
            return size
    raise DynskipError(
        f"{type(model).__name__} refuses images of {' or '.join('x'.join(map(str, size)) for size in sizes)} "
        f"({type(refusal).__name__}: {refusal}). Pass input_size=(C, H, W) that it takes; models with position tables "
        "or windows of a fixed size have to be built for it (timm: img_size=...)."
    ) from refusal


def _likely_sizes(model: nn.Module) -> list[tuple[int, int, int]]:
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size") or (3, 224, 224)
    embed = getattr(model, "patch_embed", None)
    if getattr(embed, "img_size", None) is not None:  # a ViT built at another size than its published weights
        height, width = embed.img_size  # type: ignore[union-attr]
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    # A model may be built for other channels than its published weights. But its first convolution does not tell where
    # pixels are folded into channels first.
    built_for = channels if convolution is None else convolution.in_channels
    return [(c, height, width) for c in dict.fromkeys((channels, built_for))]


def kind_of(two: Any, three: Any, boundary: str) -> Any:
    """Tell the kind of a crossing value (see `Carry`) from what it was for 2 images and for 3."""
    if isinstance(two, Tensor) and isinstance(three, Tensor):
        if two.shape == three.shape:
            return "static"
        if two.shape[1:] == three.shape[1:] and two.shape[0] * 3 == three.shape[0] * 2:
            return ("rows", two.shape[0] // 2)
    elif isinstance(two, tuple | list) and type(two) is type(three) and len(two) == len(three):
        return tuple(kind_of(x, y, boundary) for x, y in zip(two, three, strict=True))
    elif isinstance(two, int) and isinstance(three, int) and two * 3 == three * 2 and two:
        return ("size", two // 2)
    elif two == three:
        return "static"
    shapes = [tuple(v.shape) if isinstance(v, Tensor) else v for v in (two, three)]
    raise DynskipError(
        f"Boundary {boundary!r}: a value that crosses it cannot be taken apart by sample ({shapes[0]} for 2 images, "
        f"{shapes[1]} for 3). Choose another boundary, {BY_HAND}."
    )


@torch.no_grad()
def verify(backbone: StagedBackbone) -> None:
    """Raise where the stages are not the original model, or a sample's values depend on its neighbours."""
    with in_mode(backbone.model, False):
        try:
            _compare(backbone)
        except DynskipError as error:
            # Deep networks with random weights may amplify rounding errors. Samples that mix differ in any precision.
            try:
                _compare(copy.deepcopy(backbone).double())
            except Exception:
                raise error from None


def _compare(backbone: StagedBackbone) -> None:
    """Check the whole run against the original model, and a shrinking batch against the rows of the whole run."""
    images = probe_images(backbone.model, backbone.input_size, 3)
    expected, names = backbone.model(images), backbone.stage_names
    whole = part = backbone.start(images)
    rows, mixing = torch.arange(3, device=images.device), list[str]()
    for n, name in enumerate(names):
        if n < 2:  # 3 rows -> rows 0 and 2 -> row 2
            keep = torch.tensor([0, 2] if n == 0 else [1], device=images.device)
            part, rows = part.select(keep), rows[keep]
        whole, part = backbone.run(n, whole), backbone.run(n, part)
        # Compared at once, since an activation that follows may work in place.
        pairs = zip(_tensors(part), _tensors(whole.select(rows)), strict=True)
        if not all(itertools.starmap(_close, pairs)):
            mixing.append(f"Boundary {name!r}: the stage")
    if not _close(backbone._answer(whole), expected):
        raise DynskipError(
            f"The stages {list(names)} do not compose to {type(backbone.model).__name__}: logits differ. "
            f"The model does not compute the same thing twice; check it for randomness in eval mode, {BY_HAND}."
        )
    if not _close(backbone._answer(part), expected[rows]):
        mixing.append(f"Boundary {names[-1]!r}: the head after it")
    if mixing:
        raise DynskipError(
            f"{mixing[0]} gives other values on a part of the batch than on all of it, so its samples are not "
            f"independent. Choose another boundary, {BY_HAND}."
        )


def _tensors(carry: Carry) -> list[Tensor]:
    return [tensor for tensor, _ in flatten(carry.values, carry.kinds)]


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    # Convolutions pick other algorithms for other batch sizes; half precision rounds more coarsely.
    tolerance = 1e-4 if a.dtype in (torch.float32, torch.float64) else 3e-2
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-6))
