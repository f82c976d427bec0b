from __future__ import annotations

import copy
import gc
import io
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    BOTH_UPDATES,
    CLASSES,
    SIZE,
    Case,
    StateUpdate,
    assert_same,
    balance,
    cases,
    large_cases,
    random_gates,
    rows_of,
    timm_network,
    toy_backbone,
    toy_model,
    toy_network,
    toy_video,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dynskip import (
    UNSEEN,
    DynskipError,
    EarlyTerminator,
    FixedGate,
    FLOPsLookup,
    FrameResult,
    PolicyGate,
    Session,
    SimilarityGate,
    SkipOutput,
    StopOrForward,
    VideoResult,
    stage_model,
)
from dynskip.activation import Activation

COUNTS = [10.0**n for n in range(0, 14, 2)]  # a sum of these says how often each part ran


def counting(case: Case) -> StopOrForward:
    """Build a case's model with a cost table whose sums say how many rows each stage, gate and head ran."""
    model = case.model()
    stages = case.stages
    model._given_lookup = FLOPsLookup(COUNTS[:stages], 1e10, [0.0] * stages)
    return model


def rows_run(model: StopOrForward) -> list[int]:
    """Count, from now on, the rows that each stage and the head run."""
    parts = list(model.backbone.model.children())
    rows = [0] * len(parts)

    for n, part in enumerate(parts):

        def count(_: nn.Module, inputs: tuple[Any, ...], __: Any, n: int = n) -> None:
            rows[n] += len(inputs[0])

        part.register_forward_hook(count)
    return rows


def run_online(model: StopOrForward, video: Tensor) -> tuple[Session, list[FrameResult]]:
    session = model.stream(len(video))
    return session, [session(video[:, t]) for t in range(video.shape[1])]


def assert_online_equals(model: StopOrForward, video: Tensor, expected: SkipOutput) -> None:
    session, steps = run_online(model, video)
    result = session.result()
    used = expected.used.cumsum(1)
    for t, step in enumerate(steps):
        assert torch.equal(step.stopped_at, expected.stopped_at[:, t])
        assert torch.equal(step.used, expected.used[:, t])
        torch.testing.assert_close(step.gate_logits, expected.gate_logits[:, t], equal_nan=True)  # type: ignore[index]
        wanted = expected.frame_logits[:, t].masked_fill(~expected.used[:, t, None], math.nan)
        torch.testing.assert_close(step.frame_logits, wanted, equal_nan=True)
        assert torch.equal(step.running_logits.isnan().any(-1), used[:, t] == 0)
        assert torch.equal(step.frame_macs == 0, ~expected.seen[:, t])
        if t + 1 < len(steps):
            assert torch.equal(step.ended, ~expected.seen[:, t + 1])
    torch.testing.assert_close(result.logits, expected.logits)
    torch.testing.assert_close(steps[-1].running_logits[used[:, -1] > 0], expected.logits[used[:, -1] > 0])
    assert torch.equal(result.macs, expected.macs)
    assert torch.equal(result.fallback_frame, expected.fallback_frame)
    assert torch.equal(result.frames_used, used[:, -1])
    assert torch.equal(result.frames_seen, expected.seen.sum(1))


# All ways of running make the same decisions


@pytest.mark.parametrize("state_update", BOTH_UPDATES)
def test_runtime_online_equals_clip_equals_masking_for_any_window(state_update: StateUpdate) -> None:
    happened = dict.fromkeys(["fallback", "ended", "speculated"], False)

    def check(case: Case, window: int) -> None:
        model, video = case.model(), case.video()
        masked = model.decide(model.encode(video))
        clip = model.run_clip(video, window)
        assert_same(clip, masked, skip=["inner_logits"])
        assert_same(model(video), masked, skip=["inner_logits"])
        assert_online_equals(model, video, masked)
        happened["fallback"] |= bool(clip.fallback.any())
        happened["ended"] |= bool((~clip.seen).any())
        happened["speculated"] |= bool(clip.speculative_macs.any())

    for case in large_cases("lstm", state_update)[::2]:
        check(case, window=5)
    assert all(happened.values()), happened
    windows = st.integers(1, 10)
    settings(max_examples=15)(given(case=cases(updates=[state_update]), window=windows)(check))()


def test_runtime_frame_by_frame_speculates_nothing() -> None:
    for case in large_cases("lstm", "used"):
        assert not case.model().run_clip(case.video(), window=1).speculative_macs.any()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_mambaout"])
@pytest.mark.parametrize("state_update", BOTH_UPDATES)
def test_runtime_on_real_networks(name: str, state_update: StateUpdate) -> None:
    options = {"img_size": 64} if name == "test_vit" else {}
    backbone = stage_model(copy.deepcopy(timm_network(name, 64, **options)).double(), input_size=(3, 64, 64))
    terminator = EarlyTerminator(0.01, 3)
    model = StopOrForward(
        backbone, random_gates(backbone.num_features, seed=1), terminator=terminator, state_update=state_update
    ).eval()
    video = toy_video(3, 6, size=64, seed=3)
    balance(model, video, share=0.8)
    masked = model.decide(model.encode(video))
    assert len(masked.stopped_at.unique()) > 2
    assert_same(model.run_clip(video, window=3), masked)
    assert_online_equals(model, video, masked)


@settings(max_examples=15)
@given(case=cases(), window=st.integers(1, 8), data=st.data())
def test_runtime_clip_does_not_depend_on_neighbours(case: Case, window: int, data: st.DataObject) -> None:
    model, video = case.model(), case.video()
    order = data.draw(st.permutations(range(case.batch)))[: data.draw(st.integers(1, case.batch))]
    assert_same(model.run_clip(video[order], window), rows_of(model(video), order))


def test_runtime_no_result_depends_on_earlier_calls() -> None:
    model, video = toy_model(seed=3, share=0.9, terminator=EarlyTerminator(0.99, 1)), toy_video(2, 16, seed=5)
    calls: list[int] = []
    next(model.backbone.model.children()).register_forward_hook(lambda _, x, __: calls.append(len(x[0])))
    first, once = model(video), list(calls)
    assert first.seen.sum(1).max() > 4
    for other in (toy_video(3, 2, seed=6), toy_video(1, 30, seed=7)):
        model(other)
    calls.clear()
    again = model(video)
    assert_same(again, first, exact=True)
    assert torch.equal(again.speculative_macs, first.speculative_macs)
    assert calls == once


def test_runtime_clip_looks_ahead_in_batches() -> None:
    for state_update in BOTH_UPDATES:
        model = toy_model(seed=1, share=0.9, state_update=state_update)
        calls: list[int] = []
        next(model.backbone.model.children()).register_forward_hook(
            lambda _, x, __, calls=calls: calls.append(len(x[0]))
        )
        model.run_clip(toy_video(3, 8), window=4)
        assert calls == [12, 12]


# What is executed


@settings(max_examples=20)
@given(case=cases(), window=st.one_of(st.none(), st.integers(1, 9)))
def test_runtime_rows_executed_are_those_accounted_for(case: Case, window: int | None) -> None:
    model, video = counting(case), case.video()
    rows = rows_run(model)
    output = model.run_clip(video, window)
    cost = [*COUNTS[: case.stages], 1e10]
    assert sum(n * c for n, c in zip(rows, cost, strict=True)) == float((output.macs + output.speculative_macs).sum())
    assert max(rows) <= case.batch * case.frames  # no stage runs twice on a frame
    seen, fallback = output.stopped_at >= 0, int(output.fallback.sum())
    assert rows[0] >= int(seen.sum())
    assert rows[-1] >= int(output.used.sum()) + fallback
    online, session_rows = counting(case), [0]
    session_rows = rows_run(online)
    session, _ = run_online(online, video)
    result = session.result()
    assert sum(n * c for n, c in zip(session_rows, cost, strict=True)) == float(result.macs.sum())
    torch.testing.assert_close(result.macs, output.macs, rtol=0, atol=0)


@pytest.mark.parametrize("state_update", BOTH_UPDATES)
@pytest.mark.parametrize("window", [1, 3, None])
def test_runtime_macs_are_what_torch_counts(state_update: StateUpdate, window: int | None) -> None:
    for case in large_cases("lstm", state_update)[:2]:
        model, video = case.model(), case.video()
        model.lookup_for((SIZE, SIZE))
        with FlopCounterMode(display=False) as counter:
            output = model.run_clip(video, window)
        assert counter.get_total_flops() / 2 == float((output.macs + output.speculative_macs).sum())
        with FlopCounterMode(display=False) as counter:
            session, steps = run_online(model, video)
        assert counter.get_total_flops() / 2 == sum(float(step.frame_macs.sum()) for step in steps)
        with FlopCounterMode(display=False) as counter:
            result = session.result()
        extra = counter.get_total_flops() / 2
        assert extra + sum(float(step.frame_macs.sum()) for step in steps) == float(result.macs.sum())


def test_runtime_rows_of_ended_videos_are_not_executed() -> None:
    model = toy_model(forward_threshold=0.0, terminator=EarlyTerminator(0.5, 0))
    video = toy_video(4, 6)
    rows, expected = rows_run(model), model.run_clip(video, window=1)
    assert 0 < expected.seen.sum() < 24
    before = rows[0]
    assert before == int(expected.seen.sum())
    session, steps = run_online(model, video)
    assert rows[0] - before == int(expected.seen.sum())
    assert steps[-1].ended.any()
    ended = session(video[:, 0])
    assert torch.equal(ended.stopped_at == UNSEEN, steps[-1].ended)


# Other gates and dtypes


class Stateless(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.decide = nn.Linear(width, 2)

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return ()

    def forward(self, pooled: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.decide(pooled), state


class Shared(nn.Module):
    """Keep a sum in a tensor that is in the state twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.decide = nn.Linear(width, 2)

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        zeros = self.decide.weight.new_zeros(batch, self.decide.in_features)
        return zeros, zeros

    def forward(self, pooled: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        total = pooled + 0.5 * state[0] - 0.3 * state[1]
        return self.decide(total), (total, total)


@pytest.mark.parametrize("state_update", BOTH_UPDATES)
@pytest.mark.parametrize("kinds", [(Stateless, Stateless), (Shared, Shared), (Stateless, Shared)])
def test_runtime_gates_with_little_or_odd_memory(kinds: tuple[Any, Any], state_update: StateUpdate) -> None:
    backbone = toy_backbone(stages=2)
    gates = [kind(width).double() for kind, width in zip(kinds, backbone.num_features, strict=True)]
    model = balance(StopOrForward(backbone, gates, state_update=state_update).eval(), toy_video(4, 5, seed=9), 0.7)
    video = toy_video(4, 7)
    masked = model.decide(model.encode(video))
    assert len(masked.stopped_at.unique()) > 1
    for window in (1, 4, None):
        assert_same(model.run_clip(video, window), masked)
    assert_online_equals(model, video, masked)
    if kinds == (Stateless, Stateless):
        assert not model.run_clip(video, 7).speculative_macs.any()


@pytest.mark.parametrize("way", ["float32", "bfloat16", "autocast"])
def test_runtime_in_other_precisions(way: str) -> None:
    dtype = torch.bfloat16 if way == "bfloat16" else torch.float32
    model = toy_model(seed=2, terminator=EarlyTerminator(0.9, 2)).to(dtype)
    video = toy_video(3, 6, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        stepwise, clip = model.run_clip(video, window=1), model(video)
        session, steps = run_online(model, video)
    assert torch.equal(torch.stack([step.stopped_at for step in steps], 1), stepwise.stopped_at)
    assert clip.logits.dtype == session.result().logits.dtype == dtype
    assert clip.logits.isfinite().all()
    if way == "float32":
        assert torch.equal(clip.stopped_at, stepwise.stopped_at)
        torch.testing.assert_close(clip.logits, stepwise.logits, rtol=1e-4, atol=1e-4)


def test_runtime_fallbacks_of_many_videos_start_at_different_depths() -> None:
    model, video = toy_model(seed=1, stages=4, forward_threshold=(0.5, 0.5, 0.5, 1.0)), toy_video(12, 2)
    masked = model.decide(model.encode(video))
    assert masked.fallback.all()
    assert len(masked.stopped_at.amax(1).unique()) > 2
    assert_same(model(video), masked, skip=["inner_logits"])
    assert_online_equals(model, video, masked)


def test_runtime_single_frames() -> None:
    for threshold in (0.0, 0.5, 1.0):
        model, video = toy_model(forward_threshold=threshold), toy_video(3, 1)
        masked = model.decide(model.encode(video))
        assert_same(model(video), masked, skip=["inner_logits"])
        assert_online_equals(model, video, masked)


def test_runtime_a_session_opened_in_inference_mode_serves_outside() -> None:
    model, video = toy_model(seed=2), toy_video(1, 6)
    with torch.inference_mode():
        session = model.stream()
        session(video[:, 0])
    for t in range(1, 6):
        session(video[:, t])
    assert torch.equal(session.result().macs, model(video).macs)


def test_runtime_sampled_passes_go_frame_by_frame() -> None:
    model, video = toy_model(seed=2), toy_video()
    calls: list[int] = []
    next(model.backbone.model.children()).register_forward_hook(lambda _, x, __: calls.append(len(x[0])))
    output = model(video, sample=True)
    assert calls == [3] * 6
    assert not output.speculative_macs.any()


# Sessions


def saved(session: Session) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(session.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def assert_steps_equal(one: Any, other: Any) -> None:
    assert one.activation == other.activation
    for name, value in vars(one).items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(getattr(other, name), value, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=25)
@given(case=cases(), data=st.data())
def test_runtime_a_session_saved_and_restored_goes_on_identically(case: Case, data: st.DataObject) -> None:
    model, video = case.model(), case.video()
    session = model.stream(case.batch)
    until = data.draw(st.integers(0, case.frames))
    for t in range(until):
        session(video[:, t])
    state = saved(session)
    elsewhere = copy.deepcopy(model).stream(case.batch)
    elsewhere(video[:, -1] + 1)  # loading a state replaces this
    elsewhere.load_state_dict(state)
    for t in range(until, case.frames):
        assert_steps_equal(session(video[:, t]), elsewhere(video[:, t]))
    assert_steps_equal(session.result(), elsewhere.result())


def test_runtime_a_saved_state_stands_still() -> None:
    model, video = toy_model(seed=2, state_update="reached"), toy_video(2, 4)
    session = model.stream(2)
    session(video[:, 0])
    state = session.state_dict()
    later = [session(video[:, t]) for t in (1, 2)]
    session.load_state_dict(state)
    for t, step in zip((1, 2), later, strict=True):
        assert_steps_equal(step, session(video[:, t]))


def short_of_a_used_frame(**kwargs: Any) -> StopOrForward:
    return toy_model(seed=2, forward_threshold=(0.0, 0.0, 1.0), **kwargs)


def refused(state: Any, telling: str, session: Session, undisturbed: Session) -> None:
    """Expect that a session refuses a state and goes on as if nothing had been."""
    video = toy_video(2, 4)
    for each in (session, undisturbed):
        each(video[:, 0])
    with pytest.raises(DynskipError, match=telling):
        session.load_state_dict(state)
    assert_steps_equal(session(video[:, 1]), undisturbed(video[:, 1]))
    assert torch.equal(session.result().logits, undisturbed.result().logits)


def stored(**new: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["furthest"][0].update(new)


def tensor(name: str, change: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["tensors"].update({name: change(state["tensors"][name])})


DAMAGE: list[Callable[[dict[str, Any]], Any]] = [
    stored(values=(torch.randn(1, 12, 16, 16).double(),)),
    stored(values=(torch.randn(2, 10, 8, 8).double(),)),
    stored(values=(torch.full((1, 10, 8, 8), math.nan).double(),)),
    stored(kinds=("static",)),
    stored(stopped_at=7),
    stored(stopped_at=0),
    stored(score=math.nan),
    stored(frame=99),
    lambda s: s["furthest"][0].pop("values"),
    lambda s: s.update(furthest=[None, None]),
    lambda s: s.pop("furthest"),
    lambda s: s.update(image_size=(-1, 8)),
    lambda s: s.update(image_size=(8, 16)),
    lambda s: s.update(image_size=None),
    lambda s: s.pop("image_size"),
    lambda s: s.update(model=None),
    lambda s: s["model"].update(state_update=torch.ones(2)),
    lambda s: s.update(tensors=[]),
    lambda s: s["tensors"].pop("used"),
    lambda s: s.pop("sha256"),
    lambda s: s.update(extra=4),
    tensor("tally 1", lambda t: t.fill_(-3)),
    tensor("used", lambda t: t.fill_(5)),
    tensor("seen", lambda t: t + 1),
    tensor("ended", lambda t: ~t),
    tensor("macs", lambda t: t.fill_(-1e30)),
    tensor("macs", lambda t: t[:1]),
    tensor("tally 0", lambda t: t.fill_(math.nan)),
    tensor("tally 0", lambda t: t.to("meta")),
    tensor("tally 0", lambda t: t.to_sparse()),
    tensor("tally 0", lambda t: t + 1e-9),
    tensor("tally 0", lambda t: t.float()),
    tensor("gate 1 state 0", lambda t: t + 1),
    tensor("used", lambda t: None),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_runtime_damaged_states_are_refused(damage: Callable[[dict[str, Any]], Any]) -> None:
    model = short_of_a_used_frame()
    session, undisturbed = model.stream(2), model.stream(2)
    undisturbed(toy_video(2, 4, seed=3)[:, 0])
    state = saved(undisturbed)
    undisturbed.reset()
    session.load_state_dict(state)  # before it was damaged
    session.reset()
    damage(state)
    refused(state, "damaged or was changed", session, undisturbed)


@pytest.mark.parametrize("state", [None, {}, {"format": "dynskip session 3"}, [1]])
def test_runtime_what_is_no_state_is_refused(state: Any) -> None:
    model = short_of_a_used_frame()
    refused(state, r"no state of a session in the format 'dynskip session 4'", model.stream(2), model.stream(2))


@torch.no_grad()
def changed(name: str) -> StopOrForward:
    """Build the model of states with one difference."""
    model = short_of_a_used_frame(terminator=EarlyTerminator(0.9, 2))
    match name:
        case "forward_threshold":
            model.forward_threshold = (0.0, 0.1, 1.0)
        case "terminator":
            model.terminator = EarlyTerminator(0.9, 3)
        case "none":
            model.terminator = None
        case "state_update":
            model.state_update = "reached"
        case "gates":
            model.gates[1] = FixedGate()
        case "retrained":
            next(model.backbone.parameters()).mul_(1.001)
        case "gate's weights":
            model.gates[2].decide.bias.add_(1e-3)
        case "precision":
            model.float().double()
        case "stages":
            model = toy_model(seed=2, stages=2)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "telling"),
    [
        ("forward_threshold", r"its forward_threshold is \[0.0, 0.0, 1.0\] and this model's \[0.0, 0.1, 1.0\]"),
        ("terminator", r"its terminator is 'EarlyTerminator\(threshold=0.9, min_frames=2\)' and"),
        ("none", "its terminator is 'Early.* and this model's None"),
        ("state_update", "its state_update is 'used' and this model's 'reached'"),
        ("gates", r"its gates is \[.* and this model's \[.*FixedGate\(stop=False\)"),
        ("retrained", "its weights is"),
        ("gate's weights", "its weights is"),
        ("precision", "its weights is"),
        ("stages", "its stage_names is"),
    ],
)
def test_runtime_states_of_other_models_are_refused(name: str, telling: str) -> None:
    session = short_of_a_used_frame(terminator=EarlyTerminator(0.9, 2)).stream(2)
    session(toy_video(2, 1)[:, 0])
    model = changed(name)
    refused(saved(session), f"of another model: {telling}", model.stream(2), model.stream(2))


def test_runtime_a_state_names_what_its_gates_are_set_to() -> None:
    backbone = toy_backbone(0, 2)
    models = [
        StopOrForward(backbone, [SimilarityGate(c, level).double() for c in backbone.num_features]).eval()
        for level in (0.1, 0.2)
    ]
    with pytest.raises(DynskipError, match=r"its gates is .*threshold=0.1.* and this model's .*threshold=0.2"):
        models[1].stream().load_state_dict(saved(models[0].stream()))


def test_runtime_a_state_of_another_batch_is_refused() -> None:
    model = short_of_a_used_frame()
    refused(saved(model.stream(3)), r"its macs is .* \(3,\), expected .* \(2,\)", model.stream(2), model.stream(2))


def test_runtime_a_session_whose_logits_overflowed_is_restored() -> None:
    model, video = toy_model(seed=2, forward_threshold=0.0), toy_video(1, 3)
    with torch.no_grad():
        next(m for m in model.backbone.modules() if isinstance(m, nn.Linear)).bias.fill_(math.inf)
    session, other = model.stream(), model.stream()
    session(video[:, 0])
    other.load_state_dict(saved(session))
    assert_steps_equal(session(video[:, 1]), other(video[:, 1]))


def test_runtime_a_state_of_another_frame_size_leaves_a_session_with_a_given_table_as_it_was() -> None:
    table = FLOPsLookup([1.0, 2.0, 3.0], image_size=(SIZE, SIZE))
    session, large = toy_model(seed=2, lookup=table).stream(), toy_model(seed=2).stream()
    large(toy_video(1, 1, size=12)[:, 0])
    with pytest.raises(DynskipError, match="made for frames of 8x8"):
        session.load_state_dict(saved(large))
    assert session.result().frames_seen.tolist() == [0]


def test_runtime_results_do_not_disturb_a_session() -> None:
    for threshold in (0.5, 1.0):
        model, video = toy_model(seed=1, forward_threshold=threshold), toy_video(3, 5)
        session = model.stream(3)
        assert session.result().logits.isnan().all()
        assert session.result().frames_seen.tolist() == [0, 0, 0]
        for t in range(5):
            session(video[:, t])
            result, expected = session.result(), model(video[:, : t + 1])
            torch.testing.assert_close(result.logits, expected.logits)
            torch.testing.assert_close(result.probabilities, expected.probabilities)
            assert torch.equal(result.macs, expected.macs)


@pytest.mark.parametrize("rows", [1, [1], torch.tensor([1]), torch.tensor([False, True, False])])
def test_runtime_rows_of_a_session_start_anew(rows: Any) -> None:
    for state_update in BOTH_UPDATES:
        model = toy_model(seed=2, state_update=state_update, terminator=EarlyTerminator(0.9, 1))
        video, other = toy_video(3, 5, seed=1), toy_video(1, 5, seed=8)
        session = model.stream(3)
        for t in range(5):
            session(video[:, t])
        session.reset(rows)
        for t in range(5):
            session(torch.cat([video[:1, t], other[:, t], video[2:, t]]))
        result, expected = session.result(), model(other)
        torch.testing.assert_close(result.logits[1:2], expected.logits)
        assert torch.equal(result.macs[1:2], expected.macs)
        assert torch.equal(result.fallback_frame[1:2], expected.fallback_frame)
        session.reset()
        for t in range(5):
            session(video[:, t])
        torch.testing.assert_close(session.result().logits, model(video).logits)


def test_runtime_a_session_of_one_takes_frames_without_a_batch() -> None:
    model, video = toy_model(seed=2), toy_video(1, 4)
    session = model.stream()
    for frame in video[0]:
        step = session(frame)
    assert step.running_probabilities.shape == (1, CLASSES)
    torch.testing.assert_close(session.result().logits, model(video).logits)


@pytest.mark.parametrize(
    ("frame", "telling"),
    [
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"Frames must be a floating-point tensor.*frame.float\(\) / 255"),
        (None, "got NoneType"),
        (torch.zeros(4, 8, 8).double(), r"must have shape \(3, H, W\); got \(4, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8).double(), r"must have shape \(1, 3, H, W\); got \(2, 3, 8, 8\)"),
        (torch.zeros(8, 8).double(), r"must have shape \(3, H, W\); got \(8, 8\)"),
        (torch.zeros(3, 0, 8).double(), r"The frame is empty: shape \(3, 0, 8\)"),
        (torch.zeros(3, 8, 8), "frame is torch.float32 and the model torch.float64"),
        (torch.full((3, 8, 8), math.nan).double(), "NaN or infinite values"),
        (torch.zeros(3, 9, 8).double(), r"is 9x8 and earlier ones of this session were 8x8. .*session.reset\(\)"),
    ],
)
def test_runtime_frames_that_do_not_fit_leave_a_session_as_it_was(frame: Any, telling: str) -> None:
    model, video = toy_model(seed=2), toy_video(1, 4)
    session = model.stream()
    for t in range(4):
        session(video[:, t])
        with pytest.raises(DynskipError, match=telling):
            session(frame)
    assert torch.equal(session.result().macs, model(video).macs)


def test_runtime_frames_of_a_lock_step_batch_that_do_not_fit() -> None:
    session = toy_model().stream(3)
    with pytest.raises(DynskipError, match=r"\(3, 3, H, W\); got \(3, 8, 8\)\. Give one frame a video"):
        session(torch.zeros(3, 8, 8).double())
    frames = torch.zeros(3, 3, 8, 8).double()
    frames[1, 0, 0, 0] = math.inf
    with pytest.raises(DynskipError, match="NaN or infinite values in 1 videos, the first being video 1"):
        session(frames)


def test_runtime_refuses_what_makes_no_sense() -> None:
    model, video = toy_model(), toy_video()
    with pytest.raises(DynskipError, match="window=0"):
        model.run_clip(video, window=0)
    with pytest.raises(DynskipError, match="batch=0"):
        model.stream(0)
    session = model.stream(2)
    for rows in (2, [0, 5], "all", 1.5):
        with pytest.raises(DynskipError, match="rows 0 to 1; cannot reset"):
            session.reset(rows)  # type: ignore[arg-type]
    model.train()
    for call in (lambda: model.run_clip(video), model.stream, lambda: session(video[:2, 0])):
        with pytest.raises(DynskipError, match=r"model.eval\(\)"):
            call()


def test_runtime_policy_gates_are_asked_once_more_at_most_about_each_frame() -> None:
    model, video = toy_model(seed=1, forward_threshold=0.0), toy_video(1, 8)
    calls: list[int] = []
    for gate in model.gates:
        assert isinstance(gate, PolicyGate)
        gate.register_forward_hook(lambda _, x, __: calls.append(len(x[0])))
    output = model.run_clip(video, window=8)
    assert output.used.all()
    assert calls == [8] * 3 + [1] * 3 * 8


def test_runtime_networks_are_left_as_they_were() -> None:
    network = toy_network(stages=2)
    before = copy.deepcopy(network.state_dict())
    model = StopOrForward(stage_model(network, input_size=(3, SIZE, SIZE)), random_gates((6, 8), 0)).eval()
    model(toy_video())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("batch", [1, 3])
def test_runtime_a_long_session_holds_no_more_features_than_a_short_one(batch: int) -> None:
    model, made = toy_model(seed=2), []
    for stage in list(model.backbone.model.children())[:-1]:
        stage.register_forward_hook(lambda _, __, out: made.append(weakref.ref(out)))
    session = model.stream(batch)
    for frame in toy_video(batch, 40).unbind(1):
        session(frame)
    gc.collect()
    assert sum(ref() is not None for ref in made) <= 2 * 3 * batch


def test_a_clip_looks_less_far_ahead_where_that_was_in_vain() -> None:
    """Gates that use one frame and stop all later ones; before it is used, they would let every frame go."""
    model, video = toy_model(), toy_video(batch=1, frames=32)

    class Once(torch.nn.Module):
        def initial_state(self, batch: int) -> tuple[torch.Tensor, ...]:
            return (torch.zeros(batch, 1, dtype=video.dtype),)

        def forward(self, pooled: torch.Tensor, state: tuple[torch.Tensor, ...]) -> Any:
            margin = 1 - 2 * state[0]
            return torch.cat([-margin, margin], 1), (torch.ones_like(state[0]),)

    once = StopOrForward(model.backbone, [Once() for _ in range(model.backbone.num_stages)]).eval()
    output, alone = once(video), once.run_clip(video, window=1)
    assert torch.equal(output.stopped_at, alone.stopped_at)
    assert int(output.used.sum()) == 1
    frame = once.lookup_for((video.shape[3], video.shape[4])).total
    assert float(output.speculative_macs) <= 3 * frame  # of the first window, and none after it


@pytest.mark.parametrize("frames", [6, 1])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_row_says_what_a_result_says(activation: Activation, frames: int) -> None:
    """Of a session and of a stream, with a used frame and (of the first frame alone) with a fallback."""
    model = toy_model(seed=3, activation=activation, forward_threshold=0.5 if frames > 1 else 1.0)
    video = toy_video(1, frames, seed=5)
    session = model.stream()
    for frame in video[0]:
        session(frame)
    (streamed,) = (event for event in model.serve_streams([iter(video[0])]) if isinstance(event, VideoResult))
    result, names = session.result(), list("abcd")
    given = result.probabilities[0]
    holding = (given > 0.5).nonzero().flatten().tolist() if activation == "sigmoid" else [int(given.argmax())]
    for named in (names, None):
        row = streamed.row(named)
        assert row == pytest.approx(result.row(named))
        assert set(filter(None, row.pop("label").split(", "))) == {named[n] if named else str(n) for n in holding}
        assert row == pytest.approx(
            {
                "probability": float(torch.maximum(given, 1 - given).min() if activation == "sigmoid" else given.max()),
                "used": int(result.frames_used),
                "seen": frames,
                "fallback": frames == 1,
                "gmacs": float(result.macs) / 1e9,
            }
        )
