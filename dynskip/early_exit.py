"""Early exit: still images, each answered where it leaves the network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynskip._check import check_images
from dynskip._pretrained import Pretrained
from dynskip.backbone import StagedBackbone
from dynskip.flops import FLOPsLookup
from dynskip.gates import FixedGate, GateState
from dynskip.output import EncodedVideo, SkipOutput
from dynskip.summary import as_size, one_frame, stage_table
from dynskip.wrapper import check_encoded, check_parts, check_thresholds, draw, encode_images


class EarlyExit(Pretrained, nn.Module):
    """Put exits into an image classifier: an image that a gate stops is answered by the inner classifier there.

    A batch of images counts as videos of one frame (`T = 1`), and outputs are those of `StopOrForward`; only what
    answers for a stopped frame differs. In `eval()`, stages after an exit are not run for the images that left.

    Args:
        backbone: `N` stages and a head (`stage_model`).
        gates: `N` gates, one after each stage; `FixedGate()` where no image is to leave.
        inner: `N` inner classifiers over the gates' hidden states, which answer. Leave them out where gates have their
            own (`ConfidenceGate`, `EntropyGate`).
        forward_threshold: as in `StopOrForward`.

    Attributes:
        temperature: as in `StopOrForward`.
        class_names: as in `StopOrForward`.
        preprocessing: as in `StopOrForward`.

    Raises:
        DynskipError: if the parts do not fit one another; the message names the part.

    Reference:
        Teerapittayanon et al., "BranchyNet: fast inference via early exiting from deep neural networks", ICPR 2016;
        Huang et al., "Multi-scale dense networks for resource efficient image classification", ICLR 2018.
    """

    def __init__(
        self,
        backbone: StagedBackbone,
        gates: Sequence[nn.Module],
        inner: Sequence[nn.Module] | None = None,
        forward_threshold: float | Sequence[float] = 0.5,
    ) -> None:
        super().__init__()
        classifiers = inner if inner is not None else [nn.Identity() for _ in gates]
        self.backbone = backbone
        self.exits: Any = nn.ModuleList(_Exit(*parts) for parts in zip(gates, classifiers, strict=False))
        self.temperature = 1.0
        self.class_names: Sequence[str] | None = None
        self.preprocessing: Mapping[str, Any] | None = None
        self.forward_threshold = check_thresholds(forward_threshold, backbone.num_stages)
        asked = [None if _never_stops(gate) else each for gate, each in zip(gates, classifiers, strict=False)]
        check_parts(backbone, gates, asked if len(classifiers) == len(gates) else classifiers)
        self._measured: dict[tuple[int, int], FLOPsLookup] = {}

    @property
    def gates(self) -> tuple[Any, ...]:
        """The gates, one after each stage."""
        return tuple(part.gate for part in self.exits)

    @property
    def inner(self) -> tuple[nn.Module, ...]:
        """The inner classifiers; identities where gates have their own."""
        return tuple(part.inner for part in self.exits)

    def forward(self, images: Tensor, *, sample: bool | None = None) -> SkipOutput:
        """Classify images.

        Args:
            images: `(B, C, H, W)` normalised images, floating point.
            sample: as in `StopOrForward.forward`.

        Returns:
            The output, with `T = 1`; differentiable in training, without gradients where stages are really skipped.

        Raises:
            DynskipError: if the images have the wrong rank, channels or dtype, or NaN or infinite values.
        """
        return self.decide(self.encode(images), sample=sample) if self.training else self._skip(images, bool(sample))

    def summary(self, image_size: int | tuple[int, int] | None = None) -> str:
        """Describe the model stage by stage; see `StopOrForward.summary`. A gate's cost includes its classifier's."""
        lookup = self.lookup_for(as_size(image_size) or self.backbone.input_size[1:])
        title = f"EarlyExit around {type(self.backbone.model).__name__}"
        return stage_table(title, self.backbone, self.gates, lookup, self.forward_threshold)

    def extra_repr(self) -> str:
        """Show what an image costs where that has been counted."""
        return ", ".join(one_frame(table) for table in self._measured.values())

    def encode(self, images: Tensor) -> EncodedVideo:
        """Run the whole backbone on every image.

        Args:
            images: `(B, C, H, W)` normalised images.

        Returns:
            Pooled features of every stage, `(B, 1, C_n)`, and logits, `(B, 1, K)`.

        Raises:
            DynskipError: as `forward`.
        """
        check_images(images, self.backbone)
        pooled, logits = encode_images(self.backbone, images)
        return EncodedVideo(tuple(x[:, None] for x in pooled), logits[:, None], (images.shape[2], images.shape[3]))

    def decide(self, encoded: EncodedVideo, *, sample: bool | None = None) -> SkipOutput:
        """Gate every image from its stored features.

        Args:
            encoded: what `encode` returned.
            sample: as in `forward`.

        Returns:
            In training, every exit evaluated, decisions and answers straight-through. In eval, the output of the
            skipping pass for the same decisions.

        Raises:
            DynskipError: if the features are not this backbone's, or are those of videos.
        """
        check_encoded(encoded, self.backbone, frames=1)
        sample = self.training if sample is None else sample
        asked = [self._ask(n, pooled[:, 0], sample) for n, pooled in enumerate(encoded.pooled)]
        gate_logits, inner_logits, forward = (torch.stack(parts, 1) for parts in zip(*asked, strict=True))
        final = encoded.frame_logits[:, 0]
        passed = forward.cumprod(1)
        stopped_at = (passed.detach() > 0.5).sum(1)
        output = self._output(stopped_at, gate_logits, inner_logits, final, encoded.image_size)
        if not self.training:
            return output
        # Where each image leaves, as shares of 0 and 1 that carry the gates' gradients; the last is the head's.
        shares = F.pad(passed, (1, 0), value=1.0) - F.pad(passed, (0, 1))
        answers = torch.cat([inner_logits.nan_to_num(), final[:, None]], 1)
        output.logits = (shares[..., None] * answers).sum(1)
        output.forward, output.gate_logits = forward[:, None], gate_logits[:, None]
        output.inner_logits, output.frame_logits = inner_logits[:, None], encoded.frame_logits
        output.evaluated = torch.ones_like(output.evaluated)
        return output

    def lookup_for(self, image_size: tuple[int, int]) -> FLOPsLookup:
        """Return the cost table for images of a size; the gates' costs include their inner classifiers.

        Args:
            image_size: `(H, W)`.

        Returns:
            The table, measured when a size first comes.
        """
        if image_size not in self._measured:
            self._measured[image_size] = FLOPsLookup.measure(self.backbone, image_size, self.exits)
        return self._measured[image_size]

    @torch.no_grad()
    def _skip(self, images: Tensor, sample: bool) -> SkipOutput:
        check_images(images, self.backbone)
        batch, stages, classes = len(images), self.backbone.num_stages, self.backbone.num_classes
        stopped_at = torch.full((batch,), stages, device=images.device)
        gate_logits = images.new_full((batch, stages, 2), math.nan)
        inner_logits = images.new_full((batch, stages, classes), math.nan)
        final = images.new_full((batch, classes), math.nan)
        alive = torch.arange(batch, device=images.device)
        carry = self.backbone.start(images)
        for n in range(stages):
            carry = self.backbone.run(n, carry)
            logits, answer, forward = self._ask(n, self.backbone.pool(n, carry), sample)
            gate_logits[alive, n], inner_logits[alive, n] = logits.to(images.dtype), answer.to(images.dtype)
            keep = forward > 0.5
            stopped_at[alive[~keep]] = n
            alive = alive[keep]
            if not len(alive):
                break
            carry = carry if keep.all() else carry.select(keep)
        else:
            final[alive] = self.backbone.head(carry).to(images.dtype)
        return self._output(stopped_at, gate_logits, inner_logits, final, (images.shape[2], images.shape[3]))

    def _ask(self, stage: int, pooled: Tensor, sample: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return `(B, 2)` logits of a gate, `(B, K)` logits of its classifier and `(B,)` decisions."""
        part = self.exits[stage]
        logits, state = part.gate(pooled, part.gate.initial_state(len(pooled)))
        if part.never_stops:
            nothing = pooled.new_full((len(pooled), self.backbone.num_classes), math.nan)
            return logits, nothing, pooled.new_ones(len(pooled))
        decisions = draw(logits, self.forward_threshold[stage], self.temperature, sample, self.training)
        return logits, part.inner(state[0]), decisions

    def _output(
        self, stopped_at: Tensor, gate_logits: Tensor, inner_logits: Tensor, final: Tensor, size: tuple[int, int]
    ) -> SkipOutput:
        """Make the output of a skipping pass; what the decisions did not ask for is masked."""
        stages = self.backbone.num_stages
        depth = torch.arange(stages, device=stopped_at.device)
        evaluated, used = depth <= stopped_at[:, None], stopped_at == stages
        answers = torch.cat([inner_logits, final[:, None]], 1)
        return SkipOutput(
            logits=answers[torch.arange(len(final), device=final.device), stopped_at],
            forward=(depth < stopped_at[:, None]).to(gate_logits.dtype)[:, None],
            used=used[:, None],
            stopped_at=stopped_at[:, None],
            frame_logits=final.masked_fill(~used[:, None], math.nan)[:, None],
            gate_logits=gate_logits.masked_fill(~evaluated[..., None], math.nan)[:, None],
            inner_logits=inner_logits.masked_fill(~evaluated[..., None], math.nan)[:, None],
            macs=self.lookup_for(size).by_outcome.to(stopped_at.device)[stopped_at + 1],
            fallback_frame=torch.full_like(stopped_at, -1),
            evaluated=evaluated[:, None],
        )


class _Exit(nn.Module):
    """A gate and the classifier that answers for what it stops; a gate in itself, so that both are counted as one."""

    def __init__(self, gate: nn.Module, inner: nn.Module) -> None:
        super().__init__()
        self.gate: Any = gate
        self.inner = inner
        self.never_stops = _never_stops(gate)

    def initial_state(self, batch: int) -> GateState:
        return self.gate.initial_state(batch)  # type: ignore[no-any-return]

    def forward(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        logits, state = self.gate(pooled, state)
        return (logits, state) if self.never_stops else (logits, (self.inner(state[0]),))


def _never_stops(gate: nn.Module) -> bool:
    return isinstance(gate, FixedGate) and not gate.stop
