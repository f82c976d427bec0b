"""Clip: stored videos, a window of frames through each stage as one batch, ahead of the decisions."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynskip import rules
from dynskip._check import check_eval, check_video
from dynskip.engine import Engine
from dynskip.errors import DynskipError
from dynskip.features import run_to_end
from dynskip.output import SkipOutput, masked_output

if TYPE_CHECKING:
    from dynskip.wrapper import StopOrForward

# Frames held at a time, over all videos of a batch: enough to fill a CPU, and a GPU.
FRAMES_IN_FLIGHT = {"cpu": 64, "gpu": 1024}
FEW_FRAMES = 128  # up to here, a GPU runs all stages sooner than it hears of one stage's gate
LONGEST_STEP = 16  # frames to look ahead where some may be wasted; a CPU gains little from more


@dataclass(frozen=True)
class LookAhead:
    """How far a clip is run ahead of its gates. It changes times and `speculative_macs`, never answers.

    Attributes:
        frames: most frames of a video that are in flight; fewer where many videos are run at a time.
        stages: stages that are run before the gates of earlier ones are heard; 0 hears each gate before the next stage.

    Raises:
        DynskipError: if a number makes no sense.
    """

    frames: int
    stages: int = 0

    def __post_init__(self) -> None:
        numbers = isinstance(self.frames, int) and isinstance(self.stages, int)
        if not numbers or self.frames < 1 or self.stages < 0:
            raise DynskipError(f"{self} looks at no frame, or back; give at least one frame, and 0 stages or more.")


@torch.no_grad()
def run_clip(model: StopOrForward, video: Tensor, window: int | None = None, sample: bool = False) -> SkipOutput:
    """Classify stored videos, really skipping.

    Args:
        model: a model in evaluation mode.
        video: `(B, T, C, H, W)` normalised frames in order.
        window: frames of a video in flight; by default as the model's `look_ahead` says, or what suits the device.
        sample: draw decisions; makes sense with a window of 1 only.

    Returns:
        The output.

    Raises:
        DynskipError: as `StopOrForward.run_clip`.
    """
    check_eval(model, "`run_clip`")
    video = check_video(video, model.backbone)
    if window is not None and window < 1:
        raise DynskipError(f"window={window}: a window has at least one frame; give 1 to go frame by frame.")
    model.lookup_for((video.shape[3], video.shape[4]))  # first, so that a model without costs says so at once
    try:
        return _run(model, video, window, sample)
    except DynskipError:
        raise
    except Exception:
        if window == 1:
            raise
    return _run(model, video, 1, sample)  # what raised ahead of the decisions may never be reached


def _run(model: StopOrForward, video: Tensor, window: int | None, sample: bool) -> SkipOutput:
    batch, frames = video.shape[:2]
    engine = Engine(model, batch, counts=True, sample=sample)
    on_cpu, live, start, tables = engine.device.type == "cpu", torch.arange(batch), 0, []
    plan = model.look_ahead or _usual(model, batch, frames, on_cpu, engine.in_order)
    bound = max(1, FRAMES_IN_FLIGHT["cpu" if on_cpu else "gpu"] // batch)
    size = window or min(plan.frames, bound)
    grows = window is None and on_cpu and model.look_ahead is None
    sure = 0 if model.terminator is None else model.terminator.min_frames + 1  # no video ends before
    while start < frames and len(live):
        engine.open(min(size, frames - start))
        stages = 0 if engine.reached or engine.window == 1 else plan.stages  # there, each verdict is heard at once
        stopped_at, live = _run_window(engine, video, start, live, stages, 1 if on_cpu else engine.window)
        tables.append((stopped_at, engine.gate_logits, engine.frame_logits))
        start += engine.window
        if grows and start >= sure:  # the longer a video has been looked at, the more of it there is likely to be
            size = min(2 * size, max(size, LONGEST_STEP), bound)
    return _output(engine, video, tables)


def tune(model: StopOrForward, video: Tensor) -> LookAhead:
    """Measure which look-ahead is fastest on videos like these; see `StopOrForward.tune`."""
    frames, stages, own = video.shape[1], model.backbone.num_stages, model.look_ahead
    sizes = sorted({min(size, frames) for size in (4, 8, 16, 32, frames)})
    choices = [LookAhead(size, ahead) for size in sizes for ahead in ((0, stages) if size > 1 else (0,))]
    times: dict[LookAhead, list[float]] = {choice: [] for choice in choices}
    try:
        for _ in range(4):  # in turns, the first of which is not counted
            for model.look_ahead in choices:
                started = time.perf_counter()
                float(model(video).logits.sum())  # waits until a GPU is done
                times[model.look_ahead].append(time.perf_counter() - started)
    finally:
        model.look_ahead = own
    return min(choices, key=lambda choice: statistics.median(times[choice][1:]))


def _usual(model: StopOrForward, batch: int, frames: int, on_cpu: bool, in_order: bool) -> LookAhead:
    """Choose a look-ahead that suits most models on a device."""
    if not on_cpu:
        return LookAhead(frames, model.backbone.num_stages if batch * frames <= FEW_FRAMES else 0)
    if model.terminator is None:
        return LookAhead(frames if in_order else LONGEST_STEP)
    sure = model.terminator.min_frames + 1  # no video ends before
    return LookAhead(sure if in_order else math.ceil(sure / math.ceil(sure / LONGEST_STEP)))


def _run_window(
    engine: Engine, video: Tensor, start: int, live: Tensor, stages: int, again: int
) -> tuple[Tensor, Tensor]:
    """Decide on the next frames of the videos that have not ended; return what became of them, and who goes on."""
    size = engine.window
    columns = torch.arange(size)
    frames = (live[:, None] * size + columns).flatten()
    images = video[:, start : start + size]
    images = images if len(live) == engine.videos else images[engine.upload(live)]
    engine.load(frames, images.flatten(0, 1), (start + columns).repeat(len(live)))
    table = torch.full((engine.videos, size), rules.UNSEEN)
    left = live
    while len(left):
        engine.advance(frames, stages)
        decided, lacking, ended = engine.learn(engine.decide(left))
        table[left] = torch.maximum(table[left], decided)
        # Where a used frame has moved the states, frames lack what nobody asked for before. Far ahead that is a guess.
        lacking &= lacking.cumsum(1) <= again
        frames = (left[:, None] * size + columns)[lacking]
        going = engine.pending.view(-1, size)[left].any(1)
        live, left = live[~torch.isin(live, left[ended])], left[going]
    return table, live


def _output(engine: Engine, video: Tensor, tables: list[tuple[Tensor, Tensor, Tensor]]) -> SkipOutput:
    """Answer for videos without a used frame, and put everything together."""
    batch, frames = video.shape[:2]
    lookup = engine.model.lookup_for((video.shape[3], video.shape[4]))
    stopped_at = torch.full((batch, frames), rules.UNSEEN)
    seen = torch.cat([table[0] for table in tables], 1)
    stopped_at[:, : seen.shape[1]] = seen

    def joined(part: int) -> Tensor:
        parts = [table[part].unflatten(0, (batch, -1)) for table in tables]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        left = frames - whole.shape[1]
        return torch.cat([whole, whole.new_zeros(batch, left, *whole.shape[2:])], 1) if left else whole

    gate_logits, frame_logits = joined(1).to(engine.dtype), joined(2)
    fallback = torch.full((batch,), -1)
    left = {row: furthest for row, furthest in enumerate(engine.furthest) if furthest is not None}
    executed = torch.tensor([engine.executed(row, lookup) for row in range(batch)], dtype=torch.float64)
    if left:
        rows, at = torch.tensor(list(left)), torch.tensor([furthest.frame for furthest in left.values()])
        fallback[rows] = at
        logits = run_to_end(engine.backbone, list(left.values()))
        frame_logits[engine.upload(rows), engine.upload(at)] = logits.to(frame_logits.dtype)
        executed[rows] += lookup.completion[[furthest.depth - 1 for furthest in left.values()]]
    # Costs are worked out where the decisions are known, on the host.
    speculative = (executed - lookup.cost(stopped_at, fallback)).clamp(min=0.0)
    output = masked_output(
        engine.upload(stopped_at),
        gate_logits,
        frame_logits,
        lookup,
        engine.model.repeats,
        fallback_frame=engine.upload(fallback),
    )
    output.speculative_macs = engine.upload(speculative)
    return output
