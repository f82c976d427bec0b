"""The recipes in `examples/`, run as their users run them."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("accelerate", "av", "matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(needed)

import timm  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from helpers import recipe  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from dynskip import StopOrForward  # noqa: E402
from dynskip import video as video_package  # noqa: E402
from dynskip.evaluation import MODES  # noqa: E402
from dynskip.video import Preprocessing  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
BACKBONE, FRAMES = "test_byobnet", 4
TRAIN = [
    "--weights", "none", "--backbone", BACKBONE, "--size", "32", "--frames", str(FRAMES), "--hidden", "8",
    "--warmup-epochs", "1", "--epochs", "1", "--lr", "0.01", "--save-every", "1", "--batch-size", "6",
    "--device", "cpu", "--workers", "0",
]  # fmt: skip


sofnet_activitynet = recipe("sofnet_activitynet")
evaluate, predict, prepare_data = recipe("evaluate"), recipe("predict"), recipe("prepare_data")
train_gates, similarity_gates = recipe("train_gates"), recipe("similarity_gates")


def train(data: Path, out: Path, *more: object) -> int:
    """Train on twelve videos: a warm-up and a joint epoch of two steps each."""
    # A user's process has one run: forget what another one here chose.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    code: int = sofnet_activitynet.main(["train", "--data", str(data), "--out", str(out), *TRAIN, *map(str, more)])
    return code


def run(script: Any, *arguments: object) -> int:
    code: int = script.main([*map(str, arguments)])
    return code


def command(data: Path, out: Path, *more: object, processes: int = 0) -> list[str]:
    """The command line of a training run; with processes, under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    script = str(EXAMPLES / "sofnet_activitynet.py")
    return [sys.executable, *torchrun, script, "train", "--data", str(data), "--out", str(out), *TRAIN, *map(str, more)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def checkpoint(out: Path, name: str = "last.pt") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(out / name, weights_only=True)
    return content


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit the same weights, optimiser and log."""
    for name in ("last.pt", "warmup.pt"):
        a, b = checkpoint(one, name), checkpoint(other, name)
        assert (a["epoch"], a["step"], a["log"]) == (b["epoch"], b["step"], b["log"])
        torch.testing.assert_close(a["model"], b["model"], rtol=0, atol=0)
        torch.testing.assert_close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=0, atol=0)
    assert log_of(one) == log_of(other)


def table_rows(text: str) -> dict[str, list[float]]:
    """The numbers of a printed table by the name of the row."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return {name: [float(number) for number in numbers] for name, *numbers in cells[1:]}


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "trained"
    assert train(data, out) == 0
    return out


@pytest.fixture
def video(data: Path) -> Path:
    return data / "videos" / "high_kick" / "test_0000.mp4"


# ------------------------------------------------------------------------------------------------------- training


def test_training_writes_a_model_checkpoints_and_pictures(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names >= {"last.pt", "warmup.pt", "log.jsonl", "model", "frame_usage.png", "timeline_high_kick.png"}
    assert is_picture(trained / "timeline_high_kick.png")
    log = log_of(trained)
    assert [line["epoch"] for line in log] == [0, 1]
    assert "used" not in log[0]
    assert {"accuracy", "total", "classification", "efficiency", "inner", "self_supervision", "used"} < set(log[1])
    model = StopOrForward.from_pretrained(trained / "model")
    assert Preprocessing.of(model).num_frames == FRAMES
    assert len(model.class_names or ()) == 6
    assert "gates + early termination" in (trained / "model" / "README.md").read_text()
    last, warm = checkpoint(trained), checkpoint(trained, "warmup.pt")
    assert (warm["epoch"], last["epoch"]) == (1, 2)
    torch.testing.assert_close(last["model"], dict(model.state_dict()), rtol=0, atol=0)
    gates = [key for key in last["model"] if key.startswith("gates")]
    assert any(not torch.equal(warm["model"][key], last["model"][key]) for key in gates)


def test_the_warm_up_leaves_gates_alone(data: Path, trained: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, "--dense") == 0
    warm, dense = checkpoint(trained, "warmup.pt")["model"], checkpoint(tmp_path)["model"]
    torch.testing.assert_close(checkpoint(tmp_path, "warmup.pt")["model"], warm, rtol=0, atol=0)
    gates = [key for key in warm if key.startswith(("gates", "inner"))]
    assert all(torch.equal(dense[key], warm[key]) for key in gates)
    assert any(not torch.equal(dense[key], warm[key]) for key in warm if key not in gates)


def interrupt(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Stop a run in the middle of a step."""
    step, count = torch.optim.SGD.step, itertools.count(1)

    def interrupted(self: torch.optim.SGD, *values: Any) -> Any:
        if next(count) == number:
            raise KeyboardInterrupt
        return step(self, *values)

    monkeypatch.setattr(torch.optim.SGD, "step", interrupted)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_an_interrupted_run_goes_on_exactly(
    number: int,
    data: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, number)
        assert train(data, tmp_path) == 130
    assert "with --resume goes on" in capsys.readouterr().err
    torch.rand(7)  # whatever else happened to the random state
    assert train(data, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, trained)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, count = torch.save, itertools.count(1)

    def interrupted(content: Any, file: Any) -> None:
        save(content, file)
        if next(count) == 3:
            file.truncate(1000)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        assert train(data, tmp_path) == 130
    assert checkpoint(tmp_path)["step"] == 2
    assert train(data, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, trained)


def test_a_killed_process_goes_on_exactly(data: Path, trained: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(command(data, tmp_path), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    while not (tmp_path / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert train(data, tmp_path, "--resume", "--workers", 2) == 0
    assert_same_run(tmp_path, trained)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs a device that is always full")
def test_a_full_disk_costs_nothing(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        assert train(data, tmp_path) == 130
    before = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt.part").symlink_to("/dev/full")
    assert train(data, tmp_path, "--resume") == 2
    assert re.search(r"Could not write \S*last\.pt \(the disk.*is full.*\)\. Make room\.", capsys.readouterr().err)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert train(data, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, trained)


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [("--hidden", "16", "hidden"), ("--frames", "5", "frames"), ("--lr", "0.5", "lr"), ("--seed", "1", "seed")],
)
def test_resuming_with_other_settings_is_refused(
    option: str, value: str, named: str, data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    assert train(data, out, "--resume", option, value) == 2
    assert re.search(rf"last\.pt is of another run: .*\b{named}\b.* differ.*same settings", capsys.readouterr().err)


CHANGES = {
    "added": ("videos/new.mp4", r"1 added: videos/new\.mp4"),
    "gone": ("", r"1 gone: videos/high_kick/train_0000\.mp4"),
    "label": (
        "videos/high_kick/train_0000.mp4,side_lunge,train",
        r"1 with another label .*\(side_lunge, train, not high",
    ),
    "split": (
        "videos/high_kick/train_0000.mp4,high_kick,test",
        r"1 with another label or split: .*\(high_kick, test, not high_kick, tr",
    ),
    "order": ("", "the same in another order"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_resuming_with_other_data_is_refused(
    what: str, data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = Path(shutil.copytree(trained, tmp_path / "run")), Path(shutil.copytree(data, tmp_path / "other"))
    header, *rows = (data / "labels.csv").read_text().splitlines()
    first = rows.index("videos/high_kick/train_0000.mp4,high_kick,train")
    if what == "added":
        shutil.copy(other / "videos" / "high_kick" / "train_0000.mp4", other / "videos" / "new.mp4")
        rows.append("videos/new.mp4,high_kick,train")
    elif what == "order":
        rows.reverse()
    else:
        rows[first : first + 1] = [CHANGES[what][0]] if CHANGES[what][0] else []
    (other / "labels.csv").write_text("\n".join([header, *rows]) + "\n")
    before = (out / "last.pt").read_bytes()
    assert train(other, out, "--resume", "--epochs", 2) == 2
    message = capsys.readouterr().err
    assert re.search(rf"last\.pt is of another run: videos differ \({CHANGES[what][1]}", message)
    assert "Train with the same settings and data." in message
    assert (out / "last.pt").read_bytes() == before


def test_a_run_goes_on_with_the_same_data_elsewhere(data: Path, trained: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    assert train(moved / "labels.csv", out, "--resume", "--epochs", 2) == 0
    assert checkpoint(out)["epoch"] == 3


HOLD = """import sys, time, pathlib, dynskip.video
with dynskip.video.hold_folder(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("script", ["sofnet_activitynet", "train_gates"])
def test_two_runs_do_not_share_a_folder(
    script: str, data: Path, trained: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.name != ".lock"}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        if script == "train_gates":
            assert run(train_gates, "--data", data, "--out", out, "--weights", weights, "--backbone", BACKBONE) == 2
        else:
            assert train(data, out, "--resume") == 2
        other.kill()
    assert re.search(rf"Another run writes to .*run: process {other.pid} on .*, since", capsys.readouterr().err)
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.name != ".lock"} == before


def test_an_existing_run_is_not_overwritten(data: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, trained) == 2
    assert re.search(r"last\.pt exists already\. Continue it with --resume, or choose", capsys.readouterr().err)


@pytest.mark.parametrize("damage", ["half", "empty", "text"])
def test_a_damaged_checkpoint_is_named(
    damage: str, data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = (trained / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes({"half": raw[: len(raw) // 2], "empty": b"", "text": b"hello\n"}[damage])
    assert train(data, tmp_path, "--resume") == 2
    assert "last.pt is missing or damaged" in capsys.readouterr().err


def test_two_processes_train_as_one(data: Path, tmp_path: Path) -> None:
    frozen = ("--batch-norm", "frozen")
    assert train(data, tmp_path / "one", *frozen) == 0
    done = subprocess.run(
        command(data, tmp_path / "two", *frozen, processes=2), env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    one, two = checkpoint(tmp_path / "one")["model"], checkpoint(tmp_path / "two")["model"]
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    assert done.stdout.count("gates + early termination") == 1  # only the first process speaks
    assert train(data, tmp_path / "parts", *frozen, "--accumulate", 2, "--clip", 1e9) == 0
    torch.testing.assert_close(checkpoint(tmp_path / "parts")["model"], one, rtol=1e-5, atol=1e-5)


def test_two_killed_processes_go_on_exactly(data: Path, tmp_path: Path) -> None:
    frozen = ("--batch-norm", "frozen", "--resume")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(data, whole, *frozen, processes=2), env=ENVIRONMENT, check=True, capture_output=True)
    process = subprocess.Popen(
        command(data, killed, *frozen, processes=2), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    while not (killed / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)  # torchrun; the processes that it started live on
    _, errors = process.communicate(timeout=120)  # until they have closed their end, too
    assert "torchrun is gone" in errors or checkpoint(killed)["epoch"] == 2
    subprocess.run(command(data, killed, *frozen, processes=2), env=ENVIRONMENT, check=True, capture_output=True)
    assert_same_run(killed, whole)


def test_batch_statistics_need_gpus_for_several_processes(data: Path, tmp_path: Path) -> None:
    done = subprocess.run(command(data, tmp_path, processes=2), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "give --batch-norm frozen" in done.stderr


def test_statistics_of_batchnorm_stay_when_they_are_frozen(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, "--batch-norm", "frozen") == 0
    statistics = {k: v for k, v in checkpoint(tmp_path)["model"].items() if k.endswith("running_var")}
    assert all(torch.equal(value, torch.ones_like(value)) for value in statistics.values())


def test_a_glance_is_trained_with_the_rest(data: Path, tmp_path: Path) -> None:
    options = ("--glance", BACKBONE, "--glance-size", 16, "--glance-weights", "none")
    assert train(data, tmp_path / "run", *options) == 0
    warm, last = checkpoint(tmp_path / "run", "warmup.pt"), checkpoint(tmp_path / "run")
    key = "backbone.glance.light.model.stem.conv.weight"
    assert not torch.equal(warm["model"][key], last["model"][key])
    assert StopOrForward.from_pretrained(tmp_path / "run" / "model").backbone.glance.size == 16


def test_half_precision_and_tensorboard(data: Path, tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert train(data, tmp_path, "--amp", "bf16", "--tensorboard") == 0
    (folder,) = {file.parent for file in tmp_path.rglob("events.out*")}
    board = accumulators.EventAccumulator(str(folder))
    board.Reload()
    assert [event.value for event in board.Scalars("total")] == pytest.approx([e["total"] for e in log_of(tmp_path)])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--backbone", "resnet5000", "resnet5000"),
        ("--threshold", "1.5", r"threshold.*1\.5"),
        ("--hidden", "0", "hidden.*0"),
        ("--alpha", "2", r"alpha=2\.0 is out of range"),
        ("--lr", "1e30", r"The loss became (nan|inf) in epoch \d\. Lower --lr"),
        ("--frames", "0", "clip of 0 frames"),
        ("--batch-size", "0", "step of 0 videos"),
        ("--batch-size", "13", "12 training videos and a step has 13"),
        ("--accumulate", "4", "cannot be shared evenly by 1 processes in 4 parts"),
        ("--format", "parquet", "no format 'parquet'"),
        ("--weights", "gone.pt", "gone.pt does not exist"),
        ("--start", "gone.pt", "gone.pt is missing or damaged"),
        ("--device", "toaster", "toaster"),
    ],
)
def test_bad_settings(
    option: str, value: str, message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--annotations", data / "labels.csv"] if option == "--format" else []
    try:
        code = train(data, tmp_path, *more, option, value)
    except SystemExit as refused:  # by argparse
        code = int(refused.code or 0)
    assert code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "model").exists()


def test_weights_of_a_classifier_of_other_classes(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(11)
    state = timm.create_model(BACKBONE, num_classes=9).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    assert train(data, tmp_path / "run", "--weights", tmp_path / "w.safetensors", "--lr", 0) == 0
    assert "w.safetensors has another number of classes: the classifier starts anew." in capsys.readouterr().out
    model = StopOrForward.from_pretrained(tmp_path / "run" / "model")
    for key, value in model.backbone.model.named_parameters():
        assert torch.equal(value, state[key]) if value.shape == state[key].shape else key.startswith("head.fc")


def test_unreadable_training_videos_are_replaced_and_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    for split in ("train", "test"):
        (folder / "videos" / "high_kick" / f"{split}_0000.mp4").write_bytes(b"no video" * 99)
    assert train(folder, tmp_path / "run") == 0
    captured = capsys.readouterr()
    assert captured.out.count("unreadable, another video took its place: ") == 1  # once, not once an epoch
    assert "5 videos;" in captured.out
    assert run(evaluate, tmp_path / "run" / "model", "--data", folder, "--workers", 0, "--device", "cpu") == 1
    assert "unreadable, left out: " in capsys.readouterr().err


def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    render, out = video_package.render_set, tmp_path / "a folder"

    def few(root: Path, **options: Any) -> Path:
        return render(root, **{**options, "train_per_class": 2, "test_per_class": 1}, size=48, num_frames=24)

    monkeypatch.setattr(video_package, "render_set", few)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert sofnet_activitynet.main(["demo", "--out", str(out), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert list(table_rows(text.split("The dense backbone of step 1")[1])) == list(MODES)
    assert is_picture(out / "gated" / "frame_usage.png")
    assert len(list((out / "gated").glob("timeline_*.png"))) == 6
    StopOrForward.from_pretrained(out / "dense" / "model")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert sofnet_activitynet.main(["demo", "--out", str(out), "--device", "cpu"]) == 0  # all is there already


# --------------------------------------------------------------------------------------- evaluation and prediction


def test_evaluate(data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usage, records = tmp_path / "new" / "usage.png", tmp_path / "other" / "videos.jsonl"
    more = ("--data", data, "--workers", 0, "--device", "cpu", "--usage", usage, "--per-video", records)
    assert run(evaluate, trained / "model", *more) == 0
    text = capsys.readouterr().out
    assert list(table_rows(text)) == list(MODES)
    assert "6 videos;" in text
    assert "multiply-adds" in text
    assert is_picture(usage)
    assert len(records.read_text().splitlines()) == 6 * len(MODES)
    ending = ("--threshold", "1e-6", "--min-frames", 0, "--split", "train", "--batch-size", 5)
    assert run(evaluate, trained / "model", *more, *ending) == 0
    rows = table_rows(capsys.readouterr().out)
    assert rows["gates + early termination"][6] == 75  # of four frames, three are unseen
    assert rows["gates + early termination"][3] < 0.3 * rows["gates"][3]


def test_evaluate_writes_a_page(data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "new" / "report.html"
    assert run(evaluate, trained / "model", "--data", data, "--workers", 0, "--device", "cpu", "--html", page) == 0
    shown = table_rows(capsys.readouterr().out)
    text = page.read_text(encoding="utf-8")
    for mode, (top1, *_) in shown.items():
        assert f"<td>{mode}</td><td>{top1:.1f}</td>" in text
    assert text.count("image/svg+xml") == 2  # the curves, for light and for dark screens
    assert all(f"<td>{name}</td>" in text for name in ("gates", "uniform frames", "random frames"))
    assert text.count("image/jpeg") == FRAMES * text.count("<h3>") > 0
    assert "There is no curve" not in text


def with_validation(data: Path, folder: Path) -> Path:
    """The training videos as a validation split."""
    Path(shutil.copytree(data, folder))
    labels = folder / "labels.csv"
    labels.write_text(labels.read_text().replace(",train\n", ",val\n"))
    return folder


def test_evaluate_within_a_budget(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = StopOrForward.from_pretrained(trained / "model")
    dense = FRAMES * model.lookup_for((32, 32)).dense / 1e9
    folder, picture = with_validation(data, tmp_path / "data"), tmp_path / "new" / "curve.png"
    more = ("--data", folder, "--workers", 0, "--device", "cpu")
    aim = ("--budget", 0.6 * dense, "--split", "val", "--curve", picture)
    assert run(evaluate, trained / "model", *more, *aim) == 0
    text = capsys.readouterr().out
    chosen = re.search(r"on 12 validation videos: top-1 (\S+) % at (\S+) GMACs/video \(dense", text)
    assert chosen
    row = table_rows(text)[MODES[2]]
    # On the validation split itself, the model does exactly what was promised.
    assert (row[0], row[3]) == (float(chosen[1]), float(chosen[2]))
    assert row[3] <= 0.6 * dense
    assert "the same videos" in text
    assert is_picture(picture)
    assert picture.with_suffix(".csv").exists()
    assert run(evaluate, trained / "model", *more, "--max-loss", 100) == 0
    assert "the same videos" not in capsys.readouterr().out
    assert run(evaluate, trained / "model", *more, "--budget", 1e-9) == 2
    assert "cannot be kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", 1), "no videos of split 'val'"),
        (("--split", "val"), "no videos of split 'val'"),
        (("--data", "gone"), "gone.*does not exist"),
    ],
)
def test_evaluate_says_what_is_missing(
    arguments: tuple[Any, ...], message: str, data: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(evaluate, trained / "model", "--data", data, "--workers", 0, "--device", "cpu", *arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_model_that_is_none(data: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for script, more in ((evaluate, ("--data", data)), (predict, (video,))):
        assert run(script, tmp_path, *more) == 2
        assert str(tmp_path) in capsys.readouterr().err


def test_predict_says_and_draws_what_happened(
    data: Path, video: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "words.mp4"
    bad.write_bytes(b"no video\n" * 99)
    twin = data / "videos" / "side_lunge" / "test_0000.mp4"
    assert run(predict, trained / "model", bad, video, twin, tmp_path / "gone.mp4", "--out", tmp_path / "pictures") == 1
    captured = capsys.readouterr()
    assert re.search(r"^test_0000\.mp4: \w+ \d+\.\d %$", captured.out, re.MULTILINE)
    assert "frames: 4 used, 0 stopped, 0 unseen" in captured.out
    assert "  ####\n  # used (4)\n" in captured.out
    assert re.search(
        r"[\d.]+ GMACs \(multiply-adds\) against [\d.]+ dense\n  4 frames, \d+ decoded for them", captured.out
    )
    assert f"error: {bad}: " in captured.err
    assert "gone.mp4: no such file" in captured.err
    assert "2 of 4 files could not be read." in captured.err
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2  # of two videos with one name


@pytest.mark.filterwarnings("ignore:.* lacks the letters")
def test_a_name_that_is_not_utf_8_is_a_name(
    video: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    shutil.copy(video, odd)
    assert run(predict, trained / "model", odd, video, "--out", tmp_path / "pictures") == 0
    assert "caf\\udce9.mp4: " in capsys.readouterr().out
    assert is_picture(tmp_path / "pictures" / os.fsdecode(b"caf\xe9.png"))
    odd.write_bytes(b"words")
    monkeypatch.setattr(video_package, "read_items", lambda *_: [video_package.Item(odd, ("a",), "train")])
    assert run(prepare_data, "--data", tmp_path, "--report", tmp_path / "report.json", "--workers", 0) == 1
    assert json.loads((tmp_path / "report.json").read_text())["unreadable"] == [
        f"{odd}: is text, no video. Give the file itself."
    ]


@pytest.mark.parametrize(
    ("script", "arguments", "advice"),
    [
        (predict, ("model", "a.mp4"), "What was printed and drawn stays."),
        (evaluate, ("model", "--data", "data"), "Nothing was written but what --cache keeps."),
        (prepare_data, ("--data", "data"), "Nothing was written. The same command starts again."),
        (prepare_data, ("--data", "data", "--cache", "kept"), "What is in kept stays. The same command starts again."),
        (train_gates, ("--data", "data", "--out", "out"), "The same command goes on after the last whole epoch."),
        (sofnet_activitynet, ("demo", "--out", "out"), "The same command goes on from where it was."),
        (sofnet_activitynet, ("train", "--data", "d", "--out", "out"), "The same command with --resume goes on from"),
    ],
)
def test_ctrl_c_has_the_advice_of_the_command(
    script: Any,
    arguments: tuple[str, ...],
    advice: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("load_items", "read_items", "render_set"):
        monkeypatch.setattr(video_package, name, interrupt)
    monkeypatch.setattr(StopOrForward, "from_pretrained", interrupt)
    assert run(script, *arguments) == 130
    assert capsys.readouterr().err.startswith(f"\nInterrupted. {advice}")


def test_outputs_are_tried_before_the_work(
    data: Path, trained: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    bad, model = tmp_path / "file" / "x", trained / "model"
    own = ("--data", data, "--workers", 0, "--device", "cpu")
    for script, arguments in (
        (sofnet_activitynet, ("train", "--data", data, "--out", bad)),
        (sofnet_activitynet, ("train", "--data", data, "--out", tmp_path / "out", "--cache", bad)),
        (sofnet_activitynet, ("demo", "--out", bad)),
        (train_gates, ("--data", data, "--out", bad)),
        (similarity_gates, ("--out", bad / "model")),
        (predict, (model, video, "--out", bad)),
        (prepare_data, ("--data", data, "--workers", 0, "--report", bad)),
        (prepare_data, ("--data", data, "--workers", 0, "--report", tmp_path / "r.json", "--cache", bad)),
        (evaluate, (model, *own, "--per-video", bad)),
        (evaluate, (model, *own, "--usage", bad.with_suffix(".png"))),
        (evaluate, (model, *own, "--usage", tmp_path / "x.abc")),
        (evaluate, (model, *own, "--budget", 1, "--curve", tmp_path / "x.csv")),
        (evaluate, (model, *own, "--cache", bad)),
    ):
        assert run(script, *arguments) == 2, (script, arguments)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert re.search("Could not write|no picture can be written", captured.err)


def test_a_checkpoint_of_another_version_is_told_in_a_line(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    content = torch.load(out / "last.pt", weights_only=True)
    content["model"].popitem()
    torch.save(content, out / "last.pt")
    assert train(data, out, "--resume") == 2
    said = capsys.readouterr().err
    assert re.search(
        r"error: Cannot load the model of \S+last\.pt: Missing key.* It was written with dynskip \S+, ", said
    )
    assert said.count("\n") == 1
    torch.save({**checkpoint(trained), "settings": {**content["settings"], "new_gate": "x"}}, out / "last.pt")
    assert train(data, out, "--resume") == 2
    assert "is of another run: new_gate differ" in capsys.readouterr().err


def test_prepare(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "new" / "report.json"
    arguments = ("--data", data, "--report", report, "--workers", 0, "--cache", tmp_path / "cache", "--frames", 4)
    assert run(prepare_data, *arguments) == 0
    assert "train: 12 of 12 videos, 6 classes" in capsys.readouterr().out
    assert json.loads(report.read_text())["readable"] == 18
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 18


def test_prepare_names_labels_that_read_alike_and_what_it_leaves_out(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = data / "videos" / "high_kick" / "train_0000.mp4"
    rows = zip("abcdef", ("jump", "jump ", "Jump", "air drumming", "Air_Drumming", "kick"), strict=True)
    for name in ("a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4", "f.mp4", "more.MP4", "even.mp4", "old.xyz", ".hidden"):
        shutil.copy(video, tmp_path / name)
    text = "".join(f"{name}.mp4,{label},train\n" for name, label in rows)
    (tmp_path / "labels.csv").write_text("path,label,split\n" + text)
    report = tmp_path / "report.json"
    for _ in range(2):  # the report itself is left out of the list
        assert run(prepare_data, "--data", tmp_path, "--report", report, "--workers", 0) == 1
        found = json.loads(report.read_text())
        assert found["labels_alike"] == ["'Air_Drumming', 'air drumming'", "'Jump', 'jump'"]
        assert found["left_out"] == [str(tmp_path / name) for name in ("even.mp4", "more.MP4", "old.xyz")]
    printed = capsys.readouterr().out
    assert "2 groups of labels differ only in case or spaces: each is probably one class:\n  'Air_Drumming'" in printed
    assert "3 files beside the videos are in no annotation (.mp4 2, .xyz 1):\n" in printed
    assert "5 classes" in printed


# ------------------------------------------------------------------------------- gates around a finished classifier


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    file = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_file(timm.create_model(BACKBONE).state_dict(), file)
    return file


SMALL = [
    "--backbone", BACKBONE, "--size", "32", "--frames", str(FRAMES), "--hidden", "8", "--gate-epochs", "3",
    "--workers", "0", "--device", "cpu", "--batch-size", "4",
]  # fmt: skip


@pytest.mark.parametrize("glance", [False, True])
def test_gates_on_a_frozen_backbone(
    glance: bool, data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "--data", data, "--weights", weights, "--epochs", 0, "--variants", 2, "--out", tmp_path / "one"]
    options += ["--glance", BACKBONE, "--glance-size", 16, "--glance-weights", weights] if glance else []
    assert run(train_gates, *options) == 0
    printed = capsys.readouterr().out
    assert list(table_rows(printed)) == list(MODES)
    assert "Thresholds chosen on 2 validation videos: top-1" in printed
    model = StopOrForward.from_pretrained(tmp_path / "one" / "model")
    assert len(set(model.forward_threshold)) > 0
    for key, value in load_file(weights).items():
        if not key.startswith("head.fc"):
            assert torch.equal(model.backbone.model.state_dict()[key], value)  # nothing was trained but the last layer
            if glance:
                assert torch.equal(model.backbone.glance.light.model.state_dict()[key], value)
    # The same command starts with what is there, and ends with the same weights and thresholds.
    kept = [*(tmp_path / "one" / "features").rglob("*.safetensors"), tmp_path / "one" / "gates.pt"]
    assert {file.parent.name for file in kept} == {"variant0", "variant1", "val", "one"}
    times = [file.stat().st_mtime_ns for file in kept]
    shutil.rmtree(tmp_path / "one" / "model")
    assert run(train_gates, *options) == 0
    assert [file.stat().st_mtime_ns for file in kept] == times
    again = StopOrForward.from_pretrained(tmp_path / "one" / "model")
    assert again.forward_threshold == model.forward_threshold
    torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert [line["epoch"] for line in log_of(tmp_path / "one")] == [0, 1, 2]
    assert {"curves.json", "curves.png", "videos.jsonl"} <= {file.name for file in (tmp_path / "one").iterdir()}


@pytest.mark.parametrize("phase", ["backbone", "gates"])
def test_the_default_recipe_goes_on_after_a_kill(
    phase: str, data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*SMALL, "--data", data, "--weights", weights, "--epochs", 2, "--lr", 0.01]
    assert run(train_gates, *options, "--out", tmp_path / "whole") == 0
    replaced = os.replace

    def dies_after_the_first_epoch(source: Any, target: Any) -> None:
        replaced(source, target)
        if Path(target).name == f"{phase}.pt":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", dies_after_the_first_epoch)
        assert run(train_gates, *options, "--out", tmp_path / "killed") == 130
    assert not (tmp_path / "killed" / "model").exists()
    assert run(train_gates, *options, "--out", tmp_path / "killed") == 0
    one, other = (StopOrForward.from_pretrained(tmp_path / each / "model") for each in ("whole", "killed"))
    assert one.forward_threshold == other.forward_threshold
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=0, atol=0)
    started = {key: value for key, value in load_file(weights).items() if not key.startswith("head.fc")}
    trained = one.backbone.model.state_dict()
    assert not all(torch.equal(trained[key], value) for key, value in started.items())
    assert all(torch.equal(trained[key], value) for key, value in started.items() if "running" in key)
    # Each epoch of either was done once.
    done = [(line["phase"], line["epoch"]) for line in log_of(tmp_path / "killed")]
    assert done == [("backbone", 0), ("backbone", 1), ("gates", 0), ("gates", 1), ("gates", 2)]
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")


def test_the_default_recipe_refuses_to_go_on_with_other_settings(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "--data", data, "--weights", weights, "--epochs", 1, "--out", tmp_path]
    assert run(train_gates, *options) == 0
    for more, differ in ((["--lr", 0.1, "--seed", 1], "lr, seed"), (["--alpha", 0.5], "alpha")):
        assert run(train_gates, *options, *more) == 2
        assert f".pt has other settings: {differ}. Delete it, or choose" in capsys.readouterr().err
    other = Path(shutil.copytree(data, tmp_path / "other"))
    labels = (
        (other / "labels.csv").read_text().replace("kick/train_0000.mp4,high_kick", "kick/train_0000.mp4,side_lunge")
    )
    (other / "labels.csv").write_text(labels)
    assert run(train_gates, *options, "--data", other) == 2
    changed = r"settings: videos \(1 with another label or split: \S*train_0000.mp4 \(side_lunge, train, not high_kick"
    assert re.search(changed, capsys.readouterr().err)
    assert run(train_gates, "--out", tmp_path) == 2
    assert "Say with --data where the videos are, or try --demo." in capsys.readouterr().err


def test_recordings_stay_together_where_validation_videos_are_set_aside() -> None:
    items = [video_package.Item(Path(f"v_{k}_g{k // 3}_c.mp4"), (str(k % 2),), "train") for k in range(30)]
    items += [video_package.Item(Path(f"w{k}.mp4"), ("0",), "val") for k in range(4)]
    args = train_gates.parser().parse_args(["--groups", "_g[0-9]+_"])
    divided = train_gates.divide(items, args)
    parts = {split: {item.path.name for item in divided if item.split == split} for split in ("train", "val", "test")}
    assert parts["test"] == {f"w{k}.mp4" for k in range(4)}  # there was no other test split
    assert len(parts["val"]) == 6
    assert not {name.split("_")[2] for name in parts["train"]} & {name.split("_")[2] for name in parts["val"]}
    tested = [*items, video_package.Item(Path("x.mp4"), ("0",), "test")]
    assert train_gates.divide(tested, args) == tested  # val and test are there


def test_gates_without_training(
    data: Path, weights: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    options = ("--backbone", BACKBONE, "--weights", weights, "--size", 32, "--frames", FRAMES)
    assert run(similarity_gates, *options, "--distance", 0.999, "--out", folder) == 0
    assert run(predict, folder, video, "--out", tmp_path / "pictures") == 0
    assert "frames: 1 used, 3 stopped (3 at stem), 0 unseen" in capsys.readouterr().out
    assert run(similarity_gates, *options, "--out", folder) == 2
    assert "no empty folder" in capsys.readouterr().err


def test_a_folder_of_videos_without_labels(
    data: Path, weights: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos, model = tmp_path / "videos", tmp_path / "model"
    videos.mkdir()
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(video, videos / name)
    (videos / "c.mp4").write_bytes(b"no video")
    options = ("--backbone", BACKBONE, "--weights", weights, "--size", 32, "--frames", FRAMES)
    assert run(similarity_gates, *options, "--videos", videos, "--out", model) == 0
    captured = capsys.readouterr()
    chosen = re.search(r"Chosen on 2 videos: (\S+) GMACs .* instead of (\S+)\.\n  100 % of the answers", captured.out)
    assert chosen
    assert float(chosen[1]) <= float(chosen[2])
    assert "c.mp4" in captured.err
    assert run(predict, model, videos, "--compare", "--device", "cpu", "--out", tmp_path / "pictures") == 1
    last = "\n".join(capsys.readouterr().out.splitlines()[-3:])
    saved = re.fullmatch(
        r"Saved: \S+% of the multiply-adds \((\S+) GMACs a video instead of (\S+)\)\n  and \S+% of the network's time "
        r"\(\S+ ms instead of \S+\)\.\n  2 of 2 answers are those of the network without gates\.",
        last,
    )
    assert saved
    assert [float(text) for text in saved.groups()] == pytest.approx([float(text) for text in chosen.groups()], rel=0.3)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run(similarity_gates, *options, "--videos", empty, "--out", tmp_path / "other") == 2
    assert "no video that can be read" in capsys.readouterr().err


def test_a_classifier_with_classes_of_its_own(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, names = tmp_path / "own.safetensors", tmp_path / "names.txt"
    save_file(timm.create_model(BACKBONE, num_classes=3).state_dict(), own)
    names.write_text("dog\ncat\nbird\n")
    options = ("--backbone", BACKBONE, "--weights", own, "--size", 32)
    assert run(similarity_gates, *options, "--out", tmp_path / "no") == 2
    assert "--class-names" in capsys.readouterr().err
    assert run(similarity_gates, *options, "--class-names", names, "--out", tmp_path / "model") == 0
    assert StopOrForward.from_pretrained(tmp_path / "model").class_names == ("dog", "cat", "bird")
