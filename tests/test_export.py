from __future__ import annotations

import copy
import gc
import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    BOTH_TEMPORAL,
    BOTH_UPDATES,
    SIZE,
    StateUpdate,
    balance,
    crossings_backbone,
    random_gates,
    timm_network,
    toy_model,
    toy_video,
)
from torch import nn

import dynskip_onnx
from dynskip import (
    DynskipError,
    EarlyTerminator,
    FixedGate,
    SkipOutput,
    StagedBackbone,
    StopOrForward,
    stage_model,
)
from dynskip import VideoResult as TorchVideoResult
from dynskip_onnx import ClipResult, DynskipOnnxError, Runner, VideoResult

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
ROOT = Path(dynskip_onnx.__file__).parent


def wrap(backbone: StagedBackbone, size: int) -> StopOrForward:
    gates = [gate.float() for gate in random_gates(backbone.num_features, seed=1)]
    model = StopOrForward(backbone, gates, terminator=EarlyTerminator(0.5, 2)).eval()
    return balance(model, toy_video(4, 6, size=size, seed=3, dtype=torch.float32), share=0.7)


def build(name: str) -> tuple[StopOrForward, int]:
    if name == "crossings":
        return wrap(crossings_backbone(), SIZE), SIZE
    if name == "test_vit":
        network = copy.deepcopy(timm_network(name, 64, img_size=64))
        return wrap(stage_model(network, num_stages=2, input_size=(3, 64, 64)), 64), 64
    model = toy_model(seed=5, stages=2, temporal=name or None, inner=False, share=0.7).float()
    return model, SIZE


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], tuple[StopOrForward, Path, int]]:
    """Export each model once, for exporting takes seconds."""
    made: dict[str | None, tuple[StopOrForward, Path, int]] = {}

    def get(name: str | None) -> tuple[StopOrForward, Path, int]:
        if name not in made:
            model, size = build(name or "")
            folder = tmp_path_factory.mktemp("onnx") / "model"
            names = [chr(97 + k % 26) for k in range(model.backbone.num_classes)]
            model.export(folder, size, mean=MEAN, std=STD, class_names=names)
            made[name] = model, folder, size
        return made[name]

    return get


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change the manifest of an export."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def load_as(model: StopOrForward, folder: Path, target: Path) -> Runner:
    """Load a copy of an export with the settings of a model that has the same parts."""
    return dynskip_onnx.load(edit(shutil.copytree(folder, target), as_manifest(model)), threads=1)


def as_manifest(model: StopOrForward) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        ends = model.terminator
        manifest["termination"] = ends and {"threshold": ends.threshold, "min_frames": ends.min_frames}
        manifest["state_update"] = model.state_update
        for stage, threshold in zip(manifest["stages"], model.forward_threshold, strict=True):
            stage["gate"]["forward_threshold"] = threshold

    return change


def assert_result(result: VideoResult, output: SkipOutput, row: int) -> None:
    assert result.frames_seen == output.seen[row].sum()
    assert result.frames_used == output.used[row].sum()
    assert result.fallback_frame == output.fallback_frame[row]
    assert result.macs == pytest.approx(output.macs[row].item())
    for name in ("logits", "probabilities"):
        assert_near(getattr(result, name), getattr(output, name)[row], name)


def assert_clip(result: ClipResult, output: SkipOutput, row: int) -> None:
    assert_result(result, output, row)
    frames = len(result.stopped_at)
    assert result.stopped_at.tolist() == output.stopped_at[row, :frames].tolist()
    assert (output.stopped_at[row, frames:] == -1).all()
    for name in ("frame_logits", "gate_logits"):
        assert_near(getattr(result, name), getattr(output, name)[row, :frames], name)


def assert_near(actual: Any, wanted: Any, name: str) -> None:
    np.testing.assert_allclose(actual, wanted, rtol=1e-3, atol=1e-4, err_msg=name)


def assert_all_ways(runner: Runner, output: SkipOutput, video: np.ndarray) -> float:
    """Run clips, a session and streams; return the speculative MACs of the clips."""
    speculative = 0.0
    for row, clip in enumerate(video):
        for window in (1, 3, 16):
            result = runner.clip(clip, window)
            assert_clip(result, output, row)
            assert result.speculative_macs >= -1e-6 if window > 1 else result.speculative_macs == pytest.approx(0)
            speculative += result.speculative_macs
    session = runner.stream(batch=len(video))
    for t in range(video.shape[1]):
        step = session(video[:, t])
        assert step.stopped_at.tolist() == output.stopped_at[:, t].tolist()
        assert_near(step.gate_logits, output.gate_logits[:, t], "gate_logits")  # type: ignore[index]
        assert_near(step.frame_logits[step.used], output.frame_logits[:, t][step.used], "frame_logits")
        assert np.isnan(step.frame_logits[~step.used]).all()
    assert step.ended[~output.seen.all(1).numpy()].all()
    for row in range(len(video)):
        assert_result(session.result(row), output, row)
        assert session.result(row).speculative_macs == pytest.approx(0)
    served = list(runner.serve((iter(clip) for clip in video), capacity=3))
    assert len(served) == len(video)
    assert {end.key for end in served} == set(range(len(video)))
    for end in served:
        assert end.error is None
        assert_result(end, output, end.key)  # type: ignore[arg-type]
        assert end.speculative_macs == pytest.approx(0)
    return speculative


@pytest.mark.parametrize("state_update", BOTH_UPDATES)
@pytest.mark.parametrize("temporal", BOTH_TEMPORAL)
def test_every_way_decides_as_torch(
    exported: Any, tmp_path: Path, temporal: str | None, state_update: StateUpdate
) -> None:
    plain, folder, _ = exported(temporal)
    kinds, speculative = set(), 0.0
    thresholds: list[Any] = [(0.5, 0.5), (0.3, 0.6), (0.5, 0.97), (0.0, 1.0)]
    for n, (forward, ending) in enumerate(zip(thresholds, [(0.7, 3), None, (0.5, 1), (0.9, 0)], strict=True)):
        model = StopOrForward(
            plain.backbone,
            list(plain.gates),
            terminator=EarlyTerminator(*ending) if ending else None,
            state_update=state_update,
            forward_threshold=forward,
        ).eval()
        runner = load_as(model, folder, tmp_path / str(n))
        video = toy_video(6, 8, seed=n + 20, dtype=torch.float32)
        output = model(video)
        speculative += assert_all_ways(runner, output, video.numpy())
        kinds |= set(output.stopped_at.flatten().tolist()) | ({"fallback"} if output.fallback.any() else set())
    assert kinds >= {-1, 0, 1, 2, "fallback"}
    assert speculative > 0


@pytest.mark.parametrize("name", ["crossings", "test_vit"])
def test_real_networks_and_values_of_every_kind(exported: Any, name: str) -> None:
    model, folder, size = exported(name)
    video = toy_video(5, 6, size=size, seed=9, dtype=torch.float32)
    output = model(video)
    assert len(output.stopped_at.unique()) > 2
    assert_all_ways(dynskip_onnx.load(folder, threads=1), output, video.numpy())


def test_runs_where_torch_cannot_be_imported(exported: Any, tmp_path: Path) -> None:
    model, folder, _ = exported("lstm")
    video = toy_video(3, 6, seed=30, dtype=torch.float32)
    np.save(tmp_path / "video.npy", video.numpy())
    code = """
import json, sys
for name in ("torch", "timm", "dynskip"):
    sys.modules[name] = None
import dynskip_onnx, numpy
runner = dynskip_onnx.load(sys.argv[1], threads=1)
print(json.dumps([runner.clip(clip).stopped_at.tolist() for clip in numpy.load(sys.argv[2])]))
"""
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "video.npy")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == model(video).stopped_at.tolist()


def test_streams_are_read_no_further_than_needed_and_fail_alone(exported: Any) -> None:
    model, folder, _ = exported("crossings")
    runner = dynskip_onnx.load(folder, threads=1)
    video = toy_video(5, 6, seed=9, dtype=torch.float32)
    output, read, alive = model(video), [0] * 9, 0

    def source(row: int, fault: str = "") -> Iterator[np.ndarray]:
        nonlocal alive
        alive += 1
        assert alive <= 3
        try:
            for t, frame in enumerate(video[row % 5].numpy()):
                read[row] += 1
                if t == 1 and fault == "raises":
                    raise OSError("cable")
                yield {"NaN": frame * np.nan, "bytes": frame.astype(np.uint8)}.get(fault if t else "", frame)
        finally:
            alive -= 1

    faults = {5: "raises", 6: "NaN", 7: "bytes"}
    sources: list[Any] = [source(row, faults.get(row, "")) for row in range(8)]
    sources += [7, []]
    ends = {end.key: end for end in runner.serve(sources, capacity=3)}
    assert set(ends) == set(range(10))
    for row in range(5):
        assert_result(ends[row], output, row)
        assert read[row] == output.seen[row].sum()
    for row, message in zip(range(5, 10), ("cable", "NaN", "uint8", "iterable", "before its first"), strict=True):
        assert message in str(ends[row].error)
    assert not output.seen.all()


# NaN and infinite verdicts, and frames that a part cannot take. Each channel of a frame holds one number everywhere:
# what the first gate, the second gate and the head look up in their tables.

VERDICTS = (
    (np.nan, np.nan),
    (np.inf, np.inf),
    (np.inf, -np.inf),
    (-np.inf, np.inf),
    (50.0, -50.0),
    (-50.0, 50.0),
    (0.0, 1.0),
    (0.0, -1.0),
)
NO_VERDICT, NO_STAGE, NO_HEAD = 8, 9, 9  # numbers that are not in the tables of gates, the second stage and the head
ANSWERS = ((2.0, 0.0, 0.0), (0.0, 1.0, 0.5), (0.0, 0.0, 1.5), (np.nan, 0.0, 1.0), (np.inf, 0.0, 0.0))
STOPS, GOES = 2, 3  # verdicts that stop a frame, and let it go forward


def look_up(table: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    return table[numbers.round().long()]


class Verdict(nn.Module):
    """Looks its verdict up. Unless that is saturated, it forwards less the more frames have been used."""

    table: torch.Tensor

    def __init__(self, channel: int, repeats: bool = False) -> None:
        super().__init__()
        self.channel, self.repeats_last = channel, repeats
        self.register_buffer("table", torch.tensor(VERDICTS))

    def initial_state(self, batch: int) -> tuple[torch.Tensor, ...]:
        return (self.table.new_zeros(batch, 1),)

    def forward(self, pooled: torch.Tensor, state: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        logits = look_up(self.table, pooled[:, self.channel])
        (used,) = state
        moves = (logits.abs() <= 1).all(1, keepdim=True)
        less = torch.cat([0.4 * used, 0 * used], 1)
        return torch.where(moves, logits + less, logits), (used + 1,)


class Same(nn.Module):
    """Passes a frame on if its number for the second gate is below a limit."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        nn.init.dirac_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self.ones = nn.Parameter(torch.ones(limit))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) * look_up(self.ones, x[:, 1].mean((1, 2)))[:, None, None, None]  # type: ignore[no-any-return]


class Answers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(ANSWERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return look_up(self.table, x[:, 2].mean((1, 2)))


def verdict_model(gates: list[nn.Module], **kwargs: Any) -> StopOrForward:
    backbone = stage_model([Same(10), Same(NO_STAGE), Answers()], input_size=(3, SIZE, SIZE))
    return StopOrForward(backbone, gates, **kwargs).eval()


def frames_of(numbers: np.ndarray) -> torch.Tensor:
    """Make frames `(..., C, H, W)` from the numbers in their channels, `(..., C)`."""
    return torch.from_numpy(numbers).float()[..., None, None].expand(*numbers.shape, SIZE, SIZE).contiguous()


def random_numbers(videos: int, frames: int, seed: int, verdicts: int = len(VERDICTS)) -> np.ndarray:
    random = np.random.default_rng(seed)
    numbers = random.integers(0, verdicts, (videos, frames, 3))
    numbers[..., 2] = random.integers(0, len(ANSWERS), (videos, frames))
    return numbers


@pytest.fixture(scope="module")
def verdict_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[nn.Module], Path]]:
    made: dict[str, tuple[list[nn.Module], Path]] = {}
    kinds: dict[str, list[nn.Module]] = {
        "verdicts": [Verdict(0, repeats=True), Verdict(1)],
        "always": [FixedGate(), FixedGate(stop=True)],
    }
    for name, gates in kinds.items():
        folder = tmp_path_factory.mktemp("verdicts") / name
        made[name] = gates, verdict_model(gates).export(folder, SIZE)
    return made


def assert_torch_ways(model: StopOrForward, output: SkipOutput, video: torch.Tensor) -> None:
    """Compare a clip with an online run, streams and the masked pass."""
    session = model.stream(batch=len(video))
    for t in range(video.shape[1]):
        assert session(video[:, t]).stopped_at.tolist() == output.stopped_at[:, t].tolist()
    online = session.result()
    streams = {e.key: e for e in model.serve_streams(list(video), 3, 2) if isinstance(e, TorchVideoResult)}
    masked = model.decide(model.encode(video))
    assert masked.stopped_at.tolist() == output.stopped_at.tolist()
    for row, wanted in enumerate(output.logits):
        assert streams[row].error is None
        for fallback in (online.fallback_frame[row], streams[row].fallback_frame, masked.fallback_frame[row]):
            assert int(fallback) == int(output.fallback_frame[row])
        for logits in (online.logits[row], streams[row].logits, masked.logits[row]):
            if wanted.isfinite().all():
                torch.testing.assert_close(logits, wanted)
            else:
                assert not logits.isfinite().all()


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("state_update", BOTH_UPDATES)
@pytest.mark.parametrize("name", ["verdicts", "always"])
def test_verdicts_that_are_not_finite_and_those_that_are_saturated(
    verdict_folders: Any, tmp_path: Path, name: str, state_update: StateUpdate
) -> None:
    gates, folder = verdict_folders[name]
    kinds = set()
    for n, threshold in enumerate([(0.0, 0.0), (1.0, 1.0), (0.5, 0.3)]):
        model = verdict_model(
            gates,
            forward_threshold=threshold,
            state_update=state_update,
            terminator=EarlyTerminator(0.6, 3) if n == 2 else None,
        )
        runner = load_as(model, folder, tmp_path / str(n))
        video = frames_of(random_numbers(12, 6, seed=n))
        output = model(video)
        assert_torch_ways(model, output, video)
        assert_all_ways(runner, output, video.numpy())
        kinds |= set(output.stopped_at.flatten().tolist()) | ({"fallback"} if output.fallback.any() else set())
        kinds |= {"no answer"} if output.logits.isnan().any() else set()
    wanted = {"verdicts": {-1, 0, 1, 2, "fallback", "no answer"}, "always": {1, "fallback", "no answer"}}
    assert kinds == wanted[name]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_frame_that_a_nan_stopped_answers_for_its_video_last_of_all(verdict_folders: Any) -> None:
    gates, folder = verdict_folders["verdicts"]
    model, runner = verdict_model(gates), dynskip_onnx.load(folder, threads=1)
    nan, stop, nearly = 0, STOPS, 7
    cases = {
        (nan, stop, nearly, nearly): 2,
        (stop, nan, stop, nan): 0,
        (nan, nan, stop, stop): 2,
        (nan, 1, nan, 1): 0,
    }
    for verdicts, wanted in cases.items():
        numbers = np.array([[verdict, GOES, 1] for verdict in verdicts])
        for first in (numbers, numbers[:, [1, 0, 2]]):
            video = frames_of(first)[None]
            output = model(video)
            assert output.fallback_frame.tolist() == [wanted]
            assert_torch_ways(model, output, video)
            assert_all_ways(runner, output, video.numpy())


FAULTS = {
    "gate": (NO_VERDICT, GOES, 1),
    "later gate": (GOES, NO_VERDICT, 1),
    "stage": (GOES, NO_STAGE, 1),
    "head": (GOES, GOES, NO_HEAD),
}


@pytest.mark.parametrize("state_update", BOTH_UPDATES)
def test_frames_that_a_part_cannot_take_fail_alone(
    verdict_folders: Any, tmp_path: Path, state_update: StateUpdate
) -> None:
    gates, folder = verdict_folders["verdicts"]
    model = verdict_model(gates, state_update=state_update)
    runner = load_as(model, folder, tmp_path / "model")
    good = random_numbers(6, 5, seed=3)
    videos = [frames_of(numbers) for numbers in good]
    for fault in FAULTS.values():
        numbers = random_numbers(1, 5, seed=4)[0]
        numbers[2] = fault
        videos.append(frames_of(numbers))
    videos.append(frames_of(np.array([(STOPS, GOES, NO_HEAD)] * 3)))  # what answers for this one cannot be run
    wanted = {e.key: e for e in model.serve_streams(videos, 11, 11) if isinstance(e, TorchVideoResult)}
    for capacity in (1, 3, 11):
        results = {end.key: end for end in runner.serve([video.numpy() for video in videos], capacity)}
        for row, video in enumerate(videos):
            result, alone = results[row], wanted[row]
            assert (result.error is not None) == (alone.error is not None) == (row >= 6)
            for name in ("frames_seen", "frames_used", "fallback_frame"):
                assert getattr(result, name) == getattr(alone, name), name
            assert result.macs == pytest.approx(alone.macs)
            if row < 6:
                assert_result(result, model(video[None]), 0)
                assert result.speculative_macs == pytest.approx(0)
        assert [results[row].frames_seen for row in range(6, 11)] == [2, 2, 2, 2, 3]


@pytest.mark.parametrize("state_update", BOTH_UPDATES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_session_stays_as_it_was_where_a_part_raises(
    verdict_folders: Any, tmp_path: Path, fault: str, state_update: StateUpdate
) -> None:
    gates, folder = verdict_folders["verdicts"]
    model = verdict_model(gates, state_update=state_update)
    runner = load_as(model, folder, tmp_path / "model")
    video = frames_of(random_numbers(2, 6, seed=8))
    output, session = model(video), runner.stream(batch=2)
    bad = torch.stack([frames_of(np.array((GOES, GOES, 1))), frames_of(np.array(FAULTS[fault]))])
    for t in range(6):
        with pytest.raises(Exception, match="INVALID_ARGUMENT"):
            session(bad.numpy())
        assert session(video[:, t].numpy()).stopped_at.tolist() == output.stopped_at[:, t].tolist()
    for row in range(2):
        assert_result(session.result(row), output, row)


def test_a_clip_fails_where_a_part_raises_on_a_frame_that_counts(verdict_folders: Any, tmp_path: Path) -> None:
    gates, folder = verdict_folders["verdicts"]
    model = verdict_model(gates, terminator=EarlyTerminator(0.6, 1))
    runner = load_as(model, folder, tmp_path / "model")
    numbers = np.array([(GOES, GOES, 0)] * 5)
    for fault in FAULTS.values():
        for at in range(5):
            video = numbers.copy()
            video[at] = fault
            for window in (1, 3, 16):
                if at < 2:
                    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
                        runner.clip(frames_of(video).numpy(), window)
                else:  # the video ends after its second frame
                    result = runner.clip(frames_of(video).numpy(), window)
                    assert_clip(result, model(frames_of(numbers)[None]), 0)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_one_class_alone_cannot_end_videos(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)))
    model = StopOrForward(stage_model(network, input_size=(3, SIZE, SIZE)), [FixedGate()]).eval()
    folder = model.export(tmp_path / "model", SIZE)
    video = toy_video(2, 4, seed=2, dtype=torch.float32)
    assert_all_ways(dynskip_onnx.load(folder, threads=1), model(video), video.numpy())
    edit(folder, lambda m: m.update(termination={"threshold": 0.9, "min_frames": 1}))
    with pytest.raises(DynskipOnnxError, match=r"one class alone is always 1.*terminator"):
        dynskip_onnx.load(folder)


@pytest.mark.parametrize("way", ["session", "serve", "many streams"])
@pytest.mark.parametrize("verdict", [GOES, STOPS])
def test_memory_does_not_grow_with_time(verdict_folders: Any, verdict: int, way: str) -> None:
    runner = dynskip_onnx.load(verdict_folders["verdicts"][1], threads=1)
    image = frames_of(np.array((verdict, GOES, 1))).numpy()
    taken, held = itertools.count(), []

    def endless(count: int) -> Iterator[np.ndarray]:
        for _ in range(count):
            if next(taken) % 150 == 0:
                garbage = gc.collect()
                held.append((tracemalloc.get_traced_memory()[0], garbage))
            yield image

    gc.disable()  # what waits for the collector may stay for long
    tracemalloc.start()
    try:
        if way == "session":
            session = runner.stream()
            for frame in endless(600):
                session(frame[None])
        else:
            streams, length = (2, 300) if way == "serve" else (300, 2)
            for _ in runner.serve((endless(length) for _ in range(streams)), capacity=2):
                pass
    finally:
        tracemalloc.stop()
        gc.enable()
    memory, garbage = zip(*held, strict=True)
    assert memory[3] - memory[1] < 40_000  # bytes, for 300 frames; Python and numpy keep some for later use
    assert max(garbage[1:]) < 20


def test_a_session_starts_over(exported: Any) -> None:
    model, folder, _ = exported("lstm")
    video = toy_video(2, 5, seed=31, dtype=torch.float32)
    output, session = model(video), dynskip_onnx.load(folder, threads=1).stream(batch=2)
    with pytest.raises(DynskipOnnxError, match="no frame yet"):
        session.result()
    frames = video.numpy()
    for t in range(5):
        session(frames[[0, 0], t])
    session.reset([1])
    for t in range(5):
        session(frames[[0, 1], t])
    assert_result(session.result(1), output, 1)


def test_frames_are_normalised_as_the_manifest_says(exported: Any) -> None:
    runner = dynskip_onnx.load(exported("lstm")[1], threads=1)
    frames = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    wanted = (frames.transpose(0, 3, 1, 2) / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    np.testing.assert_allclose(runner.normalise(frames), wanted, rtol=1e-5, atol=1e-6)
    assert runner.class_names == ["a", "b", "c", "d"]
    runner.manifest["input"]["mean"] = None
    with pytest.raises(DynskipOnnxError, match="without `mean`"):
        runner.normalise(frames)
    for bad, message in ((frames, "uint8"), (np.zeros((0, 3, SIZE, SIZE)), "0 frames"), (wanted[..., 1:], "shape")):
        with pytest.raises(DynskipOnnxError, match=message):
            runner.clip(bad)


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Replace a file, and its hash in the manifest."""
    (folder / name).write_bytes(content)
    edit(folder, lambda m: m["sha256"].update({name: hashlib.sha256(content).hexdigest()}))


def swap_gates(folder: Path) -> None:
    first, second = ((folder / f"gate_{n}.onnx").read_bytes() for n in range(2))
    replace_file(folder, "gate_0.onnx", second)
    replace_file(folder, "gate_1.onnx", first)


SPOILS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "changed": (lambda f: (f / "gate_1.onnx").write_bytes((f / "gate_1.onnx").read_bytes() + b" "), "hash differs"),
    "missing": (lambda f: (f / "stage_1.onnx").unlink(), "missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no manifest"),
    "garbled": (lambda f: (f / "manifest.json").write_text("{"), "no manifest of"),
    "foreign": (lambda f: (f / "manifest.json").write_text("[]"), "no manifest of"),
    "newer": (lambda f: edit(f, lambda m: m.update(version=3)), "version 3"),
    "outside": (lambda f: edit(f, lambda m: m["sha256"].update({"../a.onnx": ""})), "outside"),
    "lacking": (lambda f: edit(f, lambda m: m.pop("head")), "'head'"),
    "unlisted": (lambda f: edit(f, lambda m: m["sha256"].pop("head.onnx")), "head.onnx"),
    "rule": (lambda f: edit(f, lambda m: m.update(state_update="sometimes")), "sometimes"),
    "shape": (lambda f: edit(f, lambda m: m["stages"][0]["values"][0].update(shape=[9, 8, 8])), "stage_0"),
    "classes": (lambda f: edit(f, lambda m: m.update(num_classes=9, class_names=None)), "head.onnx"),
    "swapped": (swap_gates, "gate_0"),
    "not onnx": (lambda f: replace_file(f, "head.onnx", b"x"), "cannot load 'head.onnx'"),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_spoilt_folders_are_refused(exported: Any, tmp_path: Path, spoil: str) -> None:
    folder = shutil.copytree(exported("lstm")[1], tmp_path / "model")
    change, message = SPOILS[spoil]
    change(folder)
    with pytest.raises(DynskipOnnxError, match=message):
        dynskip_onnx.load(folder)


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    model = toy_model(stages=1)
    with pytest.raises(DynskipError, match="float32"):
        model.export(tmp_path / "x", SIZE)
    model = model.float()
    for options, message in (
        ({"class_names": ["a"]}, "`class_names` has 1 values for 4 classes"),
        ({"std": [1.0]}, "`std` has 1 values for 3 channels"),
    ):
        with pytest.raises(DynskipError, match=message):
            model.export(tmp_path / "x", SIZE, **options)
    with pytest.raises(TypeError, match="format"):  # there is one format
        model.export(tmp_path / "x", SIZE, format="torch")

    class Other(EarlyTerminator):
        pass

    model.terminator = Other()
    with pytest.raises(DynskipError, match="Other"):
        model.export(tmp_path / "x", SIZE)
    model.terminator = None
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").touch()
    with pytest.raises(DynskipError, match="not an empty folder"):
        model.export(tmp_path / "x", SIZE)
    gate: Any = model.gates[0]
    gate.initial_state = lambda batch: (torch.arange(5.0).expand(batch, -1),) * 2
    with pytest.raises(DynskipError, match="not one number"):
        model.export(tmp_path / "y", SIZE)


def test_what_the_model_knows_of_its_input_is_the_default(tmp_path: Path) -> None:
    model, size = build("")
    model.class_names = ["a", "b", "c", "d"]
    model.preprocessing = {"input_size": (3, SIZE, SIZE), "mean": MEAN, "std": STD}
    for folder, given in (("own", {}), ("given", {"mean": (0.0,) * 3, "class_names": list("wxyz")})):
        manifest = json.loads((model.export(tmp_path / folder, size, **given) / "manifest.json").read_text())
        assert manifest["class_names"] == given.get("class_names", model.class_names)
        assert manifest["input"]["mean"] == list(given.get("mean", MEAN))
        assert manifest["input"]["std"] == list(STD)
