from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import recipe, save_tiny_sofnet

pytest.importorskip("av")
pytest.importorskip("ray.data")
for needed in ("huggingface_hub", "PIL", "pyarrow", "safetensors", "tqdm"):
    pytest.importorskip(needed)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is reported to anybody

import av  # noqa: E402
import numpy as np  # noqa: E402
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


def row(path: str, **told: str) -> dict[str, object]:
    return {"path": path, "path_bytes": os.fsencode(path), "stamp": corpus_ray.stamp(path), **told}


def failures(out: Path) -> list[str]:
    with (out / "failed.csv").open(newline="") as file:
        return [Path(row["path"]).name for row in csv.DictReader(file)]


def test_two_actors_do_what_an_earlier_run_left(
    model: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    # A name that is no UTF-8 is a name like others.
    odd = os.fsdecode(os.fsencode(corpus) + b"/z-caf\xe9.mp4")
    os.rename(corpus / "high_kick" / "test_0000.mp4", odd)
    *good, text, odd = corpus_ray.find_videos(corpus)
    # Of an earlier run: an answer, a failure of a video that was then repaired, an answer for a video that was then
    # replaced, one for a video of another corpus, and a file that a kill cut off.
    earlier = [row(good[0], label="earlier"), row(good[1], error="damaged"), row(good[3], label="replaced")]
    write_results(out, "a.parquet", [*earlier, row("/elsewhere.mp4", label="earlier")])
    shutil.copy2(good[1], good[3])
    cut_off = write_results(out, "b.parquet", [row(good[2], label="lost")])
    cut_off.write_bytes(cut_off.read_bytes()[:-20])

    assert run(model, corpus, out) == 1  # one failed
    assert not ray.is_initialized()
    printed = capsys.readouterr().out
    assert "1 other files were left out (.txt 1)." in printed
    assert "7 videos, 1 of them done." in printed
    assert failures(out) == ["text.MP4"]
    assert not cut_off.exists()
    files = sorted((out / "videos").glob("*.parquet"))
    assert len(files) == 3  # results come in pieces, one for each batch of three
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert len(rows) == 8, "one of each video, and one of another corpus"
    assert {row["path"] for row in rows if row["label"] == "earlier"} == {good[0], "/elsewhere.mp4"}
    new = {os.fsdecode(row["path_bytes"]): row for row in rows if row["label"] != "earlier"}
    assert sorted(new) == sorted([*good[1:], text, odd])
    assert new[odd]["path"] == str(corpus / r"z-caf\xe9.mp4")
    assert "is text, no video" in new[text]["error"] or "holds no video" in new[text]["error"]

    # What the actors answered is what the model says of each video alone.
    loaded = StopOrForward.from_pretrained(model)
    for path in [*good[1:], odd]:
        frames = sample_frames(open_source(Path(path)), PREP.num_frames, PREP.short_side)
        wanted = loaded(PREP.normalize(PREP.crop(frames))[None])
        probability, label = wanted.probabilities[0].max(-1)
        assert new[path]["label"] == stick_figures.CLASSES[int(label)]
        assert new[path]["probability"] == pytest.approx(float(probability), abs=1e-5)
        assert new[path]["gmacs"] == pytest.approx(float(wanted.macs[0]) / 1e9)
        assert (new[path]["used"], new[path]["seen"]) == (int(wanted.used.sum()), int(wanted.seen.sum()))
        assert new[path]["error"] is None
        assert new[path]["notes"] is None
        assert new[path]["decoded"] >= new[path]["seen"]
        assert new[path]["decode_ms"] > 0
        assert new[path]["network_ms"] > 0

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
    write_results(out, "a.parquet", [row(path, label="x") for path in corpus_ray.find_videos(corpus)])
    assert run(model, corpus, out) == 0
    settings = (out / "model.json").read_text()
    other = save_tiny_sofnet(tmp_path / "other", PREP, seed=1)
    assert run(other, corpus, out) == 2
    assert "holds the answers of another model. Choose another --out" in capsys.readouterr().err
    assert run(shutil.copytree(model, tmp_path / "copy"), corpus, out) == 0  # the same model elsewhere
    assert (out / "model.json").read_text() == settings


def test_a_list_of_paths(corpus: Path, tmp_path: Path) -> None:
    """Names are read as they are: lines end at line breaks alone, and the other Unicode form means the same file."""
    odd = ["a\u2028b.mp4", "a\x85b.mp4", " spaces .mp4", "Gr\u00fcn.mp4"]
    for name in odd:
        shutil.copy2(corpus / "high_kick" / "test_0000.mp4", corpus / name)
    latin1 = os.fsdecode(b"caf\xe9.mp4")
    listed = corpus / "list.txt"
    names = ["high_kick/test_0000.mp4", "", "  squat_kick/test_0000.mp4", "high_kick/test_0000.mp4", "missing.mp4"]
    lines = [*names, *odd[:3], "Gru\u0308n.mp4", latin1]
    listed.write_bytes(b"\xef\xbb\xbf" + os.fsencode("\r\n".join(lines)))
    wanted = ["high_kick/test_0000.mp4", "missing.mp4", "squat_kick/test_0000.mp4", *odd, latin1]
    assert corpus_ray.find_videos(listed) == sorted(str(corpus / name) for name in wanted)


def test_a_folder_is_searched_with_its_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All suffixes that the decoder can read are taken, each real folder once, and what is left out is counted."""
    root, other = tmp_path / "corpus", tmp_path / "other"
    root.mkdir()
    other.mkdir()
    videos = ["00001.MTS", "00002.m2ts", "a.mp4", "c.vob", "e.gif", "f.f4v", "g.y4m", "rec.ts"]
    for name in (*videos, "a.srt", "b.SRT", "notes"):
        (root / name).touch()
    (other / "more.mkv").touch()
    (root / "more").symlink_to(other)
    (other / "circle").symlink_to(root)
    assert corpus_ray.find_videos(root) == [
        str(root / name) for name in (*videos[:6], "g.y4m", "more/more.mkv", "rec.ts")
    ]
    assert "3 other files were left out (.srt 2, no suffix 1)." in capsys.readouterr().out


def test_what_a_model_does_not_look_at_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor's batch: a long file that can be sought, the same frames as a bare stream that cannot, and no video."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (240, 32, 32, 3), np.uint8)
    stick_figures.write_video(tmp_path / "long.mp4", frames)
    with av.open(str(tmp_path / "long.mp4")) as source, av.open(str(tmp_path / "bare.h264"), "w") as bare:
        stream = bare.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                bare.mux(packet)
    saved = save_tiny_sofnet(tmp_path / "model", PREP, threshold=0.01, min_frames=1)
    monkeypatch.setattr(ray, "get_gpu_ids", list)
    classify = corpus_ray.Classify(argparse.Namespace(model=str(saved), streams=2))
    os.mkfifo(tmp_path / "pipe.ts")  # of which nobody would ever hear again
    paths = [str(tmp_path / name) for name in ("long.mp4", "bare.h264", "none.mp4", "pipe.ts")]
    batch = {key: np.array([row(path)[key] for path in paths]) for key in ("path", "path_bytes", "stamp")}
    long, bare_row, none, pipe = classify(batch).to_pylist()
    wanted = StopOrForward.from_pretrained(saved)(
        PREP.normalize(PREP.crop(sample_frames(open_source(tmp_path / "long.mp4"), PREP.num_frames, PREP.short_side)))[
            None
        ]
    )
    assert long["seen"] < PREP.num_frames
    assert long["seen"] == int(wanted.seen.sum())
    assert long["probability"] == pytest.approx(float(wanted.probabilities.max()), abs=1e-5)
    assert long["decoded"] < 240 * (long["seen"] + 1) / PREP.num_frames
    assert long["notes"] is None
    assert bare_row["decoded"] == 240
    assert bare_row["notes"].startswith("decoded as a whole: ")
    assert "none.mp4: no such file" in none["error"]
    assert none["network_ms"] is None
    assert "pipe.ts" in pipe["error"]


def test_results_that_cannot_be_written_are_told_before_ray_starts(
    model: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, corpus, corpus / "notes.txt" / "out") == 2
    assert "Could not write" in capsys.readouterr().err
    assert not ray.is_initialized()


def test_a_second_run_in_the_same_folder_is_refused(
    model: Path, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hold = "import sys; from pathlib import Path; from dynskip.video.lock import hold_folder\n"
    hold += "with hold_folder(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert run(model, corpus, tmp_path / "out") == 2
        other.communicate("")
    assert f"process {other.pid} on" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "does not exist. Give a folder of videos, or a text file"),
        ("empty", "has no videos. Give a folder of videos, or"),
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
