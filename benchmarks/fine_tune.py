"""Fine-tune a backbone on packed clips, and store the features of all clips.

The whole backbone is trained, or with `--stages` its last stages, from what the others make of three variants of the
clips, which is stored.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sparse
import timm
import torch
from compose_untrimmed import CLIP_STEPS, Composition, compose, frames_of
from packed import Pictures
from torch import Tensor, nn
from tqdm import tqdm

from dynskip import DynskipError, FLOPsLookup, SoFLoss, StopOrForward, glance, sofnet, stage_model, video
from dynskip.backbone import Carry
from dynskip.backbone.weights import load_weights
from dynskip.losses import anytime_loss
from dynskip.video.outputs import whole_file
from dynskip.video.stored import classifier

VARIANTS, BATCH = 3, 8


def build(args: argparse.Namespace, classes: int, seed: int) -> tuple[StopOrForward, Any, FLOPsLookup]:
    """Return SoF-Net around the backbone, the same backbone after a glance, and what the light network costs."""
    torch.manual_seed(seed)
    shape = (3, args.size, args.size)
    plain = stage_model(args.backbone, boundaries=args.boundaries, num_classes=classes, input_size=shape)
    light: Any = timm.create_model(args.light_name, num_classes=0)
    for network, file in ((plain.model, args.weights), (light, args.light)):
        if file is not None:
            load_weights(network, file)
    model = sofnet(plain, hidden=sparse.HIDDEN, detach_inner=False, forward_bias=1.0, threshold=None)
    model.lookup_for((args.size, args.size))
    staged = stage_model(light, head=nn.Identity(), num_stages=1, input_size=(3, args.glance_size, args.glance_size))
    cost = FLOPsLookup.measure(staged, args.glance_size)
    model.to(args.device).to(memory_format=torch.channels_last)
    return model, glance(plain, light, args.glance_size).to(args.device), cost


def half_precision(args: argparse.Namespace) -> Any:
    return torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")


def shots_of(compositions: Sequence[Composition]) -> Tensor:
    """Number the shot that each frame is from, `(V, T)`."""
    return torch.tensor([[n for n, shot in enumerate(c.shots) for _ in range(shot.count)] for c in compositions])


def in_float(encoded: Any) -> Any:
    return replace(encoded, pooled=tuple(x.float() for x in encoded.pooled), frame_logits=encoded.frame_logits.float())


@dataclass
class FirstStages:
    """What the stages that stay as they are make of all frames: the next stage's inputs, and what gates see.

    A variant of the clips each. Frames are numbered clip by clip.
    """

    count: int
    inputs: list[np.ndarray]  # `(frames, C, H, W)` in half precision, on disk
    pooled: list[tuple[Tensor, ...]]  # `(frames, C_n)` of the glance and of those stages

    def run(self, backbone: Any, variant: int, frames: Tensor, pooled: list[Tensor] | None = None) -> Tensor:
        """Run the other stages on some frames; return logits `(M, K)`, and add to what gates see."""
        values = torch.from_numpy(self.inputs[variant][frames.numpy()]).float()
        carry = Carry((values.contiguous(memory_format=torch.channels_last),), (("rows", 1),), len(frames))
        for n in range(self.count, backbone.num_stages):
            carry = backbone.run(n, carry)
            if pooled is not None:
                pooled.append(backbone.pool(n, carry))
        logits: Tensor = backbone.head(carry)
        return logits


@torch.no_grad()
def first_stages(model: StopOrForward, glanced: Any, args: argparse.Namespace) -> FirstStages:
    """Run the stages that are not trained on all clips, in all variants; or read what they made."""
    made_of = [args.backbone, *([args.weights.stem] if args.weights else []), *(args.boundaries or [])]
    folder = args.packed / "-".join([*made_of, f"{args.size}-glance{args.glance_size}-stages{args.stages}"])
    folder.mkdir(exist_ok=True)
    backbone, glanced, count = model.eval().backbone, glanced.eval(), model.backbone.num_stages - args.stages
    pictures = Pictures(args.packed, args.size, args.device, backbone.model)
    found = FirstStages(count, [], [])
    for variant in range(VARIANTS):
        inputs, pooled = folder / f"inputs{variant}.npy", folder / f"pooled{variant}.pt"
        if not pooled.exists():
            parts, kept = None, []
            for frames, images in tqdm(all_frames(pictures, variant, args), f"first stages {variant}", disable=None):
                glance = glanced.run(0, glanced.start(images))
                seen, carry = [glanced.pool(0, glance)], backbone.start(images)
                for n in range(count):
                    carry = backbone.run(n, carry)
                    seen.append(backbone.pool(n, carry))
                if len(carry.values) != 1:
                    raise DynskipError(f"--stages {args.stages} begins inside a block; give another number.")
                if parts is None:
                    shape = (len(args.items) * CLIP_STEPS, *carry.values[0].shape[1:])
                    parts = np.lib.format.open_memmap(inputs, "w+", np.float16, shape)
                parts[frames.numpy()] = carry.values[0].half().numpy()
                kept.append(seen)
            with whole_file(pooled) as opened:
                torch.save([torch.cat(stage) for stage in zip(*kept, strict=True)], opened)
        found.inputs.append(np.load(inputs, mmap_mode="r"))
        found.pooled.append(tuple(torch.load(pooled)))
    return found


def all_frames(pictures: Pictures, variant: int, args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield numbers and images of all clips' frames: their middle crops, or another variant, drawn as in training."""
    for clips in torch.arange(len(args.items)).split(BATCH):
        clip, step = clips[:, None].expand(-1, CLIP_STEPS), torch.arange(CLIP_STEPS).expand(len(clips), -1)
        seed = video.derive_seed(args.seed, variant, int(clips[0]), 3)
        drawn = pictures.drawn(clip, step, torch.zeros_like(clip), seed) if variant else pictures.middle(clip, step)
        yield (clip * CLIP_STEPS + step).flatten(), drawn.flatten(0, 1)


def fine_tune(
    model: StopOrForward,
    items: Sequence[video.Item],
    source: Pictures | FirstStages,
    method: str,
    seed: int,
    args: argparse.Namespace,
) -> list[float]:
    """Train the backbone, or the stages behind those that stay; return each epoch's loss."""
    network, joint = model.backbone.model, method.startswith("joint")
    policy = [*model.gates.parameters(), *model.inner.parameters()] if model.inner is not None else []
    last = list(classifier(model).parameters())
    groups = [{"params": [p for p in network.parameters() if all(p is not own for own in last)], "scale": 1.0}]
    groups += [{"params": last, "scale": 1.0 if isinstance(source, Pictures) else 10.0}]  # few epochs for a new layer
    groups += [{"params": policy, "scale": 30.0}] if joint else []
    optimizer = torch.optim.AdamW(groups, args.lr, weight_decay=0.05)
    costs = model.lookup_for((args.size, args.size))
    together = SoFLoss(costs, sparse.ALPHA, sparse.BETA, normalize=True, all_frames=float(method == "joint-all"))
    rows, losses, warm = {item.path: row for row, item in enumerate(args.items)}, [], 2 if joint else 0
    for epoch in range(args.epochs):
        model.train()
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # its statistics stay those of the weights
        model.temperature = 5.0 * 0.08 ** (max(epoch - warm, 0) / max(args.epochs - warm - 1, 1))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * group["scale"] * (0.1 if epoch >= 0.75 * args.epochs else 1)
        plan = compose(items, sparse.IRRELEVANT, 1, video.derive_seed(seed, epoch), sparse.KINDS["half"].plan)
        (clip, step), shot = frames_of(plan, rows), shots_of(plan)
        classes = sorted({each.label for each in plan})
        targets = torch.tensor([classes.index(each.label) for each in plan]).to(args.device)
        torch.manual_seed(video.derive_seed(seed, epoch, 1))
        total = torch.zeros((), device=args.device)
        for number, own in enumerate(torch.randperm(len(plan)).split(BATCH)):
            truth = targets[own.to(args.device)]
            if isinstance(source, FirstStages):
                frames = (clip[own] * CLIP_STEPS + step[own]).flatten()
                logits = source.run(model.backbone, epoch % VARIANTS, frames).view(*clip[own].shape, -1)
            else:
                images = source.drawn(clip[own], step[own], shot[own], video.derive_seed(seed, epoch, number, 2))
                with half_precision(args):
                    encoded = model.encode(images)
                encoded = in_float(encoded)
                logits = encoded.frame_logits
            if joint and epoch >= warm:
                loss = together(model.decide(encoded), truth).total
            else:
                loss = anytime_loss(logits, truth, weight=float(method == "anytime"))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.detach()
        losses.append(round(total.item() / math.ceil(len(plan) / BATCH), 4))
    return losses


@torch.no_grad()
def features_of(
    model: StopOrForward, glanced: Any, source: Pictures | FirstStages, variant: int, args: argparse.Namespace
) -> video.StoredFeatures:
    """Encode a variant of all clips."""
    whole, seen, embedding = sofnet(glanced, hidden=8).to(args.device).eval(), list[Sequence[Tensor]](), list[Tensor]()
    last = classifier(model.eval())
    hook = last.register_forward_pre_hook(lambda _, inputs: embedding.append(inputs[0].float()))
    if isinstance(source, FirstStages):
        for frames in torch.arange(len(args.items) * CLIP_STEPS).split(BATCH * CLIP_STEPS):
            pooled: list[Tensor] = []
            source.run(model.backbone, variant, frames, pooled)
            seen.append([*(stage[frames] for stage in source.pooled[variant]), *pooled])
    else:
        for _, images in all_frames(source, variant, args):
            with half_precision(args):
                encoded = in_float(whole.encode(images[:, None]))
            seen.append([stage[:, 0] for stage in encoded.pooled])
    hook.remove()
    stages: list[Sequence[Tensor]] = [*zip(*seen, strict=True), embedding]
    joined = [torch.cat(tuple(stage)).unflatten(0, (-1, CLIP_STEPS)) for stage in stages]
    positions = torch.arange(len(args.items))
    return video.StoredFeatures(tuple(joined[:-1]), joined[-1], positions, (args.size, args.size))
