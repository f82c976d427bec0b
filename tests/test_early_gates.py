"""Losses that are to teach the first gates, which the benchmark compares."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SIZE, toy_model, toy_video

for needed in ("av", "matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(needed)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import early_gates  # noqa: E402
import sparse  # noqa: E402
from test_sparse import tiny  # noqa: E402, F401  (a fixture)


def test_what_is_executed_is_what_the_costs_say() -> None:
    model = toy_model(seed=2, share=0.7).train()
    output = model.decide(model.encode(toy_video(6, 8)), sample=False)
    lookup = model.lookup_for((SIZE, SIZE))
    share = early_gates.Executed(lookup)(output)
    executed = lookup.cost(output.stopped_at, torch.full((6,), -1)) / 8 / lookup.total
    assert share.item() == pytest.approx(executed.mean().item(), rel=1e-6)


@pytest.mark.usefixtures("tiny")
def test_variants_are_trained_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sparse, "THRESHOLDS", (0.5, 0.9))
    command: list[Any] = [f"--{name}={tmp_path}" for name in ("data", "weights", "light", "features")]
    command += [f"--out={tmp_path / 'out'}", "--kinds", "sparse", "--folds", "1"]
    assert early_gates.main(command) == 0
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) == len(early_gates.VARIANTS)
    times = [file.stat().st_mtime_ns for file in files]
    assert early_gates.main(command) == 0
    assert [file.stat().st_mtime_ns for file in files] == times
    assert early_gates.main(["--report", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for variant in early_gates.VARIANTS:
        assert f"| as trained | {variant} | 1 | " in printed
        assert f"| {variant} | irrelevant | " in printed
    assert "| as trained | thesis | 1 | " in printed
    (thesis,) = (line for line in printed.splitlines() if line.startswith("| as trained | thesis |"))
    assert thesis.endswith("| +0.0 ± 0.0 |")
    assert early_gates.main([]) == 2
