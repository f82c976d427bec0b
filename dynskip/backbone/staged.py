"""Stages that run one at a time, on any subset of a batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from dynskip._modes import in_mode
from dynskip.backbone._fx import BY_HAND, DEVICE, Segment, opened
from dynskip.backbone.carry import Carry, with_sizes
from dynskip.errors import DynskipError


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
        channels_last: whether the stages take images in channels-last memory, in which convolutions on a CPU are
            faster; `None` where that has not been tried.
        classifier: what was given as `head=` to a model that ends in features; else `None`.
        origin: `name`, `boundaries`, `num_stages` and `timm_kwargs` as given to `stage_model`, for a model made by its
            timm name; else `None`.
    """

    def __init__(
        self,
        model: nn.Module,
        stage_names: Sequence[str],
        segments: dict[bool, list[Segment]],
        constants: dict[bool, dict[str, Tensor]],
        input_size: tuple[int, int, int],
        classifier: nn.Module | None = None,
        origin: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.classifier = classifier
        self.origin = origin
        self.stage_names = tuple(stage_names)
        self.input_size = input_size
        self._segments = segments
        self._opened = opened(model, stage_names)
        for mode, tensors in constants.items():
            for name, tensor in tensors.items():
                # Not parameters of the model, so not in its checkpoints; but they have to follow `.to(device)`.
                self.register_buffer(_constant_name(mode, name), tensor, persistent=False)
        self._kinds: dict[bool, list[tuple[Any, ...]]] = {}
        self.num_features: tuple[int, ...] = ()
        self.layouts: tuple[str, ...] = ()
        self.num_classes = 0
        self._prefix_tokens: tuple[int, ...] = ()
        self._feature_paths: tuple[tuple[int, ...], ...] = ()
        self._answer_layout = "NC"
        self.channels_last: bool | None = None
        self.training = model.training
        self._inspect()

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
            DynskipError: if the rank or the number of channels is not the model's.
        """
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
        x: Any = carry.values[self._segments[self.model.training][stage].feature]
        for position in self._feature_paths[stage]:
            x = x[position]
        return _pool(x, self.layouts[stage], self._prefix_tokens[stage])

    def head(self, carry: Carry) -> Tensor:
        """Run what follows the last stage: final norm, pooling and classifier.

        Args:
            carry: what the last stage returned.

        Returns:
            `(B, K)` logits. An encoder without a classifier answers with its `(B, C)` pooled features.
        """
        features = _pool(self._answer(carry), self._answer_layout, prefix_tokens=0)
        return features if self.classifier is None else self.classifier(features)

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
        mode = self.model.training
        part = self._segments[mode][segment]
        if part.overwrites:  # a carry is the caller's, who may go on with it
            values = tree_map_only(Tensor, torch.clone, values)
        constants = {name: self._constant(mode, name) for name in part.constants}
        if mode and torch.is_grad_enabled() and self._checkpoints_stages():
            return checkpoint(part.call, self.model, constants, values, use_reentrant=False)
        return part.call(self.model, constants, values)

    def _constant(self, mode: bool, name: str) -> Any:
        if name == DEVICE:
            return next(self.model.parameters()).device
        return getattr(self, _constant_name(mode, name))

    def _checkpoints_stages(self) -> bool:
        """Whether `model.set_grad_checkpointing()` was asked of modules that the cut has opened.

        Modules inside a stage checkpoint themselves, as ever.
        """
        return any(getattr(self.model.get_submodule(name), "grad_checkpointing", False) for name in self._opened)

    @torch.no_grad()
    def _inspect(self) -> None:
        """Find out how crossing values relate to the batch, and what the stages and the model end with."""
        with in_mode(self.model, False):
            trail, self._kinds[False] = self._classify()
            self._describe(trail)
        if [part.source for part in self._segments[True]] == [part.source for part in self._segments[False]]:
            self._kinds[True] = self._kinds[False]
            self._segments[True] = [
                replace(part, overwrites=twin.overwrites)
                for part, twin in zip(self._segments[True], self._segments[False], strict=True)
            ]
            return
        # The training glue crosses with other values. Running it moves BatchNorm statistics: use a copy.
        original = self.model
        try:
            self.model = copy.deepcopy(original).train()
            with torch.random.fork_rng():
                _, self._kinds[True] = self._classify()
        finally:
            self.model = original

    def _classify(self) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        two, three = (self._trail(probe_images(self.model, self.input_size, batch)) for batch in (2, 3))
        kinds = [
            tuple(_kind(a, b, name) for a, b in zip(two[n], three[n], strict=True))
            for n, name in enumerate(self.stage_names)
        ]
        return three, kinds

    def _trail(self, images: Tensor) -> list[tuple[Any, ...]]:
        trail, values = [], (images,)
        segments = self._segments[self.model.training]
        for n, part in enumerate(segments):
            before = [(x, x.clone()) for x in tree_leaves(values) if isinstance(x, Tensor)]
            values = self._call(n, values)
            overwrites = part.overwrites or any(not torch.equal(x, was) for x, was in before)
            segments[n] = replace(part, overwrites=overwrites)
            trail.append(values)
        return trail

    def _describe(self, trail: list[tuple[Any, ...]]) -> None:
        info = {str(entry.get("module")): entry for entry in feature_info(self.model)}
        features, paths = [], []
        for n, name in enumerate(self.stage_names):
            feature, entry = self._segments[False][n].feature, info.get(name, {})
            found = list(_feature_tensors(trail[n][feature], self._kinds[False][n][feature]))
            if not found:
                raise DynskipError(f"Boundary {name!r} ends with no feature tensor to pool. Choose another module.")
            # Of several (TNT's pixels and patches, branches of other widths), the one that `feature_info` speaks of.
            path, x = next(((p, x) for p, x in found if entry.get("num_chs") in (x.shape[1], x.shape[-1])), found[0])
            features.append((name, x, entry))
            paths.append(path)
        self._feature_paths = tuple(paths)
        layouts = [_layout(x, entry.get("num_chs"), self.input_size) for _, x, entry in features]
        known = [layout for layout in layouts if layout in ("NCHW", "NHWC")]
        self.layouts = tuple(layout or (known[0] if known else "NCHW") for layout in layouts)
        self.num_features = tuple(
            x.shape[1 if layout in ("NCHW", "NC") else -1]
            for (_, x, _), layout in zip(features, self.layouts, strict=True)
        )
        reductions = {entry["reduction"] for entry in info.values() if "reduction" in entry}
        self._prefix_tokens = tuple(
            self._count_prefix(x, reductions) if layout == "NLC" else 0
            for (_, x, _), layout in zip(features, self.layouts, strict=True)
        )
        self._describe_answer(trail[-1][0])

    def _describe_answer(self, answer: Any) -> None:
        name = type(self.model).__name__
        if not isinstance(answer, Tensor):
            raise DynskipError(
                f"{name} returns a {type(answer).__name__}, where one tensor of logits was expected. Wrap it in a "
                "module that returns the logits alone."
            )
        if answer.ndim not in (2, 3, 4):
            raise DynskipError(
                f"{name} returns a tensor of shape {tuple(answer.shape)}, which is neither (B, K) logits nor features "
                "that can be pooled. Wrap it in a module that returns logits."
            )
        self._answer_layout = _layout(answer, getattr(self.model, "num_features", None), self.input_size) or "NCHW"
        features = _pool(answer, self._answer_layout, prefix_tokens=0)
        if self.classifier is None:
            self.num_classes = features.shape[1]
            return
        try:
            with in_mode(self.classifier, False):
                logits = self.classifier(features)
        except Exception as error:
            raise DynskipError(
                f"`head` cannot run on the {features.shape[1]} features that {name} ends in: {error}."
            ) from error
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise DynskipError(f"`head` must turn (B, {features.shape[1]}) features into (B, K) logits.")
        self.num_classes = logits.shape[1]

    def _count_prefix(self, x: Tensor, reductions: set[int]) -> int:
        prefix = int(getattr(self.model, "num_prefix_tokens", 0))
        grids = {(self.input_size[1] // r) * (self.input_size[2] // r) for r in reductions}
        if x.shape[1] in grids:  # class tokens that join later are not here yet
            return 0
        return prefix if prefix < x.shape[1] else 0


def feature_info(model: nn.Module) -> list[dict[str, Any]]:
    """Return timm's list of a model's feature maps; empty where it has none."""
    info = getattr(model, "feature_info", None) or []
    return list(getattr(info, "info", info))


def probe_images(model: nn.Module, input_size: tuple[int, int, int], batch: int) -> Tensor:
    """Return up to 3 images to try a model with, the same every time; a smaller batch is the first of a larger."""
    like = next(model.parameters(), torch.empty(0))
    # A generator of its own: building a backbone must not move the user's random state.
    images = torch.randn(3, *input_size, generator=torch.Generator().manual_seed(0))[:batch]
    return images.to(like.device, like.dtype)


def _feature_tensors(value: Any, kind: Any) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Find the tensors that could be pooled in what a stage returns: one row a sample, with where they stand in it."""
    if kind == ("rows", 1):
        if value.is_floating_point() and value.ndim >= 2:
            yield (), value
    elif isinstance(value, tuple | list) and kind != "static":
        for i, (item, item_kind) in enumerate(zip(value, kind, strict=True)):
            for path, x in _feature_tensors(item, item_kind):
                yield (i, *path), x


def _layout(x: Tensor, num_chs: int | None, input_size: tuple[int, int, int]) -> str | None:
    """Tell the layout of a value from its rank, from `num_chs`, or from which axes keep the input's aspect ratio."""
    if x.ndim == 2:
        return "NC"
    if x.ndim == 3:
        return "NLC"
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


def _pool(x: Tensor, layout: str, prefix_tokens: int) -> Tensor:
    match layout:
        case "NCHW":
            return x.mean((2, 3))
        case "NHWC":
            return x.mean((1, 2))
        case "NLC":
            return x[:, prefix_tokens:].mean(1)
    return x


def _kind(a: Any, b: Any, name: str) -> Any:
    """Classify a crossing value by what it was in a batch of 2 (`a`) and in a batch of 3 (`b`)."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape == b.shape:
            return "static"
        if a.shape[1:] == b.shape[1:] and a.shape[0] * 3 == b.shape[0] * 2:
            return ("rows", a.shape[0] // 2)
    elif isinstance(a, tuple | list) and type(a) is type(b) and len(a) == len(b):
        return tuple(_kind(x, y, name) for x, y in zip(a, b, strict=True))
    elif isinstance(a, int) and isinstance(b, int) and a * 3 == b * 2 and a:
        return ("size", a // 2)
    elif a == b:
        return "static"
    shapes = [tuple(v.shape) if isinstance(v, Tensor) else v for v in (a, b)]
    raise DynskipError(
        f"Boundary {name!r}: a value that crosses it cannot be taken apart by sample ({shapes[0]} for 2 images, "
        f"{shapes[1]} for 3). Choose another boundary, {BY_HAND}."
    )


def _constant_name(training: bool, name: str) -> str:
    return f"{'train' if training else 'eval'}{name}"


def encode_images(backbone: StagedBackbone, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Run the whole backbone on `(B, C, H, W)` images; return pooled features of every stage, and logits."""
    carry = backbone.start(images)
    pooled = []
    for n in range(backbone.num_stages):
        carry = backbone.run(n, carry)
        pooled.append(backbone.pool(n, carry))
    return pooled, backbone.head(carry)
