"""Files of an export that were changed: by accident, on purpose, or to do harm."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn

import dynskip_onnx
from dynskip import DynskipError, EarlyTerminator, PolicyGate, StopOrForward, stage_model
from dynskip_onnx import DynskipOnnxError

SIZE, CLASSES, MEAN, STD = 16, 4, [0.5, 0.4, 0.3], [0.25, 0.2, 0.3]
FRAMES = np.random.default_rng(0).normal(size=(3, 3, SIZE, SIZE)).astype(np.float32)


def small_model() -> StopOrForward:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))
    backbone = stage_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), head), input_size=(3, SIZE, SIZE))
    return StopOrForward(backbone, [PolicyGate(8, 4), PolicyGate(8, 4)], terminator=EarlyTerminator(0.9, 2)).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "model"
    return small_model().export(folder, SIZE, class_names=list("abcd"), mean=MEAN, std=STD)


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """Copy the export, to change it."""
    return shutil.copytree(exported, tmp_path / "model")


def edit(folder: Path, *path: str | int, value: Any = None, drop: bool = False) -> None:
    """Set or drop an entry of the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    at = manifest
    for key in path[:-1]:
        at = at[key]
    if drop:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))


# Changed on purpose


def quantise(path: Path) -> None:
    quantize_dynamic(str(path), str(path), weight_type=QuantType.QUInt8)


def convert(path: Path) -> None:
    model = onnx.load(path)
    onnx.save(onnx.version_converter.convert_version(model, model.opset_import[0].version + 1), path)


def rename(path: Path) -> None:
    model = onnx.load(path)
    model.producer_name = "somebody"
    onnx.save(model, path)


@pytest.mark.parametrize("change", [quantise, convert, rename])
def test_files_changed_on_purpose_are_accepted_when_one_says_so(folder: Path, change: Callable[[Path], None]) -> None:
    wanted = dynskip_onnx.load(folder, threads=1).clip(FRAMES)
    for path in folder.glob("*.onnx"):
        change(path)
    with pytest.raises(DynskipOnnxError, match=r"hash differs.*dynskip_onnx\.rehash"):
        dynskip_onnx.load(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    dynskip_onnx.rehash(folder)
    assert {**json.loads((folder / "manifest.json").read_text()), "sha256": 0} == {**manifest, "sha256": 0}
    result = dynskip_onnx.load(folder, threads=1).clip(FRAMES)
    assert result.stopped_at.tolist() == wanted.stopped_at.tolist()
    np.testing.assert_allclose(result.logits, wanted.logits, atol=0.02)


def test_what_does_not_fit_is_refused_after_rehash_too(folder: Path) -> None:
    shutil.copy(folder / "gate_0.onnx", folder / "head.onnx")
    dynskip_onnx.rehash(folder)
    with pytest.raises(DynskipOnnxError, match="keep the types and shapes"):
        dynskip_onnx.load(folder)
    (folder / "head.onnx").unlink()
    with pytest.raises(DynskipOnnxError, match="missing"):
        dynskip_onnx.rehash(folder)
    for nowhere in (folder / "elsewhere", folder / "gate_0.onnx"):
        with pytest.raises(DynskipOnnxError, match="no manifest"):
            dynskip_onnx.rehash(nowhere)


# Weights in other files


def outside(location: str) -> TensorProto:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "64")):
        weight.external_data.add(key=key, value=value)
    return weight


def as_initializer(graph: onnx.GraphProto, weight: TensorProto) -> list[onnx.NodeProto]:
    graph.initializer.append(weight)
    return []


def as_constant(graph: onnx.GraphProto, weight: TensorProto) -> list[onnx.NodeProto]:
    return [helper.make_node("Constant", [], ["w"], value=weight)]


def in_subgraph(graph: onnx.GraphProto, weight: TensorProto) -> list[onnx.NodeProto]:
    weight.name = "inner"
    out = helper.make_tensor_value_info("same", TensorProto.FLOAT, [4, 4])
    branch = helper.make_graph([helper.make_node("Identity", ["inner"], ["same"])], "branch", [], [out], [weight])
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    graph.initializer.append(yes)
    return [helper.make_node("If", ["yes"], ["w"], then_branch=branch, else_branch=branch)]


@pytest.mark.parametrize("place", [as_initializer, as_constant, in_subgraph])
@pytest.mark.parametrize("location", ["w.bin", "beside.bin", "../w.bin", "absolute"])
def test_weights_in_other_files_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str, place: Callable[..., Any]
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for path in (work / "w.bin", folder / "beside.bin", tmp_path / "w.bin"):
        np.full((4, 4), 7, np.float32).tofile(path)
    model = onnx.load(folder / "head.onnx")
    graph, out = model.graph, model.graph.output[0].name
    for node in graph.node:
        node.output[:] = ["plain" if name == out else name for name in node.output]
    nodes = place(graph, outside(str(work / "w.bin") if location == "absolute" else location))
    graph.node.extend([*nodes, helper.make_node("MatMul", ["plain", "w"], [out])])
    (folder / "head.onnx").write_bytes(model.SerializeToString())
    dynskip_onnx.rehash(folder)
    with pytest.raises(DynskipOnnxError, match=r"(?s)cannot load 'head\.onnx'.*weights inside"):
        dynskip_onnx.load(folder)


# Nonsense in the manifest

NAN, INF, MANY = math.nan, math.inf, 10**400
GATE: tuple[str | int, ...] = ("stages", 0, "gate")
STATE: tuple[str | int, ...] = (*GATE, "initial_state", 0)
NO_NUMBERS: tuple[Any, ...] = ("a", None, True, [], {})
NO_COSTS = (*NO_NUMBERS, NAN, INF, -1, MANY)
BUT_NULL = tuple(value for value in NO_COSTS if value is not None)  # a cost may be unknown
NO_SIZES = (*NO_NUMBERS, NAN, 1.5, -1, MANY)
NO_LISTS: tuple[Any, ...] = ("a", None, 1, {})
BAD: dict[tuple[str | int, ...], tuple[Any, ...]] = {
    ("input",): NO_LISTS[:3],
    ("input", "shape"): (*NO_LISTS, [], [3, SIZE], [3, SIZE, 0], [3, SIZE, -1], [3, SIZE, 1.0], [3, SIZE, 10**9]),
    ("input", "mean"): ("abc", 1, {}, [0.5] * 2, ["a"] * 3, [NAN] * 3, [INF] * 3, [1e300] * 3),
    ("input", "std"): ("abc", 1, {}, [0.5] * 2, ["a"] * 3, [NAN] * 3, [INF] * 3, [0] * 3, [1e-300] * 3, [-0.1] * 3),
    ("num_classes",): (*NO_SIZES, 0, 10**9),
    ("class_names",): ("abcd", 1, {}, ["a"], [1, 2, 3, 4]),
    ("activation",): (None, 1, [], "relu"),
    ("consensus",): (None, *NO_LISTS[:3]),
    ("consensus", "name"): (None, 1, [], "Other"),
    ("consensus", "k"): (*(value for value in NO_SIZES if value is not None), 0),
    ("consensus", "of_probabilities"): ("no", None, 1, []),
    ("consensus", "embedded_features"): (*NO_SIZES, CLASSES + 1),
    ("state_update",): (None, 1, [], "sometimes"),
    ("termination",): ("a", 1, [], {}),
    ("termination", "threshold"): (*NO_COSTS, 0, 1.5),
    ("termination", "min_frames"): NO_SIZES,
    ("unit",): (None, 1),
    ("stages",): (*NO_LISTS, [], [1]),
    ("stages", 0): (*NO_LISTS, []),
    ("stages", 0, "file"): (None, 1, "other.onnx", "../stage_0.onnx"),
    ("stages", 0, "channels"): (*NO_SIZES, 0, 10**9),
    ("stages", 0, "macs"): BUT_NULL,
    ("stages", 0, "values"): (*NO_LISTS, [], [1]),
    ("stages", 0, "values", 0, "rows"): NO_SIZES,
    ("stages", 0, "values", 0, "shape"): (*NO_LISTS, [], [8, -1, 14], [8, 14, 10**9]),
    ("stages", 0, "values", 0, "dtype"): (None, 1, "int8"),
    GATE: NO_LISTS[:3],
    (*GATE, "file"): (None, 1, "other.onnx"),
    (*GATE, "forward_threshold"): (*NO_COSTS, 2.0),
    (*GATE, "repeats_last"): ("no", None, 1, []),
    (*GATE, "macs"): BUT_NULL,
    (*GATE, "initial_state"): (*NO_LISTS, [], [1]),
    (*STATE, "shape"): (*NO_LISTS, [], [-1], [10**9], [10**5, 10**5]),
    (*STATE, "value"): (*NO_NUMBERS, NAN, MANY),
    ("head",): NO_LISTS[:3],
    ("head", "file"): (None, 1, "other.onnx"),
    ("head", "macs"): BUT_NULL,
    ("sha256",): NO_LISTS,
    ("sha256", "head.onnx"): (None, 1, [], "0"),
}


def named(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)[1:]


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("path", BAD, ids=named)
def test_nonsense_in_the_manifest_is_refused(folder: Path, path: tuple[str | int, ...]) -> None:
    text = (folder / "manifest.json").read_text()
    optional = path[-1] in ("mean", "std", "class_names", "termination", "macs")
    for value in (*BAD[path], "dropped"):
        edit(folder, *path, value=value, drop=value == "dropped" and not isinstance(path[-1], int))
        with pytest.raises(DynskipOnnxError) as caught:
            dynskip_onnx.load(folder)
        assert len(str(caught.value)) < 500
        (folder / "manifest.json").write_text(text)
    if optional:
        edit(folder, *path)
        dynskip_onnx.load(folder, threads=1).clip(FRAMES)


@pytest.mark.parametrize("path", [(*GATE, "forward_threshold"), ("termination", "threshold"), ("stages", 0, "macs")])
def test_the_message_names_the_entry_and_its_value(folder: Path, path: tuple[str | int, ...]) -> None:
    edit(folder, *path, value="x" * 10**6)
    with pytest.raises(DynskipOnnxError) as caught:
        dynskip_onnx.load(folder)
    assert f"'{named(path)}'" in str(caught.value)
    assert "'xxx" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_rows_that_a_graph_does_not_give_are_refused(folder: Path) -> None:
    edit(folder, "stages", 0, "values", 0, "rows", value=2)
    runner = dynskip_onnx.load(folder, threads=1)
    runner._bounds[:] = -1e9  # all frames go forward
    with pytest.raises(DynskipOnnxError, match=r"stage_0\.onnx' gave 1 rows for 1 frames.*says 2"):
        runner.clip(FRAMES)


def test_a_manifest_that_nests_without_end_is_refused(folder: Path) -> None:
    (folder / "manifest.json").write_text("[" * 10**6)
    with pytest.raises(DynskipOnnxError, match="no manifest"):
        dynskip_onnx.load(folder)


@pytest.mark.parametrize("value", [0, 0.0, -2, INF, -INF])
def test_states_may_start_from_any_number(folder: Path, value: float) -> None:
    edit(folder, *STATE, "value", value=value)
    dynskip_onnx.load(folder, threads=1).clip(FRAMES)


# Frames


@pytest.mark.parametrize("shape", [(), (2,), (2, 1)])
def test_normalise_takes_bytes_and_floats_from_0_to_1(exported: Path, shape: tuple[int, ...]) -> None:
    runner = dynskip_onnx.load(exported, threads=1)
    frames = np.random.default_rng(1).integers(0, 256, (*shape, SIZE, SIZE, 3), dtype=np.uint8)
    wanted = np.moveaxis((frames / 255 - MEAN) / STD, -1, -3)
    for given in (frames, frames / 255, (frames / 255).astype(np.float32)):
        made = runner.normalise(given)
        assert made.dtype == np.float32
        np.testing.assert_array_equal(made, runner.normalise(frames))
        np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("change", [
    lambda f: f.astype(np.uint16) * 257,
    lambda f: f.astype(np.int64),
    lambda f: f > 0,
    lambda f: f.astype(object),
    lambda f: f.astype(np.float32),
    lambda f: f / -255,
    lambda f: f * np.nan,
    lambda f: np.moveaxis(f, -1, 1),
    lambda f: f[:, :-1],
    lambda f: f[..., :1],
    lambda f: f[0, 0],
    lambda f: f[0, 0, 0, 0],
    lambda f: "frames",
])  # fmt: skip
def test_normalise_refuses_all_else(exported: Path, change: Callable[[Any], Any]) -> None:
    runner = dynskip_onnx.load(exported, threads=1)
    with pytest.raises(DynskipOnnxError, match="floats"):
        runner.normalise(change(np.full((2, SIZE, SIZE, 3), 255, np.uint8)))


@pytest.mark.parametrize("options", [
    {"std": [0.0] * 3}, {"std": [-1.0] * 3}, {"std": [NAN] * 3}, {"mean": [INF] * 3}, {"class_names": "abcd"},
    {"class_names": [1, 2, 3, 4]},
])  # fmt: skip
def test_what_load_would_refuse_is_not_exported(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(DynskipError, match=f"`{next(iter(options))}` is"):
        small_model().export(tmp_path / "x", SIZE, **options)
    assert not (tmp_path / "x").exists()
