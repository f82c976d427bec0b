"""Any model as stages that run one at a time, on any subset of a batch."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynskip import _fx
from dynskip.errors import DynskipError

PLAIN_STAGES = 4  # a plain ViT lists every block; this many evenly spaced ones are its default stages


@dataclass(frozen=True)
class Carry:
    """What travels between two stages: every value that later stages read, with how each relates to the batch.

    Args:
        values: the values; tensors, numbers, or nested tuples and lists of them.
        kinds: for each value `"static"` (the same for every batch), `("rows", k)` (a tensor with `k` rows a sample
            in dimension 0), `("size", k)` (the integer `k` times the batch size), or a tuple of kinds.
        batch: number of samples.
    """

    values: tuple[Any, ...]
    kinds: tuple[Any, ...]
    batch: int

    def select(self, index: Tensor) -> Carry:
        """Return the carry of some samples only.

        Args:
            index: `(M,)` positions, or a `(B,)` boolean mask.

        Returns:
            A carry of batch `M`. Memory layout (channels-last) is kept.
        """
        if index.dtype == torch.bool:
            index = index.nonzero().squeeze(1)
        return Carry(_select(self.values, self.kinds, index, self.batch), self.kinds, len(index))

    def __repr__(self) -> str:
        """Show shapes instead of values."""
        return f"Carry(batch {self.batch}: {', '.join(map(_shape, self.values))})"

    @staticmethod
    def cat(carries: Sequence[Carry]) -> Carry:
        """Join carries of the same boundary into one batch.

        Args:
            carries: at least one carry.

        Returns:
            A carry whose batch is the sum of theirs, in order.
        """
        first = carries[0]
        batch = sum(carry.batch for carry in carries)
        return Carry(_cat([carry.values for carry in carries], first.kinds, batch), first.kinds, batch)


def _select(value: Any, kind: Any, index: Tensor, batch: int) -> Any:
    if kind == "static":
        return value
    match kind:
        case ("size", factor):
            return factor * len(index)
        case ("rows", 1):
            return value[index]
        case ("rows", _):
            return value.unflatten(0, (batch, -1))[index].flatten(0, 1)
    return _rebuild(value, [_select(v, k, index, batch) for v, k in zip(value, kind, strict=True)])


def _cat(values: Sequence[Any], kind: Any, batch: int) -> Any:
    if kind == "static":
        return values[0]
    match kind:
        case ("size", factor):
            return factor * batch
        case ("rows", _):
            return torch.cat(list(values))
    return _rebuild(values[0], [_cat(parts, k, batch) for *parts, k in zip(*values, kind, strict=True)])


def _with_sizes(carry: Carry) -> tuple[Any, ...]:
    """Return a carry's values with sizes read off a tensor: torch.compile would make a graph for every number."""
    row = next((v for v, k in zip(carry.values, carry.kinds, strict=True) if k == ("rows", 1)), None)
    if row is None:
        return carry.values
    return tuple(
        kind[1] * row.shape[0] if kind[:1] == ("size",) else value
        for value, kind in zip(carry.values, carry.kinds, strict=True)
    )


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"[{', '.join(map(_shape, value))}]" if isinstance(value, tuple | list) else repr(value)


def _rebuild(like: Any, items: list[Any]) -> Any:
    return type(like)(items)


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
        classifier: what was given as `head=` to a model that ends in features; else `None`.
        origin: `name`, `boundaries`, `num_stages` and `timm_kwargs` as given to `stage_model`, for a model made by its
            timm name; else `None`.
    """

    def __init__(
        self,
        model: nn.Module,
        stage_names: Sequence[str],
        segments: dict[bool, list[_fx.Segment]],
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
        self._opened = _fx.opened(model, stage_names)
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
        mode = self.model.training
        return Carry(self._call(stage, _with_sizes(carry)), self._kinds[mode][stage], carry.batch)

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
        (answer,) = self._call(self.num_stages, _with_sizes(carry))
        return answer  # type: ignore[no-any-return]

    def _call(self, segment: int, values: tuple[Any, ...]) -> tuple[Any, ...]:
        mode = self.model.training
        part = self._segments[mode][segment]
        constants = {name: self._constant(mode, name) for name in part.constants}
        if mode and torch.is_grad_enabled() and self._checkpoints_stages():
            return checkpoint(part.call, self.model, constants, values, use_reentrant=False)
        return part.call(self.model, constants, values)

    def _constant(self, mode: bool, name: str) -> Any:
        if name == _fx.DEVICE:
            return next(self.model.parameters()).device
        return getattr(self, _constant_name(mode, name))

    def _checkpoints_stages(self) -> bool:
        """Whether `model.set_grad_checkpointing()` was asked of modules that the cut has opened.

        Modules inside a stage checkpoint themselves, as ever.
        """
        return any(getattr(self.model.get_submodule(name), "grad_checkpointing", False) for name in self._opened)

    @torch.no_grad()
    def _inspect(self) -> None:
        """Find out how crossing values relate to the batch, then verify the cut; raise where it is wrong."""
        with _fx.in_mode(self.model, False):
            trail, self._kinds[False] = self._classify()
            self._describe(trail)
            try:
                self._verify(trail)
            except DynskipError as error:
                # Deep networks with unsettled weights may blow up rounding; samples that mix differ in any precision.
                try:
                    twin = copy.deepcopy(self).double()
                    twin._verify(twin._trail(_probe_images(twin.model, twin.input_size, 3)))
                except Exception:
                    raise error from None
        if [part.source for part in self._segments[True]] == [part.source for part in self._segments[False]]:
            self._kinds[True] = self._kinds[False]
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
        two, three = (self._trail(_probe_images(self.model, self.input_size, batch)) for batch in (2, 3))
        kinds = [
            tuple(_kind(a, b, name) for a, b in zip(two[n], three[n], strict=True))
            for n, name in enumerate(self.stage_names)
        ]
        return three, kinds

    def _trail(self, images: Tensor) -> list[tuple[Any, ...]]:
        trail, values = [], (images,)
        for n in range(self.num_stages + 1):
            values = self._call(n, values)
            trail.append(values)
        return trail

    def _describe(self, trail: list[tuple[Any, ...]]) -> None:
        info = {str(entry.get("module")): entry for entry in _feature_info(self.model)}
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
            with _fx.in_mode(self.classifier, False):
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

    def _verify(self, full: list[tuple[Any, ...]]) -> None:
        """Check the whole run against the original model and a shrinking batch against the rows of the whole run."""
        images = _probe_images(self.model, self.input_size, 3)
        expected = self.model(images)
        if not _close(full[-1][0], expected):
            raise DynskipError(
                f"The stages {list(self.stage_names)} do not compose to {type(self.model).__name__}: logits differ. "
                f"The model does not compute the same thing twice; check it for randomness in eval mode, {_fx.BY_HAND}."
            )
        carry, rows = self.start(images), torch.arange(3, device=images.device)
        for n, name in enumerate(self.stage_names):
            carry = self.run(n, carry)
            wanted = Carry(full[n], carry.kinds, 3).select(rows)
            if not _close(carry.values, wanted.values):
                raise DynskipError(
                    f"Boundary {name!r}: running the stage on a part of the batch gives other values than running "
                    f"it on all of it, so its samples are not independent. Choose another boundary, {_fx.BY_HAND}."
                )
            if n < 2:  # 3 rows -> rows 0 and 2 -> row 2
                keep = torch.tensor([0, 2] if n == 0 else [1], device=images.device)
                carry, rows = carry.select(keep), rows[keep]
        if not _close(self._answer(carry), expected[rows]):
            raise DynskipError(
                f"The head after boundary {self.stage_names[-1]!r} gives other logits on a part of the batch than "
                f"on all of it. Choose another last boundary, {_fx.BY_HAND}."
            )


def stage_model(
    model: nn.Module | str | Sequence[nn.Module],
    boundaries: Sequence[str] | None = None,
    *,
    head: nn.Module | None = None,
    num_stages: int | None = None,
    input_size: tuple[int, int, int] | None = None,
    **timm_kwargs: Any,
) -> StagedBackbone:
    """Cut a model into stages that can be run one at a time, on any subset of a batch.

    Args:
        model: a timm model name (`"resnet50"`), a model, or a sequence of modules that run one after another.
        boundaries: qualified names of the modules that end the stages, in the order in which they run; a ModuleList
            ends where its last member does. By default the model's own `feature_info`: the stem and every stage of
            hierarchical models, evenly spaced blocks of plain ViTs. For a sequence, every module is a stage.
        head: for a sequence, what follows its last stage: features to `(B, K)` logits; by default its last module.
            For an encoder, a classifier of the `(B, C)` pooled features that it ends in.
        num_stages: keep only this many of the default boundaries, evenly spaced; the last one always stays.
        input_size: `(C, H, W)` to cut and check at; by default the model's own, or `(3, 224, 224)`.
        **timm_kwargs: for a model name, passed to `timm.create_model` (`pretrained`, `num_classes`, ...).

    Returns:
        The staged backbone. It is verified that its run equals the original model, and that rows of a batch run alone
        equal the rows of the whole run.

    Raises:
        DynskipError: if the model is unknown, refuses the input size, has no such boundary, or cannot be cut there;
            the message names the boundary and says what to do.
    """
    origin: dict[str, Any] | None = None
    if isinstance(model, str):
        given = None if boundaries is None else list(boundaries)
        origin = {"name": model, "boundaries": given, "num_stages": num_stages, "timm_kwargs": timm_kwargs}
        model = _create(model, timm_kwargs)
    elif timm_kwargs:
        raise DynskipError(
            f"{sorted(timm_kwargs)} are arguments for timm models made by name; got a model already built."
        )
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise DynskipError(
            "The model is already compiled as a whole, and skipping happens between its stages. Stage the model that "
            "was compiled (model._orig_mod); its stages can be compiled one by one."
        )
    if not isinstance(model, nn.Module) or isinstance(model, nn.ModuleList | nn.Sequential):
        model, chain = _as_chain(model, head)
        boundaries = chain if boundaries is None else boundaries
        head = None
    _check_traceable(model, boundaries or ())
    names = _default_names(model) if boundaries is None else list(dict.fromkeys(boundaries))
    _check_names(model, names)
    size = _fitting_size(model, input_size)
    images = _probe_images(model, size, 2)

    segments: dict[bool, list[_fx.Segment]] = {}
    constants: dict[bool, dict[str, Tensor]] = {}
    stage_names: list[str] = []
    for training in (False, True):
        # timm's glue may differ between the modes (F.dropout, drop path), so each has segments of its own.
        graph, constants[training] = _fx.trace(model, names, training, images)
        cuts = [_fx.boundary_node(graph, name, model) for name in names]
        if boundaries is None:
            cuts = _default_cuts(model, names[0], cuts, graph, num_stages)
        elif num_stages is not None:
            raise DynskipError("`num_stages` thins out default boundaries; leave it out when you name boundaries.")
        segments[training] = _fx.split(graph, cuts, type(model).__name__)
        # A stem that ends in glue (a position embedding is added) has no module of its own to be named after.
        stage_names = [str(cut.target) if cut.op == "call_module" else "stem" for cut in cuts]
    if boundaries is not None:
        stage_names = names
    return StagedBackbone(model, stage_names, segments, constants, size, classifier=head, origin=origin)


def _create(name: str, kwargs: dict[str, Any]) -> nn.Module:
    if not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "timm.list_models('*resnet*') searches the names."
        raise DynskipError(f"timm {timm.__version__} has no model named {name!r}. {hint}")
    try:
        return timm.create_model(name, **kwargs)
    except Exception as error:
        hint = ""
        if kwargs.get("pretrained"):
            hint = (
                " Published weights are downloaded, which needs the network; without it, build with "
                "pretrained=False and load a file that you brought into `backbone.model`."
            )
        raise DynskipError(f"timm could not build {name!r} with {kwargs}: {error}.{hint}") from error


class _Chain(nn.Module):
    """Modules that run one after another, then a head."""

    def __init__(self, stages: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        for stage in self.stages:
            images = stage(images)
        return self.head(images)  # type: ignore[no-any-return]


def _as_chain(modules: Any, head: nn.Module | None) -> tuple[nn.Module, list[str]]:
    parts = list(modules) if isinstance(modules, Sequence | nn.ModuleList | nn.Sequential) else []
    if not all(isinstance(part, nn.Module) for part in parts) or len(parts) + (head is not None) < 2:
        raise DynskipError(
            f"stage_model takes a timm name, an nn.Module, or a sequence of modules ending in a head; got "
            f"{type(modules).__name__} with {len(parts)} modules."
        )
    if head is None and isinstance(modules, nn.Sequential):
        return modules, [name for name, _ in modules.named_children()][:-1]
    stages, head = (parts, head) if head is not None else (parts[:-1], parts[-1])
    return _Chain(stages, head), [f"stages.{n}" for n in range(len(stages))]


def _feature_info(model: nn.Module) -> list[dict[str, Any]]:
    info = getattr(model, "feature_info", None) or []
    return list(getattr(info, "info", info))


def _default_names(model: nn.Module) -> list[str]:
    known = {name for name, _ in model.named_modules()}
    listed = [name for entry in _feature_info(model) if (name := str(entry.get("module", "")))]
    found = [name if name in known else _resolve(model, name, listed) for name in listed]
    names = [name for name in dict.fromkeys(found) if name]
    if not names:
        children = [name for name, _ in model.named_children()]
        raise DynskipError(
            f"{type(model).__name__} does not say where its stages end (no `feature_info`). Name the modules that end "
            f"them: boundaries=[...]; its children are {children}."
        )
    return names


def _resolve(model: nn.Module, name: str, listed: Sequence[str]) -> str:
    """Find the module that an entry of `feature_info` means whose name is none of the model's; "" if there is none."""
    known = {known_name for known_name, _ in model.named_modules()}
    # Names relative to an inner encoder.
    for child, _ in model.named_children():
        if all(f"{child}.{entry}" in known for entry in listed):
            return f"{child}.{name}"
    # "block.2" for the third member of a list of as many stages as there are entries.
    prefix, _, index = name.rpartition(".")
    count = sum(entry.rpartition(".")[0] == prefix for entry in listed)
    lists = [
        child
        for child, module in model.named_children()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) == count
    ]
    if not index.isdigit() or not lists:
        return ""
    return f"{difflib.get_close_matches(prefix, lists, n=1, cutoff=0)[0]}.{index}"


def _default_cuts(
    model: nn.Module, first: str, cuts: list[Any], graph: torch.fx.Graph, num_stages: int | None
) -> list[torch.fx.Node]:
    reductions = [entry.get("reduction") for entry in _feature_info(model)]
    if len(cuts) > 1 and len(set(reductions)) == 1:
        num_stages = num_stages or min(PLAIN_STAGES, len(cuts))
    else:
        stem = _stem_node(model, first, graph)
        cuts = [_fx.swallow_parameterless(cut, model) for cut in cuts[:-1]] + cuts[-1:]
        # VGG ends its last stage at the max-pool that the cut before it has just swallowed.
        cuts = list(dict.fromkeys([*([stem] if stem is not None else []), *cuts]))
    if num_stages is None:
        return cuts
    if not 1 <= num_stages <= len(cuts):
        raise DynskipError(
            f"num_stages={num_stages} is out of range: {type(model).__name__} has {len(cuts)} boundaries."
        )
    return [cuts[(i + 1) * len(cuts) // num_stages - 1] for i in range(num_stages)]


def _stem_node(model: nn.Module, first: str, graph: torch.fx.Graph) -> torch.fx.Node | None:
    """Return the value that enters the first stage, unless the first boundary ends the stem itself."""
    layers = [m for m in model.get_submodule(first).modules() if list(m.parameters(recurse=False))]
    # The first called member, where the stage is a ModuleList.
    calls = (n for n in graph.nodes if n.op == "call_module" and f"{n.target}.".startswith(first + "."))
    entering: torch.fx.Node = next(calls).all_input_nodes[0]
    return None if len(layers) <= 1 or entering.op == "placeholder" else entering


def _check_traceable(model: nn.Module, names: Sequence[str]) -> None:
    modules = dict(model.named_modules())  # get_submodule is what scripted modules lack
    for name in _fx.opened(model, names):
        module = modules[name]
        if isinstance(module, torch.jit.ScriptModule):
            raise DynskipError(
                f"{name or module.original_name} is scripted or frozen by TorchScript, so its forward cannot be cut. "
                "Stage the Python module that it was made from."
            )


def _check_names(model: nn.Module, names: Sequence[str]) -> None:
    if not names:
        raise DynskipError("No boundaries were given. Name at least one module that ends a stage.")
    known = [name for name, _ in model.named_modules() if name]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Its children are {known[:8]}."
            raise DynskipError(f"{type(model).__name__} has no module {name!r} to end a stage at. {hint}")


def _probe_images(model: nn.Module, input_size: tuple[int, int, int], batch: int) -> Tensor:
    like = next(model.parameters(), torch.empty(0))
    # A generator of its own: building a backbone must not move the user's random state.
    images = torch.randn(3, *input_size, generator=torch.Generator().manual_seed(0))[:batch]
    return images.to(like.device, like.dtype)


def _fitting_size(model: nn.Module, given: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """Return the size to cut at, having seen that the model takes it."""
    sizes = [given] if given is not None else _likely_sizes(model)
    for size in sizes:
        try:
            with torch.no_grad(), _fx.in_mode(model, False):
                model(_probe_images(model, size, 2))
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
    # Built for other channels than its published weights; but not where pixels are folded into channels first.
    built_for = channels if convolution is None else convolution.in_channels
    return [(c, height, width) for c in dict.fromkeys((channels, built_for))]


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
        f"{shapes[1]} for 3). Choose another boundary, {_fx.BY_HAND}."
    )


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        if not a.is_floating_point():
            return torch.equal(a, b)
        # Convolutions pick other algorithms for other batch sizes; half precision rounds accordingly coarser.
        tolerance = 1e-4 if a.dtype in (torch.float32, torch.float64) else 3e-2
        return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-6)) if a.numel() else True
    if isinstance(a, tuple | list):
        return all(_close(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _constant_name(training: bool, name: str) -> str:
    return f"{'train' if training else 'eval'}{name}"
