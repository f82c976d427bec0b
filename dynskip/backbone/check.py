"""Checks of a cut: sizes that a model takes, values that can be taken apart by sample, stages that equal the model."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from dynskip._modes import DrawingApart, in_mode
from dynskip.backbone._fx import BY_HAND, twin
from dynskip.backbone.carry import Carry, flatten
from dynskip.errors import DynskipError, lacks_memory

if TYPE_CHECKING:
    from dynskip.backbone.staged import StagedBackbone


def probe_images(model: nn.Module, input_size: tuple[int, int, int]) -> Tensor:
    """Return 3 images to try a model with, always the same."""
    like = next(model.parameters(), torch.empty(0))
    images = torch.randn(3, *input_size, generator=torch.Generator().manual_seed(0))
    images[0] = 3 * images[0] + 1  # so that a mean, range or spread over a batch is not the same without this image
    return images.to(like.device, like.dtype)


def fitting_size(
    model: nn.Module, given: tuple[int, int, int] | None, inside: Collection[str], verify: bool
) -> tuple[tuple[int, int, int], Reference | None]:
    """Return the size to cut at, and the model's run on the second probe image of that size, to verify with."""
    sizes = [given] if given is not None else _likely_sizes(model)
    if not verify and len(sizes) == 1:
        return sizes[0], None
    for size in sizes:
        try:
            with torch.inference_mode(False), torch.no_grad(), in_mode(model, False):
                reference = Reference(model, probe_images(model, size)[1:2], inside)
        except Exception as error:
            if lacks_memory(error):
                raise
            refusal = error
        else:
            return size, reference if verify else None
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


def kind_of(few: Any, many: Any, batches: tuple[int, int], boundary: str) -> Any:
    """Tell the kind of a crossing value (see `Carry`) from what it was in two batches of different sizes."""
    a, b = batches
    if isinstance(few, Tensor) and isinstance(many, Tensor):
        if few.shape == many.shape:
            return "static"
        if few.shape[1:] == many.shape[1:] and few.shape[0] * b == many.shape[0] * a:
            return ("rows", few.shape[0] // a)
    elif isinstance(few, tuple | list) and type(few) is type(many) and len(few) == len(many):
        return tuple(kind_of(x, y, batches, boundary) for x, y in zip(few, many, strict=True))
    elif isinstance(few, int) and isinstance(many, int) and few * b == many * a and few:
        return ("size", few // a)
    elif few == many:
        return "static"
    shapes = [tuple(v.shape) if isinstance(v, Tensor) else v for v in (few, many)]
    raise DynskipError(
        f"Boundary {boundary!r}: a value that crosses it cannot be taken apart by sample ({shapes[0]} in a batch of "
        f"{a}, {shapes[1]} in a batch of {b}). Choose another boundary, {BY_HAND}."
    )


class Reference:
    """A model's own run on one image, and what its closed modules took and gave.

    The stages call the same modules. Where they give one of them the very values that the model gave it, its answer is
    known, and nothing is computed twice.
    """

    def __init__(self, model: nn.Module, image: Tensor, inside: Collection[str]) -> None:
        self._model, self._image = model, image
        self._calls: dict[nn.Module, list[tuple[Any, Any]]] = {}
        begun, here = list[Any](), threading.get_ident()

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if threading.get_ident() == here:
                begun.append(_cloned((args, kwargs)))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if threading.get_ident() == here and _same(given := begun.pop(), (args, kwargs)):  # not worked in place on
                self._calls.setdefault(module, []).append((given, _cloned(output)))

        known = [model.get_submodule(name) for name in inside]
        closed = {
            child
            for module in known
            for child in module.children()
            if child not in known and not isinstance(child, torch.jit.ScriptModule)  # they take no hooks
        }
        hooks = [module.register_forward_pre_hook(before, with_kwargs=True, prepend=True) for module in closed]
        hooks += [module.register_forward_hook(after, with_kwargs=True) for module in closed]
        generators = _generators(image.device)
        try:
            self.answer = model(image)
        finally:
            for hook in hooks:
                hook.remove()
        self._drew = not _same(generators, _generators(image.device))

    def repeats(self) -> bool:
        """Tell whether the model gives the same answer again. Only one that drew random numbers has to show it.

        What follows from random numbers may be equal by chance, so such a model shows it often.
        """
        return not self._drew or all(_close(self._model(self._image), self.answer) for _ in range(16))

    def standing_for(self, module: nn.Module) -> Any:
        """Return what can be called in place of a module."""
        return _Standing(module, self._calls)


class _Standing:
    def __init__(self, module: nn.Module, calls: dict[nn.Module, list[tuple[Any, Any]]]) -> None:
        self._module, self._calls = module, calls

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return _Standing(value, self._calls) if isinstance(value, nn.Module) else value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for given, output in self._calls.get(self._module, ()):
            if _same(given, (args, kwargs)):
                return _cloned(output)
        return self._module(*args, **kwargs)


def _generators(device: torch.device) -> list[Tensor]:
    """Return the states of torch's generators that a model on a device may draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _cloned(values: Any) -> Any:
    # torch makes tuples of sizes that it maps over.
    return tree_map_only(Tensor, torch.clone, values, is_leaf=lambda value: isinstance(value, torch.Size))


def _same(a: Any, b: Any) -> bool:
    (some, form), (others, other_form) = tree_flatten(a), tree_flatten(b)
    return form == other_form and all(map(_equal, some, others))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def inspect(
    backbone: StagedBackbone, batches: tuple[int, int], reference: Reference | None = None
) -> list[tuple[Any, ...]]:
    """Run two batches through all stages, and find the kinds of the values that cross.

    Args:
        backbone: the backbone, in the mode to inspect.
        batches: the two numbers of images; the smaller batch is the end of the larger.
        reference: the model's own run on the smaller batch. Then it is checked that the stages give the same, and that
            they give every image the same values in both batches.

    Returns:
        The values after each stage, and the answer, for the larger batch.
    """
    small, large = batches
    images = probe_images(backbone.model, backbone.input_size)[:large]
    order = torch.arange(large, device=images.device)
    rows = order[large - small :]
    many, few = backbone.start(images).values, backbone.start(images[rows]).values
    trail, kinds = list[tuple[Any, ...]](), list[tuple[Any, ...]]()
    mixing = None
    for n, name in enumerate(backbone.stage_names):
        many, few = backbone._try(n, many), backbone._try(n, few, reference)
        trail.append(many)
        kinds.append(kind_of(few, many, batches, name))
        if reference is not None and not mixing:
            carry = Carry(many, kinds[-1], large)
            chosen = carry.select(rows).values
            if all(itertools.starmap(_close, zip(_tensors(few, kinds[-1]), _tensors(chosen, kinds[-1]), strict=True))):
                many = carry.select(order).values  # the next stage runs on selected rows, as it will later
            else:
                mixing = f"Boundary {name!r}: the stage"
    many, few = backbone._try(backbone.num_stages, many), backbone._try(backbone.num_stages, few, reference)
    backbone._kinds[backbone.model.training] = kinds
    _check_answer(backbone, many[0])
    if reference is not None:
        if not _close(few[0], reference.answer) or not reference.repeats():
            raise DynskipError(
                f"The stages {list(backbone.stage_names)} do not compose to {type(backbone.model).__name__}: logits "
                "differ. The model does not compute the same thing twice; check it for randomness in eval mode, "
                f"{BY_HAND}."
            )
        if not mixing and not _close(few[0], many[0][rows]):
            mixing = f"Boundary {backbone.stage_names[-1]!r}: the head after it"
        if mixing:
            raise DynskipError(
                f"{mixing} gives other values on a part of the batch than on all of it, so its samples are not "
                f"independent, or it draws random numbers in eval mode. Choose another boundary, {BY_HAND}."
            )
    return [*trail, many]


def inspect_shapes(backbone: StagedBackbone, training: bool, batches: tuple[int, int]) -> list[tuple[Any, ...]]:
    """Inspect a backbone without computing anything, on the meta device; where its code cannot run there, for real."""
    with DrawingApart():
        try:
            copied = twin(backbone, training).to("meta")
            trail = inspect(copied, batches)
        except Exception:
            copied = twin(backbone, training)  # running a model in training mode moves BatchNorm statistics
            trail = inspect(copied, batches)
    backbone._segments[training], backbone._kinds[training] = copied._segments[training], copied._kinds[training]
    return trail


def inspect_and_verify(backbone: StagedBackbone, reference: Reference) -> list[tuple[Any, ...]]:
    """Inspect a backbone, and raise where it is not its model, or a sample's values depend on its neighbours."""
    try:
        return inspect(backbone, (1, 2), reference)
    except DynskipError as error:
        # Deep networks with random weights may amplify rounding errors. Samples that mix differ in any precision.
        try:
            precise = copy.deepcopy(backbone).double()
            image = probe_images(precise.model, precise.input_size)[1:2]
            inspect(precise, (1, 2), Reference(precise.model, image, precise._opened))
        except Exception:
            raise error from None
        return inspect_shapes(backbone, False, (1, 2))


def _check_answer(backbone: StagedBackbone, answer: Any) -> None:
    if not isinstance(answer, Tensor) or answer.ndim not in (2, 3, 4):
        what = f"tensor of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        raise DynskipError(
            f"{type(backbone.model).__name__} returns a {what}, where one tensor was expected: (B, K) logits, or "
            "features that can be pooled. Wrap it in a module that returns the logits alone."
        )


def _tensors(values: Any, kinds: Any) -> list[Tensor]:
    return [tensor for tensor, _ in flatten(values, kinds)]


def _close(a: Tensor, b: Tensor) -> bool:
    if torch.equal(a, b):
        return True
    if not a.is_floating_point() or not a.numel():
        return False
    # Convolutions pick other algorithms for other batch sizes; half precision rounds more coarsely.
    tolerance = 1e-4 if a.dtype in (torch.float32, torch.float64) else 3e-2
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-6))
