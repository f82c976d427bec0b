from __future__ import annotations

import datetime
import http.server
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import recipe, save_tiny_sofnet

av = pytest.importorskip("av")
for needed in ("huggingface_hub", "matplotlib", "PIL", "safetensors", "tqdm"):
    pytest.importorskip(needed)

from loopback import Play, camera, closed_port, transport_stream  # noqa: E402

from dynskip import UNSEEN, StopOrForward  # noqa: E402
from dynskip.video import LiveSource, Preprocessing, live, open_source, sample_frames, stick_figures  # noqa: E402

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


def interrupt_after(written: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C once so many pictures are written."""
    write, count = stream_video.Output.write, itertools.count(1)

    def counted(*arguments: Any) -> None:
        write(*arguments)
        if next(count) == written:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(stream_video.Output, "write", counted)


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
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, handler = tmp_path / "out.mp4", signal.getsignal(signal.SIGINT)
    interrupt_after(5, monkeypatch)
    source = "testsrc=rate=10:size=64x48,realtime"  # FFmpeg draws it, and never stops
    assert run(model, source, out, "--format", "lavfi") == 0
    assert signal.getsignal(signal.SIGINT) is handler
    pictures, times = read(out)
    assert len(pictures) == 5
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


def test_a_video_that_breaks_off_gives_what_there_is_and_says_how_much(
    model: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole.mkv"
    with av.open(str(video)) as source, av.open(str(whole), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert run(model, cut, tmp_path / "out.mp4") == 1
    frames = len(read(tmp_path / "out.mp4")[0])
    assert 0 < frames < LENGTH
    printed = capsys.readouterr()
    assert re.search(rf"cut.mkv ends early: [01].. of 2.0 s \({frames} frames\) were there", printed.err)
    assert "frames looked at" in printed.out
    assert "Wrote" in printed.out


class Cut(http.server.BaseHTTPRequestHandler):
    """Promises a whole file, and sends half of it."""

    data = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.data)))
        self.end_headers()
        self.wfile.write(self.data[: len(self.data) // 2])

    def log_message(self, *_: Any) -> None:
        pass


def test_a_file_from_the_network_that_is_cut_short_says_how_much_was_there(
    model: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole.mkv"
    assert run(model, video, whole) == 0
    monkeypatch.setattr(Cut, "data", whole.read_bytes())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Cut) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert run(model, f"http://127.0.0.1:{server.server_address[1]}/whole.mkv", tmp_path / "out.mkv") == 1
        server.shutdown()
    frames = len(read(tmp_path / "out.mkv")[0])
    assert 0 < frames < LENGTH
    assert re.search(rf"ends early: .* \({frames} frames\) were there", capsys.readouterr().err)


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
        (["MODEL", "9999", "out.mp4"], "9999: nothing is there"),
        (["MODEL", "VIDEO", "VIDEO", "--overwrite"], "is the source itself"),
        (["MODEL", "gone.mp4", "old.mp4"], "old.mp4 exists. Name another file.*--overwrite"),
        (["MODEL", "gone.mp4", "old.mp4", "--overwrite"], "gone.mp4: no such file"),
        (["MODEL", "VIDEO", "door-%Y%m%d.mp4"], "would be the same name again. Put date and hour into it"),
        (["MODEL", "VIDEO", "%H.mp4"], "would be the same name again"),
        (["MODEL", "VIDEO", "out.mp4", "--output-rate", "0"], "--output-rate 0.0 is out of range"),
        (["MODEL", "rtsp://h/x", "out.mp4", "--give-up", "-1"], "--give-up -1.0 is out of range"),
        (["MODEL", "rtsp://h/x", "out.mp4", "--lag", "0"], "lag=0.0 .* positive"),
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
    Path("old.mp4").write_bytes(b"what an earlier run wrote")
    before = video.read_bytes()
    places = {"MODEL": str(model), "VIDEO": str(video)}
    assert stream_video.main([*(places.get(argument, argument) for argument in arguments), "--device", "cpu"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert video.read_bytes() == before
    assert Path("old.mp4").read_bytes() == b"what an earlier run wrote"
    assert {file.name for file in Path().rglob("*.mp4")} == {"empty.mp4", "words.mp4", "old.mp4"}


def test_a_turned_camera_and_missing_times_do_not_stop_the_output(tmp_path: Path) -> None:
    output = stream_video.Output(tmp_path / "out.mp4")
    for side, milliseconds in ((65, 0), (65, 100), (65, 100), (99, 50), (65, 400)):
        output.write(np.full((side, 65, 3), side, np.uint8), milliseconds)
    output.close()
    pictures, times = read(tmp_path / "out.mp4")
    assert [picture.shape for picture in pictures] == [(64, 64, 3)] * 5
    assert times == pytest.approx([0, 0.1, 0.101, 0.102, 0.4], abs=1e-4)


def test_a_recording_is_overwritten_only_when_that_is_asked_for(model: Path, video: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mkv"
    assert run(model, video, out) == 0
    before = out.read_bytes()
    assert run(model, video, out) == 2
    assert out.read_bytes() == before
    assert run(model, video, out, "--overwrite") == 0
    assert len(read(out)[0]) == LENGTH


@pytest.mark.skipif(os.name == "nt", reason="files are locked in another way")
def test_an_output_that_another_run_writes_is_refused_before_the_source_is_opened(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = stream_video.Output(tmp_path / "out.mkv")
    assert run(model, "gone.mp4", tmp_path / "out.mkv") == 2
    assert run(model, "gone.mp4", tmp_path / "out.mkv", "--overwrite") == 2
    assert "out.mkv is being written by another run" in capsys.readouterr().err
    other.close()
    assert list(tmp_path.iterdir()) == []  # nothing was written, so nothing stays


def test_a_date_in_the_name_makes_a_new_file_each_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime.datetime(2026, 10, 5, 23, 30)
    clock = SimpleNamespace(now=lambda: now)
    monkeypatch.setattr(stream_video, "datetime", SimpleNamespace(datetime=clock, timedelta=datetime.timedelta))
    output = stream_video.Output(tmp_path / "door-%Y%m%d-%H%M.mkv")
    for minute in (0, 30, 60, 90, 125):
        now = datetime.datetime(2026, 10, 5, 23, 30) + datetime.timedelta(minutes=minute)
        output.write(np.zeros((64, 64, 3), np.uint8), minute * 60_000)
    output.close()
    assert [path.name for path in output.written] == [
        f"door-2026100{day}.mkv" for day in ("5-2330", "6-0030", "6-0135")
    ]
    assert [read(path)[1] for path in output.written] == [[0, 1800], [0, 1800], [0]]


def test_without_an_output_and_with_fewer_pictures_in_it(
    model: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(model, video, tmp_path / "out.mp4", "--output-rate", "2") == 0
    assert read(tmp_path / "out.mp4")[1] == pytest.approx([0, 0.5, 1.0, 1.5], abs=2e-3)
    assert stream_video.main([str(model), str(video), "--device", "cpu"]) == 0
    assert "Wrote" not in capsys.readouterr().out.partition("Wrote")[2]


# ------------------------------------------------------------------------------------------------- live sources

DATA = transport_stream(40)


class Quick(LiveSource):
    """A live source with short time-outs."""

    seconds = 1.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, timeout=self.seconds, options={"analyzeduration": "100000"}, **kwargs)


class Patient(Quick):
    """A live source that never gives up."""

    seconds = 1e4


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_video, "LiveSource", Quick)
    monkeypatch.setattr(live, "_pauses", lambda: itertools.repeat(0.05))


@pytest.mark.parametrize("end", ["close", "reset", "silent"])
def test_a_lost_camera_is_connected_again_and_at_last_given_up_with_accounts(
    end: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
    quick: None,
) -> None:  # fmt: skip
    with camera(Play(DATA, end, 1.0), Play(DATA, end, 1.0), Play(b"", "silent")) as there:
        assert run(model, there.address, tmp_path / "out.mkv", "--give-up", "1.5", "--lag", "60") == 3
    printed = capsys.readouterr()
    assert re.search(r"error: tcp://.* Given up after \d s without a frame", printed.err)
    assert "1 reconnects" in printed.out
    assert "Wrote" in printed.out
    assert "frames looked at" in printed.out
    assert ("no frame for 1 s" if end == "silent" else "the link broke after") in caplog.text
    times = read(tmp_path / "out.mkv")[1]
    assert times == sorted(times)


def test_nobody_there(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: None) -> None:
    assert run(model, f"tcp://127.0.0.1:{closed_port()}", tmp_path / "out.mkv", "--give-up", "0.2") == 3
    assert "refused: nothing listens there. Is the camera on, and is the port right?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_of_a_live_source_the_newest_frame_is_shown_however_long_drawing_takes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    draw = stream_video.draw

    def slowly(picture: np.ndarray, watcher: Any) -> np.ndarray:
        time.sleep(0.3)
        drawn: np.ndarray = draw(picture, watcher)
        return drawn

    monkeypatch.setattr(stream_video, "draw", slowly)
    monkeypatch.setattr(stream_video, "TOLD", 0.5)
    with camera(Play(transport_stream(75), "silent", seconds=3.0), Play(b"", "silent")) as there:
        assert run(model, there.address, tmp_path / "out.mkv", "--give-up", "1.5") == 3
    printed = capsys.readouterr().out
    came, dropped, age = re.findall(r"(\d+) frames came, (\d+) dropped, the last one given ([\d.]+) s old", printed)[-1]
    assert len(re.findall("frames came", printed)) > 1  # told from time to time
    assert int(dropped) > 30
    assert float(age) <= 1
    assert len(read(tmp_path / "out.mkv")[0]) == int(came) - int(dropped)


@pytest.mark.parametrize("data", [DATA, b""])
def test_ctrl_c_ends_the_wait_for_a_silent_camera_also_while_it_is_opened(
    data: bytes, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_video, "LiveSource", Patient)

    def interrupt_once_linked() -> None:
        while not there.links:
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    with camera(Play(data, "silent")) as there:
        if data:
            interrupt_after(1, monkeypatch)
        else:
            threading.Thread(target=interrupt_once_linked).start()
        assert run(model, there.address, tmp_path / "out.mkv") == 0
    assert "frames looked at" in capsys.readouterr().out
    assert (tmp_path / "out.mkv").exists() is bool(data)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("hangs", [False, True])
def test_a_signal_ends_the_process_though_its_camera_is_silent_and_a_second_one_at_once(
    hangs: bool, model: Path, tmp_path: Path
) -> None:
    file = Path(stream_video.__file__)
    code = "import sys, time, stream_video\n"
    if hangs:
        code += "stream_video.Watcher.finish = lambda self: print('finishing', flush=True) or time.sleep(3600)\n"
    code += "sys.exit(stream_video.main())"
    with camera(Play(DATA, "silent")) as there:
        arguments = [str(model), there.address, str(tmp_path / "out.mkv"), "--device", "cpu"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(file.parent), *sys.path])}
        command = [sys.executable, "-c", code, *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            while not there.links and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT if hangs else signal.SIGTERM)
            if hangs:
                assert process.stdout.readline() == "finishing\n"
                process.send_signal(signal.SIGINT)
            printed = process.communicate(timeout=100)[0]
    assert process.returncode == (-signal.SIGINT if hangs else 0)
    assert hangs or "frames looked at" in printed


@pytest.mark.parametrize(
    ("name", "form", "wanted"),
    [
        ("0", None, True),
        ("rtsp://host/live", None, True),
        ("http://host/live.mjpg", None, True),
        ("http://host/clip.MP4?key=1", None, False),
        ("file:///clip.mp4", None, False),
        ("clip.mp4", None, False),
        ("10:30.mp4", None, False),
        ("testsrc", "lavfi", True),
        (os.devnull, None, True),
        (__file__, "h264", False),
    ],
)
def test_what_does_not_wait(name: str, form: str | None, wanted: bool) -> None:
    assert live.is_live(name, form) is wanted


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        stream_video.main(["--help"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("runs/mine/model clip.mp4", "camera 0", "rtsp://", "similarity_gates.py"))
