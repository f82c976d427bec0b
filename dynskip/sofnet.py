"""SoF-Net (Seon, 2023) from dynskip's parts: the model, its parameter groups and its schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import timm
from timm.models import register_model
from torch import nn

from dynskip.activation import Activation
from dynskip.backbone import StagedBackbone, stage_model
from dynskip.errors import DynskipError
from dynskip.gates import PolicyGate, exponential_temperature
from dynskip.inner import InnerClassifier
from dynskip.terminate import EarlyTerminator
from dynskip.wrapper import StopOrForward


def sofnet(
    backbone: str | StagedBackbone = "resnet50",
    num_classes: int | None = None,
    *,
    hidden: int = 512,
    temporal: Literal["lstm"] | None = "lstm",
    guidance: bool = True,
    detach_inner: bool = True,
    forward_bias: float = 3.0,
    threshold: float | None = 0.999,
    min_frames: int = 3,
    state_update: Literal["used", "reached"] = "used",
    activation: Activation = "softmax",
    **timm_kwargs: Any,
) -> StopOrForward:
    """Build SoF-Net: a gate after every stage of a backbone, inner classifiers, early termination.

    Args:
        backbone: a timm model name, or a backbone from `stage_model`.
        num_classes: number of classes; by default the backbone's own.
        hidden: width of the gates.
        temporal: `"lstm"`, or `None` for gates without memory.
        guidance: add the inner classifiers that the policy guidance loss needs.
        detach_inner: the inner classifiers' loss does not change the gates' memory; with `False` it does, which made
            gates learn faster in the demo of `examples/sofnet_activitynet.py`.
        forward_bias: see `PolicyGate`.
        threshold: probability that ends a video early; `None` reads every frame.
        min_frames: the frames that are always read before a video can end.
        state_update: which frames advance the gates' memory, see `StopOrForward`.
        activation: how logits become probabilities, see `StopOrForward`.
        **timm_kwargs: passed to `timm.create_model` (`pretrained`, `drop_rate`, ...).

    Returns:
        The model.

    Raises:
        DynskipError: if the backbone is unknown or has another number of classes.

    Reference:
        Seon, "Dynamic layer skipping for efficient action recognition", M.S. thesis, Seoul National University, 2023.
    """
    if isinstance(backbone, str):
        if num_classes is not None:
            timm_kwargs["num_classes"] = num_classes
        backbone = stage_model(backbone, **timm_kwargs)
    elif timm_kwargs:
        raise DynskipError(f"{sorted(timm_kwargs)} are arguments for a backbone made by name; got one already staged.")
    classes = backbone.num_classes
    if num_classes not in (None, classes):
        raise DynskipError(
            f"The backbone's head has {classes} classes and num_classes={num_classes}. Build the backbone with as many "
            "classes as the task has."
        )
    weight = next(backbone.parameters())
    gates = [PolicyGate(c, hidden, temporal, forward_bias).to(weight) for c in backbone.num_features]
    inner = [InnerClassifier(hidden, classes, detach_inner).to(weight) for _ in gates] if guidance else None
    terminator = EarlyTerminator(threshold, min_frames) if threshold is not None else None
    return StopOrForward(backbone, gates, inner, terminator, state_update=state_update, activation=activation)


@register_model
def resnet50_v1(pretrained: bool = False, **timm_kwargs: Any) -> nn.Module:
    """Build ResNet-50 as first published, with its strides in the 1x1 convolutions.

    The first published weights (Caffe, Keras) need it: they load into timm's `resnet50`, too, and answer wrongly there.
    timm knows it by this name: `stage_model("resnet50_v1", ...)`.

    Args:
        pretrained: must be `False`; load your file with `dynskip.backbone.weights.load_weights`.
        **timm_kwargs: as for timm's `resnet50`.

    Returns:
        The network.

    Raises:
        DynskipError: if published weights are asked for; timm has none.
    """
    if pretrained:
        raise DynskipError("timm has no weights for resnet50_v1. Build it with pretrained=False and load a file.")
    network: Any = timm.create_model("resnet50", **timm_kwargs)
    for layer in (network.layer2, network.layer3, network.layer4):
        layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    return network  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Recipe:
    """The thesis' training schedule. Epochs count from 0; the first `warmup_epochs` train the backbone alone.

    Attributes:
        warmup_epochs: epochs in which every frame is used and gates are not trained.
        joint_epochs: epochs of everything, after the warm-up.
        lr: initial learning rate (SGD).
        lr_drop: joint epoch from which the learning rate is a tenth.
        gate_lr_scale: the gates' learning rate over the backbone's.
        momentum: SGD momentum.
        weight_decay: SGD weight decay.
        temperature: Gumbel-softmax temperature when gates start to train.
        temperature_decay: its exponential decay an epoch.
    """

    warmup_epochs: int = 15
    joint_epochs: int = 60
    lr: float = 1e-3
    lr_drop: int = 30
    gate_lr_scale: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 1e-5
    temperature: float = 5.0
    temperature_decay: float = 0.045

    @property
    def epochs(self) -> int:
        """All epochs, warm-up included."""
        return self.warmup_epochs + self.joint_epochs

    def is_warmup(self, epoch: int) -> bool:
        """Whether the gates are left out in this epoch: call `model(video, dense=True)`."""
        return epoch < self.warmup_epochs

    def lr_at(self, epoch: int) -> float:
        """Learning rate of the backbone in an epoch."""
        return self.lr * (0.1 if epoch - self.warmup_epochs >= self.lr_drop else 1.0)

    def temperature_at(self, epoch: int) -> float:
        """Temperature in an epoch; set it as `model.temperature`."""
        return exponential_temperature(max(epoch - self.warmup_epochs, 0), self.temperature, self.temperature_decay)

    def parameter_groups(self, model: StopOrForward) -> list[dict[str, Any]]:
        """Split a model into the groups that an optimiser takes: the backbone, and gates with inner classifiers."""
        inner = model.inner.parameters() if model.inner is not None else ()
        return [
            {"name": "backbone", "params": list(model.backbone.parameters()), "lr_scale": 1.0},
            {"name": "policy", "params": [*model.gates.parameters(), *inner], "lr_scale": self.gate_lr_scale},
        ]
