"""Trace a model's forward pass with torch.fx, and split the graph into segments.

Only modules that hold a boundary are opened. All others are called as they are, so they keep their hooks, drop path,
checkpointing and compiled forms. A segment is a plain function of the *live* model and owns no parameters.
"""

from __future__ import annotations

import copy
import itertools
import linecache
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch
from timm.models import get_notrace_functions
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg

from dynskip._modes import DrawingApart
from dynskip.backbone.taken import Taken, layers_of, record, remove_hooks
from dynskip.errors import DynskipError

DEVICE = "_device"  # the constant that stands for the device on which the model is when it runs
BY_HAND = "or give the stages yourself: stage_model([stage_1, stage_2, ...], head=head)"
# What makes tensors takes a traced size or device since torch 2.11. Before, torch.fx has to stand in for it.
_MAKERS = (
    *("arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "tensor", "zeros"),
)
_serial = itertools.count()
_ALONE = threading.RLock()  # torch.fx replaces `nn.Module.__call__` of the whole process while it traces
_Module = TypeVar("_Module", bound=nn.Module)


def twin(module: _Module, training: bool) -> _Module:
    """Copy a module to try things on: it shares the parameters, but no modes, buffers or attributes."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()}).train(training)


# Tracing


def opened(model: nn.Module, boundaries: Sequence[str]) -> list[str]:
    """Name the modules that a boundary lies in. Their own code is traced; all others run as they are."""
    return [
        name
        for name, _ in model.named_modules()
        if not name or any(boundary.startswith(name + ".") for boundary in boundaries)
    ]


@dataclass(frozen=True)
class Trace:
    """A traced forward pass.

    Attributes:
        graph: its graph, in which boundaries are calls of their own.
        constants: the tensors made while tracing, by name.
        taken: what was taken from the model, by module.
        of_any_mode: whether the other mode has the same graph, since the code never asked for it.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    taken: dict[str, Taken]
    of_any_mode: bool


def trace(model: nn.Module, boundaries: Sequence[str], training: bool, images: Tensor) -> Trace:
    """Trace a twin of the model, which stays as it is. Images serve to look up what symbols cannot tell."""
    traced, inside = twin(model, training), opened(model, boundaries)
    for module in map(traced.get_submodule, inside):
        remove_hooks(module)
        if "grad_checkpointing" in vars(module):
            # torch.utils.checkpoint cannot be traced. Stages of such modules are checkpointed as a whole when they run.
            module.grad_checkpointing = False  # type: ignore[assignment]
    tracer = _Tracer(inside)
    read = record(traced, lambda: tracer.is_real())
    try:
        graph = tracer.trace(traced)
    except Exception:
        # Control flow on shapes, or a closed module that returns a tuple of unknown length.
        try:
            tracer = _WatchingTracer(inside, images)
            with DrawingApart():
                graph = tracer.trace(traced)
        except Exception as error:
            what = str(error) if isinstance(error, DynskipError) else f"{type(error).__name__}: {error}"
            raise DynskipError(
                f"{type(model).__name__} could not be cut at {list(boundaries)}, since its forward cannot be traced: "
                f"{what}. Choose boundaries such that this code lies inside a stage, {BY_HAND}."
            ) from error
    constants = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target.startswith("_tensor_constant"):  # torch.fx's own name for them
            name = node.meta["constant"] = f"{'train' if training else 'eval'}{node.target}"
            constants[name] = getattr(traced, node.target)
            if constants[name].is_meta:
                raise DynskipError(
                    f"{type(model).__name__} makes a table between its stages, which has no values on the meta device. "
                    "Give the model its weights before it is cut."
                )
    # `device=self.table.device` is read while tracing, and the model may move later.
    with graph.inserting_before(next(iter(graph.nodes))):
        device = graph.create_node("get_attr", DEVICE)
    device.meta["constant"] = DEVICE
    for node in graph.nodes:
        node.args, node.kwargs = map_aggregate(
            (node.args, node.kwargs), lambda x: device if isinstance(x, torch.device) else x
        )
    taken, asks = {}, isinstance(tracer, _WatchingTracer)  # what a module returns may depend on its mode
    for name, module in traced.named_modules():
        values = read.get(module, {})
        asks |= values.pop("training", None) is not None
        layers = layers_of(model.get_submodule(name)) if name in inside else None
        if layers is None:
            values.pop("forward", None)  # torch.fx looks at it; stages call the module that is there
        if values or layers is not None:
            taken[name] = Taken(values, layers)
    return Trace(graph, constants, taken, not asks)


class _Tracer(fx.Tracer):
    """Trace the glue between boundaries; every module that no boundary lies in stays a leaf."""

    def __init__(self, inside: Collection[str]) -> None:
        # Some of timm's helpers branch on sizes, which cannot be traced; timm registers them for exactly this use.
        super().__init__(autowrap_functions=tuple(f for f in get_notrace_functions() if callable(f)))
        self._inside = inside
        self._thread = threading.get_ident()
        if torch.__version__ < "2.11":
            self._autowrap_search.append(torch)
            self._autowrap_function_ids |= {id(getattr(torch, name)) for name in _MAKERS}

    def trace(self, root: nn.Module, concrete_args: Any = None) -> fx.Graph:  # type: ignore[override]
        with _ALONE:
            return super().trace(root, concrete_args)

    def is_real(self) -> bool:
        """Whether what is called now belongs to a real run, such as one of another thread, and not to the graph."""
        return threading.get_ident() != self._thread

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return forward(*args, **kwargs) if self.is_real() else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        return attr_val if self.is_real() else super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._inside

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        # Only the image is symbolic: `attn_mask is not None` on a symbolic default would take the wrong branch.
        # And a model may have been given a `forward` of its own, which is not its class's.
        return (lambda root, images: root.forward(images)), [
            self.root,
            self.create_proxy("placeholder", "images", (), {}),
        ]


class _WatchingTracer(_Tracer):
    """Trace with a real run beside the symbolic one, to look up what symbols cannot tell.

    That is how many values a closed module returned, which of them are None, and which way a test on sizes goes.
    """

    def __init__(self, inside: Collection[str], images: Tensor) -> None:
        super().__init__(inside)
        self._images = images
        self._values: dict[fx.Node, Any] = {}
        self._running = False

    def is_real(self) -> bool:
        return self._running or super().is_real()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _WatchedProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        if self._depends_on_pixels(obj.node):
            where = self.scope.module_path or type(self.root).__name__
            raise DynskipError(
                f"{where} branches on tensor values (`if tensor:`), so its path through the network is not fixed"
            )
        branch = bool(self.value(obj.node))
        self.create_proxy("call_function", same_branch, (obj, branch), {})
        return branch

    @torch.no_grad()
    def value(self, node: fx.Node) -> Any:
        """Return what a node gives in the real run, which goes on as far as the graph does."""
        if node not in self._values:
            run = fx.Interpreter(self.root, garbage_collect_values=False, graph=self.graph)
            run.env, self._running = self._values, True
            try:
                for new in [each for each in self.graph.nodes if each not in self._values]:
                    self._values[new] = self._images if new.op == "placeholder" else run.run_node(new)
            finally:
                self._running = False
        return self._values[node]

    def _depends_on_pixels(self, node: fx.Node) -> bool:
        """Whether a value follows from the images' content and not only from their shape and type."""
        if isinstance(self.value(node), Tensor):
            return True
        if node.target is getattr or node.target in ("size", "dim", "numel") or node.op == "call_module":
            return False
        return any(self._depends_on_pixels(parent) for parent in node.all_input_nodes)


class _WatchedProxy(fx.Proxy):
    """Stands for a tuple or list of known length, with None where it holds None."""

    def __iter__(self) -> Iterator[Any]:
        return iter([None if item is None else self[i] for i, item in enumerate(self._items())])  # type: ignore[index]

    def __len__(self) -> int:
        return len(self._items())

    def _items(self) -> Any:
        assert isinstance(self.tracer, _WatchingTracer)
        value = self.tracer.value(self.node)
        if isinstance(value, tuple | list):
            return value
        raise fx.proxy.TraceError(f"a {type(value).__name__} is unpacked, and its number of parts may vary")


def same_branch(value: Any, expected: bool) -> None:
    """Refuse inputs that would take another branch than the one that was traced."""
    if bool(value) != expected:
        raise DynskipError(
            "The model takes another path for images of this shape than for those it was cut at. Stage it for this "
            "size: stage_model(model, input_size=(C, H, W))."
        )


# Cutting


@dataclass(frozen=True)
class Segment:
    """A piece of a forward pass, called as `function(root, *constants, *values) -> values`.

    Attributes:
        function: the piece as a function of the live module that it belongs to.
        source: its code, to see whether two segments are equal.
        uses: functions and classes that the code calls by name.
        constants: names of the constants that it takes: tensors made while tracing, and `DEVICE`.
        overwrites: whether it works in place on its inputs, as an activation right behind a boundary may.
        root: the backbone's attribute that holds this module.
    """

    function: Callable[..., tuple[Any, ...]]
    source: str
    uses: dict[str, Any]
    constants: tuple[str, ...]
    overwrites: bool = False
    root: str = "model"

    def __deepcopy__(self, memo: dict[int, Any]) -> Segment:
        return self  # it holds no state, and its function may have been compiled

    def __reduce__(self) -> tuple[Any, ...]:
        # Functions cannot be pickled.
        return from_source, (self.source, self.uses, self.constants, self.overwrites, self.root)


def from_source(
    source: str, uses: dict[str, Any], constants: tuple[str, ...], overwrites: bool = False, root: str = "model"
) -> Segment:
    """Make a segment from its code."""
    namespace = dict(uses)
    # Python has no source for such code. torch 2.11's compiler then takes it for a builtin, and counts the
    # recompilations of all stages of all models against one limit. With the source, tracebacks show it, too.
    name = f"<dynskip segment {next(_serial)}>"
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    exec(compile(source, name, "exec"), namespace)
    return Segment(namespace["forward"], source, uses, constants, overwrites, root)


def split(graph: fx.Graph, cuts: Sequence[fx.Node]) -> list[Segment]:
    """Split a graph after each node of `cuts`: one segment a stage, then the head.

    Each takes the outputs of the one before; the first takes the images. The last output of a stage is what its
    boundary returns. The head has one output: what the model returns.
    """
    nodes = list(graph.nodes)
    ends = [nodes.index(cut) + 1 for cut in cuts]
    if ends != sorted(set(ends)):
        names = [str(cut.target) for cut in cuts]
        raise DynskipError(f"Boundaries must be named once each, in the order in which the model runs; got {names}.")
    segments, live, start = list[Segment](), [node for node in nodes if node.op == "placeholder"], 0
    for cut, end in zip(cuts, ends, strict=True):
        later = set(nodes[end:])
        outputs = [node for node in nodes[:end] if node.op != "get_attr" and not later.isdisjoint(node.users)]
        if cut not in outputs:
            raise DynskipError(
                f"What boundary {cut.target!r} returns is used by nothing after it, so it is no stage of the forward "
                "pass. Choose a module whose output the next stage reads."
            )
        segments.append(_segment(nodes[start:end], live, outputs))
        live, start = outputs, end
    (returned,) = nodes[-1].args
    if "logits" in (fields := getattr(getattr(returned, "target", None), "_fields", ())):
        # torchvision's GoogLeNet and Inception add auxiliary logits in training, which no later stage needs.
        returned = returned.args[fields.index("logits")]
    return [*segments, _segment(nodes[start:-1], live, [returned])]


def _segment(nodes: list[fx.Node], inputs: list[fx.Node], outputs: list[Any]) -> Segment:
    body = [node for node in nodes if node.op not in ("placeholder", "get_attr")]
    # Parameters of the root (class tokens, position embeddings) are fetched from the live model in every segment that
    # reads them: a value carried across, or copied into a GraphModule, would go stale after load_state_dict.
    fetched = dict.fromkeys(n for node in body for n in node.all_input_nodes if n.op == "get_attr")
    constants = [node for node in fetched if "constant" in node.meta]
    graph = fx.Graph()
    env = {node: graph.placeholder(node.name) for node in [*constants, *inputs]}
    env |= {node: graph.node_copy(node) for node in fetched if node not in env}
    for node in body:
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta.pop("is_wrapped", None)  # else torch.fx keeps every segment, to trace it again
    graph.output(map_arg(tuple(outputs), env.__getitem__))
    # Not `graph.eliminate_dead_code()`: timm's drop_path scales its mask in place and ignores the result, which looks
    # dead and is not.
    code = graph.python_code("self")
    modules = {name: value for name, value in code.globals.items() if isinstance(value, ModuleType)}
    imports = "".join(f"import {module.__name__} as {name}\n" for name, module in modules.items())
    uses = {name: value for name, value in code.globals.items() if name not in modules}
    return from_source(imports + code.src, uses, tuple(node.meta["constant"] for node in constants))
