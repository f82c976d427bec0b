"""Run an exported dynskip model on onnxruntime, without torch: online, per clip, and over many streams.

    runner = load("folder")
    result = runner.clip(runner.normalise(frames))

This one file holds all of it, so that you can copy it to a machine that has nothing else of dynskip. First come the
rules for decisions. All three ways of running propose what becomes of frames and accept that in order, by these rules.
So they decide alike. They differ only in how many frames they propose at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import onnxruntime

__all__ = ["ClipResult", "DynskipOnnxError", "FrameResult", "Runner", "Session", "VideoResult", "load", "rehash"]

FORMAT, VERSION = "dynskip-onnx", 2
Array: TypeAlias = np.ndarray[Any, Any]


class DynskipOnnxError(ValueError):
    """An export or a frame cannot be used; the message says what was expected and how to get it."""


# Rules: those of `dynskip.rules` under the same names, here in numpy. `N` gates, `K` classes.

UNSEEN = -1  # `stopped_at` of an unseen frame: its video had ended
SATURATED = 100.0  # a margin as wide as this holds for every threshold


def margins(gate_logits: Array) -> Array:
    """Return forward logits minus stop logits: `(..., 2) -> (...)`."""
    with np.errstate(invalid="ignore", over="ignore"):  # infinite logits may be meant, and a NaN stops the frame
        return np.asarray(gate_logits[..., 1] - gate_logits[..., 0])


def bounds(forward_threshold: Sequence[float]) -> Array:
    """Return the `(N,)` float64 margins that frames have to exceed for these forward probabilities.

    They lie within `SATURATED`, so that no threshold overrules a saturated gate.
    """
    highest = 0.99 * SATURATED
    return np.array([min(max(_logit(p), -SATURATED), highest) for p in forward_threshold])


def forwards(margin: Array, bound: Array | float) -> Array:
    """Say which frames go forward. A NaN stops a frame."""
    return np.asarray(margin > bound)


def stopped(forward: Array) -> Array:
    """Return the first gate that stops each frame, `N` for used frames: `(..., N) -> (...)` from booleans."""
    return np.asarray(forward.cumprod(-1).sum(-1))


def nearness(margin: Array) -> Array:
    """Map a stopped frame's margin to a float64 from 0 to below 1, larger for larger margins; a NaN to -1.5."""
    # The last digits of a softmax would depend on where in a batch a row stands.
    wide = np.asarray(margin, np.float64).clip(-1e30, 1e30)
    return np.asarray(np.nan_to_num((0.5 + 0.5 * wide / (1 + abs(wide))).clip(max=1 - 1e-12), nan=-1.5))


def score(stopped_at: Array | int, margin: Array) -> Array:
    """Score stopped frames by how far they got, then by their gate's margin: above -1, and -2 for unseen frames."""
    gate, near = np.asarray(stopped_at), nearness(margin)
    return np.where(gate < 0, -2.0, np.where(near < 0, -0.5, 2 * gate + near))


def tie(dtype: Any) -> float:
    """Return the difference up to which scores count as equal: more than rounding changes in another batch."""
    return math.sqrt(np.finfo(dtype).eps)


def further(score: float, best: float, tie: float) -> bool:
    """Say whether a frame got further than the best one before it. If they are equal, the earlier one stays."""
    return score > best + tie


class Readout(NamedTuple):
    """How a model's frames make the answers of videos."""

    consensus: Any  # has `initial`, `add` and `answer`, see `load`
    activation: str
    repeats: Sequence[bool]
    of_probabilities: bool = False  # whether the consensus adds probabilities and answers with them
    embedded: bool = False  # whether it adds what the head's graph made for it


class Tally(NamedTuple):
    """What a video's answer is made of."""

    state: Any  # of the consensus
    last: Array | None  # what it took of the last used frame, in float64; frames that repeat it add it once more


def nothing_counted(readout: Readout, zeros: Array) -> Tally:
    """Return what a video's answer is made of before the first frame, from `(K,)` float64 zeros."""
    return Tally(readout.consensus.initial(zeros), None)


def count(readout: Readout, stopped_at: int, values: Array, before: Tally) -> Tally:
    """Add a frame to its video's answer, `values` being its logits or what the graph made for the consensus.

    Frames whose values are not finite do not count. Those that a gate with `repeats` stops count as the last used one.
    """
    used = stopped_at == len(readout.repeats)
    last = values.astype(np.float64) if used else before.last
    counts = used or (stopped_at != UNSEEN and readout.repeats[stopped_at])
    if not counts or last is None or not np.isfinite(last).all():
        return before._replace(last=last)
    added = probabilities(last, readout.activation) if readout.of_probabilities and not readout.embedded else last
    return Tally(readout.consensus.add(before.state, added), last)


def running(readout: Readout, tally: Tally) -> Array:
    """Return the running prediction, `(K,)` logits in float32; NaN before anything has counted."""
    answer = np.asarray(readout.consensus.answer(tally.state))
    return (to_logits(answer, readout.activation) if readout.of_probabilities else answer).astype(np.float32)


def ends(termination: dict[str, Any], running_logits: Array, seen: int, activation: str) -> bool:
    """Say whether a video ends: its `(K,)` running prediction is confident, after more than `min_frames` frames."""
    # A NaN compares false: a video without a prediction goes on.
    confident = confidence(probabilities(running_logits, activation), activation) > np.float32(termination["threshold"])
    return bool(confident) and seen > int(termination["min_frames"])


def _logit(probability: float) -> float:
    if probability in (0.0, 1.0):
        return math.inf if probability else -math.inf
    return math.log(probability) - math.log1p(-probability)


# Those of `dynskip.activation`


def probabilities(logits: Array, activation: str) -> Array:
    """Return the class probabilities of logits, both `(..., K)`."""
    with np.errstate(invalid="ignore", over="ignore"):  # the softmax of infinite logits is NaN
        if activation == "sigmoid":
            return np.asarray(1 / (1 + np.exp(-logits)))
        shifted = np.exp(logits - logits.max(-1, keepdims=True))
        return np.asarray(shifted / shifted.sum(-1, keepdims=True))


def confidence(probabilities: Array, activation: str) -> Array:
    """Return the probability of the top class, or of the least certain decision: `(..., K) -> (...)`."""
    if activation == "sigmoid":
        return np.asarray(np.maximum(probabilities, 1 - probabilities).min(-1))
    return np.asarray(probabilities.max(-1))


def to_logits(values: Array, activation: str) -> Array:
    """Return finite logits whose probabilities are these, both `(..., K)`."""
    limits = np.finfo(values.dtype)
    if activation == "sigmoid":
        values = values.clip(limits.tiny, 1 - limits.eps / 2)
        return np.asarray(np.log(values) - np.log1p(-values))
    return np.asarray(np.log(values.clip(limits.tiny)))


# Those of `dynskip.consensus`, for one video


class Mean:
    """`MeanOfLogits` and `MeanOfProbabilities`."""

    def initial(self, zeros: Array) -> tuple[Array, float]:
        """Start with a sum and the number of frames, or of their weights."""
        return zeros, 0.0

    def add(self, state: tuple[Array, float], values: Array) -> tuple[Array, float]:
        """Add a frame."""
        return state[0] + values, state[1] + 1

    def answer(self, state: tuple[Array, float]) -> Array:
        """Divide the sum by the number."""
        return np.asarray(state[0] / (state[1] or math.nan))


class AttentionMean(Mean):
    """`AttentionMean`: the score is the last of a frame's values."""

    def add(self, state: tuple[Array, float], values: Array) -> tuple[Array, float]:
        """Add a frame."""
        weight = math.exp(min(max(float(values[-1]), -50.0), 50.0))
        return state[0] + weight * values[:-1], state[1] + weight


class TopKMean:
    """`TopKMean`, and `MaxOfLogits` with a `k` of 1."""

    def __init__(self, k: int) -> None:
        self.k = k

    def initial(self, zeros: Array) -> Array:
        """Start with no rows of highest values."""
        return zeros[None][:0]

    def add(self, state: Array, values: Array) -> Array:
        """Put a frame's values in their places."""
        return np.asarray(np.sort(np.vstack([state, values]), 0)[::-1][: self.k])

    def answer(self, state: Array) -> Array:
        """Return the mean of the rows."""
        return np.asarray(state.sum(0) / (len(state) or math.nan))


CONSENSUSES: dict[str, Any] = {
    "MeanOfLogits": Mean,
    "MeanOfProbabilities": Mean,
    "TopKMean": TopKMean,
    "MaxOfLogits": TopKMean,
    "AttentionMean": AttentionMean,
}


# Those of `dynskip.order`


def coarse_to_fine(num_frames: int) -> list[int]:
    """Return which frame each step looks at in FrameExit's order; see `dynskip.CoarseToFine`."""
    found, parts = [num_frames // 2, 0, num_frames - 1], 4
    while 2 * parts <= num_frames:
        found += [num_frames * part // parts for part in _outwards(parts)]
        parts *= 2
    return list(dict.fromkeys(found + _outwards(num_frames)))


def random_order(num_frames: int, seed: int) -> list[int]:
    """Return which frame each step looks at in a random order; see `dynskip.RandomOrder`."""
    source = random.Random(str(seed))
    keys = [source.random() for _ in range(num_frames)]
    return sorted(range(num_frames), key=keys.__getitem__)


def _outwards(count: int) -> list[int]:
    return sorted(range(count), key=lambda n: (abs(n - count // 2), n))


# What comes out


@dataclass(frozen=True)
class FrameResult:
    """What became of one frame of each of a session's `B` videos.

    Attributes:
        stopped_at: `(B,)` index of the gate that stopped the frame; `N` for used frames, -1 for unseen ones, whose
            video had ended before.
        used: `(B,)` boolean, frames that passed every gate.
        gate_logits: `(B, N, 2)` logits (stop, forward), NaN where not evaluated.
        frame_logits: `(B, K)` logits of the frame, NaN unless used.
        running_logits: `(B, K)` running prediction of the video, NaN before the first used frame.
        ended: `(B,)` boolean, videos that need no more frames.
        frame_macs: `(B,)` executed for this frame.
        activation: the model's head activation, which makes probabilities of logits.
    """

    stopped_at: Array
    used: Array
    gate_logits: Array
    frame_logits: Array
    running_logits: Array
    ended: Array
    frame_macs: Array
    activation: str = "softmax"

    @property
    def running_probabilities(self) -> Array:
        """`(B, K)` running class probabilities, NaN before the first used frame."""
        return probabilities(self.running_logits, self.activation)


@dataclass(frozen=True, kw_only=True)
class VideoResult:
    """The answer for a video.

    Attributes:
        logits: `(K,)` what the used frames make (their mean, or another consensus), or the fallback frame alone; NaN
            where neither exists. Frames whose logits are not finite do not count.
        frames_used: number of frames used.
        frames_seen: number of frames looked at.
        fallback_frame: the frame that was run to the end because no frame was used; -1 where frames were used.
        macs: executed cost of the video, gates, head and the fallback included.
        speculative_macs: what was executed beyond `macs`: ahead of decisions, and in vain.
        key: number of the stream among the sources; `None` outside `serve`.
        error: why the stream failed; `None` if it did not. The other fields tell how far it had got.
        activation: the model's head activation, which makes probabilities of logits.
    """

    logits: Array
    frames_used: int
    frames_seen: int
    fallback_frame: int
    macs: float
    speculative_macs: float
    key: int | None = None
    error: Exception | None = None
    activation: str = "softmax"

    @property
    def probabilities(self) -> Array:
        """`(K,)` class probabilities."""
        return probabilities(self.logits, self.activation)


@dataclass(frozen=True, kw_only=True)
class ClipResult(VideoResult):
    """The answer for a stored video, and what became of its `T` frames. What was not evaluated is NaN.

    Attributes:
        stopped_at: `(T,)` index of the gate that stopped each frame; `N` for used frames, -1 for unseen ones.
        frame_logits: `(T, K)` logits of each frame.
        gate_logits: `(T, N, 2)` logits (stop, forward).
    """

    stopped_at: Array
    frame_logits: Array
    gate_logits: Array


# Frames and videos in flight


@dataclass(eq=False)
class _Frame:
    video: _Video
    values: list[Array]  # what enters stage `depth`
    depth: int = 0  # stages run, the head included
    pooled: list[Array] = field(default_factory=list)  # of each stage run
    logits: Array | None = None
    taken: Array | None = None  # by the consensus
    # What its gates say, given the states of now:
    gate_logits: Array = field(default_factory=lambda: np.empty(0))
    states: list[list[Array]] = field(default_factory=list)  # after it, of each gate asked
    stopped_at: int = UNSEEN
    error: Exception | None = None  # raised by a stage, a gate or the head
    # Once it is accepted:
    number: int = 0  # in its video
    score: float = 0.0  # while no frame of its video is used


@dataclass(eq=False)
class _Video:
    """Has nothing that grows with the video: a camera may run for days."""

    states: list[list[Array]]  # of each gate, after the frames accepted
    tally: Tally
    ahead: list[list[Array]] = field(default_factory=list)  # states after the frames proposed
    seen: int = 0  # frames accepted
    used: int = 0
    ended: bool = False
    macs: float = 0.0  # of the frames accepted
    executed: float = 0.0  # all that ran
    furthest: _Frame | None = None  # of the stopped frames; the fallback, until a frame is used


# The runner


def load(
    folder: str | Path,
    *,
    threads: int = 0,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    consensus: Any = None,
    order: Callable[[int], Iterable[int]] | None = None,
) -> Runner:
    """Load what `model.export(folder, ...)` wrote, after checking every file against the manifest.

    Args:
        folder: the exported folder.
        threads: threads of onnxruntime; 0 lets it choose.
        providers: onnxruntime's execution providers, in order of preference.
        consensus: for a model with a consensus of your own: an object with its three methods in numpy, for one video.
            `initial(zeros)` gets `(K,)` float64 zeros and returns a state. `add(state, values)` returns the state after
            a used frame, `values` being a float64 row of what the class gets. `answer(state)` returns `(K,)` float64,
            NaN before the first frame.
        order: for a model with a frame order of your own: which frame each step looks at, from the number of frames.

    Returns:
        The runner.

    Raises:
        DynskipOnnxError: if a file is missing, foreign, changed, or does not fit the others.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    files = {name: _read(folder, name) for name in manifest["sha256"]}
    for name, content in files.items():
        if _hash(content) != manifest["sha256"][name]:
            raise DynskipOnnxError(
                f"{name!r} is not the file that was exported: its hash differs. Copy it again, or, if you changed it "
                "yourself, call `dynskip_onnx.rehash(folder)`."
            )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Every stage and gate is an onnxruntime session with threads of its own: they must not spin while others work.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    # No hash covers weights in further files. onnxruntime would look for them in the working directory; in what is no
    # folder it finds none, and refuses the graph.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    graphs = {}
    for name, content in files.items():
        try:
            graphs[name] = onnxruntime.InferenceSession(content, options, providers=list(providers))
        except Exception as error:
            raise DynskipOnnxError(
                f"onnxruntime {onnxruntime.__version__} cannot load {name!r}: {error}. Update onnxruntime, or export "
                "the model again. A file that you converted must have its weights inside, not in another file."
            ) from error
    return Runner(manifest, graphs, consensus, order)


def rehash(folder: str | Path) -> None:
    """Accept files of an export that you changed, for example quantised: write their hashes into the manifest.

    `load` still checks that they fit the manifest. The weights of a graph have to be in its file.

    Args:
        folder: the exported folder.

    Raises:
        DynskipOnnxError: if the folder has no good manifest, or a file is missing.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    manifest["sha256"] = {name: _hash(_read(folder, name)) for name in manifest["sha256"]}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


class Runner:
    """An exported model and its control loop; made by `load`.

    Attributes:
        manifest: the parsed manifest.
        class_names: name of each class, or `None`.
    """

    def __init__(
        self,
        manifest: dict[str, Any],
        graphs: dict[str, onnxruntime.InferenceSession],
        consensus: Any = None,
        order: Callable[[int], Iterable[int]] | None = None,
    ) -> None:
        self.manifest = manifest
        self._order = _order_of(manifest["order"], order)
        self.class_names: list[str] | None = manifest["class_names"]
        self._graphs = graphs
        self._stages, self._head = manifest["stages"], manifest["head"]
        self._shape, self._classes = tuple(manifest["input"]["shape"]), manifest["num_classes"]
        self._reached = {"used": False, "reached": True}[manifest["state_update"]]
        self._termination = manifest["termination"]
        self._activation, entry = manifest["activation"], manifest["consensus"]
        if self._termination and self._classes < 2 and self._activation == "softmax":
            raise DynskipOnnxError(
                "The manifest ends videos early, but has one class. The probability of one class alone is always 1, so "
                "that every video would end at once. Set `model.terminator` to None, or give the model two outputs, "
                "and export it again."
            )
        self._readout = Readout(
            _consensus_of(entry, self._classes, consensus),
            self._activation,
            [stage["gate"]["repeats_last"] for stage in self._stages],
            entry["of_probabilities"],
            entry["embedded_features"] > 0,
        )
        self._taken = [_rows(entry["embedded_features"])] if self._readout.embedded else []
        # In float32 as the margins are, so that a margin means the same here as in torch.
        self._bounds = bounds([stage["gate"]["forward_threshold"] for stage in self._stages]).astype(np.float32)
        # The head is stage `N`. A cost that is not known is null, and becomes NaN.
        self._costs = np.array([part["macs"] for part in (*self._stages, self._head)], float)
        self._gate_costs = np.array([stage["gate"]["macs"] for stage in self._stages], float)
        per_stage = [*(self._costs[:-1] + self._gate_costs), self._costs[-1]]
        self._by_outcome = np.array([0.0, *np.cumsum(per_stage)])  # of a frame: unseen, stopped at each gate, used
        self._values = [[_rows(*self._shape)], *(stage["values"] for stage in self._stages)]  # what enters each stage
        self._check_graphs()

    def normalise(self, frames: Array) -> Array:
        """Turn frames into what the model takes.

        Args:
            frames: `(..., H, W, C)` frames at the model's size: uint8, or floats from 0 to 1.

        Returns:
            `(..., C, H, W)` float32 frames, normalised.

        Raises:
            DynskipOnnxError: if the frames are anything else, or the model was exported without `mean` and `std`.
        """
        mean, std = self.manifest["input"]["mean"], self.manifest["input"]["std"]
        if mean is None or std is None:
            raise DynskipOnnxError("The model was exported without `mean` and `std`; normalise the frames yourself.")
        frames, (channels, height, width) = np.asarray(frames), self._shape
        is_float = np.issubdtype(frames.dtype, np.floating)
        if frames.shape[-3:] != (height, width, channels) or not (is_float or frames.dtype == np.uint8):
            raise DynskipOnnxError(
                f"Frames must be uint8, or floats from 0 to 1, of shape (..., {height}, {width}, {channels}); got "
                f"{frames.dtype} of {frames.shape}. Resize them, put channels last, and scale other pixels."
            )
        if is_float and not ((frames >= 0) & (frames <= 1)).all():
            raise DynskipOnnxError(
                f"Frames of floats must lie from 0 to 1; these reach from {frames.min()} to {frames.max()}. Divide "
                "8-bit values by 255, or give them as uint8. Do not normalise frames twice."
            )
        scaled = frames.astype(np.float32) if is_float else frames / np.float32(255)
        return np.moveaxis((scaled - np.float32(mean)) / np.float32(std), -1, -3)

    def stream(self, batch: int = 1) -> Session:
        """Open a session for frames that arrive one by one, of one video or of `batch` videos in lock-step."""
        return Session(self, batch)

    def order(self, num_frames: int) -> list[int]:
        """Return which frame each step looks at in a stored video. Sources of streams give frames in this order."""
        found = [int(number) for number in self._order(num_frames)]
        if sorted(found) != list(range(num_frames)):
            raise DynskipOnnxError(
                f"The frame order gives {found} for {num_frames} frames. Return every number from 0 to "
                f"{num_frames - 1} once."
            )
        return found

    def clip(self, video: Array, window: int = 16) -> ClipResult:
        """Run a stored video. Stages take up to `window` frames at once; decisions are those of the online run.

        Args:
            video: `(T, C, H, W)` normalised frames in time, without padding. They are looked at in the model's order.
            window: frames that may run ahead of the decisions before them.

        Returns:
            The result.

        Raises:
            DynskipOnnxError: if the video is empty or a frame has the wrong shape, dtype or values.
        """
        if len(video) == 0 or window < 1:
            raise DynskipOnnxError(f"A clip needs frames and a positive window; got {len(video)} frames, {window=}.")
        numbers = self.order(len(video))
        state, images = self._begin(), [self._image(video[number]) for number in numbers]
        stages, stopped_at = len(self._stages), np.full(len(images), UNSEEN)
        frame_logits = np.full((len(images), self._classes), np.nan, np.float32)
        gate_logits = np.full((len(images), stages, 2), np.nan, np.float32)
        for start in range(0, len(images), window):
            for frame in self._decide([_Frame(state, [image]) for image in images[start : start + window]]):
                number = numbers[frame.number]
                stopped_at[number], gate_logits[number] = frame.stopped_at, frame.gate_logits
                if frame.stopped_at == stages:
                    frame_logits[number] = frame.logits
            if state.ended:
                break
        answer = vars(self._finish(state))
        if state.furthest is not None:
            answer["fallback_frame"] = numbers[answer["fallback_frame"]]
            frame_logits[answer["fallback_frame"]] = state.furthest.logits
        return ClipResult(**answer, stopped_at=stopped_at, frame_logits=frame_logits, gate_logits=gate_logits)

    def serve(self, sources: Iterable[Iterable[Array]], capacity: int = 16) -> Iterator[VideoResult]:
        """Run many streams together, one frame of each at a time. When a stream ends, the next one takes its place.

        Args:
            sources: streams of `(C, H, W)` normalised frames. Each is read only when its turn comes, and no further
                once its video has ended.
            capacity: streams that run at the same time.

        Yields:
            The result of each stream as it ends, with its number as `key`. A stream fails alone: if it raises, or sends
            a frame that is bad or that a stage, a gate or the head cannot take, its result has an `error`.
        """
        if capacity < 1:
            raise DynskipOnnxError(f"{capacity=} streams can never finish; give a positive number.")
        waiting = enumerate(sources)
        active: dict[int, tuple[_Video, Generator[Array, None, None]]] = {}
        while True:
            for key, source in islice(waiting, capacity - len(active)):
                active[key] = self._begin(), _opened(source)
            if not active:
                return
            frames: dict[int, _Frame] = {}
            over: dict[int, Exception | None] = {}
            for key, (video, source) in active.items():
                try:
                    frames[key] = _Frame(video, [self._image(next(source))])
                except StopIteration:
                    empty = DynskipOnnxError(f"Stream {key} ended before its first frame.")
                    over[key] = None if video.seen else empty
                except Exception as error:
                    over[key] = error
            self._propose(list(frames.values()))
            for key, frame in frames.items():
                if frame.error is None:
                    self._accept(frame)
                if frame.error is not None or active[key][0].ended:
                    over[key] = frame.error
            results = []
            for key, fault in over.items():
                video, source = active.pop(key)
                with contextlib.suppress(Exception):
                    source.close()
                try:
                    results.append(self._finish(video, key, fault))
                except Exception as error:  # from running the fallback
                    results.append(self._finish(video, key, error))
            yield from results

    def _image(self, frame: Array) -> Array:
        frame = np.asarray(frame)
        if frame.shape != self._shape or not np.issubdtype(frame.dtype, np.floating):
            raise DynskipOnnxError(
                f"A frame must be normalised floats of shape {self._shape}; got {frame.dtype} of {frame.shape}. "
                "`runner.normalise` turns (H, W, C) pictures into them."
            )
        image = frame[None].astype(np.float32)
        if not np.isfinite(image).all():
            raise DynskipOnnxError("A frame has NaN or infinite values. Check decoding and normalisation.")
        return image

    def _begin(self) -> _Video:
        states = [
            [np.full(state["shape"], state["value"], np.float32) for state in stage["gate"]["initial_state"]]
            for stage in self._stages
        ]
        return _Video(states, nothing_counted(self._readout, np.zeros(self._classes)))

    def _decide(self, pending: list[_Frame]) -> Iterator[_Frame]:
        """Decide on frames of one video in order, until it ends."""
        video = pending[0].video
        while pending:
            self._propose(pending)
            while pending:
                frame = pending.pop(0)
                if frame.error is not None:
                    raise frame.error
                self._accept(frame)
                yield frame
                if video.ended:
                    return
                if frame.stopped_at == len(self._stages) and not self._reached:
                    break  # it changed the states, so propose the frames after it again; their features stay

    def _propose(self, frames: list[_Frame]) -> None:
        """Take frames as far as their gates let them, given the states of now. Errors stay with the frames."""
        stages, going = len(self._stages), frames
        said = np.full((len(frames), stages, 2), np.nan, np.float32)
        for frame, row in zip(frames, said, strict=True):
            frame.gate_logits, frame.states, frame.error = row, [], None
            frame.video.ahead = list(frame.video.states)
        # Where every frame changes the state, frames of one video ask their gate one after the other.
        one_by_one = self._reached and len({id(frame.video) for frame in frames}) < len(frames)
        for n in range(stages):
            self._each(self._run_stage, self._costs, n, [frame for frame in going if frame.depth == n])
            for group in [[frame] for frame in going] if one_by_one else [going]:
                self._each(self._run_gate, self._gate_costs, n, group)
            # Gates that were not asked have NaN, which stops a frame.
            for frame, gate in zip(frames, stopped(forwards(margins(said), self._bounds)).tolist(), strict=True):
                frame.stopped_at = gate
            going = [frame for frame in going if frame.stopped_at > n]
        self._each(self._run_stage, self._costs, stages, [frame for frame in going if frame.depth == stages])

    def _each(self, run: Callable[[int, list[_Frame]], None], costs: Array, n: int, frames: list[_Frame]) -> None:
        """Run a part on a batch of frames. If that raises, run it on each frame alone, to find whose fault it is."""
        frames = [frame for frame in frames if frame.error is None]
        if not frames:
            return
        try:
            run(n, frames)
        except Exception as error:
            if len(frames) == 1:
                frames[0].error = error
                return
            for frame in frames:
                self._each(run, costs, n, [frame])
            return
        for frame in frames:
            frame.video.executed += costs[n]

    def _run_stage(self, n: int, frames: list[_Frame]) -> None:
        """Run a stage, or the head, which is stage `N`."""
        inputs = [
            np.concatenate([frame.values[k] for frame in frames]) if value["rows"] else frames[0].values[k]
            for k, value in enumerate(self._values[n])
        ]
        at_head = n == len(self._stages)
        file = (self._head if at_head else self._stages[n])["file"]
        first, *outputs = self._call(file, inputs)
        for array, value in zip(outputs, self._taken if at_head else self._values[n + 1], strict=True):
            if value["rows"] and len(array) != value["rows"] * len(frames):  # a graph's own shape does not tell
                raise DynskipOnnxError(
                    f"{file!r} gave {len(array)} rows for {len(frames)} frames, and the manifest says {value['rows']} "
                    "a frame. Export the model again."
                )
        for i, frame in enumerate(frames):
            if at_head:
                frame.logits, frame.taken = first[i], (outputs or [first])[0][i]
            else:
                frame.pooled.append(first[i])
                frame.values = [
                    array[i * value["rows"] : (i + 1) * value["rows"]].copy() if value["rows"] else array
                    for array, value in zip(outputs, self._values[n + 1], strict=True)
                ]
            frame.depth = n + 1

    def _run_gate(self, n: int, frames: list[_Frame]) -> None:
        states = zip(*(frame.video.ahead[n] for frame in frames), strict=True)
        inputs = [np.stack([frame.pooled[n] for frame in frames]), *(np.stack(parts) for parts in states)]
        logits, *new = self._call(self._stages[n]["gate"]["file"], inputs)
        for i, frame in enumerate(frames):
            frame.gate_logits[n] = logits[i]
            frame.states.append([state[i] for state in new])
            if self._reached:
                frame.video.ahead[n] = frame.states[n]

    def _accept(self, frame: _Frame) -> None:
        """Make what was proposed for a video's next frame final."""
        video, n = frame.video, frame.stopped_at
        frame.number = video.seen
        if n == len(self._stages):
            video.furthest = None
            video.used += 1
        elif not video.used:
            frame.score = float(score(n, margins(frame.gate_logits[n])))
            if video.furthest is None or further(frame.score, video.furthest.score, tie(np.float32)):
                video.furthest = frame
                del frame.video  # if both referred to each other, only the garbage collector would free them
        if self._reached or n == len(self._stages):
            video.states[: len(frame.states)] = frame.states
        video.seen += 1
        video.macs += self._by_outcome[n + 1]
        taken = np.empty(0) if frame.taken is None else frame.taken
        video.tally = count(self._readout, n, taken, video.tally)
        if self._termination:
            so_far = running(self._readout, video.tally)
            video.ended = ends(self._termination, so_far, video.seen, self._activation)

    def _finish(self, video: _Video, key: int | None = None, error: Exception | None = None) -> VideoResult:
        """Conclude a video as if it ended here. Of one that failed, no stage is run."""
        stages, tally, macs, fallback = len(self._stages), video.tally, video.macs, -1
        if video.furthest is not None and error is None:
            frame, fallback = video.furthest, video.furthest.number
            for n in range(frame.depth, stages + 1):  # what ran already stays, so that asking again costs nothing
                self._run_stage(n, [frame])
                video.executed += self._costs[n]
            assert frame.taken is not None
            # It counts as the one used frame of its video.
            tally = nothing_counted(self._readout, np.zeros(self._classes))
            tally = count(self._readout, stages, frame.taken, tally)
            macs += self._costs[frame.stopped_at + 1 :].sum()
        return VideoResult(
            logits=running(self._readout, tally),
            frames_used=video.used,
            frames_seen=video.seen,
            fallback_frame=fallback,
            macs=float(macs),
            speculative_macs=float(video.executed - macs),
            key=key,
            error=error,
            activation=self._activation,
        )

    def _call(self, name: str, inputs: Sequence[Array]) -> list[Array]:
        graph = self._graphs[name]
        taken = {entry.name for entry in graph.get_inputs()}  # an exporter may drop what a graph does not read
        feed = {f"in_{i}": array for i, array in enumerate(inputs) if f"in_{i}" in taken}
        return [np.asarray(output) for output in graph.run(None, feed)]

    def _check_graphs(self) -> None:
        """Compare the shapes of every graph with the manifest."""
        for n, stage in enumerate(self._stages):
            pooled, states = _rows(stage["channels"]), [_rows(*s["shape"]) for s in stage["gate"]["initial_state"]]
            self._check_graph(stage["file"], self._values[n], [pooled, *self._values[n + 1]])
            self._check_graph(stage["gate"]["file"], [pooled, *states], [_rows(2), *states])
        self._check_graph(self._head["file"], self._values[-1], [_rows(self._classes), *self._taken])

    def _check_graph(self, name: str, inputs: list[Any], outputs: list[Any]) -> None:
        graph = self._graphs[name]
        wanted = {f"in_{i}": value for i, value in enumerate(inputs)}
        pairs = [(entry, wanted.get(entry.name)) for entry in graph.get_inputs()]
        pairs += list(zip_longest(graph.get_outputs(), outputs))
        for entry, value in pairs:
            if entry is None or value is None or not _fits(entry, value):
                got = "nothing" if entry is None else f"{entry.name} {entry.type} {entry.shape}"
                raise DynskipOnnxError(
                    f"{name!r} has {got} where the manifest says {value}. Export the model again. If you converted the "
                    "file, keep the types and shapes of its inputs and outputs."
                )


class Session:
    """Videos whose frames arrive one by one; made by `Runner.stream`."""

    def __init__(self, runner: Runner, batch: int) -> None:
        if batch < 1:
            raise DynskipOnnxError(f"A session needs at least one video; got {batch=}.")
        self._runner = runner
        self._videos = [runner._begin() for _ in range(batch)]

    def __call__(self, frames: Array) -> FrameResult:
        """Take the next frame of each video. Frames of ended videos are not looked at.

        Args:
            frames: `(B, C, H, W)` normalised frames.

        Returns:
            What became of them.

        Raises:
            DynskipOnnxError: if there is not one frame a video, or a frame has the wrong shape, dtype or values. After
                any error, the session is as it was.
        """
        if len(frames) != len(self._videos):
            raise DynskipOnnxError(f"Got {len(frames)} frames for {len(self._videos)} videos; give one for each.")
        runner = self._runner
        rows = [row for row, video in enumerate(self._videos) if not video.ended]
        taken = [_Frame(self._videos[row], [runner._image(frames[row])]) for row in rows]
        runner._propose(taken)
        for frame in taken:
            if frame.error is not None:
                raise frame.error
        batch, stages = len(self._videos), len(runner._stages)
        stopped_at = np.full(batch, UNSEEN)
        gate_logits = np.full((batch, stages, 2), np.nan, np.float32)
        frame_logits = np.full((batch, runner._classes), np.nan, np.float32)
        for row, frame in zip(rows, taken, strict=True):
            runner._accept(frame)
            stopped_at[row], gate_logits[row] = frame.stopped_at, frame.gate_logits
            if frame.stopped_at == stages:
                frame_logits[row] = frame.logits
        return FrameResult(
            stopped_at=stopped_at,
            used=stopped_at == stages,
            gate_logits=gate_logits,
            frame_logits=frame_logits,
            running_logits=np.stack([running(runner._readout, video.tally) for video in self._videos]),
            ended=np.array([video.ended for video in self._videos]),
            frame_macs=runner._by_outcome[stopped_at + 1],
            activation=runner._activation,
        )

    def result(self, row: int = 0) -> VideoResult:
        """Conclude a video as if it ended here. If no frame was used, the furthest one is run to the end."""
        video = self._videos[row]
        if not video.seen:
            raise DynskipOnnxError(f"Video {row} has had no frame yet; there is nothing to conclude.")
        return self._runner._finish(video)

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """Start new videos in these rows, or in all."""
        for row in range(len(self._videos)) if rows is None else rows:
            self._videos[row] = self._runner._begin()


# Files. Every entry of the manifest that the runner reads is checked before anything is made from it.


def _whole(low: int) -> tuple[str, Callable[[Any], bool]]:
    return f"a whole number of at least {low}", lambda value: type(value) is int and low <= value < 2**63


def _number(what: str, low: float, high: float) -> tuple[str, Callable[[Any], bool]]:
    _, is_whole = _whole(-(2**63))
    return what, lambda value: (type(value) is float or is_whole(value)) and low <= value <= high


LOWEST, HIGHEST = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))  # above 0, and finite
TEXT = ("text", lambda value: isinstance(value, str))
BOOLEAN = ("true or false", lambda value: isinstance(value, bool))
COST = _number("a number of at least 0", 0, HIGHEST)
# What folders of version 1 lack.
EARLIER = {
    "activation": "softmax",
    "order": None,
    "consensus": {"name": "MeanOfLogits", "k": None, "of_probabilities": False, "embedded_features": 0},
}
# What each entry has to be. A "?" after its name means: or null. A list may hold any number of what is in it.
MANIFEST: dict[str, Any] = {
    "input": {
        "shape": [_whole(1)],
        "mean?": [_number("a finite number", -HIGHEST, HIGHEST)],
        "std?": [_number("a finite number above 0", LOWEST, HIGHEST)],
    },
    "num_classes": _whole(1),
    "class_names?": [TEXT],
    "activation": ("'softmax' or 'sigmoid'", lambda value: value in ("softmax", "sigmoid")),
    "consensus": {"name": TEXT, "k?": _whole(1), "of_probabilities": BOOLEAN, "embedded_features": _whole(0)},
    "state_update": ("'used' or 'reached'", lambda value: value in ("used", "reached")),
    "order?": {"name": TEXT, "seed?": _whole(-(2**63))},
    "termination?": {"threshold": _number("a number above 0, at most 1", math.ulp(0.0), 1), "min_frames": _whole(0)},
    "unit": TEXT,
    "stages": [
        {
            "name": TEXT,
            "file": TEXT,
            "channels": _whole(1),
            "values": [{"rows": _whole(0), "shape": [_whole(0)], "dtype": TEXT}],
            "gate": {
                "file": TEXT,
                "forward_threshold": _number("a number from 0 to 1", 0, 1),
                "repeats_last": BOOLEAN,
                "initial_state": [{"shape": [_whole(0)], "value": _number("a number", -math.inf, math.inf)}],
                "macs?": COST,
            },
            "macs?": COST,
        }
    ],
    "head": {"file": TEXT, "macs?": COST},
    "sha256": {},
}


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest and check its entries."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = (manifest["format"], manifest["version"])
    except (FileNotFoundError, NotADirectoryError):
        raise DynskipOnnxError(
            f"{folder} has no manifest.json. Name a folder that model.export(folder, ...) wrote."
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DynskipOnnxError(f"{path} is no manifest of an exported model ({error!r}). Export it again.") from error
    if found not in [(FORMAT, version) for version in range(1, VERSION + 1)]:
        raise DynskipOnnxError(
            f"{path} is of format {found[0]!r}, version {found[1]}; this runner reads {FORMAT!r}, versions 1 to "
            f"{VERSION}. Export the model again with the release of dynskip that this runner comes from."
        )
    manifest = {**EARLIER, **manifest} if found[1] == 1 else manifest
    _check_entry("", manifest, MANIFEST)
    entry, stages, hashes = manifest["input"], manifest["stages"], manifest["sha256"]
    _check_length("input.shape", entry["shape"], 3)
    for name in ("mean", "std"):
        _check_length(f"input.{name}", entry[name], entry["shape"][0])
    _check_length("class_names", manifest["class_names"], manifest["num_classes"])
    _check_length("stages", stages, len(stages) or 1)
    for part in (*stages, *(stage["gate"] for stage in stages), manifest["head"]):
        if part["file"] not in hashes:
            raise _bad(f"sha256.{part['file']}", "nothing", "the hash of this file")
    return dict(manifest)


def _check_entry(name: str, value: Any, wanted: Any) -> None:
    """Compare an entry of the manifest, and all within it, with what it has to be."""
    if isinstance(wanted, tuple):
        what, holds = wanted
        if not holds(value):
            raise _bad(name, repr(value), what)
    elif not isinstance(value, type(wanted)):
        raise _bad(name, repr(value), "a list" if isinstance(wanted, list) else "a dictionary")
    elif isinstance(wanted, list):
        for i, item in enumerate(value):
            _check_entry(f"{name}[{i}]", item, wanted[0])
    else:
        for key, inner in wanted.items():
            entry = key.removesuffix("?")
            path = f"{name}.{entry}" if name else entry
            if entry not in value:
                raise _bad(path, "nothing", "an entry")
            if value[entry] is not None or entry == key:
                _check_entry(path, value[entry], inner)


def _check_length(name: str, values: list[Any] | None, count: int) -> None:
    if values is not None and len(values) != count:
        raise _bad(name, repr(values), f"{count} of them")


def _bad(name: str, got: str, wanted: str) -> DynskipOnnxError:
    return DynskipOnnxError(f"The manifest says {got:.80} for {name!r}; expected {wanted}. Export the model again.")


def _read(folder: Path, name: str) -> bytes:
    """Read a file that the manifest names."""
    if Path(name).name != name:
        raise DynskipOnnxError(f"The manifest names {name!r}, which lies outside its folder. Do not trust it.")
    if not (folder / name).is_file():
        raise DynskipOnnxError(f"{name!r} is missing from {folder}. Copy the whole folder.")
    return (folder / name).read_bytes()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _rows(*shape: int) -> dict[str, Any]:
    """Describe a float32 array with one row a frame, as the manifest does."""
    return {"rows": 1, "shape": list(shape), "dtype": "float32"}


def _fits(entry: Any, value: dict[str, Any]) -> bool:
    names = {"float32": "float", "float64": "double"}
    wanted = ([None] if value["rows"] else []) + list(value["shape"])
    return (
        entry.type == f"tensor({names.get(value['dtype'], value['dtype'])})"
        and len(entry.shape) == len(wanted)
        and not (value["rows"] and isinstance(entry.shape[0], int))
        and all(w is None or g == w for g, w in zip(entry.shape, wanted, strict=True))
    )


def _order_of(entry: Any, own: Callable[[int], Iterable[int]] | None) -> Callable[[int], Iterable[int]]:
    """Return the frame order that a manifest names."""
    name = None if entry is None else entry["name"]
    if name in (None, "CoarseToFine", "RandomOrder"):
        if own is not None:
            raise DynskipOnnxError(
                f"The model looks at frames in the order {name or 'of time'}. Leave `order` out, or set `model.order` "
                "and export it again."
            )
        if name == "RandomOrder":
            return partial(random_order, seed=entry["seed"])
        return coarse_to_fine if name else range
    if own is None:
        raise DynskipOnnxError(
            f"The model looks at frames in an order of its own, {name}. Give the function that makes it: "
            "load(folder, order=...)."
        )
    return own


def _consensus_of(entry: dict[str, Any], classes: int, own: Any) -> Any:
    """Return the consensus that a manifest names, or the user's own."""
    name, width = entry["name"], entry["embedded_features"]
    if name not in CONSENSUSES:
        if own is None:
            raise DynskipOnnxError(
                f"The model's answers come from a consensus of its own, {name}. Give it in numpy: load(folder, "
                "consensus=...), an object with `initial`, `add` and `answer`."
            )
        return own
    if own is not None:
        raise DynskipOnnxError(f"The model's answers come from {name}, which this runner has. Leave `consensus` out.")
    kind = CONSENSUSES[name]
    if width != (classes + 1 if kind is AttentionMean else 0):
        raise _bad("consensus.embedded_features", repr(width), f"another width for {name}")
    if kind is TopKMean:
        if entry["k"] is None:
            raise _bad("consensus.k", "nothing", f"a number for {name}")
        return TopKMean(entry["k"])
    return kind()


def _opened(source: Iterable[Array]) -> Generator[Array, None, None]:
    """Open a source only when its first frame is asked for, so that one that cannot be opened fails as a stream."""
    yield from source
