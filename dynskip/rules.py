"""The rules: what follows from gates' logits. Every way of running calls these functions.

Shapes: `B` videos of `T` frames, `N` gates, `K` classes. All functions are pure and never wait for a device.

    margins    forward logit minus stop logit            nearness, score    how far a stopped frame got
    forwards   does a frame go forward?                  further, fallback  which frame answers for its video
    draw       the same, drawn or with gradients         count, weighted    what adds to a video's answer
    stopped    the first gate that says stop             running, ends      the running prediction; a video's end
    keep       which rows keep a new state               known              NaN for what was not computed
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dynskip.activation import Activation, probabilities, to_logits
from dynskip.consensus import ConsensusState, MeanOfLogits, Readout, moved
from dynskip.gates import FORWARD, STOP, GateState, logit

UNSEEN = -1  # `stopped_at` of an unseen frame: its video had ended
SATURATED = 100.0  # no threshold overrules a margin as wide as this
# What videos' answers are made of: the consensus' state; then, where a gate repeats, what the consensus took of the
# last used frame, `(B, E)`, NaN before it.
Tally: TypeAlias = tuple[Tensor, ...]

# One frame's decision


def margins(gate_logits: Tensor) -> Tensor:
    """Return forward logits minus stop logits, in float32 or better: `(..., 2) -> (...)`."""
    wide = gate_logits.to(torch.promote_types(gate_logits.dtype, torch.float32))
    stop, forward = wide.unbind(-1)
    return forward - stop


def bounds(forward_threshold: Sequence[float]) -> Tensor:
    """Return the `(N,)` float64 margins that frames have to exceed for these forward probabilities.

    They lie within `SATURATED`, so that no threshold overrules a saturated gate such as `FixedGate`.
    """
    highest = 0.99 * SATURATED  # below it in every precision
    return torch.tensor([min(max(logit(p), -SATURATED), highest) for p in forward_threshold], dtype=torch.float64)


def drawn_bounds(bounds: Tensor) -> Tensor:
    """Return margins to exceed where decisions are drawn: a frame passes with its forward probability."""
    uniform = torch.rand(bounds.shape, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    return uniform.logit().to(bounds.dtype)


def forwards(margin: Tensor, bound: Tensor | float) -> Tensor:
    """Say which frames go forward. A NaN stops a frame."""
    return margin > bound


def draw(
    gate_logits: Tensor, bound: float, temperature: float, sample: bool, training: bool, noise: Tensor | None = None
) -> Tensor:
    """Turn `(B, 2)` gate logits into `(B,)` decisions in {0, 1}, straight-through in training.

    Args:
        gate_logits: `(B, 2)` logits (stop, forward).
        bound: margin to exceed where nothing is drawn, see `bounds`.
        temperature: temperature of the Gumbel-softmax.
        sample: draw instead of taking the more probable decision.
        training: let gradients pass.
        noise: `(B, 2)` standard Gumbel noise to draw with; from torch's generator by default.
    """
    margin = margins(gate_logits)
    if sample:
        if noise is None:
            noise = -torch.empty_like(gate_logits, dtype=margin.dtype).exponential_().log()
        soft = ((margin + noise[..., FORWARD] - noise[..., STOP]) / temperature).sigmoid()
        return ((soft > 0.5).to(soft.dtype) - soft.detach() + soft).to(gate_logits.dtype)
    hard = forwards(margin, bound).to(gate_logits.dtype)
    if not training:
        return hard
    # The softmax of two logits, written so that it stays finite where logits are infinite.
    soft = (margin / temperature).sigmoid().to(gate_logits.dtype)
    return hard + soft - soft.detach()


def stopped(forward: Tensor, dim: int = -1) -> Tensor:
    """Return the first gate that stops each frame, `N` for used frames: `(..., N) -> (...)` from booleans."""
    return forward.cumprod(dim).sum(dim)


def keep(rows: Tensor, new: GateState, old: GateState) -> GateState:
    """Return the new state where `rows` says so, and the old one elsewhere, in the old one's dtype."""
    return tuple(
        torch.where(rows.view(rows.shape + (1,) * (b.ndim - rows.ndim)), a.to(b.dtype), b)
        for a, b in zip(new, old, strict=True)
    )


# A video without a used frame


def nearness(margin: Tensor) -> Tensor:
    """Map margins to float64 numbers from 0 to below 1, in the same order. A NaN gives -1.5, below all."""
    # A softmax would do, but its last digits depend on a row's place in the batch.
    wide = margin.double().clamp(-1e30, 1e30)
    return (0.5 + 0.5 * wide / (1 + wide.abs())).clamp(max=1 - 1e-12).nan_to_num(-1.5)


def score(stopped_at: Tensor, margin: Tensor) -> Tensor:
    """Score stopped frames by how far they got, then by how nearly their gate forwarded them.

    Args:
        stopped_at: `(...)` the gate that stopped each frame.
        margin: `(...)` that gate's margin; a frame that a NaN stopped comes last.

    Returns:
        `(...)` float64 scores, above -1; -2 for frames that did not stop.
    """
    near = nearness(margin)
    return torch.where(stopped_at < 0, -2.0, torch.where(near < 0, -0.5, 2 * stopped_at + near))


def tie(dtype: torch.dtype) -> float:
    """Return up to which difference scores are equal: more than rounding in another batch size changes them."""
    return math.sqrt(torch.finfo(dtype).eps)


def further(score: Any, best: Any, tie: float) -> Any:
    """Whether a frame got further than the best one before it. Of equals, the earlier one stays."""
    return score > best + tie


def fallback(stopped_at: Tensor, gate_logits: Tensor) -> Tensor:
    """Choose the frame that answers for a video without a used frame: `(B,)`, -1 for videos that have one.

    Args:
        stopped_at: `(B, T)` what became of each frame.
        gate_logits: `(B, T, N, 2)`.
    """
    stages = gate_logits.shape[2]
    at = stopped_at.clamp(0, stages - 1)[..., None, None].expand(-1, -1, 1, 2)
    margin = margins(gate_logits.detach().gather(2, at).squeeze(2))
    frame = torch.full_like(stopped_at[:, 0], -1)
    best = torch.full(frame.shape, -1.0, dtype=torch.float64, device=frame.device)
    for t, each in enumerate(score(stopped_at, margin).unbind(1)):
        better = further(each, best, tie(gate_logits.dtype))
        frame, best = torch.where(better, t, frame), torch.where(better, each, best)
    return torch.where((stopped_at == stages).any(1), -1, frame)


def answering(stopped_at: Tensor, stages: int, fallback_frame: Tensor) -> Tensor:
    """Mark the frames whose logits make the prediction: the used ones, or the fallback. `(B, T)` boolean."""
    frames = torch.arange(stopped_at.shape[1], device=stopped_at.device)
    return (stopped_at == stages) | (frames == fallback_frame[:, None])


# A video's answer, and its end


def nothing_counted(readout: Readout, zeros: Tensor) -> Tally:
    """Return what videos' answers are made of before the first frame, from `(B, K)` float64 zeros."""
    state = readout.consensus.initial(zeros)
    if not any(readout.repeats):
        return state
    width = readout.consensus.embedded_features or zeros.shape[1]
    return (*state, zeros.new_full((len(zeros), width), math.nan))


def embed(readout: Readout, logits: Tensor) -> Tensor:
    """Return what the consensus takes of frames, `(M, E)` from logits `(M, K)`; the logits where it has no `embed`."""
    consensus = readout.consensus
    if not consensus.embedded_features:
        return logits
    return consensus.embed(probabilities(logits, readout.activation) if consensus.of_probabilities else logits)


def source(stopped_at: Tensor, repeats: Sequence[bool]) -> Tensor:
    """Return the number of the frame whose logits each frame adds to its video's answer, `(B, T)`; -1 for none.

    Args:
        stopped_at: `(B, T)` what became of each frame.
        repeats: for each of `N` gates, whether frames that it stops repeat the last used one.
    """
    frames = torch.arange(stopped_at.shape[1], device=stopped_at.device)
    used = stopped_at == len(repeats)
    if not any(repeats):
        return torch.where(used, frames, -1)
    last_used = torch.where(used, frames, -1).cummax(1).values
    return torch.where(_repeating(stopped_at, repeats) | used, last_used, -1)


def times_counted(stopped_at: Tensor, repeats: Sequence[bool]) -> Tensor:
    """Return how often each frame's logits count in its video's answer, `(B, T)`; 1 for frames that nothing repeats."""
    at = source(stopped_at, repeats)
    counts = torch.zeros_like(stopped_at).scatter_add(1, at.clamp(min=0), (at >= 0).long())
    return counts.clamp(min=1)


def count(readout: Readout, stopped_at: Tensor, values: Tensor, before: Tally) -> Tally:
    """Add frames to their videos' answers, one after the other. Those whose logits are not finite do not count.

    Args:
        readout: how the model's frames make answers.
        stopped_at: `(B, T)` what became of each frame.
        values: `(B, T, E)` what `embed` returned; only those of used frames matter.
        before: the tally before the first of these frames.

    Returns:
        The tally after each of them: tensors `(B, T, ...)`.
    """
    repeats, used = readout.repeats, stopped_at == len(readout.repeats)
    wide, counts, state = values.double(), used, before
    if any(repeats):
        state, recent = before[:-1], before[-1]
        at = torch.where(used, torch.arange(1, used.shape[1] + 1, device=used.device), 0).cummax(1).values
        shown = torch.cat([recent[:, None], wide], 1)
        wide = shown.gather(1, at[..., None].expand(-1, -1, wide.shape[-1]))
        counts = used | _repeating(stopped_at, repeats)
    counts = counts & _finite(wide)
    added = torch.where(counts[..., None], _shown(readout, wide), 0.0)
    after = readout.consensus.add_window(state, added, counts)
    return (*after, wide) if any(repeats) else after


def running(readout: Readout, tally: Tally, dtype: torch.dtype) -> Tensor:
    """Return the running prediction, logits `(B, K)` from a tally; NaN before the first frame that counts."""
    return _answer(readout, tally[:-1] if any(readout.repeats) else tally, dtype)


def running_after(readout: Readout, tally: Tally, dtype: torch.dtype) -> Tensor:
    """Return the running prediction after each frame, `(B, T, K)` from what `count` returned."""
    rows = running(readout, tuple(part.flatten(0, 1) for part in tally), dtype)
    return rows.view(*tally[0].shape[:2], -1)


def weighted(readout: Readout, stopped_at: Tensor, frame_logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the answers of videos whose frames count with weights, `(B, K)`; differentiable.

    Weights of 0 and 1 give what `read` gives, but that a NaN is not left out.

    Args:
        readout: how the model's frames make answers.
        stopped_at: `(B, T)` what became of each frame.
        frame_logits: `(B, T, K)` logits.
        weights: `(B, T)` weights, 1 for used frames and 0 for others, with gradients; `None` where all are used.
    """
    consensus, repeats = readout.consensus, readout.repeats
    if type(consensus) is MeanOfLogits:  # Eq. 3.6
        if weights is None:
            return frame_logits.mean(1)
        weights = weights * times_counted(stopped_at, repeats)
        return (weights[..., None] * frame_logits).sum(1) / weights.sum(1, keepdim=True)
    weights = torch.ones_like(frame_logits[..., 0]) if weights is None else weights
    values = _shown(readout, embed(readout, frame_logits.flatten(0, 1)).double()).unflatten(0, weights.shape)
    steps = list(zip(values.unbind(1), weights.unbind(1), strict=True))
    if any(repeats):  # after each frame, the last used one once more where this frame repeats it
        at = source(stopped_at, repeats)
        again = weights.gather(1, at.clamp(min=0)) * (_repeating(stopped_at, repeats) & (at >= 0))
        values = values.gather(1, at.clamp(min=0)[..., None].expand_as(values))
        repeated = zip(values.unbind(1), again.unbind(1), strict=True)
        steps = [step for pair in zip(steps, repeated, strict=True) for step in pair]
    state = consensus.initial(frame_logits.new_zeros(frame_logits[:, 0].shape, dtype=torch.float64))
    for value, weight in steps:
        state = moved(state, consensus.add(state, value), weight)
    return _answer(readout, state, frame_logits.dtype)


def ends(terminator: nn.Module, running_logits: Tensor, seen: Tensor, activation: Activation) -> Tensor:
    """Say after which frames a terminator ends their video.

    Args:
        terminator: the terminator.
        running_logits: `(B, T, K)` running predictions.
        seen: `(B, T)` frames looked at so far.
        activation: the model's head activation.

    Returns:
        `(B, T)` boolean.
    """
    ended: Tensor = terminator(_answers(running_logits, activation).flatten(0, 1), seen.flatten())
    return ended.view(seen.shape)


def end_scores(terminator: Any, running_logits: Tensor, activation: Activation) -> dict[str, Tensor]:
    """Return what a terminator compares its parameters with after each frame of whole videos.

    Args:
        terminator: the terminator.
        running_logits: `(B, T, K)` running predictions.
        activation: the model's head activation.

    Returns:
        `(B, T)` scores by the parameter's name, see `EarlyTerminator.scores`.
    """
    batch, frames, _ = running_logits.shape
    seen = torch.arange(1, frames + 1, device=running_logits.device).expand(batch, frames)
    scores = terminator.scores(_answers(running_logits, activation).flatten(0, 1), seen.flatten())
    return {name: score.view(batch, frames) for name, score in scores.items()}


def end_videos(terminator: nn.Module, running_logits: Tensor, stopped_at: Tensor, activation: Activation) -> Tensor:
    """Return what becomes of the frames of whole videos when the terminator ends them: `(B, T)`.

    Args:
        terminator: the terminator.
        running_logits: `(B, T, K)` running predictions after each frame.
        stopped_at: `(B, T)` what became of each frame.
        activation: the model's head activation.
    """
    seen = torch.arange(1, stopped_at.shape[1] + 1, device=stopped_at.device).expand_as(stopped_at)
    return unseen_after(ends(terminator, running_logits, seen, activation), stopped_at)


def unseen_after(ended: Tensor, stopped_at: Tensor) -> Tensor:
    """Mark the frames after the first one that ends their video as unseen: `(B, T)`."""
    return stopped_at.masked_fill(ended.cumsum(1) > ended, UNSEEN)


def read(readout: Readout, stopped_at: Tensor, frame_logits: Tensor) -> Tensor:
    """Return the running predictions of whole videos, `(B, T, K)` in float32 or better; see `count`."""
    before = nothing_counted(readout, frame_logits.new_zeros(frame_logits[:, 0].shape, dtype=torch.float64))
    values = embed(readout, frame_logits.flatten(0, 1)).unflatten(0, stopped_at.shape)
    wide = torch.promote_types(frame_logits.dtype, torch.float32)
    return running_after(readout, count(readout, stopped_at, values, before), wide)


def answer(readout: Readout, fallback_logits: Tensor) -> Tensor:
    """Return the answers of fallback frames, `(B, K)`: each counts as the one used frame of its video."""
    stopped_at = torch.full((len(fallback_logits), 1), len(readout.repeats), device=fallback_logits.device)
    return read(readout, stopped_at, fallback_logits[:, None]).squeeze(1)


def known(values: Tensor, where: Tensor) -> Tensor:
    """Replace what was not computed with NaN."""
    return values.masked_fill(~where.view(where.shape + (1,) * (values.ndim - where.ndim)), math.nan)


def _answers(logits: Tensor, activation: Activation) -> Tensor:
    return probabilities(logits.to(torch.promote_types(logits.dtype, torch.float32)), activation)


def _finite(logits: Tensor) -> Tensor:
    return (logits - logits == 0).all(-1)  # as `isfinite`, in fewer launches


def _shown(readout: Readout, values: Tensor) -> Tensor:
    """Turn float64 logits into probabilities, where the consensus adds these and `embed` has not done so."""
    consensus = readout.consensus
    if consensus.of_probabilities and not consensus.embedded_features:
        return probabilities(values, readout.activation)
    return values


def _answer(readout: Readout, state: ConsensusState, dtype: torch.dtype) -> Tensor:
    answer: Tensor = readout.consensus.answer(state)
    return (to_logits(answer, readout.activation) if readout.consensus.of_probabilities else answer).to(dtype)


def _repeating(stopped_at: Tensor, repeats: Sequence[bool]) -> Tensor:
    again = torch.zeros_like(stopped_at, dtype=torch.bool)
    for n, repeat in enumerate(repeats):  # few gates repeat; a table of them would have to be uploaded
        again = again | (stopped_at == n) if repeat else again
    return again
