from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    BOTH_TEMPORAL,
    BOTH_UPDATES,
    StateUpdate,
    Temporal,
    generator,
    randn,
    random_gates,
    toy_backbone,
    toy_model,
    toy_video,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dynskip import (
    DynskipError,
    EarlyTerminator,
    Gate,
    InnerClassifier,
    PolicyGate,
    StopOrForward,
    exponential_temperature,
)
from dynskip.gates import FORWARD, STOP, GateState

# PolicyGate, Eq. 3.1-3.4


def literal_lstm_gate(gate: Any, pooled: list[float], h: list[float], c: list[float]) -> tuple[list[float], ...]:
    """Compute one frame of one video with plain numbers: projection, LSTM cell (i, f, g, o), two logits."""

    def affine(layer: Any, x: list[float], weight: str = "weight", bias: str = "bias") -> list[float]:
        rows, offsets = getattr(layer, weight).tolist(), getattr(layer, bias).tolist()
        return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(rows, offsets, strict=True)]

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    x = affine(gate.project, pooled)
    mixed = zip(affine(gate.cell, x, "weight_ih", "bias_ih"), affine(gate.cell, h, "weight_hh", "bias_hh"), strict=True)
    sums, size = [a + b for a, b in mixed], len(h)
    i, f, g, o = (sums[k * size : (k + 1) * size] for k in range(4))
    c = [sigmoid(f[k]) * c[k] + sigmoid(i[k]) * math.tanh(g[k]) for k in range(size)]
    h = [sigmoid(o[k]) * math.tanh(c[k]) for k in range(size)]
    return affine(gate.decide, h), h, c


@given(seed=st.integers(0, 10_000), batch=st.integers(1, 4), frames=st.integers(1, 4))
def test_lstm_gate_is_the_equations(seed: int, batch: int, frames: int) -> None:
    (gate,) = random_gates([6], seed)
    pooled = randn(batch, frames, 6, seed=seed + 1)
    state = gate.initial_state(batch)
    literal = [([0.0] * 5, [0.0] * 5) for _ in range(batch)]
    for t in range(frames):
        logits, state = gate(pooled[:, t], state)
        assert logits.shape == (batch, 2)
        for b in range(batch):
            expected, h, c = literal_lstm_gate(gate, pooled[b, t].tolist(), *literal[b])
            literal[b] = (h, c)
            torch.testing.assert_close(logits[b], torch.tensor(expected, dtype=torch.float64))
            torch.testing.assert_close(state[0][b], torch.tensor(h, dtype=torch.float64))
            torch.testing.assert_close(state[1][b], torch.tensor(c, dtype=torch.float64))


def test_gate_without_memory_ignores_its_state() -> None:
    (gate,) = random_gates([6], seed=3, temporal=None)
    pooled = randn(4, 6, seed=1)
    logits, state = gate(pooled, gate.initial_state(4))
    hidden = gate.cell(gate.project(pooled)).relu()
    torch.testing.assert_close(logits, gate.decide(hidden))
    torch.testing.assert_close(state[0], hidden)
    assert torch.equal(gate(pooled, (randn(4, 5, seed=2),))[0], logits)


@pytest.mark.parametrize("temporal", BOTH_TEMPORAL)
def test_initial_state_is_zero_rows_of_the_gates_own_type(temporal: Temporal) -> None:
    for dtype in (torch.float32, torch.float64):
        state = PolicyGate(6, 5, temporal).to(dtype).initial_state(3)
        assert len(state) == (2 if temporal else 1)
        for part in state:
            assert part.shape == (3, 5)
            assert part.dtype == dtype
            assert not part.any()


@pytest.mark.parametrize("temporal", BOTH_TEMPORAL)
def test_gates_start_by_forwarding_nearly_everything(temporal: Temporal) -> None:
    torch.manual_seed(0)
    gate = PolicyGate(64, temporal=temporal)
    logits, _ = gate(randn(200, 64, seed=0, dtype=torch.float32), gate.initial_state(200))
    probability = logits.softmax(-1)[:, FORWARD]
    assert 0.90 < probability.mean() < 0.98
    unbiased = PolicyGate(64, temporal=temporal, forward_bias=0.0)
    assert unbiased.decide.bias.tolist() == [0.0, 0.0]


def test_gate_says_what_it_is() -> None:
    assert "6 -> 5, temporal=None" in repr(PolicyGate(6, 5, None))


# Temperature and sampling


def test_temperature_schedule() -> None:
    assert exponential_temperature(0) == 5.0
    assert exponential_temperature(10) == pytest.approx(5.0 * 2.718281828459045**-0.45)
    assert exponential_temperature(2, initial=3.0, decay=0.5) == pytest.approx(3.0 / 2.718281828459045)
    falling = [exponential_temperature(epoch) for epoch in range(60)]
    assert falling == sorted(falling, reverse=True)


def test_sampled_decisions_follow_the_gates_probabilities() -> None:
    model = toy_model(seed=4, stages=2).train()
    encoded = model.encode(toy_video(batch=2, frames=1))
    torch.manual_seed(0)
    runs = [model.decide(encoded) for _ in range(1500)]
    assert runs[0].gate_logits is not None
    expected = runs[0].gate_logits.softmax(-1)[..., FORWARD]
    drawn = torch.stack([run.forward for run in runs]).mean(0)
    # Five standard deviations of the mean of 1500 coins.
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0.065)
    assert ((expected > 0.1) & (expected < 0.9)).any()


def test_temperature_shapes_gradients_and_not_hard_decisions() -> None:
    model = toy_model(seed=4, stages=2).train()
    encoded = model.encode(toy_video())
    gradients, decisions = [], []
    for temperature in (0.5, 5.0):
        model.temperature = temperature
        torch.manual_seed(0)
        output = model.decide(encoded)
        (gradient,) = torch.autograd.grad(output.forward.sum(), model.gates[0].decide.bias)
        gradients.append(gradient)
        decisions.append(output.forward.detach().round())
        assert torch.allclose(output.forward, output.forward.round())
    assert torch.equal(decisions[0], decisions[1])  # the same noise: only the slope differs
    assert not torch.allclose(gradients[0], gradients[1])


# InnerClassifier


def test_inner_classifier_reads_without_writing_by_default() -> None:
    hidden = randn(3, 5, seed=0, dtype=torch.float32).requires_grad_()
    shut, open_ = InnerClassifier(5, 4), InnerClassifier(5, 4, detach=False)
    assert shut(hidden).shape == (3, 4)
    assert torch.autograd.grad(shut(hidden).sum(), hidden, allow_unused=True) == (None,)
    assert torch.autograd.grad(open_(hidden).sum(), hidden)[0].any()


# EarlyTerminator, Eq. 3.7


@given(
    seed=st.integers(0, 1000),
    threshold=st.floats(0.01, 1.0),
    min_frames=st.integers(0, 5),
    frames=st.integers(1, 7),
)
def test_terminator_is_the_rule_row_by_row(seed: int, threshold: float, min_frames: int, frames: int) -> None:
    source = generator(seed)
    probabilities = (3 * torch.randn(6, 4, generator=source, dtype=torch.float64)).softmax(-1)
    probabilities[0] = math.nan  # no frame used yet: no prediction
    seen = torch.randint(0, frames + 1, (6,), generator=source)
    finished = EarlyTerminator(threshold, min_frames)(probabilities, seen)
    assert finished.dtype == torch.bool
    for row in range(6):
        sure = row > 0 and max(probabilities[row].tolist()) > threshold
        assert bool(finished[row]) == (sure and int(seen[row]) > min_frames)


def test_terminator_at_its_limits() -> None:
    certain = torch.tensor([[1.0, 0.0], [0.999, 0.001]], dtype=torch.float64)
    assert EarlyTerminator().threshold == 0.999
    assert EarlyTerminator().min_frames == 3
    assert EarlyTerminator()(certain, torch.tensor([3, 3])).tolist() == [False, False]  # the fourth is the first to end
    assert EarlyTerminator()(certain, torch.tensor([4, 4])).tolist() == [True, False]  # equal does not exceed
    assert not EarlyTerminator(1.0, 0)(certain, torch.tensor([9, 9])).any()
    assert "probability > 0.999, after more than 3 frames" in repr(EarlyTerminator())


# Gates of one's own


class Brightness(nn.Module):
    """A gate without parameters, state or softmax."""

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return ()

    def forward(self, pooled: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        margin = pooled.mean(1)
        return torch.stack([-margin, margin], 1), state


class Every(nn.Module):
    """A gate whose state counts frames: it forwards every second one that it counts."""

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return (torch.zeros(batch, dtype=torch.long),)

    def forward(self, pooled: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        even = (state[0] % 2 == 0).to(pooled.dtype)
        return torch.stack([1 - even, even], 1), (state[0] + 1,)


@pytest.mark.parametrize("state_update", BOTH_UPDATES)
def test_any_module_with_the_contract_is_a_gate(state_update: StateUpdate) -> None:
    backbone = toy_backbone(stages=2)
    model = StopOrForward(backbone, [Every(), Brightness()], state_update=state_update).eval()
    video = toy_video(batch=3, frames=6, seed=5)
    output, dense = model(video), model.decide(model.encode(video))
    assert torch.equal(output.stopped_at, dense.stopped_at)
    if state_update == "reached":
        assert (output.stopped_at[:, 1::2] == 0).all()
        assert (output.stopped_at[:, ::2] > 0).all()
    else:  # the counter waits for a used frame
        for row in output.stopped_at.tolist():
            for before, after in itertools.pairwise(row):
                assert after == 0 or before != 2


# Bad input


@pytest.mark.parametrize(
    ("call", "telling"),
    [
        (lambda: PolicyGate(0), "widths must be positive; got in_features=0, hidden=512"),
        (lambda: PolicyGate(4, hidden=-1), "widths must be positive; got in_features=4, hidden=-1"),
        (lambda: PolicyGate(4, temporal="gru"), "temporal='gru' is unknown; use 'lstm', or None"),  # type: ignore[arg-type]
        (lambda: InnerClassifier(0, 4), "widths must be positive; got in_features=0, num_classes=4"),
        (lambda: InnerClassifier(5, 0), "widths must be positive; got in_features=5, num_classes=0"),
        (lambda: EarlyTerminator(0.0), r"threshold 0.0 is no probability; give one in \(0, 1\]"),
        (lambda: EarlyTerminator(1.01), "threshold 1.01 is no probability"),
        (lambda: EarlyTerminator(math.nan), "threshold nan is no probability"),
        (lambda: EarlyTerminator(0.9, -1), "min_frames=-1 is no whole number"),
    ],
)
def test_parts_refuse_impossible_arguments(call: Callable[[], Any], telling: str) -> None:
    with pytest.raises(DynskipError, match=telling):
        call()


def test_stop_and_forward_are_the_columns_of_the_logits() -> None:
    assert (STOP, FORWARD) == (0, 1)


# A gate in two parts


@pytest.mark.parametrize("temporal", ["lstm", None])
@pytest.mark.parametrize("rows", [1, 2, 4, 5])
@torch.no_grad()
def test_few_rows_and_many_give_what_the_layers_give(temporal: Temporal, rows: int) -> None:
    gate = PolicyGate(7, 6, temporal).double()
    pooled = randn(rows, 7, seed=1)
    state = tuple(randn(rows, 6, seed=2 + i) for i in range(len(gate.initial_state(1))))
    hidden = gate.project(pooled)
    new = gate.cell(hidden, state) if temporal == "lstm" else (gate.cell(hidden).relu(),)
    logits, got = gate(pooled, state)
    torch.testing.assert_close((logits, got), (gate.decide(new[0]), new))


def test_a_gate_with_a_forward_of_its_own_is_not_taken_apart() -> None:
    class Stubborn(PolicyGate):
        def forward(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
            logits, new = super().forward(pooled, state)
            return torch.tensor([1.0, -1.0], dtype=logits.dtype).expand_as(logits), new

    backbone = toy_backbone()
    model = StopOrForward(backbone, [Stubborn(c, 4).double() for c in backbone.num_features]).eval()
    assert (model(toy_video()).stopped_at == 0).all()
    assert (model.decide(model.encode(toy_video())).stopped_at == 0).all()


def test_step_is_all_that_a_gate_has_to_write() -> None:
    class Brighter(Gate):
        """Forward frames that are brighter than the last used one."""

        def __init__(self, in_features: int) -> None:
            super().__init__(hidden_features=in_features)

        def step(self, embedded: Tensor, state: GateState) -> tuple[Tensor, GateState]:
            margin = embedded.mean(-1) - state[0].mean(-1)
            return torch.stack([-margin, margin], -1), (embedded,)

    backbone, video = toy_backbone(stages=1), toy_video(batch=3, frames=6)
    model = StopOrForward(backbone, [Brighter(backbone.num_features[0]).double()]).eval()
    encoded = model.encode(video)
    expected, brightest = [], torch.zeros(3, dtype=torch.float64)
    for frames in encoded.pooled[0].mean(-1).unbind(1):
        expected.append(frames > brightest)
        brightest = torch.where(expected[-1], frames, brightest)
    assert torch.equal(model(video).used, torch.stack(expected, 1))
    assert torch.equal(model.decide(encoded).used, torch.stack(expected, 1))
    assert Gate().initial_state(2) == ()


def test_hooks_on_gates_are_called() -> None:
    model, calls = toy_model(), []
    for gate in model.gates:
        gate.register_forward_hook(lambda *_: calls.append(1))
    model(toy_video())
    assert calls
