"""Stored features of a frozen backbone: encoded once, resumed, refused where they do not fit, and fitted to."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynskip import DynskipError, StopOrForward, sofnet, stage_model

for needed in ("av", "PIL", "safetensors", "tqdm"):
    pytest.importorskip(needed)

import safetensors  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from dynskip.video import (  # noqa: E402
    Clips,
    EvaluationLoader,
    Item,
    Preprocessing,
    StoredFeatures,
    encode_clips,
    fit_classifier,
    load_items,
    open_source,
    pick_split,
    stored,
    training_batches,
)
from dynskip.video.clips import Sample  # noqa: E402
from dynskip.video.stick_figures import CLASSES  # noqa: E402
from dynskip.video.stored import classifier, fit_linear  # noqa: E402

SIZE = 32
PREP = Preprocessing(SIZE, num_frames=4)


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


@pytest.fixture
def items(data: Path) -> list[Item]:
    return pick_split(load_items(data), "test")


@pytest.fixture
def clips(items: list[Item]) -> Clips:
    return Clips(items, CLASSES, PREP)


def videos(clips: Clips) -> Tensor:
    frames: list[Any] = [clips[0, i].video for i in range(len(clips))]
    return torch.stack([clips.prep.normalize(video) for video in frames])


def tensors(features: StoredFeatures) -> list[Tensor]:
    return [*features.pooled, features.embedding, features.positions]


def test_deciding_from_features_equals_running_the_model(clips: Clips, tmp_path: Path) -> None:
    model = build()
    made = encode_clips(model, clips, tmp_path / "features")
    read = encode_clips(model, clips, tmp_path / "features", workers=2)
    assert [file.name for file in (tmp_path / "features").iterdir()] == ["000000.safetensors"]
    assert all(torch.equal(a, b) for a, b in zip(tensors(made), tensors(read), strict=True))
    with torch.no_grad():
        encoded, rows = model.encode(videos(clips)), read.rows(model, slice(None))
        decided, skipped = model.decide(rows), model(videos(clips))
        chosen = model.decide(read.rows(model, torch.tensor([4, 1])))
    assert rows.image_size == encoded.image_size == (SIZE, SIZE)
    for stage, wanted in zip(rows.pooled, encoded.pooled, strict=True):
        torch.testing.assert_close(stage, wanted)
    torch.testing.assert_close(rows.frame_logits, encoded.frame_logits)
    assert len(skipped.stopped_at.unique()) > 2  # gates decide differently, or nothing is compared here
    assert torch.equal(decided.stopped_at, skipped.stopped_at)
    assert torch.equal(decided.macs, skipped.macs)
    torch.testing.assert_close(decided.logits, skipped.logits)
    assert torch.equal(chosen.stopped_at, skipped.stopped_at[[4, 1]])


class Growing(Clips):
    """Clips of different length: the first has one frame, the next one two, and so on."""

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        sample = super().__getitem__(key)
        return sample if sample.video is None else sample._replace(video=sample.video[: 1 + sample.position])


def test_clips_of_different_length_are_padded_and_stored(
    items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, growing = build(), Growing(items, CLASSES, PREP)
    monkeypatch.setattr(stored, "VIDEOS_A_FILE", 2)  # files of different length, too
    features = encode_clips(model, growing, tmp_path)
    wanted = [1, 2, 3, 4, 4, 4]
    assert features.lengths is not None
    assert features.lengths.tolist() == wanted
    ((video, lengths), _, keys) = next(iter(EvaluationLoader(growing, batch_size=6)))
    assert video.shape[:2] == (6, 4)
    assert lengths.tolist() == wanted
    assert len(keys) == 6
    rows = features.rows(model, slice(None))
    decided, skipped = model.decide(rows), model(video, lengths=lengths)
    assert torch.equal(decided.stopped_at, skipped.stopped_at)
    torch.testing.assert_close(decided.logits, skipped.logits)
    torch.testing.assert_close(features.means()[1], features.embedding[1, :2].mean(0))
    fit_classifier(model, features, torch.arange(6))
    assert isinstance(next(iter(training_batches(growing, 0, 6))).lengths, Tensor)


def test_variants_are_drawn_as_in_training(items: list[Item], tmp_path: Path) -> None:
    model, clips = build(), Clips(items, CLASSES, PREP, training=True, seed=3)
    made = [encode_clips(model, clips, tmp_path / str(epoch), epoch=epoch) for epoch in (1, 2)]
    assert not torch.allclose(made[0].embedding, made[1].embedding)
    (batch,) = training_batches(clips, 2, len(items))
    with torch.no_grad():
        trained_on = model.encode(clips.prep.normalize(batch.video)).pooled[-1]
    torch.testing.assert_close(made[1].pooled[-1][batch.positions], trained_on)
    again = encode_clips(model, clips, tmp_path / "2", epoch=2)
    assert all(torch.equal(a, b) for a, b in zip(tensors(made[1]), tensors(again), strict=True))
    middle = Clips(items, CLASSES, PREP)
    for other, epoch in ((clips, 3), (Clips(items, CLASSES, PREP, training=True), 2), (middle, 2)):
        with pytest.raises(DynskipError, match="holds features of another random draws"):
            encode_clips(model, other, tmp_path / "2", epoch=epoch)


def test_files_of_earlier_versions_say_nothing_of_draws(clips: Clips, tmp_path: Path) -> None:
    made = encode_clips(build(), clips, tmp_path)
    (file,) = tmp_path.iterdir()
    with safetensors.safe_open(file, "pt") as content:
        header = {key: value for key, value in content.metadata().items() if key != "random draws"}
    save_file(load_file(file), file, header)
    assert torch.equal(encode_clips(build(), clips, tmp_path).embedding, made.embedding)
    with pytest.raises(DynskipError, match="holds features of another random draws"):
        encode_clips(build(), Clips(clips.items, CLASSES, PREP, training=True), tmp_path)


def test_rows_have_the_logits_of_the_present_classifier(clips: Clips, tmp_path: Path) -> None:
    model = build()
    before = encode_clips(model, clips, tmp_path).rows(model, slice(None)).frame_logits
    with torch.no_grad():
        next(classifier(model).parameters()).mul_(2)
    after = encode_clips(model, clips, tmp_path).rows(model, slice(None)).frame_logits  # and the files stay good
    assert not torch.allclose(before, after)


def other_stride(model: StopOrForward, clips: Clips) -> tuple[StopOrForward, Clips]:
    next(m for m in model.backbone.model.modules() if isinstance(m, nn.Conv2d)).stride = (1, 1)
    return model, clips


def other_prep(model: StopOrForward, clips: Clips) -> tuple[StopOrForward, Clips]:
    return model, Clips(clips.items, CLASSES, replace(PREP, mean=(0.5, 0.5, 0.5)))


def other_videos(model: StopOrForward, clips: Clips) -> tuple[StopOrForward, Clips]:
    return model, Clips(clips.items[::-1], CLASSES, PREP)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("network", lambda _, clips: (build(1), clips)),
        ("network", other_stride),
        ("preprocessing", other_prep),
        ("videos", other_videos),
    ],
)
def test_features_of_something_else_are_refused(
    what: str, change: Callable[..., tuple[StopOrForward, Clips]], clips: Clips, tmp_path: Path
) -> None:
    encode_clips(build(), clips, tmp_path)
    with pytest.raises(DynskipError, match=f"holds features of another {what}. Delete {re.escape(str(tmp_path))}"):
        encode_clips(*change(build(), clips), tmp_path)


def test_encoding_goes_on_where_it_was_stopped(
    items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "VIDEOS_A_FILE", 2)
    opened: list[Path] = []

    def dies_at_the_fourth(path: Path) -> Any:
        opened.append(path)
        if len(opened) == 4:
            raise KeyboardInterrupt
        return open_source(path)

    broken = Clips(items, CLASSES, PREP, opener=dies_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        encode_clips(build(), broken, tmp_path / "broken")
    with pytest.raises(DynskipError, match="of another network"):  # before anything else is encoded
        encode_clips(build(1), Clips(items, CLASSES, PREP), tmp_path / "broken")
    assert [file.name for file in (tmp_path / "broken").iterdir()] == ["000000.safetensors"]
    resumed = encode_clips(build(), broken, tmp_path / "broken")
    assert opened[4:] == [item.path for item in items[2:]]  # what is there is not encoded again
    wanted = encode_clips(build(), Clips(items, CLASSES, PREP), tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(tensors(resumed), tensors(wanted), strict=True))
    assert {file.name for file in (tmp_path / "broken").iterdir()} == {f"00000{n}.safetensors" for n in (0, 2, 4)}


def test_a_damaged_file_says_what_to_do(clips: Clips, tmp_path: Path) -> None:
    encode_clips(build(), clips, tmp_path)
    file = tmp_path / "000000.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DynskipError, match=r"000000\.safetensors is damaged .*Delete it; its videos are encoded again"):
        encode_clips(build(), clips, tmp_path)


def test_what_cannot_be_written_is_said(clips: Clips, tmp_path: Path) -> None:
    (tmp_path / "000000.part").mkdir()  # safetensors has one error for this and a full disk
    with pytest.raises(DynskipError, match=r"Could not write .*000000\.safetensors \(it is a folder\).* Start again"):
        encode_clips(build(), clips, tmp_path)


def test_unreadable_videos_are_left_out_and_named(items: list[Item], tmp_path: Path) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    items[1] = replace(items[1], path=bad)
    for _ in range(2):  # made, then read
        with pytest.warns(UserWarning, match=r"1 videos cannot be read and are left out:\n  .*bad\.mp4: "):
            features = encode_clips(build(), Clips(items, CLASSES, PREP), tmp_path / "some")
        assert features.positions.tolist() == [0, 2, 3, 4, 5]
        assert len(features) == len(features.embedding) == 5
    with pytest.warns(UserWarning, match="1 videos"), pytest.raises(DynskipError, match="None of the videos could be"):
        encode_clips(build(), Clips(items[1:2], CLASSES, PREP), tmp_path / "none")


@pytest.mark.parametrize("shares", [False, True])
def test_the_fitted_classifier_is_at_its_optimum(shares: bool, clips: Clips, tmp_path: Path) -> None:
    model, targets = build(), torch.tensor([target for (target,) in clips.targets])
    features = encode_clips(model, clips, tmp_path)
    if shares:
        targets = 0.9 * torch.nn.functional.one_hot(targets, 6) + 0.1 / 6
    fit_classifier(model, features, targets, weight_decay=1e-3)
    layer: Any = classifier(model)
    assert all(parameter.grad is None for parameter in layer.parameters())
    logits = features.rows(model, slice(None)).frame_logits.mean(1)
    loss = torch.nn.functional.cross_entropy(logits, targets) + 1e-3 / 2 * layer.weight.square().sum()
    gradients = torch.autograd.grad(loss, list(layer.parameters()))
    assert max(gradient.abs().max() for gradient in gradients) < 1e-3
    assert loss.item() < 1.75  # guessing costs log 6 = 1.79


def test_only_a_linear_classifier_can_be_fitted(clips: Clips, tmp_path: Path) -> None:
    model = build()
    features = encode_clips(model, clips, tmp_path)
    network: Any = model.backbone.model
    network.fc = nn.Sequential(network.fc)
    with pytest.raises(DynskipError, match="The classifier is a Sequential; only a linear one can be fitted"):
        fit_classifier(model, features, torch.zeros(6, dtype=torch.long))


def test_fit_linear_agrees_with_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    torch.manual_seed(0)
    inputs, targets = torch.randn(40, 5, dtype=torch.float64), torch.arange(40) % 3
    layer = nn.Linear(5, 3).double()
    with torch.no_grad():  # as where features are measured
        fit_linear(layer, inputs, targets, weight_decay=0.1)
    theirs = linear_model.LogisticRegression(C=1 / (40 * 0.1), tol=1e-9, max_iter=1000).fit(inputs, targets)
    wanted = torch.from_numpy(theirs.predict_proba(inputs))
    torch.testing.assert_close(layer(inputs).softmax(1), wanted, rtol=0, atol=1e-4)
