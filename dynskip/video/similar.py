"""Gates that need no training, around a finished timm classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo

from dynskip.backbone import stage_model
from dynskip.backbone.weights import load_weights
from dynskip.errors import DynskipError
from dynskip.gates import FixedGate, SimilarityGate
from dynskip.video.preprocessing import Preprocessing
from dynskip.wrapper import StopOrForward


def similarity_model(
    name: str,
    weights: str | Path = "hub",
    size: int | None = None,
    frames: int = 16,
    distance: float = 0.003,
    class_names: Sequence[str] | None = None,
) -> StopOrForward:
    """Build a model of which frames much like the last used one stop after the first stage.

    Args:
        name: a timm model.
        weights: `"hub"` downloads timm's, or a file.
        size: height and width of the frames in pixels; by default the model's own.
        frames: frames of a video.
        distance: stop frames this close to the last used one.
        class_names: the network's classes; by default ImageNet's, or numbers.

    Returns:
        The model in eval mode, with preprocessing and class names.

    Raises:
        DynskipError: if the model is unknown or cannot be cut, or the weights do not fit.
    """
    input_size = None if size is None else (3, size, size)
    own: dict[str, Any] = {"num_classes": len(class_names)} if class_names else {}
    backbone = stage_model(name, input_size=input_size, pretrained=weights == "hub", **own)
    network: Any = backbone.model
    if weights != "hub" and not load_weights(network, weights):
        raise DynskipError(
            f"{weights} does not have {backbone.num_classes} classes. Name those that it has: with `class_names`, "
            "or in similarity_gates.py, a line each, in a file: --class-names FILE."
        )
    first, *others = backbone.num_features
    model = StopOrForward(backbone, [SimilarityGate(first, distance), *(FixedGate() for _ in others)])
    info, count = ImageNetInfo(), backbone.num_classes
    known = count == info.num_classes()
    names = [info.index_to_description(i) if known else f"class {i}" for i in range(count)]
    model.class_names = list(class_names or names)
    mean, std = (tuple(network.pretrained_cfg[key]) for key in ("mean", "std"))
    model.preprocessing = Preprocessing(backbone.input_size[-1], frames, mean, std).to_dict()
    return model.eval()
