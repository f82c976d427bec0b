"""Frames in flight: the only loop over stages and gates. Online, clip and streams are ways to run it.

`run` takes frames through stages, `ask` says which of them go on according to the gates' current states, `decide` makes
decisions final, frame by frame and in order, and `learn` tells the host. Tables are on the model's device: only `ask`
and `learn` wait for it.

Features do not depend on gates; only the gates' states link frames. So stages may run ahead on frames that the current
states let through. Where a used frame changes the states, gates decide again on features that are already there. No
stage runs twice on a frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dynskip import rules
from dynskip._tables import at_column, is_range, put, take
from dynskip.backbone import lay_out
from dynskip.features import Features, Furthest
from dynskip.gates import GateState, parts_of
from dynskip.scan import Group, scan

if TYPE_CHECKING:
    from dynskip.flops import FLOPsLookup


class Decisions(NamedTuple):
    """What `Engine.decide` decided about `R` videos."""

    videos: Tensor  # `(R,)` the rows, on the host
    stopped_at: Tensor  # `(R, W)`; -1 where that is not decided, or the video had ended
    running_logits: Tensor  # `(R, W, K)` running predictions after each frame
    # `(R, W + 1)` what the host has to know. Of each frame: `stopped_at` if decided, else `N + 2` plus the gate that
    # would stop it now. Last, whether the video has ended.
    codes: Tensor


class Engine:
    """Frames in flight, up to `window` of each video. The number of frame `w` of video `v` is `v * window + w`.

    Args:
        model: a `StopOrForward` or `EarlyExit`.
        videos: number of rows `V`.
        window: most frames `W` of a video in flight.
        counts: count what is executed, for `executed`.
        sample: draw decisions; only with a window of 1.
    """

    def __init__(self, model: Any, videos: int, window: int = 1, *, counts: bool = False, sample: bool = False) -> None:
        self.model, self.backbone, self.counts, self.sample = model, model.backbone, counts, sample
        self.videos, self.stages = videos, model.backbone.num_stages
        self.gates = list(model.deciders)
        self.parts = [parts_of(gate) for gate in self.gates]
        self.reached = model.state_update == "reached"
        # Whether a gate's first answer is final: no gate has memory, or no memory waits for later gates.
        self.in_order = self.reached or not any(part.has_memory for part in self.parts)
        weight = next(model.parameters())
        self.dtype, self.device = weight.dtype, weight.device
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.tie = rules.tie(self.dtype)
        self.readout = model.readout
        # Tables are written in place, so they are copies, and no inference tensors even in a caller's inference mode.
        with torch.inference_mode(False), torch.no_grad():
            # For each gate, the state that decides on each video's next frame.
            self.states: list[GateState] = [tuple(s.clone() for s in g.initial_state(videos)) for g in self.gates]
            parts = self._nothing_counted(videos)  # which may be views of one tensor
            self.tally = tuple(part.clone(memory_format=torch.contiguous_format) for part in parts)
            self.seen = torch.zeros(videos, dtype=torch.long, device=self.device)  # frames decided
            self.ended = torch.zeros(videos, dtype=torch.bool, device=self.device)
            # How often each video ran each stage and the head; and each gate's step, per video and per frame.
            self.ran = torch.zeros(videos, self.stages + 1, dtype=torch.float64)
            self.judged = torch.zeros(videos, self.stages, 2, dtype=torch.float64)
        self.answered = [False] * videos  # whether a frame was used
        self.furthest: list[Furthest | None] = [None] * videos  # of the stopped frames; `None` once one was used
        self.open(window)

    def open(self, window: int) -> None:
        """Make room for new frames. Those in flight are forgotten; what videos remember is kept."""
        self.window, frames = window, self.videos * window
        bounds = rules.bounds(self.model.forward_threshold).to(self.wide).expand(frames, -1)
        self._bounds = rules.drawn_bounds(bounds) if self.sample else bounds
        self.bounds = self.upload(bounds[0])
        with torch.inference_mode(False), torch.no_grad():
            self.gate_logits = torch.zeros(frames, self.stages, 2, dtype=self.wide, device=self.device)
            self.frame_logits = torch.zeros(frames, self.backbone.num_classes, dtype=self.dtype, device=self.device)
            # What the consensus takes of the frames.
            width = self.readout.consensus.embedded_features
            self.frame_values = self.frame_logits.new_zeros(frames, width) if width else self.frame_logits
            # For each gate, the state after the frame in flight, if that is used. Only with one frame in flight.
            self.proposed = [tuple(s.clone() for s in state) for state in self.states] if window == 1 else []
            self.pending = torch.zeros(frames, dtype=torch.bool)  # on the host: waits for a decision
            self._number = torch.zeros(frames, dtype=torch.long)  # of the frame in its video
            self.features = Features(self.backbone, self.pending)
            self._margins = torch.zeros(frames, self.stages, dtype=self.wide)  # on the host, of gates that were asked
        self._embedded: list[Tensor | None] = [None] * self.stages

    def reset(self, videos: Tensor) -> None:
        """Start new videos in some rows."""
        index = self.upload(videos)
        for gate, state in zip(self.gates, self.states, strict=True):
            for old, new in zip(state, gate.initial_state(len(videos)), strict=True):
                old[index] = new
        for old, new in zip(self.tally, self._nothing_counted(len(videos)), strict=True):
            old[index] = new
        for table in (self.seen, self.ended):
            table[index] = 0
        self.ran[videos], self.judged[videos] = 0.0, 0.0
        for row in videos.tolist():
            self.furthest[row], self.answered[row] = None, False

    def _nothing_counted(self, videos: int) -> rules.Tally:
        zeros = torch.zeros(videos, self.backbone.num_classes, dtype=torch.float64, device=self.device)
        return rules.nothing_counted(self.readout, zeros)

    def running(self) -> Tensor:
        """Return the running prediction of every video, `(V, K)`."""
        return rules.running(self.readout, self.tally, self.wide).to(self.dtype)

    # Features

    def load(self, frames: Tensor, images: Tensor, numbers: Tensor) -> None:
        """Take `(M,)` frames in: their images `(M, C, H, W)`, and their numbers in their videos `(M,)`."""
        self.features.load(frames, images)
        self._number[frames] = numbers

    def run(self, first: int, last: int, frames: Tensor) -> None:
        """Run stages `first` to `last`, where the head is stage `N`, on `(M,)` frames that are in front of `first`."""
        carry, frames = self.features.gather(frames, self.device)
        index = self._index(frames, self.videos * self.window)
        if first == 0 and len(self.features.pending) > 1:
            carry = lay_out(self.backbone, carry)
        for n in range(first, min(last + 1, self.stages)):
            carry = self.backbone.run(n, carry)
            embedded = self.parts[n].embed(self.backbone.pool(n, carry))
            final = self.in_order or self.window == 1 or not self.parts[n].has_memory
            if not final:
                self._keep_embedded(n, index, embedded)
            if final or last < self.stages:
                self._judge(n, frames, index, embedded)
        if last == self.stages:
            logits = self.backbone.head(carry).to(self.dtype)
            put(self.frame_logits, index, logits)
            if self.frame_values is not self.frame_logits:
                put(self.frame_values, index, rules.embed(self.readout, logits))
        if self.counts:
            self.ran[:, first : last + 1] += self._videos(frames).bincount(minlength=self.videos)[:, None]
        self.features.move(frames, carry, last + 1)

    def _keep_embedded(self, stage: int, index: Tensor | None, embedded: Tensor) -> None:
        if index is None:
            self._embedded[stage] = embedded
            return
        table = self._embedded[stage]
        if table is None:
            shape = (self.videos * self.window, *embedded.shape[1:])
            with torch.inference_mode(False):
                self._embedded[stage] = table = torch.zeros(shape, dtype=embedded.dtype, device=self.device)
        table[index] = embedded.to(table.dtype)

    def _judge(self, stage: int, frames: Tensor, index: Tensor | None, embedded: Tensor) -> None:
        """Ask a gate about frames, from its current states, and keep its logits."""
        part, videos = self.parts[stage], self._videos(frames)
        if self.reached and part.has_memory and len(columns := (frames % self.window).unique()) > 1:
            # Its memory advances from frame to frame: ask about the frames of each video one after the other.
            for column in columns.tolist():
                chosen = (frames % self.window == column).nonzero().squeeze(1)
                at = self.upload(chosen)
                self._judge(stage, frames[chosen], self.upload(frames[chosen]), embedded[at])
            return
        shared = len(frames) // self.window  # videos, where all their frames are asked about
        if (
            part.broadcasts
            and self.window > 1
            and frames[0] % self.window == 0
            and is_range(frames - frames[0], shared * self.window)  # then in order, too
        ):
            videos = videos[:: self.window]
            state = self._states(stage, self._index(videos, self.videos))
            logits = part.step(embedded.unflatten(0, (shared, self.window)), state)[0].flatten(0, 1)
        else:
            rows, shared = index if self.window == 1 else self.upload(videos), 0
            logits, new = part.step(embedded, self._states(stage, rows))
            if self.reached or self.window == 1:
                self._keep_state((self.states if self.reached else self.proposed)[stage], rows, new)
        put(self.gate_logits[:, stage], index, logits.to(self.wide))
        self.tie = max(self.tie, rules.tie(logits.dtype))
        if self.counts:
            often = videos.bincount(minlength=self.videos)
            self.judged[:, stage] += torch.stack([often, often * (self.window if shared else 1)], 1)

    def ask(self, first: int, last: int, frames: Tensor) -> Tensor:
        """Say on the host which of `(M,)` frames pass gates `first` to `last`, from the current states. Waits once."""
        index = self._index(frames, self.videos * self.window)
        margins = rules.margins(take(self.gate_logits, index)[:, first : last + 1]).cpu()
        put(self._margins[:, first : last + 1], None if index is None else frames, margins)
        bounds = self._bounds[frames] if self.sample else self._bounds[:1]
        going: Tensor = rules.forwards(margins, bounds[:, first : last + 1]).all(1)
        return going

    def advance(self, frames: Tensor, stages: int = 0) -> None:
        """Take `(M,)` frames as far as the gates' current states let them; `stages` is as in `LookAhead`."""
        for first in range(self.stages + 1):
            here = self.features.depth[frames] == first
            if not here.any():
                continue
            some, last = frames[here], min(first + stages, self.stages)
            self.run(first, last, some)
            if last < self.stages:
                going = torch.ones(len(frames), dtype=torch.bool)
                going[here] = self.ask(first, last, some)
                frames = frames[going]

    # Decisions

    def decide(self, videos: Tensor) -> Decisions:
        """Make decisions on pending frames of `(R,)` rows final. Does not wait.

        In each video, this ends at the first frame that lacks a stage. With a window of 1, the host knows the verdicts
        already, and all frames are decided.
        """
        shape, rows = (self.videos, self.window), self._index(videos, self.videos)
        known = torch.where(self.pending, self.features.depth, self.stages + 2).view(shape)
        known = known if rows is None else known[videos]
        if self.window == 1:
            stop = rules.stopped(rules.forwards(self._margins[videos], self._bounds[videos]))[:, None]
            stop = torch.minimum(stop, known - 1)
            decisions = self._count(videos, rows, self.upload(stop), None)
            used = videos[(stop == self.stages).squeeze(1)]
            if len(used) and not self.in_order:
                index = self._index(used, self.videos)
                for n, proposed in enumerate(self.proposed):
                    self._keep_state(self.states[n], index, tuple(take(part, index) for part in proposed))
            self._remember(videos, stop, videos[:, None])
            self.pending[videos] = False
            return decisions
        on_device, groups = self.upload(known), [] if self.in_order else self.groups(rows)
        said = take(self.gate_logits.unflatten(0, shape), rows)
        if self.in_order:
            stop = rules.stopped(rules.forwards(rules.margins(said), self.bounds))
            new = (stop < on_device) & (on_device < self.stages + 2)
        else:
            stop, new, said = scan(groups, said, self.bounds, on_device, known)
        decisions = self._count(videos, rows, stop, new)  # before anything is written: a terminator may raise
        for group in groups:
            self.judged[videos[:, None], torch.tensor(group.gates)] += group.asked
            for n, state in group.states().items():
                self._keep_state(self.states[n], rows, state)
        if groups:
            put(self.gate_logits.unflatten(0, shape), rows, said)
        return decisions

    def groups(self, rows: Tensor | None) -> list[Group]:
        """Return the gates with memory; on a GPU as one group, where they allow it. That copies weights."""
        shape, tables = (self.videos, self.window), [table for table in self._embedded if table is not None]
        find = getattr(type(self.gates[0]), "step_together", None)
        step = find(self.gates) if find is not None and self.device.type != "cpu" else None
        if step is not None and len(tables) == self.stages:
            embedded = torch.stack([table.unflatten(0, shape) for table in tables])
            columns = (embedded if rows is None else embedded[:, rows]).unbind(2)
            states = [self._states(n, rows) for n in range(self.stages)]
            state = tuple(torch.stack(parts) for parts in zip(*states, strict=True))
            return [Group(list(range(self.stages)), step, columns, state, together=True)]
        return [
            Group([n], self.parts[n].step, take(table.unflatten(0, shape), rows).unbind(1), self._states(n, rows))
            for n, table in enumerate(self._embedded)
            if table is not None
        ]

    def _count(self, videos: Tensor, rows: Tensor | None, stop: Tensor, new: Tensor | None) -> Decisions:
        """Count frames in their videos' answers (those that are `new`, or all), and end videos."""
        stopped_at = stop if new is None else torch.where(new, stop, rules.UNSEEN)
        values = take(self.frame_values.unflatten(0, (self.videos, self.window)), rows)
        before = tuple(take(table, rows) for table in self.tally)
        after = rules.count(self.readout, stopped_at, values, before)
        seen = take(self.seen, rows)[:, None] + (1 if new is None else new.cumsum(1))
        running, ended = rules.running_after(self.readout, after, self.wide), take(self.ended, rows)
        ends, last = None, self.window - 1
        if self.model.terminator is not None:
            ends = rules.ends(self.model.terminator, running, seen, self.readout.activation)
            ends = ends if new is None else ends & new
            ended = ended | ends.any(1)
        if ends is not None and new is not None:
            stopped_at = rules.unseen_after(ends, stopped_at)
            at = torch.where(ends.any(1), ends.long().argmax(1), last)[:, None]
            tables = [at_column(table, at) for table in (*after, seen)]
        else:
            tables = [table[:, last] for table in (*after, seen)]
        for table, value in zip((*self.tally, self.seen, self.ended), (*tables, ended), strict=True):
            put(table, rows, value)
        codes = stopped_at if new is None else torch.where(new, stopped_at, stop + self.stages + 2)
        codes = torch.cat([codes, ended[:, None].long()], 1)
        return Decisions(videos, stopped_at, running.to(self.dtype), codes)

    def learn(self, decisions: Decisions) -> tuple[Tensor, Tensor, Tensor]:
        """Tell the host what was decided. Waits once, and once more where a video has no used frame yet.

        Returns:
            On the host: `(R, W)` what became of each frame (-1 where not decided, or the video had ended); `(R, W)`
            boolean, pending frames that lack a stage, from the current states; `(R,)` boolean, videos that have ended.
        """
        videos, told = decisions.videos, decisions.codes.cpu()
        codes, ended = told[:, :-1], told[:, -1].bool()
        if self.window == 1:
            return codes, torch.zeros_like(codes, dtype=torch.bool), ended
        frames = videos[:, None] * self.window + torch.arange(self.window)
        pending = self.pending[frames]
        final = pending & (codes <= self.stages)
        stopped_at = torch.where(final, codes, rules.UNSEEN)
        lacking = pending & ~final & ~ended[:, None] & (codes - (self.stages + 2) >= self.features.depth[frames])
        has_used = (stopped_at == self.stages).any(1)
        if not (has_used | torch.tensor(self.answered)[videos]).all():
            self._margins[frames] = rules.margins(self.gate_logits[self.upload(frames)]).cpu()
        self._remember(videos, stopped_at, frames)
        self.pending[frames[final | (pending & ended[:, None])]] = False
        return stopped_at, lacking, ended

    def _remember(self, videos: Tensor, stopped_at: Tensor, frames: Tensor) -> None:
        """Keep the furthest of the frames that stopped, of videos without a used frame."""
        gate = stopped_at.clamp(0, self.stages - 1)[..., None]
        scores = rules.score(stopped_at, self._margins[frames].gather(2, gate).squeeze(2)).tolist()
        for row, gates, own in zip(videos.tolist(), stopped_at.tolist(), scores, strict=True):
            if self.answered[row] or self.stages in gates:
                self.answered[row], self.furthest[row] = True, None
                continue
            best, found = self.furthest[row], None
            top = best.score if best is not None else None
            for t, score in enumerate(own):
                if gates[t] >= 0 and (top is None or rules.further(score, top, self.tie)):
                    top, found = score, t
            if top is not None and found is not None:
                frame = row * self.window + found
                depth = min(int(self.features.depth[frame]), self.stages)
                carry = self.features.row(frame, self.device)
                self.furthest[row] = Furthest(top, gates[found], int(self._number[frame]), depth, carry)

    def executed(self, video: int, lookup: FLOPsLookup) -> float:
        """Return the cost of all that ran for a video since it was reset, in the table's unit."""
        stages = torch.cat([lookup.per_stage + lookup.gates - lookup.steps, lookup.steps.new_tensor([lookup.head])])
        steps = torch.stack([lookup.shared, lookup.steps - lookup.shared], 1)
        ran, judged = self.ran[video], self.judged[video]
        # An unknown cost, NaN, counts only where something ran.
        return float((ran * stages)[ran > 0].sum() + (judged * steps)[judged > 0].sum())

    def _videos(self, frames: Tensor) -> Tensor:
        return frames.div(self.window, rounding_mode="floor") if self.window > 1 else frames

    def _index(self, rows: Tensor, count: int) -> Tensor | None:
        """Return rows as an index on the device; `None` if they are all `count` rows of a table, in order."""
        return None if is_range(rows, count) else self.upload(rows)

    def _keep_state(self, table: GateState, rows: Tensor | None, state: GateState) -> None:
        for old, new in zip(table, state, strict=True):
            put(old, rows, new.to(old.dtype))

    def _states(self, stage: int, rows: Tensor | None) -> GateState:
        return tuple(take(state, rows) for state in self.states[stage])

    def upload(self, values: Tensor) -> Tensor:
        """Copy a tensor to the device, without waiting."""
        return values.to(self.device, non_blocking=True)
