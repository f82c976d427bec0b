"""The same decisions from faster stages: BatchNorm folded, channels-last, compiled; checked against the original."""

from __future__ import annotations

import copy
import itertools
import types
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._pytree import tree_map_only

from dynskip._check import Lengths, check_video, present
from dynskip.backbone import Carry, StagedBackbone, encode_images
from dynskip.backbone.carry import batch_of, flatten
from dynskip.errors import DynskipError

if TYPE_CHECKING:
    from dynskip.wrapper import StopOrForward

# Batches that make torch compile every graph there will be: one row; several rows; and 16 rows or more, where torch
# chooses other convolutions if it has one thread. The second batch of a kind makes the batch size dynamic.
WARM_UP = (17, 3, 18, 2, 1)
_Function: TypeAlias = Callable[..., tuple[Any, ...]]
_serial = itertools.count()
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)


@dataclass(frozen=True)
class Agreement:
    """How well an optimised model agrees with the original one on some clips.

    Attributes:
        clips: clips compared.
        decisions: share of frames with the same `stopped_at` in both.
        predictions: share of clips with the same most probable class.
        probability_gap: largest difference between two probabilities of a class.
        original_macs: executed MACs of the original model, mean over the clips.
        macs: executed MACs of the optimised model, mean over the clips.
    """

    clips: int
    decisions: float
    predictions: float
    probability_gap: float
    original_macs: float
    macs: float

    def __str__(self) -> str:
        """Say it in one line."""
        return (
            f"{self.clips} clips: {self.decisions:.2%} of the decisions and {self.predictions:.2%} of the predictions "
            f"are equal, probabilities within {self.probability_gap:.1e}; {self.macs / 1e9:.4g} GMACs a clip against "
            f"{self.original_macs / 1e9:.4g}"
        )


@torch.no_grad()
def compare(plain: StopOrForward, other: StopOrForward, clips: Tensor, lengths: Lengths | None = None) -> Agreement:
    """Run two models on the same clips and compare their decisions.

    Args:
        plain: the model to compare with, in eval mode.
        other: a model of the same stages, in eval mode and in any dtype.
        clips: `(B, T, C, H, W)` normalised frames.
        lengths: `(B,)` frames of each clip, where they are padded.

    Returns:
        The comparison.
    """
    wanted, got = (model(clips.to(next(model.parameters()).dtype), lengths=lengths) for model in (plain, other))
    equal = got.stopped_at == wanted.stopped_at
    equal = equal if wanted.lengths is None else equal[present(wanted.lengths, equal.shape[1])]
    return Agreement(
        clips=len(clips),
        decisions=equal.double().mean().item(),
        predictions=(got.logits.argmax(-1) == wanted.logits.argmax(-1)).double().mean().item(),
        probability_gap=(got.probabilities.double() - wanted.probabilities.double()).abs().max().item(),
        original_macs=wanted.macs.mean().item(),
        macs=got.macs.mean().item(),
    )


def optimize(
    model: StopOrForward,
    clips: Tensor,
    *,
    lengths: Lengths | None = None,
    compile: bool = True,
    dtype: torch.dtype | None = None,
    buckets: Sequence[int] | None = None,
    backend: str | Callable[..., Any] = "inductor",
) -> tuple[StopOrForward, Agreement]:
    """Build a faster copy of a model for inference at one image size.

    BatchNorm is folded into the convolution before it, weights become channels-last, and every stage is compiled for
    any number of rows. All compiling happens here. No later call compiles, for any decisions.

    Args:
        model: the model, in eval mode; it stays as it is.
        clips: `(B, T, C, H, W)` normalised calibration clips. The copy is for their frame size, and the decisions on
            them are compared.
        lengths: `(B,)` frames of each clip, where they are padded.
        compile: compile the stages. `False` only folds and changes the layout, which is quick.
        dtype: compute in this precision, such as `torch.bfloat16`; videos must then have it, too.
        buckets: batch sizes to pad to, such as `(1, 2, 4, 8)`. Stages are compiled for these sizes alone, on a GPU as
            CUDA graphs. By default one graph serves all sizes.
        backend: compiler, as in `torch.compile`.

    Returns:
        The faster model, and how its decisions on `clips` compare with the original model's.

    Raises:
        DynskipError: if the model is in training mode, or a bucket is not a positive number.
    """
    if model.training:
        raise DynskipError("Only a model in eval mode can be optimised, since BatchNorm is folded. Call model.eval().")
    if buckets is not None and (not buckets or min(buckets) < 1):
        raise DynskipError(f"buckets={tuple(buckets)} are no batch sizes; give positive numbers, such as (1, 2, 4, 8).")
    clips, ends = check_video(clips, model.backbone, lengths)
    images = clips[:, 0]
    backbone = fold(model.backbone, images).to(dtype=dtype)
    # A copy of the whole model keeps its class and its settings; the memo puts the folded backbone in.
    fast = copy.deepcopy(model, {id(model.backbone): backbone})
    fast.gates.to(dtype=dtype)
    fast.consensus.to(dtype=dtype)
    fast.inner = None
    fast._given_lookup = model.lookup_for((clips.shape[3], clips.shape[4]))
    fast.eval().requires_grad_(False)
    if compile:
        _compile(backbone, images[:1].to(dtype=dtype), sorted(set(buckets or ())), backend)
    return fast, compare(model, fast, clips, ends)


@torch.no_grad()
def fold(backbone: StagedBackbone, images: Tensor) -> StagedBackbone:
    """Copy a backbone with BatchNorm folded into the convolutions before it, and weights channels-last.

    A step that would change the logits, or what gates see, is left out.

    Args:
        backbone: the backbone, in eval mode; it stays as it is.
        images: `(B, C, H, W)` normalised images to try it on.

    Returns:
        The copy.
    """
    expected, pairs = _answers(backbone, images), _foldable(backbone, images[:1])
    folded = _with_folded(backbone, pairs)
    if not _gives(folded, images, expected):
        kept: list[tuple[str, str]] = []
        for pair in pairs:
            if _gives(_with_folded(backbone, [*kept, pair]), images, expected):
                kept.append(pair)
        folded = _with_folded(backbone, kept)
    folded.to(memory_format=torch.channels_last)
    if not _gives(folded, images, expected):
        folded.to(memory_format=torch.contiguous_format)
    return folded


def _foldable(backbone: StagedBackbone, images: Tensor) -> list[tuple[str, str]]:
    """Name the convolutions whose output enters a BatchNorm, each with that BatchNorm."""
    calls: Counter[str] = Counter()
    pairs: list[tuple[str, str]] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls[name] += 1
            if isinstance(module, _CONVOLUTIONS):
                output.made_by = name
            elif hasattr(inputs[0], "made_by"):
                pairs.append((inputs[0].made_by, name))

        return hook

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in backbone.named_modules()
        if (isinstance(module, _CONVOLUTIONS) and isinstance(module.weight, nn.Parameter))
        or (type(module) in _NORMS and module.running_mean is not None)
    ]
    try:
        backbone(images)
    finally:
        for handle in handles:
            handle.remove()
    return [pair for pair in pairs if all(calls[name] == 1 for name in pair)]


def _with_folded(backbone: StagedBackbone, pairs: Sequence[tuple[str, str]]) -> StagedBackbone:
    """Copy a backbone with these pairs of a convolution and a BatchNorm folded."""
    folded = copy.deepcopy(backbone)
    folded.channels_last = False  # compiled graphs take images as they come
    for conv_name, norm_name in pairs:
        conv: Any = folded.get_submodule(conv_name)
        norm: Any = folded.get_submodule(norm_name)
        fused = fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = fused.weight, fused.bias
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        folded.set_submodule(norm_name, rest.eval())
    return folded


def _answers(backbone: StagedBackbone, images: Tensor) -> list[Tensor]:
    """Return the pooled features of every stage, and the logits."""
    pooled, logits = encode_images(backbone, images)
    return [*pooled, logits]


def _gives(backbone: StagedBackbone, images: Tensor, expected: list[Tensor]) -> bool:
    """Say whether a backbone still gives the answers expected."""
    try:
        answers = _answers(backbone, images)
    except RuntimeError:  # from a `view` that needs another memory layout
        return False
    pairs = zip(answers, expected, strict=True)
    return all(bool((got - wanted).abs().max() <= 1e-4 * wanted.abs().max()) for got, wanted in pairs)


@torch.no_grad()
def _compile(
    backbone: StagedBackbone, image: Tensor, buckets: Sequence[int], backend: str | Callable[..., Any]
) -> None:
    """Put compiled functions in the place of the stages in eval mode, and run them so that all compiling is done."""
    kinds = [(("rows", 1),), *backbone._kinds[False], (("rows", 1),)]
    on_gpu = image.device.type == "cuda"
    dynamic = False if buckets else None
    mode = "reduce-overhead" if buckets and on_gpu and backend == "inductor" else None
    for n, segment in enumerate(backbone._segments[False]):
        fresh = _fresh(segment.function)
        compiled = torch.compile(fresh, fullgraph=True, dynamic=dynamic, backend=backend, mode=mode)
        function = _prepared(compiled, first=n == 0)
        if buckets:
            function = _in_buckets(function, len(segment.constants), (kinds[n], kinds[n + 1]), buckets)
        backbone._segments[False][n] = replace(segment, function=function)
    # The copy's weights never change, so the compiler may pack them once. Tracing reads this setting, too, so it cannot
    # be an option of torch.compile.
    with inductor_config.patch(freezing=not on_gpu):
        for batch in buckets[::-1] or WARM_UP:
            for _ in range(3 if buckets and on_gpu else 1):  # CUDA graphs are recorded in the second run
                _warm_up(backbone, image.expand(batch, -1, -1, -1).contiguous())


def _warm_up(backbone: StagedBackbone, images: Tensor) -> None:
    carry = backbone.start(images)
    for n in range(backbone.num_stages + 1):
        for tensor, rows in flatten(carry.values, carry.kinds):
            if rows:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        if n < backbone.num_stages:
            carry = backbone.run(n, carry)
    backbone.head(carry)


def _fresh(function: _Function) -> _Function:
    """Copy a function with a code object and a name of its own.

    torch keeps compiled forms with the code object, up to a limit. It remembers by name which sizes have varied: with
    one name, the shapes of one stage would make those of another dynamic.
    """
    code = function.__code__.replace(co_name=f"stage_{next(_serial)}")
    return types.FunctionType(code, function.__globals__, code.co_name)


def _prepared(function: _Function, first: bool) -> _Function:
    """Call a compiled function without gradients and in one memory layout, as it was compiled for."""

    def call(*args: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            return function(*tree_map_only(Tensor, lambda x: _canonical(x, first), args))

    return call


def _canonical(x: Tensor, first: bool) -> Tensor:
    """Give a tensor the usual strides of its shape: compiled graphs check them, even along axes of one element."""
    channels_last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last and not first else torch.contiguous_format
    strides = torch.empty(x.shape, device="meta", memory_format=layout).stride()
    return x if x.stride() == strides else x.contiguous(memory_format=layout).as_strided(x.shape, strides)


def _in_buckets(
    function: _Function, constants: int, kinds: tuple[tuple[Any, ...], tuple[Any, ...]], buckets: Sequence[int]
) -> _Function:
    """Run a stage at the batch sizes of `buckets` alone: pad by repeating the last row, split larger batches."""

    def call(model: nn.Module, *args: Any) -> tuple[Any, ...]:
        values = args[constants:]
        device = next(tensor.device for tensor, _ in flatten(values, kinds[0]))
        carry = Carry(values, kinds[0], batch_of(values, kinds[0]))
        parts = []
        for rows in torch.arange(carry.batch, device=device).split(buckets[-1]):
            bucket = next(size for size in buckets if size >= len(rows))
            padded = carry.select(torch.cat([rows, rows[-1:].expand(bucket - len(rows))]))
            outputs = function(model, *args[:constants], *padded.values)
            # Selecting copies, because the next replay of a CUDA graph overwrites its outputs.
            parts.append(Carry(outputs, kinds[1], bucket).select(torch.arange(len(rows), device=device)))
        return Carry.cat(parts).values

    return call
