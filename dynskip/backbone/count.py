"""MACs of calls, as torch's own counter counts them."""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Callable, Container, Mapping
from types import FrameType
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dynskip.backbone.staged import StagedBackbone

# torch's own operators cost nothing where its counter has no formula for them, but for those that multiply.
_FREE = ("aten", "prim", "prims", "profiler")
_MULTIPLIES = re.compile("_mm|rnn|mkldnn|scaled_dot_product|multi_head|transformer_encoder")


class Count:
    """Counts the MACs of calls. Costs of the parts in `unknown` are not known, since torch cannot count `causes`."""

    def __init__(self, backbone: StagedBackbone) -> None:
        model: nn.Module = getattr(backbone, "model", backbone)  # a backbone made by hand is its own model
        self.names = {id(module): name for name, module in model.named_modules() if name}
        self.unknown: dict[str, None] = {}
        self.causes: dict[str, str] = {}

    def __call__(self, part: str, function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
        """Return the MACs of a call, NaN where they are not known, and its result."""
        counter: Any = FlopCounterMode(display=False)
        # Its tracker of modules hooks those of all threads, and fails where a module is given a parameter.
        counter.mod_tracker = contextlib.nullcontext()
        counter.mod_tracker.parents = ("Global",)
        uncounted = _Uncounted(counter.flop_registry, self.names)
        try:
            with uncounted, counter:  # the counter comes first, and takes operators apart
                result = function(*args)
        except Exception as error:
            result = function(*args)  # raises as well, unless it was the counter that failed
            uncounted.found[str(error)] = f"a call ({error})"
        if uncounted.found:
            self.unknown[part] = None
            self.causes = uncounted.found | self.causes
            return math.nan, result
        return counter.get_total_flops() // 2, result  # torch counts a multiply-add as two


class _Uncounted(TorchDispatchMode):
    """Notes the operators that may multiply and have no formula, and the first module that calls each."""

    supports_higher_order_operators = True

    def __init__(self, formulas: Container[Any], names: Mapping[int, str]) -> None:
        super().__init__()
        self.formulas, self.names, self.found = formulas, names, dict[str, str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(func, "_overloadpacket", func)
        if packet not in self.formulas and (func.namespace not in _FREE or _MULTIPLIES.search(func.name())):
            self.found.setdefault(str(packet), f"{packet}{self._where()}")
        return func(*args, **(kwargs or {}))

    def _where(self) -> str:
        """Name the innermost module of the backbone that is being called."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if (name := self.names.get(id(frame.f_locals.get("self")))) is not None:
                return f" in {name!r}"
            frame = frame.f_back
        return ""
