"""Labelled videos as batches of clips, for training and for evaluation."""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, default_collate
from tqdm import tqdm

from dynskip.activation import Activation, check_activation
from dynskip.errors import DynskipError
from dynskip.video.annotations import Item
from dynskip.video.cache import CHOICES, FrameCache, kept_bytes
from dynskip.video.lazy import LazyClips
from dynskip.video.loading import BatchLoader
from dynskip.video.memory import check_memory
from dynskip.video.opening import open_source
from dynskip.video.preprocessing import Preprocessing
from dynskip.video.source import FrameSource, VideoError, notes_on, sample_frames


class Sample(NamedTuple):
    """One clip, or none where its video cannot be read.

    Attributes:
        video: `(T, 3, H, W)` uint8.
        target: class index, of several labels the one drawn; with a sigmoid, all labels, `(K,)` with ones.
        position: place of the video in the data set.
        errors: why videos could not be read.
    """

    video: Tensor | None
    target: int | Tensor
    position: int
    errors: tuple[str, ...]


class Clips(Dataset[Sample]):
    """Labelled videos as clips of frames spread over the video.

    Indexed by `(epoch, position)`, so that what is drawn at random depends on nothing else: not on the number of
    workers or processes, and not on whether training was interrupted. In training, the next video that can be read
    takes the place of one that cannot.

    A model with a sigmoid is trained on all labels of a video, which may have none. For one with a softmax, each epoch
    of training draws one of several labels: the expected loss is the cross-entropy against all with equal weights.

    Args:
        items: the videos.
        classes: name of each class, such as a model's `class_names`.
        prep: how frames become input.
        training: draw frames, crops and labels at random.
        seed: different seeds draw differently.
        cache: folder that keeps decoded frames.
        opener: how a video is opened.
        activation: the model's head activation.

    Raises:
        DynskipError: if there are no class names, a label is not among them, or a video has none and the
            activation is a softmax.
    """

    def __init__(
        self,
        items: Sequence[Item],
        classes: Sequence[str] | None,
        prep: Preprocessing,
        training: bool = False,
        seed: int = 0,
        cache: Path | None = None,
        opener: Callable[[Path], FrameSource] = open_source,
        activation: Activation = "softmax",
    ) -> None:
        self.items, self.prep, self.training, self.seed, self.opener = list(items), prep, training, seed, opener
        if classes is None:
            raise DynskipError("The model has no class names, so labels mean nothing to it. Set model.class_names.")
        self.num_classes = len(classes)
        index = {name: i for i, name in enumerate(classes)}
        unknown = sorted({label for item in items for label in item.labels} - set(index))
        if unknown:
            raise DynskipError(
                f"The data has {len(unknown)} classes that the model does not know, such as {unknown[0]!r}. It was "
                f"trained on {len(classes)} classes: {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}."
            )
        self.targets = [[index[label] for label in item.labels] for item in items]
        self.activation: Activation = check_activation(activation)
        if activation == "softmax" and not all(self.targets):
            raise DynskipError(
                f"{items[self.targets.index([])].path} has no label, and a softmax always names a class. Leave such "
                "videos out, or train a model with a sigmoid: activation='sigmoid'."
            )
        self.cache = FrameCache(cache, prep.num_frames, prep.short_side, opener) if cache is not None else None
        self._memory: list[np.ndarray | VideoError] | None = None

    @classmethod
    def of(
        cls,
        model: Any,
        items: Sequence[Item],
        training: bool = False,
        seed: int = 0,
        cache: Path | None = None,
        opener: Callable[[Path], FrameSource] = open_source,
    ) -> Clips:
        """Make clips as a model needs them: with its class names, preprocessing and head activation.

        Args:
            model: the model.
            items: as in `Clips`, like the rest.
            training: as in `Clips`.
            seed: as in `Clips`.
            cache: as in `Clips`.
            opener: as in `Clips`.
        """
        names, prep = model.class_names, Preprocessing.of(model)
        return cls(items, names, prep, training, seed, cache, opener, model.activation)

    def load_into_memory(self) -> Clips:
        """Decode everything once and keep it; for sets that fit.

        Raises:
            DynskipError: if the frames will not fit into memory.
        """
        needed = kept_bytes(len(self), self.prep.num_frames, self.prep.short_side)
        check_memory(needed, f"Keeping {len(self)} videos", "Keep decoded frames in a folder instead (--cache DIR).")
        self._memory = [self._kept(item.path) for item in tqdm(self.items, "decode", leave=False, disable=None)]
        return self

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, position = key
        errors: list[str] = []
        for candidate in [(position + k) % len(self) for k in range(len(self) if self.training else 1)]:
            seed = derive_seed(self.seed, epoch, candidate)
            try:
                frames = self._frames(candidate, random.Random(seed) if self.training else None)
            except VideoError as error:
                errors.append(str(error))
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                video = self.prep.crop(frames, self.training)
            return Sample(video, self._target(candidate, seed), candidate, tuple(errors))
        return Sample(None, 0, position, tuple(errors))

    def _target(self, position: int, seed: int) -> int | Tensor:
        if self.activation == "sigmoid":
            return self.multi_hot([position])[0]
        labels = self.targets[position]
        return labels[derive_seed(seed, len(labels)) % len(labels) if self.training else 0]

    def _frames(self, position: int, rng: random.Random | None) -> np.ndarray:
        path, count = self.items[position].path, self.prep.num_frames
        if self._memory is None and self.cache is None:
            return sample_frames(self.opener(path), count, self.prep.short_side, rng)
        picks = [CHOICES * i + (rng.randrange(CHOICES) if rng else CHOICES // 2) for i in range(count)]
        if self._memory is None:
            assert self.cache is not None
            return self.cache.read(path, picks)[0]
        kept = self._memory[position]
        if isinstance(kept, VideoError):
            raise kept
        return kept[picks]

    def _kept(self, path: Path) -> np.ndarray | VideoError:
        count = CHOICES * self.prep.num_frames
        try:
            if self.cache is not None:
                return self.cache.read(path, range(count))[0]
            return sample_frames(self.opener(path), count, self.prep.short_side)
        except VideoError as error:
            return error

    def multi_hot(self, positions: Sequence[int]) -> Tensor:
        """Return all labels of some videos, `(V, K)` with ones."""
        targets = torch.zeros(len(positions), self.num_classes, dtype=torch.long)
        for row, position in enumerate(positions):
            targets[row, self.targets[position]] = 1
        return targets


@dataclass
class Batch:
    """Some clips.

    Attributes:
        video: `(B, T, 3, H, W)` uint8.
        targets: `(B,)` class indices, or with a sigmoid `(B, K)` with ones.
        positions: place of each video in the data set.
        errors: why videos could not be read.
        lengths: `(B,)` frames of each video, where the clips were of different length and are padded; else `None`.
    """

    video: Tensor
    targets: Tensor
    positions: list[int]
    errors: list[str]
    lengths: Tensor | None = None

    def pin_memory(self) -> Batch:
        """Move to memory that a GPU copies from faster."""
        return replace(self, video=self.video.pin_memory(), targets=self.targets.pin_memory())


def collate_padded(samples: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    """Make a batch of videos of different length: `DataLoader(..., collate_fn=collate_padded)`.

    Args:
        samples: `(video, target)` or `(video, target, key)`, and more if you like; videos are `(T, C, H, W)`.

    Returns:
        `((video, lengths), targets, ...)`: videos padded to `(B, T, C, H, W)`, their lengths `(B,)`, and the rest as
        torch collates it. Calibration and evaluation take such batches.
    """
    videos, *rest = zip(*samples, strict=True)
    return padded(videos), *(default_collate(list(column)) for column in rest)


def padded(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad tensors `(T, ...)` to one batch `(B, T, ...)`; return also their lengths `(B,)`."""
    return pad_sequence(list(values), batch_first=True), torch.tensor([len(value) for value in values])


def collate(samples: Sequence[Sample]) -> Batch:
    """Batch the clips that could be read; those of different length are padded."""
    videos = [sample.video for sample in samples if sample.video is not None]
    good = [sample for sample in samples if sample.video is not None]
    video, lengths = padded(videos) if videos else (torch.empty(0), torch.empty(0))
    return Batch(
        video,
        torch.stack([torch.as_tensor(sample.target) for sample in good]) if good else torch.empty(0, dtype=torch.long),
        [sample.position for sample in good],
        [error for sample in samples for error in sample.errors],
        lengths if len(lengths.unique()) > 1 else None,
    )


def training_batches(
    clips: Clips,
    epoch: int,
    batch_size: int,
    parts: int = 1,
    workers: int = 0,
    first: int = 0,
    process: int = 0,
    processes: int = 1,
) -> BatchLoader[Batch]:
    """Load an epoch of clips, shuffled by seed and epoch. The rest that fills no step is left out.

    Args:
        clips: the videos.
        epoch: number of the epoch.
        batch_size: videos of a step, all processes and parts together.
        parts: batches that a step is computed in (gradient accumulation).
        workers: processes that decode.
        first: number of the first batch, to go on within an epoch.
        process: which of the processes this is.
        processes: how many there are.

    Returns:
        A loader of `Batch`, with this process's share of each.

    Raises:
        DynskipError: if a step cannot be shared evenly, or there are fewer videos than a step has.
    """
    if batch_size < 1 or batch_size % (parts * processes):
        raise DynskipError(
            f"A step of {batch_size} videos cannot be shared evenly by {processes} processes in {parts} parts."
        )
    if len(clips) < batch_size:
        raise DynskipError(f"There are {len(clips)} training videos and a step has {batch_size}. Make it smaller.")
    order = list(range(len(clips)))
    random.Random(derive_seed(clips.seed, epoch)).shuffle(order)
    part, share = batch_size // parts, batch_size // (parts * processes)
    starts = range(first * part, len(order) // batch_size * batch_size, part)
    keys = [[(epoch, p) for p in order[s + process * share : s + (process + 1) * share]] for s in starts]
    return BatchLoader(clips, keys, collate, share * clips.prep.clip_bytes, workers, torch.cuda.is_available())


class EvaluationLoader:
    """Clips in order as `dynskip.evaluation.evaluate` takes them: `(video, targets, keys)`.

    Videos `(B, T, 3, H, W)` are normalised and on the device, targets `(B, K)` have all labels, keys are paths. Where
    clips are of different length, the batch is `((video, lengths), targets, keys)`.

    Args:
        clips: the videos.
        batch_size: videos at a time.
        workers: processes that decode.
        device: where the model is.
        lazy: give `LazyClips`, of which a model decodes only what it looks at, in threads of this process. A video that
            turns out unreadable then is listed by the evaluation, too.

    Attributes:
        unreadable: why videos were left out, as far as they have been read.
        notes: of lazy videos, which were damaged or had to be read in one pass.
    """

    def __init__(
        self,
        clips: Clips,
        batch_size: int = 1,
        workers: int = 0,
        device: str | torch.device = "cpu",
        lazy: bool = False,
    ) -> None:
        self.clips, self.batch_size, self.workers, self.device, self.lazy = clips, batch_size, workers, device, lazy
        self.unreadable: list[str] = []
        self.notes: list[str] = []

    def __len__(self) -> int:
        return -(-len(self.clips) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Any, Tensor, list[str]]]:
        self.unreadable, self.notes = [], []
        if self.lazy:
            yield from self._lazy_batches()
            return
        keys = [(0, position) for position in range(len(self.clips))]
        batches = [keys[start : start + self.batch_size] for start in range(0, len(keys), self.batch_size)]
        size = self.batch_size * self.clips.prep.clip_bytes
        for batch in BatchLoader(self.clips, batches, collate, size, self.workers):
            self.unreadable += batch.errors
            if batch.positions:
                video = self.clips.prep.normalize(batch.video.to(self.device))
                paths = [str(self.clips.items[position].path) for position in batch.positions]
                videos = video if batch.lengths is None else (video, batch.lengths)
                yield videos, self.clips.multi_hot(batch.positions), paths

    def _lazy_batches(self) -> Iterator[tuple[Any, Tensor, list[str]]]:
        places = range(len(self.clips))
        batches = [places[start : start + self.batch_size] for start in places[:: self.batch_size]]
        waiting: deque[tuple[list[int], LazyClips | None]] = deque()
        try:
            for batch in [*batches, None]:
                if batch is not None:
                    waiting.append(self._open(batch))
                while waiting and (batch is None or len(waiting) > 1):  # the next one begins to decode meanwhile
                    positions, video = waiting[0]
                    if video is not None:
                        paths = [str(self.clips.items[position].path) for position in positions]
                        yield video, self.clips.multi_hot(positions), paths
                        video.close()
                        self.notes += [f"{source}: {note}" for source in video.sources for note in notes_on(source)]
                    waiting.popleft()
        finally:
            for _, video in waiting:
                if video is not None:
                    video.close()

    def _open(self, batch: Sequence[int]) -> tuple[list[int], LazyClips | None]:
        """Open the videos of a batch that can be opened, and begin to decode."""
        positions, opened, prep = [], [], self.clips.prep
        for position in batch:
            try:
                opened.append(LazyClips([self.clips.opener(self.clips.items[position].path)], prep, self.device))
                positions.append(position)
            except VideoError as error:
                self.unreadable.append(str(error))
        if not opened:
            return [], None
        video = LazyClips.joined(opened)
        video.expect(torch.arange(prep.num_frames).expand(len(video), -1))
        return positions, video


def derive_seed(*parts: int) -> int:
    """Mix whole numbers into one seed."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")
