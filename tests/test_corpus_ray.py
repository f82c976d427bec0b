from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("ray.data")
for needed in ("matplotlib", "pyarrow", "safetensors", "tqdm"):
    pytest.importorskip(needed)
# Ray starts with the path of this process, so that its workers find the examples; nothing is reported to anybody.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import corpus_ray  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import ray  # noqa: E402
import sofnet_activitynet as sofnet_example  # noqa: E402
import stick_figures  # noqa: E402
from training import save_checkpoint  # noqa: E402
from video_data import Preprocessing, read_frames  # noqa: E402

PREP = Preprocessing(size=32, num_frames=4)
CONFIG = sofnet_example.Config("test_byobnet", stick_figures.CLASSES, hidden=8, prep=PREP)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("model") / "last.pt"
    save_checkpoint(file, config=CONFIG.to_json(), model=CONFIG.build().state_dict(), epoch=0)
    return file


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Six good videos and one that is none."""
    root = stick_figures.render_set(tmp_path / "set", train_per_class=1, test_per_class=1, size=32, num_frames=24)
    videos = root / "videos"
    for file in videos.rglob("train*.mp4"):
        file.unlink()
    (videos / "text.MP4").write_text("no video at all\n" * 99)
    (videos / "notes.txt").write_text("not a video's name, so not in the corpus")
    return videos


def run(corpus: Path, out: Path, checkpoint: Path, *more: str) -> int:
    size = ["--actors", "2", "--actor-cpus", "0.5", "--batch", "3", "--streams", "2"]
    return corpus_ray.main([str(corpus), "--out", str(out), "--checkpoint", str(checkpoint), *size, *more])


def write_results(out: Path, name: str, rows: Sequence[dict[str, object]]) -> Path:
    """Write what an earlier run leaves."""
    (out / "videos").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=corpus_ray.COLUMNS), out / "videos" / name)
    return out / "videos" / name


def failures(out: Path) -> list[str]:
    with (out / "failed.csv").open(newline="") as file:
        return [Path(row["path"]).name for row in csv.DictReader(file)]


def test_two_actors_do_what_an_earlier_run_left(
    corpus: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    *good, text = corpus_ray.find_videos(corpus)
    # Of an earlier run: an answer, a failure of a video that was then repaired, and a file that a kill cut off.
    write_results(out, "a.parquet", [{"path": good[0], "label": "earlier"}, {"path": good[1], "error": "damaged"}])
    cut_off = write_results(out, "b.parquet", [{"path": good[2], "label": "lost"}])
    cut_off.write_bytes(cut_off.read_bytes()[:-20])

    assert run(corpus, out, checkpoint) == 1  # one failed
    assert not ray.is_initialized()
    assert "7 videos, 1 of them done." in capsys.readouterr().out
    assert failures(out) == ["text.MP4"]
    assert not cut_off.exists()
    files = sorted((out / "videos").glob("*.parquet"))
    assert len(files) == 3  # results come in pieces, one for each batch of three
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    new = {row["path"]: row for row in rows if row["label"] != "earlier" and row["error"] != "damaged"}
    assert sorted(new) == sorted([*good[1:], text])
    assert "not a readable video" in new[text]["error"] or "holds no video" in new[text]["error"]

    # What the actors answered is what the model says of each video alone.
    model, _ = sofnet_example.restore(checkpoint)
    for path in good[1:]:
        frames = read_frames(Path(path), PREP.num_frames, PREP.short_side)
        wanted = model.eval()(PREP.normalize(PREP.crop(frames))[None])
        probability, label = wanted.probabilities[0].max(-1)
        assert new[path]["label"] == CONFIG.classes[int(label)]
        assert new[path]["probability"] == pytest.approx(float(probability), abs=1e-5)
        assert new[path]["gmacs"] == pytest.approx(float(wanted.macs[0]) / 1e9)
        assert (new[path]["used"], new[path]["seen"]) == (int(wanted.used.sum()), int(wanted.seen.sum()))
        assert new[path]["error"] is None

    # Where nothing is left to do, Ray is not even started.
    Path(text).unlink()
    written = {file: file.stat().st_mtime_ns for file in files}
    assert run(corpus, out, checkpoint) == 0
    assert "6 videos, 6 of them done." in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in (out / "videos").glob("*.parquet")} == written
    assert failures(out) == []


def test_another_model_does_not_go_on_in_the_same_folder(
    corpus: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    write_results(out, "a.parquet", [{"path": path, "label": "x"} for path in corpus_ray.find_videos(corpus)])
    assert run(corpus, out, checkpoint) == 0
    torch.manual_seed(1)
    other = tmp_path / "other.pt"
    save_checkpoint(other, config=CONFIG.to_json(), model=CONFIG.build().state_dict(), epoch=0)
    assert run(corpus, out, other) == 2
    assert "another model or other options: sha256 differ" in capsys.readouterr().err
    assert run(corpus, out, checkpoint, "--threshold", "0.5") == 2
    assert "other options: threshold differ" in capsys.readouterr().err
    assert run(corpus, out, checkpoint) == 0
    assert json.loads((out / "settings.json").read_text())["threshold"] is None


def test_a_list_of_paths(corpus: Path, tmp_path: Path) -> None:
    listed = corpus / "list.txt"
    listed.write_text("high_kick/test_0000.mp4\n\n  squat_kick/test_0000.mp4\nhigh_kick/test_0000.mp4\nmissing.mp4\n")
    wanted = ["high_kick/test_0000.mp4", "missing.mp4", "squat_kick/test_0000.mp4"]
    assert corpus_ray.find_videos(listed) == [str(corpus / name) for name in wanted]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "does not exist. Give a folder of videos, or a text file"),
        ("empty", "has no videos. They end in .mp4"),
        ("binary.txt", "is no text"),
    ],
)
def test_bad_corpora(
    name: str, message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert run(tmp_path / name, tmp_path / "out", checkpoint) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_the_model_is_said_before_ray_starts(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(corpus, tmp_path / "out", tmp_path / "none.pt") == 2
    assert "none.pt does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not ray.is_initialized()
