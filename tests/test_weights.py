"""Weight files: what loads, and what is refused without running anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from dynskip import DynskipError
from dynskip.backbone.weights import load_weights

pytest.importorskip("safetensors")
from safetensors.torch import save_file

BACKBONE = "test_byobnet"


def network(num_classes: int = 6, seed: int = 0, name: str = BACKBONE) -> Any:
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=num_classes)


def weights(num_classes: int = 6, name: str = BACKBONE) -> dict[str, torch.Tensor]:
    return dict(network(num_classes, 11, name).state_dict())


def save_wrapped(state: dict[str, torch.Tensor], file: Path) -> None:
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("save", "name"), [(save_file, "w.safetensors"), (torch.save, "w.pt"), (save_wrapped, "w.pth")]
)
def test_weights_load(save: Callable[..., None], name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in weights().items()}
    save(state, tmp_path / name)
    model = network()
    assert load_weights(model, tmp_path / name)
    loaded = model.state_dict()
    assert all(value.dtype == torch.float32 for value in loaded.values() if value.is_floating_point())
    torch.testing.assert_close(loaded, {k: v.to(loaded[k].dtype) for k, v in state.items()}, rtol=0, atol=0)


def test_another_number_of_classes_leaves_the_classifier(tmp_path: Path) -> None:
    state = weights(1000)
    save_file(state, tmp_path / "w.safetensors")
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert not load_weights(model, str(tmp_path / "w.safetensors"))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key.startswith("head.fc") else state[key]), key


def test_counters_of_training_steps_may_be_missing_or_of_another_shape(tmp_path: Path) -> None:
    state = weights(name="test_resnet")
    for key in [key for key in state if key.endswith("num_batches_tracked")]:
        counter = state.pop(key)
        if "layer1" in key:
            state[key] = counter[None]
    torch.save(state, tmp_path / "w.pt")
    model = network(name="test_resnet")
    assert load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model.conv1[0].weight, state["conv1.0.weight"])


def test_weights_of_another_model_change_nothing(tmp_path: Path) -> None:
    save_file(weights(name="test_resnet"), tmp_path / "w.safetensors")
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = r"holds weights of another model: \d+ entries are missing, \d+ unknown, .* Name the model that they were"
    with pytest.raises(DynskipError, match=message):
        load_weights(model, tmp_path / "w.safetensors")
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_missing_weights(tmp_path: Path) -> None:
    for file in (tmp_path / "gone.pt", tmp_path):
        with pytest.raises(DynskipError, match=rf"{file} does not exist\. Give a file of weights"):
            load_weights(network(), file)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "text": lambda raw: b"hello, these are no weights\n",
    "flipped": lambda raw: raw[:4000] + bytes(255 - byte for byte in raw[4000:5000]) + raw[5000:],
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [*(("w.pt", damage) for damage in DAMAGES), *(("w.safetensors", damage) for damage in list(DAMAGES)[:3])],
)  # safetensors has no checksum
def test_damaged_weights(name: str, damage: str, tmp_path: Path) -> None:
    file = tmp_path / name
    (save_file if name == "w.safetensors" else torch.save)(weights(), file)
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.raises(DynskipError, match=r"w\.\w+ cannot be read as weights .*Expected \.safetensors, or"):
        load_weights(network(), file)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {1: torch.zeros(2)}, {"state_dict": [1]}, {}])
def test_foreign_files(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(DynskipError, match=r"w\.pt (cannot be read as weights|holds weights of another model)"):
        load_weights(network(), tmp_path / "w.pt")


class Malicious:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.victim,)


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    victim, file = tmp_path / "victim", tmp_path / "evil.pt"
    torch.save({**weights(), "evil": Malicious(victim)}, file)
    with pytest.raises(DynskipError, match=r"evil\.pt cannot be read as weights"):
        load_weights(network(), file)
    assert not victim.exists()
    torch.load(file, weights_only=False)
    assert victim.exists()  # so the file is as dangerous as it was meant to be
