"""What does each part of SoF-Net contribute on a frozen backbone? Thesis Table 4.4, and what SoF-Net competes with.

    python benchmarks/ablation.py --data DIR --weights FILE --cache DIR           # every run that has no result yet
    python benchmarks/ablation.py --data DIR --weights FILE --cache DIR --only 168-lstm-guided-seed0
    python benchmarks/ablation.py --data DIR --weights FILE --cache DIR --pairs   # which classes to surround with
    python benchmarks/ablation.py --list                                          # names of all runs
    python benchmarks/ablation.py --report                                        # tables from the results
    python benchmarks/ablation.py --plot docs/images                              # pictures from the results

DIR is a folder with `labels.csv` (path,label,split); its clips are encoded once and put together into untrimmed videos
(`compose_untrimmed.py`), training videos anew for every epoch. Every run writes one file to
`benchmarks/results/ablation`. Thresholds are chosen on the validation part; the test part is only measured. Costs are
MACs (multiply-adds).
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import common
import torch
from compose_untrimmed import CLIP_STEPS as STEPS
from compose_untrimmed import GROUP, Composition, compose, frames_of, relevant_frames, split_off_validation
from matplotlib.figure import Figure
from torch import Tensor, nn

from dynskip import (
    ConfidenceGate,
    DynskipError,
    EarlyTerminator,
    EncodedVideo,
    FixedGate,
    SelfSupervisionLoss,
    SimilarityGate,
    SkipOutput,
    SoFLoss,
    StopOrForward,
    calibrate,
    metrics,
    plot,
    sofnet,
    stage_model,
)
from dynskip.backbone.weights import load_weights
from dynskip.losses import self_supervision_targets
from dynskip.sofnet import Recipe
from dynskip.video import (
    Clips,
    Preprocessing,
    StoredFeatures,
    class_names,
    command,
    derive_seed,
    encode_clips,
    fit_classifier,
    load_items,
    pick_split,
)
from dynskip.video.stored import fit_linear

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "ablation"
# Classes that only surround the actions, named by where in the network a linear probe tells them from the others.
IRRELEVANT = {"early": ("HorseRace", "Surfing"), "late": ("HorseRace", "PlayingViolin")}
VAL_SHARE = 0.2
COPIES = {"train": 3, "val": 4, "test": 4}  # videos around each label clip
HIDDEN = 64
# The temperature falls as far as in the thesis' 60 epochs.
RECIPE = Recipe(warmup_epochs=0, joint_epochs=40, lr_drop=30, weight_decay=0.1, temperature=5.0, temperature_decay=0.07)
HEAD_DECAY = 0.03
THRESHOLD, MIN_FRAMES = 0.999, 3  # the thesis' early termination
RHOS = (0.7, 0.9, 0.97, 0.99, 0.999, 0.9999, 0.99999, 0.999999)
BUDGET = 0.7  # of the dense cost; the thesis' SoF-Net takes 0.68


@dataclass(frozen=True)
class Run:
    """One training run, or (`kind="baselines"`) everything that is not trained with the method."""

    kind: Literal["gates", "baselines"]
    size: int = 168
    irrelevance: Literal["early", "late"] = "early"
    temporal: Literal["lstm"] | None = "lstm"
    beta: float | None = 0.9  # inner classification against self-supervision; None is without guidance
    supervise_last: bool = False
    state_update: Literal["used", "reached"] = "used"
    alpha: float = 0.9
    seed: int = 0

    @property
    def name(self) -> str:
        """What sets it apart from the defaults, for --only and the file."""
        parts = [str(self.size)] + ["late"] * (self.irrelevance == "late")
        if self.kind == "baselines":
            return "-".join([*parts, f"baselines-seed{self.seed}"])
        parts += [self.temporal or "fc", "plain" if self.beta is None else "guided"]
        parts += [f"beta{self.beta}"] * (self.beta not in (None, Run.beta)) + ["last"] * self.supervise_last
        parts += ["reached"] * (self.state_update == "reached") + [f"alpha{self.alpha}"] * (self.alpha != Run.alpha)
        return "-".join([*parts, f"seed{self.seed}"])


SEEDS = (0, 1, 2)
MORE_SEEDS = (*SEEDS, 3, 4, 5, 6, 7)  # for memory and guidance, whose effects are smaller than what sets differ by
PAIRED: dict[str, dict[str, Any]] = {
    "LSTM + guidance": {},
    "LSTM": {"beta": None},
    "FC + guidance": {"temporal": None},
}
VARIANTS: list[dict[str, Any]] = [
    {"kind": "baselines"},
    {},
    {"temporal": None},
    {"beta": None},
    {"temporal": None, "beta": None},
    {"alpha": 0.7},
    {"beta": None, "alpha": 0.7},
    {"beta": 1.0},
    {"supervise_last": True},
    {"state_update": "reached"},
    {"irrelevance": "late", "kind": "baselines"},
    {"irrelevance": "late"},
    {"size": 192, "kind": "baselines"},
    {"size": 192},
    {"size": 224, "kind": "baselines"},
    {"size": 224},
]
PLAN = [Run(**{"kind": "gates", **variant, "seed": seed}) for variant in VARIANTS for seed in SEEDS]
PLAN += [Run("gates", **own, seed=seed) for own in PAIRED.values() for seed in MORE_SEEDS if seed not in SEEDS]
# Trainings that have a curve, over their termination thresholds.
SWEPT: dict[str, dict[str, Any]] = {"SoF-Net": {}, "SoF-Net, alpha 0.7": {"alpha": 0.7}}


# ------------------------------------------------------------------------------------------------------------ data


@dataclass
class Part:
    """The videos of a split as features."""

    features: StoredFeatures
    targets: Tensor  # (V,)
    relevant: Tensor  # (V, T) the frames of the action
    groups: list[str]  # the session in which each video's action was filmed

    def batches(self, model: StopOrForward) -> list[tuple[EncodedVideo, Tensor]]:
        """Return the videos as `dynskip.calibrate` takes them."""
        with torch.no_grad():
            return [(self.features.rows(model, slice(None)), self.targets)]


@dataclass
class Data:
    """A composed set: its parts and classes, and other training videos for as long as one likes."""

    parts: dict[str, Part]
    classes: list[str]
    compose: Callable[[str, int], Part]

    def training(self, epoch: int) -> Part:
        """Return the training videos of an epoch: the same clips, cut and surrounded differently each time."""
        return self.compose("train", epoch + 1)


def put_together(
    clips: dict[str, StoredFeatures], compositions: Sequence[Composition], rows: dict[Path, int]
) -> StoredFeatures:
    """Take the features of composed videos from those of their clips.

    Args:
        clips: features of the clips by the split that they came in, `STEPS` frames each.
        compositions: the videos.
        rows: each clip's row in its features.
    """
    source = clips["test" if compositions[0].split == "test" else "train"]
    clip, step = frames_of(compositions, rows)
    pooled = tuple(features[clip, step] for features in source.pooled)
    return StoredFeatures(pooled, source.embedding[clip, step], torch.arange(len(compositions)), source.image_size)


def session(composition: Composition) -> str:
    """Name the session in which a video's action was filmed."""
    name = composition.shots[composition.action].clip.path.name
    found = re.search(GROUP, name)
    return f"{composition.label} {found[1] if found else name}"


@lru_cache(maxsize=len(SEEDS))
def load(data: Path, weights: Path, folder: Path, size: int, irrelevant: tuple[str, ...], seed: int) -> Data:
    """Return the parts train, val and test of a composed set; clips are encoded if need be.

    The seed decides which groups are held out for validation and how videos are composed.
    """
    items = load_items(data)
    prep = Preprocessing(size, STEPS)
    model = sofnet(network(weights, 1000)).to(memory_format=torch.channels_last)
    clips, rows = {}, {}
    for split in ("train", "test"):
        listed = pick_split(items, split)
        clips[split] = encode_clips(model, Clips(listed, class_names(items), prep), folder / str(size) / split)
        if len(clips[split]) < len(listed):
            raise DynskipError("Composing needs every clip; leave the unreadable ones out of labels.csv.")
        rows.update({item.path: row for row, item in enumerate(listed)})
    divided = split_off_validation(items, VAL_SHARE, seed)
    classes = sorted(set(class_names(items)) - set(irrelevant))

    def composed(split: str, version: int = 0) -> Part:
        own = compose(pick_split(divided, split), irrelevant, COPIES[split], seed + 1000 * version)
        targets = torch.tensor([classes.index(composition.label) for composition in own])
        return Part(put_together(clips, own, rows), targets, relevant_frames(own), [session(each) for each in own])

    return Data({split: composed(split) for split in COPIES}, classes, composed)


def network(weights: Path, num_classes: int) -> Any:
    """Return the frozen backbone."""
    backbone = stage_model("resnet50_v1", num_classes=num_classes)
    load_weights(backbone.model, weights)
    return backbone


# ----------------------------------------------------------------------------------------------------- one run


@torch.no_grad()
def measure(model: StopOrForward, part: Part) -> dict[str, Any]:
    """Say how accurate and how costly a model is on a part, what it did with frames, and with which ones."""
    model.eval()
    outputs = [model.decide(part.features.rows(model, rows)) for rows in torch.arange(len(part.features)).split(256)]
    stopped_at, used = joined(outputs, "stopped_at"), joined(outputs, "used")
    probabilities = joined(outputs, "probabilities")
    usage = metrics.frame_usage(stopped_at, model.backbone.num_stages)
    relevance = metrics.frame_relevance(used, part.relevant)
    return {
        "top1": metrics.top_k_accuracy(probabilities, part.targets),
        "mean_ap": metrics.mean_average_precision(probabilities, part.targets),
        "gmacs": float(joined(outputs, "macs").mean()) / 1e9,
        "used": usage.used,
        "stopped": list(usage.stopped),
        "unseen": usage.unseen,
        "precision": relevance.precision,
        "recall": relevance.recall,
        "fallbacks": int(joined(outputs, "fallback").sum()),
    }


def joined(outputs: Sequence[SkipOutput], name: str) -> Tensor:
    return torch.cat([getattr(output, name) for output in outputs])


def run_gates(run: Run, data: Data, model: StopOrForward) -> dict[str, Any]:
    """Train gates; measure them at the arg-max and with early termination, and calibrate the whole method."""
    parts, lookup = data.parts, model.lookup_for((run.size, run.size))
    logged = train_gates(run, data.training, model)
    results: dict[str, Any] = {"last_epoch": logged}
    if run.beta is not None:
        results["asked_for"] = asked_for(model, parts["val"])
    model.terminator = None
    results["modes"] = {"gates": {split: measure(model, parts[split]) for split in ("val", "test")}}
    sweep: list[dict[str, Any]] = []
    for rho in RHOS:
        model.terminator = EarlyTerminator(rho, MIN_FRAMES)
        sweep.append({"rho": rho, **{split: measure(model, parts[split]) for split in ("val", "test")}})
    results["termination"] = sweep
    results["modes"]["termination"] = sweep[RHOS.index(THRESHOLD)]
    affordable = [step for step in sweep if step["val"]["gmacs"] <= BUDGET * lookup.dense * STEPS / 1e9]
    results["modes"]["budget"] = affordable[-1] if affordable else sweep[0]
    if run != Run("gates", seed=run.seed):
        return results
    model.terminator = EarlyTerminator(THRESHOLD, MIN_FRAMES)
    calibration = calibrate.to_accuracy(model, parts["val"].batches(model), 0.0, per_gate=False)
    results["curve"] = replayed(model, calibration.curve, parts)
    calibration.apply(model)
    results["modes"]["calibrated"] = {split: measure(model, parts[split]) for split in ("val", "test")}
    results["calibrated_thresholds"] = asdict(calibration.point)
    return results


def train_gates(run: Run, training: Callable[[int], Part], model: StopOrForward) -> dict[str, float]:
    """Train gates and inner classifiers on the training videos of each epoch; return what the last epoch logged."""
    criterion = SoFLoss(model.lookup_for((run.size, run.size)), run.alpha, run.beta)
    if criterion.guidance is not None:
        criterion.guidance.self_supervision = SelfSupervisionLoss(run.supervise_last)
    group = RECIPE.parameter_groups(model)[1]
    optimizer = torch.optim.AdamW([group], RECIPE.lr, weight_decay=RECIPE.weight_decay)
    for epoch in range(RECIPE.epochs):
        logged = train_epoch(model, training(epoch), criterion, optimizer, epoch, run.seed)
        common.progress(f"epoch {epoch + 1}/{RECIPE.epochs} {logged['total']:.3f}", end="")
    common.progress("")
    return logged


def train_epoch(
    model: StopOrForward, part: Part, criterion: SoFLoss, optimizer: torch.optim.Optimizer, epoch: int, seed: int
) -> dict[str, float]:
    """Train gates and inner classifiers for one epoch; return the means of what is logged."""
    torch.manual_seed(derive_seed(seed, epoch))
    model.train()
    model.temperature = RECIPE.temperature_at(epoch)
    optimizer.param_groups[0]["lr"] = RECIPE.lr_at(epoch)
    sums: dict[str, float] = {}
    for rows in torch.randperm(len(part.features)).split(64):
        with torch.no_grad():
            encoded = part.features.rows(model, rows)
        output = model.decide(encoded)
        losses = criterion(output, part.targets[rows])
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        accuracy = (output.logits.argmax(-1) == part.targets[rows]).float().mean()
        for name, value in {"accuracy": accuracy, "used": output.used.float().mean(), **vars(losses)}.items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(rows) / len(part.features)
    return sums


@torch.no_grad()
def asked_for(model: StopOrForward, part: Part) -> dict[str, list[float]]:
    """Say how often self-supervision would have a gate forward, on relevant and on other frames, gate by gate."""
    output = model.train().decide(part.features.rows(model, slice(None)), sample=False)
    model.eval()
    assert output.inner_logits is not None
    labels = self_supervision_targets(output.inner_logits, part.targets, output.frame_logits)
    frames = {"relevant": part.relevant, "irrelevant": ~part.relevant}
    return {name: labels[marked].mean(0).tolist() for name, marked in frames.items()}


def run_baselines(run: Run, data: Data, model: StopOrForward) -> dict[str, Any]:
    """Measure the dense backbone on all, few and random frames, ending early, and with gates that are not trained."""
    parts = data.parts
    val, test = (parts[split].batches(model) for split in ("val", "test"))
    features, stages = model.backbone.num_features, model.backbone.num_stages
    every_frame = [FixedGate() for _ in features]
    model = StopOrForward(model.backbone, every_frame)
    results: dict[str, Any] = {"modes": {"dense": {split: measure(model, parts[split]) for split in ("val", "test")}}}
    curves: dict[str, Any] = {}
    for name, sample in (
        ("uniform frames", calibrate.uniform_frames),
        ("random frames", lambda model, batches: calibrate.random_frames(model, batches, seed=run.seed)),
    ):
        points = zip(sample(model, val), sample(model, test), strict=True)
        curves[name] = [{"val": point(on_val), "test": point(on_test)} for on_val, on_test in points]
    if run != Run("baselines", seed=run.seed):
        return {**results, "curves": curves, "probe": probe(parts)}
    classifiers = inner_classifiers(parts["train"], features, model.backbone.num_classes)
    gates: dict[str, Callable[[int], nn.Module]] = {
        "confidence gates": lambda n: confidence_gate(features[n], classifiers[n]),
        "similarity gates": lambda n: SimilarityGate(features[n]),
        "early termination alone": lambda n: FixedGate(),
    }
    for name, make in gates.items():
        for ending in (None, EarlyTerminator(THRESHOLD, MIN_FRAMES)):
            if name == "early termination alone" and ending is None:
                continue
            model = StopOrForward(model.backbone, [make(n) for n in range(stages)], terminator=ending).eval()
            found = calibrate.to_accuracy(model, val, 1.0, per_gate="gates" in name)  # of interest is its curve
            label = name if ending is None or "termination" in name else f"{name}, early termination"
            curves[label] = replayed(model, found.curve, parts)
    return {**results, "curves": curves, "probe": probe(parts)}


def pairs(args: argparse.Namespace) -> Iterator[str]:
    """Say for every pair of classes how well a linear probe of each stage tells it from the others, on val."""
    yield table("irrelevant, % right", STAGES, [])
    for pair in itertools.combinations(class_names(load_items(args.data)), 2):
        parts = load(args.data, args.weights, args.cache, Run.size, pair, SEEDS[0]).parts
        accuracies = [found["val"] for found in probe(parts)]
        yield f"| {', '.join(pair)} | " + " | ".join(f"{100 * value:.1f}" for value in accuracies) + " |"


def probe(parts: dict[str, Part]) -> list[dict[str, float]]:
    """Say how well a linear classifier of a stage's features tells relevant frames from others, stage by stage."""
    accuracies = []
    for n, pooled in enumerate(parts["train"].features.pooled):
        mean, deviation = pooled.mean((0, 1)), pooled.std((0, 1)) + 1e-6
        layer = nn.Linear(len(mean), 2)
        relevant = parts["train"].relevant.flatten().long()
        fit_linear(layer, ((pooled - mean) / deviation).flatten(0, 1), relevant, 0.1)
        found = {}
        with torch.no_grad():
            for split in ("val", "test"):
                answer = layer((parts[split].features.pooled[n] - mean) / deviation).argmax(-1)
                found[split] = float((answer == parts[split].relevant).float().mean())
        accuracies.append(found)
    return accuracies


def confidence_gate(features: int, classifier: nn.Linear) -> ConfidenceGate:
    gate = ConfidenceGate(features, classifier.out_features, 0.5, stop="unsure")
    gate.classifier = classifier  # type: ignore[assignment]  # any module may take its place
    return gate


def inner_classifiers(part: Part, features: Sequence[int], classes: int) -> list[nn.Linear]:
    """Train a linear classifier of single frames on each stage's pooled features, with their video's label."""
    classifiers = [nn.Linear(channels, classes) for channels in features]
    for classifier, pooled in zip(classifiers, part.features.pooled, strict=True):
        fit_linear(classifier, pooled.flatten(0, 1), part.targets.repeat_interleave(STEPS), HEAD_DECAY)
        classifier.requires_grad_(False)
    return classifiers


def replayed(
    model: StopOrForward, curve: Sequence[calibrate.CurvePoint], parts: dict[str, Part]
) -> list[dict[str, Any]]:
    """Measure on the test part what the curve's thresholds, which come from the validation part, give there."""
    test = parts["test"].batches(model)
    return [{"val": point(on_val), "test": point(calibrate.replay(model, test, on_val))} for on_val in curve]


def point(measured: calibrate.CurvePoint) -> dict[str, float]:
    return {"top1": measured.accuracy, "gmacs": measured.macs / 1e9}


def prepare(run: Run, args: argparse.Namespace) -> tuple[Data, StopOrForward]:
    """Return a run's videos, and its model with a classifier that is fitted to them and gates that are new."""
    data = load(args.data, args.weights, args.cache, run.size, IRRELEVANT[run.irrelevance], run.seed)
    torch.manual_seed(run.seed)
    model = sofnet(
        network(args.weights, len(data.classes)),
        hidden=HIDDEN,
        temporal=run.temporal,
        guidance=run.beta is not None,
        detach_inner=False,
        forward_bias=0.0,
        state_update=run.state_update,
    )
    model.backbone.requires_grad_(False)
    fit_classifier(model, data.parts["train"].features, data.parts["train"].targets, HEAD_DECAY)
    return data, model


def perform(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Do one run and return what goes into its file."""
    started = time.perf_counter()
    data, model = prepare(run, args)
    parts = data.parts
    results = (run_baselines if run.kind == "baselines" else run_gates)(run, data, model)
    counts = {
        split: {"videos": len(part.targets), "relevant": float(part.relevant.float().mean())}
        for split, part in parts.items()
    }
    return {
        "run": asdict(run),
        "recipe": {**asdict(RECIPE), "head_decay": HEAD_DECAY, "hidden": HIDDEN},
        "composed": {"irrelevant": IRRELEVANT[run.irrelevance], "copies": COPIES, "val_share": VAL_SHARE},
        "command": f"python benchmarks/ablation.py --data DIR --weights FILE --cache DIR --only {run.name}",
        "machine": common.machine("cpu"),
        "seconds": round(time.perf_counter() - started, 1),
        "dense_gmacs": model.lookup_for((run.size, run.size)).dense * STEPS / 1e9,
        "data": counts,
        **results,
    }


# ---------------------------------------------------------------------------------------------------------- report


def committed(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Read the results of all runs."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise DynskipError(f"There are no results in {folder}. Run the ablation first.")
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def select(results: Sequence[dict[str, Any]], seeds: Sequence[int] = SEEDS, **settings: Any) -> list[dict[str, Any]]:
    """Return the runs with these settings, and otherwise the defaults, one a seed."""
    wanted = [asdict(Run(**{"kind": "gates", **settings, "seed": seed})) for seed in seeds]
    return [result for result in results if result["run"] in wanted]


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """Write the mean of some values and, where there are several, their standard deviation."""
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


STAGES = [f"res{n}" for n in range(1, 6)]
COLUMNS = ["mAP %", "top-1 %", "GMACs/video", "of dense %", "used %", "precision %", "recall %", "thesis: mAP, GMACs"]
# The thesis' rows at each size, in the order of `ROWS` (tables 4.4 and 4.5, on ActivityNet).
THESIS = {
    168: ["73.7, 40.3", "74.3, 32.2", "75.0, 31.6", "74.7, 32.6", "75.6, 31.7", "75.3, 27.4"],
    192: ["", "", "", "", "-, 43.7", "76.3, 37.4"],
    224: ["-, 65.9", "", "", "", "77.1, 55.7", "76.9, 48.6"],
}
LATE: dict[str, Any] = {"irrelevance": "late"}
ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("dense TSN", {"kind": "baselines"}, "dense"),
    ("gates, FC", {"temporal": None, "beta": None}, "gates"),
    ("gates, LSTM", {"beta": None}, "gates"),
    ("gates, FC + guidance", {"temporal": None}, "gates"),
    ("gates, LSTM + guidance", {}, "gates"),
    ("+ early termination at 0.999", {}, "termination"),
    ("+ early termination, strictest within 70 % of dense on val", {}, "budget"),
    ("+ all thresholds calibrated to no loss on val", {}, "calibrated"),
]
CHOICES: list[tuple[str, dict[str, Any], str]] = [
    ("LSTM + guidance as above", {}, "gates"),
    ("guidance without self-supervision (beta 1)", {"beta": 1.0}, "gates"),
    ("self-supervision of the last gate, too", {"supervise_last": True}, "gates"),
    ("the same, with early termination at 0.999", {"supervise_last": True}, "termination"),
    ("alpha 0.7: efficiency counts three times as much", {"alpha": 0.7}, "gates"),
    ("the same, with early termination at 0.999", {"alpha": 0.7}, "termination"),
    ("alpha 0.7 without guidance", {"alpha": 0.7, "beta": None}, "gates"),
    ("state rule `reached`", {"state_update": "reached"}, "gates"),
    ("the same, with early termination at 0.999", {"state_update": "reached"}, "termination"),
]
BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)  # of the dense cost


def table(corner: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Write a Markdown table."""
    head = [f"| {corner} | " if corner else "| | ", " | ".join(columns), " |\n|---|", "---:|" * len(columns)]
    return "".join(head) + "".join(f"\n| {name} | {' | '.join(cells)} |" for name, cells in rows)


def percents(lines: Sequence[Sequence[float]]) -> list[str]:
    """Write each column's mean and spread in percent."""
    return [spread(column, 100) for column in zip(*lines, strict=True)]


def row(name: str, results: Sequence[dict[str, Any]], mode: str, thesis: str = "") -> tuple[str, list[str]]:
    """Lay one way of running the runs out as a row of the main table."""
    measured = [(result["modes"][mode]["test"], result["dense_gmacs"]) for result in results]
    keys = ("used", "precision", "recall")
    lines = [[m["mean_ap"], m["top1"], m["gmacs"] / dense, *(m[key] for key in keys)] for m, dense in measured]
    cells = percents(lines)
    return name, [*cells[:2], spread([m["gmacs"] for m, _ in measured]), *cells[2:], thesis]


def section(results: Sequence[dict[str, Any]], theirs: Sequence[str], **settings: Any) -> str:
    """Lay out the thesis' rows at one size on one composed set, beside the thesis' figures."""
    found = [(name, select(results, **own, **settings), mode) for name, own, mode in ROWS]
    both = zip(found, [*theirs, *[""] * len(found)], strict=False)
    rows = [row(name, runs, mode, thesis) for (name, runs, mode), thesis in both if runs and mode in runs[0]["modes"]]
    return table("", COLUMNS, rows)


def within(curve: Sequence[dict[str, Any]], budget: float) -> dict[str, Any] | None:
    """Return the curve's most accurate point within a budget in GMACs, both as the validation part has it.

    Of points that are equally accurate there, the costliest: it is the safest, and the budget is there to be used.
    """
    points = [p for p in curve if p["val"]["gmacs"] <= budget]
    return max(points, key=lambda p: (p["val"]["top1"], p["val"]["gmacs"]), default=None)


def curves(results: Sequence[dict[str, Any]], **settings: Any) -> dict[str, list[tuple[float, list[dict[str, Any]]]]]:
    """Collect every method's curves on one composed set: its dense cost and one curve a seed."""
    collected: dict[str, list[tuple[float, Any]]] = {}
    for name, own in SWEPT.items():
        for result in select(results, **own, **settings):
            by_threshold = [*result["termination"], result["modes"]["gates"]]
            collected.setdefault(name, []).append((result["dense_gmacs"], by_threshold))
    for result in select(results, **settings):
        if "curve" in result:
            collected.setdefault("SoF-Net, all thresholds", []).append((result["dense_gmacs"], result["curve"]))
    for result in select(results, kind="baselines", **settings):
        for name, curve in result["curves"].items():
            collected.setdefault(name, []).append((result["dense_gmacs"], curve))
    return collected


def paired_table(results: Sequence[dict[str, Any]]) -> str:
    """Say what guidance and memory add, seed by seed on the same sets; nothing where no seed has all of the runs."""
    runs = {name: {r["run"]["seed"]: r for r in select(results, MORE_SEEDS, **own)} for name, own in PAIRED.items()}
    seeds = [seed for seed in MORE_SEEDS if all(seed in by_seed for by_seed in runs.values())]
    if not seeds:
        return ""
    named: list[tuple[str, list[list[float]]]] = []
    for name, by_seed in runs.items():
        for mode, ending in (("gates", ""), ("termination", ", early termination at 0.999")):
            tests = [(by_seed[seed]["modes"][mode]["test"], by_seed[seed]["dense_gmacs"]) for seed in seeds]
            values = [[t["gmacs"] / dense, t["top1"], t["mean_ap"], t["recall"]] for t, dense in tests]
            named.append((name + ending, values))
    for a, b in ((1, 2), (1, 5)):
        pairs = zip(named[a][1], named[b][1], strict=True)
        difference = [[x - y for x, y in zip(*pair, strict=True)] for pair in pairs]
        named.append((f"row {a + 1} less row {b + 1}, on the same set", difference))
    rows = [(name, percents(values)) for name, values in named]
    return table(f"{len(seeds)} seeds", ["of dense %", "top-1 %", "mAP %", "recall %"], rows)


def asked_table(results: Sequence[dict[str, Any]]) -> str:
    """Show how often self-supervision asks gates to forward; nothing where no run says so."""
    asked = [result["asked_for"] for result in select(results)]
    rows = [(name, percents([shares[name] for shares in asked])) for name in ("relevant", "irrelevant")]
    return table("asked to forward, % of frames", STAGES, rows) if asked else ""


def budget_table(results: Sequence[dict[str, Any]], **settings: Any) -> str:
    """Compare methods at equal cost: thresholds chosen on val within a budget, accuracy on test."""
    rows = []
    for name, runs in curves(results, **settings).items():
        cells = []
        for budget in BUDGETS:
            found = [within(curve, budget * dense) for dense, curve in runs]
            reached = [p["test"]["top1"] for p in found if p is not None]
            cells.append(spread(reached, 100) if len(reached) == len(runs) else "")
        rows.append((name, cells))
    return table("top-1 % within", [f"{budget:.0%} of dense" for budget in BUDGETS], rows)


def usage_table(results: Sequence[dict[str, Any]]) -> str:
    """Show where frames end (thesis Fig. 4.1)."""
    rows = []
    for name, settings, mode in ROWS[4:]:
        measured = [result["modes"][mode]["test"] for result in select(results, **settings)]
        rows.append((name, percents([[*m["stopped"], m["used"], m["unseen"]] for m in measured])))
    return table("frames, %", [*STAGES, "used", "unseen"], [(name, cells) for name, cells in rows if cells])


def probe_table(results: Sequence[dict[str, Any]], **settings: Any) -> str:
    """Show what each stage's features say about relevance."""
    probes = [result["probe"] for result in select(results, kind="baselines", **settings)]
    rows = [(split, percents([[stage[split] for stage in stages] for stages in probes])) for split in ("val", "test")]
    return table("relevant or not, % right", STAGES, rows)


def report(results: Sequence[dict[str, Any]]) -> str:
    """Write all tables as Markdown."""
    parts = []
    for split in COPIES:
        counts = sorted({result["data"][split]["videos"] for result in results})
        relevant = statistics.mean(result["data"][split]["relevant"] for result in results)
        parts.append(
            f"{split} {' to '.join(map(str, counts[:: max(len(counts) - 1, 1)]))} videos, {relevant:.0%} relevant"
        )
    machines = {json.dumps(result["machine"]) for result in results}
    blocks = [
        f"{len(results)} runs; {'; '.join(parts)} frames. Means and standard deviations over seeds on the test part; "
        "GMACs are 10^9 multiply-adds."
    ]
    for size in sorted({result["run"]["size"] for result in results}):
        blocks += [f"### {size} x {size}", section(results, THESIS.get(size, []), size=size)]
    chosen = [(name, select(results, **settings), mode) for name, settings, mode in CHOICES]
    blocks += ["### Choices", table("", COLUMNS, [row(name, runs, mode) for name, runs, mode in chosen if runs])]
    if found := [text for text in (paired_table(results), asked_table(results)) if text]:
        blocks += ["### Guidance and memory on the same sets, and what self-supervision asks for", *found]
    blocks += ["### At equal cost", budget_table(results), "### Where frames end", usage_table(results)]
    blocks += ["### What a linear probe of each stage knows of relevance", probe_table(results)]
    if select(results, kind="baselines", **LATE):
        blocks += ["### Irrelevant frames that are recognised late", section(results, [], **LATE)]
        blocks += [budget_table(results, **LATE), probe_table(results, **LATE)]
    blocks += [
        ", ".join(f"{key} {value}" for key, value in json.loads(machine).items()) for machine in sorted(machines)
    ]
    return "\n\n".join(blocks)


DRAWN = (
    "SoF-Net",
    "SoF-Net, all thresholds",
    "confidence gates, early termination",
    "similarity gates, early termination",
    "uniform frames",
    "random frames",
)


def mean_curve(runs: Sequence[tuple[float, list[dict[str, Any]]]]) -> list[calibrate.CurvePoint]:
    """Average the runs' test results with the thresholds that val has for each of many budgets, ± their spread."""
    points = []
    for budget in (n / 25 for n in range(2, 26)):
        found = [within(curve, budget * dense) for dense, curve in runs]
        tests = [p["test"] for p in found if p is not None]
        if len(tests) == len(runs):
            macs = 1e9 * statistics.mean(test["gmacs"] for test in tests)
            points.append(averaged([test["top1"] for test in tests], macs))
    return list(dict.fromkeys(points))


def averaged(top1: Sequence[float], macs: float) -> calibrate.CurvePoint:
    """Average the runs' accuracies, with a band of one standard deviation."""
    mean, deviation = statistics.mean(top1), statistics.stdev(top1)
    return calibrate.CurvePoint(mean, macs, band=(mean - deviation, mean + deviation))


def draw(results: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write the pictures of the documentation."""
    collected, dense = curves(results), select(results, kind="baselines")
    means = {name: mean_curve(collected[name]) for name in DRAWN}
    top1 = [result["modes"]["dense"]["test"]["top1"] for result in dense]
    means["dense"] = [averaged(top1, 1e9 * dense[0]["dense_gmacs"])]
    title = f"Test videos, means of {len(dense)} seeds ± one standard deviation"

    def draw_curves(dark: bool) -> Figure:
        figure = plot.accuracy_compute(means, title=title, dark=dark)
        figure.axes[-1].set_ylim(87, 95)  # below, nobody wants to be
        return figure

    common.save_pair(draw_curves, folder / "ablation_curves.svg")
    measured = [result["modes"]["termination"]["test"] for result in select(results)]
    usage = metrics.FrameUsage(
        used=statistics.mean(m["used"] for m in measured),
        stopped=tuple(statistics.mean(m["stopped"][n] for m in measured) for n in range(5)),
        unseen=statistics.mean(m["unseen"] for m in measured),
    )
    title = "Frames of the test videos"
    common.save_pair(
        lambda dark: plot.frame_usage(usage, STAGES, title=title, dark=dark), folder / "ablation_usage.svg"
    )


# ---------------------------------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--data", type=Path, help="folder with labels.csv (path,label,split)")
    result.add_argument("--weights", type=Path, help="ImageNet weights of resnet50_v1")
    result.add_argument("--cache", type=Path, default=Path("runs/ablation"), help="folder for encoded clips")
    result.add_argument("--only", nargs="+", metavar="NAME", help="these runs, even if they have results")
    result.add_argument("--pairs", action="store_true", help="probe every pair of classes as what is irrelevant")
    result.add_argument("--list", action="store_true", help="name all runs")
    result.add_argument("--report", action="store_true", help="print the tables of the results")
    result.add_argument("--plot", type=Path, metavar="FOLDER", help="draw the pictures of the results")
    return result


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for."""
    named = {run.name: run for run in PLAN}
    if args.list:
        print("\n".join(named))
        return 0
    if args.report:
        print(report(committed()))
        return 0
    if args.plot:
        draw(committed(), args.plot)
        return 0
    unknown = sorted(set(args.only or ()) - set(named))
    if unknown or args.data is None or args.weights is None:
        raise DynskipError(
            f"There is no run {unknown[0]!r}; --list names all of them."
            if unknown
            else "Runs need --data and --weights; --report prints what is there."
        )
    if args.pairs:
        for line in pairs(args):
            print(line, flush=True)
        return 0
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, run in named.items():
        file = RESULTS / f"{name}.json"
        if name in args.only if args.only else not file.exists():
            content = perform(run, args)
            file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            common.progress(f"{name}: {content['seconds']} s")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    return command.run(lambda: run(args), "Finished runs stay; the same command goes on.")


if __name__ == "__main__":
    sys.exit(main())
