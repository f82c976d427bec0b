"""Convolutional backbones get channels-last images where that is faster, and keep the layout through all stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import CLASSES, SIZE, timm_network, toy_video
from torch import Tensor, nn

from dynskip import ConfidenceGate, EarlyExit, FixedGate, RandomGate, StopOrForward, VideoResult, stage_model

VIDEO = toy_video(3, 4, dtype=torch.float32)


class Viewing(nn.Module):
    """Takes a view that only the usual memory layout allows, after it has overwritten its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2.0).view(len(x), -1).view_as(x)


def stages(*extra: nn.Module) -> list[nn.Module]:
    return [nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(*extra, nn.Conv2d(4, 6, 3, padding=1)), nn.Conv2d(6, 8, 3)]


def build(*extra: nn.Module, gates: Any = None) -> StopOrForward:
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))
    backbone = stage_model(stages(*extra), head=head, input_size=(3, SIZE, SIZE))
    gates = gates or [RandomGate(width, 0.7) for width in backbone.num_features]
    return StopOrForward(backbone, gates).eval()


def online(model: StopOrForward, video: Tensor) -> Tensor:
    session = model.stream(len(video))
    for t in range(video.shape[1]):
        session(video[:, t])
    return session.result().logits


def streams(model: StopOrForward, look_ahead: int) -> Tensor:
    events = [e for e in model.serve_streams(VIDEO, 3, 8, look_ahead) if isinstance(e, VideoResult)]
    logits = {event.key: event.logits for event in events}
    return torch.stack([logits[key] for key in range(3)])


def exits(model: StopOrForward) -> Tensor:
    gates = [ConfidenceGate(width, CLASSES) for width in model.backbone.num_features]
    logits: Tensor = EarlyExit(model.backbone, gates).eval()(VIDEO[:, 0]).logits
    return logits


def encoded(model: StopOrForward) -> Tensor:
    with torch.no_grad():
        return model.encode(VIDEO).frame_logits


STOPPING = [FixedGate(), FixedGate(stop=True), FixedGate()]
WAYS: dict[str, tuple[Any, Callable[[StopOrForward], Tensor]]] = {
    "clip": (None, lambda model: model(VIDEO).logits),
    "one clip": (None, lambda model: model(VIDEO[:1]).logits),
    "frame by frame": (None, lambda model: model.run_clip(VIDEO, 1).logits),
    "fallback": (STOPPING, lambda model: model(VIDEO).logits),
    "online": (None, lambda model: online(model, VIDEO)),
    "streams": (None, lambda model: streams(model, 1)),
    "streams that look ahead": (None, lambda model: streams(model, 2)),
    "fallback in streams": (STOPPING, lambda model: streams(model, 1)),
    "images": (None, exits),
    "encode": (None, encoded),
}


def watched(model: StopOrForward) -> list[bool]:
    """Note of every call of a convolution whether its input is channels-last."""
    seen: list[bool] = []
    for layer in model.backbone.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(
                lambda _, inputs: seen.append(not inputs[0].is_contiguous() and inputs[0].stride(1) == 1)
            )
    return seen


@pytest.mark.parametrize("way", WAYS)
def test_every_stage_gets_channels_last(way: str) -> None:
    gates, run = WAYS[way]
    model, plain = build(gates=gates), build(gates=gates)
    model.lookup_for((SIZE, SIZE))
    seen = watched(model)
    logits = run(model)
    assert len(seen) >= 3
    assert all(seen)
    plain.backbone.channels_last = False
    unseen = watched(plain)
    torch.testing.assert_close(run(plain), logits)
    assert not any(unseen)


@pytest.mark.parametrize(
    "run",
    [
        lambda model: online(model, VIDEO[:1]),
        lambda model: model.train()(VIDEO),
        lambda model: model.encode(VIDEO),  # with gradients
        lambda model: model.backbone(VIDEO[0]),
    ],
)
def test_images_stay_as_they_are_where_that_would_not_help(run: Callable[[StopOrForward], Any]) -> None:
    model = build()
    seen = watched(model)
    run(model)
    assert seen
    assert not any(seen)


def test_token_models_keep_their_layout() -> None:
    backbone = stage_model(timm_network("test_vit", 64, img_size=64), input_size=(3, 64, 64), verify=False)
    assert not backbone.channels_last
    assert stage_model(timm_network("test_resnet", 64), input_size=(3, 64, 64), verify=False).channels_last


@pytest.mark.parametrize("way", WAYS)
def test_a_stage_that_refuses_channels_last_runs_again(way: str) -> None:
    gates, run = WAYS[way]
    model, plain = build(Viewing(), gates=gates), build(Viewing(), gates=gates)
    plain.backbone.channels_last = False
    torch.testing.assert_close(run(model), run(plain))
    assert not model.backbone.channels_last
    seen = watched(model)
    run(model)
    assert not any(seen)


def test_other_errors_of_a_stage_are_raised() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 2:
                raise RuntimeError("out of order")
            return x

    model = build(Failing())
    with pytest.raises(RuntimeError, match="out of order"):
        model(VIDEO)
    assert model.backbone.channels_last
