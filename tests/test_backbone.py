from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import SIZE, assert_rows, enliven, randn, timm_network, toy_network
from torch import Tensor, nn

from dynskip import Carry, DynskipError, FLOPsLookup, StagedBackbone, stage_model

PIXELS = 64
SIZED: dict[str, Any] = {"img_size": PIXELS}  # position tables and fixed windows are built for a size
MODELS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("test_resnet", "test_convnext", "test_mambaout", "test_efficientnet")},
    **dict.fromkeys(("test_vit", "test_vit2", "test_vit3"), SIZED),
    "resnet18": {},
    "convnext_atto": {"depths": (1, 1, 2, 1)},
    "swin_tiny_patch4_window7_224": {
        "img_size": PIXELS,
        "window_size": 2,
        "depths": (2, 2, 2, 2),
        "embed_dim": 24,
        "num_heads": (1, 2, 4, 8),
    },
    "vit_tiny_patch16_224": {"img_size": PIXELS, "depth": 5},
    "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small": {},
    "efficientnet_b0": {},
    "regnetx_002": {},
}


@functools.cache
def staged(name: str) -> StagedBackbone:
    return stage_model(timm_network(name, PIXELS, **MODELS[name]), input_size=(3, PIXELS, PIXELS))


def all_carries(backbone: StagedBackbone, images: Tensor) -> list[Carry]:
    carries = [backbone.start(images)]
    for n in range(backbone.num_stages):
        carries.append(backbone.run(n, carries[-1]))
    return carries[1:]


def photos(batch: int, seed: int, height: int = PIXELS, width: int = PIXELS) -> Tensor:
    return randn(batch, 3, height, width, seed=seed, dtype=torch.float32)


class Net(nn.Module):
    """Two convolutions and a head; a test overrides what happens between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.spare, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 4)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, images: Tensor) -> Any:
        return self.head(self.two(self.between(self.one(images))).mean((2, 3)))


# Carries, pooling and layouts


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_mambaout", "test_efficientnet"])
@torch.no_grad()
def test_carries_of_different_runs_join(name: str) -> None:
    backbone = staged(name)
    images = photos(5, seed=2)
    first, second = all_carries(backbone, images[:2]), all_carries(backbone, images[2:])
    for n in range(backbone.num_stages):
        mask = torch.tensor([True, False, True])
        joined = Carry.cat([first[n], second[n].select(mask), second[n].select(torch.tensor([1]))])
        assert joined.batch == 5
        for m in range(n + 1, backbone.num_stages):
            joined = backbone.run(m, joined)
        assert_rows(backbone.head(joined), backbone(images)[[0, 1, 2, 4, 3]])


@pytest.mark.parametrize(
    "name",
    [
        *("test_resnet", "test_convnext", "test_mambaout", "test_efficientnet", "test_vit", "test_vit2", "test_vit3"),
        *("swin_tiny_patch4_window7_224", "regnetx_002", "vit_tiny_patch16_224"),
    ],
)
@torch.no_grad()
def test_pooling_is_the_mean_over_space_as_timm_sees_it(name: str) -> None:
    assert_pools_like_timm(staged(name))


@pytest.mark.parametrize(
    ("options", "prefix"), [({"reg_tokens": 2}, 3), ({"class_token": False, "global_pool": "avg"}, 0)]
)
@torch.no_grad()
def test_class_and_register_tokens_are_not_pooled(options: dict[str, Any], prefix: int) -> None:
    model: Any = timm_network("test_vit", PIXELS, **SIZED, **options)
    assert model.num_prefix_tokens == prefix
    assert_pools_like_timm(stage_model(model, input_size=(3, PIXELS, PIXELS)))


def assert_pools_like_timm(backbone: StagedBackbone) -> None:
    """Compare with timm's intermediate features, which are NCHW maps of patch tokens only."""
    images, model = photos(2, seed=3), backbone.model
    if not hasattr(model, "forward_intermediates"):
        pytest.skip(f"timm {timm.__version__} gives no intermediate features of {type(model).__name__}")
    assert isinstance(model.feature_info, Sequence)
    names = [entry["module"] for entry in model.feature_info]
    last = model.forward_intermediates(images, indices=len(names), intermediates_only=True)  # type: ignore[operator]
    features = dict(zip(names, last, strict=True))
    carries = all_carries(backbone, images)
    compared = [n for n, stage in enumerate(backbone.stage_names) if stage in features]
    assert len(compared) >= 4
    for n in compared:
        assert_rows(backbone.pool(n, carries[n]), features[backbone.stage_names[n]].mean((2, 3)))


def test_layouts_and_stages_of_the_families() -> None:
    layouts = {name: set(staged(name).layouts) for name in MODELS if not name.startswith("test_")}
    assert layouts.pop("swin_tiny_patch4_window7_224") == {"NHWC"}
    assert layouts.pop("vit_tiny_patch16_224") == {"NLC"}
    assert set(staged("test_mambaout").layouts) == {"NHWC"}
    assert all(found == {"NCHW"} for found in layouts.values())
    # What enters the first stage is a boundary of its own, also where `feature_info` does not name it.
    stages = ("stem", "stages.0", "stages.1", "stages.2", "stages.3")
    assert staged("convnext_atto").stage_names == staged("test_mambaout").stage_names == stages
    swin = staged("swin_tiny_patch4_window7_224")
    assert swin.stage_names == ("patch_embed", "layers.0", "layers.1", "layers.2", "layers.3")
    assert staged("regnetx_002").stage_names == ("stem", "s1", "s2", "s3", "s4")
    assert staged("efficientnet_b0").stage_names[:2] == ("bn1", "blocks.0")
    resnet = staged("resnet18")
    assert resnet.stage_names == ("maxpool", "layer1", "layer2", "layer3", "layer4")
    assert resnet.num_features == (64, 64, 128, 256, 512)
    assert (resnet.num_stages, resnet.num_classes) == (5, 1000)
    assert "layer3 (256 NCHW)" in repr(resnet)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
@torch.no_grad()
def test_other_image_sizes_than_the_one_it_was_cut_at(name: str) -> None:
    backbone = staged(name)
    images = photos(2, 4, 96, 80)
    assert torch.equal(backbone(images), backbone.model(images))


@torch.no_grad()
def test_memory_layout_survives_a_selection() -> None:
    backbone = staged("test_resnet")
    images = photos(3, seed=4).contiguous(memory_format=torch.channels_last)
    carry = backbone.start(images).select(torch.tensor([2, 0]))
    assert carry.values[0].is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("index", [torch.tensor([2, 0]), torch.tensor([True, False, True])])
def test_an_index_goes_where_each_value_is(index: Tensor) -> None:
    here, there = torch.arange(12.0).reshape(6, 2), torch.empty(3, 4, device="meta")
    chosen = Carry((here, [there, 6]), (("rows", 2), (("rows", 1), ("size", 2))), 3).select(index)
    rows = [4, 5, 0, 1] if index.dtype == torch.int64 else [0, 1, 4, 5]
    assert torch.equal(chosen.values[0], here[rows])
    assert chosen.values[1][0].device.type == "meta"
    assert chosen.values[1][0].shape == (2, 4)
    assert chosen.values[1][1] == 4


class Parts(NamedTuple):
    features: Tensor
    scale: Tensor


@torch.no_grad()
def test_a_named_tuple_may_cross() -> None:
    class Split(nn.Module):
        def forward(self, x: Tensor) -> Parts:
            return Parts(x, x.amax((1, 2, 3)))

    class Named(Net):
        def __init__(self) -> None:
            super().__init__()
            self.split = Split()

        def between(self, x: Tensor) -> Any:
            parts = self.split(x)
            return parts.features * parts.scale[:, None, None, None]

    model = Named().double().eval()
    assert_stages(stage_model(model, ["split", "two"], input_size=(3, SIZE, SIZE)), model)


@torch.no_grad()
def test_what_works_in_place_leaves_the_carry_to_its_owner() -> None:
    class InPlace(Net):
        def between(self, x: Tensor) -> Tensor:
            return x.add_(1)

    backbone = stage_model(InPlace(), ["one", "two"], input_size=(3, SIZE, SIZE))
    carry = backbone.run(0, backbone.start(randn(2, 3, SIZE, SIZE, seed=3, dtype=torch.float32)))
    pooled = backbone.pool(0, carry)
    twice = [backbone.pool(1, backbone.run(1, carry)) for _ in range(2)]
    assert torch.equal(*twice)
    assert torch.equal(backbone.pool(0, carry), pooled)


@torch.no_grad()
def test_batches_of_none_can_be_selected() -> None:
    carry = staged("test_resnet").start(photos(3, seed=4)).select(torch.tensor([False] * 3))
    assert carry.batch == 0
    assert carry.values[0].shape[0] == 0


# The user's own modules


def assert_stages(backbone: StagedBackbone, model: nn.Module, size: int = SIZE) -> None:
    images = randn(4, 3, size, size, seed=9).to(next(model.parameters()).dtype)
    with torch.no_grad():
        assert torch.equal(backbone(images), model(images))
        carry = backbone.start(images).select(torch.tensor([3, 1]))
        for n in range(backbone.num_stages):
            carry = backbone.run(n, carry)
            assert backbone.pool(n, carry).shape == (2, backbone.num_features[n])
        assert_rows(backbone.head(carry), model(images)[[3, 1]])


def test_own_sequential_keeps_its_names() -> None:
    network = toy_network()
    backbone = stage_model(network, input_size=(3, SIZE, SIZE))
    assert_stages(backbone, network)
    assert backbone.model is network
    assert backbone.stage_names == ("0", "1", "2")
    assert backbone.num_features == (6, 8, 10)


@pytest.mark.parametrize("container", [list, tuple, nn.ModuleList, lambda parts: nn.Sequential(*parts)])
def test_own_modules_with_a_head(container: Callable[[Sequence[nn.Module]], Any]) -> None:
    network = toy_network()
    *stages, head = network
    backbone = stage_model(container(stages), head=head, input_size=(3, SIZE, SIZE))
    assert_stages(backbone, network)
    assert backbone.num_stages == 3
    assert {id(p) for p in backbone.parameters()} == {id(p) for p in network.parameters()}


def test_own_modules_that_end_in_their_head() -> None:
    network = toy_network()
    assert_stages(stage_model(list(network), input_size=(3, SIZE, SIZE)), network)


def test_own_sequential_at_chosen_boundaries() -> None:
    network = toy_network(stages=4)
    backbone = stage_model(network, ["0", "2.0"], input_size=(3, SIZE, SIZE))
    assert_stages(backbone, network)
    assert backbone.stage_names == ("0", "2.0")
    assert backbone.num_features == (6, 10)


def test_stages_may_end_in_vectors_or_channels_last_maps() -> None:
    class ChannelsLast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1)

    class Tokens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1, 2)

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1)

    stages = [nn.Sequential(nn.Conv2d(3, 7, 3), ChannelsLast()), Tokens(), Mean(), nn.Linear(7, 9)]
    network = nn.Sequential(*stages, nn.Linear(9, 4)).double().eval()
    backbone = stage_model(network, input_size=(3, SIZE, SIZE))
    assert_stages(backbone, network)
    assert backbone.layouts == ("NHWC", "NLC", "NC", "NC")
    images = randn(2, 3, SIZE, SIZE, seed=1)
    carries = all_carries(backbone, images)
    expected = network[0](images).mean((1, 2))
    for n in range(3):
        torch.testing.assert_close(backbone.pool(n, carries[n]), expected)


@pytest.mark.parametrize("size", [(8, 12), (12, 8), (16, 12)])
def test_layout_of_maps_that_are_not_square(size: tuple[int, int]) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))
    backbone = stage_model(layers, head=head, input_size=(3, *size))
    assert backbone.layouts == ("NCHW", "NCHW")
    assert backbone.num_features == (8, 12)


class Branching(nn.Module):
    """Crosses its boundary with a map, an early map, folded tokens, a number, a constant and a nested list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.position = nn.Parameter(torch.randn(4, 1, 1))
        self.third, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        early = self.first(images)
        batch = images.shape[0]
        folded = early.flatten(2).transpose(1, 2).reshape(batch * SIZE * SIZE, 4)
        grid = torch.arange(SIZE, dtype=images.dtype, device=images.device) + torch.linspace(0, 1, SIZE)
        pair = [early.amax((2, 3)), (early.amin((2, 3)), 3)]
        x = self.second(early + self.position)
        x = self.third(x) + early * self.position * grid
        tokens = folded.reshape(batch, SIZE * SIZE, 4).sum(1)
        return self.head(x.mean((2, 3)) + tokens + pair[0] + pair[1][0] * pair[1][1])  # type: ignore[no-any-return]


def test_samples_of_everything_that_crosses_a_boundary_can_be_selected() -> None:
    model = Branching().double().eval()
    backbone = stage_model(model, ["first", "second", "third"], input_size=(3, SIZE, SIZE))
    assert_stages(backbone, model)
    images = randn(3, 3, SIZE, SIZE, seed=2)
    carries = all_carries(backbone, images)
    assert [value.shape[0] for value in carries[1].values if isinstance(value, Tensor)].count(3 * SIZE * SIZE) == 1
    parts = [carries[1].select(torch.tensor([0, 2])), carries[1].select(torch.tensor([1]))]
    joined = backbone.run(2, Carry.cat(parts))
    assert_rows(backbone.head(joined), model(images)[[0, 2, 1]])


def test_tensors_made_while_tracing_follow_the_backbone_and_stay_out_of_its_state() -> None:
    model = Branching().double().eval()
    backbone = stage_model(model, ["first", "second", "third"], input_size=(3, SIZE, SIZE))
    assert list(backbone.buffers())
    assert set(backbone.state_dict()) == {f"model.{key}" for key in model.state_dict()}
    assert FLOPsLookup.measure(backbone, SIZE).total > 0  # on the meta device
    assert not [name for name in vars(model) if "constant" in name]
    assert_stages(copy.deepcopy(backbone).float(), copy.deepcopy(model).float())


def test_channels_are_the_models() -> None:
    model = timm.create_model("test_resnet", in_chans=1).eval()
    backbone = stage_model(model)
    assert backbone.input_size == (1, 160, 160)
    images = randn(2, 1, PIXELS, PIXELS, seed=0, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(backbone(images), model(images))
    with pytest.raises(DynskipError, match=r"\(2, 3, 64, 64\) do not fit this backbone; it takes \(B, 1, H, W\)"):
        backbone(photos(2, seed=0))


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_num_stages_keeps_the_last_boundary(name: str) -> None:
    model = timm_network(name, PIXELS, **MODELS[name])
    backbone = stage_model(model, num_stages=2, input_size=(3, PIXELS, PIXELS))
    assert backbone.num_stages == 2
    assert backbone.stage_names[-1] == staged(name).stage_names[-1]
    assert_stages(backbone, model, PIXELS)


@pytest.mark.parametrize("boundaries", [["0", "0", "2", "0"], ["0", "2"]])
def test_boundaries_may_repeat(boundaries: list[str]) -> None:
    network = toy_network(stages=4)
    assert stage_model(network, boundaries, input_size=(3, SIZE, SIZE)).stage_names == ("0", "2")


def test_a_module_list_ends_where_its_last_called_member_does() -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList(
                nn.ModuleList([nn.Conv2d(a, b, 1), nn.Tanh(), nn.Conv2d(b, b, 1)]) for a, b in [(3, 4), (4, 6)]
            )
            self.head = nn.Linear(6, 4)

        def forward(self, images: Tensor) -> Any:
            stages: Any = self.stages
            for first, activation, _ in stages:
                images = activation(first(images))
            return self.head(images.mean((2, 3)))

    model = Lists().double().eval()
    backbone = stage_model(model, ["stages.0", "stages.1"], input_size=(3, SIZE, SIZE))
    assert_stages(backbone, model)
    assert backbone.stage_names == ("stages.0", "stages.1")
    carry = backbone.run(0, backbone.start(images := randn(2, 3, SIZE, SIZE, seed=1)))
    expected = model.stages[0][0](images).tanh().mean((2, 3))  # type: ignore[index]
    torch.testing.assert_close(backbone.pool(0, carry), expected)


# Encoders, and heads of one's own


class Encoder(nn.Module):
    """Returns feature maps, and no logits."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 7, 3, padding=1)

    def forward(self, images: Tensor) -> Any:
        return self.two(self.one(images))


@torch.no_grad()
def test_an_encoder_answers_with_its_pooled_features() -> None:
    model, images = Encoder().double().eval(), randn(2, 3, SIZE, SIZE, seed=2)
    backbone = stage_model(model, ["one", "two"], input_size=(3, SIZE, SIZE))
    assert torch.equal(backbone(images), model(images))
    carry = all_carries(backbone, images)[-1]
    torch.testing.assert_close(backbone.head(carry), model(images).mean((2, 3)))
    assert backbone.num_classes == 7


@torch.no_grad()
def test_an_encoder_takes_a_head() -> None:
    model, images, head = Encoder().double().eval(), randn(2, 3, SIZE, SIZE, seed=2), nn.Linear(7, 4).double()
    backbone = stage_model(model, ["one", "two"], head=head, input_size=(3, SIZE, SIZE))
    expected = head(model(images).mean((2, 3)))
    torch.testing.assert_close(backbone(images), expected)
    torch.testing.assert_close(backbone.head(all_carries(backbone, images)[-1]), expected)
    assert backbone.num_classes == 4
    assert {key.split(".")[0] for key in backbone.state_dict()} == {"model", "classifier"}
    assert FLOPsLookup.measure(backbone, SIZE).head == 7 * 4


# Glue that only a real run can follow


class Glue(Net):
    """Unpacks a closed module's tuple, tests for None, and branches on the shape."""

    class Parts(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x * 2, None, tuple(x.shape[2:])

    def __init__(self) -> None:
        super().__init__()
        self.parts = self.Parts()

    def between(self, x: Tensor) -> Tensor:
        x, mask, size = self.parts(x)
        if mask is not None:
            x = x * mask
        if x.ndim == 4 and x.shape[-1] % 4 == 0:
            x = x.reshape(len(size) * x.shape[0] // 2, 4, *size)
        return x


@torch.no_grad()
def test_glue_that_only_a_real_run_can_follow() -> None:
    model = Glue().double().eval()
    backbone = stage_model(model, ["one", "parts", "two"], input_size=(3, SIZE, SIZE))
    assert_stages(backbone, model)
    with pytest.raises(DynskipError, match=r"another path for images of this shape.*input_size"):
        backbone(randn(2, 3, SIZE + 1, SIZE + 1, seed=3))


def test_a_real_run_beside_the_trace_leaves_the_model_alone() -> None:
    class Normed(Glue):
        def between(self, x: Tensor) -> Tensor:
            self.last = x  # not what the tracer puts there
            return super().between(self.norm(x))

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.5))

    model = Normed().double().train()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    stage_model(model, ["one", "parts", "two"], input_size=(3, SIZE, SIZE))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert type(model.last) is Tensor


@torch.no_grad()
def test_an_operation_whose_result_is_ignored_still_happens() -> None:
    class InPlace(Net):
        def between(self, x: Tensor) -> Tensor:
            x = x.clone()
            x.mul_(3)  # looks dead to a tracer
            return x

    model = InPlace().double().eval()
    assert_stages(stage_model(model, ["one", "two"], input_size=(3, SIZE, SIZE)), model)


class Tables(Net):
    """Makes tensors on the device and in the type of a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(0, 1, SIZE), persistent=False)

    def between(self, x: Tensor) -> Tensor:
        table = self.get_buffer("table")
        return x * table + torch.arange(SIZE, device=table.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_what_the_trace_found_on_a_device_moves_with_the_model(dtype: torch.dtype) -> None:
    model = Tables().double().eval()
    backbone = stage_model(model, ["one", "two"], input_size=(3, SIZE, SIZE)).to(dtype)
    images = randn(2, 3, SIZE, SIZE, seed=1).to(dtype)
    assert torch.equal(backbone(images), model(images))
    ghost = copy.deepcopy(backbone).to("meta")
    assert ghost(images.to("meta")).device.type == "meta"


# Training


class Counting(nn.Module):
    """Counts how often it runs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.calls = layer, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "convnext_atto"])
def test_gradient_checkpointing_keeps_working(name: str, when: str) -> None:
    plain, model = (copy.deepcopy(timm_network(name, PIXELS, **MODELS[name], drop_path_rate=0.2)) for _ in range(2))
    blocks: Any = model.get_submodule({"test_vit": "blocks", "test_resnet": "layer2"}.get(name, "stages.1.blocks"))
    blocks[0] = block = Counting(blocks[0])
    if when == "before":
        model.set_grad_checkpointing()  # type: ignore[operator]
    backbone = stage_model(model.train(), input_size=(3, PIXELS, PIXELS))
    if when == "after":
        model.set_grad_checkpointing()  # type: ignore[operator]
    images, block.calls = photos(4, seed=3), 0
    for forward in (plain.train(), backbone):
        torch.manual_seed(1)
        forward(images).square().sum().backward()
    assert block.calls == 2, "checkpointed modules run once more in the backward pass"
    for expected, parameter in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)
    with torch.no_grad():
        backbone(images)
    assert block.calls == 3


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "swin_tiny_patch4_window7_224"])
def test_training_pass_and_gradients_equal_the_models(name: str) -> None:
    original = copy.deepcopy(timm_network(name, PIXELS, **MODELS[name], drop_rate=0.3, drop_path_rate=0.2)).train()
    backbone = stage_model(copy.deepcopy(original), input_size=(3, PIXELS, PIXELS))
    assert backbone.training
    assert backbone.model.training
    images = photos(4, seed=6)
    torch.manual_seed(3)
    expected = original(images)
    expected.square().sum().backward()
    torch.manual_seed(3)
    logits = backbone(images)
    logits.square().sum().backward()
    assert torch.equal(logits, expected)
    gradients = {key: p.grad for key, p in backbone.model.named_parameters()}
    for key, parameter in original.named_parameters():
        torch.testing.assert_close(gradients[key], parameter.grad, msg=key)
    for key, buffer in original.named_buffers():
        assert torch.equal(backbone.model.get_buffer(key), buffer), key


@pytest.mark.parametrize("training", [False, True])
def test_building_changes_neither_the_model_nor_the_random_state(training: bool) -> None:
    model = copy.deepcopy(timm_network("test_resnet", PIXELS, drop_rate=0.2)).train(training)
    model.get_submodule("layer1").eval()  # a frozen part stays as it is
    modes = [module.training for module in model.modules()]
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    stage_model(model, input_size=(3, PIXELS, PIXELS))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# The original module stays inside


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
@torch.no_grad()
def test_checkpoints_load_before_or_after_the_cut(name: str, assign: bool) -> None:
    checkpoint = enliven(copy.deepcopy(timm_network(name, PIXELS, **MODELS[name])), photos(4, seed=1), seed=8)
    images = photos(2, seed=7)
    expected = checkpoint(images)
    before = copy.deepcopy(timm_network(name, PIXELS, **MODELS[name]))
    before.load_state_dict(checkpoint.state_dict(), assign=assign)
    assert torch.equal(stage_model(before, input_size=(3, PIXELS, PIXELS))(images), expected)
    after = stage_model(copy.deepcopy(timm_network(name, PIXELS, **MODELS[name])), input_size=(3, PIXELS, PIXELS))
    assert not torch.allclose(after(images), expected)
    after.model.load_state_dict(checkpoint.state_dict(), assign=assign)  # class tokens and positions must not go stale
    assert torch.equal(after(images), expected)


@torch.no_grad()
def test_a_deep_copy_is_independent() -> None:
    backbone = staged("test_vit")
    images = photos(2, seed=7)
    expected = backbone(images)
    twin = copy.deepcopy(backbone)
    assert torch.equal(twin(images), expected)
    for parameter in twin.parameters():
        parameter.zero_()
    assert twin(images).abs().max() == 0
    assert torch.equal(backbone(images), expected)


# What cannot be cut


class ValueDependent(Net):
    def between(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class InnerValueDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = ValueDependent()

    def forward(self, images: Tensor) -> Any:
        return self.inner(images)


class Loop(Net):
    def between(self, x: Tensor) -> Tensor:
        return torch.stack([row * 2 for row in x])


class Closed(Net):
    """Returns what its last module does, which is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.LSTM(4, 4)  # type: ignore[assignment]


class Flat(Net):
    def forward(self, images: Tensor) -> Any:
        return self.two(self.one(images)).sum((1, 2, 3))


class BatchCentred(Net):
    def between(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class Noisy(Net):
    def between(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Twice(Net):
    def between(self, x: Tensor) -> Tensor:
        return self.two(x)  # type: ignore[no-any-return]


class Unread(Net):
    def between(self, x: Tensor) -> Tensor:
        self.spare(x)
        return x


class Pair(Net):
    def forward(self, images: Tensor) -> Any:
        x = self.two(self.one(images)).mean((2, 3))
        return self.head(x), x


class Rank5(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fold, self.unfold = nn.Unflatten(1, (2, 2)), nn.Flatten(1, 2)

    def between(self, x: Tensor) -> Tensor:
        return self.unfold(self.fold(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "boundaries", "telling"),
    [
        (Net, ["won", "two"], r"Net has no module 'won' to end a stage at\. Did you mean .*'one'"),
        (Net, ["something"], r"Net has no module 'something' .* Its children are \['one', 'two', 'spare', 'head'\]"),
        (Net, ["two", "one"], r"in the order in which the model runs; got \['two', 'one'\]"),
        (Net, [], "No boundaries were given"),
        (Net, None, r"Net does not say where its stages end \(no `feature_info`\).*children are \['one', 'two'"),
        (Net, ["one", "spare"], "'spare' is never called in the forward of Net"),
        (Twice, ["one", "two"], "'two' is called 2 times"),
        (Unread, ["one", "spare"], "'spare' returns is used by nothing after it"),
        (ValueDependent, ["one", "two"], r"traced: ValueDependent branches on tensor values.*stage_model\(\[stage_1"),
        (InnerValueDependent, ["inner.one", "inner.two"], "traced: inner branches on tensor values"),
        (Loop, ["one", "two"], "a Tensor is unpacked, and its number of parts may vary"),
        (BatchCentred, ["one", "two"], "Boundary 'two': the stage gives other values on a part of the batch"),
        (BatchCentred, ["two"], "Boundary 'two': the stage gives other values on a part of the batch"),
        (Noisy, ["one", "two"], "logits differ.*randomness in eval mode"),
        (Pair, ["one", "two"], "Pair returns a tuple, where one tensor was expected"),
        (Closed, ["one"], r"Closed returns a tuple, .*Wrap it in a module that returns the logits"),
        (Flat, ["one"], r"Flat returns a tensor of shape \(2,\), where one tensor was expected: \(B, K\) logits"),
        (Rank5, ["one", "fold"], r"tensor of shape \(2, 2, 2, 8, 8\); ranks 2 to 4 can be pooled"),
    ],
)
def test_cuts_that_cannot_be_made_say_why(model: type[Net], boundaries: list[str] | None, telling: str) -> None:
    with pytest.raises(DynskipError, match=telling):
        stage_model(model(), boundaries, input_size=(3, SIZE, SIZE))


def test_a_value_without_rows_cannot_cross() -> None:
    class Columns(Net):
        def forward(self, images: Tensor) -> Any:
            x = self.one(images)
            columns = x.flatten(1).transpose(0, 1)
            return self.head(self.two(x).mean((2, 3)) + columns.sum(0)[:, None])

    with pytest.raises(
        DynskipError, match=r"'two': a value that crosses it cannot be taken apart by sample \(\(256, 1\)"
    ):
        stage_model(Columns(), ["one", "two"], input_size=(3, SIZE, SIZE))


def test_a_head_that_mixes_samples_is_refused() -> None:
    class MixingHead(Net):
        def forward(self, images: Tensor) -> Any:
            return F.normalize(self.head(self.two(self.one(images)).mean((2, 3))), dim=0)

    with pytest.raises(
        DynskipError, match="Boundary 'two': the head after it gives other values on a part of the batch"
    ):
        stage_model(MixingHead(), ["one", "two"], input_size=(3, SIZE, SIZE))


def test_boundaries_inside_one_another_are_refused() -> None:
    with pytest.raises(DynskipError, match=r"'1.0' lies inside boundary '1'|inside"):
        stage_model(toy_network(), ["1", "1.0"], input_size=(3, SIZE, SIZE))


@pytest.mark.parametrize(
    ("call", "telling"),
    [
        (lambda: stage_model("resnet5O"), r"no model named 'resnet5O'\. Did you mean .*resnet50"),
        (lambda: stage_model("@@@"), r"no model named '@@@'\. timm.list_models"),
        (lambda: stage_model("resnet18.nope"), "nope"),
        (
            lambda: stage_model(toy_network(), num_classes=3),
            r"\['num_classes'\] are arguments for timm models made by name",
        ),
        (
            lambda: stage_model(Net(), ["one"], head=nn.Linear(5, 2)),
            "`head` cannot run on the 4 features that Net ends",
        ),
        (lambda: stage_model(Net(), ["one"], head=nn.Unflatten(1, (2, 2))), r"`head` must turn \(B, 4\) features into"),
        (lambda: stage_model(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3)))), "Sequential is scripted or frozen"),
        (
            lambda: stage_model(torch.jit.trace(toy_network().float(), torch.zeros(1, 3, SIZE, SIZE)), ["0"]),
            "Sequential is scripted or frozen by TorchScript.*Stage the Python module",
        ),
        (
            lambda: stage_model(nn.Sequential(torch.jit.script(toy_network().float()[:1]), nn.Flatten()), ["0.0"]),
            "^0 is scripted or frozen by TorchScript",
        ),
        (lambda: stage_model(torch.compile(Net()), ["one"]), r"already compiled as a whole.*model\._orig_mod"),  # type: ignore[arg-type]
        (
            lambda: stage_model("vit_tiny_patch16_224", input_size=(3, 64, 64)),
            r"refuses images of 3x64x64 \(AssertionError: .*Pass input_size=\(C, H, W\) that it takes.*img_size",
        ),
        (lambda: stage_model(Net(), ["one"], input_size=(1, 8, 8)), r"Net refuses images of 1x8x8 \(RuntimeError"),
        (lambda: stage_model([]), "sequence of modules ending in a head; got list with 0 modules"),
        (lambda: stage_model([nn.Identity()]), "got list with 1 modules"),
        (lambda: stage_model([nn.Identity(), 3]), "got list"),  # type: ignore[list-item]
        (lambda: stage_model(3), "got int"),  # type: ignore[arg-type]
        (
            lambda: stage_model("test_resnet", ["layer1", "layer4"], num_stages=2),
            "`num_stages` selects among the default boundaries",
        ),
        (lambda: stage_model("test_resnet", num_stages=6), "num_stages=6 is out of range: ResNet has 5 boundaries"),
        (lambda: stage_model("test_resnet", num_stages=0), "num_stages=0 is out of range"),
        (lambda: stage_model("test_vit", num_stages=0), "num_stages=0 is out of range"),
        (
            lambda: staged("test_resnet").start(torch.zeros(3, 64, 64)),
            r"shape \(3, 64, 64\) do not fit .*\(B, 3, H, W\)",
        ),
        (lambda: staged("test_resnet").start(torch.zeros(1, 4, 64, 64)), r"shape \(1, 4, 64, 64\) do not fit"),
    ],
)
def test_wrong_arguments_say_what_was_expected(call: Callable[[], Any], telling: str) -> None:
    with pytest.raises(DynskipError, match=telling):
        call()


def test_a_download_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, **kwargs: Any) -> nn.Module:
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        DynskipError, match=r"'resnet18' .*not known.*needs the network; without it, build with pretrained=False"
    ):
        stage_model("resnet18", pretrained=True)
