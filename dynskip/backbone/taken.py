"""What a cut takes from a model for good while its code is traced, and whether the model still has it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynskip.errors import DynskipError

_NO_SETTINGS = {"grad_checkpointing", *dir(nn.Module())} - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Taken:
    """What a cut took from one module.

    Attributes:
        values: settings that the traced code read, such as `drop_rate`.
        layers: names of the layers in an opened module; `None` for a module that was only read.
    """

    values: dict[str, Any]
    layers: list[str] | None


def record(root: nn.Module, is_real: Callable[[], bool]) -> dict[nn.Module, dict[str, Any]]:
    """Record from now on which settings are read from a model's modules, but for those read in a real run."""
    found: dict[nn.Module, dict[str, Any]] = {}
    classes: dict[type, type] = {}

    def watched(cls: Any) -> type:
        def read(self: Any, name: str) -> Any:
            value = cls.__getattribute__(self, name)
            if name not in _NO_SETTINGS and _is_setting(value) and not is_real():
                found.setdefault(self, {}).setdefault(name, copy.deepcopy(value))
            return value

        return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__getattribute__": read})

    for module in root.modules():
        cls = type(module)
        if not isinstance(module, torch.jit.ScriptModule):
            classes[cls] = classes.get(cls) or watched(cls)
            object.__setattr__(module, "__class__", classes[cls])  # compiled modules hand `setattr` on
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
            now = getattr(module, setting, None)
            if not (_is_setting(now) and now == value):
                raise _changed(f"`{setting}` of {where} was {value!r} and is {now!r}")
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
