from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Case, balance, cases, random_gates, timm_network, toy_backbone, toy_model, toy_video
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dynskip import UNSEEN, DynskipError, FLOPsLookup, PolicyGate, StagedBackbone, StopOrForward, stage_model


@pytest.fixture(scope="module")
def resnet50() -> StagedBackbone:
    return stage_model("resnet50", input_size=(3, 64, 64))


def table(stages: int = 3, seed: int = 0) -> FLOPsLookup:
    costs = torch.rand(2 * stages + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    return FLOPsLookup(costs[:stages], costs[-1], costs[stages:-1])


# Known figures


def test_resnet50_at_224(resnet50: StagedBackbone) -> None:
    lookup = FLOPsLookup.measure(resnet50, 224)
    assert [round(macs / 1e9, 3) for macs in lookup.per_stage.tolist()] == [0.118, 0.668, 1.028, 1.464, 0.809]
    assert round(lookup.head / 1e9, 3) == 0.002
    assert round(lookup.total / 1e9, 2) == 4.09
    assert lookup.total == lookup.dense
    assert "layer3 1.464, layer4 0.809, head 0.002, gates 0.0000, total 4.089" in repr(lookup)
    assert "GMACs a frame at 224x224" in repr(lookup)


def test_sixteen_frames_of_resnet50_at_168(resnet50: StagedBackbone) -> None:
    assert 40.0 <= 16 * FLOPsLookup.measure(resnet50, (168, 168)).dense / 1e9 <= 40.3


def test_gates_of_resnet50_are_counted_by_hand(resnet50: StagedBackbone) -> None:
    gates = [PolicyGate(channels) for channels in resnet50.num_features]
    lookup = FLOPsLookup.measure(resnet50, (64, 96), gates)
    for channels, macs in zip(resnet50.num_features, lookup.gates.tolist(), strict=True):
        assert macs == channels * 512 + 2 * 4 * 512 * 512 + 512 * 2
    without_memory = [PolicyGate(channels, 32, None) for channels in resnet50.num_features]
    lookup = FLOPsLookup.measure(resnet50, 64, without_memory)
    for channels, macs in zip(resnet50.num_features, lookup.gates.tolist(), strict=True):
        assert macs == channels * 32 + 32 * 32 + 32 * 2
    assert lookup.total == lookup.dense + float(lookup.gates.sum())


# What a table says


def test_toy_network_is_counted_by_hand() -> None:
    lookup = FLOPsLookup.measure(toy_backbone(stages=2), (10, 7))
    assert lookup.per_stage.tolist() == [3 * 6 * 9 * 70, 6 * 8 * 9 * 70]
    assert lookup.head == 8 * 4
    assert (lookup.unit, lookup.image_size, lookup.stage_names) == ("MACs", (10, 7), ("0", "1"))
    assert lookup.gates.tolist() == [0, 0]


@given(stages=st.integers(1, 6), seed=st.integers(0, 1000))
def test_cumulative_and_remaining_are_running_sums(stages: int, seed: int) -> None:
    lookup = table(stages, seed)
    assert lookup.per_stage.dtype == lookup.gates.dtype == lookup.remaining.dtype == torch.float64
    costs = list(zip(lookup.per_stage.tolist(), lookup.gates.tolist(), strict=True))
    running = [sum(stage + gate for stage, gate in costs[: n + 1]) for n in range(stages)]
    whole = running[-1] + lookup.head
    assert lookup.cumulative.tolist() == pytest.approx(running)
    assert lookup.total == pytest.approx(whole)
    assert lookup.dense == pytest.approx(sum(stage for stage, _ in costs) + lookup.head)
    # Eq. 3.10: f(L) - f(l_n)
    assert lookup.remaining.tolist() == pytest.approx([whole - done for done in running])


@given(stages=st.integers(1, 4), batch=st.integers(1, 4), frames=st.integers(1, 6), seed=st.integers(0, 1000))
def test_cost_adds_up_frame_by_frame(stages: int, batch: int, frames: int, seed: int) -> None:
    lookup, source = table(stages, seed), torch.Generator().manual_seed(seed)
    stopped_at = torch.randint(UNSEEN, stages + 1, (batch, frames), generator=source)
    stopped_at[:, 0] = stopped_at[:, 0].clamp(min=0)  # the first frame is always looked at
    used = stopped_at == stages
    fallback_frame = torch.where(used.any(1), -1, stopped_at.argmax(1))
    costs = lookup.cost(stopped_at, fallback_frame)
    assert costs.dtype == torch.float64
    stage, gate = lookup.per_stage.tolist(), lookup.gates.tolist()
    for video in range(batch):
        expected = 0.0
        for depth in stopped_at[video].tolist():
            for n in range(min(depth + 1, stages)):
                expected += stage[n] + gate[n]
            expected += lookup.head if depth == stages else 0.0
        if not used[video].any():  # the furthest frame goes on without gates
            expected += sum(stage[max(stopped_at[video].tolist()) + 1 :]) + lookup.head
        assert float(costs[video]) == pytest.approx(expected)


def test_a_table_may_hold_milliseconds() -> None:
    lookup = FLOPsLookup([2.0, 3.0], 0.5, unit="ms")
    assert lookup.total == 5.5
    assert repr(lookup).startswith("FLOPsLookup(ms a frame: stage 0 2.000, stage 1 3.000, head 0.500")


def test_measuring_leaves_the_model_alone() -> None:
    backbone = toy_backbone().train()
    gates = random_gates(backbone.num_features, 0)
    before = [id(p) for p in backbone.parameters()]
    random_state = torch.get_rng_state()
    FLOPsLookup.measure(backbone, 16, gates)
    assert backbone.training
    assert [id(p) for p in backbone.parameters()] == before
    assert all(p.device.type == "cpu" for p in backbone.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_measuring_leaves_hooks_alone() -> None:
    model, calls = toy_model(), []
    for module in model.modules():
        if module is not model:
            module.register_forward_hook(lambda *_: calls.append(1))
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    model.lookup_for((8, 8))
    assert calls == []


# Reported MACs are executed MACs


def assert_counted(model: StopOrForward, video: torch.Tensor) -> None:
    """Compare with torch's count what is reported frame by frame, and ahead of decisions with its extra."""
    model.lookup_for((video.shape[3], video.shape[4]))  # measured before counting starts
    for window in (1, None):
        # Attention as plain matrix products: torch 2.14 does not count the fused kernel of CPUs.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            output = model.run_clip(video, window)
        extra = output.speculative_macs.sum()
        assert counter.get_total_flops() / 2 == float(output.macs.sum() + extra)
        assert (output.macs > 0).all()
        assert window is None or extra == 0


@settings(max_examples=40)
@given(case=cases())
def test_reported_macs_are_executed_macs(case: Case) -> None:
    assert_counted(case.model(), case.video())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_mambaout"])
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_reported_macs_are_executed_macs_of_real_networks(name: str, share: float) -> None:
    options = {"img_size": 64} if name == "test_vit" else {}
    backbone = stage_model(timm_network(name, 64, **options), input_size=(3, 64, 64))
    gates = [gate.float() for gate in random_gates(backbone.num_features, seed=5)]
    video = toy_video(2, 3, size=64, dtype=torch.float32)
    assert_counted(balance(StopOrForward(backbone, gates).eval(), video, share), video)


def test_dense_macs_leave_gates_out() -> None:
    model = toy_model()
    lookup = model.lookup_for((8, 8))
    with FlopCounterMode(display=False) as counter:
        output = model(toy_video(2, 4), dense=True)
    assert counter.get_total_flops() / 2 == float(output.macs.sum())
    assert output.macs.tolist() == [4 * lookup.dense] * 2
    assert lookup.dense < lookup.total


# Bad input


@pytest.mark.parametrize(
    ("call", "telling"),
    [
        (lambda: FLOPsLookup([]), "needs one entry a stage: got 0 stages"),
        (lambda: FLOPsLookup([1.0, 2.0], gates=[1.0]), "got 2 stages, 1 gates"),
        (
            lambda: FLOPsLookup([1.0, 2.0], stage_names=["a"]),
            r"got 2 stages, 2 gates, 2 steps, 2 shared parts and stage names \('a',\)",
        ),
        (lambda: FLOPsLookup([1.0, -2.0]), r"finite and not negative, .* got \[1.0, -2.0"),
        (lambda: FLOPsLookup([1.0], head=-math.inf), "finite and not negative"),
        (lambda: FLOPsLookup([1.0], gates=[math.inf]), "finite and not negative"),
        (lambda: FLOPsLookup.measure(toy_backbone(), 8, [PolicyGate(6, 5)]), "Got 1 gates for 3 stages"),
        (
            lambda: FLOPsLookup.measure(
                toy_backbone(stages=2), 8, [PolicyGate(6, 5).double(), PolicyGate(7, 5).double()]
            ),
            r"(?i)gate 1 .*8",
        ),
        (lambda: FLOPsLookup.measure(toy_backbone(stages=1), 8, [nn.Identity()]), "(?i)gate 0 "),
    ],
)
def test_impossible_tables_say_what_was_expected(call: Callable[[], Any], telling: str) -> None:
    with pytest.raises(DynskipError, match=telling):
        call()
