"""Costs of models that the meta device cannot run, that hold operators nobody can count, or that work once a call."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLASSES, timm_network, toy_video
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

import dynskip_onnx
from dynskip import (
    BudgetLoss,
    DynskipError,
    EarlyExit,
    EfficiencyLoss,
    FixedGate,
    FLOPsLookup,
    StopOrForward,
    VideoResult,
    calibrate,
    stage_model,
)
from dynskip.plot import stage_macs
from dynskip.runtime.export import export
from dynskip.runtime.optimize import optimize


@torch.library.custom_op("dynskip_test::rows", mutates_args=())
def rows(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply, and have no kernel for the meta device and no formula."""
    return x @ weight


class Base(nn.Module):
    """A stage of 8 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mean, self.expert = nn.Conv2d(8, 8, 3, 2), torch.full((1, 8, 1, 1), 0.4), nn.Linear(8, 8)


class PlainTensor(Base):
    """Has a constant that is no buffer."""

    def forward(self, x: Tensor) -> Any:
        return self.conv(x - self.mean)


class Arange(Base):
    """Makes a tensor without naming a device."""

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        return x + torch.arange(x.shape[-1]).float()


class Item(Base):
    """Reads a value."""

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        return x / x.new_ones(()).item()


class Numpy(Base):
    """Goes through numpy."""

    def forward(self, x: Tensor) -> Any:
        return self.conv(torch.from_numpy(2 * x.detach().numpy()))


class Token(Base):
    """Gives a parameter to a module."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.same = nn.Parameter(torch.zeros(1, 8, 1, 1)), nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.conv(x - self.mean) + self.same(self.token.expand(len(x), -1, -1, -1))


class Experts(Base):
    """Chooses rows by their content."""

    def forward(self, x: Tensor) -> Any:
        tokens = self.conv(x).permute(0, 2, 3, 1)
        chosen = (tokens.sum(-1) > 0).nonzero(as_tuple=True)
        tokens = tokens.clone()
        tokens[chosen] = self.expert(tokens[chosen])
        return tokens.permute(0, 3, 1, 2)


class Unknown(Base):
    """Has an operator that nobody can count."""

    def forward(self, x: Tensor) -> Any:
        return rows(self.conv(x), self.conv.weight.new_ones(7, 7))


class NumpyGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return ()

    def forward(self, pooled: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        mean = torch.from_numpy(pooled.detach().numpy().mean(1))
        return torch.stack([-mean, mean], 1), state


CONV = 7 * 7 * 9 * 8 * 8  # multiply-adds of a stage's convolution on 16 x 16 features
VIDEO = toy_video(2, 3, size=32, dtype=torch.float32)


def build(stage: type[nn.Module]) -> StopOrForward:
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))
    backbone = stage_model([nn.Conv2d(3, 8, 3, 2, 1), stage()], head=head, input_size=(3, 32, 32))
    return StopOrForward(backbone, [FixedGate(), FixedGate()]).eval()


def in_all_ways(model: StopOrForward) -> list[Tensor]:
    """Do all that counts costs; return the MACs of every way of running two videos."""
    session = model.stream(2)
    for t in range(VIDEO.shape[1]):
        session(VIDEO[:, t])
    events = [event for event in model.serve_streams(VIDEO) if isinstance(event, VideoResult)]
    assert [event.error for event in events] == [None, None]
    encoded = model.encode(VIDEO)
    assert model.summary()
    assert calibrate.uniform_frames(model, [(encoded, torch.tensor([0, 1]))])
    exits = EarlyExit(model.backbone, [FixedGate(), FixedGate()]).eval()
    images = [exits(VIDEO[:, t]) for t in range(VIDEO.shape[1])]
    streams = torch.tensor([event.macs for event in events], dtype=torch.float64)
    ways = [
        model(VIDEO).macs,
        model.run_clip(VIDEO, 1).macs,
        model.decide(encoded).macs,
        session.result().macs,
        streams,
    ]
    return [*ways, sum((each.macs for each in images), torch.zeros(2))]


@pytest.mark.parametrize("stage", [PlainTensor, Arange, Item, Numpy, Token])
def test_what_the_meta_device_cannot_run_is_counted_on_real_frames(
    stage: type[nn.Module], recwarn: pytest.WarningsRecorder
) -> None:
    model, state = build(stage), torch.get_rng_state()
    lookup = model.lookup_for((32, 32))
    assert lookup.per_stage.tolist() == [16 * 16 * 27 * 8, CONV]
    assert lookup.head == 8 * CLASSES
    for macs in in_all_ways(model):
        assert macs.tolist() == [3 * lookup.total] * 2
    assert torch.equal(torch.get_rng_state(), state)
    assert model.train().lookup_for((40, 40)).total != lookup.total
    assert all(module.training for module in model.modules())
    assert not [each for each in recwarn if "unknown" in str(each.message)]


def test_such_models_are_exported_and_optimised(tmp_path: Path) -> None:
    model = build(PlainTensor)
    assert optimize(model, VIDEO, compile=False)[1].macs == 3 * model.lookup_for((32, 32)).total
    # In a manifest, a cost that is not known is null.
    table = FLOPsLookup([1.0, math.nan], 2.0)
    half = StopOrForward(model.backbone, [FixedGate(stop=True), FixedGate()], lookup=table).eval()
    folder = export(half, tmp_path / "onnx", 32)
    assert json.loads((folder / "manifest.json").read_text(), parse_constant=pytest.fail)["stages"][1]["macs"] is None
    session = dynskip_onnx.load(folder, threads=1).stream()
    assert session(VIDEO[:1, 0].numpy()).frame_macs.tolist() == [1.0]
    assert math.isnan(session.result().macs)  # its answer needs the second stage


def test_a_cost_that_depends_on_the_data_is_that_of_one_frame() -> None:
    model = build(Experts)
    lookup = model.lookup_for((32, 32))
    chosen = (float(lookup.per_stage[1]) - CONV) / 64
    assert 0 < chosen < 49
    assert chosen == int(chosen)
    assert torch.equal(FLOPsLookup.measure(model.backbone, 32).per_stage, lookup.per_stage)
    assert model(VIDEO).macs.tolist() == [3 * lookup.total] * 2


def test_gates_are_counted_on_real_features_too(tmp_path: Path) -> None:
    backbone = stage_model("test_resnet", num_classes=CLASSES, input_size=(3, 32, 32))
    model = StopOrForward(backbone, [NumpyGate() for _ in backbone.num_features]).eval()
    assert model(VIDEO).macs.isfinite().all()
    assert model.lookup_for((32, 32)).gates.tolist() == [0.0] * backbone.num_stages
    model.save_pretrained(tmp_path / "model")
    assert "MMACs a frame of 32x32" in (tmp_path / "model" / "README.md").read_text()


# Operators without a formula


def test_what_nobody_can_count_is_unknown_and_never_nothing() -> None:
    model = build(Unknown)
    with pytest.warns(
        UserWarning, match=r"cost of stage 'stages.1' is unknown.*dynskip_test.rows in 'stages.1'.*lookup="
    ):
        lookup = model.lookup_for((32, 32))
    assert lookup.per_stage[0] == 16 * 16 * 27 * 8
    assert lookup.per_stage[1:].isnan().all()
    assert "nan" in model.summary()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for macs in in_all_ways(model):
            assert macs.isnan().all()
    with pytest.raises(DynskipError, match=r"unknown.*lookup="):
        calibrate.to_accuracy(model, [(VIDEO, torch.tensor([0, 1]))], 1.0)
    for loss in (lambda: EfficiencyLoss(lookup), lambda: BudgetLoss(lookup, 0.5)):
        with pytest.raises(DynskipError, match="unknown costs"):
            loss()
    assert stage_macs(lookup)
    stopped = StopOrForward(model.backbone, [FixedGate(stop=True), FixedGate()], lookup=lookup).eval()
    cheap = stopped.stream()
    assert cheap(VIDEO[0, 0]).frame_macs.tolist() == [16 * 16 * 27 * 8]  # it never got so far


def test_a_formula_or_a_table_makes_it_known() -> None:
    from torch.utils import flop_counter

    model = build(Unknown)
    table = FLOPsLookup([1.0, 2.0], 3.0)
    assert StopOrForward(model.backbone, list(model.gates), lookup=table).eval()(VIDEO).macs.tolist() == [18.0] * 2
    packet = torch.ops.dynskip_test.rows
    register_flop_formula(packet)(lambda x, weight, *_, **__: 2 * x[0] * x[1] * x[2] * x[3] * weight[1])
    try:
        assert float(model.lookup_for((32, 32)).per_stage[1]) == CONV + 8 * 7 * 7 * 7
    finally:
        del flop_counter.flop_registry[packet]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_that_is_quantised_after_wrapping_runs() -> None:
    backbone = stage_model(timm_network("test_vit", 64, img_size=64), input_size=(3, 64, 64))
    model = StopOrForward(backbone, [FixedGate() for _ in backbone.num_features]).eval()
    video = toy_video(1, 2, size=64, dtype=torch.float32)
    assert model(video).macs.isfinite().all()
    backbone.model = torch.ao.quantization.quantize_dynamic(backbone.model, {nn.Linear})
    with pytest.warns(UserWarning, match="unknown.*quantized.linear_dynamic in 'blocks.0.attn.qkv'"):
        output = model(video)
    assert output.logits.isfinite().all()
    assert output.macs.isnan().all()


def test_a_size_that_the_model_cannot_run_is_still_refused() -> None:
    model = build(PlainTensor)
    with pytest.raises(RuntimeError):
        model.lookup_for((2, 2))


# Work that a stage does once a call


def test_work_done_once_a_call_is_counted_for_every_frame() -> None:
    """The cost of a frame is that of a run on it alone; runs of many frames may take a little less."""
    options: Any = {"img_size": 64, "window_size": 4}
    backbone = stage_model("swinv2_tiny_window8_256", num_classes=CLASSES, input_size=(3, 64, 64), **options)
    model = StopOrForward(backbone, [FixedGate() for _ in backbone.num_features]).eval()
    video = toy_video(1, 8, size=64, dtype=torch.float32)
    model.lookup_for((64, 64))
    counted = []
    for window in (1, 8):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            output = model.run_clip(video, window)
        counted.append(counter.get_total_flops() / 2 / float(output.macs + output.speculative_macs))
    assert counted[0] == 1.0
    assert 0.99 < counted[1] < 1.0
