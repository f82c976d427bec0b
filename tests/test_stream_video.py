from __future__ import annotations

import io
import os
import re
import signal
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from helpers import recipe, save_tiny_sofnet

av = pytest.importorskip("av")
for needed in ("huggingface_hub", "matplotlib", "PIL", "safetensors", "tqdm"):
    pytest.importorskip(needed)

from dynskip import UNSEEN, StopOrForward  # noqa: E402
from dynskip.video import Preprocessing, open_source, sample_frames, stick_figures  # noqa: E402

stream_video = recipe("stream_video")
PREP = Preprocessing(size=32, num_frames=4)
LENGTH = 24  # frames of the video, two seconds


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sofnet(tmp_path_factory.mktemp("saved") / "model", PREP, threshold=1.0)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("video") / "kick.mp4"
    frames, _, _ = stick_figures.draw_video("high_kick", np.random.default_rng(0), 48, LENGTH)
    stick_figures.write_video(file, frames)
    return file


def run(model: Path, source: Path | str, out: Path, *more: str) -> int:
    code: int = stream_video.main([str(model), str(source), str(out), "--device", "cpu", *more])
    return code


def read(path: Path) -> tuple[list[np.ndarray], list[float]]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return [frame.to_ndarray(format="rgb24") for frame in frames], [frame.time for frame in frames]


def count(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    """Pixels of a colour above the legend, where only depths are drawn in it."""
    rows = picture[: -int(0.05 * min(picture.shape[:2]))]
    return int((np.abs(rows.astype(int) - colour).max(-1) < 40).sum())


def test_every_frame_is_written_with_its_time_and_what_the_model_says(
    model: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, video, tmp_path / "out.mp4") == 0
    pictures, times = read(tmp_path / "out.mp4")
    assert len(pictures) == LENGTH
    assert times == pytest.approx([i / stick_figures.FPS for i in range(LENGTH)], abs=2e-3)
    assert pictures[0].shape == (360, 360, 3)  # scaled up, so that the text can be read
    printed = capsys.readouterr().out
    # Two seconds at four frames a second: two predictions of four frames.
    predictions = [line for line in printed.splitlines() if "so far" in line]
    assert len(predictions) == 2
    assert all(line.split()[3] in stick_figures.CLASSES for line in predictions)
    assert "8 frames looked at" in printed


def test_decisions_and_costs_are_those_of_the_model(model: Path, video: Path) -> None:
    loaded = StopOrForward.from_pretrained(model)
    frames = sample_frames(open_source(video), PREP.num_frames, PREP.short_side)
    for bias in (3.0, -2.0, -30.0):  # all used, some stopped, all stopped at the first gate
        for gate in loaded.gates:
            gate.decide.bias.data[1] = bias
        wanted = loaded(PREP.normalize(PREP.crop(frames))[None])
        watcher = stream_video.Watcher(loaded, "cpu")
        lines = [watcher.look(frame) for frame in frames]
        assert lines[:-1] == [None] * 3
        label = stick_figures.CLASSES[int(wanted.logits.argmax())]
        assert f"{label} {100 * float(wanted.probabilities.max()):.1f} %" in str(lines[-1])
        assert list(watcher.recent) == wanted.stopped_at[0].tolist()
        assert watcher.macs == pytest.approx(float(wanted.macs[0]))
        assert watcher.used == int(wanted.used.sum())
        # The session has started anew: the same frames get the same answer.
        for frame in frames:
            watcher.look(frame)
        assert list(watcher.recent)[4:] == wanted.stopped_at[0].tolist()
        assert watcher.macs == pytest.approx(2 * float(wanted.macs[0]))


def test_what_is_drawn_follows_the_decisions(model: Path) -> None:
    loaded = StopOrForward.from_pretrained(model)
    watcher = stream_video.Watcher(loaded, "cpu")
    grey = np.full((360, 640, 3), 90, np.uint8)
    stages = loaded.backbone.num_stages
    drawn = {}
    for name, decisions in {"none": [], "used": [stages], "stopped": [0], "later": [2], "unseen": [UNSEEN]}.items():
        watcher.recent = deque(decisions)
        watcher.ends = deque([False] * len(decisions))
        drawn[name] = stream_video.draw(grey, watcher)
    assert (drawn["none"][:250] == 90).all()  # the picture itself stays free
    assert (grey == 90).all()
    green, orange = stream_video.USED, stream_video.STOPPED
    assert count(drawn["used"], green) > 0 == count(drawn["used"], orange)
    assert 0 < count(drawn["stopped"], orange) < count(drawn["later"], orange)
    assert count(drawn["later"], green) == 0
    assert np.array_equal(drawn["unseen"], drawn["none"])


@pytest.mark.filterwarnings("ignore:.* lacks the letters")
@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_labels_that_a_terminal_or_a_font_cannot_show(
    encoding: str, model: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = StopOrForward.from_pretrained(model)
    loaded.class_names = tuple(f"\U0001f3c3\u8dd1 {name}" for name in loaded.class_names or ())
    loaded.save_pretrained(tmp_path / "model")
    with io.TextIOWrapper(io.BytesIO(), encoding) as log:
        monkeypatch.setattr("sys.stdout", log)
        assert run(tmp_path / "model", video, tmp_path / "out.mp4") == 0
        log.flush()
        said = log.buffer.getvalue().decode(encoding)
    assert len(read(tmp_path / "out.mp4")[0]) == LENGTH
    assert "\\U0001f3c3\\u8dd1 " in said
    watcher = stream_video.Watcher(StopOrForward.from_pretrained(tmp_path / "model"), "cpu")
    assert all(name.startswith("class ") for name in watcher.classes)  # the number can be read in any case


def test_an_endless_source_is_closed_properly_when_it_is_stopped(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, handler = tmp_path / "out.mp4", signal.getsignal(signal.SIGINT)

    def interrupt_once_written() -> None:
        limit = time.monotonic() + 60
        while not out.exists() and time.monotonic() < limit:
            time.sleep(0.05)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt_once_written)
    thread.start()
    source = "testsrc=rate=10:size=64x48"  # FFmpeg draws it, and never stops
    assert run(model, source, out, "--format", "lavfi") == 0
    thread.join()
    assert signal.getsignal(signal.SIGINT) is handler
    pictures, times = read(out)
    assert len(pictures) > 0
    assert pictures[0].shape == (360, 480, 3)
    assert times == sorted(times)
    assert "Wrote" in capsys.readouterr().out


def test_damaged_packets_are_skipped_and_counted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged.avi"
    with av.open(str(damaged), "w") as container:
        stream = container.add_stream("mjpeg", rate=12)
        stream.width, stream.height, stream.pix_fmt = 48, 48, "yuvj420p"
        for i in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((48, 48, 3), 20 * i, np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                if i in (3, 4):
                    broken = av.Packet(b"\x00" * 40)
                    broken.stream, broken.pts, broken.dts = packet.stream, packet.pts, packet.dts
                    broken.time_base = packet.time_base
                    packet = broken
                container.mux(packet)
    assert run(model, damaged, tmp_path / "out.mp4") == 1
    assert "2 damaged packets were skipped" in capsys.readouterr().err
    assert len(read(tmp_path / "out.mp4")[0]) == 10


def test_a_video_that_breaks_off_gives_what_there_is(model: Path, video: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.mkv"
    with av.open(str(video)) as source, av.open(str(whole), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    run(model, cut, tmp_path / "out.mp4")
    assert 0 < len(read(tmp_path / "out.mp4")[0]) < LENGTH


def write_frameless(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
        container.start_encoding()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "gone.mp4", "out.mp4"], "gone.mp4: no such file"),
        (["MODEL", "empty.mp4", "out.mp4"], r"empty.mp4: is empty \(0 bytes\)"),
        (["MODEL", "words.mp4", "out.mp4"], "holds no video stream|is text, no video"),
        (["MODEL", "frameless.mkv", "out.mp4"], "holds no video frame|not a readable video"),
        (["MODEL", "9999", "out.mp4"], "9999: (no such file|not a readable video)"),
        (["MODEL", "VIDEO", "VIDEO"], "is the source itself"),
        (["MODEL", "VIDEO", "words.mp4/out.mp4"], "a file is where a folder is needed"),
        (["MODEL", "VIDEO", "out.txt.unknown"], "cannot be written"),
        (["MODEL", "VIDEO", "out.mp4", "--rate", "0"], "--rate 0.0 is out of range; give a number above 0"),
        (["MODEL", "VIDEO", "out.mp4", "--rate", "nan"], "--rate nan is out of range; give a number above 0"),
        (["no_model", "VIDEO", "out.mp4"], "no_model has no config.json"),
    ],
)
def test_what_cannot_be_done_is_said_and_writes_nothing(
    arguments: list[str], message: str, model: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("no_model").mkdir()
    Path("empty.mp4").touch()
    Path("words.mp4").write_bytes(b"neither a video nor anything else" * 99)
    write_frameless(Path("frameless.mkv"))
    Path("out.mp4").write_bytes(b"what an earlier run wrote")
    before = video.read_bytes()
    places = {"MODEL": str(model), "VIDEO": str(video)}
    assert stream_video.main([*(places.get(argument, argument) for argument in arguments), "--device", "cpu"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert video.read_bytes() == before
    assert Path("out.mp4").read_bytes() == b"what an earlier run wrote"


def test_a_turned_camera_and_missing_times_do_not_stop_the_output(tmp_path: Path) -> None:
    output = stream_video.Output(tmp_path / "out.mp4")
    for side, milliseconds in ((65, 0), (65, 100), (65, 100), (99, 50), (65, 400)):
        output.write(np.full((side, 65, 3), side, np.uint8), milliseconds)
    output.close()
    pictures, times = read(tmp_path / "out.mp4")
    assert [picture.shape for picture in pictures] == [(64, 64, 3)] * 5
    assert times == pytest.approx([0, 0.1, 0.101, 0.102, 0.4], abs=1e-4)


@pytest.mark.parametrize(
    ("stamps", "wanted"),
    [
        ([5.0, 5.5, 7.0], [0, 0.5, 2]),  # a camera that counts from anywhere
        ([None, None, None], [0, 1 / 30, 2 / 30]),
        ([1e9, 1e9 + 1, 0.0, 0.5], [0, 1, 1 + 1 / 30, 1.5 + 1 / 30]),  # it starts over
        ([0.0, 0.0, 1.0], [0, 1 / 30, 1 + 1 / 30]),
    ],
)
def test_times_rise_from_zero(stamps: list[float | None], wanted: list[float]) -> None:
    clock = stream_video.Clock()
    assert [clock.at(stamp) for stamp in stamps] == pytest.approx(wanted)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        stream_video.main(["--help"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("runs/mine/model clip.mp4", "camera 0", "rtsp://", "similarity_gates.py"))
