from __future__ import annotations

import csv
import itertools
import json
import random
import re
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from dynskip import DynskipError
from dynskip.sofnet import Recipe

av = pytest.importorskip("av")
for needed in ("matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(needed)

import evaluation  # noqa: E402
import sofnet_activitynet as example  # noqa: E402
import stick_figures  # noqa: E402
import training  # noqa: E402
import video_data  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

BACKBONE = "test_byobnet"
FRAMES = 4
NETWORK = ["--backbone", BACKBONE, "--size", "32", "--frames", str(FRAMES)]
MACHINE = ["--device", "cpu", "--workers", "0"]
CLASSES = stick_figures.CLASSES
PREP = video_data.Preprocessing(size=32, num_frames=FRAMES)
CONFIG = example.Config(BACKBONE, CLASSES, hidden=8, prep=PREP)


def train(data: Path, out: Path, *more: str) -> int:
    """Train on twelve videos: two epochs of two steps."""
    schedule = ["--warmup-epochs", "1", "--epochs", "1", "--batch-size", "6", "--lr", "0.01", "--hidden", "8"]
    arguments = ["--data", str(data), "--out", str(out), "--weights", "none", *NETWORK, *schedule, *MACHINE, *more]
    return example.main(["train", *arguments])


def evaluate(data: Path, *more: str) -> int:
    return example.main(["evaluate", "--data", str(data), *MACHINE, *more])


def predict(videos: Sequence[Path], out: Path, *more: str) -> int:
    return example.main(["predict", *map(str, videos), "--out", str(out), *MACHINE, *more])


def table_rows(text: str) -> dict[str, list[float]]:
    """The numbers of a printed table by the name of the row."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return {name: [float(number) for number in numbers] for name, *numbers in cells[1:]}


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_checkpoint(one: Path, other: Path) -> None:
    a, b = training.load_checkpoint(one), training.load_checkpoint(other)
    assert a["epoch"] == b["epoch"]
    assert a["config"] == b["config"]
    torch.testing.assert_close(a["model"], b["model"], rtol=0, atol=0)
    torch.testing.assert_close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=0, atol=0)


def write_labels(folder: Path, rows: Sequence[tuple[object, str, str]]) -> Path:
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    return folder


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="session")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "trained"
    assert train(data, out) == 0
    return out


@pytest.fixture
def video(data: Path) -> Path:
    return data / "videos" / "high_kick" / "test_0000.mp4"


# --------------------------------------------------------------------------------------------------------- commands


def test_train_writes_checkpoints_and_a_log(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {"last.pt", "warmup.pt", "log.jsonl", "report.json"}
    log = log_of(trained)
    assert [line["epoch"] for line in log] == [0, 1]
    assert "used" not in log[0]
    assert {"accuracy", "total", "classification", "efficiency", "inner", "self_supervision", "used"} < set(log[1])
    warm, last = (training.load_checkpoint(trained / name) for name in ("warmup.pt", "last.pt"))
    assert (warm["epoch"], last["epoch"]) == (0, 1)
    _, fresh = torch.manual_seed(0), CONFIG.build().state_dict()
    trains = {
        part: [k for k in fresh if k.startswith(part) and fresh[k].is_floating_point()]
        for part in ("backbone", "gates")
    }
    assert any(not torch.equal(warm["model"][k], fresh[k]) for k in trains["backbone"])
    assert all(torch.equal(warm["model"][k], fresh[k]) for k in trains["gates"])  # the warm-up leaves gates alone
    assert any(not torch.equal(last["model"][k], fresh[k]) for k in trains["gates"])


def test_evaluate_prints_the_table(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "pictures" / "usage.png"
    assert evaluate(data, "--checkpoint", str(trained / "last.pt"), "--usage", str(picture)) == 0
    text = capsys.readouterr().out
    rows = table_rows(text)
    assert list(rows) == list(evaluation.MODES)
    model, _ = example.restore(trained / "last.pt")
    dense = model.lookup_for((32, 32)).dense / 1e9
    assert rows["dense"][2:7] == pytest.approx([dense, FRAMES * dense, 100, 0, 0], rel=1e-3)
    assert all(sum(numbers[4:7]) == pytest.approx(100, abs=0.2) for numbers in rows.values())
    assert rows["gates"][6] == 0  # unseen frames are early termination's alone
    assert "6 videos." in text
    assert "multiply-adds" in text
    assert is_picture(picture)


def test_evaluate_agrees_with_scikit_learn_on_held_back_videos_of_some_classes(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranking = pytest.importorskip("sklearn.metrics")
    with (data / "labels.csv").open(newline="") as handle:
        rows = [(data / r["path"], r["label"], "test") for r in csv.DictReader(handle) if r["label"] in CLASSES[::2]]
    folder = write_labels(tmp_path, rows)
    assert evaluate(folder, "--checkpoint", str(trained / "last.pt")) == 0
    text = capsys.readouterr().out
    assert f"{len(rows)} videos." in text
    header = [cell.strip() for cell in next(line for line in text.splitlines() if line[:2] == "| ").split("|")][2:-1]
    model, config = example.restore(trained / "last.pt")
    clips = video_data.Clips(video_data.read_csv(folder), config.classes, config.prep, training=False, seed=0)
    for outcome in evaluation.run_modes(model, clips, 1, 0, "cpu"):
        row = dict(zip(header, table_rows(text)[outcome.mode], strict=True))
        labels = np.array([config.classes.index(label) for _, label, _ in rows])
        scores = outcome.probabilities.double().numpy()
        top1 = ranking.top_k_accuracy_score(labels, scores, k=1, labels=range(6))
        top5 = ranking.top_k_accuracy_score(labels, scores, k=5, labels=range(6))
        plain = np.mean([ranking.average_precision_score(labels == c, scores[:, c]) for c in sorted(set(labels))])
        for name, value in (("top-1 %", top1), ("top-5 %", top5), ("plain mAP %", plain)):
            assert row[name] == pytest.approx(100 * value, abs=0.051), name


def test_evaluate_needs_videos_to_test_on(
    video: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_labels(tmp_path, [(video, "high_kick", "train")])
    assert evaluate(folder, "--checkpoint", str(trained / "last.pt")) == 2
    assert "no videos to test on. Say with --split train" in capsys.readouterr().err
    assert evaluate(folder, "--checkpoint", str(trained / "last.pt"), "--split", "train") == 0


def test_evaluate_ends_early_at_a_low_threshold(data: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ending = ["--threshold", "1e-6", "--min-frames", "0", "--split", "train", "--batch-size", "5"]
    assert evaluate(data, "--checkpoint", str(trained / "last.pt"), *ending) == 0
    text = capsys.readouterr().out
    rows = table_rows(text)
    assert rows["gates + early termination"][6] == 75
    assert rows["gates + early termination"][3] < 0.3 * rows["gates"][3]
    assert "12 videos." in text


def test_evaluate_writes_a_line_a_video(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "videos.jsonl"
    assert evaluate(data, "--checkpoint", str(trained / "last.pt"), "--per-video", str(file)) == 0
    text = capsys.readouterr().out
    header = [cell.strip() for cell in next(line for line in text.splitlines() if line[:2] == "| ").split("|")][2:-1]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == len(evaluation.MODES) * 6
    stages = len(example.restore(trained / "last.pt")[0].backbone.stage_names)
    with (data / "segments.csv").open(newline="") as handle:
        segments = {row["path"]: (int(row["start"]), int(row["end"])) for row in csv.DictReader(handle)}
    middles = [24 / FRAMES * (t + 0.5) for t in range(FRAMES)]
    for mode, numbers in table_rows(text).items():
        row, own = dict(zip(header, numbers, strict=True)), [line for line in lines if line["mode"] == mode]
        assert row["top-1 %"] == pytest.approx(100 * sum(line["correct"] for line in own) / 6, abs=0.1)
        assert row["GMACs/video"] == pytest.approx(sum(line["gmacs"] for line in own) / 6, rel=1e-3)
        assert row["ms/video"] == pytest.approx(sum(line["milliseconds"] for line in own) / 6, abs=0.1)
        assert sum(row[name] for name in header if name.startswith("stopped at ")) == pytest.approx(
            row["stopped %"], abs=0.5
        )
        relevant, used, both = 0, 0, 0
        for line in own:
            start, end = segments[str(Path(line["video"]).relative_to(data))]
            assert line["relevant"] == [int(start <= int(middle) < end) for middle in middles]
            assert line["correct"] == (next(iter(line["best"])) in line["labels"])
            flags = [stage == stages for stage in line["stopped_at"]]
            relevant, used = relevant + sum(line["relevant"]), used + sum(flags)
            both += sum(a and b for a, b in zip(flags, line["relevant"], strict=True))
        assert row["used: recall %"] == pytest.approx(100 * both / relevant, abs=0.1)
        if used:
            assert row["used: precision %"] == pytest.approx(100 * both / used, abs=0.1)


def with_validation(data: Path, folder: Path) -> Path:
    """The training videos as a validation split."""
    folder.mkdir()
    with (data / "labels.csv").open(newline="") as handle:
        rows = [(data / r["path"], r["label"], r["split"].replace("train", "val")) for r in csv.DictReader(handle)]
    return write_labels(folder, rows)


def test_evaluate_within_a_budget(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = example.restore(trained / "last.pt")
    dense = FRAMES * model.lookup_for((32, 32)).dense / 1e9
    folder, picture = with_validation(data, tmp_path / "data"), tmp_path / "new" / "curve.png"
    more = ["--checkpoint", str(trained / "last.pt"), "--budget", str(0.6 * dense), "--split", "val"]
    assert evaluate(folder, *more, "--curve", str(picture)) == 0
    text = capsys.readouterr().out
    chosen = re.search(r"on 12 validation videos: top-1 (\S+) % at (\S+) GMACs/video \(dense", text)
    assert chosen
    rows = table_rows(text)
    # On the validation split itself, the model does exactly what was promised.
    assert rows[evaluation.MODES[2]][0] == float(chosen[1])
    assert rows[evaluation.MODES[2]][3] == float(chosen[2]) <= 0.6 * dense
    assert "the same videos" in text
    assert is_picture(picture)
    with picture.with_suffix(".csv").open(newline="") as handle:
        assert {row["curve"] for row in csv.DictReader(handle)} == {"gates", "uniform frames", "random frames", "dense"}


def test_evaluate_with_little_loss(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--checkpoint", str(trained / "last.pt"), "--max-loss"]
    assert evaluate(with_validation(data, tmp_path / "data"), *more, "100") == 0
    text = capsys.readouterr().out
    assert "Calibrated on 12 validation videos" in text
    assert "6 videos." in text  # evaluated on the test split
    assert "the same videos" not in text


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--budget", "1"], "no videos of split 'val'"), (["--max-loss", "1"], "no videos of split 'val'")],
)
def test_calibration_needs_validation_videos(
    more: list[str], message: str, data: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(data, "--checkpoint", str(trained / "last.pt"), *more) == 2
    assert message in capsys.readouterr().err


def test_a_budget_out_of_reach(data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_validation(data, tmp_path / "data")
    assert evaluate(folder, "--checkpoint", str(trained / "last.pt"), "--budget", "1e-9") == 2
    assert "cannot be kept" in capsys.readouterr().err


def test_bad_segments(data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_validation(data, tmp_path / "data")
    for content, message in (
        ("path,start,end\na.mp4,1,x\n", "segments.csv, line 2: start and end must be numbers of frames"),
        ("path,start\na.mp4,1\n", "segments.csv lacks the column end"),
        (f"path,start,end\n{data / 'videos/high_kick/test_0000.mp4'},5,5\n", "from 5.0 to 5.0 has no length"),
    ):
        (folder / "segments.csv").write_text(content)
        assert evaluate(folder, "--checkpoint", str(trained / "last.pt")) == 2
        assert message in capsys.readouterr().err


def test_predict_says_and_draws_what_happened(
    video: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        predict([video], tmp_path, "--checkpoint", str(trained / "last.pt"), "--threshold", "1e-6", "--min-frames", "2")
        == 0
    )
    text = capsys.readouterr().out
    assert re.match(rf"test_0000\.mp4: ({'|'.join(CLASSES)}) \d+\.\d %\n", text)
    assert "frames: 3 used, 0 stopped, 1 unseen" in text
    assert "  ###.\n  # used (3)   . unseen (1)\n" in text
    spent = re.search(r"([\d.]+) GMACs \(multiply-adds\) against ([\d.]+) dense, [\d.]+ ms", text)
    assert spent
    assert float(spent[1]) == pytest.approx(0.75 * float(spent[2]), rel=0.05)
    assert is_picture(tmp_path / "test_0000.png")


def test_videos_of_one_name_keep_their_pictures(data: Path, trained: Path, tmp_path: Path) -> None:
    videos = [data / "videos" / label / "test_0000.mp4" for label in ("high_kick", "side_lunge")]
    assert predict(videos, tmp_path, "--checkpoint", str(trained / "last.pt")) == 0
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_frames_stopped_by_gates_are_reported(
    data: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path / "run", "--epochs", "0", "--forward-bias", "-20") == 0
    first, *_ = CONFIG.build().backbone.stage_names
    assert "In 6 videos the gates used no frame" in capsys.readouterr().out
    assert predict([video], tmp_path, "--checkpoint", str(tmp_path / "run" / "last.pt")) == 0
    text = capsys.readouterr().out
    assert f"frames: 0 used, 4 stopped (4 at {first}), 0 unseen" in text
    assert "no frame passed every gate: frame" in text


def test_dense_training_prints_one_row(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, tmp_path, "--dense") == 0
    assert list(table_rows(capsys.readouterr().out)) == ["dense"]
    assert not any("used" in line for line in log_of(tmp_path))


def test_training_from_memory(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Path] = []
    read = video_data.read_frames

    def counting(path: Path, *arguments: Any) -> np.ndarray:
        decoded.append(path)
        return read(path, *arguments)

    monkeypatch.setattr(video_data, "read_frames", counting)
    assert train(data, tmp_path, "--in-memory") == 0
    assert sorted(decoded) == sorted(item.path for item in video_data.read_csv(data))  # each video once


def test_fc_gates_without_guidance(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, "--temporal", "none", "--no-guidance", "--optimizer", "adamw", "--normalize") == 0
    assert evaluate(data, "--checkpoint", str(tmp_path / "last.pt"), "--split", "train") == 0
    assert log_of(tmp_path)[1]["inner"] == log_of(tmp_path)[1]["self_supervision"] == 0


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(example, "DEMO_VIDEOS", {"train_per_class": 1, "test_per_class": 1})
    monkeypatch.setattr(example, "DEMO_RECIPE", Recipe(warmup_epochs=1, joint_epochs=1))
    arguments = ["demo", "--out", str(tmp_path), *MACHINE]
    assert example.main(arguments) == 0
    rows = table_rows(capsys.readouterr().out)
    assert list(rows) == list(evaluation.MODES) == list(table_rows((tmp_path / "table.md").read_text()))
    assert rows["dense"][4] == 100
    pictures = {"frame_usage.png", *(f"timeline_{label}.png" for label in CLASSES)}
    assert {path.name for path in tmp_path.glob("*.png")} == pictures
    assert all(is_picture(tmp_path / name) for name in pictures)

    logs = {name: log_of(tmp_path / name) for name in ("dense", "gated")}
    assert [line["epoch"] for line in logs["dense"]] == [0, 1]
    assert [line["epoch"] for line in logs["gated"]] == [1]  # goes on from the dense model's warm-up
    assert example.main(arguments) == 0
    again = table_rows(capsys.readouterr().out)
    assert {name: numbers[:7] for name, numbers in rows.items()} == {n: numbers[:7] for n, numbers in again.items()}
    assert {name: log_of(tmp_path / name) for name in logs} == logs


# ----------------------------------------------------------------------------------------------------- interruption


def interrupt_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    step, count = torch.optim.SGD.step, itertools.count(1)

    def interrupted(self: torch.optim.SGD, *arguments: Any) -> Any:
        if next(count) == number:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", interrupted)


def interrupt_writing(monkeypatch: pytest.MonkeyPatch, name: str, epoch: int) -> None:
    save = torch.save

    def interrupted(content: dict[str, Any], file: Path) -> None:
        save(content, file)
        if (Path(file).stem, content["epoch"]) == (name, epoch):
            Path(file).write_bytes(Path(file).read_bytes()[:1000])
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)


@pytest.mark.parametrize(
    ("interrupt", "arguments", "survives"),
    [
        pytest.param(interrupt_step, (2,), None, id="middle of the first epoch"),
        pytest.param(interrupt_step, (3,), 0, id="start of the second epoch"),
        pytest.param(interrupt_step, (4,), 0, id="middle of the second epoch"),
        pytest.param(interrupt_writing, ("last", 0), None, id="writing the first checkpoint"),
        pytest.param(interrupt_writing, ("warmup", 0), None, id="writing the warm-up checkpoint"),
        pytest.param(interrupt_writing, ("last", 1), 0, id="writing the last checkpoint"),
    ],
)
def test_interrupted_training_resumes_exactly(
    interrupt: Callable[..., None],
    arguments: tuple[Any, ...],
    survives: int | None,
    data: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, *arguments)
        assert train(data, tmp_path) == 130
    assert "Interrupted. `train --resume` continues" in capsys.readouterr().err
    last = tmp_path / "last.pt"
    if survives is None:
        assert not last.exists()
    else:
        assert training.load_checkpoint(last)["epoch"] == survives

    torch.rand(7)  # whatever else happened to the random state
    assert train(data, tmp_path, "--resume") == 0
    for name in ("last.pt", "warmup.pt"):
        assert_same_checkpoint(tmp_path / name, trained / name)
    assert log_of(tmp_path) == log_of(trained)


def test_training_does_not_depend_on_the_number_of_workers(data: Path, trained: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, "--workers", "2") == 0
    assert_same_checkpoint(tmp_path / "last.pt", trained / "last.pt")


def test_clips_do_not_depend_on_the_number_of_workers(data: Path) -> None:
    clips = video_data.Clips(video_data.read_csv(data), CLASSES, PREP, training=True, seed=3)
    epochs = {(w, e): list(video_data.batches(clips, 5, w, e)) for w, e in itertools.product((0, 2), (0, 1))}
    for epoch in (0, 1):
        for alone, shared in zip(epochs[0, epoch], epochs[2, epoch], strict=True):
            assert torch.equal(alone.video, shared.video)
            assert torch.equal(alone.targets, shared.targets)
            assert alone.positions == shared.positions
    order = {epoch: [p for batch in epochs[0, epoch] for p in batch.positions] for epoch in (0, 1)}
    assert order[0] != order[1]
    assert sorted(order[0]) == sorted(order[1]) == list(range(len(clips)))
    untouched = torch.get_rng_state()
    early, late, again = (clips[epoch, 5] for epoch in (0, 1, 1))
    assert not isinstance(early, str)
    assert not isinstance(late, str)
    assert not isinstance(again, str)
    assert not torch.equal(early[0], late[0])  # drawn anew every epoch
    assert torch.equal(late[0], again[0])
    assert torch.equal(torch.get_rng_state(), untouched)


def test_existing_run_is_not_overwritten(data: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, trained) == 2
    assert re.search(r"last\.pt exists already\. Continue it with --resume, or choose", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--hidden", "16", "hidden"),
        ("--frames", "5", "prep"),
        ("--lr", "0.5", "lr"),
        ("--seed", "1", "seed"),
        ("--batch-size", "5", "batch_size"),
        ("--optimizer", "adamw", "optimizer"),
    ],
)
def test_resuming_with_other_options_is_refused(
    option: str, value: str, named: str, data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    assert train(data, out, "--resume", option, value) == 2
    assert re.search(rf"last\.pt is of another .*\b{named}\b.* differ.*same options", capsys.readouterr().err)
    assert_same_checkpoint(out / "last.pt", trained / "last.pt")


# ------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"labels\.csv does not exist\. --data takes a folder with a labels\.csv, or such a file"),
        ("", r"lacks the column label, path, split"),
        (
            "path,label\n{video},kick\n",
            r"lacks the column split\. Its first line must name path, label, split; it names",
        ),
        ("path,label,split\n{video},kick,training\n", r"line 2: unknown split 'training'\. Expected one of train, val"),
        ("path,label,split\n{video},kick,train\n{video},kick\n", r"line 3: unknown split ''"),
        ("path,label,split\n{video},kick,train\n{video},,train\n", r"line 3: path and label must not be empty"),
        ("path,label,split\n,kick,train\n", r"line 2: path and label must not be empty"),
        (
            "path,label,split\n{video},kick,train\ngone.mp4,kick,test\n",
            r"names 1 of 2 videos that do not exist, the first being .*gone\.mp4\. Paths are relative to the CSV",
        ),
        ("path,label,split\n{video},kick,val\n", r"no videos of split 'train'; it has val"),
        ("path,label,split\n", r"no videos of split 'train'; it has none at all"),
        (b"path,label,split\n{video},\xe9l\xe9ment,train\n", r"labels\.csv.*UTF-8"),
    ],
)
def test_bad_csv(
    content: str | bytes | None, message: str, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "labels.csv").write_bytes(raw.replace(b"{video}", str(video).encode()))
    assert train(tmp_path, tmp_path / "run") == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_csv_as_spreadsheets_write_it(video: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_bytes(f'\ufeffpath,label,split\r\n{video},"a, b",train\r\n'.encode())
    assert video_data.read_csv(file) == [video_data.Item(video, ("a, b",), "train")]


def test_classes_that_the_model_does_not_know(
    video: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_labels(tmp_path, [(video, "yodel", "test")])
    assert evaluate(folder, "--checkpoint", str(trained / "last.pt")) == 2
    assert re.search(
        r"1 classes that the model does not know, such as 'yodel'\. It was .*on 6", capsys.readouterr().err
    )


def annotation(subset: str, *labels: str) -> dict[str, Any]:
    annotations = [{"segment": [2.0 * i, 2.0 * i + 1.5], "label": label} for i, label in enumerate(labels)]
    return {"duration": 60.1, "subset": subset, "resolution": "320x240", "url": "", "annotations": annotations}


def write_annotations(file: Path, database: Any) -> list[str]:
    file.write_text(json.dumps({"database": database, "taxonomy": [], "version": "VERSION 1.3"}))
    return ["--annotations", str(file)]


def test_activitynet_annotations(
    video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("-tVC_5.mp4", "v_QOlS.mkv", "v_x_y.mp4", "zzz.mp4", "v_test.mp4"):
        shutil.copy(video, folder / name)
    database = {
        "-tVC_5": annotation("training", "Ballet", "Ballet"),
        "QOlS": annotation("training", "Polo", "Archery", "Polo"),
        "v_x_y": annotation("validation", "Polo"),
        "absent": annotation("validation", "Polo"),
        "gone": annotation("training", "Surfing"),
        "test": annotation("testing"),
        "zzz": annotation("training"),  # without a label there is nothing to learn
    }
    more = write_annotations(tmp_path / "anet.json", database)
    expected = [
        video_data.Item(folder / "-tVC_5.mp4", ("Ballet",), "train"),
        video_data.Item(folder / "v_QOlS.mkv", ("Polo", "Archery"), "train"),
        video_data.Item(folder / "v_x_y.mp4", ("Polo",), "val"),
    ]
    found = video_data.load_items(folder, [tmp_path / "anet.json"])
    assert [replace(item, segments=(), duration=None) for item in found] == expected
    assert "2 of 5 annotated videos are not in" in capsys.readouterr().out
    assert train(folder, tmp_path / "run", *more) == 0
    assert "1 videos." in capsys.readouterr().out
    content = training.load_checkpoint(tmp_path / "run" / "last.pt")
    assert example.Config.from_json(content["config"]).classes == ("Archery", "Ballet", "Polo")
    assert evaluate(folder, *more, "--checkpoint", str(tmp_path / "run" / "last.pt"), "--split", "train") == 0
    assert "2 videos." in capsys.readouterr().out


def test_any_label_of_a_video_counts_as_right(video: Path) -> None:
    items = [video_data.Item(video, ("squat_kick", "high_kick"), "test")]
    model = CONFIG.build()
    classifier: Any = model.backbone.model.get_submodule("head.fc")
    with torch.no_grad():
        classifier.weight.zero_()
        classifier.bias[CLASSES.index("high_kick")] = 9  # the second label of the video
    clips = video_data.Clips(items, CLASSES, PREP, training=False, seed=0)
    (dense,) = evaluation.evaluate(model, clips, 1, 0, "cpu", evaluation.MODES[:1])
    assert dense.top1 == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "{",
            r"is no ActivityNet annotation file \(JSONDecodeError: .*Expected JSON whose 'database' gives each video",
        ),
        ('{"videos": {}}', r"is no ActivityNet annotation file \(KeyError: 'database'\)"),
        ("[1]", r"is no ActivityNet annotation file"),
        ('{"database": []}', r"is no ActivityNet annotation file"),
        ('{"database": {"a": 3}}', r"has 1 faults:\n  a: has no keys; expected 'subset' and 'annotations'"),
        (
            '{"database": {"a": {"subset": "training", "annotations": [{"segment": [1, 2]}]}}}',
            r"a: its annotations need 'segment' \[start, end\] and 'label' \(KeyError\('label'\)\)",
        ),
        (
            json.dumps({"database": {"a": annotation("training", "b")}}),
            r"None of the 1 annotated videos is in .*; the first would be .*v_ in front",
        ),
        (None, r"anet\.json does not exist\. Give an annotation file"),
    ],
)
def test_bad_annotations(content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "anet.json").write_text(content)
    assert train(tmp_path, tmp_path / "run", "--annotations", str(tmp_path / "anet.json")) == 2
    assert re.search(message, capsys.readouterr().err)


def test_annotations_need_a_folder(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = write_annotations(tmp_path / "anet.json", {})
    assert train(video, tmp_path / "run", *more) == 2
    assert "is no folder. With --annotations, --data is the folder" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- checkpoints and weights


def half(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def empty(raw: bytes) -> bytes:
    return b""


def text(raw: bytes) -> bytes:
    return b"hello, this is no checkpoint\n"


def flipped(raw: bytes) -> bytes:
    middle = len(raw) // 2
    return raw[:middle] + bytes(255 - byte for byte in raw[middle : middle + 1024]) + raw[middle + 1024 :]


class Malicious:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("damage", [half, empty, text, flipped])
def test_damaged_checkpoint(
    damage: Callable[[bytes], bytes],
    video: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = tmp_path / "bad.pt"
    bad.write_bytes(damage((trained / "last.pt").read_bytes()))
    assert predict([video], tmp_path, "--checkpoint", str(bad)) == 2
    assert re.search(r"bad\.pt is damaged or no checkpoint .*train again", capsys.readouterr().err)


def test_damage_to_the_checkpoint_of_a_run_stops_resuming(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "last.pt").write_bytes(half((trained / "last.pt").read_bytes()))
    assert train(data, tmp_path, "--resume") == 2
    assert "last.pt is damaged or no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("content", [{"weight": torch.zeros(2)}, [1, 2], torch.zeros(3), {"format": "other"}])
def test_foreign_checkpoint(content: Any, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(content, tmp_path / "foreign.pt")
    assert predict([video], tmp_path, "--checkpoint", str(tmp_path / "foreign.pt")) == 2
    assert re.search(r"foreign\.pt was not written by this example\. .*--weights instead", capsys.readouterr().err)


def test_missing_checkpoint(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict([video], tmp_path, "--checkpoint", str(tmp_path / "gone.pt")) == 2
    assert "gone.pt does not exist. --checkpoint takes a file that `train` wrote" in capsys.readouterr().err
    assert predict([video], tmp_path) == 2
    assert "give --checkpoint FILE (written by train), or --weights FILE" in capsys.readouterr().err


def test_no_code_of_a_file_is_run(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim, file = tmp_path / "victim", tmp_path / "evil.pt"
    torch.save({"format": training.CHECKPOINT_FORMAT, "model": Malicious(victim)}, file)
    assert predict([video], tmp_path, "--checkpoint", str(file)) == 2
    assert "evil.pt is damaged or no checkpoint" in capsys.readouterr().err
    assert predict([video], tmp_path, "--weights", str(file), *NETWORK) == 2
    assert "evil.pt cannot be read as weights" in capsys.readouterr().err
    assert not victim.exists()
    torch.load(file, weights_only=False)
    assert victim.exists()  # so the file is as dangerous as it was meant to be


def weights_of(name: str, num_classes: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(11)
    state = timm.create_model(name, num_classes=num_classes).state_dict()
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}


def save_plain(state: dict[str, torch.Tensor], file: Path) -> None:
    torch.save(state, file)


def save_wrapped(state: dict[str, torch.Tensor], file: Path) -> None:
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("save", "name"), [(save_file, "w.safetensors"), (save_plain, "w.pt"), (save_wrapped, "w.pth")]
)
def test_weights_load(save: Callable[..., None], name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    state = weights_of(BACKBONE, len(CLASSES), dtype)
    save(state, tmp_path / name)
    model = CONFIG.build().backbone.model
    assert example.load_weights(model, tmp_path / name)
    loaded = model.state_dict()
    assert all(value.dtype == torch.float32 for value in loaded.values() if value.is_floating_point())
    torch.testing.assert_close(loaded, {k: v.to(loaded[k].dtype) for k, v in state.items()}, rtol=0, atol=0)


def test_weights_of_another_number_of_classes_leave_the_classifier(
    data: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = weights_of(BACKBONE, 1000)
    file = tmp_path / "w.safetensors"
    save_file(state, file)
    assert train(data, tmp_path / "run", "--weights", str(file), "--lr", "0", "--epochs", "0") == 0
    assert "w.safetensors has another number of classes: the classifier starts anew." in capsys.readouterr().out
    saved, _ = example.restore(tmp_path / "run" / "last.pt")
    for key, value in saved.backbone.model.named_parameters():
        assert (value.shape == state[key].shape and torch.equal(value, state[key])) != key.startswith("head.fc")
    assert evaluate(data, "--weights", str(file), *NETWORK) == 0
    out = capsys.readouterr().out
    assert "w.safetensors has 1000 classes and the data 6: the classifier is untrained." in out
    assert "The gates are untrained" in out
    assert predict([video], tmp_path, "--weights", str(file), *NETWORK) == 0
    assert re.search(r"test_0000\.mp4: \S.* \d+\.\d %", capsys.readouterr().out)


def test_weights_of_another_model(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "w.safetensors"
    save_file(weights_of("test_resnet", 6), file)
    assert train(data, tmp_path / "run", "--weights", str(file)) == 2
    pattern = r"holds weights of another model: \d+ entries are missing, \d+ unknown, .*--backbone that they were made"
    assert re.search(pattern, capsys.readouterr().err)
    assert evaluate(data, "--weights", str(file), *NETWORK) == 2
    assert re.search(pattern, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("w.pt", damage) for damage in (half, empty, text, flipped)),
        *(("w.safetensors", damage) for damage in (half, empty, text)),  # the format has no checksum
    ],
)
def test_damaged_weights(
    name: str, damage: Callable[[bytes], bytes], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    (save_file if name == "w.safetensors" else torch.save)(weights_of(BACKBONE, 6), file)
    file.write_bytes(damage(file.read_bytes()))
    assert train(data, tmp_path / "run", "--weights", str(file)) == 2
    assert re.search(r"w\.\w+ cannot be read as weights .*Expected \.safetensors, or", capsys.readouterr().err)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {1: torch.zeros(2)}, {"state_dict": [1]}])
def test_foreign_weights(content: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(content, tmp_path / "w.pt")
    assert train(data, tmp_path / "run", "--weights", str(tmp_path / "w.pt")) == 2
    assert re.search(r"w\.pt (cannot be read as weights|holds weights of another model)", capsys.readouterr().err)


def test_missing_weights(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, tmp_path / "run", "--weights", str(tmp_path / "gone.pt")) == 2
    assert "gone.pt does not exist. --weights takes a file, 'hub' or 'none'." in capsys.readouterr().err


def test_hub_without_network(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    create = timm.create_model

    def offline(*arguments: Any, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            raise OSError("Name or service not known")
        return create(*arguments, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    assert train(data, tmp_path / "run", "--weights", "hub") == 2
    message = capsys.readouterr().err
    assert f"Could not get published weights for '{BACKBONE}'" in message
    assert "--weights FILE" in message
    assert "--weights none" in message


def test_strides_are_for_bottleneck_resnets(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for backbone in ("test_resnet", BACKBONE):
        assert train(data, tmp_path / "run", "--backbone", backbone, "--strides-in-1x1") == 2
        assert "--strides-in-1x1 is for ResNets with bottleneck blocks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--backbone", "resnet5000", r"timm has no model named 'resnet5000' for --backbone"),
        ("--threshold", "1.5", r"threshold 1\.5 is no probability"),
        ("--hidden", "0", r"--hidden.*0"),
        ("--alpha", "2", r"alpha=2\.0 is out of range"),
        ("--beta", "-1", r"beta=-1\.0 is out of range"),
        ("--lr", "1e30", r"The loss became (nan|inf) in epoch \d\. Lower --lr"),
        ("--frames", "0", r"--frames.*0"),
        ("--size", "0", r"--size.*0"),
        ("--batch-size", "0", r"--batch-size.*0"),
        ("--workers", "-1", r"--workers.*-1"),
        ("--epochs", "-1", r"--epochs.*-1"),
        ("--lr", "-1", r"--lr.*-1"),
        ("--device", "toaster", r"toaster"),
    ],
)
def test_bad_options(
    option: str, value: str, message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = train(data, tmp_path, option, value)
    except SystemExit as refused:  # by argparse
        code = int(refused.code or 0)
    assert code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "last.pt").exists()


def test_a_file_in_place_of_the_folder(
    data: Path, video: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.write_text("")
    assert train(data, out) == 2
    assert str(out) in capsys.readouterr().err
    assert predict([video], out, "--checkpoint", str(trained / "last.pt")) == 2
    assert str(out) in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- videos

BITS = 6


def write_numbered(path: Path, count: int, height: int = 32, width: int = 96, codec: str = "libx264") -> Path:
    """Write a video whose frames show their number: bars from left to right, white for a one."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(count):
            bars = [255 * (number >> bit & 1) for bit in range(BITS)]
            row = np.repeat(np.array(bars, np.uint8), width // BITS)
            pixels = np.broadcast_to(row[None, :, None], (height, width, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def numbers(frames: np.ndarray) -> list[int]:
    """Read the numbers that `write_numbered` drew."""
    _, height, width, _ = frames.shape
    centres = [int((bit + 0.5) * width / BITS) for bit in range(BITS)]
    ones = frames[:, height // 2, centres].mean(-1) > 127
    return [int(sum(2**bit for bit in range(BITS) if row[bit])) for row in ones]


def write_sound(path: Path, codec: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8000, layout="mono")
        form = "fltp" if codec == "aac" else "s16"
        silence = np.zeros((1, 4096), np.float32 if codec == "aac" else np.int16)
        frame = av.AudioFrame.from_ndarray(silence, format=form, layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mjpeg")])
@pytest.mark.parametrize(("count", "wanted"), [(40, 16), (33, 4), (16, 16), (5, 8), (1, 3), (7, 1)])
def test_frames_are_spread_evenly(name: str, codec: str, count: int, wanted: int, tmp_path: Path) -> None:
    path = write_numbered(tmp_path / name, count, codec=codec)
    frames = video_data.read_frames(path, wanted, 32)
    assert frames.shape == (wanted, 32, 96, 3)
    assert frames.dtype == np.uint8
    assert numbers(frames) == [int((i + 0.5) * count / wanted) for i in range(wanted)]
    np.testing.assert_array_equal(frames, video_data.read_frames(path, wanted, 32))


def test_random_frames_come_from_their_stretches(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "a.mp4", 40)
    drawn = [numbers(video_data.read_frames(path, 8, 32, random.Random(seed))) for seed in range(6)]
    assert all(5 * i <= number < 5 * i + 5 for picks in drawn for i, number in enumerate(picks))
    assert len({tuple(picks) for picks in drawn}) == 6
    assert drawn[2] == numbers(video_data.read_frames(path, 8, 32, random.Random(2)))


def test_header_without_a_number_of_frames(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "a.mkv", 20)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    assert numbers(video_data.read_frames(path, 5, 32)) == [2, 6, 10, 14, 18]


def test_header_that_promises_more_frames_than_there_are(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "a.avi", 40, codec="mjpeg")
    path.write_bytes(half(path.read_bytes()))
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 40
        count = sum(1 for _ in container.decode(video=0))
    assert 10 < count < 30
    assert numbers(video_data.read_frames(path, 4, 32)) == [int((i + 0.5) * count / 4) for i in range(4)]


@pytest.mark.parametrize(
    ("height", "width", "short_side", "expected"),
    [(32, 96, 16, (16, 48)), (96, 48, 64, (128, 64)), (50, 60, 37, (37, 44)), (16, 384, 24, (24, 576))],
)
def test_short_side_is_scaled(
    height: int, width: int, short_side: int, expected: tuple[int, int], tmp_path: Path
) -> None:
    path = write_numbered(tmp_path / "a.mp4", 4, height, width)
    assert video_data.read_frames(path, 2, short_side).shape == (2, *expected, 3)


def test_pictures_are_turned_as_the_phone_was_held(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "a.mp4", 4)
    upright = video_data.read_frames(path, 4, 32)
    raw, one = path.read_bytes(), 1 << 16
    identity = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    track = raw.index(identity, raw.index(identity) + 1)  # the first one is the whole film's
    path.write_bytes(raw[:track] + clockwise + raw[track + len(identity) :])
    np.testing.assert_array_equal(video_data.read_frames(path, 4, 32), np.rot90(upright, -1, axes=(1, 2)))


def bad_video(name: str, folder: Path) -> Path:
    """Write a file that gives no frames."""
    kind, path = Path(name).stem, folder / name
    if kind == "sound":
        return write_sound(path, "aac" if path.suffix == ".mp4" else "pcm_s16le")
    if kind == "cut":  # an MP4 has its index at the end
        path.write_bytes(half(write_numbered(path, 30).read_bytes()))
    elif kind == "blank":  # the index is whole and the pictures are gone
        raw = write_numbered(path, 8).read_bytes()
        start = raw.index(b"mdat") + 4
        end = raw.index(b"moov") - 4
        path.write_bytes(raw[:start] + b"\xff" * (end - start) + raw[end:])
    else:
        noise = np.random.default_rng(0).bytes(5000)
        path.write_bytes({"empty": b"", "words": b"no video\nat all\n" * 50, "noise": noise}[kind])
    return path


BAD_VIDEOS = {
    "empty.mp4": "not a readable video",
    "noise.mp4": "not a readable video",
    "words.mp4": "holds no video stream|not a readable video",
    "words.txt": "holds no video stream|not a readable video",
    "sound.mp4": "holds no video stream",
    "sound.wav": "holds no video stream",
    "cut.mp4": "not a readable video",
    "blank.mp4": "not a readable video|holds no video frame",
}


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_unreadable_file_is_named(name: str, tmp_path: Path) -> None:
    path = bad_video(name, tmp_path)
    with pytest.raises(video_data.VideoError, match=f"^{re.escape(str(path))}: ({BAD_VIDEOS[name]})"):
        video_data.read_frames(path, 4, 32)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(video_data.VideoError, match=r"gone\.mp4: no such file\."):
        video_data.read_frames(tmp_path / "gone.mp4", 4, 32)
    with pytest.raises(DynskipError, match=re.escape(f"{tmp_path}: holds no pictures")):
        video_data.read_frames(tmp_path, 4, 32)


@pytest.mark.parametrize("more", [[], ["--in-memory"], ["--workers", "2"]])
def test_unreadable_videos_are_left_out_and_listed(
    more: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [(item.path, item.labels[0], item.split) for item in video_data.read_csv(data)]
    names = ["words.txt", "sound.wav", "cut.mp4"]
    bad = [
        (bad_video(name, tmp_path).name, "high_kick", s)
        for name, s in zip(names, ("train", "train", "test"), strict=True)
    ]
    folder = write_labels(tmp_path, [*bad, *good])
    assert train(folder, tmp_path / "run", *more) == 0
    text = capsys.readouterr().out
    training, evaluation = text.split("Wrote ")
    assert "\n2 unreadable videos were left out:\n" in training  # counted once, not once an epoch
    assert "\n1 unreadable videos were left out:\n" in evaluation
    for name, where in zip(names, (training, training, evaluation), strict=True):
        assert f"\n  {folder / name}: " in where
        assert text.count(name) == where.count(name)
    assert "6 videos." in evaluation
    assert evaluate(folder, "--checkpoint", str(tmp_path / "run" / "last.pt"), "--split", "train") == 0
    text = capsys.readouterr().out
    assert "2 unreadable videos were left out" in text
    assert "12 videos." in text


def test_nothing_but_unreadable_videos(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [bad_video(name, tmp_path).name for name in ("noise.mp4", "words.mp4")]
    (tmp_path / "again.mp4").write_bytes((tmp_path / names[0]).read_bytes())
    rows = [(names[0], "high_kick", "train"), ("again.mp4", "jump", "train"), (names[1], "high_kick", "test")]
    folder = write_labels(tmp_path, rows)
    assert train(folder, tmp_path / "run") == 2
    assert re.search(r"None of the training videos could be read.*noise\.mp4", capsys.readouterr().err)
    assert evaluate(folder, "--checkpoint", str(trained / "last.pt")) == 2
    captured = capsys.readouterr()
    assert "nothing to evaluate" in captured.err
    assert "words.mp4" in captured.out


def test_prediction_goes_on_after_an_unreadable_file(
    video: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = bad_video("words.txt", tmp_path)
    out = tmp_path / "pictures"
    assert predict([bad, video, tmp_path / "gone.mp4"], out, "--checkpoint", str(trained / "last.pt")) == 1
    captured = capsys.readouterr()
    assert "test_0000.mp4: " in captured.out
    assert f"error: {bad}: " in captured.err
    assert "gone.mp4: no such file." in captured.err
    assert "2 of 3 files could not be read." in captured.err
    assert [path.name for path in out.iterdir()] == ["test_0000.png"]
