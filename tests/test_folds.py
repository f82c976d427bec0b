"""Training five folds: packed pictures, augmentation, and a fold from clips to tables."""

from __future__ import annotations

import json
import math
import os.path
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dynskip import DynskipError

for needed in ("av", "matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(needed)

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import fine_tune  # noqa: E402
import packed as packing  # noqa: E402
import sparse  # noqa: E402
import train_folds  # noqa: E402
from compose_untrimmed import Plan  # noqa: E402

from dynskip.video import Item, stick_figures  # noqa: E402

CLASSES = ("Archery", "HorseRace", "Piano", "Surfing")
COLOURS = {"Archery": (200, 30, 30), "HorseRace": (30, 200, 30), "Piano": (30, 30, 200), "Surfing": (200, 200, 30)}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of one colour a class, which get brighter, packed and unpacked."""
    root = tmp_path_factory.mktemp("clips")
    rows = ["path,label,split"]
    for label in CLASSES:
        for group in range(1, 11):
            name = f"v_{label}_g{group:02d}_c01.mp4"
            light = np.linspace(0.5, 1.0, 16)[:, None, None, None]
            stick_figures.write_video(
                root / name, (light * np.full((16, 24, 32, 3), COLOURS[label])).astype(np.uint8), 8
            )
            rows.append(f"{name},{label},train")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    assert train_folds.main(["--pack", str(root), "--packed", str(root / "packed")]) == 0
    packing.unpack(root / "packed")
    return root / "packed"


def test_packed_pictures_come_back(packed: Path) -> None:
    names = json.loads((packed / "clips.json").read_text())
    frames = np.load(packed / "frames.npy")
    assert frames.shape == (len(names) * packing.PICTURES, 3, packing.HEIGHT, packing.WIDTH)
    means = frames.reshape(len(names), packing.PICTURES, 3, -1).mean(-1)
    for (name, label), own in zip(names, means, strict=True):
        assert label in name
        # A colour comes back within what compressing it twice changes, the last pictures at full light.
        assert np.abs(own[-1] - COLOURS[label]).max() < 25, name
        assert own[0].sum() < 0.7 * own[-1].sum()
    file = packed / "frames.npy"
    written = file.stat().st_mtime_ns
    packing.unpack(packed)
    assert file.stat().st_mtime_ns == written


def test_opencv_decodes_where_it_is(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = packing.pictures_of(packed / "part00.mp4")

    class Capture:
        def __init__(self, file: str) -> None:
            assert file == str(packed / "part00.mp4")
            self.rest = [picture.transpose(1, 2, 0)[..., ::-1] for picture in wanted]  # OpenCV has blue first

        def read(self) -> tuple[bool, Any]:
            return (True, self.rest.pop(0)) if self.rest else (False, None)

    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(VideoCapture=Capture))
    assert np.array_equal(packing.pictures_of(packed / "part00.mp4"), wanted)


def test_a_fold_needs_no_pyav() -> None:
    code = "import sys; sys.modules['av'] = None; sys.path.insert(0, 'benchmarks'); import train_folds; print('fine')"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.stdout == "fine\n", run.stderr


def test_pictures_missing_in_a_packed_file_are_told(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "part00.mp4").write_bytes((packed / "part00.mp4").read_bytes())
    (tmp_path / "clips.json").write_text((packed / "clips.json").read_text())
    with pytest.raises(DynskipError, match="144 pictures for 40 clips; expected 48 each"):
        packing.unpack(tmp_path)


def test_a_shot_is_cropped_as_one_and_others_differ(packed: Path) -> None:
    pictures = packing.Pictures(packed, 16, "cpu")
    clip, step = torch.zeros(2, 4, dtype=torch.long), torch.full((2, 4), 8)
    pictures.frames = torch.randint(0, 256, pictures.frames[:48].shape, dtype=torch.uint8)
    pictures.frames[:] = pictures.frames[:1]  # the same picture at all times, so that only crops differ
    shot = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
    drawn = pictures.drawn(clip, step, shot, 3)
    assert torch.equal(drawn[0, 0], drawn[0, 1])
    assert torch.equal(drawn[0, 2], drawn[0, 3])
    assert not torch.allclose(drawn[0, 0], drawn[0, 2])
    assert not torch.allclose(drawn[0, 0], drawn[1, 0])
    assert torch.equal(drawn, pictures.drawn(clip, step, shot, 3))
    assert not torch.allclose(drawn, pictures.drawn(clip, step, shot, 4))
    middle = pictures.middle(clip, step)
    assert middle.shape == (2, 4, 3, 16, 16)
    assert torch.equal(middle[0, 0], middle[1, 3])


def test_a_fold_goes_from_packed_clips_to_tables(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sparse, "SIZE", 64)
    monkeypatch.setattr(sparse, "THRESHOLDS", (0.5, 0.9))
    kinds = {"half": sparse.Kind(Plan(6, (2, 4), (1, 3)), {"train": 1, "val": 1, "test": 2}, 1, 0.8)}
    monkeypatch.setattr(sparse, "KINDS", kinds)
    command = ["--packed", str(packed), "--out", str(tmp_path), "--quick", "--device", "cpu", "--kinds", "half"]
    command += ["--gate-seeds", "2", "--methods", "anytime", "joint-all", "--folds", "1", "--workers", "1"]
    command += ["--boundaries", "layer1", "layer2", "layer4"]
    assert train_folds.main(command) == 0
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == [f"test_resnet-half-{method}-fold1-seed2.json" for method in ("anytime", "joint-all")]
    content: dict[str, Any] = json.loads((tmp_path / files[0]).read_text())
    assert all("_g01_" in clip or "_g06_" in clip for clip in content["clips"])
    assert set(content["points"]) == {"uniform frames", "light network", "relevant frames", "dense", "gates",
                                      "gates after a glance", "similarity gates"}  # fmt: skip
    assert content["videos"] == {"val": 4, "test": 8}
    # Unseen, stopped after each of three stages and a glance, used.
    assert {len(point["frames"]) for point in content["points"]["gates after a glance"]} == {6}
    assert len(content["losses"]) == 1
    assert math.isfinite(content["losses"][0])
    written = [(tmp_path / name).stat().st_mtime_ns for name in files]
    assert train_folds.main([*command, "--time"]) == 0
    assert written == [(tmp_path / name).stat().st_mtime_ns for name in files]
    capsys.readouterr()
    times = json.loads((tmp_path / "times-test_resnet-half-anytime.json").read_text())
    assert {"dense, a batch", "gates after a glance"} < set(times["ways"])
    assert times["ways"]["gates after a glance"]["gmacs"] < times["ways"]["dense, a batch"]["gmacs"]
    (tmp_path / files[0]).unlink()  # gates are fitted again, to stored features of the backbone
    monkeypatch.setattr(train_folds, "train_backbone", None)
    assert train_folds.main(command) == 0
    again = json.loads((tmp_path / files[0]).read_text())
    assert (again["points"], again["losses"]) == (content["points"], content["losses"])
    capsys.readouterr()
    assert train_folds.main(["--report", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| test_resnet at 64, anytime | half | dense, all frames |" in printed
    assert "### test_resnet, half: anytime, trained whole\n\n1 runs of 1 folds, seeds [2] of the" in printed
    assert "### test_resnet, half: joint-all" in printed
    assert "glance at 32x32, gates after layer1, layer2, layer4; dense" in printed
    assert train_folds.main(["--plot", str(tmp_path), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "folds_test_resnet_half_anytime-dark.svg").stat().st_size > 5000
    assert train_folds.main(["--packed", str(packed), "--out", str(tmp_path)]) == 2
    assert "Training needs --weights and --light" in capsys.readouterr().err


def test_the_last_stages_are_trained_from_what_the_others_made_once(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = train_folds.parser().parse_args(["--packed", str(packed), "--stages", "2", "--device", "cpu"])
    vars(args).update(train_folds.TINY, weights=None, light=None, light_name="test_efficientnet")
    names = json.loads((packed / "clips.json").read_text())
    args.items = [Item(Path(name), (label,), "train") for name, label in names]
    torch.manual_seed(0)
    model, glanced, _ = fine_tune.build(args, 2, args.seed)
    source = fine_tune.first_stages(model, glanced, args)
    monkeypatch.setattr(packing.Pictures, "crop", None)  # the second time, nothing is decoded or cropped
    assert fine_tune.first_stages(model, glanced, args).count == source.count == 3
    monkeypatch.undo()
    before = {name: value.clone() for name, value in model.backbone.model.state_dict().items()}
    items = [replace(item, split="train") for item in args.items]
    fine_tune.fine_tune(model, items, source, "anytime", 0, args)
    changed = {n.split(".")[0] for n, v in model.backbone.model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {"layer3", "layer4", "fc"}
    # Features of what was stored are those of the whole network, but for half precision.
    pictures = packing.Pictures(packed, args.size, "cpu", model.backbone.model)  # normalised as its weights want it
    for variant in (0, 1):
        stored, whole = (fine_tune.features_of(model, glanced, each, variant, args) for each in (source, pictures))
        for one, other in zip((*stored.pooled, stored.embedding), (*whole.pooled, whole.embedding), strict=True):
            torch.testing.assert_close(one, other, atol=5e-3, rtol=5e-3)
    command = ["--packed", str(packed), "--out", str(tmp_path), "--quick", "--stages", "2", "--methods", "joint"]
    assert train_folds.main(command) == 2
    assert "The joint methods train the whole backbone" in capsys.readouterr().err
    assert train_folds.main(["--packed", str(packed), "--quick"]) == 2  # nothing is written beside committed results
    assert "Say with --out where the results of --quick go" in capsys.readouterr().err


def test_what_failed_beside_others_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DynskipError, match="1 of 2 runs failed, see above"):
        train_folds.side_by_side(os.path.join, [("a", "b"), ("a", 1)], 2, "runs")
    printed = capsys.readouterr()
    assert printed.out == "a/b\n"
    assert "(1,) failed: TypeError" in printed.err


def test_the_page_has_the_tables_of_the_committed_results() -> None:
    page = (ROOT / "docs" / "results-folds.md").read_text(encoding="utf-8")
    assert train_folds.report(train_folds.RESULTS) in page
