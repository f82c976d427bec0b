from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import os
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from helpers import Temporal, assert_same, randn, randomise
from torch import Tensor, nn

import dynskip
from dynskip import (
    ConfidenceGate,
    DynskipError,
    EarlyExit,
    EarlyTerminator,
    FixedGate,
    FLOPsLookup,
    InnerClassifier,
    PolicyGate,
    RandomGate,
    SkipOutput,
    StagedBackbone,
    StopOrForward,
    sofnet,
    stage_model,
)

SIZE = (3, 32, 32)
ROOT = Path(dynskip.__file__).parents[1]


def backbone(**kwargs: Any) -> StagedBackbone:
    return stage_model("test_resnet", input_size=SIZE, **{"num_stages": 2, "num_classes": 4, **kwargs})


def wrap(staged: StagedBackbone, gates: list[Any] | None = None, **kwargs: Any) -> StopOrForward:
    """Wrap a backbone with gates that disagree."""
    if gates is None:
        gates = [PolicyGate(channels, hidden=5, forward_bias=0.3) for channels in staged.num_features]
    for n, gate in enumerate(gates):
        randomise(gate, seed=n, scale=2.0)
    return StopOrForward(staged, gates, **kwargs).eval()


def video(frames: int = 5, seed: int = 0) -> Tensor:
    return randn(2, frames, *SIZE, seed=seed).float() + randn(2, frames, 3, 1, 1, seed=seed + 1).float()


def answer(model: StopOrForward | EarlyExit) -> SkipOutput:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        output: SkipOutput = model(video().flatten(0, 1) if isinstance(model, EarlyExit) else video())
        return output


def round_trip(model: StopOrForward, folder: Path, **kwargs: Any) -> StopOrForward:
    return StopOrForward.from_pretrained(model.save_pretrained(folder), **kwargs)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return wrap(backbone()).save_pretrained(tmp_path / "model")


# ---------------------------------------------------------------------------------------------------------- round trips


def full() -> StopOrForward:
    """Build a model in which no choice is the default."""
    staged = backbone(boundaries=["maxpool", "layer2", "layer4"], num_stages=None, drop_rate=0.1)
    kinds: tuple[Temporal, ...] = ("lstm", None, "lstm")
    gates = [PolicyGate(c, 6, temporal, 1.5) for c, temporal in zip(staged.num_features, kinds, strict=True)]
    model = wrap(
        staged,
        gates,
        inner=[InnerClassifier(6, 4, detach=False) for _ in gates],
        terminator=EarlyTerminator(0.8, 2),
        lookup=FLOPsLookup(
            [3.5, 2.25, 1 / 3], 0.1, [0.02] * 3, steps=[0.01] * 3, shared=[0.005] * 3, image_size=SIZE[1:], unit="ms"
        ),
        state_update="reached",
        forward_threshold=(0.5, 0.1 + 0.2, 0.7),
    )
    model.temperature = 2.5
    model.class_names = ["run", "jump", "a | b", "Füße"]
    model.preprocessing = timm.data.resolve_model_data_config(staged.model)
    return model


def exits() -> EarlyExit:
    """Build an image classifier with no exit after the first stage, and then one of each kind."""
    staged = backbone(num_stages=3)
    _, second, third = staged.num_features
    gates: list[nn.Module] = [FixedGate(), ConfidenceGate(second, 4, 0.7), PolicyGate(third, 6, None, 0.0)]
    inner: list[nn.Module] = [nn.Identity(), nn.Identity(), InnerClassifier(6, 4, detach=False)]
    for n, part in enumerate((*gates, *inner)):
        randomise(part, seed=n, scale=2.0)
    model = EarlyExit(staged, gates, inner, forward_threshold=(0.5, 0.4, 0.6)).eval()
    model.class_names, model.temperature = ["run", "jump", "throw", "swim"], 2.5
    return model


MODELS: dict[str, Callable[[], StopOrForward | EarlyExit]] = {
    "exits": exits,
    "full": full,
    "plain": lambda: wrap(backbone()),
    "sofnet": lambda: sofnet("test_resnet", 4, hidden=8, input_size=SIZE, threshold=0.6).eval(),
    "encoder": lambda: wrap(backbone(num_classes=0, head=nn.Linear(96, 4))),
    "vit": lambda: wrap(stage_model("test_vit", img_size=32, num_classes=4)),
    "channels_last": lambda: wrap(backbone()).to(memory_format=torch.channels_last),
}


def test_another_process_gives_the_same_bits(tmp_path: Path) -> None:
    expected = {}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model = build()
        model.save_pretrained(tmp_path / name)
        # What a layout changes in the last bits is no part of what is saved.
        expected[name] = answer(model.to(memory_format=torch.contiguous_format))
    code = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_hub import answer, MODELS
from pathlib import Path
from dynskip.hub import from_pretrained
from helpers import fields_of
answers = {name: fields_of(answer(from_pretrained(Path(sys.argv[2]) / name))) for name in MODELS}
torch.save(answers, Path(sys.argv[2]) / "answers.pt")
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)], check=True, env=env)
    answers = torch.load(tmp_path / "answers.pt")
    decided = set()
    for name, wanted in expected.items():
        assert_same(SkipOutput(**answers[name]), wanted, exact=True)
        decided |= set(wanted.stopped_at.flatten().tolist())
    assert len(decided) > 2  # frames end at several depths, so that the comparison means something


def test_every_choice_comes_back(tmp_path: Path) -> None:
    model = full()
    back = round_trip(model, tmp_path / "model")
    assert back.forward_threshold == model.forward_threshold
    assert (back.state_update, back.temperature) == ("reached", 2.5)
    assert back.backbone.stage_names == ("maxpool", "layer2", "layer4")
    assert back.backbone.input_size == SIZE
    assert back.backbone.model.drop_rate == 0.1
    assert [gate.temporal for gate in back.gates] == ["lstm", None, "lstm"]
    assert back.inner is not None
    assert not back.inner[0].detach
    assert isinstance(back.terminator, EarlyTerminator)
    assert (back.terminator.threshold, back.terminator.min_frames) == (0.8, 2)
    lookup, given = back.lookup_for(SIZE[1:]), model.lookup_for(SIZE[1:])
    for costs in ("per_stage", "gates", "steps", "shared", "by_outcome"):
        assert torch.equal(getattr(lookup, costs), getattr(given, costs))
    assert (lookup.unit, lookup.image_size, lookup.stage_names) == ("ms", SIZE[1:], None)
    assert back.class_names == tuple(model.class_names or ())
    assert back.preprocessing == model.preprocessing
    timm.data.create_transform(**back.preprocessing or {})
    assert not back.training
    again = round_trip(back, tmp_path / "again")
    assert_same(answer(again), answer(model), exact=True)
    config, config_again = ((tmp_path / n / "config.json").read_text() for n in ("model", "again"))
    assert config == config_again


def test_exits_come_back(saved: Path, tmp_path: Path) -> None:
    model = exits()
    folder = model.save_pretrained(tmp_path / "exits")
    back = EarlyExit.from_pretrained(folder)
    assert_same(answer(back), answer(model), exact=True)
    assert back.forward_threshold == (0.5, 0.4, 0.6)
    assert (back.temperature, back.class_names) == (2.5, ("run", "jump", "throw", "swim"))
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert f"EarlyExit.from_pretrained({'exits'!r})" in card
    with pytest.raises(DynskipError, match=r"of class EarlyExit\. Load it with EarlyExit\.from_pretrained"):
        StopOrForward.from_pretrained(folder)
    with pytest.raises(DynskipError, match="of class StopOrForward"):
        EarlyExit.from_pretrained(saved)


def test_exits_that_cannot_be_rebuilt_are_not_saved(tmp_path: Path) -> None:
    model = exits()
    model.exits[2].inner = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(DynskipError, match=r"inner\[2\] is a Sequential"):
        model.save_pretrained(tmp_path / "exits")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_precision_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    model = wrap(backbone()).to(dtype)
    back = round_trip(model, tmp_path / "model")
    assert {p.dtype for p in back.parameters()} == {dtype}
    assert_same(back(video().to(dtype)), model(video().to(dtype)), exact=True)


def gate_classes() -> list[type[nn.Module]]:
    found = [getattr(dynskip, name) for name in dynskip.__all__]
    return [c for c in found if isinstance(c, type) and hasattr(c, "initial_state") and c is not dynskip.Gate]


# What gates ask for that has no default, and values other than the defaults.
ARGUMENTS: dict[str, Any] = {
    "forward_bias": 0.25,
    "hidden": 7,
    "num_classes": 4,
    "rate": 0.6,
    "seed": 3,
    "stop": "unsure",
    "temporal": None,
    "threshold": 0.05,
}


@pytest.mark.parametrize("cls", gate_classes(), ids=lambda cls: cls.__name__)
def test_every_gate_comes_back(cls: type[nn.Module], tmp_path: Path) -> None:
    staged = backbone()
    gates = []
    for channels in staged.num_features:
        known = {**ARGUMENTS, "in_features": channels, **({"stop": True} if cls is FixedGate else {})}
        gates.append(cls(**{name: known[name] for name in inspect.signature(cls).parameters if name in known}))
    model = wrap(staged, gates)
    back = round_trip(model, tmp_path / "model")
    assert [type(gate) for gate in back.gates] == [cls] * len(gates)
    for gate, other in zip(gates, back.gates, strict=True):
        for name in inspect.signature(cls).parameters:
            assert str(getattr(other, name)) == str(getattr(gate, name))
    assert_same(answer(back), answer(model), exact=True)


class LoudGate(nn.Module):
    """A user's gate: forwards what is loud enough, with a part of its own."""

    def __init__(self, level: float, scales: list[float], part: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        self.level, self.scales, self.part, self.options = level, scales, part, options

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return ()

    def forward(self, pooled: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        margin = self.part(pooled).abs().mean(1) * self.scales[0] - self.level
        return torch.stack([-margin, margin], 1), state


def loud_model() -> StopOrForward:
    staged = backbone()
    return wrap(staged, [LoudGate(0.5, [1.0, 2.0], nn.Linear(c, 3), {"a": [1, None]}) for c in staged.num_features])


def test_gates_of_ones_own_are_passed_when_loading(tmp_path: Path) -> None:
    model = loud_model()
    for gate in model.gates:
        gate.level = 0.75  # set after building, as a calibration does
    folder = model.save_pretrained(tmp_path / "model")
    with pytest.raises(DynskipError, match=r"'LoudGate'.*classes=\[LoudGate\]"):
        StopOrForward.from_pretrained(folder)
    back = StopOrForward.from_pretrained(folder, classes=[LoudGate])
    gate = back.gates[0]
    assert (gate.level, gate.scales, gate.options) == (0.75, [1.0, 2.0], {"a": [1, None]})
    assert_same(answer(back), answer(model), exact=True)


def test_loading_leaves_random_numbers_alone(saved: Path) -> None:
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    StopOrForward.from_pretrained(saved)
    assert torch.equal(torch.rand(3), wanted)


def test_saving_leaves_the_model_alone(tmp_path: Path) -> None:
    model = wrap(backbone()).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "model")
    assert model.training
    assert model.backbone.model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "README.md",
        "config.json",
        "model",
        "model.safetensors",
    ]


# ------------------------------------------------------------------------------------------------------- shared parts


def shared_names(model: nn.Module) -> set[frozenset[str]]:
    """Group the names of one and the same module or parameter."""
    groups: dict[int, set[str]] = {}
    for name, thing in itertools.chain(
        model.named_modules(remove_duplicate=False), model.named_parameters(remove_duplicate=False)
    ):
        groups.setdefault(id(thing), set()).add(name)
    return {frozenset(group) for group in groups.values() if len(group) > 1}


def vit() -> StagedBackbone:
    return stage_model("test_vit", img_size=32, num_classes=4, num_stages=2)  # all stages are 64 wide


def loud(part: nn.Module) -> LoudGate:
    return LoudGate(0.5, [1.0, 2.0], part, {})


def holds_the_classifier() -> StopOrForward:
    staged = vit()
    return wrap(staged, [loud(staged.model.get_submodule("head")), FixedGate()])


def holds_the_head() -> StopOrForward:
    staged = stage_model("test_vit", img_size=32, num_classes=0, head=nn.Linear(64, 4), num_stages=2)
    assert staged.classifier is not None
    return wrap(staged, [loud(staged.classifier), loud(staged.classifier)])


def one_inner(gates: list[nn.Module], inner: nn.Module) -> EarlyExit:
    model = EarlyExit(vit(), gates, [inner] * 2).eval()
    randomise(model.exits, seed=1, scale=2.0)
    return model


def holds_a_layer() -> StopOrForward:
    gate = PolicyGate(64, hidden=5)
    return wrap(vit(), [gate, loud(gate.project)])


def coat() -> StagedBackbone:
    blocks = [f"serial_blocks{n}" for n in (1, 2, 3, 4)]  # timm 1.0.15 does not know where its stages end
    return stage_model("coat_lite_tiny", blocks, img_size=32, num_classes=4, input_size=SIZE)


SHARING: dict[str, Callable[[], StopOrForward | EarlyExit]] = {
    "a gate": lambda: wrap(vit(), [PolicyGate(64, hidden=5)] * 2),
    "a gate of rules": lambda: wrap(vit(), [RandomGate(64, 0.5, seed=4)] * 2),
    "a gate without weights": lambda: wrap(vit(), [FixedGate()] * 2),
    "an inner classifier": lambda: wrap(backbone(), inner=[InnerClassifier(5, 4)] * 2),
    "an exit's gate": lambda: one_inner([PolicyGate(64, 6, None)] * 2, InnerClassifier(6, 4)),
    "an exit's classifier": lambda: one_inner([PolicyGate(64, 6, None) for _ in "12"], InnerClassifier(6, 4)),
    "a part of gates": lambda: wrap(vit(), [loud(part) for part in [nn.Linear(64, 3)] * 2]),
    "a gate's layer": holds_a_layer,
    "the backbone's classifier": holds_the_classifier,
    "the head": holds_the_head,
    "weights in timm's model": lambda: wrap(coat()),
}


@pytest.mark.parametrize("name", SHARING)
def test_shared_parts_come_back_shared(name: str, tmp_path: Path) -> None:
    model = SHARING[name]()
    folder = model.save_pretrained(tmp_path / "model")
    back: Any = type(model).from_pretrained(folder, classes=[LoudGate])
    assert shared_names(back) == shared_names(model) != set()
    numbers = sum(tensor.numel() for tensor in safetensors.torch.load_file(folder / "model.safetensors").values())
    once = {id(tensor): tensor.numel() for tensor in model.state_dict(keep_vars=True).values()}
    assert numbers == sum(once.values())
    assert_same(answer(back), answer(model), exact=True)


def test_folders_of_version_1_load(tmp_path: Path) -> None:
    model = wrap(coat())
    folder = model.save_pretrained(tmp_path / "model")
    every = {key: tensor.clone() for key, tensor in model.state_dict().items()}  # tied weights were written again
    forge(folder, safetensors.torch.save(every))
    back = StopOrForward.from_pretrained(edit(folder, lambda config: config.update(version=1)))
    assert all(torch.equal(tensor, every[key]) for key, tensor in back.state_dict().items())


def tied(change: Callable[[Any], Any]) -> StopOrForward:
    model = wrap(vit())
    change(model)
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.gates[1], "decide", m.gates[0].decide),
        lambda m: setattr(m.gates[1].cell, "weight_hh", m.gates[0].cell.weight_hh),
        lambda m: setattr(m.backbone.model.blocks[1].mlp, "fc1", m.backbone.model.blocks[0].mlp.fc1),
        lambda m: setattr(m.backbone.model.blocks[1].norm1, "weight", m.backbone.model.blocks[0].norm1.weight),
    ],
)
def test_what_was_tied_after_it_was_built_is_not_saved(change: Callable[[Any], Any], tmp_path: Path) -> None:
    with pytest.raises(DynskipError, match=r"entries are missing.*layers replaced or shared\) cannot be saved"):
        tied(change).save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------ damaged and foreign folders


@pytest.mark.parametrize("position", [0, 100, -1, "end"])
def test_damaged_weights_are_refused(saved: Path, position: int | str) -> None:
    weights = bytearray((saved / "model.safetensors").read_bytes())
    if isinstance(position, int):
        weights[position] ^= 1
    else:
        del weights[1000:]
    (saved / "model.safetensors").write_bytes(weights)
    with pytest.raises(DynskipError, match=r"SHA-256 differs.*download the model again"):
        StopOrForward.from_pretrained(saved)


def test_a_setting_edited_in_the_file_is_the_models_setting(tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["terminator"]["arguments"]["threshold"] = 0.5
        config["forward_threshold"][1] = 0.25
        config["class_names"] = ["a", "b", "c", "d"]

    folder = wrap(backbone(), terminator=EarlyTerminator(0.999)).save_pretrained(tmp_path / "model")
    back = StopOrForward.from_pretrained(edit(folder, change))
    assert isinstance(back.terminator, EarlyTerminator)
    assert (back.terminator.threshold, back.forward_threshold) == (0.5, (0.5, 0.25))
    assert back.class_names == ("a", "b", "c", "d")


def test_folders_with_a_hash_of_their_configuration_load(saved: Path) -> None:
    expected = answer(StopOrForward.from_pretrained(saved))
    edit(saved, lambda config: config.update(config_sha256="0" * 64))  # written by earlier versions; no longer read
    assert_same(answer(StopOrForward.from_pretrained(saved)), expected, exact=True)


def values_of(config: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """List where each value of a configuration stands, lists and mappings included; of a list, the first item only."""
    items = config.items() if isinstance(config, dict) else enumerate(config[:1]) if isinstance(config, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from values_of(value, (*path, key))


def test_any_damaged_value_is_refused_or_builds_a_model_that_runs(tmp_path: Path) -> None:
    folder = full().save_pretrained(tmp_path / "model")
    written = json.loads((folder / "config.json").read_text())
    paths, refused = list(values_of(written)), 0
    for path, damage in zip(paths, itertools.cycle(("junk", None, {"junk": [0.5]})), strict=False):
        config = json.loads(json.dumps(written))
        place = config
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = damage
        (folder / "config.json").write_text(json.dumps(config))
        try:
            answer(StopOrForward.from_pretrained(folder))
        except DynskipError:
            refused += 1
    assert refused > len(paths) / 2


def test_only_names_can_be_any_text(tmp_path: Path) -> None:
    folder = full().save_pretrained(tmp_path / "model")
    written = json.loads((folder / "config.json").read_text())
    loaded = set()
    for path in values_of(written):
        config = json.loads(json.dumps(written))
        place = config
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = "junk"
        (folder / "config.json").write_text(json.dumps(config))
        try:
            StopOrForward.from_pretrained(folder)
            loaded.add(path[0] if path[0] == "made_with" else path)
        except DynskipError:
            pass
    assert loaded == {"made_with", ("class_names", 0), ("lookup", "unit"), ("preprocessing", "crop_mode")}


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("was_run",)


def forge(folder: Path, weights: bytes) -> None:
    """Replace the weights, and the hash with them."""
    (folder / "model.safetensors").write_bytes(weights)
    edit(folder, lambda config: config.update(weights_sha256=hashlib.sha256(weights).hexdigest()))


def test_nothing_is_unpickled(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    forge(saved, pickle.dumps(Evil()))
    with pytest.raises(DynskipError, match="no safetensors file"):
        StopOrForward.from_pretrained(saved)
    torch.save(Evil(), tmp_path / "evil.pt")
    forge(saved, (tmp_path / "evil.pt").read_bytes())
    with pytest.raises(DynskipError, match="no safetensors file"):
        StopOrForward.from_pretrained(saved)
    assert not (tmp_path / "was_run").exists()


def test_weights_of_another_model_are_refused(saved: Path) -> None:
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    last = max(tensors)
    for change, message in (
        ({last: tensors[last].double()}, r"1 entries.*float64 in model.safetensors and .*float32 in the model"),
        ({last: tensors[last][None]}, r"1 entries.*\(1, .* in model.safetensors and \("),
        ({"other": tensors[last].clone()}, "1 entries.*'other' is .*and unknown in the model"),
    ):
        forge(saved, safetensors.torch.save({**tensors, **change}))
        with pytest.raises(DynskipError, match=message):
            StopOrForward.from_pretrained(saved)
    del tensors[last]
    forge(saved, safetensors.torch.save(tensors))
    with pytest.raises(DynskipError, match=f"1 entries.*'{last}' is missing in model.safetensors"):
        StopOrForward.from_pretrained(saved)


def terminated(**arguments: Any) -> Callable[[dict[str, Any]], Any]:
    """Put a terminator into a configuration."""
    arguments = {"threshold": 0.9, "min_frames": 3, **arguments}
    part = {"class": "dynskip.EarlyTerminator", "arguments": arguments}
    return lambda config: config.update(terminator=part)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=3), "format version 3, and dynskip .* reads 1 to 2.*pip install -U dynskip"),
        *[(lambda c, v=v: c.update(version=v), f"format version {v}") for v in ("new", 0, -5, 1.0, True, None)],
        (lambda c: c.update(format="timm"), "not written by dynskip"),
        (lambda c: c.pop("state_update"), "does not describe a model.*it has no state_update. It was written with dyn"),
        (lambda c: c.update(new_rule="x"), "has fields that are not known here: new_rule. It was written with dynskip"),
        (lambda c: c.update(wrapper="Gadget"), "does not describe a model.*Gadget"),
        (lambda c: c.update(wrapper="Pretrained"), "does not describe a model.*Pretrained"),
        (lambda c: c.update(dtype="int8"), "does not describe a model.*int8"),
        (lambda c: c["gates"][0]["arguments"].update(hidden=-1), "Gate widths must be positive"),
        (lambda c: c["gates"][0]["arguments"].update(hidden=9), r"weights do not fit.*'gates\.0.*\(9, .*in the model"),
        (lambda c: c["gates"][0]["arguments"].update(depth=9), "does not describe a model.*depth"),
        (lambda c: c["gates"][0].update({"class": "dynskip.NewGate"}), "'dynskip.NewGate', which is not dynskip's"),
        (lambda c: c["gates"][0].update({"class": "dynskip.gates.math"}), "which is not dynskip's"),
        (lambda c: c["gates"][0].update({"class": "dynskip.FLOPsLookup"}), "which is not dynskip's"),
        (lambda c: c["gates"][0].update({"class": "os.system"}), "'os.system', which is not dynskip's"),
        (lambda c: c["gates"].pop(), "Got 1 gates for 2 stages"),
        (lambda c: c.update(class_names=["a"]), "`class_names` has 1 entries; give one string for each of 4 classes"),
        (lambda c: c.update(preprocessing={"evil": 1}), "`preprocessing` holds arguments of timm"),
        (lambda c: c.update(terminator=c["gates"][0]), "The terminator is a PolicyGate; give an EarlyTerminator"),
        (lambda c: c.update(temperature=0), "temperature=0 has to be a finite positive number"),
        (lambda c: c.update(lookup={"per_stage": [1, 2], "image_size": [32]}), r"lookup.image_size is \[32\]"),
        (lambda c: c.update(lookup={"per_stage": [1, 2], "image_size": [0, 8]}), r"image_size=\(0, 8\) is no size"),
        (lambda c: c.update(lookup={"per_stage": [1, -2]}), "not negative"),
        (lambda c: c.update(lookup={"per_stage": [1, 2], "unit": 3}), "lookup.unit is 3; expected str"),
        (lambda c: c["gates"][0]["arguments"].update(hidden=5.0), r"gates\[0\]\.hidden is 5\.0; expected int"),
        (lambda c: c["gates"][0]["arguments"].update(hidden=True), "hidden is True; expected int"),
        (lambda c: c["gates"][0]["arguments"].update(forward_bias="3"), "forward_bias is '3'; expected float"),
        (lambda c: c["gates"][0]["arguments"].update(temporal="gru"), "temporal is 'gru'; expected .*'lstm'"),
        (lambda c: c["gates"].append({"same_as": "gates[9]"}), r"the same as 'gates\[9\]', which the model does not"),
        (
            lambda c: c["gates"].insert(0, {"same_as": "gates[1]"}),
            r"the same as 'gates\[1\]', which the model does not",
        ),
        (terminated(min_frames=1e300), r"terminator\.min_frames is 1e\+300; expected int"),
        (terminated(min_frames=10**30), "min_frames=1000000000000000000000000000000 is no whole number"),
        (terminated(threshold=True), "terminator.threshold is True; expected float"),
        (lambda c: c.update(forward_threshold="0.5"), "forward_threshold is '0.5'; expected float"),
        (lambda c: c.update(state_update="all"), "state_update is 'all'; expected .*'reached'"),
        (lambda c: c.update(class_names="abcd"), "give one string for each of 4 classes"),
        (lambda c: c.update(class_names=[1, 2, 3, 4]), "give one string for each of 4 classes"),
        (lambda c: c.update(temperature=float("nan")), "config.json is damaged .*NaN"),
        (lambda c: c.update(temperature=float("inf")), "config.json is damaged .*Infinity"),
        (lambda c: c.update(preprocessing={"mean": "abc"}), "preprocessing.mean is 'abc'"),
        (lambda c: c.update(preprocessing={"std": [1, 0, 1]}), r"preprocessing.std is \[1, 0, 1\]; expected positive"),
        (lambda c: c.update(preprocessing={"input_size": [3, -8, 8]}), "preprocessing.input_size .* expected positive"),
        (lambda c: c.update(preprocessing={"mean": []}), r"preprocessing.mean is \[\]"),
        (lambda c: c.update(temperature=True), "temperature=True has to be a finite positive number"),
        (lambda c: c.update(preprocessing={"num_frames": 2.5}), "preprocessing.num_frames is 2.5; expected int"),
        (lambda c: c.update(preprocessing={"interpolation": "blurry"}), "cannot use the `preprocessing`.*blurry"),
        (lambda c: c["backbone"].update(input_size=[3, 0, 32]), r"input_size is \[3, 0, 32\]; expected \(C, H, W\)"),
        (lambda c: c["backbone"].update(boundaries="layer2"), "backbone.boundaries is 'layer2'; expected"),
        (lambda c: c["backbone"].update(num_stages=True), "backbone.num_stages is True; expected int"),
        (lambda c: c["backbone"].update(checkpoint_path="evil.pt"), "does not describe a model.*checkpoint_path"),
        (
            lambda c: c["backbone"].update(name=[{"class": "torch.nn.Identity", "arguments": {}}] * 3),
            "backbone.name is .*expected str",
        ),
        (lambda c: c.update(forward_threshold=[0.5, 2.0]), "2.0 of gate 1 is no probability"),
        (lambda c: c["backbone"].update(name="no_such_net"), "no model named 'no_such_net'"),
        (lambda c: c["backbone"].update(name="hf-hub:someone/evil"), "no model named"),
        (lambda c: c["backbone"].update(stage_names=["a", "b"]), "Install the timm that it was made with"),
        (lambda c: c["backbone"]["timm_kwargs"].update(checkpoint_path="evil.pt"), "names other weights"),
        (lambda c: c["backbone"]["timm_kwargs"].update(pretrained=True), "names other weights"),
        (lambda c: c["backbone"]["timm_kwargs"].update(no_such=1), "timm could not build"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(
    saved: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit(saved, change)
    with pytest.raises(DynskipError, match=message):
        StopOrForward.from_pretrained(saved)


def gates_of(name: str, **arguments: Any) -> Callable[[dict[str, Any]], Any]:
    part = {"class": f"dynskip.{name}", "arguments": {"in_features": 10**10, **arguments}}
    return lambda config: config.update(gates=[part, part])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["gates"][0]["arguments"].update(hidden=20_000), "far more"),
        (gates_of("RandomGate", rate=0.5), "far more"),
        (gates_of("SimilarityGate"), "far more"),
        (gates_of("LinearGate"), "far more"),
        (lambda c: c["backbone"]["timm_kwargs"].update(num_classes=10**9), "far more"),
        (lambda c: c["backbone"]["timm_kwargs"].update(layers=[10**7, 1, 1, 1]), "far more"),
        (lambda c: c["backbone"].update(name="test_convnext", timm_kwargs={"dims": 4 * [10**6]}), "far more"),
        (
            lambda c: c["backbone"].update(
                head={"class": "torch.nn.Linear", "arguments": {"in_features": 96, "out_features": 10**9, "bias": True}}
            ),
            "far more",
        ),
        (lambda c: c["backbone"].update(input_size=[3, 10**5, 10**5]), r"input_size is .*expected \(C, H, W\)"),
    ],
)
def test_a_small_folder_makes_no_large_model(
    saved: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    """Each of these would take from 10 GB to more than there is."""
    edit(saved, change)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(DynskipError, match=message):
        StopOrForward.from_pretrained(saved)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes
    assert time.process_time() - start < 10


def test_damaged_and_missing_files_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(DynskipError, match=r"no folder 'nowhere'.*repository's name"):
        StopOrForward.from_pretrained("nowhere")
    with pytest.raises(DynskipError, match=r"has no config.json"):
        StopOrForward.from_pretrained(tmp_path)
    (saved / "config.json").write_text('{"format": "dynskip"')
    with pytest.raises(DynskipError, match=r"config.json is damaged"):
        StopOrForward.from_pretrained(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(DynskipError, match=r"has no model.safetensors"):
        StopOrForward.from_pretrained(saved)


# ------------------------------------------------------------------------------------------------- what cannot be saved


class Forgetful(PolicyGate):
    def __init__(self, in_features: int, mood: str = "good") -> None:
        super().__init__(in_features, 5)


class Stubborn(PolicyGate):
    """Keeps its argument and does not build from it alone."""

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features, 5)
        self.shift = 0.0

    def forward(self, pooled: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        logits, state = super().forward(pooled, state)
        return logits + self.shift, state


def with_gates(build: Callable[[int], nn.Module]) -> StopOrForward:
    staged = backbone()
    return wrap(staged, [build(channels) for channels in staged.num_features])


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
    "dropout": lambda x: nn.functional.dropout(torch.ones_like(x), 0.5),
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "rand": lambda x: torch.rand(len(x)),
}


class DrawingGate(nn.Module):
    """A user's gate that draws random numbers."""

    def __init__(self, draw: str) -> None:
        super().__init__()
        self.draw = draw

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return ()

    def forward(self, pooled: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        margin = DRAWS[self.draw](pooled[:, 0])
        return torch.stack([-margin, margin], 1), state


@pytest.mark.parametrize("draw", DRAWS)
def test_gates_that_draw_are_saved(draw: str, tmp_path: Path) -> None:
    model = with_gates(lambda _: DrawingGate(draw))
    before = torch.random.get_rng_state()
    folder = model.save_pretrained(tmp_path / "model")
    assert torch.equal(torch.random.get_rng_state(), before)
    back = StopOrForward.from_pretrained(folder, classes=[DrawingGate])
    torch.testing.assert_close(dict(back.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def moved_strides() -> StopOrForward:
    model = wrap(backbone(zero_init_last=False))  # blocks that start at zero hide what they compute
    block: Any = model.backbone.model.get_submodule("layer2.0")
    block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    return model


def shifted() -> StopOrForward:
    model = with_gates(Stubborn)
    model.gates[1].shift = 1.0
    return model


def named(**attributes: Any) -> StopOrForward:
    model = wrap(backbone())
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def renamed() -> StopOrForward:
    names = ["a", "b", "c", "d"]
    model = named(class_names=names)
    names.append("e")  # checked when set, and changed since
    return model


def half_cast() -> StopOrForward:
    model = wrap(backbone())
    model.gates.double()
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: wrap(stage_model(timm.create_model("test_resnet"), input_size=SIZE)), "Stage it by its timm name"),
        (lambda: wrap(backbone(act_layer=nn.ReLU)), r"timm_kwargs\['act_layer'\] is a type.*act_layer='gelu'"),
        (
            lambda: wrap(backbone(num_classes=0, head=nn.Sequential(nn.Linear(96, 4)))),
            "backbone.classifier is a Sequential",
        ),
        (lambda: with_gates(Forgetful), r"gates\[0\] is a Forgetful.*does not keep.*self.mood = mood"),
        (
            lambda: with_gates(lambda c: LoudGate(0.5, [torch.ones(2)], nn.Linear(c, 3), {})),  # type: ignore[list-item]
            r"gates\[0\]\.scales\[0\] is a Tensor",
        ),
        (lambda: with_gates(lambda c: LoudGate(float("inf"), [1.0], nn.Linear(c, 3), {})), r"gates\[0\]\.level is inf"),
        (shifted, "gives other answers at stage 'layer4' and its gate"),
        (moved_strides, "gives other answers at stage"),
        (lambda: wrap(backbone()).optimize(video(), compile=False)[0], r"entries are missing.*folded"),
        (half_cast, r"\['float32', 'float64'\].*model.float\(\)"),
        (renamed, "`class_names` has 5 entries.*4 classes"),
        (lambda: named(preprocessing={"average": 3}), "`preprocessing` holds arguments"),
        (lambda: named(preprocessing="imagenet"), "`preprocessing` is a str; give a mapping"),
    ],
)
def test_what_cannot_be_rebuilt_is_not_saved(build: Callable[[], StopOrForward], message: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(DynskipError, match=message):
        build().save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(saved: Path) -> None:
    with pytest.raises(DynskipError, match="no empty folder"):
        wrap(backbone()).save_pretrained(saved)
    StopOrForward.from_pretrained(saved)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, write = wrap(backbone()), Path.write_text

    def full_disk(path: Path, *args: Any, **kwargs: Any) -> int:
        if path.name == "README.md":
            raise OSError("No space left on device")
        return write(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------- card and hub


def test_the_card_tells_what_was_measured(tmp_path: Path) -> None:
    model = wrap(backbone(), terminator=EarlyTerminator(0.9, 1))
    model.class_names = ["a", "b", "c", "d"]
    rows = [{"frames": "dense", "top-1 %": 90.5}, {"frames": "a|b", "GMACs/video": 0.25}]
    card = (model.save_pretrained(tmp_path / "net", results=rows) / "README.md").read_text()
    assert f"```text\n{model.summary(SIZE[1:])}\n```" in card
    assert "| frames | top-1 % | GMACs/video |\n| --- | --- | --- |\n| dense | 90.5 |  |\n| a\\|b |  | 0.25 |" in card
    assert "4 classes: a, b, c, d" in card
    assert "probability > 0.9" in card
    assert "test_resnet" in card
    assert card.startswith("---\nlibrary_name: dynskip\n")


@pytest.mark.parametrize("input_size", [48, (3, 48, 48), [3, 48, 48]])
def test_the_card_has_the_costs_at_the_size_of_the_preprocessing(input_size: Any, tmp_path: Path) -> None:
    model = named(preprocessing={"input_size": input_size})
    card = (model.save_pretrained(tmp_path / "net") / "README.md").read_text()
    assert model.summary(48) in card


class FakeHub:
    """What `HfApi` does with a repository, in memory."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.calls: list[tuple[str, Any]] = []

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
        assert exist_ok
        self.calls.append(("create", private))
        self.files.setdefault(repo_id, {})

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        self.calls.append(("upload", commit_message))
        self.files[repo_id] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return SimpleNamespace(commit_url=f"https://hub.test/{repo_id}/commit/1")

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.calls.append(("download", revision))
        if repo_id not in self.files:
            raise ConnectionError("offline")
        folder = Path(os.environ["FAKE_HUB"])
        for name, content in self.files[repo_id].items():
            if name in allow_patterns:
                (folder / name).write_bytes(content)
        return str(folder)


def test_push_and_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAKE_HUB", str(tmp_path))
    hub, model = FakeHub(), wrap(backbone())
    url = model.push_to_hub("me/net", private=True, commit_message="First", results=[{"top-1 %": 50}], api=hub)
    assert url == "https://hub.test/me/net/commit/1"
    assert hub.calls == [("create", True), ("upload", "First")]
    card = hub.files["me/net"]["README.md"].decode()
    assert "StopOrForward.from_pretrained('me/net')" in card
    assert "| 50 |" in card
    back = StopOrForward.from_pretrained("me/net", revision="abc", api=hub)
    assert hub.calls[-1] == ("download", "abc")
    assert not (tmp_path / "README.md").exists()
    assert_same(answer(back), answer(model), exact=True)
    with pytest.raises(DynskipError, match=r"could not be downloaded from the Hub \(ConnectionError: offline\)"):
        StopOrForward.from_pretrained("me/other", api=hub)


def test_what_cannot_be_saved_is_not_pushed() -> None:
    hub = FakeHub()
    with pytest.raises(DynskipError, match="class_names"):
        renamed().push_to_hub("me/net", api=hub)
    assert hub.calls == []


def test_real_hub_api_takes_what_is_passed() -> None:
    from huggingface_hub import HfApi

    for name in ("create_repo", "upload_folder", "snapshot_download"):
        asked = {p for p in inspect.signature(getattr(FakeHub, name)).parameters if p != "self"}
        assert asked <= set(inspect.signature(getattr(HfApi, name)).parameters)


@pytest.mark.parametrize(("module", "action"), [("safetensors.torch", "save"), ("huggingface_hub", "push")])
def test_a_missing_extra_is_named(module: str, action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(backbone())
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DynskipError, match="extra `hub`"):
        model.save_pretrained(tmp_path / "model") if action == "save" else model.push_to_hub("me/net")
