"""A model as plain values and weights, and the model from them again."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import timm
import torch
from torch import Tensor, nn

import dynskip
from dynskip._modes import in_mode
from dynskip.backbone import StagedBackbone, stage_model
from dynskip.errors import DynskipError
from dynskip.flops import FLOPsLookup

if TYPE_CHECKING:
    from dynskip.early_exit import EarlyExit
    from dynskip.wrapper import StopOrForward

    Wrapped: TypeAlias = StopOrForward | EarlyExit

FORMAT, VERSION = "dynskip", 1  # of config.json; raise the version when readers have to change
CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Arguments of timm.create_model that say where weights come from. Here they come from the saved file, and a file from
# the hub must not name others.
_WEIGHT_SOURCES = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def describe(model: Wrapped, wrapper: type[Wrapped], weights: bytes) -> dict[str, Any]:
    """Describe a model in values that JSON can hold: the arguments that rebuild it, and which weights belong to it."""
    kept = {"lookup": "_given_lookup"}  # the one argument that a wrapper keeps under another name
    arguments = {name: getattr(model, kept.get(name, name)) for name in inspect.signature(wrapper).parameters}
    return {
        "format": FORMAT,
        "version": VERSION,
        "made_with": {"dynskip": dynskip.__version__, "timm": timm.__version__, "torch": str(torch.__version__)},
        "wrapper": wrapper.__name__,
        "dtype": _dtype(model),
        **{name: _plain(value, name) for name, value in arguments.items()},
        "temperature": model.temperature,
        "class_names": None if model.class_names is None else list(model.class_names),
        "preprocessing": _plain(_checked_preprocessing(model.preprocessing), "preprocessing"),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }


def _plain(value: Any, what: str) -> Any:
    """Turn an argument into what JSON can hold; modules become descriptions."""
    match value:
        case float() if not math.isfinite(value):
            raise DynskipError(f"{what} is {value}. JSON has no NaN or infinite numbers; give a finite one.")
        case None | bool() | int() | float() | str():
            return value
        case list() | tuple() | nn.ModuleList():
            return [_plain(item, f"{what}[{n}]") for n, item in enumerate(value)]
        case Mapping() if all(isinstance(key, str) for key in value):
            return {key: _plain(item, f"{what}[{key!r}]") for key, item in value.items()}
        case FLOPsLookup():
            costs = {name: getattr(value, name) for name in inspect.signature(FLOPsLookup).parameters}
            return {name: cost.tolist() if isinstance(cost, Tensor) else cost for name, cost in costs.items()}
        case StagedBackbone():
            return _describe_backbone(value)
        case nn.Module():
            return _describe_part(value, what)
    raise DynskipError(
        f"{what} is a {type(value).__name__}, which a configuration cannot hold. Use numbers, strings, lists, mappings "
        "or modules; timm takes layers by name, such as act_layer='gelu'."
    )


def _describe_backbone(backbone: StagedBackbone) -> dict[str, Any]:
    origin = backbone.origin
    if origin is None:
        raise DynskipError(
            f"The backbone was staged from a {type(backbone.model).__name__} already built, and a saved model has to "
            "be rebuilt from plain values. Stage it by its timm name: stage_model('resnet50', num_classes=...)."
        )
    kwargs = {key: value for key, value in origin["timm_kwargs"].items() if key not in _WEIGHT_SOURCES}
    return {
        **origin,
        "timm_kwargs": _plain(kwargs, "timm_kwargs"),
        "input_size": list(backbone.input_size),
        "stage_names": list(backbone.stage_names),
        "head": _plain(backbone.classifier, "The backbone's `head`"),
    }


def _describe_part(part: nn.Module, what: str) -> dict[str, Any]:
    """Name a part's class and the arguments that build it again, which it keeps under their own names."""
    cls = type(part)
    name = next((name for name, known in _known_classes().items() if known is cls), cls.__name__)
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
        arguments[key] = _plain(getattr(part, key), f"{what}.{key}")
    return {"class": name, "arguments": arguments}


def _known_classes() -> dict[str, Any]:
    """Return what parts may be made of without the user passing a class, under the names in a configuration."""
    own = {f"dynskip.{name}": getattr(dynskip, name) for name in dynskip.__all__}
    return {"torch.nn.Linear": nn.Linear, "torch.nn.Identity": nn.Identity, **own}


def _checked_preprocessing(given: Any) -> Any:
    known = {*inspect.signature(timm.data.create_transform).parameters, "num_frames"}
    if given is not None and not (isinstance(given, Mapping) and set(given) <= known):
        raise DynskipError(
            "`preprocessing` holds arguments of timm.data.create_transform, such as input_size, mean and std, and "
            f"`num_frames`; got {given!r}. For a published timm model, timm.data.resolve_model_data_config gives them."
        )
    return given


def _dtype(model: nn.Module) -> str:
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        raise DynskipError(
            f"The model's parameters are {sorted(dtypes)}; a saved model has one dtype of {list(_DTYPES)}. Convert the "
            "whole model, for example with model.float()."
        )
    return dtypes.pop()


def pack(model: nn.Module) -> bytes:
    """Return a model's state as the content of a safetensors file."""
    state = model.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise DynskipError(f"{key!r} is no tensor, and a weight file holds tensors only. Keep it as an argument.")
    # Copies: tied weights share memory, and a file holds each of its entries apart.
    copies = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    packed: bytes = from_extra("safetensors.torch").save(copies, metadata={"format": "pt"})
    return packed


def from_extra(module: str) -> Any:
    """Import a module that the extra `hub` installs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DynskipError(f"This needs {module.split('.')[0]}. Run `pip install 'dynskip[hub]'`.") from error


def rebuild(
    config: Any, weights: bytes, classes: Iterable[type[nn.Module]], wrappers: Iterable[type[Wrapped]]
) -> Wrapped:
    """Build a model on the CPU, in eval mode, from what `describe` and `pack` gave. Nothing of it is trusted."""
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise DynskipError(
            f"{CONFIG} was not written by dynskip's `save_pretrained`. Plain timm models go to `stage_model`, by name."
        )
    version = config.get("version")
    if version not in range(1, VERSION + 1):
        raise DynskipError(
            f"The model has format version {version}, and dynskip {dynskip.__version__} reads up to {VERSION}. It was "
            f"written with {config.get('made_with')}: update with `pip install -U dynskip`."
        )
    if hashlib.sha256(weights).hexdigest() != config.get("weights_sha256"):
        raise DynskipError(
            f"{WEIGHTS} is not the file that {CONFIG} was written with: its SHA-256 differs. It is damaged, cut off or "
            "was changed; save or download the model again."
        )
    try:
        with torch.random.fork_rng(devices=[]):  # initial weights are thrown away; the user's random state is not
            wrapper = {cls.__name__: cls for cls in wrappers}[config["wrapper"]]
            model = _build(wrapper, config, {cls.__name__: cls for cls in classes})
    except DynskipError:
        raise
    except Exception as error:
        raise DynskipError(
            f"{CONFIG} does not describe a model that dynskip {dynskip.__version__} with timm {timm.__version__} can "
            f"build ({type(error).__name__}: {error}). It was written with {config.get('made_with')}; install these "
            "versions, or save the model again."
        ) from error
    try:
        tensors = from_extra("safetensors.torch").load(weights)
    except Exception as error:  # the library's own errors have no common class
        raise DynskipError(
            f"{WEIGHTS} is no safetensors file ({type(error).__name__}: {error}). Save the model again."
        ) from error
    _load(model, tensors)
    return model.eval()


def _build(wrapper: type[Wrapped], config: dict[str, Any], classes: dict[str, type[nn.Module]]) -> Wrapped:
    arguments = {name: _revive(config[name], classes) for name in inspect.signature(wrapper).parameters}
    arguments["backbone"] = _build_backbone(**arguments["backbone"])
    if arguments.get("lookup") is not None:
        arguments["lookup"] = FLOPsLookup(**_with_tuples(arguments["lookup"]))
    model = wrapper(**arguments).to(_DTYPES[config["dtype"]])
    names, preprocessing = config["class_names"], _checked_preprocessing(config["preprocessing"])
    model.temperature = config["temperature"]
    model.class_names = tuple(names) if isinstance(names, list) else names
    model.preprocessing = preprocessing and _with_tuples(preprocessing)
    return model


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _build_backbone(
    name: str,
    boundaries: Sequence[str] | None,
    num_stages: int | None,
    timm_kwargs: dict[str, Any],
    input_size: Sequence[int],
    stage_names: list[str],
    head: nn.Module | None,
) -> StagedBackbone:
    if refused := _WEIGHT_SOURCES & set(timm_kwargs):
        raise DynskipError(f"{CONFIG} names other weights ({sorted(refused)}), which a saved model never does.")
    channels, height, width = input_size
    size = (channels, height, width)
    backbone = stage_model(str(name), boundaries, head=head, num_stages=num_stages, input_size=size, **timm_kwargs)
    if list(backbone.stage_names) != stage_names:
        raise DynskipError(
            f"timm {timm.__version__} gives {name} the stages {list(backbone.stage_names)}; the saved model has "
            f"{stage_names}. Install the timm that it was made with."
        )
    return backbone


def _revive(value: Any, classes: dict[str, type[nn.Module]]) -> Any:
    """Build the parts that a value describes, wherever they stand in it."""
    if isinstance(value, list):
        return [_revive(item, classes) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) != {"class", "arguments"}:
        return {key: _revive(item, classes) for key, item in value.items()}
    name = str(value["class"])
    cls = {**classes, **_known_classes()}.get(name)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise DynskipError(
            f"The model has a part of the class {name!r}, which is not dynskip's (version {dynskip.__version__}), and "
            f"code is never taken from a model. Pass the class: from_pretrained(..., classes=[{name.split('.')[-1]}])."
        )
    return cls(**_revive(value["arguments"], classes))


def _load(model: Wrapped, tensors: dict[str, Tensor]) -> None:
    own, given = (
        {key: f"{tuple(value.shape)} {value.dtype}" for key, value in state.items()}
        for state in (model.state_dict(), tensors)
    )
    if wrong := [key for key in own | given if own.get(key) != given.get(key)]:
        first = wrong[0]
        raise DynskipError(
            f"The weights do not fit the model that the configuration builds: {len(wrong)} entries are missing, "
            f"unknown, or of another shape or dtype. {first!r} is {given.get(first, 'missing')} in {WEIGHTS} and "
            f"{own.get(first, 'unknown')} in the model. A model that was changed after it was built (folded, cast in "
            "part, layers replaced) cannot be saved; save the plain one."
        )
    model.load_state_dict(tensors)


@torch.no_grad()
def compare(model: Wrapped, twin: Wrapped) -> None:
    """Refuse a model that gives other answers than what its configuration rebuilds, such as one with moved strides."""
    weight = next(model.parameters())
    images = torch.randn(2, *model.backbone.input_size, generator=torch.Generator().manual_seed(0)).to(weight)
    with in_mode(model, False), torch.random.fork_rng():
        pairs = zip(_answers(model, images), _answers(twin.to(weight.device), images), strict=True)
        for (what, ours), (_, theirs) in pairs:
            # Not to the bit: the memory layout (channels-last) is not saved, and other kernels round differently.
            tolerance = 3e-2 if ours.dtype in (torch.float16, torch.bfloat16) else 1e-4
            limit = tolerance * float(ours.double().nan_to_num(0.0, 0.0, 0.0).abs().max().clamp(min=1e-6))
            if not torch.allclose(ours.double(), theirs.double(), rtol=0, atol=limit, equal_nan=True):
                raise DynskipError(
                    f"A model rebuilt from the configuration gives other answers at {what}. What was changed after "
                    "the model was built, or is no argument of its parts, cannot be saved: make it an argument, or "
                    "save the plain model."
                )


def _answers(model: Wrapped, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Run each stage and its gate, and then the head; yield where a value came from, and the value."""
    backbone, carry = model.backbone, model.backbone.start(images)
    for n, name in enumerate(backbone.stage_names):
        torch.manual_seed(0)  # for gates that draw
        carry = backbone.run(n, carry)
        pooled = backbone.pool(n, carry)
        gate: Any = getattr(model, "exits", model.gates)[n]
        logits, state = gate(pooled, gate.initial_state(len(images)))
        again, _ = gate(pooled.flip(0), state)
        for value in (pooled, logits, *state, again):
            yield f"stage {name!r} and its gate", value
    yield "the head", backbone.head(carry)
