"""A video that went through a model once, and what gates do with it at other settings, without running it again."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynskip import evaluation, rules
from dynskip.activation import probabilities
from dynskip.gates import FixedGate
from dynskip.lazy import Loaded
from dynskip.order import in_steps, steps
from dynskip.output import SkipOutput, dense_output
from dynskip.terminate import EarlyTerminator
from dynskip.video.lazy import LazyClips
from dynskip.video.preprocessing import Preprocessing
from dynskip.video.source import FrameSource, notes_on
from dynskip.wrapper import StopOrForward


class Dial(NamedTuple):
    """A setting: what it does, its lowest and highest value, its step, and its value now."""

    says: str
    lowest: float
    highest: float
    step: float
    value: float


class SeenVideo:
    """Decode a video and run the whole backbone on it, once.

    Args:
        model: the model, in eval mode.
        source: the video. It is not needed later.

    Attributes:
        model: a copy that shares the weights, and has settings of its own.
        pictures: `(T, H, W, 3)` uint8 frames, as the model sees them.
        encoded: features of all frames.
        dense: what the backbone does without gates.
        dense_ms: milliseconds of that.
        notes: what is worth telling of the file, as `notes_on` does.

    Raises:
        VideoError: if the video cannot be read.
    """

    @torch.no_grad()
    def __init__(self, model: StopOrForward, source: FrameSource) -> None:
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, shared)
        prep, device = Preprocessing.of(model), next(model.parameters()).device
        with LazyClips([source], prep, device) as clip:
            frames, self._loaded = clip.shape[1], list[Loaded]()
            self._steps = steps(model.order, 1, frames, None)
            order = torch.arange(frames)[None] if self._steps is None else self._steps
            clip.begin(order)
            for number in order[0]:  # one by one, to know what fewer frames would have taken
                clip.take(torch.tensor([0]), number[None], device)
                self._loaded.append(clip.loaded()[0])
            self.pictures = clip.pictures(0)
        self._video = prep.normalize(torch.from_numpy(self.pictures).permute(0, 3, 1, 2)[None].to(device))
        self.encoded = self.model.encode(self._video)
        lookup = self.model.lookup_for(self.encoded.image_size)
        self.dense = dense_output(self.encoded.frame_logits, lookup, self.model.readout)
        self.notes = notes_on(source)
        self.dense_ms, self._measured = self._milliseconds(evaluation.MODES[0]), dict[tuple[float, ...], float]()

    def dials(self) -> list[Dial]:
        """List what may be set: the threshold of each gate that could decide otherwise, and when the video ends.

        A terminator of a class of your own has no dials here.
        """
        named = zip(self.model.gates, self.model.backbone.stage_names, self.model.forward_threshold, strict=True)
        found = [
            Dial(f"After {stage}: forward above", 0, 1, 1e-4, threshold)
            for gate, stage, threshold in named
            if type(gate) is not FixedGate
        ]
        rule = self.model.terminator or EarlyTerminator(threshold=1.0)
        if type(rule) is EarlyTerminator:
            found.append(Dial("End above this probability (1: never)", 1e-4, 1, 1e-4, rule.threshold))
            found.append(Dial("Look at this many frames in any case", 0, len(self.pictures), 1, rule.min_frames))
        return found

    def turn(self, values: Sequence[float]) -> None:
        """Set the model to these values of the dials."""
        given, fixed = iter(values), (type(gate) is FixedGate for gate in self.model.gates)
        own = zip(fixed, self.model.forward_threshold, strict=True)
        self.model.forward_threshold = [threshold if still else next(given) for still, threshold in own]
        if rest := list(given):
            self.model.terminator = EarlyTerminator(rest[0], int(rest[1]))

    @torch.no_grad()
    def decide(self) -> SkipOutput:
        """Gate the frames with the model's present settings. The backbone does not run."""
        return self.model.decide(self.encoded)

    @torch.no_grad()
    def running(self, output: SkipOutput) -> Tensor:
        """Return the running prediction: `(S, K)` probabilities after each of the `S` frames that were looked at.

        NaN before the first used frame. The last row is the answer, also where that is a fallback's.
        """
        logits, stopped_at = (in_steps(x, self._steps) for x in (self.encoded.frame_logits, output.stopped_at))
        found = probabilities(rules.read(self.model.readout, stopped_at, logits)[0], self.model.activation)
        return torch.cat([found[: int(output.seen.sum()) - 1], output.probabilities]).cpu()

    def loaded(self, output: SkipOutput) -> Loaded:
        """Say what decoding the frames took that were looked at."""
        return self._loaded[int(output.seen.sum()) - 1]

    def measure(self) -> None:
        """Run the network as the gates ask for at the present settings, and time it."""
        self._measured[self._settings()] = self._milliseconds(evaluation.MODES[2])

    @property
    def gates_ms(self) -> float | None:
        """Milliseconds of the network at the present settings; `None` before `measure`."""
        return self._measured.get(self._settings())

    def _settings(self) -> tuple[float, ...]:
        return tuple(dial.value for dial in self.dials())

    def _milliseconds(self, mode: str) -> float:
        for _ in range(2):  # the first run allocates and chooses kernels
            begin = time.perf_counter()
            evaluation.run(self.model, self._video, mode).logits.cpu()  # waits for a GPU
        return 1000 * (time.perf_counter() - begin)
