"""The loop gives the same with any look-ahead: gates with strong memory, NaN verdicts, equal frames, early ends."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from helpers import (
    BOTH_UPDATES,
    SIZE,
    StateUpdate,
    assert_same,
    balance,
    randn,
    randomise,
    toy_backbone,
    toy_video,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dynskip import DynskipError, EarlyTerminator, LookAhead, PolicyGate, StopOrForward, VideoResult
from dynskip.gates import GateState


class Fickle(PolicyGate):
    """A gate whose memory matters as much as the frame, and whose logits are NaN for some frames."""

    def __init__(self, in_features: int, seed: int, nan_share: float) -> None:
        super().__init__(in_features, hidden=4)
        self.double()
        randomise(self, seed, scale=1.5)
        with torch.no_grad():
            self.cell.weight_hh.mul_(6)
            self.decide.weight.mul_(12)
        self.nan_share = nan_share

    def embed(self, pooled: Tensor) -> Tensor:
        mark = torch.where((pooled[:, :1] * 1000).frac().abs() < self.nan_share, torch.nan, 0.0)
        return torch.cat([super().embed(pooled), mark], 1)

    def step(self, embedded: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        logits, new = super().step(embedded[..., :-1], state)
        return logits + embedded[..., -1:], new


def fickle_model(
    seed: int, stages: int, state_update: StateUpdate, share: float, nan_share: float, ends: tuple[float, int] | None
) -> StopOrForward:
    backbone = toy_backbone(seed, stages)
    gates = [Fickle(c, seed * 31 + n, 0.0) for n, c in enumerate(backbone.num_features)]
    terminator = EarlyTerminator(*ends) if ends else None
    model = StopOrForward(backbone, gates, terminator=terminator, state_update=state_update).eval()
    balance(model, toy_video(4, 5, seed=seed + 1), share)
    for gate in model.gates:
        gate.nan_share = nan_share
    model.lookup_for((SIZE, SIZE))
    return model


def fickle_video(batch: int, frames: int, seed: int) -> Tensor:
    """Make frames, some of which equal the one before."""
    video = toy_video(batch, frames, seed)
    again = torch.rand(batch, frames, generator=torch.Generator().manual_seed(seed)) < 0.25
    for t in range(1, frames):
        video[:, t] = torch.where(again[:, t, None, None, None], video[:, t - 1], video[:, t])
    return video


@torch.no_grad()
def without_memory(model: StopOrForward, video: Tensor) -> Tensor:
    """Return where frames would stop if they were the first."""
    encoded = model.encode(video)
    stopped = torch.full(video.shape[:2], model.backbone.num_stages)
    for n in reversed(range(model.backbone.num_stages)):
        frames = encoded.pooled[n].flatten(0, 1)
        logits, _ = model.gates[n](frames, model.gates[n].initial_state(len(frames)))
        stopped[~(logits[:, 1] > logits[:, 0]).view(stopped.shape)] = n
    return stopped


@pytest.mark.parametrize("state_update", BOTH_UPDATES)
def test_every_look_ahead_and_interleaving_gives_the_same(state_update: StateUpdate) -> None:
    happened = Counter[str]()

    def check(
        seed: int, stages: int, batch: int, frames: int, share: float, nan_share: float,
        ends: tuple[float, int] | None, ahead: LookAhead, streams: tuple[int, int, int],
    ) -> None:  # fmt: skip
        model = fickle_model(seed, stages, state_update, share, nan_share, ends)
        video = fickle_video(batch, frames, seed + 3)
        masked = model.decide(model.encode(video))
        for plan in (None, ahead, LookAhead(frames, stages), LookAhead(frames, 1), LookAhead(1, 0)):
            model.look_ahead = plan
            with FlopCounterMode(display=False) as counter:
                output = model(video)
            assert_same(output, masked)
            executed = float((output.macs + output.speculative_macs).sum())
            assert counter.get_total_flops() / 2 == executed
            happened["speculated"] += bool(output.speculative_macs.any())
            if plan == LookAhead(1, 0):
                assert not output.speculative_macs.any()
        session = model.stream(batch)
        with FlopCounterMode(display=False) as counter:
            steps = [session(frame) for frame in video.unbind(1)]
            result = session.result()
        assert counter.get_total_flops() / 2 == float(result.macs.sum())
        assert torch.equal(torch.stack([step.stopped_at for step in steps], 1), masked.stopped_at)
        assert torch.equal(result.fallback_frame, masked.fallback_frame)
        torch.testing.assert_close(result.logits, masked.logits)
        with FlopCounterMode(display=False) as counter:
            events = list(model.serve_streams(video, *streams))
        results = [event for event in events if isinstance(event, VideoResult)]
        executed = sum(each.macs + each.speculative_macs for each in results)
        # A gate is asked about all streams of a batch at once, and shared work is counted once.
        assert counter.get_total_flops() / 2 == pytest.approx(executed)
        for each in results:
            assert isinstance(each.key, int)
            assert each.error is None
            assert (each.macs, each.fallback_frame) == (masked.macs[each.key], masked.fallback_frame[each.key])
            torch.testing.assert_close(each.logits, masked.logits[each.key])
            stopped = [e.stopped_at for e in events if not isinstance(e, VideoResult) and e.key == each.key]
            assert stopped == masked.stopped_at[each.key, : len(stopped)].tolist()
            assert len(stopped) == int(masked.seen[each.key].sum())
        looked_at = masked.seen
        happened["memory changed it"] += int((without_memory(model, video) != masked.stopped_at)[looked_at].any())
        happened["no verdict"] += bool(nan_share) and bool(masked.gate_logits.isnan().any())  # type: ignore[union-attr]
        happened["ended"] += bool((~masked.seen).any())
        happened["fallback"] += bool(masked.fallback.any())

    for seed in range(4):
        check(
            seed, 2 + seed % 3, 4, 8, 0.8, 0.1 * (seed % 2), (0.8, 3), LookAhead(3 + seed, seed % 2), (3, 2, 1 + seed)
        )
    settings(max_examples=25)(
        given(
            seed=st.integers(0, 5000),
            stages=st.integers(1, 4),
            batch=st.integers(1, 4),
            frames=st.integers(1, 9),
            share=st.sampled_from([0.3, 0.6, 0.9]),
            nan_share=st.sampled_from([0.0, 0.0, 0.2]),
            ends=st.none() | st.tuples(st.sampled_from([0.5, 0.9, 1.0]), st.integers(0, 4)),
            ahead=st.builds(LookAhead, st.integers(1, 9), st.integers(0, 4)),
            streams=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6)),
        )(check)
    )()
    assert all(happened[name] for name in ("memory changed it", "ended", "no verdict")), happened
    assert happened["speculated"]


def test_tuning_keeps_a_choice_and_changes_no_answer() -> None:
    model = fickle_model(1, 3, "used", 0.8, 0.0, (0.9, 2))
    video = fickle_video(3, 8, 5)
    before = model(video)
    choice = model.tune(video)
    assert model.look_ahead is choice
    assert 1 <= choice.frames <= 8
    assert choice.stages in (0, 3)
    assert_same(model(video), before)
    one, two = model(video), model(video)
    assert torch.equal(one.speculative_macs, two.speculative_macs)


@pytest.mark.parametrize("wrong", [(0, 0), (-1, 0), (4, -1), (2.5, 0), (4, None)])
def test_look_aheads_that_make_no_sense(wrong: tuple[Any, Any]) -> None:
    with pytest.raises(DynskipError, match="LookAhead"):
        LookAhead(*wrong)


def test_gates_that_broadcast_are_asked_once_a_video() -> None:
    """The work on the state is shared by the frames of a window."""
    rows: list[tuple[int, ...]] = []

    class Noted(PolicyGate):
        def step(self, embedded: Tensor, state: GateState) -> tuple[Tensor, GateState]:
            rows.append((embedded.ndim, len(state[0])))
            return super().step(embedded, state)

    backbone = toy_backbone(0, 1)
    model = StopOrForward(backbone, [Noted(backbone.num_features[0], 4).double()]).eval()
    video = toy_video(3, 6)
    model.lookup_for((SIZE, SIZE))  # asks the gates as well
    rows.clear()
    model.run_clip(video, 6)
    assert rows[0] == (3, 3)


def test_a_gate_with_a_state_of_another_kind_moves_with_used_frames_alone() -> None:
    class Counting(nn.Module):
        """Forward a frame if the number of used frames so far is even. The state is an integer."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("origin", torch.zeros(1, 2, 3, dtype=torch.float64))

        def initial_state(self, batch: int) -> GateState:
            origin = self.get_buffer("origin")
            return origin.new_zeros(batch, 1, dtype=torch.long), origin.repeat(batch, 1, 1)

        def forward(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
            bright = pooled.mean(1, keepdim=True) > 0
            forward = torch.where((state[0] % 2 == 0) | bright, 1.0, -1.0).to(pooled)
            return torch.cat([-forward, forward], 1), (state[0] + 1, state[1] + 1)

    backbone = toy_backbone(0, 2)
    video = randn(3, 7, 3, SIZE, SIZE, seed=0)
    for state_update in BOTH_UPDATES:
        model = StopOrForward(backbone, [Counting(), Counting()], state_update=state_update).eval()
        masked = model.decide(model.encode(video))
        for window in (1, 3, 7):
            assert_same(model.run_clip(video, window), masked)
        session = model.stream(3)
        stopped = [session(frame).stopped_at for frame in video.unbind(1)]
        assert torch.equal(torch.stack(stopped, 1), masked.stopped_at)
