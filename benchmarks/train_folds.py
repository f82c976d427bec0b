"""What do gates gain on a backbone that was fine-tuned? Five folds by camera group.

    python benchmarks/train_folds.py --pack DIR --packed FOLDER                           # once; FOLDER takes 40 MB
    python benchmarks/train_folds.py --packed FOLDER --weights FILE --light FILE          # on a GPU, all folds at once
    python benchmarks/train_folds.py --packed FOLDER --weights FILE --light FILE --stages 1 --methods anytime   # a CPU
    python benchmarks/train_folds.py --report                                             # tables from the results
    python benchmarks/train_folds.py --plot docs/images                                   # curves from the results
    python benchmarks/train_folds.py --pack DIR --packed FOLDER --out FOLDER --quick      # does it all run?

DIR is a folder with `labels.csv` whose clips are named by camera group, as UCF-101's (`_g07_`). Packing keeps 48
pictures of 192x144 of each clip, three for each of its 16 steps, in 16 H.264 files and a list. Unpacking takes OpenCV
or PyAV, whichever is there. `--weights` are ImageNet weights of the backbone, ResNet-50 (`resnet50_v1`) at 128x128 or
another with `--backbone`; `--light` those of EfficientNet-Lite0 for the glance.

A fold is a process of its own. Its test part is a fifth of the camera groups; of the others, a fifth of each class'
groups is the validation part, on which thresholds are chosen, and the rest is trained on. Videos are composed of clips
(`compose_untrimmed.py`), anew for every epoch. For each method, the backbone is trained on videos of 16 frames, half of
them relevant: the whole of it, or with `--stages` its last ones, from what the others make of three variants of the
clips, which is stored. Then the features of all clips are stored, in three variants, and gates are fitted to them for
both kinds of videos, with a glance and without (`sparse.py`, which also explains the tables). Methods:

    plain      cross-entropy of the mean over all frames
    anytime    the same, and of random parts of them (`AnytimeLoss`)
    joint      backbone and gates together with the thesis' loss; then gates are fitted to the features as above
    joint-all  the same with the cross-entropy of the mean over all frames (`SoFLoss(all_frames=1)`)

Gates are fitted with `WorthLoss` in the place of self-supervision (`early_gates.py` says why).
One JSON file for each backbone, kind, method, fold and seed of the gates is written to `benchmarks/results/folds`, or
to `--out`; those that are there are not done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av_or_not  # noqa: F401
import common
import numpy as np
import sparse
import timm
import torch
from compose_untrimmed import (
    CLIP_STEPS,
    Composed,
    Composition,
    compose,
    frames_of,
    split_by_group,
    split_off_validation,
)
from packed import Pictures, pack, unpack
from torch import Tensor, nn
from tqdm import tqdm

from dynskip import (
    DynskipError,
    FixedGate,
    FLOPsLookup,
    SimilarityGate,
    SkipOutput,
    SoFLoss,
    StopOrForward,
    WorthLoss,
    glance,
    sofnet,
    stage_model,
    video,
)
from dynskip.backbone import Carry
from dynskip.backbone.weights import load_weights
from dynskip.losses import anytime_loss
from dynskip.video import command
from dynskip.video.stored import classifier, fit_linear

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "folds"
FOLDS, VARIANTS, BATCH = 5, 3, 8
METHODS = ("plain", "anytime", "joint", "joint-all")
TINY = {"backbone": "test_resnet", "light_name": "test_efficientnet", "size": 64, "glance_size": 32, "epochs": 1}


# ------------------------------------------------------------------------------------------------------- training


def build(args: argparse.Namespace, classes: int, seed: int) -> tuple[StopOrForward, Any, FLOPsLookup]:
    """Return SoF-Net around the backbone, the same backbone after a glance, and what the light network costs."""
    torch.manual_seed(seed)
    plain = stage_model(args.backbone, num_classes=classes, input_size=(3, args.size, args.size))
    light: Any = timm.create_model(args.light_name, num_classes=0)
    for network, file in ((plain.model, args.weights), (light, args.light)):
        if file is not None:
            load_weights(network, file)
    model = sofnet(plain, hidden=sparse.HIDDEN, detach_inner=False, forward_bias=1.0, threshold=None)
    model.lookup_for((args.size, args.size))
    staged = stage_model(light, head=nn.Identity(), num_stages=1, input_size=(3, args.glance_size, args.glance_size))
    cost = FLOPsLookup.measure(staged, args.glance_size)
    model.to(args.device).to(memory_format=torch.channels_last)
    return model, glance(plain, light, args.glance_size).to(args.device), cost


def half_precision(args: argparse.Namespace) -> Any:
    return torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")


def shots_of(compositions: Sequence[Composition]) -> Tensor:
    """Number the shot that each frame is from, `(V, T)`."""
    return torch.tensor([[n for n, shot in enumerate(c.shots) for _ in range(shot.count)] for c in compositions])


def in_float(encoded: Any) -> Any:
    return replace(encoded, pooled=tuple(x.float() for x in encoded.pooled), frame_logits=encoded.frame_logits.float())


@dataclass
class FirstStages:
    """What the stages that stay as they are make of all frames: the next stage's inputs, and what gates see.

    A variant of the clips each. Frames are numbered clip by clip.
    """

    count: int
    inputs: list[np.ndarray]  # `(frames, C, H, W)` in half precision, on disk
    pooled: list[tuple[Tensor, ...]]  # `(frames, C_n)` of the glance and of those stages

    def run(self, backbone: Any, variant: int, frames: Tensor, pooled: list[Tensor] | None = None) -> Tensor:
        """Run the other stages on some frames; return logits `(M, K)`, and add to what gates see."""
        values = torch.from_numpy(self.inputs[variant][frames.numpy()]).float()
        carry = Carry((values.contiguous(memory_format=torch.channels_last),), (("rows", 1),), len(frames))
        for n in range(self.count, backbone.num_stages):
            carry = backbone.run(n, carry)
            if pooled is not None:
                pooled.append(backbone.pool(n, carry))
        logits: Tensor = backbone.head(carry)
        return logits


@torch.no_grad()
def first_stages(args: argparse.Namespace) -> FirstStages:
    """Run the stages that are not trained on all clips, in all variants; or read what they made."""
    folder = args.packed / f"{args.backbone}-{args.size}-glance{args.glance_size}-stages{args.stages}"
    folder.mkdir(exist_ok=True)
    model, glanced, _ = build(args, 2, args.seed)
    backbone, glanced, count = model.eval().backbone, glanced.eval(), model.backbone.num_stages - args.stages
    pictures = Pictures(args.packed, args.size, args.device)
    found = FirstStages(count, [], [])
    for variant in range(VARIANTS):
        inputs, pooled = folder / f"inputs{variant}.npy", folder / f"pooled{variant}.pt"
        if not pooled.exists():
            parts, kept = None, []
            for frames, images in tqdm(all_frames(pictures, variant, args), f"first stages {variant}", disable=None):
                glance = glanced.run(0, glanced.start(images))
                seen, carry = [glanced.pool(0, glance)], backbone.start(images)
                for n in range(count):
                    carry = backbone.run(n, carry)
                    seen.append(backbone.pool(n, carry))
                if len(carry.values) != 1:
                    raise DynskipError(f"--stages {args.stages} begins inside a block; give another number.")
                if parts is None:
                    shape = (len(args.items) * CLIP_STEPS, *carry.values[0].shape[1:])
                    parts = np.lib.format.open_memmap(inputs, "w+", np.float16, shape)
                parts[frames.numpy()] = carry.values[0].half().numpy()
                kept.append(seen)
            torch.save([torch.cat(stage) for stage in zip(*kept, strict=True)], pooled)
        found.inputs.append(np.load(inputs, mmap_mode="r"))
        found.pooled.append(tuple(torch.load(pooled)))
    return found


def all_frames(pictures: Pictures, variant: int, args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield numbers and images of all clips' frames: their middle crops, or another variant, drawn as in training."""
    for clips in torch.arange(len(args.items)).split(BATCH):
        clip, step = clips[:, None].expand(-1, CLIP_STEPS), torch.arange(CLIP_STEPS).expand(len(clips), -1)
        seed = video.derive_seed(args.seed, variant, int(clips[0]), 3)
        drawn = pictures.drawn(clip, step, torch.zeros_like(clip), seed) if variant else pictures.middle(clip, step)
        yield (clip * CLIP_STEPS + step).flatten(), drawn.flatten(0, 1)


def fine_tune(
    model: StopOrForward,
    items: Sequence[video.Item],
    source: Pictures | FirstStages,
    method: str,
    seed: int,
    args: argparse.Namespace,
) -> list[float]:
    """Train the backbone, or the stages behind those that stay; return each epoch's loss."""
    network, joint = model.backbone.model, method.startswith("joint")
    policy = [*model.gates.parameters(), *model.inner.parameters()] if model.inner is not None else []
    last = list(classifier(model).parameters())
    groups = [{"params": [p for p in network.parameters() if all(p is not own for own in last)], "scale": 1.0}]
    groups += [{"params": last, "scale": 1.0 if isinstance(source, Pictures) else 10.0}]  # few epochs for a new layer
    groups += [{"params": policy, "scale": 30.0}] if joint else []
    optimizer = torch.optim.AdamW(groups, args.lr, weight_decay=0.05)
    costs = model.lookup_for((args.size, args.size))
    together = SoFLoss(costs, sparse.ALPHA, sparse.BETA, normalize=True, all_frames=float(method == "joint-all"))
    rows, losses, warm = {item.path: row for row, item in enumerate(args.items)}, [], 2 if joint else 0
    for epoch in range(args.epochs):
        model.train()
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # its statistics stay those of the weights
        model.temperature = 5.0 * 0.08 ** (max(epoch - warm, 0) / max(args.epochs - warm - 1, 1))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * group["scale"] * (0.1 if epoch >= 0.75 * args.epochs else 1)
        plan = compose(items, sparse.IRRELEVANT, 1, video.derive_seed(seed, epoch), sparse.KINDS["half"].plan)
        (clip, step), shot = frames_of(plan, rows), shots_of(plan)
        classes = sorted({each.label for each in plan})
        targets = torch.tensor([classes.index(each.label) for each in plan]).to(args.device)
        torch.manual_seed(video.derive_seed(seed, epoch, 1))
        total = torch.zeros((), device=args.device)
        for number, own in enumerate(torch.randperm(len(plan)).split(BATCH)):
            truth = targets[own.to(args.device)]
            if isinstance(source, FirstStages):
                frames = (clip[own] * CLIP_STEPS + step[own]).flatten()
                logits = source.run(model.backbone, epoch % VARIANTS, frames).view(*clip[own].shape, -1)
            else:
                images = source.drawn(clip[own], step[own], shot[own], video.derive_seed(seed, epoch, number, 2))
                with half_precision(args):
                    encoded = model.encode(images)
                encoded = in_float(encoded)
                logits = encoded.frame_logits
            if joint and epoch >= warm:
                loss = together(model.decide(encoded), truth).total
            else:
                loss = anytime_loss(logits, truth, weight=float(method == "anytime"))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.detach()
        losses.append(round(total.item() / math.ceil(len(plan) / BATCH), 4))
    return losses


# --------------------------------------------------------------------------------------------- features and gates


@torch.no_grad()
def features_of(
    model: StopOrForward, glanced: Any, source: Pictures | FirstStages, variant: int, args: argparse.Namespace
) -> video.StoredFeatures:
    """Encode a variant of all clips."""
    whole, seen, embedding = sofnet(glanced, hidden=8).to(args.device).eval(), list[Sequence[Tensor]](), list[Tensor]()
    last = classifier(model.eval())
    hook = last.register_forward_pre_hook(lambda _, inputs: embedding.append(inputs[0].float()))
    if isinstance(source, FirstStages):
        for frames in torch.arange(len(args.items) * CLIP_STEPS).split(BATCH * CLIP_STEPS):
            pooled: list[Tensor] = []
            source.run(model.backbone, variant, frames, pooled)
            seen.append([*(stage[frames] for stage in source.pooled[variant]), *pooled])
    else:
        for _, images in all_frames(source, variant, args):
            with half_precision(args):
                encoded = in_float(whole.encode(images[:, None]))
            seen.append([stage[:, 0] for stage in encoded.pooled])
    hook.remove()
    stages: list[Sequence[Tensor]] = [*zip(*seen, strict=True), embedding]
    joined = [torch.cat(tuple(stage)).unflatten(0, (-1, CLIP_STEPS)) for stage in stages]
    positions = torch.arange(len(args.items))
    return video.StoredFeatures(tuple(joined[:-1]), joined[-1], positions, (args.size, args.size))


def on_device(videos: Composed, device: str) -> Composed:
    moved = {name: getattr(videos, name).to(device) for name in ("clip", "step", "targets", "relevant")}
    return replace(videos, **moved)


def do_fold(args: argparse.Namespace) -> None:
    """Do all that a fold has no result of yet."""
    torch.backends.cudnn.benchmark = True
    torch.set_num_threads(2 if args.device == "cuda" else 1)
    sparse.SIZE = args.size  # what its functions count costs at
    fold, source = args.fold, first_stages(args) if args.stages else Pictures(args.packed, args.size, args.device)
    divided = split_off_validation(split_by_group(args.items, FOLDS, fold), 1 / FOLDS, args.seed)
    items_of = {split: video.pick_split(divided, split) for split in ("train", "val", "test")}
    classes = {item.labels[0] for item in args.items} - set(sparse.IRRELEVANT)
    for method in args.methods:
        names = {
            f"{args.backbone}-{kind}-{method}-fold{fold}-seed{seed}": (kind, seed)
            for seed, kind in itertools.product(args.gate_seeds, args.kinds)
        }
        missing = [name for name in names if not (args.out / f"{name}.json").exists()]
        if not missing:
            continue
        started = time.perf_counter()
        model, glanced, light = build(args, len(classes), args.seed)
        losses = fine_tune(model, items_of["train"], source, method, video.derive_seed(args.seed, fold), args)
        trained = time.perf_counter() - started
        print(f"[{fold}] {method}: loss {losses[-1]:.3f} after {trained:.0f} s", flush=True)
        variants = [features_of(model, glanced, source, variant, args) for variant in range(VARIANTS)]
        for name in missing:
            kind, seed = names[name]
            content = measure(kind, seed, model, glanced, light, variants, items_of, args)
            seconds = {"backbone": round(trained), "all": round(time.perf_counter() - started)}
            setting = {"backbone": args.backbone, "kind": kind, "method": method, "fold": fold, "seed": seed}
            content["run"] = {**setting, "stages": args.stages or "all", "epochs": args.epochs, "size": args.size}
            content |= {"machine": common.machine(args.device), "seconds": seconds, "losses": losses}
            text = json.dumps(content, separators=(",", ":")).replace("},{", "},\n{")
            (args.out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
            print(f"[{fold}] {name} after {seconds['all']} s", flush=True)


def gates_loss(lookup: FLOPsLookup) -> sparse.Loss:
    """Return the loss of gates: the thesis' one, but with what frames are worth in the place of self-supervision."""
    criterion, worth = SoFLoss(lookup, sparse.ALPHA, 1.0, normalize=True), WorthLoss(lookup)

    def loss(encoded: Any, output: SkipOutput, targets: Tensor) -> Tensor:
        total: Tensor = criterion(output, targets).total + worth(output, targets)
        return total

    return loss


def measure(
    kind_name: str,
    seed: int,
    model: StopOrForward,
    glanced: Any,
    light: FLOPsLookup,
    variants: Sequence[video.StoredFeatures],
    items_of: dict[str, list[video.Item]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Fit gates to the features, and measure all ways to save on one kind of videos."""
    kind, plain = sparse.KINDS[kind_name], model.backbone

    def part(split: str, version: int = 0) -> Composed:
        """Compose the videos of a part; training ones of another variant in every epoch."""
        drawn = video.derive_seed(seed, args.fold, version)
        videos = compose(items_of[split], sparse.IRRELEVANT, kind.copies[split], drawn, kind.plan)
        features = variants[version % len(variants) if split == "train" else 0]
        return on_device(Composed.of(videos, features, args.items), args.device)

    parts = val, test = part("val"), part("test")
    steps, dense = kind.plan.steps, model.lookup_for((args.size, args.size)).dense
    head = nn.Linear(variants[0].pooled[0].shape[-1], plain.num_classes).to(args.device)
    train = part("train", len(variants))
    fit_linear(head, train.means(train.features.pooled[0]), train.targets, 0.003)
    with torch.no_grad():
        logits, light_logits = classifier(model)(variants[0].embedding), head(variants[0].pooled[0])
    shown = [torch.where(p.relevant[..., None], logits[p.clip, p.step], 0.0).sum(1).argmax(-1) for p in parts]
    shares = [float(p.relevant.float().mean()) for p in parts]
    every_frame = StopOrForward(plain, [FixedGate() for _ in plain.num_features]).to(args.device).eval()
    points = {
        "uniform frames": sparse.by_frames(logits, parts, 1 / steps, steps),
        "light network": sparse.by_frames(light_logits, parts, light.dense / dense / steps, steps),
        "relevant frames": [sparse.point(shown[0] == val.targets, shares[0], shown[1] == test.targets, shares[1])],
        "dense": sparse.gated(every_frame, parts, steps * dense),
    }
    first, *others = plain.num_features
    similar = StopOrForward(plain, [SimilarityGate(first), *(FixedGate() for _ in others)]).to(args.device).eval()
    points["similarity gates"] = sparse.gated(similar, parts, steps * dense)
    for name, backbone in (("gates", plain), ("gates after a glance", glanced)):
        gates = sparse.train_gates(backbone, kind, part, seed, f"[{args.fold}] {kind_name}: {name}", gates_loss)
        points[name] = sparse.gated(gates, parts, steps * dense)
    return {
        "videos": {"val": len(val.targets), "test": len(test.targets)},
        "relevant": shares[1],
        "dense_gmacs": steps * dense / 1e9,
        "clips": list(dict.fromkeys(test.clips)),
        "points": points,
    }


# --------------------------------------------------------------------------------------------------- side by side


def do_all(args: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Run each fold in a process of its own: all at once on a GPU, and one after the other on a CPU."""
    unpack(args.packed)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stages:
        first_stages(args)
    command, failed, folds = [sys.executable, __file__, *arguments], list[str](), range(1 if args.quick else FOLDS)
    at_once = FOLDS if args.device == "cuda" else 1
    for begin in range(0, len(folds), at_once):
        own = folds[begin : begin + at_once]
        processes = {fold: subprocess.Popen([*command, "--fold", str(fold)]) for fold in own}
        failed += [str(fold) for fold, process in processes.items() if process.wait()]
    if failed:
        raise DynskipError(f"Folds {', '.join(failed)} failed, see above. The same command does what is missing.")


def committed(folder: Path) -> dict[tuple[str, str, str], sparse.Results]:
    """Read the results of all runs, by backbone, kind and method."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*-fold*.json"))]
    if not found:
        raise DynskipError(f"There are no results in {folder}. Give --packed and the rest to make them.")
    keys = [tuple(each["run"][name] for name in ("backbone", "kind", "method")) for each in found]
    return {key: [each for own, each in zip(keys, found, strict=True) if own == key] for key in dict.fromkeys(keys)}


def report(folder: Path) -> str:
    """Write a table for each backbone, kind and method."""
    blocks, machines = [], dict[str, None]()
    for (backbone, kind, method), own in committed(folder).items():
        seeds, clips = sorted({each["run"]["seed"] for each in own}), {clip for each in own for clip in each["clips"]}
        rows = {name: rest for name, rest in sparse.ROWS.items() if name in own[0]["points"]}
        run = own[0]["run"]
        depth = "trained whole" if run["stages"] == "all" else f"its last {run['stages']} stages trained"
        blocks += [
            f"### {backbone}, {kind}: {method}, {depth}",
            f"{len(own)} runs of {len({each['run']['fold'] for each in own})} folds, seeds {seeds} of the gates; "
            f"{sum(each['videos']['test'] for each in own)} test videos around {len(clips)} clips; {run['epochs']} "
            f"epochs at {run['size']}x{run['size']}; dense {own[0]['dense_gmacs']:.1f} GMACs a video.",
            sparse.table(own, sparse.KINDS[kind].budget, rows),
        ]
        machines |= {", ".join(f"{k} {v}" for k, v in each["machine"].items()): None for each in own}
    return "\n\n".join([*blocks, *machines])


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for."""
    out = args.out or RESULTS
    if args.report:
        print(report(out))
        return 0
    if args.plot:
        for (backbone, kind, method), results in committed(out).items():
            sparse.draw(results, args.plot / f"folds_{backbone}_{kind}_{method}.png", f"{backbone}, {kind}")
        return 0
    if args.packed is None:
        raise DynskipError("Say with --packed where packed clips are, or where they go.")
    if args.quick and args.out is None:
        raise DynskipError("Say with --out where the results of --quick go: they are not to lie with the others.")
    if args.pack:
        pack(args.pack, args.packed, args.quick)
    if args.quick:
        vars(args).update(TINY)
    elif args.pack and args.weights is None:
        return 0
    elif None in (args.weights, args.light):
        raise DynskipError("Training needs --weights and --light; --quick goes without.")
    if args.stages and any(method.startswith("joint") for method in args.methods):
        raise DynskipError("The joint methods train the whole backbone. Leave --stages out, or take other --methods.")
    args.out = out
    names = json.loads((args.packed / "clips.json").read_text(encoding="utf-8"))
    args.items = [video.Item(Path(name), (label,), "train") for name, label in names]
    if args.fold is None:
        do_all(args, [each for n, each in enumerate(args.given) if each != "--pack" and args.given[n - 1] != "--pack"])
    else:
        do_fold(args)
    return 0


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = top.add_argument
    add("--pack", type=Path, metavar="DIR", help="pack the clips of this folder into --packed")
    add("--packed", type=Path, metavar="FOLDER", help="packed clips, and what is made of them")
    add("--backbone", default="resnet50_v1", help="timm model (default: resnet50_v1)")
    add("--weights", type=Path, metavar="FILE", help="ImageNet weights of the backbone")
    add("--light", type=Path, metavar="FILE", help=f"ImageNet weights of {sparse.LIGHT}, for the glance")
    add("--size", type=int, default=sparse.SIZE, help=f"of the frames (default: {sparse.SIZE})")
    add("--glance-size", type=int, default=sparse.GLANCE_SIZE, help=f"(default: {sparse.GLANCE_SIZE})")
    add("--stages", type=int, help="train only so many last stages (default: the whole backbone)")
    add("--out", type=Path, metavar="RESULTS", help="where results go (default: benchmarks/results/folds)")
    add("--methods", nargs="+", choices=METHODS, default=["plain", "anytime"], help="(default: plain anytime)")
    add("--kinds", nargs="+", choices=sparse.KINDS, default=["half", "sparse"], help="(default: half sparse)")
    add("--epochs", type=int, default=8, help="of the backbone (default: 8)")
    add("--lr", type=float, default=5e-5, help="of the backbone (default: 0.00005)")
    add("--seed", type=int, default=0, help="of the backbone, and of what is set aside for validation (default: 0)")
    add("--gate-seeds", type=int, nargs="+", default=[0, 1, 2], help="of the gates (default: 0 1 2)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quick", action="store_true", help="tiny networks, few clips, one fold and epoch: does it all run?")
    add("--report", action="store_true", help="print the tables of the results")
    add("--plot", type=Path, metavar="FOLDER", help="draw the curves of the results")
    add("--fold", type=int, help=argparse.SUPPRESS)
    top.set_defaults(light_name=sparse.LIGHT)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    args.given = list(sys.argv[1:] if arguments is None else arguments)
    return command.run(lambda: run(args), "Finished runs stay; the same command goes on.")


if __name__ == "__main__":
    sys.exit(main())
