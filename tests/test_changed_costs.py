"""Costs follow a model whose layers change after it was wrapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import CLASSES, SIZE, toy_model, toy_video
from torch import Tensor, nn

from dynskip import EarlyExit, FixedGate, FLOPsLookup, InnerClassifier, StopOrForward, VideoResult


def replaced_stage(model: Any) -> None:
    model.backbone.model[1] = nn.Sequential(nn.Conv2d(6, 8, 1), nn.Tanh()).double()


def replaced_pool(model: Any) -> None:
    model.backbone.model[0][1] = nn.AvgPool2d(2)


def replaced_gate(model: Any) -> None:
    if isinstance(model, StopOrForward):
        model.gates[1] = FixedGate()
    else:
        model.exits[1].inner = nn.Sequential(nn.Linear(5, 50), nn.Linear(50, CLASSES)).double()


def replaced_head(model: Any) -> None:
    model.backbone.model[3][2] = nn.Sequential(nn.Linear(10, 30), nn.Linear(30, CLASSES)).double()


def pruned(model: Any) -> None:
    layer = model.backbone.model[2][0]  # a convolution of 3 x 3 becomes one of 1 x 1
    layer.weight.data, layer.padding = layer.weight.data[..., 1:2, 1:2].clone(), (0, 0)


CHANGES = {change.__name__: change for change in (replaced_stage, replaced_pool, replaced_gate, replaced_head, pruned)}


@pytest.mark.parametrize("change", sorted(CHANGES))
@pytest.mark.parametrize("wrapper", [StopOrForward, EarlyExit])
def test_costs_follow_a_model_that_changes(change: str, wrapper: Any) -> None:
    model: Any = toy_model(seed=2)
    video = toy_video(2, 1)
    run: Callable[[], Any] = lambda: model(video)  # noqa: E731
    if wrapper is EarlyExit:
        inner = [InnerClassifier(5, CLASSES).double() for _ in model.gates]
        model = EarlyExit(model.backbone, list(model.gates), inner).eval()
        run = lambda: model(video[:, 0])  # noqa: E731
    model.forward_threshold = 0.0  # every frame is used
    before = float(run().macs[0])
    CHANGES[change](model.eval())
    model.eval()
    after = FLOPsLookup.measure(model.backbone, SIZE, model.deciders).total
    assert after != before
    assert run().macs.tolist() == [after] * 2
    if wrapper is StopOrForward:
        (event,) = [each for each in model.serve_streams(video[:1]) if isinstance(each, VideoResult)]
        session = model.stream()
        assert event.macs == float(session(video[0, 0]).frame_macs) == after


def test_tables_are_measured_once_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy_model(seed=2)
    tables = [model.lookup_for((SIZE, SIZE))]
    model.train()(toy_video(2, 3)).logits.sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.eval().load_state_dict(model.state_dict())
    torch.func.functional_call(model, {k: v.clone() for k, v in model.named_parameters()}, (toy_video(2, 3),))
    tables.append(model.lookup_for((SIZE, SIZE)))
    assert tables[0] is tables[1]
    assert model.float().lookup_for((SIZE, SIZE)) is not tables[0]


def test_new_layers_may_need_another_memory_layout() -> None:
    class Viewing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(len(x), -1).view_as(x)

    model: Any = toy_model(seed=2)
    video = toy_video(8, 3)
    model(video)
    assert model.backbone.channels_last
    model.backbone.model[0][0] = nn.Sequential(Viewing(), model.backbone.model[0][0])
    assert model.eval()(video).logits.isfinite().all()
    assert not model.backbone.channels_last
