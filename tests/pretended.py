"""A pretended device: its tensors hold CPU data, and what a GPU would refuse or wait for is counted.

On a machine without a GPU this tells whether code mixes devices, how often the host waits for the device, and how many
kernels are launched. It says nothing about time.

The device takes torch's spare backend, which nothing else here uses. torch is told of it when it is used first, and
cannot be made to forget it: `torch.accelerator` speaks of no other device any more, and finds that this one is not
available outside `pretended()`. Nothing else in the process changes.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
KIND = "gpu"
DEVICE = f"{KIND}:0"  # a name, which torch knows inside `pretended()` only
ValueT = TypeVar("ValueT")

# The host cannot go on before it knows a value, or how many there are.
WAITS = {
    aten._local_scalar_dense.default: "item",
    aten.equal.default: "equal",
    aten.allclose.default: "allclose",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.bincount.default: "bincount",
}
INDEXING = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
COPIES = {aten._to_copy.default, aten.copy_.default}
# Neither views by their schema nor kernels.
NO_KERNEL = {
    aten._unsafe_view.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.is_pinned.default,
}


class Counts:
    """What happened on the device since the start, or since `clear`.

    Attributes:
        launches: operations that start a kernel; neither views nor copies between host and device do.
        copies: copies between host and device, those included that nobody waits for.
        waits: how often the host waited for the device, by kind and place.
        mixed: operations over several devices, which a GPU refuses, by what they were and place. They are computed
            nevertheless, so that one run finds all of them.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.launches = self.copies = 0
        self.waits: Counter[tuple[str, str]] = Counter()
        self.mixed: Counter[tuple[str, str]] = Counter()

    @property
    def waited(self) -> int:
        return self.waits.total()

    def __str__(self) -> str:
        kinds = Counter[str]()
        for (kind, _), count in self.waits.items():
            kinds[kind] += count
        shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        return (
            f"{self.waited} waits ({shown}), {self.launches} launches, {self.copies} copies, {self.mixed.total()} mixed"
        )

    def wait(self, kind: str) -> None:
        self.waits[kind, _place()] += 1

    def mix(self, what: str) -> None:
        self.mixed[what, _place()] += 1

    def report(self, lines: int = 20) -> str:
        """List waits and mixed operations by place."""
        rows = [("mixed", self.mixed.most_common()), ("wait", self.waits.most_common(lines))]
        return "\n".join(
            [str(self), *(f"{n:6d} {name}: {what}, {place}" for name, some in rows for (what, place), n in some)]
        )


@contextlib.contextmanager
def pretended() -> Iterator[Counts]:
    """Make `DEVICE` usable, and count what happens on it."""
    global _pretending
    _register()
    counts = Counts()
    lifts = torch._C._only_lift_cpu_tensors()
    _pretending += 1
    try:
        # Makes `torch.tensor(..., device=DEVICE)` on the host and copies it, as for a GPU.
        torch._C._set_only_lift_cpu_tensors(True)
        # The backward pass starts its threads once a process, for the devices known at that time.
        with torch.autograd.set_multithreading_enabled(False), _Mode(counts):
            yield counts
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
        _pretending -= 1


def on_host(value: ValueT) -> ValueT:
    """Return a tensor, or a container or dataclass of tensors, with the data on the host; nothing is counted."""
    if hasattr(value, "__dataclass_fields__"):
        twin = copy.copy(value)
        vars(twin).update({name: on_host(item) for name, item in vars(value).items()})
        return twin
    moved: ValueT = tree_map(lambda x: x.data_on_host.detach() if isinstance(x, Pretended) else x, value)
    return moved


class Pretended(Tensor):
    """A tensor on `DEVICE`."""

    data_on_host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, data: Tensor) -> Pretended:
        made: Pretended = Tensor._make_wrapper_subclass(
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=torch.device(DEVICE),
        )
        made.data_on_host = data
        return made

    def __init__(self, data: Tensor) -> None: ...

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretended({self.data_on_host!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            with torch.no_grad():
                twin: Tensor = self.clone()
            twin = nn.Parameter(twin) if isinstance(self, nn.Parameter) else twin
            memo[id(self)] = twin.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        # Modules change the dtype of tensors that have this by exchanging them, of others by their metadata alone.
        return ["data_on_host"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> Pretended:
        return Pretended(inner["data_on_host"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(Counts(), func, args, kwargs or {})  # of tensors that outlive `pretended()`


class _Mode(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(self._counts, func, args, kwargs or {})


def _run(counts: Counts, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute an operation on the host, and count what it would be on the device."""
    if func is aten._pin_memory.default:
        return args[0].clone()
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    target = kwargs.get("device")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, Pretended)]
    if not ours and not _is_ours(target):
        return func(*args, **kwargs)
    if func in COPIES:
        to_ours = _count_copy(counts, func, args, kwargs)
    elif func in INDEXING:
        to_ours = _count_indexing(counts, func, *args[:3])
    else:
        to_ours = target is None or _is_ours(target)
        counts.launches += func not in NO_KERNEL and not func.is_view
        _count_operation(counts, func, tensors, ours, kwargs)
    result = func(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
    if func is aten.copy_.default:
        return args[0]
    if not to_ours:
        return result
    wrapped = tree_map(lambda x: Pretended(x) if type(x) is Tensor else x, result)
    return wrapped if func in COPIES else return_and_correct_aliasing(func, args, kwargs, wrapped)


def _count_copy(counts: Counts, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Count a copy to, from or on the device; return whether its result is there."""
    if func is aten.copy_.default:
        into, source = args[:2]
        to_ours, blocks = isinstance(into, Pretended), not (args[2:] or [kwargs.get("non_blocking")])[0]
    else:
        source, target = args[0], kwargs.get("device")
        to_ours = target is None or _is_ours(target)
        blocks = not kwargs.get("non_blocking")
        if target is not None and torch.device(target).type == "meta":
            return False  # nothing is copied
    if to_ours == isinstance(source, Pretended):
        counts.launches += 1
        return to_ours
    counts.copies += 1
    if not to_ours:
        counts.wait("device to host")  # if the copy does not wait, its reader has to
    elif blocks:
        counts.wait("host to device")
    return to_ours


def _count_indexing(counts: Counts, func: Any, base: Tensor, indices: Any, value: Tensor | None = None) -> bool:
    """Count reading or writing at indices; return whether the result is on the device."""
    if not isinstance(base, Pretended):
        counts.mix(f"{func} of a tensor on the host")
        return False
    counts.launches += 1
    single = value is not None and value.ndim == 0
    for index in indices:
        if index is None:
            continue
        if not isinstance(index, Pretended):
            counts.wait("index from host")
        if index.dtype in (torch.bool, torch.uint8) and not single:  # a single value is filled in where the mask is
            counts.wait("mask")
    if value is not None and not isinstance(value, Pretended):
        if single:
            counts.wait("host to device")
        else:
            counts.mix(f"{func} of values on the host")
    return True


def _count_operation(counts: Counts, func: Any, tensors: list[Tensor], ours: list[Any], kwargs: dict[str, Any]) -> None:
    if func in WAITS:
        counts.wait(WAITS[func])
    elif func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        counts.wait("repeat_interleave")
    # Pointwise operations take single numbers from the host.
    lenient = torch.Tag.pointwise in func.tags
    strangers = [tuple(x.shape) for x in tensors if not isinstance(x, Pretended) and not (lenient and x.ndim == 0)]
    if ours and strangers:
        counts.mix(f"{func} with shapes {strangers} on the host")
    if kwargs.get("generator") is not None:
        counts.mix(f"{func} with a generator on the host")


def _is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == KIND


def _unwrapped(x: Any) -> Any:
    if isinstance(x, Pretended):
        return x.data_on_host
    return torch.device("cpu") if isinstance(x, torch.device) and _is_ours(x) else x


def _place() -> str:
    """Name the innermost line of this project that an operation comes from."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if not {"site-packages", "lib", "lib64"} & set(file.parts) and file.name != "pretended.py" and file.suffix:
            return f"{'/'.join(file.parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of a backend; it has no device outside `pretended()`."""

    def is_available(self) -> bool:
        return _pretending > 0

    def device_count(self) -> int:
        return int(_pretending > 0)

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None: ...


class _Hook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return _pretending > 0

    def has_primary_context(self, dev_id: Any) -> bool:
        return _pretending > 0


_pretending = 0
_registered: list[Any] = []  # torch does not keep these objects alive


def _register() -> None:
    if not _registered:
        _registered.extend([_Module(), _Hook(), backend_registration._DummyDeviceGuard()])
        module, hook, guard = _registered
        torch.utils.rename_privateuse1_backend(KIND)
        torch._register_device_module(KIND, module)
        torch._C._acc.register_python_privateuseone_hook(hook)
        torch._C._acc.register_python_privateuseone_device_guard(guard)
