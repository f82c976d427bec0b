"""What do clips, sessions and streams take on a GPU, against the dense network and the bare stages?

    python benchmarks/gpu.py --json gpu.json

One command for one GPU and six minutes. It checks first that the GPU decides as the CPU does. Then it times 1, 8 and 64
videos of 16 frames that follow the schedule: in bf16, in float32, and optimised in bf16 with CUDA graphs.

- dense: timm's model on the same frames, as one batch; compiled where the stages are
- bare: the stages and the head alone, on as many rows as the schedule executes, in full batches
- clip: `model(video)`
- online: a session of all the videos, a frame of each at a time
- streams: as many streams that never end, against bare stages in batches of the same size
- decisions: the gates alone, on features that are there, eager and captured as a CUDA graph

`--device cpu --quick` tries the script out.
"""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import common
import many_streams
import per_video
import torch
from torch import Tensor

from dynskip import UNSEEN, EarlyTerminator, FrameResult, PolicyGate, StagedBackbone, StopOrForward
from dynskip.engine import Engine
from dynskip.scan import scan

VIDEOS = {"cuda": (1, 8, 64), "cpu": (1, 2)}
STREAMS = {"cuda": (1, 16, 64), "cpu": (1, 2)}
BUCKETS = (1, 2, 4, 8, 16, 64)
COMPILING, TIMING = 90.0, 40.0  # seconds to reserve for compiling something, and for timing a model
MAX_ROUNDS = 7
RATIOS = (
    ("clip", "dense"),
    ("clip", "bare"),
    ("online", "dense"),
    ("streams", "bare in batches of"),
    ("decisions as a CUDA graph", "decisions"),
)


class Budget:
    """The time that is left.

    Attributes:
        left_out: what was not measured, and why.
    """

    def __init__(self, seconds: float) -> None:
        self._ends = time.perf_counter() + seconds
        self.left_out: dict[str, str] = {}

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self._ends - time.perf_counter())

    def attempt(self, name: str, seconds: float, function: Callable[[], Any]) -> Any:
        """Call a function that may take so long; return `None` if there is no time for it, or if it raises."""
        if self.left < seconds:
            why = f"it may take {seconds:.0f} s, and {self.left:.0f} s are left"
        else:
            try:
                return function()
            except Exception as error:  # the rest can still be measured
                why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        self.left_out[name] = why
        print(f"left out: {name}: {why}", flush=True)
        return None


@dataclass
class Job:
    """Something to time.

    Attributes:
        run: what is timed.
        gmacs: what it executes.
        videos: how many videos it processes.
    """

    run: Callable[[], Any]
    gmacs: float
    videos: int


# Decisions


@torch.no_grad()
def remembering(backbone: StagedBackbone, videos: int, size: int) -> tuple[StopOrForward, Tensor]:
    """Return a model whose decisions depend on its gates' memory, and videos to run; all in float64.

    In float64, no decision is so close that rounding could change it.
    """
    torch.manual_seed(5)
    contrast = 3 * torch.rand(videos, common.FRAMES, 1, 1, 1)
    colour = 2 * torch.randn(videos, common.FRAMES, 3, 1, 1)
    video = (contrast * torch.randn(videos, common.FRAMES, 3, size, size) + colour).double()
    gates = [PolicyGate(channels, 64) for channels in backbone.num_features]
    terminator = EarlyTerminator(0.999, 3 * common.FRAMES // 4)
    model = StopOrForward(copy.deepcopy(backbone), gates, terminator=terminator).double().eval()
    for gate, pooled in zip(gates, model.encode(video).pooled, strict=True):
        gate.project.weight.mul_(5 / pooled.std())
        gate.cell.weight_hh.mul_(3)
        gate.decide.weight.mul_(10)
        state = gate.initial_state(videos)
        margins = [gate(frames, state)[0].diff(dim=1) for frames in pooled.unbind(1)]
        for frames in pooled.unbind(1):
            logits, state = gate(frames, state)
            margins.append(logits.diff(dim=1))
        # Seven frames in eight go forward, with an empty memory or one that has seen all frames before.
        gate.decide.bias[1] -= torch.cat(margins).quantile(1 / 8)
    return model, video


def check(name: str, cpu: StopOrForward, video: Tensor, device: str) -> None:
    """Refuse to time anything if the device decides differently from a clip on the CPU."""
    wanted = cpu(video).stopped_at
    model, there = copy.deepcopy(cpu).to(device), video.to(device)
    for way, run in {"a clip": clip, "a session": session, "streams": streams}.items():
        got = run(model, there).cpu()
        wrong = (got != wanted).nonzero().tolist()
        if wrong:
            b, t = wrong[0]
            raise RuntimeError(
                f"{name}: {way} on {device} and a clip on the CPU decide differently on {len(wrong)} of "
                f"{wanted.numel()} frames. Frame {t} of video {b} stopped at {int(got[b, t])} instead of "
                f"{int(wanted[b, t])} ({cpu.backbone.num_stages}: used, {UNSEEN}: unseen). Nothing is timed."
            )
    shares = ", ".join(f"{int((wanted == n).sum())} at {n}" for n in wanted.unique().tolist())
    print(f"{name}: clip, session and streams decide on {device} as on the CPU ({shares})", flush=True)


def clip(model: StopOrForward, video: Tensor) -> Tensor:
    return model(video).stopped_at  # type: ignore[no-any-return]


def session(model: StopOrForward, video: Tensor) -> Tensor:
    opened = model.stream(len(video))
    return torch.stack([opened(frames).stopped_at for frames in video.unbind(1)], 1)


def streams(model: StopOrForward, video: Tensor) -> Tensor:
    stopped_at = torch.full(video.shape[:2], UNSEEN)
    for event in model.serve_streams(map(list, video)):
        if isinstance(event, FrameResult):
            stopped_at[event.key, event.frame] = event.stopped_at  # type: ignore[index]
    return stopped_at


# What is timed


def dense_jobs(model: StopOrForward, video: Tensor, compiled: bool, budget: Budget) -> dict[str, Job]:
    """Return runs of the dense network."""
    gmacs, jobs = common.dense_gmacs(model, video.shape[-1]), {}
    for count in VIDEOS[video.device.type]:
        network, frames = model.backbone.model, video[0, common.orders(count)].flatten(0, 1)
        if compiled:
            compiling = functools.partial(per_video.optimised_dense, model, frames)
            found = budget.attempt(f"compiled dense {count}", COMPILING + TIMING, compiling)
            if found is None:
                continue
            network, frames = found
        elif frames.dtype == torch.bfloat16:
            frames = frames.contiguous(memory_format=torch.channels_last)
        jobs[f"dense {count}"] = Job(functools.partial(per_video.batched, network, frames), count * gmacs, count)
    return jobs


@torch.no_grad()
def jobs_of(model: StopOrForward, video: Tensor) -> dict[str, Job]:
    """Return runs of the bare stages, clips, sessions and streams."""
    gmacs, alone = common.check(model, video), common.stage_gmacs(model, video.shape[-1])
    rows, device = common.rows_executed(model.backbone.num_stages), video.device.type
    jobs: dict[str, Job] = {}
    for count in VIDEOS[device]:
        videos = video[0, common.orders(count)]
        common.check(model, videos)
        parts = common.stage_runs(model.backbone, video[0], [count * number for number in rows])
        jobs[f"bare {count}"] = Job(functools.partial(run_all, parts), count * alone, count)
        jobs[f"clip {count}"] = Job(functools.partial(model, videos), count * gmacs, count)
        jobs[f"online {count}"] = Job(functools.partial(online, model, videos), count * gmacs, count)
    for count in STREAMS[device]:
        parts = common.stage_runs(model.backbone, video[0], [count] * len(rows))
        repeated = [part for part, times in zip(parts, rows, strict=True) for _ in range(times)]
        jobs[f"bare in batches of {count}"] = Job(functools.partial(run_all, repeated), count * alone, count)
        results = many_streams.endless(model, video, count, count)
        taken = functools.partial(take, results, count * common.ENDS_AFTER)
        jobs[f"streams {count}"] = Job(taken, count * gmacs, count)
    return jobs


def run_all(parts: Sequence[Callable[[], Any]]) -> None:
    for part in parts:
        part()


def online(model: StopOrForward, video: Tensor) -> None:
    opened = model.stream(len(video))
    for t in range(common.ENDS_AFTER):
        opened(video[:, t])
    opened.result()


def take(results: Iterator[FrameResult], frames: int) -> None:
    for _ in itertools.islice(results, frames):
        pass


@torch.no_grad()
def decisions(model: StopOrForward, video: Tensor) -> dict[str, Job]:
    """Return a pass of decisions on frames whose features are there, eager and on a GPU as a CUDA graph."""
    (batch, window), stages = video.shape[:2], model.backbone.num_stages
    engine, frames = Engine(model, batch, window), torch.arange(batch * window)
    engine.load(frames, video.flatten(0, 1), frames % window)
    engine.run(0, stages, frames)
    depth = torch.full((batch, window), stages + 1)
    said, on_device, groups = (
        engine.gate_logits.unflatten(0, (batch, window)),
        engine.upload(depth),
        engine.groups(None),
    )
    decide = torch.no_grad()(lambda: scan(groups, said, engine.bounds, on_device, depth))
    gmacs = batch * window * float(model.lookup_for((video.shape[3], video.shape[4])).steps.sum()) / 1e9
    jobs = {f"decisions {batch}": Job(decide, gmacs, batch)}
    if video.device.type == "cuda":
        # A graph is captured after a few runs on another stream, which allocate memory and choose kernels.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                decide()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            decide()
        jobs[f"decisions as a CUDA graph {batch}"] = Job(graph.replay, gmacs, batch)
    return jobs


# How it is timed


def peak(device: str, dtype: torch.dtype) -> float:
    """Return the operations a second (two a multiply-add) of large matrix products."""
    width = 256 if device == "cpu" else 8192 if dtype == torch.bfloat16 else 4096
    a, b = torch.randn(2, width, width, device=device, dtype=dtype)
    times = common.interleaved({"products": lambda: [a @ b for _ in range(10)]}, 5, device)
    return 10 * 2 * width**3 / (min(times["products"]) / 1e3)


def first_calls(job: Job, device: str) -> tuple[float, dict[str, float]]:
    """Call a job twice, since the first call chooses kernels; return the second's seconds, and its peak memory."""
    job.run()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = common.now(device)
    job.run()
    seconds = common.now(device) - started
    return seconds, {"peak_mb": torch.cuda.max_memory_allocated() / 1e6} if device == "cuda" else {}


def measure(report: common.Report, budget: Budget, name: str, dtype: torch.dtype, jobs: dict[str, Job]) -> None:
    """Time jobs in turns, as often as there is time for, and note the results as `name, job`."""
    device, best = report.args.device, peak(report.args.device, dtype)
    print(f"{name}: matrix products reach {best / 1e12:.1f} TFLOP/s", flush=True)
    report.content["peaks"][name] = best
    first = {
        job: budget.attempt(f"{name}, {job}", 0.0, functools.partial(first_calls, jobs[job], device)) for job in jobs
    }
    first = {job: found for job, found in first.items() if found is not None}
    round_seconds = sum(seconds for seconds, _ in first.values())
    rounds = int(min(TIMING, budget.left) / round_seconds) - 1  # one more round is not measured
    rounds = 1 if report.args.quick else max(1, min(MAX_ROUNDS, rounds))
    for job, times in common.interleaved({job: jobs[job].run for job in first}, rounds, device).items():
        done, seconds = jobs[job], statistics.median(times) / 1e3
        rates = {"videos_per_s": done.videos / seconds, "percent_of_peak": 100 * 2e9 * done.gmacs / seconds / best}
        report.add(f"{name}, {job}", times, done.gmacs, **rates, **first[job][1])
    for (one, other), count in itertools.product(RATIOS, sorted({*VIDEOS[device], *STREAMS[device]})):
        if f"{one} {count}" in first and f"{other} {count}" in first:
            report.compare(f"{name}, {one} {count}", f"{name}, {other} {count}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.set_defaults(device="cuda")
    parser.add_argument("--budget", type=float, default=330.0, help="seconds, after which the rest is left out")
    args = parser.parse_args(argv)
    device, args.device = args.device, "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            parser.error("torch sees no GPU; `--device cpu --quick` tries the script out")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 as on the CPU
    budget = Budget(args.budget)
    cpu, video = common.build(args, args.size)
    args.device = device
    report = common.Report(__doc__, args)
    report.content |= {"peaks": {}, "left_out": budget.left_out, "cuda": torch.version.cuda}
    check("the schedule", cpu, video, device)
    check("gates that remember", *remembering(cpu.backbone, 4, args.size), device)
    model, video = cpu.to(device), video.to(device)
    half, video16 = copy.deepcopy(model).bfloat16().to(memory_format=torch.channels_last), video.bfloat16()

    def plain(model: StopOrForward, video: Tensor) -> dict[str, Job]:
        return dense_jobs(model, video, False, budget) | jobs_of(model, video)

    def optimised() -> dict[str, Job]:
        options: dict[str, Any] = {"buckets": BUCKETS} if device == "cuda" else {"compile": False}
        started = common.now(device)
        fast, agreement = model.optimize(video, dtype=torch.bfloat16, **options)
        report.content["compile_seconds"] = common.now(device) - started
        print(f"optimised in {report.content['compile_seconds']:.1f} s: {agreement}", flush=True)
        return dense_jobs(model, video, device == "cuda", budget) | jobs_of(fast, video16)

    models: dict[str, tuple[torch.dtype, float, Callable[[], dict[str, Job]]]] = {
        "bf16": (torch.bfloat16, TIMING, lambda: plain(half, video16)),
        "float32": (torch.float32, TIMING, lambda: plain(model, video)),
        "optimised": (torch.bfloat16, COMPILING + TIMING, optimised),
        "gates": (torch.bfloat16, TIMING, lambda: decisions(half, video16[0, common.orders(VIDEOS[device][1])])),
    }
    for name, (dtype, seconds, jobs) in models.items():
        budget.attempt(name, seconds, lambda: measure(report, budget, name, dtype, jobs()))  # noqa: B023
    report.finish()


if __name__ == "__main__":
    main()
