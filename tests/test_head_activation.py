"""Models whose answers are a sigmoid's: several labels a video, or a single logit, from training to the card."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    CLASSES,
    SIZE,
    Case,
    cases,
    randn,
    random_gates,
    randomise,
    recipe,
    toy_backbone,
    toy_model,
    toy_video,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dynskip import (
    ClassificationLoss,
    ConfidenceGate,
    DynskipError,
    EarlyExit,
    EarlyTerminator,
    InnerClassifier,
    PolicyGate,
    SoFLoss,
    StopOrForward,
    calibrate,
    sofnet,
    stage_model,
)
from dynskip.activation import confidence, named_classes, probabilities
from dynskip.evaluation import evaluate
from dynskip.metrics import label_accuracy, mean_average_precision

# What an answer says


@given(st.integers(0, 10_000), st.sampled_from([1, 4]), st.sampled_from([0.3, 0.5, 0.8, 0.95]))
def test_a_sigmoid_is_sure_once_every_class_is_decided(seed: int, classes: int, threshold: float) -> None:
    answers = (4 * randn(6, classes, seed=seed)).sigmoid()
    decided = [all(p > threshold or p < 1 - threshold for p in row) for row in answers.tolist()]
    assert (confidence(answers, "sigmoid") > threshold).tolist() == decided
    for row in answers:
        named = named_classes(row, "sigmoid")
        assert named == {k: p for k, p in enumerate(row.tolist()) if p > 0.5}
        assert list(named.values()) == sorted(named.values(), reverse=True)


def test_a_softmax_names_its_most_probable_class() -> None:
    answers = torch.tensor([0.2, 0.5, 0.3])
    assert confidence(answers, "softmax") == 0.5
    assert named_classes(answers, "softmax") == {1: 0.5}


# Ending videos


@given(cases(), st.booleans())
def test_videos_end_once_every_class_is_decided(case: Case, later: bool) -> None:
    model = case.model()
    if model.terminator is None:
        model.terminator = EarlyTerminator(0.7, 1)
    model.activation = "sigmoid"
    if later:  # a terminator that is set later is told, too
        model.terminator = EarlyTerminator(model.terminator.threshold, model.terminator.min_frames)
    video = case.video()
    output, session = model(video), model.stream(case.batch)
    steps = [session(frames) for frames in video.unbind(1)]
    assert torch.equal(torch.stack([step.stopped_at for step in steps], 1), output.stopped_at)
    terminator = model.terminator
    for b in range(case.batch):
        for t, step in enumerate(steps):
            rows = step.running_probabilities[b].tolist()
            decided = all(p > terminator.threshold or p < 1 - terminator.threshold for p in rows)
            ends = decided and t + 1 > terminator.min_frames
            assert bool(step.ended[b]) == ends
            if ends:
                assert (output.stopped_at[b, t + 1 :] == -1).all()
                break


def test_the_terminator_is_told_whenever_the_activation_changes() -> None:
    terminator = EarlyTerminator()
    model = toy_model(terminator=terminator, activation="sigmoid")
    assert terminator.activation == "sigmoid"
    assert "what is decided of each class > 0.999" in model.summary()
    model.activation = "softmax"
    assert terminator.activation == "softmax"
    with pytest.raises(DynskipError, match="activation='tanh' is unknown"):
        model.activation = "tanh"
    with pytest.raises(DynskipError, match="activation='tanh' is unknown"):
        terminator.activation = "tanh"


def one_output(**options: Any) -> StopOrForward:
    backbone = toy_backbone(classes=1)
    gates = random_gates(backbone.num_features, 0)
    inner = [InnerClassifier(5, 1).double() for _ in gates]
    return StopOrForward(backbone, gates, inner, EarlyTerminator(0.8, 1), activation="sigmoid", **options).eval()


def test_one_output_needs_a_sigmoid() -> None:
    model = one_output()
    with pytest.raises(DynskipError, match="softmax of one logit is always 1"):
        model.activation = "softmax"
    assert model.activation == "sigmoid"
    with pytest.raises(DynskipError, match="softmax of one logit is always 1"):
        sofnet(toy_backbone(classes=1), hidden=4)
    assert sofnet(toy_backbone(classes=1), hidden=4, activation="sigmoid").activation == "sigmoid"


# Gates


class Passing(nn.Module):
    """A classifier that returns what it is given."""

    def forward(self, pooled: Tensor) -> Tensor:
        return pooled


@given(st.integers(0, 10_000), st.sampled_from([1, 4]), st.sampled_from([0.6, 0.9]), st.booleans())
def test_confidence_gates_measure_sigmoids(seed: int, classes: int, threshold: float, sure: bool) -> None:
    answers, stop = 3 * randn(5, classes, seed=seed), "sure" if sure else "unsure"
    for measure in ("confidence", "entropy"):
        gate = ConfidenceGate(classes, classes, threshold, stop, measure, "sigmoid")  # type: ignore[arg-type]
        gate.classifier = Passing()  # type: ignore[assignment]
        logits, _ = gate(answers, gate.initial_state(5))
        forward = logits.softmax(-1)[:, 1].tolist()
        for row, share in zip(answers.sigmoid().tolist(), forward, strict=True):
            if measure == "confidence":
                least = min(max(p, 1 - p) for p in row)
                expected = 1 / (1 + least / (1 - least) * (1 - threshold) / threshold)
            else:
                entropy = -sum(p * math.log2(p) + (1 - p) * math.log2(1 - p) for p in row) / classes
                expected = entropy / (entropy + threshold)
            assert share == pytest.approx(expected if sure else 1 - expected, abs=1e-9)


def test_exits_answer_with_several_labels_or_one_output() -> None:
    for classes in (1, CLASSES):
        backbone = toy_backbone(classes=classes)
        gates = [
            randomise(ConfidenceGate(c, classes, 0.6, activation="sigmoid").double(), seed=c)
            for c in backbone.num_features
        ]
        model = EarlyExit(backbone, gates, activation="sigmoid")
        images = toy_video(16, 1, seed=3)[:, 0]
        targets = torch.randint(0, 2, (16, classes), generator=torch.Generator().manual_seed(0))
        parts = SoFLoss(model.lookup_for((SIZE, SIZE)))(model.train()(images), targets)
        parts.total.backward()
        assert all(parameter.grad is not None for parameter in model.exits.parameters())
        output = model.eval()(images)
        assert torch.equal(output.probabilities, output.logits.sigmoid())
        assert len(output.stopped_at.unique()) > 1
        for row, stopped in zip(output.inner_logits[:, 0], output.stopped_at[:, 0], strict=True):
            if stopped < 3:
                assert confidence(row[stopped].sigmoid(), "sigmoid") >= 0.6


@pytest.mark.parametrize(
    ("call", "telling"),
    [
        (lambda: EarlyExit(*exits("softmax"), activation="sigmoid"), "Gate 0 measures how sure it is by a softmax"),
        (lambda: EarlyExit(*exits("sigmoid")), "by a sigmoid, and the model answers by a softmax. Give both the same"),
        (
            lambda: setattr(EarlyExit(*exits("sigmoid"), activation="sigmoid"), "activation", "softmax"),
            "Gate 0 measures how sure it is by a sigmoid",
        ),
        (lambda: EarlyExit(toy_backbone(classes=1), [PolicyGate(6)] * 3), "softmax of one logit|Gate 0"),
        (lambda: ConfidenceGate(4, 1), "takes at least two classes, or activation='sigmoid'"),
        (lambda: ConfidenceGate(4, 2, activation="tanh"), "activation='tanh' is unknown"),  # type: ignore[arg-type]
    ],
)
def test_activations_that_do_not_fit(call: Callable[[], Any], telling: str) -> None:
    with pytest.raises(DynskipError, match=telling):
        call()


def exits(activation: Any) -> tuple[Any, list[Any]]:
    backbone = toy_backbone()
    return backbone, [ConfidenceGate(c, CLASSES, activation=activation).double() for c in backbone.num_features]


# Training, calibration, evaluation


def several_labels(videos: int, classes: int) -> tuple[Tensor, Tensor]:
    """Videos whose labels are the signs of their colours."""
    video = toy_video(videos, 6, seed=1)
    targets = (video.mean((1, 3, 4))[:, :classes] > 0).long()
    return video, targets


@pytest.mark.parametrize("classes", [1, 3])
def test_training_finds_the_labels(classes: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.Conv2d(6, 8, 3),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)),
    ).double()
    model = sofnet(stage_model(network, input_size=(3, SIZE, SIZE)), hidden=5, activation="sigmoid", threshold=0.8)
    video, targets = several_labels(24, classes)
    optimizer, criterion = torch.optim.Adam(model.parameters(), 0.03), SoFLoss(model.lookup_for((SIZE, SIZE)))
    for _ in range(25):
        parts = criterion(model.train()(video), targets)
        optimizer.zero_grad()
        parts.total.backward()
        optimizer.step()
    output = model.eval()(video)
    assert label_accuracy(model(video, dense=True).probabilities, targets) > 0.9
    assert (output.stopped_at == -1).any()  # some videos end early
    if classes == 1:
        assert ClassificationLoss()(output, targets[:, 0]) == ClassificationLoss()(output, targets)

    calibration = calibrate.to_accuracy(model, [(video, targets)], 0.05, metric=mean_average_precision)
    assert calibration.point.macs < calibration.dense.macs
    calibration.apply(model)
    assert mean_average_precision(model(video).probabilities, targets) == pytest.approx(calibration.point.accuracy)
    dense = probabilities(model.encode(video).frame_logits.mean(1), "sigmoid")
    assert calibration.dense.accuracy == pytest.approx(mean_average_precision(dense, targets))


def test_evaluation_of_one_output() -> None:
    video = toy_video(6, 5)
    model, labels = one_output(), torch.tensor([1, 0, 1, 0, 0, 1])
    model.class_names = ("goal",)
    found = evaluate(model, [(video, labels, list("abcdef"))])
    for result in found.results:
        assert math.isnan(result.top1)
        assert result.label_accuracy == sum(r["correct"] for r in found.records if r["mode"] == result.mode) / 6
    assert [record["labels"] for record in found.records[:6]] == [["goal"] if label else [] for label in labels]
    assert all(record["answer"] in ({}, record["best"]) for record in found.records)
    for full in (False, True):
        assert "| labels % | mAP % |" in found.table(full)
        assert "top-" not in found.table(full)
    assert "a class holding above probability 0.5" in found.report()


def test_evaluation_of_several_labels() -> None:
    model = toy_model(activation="sigmoid", terminator=EarlyTerminator(0.7, 2))
    targets = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1]])
    found = evaluate(model, [(toy_video(4, 6), targets, list("abcd"))])
    answers = torch.tensor([[str(k) in record["answer"] for k in range(4)] for record in found.records[:4]])
    assert found.results[0].label_accuracy == (answers == targets.bool()).double().mean()
    assert "| top-1 % | labels % | mAP % |" in found.table()


def test_a_saved_model_keeps_its_activation_and_the_card_tells_it(tmp_path: Path) -> None:
    backbone = stage_model("test_resnet", num_classes=1, input_size=(3, 32, 32))
    stem, *others = backbone.num_features
    gates = [ConfidenceGate(stem, 1, 0.7, activation="sigmoid"), *(PolicyGate(c, 4) for c in others)]
    model = StopOrForward(backbone, gates, terminator=EarlyTerminator(0.7, 1), activation="sigmoid").eval()
    loaded = StopOrForward.from_pretrained(model.save_pretrained(tmp_path / "net"))
    assert (loaded.activation, loaded.gates[0].activation) == ("sigmoid", "sigmoid")
    assert loaded.terminator is not None
    assert loaded.terminator.activation == "sigmoid"
    video = toy_video(2, 5, size=32, dtype=torch.float32)
    assert torch.equal(loaded(video).probabilities, model(video).probabilities)
    assert "each class holds or not, on its own" in (tmp_path / "net" / "README.md").read_text()


# Files


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rendered videos with two actions each, one after the other; one of them shows none."""
    pytest.importorskip("av")
    import numpy as np

    from dynskip.video.stick_figures import CLASSES as ACTIONS
    from dynskip.video.stick_figures import draw_video, write_video

    root, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    rows = ["path,label,split"]
    for split, count in (("train", 8), ("val", 6), ("test", 6)):
        for i in range(count):
            labels = [ACTIONS[(i + shift) % 6] for shift in (0, 1 + i % 2)]
            write_video(root / f"{split}{i}.mp4", np.concatenate([draw_video(a, rng, 32, 24)[0] for a in labels]))
            rows += [f"{split}{i}.mp4,{label},{split}" for label in (labels if (split, i) != ("train", 0) else [""])]
    (root / "labels.csv").write_text("\n".join(rows))
    return root


def test_a_csv_gives_a_video_several_labels_or_none(pairs: Path) -> None:
    from dynskip.video import Clips, Item, Preprocessing, class_names, load_items, training_batches

    items = load_items(pairs)
    assert len(items) == 20
    none, two, *_ = items
    assert none == Item(pairs / "train0.mp4", (), "train")
    assert len(two.labels) == 2
    names, prep = class_names(items), Preprocessing(16, 4)
    with pytest.raises(DynskipError, match=r"train0.mp4 has no label, and a softmax always names a class"):
        Clips(items, names, prep)
    clips = Clips(items, names, prep, True, activation="sigmoid")
    (batch,) = training_batches(clips, 0, 20)
    assert torch.equal(batch.targets, clips.multi_hot(batch.positions))
    assert sorted(batch.targets.sum(1).tolist()) == [0] + 19 * [2]


def test_the_recipes_take_several_labels(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training, calibration, termination and mAP, from files to the table."""
    for needed in ("accelerate", "matplotlib", "safetensors", "sklearn"):
        pytest.importorskip(needed)
    from accelerate.state import AcceleratorState, GradientState
    from sklearn.metrics import average_precision_score, hamming_loss

    from dynskip.video import Clips, EvaluationLoader, load_items, pick_split

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    small = ["--activation", "sigmoid", "--backbone", "test_byobnet", "--size", "32", "--frames", "4", "--hidden", "8"]
    where = ["--data", str(pairs), "--workers", "0", "--device", "cpu"]
    once = ["--weights", "none", "--warmup-epochs", "1", "--epochs", "1", "--batch-size", "4", "--threshold", "0.52"]
    assert recipe("sofnet_activitynet").main(["train", "--out", str(tmp_path), *small, *where, *once]) == 0
    assert "| labels % |" in capsys.readouterr().out

    model = StopOrForward.from_pretrained(tmp_path / "model")
    assert model.activation == "sigmoid"
    loader = EvaluationLoader(Clips.of(model, pick_split(load_items(pairs), "test")), 6)
    found = evaluate(model, loader)
    ((video, targets, _),) = loader
    for result, output in ((found.results[0], model(video, dense=True)), (found.results[2], model(video))):
        answers = output.probabilities.detach()
        assert result.plain_ap == pytest.approx(average_precision_score(targets, answers, average="macro"))
        assert result.label_accuracy == pytest.approx(1 - hamming_loss(targets, answers > 0.5))

    assert recipe("evaluate").main([str(tmp_path / "model"), *where, "--max-loss", "5"]) == 0
    assert "Calibrated on 6 validation videos: mAP " in capsys.readouterr().out
    assert recipe("predict").main([str(tmp_path / "model"), str(pairs / "test0.mp4"), "--out", str(tmp_path)]) == 0
    assert "test0.mp4: " in capsys.readouterr().out
    weights = {key: value for key, value in model.backbone.model.state_dict().items() if "head.fc" not in key}
    torch.save(weights | {"head.fc.weight": torch.zeros(9, 384), "head.fc.bias": torch.zeros(9)}, tmp_path / "w.pth")
    frozen = [*small, *where, "--weights", str(tmp_path / "w.pth"), "--epochs", "0", "--out", str(tmp_path / "frozen")]
    frozen += ["--gate-epochs", "1"]
    assert recipe("train_gates").main(frozen) == 0
    assert "| labels % |" in capsys.readouterr().out
