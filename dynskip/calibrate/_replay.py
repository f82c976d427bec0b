"""Videos that are encoded once, and what gates and predictions would make of them with other thresholds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynskip import rules
from dynskip._modes import in_mode
from dynskip.calibrate._cuts import LEVELS, Cuts
from dynskip.calibrate._points import CurvePoint, Gated, OperatingPoint, terminator_of
from dynskip.errors import DynskipError
from dynskip.output import EncodedVideo, SkipOutput, masked_output
from dynskip.terminate import EarlyTerminator

Video = Tensor | EncodedVideo
Batches = Iterable[tuple[Video, Tensor] | tuple[Video, Tensor, Sequence[str]]]
Metric = Callable[[Tensor, Tensor], float]


@torch.no_grad()
def encode(model: Gated, batches: Batches) -> list[tuple[EncodedVideo, Tensor]]:
    """Run the backbone once on videos, and keep what gates and predictions need of it.

    Pass the result wherever this module takes videos, and the backbone does not run again.

    Args:
        model: the model; videos are moved to its device.
        batches: `(videos, targets)` or `(videos, targets, keys)`, each a batch; videos that are encoded already stay as
            they are.

    Returns:
        The encoded batches, on the model's device.

    Raises:
        DynskipError: if there are no videos, videos or targets do not fit, or the model has one output.
    """
    if model.backbone.num_classes == 1:
        raise DynskipError(
            "The model has one output, and softmax makes 1 of a single logit whatever it says, so that any thresholds "
            'would seem right. Give the model two outputs, one of them for "no" (num_classes=2), and calibrate that.'
        )
    device = next(model.backbone.parameters(), torch.empty(0)).device
    encoded = []
    with in_mode(cast(nn.Module, model), False):
        for batch in batches:
            if not isinstance(batch, Sequence) or len(batch) not in (2, 3):
                raise DynskipError(
                    f"Expected batches (videos, targets); got a {type(batch).__name__}. A DataLoader over pairs gives "
                    "such batches; for one batch, pass [(videos, targets)]."
                )
            videos, targets = batch[:2]
            if isinstance(videos, Tensor):
                videos = model.encode(videos.to(device))
            if not isinstance(videos, EncodedVideo):
                raise DynskipError(
                    f"Expected videos (B, T, C, H, W) or an EncodedVideo; got a {type(videos).__name__}. Decode and "
                    "normalise videos first."
                )
            videos = EncodedVideo(
                tuple(pooled.to(device) for pooled in videos.pooled), videos.frame_logits.to(device), videos.image_size
            )
            targets = torch.as_tensor(targets)
            if targets.ndim not in (1, 2) or len(targets) != len(videos.frame_logits):
                raise DynskipError(
                    f"Got targets {tuple(targets.shape)} for {len(videos.frame_logits)} videos; give one class index "
                    "a video, or one row of a multi-hot table."
                )
            if not all(part.isfinite().all() for part in (*videos.pooled, videos.frame_logits)):
                raise DynskipError("Features or logits have NaN or infinite values. Check the weights; encode again.")
            encoded.append((videos, targets))
    if not encoded:
        raise DynskipError(
            "There are no validation videos. Give an iterable of (videos, targets); a generator can be read only once."
        )
    return encoded


class Replay:
    """Encoded videos, and what a model does on them."""

    def __init__(self, model: Gated, batches: Batches, metric: Metric) -> None:
        self.model, self.metric = model, metric
        self.repeats: tuple[bool, ...] = getattr(model, "repeats", ())  # images have none
        self.videos = encode(model, batches)
        targets = [target.cpu() for _, target in self.videos]
        if len({target.shape[1:] for target in targets}) > 1:
            raise DynskipError("Targets of some batches are class indices and of others multi-hot; give one kind.")
        self.targets = torch.cat(targets)

    @property
    def terminator(self) -> EarlyTerminator | None:
        """What ends videos, if anything does."""
        return terminator_of(self.model)

    def read(self, forward_threshold: tuple[float, ...]) -> list[SkipOutput]:
        """Gate all videos, to their ends."""
        model: Any = self.model
        own, terminator = model.forward_threshold, self.terminator
        try:
            model.forward_threshold = forward_threshold
            if terminator is not None:
                model.terminator = None
            with torch.no_grad(), in_mode(model, False):
                return [model.decide(encoded) for encoded, _ in self.videos]
        finally:
            model.forward_threshold = own
            if terminator is not None:
                model.terminator = terminator

    def end(
        self,
        outputs: Sequence[SkipOutput],
        running: Sequence[Tensor],
        forward_threshold: tuple[float, ...],
        termination_threshold: float,
    ) -> OperatingPoint:
        """Measure videos that were read to their ends as if they ended early."""
        terminator = copy.copy(self.terminator)
        assert terminator is not None
        terminator.threshold = termination_threshold
        ended = []
        for (encoded, _), output, logits in zip(self.videos, outputs, running, strict=True):
            assert output.gate_logits is not None
            stopped_at = rules.end_videos(terminator, logits, output.stopped_at)
            lookup = self.model.lookup_for(encoded.image_size)
            ended.append(masked_output(stopped_at, output.gate_logits, encoded.frame_logits, lookup, self.repeats))
        return self.at(ended, forward_threshold, termination_threshold)

    def points(
        self, forward_threshold: tuple[float, ...], termination_thresholds: Sequence[float] | None = None
    ) -> list[OperatingPoint]:
        """Measure forward thresholds; if the model ends videos, with each of some termination thresholds."""
        outputs, terminator = self.read(forward_threshold), self.terminator
        if terminator is None or termination_thresholds == ():
            return [self.at(outputs, forward_threshold, None)]
        running = [
            rules.read(output.stopped_at, encoded.frame_logits, self.repeats)
            for output, (encoded, _) in zip(outputs, self.videos, strict=True)
        ]
        if termination_thresholds is None:
            cuts = Cuts(
                torch.cat([part.softmax(-1).amax(-1)[:, terminator.min_frames :].flatten() for part in running])
            )
            levels = {min(max(cuts.at(i / LEVELS), 1e-6), 1.0) for i in range(LEVELS + 1)}
            termination_thresholds = sorted({terminator.threshold, *levels})
        return [self.end(outputs, running, forward_threshold, threshold) for threshold in termination_thresholds]

    def at(
        self, outputs: Sequence[SkipOutput], forward_threshold: tuple[float, ...], termination_threshold: float | None
    ) -> OperatingPoint:
        """Measure what a model gave for all videos."""
        point = self.measure([output.logits for output in outputs], [output.macs for output in outputs])
        return OperatingPoint(point.accuracy, point.macs, forward_threshold, termination_threshold)

    def frames(self, pick: Callable[[int, int], Tensor]) -> CurvePoint:
        """Measure the plain backbone on some frames: `pick(B, T)` marks which."""
        logits, macs = [], []
        for encoded, _ in self.videos:
            picked = pick(*encoded.frame_logits.shape[:2]).to(encoded.frame_logits.device)
            # As a model of one gate, which stops all frames but the picked ones.
            logits.append(rules.read(picked.long(), encoded.frame_logits, (False,))[:, -1])
            macs.append(picked.sum(1).double() * self.model.lookup_for(encoded.image_size).dense)
        return self.measure(logits, macs)

    def measure(self, logits: Sequence[Tensor], macs: Sequence[Tensor]) -> CurvePoint:
        """Compare all videos' answers with the targets."""
        probabilities = torch.cat([part.softmax(-1) for part in logits]).cpu()
        return CurvePoint(float(self.metric(probabilities, self.targets)), float(torch.cat(list(macs)).mean()))


def every_frame(batch: int, frames: int) -> Tensor:
    return torch.ones(batch, frames, dtype=torch.bool)
