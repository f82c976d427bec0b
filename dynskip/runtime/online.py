"""Online: frames as they arrive, of one video or of several in step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynskip import rules
from dynskip._check import check_eval, check_frames, refuse_not_finite, running_parts, settings_of
from dynskip.backbone import Carry
from dynskip.engine import Engine
from dynskip.errors import DynskipError
from dynskip.features import Furthest, run_to_end
from dynskip.output import FrameResult, VideoResult

if TYPE_CHECKING:
    from dynskip.wrapper import StopOrForward

FORMAT = "dynskip session 4"


class Session:
    """Videos that are classified while their frames arrive. `StopOrForward.stream` makes it.

    Args:
        model: a model in evaluation mode.
        batch: number of videos. One frame of each arrives at a time.

    Raises:
        DynskipError: if the batch is not positive, or the model is in training mode.

    Examples:
        >>> backbone = stage_model("test_resnet", num_classes=4)
        >>> model = StopOrForward(backbone, [SimilarityGate(c) for c in backbone.num_features]).eval()
        >>> session = model.stream()
        >>> for frame in torch.ones(3, 1, 3, 64, 64):  # as they arrive
        ...     result = session(frame)
        >>> session.result().frames_used
        tensor([1])
    """

    def __init__(self, model: StopOrForward, batch: int = 1) -> None:
        check_eval(model, "A session")
        if batch < 1:
            raise DynskipError(f"A session needs at least one video; got batch={batch}.")
        self.model = model
        self.batch = batch
        self._modules = [module for part in running_parts(model) for module in part.modules()]
        self._engine = Engine(model, batch)
        with torch.inference_mode(False):  # see `Engine`
            self._macs = torch.zeros(batch, dtype=torch.float64, device=self._engine.device)
            self._used = torch.zeros_like(self._engine.seen)
        self._image_size: tuple[int, int] | None = None
        self._costs = self._macs  # of a frame, by what became of it; set once the frames' size is known

    def __repr__(self) -> str:
        """Show counts."""
        seen, used, ended = (int(x.sum()) for x in (self._engine.seen, self._used, self._engine.ended))
        return f"Session({self.batch} videos: {seen} frames seen, {used} used; {ended} videos ended)"

    @torch.no_grad()
    def __call__(self, frame: Tensor) -> FrameResult:
        """Take the next frame of every video as far as its gates let it.

        Args:
            frame: `(C, H, W)`, or `(B, C, H, W)` for a batch. Frames of ended videos are not looked at.

        Returns:
            What became of the frame.

        Raises:
            DynskipError: if the frame has another shape, size or dtype than expected, or NaN or infinite values.
        """
        if any(module.training for module in self._modules):
            check_eval(self.model, "A session")
        frames = check_frames(frame, self.model.backbone, self.batch)
        engine, stages = self._engine, self.model.backbone.num_stages
        # One wait tells the host all that it has to know before it starts.
        sound = frames.flatten(1).sum(1, dtype=torch.float32).isfinite()
        told = torch.stack([sound, engine.ended, engine.seen]).cpu()
        if not told[0].all():
            refuse_not_finite(frames, "video")
        self._set_size((frames.shape[2], frames.shape[3]))
        rows = (told[1] == 0).nonzero().squeeze(1)
        if len(rows):
            some = frames if len(rows) == self.batch else frames[engine.upload(rows)]
            engine.load(rows, some, told[2, rows])
            engine.advance(rows)
            decisions = engine.decide(rows)
        if len(rows) == self.batch:
            stopped_at, running = decisions.stopped_at.squeeze(1), decisions.running_logits.squeeze(1)
        else:
            stopped_at = torch.full((self.batch,), rules.UNSEEN, device=engine.device)
            running = engine.running()
            if len(rows):
                stopped_at[engine.upload(rows)] = decisions.stopped_at.squeeze(1)
        used = stopped_at == stages
        self._used += used
        macs = self._costs[stopped_at + 1]
        self._macs += macs
        evaluated = torch.arange(stages, device=engine.device) <= stopped_at[:, None]
        return FrameResult(
            stopped_at=stopped_at,
            used=used,
            gate_logits=rules.known(engine.gate_logits.to(engine.dtype), evaluated),
            frame_logits=rules.known(engine.frame_logits, used),
            running_logits=running,
            ended=engine.ended.clone(),
            frame_macs=macs,
            activation=self.model.activation,
        )

    def _set_size(self, size: tuple[int, int]) -> None:
        if self._image_size not in (None, size):
            raise DynskipError(
                "The frame is {}x{} and earlier ones of this session were ".format(*size)
                + "{}x{}. Resize frames to one size, or call `session.reset()` first.".format(*self._image_size)
            )
        if self._image_size is None:
            self._costs = self._engine.upload(self.model.lookup_for(size).by_outcome)
            self._image_size = size

    def reset(self, rows: int | Sequence[int] | Tensor | None = None) -> None:
        """Start new videos.

        Args:
            rows: positions in the batch, or a `(B,)` boolean mask; all by default.

        Raises:
            DynskipError: if there is no such row.
        """
        everything = torch.arange(self.batch)
        try:
            index = everything if rows is None else everything[torch.as_tensor(rows).cpu()].view(-1)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise DynskipError(f"This session has rows 0 to {self.batch - 1}; cannot reset rows {rows}.") from error
        with torch.no_grad():
            self._engine.reset(index)
            self._macs[self._engine.upload(index)] = self._used[self._engine.upload(index)] = 0
        if rows is None:
            self._image_size = None

    @torch.no_grad()
    def result(self) -> VideoResult:
        """Predict from the frames so far. More frames may arrive afterwards.

        If no frame of a video was used, its furthest frame is run to the end, in every call. The cost is part of the
        result's MACs, not of the session's.

        Returns:
            The prediction.
        """
        engine = self._engine
        logits = engine.running()
        macs, fallback_frame = self._macs.clone(), torch.full_like(self._used, -1)
        left = {row: furthest for row, furthest in enumerate(engine.furthest) if furthest is not None}
        if left and self._image_size is not None:
            rows = engine.upload(torch.tensor(list(left)))
            answers = rules.answer(engine.readout, run_to_end(self.model.backbone, list(left.values())))
            logits[rows] = answers.to(logits.dtype)
            fallback_frame[rows] = engine.upload(torch.tensor([f.frame for f in left.values()]))
            completion = self.model.lookup_for(self._image_size).completion
            macs[rows] += engine.upload(completion[[f.stopped_at for f in left.values()]])
        return VideoResult(
            logits=logits,
            frames_used=self._used.clone(),
            frames_seen=engine.seen.clone(),
            fallback_frame=fallback_frame,
            macs=macs,
            speculative_macs=torch.zeros_like(macs),
            activation=self.model.activation,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what another session needs to go on from here: tensors, numbers and names.

        `torch.save` it and `torch.load(..., weights_only=True)`, in another process or on another device.
        """
        state = {
            "format": FORMAT,
            "model": _identity(self.model),
            "image_size": self._image_size,
            "tensors": {name: tensor.clone() for name, tensor in self._tensors().items()},
            "furthest": [None if each is None else _plain(each) for each in self._engine.furthest],
        }
        return {**state, "sha256": _hash(state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another session was. A state that does not fit leaves this session as it is.

        Args:
            state: what `state_dict` returned, from a session with as many videos and an equal model: the same weights,
                thresholds, terminator and settings of gates.

        Raises:
            DynskipError: if the state is damaged, or of another model or batch.
        """
        self._check_state(state)
        for name, tensor in self._tensors().items():
            tensor.copy_(state["tensors"][name])
        device = self._engine.device
        self._engine.furthest = [None if each is None else _furthest(each, device) for each in state["furthest"]]
        self._engine.answered = (self._used > 0).tolist()
        self._image_size = None
        if state["image_size"] is not None:
            self._set_size(state["image_size"])

    def _tensors(self) -> dict[str, Tensor]:
        engine = self._engine
        named = {"macs": self._macs, "used": self._used, "seen": engine.seen, "ended": engine.ended}
        named |= {f"tally {i}": tensor for i, tensor in enumerate(engine.tally)}
        for n, gate in enumerate(engine.states):
            named |= {f"gate {n} state {i}": tensor for i, tensor in enumerate(gate)}
        return named

    def _check_state(self, state: Any) -> None:
        """Refuse a state that was changed since it was saved, or that is of another model or batch."""
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise DynskipError(
                f"This is no state of a session in the format {FORMAT!r}. Pass what `session.state_dict()` returned."
            )
        try:
            whole = _hash({name: value for name, value in state.items() if name != "sha256"}) == state.get("sha256")
        except Exception:  # tensors without data, for one
            whole = False
        if not whole:
            raise DynskipError("The state is damaged or was changed: its SHA-256 differs. Save the session again.")
        for name, wanted in _identity(self.model).items():
            if (given := state["model"].get(name)) != wanted:
                raise DynskipError(
                    f"The state is of another model: its {name} is {given!r} and this model's {wanted!r}. Load it into "
                    "a session of the model that it came from."
                )
        if set(state["tensors"]) != set(self._tensors()):
            raise DynskipError(
                "The state does not have the tensors of this model's gates. Open a session on an equal one."
            )
        for name, wanted in self._tensors().items():
            given = state["tensors"][name]
            if given.shape != wanted.shape or given.dtype != wanted.dtype:
                raise DynskipError(
                    f"The state does not fit this session: its {name} is {given.dtype} {tuple(given.shape)}, expected "
                    f"{wanted.dtype} {tuple(wanted.shape)}. Open a session with the same batch on an equal model."
                )
        if state["image_size"] is not None:
            self.model.lookup_for(state["image_size"])  # raises now, before any tensor is written


def _identity(model: StopOrForward) -> dict[str, Any]:
    """Say what makes two models decide and answer alike, in few numbers. Of each weight, a few values are looked at."""
    samples = [
        (tensor.dequantize() if tensor.is_quantized else tensor).detach().flatten()[:: max(1, tensor.numel() // 16)]
        for part in running_parts(model)
        for name, tensor in part.state_dict().items()
        if isinstance(tensor, Tensor) and not name.endswith("num_batches_tracked")
    ]
    return {
        "stage_names": list(model.backbone.stage_names),
        "state_update": model.state_update,
        "activation": model.activation,
        "consensus": settings_of(model.consensus),
        "forward_threshold": list(model.forward_threshold),
        "gates": [settings_of(gate) for gate in model.gates],
        "terminator": settings_of(model.terminator),
        "order": settings_of(model.order),
        "weights": _hash(torch.cat(samples) if samples else None),
    }


def _hash(value: Any) -> str:
    """Return the SHA-256 of nested values, wherever their tensors are."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            # A copy, for a single number may have strides that a view as bytes refuses.
            plain = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            digest.update(plain.flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, dict | tuple | list):
            digest.update(f"{type(value).__name__} {len(value)}".encode())
            for item in sorted(value.items()) if isinstance(value, dict) else value:
                add(item)
        else:
            digest.update(f"{value!r};".encode())

    add(value)
    return digest.hexdigest()


def _plain(furthest: Furthest) -> dict[str, Any]:
    """Take a frame apart into tensors and numbers."""
    carry = {"values": _to(furthest.carry.values, None), "kinds": furthest.carry.kinds}
    return {"score": furthest.score, "stopped_at": furthest.stopped_at, "frame": furthest.frame, **carry}


def _furthest(plain: dict[str, Any], device: torch.device) -> Furthest:
    gate, carry = plain["stopped_at"], Carry(_to(plain["values"], device), plain["kinds"], 1)
    return Furthest(plain["score"], gate, plain["frame"], gate + 1, carry)


def _to(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, copy=True) if device else value.clone()
    if isinstance(value, tuple | list):
        return type(value)(_to(item, device) for item in value)
    return value
