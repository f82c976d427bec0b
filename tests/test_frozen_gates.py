from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import timm
import torch
from torch import Tensor

from dynskip import DynskipError, SoFLoss, StopOrForward, sofnet, stage_model
from dynskip.sofnet import Recipe

for needed in ("av", "matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(needed)

import frozen_gates  # noqa: E402
import sofnet_activitynet as example  # noqa: E402
import stick_figures  # noqa: E402
import training  # noqa: E402
import video_data  # noqa: E402
from frozen_gates import FeaturesError  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

FRAMES, SIZE = 6, 32
PREP = video_data.Preprocessing(SIZE, FRAMES)
RECIPE = Recipe(warmup_epochs=0, joint_epochs=2, lr=0.01)


def build(seed: int = 0) -> StopOrForward:
    """A tiny network whose gates disagree about frames, and which ends videos early."""
    torch.manual_seed(seed)
    backbone = stage_model("test_resnet", num_classes=6, input_size=(3, SIZE, SIZE))
    model = sofnet(backbone, hidden=8, forward_bias=0.5, threshold=0.2, min_frames=2)
    with torch.no_grad():
        for gate in model.gates:
            gate.decide.weight.mul_(30)
            gate.project.weight.mul_(10)
    return model.eval()


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[video_data.Item]:
    root = stick_figures.render_set(
        tmp_path_factory.mktemp("set"), train_per_class=1, test_per_class=1, size=SIZE, num_frames=24
    )
    return video_data.pick_split(video_data.read_csv(root), "train")


@pytest.fixture
def clips(items: list[video_data.Item]) -> video_data.Clips:
    return video_data.Clips(items, stick_figures.CLASSES, PREP, training=False, seed=0)


def videos(clips: video_data.Clips) -> Tensor:
    return torch.stack([clips.prep.normalize(clips[(0, i)][0]) for i in range(len(clips))])  # type: ignore[arg-type]


def targets_of(clips: video_data.Clips) -> Tensor:
    return torch.tensor([target[0] for target in clips.targets])


def test_stored_features_are_what_the_model_encodes(clips: video_data.Clips, tmp_path: Path) -> None:
    model, file = build(), tmp_path / "train.safetensors"
    made = frozen_gates.encode(model, clips, file)
    read = frozen_gates.encode(model, clips, file)
    with torch.no_grad():
        encoded = model.encode(videos(clips))
        rows = read.rows(model, slice(None))
    assert list(tmp_path.iterdir()) == [file]
    assert rows.image_size == encoded.image_size == (SIZE, SIZE)
    for features in (made, read):
        for stored, wanted in zip(features.pooled, encoded.pooled, strict=True):
            torch.testing.assert_close(stored, wanted)
    torch.testing.assert_close(rows.frame_logits, encoded.frame_logits)


def test_deciding_from_features_is_really_skipping(clips: video_data.Clips, tmp_path: Path) -> None:
    model = build()
    features = frozen_gates.encode(model, clips, tmp_path / "train.safetensors")
    criterion = SoFLoss(model.lookup_for((SIZE, SIZE)))
    optimizer = frozen_gates.gate_optimizer(model, RECIPE)
    frozen_gates.gate_epoch(model, features, targets_of(clips), criterion, optimizer, RECIPE, 0, batch_size=4)
    model.eval()
    (decided,) = frozen_gates.decide(model, features)
    skipped = model(videos(clips))
    assert len(skipped.stopped_at.unique()) > 2  # gates decide this and that, or nothing is compared here
    assert torch.equal(decided.stopped_at, skipped.stopped_at)
    assert torch.equal(decided.macs, skipped.macs)
    torch.testing.assert_close(decided.logits, skipped.logits)


def renamed(clips: video_data.Clips) -> video_data.Clips:
    return video_data.Clips(clips.items[1:], stick_figures.CLASSES, PREP, training=False, seed=0)


def other_prep(clips: video_data.Clips) -> video_data.Clips:
    prep = dataclasses.replace(PREP, mean=(0.5, 0.5, 0.5))
    return video_data.Clips(clips.items, stick_figures.CLASSES, prep, training=False, seed=0)


@pytest.mark.parametrize(
    ("what", "seed", "change"),
    [("network", 1, lambda clips: clips), ("preprocessing", 0, other_prep), ("videos", 0, renamed)],
)
def test_stale_features_are_refused(
    what: str, seed: int, change: Callable[[Any], Any], clips: video_data.Clips, tmp_path: Path
) -> None:
    file = tmp_path / "train.safetensors"
    frozen_gates.encode(build(), clips, file)
    with pytest.raises(FeaturesError, match=f"of another {what}. Delete it"):
        frozen_gates.encode(build(seed), change(clips), file)


def test_features_outlive_another_classifier(clips: video_data.Clips, tmp_path: Path) -> None:
    model, file = build(), tmp_path / "train.safetensors"
    before = frozen_gates.encode(model, clips, file).rows(model, slice(None)).frame_logits
    with torch.no_grad():
        next(frozen_gates.classifier(model).parameters()).mul_(2)
    after = frozen_gates.encode(model, clips, file).rows(model, slice(None)).frame_logits
    assert not torch.allclose(before, after)


def test_strides_belong_to_the_network(clips: video_data.Clips) -> None:
    model = build()
    before = frozen_gates.fingerprint(model, clips)
    convolution = next(m for m in model.backbone.model.modules() if isinstance(m, torch.nn.Conv2d))
    convolution.stride = (1, 1)
    assert frozen_gates.fingerprint(model, clips)["network"] != before["network"]


def test_encoding_goes_on_where_it_was_stopped(
    clips: video_data.Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_gates, "VIDEOS_A_PART", 2)
    model, whole, broken = build(), tmp_path / "whole" / "a.safetensors", tmp_path / "broken" / "a.safetensors"
    wanted = frozen_gates.encode(model, clips, whole)
    encode, calls = frozen_gates.encode_batch, 0

    def dies(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(frozen_gates, "encode_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        frozen_gates.encode(model, clips, broken)
    assert not broken.exists()
    resumed = frozen_gates.encode(model, clips, broken)
    assert calls == 4 + len(clips) - 2  # the part of two that was whole is not encoded again
    for got, expected in zip((*resumed.pooled, resumed.embedding), (*wanted.pooled, wanted.embedding), strict=True):
        assert torch.equal(got, expected)
    headers = []
    for file in (broken, whole):  # not by their bytes: the order of entries in a header is left to chance
        with safetensors.safe_open(file, "pt") as content:
            headers.append(content.metadata())
    assert headers[0] == headers[1]
    assert list(broken.parent.iterdir()) == [broken]


def test_parts_of_another_network_are_refused(
    clips: video_data.Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_gates, "VIDEOS_A_PART", 2)
    file = tmp_path / "a.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(frozen_gates, "read_tensors", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            frozen_gates.encode(build(), clips, file)
    with pytest.raises(FeaturesError, match="of another network"):
        frozen_gates.encode(build(1), clips, file)


def test_a_damaged_file_says_what_to_do(clips: video_data.Clips, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    frozen_gates.encode(build(), clips, file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(FeaturesError, match=r"damaged.*Delete it"):
        frozen_gates.encode(build(), clips, file)


def test_unreadable_videos_are_left_out_and_named(
    clips: video_data.Clips, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    items = [clips.items[0], dataclasses.replace(clips.items[1], path=bad), *clips.items[2:]]
    mixed = video_data.Clips(items, stick_figures.CLASSES, PREP, training=False, seed=0)
    features = frozen_gates.encode(build(), mixed, tmp_path / "a.safetensors")
    assert features.positions.tolist() == [0, 2, 3, 4, 5]
    assert len(features) == len(features.embedding) == 5
    assert "bad.mp4" in capsys.readouterr().out
    none = video_data.Clips(items[1:2], stick_figures.CLASSES, PREP, training=False, seed=0)
    with pytest.raises(DynskipError, match="None of the videos"):
        frozen_gates.encode(build(), none, tmp_path / "b.safetensors")


def test_the_head_is_at_its_optimum(clips: video_data.Clips, tmp_path: Path) -> None:
    model, targets = build(), targets_of(clips)
    features = frozen_gates.encode(model, clips, tmp_path / "a.safetensors")
    frozen_gates.fit_head(model, features, targets, weight_decay=1e-3)
    head: Any = frozen_gates.classifier(model)
    frame_logits = features.rows(model, slice(None)).frame_logits
    loss = torch.nn.functional.cross_entropy(frame_logits.mean(1), targets) + 1e-3 / 2 * head.weight.square().sum()
    gradients = torch.autograd.grad(loss, list(head.parameters()))
    assert max(gradient.abs().max() for gradient in gradients) < 1e-3
    assert loss.item() < 1.7  # guessing costs log 6 = 1.79


def test_an_epoch_trains_gates_and_inner_classifiers_alone(clips: video_data.Clips, tmp_path: Path) -> None:
    def trained(seed: int) -> dict[str, Tensor]:
        model, targets = build(), targets_of(clips)
        features = frozen_gates.encode(model, clips, tmp_path / "a.safetensors")
        criterion = SoFLoss(model.lookup_for((SIZE, SIZE)))
        optimizer = frozen_gates.gate_optimizer(model, RECIPE)
        means = frozen_gates.gate_epoch(model, features, targets, criterion, optimizer, RECIPE, 0, 4, seed)
        assert means["total"] > 0
        return model.state_dict()

    before, once, again, other = build().state_dict(), trained(0), trained(0), trained(1)
    changed = {name for name in before if not torch.equal(before[name], once[name])}
    assert {name.split(".")[0] for name in changed} == {"gates", "inner"}
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not all(torch.equal(once[name], other[name]) for name in once)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished backbone, with a classifier for classes of its own."""
    torch.manual_seed(3)
    file = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=9).state_dict(), file)
    return file


def train(data: Path, weights: Path, out: Path, *more: str) -> int:
    network = ["--backbone", "test_resnet", "--size", str(SIZE), "--frames", "4", "--hidden", "8"]
    machine = ["--workers", "0", "--device", "cpu"]
    options = ["--data", str(data), "--out", str(out), "--weights", str(weights), "--freeze-backbone"]
    return example.main(["train", *options, *network, *machine, *more])


def test_train_writes_a_checkpoint_as_any_other(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(data, weights, out, "--epochs", "2") == 0
    trained = capsys.readouterr().out
    assert "the classifier starts anew" in trained
    state, published = training.load_checkpoint(out / "last.pt")["model"], load_file(weights)
    for name, tensor in published.items():
        if not name.startswith("fc."):
            assert torch.equal(state[f"backbone.model.{name}"], tensor), name
    assert state["backbone.model.fc.weight"].shape[0] == 6
    assert (out / "features" / "train.safetensors").exists()
    source = ["--checkpoint", str(out / "last.pt"), "--device", "cpu"]
    assert example.main(["evaluate", "--data", str(data), "--workers", "0", *source]) == 0
    rows = [line.rsplit("|", 2)[0] for line in trained.splitlines() if line.startswith("| ")]  # without milliseconds
    evaluated = capsys.readouterr().out
    assert len(rows) == 4
    assert all(row in evaluated for row in rows)
    video = next((data / "videos").rglob("test_*.mp4"))
    assert example.main(["predict", str(video), "--out", str(tmp_path), *source]) == 0


def test_train_goes_on_where_it_was_stopped(data: Path, weights: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(data, weights, whole, "--epochs", "3") == 0
    assert train(data, weights, halves, "--epochs", "1") == 0
    assert train(data, weights, halves, "--epochs", "3", "--resume") == 0
    first, second = (training.load_checkpoint(folder / "last.pt")["model"] for folder in (whole, halves))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_features_that_cannot_be_written_are_not_encoded_again(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "features"
    (folder / "train.safetensors.writing").mkdir(parents=True)  # safetensors has one error for this and a full disk
    assert train(data, weights, tmp_path, "--epochs", "1") == 2
    assert f"Could not write to {folder} (" in capsys.readouterr().err
    (folder / "train.safetensors.writing").rmdir()
    monkeypatch.setattr(frozen_gates, "encode_batch", None)
    assert train(data, weights, tmp_path, "--epochs", "1") == 0
    assert [file.name for file in folder.iterdir()] == ["train.safetensors"]


def test_train_needs_a_finished_backbone(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, weights, tmp_path / "a", "--dense") == 2
    assert train(data, Path("none"), tmp_path / "b") == 2
    assert capsys.readouterr().err.count("leave --dense out, and give --weights") == 2
