from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynskip import FLOPsLookup
from dynskip.calibrate import CurvePoint
from dynskip.errors import DynskipError
from dynskip.metrics import FrameUsage

pytest.importorskip("matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from dynskip import plot

NAMES = ("maxpool", "layer1", "layer2")
USED, UNSEEN = len(NAMES), -1


def frames(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, 256, (length, 12, 16, 3), generator=generator, dtype=torch.uint8)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def assert_nothing_sticks_out_or_overlaps(figure: Figure) -> None:
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    axes: list[Any] = [axis for a in figure.axes for axis in (a.xaxis, a.yaxis)]
    ticks = [(tick, *sorted(axis.get_view_interval())) for axis in axes for tick in axis.get_major_ticks()]
    # matplotlib keeps labels of ticks that it does not draw.
    outside = {tick.label1 for tick, low, high in ticks if not low <= tick.get_loc() <= high}
    shown = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible() and t not in outside]
    extents = [t.get_window_extent(renderer) for t in shown]
    for i, box in enumerate(extents):
        assert 0 <= box.x0 <= box.x1 <= figure.bbox.x1
        assert 0 <= box.y0 <= box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in extents[i + 1 :])


def test_timeline_shows_what_happened_to_every_frame() -> None:
    figure = plot.timeline(frames(5), torch.tensor([0, USED, 2, UNSEEN, USED]), NAMES, title="a clip")
    assert isinstance(figure, Figure)
    shown = texts(figure)
    assert shown.count("maxpool") == shown.count("layer2") == shown.count("a clip") == 1
    assert shown.count("unseen") == 2  # on the tile and in the legend
    assert not {"layer1", "fallback", "annotated segment"} & set(shown)
    assert {"used", "stopped after the stage named", "unseen"} <= set(shown)
    # Five thumbnails, and the two used frames again below theirs.
    pictures = [np.asarray(image.get_array()) for image in figure.findobj(AxesImage)]
    assert len(pictures) == 7
    assert sum(np.array_equal(picture, frames(5)[4]) for picture in pictures) == 2


def test_timeline_marks_the_fallback() -> None:
    figure = plot.timeline(frames(4), [0, 2, 1, UNSEEN], NAMES, fallback_frame=1)
    shown = texts(figure)
    assert shown.count("fallback") == 2  # on the tile and in the legend
    assert not {"layer2", "used"} & set(shown)
    assert len(figure.findobj(AxesImage)) == 5


def bars_below(figure: Figure, annotated: bool) -> list[tuple[float, float]]:
    """Where the bars below the tiles begin and end, in tiles and the gaps between them."""
    tile, gap = 0.75, 0.06
    blue = to_rgb("#0072B2")
    bars = [patch for patch in figure.findobj(Rectangle) if patch.get_height() == 0.08]
    chosen = [bar for bar in bars if (to_rgb(bar.get_facecolor()) == blue) is annotated]
    left = min(bar.get_x() for bar in bars)
    return [((bar.get_x() - left) / (tile + gap), bar.get_width() / (tile + gap)) for bar in chosen]


def test_segments_in_frames_lie_below_their_frames() -> None:
    figure = plot.timeline(frames(6), [0] * 6, NAMES, segments=[(1, 3), (4, 4.5)])
    assert "annotated segment" in texts(figure)
    assert len(bars_below(figure, annotated=False)) == 6  # the grey bar of every tile
    assert bars_below(figure, annotated=True) == [pytest.approx(bar) for bar in [(1, 1), (2, 1), (4, 0.5)]]


def test_segments_in_seconds_are_drawn_to_scale() -> None:
    # The frames stand for 0 to 2, 2 to 6 and 6 to 12 seconds.
    figure = plot.timeline(
        frames(3), [0] * 3, NAMES, segments=[(1, 3), (-5, 0.5)], seconds=torch.tensor([1.0, 3.0, 9.0])
    )
    assert {"1.0 s", "3.0 s", "9.0 s"} < set(texts(figure))
    wanted = [(0.5, 0.5), (0, 0.25), (1, 0.25)]
    assert bars_below(figure, annotated=True) == [pytest.approx(bar) for bar in wanted]


def test_times_over_a_minute_are_written_as_on_a_clock() -> None:
    shown = texts(plot.timeline(frames(3), [0] * 3, NAMES, seconds=[59.9, 60.0, 3605.04]))
    assert {"59.9 s", "1:00.0", "60:05.0"} < set(shown)


def test_timeline_takes_arrays_with_any_strides() -> None:
    bgr = frames(3).numpy()[..., ::-1]
    figure = plot.timeline(bgr, np.array([USED, 0, UNSEEN]), NAMES, seconds=np.arange(3.0))
    assert np.array_equal(np.asarray(figure.findobj(AxesImage)[0].get_array()), bgr[0])


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("length", [1, 4, 16, 37])
def test_nothing_sticks_out_of_a_timeline_or_overlaps(length: int, dark: bool) -> None:
    names = ("maxpool", "blocks.11.downsample", "x")
    stopped_at = torch.arange(length) % 5 - 1
    title = "a rather long title $1 and $2, " * 6 + "\nsecond line"
    figure = plot.timeline(
        frames(length),
        stopped_at,
        names,
        fallback_frame=0,
        segments=[(0, length)],
        seconds=500 * torch.arange(length),
        title=title,
        dark=dark,
    )
    assert_nothing_sticks_out_or_overlaps(figure)


def test_frame_usage_shows_every_share() -> None:
    usage = FrameUsage(used=0.543, stopped=(0.2, 0.023, 0.1), unseen=0.134)
    figure = plot.frame_usage(usage, NAMES, title="test videos")
    assert isinstance(figure, Figure)
    shown = set(texts(figure))
    assert {"used", "unseen", "test videos"} | {f"stopped after {name}" for name in NAMES} <= shown
    assert {"54.3 %", "20.0 %", "2.3 %", "10.0 %", "13.4 %"} <= shown
    bars, tracks = bar_lengths(figure)
    assert [bar / tracks[0] for bar in bars] == pytest.approx([0.543, 0.2, 0.023, 0.1, 0.134])


@pytest.mark.parametrize("dark", [False, True])
def test_nothing_sticks_out_of_a_usage_picture_or_overlaps(dark: bool) -> None:
    names = [f"blocks.{i}.downsample" for i in range(12)]
    usage = FrameUsage(used=1.0, stopped=(0.0,) * 12, unseen=0.0)
    assert_nothing_sticks_out_or_overlaps(plot.frame_usage(usage, names, title="title " * 30, dark=dark))


def curves(count: int = 2) -> dict[str, list[CurvePoint]]:
    return {f"curve {i}": [CurvePoint(0.5 + 0.01 * i, 2e9), CurvePoint(0.2 + 0.01 * i, 1e9)] for i in range(count)}


def test_accuracy_compute_shows_every_curve() -> None:
    chosen = CurvePoint(0.5, 2e9)
    drawn = {**curves(), "dense": [CurvePoint(0.9, 4e9)]}
    figure = plot.accuracy_compute(drawn, chosen, metric="mAP", title="val")
    assert isinstance(figure, Figure)
    assert {"curve 0", "curve 1", "dense", "chosen", "mAP %", "val"} <= set(texts(figure))
    axes = figure.axes[-1]
    lines = {line.get_label(): np.asarray(line.get_xydata()) for line in axes.get_lines()}
    # In GMACs and percent, from left to right.
    np.testing.assert_allclose(lines["curve 1"], [[1, 21], [2, 51]])
    np.testing.assert_allclose(lines["dense"], [[4, 90]])
    np.testing.assert_allclose(np.asarray(axes.collections[0].get_offsets()), [[2, 50]])
    looks = {(str(line.get_color()), str(line.get_marker())) for line in axes.get_lines()}
    assert len(looks) == 3


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("count", [1, 9])
def test_nothing_sticks_out_of_a_curve_picture_or_overlaps(count: int, dark: bool) -> None:
    figure = plot.accuracy_compute(curves(count), CurvePoint(0.3, 1e9), title="title " * 30, dark=dark)
    assert_nothing_sticks_out_or_overlaps(figure)


def test_accuracy_compute_draws_bands_where_points_have_them() -> None:
    banded = [CurvePoint(0.5, 1e9, band=(0.4, 0.6)), CurvePoint(0.7, 3e9, band=(0.6, 0.75))]
    drawn = {"banded": banded, "plain": [CurvePoint(0.5, 1e9)], "half": [banded[0], CurvePoint(0.8, 2e9)]}
    axes = plot.accuracy_compute(drawn).figure.axes[-1]
    (band,) = axes.collections
    corners = {(round(x, 6), round(y, 6)) for x, y in np.asarray(band.get_paths()[0].vertices).tolist()}
    assert corners == {(1, 40), (1, 60), (3, 60), (3, 75)}
    one = plot.accuracy_compute({"dense": banded[:1]}).figure.axes[-1]
    np.testing.assert_allclose(np.asarray(one.collections[0].get_paths()[0].vertices), [[1, 40], [1, 60]])


def test_accuracy_compute_shows_the_range_that_tells_curves_apart() -> None:
    steep = [CurvePoint(0.4, 1e9), CurvePoint(0.91, 5e9)]
    flat = [CurvePoint(0.9, 2e9, band=(0.86, 0.93)), CurvePoint(0.92, 6e9, band=(0.88, 0.95))]
    low, high = plot.accuracy_compute({"steep": steep, "flat": flat}).axes[-1].get_ylim()
    assert 70 < low < 86
    assert 95 < high < 97
    for chosen in (CurvePoint(0.5, 1e9), CurvePoint(0.99, 1e9)):
        low, high = plot.accuracy_compute({"steep": steep, "flat": flat}, chosen).axes[-1].get_ylim()
        assert low < 100 * chosen.accuracy < high
    low, high = plot.accuracy_compute({"one": [CurvePoint(1.0, 1e9)]}).axes[-1].get_ylim()
    assert low < 100 < high


def test_accuracy_compute_needs_points() -> None:
    for drawn in ({}, {"a": [CurvePoint(1, 1)], "b": []}):
        with pytest.raises(DynskipError, match="Every curve needs a point"):
            plot.accuracy_compute(drawn)


def test_dark_changes_the_background() -> None:
    usage = FrameUsage(used=1.0, stopped=(0.0,), unseen=0.0)
    for draw in (
        lambda dark: plot.timeline(frames(2), [0, 1], ["a"], dark=dark),
        lambda dark: plot.frame_usage(usage, ["a"], dark=dark),
        lambda dark: plot.accuracy_compute(curves(), dark=dark),
        lambda dark: plot.stage_macs(cost_table(), dark=dark),
    ):
        light, dark = (to_rgb(draw(dark).get_facecolor()) for dark in (False, True))
        assert min(light) > 0.9
        assert max(dark) < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": frames(3).float()}, r"frames is float32 of shape \(3, 12, 16, 3\); expected uint8"),
        ({"frames": frames(3).permute(0, 3, 1, 2)}, r"uint8 of shape \(3, 3, 12, 16\).*\(T, H, W, 3\)"),
        ({"frames": frames(3)[:0], "stopped_at": []}, r"shape \(0, 12, 16, 3\).*with T >= 1"),
        ({"stopped_at": [0, 1]}, r"stopped_at has shape \(2,\); expected \(3,\), one a frame"),
        ({"stopped_at": [[0, 1, 2]]}, r"stopped_at has shape \(1, 3\)"),
        ({"stopped_at": [0, 1, 4]}, "stopped_at holds 4; expected .* with 3 stages"),
        ({"stage_names": ()}, "num_stages=0 is out of range"),
        ({"fallback_frame": 3}, "fallback_frame is 3; expected 0 to 2, or -1"),
        ({"fallback_frame": -2}, "fallback_frame is -2"),
        ({"seconds": [0.0, 1.0]}, r"seconds has shape \(2,\); expected \(3,\), one a frame"),
        ({"seconds": [0.0, 1.0, 1.0]}, "seconds must be finite and rise"),
        ({"seconds": [0.0, 1.0, float("nan")]}, "seconds must be finite and rise"),
        ({"segments": [(2, 2)]}, "segment from 2 to 2 .* start < end"),
        (
            {"segments": [(0, 1), (3, 5)]},
            "segment from 3 to 5 does not lie in this video, whose frames stand for 0 to 3",
        ),
        ({"segments": [(8, 9)], "seconds": [1.0, 2.0, 5.0]}, "frames stand for 0.5 to 6.5"),
    ],
)
def test_timeline_bad_input(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"frames": frames(3), "stopped_at": [0, 3, -1], "stage_names": NAMES}
    plot.timeline(**good)
    with pytest.raises(DynskipError, match=message):
        plot.timeline(**{**good, **change})


def test_text_timeline_has_one_character_a_frame_and_a_legend() -> None:
    line, legend = plot.timeline_text(torch.tensor([0, 0, USED, 2, USED, UNSEEN]), NAMES).splitlines()
    assert line == "11#3#."
    assert legend == "# used (2)   stopped after 1 maxpool (2), 3 layer2 (1)   . unseen (1)"


def test_text_timeline_marks_the_fallback() -> None:
    line, legend = plot.timeline_text([0, 2, 0], NAMES, fallback_frame=1).splitlines()
    assert line == "1F1"
    assert "F fallback (1)" in legend
    assert "layer2" not in legend


def test_colour_adds_nothing_but_escapes_to_the_text_timeline() -> None:
    plain = plot.timeline_text([0, 1, 2, USED, UNSEEN], NAMES, fallback_frame=2)
    coloured = plot.timeline_text([0, 1, 2, USED, UNSEEN], NAMES, fallback_frame=2, color=True)
    assert "\x1b" not in plain
    assert plain.isascii()
    assert coloured.count("\x1b[0m") == 2 * 5
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


def test_text_timeline_of_a_model_with_many_stages() -> None:
    names = [f"blocks.{n}" for n in range(40)]
    line = plot.timeline_text([0, 8, 9, 34, 35, 39, 40], names).splitlines()[0]
    assert line == "19az++#"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stopped_at": [[0, 1]]}, r"stopped_at has shape \(1, 2\); expected \(T,\)"),
        ({"stopped_at": torch.empty(0, dtype=torch.long)}, r"shape \(0,\)"),
        ({"stopped_at": [0, 4]}, "stopped_at holds 4"),
        ({"fallback_frame": 2}, "fallback_frame is 2; expected 0 to 1"),
    ],
)
def test_text_timeline_bad_input(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"stopped_at": [0, 3], "stage_names": NAMES}
    with pytest.raises(DynskipError, match=message):
        plot.timeline_text(**{**good, **change})


def bar_lengths(figure: Figure) -> tuple[list[float], list[float]]:
    """Lengths of the bars, and of the tracks that they lie on."""
    lengths = [patch.get_width() for patch in figure.findobj(Rectangle) if patch.get_height() == 0.22]
    return lengths[1::2], lengths[::2]


def cost_table(**kwargs: Any) -> FLOPsLookup:
    return FLOPsLookup([1e9, 4e9, 2e9], head=5e8, gates=[1e6, 2e6, 3e6], stage_names=NAMES, **kwargs)


def test_stage_macs_draws_the_costs_of_every_part() -> None:
    figure = plot.stage_macs(cost_table(), title="a network")
    shown = texts(figure)
    assert {*NAMES, "gates", "head", "1", "4", "2", "0.006", "0.5"} < set(shown)
    assert any("a network" in text and "7.51 GMACs (multiply-adds) a frame" in text for text in shown)
    bars, tracks = bar_lengths(figure)
    assert bars == tracks
    assert [bar / bars[1] for bar in bars] == pytest.approx([0.25, 1, 0.5, 0.0015, 0.125])


@settings(max_examples=10)
@given(st.lists(st.lists(st.integers(UNSEEN, USED), min_size=4, max_size=4), min_size=1, max_size=3))
def test_executed_bars_add_up_to_what_the_cost_table_says(decisions: list[list[int]]) -> None:
    lookup, stopped_at = cost_table(), torch.tensor(decisions)
    bars, tracks = bar_lengths(plot.stage_macs(lookup, stopped_at))
    gmacs_of = 4 / max(tracks)
    fallback = torch.where((stopped_at.amax(1) == USED) | (stopped_at.amax(1) < 0), -1, stopped_at.argmax(1))
    wanted = lookup.cost(stopped_at, fallback).sum() / stopped_at.numel() / 1e9
    assert gmacs_of * sum(bars) == pytest.approx(float(wanted), abs=1e-9)
    assert all(bar <= track + 1e-9 for bar, track in zip(bars, tracks, strict=True))


def test_stage_macs_shows_how_much_was_executed() -> None:
    # One video of two used frames, one stopped after the first stage; one whose only frame is the fallback.
    stopped_at = torch.tensor([[USED, USED, 0, UNSEEN], [1, UNSEEN, UNSEEN, UNSEEN]])
    shown = set(texts(plot.stage_macs(cost_table(), stopped_at)))
    assert {"0.5 of 1", "1.5 of 4", "0.75 of 2", "0.188 of 0.5"} < shown
    # The same where two frames of the second video are padding: six frames in all.
    shown = set(texts(plot.stage_macs(cost_table(), stopped_at, lengths=torch.tensor([4, 2]))))
    assert {"0.667 of 1", "2 of 4", "1 of 2", "0.25 of 0.5"} < shown


def test_stage_macs_in_another_unit() -> None:
    shown = texts(plot.stage_macs(FLOPsLookup([2.0, 3.0], unit="ms"), torch.tensor([2, 0])))
    assert {"stage 0", "stage 1", "2 of 2", "1.5 of 3"} < set(shown)
    assert any(text.startswith("3.5 ms a frame executed; 5 for a used frame") for text in shown)


@pytest.mark.parametrize("dark", [False, True])
def test_nothing_sticks_out_of_a_picture_of_stages_or_overlaps(dark: bool) -> None:
    lookup = FLOPsLookup([1e6] * 12, stage_names=[f"blocks.{i}.downsample" for i in range(12)])
    figure = plot.stage_macs(lookup, torch.tensor([12, 3, -1]), title="title " * 30, dark=dark)
    assert_nothing_sticks_out_or_overlaps(figure)


@pytest.mark.parametrize(
    ("stopped_at", "message"),
    [
        (torch.zeros(1, 2, 3, dtype=torch.long), r"stopped_at has shape \(1, 2, 3\); expected"),
        (torch.zeros(0, dtype=torch.long), r"shape \(0,\)"),
        (torch.tensor([4]), "stopped_at holds 4; expected .* with 3 stages"),
    ],
)
def test_stage_macs_bad_input(stopped_at: torch.Tensor, message: str) -> None:
    with pytest.raises(DynskipError, match=message):
        plot.stage_macs(cost_table(), stopped_at)


def test_frame_usage_needs_as_many_names_as_stages() -> None:
    with pytest.raises(DynskipError, match="stage_names has 3 names, but the usage counts 2 stages"):
        plot.frame_usage(FrameUsage(1.0, (0.0, 0.0), 0.0), NAMES)


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    calls: list[Callable[[], Figure]] = [
        lambda: plot.frame_usage(FrameUsage(1.0, (0.0,), 0.0), ["a"]),
        lambda: plot.timeline(frames(1), [0], NAMES),
        lambda: plot.stage_macs(cost_table()),
        lambda: plot.accuracy_compute(curves()),
    ]
    for call in calls:
        with pytest.raises(DynskipError, match="extra `plot`"):
            call()


def test_pyplot_is_never_touched() -> None:
    code = """
import sys, torch
import dynskip.plot as plot
from dynskip.calibrate import CurvePoint
from dynskip import FLOPsLookup
from dynskip.metrics import FrameUsage
plot.timeline_text([0, 1], ["a"])
assert "matplotlib" not in sys.modules
plot.timeline(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), [0, 1], ["a"])
plot.frame_usage(FrameUsage(1.0, (0.0,), 0.0), ["a"])
plot.accuracy_compute({"a": [CurvePoint(1.0, 1e9)]})
plot.stage_macs(FLOPsLookup([1.0]))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
