"""A video that is run once, and decided on again at other settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

for needed in ("av", "PIL", "safetensors", "tqdm"):
    pytest.importorskip(needed)

from helpers import save_tiny_sofnet  # noqa: E402
from media import COUNT, write_video  # noqa: E402

from dynskip import CoarseToFine, EarlyTerminator, StopOrForward, video  # noqa: E402
from dynskip.video.seen import SeenVideo  # noqa: E402
from dynskip.video.similar import similarity_model  # noqa: E402

FRAMES = 6


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("seen") / "blocks.mp4")


@pytest.fixture
def model(tmp_path: Path) -> StopOrForward:
    return StopOrForward.from_pretrained(save_tiny_sofnet(tmp_path / "model", video.Preprocessing(32, FRAMES)))


@pytest.mark.filterwarnings("ignore:The gates have memory")
@pytest.mark.parametrize("order", [None, CoarseToFine()])
@pytest.mark.parametrize("forward", [0.0, 0.5, 0.9])
def test_decisions_and_costs_are_those_of_a_real_run(
    model: StopOrForward, file: Path, order: CoarseToFine | None, forward: float
) -> None:
    model.order = order
    seen = SeenVideo(model, video.open_source(file))
    gates = len(model.gates)
    seen.turn([*[forward] * gates, 0.2, 2])
    model.forward_threshold, model.terminator = forward, EarlyTerminator(0.2, 2)
    with video.LazyClips([video.open_source(file)], video.Preprocessing.of(model)) as clip, torch.no_grad():
        real, loaded = model(clip), clip.loaded()[0]
    output = seen.decide()
    assert torch.equal(output.stopped_at, real.stopped_at)
    torch.testing.assert_close((output.logits, output.macs), (real.logits, real.macs))
    assert (seen.loaded(output).frames, seen.loaded(output).decoded) == (loaded.frames, loaded.decoded)
    running = seen.running(output)
    assert len(running) == int(output.seen.sum())
    torch.testing.assert_close(running[-1:], real.probabilities)
    assert float(seen.dense.macs) == FRAMES * model.lookup_for((32, 32)).dense


def test_dials_set_this_video_alone(model: StopOrForward, file: Path) -> None:
    model.forward_threshold = 0.5
    seen, other = (SeenVideo(model, video.open_source(file)) for _ in range(2))
    before = other.decide().stopped_at
    seen.measure()
    values = [dial.value for dial in seen.dials()]
    seen.turn([1.0 for _ in model.gates] + values[len(model.gates) :])
    assert seen.gates_ms is None
    assert not seen.decide().used.any()
    assert torch.equal(other.decide().stopped_at, before)
    seen.turn(values)
    assert seen.gates_ms is not None
    assert torch.equal(seen.decide().stopped_at, before)
    assert seen.model.backbone.model.state_dict().keys() == model.backbone.model.state_dict().keys()
    assert next(seen.model.parameters()) is next(model.parameters())


def test_a_timm_model_gets_gates_that_need_no_training(tmp_path: Path, file: Path) -> None:
    import timm

    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pt")
    model = similarity_model("test_resnet", tmp_path / "weights.pt", 64, FRAMES)
    assert model.class_names is not None
    assert len(model.class_names) == 1000
    seen = SeenVideo(model, video.open_source(file))
    first, *end = seen.dials()  # the other gates cannot decide otherwise
    assert len(end) == 2
    used = []
    for threshold in (0.0, first.value, 0.9999):
        seen.turn([threshold, 1.0, 0])
        used.append(int(seen.decide().used.sum()))
    assert used[0] == FRAMES
    assert used == sorted(used, reverse=True)
    assert used[2] < FRAMES
    assert COUNT > FRAMES
