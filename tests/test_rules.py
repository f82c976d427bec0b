"""The rules against slow, literal loops in float64, and against their copy that runs without torch."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ACTIVATIONS, consensuses, generator
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import dynskip_onnx
from dynskip import Consensus, EarlyTerminator, MeanOfLogits, rules
from dynskip.activation import Activation, confidence, probabilities, to_logits
from dynskip.consensus import Readout
from dynskip.runtime.export import describe_consensus

NAN, INF = math.nan, math.inf
WIDE = (NAN, INF, -INF, 0.0, 50.0, -50.0, 99.0, 100.0, -100.0, 3e38, -3e38, 1e-8)
TIE = rules.tie(torch.float32)


def single(value: float) -> float:
    return float(np.float32(value))


numbers = st.one_of(st.sampled_from([single(x) for x in WIDE]), st.floats(-8, 8, width=32))
thresholds = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 1e-300, 1 - 1e-16, 0.97]), st.floats(0, 1))
logits = st.one_of(st.floats(-5, 5, width=32), st.sampled_from([NAN, INF, -INF, single(1e30), 0.0]))


@st.composite
def verdicts(draw: st.DrawFn) -> tuple[Tensor, list[float]]:
    """Draw `(T, N, 2)` gate logits, some of them repeated, and a threshold for each gate."""
    frames, stages = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    rows = draw(st.lists(st.lists(numbers, min_size=2 * stages, max_size=2 * stages), min_size=1, max_size=frames))
    chosen = draw(st.lists(st.integers(0, len(rows) - 1), min_size=frames, max_size=frames))
    bound = draw(st.lists(thresholds, min_size=stages, max_size=stages))
    return torch.tensor([rows[i] for i in chosen]).view(frames, stages, 2), bound


@st.composite
def histories(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[bool]]:
    """Draw `(B, T)` fates of frames, none of them unseen, `(B, T, K)` logits, and which gates repeat."""
    videos, frames, classes = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    repeats = draw(st.lists(st.booleans(), min_size=1, max_size=3))
    fates = st.lists(st.integers(0, len(repeats)), min_size=videos * frames, max_size=videos * frames)
    values = st.lists(logits, min_size=videos * frames * classes, max_size=videos * frames * classes)
    stopped_at = torch.tensor(draw(fates)).view(videos, frames)
    return stopped_at, torch.tensor(draw(values)).view(videos, frames, classes), repeats


def assert_equal(actual: Any, expected: Any) -> None:
    """Compare every bit; a NaN is a NaN."""
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


def assert_close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-12, atol=1e-12)


def readout(repeats: Sequence[bool], activation: Activation = "softmax", consensus: Consensus | None = None) -> Readout:
    return Readout(consensus or MeanOfLogits(), activation, tuple(repeats))


# The copy without torch


def test_the_copy_has_rules_of_the_same_names() -> None:
    section = inspect.getsource(dynskip_onnx).split("\n# Those of `dynskip.activation`")[0]
    copied = {name for name, f in inspect.getmembers(dynskip_onnx, inspect.isfunction) if f"\ndef {name}(" in section}
    copied -= {"_logit"}
    wanted = {"margins", "bounds", "forwards", "stopped", "nearness", "score", "tie", "further"}
    wanted |= {"nothing_counted", "count", "running", "ends"}
    assert copied == wanted <= set(dir(rules))
    assert dynskip_onnx.UNSEEN == rules.UNSEEN
    assert dynskip_onnx.SATURATED == rules.SATURATED
    assert dynskip_onnx.tie(np.float32) == TIE


@given(verdicts())
def test_the_copy_stops_frames_alike(drawn: tuple[Tensor, list[float]]) -> None:
    table, threshold = drawn
    margin, bound = rules.margins(table), rules.bounds(threshold)
    assert_equal(dynskip_onnx.margins(table.numpy()), margin)
    assert_equal(dynskip_onnx.bounds(threshold), bound)
    narrow = dynskip_onnx.bounds(threshold).astype(np.float32)
    forward = rules.forwards(margin, bound.float())
    assert_equal(dynskip_onnx.forwards(margin.numpy(), narrow), forward)
    assert_equal(dynskip_onnx.stopped(forward.numpy()), rules.stopped(forward))


@given(verdicts(), st.lists(st.integers(-1, 3), min_size=5, max_size=5))
def test_the_copy_scores_frames_and_chooses_the_furthest_alike(
    drawn: tuple[Tensor, list[float]], fates: list[int]
) -> None:
    table, _ = drawn
    frames, stages, _ = table.shape
    stopped_at = torch.tensor(fates[:frames]).clamp(max=stages)
    margin = rules.margins(table[torch.arange(frames), stopped_at.clamp(0, stages - 1)])
    assert_equal(dynskip_onnx.nearness(margin.numpy()), rules.nearness(margin))
    scores = dynskip_onnx.score(stopped_at.numpy(), margin.numpy())
    assert_equal(scores, rules.score(stopped_at, margin))
    best, frame = -1.0, -1
    for t, each in enumerate(scores.tolist()):
        assert dynskip_onnx.further(each, best, TIE) == bool(rules.further(each, best, TIE))
        if dynskip_onnx.further(each, best, dynskip_onnx.tie(np.float32)):
            best, frame = each, t
    wanted = -1 if (stopped_at == stages).any() else frame
    assert rules.fallback(stopped_at[None], table[None]).tolist() == [wanted]


@given(st.floats(-2, 12), st.floats(-2, 2))
@example(-1.0, 0.0)
def test_the_copy_takes_nearly_equal_scores_for_equal(best: float, ties: float) -> None:
    each = best + ties * TIE
    assert dynskip_onnx.further(each, best, TIE) == bool(rules.further(each, best, TIE))
    assume(abs(ties - 1) > 1e-6)
    assert dynskip_onnx.further(each, best, TIE) == (ties > 1)


@settings(max_examples=200)
@given(histories(), st.sampled_from(ACTIVATIONS), st.data())
def test_the_copy_counts_alike(
    drawn: tuple[Tensor, Tensor, list[bool]], activation: Activation, data: st.DataObject
) -> None:
    stopped_at, frame_logits, repeats = drawn
    videos, frames, classes = frame_logits.shape
    consensus = data.draw(st.sampled_from(consensuses(classes)))
    entry = describe_consensus(consensus)
    how = readout(repeats, activation, consensus)
    copied = dynskip_onnx.Readout(
        dynskip_onnx._consensus_of(entry, classes, None),
        activation,
        repeats,
        entry["of_probabilities"],
        entry["embedded_features"] > 0,
    )
    values = rules.embed(how, frame_logits).detach()
    start = rules.nothing_counted(how, torch.zeros(videos, classes, dtype=torch.float64))
    wanted = rules.running_after(how, rules.count(how, stopped_at, values, start), torch.float32)
    for b in range(videos):
        tally = dynskip_onnx.nothing_counted(copied, np.zeros(classes))
        assert_equal(dynskip_onnx.running(copied, tally), rules.running(how, start, torch.float32)[b])
        for t in range(frames):
            tally = dynskip_onnx.count(copied, int(stopped_at[b, t]), values[b, t].numpy(), tally)
            answer = dynskip_onnx.running(copied, tally)
            assert answer.dtype == np.float32
            np.testing.assert_allclose(answer, wanted[b, t], rtol=1e-5, atol=1e-6)
        assert dynskip_onnx.count(copied, rules.UNSEEN, values[b, 0].numpy(), tally) == tally


@given(
    st.lists(st.one_of(st.floats(-800, 800), st.floats(-8, 8)), min_size=1, max_size=4), st.sampled_from(ACTIVATIONS)
)
def test_the_copy_makes_probabilities_alike(values: list[float], activation: Activation) -> None:
    logits = torch.tensor(values, dtype=torch.float64)
    ours, theirs = probabilities(logits, activation), dynskip_onnx.probabilities(logits.numpy(), activation)
    np.testing.assert_allclose(theirs, ours, rtol=1e-12, atol=1e-300)
    again = to_logits(ours, activation)
    assert again.isfinite().all()
    np.testing.assert_allclose(dynskip_onnx.to_logits(ours.numpy(), activation), again, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(probabilities(again, activation), ours, rtol=1e-12, atol=1e-15)


@given(
    st.lists(st.one_of(st.floats(-6, 6, width=32), st.just(NAN)), min_size=2, max_size=4),
    st.sampled_from([0.3, 0.5, 0.7, 0.999, 1.0]),
    st.integers(0, 4),
    st.integers(1, 6),
    st.sampled_from(ACTIVATIONS),
)
@example([0.0, 0.0], 0.5, 0, 1, "softmax")
@example([100.0, 0.0], 1.0, 0, 1, "softmax")
@example([NAN, NAN], 0.3, 0, 1, "softmax")
@example([9.0, 0.0], 0.7, 3, 3, "softmax")
@example([9.0, 0.0], 0.7, 3, 4, "softmax")
@example([9.0, -9.0], 0.7, 3, 4, "sigmoid")
@example([9.0, 0.0], 0.7, 3, 4, "sigmoid")
@example([9.0, NAN], 0.3, 0, 1, "sigmoid")
def test_the_copy_ends_videos_alike(
    values: list[float], threshold: float, min_frames: int, seen: int, activation: Activation
) -> None:
    mean, terminator = torch.tensor([values]), EarlyTerminator(threshold, min_frames)
    terminator.activation = activation
    sure = float(confidence(probabilities(mean, activation), activation))
    # Exponentials may differ in their last digit.
    assume(not 0 < abs(sure - single(threshold)) < 1e-6)
    wanted = rules.ends(terminator, mean[None], torch.tensor([[seen]]), activation)
    rule = {"threshold": threshold, "min_frames": min_frames}
    assert dynskip_onnx.ends(rule, mean[0].numpy(), seen, activation) == bool(wanted)


# Slow and literal


def slow_stopped(margins: Sequence[float], bounds: Sequence[float]) -> int:
    for n, (margin, bound) in enumerate(zip(margins, bounds, strict=True)):
        if math.isnan(margin) or margin <= bound:
            return n
    return len(margins)


def slow_bound(probability: float) -> float:
    """Return the margin of a forward probability, within the limits that saturated gates exceed."""
    if probability == 0.0:
        return -100.0
    if probability == 1.0:
        return 99.0
    return min(max(math.log(probability) - math.log1p(-probability), -100.0), 99.0)


def slow_near(margin: float) -> float:
    if math.isinf(margin):
        return 0.0 if margin < 0 else 1.0
    return (1 + margin / (1 + abs(margin))) / 2


def slow_fallback(stopped_at: Sequence[int], margins: Sequence[float], stages: int) -> int:
    """Choose the deepest frame; of those, the one with the highest margin; of those, the earliest."""
    if stages in stopped_at:
        return -1
    best = -1
    for t, (gate, margin) in enumerate(zip(stopped_at, margins, strict=True)):
        if gate < 0:
            continue
        deeper = nearer = False
        if best != -1 and not math.isnan(margin):
            deeper = math.isnan(margins[best]) or gate > stopped_at[best]
            nearer = gate == stopped_at[best] and slow_near(margin) > slow_near(margins[best]) + TIE
        if best == -1 or deeper or nearer:
            best = t
    return best


def slow_count(
    stopped_at: Sequence[int], frame_logits: Sequence[Sequence[float]], repeats: Sequence[bool]
) -> tuple[list[list[float]], list[int]]:
    """Return the mean, and how many logits are in it, after each frame."""
    counted: list[Sequence[float]] = []
    means, counts = [], []
    last = None
    for gate, row in zip(stopped_at, frame_logits, strict=True):
        if gate == len(repeats):
            last = row
        shown = gate == len(repeats) or (gate >= 0 and repeats[gate])
        if shown and last is not None and all(math.isfinite(x) for x in last):
            counted.append(last)
        columns = [[row[k] for row in counted] for k in range(len(row))]
        means.append([math.fsum(column) / len(column) if column else NAN for column in columns])
        counts.append(len(counted))
    return means, counts


def slow_softmax(values: Sequence[float]) -> list[float]:
    if any(math.isnan(x) for x in values):
        return [NAN] * len(values)
    powers = [math.exp(x - max(values)) for x in values]
    return [power / sum(powers) for power in powers]


@given(verdicts())
@example((torch.tensor([[[50.0, -50.0]], [[-50.0, 50.0]], [[INF, -INF]], [[-INF, INF]]]), [0.0]))
@example((torch.tensor([[[50.0, -50.0]], [[-50.0, 50.0]], [[INF, -INF]], [[-INF, INF]]]), [1.0]))
def test_a_frame_stops_at_the_first_gate_that_does_not_exceed_its_bound(drawn: tuple[Tensor, list[float]]) -> None:
    table, threshold = drawn
    bound = rules.bounds(threshold)
    slow = [slow_bound(p) for p in threshold]
    assert_close(bound, slow)
    margin = rules.margins(table)
    wanted = [slow_stopped(row, bound.tolist()) for row in margin.tolist()]
    forward = rules.forwards(margin, bound)
    assert rules.stopped(forward).tolist() == wanted
    assert rules.stopped(forward.T, 0).tolist() == wanted


@pytest.mark.parametrize("threshold", [0.0, 1e-300, 0.5, 1 - 1e-16, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_no_threshold_overrules_a_gate_that_says_always(dtype: torch.dtype, threshold: float) -> None:
    said = torch.tensor([[-50, 50], [-INF, INF], [50, -50], [INF, -INF], [NAN, NAN], [INF, INF]], dtype=dtype)
    bound = rules.bounds([threshold])
    for wide in (bound, bound.float()):
        assert rules.forwards(rules.margins(said), wide).tolist() == [True, True] + [False] * 4


@given(verdicts(), st.lists(st.integers(-1, 3), min_size=5, max_size=5))
@example((torch.zeros(3, 1, 2), [0.5]), [0, 0, 0, 0, 0])
@example((torch.tensor([NAN, 0.0, -9.0]).view(3, 1, 1).expand(3, 1, 2), [0.5]), [0, 0, 0, 0, 0])
def test_the_fallback_is_the_earliest_of_those_that_got_furthest(
    drawn: tuple[Tensor, list[float]], fates: list[int]
) -> None:
    table, _ = drawn
    frames, stages, _ = table.shape
    stopped_at = torch.tensor(fates[:frames]).clamp(max=stages)
    margin = rules.margins(table[torch.arange(frames), stopped_at.clamp(0, stages - 1)])
    wanted = slow_fallback(stopped_at.tolist(), margin.tolist(), stages)
    other = torch.full_like(stopped_at, stages)  # a video beside it
    both = rules.fallback(torch.stack([stopped_at, other]), table.expand(2, -1, -1, -1))
    assert both.tolist() == [wanted, -1]
    for score, gate, each in zip(rules.score(stopped_at, margin), stopped_at.tolist(), margin.tolist(), strict=True):
        assert score == -2 if gate < 0 else score > -1
        if gate >= 0 and not math.isnan(each):
            assert float(score) == pytest.approx(2 * gate + slow_near(each), abs=1e-9)
            assert rules.score(torch.tensor(gate), torch.tensor(NAN)) < score


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tie_is_what_rounding_moves(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    said = torch.tensor([[[0.0, -1.0]], [[0.0, -1.0 + 2 * eps]], [[0.0, 0.0]]], dtype=dtype)
    stopped_at = torch.zeros(1, 3, dtype=torch.long)
    assert rules.fallback(stopped_at[:, :2], said[None, :2]).tolist() == [0]
    assert rules.fallback(stopped_at, said[None]).tolist() == [2]


# Two gates, the first of which repeats: a used frame, repeats of it in later calls, and the same once more.
LONG = (torch.tensor([[0, 2, 0, 1, 0, 2, 0, 0]]), torch.arange(16.0).view(1, 8, 2), [True, False])
SICK = torch.where(torch.arange(8) == 1, NAN, LONG[1].mT).mT


@given(histories(), st.lists(st.integers(1, 3), max_size=3), st.booleans())
@example(LONG, [2, 1, 3], False)
@example((LONG[0], SICK, LONG[2]), [2, 1, 3], True)
def test_means_are_of_the_used_frames_and_those_that_repeat_them(
    drawn: tuple[Tensor, Tensor, list[bool]], cuts: list[int], unseen: bool
) -> None:
    stopped_at, frame_logits, repeats = drawn
    if unseen:
        stopped_at = stopped_at.clone()
        stopped_at[:, -1] = rules.UNSEEN
    videos, frames, classes = frame_logits.shape
    how = readout(repeats)
    tally = start = rules.nothing_counted(how, torch.zeros(videos, classes, dtype=torch.float64))
    assert rules.running(how, start, torch.float64).isnan().all()
    slow = [slow_count(*pair, repeats) for pair in zip(stopped_at.tolist(), frame_logits.tolist(), strict=True)]
    means, counted = torch.tensor([s[0] for s in slow], dtype=torch.float64), torch.tensor([s[1] for s in slow])
    places = [0, *(place for place in itertools.accumulate(cuts) if place < frames), frames]
    parts = []
    for first, last in itertools.pairwise(places):  # the sums go from call to call
        after = rules.count(how, stopped_at[:, first:last], frame_logits[:, first:last], tally)
        tally = tuple(table[:, -1] for table in after)
        parts.append(after)
    whole = rules.count(how, stopped_at, frame_logits, start)
    for after in (whole, tuple(torch.cat(tables, 1) for tables in zip(*parts, strict=True))):
        assert_equal(after[1], counted)
        scale = torch.where(frame_logits.isfinite(), frame_logits, 0.0).abs().max().double() + 1
        assert_close(rules.running_after(how, after, torch.float64) / scale, means / scale)
    assert_equal(rules.read(how, stopped_at, frame_logits).isnan(), means.isnan())


@given(histories())
def test_the_last_used_frame_is_the_source_of_those_that_repeat_it(drawn: tuple[Tensor, Tensor, list[bool]]) -> None:
    stopped_at, _, repeats = drawn
    source, often = rules.source(stopped_at, repeats).tolist(), rules.times_counted(stopped_at, repeats).tolist()
    for b, gates in enumerate(stopped_at.tolist()):
        last, wanted = -1, []
        for t, gate in enumerate(gates):
            last = t if gate == len(repeats) else last
            wanted.append(last if gate == len(repeats) or repeats[gate] else -1)
        assert source[b] == wanted
        assert often[b] == [max(1, wanted.count(t)) for t in range(len(gates))]


@given(
    histories(), st.lists(st.floats(-6, 6, width=32), min_size=54, max_size=54), st.integers(0, 4), st.integers(0, 6)
)
def test_a_video_ends_after_the_first_frame_that_makes_it_sure(
    drawn: tuple[Tensor, Tensor, list[bool]], values: list[float], min_frames: int, nothing: int
) -> None:
    stopped_at = drawn[0]
    running = torch.tensor(values)[: 3 * stopped_at.numel()].view(*stopped_at.shape, 3).clone()
    running[:, :nothing] = NAN  # nothing has been used yet
    terminator = EarlyTerminator(0.7, min_frames)
    wanted = []
    for gates, rows in zip(stopped_at.tolist(), running.tolist(), strict=True):
        over, fates = False, []
        for t, (gate, row) in enumerate(zip(gates, rows, strict=True)):
            fates.append(rules.UNSEEN if over else gate)
            sure = max(slow_softmax(row))
            assume(not abs(sure - 0.7) < 1e-6)
            over = over or (sure > 0.7 and t + 1 > min_frames)
        wanted.append(fates)
    assert rules.end_videos(terminator, running, stopped_at, "softmax").tolist() == wanted


@given(st.lists(st.booleans(), min_size=1, max_size=5), st.sampled_from([torch.float32, torch.float16]))
def test_rows_keep_their_old_state_unless_told(rows: list[bool], dtype: torch.dtype) -> None:
    shapes = ((len(rows),), (len(rows), 3), (len(rows), 2, 2))
    old = tuple(torch.randn(shape, generator=generator(1)).to(dtype) for shape in shapes)
    new = tuple(torch.randn(shape, generator=generator(2)) for shape in shapes)
    kept = rules.keep(torch.tensor(rows), new, old)
    for a, b, c in zip(kept, new, old, strict=True):
        assert a.dtype == dtype
        for i, row in enumerate(rows):
            assert torch.equal(a[i], b[i].to(dtype) if row else c[i])


# Drawn decisions

DRAWS = 40_000
PROBABILITIES = (0.01, 0.2, 0.5, 0.77, 0.995)


def assert_as_often(forwards: Tensor, probability: float) -> None:
    spread = math.sqrt(probability * (1 - probability) / DRAWS)
    assert abs(float(forwards.double().mean()) - probability) < 4 * spread


@pytest.mark.parametrize("probability", PROBABILITIES)
@pytest.mark.parametrize("temperature", [0.2, 5.0])
def test_drawn_decisions_pass_as_often_as_their_probability_says(probability: float, temperature: float) -> None:
    margin = math.log(probability / (1 - probability))
    table = torch.tensor([3.0, 3.0 + margin]).expand(DRAWS, 2)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        drawn = rules.draw(table, 77.0, temperature, sample=True, training=False)
        bounds = rules.drawn_bounds(torch.zeros(DRAWS, dtype=torch.float64))
    assert_as_often(drawn > 0.5, probability)
    assert_as_often(rules.forwards(rules.margins(table), bounds), probability)
    assert bounds.isfinite().all()


def test_what_is_drawn_is_the_larger_of_the_logits_and_their_noise() -> None:
    table, noise = torch.randn(50, 2, generator=generator(3)), torch.randn(50, 2, generator=generator(4))
    drawn = rules.draw(table, 0.0, 0.7, sample=True, training=True, noise=noise)
    wanted = [float(b + y > a + x) for (a, b), (x, y) in zip(table.tolist(), noise.tolist(), strict=True)]
    torch.testing.assert_close(drawn, torch.tensor(wanted))


@given(verdicts(), st.sampled_from([0.3, 1.0, 4.0]), st.booleans())
def test_what_is_not_drawn_follows_the_bound_and_gradients_the_softmax(
    drawn: tuple[Tensor, list[float]], temperature: float, sample: bool
) -> None:
    table, threshold = drawn
    bound = float(rules.bounds(threshold)[0])
    hard = rules.draw(table[:, 0], bound, temperature, sample=False, training=False)
    assert hard.tolist() == [float(slow_stopped([m], [bound])) for m in rules.margins(table[:, 0]).tolist()]
    given_logits = table[:, 0].nan_to_num(0.0, 5.0, -5.0).clamp(-5, 5).double().requires_grad_()
    noise = torch.zeros_like(given_logits) if sample else None
    soft_too = rules.draw(given_logits, bound, temperature, sample, training=True, noise=noise)
    soft_too.sum().backward()
    for (stop, forward), gradient in zip(given_logits.tolist(), given_logits.grad.tolist(), strict=True):  # type: ignore[union-attr]
        p = 1 / (1 + math.exp((stop - forward) / temperature))
        slope = p * (1 - p) / temperature
        assert gradient == pytest.approx([-slope, slope], rel=1e-3, abs=1e-6)
