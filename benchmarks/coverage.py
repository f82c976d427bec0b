"""Prove, model by model, which of timm's networks dynskip can cut into stages.

timm's names are variations of far fewer structures. Two models share a structural signature when their class, the
source file that registers them, the names of their top-level children and the boundaries that they declare
(`feature_info`) are the same. The smallest model of every signature stands for all of them and is checked through
`dynskip.stage_model` with default boundaries. Transformers too large for that are built with fewer channels a head.

    exact      stages and head compose to the untouched model's logits
    subset     rows run alone equal the rows of the full run: one sample is dropped at every boundary
    gradients  a training step through the stages gives every parameter the untouched model's gradient
    compile    torch.compile(fullgraph=True) takes every stage, one graph for all batch sizes above 1
    keys       the staged model's checkpoint has timm's own names under the prefix `model.`
    wrapped    with gates, it takes a training step, skips as it would mask, and is the same again after a save

    python benchmarks/coverage.py --quick            # about 30 small structures; nothing is written
    python benchmarks/coverage.py --report           # all that is not in the results yet, then docs/backbones.md
    python benchmarks/coverage.py --redo 'twins_*'   # only these, again
"""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynskip
from dynskip import InnerClassifier, PolicyGate, SoFLoss, StagedBackbone, StopOrForward, stage_model

ROOT = Path(__file__).resolve().parent.parent
SIGNATURES = ROOT / "benchmarks" / "results" / "signatures.json"
RESULTS = ROOT / "benchmarks" / "results" / "coverage.jsonl"
TABLE = ROOT / "docs" / "backbones.md"

CHECKS = ("exact", "subset", "gradients", "compile", "keys", "wrapped")
TOLERANCE = 1e-4  # of the largest absolute value compared
SPREAD = 1e-2  # by which values have to differ between images, or comparing rows would prove nothing
SIZES = (128, 160, 192, 224)  # tried before a model's native size
BATCH = 5
COMPILED_BATCHES = (5, 4, 2, 3)
LARGE = 50_000_000  # parameters above which a transformer is built narrower
NARROW = 16  # channels a head
PATCHES = 8  # a side of their images
QUICK = 32
CHOICES = f"which of {', '.join(CHECKS)} (all)"

INTRODUCTION = """\
# Backbones

timm's {models} models have {structures} different structures. For each structure, its smallest model was cut by
`dynskip.stage_model` with default boundaries and checked against the untouched model, with random weights, on {batch}
images; values are equal if they differ by less than {tolerance:g} of the largest. Large transformers ("narrow") were
built with {narrow} channels a head, most of them for small images, so that the proof fits a small machine. Where a deep
random network amplifies float32's rounding beyond the tolerance, the check was repeated in float64, and says so.

- *exact*: the stages and the head compose to the model's own logits.
- *subset*: with one sample dropped at every boundary, every pooled feature and the logits equal the rows of the full
  run.
- *gradients*: one training step gives every parameter the gradient, and every statistic the value, that it gets
  without stages.
- *compile*: `torch.compile(fullgraph=True)` takes every stage, with one graph for all batch sizes above 1.
- *keys*: the checkpoint has timm's own names, under the prefix `model.`.
- *wrapped*: with gates around it, the model takes a training step, makes the decisions and gives the logits when it
  skips that it gives when it masks, and gives them bit for bit after a save and a load.
"""


@dataclass(frozen=True)
class Signature:
    """One structure, and the timm models that have it."""

    cls: str
    file: str
    representative: str
    models: tuple[str, ...]
    parameters: int


@dataclass
class Outcome:
    """What the checks of one representative found."""

    name: str
    checks: dict[str, str] = field(default_factory=dict)  # "ok", or why not
    worst: dict[str, float] = field(default_factory=dict)  # relative differences
    input_size: tuple[int, ...] = ()
    parameters: int = 0  # of the model as it was checked
    stages: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    graphs: tuple[int, ...] = ()  # that every stage compiled to
    in_float64: tuple[str, ...] = ()  # checks that float32's rounding did not pass
    seconds: float = 0.0
    versions: str = ""
    machine: str = ""

    def passed(self, check: str) -> bool:
        """Whether a check was run and found nothing."""
        return self.checks.get(check) == "ok"

    def reasons(self) -> str:
        """Say what did not pass, and why."""
        found: defaultdict[str, list[str]] = defaultdict(list)
        for check, reason in self.checks.items():
            if reason != "ok":
                found[reason].append(check)
        return "; ".join(f"{', '.join(checks)}: {reason}" for reason, checks in found.items())


class CheckError(Exception):
    """What a check found."""


# Structures


def describe(name: str) -> tuple[tuple[Any, ...], int, str]:
    """Return a model's signature, its number of parameters and its name, without allocating it."""
    with torch.device("meta"):
        model = timm.create_model(name)
    info = getattr(model, "feature_info", None) or []
    boundaries = tuple(str(entry.get("module")) for entry in getattr(info, "info", info))
    children = tuple(child for child, _ in model.named_children())
    file = timm.models.model_entrypoint(name).__module__.rsplit(".", 1)[-1]
    signature = (type(model).__name__, file, children, boundaries)
    return signature, sum(p.numel() for p in model.parameters()), name


def find_signatures(jobs: int) -> list[Signature]:
    """Group all of timm's models by signature, or read the groups found earlier for this version of timm."""
    if SIGNATURES.exists():
        stored = json.loads(SIGNATURES.read_text())
        if stored["timm"] == timm.__version__:
            return [Signature(**{**entry, "models": tuple(entry["models"])}) for entry in stored["signatures"]]
    names = timm.list_models()
    print(f"Building {len(names)} models without weights to find their signatures; this takes minutes, once.")
    groups: defaultdict[tuple[Any, ...], list[tuple[bool, int, str]]] = defaultdict(list)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for signature, parameters, name in pool.map(describe, names, chunksize=32):
            # timm's toys for its own tests stand for others only where there are no others.
            groups[signature].append((name.startswith("test_"), parameters, name))
    found = []
    for (cls, file, *_), members in groups.items():
        _, parameters, representative = min(members)
        found.append(Signature(cls, file, representative, tuple(sorted(name for *_, name in members)), parameters))
    found.sort(key=lambda s: (s.file, s.cls, s.parameters, s.representative))
    entries = ",\n".join(json.dumps(dataclasses.asdict(s)) for s in found)
    write(SIGNATURES, f'{{"timm": "{timm.__version__}", "signatures": [\n{entries}\n]}}\n')
    return found


def quick_choice(signatures: Sequence[Signature]) -> list[Signature]:
    """Choose the smallest structure of every source file, and of those the smallest `QUICK`."""
    smallest: dict[str, Signature] = {}
    for signature in sorted(signatures, key=lambda s: (s.parameters, s.representative)):
        smallest.setdefault(signature.file, signature)
    return list(smallest.values())[:QUICK]


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

    Branches that start at zero are woken by noise, and BatchNorm gets statistics of real activations: deep random
    networks forget their input otherwise.
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
    # White noise as well, on which stage_model verifies its cut.
    model.train()(torch.cat([pictures(BATCH, size, seed=1), torch.randn(BATCH, *size)]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval(), size


def create(name: str) -> nn.Module:
    """Create a timm model; a large transformer with few channels a head and for small images.

    That leaves its structure as it is.
    """
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


# Checks


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
def check_exact(backbone: StagedBackbone, images: Tensor, logits: Tensor) -> float:
    """Compare the whole staged run with the untouched model."""
    require_spread(logits, "logits")
    return difference(backbone(images), logits)


@torch.no_grad()
def check_subset(backbone: StagedBackbone, images: Tensor) -> float:
    """Drop one sample at every boundary and compare what is left with the rows of the full run."""
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


def check_gradients(backbone: StagedBackbone, images: Tensor, logits: Tensor) -> float:
    """Compare the gradients and the moved statistics of one training step with the untouched model's."""
    weights = torch.randn(logits[: len(images)].shape, generator=torch.Generator().manual_seed(2))
    plain, buffers = training_step(backbone.model, backbone.model, images, weights)
    staged, staged_buffers = training_step(backbone, backbone.model, images, weights)
    one_sided = sorted(set(plain) ^ set(staged))
    if one_sided:
        raise CheckError(f"only one of the two gives {one_sided[0]} a gradient")
    # Some gradients are zero but for rounding (a bias before BatchNorm): measured against the largest of all.
    floor = 1e-3 * max(float(expected.abs().max()) for expected in plain.values())
    worst = max(difference(staged[name], expected, floor) for name, expected in plain.items())
    unequal = [name for name in buffers if not torch.equal(staged_buffers[name], buffers[name])]
    moved = [difference(staged_buffers[name].float(), buffers[name].float(), 1e-6) for name in unequal]
    return max(worst, *moved, 0.0)


def training_step(
    forward: Callable[[Tensor], Tensor], model: nn.Module, images: Tensor, weights: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients and the buffers after one step; leave the model as it was."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    torch.manual_seed(3)
    (forward(images) * weights).sum().backward()
    model.eval()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    after = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad(set_to_none=True)
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    return gradients, after


@torch.no_grad()
def check_compile(backbone: StagedBackbone, images: Tensor, outcome: Outcome) -> float:
    """Compile every stage alone and run it on several batch sizes; count the graphs."""
    worst, graphs = 0.0, []
    carries = {batch: backbone.start(images[:batch]) for batch in COMPILED_BATCHES}
    for n in range(backbone.num_stages):
        torch.compiler.reset()
        seen: list[Any] = []
        stage = torch.compile(functools.partial(backbone.run, n), fullgraph=True, backend=functools.partial(keep, seen))
        for batch, carry in carries.items():
            expected = backbone.run(n, carry)
            mark_dynamic(carry.values, carry.kinds)
            actual = stage(carry)
            worst = max(worst, difference(backbone.pool(n, actual), backbone.pool(n, expected)))
            carries[batch] = expected
        graphs.append(len(seen))
    outcome.graphs = tuple(graphs)
    again = [f"{name} {count}" for name, count in zip(backbone.stage_names, graphs, strict=True) if count > 1]
    if again:
        raise CheckError(f"graphs for batches above 1: {', '.join(again)}")
    return worst


def keep(seen: list[Any], graph: Any, inputs: Any) -> Callable[..., Any]:
    """Count graphs, as a backend of torch.compile that runs them as they are."""
    seen.append(graph)
    return graph.forward  # type: ignore[no-any-return]


def mark_dynamic(values: Any, kinds: Any) -> None:
    """Tell torch.compile which tensors of a carry have a batch that varies."""
    for value, kind in zip(values, kinds, strict=True):
        if isinstance(value, Tensor) and kind != "static":
            torch._dynamo.maybe_mark_dynamic(value, 0)
        elif isinstance(value, tuple | list):
            mark_dynamic(value, kind)


def check_keys(backbone: StagedBackbone, keys: Sequence[str]) -> float:
    """Compare the names in the checkpoint with timm's own."""
    expected = {f"model.{key}" for key in keys}
    wrong = sorted(expected ^ set(backbone.state_dict()))
    if wrong:
        raise CheckError(f"{len(wrong)} names differ, such as {wrong[0]}")
    return 0.0


def check_wrapped(backbone: StagedBackbone, images: Tensor) -> float:
    """Train one step, compare skipping with masking, save and load. Leaves other weights behind."""
    video = images[:4].unflatten(0, (2, 2))
    gates = [PolicyGate(channels, hidden=8).to(images.dtype) for channels in backbone.num_features]
    inner = [InnerClassifier(8, backbone.num_classes).to(images.dtype) for _ in gates]
    model = StopOrForward(backbone, gates, inner)
    lookup = model.lookup_for((images.shape[2], images.shape[3]))
    SoFLoss(lookup)(model.train()(video), torch.tensor([0, 1])).total.backward()
    torch.optim.SGD(model.parameters(), lr=1e-6).step()
    model.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        encoded = model.encode(video)
        for gate, pooled in zip(gates, encoded.pooled, strict=True):
            # Every gate stops one frame in four of those that it sees first.
            logits, _ = gate(pooled.flatten(0, 1), gate.initial_state(4))
            gate.decide.bias[1] -= (logits[:, 1] - logits[:, 0]).sort().values[:2].mean()
        masked, skipped = model.decide(encoded), model(video)
        if not torch.equal(masked.stopped_at, skipped.stopped_at):
            raise CheckError(
                f"skipping stops frames at {skipped.stopped_at.tolist()}, masking {masked.stopped_at.tolist()}"
            )
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        for parameter in model.parameters():
            parameter.zero_()
        file.seek(0)
        model.load_state_dict(torch.load(file, weights_only=True))
        if not torch.equal(model(video).logits, skipped.logits):
            raise CheckError("other logits after a save and a load")
    return difference(skipped.logits, masked.logits)


def examine(name: str, checks: Sequence[str]) -> Outcome:
    """Check one model in float32, and again in float64 where that fails."""
    began = time.perf_counter()
    outcome = attempt(name, checks, torch.float32)
    failed = [check for check in checks if not outcome.passed(check)]
    if set(failed) - {"compile"}:
        # Deep random networks amplify rounding; a wrong cut stays wrong in float64.
        again = attempt(name, failed, torch.float64)
        outcome.in_float64 = tuple(check for check in failed if again.passed(check))
        outcome.checks.update(dict.fromkeys(outcome.in_float64, "ok"))
        outcome.worst.update({check: again.worst[check] for check in outcome.in_float64})
        if not outcome.stages:
            outcome.stages, outcome.layouts, outcome.graphs = again.stages, again.layouts, again.graphs
    outcome.seconds = round(time.perf_counter() - began, 1)
    return outcome


def attempt(name: str, checks: Sequence[str], dtype: torch.dtype) -> Outcome:
    """Build one model, stage it and run the checks."""
    outcome = Outcome(name, versions=versions(), machine=machine())
    try:
        model, size = build(name)
        model.to(dtype)
        outcome.input_size, outcome.parameters = size, sum(p.numel() for p in model.parameters())
        images, keys = pictures(BATCH, size, seed=4).to(dtype), list(model.state_dict())
        with torch.no_grad():
            logits = model(images)
        backbone = stage_model(model, input_size=size)
    except Exception as error:
        outcome.checks = dict.fromkeys(checks, explain(error))
    else:
        outcome.stages, outcome.layouts = backbone.stage_names, backbone.layouts
        calls: dict[str, Callable[[], float]] = {
            "exact": lambda: check_exact(backbone, images, logits),
            "subset": lambda: check_subset(backbone, images),
            "gradients": lambda: check_gradients(backbone, images[:3], logits),
            "compile": lambda: check_compile(backbone, images, outcome),
            "keys": lambda: check_keys(backbone, keys),
            "wrapped": lambda: check_wrapped(backbone, images),
        }
        for check in checks:
            outcome.checks[check] = "ok"
            try:
                worst = calls[check]()
                outcome.worst[check] = float(f"{worst:.1e}")
                if worst >= TOLERANCE:
                    outcome.checks[check] = f"relative difference {worst:.1e}"
            except Exception as error:
                outcome.checks[check] = explain(error)
            gc.collect()
    return outcome


def explain(error: Exception) -> str:
    """Return one line that says what went wrong."""
    text = " ".join(str(error).split())
    text = text if isinstance(error, CheckError | dynskip.DynskipError) else f"{type(error).__name__}: {text}"
    return text if len(text) <= 400 else f"{text[:397]}..."


def versions() -> str:
    """Name what the results depend on."""
    return f"dynskip {dynskip.__version__}, timm {timm.__version__}, torch {torch.__version__}"


def machine() -> str:
    """Name what the results were measured on."""
    return f"Python {platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores, {memory() >> 30} GiB"


def memory() -> int:
    """Return the machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# Running


def worker(pipe: Connection, name: str, checks: Sequence[str], limit: int) -> None:
    """Examine one model with one thread; beyond the limit on memory allocations fail, and the machine lives on."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    pipe.send(examine(name, checks))


@dataclass
class Running:
    """A worker and what it is busy with."""

    name: str
    process: Any
    pipe: Connection
    deadline: float


def sweep(names: Sequence[str], checks: Sequence[str], jobs: int, time_limit: float) -> Iterator[Outcome]:
    """Examine models, `jobs` at a time, each in a process of its own; yield outcomes as they come."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "dynskip"])
    limit = memory() * 9 // 10 // jobs
    waiting, running = list(reversed(names)), list[Running]()
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop()
            pipe, theirs = context.Pipe(duplex=False)
            process = context.Process(target=worker, args=(theirs, name, checks, limit))
            process.start()
            theirs.close()
            running.append(Running(name, process, pipe, time.monotonic() + time_limit))
        timeout = max(0.0, min(job.deadline for job in running) - time.monotonic())
        ready = wait([job.pipe for job in running], timeout)
        for job in list(running):
            if job.pipe not in ready and time.monotonic() < job.deadline:
                continue
            running.remove(job)
            yield collect(job, checks, time_limit)


def collect(job: Running, checks: Sequence[str], time_limit: float) -> Outcome:
    """Take a worker's outcome, or say how it ended without one."""
    try:
        if not job.pipe.poll():
            job.process.kill()
            reason = f"took longer than {time_limit:.0f} s"
        else:
            outcome: Outcome = job.pipe.recv()
            return outcome
    except EOFError:
        job.process.join()
        reason = f"the process died with code {job.process.exitcode} (-9: killed, most likely for memory)"
    finally:
        job.process.join()
        job.pipe.close()
    return Outcome(job.name, dict.fromkeys(checks, reason), versions=versions(), machine=machine())


def read_results(path: Path) -> dict[str, Outcome]:
    """Read the stored outcomes; the last one of a model counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    outcomes = [Outcome(**json.loads(line, object_hook=as_tuples)) for line in lines]
    return {outcome.name: outcome for outcome in outcomes}


def as_tuples(entry: dict[str, Any]) -> dict[str, Any]:
    """Turn JSON's lists into tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


def to_line(outcome: Outcome) -> str:
    """Return an outcome as a line of JSON."""
    return json.dumps(dataclasses.asdict(outcome)) + "\n"


def write(path: Path, text: str) -> None:
    """Replace a file at once, so that an interruption leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(text)
    temporary.replace(path)


# Report


def summarise(pairs: Sequence[tuple[Signature, Outcome]]) -> list[tuple[str, int, int]]:
    """Return for every check how many structures pass it, and how many models they stand for."""
    passed = {check: [signature for signature, outcome in pairs if outcome.passed(check)] for check in CHECKS}
    passed["all of them"] = [s for s, outcome in pairs if all(outcome.passed(check) for check in CHECKS)]
    return [(check, len(found), sum(len(s.models) for s in found)) for check, found in passed.items()]


def report(signatures: Sequence[Signature], outcomes: dict[str, Outcome]) -> str:
    """Return the page that shows the results."""
    pairs = [(s, outcomes.get(s.representative, Outcome(s.representative))) for s in signatures]
    models = sum(len(s.models) for s in signatures)
    seconds = sum(outcome.seconds for outcome in outcomes.values())
    environments = sorted({f"{o.versions}, {o.machine}" for o in outcomes.values()})
    lines = [
        INTRODUCTION.format(
            structures=len(signatures),
            models=models,
            tolerance=TOLERANCE,
            batch=BATCH,
            narrow=NARROW,
        ),
        "| check | structures | timm models that they stand for |",
        "| --- | --- | --- |",
        *(f"| {check} | {k} of {len(pairs)} | {n} of {models} |" for check, k, n in summarise(pairs)),
        "",
        f"Made by `python benchmarks/coverage.py --report`, {seconds / 60:.0f} minutes of checks with one thread, on",
        f"{'; and '.join(environments)}.",
        "",
        "| family | checked | size | models | boundaries | layout | stages | " + " | ".join(CHECKS) + " | why not |",
        "| --- " * (len(CHECKS) + 8) + "|",
        *itertools.starmap(to_row, pairs),
    ]
    return "\n".join(lines) + "\n"


def to_row(signature: Signature, outcome: Outcome) -> str:
    """Return a structure's row of the table."""
    narrow = 0 < outcome.parameters < signature.parameters
    cells = [
        f"{signature.cls} ({signature.file})",
        f"`{signature.representative}`",
        "x".join(map(str, outcome.input_size[1:])) + (" (narrow)" if narrow else ""),
        str(len(signature.models)),
        f"`{shorten(outcome.stages)}`" if outcome.stages else "",
        ", ".join(layout for layout, _ in itertools.groupby(outcome.layouts)),
        str(len(outcome.stages) or ""),
        *(verdict(outcome, check) for check in CHECKS),
        outcome.reasons().replace("|", "/"),
    ]
    return f"| {' | '.join(cells)} |"


def verdict(outcome: Outcome, check: str) -> str:
    """Return a check's cell of the table."""
    if check not in outcome.checks:
        return ""
    return "no" if not outcome.passed(check) else "yes (float64)" if check in outcome.in_float64 else "yes"


def shorten(names: Sequence[str]) -> str:
    """Return names without what each repeats of the one before: `blocks.2 .5 .8`."""
    words, previous = [], ""
    for name in names:
        parent, dot, last = name.rpartition(".")
        words.append(f".{last}" if dot and parent == previous else name)
        previous = parent
    return " ".join(words)


# Command line


def run(chosen: Sequence[Signature], args: argparse.Namespace, done: dict[str, Outcome]) -> None:
    """Check what is not among the outcomes yet and add it, with a line of progress a model."""
    todo = [s.representative for s in chosen if needs_run(done.get(s.representative), args)]
    began = time.monotonic()
    for count, outcome in enumerate(sweep(todo, args.checks, args.jobs, args.time_limit), start=1):
        done[outcome.name] = outcome
        if not args.quick:
            args.results.parent.mkdir(parents=True, exist_ok=True)
            with args.results.open("a") as file:
                file.write(to_line(outcome))
        left = (time.monotonic() - began) / count * (len(todo) - count)
        progress = f"{count}/{len(todo)}, {left / 60:.0f} min left"
        print(f"{progress}: {outcome.name} {outcome.seconds:.0f} s: {outcome.reasons() or 'ok'}", flush=True)


def needs_run(outcome: Outcome | None, args: argparse.Namespace) -> bool:
    """Whether a model was not checked yet with these versions, or is to be checked again."""
    if outcome is None or outcome.versions != versions() or not set(args.checks) <= set(outcome.checks):
        return True
    return any(fnmatch.fnmatch(outcome.name, pattern) for pattern in args.redo)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"check {QUICK} small structures anew; writes nothing")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="check only representatives like 'resnet*'")
    parser.add_argument("--redo", metavar="PATTERN", nargs="+", default=[], help="check these again")
    parser.add_argument("--checks", metavar="CHECK", nargs="+", choices=CHECKS, default=list(CHECKS), help=CHOICES)
    parser.add_argument("--jobs", type=int, default=2, help="models checked at a time, one thread each (%(default)s)")
    parser.add_argument("--time-limit", type=float, default=600.0, help="seconds for one model (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="outcomes, one JSON line a model (%(default)s)")
    parser.add_argument("--report", action="store_true", help=f"write {TABLE.relative_to(ROOT)} when done")
    args = parser.parse_args(argv)
    if args.jobs < 1 or args.time_limit <= 0:
        parser.error("--jobs and --time-limit have to be positive.")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep; return 0 if everything passed."""
    args = parse(argv)
    signatures = find_signatures(args.jobs)
    chosen = quick_choice(signatures) if args.quick else signatures
    chosen = [s for s in chosen if any(fnmatch.fnmatch(s.representative, p) for p in (args.redo or [args.only]))]
    if not chosen:
        print(f"No representative is like {args.redo or args.only}; {SIGNATURES} lists them all.", file=sys.stderr)
        return 2
    outcomes = {} if args.quick else read_results(args.results)
    run(chosen, args, outcomes)
    pairs = [(s, outcomes[s.representative]) for s in chosen]
    for check, structures, models in summarise(pairs):
        if check in args.checks:
            print(f"{check}: {structures} of {len(pairs)} structures, which stand for {models} models")
    if not args.quick:
        known = [outcomes[s.representative] for s in signatures if s.representative in outcomes]
        write(args.results, "".join(map(to_line, known)))
        if args.report:
            write(TABLE, report(signatures, {outcome.name: outcome for outcome in known}))
    return int(not all(outcome.passed(check) for _, outcome in pairs for check in args.checks))


if __name__ == "__main__":
    sys.exit(main())
