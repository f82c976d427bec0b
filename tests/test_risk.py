"""Thresholds with a guarantee: the tests behind it, by enumeration, and what `to_risk` does with them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import CLASSES, generator, toy_backbone
from torch import Tensor, nn

from dynskip import DynskipError, EarlyTerminator, EncodedVideo, StopOrForward, calibrate
from dynskip.calibrate._risk import p_value

FRAMES = 5


class First(nn.Module):
    """A gate that reads the first feature."""

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return ()

    def forward(self, pooled: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return torch.stack([torch.zeros(len(pooled)), 2 * pooled[:, 0]], 1), state


def one_gate(terminator: EarlyTerminator | None = None, **options: Any) -> StopOrForward:
    return StopOrForward(toy_backbone(0, 1), [First()], terminator=terminator, **options).eval()


def draw(videos: int, seed: int = 0, noise: float = 1.0) -> tuple[EncodedVideo, Tensor]:
    """Draw videos in which half of the frames show a class; the gate's feature tells that, more or less."""
    source = generator(seed)
    labels = torch.randint(CLASSES, (videos,), generator=source)
    shows = torch.rand(videos, FRAMES, generator=source) < 0.5
    logits = noise * torch.randn(videos, FRAMES, CLASSES, generator=source)
    logits = logits + 3.0 * shows[..., None] * nn.functional.one_hot(labels, CLASSES)[:, None]
    pooled = torch.randn(videos, FRAMES, 6, generator=source)
    pooled[..., 0] += 2.0 * shows - 1
    return EncodedVideo((pooled,), logits, (8, 8)), labels


def answers(model: StopOrForward, encoded: EncodedVideo) -> Tensor:
    found: Tensor = model.decide(encoded).logits.argmax(-1)
    return found


def binomial(n: int, p: float) -> list[float]:
    return [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]


@pytest.mark.parametrize("risk", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("videos", [1, 30, 200])
def test_p_values_of_lost_videos_are_exact(videos: int, risk: float) -> None:
    chances = binomial(videos, risk)
    for lost in range(0, videos + 1, max(1, videos // 30)):
        assert p_value(lost / videos, videos, risk, exact=True) == pytest.approx(sum(chances[: lost + 1]), rel=1e-9)


@pytest.mark.parametrize("amount", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("exact", [False, True])
def test_a_true_hypothesis_is_refuted_no_more_often_than_delta(amount: float, exact: bool) -> None:
    if exact and amount < 1:
        return
    videos, risk = 60, 0.1  # a video loses `amount` with a probability that makes the expected loss the risk
    chances = binomial(videos, risk / amount)
    values = [p_value(amount * lost / videos, videos, risk, exact) for lost in range(videos + 1)]
    assert values == sorted(values)
    for delta in (0.01, 0.05, 0.1, 0.3):
        refuted = sum(chance for chance, value in zip(chances, values, strict=True) if value <= delta)
        assert refuted <= delta
        assert (
            not exact or refuted + chances[sum(value <= delta for value in values)] > delta
        )  # and no later than needed


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_what_passes_loses_as_little_as_it_says(ends: bool, apart: bool) -> None:
    model = one_gate(EarlyTerminator(0.9, 1) if ends else None)
    encoded, _ = draw(400)
    own, terminator = model.forward_threshold, model.terminator
    other: dict[str, Any] = {"learning": [draw(200, seed=1)]} if apart else {}
    found = calibrate.to_risk(model, [(encoded, torch.zeros(400))], 0.1, 0.1, **other)
    assert (model.forward_threshold, model.terminator) == (own, terminator)
    assert found.point == found.curve[0]
    assert found.dense.accuracy == 1.0
    assert found.point.macs < found.dense.macs
    assert (found.point.termination_threshold is not None) == ends
    tested = 400 if apart else 300
    assert all(p_value(1 - point.accuracy, tested, 0.1, exact=True) <= 0.1 for point in found.curve)
    if apart:
        found.apply(model)
        lost = answers(model, encoded) != encoded.frame_logits.mean(1).argmax(-1)
        assert 1 - found.point.accuracy == pytest.approx(float(lost.double().mean()))


def test_the_learning_videos_alone_choose_the_path() -> None:
    model, learning = one_gate(EarlyTerminator(0.9, 1)), [draw(200, seed=1)]
    paths = []
    for seed in (2, 3):
        curve = calibrate.to_risk(model, [draw(400, seed)], 0.1, learning=learning).curve
        paths.append([(point.forward_threshold, point.termination_threshold) for point in reversed(curve)])
    shorter = min(map(len, paths))
    assert shorter > 3
    assert paths[0][:shorter] == paths[1][:shorter]


def test_more_risk_is_cheaper() -> None:
    model, batches, learning = one_gate(), [draw(600)], [draw(200, seed=1)]
    costs = [calibrate.to_risk(model, batches, risk, learning=learning).point.macs for risk in (0.03, 0.1, 0.3)]
    assert costs[0] > costs[1] > costs[2]


def test_the_expected_loss_stays_within_the_risk() -> None:
    model, (population, _) = one_gate(), draw(4000, seed=5)
    full = population.frame_logits.mean(1).argmax(-1)
    violations = 0
    for seed in range(20):
        calibrate.to_risk(model, [draw(150, seed=100 + seed)], 0.1, 0.1).apply(model)
        violations += float((answers(model, population) != full).double().mean()) > 0.1
        model.forward_threshold = 0.5
    assert violations <= 5  # more have a probability of 0.011 where each has one of 0.1


def test_labels_count_only_what_the_full_network_knows() -> None:
    model = one_gate()
    encoded, labels = draw(500, noise=2.0)
    several = nn.functional.one_hot(labels, CLASSES)
    learning = [draw(200, 1, noise=2.0)]
    found = calibrate.to_risk(model, [(encoded, labels)], 0.05, loss="labels", learning=learning)
    hot = [(encoded, nn.functional.one_hot(labels, CLASSES)) for encoded, labels in learning]
    assert found == calibrate.to_risk(model, [(encoded, several)], 0.05, loss="labels", learning=hot)
    found.apply(model)
    right = encoded.frame_logits.mean(1).argmax(-1) == labels
    lost = right & (answers(model, encoded) != labels)
    assert 1 - found.point.accuracy == pytest.approx(float(lost.double().mean()))
    assert not right.all()


def test_a_loss_of_your_own() -> None:
    def distance(probabilities: Tensor, full: Tensor, targets: Tensor) -> Tensor:
        return (probabilities - full).abs().sum(-1) / 2

    model, batches = one_gate(), [draw(800)]
    found = calibrate.to_risk(model, batches, 0.2, loss=distance)
    assert all(p_value(1 - point.accuracy, 600, 0.2, exact=False) <= 0.1 for point in found.curve)
    for wrong in (lambda p, full, t: p, lambda p, full, t: p.sum(-1) + 1):
        with pytest.raises(DynskipError, match=r"has to give a number in \[0, 1\] for each of"):
            calibrate.to_risk(model, batches, 0.2, loss=wrong)


def test_sigmoids_answer_with_sets_of_classes() -> None:
    model = one_gate(activation="sigmoid")
    encoded, labels = draw(600)
    found = calibrate.to_risk(model, [(encoded, nn.functional.one_hot(labels, CLASSES))], 0.3, learning=[draw(200, 1)])
    found.apply(model)
    lost = ((model.decide(encoded).logits > 0) != (encoded.frame_logits.mean(1) > 0)).any(-1)
    assert 1 - found.point.accuracy == pytest.approx(float(lost.double().mean()))


@pytest.mark.parametrize("hot", [False, True])
def test_sets_of_labels(hot: bool) -> None:
    model = one_gate(activation="sigmoid")
    encoded, labels = draw(400, noise=0.5)
    several = nn.functional.one_hot(labels, CLASSES)
    targets = several if hot else labels
    found = calibrate.to_risk(model, [(encoded, targets)], 0.2, loss="labels", learning=[draw(200, 1, noise=0.5)])
    found.apply(model)
    full, now = (
        ((x > 0) == several.bool()).all(-1) for x in (encoded.frame_logits.mean(1), model.decide(encoded).logits)
    )
    assert 0 < full.sum() < 400
    assert 1 - found.point.accuracy == pytest.approx(float((full & ~now).double().mean()))


@pytest.mark.parametrize(("risk", "delta", "least"), [(0.02, 0.1, 114), (0.1, 0.05, 29)])
def test_too_few_videos_says_how_many_would_do(risk: float, delta: float, least: int) -> None:
    model = one_gate()
    encoded, labels = draw(200, noise=0.0)
    same = EncodedVideo(encoded.pooled, encoded.frame_logits[:, :1].expand(-1, FRAMES, -1), (8, 8))  # nothing is lost

    def batches(count: int) -> list[tuple[EncodedVideo, Tensor]]:
        return [(EncodedVideo((same.pooled[0][:count],), same.frame_logits[:count], (8, 8)), labels[:count])]

    with pytest.raises(DynskipError, match=rf"Too few calibration videos: .* it takes {least} even if") as error:
        calibrate.to_risk(model, batches(least), risk, delta)
    enough = int(str(error.value).split("Give at least ")[1].split()[0])
    assert calibrate.to_risk(model, batches(enough), risk, delta).point.accuracy == 1.0
    with pytest.raises(DynskipError, match=f"Give at least {least} videos"):
        calibrate.to_risk(model, batches(least - 1), risk, delta, learning=batches(200))


@pytest.mark.parametrize(
    ("share", "telling"), [(0.03, "about ([0-9]+) calibration videos would do"), (0.5, "More videos will not help")]
)
def test_where_nothing_passes_it_says_why(share: float, telling: str) -> None:
    model, batches, learning = one_gate(), [draw(40)], [draw(100, seed=1)]

    def same(probabilities: Tensor, full: Tensor, targets: Tensor) -> Tensor:
        return torch.full_like(full[:, 0], share)

    with pytest.raises(DynskipError, match=telling) as error:
        calibrate.to_risk(model, batches, 0.06, loss=same, learning=learning)
    if share < 0.06:
        enough = int(str(error.value).split("about ")[1].split()[0])
        assert (
            p_value(share, enough, 0.06, exact=False) <= 0.1 < p_value(share, enough - enough // 10, 0.06, exact=False)
        )


@pytest.mark.parametrize(
    ("options", "telling"),
    [
        ({"risk": 0.0}, "risk=0.0 is out of range"),
        ({"risk": 1}, "risk=1 is out of range"),
        ({"delta": math.nan}, "delta=nan is out of range"),
        ({"delta": "low"}, "delta=low is out of range"),
        ({"loss": "accuracy"}, "loss='accuracy' is unknown; use 'full', 'labels' or a function"),
    ],
)
def test_bad_arguments(options: dict[str, Any], telling: str) -> None:
    with pytest.raises(DynskipError, match=telling):
        calibrate.to_risk(one_gate(), [draw(10)], **options)


def test_a_path_of_the_terminators_own_parameters() -> None:
    class Apart(EarlyTerminator):
        """End where the two best classes lie apart and the best one is probable."""

        def __init__(self, apart: float, probable: float, min_frames: int = 0) -> None:
            super().__init__(min_frames=min_frames)
            self.apart, self.probable = apart, probable

        def scores(self, probabilities: Tensor, frames_seen: Tensor) -> dict[str, Tensor]:
            best, second = probabilities.topk(2).values.unbind(-1)
            return {"apart": best - second, "probable": best}

    model = one_gate(Apart(0.5, 0.5))
    found = calibrate.to_risk(model, [draw(400)], 0.1)
    ends: list[Any] = [point.termination_threshold for point in found.curve]
    assert all(dict(end).keys() == {"apart", "probable"} for end in ends)
    strict, cheap = dict(ends[-1]), dict(ends[0])
    assert strict["apart"] >= cheap["apart"]
    assert strict["probable"] >= cheap["probable"]
    found.apply(model)
    terminator: Any = model.terminator
    assert (terminator.apart, terminator.probable) == (cheap["apart"], cheap["probable"])
    assert terminator.threshold == 0.999
