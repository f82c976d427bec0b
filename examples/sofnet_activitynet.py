"""SoF-Net on your videos: train, evaluate, predict, and a demo that needs no data.

    python examples/sofnet_activitynet.py demo
    python examples/sofnet_activitynet.py train    --data DIR --out runs/mine
    python examples/sofnet_activitynet.py evaluate --data DIR --checkpoint runs/mine/last.pt
    python examples/sofnet_activitynet.py predict  --checkpoint runs/mine/last.pt VIDEO...

Top to bottom: weights and checkpoints, training, evaluation, prediction, demo, command line; video_data.py beside it
reads videos and data sets. Copy both and edit them. Costs are MACs (multiply-adds), the literature's "GFLOPs".
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import timm
import torch
from einops import rearrange
from timm.data import ImageNetInfo
from torch import Tensor
from tqdm import tqdm
from video_data import (
    SPLITS,
    Clips,
    Item,
    Preprocessing,
    VideoError,
    batches,
    class_names,
    derive_seed,
    held_out_split,
    load_items,
    pick_split,
    read_csv,
    read_frames,
    report_unreadable,
)

from dynskip import UNSEEN, DynskipError, SkipOutput, SoFLoss, StopOrForward, metrics, plot, sofnet, stage_model
from dynskip.sofnet import Recipe

# ----------------------------------------------------------------------------------------- weights and checkpoints


class CheckpointError(DynskipError):
    """A weight or checkpoint file that does not fit or is damaged."""


@dataclass(frozen=True)
class Config:
    """What rebuilds a model: everything but its weights."""

    backbone: str
    classes: tuple[str, ...]
    hidden: int = 512
    temporal: Literal["lstm"] | None = "lstm"
    guidance: bool = True
    detach_inner: bool = True
    forward_bias: float = 3.0
    threshold: float = 0.999
    min_frames: int = 3
    state_update: Literal["used", "reached"] = "used"
    strides_in_1x1: bool = False
    prep: Preprocessing = field(default_factory=Preprocessing)

    def build(self, pretrained: bool = False) -> StopOrForward:
        """Build the model, with fresh weights or with timm's published ones for the backbone."""
        kwargs: dict[str, Any] = {"num_classes": len(self.classes), "pretrained": pretrained}
        if timm.is_model(self.backbone) and timm.get_pretrained_cfg_value(self.backbone, "fixed_input_size"):
            kwargs["img_size"] = self.prep.size
        try:
            backbone = stage_model(self.backbone, input_size=(3, self.prep.size, self.prep.size), **kwargs)
        except DynskipError as error:
            if not pretrained:
                raise
            self.build()  # raises by itself if not the download is at fault
            raise CheckpointError(
                f"Could not get published weights for {self.backbone!r}. Download the file on a "
                "machine with network access and pass --weights FILE, or train from scratch with --weights none."
            ) from error
        if self.strides_in_1x1:
            move_strides(backbone.model)
        return sofnet(
            backbone,
            hidden=self.hidden,
            temporal=self.temporal,
            guidance=self.guidance,
            detach_inner=self.detach_inner,
            forward_bias=self.forward_bias,
            threshold=self.threshold,
            min_frames=self.min_frames,
            state_update=self.state_update,
        )

    def to_json(self) -> str:
        """Write the configuration as text, for a checkpoint."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        prep: dict[str, Any] = values.pop("prep")
        prep = {k: tuple(v) if isinstance(v, list) else v for k, v in prep.items()}  # JSON knows no tuples
        return cls(**{**values, "classes": tuple(values["classes"]), "prep": Preprocessing(**prep)})


def move_strides(model: torch.nn.Module) -> None:
    """Put a ResNet's strides into the 1x1 convolutions, where the first published weights (Caffe, Keras) have them."""
    for name in ("layer2", "layer3", "layer4"):
        block: Any = getattr(model, name, [None])[0]
        if not hasattr(block, "conv3"):
            raise DynskipError("--strides-in-1x1 is for ResNets with bottleneck blocks (ResNet-50 and deeper).")
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)


def load_weights(model: torch.nn.Module, path: Path) -> bool:
    """Load a timm checkpoint (safetensors, or a PyTorch file read without unpickling code) into a backbone.

    Returns:
        Whether the classifier was loaded, too; it is left as it is if the file has another number of classes.
    """
    # Counters of training steps come in several shapes, and nothing that is run depends on them.
    state = {k: v for k, v in read_state(path).items() if not k.endswith("num_batches_tracked")}
    own = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    head = classifier_name(model) + "."
    skipped = [k for k in own if k.startswith(head) and k in state and state[k].shape != own[k].shape]
    missing = [k for k in own if k not in state]
    foreign = [k for k in state if k not in own]
    wrong = [k for k in own if k in state and state[k].shape != own[k].shape and k not in skipped]
    if missing or foreign or wrong:
        examples = ", ".join((missing + foreign + wrong)[:3])
        raise CheckpointError(
            f"{path} holds weights of another model: {len(missing)} entries are missing, {len(foreign)} unknown, "
            f"{len(wrong)} of another shape, such as {examples}. Give the --backbone that they were made for."
        )
    model.load_state_dict({k: v for k, v in state.items() if k not in skipped}, strict=False)
    return not skipped


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a weight file."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. --weights takes a file, 'hub' or 'none'.")
    try:
        check_archive(path)
        return {
            k: v for k, v in timm.models.load_state_dict(str(path), weights_only=True).items() if isinstance(v, Tensor)
        }
    except Exception as error:  # a damaged file can fail in any way
        raise CheckpointError(
            f"{path} cannot be read as weights ({type(error).__name__}). Expected .safetensors, or a PyTorch file that "
            "holds tensors only; it may be damaged or cut off, so copy it again."
        ) from error


def check_archive(path: Path) -> None:
    """Compare the checksums in a file that `torch.save` wrote; `torch.load` does not."""
    if path.suffix != ".safetensors":
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{damaged} is damaged")


def classifier_name(model: torch.nn.Module) -> str:
    """Qualified name of a timm model's classifier."""
    name = getattr(model, "pretrained_cfg", {}).get("classifier", "head")
    return name if isinstance(name, str) else name[0]


def to_device(model: StopOrForward, device: str) -> StopOrForward:
    """Move a model, with convolutions in the memory layout that they are fastest in."""
    return model.to(device).to(memory_format=torch.channels_last)


CHECKPOINT_FORMAT = "sofnet-1"


def save_checkpoint(path: Path, **content: Any) -> None:
    """Write a checkpoint in one step: a kill at any moment leaves the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save({"format": CHECKPOINT_FORMAT, **content}, part)
    os.replace(part, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; tensors and plain values only, no code is run."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. --checkpoint takes a file that `train` wrote, such as last.pt.")
    try:
        check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way
        raise CheckpointError(
            f"{path} is damaged or no checkpoint ({type(error).__name__}). Copy it again, or train again."
        ) from error
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{path} was not written by this example. Plain backbone weights go with --weights instead of --checkpoint."
        )
    return content


def restore(path: Path, **changes: Any) -> tuple[StopOrForward, Config]:
    """Rebuild a trained model from its checkpoint, with some of its configuration changed."""
    content = load_checkpoint(path)
    config = replace(Config.from_json(content["config"]), **changes)
    model = config.build()
    model.load_state_dict(content["model"])
    return model, config


# -------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class TrainOptions:
    """How to train, apart from the schedule."""

    batch_size: int = 24
    alpha: float = 0.9
    beta: float = 0.9
    normalize: bool = False
    optimizer: Literal["sgd", "adamw"] = "sgd"
    dense: bool = False
    seed: int = 0
    workers: int = 2
    in_memory: bool = False
    device: str = "cpu"


def train(
    config: Config,
    items: Sequence[Item],
    recipe: Recipe,
    options: TrainOptions,
    out: Path,
    start: Path | None,
    weights: str,
) -> StopOrForward:
    """Train warm-up and joint epochs, writing `last.pt` after every epoch and `warmup.pt` after the warm-up.

    Args:
        config: the model.
        items: training videos.
        recipe: the schedule.
        options: the rest.
        out: folder for checkpoints and `log.jsonl`.
        start: checkpoint to continue from.
        weights: `hub`, `none` or a file, for the backbone of a new model.

    Returns:
        The trained model.
    """
    torch.manual_seed(options.seed)
    if start is None:
        model = config.build(pretrained=weights == "hub")
        if weights not in ("hub", "none") and not load_weights(model.backbone.model, Path(weights)):
            print(f"{weights} has another number of classes: the classifier starts anew.")
    else:
        model = config.build()
    to_device(model, options.device)
    clips = Clips(items, config.classes, config.prep, training=True, seed=options.seed)
    if options.in_memory:
        clips.load_into_memory()
    criterion = SoFLoss(
        model.lookup_for((config.prep.size, config.prep.size)),
        options.alpha,
        options.beta if config.guidance else None,
        options.normalize,
    ).to(options.device)
    groups = recipe.parameter_groups(model)
    optimizer: torch.optim.Optimizer
    if options.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    else:
        optimizer = torch.optim.AdamW(groups, recipe.lr, weight_decay=recipe.weight_decay)
    first = 0
    if start is not None:
        content = load_checkpoint(start)
        saved = Config.from_json(content["config"])
        if saved != config:
            differ = [k for k in asdict(config) if getattr(saved, k) != getattr(config, k)]
            raise CheckpointError(
                f"{start} is of another model: {', '.join(differ)} differ. Train with the same options."
            )
        now, before = training_options(recipe, options), json.loads(content["training"])
        if content["epoch"] < recipe.warmup_epochs:
            before["dense"] = now["dense"]  # during the warm-up there is no difference
        differ = [k for k in now if now[k] != before.get(k)]
        if differ:
            raise CheckpointError(
                f"{start} is of another run: {', '.join(differ)} differ. Train with the same options."
            )
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        first = content["epoch"] + 1
    log = [entry for entry in read_log(out / "log.jsonl") if entry["epoch"] < first]
    unreadable: list[str] = []
    for epoch in range(first, recipe.epochs):
        means = train_epoch(model, clips, criterion, optimizer, recipe, options, epoch, unreadable)
        state: dict[str, Any] = {
            "config": config.to_json(),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "training": json.dumps(training_options(recipe, options)),
        }
        log.append({"epoch": epoch, **means})
        write_log(out / "log.jsonl", log)
        if epoch == recipe.warmup_epochs - 1:
            save_checkpoint(out / "warmup.pt", epoch=epoch, **state)
        save_checkpoint(out / "last.pt", epoch=epoch, **state)  # last: it says that the epoch is complete
    report_unreadable(unreadable)
    return model.eval()


def training_options(recipe: Recipe, options: TrainOptions) -> dict[str, Any]:
    """What an interrupted run must be continued with; how long, and on what machine, may change."""
    free = {"joint_epochs", "workers", "device"}
    return {k: v for k, v in {**asdict(recipe), **asdict(options)}.items() if k not in free}


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read what was logged of each epoch."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def write_log(path: Path, log: Sequence[dict[str, Any]]) -> None:
    """Write one line of JSON an epoch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in log))


def train_epoch(
    model: StopOrForward,
    clips: Clips,
    criterion: SoFLoss,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    options: TrainOptions,
    epoch: int,
    unreadable: list[str],
) -> dict[str, float]:
    """Train one epoch and return the means of what was logged."""
    # Everything random follows from seed and epoch, so a run that was interrupted repeats the epoch exactly.
    torch.manual_seed(derive_seed(options.seed, epoch))
    dense = options.dense or recipe.is_warmup(epoch)
    model.train()
    model.temperature = recipe.temperature_at(epoch)
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr_at(epoch) * group["lr_scale"]
    sums: dict[str, float] = {}
    count = 0
    phase = "dense" if options.dense else "warm-up" if dense else "joint"
    progress = tqdm(
        batches(clips, options.batch_size, options.workers, epoch),
        desc=f"epoch {epoch + 1}/{recipe.epochs} {phase}",
        leave=False,
        disable=None,
    )
    for batch in progress:
        unreadable += batch.errors
        if not len(batch.targets):
            continue
        video = clips.prep.normalize(batch.video.to(options.device, non_blocking=True))
        targets = batch.targets.to(options.device)
        output = model(video, dense=dense)
        logged: dict[str, Tensor] = {"accuracy": (output.logits.argmax(-1) == targets).float().mean()}
        if dense:
            loss = criterion.classification(output, targets)
            logged["classification"] = loss
        else:
            parts = criterion(output, targets)
            loss = parts.total
            logged |= vars(parts) | {"used": output.used.float().mean()}
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if not torch.isfinite(loss):
            raise DynskipError(
                f"The loss became {loss.item()} in epoch {epoch + 1}. Lower --lr, or raise --batch-size."
            )
        for name, value in logged.items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(targets)
        count += len(targets)
        progress.set_postfix(
            {name: f"{value / count:.3f}" for name, value in sums.items() if name in ("accuracy", "used")}
        )
    if not count:
        raise DynskipError("None of the training videos could be read. The first: " + "; ".join(unreadable[:1]))
    means = {name: value / count for name, value in sums.items()}
    print(f"epoch {epoch + 1}/{recipe.epochs} {phase}: " + ", ".join(f"{k} {v:.3f}" for k, v in means.items()))
    return means


# ------------------------------------------------------------------------------------------------------ evaluation


@dataclass
class Result:
    """How one way of running a model did on a set of videos."""

    name: str
    top1: float
    mean_ap: float
    gmacs: float  # a video
    frames: int  # a video
    usage: metrics.FrameUsage
    milliseconds: float  # a video
    fallbacks: int
    videos: int  # that could be read


MODES = ("dense", "gates", "gates + early termination")


def evaluate(
    model: StopOrForward, clips: Clips, batch_size: int, workers: int, device: str, modes: Sequence[str] = MODES
) -> list[Result]:
    """Run a model over a split in several ways: every frame without gates, with gates, and ending videos early."""
    to_device(model, device).eval()
    outputs: dict[str, list[SkipOutput]] = {mode: [] for mode in modes}
    seconds = dict.fromkeys(modes, 0.0)
    positions: list[int] = []
    unreadable: list[str] = []
    for batch in tqdm(batches(clips, batch_size, workers), desc="evaluate", leave=False, disable=None):
        unreadable += batch.errors
        if not batch.positions:
            continue
        video = clips.prep.normalize(batch.video.to(device))
        for mode in modes:
            if not positions:
                run(model, video, mode)  # first calls allocate and choose kernels: not timed
            begin = clock(device)
            outputs[mode].append(run(model, video, mode))
            seconds[mode] += clock(device) - begin
        positions += batch.positions
    report_unreadable(unreadable)
    if not positions:
        raise DynskipError("None of the videos could be read, so there is nothing to evaluate.")
    targets = torch.zeros(len(positions), model.backbone.num_classes, dtype=torch.long)
    for row, position in enumerate(positions):
        targets[row, clips.targets[position]] = 1
    results = []
    for mode in modes:
        probabilities = torch.cat([output.probabilities for output in outputs[mode]]).cpu()
        stopped_at = torch.cat([output.stopped_at for output in outputs[mode]]).cpu()
        results.append(
            Result(
                name=mode,
                top1=metrics.top_k_accuracy(probabilities, targets),
                mean_ap=metrics.mean_average_precision(probabilities, targets),
                gmacs=float(torch.cat([output.macs for output in outputs[mode]]).mean()) / 1e9,
                frames=stopped_at.shape[1],
                usage=metrics.frame_usage(stopped_at, model.backbone.num_stages),
                milliseconds=1000 * seconds[mode] / len(positions),
                fallbacks=int(sum(output.fallback.sum() for output in outputs[mode])),
                videos=len(positions),
            )
        )
    return results


@torch.no_grad()
def run(model: StopOrForward, video: Tensor, mode: str) -> SkipOutput:
    """Run a model in one of `MODES`."""
    terminator = model.terminator
    model.terminator = terminator if mode == MODES[2] else None
    try:
        return model(video, dense=mode == MODES[0])
    finally:
        model.terminator = terminator


def clock(device: str) -> float:
    """Seconds; waits for the GPU to finish what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def table(results: Sequence[Result]) -> str:
    """Lay results out as a Markdown table."""
    header = "| | top-1 % | mAP % | GMACs/frame | GMACs/video | used % | stopped % | unseen % | ms/video |"
    lines = [header, "|---|" + "---:|" * 8]
    for r in results:
        lines.append(
            f"| {r.name} | {100 * r.top1:.1f} | {100 * r.mean_ap:.1f} | {r.gmacs / r.frames:.4g} | {r.gmacs:.4g} | "
            f"{100 * r.usage.used:.1f} | {100 * sum(r.usage.stopped):.1f} | {100 * r.usage.unseen:.1f} | "
            f"{r.milliseconds:.1f} |"
        )
    return "\n".join(lines)


def print_results(results: Sequence[Result], batch_size: int, device: str) -> None:
    """Print the table and what its numbers mean."""
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{table(results)}\n")
    print(
        f"{results[0].videos} videos. GMACs are 10^9 multiply-adds (the literature's GFLOPs), gates "
        f"and head included.\nms: network only, {batch_size} video{'s' * (batch_size > 1)} at a time, {where}, "
        f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}."
    )
    fallbacks = results[-1].fallbacks
    if fallbacks:
        print(f"In {fallbacks} videos the gates used no frame; the furthest one was run to the end, its cost counted.")


# ------------------------------------------------------------------------------------------------------ prediction


def predict(model: StopOrForward, config: Config, path: Path, device: str) -> tuple[SkipOutput, np.ndarray, float]:
    """Classify one video; return the output, the frames `(T, H, W, 3)` that the network saw, and milliseconds."""
    frames = read_frames(path, config.prep.num_frames, config.prep.short_side)
    video = config.prep.crop(frames)
    inputs = config.prep.normalize(video.to(device))[None]
    begin = clock(device)
    output = model(inputs)
    return output, rearrange(video, "t c h w -> t h w c").numpy(), 1000 * (clock(device) - begin)


def describe(path: Path, output: SkipOutput, config: Config, model: StopOrForward, milliseconds: float) -> str:
    """Say in words what happened to one video."""
    probability, label = output.probabilities[0].max(-1)
    stopped_at = output.stopped_at[0]
    frames, stages = len(stopped_at), model.backbone.num_stages
    where = [f"{int((stopped_at == n).sum())} at {name}" for n, name in enumerate(model.backbone.stage_names)]
    stopped = ", ".join(text for text in where if not text.startswith("0 "))
    gmacs, dense = float(output.macs[0]) / 1e9, frames * model.lookup_for((config.prep.size,) * 2).dense / 1e9
    used, unseen = int((stopped_at == stages).sum()), int((stopped_at == UNSEEN).sum())
    text = (
        f"{path.name}: {config.classes[int(label)]} {100 * float(probability):.1f} %\n"
        f"  frames: {used} used, {frames - used - unseen} stopped{f' ({stopped})' if stopped else ''}, {unseen} "
        f"unseen\n  {gmacs:.3g} GMACs (multiply-adds) against {dense:.3g} dense, {milliseconds:.1f} ms"
    )
    if output.fallback[0]:
        text += f"\n  no frame passed every gate: frame {int(output.fallback_frame[0])} was run to the end instead"
    return text


def draw_timeline(
    output: SkipOutput, frames: np.ndarray, model: StopOrForward, title: str, file: Path, relevant: Any = None
) -> None:
    """Write the picture of what happened to each frame (thesis Fig. 4.2)."""
    figure = plot.timeline(
        frames,
        output.stopped_at[0],
        model.backbone.stage_names,
        fallback_frame=int(output.fallback_frame[0]),
        relevant=relevant,
        title=title,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


# ------------------------------------------------------------------------------------------------------------ demo


DEMO_VIDEOS = {"train_per_class": 40, "test_per_class": 30}
DEMO_RECIPE = Recipe(
    warmup_epochs=14, joint_epochs=12, lr=3e-3, lr_drop=9, gate_lr_scale=1.5, weight_decay=1e-2,
    temperature=2.0, temperature_decay=0.1,
)  # fmt: skip
DEMO_BATCH = 30  # videos at a time in the evaluation


def demo_command(args: argparse.Namespace) -> int:
    """Train on rendered videos and compare: every frame, gates, gates and early termination."""
    import stick_figures  # lies beside this file; nothing else here needs it

    print("1/4  Rendering videos of six actions")
    root = stick_figures.render_set(args.out / "videos", **DEMO_VIDEOS, seed=args.seed, progress=show_progress)
    items = read_csv(root)
    training, testing = pick_split(items, "train"), pick_split(items, "test")
    prep = Preprocessing(size=48)
    config = Config(
        "test_resnet", tuple(class_names(items)), hidden=64, detach_inner=False, forward_bias=2.0, prep=prep
    )
    options = TrainOptions(
        batch_size=8,
        alpha=0.05,
        normalize=True,
        optimizer="adamw",
        seed=args.seed,
        workers=0,  # small clips from memory are faster without processes
        in_memory=True,
        device=args.device,
    )

    print("2/4  Training the dense baseline: warm-up, then as many epochs again without gates")
    dense = train(config, training, DEMO_RECIPE, replace(options, dense=True), args.out / "dense", None, "none")
    print("3/4  Training SoF-Net from the same warm-up: backbone and gates together")
    warm = args.out / "dense" / "warmup.pt"
    gated = train(config, training, DEMO_RECIPE, options, args.out / "gated", warm, "none")

    print("4/4  Evaluating on videos that were not trained on")
    clips = Clips(testing, config.classes, prep, training=False, seed=args.seed).load_into_memory()
    results = evaluate(dense, clips, DEMO_BATCH, 0, args.device, MODES[:1])
    results += evaluate(gated, clips, DEMO_BATCH, 0, args.device, MODES[1:])
    print_results(results, DEMO_BATCH, args.device)
    (args.out / "table.md").write_text(table(results) + "\n")

    usage = plot.frame_usage(results[-1].usage, gated.backbone.stage_names, title="What happened to the frames")
    usage.savefig(args.out / "frame_usage.png")
    with (root / "segments.csv").open(newline="") as handle:
        segments = {root / row["path"]: (int(row["start"]), int(row["end"])) for row in csv.DictReader(handle)}
    for item in {item.labels[0]: item for item in testing}.values():  # one video of each action
        output, frames, milliseconds = predict(gated, config, item.path, args.device)
        text = describe(item.path, output, config, gated, milliseconds)
        start, end = segments[item.path]
        middles = [stick_figures.NUM_FRAMES / len(frames) * (t + 0.5) for t in range(len(frames))]
        title = f"{item.labels[0]}, recognised as {text.splitlines()[0].partition(': ')[2]}"
        relevant = [start <= int(middle) < end for middle in middles]
        draw_timeline(output, frames, gated, title, args.out / f"timeline_{item.labels[0]}.png", relevant)
    print(f"\nPictures: {args.out / 'frame_usage.png'}, {args.out / 'timeline_*.png'}")
    return 0


# ---------------------------------------------------------------------------------------------------- command line


def train_command(args: argparse.Namespace) -> int:
    """Train on a data set and evaluate the result."""
    items = load_items(args.data, args.annotations)
    training, classes = pick_split(items, "train"), class_names(items)
    last = args.out / "last.pt"
    if last.exists() and not args.resume:
        raise DynskipError(f"{last} exists already. Continue it with --resume, or choose another --out.")
    if args.warmup_epochs + args.epochs < 1:
        raise DynskipError("There is nothing to train: --warmup-epochs and --epochs are both 0.")
    published = published_config(args.backbone)
    config = Config(
        backbone=args.backbone,
        classes=tuple(classes),
        hidden=args.hidden,
        temporal=None if args.temporal == "none" else args.temporal,
        guidance=not args.no_guidance,
        detach_inner=not args.shape_memory,
        forward_bias=args.forward_bias,
        threshold=args.threshold,
        min_frames=args.min_frames,
        state_update=args.state_update,
        strides_in_1x1=args.strides_in_1x1,
        prep=Preprocessing(args.size, args.frames, tuple(published.mean), tuple(published.std)),
    )
    recipe = Recipe(
        warmup_epochs=args.warmup_epochs,
        joint_epochs=args.epochs,
        lr=args.lr,
        lr_drop=args.lr_drop,
        gate_lr_scale=args.gate_lr_scale,
        weight_decay=args.weight_decay,
    )
    options = TrainOptions(
        batch_size=args.batch_size,
        alpha=args.alpha,
        beta=args.beta,
        normalize=args.normalize,
        optimizer=args.optimizer,
        dense=args.dense,
        seed=args.seed,
        workers=args.workers,
        in_memory=args.in_memory,
        device=args.device,
    )
    start = last if args.resume and last.exists() else None
    model = train(config, training, recipe, options, args.out, start, args.weights)
    print(f"Wrote {last}.")
    if (split := held_out_split(items)) is not None:
        clips = Clips(pick_split(items, split), classes, config.prep, training=False, seed=args.seed)
        results = evaluate(model, clips, 1, args.workers, args.device, MODES[:1] if args.dense else MODES)
        print_results(results, 1, args.device)
    return 0


def evaluate_command(args: argparse.Namespace) -> int:
    """Evaluate a checkpoint, or a backbone with published weights, on a data set."""
    items = load_items(args.data, args.annotations)
    split = args.split or held_out_split(items) or "test"
    model, config = model_from(args, class_names(items))
    clips = Clips(pick_split(items, split), config.classes, config.prep, training=False, seed=0)
    results = evaluate(model, clips, args.batch_size, args.workers, args.device)
    print_results(results, args.batch_size, args.device)
    if args.usage:
        args.usage.parent.mkdir(parents=True, exist_ok=True)
        figure = plot.frame_usage(results[-1].usage, model.backbone.stage_names, title=f"{split}: frame usage")
        figure.savefig(args.usage)
    return 0


def predict_command(args: argparse.Namespace) -> int:
    """Classify videos one by one; a bad file is reported and does not stop the others."""
    model, config = model_from(args, None)
    to_device(model, args.device).eval()
    failed = 0
    stems = [path.stem for path in args.videos]
    for number, path in enumerate(args.videos, start=1):
        try:
            output, frames, milliseconds = predict(model, config, path, args.device)
        except VideoError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        text = describe(path, output, config, model, milliseconds)
        file = args.out / f"{path.stem}{f'_{number}' if stems.count(path.stem) > 1 else ''}.png"
        draw_timeline(output, frames, model, text.splitlines()[0], file)
        print(f"{text}\n  {file}")
    if failed:
        print(f"{failed} of {len(args.videos)} files could not be read.", file=sys.stderr)
    return 1 if failed else 0


def model_from(args: argparse.Namespace, classes: list[str] | None) -> tuple[StopOrForward, Config]:
    """Build the model that --checkpoint or --weights asks for; `classes` are the data's, where there are data."""
    changes = {k: v for k in ("threshold", "min_frames") if (v := getattr(args, k)) is not None}
    if args.checkpoint is not None:
        return restore(args.checkpoint, **changes)
    if args.weights is None:
        raise DynskipError(
            "Nothing to run: give --checkpoint FILE (written by train), or --weights FILE with --backbone."
        )
    published = published_config(args.backbone)
    head = read_state(args.weights).get(f"{published.classifier}.weight")
    known = len(head) if head is not None else published.num_classes
    if classes is None:
        info = ImageNetInfo()
        is_imagenet = known == info.num_classes()
        classes = [info.index_to_description(i) if is_imagenet else f"class {i}" for i in range(known)]
    prep = Preprocessing(args.size, args.frames, tuple(published.mean), tuple(published.std))
    config = Config(args.backbone, tuple(classes), strides_in_1x1=args.strides_in_1x1, prep=prep, **changes)
    torch.manual_seed(0)
    model = config.build()
    if not load_weights(model.backbone.model, args.weights):
        print(f"{args.weights} has {known} classes and the data {len(classes)}: the classifier is untrained.")
    print("The gates are untrained: they forward almost every frame. `train` teaches them.")
    return model, config


def published_config(backbone: str) -> Any:
    """What timm knows of a backbone's published weights: normalisation, classes, the classifier's name."""
    published = timm.get_pretrained_cfg(backbone) if timm.is_model(backbone) else None
    if published is None:
        raise DynskipError(
            f"timm has no model named {backbone!r} for --backbone; timm.list_models() names all of them."
        )
    return published


def show_progress(done: int, total: int) -> None:
    """Print progress on one line where somebody may be watching."""
    if sys.stderr.isatty() or done == total:
        print(f"\r     {done}/{total} videos", end="\n" if done == total else "", file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    top = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Costs are MACs (multiply-adds), which the literature prints as GFLOPs. COMMAND --help tells more.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> Any:
        show = argparse.ArgumentDefaultsHelpFormatter
        sub = commands.add_parser(name, help=text, description=run.__doc__, formatter_class=show)
        sub.set_defaults(run=run)
        return sub.add_argument

    add = command("demo", demo_command, "train and compare on rendered videos: no data needed, a few minutes")
    add("--out", type=Path, default=Path("runs/demo"), help="folder for videos, checkpoints and pictures")
    add_machine(add)

    add = command("train", train_command, "train on a folder of videos")
    add_data(add)
    add("--out", type=Path, required=True, help="folder for checkpoints and the log")
    add("--resume", action="store_true", help="continue from last.pt in --out, as if never interrupted")
    add(
        "--weights",
        default="hub",
        help="backbone weights: 'hub' downloads timm's, 'none' starts from scratch, or a FILE",
    )
    add_network(add)
    add("--hidden", type=positive, default=512, help="width of the gates")
    add("--temporal", choices=("lstm", "none"), default="lstm", help="memory of the gates")
    add("--no-guidance", action="store_true", help="leave out inner classifiers and the policy guidance loss")
    add("--shape-memory", action="store_true", help="let the inner classification loss shape the gates' memory, too")
    add("--state-update", choices=("used", "reached"), default="used", help="frames that advance the gates' memory")
    add("--forward-bias", type=float, default=3.0, help="how far gates start towards forwarding")
    add_ending(add, 0.999, 3)
    add("--alpha", type=float, default=0.9, help="accuracy (1) against efficiency (0)")
    add("--beta", type=float, default=0.9, help="inner classification (1) against self-supervision (0)")
    add("--normalize", action="store_true", help="efficiency loss as a share of the dense cost, not in GMACs")
    add("--in-memory", action="store_true", help="decode every video once and keep it; for small sets")
    add("--dense", action="store_true", help="train the plain backbone for all epochs: the baseline")
    add("--warmup-epochs", type=not_negative, default=15, help="epochs of the backbone alone")
    add("--epochs", type=not_negative, default=60, help="epochs of backbone and gates together, after the warm-up")
    add("--optimizer", choices=("sgd", "adamw"), default="sgd", help="the thesis trains with SGD")
    add("--lr", type=rate, default=1e-3, help="learning rate")
    add("--lr-drop", type=not_negative, default=30, help="joint epoch from which the learning rate is a tenth")
    add("--gate-lr-scale", type=rate, default=1.0, help="learning rate of the gates over the backbone's")
    add("--weight-decay", type=rate, default=1e-5, help="weight decay")
    add("--batch-size", type=positive, default=24, help="videos a step")
    add_machine(add)

    add = command("evaluate", evaluate_command, "accuracy and cost of a checkpoint on a split")
    add_data(add)
    add_source(add)
    add("--split", choices=SPLITS, help="by default test, or val where there is no test")
    add("--batch-size", type=positive, default=1, help="videos at a time; 1 is what the thesis times")
    add("--usage", type=Path, metavar="PNG", help="write a picture of what happened to the frames")
    add_machine(add)

    add = command("predict", predict_command, "classify videos and draw what happened to each frame")
    add("videos", type=Path, nargs="+", metavar="VIDEO")
    add_source(add)
    add("--out", type=Path, default=Path("runs/predict"), help="folder for the pictures")
    add_machine(add)
    return top


def positive(text: str) -> int:
    """Read a whole number from 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is too small; give a whole number from 1")
    return value


def not_negative(text: str) -> int:
    """Read a whole number from 0."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative; give a whole number from 0")
    return value


def rate(text: str) -> float:
    """Read a number from 0."""
    if not (value := float(text)) >= 0:
        raise argparse.ArgumentTypeError(f"{value} is no rate; give a number from 0")
    return value


def device(text: str) -> str:
    """Read the name of a device that this machine has."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be used here: {str(error).splitlines()[0]}") from error
    return text


def add_data(add: Any) -> None:
    """Where the videos and labels are."""
    add("--data", type=Path, required=True, help="folder with labels.csv (path,label,split), or such a CSV file")
    add("--annotations", type=Path, help="ActivityNet-v1.3's JSON; --data is then the folder of its videos")


def add_network(add: Any) -> None:
    """Which backbone, and what it sees."""
    add("--backbone", default="resnet50", help="any timm model name")
    add("--size", type=positive, default=168, help="height and width of the frames in pixels")
    add("--frames", type=positive, default=16, help="frames of a video")
    add("--strides-in-1x1", action="store_true", help="for ResNet weights of the first kind (Caffe, Keras)")


def add_ending(add: Any, threshold: float | None, min_frames: int | None) -> None:
    """When a video ends early."""
    add("--threshold", type=float, default=threshold, help="probability that ends a video early")
    add("--min-frames", type=int, default=min_frames, help="frames that are looked at in any case")


def add_source(add: Any) -> None:
    """Where the model comes from."""
    add("--checkpoint", type=Path, help="file written by train")
    add("--weights", type=Path, help="instead of a checkpoint: backbone weights, with untrained gates")
    add_network(add)
    add_ending(add, None, None)


def add_machine(add: Any) -> None:
    """How to run."""
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    add("--workers", type=not_negative, default=min(os.cpu_count() or 1, 8), help="processes that decode videos")
    add("--seed", type=int, default=0, help="another number gives another run")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    av.logging.set_libav_level(av.logging.PANIC)  # our own errors say it better
    args = parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except (DynskipError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. `train --resume` continues from the last finished epoch.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
