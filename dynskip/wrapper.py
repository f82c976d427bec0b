"""StopOrForward: gates around a staged backbone; dense and differentiable in training, really skipping in eval."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dynskip import rules
from dynskip._check import Lengths, Videos, check_eval, check_video, present, settings_of
from dynskip._fit import Wrapper, check_encoded, check_parts
from dynskip._pretrained import Pretrained
from dynskip.activation import Activation
from dynskip.backbone import StagedBackbone, encode_images
from dynskip.consensus import Consensus, MeanOfLogits
from dynskip.errors import DynskipError
from dynskip.flops import FLOPsLookup
from dynskip.gates import parts_of
from dynskip.order import FrameOrder, check_order, in_steps, in_time, looked_at
from dynskip.output import EncodedVideo, FrameResult, SkipOutput, VideoResult, dense_output, masked_output
from dynskip.runtime.clip import LookAhead, run_clip, tune
from dynskip.runtime.online import Session
from dynskip.runtime.scheduler import Scheduler
from dynskip.runtime.streams import as_async, aserve, serve
from dynskip.terminate import EarlyTerminator

if TYPE_CHECKING:
    from dynskip.runtime.optimize import Agreement


class StopOrForward(Pretrained, Wrapper):
    """Put gates around a backbone: after each stage, a gate decides for each frame to stop or to go forward.

    `train()` runs every stage and gate on every frame and masks, so that gradients reach all decisions. `eval()` runs
    only what the decisions ask for. For the same decisions, both give the same results.

    Args:
        backbone: `N` stages and a head (`stage_model`).
        gates: `N` gates, one after each stage.
        inner: `N` inner classifiers over the gates' hidden states, for the policy guidance losses.
        terminator: ends videos early in eval; `None` reads every frame.
        lookup: cost table; `None` measures one for each frame size when it first comes.
        state_update: which frames advance the gates' memory. `"used"` (the thesis): all gates on frames that passed
            every gate. `"reached"`: each gate on every frame that reaches it.
        forward_threshold: a frame goes forward where the gate's forward probability exceeds this; one number for all
            gates, or one a gate. 0.5 is the arg-max. No threshold overrules saturated logits (`dynskip.rules`).
        activation: how logits become probabilities: `"softmax"`, one class holds; `"sigmoid"`, each class holds or not.
        consensus: how used frames make a video's answer; `None` is `MeanOfLogits()` (Eq. 3.6).
        order: in which order the frames of stored videos are looked at, such as `CoarseToFine()`; `None` in time.

    Settings are checked whenever they are set.

    Attributes:
        temperature: temperature of the Gumbel-softmax in training; set it from a schedule every epoch.
        class_names: name of each class, or `None`; saved and exported with the model.
        preprocessing: how frames are made from pictures (arguments of `timm.data.create_transform`), or `None`; saved.
        look_ahead: how far clips run ahead of the gates, as `tune` returns it; `None` for what suits the device.

    Raises:
        DynskipError: if the parts do not fit one another; the message names the part.

    Reference:
        Thesis Eq. 3.1-3.7.

    Examples:
        >>> backbone = stage_model("test_resnet", num_classes=4)
        >>> model = StopOrForward(backbone, [SimilarityGate(c) for c in backbone.num_features]).eval()
        >>> model(torch.ones(1, 3, 3, 64, 64)).stopped_at  # three equal frames: used, stopped, stopped
        tensor([[5, 0, 0]])
    """

    task = "video-classification"

    def __init__(
        self,
        backbone: StagedBackbone,
        gates: Sequence[nn.Module],
        inner: Sequence[nn.Module] | None = None,
        terminator: EarlyTerminator | None = None,
        lookup: FLOPsLookup | None = None,
        state_update: Literal["used", "reached"] = "used",
        forward_threshold: float | Sequence[float] = 0.5,
        activation: Activation = "softmax",
        consensus: Consensus | None = None,
        order: FrameOrder | None = None,
    ) -> None:
        check_parts(backbone, gates, inner, lookup)
        super().__init__(backbone, forward_threshold, activation, lookup)
        self.gates = nn.ModuleList(gates)
        self.inner = nn.ModuleList(inner) if inner is not None else None
        self.terminator: EarlyTerminator | None = terminator
        self.consensus: Consensus = consensus if consensus is not None else MeanOfLogits()
        self.state_update: Literal["used", "reached"] = state_update
        self.look_ahead: LookAhead | None = None
        self._trained_in: str | None = "unknown"  # the order of frames that gates have seen in training
        self.order: FrameOrder | None = order

    def check_setting(self, name: str, value: Any) -> Any:
        """Refuse settings that make no sense; return thresholds as one a gate."""
        if name == "look_ahead" and not isinstance(value, LookAhead | None):
            raise DynskipError(f"look_ahead={value!r} is no look-ahead; give a LookAhead(frames, stages), or None.")
        if name == "order":
            check_order(value, self._trained_in, self.gates)
        return super().check_setting(name, value)

    def forward(
        self, video: Videos, *, lengths: Lengths | None = None, dense: bool = False, sample: bool | None = None
    ) -> SkipOutput:
        """Classify videos.

        Args:
            video: `(B, T, C, H, W)` normalised frames in time, floating point; or a `LazyVideo`, of which in eval mode
                only the frames that are looked at are loaded.
            lengths: `(B,)` frames of each video, where they are padded to `T` frames; `None` for all. Padding is never
                run, counted or averaged, and its values do not matter.
            dense: leave the gates out and use every frame (also the recipe's warm-up).
            sample: draw decisions from the gates' probabilities instead of taking the more probable one; by default in
                training only.

        Returns:
            The output; differentiable in training, without gradients when frames are really skipped.

        Raises:
            DynskipError: if the video has the wrong rank, channels or dtype, no frames, or NaN or infinite values, or
                the lengths do not fit it.
        """
        if dense:
            encoded = self.encode(video, lengths)
            lookup = self.lookup_for(encoded.image_size)
            encoded, table = looked_at(self.order, encoded)
            return in_time(dense_output(encoded.frame_logits, lookup, self.readout, encoded.lengths), table)
        if self.training:
            return self.decide(self.encode(video, lengths), sample=sample)
        # A frame's draw must not depend on how far the clip looks ahead, so a sampled pass goes frame by frame.
        return run_clip(self, video, lengths, window=1 if sample else None, sample=bool(sample))

    def run_clip(self, video: Videos, window: int | None = None, lengths: Lengths | None = None) -> SkipOutput:
        """Classify stored videos, really skipping: as `model(video)` in eval, with a window that you choose.

        A window of frames of every video goes through each stage as one batch, before all decisions are made that they
        depend on. Outputs do not depend on the window: it trades `speculative_macs` for larger batches.

        Args:
            video: as in `forward`.
            window: frames of a video in flight; 1 goes frame by frame. By default as `look_ahead` says.
            lengths: as in `forward`.

        Returns:
            The output, without gradients.

        Raises:
            DynskipError: as `forward`, and if the window is not positive or a part is in training mode.
        """
        return run_clip(self, video, lengths, window)

    def tune(self, video: Videos, lengths: Lengths | None = None) -> LookAhead:
        """Measure with which look-ahead clips run fastest on this machine, and keep it as `look_ahead`.

        Answers do not depend on it. It depends on the videos' number and length, and on what the gates decide.

        Args:
            video: `(B, T, C, H, W)` normalised frames, like those to come.
            lengths: as in `forward`.

        Returns:
            The look-ahead.
        """
        self.look_ahead = tune(self, video, lengths)
        return self.look_ahead

    def stream(self, batch: int = 1) -> Session:
        """Open a session that classifies videos while their frames arrive.

        Args:
            batch: number of videos. One frame of each arrives at a time.

        Returns:
            The session; call it with every frame.

        Raises:
            DynskipError: if the batch is not positive, or the model is in training mode.
        """
        return Session(self, batch)

    def serve_streams(
        self, sources: Iterable[Any], max_streams: int = 16, batch_size: int = 16, look_ahead: int = 1
    ) -> Iterator[FrameResult | VideoResult]:
        """Classify many videos or cameras at once. Frames in front of the same stage run as one batch.

        The results of a stream do not depend on the others. A stream that ends is replaced at once. Where a source
        raises, a frame does not fit, or a stage or gate raises on it, that stream alone fails. A source that waits for
        its frames holds up the others, unless it has a method `poll`, which returns a frame or None at once, as live
        sources do; or give it to `aserve_streams`. Closing the iterator closes the sources.

        Args:
            sources: one item a video: `(key, frames)`, or `frames` alone, whose key is its number. Frames are an
                iterable of `(C, H, W)` normalised tensors. Both may be endless.
            max_streams: streams in flight; the others wait.
            batch_size: most frames in one stage run.
            look_ahead: most frames of a stream in flight. With 1, nothing is run in vain; more fill batches where
                frames are available. With `state_update="reached"` it is always 1.

        Returns:
            An iterator of events, a `FrameResult` for every frame, a `VideoResult` for every stream.

        Raises:
            DynskipError: if a number is not positive, or the model is in training mode.
        """
        return serve(Scheduler(self, max_streams, batch_size, look_ahead), iter(sources))

    def aserve_streams(
        self, sources: Any, max_streams: int = 16, batch_size: int = 16
    ) -> AsyncIterator[FrameResult | VideoResult]:
        """Classify many videos or cameras at once, as their frames arrive: `async for event in ...`.

        As `serve_streams`, with one frame of a stream in flight; but a stream that waits for its next frame does not
        hold up the others. Stages run in the event loop's thread, and sources between them. If you leave the loop
        early, close it with `contextlib.aclosing`.

        Args:
            sources: as in `serve_streams`. It, and the frames of each stream, may be asynchronous iterables.
            max_streams: as in `serve_streams`.
            batch_size: as in `serve_streams`.

        Returns:
            An asynchronous iterator of events.
        """
        return aserve(Scheduler(self, max_streams, batch_size), as_async(sources))

    def _rules(self) -> list[str]:
        return [
            f"Gates remember frames that were {self.state_update}.",
            f"Used frames make the answer by {type(self.consensus).__name__}({self.consensus.extra_repr()}).",
            f"A video ends early: {self.terminator.extra_repr()}." if self.terminator else "Every frame is looked at.",
            *([f"Frames of stored videos are looked at in the order {settings_of(self.order)}."] if self.order else []),
        ]

    def extra_repr(self) -> str:
        """Show the rules, and what a frame costs where that has been counted."""
        return f"state_update={self.state_update!r}, {super().extra_repr()}"

    def encode(self, video: Videos, lengths: Lengths | None = None) -> EncodedVideo:
        """Run the whole backbone on every frame.

        Args:
            video: `(B, T, C, H, W)` normalised frames; a `LazyVideo` is loaded as a whole.
            lengths: as in `forward`. Padding is not run, and has zeros.

        Returns:
            Pooled features of every stage and logits of every frame.

        Raises:
            DynskipError: as `forward`.
        """
        if not self.training:
            check_eval(self, "`encode`")
        checked, ends = check_video(video, self.backbone, lengths)
        batch, frames, _, height, width = checked.shape
        images, real = checked.flatten(0, 1), None
        if ends is not None:
            real = present(ends, frames).flatten().nonzero().squeeze(1).to(images.device, non_blocking=True)
            images, ends = images[real], ends.to(images.device, non_blocking=True)
        pooled, logits = encode_images(self.backbone, images)
        found = [*pooled, logits]
        if real is not None:
            found = [x.new_zeros(batch * frames, x.shape[1]).index_copy(0, real, x) for x in found]
        *pooled, logits = (x.unflatten(0, (batch, frames)) for x in found)
        return EncodedVideo(tuple(pooled), logits, (height, width), ends)

    def decide(self, encoded: EncodedVideo, *, sample: bool | None = None, noise: Tensor | None = None) -> SkipOutput:
        """Gate every frame from its stored features, and mask what the gates stop.

        Args:
            encoded: what `encode` returned.
            sample: as in `forward`.
            noise: `(B, T, N, 2)` standard Gumbel noise to sample with (stop, forward); by default drawn from torch's
                generator. With given noise, the draws of a video do not depend on the rest of the batch.

        Returns:
            In training, every gate is evaluated on every frame, and decisions are straight-through. In eval, the output
            of the skipping pass for the same decisions, early termination included.

        Raises:
            DynskipError: if the features are not this backbone's, or the noise does not fit them.
        """
        check_encoded(encoded, self.backbone)
        sample = self.training if sample is None else sample
        stages, (batch, frames, _) = self.backbone.num_stages, encoded.frame_logits.shape
        if noise is not None and noise.shape != (wanted := (batch, frames, stages, 2)):
            raise DynskipError(f"The noise has shape {tuple(noise.shape)}; expected (B, T, N, 2) = {wanted}.")
        if self.training:
            self._trained_in = settings_of(self.order)
        else:
            check_eval(self, "`decide`")
        encoded, table = looked_at(self.order, encoded)
        noise = None if noise is None else in_steps(noise, table)
        frame_logits = encoded.frame_logits
        real = None if encoded.lengths is None else present(encoded.lengths, frames)
        states = [gate.initial_state(batch) for gate in self.gates]
        parts = [parts_of(gate) for gate in self.gates]
        bounds = rules.bounds(self.forward_threshold).tolist()
        embedded = [
            # Taken apart at once: the gradient of one slice after the other would fill all frames with zeros each time.
            part.embed(x.flatten(0, 1)).unflatten(0, (batch, frames)).unbind(1)
            for part, x in zip(parts, encoded.pooled, strict=True)
        ]
        keeps_from = range(stages) if self.state_update == "reached" else [stages] * stages
        all_logits, all_decisions, all_inner, stops = [], [], [], []
        for t in range(frames):
            said, decisions, inner, proposed = [], [], [], []
            for n, part in enumerate(parts):
                logits, state = part.step(embedded[n][t], states[n])
                draws = None if noise is None else noise[:, t, n]
                said.append(logits)
                decisions.append(rules.draw(logits, bounds[n], self.temperature, sample, self.training, draws))
                proposed.append(state)
                if self.inner is not None:
                    inner.append(self.inner[n](state[0]))
            all_logits.append(torch.stack(said, 1))
            all_decisions.append(torch.stack(decisions, 1))
            all_inner += [torch.stack(inner, 1)] if inner else []
            stop = rules.stopped(all_decisions[-1].detach() > 0.5)
            stops.append(stop if real is None else stop.masked_fill(~real[:, t], rules.UNSEEN))
            states = [rules.keep(stops[-1] >= n, *both) for n, *both in zip(keeps_from, proposed, states, strict=True)]

        gate_logits, forward, stopped_at = (torch.stack(each, 1) for each in (all_logits, all_decisions, stops))
        inner_logits = torch.stack(all_inner, 1) if all_inner else None
        lookup = self.lookup_for(encoded.image_size)
        if not self.training:
            if self.terminator is not None:
                # Frames after a video's end were decided in vain: no result depends on them.
                running = rules.read(self.readout, stopped_at, frame_logits)
                stopped_at = rules.end_videos(self.terminator, running, stopped_at, self.activation)
            output = masked_output(
                stopped_at,
                gate_logits,
                frame_logits,
                lookup,
                self.readout,
                inner_logits=inner_logits,
                lengths=encoded.lengths,
            )
            return in_time(output, table)
        evaluated = torch.ones_like(forward, dtype=torch.bool)
        if real is not None:
            evaluated = real[..., None].expand_as(forward)
            forward, gate_logits = forward.masked_fill(~evaluated, 0.0), rules.known(gate_logits, real)
            inner_logits = None if inner_logits is None else rules.known(inner_logits, real)
        fallback_frame = rules.fallback(stopped_at, gate_logits)
        used = stopped_at == stages
        # The product of the decisions carries the gates' gradients; a fallback frame counts with a constant 1.
        given = rules.answering(stopped_at, stages, fallback_frame) & ~used
        weights = forward.prod(-1) + given.to(forward.dtype)
        output = SkipOutput(
            logits=rules.weighted(self.readout, stopped_at, frame_logits, weights),
            forward=forward,
            used=used,
            stopped_at=stopped_at,
            frame_logits=frame_logits if real is None else rules.known(frame_logits, real),
            gate_logits=gate_logits,
            inner_logits=inner_logits,
            macs=lookup.cost(stopped_at, fallback_frame),
            fallback_frame=fallback_frame,
            evaluated=evaluated,
            activation=self.activation,
            lengths=encoded.lengths,
        )
        return in_time(output, table)

    def optimize(self, clips: Tensor, **options: Any) -> tuple[StopOrForward, Agreement]:
        """Build a faster copy and compare its decisions; see `dynskip.runtime.optimize.optimize`.

        Args:
            clips: `(B, T, C, H, W)` normalised calibration clips, at the frame size to optimise for.
            **options: `lengths`, `compile`, `dtype`, `buckets`, `backend`.

        Returns:
            The faster model, and how its decisions on `clips` compare with this model's.
        """
        from dynskip.runtime.optimize import optimize

        return optimize(self, clips, **options)

    def export(self, folder: str | Path, image_size: int | tuple[int, int], **options: Any) -> Path:
        """Write every stage, every gate and the head as ONNX files; see `dynskip.runtime.export.export`.

        Args:
            folder: new or empty folder to write to.
            image_size: `(H, W)` of the frames, or one number for squares.
            **options: `class_names`, `mean`, `std`.

        Returns:
            The folder.
        """
        from dynskip.runtime.export import export

        return export(self, folder, image_size, **options)
