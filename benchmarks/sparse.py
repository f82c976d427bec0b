"""Where few frames of a video matter, what do gates after a glance gain? Against dense, uniform frames and others.

    python benchmarks/sparse.py --data DIR --weights FILE --light FILE --features FOLDER    # all runs without a result
    python benchmarks/sparse.py --data DIR --weights FILE --light FILE --features FOLDER --only sparse-fold0-seed0
    python benchmarks/sparse.py --report               # tables from the results
    python benchmarks/sparse.py --plot docs/images     # pictures from the results

DIR is a folder with `labels.csv` whose clips are named by camera group, as UCF-101's (`_g07_`). FILE are ImageNet
weights of ResNet-50 (`resnet50_v1`) and of EfficientNet-Lite0. Every clip is encoded once, 16 frames at 128x128, of
which the glance sees a copy at 96x96; the features go to FOLDER (minutes; it goes on where it was stopped). Clips are
put together into two kinds of untrimmed videos (`compose_untrimmed.py`): in `half`, 4 to 10 of 16 frames show the
action; in `sparse`, 4 to 8 of 64.

A run is one kind, fold and seed. A fifth of the camera groups is the test part; of the others, a fifth of each class'
groups is the validation part. The classifier and the gates are trained on the rest. Every threshold is chosen on the
validation part. A run writes one file to `benchmarks/results/sparse`: of every setting the accuracy and cost on the
validation part, the cost on the test part, which test videos it gets right, and of gates how many frames of a test
video are unseen, stopped at each gate, and used. So `--report` can choose settings and compare methods video by video.
Costs are MACs (multiply-adds), as shares of all frames in the dense ResNet-50.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import common
import timm
import torch
import torch.nn.functional as F
from compose_untrimmed import CLIP_STEPS, Composed, Plan, compose, split_by_group, split_off_validation
from torch import Tensor, nn
from tqdm import tqdm

from dynskip import (
    DynskipError,
    EarlyTerminator,
    FixedGate,
    FLOPsLookup,
    SimilarityGate,
    SkipOutput,
    SoFLoss,
    StopOrForward,
    glance,
    plot,
    rules,
    sofnet,
    stage_model,
    video,
)
from dynskip.backbone.weights import load_weights
from dynskip.calibrate import CurvePoint
from dynskip.metrics import sample_times
from dynskip.output import EncodedVideo, masked_output
from dynskip.video import command
from dynskip.video.stored import fit_linear

COMMAND = "python benchmarks/sparse.py --data DIR --weights FILE --light FILE --features FOLDER"
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "sparse"
IRRELEVANT = ("HorseRace", "Surfing")
FOLDS, SEEDS = 5, (0, 1, 2)
SIZE, GLANCE_SIZE, LIGHT = 128, 96, "tf_efficientnet_lite0"
HIDDEN, ALPHA, BETA = 64, 0.8, 0.9
HEAD_DECAYS = (0.0003, 0.001, 0.003, 0.01, 0.03)
THRESHOLDS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)  # forward probabilities; the first runs had eight
RHOS = (None, 0.9, 0.99, 0.999, 0.9999)  # probabilities that end a video; None looks at all frames
MIN_FRAMES = 3


@dataclass(frozen=True)
class Kind:
    """A kind of videos, how gates are trained on it, and the share of the dense cost that may be spent."""

    plan: Plan
    copies: dict[str, int]  # videos around each label clip
    epochs: int
    budget: float


KINDS = {
    "sparse": Kind(Plan(64, (4, 8), (3, 8)), {"train": 1, "val": 3, "test": 2}, 12, 0.20),
    "half": Kind(Plan(16, (4, 10), (2, 5)), {"train": 2, "val": 4, "test": 3}, 20, 0.40),
}
RUNS = {f"{kind}-fold{fold}-seed{s}": (kind, fold, s) for s in SEEDS for kind in KINDS for fold in range(FOLDS)}


Compose = Callable[..., Composed]


def networks(args: argparse.Namespace, classes: int) -> tuple[Any, Any, FLOPsLookup]:
    """Return the staged ResNet-50 alone and after a glance, and what the light network costs alone."""
    plain = stage_model("resnet50_v1", num_classes=classes, input_size=(3, SIZE, SIZE))
    light: Any = timm.create_model(LIGHT, num_classes=classes)
    load_weights(plain.model, args.weights)
    load_weights(light, args.light)
    cost = FLOPsLookup.measure(stage_model(light, input_size=(3, GLANCE_SIZE, GLANCE_SIZE)), GLANCE_SIZE)
    light.reset_classifier(0)
    return plain, glance(plain, light, GLANCE_SIZE), cost


def encode(args: argparse.Namespace) -> tuple[video.StoredFeatures, list[video.Item]]:
    """Return the features of all clips, encoded if need be."""
    items = video.load_items(args.data)
    model = sofnet(networks(args, 1000)[1]).to(memory_format=torch.channels_last)
    clips = video.Clips(items, video.class_names(items), video.Preprocessing(SIZE, CLIP_STEPS))
    features = video.encode_clips(model, clips, args.features)
    if len(features) < len(items):
        raise DynskipError("Composing needs every clip; leave the unreadable ones out of labels.csv.")
    return features, items


def fit_head(layer: nn.Linear, frames: Tensor, train: Sequence[Composed], val: Composed) -> float:
    """Fit a classifier to videos' mean features with the decay that validates best; return that."""
    inputs, targets = torch.cat([part.means(frames) for part in train]), torch.cat([part.targets for part in train])
    held_out = val.means(frames)

    def validated(decay: float) -> float:
        fit_linear(layer, inputs, targets, decay)
        with torch.no_grad():
            return float(F.cross_entropy(layer(held_out), val.targets))

    best = min(HEAD_DECAYS, key=validated)
    fit_linear(layer, inputs, targets, best)
    return best


Loss = Callable[[EncodedVideo, SkipOutput, Tensor], Tensor]


def thesis_loss(lookup: FLOPsLookup) -> Loss:
    """Return the loss of encoded videos, their output and targets."""
    criterion = SoFLoss(lookup, ALPHA, BETA, normalize=True)
    return lambda encoded, output, targets: criterion(output, targets).total


def train_gates(
    backbone: Any, kind: Kind, part: Compose, seed: int, name: str, loss_of: Callable[[FLOPsLookup], Loss] = thesis_loss
) -> StopOrForward:
    """Train gates and inner classifiers on stored features, with the thesis' losses or others."""
    torch.manual_seed(seed)
    backbone.requires_grad_(False)
    model = sofnet(backbone, hidden=HIDDEN, detach_inner=False, forward_bias=1.0, threshold=None)
    loss_on = loss_of(model.lookup_for((SIZE, SIZE)))
    assert model.inner is not None
    optimizer = torch.optim.AdamW([*model.gates.parameters(), *model.inner.parameters()], 1e-3, weight_decay=0.1)
    for epoch in tqdm(range(kind.epochs), name, leave=False, disable=None):
        done = epoch / kind.epochs
        model.temperature = 5.0 * math.exp(-2.8 * done)
        optimizer.param_groups[0]["lr"] = 1e-3 if done < 0.75 else 1e-4
        videos = part("train", epoch + 1)
        for rows in torch.randperm(len(videos.targets)).split(64):
            encoded = videos.encoded(model, rows)
            loss = loss_on(encoded, model.decide(encoded), videos.targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


Points = list[dict[str, Any]]


@torch.no_grad()
def gated(model: StopOrForward, parts: Sequence[Composed], dense: float) -> Points:
    """Measure a model with every pair of thresholds."""
    lookup, model.inner = model.lookup_for((SIZE, SIZE)), None
    levels = (0.5,) if all(isinstance(gate, FixedGate) for gate in model.gates) else THRESHOLDS
    found: dict[Any, list[Any]] = {setting: [[], []] for setting in product(levels, RHOS)}
    for k, part in enumerate(parts):
        for rows in part.batches():
            encoded = part.encoded(model, rows)
            for p, rho in found:
                if rho is None:
                    model.forward_threshold = p
                    output = model.decide(encoded)
                    stopped_at = output.stopped_at
                    running = rules.read(model.readout, stopped_at, encoded.frame_logits)
                else:
                    terminator = EarlyTerminator(rho, MIN_FRAMES)
                    stopped_at = rules.end_videos(terminator, running, output.stopped_at, model.activation)
                assert output.gate_logits is not None
                ended = masked_output(stopped_at, output.gate_logits, encoded.frame_logits, lookup, model.readout)
                ends = F.one_hot(stopped_at + 1, model.backbone.num_stages + 2).sum(1)
                found[p, rho][k].append((ended.logits.argmax(-1) == part.targets[rows], ended.macs / dense, ends))
    points = []
    for (p, rho), sides in found.items():
        (val, val_cost, _), (test, cost, ends) = ([torch.cat(e) for e in zip(*side, strict=True)] for side in sides)
        frames = [round(each, 2) for each in ends.double().mean(0).tolist()]
        points.append(point(val, float(val_cost.mean()), test, float(cost.mean()), p=p, rho=rho, frames=frames))
    return chosen_by_some_budget(points)


def by_frames(logits: Tensor, parts: Sequence[Composed], cost: float, steps: int) -> Points:
    """Measure a network on evenly spread frames; `logits` are those of clips, `cost` the share that a frame costs."""
    points = []
    for count in [k for k in range(1, steps + 1) if k <= 32 or k % 8 == 0]:
        at = sample_times(count, steps).long()
        val, test = (logits[p.clip[:, at], p.step[:, at]].mean(1).argmax(-1) == p.targets for p in parts)
        points.append(point(val, count * cost, test, count * cost, k=count))
    return points


def point(val: Tensor, val_cost: float, test: Tensor, cost: float, **setting: Any) -> dict[str, Any]:
    bits = "".join(str(int(hit)) for hit in test.tolist())
    val_top1 = round(float(val.float().mean()), 4)
    return {**setting, "val": [val_top1, round(val_cost, 4)], "cost": round(cost, 4), "hits": f"{int('1' + bits, 2):x}"}


def parts_of(items: Sequence[video.Item], fold: int, seed: int) -> dict[str, list[video.Item]]:
    """Divide the clips by camera group: a fold to test on, and of the others a part to choose settings on."""
    divided = split_off_validation(split_by_group(items, FOLDS, fold), 1 / FOLDS, seed)
    return {split: video.pick_split(divided, split) for split in ("train", "val", "test")}


def composing(kind: Kind, fold: int, seed: int, features: video.StoredFeatures, items: Sequence[video.Item]) -> Compose:
    """Return what composes the videos of a part: of train, val or test."""
    items_of = parts_of(items, fold, seed)

    def part(split: str, version: int = 0) -> Composed:
        """Compose them; another version has the same clips, cut and surrounded differently."""
        drawn = video.derive_seed(seed, version)
        videos = compose(items_of[split], IRRELEVANT, kind.copies[split], drawn, kind.plan)
        return Composed.of(videos, features, items)

    return part


def without_training(
    plain: Any, parts: Sequence[Composed], logits: Tensor, light_logits: Tensor, light: FLOPsLookup
) -> dict[str, Any]:
    """Measure the network, and the ways to save for which no gates are trained; logits are those of clips."""
    val, test = parts
    every_frame = StopOrForward(plain, [FixedGate() for _ in plain.num_features]).eval()
    steps, dense = test.clip.shape[1], every_frame.lookup_for((SIZE, SIZE)).dense
    shown = [torch.where(p.relevant[..., None], logits[p.clip, p.step], 0.0).sum(1).argmax(-1) for p in parts]
    shares = [float(p.relevant.float().mean()) for p in parts]
    first, *others = plain.num_features
    similar = StopOrForward(plain, [SimilarityGate(first), *(FixedGate() for _ in others)]).eval()
    points = {
        "uniform frames": by_frames(logits, parts, 1 / steps, steps),
        "light network": by_frames(light_logits, parts, light.dense / dense / steps, steps),
        "relevant frames": [point(shown[0] == val.targets, shares[0], shown[1] == test.targets, shares[1])],
        "dense": gated(every_frame, parts, steps * dense),
        "similarity gates": gated(similar, parts, steps * dense),
    }
    return {
        "videos": {"val": len(val.targets), "test": len(test.targets)},
        "relevant": shares[1],
        "dense_gmacs": steps * dense / 1e9,
        "light_share": light.dense / dense,
        "clips": list(dict.fromkeys(test.clips)),
        "points": points,
    }


def perform(
    name: str, features: video.StoredFeatures, items: Sequence[video.Item], args: argparse.Namespace
) -> dict[str, Any]:
    """Do one run and return what goes into its file."""
    kind_name, fold, seed = RUNS[name]
    kind, started = KINDS[kind_name], time.perf_counter()
    part = composing(kind, fold, seed, features, items)
    train = [part("train", -version) for version in range(1, 9)]
    val, test = part("val"), part("test")
    classes = int(train[0].targets.max()) + 1
    plain, glanced, light = networks(args, classes)
    head: Any = plain.model.get_classifier()
    light_head = nn.Linear(features.pooled[0].shape[-1], classes)
    decays = [fit_head(head, features.embedding, train, val), fit_head(light_head, features.pooled[0], train, val)]
    with torch.no_grad():
        logits, light_logits = head(features.embedding), light_head(features.pooled[0])
    result = without_training(plain, (val, test), logits, light_logits, light)
    for label, backbone in (("gates", plain), ("gates after a glance", glanced)):
        gates = train_gates(backbone, kind, part, seed, f"{name}: {label}")
        result["points"][label] = gated(gates, (val, test), 1e9 * result["dense_gmacs"])
    result["videos"]["train"] = len(train[0].targets)
    return {
        "run": {"kind": kind_name, "fold": fold, "seed": seed},
        "command": f"{COMMAND} --only {name}",
        "machine": common.machine("cpu"),
        "seconds": round(time.perf_counter() - started),
        "head_decays": decays,
        **result,
    }


Results = list[dict[str, Any]]


def write(content: dict[str, Any], file: Path) -> None:
    """Write the results of a run, a setting a line."""
    text = json.dumps(content, separators=(",", ":")).replace("},{", "},\n{")
    file.write_text(text + "\n", encoding="utf-8")


def committed(folder: Path = RESULTS) -> dict[str, Results]:
    """Read the results of all runs, by kind."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    if not found:
        raise DynskipError(f"There are no results in {folder}. Give --data and the rest to make them.")
    return {kind: own for kind in KINDS if (own := [each for each in found if each["run"]["kind"] == kind])}


def within(points: Points, budget: float = math.inf) -> dict[str, Any] | None:
    """Choose on the validation part: the most accurate setting within a budget; of equals the costliest, as safer."""
    return max((p for p in points if p["val"][1] <= budget), key=lambda p: tuple(p["val"]), default=None)


def chosen_by_some_budget(points: Points) -> Points:
    """Leave out settings that no row of a table and no budget of a curve would choose: two in three."""
    ways = (points, [p for p in points if p["rho"] is None], [p for p in points if p["rho"] is not None])
    kept = [within(own, p["val"][1]) for own in ways for p in own]
    kept += [choose(points, how, math.inf) for how in ("all", "trained")]
    return [p for p in points if p in kept]


def at_least(points: Points, cost: float) -> dict[str, Any]:
    """Return the fewest uniform frames that cost as much; more is on their side."""
    return next((p for p in points if p["cost"] >= cost - 1e-9), points[-1])


def similar(points: Points, budget: float) -> dict[str, Any]:
    """Return the similarity gates for a budget, or the cheapest if all cost more, which is on their side."""
    return within(points, budget) or min(points, key=lambda p: p["val"][1])


def hits(found: dict[str, Any]) -> list[float]:
    return [float(bit) for bit in f"{int(found['hits'], 16):b}"[1:]]


def choose_in_all(results: Results, method: str, how: str, budget: float) -> Points:
    """Return the setting of every run that a row shows; none at all if a run has none within the budget."""
    found = [p for r in results if (p := choose(r["points"][method], how, budget))]
    return found if len(found) == len(results) else []


def average(points: Points) -> tuple[float, float]:
    """Return the accuracy over all videos, and the mean cost."""
    return statistics.mean(hit for p in points for hit in hits(p)), statistics.mean(p["cost"] for p in points)


def choose(points: Points, how: str, budget: float) -> dict[str, Any] | None:
    """Return the setting that a row of the table shows, `None` for none within the budget."""
    whole = [p for p in points if p.get("rho") is None]
    match how:
        case "all":
            return whole[-1]
        case "trained":
            return next(p for p in whole if p["p"] == 0.5)
        case "early":
            return within([p for p in points if p["rho"] is not None], budget)
    return within(whole, budget)


ENDINGS = {"all": ", all frames", "trained": ", as trained", "early": ", ending early", "chosen": ""}
ROWS = {
    "dense": ("all", "early"),
    "gates": ("trained", "chosen", "early"),
    "gates after a glance": ("trained", "chosen", "early"),
    "similarity gates": ("chosen", "early"),
    "uniform frames": ("chosen",),
    "light network": ("all", "chosen"),
    "relevant frames": ("all",),  # an oracle
}


def table(results: Results, budget: float, rows: dict[str, tuple[str, ...]] = ROWS) -> str:
    """Compare methods on the test parts, settings chosen on the validation parts."""

    def difference(ones: Sequence[list[float]], others: Sequence[list[float]]) -> str:
        """Compare video by video. Clusters are videos around one clip, of any seed, and around one camera group."""
        copies = KINDS[results[0]["run"]["kind"]].copies["test"]
        clips = [clip for result in results for clip in result["clips"] for _ in range(copies)]
        both = [clips, [clip.rpartition("_c")[0] for clip in clips]]
        (mean, by_clip), (_, by_group) = (common.paired(chain(*ones), chain(*others), own) for own in both)
        return f"{100 * mean:+.1f} ± {100 * by_clip:.1f} ({100 * by_group:.1f})"

    head = (
        "| | top-1 % | cost, % of dense | less dense | less uniform frames at its cost "
        "| less similarity gates at its cost |\n|---|---:|---:|---:|---:|---:|"
    )
    lines, dense = [head], [hits(r["points"]["dense"][0]) for r in results]
    for method, how in [(method, how) for method, own in rows.items() for how in own]:
        row = method + ENDINGS[how]
        found = choose_in_all(results, method, how, budget)
        if not found:
            lines.append(f"| {row} | | more than {100 * budget:.0f} | | | |")
            continue
        own, (top1, cost) = [hits(p) for p in found], average(found)
        frames = [at_least(r["points"]["uniform frames"], p["cost"]) for r, p in zip(results, found, strict=True)]
        gates = [similar(r["points"]["similarity gates"], p["val"][1]) for r, p in zip(results, found, strict=True)]
        compared = [difference(own, other) for other in (dense, *([hits(p) for p in each] for each in (frames, gates)))]
        lines.append(f"| {row} | {100 * top1:.1f} | {100 * cost:.1f} | {' | '.join(compared)} |")
    return "\n".join(lines)


def report(found: dict[str, Results]) -> str:
    """Write all tables as Markdown."""
    blocks = []
    for kind, results in found.items():
        plan, budget = KINDS[kind].plan, KINDS[kind].budget
        videos, clips = sum(r["videos"]["test"] for r in results), {clip for r in results for clip in r["clips"]}
        blocks += [
            f"### {kind}: {plan.steps} frames, {plan.action[0]} to {plan.action[1]} of them relevant",
            f"Seeds {sorted({r['run']['seed'] for r in results})}, {len(results)} runs; {videos} test videos around "
            f"{len(clips)} clips, {statistics.mean(r['relevant'] for r in results):.1%} of the frames relevant; dense "
            f"{results[0]['dense_gmacs']:.1f} GMACs a video. Settings: the most accurate on the validation part within "
            f"{budget:.0%} of dense. Differences are paired, ± one standard error clustered by clip (by camera group).",
            table(results, budget),
        ]
    machines = {json.dumps(result["machine"]) for results in found.values() for result in results}
    return "\n\n".join(blocks + [", ".join(f"{k} {v}" for k, v in json.loads(m).items()) for m in sorted(machines)])


def draw(results: Results, file: Path, title: str) -> None:
    """Draw all methods on the same axes: at each of many budgets, what was chosen for it on the validation parts."""
    curves: dict[str, list[CurvePoint]] = {}
    copies = KINDS[results[0]["run"]["kind"]].copies["test"]
    clips = [clip for result in results for clip in result["clips"] for _ in range(copies)]
    for name in ROWS:
        for budget in (0.01, 0.02, 0.03, *(n / 20 for n in range(1, 21)), 1.1):
            chosen = [p for r in results if (p := within(r["points"].get(name, []), budget))]
            if len(chosen) == len(results):
                own = [hit for p in chosen for hit in hits(p)]
                top1, error = common.paired(own, [0.0] * len(own), clips)
                macs = statistics.mean(p["cost"] for p in chosen) * results[0]["dense_gmacs"] * 1e9
                curves.setdefault(name, []).append(CurvePoint(top1, macs, band=(top1 - error, top1 + error)))
    unique = {name: list(dict.fromkeys(points)) for name, points in curves.items()}
    common.save_pair(lambda dark: plot.accuracy_compute(unique, title=title, dark=dark), file)


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for."""
    if args.report:
        print(report(committed()))
        return 0
    if args.plot:
        for kind, results in committed().items():
            draw(results, args.plot / f"sparse_{kind}.svg", f"{KINDS[kind].plan.steps} frames a video: {kind}")
        return 0
    if None in (args.data, args.weights, args.light, args.features):
        raise DynskipError("Runs need --data, --weights, --light and --features; --report prints what is there.")
    features, items = encode(args)
    RESULTS.mkdir(parents=True, exist_ok=True)
    names = args.only or [name for name in RUNS if not (RESULTS / f"{name}.json").exists()]
    for name in tqdm(names, "runs", disable=None):
        content = perform(name, features, items, args)
        write(content, RESULTS / f"{name}.json")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="folder with labels.csv (path,label,split); the split is not used")
    add("--weights", type=Path, metavar="FILE", help="ImageNet weights of resnet50_v1")
    add("--light", type=Path, metavar="FILE", help=f"ImageNet weights of {LIGHT}")
    add("--features", type=Path, metavar="FOLDER", help="where encoded clips are kept")
    add("--only", nargs="+", metavar="NAME", choices=RUNS, help="these runs, KIND-foldF-seedS, even if they are there")
    add("--report", action="store_true", help="print the tables of the results")
    add("--plot", type=Path, metavar="FOLDER", help="draw the pictures of the results")
    args = parser.parse_args(arguments)
    return command.run(lambda: run(args), "Finished runs stay; the same command goes on.")


if __name__ == "__main__":
    sys.exit(main())
