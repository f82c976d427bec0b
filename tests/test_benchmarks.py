from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import timm_network

from dynskip import UNSEEN

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import clip_online  # noqa: E402
import common  # noqa: E402
import gpu  # noqa: E402
import many_streams  # noqa: E402
import overhead  # noqa: E402
import per_video  # noqa: E402
import plot  # noqa: E402
import similarity  # noqa: E402
import training_step  # noqa: E402

from dynskip.video import stick_figures  # noqa: E402

TOY = ["--quick", "--device", "cpu", "--backbone", "test_resnet", "--size", "64"]


def run(script: Any, folder: Path, *more: str) -> dict[str, Any]:
    file = folder / "results.json"
    script.main([*TOY, "--json", str(file), *more])
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("script", [overhead, clip_online, many_streams, training_step, gpu], ids=lambda s: s.__name__)
def test_scripts_run_and_end_with_a_ratio(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = run(script, tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == content["question"] == script.__doc__.splitlines()[0]
    assert {"machine", "command"} <= content.keys()
    assert all(row["median_ms"] > 0 and row["gmacs"] > 0 for row in content["results"].values())
    *_, (name, ratio) = content["ratios"].items()
    assert printed[-1].startswith(f"{name}: {ratio['value']:.3f}")


def test_per_video_and_both_pictures(tmp_path: Path) -> None:
    content = run(per_video, tmp_path, "--eager")
    plot.per_video(content).savefig(tmp_path / "per_video.png")
    plot.streams(run(many_streams, tmp_path)).savefig(tmp_path / "streams.png")
    assert (tmp_path / "per_video.png").stat().st_size > 10_000


def test_the_gpu_script_leaves_out_what_there_is_no_time_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = run(gpu, tmp_path, "--budget", "0")
    assert list(content["left_out"]) == ["bf16", "float32", "optimised", "captured"]
    assert not content["results"]
    assert [row["clip/dense"] for row in content["table"]] == [None] * 6
    printed = capsys.readouterr().out
    assert "gates that remember: clip, session and streams decide on cpu as on the CPU" in printed
    assert "left out: optimised: it may take 130 s, and 0 s are left" in printed


def test_the_gpu_script_times_nothing_that_decides_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    model, video = common.build(common.parser("").parse_args(TOY), 64)
    gpu.check("the schedule", model, video, "cpu")
    right = gpu.session
    monkeypatch.setattr(gpu, "session", lambda *given: right(*given).clamp(max=4))
    with pytest.raises(SystemExit, match="a session on cpu decides otherwise than a clip on the CPU, in 10 of 16 fr"):
        gpu.check("the schedule", model, video, "cpu")
    gpu.follow(model, gpu.in_turns(video, 3))
    model.gates[3].verdicts.neg_()
    with pytest.raises(RuntimeError, match="of 48 frames left the schedule"):
        gpu.follow(model, gpu.in_turns(video, 3))


def test_similarity_saves_and_tells_how_often_the_answer_is_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = stick_figures.render_set(tmp_path / "data", train_per_class=1, test_per_class=1, size=32, num_frames=24)
    weights = tmp_path / "weights.pt"
    torch.save(timm_network("test_resnet", 64, num_classes=1000).state_dict(), weights)
    content = run(similarity, tmp_path, "--data", str(data), "--weights", str(weights), "--every", "1", "--wanted", "0")
    results = content["results"]
    assert results["threshold"] == similarity.THRESHOLDS[-1]
    assert 0 < results["saved"] < 1
    assert results["gmacs_a_clip"] == pytest.approx((1 - results["saved"]) * results["dense_gmacs_a_clip"])
    assert str(tmp_path) not in json.dumps(content)
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0].startswith(f"share of GMACs saved: {results['saved']:.3f}")
    assert last[1].startswith(f"share of clips with the same top-1: {results['same_answer']:.3f}")


def test_onnx_against_torch(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    import onnx_torch

    assert len(run(onnx_torch, tmp_path, "--eager")["results"]) == 4


def test_the_schedule_is_followed_in_any_order() -> None:
    args = common.parser("").parse_args(TOY)
    model, video = common.build(args, 64)
    stops = torch.tensor(common.schedule(model.backbone.num_stages))
    assert (stops == 5).sum() == 11
    assert sorted(stops[stops < 5] + 1) == [1, 2, 2, 3, 4]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    output = model(video[:, order])
    seen = output.stopped_at[0] != UNSEEN
    assert seen.sum() == 14
    assert torch.equal(output.stopped_at[0, seen], stops[order][seen])


def test_the_schedule_is_followed_in_half_precision() -> None:
    model, video = common.build(common.parser("").parse_args(TOY), 64)
    half = model.bfloat16()
    assert {buffer.dtype for buffer in half.gates[0].buffers()} == {torch.float32, torch.bfloat16}
    common.check(half, video.bfloat16())


def test_a_model_that_leaves_the_schedule_is_not_timed() -> None:
    model, video = common.build(common.parser("").parse_args(TOY), 64)
    model.gates[3].verdicts.neg_()
    with pytest.raises(SystemExit, match="schedule"):
        common.check(model, video)


def test_the_schedule_executes_the_thesis_macs_on_resnet50() -> None:
    args = common.parser("").parse_args(["--size", "168"])
    model, _ = common.build(args, 64)
    lookup = model.lookup_for((168, 168))
    stopped_at = torch.tensor([common.schedule(5)])
    stopped_at[:, common.ENDS_AFTER :] = -1
    assert lookup.cost(stopped_at, torch.tensor([-1])).item() == pytest.approx(27.1e9, rel=0.003)
