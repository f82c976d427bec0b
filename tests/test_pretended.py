"""Models on a device: no operation mixes it with the host, and the host seldom waits for it.

The device pretends (`pretended.py`), so that this needs no GPU. `python tests/test_pretended.py` prints all counts.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pytest
import torch
from torch.utils import backend_registration

if not hasattr(backend_registration, "_DummyBackendModule"):
    pytest.skip(f"torch {torch.__version__} takes no device written in Python", allow_module_level=True)

from helpers import CLASSES, SIZE, assert_same, consensuses, fields_of, toy_backbone, toy_model, toy_video
from pretended import DEVICE, Counts, Pretended, on_host, pretended
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dynskip import (
    CoarseToFine,
    ConfidenceGate,
    EarlyExit,
    EarlyTerminator,
    FixedGate,
    FrameResult,
    LinearGate,
    MeanOfLogits,
    PairwiseGate,
    PolicyGate,
    RandomGate,
    SimilarityGate,
    SkipOutput,
    SoFLoss,
    StopOrForward,
    VideoResult,
    calibrate,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import common

Kind: TypeAlias = Literal["schedule", "used", "reached"]
KINDS: tuple[Kind, ...] = ("schedule", "used", "reached")
FRAMES = common.FRAMES
# How often the host may wait in a clip of 16 frames, for any number of videos.
CLIP_WAITS: dict[Kind, int] = {"schedule": 24, "used": 60, "reached": 60}
ONLINE_WAITS, STREAM_WAITS = 6, 1  # a frame
CONTROL_LAUNCHES = 600  # beside those of the stages, in 8 videos that follow the schedule


@functools.cache
def scheduled() -> tuple[StopOrForward, Tensor]:
    with torch.random.fork_rng(devices=[]):
        model, video = common.build(argparse.Namespace(backbone="test_resnet", device="cpu"), 64)
    return model, video.repeat(8, 1, 1, 1, 1)


@functools.cache
@torch.no_grad()
def changing(state_update: Any) -> tuple[StopOrForward, Tensor]:
    """Return a model whose decisions depend much on which frames were used before, and 8 videos."""
    backbone, source = scheduled()[0].backbone, torch.Generator().manual_seed(3)
    noise = torch.randn(8, FRAMES, 3, 64, 64, generator=source)
    contrast = 3 * torch.rand(8, FRAMES, 1, 1, 1, generator=source)
    video = noise * contrast + 2 * torch.randn(8, FRAMES, 3, 1, 1, generator=source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        gates = [PolicyGate(channels, 64) for channels in backbone.num_features]
    model = StopOrForward(backbone, gates, terminator=EarlyTerminator(0.999, 3), state_update=state_update).eval()
    for gate, pooled in zip(gates, model.encode(video).pooled, strict=True):
        gate.project.weight.mul_(5 / pooled.std())
        gate.decide.weight.mul_(10)
        gate.cell.weight_hh.mul_(3)
        logits, _ = gate(pooled.flatten(0, 1), gate.initial_state(8 * FRAMES))
        gate.decide.bias[1] -= logits.diff(dim=1).quantile(0.12)
    model.lookup_for((64, 64))  # measured once
    return model, video


def case(kind: Kind, videos: int) -> tuple[StopOrForward, Tensor]:
    model, video = scheduled() if kind == "schedule" else changing(kind)
    return model, video[:videos]


def there(model: Any) -> Any:
    return copy.deepcopy(model).to(DEVICE)


def assert_close(actual: SkipOutput, expected: SkipOutput) -> None:
    """Compare an output with one of the CPU: float32 may round, decisions may not differ."""
    actual = on_host(actual)
    for name, wanted in fields_of(expected).items():
        got = getattr(actual, name)
        if not isinstance(wanted, Tensor) or name == "speculative_macs":
            continue
        assert got.dtype == wanted.dtype, name
        tolerance = 1e-3 if got.is_floating_point() else 0
        explain = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True, msg=explain)


def seldom_waits(counts: Counts, limit: float) -> None:
    assert not counts.mixed, counts.report()
    assert counts.waited <= limit, f"{counts.waited} waits, at most {limit} wanted\n{counts.report()}"


def online(model: StopOrForward, video: Tensor) -> tuple[Tensor, Tensor]:
    session = model.stream(len(video))
    steps = [session(frames).stopped_at for frames in video.unbind(1)]
    return torch.stack(steps, 1), session.result().logits


def streamed(
    model: StopOrForward, videos: Iterable[Iterable[Tensor]], **options: int
) -> tuple[dict[Any, list[int]], dict[Any, Tensor]]:
    """Return where the frames of each stream stopped, and its prediction."""
    return gathered(model.serve_streams(videos, **options))


def gathered(events: Iterable[FrameResult | VideoResult]) -> tuple[dict[Any, list[int]], dict[Any, Tensor]]:
    stopped_at: dict[Any, list[int]] = {}
    logits = {}
    for event in events:
        if isinstance(event, FrameResult):
            stopped_at.setdefault(event.key, []).append(event.stopped_at)
        else:
            assert event.error is None, event.error
            logits[event.key] = event.logits
    return stopped_at, logits


def sixteen(video: Tensor) -> list[list[Tensor]]:
    """Return 16 streams of a few videos' frames."""
    return [list(frames) for frames, _ in zip(itertools.cycle(video), range(16), strict=False)]


def stages_alone(model: StopOrForward, images: Tensor) -> None:
    with torch.no_grad():
        carry = model.backbone.start(images)
        for n in range(model.backbone.num_stages):
            carry = model.backbone.run(n, carry)
            model.backbone.pool(n, carry)
        model.backbone.head(carry)


@pytest.mark.parametrize("videos", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_clip(kind: Kind, videos: int) -> None:
    model, video = case(kind, videos)
    with pretended() as counts:
        moved, frames = there(model), video.to(DEVICE)
        counts.clear()
        output = moved(frames)
        seldom_waits(counts, CLIP_WAITS[kind])
    assert isinstance(output.stopped_at, Pretended)
    assert_close(output, model(video))


def test_a_clip_launches_little_beside_its_stages() -> None:
    model, video = case("schedule", 8)
    with pretended() as counts:
        moved, frames = there(model), video.to(DEVICE)
        counts.clear()
        stages_alone(moved, frames.flatten(0, 1))
        alone = counts.launches
        counts.clear()
        moved(frames)
    assert counts.launches - alone <= CONTROL_LAUNCHES, f"{alone} launches of the stages alone, {counts}"


@pytest.mark.parametrize("videos", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_session(kind: Kind, videos: int) -> None:
    model, video = case(kind, videos)
    with pretended() as counts:
        moved, frames = there(model), video.to(DEVICE)
        counts.clear()
        stopped_at, logits = online(moved, frames)
        seldom_waits(counts, ONLINE_WAITS * FRAMES)
    wanted = model(video)
    assert torch.equal(on_host(stopped_at), wanted.stopped_at)
    torch.testing.assert_close(on_host(logits), wanted.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_streams(kind: Kind) -> None:
    model, video = case(kind, 8)
    with pretended() as counts:
        moved, sources = there(model), sixteen(video.to(DEVICE))
        counts.clear()
        stopped_at, logits = streamed(moved, sources, max_streams=16, batch_size=16)
        seldom_waits(counts, STREAM_WAITS * sum(map(len, stopped_at.values())))
    wanted_stops, wanted_logits = streamed(model, sixteen(video), max_streams=16, batch_size=16)
    assert stopped_at == wanted_stops
    for key, value in wanted_logits.items():
        torch.testing.assert_close(on_host(logits[key]), value, rtol=1e-3, atol=1e-3)


@pytest.fixture
def counts() -> Iterator[Counts]:
    """Check that a test does not mix the device with the host."""
    with pretended() as counted:
        yield counted
    assert not counted.mixed, counted.report()


def small(**kwargs: Any) -> tuple[StopOrForward, Tensor]:
    return toy_model(1, terminator=EarlyTerminator(0.9, 2), **kwargs), toy_video(3, 6, seed=5)


def test_encode_decide_and_dense(counts: Counts) -> None:
    model, video = small()
    moved, frames = there(model), video.to(DEVICE)
    encoded = moved.encode(frames)
    with torch.no_grad():
        assert_same(on_host(moved.decide(encoded)), model.decide(model.encode(video)))
        assert_same(on_host(moved(frames, dense=True)), model(video, dense=True))
        assert set(on_host(moved.decide(encoded, sample=True).stopped_at).flatten().tolist()) <= {-1, 0, 1, 2, 3}


@pytest.mark.parametrize("window", [1, 3])
def test_any_window(counts: Counts, window: int) -> None:
    model, video = small()
    moved, frames = there(model), video.to(DEVICE)
    assert_same(on_host(moved.run_clip(frames, window)), model(video))
    assert len(moved(frames, sample=True).macs) == 3


@pytest.mark.parametrize("order", [None, CoarseToFine()])
def test_videos_of_different_length_in_any_order(counts: Counts, order: Any) -> None:
    model, video = small(order=order)
    moved, frames, lengths = there(model), video.to(DEVICE), torch.tensor([2, 6, 3])
    for given in (lengths, lengths.to(DEVICE)):
        assert_same(on_host(moved(frames, lengths=given)), model(video, lengths=lengths))
    assert_same(on_host(moved.run_clip(frames, 2, lengths)), model.run_clip(video, 2, lengths))
    with torch.no_grad():
        encoded = moved.encode(frames, lengths)
        assert_same(on_host(moved.decide(encoded)), model.decide(model.encode(video, lengths)))
        assert_same(on_host(moved(frames, lengths=lengths, dense=True)), model(video, lengths=lengths, dense=True))
    output = moved.train()(frames, lengths=lengths)
    SoFLoss(moved.lookup_for((SIZE, SIZE)))(output, torch.tensor([0, 1, 2])).total.backward()


def test_an_order_adds_no_waits(counts: Counts) -> None:
    model, video = small()
    moved, frames, waited = there(model), video.to(DEVICE), []
    for moved.order in (None, CoarseToFine()):
        moved(frames)
        counts.clear()
        moved(frames)
        waited.append(counts.waited)
    assert waited[0] == waited[1]


def test_a_video_without_used_frames(counts: Counts) -> None:
    model, video = small(forward_threshold=[0.5, 0.5, 1.0])
    moved, frames = there(model), video.to(DEVICE)
    wanted = model(video)
    assert wanted.fallback.all()
    assert_same(on_host(moved(frames)), wanted)
    torch.testing.assert_close(on_host(online(moved, frames)[1]), wanted.logits)
    for row, logits in streamed(moved, map(list, frames))[1].items():
        torch.testing.assert_close(on_host(logits), wanted.logits[row])


GATES: dict[str, Callable[[int], nn.Module]] = {
    "policy": lambda channels: PolicyGate(channels, 5, forward_bias=0.5),
    "without memory": lambda channels: PolicyGate(channels, 5, temporal=None, forward_bias=0.5),
    "linear": lambda channels: LinearGate(channels, forward_bias=0.5),
    "pairwise": lambda channels: PairwiseGate(channels, 5, forward_bias=0.5),
    "similarity": lambda channels: SimilarityGate(channels, 0.05),
    "confidence": lambda channels: ConfidenceGate(channels, CLASSES, 0.5),
    "entropy": lambda channels: ConfidenceGate(channels, CLASSES, 0.5, stop="unsure", measure="entropy"),
    "random": lambda channels: RandomGate(channels, 0.8),
    "fixed": lambda channels: FixedGate(),
}


@pytest.mark.parametrize("state_update", ["used", "reached"])
@pytest.mark.parametrize("kind", GATES)
def test_gates_of_any_kind(counts: Counts, kind: str, state_update: Any) -> None:
    backbone = toy_backbone(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gates = [GATES[kind](channels).double() for channels in backbone.num_features]
    model = StopOrForward(backbone, gates, state_update=state_update, terminator=EarlyTerminator(0.9, 2)).eval()
    video = toy_video(3, 6, seed=5)
    moved, frames, wanted = there(model), video.to(DEVICE), model(video)
    assert_same(on_host(moved(frames)), wanted)
    assert_same(on_host(moved.decide(moved.encode(frames))), model.decide(model.encode(video)))
    assert torch.equal(on_host(online(moved, frames)[0]), wanted.stopped_at)


@pytest.mark.parametrize("number", range(len(consensuses())))
def test_consensuses_of_any_kind(counts: Counts, number: int) -> None:
    model, video = small()
    moved, frames, waits = there(model), video.to(DEVICE), []
    for consensus in (MeanOfLogits(), consensuses(dtype=torch.float64)[number]):
        model.consensus, moved.consensus = consensus, there(consensus)
        counts.clear()
        output, answer = moved(frames), online(moved, frames)[1]
        waits.append(counts.waited)
        wanted = model(video)
        assert_same(on_host(output), wanted)
        torch.testing.assert_close(on_host(answer), wanted.logits)
        with torch.no_grad():
            assert_same(on_host(moved.decide(moved.encode(frames))), model.decide(model.encode(video)))
    assert waits[0] == waits[1]
    moved.train()(frames).logits.sum().backward()


def test_a_training_step_has_the_gradients_of_the_cpu(counts: Counts) -> None:
    model, video = small()
    targets, gradients = torch.tensor([0, 1, 2]), []
    for trained, frames, labels in (
        (copy.deepcopy(model), video, targets),
        (there(model), video.to(DEVICE), targets.to(DEVICE)),
    ):
        optimiser = torch.optim.AdamW(trained.train().parameters(), lr=0.1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = SoFLoss(trained.lookup_for((SIZE, SIZE)))(trained(frames), labels)
        parts.total.backward()
        gradients.append({name: on_host(p.grad) for name, p in trained.named_parameters() if p.grad is not None})
        optimiser.step()
    wanted, got = gradients
    assert wanted.keys() == got.keys()
    assert len(wanted) > 10
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, msg=functools.partial("{}: {}".format, name))


@pytest.mark.parametrize("share", ["some", "none"])
def test_a_session_goes_on_elsewhere(counts: Counts, share: str) -> None:
    """On the device, then on the CPU, then back; also while a stopped frame is kept because none was used."""
    model, video = small(forward_threshold=[0.5, 0.5, 0.5 if share == "some" else 1.0])
    moved, frames = there(model), video.to(DEVICE)
    wanted, answer = online(model, video)
    here: Callable[[Any], Any] = functools.partial(tree_map_only, Tensor, lambda x: x.cpu())
    back: Callable[[Any], Any] = functools.partial(tree_map_only, Tensor, lambda x: x.to(DEVICE))
    ways = [(moved, frames, None), (moved, frames, lambda state: state), (model, video, here), (moved, frames, back)]
    ways += [(model, video, lambda state: state), (moved, frames, lambda state: state)]  # one that was not moved
    state, session, steps = None, None, []
    for t, (runs, images, move) in enumerate(ways):
        session = runs.stream(3)
        if move is not None:
            session.load_state_dict(move(state))
        steps.append(on_host(session(images[:, t]).stopped_at))
        state = session.state_dict()
    assert session is not None
    assert torch.equal(torch.stack(steps, 1), wanted)
    prediction = session.result()
    torch.testing.assert_close(on_host(prediction.logits), answer)
    session.reset([0, 2])
    session.reset()


def test_streams_that_arrive_when_they_like(counts: Counts) -> None:
    model, video = small()
    moved = there(model)

    async def run() -> list[FrameResult | VideoResult]:
        return [event async for event in moved.aserve_streams(map(list, video.to(DEVICE)), 2, 2)]

    stopped_at, _ = gathered(asyncio.run(run()))
    assert stopped_at == streamed(model, map(list, video))[0]


@pytest.mark.parametrize("features", ["there", "here"])
def test_calibration(counts: Counts, features: str) -> None:
    model, video, targets = small()[0], toy_video(2, 3, seed=5), torch.tensor([0, 1])
    budget = 0.7 * 3 * model.lookup_for((SIZE, SIZE)).dense
    wanted = calibrate.to_budget(model, [(video, targets)], budget)
    moved = there(model)
    given = (video, targets) if features == "here" else (video.to(DEVICE), targets.to(DEVICE))
    assert calibrate.to_budget(moved, [given], budget) == wanted
    wanted.apply(moved)
    wanted.apply(model)
    assert_same(on_host(moved.decide(moved.encode(video.to(DEVICE)))), model.decide(model.encode(video)))


def exits() -> tuple[EarlyExit, Tensor]:
    backbone = toy_backbone(2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gates: list[nn.Module] = [ConfidenceGate(c, CLASSES, 0.35).double() for c in backbone.num_features[:-1]]
    return EarlyExit(backbone, [*gates, FixedGate()]).eval(), toy_video(2, 6).flatten(0, 1)


def test_early_exits(counts: Counts) -> None:
    model, images = exits()
    moved, pictures, wanted = there(model), images.to(DEVICE), model(images)
    assert len(wanted.stopped_at.unique()) > 1
    assert_same(on_host(moved(pictures)), wanted)
    with torch.no_grad():
        assert_same(on_host(moved.decide(moved.encode(pictures))), wanted, skip=["logits"])
    moved.train()(pictures).logits.sum().backward()
    assert isinstance(moved.backbone.model[0][0].weight.grad, Pretended)


def test_folded_stages(counts: Counts) -> None:
    model, video = case("schedule", 1)
    fast, agreement = there(model).optimize(video.to(DEVICE), compile=False)
    assert agreement.decisions == 1
    assert_close(fast(video.to(DEVICE)), model(video))


def ways_to_run() -> dict[str, Callable[[Any, Tensor], Any]]:
    """Return all ways to give a model frames; each returns a tensor that shows where it was computed."""
    return {
        "clip": lambda model, video: model(video).logits,
        "window": lambda model, video: model.run_clip(video, 2).logits,
        "sampled": lambda model, video: model(video, sample=True).logits,
        "dense": lambda model, video: model(video, dense=True).logits,
        "encode": lambda model, video: model.encode(video).frame_logits,
        "training": lambda model, video: copy.deepcopy(model).train()(video).logits,
        "session": lambda model, video: online(model, video)[0],
        "session of one": lambda model, video: model.stream()(video[0, 0]).gate_logits,
        "streams": lambda model, video: streamed(model, map(list, video))[1][0],
        "optimize": lambda model, video: model.optimize(video, compile=False)[0](video).logits,
        "exits": lambda model, video: there(exits()[0])(video.flatten(0, 1)).logits,
        "exits in training": lambda model, video: there(exits()[0]).train()(video.flatten(0, 1)).logits,
    }


@pytest.mark.parametrize("way", ways_to_run())
def test_frames_on_the_host_are_moved(counts: Counts, way: str) -> None:
    model, video = small()
    assert isinstance(ways_to_run()[way](there(model), video), Pretended)


# The device itself


def test_what_counts_as_a_wait() -> None:
    with pretended() as counts:
        x, index = torch.ones(4, 3, device=DEVICE), torch.arange(2, device=DEVICE)

        def waits(run: Callable[[], Any]) -> list[str]:
            counts.clear()
            run()
            return sorted(kind for (kind, _), count in counts.waits.items() for _ in range(count))

        assert waits(lambda: x.sum() + x[index].mul(2).cumsum(0)[:, 1:].max()) == []
        assert waits(lambda: torch.where(x > 0, x, 0.0)) == []
        assert waits(lambda: x.masked_fill_(x > 2, 1.0)) == []
        assert waits(lambda: torch.ones(3).to(DEVICE, non_blocking=True)) == []
        assert waits(lambda: bool(x.any())) == waits(lambda: float(x.sum())) == ["item"]
        assert waits(lambda: x.nonzero()) == ["nonzero"]
        assert waits(lambda: x[x > 0]) == ["mask"]
        assert waits(lambda: x[[0, 1]]) == waits(lambda: torch.ones(3).to(DEVICE)) == ["host to device"]
        assert waits(lambda: torch.tensor([1.0], device=DEVICE)) == ["host to device"]
        assert waits(lambda: x[torch.tensor([1])]) == ["index from host"]
        assert waits(lambda: x.tolist()) == waits(lambda: x.cpu()) == ["device to host"]
        assert not counts.mixed


def test_what_counts_as_mixed() -> None:
    with pretended() as counts:
        x, index, host = torch.ones(4, 3, device=DEVICE), torch.arange(2, device=DEVICE), torch.ones(4, 3)

        def mixes(run: Callable[[], Any]) -> int:
            counts.clear()
            run()
            return counts.mixed.total()

        assert mixes(lambda: x + torch.tensor(2.0)) == mixes(lambda: x.clamp(max=1.0)) == 0
        assert mixes(lambda: x + host) == mixes(lambda: torch.cat([x, host])) == mixes(lambda: host[index]) == 1
        assert mixes(lambda: x.index_select(0, torch.tensor([1]))) == 1
        assert mixes(lambda: torch.randn(3, device=DEVICE, generator=torch.Generator())) == 1
        assert "test_pretended" in counts.report()


def test_modules_move_and_change_their_dtype() -> None:
    with pretended() as counts:
        layer = nn.Linear(3, 2).to(DEVICE).bfloat16()
        output = copy.deepcopy(layer)(torch.ones(4, 3, device=DEVICE, dtype=torch.bfloat16))
        assert isinstance(layer.weight, nn.Parameter)
        assert layer.weight.requires_grad
        output.sum().backward()
        assert on_host(output).dtype == on_host(layer.weight).dtype == torch.bfloat16
        assert type(layer.cpu().weight) is nn.Parameter
        assert not counts.mixed


def test_launches_are_kernels() -> None:
    with pretended() as counts:
        x = torch.empty(4, 3, device=DEVICE)
        x[1:].t().unsqueeze(0).expand(2, -1, -1)
        assert counts.launches == 0
        x.add_(1).mul(2)
        assert counts.launches == 2


def test_other_tests_do_not_see_the_device() -> None:
    with pretended():
        assert torch.accelerator.is_available()
    assert not torch.accelerator.is_available()
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    assert type(layer.weight.grad) is Tensor
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.ones(2, device=DEVICE)


def show() -> None:
    """Print the counts and the limits."""
    with pretended() as counts:
        for kind, videos in itertools.product(KINDS, (1, 8)):
            model, video = case(kind, videos)
            moved, frames = there(model), video.to(DEVICE)
            counts.clear()
            stages_alone(moved, frames.flatten(0, 1))
            print(f"{kind}, {videos} videos: stages alone {counts.launches} launches")
            runs: dict[str, tuple[Callable[[], Any], float]] = {
                "clip": (functools.partial(moved, frames), CLIP_WAITS[kind]),
                "clip, window 16": (functools.partial(moved.run_clip, frames, 16), CLIP_WAITS[kind]),
                "session": (functools.partial(online, moved, frames), ONLINE_WAITS * FRAMES),
            }
            if videos == 8:
                runs["16 streams"] = (functools.partial(streamed, moved, sixteen(frames)), STREAM_WAITS * 16 * FRAMES)
            for name, (run, wanted) in runs.items():
                counts.clear()
                run()
                print(f"  {name:16s} (at most {wanted:3.0f} waits) {counts}", flush=True)


if __name__ == "__main__":
    show()
