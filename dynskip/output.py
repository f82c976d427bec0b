"""What a pass over videos gives: results of a frame, results of a video, and a batch of both.

One quantity has one name everywhere. `used` is of a frame, `frames_used` of a video; `macs` are of a video,
`frame_macs` of a frame; `logits` are a video's answer, `running_logits` its answer so far, `frame_logits` a frame's.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynskip import rules
from dynskip._check import present
from dynskip.activation import Activation, confidence, named_classes, probabilities
from dynskip.consensus import Readout
from dynskip.flops import FLOPsLookup


@dataclass
class FrameResult:
    """What became of a frame of a stream, or of one frame of each of a session's `B` videos.

    Shapes are those of a session. The result of a stream has no `B`, and numbers in place of `(B,)` tensors.

    Attributes:
        stopped_at: `(B,)` index of the gate that stopped the frame; `N` for used frames, -1 for unseen ones: their
            video had ended before.
        used: `(B,)` boolean, frames that passed every gate.
        gate_logits: `(B, N, 2)` logits (stop, forward), NaN where not evaluated.
        frame_logits: `(B, K)` logits of the frame, NaN unless used.
        running_logits: `(B, K)` running prediction of the video, NaN before the first used frame.
        ended: `(B,)` boolean, videos that need no more frames.
        frame_macs: `(B,)` float64 executed for this frame, in the cost table's unit.
        key: name of the stream; `None` in sessions.
        frame: the frame's number in its stream; `None` in sessions.
        activation: the model's head activation, which makes probabilities of logits.
        image: the frame itself, as its source gave it. Only a `StreamServer` sets it.
        lag: seconds from the coming of the frame to its decision. Only a `StreamServer` sets it.
    """

    stopped_at: Any
    used: Any
    gate_logits: Tensor
    frame_logits: Tensor
    running_logits: Tensor
    ended: Any
    frame_macs: Any
    key: Hashable = None
    frame: int | None = None
    activation: Activation = "softmax"
    image: Any = None
    lag: float | None = None

    @property
    def running_probabilities(self) -> Tensor:
        """`(B, K)` running class probabilities, NaN before the first used frame."""
        return probabilities(self.running_logits, self.activation)


@dataclass
class VideoResult:
    """The answer for a stream, or for each of a session's `B` videos.

    Shapes are those of a session. The result of a stream has no `B`, and numbers in place of `(B,)` tensors.

    Attributes:
        logits: `(B, K)` what the used frames make (their mean, or another consensus), or the fallback frame alone; NaN
            where neither exists.
        frames_used: `(B,)` number of frames used.
        frames_seen: `(B,)` number of frames looked at.
        fallback_frame: `(B,)` where no frame was used, the stopped frame that was run to the end; else -1.
        macs: `(B,)` float64 executed cost of the video, the fallback included.
        speculative_macs: `(B,)` float64 cost of what ran ahead of the decisions, in vain; not in `macs`.
        key: name of the stream; `None` in sessions.
        error: why the stream failed, else `None`. The other fields then tell how far it had got.
        activation: the model's head activation, which makes probabilities of logits.
    """

    logits: Tensor
    frames_used: Any
    frames_seen: Any
    fallback_frame: Any
    macs: Any
    speculative_macs: Any
    key: Hashable = None
    error: Exception | None = None
    activation: Activation = "softmax"

    @property
    def probabilities(self) -> Tensor:
        """`(B, K)` class probabilities."""
        return probabilities(self.logits, self.activation)

    def row(self, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """Return the answer for one video as plain values, for a table.

        Args:
            class_names: the model's; by default classes are called by their numbers.

        Returns:
            `label`, the most probable class, or with a sigmoid all that hold; `probability`, how sure the answer is;
            `used` and `seen`, numbers of frames; `fallback`, whether no frame was used; `gmacs`, 10^9 executed
            multiply-adds.
        """
        (given,) = self.probabilities.view(-1, self.logits.shape[-1])
        named = named_classes(given, self.activation)
        return {
            "label": ", ".join(class_names[index] if class_names else str(index) for index in named),
            "probability": float(confidence(given, self.activation)),
            "used": int(self.frames_used),
            "seen": int(self.frames_seen),
            "fallback": bool(self.fallback_frame >= 0),
            "gmacs": float(self.macs) / 1e9,
        }


@dataclass
class SkipOutput:
    """What a pass over videos decided, predicted and cost. What was not evaluated is NaN or 0.

    Attributes:
        logits: `(B, K)` logits of each video: the mean over its used frames (Eq. 3.6), or what another consensus makes
            of them. A frame that a gate with `repeats_last` stops counts the last used one once more. In eval, frames
            whose logits are not finite do not count.
        forward: `(B, T, N)` decisions, 1 forward and 0 stop; straight-through in training, 0 where a gate was not
            evaluated.
        used: `(B, T)` boolean, frames that passed every gate.
        stopped_at: `(B, T)` index of the gate that stopped the frame; `N` for used frames, -1 for unseen ones.
        frame_logits: `(B, T, K)` logits of each frame (Eq. 3.5), NaN where not computed.
        gate_logits: `(B, T, N, 2)` logits (stop, forward), NaN where not evaluated; `None` without gates.
        inner_logits: `(B, T, N, K)` logits of the inner classifiers, NaN where their gate was not evaluated; `None`
            where they did not run, as in the skipping pass over videos.
        macs: `(B,)` float64 executed cost of each video in the lookup's unit (MACs), gates and head included.
        fallback_frame: `(B,)` where no frame was used, the stopped frame that was run to the end; else -1.
        evaluated: `(B, T, N)` boolean, gates that ran: all of them in training, those a frame reached in eval.
        speculative_macs: `(B,)` float64 cost of what ran ahead of the decisions, in vain; not in `macs`. Zero unless
            stored videos are really skipped.
        activation: the model's head activation, which makes probabilities of logits.
        lengths: `(B,)` frames of each video, where the batch is padded; `None` for all. Padding is unseen.

    Examples:
        >>> backbone = stage_model("test_resnet", num_classes=4)
        >>> model = StopOrForward(backbone, [SimilarityGate(c) for c in backbone.num_features]).eval()
        >>> output = model(torch.ones(1, 3, 3, 64, 64))  # three equal frames
        >>> output.used
        tensor([[ True, False, False]])
        >>> round(float(output.macs / (3 * model.lookup_for((64, 64)).dense)), 2)  # share of three whole frames
        0.64
    """

    logits: Tensor
    forward: Tensor
    used: Tensor
    stopped_at: Tensor
    frame_logits: Tensor
    gate_logits: Tensor | None
    inner_logits: Tensor | None
    macs: Tensor
    fallback_frame: Tensor
    evaluated: Tensor
    speculative_macs: Tensor = None  # type: ignore[assignment]  # zeros like `macs`
    activation: Activation = "softmax"
    lengths: Tensor | None = None

    def __repr__(self) -> str:
        """Say what happened, in counts."""
        (batch, frames, stages), looked_at = self.forward.shape, int(self.seen.sum())
        used, total = int(self.used.sum()), batch * frames if self.lengths is None else int(self.lengths.sum())
        return (
            f"SkipOutput({batch} videos of {_lengths(frames, self.lengths)} frames, {stages} stages, "
            f"{self.logits.shape[-1]} classes: {used} frames used, {looked_at - used} stopped, {total - looked_at} "
            f"unseen; mean macs {float(self.macs.mean()):.4g})"
        )

    def __post_init__(self) -> None:
        if self.speculative_macs is None and self.macs is not None:
            self.speculative_macs = torch.zeros_like(self.macs)

    @property
    def num_stages(self) -> int:
        """Number of stages `N`."""
        return self.forward.shape[-1]

    @property
    def probabilities(self) -> Tensor:
        """`(B, K)` class probabilities of each video."""
        return probabilities(self.logits, self.activation)

    @property
    def fallback(self) -> Tensor:
        """`(B,)` boolean, videos of which no frame was used."""
        return self.fallback_frame >= 0

    @property
    def seen(self) -> Tensor:
        """`(B, T)` boolean, frames that were looked at."""
        return self.stopped_at != rules.UNSEEN

    @property
    def weights(self) -> Tensor | None:
        """`(B, T)` what each frame weighs in means over videos and frames; `None` where all weigh the same.

        Padding weighs nothing, and a short video in all as much as a long one.
        """
        frames = self.used.shape[1]
        return None if self.lengths is None else present(self.lengths, frames) * (frames / self.lengths[:, None])


@dataclass
class EncodedVideo:
    """All that gates and predictions need of a pass through the whole backbone.

    With a frozen backbone, store it once and train gates on it in seconds an epoch.

    Attributes:
        pooled: for each of `N` stages `(B, T, C_n)` pooled features.
        frame_logits: `(B, T, K)` logits of every frame.
        image_size: `(H, W)` of the frames, for the cost table.
        lengths: `(B,)` frames of each video, where the batch is padded; `None` for all. What is stored of padding does
            not matter; `encode` gives zeros.
    """

    pooled: tuple[Tensor, ...]
    frame_logits: Tensor
    image_size: tuple[int, int]
    lengths: Tensor | None = None

    def __repr__(self) -> str:
        """Show sizes instead of values."""
        batch, frames, classes = self.frame_logits.shape
        channels = ", ".join(str(features.shape[-1]) for features in self.pooled)
        size, count = "x".join(map(str, self.image_size)), _lengths(frames, self.lengths)
        return f"EncodedVideo({batch} videos of {count} frames of {size}: channels {channels}, {classes} classes)"


def _lengths(frames: int, lengths: Tensor | None) -> str:
    return str(frames) if lengths is None else f"{int(lengths.min())} to {int(lengths.max())}"


# Wrappers of modules find the tensors of what a module returns by torch's pytrees. Without this,
# DistributedDataParallel(static_graph=True) would not share gradients, and would not say so.
torch.export.register_dataclass(SkipOutput)
torch.export.register_dataclass(EncodedVideo)


def masked_output(
    stopped_at: Tensor,
    gate_logits: Tensor,
    frame_logits: Tensor,
    lookup: FLOPsLookup,
    readout: Readout,
    *,
    fallback_frame: Tensor | None = None,
    inner_logits: Tensor | None = None,
    logits: Tensor | None = None,
    lengths: Tensor | None = None,
) -> SkipOutput:
    """Make the output of a skipping pass: mask what the decisions did not ask for.

    Args:
        stopped_at: `(B, T)` what became of each frame.
        gate_logits: `(B, T, N, 2)`.
        frame_logits: `(B, T, K)`.
        lookup: costs at the frames' size.
        readout: how the model's frames make answers.
        fallback_frame: `(B,)`; chosen here by default.
        inner_logits: `(B, T, N, K)`, if inner classifiers ran.
        logits: `(B, K)` the videos' answers; by default what the answering frames make.
        lengths: `(B,)` frames of each video, where the batch is padded.
    """
    stages = gate_logits.shape[2]
    if fallback_frame is None:
        fallback_frame = rules.fallback(stopped_at, gate_logits)
    answering = rules.answering(stopped_at, stages, fallback_frame)
    if logits is None:
        # A fallback frame counts as the one used frame of its video.
        counted = rules.read(readout, torch.where(answering, stages, stopped_at), frame_logits)
        logits = counted[:, -1].to(frame_logits.dtype)
    depth = torch.arange(stages, device=stopped_at.device)
    evaluated = depth <= stopped_at[..., None]
    return SkipOutput(
        logits=logits,
        forward=(depth < stopped_at[..., None]).to(gate_logits.dtype),
        used=stopped_at == stages,
        stopped_at=stopped_at,
        frame_logits=rules.known(frame_logits, answering),
        gate_logits=rules.known(gate_logits, evaluated),
        inner_logits=None if inner_logits is None else rules.known(inner_logits, evaluated),
        macs=lookup.cost(stopped_at, fallback_frame),
        fallback_frame=fallback_frame,
        evaluated=evaluated,
        activation=readout.activation,
        lengths=lengths,
    )


def dense_output(
    frame_logits: Tensor, lookup: FLOPsLookup, readout: Readout, lengths: Tensor | None = None
) -> SkipOutput:
    """Make the output of a pass without gates, which uses every frame: `(B, T, K)` logits, finite in padding, too."""
    batch, frames, _ = frame_logits.shape
    device, stages = frame_logits.device, len(readout.repeats)
    used = torch.ones(batch, frames, dtype=torch.bool, device=device) if lengths is None else present(lengths, frames)
    stopped_at = torch.where(used, stages, rules.UNSEEN)
    weights = None if lengths is None else used.to(frame_logits.dtype)
    return SkipOutput(
        logits=rules.weighted(readout, stopped_at, frame_logits, weights),
        forward=used[..., None].to(frame_logits.dtype).repeat(1, 1, stages),
        used=used,
        stopped_at=stopped_at,
        frame_logits=frame_logits if lengths is None else rules.known(frame_logits, used),
        gate_logits=None,
        inner_logits=None,
        macs=used.sum(1).double() * lookup.dense,
        fallback_frame=torch.full((batch,), -1, device=device),
        evaluated=torch.zeros(batch, frames, stages, dtype=torch.bool, device=device),
        activation=readout.activation,
        lengths=lengths,
    )
