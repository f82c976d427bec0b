"""Cut a model's forward pass into segments with torch.fx, opening only what has to be opened.

Modules that contain no boundary stay closed: they are called as they are, so blocks keep their hooks, drop path,
checkpointing and compiled forms. Segments are plain functions of the *live* model; they own no parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import get_notrace_functions
from torch import Tensor, fx, nn

from dynskip.errors import DynskipError

_CONSTANT_PREFIX = "_tensor_constant"  # torch.fx's own name for tensors made while tracing
BY_HAND = "or give the stages yourself: stage_model([stage_1, stage_2, ...], head=head)"


@dataclass(frozen=True)
class Segment:
    """A piece of a forward pass: `call(model, constants, inputs) -> outputs`."""

    function: Callable[..., tuple[Any, ...]]
    source: str
    constants: tuple[str, ...]
    feature: int  # which output is the boundary's own value; -1 in the head

    def call(self, model: nn.Module, constants: dict[str, Tensor], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
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


def trace(model: nn.Module, boundaries: Sequence[str], training: bool) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Trace `model` in the given mode, leaving its modes and attributes as they were.

    Args:
        model: the model to trace.
        boundaries: qualified names of the modules that have to appear as calls of their own.
        training: trace the training forward (drop path, dropout glue) or the evaluation forward.

    Returns:
        The graph, and the tensors that tracing made (position grids and the like) by name.

    Raises:
        DynskipError: if torch.fx cannot follow the model's forward.
    """
    before = set(vars(model))
    try:
        with in_mode(model, training):
            graph = _CoarseTracer(boundaries).trace(model)
    except Exception as error:
        raise DynskipError(
            f"{type(model).__name__} could not be cut at {list(boundaries)}: its forward cannot be traced "
            f"({type(error).__name__}: {error}). Choose boundaries that lie outside the code that branches on "
            f"tensor values, {BY_HAND}."
        ) from error
    finally:
        made = [name for name in set(vars(model)) - before if name.startswith(_CONSTANT_PREFIX)]
        constants = {name: vars(model).pop(name) for name in made}
    return graph, constants


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


def split(graph: fx.Graph, cuts: Sequence[fx.Node]) -> list[Segment]:
    """Split a graph after each node of `cuts`: one segment a stage, then the head.

    Args:
        graph: a traced forward pass.
        cuts: the boundary nodes, in order.

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
    if not isinstance(returned, fx.Node):
        raise DynskipError(
            f"The model returns a {type(returned).__name__} of values, where one tensor of logits was expected. Wrap "
            "it in a module that returns the logits alone."
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
    graph, env = fx.Graph(), {}
    for node in constants:
        env[node] = graph.placeholder(str(node.target))
    for node in inputs:
        env[node] = graph.placeholder(node.name)
    for node in fetched:
        if node not in env:
            env[node] = graph.node_copy(node)
    for node in body:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[node] for node in outputs))
    # Not `graph.eliminate_dead_code()`: timm's drop_path scales its mask in place and ignores the result, which looks
    # dead and is not.
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(code.src, namespace)
    return Segment(namespace["forward"], code.src, tuple(str(node.target) for node in constants), feature)


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


def is_tensor_like(value: Any) -> bool:
    """Whether a value is a tensor that can be pooled (floating point, rank two or more)."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim >= 2
