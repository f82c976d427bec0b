"""Small models whose gates disagree with one another, and comparisons of outputs, for all tests."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import timm
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from dynskip import (
    AttentionMean,
    Consensus,
    EarlyTerminator,
    InnerClassifier,
    MaxOfLogits,
    MeanOfLogits,
    MeanOfProbabilities,
    PolicyGate,
    SkipOutput,
    StagedBackbone,
    StopOrForward,
    TopKMean,
    sofnet,
    stage_model,
)
from dynskip.activation import Activation

Temporal: TypeAlias = Literal["lstm"] | None
StateUpdate: TypeAlias = Literal["used", "reached"]
BOTH_TEMPORAL: tuple[Temporal, ...] = ("lstm", None)
ACTIVATIONS: tuple[Activation, ...] = ("softmax", "sigmoid")
BOTH_UPDATES: tuple[StateUpdate, ...] = ("used", "reached")

CLASSES = 4
SIZE = 8  # height and width of the toy models' frames
TOY_WIDTHS = (3, 6, 8, 10, 12)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


@torch.no_grad()
def randomise(module: nn.Module, seed: int, scale: float = 1.0) -> nn.Module:
    """Draw every parameter anew: outputs of matrices have spread `scale`, vectors `scale / 2`."""
    source = generator(seed)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
        parameter.copy_(noise * scale / fan_in**0.5)
    return module


@torch.no_grad()
def enliven(model: nn.Module, images: Tensor, seed: int = 0) -> nn.Module:
    """Make a freshly initialised network's answers depend on its input.

    Branches that start at zero do nothing, and BatchNorm with made-up statistics lets deep random networks forget what
    they saw; a comparison of rows would then prove nothing.
    """
    source = generator(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64).to(parameter.dtype)
        parameter.add_(noise * (0.3 if parameter.ndim == 1 else 0.02))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def toy_network(seed: int = 0, stages: int = 3, classes: int = CLASSES) -> nn.Sequential:
    """Build `stages` convolutions and a head in float64, fast enough for hundreds of runs."""
    widths = TOY_WIDTHS[: stages + 1]
    layers: list[nn.Module] = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.Tanh()) for a, b in itertools.pairwise(widths)
    ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))
    network = nn.Sequential(*layers, head).double()
    randomise(network, seed)
    randomise(head, seed + 1, scale=5.0)
    return network.eval()


def toy_backbone(seed: int = 0, stages: int = 3, classes: int = CLASSES) -> StagedBackbone:
    return stage_model(toy_network(seed, stages, classes), input_size=(3, SIZE, SIZE))


class Crossings(nn.Module):
    """A network in which every kind of value crosses its boundaries: rows, rows folded, the batch size, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.shift = nn.Parameter(torch.zeros(4, 6))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        batch, shift = x.shape[0], self.shift * 2
        x = self.first(x).tanh()
        tokens = x.reshape(batch * 4, -1)  # one row for each channel
        x = self.second(x).tanh()
        mixed = tokens.mean(1, keepdim=True).reshape(batch, 4) @ shift
        return self.head(x.mean((2, 3)) + mixed)  # type: ignore[no-any-return]


def crossings_backbone() -> StagedBackbone:
    network = randomise(Crossings(), seed=1)
    randomise(network.head, seed=2, scale=5.0)  # type: ignore[arg-type]
    return stage_model(network.eval(), ["first", "second"], input_size=(3, SIZE, SIZE))


def random_gates(widths: Sequence[int], seed: int, temporal: Temporal = "lstm") -> list[PolicyGate]:
    """Build gates in float64 whose margins vary widely with what they see."""
    gates = []
    for n, width in enumerate(widths):
        gate = PolicyGate(width, hidden=5, temporal=temporal).double()
        randomise(gate, seed * 101 + n, scale=1.5)
        randomise(gate.decide, seed * 103 + n, scale=4.0)
        gates.append(gate)
    return gates


@torch.no_grad()
def balance(model: StopOrForward, video: Tensor, share: float) -> StopOrForward:
    """Shift every gate so that, before it has seen anything, it forwards this share of the frames of `video`."""
    for gate, pooled in zip(model.gates, model.encode(video).pooled, strict=True):
        frames = pooled.flatten(0, 1)
        logits, _ = gate(frames, gate.initial_state(len(frames)))
        gate.decide.bias[1] -= (logits[:, 1] - logits[:, 0]).float().quantile(1 - share).to(logits.dtype)
    return model


def random_inner(count: int, seed: int, hidden: int = 5, detach: bool = True, scale: float = 3.0) -> list[nn.Module]:
    return [
        randomise(InnerClassifier(hidden, CLASSES, detach=detach).double(), seed * 107 + n, scale) for n in range(count)
    ]


def consensuses(classes: int = CLASSES, dtype: torch.dtype = torch.float32) -> list[Consensus]:
    """Build each consensus; the attention's scores vary."""
    attention = AttentionMean(classes, hidden=3).to(dtype)
    randomise(attention, 7, scale=2.0)
    return [MeanOfLogits(), MeanOfProbabilities(), MaxOfLogits(), TopKMean(2), attention.eval()]


def toy_model(
    seed: int = 0, stages: int = 3, *, inner: bool = True, detach: bool = True, share: float = 0.7, **kwargs: Any
) -> StopOrForward:
    """Build a wrapper around a toy network, in eval mode."""
    backbone = toy_backbone(seed, stages)
    gates = random_gates(backbone.num_features, seed, kwargs.pop("temporal", "lstm"))
    classifiers = random_inner(stages, seed, detach=detach) if inner else None
    model = StopOrForward(backbone, gates, classifiers, **kwargs).eval()
    return balance(model, toy_video(4, 5, seed=seed + 1), share)


def toy_video(
    batch: int = 3, frames: int = 6, seed: int = 0, size: int = SIZE, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Make frames that differ in colour, not only in noise, so that pooled features differ."""
    colour = 1.5 * randn(batch, frames, 3, 1, 1, seed=seed)
    return (colour + randn(batch, frames, 3, size, size, seed=seed + 1)).to(dtype)


@functools.cache
def timm_network(name: str, size: int, **kwargs: Any) -> nn.Module:
    """Build a timm model in eval mode. Shared between tests: deepcopy it before changing it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, **kwargs)
        return enliven(model, randn(4, 3, size, size, seed=1, dtype=torch.float32))


@dataclass(frozen=True)
class Case:
    """A model and videos, by what determines them."""

    seed: int
    share: float  # of frames that each gate forwards at first
    stages: int
    batch: int
    frames: int
    temporal: Temporal
    state_update: StateUpdate
    terminator: tuple[float, int] | None
    threshold: float | tuple[float, ...]

    def model(self) -> StopOrForward:
        return toy_model(
            self.seed,
            self.stages,
            share=self.share,
            temporal=self.temporal,
            state_update=self.state_update,
            terminator=EarlyTerminator(*self.terminator) if self.terminator else None,
            forward_threshold=self.threshold,
        )

    def video(self) -> Tensor:
        return toy_video(self.batch, self.frames, seed=self.seed + 7)


@st.composite
def cases(
    draw: st.DrawFn, temporal: Sequence[Temporal] = BOTH_TEMPORAL, updates: Sequence[StateUpdate] = BOTH_UPDATES
) -> Case:
    stages = draw(st.integers(1, 4))
    probability = st.sampled_from([0.5, 0.5, 0.5, 0.02, 0.3, 0.8, 0.97, 0.0, 1.0])
    terminator = st.tuples(st.sampled_from([0.3, 0.6, 0.9, 0.999, 1.0]), st.integers(0, 4))
    return Case(
        seed=draw(st.integers(0, 10_000)),
        share=draw(st.sampled_from([0.4, 0.7, 0.9])),
        stages=stages,
        batch=draw(st.integers(1, 5)),
        frames=draw(st.integers(1, 8)),
        temporal=draw(st.sampled_from(temporal)),
        state_update=draw(st.sampled_from(updates)),
        terminator=draw(st.one_of(st.none(), terminator)),
        threshold=draw(st.one_of(probability, st.tuples(*[probability] * stages))),
    )


def large_cases(temporal: Temporal, state_update: StateUpdate) -> list[Case]:
    """Choose cases in which everything happens, whatever hypothesis draws."""
    shares = (0.5, 0.7, 0.8, 0.9) * 2
    return [
        Case(seed, share, 2 + seed % 3, 5, 8, temporal, state_update, (0.8, 3), 0.5)
        for seed, share in enumerate(shares)
    ]


def fields_of(output: SkipOutput) -> dict[str, Any]:
    return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}


def rows_of(output: SkipOutput, index: Any) -> SkipOutput:
    """Take some videos out of an output."""
    chosen: dict[str, Any] = {n: x[index] if isinstance(x, Tensor) else x for n, x in fields_of(output).items()}
    return SkipOutput(**chosen)


def assert_same(actual: SkipOutput, expected: SkipOutput, exact: bool = False, skip: Sequence[str] = ()) -> None:
    """Compare all fields of two outputs, NaN where and only where the other has NaN.

    What was executed ahead of decisions depends on how a pass was run, so it is no part of the comparison.
    """
    for name, wanted in fields_of(expected).items():
        got = getattr(actual, name)
        if name in (*skip, "speculative_macs"):
            continue
        if not isinstance(wanted, Tensor) or not isinstance(got, Tensor):
            assert got == wanted, f"{name}: {got} against {wanted}"
            continue
        assert got.dtype == wanted.dtype, f"{name}: {got.dtype} against {wanted.dtype}"
        tolerance = 0.0 if exact or not got.is_floating_point() else 1e-8

        def explain(text: str, name: str = name) -> str:
            return f"{name}: {text}"

        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True, msg=explain)


def assert_rows(actual: Tensor, expected: Tensor) -> None:
    """Compare values from batches of other sizes, for which convolutions pick other algorithms."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * float(expected.detach().abs().max()))


def recipe(name: str) -> Any:
    """Load a recipe of `examples/` as Python does that runs it, so that nothing finds the folder by `sys.path`."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_tiny_sofnet(folder: Path, preprocessing: Any, seed: int = 0, **kwargs: Any) -> Path:
    """Save a small model for rendered videos, as recipes take it."""
    from dynskip.video import stick_figures  # needs the extra `video`

    torch.manual_seed(seed)
    size = (3, preprocessing.size, preprocessing.size)
    model = sofnet(stage_model("test_byobnet", num_classes=6, input_size=size), hidden=8, **kwargs).eval()
    model.class_names, model.preprocessing = stick_figures.CLASSES, preprocessing.to_dict()
    model.save_pretrained(folder)
    return folder
