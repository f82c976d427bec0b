"""What models and outputs say of themselves."""

from __future__ import annotations

import pytest
import torch
from helpers import CLASSES, SIZE, timm_network, toy_backbone, toy_model, toy_video

from dynskip import (
    ConfidenceGate,
    DynskipError,
    EarlyExit,
    EarlyTerminator,
    FixedGate,
    FLOPsLookup,
    InnerClassifier,
    PolicyGate,
    SimilarityGate,
    SoFLoss,
    StopOrForward,
    stage_model,
)


def resnet_model() -> StopOrForward:
    backbone = stage_model("resnet50")
    first, *others = backbone.num_features
    gates = [SimilarityGate(first, 0.003), *(FixedGate() for _ in others[1:]), PolicyGate(others[-1])]
    return StopOrForward(backbone, gates, terminator=EarlyTerminator(0.9, 2), forward_threshold=(0.5,) * 4 + (0.7,))


@pytest.fixture(scope="module")
def model() -> StopOrForward:
    return resnet_model()


def test_summary_is_the_cost_table_stage_by_stage(model: StopOrForward) -> None:
    text = model.summary(168)
    lookup = model.lookup_for((168, 168))
    title, header, *stages, head, unit, memory, answer, ending = text.splitlines()
    assert "ResNet" in title
    assert header.split() == ["stage", "channels", "stage", "gate", "so", "far", "share", "the", "gate", "after", "it"]
    assert len(stages) == 5
    for n, row in enumerate(stages):
        name, channels, stage, gate, so_far, share, *rule = row.split()
        assert name == model.backbone.stage_names[n]
        assert int(channels) == model.backbone.num_features[n]
        assert float(stage) == pytest.approx(lookup.per_stage[n].item() / 1e9, abs=5e-4)
        assert float(gate) == pytest.approx(lookup.gates[n].item() / 1e9, abs=5e-4)
        assert float(so_far) == pytest.approx(lookup.cumulative[n].item() / 1e9, abs=5e-4)
        assert float(share.rstrip("%")) == pytest.approx(100 * lookup.cumulative[n].item() / lookup.total, abs=0.06)
        assert " ".join(rule).startswith(type(model.gates[n]).__name__)
    assert "stop at distance <= 0.003" in stages[0]
    assert stages[4].endswith("forward above 0.7")
    assert "forward above" not in "".join(stages[:4])
    assert head.split()[0] == "head"
    assert head.endswith("100.0%")
    assert unit.startswith("GMACs a frame of 168x168, in multiply-adds; the dense network has")
    assert "used" in memory
    assert answer == "Used frames make the answer by MeanOfLogits()."
    assert "probability > 0.9, after more than 2 frames" in ending


def test_small_models_are_told_in_millions_and_given_tables_in_their_unit() -> None:
    model = toy_model()
    assert "MMACs a frame of 8x8, in multiply-adds" in model.summary()
    assert "Every frame is looked at." in model.summary()
    backbone, given = toy_backbone(), FLOPsLookup([2.0, 3.0, 1.0], 0.5, unit="ms", image_size=(SIZE, SIZE))
    timed = StopOrForward(backbone, list(model.gates), lookup=given)
    assert "ms a frame of 8x8; the dense network has 6.5" in timed.summary()
    with pytest.raises(DynskipError, match="made for frames of 8x8"):
        timed.summary(16)


def test_exits_have_a_summary_with_their_classifiers() -> None:
    backbone = toy_backbone(0, 2)
    gates = [FixedGate(), ConfidenceGate(backbone.num_features[1], CLASSES).double()]
    text = EarlyExit(backbone, gates).summary()
    assert "EarlyExit" in text
    assert "ConfidenceGate(stop at confidence >= 0.9)" in text
    assert f"{backbone.num_features[1] * CLASSES / 1e6:.3f}" in text


def test_models_show_stages_costs_and_rules_and_no_layers(model: StopOrForward) -> None:
    model.lookup_for((168, 168))
    text = repr(model)
    for telling in (
        "StagedBackbone(ResNet at 3x224x224: maxpool (64 NCHW)",
        "1000 classes",
        "GMACs a frame of 168x168",
        "state_update='used'",
        "forward_threshold=0.5, 0.5, 0.5, 0.5, 0.7",
        "stop at distance <= 0.003",
    ):
        assert telling in text
    assert "Conv2d" not in text
    assert len(text.splitlines()) < 25


def test_outputs_and_sessions_show_counts_and_no_tensors() -> None:
    model = toy_model(seed=2, terminator=EarlyTerminator(0.6, 2))
    video = toy_video(4, 8)
    output, encoded, session = model(video), model.encode(video), model.stream(4)
    session(video[:, 0])
    used, unseen = int(output.used.sum()), int((output.stopped_at == -1).sum())
    assert f"4 videos of 8 frames, 3 stages, {CLASSES} classes: {used} frames used" in repr(output)
    assert f"{32 - used - unseen} stopped, {unseen} unseen" in repr(output)
    assert repr(encoded) == "EncodedVideo(4 videos of 8 frames of 8x8: channels 6, 8, 10, 4 classes)"
    assert repr(session).startswith("Session(4 videos: 4 frames seen, ")
    assert repr(model.backbone.start(video[:, 0])) == "Carry(batch 4: float64 (4, 3, 8, 8))"
    for shown in (output, encoded, session):
        assert "tensor(" not in repr(shown)


def test_losses_and_classifiers_show_their_weights() -> None:
    model = toy_model(seed=2).train()
    criterion = SoFLoss(model.lookup_for((SIZE, SIZE)), alpha=0.8, beta=0.7, normalize=True)
    text = repr(criterion)
    for telling in ("alpha=0.8", "beta=0.7", "of a whole frame", "supervise_last=False"):
        assert telling in text
    parts = criterion(model(toy_video(2, 3)), torch.tensor([0, 1]))
    assert repr(parts).startswith(f"LossParts(total={parts.total.item():.4g}, classification=")
    assert "5 -> 4 classes, detach=True" in repr(InnerClassifier(5, 4))


def test_backbones_of_any_kind_show_what_they_are() -> None:
    backbone = stage_model(timm_network("test_vit", 64, img_size=64), num_stages=2, input_size=(3, 64, 64))
    assert "NLC" in repr(backbone)
    assert "Linear" not in repr(backbone)
