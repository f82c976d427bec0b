"""Checks of how a wrapper's parts and settings fit one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynskip._check import check_positive
from dynskip._modes import in_mode
from dynskip.backbone import StagedBackbone
from dynskip.errors import DynskipError
from dynskip.flops import FLOPsLookup
from dynskip.output import EncodedVideo
from dynskip.terminate import EarlyTerminator


def check_encoded(encoded: EncodedVideo, backbone: StagedBackbone, frames: int | None = None) -> None:
    """Refuse stored features of another backbone, or of videos with another number of frames."""
    expected = backbone.num_features
    shapes = tuple(tuple(pooled.shape) for pooled in encoded.pooled)
    batch_frames = tuple(encoded.frame_logits.shape[:2])
    wanted = tuple((*batch_frames, channels) for channels in expected)
    classes = encoded.frame_logits.shape[-1]
    if (
        shapes != wanted
        or classes != backbone.num_classes
        or 0 in batch_frames
        or batch_frames[1] != (frames or batch_frames[1])
    ):
        raise DynskipError(
            f"Stored features of shapes {shapes} with {classes} classes are not this backbone's; expected (B, "
            f"{frames or 'T'}, C_n) with C_n = {expected} and {backbone.num_classes} classes. Encode again with this "
            "model."
        )


def check_noise(noise: Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse noise that is not one pair for each gate and frame."""
    if noise is not None and noise.shape != shape:
        raise DynskipError(f"The noise has shape {tuple(noise.shape)}; expected (B, T, N, 2) = {shape}.")


def check_wrapper_setting(model: Any, name: str, value: Any) -> Any:
    """Refuse a setting of a wrapper that makes no sense; thresholds become one a gate."""
    if name == "forward_threshold":
        return check_thresholds(value, model.backbone.num_stages)
    if name == "temperature":
        return check_positive(value, name)
    if name == "state_update" and value not in ("used", "reached"):
        raise DynskipError(f"state_update={value!r} is unknown; use 'used' or 'reached'.")
    if name == "terminator" and value is not None:
        if not isinstance(value, EarlyTerminator):
            raise DynskipError(
                f"The terminator is a {type(value).__name__}; give an EarlyTerminator, or a rule derived from it."
            )
        if model.backbone.num_classes < 2:
            raise DynskipError(
                "The model has one output, and the softmax of one logit is 1 whatever it says, so that every video "
                "would end at once. Give the model two outputs, or leave the terminator out (`threshold=None`)."
            )
        value.train(model.training)  # a new part takes the model's mode
    if name == "class_names" and value is not None:
        names = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
        classes = model.backbone.num_classes
        if len(names) != classes or not all(isinstance(each, str) for each in names):
            raise DynskipError(
                f"`class_names` has {len(names)} entries; give one string for each of {classes} classes."
            )
    return value


def check_thresholds(value: float | Sequence[float], stages: int) -> tuple[float, ...]:
    """Return one forward threshold a gate."""
    thresholds = tuple(value) if isinstance(value, Sequence) else (value,) * stages
    if len(thresholds) != stages:
        raise DynskipError(
            f"Got {len(thresholds)} forward thresholds for {stages} gates; give one number or one a gate."
        )
    for n, threshold in enumerate(thresholds):
        if not (isinstance(threshold, int | float) and 0.0 <= threshold <= 1.0):
            raise DynskipError(f"Forward threshold {threshold} of gate {n} is no probability; give one in [0, 1].")
    return thresholds


@torch.no_grad()
def check_parts(backbone: StagedBackbone, gates: Sequence[Any], inner: Sequence[nn.Module | None] | None) -> None:
    """Try every gate and inner classifier on zeros of its stage's width."""
    stages, classes = backbone.num_stages, backbone.num_classes
    if len(gates) != stages:
        raise DynskipError(
            f"Got {len(gates)} gates for {stages} stages; give one gate for each of {backbone.stage_names}."
        )
    if inner is not None and len(inner) != stages:
        raise DynskipError(f"Got {len(inner)} inner classifiers for {stages} gates; give one for each gate, or none.")
    weight = next(backbone.parameters(), torch.empty(0))
    for n, (gate, channels) in enumerate(zip(gates, backbone.num_features, strict=True)):
        where = f"after stage {backbone.stage_names[n]!r} ({channels} channels)"
        try:
            with in_mode(gate, False):
                logits, state = gate(weight.new_zeros(2, channels), gate.initial_state(2))
        except Exception as error:
            raise DynskipError(
                f"Gate {n} ({type(gate).__name__}) cannot run {where}: {error}. Build it for {channels} input "
                "features, on the backbone's device and in its dtype."
            ) from error
        if tuple(logits.shape) != (2, 2):
            raise DynskipError(
                f"Gate {n} ({type(gate).__name__}) {where} returned logits of shape {tuple(logits.shape)} for a "
                "batch of 2; expected (B, 2): stop, forward."
            )
        classifier = None if inner is None else inner[n]
        if classifier is None:
            continue
        if not state:
            raise DynskipError(
                f"Gate {n} ({type(gate).__name__}) has no hidden state for an inner classifier to read. "
                "Let its state begin with one, or leave `inner` out."
            )
        try:
            answer = classifier(state[0])
        except Exception as error:
            raise DynskipError(
                f"Inner classifier {n} does not fit gate {n}, whose hidden state has {state[0].shape[-1]} features: "
                f"{error}."
            ) from error
        if answer.shape[-1] != classes:
            raise DynskipError(
                f"Inner classifier {n} has {answer.shape[-1]} classes and the backbone's head {classes}; make them "
                "equal."
            )


def check_lookup(backbone: StagedBackbone, lookup: FLOPsLookup | None) -> None:
    if lookup is None:
        return
    if len(lookup.per_stage) != backbone.num_stages or lookup.stage_names not in (None, backbone.stage_names):
        names = lookup.stage_names or f"{len(lookup.per_stage)} unnamed stages"
        raise DynskipError(
            f"The cost table is for another backbone: it has {names}, the backbone {backbone.stage_names}. Measure it "
            "with FLOPsLookup.measure(backbone, image_size, gates)."
        )
