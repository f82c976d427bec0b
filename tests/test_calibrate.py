from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLASSES, Case, cases, generator, large_cases, randomise, toy_backbone, toy_model, toy_video
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynskip import (
    ConfidenceGate,
    DynskipError,
    EarlyExit,
    EarlyTerminator,
    FixedGate,
    RandomGate,
    SimilarityGate,
    StopOrForward,
    calibrate,
)
from dynskip.calibrate import CurvePoint
from dynskip.metrics import mean_average_precision, top_k_accuracy

VIDEOS = 14


def labels_for(model: StopOrForward, video: Tensor, seed: int = 0) -> Tensor:
    """Labels that the dense model mostly gets right."""
    labels: Tensor = model(video, dense=True).logits.argmax(-1)
    wrong = torch.rand(len(labels), generator=generator(seed)) < 0.2
    return torch.where(wrong, (labels + 1) % CLASSES, labels)


def setup(seed: int = 0, frames: int = 6, **kwargs: Any) -> tuple[StopOrForward, Tensor, Tensor]:
    model = toy_model(seed, share=0.85, **kwargs)
    video = toy_video(VIDEOS, frames, seed=seed + 3)
    return model, video, labels_for(model, video, seed)


def batched(video: Tensor, targets: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(video.split(size), targets.split(size), strict=True))


def really(model: StopOrForward | EarlyExit, video: Tensor, targets: Tensor) -> tuple[float, float]:
    """Accuracy and mean MACs of a pass that really skips."""
    output = model(video)
    return top_k_accuracy(output.probabilities, targets), float(output.macs.mean())


def check_replay(case: Case) -> None:
    model, video = case.model(), case.video()
    targets = labels_for(model, video, case.seed)
    threshold = case.threshold if isinstance(case.threshold, tuple) else (case.threshold,) * case.stages
    point = CurvePoint(math.nan, math.nan, threshold, case.terminator[0] if case.terminator else None)
    # The model's own settings must not matter.
    model.forward_threshold = (0.5,) * case.stages
    if model.terminator is not None:
        model.terminator.threshold = 0.26
    replayed = calibrate.replay(model, batched(video, targets, 2), point)
    point.apply(model)
    assert (replayed.accuracy, replayed.macs) == really(model, video, targets)
    assert (replayed.forward_threshold, replayed.termination_threshold) == (threshold, point.termination_threshold)


@settings(deadline=None, max_examples=40)
@given(cases())
def test_replay_is_what_really_happens(case: Case) -> None:
    check_replay(case)


@pytest.mark.parametrize("state_update", ["used", "reached"])
def test_replay_is_what_really_happens_where_everything_happens(state_update: Any) -> None:
    for case in large_cases("lstm", state_update):
        check_replay(case)


@pytest.mark.parametrize("per_gate", [False, True])
@settings(deadline=None, max_examples=4)
@given(
    seed=st.integers(0, 10_000),
    share=st.floats(0.3, 1.1),
    state_update=st.sampled_from(["used", "reached"]),
    ends=st.booleans(),
)
def test_calibrated_model_keeps_the_budget_for_real(
    per_gate: bool, seed: int, share: float, state_update: Any, ends: bool
) -> None:
    terminator = EarlyTerminator(0.9, 1) if ends else None
    model, video, targets = setup(seed, state_update=state_update, terminator=terminator)
    encoded = calibrate.encode(model, batched(video, targets, 5))
    dense = calibrate.dense(model, encoded)
    before = calibrate.replay(model, encoded, CurvePoint(0, 0, model.forward_threshold, 0.9 if ends else None))
    try:
        result = calibrate.to_budget(model, encoded, share * dense.macs, per_gate=per_gate)
    except DynskipError:
        assume(False)
    assert result.point.macs <= share * dense.macs
    assert result.dense == dense
    if before.macs <= share * dense.macs:
        assert result.point.accuracy >= before.accuracy
    # No point of the curve is beaten by another one, and the choice is the best point within the budget.
    pairs = [(point.macs, point.accuracy) for point in result.curve]
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(pairs))
    assert result.point == [point for point in result.curve if point.macs <= share * dense.macs][-1]
    for point in {result.point, result.curve[0], result.curve[-1]}:
        model.terminator = terminator  # a point that ends no video takes it away
        point.apply(model)
        assert (point.accuracy, point.macs) == really(model, video, targets)


@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 10_000), max_loss=st.sampled_from([0.0, 0.1, 0.3]))
def test_calibrated_model_keeps_the_accuracy_for_real(seed: int, max_loss: float) -> None:
    model, video, targets = setup(seed, terminator=EarlyTerminator(0.9, 2))
    result = calibrate.to_accuracy(model, [(video, targets)], max_loss, per_gate=False)
    result.apply(model)
    accuracy, macs = really(model, video, targets)
    assert (accuracy, macs) == (result.point.accuracy, result.point.macs)
    assert accuracy >= top_k_accuracy(model(video, dense=True).probabilities, targets) - max_loss - 1e-6
    assert all(p.macs >= macs for p in result.curve if p.accuracy >= result.dense.accuracy - max_loss)


def test_more_loss_or_budget_is_worth_something() -> None:
    model, video = toy_model(0, share=0.8, terminator=EarlyTerminator(0.8, 2)), toy_video(30, 8, seed=3)
    encoded = calibrate.encode(model, [(video, model(video, dense=True).logits.argmax(-1))])
    dense = calibrate.dense(model, encoded)
    none, much = (calibrate.to_accuracy(model, encoded, loss, per_gate=False).point for loss in (0.0, 0.3))
    assert much.macs < none.macs < 0.9 * dense.macs
    small, large = (
        calibrate.to_budget(model, encoded, share * dense.macs, per_gate=False).point for share in (0.3, 0.9)
    )
    assert small.accuracy < large.accuracy


@settings(deadline=None, max_examples=15)
@given(cases(), st.lists(st.floats(0.01, 1.0), min_size=2, max_size=4))
def test_later_ends_cost_more(case: Case, thresholds: list[float]) -> None:
    model, video = case.model(), case.video()
    model.terminator = EarlyTerminator(0.9, 1)
    encoded = calibrate.encode(model, [(video, torch.zeros(len(video), dtype=torch.long))])
    points = [CurvePoint(0, 0, model.forward_threshold, threshold) for threshold in sorted(thresholds)]
    costs = [calibrate.replay(model, encoded, point).macs for point in points]
    assert costs == sorted(costs)


@settings(deadline=None, max_examples=15)
@given(cases(temporal=[None]), st.lists(st.floats(0.0, 1.0), min_size=2, max_size=4))
def test_gates_without_memory_cost_less_at_higher_thresholds(case: Case, thresholds: list[float]) -> None:
    model, video = case.model(), case.video()
    encoded = calibrate.encode(model, [(video, torch.zeros(len(video), dtype=torch.long))])
    points = [CurvePoint(0, 0, (threshold,) * case.stages, None) for threshold in sorted(thresholds)]
    costs = [calibrate.replay(model, encoded, point).macs for point in points]
    assert costs == sorted(costs, reverse=True)


class Brightness(nn.Module):
    """A gate without training or memory: bright frames go forward."""

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return ()

    def forward(self, pooled: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return torch.stack([pooled.new_zeros(len(pooled)), 9 * pooled.mean(1)], 1), state


def test_the_choice_is_the_best_that_a_search_through_everything_finds() -> None:
    torch.manual_seed(0)
    model, video, targets = setup(5, frames=2, stages=1)
    video, targets = video[:8], targets[:8]
    model = StopOrForward(model.backbone, [Brightness()]).eval()
    margins = model.encode(video).pooled[0].mean(-1).flatten().mul(9).sort().values
    places = torch.cat([margins[:1] - 1, (margins[1:] + margins[:-1]) / 2, margins[-1:] + 1]).sigmoid()
    points = []
    for place in places.tolist():
        model.forward_threshold = (place,)
        points.append(really(model, video, targets))
    model.forward_threshold = (0.5,)
    for budget in (0.5, 0.7, 0.9, 1.1):
        macs = budget * calibrate.dense(model, [(video, targets)]).macs
        allowed = [(accuracy, -cost) for accuracy, cost in points if cost <= macs]
        if allowed:
            chosen = calibrate.to_budget(model, [(video, targets)], macs).point
            assert (chosen.accuracy, -chosen.macs) == max(allowed)


@pytest.mark.parametrize("per_gate", [False, True])
@pytest.mark.parametrize("kind", ["similarity", "random", "mixed"])
def test_gates_that_need_no_training(kind: str, per_gate: bool) -> None:
    model, video, targets = setup(7)
    widths = model.backbone.num_features
    gates: dict[str, list[nn.Module]] = {
        "similarity": [SimilarityGate(width) for width in widths],
        "random": [RandomGate(width, 0.7, seed=n) for n, width in enumerate(widths)],
        "mixed": [FixedGate(), SimilarityGate(widths[1]), FixedGate()],
    }
    model = StopOrForward(model.backbone, [gate.double() for gate in gates[kind]]).eval()
    dense = calibrate.dense(model, [(video, targets)])
    result = calibrate.to_budget(model, [(video, targets)], 0.9 * dense.macs, per_gate=per_gate)
    result.apply(model)
    assert (result.point.accuracy, result.point.macs) == really(model, video, targets)
    assert result.point.macs <= 0.9 * dense.macs
    assert result.curve[0].macs < result.curve[-1].macs


def test_exits_of_still_images() -> None:
    backbone = setup(8)[0].backbone
    gates = [ConfidenceGate(width, CLASSES).double() for width in backbone.num_features]
    for n, gate in enumerate(gates):
        randomise(gate, n, scale=3.0)
    model = EarlyExit(backbone, [*gates[:-1], FixedGate()]).eval()
    images, targets = toy_video(20, 1, seed=5)[:, 0], torch.arange(20) % CLASSES
    dense = calibrate.dense(model, [(images, targets)])
    result = calibrate.to_budget(model, [(images, targets)], 0.7 * dense.macs, per_gate=True)
    result.apply(model)
    assert (result.point.accuracy, result.point.macs) == really(model, images, targets)
    assert result.point.macs <= 0.7 * dense.macs


def test_thresholds_differ_where_gates_need_it() -> None:
    model, video, targets = setup(1)
    encoded = calibrate.encode(model, [(video, targets)])
    budget = 0.5 * calibrate.dense(model, encoded).macs
    shared = calibrate.to_budget(model, encoded, budget, per_gate=False).point
    single = calibrate.to_budget(model, encoded, budget).point
    assert len(set(shared.forward_threshold)) == 1
    assert single.accuracy >= shared.accuracy


@pytest.mark.parametrize("use", ["to_budget", "to_accuracy", "curve"])
def test_held_out_figures_are_those_of_videos_that_were_not_searched(use: str) -> None:
    model, video, targets = setup(3, frames=3)
    groups = [f"recording {n % 2}" for n in range(VIDEOS)]  # two groups make two folds
    budget = 0.6 * calibrate.dense(model, [(video, targets)]).macs

    def search(rows: slice, **options: Any) -> CurvePoint:
        part = [(video[rows], targets[rows])]
        if use == "to_accuracy":
            return calibrate.to_accuracy(model, part, 0.1, per_gate=False, **options).point
        return calibrate.to_budget(model, part, budget, per_gate=False, **options).point

    halves = (slice(0, None, 2), slice(1, None, 2))
    apart = [
        calibrate.replay(model, [(video[own], targets[own])], search(other))
        for own, other in (halves, reversed(halves))
    ]
    if use == "curve":
        held_out: Any = calibrate.curve(model, batched(video, targets, 5), points=2, per_gate=False, groups=groups)[-1]
        searched = {
            p.forward_threshold for p in calibrate.to_accuracy(model, [(video, targets)], 0.0, per_gate=False).curve
        }
        assert held_out.forward_threshold in searched
    else:
        function = getattr(calibrate, use)
        aim = 0.1 if use == "to_accuracy" else budget
        result = function(model, batched(video, targets, 5), aim, per_gate=False, groups=groups)
        held_out = result.held_out
        assert (held_out.forward_threshold, held_out.termination_threshold) == (
            result.point.forward_threshold,
            result.point.termination_threshold,
        )
        assert held_out.accuracy == pytest.approx(sum(point.accuracy for point in apart) / 2)
        assert held_out.macs == pytest.approx(sum(point.macs for point in apart) / 2)
        assert function(model, [(video, targets)], aim, per_gate=False).held_out is None
    assert held_out.band[0] <= held_out.accuracy <= held_out.band[1]


def test_bands_draw_whole_groups() -> None:
    model, video, targets = setup(0)
    alone = calibrate.uniform_frames(model, [(video, targets)], groups=range(VIDEOS))
    fourfold = [(video.repeat(4, 1, 1, 1, 1), targets.repeat(4))]
    together = calibrate.uniform_frames(model, fourfold, groups=[*range(VIDEOS)] * 4)
    assert [point.band for point in together] == [pytest.approx(point.band) for point in alone]
    split = calibrate.uniform_frames(model, fourfold, groups=range(4 * VIDEOS))
    for wide, narrow in zip(together, split, strict=True):
        assert wide.accuracy == narrow.accuracy
        assert wide.band is not None
        assert narrow.band is not None
        assert wide.band[0] <= narrow.band[0] <= wide.accuracy <= narrow.band[1] <= wide.band[1]
    # About 90 % of the mean's normal distribution.
    first = split[0]
    assert first.band is not None
    expected = 2 * 1.645 * math.sqrt(first.accuracy * (1 - first.accuracy) / (4 * VIDEOS))
    assert first.band[1] - first.band[0] == pytest.approx(expected, rel=0.25)
    assert calibrate.uniform_frames(model, [(video, targets)])[0].band is None


@pytest.mark.parametrize(
    ("groups", "telling"), [([1, 2], "2 groups for 14 videos"), ([1] * VIDEOS, "all videos|All videos")]
)
def test_bad_groups(groups: list[int], telling: str) -> None:
    model, video, targets = setup()
    with pytest.raises(DynskipError, match=telling):
        calibrate.dense(model, [(video, targets)], groups=groups)
    with pytest.raises(DynskipError, match="points=0; a curve has at least one"):
        calibrate.curve(model, [(video, targets)], points=0)


class Apart(EarlyTerminator):
    """End a video when its two best classes lie far enough apart."""

    def __init__(self, apart: float = 0.5, min_frames: int = 1) -> None:
        super().__init__(min_frames=min_frames)
        self.apart = apart

    def scores(self, probabilities: Tensor, frames_seen: Tensor) -> dict[str, Tensor]:
        best, second = probabilities.topk(2).values.unbind(-1)
        return {"apart": best - second}


def test_a_terminators_own_parameters_are_calibrated(tmp_path: Path) -> None:
    model, video, _ = setup(2)
    gates = [FixedGate() for _ in model.gates]
    model = StopOrForward(model.backbone, gates, terminator=Apart(0.99)).eval()
    targets = model(video, dense=True).logits.argmax(-1)
    dense = calibrate.dense(model, [(video, targets)])
    result = calibrate.to_budget(model, [(video, targets)], 0.9 * dense.macs, per_gate=False)
    ends: set[Any] = {point.termination_threshold for point in result.curve}
    assert len(ends) > 1
    assert all(end is None or dict(end).keys() == {"apart"} for end in ends)
    ending = next(point for point in result.curve if point.termination_threshold is not None)
    ending.apply(model)
    assert (ending.accuracy, ending.macs) == really(model, video, targets)
    terminator: Any = model.terminator
    assert ending.termination_threshold == (("apart", terminator.apart),)
    calibrate.write_curves(tmp_path / "curves.csv", {"own": result.curve})
    with (tmp_path / "curves.csv").open(newline="") as handle:
        assert str(terminator.apart) in [row["termination_apart"] for row in csv.DictReader(handle)]


def test_videos_and_their_stored_features_give_the_same() -> None:
    model, video, targets = setup(2, terminator=EarlyTerminator(0.9, 2))
    budget = 0.6 * calibrate.dense(model, [(video, targets)]).macs
    expected = calibrate.to_budget(model, [(video, targets)], budget, per_gate=False)
    loaded: Any = ([v, t] for v, t in batched(video, targets, 4))  # as a DataLoader gives them
    assert calibrate.to_budget(model, loaded, budget, per_gate=False) == expected
    stored = calibrate.encode(model, batched(video, targets, 3))
    assert calibrate.to_budget(model, stored, budget, per_gate=False) == expected


def test_videos_of_different_lengths_and_sizes() -> None:
    model, video, targets = setup(2)
    other = toy_video(4, 3, seed=1, size=12)
    batches = [(video, targets), (other, labels_for(model, other))]
    dense = calibrate.dense(model, batches)
    outputs = [model(videos, dense=True) for videos, _ in batches]
    assert dense.macs == float(torch.cat([output.macs for output in outputs]).mean())
    points = calibrate.uniform_frames(model, batches)
    assert len(points) == video.shape[1]
    assert points[-1] == dense


def test_another_metric() -> None:
    model, video, targets = setup(4)
    several = torch.nn.functional.one_hot(targets, CLASSES)
    several[0] = 1
    result = calibrate.to_accuracy(model, [(video, several)], 0.05, metric=mean_average_precision)
    result.apply(model)
    assert result.point.accuracy == mean_average_precision(model(video).probabilities, several)
    assert result.dense.accuracy == mean_average_precision(model(video, dense=True).probabilities, several)


def test_the_model_is_left_as_it_was() -> None:
    model, video, targets = setup(0, terminator=EarlyTerminator(0.7, 2), forward_threshold=0.4)
    terminator, expected = model.terminator, calibrate.to_accuracy(model, [(video, targets)], 0.1, per_gate=False)
    model.train()
    model.gates[0].eval()
    assert calibrate.to_accuracy(model, [(video, targets)], 0.1, per_gate=False) == expected
    with pytest.raises(DynskipError, match="cannot be kept"):
        calibrate.to_budget(model, [(video, targets)], 1.0, per_gate=False)
    assert model.forward_threshold == (0.4,) * 3
    assert model.terminator is terminator
    assert terminator is not None
    assert terminator.threshold == 0.7
    assert model.training
    assert not model.gates[0].training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_baselines_by_hand() -> None:
    model, video, targets = setup(6, frames=5)
    encoded = calibrate.encode(model, batched(video, targets, 4))
    logits, one = model.encode(video).frame_logits, model.lookup_for((8, 8)).dense
    uniform, chance = calibrate.uniform_frames(model, encoded), calibrate.random_frames(model, encoded)
    assert [p.macs for p in uniform] == [p.macs for p in chance] == [k * one for k in range(1, 6)]
    assert uniform[0].accuracy == top_k_accuracy(logits[:, 2], targets)
    assert uniform[1].accuracy == top_k_accuracy(logits[:, [1, 3]].mean(1), targets)
    assert uniform[-1] == chance[-1] == calibrate.dense(model, encoded)
    assert chance == calibrate.random_frames(model, encoded)
    others = [calibrate.random_frames(model, encoded, seed=seed)[0].accuracy for seed in range(8)]
    assert len(set(others)) > 1


def test_curves_as_data(tmp_path: Path) -> None:
    curves: dict[str, Sequence[CurvePoint]] = {
        "gates": [CurvePoint(0.5, 2e9, (0.25, 0.75), 0.9), CurvePoint(0.75, 3e9, (0.1, 0.2), None)],
        "dense": [CurvePoint(0.8, 4e9)],
    }
    calibrate.write_curves(tmp_path / "curves.json", curves)
    stored = json.loads((tmp_path / "curves.json").read_text())
    for name, points in stored.items():
        again = [CurvePoint(**{**p, "forward_threshold": tuple(p["forward_threshold"])}) for p in points]
        assert again == curves[name]
    calibrate.write_curves(tmp_path / "curves.csv", curves)
    with (tmp_path / "curves.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["curve"] for row in rows] == ["gates", "gates", "dense"]
    assert [float(row["macs"]) for row in rows] == [2e9, 3e9, 4e9]
    assert [row["forward_threshold_1"] for row in rows] == ["0.75", "0.2", ""]
    assert [row["termination_threshold"] for row in rows] == ["0.9", "", ""]
    with pytest.raises(DynskipError, match=r"curves.txt: its name must end in .csv or .json"):
        calibrate.write_curves(tmp_path / "curves.txt", curves)


def test_bad_points() -> None:
    model, video, targets = setup()
    for use in (lambda p: p.apply(model), lambda p: calibrate.replay(model, [(video, targets)], p)):
        with pytest.raises(DynskipError, match="thresholds for 2 gates and the model has 3"):
            use(CurvePoint(1, 1, (0.5, 0.5), None))
        with pytest.raises(DynskipError, match="thresholds for 0 gates and the model has 3"):
            use(CurvePoint(1, 1))
        with pytest.raises(DynskipError, match="ends videos early and the model has no terminator"):
            use(CurvePoint(1, 1, (0.5,) * 3, 0.9))


def test_old_names_say_the_new_ones() -> None:
    with pytest.warns(DeprecationWarning, match=r"`OperatingPoint` is now `dynskip.calibrate.CurvePoint`"):
        assert calibrate.OperatingPoint(0.5, 2e9, (0.25,), None) == CurvePoint(0.5, 2e9, (0.25,), None)
    with pytest.raises(AttributeError, match="no attribute 'Point'"):
        calibrate.Point  # noqa: B018


def test_a_point_without_early_ends_takes_the_terminator_away() -> None:
    model, _, _ = setup(terminator=EarlyTerminator(0.9, 2))
    CurvePoint(1, 1, (0.1, 0.2, 0.3), None).apply(model)
    assert model.terminator is None
    assert model.forward_threshold == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("macs", [0.0, -1.0, math.nan, math.inf])
def test_bad_budget(macs: float) -> None:
    model, video, targets = setup()
    with pytest.raises(DynskipError, match=r"a video; expected a positive number. 20 GMACs are written 20e9"):
        calibrate.to_budget(model, [(video, targets)], macs)


@pytest.mark.parametrize("max_loss", [-0.01, 2.0, math.nan])
def test_bad_loss(max_loss: float) -> None:
    model, video, targets = setup()
    with pytest.raises(DynskipError, match=r"expected 0 to 1. 0.01 is one point"):
        calibrate.to_accuracy(model, [(video, targets)], max_loss)


def test_a_budget_out_of_reach_says_what_is_in_reach() -> None:
    model, video, targets = setup()
    with pytest.raises(DynskipError, match=r"the least that any thresholds execute is (\S+), and the dense") as error:
        calibrate.to_budget(model, [(video, targets)], 1.0)
    least = float(str(error.value).split("execute is ")[1].split(",")[0])
    assert calibrate.to_budget(model, [(video, targets)], 1.001 * least).point.macs <= 1.001 * least


class Stuck(Brightness):
    """Stops everything, whatever the threshold."""

    def forward(self, pooled: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return pooled.new_tensor([50.0, -50.0]).expand(len(pooled), 2), state


def test_an_accuracy_out_of_reach() -> None:
    model, video, _ = setup()
    targets = model(video, dense=True).logits.argmax(-1)
    model = StopOrForward(model.backbone, [Stuck(), Stuck(), Stuck()]).eval()
    with pytest.raises(DynskipError, match=r"No thresholds come within 0.0 of the dense accuracy 1"):
        calibrate.to_accuracy(model, [(video, targets)], 0.0)


BAD_BATCHES: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "none": (lambda v, t: [], "There are no validation videos"),
    "videos alone": (lambda v, t: [v], "Expected batches .videos, targets.; got a Tensor"),
    "no tensor": (lambda v, t: [("a.mp4", t)], "tensor of normalised pixels; got str"),
    "one video": (lambda v, t: [(v[0], t[:1])], "must have shape"),
    "too few targets": (lambda v, t: [(v, t[:-1])], r"Got targets \(13,\) for 14 videos"),
    "no video": (lambda v, t: [(v[:0], t[:0])], "empty"),
    "class too large": (lambda v, t: [(v, t + CLASSES)], "Targets range from"),
    "two kinds": (
        lambda v, t: [(v, t), (v, torch.nn.functional.one_hot(t, CLASSES))],
        "some batches are class indices and of others multi-hot",
    ),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batches(case: str) -> None:
    make, message = BAD_BATCHES[case]
    model, video, targets = setup()
    with pytest.raises(DynskipError, match=message):
        calibrate.to_accuracy(model, make(video, targets), 0.1)


def test_a_model_with_one_output_is_refused() -> None:
    backbone = toy_backbone(classes=1)
    model = StopOrForward(backbone, [FixedGate() for _ in backbone.num_features]).eval()
    batches = [(toy_video(), torch.zeros(3, dtype=torch.long))]
    calls: list[Callable[[], Any]] = [
        lambda: calibrate.to_budget(model, batches, 1e9),
        lambda: calibrate.to_accuracy(model, batches, 0.1),
        lambda: calibrate.replay(model, batches, CurvePoint(0, 0, model.forward_threshold, None)),
        lambda: calibrate.dense(model, batches),
    ]
    for call in calls:
        with pytest.raises(DynskipError, match=r'one output, and the softmax .* is always 1.*one of them for "no"'):
            call()


def test_bad_features() -> None:
    model, video, targets = setup()
    encoded = model.encode(video)
    encoded.pooled[1][2, 3, 0] = math.nan
    with pytest.raises(DynskipError, match="NaN or infinite"):
        calibrate.dense(model, [(encoded, targets)])
    foreign = toy_model(stages=2).encode(video)
    with pytest.raises(DynskipError, match="are not this backbone's"):
        calibrate.to_accuracy(model, [(foreign, targets)], 0.1)
