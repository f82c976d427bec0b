from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import timm_network
from PIL import Image
from torch import Tensor

from dynskip import UNSEEN, StopOrForward

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import common  # noqa: E402
import file_to_answer  # noqa: E402
import glance as glance_script  # noqa: E402
import gpu  # noqa: E402
import many_streams  # noqa: E402
import overhead  # noqa: E402
import per_video  # noqa: E402
import plot  # noqa: E402
import risk  # noqa: E402
import similarity  # noqa: E402
import soak  # noqa: E402
import startup  # noqa: E402
import training_step  # noqa: E402

from dynskip.video import stick_figures  # noqa: E402
from dynskip.video.files import VideoFile  # noqa: E402

# By hand, since a well-known package has the same name.
spec = importlib.util.spec_from_file_location("backbone_coverage", BENCHMARKS / "coverage.py")
assert spec is not None
assert spec.loader is not None
sys.modules[spec.name] = coverage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(coverage)

TOY = ["--quick", "--device", "cpu", "--backbone", "test_resnet", "--size", "64"]


@pytest.fixture
def toy() -> tuple[StopOrForward, Tensor]:
    return common.build(common.parser("").parse_args(TOY), 64)


def run(script: Any, folder: Path, *more: str) -> dict[str, Any]:
    file = folder / "results.json"
    script.main([*TOY, "--json", str(file), *more])
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("script", [overhead, many_streams, training_step, gpu], ids=lambda s: s.__name__)
def test_scripts_run_and_end_with_a_ratio(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = run(script, tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == content["question"] == script.__doc__.splitlines()[0]
    assert {"machine", "command"} <= content.keys()
    assert all(row["median_ms"] > 0 and row["gmacs"] > 0 for row in content["results"].values())
    *_, (name, ratio) = content["ratios"].items()
    assert printed[-1].startswith(f"{name}: {ratio['value']:.3f}")


def test_the_glance_script_follows_given_decisions(tmp_path: Path) -> None:
    decisions = tmp_path / "decisions.json"
    decisions.write_text(
        json.dumps({"6": {"with": [3, 0, 1, 0, 0, 0, 2], "without": [0, 1, 0, 1, 0, 4], "uniform": 3}})
    )
    options = ("--light", "test_efficientnet", "--light-size", "16", "--decisions", str(decisions))
    content = run(glance_script, tmp_path, *options)
    gmacs = {name: row["gmacs"] for name, row in content["results"].items()}
    dense = gmacs["dense TSN, 6 frames"]
    assert gmacs["uniform, 3 of 6 frames"] == dense / 2
    assert gmacs["gates with a glance, 6 frames"] < gmacs["gates without a glance, 6 frames"]
    assert len(content["ratios"]) == 3


def test_the_measured_decisions_are_on_all_frames() -> None:
    measured = glance_script.measured()
    assert set(measured) == {"16", "64"}
    for count, given in measured.items():
        for kind in ("with", "without"):
            stops = glance_script.stops(given[kind])
            assert stops.bincount(minlength=len(given[kind])).tolist() == given[kind]
            assert len(stops) == int(count)


def test_start_up_is_told_in_forwards(capsys: pytest.CaptureFixture[str]) -> None:
    startup.main(["--backbones", "test_resnet", "--rounds", "1"])
    assert re.search(
        r"^test_resnet .* staging [\d.]+ forwards, with verify=False [\d.]+$", capsys.readouterr().out, re.M
    )


def test_per_video_and_both_pictures(tmp_path: Path) -> None:
    content = run(per_video, tmp_path, "--eager")
    streams = run(many_streams, tmp_path)
    files = [tmp_path / name for name in ("bars.svg", "bars-dark.svg", "line.png", "line-dark.png")]
    written = []
    for _ in range(2):
        common.save_pair(lambda dark: plot.per_video(content, dark), files[0])
        common.save_pair(lambda dark: plot.streams(streams, dark), files[2])
        written.append([file.read_bytes() for file in files])
    assert written[0] == written[1]
    assert len(set(written[0])) == 4
    corners = [Image.open(file).convert("RGB").getpixel((0, 0)) for file in files[2:]]
    assert corners == [(255, 255, 255), (13, 17, 23)]


def test_the_speed_pages_tables_are_what_the_results_say() -> None:
    text = plot.PAGE.read_text(encoding="utf-8")
    assert plot.page(text) == text
    assert text.count("**no**") > 3  # the goals that are missed are told, too


def test_what_is_compared_is_the_fastest_dense_run() -> None:
    content = plot.read("per_video")
    times = {name: row["median_ms"] for name, row in content["results"].items()}
    for name in content["ratios"]:
        dense = name.split(" / ")[1]
        assert "optimised" in dense or times[dense] == min(times[way] for way in per_video.ways(dense[:9]))


def test_results_of_few_rounds_and_missed_goals_are_told() -> None:
    content = {
        "command": "python benchmarks/overhead.py",
        "results": {"online": {"median_ms": 20.0}},
        "ratios": {"online / bare stages": {"value": 1.0501, "wanted": "<= 1.05"}},
    }
    row = plot.ratios({"overhead": content}).splitlines()[-1]
    assert row == "| `overhead.py` | online: 20 ms | bare stages | 1.050 | ≤ 1.05 | **no** |"
    content["ratios"] = {"2 streams / full batches": {"value": 0.9, "wanted": ">= 0.9"}}
    assert plot.ratios({"many_streams": content}).endswith("| ≥ 0.9 | yes |")
    content["command"] = "python benchmarks/overhead.py --quick"
    with pytest.raises(RuntimeError, match="too few rounds"):
        plot.ratios({"overhead": content})


def test_files_are_made_and_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(file_to_answer.SHAPES, "360p", (96, 64))
    path = tmp_path / "long.mp4"
    file_to_answer.make(path, 60, 60, "360p")  # a segment of 10 seconds, written again and again
    source = VideoFile(path)
    assert len(source) == 60 * file_to_answer.RATE
    assert source.check() == ""
    assert source.index.key.nonzero()[0].tolist() == list(range(0, len(source), 60))
    content = run(file_to_answer, tmp_path, "--lengths", "10 s", "--shapes", "360p", "--distances", "60")
    ours, dense = (content["results"][f"10 s, 360p, key 60: {key}"] for key in ("ours", "one pass"))
    assert (ours["frames"], dense["frames"]) == (common.ENDS_AFTER, common.FRAMES)
    assert ours["frames"] <= ours["decoded"] < dense["decoded"] == 10 * file_to_answer.RATE
    assert re.search(r"\| 10 s, 360p, key 60 (\| [\d,]+ ){3}(\| \d\.\d{3} ){2}\| \d+ \|", capsys.readouterr().out)


def test_the_gpu_script_leaves_out_what_there_is_no_time_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = run(gpu, tmp_path, "--budget", "0")
    assert list(content["left_out"]) == ["bf16", "float32", "optimised", "gates"]
    assert not content["results"]
    assert not content["ratios"]
    printed = capsys.readouterr().out
    assert "gates that remember: clip, session and streams decide on cpu as on the CPU" in printed
    assert "left out: optimised: it may take 130 s, and 0 s are left" in printed


def test_the_gpu_script_times_nothing_that_decides_differently(
    toy: tuple[StopOrForward, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.check("the schedule", *toy, "cpu")
    right = gpu.session
    monkeypatch.setattr(gpu, "session", lambda *given: right(*given).clamp(max=4))
    with pytest.raises(RuntimeError, match="a session on cpu and a clip on the CPU decide differently on 10 of 16 fra"):
        gpu.check("the schedule", *toy, "cpu")


def test_the_gpu_script_checks_decisions_that_depend_on_memory(toy: tuple[StopOrForward, Tensor]) -> None:
    model, videos = gpu.remembering(toy[0].backbone, 4, 64)
    output = model(videos)
    first = model(videos.flatten(0, 1)[:, None]).stopped_at.view_as(output.stopped_at)
    assert (first != output.stopped_at)[output.seen].double().mean() > 0.1
    assert output.used.double().mean() > 0.25


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


def test_the_schedule_is_followed_in_any_order(toy: tuple[StopOrForward, Tensor]) -> None:
    model, video = toy
    stops = torch.tensor(common.schedule(model.backbone.num_stages))
    assert (stops == 5).sum() == 11
    assert sorted(stops[stops < 5] + 1) == [1, 2, 2, 3, 4]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    output = model(video[:, order])
    seen = output.stopped_at[0] != UNSEEN
    assert seen.sum() == 14
    assert torch.equal(output.stopped_at[0, seen], stops[order][seen])


def test_the_schedule_is_followed_in_half_precision(toy: tuple[StopOrForward, Tensor]) -> None:
    half, video = toy[0].bfloat16(), toy[1].bfloat16()
    assert {buffer.dtype for buffer in half.gates[0].buffers()} == {torch.float32, torch.bfloat16}
    common.check(half, video)


@pytest.mark.parametrize("videos", [1, 3])
def test_a_model_that_leaves_the_schedule_is_not_timed(toy: tuple[StopOrForward, Tensor], videos: int) -> None:
    model, several = toy[0], toy[1][0, common.orders(videos)]
    common.check(model, several)
    model.gates[3].verdicts.neg_()
    with pytest.raises(RuntimeError, match=f"of {16 * videos} frames left the schedule"):
        common.check(model, several)


def test_the_schedule_executes_the_thesis_macs_on_resnet50() -> None:
    args = common.parser("").parse_args(["--size", "168"])
    model, _ = common.build(args, 64)
    lookup = model.lookup_for((168, 168))
    stopped_at = torch.tensor([common.schedule(5)])
    stopped_at[:, common.ENDS_AFTER :] = -1
    assert lookup.cost(stopped_at, torch.tensor([-1])).item() == pytest.approx(27.1e9, rel=0.003)


def test_the_table_of_backbones_is_what_the_results_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = {name: getattr(coverage, name).read_text(encoding="utf-8") for name in ("PAGE", "ROWS")}
    for name in committed:
        monkeypatch.setattr(coverage, name, tmp_path / name)
    monkeypatch.setattr(coverage, "ROOT", tmp_path)
    signatures = json.loads(coverage.SIGNATURES.read_text(encoding="utf-8"))
    monkeypatch.setattr(coverage.timm, "__version__", signatures["timm"])
    coverage.main(["--report"])
    assert {name: (tmp_path / name).read_text(encoding="utf-8") for name in committed} == committed


def test_coverage_checks_a_model() -> None:
    outcome = coverage.examine("test_resnet")
    assert outcome.checks == dict.fromkeys(coverage.CHECKS, "ok")
    assert outcome.graphs == [1] * len(outcome.stages)


@pytest.mark.parametrize("state_update", ["used", "reached"])
def test_soak_finds_nothing_wrong(state_update: str) -> None:
    found = soak.soak(0.05, 8, state_update, bound=math.inf)  # how old frames are depends on what else the machine does
    assert found["streams"] > 8
    assert found["videos"] > 8
    assert found["problems"] == []


def test_the_risk_simulation_counts_what_loses_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(risk, "SPLITS", 60)
    lost = (
        torch.rand(3, 2000, generator=torch.Generator().manual_seed(0)) < torch.tensor([[0.0], [0.05], [0.12]])
    ).double()
    found = risk.simulate(lost, [0.9, 0.5, 0.2], risk=0.1, delta=0.1, size=200)
    assert found["violations"] <= 0.1 < found["usual"]  # the third point loses too much, and often seems not to
    assert found["nothing passes"] == 0
    assert 0.2 < found["usual cost"] < found["cost"] < 0.9
