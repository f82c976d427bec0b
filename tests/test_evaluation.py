"""Evaluation of toy models on random videos, against scikit-learn and counting by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import balance, random_gates, toy_backbone, toy_video
from torch import Tensor

from dynskip import UNSEEN, DynskipError, EarlyTerminator, StopOrForward, calibrate
from dynskip.evaluation import MODES, Evaluation, curves, evaluate

LABELS = tuple("abcdefg")
FRAMES, STAGES, VIDEOS = 6, 3, 10
Batch = tuple[Tensor, Tensor, Sequence[str]]


def toy() -> StopOrForward:
    """Ten videos fare differently with it: frames are used, stopped and unseen, and some videos use no frame."""
    backbone = toy_backbone(stages=STAGES, classes=len(LABELS))
    gates = random_gates(backbone.num_features, 0)
    model = StopOrForward(backbone, gates, terminator=EarlyTerminator(0.6, 2)).eval()
    model.class_names = LABELS
    return balance(model, toy_video(4, 5, seed=1), 0.6)


def batches(several: bool = True) -> list[Batch]:
    """Videos in batches of three, with one or several labels each; nobody has label g."""
    video = toy_video(VIDEOS, FRAMES, seed=3)
    targets = torch.zeros(VIDEOS, len(LABELS), dtype=torch.long)
    for row in range(VIDEOS):
        targets[row, [row % 6, row * row % 5] if several else [row % 6]] = 1
    found = targets if several else targets.argmax(1)
    keys = [f"video {row}" for row in range(VIDEOS)]
    return [(video[i : i + 3], found[i : i + 3], keys[i : i + 3]) for i in range(0, VIDEOS, 3)]


RELEVANT = {f"video {row}": torch.tensor([0, 1, 1, 0, row % 2, 1], dtype=torch.bool) for row in range(2, VIDEOS)}


@pytest.fixture(scope="module")
def evaluated() -> Evaluation:
    return evaluate(toy(), batches(), relevant=RELEVANT)


@torch.no_grad()
def outputs(model: StopOrForward, mode: str) -> Any:
    """What the model gives for all videos at once."""
    if mode != MODES[2]:
        model.terminator = None
    return model(torch.cat([video for video, _, _ in batches()]), dense=mode == MODES[0])


@pytest.mark.parametrize("several", [True, False])
def test_scores_agree_with_scikit_learn(several: bool) -> None:
    ranking = pytest.importorskip("sklearn.metrics")
    for result in evaluate(toy(), batches(several)).results:
        scores = outputs(toy(), result.mode).probabilities.double().numpy()
        targets = torch.cat([targets for _, targets, _ in batches(several)]).numpy()
        hot = targets if several else np.eye(len(LABELS), dtype=int)[targets]
        ranked = np.take_along_axis(hot, np.argsort(-scores, axis=1), axis=1)
        assert result.top1 == pytest.approx(ranked[:, 0].mean())
        assert result.top5 == pytest.approx(ranked[:, :5].any(1).mean())
        present = hot.any(0)
        plain = ranking.average_precision_score(hot[:, present], scores[:, present], average="macro")
        assert result.plain_ap == pytest.approx(plain)
        precisions = []
        for column in np.flatnonzero(present):
            precision, recall, _ = ranking.precision_recall_curve(hot[:, column], scores[:, column])
            precisions.append(-np.sum(np.diff(recall) * np.maximum.accumulate(precision)[:-1]))
        assert result.mean_ap == pytest.approx(np.mean(precisions))


def test_costs_and_frames_are_those_of_the_model(evaluated: Evaluation) -> None:
    dense = toy().lookup_for((8, 8)).dense / 1e9
    assert [result.mode for result in evaluated.results] == list(MODES)
    assert evaluated.results[0].compute.per_video == pytest.approx(FRAMES * dense)
    for result in evaluated.results:
        output = outputs(toy(), result.mode)
        assert result.videos == VIDEOS
        assert result.compute.per_video == pytest.approx(float(output.macs.mean()) / 1e9)
        assert result.compute.per_frame == pytest.approx(result.compute.per_video / FRAMES)
        assert result.compute.share == pytest.approx(result.compute.per_video / (FRAMES * dense))
        stopped_at = output.stopped_at.numpy()
        assert result.usage.used == pytest.approx((stopped_at == STAGES).mean())
        assert result.usage.unseen == pytest.approx((stopped_at == UNSEEN).mean())
        assert result.usage.stopped == pytest.approx([(stopped_at == n).mean() for n in range(STAGES)])
        assert result.fallbacks == int((output.fallback_frame >= 0).sum())
        used = stopped_at[2:] == STAGES  # the first two videos are not annotated
        relevant = torch.stack(list(RELEVANT.values())).numpy()
        assert result.relevance is not None
        assert result.relevance.precision == pytest.approx((used & relevant).sum() / used.sum())
        assert result.relevance.recall == pytest.approx((used & relevant).sum() / relevant.sum())
    everything = evaluated.results[2].usage
    assert min(everything.used, everything.unseen, sum(everything.stopped)) > 0  # or little is compared here


def test_records_say_what_became_of_each_video(evaluated: Evaluation, tmp_path: Path) -> None:
    assert len(evaluated.records) == len(MODES) * VIDEOS
    targets = torch.cat([targets for _, targets, _ in batches()])
    for mode in MODES:
        output, own = outputs(toy(), mode), [record for record in evaluated.records if record["mode"] == mode]
        assert [record["video"] for record in own] == [f"video {row}" for row in range(VIDEOS)]
        for row, record in enumerate(own):
            assert record["labels"] == [LABELS[index] for index in targets[row].nonzero()]
            values, places = output.probabilities[row].topk(5)
            assert list(record["best"]) == [LABELS[index] for index in places]
            assert list(record["best"].values()) == pytest.approx(values.tolist())
            assert record["correct"] == (LABELS[places[0]] in record["labels"])
            assert record["gmacs"] == pytest.approx(float(output.macs[row]) / 1e9)
            assert record["stopped_at"] == output.stopped_at[row].tolist()
            assert record["fallback_frame"] == int(output.fallback_frame[row])
            assert record["milliseconds"] > 0
            parts = [(1, 3), (4, 6)] if row % 2 else [(1, 3), (5, 6)]
            assert record.get("relevant") == (None if row < 2 else parts)
    evaluated.write_records(tmp_path / "new" / "videos.jsonl")
    lines = (tmp_path / "new" / "videos.jsonl").read_text().splitlines()
    assert [json.loads(line)["stopped_at"] for line in lines] == [r["stopped_at"] for r in evaluated.records]


def test_the_table_shows_the_results(evaluated: Evaluation) -> None:
    brief, full = evaluated.rows(), evaluated.rows(full=True)
    assert evaluated.table().splitlines()[2:] == [f"| {' | '.join(row.values())} |" for row in brief]
    header = evaluated.table(full=True).splitlines()[0]
    assert header == "| | " + " | ".join(list(full[0])[1:]) + " |"
    for result, row, more in zip(evaluated.results, brief, full, strict=True):
        assert row.items() <= more.items()
        assert row["mode"] == result.mode
        assert row["top-1 %"] == f"{100 * result.top1:.1f}"
        assert float(row["GMACs/video"]) == pytest.approx(result.compute.per_video, rel=1e-3)
        assert float(row["ms/video"]) == pytest.approx(result.milliseconds, abs=0.051)
        shares = [float(row[name]) for name in ("used %", "stopped %", "unseen %")]
        assert sum(shares) == pytest.approx(100, abs=0.2)
        stops = [float(more[f"stopped at {name} %"]) for name in evaluated.stage_names]
        assert sum(stops) == pytest.approx(shares[1], abs=0.2)
        assert result.relevance is not None
        assert more["used: recall %"] == f"{100 * result.relevance.recall:.1f}"
    report = evaluated.report(full=True)
    assert report.startswith(evaluated.table(full=True))
    for words in (f"{VIDEOS} videos; ms: network only, 3 videos at a time, ", "multiply-adds", "annotated segments"):
        assert words in report
    assert "Precision and recall" not in evaluated.report()


def test_videos_without_a_used_frame_are_counted() -> None:
    model = toy()
    model.forward_threshold = 1.0
    evaluation = evaluate(model, batches(), MODES[1:2])
    assert evaluation.results[0].fallbacks == VIDEOS
    assert f"In {VIDEOS} videos the gates used no frame" in evaluation.report()
    assert all(record["fallback_frame"] >= 0 for record in evaluation.records)
    assert evaluation.results[0].relevance is None


def test_the_model_is_left_as_it_was() -> None:
    model = toy().train()
    terminator = model.terminator
    evaluate(model, batches())
    assert model.terminator is terminator is not None
    with pytest.raises(ZeroDivisionError):
        evaluate(model, ((1 / 0, *batch[1:]) for batch in batches()))
    assert model.terminator is terminator


def test_any_label_of_a_video_counts_as_right() -> None:
    (video, _, keys), *_ = batches()
    answers = toy()(video, dense=True).logits.argmax(-1)
    for second in (answers, (answers + 1) % 7):
        targets = torch.nn.functional.one_hot((answers + 2) % 7, 7) | torch.nn.functional.one_hot(second, 7)
        evaluation = evaluate(toy(), [(video, targets, keys)], MODES[:1])
        assert evaluation.results[0].top1 == float(second is answers)
        assert all(record["correct"] == (second is answers) for record in evaluation.records)


def test_classes_without_names_are_numbered() -> None:
    model = toy()
    model.class_names = None
    record = evaluate(model, batches(several=False), MODES[:1]).records[4]
    assert record["labels"] == ["4"]
    assert set(record["best"]) < set("0123456")


def test_nothing_to_evaluate() -> None:
    with pytest.raises(DynskipError, match="no videos to evaluate, or none of them could be read"):
        evaluate(toy(), [])


def test_curves_of_gates_and_of_what_they_compete_with() -> None:
    model = toy()
    encoded = calibrate.encode(model, batches(several=False))  # batches with keys, as `evaluate` takes them
    found = curves(model, encoded)
    assert list(found) == ["gates", "uniform frames", "random frames", "dense"]
    (dense,) = found["dense"]
    result = evaluate(model, batches(several=False), MODES[:1]).results[0]
    assert dense.accuracy == pytest.approx(result.top1)
    assert dense.macs == pytest.approx(1e9 * result.compute.per_video)
    assert len(found["uniform frames"]) == FRAMES
    calibration = calibrate.to_accuracy(model, encoded, 0.0)
    assert curves(model, encoded, calibration)["gates"] == calibration.curve == found["gates"]
