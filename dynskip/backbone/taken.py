"""What a cut takes from a model for good while its code is traced, and whether the model still has it."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dynskip.errors import DynskipError

_NO_SETTINGS = {"grad_checkpointing", *dir(nn.Module())} - {"training", "forward"}
_FUNCTIONS = (FunctionType, BuiltinFunctionType)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Taken:
    """What a cut took from one module.

    Attributes:
        values: settings that the traced code read, such as `drop_rate` or `config.scale`, and functions that it called,
            such as `forward_features`.
        layers: names of the layers in an opened module; `None` for a module that was only read.
    """

    values: dict[str, Any]
    layers: list[str] | None


class _Namespace(SimpleNamespace):
    """Stands for a `SimpleNamespace`, from which classes can be derived, but whose own objects keep their class."""


def record(root: nn.Module, is_real: Callable[[], bool]) -> dict[nn.Module, dict[str, Any]]:
    """Record from now on what is read from a model's modules, and from plain objects in them, but for real runs."""
    found: dict[nn.Module, dict[str, Any]] = {}
    classes: dict[type, type] = {}
    places: dict[int, tuple[Any, nn.Module, str]] = {}  # of each watched object: the object, its module, its name there
    copies: dict[int, tuple[Any, Any]] = {}  # of each plain object: the object, and the copy that is watched

    def watch(thing: Any, module: nn.Module, prefix: str) -> None:
        cls = type(thing)
        classes[cls] = classes.get(cls) or watched(cls)
        object.__setattr__(thing, "__class__", classes[cls])  # compiled modules hand `setattr` on
        places[id(thing)] = thing, module, prefix

    def watched(cls: Any) -> type:
        members = {"__module__": cls.__module__, "__getattribute__": seen(cls, "__getattribute__")}
        if hasattr(cls, "__getattr__"):
            members["__getattr__"] = seen(cls, "__getattr__")
        return type(cls.__name__, (cls,), members)

    def seen(cls: Any, how: str) -> Callable[[Any, str], Any]:
        def read(self: Any, name: str) -> Any:
            value = getattr(cls, how)(self, name)
            if name in _NO_SETTINGS or name.startswith("__") or id(self) not in places or is_real():
                return value
            _, module, prefix = places[id(self)]
            if _is_setting(kept := _without_self(value)) or isinstance(kept, _FUNCTIONS):
                found.setdefault(module, {}).setdefault(prefix + name, copy.deepcopy(kept))
            elif _is_plain(value):
                return copied(value, module, f"{prefix}{name}.")
            return value

        return read

    def copied(value: Any, module: nn.Module, prefix: str) -> Any:
        if id(value) not in copies:
            try:
                again = _Namespace(**vars(value)) if type(value) is SimpleNamespace else copy.copy(value)
                if again is not value:
                    watch(again, module, prefix)
            except Exception:  # some objects cannot be copied, and some classes cannot be derived from
                again = value
            copies[id(value)] = value, again
        return copies[id(value)][1]

    for module in root.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            watch(module, module, "")
    return found


def layers_of(module: nn.Module) -> list[str]:
    """Name the layers that a module holds itself."""
    return [name for name, layer in module._modules.items() if layer is not None]


def remove_hooks(module: nn.Module) -> None:
    """Remove a module's forward and backward hooks."""
    for hooks in _HOOKS:
        getattr(module, hooks).clear()


def check_unchanged(model: nn.Module, taken: Mapping[str, Taken]) -> None:
    """Raise where a model is no longer what it was when it was cut."""
    for name, was in taken.items():
        where = repr(name) if name else type(model).__name__
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise _changed(f"{where} is gone") from None
        for setting, value in was.values.items():
            try:
                now = _without_self(operator.attrgetter(setting)(module))
            except AttributeError:
                now = None
            if not (now is value or (_is_setting(now) and now == value)):
                raise _changed(f"`{setting}` of {where} was {_shown(value)} and is {_shown(now)}")
        if was.layers is None:
            continue
        if was.layers != (layers := layers_of(module)):
            raise _changed(f"{where} had the layers {was.layers} and has {layers}")
        if any(getattr(module, hooks) for hooks in _HOOKS):
            opened = (name for name, each in taken.items() if name and each.layers is not None)
            holding = [f"the {type(model).__name__} itself", *map(repr, opened)]
            raise DynskipError(
                f"There are hooks on {where}, which would never run: a boundary lies inside, so its code runs in "
                f"pieces. Register them on other modules than those that hold a boundary: {', '.join(holding)}."
            )


def check_width(what: str, was: int, now: int) -> None:
    """Raise where a layer has been replaced by one of another width."""
    if now != was:
        raise _changed(f"{what} gave {was} values and gives {now}")


def _changed(what: str) -> DynskipError:
    return DynskipError(
        f"The model was changed after it was cut: {what}. Stages run the code as it was when it was cut. Stage the "
        "model anew: stage_model(backbone.model, ...)."
    )


def _is_setting(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_setting, value))
    if isinstance(value, dict):
        return all(map(_is_setting, value.values()))
    return value is None or isinstance(value, bool | int | float | str)


def _without_self(value: Any) -> Any:
    """Return the function of a method, which is the same for a copy of the module; other values as they are."""
    while isinstance(value, functools.partial | MethodType):
        value = value.func if isinstance(value, functools.partial) else value.__func__
    return value


def _is_plain(value: Any) -> bool:
    """Say whether a value is an object that holds settings, such as a config."""
    other = Tensor | nn.Module | ModuleType | type
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, other)


def _shown(value: Any) -> str:
    return str(getattr(value, "__qualname__", repr(value)))
