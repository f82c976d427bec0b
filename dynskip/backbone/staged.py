"""Stages that run one at a time, on any subset of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from dynskip._modes import in_mode
from dynskip.backbone._fx import DEVICE, Segment, opened
from dynskip.backbone.carry import Carry, flatten, with_sizes
from dynskip.backbone.check import Reference, inspect_and_verify, inspect_shapes
from dynskip.backbone.taken import Taken, check_unchanged, check_width
from dynskip.errors import DynskipError, lacks_memory


class StagedBackbone(nn.Module):
    """A model cut into stages and a head that compose exactly to its own forward pass.

    Made by `stage_model`. The original module stays inside as `.model`, with its own parameter names, so its
    checkpoints load and save unchanged.

    Attributes:
        model: the original model.
        stage_names: qualified name of the module that ends each stage, `N` of them.
        num_features: channels `C_n` after each stage.
        layouts: `"NCHW"`, `"NHWC"`, `"NLC"` (tokens) or `"NC"` of the value that a stage ends with.
        num_classes: width of the logits.
        input_size: `(C, H, W)` at which the model was cut and checked.
        channels_last: whether images are laid out channels-last where that makes convolutions faster; not for models
            whose first stage gives tokens. It becomes `False` where a stage turns out to refuse that layout.
        classifier: what was given as `head=` to a model that ends in features; else `None`.
        glance: what the first stages run on a small copy of the frame (`dynskip.glance`); else `None`.
        origin: `name`, `boundaries`, `num_stages` and `timm_kwargs` as given to `stage_model`, for a model made by its
            timm name; else `None`.

    Examples:
        >>> backbone = stage_model("test_resnet", num_classes=4)
        >>> backbone.stage_names
        ('maxpool', 'layer1', 'layer2', 'layer3', 'layer4')
        >>> carry = backbone.start(torch.zeros(2, 3, 64, 64))
        >>> for stage in range(backbone.num_stages):
        ...     carry = backbone.run(stage, carry)
        >>> backbone.head(carry).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        stage_names: Sequence[str],
        boundaries: Sequence[str],
        segments: dict[bool, list[Segment]],
        constants: dict[str, Tensor],
        taken: dict[bool, dict[str, Taken]],
        input_size: tuple[int, int, int],
        reference: Reference | None,
        classifier: nn.Module | None = None,
        origin: dict[str, Any] | None = None,
        glance: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.classifier = classifier
        self.glance: Any = glance
        self.origin = origin
        self.stage_names = tuple(stage_names)
        self.input_size = input_size
        self.training = model.training
        self._opened = opened(model, boundaries)
        # By training mode: the stages and the head, and for every stage the kinds of its values (see `Carry`).
        self._segments = segments
        self._taken = taken
        self._kinds: dict[bool, list[tuple[Any, ...]]] = {}
        self._constants = constants
        for name, tensor in constants.items():
            # Not parameters of the model, so not in its checkpoints; but they have to follow `.to(device)`.
            self.register_buffer(name, tensor, persistent=False)
        self.channels_last = False  # while it is inspected
        self._inspect(reference)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> StagedBackbone:
        super()._apply(fn, recurse)
        for name, value in self._constants.items():  # no checkpoint has what `to_empty` has emptied
            setattr(self, name, value.to(getattr(self, name)))
        return self

    def __prepare_scriptable__(self) -> None:
        raise DynskipError(
            "torch.jit.script cannot read the stages of a cut model. Use torch.jit.trace or torch.export on the "
            "backbone, `optimize`, or `export`, which writes ONNX files."
        )

    @property
    def num_stages(self) -> int:
        """Number of stages `N`, the head not counted."""
        return len(self.stage_names)

    def start(self, images: Tensor) -> Carry:
        """Wrap a batch of images as the carry that enters stage 0.

        Args:
            images: `(B, C, H, W)` normalised images.

        Returns:
            The carry.

        Raises:
            DynskipError: if the rank or the number of channels is not the model's, or the model was changed after it
                was cut.
        """
        check_unchanged(self.model, self._taken[self.model.training])
        if self.glance is not None:
            self.glance.check_unchanged()
        if images.ndim != 4 or images.shape[1] != self.input_size[0]:
            raise DynskipError(
                f"Images of shape {tuple(images.shape)} do not fit this backbone; it takes (B, "
                f"{self.input_size[0]}, H, W)."
            )
        return Carry((images,), (("rows", 1),), len(images))

    def run(self, stage: int, carry: Carry) -> Carry:
        """Run one stage.

        Args:
            stage: index of the stage, 0 to `N - 1`.
            carry: what stage `stage - 1` returned (or `start`), for any subset of rows.

        Returns:
            The carry that enters the next stage (or the head).
        """
        carry = with_sizes(carry)
        return Carry(self._call(stage, carry.values), self._kinds[self.model.training][stage], carry.batch)

    def pool(self, stage: int, carry: Carry) -> Tensor:
        """Average a stage's features over space, as gates see them (Eq. 3.1).

        Args:
            stage: index of the stage that returned `carry`.
            carry: its carry.

        Returns:
            `(B, C_n)` features. Class and register tokens are left out where patch tokens stand beside them.
        """
        tensors = [tensor for tensor, _ in flatten(carry.values[-1:], carry.kinds[-1:])]
        pooled = _pool(tensors[self._positions[stage]], self.layouts[stage], self._prefix_tokens[stage])
        check_width(f"stage {self.stage_names[stage]!r}", self.num_features[stage], pooled.shape[1])
        return pooled

    def head(self, carry: Carry) -> Tensor:
        """Run what follows the last stage: final norm, pooling and classifier.

        Args:
            carry: what the last stage returned.

        Returns:
            `(B, K)` logits. An encoder without a classifier answers with its `(B, C)` pooled features.
        """
        features = _pool(self._answer(carry), self._end_layout)
        logits = features if self.classifier is None else self.classifier(features)
        check_width("the head", self.num_classes, logits.shape[1])
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Run all stages and the head; equals the original model.

        Args:
            images: `(B, C, H, W)` normalised images.

        Returns:
            `(B, K)` logits; of an encoder without a classifier, the features that it returns.
        """
        carry = self.start(images)
        for stage in range(self.num_stages):
            carry = self.run(stage, carry)
        return self._answer(carry) if self.classifier is None else self.head(carry)

    def __repr__(self) -> str:
        """Name the stages with their channels and layouts; the layers are in `repr(backbone.model)`."""
        stages = ", ".join(
            f"{name} ({channels} {layout})"
            for name, channels, layout in zip(self.stage_names, self.num_features, self.layouts, strict=True)
        )
        size = "x".join(map(str, self.input_size))
        return f"StagedBackbone({type(self.model).__name__} at {size}: {stages}, {self.num_classes} classes)"

    def _answer(self, carry: Carry) -> Tensor:
        (answer,) = self._call(self.num_stages, with_sizes(carry).values)
        return answer  # type: ignore[no-any-return]

    def _call(self, segment: int, values: tuple[Any, ...]) -> tuple[Any, ...]:
        usual = not self.channels_last or torch.compiler.is_compiling()
        if usual or all(x.is_contiguous() for x in tree_leaves(values) if isinstance(x, Tensor)):
            return self._call_as_is(segment, values)
        try:
            return self._call_as_is(segment, values)
        except RuntimeError:  # perhaps from a `view` that needs the usual memory layout
            result = self._call_as_is(segment, tree_map_only(Tensor, lambda x: x.contiguous(), values))
            self.channels_last = False
            return result

    def _call_as_is(self, segment: int, values: tuple[Any, ...]) -> tuple[Any, ...]:
        mode = self.model.training
        part = self._segments[mode][segment]
        if part.overwrites:  # a carry belongs to the caller, who may go on with it
            values = tree_map_only(Tensor, torch.clone, values)
        constants, root = self._constants_of(part), getattr(self, part.root)
        # Modules inside a stage checkpoint themselves; for those that the cut has opened, the stage does it.
        glue = map(self.model.get_submodule, self._opened)
        if mode and torch.is_grad_enabled() and any(getattr(m, "grad_checkpointing", False) for m in glue):
            return checkpoint(part.function, root, *constants, *values, use_reentrant=False)
        return part.function(root, *constants, *values)

    def _constants_of(self, part: Segment) -> list[Any]:
        return [
            next(self.model.parameters()).device if name == DEVICE else getattr(self, name) for name in part.constants
        ]

    # Inspection: once, when the backbone is made

    @torch.inference_mode(False)
    @torch.no_grad()
    def _inspect(self, reference: Reference | None) -> None:
        """Find the kinds of crossing values, and what the stages and the model end with; compare with the model."""
        with in_mode(self.model, False):
            trail = inspect_shapes(self, False, (1, 2)) if reference is None else inspect_and_verify(self, reference)
            self._describe(trail)
        if [part.source for part in self._segments[True]] == [part.source for part in self._segments[False]]:
            self._segments[True], self._kinds[True] = list(self._segments[False]), self._kinds[False]
        else:  # other values cross in training
            inspect_shapes(self, True, (2, 3))  # BatchNorm may refuse a single image

    def _try(self, segment: int, values: tuple[Any, ...], reference: Reference | None = None) -> tuple[Any, ...]:
        """Run a segment on copies of its inputs, and note whether it works in place on them."""
        copies = tree_map_only(Tensor, torch.clone, values)
        if reference is not None:  # what the model's own run computed is not computed again
            part = self._segments[self.model.training][segment]
            return part.function(reference.standing_for(self.model), *self._constants_of(part), *copies)
        result = self._call(segment, copies)
        if any(isinstance(x, Tensor) and x._version for x in tree_leaves(copies)):
            segments = self._segments[self.model.training]
            segments[segment] = replace(segments[segment], overwrites=True)
        return result

    def _describe(self, trail: list[tuple[Any, ...]]) -> None:
        """Find what is pooled of every stage, and the number of classes."""
        info = {str(entry.get("module")): entry for entry in feature_info(self.model)}
        reductions = {entry["reduction"] for entry in info.values() if "reduction" in entry}
        grids = {(self.input_size[1] // r) * (self.input_size[2] // r) for r in reductions}
        prefix = int(getattr(self.model, "num_prefix_tokens", 0))
        found: list[tuple[int, Tensor, str | None]] = []
        for name, values, kinds in zip(self.stage_names, trail[:-1], self._kinds[False], strict=True):
            channels = info.get(name, {}).get("num_chs")
            tensors = [
                (i, x)
                for i, (x, rows) in enumerate(flatten(values[-1:], kinds[-1:]))
                if rows == 1 and x.is_floating_point() and x.ndim >= 2
            ]
            if not tensors:
                raise DynskipError(f"Boundary {name!r} ends with no feature tensor to pool. Choose another module.")
            # Of several (TNT's pixels and patches, branches of other widths), the one that `feature_info` speaks of.
            i, x = next((pair for pair in tensors if channels in (pair[1].shape[1], pair[1].shape[-1])), tensors[0])
            found.append((i, x, _layout(x, channels, self.input_size)))
        usual = next((layout for *_, layout in found if layout in ("NCHW", "NHWC")), "NCHW")
        self.layouts = tuple(layout or usual for *_, layout in found)
        self.channels_last = self.layouts[0] == "NCHW"
        self._positions = [i for i, *_ in found]
        # Class tokens that join later are not there yet where the tokens fill a grid.
        self._prefix_tokens = [prefix if x.shape[1] > prefix and x.shape[1] not in grids else 0 for _, x, _ in found]
        pooled = map(_pool, [x for _, x, _ in found], self.layouts, self._prefix_tokens)
        self.num_features = tuple(x.shape[1] for x in pooled)
        answer = trail[-1][0]
        self._end_layout = _layout(answer, getattr(self.model, "num_features", None), self.input_size) or "NCHW"
        self.num_classes = self._try_classifier(_pool(answer, self._end_layout)).shape[1]

    def _try_classifier(self, features: Tensor) -> Tensor:
        if self.classifier is None:
            return features
        try:
            with in_mode(self.classifier, False):
                device = next(self.parameters()).device  # the features may be on the meta device
                logits = self.classifier(torch.zeros_like(features, device=device))
        except Exception as error:
            if lacks_memory(error):
                raise
            name = type(self.model).__name__
            raise DynskipError(
                f"`head` cannot run on the {features.shape[1]} features that {name} ends in: {error}."
            ) from error
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise DynskipError(f"`head` must turn (B, {features.shape[1]}) features into (B, K) logits.")
        return logits


def _pool(x: Tensor, layout: str, prefix_tokens: int = 0) -> Tensor:
    match layout:
        case "NCHW":
            return x.mean((2, 3))
        case "NHWC":
            return x.mean((1, 2))
        case "NLC":
            return x[:, prefix_tokens:].mean(1)
    return x


def _layout(x: Tensor, num_chs: int | None, input_size: tuple[int, int, int]) -> str | None:
    """Tell the layout of a value from its rank, from `num_chs`, or from which axes keep the input's aspect ratio."""
    if x.ndim in (2, 3):
        return "NC" if x.ndim == 2 else "NLC"
    if x.ndim != 4:
        raise DynskipError(
            f"A stage ends with a tensor of shape {tuple(x.shape)}; ranks 2 to 4 can be pooled. Choose another "
            "boundary."
        )
    _, a, b, c = x.shape
    if num_chs is not None and (a == num_chs) != (c == num_chs):
        return "NCHW" if a == num_chs else "NHWC"
    _, height, width = input_size
    rounding = max(height, width)
    nchw, nhwc = abs(b * width - c * height) < rounding, abs(a * width - b * height) < rounding
    if nchw != nhwc:
        return "NCHW" if nchw else "NHWC"
    return None


def feature_info(model: nn.Module) -> list[dict[str, Any]]:
    """Return timm's list of a model's feature maps; empty where it has none."""
    info = getattr(model, "feature_info", None) or []
    return list(getattr(info, "info", info))


def lay_out(backbone: StagedBackbone, carry: Carry) -> Carry:
    """Lay the images that enter stage 0 out channels-last, where that makes convolutions faster.

    That is on a CPU. With gradients it makes little difference, and there torch 2.15 crashes in RepVGG's backward pass.
    For a single image it may take longer than it saves, so callers do this where there are several.
    """
    (images,) = carry.values
    wanted = getattr(backbone, "channels_last", False)  # a backbone made by hand may say nothing
    if not wanted or images.device.type != "cpu" or torch.is_grad_enabled():
        return carry
    return replace(carry, values=(images.contiguous(memory_format=torch.channels_last),))


def encode_images(backbone: StagedBackbone, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Run the whole backbone on `(B, C, H, W)` images; return pooled features of every stage, and logits."""
    carry = backbone.start(images)
    if len(images) > 1:
        carry = lay_out(backbone, carry)
    pooled = []
    for n in range(backbone.num_stages):
        carry = backbone.run(n, carry)
        pooled.append(backbone.pool(n, carry))
    return pooled, backbone.head(carry)
