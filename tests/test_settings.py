"""Settings are checked whenever they are set, and a model is refused if its answers would mean nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import CLASSES, SIZE, toy_backbone, toy_model, toy_network, toy_video
from torch import Tensor, nn

from dynskip import (
    AnytimeLoss,
    BudgetLoss,
    ConfidenceGate,
    DistillationLoss,
    DynskipError,
    EarlyExit,
    EarlyTerminator,
    FixedGate,
    PolicyGuidanceLoss,
    RandomGate,
    SimilarityGate,
    SoFLoss,
    StopOrForward,
    TargetRateLoss,
    calibrate,
    exponential_temperature,
    sofnet,
    stage_model,
)
from dynskip.metrics import top_k_accuracy

NAN, INF = math.nan, math.inf


def images_model() -> EarlyExit:
    backbone = toy_backbone(0, 3)
    gates = [FixedGate(), *(ConfidenceGate(c, CLASSES).double() for c in backbone.num_features[1:])]
    return EarlyExit(backbone, gates).eval()


@pytest.mark.parametrize("make", [toy_model, images_model])
def test_one_threshold_is_widened_to_all_gates_whenever_it_is_set(make: Callable[[], Any]) -> None:
    model = make()
    model.forward_threshold = 0.7
    assert model.forward_threshold == (0.7, 0.7, 0.7)
    video = toy_video(2, 3)
    assert model(video if isinstance(model, StopOrForward) else video[:, 0]).logits.isfinite().all()
    for wrong, telling in (
        ((0.7, 0.7), "2 forward thresholds for 3 gates"),
        ((7.0,) * 3, r"threshold 7.0 of gate 0 is no probability; give one in \[0, 1\]"),
        (-0.1, "no probability"),
        (NAN, "no probability"),
        ("high", "no probability|forward thresholds for 3 gates"),
    ):
        with pytest.raises(DynskipError, match=telling):
            model.forward_threshold = wrong
    assert model.forward_threshold == (0.7, 0.7, 0.7)


def test_schedules_stay_positive() -> None:
    with pytest.raises(DynskipError, match=r"has to stay positive\. Take a smaller `decay`"):
        exponential_temperature(60, decay=50.0)
    assert exponential_temperature(60) > 0


def loss_parts() -> dict[str, Any]:
    table = toy_model().lookup_for((SIZE, SIZE))
    return {
        "SoFLoss": SoFLoss(table),
        "PolicyGuidanceLoss": PolicyGuidanceLoss(),
        "BudgetLoss": BudgetLoss(table, 0.5),
        "DistillationLoss": DistillationLoss(),
    }


NOT_PROBABLE = (-0.1, 1.1, NAN, INF, "high", None)
SETTINGS: list[tuple[Callable[[], Any], str, tuple[Any, ...], str]] = [
    (toy_model, "forward_threshold", (*NOT_PROBABLE, (0.7, 0.7)), r"no probability|thresholds for 3 gates"),
    (images_model, "forward_threshold", (*NOT_PROBABLE, (0.7, 0.7)), r"no probability|thresholds for 3 gates"),
    (toy_model, "temperature", (0.0, -0.05, NAN, INF, "warm", None), "has to be a finite positive number"),
    (images_model, "temperature", (0.0, -0.05, NAN, INF, "warm", None), "has to be a finite positive number"),
    (toy_model, "terminator", (nn.Identity(), 0.9), "give an EarlyTerminator"),
    (images_model, "terminator", (EarlyTerminator(),), "takes still images, which have no terminator"),
    (toy_model, "state_update", ("sometimes", None), "use 'used' or 'reached'"),
    (images_model, "state_update", ("reached", None), "takes still images, which have no state_update"),
    (toy_model, "look_ahead", (4,), r"give a LookAhead\(frames, stages\)"),
    (toy_model, "class_names", (["cat"], "cats", 4, [1, 2, 3, 4]), "give one string for each of 4 classes"),
    (toy_model, "preprocessing", (224, [3, 224, 224]), "give a mapping"),
    (EarlyTerminator, "threshold", (0.0, *NOT_PROBABLE), "no probability"),
    (EarlyTerminator, "min_frames", (-1, 2.5, None, 2**63, 10**30), "no whole number"),
    (lambda: SimilarityGate(4), "threshold", (0.0, 1.0, *NOT_PROBABLE), "out of range"),
    (lambda: ConfidenceGate(4, 3), "threshold", (0.0, 1.0, *NOT_PROBABLE), "out of range"),
    (lambda: ConfidenceGate(4, 3, measure="entropy"), "threshold", (0.0, 1.0, *NOT_PROBABLE), "out of range"),
    (lambda: ConfidenceGate(4, 3), "stop", ("always", None), "use 'sure' or 'unsure'"),
    (lambda: ConfidenceGate(4, 3), "measure", ("margin", None), "use 'confidence' or 'entropy'"),
    (lambda: RandomGate(4, 0.5), "rate", (0.0, 1.0, *NOT_PROBABLE), "out of range"),
    (FixedGate, "stop", (True,), r"put FixedGate\(stop=True\) in its place"),
    (lambda: loss_parts()["SoFLoss"], "alpha", NOT_PROBABLE, r"give a number in \[0, 1\]"),
    (lambda: loss_parts()["SoFLoss"], "all_frames", (-0.1, NAN, INF, "high", None), "give a weight, 0 or more"),
    (AnytimeLoss, "weight", (-0.1, NAN, INF, "high", None), "give a weight, 0 or more"),
    (lambda: loss_parts()["PolicyGuidanceLoss"], "beta", NOT_PROBABLE, r"give a number in \[0, 1\]"),
    (lambda: loss_parts()["BudgetLoss"], "budget", (0.0, *NOT_PROBABLE), r"in \(0, 1\]"),
    (lambda: loss_parts()["DistillationLoss"], "temperature", (0.0, -1.0, NAN, INF, "warm"), "finite positive number"),
    (lambda: TargetRateLoss(0.5), "target", (*NOT_PROBABLE, [], [0.5, 2.0]), r"give a number in \[0, 1\]"),
]


@pytest.mark.parametrize(("make", "name", "wrong", "telling"), SETTINGS)
def test_a_setting_that_makes_no_sense_is_refused_when_it_is_set(
    make: Callable[[], Any], name: str, wrong: tuple[Any, ...], telling: str
) -> None:
    part = make()
    before = getattr(part, name)
    for value in wrong:
        with pytest.raises(DynskipError, match=telling):
            setattr(part, name, value)
        assert getattr(part, name) is before
    setattr(part, name, before)


def test_a_target_rate_that_is_set_counts() -> None:
    loss: Any = TargetRateLoss(0.5)
    output = toy_model().train()(toy_video(2, 3))
    loss.target = (0.1, 0.2, 0.9)
    assert torch.equal(loss(output), TargetRateLoss((0.1, 0.2, 0.9))(output))


# The softmax of one output is always 1


def one_output() -> StopOrForward:
    backbone = stage_model(toy_network(classes=1), input_size=(3, SIZE, SIZE))
    return StopOrForward(backbone, [FixedGate() for _ in backbone.num_features]).eval()


def test_one_output_is_refused_where_a_softmax_would_answer() -> None:
    model, video = one_output(), toy_video(2, 3)
    output = model(video)  # gates and costs work as usual
    assert output.used.all()
    targets = torch.zeros(2, dtype=torch.long)
    calls: dict[str, Callable[[], Any]] = {
        "terminator": lambda: setattr(model, "terminator", EarlyTerminator()),
        "constructor": lambda: StopOrForward(model.backbone, list(model.gates), terminator=EarlyTerminator()),
        "sofnet": lambda: sofnet(model.backbone, hidden=4),
        "images": lambda: EarlyExit(model.backbone, list(model.gates)),
        "loss": lambda: SoFLoss(model.lookup_for((SIZE, SIZE)))(output, targets),
        "calibrate": lambda: calibrate.to_accuracy(model, [(video, targets)], max_loss=0.0),
        "top-k": lambda: top_k_accuracy(torch.ones(2, 1), targets),
    }
    for call in calls.values():
        with pytest.raises(DynskipError, match=r"one output|one logit|one class|one column"):
            call()
    assert model.terminator is None


# Parts in training mode


def with_norm() -> StopOrForward:
    network: Any = toy_network()
    network[1].add_module("norm", nn.BatchNorm2d(8).double())
    backbone = stage_model(network.eval(), input_size=(3, SIZE, SIZE))
    return StopOrForward(backbone, [FixedGate() for _ in backbone.num_features], terminator=EarlyTerminator()).eval()


@pytest.mark.parametrize("which", ["backbone", "norm", "gate", "terminator"])
def test_parts_left_in_training_mode_are_refused(which: str) -> None:
    model, video = with_norm(), toy_video(2, 3)
    session = model.stream(2)
    network: Any = model.backbone.model
    norm = network[1].norm
    encoded, before = model.encode(video), norm.running_mean.clone()
    parts = {"backbone": model.backbone, "norm": norm, "gate": model.gates[1], "terminator": model.terminator}
    parts[which].train()
    calls: list[Callable[[], Any]] = [
        lambda: model(video),
        lambda: model(video, dense=True),
        lambda: model.encode(video),
        lambda: model.decide(encoded),
        model.stream,
        lambda: session(video[:, 0]),
        lambda: model.serve_streams(video),
        lambda: model.aserve_streams(video),
    ]
    for call in calls:
        with pytest.raises(DynskipError, match=r"in training mode; call `model.eval\(\)`"):
            call()
    assert torch.equal(norm.running_mean, before)
    model.eval()
    assert model(video).logits.isfinite().all()


def test_images_with_a_part_in_training_mode_are_refused() -> None:
    model, images = images_model(), toy_video(4, 1)[:, 0]
    encoded = model.encode(images)
    model.exits[1].train()
    for call in (lambda: model(images), lambda: model.decide(encoded)):
        with pytest.raises(DynskipError, match="in training mode"):
            call()


def test_a_terminator_that_is_put_in_takes_the_models_mode() -> None:
    model = toy_model()
    model.terminator = EarlyTerminator(0.9)
    assert model(toy_video()).logits.isfinite().all()


# Gates that no threshold overrules


class Always(nn.Module):
    """Answer with infinite logits."""

    def __init__(self, forward: bool) -> None:
        super().__init__()
        self.logits = [-math.inf, math.inf] if forward else [math.inf, -math.inf]

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return ()

    def forward(self, pooled: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return pooled.new_tensor([self.logits]).expand(len(pooled), 2), state


@pytest.mark.parametrize("threshold", [0.0, 1e-60, 0.5, 1.0])
@pytest.mark.parametrize("make", [lambda forward: FixedGate(stop=not forward), Always])
@pytest.mark.parametrize("forward", [True, False])
def test_a_gate_that_says_always_is_never_overruled(
    forward: bool, make: Callable[[bool], nn.Module], threshold: float
) -> None:
    backbone, video = toy_backbone(0, 2), toy_video(2, 3)
    model = StopOrForward(backbone, [make(forward), FixedGate()], forward_threshold=threshold).eval()
    session = model.stream(2)
    for t in range(3):
        assert (session(video[:, t]).used == forward).all()
    assert (model(video).used == forward).all()
    assert (model.decide(model.encode(video)).used == forward).all()
    assert (model.train().decide(model.encode(video), sample=False).used == forward).all()


def test_an_exit_that_always_stops_is_never_overruled() -> None:
    backbone = toy_backbone(0, 2)
    certain = ConfidenceGate(backbone.num_features[0], CLASSES).double()
    with torch.no_grad():
        certain.classifier.classify.weight.zero_()
        certain.classifier.classify.bias.copy_(torch.tensor([1e4, 0, 0, 0]))
    for threshold in (0.0, 0.5, 1.0):
        model = EarlyExit(backbone, [certain, FixedGate()], forward_threshold=threshold).eval()
        assert (model(toy_video(3, 1)[:, 0]).stopped_at == 0).all()
