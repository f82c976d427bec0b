"""Still images: answered at their exit, nothing runs after it, all multiply-adds are counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    CLASSES,
    SIZE,
    assert_same,
    balance,
    crossings_backbone,
    random_gates,
    random_inner,
    randomise,
    rows_of,
    toy_backbone,
    toy_video,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dynskip import (
    ConfidenceGate,
    DistillationLoss,
    DynskipError,
    EarlyExit,
    EfficiencyLoss,
    EncodedVideo,
    FixedGate,
    InnerClassificationLoss,
    InnerClassifier,
    PolicyGate,
    StagedBackbone,
    StopOrForward,
)


def images(count: int, seed: int = 0) -> Tensor:
    return toy_video(count, 1, seed)[:, 0]


def confident(backbone: StagedBackbone, seed: int = 0, threshold: float = 0.7) -> EarlyExit:
    gates = [ConfidenceGate(channels, CLASSES, threshold).double() for channels in backbone.num_features]
    for n, gate in enumerate(gates):
        randomise(gate, seed * 17 + n, scale=4.0)
    return EarlyExit(backbone, gates).eval()


def learned(backbone: StagedBackbone, seed: int = 0) -> EarlyExit:
    gates, inner = random_gates(backbone.num_features, seed), random_inner(backbone.num_stages, seed)
    balance(StopOrForward(backbone, gates), images(40)[:, None], share=0.7)
    return EarlyExit(backbone, gates, inner).eval()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    stages=st.integers(1, 4),
    batch=st.integers(1, 6),
    build=st.sampled_from([confident, learned]),
)
def test_skipping_is_masking_whatever_the_batch(
    seed: int, stages: int, batch: int, build: Callable[..., EarlyExit]
) -> None:
    model, pictures = build(toy_backbone(seed, stages), seed), images(batch, seed)
    output = model(pictures)
    assert_same(output, model.decide(model.encode(pictures)))
    assert_same(model(pictures[-1:]), rows_of(output, slice(batch - 1, batch)))
    assert not output.logits.isnan().any()
    assert not output.fallback.any()
    assert torch.equal(output.used[:, 0], output.stopped_at[:, 0] == stages)


def literal_answers(model: EarlyExit, pictures: Tensor) -> tuple[Tensor, list[int]]:
    """Run each image alone, stage by stage, until an exit is confident."""
    answers, places = [], []
    for picture in pictures:
        carry = model.backbone.start(picture[None])
        for n, part in enumerate(model.exits):
            carry = model.backbone.run(n, carry)
            answer = part.gate.classifier(model.backbone.pool(n, carry))
            if answer.softmax(-1).amax() >= part.gate.threshold:
                break
        else:
            n, answer = model.backbone.num_stages, model.backbone.head(carry)
        answers.append(answer[0])
        places.append(n)
    return torch.stack(answers), places


def test_images_leave_where_they_are_sure_and_are_answered_there() -> None:
    model, pictures = confident(toy_backbone(1, 3)), images(40)
    output = model(pictures)
    answers, places = literal_answers(model, pictures)
    assert set(places) == {0, 1, 2, 3}
    assert output.stopped_at[:, 0].tolist() == places
    torch.testing.assert_close(output.logits, answers)
    assert output.inner_logits is not None
    reached = torch.arange(3) <= torch.tensor(places)[:, None]
    assert torch.equal(~output.inner_logits[:, 0].isnan().any(-1), reached)


@pytest.mark.parametrize("build", [confident, learned])
def test_reported_macs_are_counted_and_stages_run_on_survivors_alone(build: Callable[..., EarlyExit]) -> None:
    model, pictures = build(toy_backbone(2, 3)), images(30)
    model.lookup_for((SIZE, SIZE))
    rows: list[int] = []
    for part in model.backbone.model.children():
        part.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    with FlopCounterMode(display=False) as counter:
        output = model(pictures)
    stopped_at = output.stopped_at[:, 0]
    assert output.macs.sum() == counter.get_total_flops() / 2
    assert rows == [int((stopped_at >= n).sum()) for n in range(4)]
    assert 0 < rows[-1] < 30


def test_nothing_runs_after_the_last_image_has_left() -> None:
    backbone = toy_backbone(0, 3)
    gates = [FixedGate(), ConfidenceGate(backbone.num_features[1], CLASSES, 1e-6).double(), FixedGate()]
    model, runs = EarlyExit(backbone, gates).eval(), []
    for n, part in enumerate(backbone.model.children()):
        part.register_forward_hook(lambda *_, n=n: runs.append(n))
    output = model(images(5))
    assert runs == [0, 1]
    assert (output.stopped_at == 1).all()
    assert output.inner_logits is not None
    assert output.inner_logits[:, 0, 0].isnan().all()  # no exit, no answer


def test_a_stage_without_an_exit_passes_every_image_whatever_the_threshold() -> None:
    backbone = toy_backbone(0, 2)
    gates = [FixedGate(), ConfidenceGate(backbone.num_features[1], CLASSES, measure="entropy").double()]
    output = EarlyExit(backbone, gates, forward_threshold=1.0).eval()(images(5))
    assert (output.stopped_at == 1).all()
    assert not output.logits.isnan().any()


@pytest.mark.parametrize("training", [False, True])
def test_a_stage_without_an_exit_has_no_answer(training: bool) -> None:
    backbone = toy_backbone(0, 2)
    gates = [FixedGate(), ConfidenceGate(backbone.num_features[1], CLASSES, 0.5).double()]
    output = EarlyExit(backbone, gates).train(training)(images(5))
    assert output.inner_logits is not None
    assert output.inner_logits[:, 0, 0].isnan().all()
    assert output.inner_logits[:, 0, 1].isfinite().all()
    assert output.logits.isfinite().all()
    if training:
        targets = torch.zeros(5, dtype=torch.long)
        losses = InnerClassificationLoss()(output, targets), DistillationLoss()(output), output.logits.sum()
        assert all(loss.isfinite() for loss in losses)
        torch.stack(losses).sum().backward()
        assert all(p.grad.isfinite().all() for p in gates[1].parameters() if p.grad is not None)


def test_forward_threshold_moves_all_exits() -> None:
    backbone = toy_backbone(1, 3)
    gates = list(confident(backbone).exits)
    macs = []
    for threshold in (0.01, 0.3, 0.5, 0.7, 0.99):
        model = EarlyExit(backbone, [part.gate for part in gates], forward_threshold=threshold).eval()
        macs.append(model(images(40)).macs.sum().item())
    assert macs == sorted(macs, reverse=True)
    assert macs[0] > macs[-1]


def test_every_kind_of_value_crosses_exits() -> None:
    model, pictures = confident(crossings_backbone().double(), threshold=0.9), images(40)
    output = model(pictures)
    assert len(output.stopped_at.unique()) == 3
    assert_same(output, model.decide(model.encode(pictures)))


def test_training_output_is_the_hard_answer_and_teaches_gates_classifiers_and_backbone() -> None:
    model, pictures = learned(toy_backbone(3, 3), seed=3), images(24)
    evaluated = model(pictures)
    assert len(evaluated.stopped_at.unique()) > 2
    output = model.train().decide(model.encode(pictures), sample=False)
    torch.testing.assert_close(output.logits, evaluated.logits)
    assert torch.equal(output.stopped_at, evaluated.stopped_at)
    assert output.evaluated.all()
    targets = torch.arange(24) % CLASSES
    loss = nn.functional.cross_entropy(output.logits, targets)
    loss = loss + EfficiencyLoss(model.lookup_for((SIZE, SIZE)), normalize=True)(output)
    loss = loss + InnerClassificationLoss()(output, targets)
    loss.backward()
    for name, parameter in model.named_parameters():
        # Without an earlier frame, a cell's memory is empty.
        if "weight_hh" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


def test_the_straight_through_answer_has_the_gradient_of_its_shares() -> None:
    """One exit: the answer is (1 - g) inner + g head."""
    backbone = toy_backbone(4, 1)
    model, pictures = learned(backbone, seed=4).train(), images(6)
    encoded = model.encode(pictures)
    output = model.decide(encoded, sample=False)
    assert output.inner_logits is not None
    gain = (encoded.frame_logits[:, 0] - output.inner_logits[:, 0, 0]).sum(-1).detach()
    bias = model.exits[0].gate.decide.bias
    (gradient,) = torch.autograd.grad(output.logits.sum(), bias, retain_graph=True)
    (expected,) = torch.autograd.grad((output.forward[:, 0, 0] * gain).sum(), bias)
    torch.testing.assert_close(gradient, expected)
    assert gradient.any()


def test_exits_can_be_trained_on_stored_features() -> None:
    """What docs/gates.md shows: classifiers learn from features, and nothing else changes."""
    backbone = toy_backbone(5, 2)
    model, pictures = confident(backbone, threshold=0.9), images(64)
    encoded = model.encode(pictures)
    targets = encoded.frame_logits[:, 0].argmax(-1)
    optimiser = torch.optim.Adam(model.exits.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = sum(
            nn.functional.cross_entropy(part.gate.classifier(pooled[:, 0].detach()), targets)
            for part, pooled in zip(model.exits, encoded.pooled, strict=True)
        )
        assert isinstance(loss, Tensor)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_sampling_draws_exits() -> None:
    model, pictures = learned(toy_backbone(3, 3), seed=3), images(24)
    torch.manual_seed(0)
    drawn = [model(pictures, sample=True) for _ in range(3)]
    assert len({tuple(output.stopped_at[:, 0].tolist()) for output in drawn}) > 1
    assert not any(output.logits.isnan().any() for output in drawn)


def test_saved_exits_answer_alike() -> None:
    model, pictures = confident(toy_backbone(1, 3)), images(8)
    other = confident(toy_backbone(9, 3), seed=7)
    other.load_state_dict(model.state_dict())
    assert_same(other(pictures), model(pictures), exact=True)


BACKBONE = toy_backbone(0, 2)
WIDTHS = BACKBONE.num_features
EXITS = [ConfidenceGate(channels, CLASSES).double() for channels in WIDTHS]
MODEL = EarlyExit(BACKBONE, EXITS).eval()
NAN = images(3)
NAN[1, 0, 0, 0] = math.nan


@pytest.mark.parametrize(
    ("call", "telling"),
    [
        (lambda: MODEL(toy_video(2, 3)), r"must have shape \(B, 3, H, W\); got .* videos are for StopOrForward"),
        (lambda: MODEL(images(2)[0]), r"Add a batch dimension with `image\[None\]`"),
        (lambda: MODEL(images(2)[:0]), r"The image is empty: shape \(0, 3, 8, 8\)"),
        (lambda: MODEL(images(2).float()), "image is torch.float32 and the model torch.float64"),
        (lambda: MODEL(NAN), "NaN or infinite values in 1 images, the first being image 1"),
        (lambda: EarlyExit(BACKBONE, EXITS[:1]), "Got 1 gates for 2 stages"),
        (lambda: EarlyExit(BACKBONE, EXITS, [nn.Identity()]), "Got 1 inner classifiers for 2 gates"),
        (
            lambda: EarlyExit(BACKBONE, [FixedGate(stop=True), FixedGate()]),
            "has no hidden state for an inner classifier",
        ),
        (
            lambda: EarlyExit(BACKBONE, [PolicyGate(c, hidden=9).double() for c in WIDTHS]),
            "Inner classifier 0 has 9 classes and the backbone's head 4",
        ),
        (
            lambda: EarlyExit(BACKBONE, EXITS, [InnerClassifier(5, CLASSES).double() for _ in WIDTHS]),
            "Inner classifier 0 does not fit gate 0, whose hidden state has 4 features",
        ),
        *[
            (
                lambda make=make, gates=gates, part=part: make(BACKBONE, gates, [part, part]),
                "classifier 0 is a .*nn.Module",
            )
            for make in (EarlyExit, StopOrForward)
            for gates in (EXITS, [FixedGate(), FixedGate()])
            for part in ("linear", None, torch.relu, nn.Identity)
        ],
        (lambda: EarlyExit(BACKBONE, EXITS, forward_threshold=[0.5]), "Got 1 forward thresholds for 2 gates"),
    ],
)
def test_images_and_parts_that_do_not_fit(call: Callable[[], Any], telling: str) -> None:
    with pytest.raises(DynskipError, match=telling):
        call()


def test_videos_features_are_refused() -> None:
    pooled = tuple(torch.zeros(2, 3, channels, dtype=torch.float64) for channels in WIDTHS)
    with pytest.raises(DynskipError, match=r"expected \(B, 1, C_n\)"):
        MODEL.decide(EncodedVideo(pooled, torch.zeros(2, 3, CLASSES, dtype=torch.float64), (SIZE, SIZE)))
