"""SoF-Net (Seon, 2023) from dynskip's parts: the model, its parameter groups and its schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

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
    return StopOrForward(backbone, gates, inner, terminator, state_update=state_update)


def strides_in_1x1(model: nn.Module) -> nn.Module:
    """Move the strides of a bottleneck ResNet into its 1x1 convolutions, where the first published weights have them.

    The weights of Caffe and Keras are made for such a network. The model is changed in place, before or after
    `stage_model` cuts it. A model changed like this cannot be saved with `save_pretrained`.

    Args:
        model: the ResNet-50, or a deeper one, of timm or torchvision; of a staged backbone, `backbone.model`.

    Returns:
        The model.

    Raises:
        DynskipError: if the model has no bottleneck blocks with strides in their 3x3 convolutions.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    blocks = ("layer2.0", "layer3.0", "layer4.0")
    for block in blocks:
        strides = [getattr(modules.get(f"{block}.conv{n}"), "stride", None) for n in (1, 2, 3)]
        if strides != [(1, 1), (2, 2), (1, 1)]:
            raise DynskipError(
                f"{type(model).__name__} has no strides to move: the convolutions of {block} have the strides "
                f"{strides}; expected are those of a bottleneck, (1, 1), (2, 2) and (1, 1). Pass a ResNet-50 or a "
                "deeper one, once; of a staged backbone, pass `backbone.model`."
            )
    for block in blocks:
        modules[f"{block}.conv1"].stride, modules[f"{block}.conv2"].stride = (2, 2), (1, 1)
    return model


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
