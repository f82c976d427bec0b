from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

for needed in ("av", "matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(needed)

import evaluation  # noqa: E402
import sofnet_activitynet as example  # noqa: E402
import training  # noqa: E402
import video_data  # noqa: E402

ARGUMENTS = [
    "--weights", "none", "--backbone", "test_byobnet", "--size", "32", "--frames", "4", "--hidden", "8",
    "--warmup-epochs", "1", "--epochs", "1", "--lr", "0.01", "--lr-drop", "9",
    "--device", "cpu", "--workers", "0", "--save-every", "1", "--batch-size", "5",
]  # fmt: skip
BATCH_NORM = "--batch-norm"


def arguments(data: Path, out: Path, *more: object) -> list[str]:
    """Train on twelve videos: a warm-up and a joint epoch, each of steps of 5, 5 and 2 videos."""
    return ["train", "--data", str(data), "--out", str(out), *ARGUMENTS, *map(str, more)]


def train(data: Path, out: Path, *more: object) -> int:
    return example.main(arguments(data, out, *more))


def checkpoint(out: Path) -> dict[str, Any]:
    return training.load_checkpoint(out / "last.pt")


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit the same weights, optimiser and log."""
    for name in ("last.pt", "warmup.pt"):
        a, b = (training.load_checkpoint(out / name) for out in (one, other))
        assert (a["epoch"], a["step"]) == (b["epoch"], b["step"])
        torch.testing.assert_close(a["model"], b["model"], rtol=0, atol=0)
        torch.testing.assert_close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=0, atol=0)
    assert log_of(one) == log_of(other)


def assert_close_run(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """The same weights within rounding; the number of steps that BatchNorm counts may differ."""
    a, b = (
        {k: v for k, v in checkpoint(out)["model"].items() if not k.endswith("num_batches_tracked")}
        for out in (one, other)
    )
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for x, y in zip(log_of(one), log_of(other), strict=True):
        assert x == pytest.approx(y, rel=tolerance, abs=tolerance)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[k].double() - v.double()).abs().max()) for k, v in other.items() if v.is_floating_point())


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "alone"
    assert train(data, out) == 0
    return out


@pytest.fixture(scope="module")
def frozen(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "frozen"
    assert train(data, out, BATCH_NORM, "frozen") == 0
    return out


# ---------------------------------------------------------------------------------------------------- many processes


def member(
    rank: int, size: int, port: int, log: Path, args: list[str], dies_in: int | None, victim: int | None = None
) -> None:
    """What torchrun would run; it kills itself, or another process, in a step if asked."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    sys.stdout = sys.stderr = log.with_name(f"{log.name}{rank}").open("w", buffering=1)
    torch.set_num_threads(1)
    if dies_in is not None:
        step, count = torch.optim.SGD.step, itertools.count(1)

        def deadly(self: torch.optim.SGD, *values: Any) -> Any:
            if next(count) == dies_in:
                os.kill(victim or os.getpid(), signal.SIGKILL)
                while os.getppid() == victim:
                    time.sleep(0.01)
            return step(self, *values)

        torch.optim.SGD.step = deadly  # type: ignore[method-assign, assignment]
    sys.exit(example.main(args))


def launch(port: int, log: Path, args: list[str]) -> None:
    """Be the parent of two processes, as torchrun is, until one of them kills it in its second step."""
    for rank in (0, 1):
        if os.fork() == 0:
            member(rank, 2, port, log, args, 2 if rank == 0 else None, os.getppid())
    signal.pause()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def from_server() -> Any:
    """How to start processes: from one that has imported everything; forking this one could hang."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # or the server could not import what it should
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sofnet_activitynet"])
    return context


def start_and_join(processes: list[Any]) -> list[int | None]:
    """Run processes and return how they ended."""
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    return [process.exitcode for process in processes]


def run_together(args: list[str], log: Path, deaths: tuple[int | None, int | None] = (None, None)) -> list[int | None]:
    """Train in two processes, killed in a step where asked."""
    port, context = free_port(), from_server()
    return start_and_join(
        [context.Process(target=member, args=(rank, 2, port, log, args, dies)) for rank, dies in enumerate(deaths)]
    )


def normalise(rank: int, port: int, folder: Path, share: list[int]) -> None:
    """Run one process's rows through synchronised BatchNorm, and store what comes out."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    world = training.World.join("cpu")
    results = batch_norm(share, training.SyncedBatchNorm(world, counts=bool(share)))
    torch.save(results, folder / f"{rank}.pt")
    world.leave()


def batch_norm(share: list[int], mode: Any) -> dict[str, Tensor]:
    """Output, gradients and statistics of a BatchNorm layer for some rows of a batch; for none, of a stand-in."""
    generator = torch.Generator().manual_seed(0)
    batch, weights = (torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    layer = torch.nn.BatchNorm2d(3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 2.0, -1.0]))
    x = (batch[share] if share else torch.ones(1, 3, 4, 4, dtype=torch.float64)).requires_grad_()
    with mode:
        output = layer(x)
    (output.square() * (weights[share] if share else 0.0)).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    parameters = torch.stack([layer.weight.grad, layer.bias.grad])
    return {"output": output.detach(), "input": x.grad, "parameters": parameters, **dict(layer.named_buffers())}


@pytest.mark.parametrize("shares", [([0, 1], [2, 3, 4]), ([], [0, 1, 2, 3, 4])])
def test_batch_norm_over_two_processes_is_that_over_the_whole_batch(
    shares: tuple[list[int], list[int]], tmp_path: Path
) -> None:
    whole = batch_norm([0, 1, 2, 3, 4], contextlib.nullcontext())
    port, context = free_port(), from_server()
    processes = [
        context.Process(target=normalise, args=(rank, port, tmp_path, share)) for rank, share in enumerate(shares)
    ]
    assert start_and_join(processes) == [0, 0]
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for key in ("output", "input"):
        rows = torch.cat([part[key] for part, share in zip(parts, shares, strict=True) if share])
        torch.testing.assert_close(rows, whole[key], rtol=1e-10, atol=1e-10)
    if not shares[0]:
        assert not parts[0]["input"].any()
    torch.testing.assert_close(parts[0]["parameters"] + parts[1]["parameters"], whole["parameters"])
    for part in parts:
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(part[key], whole[key])


@pytest.fixture(scope="module")
def together(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "together"
    assert run_together(arguments(data, out), out.with_suffix(".log")) == [0, 0]
    return out


def test_two_processes_train_as_one(alone: Path, together: Path) -> None:
    # Shares of 2 and 3 videos. Untrained layers over so few videos amplify the rounding of BatchNorm's statistics.
    assert_close_run(together, alone, 0.02)
    report = json.loads((together / "report.json").read_text())
    assert report["last_session"]["processes"] == 2
    assert report["steps"] == 6
    assert {row["name"] for row in report["results"]} == set(evaluation.MODES)
    text = together.with_suffix(".log1").read_text()
    assert text == ""  # the second process is silent


def test_two_processes_with_parts_and_an_empty_share(data: Path, frozen: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path / "one", "--batch-size", 11) == 0
    out = tmp_path / "two"
    assert run_together(arguments(data, out, "--batch-size", 11), tmp_path / "log") == [0, 0]
    assert_close_run(out, tmp_path / "one", 0.02)  # a process without a video in the last step
    out = tmp_path / "parts"
    more = (BATCH_NORM, "frozen", "--accumulate", 2, "--clip", 1e9)
    assert run_together(arguments(data, out, *more), tmp_path / "log") == [0, 0]
    for entry in (entries := log_of(out)):
        assert entry.pop("gradient_norm") > 0
    (out / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert_close_run(out, frozen)


def test_killed_processes_go_on_exactly(data: Path, together: Path, tmp_path: Path) -> None:
    out, log, killed = tmp_path / "killed", tmp_path / "log", -signal.SIGKILL
    resume = arguments(data, out, "--resume")
    assert run_together(resume, log, (2, 2)) == [killed, killed]  # in the middle of the warm-up
    assert (checkpoint(out)["epoch"], checkpoint(out)["step"]) == (-1, 1)
    assert run_together(resume, log, (None, 4)) == [2, killed]  # one of them, in the middle of the joint epoch
    assert (checkpoint(out)["epoch"], checkpoint(out)["step"]) == (0, 1)
    text = log.with_name("log0").read_text()
    assert "error in process 0: Another of the training processes died" in text
    assert "--resume" in text
    assert run_together(resume, log) == [0, 0]
    assert_same_run(out, together)


def test_processes_end_when_torchrun_is_killed(data: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    torchrun = from_server().Process(target=launch, args=(free_port(), log, arguments(data, out)))
    assert start_and_join([torchrun]) == [-signal.SIGKILL]
    for rank in (0, 1):
        deadline = time.monotonic() + 60
        while "error in process" not in log.with_name(f"log{rank}").read_text():
            assert time.monotonic() < deadline, f"process {rank} goes on"
            time.sleep(0.1)
    assert "error in process 0: torchrun is gone, so this process stops, too." in log.with_name("log0").read_text()
    # The second step is lost: a resumed run may have begun with what the first one left.
    assert (checkpoint(out)["epoch"], checkpoint(out)["step"]) == (-1, 1)


# ---------------------------------------------------------------------------------------------------------- one process


def interrupt_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    step, count = torch.optim.SGD.step, itertools.count(1)

    def interrupted(self: torch.optim.SGD, *values: Any) -> Any:
        if next(count) == number:
            raise KeyboardInterrupt
        return step(self, *values)

    monkeypatch.setattr(torch.optim.SGD, "step", interrupted)


@pytest.mark.parametrize("number", [2, 5])
def test_a_run_goes_on_from_the_middle_of_an_epoch(
    number: int, data: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_step(patch, number)
        assert train(data, tmp_path, "--tensorboard") == 130
    content = checkpoint(tmp_path)
    assert (content["epoch"] + 1, content["step"]) == divmod(number - 1, 3)
    torch.rand(5)
    assert train(data, tmp_path, "--tensorboard", "--resume") == 0
    assert_same_run(tmp_path, alone)

    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("step/total")] == [0, 1, 2, 3, 4, 5]
    assert [event.value for event in board.Scalars("epoch/total")] == pytest.approx(
        [entry["total"] for entry in log_of(alone)]
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_costs_nothing(
    data: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_step(patch, 3)
        assert train(data, tmp_path) == 130
    before = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.part").symlink_to("/dev/full")
    capsys.readouterr()
    assert train(data, tmp_path, "--resume") == 2
    message = capsys.readouterr().err
    assert f"Could not write {tmp_path / 'last.pt'} (" in message
    assert "MB were free on that disk. What was there before is whole." in message
    assert "Make room, then continue with `train --resume`." in message
    assert (tmp_path / "last.pt").read_bytes() == before
    assert train(data, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, alone)


def test_a_dying_worker_is_reported_and_costs_nothing(
    data: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, count = video_data.read_frames, itertools.count()

    def deadly(*values: Any) -> np.ndarray:
        if get_worker_info() is not None and next(count) == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(*values)

    with monkeypatch.context() as patch:
        patch.setattr(video_data, "read_frames", deadly)
        assert train(data, tmp_path, "--workers", 1) == 2
    assert "A process that decodes videos died: out of memory, or killed." in capsys.readouterr().err
    assert train(data, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, alone)


def test_parts_of_a_step_add_up(data: Path, frozen: Path, tmp_path: Path) -> None:
    for parts in (3, 7):  # parts of 1 and 2 videos; more parts than videos
        assert train(data, tmp_path / str(parts), BATCH_NORM, "frozen", "--accumulate", parts) == 0
        assert_close_run(tmp_path / str(parts), frozen)


def test_frozen_statistics_stay_and_everything_else_is_trained(frozen: Path) -> None:
    content = checkpoint(frozen)
    config = example.Config.from_json(content["config"])
    torch.manual_seed(0)
    fresh = config.build().state_dict()
    for key, value in content["model"].items():
        still = torch.equal(value, fresh[key])
        assert still == (key.endswith(("running_mean", "running_var", "num_batches_tracked"))), key


def test_gradients_are_clipped(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, "--clip", 1e-3, "--weight-decay", 0, BATCH_NORM, "frozen") == 0
    content = checkpoint(tmp_path)
    torch.manual_seed(0)
    fresh = example.Config.from_json(content["config"]).build().state_dict()
    # Six steps of momentum 0.9 with gradients of this norm go no further.
    assert 0 < distance(content["model"], fresh) < 0.01 * 1e-3 * sum((1 - 0.9**n) / 0.1 for n in range(1, 7))
    assert all(entry["gradient_norm"] > 1e-3 for entry in log_of(tmp_path))


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_trains_nearly_the_same(amp: str, data: Path, frozen: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, "--amp", amp, BATCH_NORM, "frozen") == 0
    content, full = checkpoint(tmp_path), checkpoint(frozen)
    assert all(value.dtype == torch.float32 for value in content["model"].values() if value.is_floating_point())
    assert 0 < distance(content["model"], full["model"]) < 0.05
    assert bool(content["scaler"]) == (amp == "fp16")


@pytest.mark.parametrize(
    ("option", "value"), [("--amp", "bf16"), (BATCH_NORM, "frozen"), ("--accumulate", "2"), ("--clip", "1")]
)
def test_a_run_goes_on_with_the_same_options_only(
    option: str, value: str, data: Path, alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, alone, "--resume", option, value) == 2
    assert f"is of another run: {option[2:].replace('-', '_')} differ" in capsys.readouterr().err


def test_training_from_the_cache_is_training_from_memory(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path / "memory", "--in-memory") == 0
    assert train(data, tmp_path / "cache", "--cache", tmp_path / "frames") == 0
    assert_same_run(tmp_path / "memory", tmp_path / "cache")


def test_report(alone: Path) -> None:
    report = json.loads((alone / "report.json").read_text())
    assert (report["videos"], report["unreadable"], report["steps"]) == (12, [], 6)
    assert report["model"]["backbone"] == "test_byobnet"
    assert report["training"]["batch_size"] == 5
    assert report["last_epoch"] == log_of(alone)[-1]
    assert report["last_session"]["steps"] == 6
    assert [row["name"] for row in report["results"]] == list(evaluation.MODES)
    assert all(0 <= row["top1"] <= 1 for row in report["results"])
