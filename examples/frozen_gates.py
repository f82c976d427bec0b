"""Gates on a frozen backbone: encode a data set once, then train gates on stored features in seconds an epoch.

The recipe for a classifier that is finished. Features never depend on gates, so the backbone runs over every frame
once; its pooled features are stored, one safetensors file a split, and everything after works on them:

    features = encode(model, clips, folder / "train.safetensors")      # minutes, once; continues where it was stopped
    fit_head(model, features, targets)                                 # where the data have classes of their own
    optimizer = gate_optimizer(model, recipe)
    for epoch in range(recipe.joint_epochs):
        gate_epoch(model, features, targets, criterion, optimizer, recipe, epoch)
    outputs = decide(model.eval(), features)                           # what really skipping gives

`sofnet_activitynet.py train --freeze-backbone` is this on your videos; its checkpoint is one as any other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from video_data import Clips, collate, derive_seed, report_unreadable

from dynskip import DynskipError, EncodedVideo, SkipOutput, SoFLoss, StopOrForward
from dynskip.sofnet import Recipe

VIDEOS_A_PART = 32  # encoded videos that a kill can cost


class FeaturesError(DynskipError):
    """A file of stored features that belongs to something else or is damaged."""


@dataclass
class Features:
    """What the frozen backbone has to say about every frame of a split.

    Attributes:
        pooled: for each of `N` stages `(V, T, C_n)` pooled features.
        embedding: `(V, T, D)` what the classifier, the network's last layer, reads.
        positions: `(V,)` place of each video in the data set; unreadable ones are left out.
        image_size: `(H, W)` of the frames.
    """

    pooled: tuple[Tensor, ...]
    embedding: Tensor
    positions: Tensor
    image_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.positions)

    def rows(self, model: StopOrForward, rows: Tensor | slice) -> EncodedVideo:
        """Return some videos as `StopOrForward.decide` takes them, with logits of the model's classifier as it is."""
        device = next(model.backbone.parameters()).device
        pooled = tuple(features[rows].to(device) for features in self.pooled)
        return EncodedVideo(pooled, classifier(model)(self.embedding[rows].to(device)), self.image_size)


def classifier(model: StopOrForward) -> nn.Module:
    """Return the network's last layer, from an embedding to logits; timm's models tell which it is."""
    network: Any = model.backbone.model
    last: nn.Module = network.get_classifier()
    return last


# -------------------------------------------------------------------------------------------------------- encoding


@torch.no_grad()
def encode(model: StopOrForward, clips: Clips, file: Path, workers: int = 0) -> Features:
    """Return the features of a split: read from `file`, or made now and written to it.

    What was encoded before an interruption is kept beside the file and not encoded again.

    Args:
        model: on the device to encode on; only its backbone is used.
        clips: videos as evaluation sees them.
        file: where the features are kept.
        workers: processes that decode videos.

    Raises:
        FeaturesError: if the file holds features of another network, preprocessing or videos, or is damaged.
    """
    made_from = fingerprint(model, clips)
    if file.exists():
        return read(file, made_from)
    file.parent.mkdir(parents=True, exist_ok=True)
    model.eval()
    parts, done = [], 0
    while done < len(clips):
        part = file.with_suffix(f".{done:06d}.part")
        if not part.exists():
            break
        parts.append(part)
        done += int(read_header(part, made_from)["videos_done"])
    todo = [(0, position) for position in range(done, len(clips))]
    loader = DataLoader(clips, 1, sampler=todo, num_workers=workers, collate_fn=collate)
    progress = tqdm(loader, f"encode {file.stem}", initial=done, total=len(clips), leave=False, disable=None)
    errors: list[str] = []
    encoded: list[dict[str, Tensor]] = []
    for position, batch in enumerate(progress, start=done):
        errors += batch.errors
        if batch.positions:
            encoded.append(
                {**encode_batch(model, clips.prep.normalize(batch.video)), "positions": torch.tensor([position])}
            )
        if position + 1 - done == VIDEOS_A_PART or position + 1 == len(clips):
            part = file.with_suffix(f".{done:06d}.part")
            write(part, encoded, {**made_from, "videos_done": str(position + 1 - done), "errors": json.dumps(errors)})
            parts.append(part)
            encoded, errors, done = [], [], position + 1
    headers = [read_header(part, made_from) for part in parts]
    report_unreadable([error for header in headers for error in json.loads(header["errors"])])
    tensors = [read_tensors(part) for part in parts]
    if not any(len(part["positions"]) for part in tensors):
        raise DynskipError("None of the videos could be read, so there are no features.")
    write(file, [part for part in tensors if len(part["positions"])], made_from)
    for part in parts:
        part.unlink()
    return read(file, made_from)


def encode_batch(model: StopOrForward, video: Tensor) -> dict[str, Tensor]:
    """Run the backbone on `(B, T, C, H, W)` frames and name what is to be stored."""
    seen: list[Tensor] = []
    hook = classifier(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        encoded = model.encode(video.to(next(model.backbone.parameters()).device))
    finally:
        hook.remove()
    embedding = seen[0].unflatten(0, video.shape[:2])
    tensors = {f"pooled_{n}": pooled for n, pooled in enumerate(encoded.pooled)} | {"embedding": embedding}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def fingerprint(model: StopOrForward, clips: Clips) -> dict[str, str]:
    """Say what features are made from: the network but its classifier, the preprocessing, the videos."""
    network = model.backbone.model
    head = next(name for name, module in network.named_modules() if module is classifier(model))
    digest = hashlib.sha256()
    for name, module in network.named_modules():
        if name and not f"{name}.".startswith(f"{head}."):
            digest.update(f"{name} {type(module).__name__} {module.extra_repr()}\n".encode())
    for name, tensor in network.state_dict().items():
        if not name.startswith(f"{head}.") and not name.endswith("num_batches_tracked"):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    videos = [[item.path.name, item.path.stat().st_size if item.path.exists() else 0] for item in clips.items]
    return {
        "network": digest.hexdigest(),
        "preprocessing": json.dumps(asdict(clips.prep)),
        "videos": hashlib.sha256(json.dumps(videos).encode()).hexdigest(),
    }


def write(file: Path, parts: Sequence[dict[str, Tensor]], header: dict[str, str]) -> None:
    """Join parts and write them in one step: a kill at any moment leaves no half file."""
    names = parts[0] if parts else ()
    tensors = {name: torch.cat([part[name] for part in parts]) for name in names}
    tensors.setdefault("positions", torch.empty(0, dtype=torch.long))
    unfinished = file.with_suffix(file.suffix + ".writing")
    save_file(tensors, unfinished, header)
    os.replace(unfinished, file)


def read(file: Path, made_from: dict[str, str]) -> Features:
    """Read stored features, if they are made from what is asked for."""
    read_header(file, made_from)
    tensors = read_tensors(file)
    size = json.loads(made_from["preprocessing"])["size"]
    stages = sum(name.startswith("pooled_") for name in tensors)
    pooled = tuple(tensors[f"pooled_{n}"] for n in range(stages))
    return Features(pooled, tensors["embedding"], tensors["positions"], (size, size))


def read_header(file: Path, made_from: dict[str, str]) -> dict[str, str]:
    """Return what a file says of itself; refuse features that are made from something else."""
    try:
        with safetensors.safe_open(file, "pt") as content:
            header: dict[str, str] = content.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise FeaturesError(f"{file} is damaged ({error}). Delete it; its videos are encoded again.") from error
    differ = [name for name, value in made_from.items() if header.get(name) != value]
    if differ:
        raise FeaturesError(
            f"{file} holds features of another {', '.join(differ)}. Delete it to encode again, or use another folder."
        )
    return header


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a file."""
    with safetensors.safe_open(file, "pt") as content:
        return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (it is no dict)


# -------------------------------------------------------------------------------------------------------- training


def fit_head(model: StopOrForward, features: Features, targets: Tensor, weight_decay: float = 0.03) -> None:
    """Fit the classifier to the frozen embedding, as a dense TSN: every frame counts, in each video's mean.

    The mean of a linear layer's logits is the layer on the mean embedding, so this is a logistic regression over
    videos, which has one answer.

    Args:
        model: its classifier has to be a linear layer.
        features: of the training videos.
        targets: `(V,)` class indices, or `(V, K)` shares of the classes.
        weight_decay: strength of the L2 penalty on the weights.
    """
    head = classifier(model)
    if not isinstance(head, nn.Linear):
        raise DynskipError(f"The classifier is a {type(head).__name__}; only a linear one can be fitted to features.")
    fit_linear(head, features.embedding.mean(1), targets, weight_decay)


def fit_linear(layer: nn.Linear, inputs: Tensor, targets: Tensor, weight_decay: float) -> None:
    """Fit a layer to `(M, D)` inputs by logistic regression, targets as in `fit_head`; what it held is forgotten."""
    inputs, targets = inputs.to(layer.weight), targets.to(layer.weight.device)
    parameters = [parameter.requires_grad_() for parameter in layer.parameters()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(layer(inputs), targets) + weight_decay / 2 * layer.weight.square().sum()
        value.backward()
        return value

    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    with torch.enable_grad():
        optimizer.step(loss)
    layer.zero_grad()


def gate_optimizer(model: StopOrForward, recipe: Recipe, adamw: bool = True) -> torch.optim.Optimizer:
    """Return an optimiser over gates and inner classifiers alone."""
    group = recipe.parameter_groups(model)[1]
    if adamw:
        return torch.optim.AdamW([group], recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD([group], recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def gate_epoch(
    model: StopOrForward,
    features: Features,
    targets: Tensor,
    criterion: SoFLoss,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    epoch: int,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, float]:
    """Train gates and inner classifiers for one epoch on stored features; return the means of what was logged."""
    # Everything random follows from seed and epoch, so a run that was interrupted repeats the epoch exactly.
    torch.manual_seed(derive_seed(seed, epoch))
    model.train()
    model.temperature = recipe.temperature_at(epoch)
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr_at(epoch) * group["lr_scale"]
    sums: dict[str, float] = {}
    for rows in torch.randperm(len(features)).split(batch_size):
        with torch.no_grad():
            encoded = features.rows(model, rows)
        wanted = targets[rows].to(encoded.frame_logits.device)
        output = model.decide(encoded)
        parts = criterion(output, wanted)
        optimizer.zero_grad(set_to_none=True)
        parts.total.backward()
        optimizer.step()
        accuracy = (output.logits.argmax(-1) == wanted).float().mean()
        for name, value in {"accuracy": accuracy, "used": output.used.float().mean(), **vars(parts)}.items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(rows)
    means = {name: value / len(features) for name, value in sums.items()}
    if not all(map(torch.isfinite, map(torch.tensor, means.values()))):
        raise DynskipError(f"The loss became {means['total']} in epoch {epoch + 1}. Use a lower learning rate.")
    return means


# ------------------------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def decide(model: StopOrForward, features: Features, batch_size: int = 256) -> Iterator[SkipOutput]:
    """Yield what the model, in eval mode, does with the videos of each batch: the same as really skipping them."""
    for rows in torch.arange(len(features)).split(batch_size):
        yield model.decide(features.rows(model, rows))
