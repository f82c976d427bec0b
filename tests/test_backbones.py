"""Many backbones, one by one: every family must be cut exactly, skip for real, train, compile and survive a save."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from helpers import assert_rows, balance, enliven, randn, random_gates, timm_network, toy_video
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynskip import InnerClassifier, SoFLoss, StagedBackbone, StopOrForward, stage_model

PIXELS = 64
BATCH = 4

# Structures of all kinds, with fewer blocks where timm lets us choose. (pixels, arguments)
SIZED: dict[str, Any] = {"img_size": PIXELS}  # position tables and fixed windows are built for a size
TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    **{
        name: (PIXELS, SIZED if any(word in name for word in ("vit", "coatnet")) else {})
        for name in timm.list_models("test_*")
    },
    "resnet18": (PIXELS, {}),
    "convnext_atto": (PIXELS, {"depths": (1, 1, 2, 1)}),
    "swin_tiny_patch4_window7_224": (
        PIXELS,
        {**SIZED, "window_size": 2, "depths": (2, 2, 2, 2), "embed_dim": 24, "num_heads": (1, 2, 4, 8)},
    ),
    "vit_tiny_patch16_224": (PIXELS, {**SIZED, "depth": 5}),
    "mobilenetv3_small_050": (PIXELS, {}),
    "mobilenetv4_conv_small": (PIXELS, {}),
    "efficientnet_b0": (PIXELS, {}),
    "regnetx_002": (PIXELS, {}),
    "densenet121": (PIXELS, {"block_config": (2, 2, 2, 2)}),
    # Lists of branches cross the boundaries.
    "hrnet_w18_small": (PIXELS, {}),
    # Tuples with a class token.
    "pit_ti_224": (PIXELS, SIZED),
    # Boundaries that `feature_info` names by names that no module has; a size unpacked from a closed module.
    "mvitv2_tiny": (PIXELS, SIZED),
    "twins_svt_small": (PIXELS, {**SIZED, "depths": (1, 1, 2, 1)}),
}
if tuple(map(int, timm.__version__.split(".")[:3])) >= (1, 0, 31):  # older ones lack these, or what a cut needs of them
    TIMM |= {
        # Control flow on shapes, and boundaries relative to an inner encoder.
        "gemma4_vit_167m": (
            96,
            {"img_size": 96, "depth": 4, "embed_dim": 48, "num_heads": 2, "head_dim": 24, "num_classes": 10},
        ),
        # Pixels folded into the batch, and a number that is a multiple of the batch.
        "tnt_s_patch16_224": (PIXELS, {**SIZED, "depth": 4}),
        # A stage that ends in a ModuleList, entries that repeat.
        "coat_lite_tiny": (PIXELS, SIZED),
        # Encoders without a classifier, tables of positions made on the fly.
        "qwen3_vit_88m_enc": (PIXELS, {"depth": 2, "embed_dim": 48, "num_heads": 2}),
    }

# torchvision's models do not name their stages.
TORCHVISION: dict[str, tuple[list[str], Callable[[], nn.Module]]] = {
    "resnet18": (["maxpool", "layer1", "layer2", "layer3", "layer4"], torchvision.models.resnet18),
    "mobilenet_v3_small": (
        ["features.1", "features.4", "features.12"],
        torchvision.models.get_model_builder("mobilenet_v3_small"),
    ),
    "efficientnet_b0": (["features.2", "features.4", "features.8"], torchvision.models.efficientnet_b0),
    "convnext": (
        ["features.1", "features.3"],
        lambda: torchvision.models.ConvNeXt(
            [
                torchvision.models.convnext.CNBlockConfig(24, 48, 2),
                torchvision.models.convnext.CNBlockConfig(48, None, 2),
            ]
        ),
    ),
    "swin": (
        ["features.1", "features.3", "features.5"],
        lambda: torchvision.models.SwinTransformer(
            [4, 4], embed_dim=24, depths=[2, 2, 2], num_heads=[1, 2, 4], window_size=[2, 2]
        ),
    ),
    "vit": (
        [f"encoder.layers.encoder_layer_{i}" for i in range(3)],
        lambda: torchvision.models.VisionTransformer(
            PIXELS, patch_size=16, num_layers=3, num_heads=2, hidden_dim=48, mlp_dim=96
        ),
    ),
    "densenet": (
        ["features.denseblock1", "features.denseblock2", "features.denseblock3"],
        lambda: torchvision.models.DenseNet(block_config=(2, 2, 2, 1)),
    ),
    "regnet_y_400mf": (
        ["stem", "trunk_output.block1", "trunk_output.block2", "trunk_output.block4"],
        torchvision.models.regnet_y_400mf,
    ),
    "googlenet": (
        ["maxpool2", "inception3b", "inception5b"],
        lambda: torchvision.models.GoogLeNet(init_weights=False),
    ),
    "shufflenet_v2_x0_5": (["maxpool", "stage2", "stage3", "conv5"], torchvision.models.shufflenet_v2_x0_5),
    "maxvit": (
        ["stem", "blocks.0", "blocks.1"],
        lambda: torchvision.models.MaxVit(
            (PIXELS, PIXELS), 16, 2, [16, 32], [1, 1], head_dim=8, stochastic_depth_prob=0.2
        ),
    ),
    "mnasnet0_5": (["layers.8", "layers.10", "layers.16"], torchvision.models.mnasnet0_5),
    "squeezenet1_0": (["features.4", "features.8", "features.12"], torchvision.models.squeezenet1_0),
}
EVERY = [*TIMM, *(f"torchvision/{name}" for name in TORCHVISION)]


def boundaries_of(name: str) -> list[str] | None:
    library, _, short = name.rpartition("/")
    return TORCHVISION[short][0] if library else None


def size_of(name: str) -> tuple[int, int, int]:
    pixels = TIMM[name][0] if name in TIMM else PIXELS
    return 3, pixels, pixels


@functools.cache
def network(name: str) -> nn.Module:
    """Build a model in eval mode. Shared between tests: deepcopy it before changing it."""
    if name in TIMM:
        pixels, options = TIMM[name]
        return timm_network(name, pixels, **options)
    _, build = TORCHVISION[name.rpartition("/")[2]]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return enliven(build(), photos(4, name, seed=1))


@functools.cache
def staged(name: str) -> StagedBackbone:
    return stage_model(network(name), boundaries_of(name), input_size=size_of(name))


def photos(batch: int, name: str, seed: int) -> Tensor:
    return randn(batch, *size_of(name), seed=seed, dtype=torch.float32)


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_stages_compose_to_the_model(name: str) -> None:
    images = photos(BATCH, name, seed=5)
    answer = network(name)(images)
    assert torch.equal(staged(name)(images), answer)
    assert answer.std(0).mean() > 1e-3 * answer.abs().mean(), "the answer ignores the image: rows would prove nothing"


@pytest.mark.parametrize("name", EVERY)
def test_any_rows_alone_equal_the_rows_of_the_whole(name: str) -> None:
    backbone, images = staged(name), photos(BATCH, name, seed=6)
    with torch.no_grad():
        whole = [backbone.start(images)]
        for n in range(backbone.num_stages):
            whole.append(backbone.run(n, whole[-1]))

    @settings(max_examples=3)
    @given(data=st.data())
    @torch.no_grad()
    def check(data: st.DataObject) -> None:
        carry, rows = whole[0], torch.arange(BATCH)
        for n in range(backbone.num_stages):
            # Any rows in any order, a frame twice included.
            chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=3))
            carry, rows = carry.select(torch.tensor(chosen)), rows[chosen]
            carry = backbone.run(n, carry)
            assert carry.batch == len(rows)
            assert backbone.pool(n, carry).shape == (len(rows), backbone.num_features[n])
            assert_rows(backbone.pool(n, carry), backbone.pool(n, whole[n + 1])[rows])
        assert_rows(backbone.head(carry), backbone.head(whole[-1])[rows])

    check()


@pytest.mark.parametrize("name", EVERY)
def test_a_training_pass_gives_every_parameter_the_models_own_gradient(name: str) -> None:
    images = photos(BATCH, name, seed=7)
    plain, model = (copy.deepcopy(network(name)).train() for _ in range(2))
    backbone = stage_model(model, boundaries_of(name), input_size=size_of(name))
    answers = []
    for forward in (plain, backbone):
        torch.manual_seed(3)
        answer = forward(images)
        answer = getattr(answer, "logits", answer)  # torchvision's GoogLeNet adds auxiliary logits
        answer.square().mean().backward()
        answers.append(answer)
    assert torch.equal(*answers)
    for (key, expected), parameter in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=key)
    for (key, expected_buffer), buffer in zip(plain.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected_buffer, msg=key)


def wrap(name: str) -> StopOrForward:
    backbone = stage_model(copy.deepcopy(network(name)), boundaries_of(name), input_size=size_of(name))
    gates = [gate.float() for gate in random_gates(backbone.num_features, seed=4)]
    inner = [InnerClassifier(5, backbone.num_classes) for _ in gates]
    return StopOrForward(backbone, gates, inner)


@pytest.mark.parametrize("name", EVERY)
def test_wrapped_it_trains_skips_as_it_masks_and_survives_a_save(name: str, tmp_path: Path) -> None:
    model = wrap(name)
    video = toy_video(2, 3, seed=8, size=size_of(name)[1], dtype=torch.float32)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    lookup = model.lookup_for(size_of(name)[1:])
    output = model.train()(video)
    SoFLoss(lookup)(output, torch.tensor([0, 1])).total.backward()
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    moved = [key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])]
    assert any(key.startswith("backbone.") for key in moved)
    assert any(key.startswith("gates.") for key in moved)

    # Such a step unsettles a random network, and float32's rounding may grow beyond any tolerance.
    model, video = model.double(), video.double()
    balance(model.eval(), video, share=0.7)
    with torch.no_grad():
        masked, skipped = model.decide(model.encode(video)), model(video)
    assert torch.equal(skipped.stopped_at, masked.stopped_at)
    assert len(skipped.stopped_at.unique()) > 1, "every frame has the same fate: this proves little"
    assert torch.equal(skipped.macs, masked.macs)
    assert (skipped.macs < video.shape[1] * lookup.total).any()
    assert_rows(skipped.logits, masked.logits)

    torch.save(model.state_dict(), tmp_path / "model.pt")
    twin = wrap(name).double().eval()
    twin.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    again = twin(video)
    assert torch.equal(again.logits, skipped.logits)
    assert torch.equal(again.stopped_at, skipped.stopped_at)


@pytest.mark.parametrize("name", EVERY)
def test_the_model_stays_inside_with_its_own_names_and_parameters(name: str) -> None:
    backbone, model = staged(name), network(name)
    assert backbone.model is model
    assert list(backbone.state_dict()) == [f"model.{key}" for key in model.state_dict()]
    assert [id(p) for p in backbone.parameters()] == [id(p) for p in model.parameters()]
    if name in TIMM:
        assert list(model.state_dict()) == list(timm.create_model(name, **TIMM[name][1]).state_dict())


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "test_convnext", "twins_svt_small", "torchvision/resnet18"]
)
@torch.no_grad()
def test_every_stage_compiles_to_one_graph_for_all_batches(name: str) -> None:
    backbone, images = staged(name), photos(6, name, seed=9)
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward  # type: ignore[no-any-return]

    for n in range(backbone.num_stages):
        torch.compiler.reset()
        graphs.clear()
        stage = torch.compile(functools.partial(backbone.run, n), fullgraph=True, backend=keep)
        for batch in (5, 2, 6, 3):
            carry = backbone.start(images[:batch])
            for m in range(n):
                carry = backbone.run(m, carry)
            for value in carry.values:
                if isinstance(value, Tensor):
                    torch._dynamo.maybe_mark_dynamic(value, 0)
            assert_rows(backbone.pool(n, stage(carry)), backbone.pool(n, backbone.run(n, carry)))
        # Before torch 2.11, a number that crosses has its first value in the first graph, though nothing reads it.
        numbers = torch.__version__ < "2.11" and any(isinstance(value, int) for value in carry.values)
        assert len(graphs) == (2 if numbers else 1), backbone.stage_names[n]
