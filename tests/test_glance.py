"""A light network in front of a backbone is a stage like any other: staged, run, counted, compiled, exported, saved."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import assert_rows, assert_same, balance, randn, random_gates, timm_network, toy_video
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dynskip_onnx
from dynskip import (
    ConfidenceGate,
    DynskipError,
    EarlyExit,
    EarlyTerminator,
    FixedGate,
    FLOPsLookup,
    StagedBackbone,
    StopOrForward,
    VideoResult,
    glance,
    stage_model,
)
from dynskip.backbone.weights import load_weights

PIXELS, SMALL = 64, 16
SHAPE, LITTLE = (3, PIXELS, PIXELS), (3, SMALL, SMALL)
LIGHT = "test_efficientnet"
NAMES = ("test_resnet", "test_mambaout", "test_vit")  # images, images with channels last, tokens


def behind(name: str, **kwargs: Any) -> StagedBackbone:
    """Stage a backbone in two stages, in eval mode."""
    network = copy.deepcopy(timm_network(name, PIXELS, **({"img_size": PIXELS} if name == "test_vit" else {})))
    return stage_model(network, num_stages=2, input_size=SHAPE, **kwargs)


def light_network(name: str = LIGHT) -> nn.Module:
    return copy.deepcopy(timm_network(name, PIXELS, num_classes=0))


def toy_light() -> nn.Sequential:
    """Build a light network that is exported and compiled in a moment."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers).eval()


@functools.cache
def glanced(name: str, kind: str = "module") -> StagedBackbone:
    """Build a backbone with a glance. Shared between tests: deepcopy it before changing it."""
    if kind == "module":
        return glance(behind(name), toy_light(), SMALL)
    if kind == "toy stages":
        layers = toy_light()
        light = stage_model([layers[:2], layers[2:3]], head=layers[3:], input_size=LITTLE)
        return glance(behind(name), light, SMALL)
    network, size = ("test_mambaout", 32) if kind == "stages of another layout" else (LIGHT, SMALL)
    light = stage_model(light_network(network), num_stages=2, input_size=(3, size, size))
    return glance(behind(name), light, size)


def wrap(backbone: StagedBackbone, dtype: torch.dtype = torch.float64, **kwargs: Any) -> StopOrForward:
    """Put gates that disagree around a copy of a backbone."""
    gates = [gate.to(dtype) for gate in random_gates(backbone.num_features, seed=4)]
    model = StopOrForward(copy.deepcopy(backbone).to(dtype), gates, **kwargs).eval()
    return balance(model, video(dtype), share=0.7)


def video(dtype: torch.dtype = torch.float64) -> Tensor:
    return toy_video(4, 6, size=PIXELS, seed=3, dtype=dtype)


def photos(batch: int = 4, height: int = PIXELS, width: int = PIXELS) -> Tensor:
    return randn(batch, 3, height, width, seed=2, dtype=torch.float32)


# A glance is stages in front


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["module", "stages", "stages of another layout"])
@torch.no_grad()
def test_light_stages_come_first_and_the_frame_goes_on_untouched(name: str, kind: str) -> None:
    backbone, plain, images = glanced(name, kind), behind(name), photos()
    first = backbone.glance.light.num_stages
    assert backbone.num_stages == first + plain.num_stages
    assert backbone.stage_names[first:] == plain.stage_names
    assert backbone.num_features[first:] == plain.num_features
    assert backbone.channels_last == plain.channels_last
    assert torch.equal(backbone(images), plain(images))
    carry, own, rows = backbone.start(images), plain.start(images), torch.tensor([2, 0])
    few, pooled = carry.select(rows), []
    for n in range(backbone.num_stages):
        carry, few = backbone.run(n, carry), backbone.run(n, few)
        pooled.append(backbone.pool(n, carry))
        assert_rows(backbone.pool(n, few), pooled[-1][rows])
        few = carry.select(rows)  # from now on rows of the whole run
        if n >= first:
            own = plain.run(n - first, own)
            assert torch.equal(pooled[-1], plain.pool(n - first, own))
    assert_rows(backbone.head(few), plain(images)[rows])
    light = backbone.glance.light
    small = F.interpolate(images, light.input_size[1:], mode="bilinear", antialias=True)
    assert_rows(pooled[first - 1], light.model(small * backbone.glance.scale + backbone.glance.shift))
    assert [tuple(x.shape) for x in pooled[:first]] == [(4, channels) for channels in backbone.num_features[:first]]


@torch.no_grad()
def test_frames_are_normalised_for_the_light_network() -> None:
    network: Any = copy.deepcopy(timm_network("test_resnet", PIXELS))
    light: Any = light_network()
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    network.pretrained_cfg = {**network.pretrained_cfg, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    light.pretrained_cfg = {**light.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    pixels = photos().sigmoid()
    backbone = glance(stage_model(network, input_size=SHAPE), light, SMALL)
    small = F.interpolate(pixels, (SMALL, SMALL), mode="bilinear", antialias=True)
    small = (small - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    assert_rows(backbone.pool(0, backbone.run(0, backbone.start((pixels - mean) / std))), light(small))


@pytest.mark.parametrize(
    ("frame", "wanted"), [((48, 64), (16, 21)), ((64, 33), (31, 16)), ((16, 40), (16, 40)), ((12, 10), (12, 10))]
)
@torch.no_grad()
def test_the_shorter_side_is_the_size_and_smaller_frames_are_taken_as_they_are(frame: Any, wanted: Any) -> None:
    looking, images = glanced("test_resnet").glance, photos(2, *frame)
    small = looking.shrink(images)
    assert tuple(small.shape[2:]) == wanted
    if frame == wanted:
        assert torch.equal(small, images * looking.scale + looking.shift)
    assert glanced("test_resnet")(images).shape == (2, 1000)


@torch.no_grad()
def test_frames_in_half_precision_are_resized_too() -> None:
    plain, images = glanced("test_resnet"), photos()
    half = copy.deepcopy(plain).bfloat16()
    small = half.glance.shrink(images.bfloat16())
    torch.testing.assert_close(small.float(), plain.glance.shrink(images), rtol=0.02, atol=0.02)
    assert half.pool(0, half.run(0, half.start(images.bfloat16()))).dtype == torch.bfloat16


def test_by_name_and_in_the_backbones_dtype_and_mode() -> None:
    backbone = glance(behind("test_resnet").double().train(), LIGHT, SMALL, drop_rate=0.1)
    assert backbone.stage_names[0] == "glance"
    assert {p.dtype for p in backbone.parameters()} == {torch.float64}
    assert all(module.training for module in backbone.modules())
    assert backbone.glance.light.model.drop_rate == 0.1
    assert "glance (256 NC)" in repr(backbone)


# All ways of running make the same decisions


@pytest.mark.parametrize(("name", "kind"), [*((name, "module") for name in NAMES), ("test_resnet", "stages")])
def test_every_way_decides_the_same(name: str, kind: str) -> None:
    model, clips = wrap(glanced(name, kind), terminator=EarlyTerminator(0.01, 4)), video()
    masked = model.decide(model.encode(clips))
    assert len(masked.stopped_at.unique()) > 3
    for window in (None, 1, 3):
        assert_same(model.run_clip(clips, window), masked)
    session = model.stream(len(clips))
    steps = [session(clips[:, t]) for t in range(clips.shape[1])]
    assert torch.equal(torch.stack([step.stopped_at for step in steps], 1), masked.stopped_at)
    torch.testing.assert_close(session.result().logits, masked.logits)
    assert torch.equal(session.result().macs, masked.macs)
    served = [event for event in model.serve_streams(map(iter, clips), look_ahead=2) if isinstance(event, VideoResult)]
    assert {event.key for event in served} == set(range(len(clips)))
    for event in served:
        row: Any = event.key
        torch.testing.assert_close(event.logits, masked.logits[row])
        assert event.macs == masked.macs[row]


@pytest.mark.parametrize("name", NAMES)
def test_exported_models_decide_the_same(name: str, tmp_path: Path) -> None:
    backbone = glanced(name, "toy stages" if name == "test_vit" else "module")
    model, clips = wrap(backbone, torch.float32), video(torch.float32)
    runner, output = dynskip_onnx.load(model.export(tmp_path / "onnx", PIXELS), threads=1), model(clips)
    assert len(output.stopped_at.unique()) > 2
    for row, clip in enumerate(clips.numpy()):
        for window in (1, 16):
            result = runner.clip(clip, window)
            assert result.stopped_at.tolist() == output.stopped_at[row].tolist()
            torch.testing.assert_close(torch.tensor(result.logits), output.logits[row], rtol=1e-3, atol=1e-4)
            assert result.macs == pytest.approx(output.macs[row].item())
    session = runner.stream(batch=len(clips))
    steps = [session(clips[:, t].numpy()).stopped_at.tolist() for t in range(clips.shape[1])]
    assert steps == output.stopped_at.T.tolist()


@pytest.mark.parametrize("kind", ["module", "stages"])
def test_optimised_models_decide_the_same_and_do_not_compile_again(kind: str) -> None:
    model, clips = wrap(glanced("test_resnet", kind), torch.float32), video(torch.float32)
    fast, agreement = model.optimize(clips, backend="eager")
    assert agreement.decisions == agreement.predictions == 1
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.backbone.glance.modules())
    with torch.compiler.set_stance("fail_on_recompile"):
        fast(clips[:3])


# Costs


@pytest.mark.parametrize("name", NAMES)
def test_reported_macs_are_executed_macs(name: str) -> None:
    model, clips = wrap(glanced(name, "stages")), video()
    lookup, plain = model.lookup_for((PIXELS, PIXELS)), FLOPsLookup.measure(behind(name), PIXELS)
    assert lookup.per_stage[2:].tolist() == plain.per_stage.tolist()
    light = FLOPsLookup.measure(glanced(name, "stages").glance.light, SMALL)
    assert float(lookup.per_stage[:2].sum()) == light.dense
    # Attention as plain matrix products: torch 2.14 does not count the fused kernel of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(clips)
    assert counter.get_total_flops() / 2 == float(output.macs.sum() + output.speculative_macs.sum())


# Weights


def test_copies_and_pickles_run_and_keys_stay() -> None:
    backbone, images = glanced("test_resnet", "stages"), photos()
    for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert torch.equal(other(images), backbone(images))
    own = {f"model.{key}" for key in timm_network("test_resnet", PIXELS).state_dict()}
    keys = set(backbone.state_dict())
    assert {key for key in keys if not key.startswith("glance.")} == own
    assert {key.split(".")[1] for key in keys - own} == {"light", "scale", "shift"}


def test_weights_of_both_networks_load_as_ever(tmp_path: Path) -> None:
    backbone = glance(behind("test_resnet"), LIGHT, SMALL)
    for n, (part, name) in enumerate([(backbone.model, "test_resnet"), (backbone.glance.light.model, LIGHT)]):
        torch.manual_seed(n)
        published = timm.create_model(name, num_classes=0 if n else 1000).state_dict()
        save_file(published, tmp_path / f"{n}.safetensors")
        load_weights(part, tmp_path / f"{n}.safetensors")
        for key, value in part.state_dict().items():
            assert torch.equal(value, published[key]) or key.endswith("num_batches_tracked")


@pytest.mark.parametrize("stages", [1, 2])
def test_a_saved_model_comes_back_bit_for_bit(stages: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = stage_model("test_resnet", num_stages=2, num_classes=4, input_size=SHAPE)
    light: Any = LIGHT
    if stages == 2:
        light = stage_model(LIGHT, num_stages=2, num_classes=0, input_size=LITTLE)
    model, clips = wrap(glance(backbone, light, SMALL), torch.float32), video(torch.float32)
    back = StopOrForward.from_pretrained(model.save_pretrained(tmp_path / "model"))
    torch.testing.assert_close(dict(back.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert back.backbone.stage_names == model.backbone.stage_names
    assert_same(back(clips), model(clips), exact=True)
    assert "behind a glance of `test_efficientnet` at 16 pixels" in (tmp_path / "model" / "README.md").read_text()


# Training


@pytest.mark.parametrize("frozen", [False, True])
def test_the_light_network_is_trained_with_the_rest_or_frozen(frozen: bool) -> None:
    model = wrap(glanced("test_resnet")).train()
    model.backbone.glance.requires_grad_(not frozen)
    output = model(video())
    (output.logits.square().sum() + output.gate_logits.square().sum()).backward()
    light = [p.grad is not None and bool(p.grad.any()) for p in model.backbone.glance.parameters()]
    assert not any(light) if frozen else all(light)
    assert all(p.grad is not None for p in model.backbone.model.parameters())


def test_features_of_another_glance_are_refused(data: Path, tmp_path: Path) -> None:
    from dynskip import sofnet, video  # `video` needs the extra

    def model_at(size: int, name: str = LIGHT) -> StopOrForward:
        torch.manual_seed(0)
        backbone = stage_model("test_resnet", num_classes=6, input_size=(3, 32, 32))
        return sofnet(glance(backbone, name, size), hidden=8).eval()

    items = [item for item in video.load_items(data) if item.split == "test"][:2]
    clips = video.Clips(items, video.class_names(video.load_items(data)), video.Preprocessing(32, 4))
    model = model_at(SMALL)
    stored = video.encode_clips(model, clips, tmp_path)
    assert [x.shape[-1] for x in stored.pooled] == list(model.backbone.num_features)
    decoded: list[Any] = [clips[0, position].video for position in range(2)]
    pixels = torch.stack(decoded)
    with torch.no_grad():
        found = model.encode(clips.prep.normalize(pixels))
    for here, there in zip(found.pooled, stored.rows(model, slice(0, 2)).pooled, strict=True):
        assert_rows(here, there)
    for other in (model_at(8), model_at(SMALL, "test_byobnet")):
        with pytest.raises(DynskipError, match="another network"):
            video.encode_clips(other, clips, tmp_path)


def test_a_sure_glance_answers_for_an_image() -> None:
    backbone = glanced("test_resnet")
    first = ConfidenceGate(backbone.num_features[0], backbone.num_classes, 1e-6)
    model = EarlyExit(backbone, [first, *[FixedGate()] * (backbone.num_stages - 1)]).eval()
    output = model(photos())
    assert (output.stopped_at == 0).all()
    lookup = model.lookup_for((PIXELS, PIXELS))
    assert output.macs.tolist() == [float(lookup.cumulative[0])] * 4


# Bad input


class Fixed(nn.Module):
    """Ends in pooled features, of images of one size alone."""

    def __init__(self, channels: int = 3, pixels: int = SMALL) -> None:
        super().__init__()
        self.layer = nn.Linear(channels * pixels**2, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("light", "size", "telling"),
    [
        (Fixed(pixels=20), SMALL, "Fixed for a glance at 3x16x16, copies of frames of 3x64x64: .*(1200|20)"),
        (Fixed(channels=1), SMALL, "at 3x16x16, .*256"),
        (lambda: timm.create_model(LIGHT, in_chans=1, num_classes=0), SMALL, "at 3x16x16, .*1 channels|expected input"),
        (lambda: stage_model(LIGHT, num_stages=2, in_chans=1, num_classes=0, input_size=(1, 16, 16)), SMALL, "1, H, W"),
        (lambda: timm.create_model(LIGHT), SMALL, "EfficientNet ends in 1000 class logits.*num_classes=0"),
        (lambda: stage_model(LIGHT, num_stages=2, num_classes=7), SMALL, "ends in 7 class logits"),
        (lambda: stage_model(LIGHT, num_stages=1, num_classes=0, head=nn.Linear(256, 3)), SMALL, "3 class logits"),
        (nn.Flatten(0), SMALL, "Flatten for a glance at 3x16x16"),
        ("resnet18", PIXELS, r"at 3x64x64 costs 148 MMACs .* [\d.]+ of the backbone's first 2 stages at 3x64x64"),
        ("test_efficientnett", SMALL, "no model named 'test_efficientnett'"),
        (lambda: timm.create_model("test_vit", num_classes=0, dynamic_img_size=False), SMALL, "at 3x16x16, .*img_size"),
        (LIGHT, 0, "size=0 is no number of pixels"),
        (LIGHT, 96.0, r"size=96\.0 is no number"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_the_numbers(light: Any, size: Any, telling: str) -> None:
    given = light() if callable(light) and not isinstance(light, nn.Module) else light
    with pytest.raises(DynskipError, match=telling):
        glance(behind("test_resnet"), given, size)


def test_one_glance_is_enough_and_a_light_network_that_was_changed_is_noticed() -> None:
    backbone = copy.deepcopy(glanced("test_resnet", "stages"))
    with pytest.raises(DynskipError, match="has a glance already"):
        glance(backbone, LIGHT, SMALL)
    backbone.glance.light.model.bn1 = nn.Sequential()
    del backbone.glance.light.model.bn1
    with pytest.raises(DynskipError, match="was changed after it was cut"):
        backbone(photos())
