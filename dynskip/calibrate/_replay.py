"""Videos that are encoded once, and what a model does on them with other thresholds, or on fewer frames."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dynskip import rules
from dynskip._check import check_lengths, present, with_lengths
from dynskip._modes import in_mode
from dynskip.activation import probabilities
from dynskip.calibrate._points import CurvePoint, Gated, check_fits
from dynskip.errors import DynskipError
from dynskip.metrics import sample_times, top_k_accuracy
from dynskip.order import in_steps, in_time, steps
from dynskip.output import EncodedVideo, SkipOutput, masked_output

Video = Tensor | tuple[Tensor, Tensor] | EncodedVideo
Batches = Iterable[tuple[Video, Tensor] | tuple[Video, Tensor, Sequence[str]]]
Metric = Callable[[Tensor, Tensor], float]


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
        DynskipError: if there are no videos, videos or targets do not fit, or the model has one output.
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


def replay(model: Gated, batches: Batches, point: CurvePoint, *, metric: Metric = top_k_accuracy) -> CurvePoint:
    """Measure thresholds on other videos, such as a test set.

    Args:
        model: the model that was calibrated.
        batches: as in `to_budget`.
        point: the thresholds.
        metric: as in `to_budget`.

    Returns:
        The same thresholds, with accuracy and MACs on these videos.

    Raises:
        DynskipError: as `CurvePoint.apply`; if there are no videos, or something does not fit.
    """
    check_fits(point, model)
    replayed = Replay(model, batches, metric)
    return replayed.end(replayed.decide(point.forward_threshold), point.forward_threshold, point.termination_threshold)


def dense(model: Gated, batches: Batches, *, metric: Metric = top_k_accuracy) -> CurvePoint:
    """Measure the plain backbone on every frame, to compare everything else with it.

    Args:
        model: as in `to_budget`.
        batches: as in `to_budget`.
        metric: as in `to_budget`.

    Returns:
        Its accuracy and MACs.

    Raises:
        DynskipError: if there are no videos, or something does not fit.
    """
    return Replay(model, batches, metric).dense()


def uniform_frames(model: Gated, batches: Batches, *, metric: Metric = top_k_accuracy) -> tuple[CurvePoint, ...]:
    """Measure the plain backbone on few frames of each video, spread evenly: a baseline for curves.

    Args:
        model: as in `to_budget`.
        batches: as in `to_budget`.
        metric: as in `to_budget`.

    Returns:
        One point for each number of frames, from one to all. Frames that are left out cost nothing.

    Raises:
        DynskipError: if there are no videos, or something does not fit.
    """

    def pick(count: int, lengths: Tensor, frames: int) -> Tensor:
        own = [sample_times(min(count, length), length).long() for length in lengths.tolist()]
        return torch.stack([torch.isin(torch.arange(frames), numbers) for numbers in own])

    return Replay(model, batches, metric).by_count(pick)


def random_frames(
    model: Gated, batches: Batches, *, seed: int = 0, metric: Metric = top_k_accuracy
) -> tuple[CurvePoint, ...]:
    """Measure the plain backbone on few frames of each video, drawn at random: a baseline for curves.

    Args:
        model: as in `to_budget`.
        batches: as in `to_budget`.
        seed: different seeds draw different frames.
        metric: as in `to_budget`.

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

    return Replay(model, batches, metric).by_count(pick)


class Replay:
    """Encoded videos, and what a model does on them."""

    def __init__(self, model: Gated, batches: Batches, metric: Metric) -> None:
        self.model, self.metric, self.videos = model, metric, encode(model, batches)
        targets = [target.cpu() for _, target in self.videos]
        if len({target.shape[1:] for target in targets}) > 1:
            raise DynskipError("Targets of some batches are class indices and of others multi-hot; give one kind.")
        self.targets = torch.cat(targets)
        self.tables = [_table(model, encoded) for encoded, _ in self.videos]

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

    def end(
        self,
        decided: Sequence[tuple[SkipOutput, Tensor]],
        forward_threshold: tuple[float, ...],
        termination_threshold: float | None,
    ) -> CurvePoint:
        """Measure what `decide` returned, as if videos ended at a threshold; `None` reads them to their ends."""
        outputs = [output for output, _ in decided]
        if termination_threshold is not None:
            terminator = copy.copy(self.model.terminator)
            assert terminator is not None
            terminator.threshold = termination_threshold
            for i, ((encoded, _), (output, running)) in enumerate(zip(self.videos, decided, strict=True)):
                assert output.gate_logits is not None
                outputs[i] = masked_output(
                    rules.end_videos(terminator, running, output.stopped_at, self.model.activation),
                    output.gate_logits,
                    in_steps(encoded.frame_logits, self.tables[i]),
                    self.model.lookup_for(encoded.image_size),
                    self.model.readout,
                )
        logits, macs = [output.logits for output in outputs], [output.macs for output in outputs]
        return self._measure(logits, macs, forward_threshold, termination_threshold)

    def frames(self, pick: Callable[[Tensor, int], Tensor]) -> CurvePoint:
        """Measure the plain backbone on the frames that `pick(lengths, T)` marks, `(B, T)`."""
        logits, macs = [], []
        for (encoded, _), table in zip(self.videos, self.tables, strict=True):
            batch, frames, _ = encoded.frame_logits.shape
            lengths = torch.full((batch,), frames) if encoded.lengths is None else encoded.lengths.cpu()
            picked = in_steps(pick(lengths, frames).to(encoded.frame_logits.device), table)
            # As a model of one gate that stops all frames except the picked ones.
            readout = self.model.readout._replace(repeats=(False,))
            logits.append(rules.read(readout, picked.long(), in_steps(encoded.frame_logits, table))[:, -1])
            macs.append(picked.sum(1).double() * self.model.lookup_for(encoded.image_size).dense)
        return self._measure(logits, macs)

    def dense(self) -> CurvePoint:
        """Measure the plain backbone on all frames."""
        return self.frames(present)

    def by_count(self, pick: Callable[[int, Tensor, int], Tensor]) -> tuple[CurvePoint, ...]:
        """Measure the plain backbone on 1, 2, ... frames of each video, which `pick(count, lengths, T)` marks."""
        most = max(encoded.frame_logits.shape[1] for encoded, _ in self.videos)
        return tuple(self.frames(partial(pick, count)) for count in range(1, most + 1))

    def _measure(self, logits: list[Tensor], macs: list[Tensor], *thresholds: Any) -> CurvePoint:
        """Compare all videos' answers with the targets."""
        answers = torch.cat([probabilities(part, self.model.activation) for part in logits]).cpu()
        return CurvePoint(float(self.metric(answers, self.targets)), float(torch.cat(macs).mean()), *thresholds)


def _table(model: Gated, encoded: EncodedVideo) -> Tensor | None:
    batch, frames, _ = encoded.frame_logits.shape
    return steps(model.order, batch, frames, check_lengths(encoded.lengths, batch, frames))
