"""Letters that a font lacks are written otherwise, and said once: no boxes, and no name ends a run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
ImageFont = pytest.importorskip("PIL.ImageFont")

import matplotlib as mpl  # noqa: E402
import torch  # noqa: E402
from matplotlib.font_manager import fontManager  # noqa: E402

from dynskip import DynskipError, plot  # noqa: E402
from dynskip.plot import _letters  # noqa: E402

DEJAVU = str(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
CMR = str(Path(DEJAVU).with_name("cmr10.ttf"))  # Latin, and little else
RUSSIAN = "\u0431\u0435\u0433"
ALPHABETS = ["run", "äöüßéñçłøå", RUSSIAN, "τρέξιμο"]
CHINESE, BAD = "跑步", "caf\udce9.mp4"


@pytest.fixture(autouse=True)
def only_matplotlibs_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fonts of this machine play no part."""
    monkeypatch.setattr(fontManager, "ttflist", [font for font in fontManager.ttflist if "mpl-data" in font.fname])
    _letters._find.cache_clear()
    yield
    _letters._find.cache_clear()


@pytest.mark.parametrize("text", ALPHABETS)
@pytest.mark.filterwarnings("error")
def test_a_font_is_found_that_draws_the_letters(text: str) -> None:
    font = plot.find_font(text)
    assert font.has(text)
    assert font.spell(text) == text
    drawn = ImageFont.truetype(font.path, 20)
    box = bytes(drawn.getmask("\uffff"))
    assert not any(bytes(drawn.getmask(letter)) == box for letter in text)


def test_letters_that_no_font_has_are_written_otherwise_and_said_once() -> None:
    with pytest.warns(UserWarning, match=r"lacks the letters \\u6b65\\u8dd1, .*Install a font"):
        font = plot.find_font("run " + CHINESE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plot.find_font("run " + CHINESE) is font
    assert font.path == DEJAVU
    assert not font.has(CHINESE)
    assert font.spell(f"run {CHINESE}\n") == "run \\u8dd1\\u6b65\n"
    assert font.names(["run", CHINESE, "jump"]) == ["run", f"class 1 {CHINESE}", "jump"]


def test_another_font_is_taken_where_it_has_the_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    with mpl.rc_context({"font.family": "cmr10"}):
        assert plot.find_font("run").path == CMR  # what the user has chosen
        assert plot.find_font(RUSSIAN).path != CMR
        assert plot.find_font(RUSSIAN).has(RUSSIAN)


def test_a_named_font_is_used_in_any_case(tmp_path: Path) -> None:
    assert plot.find_font("run", Path(CMR)).path == CMR
    with pytest.warns(UserWarning, match="cmr10.ttf lacks the letters"):
        assert plot.find_font(RUSSIAN, Path(CMR)).path == CMR
    (tmp_path / "a.ttf").write_text("no font")
    for name in ("a.ttf", "gone.ttf"):
        with pytest.raises(DynskipError, match=f"{name} is no readable font"):
            plot.find_font("run", tmp_path / name)


@pytest.mark.parametrize("title", [*ALPHABETS, CHINESE, BAD, "a\x1bb"])
def test_pictures_are_drawn_without_boxes_or_errors(title: str, tmp_path: Path) -> None:
    frames, names = torch.zeros(2, 8, 8, 3, dtype=torch.uint8), ["stem", "head"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if title == CHINESE:
            warnings.filterwarnings("ignore", ".* lacks the letters")
        figure = plot.timeline(frames, [0, 2], names, title=title)
        figure.savefig(tmp_path / "a.png")  # matplotlib warns of each box: "Glyph ... missing from font(s)"
    written = [text.get_text() for text in figure.axes[0].texts]
    assert (title if title in ALPHABETS else title.encode("unicode_escape").decode()) in written


def test_names_of_curves_are_drawn_without_boxes(tmp_path: Path) -> None:
    from dynskip.calibrate import CurvePoint

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".* lacks the letters")
        points = [CurvePoint(0.5, 1e9), CurvePoint(0.6, 2e9)]
        figure = plot.accuracy_compute({CHINESE: points, RUSSIAN: points}, title=CHINESE)
        figure.savefig(tmp_path / os.fsdecode(b"caf\xe9.png"))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["\\u8dd1\\u6b65", RUSSIAN]
