"""Early exit: still images, each answered where it leaves the network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynskip import rules
from dynskip._check import check_eval, check_images
from dynskip._fit import Wrapper, check_encoded, check_parts
from dynskip._pretrained import Pretrained
from dynskip.activation import Activation
from dynskip.backbone import StagedBackbone, encode_images
from dynskip.consensus import MeanOfLogits
from dynskip.engine import Engine
from dynskip.errors import DynskipError
from dynskip.gates import ConfidenceGate, FixedGate, Gate, GateState
from dynskip.output import EncodedVideo, SkipOutput, masked_output


class EarlyExit(Pretrained, Wrapper):
    """Put exits into an image classifier: where a gate stops an image, the inner classifier there answers.

    A batch of images is treated as videos of one frame (`T = 1`), and outputs are those of `StopOrForward`. In
    `eval()`, stages after an exit are not run for the images that left there.

    Args:
        backbone: `N` stages and a head (`stage_model`).
        gates: `N` gates, one after each stage; `FixedGate()` for a stage without an exit.
        inner: `N` inner classifiers over the gates' hidden states, which answer. Leave them out where gates have their
            own (`ConfidenceGate`).
        forward_threshold: as in `StopOrForward`.
        activation: as in `StopOrForward`.

    Attributes:
        temperature: as in `StopOrForward`.
        class_names: as in `StopOrForward`.
        preprocessing: as in `StopOrForward`.

    Raises:
        DynskipError: if the parts do not fit one another; the message names the part.

    Reference:
        Teerapittayanon et al., "BranchyNet: fast inference via early exiting from deep neural networks", ICPR 2016;
        Huang et al., "Multi-scale dense networks for resource efficient image classification", ICLR 2018.

    Examples:
        >>> backbone = stage_model("test_resnet", num_classes=4)
        >>> gates = [ConfidenceGate(c, num_classes=4, threshold=0.2) for c in backbone.num_features]
        >>> model = EarlyExit(backbone, gates).eval()
        >>> model(torch.zeros(2, 3, 64, 64)).stopped_at  # both images leave at the first exit
        tensor([[0],
                [0]])
    """

    task = "image-classification"

    def __init__(
        self,
        backbone: StagedBackbone,
        gates: Sequence[nn.Module],
        inner: Sequence[nn.Module] | None = None,
        forward_threshold: float | Sequence[float] = 0.5,
        activation: Activation = "softmax",
    ) -> None:
        classifiers = list(inner) if inner is not None else [nn.Identity() for _ in gates]
        check_parts(backbone, gates, classifiers, never_asked=[_never_stops(gate) for gate in gates])
        super().__init__(backbone, forward_threshold, activation)
        parts = zip(gates, classifiers, strict=True)
        self.exits: Any = nn.ModuleList(_Exit(*pair, backbone.num_classes) for pair in parts)

    # Settings of videos, which images do not need.
    state_update = "used"
    terminator = None
    order = None
    consensus = MeanOfLogits().eval()

    def check_setting(self, name: str, value: Any) -> Any:
        """Refuse settings that make no sense, and those of videos; return thresholds as one a gate."""
        if name in ("state_update", "terminator") and value != getattr(self, name):
            raise DynskipError(f"An EarlyExit takes still images, which have no {name}. Use StopOrForward for videos.")
        value = super().check_setting(name, value)
        if name in ("activation", "exits"):
            activation = value if name == "activation" else self.activation
            if self.backbone.num_classes < 2 and activation == "softmax":
                raise DynskipError(
                    'The model has one output. The softmax of one logit is always 1; take `activation="sigmoid"`, or '
                    "give the model two outputs, one for each answer."
                )
            for n, part in enumerate(value if name == "exits" else getattr(self, "exits", ())):
                if isinstance(part.gate, ConfidenceGate) and part.gate.activation != activation:
                    raise DynskipError(
                        f"Gate {n} measures how sure it is by a {part.gate.activation}, and the model answers by a "
                        f"{activation}. Give both the same `activation`."
                    )
        return value

    @property
    def deciders(self) -> Any:
        """The exits: each is a gate with the classifier that answers."""
        return self.exits

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

    def encode(self, images: Tensor) -> EncodedVideo:
        """Run the whole backbone on every image.

        Args:
            images: `(B, C, H, W)` normalised images.

        Returns:
            Pooled features of every stage, `(B, 1, C_n)`, and logits, `(B, 1, K)`.

        Raises:
            DynskipError: as `forward`.
        """
        if not self.training:
            check_eval(self, "`encode`")
        images = check_images(images, self.backbone)
        pooled, logits = encode_images(self.backbone, images)
        return EncodedVideo(tuple(x[:, None] for x in pooled), logits[:, None], (images.shape[2], images.shape[3]))

    def decide(self, encoded: EncodedVideo, *, sample: bool | None = None) -> SkipOutput:
        """Gate every image from its stored features.

        Args:
            encoded: what `encode` returned.
            sample: as in `forward`.

        Returns:
            In training, every exit is evaluated, and decisions and answers are straight-through. In eval, the output
            of the skipping pass for the same decisions.

        Raises:
            DynskipError: if the features are not this backbone's, or are those of videos.
        """
        if not self.training:
            check_eval(self, "`decide`")
        check_encoded(encoded, self.backbone, frames=1)
        sample = self.training if sample is None else sample
        bounds = rules.bounds(self.forward_threshold).tolist()
        asked = [part(pooled[:, 0], ()) for part, pooled in zip(self.exits, encoded.pooled, strict=True)]
        gate_logits = torch.stack([logits for logits, _ in asked], 1)
        inner = [answer for _, (answer,) in asked]
        inner_logits = torch.stack(inner, 1)
        decisions = [
            torch.ones_like(logits[:, 0])
            if part.never_stops
            else rules.draw(logits, bound, self.temperature, sample, self.training)
            for part, bound, (logits, _) in zip(self.exits, bounds, asked, strict=True)
        ]
        forward, final = torch.stack(decisions, 1), encoded.frame_logits[:, 0]
        stopped_at = rules.stopped(forward.detach() > 0.5)
        output = self._output(stopped_at, gate_logits, inner_logits, final, encoded.image_size)
        if not self.training:
            return output
        # Where each image leaves, as shares of 0 and 1 that carry the gates' gradients; the last is the head's.
        passed = forward.cumprod(1)
        shares = F.pad(passed, (1, 0), value=1.0) - F.pad(passed, (0, 1))
        # A stage without an exit has a share of 0, which would keep its NaN.
        answers = [x.nan_to_num() if part.never_stops else x for part, x in zip(self.exits, inner, strict=True)]
        output.logits = (shares[..., None] * torch.stack([*answers, final], 1)).sum(1)
        output.forward, output.gate_logits = forward[:, None], gate_logits[:, None]
        output.inner_logits, output.frame_logits = inner_logits[:, None], encoded.frame_logits
        output.evaluated = torch.ones_like(output.evaluated)
        return output

    @torch.no_grad()
    def _skip(self, images: Tensor, sample: bool) -> SkipOutput:
        check_eval(self, "EarlyExit")
        images = check_images(images, self.backbone)
        batch = len(images)
        engine = Engine(self, batch, sample=sample)
        engine.answered = [True] * batch  # an exit answers for what it stops, so no stopped image has to be kept
        rows = torch.arange(batch)
        engine.load(rows, images, torch.zeros_like(rows))
        engine.advance(rows)
        stopped_at = engine.decide(rows).stopped_at.squeeze(1)
        inner_logits = torch.stack([answer for (answer,) in engine.proposed], 1)
        size = (images.shape[2], images.shape[3])
        return self._output(stopped_at, engine.gate_logits.to(engine.dtype), inner_logits, engine.frame_logits, size)

    def _output(
        self, stopped_at: Tensor, gate_logits: Tensor, inner_logits: Tensor, final: Tensor, size: tuple[int, int]
    ) -> SkipOutput:
        """Make the output of a skipping pass; mask what the decisions did not ask for."""
        answers = torch.cat([inner_logits, final[:, None]], 1)
        return masked_output(
            stopped_at[:, None],
            gate_logits[:, None],
            final[:, None],
            self.lookup_for(size),
            self.readout,
            fallback_frame=torch.full_like(stopped_at, -1),
            inner_logits=inner_logits[:, None],
            logits=answers.gather(1, stopped_at[:, None, None].expand(-1, 1, answers.shape[-1])).squeeze(1),
        )


class _Exit(Gate):
    """A gate together with the classifier that answers for what it stops. Its state is the answer, NaN without exit."""

    has_memory = False

    def __init__(self, gate: nn.Module, inner: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.gate: Any = gate
        self.inner = inner
        self.never_stops = _never_stops(gate)
        self.num_classes = num_classes

    def initial_state(self, batch: int) -> GateState:
        weight = next((tensor for tensor in (*self.parameters(), *self.buffers())), torch.empty(0))
        return (weight.new_zeros(batch, self.num_classes),)

    def forward(self, pooled: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        logits, hidden = self.gate(pooled, self.gate.initial_state(len(pooled)))
        if self.never_stops:  # there is no exit, and so no answer
            return logits, (pooled.new_full((len(pooled), self.num_classes), math.nan),)
        return logits, (self.inner(hidden[0]),)


def _never_stops(gate: nn.Module) -> bool:
    return isinstance(gate, FixedGate) and not gate.stop
