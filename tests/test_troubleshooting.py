"""The messages that docs/troubleshooting.md quotes are those of the code, and its causes and cures are right."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dynskip import (
    DynskipError,
    EarlyTerminator,
    FixedGate,
    InnerClassifier,
    PolicyGate,
    SimilarityGate,
    SoFLoss,
    StopOrForward,
    calibrate,
    stage_model,
)

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
QUOTED = [text for line in re.findall(r"^### (.+)$", PAGE, re.M) for text in re.split(r"(?<=`), (?=`)", line)]


def messages() -> list[str]:
    """Return every text in an error that the code makes, with ... for what is put in."""
    found = []
    for path in (ROOT / "dynskip").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id.endswith("Error"):
                for node in ast.walk(call):
                    if isinstance(node, ast.JoinedStr):
                        parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                        found.append("".join(map(str, parts)))
                    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                        found.append(re.sub(r"\{\w*\}", "...", node.value))
    return found


def matches(quoted: str, text: str) -> bool:
    return re.search(".*".join(map(re.escape, quoted.strip("`").split("..."))), text, re.DOTALL) is not None


@pytest.fixture(scope="module")
def sources() -> list[str]:
    return messages()


@pytest.mark.parametrize("quoted", QUOTED)
def test_quoted_messages_are_in_the_code(quoted: str, sources: list[str]) -> None:
    assert any(matches(quoted, text) for text in sources)


def test_there_are_enough() -> None:
    disappointments = re.findall(r"^\*\*.+?\*\*", PAGE, re.M)
    assert len(QUOTED) + len(disappointments) >= 20


BACKBONE = stage_model("test_resnet", num_classes=4, input_size=(3, 64, 64))
VIDEO, LABELS = torch.randn(2, 4, 3, 64, 64), torch.tensor([0, 1])
BATCH = [(VIDEO, LABELS)]


class Plain(nn.Module):
    """A network that does not come from timm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.fc = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 8, 3, 2), nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> Any:
        return self.fc(self.body(self.stem(images).relu()).mean((2, 3)))


def gates() -> list[Any]:
    return [PolicyGate(channels, hidden=32) for channels in BACKBONE.num_features]


def model(**more: Any) -> StopOrForward:
    return StopOrForward(BACKBONE, gates(), **more).eval()


def loss(gated: StopOrForward, labels: torch.Tensor = LABELS) -> Any:
    return SoFLoss(gated.lookup_for((64, 64)))(gated.train()(VIDEO), labels)


def with_inner() -> StopOrForward:
    return model(inner=[InnerClassifier(32, 4) for _ in BACKBONE.num_features])


def two_sizes(reset: bool) -> None:
    session = model().stream()
    session(VIDEO[0, 0])
    if reset:
        session.reset()
    session(torch.randn(3, 96, 96))


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "cannot run after stage": (lambda: StopOrForward(BACKBONE, [PolicyGate(7), *gates()[1:]]), model),
    "give one gate for each of": (
        lambda: StopOrForward(BACKBONE, gates()[:1]),
        lambda: StopOrForward(BACKBONE, [gates()[0], *(FixedGate() for _ in range(4))]),
    ),
    "does not say where its stages end": (
        lambda: stage_model(Plain()),
        lambda: stage_model(Plain(), boundaries=["stem"], input_size=(3, 64, 64)),
    ),
    "has no model named": (lambda: stage_model("resnet5"), lambda: stage_model("test_resnet")),
    "runs a model in evaluation mode": (lambda: model().train().stream(), lambda: model().stream()),
    "must be a floating-point tensor": (
        lambda: model()((255 * VIDEO.clamp(0, 1)).byte()),
        lambda: model()((255 * VIDEO.clamp(0, 1)).byte().float() / 255),
    ),
    "Videos must have shape": (lambda: model()(VIDEO[0]), lambda: model()(VIDEO[0][None])),
    "The ... is ... and the model": (lambda: model()(VIDEO.double()), lambda: model()(VIDEO.double().float())),
    "There are NaN or infinite values": (lambda: model()(VIDEO / 0), lambda: model()(VIDEO)),
    "earlier ones of this session": (lambda: two_sizes(False), lambda: two_sizes(True)),
    "cannot be kept": (
        lambda: calibrate.to_budget(model(), BATCH, macs=10),
        lambda: calibrate.to_budget(
            model(terminator=EarlyTerminator(min_frames=0)), BATCH, macs=calibrate.dense(model(), BATCH).macs
        ),
    ),
    "Expected batches": (
        lambda: calibrate.to_accuracy(model(), BATCH[0], max_loss=1),  # type: ignore[arg-type]
        lambda: calibrate.to_accuracy(model(), BATCH, max_loss=1),
    ),
    "There are no validation videos": (
        lambda: calibrate.dense(model(), []),
        lambda: calibrate.dense(model(), BATCH),
    ),
    "Targets range from": (lambda: loss(with_inner(), LABELS + 4), lambda: loss(with_inner())),
    "This loss reads inner classifiers": (lambda: loss(model()), lambda: loss(with_inner())),
    "Which stages run depends": (
        lambda: torch.export.export(model(), (VIDEO,)),
        lambda: torch.export.export(model().backbone, (VIDEO[0],)),
    ),
}


@pytest.mark.parametrize("message", CASES)
def test_the_cause_is_told_and_the_cure_helps(message: str) -> None:
    assert any(message in quoted for quoted in QUOTED)
    cause, cure = CASES[message]
    with pytest.raises(DynskipError, match=".*".join(map(re.escape, message.split("...")))):
        cause()
    cure()


def test_nothing_is_stopped_until_frames_repeat() -> None:
    assert model()(VIDEO).used.all()
    first, *others = BACKBONE.num_features
    similar = StopOrForward(BACKBONE, [SimilarityGate(first, 0.01), *(FixedGate() for _ in others)]).eval()
    assert similar(VIDEO).used.all()
    assert not similar(VIDEO[:, [0, 0, 1, 1]]).used.all()


@pytest.fixture(scope="module")
def knowing() -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A backbone that tells three images apart, and videos of noise that show one of them in three of eight frames."""
    torch.manual_seed(0)
    backbone = stage_model("test_resnet", num_classes=3, input_size=(3, 64, 64)).eval()
    shown, labels = torch.randn(3, 3, 64, 64), torch.arange(3).repeat(4)
    net: Any = backbone.model
    videos = torch.randn(12, 8, 3, 64, 64)
    videos[:, 2:5] = shown[labels, None] + 0.1 * torch.randn(12, 3, 3, 64, 64)
    with torch.no_grad():
        near = shown.repeat_interleave(20, 0) + 0.1 * torch.randn(60, 3, 64, 64)
        images = torch.cat([near, torch.randn(60, 3, 64, 64)])
        features = net.forward_head(net.forward_features(images), pre_logits=True).unflatten(0, (6, 20)).mean(1)
        middle = features[3:].mean(0)
        apart = features[:3] - middle
        net.fc.weight.copy_(20 * apart / apart.norm(dim=1, keepdim=True) ** 2)
        net.fc.bias.copy_(-net.fc.weight @ middle)
    return backbone, videos, labels


def test_everything_is_stopped_until_the_threshold_is_lower(knowing: Any) -> None:
    backbone, videos, labels = knowing
    for bias, threshold in ((5.0, 0.9999), (-2.0, 0.5)):  # the threshold is too high; the gates do not like to forward
        gated = [PolicyGate(channels, hidden=32, forward_bias=bias) for channels in backbone.num_features]
        stops = StopOrForward(backbone, gated, forward_threshold=threshold).eval()
        output = stops(videos)
        assert output.fallback.all()
        assert not output.used.any()
        assert not torch.equal(output.logits.argmax(-1), labels)
        calibrate.to_accuracy(stops, [(videos, labels)], max_loss=0.0).apply(stops)
        assert not stops(videos).fallback.any()
        assert torch.equal(stops(videos).logits.argmax(-1), labels)


def test_similarity_gates_stop_little_until_they_are_calibrated(knowing: Any) -> None:
    backbone, videos, _ = knowing
    first, *others = backbone.num_features
    similar = StopOrForward(backbone, [SimilarityGate(first), *(FixedGate() for _ in others)]).eval()
    slow = videos[:, ::2].repeat_interleave(2, 1) + 0.4 * torch.randn_like(videos)
    before = similar(slow).used.sum()
    answers = similar(slow, dense=True).logits.argmax(-1)
    calibrate.to_accuracy(similar, [(slow, answers)], max_loss=0.0).apply(similar)
    assert similar(slow).used.sum() < 0.8 * before
    assert torch.equal(similar(slow).logits.argmax(-1), answers)


def test_a_stricter_loss_costs_more_and_the_guarantee_says_how_many_videos_it_takes(knowing: Any) -> None:
    backbone, videos, labels = knowing
    torch.manual_seed(1)
    gated = StopOrForward(backbone, [PolicyGate(channels, hidden=32) for channels in backbone.num_features]).eval()
    strict, lax = (calibrate.to_accuracy(gated, [(videos, labels)], max_loss=loss).point for loss in (0.0, 0.5))
    assert strict.accuracy > lax.accuracy
    assert strict.macs > lax.macs
    with pytest.raises(DynskipError, match=r"it takes \d+ even if not one of them loses anything"):
        calibrate.to_risk(gated, [(videos, labels)], risk=0.1, delta=0.1)


def test_optimize_gives_the_faster_model_and_how_far_it_agrees(knowing: Any) -> None:
    backbone, videos, _ = knowing
    gated = StopOrForward(backbone, [PolicyGate(channels, hidden=32) for channels in backbone.num_features]).eval()
    fast, agreement = gated.optimize(videos, compile=False)
    assert agreement.decisions == 1
    # Another batch size rounds differently; a tolerance takes that.
    torch.testing.assert_close(fast(videos[:1]).probabilities, gated(videos).probabilities[:1], atol=1e-4, rtol=1e-3)
