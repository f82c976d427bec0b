"""Consensus: how the used frames make a video's answer."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from dynskip._check import Checked
from dynskip.activation import Activation
from dynskip.errors import DynskipError

ConsensusState: TypeAlias = tuple[Tensor, ...]


class Consensus(Checked):
    """How used frames make a video's answer: base of dynskip's, and the contract of yours.

    A state is a tuple of finite floating-point tensors with one row a video. `initial` makes it, `add` adds a used
    frame, and `answer` reads it. Every way of running takes these steps, so that all of them give the same answers. The
    rules, not the consensus, decide which rows keep a new state: `add` is called for rows whose frame does not count,
    too. So it has to treat each row alone, and must not write into the state that it was given.

    In training, a frame counts with a weight, which is 0 or 1 and has gradients: the state moves by this share towards
    what `add` returns. So the gradient of a frame that stops is what it would have changed at its time.

    A subclass writes these three. The others are optional.

    Attributes:
        of_probabilities: whether frames' probabilities are added, instead of logits; `answer` then returns
            probabilities, too.
        embedded_features: width of what `embed` returns; 0 without one.
    """

    of_probabilities: bool = False
    embedded_features: int = 0

    def __init__(self) -> None:
        super().__init__()

    def initial(self, zeros: Tensor) -> ConsensusState:
        """Return the state before the first frame.

        Args:
            zeros: `(B, K)` zeros for videos and classes, in float64 and on the model's device, to make the state from.

        Returns:
            Floating-point tensors with the videos in dimension 0.
        """
        raise NotImplementedError

    def add(self, state: ConsensusState, values: Tensor) -> ConsensusState:
        """Add a frame of each video.

        Args:
            state: the state before the frame.
            values: `(B, K)` float64 logits of the frames, all finite; their probabilities where `of_probabilities`; or
                `(B, E)`, what `embed` returned.

        Returns:
            The state after it, in the same shapes and dtypes.
        """
        raise NotImplementedError

    def answer(self, state: ConsensusState) -> Tensor:
        """Return the answer after the frames so far.

        Args:
            state: the state.

        Returns:
            `(B, K)` logits, or probabilities where `of_probabilities`; NaN before the first frame.
        """
        raise NotImplementedError

    def embed(self, logits: Tensor) -> Tensor:
        """Do what does not depend on other frames, once for each frame that reaches the end of the network.

        Weights belong here: exports have a graph of it, and cost tables count it with the head. It is only called where
        `embedded_features` is set.

        Args:
            logits: `(M, K)` logits of frames in any order, in the model's dtype; their probabilities where
                `of_probabilities`.

        Returns:
            `(M, E)` what `add` takes, where `E` is `embedded_features`.
        """
        return logits

    def add_window(self, state: ConsensusState, values: Tensor, counts: Tensor) -> ConsensusState:
        """Add frames one after the other. Override it where all of them can be added at once.

        Args:
            state: the state before the first one.
            values: `(B, T, E)` as in `add`; zeros for frames that do not count.
            counts: `(B, T)` boolean, frames that count. The others leave the state as it is.

        Returns:
            The state after each frame: tensors `(B, T, ...)`.
        """
        states = []
        for value, weight in zip(values.unbind(1), counts.unbind(1), strict=True):
            state = moved(state, self.add(state, value), weight)
            states.append(state)
        return tuple(torch.stack(parts, 1) for parts in zip(*states, strict=True))


class MeanOfLogits(Consensus):
    """The mean of the used frames' logits.

    Reference:
        Thesis Eq. 3.6.
    """

    def initial(self, zeros: Tensor) -> ConsensusState:
        """Start with a sum `(B, K)` and a number of frames `(B,)`."""
        return zeros, zeros[:, 0]

    def add(self, state: ConsensusState, values: Tensor) -> ConsensusState:
        """Add to the sum."""
        total, count = state
        return total + values, count + 1

    def add_window(self, state: ConsensusState, values: Tensor, counts: Tensor) -> ConsensusState:
        """Add to the sum, all frames at once."""
        total, count = state
        return _sums(total, values), _sums(count, counts)

    def answer(self, state: ConsensusState) -> Tensor:
        """Divide the sum by the number of frames."""
        total, count = state
        return total / count[:, None]


class MeanOfProbabilities(MeanOfLogits):
    """The mean of the used frames' probabilities. A frame that is sure of a class outweighs no others."""

    of_probabilities = True


class TopKMean(Consensus):
    """For each class, the mean of its `k` highest logits among the used frames; of all while there are fewer.

    Args:
        k: number of frames.

    Raises:
        DynskipError: if `k` is not positive.

    Reference:
        Wang et al., "Temporal segment networks for action recognition in videos", TPAMI 2019 (top-K pooling).
    """

    def __init__(self, k: int = 3) -> None:
        super().__init__()
        self.k = k

    def check_setting(self, name: str, value: Any) -> Any:
        """Refuse what is no number of frames."""
        if name == "k" and not (type(value) is int and value > 0):
            raise DynskipError(f"k={value!r} is no number of frames; give a positive one, such as 3.")
        return super().check_setting(name, value)

    def initial(self, zeros: Tensor) -> ConsensusState:
        """Start with `(B, k, K)` places for the highest logits, in falling order, and a number of frames `(B,)`."""
        return zeros[:, None].repeat(1, self.k, 1), zeros[:, 0]

    def add(self, state: ConsensusState, values: Tensor) -> ConsensusState:
        """Put logits in their places."""
        best, count = state
        # Places from `count` on are empty: zeros, so that states are finite. A weighted count is not quite whole.
        place = torch.arange(0.5, self.k, device=best.device)[:, None]
        best = torch.where(place < count[:, None, None], best, -torch.inf)
        best = torch.cat([best, values[:, None]], 1).topk(self.k, 1).values
        return torch.where(place < count[:, None, None] + 1, best, 0.0), count + 1

    def answer(self, state: ConsensusState) -> Tensor:
        """Return the mean of the places that are taken."""
        best, count = state
        # Not `clamp`: its gradient at the limit differs between versions of torch.
        places = torch.where(count < self.k - 0.5, count, self.k)
        return best.sum(1) / places[:, None]

    def extra_repr(self) -> str:
        """Show the number of frames."""
        return f"k={self.k}"


class MaxOfLogits(TopKMean):
    """For each class, its highest logit among the used frames.

    Reference:
        Wang et al., "Temporal segment networks for action recognition in videos", TPAMI 2019 (max pooling).
    """

    def __init__(self) -> None:
        super().__init__(k=1)

    def extra_repr(self) -> str:
        """Show nothing: there is nothing to choose."""
        return ""


class AttentionMean(Consensus):
    """A mean of the used frames' logits with weights that are learned: the softmax over frames of a score.

    The score comes from the frame's logits, through one hidden layer. Every used frame has logits, however it was run;
    and they tell how sure the network is, and of what. It starts as the mean with equal weights.

    Args:
        num_classes: number of classes `K`.
        hidden: width of the hidden layer.

    Raises:
        DynskipError: if a width is not positive.
    """

    LIMIT = 50.0  # of scores: their exponentials are summed up in float64

    def __init__(self, num_classes: int, hidden: int = 32) -> None:
        super().__init__()
        if min(num_classes, hidden) < 1:
            raise DynskipError(f"num_classes={num_classes} and hidden={hidden} have to be positive.")
        self.num_classes, self.hidden = num_classes, hidden
        self.embedded_features = num_classes + 1
        self.score = nn.Sequential(nn.Linear(num_classes, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        for parameter in self.score[2].parameters():
            nn.init.zeros_(parameter)

    def embed(self, logits: Tensor) -> Tensor:
        """Put each frame's score beside its logits."""
        return torch.cat([logits, self.score(logits).to(logits.dtype)], -1)

    def initial(self, zeros: Tensor) -> ConsensusState:
        """Start with a weighted sum `(B, K)` and the sum of weights `(B,)`."""
        return zeros, zeros[:, 0]

    def add(self, state: ConsensusState, values: Tensor) -> ConsensusState:
        """Add to the sums."""
        total, weights = state
        weight = self._weight(values)
        return total + weight[:, None] * values[:, :-1], weights + weight

    def add_window(self, state: ConsensusState, values: Tensor, counts: Tensor) -> ConsensusState:
        """Add to the sums, all frames at once."""
        total, weights = state
        weight = self._weight(values) * counts
        return _sums(total, weight[..., None] * values[..., :-1]), _sums(weights, weight)

    def answer(self, state: ConsensusState) -> Tensor:
        """Divide one sum by the other."""
        total, weights = state
        return total / weights[:, None]

    def extra_repr(self) -> str:
        """Show the widths."""
        return f"num_classes={self.num_classes}, hidden={self.hidden}"

    def _weight(self, values: Tensor) -> Tensor:
        return values[..., -1].clamp(-self.LIMIT, self.LIMIT).exp()


class Readout(NamedTuple):
    """How a model's frames make the answers of videos: what `dynskip.rules` has to know of the model.

    Attributes:
        consensus: the consensus.
        activation: the head activation.
        repeats: for each of `N` gates, whether frames that it stops repeat the last used one.
    """

    consensus: Consensus
    activation: Activation
    repeats: tuple[bool, ...]


def moved(state: ConsensusState, new: ConsensusState, weight: Tensor) -> ConsensusState:
    """Move states by a share of `(B,)` towards new ones; shares of 0 and 1 give exactly the one and the other."""
    return tuple(
        torch.lerp(old, to, weight.to(old.dtype).view(weight.shape + (1,) * (old.ndim - 1)))
        for old, to in zip(state, new, strict=True)
    )


def _sums(before: Tensor, added: Tensor) -> Tensor:
    """Return the sums after each of `(B, T, ...)`, added one by one: another order would round differently."""
    if added.shape[1] == 1:
        return before[:, None] + added
    return torch.cat([before[:, None], added], 1).cumsum(1)[:, 1:]
