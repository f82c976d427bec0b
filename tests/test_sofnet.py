from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import toy_backbone, toy_video
from torch import Tensor, nn

from dynskip import DynskipError, EarlyTerminator, SoFLoss, StopOrForward, exponential_temperature, sofnet, stage_model
from dynskip.sofnet import Recipe

RESNET50_WIDTHS = [64, 256, 512, 1024, 2048]


def small(**options: Any) -> StopOrForward:
    return sofnet("test_resnet", num_classes=7, hidden=8, input_size=(3, 64, 64), **options)


def test_default_is_the_thesis_model() -> None:
    model = sofnet(num_classes=200, input_size=(3, 64, 64))
    assert model.backbone.stage_names == ("maxpool", "layer1", "layer2", "layer3", "layer4")
    assert model.backbone.num_classes == 200
    assert [gate.in_features for gate in model.gates] == RESNET50_WIDTHS
    assert {(gate.hidden_features, gate.temporal) for gate in model.gates} == {(512, "lstm")}
    assert model.inner is not None
    assert [inner.num_classes for inner in model.inner] == [200] * 5
    assert isinstance(model.terminator, EarlyTerminator)
    assert (model.terminator.threshold, model.terminator.min_frames) == (0.999, 3)
    assert model.state_update == "used"


def test_options_reach_the_parts() -> None:
    model = small(
        temporal=None, guidance=False, threshold=None, forward_bias=1.5, state_update="reached", drop_rate=0.25
    )
    assert model.inner is None
    assert model.terminator is None
    assert model.state_update == "reached"
    assert {gate.temporal for gate in model.gates} == {None}
    assert all(gate.decide.bias.tolist() == [0.0, 1.5] for gate in model.gates)
    backbone: Any = model.backbone.model
    assert backbone.drop_rate == 0.25
    terminator = small(threshold=0.9, min_frames=5).terminator
    assert terminator is not None
    assert (terminator.threshold, terminator.min_frames) == (0.9, 5)


def test_a_staged_backbone_is_taken_as_it_is() -> None:
    backbone = toy_backbone()
    model = sofnet(backbone, hidden=8)
    assert model.backbone is backbone
    assert len(model.gates) == 3
    # The new parts join the backbone where it is: its device and its type, double precision here.
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.eval()(toy_video()).logits.isfinite().all()


def test_training_steps_and_evaluation() -> None:
    torch.manual_seed(0)
    model, recipe = small(), Recipe(warmup_epochs=1, joint_epochs=2)
    video, targets = toy_video(2, 3, size=64, dtype=torch.float32), torch.tensor([1, 5])
    criterion = SoFLoss(model.lookup_for((64, 64)))
    optimiser = torch.optim.SGD(recipe.parameter_groups(model), recipe.lr, recipe.momentum)
    before = [gate.decide.weight.clone() for gate in model.gates]
    for epoch in range(recipe.epochs):
        model.train()
        model.temperature = recipe.temperature_at(epoch)
        output = model(video, dense=recipe.is_warmup(epoch))
        if recipe.is_warmup(epoch):
            loss = criterion.classification(output, targets)
        else:
            loss = criterion(output, targets).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        still = [torch.equal(gate.decide.weight, old) for gate, old in zip(model.gates, before, strict=True)]
        assert all(still) if recipe.is_warmup(epoch) else not any(still)
    output = model.eval()(video)
    assert output.logits.shape == (2, 7)
    assert output.logits.isfinite().all()


def test_recipe_is_the_thesis() -> None:
    recipe = Recipe()
    assert recipe.epochs == 75
    assert [recipe.is_warmup(epoch) for epoch in (0, 14, 15, 74)] == [True, True, False, False]
    # "divided by 10 after 30 epochs" of the joint training
    assert [recipe.lr_at(epoch) for epoch in (0, 15, 44)] == [1e-3] * 3
    assert [recipe.lr_at(epoch) for epoch in (45, 74)] == pytest.approx([1e-4] * 2)
    assert [recipe.temperature_at(epoch) for epoch in (0, 14, 15)] == [5.0] * 3
    assert recipe.temperature_at(25) == exponential_temperature(10)
    assert (recipe.momentum, recipe.weight_decay) == (0.9, 1e-5)


@pytest.mark.parametrize("guidance", [True, False])
def test_parameter_groups_hold_everything_once(guidance: bool) -> None:
    model = small(guidance=guidance)
    backbone, policy = Recipe(gate_lr_scale=3.0).parameter_groups(model)
    assert (backbone["name"], policy["name"]) == ("backbone", "policy")
    assert (backbone["lr_scale"], policy["lr_scale"]) == (1.0, 3.0)
    assert {id(p) for p in backbone["params"]} == {id(p) for p in model.backbone.parameters()}
    grouped = [id(p) for group in (backbone, policy) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize(
    ("call", "telling"),
    [
        (lambda: sofnet("resnet_50", num_classes=3), r"no model named 'resnet_50'\. Did you mean .*resnet50"),
        (
            lambda: sofnet(toy_backbone(), num_classes=9),
            r"head has 4 classes and num_classes=9\. Build the backbone with",
        ),
        (
            lambda: sofnet(toy_backbone(), pretrained=True),
            r"\['pretrained'\] are arguments for a backbone made by name",
        ),
        (lambda: small(threshold=1.5), "threshold 1.5 is no probability"),
        (lambda: small(temporal="gru"), "temporal='gru' is unknown"),
        (lambda: small(state_update="never"), "state_update='never' is unknown"),
        (lambda: sofnet(toy_backbone(), hidden=0), "hidden=0"),
    ],
)
def test_wrong_arguments_say_what_was_expected(call: Callable[[], Any], telling: str) -> None:
    with pytest.raises(DynskipError, match=telling):
        call()


@torch.no_grad()
def literal(model: Any, images: Tensor) -> Tensor:
    """Compute a ResNet's logits with the strides in the 1x1 convolutions, layer by layer."""

    def conv(layer: Any, norm: Any, x: Tensor, stride: int) -> Tensor:
        normed: Tensor = norm(nn.functional.conv2d(x, layer.weight, None, stride, layer.padding))
        return normed

    x = model.maxpool(model.bn1(model.conv1(images)).relu())
    for n, layer in enumerate((model.layer1, model.layer2, model.layer3, model.layer4)):
        for m, block in enumerate(layer):
            branch = conv(block.conv1, block.bn1, x, 2 if n > 0 and m == 0 else 1).relu()
            branch = conv(block.conv2, block.bn2, branch, 1).relu()
            branch = conv(block.conv3, block.bn3, branch, 1)
            x = (branch + (x if block.downsample is None else block.downsample(x))).relu()
    return model.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_resnet50_v1_has_its_strides_in_the_1x1_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images, plain = torch.randn(2, 3, 64, 64), timm.create_model("resnet50", num_classes=5, zero_init_last=False).eval()
    backbone = stage_model("resnet50_v1", num_classes=5, input_size=(3, 64, 64)).eval()
    backbone.model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), literal(plain, images), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(backbone(images), plain(images), atol=1e-2)
    model = sofnet(backbone, hidden=8).eval()
    again = StopOrForward.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert torch.equal(again(images[:, None]).logits, model(images[:, None]).logits)
    with pytest.raises(DynskipError, match="timm has no weights for resnet50_v1"):
        stage_model("resnet50_v1", pretrained=True)
