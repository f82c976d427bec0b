"""Clip: stored videos. A window of frames goes through each stage as one batch, ahead of the decisions."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynskip import rules
from dynskip._check import Lengths, Videos, check_eval, check_video, refuse_not_finite
from dynskip.engine import Engine
from dynskip.errors import DynskipError
from dynskip.features import run_to_end
from dynskip.flops import FLOPsLookup
from dynskip.lazy import LazyVideo
from dynskip.order import in_time, steps
from dynskip.output import SkipOutput, masked_output

if TYPE_CHECKING:
    from dynskip.wrapper import StopOrForward

# Most frames in flight, over all videos of a batch: enough to fill a CPU, and a GPU.
FRAMES_IN_FLIGHT = {"cpu": 64, "gpu": 1024}
FEW_FRAMES = 128  # up to so many frames, a GPU runs all stages in less time than one wait takes
# Frames to look ahead where some may run in vain: at first, and at most. A CPU gains little from more.
FIRST_STEP, LONGEST_STEP = 4, 16
LAZY_FRAMES = 4  # of a lazy video in flight on a GPU, which waits for the decoder anyway


@dataclass(frozen=True)
class LookAhead:
    """How far a clip runs ahead of its gates. It changes times and `speculative_macs`, never answers.

    Attributes:
        frames: most frames of a video in flight; fewer where a batch has many videos.
        stages: stages that run before the gates of earlier ones are heard; 0 hears each gate before the next stage.

    Raises:
        DynskipError: if a number makes no sense.
    """

    frames: int
    stages: int = 0

    def __post_init__(self) -> None:
        numbers = isinstance(self.frames, int) and isinstance(self.stages, int)
        if not numbers or self.frames < 1 or self.stages < 0:
            raise DynskipError(f"{self} is no look-ahead; give at least 1 frame and at least 0 stages.")


@torch.no_grad()
def run_clip(
    model: StopOrForward,
    video: Videos,
    lengths: Lengths | None = None,
    window: int | None = None,
    sample: bool = False,
) -> SkipOutput:
    """Classify stored videos, really skipping; see `StopOrForward.run_clip`. `sample` needs a window of 1."""
    check_eval(model, "`run_clip`")
    video, ends = check_video(video, model.backbone, lengths, lazily=True)
    if window is not None and window < 1:
        raise DynskipError(f"window={window}: a window has at least one frame; give 1 to go frame by frame.")
    lookup = model.lookup_for((video.shape[3], video.shape[4]))  # first: an error here needs no run
    try:
        return _run(model, video, ends, lookup, window, sample)
    except Exception as error:
        # A frame that cannot be loaded is no reason to give up where it was loaded ahead.
        if window == 1 or (isinstance(error, DynskipError) and not isinstance(video, LazyVideo)):
            raise
    return _run(model, video, ends, lookup, 1, sample)  # the videos may never get to the frame that raised


def _run(
    model: StopOrForward,
    video: Videos,
    lengths: Tensor | None,
    lookup: FLOPsLookup,
    window: int | None,
    sample: bool,
) -> SkipOutput:
    batch, frames = video.shape[:2]
    table = steps(model.order, batch, frames, lengths)
    ends = torch.full((batch,), frames) if lengths is None else lengths
    if isinstance(video, LazyVideo):
        video.begin(torch.arange(frames).expand(batch, -1) if table is None else table)
    engine = Engine(model, batch, counts=True, sample=sample)
    on_cpu, live, start = engine.device.type == "cpu", torch.arange(batch), 0
    plan = model.look_ahead or _usual(model, batch, frames, on_cpu, engine.in_order)
    if isinstance(video, LazyVideo) and not on_cpu and model.look_ahead is None:
        plan = LookAhead(min(frames, LAZY_FRAMES), plan.stages)
    bound = max(1, FRAMES_IN_FLIGHT["cpu" if on_cpu else "gpu"] // batch)
    size = window or min(plan.frames, bound)
    grows = window is None and on_cpu and model.look_ahead is None
    sure = 0 if model.terminator is None else model.terminator.min_frames + 1  # no video ends before
    stops, gate_logits, frame_logits = [], [], []
    while len(live := live[ends[live] > start]):
        engine.open(min(size, int(ends[live].max()) - start))
        # In these cases the host hears each gate before the next stage.
        stages = 0 if engine.reached or engine.window == 1 else plan.stages
        before = live
        chosen = _images(engine, video, start, live, ends, table)
        stopped_at, live = _run_window(engine, *chosen, live, stages, 1 if on_cpu else engine.window)
        stops.append(stopped_at)
        gate_logits.append(engine.gate_logits.unflatten(0, (batch, engine.window)))
        frame_logits.append(engine.frame_logits.unflatten(0, (batch, engine.window)))
        start += engine.window
        if grows and start >= sure:  # a video that has lasted long is likely to last longer
            ran = engine.features.depth.view(batch, engine.window)[before]
            in_vain = (ran - stopped_at[before] - 1).clamp(min=0).sum() > ran.sum() / 4
            size = max(1, size // 2) if in_vain else min(2 * size, max(size, LONGEST_STEP), bound)
    tables = _joined(stops, frames, rules.UNSEEN), _joined(gate_logits, frames), _joined(frame_logits, frames)
    output = in_time(_output(engine, lookup, *tables), table)
    output.lengths = None if lengths is None else engine.upload(lengths)
    return output


def tune(model: StopOrForward, video: Videos, lengths: Lengths | None = None) -> LookAhead:
    """Measure which look-ahead is fastest on videos like these; see `StopOrForward.tune`."""
    frames, stages, own = video.shape[1], model.backbone.num_stages, model.look_ahead
    sizes = sorted({min(size, frames) for size in (4, 8, 16, 32, frames)})
    choices = [LookAhead(size, ahead) for size in sizes for ahead in ((0, stages) if size > 1 else (0,))]
    times: dict[LookAhead, list[float]] = {choice: [] for choice in choices}
    try:
        for _ in range(4):  # the first round does not count
            for model.look_ahead in choices:
                started = time.perf_counter()
                float(model(video, lengths=lengths).logits.sum())  # waits until a GPU is done
                times[model.look_ahead].append(time.perf_counter() - started)
    finally:
        model.look_ahead = own
    return min(choices, key=lambda choice: statistics.median(times[choice][1:]))


def _usual(model: StopOrForward, batch: int, frames: int, on_cpu: bool, in_order: bool) -> LookAhead:
    """Return a look-ahead that suits most models on a device."""
    if not on_cpu:
        return LookAhead(frames, model.backbone.num_stages if batch * frames <= FEW_FRAMES else 0)
    if model.terminator is None:
        return LookAhead(frames if in_order else FIRST_STEP)
    sure = model.terminator.min_frames + 1  # no video ends before
    return LookAhead(sure if in_order else math.ceil(sure / math.ceil(sure / LONGEST_STEP)))


def _images(
    engine: Engine, video: Videos, start: int, live: Tensor, ends: Tensor, table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the next frames of the `live` videos, up to their `ends`, as `Engine.load` takes them."""
    size = engine.window
    columns = torch.arange(size)
    frames, numbers = live[:, None] * size + columns, (start + columns).expand(len(live), -1)
    if table is None and isinstance(video, Tensor) and int(ends[live].min()) >= start + size:
        images = video[:, start : start + size]
        images = images if len(live) == engine.videos else images[engine.upload(live)]
        return frames.flatten(), images.flatten(0, 1), numbers.flatten()
    real = numbers < ends[live, None]
    shown = numbers if table is None else table[live, start : start + size]
    rows = live[:, None].expand_as(real)
    if isinstance(video, LazyVideo):
        images = video.take(rows[real], shown[real], engine.device)
        refuse_not_finite(images, "frame")
    else:
        images = video[engine.upload(rows[real]), engine.upload(shown[real])]
    return frames[real], images, numbers[real]


def _run_window(
    engine: Engine, frames: Tensor, images: Tensor, numbers: Tensor, live: Tensor, stages: int, again: int
) -> tuple[Tensor, Tensor]:
    """Decide on frames of the `live` videos; return what became of them, and which videos go on."""
    size, columns = engine.window, torch.arange(engine.window)
    engine.load(frames, images, numbers)
    stopped_at = torch.full((engine.videos, size), rules.UNSEEN)
    left = live
    while len(left):
        engine.advance(frames, stages)
        decided, lacking, ended = engine.learn(engine.decide(left))
        stopped_at[left] = torch.maximum(stopped_at[left], decided)
        # Where a used frame has changed the states, later frames lack stages. Far ahead, that is a guess.
        lacking &= lacking.cumsum(1) <= again
        frames = (left[:, None] * size + columns)[lacking]
        going = engine.pending.view(-1, size)[left].any(1)
        live, left = live[~torch.isin(live, left[ended])], left[going]
    return stopped_at, live


def _joined(windows: list[Tensor], frames: int, filling: float = 0) -> Tensor:
    """Put windows `(B, W, ...)` together, filled up to a number of frames."""
    whole = windows[0] if len(windows) == 1 else torch.cat(windows, 1)
    batch, have, *rest = whole.shape
    return whole if have == frames else torch.cat([whole, whole.new_full((batch, frames - have, *rest), filling)], 1)


def _output(
    engine: Engine, lookup: FLOPsLookup, stopped_at: Tensor, gate_logits: Tensor, frame_logits: Tensor
) -> SkipOutput:
    """Answer for videos without a used frame, and put everything together."""
    fallback = torch.full((engine.videos,), -1)
    answers = engine.running()
    left = {row: furthest for row, furthest in enumerate(engine.furthest) if furthest is not None}
    executed = torch.tensor([engine.executed(row, lookup) for row in range(engine.videos)], dtype=torch.float64)
    if left:
        rows, at = torch.tensor(list(left)), torch.tensor([furthest.frame for furthest in left.values()])
        fallback[rows] = at
        logits = run_to_end(engine.backbone, list(left.values()))
        frame_logits[engine.upload(rows), engine.upload(at)] = logits.to(frame_logits.dtype)
        answers[engine.upload(rows)] = rules.answer(engine.readout, logits).to(engine.dtype)
        executed[rows] += lookup.completion[[furthest.depth - 1 for furthest in left.values()]]
    output = masked_output(
        engine.upload(stopped_at),
        gate_logits.to(engine.dtype),
        frame_logits,
        lookup,
        engine.readout,
        fallback_frame=engine.upload(fallback),
        logits=answers,
    )
    # Costs are computed on the host, where the decisions are known.
    output.speculative_macs = engine.upload((executed - lookup.cost(stopped_at, fallback)).clamp(min=0.0))
    return output
