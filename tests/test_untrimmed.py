from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynskip import DynskipError

for needed in ("av", "matplotlib", "PIL", "safetensors", "tqdm"):
    pytest.importorskip(needed)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import ablation  # noqa: E402
import compose_untrimmed as untrimmed  # noqa: E402

from dynskip.video import Item, StoredFeatures, load_items, open_source, sample_frames, stick_figures  # noqa: E402

IRRELEVANT = ("squat_kick", "high_kick")
ITEMS = [
    Item(Path(f"v_{label}_g{group:02d}_c{clip:02d}.mp4"), (label,), "test" if group < 4 else "train")
    for label in stick_figures.CLASSES
    for group in range(1, 13)
    for clip in (1, 2)
]


PLANS = [untrimmed.Plan(), untrimmed.Plan(64, (4, 8), (3, 8)), untrimmed.Plan(5, (1, 5), (1, 1))]


@given(st.integers(0, 2**32), st.integers(1, 3), st.sampled_from(PLANS))
def test_videos_are_composed_of_their_own_split(seed: int, copies: int, plan: untrimmed.Plan) -> None:
    items = untrimmed.split_off_validation(ITEMS, 0.3, seed)
    compositions = untrimmed.compose(items, IRRELEVANT, copies, seed, plan)
    assert compositions == untrimmed.compose(items, IRRELEVANT, copies, seed, plan)
    assert len({composition.name for composition in compositions}) == len(compositions)
    split_of = {item.path: item.split for item in items}
    seen: dict[Path, set[str]] = {}
    for composition in compositions:
        start, end = composition.segment
        assert len(composition.steps) == plan.steps
        assert plan.action[0] <= end - start <= plan.action[1]
        assert max(shot.count for shot in composition.shots) <= max(plan.action[1], plan.stretch[1])
        for position, (item, step) in enumerate(composition.steps):
            relevant = start <= position < end
            assert (item.labels[0] == composition.label) is relevant
            assert (item.labels[0] in IRRELEVANT) is not relevant
            assert 0 <= step < untrimmed.CLIP_STEPS
            seen.setdefault(item.path, set()).add(composition.split)
    assert all(splits == {split_of[path]} for path, splits in seen.items())
    labelled = Counter(composition.shots[composition.action].clip for composition in compositions)
    assert set(labelled.values()) == {copies}
    assert len(labelled) == sum(item.labels[0] not in IRRELEVANT for item in items)


def test_groups_stay_together_and_every_class_is_validated() -> None:
    items = untrimmed.split_off_validation(ITEMS, 0.3, 0)
    splits: dict[tuple[str, str], set[str]] = {}
    for item in items:
        splits.setdefault((item.labels[0], item.path.name.rpartition("_c")[0]), set()).add(item.split)
    assert all(len(found) == 1 for found in splits.values())
    counts = Counter((item.labels[0], item.split) for item in items)
    assert all(counts[label, "val"] == 6 and counts[label, "test"] == 6 for label in stick_figures.CLASSES)
    assert [item.path for item in items] == [item.path for item in ITEMS]


def test_different_seeds_compose_differently() -> None:
    assert untrimmed.compose(ITEMS, IRRELEVANT, 1, 0) != untrimmed.compose(ITEMS, IRRELEVANT, 1, 1)


@pytest.mark.parametrize(
    ("steps", "action", "stretch"),
    [
        (16, (0, 4), (2, 5)),
        (64, (4, 17), (2, 5)),
        (4, (1, 5), (2, 5)),
        (16, (6, 5), (2, 5)),
        (64, (4, 8), (0, 5)),
    ],
)
def test_plans_that_no_clip_can_fill_are_refused(steps: int, action: tuple[int, int], stretch: tuple[int, int]) -> None:
    with pytest.raises(DynskipError, match="the fewest and the most steps, from 1 to"):
        untrimmed.Plan(steps, action, stretch)


def test_every_group_is_tested_once() -> None:
    folds = [untrimmed.split_by_group(ITEMS, 5, fold) for fold in range(5)]
    for versions in zip(*folds, strict=True):
        assert [item.split for item in versions].count("test") == 1
    groups = [{item.path.name.split("_g")[1][:2] for item in fold if item.split == "test"} for fold in folds]
    assert [len(group) for group in groups] == [2, 3, 3, 2, 2]
    with pytest.raises(DynskipError, match="camera group in their names"):
        untrimmed.split_by_group([Item(Path("a.mp4"), ("x",), "train")], 5, 0)


@pytest.mark.parametrize("irrelevant", [["waving"], list(stick_figures.CLASSES)])
def test_classes_that_do_not_work_are_refused(irrelevant: list[str]) -> None:
    with pytest.raises(DynskipError, match="--irrelevant names some of them"):
        untrimmed.compose(ITEMS, irrelevant, 1, 0)


def test_a_split_without_material_is_refused() -> None:
    items = [item for item in ITEMS if item.split == "train" or item.labels[0] not in IRRELEVANT]
    with pytest.raises(DynskipError, match="Split 'test' has no clip"):
        untrimmed.compose(items, IRRELEVANT, 1, 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    return stick_figures.render_set(folder, train_per_class=2, test_per_class=1, size=64, num_frames=32)


@pytest.mark.parametrize(
    ("steps", "more"), [(16, []), (24, ["--steps", "24", "--action", "2", "3", "--stretch", "5", "9"])]
)
def test_written_videos_show_what_was_composed(
    steps: int, more: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "untrimmed"
    command = ["--data", str(data), "--out", str(out), "--irrelevant", *IRRELEVANT, "--val", "0.5", *more]
    assert untrimmed.main(command) == 0
    items = load_items(out)
    assert Counter(item.split for item in items) == {"train": 4, "val": 4, "test": 4}
    with (out / "segments.csv").open(newline="") as handle:
        segments = {out / row["path"]: (int(row["start"]), int(row["end"])) for row in csv.DictReader(handle)}
    clips = untrimmed.split_off_validation(load_items(data), 0.5, 0)
    plan = untrimmed.Plan(steps, (2, 3), (5, 9)) if more else untrimmed.Plan()
    for composition in untrimmed.compose(clips, IRRELEVANT, 1, 0, plan)[::3]:
        file = out / f"{composition.name}.mp4"
        sampled = sample_frames(open_source(file), steps, 64).astype(np.int64)
        middles = [int(untrimmed.PICTURES_A_STEP * (k + 0.5)) for k in range(steps)]
        start, end = segments[file]
        for (clip, step), frame, middle in zip(composition.steps, sampled, middles, strict=True):
            wanted = sample_frames(open_source(clip.path), untrimmed.CLIP_STEPS, 64)[step]
            assert np.abs(frame - wanted).mean() < 14  # compression; another clip is twice as far
            assert (start <= middle < end) is (clip.labels[0] == composition.label)
    assert untrimmed.main(command) == 2
    assert "holds a data set already" in capsys.readouterr().err


def test_features_of_clips_become_features_of_videos() -> None:
    items = untrimmed.split_off_validation(ITEMS, 0.3, 0)
    compositions = [c for c in untrimmed.compose(items, IRRELEVANT, 1, 0) if c.split == "test"]
    listed = [item for item in items if item.split == "test"]
    rows = {item.path: row for row, item in enumerate(listed)}
    # A frame's feature says which it is: clip and step.
    mark = torch.arange(len(listed))[:, None] * 100.0 + torch.arange(untrimmed.CLIP_STEPS)
    clips = {"test": StoredFeatures((mark[..., None],), mark[..., None], torch.arange(len(listed)), (32, 32))}
    features = ablation.put_together(clips, compositions, rows)
    relevant = untrimmed.relevant_frames(compositions)
    for row, composition in enumerate(compositions):
        marks = [rows[item.path] * 100.0 + step for item, step in composition.steps]
        assert features.pooled[0][row, :, 0].tolist() == features.embedding[row, :, 0].tolist() == marks
        labels = [item.labels[0] == composition.label for item, _ in composition.steps]
        assert relevant[row].tolist() == labels
    composed = untrimmed.Composed.of(compositions, clips["test"], listed)
    assert composed.relevant.equal(relevant)
    assert composed.means(clips["test"].embedding).equal(features.embedding.mean(1))
    assert composed.clips == [composition.shots[composition.action].clip.path.stem for composition in compositions]
    classes = sorted({composition.label for composition in compositions})
    assert [classes[target] for target in composed.targets] == [composition.label for composition in compositions]


def test_the_report_is_that_of_the_committed_results(capsys: pytest.CaptureFixture[str]) -> None:
    results = ablation.committed()
    assert {result["run"]["seed"] for result in results} >= {0, 1, 2}
    assert ablation.main(["--report"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() in (Path(__file__).parents[1] / "docs" / "results-tables.md").read_text(encoding="utf-8")


def test_a_report_of_some_of_the_runs_leaves_out_what_they_do_not_show() -> None:
    results = ablation.committed()
    assert "| 2 seeds |" in ablation.report(
        [r for r in results if r["run"]["beta"] is not None or r["run"]["seed"] < 2]
    )
    assert " seeds |" not in ablation.report([r for r in results if r["run"]["beta"] is not None])


def test_a_table_row_is_mean_and_deviation_of_its_runs() -> None:
    def result(top1: float) -> dict[str, Any]:
        measured = {"mean_ap": 0.5, "top1": top1, "gmacs": 10.0, "used": 0.5, "precision": 0.75, "recall": 1.0}
        return {"dense_gmacs": 40.0, "modes": {"gates": {"test": measured}}}

    row = ablation.row("x", [result(0.8), result(0.9)], "gates", "thesis")
    spreads = ["50.0 ± 0.0", "85.0 ± 7.1", "10.0 ± 0.0", "25.0 ± 0.0", "50.0 ± 0.0", "75.0 ± 0.0", "100.0 ± 0.0"]
    assert row == ("x", [*spreads, "thesis"])


def test_thresholds_within_a_budget_are_chosen_on_the_validation_part() -> None:
    def point(val: float, test: float, gmacs: float) -> dict[str, Any]:
        return {"val": {"top1": val, "gmacs": gmacs}, "test": {"top1": test, "gmacs": 2 * gmacs}}

    curve = [point(0.5, 0.9, 1), point(0.7, 0.6, 2), point(0.7, 0.8, 3), point(0.9, 1.0, 5)]
    assert ablation.within(curve, 4) == curve[2]  # of two that are alike there, the costlier
    assert ablation.within(curve, 0.5) is None


def test_each_training_has_a_curve_and_each_set_its_own() -> None:
    def result(seed: int, **settings: Any) -> dict[str, Any]:
        run = asdict(ablation.Run("gates", seed=seed, **settings))
        name = f"{seed} {settings.get('alpha', 0.9)}"
        return {"run": run, "dense_gmacs": 40.0, "termination": [name], "modes": {"gates": "gates"}, "curve": [name]}

    found = ablation.curves([result(1), result(0), result(0, alpha=0.7), result(0, irrelevance="late")])
    assert found["SoF-Net"] == [(40.0, ["1 0.9", "gates"]), (40.0, ["0 0.9", "gates"])]
    assert found["SoF-Net, alpha 0.7"] == [(40.0, ["0 0.7", "gates"])]
    assert found["SoF-Net, all thresholds"] == [(40.0, ["1 0.9"]), (40.0, ["0 0.9"])]


def test_runs_have_names_of_their_own_and_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    names = [run.name for run in ablation.PLAN]
    assert len(set(names)) == len(names)
    assert ablation.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == names
    assert ablation.main(["--only", "nothing", "--data", "x", "--weights", "y"]) == 2
    assert "no run 'nothing'" in capsys.readouterr().err
    files = {file.stem for file in ablation.RESULTS.glob("*.json")}
    assert files <= set(names)
    for name in files:
        content = json.loads((ablation.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        assert ablation.Run(**content["run"]).name == name in content["command"]
