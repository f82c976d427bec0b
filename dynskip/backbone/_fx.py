"""Cut a model's forward pass into segments with torch.fx, opening only what has to be opened.

Modules that contain no boundary stay closed: they are called as they are, so blocks keep their hooks, drop path,
checkpointing and compiled forms. Segments are plain functions of the *live* model; they own no parameters.
"""

from __future__ import annotations

import copy
import itertools
import linecache
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from timm.models import get_notrace_functions
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.utils._pytree import tree_leaves

from dynskip._modes import in_mode
from dynskip.errors import DynskipError

DEVICE = "_device"  # the constant that stands for the device on which the model is when it runs
_CONSTANT_PREFIX = "_tensor_constant"  # torch.fx's own name for tensors made while tracing
BY_HAND = "or give the stages yourself: stage_model([stage_1, stage_2, ...], head=head)"
_serial = itertools.count()


@dataclass(frozen=True)
class Segment:
    """A piece of a forward pass: `call(model, constants, inputs) -> outputs`.

    `constants` names what it needs besides: tensors made while tracing, and `DEVICE`.
    """

    function: Callable[..., tuple[Any, ...]]
    source: str
    constants: tuple[str, ...]
    feature: int  # which output is the boundary's own value; -1 in the head
    overwrites: bool = False  # it works in place on its inputs, as an activation right behind a boundary may

    def call(self, model: nn.Module, constants: dict[str, Any], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.function(model, *(constants[name] for name in self.constants), *inputs)


class _CoarseTracer(fx.Tracer):
    """Trace the glue between boundaries; every module that is no ancestor of a boundary stays a leaf."""

    def __init__(self, boundaries: Sequence[str]) -> None:
        # Some of timm's helpers branch on sizes, which cannot be traced; timm registers them for exactly this use.
        super().__init__(autowrap_functions=tuple(f for f in get_notrace_functions() if callable(f)))
        self._boundaries = tuple(boundaries)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(name.startswith(module_qualified_name + ".") for name in self._boundaries)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        # Only the image is symbolic: `attn_mask is not None` on a symbolic default would take the wrong branch.
        return root_fn, [self.root, self.create_proxy("placeholder", "images", (), {})]


class _WatchingTracer(_CoarseTracer):
    """Trace with a real run beside the symbolic one, so that what the symbols cannot tell can be looked up.

    That is how many values a closed module returned, which of them are None, and which way a test on sizes goes.
    """

    def __init__(self, boundaries: Sequence[str], model: nn.Module, images: Tensor) -> None:
        super().__init__(boundaries)
        self._beside = copy.deepcopy(model)  # running it may move BatchNorm statistics
        self._values: dict[fx.Node, Any] = {}
        self._images = images
        self._running = False

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._running:  # a module of the run beside, which is no part of the graph
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

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

    def value(self, node: fx.Node) -> Any:
        """Return what a node gives in the run beside."""
        if node not in self._values:
            args, kwargs = map_arg((node.args, node.kwargs), self.value)
            running, self._running = self._running, True
            try:
                self._values[node] = self._run(node, args, kwargs)
            finally:
                self._running = running
        return self._values[node]

    @torch.no_grad()
    def _run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        target: Any = node.target
        match node.op:
            case "placeholder":
                return self._images
            case "get_attr":
                return attrgetter(target)(self.root if target.startswith(_CONSTANT_PREFIX) else self._beside)
            case "call_module":
                return self._beside.get_submodule(target)(*args, **kwargs)
            case "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    def _depends_on_pixels(self, node: fx.Node) -> bool:
        """Whether a value follows from the images' content and not only from their shape and type."""
        if isinstance(self.value(node), Tensor):
            return True
        if node.target is getattr or node.target in ("size", "dim", "numel") or node.op == "call_module":
            return False
        return any(self._depends_on_pixels(parent) for parent in node.all_input_nodes)


class _WatchedProxy(fx.Proxy):
    """Stands for a tuple or list of known length, None where it holds None."""

    def __iter__(self) -> Iterator[Any]:
        return iter([None if item is None else self[i] for i, item in enumerate(self._items())])  # type: ignore[index]

    def __len__(self) -> int:
        return len(self._items())

    def _items(self) -> Any:
        assert isinstance(self.tracer, _WatchingTracer)
        value = self.tracer.value(self.node)
        if isinstance(value, tuple | list):
            return value
        raise fx.proxy.TraceError(f"a {type(value).__name__} is taken apart, and how many parts it has may vary")


def same_branch(value: Any, expected: bool) -> None:
    """Refuse inputs that would take another branch than the one that was traced."""
    if bool(value) != expected:
        raise DynskipError(
            "The model takes another path for images of this shape than for those it was cut at. Stage it for this "
            "size: stage_model(model, input_size=(C, H, W))."
        )


def trace(
    model: nn.Module, boundaries: Sequence[str], training: bool, images: Tensor
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Trace `model` in the given mode, leaving its modes and attributes as they were.

    Args:
        model: the model to trace.
        boundaries: qualified names of the modules that have to appear as calls of their own.
        training: trace the training forward (drop path, dropout glue) or the evaluation forward.
        images: `(B, C, H, W)` images that the model takes, to look up what symbols cannot tell.

    Returns:
        The graph, and the tensors that tracing made (position grids and the like) by name.

    Raises:
        DynskipError: if torch.fx cannot follow the model's forward.
    """
    with in_mode(model, training), _checkpointing_off(model, boundaries):
        try:
            return _trace(model, _CoarseTracer(boundaries))
        except Exception:
            # Control flow on shapes, or a closed module that returns a tuple of unknown length.
            try:
                return _trace(model, _WatchingTracer(boundaries, model, images))
            except Exception as error:
                what = str(error) if isinstance(error, DynskipError) else f"{type(error).__name__}: {error}"
                raise DynskipError(
                    f"{type(model).__name__} could not be cut at {list(boundaries)}, since its forward cannot be "
                    f"traced: {what}. Choose boundaries such that this code lies inside a stage, {BY_HAND}."
                ) from error


def _trace(model: nn.Module, tracer: fx.Tracer) -> tuple[fx.Graph, dict[str, Tensor]]:
    before = set(vars(model))
    constants: dict[str, Tensor] = {}
    try:
        graph = tracer.trace(model)
    finally:
        for name in set(vars(model)) - before:
            if name.startswith(_CONSTANT_PREFIX):
                constants[name] = vars(model).pop(name)
    return graph, constants


def opened(model: nn.Module, boundaries: Sequence[str]) -> list[str]:
    """Name the modules that a boundary lies in, whose own code is traced; all others run as they are."""
    return [
        name
        for name, _ in model.named_modules()
        if not name or any(boundary.startswith(name + ".") for boundary in boundaries)
    ]


@contextmanager
def _checkpointing_off(model: nn.Module, boundaries: Sequence[str]) -> Iterator[None]:
    # torch.utils.checkpoint cannot be traced; stages of such modules are checkpointed as a whole when they run.
    modules = [model.get_submodule(name) for name in opened(model, boundaries)]
    flagged = [module for module in modules if getattr(module, "grad_checkpointing", False) is True]
    try:
        for module in flagged:
            module.grad_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for module in flagged:
            module.grad_checkpointing = True  # type: ignore[assignment]


def boundary_node(graph: fx.Graph, name: str, model: nn.Module) -> fx.Node:
    """Return the node that ends a stage: the call of the module `name`, or of its last called member."""
    nodes: list[fx.Node] = [node for node in graph.nodes if node.op == "call_module"]
    calls = [node for node in nodes if node.target == name]
    if len(calls) > 1:
        raise DynskipError(
            f"Boundary {name!r} is called {len(calls)} times in one forward of {type(model).__name__}, so it is no "
            "single place to stop. Choose a module that is called once."
        )
    if calls:
        return calls[0]
    members = [node for node in nodes if str(node.target).startswith(name + ".")]
    if isinstance(model.get_submodule(name), nn.ModuleList | nn.ModuleDict) and members:
        return members[-1]
    if members:
        raise DynskipError(
            f"Boundary {members[-1].target!r} lies inside boundary {name!r}. Stages follow one another: keep one of "
            "them."
        )
    raise DynskipError(
        f"Boundary {name!r} is never called in the forward of {type(model).__name__}. Name modules that the forward "
        "calls, such as those in model.feature_info."
    )


def split(graph: fx.Graph, cuts: Sequence[fx.Node], model_name: str) -> list[Segment]:
    """Split a graph after each node of `cuts`: one segment a stage, then the head.

    Args:
        graph: a traced forward pass.
        cuts: the boundary nodes, in order.
        model_name: what to call the model in errors.

    Returns:
        `len(cuts) + 1` segments. Each takes the outputs of the one before; the first takes the images.

    Raises:
        DynskipError: if the cuts are not in the order in which the model runs, or it returns more than one value.
    """
    nodes = list(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    ends = [position[cut] for cut in cuts]
    if ends != sorted(set(ends)):
        names = [str(cut.target) for cut in cuts]
        raise DynskipError(f"Boundaries must be named once each, in the order in which the model runs; got {names}.")
    (returned,) = nodes[-1].args
    if "logits" in (fields := getattr(getattr(returned, "target", None), "_fields", ())):
        # torchvision's GoogLeNet and Inception add auxiliary logits in training, which no later stage needs.
        returned = returned.args[fields.index("logits")]
    if not isinstance(returned, fx.Node):
        raise DynskipError(
            f"{model_name} returns a {type(returned).__name__} of values, where one tensor of logits was expected. "
            "Wrap it in a module that returns the logits alone."
        )

    segments: list[Segment] = []
    live: list[fx.Node] = [node for node in nodes if node.op == "placeholder"]
    for start, end in zip([-1, *ends], [*ends, len(nodes) - 2], strict=True):
        body = [node for node in nodes[start + 1 : end + 1] if node.op not in ("placeholder", "get_attr")]
        if end == len(nodes) - 2:
            outputs = [returned]
        else:
            inside = set(nodes[: end + 1])
            outputs = [
                node
                for node in nodes[: end + 1]
                if node.op != "get_attr" and any(user not in inside for user in node.users)
            ]
        is_head = len(segments) == len(cuts)
        if not is_head and nodes[end] not in outputs:
            raise DynskipError(
                f"What boundary {nodes[end].target!r} returns is used by nothing after it, so it is no stage of the "
                "forward pass. Choose a module whose output the next stage reads."
            )
        segments.append(_segment(body, live, outputs, feature=-1 if is_head else outputs.index(nodes[end])))
        live = outputs
    return segments


def _segment(body: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node], feature: int) -> Segment:
    # Parameters of the root (class tokens, position embeddings) are fetched from the live model in every segment that
    # reads them: a value carried across, or copied into a GraphModule, would go stale after load_state_dict.
    fetched = list(dict.fromkeys(n for node in body for n in node.all_input_nodes if n.op == "get_attr"))
    constants = [node for node in fetched if str(node.target).startswith(_CONSTANT_PREFIX)]
    names = [str(node.target) for node in constants]
    graph, env = fx.Graph(), {}
    for node in constants:
        env[node] = graph.placeholder(str(node.target))
    if any(isinstance(x, torch.device) for node in body for x in tree_leaves((node.args, node.kwargs))):
        # `device=self.table.device` was the device of the trace; the model may have moved since.
        names.append(DEVICE)
        device = graph.placeholder(DEVICE)
    for node in inputs:
        env[node] = graph.placeholder(node.name)
    for node in fetched:
        if node not in env:
            env[node] = graph.node_copy(node)
    for node in body:
        env[node] = new = graph.node_copy(node, env.__getitem__)
        if DEVICE in names:
            new.args, new.kwargs = map_aggregate(
                (new.args, new.kwargs), lambda x: device if isinstance(x, torch.device) else x
            )
    graph.output(tuple(env[node] for node in outputs))
    # Not `graph.eliminate_dead_code()`: timm's drop_path scales its mask in place and ignores the result, which looks
    # dead and is not.
    code = graph.python_code("self")
    namespace = dict(code.globals)
    # Python knows no source of such code by itself. Then torch 2.11's compiler takes it for a builtin, and counts the
    # recompilations of all stages of all models against one limit. Tracebacks show it now, too.
    name = f"<dynskip segment {next(_serial)}>"
    linecache.cache[name] = len(code.src), None, code.src.splitlines(keepends=True), name
    exec(compile(code.src, name, "exec"), namespace)
    return Segment(namespace["forward"], code.src, tuple(names), feature)


def swallow_parameterless(node: fx.Node, model: nn.Module) -> fx.Node:
    """Move a cut forward over the modules without parameters that alone consume it (activation, max-pool).

    What crosses the boundary gets smaller and the gate sees what the next stage sees.
    """
    while len(node.users) == 1:
        (user,) = node.users
        if user.op != "call_module" or any(True for _ in model.get_submodule(str(user.target)).parameters()):
            break
        node = user
    return node
