"""Thresholds with a guarantee."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dynskip.calibrate._cuts import as_parameters, as_termination, end_cuts, margin_cuts, sigmoid
from dynskip.calibrate._points import Calibration, CurvePoint, Gated
from dynskip.calibrate._replay import Batches, Replay
from dynskip.calibrate._search import at_least, search
from dynskip.errors import DynskipError
from dynskip.gates import logit
from dynskip.metrics import top_k_accuracy

LEARNING = 4  # one video in so many chooses the path
STEPS = 40  # of the path

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(V,)` losses in [0, 1] from `(V, K)` probabilities, those of the dense network, and targets."""


def to_risk(
    model: Gated,
    batches: Batches,
    risk: float = 0.02,
    delta: float = 0.1,
    *,
    loss: Literal["full", "labels"] | Loss = "full",
    learning: Batches | None = None,
) -> Calibration:
    """Find cheap thresholds whose expected loss on new videos is at most `risk`, with probability `1 - delta`.

    The probability is that of drawing the calibration videos: of many sets, at most a share `delta` leads to thresholds
    that lose more. The videos have to be drawn independently from those to come; where several are cut from one
    recording, give one of them.

    This is learn then test, with fixed-sequence testing. A path of thresholds from strict to cheap is fixed before the
    losses of the testing videos are looked at: a straight line, in quantiles of each gate's margins and of the
    terminator's scores, from every frame used to the cheapest thresholds that `to_accuracy` finds for twice the risk.
    It is chosen on the `learning` videos, by default on a quarter of the videos, drawn at random; the others test. Each
    point of the path is tested for the hypothesis that its expected loss exceeds the risk, as long as this is refuted
    at the level `delta`.

    Losses of 0 or 1 are binomial, so with `k` of `n` videos lost the p-value is exact: `p = P[Bin(n, risk) <= k]`.
    Other losses in [0, 1] are tested with Hoeffding's and Bentkus' inequalities, where `m` is the mean loss:
    `p = min(exp(-n KL(min(m, risk), risk)), e P[Bin(n, risk) <= ceil(n m)])`. Without any loss both need
    `n >= log(delta) / log(1 - risk)`: 114 videos for the defaults.

    Args:
        model: as in `to_budget`.
        batches: as in `to_budget`.
        risk: expected loss that is allowed, in (0, 1).
        delta: probability of exceeding it, in (0, 1).
        loss: `"full"`: 1 for a video whose answer differs from that of the dense network, where targets do not
            matter. The answer is the most probable class, or with sigmoids the set of classes above 0.5.
            `"labels"`: 1 for a video that the dense network gets right, and that is now wrong, so that the accuracy
            falls by no more than the risk. Right is a most probable class that is a label of the video, and with
            sigmoids the set of all its labels. Or a function of `(V, K)` probabilities, those of the dense
            network, and targets, that gives `(V,)` losses in [0, 1].
        learning: other videos, which choose the path, as `batches`. All of `batches` then test.

    Returns:
        The cheapest thresholds that pass, and as the curve all that do. They pass together: you may take any of them.
        An accuracy is 1 minus the mean loss of the testing videos. The model is left as it is; `apply` the result.

    Raises:
        DynskipError: if a number is out of range, something does not fit, or no thresholds pass: the message says how
            many videos would do.

    Reference:
        Jazbec et al., "Fast yet safe: early-exiting with risk control", NeurIPS 2024; Angelopoulos et al., "Learn then
        test: calibrating predictive algorithms to achieve risk control", Annals of Applied Statistics 2025; Bates et
        al., "Distribution-free, risk-controlling prediction sets", Journal of the ACM 2021.
    """
    for name, value in (("risk", risk), ("delta", delta)):
        if not (isinstance(value, int | float) and 0 < value < 1):
            raise DynskipError(f"{name}={value} is out of range; give a number between 0 and 1.")
    one_class = model.activation == "softmax"
    known: dict[str, Loss] = {
        "full": _changed if one_class else _changed_set,
        "labels": _lost if one_class else _lost_set,
    }
    if loss not in known and not callable(loss):
        raise DynskipError(f"loss={loss!r} is unknown; use 'full', 'labels' or a function.")
    measure, exact = (loss, False) if callable(loss) else (known[loss], True)
    replayed = Replay(model, batches, top_k_accuracy)
    everything = torch.randperm(len(replayed.targets), generator=torch.Generator().manual_seed(0))
    learned = len(everything) // LEARNING if learning is None else 0
    testing = everything[learned:]
    share = len(everything) / len(testing)
    least = math.ceil(math.log(delta) / math.log1p(-risk))
    if len(testing) < least:
        raise DynskipError(
            f"Too few calibration videos: {len(testing)} of {len(everything)} test the thresholds, and for risk={risk} "
            f"and delta={delta} it takes {least} even if not one of them loses anything. Give at least "
            f"{math.ceil(least * share)} videos, or allow a larger risk."
        )
    others = replayed.rows(everything[:learned]) if learning is None else Replay(model, learning, top_k_accuracy)
    part, passed = against_full(replayed.rows(testing), measure), list[CurvePoint]()
    for point in line(against_full(others, measure), risk):
        tested = part.point(part.run(point), point.forward_threshold, point.termination_threshold)
        if p_value(1 - tested.accuracy, len(testing), risk, exact) > delta:
            break
        passed.append(tested)
    if not passed:
        lost = 1 - tested.accuracy
        enough = next((n for n in _sizes(least) if p_value(lost, n, risk, exact) <= delta), None)
        raise DynskipError(
            f"No thresholds pass: the strictest ones lose {lost:.4g} on average of {len(testing)} videos, which does "
            f"not show that they lose at most {risk} on others. "
            + (
                f"If it stays like that, about {math.ceil(enough * share)} calibration videos would do."
                if enough
                else "More videos will not help: allow a larger risk, or train the gates."
            )
        )
    curve = sorted({(point.macs, point.accuracy): point for point in passed}.values(), key=lambda point: point.macs)
    return Calibration(curve[0], tuple(curve), part.point(part.dense()))


def p_value(mean_loss: float, videos: int, risk: float, exact: bool) -> float:
    """Return how probable so small a mean loss of some videos is at most, if the expected loss exceeds the risk.

    Args:
        mean_loss: of the videos.
        videos: number of them.
        risk: the expected loss.
        exact: whether losses are 0 or 1; otherwise they lie in [0, 1].
    """
    total = videos * mean_loss
    if exact:
        return _binomial(round(total), videos, risk)
    low = min(mean_loss, risk)
    divergence = sum(a * math.log(a / b) for a, b in ((low, risk), (1 - low, 1 - risk)) if a > 0)
    return min(math.exp(-videos * divergence), math.e * _binomial(math.ceil(total - 1e-9), videos, risk))


def _binomial(lost: int, videos: int, risk: float) -> float:
    """Return the probability that at most so many of the videos are lost: `P[Bin(n, risk) <= k]`."""
    k = torch.arange(lost + 1, dtype=torch.float64)
    n = torch.tensor(videos, dtype=torch.float64)
    ways = (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()
    return min(1.0, float((ways + k * math.log(risk) + (n - k) * math.log1p(-risk)).logsumexp(0).exp()))


def _sizes(least: int) -> Iterator[int]:
    size = least
    while size < 1_000_000:
        yield size
        size += max(1, size // 50)


def against_full(part: Replay, loss: Loss) -> Replay:
    """Make videos' accuracy 1 minus their mean loss against the dense network."""
    full = part.dense().probabilities

    def accuracy(probabilities: Tensor, targets: Tensor) -> float:
        losses = loss(probabilities, full, targets).double()
        if losses.shape != full.shape[:1] or not bool(((losses >= 0) & (losses <= 1)).all()):
            raise DynskipError(f"The loss has to give a number in [0, 1] for each of {len(full)} videos.")
        return float(1 - losses.mean())

    part.metric = accuracy
    return part


def line(learning: Replay, risk: float) -> Iterator[CurvePoint]:
    """Yield thresholds on a straight line from every frame used to what seems cheap and good enough, and no further."""
    rank = at_least(1 - 2 * risk)
    goal = max(search(learning, [rank], per_gate=True), key=rank)
    gates = margin_cuts(learning)[1]
    shares = [cut.below(logit(own)) for cut, own in zip(gates, goal.forward_threshold, strict=True)]
    ends = end_cuts(learning, learning.decide(goal.forward_threshold))
    parameters = as_parameters(goal.termination_threshold)
    unseen = {name: 1 - ends[name].below(own) for name, own in parameters.items()}
    for step in range(1, STEPS + 1):
        forward = tuple(sigmoid(cut.at(share * step / STEPS)) for cut, share in zip(gates, shares, strict=True))
        end = {name: ends[name].at(1 - share * step / STEPS) for name, share in unseen.items()}
        yield replace(goal, forward_threshold=forward, termination_threshold=as_termination(learning, end))


def _changed(probabilities: Tensor, full: Tensor, targets: Tensor) -> Tensor:
    return probabilities.argmax(-1) != full.argmax(-1)


def _changed_set(probabilities: Tensor, full: Tensor, targets: Tensor) -> Tensor:
    return ((probabilities > 0.5) != (full > 0.5)).any(-1)


def _lost(probabilities: Tensor, full: Tensor, targets: Tensor) -> Tensor:
    def right(answers: Tensor) -> Tensor:
        top = answers.argmax(-1)
        return top == targets if targets.ndim == 1 else targets.gather(1, top[:, None]).squeeze(1) > 0

    return right(full) & ~right(probabilities)


def _lost_set(probabilities: Tensor, full: Tensor, targets: Tensor) -> Tensor:
    classes = full.shape[1]
    hot = F.one_hot(targets.long(), classes) if targets.ndim == 1 and classes > 1 else targets
    labels = hot.reshape(full.shape) > 0.5
    return ~((full > 0.5) != labels).any(-1) & ((probabilities > 0.5) != labels).any(-1)
