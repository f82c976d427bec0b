"""Which of timm's networks can dynskip cut into stages? Proves it model by model.

    python benchmarks/coverage.py --quick           # about 30 small structures; nothing is written
    python benchmarks/coverage.py                   # all structures that have no result with these versions yet
    python benchmarks/coverage.py --only 'twins_*'  # these structures, again
    python benchmarks/coverage.py --report          # writes docs/backbones.md and .csv from the results

timm's names are variations of far fewer structures. Two models share a structural signature when their class, the
source file that registers them, the names of their top-level children and the boundaries that they declare
(`feature_info`) are the same. The smallest model of every signature stands for all of them and is checked through
`dynskip.stage_model` with default boundaries. Transformers too large for that are built with fewer channels a head.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import dataclasses
import fnmatch
import functools
import gc
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import dynskip
from dynskip import InnerClassifier, PolicyGate, SoFLoss, StagedBackbone, StopOrForward, stage_model
from dynskip.backbone.carry import flatten

ROOT = Path(__file__).resolve().parent.parent
SIGNATURES = ROOT / "benchmarks" / "results" / "signatures.json"
RESULTS = ROOT / "benchmarks" / "results" / "coverage.jsonl"
PAGE = ROOT / "docs" / "backbones.md"
ROWS = ROOT / "docs" / "backbones.csv"  # all that the checks found

TOLERANCE = 1e-4  # of the largest absolute value compared
SPREAD = 1e-2  # values have to differ by this between images, or comparing rows would prove nothing
SIZES = (128, 160, 192, 224)  # tried before a model's native size
BATCH = 5
COMPILED_BATCHES = (5, 4, 2, 3)
LARGE = 50_000_000  # parameters above which a transformer is built narrower
NARROW = 16  # channels a head
PATCHES = 8  # a side of their images
QUICK = 32

MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # bytes
MACHINE = f"Python {platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores, {MEMORY >> 30} GiB"
VERSIONS = f"dynskip {dynskip.__version__}, timm {timm.__version__}, torch {torch.__version__}"

INTRODUCTION = """\
# Backbones checked

timm's {models} models have {structures} different structures. The smallest model of each was cut and checked.

| check | structures | timm models that they stand for |
| --- | --- | --- |
{summary}

## What did not pass

{failures}

## What was checked

Each model was cut by [`dynskip.stage_model`](api/backbone.md#dynskip.stage_model) with default boundaries, and compared
with timm's model, with random weights, on {batch} images. Values count as equal if they differ by less than
{tolerance:g} of the largest one. Large transformers were built with {narrow} channels a head, most of them for small
images, so that a small machine can check them ("narrow"). Deep random networks amplify rounding: where float32 missed
the tolerance, the check was repeated in float64.

- *exact*: the stages and the head compose to the model's own logits.
- *subset*: with one sample dropped at every boundary, every pooled feature and the logits equal the rows of the full
  run.
- *gradients*: one training step gives every parameter the gradient, and every statistic the value, that it gets
  without stages.
- *compile*: `torch.compile(fullgraph=True)` takes every stage, with one graph for all batch sizes above 1.
- *keys*: the checkpoint has timm's own names, under the prefix `model.`.
- *wrapped*: with gates around it, the model takes a training step. Skipping gives the same decisions and logits as
  masking, and the same logits bit for bit after a save and a load.

Written by `python benchmarks/coverage.py --report` after {minutes:.0f} minutes of checks with one thread, on
{environments}.

## Families and their boundaries

*Models* counts the timm models of a structure. Sizes, layouts and each check's result are in
[`backbones.csv`](backbones.csv).

| family | checked | models | boundaries |
| --- | --- | --- | --- |
{rows}
"""


@dataclass
class Signature:
    """One structure, and the timm models that have it."""

    cls: str
    file: str
    representative: str
    models: list[str]
    parameters: int


@dataclass
class Outcome:
    """What the checks of one representative found."""

    name: str
    checks: dict[str, str] = field(default_factory=dict)  # "ok", or why not
    worst: dict[str, float] = field(default_factory=dict)  # relative differences
    input_size: Sequence[int] = ()
    parameters: int = 0  # of the model as it was checked
    stages: Sequence[str] = ()
    layouts: Sequence[str] = ()
    graphs: Sequence[int] = ()  # that every stage compiled to
    in_float64: Sequence[str] = ()  # checks that passed in float64 alone
    seconds: float = 0.0
    versions: str = VERSIONS
    machine: str = MACHINE

    def passed(self, check: str) -> bool:
        return self.checks.get(check) == "ok"

    def reasons(self) -> str:
        """Say what did not pass, and why."""
        found: defaultdict[str, list[str]] = defaultdict(list)
        for check, reason in self.checks.items():
            if reason != "ok":
                found[reason].append(check)
        return "; ".join(f"{', '.join(checks)}: {reason}" for reason, checks in found.items())


@dataclass
class Case:
    """A staged model to check."""

    backbone: StagedBackbone
    images: Tensor  # (5, C, H, W)
    logits: Tensor  # (5, K), of timm's model
    keys: list[str]  # of timm's model's state dict
    graphs: list[int] = field(default_factory=list)  # that each stage compiled to


class CheckError(dynskip.DynskipError):
    """What a check found."""


# Structures


def find_signatures() -> list[Signature]:
    """Group all of timm's models by signature, or read the groups found earlier for this version of timm."""
    if SIGNATURES.exists():
        stored = json.loads(SIGNATURES.read_text())
        if stored["timm"] == timm.__version__:
            return [Signature(**entry) for entry in stored["signatures"]]
    print("Building all of timm's models without weights to find their signatures; this takes minutes, once.")
    groups: defaultdict[tuple[Any, ...], list[tuple[bool, int, str]]] = defaultdict(list)
    names = [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith("timm.")]
    for name in names:  # dynskip registers a model, too
        signature, parameters = describe(name)
        # timm's toys for its own tests stand for others only where there are no others.
        groups[signature].append((name.startswith("test_"), parameters, name))
    found = []
    for (cls, file, *_), members in groups.items():
        _, parameters, representative = min(members)
        found.append(Signature(cls, file, representative, sorted(name for *_, name in members), parameters))
    found.sort(key=lambda s: (s.file, s.cls, s.parameters, s.representative))
    entries = ",\n".join(json.dumps(dataclasses.asdict(s)) for s in found)
    SIGNATURES.write_text(f'{{"timm": "{timm.__version__}", "signatures": [\n{entries}\n]}}\n')
    return found


def describe(name: str) -> tuple[tuple[Any, ...], int]:
    """Return a model's signature and its number of parameters, without allocating them."""
    with torch.device("meta"):
        model = timm.create_model(name)
    info = getattr(model, "feature_info", None) or []
    boundaries = tuple(str(entry.get("module")) for entry in getattr(info, "info", info))
    children = tuple(child for child, _ in model.named_children())
    file = timm.models.model_entrypoint(name).__module__.rsplit(".", 1)[-1]
    return (type(model).__name__, file, children, boundaries), sum(p.numel() for p in model.parameters())


# A network whose answers depend on its input


def pictures(batch: int, size: tuple[int, ...], seed: int) -> Tensor:
    """Draw images that differ in colour and in coarse shapes, not only in noise."""
    source = torch.Generator().manual_seed(seed)
    channels, height, width = size
    shapes = F.interpolate(torch.randn(batch, channels, 4, 4, generator=source), (height, width), mode="bilinear")
    return shapes + 0.5 * torch.randn(batch, channels, height, width, generator=source)


@torch.no_grad()
def build(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """Create a timm model in eval mode whose every branch does something, and the input size to check it at.

    Noise is added to all weights, since some branches start at zero. BatchNorm gets statistics of real activations:
    without them, deep random networks forget their input.
    """
    torch.manual_seed(0)
    model = create(name).eval()
    size = choose_size(model)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 11
        parameter.add_(torch.randn_like(parameter), alpha=fan_in**-0.5)
    norms: list[Any] = [m for m in model.modules() if hasattr(m, "running_var") and hasattr(m, "momentum")]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    # White noise as well: stage_model verifies its cut on it.
    model.train()(torch.cat([pictures(BATCH, size, seed=1), torch.randn(BATCH, *size)]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval(), size


def create(name: str) -> nn.Module:
    """Create a timm model; a large transformer with few channels a head and for small images, in the same structure."""
    with torch.device("meta"):
        model: Any = timm.create_model(name)
    counts: list[Any] = [getattr(module, "num_heads", None) for module in model.modules()]
    heads = next((count for count in counts if isinstance(count, int)), None)
    if heads and sum(p.numel() for p in model.parameters()) > LARGE:
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", (16, 16))
        narrow: dict[str, Any] = {"embed_dim": NARROW * heads}
        for options in ({**narrow, "img_size": PATCHES * patch[0]}, narrow):
            with contextlib.suppress(TypeError, AssertionError):  # not every family has these arguments
                small: nn.Module = timm.create_model(name, **options)
                return small
    return timm.create_model(name)


def choose_size(model: nn.Module) -> tuple[int, int, int]:
    """Return the smallest size that the model takes: many have fixed windows or position tables."""
    config: Any = model.pretrained_cfg
    channels, height, width = config["input_size"]
    for size in SIZES:
        try:
            model(torch.zeros(1, channels, size, size))
        except Exception:
            continue
        return channels, size, size
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return channels, *(built_for or (height, width))


# Checks: each returns the largest relative difference that it found


def difference(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Return the largest absolute difference, relative to the largest value expected."""
    if actual.shape != expected.shape:
        raise CheckError(f"shape {tuple(actual.shape)} where {tuple(expected.shape)} was expected")
    scale = max(float(expected.abs().max()), floor)
    distance = float((actual - expected).abs().max())
    if not math.isfinite(scale + distance):
        raise CheckError("proves nothing: values are not finite")
    return distance / (scale or 1.0)


def require_spread(values: Tensor, what: str) -> None:
    """Fail where values hardly depend on the image."""
    spread = difference(values.mean(0, keepdim=True).expand_as(values), values)
    if spread < SPREAD:
        raise CheckError(f"proves nothing: {what} differ by {spread:.1e} between images")


@torch.no_grad()
def check_exact(case: Case) -> float:
    """Compare the whole staged run with timm's model."""
    require_spread(case.logits, "logits")
    return difference(case.backbone(case.images), case.logits)


@torch.no_grad()
def check_subset(case: Case) -> float:
    """Drop one sample at every boundary and compare what is left with the rows of the full run."""
    backbone, images = case.backbone, case.images
    carry, pooled = backbone.start(images), []
    for n in range(backbone.num_stages):
        carry = backbone.run(n, carry)
        pooled.append(backbone.pool(n, carry))
        require_spread(pooled[-1], f"features of {backbone.stage_names[n]}")
    answers = backbone.head(carry)
    require_spread(answers, "logits")
    carry, rows, worst = backbone.start(images), torch.arange(len(images)), 0.0
    for n, expected in enumerate(pooled):
        if len(rows) > 1:
            keep = torch.arange(len(rows)) != n % len(rows)
            carry, rows = carry.select(keep), rows[keep]
        carry = backbone.run(n, carry)
        worst = max(worst, difference(backbone.pool(n, carry), expected[rows]))
    return max(worst, difference(backbone.head(carry), answers[rows]))


def check_gradients(case: Case) -> float:
    """Compare the gradients and the statistics after one training step with those of timm's model."""
    backbone, images = case.backbone, case.images[:3]
    weights = torch.randn(case.logits[:3].shape, generator=torch.Generator().manual_seed(2))
    plain, buffers = training_step(backbone, staged=False, images=images, weights=weights)
    staged, staged_buffers = training_step(backbone, staged=True, images=images, weights=weights)
    one_sided = sorted(set(plain) ^ set(staged))
    if one_sided:
        raise CheckError(f"only one of the two gives {one_sided[0]} a gradient")
    # Some gradients are zero but for rounding (a bias before BatchNorm): measured against the largest of all.
    floor = 1e-3 * max(float(expected.abs().max()) for expected in plain.values())
    worst = max(difference(staged[name], expected, floor) for name, expected in plain.items())
    moved = [
        difference(staged_buffers[name].float(), buffers[name].float(), 1e-6)
        for name in buffers
        if not torch.equal(staged_buffers[name], buffers[name])
    ]
    return max(worst, *moved, 0.0)


def training_step(
    backbone: StagedBackbone, staged: bool, images: Tensor, weights: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients and the buffers after one step of a copy."""
    backbone = copy.deepcopy(backbone).train()
    model = backbone.model
    torch.manual_seed(3)
    ((backbone if staged else model)(images) * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, dict(model.named_buffers())


@torch.no_grad()
def check_compile(case: Case) -> float:
    """Compile every stage alone, run it on several batch sizes and count the graphs."""
    worst, backbone = 0.0, case.backbone
    carries = {batch: backbone.start(case.images[:batch]) for batch in COMPILED_BATCHES}
    for n in range(backbone.num_stages):
        torch.compiler.reset()
        counter = CompileCounter()  # runs graphs as they are
        stage = torch.compile(functools.partial(backbone.run, n), fullgraph=True, backend=counter)
        for batch, carry in carries.items():
            expected = backbone.run(n, carry)
            for tensor, rows in flatten(carry.values, carry.kinds):
                if rows:
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
            actual = stage(carry)
            worst = max(worst, difference(backbone.pool(n, actual), backbone.pool(n, expected)))
            carries[batch] = expected
        case.graphs.append(counter.frame_count)
    again = [f"{name} {count}" for name, count in zip(backbone.stage_names, case.graphs, strict=True) if count > 1]
    if again:
        raise CheckError(f"graphs for batches above 1: {', '.join(again)}")
    return worst


def check_keys(case: Case) -> float:
    """Compare the names in the checkpoint with timm's own."""
    wrong = sorted({f"model.{key}" for key in case.keys} ^ set(case.backbone.state_dict()))
    if wrong:
        raise CheckError(f"{len(wrong)} names differ, such as {wrong[0]}")
    return 0.0


def check_wrapped(case: Case) -> float:
    """Train one step, compare skipping with masking, save and load. Leaves other weights behind."""
    backbone, images = case.backbone, case.images
    video = images[:4].unflatten(0, (2, 2))
    gates = [PolicyGate(channels, hidden=8).to(images.dtype) for channels in backbone.num_features]
    inner = [InnerClassifier(8, backbone.num_classes).to(images.dtype) for _ in gates]
    model = StopOrForward(backbone, gates, inner)
    criterion = SoFLoss(model.lookup_for((images.shape[2], images.shape[3])))
    criterion(model.train()(video), torch.tensor([0, 1])).total.backward()
    torch.optim.SGD(model.parameters(), lr=1e-6).step()
    model.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        encoded = model.encode(video)
        for gate, pooled in zip(gates, encoded.pooled, strict=True):
            # Every gate stops one frame in four before it has seen any.
            logits, _ = gate(pooled.flatten(0, 1), gate.initial_state(4))
            gate.decide.bias[1] -= logits.diff(dim=1).sort(0).values[:2].mean()
        masked, skipped = model.decide(encoded), model(video)
        if not torch.equal(masked.stopped_at, skipped.stopped_at):
            stops = skipped.stopped_at.tolist(), masked.stopped_at.tolist()
            raise CheckError("skipping stops frames at {}, masking at {}".format(*stops))
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        for parameter in model.parameters():
            parameter.zero_()
        file.seek(0)
        model.load_state_dict(torch.load(file, weights_only=True))
        if not torch.equal(model(video).logits, skipped.logits):
            raise CheckError("other logits after a save and a load")
    return difference(skipped.logits, masked.logits)


CHECKS: dict[str, Callable[[Case], float]] = {
    "exact": check_exact,
    "subset": check_subset,
    "gradients": check_gradients,
    "compile": check_compile,
    "keys": check_keys,
    "wrapped": check_wrapped,
}


# Running


def examine(name: str) -> Outcome:
    """Check one model in float32, and again in float64 what fails there."""
    began = time.perf_counter()
    outcome = attempt(name, list(CHECKS), torch.float32)
    failed = [check for check in CHECKS if not outcome.passed(check)]
    if set(failed) - {"compile"}:
        # Deep random networks amplify rounding; a wrong cut stays wrong in float64.
        again = attempt(name, failed, torch.float64)
        passed = [check for check in failed if again.passed(check)]
        outcome = dataclasses.replace(
            outcome if outcome.stages else again,
            checks={**outcome.checks, **dict.fromkeys(passed, "ok")},
            worst={**outcome.worst, **{check: again.worst[check] for check in passed}},
            in_float64=passed,
        )
    outcome.seconds = round(time.perf_counter() - began, 1)
    return outcome


def attempt(name: str, checks: Sequence[str], dtype: torch.dtype) -> Outcome:
    """Build one model, stage it and run checks."""
    outcome = Outcome(name)
    try:
        model, size = build(name)
        model.to(dtype)
        outcome.input_size, outcome.parameters = size, sum(p.numel() for p in model.parameters())
        images, keys = pictures(BATCH, size, seed=4).to(dtype), list(model.state_dict())
        with torch.no_grad():
            logits = model(images)
        case = Case(stage_model(model, input_size=size), images, logits, keys)
    except Exception as error:
        outcome.checks = dict.fromkeys(checks, explain(error))
        return outcome
    outcome.stages, outcome.layouts = case.backbone.stage_names, case.backbone.layouts
    for check in checks:
        try:
            worst = CHECKS[check](case)
            outcome.worst[check] = float(f"{worst:.1e}")
            outcome.checks[check] = "ok" if worst < TOLERANCE else f"relative difference {worst:.1e}"
        except Exception as error:
            outcome.checks[check] = explain(error)
        gc.collect()
    outcome.graphs = case.graphs
    return outcome


def explain(error: Exception) -> str:
    """Return one line that says what went wrong."""
    text = " ".join(str(error).split())
    text = text if isinstance(error, dynskip.DynskipError) else f"{type(error).__name__}: {text}"
    return text if len(text) <= 400 else f"{text[:397]}..."


def limit(memory: int) -> None:
    """Give this process one thread, and so much memory in bytes: beyond it, allocations fail."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    torch.set_num_threads(1)


def read_results() -> dict[str, Outcome]:
    """Read the stored outcomes; the last one of a model counts."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    outcomes = [Outcome(**json.loads(line)) for line in lines]
    return {outcome.name: outcome for outcome in outcomes}


# Report


def summarise(pairs: Sequence[tuple[Signature, Outcome]]) -> list[str]:
    """Return, for every check and for all of them, a row: structures that pass it, and models they stand for."""
    rows, every = [], sum(len(s.models) for s, _ in pairs)
    for name, checks in {**{check: [check] for check in CHECKS}, "all of them": list(CHECKS)}.items():
        passed = [s for s, outcome in pairs if all(map(outcome.passed, checks))]
        models = sum(len(s.models) for s in passed)
        rows.append(f"| {name} | {len(passed)} of {len(pairs)} | {models} of {every} |")
    return rows


def report(pairs: Sequence[tuple[Signature, Outcome]]) -> str:
    """Return the page that shows the results."""
    environments = {f"{outcome.versions}, {outcome.machine}" for _, outcome in pairs}
    return INTRODUCTION.format(
        models=sum(len(s.models) for s, _ in pairs),
        structures=len(pairs),
        tolerance=TOLERANCE,
        batch=BATCH,
        narrow=NARROW,
        summary="\n".join(summarise(pairs)),
        minutes=sum(outcome.seconds for _, outcome in pairs) / 60,
        environments="; and ".join(sorted(environments)),
        failures="\n".join(
            f"- {s.cls} (`{s.representative}`, {len(s.models)} models): {outcome.reasons()}"
            for s, outcome in pairs
            if outcome.reasons()
        ),
        rows="\n".join(
            f"| {s.cls} | `{s.representative}` | {len(s.models)} | `{shorten(outcome.stages)}` |"
            for s, outcome in pairs
        ),
    )


def to_row(signature: Signature, outcome: Outcome) -> dict[str, object]:
    """Return all that the checks of a structure found."""
    narrow = 0 < outcome.parameters < signature.parameters
    verdicts = {check: "yes" if outcome.passed(check) else "no" for check in CHECKS}
    return {
        "family": signature.cls,
        "file": signature.file,
        "checked": signature.representative,
        "size": "x".join(map(str, outcome.input_size[1:])) + (" (narrow)" if narrow else ""),
        "models": len(signature.models),
        "boundaries": " ".join(outcome.stages),
        "layout": " ".join(layout for layout, _ in itertools.groupby(outcome.layouts)),
        "stages": len(outcome.stages),
        **verdicts | dict.fromkeys(outcome.in_float64, "yes (float64)"),
        "why not": outcome.reasons(),
    }


def shorten(names: Sequence[str]) -> str:
    """Return names without what each repeats of the one before: `blocks.2 .5 .8`."""
    words, previous = [], ""
    for name in names:
        parent, dot, last = name.rpartition(".")
        words.append(f".{last}" if dot and parent == previous else name)
        previous = parent
    return " ".join(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks, or write the page; return 0 if everything passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help=f"check the smallest structures of {QUICK} source files, write nothing"
    )
    parser.add_argument("--only", metavar="PATTERN", help="check these again, such as 'resnet*'")
    parser.add_argument("--report", action="store_true", help=f"write {PAGE.relative_to(ROOT)} and .csv, check nothing")
    parser.add_argument("--jobs", type=int, default=2, help="models checked at a time, one thread each (%(default)s)")
    args = parser.parse_args(argv)
    signatures, outcomes = find_signatures(), read_results()
    if args.report:
        pairs = [(s, outcomes.get(s.representative, Outcome(s.representative))) for s in signatures]
        PAGE.write_text(report(pairs))
        rows = [to_row(s, outcome) for s, outcome in pairs]
        with ROWS.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        return 0
    if args.quick:
        smallest = {s.file: s for s in sorted(signatures, key=lambda s: -s.parameters)}
        signatures = sorted(smallest.values(), key=lambda s: s.parameters)[:QUICK]
    names = fnmatch.filter([s.representative for s in signatures], args.only or "*")
    if not (args.quick or args.only):
        names = [name for name in names if name not in outcomes or outcomes[name].versions != VERSIONS]
    done, context = [], multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "dynskip"])
    # A process for each model, with a share of the memory.
    with context.Pool(args.jobs, limit, [MEMORY * 9 // 10 // args.jobs], maxtasksperchild=1) as pool:
        for outcome in pool.imap(examine, names):
            done.append(outcome)
            verdict = outcome.reasons() or "ok"
            print(f"{len(done)}/{len(names)}: {outcome.name} {outcome.seconds:.0f} s: {verdict}", flush=True)
            outcomes[outcome.name] = outcome
            if not args.quick:
                RESULTS.write_text("".join(json.dumps(dataclasses.asdict(o)) + "\n" for o in outcomes.values()))
    by_name = {s.representative: s for s in signatures}
    print(*summarise([(by_name[outcome.name], outcome) for outcome in done]), sep="\n")
    return int(any(outcome.reasons() for outcome in done))


if __name__ == "__main__":
    sys.exit(main())
