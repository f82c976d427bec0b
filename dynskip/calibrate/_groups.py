"""Videos that belong together: folds that keep them together, and confidence bands that draw them together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from dynskip.errors import DynskipError

FOLDS = 5
RESAMPLES, LEVEL = 500, 0.9  # of confidence bands


def numbered(groups: Sequence[Hashable], videos: int) -> Tensor:
    """Number groups in the order in which they first come: `(V,)`."""
    if len(groups) != videos:
        raise DynskipError(
            f"Got {len(groups)} groups for {videos} videos; give one a video, in the order of the videos."
        )
    numbers: dict[Hashable, int] = {}
    own = [numbers.setdefault(group, len(numbers)) for group in groups]
    if len(numbers) < 2:
        raise DynskipError(
            "All videos are of one group; folds and bands take at least two. Give `groups=range(videos)`."
        )
    return torch.tensor(own)


def folds(groups: Tensor) -> list[Tensor]:
    """Deal whole groups out at random into folds; return the rows of each."""
    count = int(groups.max()) + 1
    fold_of = torch.randperm(count, generator=torch.Generator().manual_seed(0)) % min(FOLDS, count)
    return [(fold_of[groups] == fold).nonzero().flatten() for fold in range(min(FOLDS, count))]


def band(score: Callable[[Tensor], float], groups: Tensor) -> tuple[float, float]:
    """Return the confidence band of a score of rows, by the percentile bootstrap over whole groups."""
    members = [(groups == group).nonzero().flatten() for group in range(int(groups.max()) + 1)]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(members), (RESAMPLES, len(members)), generator=generator).tolist()
    scores = torch.tensor([score(torch.cat([members[group] for group in each])) for each in drawn], dtype=torch.float64)
    lowest, highest = scores.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)).tolist()
    return lowest, highest
