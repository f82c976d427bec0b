"""What the benchmarks share: a model that follows a fixed schedule, timing in turns, and the report.

Random weights decide nothing sensible. So every gate is evaluated, and then its answer is overruled. Of a video's 16
frames, 11 would be used, and the others would stop at gates 4, 3, 2, 2 and 1, counted from one. The video ends after 14
frames: 10 frames are used and 4 stopped. The two unseen frames are a used one and the one for gate 4. This reading of
the thesis' rates gives its 27.1 GMACs at 168x168 with ResNet-50; all 16 frames would take 31.6.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor, nn

import dynskip
from dynskip import StagedBackbone, StopOrForward, sofnet
from dynskip.gates import GateState, Step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRAMES, ENDS_AFTER, CLASSES = 16, 14, 200
STOPPED_BY = {2: 2, 5: 1, 8: 3, 11: 2, 14: 4}  # frame: its gate, counted from one; all other frames are used


class ScheduledGate(nn.Module):
    """A gate that is evaluated and then overruled by the schedule.

    It recognises a frame as the nearest of the known ones, so that order, batch and runtime do not matter. Distances
    are always compared in float32: bfloat16 moves features by less than a tenth of the distance between two frames,
    but has too few digits to compare such distances.

    Args:
        gate: the gate to evaluate.
        known: `(F, C_n)` pooled features of the known frames.
        forwards: `(F,)` boolean, whether each of them goes forward here.
    """

    keys: Tensor
    offsets: Tensor
    verdicts: Tensor
    broadcasts = True

    def __init__(self, gate: nn.Module, known: Tensor, forwards: Tensor) -> None:
        super().__init__()
        self.gate: Any = gate
        keys = known - known.mean(0)
        self.register_buffer("keys", keys.t().contiguous())
        self.register_buffer("offsets", keys @ known.mean(0) + keys.square().sum(1) / 2)
        self.register_buffer("verdicts", torch.where(forwards[:, None], 100.0, -100.0) * known.new_tensor([-1.0, 1.0]))

    def initial_state(self, batch: int) -> GateState:
        return self.gate.initial_state(batch)  # type: ignore[no-any-return]

    def forward(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        return self.step(self.embed(pooled), state)

    def embed(self, pooled: Tensor) -> Tensor:
        nearest = (pooled.float() @ self.keys - self.offsets).argmax(-1)
        return torch.cat([self.gate.embed(pooled), self.verdicts[nearest]], 1)

    def step(self, embedded: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        return overrule(self.gate.step, embedded, state)

    @classmethod
    def step_together(cls, gates: Sequence[Any]) -> Step | None:
        step = type(gates[0].gate).step_together([each.gate for each in gates])
        return step and functools.partial(overrule, step)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScheduledGate:
        keys, offsets = self.keys, self.offsets
        super()._apply(fn, recurse)
        device = self.verdicts.device  # keys and offsets follow to the device, and stay float32
        self.keys, self.offsets = keys.to(device), offsets.to(device)
        return self


def overrule(step: Step, embedded: Tensor, state: GateState) -> tuple[Tensor, GateState]:
    logits, new = step(embedded[..., :-2], state)
    # The verdict is added to the gate's logits. If it replaced them, a compiler could leave the gate out.
    return logits + embedded[..., -2:], new


def schedule(stages: int) -> list[int]:
    """Return `stopped_at` of each frame of a video, as if none remained unseen."""
    return [STOPPED_BY.get(t, stages + 1) - 1 for t in range(FRAMES)]


@torch.no_grad()
def build(args: argparse.Namespace, size: int, optimize: bool = False) -> tuple[StopOrForward, Tensor]:
    """Return a model with random weights that follows the schedule, and a `(1, 16, 3, size, size)` video to run."""
    torch.manual_seed(0)
    backbone = dynskip.stage_model(args.backbone, num_classes=CLASSES, zero_init_last=False)
    # With this threshold every video ends after `min_frames + 1` frames.
    model = sofnet(backbone, guidance=False, threshold=1e-6, min_frames=ENDS_AFTER - 1).eval().to(args.device)
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(1, FRAMES, 3, size, size, generator=generator)
    # Random networks hardly tell noise from noise, but they tell brightness and contrast apart.
    video = video * torch.linspace(0.5, 2.0, FRAMES).view(FRAMES, 1, 1, 1)
    video = (video + 2 * torch.randn(FRAMES, 3, 1, 1, generator=generator)).to(args.device)
    pooled = model.encode(video).pooled
    stops = torch.tensor(schedule(len(pooled)), device=video.device)
    gates = [ScheduledGate(model.gates[n], known[0], stops > n) for n, known in enumerate(pooled)]
    model = StopOrForward(model.backbone, gates, terminator=model.terminator).eval()
    check(model, video)
    return optimised(model, video) if optimize else (model, video)


def orders(count: int) -> Tensor:
    """Return the frames of `count` videos of 16, each of which begins one frame later; the unseen ones stay last."""
    seen = (torch.arange(count)[:, None] + torch.arange(ENDS_AFTER)) % ENDS_AFTER
    return torch.cat([seen, torch.arange(ENDS_AFTER, FRAMES).expand(count, -1)], 1)


def check(model: StopOrForward, videos: Tensor) -> float:
    """Refuse to time a model that does not follow the schedule on videos in `orders`; return the GMACs of a video."""
    output = model(videos)
    wanted = torch.tensor(schedule(model.backbone.num_stages))[orders(len(videos))]
    wanted[:, ENDS_AFTER:] = dynskip.UNSEEN
    wrong = int((output.stopped_at.cpu() != wanted).sum())
    if wrong:
        raise RuntimeError(f"{wrong} of {wanted.numel()} frames left the schedule.")
    return float(output.macs.mean()) / 1e9


def rows_executed(stages: int) -> list[int]:
    """Return how many frames of a video run each stage, and the head."""
    stops = schedule(stages)[:ENDS_AFTER]
    return [sum(stop >= n for stop in stops) for n in range(stages + 1)]


def dense_gmacs(model: StopOrForward, size: int) -> float:
    """Return the GMACs of all frames of a video in the dense network."""
    return FRAMES * model.lookup_for((size, size)).dense / 1e9


def stage_gmacs(model: StopOrForward, size: int) -> float:
    """Return the GMACs of a video in stages and the head alone."""
    lookup, rows = model.lookup_for((size, size)), rows_executed(model.backbone.num_stages)
    return float(lookup.per_stage @ lookup.per_stage.new_tensor(rows[:-1]) + rows[-1] * lookup.head) / 1e9


def optimised(model: StopOrForward, video: Tensor) -> tuple[StopOrForward, Tensor]:
    """Return a model with faster stages, and the video in its dtype: in bf16 with CUDA graphs on a GPU."""
    on_gpu = video.device.type == "cuda"
    options: dict[str, Any] = {"dtype": torch.bfloat16, "buckets": (1, 2, 4, 8, 16)} if on_gpu else {}
    progress("compiling")
    fast, agreement = model.optimize(video, **options)
    progress(str(agreement))
    video = video.to(next(fast.parameters()).dtype)
    check(fast, video)
    return fast, video


def online(model: StopOrForward, video: Tensor) -> list[int]:
    """Run a video frame by frame until it ends; return `stopped_at` of each frame."""
    session, steps = model.stream(), []
    for frame in video[0]:
        steps.append(session(frame))
        if steps[-1].ended.item():
            break
    return [int(step.stopped_at) for step in steps]


@torch.no_grad()
def stage_runs(backbone: StagedBackbone, frames: Tensor, rows: Sequence[int]) -> list[Callable[[], Any]]:
    """Return a run of every stage, and of the head, each alone on so many rows."""
    runs: list[Callable[[], Any]] = []
    carry = backbone.start(frames[torch.arange(rows[0], device=frames.device) % len(frames)])
    for n, count in enumerate(rows):
        carry = carry if carry.batch == count else carry.select(torch.arange(count, device=frames.device))
        if n == backbone.num_stages:
            runs.append(functools.partial(torch.no_grad()(backbone.head), carry))
        else:
            runs.append(functools.partial(torch.no_grad()(backbone.run), n, carry))
            carry = backbone.run(n, carry)
    return runs


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Time functions in turns, once a round; return milliseconds. The first round is not measured."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for k in range(rounds + 1):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            started = now(device)
            functions[name]()
            times[name].append(1e3 * (now(device) - started))
        progress(f"round {k} of {rounds}", end="")
    progress("")
    return {name: values[1:] for name, values in times.items()}


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def progress(text: str, end: str = "\n") -> None:
    print(f"\r{text}", end=end, file=sys.stderr, flush=True)


def paired(ones: Iterable[float], others: Iterable[float], clusters: Iterable[str]) -> tuple[float, float]:
    """Return the mean of differences, and its standard error where those of one cluster depend on each other."""
    sums: dict[str, list[float]] = {}
    for one, other, cluster in zip(ones, others, clusters, strict=True):
        sums.setdefault(cluster, []).append(one - other)
    count = sum(map(len, sums.values()))
    mean = sum(map(sum, sums.values())) / count
    return mean, math.sqrt(sum(sum(x - mean for x in own) ** 2 for own in sums.values())) / count


class Report:
    """Collects what was measured, prints it, and writes it with the command, the machine and all versions.

    Args:
        doc: the script's docstring, whose first line is its question.
        args: its arguments.
    """

    def __init__(self, doc: str, args: argparse.Namespace) -> None:
        self.args = args
        self.content: dict[str, Any] = {
            "question": doc.splitlines()[0],
            "command": shlex.join(["python", *sys.argv]),
            "machine": machine(args.device),
            "results": {},
            "ratios": {},
        }
        print(self.content["question"])
        print(", ".join(f"{key} {value}" for key, value in self.content["machine"].items()))

    def add(self, name: str, milliseconds: Sequence[float], gmacs: float, **more: Any) -> None:
        """Note the times of one thing, and the GMACs that it executed."""
        median = statistics.median(milliseconds)
        low, high = min(milliseconds), max(milliseconds)
        self.content["results"][name] = {"median_ms": median, "min_ms": low, "max_ms": high, "gmacs": gmacs, **more}
        extra = "".join(f", {key} {value:.4g}" for key, value in more.items())
        print(f"{name:<44}{median:10.1f} ms ({low:.1f} to {high:.1f}){gmacs:9.2f} GMACs{extra}")

    def compare(self, name: str, other: str, wanted: float | None = None) -> None:
        """Compare the medians of two things; `wanted` is what their ratio should not exceed."""
        results = self.content["results"]
        ratio = results[name]["median_ms"] / results[other]["median_ms"]
        self.ratio(f"{name} / {other}", ratio, None if wanted is None else f"<= {wanted}")

    def fastest(self, *names: str) -> str:
        """Return the one of these things that takes least: what a reader would run otherwise."""
        return min(names, key=lambda name: self.content["results"][name]["median_ms"])

    def ratio(self, name: str, value: float, wanted: str | None = None) -> None:
        """Note a figure that is printed last, with what it should be."""
        self.content["ratios"][name] = {"value": value, "wanted": wanted}

    def finish(self) -> None:
        """Print the ratios and write the file."""
        for name, ratio in self.content["ratios"].items():
            print(f"{name}: {ratio['value']:.3f}" + (f" (wanted {ratio['wanted']})" if ratio["wanted"] else ""))
        if self.args.json:
            self.args.json.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")


def machine(device: str) -> dict[str, Any]:
    facts = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "timm": timm.__version__}
    return {**facts, **versions, "dynskip": dynskip.__version__}


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def parser(doc: str, optimize: bool = False) -> argparse.ArgumentParser:
    """Return a parser of the arguments that all scripts take; the hidden ones are for trying a script out."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--quick", action="store_true", help="few rounds")
    result.add_argument("--json", type=Path, help="file to write the results to")
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    if optimize:
        result.add_argument("--optimize", action="store_true", help="with faster stages, see StopOrForward.optimize")
    result.add_argument("--backbone", default="resnet50", help=argparse.SUPPRESS)
    result.add_argument("--size", type=int, default=168, help=argparse.SUPPRESS)
    return result


def save_pair(draw: Callable[[bool], Figure], file: Path) -> None:
    """Save a picture for light pages, and beside it one for dark pages, whose name ends in `-dark`.

    Args:
        draw: draws the picture, dark or not.
        file: where the light one goes. Charts are small as SVG, frames of videos as PNG, which gets 64 colours.
    """
    from matplotlib import rc_context
    from PIL import Image

    for dark in (False, True):
        path, figure = file.with_stem(file.stem + "-dark" * dark), draw(dark)
        if file.suffix == ".svg":
            with rc_context({"svg.hashsalt": file.stem}):  # the same data give the same file
                figure.savefig(path, transparent=True, metadata={"Date": None})
        else:
            figure.savefig(path, dpi=105)
            # These settings keep colours apart that cover little, such as those of frames and bars.
            palette = Image.open(path).convert("RGB").quantize(64, method=Image.Quantize.MAXCOVERAGE, kmeans=2)
            palette.save(path, optimize=True)
