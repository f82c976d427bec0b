"""The faults of one video do not affect others: NaN verdicts, gates and stages that raise; and equal frames."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from helpers import (
    SIZE,
    assert_same,
    random_gates,
    toy_backbone,
    toy_model,
    toy_video,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynskip import (
    EarlyTerminator,
    FixedGate,
    FLOPsLookup,
    PolicyGate,
    StopOrForward,
    VideoResult,
    calibrate,
    stage_model,
)
from dynskip.rules import tie

NAN = math.nan


def plain_network() -> Any:
    """Build a network whose first features have the mean of the frame."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), head).eval()
    first: Any = network[0]
    nn.init.constant_(first.weight, 1 / 3)
    nn.init.zeros_(first.bias)
    return network


class Sick(nn.Module):
    """Answer NaN or infinite logits for bright frames, and finite ones for all others."""

    def __init__(self, stop: float, forward: float, otherwise: float = -1.0) -> None:
        super().__init__()
        self.sick, self.otherwise = torch.tensor([stop, forward]), otherwise

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return ()

    def forward(self, pooled: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        mean = pooled.mean(1)
        well = torch.stack([-self.otherwise - mean, self.otherwise + mean], 1)
        return torch.where((mean > 0.5)[:, None], self.sick.to(pooled), well), state


def in_all_ways(model: StopOrForward, video: Tensor, beside: Tensor) -> dict[str, list[Any]]:
    """Run one video in every way; return what became of its frames, the fallback frame, and the logits."""
    session = model.stream()
    steps = [session(frame) for frame in video[0]]
    result = session.result()
    stopped = [int(step.stopped_at) for step in steps]
    ways = {"online": [stopped, int(result.fallback_frame), result.logits[0]]}
    outputs = {"decide": model.decide(model.encode(video)), "clip": model(video)}
    outputs |= {f"window {w}": model.run_clip(video, w) for w in (1, 2, video.shape[1])}
    outputs["beside another"] = model(torch.cat([video, beside]))
    for name, output in outputs.items():
        ways[name] = [output.stopped_at[0].tolist(), int(output.fallback_frame[0]), output.logits[0]]
    for look_ahead in (1, 3):
        events = list(model.serve_streams([("it", video[0]), ("beside", beside[0])], 2, 2, look_ahead))
        ended = {event.key: event for event in events if isinstance(event, VideoResult)}
        assert ended["beside"].error is None
        assert torch.allclose(ended["beside"].logits, model(beside).logits[0], atol=1e-5)
        stopped = [e.stopped_at for e in events if not isinstance(e, VideoResult) and e.key == "it"]
        ways[f"streams {look_ahead}"] = [stopped, ended["it"].fallback_frame, ended["it"].logits]
    return ways


@pytest.mark.parametrize("verdict", [(NAN, NAN), (0.0, NAN), (NAN, 0.0), (math.inf, math.inf), (-math.inf, -math.inf)])
@pytest.mark.parametrize("bright", [0, 1, 2])
def test_a_verdict_that_is_no_number_stops_and_comes_last(verdict: tuple[float, float], bright: int) -> None:
    model = StopOrForward(
        stage_model(plain_network(), input_size=(3, 8, 8)), [Sick(*verdict), FixedGate()], forward_threshold=0.0
    ).eval()
    model.gates[0].otherwise = -200.0  # even a saturated stop gets further than a NaN
    video = torch.zeros(1, 3, 3, 8, 8)
    video[:, bright] = 1.0
    for name, (stopped, fallback, logits) in in_all_ways(model, video, torch.zeros(1, 3, 3, 8, 8)).items():
        assert stopped == [0, 0, 0], name
        assert fallback == (1 if bright == 0 else 0), name
        assert logits.isfinite().all(), name


def test_a_video_of_such_verdicts_alone_is_answered_by_its_first_frame() -> None:
    model = StopOrForward(stage_model(plain_network(), input_size=(3, 8, 8)), [Sick(NAN, NAN), FixedGate()]).eval()
    for name, (stopped, fallback, _) in in_all_ways(
        model, torch.ones(1, 3, 3, 8, 8), torch.zeros(1, 3, 3, 8, 8)
    ).items():
        assert (stopped, fallback) == ([0, 0, 0], 0), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_that_overflow_half_precision_stop(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = plain_network()
    nn.init.constant_(network[0].weight, 100.0)
    gates = [PolicyGate(4, 8, forward_bias=-3.0), PolicyGate(6, 8)]
    model = StopOrForward(stage_model(network, input_size=(3, 8, 8)), gates).eval().to(dtype)
    video = torch.randn(1, 3, 3, 8, 8)
    video[:, 0] = 2000.0 if dtype == torch.float16 else 3e38  # finite, and too large after one layer
    ways = in_all_ways(model, video.to(dtype), torch.randn(1, 3, 3, 8, 8).to(dtype))
    assert {name: way[0] for name, way in ways.items()} == {name: [0, 0, 0] for name in ways}
    assert {way[1] for way in ways.values()} <= {1, 2}
    assert all(way[2].isfinite().all() for way in ways.values())


def test_frames_whose_logits_are_not_finite_do_not_count() -> None:
    network = plain_network()

    class Broken(nn.Module):
        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.head = head

        def forward(self, x: Tensor) -> Tensor:
            bright = x.mean((1, 2, 3)) > 0.5
            return torch.where(bright[:, None], NAN, self.head(x))

    nn.init.constant_(network[1].weight, 1 / 4)
    nn.init.zeros_(network[1].bias)
    backbone = stage_model([network[0], network[1]], head=Broken(network[2]), input_size=(3, 8, 8))
    model = StopOrForward(backbone, [FixedGate(), FixedGate()], terminator=EarlyTerminator(1.0, 0)).eval()
    video = 0.1 * torch.randn(1, 4, 3, 8, 8)
    video[:, 1] = 1.0
    expected = model(video[:, [0, 2, 3]]).logits[0]
    for name, (stopped, fallback, logits) in in_all_ways(model, video, video[:, [0, 2, 3, 3]]).items():
        assert (stopped, fallback) == ([2] * 4, -1), name
        torch.testing.assert_close(logits, expected, msg=name)


# Faults of gates, stages and terminators


class FaultError(RuntimeError):
    pass


class Picky(nn.Module):
    """Raise for bright inputs."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return ()

    def forward(self, x: Tensor, *state: Any) -> Any:
        if (x.flatten(1).mean(1) > 50).any():
            raise FaultError("cannot take such a frame")
        return self.inner(x) if self.inner is not None else (x.new_tensor([[0.0, 1.0]]).expand(len(x), 2), *state)


class Choosy(EarlyTerminator):
    def forward(self, probabilities: Tensor, frames_seen: Tensor) -> Tensor:
        if (probabilities[:, 0] > 0.999).any():
            raise FaultError("cannot end such a video")
        return super().forward(probabilities, frames_seen)


def faulty(what: str) -> StopOrForward:
    network = plain_network()
    gates: list[nn.Module] = [FixedGate(), FixedGate()]
    terminator: EarlyTerminator | None = None
    if what == "gate":
        gates[0] = Picky()
    elif what == "terminator":
        terminator = Choosy(1.0, 100)
        with torch.no_grad():
            network[2][2].weight.zero_()
            network[2][2].weight[0] = network[1].weight.sum((1, 2, 3)).sign()
    table = FLOPsLookup([1.0, 1.0])
    backbone = stage_model(network, input_size=(3, 8, 8))
    if what == "stage":
        backbone = stage_model([network[0], Picky(network[1])], head=network[2], input_size=(3, 8, 8))
    elif what == "head":
        backbone = stage_model([network[0], network[1]], head=Picky(network[2]), input_size=(3, 8, 8))
        nn.init.constant_(network[1].weight, 1.0)
    return StopOrForward(backbone, gates, terminator=terminator, lookup=table).eval()


@pytest.mark.parametrize("what", ["gate", "stage", "head", "terminator"])
@pytest.mark.parametrize("way", ["plain", "ahead", "async"])
@pytest.mark.parametrize("bad_frame", [0, 1])
def test_a_stream_at_which_something_raises_ends_alone(what: str, way: str, bad_frame: int) -> None:
    model = faulty(what)
    good = [0.1 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    bad = torch.zeros(3, 3, 8, 8)
    bad[bad_frame] = 1000.0
    sources: Iterable[Any] = [*enumerate(good), ("bad", bad)]
    if way == "async":

        async def run() -> list[Any]:
            return [event async for event in model.aserve_streams(sources, 4, 4)]

        events = asyncio.run(run())
    else:
        events = list(model.serve_streams(sources, 4, 4, 3 if way == "ahead" else 1))
    results = {event.key: event for event in events if isinstance(event, VideoResult)}
    assert len(results) == 4
    assert isinstance(results["bad"].error, FaultError)
    assert results["bad"].frames_seen <= bad_frame
    for n, video in enumerate(good):
        alone = model(video[None])
        assert results[n].error is None
        assert results[n].frames_seen == 4
        assert results[n].macs == float(alone.macs)
        torch.testing.assert_close(results[n].logits, alone.logits[0])


@pytest.mark.parametrize("look_ahead", [1, 2, 4])
def test_a_fault_beyond_what_is_looked_at_does_no_harm(look_ahead: int) -> None:
    """A frame that ran ahead and raised counts only if the video gets to it."""
    network = plain_network().double()
    backbone = stage_model(network, input_size=(3, 8, 8))
    terminator = EarlyTerminator(1e-6, 1)
    table = FLOPsLookup([1.0, 1.0])
    model = StopOrForward(backbone, [Picky(), FixedGate()], terminator=terminator, lookup=table).eval()
    video = 0.1 * torch.randn(1, 6, 3, 8, 8, dtype=torch.float64)
    expected = model(video)
    assert expected.seen.sum() == 2
    video[:, 3] = 1000.0
    for window in (1, 2, 4, 6):
        assert_same(model.run_clip(video, window), expected)
    (result,) = [e for e in model.serve_streams(video, 2, 4, look_ahead) if isinstance(e, VideoResult)]
    assert (result.error, result.frames_seen) == (None, 2)
    torch.testing.assert_close(result.logits, expected.logits[0])
    model.terminator = None
    for window in (1, 4, 6):
        with pytest.raises(FaultError):
            model.run_clip(video, window)
    *_, last = model.serve_streams(video, 2, 4, look_ahead)
    assert isinstance(last, VideoResult)
    assert isinstance(last.error, FaultError)
    assert last.frames_seen == 3


def test_a_batch_that_runs_out_of_memory_is_run_frame_by_frame() -> None:
    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 3:
                raise torch.OutOfMemoryError("too many frames at a time")
            return x * 1.0

    network = plain_network()
    backbone = stage_model([nn.Sequential(Large(), network[0]), network[1]], head=network[2], input_size=(3, 8, 8))
    model = StopOrForward(backbone, [FixedGate(), FixedGate()], lookup=FLOPsLookup([1.0, 1.0])).eval()
    results = [e for e in model.serve_streams(torch.zeros(8, 3, 3, 8, 8), 8, 8) if isinstance(e, VideoResult)]
    assert [result.error for result in results] == [None] * 8


# Equal frames


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), frames=st.integers(2, 9), window=st.integers(1, 9), batch=st.integers(1, 4))
def test_of_equal_frames_the_first_answers_in_all_ways(seed: int, frames: int, window: int, batch: int) -> None:
    model = toy_model(seed, forward_threshold=1.0).float()
    video = toy_video(batch, 1, seed=seed, dtype=torch.float32).expand(batch, frames, 3, SIZE, SIZE)
    assert model.run_clip(video, window).fallback_frame.tolist() == [0] * batch
    assert model.decide(model.encode(video)).fallback_frame.tolist() == [0] * batch
    session = model.stream(batch)
    for t in range(frames):
        session(video[:, t])
    assert session.result().fallback_frame.tolist() == [0] * batch
    results = [e for e in model.serve_streams(video, 3, 2) if isinstance(e, VideoResult)]
    assert [result.fallback_frame for result in results] == [0] * batch


class Jittery(nn.Module):
    """Answer the same for all frames up to rounding, as in batches of different sizes."""

    def __init__(self, last: float) -> None:
        super().__init__()
        self.last = last

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return ()

    def forward(self, pooled: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        margin = -1.0 + self.last * torch.rand(len(pooled), dtype=torch.float64)
        return torch.stack([-margin, margin], 1).to(pooled), state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_does_not_decide_between_equal_frames(dtype: torch.dtype) -> None:
    backbone = toy_backbone(0, 1)
    model = StopOrForward(backbone, [Jittery(tie(dtype))]).to(dtype).eval()
    video = toy_video(2, 1, dtype=dtype).expand(2, 12, 3, SIZE, SIZE)
    for window in (1, 5, 12):
        assert model.run_clip(video, window).fallback_frame.tolist() == [0, 0]
    assert model.decide(model.encode(video)).fallback_frame.tolist() == [0, 0]


# Gates whose layers are more than their weights


class Adapter(nn.Module):
    """Wrap a layer as adapters do: its weight stays, and the call does more."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base, self.up = base, nn.Linear(base.in_features, base.out_features).double()
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(x)  # type: ignore[no-any-return]


def loud(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda _, __, out: tuple(1.5 * x for x in out) if isinstance(out, tuple) else 1.5 * out)


def prune(layer: nn.Module) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(layer, "weight" if isinstance(layer, nn.Linear) else "weight_hh", 0.3)


def to_layers(change: Callable[[Any], object]) -> Callable[[Any], None]:
    def apply(gate: Any) -> None:
        for layer in (gate.project, gate.cell, gate.decide):
            change(layer)

    return apply


@torch.no_grad()
def weight_norm(layer: Any) -> None:
    nn.utils.parametrizations.weight_norm(layer)
    layer.parametrizations.weight.original0.mul_(1.5)


CHANGES: dict[str, Callable[[Any], object]] = {
    "hooks": to_layers(loud),
    "pruning": to_layers(prune),
    "weight norm": lambda gate: weight_norm(gate.project),
    "spectral norm": lambda gate: nn.utils.parametrizations.spectral_norm(gate.cell, "weight_hh"),
    "an adapter": lambda gate: setattr(gate, "project", Adapter(gate.project)),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_what_lives_in_the_calls_of_a_gates_layers_takes_part(change: str) -> None:
    model, video = toy_model(seed=2), toy_video(3, 6)
    before = model(video).gate_logits
    model.lookup_for((SIZE, SIZE))
    for gate in model.gates:
        CHANGES[change](gate)
    model.eval()
    masked = model.decide(model.encode(video))
    assert before is not None
    assert masked.gate_logits is not None
    assert not torch.allclose(before.nan_to_num(), masked.gate_logits.nan_to_num())
    for window in (1, 3, 6):
        assert_same(model.run_clip(video, window), masked, skip=["inner_logits"])
    session = model.stream(3)
    steps = [session(video[:, t]) for t in range(6)]
    assert torch.equal(torch.stack([step.stopped_at for step in steps], 1), masked.stopped_at)
    model.train()
    for _ in range(2):
        model(video).logits.sum().backward()
    for gate in model.gates:
        assert all(p.grad is not None for p in gate.parameters())


def test_dynamically_quantised_gates_run() -> None:
    model, video = toy_model(seed=2).float(), toy_video(2, 4, dtype=torch.float32)
    model.lookup_for((SIZE, SIZE))
    with pytest.warns(DeprecationWarning, match="quantization"):
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear, nn.LSTMCell})
    assert type(quantised.gates[0].project) is not nn.Linear
    with pytest.warns(UserWarning, match="cost of Gate 0 .* is unknown"):
        output = quantised(video)
    assert output.logits.isfinite().all()
    assert output.macs.isnan().all()
    assert torch.equal(quantised.run_clip(video, 1).stopped_at, output.stopped_at)


def test_stored_features_that_are_not_finite_are_refused() -> None:
    model, video = toy_model(seed=2), toy_video(2, 4)
    encoded = model.encode(video)
    encoded.pooled[1][0, 0] = NAN
    with pytest.raises(ValueError, match="NaN or infinite values"):
        calibrate.encode(model, [(encoded, torch.zeros(2, dtype=torch.long))])


def test_gates_without_memory_say_so() -> None:
    for gate in (FixedGate(), PolicyGate(4, 4, temporal=None)):
        assert not gate.has_memory
    assert all(gate.has_memory for gate in random_gates((4,), 0))
