"""Where videos stand while their frames are run: what all ways of running keep, and the rules that move it on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynskip.backbone import Carry, StagedBackbone
from dynskip.errors import DynskipError
from dynskip.gates import GateState, in_two
from dynskip.output import depth_score, sum_dtype

if TYPE_CHECKING:
    from dynskip.wrapper import StopOrForward

CarryRow = tuple[Carry, int]  # one frame in the carry of a batch
Rows = Tensor | slice  # indices; or a slice, which takes views and costs less


@dataclass
class Furthest:
    """The stopped frame that got furthest. Without a used frame, its video's answer is made from it.

    Attributes:
        score: gate that stopped it plus how nearly that gate forwarded it, in [0, 1).
        frame: its number in the video.
        carry: what the stage after that gate takes, of this frame alone.
    """

    score: float
    frame: int
    carry: Carry

    @property
    def stopped_at(self) -> int:
        """Index of the gate that stopped the frame."""
        return int(self.score)


class Progress:
    """Where videos stand between frames: one row a video, written in place.

    Args:
        model: the model that runs them.
        batch: number of rows.

    Attributes:
        states: for each gate the state that decides on the row's next frame.
        logit_sum: `(B, K)` sum of the logits that the mean is made of.
        counted: `(B,)` number of them.
        last: `(B, K)` logits of the last used frame, which frames that repeat it add once more; zeros where no gate
            has such frames.
        used: `(B,)` frames used.
        seen: `(B,)` frames looked at.
        ended: `(B,)` boolean, videos that the terminator has ended.
        furthest: for each row without a used frame, the stopped frame that got furthest so far.
        answered: for each row, whether a frame has been used.
        dtype: of the model's weights, and so of what is handed out.
        device: where the model is.
    """

    def __init__(self, model: StopOrForward, batch: int) -> None:
        self.model = model
        self._parts = [in_two(gate) for gate in model.gates]
        weight = next(model.parameters())
        self.dtype, self.device = weight.dtype, weight.device
        # Written in place, so every tensor is our own (a gate may hand out one tensor of zeros twice), and a normal
        # one even where the caller is in inference mode now and leaves it later.
        with torch.inference_mode(False), torch.no_grad():
            self.states: list[GateState] = [tuple(s.clone() for s in g.initial_state(batch)) for g in model.gates]
            self._proposed: list[GateState] = [tuple(s.clone() for s in state) for state in self.states]
            self.logit_sum = weight.new_zeros(batch, model.backbone.num_classes, dtype=sum_dtype(weight.dtype))
            self.last = torch.zeros_like(self.logit_sum)
            self.used = torch.zeros(batch, dtype=torch.long, device=weight.device)
            self.counted, self.seen = torch.zeros_like(self.used), torch.zeros_like(self.used)
            self.ended = torch.zeros_like(self.used, dtype=torch.bool)
        self.furthest: list[Furthest | None] = [None] * batch
        self.answered = [False] * batch
        # By `stopped_at`: whether a frame counts as the last used one. Without such gates nothing is spent on it.
        repeats = (*model.repeats, False)
        self._repeats = torch.tensor(repeats, device=weight.device) if any(repeats) else None

    def reset(self, rows: Tensor) -> None:
        """Put rows back to before their first frame."""
        for n, gate in enumerate(self.model.gates):
            self.store(n, rows, gate.initial_state(len(rows)))
        self.logit_sum[rows] = self.last[rows] = 0
        self.used[rows] = self.counted[rows] = self.seen[rows] = 0
        self.ended[rows] = False
        for row in rows.tolist():
            self.furthest[row], self.answered[row] = None, False

    def embed(self, stage: int, pooled: Tensor) -> Tensor:
        """Do what a gate does with pooled features of any frames before it looks at a state."""
        return self._parts[stage][0](pooled)

    def evaluate(
        self, stage: int, rows: Rows, embedded: Tensor, sample: bool = False
    ) -> tuple[Tensor, Tensor, GateState]:
        """Ask a gate about a frame of each of some rows, which may repeat, and change nothing.

        Returns:
            `(M, 2)` logits, `(M,)` boolean whether to go forward, and the state after the frame.
        """
        logits, state = self._parts[stage][1](embedded, tuple(s[rows] for s in self.states[stage]))
        return logits, self.model._draw(stage, logits, sample) > 0.5, state

    def store(self, stage: int, rows: Rows, state: GateState) -> None:
        """Set the state of a gate."""
        _write(self.states[stage], rows, state)

    def gate(self, stage: int, rows: Rows, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Ask a gate about a frame of each of some rows; its state moves on now, or when `commit` says so."""
        logits, forward, state = self.evaluate(stage, rows, self.embed(stage, pooled))
        _write((self.states if self.model.state_update == "reached" else self._proposed)[stage], rows, state)
        return logits, forward

    def commit(self, rows: Rows) -> None:
        """Move all gates' states on to those that `gate` made of the rows' used frames."""
        if self.model.state_update == "used":
            for state, proposed in zip(self.states, self._proposed, strict=True):
                _write(state, rows, tuple(p[rows] for p in proposed))

    def advance(self, rows: Tensor, stopped_at: Tensor, logits: Tensor) -> None:
        """Count a frame of each of some rows, and end videos.

        Args:
            rows: `(M,)` rows, none twice.
            stopped_at: `(M,)` what became of their frames.
            logits: the used frames' logits.
        """
        self.seen[rows] += 1
        used = rows[stopped_at == len(self.states)]
        if len(used):
            self.logit_sum[used] += logits
            self.used[used] += 1
            self.counted[used] += 1
            for row in used.tolist():
                self.furthest[row], self.answered[row] = None, True
        if self._repeats is not None:
            self.last[used] = logits.to(self.last.dtype)
            again = rows[self._repeats[stopped_at] & (self.counted[rows] > 0)]
            self.logit_sum[again] += self.last[again]
            self.counted[again] += 1
        if self.model.terminator is not None:
            self.ended[rows] = self.model.terminator(self.running(rows).softmax(-1), self.seen[rows])

    def unknown(self, *shape: int) -> Tensor:
        """Return NaNs, of the model's dtype, for what has not been computed."""
        return torch.full(shape, math.nan, dtype=self.dtype, device=self.device)

    def running(self, rows: Rows = slice(None)) -> Tensor:
        """Return the rows' mean logits so far; NaN where no frame was used."""
        return self.logit_sum[rows] / self.counted[rows, None]

    def remember(
        self,
        rows: Sequence[int],
        frames: Sequence[int],
        stopped_at: Tensor,
        logits: Tensor,
        carries: Sequence[CarryRow],
    ) -> None:
        """Keep the furthest of the stopped frames of rows that have no used frame.

        Args:
            rows: the row of each stopped frame; earlier frames of a row first.
            frames: their numbers in the videos.
            stopped_at: `(M,)` the gate that stopped each.
            logits: `(M, 2)` what that gate said.
            carries: what that gate's stage made of them.
        """
        if all(self.answered[row] for row in rows):
            return
        scores = depth_score(stopped_at, logits).tolist()
        for row, frame, score, (carry, position) in zip(rows, frames, scores, carries, strict=True):
            best = self.furthest[row]
            if not self.answered[row] and (best is None or score > best.score):
                # A copy of one row, so that the rest of its batch can go.
                alone = carry.select(torch.tensor([position]))
                self.furthest[row] = Furthest(score, frame, alone)


def _write(table: GateState, rows: Rows, new: GateState) -> None:
    for old, value in zip(table, new, strict=True):
        old[rows] = value.to(old.dtype)


def gather(rows: Sequence[CarryRow]) -> Carry:
    """Make one batch of single frames; no copy where they are a whole batch already."""
    parts = []
    for _, group in itertools.groupby(rows, key=lambda row: id(row[0])):
        members = list(group)
        carry, positions = members[0][0], [position for _, position in members]
        if positions == list(range(carry.batch)):
            parts.append(carry)
        else:
            parts.append(carry.select(torch.tensor(positions)))
    return parts[0] if len(parts) == 1 else Carry.cat(parts)


def run_to_end(backbone: StagedBackbone, frames: Sequence[Furthest]) -> Tensor:
    """Run stopped frames through the rest of the stages, and the head.

    Returns:
        `(M, K)` logits.
    """
    order = sorted(range(len(frames)), key=lambda i: frames[i].stopped_at)
    carry: list[Carry] = []
    for n in range(backbone.num_stages):
        carry = [backbone.run(n, Carry.cat(carry))] if carry else []
        carry += [frames[i].carry for i in order if frames[i].stopped_at == n]
    logits = backbone.head(Carry.cat(carry))
    return logits[torch.tensor(order, device=logits.device).argsort()]


def check_eval(model: StopOrForward, what: str) -> None:
    """Refuse to skip with a model in training mode."""
    if model.training:
        raise DynskipError(f"{what} runs a model in evaluation mode; call `model.eval()` first.")
