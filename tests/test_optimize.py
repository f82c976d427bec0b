from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import (
    SIZE,
    assert_same,
    balance,
    crossings_backbone,
    randn,
    random_gates,
    timm_network,
    toy_model,
    toy_video,
)
from torch import Tensor, nn

from dynskip import DynskipError, EarlyTerminator, StopOrForward, stage_model
from dynskip.runtime.optimize import compare, fold

NORMS = nn.modules.batchnorm._BatchNorm


def norms_in(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, NORMS)]


def real_model(name: str, size: int = 64) -> tuple[StopOrForward, Tensor]:
    options = {"img_size": size} if "vit" in name and name.startswith("test") else {}
    backbone = stage_model(copy.deepcopy(timm_network(name, size, **options)), input_size=(3, size, size))
    gates = [gate.float() for gate in random_gates(backbone.num_features, seed=1)]
    video = toy_video(4, 6, size=size, seed=3, dtype=torch.float32)
    model = StopOrForward(backbone, gates, terminator=EarlyTerminator(0.9, 2)).eval()
    return balance(model, video, share=0.8), video


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_folding_keeps_the_decisions_and_the_plain_model(name: str) -> None:
    model, video = real_model(name)
    before, output = copy.deepcopy(model.state_dict()), model.run_clip(video, window=3)
    fast, agreement = model.optimize(video, compile=False)
    assert norms_in(model)
    assert not norms_in(fast)
    assert agreement.decisions == agreement.predictions == 1.0
    assert agreement.clips == 4
    assert agreement.macs == agreement.original_macs == output.macs.mean()
    assert agreement.probability_gap < 1e-4
    assert len(output.stopped_at.unique()) > 3
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert_same(model.run_clip(video, window=3), output, exact=True)


class Named(StopOrForward):
    """A user's class, with something of its own."""

    place = "the back door"


NAMES = [f"class {n}" for n in range(1000)]


def test_the_fast_copy_keeps_what_the_model_is_set_to() -> None:
    plain, video = real_model("test_resnet")
    model = Named(plain.backbone, list(plain.gates), forward_threshold=0.4, state_update="reached").eval()
    model.class_names, model.preprocessing, model.temperature = NAMES, {"mean": (0.5, 0.5, 0.5)}, 2.5
    model.place = "the front door"
    fast, _ = model.optimize(video, compile=False)
    assert isinstance(fast, Named)
    assert (fast.place, fast.temperature, fast.forward_threshold) == ("the front door", 2.5, model.forward_threshold)
    assert (fast.class_names, fast.preprocessing, fast.state_update) == (NAMES, model.preprocessing, "reached")
    assert not any(p.requires_grad for p in fast.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert not {id(p) for p in fast.parameters()} & {id(p) for p in model.parameters()}


class Entangled(nn.Module):
    """One BatchNorm that can be folded, one whose convolution is read twice, and one that stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.bn3 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        y = self.conv2(x)
        x = self.bn3(torch.relu(self.bn2(y) + y))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_folding_is_undone_where_it_changes_the_logits() -> None:
    network = Entangled().eval()
    for n, norm in enumerate(part for part in network.modules() if isinstance(part, nn.BatchNorm2d)):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(randn(6, seed=n))
        norm.running_var.copy_(randn(6, seed=n + 9).exp())
    backbone = stage_model(network, ["bn1", "bn3"], input_size=(3, SIZE, SIZE))
    images = randn(3, 3, SIZE, SIZE, seed=0, dtype=torch.float32)
    folded = fold(backbone, images)
    torch.testing.assert_close(folded(images), backbone(images), rtol=1e-4, atol=1e-5)
    assert norms_in(folded.model) == ["bn2", "bn3"]


@torch.no_grad()
def assert_nothing_compiles(fast: StopOrForward, size: int, dtype: torch.dtype) -> None:
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (1, 2, 3, 6, 15, 16, 33, 1):
            fast.backbone(randn(batch, 3, size, size, seed=batch, dtype=dtype))
        for seed in range(3):
            fast(toy_video(5, 6, seed, size, dtype))
        strided = toy_video(2, 3, 7, size, dtype).permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        fast(strided)
        with torch.enable_grad():
            fast.encode(strided)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_nothing_compiles_after_warm_up(name: str) -> None:
    model, video = real_model(name)
    fast, agreement = model.optimize(video, backend="eager")
    assert agreement.decisions == 1.0
    assert_nothing_compiles(fast, 64, torch.float32)


@pytest.mark.parametrize("buckets", [None, (1, 4)])
def test_values_of_every_kind_cross_compiled_stages(buckets: tuple[int, ...] | None) -> None:
    backbone = crossings_backbone()
    gates = [gate.float() for gate in random_gates(backbone.num_features, seed=1)]
    video = toy_video(4, 6, dtype=torch.float32)
    model = balance(StopOrForward(backbone, gates).eval(), video, share=0.7)
    fast, agreement = model.optimize(video, backend="eager", buckets=buckets)
    assert agreement.decisions == 1.0
    assert_nothing_compiles(fast, SIZE, torch.float32)


@pytest.mark.parametrize("buckets", [(1, 4), (4, 2)])
def test_buckets_compile_their_sizes_alone(buckets: tuple[int, ...]) -> None:
    sizes: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def call(*args: Any) -> Any:
            sizes.extend(a.shape[0] for a in args if a.ndim == 4 and a.shape[-1] == SIZE)
            return graph(*args)

        return call

    model, video = toy_model(seed=3), toy_video(5, 6, seed=4)
    fast, agreement = model.optimize(video, buckets=buckets, backend=backend)
    assert agreement.decisions == 1.0
    assert agreement.probability_gap < 1e-8
    assert_nothing_compiles(fast, SIZE, torch.float64)
    assert set(sizes) == set(buckets)


def test_inductor_gives_the_same_decisions() -> None:
    model, video = toy_model(seed=3, stages=2, terminator=EarlyTerminator(0.9, 2)).float(), toy_video(5, 6).float()
    fast, agreement = model.optimize(video)
    assert agreement.decisions == 1.0
    assert_same(fast(video), model(video), skip=["logits", "frame_logits", "gate_logits"])
    assert_nothing_compiles(fast, SIZE, torch.float32)


def test_half_precision_is_compared_with_the_plain_model() -> None:
    model, video = real_model("test_resnet")
    fast, agreement = model.optimize(video, compile=False, dtype=torch.bfloat16)
    assert fast(video.bfloat16()).logits.dtype == torch.bfloat16
    assert 0 < agreement.probability_gap < 1
    with pytest.raises(DynskipError, match="bfloat16"):
        fast(video)


def test_agreement_counts_what_differs() -> None:
    model, video = toy_model(seed=3), toy_video(4, 5)
    other = copy.deepcopy(model)
    other.forward_threshold = (1.0, *model.forward_threshold[1:])
    first, second = model(video), other(video)
    agreement = compare(model, other, video)
    assert agreement.decisions == (first.stopped_at == second.stopped_at).double().mean() < 1
    assert agreement.predictions == (first.logits.argmax(1) == second.logits.argmax(1)).double().mean()
    assert agreement.probability_gap == (first.probabilities - second.probabilities).abs().max() > 0
    assert agreement.original_macs == first.macs.mean() > agreement.macs == second.macs.mean()
    assert f"{agreement.decisions:.2%}" in str(agreement)


def test_optimised_for_one_image_size() -> None:
    fast, _ = toy_model(seed=3).optimize(toy_video(), compile=False)
    with pytest.raises(DynskipError, match="made for frames of 8x8"):
        fast(toy_video(size=10))


def test_what_cannot_be_optimised_is_refused() -> None:
    model, video = toy_model(), toy_video()
    with pytest.raises(DynskipError, match="no batch sizes"):
        model.optimize(video, buckets=(0, 2))
    with pytest.raises(DynskipError, match="no batch sizes"):
        model.optimize(video, buckets=())
    with pytest.raises(DynskipError, match="NaN"):
        model.optimize(video * torch.nan)
    with pytest.raises(DynskipError, match="eval mode"):
        model.train().optimize(video)
