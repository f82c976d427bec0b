"""SoF-Net on your videos: train, evaluate, predict, and a demo that needs no data.

    python examples/sofnet_activitynet.py demo
    python examples/sofnet_activitynet.py prepare  --data DIR
    python examples/sofnet_activitynet.py train    --data DIR --out runs/mine
    python examples/sofnet_activitynet.py evaluate --data DIR --checkpoint runs/mine/last.pt
    python examples/sofnet_activitynet.py predict  --checkpoint runs/mine/last.pt VIDEO...

Top to bottom: weights and checkpoints, training, prediction, demo, command line. Beside it, video_data.py reads videos
and data sets, prepare_data.py checks them, training.py is about many processes and whole checkpoints, frozen_gates.py
about gates on a frozen backbone, and evaluation.py measures. Copy them and edit them. Costs are MACs (multiply-adds),
the literature's "GFLOPs".
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import av
import frozen_gates
import numpy as np
import timm
import torch
from einops import rearrange
from evaluation import (
    MODES,
    calibrated,
    clock,
    evaluate,
    machine,
    print_results,
    relevant_frames,
    run_modes,
    summarise,
    table,
    write_per_video,
)
from prepare_data import check_videos, is_clean, report_on, summary, write_report
from safetensors import SafetensorError
from timm.data import ImageNetInfo
from torch import Tensor, nn
from tqdm import tqdm
from training import (
    CheckpointError,
    SyncedBatchNorm,
    World,
    check_archive,
    choose_gpu,
    explained,
    freeze_statistics,
    load_checkpoint,
    save_checkpoint,
    write_whole,
)
from video_data import (
    FORMATS,
    SPLITS,
    Batch,
    Clips,
    FrameCache,
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
    read_items,
    report_unreadable,
)

from dynskip import (
    UNSEEN,
    DynskipError,
    FixedGate,
    SimilarityGate,
    SkipOutput,
    SoFLoss,
    StopOrForward,
    metrics,
    plot,
    sofnet,
    stage_model,
)
from dynskip.sofnet import Recipe

# ----------------------------------------------------------------------------------------- weights and checkpoints


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


def classifier_name(model: torch.nn.Module) -> str:
    """Qualified name of a timm model's classifier."""
    name = getattr(model, "pretrained_cfg", {}).get("classifier", "head")
    return name if isinstance(name, str) else name[0]


def to_device(model: StopOrForward, device: str) -> StopOrForward:
    """Move a model, with convolutions in the memory layout that they are fastest in."""
    return model.to(device).to(memory_format=torch.channels_last)


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

    batch_size: int = 24  # videos a step, all processes together
    accumulate: int = 1
    clip: float | None = None
    amp: Literal["none", "bf16", "fp16"] = "none"
    batch_norm: Literal["batch", "frozen"] = "batch"
    alpha: float = 0.9
    beta: float = 0.9
    normalize: bool = False
    optimizer: Literal["sgd", "adamw"] = "sgd"
    dense: bool = False
    freeze_backbone: bool = False
    seed: int = 0
    workers: int = 2
    in_memory: bool = False
    cache: Path | None = None
    save_every: int = 200
    tensorboard: bool = False
    device: str = "cpu"


def train(
    config: Config,
    items: Sequence[Item],
    recipe: Recipe,
    options: TrainOptions,
    out: Path,
    start: Path | None,
    weights: str,
    world: World | None = None,
) -> StopOrForward:
    """Train warm-up and joint epochs, writing `last.pt` as training goes on and `warmup.pt` after the warm-up.

    Args:
        config: the model.
        items: training videos.
        recipe: the schedule.
        options: the rest.
        out: folder for checkpoints, `log.jsonl` and `report.json`.
        start: checkpoint to continue from.
        weights: `hub`, `none` or a file, for the backbone of a new model.
        world: the processes that train together; by default this one is alone.

    Returns:
        The trained model.
    """
    world = world or World(device=options.device)
    # The first process starts or restores the model; the others get its weights when they are wrapped.
    fresh = start is None and world.is_first
    kind = FrozenTrainer if options.freeze_backbone else Trainer
    trainer = kind(config, items, recipe, options, out, world, pretrained=fresh and weights == "hub")
    if start is not None:
        trainer.restore(start)
    elif weights == "hub":
        trainer.new_classifier = published_config(config.backbone).num_classes != len(config.classes)
    elif fresh and weights != "none":
        trainer.new_classifier = not load_weights(trainer.model.backbone.model, Path(weights))
        if trainer.new_classifier:
            print(f"{weights} has another number of classes: the classifier starts anew.")
    return trainer.run()


class TrainingStep(nn.Module):
    """A model and its loss as one module, so that whatever wraps it sees a single forward pass."""

    def __init__(self, model: StopOrForward, criterion: SoFLoss, prep: Preprocessing) -> None:
        super().__init__()
        self.model, self.criterion, self.prep = model, criterion, prep

    def forward(self, video: Tensor, targets: Tensor, noise: Tensor | None) -> dict[str, Tensor]:
        """Return `total` and what else is logged, for `(B, T, 3, H, W)` uint8 clips; without `noise`, without gates."""
        inputs = self.prep.normalize(video)
        if noise is None:
            output = self.model(inputs, dense=True)
            loss = self.criterion.classification(output, targets)
            logged = {"total": loss, "classification": loss}
        else:
            output = self.model.decide(self.model.encode(inputs), noise=noise)
            logged = vars(self.criterion(output, targets)) | {"used": output.used.float().mean()}
        return {"accuracy": (output.logits.argmax(-1) == targets).float().mean(), **logged}


class Trainer:
    """One training run: what it needs, and how far it is.

    Everything random follows from seed, epoch, step and video, so that a run that was interrupted goes on exactly, and
    several processes do what one would do.
    """

    def __init__(
        self,
        config: Config,
        items: Sequence[Item],
        recipe: Recipe,
        options: TrainOptions,
        out: Path,
        world: World,
        pretrained: bool,
    ) -> None:
        self.config, self.recipe, self.options, self.out, self.world = config, recipe, options, out, world
        torch.manual_seed(options.seed)
        self.model = to_device(config.build(pretrained), world.device)
        self.clips = Clips(items, config.classes, config.prep, training=True, seed=options.seed, cache=options.cache)
        if options.in_memory:
            self.clips.load_into_memory()
        lookup = self.model.lookup_for((config.prep.size, config.prep.size))
        criterion = SoFLoss(lookup, options.alpha, options.beta if config.guidance else None, options.normalize)
        self.loss = TrainingStep(self.model, criterion.to(world.device), config.prep)
        self.wrapped: Any = None  # the same for this phase, with gradients averaged over the processes
        self.dense: bool | None = None
        groups = recipe.parameter_groups(self.model)
        self.optimizer: torch.optim.Optimizer
        if options.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(
                groups, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
            )
        else:
            self.optimizer = torch.optim.AdamW(groups, recipe.lr, weight_decay=recipe.weight_decay)
        kind = torch.device(world.device).type
        self.scaler = torch.amp.GradScaler(kind, enabled=options.amp == "fp16")
        self.autocast = partial(
            torch.autocast, kind, torch.float16 if options.amp == "fp16" else torch.bfloat16, options.amp != "none"
        )
        self.epoch, self.step = 0, 0  # the next ones to do
        self.steps = math.ceil(len(self.clips) / options.batch_size)  # an epoch
        self.sums: dict[str, float] = {}  # of this epoch so far
        self.count = 0
        self.unreadable: list[str] = []
        self.log: list[dict[str, Any]] = []
        self.board: Any = None
        self.new_classifier = True

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint, which the first process reads."""
        content = self.world.share(lambda: load_checkpoint(path))
        saved = Config.from_json(content["config"])
        if saved != self.config:
            differ = [k for k in asdict(self.config) if getattr(saved, k) != getattr(self.config, k)]
            raise CheckpointError(
                f"{path} is of another model: {', '.join(differ)} differ. Train with the same options."
            )
        now = training_options(self.recipe, self.options)
        before = {**training_options(Recipe(), TrainOptions()), **json.loads(content["training"])}
        step = content.get("step", 0)
        if content["epoch"] + (step > 0) < self.recipe.warmup_epochs:
            before["dense"] = now["dense"]  # during the warm-up there is no difference
        differ = [k for k in now if now[k] != before[k]]
        if differ:
            raise CheckpointError(f"{path} is of another run: {', '.join(differ)} differ. Train with the same options.")
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content.get("scaler", {}))
        self.epoch, self.step = content["epoch"] + 1, step
        self.sums, self.count = content.get("sums", {}), content.get("count", 0)
        self.unreadable = content.get("unreadable", []) if self.world.is_first else []
        self.log = [entry for entry in read_log(self.out / "log.jsonl") if entry["epoch"] < self.epoch]

    def save(self, name: str) -> None:
        """Write all of this to a checkpoint. `epoch` is the last complete one; of the next, `step` steps are done."""
        self.unreadable = sorted(set(self.world.gather(self.unreadable)))
        if not self.world.is_first:
            self.unreadable = []
            return
        save_checkpoint(
            self.out / name,
            epoch=self.epoch - 1,
            step=self.step,
            sums=self.sums,
            count=self.count,
            unreadable=self.unreadable,
            config=self.config.to_json(),
            training=json.dumps(training_options(self.recipe, self.options)),
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
        )

    def run(self) -> StopOrForward:
        """Train to the end of the schedule."""
        begin, done = time.perf_counter(), self.epoch * self.steps + self.step
        if self.options.tensorboard and self.world.is_first:
            self.board = open_tensorboard(self.out / "tensorboard", done)
        while self.epoch < self.recipe.epochs:
            self.run_epoch()
        self.unreadable = self.world.gather(self.unreadable)
        if self.world.is_first:
            if self.board is not None:
                self.board.close()
            report_unreadable(self.unreadable)
            add_to_report(
                self.out,
                model=asdict(self.config),
                training={**training_options(self.recipe, self.options), "epochs": self.recipe.epochs},
                videos=len(self.clips),
                unreadable=sorted(set(self.unreadable)),
                steps=self.recipe.epochs * self.steps,
                last_session={
                    "steps": self.recipe.epochs * self.steps - done,
                    "seconds": round(time.perf_counter() - begin, 1),
                    "processes": self.world.size,
                    "device": machine(self.world.device),
                },
                last_epoch=self.log[-1] if self.log else {},
            )
        return self.model.eval()

    def run_epoch(self) -> None:
        """Train what is left of an epoch."""
        epoch, recipe, options = self.epoch, self.recipe, self.options
        dense = options.dense or recipe.is_warmup(epoch)
        phase = "dense" if options.dense else "warm-up" if dense else "joint"
        self.enter_phase(dense)
        self.model.temperature = recipe.temperature_at(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr_at(epoch) * group["lr_scale"]
        loader = batches(
            self.clips, options.batch_size, options.workers, epoch, self.step, self.world.rank, self.world.size,
            pin_memory=self.world.device.startswith("cuda"),
        )  # fmt: skip
        progress = tqdm(
            loader,
            f"epoch {epoch + 1}/{recipe.epochs} {phase}",
            initial=self.step,
            total=self.steps,
            leave=False,
            disable=None if self.world.is_first else True,
        )
        for batch in progress:
            self.unreadable += batch.errors
            self.run_step(batch)
            self.step += 1
            self.world.check_launcher()  # before anything is written
            if self.count:
                progress.set_postfix({k: f"{v / self.count:.3f}" for k, v in self.sums.items() if k in POSTFIX})
            if options.save_every and self.step % options.save_every == 0 and self.step < self.steps:
                self.save("last.pt")
        if not self.count:
            raise DynskipError(
                "None of the training videos could be read. The first: " + "; ".join(self.unreadable[:1])
            )
        self.end_epoch(phase, {name: value / self.count for name, value in self.sums.items()})

    def end_epoch(self, phase: str, means: dict[str, float]) -> None:
        """Log an epoch and write the checkpoints that are due after it."""
        epoch, recipe = self.epoch, self.recipe
        print(f"epoch {epoch + 1}/{recipe.epochs} {phase}: " + ", ".join(f"{k} {v:.3f}" for k, v in means.items()))
        self.log.append({"epoch": epoch, **means})
        if self.world.is_first:
            write_log(self.out / "log.jsonl", self.log)
        if self.board is not None:
            for name, value in means.items():
                self.board.add_scalar(f"epoch/{name}", value, epoch + 1)
        self.epoch, self.step, self.sums, self.count = epoch + 1, 0, {}, 0
        if epoch == recipe.warmup_epochs - 1:
            self.save("warmup.pt")
        self.save("last.pt")  # last: it says that the epoch is complete

    def enter_phase(self, dense: bool) -> None:
        """Say which parameters are trained: without gates, their parameters would wait for gradients in vain."""
        if dense != self.dense:
            for part in (self.model.gates, self.model.inner):
                if part is not None:
                    part.requires_grad_(not dense)
            self.wrapped, self.dense = None, dense  # the old wrapping goes first
            self.wrapped = self.world.wrap(self.loss)
        self.model.train()
        if self.options.batch_norm == "frozen":
            freeze_statistics(self.model)

    def run_step(self, batch: Batch) -> None:
        """Train on this process's share of one step's videos."""
        options, world = self.options, self.world
        # Dropout, where a backbone has some: as random as everything else, and not the same in every process.
        torch.manual_seed(derive_seed(options.seed, self.epoch, self.step, world.rank))
        readable = int(world.sum(torch.tensor(len(batch.targets), device=world.device)))
        if not readable:
            return
        self.optimizer.zero_grad(set_to_none=True)
        logged: dict[str, Tensor] = {}
        for number in range(options.accumulate):
            rows = part_of(len(batch.targets), number, options.accumulate)
            if world.size == 1 and not rows:
                continue
            waits = world.size > 1 and number < options.accumulate - 1
            with self.wrapped.no_sync() if waits else contextlib.nullcontext():
                with self.autocast(), SyncedBatchNorm(world, counts=len(rows) > 0):
                    found = self.wrapped(*self.inputs(batch, rows))
                # A mean over all videos of the step, however they are spread; the wrapper divides by the processes.
                self.scaler.scale(found["total"] * (len(rows) * world.size / readable)).backward()
            for name, value in found.items():
                logged[name] = logged.get(name, 0.0) + value.detach().float() * len(rows)
        sums = dict(zip(logged, world.sum(torch.stack(list(logged.values()))).tolist(), strict=True))
        if not math.isfinite(sums["total"]):
            raise DynskipError(
                f"The loss became {sums['total']} in epoch {self.epoch + 1}. Lower --lr, or raise --batch-size."
            )
        if options.clip is not None:
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
            sums["gradient_norm"] = norm.item() * readable
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += readable
        if self.board is not None:
            scalars = {name: value / readable for name, value in sums.items()}
            scalars |= {"lr": self.optimizer.param_groups[0]["lr"], "temperature": self.model.temperature}
            for name, value in scalars.items():
                self.board.add_scalar(f"step/{name}", value, self.epoch * self.steps + self.step)

    def inputs(self, batch: Batch, rows: range) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return some videos of a batch, their classes and their gates' noise; of no rows, one black stand-in."""
        frames, size, stages = self.config.prep.num_frames, self.config.prep.size, self.model.backbone.num_stages
        if rows:
            video, targets = batch.video[rows.start : rows.stop], batch.targets[rows.start : rows.stop]
        else:
            video, targets = torch.zeros(1, frames, 3, size, size, dtype=torch.uint8), torch.zeros(1, dtype=torch.long)
        draws = torch.ones(len(video), frames, stages, 2)
        for draw, row in zip(draws, rows, strict=False):
            seed = derive_seed(self.options.seed, self.epoch, batch.positions[row], stages)
            draw.exponential_(generator=torch.Generator().manual_seed(seed))
        where = self.world.device
        noise = None if self.dense else -draws.log().to(where)
        return video.to(where, non_blocking=True), targets.to(where, non_blocking=True), noise


class FrozenTrainer(Trainer):
    """Trains gates on stored features of a backbone that stays as it is; an epoch takes seconds."""

    def run(self) -> StopOrForward:
        """Encode the videos, fit the classifier if it is new, and train gates to the end of the schedule."""
        options, prep = self.options, self.config.prep
        if self.world.size > 1:
            raise DynskipError("--freeze-backbone trains in seconds an epoch: leave torchrun out.")
        clips = Clips(self.clips.items, self.config.classes, prep, False, options.seed, options.cache)
        file = self.out / "features" / "train.safetensors"
        try:
            self.features = frozen_gates.encode(self.model, clips, file, options.workers)
        except SafetensorError as error:  # a full disk
            raise CheckpointError(
                f"Could not write to {file.parent} ({error}). What is there is whole. Make room and start again: the "
                "videos that are missing are then encoded."
            ) from error
        self.targets = [clips.targets[position] for position in self.features.positions.tolist()]
        self.steps = math.ceil(len(self.features) / options.batch_size)
        if self.epoch == 0 and self.new_classifier:
            shares = torch.zeros(len(self.targets), len(self.config.classes))
            for row, labels in enumerate(self.targets):
                shares[row, labels] = 1 / len(labels)
            frozen_gates.fit_head(self.model, self.features, shares)
        return super().run()

    def run_epoch(self) -> None:
        """Train gates and inner classifiers for an epoch; of a video with several labels it draws one."""
        seed = self.options.seed
        drawn = [labels[derive_seed(seed, self.epoch, row) % len(labels)] for row, labels in enumerate(self.targets)]
        means = frozen_gates.gate_epoch(
            self.model, self.features, torch.tensor(drawn), self.loss.criterion, self.optimizer, self.recipe,
            self.epoch, self.options.batch_size, seed,
        )  # fmt: skip
        self.end_epoch("gates", means)


POSTFIX = ("accuracy", "used")  # beside the progress bar


def part_of(count: int, number: int, parts: int) -> range:
    """Return the positions in one of several parts of about the same size."""
    return range(count * number // parts, count * (number + 1) // parts)


def training_options(recipe: Recipe, options: TrainOptions) -> dict[str, Any]:
    """What an interrupted run must be continued with; how long, and on what machine, may change."""
    free = {"joint_epochs", "workers", "device", "cache", "save_every", "tensorboard"}
    values = {**asdict(recipe), **asdict(options), "in_memory": options.in_memory or options.cache is not None}
    return {k: v for k, v in values.items() if k not in free}


def open_tensorboard(folder: Path, step: int) -> Any:
    """Open a log for TensorBoard; what an interrupted run wrote of later steps is hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise DynskipError("--tensorboard needs tensorboard. Run `pip install 'dynskip[train]'`.") from error
    return SummaryWriter(str(folder), purge_step=step)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read what was logged of each epoch."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def write_log(path: Path, log: Sequence[dict[str, Any]]) -> None:
    """Write one line of JSON an epoch."""
    write_whole(path, lambda part: part.write_text("".join(json.dumps(entry) + "\n" for entry in log)))


def add_to_report(out: Path, **content: Any) -> None:
    """Add to the report of a run, `report.json`."""
    file = out / "report.json"
    report = {**(json.loads(file.read_text()) if file.is_file() else {}), **content}
    write_whole(file, lambda part: part.write_text(json.dumps(report, indent=1, default=str) + "\n"))


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
    output: SkipOutput, frames: np.ndarray, model: StopOrForward, title: str, file: Path, **annotation: Any
) -> None:
    """Write the picture of what happened to each frame (thesis Fig. 4.2), with `segments` and `seconds` if known."""
    figure = plot.timeline(
        frames,
        output.stopped_at[0],
        model.backbone.stage_names,
        fallback_frame=int(output.fallback_frame[0]),
        title=title,
        **annotation,
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
        duration = stick_figures.NUM_FRAMES / stick_figures.FPS
        annotation = {
            "segments": [(start / stick_figures.FPS, end / stick_figures.FPS)],
            "seconds": metrics.sample_times(len(frames), duration).tolist(),
        }
        title = f"{item.labels[0]}, recognised as {text.splitlines()[0].partition(': ')[2]}"
        draw_timeline(output, frames, gated, title, args.out / f"timeline_{item.labels[0]}.png", **annotation)
    print(f"\nPictures: {args.out / 'frame_usage.png'}, {args.out / 'timeline_*.png'}")
    return 0


# ---------------------------------------------------------------------------------------------------- command line


def train_command(args: argparse.Namespace) -> int:
    """Train on a data set and evaluate the result; under torchrun, in many processes."""
    world = World.join(args.device)
    with contextlib.nullcontext() if world.is_first else contextlib.redirect_stdout(io.StringIO()):
        return train_in(world, args)


def train_in(world: World, args: argparse.Namespace) -> int:
    """Train as one of several processes; the first one evaluates."""
    items = load_items(args.data, args.annotations, args.format, args.classes)
    training, classes = pick_split(items, "train"), class_names(items, args.classes)
    last = args.out / "last.pt"
    if last.exists() and not args.resume and world.is_first:
        raise DynskipError(f"{last} exists already. Continue it with --resume, or choose another --out.")
    if args.freeze_backbone and (args.dense or args.weights == "none"):
        raise DynskipError(
            "--freeze-backbone trains gates on a finished backbone: leave --dense out, and give --weights."
        )
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
        temperature_decay=args.temperature_decay,
        gate_lr_scale=args.gate_lr_scale,
        weight_decay=args.weight_decay,
    )
    options = TrainOptions(
        batch_size=args.batch_size,
        accumulate=args.accumulate,
        clip=args.clip,
        amp=args.amp,
        batch_norm=args.batch_norm,
        alpha=args.alpha,
        beta=args.beta,
        normalize=args.normalize,
        optimizer=args.optimizer,
        dense=args.dense,
        freeze_backbone=args.freeze_backbone,
        seed=args.seed,
        workers=args.workers,
        in_memory=args.in_memory,
        cache=args.cache,
        save_every=args.save_every,
        tensorboard=args.tensorboard,
        device=args.device,
    )
    start = last if args.resume and world.share(last.exists) else None
    model = train(config, training, recipe, options, args.out, start, args.weights, world)
    world.leave()
    if not world.is_first:
        return 0
    print(f"Wrote {last}.")
    if (split := held_out_split(items)) is not None:
        clips = Clips(pick_split(items, split), classes, config.prep, training=False, seed=args.seed, cache=args.cache)
        results = evaluate(model, clips, 1, args.workers, world.device, MODES[:1] if args.dense else MODES)
        print_results(results, 1, world.device)
        add_to_report(args.out, results=[asdict(result) for result in results])
    print(f"Report: {args.out / 'report.json'}")
    return 0


def prepare_command(args: argparse.Namespace) -> int:
    """Check a data set: what is missing, unreadable or short, and what there is of each class."""
    items = read_items(args.data, args.annotations, args.format, args.classes)
    prep = Preprocessing(args.size, args.frames)
    cache = FrameCache(args.cache, prep.num_frames, prep.short_side) if args.cache else None
    report = report_on(items, check_videos(items, cache, args.workers), args.frames, args.cache is not None)
    write_report(report, args.report)
    print(f"{summary(report)}\nReport: {args.report}")
    return 0 if is_clean(report) else 1


def evaluate_command(args: argparse.Namespace) -> int:
    """Evaluate a checkpoint, or a backbone with published weights, on a data set."""
    items = load_items(args.data, args.annotations, args.format, args.classes)
    split = args.split or held_out_split(items)
    if split is None:
        raise DynskipError("The data has no videos to test on. Say with --split train if you mean those.")
    model, config = model_from(args, class_names(items, args.classes))
    to_device(model, args.device)
    clips = Clips(pick_split(items, split), config.classes, config.prep, training=False, seed=0, cache=args.cache)
    if args.budget is not None or args.max_loss is not None:
        validation = pick_split(items, "val")
        if split == "val":
            print("Thresholds are chosen and evaluated on the same videos: the result is better than on others.")
        calibrated(
            model, Clips(validation, config.classes, config.prep, training=False, seed=0, cache=args.cache), args
        )
    marks = relevant_frames(clips.items, config.prep.num_frames, args.data)
    outcomes = run_modes(model, clips, args.batch_size, args.workers, args.device)
    results = [summarise(model, clips, outcome, marks) for outcome in outcomes]
    print_results(results, args.batch_size, args.device, model.backbone.stage_names)
    if args.per_video:
        write_per_video(args.per_video, clips, config.classes, outcomes, marks)
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
        line = plot.timeline_text(
            output.stopped_at[0],
            model.backbone.stage_names,
            fallback_frame=int(output.fallback_frame[0]),
            color=sys.stdout.isatty() and "NO_COLOR" not in os.environ,
        )
        print(f"{text}\n{textwrap.indent(line, '  ')}\n  {file}")
    if failed:
        print(f"{failed} of {len(args.videos)} files could not be read.", file=sys.stderr)
    return 1 if failed else 0


def model_from(args: argparse.Namespace, classes: list[str] | None) -> tuple[StopOrForward, Config]:
    """Build the model that --checkpoint or --weights asks for; `classes` are the data's, where there are data."""
    changes = {k: v for k in ("threshold", "min_frames") if (v := getattr(args, k)) is not None}
    if args.checkpoint is not None:
        if args.similarity is not None:
            raise DynskipError("--similarity is for --weights: a checkpoint brings its own gates.")
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
    if args.similarity is None:
        print("The gates are untrained: they forward almost every frame. `train` teaches them; or try --similarity.")
        return model, config
    first, *others = model.backbone.num_features
    gates = [SimilarityGate(first, args.similarity), *(FixedGate() for _ in others)]
    return StopOrForward(model.backbone, gates, terminator=model.terminator).eval(), config


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


# What --freeze-backbone changes about train, unless told otherwise: the recipe of benchmarks/ablation.py.
FROZEN_DEFAULTS: dict[str, Any] = {
    "warmup_epochs": 0, "epochs": 40, "optimizer": "adamw", "lr": 1e-3, "lr_drop": 30, "weight_decay": 0.1,
    "temperature_decay": 0.07, "batch_size": 64, "hidden": 64, "forward_bias": 0.0, "shape_memory": True,
}  # fmt: skip


def parser(frozen: bool = False) -> argparse.ArgumentParser:
    """Describe the command line, with the defaults of --freeze-backbone if asked for."""
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

    add = command("prepare", prepare_command, "check a data set before training")
    add_data(add)
    add("--report", type=Path, default=Path("prepare.json"), help="JSON file for all that was found")
    add("--size", type=positive, default=168, help="as for train: height and width that frames are kept for")
    add("--frames", type=positive, default=16, help="as for train: frames of a video")
    add("--workers", type=not_negative, default=min(os.cpu_count() or 1, 8), help="processes that decode videos")

    add = command("train", train_command, "train on a folder of videos")
    add_data(add)
    add("--out", type=Path, required=True, help="folder for checkpoints and the log")
    add("--resume", action="store_true", help="continue from last.pt in --out if it is there, as if never interrupted")
    add(
        "--save-every", type=not_negative, default=200, metavar="STEPS", help="write last.pt within epochs, too; 0: not"
    )
    add("--tensorboard", action="store_true", help="write scalars to OUT/tensorboard")
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
    add(
        "--freeze-backbone",
        action="store_true",
        help="train gates on stored features of a finished backbone; other options then have defaults of their own",
    )
    add("--warmup-epochs", type=not_negative, default=15, help="epochs of the backbone alone")
    add("--epochs", type=not_negative, default=60, help="epochs of backbone and gates together, after the warm-up")
    add("--optimizer", choices=("sgd", "adamw"), default="sgd", help="the thesis trains with SGD")
    add("--lr", type=rate, default=1e-3, help="learning rate")
    add("--lr-drop", type=not_negative, default=30, help="joint epoch from which the learning rate is a tenth")
    add("--temperature-decay", type=rate, default=0.045, help="how fast draws of the gates get sharper, an epoch")
    add("--gate-lr-scale", type=rate, default=1.0, help="learning rate of the gates over the backbone's")
    add("--weight-decay", type=rate, default=1e-5, help="weight decay")
    add("--batch-size", type=positive, default=24, help="videos a step, all processes together")
    add("--accumulate", type=positive, default=1, help="parts that a step is computed in, to save memory")
    add("--clip", type=rate, help="largest norm of the gradient")
    add("--amp", choices=("none", "bf16", "fp16"), default="none", help="compute in half precision where it is safe")
    add(
        "--batch-norm",
        choices=("batch", "frozen"),
        default="batch",
        help="statistics of the batch (of all processes, of one part), or the running ones, which stay as loaded",
    )
    add_machine(add)
    if frozen:
        commands.choices["train"].set_defaults(**FROZEN_DEFAULTS)

    add = command("evaluate", evaluate_command, "accuracy and cost of a checkpoint on a split")
    add_data(add)
    add_source(add)
    add("--split", choices=SPLITS, help="by default test, or val where there is no test")
    add("--batch-size", type=positive, default=1, help="videos at a time; 1 is what the thesis times")
    add("--usage", type=Path, metavar="PNG", help="write a picture of what happened to the frames")
    add("--per-video", type=Path, metavar="FILE", help="write a line of JSON for each video and way of running")
    aim = add.__self__.add_mutually_exclusive_group().add_argument
    aim("--budget", type=float, metavar="GMACS", help="first choose thresholds on split val for this mean cost a video")
    aim("--max-loss", type=float, metavar="POINTS", help="or for at most these points of top-1 below dense")
    add(
        "--curve", type=Path, metavar="PNG", help="with either: draw accuracy against compute; the data beside it, .csv"
    )
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


def above_zero(text: str) -> float:
    """Read a number above 0."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{value} is out of range; give a number above 0")
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
    add(
        "--annotations",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="annotation files of another form; --data is then the folder of the videos or frame folders",
    )
    add("--format", choices=tuple(FORMATS), help="of the annotations; by default told from the files")
    add("--classes", type=Path, metavar="FILE", help="class list (index,name); numbers in annotations refer to it")
    add("--cache", type=Path, metavar="DIR", help="keep decoded frames there and use those that are there")


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
    add(
        "--similarity",
        type=float,
        metavar="DISTANCE",
        help="with --weights: gates without training, which stop frames this close to the last used one, such as 0.003",
    )
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
    choose_gpu()
    args = parser().parse_args(arguments)
    if getattr(args, "freeze_backbone", False):
        args = parser(frozen=True).parse_args(arguments)
    try:
        with explained("Start the command again; training goes on from its last checkpoint with --resume."):
            return int(args.run(args))
    except (DynskipError, OSError) as error:
        process = f" in process {os.environ['RANK']}" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"error{process}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. `train --resume` continues from the last checkpoint.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
