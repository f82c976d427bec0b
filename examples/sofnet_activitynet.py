"""SoF-Net on your videos: train, evaluate, draw. And a demo that needs no data.

    python examples/sofnet_activitynet.py demo
    python examples/sofnet_activitynet.py train --data DIR --out runs/mine

One file to copy and edit, read from top to bottom: settings, model, loss, loop, checkpoints, evaluation, demo. `train`
writes a folder OUT/model; evaluate.py, predict.py, stream_video.py and corpus_ray.py take it. Costs are MACs
(multiply-adds), the literature's "GFLOPs".
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from dynskip import DynskipError, SoFLoss, StopOrForward, evaluation, glance, plot, sofnet, stage_model, video
from dynskip.backbone.weights import load_weights
from dynskip.sofnet import Recipe
from dynskip.video import command
from dynskip.video.outputs import check_folders, whole_file

# -------------------------------------------------------------------------------------------------------- settings


def parser() -> argparse.ArgumentParser:
    """Describe the command line; the defaults of `train` are the thesis' recipe."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = argparse.ArgumentDefaultsHelpFormatter
    demo = commands.add_parser("demo", help="train and compare on rendered videos", formatter_class=show)
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for videos, checkpoints and pictures")
    demo.set_defaults(cache=None, amp="no", accumulate=1, tensorboard=False)
    training = commands.add_parser("train", help="train on a folder of videos", formatter_class=show)
    add = training.add_argument
    add("--out", type=Path, required=True, help="folder for checkpoints, log, trained model and pictures")
    add("--resume", action="store_true", help="go on from OUT/last.pt, if it is there, as if never interrupted")
    add("--start", type=Path, metavar="FILE", help="start from a checkpoint of another run, such as its warmup.pt")
    add("--save-every", type=int, default=200, metavar="STEPS", help="write last.pt within epochs, too")
    add("--tensorboard", action="store_true", help="write scalars to OUT/tensorboard")
    add("--data", type=Path, required=True, help="folder with labels.csv (path,label,split), or such a CSV file")
    add("--annotations", type=Path, nargs="+", default=[], metavar="FILE", help="annotation files of another format")
    add("--format", help="of the annotations: csv, activitynet, thumos, list, list-labels; by default told from them")
    add("--classes", type=Path, metavar="FILE", help="class list (index,name), for annotations that number classes")
    add("--cache", type=Path, metavar="DIR", help="keep decoded frames there, and use those that are there")
    add("--in-memory", action="store_true", help="decode every video once and keep it; for small sets")
    add("--size", type=int, default=168, help="height and width of the frames in pixels")
    add("--frames", type=int, default=16, help="frames of a video")
    add("--workers", type=int, default=min(os.cpu_count() or 1, 8), help="processes that decode videos")
    add("--evaluation-batch", type=int, default=1, help="videos at a time in the evaluation; the thesis times 1")
    add("--backbone", default="resnet50", help="any timm model")
    add("--weights", default="hub", help="of the backbone: 'hub' downloads timm's, 'none' starts anew, or a FILE")
    add("--glance", metavar="NAME", help="light timm model that looks at a small copy of each frame first")
    add("--glance-size", type=int, default=96, help="shorter side of that copy in pixels")
    add("--glance-weights", default="hub", help="of the light model: as --weights")
    add("--activation", choices=("softmax", "sigmoid"), default="softmax", help="one class a video, or several")
    add("--hidden", type=int, default=512, help="width of the gates")
    add("--no-guidance", action="store_true", help="leave out inner classifiers and the policy guidance loss")
    add("--shape-memory", action="store_true", help="let the inner classification loss shape the gates' memory, too")
    add("--forward-bias", type=float, default=3.0, help="how far gates start towards forwarding")
    add("--threshold", type=float, default=0.999, help="probability that ends a video early")
    add("--min-frames", type=int, default=3, help="frames that are looked at in any case")
    add("--alpha", type=float, default=0.9, help="accuracy (1) against efficiency (0)")
    add("--beta", type=float, default=0.9, help="inner classification (1) against self-supervision (0)")
    add("--normalize", action="store_true", help="efficiency loss as a share of the dense cost, not in GMACs")
    add("--dense", action="store_true", help="train without gates for all epochs: the baseline")
    add("--warmup-epochs", type=int, default=15, help="epochs of the backbone alone")
    add("--epochs", type=int, default=60, help="epochs of backbone and gates together, after the warm-up")
    add("--optimizer", choices=("sgd", "adamw"), default="sgd", help="the thesis trains with SGD")
    add("--lr", type=float, default=1e-3, help="learning rate")
    add("--lr-drop", type=int, default=30, help="joint epoch from which the learning rate is a tenth")
    add("--gate-lr-scale", type=float, default=1.0, help="learning rate of the gates over the backbone's")
    add("--weight-decay", type=float, default=1e-5, help="weight decay")
    add("--temperature", type=float, default=5.0, help="of the gates' draws when they start to train")
    add("--temperature-decay", type=float, default=0.045, help="how fast the temperature falls, an epoch")
    add("--batch-size", type=int, default=24, help="videos of a step, all processes together")
    add("--accumulate", type=int, default=1, help="parts that a step is computed in, to save memory")
    add("--clip", type=float, help="largest norm of the gradient")
    add("--amp", choices=("no", "bf16", "fp16"), default="no", help="compute in half precision where it is safe")
    add("--batch-norm", choices=("batch", "frozen"), default="batch", help="statistics of the batch, or as loaded")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    for each in (demo, training):
        each.add_argument("--device", choices=("cpu", "cuda"), default=best, help="where to run")
        each.add_argument("--seed", type=int, default=0, help="different seeds train differently")
    return top


# ----------------------------------------------------------------------------------------------------------- model


def build_model(args: argparse.Namespace, classes: Sequence[str]) -> StopOrForward:
    """Return the model, and with it how frames become its input."""
    torch.manual_seed(args.seed)
    fixed = timm.is_model(args.backbone) and timm.get_pretrained_cfg_value(args.backbone, "fixed_input_size")
    backbone = stage_model(
        args.backbone, input_size=(3, args.size, args.size), num_classes=len(classes),
        pretrained=args.weights == "hub", **({"img_size": args.size} if fixed else {}),
    )  # fmt: skip
    network: Any = backbone.model
    if args.weights not in ("hub", "none") and not load_weights(network, args.weights):
        print(f"{args.weights} has another number of classes: the classifier starts anew.")
    if args.glance is not None:
        backbone = glance(backbone, args.glance, args.glance_size, pretrained=args.glance_weights == "hub")
        if args.glance_weights not in ("hub", "none"):
            load_weights(backbone.glance.light.model, args.glance_weights)
    model = sofnet(
        backbone, hidden=args.hidden, forward_bias=args.forward_bias, detach_inner=not args.shape_memory,
        guidance=not args.no_guidance, threshold=args.threshold, min_frames=args.min_frames, activation=args.activation,
    )  # fmt: skip
    published = network.pretrained_cfg
    prep = video.Preprocessing(args.size, args.frames, tuple(published["mean"]), tuple(published["std"]))
    model.class_names, model.preprocessing = classes, prep.to_dict()
    return model.to(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------------ loss


class TrainingStep(nn.Module):
    """Model and loss as one module, so that DistributedDataParallel sees a single forward pass."""

    def __init__(self, model: StopOrForward, args: argparse.Namespace) -> None:
        super().__init__()
        self.model, self.prep = model, video.Preprocessing.of(model)
        beta = None if args.no_guidance else args.beta
        self.criterion = SoFLoss(model.lookup_for((args.size, args.size)), args.alpha, beta, args.normalize)

    def forward(self, clips: Tensor, targets: Tensor, noise: Tensor | None) -> dict[str, Tensor]:
        """Return the loss `total` and what else is logged, of clips `(B, T, 3, H, W)`; no noise means no gates."""
        inputs = self.prep.normalize(clips)
        if noise is None:
            output = self.model(inputs, dense=True)
            loss = self.criterion.classification(output, targets)
            logged = {"total": loss, "classification": loss}
        else:
            output = self.model.decide(self.model.encode(inputs), noise=noise)
            logged = vars(self.criterion(output, targets)) | {"used": output.used.float().mean()}
        right = output.logits.argmax(-1) == targets if targets.ndim == 1 else (output.probabilities > 0.5) == targets
        return {"accuracy": right.float().mean(), **logged}


def gumbel_noise(batch: video.Batch, seed: int, epoch: int, stages: int) -> Tensor:
    """Draw each video's noise `(B, T, N, 2)` from its own seed, so that it does not depend on the processes."""
    draws = torch.empty(*batch.video.shape[:2], stages, 2)
    for draw, position in zip(draws, batch.positions, strict=True):
        generator = torch.Generator().manual_seed(video.derive_seed(seed, epoch, position, stages))
        draw.exponential_(generator=generator)
    return -draws.log()


# ------------------------------------------------------------------------------------------------------------ loop


def train(args: argparse.Namespace, accelerator: Accelerator) -> evaluation.Evaluation | None:
    """Train on a folder of videos: warm-up, then gates and backbone together. Evaluate, and write OUT/model.

    Everything random follows from seed, epoch, step and video. So a run that was interrupted goes on exactly, and
    several processes do what one would do.
    """
    items = video.load_items(args.data, args.annotations, args.format, args.classes)
    model = build_model(args, video.class_names(items, args.classes))
    clips = video.Clips.of(model, video.pick_split(items, "train"), True, args.seed, args.cache)
    if args.in_memory:
        clips.load_into_memory()
    if args.batch_norm == "batch" and accelerator.num_processes > 1:
        if accelerator.device.type == "cpu":
            raise DynskipError("On CPUs, processes cannot share statistics of a batch: give --batch-norm frozen.")
        timm.layers.convert_sync_batchnorm(model.backbone)
    step = TrainingStep(model.to(accelerator.device), args).to(accelerator.device)
    recipe = Recipe(
        args.warmup_epochs, args.epochs, args.lr, args.lr_drop, args.gate_lr_scale, weight_decay=args.weight_decay,
        temperature=args.temperature, temperature_decay=args.temperature_decay,
    )  # fmt: skip
    sgd: dict[str, Any] = {"momentum": recipe.momentum} if args.optimizer == "sgd" else {}
    kind = torch.optim.SGD if sgd else torch.optim.AdamW
    optimizer = kind(recipe.parameter_groups(model), recipe.lr, weight_decay=recipe.weight_decay, **sgd)
    run = Run(args, model, optimizer, accelerator, video.list_videos(items, args.data))
    wrapped: Any = None
    for epoch in range(run.epoch, recipe.epochs):
        dense = args.dense or recipe.is_warmup(epoch)
        if wrapped is None or epoch == recipe.warmup_epochs:
            # Parameters that take no part say so before they are wrapped, or others would wait for their gradients.
            for part in filter(None, (model.gates, model.inner, model.backbone.glance)):
                part.requires_grad_(not dense)
            accelerator.free_memory()
            wrapped, stepper = accelerator.prepare(step, optimizer)
        model.train()
        for module in model.modules() if args.batch_norm == "frozen" else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        model.temperature = recipe.temperature_at(epoch)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(epoch) * group["lr_scale"]
        loader = video.training_batches(
            clips, epoch, args.batch_size, args.accumulate, args.workers, run.step,
            accelerator.process_index, accelerator.num_processes,
        )  # fmt: skip
        name = f"epoch {epoch + 1}/{recipe.epochs} {'dense' if args.dense else 'warm-up' if dense else 'joint'}"
        for batch in tqdm(loader, name, leave=False, disable=None if accelerator.is_main_process else True):
            torch.manual_seed(video.derive_seed(args.seed, epoch, run.step, accelerator.process_index))  # for dropout
            noise = None if dense else gumbel_noise(batch, args.seed, epoch, model.backbone.num_stages)
            inputs = [x if x is None else x.to(accelerator.device) for x in (batch.video, batch.targets, noise)]
            with accelerator.accumulate(wrapped):
                found = wrapped(*inputs)
                accelerator.backward(found["total"])
                if args.clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.clip)
                stepper.step()
                stepper.zero_grad()
            run.note(found, batch.errors)
            if args.save_every and run.step % (args.save_every * args.accumulate) == 0:
                run.save("last.pt")
        run.end_epoch(name)
        if epoch == recipe.warmup_epochs - 1:
            run.save("warmup.pt")
        run.save("last.pt")  # last, for it says that the epoch is complete
    for error in sorted(run.unreadable):
        accelerator.print(f"unreadable, another video took its place: {error}")
    return finish(model.eval(), items, args) if accelerator.is_main_process else None


# ----------------------------------------------------------------------------------------------------- checkpoints

# What may change when a run goes on.
FREE = {"command", "out", "resume", "start", "save_every", "tensorboard", "data", "annotations", "classes", "cache",
        "in_memory", "workers", "epochs", "device", "evaluation_batch"}  # fmt: skip


class Run:
    """How far a run is. One file holds everything, so that a save is whole or not there."""

    def __init__(self, args: Any, model: StopOrForward, optimizer: Any, accelerator: Accelerator, data: Any) -> None:
        self.out, self.model, self.optimizer, self.accelerator = args.out, model, optimizer, accelerator
        self.settings: dict[str, Any] = {key: str(value) for key, value in vars(args).items() if key not in FREE}
        self.settings |= {"classes": str(model.class_names), "kept frames": str(bool(args.cache or args.in_memory))}
        self.settings["videos"] = data
        self.launcher = os.getppid()
        self.epoch = self.step = 0  # the next ones to do; with --accumulate, a step is a part
        self.sums: dict[str, float] = {}
        self.log: list[dict[str, float]] = []
        self.unreadable: set[str] = set()
        last = args.out / "last.pt"
        if last.exists() and not args.resume:
            raise DynskipError(f"{last} exists already. Continue it with --resume, or choose another --out.")
        if last.exists() or args.start:
            self.restore(last if last.exists() else args.start, compare=last.exists())
        # The optimiser keeps two numbers a weight; there are up to three checkpoints, and the model at the end.
        check_folders(args.out, needed=(4 if last.exists() else 10) * sum(p.nbytes for p in model.parameters()))
        if args.tensorboard:
            accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": self.epoch + 1}})

    def note(self, found: dict[str, Tensor], errors: Sequence[str]) -> None:
        """Add the values of a step, the mean over all processes."""
        self.unreadable |= set(errors)
        values = self.accelerator.reduce(torch.stack([value.detach().float() for value in found.values()]), "mean")
        for key, value in zip(found, values.tolist(), strict=True):
            self.sums[key] = self.sums.get(key, 0.0) + value
        self.step += 1
        if not math.isfinite(self.sums["total"]):
            raise DynskipError(f"The loss became {self.sums['total']} in epoch {self.epoch + 1}. Lower --lr.")

    def end_epoch(self, name: str) -> None:
        """Log the means of an epoch."""
        means = {key: value / self.step for key, value in self.sums.items()}
        values = ", ".join(f"{key} {value:.3f}" for key, value in means.items())
        self.accelerator.print(f"{name}: {values}", flush=True)
        self.accelerator.log(means, self.epoch + 1)
        self.log.append({"epoch": self.epoch, **means})
        if self.accelerator.is_main_process:
            (self.out / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in self.log))
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}

    def save(self, name: str) -> None:
        """Write a checkpoint in one step; the first process does."""
        if self.accelerator.num_processes > 1 and os.getppid() != self.launcher:
            raise DynskipError("torchrun is gone, so this process stops, too.")  # it would write into a resumed run
        if not self.accelerator.is_main_process:
            return
        kept = {key: getattr(self, key) for key in ("settings", "epoch", "step", "sums", "log", "unreadable")}
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.accelerator.scaler}
        states = {key: part.state_dict() for key, part in parts.items() if part is not None}
        with whole_file(self.out / name, "Go on with --resume.") as file:
            torch.save(kept | states | {"made_with": command.VERSIONS}, file)

    def restore(self, file: Path, compare: bool) -> None:
        """Go on from a checkpoint; `compare` refuses one that was made with other settings."""
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
            settings, made_with = content.pop("settings"), content.pop("made_with", "an earlier version")
        except Exception as error:  # a damaged file can fail in any way
            raise DynskipError(f"{file} is missing or damaged ({error!r}). Train again.") from error
        differ = [key for key in self.settings | settings if settings.get(key) != self.settings.get(key)]
        changes = video.data_changes(settings.get("videos", []), self.settings["videos"])
        if compare and differ:
            raise DynskipError(
                f"{file} is of another run: {', '.join(differ)} differ{changes}. Train with the same settings and data."
            )
        for key, part in {"model": self.model, "optimizer": self.optimizer, "scaler": self.accelerator.scaler}.items():
            state = content.pop(key, None)
            with command.explained(f"the {key} of {file}", made_with):
                if part is not None:
                    part.load_state_dict(state)
        vars(self).update(content)


# ------------------------------------------------------------------------------------------ evaluation and pictures


def finish(model: StopOrForward, items: Sequence[video.Item], args: argparse.Namespace) -> evaluation.Evaluation | None:
    """Evaluate on videos that were not trained on, if there are any; draw what happened, and write OUT/model."""
    found = None
    if (split := video.held_out_split(items)) is not None:
        clips = video.Clips.of(model, video.pick_split(items, split), cache=args.cache)
        loader = video.EvaluationLoader(clips, args.evaluation_batch, args.workers, args.device)
        marks = video.relevant_frames(clips.items, clips.prep.num_frames, args.data)
        modes = evaluation.MODES[:1] if args.dense else evaluation.MODES
        found = evaluation.evaluate(model, tqdm(loader, "evaluate", leave=False, disable=None), modes, marks)
        print("\n".join(f"unreadable, left out: {error}" for error in loader.unreadable) + f"\n{found.report()}\n")
        found.write_records(args.out / "videos.jsonl")
        if not args.dense:
            draw(found, clips, args.out)
    shutil.rmtree(args.out / "model", ignore_errors=True)
    print(f"Model: {model.save_pretrained(args.out / 'model', results=found.rows() if found else [])}")
    return found


def draw(found: evaluation.Evaluation, clips: video.Clips, out: Path) -> None:
    """Draw what happened to all frames, and to those of one video of each of six labels (thesis Fig. 4.2)."""
    usage = plot.frame_usage(found.results[-1].usage, found.stage_names, title="What happened to the frames")
    usage.savefig(out / "frame_usage.png")
    positions = {str(item.path): position for position, item in enumerate(clips.items)}
    records = {", ".join(each["labels"]): each for each in found.records if each["mode"] == found.results[-1].mode}
    for label, record in list(records.items())[:6]:
        clip = clips[0, positions[record["video"]]].video
        assert clip is not None
        answer = ", ".join(f"{name} {100 * p:.1f} %" for name, p in record["answer"].items()) or "nothing"
        figure = plot.timeline(
            clip.permute(0, 2, 3, 1), record["stopped_at"], found.stage_names, segments=record.get("relevant"),
            fallback_frame=record["fallback_frame"], title=f"{label or 'nothing'}, recognised as {answer}",
        )  # fmt: skip
        figure.savefig(out / f"timeline_{label.replace('/', '_')}.png")
    print(f"Pictures: {out / 'frame_usage.png'}, {out / 'timeline_*.png'}")


# ------------------------------------------------------------------------------------------------------------ demo


def demo(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Train on rendered videos: the dense backbone, then SoF-Net from the same warm-up."""
    root = video.render_set(args.out / "videos", train_per_class=40, test_per_class=30, seed=args.seed)
    shared = f"""--backbone test_resnet --weights none --size 48 --in-memory --workers 0 --resume --hidden 64
        --shape-memory --forward-bias 2 --alpha 0.05 --normalize --optimizer adamw --lr 3e-3 --lr-drop 9
        --gate-lr-scale 1.5 --weight-decay 1e-2 --temperature 2 --temperature-decay 0.1 --batch-size 8
        --warmup-epochs 14 --epochs 12 --evaluation-batch 30 --seed {args.seed} --device {args.device}""".split()
    shared = ["train", "--data", str(root), *shared]
    print("1/2  The dense backbone: warm-up, then as many epochs again without gates")
    dense = train(parser().parse_args([*shared, "--dense", "--out", f"{args.out}/dense"]), accelerator)
    print("\n2/2  SoF-Net from the same warm-up: backbone and gates together")
    start = ["--start", f"{args.out}/dense/warmup.pt", "--out", f"{args.out}/gated"]
    gated = train(parser().parse_args([*shared, *start]), accelerator)
    if dense is not None and gated is not None:
        both = replace(gated, results=[*dense.results, *gated.results[1:]])
        print(f"\nThe dense backbone of step 1 against the gates of step 2:\n\n{both.table()}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parser().parse_args(arguments)

    def work() -> None:
        check_folders(args.out, args.cache)
        accelerator = Accelerator(
            cpu=args.device == "cpu", mixed_precision=args.amp, gradient_accumulation_steps=args.accumulate,
            log_with="tensorboard" if args.tensorboard else None, project_dir=args.out,
        )  # fmt: skip
        with video.hold_folder(args.out, accelerator.is_main_process):
            (demo if args.command == "demo" else train)(args, accelerator)
        accelerator.end_training()

    interrupted = f"The same command{'' if args.command == 'demo' else ' with --resume'} goes on from where it was."
    return command.run(work, interrupted, "Raise --accumulate, use --amp bf16, or lower --size, --frames or --workers.")


if __name__ == "__main__":
    sys.exit(main())
