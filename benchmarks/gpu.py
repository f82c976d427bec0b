"""What do clips, sessions and streams take on a GPU, against the dense network and the bare stages?

    python benchmarks/gpu.py --json gpu.json

One command for one GPU and six minutes. It checks first that the GPU decides as the CPU does. Then it times 1, 8 and 64
videos of 16 frames that follow the schedule: in bf16 and in float32, and optimised in bf16 with CUDA graphs.

- dense: the untouched timm model on the same frames, as one batch; compiled where the stages are
- bare: the stages and the head alone, on as many rows as the schedule executes, in full batches
- clip: `model(video)`
- online: a session of all the videos, a frame of each at a time
- streams: as many streams that never end, against bare stages in batches of the same size

`--device cpu --quick` tries the script out.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
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
STREAMS = {"cuda": ((64, 64), (16, 16), (1, 1)), "cpu": ((2, 2), (1, 1))}  # streams, and the size of their batches
BUCKETS = (1, 2, 4, 8, 16, 64)
COMPILING, TIMING = 90.0, 40.0  # seconds to reserve for compiling something, and for timing all there is of a model
MAX_ROUNDS = 7


class Clock:
    """What the time still suffices for.

    Attributes:
        left_out: what was not measured, and why.
    """

    def __init__(self, budget: float) -> None:
        self._ends = time.perf_counter() + budget
        self.left_out: dict[str, str] = {}

    @property
    def left(self) -> float:
        """Seconds."""
        return self._ends - time.perf_counter()

    def affords(self, name: str, seconds: float) -> bool:
        if self.left < seconds:
            self.leave_out(name, f"it may take {seconds:.0f} s, and {max(self.left, 0):.0f} s are left")
        return name not in self.left_out

    def leave_out(self, name: str, why: Any) -> None:
        lines = str(why).strip().splitlines() or [type(why).__name__]
        self.left_out[name] = lines[0][:200]
        print(f"left out: {name}: {self.left_out[name]}", flush=True)


@dataclass
class Job:
    """Something to time.

    Attributes:
        run: what is timed.
        gmacs: what it executes.
        videos: how many videos it gets through.
    """

    run: Callable[[], Any]
    gmacs: float
    videos: int


# Decisions


@torch.no_grad()
def changing(backbone: StagedBackbone, videos: Tensor, draws: int = 24, hidden: int = 64) -> StopOrForward:
    """Return a model with random weights whose gates decide otherwise when their memory is another.

    Of so many draws it is the one whose closest decision is clearest, so that no rounding turns one. At least a third
    of the frames are used, and a tenth goes elsewhere than it would as the first frame.
    """
    encoded = lookup = chosen = None
    clearest = 0.0
    for seed in range(draws):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            gates = [PolicyGate(channels, hidden) for channels in backbone.num_features]
        terminator = EarlyTerminator(0.999, 3 * common.FRAMES // 4)
        model = StopOrForward(backbone, gates, terminator=terminator, lookup=lookup).eval()
        encoded = encoded or model.encode(videos)
        lookup = lookup or model.lookup_for(encoded.image_size)
        depth = torch.zeros(videos.shape[:2], dtype=torch.long)
        for n, (gate, pooled) in enumerate(zip(gates, encoded.pooled, strict=True)):
            gate.project.weight.mul_(3 / pooled.std())
            gate.cell.weight_hh.mul_(2)
            gate.decide.weight.mul_(10)
            state, margins = gate.initial_state(len(videos)), []
            for features in pooled.unbind(1):
                logits, state = gate(features, state)
                margins.append(logits.diff(dim=1))
            first = gate(pooled.flatten(0, 1), gate.initial_state(depth.numel()))[0].diff(dim=1)
            # Seven frames in eight go forward, whether the memory is empty or has seen all frames before.
            gate.decide.bias[1] -= torch.minimum(first.quantile(1 / 8), torch.cat(margins).quantile(1 / 8))
            passes = first.view(depth.shape) + gate.decide.bias.diff() > 0
            depth += (depth == n) & passes
        output = model.decide(encoded)
        assert output.gate_logits is not None
        clear = float(output.gate_logits[output.evaluated].diff(dim=-1).abs().min())
        moved = float((depth != output.stopped_at)[output.seen].double().mean())
        if clear > clearest and moved > 0.1 and float(output.used.double().mean()) > 1 / 3:
            chosen, clearest = model, clear
    if chosen is None:
        raise SystemExit(f"None of {draws} draws gave gates whose decisions change; draw more.")
    return chosen


def lively(videos: int, size: int) -> Tensor:
    """Return videos whose frames differ in brightness, colour and contrast, at random."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(videos, common.FRAMES, 3, size, size, generator=generator)
    contrast = 3 * torch.rand(videos, common.FRAMES, 1, 1, 1, generator=generator)
    return noise * contrast + 2 * torch.randn(videos, common.FRAMES, 3, 1, 1, generator=generator)


def check(name: str, cpu: StopOrForward, video: Tensor, device: str) -> None:
    """Refuse to time what decides on the device otherwise than a clip does on the CPU."""
    wanted = cpu(video).stopped_at
    model, there = copy.deepcopy(cpu).to(device), video.to(device)
    for way, run in {"a clip": clip, "a session": session, "streams": streams}.items():
        got = run(model, there).cpu()
        if not torch.equal(got, wanted):
            wrong = (got != wanted).nonzero().tolist()
            b, t = wrong[0]
            raise SystemExit(
                f"{name}: {way} on {device} decides otherwise than a clip on the CPU, in {len(wrong)} of "
                f"{wanted.numel()} frames. Frame {t} of video {b} stopped at {int(got[b, t])} there and at "
                f"{int(wanted[b, t])} here ({cpu.backbone.num_stages}: used, {UNSEEN}: unseen). Nothing is timed."
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


def in_turns(video: Tensor, count: int) -> Tensor:
    """Return so many videos of the schedule's frames, which begin with different ones: `(count, 16, C, H, W)`."""
    return video[0, _order(count).to(video.device)]


def follow(model: StopOrForward, videos: Tensor) -> None:
    """Refuse to time what leaves the schedule."""
    wanted = torch.tensor(common.schedule(model.backbone.num_stages))[_order(len(videos))]
    wanted[:, common.ENDS_AFTER :] = UNSEEN
    wrong = int((clip(model, videos).cpu() != wanted).sum())
    if wrong:
        raise RuntimeError(f"{wrong} of {wanted.numel()} frames left the schedule.")


def _order(count: int) -> Tensor:
    seen, unseen = torch.arange(common.ENDS_AFTER), torch.arange(common.ENDS_AFTER, common.FRAMES)
    turned = (torch.arange(count)[:, None] + seen) % common.ENDS_AFTER
    return torch.cat([turned, unseen.expand(count, -1)], 1)


# What is timed


@torch.no_grad()
def bare(
    model: StopOrForward, frames: Tensor, rows: Sequence[int], times: Sequence[int] | None = None
) -> Callable[[], None]:
    """Return a run of the stages and the head alone, on so many rows each, and each so many times."""
    backbone, stages = model.backbone, model.backbone.num_stages
    carry, inputs = backbone.start(frames[torch.arange(rows[0], device=frames.device) % len(frames)]), []
    for n in range(stages + 1):
        if rows[n] < carry.batch:
            carry = carry.select(torch.arange(rows[n], device=frames.device))
        inputs.append(carry)
        carry = backbone.run(n, carry) if n < stages else carry

    @torch.no_grad()
    def run() -> None:
        for n in range(stages + 1):
            for _ in range(times[n] if times else 1):
                backbone.run(n, inputs[n]) if n < stages else backbone.head(inputs[n])

    return run


def online(model: StopOrForward, video: Tensor) -> None:
    opened = model.stream(len(video))
    for t in range(common.ENDS_AFTER):
        opened(video[:, t])
    opened.result()


def serving(model: StopOrForward, video: Tensor, count: int, batch: int) -> Callable[[], None]:
    """Return a run that takes as many frames of endless streams as that many videos have."""
    sources = (many_streams.videos(video[0], first) for first in itertools.count())
    events = model.serve_streams(sources, max_streams=count, batch_size=batch)
    results = (event for event in events if isinstance(event, FrameResult))
    frames = count * common.ENDS_AFTER

    def run() -> None:
        for _ in itertools.islice(results, frames):
            pass

    return run


@torch.no_grad()
def jobs_of(
    model: StopOrForward, video: Tensor, sizes: Sequence[int], serve: Sequence[tuple[int, int]]
) -> dict[str, Job]:
    """Return all that is timed of a model, the dense network aside."""
    lookup, stages = model.lookup_for((video.shape[3], video.shape[4])), model.backbone.num_stages
    executed = float(model(video).macs) / 1e9
    stops = common.schedule(stages)[: common.ENDS_AFTER]
    rows = [sum(stop >= n for stop in stops) for n in range(stages + 1)]
    alone = sum(a * b for a, b in zip(rows, [*lookup.per_stage.tolist(), lookup.head], strict=True)) / 1e9
    jobs: dict[str, Job] = {}
    for count in sizes:
        videos = in_turns(video, count)
        follow(model, videos)
        jobs[f"bare {count}"] = Job(bare(model, video[0], [count * number for number in rows]), count * alone, count)
        jobs[f"clip {count}"] = Job(functools.partial(model, videos), count * executed, count)
        jobs[f"online {count}"] = Job(functools.partial(online, model, videos), count * executed, count)
    for count, batch in serve:
        work = bare(model, video[0], [batch] * len(rows), [count * number // batch for number in rows])
        jobs[f"bare in batches of {batch}"] = Job(work, count * alone, count)
        jobs[f"streams {count}"] = Job(serving(model, video, count, batch), count * executed, count)
    return jobs


def dense_jobs(model: StopOrForward, video: Tensor, sizes: Sequence[int]) -> dict[str, Job]:
    """Return runs of the dense network."""
    gmacs, network = dense_gmacs(model, video), model.backbone.model
    jobs = {}
    for count in sizes:
        frames = in_turns(video, count).flatten(0, 1)
        if video.dtype == torch.bfloat16:
            frames = frames.contiguous(memory_format=torch.channels_last)
        jobs[f"dense {count}"] = Job(functools.partial(per_video.batched, network, frames), count * gmacs, count)
    return jobs


def compiled_dense_jobs(model: StopOrForward, video: Tensor, sizes: Sequence[int], clock: Clock) -> dict[str, Job]:
    """Return runs of the compiled dense network, for as many batch sizes as there is time to compile."""
    gmacs, expected, jobs = dense_gmacs(model, video), COMPILING, {}
    for count in reversed(sizes):
        name, started = f"compiled dense {count}", time.perf_counter()
        if video.device.type != "cuda":
            clock.leave_out(name, "this is compiled for GPUs only")
        elif clock.affords(name, expected + TIMING):
            try:
                network, frames = per_video.optimised_dense(model, in_turns(video, count).flatten(0, 1))
            except Exception as error:
                clock.leave_out(name, error)
                continue
            run = functools.partial(per_video.batched, network, frames)
            jobs[f"dense {count}"] = Job(run, count * gmacs, count)
            expected = 1.2 * (time.perf_counter() - started)
    return jobs


def dense_gmacs(model: StopOrForward, video: Tensor) -> float:
    return common.FRAMES * model.lookup_for((video.shape[3], video.shape[4])).dense / 1e9


def captured(model: StopOrForward, video: Tensor) -> dict[str, Job]:
    """Return a pass of decisions, eager and as a CUDA graph, on frames whose features are there."""
    name, count = "decisions as a CUDA graph", len(video)
    decide = one_pass(model, video)
    # Recording wants everything allocated and chosen before, on another stream.
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            decide()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decide()
    return {f"decisions {count}": Job(decide, 0.0, count), f"{name} {count}": Job(graph.replay, 0.0, count)}


@torch.no_grad()
def one_pass(model: StopOrForward, video: Tensor) -> Callable[[], Any]:
    """Run all stages on all frames; return the scan over them, which has fixed shapes and waits for nothing."""
    (batch, window), stages = video.shape[:2], model.backbone.num_stages
    engine = Engine(model, batch, window)
    frames = torch.arange(batch * window)
    engine.load(frames, video.flatten(0, 1), frames % window)
    engine.run(0, stages, frames)
    known = torch.full((batch, window), stages + 1)
    said, bounds = engine.gate_logits.unflatten(0, (batch, window)), engine.bounds
    on_device, groups = engine.upload(known), engine.groups(None)
    return torch.no_grad()(lambda: scan(groups, said, bounds, on_device, known))


# How it is timed


def peaks(device: str) -> dict[torch.dtype, float]:
    """Return the operations a second (two a multiply-add) that large matrix products reach."""
    reached = {}
    for dtype, width in {torch.bfloat16: 8192, torch.float32: 4096}.items():
        width = width if device == "cuda" else 256
        a, b = torch.randn(2, width, width, device=device, dtype=dtype)
        products = functools.partial(lambda a, b: [a @ b for _ in range(10)], a, b)
        times = common.interleaved({"products": products}, 5, device)
        reached[dtype] = 10 * 2 * width**3 / (min(times["products"]) / 1e3)
    return reached


def measure(report: common.Report, clock: Clock, name: str, peak: float, jobs: dict[str, Job]) -> None:
    """Time jobs in turns, as often as there is time for, and note the results as `name, job`."""
    device, seconds, extra = report.args.device, 0.0, {job: dict[str, float]() for job in jobs}
    for job in list(jobs):
        try:
            for _ in range(2):  # the first call chooses kernels
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                started = common.now(device)
                jobs[job].run()
                took = common.now(device) - started
        except Exception as error:
            clock.leave_out(f"{name}, {job}", error)
            del jobs[job]
            continue
        seconds += took
        if device == "cuda":
            extra[job]["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
    fitting = min(TIMING, clock.left) / max(seconds, 1e-3) - 1  # one more round is not measured
    rounds = 1 if report.args.quick else max(1, min(MAX_ROUNDS, int(fitting)))
    for job, times in common.interleaved({job: jobs[job].run for job in jobs}, rounds, device).items():
        done, median = jobs[job], statistics.median(times) / 1e3
        extra[job]["videos_per_s"] = done.videos / median
        if done.gmacs:
            extra[job]["percent_of_peak"] = 100 * 2e9 * done.gmacs / median / peak
        report.add(f"{name}, {job}", times, done.gmacs, **extra[job])


RATIOS = (("clip", "dense"), ("clip", "bare"), ("online", "dense"))


def rows_of(results: dict[str, Any], names: Sequence[str], device: str) -> list[dict[str, Any]]:
    """Return the rows of the table, from what was measured: for each model and number of videos."""
    rows = []
    for name, count in itertools.product(names, VIDEOS[device]):
        parts = {part: results.get(f"{name}, {part} {count}", {}) for part in ("dense", "bare", "clip", "online")}
        row: dict[str, Any] = {"model": name, "videos": count}
        row |= {f"{part} ms": done.get("median_ms") for part, done in parts.items()}
        row |= {f"{a}/{b}": quotient(parts[a].get("median_ms"), parts[b].get("median_ms")) for a, b in RATIOS}
        row |= {f"{part} %peak": parts[part].get("percent_of_peak") for part in ("dense", "bare", "clip")}
        rows.append(row | {f"{part} MB": parts[part].get("peak_mb") for part in ("dense", "clip")})
    return rows


def stream_rows_of(results: dict[str, Any], names: Sequence[str], device: str) -> list[dict[str, Any]]:
    """Return the rows of the streams' table."""
    rows = []
    for name, (count, batch) in itertools.product(names, STREAMS[device]):
        done = results.get(f"{name}, streams {count}", {})
        rate = done.get("videos_per_s")
        best = results.get(f"{name}, bare in batches of {batch}", {}).get("videos_per_s")
        row = {"model": name, "streams": count, "batches": batch, "videos/s": rate, "bare videos/s": best}
        rows.append(row | {"streams/bare": quotient(rate, best), "%peak": done.get("percent_of_peak")})
    return rows


def quotient(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table."""
    cells = [[*rows[0]], *([shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return str(value)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.set_defaults(device="cuda")
    parser.add_argument("--budget", type=float, default=330.0, help="seconds, after which the rest is left out")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; `--device cpu --quick` tries the script out")
    clock, sizes, serve = Clock(args.budget), VIDEOS[args.device], STREAMS[args.device]
    if args.device == "cuda":  # what is called float32 is float32, as on the CPU
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report = common.Report(__doc__, args)
    cpu, video = common.build(argparse.Namespace(**{**vars(args), "device": "cpu"}), args.size)
    check("the schedule", cpu, video, args.device)
    others = lively(4, args.size)
    check("gates that remember", changing(cpu.backbone, others), others, args.device)
    model, video = cpu.to(args.device), video.to(args.device)
    reached = peaks(args.device)
    report.content["peaks"] = {str(dtype): rate for dtype, rate in reached.items()}
    report.content["settings"] = {"tf32": False, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    print(", ".join(f"matmul {dtype}: {rate / 1e12:.1f} TFLOP/s" for dtype, rate in reached.items()), flush=True)

    half, video16 = copy.deepcopy(model).bfloat16().to(memory_format=torch.channels_last), video.bfloat16()

    def eager(model: StopOrForward, video: Tensor) -> dict[str, Job]:
        return dense_jobs(model, video, sizes) | jobs_of(model, video, sizes, serve)

    def optimised() -> dict[str, Job]:
        graphs: dict[str, Any] = {"buckets": BUCKETS} if args.device == "cuda" else {"compile": False}
        started = common.now(args.device)
        fast, agreement = model.optimize(video, dtype=torch.bfloat16, **graphs)
        report.content["compile_seconds"] = common.now(args.device) - started
        print(f"optimised in {report.content['compile_seconds']:.1f} s: {agreement}", flush=True)
        return compiled_dense_jobs(model, video, sizes, clock) | jobs_of(fast, video16, sizes, serve)

    models: dict[str, tuple[torch.dtype, float, Callable[[], dict[str, Job]]]] = {
        "bf16": (torch.bfloat16, TIMING, lambda: eager(half, video16)),
        "float32": (torch.float32, TIMING, lambda: eager(model, video)),
        "optimised": (torch.bfloat16, COMPILING + TIMING, optimised),
        "captured": (torch.bfloat16, TIMING, lambda: captured(half, in_turns(video16, sizes[1]))),
    }
    for name, (dtype, seconds, make) in models.items():
        if clock.affords(name, seconds):
            try:
                measure(report, clock, name, reached[dtype], make())
            except Exception as error:  # the others are still worth their time
                clock.leave_out(name, error)
    finish(report, clock, [*models][:3])


def finish(report: common.Report, clock: Clock, names: Sequence[str]) -> None:
    """Print the table, then the ratios at the largest size, and write the file."""
    results, device = report.content["results"], report.args.device
    report.content["left_out"] = clock.left_out
    report.content["table"] = rows_of(results, names, device)
    report.content["streams"] = stream_rows_of(results, names, device)
    show(report.content["table"])
    show(report.content["streams"])
    for name, why in clock.left_out.items():
        print(f"left out: {name}: {why}")
    for row in report.content["table"]:
        if row["videos"] == VIDEOS[device][-1]:
            for ratio in (f"{a}/{b}" for a, b in RATIOS):
                if row[ratio] is not None:
                    report.ratio(f"{row['model']}, {row['videos']} videos, {ratio}", row[ratio])
    for row in report.content["streams"]:
        if row["streams/bare"] is not None:
            report.ratio(f"{row['model']}, {row['streams']} streams / bare", row["streams/bare"])
    report.finish()


if __name__ == "__main__":
    main()
