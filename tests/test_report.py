"""The page of an evaluation: what it says and shows, that nothing breaks out of it, and that it loads nothing."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Literal

import numpy as np
import pytest
import torch

from dynskip import StopOrForward, sofnet
from dynskip.calibrate import CurvePoint
from dynskip.evaluation import Evaluation, evaluate
from dynskip.report import html_report

Image = pytest.importorskip("PIL.Image")
NAMES = ["<script>alert(1)</script>", 'a "quoted" & b', "plain"]
KEYS = ["<img src=http://example.org/x>.mp4", "b\udcff.mp4", "c.mp4", "d.mp4", "e.mp4"]
T = 4


class Page(HTMLParser):
    """The texts, the tags and what they refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.classes: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data", "action")]
        self.classes += [value or "" for name, value in attrs if name == "class"]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def model_of(activation: Literal["softmax", "sigmoid"] = "softmax") -> StopOrForward:
    torch.manual_seed(0)
    model = sofnet("test_resnet", num_classes=3, hidden=8, input_size=(3, 32, 32), activation=activation).eval()
    model.class_names = NAMES
    return model


def evaluated(model: StopOrForward, targets: Sequence[Sequence[int]]) -> Evaluation:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.tensor([[int(n in labels) for n in range(3)]]) for labels in targets]
    video = [torch.randn(1, T, 3, 32, 32, generator=generator) for _ in rows]
    keys = [[key] for key in KEYS[: len(rows)]]
    relevant = {key: torch.arange(T) == 1 for (key,) in keys[:1]}
    return evaluate(model, list(zip(video, rows, keys, strict=True)), relevant=relevant)


def frames(key: str) -> np.ndarray:
    return np.full((T, 40, 60, 3), 30 * KEYS.index(key) + 50, np.uint8)


def test_the_page_says_and_shows_what_was_found() -> None:
    model = model_of()
    found = evaluated(model, [[0], [1], [2], [0], [1]])
    curves = {"gates": [CurvePoint(0.5, 1e6, band=(0.3, 0.625)), CurvePoint(0.6, 2e6, band=(0.5, 0.7))]}
    page = Page(
        html_report(
            model,
            found,
            title="My <b>videos</b>",
            frames=frames,
            curves=curves,
            settings={"data": "<i>dir</i>"},
            notes=["one <u>was</u> left out"],
        )
    )
    for row in found.rows(full=True):
        assert set(row) <= set(page.texts)
        assert set(row.values()) <= set(page.texts)
    for text in ("My <b>videos</b>", "<i>dir</i>", "one <u>was</u> left out", "30.0 to 62.5", found.setting):
        assert text in page.texts
    assert model.summary((32, 32)) in page.texts
    share = found.results[-1].usage.used
    assert f"{100 * share:.1f} %" in page.texts
    pictures = [link for link in page.links if link.startswith("data:image/jpeg")]
    shown = page.tags.count("h3")
    assert len(pictures) == page.tags.count("li") == T * shown
    picture = Image.open(io.BytesIO(base64.b64decode(pictures[0].partition(",")[2])))
    assert max(picture.size) == 60
    assert sum(link.startswith("data:image/svg+xml") for link in page.links) == 2  # for light and for dark screens


def test_nothing_is_loaded_and_no_name_breaks_out() -> None:
    model = model_of()
    curves = {'<script src="http://x">': [CurvePoint(0.5, 1e6)]}
    text = html_report(model, evaluated(model, [[0], [1], [2]]), title="</title><script>", frames=frames, curves=curves)
    page = Page(text)
    text.encode("utf-8")
    assert "script" not in page.tags
    assert all(link.startswith("data:image/") for link in page.links)
    assert not re.search(r"url\(|@import", text)
    assert "default-src 'none'" in text
    assert NAMES[0] in page.text
    assert KEYS[0] in page.text
    assert "b?.mp4" in page.text


def with_answers(found: Evaluation, right: Sequence[bool], dense: Sequence[bool]) -> Evaluation:
    """Records as if the model had answered so, each video dearer than the one before."""
    for record in found.records:
        n = KEYS.index(record["video"])
        record.update(correct=dense[n] if record["mode"] == "dense" else right[n], gmacs=float(n))  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize(
    ("right", "dense", "best", "worst"),
    [
        # Of the wrong ones, that which dense gets right comes first.
        ([True, False, True, False, True], [True, False, True, True, True], [0, 2, 4], [3, 1]),
        ([True] * 5, [True] * 5, [0, 1, 2], [4, 3]),  # none is wrong: the dearest
    ],
)
def test_best_and_worst_videos(
    right: Sequence[bool], dense: Sequence[bool], best: Sequence[int], worst: Sequence[int]
) -> None:
    model = model_of()
    found = with_answers(evaluated(model, [[0], [1], [2], [0], [1]]), right, dense)
    text = html_report(model, found, title="x")
    first, last = text.partition("Worst videos")[::2]
    shown = [re.findall(r"<h3>(.*?)</h3>", part) for part in (first, last)]
    wanted = [
        ["b?.mp4" if n == 1 else KEYS[n].replace("<", "&lt;").replace(">", "&gt;") for n in part]
        for part in (best, worst)
    ]
    assert shown == wanted
    assert ("No video is answered wrongly. These cost most." in last) == all(right)


def test_several_labels_and_none() -> None:
    model = model_of("sigmoid")
    found = evaluated(model, [[0, 2], []])
    for record in found.records:
        labels = record["labels"]
        record.update(answer={NAMES[0]: 0.9} if labels else {})  # type: ignore[attr-defined]
    page = Page(html_report(model, found, title="x"))
    best, worst = page.text.partition("Best videos")[2].split("Worst videos")
    assert "b?.mp4" in best
    assert "labels: none; answer: no class" in best
    assert f"labels: {NAMES[0]}, plain; answer: {NAMES[0]} 90.0 %" in worst
    assert "mAP" in page.text


def test_one_video_and_frames_that_are_not_at_hand() -> None:
    model = model_of()
    found = evaluated(model, [[0]])
    page = Page(html_report(model, found, title="x", frames=lambda key: None))
    assert page.tags.count("h3") == 1
    assert page.tags.count("li") == T
    assert sum("relevant" in name for name in page.classes) == 1
    assert not page.links
    assert "No video is answered" in page.text
