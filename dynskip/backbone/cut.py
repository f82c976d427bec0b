"""Any model as stages: find where it can be cut, cut it there, and prove that the pieces compose to it."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from dynskip.backbone._fx import Segment, opened, split, trace
from dynskip.backbone.check import fitting_size, probe_images
from dynskip.backbone.staged import StagedBackbone, feature_info
from dynskip.backbone.taken import Taken
from dynskip.errors import DynskipError, lacks_memory

PLAIN_STAGES = 4  # a plain ViT lists every block; this many evenly spaced ones are its default stages


def stage_model(
    model: nn.Module | str | Sequence[nn.Module],
    boundaries: Sequence[str] | None = None,
    *,
    head: nn.Module | None = None,
    num_stages: int | None = None,
    input_size: tuple[int, int, int] | None = None,
    verify: bool = True,
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
        verify: whether to compare the stages with the model. `False` starts sooner; use it for a cut that has been
            verified before, with the same versions.
        **timm_kwargs: for a model name, passed to `timm.create_model` (`pretrained`, `num_classes`, ...).

    Returns:
        The staged backbone. Unless `verify=False`, it is verified that its run equals the original model, and that a
        row of a batch run alone equals the row of the whole run.

    Raises:
        DynskipError: if the model is unknown, refuses the input size, has no such boundary, or cannot be cut there;
            the message names the boundary and says what to do.

    Examples:
        >>> stage_model("test_resnet", num_classes=4).num_features
        (32, 32, 48, 192, 96)
        >>> stage_model("test_vit", boundaries=["blocks.0", "blocks.5"]).num_stages
        2
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
    if boundaries is not None and num_stages is not None:
        raise DynskipError("`num_stages` selects among the default boundaries; leave it out when you name boundaries.")
    _check_traceable(model, boundaries or ())
    names = _default_names(model) if boundaries is None else _given_names(model, boundaries)
    if verify and any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        raise DynskipError(
            f"{type(model).__name__} is on the meta device and has no values, so its stages cannot be compared with "
            "it. Give it its weights first, or leave the comparison out: verify=False."
        )
    size, reference = fitting_size(model, input_size, opened(model, names), verify)
    images = probe_images(model, size)[:2]

    segments: dict[bool, list[Segment]] = {}
    taken: dict[bool, dict[str, Taken]] = {}
    constants: dict[str, Tensor] = {}
    # The code between the stages may differ between the modes (F.dropout). Then each mode has its own segments.
    traces = {False: trace(model, names, False, images)}
    if not traces[False].of_any_mode:
        traces[True] = trace(model, names, True, images)
    for training, traced in traces.items():
        cuts = [_boundary_node(traced.graph, name, model) for name in names]
        if boundaries is None:
            cuts = _default_cuts(model, names[0], cuts, traced.graph, num_stages)
        segments[training], taken[training] = split(traced.graph, cuts), traced.taken
        constants |= traced.constants
    segments.setdefault(True, list(segments[False]))
    taken.setdefault(True, taken[False])
    stage_names = names
    if boundaries is None:
        # A stem that ends in glue (a position embedding is added) has no module to be named after.
        stage_names = [str(cut.target) if cut.op == "call_module" else "stem" for cut in cuts]
    return StagedBackbone(model, stage_names, names, segments, constants, taken, size, reference, head, origin)


def check_name(name: str) -> None:
    """Refuse a name that timm does not know; names of other places would be downloaded."""
    if not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "timm.list_models('*resnet*') searches the names."
        raise DynskipError(f"timm {timm.__version__} has no model named {name!r}. {hint}")


def _create(name: str, kwargs: dict[str, Any]) -> nn.Module:
    check_name(name)
    try:
        return timm.create_model(name, **kwargs)
    except Exception as error:
        if lacks_memory(error):
            raise
        hint = ""
        if kwargs.get("pretrained"):
            hint = (
                " Published weights are downloaded, which needs the network; without it, build with "
                "pretrained=False and load a file that you brought into `backbone.model`."
            )
        raise DynskipError(f"timm could not build {name!r} with {kwargs}: {error}.{hint}") from error


def _as_chain(modules: Any, head: nn.Module | None) -> tuple[nn.Module, list[str]]:
    parts = list(modules) if isinstance(modules, Sequence | nn.ModuleList | nn.Sequential) else []
    if not all(isinstance(part, nn.Module) for part in parts) or len(parts) + (head is not None) < 2:
        raise DynskipError(
            f"stage_model takes a timm name, an nn.Module, or a sequence of modules ending in a head; got "
            f"{type(modules).__name__} with {len(parts)} modules."
        )
    if head is None and isinstance(modules, nn.Sequential) and len(set(parts)) == len(parts):
        return modules, [name for name, _ in modules.named_children()][:-1]
    parts = parts if head is None else [*parts, head]
    # A module that comes again needs a name of its own, so it is wrapped.
    *stages, last = [nn.Sequential(part) if part in parts[:n] else part for n, part in enumerate(parts)]
    chain = nn.Sequential(OrderedDict(stages=nn.Sequential(*stages), head=last))
    return chain, [f"stages.{n}" for n in range(len(stages))]


def _default_names(model: nn.Module) -> list[str]:
    listed = [name for entry in feature_info(model) if (name := str(entry.get("module", "")))]
    names = [name for name in dict.fromkeys(_resolve(model, name, listed) for name in listed) if name]
    if not names:
        children = [name for name, _ in model.named_children()]
        raise DynskipError(
            f"{type(model).__name__} does not say where its stages end (no `feature_info`). Name the modules that end "
            f"them: boundaries=[...]; its children are {children}."
        )
    return names


def _resolve(model: nn.Module, name: str, listed: Sequence[str]) -> str:
    """Find the module that an entry of `feature_info` means; "" if there is none."""
    known = dict(model.named_modules())
    if name in known:
        return name
    children = dict(model.named_children())
    for child in children:  # names relative to an inner encoder
        if all(f"{child}.{entry}" in known for entry in listed):
            return f"{child}.{name}"
    # "block.2" for the third member of a list of as many stages as there are entries.
    prefix, _, index = name.rpartition(".")
    count = sum(entry.rpartition(".")[0] == prefix for entry in listed)
    lists = [c for c, m in children.items() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) == count]
    if not index.isdigit() or not lists:
        return ""
    return f"{difflib.get_close_matches(prefix, lists, n=1, cutoff=0)[0]}.{index}"


def _boundary_node(graph: torch.fx.Graph, name: str, model: nn.Module) -> torch.fx.Node:
    """Return the node that ends a stage: the call of the module `name`, or of its last called member."""
    nodes: list[torch.fx.Node] = [node for node in graph.nodes if node.op == "call_module"]
    calls = [node for node in nodes if node.target == name]
    if len(calls) > 1:
        raise DynskipError(
            f"Boundary {name!r} is called {len(calls)} times in one forward of {type(model).__name__}, so it is no "
            "single place to stop. Choose a module that is called once, or use a copy of it for each call."
        )
    if calls:
        return calls[0]
    members = [node for node in nodes if str(node.target).startswith(name + ".")]
    if isinstance(model.get_submodule(name), nn.ModuleList | nn.ModuleDict) and members:
        return members[-1]
    if members:
        raise DynskipError(
            f"Boundary {members[-1].target!r} lies inside boundary {name!r}. Stages follow one another: keep one of "
            "them."
        )
    raise DynskipError(
        f"Boundary {name!r} is never called in the forward of {type(model).__name__}. Name modules that the forward "
        "calls, such as those in model.feature_info."
    )


def _default_cuts(
    model: nn.Module, first: str, cuts: list[Any], graph: torch.fx.Graph, num_stages: int | None
) -> list[torch.fx.Node]:
    reductions = {entry.get("reduction") for entry in feature_info(model)}
    if len(cuts) > 1 and len(reductions) == 1:
        count = min(PLAIN_STAGES, len(cuts))
    else:
        swallowed = [_swallow_parameterless(cut, model) for cut in cuts[:-1]]
        # VGG ends its last stage at the max-pool that the cut before it has just swallowed.
        cuts = list(dict.fromkeys([*_stem(model, first, graph), *swallowed, cuts[-1]]))
        count = len(cuts)
    count = count if num_stages is None else num_stages
    if not 1 <= count <= len(cuts):
        raise DynskipError(f"num_stages={count} is out of range: {type(model).__name__} has {len(cuts)} boundaries.")
    return [cuts[(i + 1) * len(cuts) // count - 1] for i in range(count)]


def _swallow_parameterless(node: torch.fx.Node, model: nn.Module) -> torch.fx.Node:
    """Move a cut past modules without parameters (activation, max-pool) that are the only reader of its value.

    What crosses the boundary gets smaller, and the gate sees what the next stage sees.
    """
    while len(node.users) == 1:
        (user,) = node.users
        if user.op != "call_module" or any(True for _ in model.get_submodule(str(user.target)).parameters()):
            break
        node = user
    return node


def _stem(model: nn.Module, first: str, graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """Return the value that enters the first stage; nothing where the first boundary ends the stem itself."""
    layers = [m for m in model.get_submodule(first).modules() if list(m.parameters(recurse=False))]
    # The first called member, where the stage is a ModuleList.
    calls = (n for n in graph.nodes if n.op == "call_module" and f"{n.target}.".startswith(first + "."))
    entering: torch.fx.Node = next(calls).all_input_nodes[0]
    return [] if len(layers) <= 1 or entering.op == "placeholder" else [entering]


def _check_traceable(model: nn.Module, names: Sequence[str]) -> None:
    modules = dict(model.named_modules())  # get_submodule is what scripted modules lack
    for name in opened(model, names):
        if isinstance(modules[name], torch.jit.ScriptModule):
            raise DynskipError(
                f"{name or modules[name].original_name} is scripted or frozen by TorchScript, so its forward cannot be "
                "cut. Stage the Python module that it was made from."
            )


def _given_names(model: nn.Module, boundaries: Sequence[str]) -> list[str]:
    if not boundaries:
        raise DynskipError("No boundaries were given. Name at least one module that ends a stage.")
    known = [name for name, _ in model.named_modules() if name]
    for name in boundaries:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Its children are {known[:8]}."
            raise DynskipError(f"{type(model).__name__} has no module {name!r} to end a stage at. {hint}")
    return list(dict.fromkeys(boundaries))
