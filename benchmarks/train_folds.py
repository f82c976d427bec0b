"""What do gates gain on a backbone that was fine-tuned? Five folds by camera group.

    python benchmarks/train_folds.py --pack DIR --packed FOLDER                           # once; FOLDER takes 40 MB
    python benchmarks/train_folds.py --packed FOLDER --weights FILE --light FILE          # on a GPU, all folds at once
    python benchmarks/train_folds.py --packed FOLDER --weights FILE --light FILE --stages 1 --methods anytime   # a CPU
    python benchmarks/train_folds.py --packed FOLDER --weights FILE --light FILE --time   # milliseconds on a CPU
    python benchmarks/train_folds.py --report                                             # tables from the results
    python benchmarks/train_folds.py --plot docs/images                                   # curves from the results
    python benchmarks/train_folds.py --pack DIR --packed FOLDER --out FOLDER --quick      # does it all run?

DIR is a folder with `labels.csv` whose clips are named by camera group, as UCF-101's (`_g07_`). Packing keeps 48
pictures of 192x144 of each clip, three for each of its 16 steps, in 16 H.264 files and a list. Unpacking takes OpenCV
or PyAV, whichever is there. `--weights` are ImageNet weights of the backbone, ResNet-50 (`resnet50_v1`) at 128x128 or
another with `--backbone`; `--light` those of EfficientNet-Lite0 for the glance.

The test part of a fold is a fifth of the camera groups; of the others, a fifth of each class' groups is the validation
part, on which thresholds are chosen, and the rest is trained on. Videos are composed of clips (`compose_untrimmed.py`),
anew for every epoch. For each method, a process a fold trains the backbone on videos of 16 frames, half of them
relevant (`fine_tune.py`), and stores the features of all clips, in three variants. Then gates are fitted to them, on
all cores of the CPU, for both kinds of videos, with a glance and without (`sparse.py`, which also explains the tables).
Methods:

    plain      cross-entropy of the mean over all frames
    anytime    the same, and of random parts of them (`AnytimeLoss`)
    joint      backbone and gates together with the thesis' loss; then gates are fitted to the features as above
    joint-all  the same with the cross-entropy of the mean over all frames (`SoFLoss(all_frames=1)`)

Gates are fitted with `WorthLoss` in the place of self-supervision (`early_gates.py` says why).
One JSON file for each backbone, kind, method, fold and seed of the gates is written to `benchmarks/results/folds`, or
to `--out`; those that are there are not done again. Backbones, features and gates stay beside the packed clips;
`--time` runs those of a fold on its test videos.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av_or_not  # noqa: F401
import common
import early_gates
import sparse
import torch
from compose_untrimmed import Composed, compose, frames_of
from fine_tune import VARIANTS, FirstStages, build, features_of, fine_tune, first_stages
from packed import Pictures, pack, unpack
from per_video import batched, one_by_one
from torch import Tensor, nn
from tqdm import tqdm

from dynskip import (
    DynskipError,
    EarlyTerminator,
    FLOPsLookup,
    StopOrForward,
    sofnet,
    video,
)
from dynskip.video import command
from dynskip.video.outputs import whole_file
from dynskip.video.stored import classifier, fit_linear

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "folds"
METHODS = ("plain", "anytime", "joint", "joint-all")
TINY = {"backbone": "test_resnet", "light_name": "test_efficientnet", "size": 64, "glance_size": 32, "epochs": 1}
SETTINGS = ("backbone", "light_name", "size", "glance_size", "boundaries", "stages", "epochs", "lr", "seed")
BUDGETS = {"half": (0.6, 0.4, 0.2), "sparse": (0.2,)}  # shares of the dense cost, a table each
TIMED = ("gates", "gates after a glance")


@dataclass(frozen=True)
class Run:
    """Gates of one kind of videos, method, fold and seed."""

    backbone: str
    kind: str
    method: str
    fold: int
    seed: int

    def __str__(self) -> str:
        return f"{self.backbone}-{self.kind}-{self.method}-fold{self.fold}-seed{self.seed}"


def runs_of(args: argparse.Namespace) -> list[Run]:
    """Return what the command line asks for; a fold's runs lie together, since they share its features."""
    own = itertools.product(args.folds, args.methods, args.kinds, args.gate_seeds)
    return [Run(args.backbone, kind, method, fold, seed) for fold, method, kind, seed in own]


def stored(args: argparse.Namespace, name: str) -> Path:
    """Return the file beside the packed clips that holds what was trained with these settings."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    files = [file and file.name for file in (args.weights, args.light, *(item.path for item in args.items))]
    digest = hashlib.sha256(json.dumps([settings, files]).encode()).hexdigest()[:8]
    folder: Path = args.packed / f"{args.backbone}-{digest}"
    folder.mkdir(exist_ok=True)
    return folder / f"{name}.pt"


def save(content: Any, file: Path) -> None:
    with whole_file(file) as opened:
        torch.save(content, opened)


def num_classes(args: argparse.Namespace) -> int:
    return len({item.labels[0] for item in args.items} - set(sparse.IRRELEVANT))


# ------------------------------------------------------------------------------------------------------- a fold


def train_backbone(args: argparse.Namespace, method: str, fold: int) -> str:
    """Train the backbone of a fold, and store it and the features of all clips."""
    torch.backends.cudnn.benchmark = True
    torch.set_num_threads(2 if args.device == "cuda" else 1)
    started = time.perf_counter()
    model, glanced, _ = build(args, num_classes(args), args.seed)
    source: Pictures | FirstStages
    if args.stages:
        source = first_stages(model, glanced, args)
    else:
        source = Pictures(args.packed, args.size, args.device, model.backbone.model)
    seed = video.derive_seed(args.seed, fold)
    losses = fine_tune(model, sparse.parts_of(args.items, fold, args.seed)["train"], source, method, seed, args)
    trained = time.perf_counter() - started
    variants = [features_of(model, glanced, source, variant, args) for variant in range(VARIANTS)]
    features = [[part.half().cpu() for part in (*each.pooled, each.embedding)] for each in variants]
    network = {name: value.cpu() for name, value in model.backbone.model.state_dict().items()}
    seconds = {"backbone": round(trained), "features": round(time.perf_counter() - started - trained)}
    content = {"losses": losses, "seconds": seconds, "machine": common.machine(args.device), "features": features}
    save(network, stored(args, f"{method}-fold{fold}"))
    save(content, stored(args, f"{method}-fold{fold}-features"))
    return f"fold {fold}, {method}: loss {losses[-1]:.3f} after {trained:.0f} s"


@functools.lru_cache(maxsize=1)
def with_features(file: Path, positions: int, size: int) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(file)
    content["features"] = [
        video.StoredFeatures(tuple(x.float() for x in pooled), last.float(), torch.arange(positions), (size, size))
        for *pooled, last in content["features"]
    ]
    return content


def trained(args: argparse.Namespace, method: str, fold: int) -> tuple[StopOrForward, Any, FLOPsLookup]:
    """Return what `build` does with a trained backbone, on the CPU."""
    model, glanced, light = build(argparse.Namespace(**{**vars(args), "device": "cpu"}), num_classes(args), args.seed)
    model.backbone.model.load_state_dict(torch.load(stored(args, f"{method}-fold{fold}")))
    return model, glanced, light


def fit_gates(args: argparse.Namespace, run: Run) -> str:
    """Fit gates to the stored features, measure all ways to save, and write the results."""
    torch.set_num_threads(1)
    sparse.SIZE = args.size  # what its functions count costs at
    started = time.perf_counter()
    content = with_features(stored(args, f"{run.method}-fold{run.fold}-features"), len(args.items), args.size)
    result, gates = measure(run, *trained(args, run.method, run.fold), content["features"], args)
    save(gates, stored(args, f"{run}-gates"))
    seconds = {**content["seconds"], "gates": round(time.perf_counter() - started)}
    settings = {"stages": args.stages or "all", "epochs": args.epochs, "lr": args.lr, "size": args.size}
    result["run"] = {**vars(run), **settings, "glance_size": args.glance_size, "boundaries": args.boundaries}
    result |= {"machine": content["machine"], "seconds": seconds, "losses": content["losses"]}
    sparse.write(result, args.out / f"{run}.json")
    return f"{run} after {seconds['gates']} s"


def measure(
    run: Run,
    model: StopOrForward,
    glanced: Any,
    light: FLOPsLookup,
    variants: Sequence[video.StoredFeatures],
    args: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fit gates to the features, and measure all ways to save on one kind of videos; return results and gates."""
    kind, plain, items_of = sparse.KINDS[run.kind], model.backbone, sparse.parts_of(args.items, run.fold, args.seed)

    def part(split: str, version: int = 0) -> Composed:
        """Compose the videos of a part; training ones of another variant in every epoch."""
        drawn = video.derive_seed(run.seed, run.fold, version)
        videos = compose(items_of[split], sparse.IRRELEVANT, kind.copies[split], drawn, kind.plan)
        return Composed.of(videos, variants[version % len(variants) if split == "train" else 0], args.items)

    parts = part("val"), part("test")
    head = nn.Linear(variants[0].pooled[0].shape[-1], plain.num_classes)
    train = part("train", len(variants))
    fit_linear(head, train.means(train.features.pooled[0]), train.targets, 0.003)
    with torch.no_grad():
        logits, light_logits = classifier(model)(variants[0].embedding), head(variants[0].pooled[0])
    results = sparse.without_training(plain, parts, logits, light_logits, light)
    loss, gates = functools.partial(early_gates.loss_of, "worth", None), dict[str, Any]()
    for name, backbone in zip(TIMED, (plain, glanced), strict=True):
        fitted = sparse.train_gates(backbone, kind, part, run.seed, f"{run}: {name}", loss)
        gates[name] = fitted.gates.state_dict()
        results["points"][name] = sparse.gated(fitted, parts, 1e9 * results["dense_gmacs"])
    return results, gates


# ------------------------------------------------------------------------------------------------ on the CPU, timed


@torch.no_grad()
def time_videos(args: argparse.Namespace, run: Run, count: int, rounds: int) -> dict[str, Any]:
    """Time the networks of a run on pictures of test videos, one video after the other, all in turns."""
    sparse.SIZE = args.size
    points = json.loads((args.out / f"{run}.json").read_text(encoding="utf-8"))["points"]
    kind, (model, glanced, _) = sparse.KINDS[run.kind], trained(args, run.method, run.fold)
    gates, network = torch.load(stored(args, f"{run}-gates")), model.backbone.model.eval()
    seed = video.derive_seed(run.seed, run.fold)
    drawn = compose(sparse.parts_of(args.items, run.fold, args.seed)["test"], sparse.IRRELEVANT, 1, seed, kind.plan)
    clip, step = frames_of(drawn, {item.path: row for row, item in enumerate(args.items)})
    own = torch.linspace(0, len(clip) - 1, count).long()
    pictures = Pictures(args.packed, args.size, "cpu", network)
    videos = [pictures.middle(clip[n : n + 1], step[n : n + 1]) for n in own.tolist()]
    other_layout = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    ways: dict[str, Callable[[Tensor], Any]] = {
        "dense, a batch": lambda images: batched(network, images[0].contiguous(memory_format=torch.channels_last)),
        "dense, a batch, channels first": lambda images: batched(other_layout, images[0].contiguous()),
        "dense, frame by frame": lambda images: one_by_one(network, images[0]),
    }
    dense = kind.plan.steps * model.lookup_for((args.size, args.size)).dense / 1e9
    gmacs: dict[str, float] = dict.fromkeys(ways, dense)
    for name, backbone in zip(TIMED, (model.backbone, glanced), strict=True):
        for how in ("chosen", "early"):
            point = sparse.choose(points[name], how, kind.budget)
            if point is None:
                continue
            end = None if point["rho"] is None else EarlyTerminator(point["rho"], sparse.MIN_FRAMES)
            skipping = sofnet(backbone, hidden=sparse.HIDDEN, threshold=None)
            skipping.gates.load_state_dict(gates[name])
            skipping.terminator, skipping.inner, skipping.forward_threshold = end, None, point["p"]
            row = name + sparse.ENDINGS[how]
            ways[row] = skipping.eval()
            gmacs[row] = sum(float(skipping(images).macs) for images in videos) / count / 1e9
    best: dict[str, list[float]] = {name: [] for name in ways}
    for images in videos:
        timed: dict[str, Callable[[], Any]] = {name: functools.partial(way, images) for name, way in ways.items()}
        for name, times in common.interleaved(timed, rounds, "cpu").items():
            best[name].append(min(times))
    return {
        "run": vars(run),
        "machine": common.machine("cpu"),
        "videos": count,
        "rounds": rounds,
        "ways": {n: {"ms": round(sum(t) / count, 1), "gmacs": round(gmacs[n], 3)} for n, t in best.items()},
    }


# --------------------------------------------------------------------------------------------------- side by side


def side_by_side(function: Callable[..., str], jobs: Sequence[tuple[Any, ...]], at_once: int, label: str) -> None:
    """Do jobs in processes of their own, so many at once; one alone, or one after the other, in this process."""
    if at_once == 1 or len(jobs) < 2:
        for job in tqdm(jobs, label, disable=None):
            print(function(*job), flush=True)
        return
    failed = 0
    with ProcessPoolExecutor(min(at_once, len(jobs)), multiprocessing.get_context("spawn")) as pool:
        futures: dict[Future[str], str] = {pool.submit(function, *job): str(job[1:]) for job in jobs}
        for future in tqdm(as_completed(futures), label, len(jobs), disable=None):
            if (error := future.exception()) is None:
                print(future.result(), flush=True)
            else:
                failed += 1
                print(f"{futures[future]} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if failed:
        raise DynskipError(f"{failed} of {len(jobs)} {label} failed, see above. The same command does what is missing.")


def do_all(args: argparse.Namespace) -> None:
    """Train the backbones of all folds, on a GPU all at once, and then fit gates, on all cores at once."""
    unpack(args.packed)
    args.out.mkdir(parents=True, exist_ok=True)
    missing = [run for run in runs_of(args) if not (args.out / f"{run}.json").exists()]
    wanted = dict.fromkeys((run.method, run.fold) for run in missing)
    backbones = [own for own in wanted if not stored(args, "{}-fold{}-features".format(*own)).exists()]
    at_once = sparse.FOLDS if args.device == "cuda" else 1
    side_by_side(train_backbone, [(args, *own) for own in backbones], at_once, "backbones")
    side_by_side(fit_gates, [(args, run) for run in missing], args.workers, "gates")


Key = tuple[str, str, str]


def committed(folder: Path) -> dict[Key, sparse.Results]:
    """Read the results of all runs, by backbone, kind and method."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*-fold*-seed*.json"))]
    if not found:
        raise DynskipError(f"There are no results in {folder}. Give --packed and the rest to make them.")
    keys = [tuple(each["run"][name] for name in ("backbone", "kind", "method")) for each in found]
    return {key: [each for own, each in zip(keys, found, strict=True) if own == key] for key in dict.fromkeys(keys)}


CHANGING = {
    name: own for name, rows in sparse.ROWS.items() if (own := tuple(how for how in rows if how in ("chosen", "early")))
}  # rows that another budget changes


def which_backbone(runs: dict[Key, sparse.Results], folder: Path) -> str:
    """Write what each backbone costs and how accurate it is, with gates and without."""
    lines = ["| backbone | videos | | top-1 % | GMACs | timed: GMACs | timed: ms |\n|---|---|---|---:|---:|---:|---:|"]
    for (backbone, kind, method), results in runs.items():
        file = folder / f"times-{backbone}-{kind}-{method}.json"
        if not file.exists():
            continue
        ways = json.loads(file.read_text(encoding="utf-8"))["ways"]
        ways["dense, all frames"] = min((w for n, w in ways.items() if n.startswith("dense")), key=lambda w: w["ms"])
        first = f"{backbone} at {results[0]['run']['size']}, {method}"
        for name, how in [("dense", "all"), *itertools.product(TIMED, ("chosen", "early"))]:
            row = name + sparse.ENDINGS[how]
            found = sparse.choose_in_all(results, name, how, sparse.KINDS[kind].budget)
            if not found or row not in ways:
                continue
            top1, cost = sparse.average(found)
            gmacs = cost * results[0]["dense_gmacs"]
            cells = f"{100 * top1:.1f} | {gmacs:.2f} | {ways[row]['gmacs']:.2f} | {ways[row]['ms']:.0f}"
            lines.append(f"| {first} | {kind} | {row} | {cells} |")
    return "\n".join(lines)


def report(folder: Path) -> str:
    """Write which backbone is best for what, and tables for each backbone, kind and method."""
    found = committed(folder)
    blocks, machines = ["### Which backbone", which_backbone(found, folder)], dict[str, None]()
    for (backbone, kind, method), own in found.items():
        seeds, clips = sorted({each["run"]["seed"] for each in own}), {clip for each in own for clip in each["clips"]}
        run = own[0]["run"]
        cut = f"gates after {', '.join(run['boundaries'])}" if run.get("boundaries") else "gates after all stages"
        depth = "trained whole" if run["stages"] == "all" else f"its last {run['stages']} stages trained"
        blocks += [
            f"### {backbone}, {kind}: {method}, {depth}",
            f"{len(own)} runs of {len({each['run']['fold'] for each in own})} folds, seeds {seeds} of the gates; "
            f"{sum(each['videos']['test'] for each in own)} test videos around {len(clips)} clips; {run['epochs']} "
            f"epochs at {run['size']}x{run['size']}, glance at {run['glance_size']}x{run['glance_size']}, {cut}; dense "
            f"{own[0]['dense_gmacs']:.1f} GMACs a video. Differences are paired, ± one standard error clustered by "
            "clip (by camera group).",
        ]
        for number, budget in enumerate(BUDGETS[kind]):
            blocks += [
                f"Settings: the most accurate on the validation part within {budget:.0%} of dense.",
                sparse.table(own, budget, CHANGING if number else sparse.ROWS),
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
            size = results[0]["run"]["size"]
            title = f"{backbone} at {size}x{size}: {sparse.KINDS[kind].plan.steps} frames, {kind}"
            sparse.draw(results, args.plot / f"folds_{backbone}_{kind}_{method}.svg", title)
        return 0
    if args.packed is None:
        raise DynskipError("Say with --packed where packed clips are, or where they go.")
    if args.quick and args.out is None:
        raise DynskipError("Say with --out where the results of --quick go: they are not to lie with the others.")
    if args.pack:
        pack(args.pack, args.packed, args.quick)
    if args.quick:
        vars(args).update(TINY, folds=args.folds[:1])
    elif args.pack and args.weights is None:
        return 0
    elif None in (args.weights, args.light):
        raise DynskipError("Training needs --weights and --light; --quick goes without.")
    if args.stages and any(method.startswith("joint") for method in args.methods):
        raise DynskipError("The joint methods train the whole backbone. Leave --stages out, or take other --methods.")
    args.out = out
    names = json.loads((args.packed / "clips.json").read_text(encoding="utf-8"))
    args.items = [video.Item(Path(name), (label,), "train") for name, label in names]
    do_all(args)
    if args.time:
        for own in runs_of(args):
            if (own.fold, own.seed) == (args.folds[0], args.gate_seeds[0]):
                content = time_videos(args, own, *((1, 1) if args.quick else (8, 3)))
                file = out / f"times-{own.backbone}-{own.kind}-{own.method}.json"
                file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
                print(
                    file,
                    *(f"{name}: {way['ms']} ms, {way['gmacs']} GMACs" for name, way in content["ways"].items()),
                    sep="\n",
                )
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
    add(
        "--boundaries",
        nargs="+",
        metavar="MODULE",
        help="where the backbone is cut into stages, with a gate after each (default: where timm's feature_info says)",
    )
    add("--stages", type=int, help="train only so many last stages (default: the whole backbone)")
    add("--out", type=Path, metavar="RESULTS", help="where results go (default: benchmarks/results/folds)")
    add("--methods", nargs="+", choices=METHODS, default=["plain", "anytime"], help="(default: plain anytime)")
    add("--kinds", nargs="+", choices=sparse.KINDS, default=["half", "sparse"], help="(default: half sparse)")
    add("--epochs", type=int, default=8, help="of the backbone (default: 8)")
    add("--lr", type=float, default=5e-5, help="of the backbone (default: 0.00005)")
    add("--seed", type=int, default=0, help="of the backbone, and of what is set aside for validation (default: 0)")
    add(
        "--folds",
        type=int,
        nargs="+",
        choices=range(sparse.FOLDS),
        default=list(range(sparse.FOLDS)),
        help="(default: all)",
    )
    add("--gate-seeds", type=int, nargs="+", default=[0, 1, 2], help="of the gates (default: 0 1 2)")
    add("--workers", type=int, default=os.cpu_count(), help="processes that fit gates (default: one a core)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="that trains backbones")
    add("--quick", action="store_true", help="tiny networks, few clips, one fold and epoch: does it all run?")
    add("--time", action="store_true", help="then time the networks of the first fold and seed on this CPU")
    add("--report", action="store_true", help="print the tables of the results")
    add("--plot", type=Path, metavar="FOLDER", help="draw the curves of the results")
    top.set_defaults(light_name=sparse.LIGHT)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    return command.run(lambda: run(args), "Finished runs stay; the same command goes on.")


if __name__ == "__main__":
    sys.exit(main())
