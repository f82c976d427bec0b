"""Write a model as files that run without it: one graph a stage, gate and head, and a manifest for the control loop."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import dynskip
from dynskip import rules
from dynskip.backbone import Carry
from dynskip.backbone.carry import count_samples, flatten, restore
from dynskip.consensus import Consensus, Readout, TopKMean
from dynskip.errors import DynskipError, lacks_memory
from dynskip.order import FrameOrder, RandomOrder
from dynskip.terminate import EarlyTerminator

if TYPE_CHECKING:
    from dynskip.wrapper import StopOrForward

VERSION = 2  # of the manifest; raise it when readers have to change


@torch.no_grad()
def export(
    model: StopOrForward,
    folder: str | Path,
    image_size: int | tuple[int, int],
    *,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Path:
    """Write every stage (with its pooling), every gate and the head as ONNX files for any batch size, with a manifest.

    The module `dynskip_onnx` runs them; it needs no torch.

    Args:
        model: the model, in float32. It is exported in eval mode, and stays as it is.
        folder: new or empty folder to write to.
        image_size: `(H, W)` of the frames, or one number for squares.
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
    folder, preprocessing = Path(folder), model.preprocessing or {}
    class_names = model.class_names if class_names is None else class_names
    mean = preprocessing.get("mean") if mean is None else mean
    std = preprocessing.get("std") if std is None else std
    _check(model, folder, class_names=class_names, mean=mean, std=std)
    folder.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(model).cpu().eval()
    stages, head = _write_parts(model, folder, size)
    ends = model.terminator
    manifest = {
        "format": "dynskip-onnx",
        "version": VERSION,
        "made_with": {"torch": torch.__version__, "dynskip": dynskip.__version__},
        "input": {"shape": [model.backbone.input_size[0], *size], "mean": _floats(mean), "std": _floats(std)},
        "num_classes": model.backbone.num_classes,
        "class_names": list(class_names) if class_names is not None else None,
        "activation": model.activation,
        "consensus": describe_consensus(model.consensus),
        "state_update": model.state_update,
        "order": describe_order(model.order),
        "termination": ends and {"threshold": float(ends.threshold), "min_frames": int(ends.min_frames)},
        "unit": model.lookup_for(size).unit,
        "stages": stages,
        "head": head,
        "sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return folder


def _write_parts(
    model: StopOrForward, folder: Path, size: tuple[int, int]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Write the graphs; return what the manifest says of each stage, and of the head."""
    initial_states = [[_fill(state, n) for state in gate.initial_state(1)] for n, gate in enumerate(model.gates)]
    backbone, lookup, stages = model.backbone, model.lookup_for(size), []
    generator = torch.Generator().manual_seed(0)
    carry = backbone.start(torch.randn(2, backbone.input_size[0], *size, generator=generator))
    for n, gate in enumerate(model.gates):
        entering, carry = carry, backbone.run(n, carry)
        values = list(flatten(carry.values, carry.kinds))
        # Cloned, since a gate may return one tensor twice, and a graph would take it for one input.
        state = [s.clone() for s in gate.initial_state(2)]
        for_gate = Carry((backbone.pool(n, carry), *state), (("rows", 1),) * (1 + len(state)), 2)
        stage_part, gate_part = _Part(backbone, partial(_run_stage, n), entering), _Part(gate, _run_gate, for_gate)
        stages.append(
            {
                "name": backbone.stage_names[n],
                "file": _write(folder, f"stage_{n}", stage_part, ["pooled", *_names("out", len(values))]),
                "layout": backbone.layouts[n],
                "channels": backbone.num_features[n],
                "values": [_describe(tensor, rows) for tensor, rows in values],
                "gate": {
                    "file": _write(folder, f"gate_{n}", gate_part, ["logits", *_names("out", len(state))]),
                    "forward_threshold": model.forward_threshold[n],
                    "repeats_last": model.repeats[n],
                    "initial_state": initial_states[n],
                    "macs": _known(lookup.gates[n]),
                },
                "macs": _known(lookup.per_stage[n]),
            }
        )
    parts = nn.ModuleList([backbone, model.consensus])
    outputs = ["logits", "values"][: 2 if model.consensus.embedded_features else 1]
    file = _write(folder, "head", _Part(parts, partial(_run_head, model.readout), carry), outputs)
    return stages, {"file": file, "macs": _known(lookup.head)}


def _run_stage(stage: int, backbone: Any, carry: Carry) -> tuple[Tensor, ...]:
    carry = backbone.run(stage, carry)
    return backbone.pool(stage, carry), *(tensor for tensor, _ in flatten(carry.values, carry.kinds))


def _run_gate(gate: Any, carry: Carry) -> tuple[Tensor, ...]:
    logits, state = gate(carry.values[0], carry.values[1:])
    return logits, *state


def _run_head(readout: Readout, parts: Any, carry: Carry) -> tuple[Tensor, ...]:
    logits = parts[0].head(carry)
    values = rules.embed(readout, logits)
    return (logits,) if values is logits else (logits, values.to(logits.dtype))


class _Part(nn.Module):
    """A part of a module, `run(module, carry)`, as a function of the flat tensors that enter it."""

    def __init__(self, module: nn.Module, run: Callable[[Any, Carry], tuple[Tensor, ...]], entering: Carry) -> None:
        super().__init__()
        self.module, self.run_part, self.carry = module, run, entering
        self.flat = list(flatten(entering.values, entering.kinds))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        # Numbers that grow with the batch follow from the rows that came.
        batch = count_samples((tensor, rows) for tensor, (_, rows) in zip(tensors, self.flat, strict=True))
        values = restore(self.carry.values, self.carry.kinds, iter(tensors), batch)
        # Cloned, since torch 2.8 gives an input that is an output too the output's name.
        return tuple(t.clone() for t in self.run_part(self.module, Carry(values, self.carry.kinds, batch)))


def _write(folder: Path, name: str, part: _Part, outputs: list[str]) -> str:
    """Write a part as an ONNX file for any batch size; return the file's name."""
    file, inputs, batch = f"{name}.onnx", _names("in", len(part.flat)), torch.export.Dim("batch", min=1)
    shapes = tuple({0: batch if rows == 1 else rows * batch} if rows else None for _, rows in part.flat)
    try:
        program = torch.export.export(part.eval(), tuple(t for t, _ in part.flat), dynamic_shapes=(shapes,))
        graph = torch.onnx.export(program, (), input_names=inputs, output_names=outputs, verbose=False)
        assert graph is not None
        # Weights have their types and shapes with them. A second list of these would stop the quantiser of onnxruntime
        # 1.24.1, which transposes weights and leaves that list as it is.
        for weight in graph.model.graph.initializers.values():
            weight.type = weight.shape = None
        graph.save(folder / file, external_data=False)
    except Exception as error:
        if lacks_memory(error):
            raise
        raise DynskipError(
            f"The part {name!r} cannot be exported for any batch size: {type(error).__name__}: {error}. Choose other "
            "boundaries, so that code that depends on the batch size lies inside another part, or replace the "
            "operation that the message names."
        ) from error
    return file


def _names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}_{i}" for i in range(count)]


def _describe(tensor: Tensor, rows: int) -> dict[str, Any]:
    shape = list(tensor.shape[1:]) if rows else list(tensor.shape)
    return {"rows": rows, "shape": shape, "dtype": str(tensor.dtype).removeprefix("torch.")}


def _fill(state: Tensor, stage: int) -> dict[str, Any]:
    """Describe a state before the first frame: one number everywhere."""
    value = float(state.flatten()[0])
    if not bool((state == value).all()):
        raise DynskipError(
            f"Gate {stage} starts from a state that is not one number everywhere, which the manifest cannot hold. "
            "Let `initial_state` return zeros and add what is learned inside the gate's forward."
        )
    return {"shape": list(state.shape[1:]), "value": value}


def describe_order(order: FrameOrder | None) -> dict[str, Any] | None:
    """Name a frame order. The runner knows dynskip's own, and is given others."""
    if order is None:
        return None
    return {"name": _name(order), "seed": order.seed if isinstance(order, RandomOrder) else None}


def describe_consensus(consensus: Consensus) -> dict[str, Any]:
    """Name a consensus. The runner knows dynskip's own, and is given others."""
    return {
        "name": _name(consensus),
        "k": consensus.k if isinstance(consensus, TopKMean) else None,
        "of_probabilities": consensus.of_probabilities,
        "embedded_features": consensus.embedded_features,
    }


def _name(part: nn.Module) -> str:
    cls = type(part)
    own = cls.__module__ in (Consensus.__module__, FrameOrder.__module__)
    return cls.__name__ if own else f"{cls.__module__}.{cls.__qualname__}"


def _known(cost: float | Tensor) -> float | None:
    """Return a cost; `None` where it is unknown, since JSON has no NaN."""
    return None if math.isnan(cost) else float(cost)


def _floats(values: Sequence[float] | None) -> list[float] | None:
    return [float(value) for value in values] if values is not None else None


def _check(model: StopOrForward, folder: Path, **given: Sequence[Any] | None) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DynskipError(f"{folder} is not an empty folder. Name a new one, so that nothing is mixed or overwritten.")
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if dtypes - {torch.float32}:
        raise DynskipError(f"Only float32 models are exported; this one has {dtypes}. Export model.float().")
    if model.terminator is not None and type(model.terminator) is not EarlyTerminator:
        raise DynskipError(
            f"The manifest cannot hold the rule of a {type(model.terminator).__name__}. Set model.terminator to an "
            "EarlyTerminator or to None."
        )
    classes, channels = model.backbone.num_classes, model.backbone.input_size[0]
    for name, values in given.items():
        if values is None:
            continue
        wanted, what = (classes, "classes") if name == "class_names" else (channels, "channels")
        if len(values) != wanted:
            raise DynskipError(f"`{name}` has {len(values)} values for {wanted} {what}; give one for each.")
        if name == "class_names":
            right, kind = not isinstance(values, str) and all(isinstance(v, str) for v in values), "a list of texts"
        else:
            limits = torch.finfo(torch.float32)
            low, kind = (-limits.max, "finite numbers") if name == "mean" else (limits.tiny, "finite numbers above 0")
            right = all(low <= v <= limits.max for v in values)
        if not right:
            raise DynskipError(f"`{name}` is {values!r}; give {kind}.")
