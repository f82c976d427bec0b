"""Videos that are encoded once, and what a model does on them with other thresholds, or on fewer frames."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynskip import rules
from dynskip._check import check_lengths, present, with_lengths
from dynskip._modes import in_mode
from dynskip.activation import probabilities
from dynskip.calibrate._groups import band, numbered
from dynskip.calibrate._points import CurvePoint, Gated, Termination, check_fits, set_termination
from dynskip.errors import DynskipError
from dynskip.metrics import sample_times, top_k_accuracy
from dynskip.order import in_steps, in_time, steps
from dynskip.output import EncodedVideo, SkipOutput, masked_output

Video = Tensor | tuple[Tensor, Tensor] | EncodedVideo
Batches = Iterable[tuple[Video, Tensor] | tuple[Video, Tensor, Sequence[str]]]
Metric = Callable[[Tensor, Tensor], float]
Groups = Sequence[Hashable] | None


@torch.no_grad()
def encode(model: Gated, batches: Batches) -> list[tuple[EncodedVideo, Tensor]]:
    """Run the backbone once on videos, and keep what gates and predictions need.

    Pass the result where this module takes videos, and the backbone does not run again.

    Args:
        model: the model; videos are moved to its device.
        batches: `(videos, targets)` or `(videos, targets, keys)`, each a batch. Videos of different length are padded,
            and are `(videos, lengths)` in the place of `videos`. Those that are encoded already stay as they are.

    Returns:
        The encoded batches, on the model's device.

    Raises:
        DynskipError: if there are no videos, videos or targets do not fit, or a softmax has one output.
    """
    if model.backbone.num_classes == 1 and model.activation == "softmax":
        raise DynskipError(
            "The model has one output, and the softmax of a single logit is always 1, so that all thresholds would "
            "seem right. Build the model with activation='sigmoid', or give it two outputs, one of them for \"no\" "
            "(num_classes=2), and calibrate that."
        )
    device = next(model.backbone.parameters(), torch.empty(0)).device
    encoded = []
    with in_mode(model, False):
        for batch in batches:
            if not isinstance(batch, Sequence) or len(batch) not in (2, 3):
                raise DynskipError(
                    f"Expected batches (videos, targets); got a {type(batch).__name__}. A DataLoader over pairs gives "
                    "such batches; for one batch, pass [(videos, targets)]."
                )
            videos, targets = batch[0], torch.as_tensor(batch[1])
            if not isinstance(videos, EncodedVideo):
                videos, lengths = with_lengths(videos)
                run: Any = model.encode
                videos = run(videos) if lengths is None else run(videos, lengths)
            pooled, logits = tuple(part.to(device) for part in videos.pooled), videos.frame_logits.to(device)
            if targets.ndim not in (1, 2) or len(targets) != len(logits):
                raise DynskipError(
                    f"Got targets {tuple(targets.shape)} for {len(logits)} videos; give one class index a video, or "
                    "one row of a multi-hot table."
                )
            lengths = None if videos.lengths is None else videos.lengths.to(device)
            real = ... if lengths is None else present(lengths, logits.shape[1])
            if not all(part[real].isfinite().all() for part in (*pooled, logits)):
                raise DynskipError("Features or logits have NaN or infinite values. Check the weights; encode again.")
            encoded.append((EncodedVideo(pooled, logits, videos.image_size, lengths), targets))
    if not encoded:
        raise DynskipError(
            "There are no validation videos. Give an iterable of (videos, targets); a generator can be read only once."
        )
    return encoded


def replay(
    model: Gated, batches: Batches, point: CurvePoint, *, metric: Metric = top_k_accuracy, groups: Groups = None
) -> CurvePoint:
    """Measure thresholds on other videos, such as a test set.

    Args:
        model: the model that was calibrated.
        batches: as in `to_budget`.
        point: the thresholds.
        metric: as in `to_budget`.
        groups: with them, the point gets a band, as in `curve`.

    Returns:
        The same thresholds, with accuracy and MACs on these videos.

    Raises:
        DynskipError: as `CurvePoint.apply`; if there are no videos, or something does not fit.
    """
    check_fits(point, model)
    replayed = Replay(model, batches, metric, groups)
    return replayed.point(replayed.run(point), point.forward_threshold, point.termination_threshold)


def dense(model: Gated, batches: Batches, *, metric: Metric = top_k_accuracy, groups: Groups = None) -> CurvePoint:
    """Measure the dense network: every frame, no gates. Everything else is compared with it.

    Args:
        model: as in `to_budget`.
        batches: as in `to_budget`.
        metric: as in `to_budget`.
        groups: as in `replay`.

    Returns:
        Its accuracy and MACs.

    Raises:
        DynskipError: if there are no videos, or something does not fit.
    """
    replayed = Replay(model, batches, metric, groups)
    return replayed.point(replayed.dense())


def uniform_frames(
    model: Gated, batches: Batches, *, metric: Metric = top_k_accuracy, groups: Groups = None
) -> tuple[CurvePoint, ...]:
    """Measure the network without gates on few frames of each video, spread evenly: a baseline for curves.

    Args:
        model: as in `to_budget`.
        batches: as in `to_budget`.
        metric: as in `to_budget`.
        groups: as in `replay`.

    Returns:
        One point for each number of frames, from one to all. Frames that are left out cost nothing.

    Raises:
        DynskipError: if there are no videos, or something does not fit.
    """

    def pick(count: int, lengths: Tensor, frames: int) -> Tensor:
        own = [sample_times(min(count, length), length).long() for length in lengths.tolist()]
        return torch.stack([torch.isin(torch.arange(frames), numbers) for numbers in own])

    return Replay(model, batches, metric, groups).by_count(pick)


def random_frames(
    model: Gated, batches: Batches, *, seed: int = 0, metric: Metric = top_k_accuracy, groups: Groups = None
) -> tuple[CurvePoint, ...]:
    """Measure the network without gates on few frames of each video, drawn at random: a baseline for curves.

    Args:
        model: as in `to_budget`.
        batches: as in `to_budget`.
        seed: different seeds draw different frames.
        metric: as in `to_budget`.
        groups: as in `replay`.

    Returns:
        One point for each number of frames, from one to all. Frames that are left out cost nothing.

    Raises:
        DynskipError: if there are no videos, or something does not fit.
    """
    generator = torch.Generator().manual_seed(seed)

    def pick(count: int, lengths: Tensor, frames: int) -> Tensor:
        real = present(lengths, frames)
        drawn = torch.rand(real.shape, generator=generator).masked_fill(~real, 2.0)
        return (drawn.argsort(1).argsort(1) < count) & real

    return Replay(model, batches, metric, groups).by_count(pick)


class Outcome(NamedTuple):
    """What became of `V` videos: `(V, K)` probabilities and `(V,)` MACs."""

    probabilities: Tensor
    macs: Tensor


class Replay:
    """Encoded videos, and what a model does on them. With groups, its points have bands."""

    def __init__(self, model: Gated, batches: Batches, metric: Metric, groups: Groups = None) -> None:
        self.model, self.metric, self.videos = model, metric, encode(model, batches)
        targets = [target.cpu() for _, target in self.videos]
        if len({target.shape[1:] for target in targets}) > 1:
            raise DynskipError("Targets of some batches are class indices and of others multi-hot; give one kind.")
        self.targets = torch.cat(targets)
        self.tables = [_table(model, encoded) for encoded, _ in self.videos]
        self.groups = None if groups is None else numbered(groups, len(self.targets))

    def rows(self, rows: Tensor) -> Replay:
        """Return some of the videos, in their order, without groups."""
        part = copy.copy(self)
        marked = torch.isin(torch.arange(len(self.targets)), rows)
        part.videos, part.groups = [], None
        start = 0
        for encoded, targets in self.videos:
            own = marked[start : (start := start + len(targets))].nonzero().flatten()
            if len(own):
                part.videos.append((_select(encoded, own.to(encoded.frame_logits.device)), targets[own]))
        part.targets, part.tables = self.targets[marked], [_table(self.model, encoded) for encoded, _ in part.videos]
        return part

    def decide(self, forward_threshold: tuple[float, ...]) -> list[tuple[SkipOutput, Tensor]]:
        """Gate all videos, to their ends. With each output come the predictions after each frame, `(B, T, K)`.

        Both are in the order in which the model looks at frames.
        """
        model = self.model
        own, terminator = model.forward_threshold, model.terminator
        try:
            model.forward_threshold, model.terminator = forward_threshold, None
            with torch.no_grad(), in_mode(model, False):
                outputs = [model.decide(encoded) for encoded, _ in self.videos]
        finally:
            model.forward_threshold, model.terminator = own, terminator
        decided = []
        for output, (encoded, _), table in zip(outputs, self.videos, self.tables, strict=True):
            looked = in_time(output, None if table is None else table.argsort(1))
            logits = in_steps(encoded.frame_logits, table)
            decided.append((looked, rules.read(model.readout, looked.stopped_at, logits)))
        return decided

    def run(self, point: CurvePoint) -> Outcome:
        """Gate all videos with a point's thresholds."""
        return self.outcomes(self.decide(point.forward_threshold), [point.termination_threshold])[0]

    def outcomes(
        self, decided: Sequence[tuple[SkipOutput, Tensor]], terminations: Sequence[Termination]
    ) -> list[Outcome]:
        """Return what becomes of the videos that `decide` gated for each way to end them; `None` reads them to the end.

        All ways go through the rules as one batch.
        """
        model, terminator = self.model, copy.copy(self.model.terminator)
        given = [termination for termination in terminations if termination is not None]
        unended = self._joined([output.logits for output, _ in decided], [output.macs for output, _ in decided])
        if terminator is None or not given:
            return [unended for _ in terminations]
        logits, macs = [], []
        for (encoded, _), table, (output, running) in zip(self.videos, self.tables, decided, strict=True):
            stopped_at = []
            for termination in given:
                set_termination(terminator, termination)
                stopped_at.append(rules.end_videos(terminator, running, output.stopped_at, model.activation))
            assert output.gate_logits is not None
            ended = masked_output(
                torch.cat(stopped_at),
                output.gate_logits.repeat(len(given), 1, 1, 1),
                in_steps(encoded.frame_logits, table).repeat(len(given), 1, 1),
                model.lookup_for(encoded.image_size),
                model.readout,
            )
            logits.append(ended.logits.chunk(len(given)))
            macs.append(ended.macs.chunk(len(given)))
        outcomes = map(self._joined, zip(*logits, strict=True), zip(*macs, strict=True))
        return [unended if termination is None else next(outcomes) for termination in terminations]

    def frames(self, pick: Callable[[Tensor, int], Tensor]) -> Outcome:
        """Run the network without gates on the frames that `pick(lengths, T)` marks, `(B, T)`."""
        logits, macs = [], []
        for (encoded, _), table in zip(self.videos, self.tables, strict=True):
            batch, frames, _ = encoded.frame_logits.shape
            lengths = torch.full((batch,), frames) if encoded.lengths is None else encoded.lengths.cpu()
            picked = in_steps(pick(lengths, frames).to(encoded.frame_logits.device), table)
            # As a model of one gate that stops all frames except the picked ones.
            readout = self.model.readout._replace(repeats=(False,))
            logits.append(rules.read(readout, picked.long(), in_steps(encoded.frame_logits, table))[:, -1])
            macs.append(picked.sum(1).double() * self.model.lookup_for(encoded.image_size).dense)
        return self._joined(logits, macs)

    def dense(self) -> Outcome:
        """Run the dense network: all frames, no gates."""
        return self.frames(present)

    def by_count(self, pick: Callable[[int, Tensor, int], Tensor]) -> tuple[CurvePoint, ...]:
        """Measure it without gates on 1, 2, ... frames of each video, which `pick(count, lengths, T)` marks."""
        most = max(encoded.frame_logits.shape[1] for encoded, _ in self.videos)
        return tuple(self.point(self.frames(partial(pick, count))) for count in range(1, most + 1))

    def point(self, outcome: Outcome, *thresholds: Any) -> CurvePoint:
        """Compare all videos' answers with the targets."""
        answers, targets = outcome.probabilities, self.targets
        edges = None
        if self.groups is not None:
            edges = band(lambda rows: float(self.metric(answers[rows], targets[rows])), self.groups)
        point = CurvePoint(float(self.metric(answers, targets)), float(outcome.macs.mean()), *thresholds)
        return replace(point, band=edges)

    def _joined(self, logits: Sequence[Tensor], macs: Sequence[Tensor]) -> Outcome:
        answers = [probabilities(part, self.model.activation) for part in logits]
        return Outcome(torch.cat(answers).cpu(), torch.cat(list(macs)).cpu())


def _select(encoded: EncodedVideo, rows: Tensor) -> EncodedVideo:
    """Return some of the encoded videos."""
    pooled, lengths = tuple(part[rows] for part in encoded.pooled), encoded.lengths
    lengths = None if lengths is None else lengths[rows]
    return replace(encoded, pooled=pooled, frame_logits=encoded.frame_logits[rows], lengths=lengths)


def _table(model: Gated, encoded: EncodedVideo) -> Tensor | None:
    batch, frames, _ = encoded.frame_logits.shape
    return steps(model.order, batch, frames, check_lengths(encoded.lengths, batch, frames))
