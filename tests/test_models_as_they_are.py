"""A model as its owner left it: for every row of the table in docs/models-as-they-are.md, what it says happens."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import re
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from helpers import SIZE, randn, timm_network, toy_model, toy_video
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from dynskip import DynskipError, FixedGate, PolicyGate, SoFLoss, StagedBackbone, StopOrForward, stage_model

SHAPE = (3, 64, 64)
TARGETS = torch.tensor([0, 1])
ROWS: dict[str, tuple[str, Callable[[], None]]] = {}


def row(name: str, outcome: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Take a test in as a row of the table."""

    def add(test: Callable[[], None]) -> Callable[[], None]:
        ROWS[name] = outcome, test
        return test

    return add


def images(batch: int = 2) -> Tensor:
    return randn(batch, *SHAPE, seed=1, dtype=torch.float32)


def network(name: str = "test_resnet") -> Any:
    return copy.deepcopy(timm_network(name, 64, **({"img_size": 64} if "vit" in name else {})))


def cut(model: Any, *boundaries: str) -> Any:
    return stage_model(model, list(boundaries) or None, input_size=SHAPE, verify=False).eval()


def wrapped(backbone: StagedBackbone) -> StopOrForward:
    gates = [PolicyGate(width, hidden=4).to(images().dtype) for width in backbone.num_features]
    return StopOrForward(backbone, gates).eval()


@torch.no_grad()
def assert_is_its_model(backbone: Any, x: Tensor | None = None) -> None:
    x = images() if x is None else x
    assert torch.equal(backbone(x), backbone.model(x))


def run(model: StopOrForward) -> Any:
    return model.eval()(images(4).unflatten(0, (2, 2)))


@contextmanager
def refused(telling: str) -> Iterator[None]:
    with pytest.raises(DynskipError, match=telling):
        yield


# Weights and layers


@row("`load_state_dict(assign=True)`", "works")
def assign() -> None:
    backbone = cut(network("test_vit"))
    backbone.model.load_state_dict({k: 1.1 * v for k, v in backbone.model.state_dict().items()}, assign=True)
    assert_is_its_model(backbone)


@row("weights tied or shared", "works")
def tied() -> None:
    model = network()
    model.layer3[0].conv2.weight = model.layer2[0].conv2.weight
    grads: list[Any] = []
    for each in (model, cut(model)):
        model.zero_grad()
        each(images()).sum().backward()
        grads.append(model.layer2[0].conv2.weight.grad.clone())
    torch.testing.assert_close(*grads)


class Adapted(nn.Module):
    """A layer with a low-rank adapter beside it, as PEFT puts it in the layer's place."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.base = layer.requires_grad_(False)
        if isinstance(layer, nn.Conv2d):
            self.down: nn.Module = nn.Conv2d(layer.in_channels, 2, 1, layer.stride)  # type: ignore[arg-type]
            self.up: nn.Module = nn.Conv2d(2, layer.out_channels, 1)
        else:
            self.down, self.up = nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)

    def forward(self, x: Tensor) -> Any:
        return self.base(x) + self.up(self.down(x))


@row("LoRA: layers replaced by adapters", "works")
def lora() -> None:
    model = wrapped(cut(network()))
    net: Any = model.backbone.model
    before, answer = run(model).macs, model.backbone(images())
    net.requires_grad_(False)
    net.layer2[0].conv1, net.fc = Adapted(net.layer2[0].conv1), Adapted(net.fc)
    assert_is_its_model(model.backbone.eval())
    assert not torch.equal(model.backbone(images()), answer)
    assert (run(model).macs > before).all()  # counted anew
    model.backbone(images()).sum().backward()
    assert {name.split(".")[-2] for name, p in net.named_parameters() if p.grad is not None} == {"down", "up"}


@row("LoRA: `peft.inject_adapter_in_model`", "works")
def peft_adapters() -> None:
    peft = pytest.importorskip("peft")
    backbone = cut(network("test_vit"))
    answer = backbone(images())
    settings = peft.LoraConfig(r=2, target_modules=["qkv", "proj", "fc1"], init_lora_weights=False)
    peft.inject_adapter_in_model(settings, backbone.model)
    assert_is_its_model(backbone.eval())
    assert not torch.equal(backbone(images()), answer)


@row("`torch.nn.utils.prune` in a stage", "works")
def pruned() -> None:
    backbone = cut(network())
    layer = backbone.model.layer2[0].conv1
    prune.l1_unstructured(layer, "weight", amount=0.5)
    assert_is_its_model(backbone)
    masked = backbone(images())
    prune.remove(layer, "weight")
    assert torch.equal(backbone(images()), masked)


@row("weight norm and spectral norm in a stage", "works")
def normed() -> None:
    backbone = cut(network())
    parametrizations.weight_norm(backbone.model.layer2[0].conv1)
    parametrizations.spectral_norm(backbone.model.fc)
    assert_is_its_model(backbone.eval())
    run(wrapped(backbone))


@row("pruned or normed gates", "works")
@torch.no_grad()
def gates() -> None:
    model = wrapped(cut(network()))
    gate: Any = model.gates[0]
    prune.l1_unstructured(gate.cell, "weight_hh", amount=0.5)
    parametrizations.weight_norm(gate.project)
    gate.cell.weight_hh_orig.mul_(3.0)  # what a training step changes: the weights in force follow in the next call
    gate.project.parametrizations.weight.original0.mul_(3.0)
    logits = run(model).gate_logits
    prune.remove(gate.cell, "weight_hh")
    parametrize.remove_parametrizations(gate.project, "weight")
    torch.testing.assert_close(run(model).gate_logits, logits, equal_nan=True)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@row("a parameter of an opened module pruned or parametrised", "error")
def opened_parameter() -> None:
    for change in (
        lambda model: prune.l1_unstructured(model, "pos_embed", amount=0.5),
        lambda model: parametrize.register_parametrization(model, "pos_embed", Twice()),
    ):
        backbone = cut(network("test_vit"))
        change(backbone.model)
        with refused("hooks on|changed after it was cut"):
            backbone(images())
        if parametrize.is_parametrized(backbone.model):
            assert_is_its_model(cut(backbone.model))


@row("`torch.ao.quantization.quantize_dynamic`", "works")
def quantised() -> None:
    model = wrapped(cut(network("test_vit")))
    model.backbone.model = torch.ao.quantization.quantize_dynamic(model.backbone.model, {nn.Linear})
    assert_is_its_model(model.backbone)
    with pytest.warns(UserWarning, match=r"unknown.*linear_dynamic"):
        assert run(model).macs.isnan().all()


@row("`torchao.quantization.quantize_`", "works")
def quantised_by_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = wrapped(cut(network("test_vit")))
    quantization.quantize_(model.backbone.model, quantization.Int8WeightOnlyConfig())
    assert_is_its_model(model.backbone)
    assert run(model).logits.isfinite().all()


# Code and settings


@row("drop rates changed after the cut", "error")
def drop_rates() -> None:
    backbone = cut(network())
    backbone.model.drop_rate = 0.5
    with refused("`drop_rate` of ResNet was 0.0 and is 0.5"):
        backbone(images())
    cut(backbone.model)(images())


@row("`reset_classifier`", "error")
def reset_classifier() -> None:
    model = wrapped(cut(network()))
    net: Any = model.backbone.model
    net.reset_classifier(7)
    with refused("the head gave 1000 values and gives 7"):
        run(model)
    assert cut(net).num_classes == 7


@row("an exchanged `forward`", "error")
def exchanged_forward() -> None:
    for name in ("forward", "forward_features"):
        backbone = cut(network())
        old = getattr(backbone.model, name)
        setattr(backbone.model, name, lambda x, old=old: 2 * old(x))
        with refused(rf"`{name}` of ResNet was ResNet\.{name} and is"):
            backbone(images())
    model = network()
    model.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), model)
    assert_is_its_model(cut(model))  # before the cut, it is what is cut


class Config:
    def __init__(self) -> None:
        self.scale, self.inner, self.unread = 1.5, types.SimpleNamespace(shift=0.5), 0


class Configured(nn.Module):
    """Reads settings from objects."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 4)
        self.config, self.list = Config(), [Config()]

    def forward(self, x: Tensor) -> Any:
        x = self.one(x) * self.config.scale + self.config.inner.shift
        return self.head(self.two(x).mean((2, 3)) * self.list[0].scale)


@row("a setting in a config object, such as `model.config.x`", "error")
def config() -> None:
    changes: dict[str, Callable[[Any], None]] = {
        "`config.scale` of Configured was 1.5 and is 2": lambda config: setattr(config, "scale", 2),
        "`config.inner.shift` of Configured was 0.5 and is 2": lambda config: setattr(config.inner, "shift", 2),
        "`config.inner.shift` of Configured was 0.5 and is None": lambda config: delattr(config, "inner"),
    }
    for telling, change in changes.items():
        backbone = cut(Configured(), "one", "two")
        backbone.model.config.unread = 1
        assert_is_its_model(pickle.loads(pickle.dumps(backbone)))
        change(backbone.model.config)
        with refused(telling):
            backbone(images())


@row("settings that code between the stages reads from objects in lists, or from outside the model", "not noticed")
def elsewhere() -> None:
    backbone = cut(Configured(), "one", "two")
    backbone.model.list[0].scale = 2
    assert not torch.equal(backbone(images()), backbone.model(images()))


# Hooks


def cam(model: Any, layer: nn.Module) -> Tensor:
    """Compute a Grad-CAM of the first class at a layer."""
    seen: dict[str, Any] = {}

    def keep(module: Any, inputs: Any, outputs: Any) -> None:
        seen["gradient"] = outputs[0]

    handles = [
        layer.register_forward_hook(lambda module, inputs, output: seen.update(features=output)),
        layer.register_full_backward_hook(keep),
    ]
    try:
        model(images())[:, 0].sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    weighted: Tensor = seen["gradient"].mean((2, 3), keepdim=True) * seen["features"]
    return weighted.sum(1).relu()


@row("hooks, such as Grad-CAM, on stages and on what is inside them", "works")
def hooks() -> None:
    backbone = cut(network())
    for name in ("layer4", "layer3", "layer2.0.conv1"):
        layer = backbone.model.get_submodule(name)
        torch.testing.assert_close(cam(backbone, layer), cam(backbone.model, layer))


@row("hooks, such as Grad-CAM, on an opened module", "error")
def hooks_on_opened() -> None:
    backbone = cut(network(), "layer1", "layer2.0")
    with refused("hooks on 'layer2', which would never run"):
        cam(backbone, backbone.model.layer2)
    assert cam(backbone, backbone.model.layer2[0]).shape == (2, 8, 8)


# Copies and processes


@row("`copy.deepcopy`", "works")
def copied() -> None:
    model = wrapped(cut(network()))
    again: Any = copy.deepcopy(model)
    assert torch.equal(run(again).logits, run(model).logits)
    with torch.no_grad():
        again.backbone.model.fc.bias.add_(1.0)
    assert not torch.equal(run(again).logits, run(model).logits)
    assert_is_its_model(again.backbone)


@row("pickle, `torch.save` of the whole model", "works")
def pickled() -> None:
    model = wrapped(cut(network("test_vit")))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(run(again).logits, run(model).logits)
        assert_is_its_model(again.backbone)


def answer_to(path: Path, model: StopOrForward, video: Tensor) -> None:
    torch.save(model(video).logits, path)


@row("`multiprocessing` with spawn", "works")
def spawned() -> None:
    model, video, path = toy_model(), toy_video(), Path("answer")
    process = multiprocessing.get_context("spawn").Process(target=answer_to, args=(path, model, video))
    process.start()
    process.join()
    assert torch.equal(torch.load(path), model(video).logits)


def train(model: Any) -> tuple[Tensor, list[Tensor]]:
    loss = SoFLoss(toy_model(seed=2).lookup_for((SIZE, SIZE)))
    torch.manual_seed(0)
    total = loss(model.train()(toy_video(2, 3)), TARGETS).total
    total.backward()
    grads = [p.grad for p in model.parameters()]
    return total.detach(), [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]


@contextmanager
def process_group() -> Iterator[None]:
    if not dist.is_available():
        pytest.skip("torch is built without torch.distributed")
    dist.init_process_group("gloo", init_method=f"file://{Path('rendezvous').absolute()}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@row("DistributedDataParallel, also with `static_graph=True`", "works")
def ddp() -> None:
    expected = train(toy_model(seed=2))
    with process_group():
        for static in (False, True):
            model = nn.parallel.DistributedDataParallel(toy_model(seed=2), static_graph=static)
            torch.testing.assert_close(train(model), expected, rtol=0, atol=0)


@row("FSDP (`fully_shard`) on stages, backbone and wrapper", "works")
def fsdp() -> None:
    expected = train(toy_model(seed=2))
    plain = toy_model(seed=2)
    with process_group():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh("cpu", (1,))
        model: Any = toy_model(seed=2)
        for part in (*model.backbone.model, model.backbone, model):
            fully_shard(part, mesh=mesh)
        torch.testing.assert_close(train(model), expected)
        register_fsdp_forward_method(model, "run_clip")
        for way in (model.eval(), model.run_clip):
            assert torch.equal(way(toy_video(2, 3)).logits, plain(toy_video(2, 3)).logits)


@row("FSDP (`fully_shard`) on `backbone.model`", "error")
def fsdp_on_opened() -> None:
    with process_group():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model: Any = toy_model(seed=2)
        fully_shard(model.backbone.model, mesh=init_device_mesh("cpu", (1,)))
        with refused("hooks on"):
            model(toy_video(2, 3))


# Compilers and transforms


def needs_torch_2_15() -> None:
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15):
        pytest.skip("torch 2.8 cannot do this, and versions between it and 2.15 have not been tried")


@row("`torch.func` on the backbone", "works")
def func() -> None:
    backbone, x = cut(network()), images(3)
    weights = dict(backbone.named_parameters())

    def loss(weights: Any, image: Tensor) -> Any:
        return torch.func.functional_call(backbone, weights, (image[None],)).sum()

    one_by_one = [torch.func.grad(loss)(weights, image) for image in x]
    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for name, grads in together.items():
        torch.testing.assert_close(grads, torch.stack([each[name] for each in one_by_one]), rtol=1e-3, atol=1e-3)


@row("`functional_call` and `torch.func.grad` on the wrapper in training", "works")
def func_in_training() -> None:
    needs_torch_2_15()
    model, video = toy_model().train(), toy_video()

    def loss(video: Tensor) -> Any:
        torch.manual_seed(0)
        return torch.func.functional_call(model, dict(model.named_parameters()), (video,)).logits.sum()

    again = video.clone().requires_grad_()
    loss(again).backward()
    torch.testing.assert_close(torch.func.grad(loss)(video), again.grad)


@row("`vmap` on the wrapper; `torch.func.grad` on it in evaluation", "error")
def func_refused() -> None:
    model, video = toy_model(), toy_video()
    for mode in (True, False):
        model.train(mode)
        with refused("vmap cannot follow decisions"):
            torch.func.vmap(lambda v: model(v[None]).logits)(video)
    with refused(r"has no gradients. Call `model.train\(\)`"):
        torch.func.grad(lambda v: model(v).logits.sum())(video)


@row("`torch.export`, `torch.jit.trace` on the backbone", "works")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def exported() -> None:
    backbone = cut(network())
    torch.testing.assert_close(torch.export.export(backbone, (images(),)).module()(images()), backbone(images()))
    torch.testing.assert_close(torch.jit.trace(backbone, images())(images()), backbone(images()))


@row("`torch.export`, `torch.jit.trace` on the wrapper; `torch.jit.script`", "error")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def exported_whole() -> None:
    model, video = toy_model(), toy_video()
    for mode in (True, False):
        for export in (torch.export.export, torch.jit.trace):
            with refused("one graph cannot hold the model"):
                export(model.train(mode), (video,))
    for part in (model, model.backbone):
        with refused("torch.jit.script cannot read"):
            torch.jit.script(part)


@row("`torch.compile` of the wrapper in training, or of the backbone", "works")
def compiled() -> None:
    needs_torch_2_15()
    model, video = toy_model(stages=1).train(), toy_video(1, 2)
    answers = []
    for each in (model, torch.compile(model, backend="eager")):
        torch.manual_seed(0)
        answers.append(each(video).logits)
    torch.testing.assert_close(*answers)
    torch.testing.assert_close(torch.compile(model.backbone, backend="eager")(video[0]), model.backbone(video[0]))


# Memory


@row("a model in channels-last memory", "works")
def channels_last() -> None:
    backbone = cut(network().to(memory_format=torch.channels_last))
    assert_is_its_model(backbone)
    expected = run(wrapped(backbone)).logits
    assert expected.isfinite().all()


@row("half precision, before or after the cut", "works")
def half() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        for backbone in (cut(network().to(dtype)), cut(network()).to(dtype)):
            assert_is_its_model(backbone, images().to(dtype))
    model = wrapped(cut(network())).bfloat16()
    assert model(images()[:, None].bfloat16()).logits.dtype == torch.bfloat16


class Table(nn.Module):
    """Makes a table between its stages."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.one(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None]
        return self.head(self.two(x).mean((2, 3)))


@row('`.to("meta")` and `.to_empty` after the cut', "works")
def emptied() -> None:
    for backbone in (cut(network()), cut(Table(), "one", "two")):
        expected, weights = backbone(images()), copy.deepcopy(backbone.state_dict())
        model = StopOrForward(backbone, [FixedGate() for _ in backbone.num_features])
        backbone.to("meta")
        with refused("on the meta device and has no values"):
            run(model)
        backbone.to_empty(device="cpu").load_state_dict(weights)
        assert torch.equal(backbone(images()), expected)


@row("cutting a model on the meta device, with `verify=False`", "works")
def cut_on_meta() -> None:
    with torch.device("meta"):
        model = timm.create_model("test_resnet")
    backbone = cut(model)
    backbone.to_empty(device="cpu").model.load_state_dict(network().state_dict())
    assert_is_its_model(backbone.eval())


@row("cutting a model on the meta device and comparing it", "error")
def compared_on_meta() -> None:
    with torch.device("meta"):
        model = timm.create_model("test_resnet")
    with refused("on the meta device.*verify=False"):
        stage_model(model, input_size=SHAPE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*deprecated:UserWarning")
@pytest.mark.parametrize("name", ROWS)
def test_row(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ROWS[name][1]()


def test_the_table_in_the_docs_has_these_rows() -> None:
    page = (Path(__file__).parents[1] / "docs" / "models-as-they-are.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (works|error|not noticed) \|", page, re.MULTILINE)
    assert dict(rows) == {name: outcome for name, (outcome, _) in ROWS.items()}
