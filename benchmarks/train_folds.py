"""What do gates gain on a backbone that was fine-tuned as a whole? Five folds by camera group, side by side on one GPU.

    python benchmarks/train_folds.py --pack DIR --packed FOLDER                               # here, without a GPU
    python benchmarks/train_folds.py --packed FOLDER --weights FILE --light FILE --out RESULTS    # there
    python benchmarks/train_folds.py --report RESULTS
    python benchmarks/train_folds.py --pack DIR --packed FOLDER --out RESULTS --quick         # does it all run?

DIR is a folder with `labels.csv` whose clips are named by camera group, as UCF-101's (`_g07_`). Packing keeps 48
pictures of 192x144 of each clip, three for each of its 16 steps, in 16 H.264 files and a list. Unpacking takes OpenCV
or PyAV, whichever is there. FILE are ImageNet weights of ResNet-50 (`resnet50_v1`), and of EfficientNet-Lite0 for the
glance.

A fold is a process of its own. Its test part is a fifth of the camera groups; of the others, a fifth of each class'
groups is the validation part, on which thresholds are chosen, and the rest is trained on. Videos are composed of clips
(`compose_untrimmed.py`), anew for every epoch. For each method, the whole backbone is trained on videos of 16 frames,
half of them relevant. Then the features of all clips are stored, in three variants, and gates are fitted to them for
both kinds of videos, with a glance and without (`sparse.py`, which also explains the tables). Methods:

    plain      cross-entropy of the mean over all frames
    anytime    the same, and of random parts of them (`AnytimeLoss`)
    joint      backbone and gates together with the thesis' loss; then gates are fitted to the features as above
    joint-all  the same with the cross-entropy of the mean over all frames (`SoFLoss(all_frames=1)`)

One JSON file for each fold, method and kind is written to RESULTS; those that are there are not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av_or_not  # noqa: F401
import common
import numpy as np
import sparse
import timm
import torch
import torch.nn.functional as F
from compose_untrimmed import (
    CLIP_STEPS,
    Composed,
    Composition,
    compose,
    frames_of,
    split_by_group,
    split_off_validation,
)
from torch import Tensor, nn

from dynskip import DynskipError, FixedGate, FLOPsLookup, SoFLoss, StopOrForward, glance, sofnet, stage_model, video
from dynskip.backbone.weights import load_weights
from dynskip.losses import anytime_loss
from dynskip.video import command
from dynskip.video.stored import classifier, fit_linear

PICTURES, HEIGHT, WIDTH, FILES = 48, 144, 192, 16
A_STEP = PICTURES // CLIP_STEPS
FOLDS, VARIANTS, BATCH = 5, 3, 8
METHODS = ("plain", "anytime", "joint", "joint-all")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TINY = {"backbone": "test_resnet", "light_name": "test_efficientnet", "size": 64, "glance_size": 32, "epochs": 1}


# ------------------------------------------------------------------------------------------------ packed pictures


def pack(data: Path, folder: Path, quick: bool) -> None:
    """Write the pictures of all clips into a few video files, and a list of the clips."""
    import av

    items = video.load_items(data)
    if quick:
        items = [item for item in items if re.search(r"_g(0\d|10)_c01", item.path.name)]
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.array_split(np.arange(len(items)), FILES)):
        with av.open(str(folder / f"part{number:02d}.mp4"), "w") as container:
            # A clip begins with a picture that needs no other one.
            stream: Any = container.add_stream("libx264", Fraction(10), {"crf": "23", "g": str(PICTURES)})
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for row in part:
                frames = torch.from_numpy(video.sample_frames(video.open_source(items[row].path), PICTURES, HEIGHT))
                small = F.interpolate(frames.permute(0, 3, 1, 2).float(), (HEIGHT, WIDTH), mode="area")
                for picture in small.round().byte().permute(0, 2, 3, 1).numpy():
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    names = [[item.path.name, item.labels[0]] for item in items]
    (folder / "clips.json").write_text(json.dumps(names), encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.glob("part*.mp4"))
    print(f"{len(items)} clips, {size / 1e6:.1f} MB in {folder}")


def pictures_of(file: Path) -> np.ndarray:
    """Decode a packed file, `(pictures, 3, H, W)`."""
    try:
        import cv2  # type: ignore[import-not-found]

        capture, found = cv2.VideoCapture(str(file)), []
        while (read := capture.read())[0]:
            found.append(read[1][:, :, ::-1])
    except ImportError:
        import av

        with av.open(str(file)) as container:
            found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    pictures: np.ndarray = np.stack(found).transpose(0, 3, 1, 2)
    return pictures


def unpack(folder: Path) -> None:
    """Decode all packed files into one array on disk, which the folds share."""
    file = folder / "frames.npy"
    if file.exists():
        return
    with ProcessPoolExecutor() as pool:
        frames = np.concatenate(list(pool.map(pictures_of, sorted(folder.glob("part*.mp4")))))
    clips = len(json.loads((folder / "clips.json").read_text(encoding="utf-8")))
    if len(frames) != clips * PICTURES:
        raise DynskipError(
            f"{folder} has {len(frames)} pictures for {clips} clips; expected {PICTURES} each. Pack again."
        )
    with file.with_suffix(".part").open("wb") as unfinished:
        np.save(unfinished, frames)
    file.with_suffix(".part").rename(file)


class Pictures:
    """All pictures, on the device, and crops of them."""

    def __init__(self, folder: Path, size: int, device: str) -> None:
        self.frames = torch.from_numpy(np.load(folder / "frames.npy", mmap_mode="c")).to(device)
        self.size, self.device = size, device
        self.mean, self.std = (torch.tensor(each, device=device).view(3, 1, 1) for each in (MEAN, STD))

    def crop(self, rows: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Crop pictures to normalised squares: `(M, 2)` scales and shifts of both axes, as shares of half a side."""
        theta = torch.zeros(len(rows), 2, 3, device=self.device)
        theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale[:, 0], scale[:, 1], shift
        images = self.frames[rows].float() / 255
        grid = F.affine_grid(theta, [len(rows), 3, self.size, self.size], align_corners=False)
        images = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def middle(self, clip: Tensor, step: Tensor) -> Tensor:
        """Return the middle crop of the middle picture of each step: `(V, T) -> (V, T, 3, size, size)`."""
        rows = ((clip * CLIP_STEPS + step) * A_STEP + A_STEP // 2).flatten().to(self.device)
        scale = torch.tensor([HEIGHT / WIDTH, 1.0], device=self.device) * 7 / 8
        images = self.crop(rows, scale.expand(len(rows), 2), torch.zeros(len(rows), 2, device=self.device))
        return images.view(*clip.shape, *images.shape[1:])

    def drawn(self, clip: Tensor, step: Tensor, shot: Tensor, seed: int) -> Tensor:
        """The same of random pictures, with a random crop that may be mirrored, the same in a shot."""
        generator = torch.Generator().manual_seed(seed)
        videos, frames = clip.shape
        draws = torch.rand(videos, frames, 5, generator=generator)
        draws = draws.gather(1, shot[..., None].expand(-1, -1, 5)).flatten(0, 1)  # of the frame with the shot's number
        area, ratio = 0.35 + 0.65 * draws[:, 0], torch.exp((draws[:, 1] - 0.5) / 2)
        high = (area / ratio).sqrt().clamp(max=1)
        wide = ((area * ratio).sqrt() * HEIGHT / WIDTH).clamp(max=1)
        scale = torch.stack([wide, high], 1)
        shift = (2 * draws[:, 2:4] - 1) * (1 - scale)
        scale[:, 0] *= torch.where(draws[:, 4] < 0.5, -1.0, 1.0)
        picture = torch.randint(A_STEP, (videos * frames,), generator=generator)
        rows = ((clip * CLIP_STEPS + step) * A_STEP).flatten() + picture
        images = self.crop(rows.to(self.device), scale.to(self.device), shift.to(self.device))
        return images.view(*clip.shape, *images.shape[1:])


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


def fine_tune(
    model: StopOrForward, items: Sequence[video.Item], pictures: Pictures, method: str, seed: int, args: Any
) -> list[float]:
    """Train the whole backbone; return each epoch's loss."""
    network, joint = model.backbone.model, method.startswith("joint")
    policy = [*model.gates.parameters(), *model.inner.parameters()] if model.inner is not None else []
    groups = [{"params": list(network.parameters()), "scale": 1.0}]
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
            frames = pictures.drawn(clip[own], step[own], shot[own], video.derive_seed(seed, epoch, number, 2))
            with half_precision(args):
                encoded = model.encode(frames)
            encoded, truth = in_float(encoded), targets[own.to(args.device)]
            if joint and epoch >= warm:
                loss = together(model.decide(encoded), truth).total
            else:
                loss = anytime_loss(encoded.frame_logits, truth, weight=float(method == "anytime"))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.detach()
        losses.append(round(total.item() / math.ceil(len(plan) / BATCH), 4))
    return losses


# --------------------------------------------------------------------------------------------- features and gates


@torch.no_grad()
def features_of(backbone: Any, pictures: Pictures, variant: int, args: argparse.Namespace) -> video.StoredFeatures:
    """Encode all clips: their middle crops, or another variant, drawn as in training."""
    model, found = sofnet(backbone, hidden=8).to(args.device).eval(), []
    step = torch.arange(CLIP_STEPS)
    for clips in torch.arange(len(args.items)).split(BATCH):
        at = clips[:, None].expand(-1, CLIP_STEPS), step.expand(len(clips), -1)
        seed = video.derive_seed(args.seed, variant, int(clips[0]), 3)
        frames = pictures.drawn(*at, torch.zeros_like(at[0]), seed) if variant else pictures.middle(*at)
        with half_precision(args):
            found.append(in_float(model.encode(frames)).pooled)
    pooled = tuple(torch.cat(stage) for stage in zip(*found, strict=True))
    # What the classifier of these networks reads is the pooled last stage.
    return video.StoredFeatures(pooled, pooled[-1], torch.arange(len(args.items)), (args.size, args.size))


def on_device(videos: Composed, device: str) -> Composed:
    moved = {name: getattr(videos, name).to(device) for name in ("clip", "step", "targets", "relevant")}
    return replace(videos, **moved)


def do_fold(args: argparse.Namespace) -> None:
    """Do all that a fold has no result of yet."""
    torch.backends.cudnn.benchmark = True
    torch.set_num_threads(2 if args.device == "cuda" else 1)
    sparse.SIZE = args.size  # what its functions count costs at
    pictures, fold = Pictures(args.packed, args.size, args.device), args.fold
    divided = split_off_validation(split_by_group(args.items, FOLDS, fold), 1 / FOLDS, args.seed)
    items_of = {split: video.pick_split(divided, split) for split in ("train", "val", "test")}
    classes = {item.labels[0] for item in args.items} - set(sparse.IRRELEVANT)
    for method in args.methods:
        names = {kind: f"{kind}-{method}-fold{fold}-seed{args.seed}" for kind in args.kinds}
        missing = {kind: name for kind, name in names.items() if not (args.out / f"{name}.json").exists()}
        if not missing:
            continue
        started = time.perf_counter()
        model, glanced, light = build(args, len(classes), args.seed)
        losses = fine_tune(model, items_of["train"], pictures, method, video.derive_seed(args.seed, fold), args)
        trained = time.perf_counter() - started
        print(f"[{fold}] {method}: loss {losses[-1]:.3f} after {trained:.0f} s", flush=True)
        variants = [features_of(glanced, pictures, variant, args) for variant in range(VARIANTS)]
        for kind, name in missing.items():
            content = measure(kind, model, glanced, light, variants, items_of, args)
            seconds = {"backbone": round(trained), "all": round(time.perf_counter() - started)}
            content["run"] = {"kind": kind, "method": method, "fold": fold, "seed": args.seed}
            content |= {"machine": common.machine(args.device), "seconds": seconds, "losses": losses}
            text = json.dumps(content, separators=(",", ":")).replace("},{", "},\n{")
            (args.out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
            print(f"[{fold}] {name} after {seconds['all']} s", flush=True)


def measure(
    kind_name: str,
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
        drawn = video.derive_seed(args.seed, args.fold, version)
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
    for name, backbone in (("gates", plain), ("gates after a glance", glanced)):
        gates = sparse.train_gates(backbone, kind, part, args.seed, f"[{args.fold}] {kind_name}: {name}")
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
    """Run each fold in a process of its own, all at once."""
    unpack(args.packed)
    args.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, *arguments]
    folds = range(1 if args.quick else FOLDS)
    processes = [subprocess.Popen([*command, "--fold", str(fold)]) for fold in folds]
    failed = [str(fold) for fold, process in enumerate(processes) if process.wait()]
    if failed:
        raise DynskipError(f"Folds {', '.join(failed)} failed, see above. The same command does what is missing.")


def report(folder: Path) -> str:
    """Write a table for each kind and method, and one that compares the methods' dense rows."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*-fold*.json"))]
    if not found:
        raise DynskipError(f"There are no results in {folder}.")
    blocks = []
    for kind, method in dict.fromkeys((each["run"]["kind"], each["run"]["method"]) for each in found):
        own = [each for each in found if (each["run"]["kind"], each["run"]["method"]) == (kind, method)]
        seeds, clips = sorted({each["run"]["seed"] for each in own}), {clip for each in own for clip in each["clips"]}
        rows = {name: rest for name, rest in sparse.ROWS.items() if name in own[0]["points"]}
        blocks += [
            f"### {kind}, {method}",
            f"{len(own)} runs of {len({each['run']['fold'] for each in own})} folds, seeds {seeds}; "
            f"{sum(each['videos']['test'] for each in own)} test videos around {len(clips)} clips.",
            sparse.table(own, sparse.KINDS[kind].budget, rows),
        ]
    machines = dict.fromkeys(", ".join(f"{k} {v}" for k, v in each["machine"].items()) for each in found)
    return "\n\n".join([*blocks, *machines])


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for."""
    if args.report:
        print(report(args.report))
        return 0
    if args.packed is None:
        raise DynskipError("Say with --packed where packed clips are, or where they go.")
    if args.pack:
        pack(args.pack, args.packed, args.quick)
    if args.out is None:
        return 0
    if args.quick:
        vars(args).update(TINY)
    elif None in (args.weights, args.light):
        raise DynskipError("Training needs --weights and --light; --quick goes without.")
    names = json.loads((args.packed / "clips.json").read_text(encoding="utf-8"))
    args.items = [video.Item(Path(name), (label,), "train") for name, label in names]
    if args.fold is None:
        do_all(args, [each for n, each in enumerate(args.given) if each != "--pack" and args.given[n - 1] != "--pack"])
    else:
        do_fold(args)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pack", type=Path, metavar="DIR", help="pack the clips of this folder into --packed")
    add("--packed", type=Path, metavar="FOLDER", help="packed clips")
    add("--weights", type=Path, metavar="FILE", help="ImageNet weights of the backbone")
    add("--light", type=Path, metavar="FILE", help="ImageNet weights of the light network")
    add("--out", type=Path, metavar="RESULTS", help="where results go")
    add("--methods", nargs="+", choices=METHODS, default=["plain", "anytime"], help="(default: plain anytime)")
    add("--kinds", nargs="+", choices=sparse.KINDS, default=["half", "sparse"], help="(default: half sparse)")
    add("--epochs", type=int, default=8, help="of the backbone (default: 8)")
    add("--lr", type=float, default=5e-5, help="of the backbone (default: 0.00005)")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--quick",
        action="store_true",
        help="tiny networks, few clips, one fold and epoch: does it all run?",
    )
    add("--report", type=Path, metavar="RESULTS", help="print the tables of results")
    add("--fold", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(
        backbone="resnet50_v1", light_name=sparse.LIGHT, size=sparse.SIZE, glance_size=sparse.GLANCE_SIZE
    )
    args = parser.parse_args(arguments)
    args.given = list(sys.argv[1:] if arguments is None else arguments)
    return command.run(lambda: run(args), "Finished runs stay; the same command goes on.")


if __name__ == "__main__":
    sys.exit(main())
