"""StopOrForward: gates around a staged backbone; dense and differentiable in training, really skipping in eval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dynskip._fx import in_mode
from dynskip.backbone import Carry, StagedBackbone
from dynskip.errors import DynskipError
from dynskip.flops import FLOPsLookup
from dynskip.gates import FORWARD, STOP, GateState
from dynskip.terminate import EarlyTerminator

if TYPE_CHECKING:
    from dynskip.runtime.optimize import Agreement

UNSEEN = -1  # `stopped_at` of a frame that was never looked at, because the video had ended


@dataclass
class SkipOutput:
    """What a pass over videos decided, predicted and cost. What was not evaluated is masked, never invented.

    Attributes:
        logits: `(B, K)` logits of each video: the mean over its used frames (Eq. 3.6).
        forward: `(B, T, N)` decisions, 1 forward and 0 stop; straight-through in training, 0 where a gate was not
            evaluated.
        used: `(B, T)` boolean, frames that passed every gate.
        stopped_at: `(B, T)` index of the gate that stopped the frame; `N` for used frames, -1 for unseen ones.
        frame_logits: `(B, T, K)` logits of each frame (Eq. 3.5), NaN where not computed.
        gate_logits: `(B, T, N, 2)` logits (stop, forward), NaN where not evaluated; `None` without gates.
        inner_logits: `(B, T, N, K)` logits of the inner classifiers, NaN where their gate was not evaluated; `None`
            when they did not run (they serve training; the skipping pass leaves them out).
        macs: `(B,)` float64 executed cost of each video in the lookup's unit (MACs), gates and head included.
        fallback_frame: `(B,)` where no frame was used, the frame that was run to the end in their place; else -1.
        evaluated: `(B, T, N)` boolean, gates that ran: all of them in training, those a frame reached in eval.
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

    @property
    def num_stages(self) -> int:
        """Number of stages `N`."""
        return self.forward.shape[-1]

    @property
    def probabilities(self) -> Tensor:
        """`(B, K)` class probabilities of each video."""
        return self.logits.softmax(-1)

    @property
    def fallback(self) -> Tensor:
        """`(B,)` boolean, videos of which no frame was used."""
        return self.fallback_frame >= 0

    @property
    def seen(self) -> Tensor:
        """`(B, T)` boolean, frames that were looked at."""
        return self.stopped_at != UNSEEN


@dataclass
class EncodedVideo:
    """Everything that gates and the video's prediction need of a dense backbone pass.

    With a frozen backbone, store it once and train gates on it in seconds per epoch.

    Attributes:
        pooled: for each of `N` stages `(B, T, C_n)` pooled features.
        frame_logits: `(B, T, K)` logits of every frame.
        image_size: `(H, W)` of the frames, for the cost table.
    """

    pooled: tuple[Tensor, ...]
    frame_logits: Tensor
    image_size: tuple[int, int]


@dataclass
class _Progress:
    """Where a batch of videos stands while frames arrive: one row a video."""

    states: list[GateState]
    logit_sum: Tensor  # (B, K) over used frames
    used: Tensor  # (B,) frames used
    seen: Tensor  # (B,) frames looked at
    ended: Tensor  # (B,) boolean
    best_score: Tensor  # (B,) float64: depth + forward probability of the furthest stopped frame; -1 before any
    best_frame: Tensor  # (B,)
    best_carry: list[Carry | None]  # the furthest frame's carry, kept while no frame has been used


@dataclass
class _Step:
    """What happened to one frame of each of some videos."""

    stopped_at: Tensor  # (M,)
    gate_logits: Tensor  # (M, N, 2)
    frame_logits: Tensor  # (M, K)


class StopOrForward(nn.Module):
    """Put gates around a backbone: after each stage, a gate decides frame by frame to stop or to go forward.

    `train()` runs every stage and gate on every frame and masks, so that gradients reach all decisions. `eval()` runs
    only what the decisions ask for; both give the same results for the same decisions.

    Args:
        backbone: `N` stages and a head (`stage_model`).
        gates: `N` gates, one after each stage.
        inner: `N` inner classifiers over the gates' hidden states, for the policy guidance losses.
        terminator: ends videos early in eval; `None` reads every frame.
        lookup: cost table; `None` measures one for each frame size when it first comes.
        state_update: which frames advance the gates' memory. `"used"` (the thesis): all gates on frames that passed
            every gate. `"reached"`: each gate on every frame that reaches it.
        forward_threshold: forward where the gate's forward probability exceeds this, for all gates or one a gate;
            0.5 is the arg-max.

    Attributes:
        temperature: temperature of the Gumbel-softmax in training; set it from a schedule every epoch.

    Raises:
        DynskipError: if the parts do not fit one another; the message names the part.

    Reference:
        Thesis Eq. 3.1-3.7.
    """

    def __init__(
        self,
        backbone: StagedBackbone,
        gates: Sequence[nn.Module],
        inner: Sequence[nn.Module] | None = None,
        terminator: EarlyTerminator | None = None,
        lookup: FLOPsLookup | None = None,
        state_update: Literal["used", "reached"] = "used",
        forward_threshold: float | Sequence[float] = 0.5,
    ) -> None:
        super().__init__()
        for n, gate in enumerate(gates):
            if not isinstance(gate, nn.Module):
                raise DynskipError(f"Gate {n} is a {type(gate).__name__}; a gate is an nn.Module such as PolicyGate.")
        if state_update not in ("used", "reached"):
            raise DynskipError(f"state_update={state_update!r} is unknown; use 'used' or 'reached'.")
        self.backbone = backbone
        self.gates: Any = nn.ModuleList(gates)  # Any: gates are a protocol of their own, which nn.Module hides
        self.inner = nn.ModuleList(inner) if inner is not None else None
        self.terminator = terminator
        self.state_update = state_update
        self.temperature = 1.0
        self.forward_threshold = _thresholds(forward_threshold, backbone.num_stages)
        _check_parts(backbone, gates, inner)
        _check_lookup(backbone, lookup)
        self._given_lookup = lookup
        self._measured: dict[tuple[int, int], FLOPsLookup] = {}

    def forward(self, video: Tensor, *, dense: bool = False, sample: bool | None = None) -> SkipOutput:
        """Classify videos.

        Args:
            video: `(B, T, C, H, W)` normalised frames in order, floating point.
            dense: leave the gates out and use every frame (the plain backbone; also the recipe's warm-up).
            sample: draw decisions from the gates' probabilities instead of taking the more probable one. By default
                drawn in training, not drawn in eval.

        Returns:
            The output; differentiable in training, without gradients when frames are really skipped.

        Raises:
            DynskipError: if the video has the wrong rank, channels or dtype, no frames, or NaN or infinite values.
        """
        if dense:
            return self._dense(video)
        if self.training:
            return self.decide(self.encode(video), sample=sample)
        return self._skip(video, sample=bool(sample))

    def lookup_for(self, image_size: tuple[int, int]) -> FLOPsLookup:
        """Return the cost table for frames of a size.

        Args:
            image_size: `(H, W)`.

        Returns:
            The table given at construction, or one measured now and kept.

        Raises:
            DynskipError: if the given table was made for another size.
        """
        given = self._given_lookup
        if given is not None:
            if given.image_size not in (None, image_size):
                raise DynskipError(
                    "The cost table was made for frames of {}x{}, ".format(*given.image_size)
                    + "and these are {}x{}. Measure one for this size, or leave `lookup` out.".format(*image_size)
                )
            return given
        if image_size not in self._measured:
            self._measured[image_size] = FLOPsLookup.measure(self.backbone, image_size, self.gates)
        return self._measured[image_size]

    def encode(self, video: Tensor) -> EncodedVideo:
        """Run the whole backbone on every frame.

        Args:
            video: `(B, T, C, H, W)` normalised frames.

        Returns:
            Pooled features of every stage and logits of every frame.

        Raises:
            DynskipError: as `forward`.
        """
        self._check_video(video)
        batch, height, width = video.shape[0], video.shape[3], video.shape[4]
        carry = self.backbone.start(rearrange(video, "b t c h w -> (b t) c h w"))
        pooled = []
        for n in range(self.backbone.num_stages):
            carry = self.backbone.run(n, carry)
            pooled.append(rearrange(self.backbone.pool(n, carry), "(b t) c -> b t c", b=batch))
        logits = rearrange(self.backbone.head(carry), "(b t) k -> b t k", b=batch)
        return EncodedVideo(tuple(pooled), logits, (height, width))

    def decide(self, encoded: EncodedVideo, *, sample: bool | None = None) -> SkipOutput:
        """Gate every frame from its stored features, and mask what the gates stop.

        Args:
            encoded: what `encode` returned.
            sample: as in `forward`.

        Returns:
            In training, every gate evaluated on every frame, decisions straight-through. In eval, the output of the
            skipping pass for the same decisions, early termination included.

        Raises:
            DynskipError: if the features are not this backbone's.
        """
        self._check_encoded(encoded)
        sample = self.training if sample is None else sample
        frame_logits = encoded.frame_logits
        batch, frames, _ = frame_logits.shape
        stages = self.backbone.num_stages
        states = [gate.initial_state(batch) for gate in self.gates]
        ended = torch.zeros(batch, dtype=torch.bool, device=frame_logits.device)
        logit_sum = torch.zeros_like(frame_logits[:, 0], dtype=_sum_dtype(frame_logits.dtype))
        used_count = torch.zeros(batch, dtype=torch.long, device=frame_logits.device)
        all_gate_logits, all_decisions, all_inner, all_reached, all_used = [], [], [], [], []
        for t in range(frames):
            step_logits, decisions, inner, reached, new_states = [], [], [], [], []
            passed = ~ended
            for n, gate in enumerate(self.gates):
                logits, state = gate(encoded.pooled[n][:, t], states[n])
                decision = self._draw(n, logits, sample)
                if self.inner is not None:
                    inner.append(self.inner[n](state[0]))
                step_logits.append(logits)
                decisions.append(decision)
                new_states.append(state)
                reached.append(passed)
                passed = passed & (decision.detach() > 0.5)
            commits = [passed] * stages if self.state_update == "used" else reached
            states = [_commit(*both) for both in zip(commits, new_states, states, strict=True)]
            all_gate_logits.append(torch.stack(step_logits, 1))
            all_decisions.append(torch.stack(decisions, 1))
            all_reached.append(torch.stack(reached, 1))
            all_used.append(passed)
            if inner:
                all_inner.append(torch.stack(inner, 1))
            if not self.training and self.terminator is not None:
                logit_sum = logit_sum + torch.where(passed[:, None], frame_logits[:, t], 0.0)
                used_count = used_count + passed
                running = (logit_sum / used_count[:, None]).softmax(-1)
                ended = ended | self.terminator(running, torch.full_like(used_count, t + 1))

        gate_logits = torch.stack(all_gate_logits, 1)
        forward = torch.stack(all_decisions, 1)
        evaluated, used = torch.stack(all_reached, 1), torch.stack(all_used, 1)
        inner_logits = torch.stack(all_inner, 1) if all_inner else None
        # Of the gates a frame reached, the last one stopped it; a used frame passed that one, too.
        stopped_at = evaluated.sum(-1) - 1 + used.long()
        fallback_frame = _fallback_frame(stopped_at, used, gate_logits)
        answered = _answered(used, fallback_frame)
        if self.training:
            evaluated = torch.ones_like(evaluated)
            # Straight-through: the product of the gates carries their gradient, a fallback frame counts as given.
            weights = forward.prod(-1) + (answered & ~used).to(forward.dtype)
            logits = (weights[..., None] * frame_logits).sum(1) / weights.sum(1, keepdim=True)
        else:
            forward = forward * evaluated
            gate_logits = gate_logits.masked_fill(~evaluated[..., None], math.nan)
            if inner_logits is not None:
                inner_logits = inner_logits.masked_fill(~evaluated[..., None], math.nan)
            frame_logits = frame_logits.masked_fill(~answered[..., None], math.nan)
            logits = _mean_where(answered, frame_logits)
        return SkipOutput(
            logits=logits,
            forward=forward,
            used=used,
            stopped_at=stopped_at,
            frame_logits=frame_logits,
            gate_logits=gate_logits,
            inner_logits=inner_logits,
            macs=self.lookup_for(encoded.image_size).cost(stopped_at, used),
            fallback_frame=fallback_frame,
            evaluated=evaluated,
        )

    def _dense(self, video: Tensor) -> SkipOutput:
        frame_logits = self.encode(video).frame_logits
        batch, frames, _ = frame_logits.shape
        stages = self.backbone.num_stages
        lookup = self.lookup_for((video.shape[3], video.shape[4]))
        return SkipOutput(
            logits=frame_logits.mean(1),
            forward=frame_logits.new_ones(batch, frames, stages),
            used=torch.ones(batch, frames, dtype=torch.bool, device=video.device),
            stopped_at=torch.full((batch, frames), stages, device=video.device),
            frame_logits=frame_logits,
            gate_logits=None,
            inner_logits=None,
            macs=torch.full((batch,), frames * lookup.dense, dtype=torch.float64, device=video.device),
            fallback_frame=torch.full((batch,), -1, device=video.device),
            evaluated=torch.zeros(batch, frames, stages, dtype=torch.bool, device=video.device),
        )

    @torch.no_grad()
    def _skip(self, video: Tensor, sample: bool) -> SkipOutput:
        self._check_video(video)
        batch, frames = video.shape[:2]
        stages, classes = self.backbone.num_stages, self.backbone.num_classes
        progress = self._begin(batch)
        dtype, device = next(self.parameters()).dtype, video.device
        stopped_at = torch.full((batch, frames), UNSEEN, device=device)
        gate_logits = torch.full((batch, frames, stages, 2), math.nan, dtype=dtype, device=device)
        frame_logits = torch.full((batch, frames, classes), math.nan, dtype=dtype, device=device)
        for t in range(frames):
            rows = (~progress.ended).nonzero().squeeze(1)
            if not len(rows):
                break
            step = self._step(progress, rows, video[rows, t], sample)
            stopped_at[rows, t] = step.stopped_at
            gate_logits[rows, t] = step.gate_logits
            frame_logits[rows, t] = step.frame_logits
        fallback_frame = self._run_fallback(progress, frame_logits)
        used = stopped_at == stages
        depth = torch.arange(stages, device=device)
        lookup = self.lookup_for((video.shape[3], video.shape[4]))
        return SkipOutput(
            logits=_mean_where(_answered(used, fallback_frame), frame_logits),
            forward=(depth < stopped_at[..., None]).to(dtype),
            used=used,
            stopped_at=stopped_at,
            frame_logits=frame_logits,
            gate_logits=gate_logits,
            inner_logits=None,
            macs=lookup.cost(stopped_at, used),
            fallback_frame=fallback_frame,
            evaluated=depth <= stopped_at[..., None],
        )

    def _begin(self, batch: int) -> _Progress:
        weight = next(self.parameters())
        return _Progress(
            # Rows are written in place: a gate may well hand out one tensor of zeros twice.
            states=[tuple(s.clone() for s in gate.initial_state(batch)) for gate in self.gates],
            logit_sum=weight.new_zeros(batch, self.backbone.num_classes, dtype=_sum_dtype(weight.dtype)),
            used=torch.zeros(batch, dtype=torch.long, device=weight.device),
            seen=torch.zeros(batch, dtype=torch.long, device=weight.device),
            ended=torch.zeros(batch, dtype=torch.bool, device=weight.device),
            best_score=torch.full((batch,), -1.0, dtype=torch.float64, device=weight.device),
            best_frame=torch.full((batch,), -1, device=weight.device),
            best_carry=[None] * batch,
        )

    def _step(self, progress: _Progress, rows: Tensor, frames: Tensor, sample: bool) -> _Step:
        """Take one frame of each of the videos `rows` as far as its gates let it, and update where they stand."""
        stages = self.backbone.num_stages
        count, dtype, device = len(rows), next(self.parameters()).dtype, frames.device
        stopped_at = torch.full((count,), stages, device=device)
        gate_logits = torch.full((count, stages, 2), math.nan, dtype=dtype, device=device)
        frame_logits = torch.full((count, self.backbone.num_classes), math.nan, dtype=dtype, device=device)
        frame_number = progress.seen[rows]
        progress.seen[rows] += 1
        carry, alive = self.backbone.start(frames), torch.arange(count, device=device)
        candidates: list[tuple[Tensor, GateState]] = []
        for n, gate in enumerate(self.gates):
            carry = self.backbone.run(n, carry)
            state = tuple(s[rows[alive]] for s in progress.states[n])
            logits, new_state = gate(self.backbone.pool(n, carry), state)
            gate_logits[alive, n] = logits.to(dtype)
            candidates.append((alive, new_state))
            forward = self._draw(n, logits, sample) > 0.5
            stop = (~forward).nonzero().squeeze(1)
            if len(stop):
                stopped_at[alive[stop]] = n
                self._remember(progress, rows[alive[stop]], frame_number[alive[stop]], n, logits[stop], carry, stop)
                keep = forward.nonzero().squeeze(1)
                carry, alive = carry.select(keep), alive[keep]
            if not len(alive):
                break
        if len(alive):
            logits = self.backbone.head(carry).to(dtype)
            frame_logits[alive] = logits
            progress.logit_sum[rows[alive]] += logits
            progress.used[rows[alive]] += 1
            for row in rows[alive].tolist():
                progress.best_carry[row] = None
        used = stopped_at == stages
        for n, (reached, new_state) in enumerate(candidates):
            commit = used[reached] if self.state_update == "used" else torch.ones_like(reached, dtype=torch.bool)
            for old, new in zip(progress.states[n], new_state, strict=True):
                old[rows[reached[commit]]] = new[commit].to(old.dtype)
        if self.terminator is not None:
            running = (progress.logit_sum[rows] / progress.used[rows, None]).softmax(-1)
            progress.ended[rows] = self.terminator(running, progress.seen[rows])
        return _Step(stopped_at, gate_logits, frame_logits)

    def _remember(
        self,
        progress: _Progress,
        rows: Tensor,
        frame_number: Tensor,
        stage: int,
        logits: Tensor,
        carry: Carry,
        position: Tensor,
    ) -> None:
        """Keep the carry of the furthest stopped frame of videos that have no used frame yet."""
        score = _depth_score(torch.full_like(rows, stage), logits)
        better = ((progress.used[rows] == 0) & (score > progress.best_score[rows])).nonzero().squeeze(1)
        progress.best_score[rows[better]] = score[better]
        progress.best_frame[rows[better]] = frame_number[better]
        for i in better.tolist():
            progress.best_carry[int(rows[i])] = carry.select(position[i : i + 1])

    def _run_fallback(self, progress: _Progress, frame_logits: Tensor) -> Tensor:
        """Run the furthest frame of videos without a used frame to the end; return its number, -1 elsewhere."""
        needs = progress.used == 0
        depth = progress.best_score.floor().long()
        rows: list[int] = []
        carry: Carry | None = None
        for n in range(self.backbone.num_stages):
            if carry is not None:
                carry = self.backbone.run(n, carry)
            joining = (needs & (depth == n)).nonzero().squeeze(1).tolist()
            parts = [c for row in joining if (c := progress.best_carry[row]) is not None]
            if parts:
                carry = Carry.cat(parts if carry is None else [carry, *parts])
                rows += joining
        if carry is not None:
            frame_logits[rows, progress.best_frame[rows]] = self.backbone.head(carry).to(frame_logits.dtype)
        return torch.where(needs, progress.best_frame, -1)

    def _draw(self, stage: int, logits: Tensor, sample: bool) -> Tensor:
        """Turn `(B, 2)` gate logits into `(B,)` decisions in {0, 1}, straight-through where gradients are recorded."""
        if sample:
            # In half precision the Gumbel noise itself would round to ties.
            return F.gumbel_softmax(logits.float(), tau=self.temperature, hard=True)[..., FORWARD].to(logits.dtype)
        hard = (logits[..., FORWARD] - logits[..., STOP] > _margin(self.forward_threshold[stage])).to(logits.dtype)
        if not self.training:
            return hard
        soft = (logits / self.temperature).softmax(-1)[..., FORWARD]
        return hard + soft - soft.detach()

    def _check_video(self, video: Tensor) -> None:
        channels = self.backbone.input_size[0]
        if not isinstance(video, Tensor) or not video.is_floating_point():
            got = video.dtype if isinstance(video, Tensor) else type(video).__name__
            raise DynskipError(
                f"A video must be a floating-point tensor of normalised frames; got {got}. Convert 8-bit frames with "
                "`video.float() / 255`, then subtract the model's mean and divide by its standard deviation."
            )
        if video.ndim != 5 or video.shape[2] != channels:
            raise DynskipError(
                f"A video batch must have shape (B, T, {channels}, H, W); got {tuple(video.shape)}. Add a batch "
                "dimension with `video[None]` to a single video, and keep channels before height and width."
            )
        if 0 in video.shape:
            raise DynskipError(
                f"The video batch is empty: shape {tuple(video.shape)}. Give at least one video and frame."
            )
        weight = next(self.backbone.parameters(), video)
        if video.dtype != weight.dtype and not torch.is_autocast_enabled(video.device.type):
            raise DynskipError(
                f"The video is {video.dtype} and the model {weight.dtype}. Convert one of them, for instance with "
                f"`video.to({weight.dtype})`, or run under torch.autocast."
            )
        # One reduction tells whether all is well; where it is not, look closer.
        if not torch.isfinite(video.detach().sum(dtype=torch.float32)):
            bad = (~video.isfinite()).flatten(2).any(-1).nonzero().tolist()
            if bad:
                raise DynskipError(
                    f"The video has NaN or infinite values in {len(bad)} frames, the first being frame {bad[0][1]} of "
                    f"video {bad[0][0]}. Check decoding and normalisation."
                )

    def _check_encoded(self, encoded: EncodedVideo) -> None:
        expected = self.backbone.num_features
        shapes = tuple(tuple(pooled.shape) for pooled in encoded.pooled)
        batch_frames = tuple(encoded.frame_logits.shape[:2])
        wanted = tuple((*batch_frames, channels) for channels in expected)
        classes = encoded.frame_logits.shape[-1]
        if shapes != wanted or classes != self.backbone.num_classes or 0 in batch_frames:
            raise DynskipError(
                f"Stored features of shapes {shapes} with {classes} classes are not this backbone's; expected (B, "
                f"T, C_n) with C_n = {expected} and {self.backbone.num_classes} classes. Encode the videos again "
                "with this model."
            )

    def optimize(self, clips: Tensor, **options: Any) -> tuple[StopOrForward, Agreement]:
        """Build a faster copy and compare its decisions; see `dynskip.runtime.optimize.optimize`.

        Args:
            clips: `(B, T, C, H, W)` normalised calibration clips, at the frame size to optimise for.
            **options: `compile`, `dtype`, `buckets`, `backend`.

        Returns:
            The faster model, and how its decisions on `clips` compare with this model's.
        """
        from dynskip.runtime.optimize import optimize

        return optimize(self, clips, **options)

    def export(self, folder: str | Path, image_size: int | tuple[int, int], **options: Any) -> Path:
        """Write every stage, gate and the head as files that run elsewhere; see `dynskip.runtime.export.export`.

        Args:
            folder: new or empty folder to write to.
            image_size: `(H, W)` of the frames, or one number for squares.
            **options: `format`, `class_names`, `mean`, `std`.

        Returns:
            The folder.
        """
        from dynskip.runtime.export import export

        return export(self, folder, image_size, **options)


def _commit(mask: Tensor, new: GateState, old: GateState) -> GateState:
    return tuple(
        torch.where(mask.view(-1, *[1] * (b.ndim - 1)), a.to(b.dtype), b) for a, b in zip(new, old, strict=True)
    )


def _depth_score(stopped_at: Tensor, logits: Tensor) -> Tensor:
    """Order stopped frames by how far they got, then by how nearly their gate forwarded them."""
    margin = logits[..., FORWARD].detach().double() - logits[..., STOP].detach().double()
    # Rises with the forward probability, from 0 to 1. A softmax would do, but its last digit depends on where in a
    # batch a row stands, and equal frames have to stay equal in every batch.
    nearness = 0.5 + 0.5 * margin / (1 + margin.abs())
    return stopped_at.double() + nearness.clamp(max=1 - 1e-12)


def _fallback_frame(stopped_at: Tensor, used: Tensor, gate_logits: Tensor) -> Tensor:
    last = stopped_at.clamp(0, gate_logits.shape[2] - 1)
    at_stop = gate_logits.detach().gather(2, last[..., None, None].expand(-1, -1, 1, 2)).squeeze(2)
    score = _depth_score(stopped_at, at_stop)  # an unseen frame scores below 0
    return torch.where(used.any(1), -1, score.argmax(1))


def _answered(used: Tensor, fallback_frame: Tensor) -> Tensor:
    """Mark the frames whose logits make the prediction: the used ones, or else the fallback."""
    frames = torch.arange(used.shape[1], device=used.device)
    return used | (frames == fallback_frame[:, None])


def _mean_where(mask: Tensor, frame_logits: Tensor) -> Tensor:
    total = torch.where(mask[..., None], frame_logits, 0.0).sum(1, dtype=_sum_dtype(frame_logits.dtype))
    return (total / mask.sum(1, keepdim=True)).to(frame_logits.dtype)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums over frames need more digits than half precision has."""
    return torch.promote_types(dtype, torch.float32)


def _margin(probability: float) -> float:
    """Return how far the forward logit must lie above the stop logit for this forward probability."""
    if probability in (0.0, 1.0):
        return math.inf if probability else -math.inf
    return math.log(probability) - math.log1p(-probability)


def _thresholds(value: float | Sequence[float], stages: int) -> tuple[float, ...]:
    thresholds = tuple(value) if isinstance(value, Sequence) else (value,) * stages
    if len(thresholds) != stages:
        raise DynskipError(
            f"Got {len(thresholds)} forward thresholds for {stages} gates; give one number or one a gate."
        )
    for n, threshold in enumerate(thresholds):
        if not 0.0 <= threshold <= 1.0:
            raise DynskipError(f"Forward threshold {threshold} of gate {n} is no probability; give one in [0, 1].")
    return thresholds


@torch.no_grad()
def _check_parts(backbone: StagedBackbone, gates: Sequence[Any], inner: Sequence[nn.Module] | None) -> None:
    """Try every gate and inner classifier on zeros of its stage's width."""
    stages, classes = backbone.num_stages, backbone.num_classes
    if len(gates) != stages:
        raise DynskipError(
            f"Got {len(gates)} gates for {stages} stages; give one gate for each of {backbone.stage_names}."
        )
    if inner is not None and len(inner) != stages:
        raise DynskipError(f"Got {len(inner)} inner classifiers for {stages} gates; give one for each gate, or none.")
    weight = next(backbone.parameters(), torch.empty(0))
    for n, (gate, channels) in enumerate(zip(gates, backbone.num_features, strict=True)):
        where = f"after stage {backbone.stage_names[n]!r} ({channels} channels)"
        try:
            with in_mode(gate, False):
                logits, state = gate(weight.new_zeros(2, channels), gate.initial_state(2))
        except Exception as error:
            raise DynskipError(
                f"Gate {n} ({type(gate).__name__}) cannot run {where}: {error}. Build it for {channels} input "
                "features, on the backbone's device and in its dtype."
            ) from error
        if tuple(logits.shape) != (2, 2):
            raise DynskipError(
                f"Gate {n} ({type(gate).__name__}) {where} returned logits of shape {tuple(logits.shape)} for a "
                "batch of 2; expected (B, 2): stop, forward."
            )
        if inner is None:
            continue
        if not state:
            raise DynskipError(f"Gate {n} ({type(gate).__name__}) has no hidden state for an inner classifier to read.")
        try:
            answer = inner[n](state[0])
        except Exception as error:
            raise DynskipError(
                f"Inner classifier {n} does not fit gate {n}, whose hidden state has {state[0].shape[-1]} features: "
                f"{error}."
            ) from error
        if answer.shape[-1] != classes:
            raise DynskipError(
                f"Inner classifier {n} has {answer.shape[-1]} classes and the backbone's head {classes}; make them "
                "equal."
            )


def _check_lookup(backbone: StagedBackbone, lookup: FLOPsLookup | None) -> None:
    if lookup is None:
        return
    if len(lookup.per_stage) != backbone.num_stages or lookup.stage_names not in (None, backbone.stage_names):
        names = lookup.stage_names or f"{len(lookup.per_stage)} unnamed stages"
        raise DynskipError(
            f"The cost table is for another backbone: it has {names}, the backbone {backbone.stage_names}. Measure it "
            "with FLOPsLookup.measure(backbone, image_size, gates)."
        )
