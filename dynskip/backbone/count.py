"""MACs of calls, as torch's own counter counts them."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Container
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# torch's own operators cost nothing where its counter has no formula for them, but for those that multiply.
_FREE = ("aten", "prim", "prims", "profiler")
_MULTIPLIES = re.compile("_mm|rnn|mkldnn|scaled_dot_product|multi_head|transformer_encoder")


class Count:
    """Counts the MACs of calls. Costs of the parts in `unknown` are not known, since torch cannot count `causes`."""

    def __init__(self) -> None:
        self.unknown: dict[str, None] = {}
        self.causes: dict[str, None] = {}

    def __call__(self, part: str, function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
        """Return the MACs of a call, NaN where they are not known, and its result."""
        counter: Any = FlopCounterMode(display=False)
        # Its tracker of modules hooks those of all threads, and fails where a module is given a parameter.
        counter.mod_tracker = contextlib.nullcontext()
        counter.mod_tracker.parents = ("Global",)
        uncounted = _Uncounted(counter.flop_registry)
        try:
            with uncounted, counter:  # the counter comes first, and takes operators apart
                result = function(*args)
        except Exception as error:
            result = function(*args)  # raises as well, unless it was the counter that failed
            uncounted.found[f"a call ({error})"] = None
        if uncounted.found:
            self.unknown[part] = None
            self.causes |= uncounted.found
            return math.nan, result
        return counter.get_total_flops() // 2, result  # torch counts a multiply-add as two


class _Uncounted(TorchDispatchMode):
    """Notes the operators that may multiply and have no formula."""

    supports_higher_order_operators = True

    def __init__(self, formulas: Container[Any]) -> None:
        super().__init__()
        self.formulas, self.found = formulas, dict[str, None]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(func, "_overloadpacket", func)
        if packet not in self.formulas and (func.namespace not in _FREE or _MULTIPLIES.search(func.name())):
            self.found[str(packet)] = None
        return func(*args, **(kwargs or {}))
