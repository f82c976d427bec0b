"""How good the predictions are, what happened to the frames, and what was executed.

Which number is which in the literature:

- ActivityNet's official mAP is `mean_average_precision(probabilities, multi_hot)`; its Hit@k is `top_k_accuracy`, its
  Avg Hit@k `top_k_recall`. All of them take several labels a video.
- AR-Net's `cal_map`, which SoF-Net's code also uses, is `mean_average_precision(..., interpolated=False)` over softmax
  probabilities. It is called mAP there when only a video's first label is the target, and mmAP with all labels. If a
  class does not occur in the test set, that code compares scores with the wrong classes; here the class is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dynskip._check import check_lengths, present
from dynskip._targets import as_rows
from dynskip.errors import DynskipError
from dynskip.flops import FLOPsLookup
from dynskip.rules import UNSEEN


@dataclass(frozen=True)
class FrameUsage:
    """Shares of frames by what happened to them; together they sum to 1.

    Args:
        used: Share that passed every gate.
        stopped: Share stopped by each gate, one number per stage.
        unseen: Share that came after the end of the video.
    """

    used: float
    stopped: tuple[float, ...]
    unseen: float


@dataclass(frozen=True)
class ExecutedCompute:
    """What a set of videos executed, in GMACs (10^9 multiply-adds; the literature's GFLOPs).

    Args:
        per_video: Mean of a video, gates and head included.
        per_frame: The same divided by all frames of the video, unseen ones included, as the thesis counts.
        dense_per_video: What the dense network executes on all frames of a video.
    """

    per_video: float
    per_frame: float
    dense_per_video: float

    @property
    def share(self) -> float:
        """What was executed as a share of the dense cost."""
        return self.per_video / self.dense_per_video


@dataclass(frozen=True)
class FrameRelevance:
    """How well the used frames are the relevant ones, over all frames of all videos.

    Args:
        precision: Share of the used frames that are relevant; NaN if no frame was used.
        recall: Share of the relevant frames that were used; NaN if no frame is relevant.
        relevant: Share of all frames that are relevant: the precision of frames chosen at random.
    """

    precision: float
    recall: float
    relevant: float


def top_k_accuracy(scores: Tensor, targets: Tensor, k: int = 1) -> float:
    """Share of videos that have a label among their `k` best-scored classes.

    With several labels per video this is ActivityNet's Hit@k: one of them is enough. Among equal scores,
    the lower class index comes first. Videos without any label are left out.

    Args:
        scores: `(B, K)` with K at least 2, higher is better; logits and probabilities give the same result.
        targets: `(B,)` class indices, or `(B, K)` multi-hot.
        k: How many classes may be guessed, 1 to K.

    Returns:
        A number from 0 to 1.

    Raises:
        DynskipError: On wrong shapes or values, NaN scores, or when no video has a label.
    """
    hits, _ = _hits(scores, targets, k)
    return hits.clamp(max=1.0).mean().item()


def top_k_recall(scores: Tensor, targets: Tensor, k: int = 1) -> float:
    """Share of a video's labels that are among its `k` best-scored classes, averaged over videos.

    This is ActivityNet's Avg Hit@k. It equals `top_k_accuracy` where no video has two labels.

    Args:
        scores: As in `top_k_accuracy`.
        targets: As in `top_k_accuracy`.
        k: How many classes may be guessed, 1 to K.

    Returns:
        A number from 0 to 1.

    Raises:
        DynskipError: As `top_k_accuracy`.
    """
    hits, labels = _hits(scores, targets, k)
    return (hits / labels).mean().item()


def label_accuracy(probabilities: Tensor, targets: Tensor) -> float:
    """Share of right decisions over all videos and classes, where a class is said to hold above a probability of 0.5.

    For models with a sigmoid. Of a single class it is the accuracy; of several, 1 minus the Hamming loss. Where few
    labels hold, a model that names none is right most of the time: compare with the share of zeros in the targets.

    Args:
        probabilities: `(B, K)`.
        targets: `(B, K)` multi-hot, or `(B,)` class indices; of a single class, `(B,)` zeros and ones.

    Returns:
        A number from 0 to 1.

    Raises:
        DynskipError: On wrong shapes or values, or NaN.
    """
    probabilities, positives = _checked(probabilities, targets, labelled=False)
    return ((probabilities > 0.5) == positives).double().mean().item()


def mean_average_precision(scores: Tensor, targets: Tensor, interpolated: bool = True) -> float:
    """Average precision of ranking the videos by each class's score, averaged over classes.

    Classes that no video has are left out of the mean. Videos with equal scores enter the ranking together,
    so the result does not depend on the order of the rows.

    Args:
        scores: `(B, K)`, higher is better. Videos are compared with each other, so give probabilities: with a
            softmax, logits have no common scale across videos and rank differently.
        targets: `(B,)` class indices, or `(B, K)` multi-hot; of a single class, `(B,)` zeros and ones.
        interpolated: True makes precision monotone in recall first, as ActivityNet's evaluation does (the
            area of VOC 2011); False is plain average precision, as AR-Net's and scikit-learn's, usually somewhat
            lower.

    Returns:
        A number from 0 to 1.

    Raises:
        DynskipError: On wrong shapes or values, NaN scores, or when no video has a label.

    Reference:
        Caba Heilbron et al., "ActivityNet", CVPR 2015; Everingham et al., "The PASCAL Visual Object Classes
        Challenge: A Retrospective", IJCV 2015.
    """
    scores, positives = _checked(scores, targets)
    present = positives.any(dim=0).nonzero().flatten().tolist()
    precisions = [_average_precision(scores[:, c], positives[:, c], interpolated) for c in present]
    return sum(precisions) / len(precisions)


def frame_usage(stopped_at: Tensor, num_stages: int, lengths: Tensor | None = None) -> FrameUsage:
    """Count what happened to the frames of one or many videos.

    Args:
        stopped_at: `(B, T)` or `(T,)`: the stage a frame stopped after, `num_stages` if it was used,
            `UNSEEN` if its video had ended before.
        num_stages: Number of stages N of the model.
        lengths: `(B,)` frames of each video where they are padded (`SkipOutput.lengths`); `None` for all.

    Returns:
        The shares of all frames given, padding left out.

    Raises:
        DynskipError: if `stopped_at` is empty, has another shape, or has values outside -1 to N, or the lengths do not
            fit it.

    Reference:
        Thesis Fig. 4.1.
    """
    check_stopped_at(stopped_at, num_stages)
    # Shifted by one, because bincount cannot count UNSEEN = -1.
    counts = torch.bincount(_real(stopped_at, lengths) - UNSEEN, minlength=num_stages + 2).double()
    unseen, *stopped, used = (counts / counts.sum()).tolist()
    return FrameUsage(used=used, stopped=tuple(stopped), unseen=unseen)


def executed_compute(macs: Tensor, num_frames: int | Tensor, lookup: FLOPsLookup) -> ExecutedCompute:
    """Compare what videos executed with the dense backbone.

    Args:
        macs: `(B,)` executed MACs of each video, `SkipOutput.macs`.
        num_frames: Frames T of a video, or `(B,)` lengths of the videos.
        lookup: The cost table they were counted by, `model.lookup_for(image_size)`.

    Returns:
        The means, in GMACs.

    Raises:
        DynskipError: if there are no videos or frames, or the table does not count MACs.
    """
    frames = torch.as_tensor(num_frames).double().cpu()
    if macs.dim() != 1 or len(macs) == 0 or frames.shape not in ((), macs.shape) or frames.min() < 1:
        raise DynskipError(
            f"macs has shape {tuple(macs.shape)} for videos of {num_frames} frames; expected (B,), not empty, and at "
            "least one frame. Give the macs of a SkipOutput, and the number of frames of each video."
        )
    if lookup.unit != "MACs":
        raise DynskipError(f"The cost table counts {lookup.unit}, which are not MACs; average them yourself.")
    per_video = macs.double().mean().item() / 1e9
    mean = frames.mean().item()
    return ExecutedCompute(per_video, per_video / mean, mean * lookup.dense / 1e9)


def sample_times(num_frames: int, duration: float) -> Tensor:
    """Return the times of evenly spread frames: the middles of `num_frames` equal parts of a video.

    Args:
        num_frames: Frames T that are taken.
        duration: Length of the video, in seconds or in frames.

    Returns:
        `(T,)` float64 times in the unit of the duration.

    Raises:
        DynskipError: if a number is not positive.
    """
    if num_frames < 1 or not 0 < duration < float("inf"):
        raise DynskipError(f"Cannot take {num_frames} frames from a video {duration} long; both must be positive.")
    return (torch.arange(num_frames, dtype=torch.float64) + 0.5) * (duration / num_frames)


def relevant_frames(times: Tensor, segments: Iterable[tuple[float, float]]) -> Tensor:
    """Mark the frames that lie in an annotated segment.

    Args:
        times: `(T,)` when each frame is shown (`sample_times`).
        segments: Start and end of each segment, in the unit of the times; the end does not belong to it.

    Returns:
        `(T,)` boolean.

    Raises:
        DynskipError: if a segment does not end after its start.
    """
    marks = torch.zeros(len(times), dtype=torch.bool)
    for start, end in segments:
        if not start < end:
            raise DynskipError(f"A segment from {start} to {end} has no length; its end must be after its start.")
        marks |= (times >= start) & (times < end)
    return marks


def frame_relevance(used: Tensor, relevant: Tensor, lengths: Tensor | None = None) -> FrameRelevance:
    """Compare the used frames with the relevant ones: how many of the used frames show the action.

    Args:
        used: `(B, T)` or `(T,)` boolean, `SkipOutput.used`.
        relevant: Boolean of the same shape (`relevant_frames`).
        lengths: As in `frame_usage`.

    Returns:
        Precision, recall, and the share of relevant frames to compare the precision with.

    Raises:
        DynskipError: if shapes differ, there are no frames, or values are not boolean.

    Reference:
        Thesis Fig. 4.2.
    """
    if used.shape != relevant.shape or used.numel() == 0 or {used.dtype, relevant.dtype} != {torch.bool}:
        raise DynskipError(
            f"used is {used.dtype} of shape {tuple(used.shape)} and relevant {relevant.dtype} of shape "
            f"{tuple(relevant.shape)}; expected bool of the same shape (B, T) or (T,), not empty, for both."
        )
    used, relevant = _real(used, lengths), _real(relevant, lengths)
    both = (used & relevant).sum().double()
    return FrameRelevance(
        precision=(both / used.sum()).item(),
        recall=(both / relevant.sum()).item(),
        relevant=relevant.double().mean().item(),
    )


def relevant_share(frame_logits: Tensor, targets: Tensor) -> float:
    """Estimate the share of relevant frames where nobody has marked them.

    It is how often frames name the label of their own video, less how often frames of other videos name it: irrelevant
    frames do both equally often. Relevant frames that are not recognised are missed, so it is rather too low.

    Args:
        frame_logits: `(V, T, K)` logits of every frame of videos that the classifier was not fitted to.
        targets: `(V,)` class indices, of at least two classes.

    Returns:
        The mean over classes, from 0 to 1.

    Raises:
        DynskipError: if shapes do not fit, or all videos have one label.
    """
    classes = targets.unique().tolist()
    if frame_logits.dim() != 3 or targets.shape != frame_logits.shape[:1] or len(classes) < 2:
        raise DynskipError(
            f"frame_logits has shape {tuple(frame_logits.shape)} and targets {tuple(targets.shape)}, of {len(classes)} "
            "classes; expected (V, T, K) and (V,), of at least two."
        )
    named = torch.nn.functional.one_hot(frame_logits.argmax(-1), frame_logits.shape[-1]).double().mean(1)
    gaps = [named[targets == k, k].mean() - named[targets != k, k].mean() for k in classes]
    return max(0.0, torch.stack(gaps).mean().item())


def _real(values: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the values of all frames that are no padding, `(M,)` on the CPU."""
    values = values.cpu()
    lengths = None if lengths is None else check_lengths(lengths, *torch.atleast_2d(values).shape)
    return values.flatten() if lengths is None else values[present(lengths, values.shape[1])]


def check_stopped_at(stopped_at: Tensor, num_stages: int) -> None:
    """Raise DynskipError unless the shape is `(B, T)` or `(T,)`, with whole numbers from UNSEEN to `num_stages`."""
    if stopped_at.dim() not in (1, 2) or stopped_at.numel() == 0:
        raise DynskipError(
            f"stopped_at has shape {tuple(stopped_at.shape)}; expected (B, T) or (T,), not empty. Give a SkipOutput's."
        )
    if num_stages < 1:
        raise DynskipError(f"num_stages={num_stages} is out of range; a model has at least one stage.")
    if not _is_integer(stopped_at):
        raise DynskipError(f"stopped_at is {stopped_at.dtype}; expected int64.")
    wrong = stopped_at[(stopped_at < UNSEEN) | (stopped_at > num_stages)]
    if wrong.numel():
        raise DynskipError(
            f"stopped_at holds {wrong[0].item()}; expected {UNSEEN} (unseen) to {num_stages} (used) with {num_stages} "
            "stages. Give the number of stages of the model that made it."
        )


def _hits(scores: Tensor, targets: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Count the labels among the `k` best classes, and all labels, of each video that has any."""
    if scores.ndim == 2 and scores.shape[1] == 1:
        raise DynskipError(
            "scores has one column, and a single class is always the best one. Measure a model with one output by "
            'label_accuracy or mean_average_precision, or give it two outputs, one of them for "no" (num_classes=2).'
        )
    scores, positives = _checked(scores, targets)
    num_classes = scores.shape[1]
    if not 1 <= k <= num_classes:
        raise DynskipError(f"k={k} is out of range; expected 1 to the number of classes, {num_classes}.")
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    labels = positives.sum(dim=1)
    return positives.gather(1, best).sum(dim=1)[labels > 0].double(), labels[labels > 0]


def _average_precision(scores: Tensor, positive: Tensor, interpolated: bool) -> float:
    ranked, order = scores.sort(descending=True)
    # A threshold can only lie between different scores, so a group of equal ones is a single step.
    last_of_group = torch.ones_like(positive)
    last_of_group[:-1] = ranked[:-1] != ranked[1:]
    retrieved = last_of_group.nonzero().flatten() + 1
    found = positive[order].cumsum(0)[last_of_group].double()
    precision = found / retrieved
    if interpolated:
        precision = precision.flip(0).cummax(0).values.flip(0)
    gained_recall = found.diff(prepend=found.new_zeros(1)) / found[-1]
    return (gained_recall * precision).sum().item()


def _checked(scores: Tensor, targets: Tensor, labelled: bool = True) -> tuple[Tensor, Tensor]:
    """Scores and multi-hot targets, both `(B, K)`, on the CPU."""
    if scores.dim() != 2 or scores.numel() == 0 or not scores.is_floating_point():
        raise DynskipError(
            f"scores is {scores.dtype} of shape {tuple(scores.shape)}; expected floating point of shape (B, K) with B "
            "and K at least 1. Pass logits or probabilities."
        )
    scores, targets = scores.detach().cpu(), targets.detach().cpu()
    if scores.isnan().any():
        row = int(scores.isnan().any(dim=1).nonzero()[0])
        raise DynskipError(f"scores of row {row} contain NaN, which cannot be ranked. Repair or leave out that video.")
    rows = as_rows(targets, *scores.shape)
    if not ((rows == 0) | (rows == 1)).all():
        wrong = rows[(rows != 0) & (rows != 1)][0].item()
        raise DynskipError(f"Multi-hot targets hold {wrong:g}; expected 0 or 1. Round soft labels.")
    positives = rows.bool()
    if labelled and not positives.any():
        raise DynskipError("No video has a label, so nothing can be measured. Check the multi-hot targets.")
    return scores, positives


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
