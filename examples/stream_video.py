"""Watch a video or a camera with a model that skips, and write down what it saw and what every frame cost.

    python examples/stream_video.py runs/mine/model clip.mp4 out.mp4
    python examples/stream_video.py runs/mine/model 0 out.mkv                  (camera 0, until Ctrl-C)
    python examples/stream_video.py runs/mine/model rtsp://HOST/live door-%Y%m%d-%H%M.mkv    (a new file each hour)

MODEL is a folder that `save_pretrained` or a recipe wrote; similarity_gates.py makes one without training. Frames go
one at a time through an online session (`model.stream()`), --rate of them a second. As many as the model was trained
on make one prediction; then the session starts anew, so that a camera may run for days. The output shows, below every
picture, the running prediction, the multiply-adds (MACs) executed and those of a dense model, and the frames' depths.

Of a file, every frame is shown. Of a camera or another live source the newest one is; those older than --lag are
dropped and counted. When the link breaks, it connects again. Ctrl-C and SIGTERM end in order; a second one, at once.

Exit codes: 0 the file is done, or it was told to stop; 1 the file is damaged or ends early, the output holds what there
was; 2 something given is wrong; 3 the live source was lost for longer than --give-up.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import re
import signal
import sys
import time
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

from dynskip import UNSEEN, DynskipError, StopOrForward, plot, video
from dynskip.activation import named_classes
from dynskip.video import LiveSource, VideoError, command, live, outputs

# ---------------------------------------------------------------------------------------------------------- sources


class Recording:
    """All frames of a file. A damaged packet is counted and skipped."""

    def __init__(self, address: str, form: str | None = None) -> None:
        self.address, self.form = address, form
        self.length = self.frames = self.damaged = 0

    def __str__(self) -> str:
        return self.address

    def __iter__(self) -> Iterator[video.LiveFrame]:
        clock, begin, end, stated = live.Clock(), 0.0, 0.0, 0.0
        try:
            with video.open_video(self.address, format=self.form, timeout=(20.0, 20.0)) as (container, stream):
                self.length, aspect = stream.frames, video.files.pixel_aspect(stream)
                if stream.duration:
                    stated = float(stream.duration * stream.time_base)
                elif container.duration and len(container.streams) == 1:
                    stated = container.duration / av.time_base
                for packet in container.demux(stream):
                    if packet.pts is not None:
                        end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                    try:
                        pictures = packet.decode()
                    except av.error.InvalidDataError:
                        self.damaged += 1
                        continue
                    for picture in pictures:
                        begin = begin if self.frames else picture.time or 0.0
                        now = clock.at(picture.time, clock.time + 1 / 30 if self.frames else 0.0)
                        self.frames += 1
                        yield video.LiveFrame(picture, now, 0, aspect)
        except VideoError as error:
            if not self.frames:
                raise
            raise VideoError(self._cut(end - begin, stated)) from error
        if not self.frames:
            raise VideoError(f"{self.address}: holds no video frame. Expected at least one picture.")
        if stated - (end - begin) > 0.5:
            raise VideoError(self._cut(end - begin, stated))

    def _cut(self, seconds: float, stated: float) -> str:
        whole = f" of {stated:.1f}" if stated else ""
        return f"{self.address} ends early: {seconds:.1f}{whole} s ({self.frames} frames) were there. Fetch it again."


class Output:
    """A video file, or with a date in its name one for each hour.

    It is claimed at once and opened with the first picture: a recording is never overwritten unless that is asked for,
    and two runs do not write the same one.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        self.name, self.overwrite = path, overwrite
        self.hourly = re.search(r"%[YymdHMSj]", str(path)) is not None
        hours = (1, 24, 24 * 30, 24 * 31, 24 * 365) if self.hourly else ()
        if any(self._path(later) == self._path() for later in hours):
            raise DynskipError(f"{path} would be the same name again. Put date and hour into it: %Y%m%d-%H%M.")
        self.container: Any = None
        self.begin = self.zero = self.last = 0  # milliseconds
        self.written: list[Path] = []
        self._claim(self._path())

    def write(self, picture: np.ndarray, milliseconds: int) -> None:
        """Append a picture `(H, W, 3)`, uint8, shown from a time on; times that do not rise are moved."""
        height, width = (side // 2 * 2 for side in picture.shape[:2])  # H.264 takes even sides
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
        if self.hourly and self.container is not None and milliseconds - self.begin >= 3_600_000:
            if not (path := self._path()).exists():  # as it does when clocks are set back: go on for another hour
                self.close()
                self._claim(path)
            self.begin = milliseconds
        with self._explained():
            if self.container is None:
                self._open(width, height)
                self.begin = self.zero = milliseconds if self.hourly else 0
            self.last = max(milliseconds - self.zero, self.last + 1)
            if (width, height) != (self.stream.width, self.stream.height):  # a camera was turned
                frame = frame.reformat(self.stream.width, self.stream.height)
            frame.pts, frame.time_base = self.last, Fraction(1, 1000)
            self.container.mux(self.stream.encode(frame))

    def close(self) -> None:
        """Write what is left and the index, without which players refuse the file."""
        try:
            if self.container is not None:
                with self._explained(), contextlib.closing(self.container):
                    self.container.mux(self.stream.encode(None))
            elif self.new and self.claim is not None:
                self.path.unlink()
        finally:
            self.container = None
            if self.claim is not None:
                self.claim.close()

    def _path(self, later: int = 0) -> Path:
        when = datetime.datetime.now() + datetime.timedelta(hours=later)
        return Path(when.strftime(str(self.name))) if self.hourly else self.name

    def _claim(self, path: Path) -> None:
        self.path, self.new, self.claim, self.last = path, not path.exists(), None, -1
        outputs.check_files(path)
        if path.exists() and not path.is_file():  # a pipe
            return
        try:
            self.claim = path.open("ab" if self.overwrite else "xb")
            with contextlib.suppress(ImportError):  # on Windows
                import fcntl

                fcntl.flock(self.claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileExistsError:
            advice = "Name another file, or one with the date (%Y%m%d-%H%M), or pass --overwrite."
            raise DynskipError(f"{path} exists. {advice}") from None
        except BlockingIOError:
            raise DynskipError(f"{path} is being written by another run. Name another file.") from None

    def _open(self, width: int, height: int) -> None:
        container = av.open(str(self.path), "w")
        self.stream = container.add_stream("libx264", rate=30, options={"preset": "veryfast"})
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"
        self.stream.codec_context.time_base = Fraction(1, 1000)
        self.container = container
        self.written.append(self.path)

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
        self.model, self.prep, self.device = model, video.Preprocessing.of(model), device
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


def watch(
    source: Recording | LiveSource, frames: video.Newest[video.LiveFrame], output: Output | None, watcher: Watcher,
    rate: float, output_rate: float,
) -> None:  # fmt: skip
    """Show a watcher `rate` frames a second of a source, and write pictures with what it says."""
    link, now, look, show, told = None, 0.0, 0.0, 0.0, time.monotonic()  # look and show: when the next one is due

    def say(line: str | None) -> None:
        if line is not None:
            tqdm.write(f"{now:8.1f} s  {line}")

    try:
        with tqdm(frames, desc=str(source), unit="frame", disable=None) as bar:
            for frame in bar:
                bar.total = getattr(source, "length", 0) or None  # not known before the source is open
                if link not in (None, frame.link):  # frames are missing
                    say(watcher.finish())
                link, now = frame.link, frame.time
                if now >= look:
                    look = max(look + 1 / rate, now)
                    say(watcher.look(frame.to_array(watcher.prep.short_side)))
                if output is not None and now >= show:
                    show = max(show + 1 / output_rate, now)
                    size = max(MIN_SIDE, min(frame.picture.width, frame.picture.height))
                    output.write(draw(frame.to_array(size), watcher), round(1000 * now))
                if isinstance(source, LiveSource) and time.monotonic() - told >= TOLD:
                    told = time.monotonic()
                    say(source.summary())
    finally:
        say(watcher.finish())


@contextlib.contextmanager
def stop_signals(frames: video.Newest[video.LiveFrame]) -> Iterator[None]:
    """End the frames at Ctrl-C or SIGTERM, whatever their source does; a second signal ends the program at once."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(*_: Any) -> None:
        frames.close()
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)

    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------- drawing

TOLD = 60.0  # seconds between two lines about a live source
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
    add("output", metavar="OUT", type=Path, nargs="?", help="the video to write, if any; with a date in its name "
        "(%%Y%%m%%d-%%H%%M.mkv), a new one each hour; .mkv stays playable even if the power fails")  # fmt: skip
    add("--rate", type=float, default=4.0, help="frames a second that the model is shown (default: 4)")
    add("--output-rate", type=float, default=math.inf, metavar="RATE", help="frames a second in OUT (default: all)")
    add("--overwrite", action="store_true", help="replace OUT if it exists")
    add("--lag", type=float, default=1.0, help="seconds; older frames of a live source are dropped (default: 1)")
    add("--give-up", type=float, metavar="SECONDS", help="how long to wait for a lost source (default: for ever)")
    add("--format", metavar="NAME", help="FFmpeg's name of the source's format, if it does not say: dshow, lavfi, ...")
    add("--font", type=Path, metavar="FILE", help="a font that has the letters of the classes, if none is found")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    args = parser.parse_args(arguments)

    def work() -> int:
        out = args.output
        if out is not None and out.exists() and Path(args.source).exists() and out.samefile(args.source):
            raise DynskipError(f"{out} is the source itself. Name another file to write.")
        for name in ("rate", "output_rate", "give_up"):
            value = getattr(args, name)
            if value is not None and not value > 0:
                raise DynskipError(f"--{name.replace('_', '-')} {value} is out of range; give a number above 0.")
        source: Recording | LiveSource
        frames: video.Newest[video.LiveFrame]
        if live.is_live(args.source, args.format):
            address = int(args.source) if args.source.isdecimal() and args.format is None else args.source
            frames = source = LiveSource(address, lag=args.lag, give_up=args.give_up, format=args.format)
        else:
            source = Recording(args.source, args.format)
            frames = video.Newest(source, queue=8, drop=False)
        code, output = 0, None if out is None else Output(out, args.overwrite)
        with contextlib.nullcontext() if output is None else contextlib.closing(output):
            watcher = Watcher(StopOrForward.from_pretrained(args.model).to(args.device), args.device, args.font)
            try:
                with stop_signals(frames):
                    watch(source, frames, output, watcher, args.rate, args.output_rate)
            except (VideoError, video.MachineError) as error:
                if not frames.given and not isinstance(error, video.LinkLostError):
                    raise
                print(f"error: {error}", file=sys.stderr)
                code = 3 if isinstance(error, video.LinkLostError) else 1
            finally:
                frames.close()
        print(f"{watcher.frames} frames looked at, {watcher.used} used: {watcher.costs} (GMACs: 10^9 multiply-adds)")
        if isinstance(source, LiveSource):
            print(source.summary())
        elif source.damaged:
            print(f"{source.damaged} damaged packets were skipped.", file=sys.stderr)
            code = 1
        for path in output.written if output is not None else ():
            print(f"Wrote {path}.")
        return code

    return command.run(work, "Nothing was recorded yet.")


if __name__ == "__main__":
    sys.exit(main())
