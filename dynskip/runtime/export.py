"""Write a model as files that run without it: one graph a stage, gate and head, and a manifest for the control loop."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

import dynskip
from dynskip.backbone import Carry, StagedBackbone
from dynskip.backbone.carry import count_samples, flatten, restore
from dynskip.errors import DynskipError
from dynskip.terminate import EarlyTerminator

if TYPE_CHECKING:
    from dynskip.wrapper import StopOrForward

VERSION = 1  # of the manifest; raise it when readers have to change


@torch.no_grad()
def export(
    model: StopOrForward,
    folder: str | Path,
    image_size: int | tuple[int, int],
    *,
    format: Literal["onnx", "torch"] = "onnx",
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Path:
    """Write every stage (with its pooling), gate and the head as graphs for any batch size, with a manifest.

    ONNX files are run by the module `dynskip_onnx`, which needs no torch; `torch.export.load` reads the others.

    Args:
        model: the model, in float32; it is exported in eval mode and stays as it is.
        folder: new or empty folder to write to.
        image_size: `(H, W)` of the frames, or one number for squares.
        format: `"onnx"`, or `"torch"` for `.pt2` files of `torch.export`.
        class_names: name of each class, for the manifest; by default the model's.
        mean: mean of each channel, for frames in [0, 1], that normalisation subtracts; by default as the model's
            `preprocessing` says.
        std: standard deviation of each channel that normalisation divides by; by default likewise.

    Returns:
        The folder.

    Raises:
        DynskipError: if a part cannot be exported, or a value does not fit the model; the message names it.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    folder = Path(folder)
    preprocessing = model.preprocessing or {}
    class_names = model.class_names if class_names is None else class_names
    mean = preprocessing.get("mean") if mean is None else mean
    std = preprocessing.get("std") if std is None else std
    _check(model, folder, format, class_names, mean, std)
    folder.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(model).cpu().eval()
    writer = _Writer(folder, format)
    stages, carry = _write_stages(model, writer, size)
    writer.write("head", _Head(model.backbone, carry), carry, ["logits"])
    lookup, terminator = model.lookup_for(size), model.terminator
    manifest = {
        "format": f"dynskip-{format}",
        "version": VERSION,
        "made_with": {"torch": torch.__version__, "dynskip": dynskip.__version__},
        "input": {"shape": [model.backbone.input_size[0], *size], "mean": _floats(mean), "std": _floats(std)},
        "num_classes": model.backbone.num_classes,
        "class_names": list(class_names) if class_names is not None else None,
        "state_update": model.state_update,
        "termination": terminator
        and {"threshold": float(terminator.threshold), "min_frames": int(terminator.min_frames)},
        "unit": lookup.unit,
        "stages": [
            {**stage, "macs": macs, "gate": {**stage["gate"], "macs": gate_macs}}
            for stage, macs, gate_macs in zip(stages, lookup.per_stage.tolist(), lookup.gates.tolist(), strict=True)
        ],
        "head": {"file": writer.name("head"), "macs": lookup.head},
        "sha256": writer.hashes,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return folder


def _write_stages(model: StopOrForward, writer: _Writer, size: tuple[int, int]) -> tuple[list[dict[str, Any]], Carry]:
    backbone = model.backbone
    generator = torch.Generator().manual_seed(0)
    carry = backbone.start(torch.randn(2, backbone.input_size[0], *size, generator=generator))
    stages = []
    for n, gate in enumerate(model.gates):
        entering, carry = carry, backbone.run(n, carry)
        values = list(flatten(carry.values, carry.kinds))
        writer.write(f"stage_{n}", _Stage(backbone, n, entering), entering, ["pooled", *_names("out", len(values))])
        # Cloned, for a gate may hand out one tensor of zeros twice, and a graph would take it for one input.
        state = [s.clone() for s in gate.initial_state(2)]
        inputs = Carry((backbone.pool(n, carry), *state), (("rows", 1),) * (1 + len(state)), 2)
        writer.write(f"gate_{n}", _Gate(gate), inputs, ["logits", *_names("out", len(state))])
        stages.append(
            {
                "name": backbone.stage_names[n],
                "file": writer.name(f"stage_{n}"),
                "layout": backbone.layouts[n],
                "channels": backbone.num_features[n],
                "values": [_describe(tensor, rows) for tensor, rows in values],
                "gate": {
                    "file": writer.name(f"gate_{n}"),
                    "forward_threshold": model.forward_threshold[n],
                    "repeats_last": model.repeats[n],
                    "initial_state": [_fill(s, n) for s in gate.initial_state(1)],
                },
            }
        )
    return stages, carry


class _Flat(nn.Module):
    """A part of the model as a function of the flat tensors that enter it."""

    def __init__(self, carry: Carry) -> None:
        super().__init__()
        self.carry = carry
        self.rows = [rows for _, rows in flatten(carry.values, carry.kinds)]

    def entering(self, tensors: tuple[Tensor, ...]) -> Carry:
        # Numbers that grow with the batch are worked out anew from the rows that came.
        batch = count_samples(zip(tensors, self.rows, strict=True))
        values = restore(self.carry.values, self.carry.kinds, iter(tensors), batch)
        return Carry(values, self.carry.kinds, batch)


class _Stage(_Flat):
    def __init__(self, backbone: StagedBackbone, stage: int, carry: Carry) -> None:
        super().__init__(carry)
        self.backbone, self.stage = backbone, stage

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        carry = self.backbone.run(self.stage, self.entering(tensors))
        return self.backbone.pool(self.stage, carry), *(t.clone() for t, _ in flatten(carry.values, carry.kinds))


class _Head(_Flat):
    def __init__(self, backbone: StagedBackbone, carry: Carry) -> None:
        super().__init__(carry)
        self.backbone = backbone

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return (self.backbone.head(self.entering(tensors)),)


class _Gate(nn.Module):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        pooled, *state = tensors
        logits, new_state = self.gate(pooled, tuple(state))
        return logits, *new_state


class _Writer:
    """Exports parts into a folder and remembers their hashes."""

    def __init__(self, folder: Path, format: Literal["onnx", "torch"]) -> None:
        self.folder = folder
        self.format = format
        self.hashes: dict[str, str] = {}

    def name(self, part: str) -> str:
        return part + (".onnx" if self.format == "onnx" else ".pt2")

    def write(self, part: str, module: nn.Module, entering: Carry, outputs: list[str]) -> None:
        flat = list(flatten(entering.values, entering.kinds))
        batch = torch.export.Dim("batch", min=1)
        shapes = tuple({0: batch if rows == 1 else rows * batch} if rows else None for _, rows in flat)
        path = self.folder / self.name(part)
        try:
            program = torch.export.export(module.eval(), tuple(t for t, _ in flat), dynamic_shapes=(shapes,))
            if self.format == "torch":
                torch.export.save(program, path)
            else:
                names = _names("in", len(flat))
                torch.onnx.export(
                    program, (), path, input_names=names, output_names=outputs, external_data=False, verbose=False
                )
        except Exception as error:
            raise DynskipError(
                f"The part {part!r} cannot be exported for any batch size: {type(error).__name__}: {error}. Choose "
                "other boundaries, so that code that depends on the batch size lies inside another part, or replace "
                "the operation that the message names."
            ) from error
        self.hashes[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()


def _names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}_{i}" for i in range(count)]


def _describe(tensor: Tensor, rows: int) -> dict[str, Any]:
    shape = list(tensor.shape[1:]) if rows else list(tensor.shape)
    return {"rows": rows, "shape": shape, "dtype": str(tensor.dtype).removeprefix("torch.")}


def _fill(state: Tensor, stage: int) -> dict[str, Any]:
    value = float(state.flatten()[0])
    if not bool((state == value).all()):
        raise DynskipError(
            f"Gate {stage} starts from a state that is not one number everywhere, which the manifest cannot hold. "
            "Let `initial_state` return zeros and add what is learned inside the gate's forward."
        )
    return {"shape": list(state.shape[1:]), "value": value}


def _floats(values: Sequence[float] | None) -> list[float] | None:
    return [float(value) for value in values] if values is not None else None


def _check(
    model: StopOrForward,
    folder: Path,
    format: str,
    class_names: Sequence[str] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> None:
    if format not in ("onnx", "torch"):
        raise DynskipError(f"format={format!r} is unknown; use 'onnx' or 'torch'.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DynskipError(f"{folder} is no empty folder. Name a new one, so that nothing is mixed or overwritten.")
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if dtypes - {torch.float32}:
        raise DynskipError(f"Only float32 models are exported; this one has {dtypes}. Export model.float().")
    if model.terminator is not None and type(model.terminator) is not EarlyTerminator:
        raise DynskipError(
            f"The rule of a {type(model.terminator).__name__} cannot be written down. Set model.terminator to an "
            "EarlyTerminator or to None."
        )
    classes, channels = model.backbone.num_classes, model.backbone.input_size[0]
    if class_names is not None and len(class_names) != classes:
        raise DynskipError(f"Got {len(class_names)} class names for {classes} classes; give one for each.")
    for what, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != channels:
            raise DynskipError(f"`{what}` has {len(values)} values for {channels} channels; give one for each.")
