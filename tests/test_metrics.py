from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynskip.errors import DynskipError
from dynskip.flops import FLOPsLookup
from dynskip.metrics import (
    ExecutedCompute,
    FrameUsage,
    executed_compute,
    frame_relevance,
    frame_usage,
    label_accuracy,
    mean_average_precision,
    relevant_frames,
    sample_times,
    top_k_accuracy,
    top_k_recall,
)

NAN = float("nan")


@st.composite
def ranked_videos(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Scores on a coarse grid, so that many are equal, and multi-hot targets with at least one label."""
    batch, num_classes = draw(st.integers(1, 9)), draw(st.integers(1, 4))

    def table(values: st.SearchStrategy[int]) -> Tensor:
        flat = draw(st.lists(values, min_size=batch * num_classes, max_size=batch * num_classes))
        return torch.tensor(flat).reshape(batch, num_classes)

    scores, targets = table(st.integers(-3, 3)).float() / 3, table(st.integers(0, 1))
    targets[draw(st.integers(0, batch - 1)), draw(st.integers(0, num_classes - 1))] = 1
    return scores, targets


def literal_average_precision(scores: list[float], labels: list[int], interpolated: bool) -> float:
    """One point of the precision-recall curve per threshold; then the area under it, step by step."""
    curve = []
    for threshold in sorted(set(scores), reverse=True):
        retrieved = [label for score, label in zip(scores, labels, strict=True) if score >= threshold]
        curve.append((sum(retrieved) / sum(labels), sum(retrieved) / len(retrieved)))
    area, reached = 0.0, 0.0
    for recall, precision in curve:
        if interpolated:
            precision = max(p for r, p in curve if r >= recall)
        area += (recall - reached) * precision
        reached = recall
    return area


def literal_map(scores: Tensor, targets: Tensor, interpolated: bool) -> float:
    present = [c for c in range(targets.shape[1]) if targets[:, c].any()]
    areas = [literal_average_precision(scores[:, c].tolist(), targets[:, c].tolist(), interpolated) for c in present]
    return sum(areas) / len(areas)


def literal_top_k(scores: Tensor, targets: Tensor, k: int) -> float:
    hits = []
    for row, labels in zip(scores.tolist(), targets.tolist(), strict=True):
        best = sorted(range(len(row)), key=lambda c: (-row[c], c))[:k]
        if any(labels):
            hits.append(any(labels[c] for c in best))
    return sum(hits) / len(hits)


@settings(deadline=None)
@given(ranked_videos(), st.booleans())
def test_map_equals_the_literal_definition(videos: tuple[Tensor, Tensor], interpolated: bool) -> None:
    scores, targets = videos
    expected = literal_map(scores, targets, interpolated)
    assert mean_average_precision(scores, targets, interpolated) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(ranked_videos(), st.booleans(), st.randoms(use_true_random=False))
def test_map_does_not_depend_on_the_order_of_rows(
    videos: tuple[Tensor, Tensor], interpolated: bool, generator: random.Random
) -> None:
    scores, targets = videos
    order = list(range(len(scores)))
    generator.shuffle(order)
    shuffled = mean_average_precision(scores[order], targets[order], interpolated)
    assert shuffled == mean_average_precision(scores, targets, interpolated)


@settings(deadline=None)
@given(ranked_videos(), st.data())
def test_top_k_equals_the_literal_definition(videos: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    scores, targets = videos
    assume(scores.shape[1] > 1)
    k = data.draw(st.integers(1, scores.shape[1]))
    assert top_k_accuracy(scores, targets, k) == pytest.approx(literal_top_k(scores, targets, k), abs=1e-12)


@settings(deadline=None)
@given(ranked_videos(), st.data())
def test_class_indices_equal_one_hot_targets(videos: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    scores, _ = videos
    batch, num_classes = scores.shape
    labels = torch.tensor(data.draw(st.lists(st.integers(0, num_classes - 1), min_size=batch, max_size=batch)))
    one_hot = torch.eye(num_classes)[labels]
    assume(num_classes > 1)  # of one class, they say whether it holds
    assert top_k_accuracy(scores, labels) == top_k_accuracy(scores, one_hot)
    assert mean_average_precision(scores, labels) == mean_average_precision(scores, one_hot)


def test_map_by_hand() -> None:
    # In falling order: wrong, right, wrong, right. Precision is 1/2 at both hits.
    scores, targets = torch.tensor([[0.9], [0.8], [0.7], [0.6]]), torch.tensor([[0], [1], [0], [1]])
    assert mean_average_precision(scores, targets, interpolated=False) == pytest.approx(1 / 2)
    # Right, wrong, wrong, right, right: 1, 2/4, 3/5; made monotone: 1, 3/5, 3/5.
    scores = torch.tensor([[0.9], [0.8], [0.7], [0.6], [0.5]])
    targets = torch.tensor([[1], [0], [0], [1], [1]])
    assert mean_average_precision(scores, targets, interpolated=False) == pytest.approx((1 + 1 / 2 + 3 / 5) / 3)
    assert mean_average_precision(scores, targets) == pytest.approx((1 + 3 / 5 + 3 / 5) / 3)


def test_constant_scores_give_the_share_of_positives() -> None:
    targets = torch.tensor([0, 1, 1, 1])
    for interpolated in (True, False):
        assert mean_average_precision(torch.zeros(4, 2), targets, interpolated) == pytest.approx(1 / 2)


def test_class_absent_from_the_targets_is_left_out() -> None:
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.5, 0.8], [0.7, 0.5, 0.3]])
    assert mean_average_precision(scores, torch.tensor([0, 2, 0])) == 1.0
    # Without that column, the result is the same.
    assert mean_average_precision(scores[:, [0, 2]], torch.tensor([0, 1, 0])) == 1.0


def test_top_k_by_hand() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert top_k_accuracy(scores, torch.tensor([0, 1])) == 0.5
    assert top_k_accuracy(scores, torch.tensor([0, 1]), k=2) == 1.0
    assert top_k_accuracy(scores, torch.tensor([[0, 1, 1], [0, 0, 1]]), k=2) == 0.5
    assert top_k_accuracy(torch.zeros(2, 3), torch.tensor([0, 2])) == 0.5


def test_top_k_leaves_out_videos_without_a_label() -> None:
    scores = torch.tensor([[3.0, 2.0], [3.0, 2.0]])
    assert top_k_accuracy(scores, torch.tensor([[1, 0], [0, 0]])) == 1.0


SCORES = torch.tensor([[0.1, 0.9], [0.6, 0.4]])
BAD_INPUT = {
    "scores rank": (torch.zeros(2), torch.tensor([0, 1]), r"scores is .*shape \(2,\); expected .*\(B, K\)"),
    "no videos": (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), r"scores is .*shape \(0, 2\)"),
    "scores dtype": (
        SCORES.long(),
        torch.tensor([0, 1]),
        r"scores is torch.int64 of shape \(2, 2\); expected floating point",
    ),
    "nan": (torch.tensor([[0.1, 0.9], [NAN, 0.4]]), torch.tensor([0, 1]), "scores of row 1 contain NaN"),
    "targets length": (
        SCORES,
        torch.tensor([0, 1, 1]),
        r"Targets must be 2 class indices of shape \(B,\), integer, or rows .* \(2, 2\) .*; got \(3,\)",
    ),
    "targets classes": (SCORES, torch.ones(2, 3), r"got \(2, 3\)"),
    "targets dtype": (
        SCORES,
        torch.tensor([0.0, 1.0]),
        r"integer, .*; got \(2,\) torch.float32",
    ),
    "targets bool": (SCORES, torch.tensor([True, False]), r"got \(2,\) torch.bool"),
    "class too large": (
        SCORES,
        torch.tensor([0, 2]),
        r"Targets range from 0 to 2, and there are 2 classes \(0 to 1\)",
    ),
    "class negative": (SCORES, torch.tensor([0, -1]), "Targets range from -1 to 0.*leave out videos without a label"),
    "soft labels": (
        SCORES,
        torch.tensor([[0.5, 0.5], [0, 1]]),
        "Multi-hot targets hold 0.5; expected 0 or 1",
    ),
    "nan targets": (SCORES, torch.tensor([[NAN, 0.0], [0, 1]]), "Targets hold nan"),
    "no positives": (SCORES, torch.zeros(2, 2), "No video has a label, so nothing can be measured"),
}


@pytest.mark.parametrize("metric", [mean_average_precision, top_k_accuracy])
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(metric: Callable[[Tensor, Tensor], float], case: str) -> None:
    scores, targets, message = BAD_INPUT[case]
    with pytest.raises(DynskipError, match=message):
        metric(scores, targets)


@pytest.mark.parametrize("k", [0, 3])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(DynskipError, match=f"k={k} is out of range; expected 1 to the number of classes, 2"):
        top_k_accuracy(SCORES, torch.tensor([0, 1]), k)


@pytest.mark.parametrize("metric", [top_k_accuracy, top_k_recall])
@pytest.mark.parametrize("targets", [torch.tensor([0, 0]), torch.tensor([[1], [0]])])
def test_one_class_cannot_be_missed_and_is_refused(metric: Callable[[Tensor, Tensor], float], targets: Tensor) -> None:
    with pytest.raises(DynskipError, match=r"one column, and a single class is always the best.*label_accuracy"):
        metric(torch.tensor([[-3.0], [2.0]]), targets)


@settings(deadline=None)
@given(ranked_videos())
def test_label_accuracy_is_one_minus_the_hamming_loss(videos: tuple[Tensor, Tensor]) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, targets = videos[0].sigmoid(), videos[1]
    expected = 1 - sklearn.hamming_loss(targets.numpy(), (scores > 0.5).numpy())
    assert label_accuracy(scores, targets) == pytest.approx(expected, abs=1e-12)
    assert label_accuracy(scores, torch.zeros_like(targets)) == (scores <= 0.5).double().mean()  # no label is fine


def test_one_output_is_measured_by_its_class() -> None:
    scores, labels = torch.tensor([[0.9], [0.2], [0.6], [0.4]]), torch.tensor([1, 0, 0, 1])
    assert label_accuracy(scores, labels) == label_accuracy(scores, labels[:, None]) == 0.5
    assert mean_average_precision(scores, labels, interpolated=False) == pytest.approx((1 + 2 / 3) / 2)


def test_frame_usage_by_hand() -> None:
    stopped_at = torch.tensor([[0, 2, 2, -1], [2, 0, 1, 2]])
    assert frame_usage(stopped_at, 2) == FrameUsage(used=0.5, stopped=(0.25, 0.125), unseen=0.125)
    assert frame_usage(torch.tensor([3, -1]), 3) == FrameUsage(used=0.5, stopped=(0.0, 0.0, 0.0), unseen=0.5)


@settings(deadline=None)
@given(st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(-1, n), min_size=1))))
def test_frame_usage_shares_sum_to_one(case: tuple[int, list[int]]) -> None:
    num_stages, stopped_at = case
    usage = frame_usage(torch.tensor(stopped_at), num_stages)
    assert len(usage.stopped) == num_stages
    assert math.isclose(usage.used + sum(usage.stopped) + usage.unseen, 1)
    assert math.isclose(usage.used, stopped_at.count(num_stages) / len(stopped_at))


@pytest.mark.parametrize(
    ("stopped_at", "num_stages", "message"),
    [
        (
            torch.zeros(1, 1, 1, dtype=torch.int64),
            2,
            r"stopped_at has shape \(1, 1, 1\); expected \(B, T\)",
        ),
        (torch.zeros(2, 0, dtype=torch.int64), 2, r"stopped_at has shape \(2, 0\).*not empty"),
        (torch.zeros(2), 2, "stopped_at is torch.float32; expected int64"),
        (
            torch.tensor([0, 3]),
            2,
            r"stopped_at holds 3; expected -1 \(unseen\) to 2 \(used\) with 2 stages",
        ),
        (torch.tensor([0, -2]), 2, "stopped_at holds -2"),
        (torch.tensor([0]), 0, "num_stages=0 is out of range"),
    ],
)
def test_frame_usage_bad_input(stopped_at: Tensor, num_stages: int, message: str) -> None:
    with pytest.raises(DynskipError, match=message):
        frame_usage(stopped_at, num_stages)


@st.composite
def untied_videos(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Logits without equal ones in a class even after softmax, and multi-hot targets with 1 to 3 labels a video."""
    seed, batch, num_classes = draw(st.integers(0, 10_000)), draw(st.integers(2, 30)), draw(st.integers(3, 6))
    source = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, num_classes, generator=source, dtype=torch.float64)
    counts = torch.randint(1, 4, (batch,), generator=source).tolist()
    targets = torch.zeros(batch, num_classes, dtype=torch.int64)
    for row, count in enumerate(counts):
        targets[row, torch.randperm(num_classes, generator=source)[:count]] = 1
    return logits, targets


def official_map_and_hits(scores: Tensor, targets: Tensor, k: int) -> tuple[float, float, float]:
    """ActivityNet's definitions, video by video and label by label: mAP, Hit@k, Avg Hit@k."""
    truth = {v: {c for c in range(targets.shape[1]) if targets[v, c]} for v in range(len(targets))}
    areas = []
    for c in sorted(set().union(*truth.values())):
        ranking = sorted(truth, key=lambda v: -float(scores[v, c]))
        positives = sum(c in labels for labels in truth.values())
        matched: set[int] = set()
        recalls, precisions, right = [0.0], [0.0], 0
        for rank, v in enumerate(ranking, start=1):
            if c in truth[v] and v not in matched:
                matched.add(v)
                right += 1
            recalls.append(right / positives)
            precisions.append(right / rank)
        recalls.append(1.0)
        precisions.append(0.0)
        for i in reversed(range(len(precisions) - 1)):
            precisions[i] = max(precisions[i], precisions[i + 1])
        areas.append(sum((b - a) * p for a, b, p in zip(recalls, recalls[1:], precisions[1:], strict=False)))
    hits, shares = [], []
    for v, labels in truth.items():
        best = sorted(range(scores.shape[1]), key=lambda c: -float(scores[v, c]))[:k]
        hits.append(float(any(c in labels for c in best)))
        shares.append(sum(c in labels for c in best) / len(labels))
    return sum(areas) / len(areas), sum(hits) / len(hits), sum(shares) / len(shares)


def arnet_map(logits: Tensor, targets: Tensor) -> float:
    """AR-Net's definition: softmax, then for each class the mean of the precisions at its positives."""
    probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
    areas = []
    for c in range(targets.shape[1]):
        ranking = sorted(range(len(logits)), key=lambda v: -float(probabilities[v, c]))
        found = [rank for rank, v in enumerate(ranking, start=1) if targets[v, c]]
        areas.append(sum(i / rank for i, rank in enumerate(found, start=1)) / len(found) if found else 0.0)
    return sum(areas) / len(areas)


@settings(deadline=None)
@given(untied_videos(), st.integers(1, 3))
def test_activitynets_numbers(videos: tuple[Tensor, Tensor], k: int) -> None:
    logits, targets = videos
    probabilities = logits.softmax(1)
    mean_ap, hit, average_hit = official_map_and_hits(probabilities, targets, k)
    assert mean_average_precision(probabilities, targets) == pytest.approx(mean_ap, abs=1e-12)
    assert top_k_accuracy(probabilities, targets, k) == pytest.approx(hit, abs=1e-12)
    assert top_k_recall(probabilities, targets, k) == pytest.approx(average_hit, abs=1e-12)


@settings(deadline=None)
@given(untied_videos())
def test_arnets_numbers(videos: tuple[Tensor, Tensor]) -> None:
    logits, targets = videos
    first = torch.nn.functional.one_hot(targets.argmax(1), targets.shape[1])
    for labels in (first, targets):  # its mAP, its mmAP
        present = labels.any(0)
        mean_ap = mean_average_precision(logits.softmax(1), labels, interpolated=False)
        # A class that does not occur counts 0 there, and is left out here.
        assert mean_ap * float(present.double().mean()) == pytest.approx(arnet_map(logits, labels), abs=1e-12)


@settings(deadline=None)
@given(ranked_videos(), st.data())
def test_scikit_learn_agrees(videos: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, targets = videos
    present = targets.any(0)
    expected = sklearn.average_precision_score(targets[:, present].numpy(), scores[:, present].numpy(), average="macro")
    assert mean_average_precision(scores, targets, interpolated=False) == pytest.approx(expected, abs=1e-12)
    if scores.shape[1] > 2:
        logits = torch.randn(scores.shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
        k, labels = data.draw(st.integers(1, scores.shape[1] - 1)), targets.argmax(1)
        expected = sklearn.top_k_accuracy_score(
            labels.numpy(), logits.numpy(), k=k, labels=list(range(scores.shape[1]))
        )
        assert top_k_accuracy(logits, labels, k) == pytest.approx(expected, abs=1e-12)


def test_ranking_by_logits_is_not_ranking_by_softmax() -> None:
    # The model is more confident of class 0 for the second video, though its logit is lower.
    logits, targets = torch.tensor([[5.0, 4.9], [3.0, -3.0]]), torch.tensor([1, 0])
    assert mean_average_precision(logits.softmax(1), targets) == 1.0
    assert mean_average_precision(logits, targets) < 1.0


def test_top_k_recall_by_hand() -> None:
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    targets = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]])  # the last one has no label: left out
    assert top_k_recall(scores, targets) == pytest.approx((1 / 2 + 0) / 2)
    assert top_k_recall(scores, targets, k=2) == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert top_k_recall(scores, targets, k=4) == 1.0
    with pytest.raises(DynskipError, match="k=5 is out of range"):
        top_k_recall(scores, targets, k=5)


def test_executed_compute_by_hand() -> None:
    lookup = FLOPsLookup([1e9, 2e9], head=1e9, gates=[5e8, 5e8])
    compute = executed_compute(torch.tensor([8e9, 4e9]), 4, lookup)
    assert compute == ExecutedCompute(per_video=6.0, per_frame=1.5, dense_per_video=16.0)
    assert compute.share == 6 / 16


@pytest.mark.parametrize(
    ("macs", "frames", "unit", "message"),
    [
        (torch.zeros(0), 4, "MACs", r"macs has shape \(0,\) for videos of 4 frames"),
        (torch.zeros(2, 2), 4, "MACs", r"macs has shape \(2, 2\)"),
        (torch.ones(2), 0, "MACs", "videos of 0 frames"),
        (torch.ones(2), 4, "ms", "counts ms, which are not MACs"),
    ],
)
def test_executed_compute_bad_input(macs: Tensor, frames: int, unit: str, message: str) -> None:
    with pytest.raises(DynskipError, match=message):
        executed_compute(macs, frames, FLOPsLookup([1.0], unit=unit))


def test_relevant_frames_by_hand() -> None:
    times = sample_times(4, 10.0)
    assert times.tolist() == [1.25, 3.75, 6.25, 8.75]
    assert relevant_frames(times, [(3.0, 6.25), (8.0, 20.0)]).tolist() == [False, True, False, True]
    assert relevant_frames(times, [(1.25, 2.0)]).tolist() == [True, False, False, False]
    assert not relevant_frames(times, []).any()


@given(st.integers(1, 40), st.integers(1, 500))
def test_sampled_times_lie_in_the_frames_that_are_decoded(num_frames: int, count: int) -> None:
    # With times counted in frames, the frame shown at a time is that time rounded down.
    decoded = [int(count / num_frames * (i + 0.5)) for i in range(num_frames)]
    assert [int(time) for time in sample_times(num_frames, count).tolist()] == decoded


def test_frame_relevance_by_hand() -> None:
    used = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]]).bool()
    relevant = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0]]).bool()
    result = frame_relevance(used, relevant)
    assert (result.precision, result.recall, result.relevant) == (3 / 4, 3 / 5, 5 / 8)
    none = torch.zeros(3, dtype=torch.bool)
    assert math.isnan(frame_relevance(none, ~none).precision)
    assert math.isnan(frame_relevance(~none, none).recall)
    assert frame_relevance(none, ~none).recall == 0.0


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_scikit_learn_agrees_on_relevance(frames: list[tuple[bool, bool]]) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    used, relevant = zip(*frames, strict=True)
    result = frame_relevance(torch.tensor(used), torch.tensor(relevant))
    options = {"zero_division": math.nan}
    expected = sklearn.precision_score(relevant, used, **options), sklearn.recall_score(relevant, used, **options)
    assert (result.precision, result.recall) == pytest.approx(expected, nan_ok=True)


def test_relevance_bad_input() -> None:
    frames = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(DynskipError, match=r"used is .*shape \(2, 3\) and relevant .*shape \(3,\)"):
        frame_relevance(frames, frames[0])
    with pytest.raises(DynskipError, match="not empty"):
        frame_relevance(frames[:0], frames[:0])
    with pytest.raises(DynskipError, match=r"used is torch.float32 .* and relevant torch.bool .*expected bool"):
        frame_relevance(frames.float(), frames)
    with pytest.raises(DynskipError, match=r"segment from 3.0 to 3.0 has no length"):
        relevant_frames(sample_times(2, 5.0), [(3.0, 3.0)])
    for count, duration in ((0, 5.0), (4, 0.0), (4, NAN)):
        with pytest.raises(DynskipError, match="both must be positive"):
            sample_times(count, duration)
