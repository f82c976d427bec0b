from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import random
from collections import Counter
from collections.abc import AsyncIterator, Hashable, Iterable, Iterator
from typing import Any

import pytest
import torch
from helpers import (
    BOTH_UPDATES,
    SIZE,
    Case,
    StateUpdate,
    cases,
    large_cases,
    random_gates,
    toy_model,
    toy_video,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dynskip import (
    DynskipError,
    EarlyTerminator,
    FLOPsLookup,
    FrameResult,
    SkipOutput,
    StopOrForward,
    VideoResult,
    stage_model,
)


class CameraError(RuntimeError):
    pass


class Camera:
    """An iterator over frames that may fail, and that counts what is asked of it."""

    def __init__(self, frames: Iterable[Any], fails_at: int | None = None) -> None:
        self.frames, self.fails_at = iter(frames), fails_at
        self.pulled, self.closed = 0, 0

    def __iter__(self) -> Camera:
        return self

    def __next__(self) -> Any:
        frame = next(self.frames)
        if self.pulled == self.fails_at:
            raise CameraError("unplugged")
        self.pulled += 1
        return frame

    def close(self) -> None:
        self.closed += 1


async def slowly(frames: Iterable[Any], seed: int, fails_at: int | None = None) -> AsyncIterator[Any]:
    """Hand out frames, each after a number of turns of the event loop."""
    turns = random.Random(seed)
    for t, frame in enumerate(frames):
        for _ in range(turns.choice([0, 0, 1, 5, 40])):
            await asyncio.sleep(0)
        if t == fails_at:
            raise CameraError("unplugged")
        yield frame


def gathered(events: AsyncIterator[Any]) -> list[Any]:
    async def run() -> list[Any]:
        return [event async for event in events]

    return asyncio.run(run())


def by_key(events: Iterable[Any]) -> tuple[dict[Hashable, list[FrameResult]], dict[Hashable, VideoResult]]:
    """Sort events by stream; check that the frames come in order, and then one result."""
    frames: dict[Hashable, list[FrameResult]] = {}
    results: dict[Hashable, VideoResult] = {}
    for event in events:
        assert event.key not in results
        if isinstance(event, VideoResult):
            results[event.key] = event
            frames.setdefault(event.key, [])
        else:
            assert event.frame == len(frames.setdefault(event.key, []))
            frames[event.key].append(event)
    assert frames.keys() == results.keys()
    return frames, results


def assert_alone(
    frames: list[FrameResult], result: VideoResult, alone: SkipOutput, failed_at: int | None = None
) -> None:
    """Compare a stream with its video alone, up to where the stream ended."""
    seen = int(alone.seen[0].sum())
    failed = failed_at is not None and failed_at < seen
    seen = min(seen, failed_at) if failed_at is not None else seen
    assert len(frames) == result.frames_seen == seen
    assert [f.stopped_at for f in frames] == alone.stopped_at[0, :seen].tolist()
    assert [f.used for f in frames] == alone.used[0, :seen].tolist()
    for t, frame in enumerate(frames):
        used = alone.used[0, : t + 1]
        assert frame.running_logits.isnan().all() == (not used.any())
        if used.any():
            torch.testing.assert_close(frame.running_logits, alone.frame_logits[0, : t + 1][used].mean(0))
        if t + 1 < alone.seen.shape[1]:
            assert frame.ended == (not alone.seen[0, t + 1])
    assert result.frames_used == int(alone.used[0, :seen].sum())
    assert (result.error is not None) == failed
    if failed:
        assert isinstance(result.error, CameraError)
        return
    torch.testing.assert_close(result.logits, alone.logits[0])
    assert result.macs == float(alone.macs)
    assert result.fallback_frame == int(alone.fallback_frame)


# Results are those of each video alone


@pytest.mark.parametrize("state_update", BOTH_UPDATES)
@pytest.mark.parametrize("way", ["plain", "async"])
def test_streams_give_what_each_gives_alone(way: str, state_update: StateUpdate) -> None:
    happened = Counter[str]()

    def check(case: Case, max_streams: int, batch_size: int, look_ahead: int, fails: dict[int, int], seed: int) -> None:
        model, video = case.model(), case.video()
        order = random.Random(seed).sample(range(case.batch), case.batch)
        if way == "plain":
            plain = ((b, Camera(video[b], fails.get(b))) for b in order)
            events = list(model.serve_streams(plain, max_streams, batch_size, look_ahead))
        else:
            cameras = [(b, slowly(video[b], seed + b, fails.get(b))) for b in order]
            events = gathered(model.aserve_streams(slowly(cameras, seed), max_streams, batch_size))
        frames, results = by_key(events)
        assert sorted(results) == list(range(case.batch))  # type: ignore[type-var]
        for b in range(case.batch):
            alone = model.run_clip(video[b : b + 1], window=1)
            assert_alone(frames[b], results[b], alone, fails.get(b))
        if way == "plain":
            happened["speculated"] += sum(result.speculative_macs > 0 for result in results.values())
            assert look_ahead > 1 or not any(result.speculative_macs for result in results.values())
        happened["failed"] += sum(result.error is not None for result in results.values())
        happened["fallback"] += sum(result.fallback_frame >= 0 for result in results.values())
        happened["ended"] += sum(
            result.frames_seen < case.frames for result in results.values() if result.error is None
        )

    for seed, case in enumerate(large_cases("lstm", state_update)[:4]):
        check(case, 3, 2, 1 + seed, {seed % 5: 2}, seed)
    assert all(happened[name] for name in ("failed", "fallback", "ended")), happened
    settings(max_examples=15)(
        given(
            case=cases(updates=[state_update]),
            max_streams=st.integers(1, 6),
            batch_size=st.integers(1, 6),
            look_ahead=st.integers(1, 5),
            fails=st.dictionaries(st.integers(0, 4), st.integers(0, 7), max_size=2),
            seed=st.integers(0, 1000),
        )(check)
    )()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_of_other_dtypes(dtype: torch.dtype) -> None:
    model = toy_model(seed=2, terminator=EarlyTerminator(0.9, 2)).to(dtype)
    video = toy_video(6, 6, dtype=dtype)
    _, results = by_key(model.serve_streams(video, max_streams=4))
    assert len(results) == 6
    for b, result in results.items():
        assert result.logits.dtype == dtype
        assert result.logits.isfinite().all(), b


def test_streams_under_autocast() -> None:
    model, video = toy_model(seed=2).float(), toy_video(4, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        _, results = by_key(model.serve_streams(video))
        _, others = by_key(gathered(model.aserve_streams(video)))
    assert all(r.error is None and r.logits.isfinite().all() for r in [*results.values(), *others.values()])


def test_streams_of_several_frame_sizes() -> None:
    model = toy_model(seed=2, forward_threshold=(0.0, 0.5, 0.5))
    videos = [toy_video(1, 5, seed=b, size=8 if b % 2 else 12) for b in range(6)]
    frames, results = by_key(model.serve_streams([video[0] for video in videos], max_streams=4))
    for b, video in enumerate(videos):
        alone = model.run_clip(video, window=1)
        assert [f.stopped_at for f in frames[b]] == alone.stopped_at[0].tolist()
        assert results[b].macs == float(alone.macs)
        torch.testing.assert_close(results[b].logits, alone.logits[0])


# What is executed


def test_streams_macs_are_what_torch_counts() -> None:
    for state_update, threshold in itertools.product(BOTH_UPDATES, (0.5, (0.5, 0.5, 1.0))):
        model = toy_model(seed=4, state_update=state_update, forward_threshold=threshold)
        model.lookup_for((SIZE, SIZE))
        with FlopCounterMode(display=False) as counter:
            events = list(model.serve_streams(toy_video(5, 6), max_streams=3, batch_size=2))
        results = [event for event in events if isinstance(event, VideoResult)]
        assert counter.get_total_flops() / 2 == sum(result.macs for result in results)
        extra = sum(result.fallback_frame >= 0 for result in results)
        frames = sum(event.frame_macs for event in events if isinstance(event, FrameResult))
        assert (frames < sum(result.macs for result in results)) == (extra > 0)


def stage_calls(model: StopOrForward) -> list[tuple[int, int]]:
    """Record, from now on, each stage run: which stage, how many rows."""
    calls: list[tuple[int, int]] = []
    for n, stage in enumerate(list(model.backbone.model.children())[:-1]):

        def note(_: nn.Module, inputs: tuple[Any, ...], __: Any, n: int = n) -> None:
            calls.append((n, len(inputs[0])))

        stage.register_forward_hook(note)
    return calls


def test_streams_are_batched_per_stage() -> None:
    model, video = toy_model(seed=1, share=0.9), toy_video(32, 6)
    calls = stage_calls(model)
    frames, _ = by_key(model.serve_streams(video, max_streams=32, batch_size=8))
    rows = Counter[int]()
    for n, count in calls:
        rows[n] += count
    stopped_at = [frame.stopped_at for group in frames.values() for frame in group]
    assert rows[0] == 32 * 6
    assert rows[2] == sum(s >= 2 for s in stopped_at)
    assert max(count for _, count in calls) == 8
    assert len(calls) <= 1.25 * sum(math.ceil(count / 8) for count in rows.values())


def test_streams_stop_at_the_end_of_a_video_and_are_replaced_at_once() -> None:
    model = toy_model(forward_threshold=0.0, terminator=EarlyTerminator(0.01, 1))
    cameras = [Camera(itertools.repeat(frame)) for frame in toy_video(5, 1)[:, 0]]
    calls = stage_calls(model)
    _, results = by_key(model.serve_streams(cameras, max_streams=2))
    assert [results[b].frames_seen for b in range(5)] == [2] * 5
    assert [camera.pulled for camera in cameras] == [2] * 5
    assert all(camera.closed for camera in cameras)
    assert [count for n, count in calls if n == 0] == [2, 2, 2, 2, 1, 1]


# Memory and fairness


def test_streams_pull_a_frame_only_when_it_can_be_taken() -> None:
    model, video = toy_model(seed=1), toy_video(1, 1)[0, 0]
    cameras: list[Camera] = []

    def endless() -> Iterator[Camera]:
        while True:
            cameras.append(Camera(video + 0.1 * t for t in range(9)))
            yield cameras[-1]

    done: Counter[Hashable] = Counter()
    ended = 0
    events = model.serve_streams(endless(), max_streams=3, batch_size=2)
    for event in itertools.islice(events, 200):
        if isinstance(event, VideoResult):
            ended += 1
        else:
            done[event.key] += 1
        assert len(cameras) <= ended + 3 + 1
        for b, camera in enumerate(cameras):
            assert camera.pulled <= done[b] + 2  # one in flight, and one event on its way to us
    assert ended > 10


@pytest.mark.parametrize("batch_size", [1, 4])
def test_streams_none_waits_longer_than_the_documented_bound(batch_size: int) -> None:
    max_streams = 12
    model = toy_model(seed=1, stages=3, share=0.8)
    calls = stage_calls(model)
    bound = 3 * (4 * 3 + max_streams)
    pulled_at: dict[tuple[int, int], int] = {}

    def camera(b: int) -> Iterator[Tensor]:
        # One stream gets deep, and is alone there; the others stop at once.
        video = toy_video(1, 40, seed=b if b == 0 else 1)[0]
        for t, frame in enumerate(video):
            pulled_at[b, t] = len(calls)
            yield frame

    longest = 0
    for event in model.serve_streams([camera(b) for b in range(max_streams)], max_streams, batch_size):
        if isinstance(event, FrameResult):
            assert isinstance(event.key, int)
            longest = max(longest, len(calls) - pulled_at[event.key, event.frame or 0])
    assert 3 <= longest <= bound


class ByBrightness(nn.Module):
    """Forward frames of positive mean."""

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return ()

    def forward(self, pooled: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        mean = pooled.mean(1)
        return torch.stack([-mean, mean], 1), state


def test_streams_a_lone_deep_frame_is_not_starved_by_full_stages() -> None:
    stages = [nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Identity()) for _ in range(3)]
    for stage in stages:
        nn.init.dirac_(next(stage.parameters()))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    model = StopOrForward(
        stage_model(nn.Sequential(*stages, head).eval(), input_size=(3, 8, 8)), [ByBrightness() for _ in range(3)]
    ).eval()
    calls = stage_calls(model)
    # Dark frames keep stage 0 full; the bright one has to get through anyway.
    sources: dict[str, Iterable[Tensor]] = {f"dark {i}": itertools.repeat(-torch.ones(3, 8, 8)) for i in range(9)}
    sources["bright"] = [torch.ones(3, 8, 8)]
    for event in model.serve_streams(sources.items(), max_streams=10, batch_size=3):
        if event.key == "bright":
            break
    assert 3 <= len(calls) <= 3 * (4 * 3 + 10)


# Faults


def bad_frames() -> dict[str, tuple[Any, str]]:
    good = toy_video(1, 1)[0, 0]
    return {
        "channels": (torch.zeros(4, 8, 8).double(), r"must have shape \(3, H, W\); got \(4, 8, 8\)"),
        "rank": (torch.zeros(8, 8).double(), r"got \(8, 8\)"),
        "dtype": (good.float(), "frame is torch.float32 and the model torch.float64"),
        "bytes": (torch.zeros(3, 8, 8, dtype=torch.uint8), "got torch.uint8"),
        "nothing": (None, "got NoneType"),
        "nan": (good * math.nan, "NaN or infinite"),
        "size": (torch.zeros(3, 9, 8).double(), "is 9x8 and earlier ones of this stream were 8x8"),
        "empty": (torch.zeros(3, 0, 8).double(), r"empty: shape \(3, 0, 8\)"),
    }


@pytest.mark.parametrize("way", ["plain", "async"])
def test_streams_fail_alone(way: str) -> None:
    model, video = toy_model(seed=2), toy_video(4, 6)
    bad = bad_frames()
    sources: dict[Hashable, Any] = {b: video[b] for b in range(4)}
    sources |= {name: [video[0, 0], frame, video[0, 1]] for name, (frame, _) in bad.items()}
    sources |= {"no iterable": 3, "empty video": []}
    items = list(sources.items())
    random.Random(0).shuffle(items)
    events = model.serve_streams(items, 5) if way == "plain" else gathered(model.aserve_streams(items, 5))
    frames, results = by_key(events)
    for name, (_, telling) in bad.items():
        error = results[name].error
        assert isinstance(error, DynskipError)
        with pytest.raises(DynskipError, match=telling):
            raise error
        assert results[name].frames_seen == len(frames[name]) == 1
    assert isinstance(results["no iterable"].error, TypeError)
    assert results["empty video"].error is None
    assert results["empty video"].frames_seen == results["empty video"].macs == 0
    assert results["empty video"].logits.isnan().all()
    for b in range(4):
        assert_alone(frames[b], results[b], model.run_clip(video[b : b + 1], window=1))


@pytest.mark.parametrize("given_table", [True, False])
def test_streams_of_a_size_that_the_model_cannot_run_fail_alone(given_table: bool) -> None:
    head = nn.Sequential(nn.Flatten(), nn.Linear(6 * SIZE * SIZE, 4))
    backbone = stage_model([nn.Conv2d(3, 6, 3, padding=1).double(), head.double()], input_size=(3, SIZE, SIZE))
    model = StopOrForward(backbone, random_gates((6,), 1), lookup=FLOPsLookup([1.0]) if given_table else None).eval()
    sources = [("good", toy_video(1, 3)[0]), ("bad", toy_video(1, 3, size=12)[0])]
    _, results = by_key(model.serve_streams(sources))
    assert results["good"].error is None
    assert isinstance(results["bad"].error, DynskipError)
    assert "cannot run frames of 12x12" in str(results["bad"].error)


def test_streams_that_are_cancelled_from_within_fail_alone() -> None:
    async def cancelled() -> AsyncIterator[Tensor]:
        yield toy_video(1, 1)[0, 0]
        raise asyncio.CancelledError

    model = toy_model(seed=2)
    _, results = by_key(gathered(model.aserve_streams([("bad", cancelled()), ("good", toy_video(1, 4)[0])])))
    assert isinstance(results["bad"].error, DynskipError)
    assert results["good"].error is None


def test_streams_a_failing_list_of_sources_is_told_and_everything_closed() -> None:
    camera = Camera(toy_video(1, 6)[0])

    def sources() -> Iterator[Camera]:
        yield camera
        raise CameraError("no more cameras")

    with pytest.raises(CameraError, match="no more cameras"):
        list(toy_model().serve_streams(sources()))
    assert camera.closed


# Leaving, waiting, naming


def test_streams_left_early_release_their_sources() -> None:
    cameras = [Camera(video) for video in toy_video(6, 8)]
    events = toy_model(seed=1).serve_streams(cameras, max_streams=3)
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert [camera.closed > 0 for camera in cameras] == [True] * 3 + [False] * 3


def test_streams_left_early_release_asynchronous_sources() -> None:
    released: list[int] = []

    async def camera(b: int) -> AsyncIterator[Tensor]:
        try:
            for t, frame in enumerate(toy_video(1, 8)[0]):
                if b == 0 and t == 2:
                    await asyncio.Event().wait()
                yield frame
        finally:
            released.append(b)

    async def run() -> None:
        events = toy_model(seed=1).aserve_streams([camera(b) for b in range(3)])
        async with contextlib.aclosing(events):  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, FrameResult) and event.frame == 5:
                    break
        assert sorted(released) == [0, 1, 2]
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())


def test_streams_a_slow_camera_holds_up_nobody() -> None:
    model, video = toy_model(seed=1), toy_video(4, 5)
    finished: list[Hashable] = []

    async def run() -> None:
        others_done = asyncio.Event()

        async def slow() -> AsyncIterator[Tensor]:
            yield video[0, 0]
            await others_done.wait()
            yield video[0, 1]

        sources = [("slow", slow()), *((b, video[b]) for b in range(1, 4))]
        async for event in model.aserve_streams(sources, max_streams=2):
            if isinstance(event, VideoResult):
                finished.append(event.key)
                if len(finished) == 3:
                    others_done.set()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert finished[-1] == "slow"
    assert len(finished) == 4


def test_streams_a_source_of_sources_may_be_slow() -> None:
    model, video = toy_model(seed=1), toy_video(3, 4)

    async def arriving() -> AsyncIterator[tuple[str, Tensor]]:
        for b in range(3):
            await asyncio.sleep(0.01)
            yield f"camera {b}", video[b]

    _, results = by_key(gathered(model.aserve_streams(arriving(), max_streams=2)))
    assert sorted(map(str, results)) == ["camera 0", "camera 1", "camera 2"]


def test_streams_endless_empty_sources_do_not_keep_others_waiting() -> None:
    model = toy_model(seed=1)
    sources = itertools.chain([("real", toy_video(1, 3)[0])], ((b, []) for b in itertools.count()))
    events = itertools.islice(model.serve_streams(sources, max_streams=2), 200)
    assert any(isinstance(event, VideoResult) and event.key == "real" for event in events)


def test_streams_without_any_source() -> None:
    model = toy_model()
    assert list(model.serve_streams([])) == []
    assert gathered(model.aserve_streams([])) == []


@pytest.mark.parametrize("numbers", [{"max_streams": 0}, {"batch_size": 0}, {"max_streams": -1}])
def test_streams_refuse_what_makes_no_sense(numbers: dict[str, int]) -> None:
    model = toy_model()
    for call in (model.serve_streams, model.aserve_streams):
        with pytest.raises(DynskipError, match="have to be positive"):
            call([], **numbers)
    model.train()
    with pytest.raises(DynskipError, match=r"model.eval\(\)"):
        model.serve_streams([])
