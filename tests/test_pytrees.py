"""What walks a module's output by torch's pytrees finds all tensors: wrappers for several processes, torch.export."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SIZE, toy_model, toy_video
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.checkpoint import checkpoint

from dynskip import EarlyExit, EfficiencyLoss, EncodedVideo, LossParts, SkipOutput, SoFLoss

TARGETS = torch.tensor([0, 1])


def training() -> Any:
    return toy_model(seed=2).train()


def results() -> dict[str, Any]:
    model = training()
    output, video = model(toy_video(2, 3)), toy_video(2, 3)
    exits = EarlyExit(model.backbone, list(model.gates), list(model.inner)).train()
    return {
        "a training pass": output,
        "a dense pass": model(video, dense=True),
        "a skipping pass": model.eval()(video),
        "exits": exits(video[:, 0]),
        "features": model.train().encode(video),
        "losses": SoFLoss(model.lookup_for((SIZE, SIZE)))(output, TARGETS),
    }


@pytest.mark.parametrize("what", ["a training pass", "a dense pass", "a skipping pass", "exits", "features", "losses"])
def test_pytrees_hold_every_tensor_of_a_result(what: str) -> None:
    result = results()[what]
    assert isinstance(result, SkipOutput | EncodedVideo | LossParts)
    names = [field.name for field in dataclasses.fields(result)]
    tensors = [x for name in names for x in tree_leaves(getattr(result, name)) if isinstance(x, Tensor)]
    assert [id(x) for x in tree_leaves(result) if isinstance(x, Tensor)] == [id(x) for x in tensors]
    copied = tree_map_only(Tensor, torch.clone, result)
    assert type(copied) is type(result)
    for name in names:
        value, copy = getattr(result, name), getattr(copied, name)
        if isinstance(value, str):
            assert copy == value
        else:
            torch.testing.assert_close(copy, value, equal_nan=True, rtol=0, atol=0)
    assert type(tree_map(lambda _: None, result)) is type(result)  # as when leaves are only looked at


class Step(nn.Module):
    """A whole training step as one module, as a user's wrapper has it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = training()
        self.loss = SoFLoss(self.model.lookup_for((SIZE, SIZE)))

    def forward(self, video: Tensor) -> Any:
        torch.manual_seed(0)
        return self.loss(self.model(video), TARGETS)


def test_the_whole_model_can_be_checkpointed() -> None:
    gradients = []
    for wrapped in (False, True):
        step = Step()
        video = toy_video(2, 3).requires_grad_()
        parts = checkpoint(step, video, use_reentrant=False) if wrapped else step(video)
        parts.total.backward()
        gradients.append([p.grad for p in step.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_torch_export_takes_outputs() -> None:
    model = training()
    loss = EfficiencyLoss(model.lookup_for((SIZE, SIZE)))
    output = tree_map_only(Tensor, torch.detach, model(toy_video(2, 3)))
    program = torch.export.export(loss, (output,))
    torch.testing.assert_close(program.module()(output), loss(output))


PROCESS = """
import os
import sys
import torch
import torch.distributed as dist
from helpers import SIZE, toy_model, toy_video
from dynskip import SoFLoss

torch.set_num_threads(1)
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
for options in ({}, {"static_graph": True}):
    model = toy_model(seed=2).train()
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    loss = SoFLoss(model.lookup_for((SIZE, SIZE)))
    wrapped = torch.nn.parallel.DistributedDataParallel(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    torch.manual_seed(rank)
    for step in range(3):
        optimizer.zero_grad()
        loss(wrapped(toy_video(2, 3, seed=100 * rank + step)), torch.tensor([0, 1])).total.backward()
        optimizer.step()
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.zeros_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.equal(*both), options
    assert not torch.equal(mine, start)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # gloo's threads may end the interpreter with an error after all is done
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_gradients_are_shared_between_processes(tmp_path: Path) -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "rendezvous")]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], errors
