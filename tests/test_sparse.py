"""Long and sparse videos: the benchmark, the recipe that says whether gates are worth it, and what both need."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dynskip import DynskipError, EncodedVideo, FLOPsLookup, SoFLoss, glance, metrics, sofnet, stage_model

for needed in ("av", "matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(needed)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import common  # noqa: E402
import compose_untrimmed as untrimmed  # noqa: E402
import sparse  # noqa: E402
import timm  # noqa: E402
from helpers import recipe  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from dynskip.video import Item, StoredFeatures, stick_figures  # noqa: E402

worth_it: Any = recipe("worth_it")
DOCS = Path(__file__).parents[1] / "docs"


class Largest(TorchDispatchMode):
    """Counts the tensors of at least so many numbers that are made."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.count = numbers, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += isinstance(result, Tensor) and result.numel() >= self.numbers
        return result


def test_the_gradient_of_a_long_video_does_not_fill_all_its_frames_once_a_frame() -> None:
    model = sofnet(stage_model("test_resnet", num_classes=3, input_size=(3, 32, 32)), hidden=16).train()
    criterion, counts = SoFLoss(model.lookup_for((32, 32))), []
    for frames in (64, 128):
        pooled = tuple(torch.randn(2, frames, channels) for channels in model.backbone.num_features)
        loss = criterion(model.decide(EncodedVideo(pooled, torch.randn(2, frames, 3), (32, 32))), torch.tensor([0, 1]))
        with Largest(2 * frames * 64) as largest:  # what all frames' shares of one gate's sums take
            loss.total.backward()
        counts.append(largest.count)
    assert counts[0] == counts[1]


def test_the_share_of_relevant_frames_is_estimated_from_what_frames_name() -> None:
    torch.manual_seed(0)
    targets = torch.arange(400) % 4
    relevant = torch.arange(50) < 10
    logits = torch.randn(400, 50, 4)  # irrelevant frames name any class
    logits[:, relevant] = 9 * nn.functional.one_hot(targets, 4)[:, None].float()
    logits[:, ~relevant, 0] += 1.0  # or one more often than others, whatever the video
    assert metrics.relevant_share(logits, targets) == pytest.approx(0.2, abs=0.02)
    assert metrics.relevant_share(logits[:, ~relevant], targets) == pytest.approx(0.0, abs=0.02)
    assert metrics.relevant_share(logits[:, relevant], targets) == 1.0
    for wrong in (targets[:3], torch.zeros_like(targets)):
        with pytest.raises(DynskipError, match="of at least two"):
            metrics.relevant_share(logits, wrong)


def test_errors_of_paired_differences_know_clusters() -> None:
    ones, others = [1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]
    mean, error = common.paired(ones, others, "abcd")
    assert (mean, error) == (0.5, pytest.approx(math.sqrt(4 * 0.25) / 4))
    assert common.paired(ones, others, "aabb") == (0.5, pytest.approx(math.sqrt(2) / 4))  # pairs that go together


ITEMS = [
    Item(Path(f"v_{label}_g{group:02d}_c01.mp4"), (label,), "train")
    for label in ("HorseRace", "Surfing", "Archery", "Piano")
    for group in range(1, 26)
]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make runs of the benchmark take a second: small networks, random features of clips, one epoch."""

    def networks(args: Any, classes: int) -> tuple[Any, Any, Any]:
        plain = stage_model("test_resnet", num_classes=classes, input_size=(3, sparse.SIZE, sparse.SIZE))
        cost = FLOPsLookup.measure(stage_model("test_efficientnet", input_size=(3, 16, 16)), 16)
        return plain, glance(plain, "test_efficientnet", 16), cost

    def encode(args: Any) -> tuple[StoredFeatures, list[Item]]:
        torch.manual_seed(0)
        channels = networks(None, 2)[1].num_features
        side = torch.tensor([{"Archery": -3.0, "Piano": 3.0}.get(item.labels[0], 0.0) for item in ITEMS])
        pooled = [0.1 * torch.randn(len(ITEMS), untrimmed.CLIP_STEPS, width) for width in channels]
        for stage in pooled:
            stage[..., 0] += side[:, None]
        return StoredFeatures(tuple(pooled), pooled[-1], torch.arange(len(ITEMS)), (sparse.SIZE, sparse.SIZE)), ITEMS

    kind = sparse.Kind(untrimmed.Plan(20, (2, 4)), {"train": 1, "val": 2, "test": 2}, 1, 0.5)
    monkeypatch.setattr(sparse, "networks", networks)
    monkeypatch.setattr(sparse, "encode", encode)
    monkeypatch.setattr(sparse, "KINDS", {"sparse": kind})
    monkeypatch.setattr(sparse, "RUNS", {f"sparse-fold{fold}-seed0": ("sparse", fold, 0) for fold in (0, 1)})
    monkeypatch.setattr(sparse, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sparse.committed, "__defaults__", (tmp_path / "results",))


@pytest.mark.usefixtures("tiny")
def test_runs_are_done_once_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [f"--{name}={tmp_path}" for name in ("data", "weights", "light", "features")]
    assert sparse.main(["--only", "sparse-fold1-seed0", *command]) == 0
    first = tmp_path / "results" / "sparse-fold1-seed0.json"
    content, written = json.loads(first.read_text()), first.stat().st_mtime_ns
    assert sparse.main(command) == 0
    assert first.stat().st_mtime_ns == written
    assert (tmp_path / "results" / "sparse-fold0-seed0.json").exists()
    assert all("g01" in clip or "g06" in clip or clip[-6:-4] in ("11", "16", "21") for clip in content["clips"])
    points = content["points"]
    assert set(points) == set(sparse.ROWS)
    dense = points["dense"][0]
    assert (dense["cost"], dense["rho"]) == (1.0, None)
    assert points["uniform frames"][-1]["hits"] == dense["hits"]  # all frames are all frames
    assert len(sparse.hits(dense)) == content["videos"]["test"] == 2 * len(content["clips"])
    # Every frame is classified right alone, so the oracle and all frames are right.
    assert sum(sparse.hits(points["relevant frames"][0])) == content["videos"]["test"]
    all_pass = points["gates after a glance"][0]
    assert (all_pass["p"], all_pass["rho"]) == (sparse.THRESHOLDS[0], None)
    capsys.readouterr()
    assert sparse.main(["--report"]) == 0
    printed = capsys.readouterr().out
    assert "| dense, all frames | " in printed
    assert " | 100.0 | +0.0 ± 0.0 (0.0) | +0.0 ± 0.0 (0.0) |" in printed
    assert sparse.main(["--plot", str(tmp_path)]) == 0
    assert (tmp_path / "sparse_sparse-dark.svg").exists()


def test_settings_are_chosen_on_the_validation_part() -> None:
    def point(val: float, cost: float, hits: str, **setting: Any) -> dict[str, Any]:
        return {"val": [val, cost], "cost": cost, "hits": f"{int('1' + hits, 2):x}", **setting}

    points = [
        point(0.9, 0.4, "1111", p=0.5, rho=None),
        point(0.7, 0.1, "0011", p=0.9, rho=None),
        point(0.7, 0.2, "0101", p=0.7, rho=None),
        point(0.8, 0.2, "0001", p=0.7, rho=0.9),
    ]
    assert sparse.choose(points, "chosen", 0.3) == points[2]  # of equals the costlier
    assert sparse.choose(points, "early", 0.3) == points[3]
    assert sparse.choose(points, "trained", 0.3) == points[0]
    assert sparse.choose(points, "chosen", 0.05) is None
    assert sparse.hits(points[2]) == [0.0, 1.0, 0.0, 1.0]
    assert sparse.at_least(points[1:3], 0.15) == points[2]
    assert sparse.at_least(points[1:3], 0.9) == points[2]


def test_the_benchmark_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert sparse.main(["--data", "x"]) == 2
    assert "Runs need --data, --weights, --light and --features" in capsys.readouterr().err


def test_the_page_has_the_tables_of_the_committed_results() -> None:
    assert sparse.report(sparse.committed()) in (DOCS / "sparse-videos.md").read_text(encoding="utf-8")
    for file in sparse.RESULTS.glob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        assert sparse.RUNS[file.stem] == tuple(content["run"].values())


def setting(val: float, macs: float, right: float = 0.9) -> Any:
    return worth_it.Setting("so", val, macs, (torch.arange(100) < 100 * right).double(), macs)


@pytest.mark.parametrize(
    ("gates", "light", "uniform", "advice"),
    [
        ((0.90, 0.2), (0.5, 0.05), (0.90, 0.3), "gates after a glance"),
        ((0.90, 0.2), (0.5, 0.05), (0.90, 0.22), "uniform frames"),  # what gates save is not worth their training
        ((0.90, 0.2), (0.9, 0.05), (0.90, 0.3), "the light network"),
        ((0.95, 0.9), (0.5, 0.05), (0.90, 0.3), "gates after a glance"),  # nothing else is as accurate
        ((0.80, 0.2), (0.5, 0.05), (0.80, 0.3), "dense"),
    ],
)
def test_the_advice_is_the_cheapest_of_the_good(
    gates: tuple[float, float], light: tuple[float, float], uniform: tuple[float, float], advice: str
) -> None:
    ways = {"dense": (0.9, 1.0), "uniform frames": uniform, "the light network": light, "gates after a glance": gates}
    lines = worth_it.advise({name: [setting(*way)] for name, way in ways.items()}, 0.01).splitlines()
    assert len(lines) == 5
    assert lines[-1].startswith(
        f"Use {advice}: 90.0% right at {100 * ways[advice][1]:.1f}% of the dense cost, +0.0 ± 0.0"
    )


def test_a_labelled_folder_gets_curves_and_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    stick_figures.render_set(data, train_per_class=1, test_per_class=2, size=32, num_frames=24)
    command = ["--data", data, "--out", out, "--size", 32, "--glance-size", 16, "--frames", 6, "--epochs", 1]
    command += ["--workers", 0, "--device", "cpu"]
    for option, name in (("", "test_resnet"), ("light-", "test_efficientnet")):
        file = tmp_path / f"{name}.safetensors"
        save_file(timm.create_model(name).state_dict(), file)
        command += [f"--{option}weights", file, "--light" if option else "--backbone", name]
    assert worth_it.main([*map(str, command)]) == 0
    first = capsys.readouterr().out
    assert "6 test videos of 6 frames" in first
    assert first.splitlines()[-1].startswith("Use ")
    curves = json.loads((out / "curves.json").read_text())
    assert len(curves["uniform frames"]) == 6
    assert curves["uniform frames"][-1] == curves["dense"][0]
    assert (out / "curves.png").exists()
    times = [file.stat().st_mtime_ns for file in sorted((out / "features").rglob("*.safetensors"))]
    assert worth_it.main([*map(str, command)]) == 0
    assert capsys.readouterr().out == first
    assert times == [file.stat().st_mtime_ns for file in sorted((out / "features").rglob("*.safetensors"))]
