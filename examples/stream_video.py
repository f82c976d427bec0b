"""Watch a video or a camera with a model that skips, and write down what it saw and what every frame cost.

    python examples/stream_video.py runs/mine/model clip.mp4 out.mp4
    python examples/stream_video.py runs/mine/model 0 out.mkv                  (camera 0, until Ctrl-C)
    python examples/stream_video.py runs/mine/model rtsp://HOST/live out.mkv

MODEL is a folder that `save_pretrained` or a recipe wrote; similarity_gates.py makes one without training. Frames go
one at a time through an online session (`model.stream()`), --rate of them a second. As many as the model was trained
on make one prediction; then the session starts anew, so that a camera may run for days. The output shows, below every
picture, the running prediction, the multiply-adds (MACs) executed and those of a dense model, and the frames' depths.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from dynskip import UNSEEN, DynskipError, StopOrForward, plot
from dynskip.activation import named_classes
from dynskip.video import Preprocessing, VideoError, command, open_video, outputs, to_array


class Source:
    """The frames of a file, an address or a camera.

    A damaged packet is counted and skipped: in a camera's stream it is no reason to stop watching.
    """

    def __init__(self, name: str, form: str | None = None) -> None:
        self.name, self.length, self.damaged = name, 0, 0
        self.address, self.options = name, {"format": form} if form else {}
        if name.isdecimal() and form is None:
            self.address, self.options = camera(int(name))

    def __iter__(self) -> Iterator[Any]:
        with open_video(self.address, timeout=(20.0, 20.0), **self.options) as (container, stream):
            self.length = stream.frames
            for packet in container.demux(stream):
                try:
                    yield from packet.decode()
                except av.error.InvalidDataError:
                    self.damaged += 1


def camera(number: int) -> tuple[str, dict[str, Any]]:
    """How FFmpeg calls a camera: its address and options."""
    if sys.platform == "linux":
        return f"/dev/video{number}", {"format": "v4l2"}
    if sys.platform == "darwin":
        return str(number), {"format": "avfoundation", "options": {"framerate": "30"}}
    raise DynskipError("Here a camera goes by its name, as FFmpeg lists it: give 'video=NAME' --format dshow.")


class Clock:
    """Seconds since the first frame. Cameras count from anywhere, leave times out and start over."""

    def __init__(self) -> None:
        self.now = 0.0
        self.stamp: float | None = None

    def at(self, stamp: float | None) -> float:
        """Move on to a frame by the time that it carries; one that makes no sense counts as the next of 30 a second."""
        if self.stamp is not None:
            step = stamp - self.stamp if stamp is not None else 0.0
            self.now += step if 0 < step < 3600 else 1 / 30
        self.stamp = stamp if stamp is not None else (self.stamp or 0.0)
        return self.now


class Output:
    """A video file that is opened with the first picture, so that a source without any overwrites nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.container: Any = None
        self.last = -1

    def write(self, picture: np.ndarray, milliseconds: int) -> None:
        """Append a picture `(H, W, 3)`, uint8, shown from a time on; times that do not rise are moved."""
        height, width = (side // 2 * 2 for side in picture.shape[:2])  # H.264 takes even sides
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
        self.last = max(milliseconds, self.last + 1)
        with self._explained():
            if self.container is None:
                self._open(width, height)
            if (width, height) != (self.stream.width, self.stream.height):  # a camera was turned
                frame = frame.reformat(self.stream.width, self.stream.height)
            frame.pts, frame.time_base = self.last, Fraction(1, 1000)
            self.container.mux(self.stream.encode(frame))

    def close(self) -> None:
        """Write what is left and the index, without which players refuse the file."""
        if self.container is not None:
            with self._explained(), contextlib.closing(self.container):
                self.container.mux(self.stream.encode(None))

    def _open(self, width: int, height: int) -> None:
        container = av.open(str(self.path), "w")
        self.stream = container.add_stream("libx264", rate=30, options={"preset": "veryfast"})
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"
        self.stream.codec_context.time_base = Fraction(1, 1000)
        self.container = container

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise DynskipError(f"{self.path}: cannot be written ({error}). Name an .mp4 or .mkv elsewhere.") from error


# --------------------------------------------------------------------------------------------------------- watching


class Watcher:
    """An online session that starts anew after every prediction, and its accounts."""

    def __init__(self, model: StopOrForward, device: str, font: Path | None = None) -> None:
        self.model, self.prep, self.device = model, Preprocessing.of(model), device
        names = model.class_names or [f"class {i}" for i in range(model.backbone.num_classes)]
        self.font = plot.find_font("".join(names), font)
        self.classes = self.font.names(names)
        self.session = model.stream()
        self.dense_macs = model.lookup_for((self.prep.size, self.prep.size)).dense  # a frame
        self.answer = "no answer yet"
        self.decisions: list[int] = []  # of the prediction that is being made
        self.macs = 0.0  # of all predictions so far
        self.frames = self.used = 0
        self.recent: deque[int] = deque(maxlen=SHOWN)
        self.ends: deque[bool] = deque(maxlen=SHOWN)  # whether a prediction ended with the frame

    @property
    def costs(self) -> str:
        """What was executed, and the share of the dense cost that was saved."""
        dense = max(self.frames, 1) * self.dense_macs
        return f"{self.macs / 1e9:.3g} of {dense / 1e9:.3g} GMACs, {100 * (1 - self.macs / dense):.0f} % saved"

    def look(self, picture: np.ndarray) -> str | None:
        """Give the session a frame `(H, W, 3)`; return a line about the prediction that it completed, if it did."""
        inputs = self.prep.normalize(self.prep.crop(picture[None]).to(self.device))
        step = self.session(inputs[0])
        self.decisions.append(int(step.stopped_at[0]))
        self.recent.append(self.decisions[-1])
        self.ends.append(False)
        self.macs += float(step.frame_macs[0])
        self.frames += 1
        self.used += bool(step.used[0])
        if not step.running_probabilities.isnan().any():
            self.answer = self._say(step.running_probabilities[0])
        return self.finish() if len(self.decisions) == self.prep.num_frames else None

    def finish(self) -> str | None:
        """Complete a prediction, where one was begun, and start anew."""
        if not self.decisions:
            return None
        result = self.session.result()
        fallback = int(result.fallback_frame[0])
        completion = self.model.lookup_for((self.prep.size, self.prep.size)).completion
        if fallback >= 0:  # no frame was used, so the furthest one was run to the end
            self.macs += float(completion[self.decisions[fallback]])
        self.answer = self._say(result.probabilities[0])
        timeline = plot.timeline_text(self.decisions, self.model.backbone.stage_names, fallback_frame=fallback)
        self.session.reset()
        self.decisions = []
        self.ends[-1] = True
        return f"{timeline.splitlines()[0]}  {self.answer}; so far {self.costs}"

    def _say(self, probabilities: torch.Tensor) -> str:
        answer = named_classes(probabilities, self.model.activation)
        return ", ".join(f"{self.classes[n]} {100 * p:.1f} %" for n, p in answer.items()) or "no class"


def watch(source: Source, output: Output, watcher: Watcher, rate: float, stopped: Sequence[bool]) -> None:
    """Show a watcher `rate` frames a second of a source, and write every picture with what it says."""
    clock, due = Clock(), 0.0
    with tqdm(source, desc=source.name, unit="frame", disable=None) as frames:
        for frame in frames:
            if stopped:
                break
            frames.total = source.length or None  # not known before the source is open
            time = clock.at(frame.time)
            if time >= due:
                due = max(due + 1 / rate, time)
                line = watcher.look(to_array(frame, watcher.prep.short_side))
                if line is not None:
                    tqdm.write(f"{time:8.1f} s  {line}")
            picture = to_array(frame, max(MIN_SIDE, min(frame.width, frame.height)))
            output.write(draw(picture, watcher), round(1000 * time))
    if (line := watcher.finish()) is not None:
        print(f"{clock.now:8.1f} s  {line}")


@contextlib.contextmanager
def stop_signals() -> Iterator[list[bool]]:
    """A list that holds something once Ctrl-C or a kill has asked to stop; the frame at hand is finished first."""
    asked: list[bool] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: asked.append(True)) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------- drawing

SHOWN = 48  # frames whose depth is drawn
MIN_SIDE = 360  # pixels; smaller pictures are scaled up, so that the text can be read
USED, STOPPED, INK, GROUND = (0, 158, 115), (230, 159, 0), (255, 255, 255), (13, 17, 23)  # all can tell them apart


def draw(picture: np.ndarray, watcher: Watcher) -> np.ndarray:
    """Lay the prediction, the costs and the depths of the latest frames over the foot of a picture `(H, W, 3)`."""
    image = Image.fromarray(picture)
    canvas = ImageDraw.Draw(image, "RGBA")
    unit = min(image.size) / 100
    width, height, margin = image.width, image.height, 2 * unit
    canvas.rectangle((0, height - 28 * unit, width, height), fill=(*GROUND, 185))
    for text, size, top in ((watcher.font.spell(watcher.answer), 5, 27), (watcher.costs, 4.2, 20.5)):
        font = ImageFont.truetype(watcher.font.path, size * unit)
        canvas.text((margin, height - top * unit), fitting(text, font, width - 2 * margin), INK, font)

    stages = watcher.model.backbone.num_stages
    floor, tallest, step = height - 6 * unit, 8 * unit, (width - 2 * margin) / SHOWN
    canvas.line((margin, floor, width - margin, floor), fill=(*INK, 90))
    for i, (depth, end) in enumerate(zip(watcher.recent, watcher.ends, strict=True)):
        left = margin + (SHOWN - len(watcher.recent) + i) * step
        if depth != UNSEEN:
            top = floor - tallest * (depth + 1) / (stages + 1)
            canvas.rectangle((left, top, left + 0.75 * step, floor), fill=USED if depth == stages else STOPPED)
        if end:
            canvas.line((left + 0.9 * step, floor - tallest, left + 0.9 * step, floor + unit), fill=(*INK, 150))
    font, left = ImageFont.truetype(watcher.font.path, 3.4 * unit), margin
    for text, colour in (("used", USED), ("stopped: the taller, the deeper", STOPPED)):
        canvas.rectangle((left, height - 4.2 * unit, left + 2.4 * unit, height - 1.8 * unit), fill=colour)
        canvas.text((left + 3.4 * unit, height - 5 * unit), text, INK, font)
        left += 7 * unit + font.getlength(text)
    return np.asarray(image)


def fitting(text: str, font: Any, width: float) -> str:
    """Cut a text to a width in pixels."""
    while font.getlength(text) > width and len(text) > 1:
        text = text[:-2] + "…"
    return text


# ----------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a saved model, or its name on the Hugging Face Hub")
    add("source", metavar="SOURCE", help="a video file, an address that FFmpeg opens, or the number of a camera")
    add("output", metavar="OUT", type=Path, help="the video to write; .mkv stays playable even if the power fails")
    add("--rate", type=float, default=4.0, help="frames a second that the model is shown (default: 4)")
    add("--format", metavar="NAME", help="FFmpeg's name of the source's format, if it does not say: dshow, lavfi, ...")
    add("--font", type=Path, metavar="FILE", help="a font that has the letters of the classes, if none is found")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    args = parser.parse_args(arguments)

    def work() -> int:
        source, output = Source(args.source, args.format), Output(args.output)
        if args.output.exists() and Path(args.source).exists() and args.output.samefile(args.source):
            raise DynskipError(f"{args.output} is the source itself. Name another file to write.")
        if not args.rate > 0:
            raise DynskipError(f"--rate {args.rate} is out of range; give a number above 0.")
        outputs.check_files(args.output)
        watcher = Watcher(StopOrForward.from_pretrained(args.model).to(args.device), args.device, args.font)
        with contextlib.closing(output), stop_signals() as stopped:
            watch(source, output, watcher, args.rate, stopped)
        if output.container is None:
            raise VideoError(f"{source.name}: holds no video frame. Expected at least one picture.")
        print(f"{watcher.frames} frames looked at, {watcher.used} used: {watcher.costs} (GMACs: 10^9 multiply-adds)")
        print(f"Wrote {args.output}.")
        if source.damaged:
            print(f"{source.damaged} damaged packets were skipped.", file=sys.stderr)
        return 1 if source.damaged else 0

    return command.run(work, "Nothing was recorded yet.")


if __name__ == "__main__":
    sys.exit(main())
