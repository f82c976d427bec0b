"""What training at scale needs and is not about SoF-Net: processes, shared BatchNorm statistics, checkpoints."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from dynskip import DynskipError

# -------------------------------------------------------------------------------------------------------- processes

Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """The processes that train one model together; `torchrun` starts them.

    Attributes:
        rank: number of this process.
        size: how many there are.
        device: where this one computes.
        launcher: process id of what started this one.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    launcher: int = 0

    @classmethod
    def join(cls, device: str) -> World:
        """Join the others if `torchrun` started this process, or be alone."""
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return cls(device=device)
        kind = torch.device(device).type
        if kind == "cuda":
            if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
                raise DynskipError(
                    f"This machine has {torch.cuda.device_count()} GPUs for more processes. Lower --nproc-per-node, or "
                    "train with --device cpu."
                )
            device = f"cuda:{torch.cuda.current_device()}"  # see `choose_gpu`
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        return cls(dist.get_rank(), size, device, os.getppid())

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def check_launcher(self) -> None:
        """Stop if `torchrun` was killed: it starts processes in sessions of their own, so they outlive it.

        They would go on writing to the folder of a run that somebody has long resumed.
        """
        if self.size > 1 and os.getppid() != self.launcher:
            raise DynskipError("torchrun is gone, so this process stops, too.")

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def share(self, make: Callable[[], Value]) -> Value:
        """Return what the first process makes, in every process."""
        if self.size == 1:
            return make()
        box: list[Any] = [make() if self.is_first else None]
        dist.broadcast_object_list(box, device=torch.device(self.device))
        return box[0]

    def gather(self, values: list[str]) -> list[str]:
        """Join a list over the processes."""
        if self.size == 1:
            return values
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, values)
        return [value for box in boxes for value in box]

    def wrap(self, module: nn.Module) -> nn.Module:
        """Let gradients be averaged over the processes. Parameters that are not to be trained must say so before."""
        if self.size == 1:
            return module
        gc.collect()  # an earlier wrapping of the same parameters must be gone
        index = [torch.device(self.device).index] if self.device.startswith("cuda") else None
        wrapped = DistributedDataParallel(module, index)  # buffers start as the first process's ...
        wrapped.broadcast_buffers = False  # ... and go their own ways; as an argument, this would skip the start, too
        return wrapped

    def leave(self) -> None:
        """Leave the others; nothing can be shared afterwards."""
        if self.size > 1:
            dist.destroy_process_group()


def choose_gpu() -> None:
    """Take the GPU of this process's number on this machine, before anything is put on another one."""
    number = int(os.environ.get("LOCAL_RANK", 0))
    if 0 < number < torch.cuda.device_count():
        torch.cuda.set_device(number)


@contextlib.contextmanager
def explained(how_to_go_on: str) -> Iterator[None]:
    """Turn the failures of machines and of other processes into errors that say how to go on."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "DataLoader worker" in text:
            what = "A process that decodes videos died: out of memory, or killed. Use fewer --workers if it was memory."
        elif isinstance(error, torch.OutOfMemoryError):
            what = "The GPU's memory is full. Raise --accumulate, use --amp bf16, or lower --batch-size."
        elif isinstance(error, dist.DistError) or re.search("gloo|nccl|connection (closed|reset)", text, re.I):
            what = "Another of the training processes died, or cannot be reached; its own error tells why."
        else:
            raise
        raise DynskipError(f"{what} {how_to_go_on} ({text.splitlines()[0]})") from error


# -------------------------------------------------------------------------------------------------------- BatchNorm


class SyncedBatchNorm(TorchFunctionMode):
    """While active, BatchNorm in training takes its statistics over the batches of all processes.

    It works on any device and needs no other modules: whatever calls `torch.nn.functional.batch_norm` is served. Every
    process must run the same layers equally often.

    Args:
        world: the processes; alone, nothing changes.
        counts: whether this process's batch counts; a stand-in for an empty batch does not.

    Reference:
        Ioffe and Szegedy, "Batch Normalization", ICML 2015, over the union of the batches.
    """

    def __init__(self, world: World, counts: bool) -> None:
        super().__init__()
        self.world, self.counts = world, counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm and self.world.size > 1:
            return self._batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        output, mean, variance, count = _BatchNorm.apply(input, weight, bias, eps, float(self.counts), self.world)
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(mean.to(running_mean), momentum)
                running_var.lerp_((variance * count / (count - 1).clamp(min=1)).to(running_var), momentum)
        return output


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, counts: float, world: World
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.dims, ctx.shape = [d for d in range(x.ndim) if d != 1], [1, -1] + [1] * (x.ndim - 2)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rows = wide.new_full((1,), x.numel() / x.shape[1])
        sums = world.sum(counts * torch.cat([wide.sum(ctx.dims), rows]))
        mean, count = sums[:-1] / sums[-1], sums[-1]
        variance = world.sum(counts * (wide - mean.view(ctx.shape)).square().sum(ctx.dims)) / count
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), count)
        ctx.counts, ctx.world = counts, world
        ctx.mark_non_differentiable(mean, variance, count)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, mean, scale, count = ctx.saved_tensors
        gradient = gradients[0].to(mean.dtype)
        normal = (x.to(mean.dtype) - mean.view(ctx.shape)) * scale.view(ctx.shape)
        sums = torch.stack([gradient.sum(ctx.dims), (gradient * normal).sum(ctx.dims)])
        bias_gradient, weight_gradient = sums.unbind()  # this process's part; the wrapper averages parameters
        totals = ctx.counts * ctx.world.sum(sums.clone()) / count
        centred = gradient - totals[0].view(ctx.shape) - normal * totals[1].view(ctx.shape)
        scale = scale if weight is None else scale * weight
        found = (centred * scale.view(ctx.shape)).to(x.dtype)
        return found, *((None, None) if weight is None else (weight_gradient, bias_gradient)), None, None, None


def freeze_statistics(module: nn.Module) -> None:
    """Let BatchNorm use its running statistics in training, too; its scale and shift are still trained."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()


# ------------------------------------------------------------------------------------------------------ checkpoints


class CheckpointError(DynskipError):
    """A weight or checkpoint file that does not fit, is damaged or cannot be written."""


CHECKPOINT_FORMAT = "sofnet-1"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file in one step: a kill at any moment leaves the old file or the new one, whole.

    Raises:
        CheckpointError: if it cannot be written, such as on a full disk; the old file stays.
    """
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave the new name without its content
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch's writer has no better name for a full disk
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise CheckpointError(
            f"Could not write {path} ({str(error).splitlines()[0]}); {free / 1e6:.1f} MB were free on that disk. What "
            "was there before is whole. Make room, then continue with `train --resume`."
        ) from error


def save_checkpoint(path: Path, **content: Any) -> None:
    """Write a checkpoint in one step."""
    write_whole(path, lambda part: torch.save({"format": CHECKPOINT_FORMAT, **content}, part))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; tensors and plain values only, no code is run."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. --checkpoint takes a file that `train` wrote, such as last.pt.")
    try:
        check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way
        raise CheckpointError(
            f"{path} is damaged or no checkpoint ({type(error).__name__}). Copy it again, or train again."
        ) from error
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{path} was not written by this example. Plain backbone weights go with --weights instead of --checkpoint."
        )
    return content


def check_archive(path: Path) -> None:
    """Compare the checksums in a file that `torch.save` wrote; `torch.load` does not."""
    if path.suffix != ".safetensors":
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{damaged} is damaged")
