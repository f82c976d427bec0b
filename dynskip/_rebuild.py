"""A saved model from its configuration and weights. Nothing in them is trusted."""

from __future__ import annotations

import hashlib
import inspect
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.overrides import TorchFunctionMode

import dynskip
from dynskip._check import settings_of
from dynskip._config import (
    CONFIG,
    DTYPES,
    FORMAT,
    VERSION,
    WEIGHT_SOURCES,
    WEIGHTS,
    check_types,
    checked_preprocessing,
    first_names,
    from_extra,
    known_classes,
    parts_in,
)
from dynskip._modes import DrawingApart
from dynskip.backbone import StagedBackbone, stage_model
from dynskip.backbone.cut import check_name
from dynskip.backbone.glance import glance
from dynskip.errors import DynskipError, lacks_memory
from dynskip.flops import FLOPsLookup

if TYPE_CHECKING:
    from dynskip._config import Wrapped

# What building a model may make beyond the saved weights: masks and tables, layers that are replaced.
SPARE_NUMBERS, SPARE_TENSORS = 2**26, 1000
# What folders of earlier versions lack: such models have the default.
LATER_SETTINGS = {"activation", "consensus", "order"}
# What a configuration has beside the wrapper's arguments; earlier versions wrote a hash of the configuration, too.
OTHER_FIELDS = {
    "format", "version", "made_with", "wrapper", "dtype", "temperature", "class_names", "preprocessing",
    "weights_sha256", "config_sha256",
}  # fmt: skip
MOST_PIXELS = 2**24  # numbers in one image; the backbone is tried on a few


def rebuild(
    config: Any, weights: bytes, classes: Iterable[type[nn.Module]], wrappers: Iterable[type[Wrapped]]
) -> Wrapped:
    """Build a model on the CPU, in eval mode, from what `describe` and `pack` gave. Nothing of it is trusted."""
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise DynskipError(
            f"{CONFIG} was not written by dynskip's `save_pretrained`. Plain timm models go to `stage_model`, by name."
        )
    version = config.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise DynskipError(
            f"The model has format version {version}, and dynskip {dynskip.__version__} reads 1 to {VERSION}. It was "
            f"written with {config.get('made_with')}: update with `pip install -U dynskip`."
        )
    if hashlib.sha256(weights).hexdigest() != config.get("weights_sha256"):
        raise DynskipError(
            f"{WEIGHTS} is not the file that {CONFIG} was written with: its SHA-256 differs. It is damaged, cut off or "
            "was changed; save or download the model again."
        )
    try:
        tensors = from_extra("safetensors.torch").load(weights)
    except Exception as error:  # the library's own errors have no common class
        raise DynskipError(
            f"{WEIGHTS} is no safetensors file ({type(error).__name__}: {error}). Save the model again."
        ) from error
    known = {cls.__name__: cls for cls in classes}
    try:
        with DrawingApart():  # initial weights are thrown away
            wrapper = {cls.__name__: cls for cls in wrappers}[config["wrapper"]]
            _check_fields(wrapper, config)
            _try_without_memory(wrapper, config, known, tensors)
            model = _build(wrapper, config, known)
    except DynskipError:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise
        raise DynskipError(
            f"{CONFIG} does not describe a model that can be built ({type(error).__name__}: {error}). "
            f"{_versions(config)}"
        ) from error
    _load(model, tensors, _versions(config))
    return model.eval()


def _versions(config: dict[str, Any]) -> str:
    """Say which versions wrote a model, which ones read it, and what helps."""
    given = config.get("made_with")
    wrote = ", ".join(f"{name} {version}" for name, version in given.items()) if isinstance(given, dict) else given
    return (
        f"It was written with {wrote}; here are dynskip {dynskip.__version__}, timm {timm.__version__}. Install the "
        "versions that wrote it, or save the model again."
    )


def _check_fields(wrapper: type[Wrapped], config: dict[str, Any]) -> None:
    """Refuse a configuration with a setting that this version would pass over, or without one that it needs."""
    arguments = set(inspect.signature(wrapper).parameters)
    for what, names in (
        ("has no", arguments - LATER_SETTINGS - set(config)),
        ("has fields that are not known here:", set(config) - arguments - OTHER_FIELDS),
    ):
        if names:
            raise DynskipError(
                f"{CONFIG} does not describe a model that can be built: it {what} {', '.join(sorted(names))}. "
                f"{_versions(config)}"
            )


def _try_without_memory(
    wrapper: type[Wrapped], config: dict[str, Any], classes: dict[str, type[nn.Module]], tensors: dict[str, Tensor]
) -> None:
    """Build the parts on the meta device, and refuse more parameters than the weights can fill.

    So a small file cannot ask for a large model. A class that looks at its values while it is built fails here, and is
    left to the real run, which also says what is wrong with a configuration that cannot be built.
    """

    def unstaged(name: str, timm_kwargs: dict[str, Any], **_: Any) -> nn.Module:
        check_name(name)
        return timm.create_model(name, **timm_kwargs)

    try:
        with torch.device("meta"), _ReadableRates(), _at_most(tensors):
            _Parts(classes, unstaged).arguments(wrapper, config)
    except DynskipError:
        raise
    except Exception:
        return


class _ReadableRates(TorchFunctionMode):
    """Keep `torch.linspace` off the meta device: timm 1.0.15 reads drop path rates from it while it builds a model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_cpu = {"device": "cpu"} if func is torch.linspace else {}
        return func(*args, **on_cpu | (kwargs or {}))


@contextmanager
def _at_most(tensors: dict[str, Tensor]) -> Iterator[None]:
    """Refuse modules that together have far more parameters and buffers than the saved ones."""
    numbers = sum(tensor.numel() for tensor in tensors.values()) + SPARE_NUMBERS
    count, here, made = 2 * len(tensors) + SPARE_TENSORS, threading.get_ident(), dict[int, int]()

    def see(_: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is None or threading.get_ident() != here:  # other threads may build models, too
            return
        made[id(tensor)] = tensor.numel()
        if sum(made.values()) > numbers or len(made) > count:
            raise DynskipError(
                f"The weights do not fit the model that the configuration builds: that has far more of them than "
                f"{WEIGHTS}. Save the model again."
            )

    hooks = [
        registration.register_module_parameter_registration_hook(see),
        registration.register_module_buffer_registration_hook(see),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _build(wrapper: type[Wrapped], config: dict[str, Any], classes: dict[str, type[nn.Module]]) -> Wrapped:
    arguments = _Parts(classes, _build_backbone).arguments(wrapper, config)
    model = wrapper(**arguments).to(DTYPES[config["dtype"]])
    names, preprocessing = config["class_names"], checked_preprocessing(config["preprocessing"])
    model.temperature = config["temperature"]
    model._trained_in = settings_of(model.order)
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
    channels, height, width = input_size
    size = (channels, height, width)
    backbone = stage_model(name, boundaries, head=head, num_stages=num_stages, input_size=size, **timm_kwargs)
    if list(backbone.stage_names) != stage_names:
        raise DynskipError(
            f"timm {timm.__version__} gives {name} the stages {list(backbone.stage_names)}; the saved model has "
            f"{stage_names}. Install the timm that it was made with."
        )
    return backbone


class _Parts:
    """Builds the arguments of a wrapper from their descriptions."""

    def __init__(self, classes: dict[str, type[nn.Module]], build_backbone: Callable[..., nn.Module]) -> None:
        self.own, self.known, self.build_backbone = classes, known_classes(), build_backbone
        self.places: dict[str, nn.Module] = {}  # what has been built, by where it is

    def arguments(self, wrapper: type[Wrapped], config: dict[str, Any]) -> dict[str, Any]:
        arguments = {}
        for name in inspect.signature(wrapper).parameters:
            if name in LATER_SETTINGS and name not in config:
                continue
            value = config[name]
            if name == "backbone":
                value = self.backbone(value)
            elif name == "lookup" and value is not None:
                check_types(FLOPsLookup.__init__, value, name)
                value = FLOPsLookup(**_with_tuples(value))
            arguments[name] = self.revive(value, name)
        check_types(wrapper.__init__, arguments, CONFIG)
        return arguments

    def backbone(self, plain: dict[str, Any], what: str = "backbone") -> nn.Module:
        plain = {**plain, "head": self.revive(plain["head"], f"{what}.classifier")}
        in_front = plain.pop("glance", None)
        check_types(_build_backbone, plain, what)
        size = plain["input_size"]
        if len(size) != 3 or min(size) < 1 or math.prod(size) > MOST_PIXELS:
            raise DynskipError(f"{what}.input_size is {size}; expected (C, H, W), at most {MOST_PIXELS} numbers.")
        if refused := WEIGHT_SOURCES & set(plain["timm_kwargs"]):
            raise DynskipError(f"{CONFIG} names other weights ({sorted(refused)}), which a saved model never does.")
        backbone = self.build_backbone(**plain)
        light = None if in_front is None else self.backbone(in_front["light"], f"{what}.glance.light")
        if light is not None and isinstance(backbone, StagedBackbone):
            backbone = glance(backbone, light, in_front["size"])
        self.places |= parts_in(backbone, what if isinstance(backbone, StagedBackbone) else f"{what}.model")
        return backbone

    def revive(self, value: Any, what: str) -> Any:
        """Build the parts that a value describes, wherever they stand in it."""
        if isinstance(value, list):
            return [self.revive(item, f"{what}[{n}]") for n, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        if set(value) == {"same_as"}:
            if (part := self.places.get(str(value["same_as"]))) is None:
                raise DynskipError(f"{what} is the same as {value['same_as']!r}, which the model does not have.")
            return part
        if set(value) != {"class", "arguments"}:
            return {key: self.revive(item, f"{what}[{key!r}]") for key, item in value.items()}
        name = str(value["class"])
        cls = {**self.own, **self.known}.get(name)
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise DynskipError(
                f"The model has a part of the class {name!r}, which is not dynskip's (version {dynskip.__version__}), "
                "and code is never taken from a model. Pass the class: from_pretrained(..., "
                f"classes=[{name.split('.')[-1]}])."
            )
        arguments = {key: self.revive(item, f"{what}.{key}") for key, item in value["arguments"].items()}
        if name in self.known:
            check_types(cls.__init__, arguments, what)
        part = cls(**arguments)
        self.places |= parts_in(part, what)
        return part


def _load(model: Wrapped, tensors: dict[str, Tensor], versions: str) -> None:
    first = first_names(model)
    tensors = {first.get(key, key): tensor for key, tensor in tensors.items()}  # version 1 wrote tied weights again
    own, given = (
        {key: f"{tuple(value.shape)} {value.dtype}" for key, value in state.items()}
        for state in ({key: value for key, value in model.state_dict().items() if first[key] == key}, tensors)
    )
    if wrong := [key for key in own | given if own.get(key) != given.get(key)]:
        key = wrong[0]
        raise DynskipError(
            f"The weights do not fit the model that the configuration builds: {len(wrong)} entries are missing, "
            f"unknown, or of another shape or dtype. {key!r} is {given.get(key, 'missing')} in {WEIGHTS} and "
            f"{own.get(key, 'unknown')} in the model. A model that was changed after it was built (folded, cast in "
            f"part, layers replaced or shared) cannot be saved; save it before the change. {versions}"
        )
    model.load_state_dict({key: tensors[name] for key, name in first.items()})
