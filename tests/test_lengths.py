"""Padded batches of videos of different length give what each video gives alone, in any frame order."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    CLASSES,
    SIZE,
    Case,
    assert_same,
    cases,
    consensuses,
    fields_of,
    large_cases,
    randn,
    rows_of,
    toy_backbone,
    toy_model,
    toy_video,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from dynskip import (
    BudgetLoss,
    ClassificationLoss,
    CoarseToFine,
    DistillationLoss,
    DynskipError,
    EarlyTerminator,
    EfficiencyLoss,
    EncodedVideo,
    FrameOrder,
    LookAhead,
    PolicyGuidanceLoss,
    RandomOrder,
    SimilarityGate,
    SkipOutput,
    SoFLoss,
    StopOrForward,
    TargetRateLoss,
    UsageUniformityLoss,
    VideoResult,
    calibrate,
    metrics,
)
from dynskip.evaluation import evaluate
from dynskip.runtime.optimize import compare
from dynskip.video import collate_padded

ORDERS: tuple[FrameOrder | None, ...] = (None, CoarseToFine(), RandomOrder(3))


def padded(video: Tensor, lengths: Sequence[int], filling: float = math.nan) -> Tensor:
    video = video.clone()
    for row, length in enumerate(lengths):
        video[row, length:] = filling
    return video


def cut(output: SkipOutput, row: int, length: int) -> SkipOutput:
    """Take one video out of a padded output, without its padding."""
    values = fields_of(rows_of(output, slice(row, row + 1)))
    for name in ("forward", "used", "stopped_at", "frame_logits", "gate_logits", "inner_logits", "evaluated"):
        values[name] = None if values[name] is None else values[name][:, :length]
    return SkipOutput(**{**values, "lengths": None})


def assert_alone(
    model: StopOrForward, output: SkipOutput, video: Tensor, lengths: Sequence[int], **kwargs: Any
) -> None:
    """Compare each row with the video run alone, and look for what is said of padding."""
    for row, length in enumerate(lengths):
        alone = model(video[row : row + 1, :length], **kwargs)
        assert_same(cut(output, row, length), alone, skip=["inner_logits"])  # the skipping pass has none
        for name in ("used", "evaluated", "forward"):
            assert not getattr(output, name)[row, length:].any(), name
        assert (output.stopped_at[row, length:] == -1).all()
        assert output.frame_logits[row, length:].isnan().all()
    assert output.lengths is not None
    assert output.lengths.tolist() == list(lengths)


def test_every_way_of_running_gives_what_each_video_gives_alone() -> None:
    happened = Counter[str]()

    def check(
        case: Case, lengths: Sequence[int], order: FrameOrder | None, window: int, ahead: int, answers: tuple[int, Any]
    ) -> None:
        model, video = case.model(), case.video()
        model.consensus, model.activation = consensuses(dtype=torch.float64)[answers[0]], answers[1]
        model.order, lengths = order, [1 + n % case.frames for n in lengths[: case.batch]]
        batch, ends = padded(video, lengths), torch.tensor(lengths)
        outputs = [model.run_clip(batch, window, ends), model.decide(model.encode(batch, lengths))]
        for model.look_ahead in (None, LookAhead(window, ahead)):
            outputs.append(model(batch, lengths=lengths))
        for output in outputs:
            assert_alone(model, output, video, lengths)
        looked = [v[:length] if order is None else v[order(length)] for v, length in zip(video, lengths, strict=True)]
        results = [e for e in model.serve_streams(looked, 3, 2, ahead + 1) if isinstance(e, VideoResult)]
        for row, frames in enumerate(looked):
            session = model.stream()
            stopped_at = torch.stack([session(frame).stopped_at[0] for frame in frames])
            at = torch.arange(len(frames)) if order is None else order(len(frames))
            assert torch.equal(stopped_at, output.stopped_at[row][at])
            result = next(result for result in results if result.key == row)
            for each in (session.result(), result):
                torch.testing.assert_close(torch.as_tensor(each.logits).view(-1), output.logits[row])
                assert float(each.macs) == pytest.approx(float(output.macs[row]))
                step = int(each.fallback_frame)
                assert (step if step < 0 else int(at[step])) == output.fallback_frame[row]
        happened["padded"] += min(lengths) < case.frames
        happened["ended"] += bool((~output.seen).sum() > sum(case.frames - length for length in lengths))
        happened["fallback"] += bool(output.fallback.any())
        happened["speculated"] += bool(outputs[-1].speculative_macs.any())

    for n, case in enumerate(large_cases("lstm", "used")[:3] + large_cases("lstm", "reached")[:1]):
        check(case, [3, 8, 1, 5, 6], ORDERS[n % 3], 2 + n, n % 2, (n, ACTIVATIONS[n % 2]))
    numbers = st.integers(1, 8)
    lists = st.lists(numbers, min_size=5, max_size=5)
    answers = st.tuples(st.integers(0, 4), st.sampled_from(ACTIVATIONS))
    run = given(cases(), lists, st.sampled_from(ORDERS), numbers, st.integers(0, 2), answers)(check)
    settings(max_examples=15)(run)()
    assert all(happened[what] for what in ("padded", "ended", "fallback", "speculated")), happened


@pytest.mark.parametrize("order", ORDERS)
def test_still_shots_count_as_long_as_they_last_in_each_video(order: FrameOrder | None) -> None:
    backbone = toy_backbone(1)
    gates = [SimilarityGate(channels, 0.05).double() for channels in backbone.num_features]
    model = StopOrForward(backbone, gates, terminator=EarlyTerminator(0.9, 3), order=order).eval()
    video, lengths = randn(3, 2, 3, SIZE, SIZE, seed=2).repeat_interleave(4, 1), [3, 8, 6]
    batch = padded(video, lengths, filling=0.0)
    batch[0, 3:] = batch[0, 2]  # padding that repeats the last frame
    output = model(batch, lengths=lengths)
    assert (output.stopped_at == 0).any()
    assert_alone(model, output, video, lengths)
    assert_alone(model, model.decide(model.encode(batch, lengths)), video, lengths)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", range(5))
def test_padding_leaves_every_consensus_and_its_gradients_alone(kind: int, activation: Any) -> None:
    model = toy_model(2, order=CoarseToFine(), consensus=consensuses(dtype=torch.float64)[kind], activation=activation)
    lengths, targets = [4, 1, 6], torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    video, gradients = randn(3, 6, 3, SIZE, SIZE, seed=5), []
    for dense in (False, True):
        batches = [(padded(video, lengths), lengths)], [(video[[n], :end], [end]) for n, end in enumerate(lengths)]
        for batch in batches:
            model.train().zero_grad()
            outputs = [model(frames, lengths=ends, dense=dense, sample=False) for frames, ends in batch]
            rows = targets.split([len(ends) for _, ends in batch])
            losses = [ClassificationLoss()(output, row) for output, row in zip(outputs, rows, strict=True)]
            torch.stack(losses).mean().backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            gradients[-1].append(torch.cat([output.logits for output in outputs]))
        torch.testing.assert_close(gradients[-2], gradients[-1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_the_dense_pass_leaves_padding_out(order: FrameOrder | None, training: bool) -> None:
    model, lengths, video = toy_model(1, order=order).train(training), [3, 1, 6], randn(3, 6, 3, SIZE, SIZE, seed=5)
    output = model(padded(video, lengths), lengths=lengths, dense=True)
    assert_alone(model, output, video, lengths, dense=True)
    assert output.logits.requires_grad or not training


LOSSES: dict[str, Callable[[StopOrForward], Any]] = {
    "thesis": lambda model: SoFLoss(model.lookup_for((SIZE, SIZE))),
    "all frames": lambda model: SoFLoss(model.lookup_for((SIZE, SIZE)), all_frames=1.0),
    "classification": lambda model: ClassificationLoss(),
    "efficiency": lambda model: EfficiencyLoss(model.lookup_for((SIZE, SIZE)), normalize=True),
    "guidance": lambda model: PolicyGuidanceLoss(0.5),
    "distillation": lambda model: DistillationLoss(2.0),
}


def value(loss: Any, output: SkipOutput, targets: Tensor) -> Tensor:
    with_targets = isinstance(loss, SoFLoss | ClassificationLoss | PolicyGuidanceLoss)
    found = loss(output, targets) if with_targets else loss(output)
    return found.total if isinstance(loss, SoFLoss) else found  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("order", ORDERS)
def test_training_gives_the_mean_of_what_each_video_gives_alone(order: FrameOrder | None, kind: str) -> None:
    model = toy_model(2, order=order).train()
    lengths, targets = [4, 1, 6], torch.tensor([0, 1, 3])
    video, noise = randn(3, 6, 3, SIZE, SIZE, seed=5), randn(3, 6, 3, 2, seed=6)
    loss, gradients = LOSSES[kind](model), []

    def gradient(losses: list[Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        torch.stack(losses).mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    output = model.decide(model.encode(padded(video, lengths), lengths), noise=noise)
    whole = value(loss, output, targets)
    gradients.append(gradient([whole]))
    alone = []
    for row, length in enumerate(lengths):
        encoded = model.encode(video[row : row + 1, :length])
        each = model.decide(encoded, noise=noise[row : row + 1, :length])
        assert_same(cut(output, row, length), each)
        alone.append(value(loss, each, targets[row : row + 1]))
    torch.testing.assert_close(whole, torch.stack(alone).mean())
    gradients.append(gradient(alone))
    assert gradients[0].keys() == gradients[1].keys()
    for name, found in gradients[0].items():
        assert found.isfinite().all(), name
        torch.testing.assert_close(found, gradients[1][name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["rates", "usage", "budget"])
def test_losses_over_shares_count_each_video_alike(kind: str) -> None:
    """A short video weighs as much as a long one: repeated to the same length, it changes nothing."""
    model = toy_model(3, temporal=None, state_update="used", inner=False).train()
    video, noise = randn(2, 6, 3, SIZE, SIZE, seed=7), randn(2, 6, 3, 2, seed=8)
    video[0, 3:], noise[0, 3:] = video[0, :3], noise[0, :3]
    losses = {
        "rates": lambda: TargetRateLoss(0.4),
        "usage": lambda: UsageUniformityLoss(),
        "budget": lambda: BudgetLoss(model.lookup_for((SIZE, SIZE)), 0.2),
    }
    loss = losses[kind]()
    short = model.decide(model.encode(padded(video, [3, 6]), [3, 6]), noise=noise)
    torch.testing.assert_close(loss(short), loss(model.decide(model.encode(video), noise=noise)))


def test_stored_features_keep_lengths_and_ignore_what_is_stored_of_padding() -> None:
    model, lengths, video = toy_model(1), [2, 5], randn(2, 5, 3, SIZE, SIZE, seed=3)
    encoded = model.encode(padded(video, lengths), lengths)
    assert encoded.lengths is not None
    assert encoded.lengths.tolist() == lengths
    pooled = tuple(padded(x, lengths) for x in encoded.pooled)
    dirty = EncodedVideo(pooled, padded(encoded.frame_logits, lengths), (SIZE, SIZE), encoded.lengths)
    listed = dataclasses.replace(dirty, lengths=lengths)  # type: ignore[arg-type]
    for training in (False, True):
        model.train(training)
        outputs = [model.decide(each, sample=False) for each in (encoded, dirty, listed)]
        assert_same(outputs[2], outputs[0], exact=True)
        assert_same(outputs[1], outputs[0], exact=True)
    loss = SoFLoss(model.lookup_for((SIZE, SIZE)))(outputs[1], torch.tensor([0, 1])).total
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.gates.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("lengths", "telling"),
    [
        ([3, 4, 5], "2 videos"),
        ([0, 4], "from 1 to 4"),
        ([1, 5], "from 1 to 4"),
        ([2.0, 3.0], "whole number"),
        (torch.tensor([True, True]), "whole number"),
        (3, r"lengths=\[len\(each\)"),
        (["a", "b"], r"lengths=\[len\(each\)"),
    ],
)
def test_lengths_that_do_not_fit(lengths: Any, telling: str) -> None:
    model, video = toy_model(1), randn(2, 4, 3, SIZE, SIZE, seed=1)
    encoded = model.encode(video)
    encoded.lengths = lengths
    for call in (
        lambda: model(video, lengths=lengths),
        lambda: model(video, lengths=lengths, dense=True),
        lambda: model.run_clip(video, 2, lengths),
        lambda: model.encode(video, lengths),
        lambda: model.decide(encoded),
        lambda: model.tune(video, lengths),
        lambda: model.optimize(video, lengths=lengths, compile=False),
    ):
        with pytest.raises(DynskipError, match=telling):
            call()


def test_a_list_of_videos_is_told_how_to_pad() -> None:
    videos = [randn(n, 3, SIZE, SIZE, seed=n) for n in (2, 4)]
    with pytest.raises(DynskipError, match=r"pad_sequence\(videos, batch_first=True\).*lengths=") as caught:
        toy_model(1)(videos)
    assert "255" not in str(caught.value)


def test_only_padding_may_have_nan() -> None:
    model, video = toy_model(1), padded(randn(2, 4, 3, SIZE, SIZE, seed=1), [3, 4])
    with pytest.raises(DynskipError, match="frame 3 of video 0"):
        model(video)
    video[1, 2] = math.inf
    with pytest.raises(DynskipError, match="1 frames, the first being frame 2 of video 1"):
        model(video, lengths=[3, 4])


def test_optimizing_and_tuning_take_lengths() -> None:
    model, lengths, video = toy_model(1), [2, 4], randn(2, 4, 3, SIZE, SIZE, seed=1)
    batch = padded(video, lengths)
    _, agreement = model.optimize(batch, lengths=lengths, compile=False)
    assert agreement.decisions == agreement.predictions == 1
    other = toy_model(1, forward_threshold=1.0)
    plain = torch.cat([model(video[:1, :2]).stopped_at.flatten(), model(video[1:]).stopped_at.flatten()])
    assert compare(model, other, batch, lengths).decisions == pytest.approx(float((plain < 1).double().mean()))
    assert isinstance(model.tune(batch, lengths), LookAhead)


def test_metrics_leave_padding_out() -> None:
    stopped_at, lengths = torch.tensor([[2, 0, -1, -1], [2, 2, 1, -1]]), torch.tensor([2, 4])
    usage = metrics.frame_usage(stopped_at, 2, lengths)
    assert (usage.used, *usage.stopped, usage.unseen) == pytest.approx((3 / 6, 1 / 6, 1 / 6, 1 / 6))
    lookup = toy_model(1).lookup_for((SIZE, SIZE))
    compute = metrics.executed_compute(torch.tensor([2e9, 4e9]), lengths, lookup)
    assert (compute.per_video, compute.per_frame) == pytest.approx((3.0, 1.0))
    assert compute.dense_per_video == pytest.approx(3 * lookup.dense / 1e9)
    relevant = torch.tensor([[True, False, True, True], [False, True, False, False]])
    found = metrics.frame_relevance(stopped_at == 2, relevant, lengths)
    assert (found.precision, found.recall, found.relevant) == pytest.approx((2 / 3, 1.0, 2 / 6))
    for call in (
        lambda: metrics.frame_usage(stopped_at, 2, torch.tensor([2, 5])),
        lambda: metrics.executed_compute(torch.tensor([1.0, 2.0]), torch.tensor([1, 2, 3]), lookup),
    ):
        with pytest.raises(DynskipError):
            call()


def test_an_output_tells_lengths_in_words() -> None:
    output = toy_model(1)(randn(2, 4, 3, SIZE, SIZE, seed=1), lengths=[2, 4], dense=True)
    assert "2 videos of 2 to 4 frames" in repr(output)
    assert "6 frames used, 0 stopped, 0 unseen" in repr(output)
    assert output.logits.shape[1] == CLASSES


def batches_of(videos: Sequence[Tensor], size: int) -> Any:
    """Load videos of different length in padded batches."""
    samples = [(video, n % CLASSES, f"video {n}") for n, video in enumerate(videos)]
    return DataLoader(samples, size, collate_fn=collate_padded)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ORDERS)
def test_calibration_measures_what_single_videos_give(order: FrameOrder | None) -> None:
    model = toy_model(3, share=0.8, terminator=EarlyTerminator(0.9, 1), order=order)
    videos = [toy_video(1, length, seed=n)[0] for n, length in enumerate((2, 5, 3, 7, 1, 4))]
    alone, together = (list(batches_of(videos, size)) for size in (1, 4))
    for baseline in (calibrate.dense, calibrate.uniform_frames):
        assert baseline(model, together) == baseline(model, alone)
    random = calibrate.random_frames(model, together)
    assert random[-1] == calibrate.dense(model, alone)
    assert random[0].macs == pytest.approx(model.lookup_for((SIZE, SIZE)).dense)
    for end in (0.3, None):
        point = calibrate.CurvePoint(0.0, 0.0, (0.05, 0.1, 0.2), end)
        found = calibrate.replay(model, calibrate.encode(model, together), point)
        assert found == calibrate.replay(model, alone, point)
        other = toy_model(3, share=0.8, terminator=end and EarlyTerminator(end, 1), order=order)
        other.forward_threshold = point.forward_threshold
        outputs = [other(video[None]) for video in videos]
        assert found.macs == pytest.approx(float(torch.cat([output.macs for output in outputs]).mean()))
        right = [int(output.logits.argmax()) == n % CLASSES for n, output in enumerate(outputs)]
        assert found.accuracy == pytest.approx(sum(right) / len(right))
        assert any((~output.seen).any() for output in outputs) == (end is not None)


def test_evaluation_gives_what_single_videos_give() -> None:
    model = toy_model(3, share=0.8, terminator=EarlyTerminator(0.9, 2), order=CoarseToFine())
    videos = [toy_video(1, length, seed=n)[0] for n, length in enumerate((2, 5, 3, 7, 1, 4))]
    relevant = {f"video {n}": torch.arange(len(video)) < 2 for n, video in enumerate(videos)}
    alone, together = (evaluate(model, batches_of(videos, size), relevant=relevant) for size in (1, 4))
    for result, same in zip(alone.results, together.results, strict=True):
        assert dataclasses.replace(same, milliseconds=result.milliseconds) == result
    for one, other in zip(alone.records, together.records, strict=True):
        assert len(other["stopped_at"]) == len(videos[int(other["video"].split()[1])])
        for name in ("stopped_at", "fallback_frame", "correct", "relevant"):
            assert one[name] == other[name]
        assert one["gmacs"] == pytest.approx(other["gmacs"])
