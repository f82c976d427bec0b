"""Gates that need no training, around a finished timm classifier."""

from __future__ import annotations

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
    name: str, weights: str | Path = "hub", size: int | None = None, frames: int = 16, distance: float = 0.003
) -> StopOrForward:
    """Build a model of which frames much like the last used one stop after the first stage.

    Args:
        name: a timm model.
        weights: `"hub"` downloads timm's, or a file.
        size: height and width of the frames in pixels; by default the model's own.
        frames: frames of a video.
        distance: stop frames this close to the last used one.

    Returns:
        The model in eval mode, with preprocessing and class names: ImageNet's, or numbers.

    Raises:
        DynskipError: if the model is unknown or cannot be cut, or the weights do not fit.
    """
    input_size = None if size is None else (3, size, size)
    backbone = stage_model(name, input_size=input_size, pretrained=weights == "hub")
    network: Any = backbone.model
    if weights != "hub" and not load_weights(network, weights):
        raise DynskipError(f"{weights} has another number of classes than timm's {name}.")
    first, *others = backbone.num_features
    model = StopOrForward(backbone, [SimilarityGate(first, distance), *(FixedGate() for _ in others)])
    info, count = ImageNetInfo(), backbone.num_classes
    known = count == info.num_classes()
    model.class_names = [info.index_to_description(i) if known else f"class {i}" for i in range(count)]
    mean, std = (tuple(network.pretrained_cfg[key]) for key in ("mean", "std"))
    model.preprocessing = Preprocessing(backbone.input_size[-1], frames, mean, std).to_dict()
    return model.eval()
