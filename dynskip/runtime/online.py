"""Online: frames as they arrive, of one video or of several in step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynskip._check import check_frames
from dynskip.backbone import Carry
from dynskip.errors import DynskipError
from dynskip.output import UNSEEN
from dynskip.runtime._state import Furthest, Progress, check_eval, run_to_end

if TYPE_CHECKING:
    from dynskip.wrapper import StopOrForward

FORMAT = "dynskip session 1"


@dataclass
class FrameStep:
    """What happened to one frame of each video of a session.

    Attributes:
        stopped_at: `(B,)` index of the gate that stopped the frame; `N` for used frames, -1 where the video had ended
            before and the frame was not looked at.
        used: `(B,)` boolean, frames that passed every gate.
        gate_logits: `(B, N, 2)` logits (stop, forward), NaN where not evaluated.
        frame_logits: `(B, K)` logits of the frame, NaN unless used.
        logits: `(B, K)` running prediction of the video: mean over its used frames so far, NaN before the first.
        ended: `(B,)` boolean, videos that need no more frames.
        macs: `(B,)` float64 executed for this frame, in the cost table's unit.
    """

    stopped_at: Tensor
    used: Tensor
    gate_logits: Tensor
    frame_logits: Tensor
    logits: Tensor
    ended: Tensor
    macs: Tensor

    @property
    def probabilities(self) -> Tensor:
        """`(B, K)` running class probabilities, NaN before the first used frame."""
        return self.logits.softmax(-1)


@dataclass
class Prediction:
    """What a session has to say about its videos.

    Attributes:
        logits: `(B, K)` mean over the used frames, or the fallback frame's; NaN for videos without any frame.
        used: `(B,)` number of frames used.
        seen: `(B,)` number of frames looked at.
        fallback_frame: `(B,)` where no frame was used, the frame that was run to the end in their place; else -1.
        macs: `(B,)` float64 executed cost of each video, the fallback included.
    """

    logits: Tensor
    used: Tensor
    seen: Tensor
    fallback_frame: Tensor
    macs: Tensor

    @property
    def probabilities(self) -> Tensor:
        """`(B, K)` class probabilities."""
        return self.logits.softmax(-1)


class Session:
    """Videos that are classified while their frames arrive. Made by `StopOrForward.stream`.

    Args:
        model: a model in evaluation mode.
        batch: number of videos; a frame of each arrives at a time.

    Raises:
        DynskipError: if the batch is not positive, or the model is in training mode.
    """

    def __init__(self, model: StopOrForward, batch: int = 1) -> None:
        check_eval(model, "A session")
        if batch < 1:
            raise DynskipError(f"A session needs at least one video; got batch={batch}.")
        self.model = model
        self.batch = batch
        self._progress = Progress(model, batch)
        with torch.inference_mode(False):  # see `Progress`
            self._macs = torch.zeros(batch, dtype=torch.float64, device=self._progress.device)
        self._image_size: tuple[int, int] | None = None
        self._costs = self._macs  # of a frame by what became of it, once the frames' size is known

    def __repr__(self) -> str:
        """Say where the videos stand."""
        progress = self._progress
        seen, used, ended = (int(count.sum()) for count in (progress.seen, progress.used, progress.ended))
        return f"Session({self.batch} videos: {seen} frames seen, {used} used; {ended} videos ended)"

    @torch.no_grad()
    def __call__(self, frame: Tensor) -> FrameStep:
        """Take the next frame of every video as far as its gates let it.

        Args:
            frame: `(C, H, W)`, or `(B, C, H, W)` for a batch. Frames of ended videos are not looked at.

        Returns:
            What became of it.

        Raises:
            DynskipError: if the frame has another shape, size or dtype than expected, or NaN or infinite values.
        """
        check_eval(self.model, "A session")
        frames = frame[None] if isinstance(frame, Tensor) and frame.ndim == 3 and self.batch == 1 else frame
        check_frames(frames, self.model.backbone, self.batch)
        self._set_size((frames.shape[2], frames.shape[3]))
        progress, backbone = self._progress, self.model.backbone
        stages = backbone.num_stages
        stopped_at = torch.full((self.batch,), UNSEEN, device=frames.device)
        gate_logits = progress.unknown(self.batch, stages, 2)
        frame_logits = progress.unknown(self.batch, backbone.num_classes)
        rows = (~progress.ended).nonzero().squeeze(1)
        if len(rows):
            used, logits = self._run(rows, frames if len(rows) == self.batch else frames[rows], stopped_at, gate_logits)
            frame_logits[used] = logits.to(progress.dtype)
            progress.advance(rows, stopped_at[rows], frame_logits[used])
        macs = self._costs[stopped_at + 1]
        self._macs += macs
        running = progress.running().to(progress.dtype)
        ended = progress.ended.clone()
        return FrameStep(stopped_at, stopped_at == stages, gate_logits, frame_logits, running, ended, macs)

    def _run(self, alive: Tensor, frames: Tensor, stopped_at: Tensor, gate_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Run stages and gates on frames of the rows `alive`; return the rows that get to the end, and their logits."""
        progress, backbone = self._progress, self.model.backbone
        carry = backbone.start(frames)
        for n in range(backbone.num_stages):
            carry = backbone.run(n, carry)
            rows = slice(None) if len(alive) == self.batch else alive
            logits, forward = progress.gate(n, rows, backbone.pool(n, carry))
            gate_logits[rows, n] = logits.to(gate_logits.dtype)
            if forward.all():
                continue
            keep, stop = forward.nonzero().squeeze(1), (~forward).nonzero().squeeze(1)
            stopped_at[alive[stop]] = n
            self._remember(n, alive[stop], gate_logits[alive[stop], n], carry, stop)
            alive = alive[keep]
            if not len(keep):
                return alive, gate_logits.new_empty(0, backbone.num_classes)
            carry = carry.select(keep)
        stopped_at[alive] = backbone.num_stages
        progress.commit(slice(None) if len(alive) == self.batch else alive)
        return alive, backbone.head(carry)

    def _remember(self, stage: int, rows: Tensor, logits: Tensor, carry: Carry, positions: Tensor) -> None:
        progress = self._progress
        carries = [(carry, position) for position in positions.tolist()]
        frames = progress.seen[rows].tolist()
        stages = torch.full_like(rows, stage)
        progress.remember(rows.tolist(), frames, stages, logits, carries)

    def _set_size(self, size: tuple[int, int]) -> None:
        if size == self._image_size:
            return
        if self._image_size is not None:
            raise DynskipError(
                "The frame is {}x{} and earlier ones of this session were ".format(*size)
                + "{}x{}. Resize frames to one size, or call `session.reset()` first.".format(*self._image_size)
            )
        self._costs = self.model.lookup_for(size).by_outcome.to(self._macs.device)
        self._image_size = size

    def reset(self, rows: int | Sequence[int] | Tensor | None = None) -> None:
        """Start new videos.

        Args:
            rows: positions in the batch, or a `(B,)` boolean mask; by default all.

        Raises:
            DynskipError: if there is no such row.
        """
        everything = torch.arange(self.batch, device=self._macs.device)
        try:
            index = everything if rows is None else everything[torch.as_tensor(rows, device=everything.device)].view(-1)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise DynskipError(f"This session has rows 0 to {self.batch - 1}; cannot reset rows {rows}.") from error
        with torch.no_grad():
            self._progress.reset(index)
            self._macs[index] = 0.0
        if rows is None:
            self._image_size = None

    @torch.no_grad()
    def result(self) -> Prediction:
        """Predict from the frames so far; frames may go on arriving afterwards.

        A video of which no frame was used yet has its furthest frame run to the end, every time this is called; its
        cost is in the prediction's MACs and not in the session's.

        Returns:
            The prediction.
        """
        progress = self._progress
        logits = progress.running()
        macs, fallback_frame = self._macs.clone(), torch.full_like(progress.used, -1)
        left = [(row, furthest) for row, furthest in enumerate(progress.furthest) if furthest is not None]
        if left and self._image_size is not None:
            rows, frames = [row for row, _ in left], [furthest for _, furthest in left]
            logits[rows] = run_to_end(self.model.backbone, frames).to(logits.dtype)
            fallback_frame[rows] = torch.tensor([f.frame for f in frames], device=macs.device)
            completion = self.model.lookup_for(self._image_size).completion
            macs[rows] += completion[[f.stopped_at for f in frames]].to(macs.device)
        return Prediction(logits.to(progress.dtype), progress.used.clone(), progress.seen.clone(), fallback_frame, macs)

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on elsewhere: tensors, numbers and names, no objects.

        `torch.save` it and `torch.load(..., weights_only=True)`, in another process or on another device.
        """
        return {
            "format": FORMAT,
            "stage_names": list(self.model.backbone.stage_names),
            "state_update": self.model.state_update,
            "image_size": self._image_size,
            "tensors": {name: tensor.clone() for name, tensor in self._tensors().items()},
            "furthest": [None if f is None else _plain(f) for f in self._progress.furthest],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another session stood. A state that does not fit leaves this session as it was.

        Args:
            state: what `state_dict` returned, of a session with as many videos and an equal model.

        Raises:
            DynskipError: if the state is damaged, or of another model or batch.
        """
        furthest, size = self._check_state(state)
        for name, tensor in self._tensors().items():
            tensor.copy_(state["tensors"][name])
        self._progress.furthest = furthest
        self._progress.answered = (self._progress.used > 0).tolist()
        self._image_size = None
        if size is not None:
            self._set_size(size)

    def _tensors(self) -> dict[str, Tensor]:
        progress = self._progress
        named = {"macs": self._macs, "logit_sum": progress.logit_sum, "last": progress.last, "used": progress.used}
        named |= {"counted": progress.counted, "seen": progress.seen, "ended": progress.ended}
        for n, gate in enumerate(progress.states):
            named |= {f"gate {n} state {i}": tensor for i, tensor in enumerate(gate)}
        return named

    def _check_state(self, state: Any) -> tuple[list[Furthest | None], tuple[int, int] | None]:
        """Refuse a state that is not of such a session; return its parts that are not plain tensors."""
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise DynskipError("This is no state of a session. Pass what `session.state_dict()` returned.")
        here = {"stage_names": list(self.model.backbone.stage_names), "state_update": self.model.state_update}
        for name, wanted in here.items():
            if state.get(name) != wanted:
                raise DynskipError(
                    f"The state is of another model: its {name} is {state.get(name)!r} and this model's {wanted!r}."
                )
        tensors, wanted_tensors = state.get("tensors"), self._tensors()
        if not isinstance(tensors, dict) or set(tensors) != set(wanted_tensors):
            raise DynskipError("The state has not the tensors that this model's gates have; save it again.")
        for name, tensor in wanted_tensors.items():
            _check_tensor(name, tensors[name], tensor)
        furthest = state.get("furthest")
        used, seen = tensors["used"].tolist(), tensors["seen"].tolist()
        if not isinstance(furthest, list) or [f is not None for f in furthest] != [
            u == 0 < s for u, s in zip(used, seen, strict=True)
        ]:
            raise DynskipError("The state does not hold the furthest frame of its videos without used frames.")
        try:
            size = None if state["image_size"] is None else (int(state["image_size"][0]), int(state["image_size"][1]))
            with torch.no_grad():
                restored = [None if f is None else self._restore(f) for f in furthest]
        except Exception as error:
            raise DynskipError(f"The state is damaged: a stored frame cannot be gone on with ({error}).") from error
        if size is None and any(seen):
            raise DynskipError("The state is damaged: it has frames and no image size.")
        if size is not None:
            self.model.lookup_for(size)  # so that nothing is left to fail once tensors are written
        return restored, size

    def _restore(self, plain: dict[str, Any]) -> Furthest:
        backbone = self.model.backbone
        carry = Carry(_to(plain["values"], self._macs.device), plain["kinds"], 1)
        furthest = Furthest(float(plain["score"]), int(plain["frame"]), carry)
        if not 0 <= furthest.stopped_at < backbone.num_stages or furthest.frame < 0:
            raise ValueError(f"no frame stops at gate {furthest.stopped_at}")
        # The surest test of a carry is to go on with it; it happens once, and only where no frame has been used yet.
        if not run_to_end(backbone, [furthest]).isfinite().all():
            raise ValueError("its logits are not finite")
        return furthest


def _plain(furthest: Furthest) -> dict[str, Any]:
    """Take a frame apart into tensors and numbers."""
    values = _to(furthest.carry.values, None)
    carry = {"values": values, "kinds": furthest.carry.kinds}
    return {"score": furthest.score, "frame": furthest.frame, **carry}


def _to(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, copy=True) if device else value.clone()
    if isinstance(value, tuple | list):
        return type(value)(_to(item, device) for item in value)
    return value


def _check_tensor(name: str, given: Any, wanted: Tensor) -> None:
    if not isinstance(given, Tensor) or given.shape != wanted.shape or given.dtype != wanted.dtype:
        got = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise DynskipError(
            f"The state does not fit this session: its {name} is {got}, expected {wanted.dtype} "
            f"{tuple(wanted.shape)}. Open a session with the same batch on an equal model."
        )
    if not given.isfinite().all():
        raise DynskipError(f"The state is damaged: its {name} has NaN or infinite values.")
