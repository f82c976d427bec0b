"""Every gate on the contract: the same decisions online, per clip, over streams, exported and optimised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    BOTH_UPDATES,
    CLASSES,
    SIZE,
    StateUpdate,
    assert_same,
    randn,
    randomise,
    rows_of,
    toy_backbone,
    toy_video,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dynskip import (
    ConfidenceGate,
    DynskipError,
    EarlyExit,
    EarlyTerminator,
    EntropyGate,
    FixedGate,
    InnerClassifier,
    LinearGate,
    PairwiseGate,
    PolicyGate,
    RandomGate,
    SimilarityGate,
    SkipOutput,
    StagedBackbone,
    StopOrForward,
    VideoResult,
)
from dynskip.gates import FORWARD, STOP, Gate, GateState

Build = Callable[[int], Any]
GATES: dict[str, Build] = {
    "policy": lambda c: PolicyGate(c, hidden=5),
    "linear": lambda c: LinearGate(c, forward_bias=0.5),
    "pairwise": lambda c: PairwiseGate(c, hidden=4, forward_bias=0.5),
    "similarity": lambda c: SimilarityGate(c, threshold=0.45),
    "confidence": lambda c: ConfidenceGate(c, CLASSES, threshold=0.8),
    "unsure": lambda c: ConfidenceGate(c, CLASSES, threshold=0.4, stop="unsure"),
    "entropy": lambda c: EntropyGate(c, CLASSES, threshold=0.4),
    "random": lambda c: RandomGate(c, rate=0.8),
    "fixed": lambda c: FixedGate(),
}
LEARNED = ("policy", "linear", "pairwise", "confidence", "unsure", "entropy")


def build(name: str, channels: int, seed: int = 0) -> Any:
    """Build a gate in float64 with parameters that make it decide differently from frame to frame."""
    gate = GATES[name](channels).double()
    return randomise(gate, seed, scale=2.5) if name in LEARNED else gate


def gated(names: Sequence[str], seed: int = 0, **kwargs: Any) -> StopOrForward:
    backbone = toy_backbone(seed, len(names))
    gates = [build(*pair, seed=seed * 31 + n) for n, pair in enumerate(zip(names, backbone.num_features, strict=True))]
    return StopOrForward(backbone, gates, **kwargs).eval()


def slow_video(batch: int, frames: int, seed: int) -> Tensor:
    """Make frames of which some nearly equal the one before, and some are equal."""
    video = toy_video(batch, frames, seed)
    kinds = torch.randint(0, 3, (batch, frames), generator=torch.Generator().manual_seed(seed))
    for t in range(1, frames):
        for b in range(batch):
            if kinds[b, t] < 2:
                video[b, t] = video[b, t - 1] + 0.05 * kinds[b, t] * video[b, t]
    return video


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(GATES)), min_size=1, max_size=3),
    seed=st.integers(0, 5000),
    state_update=st.sampled_from(BOTH_UPDATES),
    window=st.integers(1, 7),
    ends=st.booleans(),
)
def test_mixed_gates_decide_alike_in_every_runtime(
    names: list[str], seed: int, state_update: StateUpdate, window: int, ends: bool
) -> None:
    terminator = EarlyTerminator(0.6, 1) if ends else None
    model = gated(names, seed, state_update=state_update, terminator=terminator)
    video = slow_video(3, 6, seed)
    masked = model.decide(model.encode(video))
    assert_same(model.run_clip(video, window), masked)
    assert_same(model(video[1:2]), rows_of(masked, slice(1, 2)))
    session = model.stream(3)
    steps = [session(video[:, t]) for t in range(6)]
    assert torch.equal(torch.stack([step.stopped_at for step in steps], 1), masked.stopped_at)
    torch.testing.assert_close(session.result().logits, masked.logits)
    results = {e.key: e for e in model.serve_streams(map(iter, video), 2, 2) if isinstance(e, VideoResult)}
    for b, result in results.items():
        assert result.error is None
        assert result.macs == masked.macs[b]
        torch.testing.assert_close(result.logits, masked.logits[b])  # type: ignore[index]
