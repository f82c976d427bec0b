"""What a cut is while it is made and afterwards: pickled, made beside other threads, told of changes and of hooks."""

from __future__ import annotations

import collections
import copy
import functools
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import SIZE, randn, random_gates, timm_network, toy_model, toy_video
from torch import Tensor, nn
from torch.nn.utils import prune

from dynskip import DynskipError, FixedGate, RandomGate, StagedBackbone, StopOrForward, stage_model

SHAPE = (3, 64, 64)


def images(batch: int = 2) -> Tensor:
    return randn(batch, *SHAPE, seed=1, dtype=torch.float32)


def resnet(**kwargs: Any) -> StagedBackbone:
    return stage_model(copy.deepcopy(timm_network("test_resnet", 64)), input_size=SHAPE, **kwargs).eval()


def assert_is_its_model(backbone: StagedBackbone) -> None:
    with torch.no_grad():
        assert torch.equal(backbone(images()), backbone.model(images()))


# Pickled


def through_torch(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), through_torch, copy.deepcopy])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "twins_svt_small", "toy"])
def test_a_pickled_model_answers_the_same(name: str, copied: Callable[[Any], Any]) -> None:
    model, video = toy_model(), toy_video()
    if name != "toy":  # glue of all kinds: constants, tuples, helpers of timm's that are called by name
        kwargs = {} if name == "test_resnet" else {"img_size": 64}
        backbone = stage_model(copy.deepcopy(timm_network(name, 64, **kwargs, drop_rate=0.1)), input_size=SHAPE)
        gates = [gate.float() for gate in random_gates(backbone.num_features, seed=1)]
        model, video = StopOrForward(backbone, gates).eval(), toy_video(2, 3, size=64, dtype=torch.float32)
    again = copied(model)
    assert torch.equal(again(video).logits, model(video).logits)
    torch.manual_seed(0)
    expected = model.train()(video).logits
    torch.manual_seed(0)
    assert torch.equal(again.train()(video).logits, expected)


def test_an_optimised_model_is_pickled_without_what_was_compiled() -> None:
    model, video = toy_model(), toy_video()
    fast, _ = model.optimize(video, backend="eager")
    again = pickle.loads(pickle.dumps(fast))
    torch.testing.assert_close(again(video).logits, fast(video).logits)


@pytest.mark.parametrize("gate", ["policy", "fixed", "random"])
def test_a_pickled_session_goes_on(gate: str) -> None:
    model, video = toy_model(), toy_video(1)
    if gate != "policy":
        gates = [FixedGate() if gate == "fixed" else RandomGate(width, 0.5) for width in model.backbone.num_features]
        model = StopOrForward(model.backbone, gates).eval()
    session = model.stream()
    session(video[0, 0])
    again = pickle.loads(pickle.dumps(session))
    for each in (session, again):
        torch.manual_seed(0)
        each(video[0, 1])
    assert torch.equal(again.result().logits, session.result().logits)


# Beside other threads


def test_models_are_cut_beside_one_another_and_beside_one_that_serves() -> None:
    serving, plain = resnet(), torch.nn.Module.__call__
    faults: list[BaseException] = []
    counts: collections.Counter[str] = collections.Counter()
    stop = threading.Event()

    def repeat(what: str, run: Callable[[], Any], times: int | None) -> None:
        while not stop.is_set() if times is None else counts[what] < times:
            counts[what] += 1
            try:
                run()
            except BaseException as error:
                faults.append(error)
                return

    server = threading.Thread(target=repeat, args=("serve", functools.partial(assert_is_its_model, serving), None))
    sized: dict[str, dict[str, Any]] = {"test_resnet": {}, "test_convnext": {}, "test_vit": {"img_size": 64}}
    cutters = []
    for name, kwargs in sized.items():
        cut = functools.partial(stage_model, name, input_size=SHAPE, **kwargs)
        cutters.append(threading.Thread(target=repeat, args=(name, cut, 5)))
    server.start()
    for thread in cutters:
        thread.start()
    for thread in cutters:
        thread.join()
    stop.set()
    server.join()
    assert not faults
    assert counts["serve"] > 1
    assert torch.nn.Module.__call__ is plain
    assert nn.Linear(2, 2)(torch.zeros(1, 2)).shape == (1, 2)


class Drawing(nn.Module):
    """Draws numbers in training, where it cannot run on the meta device and is traced beside a real run."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = (
            nn.Conv2d(3, 4, 3),
            nn.Sequential(nn.Conv2d(4, 4, 3), nn.Dropout()),
            nn.Linear(4, 4),
        )
        self.shift = torch.ones(4, 1, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.dropout(self.one(x + 1 if x.shape[-1] % 2 == 0 else x), 0.5, self.training) + self.shift
        x = x * torch.rand_like(x) if self.training else x
        return self.head(self.two(x).mean((2, 3)))


@pytest.fixture
def drawing() -> Callable[[], Any]:
    model = Drawing()

    def cut() -> None:
        backbone = stage_model(model, ["one", "two"], input_size=SHAPE)
        StopOrForward(backbone, [FixedGate(), FixedGate()]).lookup_for(SHAPE[1:])

    return cut


def test_a_cut_touches_no_random_state(drawing: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    monkeypatch.setattr(torch.random, "fork_rng", pytest.fail)
    drawing()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cut_in_another_thread_repeats_no_random_numbers(drawing: Callable[[], Any]) -> None:
    drawn: list[float] = []
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            drawn.append(float(torch.rand((), dtype=torch.float64)))

    thread = threading.Thread(target=draw)
    thread.start()
    for _ in range(3):
        drawing()
    stop.set()
    thread.join()
    assert len(set(drawn)) == len(drawn) > 0


# Changed after the cut


class Settings(nn.Module):
    """Reads settings of its own, of a child, and of containers."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.drop, self.options, self.extra = nn.Dropout(0.5), {"shift": [0.5, 1]}, None
        self.layers = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Identity())
        self.head, self.unread, self.calls = nn.Linear(4, 4), 3, 0

    def forward(self, x: Tensor) -> Any:
        x = self.one(x) * self.scale + self.options["shift"][0]
        x = F.dropout(self.layers(self.two(x)), self.drop.p, self.training)
        if self.extra is not None:
            x = self.extra(x)
        return self.head(x.mean((2, 3)))


class Branching(Settings):
    """Can only be traced with a real run beside it."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x + 1 if x.shape[-1] % 2 == 0 else x)


def settings_backbone(kind: type[Settings] = Settings) -> Any:
    return stage_model(kind(), ["one", "layers.0"], input_size=(3, SIZE, SIZE)).eval()


def frames(backbone: StagedBackbone) -> Tensor:
    return randn(2, *backbone.input_size, seed=1, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        (lambda m: setattr(m, "scale", 2.0), r"`scale` of \w+ was 1.0 and is 2.0"),
        (lambda m: setattr(m.drop, "p", 0.1), "`p` of 'drop' was 0.5 and is 0.1"),
        (lambda m: m.options["shift"].__setitem__(0, 2), "`options` of"),
        (lambda m: setattr(m, "extra", torch.tanh), r"`extra` of \w+ was None"),
        (lambda m: setattr(m, "extra", nn.Tanh()), "`extra`|has .*'extra'"),
        (lambda m: m.layers.append(nn.Tanh()), r"'layers' had the layers \['0', '1'\] and has \['0', '1', '2'\]"),
        (lambda m: m.layers.insert(0, nn.Tanh()), "'layers' had the layers"),
        (lambda m: m.layers.pop(1), "'layers' had the layers"),
        (lambda m: setattr(m, "layers", m.layers[:1]), "'layers' had the layers"),
        (lambda m: setattr(m, "drop", nn.Identity()), "`p` of 'drop' was 0.5 and is None"),
        (lambda m: m.__delattr__("layers"), "'layers' is gone|had the layers"),
        (lambda m: setattr(m, "head", nn.Linear(4, 7)), "the head gave 4 values and gives 7"),
        (lambda m: m.layers.__setitem__(0, nn.Conv2d(4, 5, 1)), "stage 'layers.0' gave 4 values and gives 5"),
    ],
)
def test_a_change_after_the_cut_is_noticed(change: Callable[[Any], Any], telling: str) -> None:
    backbone = settings_backbone()
    again = pickle.loads(pickle.dumps(backbone))
    for model in (backbone, copy.deepcopy(backbone), again, settings_backbone(Branching)):
        change(model.model)
        with pytest.raises(
            DynskipError, match=rf"changed after it was cut: .*({telling}).*stage_model\(backbone.model"
        ):
            wrapped(model)(frames(model)[:, None])


def wrapped(backbone: StagedBackbone) -> StopOrForward:
    return StopOrForward(backbone, [FixedGate() for _ in backbone.num_features]).eval()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "unread", 4),
        lambda m: setattr(m.layers, "0", nn.Conv2d(4, 4, 1)),
        lambda m: m.layers.__setitem__(1, nn.Tanh()),
        lambda m: setattr(m, "head", nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 4))),
        lambda m: m.one.register_forward_hook(lambda module, inputs, output: output * 2),
        lambda m: prune.l1_unstructured(m.two, "weight", amount=0.5),
        lambda m: m.load_state_dict(Settings().state_dict(), assign=True),
        lambda m: m.requires_grad_(False),
        lambda m: m.two.compile(backend="eager"),
        lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, inplace=True),
    ],
)
@torch.no_grad()
def test_a_change_that_stages_follow_is_allowed(change: Callable[[Any], Any]) -> None:
    backbone = settings_backbone()
    change(backbone.model)
    assert torch.equal(backbone(frames(backbone)), backbone.model(frames(backbone)))


@pytest.mark.parametrize("mode", [True, False])
def test_a_changed_timm_model_is_noticed_in_both_modes(mode: bool) -> None:
    vit: Any = stage_model(copy.deepcopy(timm_network("test_vit", 64, img_size=64)), input_size=SHAPE)
    vit.model.reset_classifier(7, global_pool="avg")
    dropping: Any = resnet()
    dropping.model.drop_rate = 0.9
    other_head: Any = resnet()
    other_head.model.reset_classifier(7)
    for backbone in (vit, dropping, other_head):
        with pytest.raises(DynskipError, match="changed after it was cut"):
            wrapped(backbone).train(mode)(images()[:, None])
        assert_is_its_model(stage_model(backbone.model, input_size=SHAPE).eval())


@pytest.mark.parametrize("close", [torch.jit.script, lambda layer: torch.compile(layer, backend="eager")])
@torch.no_grad()
def test_compiled_modules_may_lie_inside_a_stage(close: Callable[[Any], Any]) -> None:
    model = Settings()
    model.two = close(model.two)
    backbone = stage_model(model, ["one", "layers.0"], input_size=(3, SIZE, SIZE)).eval()
    assert torch.equal(backbone(frames(backbone)), model(frames(backbone)))


# Hooks

HOOKS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("register", [*HOOKS, "register_full_backward_pre_hook"])
@pytest.mark.parametrize("name", ["", "layer2"])
def test_hooks_on_opened_modules_are_refused(name: str, register: str, when: str) -> None:
    model = copy.deepcopy(timm_network("test_resnet", 64))
    stage = functools.partial(stage_model, model, ["layer1", "layer2.0"], input_size=SHAPE)
    backbone = stage() if when == "after" else None
    seen: list[Any] = []
    handle = getattr(model.get_submodule(name), register)(lambda *args: seen.append(args))
    with pytest.raises(DynskipError, match=r"hooks on .*hold a boundary: the ResNet itself, 'layer2'"):
        stage() if backbone is None else backbone(images())
    handle.remove()
    assert not any(isinstance(value, torch.fx.Proxy) for args in seen for value in args)
    assert_is_its_model(backbone or stage())


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_on_all_other_modules_fire(register: str) -> None:
    backbone = resnet()
    seen = []
    for name in ("conv1", "layer2", "layer3.0.conv1", "fc"):
        getattr(backbone.model.get_submodule(name), register)(lambda *_, name=name: seen.append(name))
    backbone(images().requires_grad_()).sum().backward()
    assert sorted(seen) == ["conv1", "fc", "layer2", "layer3.0.conv1"]


# Modules that come twice


@pytest.mark.parametrize("container", [list, lambda parts: nn.Sequential(*parts)])
@pytest.mark.parametrize("order", ["abbh", "abab", "aabh", "abbb"])
def test_one_module_may_be_several_stages(order: str, container: Callable[[Any], Any]) -> None:
    parts = {"a": nn.Conv2d(3, 3, 3, padding=1), "b": nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())}
    parts["h"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    modules = [parts[letter] for letter in order]
    backbone = stage_model(container(modules), input_size=(3, SIZE, SIZE)).eval()
    assert backbone.num_stages == len(order) - 1
    with torch.no_grad():
        assert torch.equal(backbone(frames(backbone)), nn.Sequential(*modules)(frames(backbone)))
    assert {id(p) for p in backbone.parameters()} == {id(p) for part in modules for p in part.parameters()}


# Samples that depend on one another


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1), nn.Linear(6, 3)

    def before(self, x: Tensor) -> Tensor:
        return x

    def after(self, x: Tensor, images: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Any:
        return self.after(self.head(self.two(self.one(self.before(x))).mean((2, 3))), x)


BATCH_WIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "brightest": lambda x: x.abs().amax(),
    "range": lambda x: x.amax() - x.amin(),
    "spread": lambda x: x.std(),
    "spread of channels": lambda x: x.std((0, 2, 3), keepdim=True).mean(),
    "first": lambda x: x[:1].mean(),
    "sum": lambda x: x.mean((0, 2, 3)).sum(),
}


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("value", BATCH_WIDE)
def test_values_of_the_whole_batch_are_refused(value: str, where: str) -> None:
    class Mixing(Net):
        def before(self, x: Tensor) -> Tensor:
            return x / BATCH_WIDE[value](x) if where == "before" else x

        def after(self, x: Tensor, images: Tensor) -> Tensor:
            return x * BATCH_WIDE[value](images) if where == "after" else x

    # `after`: the value is read by the head alone, of images that cross all boundaries, or is made in stage 0.
    with pytest.raises(DynskipError, match="other values on a part of the batch"):
        stage_model(Mixing(), ["one", "two"], input_size=(3, SIZE, SIZE))


@pytest.mark.parametrize("value", BATCH_WIDE)
def test_a_value_that_crosses_and_is_not_of_a_sample_is_refused(value: str) -> None:
    class Crossing(Net):
        def forward(self, x: Tensor) -> Any:
            scale = BATCH_WIDE[value](x)
            return super().forward(x) * scale

    with pytest.raises(DynskipError, match="Boundary 'one': the stage gives other values on a part of the batch"):
        stage_model(Crossing(), ["one", "two"], input_size=(3, SIZE, SIZE))
    assert stage_model(Crossing(), ["one", "two"], input_size=(3, SIZE, SIZE), verify=False).num_stages == 2


@pytest.mark.parametrize("where", ["one", "two", "head", "act"])
def test_random_numbers_in_eval_mode_are_refused(where: str) -> None:
    class Drawing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)  # two dropouts of three logits are equal one time in eight

    class Random(Net):
        def before(self, x: Tensor) -> Tensor:
            return F.dropout(x, training=where == "act")

    net: Any = Random()
    if where != "act":
        setattr(net, where, nn.Sequential(getattr(net, where), Drawing()))
    with pytest.raises(DynskipError, match=r"[Rr]andom"):
        stage_model(net, ["one", "two"], input_size=(3, SIZE, SIZE))


class Switching(nn.Module):
    def __init__(self, used: bool = True) -> None:
        super().__init__()
        self.used = used

    def forward(self, x: Tensor) -> Tensor:
        on = torch.rand(()) < 0.5  # equal in two runs one time in two
        return x * on if self.used else x


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("where", ["two", "head"])
def test_random_numbers_with_few_outcomes_are_refused(where: str, seed: int) -> None:
    net = Net()
    setattr(net, where, nn.Sequential(getattr(net, where), Switching()))
    torch.manual_seed(seed)
    with pytest.raises(DynskipError, match=r"[Rr]andom"):
        stage_model(net, ["one", "two"], input_size=(3, SIZE, SIZE))


def test_random_numbers_that_change_nothing_are_taken() -> None:
    net: Any = Net()
    net.head = nn.Sequential(net.head, Switching(used=False))
    assert stage_model(net, ["one", "two"], input_size=(3, SIZE, SIZE)).num_stages == 2


def test_layers_compute_three_images_to_verify_a_cut() -> None:
    seen = list[int]()
    net = Net().eval()
    for layer in net.children():
        layer.register_forward_hook(lambda layer, args, output: seen.append(0 if output.is_meta else len(output)))
    stage_model(net, ["one", "two"], input_size=(3, SIZE, SIZE))
    assert seen == 3 * [1] + 3 * [2]  # the model on one image, the stages on two


def test_layers_that_work_in_place_on_what_is_read_again() -> None:
    class InPlace(Net):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Any:
            x = self.one(x)
            y = self.act(x)
            return self.head(self.two(x + y).mean((2, 3)))

    net = InPlace().eval()
    backbone, x = stage_model(net, ["one", "two"], input_size=(3, SIZE, SIZE)), randn(2, 3, SIZE, SIZE, seed=2)
    assert torch.equal(backbone(x.float()), net(x.float()))


def test_a_cut_that_is_not_verified_is_the_same_cut() -> None:
    backbone = resnet(verify=False)
    assert_is_its_model(backbone)
    assert repr(backbone) == repr(resnet())
    assert stage_model("test_resnet", num_classes=0, head=nn.Linear(96, 7), verify=False).num_classes == 7


@torch.no_grad()
def test_a_cut_may_be_made_in_inference_mode() -> None:
    with torch.inference_mode():
        backbone = stage_model("test_resnet", input_size=SHAPE).eval()
    assert_is_its_model(backbone)
