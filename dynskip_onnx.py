"""Run an exported dynskip model on onnxruntime, without torch: online, per clip, and over many streams.

    runner = load("folder")
    result = runner.clip(runner.normalise(frames))

The three ways share one loop and give the same decisions; they differ only in how many frames it sees at once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime

FORMAT, VERSION = "dynskip-onnx", 1
UNSEEN = -1  # `stopped_at` of a frame that was never looked at, because the video had ended
Array: TypeAlias = np.ndarray[Any, Any]


class DynskipOnnxError(ValueError):
    """An export or a frame cannot be used; the message says what was expected and how to get it."""


@dataclass(frozen=True)
class Result:
    """What a video's frames decided, predicted and cost. What was not evaluated is NaN.

    Attributes:
        logits: `(K,)` mean over the used frames, or those of the fallback frame.
        stopped_at: `(T,)` index of the gate that stopped each frame; `N` for used frames, -1 for unseen ones.
        frame_logits: `(T, K)` logits of each frame.
        gate_logits: `(T, N, 2)` logits (stop, forward).
        macs: executed cost of the decisions, gates and head included.
        extra_macs: cost of what was executed ahead of the decisions and not needed.
        fallback_frame: where no frame was used, the frame that was run to the end in their place; else -1.
    """

    logits: Array
    stopped_at: Array
    frame_logits: Array
    gate_logits: Array
    macs: float
    extra_macs: float
    fallback_frame: int

    @property
    def probabilities(self) -> Array:
        """`(K,)` class probabilities."""
        return _softmax(self.logits)


@dataclass(frozen=True)
class Step:
    """What a session's videos did with one frame each.

    Attributes:
        stopped_at: `(B,)` gate that stopped the frame; `N` if it was used, -1 if the video had ended before.
        logits: `(B, K)` running mean over the used frames; NaN before the first.
        ended: `(B,)` boolean, videos that need no more frames.
        macs: `(B,)` executed cost so far.
    """

    stopped_at: Array
    logits: Array
    ended: Array
    macs: Array


@dataclass(frozen=True)
class Served:
    """The end of one stream: its number, and its result or what went wrong."""

    stream: int
    result: Result | None
    error: Exception | None = None


@dataclass(eq=False)
class _Frame:
    """One frame on its way, with what has been computed of it so far."""

    video: _Video
    values: list[Array]  # what enters stage `depth`
    depth: int = 0  # stages run
    pooled: list[Array] = field(default_factory=list)
    states: list[list[Array]] = field(default_factory=list)  # proposed by each gate reached
    gate_logits: list[Array] = field(default_factory=list)
    logits: Array | None = None
    stopped_at: int = UNSEEN


@dataclass(eq=False)
class _Video:
    """Where a video stands: gate states, the running sum, and what became of its frames."""

    states: list[list[Array]]
    logit_sum: Array
    last: Array  # logits of the last used frame
    pending: list[_Frame] = field(default_factory=list)
    stopped_at: list[int] = field(default_factory=list)
    frame_logits: list[Array | None] = field(default_factory=list)
    gate_logits: list[list[Array]] = field(default_factory=list)
    counted: int = 0  # logits in the sum: used frames and those that repeat one
    ended: bool = False
    macs: float = 0.0
    executed: float = 0.0
    best_score: float = -1.0
    best: tuple[int, _Frame] | None = None  # the stopped frame that got furthest, while none has been used

    @property
    def running(self) -> Array:
        """`(K,)` mean logits so far; NaN before the first used frame."""
        return self.logit_sum / self.counted if self.counted else np.full_like(self.logit_sum, np.nan)


def load(folder: str | Path, *, threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",)) -> Runner:
    """Load what `model.export(folder, ...)` wrote, after checking every file against the manifest.

    Args:
        folder: the exported folder.
        threads: threads of onnxruntime; 0 lets it choose.
        providers: onnxruntime's execution providers, in order of preference.

    Returns:
        The runner.

    Raises:
        DynskipOnnxError: if a file is missing, foreign, changed, or does not fit the others.
    """
    manifest, files = _read(Path(folder))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # There is a session a stage and gate, each with its threads: those of one must not spin while another works.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    graphs = {}
    for name, content in files.items():
        try:
            graphs[name] = onnxruntime.InferenceSession(content, options, providers=list(providers))
        except Exception as error:
            raise DynskipOnnxError(
                f"onnxruntime {onnxruntime.__version__} cannot load {name!r}: {error}. Update it, or export again."
            ) from error
    try:
        return Runner(manifest, graphs)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise DynskipOnnxError(
            f"The manifest lacks or garbles an entry ({error!r}). Export the model again."
        ) from error


class Runner:
    """An exported model and its control loop; made by `load`.

    Attributes:
        manifest: the parsed manifest.
        class_names: name of each class, or `None`.
    """

    def __init__(self, manifest: dict[str, Any], graphs: dict[str, onnxruntime.InferenceSession]) -> None:
        self.manifest = manifest
        self.class_names: list[str] | None = manifest["class_names"]
        self._stages, self._head = manifest["stages"], manifest["head"]
        self._graphs = graphs
        self._shape = tuple(manifest["input"]["shape"])
        self._advance_all = {"used": False, "reached": True}[manifest["state_update"]]
        self._termination = manifest["termination"]
        self._repeats = [stage["gate"]["repeats_last"] for stage in self._stages]
        self._margins = [_margin(stage["gate"]["forward_threshold"]) for stage in self._stages]
        self._stage_macs = np.array([stage["macs"] for stage in self._stages])
        self._gate_macs = np.array([stage["gate"]["macs"] for stage in self._stages])
        self._boundaries: list[list[dict[str, Any]]] = [[{"rows": 1, "shape": list(self._shape), "dtype": "float32"}]]
        self._boundaries += [stage["values"] for stage in self._stages]
        self._check_graphs()

    def normalise(self, frames: Array) -> Array:
        """Turn 8-bit frames into what the model takes.

        Args:
            frames: `(..., H, W, C)` uint8 frames at the model's size.

        Returns:
            `(..., C, H, W)` float32 frames, normalised.
        """
        mean, std = self.manifest["input"]["mean"], self.manifest["input"]["std"]
        if mean is None or std is None:
            raise DynskipOnnxError("The model was exported without `mean` and `std`; normalise the frames yourself.")
        scaled = (np.asarray(frames, np.float32) / 255 - np.float32(mean)) / np.float32(std)
        return np.moveaxis(scaled, -1, -3)

    def stream(self, batch: int = 1) -> Session:
        """Open a session for frames that arrive one by one, of one video or of `batch` videos in lock-step."""
        return Session(self, batch)

    def clip(self, video: Array, window: int = 16) -> Result:
        """Run a stored video: stages take up to `window` frames at once, and decisions stay those of the online run.

        Args:
            video: `(T, C, H, W)` normalised frames.
            window: frames that may run ahead of the decisions before them.

        Returns:
            The result.

        Raises:
            DynskipOnnxError: if the video is empty or a frame has the wrong shape, dtype or values.
        """
        if len(video) == 0 or window < 1:
            raise DynskipOnnxError(f"A clip needs frames and a positive window; got {len(video)} frames, {window=}.")
        images = [self._image(frame) for frame in video]
        state = self._begin()
        for start in range(0, len(images), window):
            self._advance([state], [[image] for image in images[start : start + window]])
            if state.ended:
                break
        return self._finish(state, len(images))

    def serve(self, sources: Iterable[Iterable[Array]], capacity: int = 16) -> Iterator[Served]:
        """Run many streams together, one frame of each at a time; a finished one's place goes to the next at once.

        Args:
            sources: streams of `(C, H, W)` normalised frames. Each is read only when its turn comes, and no further
                once its video has ended.
            capacity: streams that run at the same time.

        Yields:
            The end of each stream as it comes. A stream that raises or sends a bad frame fails alone.
        """
        if capacity < 1:
            raise DynskipOnnxError(f"{capacity=} streams can never finish; give a positive number.")
        waiting = enumerate(sources)
        active: dict[int, tuple[_Video, Generator[Array, None, None]]] = {}
        while True:
            for number, opened in islice(waiting, capacity - len(active)):
                active[number] = (self._begin(), _frames_of(opened))
            if not active:
                return
            ready, images, over = [], [], []
            for number, (video, source) in active.items():
                try:
                    images.append(self._image(next(source)))
                    ready.append(video)
                except StopIteration:
                    over.append(self._served(number, video))
                except Exception as error:
                    over.append(Served(number, None, error))
            if ready:
                self._advance(ready, [images])
            over += [self._served(number, video) for number, (video, _) in active.items() if video.ended]
            for served in over:
                active.pop(served.stream)[1].close()
            yield from over

    def _served(self, number: int, video: _Video) -> Served:
        if not video.stopped_at:
            return Served(number, None, DynskipOnnxError(f"Stream {number} ended before its first frame."))
        return Served(number, self._finish(video, len(video.stopped_at)))

    def _image(self, frame: Array) -> Array:
        frame = np.asarray(frame)
        if frame.shape != self._shape or not np.issubdtype(frame.dtype, np.floating):
            raise DynskipOnnxError(
                f"A frame must be normalised floats of shape {self._shape}; got {frame.dtype} of {frame.shape}. "
                "`runner.normalise` turns 8-bit (H, W, C) frames into them."
            )
        if not np.isfinite(frame).all():
            raise DynskipOnnxError("A frame has NaN or infinite values. Check decoding and normalisation.")
        return frame[None].astype(np.float32)

    def _begin(self) -> _Video:
        states = [
            [np.full(state["shape"], state["value"], np.float32) for state in stage["gate"]["initial_state"]]
            for stage in self._stages
        ]
        zeros = np.zeros(self.manifest["num_classes"], np.float32)
        return _Video(states, zeros, zeros)

    def _advance(self, videos: list[_Video], steps: Sequence[Sequence[Array]]) -> None:
        """Take frames of some videos as far as their gates let them: `steps` holds one image a video each."""
        for images in steps:
            for video, image in zip(videos, images, strict=True):
                video.pending.append(_Frame(video, [image]))
        # All pending frames are decided from the states committed so far. A used frame changes its video's states: the
        # frames after it are decided anew, from features that stay valid.
        while pending := [frame for video in videos for frame in video.pending]:
            self._propose(pending)
            for video in videos:
                while video.pending:
                    frame = video.pending.pop(0)
                    self._accept(video, frame)
                    if video.ended:
                        video.pending.clear()
                    elif frame.stopped_at == len(self._stages) and not self._advance_all:
                        break

    def _propose(self, frames: list[_Frame]) -> None:
        for frame in frames:
            frame.stopped_at, frame.states, frame.gate_logits = len(self._stages), [], []
        for n in range(len(self._stages)):
            self._run_stage(n, [frame for frame in frames if frame.depth == n])
            self._run_gate(n, frames)
            frames = [frame for frame in frames if frame.stopped_at > n]
            if not frames:
                return
        self._run_head([frame for frame in frames if frame.logits is None])

    def _run_stage(self, n: int, frames: list[_Frame]) -> None:
        if not frames:
            return
        pooled, *outputs = self._call(self._stages[n]["file"], self._join(n, frames))
        for i, frame in enumerate(frames):
            frame.pooled.append(pooled[i])
            frame.values = [
                array[i * value["rows"] : (i + 1) * value["rows"]].copy() if value["rows"] else array
                for array, value in zip(outputs, self._boundaries[n + 1], strict=True)
            ]
            frame.depth = n + 1
            frame.video.executed += self._stage_macs[n]

    def _run_gate(self, n: int, frames: list[_Frame]) -> None:
        for together in _one_of_each_video(frames) if self._advance_all else [frames]:
            states = zip(*(frame.video.states[n] for frame in together), strict=True)
            inputs = [np.stack([frame.pooled[n] for frame in together]), *(np.stack(parts) for parts in states)]
            logits, *new = self._call(self._stages[n]["gate"]["file"], inputs)
            for i, frame in enumerate(together):
                frame.gate_logits.append(logits[i])
                frame.states.append([state[i] for state in new])
                if self._advance_all:
                    frame.video.states[n] = frame.states[n]
                if not logits[i, 1] - logits[i, 0] > self._margins[n]:
                    frame.stopped_at = n
                frame.video.executed += self._gate_macs[n]

    def _run_head(self, frames: list[_Frame]) -> None:
        if not frames:
            return
        (logits,) = self._call(self._head["file"], self._join(len(self._stages), frames))
        for frame, row in zip(frames, logits, strict=True):
            frame.logits = row
            frame.video.executed += self._head["macs"]

    def _accept(self, video: _Video, frame: _Frame) -> None:
        """Let a decided frame count."""
        stages, n = len(self._stages), frame.stopped_at
        used = n == stages
        video.stopped_at.append(n)
        video.gate_logits.append(frame.gate_logits)
        video.frame_logits.append(frame.logits if used else None)
        video.macs += (self._stage_macs + self._gate_macs)[: n + 1].sum() + (self._head["macs"] if used else 0.0)
        if used:
            assert frame.logits is not None
            video.last, video.best = frame.logits, None
            if not self._advance_all:
                video.states = frame.states
        if used or (video.counted and self._repeats[n]):
            video.logit_sum = video.logit_sum + video.last
            video.counted += 1
        elif not video.counted and (score := n + _nearness(frame.gate_logits[n])) > video.best_score:
            video.best_score, video.best = score, (len(video.stopped_at) - 1, frame)
        if self._termination and video.counted and len(video.stopped_at) > self._termination["min_frames"]:
            video.ended = bool(_softmax(video.running).max() > self._termination["threshold"])

    def _finish(self, video: _Video, frames: int) -> Result:
        stages, seen = len(self._stages), len(video.stopped_at)
        classes = self.manifest["num_classes"]
        frame_logits = np.full((frames, classes), np.nan, np.float32)
        gate_logits = np.full((frames, stages, 2), np.nan, np.float32)
        for t in range(seen):
            gate_logits[t, : len(video.gate_logits[t])] = video.gate_logits[t]
            if (logits := video.frame_logits[t]) is not None:
                frame_logits[t] = logits
        logits, macs, fallback = video.running, video.macs, -1
        if video.best is not None:
            fallback, furthest = video.best
            logits = frame_logits[fallback] = self._complete(furthest)
            macs += self._stage_macs[furthest.stopped_at + 1 :].sum() + self._head["macs"]
        return Result(
            logits=logits,
            stopped_at=np.array(video.stopped_at + [UNSEEN] * (frames - seen)),
            frame_logits=frame_logits,
            gate_logits=gate_logits,
            macs=float(macs),
            extra_macs=float(video.executed - macs),
            fallback_frame=fallback,
        )

    def _complete(self, frame: _Frame) -> Array:
        """Run a stopped frame to the end; what was computed stays with it, so that asking twice costs nothing more."""
        for n in range(frame.depth, len(self._stages)):
            self._run_stage(n, [frame])
        if frame.logits is None:
            self._run_head([frame])
        assert frame.logits is not None
        return frame.logits

    def _join(self, boundary: int, frames: list[_Frame]) -> list[Array]:
        return [
            np.concatenate([frame.values[k] for frame in frames]) if value["rows"] else frames[0].values[k]
            for k, value in enumerate(self._boundaries[boundary])
        ]

    def _call(self, name: str, inputs: Sequence[Array]) -> list[Array]:
        graph = self._graphs[name]
        taken = {entry.name for entry in graph.get_inputs()}  # an exporter may drop what a graph does not read
        feed = {f"in_{i}": array for i, array in enumerate(inputs) if f"in_{i}" in taken}
        return [np.asarray(output) for output in graph.run(None, feed)]

    def _check_graphs(self) -> None:
        """Compare the shapes of every graph with the manifest."""
        classes = {"rows": 1, "shape": [self.manifest["num_classes"]], "dtype": "float32"}
        for n, stage in enumerate(self._stages):
            pooled = {"rows": 1, "shape": [stage["channels"]], "dtype": "float32"}
            decision = {"rows": 1, "shape": [2], "dtype": "float32"}
            states = [{"rows": 1, "shape": s["shape"], "dtype": "float32"} for s in stage["gate"]["initial_state"]]
            self._check_graph(stage["file"], self._boundaries[n], [pooled, *self._boundaries[n + 1]])
            self._check_graph(stage["gate"]["file"], [pooled, *states], [decision, *states])
        self._check_graph(self._head["file"], self._boundaries[-1], [classes])

    def _check_graph(self, name: str, inputs: list[Any], outputs: list[Any]) -> None:
        graph = self._graphs[name]
        wanted = {f"in_{i}": value for i, value in enumerate(inputs)}
        pairs = [(entry, wanted.get(entry.name)) for entry in graph.get_inputs()]
        pairs += list(zip_longest(graph.get_outputs(), outputs))
        for entry, value in pairs:
            if entry is None or value is None or not _fits(entry, value):
                got = "nothing" if entry is None else f"{entry.name} {entry.type} {entry.shape}"
                raise DynskipOnnxError(f"{name!r} has {got} where the manifest says {value}. Export the model again.")


class Session:
    """Videos whose frames arrive one by one; made by `Runner.stream`."""

    def __init__(self, runner: Runner, batch: int) -> None:
        if batch < 1:
            raise DynskipOnnxError(f"A session needs at least one video; got {batch=}.")
        self._runner = runner
        self._videos = [runner._begin() for _ in range(batch)]

    def __call__(self, frames: Array) -> Step:
        """Take the next frame of each video; those of ended videos are not looked at.

        Args:
            frames: `(B, C, H, W)` normalised frames.

        Returns:
            What became of them.
        """
        if len(frames) != len(self._videos):
            raise DynskipOnnxError(f"Got {len(frames)} frames for {len(self._videos)} videos; give one for each.")
        rows = [row for row, video in enumerate(self._videos) if not video.ended]
        self._runner._advance([self._videos[row] for row in rows], [[self._runner._image(frames[row]) for row in rows]])
        stopped_at = [video.stopped_at[-1] if row in rows else UNSEEN for row, video in enumerate(self._videos)]
        return Step(
            stopped_at=np.array(stopped_at),
            logits=np.stack([video.running for video in self._videos]),
            ended=np.array([video.ended for video in self._videos]),
            macs=np.array([video.macs for video in self._videos]),
        )

    def result(self, row: int = 0) -> Result:
        """Conclude a video as if it ended here: where no frame was used, the furthest one is run to the end."""
        video = self._videos[row]
        if not video.stopped_at:
            raise DynskipOnnxError(f"Video {row} has had no frame yet; there is nothing to conclude.")
        return self._runner._finish(video, len(video.stopped_at))

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """Start new videos in these rows, or in all."""
        for row in range(len(self._videos)) if rows is None else rows:
            self._videos[row] = self._runner._begin()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Read the manifest and the files that it lists, and check their hashes."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = (manifest["format"], manifest["version"])
        hashes = dict(manifest["sha256"])
    except FileNotFoundError:
        raise DynskipOnnxError(
            f"{folder} has no manifest.json. Name a folder that model.export(folder, ...) wrote."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DynskipOnnxError(f"{path} is no manifest of an exported model ({error!r}). Export it again.") from error
    if found != (FORMAT, VERSION):
        raise DynskipOnnxError(
            f"{path} is of format {found[0]!r}, version {found[1]}; this runner reads {FORMAT!r}, version {VERSION}. "
            "Export the model again with format='onnx' and the release of dynskip that this runner comes from."
        )
    files = {}
    for name, expected in hashes.items():
        if Path(name).name != name:
            raise DynskipOnnxError(f"The manifest names {name!r}, which lies outside its folder. Do not trust it.")
        if not (folder / name).is_file():
            raise DynskipOnnxError(f"{name!r} is missing from {folder}. Copy the whole folder.")
        content = (folder / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != expected:
            raise DynskipOnnxError(f"{name!r} is not the file that was exported: its hash differs. Copy it again.")
        files[name] = content
    return manifest, files


def _fits(entry: Any, value: dict[str, Any]) -> bool:
    names = {"float32": "float", "float64": "double"}
    wanted = ([None] if value["rows"] else []) + list(value["shape"])
    return (
        entry.type == f"tensor({names.get(value['dtype'], value['dtype'])})"
        and len(entry.shape) == len(wanted)
        and not (value["rows"] and isinstance(entry.shape[0], int))
        and all(w is None or not isinstance(g, int) or g == w for g, w in zip(entry.shape, wanted, strict=True))
    )


def _frames_of(source: Iterable[Array]) -> Generator[Array, None, None]:
    """Open a source when its first frame is asked for, so that one that cannot be opened fails as a stream."""
    yield from source


def _one_of_each_video(frames: list[_Frame]) -> Iterator[list[_Frame]]:
    """Group frames so that no group has two of a video, in the order in which they came."""
    queues: dict[int, list[_Frame]] = {}
    for frame in frames:
        queues.setdefault(id(frame.video), []).append(frame)
    for group in zip_longest(*queues.values()):
        yield [frame for frame in group if frame is not None]


def _margin(probability: float) -> float:
    """Return how far the forward logit must lie above the stop logit for this forward probability."""
    if probability in (0.0, 1.0):
        return math.inf if probability else -math.inf
    return math.log(probability) - math.log1p(-probability)


def _nearness(logits: Array) -> float:
    """Rise with a gate's forward probability, from 0 to 1, without the rounding of an exponential."""
    margin = float(logits[1]) - float(logits[0])
    return min(0.5 + 0.5 * margin / (1 + abs(margin)), 1 - 1e-12)


def _softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()  # type: ignore[no-any-return]
