"""A model as plain values and weights, and the model from them again."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
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


def describe(model: Wrapped, wrapper: str) -> dict[str, Any]:
    """Write a model down, all but its weights, in values that JSON can hold.

    Args:
        model: the model.
        wrapper: name of the class that builds it again.

    Returns:
        The configuration, without the hashes.

    Raises:
        DynskipError: if a part cannot be written down; the message names it.
    """
    description = {
        "format": FORMAT,
        "version": VERSION,
        "made_with": {"dynskip": dynskip.__version__, "timm": timm.__version__, "torch": str(torch.__version__)},
        "wrapper": wrapper,
        "dtype": _dtype(model),
        "backbone": _describe_backbone(model.backbone),
        "gates": [_describe_part(gate, f"Gate {n}") for n, gate in enumerate(model.gates)],
        "inner": model.inner and [_describe_part(part, f"Inner classifier {n}") for n, part in enumerate(model.inner)],
        "forward_threshold": list(model.forward_threshold),
        "temperature": model.temperature,
        "class_names": _class_names(model),
        "preprocessing": _preprocessing(model),
    }
    return description | _describe_rules(model) if model.task == "video-classification" else description


def _describe_rules(model: Any) -> dict[str, Any]:
    """Describe what videos have and images have not."""
    lookup = model._given_lookup
    return {
        "terminator": model.terminator and _describe_part(model.terminator, "The terminator"),
        "state_update": model.state_update,
        "lookup": lookup
        and {
            "per_stage": lookup.per_stage.tolist(),
            "head": lookup.head,
            "gates": lookup.gates.tolist(),
            "stage_names": lookup.stage_names,
            "image_size": lookup.image_size,
            "unit": lookup.unit,
        },
    }


def fingerprint(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a configuration's values, whatever their order and spacing in the file."""
    values = {key: value for key, value in config.items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _describe_backbone(backbone: StagedBackbone) -> dict[str, Any]:
    origin = backbone.origin
    if origin is None:
        raise DynskipError(
            f"The backbone was staged from a {type(backbone.model).__name__} already built, and a saved model has to "
            "be rebuilt from plain values. Stage it by its timm name: stage_model('resnet50', num_classes=...)."
        )
    kwargs = {key: value for key, value in origin["timm_kwargs"].items() if key not in _WEIGHT_SOURCES}
    return {
        "name": origin["name"],
        "timm_kwargs": _plain(kwargs, "An argument of the backbone"),
        "boundaries": origin["boundaries"],
        "num_stages": origin["num_stages"],
        "input_size": list(backbone.input_size),
        "stage_names": list(backbone.stage_names),
        "head": backbone.classifier and _describe_part(backbone.classifier, "The backbone's `head`"),
    }


def _describe_part(part: nn.Module, what: str) -> dict[str, Any]:
    """Name a part's class and the arguments that build it again, which it keeps under their own names."""
    cls = type(part)
    if cls is nn.Identity:
        return {"class": "torch.nn.Identity", "arguments": {}}
    if isinstance(part, nn.Linear) and cls is nn.Linear:
        sizes = {"in_features": part.in_features, "out_features": part.out_features}
        return {"class": "torch.nn.Linear", "arguments": {**sizes, "bias": part.bias is not None}}
    arguments = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or not hasattr(part, name):
            raise DynskipError(
                f"{what} is a {cls.__name__}, which does not keep its argument {name!r}, so it cannot be rebuilt. "
                f"Keep every argument of the constructor under its own name: self.{name} = {name}."
            )
        arguments[name] = _plain(getattr(part, name), f"{what}: argument {name!r} of {cls.__name__}")
    own = getattr(dynskip, cls.__name__, None) is cls
    return {"class": f"dynskip.{cls.__name__}" if own else cls.__name__, "arguments": arguments}


def _plain(value: Any, what: str) -> Any:
    """Turn an argument into what JSON can hold; modules become descriptions."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list() | tuple():
            return [_plain(item, what) for item in value]
        case Mapping() if all(isinstance(key, str) for key in value):
            return {key: _plain(item, what) for key, item in value.items()}
        case nn.Module():
            return _describe_part(value, what)
    raise DynskipError(
        f"{what} is a {type(value).__name__}, which a configuration cannot hold. Use numbers, strings, lists, mappings "
        "or modules; timm takes layers by name, such as act_layer='gelu'."
    )


def _class_names(model: Wrapped) -> list[str] | None:
    names, classes = model.class_names, model.backbone.num_classes
    if names is None:
        return None
    if len(names) != classes or not all(isinstance(name, str) for name in names):
        raise DynskipError(f"`class_names` has {len(names)} entries; give one string for each of {classes} classes.")
    return list(names)


def _preprocessing(model: Wrapped) -> Any:
    known = inspect.signature(timm.data.create_transform).parameters
    given = model.preprocessing
    if given is not None and not (isinstance(given, Mapping) and set(given) <= set(known)):
        raise DynskipError(
            f"`preprocessing` holds arguments of timm.data.create_transform, such as input_size, mean and std; got "
            f"{given!r}. Of a timm model as published, timm.data.resolve_model_data_config gives them."
        )
    return _plain(given, "`preprocessing`")


def part_classes(model: Wrapped) -> list[type[nn.Module]]:
    """List the classes that a model's parts are of, as `rebuild` wants them."""
    parts = [model.backbone.classifier, getattr(model, "terminator", None), *(model.inner or ()), *model.gates]
    return [type(module) for part in parts if part is not None for module in part.modules()]


def _dtype(model: nn.Module) -> str:
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        raise DynskipError(
            f"The model's parameters are {sorted(dtypes)}; one of {list(_DTYPES)} can be saved. Convert it as a whole, "
            "such as model.float()."
        )
    return dtypes.pop()


def pack(model: nn.Module) -> bytes:
    """Return a model's state as the content of a safetensors file."""
    packed: bytes = _safetensors().save(_tensors(model), metadata={"format": "pt"})
    return packed


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    foreign = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        raise DynskipError(
            f"{foreign[0]!r} is no tensor, and a weight file holds tensors only. Keep it as an argument."
        )
    # Copies, for tied weights share memory, and a file holds each of its entries apart.
    return {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise DynskipError("Saved models are safetensors files. Run `pip install 'dynskip[hub]'`.") from error
    return safetensors.torch


def rebuild(
    config: Any, weights: bytes, classes: Iterable[type[nn.Module]], wrappers: Iterable[type[Wrapped]]
) -> Wrapped:
    """Build a model from its configuration and weights, once both have been found to be as they were written.

    Args:
        config: what `describe` gave, with the SHA-256 of the weights (`weights_sha256`) and its own (`config_sha256`).
        weights: what `pack` gave.
        classes: classes of parts that are not dynskip's own.
        wrappers: classes that a model may be of; the configuration names one.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        DynskipError: if anything is damaged, changed, of a newer format or of another model, or a class is not known.
    """
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise DynskipError(
            f"{CONFIG} was not written by dynskip's `save_pretrained`. Plain timm models go to `stage_model`, by name."
        )
    version = config.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise DynskipError(
            f"The model has format version {version}, and dynskip {dynskip.__version__} reads up to {VERSION}. It was "
            f"written with {config.get('made_with')}: update with `pip install -U dynskip`."
        )
    if fingerprint(config) != config.get("config_sha256"):
        raise DynskipError(
            f"{CONFIG} is not as it was written: its SHA-256 differs. It is damaged or was changed; save or download "
            "the model again. To change a threshold or a name, load the model, set it and save the model."
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
        tensors = _safetensors().load(weights)
    except Exception as error:  # the library's own errors have no common class
        raise DynskipError(
            f"{WEIGHTS} is no safetensors file ({type(error).__name__}: {error}). Save the model again."
        ) from error
    _load(model, tensors)
    return model.eval()


def _build(wrapper: type[Wrapped], config: dict[str, Any], classes: dict[str, type[nn.Module]]) -> Wrapped:
    dtype, inner = _DTYPES[config["dtype"]], config["inner"]
    parts: dict[str, Any] = {
        "backbone": _build_backbone(config["backbone"], classes).to(dtype),
        "gates": [_build_part(part, classes).to(dtype) for part in config["gates"]],
        "inner": inner and [_build_part(part, classes).to(dtype) for part in inner],
        "forward_threshold": config["forward_threshold"],
    }
    if wrapper.task == "video-classification":
        parts |= _build_rules(config, classes)
    model = wrapper(**parts)
    model.temperature = float(config["temperature"])
    names, preprocessing = config["class_names"], config["preprocessing"]
    model.class_names = names and tuple(names)
    model.preprocessing = preprocessing and {
        k: tuple(v) if isinstance(v, list) else v for k, v in preprocessing.items()
    }
    _class_names(model), _preprocessing(model)  # refuse here what would not be saved
    return model


def _build_rules(config: dict[str, Any], classes: dict[str, type[nn.Module]]) -> dict[str, Any]:
    lookup, terminator = config["lookup"], config["terminator"]
    return {
        "terminator": terminator and _build_part(terminator, classes),
        "lookup": lookup
        and FLOPsLookup(**{**lookup, "image_size": lookup["image_size"] and tuple(lookup["image_size"])}),
        "state_update": config["state_update"],
    }


def _build_backbone(description: dict[str, Any], classes: dict[str, type[nn.Module]]) -> StagedBackbone:
    kwargs, head = description["timm_kwargs"], description["head"]
    if refused := _WEIGHT_SOURCES & set(kwargs):
        raise DynskipError(f"{CONFIG} names other weights ({sorted(refused)}), which a saved model never does.")
    backbone = stage_model(
        description["name"],
        description["boundaries"],
        head=head and _build_part(head, classes),
        num_stages=description["num_stages"],
        input_size=tuple(description["input_size"]),
        **kwargs,
    )
    if list(backbone.stage_names) != description["stage_names"]:
        raise DynskipError(
            f"timm {timm.__version__} gives {description['name']} the stages {list(backbone.stage_names)}; the saved "
            f"model has {description['stage_names']}. Install the timm that it was made with."
        )
    return backbone


def _build_part(description: dict[str, Any], classes: dict[str, type[nn.Module]]) -> Any:
    name = str(description["class"])
    cls: Any = {"torch.nn.Linear": nn.Linear, "torch.nn.Identity": nn.Identity, **classes}.get(name)
    if name.startswith("dynskip."):
        public = name.removeprefix("dynskip.")
        cls = getattr(dynskip, public) if public in dynskip.__all__ else None
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise DynskipError(
            f"The model has a part of the class {name!r}, which is not dynskip's (version {dynskip.__version__}), and "
            f"code is never taken from a model. Pass the class: from_pretrained(..., classes=[{name.split('.')[-1]}])."
        )
    return cls(**{key: _revive(value, classes) for key, value in description["arguments"].items()})


def _revive(value: Any, classes: dict[str, type[nn.Module]]) -> Any:
    if isinstance(value, dict) and set(value) == {"class", "arguments"}:
        return _build_part(value, classes)
    if isinstance(value, dict):
        return {key: _revive(item, classes) for key, item in value.items()}
    return [_revive(item, classes) for item in value] if isinstance(value, list) else value


def _load(model: Wrapped, tensors: dict[str, Tensor]) -> None:
    own = model.state_dict()
    missing, foreign = [k for k in own if k not in tensors], [k for k in tensors if k not in own]
    wrong = [k for k in own if k in tensors and (own[k].shape, own[k].dtype) != (tensors[k].shape, tensors[k].dtype)]
    if missing or foreign or wrong:
        raise DynskipError(
            f"The weights are not of the model that the configuration builds: {len(missing)} entries are missing, "
            f"{len(foreign)} unknown, {len(wrong)} of another shape or dtype, such as "
            f"{', '.join((missing + foreign + wrong)[:3])}. A model that was changed after it was built (folded, cast "
            "in part, layers replaced) cannot be saved; save the plain one."
        )
    model.load_state_dict(tensors)


@torch.no_grad()
def compare(model: Wrapped, twin: Wrapped) -> None:
    """Refuse a model that answers otherwise than what its configuration rebuilds, such as one with changed strides."""
    weight = next(model.parameters())
    twin = twin.to(weight.device)
    images = torch.randn(2, *model.backbone.input_size, generator=torch.Generator().manual_seed(0))
    carries = [each.backbone.start(images.to(weight)) for each in (model, twin)]
    exits = model.task == "image-classification"  # where a gate is asked once, and its classifier answers
    with in_mode(model, False), torch.random.fork_rng():
        for n, name in enumerate(model.backbone.stage_names):
            answers = []
            for i, each in enumerate((model, twin)):
                torch.manual_seed(0)
                carries[i] = each.backbone.run(n, carries[i])
                pooled = each.backbone.pool(n, carries[i])
                gate: Any = getattr(each, "exits" if exits else "gates")[n]
                logits, state = gate(pooled, gate.initial_state(2))
                again = () if exits else gate(pooled.flip(0), state)[0]
                answers.append((pooled, logits, *state, *again))
            _refuse_difference(f"stage {name!r} and its gate", *answers)
        _refuse_difference("the head", *[(e.backbone.head(c),) for e, c in zip((model, twin), carries, strict=True)])


def _refuse_difference(what: str, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        # Not to the bit: the memory layout (channels-last) is not saved, and other kernels round otherwise.
        tolerance = 3e-2 if a.dtype in (torch.float16, torch.bfloat16) else 1e-4
        a, b = a.double(), b.double()
        scale = float(a.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp(min=1e-6))
        if not torch.allclose(a, b, rtol=0, atol=tolerance * scale, equal_nan=True):
            raise DynskipError(
                f"A model rebuilt from the configuration answers otherwise at {what}. What was changed after the model "
                "was built, or is no argument of its parts, cannot be saved: make it an argument, or save the plain "
                "model."
            )
