"""An evaluation as one HTML file that opens from disk: nothing is loaded from elsewhere, and no script runs.

found = evaluate(model, loader)
page = html_report(model, found, title="My videos", curves=curves, frames=frames_of)
Path("report.html").write_text(page, encoding="utf-8")
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dynskip
from dynskip import plot
from dynskip.calibrate import CurvePoint
from dynskip.evaluation import MODES, Evaluation, Result
from dynskip.rules import UNSEEN
from dynskip.wrapper import StopOrForward

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SHOWN = 3  # videos at each end
_THUMBNAIL = 112  # pixels
_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f6f8fa; --ink: #1f2328; --muted: #59636e; --line: #d1d9e0;
  --used: #009e73; --stopped: #e69f00; --fallback: #d55e00; --relevant: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1117; --card: #161b22; --ink: #f0f3f6; --muted: #9ea7b3; --line: #3d444d; --relevant: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1, h2, h3, li, dd, .strip, .told { overflow-wrap: anywhere; unicode-bidi: isolate; }
h2 { margin: 2.5rem 0 0.5rem; border-bottom: 1px solid var(--line); }
h3 { margin: 1.5rem 0 0; font-size: 1rem; }
p, ul { margin: 0.5rem 0; }
.muted, .told { color: var(--muted); }
.cards { display: flex; flex-wrap: wrap; gap: 0.75rem; margin: 1rem 0; }
.cards div { flex: 1 1 12rem; padding: 0.75rem 1rem; border-radius: 0.5rem; background: var(--card); }
.cards b { display: block; font-size: 1.75rem; line-height: 1.3; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--page); text-align: left; }
.wide img { display: block; width: 40rem; max-width: 100%; min-width: 28rem; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 0.3rem 0.75rem; align-items: center; }
.bars i + span { text-align: right; }
.bars i { display: block; height: 0.9rem; background: var(--stopped); }
.bars .used { background: var(--used); }
.bars .unseen { background: var(--muted); }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(3.7rem, 1fr)); gap: 0.4rem; padding: 0;
  margin: 0.5rem 0; list-style: none; font-size: 0.75rem; line-height: 1.25; text-align: center; }
.strip li { border-top: 0.3rem solid transparent; }
.strip .relevant { border-top-color: var(--relevant); }
.strip img, .strip s { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; margin-bottom: 0.15rem;
  border: 0.2rem solid var(--line); }
.strip .used img, .strip .used s { border-color: var(--used); }
.strip .stopped img, .strip .stopped s { border: 0.2rem dashed var(--stopped); }
.strip .fallback img, .strip .fallback s { border: 0.2rem double var(--fallback); }
.strip .unseen img { opacity: 0.3; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: 0.25rem 1rem; margin: 0.5rem 0; }
dt { color: var(--muted); }
dd { margin: 0; }
pre { overflow-x: auto; padding: 0.75rem; border-radius: 0.5rem; background: var(--card); font-size: 0.8rem; }
"""
# Nothing but what is in the file may be loaded, whatever a name tries to sneak in.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def html_report(
    model: StopOrForward,
    found: Evaluation,
    *,
    title: str,
    frames: Callable[[str], NDArray[np.uint8] | None] | None = None,
    curves: Mapping[str, Sequence[CurvePoint]] | None = None,
    metric: str = "top-1",
    settings: Mapping[str, object] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Write an evaluation as one HTML page: table, curve, where frames end, best and worst videos, settings.

    The best videos are those that are answered rightly at the lowest cost. The worst are those that are answered
    wrongly: first those with more wrong labels, then those that the dense network gets right, then the surest ones.

    Args:
        model: the model.
        found: what `evaluate` found. The last way of running is the one that is shown video by video.
        title: heading of the page.
        frames: the frames of a video, `(T, H, W, 3)` uint8 RGB, by its key; `None` for one that has none at hand.
        curves: as for `plot.accuracy_compute`; they need matplotlib.
        metric: name of the curves' accuracy.
        settings: what else the page says about the run, by name.
        notes: sentences that belong below the table, such as which videos were left out.

    Returns:
        The page. It has pictures in it, and a colour scheme for light and dark screens. All texts are escaped.

    Raises:
        DynskipError: if curves are given and matplotlib is missing, or one has no point.
    """
    last = found.results[-1]
    records = [record for record in found.records if record["mode"] == last.mode]
    dense = {r["video"]: r for r in found.records if r["mode"] == MODES[0]} if last.mode != MODES[0] else {}
    several = last.label_accuracy is not None

    def wrong(record: Mapping[str, Any]) -> int:
        """Count wrong labels. A video without any cannot be answered wrongly where one class always holds."""
        if several:
            return len(set(record["answer"]) ^ set(record["labels"]))
        return int(bool(record["labels"]) and not record["correct"])

    def lost(record: Mapping[str, Any]) -> bool:
        return record["video"] in dense and not wrong(dense[record["video"]])

    right = sorted((r for r in records if not wrong(r)), key=lambda r: r["gmacs"])
    bad = sorted(
        (r for r in records if wrong(r)), key=lambda r: (-wrong(r), not lost(r), -max(r["best"].values(), default=0.0))
    )
    cheap, dear = right[:SHOWN], right[SHOWN:][-SHOWN:][::-1]
    shown = [("Best videos", "Right at the lowest cost." if cheap else "No video is answered rightly.", cheap)]
    if bad:
        shown.append(("Worst videos", "Answered wrongly; first those that dense gets right.", bad[:SHOWN]))
    else:
        shown.append(("Worst videos", "No video is answered wrongly." + " These cost most." * bool(dear), dear))
    strips = []
    for heading, meaning, some in shown:
        strips.append(f"<h2>{heading}</h2><p class=muted>{meaning}</p>")
        for record in some:
            pictures = frames(record["video"]) if frames is not None else None
            strips.append(_video(record, dense.get(record["video"]), pictures, found.stage_names))
    meaning = found.report(full=True).partition("\n\n")[2]
    size = (model.backbone.input_size if model.preprocessing is None else model.preprocessing["input_size"])[-2:]
    facts = {**(settings or {}), "measured with": found.setting, "dynskip": dynskip.__version__}
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{_text(title)}</h1>",
            _headline(found.results),
            f"<h2>Results</h2>{_table(found.rows(full=True))}",
            "".join(f"<p class=muted>{_text(line)}</p>" for line in [*meaning.splitlines(), *notes]),
            _curve(curves, last, metric) if curves else "",
            f"<h2>Where frames end</h2><p class=muted>{_text(last.mode)}: shares of all frames.</p>",
            _usage(last, found.stage_names),
            *strips,
            "<h2>Settings and versions</h2>",
            "<dl>" + "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts.items()) + "</dl>",
            f'<pre tabindex="0">{_text(model.summary(size))}</pre>',
            "</body>\n</html>\n",
        ]
    )


def _text(value: object) -> str:
    """Escape a text; letters that no file can hold, such as parts of badly named files, become question marks."""
    return html.escape(str(value).encode("utf-8", "replace").decode())


def _accuracy(result: Result) -> tuple[str, float]:
    return ("mAP", result.mean_ap) if result.label_accuracy is not None else ("top-1", result.top1)


def _headline(results: Sequence[Result]) -> str:
    first, last = results[0], results[-1]
    name, reached = _accuracy(last)
    cards = [
        (f"{100 * reached:.1f} %", f"{name}, {last.mode}", f"{first.mode}: {100 * _accuracy(first)[1]:.1f} %"),
        (
            f"{last.compute.per_video:.3g} GMACs",
            f"a video, {100 * last.compute.share:.0f} % of dense",
            f"{first.mode}: {first.compute.per_video:.3g} GMACs",
        ),
        (f"{last.milliseconds:.1f} ms", "a video, network only", f"{first.mode}: {first.milliseconds:.1f} ms"),
    ]
    texts = (f"<div><b>{_text(a)}</b>{_text(b)}<br><span class=muted>{_text(c)}</span></div>" for a, b, c in cards)
    return f"<div class=cards>{''.join(texts)}</div>"


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row.values()) + "</tr>" for row in rows)
    return f'<div class=wide tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _curve(curves: Mapping[str, Sequence[CurvePoint]], last: Result, metric: str) -> str:
    here = CurvePoint(_accuracy(last)[1], 1e9 * last.compute.per_video)
    pictures = []
    for dark in (False, True):
        file = io.BytesIO()
        plot.accuracy_compute(curves, here, metric=metric, dark=dark).savefig(file, format="svg", transparent=True)
        pictures.append(f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}")
    rows = []
    for name, points in curves.items():
        for point in sorted(points, key=lambda each: each.macs):
            band = "" if point.band is None else " to ".join(f"{100 * edge:.1f}" for edge in point.band)
            row = {
                "curve": name,
                "GMACs/video": f"{point.macs / 1e9:.4g}",
                f"{metric} %": f"{100 * point.accuracy:.1f}",
            }
            rows.append({**row, "band": band})
    return (
        f"<h2>Accuracy against cost</h2><p class=muted>The ring is {_text(last.mode)} as evaluated. Bands hold 90 % "
        "of the accuracies that one gets by drawing the videos again.</p>"
        f'<div class=wide tabindex="0"><picture><source media="(prefers-color-scheme: dark)" srcset="{pictures[1]}">'
        f'<img src="{pictures[0]}" alt="{_text(metric)} against GMACs a video; the numbers follow"></picture></div>'
        f"<details><summary>Numbers of the curve</summary>{_table(rows)}</details>"
    )


def _usage(result: Result, stage_names: Sequence[str]) -> str:
    rows = [("used", "used", result.usage.used)]
    rows += [(f"stopped after {n}", "stopped", s) for n, s in zip(stage_names, result.usage.stopped, strict=True)]
    rows.append(("unseen", "unseen", result.usage.unseen))
    cells = (
        f'<span>{_text(name)}</span><i class={kind} style="width:{100 * share:.2f}%"></i>'
        f"<span>{100 * share:.1f} %</span>"
        for name, kind, share in rows
    )
    return f"<div class=bars>{''.join(cells)}</div>"


def _video(
    record: Mapping[str, Any],
    dense: Mapping[str, Any] | None,
    pictures: NDArray[np.uint8] | None,
    stage_names: Sequence[str],
) -> str:
    """Write what the model did with one video, frame by frame."""
    told = [f"labels: {', '.join(record['labels']) or 'none'}", f"answer: {_answer(record)}"]
    if dense is not None:
        told.append(f"dense: {_answer(dense)}")
    told.append(f"{record['gmacs']:.3g} GMACs" + (f" of {dense['gmacs']:.3g}" if dense is not None else ""))
    tiles = []
    for t, stage in enumerate(record["stopped_at"]):
        kind, name = ("unseen",) * 2 if stage == UNSEEN else ("used",) * 2
        if 0 <= stage < len(stage_names):
            kind, name = "stopped", stage_names[stage]
        if t == record["fallback_frame"]:
            kind = name = "fallback"
        relevant = any(first <= t < end for first, end in record.get("relevant", ()))
        picture = "<s></s>" if pictures is None else f'<img alt="" src="{_jpeg(pictures[t])}">'
        extra = "<br><span class=muted>relevant</span>" if relevant else ""
        tiles.append(f'<li class="{kind}{" relevant" * relevant}">{picture}{t}<br>{_text(name)}{extra}</li>')
    head = f"<h3>{_text(record['video'])}</h3><p class=told>{_text('; '.join(told))}</p>"
    return f"{head}<ol class=strip>{''.join(tiles)}</ol>"


def _answer(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {100 * chance:.1f} %" for name, chance in record["answer"].items()) or "no class"


def _jpeg(picture: NDArray[np.uint8]) -> str:
    from PIL import Image

    image, file = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    image.save(file, "JPEG", quality=75)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
