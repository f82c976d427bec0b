"""How often do thresholds from `calibrate.to_risk` lose more than they may?

    python benchmarks/risk.py synthetic
    python benchmarks/risk.py termination real --data DIR --weights FILE --cache DIR      # features of `ablation.py`
    python benchmarks/risk.py quarter
    python benchmarks/risk.py                                                 # prints the results that there are

A population of videos is split at random, 500 times, into calibration videos and the others. Thresholds come from the
calibration videos. They violate the guarantee if the mean loss of the whole population exceeds the risk. The loss of a
video is 1 if the answer differs from that of the dense network. Printed is the share of violations, which the guarantee
keeps at or below delta; beside it that of the usual choice, the cheapest thresholds whose mean loss on the calibration
videos is within the risk.

The path of thresholds is chosen once on videos outside the population, and its points are then tested on every split,
as `to_risk(..., learning=...)` does. With `quarter`, the whole of `to_risk` runs on every split of the synthetic
population, and a quarter of the split chooses the path. Results go to `benchmarks/results/risk.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ablation
import common
import torch
from torch import Tensor, nn

from dynskip import (
    DynskipError,
    EarlyTerminator,
    EncodedVideo,
    FixedGate,
    LinearGate,
    StopOrForward,
    calibrate,
    stage_model,
)
from dynskip.calibrate._replay import Replay
from dynskip.calibrate._risk import against_full, line, p_value
from dynskip.metrics import top_k_accuracy

RESULTS = Path(__file__).resolve().parent / "results" / "risk.json"
NAMES = {
    "synthetic": "synthetic",
    "quarter": "synthetic, path from a quarter",
    "termination": "real features, early termination",
    "real": "real features, SoF-Net",
}
SPLITS = 500
SETTINGS = ((0.02, 0.1, 200), (0.02, 0.1, 500), (0.05, 0.1, 200), (0.05, 0.05, 500), (0.1, 0.2, 200))
WHOLE = ((0.05, 0.1, 200),)
CLASSES, FRAMES = 4, 6


# ------------------------------------------------------------------------------------------------------ populations


def synthetic() -> StopOrForward:
    """Return a model of one stage, whose gate reads the first feature, and whose videos end early."""
    network: Any = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    backbone = stage_model(network, ["0"], input_size=(3, 8, 8))
    gate = LinearGate(4)
    with torch.no_grad():
        gate.decide.weight.zero_()
        gate.decide.weight[1, 0] = 2.0
        gate.decide.bias.zero_()
    return StopOrForward(backbone, [gate], terminator=EarlyTerminator(0.9, 1)).eval()


def draw(videos: int, seed: int) -> tuple[EncodedVideo, Tensor]:
    """Draw videos: half of the frames show the class, and the gate's feature tells this imperfectly."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (videos,), generator=generator)
    shows = torch.rand(videos, FRAMES, generator=generator) < 0.5
    strength = shows * 4 * torch.rand(videos, 1, generator=generator)
    logits = torch.randn(videos, FRAMES, CLASSES, generator=generator)
    logits = logits + strength[..., None] * nn.functional.one_hot(labels, CLASSES)[:, None]
    pooled = torch.randn(videos, FRAMES, 4, generator=generator)
    pooled[..., 0] += 2.0 * shows - 1
    return EncodedVideo((pooled,), logits, (8, 8)), labels


@torch.no_grad()
def measure(model: StopOrForward, videos: Sequence[EncodedVideo]) -> tuple[Tensor, float]:
    """Return the videos' losses, and the mean cost of one as a share of the dense network's."""
    outputs = [model.decide(each) for each in videos]
    pairs = zip(outputs, videos, strict=True)
    differs = [output.logits.argmax(-1) != each.frame_logits.mean(1).argmax(-1) for output, each in pairs]
    dense = videos[0].frame_logits.shape[1] * model.lookup_for(videos[0].image_size).dense
    return torch.cat(differs).double(), float(torch.cat([output.macs for output in outputs]).mean()) / dense


# ------------------------------------------------------------------------------------------------------- simulation


def on_a_path(model: StopOrForward, others: calibrate.Batches, population: Sequence[EncodedVideo]) -> dict[str, Any]:
    """Choose a path on other videos for every risk, and test it on every split of the population."""
    learning = against_full(Replay(model, others, top_k_accuracy), changed)
    paths, found = {}, {}
    for risk in dict.fromkeys(risk for risk, _, _ in SETTINGS):
        measured = []
        for point in line(learning, risk):
            point.apply(model)
            measured.append(measure(model, population))
        lost, costs = zip(*measured, strict=True)
        paths[risk] = torch.stack(lost), costs
        common.progress(f"path for risk {risk}")
    for risk, delta, size in SETTINGS:
        found[f"{risk} {delta} {size}"] = simulate(*paths[risk], risk, delta, size)
    return found


def changed(answers: Tensor, full: Tensor, targets: Tensor) -> Tensor:
    return answers.argmax(-1) != full.argmax(-1)


def simulate(lost: Tensor, costs: Sequence[float], risk: float, delta: float, size: int) -> dict[str, float]:
    """Test the path on every split: `(P, V)` losses, and the cost of each point."""
    truth, generator = lost.mean(1), torch.Generator().manual_seed(0)
    shown, usual = [], []
    for _ in range(SPLITS):
        own = lost[:, torch.randperm(lost.shape[1], generator=generator)[:size]].mean(1).tolist()
        refuted = [p_value(mean, size, risk, exact=True) <= delta for mean in own]
        shown.append(([*refuted, False]).index(False) - 1)
        usual.append(max((n for n, mean in enumerate(own) if mean <= risk), default=-1))
    return {
        "violations": share(shown, truth, risk),
        "usual": share(usual, truth, risk),
        "nothing passes": sum(n < 0 for n in shown) / SPLITS,
        "cost": sum(costs[n] if n >= 0 else 1.0 for n in shown) / SPLITS,
        "usual cost": sum(costs[n] if n >= 0 else 1.0 for n in usual) / SPLITS,
    }


def share(chosen: Sequence[int], truth: Tensor, risk: float) -> float:
    return sum(n >= 0 and float(truth[n]) > risk for n in chosen) / len(chosen)


def whole(model: StopOrForward, population: EncodedVideo, risk: float, delta: float, size: int) -> dict[str, float]:
    """Run `to_risk` on every split."""
    generator = torch.Generator().manual_seed(0)
    violations = nothing = 0
    costs = []
    for split in range(SPLITS):
        rows = torch.randperm(len(population.frame_logits), generator=generator)[:size]
        part = EncodedVideo((population.pooled[0][rows],), population.frame_logits[rows], population.image_size)
        model.forward_threshold, model.terminator = 0.5, EarlyTerminator(0.9, 1)
        try:
            calibrate.to_risk(model, [(part, torch.zeros(size))], risk, delta).apply(model)
        except DynskipError:
            nothing += 1
            costs.append(1.0)
            continue
        lost, own = measure(model, [population])
        violations += float(lost.mean()) > risk
        costs.append(own)
        common.progress(f"split {split + 1} of {SPLITS}: {violations} violations", end="")
    return {"violations": violations / SPLITS, "nothing passes": nothing / SPLITS, "cost": sum(costs) / SPLITS}


def real(args: argparse.Namespace, gates: bool) -> tuple[StopOrForward, calibrate.Batches, list[EncodedVideo]]:
    """Return SoF-Net trained on stored features, other videos, and a population: test videos composed anew.

    Without gates, the whole network reads frames until the terminator ends the video.
    """
    data, model = ablation.prepare(ablation.Run("gates"), args)
    if gates:
        ablation.train_gates(ablation.Run("gates"), data.training, model)
    else:
        model = StopOrForward(model.backbone, [FixedGate() for _ in model.gates])
    model.eval().terminator = EarlyTerminator(ablation.THRESHOLD, ablation.MIN_FRAMES)
    population = [data.compose("test", version).batches(model)[0][0] for version in range(1, 5)]
    return model, data.parts["val"].batches(model), population


# ----------------------------------------------------------------------------------------------------------- report


def table(content: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    columns = ["risk", "delta", "videos", "violations", "usual choice", "nothing passes", "cost", "its cost"]
    keys = ["violations", "usual", "nothing passes", "cost", "usual cost"]
    lines = ["| population | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, rows in content["results"].items():
        for setting, row in rows.items():
            cells = [*setting.split(), *(f"{100 * row[key]:.1f} %" if key in row else "" for key in keys)]
            lines.append(f"| {NAMES[name]} | " + " | ".join(cells) + " |")
    facts = ", ".join(f"{key} {value}" for key, value in content["machine"].items())
    return "\n".join([*lines, "", f"{SPLITS} splits; {facts}"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=(*NAMES, []), help="what to simulate")
    parser.add_argument("--data", type=Path, help="folder with labels.csv, see ablation.py")
    parser.add_argument("--weights", type=Path, help="ImageNet weights of resnet50_v1")
    parser.add_argument("--cache", type=Path, help="folder for encoded clips")
    args = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    for part in args.parts:
        if part == "synthetic":
            found[part] = on_a_path(synthetic(), [draw(1000, seed=0)], [draw(10_000, seed=1)[0]])
        elif part in ("termination", "real"):
            found[part] = on_a_path(*real(args, gates=part == "real"))
        else:
            model, (population, _) = synthetic(), draw(10_000, seed=1)
            found[part] = {
                f"{setting[0]} {setting[1]} {setting[2]}": whole(model, population, *setting) for setting in WHOLE
            }
    content = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"results": {}}
    if found:
        content = {"machine": common.machine("cpu"), "results": {**content["results"], **found}}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(table(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
