from __future__ import annotations

import copy
import io
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    BOTH_TEMPORAL,
    BOTH_UPDATES,
    CLASSES,
    SIZE,
    Case,
    StateUpdate,
    Temporal,
    assert_same,
    balance,
    cases,
    enliven,
    large_cases,
    randn,
    random_gates,
    random_inner,
    randomise,
    rows_of,
    timm_network,
    toy_backbone,
    toy_model,
    toy_network,
    toy_video,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dynskip import (
    UNSEEN,
    Carry,
    DynskipError,
    EarlyTerminator,
    EncodedVideo,
    FLOPsLookup,
    InnerClassifier,
    PolicyGate,
    SkipOutput,
    StopOrForward,
    sofnet,
    stage_model,
)
from dynskip.gates import FORWARD

NAN = math.nan


# Skipping equals masking


@torch.no_grad()
def literal_run(model: StopOrForward, video: Tensor) -> SkipOutput:
    """Run one video frame by frame and stage by stage, with the modules alone."""
    *stages, head = model.backbone.model.children()
    frames, count = len(video), len(stages)
    lookup = model.lookup_for((video.shape[2], video.shape[3]))
    states = [gate.initial_state(1) for gate in model.gates]
    forward = torch.zeros(1, frames, count, dtype=torch.float64)
    evaluated = torch.zeros(1, frames, count, dtype=torch.bool)
    gate_logits = torch.full((1, frames, count, 2), NAN, dtype=torch.float64)
    frame_logits = torch.full((1, frames, CLASSES), NAN, dtype=torch.float64)
    stopped_at = torch.full((1, frames), UNSEEN)
    macs, fallback_frame = 0.0, -1
    used: list[Tensor] = []  # z_t of used frames
    stopped: list[tuple[int, float, int, Tensor]] = []  # depth, forward minus stop logit, frame, features
    for t in range(frames):
        x, proposed = video[t : t + 1], {}
        for n in range(count):
            x = stages[n](x)
            macs += float(lookup.per_stage[n] + lookup.gates[n])
            q, proposed[n] = model.gates[n](x.mean((2, 3)), states[n])
            gate_logits[0, t, n], evaluated[0, t, n] = q[0], True
            probability = float(q.softmax(-1)[0, FORWARD])
            if not probability > model.forward_threshold[n]:
                stopped_at[0, t] = n
                stopped.append((n, float(q[0, FORWARD] - q[0, 1 - FORWARD]), t, x))
                break
            forward[0, t, n] = 1.0
        else:
            stopped_at[0, t] = count
            frame_logits[0, t] = head(x)[0]
            macs += lookup.head
            used.append(frame_logits[0, t])
        for n, state in proposed.items():
            if model.state_update == "reached" or stopped_at[0, t] == count:
                states[n] = state
        if used and model.terminator is not None:
            best = float(torch.stack(used).mean(0).softmax(-1).max())
            if best > model.terminator.threshold and t + 1 > model.terminator.min_frames:
                break
    if not used:
        depth, _, fallback_frame, x = max(stopped, key=lambda stop: stop[:2])
        for n in range(depth + 1, count):
            x = stages[n](x)
            macs += float(lookup.per_stage[n])
        frame_logits[0, fallback_frame] = head(x)[0]
        macs += lookup.head
        used = [frame_logits[0, fallback_frame]]
    return SkipOutput(
        logits=torch.stack(used).mean(0)[None],
        forward=forward,
        used=stopped_at == count,
        stopped_at=stopped_at,
        frame_logits=frame_logits,
        gate_logits=gate_logits,
        inner_logits=None,
        macs=torch.tensor([macs], dtype=torch.float64),
        fallback_frame=torch.tensor([fallback_frame]),
        evaluated=evaluated,
    )


def events(output: SkipOutput) -> set[str]:
    """Name what the gates did, to check that everything was tried."""
    stopped = (output.stopped_at >= 0) & (output.stopped_at < output.num_stages)
    ended = (~output.seen).any(1)
    happened = {
        "used": output.used.any(),
        "stopped": stopped.any(),
        "unseen": ended.any(),
        "fallback": output.fallback.any(),
        "several depths": len(output.stopped_at.unique()) > 2,
        "used after stopped": (output.used[:, 1:] & stopped[:, :-1]).any(),
        "fallback beside used": output.fallback.any() and not output.fallback.all(),
        "ended beside others": ended.any() and not ended.all(),
    }
    return {name for name, yes in happened.items() if yes}


@pytest.mark.parametrize("temporal", BOTH_TEMPORAL)
@pytest.mark.parametrize("state_update", BOTH_UPDATES)
def test_skipping_equals_masking_and_the_literal_loop(temporal: Temporal, state_update: StateUpdate) -> None:
    happened: set[str] = set()

    def check(case: Case) -> None:
        model, video = case.model(), case.video()
        output = model(video)
        assert_same(output, model.decide(model.encode(video)), skip=["inner_logits"])
        for b in range(case.batch):
            assert_same(rows_of(output, slice(b, b + 1)), literal_run(model, video[b]))
        happened.update(events(output))

    for case in large_cases(temporal, state_update):
        check(case)
    assert happened >= {"used", "stopped", "unseen", "fallback", "several depths", "used after stopped"}
    assert happened >= {"fallback beside used", "ended beside others"}
    settings(max_examples=40)(given(case=cases([temporal], [state_update]))(check))()


@settings(max_examples=25)
@given(case=cases(), data=st.data())
def test_a_video_does_not_depend_on_its_neighbours(case: Case, data: st.DataObject) -> None:
    model, video = case.model(), case.video()
    output = model(video)
    order = data.draw(st.permutations(range(case.batch)))[: data.draw(st.integers(1, case.batch))]
    assert_same(model(video[order]), rows_of(output, order))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_mambaout", "test_efficientnet"])
@pytest.mark.parametrize("state_update", BOTH_UPDATES)
def test_skipping_equals_masking_on_real_networks(name: str, state_update: StateUpdate) -> None:
    options = {"img_size": 64} if name == "test_vit" else {}
    network = copy.deepcopy(timm_network(name, 64, **options)).double()
    backbone = stage_model(network, input_size=(3, 64, 64))
    gates, terminator = random_gates(backbone.num_features, seed=1), EarlyTerminator(0.01, 2)
    video = toy_video(4, 4, size=64, seed=3)
    model = StopOrForward(backbone, gates, terminator=terminator, state_update=state_update).eval()
    balance(model, video, share=0.8)
    output = model(video)
    assert_same(output, model.decide(model.encode(video)))
    assert len(output.stopped_at.unique()) > 2


def test_nothing_is_sampled_in_eval_unless_asked_for() -> None:
    model, video = toy_model(seed=2), toy_video()
    before = torch.get_rng_state()
    first, second = model(video), model(video)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(first, second, exact=True)
    torch.manual_seed(0)
    drawn = [model(video, sample=True) for _ in range(4)]
    assert len({tuple(output.stopped_at.flatten().tolist()) for output in drawn}) > 1
    torch.manual_seed(0)
    assert_same(drawn[0], model(video, sample=True), exact=True)


def test_eval_records_no_gradients() -> None:
    output = toy_model()(toy_video().requires_grad_())
    assert not output.logits.requires_grad
    assert output.inner_logits is None


# What an output says about itself


@given(case=cases())
def test_fields_of_an_output_agree(case: Case) -> None:
    output = case.model()(case.video())
    batch, frames, stages = case.batch, case.frames, case.stages
    assert output.gate_logits is not None
    assert output.logits.shape == output.probabilities.shape == (batch, CLASSES)
    assert output.forward.shape == output.evaluated.shape == (batch, frames, stages)
    assert output.gate_logits.shape == (batch, frames, stages, 2)
    assert output.frame_logits.shape == (batch, frames, CLASSES)
    assert output.used.shape == output.stopped_at.shape == output.seen.shape == (batch, frames)
    assert output.macs.shape == output.fallback.shape == output.fallback_frame.shape == (batch,)
    assert output.stopped_at.dtype == output.fallback_frame.dtype == torch.int64
    assert output.macs.dtype == torch.float64
    assert output.num_stages == stages

    assert torch.equal(output.used, output.forward.prod(-1) == 1)
    assert torch.equal(output.used, output.stopped_at == stages)
    assert torch.equal(output.seen, output.stopped_at != UNSEEN)
    assert torch.equal(output.evaluated, ~output.gate_logits.isnan().any(-1))
    assert torch.equal(output.evaluated.any(-1), output.seen)
    assert torch.equal(output.fallback, ~output.used.any(1))
    assert torch.equal(output.fallback, output.fallback_frame >= 0)
    answered = output.used.clone()
    for video in output.fallback.nonzero().flatten().tolist():
        answered[video, output.fallback_frame[video]] = True
    assert torch.equal(answered, ~output.frame_logits.isnan().any(-1))
    mean = output.frame_logits.nanmean(1)
    torch.testing.assert_close(output.logits, mean)
    torch.testing.assert_close(output.probabilities.sum(-1), torch.ones(batch, dtype=torch.float64))
    # Once a video has ended, it stays ended.
    assert (output.seen[:, :-1] | ~output.seen[:, 1:]).all()
    if case.terminator is None:
        assert output.seen.all()
    else:
        assert output.seen[:, : case.terminator[1] + 1].all()


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_extreme_thresholds_use_all_frames_or_only_the_fallback(threshold: float) -> None:
    model, video = toy_model(forward_threshold=threshold), toy_video()
    output = model(video)
    if threshold == 0.0:
        assert output.used.all()
        torch.testing.assert_close(output.logits, model(video, dense=True).logits)
    else:
        assert output.fallback.all()
        assert (output.stopped_at == 0).all()
        assert output.gate_logits is not None
        nearest = output.gate_logits[:, :, 0].softmax(-1)[..., FORWARD].argmax(1)
        assert torch.equal(output.fallback_frame, nearest)


def test_a_fallback_among_equals_is_the_first() -> None:
    model = toy_model(forward_threshold=1.0)
    video = toy_video(2, 1).expand(2, 5, 3, SIZE, SIZE)
    assert model(video).fallback_frame.tolist() == [0, 0]


@pytest.mark.parametrize("way", ["skip", "mask", "train"])
def test_a_gate_has_to_exceed_its_threshold(way: str) -> None:
    model, video = toy_model(stages=1), toy_video()
    with torch.no_grad():
        for parameter in model.gates.parameters():
            parameter.zero_()  # both logits 0: the forward probability is 0.5 exactly
    encoded = model.encode(video)
    model.train(way == "train")
    for threshold, forwards in ((0.5, False), (math.nextafter(0.5, 0.0), True), (math.nextafter(0.5, 1.0), False)):
        model.forward_threshold = (threshold,)
        output = model(video) if way == "skip" else model.decide(encoded, sample=False)
        assert output.used.all() == forwards, threshold
        assert output.used.any() == forwards, threshold


class Handmade(nn.Module):
    """A backbone without `stage_model`: any class with `start`, `run`, `pool` and `head`."""

    def __init__(self) -> None:
        super().__init__()
        self.network = toy_network(stages=2)
        self.stage_names, self.num_features, self.layouts = ("low", "high"), (6, 8), ("NCHW", "NCHW")
        self.num_stages, self.num_classes, self.input_size = 2, CLASSES, (3, SIZE, SIZE)

    def start(self, images: Tensor) -> Carry:
        return Carry((images,), (("rows", 1),), len(images))

    def run(self, stage: int, carry: Carry) -> Carry:
        return Carry((self.network[stage](carry.values[0]),), carry.kinds, carry.batch)

    def pool(self, stage: int, carry: Carry) -> Tensor:
        mean: Tensor = carry.values[0].mean((2, 3))
        return mean

    def head(self, carry: Carry) -> Tensor:
        logits: Tensor = self.network[2](carry.values[0])
        return logits


def test_any_object_with_the_contract_is_a_backbone() -> None:
    gates, video = random_gates((6, 8), 0), toy_video()
    handmade = StopOrForward(Handmade(), gates)  # type: ignore[arg-type]
    made = StopOrForward(toy_backbone(stages=2), gates).eval()
    balance(made, video, 0.7)
    assert_same(handmade.eval()(video), made(video))
    assert_same(handmade(video), handmade.decide(handmade.encode(video)))


def test_each_gate_has_its_own_threshold() -> None:
    for n in range(3):
        thresholds = [0.0, 0.0, 0.0]
        thresholds[n] = 1.0
        assert (toy_model(forward_threshold=thresholds)(toy_video()).stopped_at == n).all()


# Stopped work is not executed


def test_stopped_rows_never_reach_later_stages() -> None:
    saved: Counter[int] = Counter()

    def check(case: Case) -> None:
        model, video = case.model(), case.video()
        model.lookup_for((SIZE, SIZE))
        *stages, head = model.backbone.model.children()
        rows: dict[str, list[int]] = {}
        for kind, modules in {"stage": stages, "gate": model.gates, "head": [head]}.items():
            for n, module in enumerate(modules):
                calls = rows.setdefault(f"{kind} {n}", [])

                def count(_: nn.Module, inputs: tuple[Any, ...], __: Any, calls: list[int] = calls) -> None:
                    calls.append(len(inputs[0]))

                module.register_forward_hook(count)
        output = model.run_clip(video, window=1)
        expected: dict[str, list[int]] = {name: [] for name in rows}
        for t in range(case.frames):
            for n in range(case.stages):
                reached = int((output.stopped_at[:, t] >= n).sum())
                if reached:
                    expected[f"stage {n}"].append(reached)
                    expected[f"gate {n}"].append(reached)
            if output.used[:, t].any():
                expected["head 0"].append(int(output.used[:, t].sum()))
        furthest = output.stopped_at.amax(1)[output.fallback]
        for n in range(case.stages):
            if (furthest < n).any():
                expected[f"stage {n}"].append(int((furthest < n).sum()))
        if output.fallback.any():
            expected["head 0"].append(int(output.fallback.sum()))
        assert rows == expected
        for n in range(case.stages):
            saved[n] += case.batch * case.frames - sum(rows[f"stage {n}"])

    for case in large_cases("lstm", "used"):
        check(case)
    assert all(saved[n] > 0 for n in range(4))
    settings(max_examples=40)(given(case=cases())(check))()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_stopped_rows_never_reach_later_modules_of_real_networks(name: str) -> None:
    options = {"img_size": 64} if name == "test_vit" else {}
    network = copy.deepcopy(timm_network(name, 64, **options))
    backbone = stage_model(network, input_size=(3, 64, 64))
    gates = [gate.float() for gate in random_gates(backbone.num_features, seed=2)]
    video = toy_video(5, 4, size=64, dtype=torch.float32)
    model = balance(StopOrForward(backbone, gates).eval(), video, share=0.8)
    model.lookup_for((64, 64))
    rows = Counter[int]()
    for n, stage in enumerate(backbone.stage_names):
        network.get_submodule(stage).register_forward_hook(lambda _, x, __, n=n: rows.update({n: len(x[0])}))
    output = model.run_clip(video, window=1)
    furthest = output.stopped_at.amax(1)[output.fallback]
    for n in range(backbone.num_stages):
        assert rows[n] == int((output.stopped_at >= n).sum() + (furthest < n).sum())
    assert rows[backbone.num_stages - 1] < rows[0]


def test_a_batch_in_which_all_videos_have_ended_runs_nothing_more() -> None:
    model = toy_model(forward_threshold=0.0, terminator=EarlyTerminator(0.01, 1))
    model.lookup_for((SIZE, SIZE))
    calls: list[int] = []
    next(model.backbone.model.children()).register_forward_hook(lambda _, x, __: calls.append(len(x[0])))
    output = model.run_clip(toy_video(3, 8), window=1)
    assert calls == [3, 3]
    assert output.stopped_at.tolist() == [[3, 3, *[UNSEEN] * 6]] * 3


# Training


@given(case=cases())
def test_training_pass_makes_the_decisions_of_eval(case: Case) -> None:
    model, video = case.model(), case.video()
    model.terminator = None
    skipped = model(video)
    output = model.train()(video, sample=False)
    assert torch.equal(output.stopped_at, skipped.stopped_at)
    assert torch.equal(output.used, skipped.used)
    assert torch.equal(output.macs, skipped.macs)
    assert torch.equal(output.fallback_frame, skipped.fallback_frame)
    torch.testing.assert_close(output.logits, skipped.logits)
    assert output.logits.requires_grad
    # All gates see real features; nothing is masked by earlier decisions.
    assert output.gate_logits is not None
    assert output.inner_logits is not None
    assert output.evaluated.all()
    for tensor in (output.gate_logits, output.inner_logits, output.frame_logits):
        assert tensor.isfinite().all()
    assert output.inner_logits.shape == (case.batch, case.frames, case.stages, CLASSES)
    reached = skipped.evaluated
    assert skipped.gate_logits is not None
    torch.testing.assert_close(output.gate_logits[reached], skipped.gate_logits[reached])
    torch.testing.assert_close(output.forward[reached], skipped.forward[reached])


def test_gates_after_a_stop_still_decide_in_training() -> None:
    model = toy_model(seed=1).train()
    output = model(toy_video(4, 8), sample=False)
    stopped = output.stopped_at < 2
    assert (output.forward[stopped][:, -1] > 0.5).any()
    assert (output.forward[stopped][:, -1] < 0.5).any()
    assert not output.used[stopped].any()


def test_early_termination_rests_in_training() -> None:
    model = toy_model(forward_threshold=0.0, terminator=EarlyTerminator(0.01, 0))
    assert (model(toy_video()).seen.sum(1) == 1).all()
    assert model.train()(toy_video(), sample=False).seen.all()


def test_training_samples_by_default() -> None:
    model = toy_model(seed=2).train()
    encoded = model.encode(toy_video())
    drawn = {tuple(model.decide(encoded).stopped_at.flatten().tolist()) for _ in range(4)}
    assert len(drawn) > 1
    fixed = {tuple(model.decide(encoded, sample=False).stopped_at.flatten().tolist()) for _ in range(4)}
    assert len(fixed) == 1
    torch.manual_seed(1)
    first = model(toy_video())
    torch.manual_seed(1)
    assert_same(first, model.decide(encoded), skip=["frame_logits", "logits", "gate_logits", "inner_logits"])


@pytest.mark.parametrize("state_update", BOTH_UPDATES)
def test_given_noise_ties_draws_to_videos(state_update: StateUpdate) -> None:
    model, video = toy_model(seed=2, state_update=state_update).train(), toy_video()
    encoded = model.encode(video)
    batch, frames = video.shape[:2]
    shape = (batch, frames, model.backbone.num_stages, 2)
    noise = -torch.empty(shape, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(1)).log()
    before = torch.get_rng_state()
    together = model.decide(encoded, noise=noise)
    assert torch.equal(torch.get_rng_state(), before)
    assert 0 < together.forward.mean() < 1
    for row in range(batch):
        pooled = tuple(part[row : row + 1] for part in encoded.pooled)
        one = replace(encoded, pooled=pooled, frame_logits=encoded.frame_logits[row : row + 1])
        assert_same(model.decide(one, noise=noise[row : row + 1]), rows_of(together, slice(row, row + 1)))
    # Far larger noise on the stop logit stops every frame.
    noise[..., 1 - FORWARD] += 1e6
    assert not model.decide(encoded, noise=noise).used.any()
    with pytest.raises(DynskipError, match=r"The noise has shape .*expected \(B, T, N, 2\)"):
        model.decide(encoded, noise=noise[:, :-1])


def test_sampled_training_pass_is_the_product_and_the_mean() -> None:
    model, video = toy_model(share=0.9).train(), toy_video(4, 8)
    torch.manual_seed(0)
    output = model(video)
    used = (output.forward > 0.5).all(-1)
    assert torch.equal(output.used, used)
    assert used.any(1).all()
    weights = used.double()
    mean = (weights[..., None] * output.frame_logits).sum(1) / weights.sum(1, keepdim=True)  # Eq. 3.6
    torch.testing.assert_close(output.logits, mean)


def test_state_follows_the_sampled_path() -> None:
    # Under "used", the second frame's gates start from the first frame's states only where it was used.
    model, video = toy_model(seed=2).train(), toy_video(16, 2)
    encoded = model.encode(video)
    torch.manual_seed(0)
    output = model.decide(encoded)
    assert output.gate_logits is not None
    assert 0 < output.used[:, 0].sum() < 16
    for n, gate in enumerate(model.gates):
        start = gate.initial_state(16)
        _, after = gate(encoded.pooled[n][:, 0], start)
        state = tuple(torch.where(output.used[:, :1], new, old) for new, old in zip(after, start, strict=True))
        torch.testing.assert_close(output.gate_logits[:, 1, n], gate(encoded.pooled[n][:, 1], state)[0])


def test_gates_learn_from_later_frames_through_their_memory() -> None:
    model = toy_model(seed=2, forward_threshold=[0.0, 0.0, 0.5]).train()
    with torch.no_grad():
        encoded = model.encode(toy_video(16, 2))
    encoded = replace(encoded, pooled=tuple(pooled.requires_grad_() for pooled in encoded.pooled))
    output = model.decide(encoded, sample=False)
    assert output.gate_logits is not None
    remembered = output.used[:, 0]
    assert 0 < remembered.sum() < 16
    later = output.gate_logits[:, 1].sum()
    for gradient in torch.autograd.grad(later, encoded.pooled):
        assert torch.equal(gradient[:, 0].any(-1), remembered)
        assert gradient[:, 1].any(-1).all()


def test_straight_through_gradient_of_the_prediction() -> None:
    """d logits / d g by hand: the weighted mean's derivative, times the other gates' product."""
    model = toy_model(seed=2).train()
    output = model(toy_video(3, 6), sample=False)
    assert output.used.any(1).all()
    direction = randn(3, CLASSES, seed=1)
    (gradient,) = torch.autograd.grad((output.logits * direction).sum(), output.forward)
    decisions, used = output.forward.detach().round(), output.used.double()
    for b in range(3):
        for t in range(6):
            change = (output.frame_logits[b, t] - output.logits[b]) / used[b].sum()
            for n in range(3):
                others = math.prod(float(decisions[b, t, m]) for m in range(3) if m != n)
                torch.testing.assert_close(gradient[b, t, n], others * (change @ direction[b]).detach())


def test_a_training_video_without_a_used_frame_still_teaches() -> None:
    model = toy_model(forward_threshold=1.0).train()
    output = model(toy_video(), sample=False)
    assert output.fallback.all()
    assert output.logits.isfinite().all()
    chosen = output.frame_logits[torch.arange(3), output.fallback_frame]
    torch.testing.assert_close(output.logits, chosen)
    output.logits.sum().backward()
    for parameter in model.backbone.parameters():
        assert parameter.grad is not None
        assert parameter.grad.any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_training_fallback_beside_videos_with_used_frames() -> None:
    model = toy_model(seed=6, stages=2).train()
    video = toy_video(12, 2, seed=5)
    output = model(video, sample=False)
    assert 0 < output.fallback.sum() < 12
    torch.testing.assert_close(output.logits, model.eval()(video).logits)


def test_dense_pass_is_the_plain_backbone() -> None:
    network = timm_network("test_resnet", 64)
    model = sofnet(stage_model(copy.deepcopy(network), input_size=(3, 64, 64)), hidden=8)
    video = toy_video(2, 3, size=64, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.stack([network(clip).mean(0) for clip in video])
    for mode in (False, True):
        model.train(mode)
        model.backbone.eval()  # BatchNorm's own statistics in both
        output = model(video, dense=True)
        torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
        assert output.used.all()
        assert output.forward.min() == 1
        assert (output.stopped_at == 5).all()
        assert output.gate_logits is None
        assert output.inner_logits is None
        assert not output.fallback.any()
        assert not output.evaluated.any()
        assert output.frame_logits.isfinite().all()
    output.logits.sum().backward()
    assert all(p.grad is not None for p in model.backbone.parameters())
    assert all(p.grad is None for p in model.gates.parameters())


def test_gates_train_on_stored_features() -> None:
    model, video = toy_model().train(), toy_video()
    with torch.no_grad():
        encoded = model.encode(video)
    assert encoded.image_size == (SIZE, SIZE)
    assert [tuple(pooled.shape) for pooled in encoded.pooled] == [(3, 6, 6), (3, 6, 8), (3, 6, 10)]
    torch.testing.assert_close(
        encoded.frame_logits.flatten(0, 1), model.backbone.model(video.flatten(0, 1)).detach(), rtol=1e-9, atol=1e-9
    )
    model.decide(encoded).logits.sum().backward()
    assert all(gate.decide.weight.grad is not None for gate in model.gates)
    assert all(p.grad is None for p in model.backbone.parameters())


def test_a_frozen_backbone_in_eval_mode_serves_training_gates() -> None:
    network = copy.deepcopy(timm_network("test_resnet", 64))
    model = sofnet(stage_model(network, input_size=(3, 64, 64)), hidden=8).train()
    model.backbone.eval()
    before = copy.deepcopy(network.state_dict())
    output = model(toy_video(2, 2, size=64, dtype=torch.float32))
    assert output.evaluated.all()
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


# Other dtypes, sizes and tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_of_other_dtypes(dtype: torch.dtype) -> None:
    model, video = toy_model(seed=2, terminator=EarlyTerminator(0.9, 2)).to(dtype), toy_video(dtype=dtype)
    output = model(video)
    assert output.logits.dtype == output.forward.dtype == dtype
    assert output.macs.dtype == torch.float64
    assert output.logits.isfinite().all()
    trained = model.train()(video)
    trained.logits.float().sum().backward()
    assert trained.logits.isfinite().all()


def test_long_videos_in_half_precision_are_counted_exactly() -> None:
    # bfloat16 cannot count beyond 256.
    model = toy_model(seed=2, forward_threshold=1.0).to(torch.bfloat16)
    video = toy_video(1, 300, dtype=torch.bfloat16)
    scores = model.decide(model.encode(video)).gate_logits
    assert scores is not None
    best = int(scores[0, :, 0].float().softmax(-1)[:, FORWARD].argmax())
    worst = int(scores[0, :, 0].float().softmax(-1)[:, FORWARD].argmin())
    video = video[:, [worst] * 290 + [best] + [worst] * 9]
    output = model(video)
    assert output.fallback_frame.tolist() == [290]
    assert output.frame_logits[0, 290].isfinite().all()
    used = toy_model(seed=2, forward_threshold=0.0, terminator=EarlyTerminator(1e-6, 280)).to(torch.bfloat16)(video)
    assert int(used.seen.sum()) == 281


def test_autocast() -> None:
    model, video = toy_model(seed=2).float(), toy_video(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        skipped, masked = model(video), model.decide(model.encode(video))
        trained = model.train()(video)
    assert skipped.logits.isfinite().all()
    assert masked.logits.isfinite().all()
    trained.logits.float().sum().backward()


def test_frames_of_other_sizes_than_the_cut() -> None:
    model = toy_model(seed=2)
    video = toy_video(2, 4, size=12)
    output = model(video)
    assert_same(output, model.decide(model.encode(video)), skip=["inner_logits"])
    assert model.lookup_for((12, 12)).image_size == (12, 12)
    assert output.macs.max() > model(toy_video(2, 4)).macs.max()
    assert model.lookup_for((12, 12)) is model.lookup_for((12, 12))


def test_a_given_table_is_what_macs_are_counted_in() -> None:
    lookup = FLOPsLookup([1.0, 10.0, 100.0], 1000.0, unit="ms")
    output = toy_model(forward_threshold=0.0, lookup=lookup)(toy_video(2, 5))
    assert output.macs.tolist() == [5 * 1111.0] * 2


# Saving, loading, copying


def wrapped(name: str = "test_resnet", seed: int = 0) -> StopOrForward:
    network = enliven(copy.deepcopy(timm_network(name, 64)), toy_video(1, 4, size=64, dtype=torch.float32)[0], seed)
    model = sofnet(stage_model(network, input_size=(3, 64, 64)), hidden=8, threshold=0.9)
    for n, gate in enumerate(model.gates):
        randomise(gate, seed + n, 2.0)
    return model.eval()


@pytest.mark.parametrize("file_format", ["torch", "safetensors"])
def test_saved_and_loaded_model_answers_bit_for_bit(file_format: str, tmp_path: Path) -> None:
    model, other = wrapped(seed=1), wrapped(seed=2)
    video = toy_video(3, 4, size=64, dtype=torch.float32)
    expected = model(video)
    assert not torch.equal(other(video).logits, expected.logits)
    path = tmp_path / f"model.{file_format}"
    if file_format == "torch":
        torch.save(model.state_dict(), path)
        state = torch.load(path, weights_only=True)
    else:
        save_file(model.state_dict(), path)
        state = load_file(path)
    other.load_state_dict(state)
    assert_same(other(video), expected, exact=True)
    for mode in (model, other):
        mode.train().backbone.eval()
    torch.manual_seed(0)
    trained = model(video)
    torch.manual_seed(0)
    assert_same(other(video), trained, exact=True)


def test_state_dict_is_the_parts_and_nothing_else() -> None:
    model = wrapped()
    assert list(model.backbone.model.state_dict()) == list(timm_network("test_resnet", 64).state_dict())
    assert {key.split(".")[0] for key in model.state_dict()} == {"backbone", "gates", "inner"}
    model(toy_video(1, 1, size=64, dtype=torch.float32))  # measures a table: not part of the state
    assert list(model.state_dict()) == list(wrapped().state_dict())


def test_timm_checkpoint_loads_before_and_after_wrapping() -> None:
    checkpoint = io.BytesIO()
    torch.save(
        enliven(copy.deepcopy(timm_network("test_resnet", 64)), randn(4, 3, 64, 64, seed=1).float(), 9).state_dict(),
        checkpoint,
    )
    checkpoint.seek(0)
    state = torch.load(checkpoint, weights_only=True)
    after = wrapped(seed=3)
    after.backbone.model.load_state_dict(state)
    network = copy.deepcopy(timm_network("test_resnet", 64))
    network.load_state_dict(state)
    before = sofnet(stage_model(network, input_size=(3, 64, 64)), hidden=8, threshold=0.9).eval()
    before.gates.load_state_dict(after.gates.state_dict())
    video = toy_video(3, 4, size=64, dtype=torch.float32)
    assert_same(before(video), after(video), exact=True)
    shared = dict(network.named_parameters())
    for key, parameter in before.backbone.model.named_parameters():
        assert parameter is shared[key]


def test_a_deep_copy_is_the_same_and_independent() -> None:
    model, video = wrapped(seed=1), toy_video(2, 3, size=64, dtype=torch.float32)
    expected = model(video)
    twin = copy.deepcopy(model)
    assert_same(twin(video), expected, exact=True)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert twin(video).logits.abs().max() == 0
    assert_same(model(video), expected, exact=True)


# Bad input: videos


@pytest.mark.parametrize(
    ("video", "telling"),
    [
        (torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8), r"floating-point .* got torch.uint8.*video.float\(\) / 255"),
        (torch.zeros(1, 2, 3, 8, 8, dtype=torch.int64), "got torch.int64"),
        ([[1.0]], "got list"),
        (None, "got NoneType"),
        (torch.zeros(2, 3, 8, 8).double(), r"shape \(B, T, 3, H, W\); got \(2, 3, 8, 8\)\. .*video\[None\]"),
        (torch.zeros(1, 1, 2, 3, 8, 8).double(), r"got \(1, 1, 2, 3, 8, 8\)"),
        (torch.zeros(1, 2, 4, 8, 8).double(), r"shape \(B, T, 3, H, W\); got \(1, 2, 4, 8, 8\)"),
        (torch.zeros(1, 2, 8, 8, 3).double(), r"got \(1, 2, 8, 8, 3\)\. .*channels before height"),
        (torch.zeros(1, 0, 3, 8, 8).double(), r"empty: shape \(1, 0, 3, 8, 8\)\. Every dimension has to be at least 1"),
        (torch.zeros(0, 2, 3, 8, 8).double(), r"empty: shape \(0, 2, 3, 8, 8\)"),
        (torch.zeros(1, 2, 3, 0, 8).double(), r"empty: shape \(1, 2, 3, 0, 8\)"),
        (torch.zeros(1, 2, 3, 8, 8), r"float32.*float64"),
        (torch.zeros(1, 2, 3, 8, 8).half(), r"float16.*float64"),
    ],
)
@pytest.mark.parametrize("way", ["skip", "train", "dense", "encode"])
def test_videos_that_do_not_fit(video: Any, telling: str, way: str) -> None:
    model = toy_model()
    calls: dict[str, Callable[[], Any]] = {
        "skip": lambda: model(video),
        "train": lambda: model.train()(video),
        "dense": lambda: model(video, dense=True),
        "encode": lambda: model.encode(video),
    }
    with pytest.raises(DynskipError, match=telling):
        calls[way]()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("way", ["skip", "train"])
def test_frames_with_impossible_values(value: float, way: str) -> None:
    video = toy_video(3, 4)
    video[1, 2, 0, 5, 5] = video[2, 3, 1, 0, 0] = value
    model = toy_model().train(way == "train")
    with pytest.raises(DynskipError, match=r"NaN or infinite values in 2 frames, the first being frame 2 of video 1\."):
        model(video)


def test_opposite_infinities_and_large_numbers_are_told_apart() -> None:
    model = toy_model()
    video = toy_video(1, 2)
    video[0, 0, 0, 0, 0], video[0, 1, 0, 0, 0] = math.inf, -math.inf
    with pytest.raises(DynskipError, match="NaN or infinite values in 2 frames"):
        model(video)
    assert model(torch.full((1, 2, 3, 8, 8), 1e38, dtype=torch.float64)).macs.isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        lambda e: EncodedVideo(e.pooled[:-1], e.frame_logits, e.image_size),
        lambda e: EncodedVideo((*e.pooled[:-1], e.pooled[0]), e.frame_logits, e.image_size),
        lambda e: EncodedVideo(e.pooled, e.frame_logits[..., :-1], e.image_size),
        lambda e: EncodedVideo(e.pooled, e.frame_logits[:, :-1], e.image_size),
        lambda e: EncodedVideo(tuple(p[:, :0] for p in e.pooled), e.frame_logits[:, :0], e.image_size),
    ],
)
def test_features_of_another_backbone(change: Callable[[EncodedVideo], EncodedVideo]) -> None:
    model = toy_model()
    with pytest.raises(DynskipError, match=r"are not this backbone's; expected \(B, T, C_n\) with C_n = \(6, 8, 10\)"):
        model.decide(change(model.encode(toy_video())))


# Bad input: parts


class Odd(PolicyGate):
    def forward(self, pooled: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        logits, state = super().forward(pooled, state)
        return logits[:, :1], state


class Stateless(nn.Linear):
    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return ()

    def forward(self, pooled: Tensor, state: tuple[Tensor, ...] = ()) -> Any:
        return super().forward(pooled), state


def build(**changes: Any) -> StopOrForward:
    backbone = toy_backbone(stages=2)
    parts: dict[str, Any] = {"gates": random_gates((6, 8), 0), "inner": random_inner(2, 0)}
    return StopOrForward(backbone, **{**parts, **changes})


def gates_with(last: Any) -> list[Any]:
    return [*random_gates((6,), 0), last]


@pytest.mark.parametrize(
    ("changes", "telling"),
    [
        ({"gates": random_gates((6,), 0)}, r"Got 1 gates for 2 stages; give one gate for each of \('0', '1'\)"),
        ({"gates": []}, "Got 0 gates for 2 stages"),
        ({"inner": random_inner(3, 0)}, "Got 3 inner classifiers for 2 gates"),
        (
            {"gates": gates_with(PolicyGate(7, 5).double())},
            r"Gate 1 \(PolicyGate\) cannot run after stage '1' \(8 channels\).*Build it for 8 input features",
        ),
        ({"gates": gates_with(PolicyGate(8, 5))}, r"Gate 1 \(PolicyGate\) cannot run after stage '1'"),  # float32
        (
            {"gates": gates_with(nn.Linear(8, 2).double())},
            r"Gate 1 \(Linear\) cannot run after stage '1'.*initial_state",
        ),
        (
            {"gates": gates_with(Odd(8, 5).double())},
            r"Gate 1 \(Odd\) .* returned logits of shape \(2, 1\).*expected \(B, 2\)",
        ),
        ({"gates": gates_with(lambda pooled, state: (pooled, state))}, "(?i)gate 1 "),
        ({"gates": gates_with(Stateless(8, 2).double())}, r"Gate 1 \(Stateless\) has no hidden state for an inner"),
        (
            {"inner": [*random_inner(1, 0), InnerClassifier(6, CLASSES).double()]},
            "Inner classifier 1 does not fit gate 1, whose hidden state has 5 features",
        ),
        (
            {"inner": [*random_inner(1, 0), InnerClassifier(5, 7).double()]},
            "Inner classifier 1 has 7 classes and the backbone's head 4; make them equal",
        ),
        ({"terminator": 0.999}, "The terminator is a float; give an EarlyTerminator"),
        ({"state_update": "always"}, "state_update='always' is unknown; use 'used' or 'reached'"),
        ({"forward_threshold": 1.2}, r"Forward threshold 1.2 of gate 0 is no probability; give one in \[0, 1\]"),
        ({"forward_threshold": [0.5, -0.1]}, "Forward threshold -0.1 of gate 1"),
        ({"forward_threshold": math.nan}, "Forward threshold nan"),
        ({"forward_threshold": [0.5]}, "Got 1 forward thresholds for 2 gates"),
        (
            {"lookup": FLOPsLookup([1.0, 2.0, 3.0])},
            r"another backbone: it has 3 unnamed stages, the backbone \('0', '1'\)",
        ),
        (
            {"lookup": FLOPsLookup([1.0, 2.0], stage_names=["layer1", "layer2"])},
            r"another backbone: it has \('layer1', 'layer2'\), the backbone \('0', '1'\). Measure it",
        ),
    ],
)
def test_parts_that_do_not_fit(changes: dict[str, Any], telling: str) -> None:
    with pytest.raises(DynskipError, match=telling):
        build(**changes)


def test_a_table_for_another_size_is_refused() -> None:
    model = build(lookup=FLOPsLookup([1.0, 2.0], image_size=(16, 16))).eval()
    for call in (lambda: model(toy_video()), lambda: model(toy_video(), dense=True), lambda: model.lookup_for((8, 8))):
        with pytest.raises(DynskipError, match=r"made for frames of 16x16, and these are 8x8"):
            call()


def test_fitting_parts_are_accepted() -> None:
    assert (
        build(lookup=FLOPsLookup([1.0, 2.0], stage_names=["0", "1"], image_size=(8, 8))).eval()(toy_video()).macs.any()
    )
    assert build(inner=None, gates=[*random_gates((6,), 0), Stateless(8, 2).double()]).eval()(toy_video()).macs.any()


class Normed(PolicyGate):
    def __init__(self, in_features: int) -> None:
        super().__init__(in_features, 5)
        self.norm, self.drop = nn.BatchNorm1d(in_features), nn.Dropout()

    def forward(self, pooled: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return super().forward(self.drop(self.norm(pooled)), state)


def test_trying_gates_moves_neither_their_mode_nor_their_state() -> None:
    gates = [Normed(6).double(), Normed(8).double()]
    gates[0].eval()
    before, backbone = [copy.deepcopy(gate.state_dict()) for gate in gates], toy_backbone(stages=2).train()
    random_state = torch.get_rng_state()
    StopOrForward(backbone, gates)
    assert (gates[0].training, gates[1].training) == (False, True)
    assert torch.equal(torch.get_rng_state(), random_state)
    for gate, state in zip(gates, before, strict=True):
        assert all(torch.equal(state[key], value) for key, value in gate.state_dict().items())


class _Undecided(nn.Module):
    """Stop every frame, with the same margin."""

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return ()

    def forward(self, pooled: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return torch.tensor([0.7 / 3, -1.9 / 7], dtype=pooled.dtype).expand(len(pooled), 2), state


@pytest.mark.parametrize("batch", [1, 3, 5, 9])
def test_of_equal_frames_the_first_is_the_fallback(batch: int) -> None:
    backbone = toy_model(stages=2).backbone
    model = StopOrForward(backbone, [_Undecided(), _Undecided()]).eval()
    video = toy_video(batch, 7)
    assert model(video).fallback_frame.tolist() == [0] * batch
    assert model.decide(model.encode(video)).fallback_frame.tolist() == [0] * batch
