"""Stored features of a frozen backbone.

A data set is encoded once; then gates are trained on its features in seconds an epoch:

    features = encode_clips(model, clips, Path("features/train"))   # minutes, once; goes on where it was stopped
    fit_classifier(model, features, targets)                        # where the data have classes of their own
    output = model.decide(features.rows(model, slice(0, 64)))       # as if the videos had been run
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from dynskip.activation import Activation
from dynskip.errors import DynskipError
from dynskip.losses import classification_loss
from dynskip.output import EncodedVideo
from dynskip.video.cache import DECODING
from dynskip.video.clips import Batch, Clips, collate, padded
from dynskip.video.loading import BatchLoader
from dynskip.video.names import stamp
from dynskip.video.outputs import cannot_write, check_folders
from dynskip.wrapper import StopOrForward

VIDEOS_A_FILE = 32  # as many can be lost when encoding is interrupted


@dataclass
class StoredFeatures:
    """Features of all frames of `V` videos.

    Attributes:
        pooled: for each of `N` stages `(V, T, C_n)` pooled features.
        embedding: `(V, T, D)` what the classifier, the network's last layer, reads.
        positions: `(V,)` place of each video in the data set; unreadable ones are left out.
        image_size: `(H, W)` of the frames in pixels.
        lengths: `(V,)` frames of each video, where they differ and features are padded with zeros; else `None`.
    """

    pooled: tuple[Tensor, ...]
    embedding: Tensor
    positions: Tensor
    image_size: tuple[int, int]
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def rows(self, model: StopOrForward, rows: Tensor | slice) -> EncodedVideo:
        """Return some videos as `StopOrForward.decide` takes them, with logits of the model's present classifier."""
        device = next(model.backbone.parameters()).device
        pooled = tuple(features[rows].to(device) for features in self.pooled)
        lengths = None if self.lengths is None else self.lengths[rows].to(device)
        return EncodedVideo(pooled, classifier(model)(self.embedding[rows].to(device)), self.image_size, lengths)

    def means(self) -> Tensor:
        """Return the mean embedding of each video, `(V, D)`."""
        # Padding is zeros.
        return self.embedding.mean(1) if self.lengths is None else self.embedding.sum(1) / self.lengths[:, None]


def classifier(model: StopOrForward) -> nn.Module:
    """Return the network's last layer, from an embedding to logits, as timm's models tell it."""
    network: Any = model.backbone.model
    last: nn.Module = network.get_classifier()
    return last


@torch.no_grad()
def encode_clips(model: StopOrForward, clips: Clips, folder: Path, workers: int = 0, epoch: int = 0) -> StoredFeatures:
    """Return the features of videos: read from a folder, or made now and written to it.

    Args:
        model: the model, on the device to encode on; only its backbone is used. It is set to eval mode.
        clips: videos as evaluation sees them; or in training, drawn at random, each time as in one epoch.
        folder: where the features are kept, a file for every `VIDEOS_A_FILE` videos.
        workers: processes that decode videos.
        epoch: which draws of clips in training are encoded. Other draws give other variants of the videos, each with a
            folder of its own.

    Returns:
        The features. A warning lists videos that cannot be read.

    Raises:
        DynskipError: if the folder holds features of another network, preprocessing, videos or draws, a file is damaged
            or cannot be written, or no video can be read.
    """
    made_from = _made_from(model.eval(), clips, epoch)
    positions = range(len(clips))
    files = {
        folder / f"{start:06d}.safetensors": positions[start : start + VIDEOS_A_FILE]
        for start in positions[::VIDEOS_A_FILE]
    }
    new = {file for file in files if not file.exists()}
    missing = [(epoch, position) for file, own in files.items() if file in new for position in own]
    numbers = len(missing) * clips.prep.num_frames * sum(model.backbone.num_features)
    check_folders(folder, needed=4 * numbers)
    # One loader for all files, so that processes that decode are started once.
    loader = BatchLoader(clips, [[key] for key in missing], collate, clips.prep.clip_bytes, workers)
    batches, read = iter(loader), []
    with tqdm(total=len(clips), desc=f"encode {folder.name}", leave=False, disable=None) as progress:
        for file, own in files.items():
            if file in new:
                _write(file, *_encode(model, clips, islice(batches, len(own))), made_from)
            read.append(_read(file, made_from))
            progress.update(len(own))
    if errors := [error for _, found in read for error in found]:
        warnings.warn(f"{len(errors)} videos cannot be read and are left out:\n  " + "\n  ".join(errors), stacklevel=2)
    parts = [tensors for tensors, _ in read if len(tensors["positions"])]
    if not parts:
        raise DynskipError("None of the videos could be read, so there are no features.")
    # Files of earlier versions have no lengths: their videos are all of the same length.
    for part in parts:
        part.setdefault("lengths", torch.full_like(part["positions"], part["embedding"].shape[1]))
    lengths = torch.cat([part["lengths"] for part in parts])
    frames, size = int(lengths.max()), clips.prep.size

    def join(name: str) -> Tensor:
        return torch.cat([F.pad(part[name], (0, 0, 0, frames - part[name].shape[1])) for part in parts])

    pooled = tuple(join(f"pooled_{n}") for n in range(model.backbone.num_stages))
    places = torch.cat([part["positions"] for part in parts])
    different = lengths if int(lengths.min()) < frames else None
    return StoredFeatures(pooled, join("embedding"), places, (size, size), different)


def fit_classifier(model: StopOrForward, features: StoredFeatures, targets: Tensor, weight_decay: float = 0.03) -> None:
    """Fit the classifier to the frozen embedding of whole videos, every frame used, as a dense TSN has it.

    The mean of a linear layer's logits is the layer on the mean embedding, so this is a logistic regression over
    videos, which has one solution.

    Args:
        model: its classifier has to be a linear layer.
        features: of the training videos.
        targets: `(V,)` class indices, or `(V, K)` rows, as `dynskip.losses` takes them.
        weight_decay: strength of the L2 penalty on the weights.

    Raises:
        DynskipError: if the classifier is no linear layer.
    """
    layer = classifier(model)
    if not isinstance(layer, nn.Linear):
        raise DynskipError(f"The classifier is a {type(layer).__name__}; only a linear one can be fitted to features.")
    fit_linear(layer, features.means(), targets, weight_decay, model.activation)


def fit_linear(
    layer: nn.Linear, inputs: Tensor, targets: Tensor, weight_decay: float, activation: Activation = "softmax"
) -> None:
    """Fit a layer to `(M, D)` inputs by logistic regression, targets as in `fit_classifier`, from weights of zero."""
    inputs, targets = inputs.to(layer.weight), targets.to(layer.weight.device)
    parameters = [parameter.requires_grad_() for parameter in layer.parameters()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = classification_loss(layer(inputs), targets, activation) + weight_decay / 2 * layer.weight.square().sum()
        value.backward()
        return value

    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    with torch.enable_grad():
        optimizer.step(loss)
    layer.zero_grad()


def _encode(model: StopOrForward, clips: Clips, batches: Iterable[Batch]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors to store of some videos, and why others cannot be read."""
    device = next(model.backbone.parameters()).device
    embeddings: list[Tensor] = []  # of each video, as the loader gives one at a time
    hook = classifier(model).register_forward_pre_hook(lambda _, inputs: embeddings.append(inputs[0]))
    pooled: list[tuple[Tensor, ...]] = []
    done: list[int] = []
    errors: list[str] = []
    try:
        for batch in batches:
            errors += batch.errors
            if batch.positions:
                pooled.append(model.encode(clips.prep.normalize(batch.video.to(device))).pooled)
                done += batch.positions
    finally:
        hook.remove()
    tensors = {"positions": torch.tensor(done, dtype=torch.long)}
    if done:
        stages = [[features.squeeze(0) for features in stage] for stage in zip(*pooled, strict=True)]
        tensors |= {f"pooled_{n}": padded(stage)[0].cpu() for n, stage in enumerate(stages)}
        embedding, tensors["lengths"] = padded(embeddings)
        tensors["embedding"] = embedding.cpu()
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, errors


def _made_from(model: StopOrForward, clips: Clips, epoch: int) -> dict[str, str]:
    """Say what features are made from: the network without its classifier, the preprocessing, the videos, the draws."""
    network, digest = model.backbone.model, hashlib.sha256()
    head = next(name for name, module in network.named_modules() if module is classifier(model)) + "."
    modules, tensors = dict(network.named_modules()), network.state_dict()
    if (glance := model.backbone.glance) is not None:
        modules |= dict(glance.named_modules(prefix="glance"))
        tensors |= glance.state_dict(prefix="glance.")
    for name, module in modules.items():
        if name and not f"{name}.".startswith(head):
            digest.update(f"{name} {type(module).__name__} {module.extra_repr()}\n".encode())
    for name, tensor in tensors.items():
        if not name.startswith(head) and not name.endswith("num_batches_tracked"):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    paths = [item.path for item in clips.items]
    videos = [[str(path.resolve()), stamp(path) if path.exists() else "missing"] for path in paths]
    return {
        "network": digest.hexdigest(),
        "preprocessing": json.dumps(asdict(clips.prep)),
        "decoding": str(DECODING),
        "videos": hashlib.sha256(json.dumps(videos).encode()).hexdigest(),
        "random draws": json.dumps([clips.seed, epoch] if clips.training else None),
    }


def _write(file: Path, tensors: dict[str, Tensor], errors: list[str], made_from: dict[str, str]) -> None:
    unfinished = file.with_suffix(".part")
    try:
        save_file(tensors, unfinished, {**made_from, "errors": json.dumps(errors)})
        os.replace(unfinished, file)
    except (OSError, safetensors.SafetensorError) as error:
        then = "What is there is whole. Start again: the videos that are missing are then encoded."
        raise cannot_write(file, error, then) from error


def _read(file: Path, made_from: dict[str, str]) -> tuple[dict[str, Tensor], list[str]]:
    """Read a file of features, if it is made from what is asked for."""
    try:
        with safetensors.safe_open(file, "pt") as content:
            header = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, safetensors.SafetensorError) as error:
        raise DynskipError(f"{file} is damaged ({error}). Delete it; its videos are encoded again.") from error
    # Files of earlier versions say nothing of draws: they have none.
    differ = [name for name, value in made_from.items() if header.get(name, "null") != value]
    if differ:
        raise DynskipError(
            f"{file} holds features of another {', '.join(differ)}. Delete {file.parent} to encode again, or use "
            "another folder."
        )
    return tensors, json.loads(header["errors"])
