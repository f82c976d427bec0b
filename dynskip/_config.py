"""A model as plain values and weights. `dynskip._rebuild` makes the model from them again."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

import timm
import torch
from torch import Tensor, nn

import dynskip
from dynskip import rules
from dynskip._modes import DrawingApart, in_mode
from dynskip.backbone import StagedBackbone
from dynskip.errors import DynskipError
from dynskip.flops import FLOPsLookup

if TYPE_CHECKING:
    from dynskip.early_exit import EarlyExit
    from dynskip.wrapper import StopOrForward

    Wrapped: TypeAlias = StopOrForward | EarlyExit

FORMAT, VERSION = "dynskip", 2  # of config.json; raise the version when readers have to change
CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Arguments of timm.create_model that say where weights come from. Here they come from the saved file, and a file from
# the hub must not name others.
WEIGHT_SOURCES = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def describe(model: Wrapped, wrapper: type[Wrapped], weights: bytes) -> dict[str, Any]:
    """Describe a model in values that JSON can hold: the arguments that rebuild it, and which weights belong to it."""
    kept = {"lookup": "_given_lookup"}  # the one argument that a wrapper keeps under another name
    arguments = {name: getattr(model, kept.get(name, name)) for name in inspect.signature(wrapper).parameters}
    places: dict[int, str] = {}
    return {
        "format": FORMAT,
        "version": VERSION,
        "made_with": {"dynskip": dynskip.__version__, "timm": timm.__version__, "torch": str(torch.__version__)},
        "wrapper": wrapper.__name__,
        "dtype": _dtype(model),
        **{name: _plain(value, name, places) for name, value in arguments.items()},
        "temperature": model.temperature,
        "class_names": None if model.class_names is None else list(model.class_names),
        "preprocessing": _plain(checked_preprocessing(model.preprocessing), "preprocessing", places),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }


def _plain(value: Any, what: str, places: dict[int, str]) -> Any:
    """Turn an argument into what JSON can hold. A module becomes a description, the next time a reference to it.

    `places` holds where each module was described, by its identity.
    """
    match value:
        case float() if not math.isfinite(value):
            raise DynskipError(f"{what} is {value}. JSON has no NaN or infinite numbers; give a finite one.")
        case None | bool() | int() | float() | str():
            return value
        case list() | tuple() | nn.ModuleList():
            return [_plain(item, f"{what}[{n}]", places) for n, item in enumerate(value)]
        case Mapping() if all(isinstance(key, str) for key in value):
            return {key: _plain(item, f"{what}[{key!r}]", places) for key, item in value.items()}
        case FLOPsLookup():
            costs = {name: getattr(value, name) for name in inspect.signature(FLOPsLookup).parameters}
            return {name: cost.tolist() if isinstance(cost, Tensor) else cost for name, cost in costs.items()}
        case nn.Module() if id(value) in places:
            return {"same_as": places[id(value)]}
        case nn.Module():
            plain = _describe_part(value, what, places)
            for place, module in parts_in(value, what).items():
                places.setdefault(id(module), place)
            return plain
    raise DynskipError(
        f"{what} is a {type(value).__name__}, which a configuration cannot hold. Use numbers, strings, lists, mappings "
        "or modules; timm takes layers by name, such as act_layer='gelu'."
    )


def parts_in(part: nn.Module, what: str) -> dict[str, nn.Module]:
    """Name a part and what is in it, for references to them."""
    return {f"{what}.{name}" if name else what: module for name, module in part.named_modules()}


def _describe_backbone(backbone: StagedBackbone, what: str, places: dict[int, str]) -> dict[str, Any]:
    origin = backbone.origin
    if origin is None:
        raise DynskipError(
            f"The backbone was staged from a {type(backbone.model).__name__} already built, and a saved model has to "
            "be rebuilt from plain values. Stage it by its timm name: stage_model('resnet50', num_classes=...)."
        )
    kwargs = {key: value for key, value in origin["timm_kwargs"].items() if key not in WEIGHT_SOURCES}
    in_front: dict[str, Any] = {}
    names = backbone.stage_names
    if (glance := backbone.glance) is not None:
        light = _describe_backbone(glance.light, f"{what}.glance.light", places)
        in_front, names = {"glance": {"light": light, "size": glance.size}}, names[glance.light.num_stages :]
    return {
        **origin,
        "timm_kwargs": _plain(kwargs, f"{what}.timm_kwargs", places),
        "input_size": list(backbone.input_size),
        "stage_names": list(names),
        "head": _plain(backbone.classifier, f"{what}.classifier", places),
        **in_front,
    }


def _describe_part(part: nn.Module, what: str, places: dict[int, str]) -> dict[str, Any]:
    """Name a part's class and the arguments that build it again, which it keeps under their own names."""
    if isinstance(part, StagedBackbone):
        return _describe_backbone(part, what, places)
    cls = type(part)
    name = next((name for name, known in known_classes().items() if known is cls), cls.__name__)
    if cls is nn.Identity:
        return {"class": name, "arguments": {}}
    if isinstance(part, nn.Linear) and cls is nn.Linear:
        sizes = {"in_features": part.in_features, "out_features": part.out_features}
        return {"class": name, "arguments": {**sizes, "bias": part.bias is not None}}
    arguments = {}
    for key, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or not hasattr(part, key):
            raise DynskipError(
                f"{what} is a {cls.__name__}, which does not keep its argument {key!r}, so it cannot be rebuilt. "
                f"Keep every argument of the constructor under its own name: self.{key} = {key}."
            )
        arguments[key] = _plain(getattr(part, key), f"{what}.{key}", places)
    return {"class": name, "arguments": arguments}


def known_classes() -> dict[str, Any]:
    """Return what parts may be made of without the user passing a class, under the names in a configuration."""
    own = {f"dynskip.{name}": getattr(dynskip, name) for name in dynskip.__all__}
    return {"torch.nn.Linear": nn.Linear, "torch.nn.Identity": nn.Identity, **own}


def checked_preprocessing(given: Any) -> Any:
    """Refuse a model's `preprocessing` that timm's transforms cannot be built from."""
    if given is None:
        return None
    known = {*inspect.signature(timm.data.create_transform).parameters, "num_frames"}
    if not (isinstance(given, Mapping) and set(given) <= known):
        raise DynskipError(
            "`preprocessing` holds arguments of timm.data.create_transform, such as input_size, mean and std, and "
            f"`num_frames`; got {given!r}. For a published timm model, timm.data.resolve_model_data_config gives them."
        )
    check_types(timm.data.create_transform, given, "preprocessing", num_frames=int)
    for name in {"input_size", "num_frames", "mean", "std", "crop_pct"} & set(given):
        values = given[name] if isinstance(given[name], Sequence) else (given[name],)
        positive = all(value is None or value > 0 for value in values)
        if not values or not (positive or name == "mean"):
            raise DynskipError(f"preprocessing.{name} is {given[name]!r}; expected positive numbers (a mean: any).")
    try:
        timm.data.create_transform(**{name: value for name, value in given.items() if name != "num_frames"})
    except Exception as error:
        raise DynskipError(
            f"timm.data.create_transform cannot use the `preprocessing` {given!r} ({type(error).__name__}: {error})."
        ) from error
    return given


def check_types(function: Callable[..., Any], arguments: Mapping[str, Any], what: str, **more: Any) -> None:
    """Refuse arguments that are not of the types that a function's annotations name."""
    for name, hint in (get_type_hints(function) | more).items():
        if name in arguments and not _fits(arguments[name], hint):
            raise DynskipError(f"{what}.{name} is {arguments[name]!r}; expected {inspect.formatannotation(hint)}.")


def _fits(value: Any, hint: Any) -> bool:
    """Say whether a value that JSON can hold is of a type. Modules are left to those who take them."""
    kind, options = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, each) for each in options)
    if kind is Literal:
        return value in options
    if kind in (tuple, list, Sequence):
        if not isinstance(value, list | tuple):
            return False
        each = options if kind is tuple and options[-1] is not ... else options[:1] * len(value)
        return len(value) == len(each) and all(map(_fits, value, each))
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind if kind in (int, bool, str, dict, NoneType) else True


def _dtype(model: nn.Module) -> str:
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        raise DynskipError(
            f"The model's parameters are {sorted(dtypes)}; a saved model has one dtype of {list(DTYPES)}. Convert the "
            "whole model, for example with model.float()."
        )
    return dtypes.pop()


def pack(model: nn.Module) -> bytes:
    """Return a model's state as the content of a safetensors file. Tied weights are in it once, by their first name."""
    state, first = model.state_dict(keep_vars=True), first_names(model)
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise DynskipError(f"{key!r} is no tensor, and a weight file holds tensors only. Keep it as an argument.")
    # Copies: entries may be parts of one memory, and a file holds each of them apart.
    copies = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in state.items()
        if first[key] == key
    }
    packed: bytes = from_extra("safetensors.torch").save(copies, metadata={"format": "pt"})
    return packed


def first_names(model: nn.Module) -> dict[str, str]:
    """Map each entry of a model's state to the first entry that is the same tensor."""
    first: dict[int, str] = {}
    return {key: first.setdefault(id(value), key) for key, value in model.state_dict(keep_vars=True).items()}


def from_extra(module: str) -> Any:
    """Import a module that the extra `hub` installs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DynskipError(f"This needs {module.split('.')[0]}. Install dynskip with the extra `hub`.") from error


@torch.no_grad()
def compare(model: Wrapped, twin: Wrapped) -> None:
    """Refuse a model that gives other answers than what its configuration rebuilds, such as one with moved strides."""
    weight = next(model.parameters())
    images = torch.randn(2, *model.backbone.input_size, generator=torch.Generator().manual_seed(0)).to(weight)
    with in_mode(model, False):
        pairs = zip(_answers(model, images), _answers(twin.to(weight.device), images), strict=True)
        for (what, ours), (_, theirs) in pairs:
            # Not to the bit: the memory layout (channels-last) is not saved, and other kernels round differently.
            tolerance = 3e-2 if ours.dtype in (torch.float16, torch.bfloat16) else 1e-4
            limit = tolerance * float(ours.double().nan_to_num(0.0, 0.0, 0.0).abs().max().clamp(min=1e-6))
            if not torch.allclose(ours.double(), theirs.double(), rtol=0, atol=limit, equal_nan=True):
                raise DynskipError(
                    f"A model rebuilt from the configuration gives other answers at {what}. What was changed after "
                    "the model was built, or is no argument of its parts, cannot be saved: make it an argument, or "
                    "save the model before the change."
                )


def _answers(model: Wrapped, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Run each stage and its gate, and then the head; yield where a value came from, and the value."""
    backbone, carry = model.backbone, model.backbone.start(images)
    for n, name in enumerate(backbone.stage_names):
        with DrawingApart():  # a gate that draws draws the same in both models
            carry = backbone.run(n, carry)
            pooled = backbone.pool(n, carry)
            gate: Any = getattr(model, "exits", model.gates)[n]
            logits, state = gate(pooled, gate.initial_state(len(images)))
            again, _ = gate(pooled.flip(0), state)
        for value in (pooled, logits, *state, again):
            yield f"stage {name!r} and its gate", value
    used = torch.full((1, len(images)), backbone.num_stages, device=images.device)
    with DrawingApart():
        logits = backbone.head(carry)
        answer = rules.weighted(model.readout, used, logits[None])
    yield "the head", logits
    yield "the consensus", answer
