from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import recipe, save_tiny_sofnet

pytest.importorskip("av")
pytest.importorskip("ray.data")
for needed in ("huggingface_hub", "PIL", "pyarrow", "safetensors", "tqdm"):
    pytest.importorskip(needed)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is reported to anybody

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import ray  # noqa: E402

from dynskip import StopOrForward  # noqa: E402
from dynskip.video import Preprocessing, open_source, sample_frames, stick_figures  # noqa: E402

corpus_ray = recipe("corpus_ray")  # Ray's workers cannot import it: they are sent what they need
PREP = Preprocessing(size=32, num_frames=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sofnet(tmp_path_factory.mktemp("saved") / "model", PREP)


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


def run(model: Path, corpus: Path, out: Path) -> int:
    size = ["--actors", "2", "--actor-cpus", "0.5", "--batch", "3", "--streams", "2"]
    code: int = corpus_ray.main([str(model), str(corpus), "--out", str(out), *size])
    return code


def write_results(out: Path, name: str, rows: Sequence[dict[str, object]]) -> Path:
    """Write what an earlier run leaves."""
    (out / "videos").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=corpus_ray.COLUMNS), out / "videos" / name)
    return out / "videos" / name


def failures(out: Path) -> list[str]:
    with (out / "failed.csv").open(newline="") as file:
        return [Path(row["path"]).name for row in csv.DictReader(file)]


def test_two_actors_do_what_an_earlier_run_left(
    model: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    *good, text = corpus_ray.find_videos(corpus)
    # Of an earlier run: an answer, a failure of a video that was then repaired, and a file that a kill cut off.
    write_results(out, "a.parquet", [{"path": good[0], "label": "earlier"}, {"path": good[1], "error": "damaged"}])
    cut_off = write_results(out, "b.parquet", [{"path": good[2], "label": "lost"}])
    cut_off.write_bytes(cut_off.read_bytes()[:-20])

    assert run(model, corpus, out) == 1  # one failed
    assert not ray.is_initialized()
    assert "7 videos, 1 of them done." in capsys.readouterr().out
    assert failures(out) == ["text.MP4"]
    assert not cut_off.exists()
    files = sorted((out / "videos").glob("*.parquet"))
    assert len(files) == 3  # results come in pieces, one for each batch of three
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    new = {row["path"]: row for row in rows if row["label"] != "earlier" and row["error"] != "damaged"}
    assert sorted(new) == sorted([*good[1:], text])
    assert "is text, no video" in new[text]["error"] or "holds no video" in new[text]["error"]

    # What the actors answered is what the model says of each video alone.
    loaded = StopOrForward.from_pretrained(model)
    for path in good[1:]:
        frames = sample_frames(open_source(Path(path)), PREP.num_frames, PREP.short_side)
        wanted = loaded(PREP.normalize(PREP.crop(frames))[None])
        probability, label = wanted.probabilities[0].max(-1)
        assert new[path]["label"] == stick_figures.CLASSES[int(label)]
        assert new[path]["probability"] == pytest.approx(float(probability), abs=1e-5)
        assert new[path]["gmacs"] == pytest.approx(float(wanted.macs[0]) / 1e9)
        assert (new[path]["used"], new[path]["seen"]) == (int(wanted.used.sum()), int(wanted.seen.sum()))
        assert new[path]["error"] is None

    # Where nothing is left to do, Ray is not even started.
    Path(text).unlink()
    written = {file: file.stat().st_mtime_ns for file in files}
    assert run(model, corpus, out) == 0
    assert "6 videos, 6 of them done." in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in (out / "videos").glob("*.parquet")} == written
    assert failures(out) == []


def test_another_model_does_not_go_on_in_the_same_folder(
    model: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    write_results(out, "a.parquet", [{"path": path, "label": "x"} for path in corpus_ray.find_videos(corpus)])
    assert run(model, corpus, out) == 0
    settings = (out / "model.json").read_text()
    other = save_tiny_sofnet(tmp_path / "other", PREP, seed=1)
    assert run(other, corpus, out) == 2
    assert "holds the answers of another model. Choose another --out" in capsys.readouterr().err
    assert run(shutil.copytree(model, tmp_path / "copy"), corpus, out) == 0  # the same model elsewhere
    assert (out / "model.json").read_text() == settings


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
def test_bad_corpora(name: str, message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert run(model, tmp_path / name, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_the_model_is_said_before_ray_starts(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(corpus, corpus, tmp_path / "out") == 2
    assert f"{corpus} has no config.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not ray.is_initialized()
