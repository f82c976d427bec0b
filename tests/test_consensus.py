"""How used frames make a video's answer, in every way of running and in training."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
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
    large_cases,
    randn,
    toy_model,
    toy_video,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dynskip_onnx
from dynskip import (
    AttentionMean,
    Consensus,
    DynskipError,
    EarlyTerminator,
    EncodedVideo,
    MeanOfLogits,
    MeanOfProbabilities,
    StopOrForward,
    TopKMean,
    VideoResult,
    calibrate,
    rules,
)
from dynskip.activation import Activation, probabilities
from dynskip.consensus import Readout
from dynskip.order import CoarseToFine, FrameOrder, RandomOrder
from dynskip.runtime.export import describe_consensus, describe_order

KINDS = [type(each).__name__ for each in consensuses()]


class Fading(Consensus):
    """A mean in which each frame weighs half as much as the next one: the order of frames matters."""

    def initial(self, zeros: Tensor) -> tuple[Tensor, ...]:
        return zeros, zeros[:, 0]

    def add(self, state: tuple[Tensor, ...], values: Tensor) -> tuple[Tensor, ...]:
        total, weight = state
        return total / 2 + values, weight / 2 + 1

    def answer(self, state: tuple[Tensor, ...]) -> Tensor:
        total, weight = state
        return total / weight[:, None]


class FadingInNumpy:
    def initial(self, zeros: Any) -> Any:
        return zeros, 0.0

    def add(self, state: Any, values: Any) -> Any:
        return state[0] / 2 + values, state[1] / 2 + 1

    def answer(self, state: Any) -> Any:
        return state[0] / (state[1] or math.nan)


class OneByOne(MeanOfLogits):
    """The mean, as a consensus that says nothing of windows and weights."""

    add_window = Consensus.add_window


def make(kind: str, dtype: torch.dtype = torch.float64, classes: int = CLASSES) -> Consensus:
    return next(each for each in [*consensuses(classes, dtype), Fading()] if type(each).__name__ == kind)


def literally(consensus: Consensus, activation: Activation, frames: list[Tensor]) -> Tensor:
    """Return the answer from `(K,)` float64 logits of used frames, as a person would compute it."""
    table = torch.stack(frames)
    if isinstance(consensus, Fading):
        weights = 0.5 ** torch.arange(len(table) - 1, -1, -1, dtype=torch.float64)
        return weights @ table / weights.sum()
    if isinstance(consensus, AttentionMean):
        scores = consensus.embed(table.to(next(consensus.parameters()).dtype))[:, -1]
        return scores.double().softmax(0) @ table
    if isinstance(consensus, TopKMean):
        return table.sort(0, descending=True).values[: consensus.k].mean(0)
    return probabilities(table, activation).mean(0) if consensus.of_probabilities else table.mean(0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [*KINDS, "Fading"])
@torch.no_grad()
def test_answers_are_what_the_name_says(kind: str, activation: Activation) -> None:
    """The second of three gates repeats; a frame has a NaN, one an infinite logit; the window is cut anywhere."""
    consensus, repeats = make(kind), (False, True, False)
    how = Readout(consensus, activation, repeats)
    fates = [1, 3, 0, 1, 3, 1, 3, 2, 1, 3, 3, 1]
    logits = 3 * randn(12, CLASSES, seed=3)
    logits[4, 1], logits[9] = math.nan, math.inf
    counted, last, wanted = [], None, []
    for fate, row in zip(fates, logits, strict=True):
        last = row if fate == 3 else last
        if last is not None and fate in (1, 3) and last.isfinite().all():
            counted.append(last)
        wanted.append(literally(consensus, activation, counted) if counted else torch.full((CLASSES,), math.nan))
    stopped_at = torch.tensor([fates])
    got = rules.read(how, stopped_at, logits[None])[0]
    shown = probabilities(got, activation) if consensus.of_probabilities else got
    torch.testing.assert_close(shown, torch.stack(wanted).double(), rtol=1e-10, atol=1e-10, equal_nan=True)
    tally = rules.nothing_counted(how, torch.zeros(1, CLASSES, dtype=torch.float64))
    values, parts = rules.embed(how, logits)[None], []
    for first, end in ((0, 1), (1, 4), (4, 5), (5, 12)):
        after = rules.count(how, stopped_at[:, first:end], values[:, first:end], tally)
        tally = tuple(table[:, -1] for table in after)
        parts.append(rules.running_after(how, after, torch.float64))
    torch.testing.assert_close(torch.cat(parts, 1)[0], got, rtol=0, atol=0, equal_nan=True)


def ready(case: Case, consensus: Consensus, activation: Activation, repeating: int) -> StopOrForward:
    """Build a case's model with a consensus; bit `n` of `repeating` says whether gate `n` repeats."""
    model = case.model()
    model.activation, model.consensus = activation, consensus
    for n, gate in enumerate(model.gates):
        gate.repeats_last = bool(repeating >> n & 1)
    return model


def one_by_one(model: StopOrForward, video: Tensor, lengths: list[int]) -> list[Tensor]:
    """Return the frames of each video in the model's order, without padding."""
    clips = [clip[:length] for clip, length in zip(video, lengths, strict=True)]
    return clips if model.order is None else [clip[model.order(len(clip))] for clip in clips]


@torch.no_grad()
def assert_all_ways(model: StopOrForward, video: Tensor, lengths: list[int], window: int) -> None:
    masked = model.decide(model.encode(video, lengths))
    assert masked.logits.isfinite().all()
    assert_same(model.run_clip(video, window, lengths), masked, skip=["inner_logits"])
    assert_same(model(video, lengths=lengths), masked, skip=["inner_logits"])
    arriving = one_by_one(model, video, lengths)
    for ahead in (1, 3):
        events = {e.key: e for e in model.serve_streams(arriving, 3, 4, ahead) if isinstance(e, VideoResult)}
        for row, wanted in enumerate(masked.logits):
            assert events[row].error is None
            assert events[row].activation == model.activation
            torch.testing.assert_close(events[row].logits, wanted)
    for row, frames in enumerate(arriving):
        session = model.stream()
        steps = [session(frame) for frame in frames]
        torch.testing.assert_close(session.result().logits[0], masked.logits[row])
        assert sum(int(step.used) for step in steps) == int(masked.used[row].sum())
        if masked.used[row].any():
            torch.testing.assert_close(steps[-1].running_logits[0], masked.logits[row])
        alone = model(video[row : row + 1, : lengths[row]])
        torch.testing.assert_close(alone.logits[0], masked.logits[row])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [*KINDS, "Fading"])
def test_every_way_of_running_gives_the_same_answer(kind: str, activation: Activation) -> None:
    def check(case: Case, order: FrameOrder | None, window: int, repeating: int, data: st.DataObject) -> None:
        model = ready(case, make(kind), activation, repeating)
        model.order = order
        length = st.integers(1, case.frames)
        lengths = data.draw(st.lists(length, min_size=case.batch, max_size=case.batch))
        assert_all_ways(model, case.video(), lengths, window)

    case = large_cases("lstm", "used")[1]
    assert_all_ways(ready(case, make(kind), activation, 0b010), case.video(), [case.frames] * case.batch, 4)
    drawn = given(
        case=cases(),
        order=st.sampled_from([None, CoarseToFine(), RandomOrder(3)]),
        window=st.integers(1, 9),
        repeating=st.integers(0, 15),
        data=st.data(),
    )
    settings(max_examples=3)(drawn(check))()


# Without torch


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Export a model with attention, and one for all consensuses without weights."""
    folder = tmp_path_factory.mktemp("consensus")
    return {kind: onnx_model(kind).export(folder / kind, SIZE) for kind in ("AttentionMean", "MeanOfLogits")}


def onnx_model(kind: str) -> StopOrForward:
    model = toy_model(seed=5, stages=2, inner=False, share=0.7, state_update="used").float()
    model.consensus, model.terminator = make(kind, torch.float32), EarlyTerminator(0.8, 3)
    model.gates[1].repeats_last = True
    return model


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [*KINDS, "Fading"])
@torch.no_grad()
def test_onnx_gives_the_same_answer(
    exported: dict[str, Path], tmp_path: Path, kind: str, activation: Activation
) -> None:
    model, own = onnx_model(kind), FadingInNumpy() if kind == "Fading" else None
    model.activation, model.order = activation, CoarseToFine() if activation == "sigmoid" else None
    folder = shutil.copytree(exported.get(kind, exported["MeanOfLogits"]), tmp_path / "model")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"activation": activation, "consensus": describe_consensus(model.consensus)}
    manifest |= {"order": describe_order(model.order)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    runner = dynskip_onnx.load(folder, threads=1, consensus=own)
    video, lengths = toy_video(6, 8, seed=20, dtype=torch.float32), [8, 5, 8, 3, 8, 1]
    wanted = model(video, lengths=lengths)
    assert len(wanted.stopped_at.unique()) > 2
    arriving = [frames.numpy() for frames in one_by_one(model, video, lengths)]
    served = {end.key: end for end in runner.serve(map(list, arriving), capacity=4)}
    for row, frames in enumerate(arriving):
        session = runner.stream()
        steps = [session(frame[None]) for frame in frames]
        if wanted.used[row].any():
            running = steps[-1].running_probabilities[0]
            np.testing.assert_allclose(running, wanted.probabilities[row], rtol=1e-3, atol=1e-5)
        for result in (runner.clip(video[row, : lengths[row]].numpy()), session.result(), served[row]):
            assert result.frames_seen == int(wanted.seen[row].sum())
            np.testing.assert_allclose(result.logits, wanted.logits[row], rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(result.probabilities, wanted.probabilities[row], rtol=1e-3, atol=1e-5)


def test_onnx_says_what_consensus_is_wanted(exported: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exported["MeanOfLogits"], tmp_path / "model")
    with pytest.raises(dynskip_onnx.DynskipOnnxError, match="Leave `consensus` out"):
        dynskip_onnx.load(folder, consensus=FadingInNumpy())
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry, telling in (
        (describe_consensus(Fading()), r"own, .*Fading. Give it in numpy"),
        ({**manifest["consensus"], "name": "TopKMean"}, "nothing for 'consensus.k'"),
        ({**manifest["consensus"], "name": "AttentionMean"}, "'consensus.embedded_features'"),
    ):
        (folder / "manifest.json").write_text(json.dumps({**manifest, "consensus": entry}))
        with pytest.raises(dynskip_onnx.DynskipOnnxError, match=telling):
            dynskip_onnx.load(folder)


def test_onnx_reads_folders_that_know_of_no_consensus(exported: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exported["MeanOfLogits"], tmp_path / "model")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["activation"], manifest["consensus"]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 1}))
    clip = toy_video(1, 6, seed=20, dtype=torch.float32)[0].numpy()
    old, new = (dynskip_onnx.load(path, threads=1).clip(clip) for path in (folder, exported["MeanOfLogits"]))
    np.testing.assert_array_equal(old.logits, new.logits)


def test_a_single_logit_in_onnx(tmp_path: Path) -> None:
    from helpers import random_gates, toy_backbone

    backbone = toy_backbone(1, stages=1, classes=1)
    model = StopOrForward(
        backbone, random_gates(backbone.num_features, 1), activation="sigmoid", terminator=EarlyTerminator(0.9, 1)
    )
    model = model.float().eval()
    video = toy_video(2, 4, seed=3, dtype=torch.float32)
    runner = dynskip_onnx.load(model.export(tmp_path / "model", SIZE), threads=1)
    for row, wanted in enumerate(model(video).probabilities):
        np.testing.assert_allclose(runner.clip(video[row].numpy()).probabilities, wanted, rtol=1e-3)


# Many frames


def test_100_000_frames_do_not_drift() -> None:
    frames, window = 100_000, 1_000
    logits = (1000 + randn(frames, 2, seed=1)).float()
    wanted = [math.fsum(column) / frames for column in logits.T.tolist()]
    assert abs(np.cumsum(logits.numpy(), 0)[-1, 0] / frames - wanted[0]) > 1e-4  # in float32 they would
    for consensus in (MeanOfLogits(), AttentionMean(2)):
        how = Readout(consensus, "softmax", (False,))
        with torch.no_grad():
            tally = rules.nothing_counted(how, torch.zeros(1, 2, dtype=torch.float64))
            values = rules.embed(how, logits)[None]
            for part in values.split(window, 1):
                used = torch.ones(1, part.shape[1], dtype=torch.long)
                tally = tuple(table[:, -1] for table in rules.count(how, used, part, tally))
            assert rules.running(how, tally, torch.float64)[0].tolist() == pytest.approx(wanted, rel=1e-12)
    copied = dynskip_onnx.Readout(dynskip_onnx.Mean(), "softmax", (False,))
    ours = dynskip_onnx.nothing_counted(copied, np.zeros(2))
    for row in logits.numpy():
        ours = dynskip_onnx.count(copied, 1, row, ours)
    assert (ours.state[0] / ours.state[1]).tolist() == pytest.approx(wanted, rel=1e-12)


# Training


@pytest.mark.parametrize("repeating", [0, 0b011])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [*KINDS, "Fading"])
def test_training_gives_the_answer_of_inference_and_gradients(
    kind: str, activation: Activation, repeating: int
) -> None:
    model = ready(large_cases("lstm", "used")[7], make(kind), activation, repeating)
    model.terminator = None
    video = toy_video(5, 8, seed=9)
    with torch.no_grad():
        encoded = model.encode(video)
    wanted = model.decide(encoded)
    assert wanted.fallback.any() or len(wanted.stopped_at.unique()) > 2
    encoded.frame_logits.requires_grad_()
    output = model.train().decide(encoded, sample=False)
    assert torch.equal(output.stopped_at, wanted.stopped_at)
    torch.testing.assert_close(output.probabilities, wanted.probabilities)
    output.probabilities[:, 0].sum().backward()
    grad = encoded.frame_logits.grad
    assert grad is not None
    assert grad.isfinite().all()
    assert (grad[wanted.used.any(1)].abs().sum((1, 2)) > 0).all()
    for gate in model.gates:  # also through the frames that they stop
        assert gate.decide.weight.grad.abs().sum() > 0
        assert gate.decide.weight.grad.isfinite().all()
    for name, parameter in model.consensus.named_parameters():
        assert parameter.grad is not None, name


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, 3))
def test_the_mean_in_closed_form_is_the_mean_frame_by_frame(seed: int, gates: int) -> None:
    repeats = tuple(bool(seed >> n & 1) for n in range(gates))
    source = torch.Generator().manual_seed(seed)
    stopped_at = torch.randint(0, gates + 1, (3, 6), generator=source)
    stopped_at[:, 0] = gates
    logits, weights = randn(3, 6, CLASSES, seed=seed), (stopped_at == gates).double()
    found = []
    for consensus in (MeanOfLogits(), OneByOne()):
        x, w = logits.clone().requires_grad_(), weights.clone().requires_grad_()
        answers = rules.weighted(Readout(consensus, "softmax", repeats), stopped_at, x, w)
        answers.square().sum().backward()
        used = stopped_at == gates
        assert w.grad is not None
        found.append((answers, x.grad, w.grad[used], w.grad[~used] if not any(repeats) else x.grad))
    for closed, stepped in zip(*found, strict=True):
        torch.testing.assert_close(stepped, closed)


@pytest.mark.parametrize("kind", ["MaxOfLogits", "TopKMean"])
def test_a_stopped_frame_learns_what_it_would_have_changed(kind: str) -> None:
    consensus, stopped_at = make(kind), torch.tensor([[1, 1, 0]])
    logits = torch.tensor([[[1.0, 5.0], [2.0, 4.0], [3.0, 2.0]]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    how = Readout(consensus, "softmax", (False,))
    rules.weighted(how, stopped_at, logits, weights)[0, 0].backward()
    one, other = (rules.read(how, torch.tensor([[1, 1, use]]), logits)[0, -1, 0] for use in (1, 0))
    assert weights.grad is not None
    assert float(weights.grad[0, 2]) == pytest.approx(float(one - other))
    assert weights.grad[0, 2] > 0


def test_attention_learns_which_frames_to_trust() -> None:
    """From stored features: sure frames are right, unsure ones are noise that outnumbers them."""
    model = toy_model(stages=1, forward_threshold=0.0).float()
    attention = AttentionMean(CLASSES, hidden=8)
    torch.manual_seed(0)
    nn.init.normal_(next(attention.parameters()))
    model.consensus = attention
    targets = torch.randint(CLASSES, (128,))
    logits = 2.0 * torch.randn(128, 8, CLASSES)
    right = torch.rand(128, 8) < 0.25
    logits[right] = 6.0 * nn.functional.one_hot(targets, CLASSES)[:, None].expand(-1, 8, -1)[right].float()
    encoded = EncodedVideo(tuple(torch.zeros(128, 8, c) for c in model.backbone.num_features), logits, (SIZE, SIZE))
    plain = (logits.mean(1).argmax(-1) == targets).float().mean()
    optimiser = torch.optim.Adam(attention.parameters(), 0.02)
    for _ in range(60):
        loss = nn.functional.cross_entropy(dense(model, encoded), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    learned = (dense(model, encoded).argmax(-1) == targets).float().mean()
    assert learned > plain + 0.1


def dense(model: StopOrForward, encoded: EncodedVideo) -> Tensor:
    used = torch.full(encoded.frame_logits.shape[:2], model.backbone.num_stages)
    return rules.weighted(model.readout, used, encoded.frame_logits)


# With everything else


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "Fading"])
def test_baselines_without_gates_use_it(kind: str) -> None:
    model, video = toy_model(), toy_video(3, 5, seed=2)
    model.consensus = make(kind)
    logits = model.encode(video).frame_logits
    wanted = torch.stack([literally(model.consensus, "softmax", list(rows)) for rows in logits])
    shown = wanted.log() if model.consensus.of_probabilities else wanted
    torch.testing.assert_close(model(video, dense=True).logits, shown)
    seen = []

    def metric(scores: Tensor, targets: Tensor) -> float:
        seen.append(scores)
        return 0.0

    calibrate.dense(model, [(video, torch.zeros(3, dtype=torch.long))], metric=metric)
    torch.testing.assert_close(seen[-1], shown.softmax(-1))


def test_what_attention_costs_is_counted() -> None:
    model, video = toy_model(share=0.8), toy_video(2, 6, seed=4)
    before = model.lookup_for((SIZE, SIZE)).head
    model.consensus = AttentionMean(CLASSES, hidden=5).double().eval()
    assert model.lookup_for((SIZE, SIZE)).head == before + CLASSES * 5 + 5
    for video_alone in video:  # one video: no fallback of one beside it
        counter: Any = FlopCounterMode(display=False)
        with counter:
            output = model.run_clip(video_alone[None], window=1)
        assert output.used.any()
        assert counter.get_total_flops() / 2 == float(output.macs)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_copied_and_pickled(kind: str, tmp_path: Path) -> None:
    from dynskip import LinearGate, stage_model

    backbone = stage_model("test_resnet", num_classes=CLASSES, input_size=(3, 32, 32))
    gates = [LinearGate(channels) for channels in backbone.num_features]
    model = StopOrForward(backbone, gates, consensus=make(kind, torch.float32)).eval()
    assert f"make the answer by {kind}(" in model.summary()
    folder = model.save_pretrained(tmp_path / "model")
    assert kind in (folder / "README.md").read_text()
    video, again = torch.randn(2, 3, 3, 32, 32), StopOrForward.from_pretrained(folder)
    for twin in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.consensus).__name__ == kind
        assert torch.equal(twin(video).logits, model(video).logits)
    config = json.loads((folder / "config.json").read_text())
    del config["consensus"]
    (folder / "config.json").write_text(json.dumps(config))
    if kind != "AttentionMean":  # as an earlier release wrote it
        assert type(StopOrForward.from_pretrained(folder).consensus) is MeanOfLogits


@pytest.mark.parametrize("kind", [*KINDS, "Fading"])
def test_a_session_goes_on_elsewhere(kind: str) -> None:
    model, video = toy_model(share=0.9), toy_video(2, 6, seed=4)
    model.consensus = make(kind)
    model.gates[0].repeats_last = True
    session, moved = model.stream(2), model.stream(2)
    for t in range(3):
        session(video[:, t])
    moved.load_state_dict(session.state_dict())
    for t in range(3, 6):
        assert torch.equal(session(video[:, t]).running_logits, moved(video[:, t]).running_logits)
    assert torch.equal(session.result().logits, moved.result().logits)
    state, model.consensus = session.state_dict(), TopKMean(4)
    with pytest.raises(DynskipError, match="its consensus is"):
        model.stream(2).load_state_dict(state)


def changed(**members: Any) -> Consensus:
    return type("Mine", (MeanOfLogits,), members)()  # type: ignore[no-any-return]


WRONG: dict[str, tuple[Any, str]] = {
    "a function": (torch.mean, "is no Consensus; give one such as"),
    "no class": (MeanOfLogits, "is no Consensus"),
    "abstract": (Consensus(), r"\(Consensus\) cannot run on logits of 4 classes"),
    "other classes": (AttentionMean(7).double(), "cannot run on logits of 4 classes.*Build it for 4"),
    "other dtype": (AttentionMean(CLASSES).half(), "in its dtype"),
    "infinite": (changed(initial=lambda self, zeros: (zeros - math.inf, zeros[:, 0])), "finite"),
    "whole": (
        changed(
            initial=lambda self, zeros: (zeros.long(), zeros[:, 0]),
            add=lambda self, s, v: (s[0] + v.long(), s[1] + 1),
        ),
        "floating-point",
    ),
    "grows": (changed(add=lambda self, s, v: (torch.cat([s[0], v], 1), s[1])), "keep shapes"),
    "rows": (changed(initial=lambda self, zeros: (zeros[0], zeros[0, 0])), "cannot run|keep shapes"),
    "starts": (changed(answer=lambda self, s: s[0] / s[1].clamp(min=1)[:, None]), "NaN before the first frame"),
    "one number": (changed(answer=lambda self, s: (s[0] / s[1][:, None])[:, 0]), r"expected \(B, K\) = \(2, 4\)"),
    "width": (changed(embedded_features=9), r"`embed` gave \(2, 4\).*says \(2, 9\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_consensus_that_does_not_fit_is_refused_at_once(name: str) -> None:
    model, (value, telling) = toy_model(), WRONG[name]
    kept = model.consensus
    with pytest.raises(DynskipError, match=telling):
        model.consensus = value
    assert model.consensus is kept
    with pytest.raises(DynskipError, match=telling):
        StopOrForward(model.backbone, list(model.gates), consensus=value)


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "3"])
def test_a_k_that_is_no_number_is_refused(k: Any) -> None:
    with pytest.raises(DynskipError, match="no number of frames"):
        TopKMean(k)
    with pytest.raises(DynskipError, match="have to be positive"):
        AttentionMean(0)


def test_probabilities_near_0_and_1_give_finite_logits() -> None:
    for activation in ACTIVATIONS:
        how = Readout(MeanOfProbabilities(), activation, (False,))
        logits = torch.tensor([[[900.0, -900.0, 0.0]]], dtype=torch.float64)
        assert rules.read(how, torch.ones(1, 1, dtype=torch.long), logits).isfinite().all()
