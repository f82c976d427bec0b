"""Does an exported SoF-Net decide as torch does on real clips, in a process in which torch cannot be imported?

    python benchmarks/onnx_agreement.py --data videos.csv --weights resnet50.safetensors

Gates are random; each one's bias is set so that decisions vary. Agreement is printed last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from dynskip import StopOrForward, sofnet
from dynskip.backbone.weights import load_weights
from dynskip.video import Preprocessing, load_items, open_source, sample_frames

ROOT = Path(__file__).resolve().parents[1]

WITHOUT_TORCH = """
import json, sys
for name in ("torch", "timm", "dynskip"):
    sys.modules[name] = None
import dynskip_onnx, numpy
runner = dynskip_onnx.load(sys.argv[1])
for video in numpy.load(sys.argv[2], mmap_mode="r"):
    result = runner.clip(video)
    print(json.dumps([result.stopped_at.tolist(), result.probabilities.tolist(), result.macs, result.speculative_macs]))
"""


@torch.no_grad()
def spread_decisions(model: StopOrForward, video: torch.Tensor, share: float = 0.8) -> None:
    """Shift every gate so that, before it has seen anything, it forwards this share of the frames."""
    generator = torch.Generator().manual_seed(0)
    for gate, pooled in zip(model.gates, model.encode(video).pooled, strict=True):
        for parameter in gate.parameters():
            parameter.add_(0.2 * parameter.std() * torch.randn(parameter.shape, generator=generator))
        frames = pooled.flatten(0, 1)
        logits, _ = gate(frames, gate.initial_state(len(frames)))
        gate.decide.bias[1] -= (logits[:, 1] - logits[:, 0]).quantile(1 - share)


def read_clips(path: Path, count: int, prep: Preprocessing) -> torch.Tensor:
    items = load_items(path)
    chosen = items[:: max(1, len(items) // count)][:count]
    sources = [open_source(item.path) for item in chosen]
    frames = [prep.crop(sample_frames(source, prep.num_frames, prep.short_side)) for source in sources]
    return prep.normalize(torch.stack(frames))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CSV of videos with the columns path and label")
    parser.add_argument("--backbone", default="resnet50", help="any timm model of 1000 classes")
    parser.add_argument("--weights", type=Path, required=True, help="weights of the backbone")
    parser.add_argument("--clips", type=int, default=20)
    args = parser.parse_args()
    prep = Preprocessing()
    torch.manual_seed(0)
    model = sofnet(args.backbone, 1000, threshold=0.9).eval()
    load_weights(model.backbone.model, args.weights)
    video = read_clips(args.data, args.clips, prep)
    spread_decisions(model, video[:4])
    with tempfile.TemporaryDirectory() as name:
        folder = model.export(Path(name) / "model", prep.size, mean=prep.mean, std=prep.std)
        np.save(Path(name) / "clips.npy", video.numpy())
        command = [sys.executable, "-c", WITHOUT_TORCH, str(folder), str(Path(name) / "clips.npy")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    outputs = [model(clip[None]) for clip in video]
    stopped_at = torch.cat([output.stopped_at for output in outputs])
    equal = (torch.tensor([run[0] for run in runs]) == stopped_at).double().mean().item()
    gap = max(
        (torch.tensor(run[1]) - output.probabilities[0]).abs().max().item()
        for run, output in zip(runs, outputs, strict=True)
    )
    macs, speculative = (sum(run[k] for run in runs) / len(runs) / 1e9 for k in (2, 3))
    wanted = sum(output.macs.item() for output in outputs) / len(outputs) / 1e9
    counts = {n: int((stopped_at == n).sum()) for n in range(-1, model.backbone.num_stages + 1)}
    print(f"frames unseen (-1), stopped at each gate, used ({model.backbone.num_stages}): {counts}")
    print(f"GMACs a clip: torch {wanted:.3f}, onnxruntime {macs:.3f} and {speculative:.3f} ahead of the decisions")
    print(f"largest difference of a probability: {gap:.1e}")
    print(f"equal decisions on {len(runs)} clips: {equal:.2%}")


if __name__ == "__main__":
    main()
