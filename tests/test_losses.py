from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import CLASSES, SIZE, fields_of, randn, toy_model, toy_video
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynskip import (
    AnytimeLoss,
    BudgetLoss,
    ClassificationLoss,
    DistillationLoss,
    DynskipError,
    EarlyTerminator,
    EfficiencyLoss,
    FLOPsLookup,
    InnerClassificationLoss,
    PolicyGuidanceLoss,
    SelfSupervisionLoss,
    SkipOutput,
    SoFLoss,
    StopOrForward,
    TargetRateLoss,
    UsageUniformityLoss,
    WorthLoss,
)
from dynskip.gates import FORWARD, STOP
from dynskip.losses import (
    anytime_loss,
    budget_loss,
    classification_loss,
    distillation_loss,
    frames_loss,
    random_parts,
    self_supervision_loss,
)

LOOKUP = FLOPsLookup([0.118e9, 0.668e9, 1.028e9, 1.464e9, 0.809e9], 0.002e9, [1e6, 2e6, 3e6, 4e6, 5e6])


def lookup(stages: int) -> FLOPsLookup:
    return FLOPsLookup(LOOKUP.per_stage[:stages].tolist(), LOOKUP.head, LOOKUP.gates[:stages].tolist())


def random_output(
    batch: int, frames: int, stages: int, seed: int, rate: float = 0.6, kind: str = "index"
) -> SkipOutput:
    """Make up a training output. The losses only read its fields."""
    classes = 1 if kind == "one output" else CLASSES
    forward = (torch.rand(batch, frames, stages, generator=torch.Generator().manual_seed(seed)) < rate).double()
    used = forward.prod(-1) > 0.5
    return SkipOutput(
        logits=3 * randn(batch, classes, seed=seed),
        forward=forward,
        used=used,
        stopped_at=torch.where(used, stages, forward.argmin(-1)),
        frame_logits=3 * randn(batch, frames, classes, seed=seed + 1),
        gate_logits=3 * randn(batch, frames, stages, 2, seed=seed + 2),
        inner_logits=3 * randn(batch, frames, stages, classes, seed=seed + 3),
        macs=torch.zeros(batch, dtype=torch.float64),
        fallback_frame=torch.full((batch,), -1),
        evaluated=torch.ones(batch, frames, stages, dtype=torch.bool),
        activation="softmax" if kind in ("index", "mixed") else "sigmoid",
    )


KINDS = ("index", "mixed", "one label", "several labels", "smoothed labels", "one output")


def random_targets(batch: int, seed: int, kind: str = "index") -> Tensor:
    source = torch.Generator().manual_seed(seed)
    index = torch.randint(0, CLASSES, (batch,), generator=source)
    labels = torch.randint(0, 2, (batch, CLASSES), generator=source)
    return {
        "index": index,
        "mixed": torch.rand(batch, CLASSES, generator=source, dtype=torch.float64).softmax(-1),
        "one label": index.to(torch.int32),
        "several labels": labels,
        "smoothed labels": 0.9 * labels + 0.05,
        "one output": labels[:, 0],
    }[kind]


# Eq. 3.8-3.15, written out with plain numbers


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(q) for q in logits]
    return [power / sum(powers) for power in powers]


def sigmoid(logits: list[float]) -> list[float]:
    return [1 / (1 + math.exp(-q)) for q in logits]


def truth(targets: Tensor, video: int, classes: int) -> list[float]:
    """Say how much each class holds."""
    row = targets[video].tolist()
    if isinstance(row, list):
        return [float(share) for share in row]
    return [float(row)] if classes == 1 else [float(k == row) for k in range(classes)]


def cross_entropy(logits: list[float], y: list[float], activation: str) -> float:
    if activation == "softmax":
        return sum(-share * math.log(p) for share, p in zip(y, softmax(logits), strict=True))
    return sum(binary_cross_entropy(p, share) for share, p in zip(y, sigmoid(logits), strict=True)) / len(y)


def binary_cross_entropy(probability: float, label: float) -> float:
    return -label * math.log(probability) - (1 - label) * math.log(1 - probability)


def literal_losses(
    output: SkipOutput,
    targets: Tensor,
    costs: FLOPsLookup,
    *,
    alpha: float = 0.9,
    beta: float = 0.9,
    normalize: bool = False,
    supervise_last: bool = False,
    all_frames: float = 0.0,
) -> dict[str, float]:
    assert output.inner_logits is not None
    assert output.gate_logits is not None
    batch, frames, stages = output.forward.shape
    stage, gate = costs.per_stage.tolist(), costs.gates.tolist()
    whole = sum(stage) + sum(gate) + costs.head
    sums = {"classification": 0.0, "efficiency": 0.0, "inner": 0.0, "self_supervision": 0.0, "all_frames": 0.0}
    for b in range(batch):
        y = truth(targets, b, output.logits.shape[1])
        sums["classification"] += cross_entropy(output.logits[b].tolist(), y, output.activation)  # 3.9

        efficiency = 0.0
        for t in range(frames):
            for n in range(stages):
                f_lookup = whole - sum(stage[: n + 1]) - sum(gate[: n + 1])  # 3.10
                f_lookup /= whole if normalize else 1e9
                efficiency += f_lookup * float(output.forward[b, t, n])
        sums["efficiency"] += efficiency / (frames * stages)  # 3.11

        inner, forwarded = 0.0, 0
        for t in range(frames):
            for n in range(stages):
                if output.forward[b, t, n] == 1:
                    inner += cross_entropy(output.inner_logits[b, t, n].tolist(), y, output.activation)
                    forwarded += 1
        sums["inner"] += inner / forwarded if forwarded else 0.0  # 3.13

        taught = stages if supervise_last else stages - 1
        supervision = 0.0
        for t in range(frames):
            answers = [*output.inner_logits[b, t].tolist(), output.frame_logits[b, t].tolist()]
            confidence = [math.exp(-cross_entropy(answer, y, output.activation)) for answer in answers]
            for n in range(taught):
                label = 1 if confidence[n + 1] > confidence[n] else 0  # 3.14
                probability = softmax(output.gate_logits[b, t, n].tolist())[FORWARD]
                supervision += binary_cross_entropy(probability, label)
        sums["self_supervision"] += supervision / (frames * taught)  # 3.15

        if all_frames:
            sums["all_frames"] += literal_frames_loss(output, b, y, [True] * frames)
    parts = {name: value / batch for name, value in sums.items()}
    parts["guidance"] = beta * parts["inner"] + (1 - beta) * parts["self_supervision"]  # 3.12
    parts["total"] = alpha * parts["classification"] + (1 - alpha) * parts["efficiency"] + parts["guidance"]  # 3.8
    parts["total"] += all_frames * parts["all_frames"]
    return parts


def literal_frames_loss(output: SkipOutput, video: int, y: list[float], counts: list[bool]) -> float:
    """Cross-entropy of the mean over the frames of a video that count."""
    frames = [logits for logits, each in zip(output.frame_logits[video].tolist(), counts, strict=True) if each]
    return cross_entropy([sum(column) / len(frames) for column in zip(*frames, strict=True)], y, output.activation)


shapes = {
    "batch": st.integers(1, 4),
    "frames": st.integers(1, 5),
    "stages": st.integers(2, 5),
    "seed": st.integers(0, 10_000),
    "kind": st.sampled_from(KINDS),
}


@settings(max_examples=100)
@given(
    **shapes,
    alpha=st.floats(0, 1),
    beta=st.floats(0, 1),
    normalize=st.booleans(),
    rate=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    all_frames=st.sampled_from([0.0, 0.4, 2.0]),
)
def test_sof_loss_is_the_equations(
    batch: int,
    frames: int,
    stages: int,
    seed: int,
    kind: str,
    alpha: float,
    beta: float,
    normalize: bool,
    rate: float,
    all_frames: float,
) -> None:
    output, targets, costs = (
        random_output(batch, frames, stages, seed, rate, kind),
        random_targets(batch, seed, kind),
        lookup(stages),
    )
    literal = literal_losses(output, targets, costs, alpha=alpha, beta=beta, normalize=normalize, all_frames=all_frames)
    parts = SoFLoss(costs, alpha, beta, normalize, all_frames).double()(output, targets)
    for field in dataclasses.fields(parts):
        value = getattr(parts, field.name)
        assert value.shape == ()
        # The cost table is kept in single precision.
        assert float(value) == pytest.approx(literal[field.name], rel=1e-6, abs=1e-9), field.name
    assert float(PolicyGuidanceLoss(beta)(output, targets)) == pytest.approx(literal["guidance"])
    assert float(ClassificationLoss()(output, targets)) == pytest.approx(literal["classification"])
    assert float(InnerClassificationLoss()(output, targets)) == pytest.approx(literal["inner"])
    assert float(EfficiencyLoss(costs, normalize)(output)) == pytest.approx(literal["efficiency"], rel=1e-6)


@given(**shapes, supervise_last=st.booleans())
def test_self_supervision_is_the_equations(
    batch: int, frames: int, stages: int, seed: int, kind: str, supervise_last: bool
) -> None:
    output, targets = random_output(batch, frames, stages, seed, kind=kind), random_targets(batch, seed, kind)
    literal = literal_losses(output, targets, lookup(stages), supervise_last=supervise_last)
    assert float(SelfSupervisionLoss(supervise_last)(output, targets)) == pytest.approx(literal["self_supervision"])


@given(**shapes)
def test_worth_is_its_equation(batch: int, frames: int, stages: int, seed: int, kind: str) -> None:
    output, targets = random_output(batch, frames, stages, seed, kind=kind), random_targets(batch, seed, kind)
    assert output.gate_logits is not None
    costs = lookup(stages)
    stage, gate = costs.per_stage.tolist(), costs.gates.tolist()
    whole = sum(stage) + sum(gate) + costs.head
    chance = 0.5 if output.activation == "sigmoid" else 1 / CLASSES
    total = 0.0
    for b, t, n in itertools.product(range(batch), range(frames), range(stages)):
        y = truth(targets, b, output.logits.shape[1])
        confidence = math.exp(-cross_entropy(output.frame_logits[b, t].tolist(), y, output.activation))
        worth = max((confidence - chance) / (1 - chance), 0.0)
        saved = 1 - (sum(stage[: n + 1]) + sum(gate[: n + 1])) / whole
        forward = softmax(output.gate_logits[b, t, n].tolist())[FORWARD]
        total -= worth * math.log(forward) + (1 - worth) * saved * math.log(1 - forward)
    expected = total / (batch * frames * stages)
    assert float(WorthLoss(costs).double()(output, targets)) == pytest.approx(expected, rel=1e-6)


def test_worth_teaches_every_gate_and_not_the_head() -> None:
    model, output, targets = trained_pass()
    loss = WorthLoss(model.lookup_for((SIZE, SIZE)))(output, targets)
    found = reached(model, loss)
    assert not found.pop("inner")
    assert all(found.values())  # the backbone through what gates see
    assert torch.autograd.grad(loss, output.frame_logits, allow_unused=True) == (None,)


def test_an_early_gate_is_charged_more_for_a_useless_frame_than_a_late_one_and_less_than_for_a_telling_one() -> None:
    output, criterion = random_output(1, 1, 3, 0), WorthLoss(lookup(3))
    charged = {}
    for name, logit in (("telling", 9.0), ("useless", -9.0)):
        logits = torch.zeros(1, 1, CLASSES, dtype=torch.float64)
        logits[..., 1] = logit
        margins = torch.zeros(1, 1, 3, 2, dtype=torch.float64, requires_grad=True)
        made = SkipOutput(**{**fields_of(output), "frame_logits": logits, "gate_logits": margins})
        criterion(made, torch.tensor([1])).backward()
        assert margins.grad is not None
        charged[name] = margins.grad[0, 0, :, FORWARD].tolist()
    first, *_, last = charged["useless"]
    assert first > last > 0
    assert all(gradient < -first for gradient in charged["telling"])


def test_a_gate_is_taught_to_stop_where_the_next_classifier_is_not_more_confident() -> None:
    output = random_output(2, 3, 2, 0)
    assert output.inner_logits is not None
    assert output.gate_logits is not None
    output.inner_logits[:, :, 1] = output.inner_logits[:, :, 0]  # equal is not more
    stop = output.gate_logits[:, :, 0].log_softmax(-1)[..., STOP]
    torch.testing.assert_close(SelfSupervisionLoss()(output, random_targets(2, 0)), -stop.mean())


def test_losses_of_a_real_training_pass_are_the_equations() -> None:
    model, targets = toy_model(seed=2).train(), random_targets(4, 0)
    torch.manual_seed(0)
    output = model(toy_video(4, 6))
    costs = model.lookup_for((SIZE, SIZE))
    rounded = dataclasses.replace(output, forward=output.forward.detach().round())
    parts, literal = SoFLoss(costs)(output, targets), literal_losses(rounded, targets, costs)
    for field in dataclasses.fields(parts):
        assert getattr(parts, field.name).item() == pytest.approx(literal[field.name], rel=1e-5)


# Losses of all frames, and of parts of them


@given(
    batch=st.integers(1, 4),
    frames=st.integers(1, 6),
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(KINDS),
    weight=st.sampled_from([0.0, 0.5, 1.0]),
    cut=st.booleans(),
)
def test_the_anytime_loss_is_its_equation(
    batch: int, frames: int, seed: int, kind: str, weight: float, cut: bool
) -> None:
    output, targets = random_output(batch, frames, 2, seed, kind=kind), random_targets(batch, seed, kind)
    real = torch.ones(batch, frames, dtype=torch.bool)
    if cut:
        output.lengths = torch.randint(1, frames + 1, (batch,), generator=torch.Generator().manual_seed(seed))
        real = torch.arange(frames) < output.lengths[:, None]
        output.frame_logits[~real] = math.nan
    torch.manual_seed(seed)
    drawn, first = random_parts(real)
    expected = 0.0
    for b in range(batch):
        y = truth(targets, b, output.logits.shape[1])
        every, some, start = (literal_frames_loss(output, b, y, part[b].tolist()) for part in (real, drawn, first))
        expected += (every + weight * (some + start) / 2) / batch
    torch.manual_seed(seed)
    assert AnytimeLoss(weight)(output, targets).item() == pytest.approx(expected, abs=1e-12)
    torch.manual_seed(seed)
    loss = anytime_loss(output.frame_logits, targets, output.activation, output.lengths, weight)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_parts_of_a_video_have_any_size_alike() -> None:
    torch.manual_seed(0)
    real = (torch.arange(6) < torch.tensor([5, 2])[:, None]).repeat(3000, 1)
    for part in random_parts(real):
        assert not (part & ~real).any()
        for row, length in ((0, 5), (1, 2)):
            sizes = part[row::2].sum(1).bincount(minlength=length + 1) / 3000
            torch.testing.assert_close(sizes[1:], torch.full((length,), 1 / length), atol=0.04, rtol=0)
            assert sizes[0] == 0
    drawn, first = random_parts(real)
    assert (first[:, 1:] <= first[:, :-1]).all()  # no gap
    torch.testing.assert_close(drawn[::2].float().mean(0)[:5], torch.full((5,), 0.6), atol=0.04, rtol=0)


def test_the_anytime_loss_teaches_the_backbone_alone() -> None:
    model = toy_model(seed=2).train()
    output, targets = model(toy_video(6, 8), dense=True), random_targets(6, 0)
    parameters = [*model.gates.parameters(), *model.inner.parameters()]  # type: ignore[union-attr]
    gradients = torch.autograd.grad(AnytimeLoss()(output, targets), parameters, allow_unused=True, retain_graph=True)
    assert all(gradient is None for gradient in gradients)
    torch.manual_seed(0)
    (gradient,) = torch.autograd.grad(AnytimeLoss()(output, targets), output.frame_logits)
    assert gradient.any(-1).all()  # of every frame
    plain = torch.autograd.grad(AnytimeLoss(0.0)(output, targets), list(model.backbone.parameters()), retain_graph=True)
    wanted = torch.autograd.grad(ClassificationLoss()(output, targets), list(model.backbone.parameters()))
    assert any(gradient.any() for gradient in wanted)
    torch.testing.assert_close(plain, wanted)


def test_all_frames_teach_the_backbone_what_stopped_ones_show() -> None:
    model, output, targets = trained_pass()
    parts = SoFLoss(model.lookup_for((SIZE, SIZE)), all_frames=0.5)(output, targets)
    (gradient,) = torch.autograd.grad(parts.all_frames, output.frame_logits, retain_graph=True)
    assert gradient.any(-1).all()
    found = reached(model, parts.all_frames)
    assert found.pop("backbone")
    assert not any(found.values())


def test_frames_that_do_not_count_pass_no_gradient_and_no_nan() -> None:
    logits, frames = randn(1, 3, CLASSES, seed=0), torch.tensor([[True, False, True]])
    logits[0, 1] = math.nan
    loss = frames_loss(logits.requires_grad_(), frames, torch.tensor([1]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, [0, 2]].all()
    assert not gradient[0, 1].any()
    assert frames_loss(logits, torch.zeros_like(frames), torch.tensor([1])).isnan()


def test_guidance_can_be_left_out() -> None:
    output, targets = random_output(2, 3, 3, 0), random_targets(2, 0)
    literal = literal_losses(output, targets, lookup(3))
    without = dataclasses.replace(output, inner_logits=None)
    parts = SoFLoss(lookup(3), alpha=0.7, beta=None)(without, targets)
    expected = 0.7 * literal["classification"] + 0.3 * literal["efficiency"]
    assert float(parts.total) == pytest.approx(expected, rel=1e-6)
    assert float(parts.inner) == float(parts.self_supervision) == 0.0


def test_other_units_are_taken_as_they_are() -> None:
    output = random_output(2, 3, 2, 0, rate=1.0)
    milliseconds = FLOPsLookup([2.0, 3.0], 1.0, unit="ms")
    assert float(EfficiencyLoss(milliseconds)(output)) == pytest.approx((4.0 + 1.0) / 2)
    assert float(EfficiencyLoss(milliseconds, normalize=True)(output)) == pytest.approx((4.0 + 1.0) / 2 / 6.0)


def test_one_gate_can_only_be_taught_by_the_head() -> None:
    output, targets = random_output(2, 3, 1, 0), random_targets(2, 0)
    literal = literal_losses(output, targets, lookup(1), supervise_last=True)
    loss = SelfSupervisionLoss(supervise_last=True)(output, targets)
    assert float(loss) == pytest.approx(literal["self_supervision"])
    with pytest.raises(DynskipError, match="compares each gate with the next one; it needs at least two gates"):
        SelfSupervisionLoss()(output, targets)


# Outputs that are masked


def test_gates_that_were_not_evaluated_count_for_nothing() -> None:
    """An eval output of `decide` has NaN where nothing ran: the losses are means over the rest."""
    model = toy_model(seed=2, terminator=EarlyTerminator(0.6, 2)).eval()
    with torch.no_grad():
        output, targets = model.decide(model.encode(toy_video(4, 8))), random_targets(4, 1)
    assert output.inner_logits is not None
    assert output.gate_logits is not None
    assert not output.evaluated.all()
    for supervise_last in (False, True):
        losses = []
        for b, t, n in output.evaluated.nonzero().tolist():
            y = int(targets[b])
            following = output.inner_logits[b, t, n + 1] if n < 2 else output.frame_logits[b, t]
            if following.isnan().any() or (n == 2 and not supervise_last):
                continue
            gain = following.softmax(-1)[y] > output.inner_logits[b, t, n].softmax(-1)[y]
            probability = float(output.gate_logits[b, t, n].softmax(-1)[FORWARD])
            losses.append(binary_cross_entropy(probability, int(gain)))
        loss = SelfSupervisionLoss(supervise_last)(output, targets)
        assert float(loss) == pytest.approx(sum(losses) / len(losses))
    parts = SoFLoss(model.lookup_for((SIZE, SIZE)), all_frames=1.0)(output, targets)
    assert parts.total.isfinite()
    ran = ~output.frame_logits.isnan().any(-1)
    assert not ran.all()
    expected = [literal_frames_loss(output, b, truth(targets, b, CLASSES), ran[b].tolist()) for b in range(4)]
    assert float(parts.all_frames) == pytest.approx(sum(expected) / 4)


def test_masked_gates_pass_no_gradient_and_no_nan() -> None:
    margins = torch.tensor([[[1.0, math.nan, 2.0]]]).requires_grad_()
    labels, mask = torch.tensor([[[1.0, 0.0, 0.0]]]), torch.tensor([[[True, False, True]]])
    loss = self_supervision_loss(margins, labels, mask)
    loss.backward()
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2)
    assert margins.grad is not None
    assert margins.grad.isfinite().all()
    assert margins.grad[0, 0, 1] == 0
    assert self_supervision_loss(margins, labels, torch.zeros_like(mask)).item() == 0


def test_a_video_that_forwards_nothing_adds_nothing_to_the_inner_loss() -> None:
    output = random_output(2, 3, 2, 0, rate=1.0)
    output.forward[0] = 0.0
    literal = literal_losses(output, random_targets(2, 0), lookup(2))
    assert float(InnerClassificationLoss()(output, random_targets(2, 0))) == pytest.approx(literal["inner"])
    output.forward[1] = 0.0
    assert float(InnerClassificationLoss()(output, random_targets(2, 0))) == 0.0


# Where gradients go


def reached(model: StopOrForward, loss: Tensor) -> dict[str, bool]:
    """Tell which parts of a model get gradients from a loss."""
    parts: dict[str, nn.Module | None] = {"backbone": model.backbone, "inner": model.inner}
    for n, gate in enumerate(model.gates):
        parts[f"cell {n}"], parts[f"decide {n}"] = gate.cell, gate.decide
    found = {}
    for name, part in parts.items():
        assert part is not None
        gradients = torch.autograd.grad(loss, list(part.parameters()), allow_unused=True, retain_graph=True)
        found[name] = any(g is not None and bool(g.any()) for g in gradients)
        assert all(g is None or g.isfinite().all() for g in gradients)
    return found


def trained_pass(detach: bool = True) -> tuple[StopOrForward, SkipOutput, Tensor]:
    model = toy_model(seed=2, detach=detach, share=0.9).train()
    torch.manual_seed(0)
    output = model(toy_video(6, 8))
    assert 0 < output.used.sum() < 48
    return model, output, random_targets(6, 0)


def everywhere(found: dict[str, bool], part: str) -> bool:
    return all(value for name, value in found.items() if name.startswith(part))


def nowhere(found: dict[str, bool], part: str) -> bool:
    return not any(value for name, value in found.items() if name.startswith(part))


def test_classification_teaches_backbone_and_gates() -> None:
    model, output, targets = trained_pass()
    found = reached(model, ClassificationLoss()(output, targets))
    assert found["backbone"]
    assert everywhere(found, "decide")
    assert everywhere(found, "cell")
    assert not found["inner"]


def test_efficiency_teaches_gates() -> None:
    model, output, _ = trained_pass()
    costs = model.lookup_for((SIZE, SIZE))
    found = reached(model, EfficiencyLoss(costs)(output))
    assert everywhere(found, "decide")
    assert everywhere(found, "cell")
    assert not found["inner"]
    # Only down: forwarding more costs more, at every gate.
    for n, gate in enumerate(model.gates):
        (gradient,) = torch.autograd.grad(EfficiencyLoss(costs)(output), gate.decide.bias, retain_graph=True)
        assert gradient[FORWARD] > 0 > gradient[STOP], n


def test_self_supervision_teaches_all_gates_but_the_last() -> None:
    model, output, targets = trained_pass()
    found = reached(model, SelfSupervisionLoss()(output, targets))
    assert found["decide 0"]
    assert found["decide 1"]
    assert not found["decide 2"]
    assert not found["inner"]
    found = reached(model, SelfSupervisionLoss(supervise_last=True)(output, targets))
    assert everywhere(found, "decide")
    assert not found["inner"]


def test_self_supervision_labels_carry_no_gradient_into_the_head() -> None:
    model, output, targets = trained_pass()
    loss = SelfSupervisionLoss(supervise_last=True)(output, targets)
    *_, head = model.backbone.model.children()
    gradients = torch.autograd.grad(loss, list(head.parameters()), allow_unused=True)
    assert all(g is None for g in gradients)


def test_inner_classification_teaches_inner_classifiers_only() -> None:
    model, output, targets = trained_pass()
    found = reached(model, InnerClassificationLoss()(output, targets))
    assert found.pop("inner")
    assert not any(found.values())


def test_inner_classification_also_teaches_memory_if_asked_to() -> None:
    model, output, targets = trained_pass(detach=False)
    found = reached(model, InnerClassificationLoss()(output, targets))
    assert found["inner"]
    assert everywhere(found, "cell")
    assert nowhere(found, "decide")


def test_total_teaches_everything() -> None:
    model, output, targets = trained_pass()
    found = reached(model, SoFLoss(model.lookup_for((SIZE, SIZE)))(output, targets).total)
    assert all(found.values())


def test_a_step_down_the_gradient_lowers_the_loss() -> None:
    model, targets = toy_model(seed=2, inner=True).train(), random_targets(6, 0)
    video, criterion = toy_video(6, 8), SoFLoss(toy_model(seed=2).lookup_for((SIZE, SIZE)))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(15):
        torch.manual_seed(0)
        loss = criterion(model(video), targets).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_the_cost_table_follows_the_module_and_stays_out_of_its_state() -> None:
    criterion = SoFLoss(lookup(3))
    assert not criterion.state_dict()
    assert not list(criterion.parameters())
    moved: Any = criterion.to("meta")
    assert moved.efficiency.remaining.device.type == "meta"


# Losses of other methods, written out with plain numbers


def literal_outcomes(output: SkipOutput) -> list[int]:
    """Return for every frame the first gate that stops it, or the number of gates."""
    stages = output.num_stages
    frames = output.forward.flatten(0, 1).tolist()
    return [next((n for n in range(stages) if frame[n] == 0), stages) for frame in frames]


@given(**shapes, rate=st.sampled_from([0.0, 0.3, 0.8, 1.0]), budget=st.floats(0.05, 1.0))
def test_rates_usage_and_budget_are_their_definitions(
    batch: int, frames: int, stages: int, seed: int, kind: str, rate: float, budget: float
) -> None:
    output, costs = random_output(batch, frames, stages, seed, rate, kind), lookup(stages)
    count = batch * frames
    targets = [0.1 + 0.8 * n / stages for n in range(stages)]
    rates = [sum(output.forward[..., n].flatten().tolist()) / count for n in range(stages)]
    expected = sum((r - target) ** 2 for r, target in zip(rates, targets, strict=True))
    assert TargetRateLoss(targets)(output).item() == pytest.approx(expected, abs=1e-15)
    assert TargetRateLoss(0.4)(output).item() == pytest.approx(sum((r - 0.4) ** 2 for r in rates), abs=1e-15)

    outcomes = literal_outcomes(output)
    shares = [outcomes.count(n) / count for n in range(stages + 1)]
    uniformity = sum((share - 1 / (stages + 1)) ** 2 for share in shares)
    assert UsageUniformityLoss()(output).item() == pytest.approx(uniformity, abs=1e-15)

    stage, gate = costs.per_stage.tolist(), costs.gates.tolist()
    spent = 0.0
    for outcome in outcomes:
        ran = range(min(outcome + 1, stages))
        spent += sum(stage[n] + gate[n] for n in ran) + (costs.head if outcome == stages else 0.0)
    share = spent / count / (sum(stage) + costs.head)
    assert BudgetLoss(costs, budget)(output).item() == pytest.approx(max(0.0, share - budget), abs=1e-12)


@given(**shapes, temperature=st.sampled_from([0.5, 1.0, 3.0]), holes=st.booleans())
def test_distillation_is_the_divergence_from_the_head(
    batch: int, frames: int, stages: int, seed: int, kind: str, temperature: float, holes: bool
) -> None:
    output = random_output(batch, frames, stages, seed, kind=kind)
    assert output.inner_logits is not None
    if holes:
        output.inner_logits[0, 0, 0] = math.nan
        output.frame_logits[-1, -1] = math.nan
    total, count = 0.0, 0
    for b in range(batch):
        for t in range(frames):
            head = [q / temperature for q in output.frame_logits[b, t].tolist()]
            for n in range(stages):
                inner = [q / temperature for q in output.inner_logits[b, t, n].tolist()]
                if any(math.isnan(q) for q in head + inner):
                    continue
                count += 1
                if output.activation == "softmax":
                    total += sum(p * math.log(p / q) for p, q in zip(softmax(head), softmax(inner), strict=True))
                    continue
                for sign in (1, -1):  # the class holds, or not
                    both = (sigmoid([sign * logit for logit in logits]) for logits in (head, inner))
                    total += sum(p * math.log(p / q) for p, q in zip(*both, strict=True)) / len(head)
    expected = temperature**2 * total / count if count else 0.0
    assert DistillationLoss(temperature)(output).item() == pytest.approx(expected, abs=1e-12)


def test_distillation_teaches_inner_classifiers_and_never_the_head() -> None:
    inner, final = randn(2, 3, 2, CLASSES, seed=0).requires_grad_(), randn(2, 3, CLASSES, seed=1).requires_grad_()
    mask = torch.ones(2, 3, 2, dtype=torch.bool)
    mask[0, 0, 0] = False
    with torch.no_grad():
        inner[0, 0, 0] = math.nan
    loss = distillation_loss(inner, final, mask=mask)
    (gradient,) = torch.autograd.grad(loss, inner, retain_graph=True)
    assert gradient.isfinite().all()
    assert not gradient[0, 0, 0].any()
    assert gradient[0, 0, 1].any()
    assert torch.autograd.grad(loss, final, allow_unused=True) == (None,)
    assert distillation_loss(inner, final, mask=torch.zeros_like(mask)).item() == 0
    same = final.detach()[:, :, None].expand(2, 3, 2, CLASSES)
    assert distillation_loss(same, final).item() == pytest.approx(0, abs=1e-12)


def test_rates_usage_and_budget_teach_gates_and_nothing_else() -> None:
    model, output, _ = trained_pass()
    costs = model.lookup_for((SIZE, SIZE))
    for criterion in (TargetRateLoss(0.2), UsageUniformityLoss(), BudgetLoss(costs, 0.1)):
        found = reached(model, criterion(output))
        assert everywhere(found, "decide"), criterion
        assert not found["inner"], criterion


def test_gradients_push_towards_the_target_and_vanish_within_the_budget() -> None:
    forward = torch.full((2, 3, 2), 0.8, dtype=torch.float64, requires_grad=True)
    output = dataclasses.replace(random_output(2, 3, 2, 0), forward=forward)
    (up,) = torch.autograd.grad(TargetRateLoss(0.9)(output), forward)
    (down,) = torch.autograd.grad(TargetRateLoss([0.7, 0.1])(output), forward)
    assert (up < 0).all()
    assert (down > 0).all()
    costs = torch.tensor([1.0, 2.0], dtype=torch.float64)
    (over,) = torch.autograd.grad(budget_loss(forward, costs, 1.0, 0.5), forward)
    (within,) = torch.autograd.grad(budget_loss(forward, costs, 1.0, 9.0), forward)
    assert (over > 0).all()
    assert not within.any()


def test_other_losses_say_what_they_want() -> None:
    assert repr(TargetRateLoss([0.25, 0.5])) == "TargetRateLoss(target=0.25, 0.5)"
    assert repr(BudgetLoss(lookup(3), 0.5)) == "BudgetLoss(budget=0.5 of the dense cost)"
    assert repr(DistillationLoss(2.0)) == "DistillationLoss(temperature=2)"


# Devices


@pytest.mark.parametrize(
    "criterion",
    [
        ClassificationLoss(),
        AnytimeLoss(),
        InnerClassificationLoss(),
        SelfSupervisionLoss(),
        SelfSupervisionLoss(supervise_last=True),
        PolicyGuidanceLoss(),
        SoFLoss(lookup(3)),
        SoFLoss(lookup(3), all_frames=1.0),
        WorthLoss(lookup(3)),
    ],
    ids=lambda criterion: criterion.__class__.__name__,
)
def test_targets_follow_the_output_to_its_device(criterion: nn.Module) -> None:
    output = random_output(2, 3, 3, 0)
    moved: dict[str, Any] = {
        name: x.to("meta") if isinstance(x, Tensor) else x for name, x in fields_of(output).items()
    }
    for activation, targets in (("softmax", torch.tensor([0, 3])), ("sigmoid", torch.eye(CLASSES)[:2])):
        loss = criterion.to("meta")(SkipOutput(**{**moved, "activation": activation}), targets)
        assert getattr(loss, "total", loss).device.type == "meta"


# Other targets


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16])
def test_class_indices_of_any_integer_dtype(dtype: torch.dtype) -> None:
    output, targets = random_output(3, 2, 3, 0), random_targets(3, 0)
    expected = SoFLoss(lookup(3))(output, targets).total
    assert SoFLoss(lookup(3))(output, targets.to(dtype)).total == expected


def test_softmax_rows_of_one_class_are_class_indices() -> None:
    output, targets = random_output(3, 2, 3, 0), random_targets(3, 0)
    expected = SoFLoss(lookup(3))(output, targets).total
    for dtype in (torch.float64, torch.float32, torch.int64, torch.bool):
        assert SoFLoss(lookup(3))(output, torch.eye(CLASSES)[targets].to(dtype)).total == expected
    assert ClassificationLoss()(output, targets).item() == pytest.approx(
        nn.functional.cross_entropy(output.logits, targets).item(), abs=1e-15
    )


def test_targets_of_timms_mixup_and_label_smoothing() -> None:
    from timm.data import Mixup

    output, labels = random_output(4, 2, 3, 0), random_targets(4, 0)
    _, mixed = Mixup(mixup_alpha=0.8, label_smoothing=0.1, num_classes=CLASSES)(torch.zeros(4, 3, 8, 8), labels)
    expected = -(mixed * output.logits.log_softmax(-1)).sum(-1).mean()
    assert ClassificationLoss()(output, mixed).item() == pytest.approx(expected.item(), rel=1e-6)
    assert SoFLoss(lookup(3))(output, mixed).total.isfinite()
    smooth = 0.9 * torch.eye(CLASSES)[labels] + 0.1 / CLASSES
    wanted = nn.functional.cross_entropy(output.logits, labels, label_smoothing=0.1)
    assert ClassificationLoss()(output, smooth).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_a_class_that_does_not_hold_may_be_ruled_out() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf]], requires_grad=True)
    loss = classification_loss(logits, torch.tensor([0]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1 + math.e))
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_several_labels_teach_as_one_does() -> None:
    model, _, _ = trained_pass()
    model.activation = "sigmoid"
    torch.manual_seed(0)
    output = model(toy_video(6, 8))
    targets = random_targets(6, 0, "several labels")
    assert all(reached(model, SoFLoss(model.lookup_for((SIZE, SIZE)))(output, targets).total).values())
    distilled = reached(model, DistillationLoss()(output))
    assert distilled.pop("inner")
    assert not any(distilled.values())


# Bad input


def one_class(output: SkipOutput) -> SkipOutput:
    """Keep only the first class, as a model with one output gives it."""
    narrow = {"logits", "frame_logits", "inner_logits"}
    fields = {name: x[..., :1] if name in narrow and x is not None else x for name, x in fields_of(output).items()}
    return SkipOutput(**fields)


ONE_CLASS = (
    r"one output, and the softmax of a single logit is always 1.*activation='sigmoid', or give it two outputs, one of "
    r'them for "no" \(num_classes=2\)'
)


def without_inner(output: SkipOutput) -> SkipOutput:
    return SkipOutput(**{**fields_of(output), "inner_logits": None})


OUTPUT = random_output(2, 3, 3, 0)
GOOD, ZEROS = torch.tensor([0, 3]), torch.tensor([0, 0])


@pytest.mark.parametrize(
    ("call", "telling"),
    [
        (
            lambda: ClassificationLoss()(OUTPUT, torch.tensor([0, 4])),
            r"range from 0 to 4, and there are 4 classes \(0 to 3\)",
        ),
        (lambda: ClassificationLoss()(OUTPUT, torch.tensor([-1, 2])), "range from -1 to 2"),
        (lambda: InnerClassificationLoss()(OUTPUT, torch.tensor([0, 9])), "range from 0 to 9"),
        (lambda: SelfSupervisionLoss()(OUTPUT, torch.tensor([0, 9])), "range from 0 to 9"),
        (
            lambda: SoFLoss(lookup(3))(OUTPUT, torch.tensor([0])),
            r"2 class indices of shape \(B,\), integer, or rows of shape \(B, K\) = \(2, 4\) .*; got \(1,\)",
        ),
        (lambda: SoFLoss(lookup(3))(OUTPUT, torch.eye(3)[:2]), r"= \(2, 4\) .* got \(2, 3\) torch.float32"),
        (lambda: SoFLoss(lookup(3))(OUTPUT, 2 * torch.eye(4)[:2]), "Targets hold 2; give how much each class holds"),
        (lambda: SoFLoss(lookup(3))(OUTPUT, torch.full((2, 4), math.nan)), "Targets hold nan"),
        (
            lambda: SoFLoss(lookup(3))(OUTPUT, torch.tensor([[1, 0, 1, 0], [0, 0, 1, 0]])),
            r"adds up to 2; expected 1\. Where several classes can hold at once, build the model with activation='sigm",
        ),
        (lambda: SoFLoss(lookup(3))(OUTPUT, torch.zeros(2, 4)), r"adds up to 0; expected 1"),
        (lambda: SoFLoss(lookup(3))(OUTPUT, torch.tensor([True, False])), r"got \(2,\) torch.bool"),
        (lambda: SoFLoss(lookup(3))(OUTPUT, GOOD.float()), r"got \(2,\) torch.float32"),
        (
            lambda: EfficiencyLoss(lookup(2))(OUTPUT),
            "table has 2 stages and the output 3; measure a table for this model",
        ),
        (
            lambda: InnerClassificationLoss()(without_inner(OUTPUT), GOOD),
            r"reads inner classifiers.*`inner=\[\.\.\.\]`",
        ),
        (
            lambda: SelfSupervisionLoss()(without_inner(OUTPUT), GOOD),
            "reads inner classifiers, and the output has none",
        ),
        (lambda: TargetRateLoss(1.2), r"target=1.2 is out of range; give a number in \[0, 1\]"),
        (lambda: TargetRateLoss([]), r"target=\[\] is out of range"),
        (lambda: TargetRateLoss([0.5, 0.5])(OUTPUT), "Got 2 target rates for 3 gates; give one number or one a gate"),
        (lambda: BudgetLoss(lookup(3), 0.0), "budget=0.0 is out of range; give a share of the dense network's cost"),
        (lambda: BudgetLoss(lookup(2), 0.5)(OUTPUT), "table has 2 stages and the output 3"),
        (lambda: DistillationLoss(0.0), "temperature=0.0 has to be a finite positive number"),
        (lambda: DistillationLoss(-1.0), "temperature=-1.0 has to be a finite positive number"),
        (lambda: DistillationLoss(math.inf), "temperature=inf has to be a finite positive number"),
        (lambda: DistillationLoss(math.nan), "temperature=nan has to be a finite positive number"),
        (lambda: DistillationLoss()(without_inner(OUTPUT)), "reads inner classifiers, and the output has none"),
        (lambda: SoFLoss(lookup(3), alpha=1.1), r"alpha=1.1 is out of range; give a number in \[0, 1\]"),
        (lambda: SoFLoss(lookup(3), beta=-0.1), "beta=-0.1 is out of range"),
        (lambda: SoFLoss(lookup(3), all_frames=-1.0), "all_frames=-1.0 is out of range; give a weight, 0 or more"),
        (lambda: AnytimeLoss(math.inf), "weight=inf is out of range; give a weight, 0 or more"),
        (lambda: AnytimeLoss()(OUTPUT, torch.tensor([0, 4])), "range from 0 to 4, and there are 4 classes"),
        (lambda: PolicyGuidanceLoss(math.nan), "beta=nan is out of range"),
        (lambda: ClassificationLoss()(one_class(OUTPUT), ZEROS), ONE_CLASS),
        (lambda: InnerClassificationLoss()(one_class(OUTPUT), ZEROS), ONE_CLASS),
        (lambda: SelfSupervisionLoss()(one_class(OUTPUT), ZEROS), ONE_CLASS),
        (lambda: SoFLoss(lookup(3), beta=None)(one_class(OUTPUT), ZEROS), ONE_CLASS),
        (lambda: DistillationLoss()(one_class(OUTPUT)), ONE_CLASS),
    ],
)
def test_losses_refuse_what_does_not_fit(call: Callable[[], Any], telling: str) -> None:
    with pytest.raises(DynskipError, match=telling):
        call()


def test_the_skipping_pass_cannot_be_trained_on() -> None:
    model = toy_model()
    with pytest.raises(DynskipError, match="the skipping pass leaves inner classifiers out"):
        SoFLoss(model.lookup_for((SIZE, SIZE)))(model(toy_video(2)), GOOD)
