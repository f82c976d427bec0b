"""Any model as stages: find where it can be cut, cut it there, and prove that the pieces compose to it."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from dynskip._modes import in_mode
from dynskip.backbone._fx import BY_HAND, Segment, boundary_node, opened, split, swallow_parameterless, trace
from dynskip.backbone.staged import StagedBackbone, feature_info, probe_images
from dynskip.errors import DynskipError

PLAIN_STAGES = 4  # a plain ViT lists every block; this many evenly spaced ones are its default stages


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
    images = probe_images(model, size, 2)

    segments: dict[bool, list[Segment]] = {}
    constants: dict[bool, dict[str, Tensor]] = {}
    stage_names: list[str] = []
    for training in (False, True):
        # timm's glue may differ between the modes (F.dropout, drop path), so each has segments of its own.
        graph, constants[training] = trace(model, names, training, images)
        cuts = [boundary_node(graph, name, model) for name in names]
        if boundaries is None:
            cuts = _default_cuts(model, names[0], cuts, graph, num_stages)
        elif num_stages is not None:
            raise DynskipError("`num_stages` thins out default boundaries; leave it out when you name boundaries.")
        segments[training] = split(graph, cuts, type(model).__name__)
        # A stem that ends in glue (a position embedding is added) has no module of its own to be named after.
        stage_names = [str(cut.target) if cut.op == "call_module" else "stem" for cut in cuts]
    if boundaries is not None:
        stage_names = names
    backbone = StagedBackbone(model, stage_names, segments, constants, size, classifier=head, origin=origin)
    _verify(backbone)
    return backbone


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


def _default_names(model: nn.Module) -> list[str]:
    known = {name for name, _ in model.named_modules()}
    listed = [name for entry in feature_info(model) if (name := str(entry.get("module", "")))]
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
    reductions = [entry.get("reduction") for entry in feature_info(model)]
    if len(cuts) > 1 and len(set(reductions)) == 1:
        num_stages = num_stages or min(PLAIN_STAGES, len(cuts))
    else:
        stem = _stem_node(model, first, graph)
        cuts = [swallow_parameterless(cut, model) for cut in cuts[:-1]] + cuts[-1:]
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
    for name in opened(model, names):
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


def _fitting_size(model: nn.Module, given: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """Return the size to cut at, having seen that the model takes it."""
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
    # Built for other channels than its published weights; but not where pixels are folded into channels first.
    built_for = channels if convolution is None else convolution.in_channels
    return [(c, height, width) for c in dict.fromkeys((channels, built_for))]


@torch.no_grad()
def _verify(backbone: StagedBackbone) -> None:
    """Raise where the stages are not the original model, or a sample's values depend on its neighbours."""
    with in_mode(backbone.model, False):
        try:
            _compare(backbone)
        except DynskipError as error:
            # Deep networks with unsettled weights may blow up rounding; samples that mix differ in any precision.
            try:
                _compare(copy.deepcopy(backbone).double())
            except Exception:
                raise error from None


def _compare(backbone: StagedBackbone) -> None:
    """Check the whole run against the original model, and a shrinking batch against the rows of the whole run."""
    images = probe_images(backbone.model, backbone.input_size, 3)
    expected, names = backbone.model(images), backbone.stage_names
    whole = part = backbone.start(images)
    rows, mixing = torch.arange(3, device=images.device), ""
    for n, name in enumerate(names):
        if n < 2:  # 3 rows -> rows 0 and 2 -> row 2
            keep = torch.tensor([0, 2] if n == 0 else [1], device=images.device)
            part, rows = part.select(keep), rows[keep]
        # Compared at once: an activation that follows may work in place.
        whole, part = backbone.run(n, whole), backbone.run(n, part)
        if not mixing and not _close(part.values, whole.select(rows).values):
            mixing = name
    if not _close(backbone._answer(whole), expected):
        raise DynskipError(
            f"The stages {list(names)} do not compose to {type(backbone.model).__name__}: logits differ. "
            f"The model does not compute the same thing twice; check it for randomness in eval mode, {BY_HAND}."
        )
    if mixing:
        raise DynskipError(
            f"Boundary {mixing!r}: running the stage on a part of the batch gives other values than running "
            f"it on all of it, so its samples are not independent. Choose another boundary, {BY_HAND}."
        )
    if not _close(backbone._answer(part), expected[rows]):
        raise DynskipError(
            f"The head after boundary {names[-1]!r} gives other logits on a part of the batch than "
            f"on all of it. Choose another last boundary, {BY_HAND}."
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
