"""Modes that hold for a while: training or evaluation, and code that leaves torch's generators alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put a model in training or evaluation mode, and every submodule back in its own afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class DrawingApart(TorchDispatchMode):
    """Runs code that draws random numbers, and leaves torch's generators alone, which belong to all threads.

    Operators that take a generator draw from one of this mode's own. The others give zeros.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        draws = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        # Attention and recurrent layers draw in their dropout alone.
        if not draws or kwargs.get("generator") is not None or re.search("attention|rnn|lstm|gru", func.name()):
            return func(*args, **kwargs)
        names = {argument.name for argument in func._schema.arguments}
        device = next((x.device for x in args if isinstance(x, Tensor)), torch.device(kwargs.get("device") or "cpu"))
        if device.type == "meta":
            return func(*args, **kwargs)
        if "generator" in names:
            generator = self._generators.setdefault(device, torch.Generator(device).manual_seed(0))
            return func(*args, **{**kwargs, "generator": generator})
        if "out" in kwargs:
            return kwargs["out"].zero_()
        kwargs = {**kwargs, "device": "meta"} if "device" in names else kwargs
        shapes = func(*tree_map_only(Tensor, lambda x: x.to("meta"), args), **kwargs)
        return tree_map_only(Tensor, lambda x: torch.zeros_like(x, device=device), shapes)
