"""Clip: stored videos, a window of frames through each stage as one batch, ahead of the decisions.

Features do not depend on gates; only the gates' states link frames. So stages may run ahead on whatever the states of
now would let through, and gates decide again, on features already there, where a state has moved on.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynskip._check import check_video
from dynskip.backbone import Carry, StagedBackbone
from dynskip.errors import DynskipError
from dynskip.gates import GateState
from dynskip.output import UNSEEN, SkipOutput, masked_output
from dynskip.runtime._state import CarryRow, Progress, check_eval, gather, run_to_end

if TYPE_CHECKING:
    from dynskip.terminate import EarlyTerminator
    from dynskip.wrapper import StopOrForward

FRAMES_IN_FLIGHT = 64  # bounds the features held at a time, over all videos of a batch
LONGEST_STEP = 8  # frames to look ahead where some may be wasted; larger batches gain little more in eager mode


@torch.no_grad()
def run_clip(model: StopOrForward, video: Tensor, window: int | None = None, sample: bool = False) -> SkipOutput:
    """Classify stored videos, really skipping.

    Args:
        model: a model in evaluation mode.
        video: `(B, T, C, H, W)` normalised frames in order.
        window: frames of a video to look ahead; by default what `Usage` proposes.
        sample: draw decisions; makes sense with a window of 1 only.

    Returns:
        The output.

    Raises:
        DynskipError: as `StopOrForward.run_clip`.
    """
    check_eval(model, "`run_clip`")
    check_video(video, model.backbone)
    if window is not None and window < 1:
        raise DynskipError(f"window={window}: a window has at least one frame; give 1 to go frame by frame.")
    batch, frames = video.shape[:2]
    clip = _Clip(model, video, sample)
    size = window or model._usage.window(model.terminator, batch, clip.gate_by_gate)
    while live := [b for b in range(batch) if clip.position[b] < clip.length[b]]:
        clip.run_window({b: min(clip.position[b] + size, frames) for b in live})
    if window is None and model.terminator is not None:
        model._usage.update(clip.length)
    return clip.output()


class Usage:
    """How many frames of a video are looked at before it ends; chooses windows, never results.

    Args:
        longest: frames to look ahead where some may be wasted.
    """

    def __init__(self, longest: int = LONGEST_STEP) -> None:
        self._longest = longest
        self._mean: float | None = None

    def update(self, seen: Sequence[int]) -> None:
        """Take the frames looked at in each of some videos into the running average."""
        for count in seen:
            self._mean = count if self._mean is None else 0.9 * self._mean + 0.1 * count

    def window(self, terminator: EarlyTerminator | None, batch: int, gate_by_gate: bool) -> int:
        """Choose how many frames of each video of a batch to look ahead.

        Args:
            terminator: what ends videos.
            batch: number of videos.
            gate_by_gate: whether nothing that is looked at ahead can turn out otherwise.
        """
        bound = max(1, FRAMES_IN_FLIGHT // batch)
        if terminator is None:
            return bound if gate_by_gate else min(self._longest, bound)
        sure = terminator.min_frames + 1  # no video ends before
        expected = max(self._mean or sure, sure)
        # Steps of equal length that come out where videos usually end.
        step = math.ceil(expected / math.ceil(expected / self._longest))
        return min(max(sure, step) if gate_by_gate else step, bound)


class _Features:
    """Frames of a window, each as far through the network as anything has asked for. No stage runs twice on one."""

    def __init__(self, backbone: StagedBackbone, progress: Progress, video: Tensor) -> None:
        self._backbone = backbone
        self._progress = progress
        self._video = video
        self._carries: dict[int, CarryRow] = {}
        self._rows: list[dict[int, int]] = [{} for _ in range(backbone.num_stages)]
        self._embedded: list[Tensor | None] = [None] * backbone.num_stages

    def reach(self, stage: int, frames: list[int]) -> tuple[Tensor, list[int]]:
        """Return what a stage's gate makes of frames before it decides, and the frames that had to be run for it."""
        rows, embedded = self._rows[stage], self._embedded[stage]
        new = [f for f in frames if f not in rows]
        if new:
            carry = self._backbone.run(stage, self.carry(new) if stage else self._start(new))
            fresh = self._progress.embed(stage, self._backbone.pool(stage, carry))
            rows.update({f: i for i, f in enumerate(new, start=len(rows))})
            self._carries.update((f, (carry, i)) for i, f in enumerate(new))
            self._embedded[stage] = embedded = fresh if embedded is None else torch.cat([embedded, fresh])
            if len(new) == len(frames):
                return fresh, new
        assert embedded is not None
        if len(frames) == 1:
            return embedded[rows[frames[0]]][None], new
        return embedded[[rows[f] for f in frames]], new

    def carry(self, frames: list[int]) -> Carry:
        """Return what the frames' next stage takes; all of them have been through the same."""
        return gather([self._carries[f] for f in frames])

    def row(self, frame: int) -> CarryRow:
        """Return one frame's place in a carry."""
        return self._carries[frame]

    def _start(self, frames: list[int]) -> Carry:
        length = self._video.shape[1]
        return self._backbone.start(self._video[[f // length for f in frames], [f % length for f in frames]])


class _Clip:
    """A batch of videos on its way through windows. Frame `t` of video `b` goes by the number `b * T + t`."""

    def __init__(self, model: StopOrForward, video: Tensor, sample: bool) -> None:
        self.model, self.video, self.sample = model, video, sample
        self.batch, self.frames = video.shape[:2]
        self.stages = model.backbone.num_stages
        self.lookup = model.lookup_for((video.shape[3], video.shape[4]))
        self.progress = Progress(model, self.batch)
        self.position = [0] * self.batch  # the first frame that is not decided
        self.length = [self.frames] * self.batch  # frames until the video ends, as far as is known
        self.stopped_at = [UNSEEN] * (self.batch * self.frames)
        self.gate_logits = self.progress.unknown(self.batch * self.frames, self.stages, 2)
        self.frame_logits = self.progress.unknown(self.batch * self.frames, model.backbone.num_classes)
        # How often each video ran each stage (and embedded its features), asked each gate, and ran the head.
        self.executed = [[0] * (2 * self.stages + 1) for _ in range(self.batch)]
        # Without memory, or where it advances gate by gate, no gate waits for what later ones say.
        self.gate_by_gate = model.state_update == "reached" or not any(self.progress.states)

    def run_window(self, ends: dict[int, int]) -> None:
        """Decide on the videos' frames from where they stand to `ends`."""
        features = _Features(self.model.backbone, self.progress, self.video)
        if self.gate_by_gate:
            spans = {b: self._span(b, end) for b, end in ends.items()}
            self._accept(spans, self._decide_gate_by_gate(features, spans), features)
            return
        ahead = {b: end - self.position[b] for b, end in ends.items()}
        while spans := {
            b: self._span(b, min(self.position[b] + ahead[b], end))
            for b, end in ends.items()
            if self.position[b] < min(end, self.length[b])
        }:
            used = self._decide_up_to_used(features, spans)
            # The next used frame is mostly near; where it is not, look further and further.
            ahead.update((b, 1 if b in used else 2 * ahead[b]) for b in spans)

    def output(self) -> SkipOutput:
        """Answer for videos without a used frame, and put everything together."""
        shape, device = (self.batch, self.frames), self.video.device
        left = {b: furthest for b, furthest in enumerate(self.progress.furthest) if furthest is not None}
        fallback_frame = torch.full((self.batch,), -1, device=device)
        if left:
            frames = [b * self.frames + furthest.frame for b, furthest in left.items()]
            logits = run_to_end(self.model.backbone, list(left.values()))
            self.frame_logits[frames] = logits.to(self.frame_logits.dtype)
            for b, furthest in left.items():
                fallback_frame[b] = furthest.frame
        output = masked_output(
            torch.tensor(self.stopped_at, device=device).view(shape),
            self.gate_logits.unflatten(0, shape),
            self.frame_logits.unflatten(0, shape),
            fallback_frame,
            self.lookup,
            self.model.repeats,
        )
        head = torch.tensor([self.lookup.head], dtype=torch.float64)
        embeds = self.lookup.gates - self.lookup.steps
        costs = torch.cat([self.lookup.per_stage + embeds, self.lookup.steps, head])
        executed = (torch.tensor(self.executed, dtype=torch.float64) * costs).sum(1)
        executed[list(left)] += self.lookup.completion[[furthest.stopped_at for furthest in left.values()]]
        output.speculative_macs = (executed.to(device) - output.macs).clamp(min=0.0)
        return output

    def _decide_up_to_used(self, features: _Features, spans: dict[int, list[int]]) -> dict[int, int]:
        """Decide on spans of frames from the gates' states of now, which hold as far as the first used frame.

        Returns:
            For each video that used one, that frame.
        """
        alive = [f for span in spans.values() for f in span]
        stopped_at = dict.fromkeys(alive, self.stages)
        proposed: list[tuple[dict[int, int], GateState]] = []
        for n in range(self.stages):
            if not alive:
                break
            embedded, videos = self._reach(features, n, alive), self._videos(alive)
            logits, forward, state = self.progress.evaluate(n, videos, embedded, self.sample)
            proposed.append(({f: i for i, f in enumerate(alive)}, state))
            alive = self._stop(n, alive, logits, forward, stopped_at)
        used: dict[int, int] = {}
        for f in alive:
            used.setdefault(f // self.frames, f)
        self._accept(
            {b: span[: used[b] + 1 - span[0]] if b in used else span for b, span in spans.items()}, stopped_at, features
        )
        if used:
            videos = torch.tensor(list(used))
            for n, (rows, state) in enumerate(proposed):
                kept = [rows[f] for f in used.values()]
                self.progress.store(n, videos, tuple(s[kept] for s in state))
        return used

    def _decide_gate_by_gate(self, features: _Features, spans: dict[int, list[int]]) -> dict[int, int]:
        """Decide on spans of frames, all of them by one gate before the next; return where each stopped."""
        alive = [f for span in spans.values() for f in span]
        stopped_at = dict.fromkeys(alive, self.stages)
        for n in range(self.stages):
            if not alive:
                break
            logits, forward = self._gate_in_order(n, self._videos(alive), self._reach(features, n, alive))
            alive = self._stop(n, alive, logits, forward, stopped_at)
        return stopped_at

    def _gate_in_order(self, stage: int, videos: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Ask a gate about several frames of each video, in order, its memory advancing with every one."""
        steps: list[list[int]] = []
        count = Counter[int]()
        for i, b in enumerate(videos.tolist()):
            # Without memory, all frames are one step; else the k-th frames of all videos are one.
            if count[b] == len(steps):
                steps.append([])
            steps[count[b]].append(i)
            count[b] += bool(self.progress.states[stage])
        answers = []
        for step in steps:
            logits, forward, state = self.progress.evaluate(stage, videos[step], embedded[step], self.sample)
            self.progress.store(stage, videos[step], state)
            answers.append((logits, forward))
        back = torch.tensor([i for step in steps for i in step]).argsort()
        return torch.cat([logits for logits, _ in answers])[back], torch.cat([forward for _, forward in answers])[back]

    def _stop(
        self, n: int, frames: list[int], logits: Tensor, forward: Tensor, stopped_at: dict[int, int]
    ) -> list[int]:
        """Write down what gate `n` said of frames; return those that go forward."""
        self.gate_logits[frames, n] = logits.to(self.gate_logits.dtype)
        for f in frames:
            self.executed[f // self.frames][self.stages + n] += 1
        verdicts = list(zip(frames, forward.tolist(), strict=True))
        stopped_at.update((f, n) for f, passes in verdicts if not passes)
        return [f for f, passes in verdicts if passes]

    def _accept(self, spans: dict[int, list[int]], stopped_at: dict[int, int], features: _Features) -> None:
        """Make decisions final, frame by frame up to where a video ends, and run the head on used frames."""
        used = [f for span in spans.values() for f in span if stopped_at[f] == self.stages]
        if used:
            logits = self.model.backbone.head(features.carry(used))
            self.frame_logits[used] = logits.to(self.frame_logits.dtype)
            for f in used:
                self.executed[f // self.frames][-1] += 1
        for step in itertools.zip_longest(*spans.values()):
            frames = [f for f in step if f is not None and f % self.frames < self.length[f // self.frames]]
            if not frames:
                break
            self._remember([f for f in frames if stopped_at[f] < self.stages], stopped_at, features)
            hits = [f for f in frames if stopped_at[f] == self.stages]
            ends = torch.tensor([stopped_at[f] for f in frames], device=self.video.device)
            self.progress.advance(self._videos(frames), ends, self.frame_logits[hits])
            ended = self.progress.ended.tolist() if self.model.terminator is not None else [False] * self.batch
            for f in frames:
                b, t = divmod(f, self.frames)
                self.stopped_at[f], self.position[b] = stopped_at[f], t + 1
                if ended[b]:
                    self.length[b] = t + 1

    def _remember(self, frames: list[int], stopped_at: dict[int, int], features: _Features) -> None:
        # Without a used frame no state has moved under "used", so these stopped where they were first looked at: their
        # carries are of the stage that they stopped after.
        frames = [f for f in frames if not self.progress.answered[f // self.frames]]
        if frames:
            gates = [stopped_at[f] for f in frames]
            self.progress.remember(
                [f // self.frames for f in frames],
                [f % self.frames for f in frames],
                torch.tensor(gates, device=self.video.device),
                self.gate_logits[frames, gates],
                [features.row(f) for f in frames],
            )

    def _reach(self, features: _Features, stage: int, frames: list[int]) -> Tensor:
        embedded, run = features.reach(stage, frames)
        for f in run:
            self.executed[f // self.frames][stage] += 1
        return embedded

    def _span(self, video: int, end: int) -> list[int]:
        start = video * self.frames
        return list(range(start + self.position[video], start + end))

    def _videos(self, frames: list[int]) -> Tensor:
        return torch.tensor([f // self.frames for f in frames], dtype=torch.long)
