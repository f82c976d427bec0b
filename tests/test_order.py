"""Frame orders: which frame comes when, results in the video's own times, models that keep their order."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    SIZE,
    Case,
    assert_same,
    cases,
    consensuses,
    fields_of,
    large_cases,
    randn,
    toy_model,
    toy_video,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dynskip_onnx
from dynskip import (
    CoarseToFine,
    DynskipError,
    EarlyTerminator,
    FixedGate,
    FrameOrder,
    LinearGate,
    PolicyGate,
    RandomOrder,
    SkipOutput,
    StopOrForward,
    stage_model,
)
from dynskip.runtime.export import describe_consensus, describe_order
from dynskip_onnx import DynskipOnnxError


class Backwards(FrameOrder):
    """The last frame first."""

    def forward(self, num_frames: int) -> Tensor:
        return torch.arange(num_frames).flip(0)


class Broken(FrameOrder):
    def __init__(self, gives: Any) -> None:
        super().__init__()
        self.gives = gives

    def forward(self, num_frames: int) -> Tensor:
        return self.gives  # type: ignore[no-any-return]


def test_ten_frames_come_as_in_frameexit() -> None:
    assert CoarseToFine()(10).tolist() == [5, 0, 9, 2, 7, 4, 6, 3, 8, 1]


@given(st.integers(1, 200), st.integers(-3, 1000))
def test_every_frame_comes_once_and_the_first_ones_lie_apart(frames: int, seed: int) -> None:
    for order in (CoarseToFine(), RandomOrder(seed)):
        assert sorted(order(frames).tolist()) == list(range(frames))
        assert torch.equal(order(frames), order(frames))
    found = CoarseToFine()(frames).tolist()
    assert found[:3] == list(dict.fromkeys([frames // 2, 0, frames - 1]))
    parts = 4
    while 2 * parts <= frames:  # after each level, no two neighbours lie further apart than a part of it
        looked = sorted(found[: parts + 1])
        assert max(b - a for a, b in itertools.pairwise(looked)) <= -(-frames // parts)
        parts *= 2


def test_seeds_draw_differently() -> None:
    orders = [tuple(RandomOrder(seed)(12).tolist()) for seed in range(-3, 4)]
    assert len(set(orders)) == 7


def arranged(output: SkipOutput, at: Tensor) -> SkipOutput:
    """Put the output of a pass over `video[:, at]` into the video's own times, slowly."""
    values = fields_of(output)
    for name in ("forward", "used", "stopped_at", "frame_logits", "gate_logits", "inner_logits", "evaluated"):
        if values[name] is not None:
            moved = torch.empty_like(values[name])
            for step, frame in enumerate(at.tolist()):
                moved[:, frame] = values[name][:, step]
            values[name] = moved
    steps = values["fallback_frame"]
    values["fallback_frame"] = torch.tensor([-1 if step < 0 else int(at[step]) for step in steps.tolist()])
    return SkipOutput(**values)


def test_results_are_those_of_the_ordered_video_in_its_own_times() -> None:
    ended = []

    def check(case: Case, order: FrameOrder, window: int) -> None:
        model, video = case.model(), case.video()
        at = order(case.frames)
        wanted = arranged(model.decide(model.encode(video[:, at])), at)
        dense, training = (arranged(model(video[:, at], dense=True), at), arranged(trained(model, video[:, at]), at))
        model = case.model()
        model.order = order
        assert_same(model(video), wanted, skip=["inner_logits"])
        assert_same(model.run_clip(video, window), wanted, skip=["inner_logits"])
        assert_same(model.decide(model.encode(video)), wanted)
        assert_same(model(video, dense=True), dense)
        assert_same(trained(model, video), training)
        ended.append(bool((~wanted.seen).any()))

    def trained(model: StopOrForward, video: Tensor) -> SkipOutput:
        model.train()
        output = model.decide(model.encode(video), sample=False)
        model.eval()
        return output

    for n, case in enumerate(large_cases("lstm", "used")[:2]):
        check(case, (CoarseToFine(), Backwards())[n], 3)
    orders = st.one_of(st.just(CoarseToFine()), st.builds(RandomOrder, st.integers(0, 99)), st.just(Backwards()))
    given(cases(), orders, st.integers(1, 8))(check)()
    assert any(ended)


def test_noise_belongs_to_a_videos_own_frames() -> None:
    """Gates without memory draw the same for a frame, whenever it comes."""
    model, video, noise = toy_model(1, temporal=None).train(), toy_video(2, 5), randn(2, 5, 3, 2, seed=4)
    wanted = model.decide(model.encode(video), noise=noise).stopped_at
    model = toy_model(1, temporal=None, order=Backwards()).train()
    assert torch.equal(model.decide(model.encode(video), noise=noise).stopped_at, wanted)
    assert len(wanted.unique()) > 1


@pytest.mark.parametrize(
    "gives", [[0, 1, 2], torch.tensor([0, 1, 1]), torch.tensor([1, 2, 3]), torch.tensor([0.5, 1.0, 2.0]), None]
)
def test_orders_that_are_none_are_refused(gives: Any) -> None:
    model = toy_model(1, order=Broken(gives))
    for call in (model, model.train()):
        with pytest.raises(DynskipError, match=r"Broken gives .* for a video of 3 frames.* from 0 to 2 once"):
            call(toy_video(2, 3))


@pytest.mark.parametrize("order", ["coarse", CoarseToFine, nn.Identity()])
def test_what_is_no_order_is_refused(order: Any) -> None:
    with pytest.raises(DynskipError, match="is no frame order; give a FrameOrder"):
        toy_model(1, order=order)


def saved_model(order: FrameOrder | None, **kwargs: Any) -> StopOrForward:
    torch.manual_seed(0)
    backbone = stage_model("test_resnet", num_classes=4, input_size=(3, 32, 32))
    gates = [PolicyGate(channels, hidden=4, forward_bias=0.3) for channels in backbone.num_features]
    return StopOrForward(backbone, gates, order=order, **kwargs).eval()


def test_a_saved_model_keeps_its_order_and_tells_it(tmp_path: Path) -> None:
    video = toy_video(2, 6, size=32, dtype=torch.float32)
    for n, order in enumerate((None, CoarseToFine(), RandomOrder(7), Backwards())):
        model = saved_model(order)
        folder = model.save_pretrained(tmp_path / str(n))
        back = StopOrForward.from_pretrained(folder, classes=[Backwards])
        assert_same(back(video), model(video), exact=True)
        named = None if order is None else f"{type(order).__name__}({'seed=7' if n == 2 else ''})"
        for text in ((folder / "README.md").read_text(), model.summary()):
            assert (f"looked at in the order {named}" if named else "Every frame is looked at.") in text
    config = json.loads((tmp_path / "0" / "config.json").read_text())
    del config["order"]  # as folders of earlier versions
    (tmp_path / "0" / "config.json").write_text(json.dumps(config))
    assert StopOrForward.from_pretrained(tmp_path / "0").order is None
    with pytest.raises(DynskipError, match=r"classes=\[Backwards\]"):
        StopOrForward.from_pretrained(tmp_path / "3")


def test_gates_with_memory_are_told_of_another_order_than_they_were_trained_in(tmp_path: Path) -> None:
    told = r"trained on frames in the order CoarseToFine\(\). Now they see them in the order of time"
    folder = saved_model(CoarseToFine()).save_pretrained(tmp_path / "model")
    model = StopOrForward.from_pretrained(folder)
    with pytest.warns(UserWarning, match=told):
        model.order = None
    trained = toy_model(1, order=CoarseToFine()).train()
    trained(toy_video(2, 3))
    with pytest.warns(UserWarning, match=told):
        trained.order = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained.order = CoarseToFine()  # as it was
        fresh = toy_model(1)
        fresh.order = RandomOrder()
        fresh.train()(toy_video(2, 3))
        fresh.order = RandomOrder(0)
        backbone = stage_model("test_resnet", num_classes=4, input_size=(3, 32, 32))
        simple = StopOrForward(backbone, [*map(LinearGate, backbone.num_features[:-1]), FixedGate()]).train()
        simple(toy_video(2, 3, size=32, dtype=torch.float32))
        simple.order = CoarseToFine()  # without memory, a gate decides on a frame alone


def test_a_sessions_state_is_of_its_order() -> None:
    models = [toy_model(1, order=order) for order in (RandomOrder(1), RandomOrder(2), None)]
    session = models[0].stream(2)
    session(toy_video(2, 1)[:, 0])
    models[0].stream(2).load_state_dict(session.state_dict())
    for other in models[1:]:
        with pytest.raises(DynskipError, match=r"its order is 'RandomOrder\(seed=1\)' and"):
            other.stream(2).load_state_dict(session.state_dict())


def test_the_runner_without_torch_looks_at_frames_in_the_models_order(tmp_path: Path) -> None:
    model = toy_model(5, 2, inner=False, terminator=EarlyTerminator(0.7, 3)).float()
    video = toy_video(4, 9, seed=20, dtype=torch.float32)
    seen = set[int]()
    model.order = RandomOrder(3)
    folder = model.export(tmp_path / "model", SIZE)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.pop("order") == {"name": "RandomOrder", "seed": 3}
    earlier = {name: entry for name, entry in manifest.items() if name not in ("activation", "consensus")}
    (folder / "manifest.json").write_text(json.dumps({**earlier, "version": 1}))
    assert dynskip_onnx.load(folder).order(3) == [0, 1, 2]
    for n, order in enumerate((CoarseToFine(), RandomOrder(3), Backwards())):
        model.order, model.consensus, model.activation = order, consensuses()[n + 1], ACTIVATIONS[n % 2]
        entries = {"order": describe_order(order), "consensus": describe_consensus(model.consensus)}
        manifest |= {**entries, "activation": model.activation}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        if isinstance(order, Backwards):
            with pytest.raises(DynskipOnnxError, match=r"an order of its own, .*Backwards.*order=\.\.\."):
                dynskip_onnx.load(folder)
            runner = dynskip_onnx.load(folder, order=lambda frames: range(frames)[::-1])
        else:
            with pytest.raises(DynskipOnnxError, match=f"in the order {type(order).__name__}. Leave `order` out"):
                dynskip_onnx.load(folder, order=range)
            runner = dynskip_onnx.load(folder)
        for length in (1, 4, 9):
            assert runner.order(length) == order(length).tolist()
            output = model(video, lengths=[length] * 4)
            for row, frames in enumerate(video[:, :length]):
                result = runner.clip(frames.numpy(), window=3)
                assert result.stopped_at.tolist() == output.stopped_at[row, :length].tolist()
                assert result.fallback_frame == output.fallback_frame[row]
                assert result.macs == pytest.approx(float(output.macs[row]))
                torch.testing.assert_close(torch.tensor(result.logits), output.logits[row], rtol=1e-3, atol=1e-4)
                computed = ~output.frame_logits[row, :length].isnan().any(-1)
                assert torch.equal(~torch.tensor(result.frame_logits).isnan().any(-1), computed)
                seen |= {*result.stopped_at.tolist(), 10 if result.fallback_frame >= 0 else 2}
    assert {-1, 0, 1, 2, 10} <= seen
    with pytest.raises(DynskipOnnxError, match="every number from 0 to 2 once"):
        dynskip_onnx.load(folder, order=lambda frames: [0] * frames).order(3)
