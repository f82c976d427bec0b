"""What the wrappers share: settings that are checked, a cost table for each frame size, and checks of their parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynskip._check import Checked, check_lengths, check_positive
from dynskip._modes import in_mode
from dynskip.activation import Activation, check_activation
from dynskip.backbone import StagedBackbone
from dynskip.consensus import Consensus, Readout
from dynskip.errors import DynskipError, lacks_memory
from dynskip.flops import FLOPsLookup
from dynskip.output import EncodedVideo
from dynskip.summary import as_size, one_frame, stage_table
from dynskip.terminate import EarlyTerminator


class Wrapper(Checked):
    """Gates around a backbone: what `StopOrForward` and `EarlyExit` share."""

    gates: Any  # a protocol of its own, which nn.Module hides
    terminator: EarlyTerminator | None
    state_update: str
    consensus: Consensus

    def __init__(
        self,
        backbone: StagedBackbone,
        forward_threshold: float | Sequence[float],
        activation: Activation = "softmax",
        lookup: FLOPsLookup | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.temperature = 1.0
        self.activation: Activation = activation
        self.forward_threshold: Any = forward_threshold  # kept as a tuple, one a gate
        self.class_names: Sequence[str] | None = None
        self.preprocessing: Mapping[str, Any] | None = None
        self._given_lookup = lookup
        self._measured: dict[tuple[int, int], FLOPsLookup] = {}
        self._counted: list[Any] = []  # the layers that they were measured with

    @property
    def deciders(self) -> Any:
        """What decides after each stage: the gates, or what they are part of."""
        return self.gates

    @property
    def repeats(self) -> tuple[bool, ...]:
        """For each gate, whether a frame that it stops counts as the last used one in the video's answer.

        It does where the gate has `repeats_last` and compares frames with the last used one (`state_update="used"`).
        """
        return tuple(self.state_update == "used" and getattr(gate, "repeats_last", False) for gate in self.deciders)

    @property
    def readout(self) -> Readout:
        """How frames make the answers of videos, for `dynskip.rules`."""
        return Readout(self.consensus, self.activation, self.repeats)

    def check_setting(self, name: str, value: Any) -> Any:
        """Refuse settings that make no sense; return thresholds as one a gate."""
        if name == "forward_threshold":
            return _one_a_gate(value, self.backbone.num_stages)
        if name == "activation":
            check_activation(value)
            if (terminator := getattr(self, "terminator", None)) is not None:
                self._suit(terminator, value)
        if name == "temperature":
            return check_positive(value, name)
        if name == "state_update" and value not in ("used", "reached"):
            raise DynskipError(f"state_update={value!r} is unknown; use 'used' or 'reached'.")
        if name == "terminator" and value is not None:
            if not isinstance(value, EarlyTerminator):
                raise DynskipError(
                    f"The terminator is a {type(value).__name__}; give an EarlyTerminator, or a rule derived from it."
                )
            self._suit(value, self.activation)
            value.train(self.training)  # a new part takes the model's mode
        if name == "consensus":
            check_consensus(value, self.backbone)
            value.train(self.training)
        if name == "class_names" and value is not None:
            names = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
            classes = self.backbone.num_classes
            if len(names) != classes or not all(isinstance(each, str) for each in names):
                raise DynskipError(
                    f"`class_names` has {len(names)} entries; give one string for each of {classes} classes."
                )
        if name == "preprocessing" and not isinstance(value, Mapping | None):
            raise DynskipError(
                f"`preprocessing` is a {type(value).__name__}; give a mapping such as {{'input_size': (3, 224, 224)}}."
            )
        return super().check_setting(name, value)

    def _suit(self, terminator: EarlyTerminator, activation: Activation) -> None:
        """Tell the terminator what probabilities it will see."""
        if self.backbone.num_classes < 2 and activation == "softmax":
            raise DynskipError(
                "The model has one output. The softmax of one logit is always 1, so every video would end at once. "
                "Take `activation='sigmoid'`, give the model two outputs, or leave the terminator out."
            )
        terminator.activation = activation

    def lookup_for(self, image_size: tuple[int, int]) -> FLOPsLookup:
        """Return the cost table for frames of a size. An exit's cost is its gate's and its classifier's.

        Where a cost depends on the data, as in a mixture of experts, it is that of one frame of random numbers.

        A table is measured again once a module of the backbone or of a gate has been replaced, or a parameter has
        another shape or dtype. What was made from an earlier table stays as it is: a loss, a session, a stream in
        flight.

        Args:
            image_size: `(H, W)`.

        Returns:
            The table given at construction, or one measured now and kept.

        Raises:
            DynskipError: if the given table was made for another size.
        """
        if (given := self._given_lookup) is not None:
            if given.image_size not in (None, image_size):
                raise DynskipError(
                    "The cost table was made for frames of {}x{}, ".format(*given.image_size)
                    + "and these are {}x{}. Measure one for this size, or leave `lookup` out.".format(*image_size)
                )
            return given
        if (layers := _layers([self.backbone, *self.deciders, self.consensus])) != self._counted:
            self._measured, self._counted = {}, layers
        if (lookup := self._measured.get(image_size)) is None:
            lookup = self._measured[image_size] = FLOPsLookup.measure(
                self.backbone, image_size, self.deciders, self.consensus
            )
        return lookup

    def __prepare_scriptable__(self) -> None:
        self.backbone.__prepare_scriptable__()

    def summary(self, image_size: int | tuple[int, int] | None = None) -> str:
        """Describe the model stage by stage: channels, costs, gates and their rules.

        Args:
            image_size: `(H, W)` to count at, or one number for squares; by default the size at which the backbone was
                cut, or that of the given cost table.

        Returns:
            A table to print; costs are multiply-adds of one frame, as `lookup_for` counts them.
        """
        given = self._given_lookup.image_size if self._given_lookup is not None else None
        lookup = self.lookup_for(as_size(image_size) or given or self.backbone.input_size[1:])
        title = f"{type(self).__name__} around {type(self.backbone.model).__name__}"
        return stage_table(title, self.backbone, list(self.gates), lookup, self.forward_threshold, self._rules())

    def _rules(self) -> list[str]:
        return []

    def extra_repr(self) -> str:
        """Show the thresholds, and what a frame costs where that has been counted."""
        thresholds = self.forward_threshold[:1] if len(set(self.forward_threshold)) == 1 else self.forward_threshold
        tables = [self._given_lookup] if self._given_lookup is not None else list(self._measured.values())
        shown = [f"{threshold:g}" for threshold in thresholds] + [one_frame(table) for table in tables]
        return f"forward_threshold={', '.join(shown)}"


def _layers(modules: list[nn.Module]) -> list[Any]:
    """Return what tells whether a cost table still holds: all modules, and their parameters' shapes and dtypes."""
    found: list[Any] = []
    for module in modules:  # the list grows; `Module.modules()` would take longer, and this is done in every call
        found.append(id(module))
        found += [(p.shape, p.dtype) for p in module._parameters.values() if p is not None]
        modules += [child for child in module._modules.values() if child is not None]
    return found


def _one_a_gate(value: float | Sequence[float], stages: int) -> tuple[float, ...]:
    thresholds = tuple(value) if isinstance(value, Sequence) else (value,) * stages
    if len(thresholds) != stages:
        raise DynskipError(
            f"Got {len(thresholds)} forward thresholds for {stages} gates; give one number or one a gate."
        )
    for n, threshold in enumerate(thresholds):
        if not (isinstance(threshold, int | float) and 0.0 <= threshold <= 1.0):
            raise DynskipError(f"Forward threshold {threshold} of gate {n} is no probability; give one in [0, 1].")
    return thresholds


def check_encoded(encoded: EncodedVideo, backbone: StagedBackbone, frames: int | None = None) -> None:
    """Refuse stored features of another backbone, or of videos with another number of frames."""
    expected, classes = backbone.num_features, encoded.frame_logits.shape[-1]
    shapes = tuple(tuple(pooled.shape) for pooled in encoded.pooled)
    batch, length = encoded.frame_logits.shape[:2]
    wanted = tuple((batch, frames or length, channels) for channels in expected)
    if shapes != wanted or classes != backbone.num_classes or length != (frames or length) or 0 in (batch, length):
        raise DynskipError(
            f"Stored features of shapes {shapes} with {classes} classes are not this backbone's; expected (B, "
            f"{frames or 'T'}, C_n) with C_n = {expected} and {backbone.num_classes} classes. Encode again with this "
            "model."
        )
    check_lengths(encoded.lengths, batch, length)


@torch.no_grad()
def check_parts(
    backbone: StagedBackbone,
    gates: Sequence[Any],
    inner: Sequence[nn.Module] | None,
    lookup: FLOPsLookup | None = None,
    never_asked: Sequence[bool] = (),
) -> None:
    """Try every gate and inner classifier on zeros of its stage's width, and check the cost table's stages.

    `never_asked` says for each inner classifier that nothing asks it, so that it need not fit.
    """
    stages, classes, names = backbone.num_stages, backbone.num_classes, backbone.stage_names
    if len(gates) != stages:
        raise DynskipError(f"Got {len(gates)} gates for {stages} stages; give one gate for each of {names}.")
    if inner is not None and len(inner) != stages:
        raise DynskipError(f"Got {len(inner)} inner classifiers for {stages} gates; give one for each gate, or none.")
    if lookup is not None and (len(lookup.per_stage) != stages or lookup.stage_names not in (None, names)):
        has = lookup.stage_names or f"{len(lookup.per_stage)} unnamed stages"
        raise DynskipError(
            f"The cost table is for another backbone: it has {has}, the backbone {names}. Measure it with "
            "FLOPsLookup.measure(backbone, image_size, gates)."
        )
    weight = next(backbone.parameters(), torch.empty(0))
    for n, (gate, channels) in enumerate(zip(gates, backbone.num_features, strict=True)):
        this = f"Gate {n} ({type(gate).__name__})"
        where = f"after stage {names[n]!r} ({channels} channels)"
        if not issubclass(type(gate), nn.Module):
            raise DynskipError(f"{this} is no nn.Module; a gate is an nn.Module such as PolicyGate.")
        try:
            with in_mode(gate, False):
                logits, state = gate(weight.new_zeros(2, channels), gate.initial_state(2))
        except Exception as error:
            if lacks_memory(error):
                raise
            raise DynskipError(
                f"{this} cannot run {where}: {error}. Build it for {channels} input features, on the backbone's device "
                "and in its dtype."
            ) from error
        if tuple(logits.shape) != (2, 2):
            raise DynskipError(
                f"{this} {where} returned logits of shape {tuple(logits.shape)} for a batch of 2; expected (B, 2): "
                "stop, forward."
            )
        if inner is None:
            continue
        if not isinstance(inner[n], nn.Module):
            raise DynskipError(
                f"Inner classifier {n} is a {type(inner[n]).__name__}; give an nn.Module such as InnerClassifier."
            )
        if not any(never_asked[n : n + 1]):
            _check_classifier(inner[n], state, classes, n, this)


@torch.no_grad()
def check_consensus(consensus: Any, backbone: StagedBackbone) -> None:
    """Try a consensus on one frame of each of two videos."""
    this, classes = f"The consensus ({type(consensus).__name__})", backbone.num_classes
    if not isinstance(consensus, Consensus):
        raise DynskipError(f"{this} is no Consensus; give one such as MeanOfLogits(), or your own subclass.")
    weight, width = next(backbone.parameters(), torch.empty(0)), consensus.embedded_features or classes
    values = weight.new_full((2, classes), 0.5)
    try:
        with in_mode(consensus, False):
            values = consensus.embed(values) if consensus.embedded_features else values
            before = consensus.initial(weight.new_zeros(2, classes, dtype=torch.float64))
            nothing = consensus.answer(before)
            after = consensus.add(before, values.double())
            answer = consensus.answer(after)
    except Exception as error:
        if lacks_memory(error):
            raise
        raise DynskipError(
            f"{this} cannot run on logits of {classes} classes: {error}. Build it for {classes} classes, on the "
            "backbone's device and in its dtype."
        ) from error
    shapes = [[(tuple(part.shape), part.dtype) for part in state] for state in (before, after)]
    if tuple(values.shape) != (2, width):
        wrong = f"`embed` gave {tuple(values.shape)} for 2 frames; `embedded_features` says (2, {width})"
    elif shapes[0] != shapes[1] or any(len(part) != 2 for part in before):
        wrong = (
            f"states of 2 videos have to keep shapes (2, ...) and dtypes; from {shapes[0]}, `add` went to {shapes[1]}"
        )
    elif not all(part.is_floating_point() and part.isfinite().all() for part in (*before, *after)):
        wrong = "states have to be finite floating-point numbers, since training goes part of the way between two"
    elif any(tuple(each.shape) != (2, classes) for each in (nothing, answer)):
        wrong = f"`answer` gave {tuple(answer.shape)} for 2 videos; expected (B, K) = (2, {classes})"
    elif not nothing.isnan().all() or not answer.isfinite().all():
        wrong = "`answer` has to be NaN before the first frame, as 0 / 0 is, and finite after it"
    else:
        return
    raise DynskipError(f"{this} does not keep the contract of `dynskip.Consensus`: {wrong}.")


def _check_classifier(classifier: nn.Module, state: tuple[Tensor, ...], classes: int, n: int, gate: str) -> None:
    if not state:
        raise DynskipError(
            f"{gate} has no hidden state for an inner classifier to read. Let its state begin with one, or leave "
            "`inner` out."
        )
    try:
        answer = classifier(state[0])
    except Exception as error:
        if lacks_memory(error):
            raise
        raise DynskipError(
            f"Inner classifier {n} does not fit gate {n}, whose hidden state has {state[0].shape[-1]} features: "
            f"{error}."
        ) from error
    if answer.shape[-1] != classes:
        raise DynskipError(
            f"Inner classifier {n} has {answer.shape[-1]} classes and the backbone's head {classes}; make them equal."
        )
