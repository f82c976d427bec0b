"""Gates that follow a rule, small learned gates, and whether all of them decide alike in every way of running."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    BOTH_UPDATES,
    CLASSES,
    SIZE,
    StateUpdate,
    assert_same,
    randn,
    randomise,
    rows_of,
    toy_backbone,
    toy_network,
    toy_video,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynskip import (
    ConfidenceGate,
    DynskipError,
    EarlyTerminator,
    EntropyGate,
    FixedGate,
    LinearGate,
    PairwiseGate,
    PolicyGate,
    RandomGate,
    SimilarityGate,
    StopOrForward,
    VideoResult,
    stage_model,
)
from dynskip.gates import FORWARD, STOP, GateState

D = torch.float64
Build = Callable[[int], Any]
GATES: dict[str, Build] = {
    "policy": lambda c: PolicyGate(c, hidden=5),
    "linear": lambda c: LinearGate(c, forward_bias=0.5),
    "pairwise": lambda c: PairwiseGate(c, hidden=4, forward_bias=0.5),
    "similarity": lambda c: SimilarityGate(c, threshold=0.45),
    "confidence": lambda c: ConfidenceGate(c, CLASSES, threshold=0.8),
    "unsure": lambda c: ConfidenceGate(c, CLASSES, threshold=0.4, stop="unsure"),
    "entropy": lambda c: ConfidenceGate(c, CLASSES, threshold=0.4, measure="entropy"),
    "random": lambda c: RandomGate(c, rate=0.8),
    "fixed": lambda c: FixedGate(),
}
LEARNED = ("policy", "linear", "pairwise", "confidence", "unsure", "entropy")


def build(name: str, channels: int, seed: int = 0) -> Any:
    """Build a gate in float64, with parameters that give different decisions for different frames."""
    gate = GATES[name](channels).double()
    return randomise(gate, seed, scale=2.5) if name in LEARNED else gate


def gated(names: Sequence[str], seed: int = 0, **kwargs: Any) -> StopOrForward:
    backbone = toy_backbone(seed, len(names))
    gates = [build(*pair, seed=seed * 31 + n) for n, pair in enumerate(zip(names, backbone.num_features, strict=True))]
    return StopOrForward(backbone, gates, **kwargs).eval()


def slow_video(batch: int, frames: int, seed: int) -> Tensor:
    """Make frames of which some equal the frame before, and some nearly do."""
    video = toy_video(batch, frames, seed)
    kinds = torch.randint(0, 3, (batch, frames), generator=torch.Generator().manual_seed(seed))
    for t in range(1, frames):
        for b in range(batch):
            if kinds[b, t] < 2:
                video[b, t] = video[b, t - 1] + 0.05 * kinds[b, t] * video[b, t]
    return video


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(GATES)), min_size=1, max_size=3),
    seed=st.integers(0, 5000),
    state_update=st.sampled_from(BOTH_UPDATES),
    window=st.integers(1, 7),
    ends=st.booleans(),
)
def test_mixed_gates_decide_alike_in_every_runtime(
    names: list[str], seed: int, state_update: StateUpdate, window: int, ends: bool
) -> None:
    terminator = EarlyTerminator(0.6, 1) if ends else None
    model = gated(names, seed, state_update=state_update, terminator=terminator)
    video = slow_video(3, 6, seed)
    masked = model.decide(model.encode(video))
    assert_same(model.run_clip(video, window), masked)
    assert_same(model(video[1:2]), rows_of(masked, slice(1, 2)))
    session = model.stream(3)
    steps = [session(video[:, t]) for t in range(6)]
    assert torch.equal(torch.stack([step.stopped_at for step in steps], 1), masked.stopped_at)
    torch.testing.assert_close(session.result().logits, masked.logits)
    results = {e.key: e for e in model.serve_streams(map(iter, video), 2, 2) if isinstance(e, VideoResult)}
    assert len(results) == len(video)
    for b in range(len(video)):
        assert results[b].error is None
        assert results[b].macs == masked.macs[b]
        torch.testing.assert_close(results[b].logits, masked.logits[b])


@settings(max_examples=25, deadline=None)
@given(
    shown=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    others=st.lists(st.sampled_from(["fixed", "policy", "similarity"]), max_size=2),
    seed=st.integers(0, 5000),
    window=st.integers(1, 5),
    saved_at=st.integers(0, 15),
)
def test_a_video_of_repeats_gets_the_answer_of_all_its_frames(
    shown: list[int], others: list[str], seed: int, window: int, saved_at: int
) -> None:
    """Each frame is shown several times, and its repeats have to count in the mean."""
    model = gated(["similarity", *others], seed)
    for gate in model.gates:
        if isinstance(gate, SimilarityGate):
            gate.threshold = 1e-6  # equal frames alone
        elif isinstance(gate, PolicyGate):
            torch.nn.init.constant_(gate.decide.bias[FORWARD:], 1e3)  # lets everything through
    frames = toy_video(1, len(shown), seed)[0]
    video = frames.repeat_interleave(torch.tensor(shown), 0)[None]
    expected = model(video, dense=True).logits
    output = model.run_clip(video, window)
    assert output.used.sum() == len(shown)
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(model.decide(model.encode(video)).logits, expected)
    torch.testing.assert_close(model.train()(video, sample=False).logits, expected)
    model.eval()
    session = model.stream()
    for t, frame in enumerate(video[0]):
        if t == saved_at:
            state = session.state_dict()
            session = model.stream()
            session.load_state_dict(state)
        step = session(frame)
        torch.testing.assert_close(step.running_logits, model.encode(video[:, : t + 1]).frame_logits.mean(1))
    torch.testing.assert_close(session.result().logits, expected)
    (result,) = [e for e in model.serve_streams([video[0]]) if isinstance(e, VideoResult)]
    torch.testing.assert_close(result.logits, expected[0])
    assert (result.frames_used, result.frames_seen) == (len(shown), sum(shown))


def test_only_frames_that_repeat_the_last_used_one_count_again() -> None:
    model = gated(["similarity", "policy"], seed=2)
    model.gates[0].threshold = 1e-6
    stopped, a, b = toy_video(1, 3, seed=3)[0]
    model.gates[1] = StopsLike(model.encode(stopped[None, None]).pooled[1][0]).eval()
    output = model(torch.stack([stopped, a, b, b, stopped, b])[None])
    assert output.stopped_at[0].tolist() == [1, 2, 2, 0, 1, 0]
    torch.testing.assert_close(output.logits, model.encode(torch.stack([a, b, b, b])[None]).frame_logits.mean(1))


class StopsLike(nn.Module):
    """Stop frames whose features are these."""

    features: Tensor

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("features", features)

    def initial_state(self, batch: int) -> GateState:
        return ()

    def forward(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        other = (pooled - self.features).abs().amax(1) > 1e-6
        return torch.stack([~other, other], 1).to(pooled.dtype), state


def test_repeats_do_not_count_where_the_gate_compares_with_frames_that_were_not_used() -> None:
    model = gated(["similarity"], state_update="reached")
    model.gates[0].threshold = 1e-6
    a, b = toy_video(1, 2, seed=3)[0]
    output = model(torch.stack([a, a, a, b])[None])
    torch.testing.assert_close(output.logits, model.encode(torch.stack([a, b])[None]).frame_logits.mean(1))


def test_gates_decide_alike_exported_and_optimised(tmp_path: Path) -> None:
    names = ("random", "similarity", "unsure", "fixed")
    dynskip_onnx = pytest.importorskip("dynskip_onnx")
    backbone = stage_model(toy_network(3, 4).float(), input_size=(3, SIZE, SIZE))
    gates = [build(*pair, seed=n).float() for n, pair in enumerate(zip(names, backbone.num_features, strict=True))]
    model = StopOrForward(backbone, gates).eval()
    video = slow_video(2, 12, seed=5).float()
    expected = model(video)
    assert len(expected.stopped_at.unique()) > 2
    runner = dynskip_onnx.load(model.export(tmp_path / "model", SIZE))
    for row, clip in enumerate(video.numpy()):
        result = runner.clip(clip, window=3)
        assert result.stopped_at.tolist() == expected.stopped_at[row].tolist()
        torch.testing.assert_close(torch.from_numpy(result.logits), expected.logits[row])
    fast, agreement = model.optimize(video, compile=False)
    assert agreement.decisions == 1.0
    assert_same(fast(video), expected, skip=["logits", "frame_logits", "gate_logits"])


# At a rule's threshold the forward probability is one half


def forward_probability(gate: Any, pooled: Tensor, state: GateState | None = None) -> Tensor:
    logits, _ = gate(pooled, gate.initial_state(len(pooled)) if state is None else state)
    assert logits.shape == (len(pooled), 2)
    assert logits.isfinite().all()
    return logits.softmax(-1)[:, FORWARD]  # type: ignore[no-any-return]


def assert_rule(probability: Tensor, value: Tensor, threshold: float, falls: bool = False) -> None:
    """Check that a probability only rises (or only falls) with a value, and is one half at the threshold."""
    order = value.argsort(descending=falls)
    assert (probability[order].diff() >= 0).all()
    assert torch.equal(probability > 0.5, value < threshold if falls else value > threshold)
    assert (probability > 0.5).any()
    assert (probability < 0.5).any()


@given(seed=st.integers(0, 10_000), threshold=st.floats(0.05, 0.6))
def test_similarity_is_the_distance_from_the_last_used_frame(seed: int, threshold: float) -> None:
    gate = SimilarityGate(5, threshold).double()
    last = randn(1, 5, seed=seed).expand(64, 5)
    pooled = last + randn(64, 5, seed=seed + 1) * torch.linspace(0, 8, 64, dtype=torch.float64)[:, None].square()
    pooled[1] = 0.999 * last[0]
    pairs = zip(pooled.tolist(), last.tolist(), strict=True)
    distance = torch.tensor([math.dist(x, y) / (math.hypot(*x) + math.hypot(*y)) for x, y in pairs], dtype=D)
    probability = forward_probability(gate, pooled, (last,))
    assert_rule(probability, distance, threshold)
    torch.testing.assert_close(probability, distance / (distance + threshold))
    logits, (kept,) = gate(pooled, gate.initial_state(64))
    assert (logits.softmax(-1)[:, FORWARD] > 0.5).all()  # nothing came before
    assert torch.equal(kept, pooled)


def test_similarity_compares_with_the_last_used_frame_and_not_with_the_last_one() -> None:
    """Frames that change slowly are used once they are far from the used one, although the frame before is near."""
    backbone = toy_backbone(0, 1)
    model = StopOrForward(backbone, [SimilarityGate(backbone.num_features[0], 0.2).double()]).eval()
    first, last = toy_video(1, 2, seed=3)[0]
    shares = torch.linspace(0, 1, 20, dtype=torch.float64)[:, None, None, None]
    output = model(torch.lerp(first, last, shares)[None])
    assert output.used[0, 0]
    assert not output.used[0, 1]
    assert 2 <= output.used.sum() < 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rules_survive_half_precision(dtype: torch.dtype) -> None:
    pooled = (500 * randn(6, 5, seed=0).abs()).to(dtype)
    for name in ("similarity", "confidence", "unsure", "entropy", "random", "fixed"):
        gate = GATES[name](5).to(dtype)
        logits, state = gate(pooled, gate.initial_state(6))
        assert logits.isfinite().all(), name
        assert all(part.isfinite().all() for part in state)
    gate = SimilarityGate(5).to(dtype)
    assert (forward_probability(gate, pooled, (pooled,)) < 0.5).all()
    assert (forward_probability(gate, pooled) > 0.5).all()


def answers(seed: int, count: int = 64) -> tuple[Tensor, Tensor]:
    """Make pooled features that are class logits, from unsure to sure, and their probabilities."""
    logits = randn(count, CLASSES, seed=seed) * torch.linspace(0.1, 9, count, dtype=torch.float64)[:, None]
    return logits, logits.softmax(-1)


def with_answers_as_features(gate: Any) -> Any:
    gate.double().classifier = nn.Linear(CLASSES, CLASSES, bias=False).double()
    nn.init.eye_(gate.classifier.weight)
    return gate


@given(seed=st.integers(0, 10_000), threshold=st.floats(0.45, 0.95))
def test_confidence_is_the_largest_probability(seed: int, threshold: float) -> None:
    logits, probabilities = answers(seed)
    confidence = probabilities.amax(-1)
    sure = forward_probability(with_answers_as_features(ConfidenceGate(CLASSES, CLASSES, threshold)), logits)
    assert_rule(sure, confidence, threshold, falls=True)
    unsure = with_answers_as_features(ConfidenceGate(CLASSES, CLASSES, threshold, stop="unsure"))
    torch.testing.assert_close(forward_probability(unsure, logits), 1 - sure)


@given(seed=st.integers(0, 10_000), threshold=st.floats(0.05, 0.7))
def test_entropy_is_relative_to_that_of_equal_probabilities(seed: int, threshold: float) -> None:
    logits, probabilities = answers(seed)
    rows = probabilities.tolist()
    entropy = torch.tensor(
        [-sum(p * math.log(p) for p in row) / math.log(CLASSES) for row in rows], dtype=torch.float64
    )
    gate = with_answers_as_features(ConfidenceGate(CLASSES, CLASSES, threshold, measure="entropy"))
    sure = forward_probability(gate, logits)
    assert_rule(sure, entropy, threshold)
    torch.testing.assert_close(sure, entropy / (entropy + threshold))
    unsure = with_answers_as_features(ConfidenceGate(CLASSES, CLASSES, threshold, stop="unsure", measure="entropy"))
    torch.testing.assert_close(forward_probability(unsure, logits), 1 - sure)


def test_the_old_name_of_the_entropy_gate_warns_and_works() -> None:
    with pytest.warns(DeprecationWarning, match=r'use ConfidenceGate\(\.\.\., measure="entropy"\)'):
        old = EntropyGate(6, CLASSES, stop="unsure")
    new = ConfidenceGate(6, CLASSES, stop="unsure", measure="entropy")
    new.load_state_dict(old.state_dict())
    assert old.threshold == new.threshold == 0.1
    pooled = randn(20, 6, seed=0).float()
    assert torch.equal(forward_probability(old, pooled), forward_probability(new, pooled))


def test_certainty_beyond_rounding_still_has_an_order() -> None:
    gate = with_answers_as_features(ConfidenceGate(CLASSES, CLASSES, 0.9)).float()
    logits, _ = gate(torch.tensor([[200.0, 0, 0, 0], [400.0, 0, 0, 0]]), gate.initial_state(2))
    margins = logits[:, FORWARD] - logits[:, STOP]
    assert margins[1] < margins[0] < 0
    assert margins.isfinite().all()


def test_decisions_do_not_train_a_rules_classifier_and_its_answers_do() -> None:
    backbone = toy_backbone(0, 2)
    gates = [build("confidence", c, seed=n) for n, c in enumerate(backbone.num_features)]
    model = StopOrForward(backbone, gates, inner=[nn.Identity(), nn.Identity()]).train()
    output = model(toy_video(3, 4))
    assert output.inner_logits is not None
    assert not output.forward.requires_grad
    weights = [gate.classifier.classify.weight for gate in model.gates]
    assert all(g.any() for g in torch.autograd.grad(output.inner_logits.sum(), weights))


@given(seed=st.integers(0, 10_000), rate=st.floats(0.1, 0.9))
@settings(max_examples=20)
def test_random_gates_forward_their_rate_and_repeat_themselves(seed: int, rate: float) -> None:
    gate = RandomGate(6, rate, seed).double()
    pooled = randn(2000, 6, seed=seed + 1).abs() + 0.1
    forward = forward_probability(gate, pooled) > 0.5
    assert abs(forward.double().mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / 2000)
    assert torch.equal(forward_probability(gate, pooled[700:703]) > 0.5, forward[700:703])
    other = forward_probability(RandomGate(6, rate, seed + 1).double(), pooled) > 0.5
    assert not torch.equal(forward, other)
    state, still = gate.initial_state(1), 0
    for _ in range(200):  # the same frame again and again, every one of them moving the state
        logits, state = gate(pooled[:1], state)
        still += int(logits[0, FORWARD] > logits[0, STOP])
    assert abs(still / 200 - rate) < 0.02


@pytest.mark.parametrize("forward", [True, False])
def test_fixed_gates_ignore_frames_and_thresholds(forward: bool) -> None:
    backbone = toy_backbone(0, 2)
    for threshold in (0.01, 0.5, 0.99):
        model = StopOrForward(backbone, [FixedGate(), FixedGate(stop=not forward)], forward_threshold=threshold).eval()
        output = model(toy_video(2, 3))
        assert (output.used == forward).all()
        assert (output.stopped_at == (2 if forward else 1)).all()


def test_small_learned_gates_start_open_and_are_their_layers() -> None:
    pooled, last = randn(300, 6, seed=0), randn(300, 4, seed=1)
    pairwise = PairwiseGate(6, hidden=4).double()
    hidden = (pooled @ pairwise.project.weight.T + pairwise.project.bias).clamp(min=0)
    expected = torch.cat([hidden, last], 1) @ pairwise.decide.weight.T + pairwise.decide.bias
    logits, (kept,) = pairwise(pooled, (last,))
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(kept, hidden)
    linear = LinearGate(6).double()
    logits, (kept,) = linear(pooled, linear.initial_state(300))
    torch.testing.assert_close(logits, pooled @ linear.decide.weight.T + linear.decide.bias)
    assert torch.equal(kept, pooled)
    for gate in (pairwise, linear):
        assert gate.decide.bias.tolist() == [0.0, 3.0]


def test_hidden_representations_are_as_wide_as_they_say() -> None:
    for name in GATES:
        gate = build(name, 6)
        _, state = gate(randn(3, 6, seed=0), gate.initial_state(3))
        if name == "fixed":
            assert state == ()
        else:
            assert state[0].shape == (3, gate.hidden_features), name


def test_gates_say_their_rules() -> None:
    told = {name: repr(GATES[name](6)) for name in GATES}
    assert "6, stop at distance <= 0.45" in told["similarity"]
    assert "stop at confidence >= 0.8" in told["confidence"]
    assert "stop at confidence <= 0.4" in told["unsure"]
    assert "stop at entropy <= 0.4" in told["entropy"]
    assert "forward 80% of the frames" in told["random"]
    assert told["fixed"] == "FixedGate(forward)"
    assert "2 x 4" in told["pairwise"]


@pytest.mark.parametrize(
    ("call", "telling"),
    [
        (lambda: LinearGate(0), "widths must be positive; got in_features=0"),
        (lambda: PairwiseGate(4, hidden=0), "widths must be positive; got in_features=4, hidden=0"),
        (lambda: SimilarityGate(4, 0.0), "threshold=0.0 is out of range; give a number between 0 and 1: distances"),
        (lambda: SimilarityGate(4, math.nan), "threshold=nan is out of range"),
        (lambda: ConfidenceGate(4, 1), "num_classes=1: being sure of a class takes at least two"),
        (lambda: ConfidenceGate(4, 3, 1.0), "threshold=1.0 is out of range; .* confidence and relative entropy lie"),
        (lambda: ConfidenceGate(4, 3, -1.0, measure="entropy"), "threshold=-1.0 is out of range"),
        (lambda: ConfidenceGate(4, 3, measure="margin"), "measure='margin' is unknown; use 'confidence' or 'entropy'"),  # type: ignore[arg-type]
        (lambda: ConfidenceGate(4, 3, stop="always"), "stop='always' is unknown; use 'sure' or 'unsure'"),  # type: ignore[arg-type]
        (lambda: RandomGate(4, 1.0), "rate=1.0 is out of range; .* FixedGate forwards all or none"),
    ],
)
def test_gates_refuse_impossible_arguments(call: Callable[[], Any], telling: str) -> None:
    with pytest.raises(DynskipError, match=telling):
        call()
