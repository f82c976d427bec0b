from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

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
    extents = [t.get_window_extent(renderer) for t in figure.findobj(Text) if t.get_text()]
    for i, box in enumerate(extents):
        assert 0 <= box.x0 <= box.x1 <= figure.bbox.x1
        assert 0 <= box.y0 <= box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in extents[i + 1 :])


def test_timeline_shows_what_happened_to_every_frame() -> None:
    figure = plot.timeline(frames(5), torch.tensor([0, USED, 2, UNSEEN, USED]), NAMES, title="a clip")
    assert isinstance(figure, Figure)
    shown = texts(figure)
    assert shown.count("maxpool") == shown.count("layer2") == shown.count("exit") == shown.count("a clip") == 1
    assert not {"layer1", "fallback", "relevant"} & set(shown)
    assert {"used", "stopped after the stage named", "unseen"} <= set(shown)
    # Five thumbnails, and the two used frames again below theirs.
    pictures = [np.asarray(image.get_array()) for image in figure.findobj(AxesImage)]
    assert len(pictures) == 7
    assert sum(np.array_equal(picture, frames(5)[4]) for picture in pictures) == 2


def test_timeline_marks_the_fallback_and_the_relevant_frames() -> None:
    relevant = [False, True, True, False]
    figure = plot.timeline(frames(4), [0, 2, 1, UNSEEN], NAMES, fallback_frame=1, relevant=relevant)
    shown = texts(figure)
    assert shown.count("fallback") == 2  # on the tile and in the legend
    assert "relevant" in shown
    assert not {"layer2", "used"} & set(shown)
    assert len(figure.findobj(AxesImage)) == 5


def test_timeline_takes_arrays_with_any_strides() -> None:
    bgr = frames(3).numpy()[..., ::-1]
    figure = plot.timeline(bgr, np.array([USED, 0, UNSEEN]), NAMES, relevant=np.array([True, False, True]))
    assert np.array_equal(np.asarray(figure.findobj(AxesImage)[0].get_array()), bgr[0])


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("length", [1, 4, 16, 37])
def test_nothing_sticks_out_of_a_timeline_or_overlaps(length: int, dark: bool) -> None:
    names = ("maxpool", "blocks.11.downsample", "x")
    stopped_at = torch.arange(length) % 5 - 1
    title = "a rather long title $1 and $2, " * 6 + "\nsecond line"
    figure = plot.timeline(
        frames(length), stopped_at, names, fallback_frame=0, relevant=stopped_at > 0, title=title, dark=dark
    )
    assert_nothing_sticks_out_or_overlaps(figure)


def test_frame_usage_shows_every_share() -> None:
    usage = FrameUsage(used=0.543, stopped=(0.2, 0.023, 0.1), unseen=0.134)
    figure = plot.frame_usage(usage, NAMES, title="test videos")
    assert isinstance(figure, Figure)
    shown = set(texts(figure))
    assert {"used", "unseen", "test videos"} | {f"stopped after {name}" for name in NAMES} <= shown
    assert {"54.3 %", "20.0 %", "2.3 %", "10.0 %", "13.4 %"} <= shown
    # Lengths of the bars, in the order drawn, against the track that each lies on.
    bars = [patch.get_width() for patch in figure.findobj(Rectangle) if patch.get_height() == 0.22]
    assert [bar / bars[0] for bar in bars[1::2]] == pytest.approx([0.543, 0.2, 0.023, 0.1, 0.134])


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
    np.testing.assert_allclose(axes.collections[0].get_offsets(), [[2, 50]])
    looks = {(str(line.get_color()), str(line.get_marker())) for line in axes.get_lines()}
    assert len(looks) == 3


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("count", [1, 9])
def test_nothing_sticks_out_of_a_curve_picture_or_overlaps(count: int, dark: bool) -> None:
    figure = plot.accuracy_compute(curves(count), CurvePoint(0.3, 1e9), title="title " * 30, dark=dark)
    assert_nothing_sticks_out_or_overlaps(figure)


def test_accuracy_compute_needs_points() -> None:
    for drawn in ({}, {"a": [CurvePoint(1, 1)], "b": []}):
        with pytest.raises(DynskipError, match="Every curve needs a point"):
            plot.accuracy_compute(drawn)


def test_dark_changes_the_ground() -> None:
    usage = FrameUsage(used=1.0, stopped=(0.0,), unseen=0.0)
    for draw in (
        lambda dark: plot.timeline(frames(2), [0, 1], ["a"], dark=dark),
        lambda dark: plot.frame_usage(usage, ["a"], dark=dark),
        lambda dark: plot.accuracy_compute(curves(), dark=dark),
    ):
        light, dark = (to_rgb(draw(dark).get_facecolor()) for dark in (False, True))
        assert min(light) > 0.9
        assert max(dark) < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": frames(3).float()}, r"frames is float32 of shape \(3, 12, 16, 3\), but must be uint8"),
        ({"frames": frames(3).permute(0, 3, 1, 2)}, r"uint8 of shape \(3, 3, 12, 16\).*\(T, H, W, 3\)"),
        ({"frames": frames(3)[:0], "stopped_at": []}, r"shape \(0, 12, 16, 3\).*with T >= 1"),
        ({"stopped_at": [0, 1]}, r"stopped_at has shape \(2,\), but must be \(3,\), one per frame"),
        ({"stopped_at": [[0, 1, 2]]}, r"stopped_at has shape \(1, 3\)"),
        ({"stopped_at": [0, 1, 4]}, "stopped_at holds 4, but with 3 stages"),
        ({"stage_names": ()}, "The number of stages is 0"),
        ({"fallback_frame": 3}, "fallback_frame is 3, but must be from 0 to 2, or -1"),
        ({"fallback_frame": -2}, "fallback_frame is -2"),
        ({"relevant": [True, False]}, r"relevant has shape \(2,\), but must be \(3,\), one per frame"),
        ({"relevant": [0.1, 0.5, 1.0]}, "relevant is torch.float32, but must be bool"),
    ],
)
def test_timeline_bad_input(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"frames": frames(3), "stopped_at": [0, 3, -1], "stage_names": NAMES}
    plot.timeline(**good)
    with pytest.raises(DynskipError, match=message):
        plot.timeline(**{**good, **change})


def test_frame_usage_needs_as_many_names_as_stages() -> None:
    with pytest.raises(DynskipError, match="stage_names has 3 names, but the usage counts 2 stages"):
        plot.frame_usage(FrameUsage(1.0, (0.0, 0.0), 0.0), NAMES)


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DynskipError, match=r"pip install 'dynskip\[plot\]'"):
        plot.frame_usage(FrameUsage(1.0, (0.0,), 0.0), ["a"])
    with pytest.raises(DynskipError, match=r"pip install 'dynskip\[plot\]'"):
        plot.timeline(frames(1), [0], NAMES)


def test_pyplot_is_never_touched() -> None:
    code = """
import sys, torch
import dynskip.plot as plot
from dynskip.calibrate import CurvePoint
from dynskip.metrics import FrameUsage
assert "matplotlib" not in sys.modules
plot.timeline(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), [0, 1], ["a"])
plot.frame_usage(FrameUsage(1.0, (0.0,), 0.0), ["a"])
plot.accuracy_compute({"a": [CurvePoint(1.0, 1e9)]})
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
