"""Draws the pictures of docs/speed.md and writes its tables, from the results.

python benchmarks/plot.py
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynskip.plot._style import DARK, LIGHT, Theme

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "speed.md", ROOT / "benchmarks" / "results"
MEASURED = ("per_video", "glance", "overhead", "many_streams", "training_step", "onnx_torch")
# From Okabe and Ito's palette, which keeps its contrasts for colour-blind readers.
DENSE, CLIP = "#E69F00", "#009E73"


def ratios(contents: dict[str, dict[str, Any]]) -> str:
    """Return every ratio of the results as a row of a Markdown table, with the goal that its script has."""
    lines = ["| script | this | against | ratio | goal | met? |", "|---|---|---|---:|---:|---|"]
    for script, content in contents.items():
        if "--quick" in content["command"]:
            raise RuntimeError(f"{content['command']} has too few rounds to publish.")
        for name, ratio in content["ratios"].items():
            sides = [_with_ms(side, content["results"]) for side in name.split(" / ")]
            goal, met = ratio["wanted"], "-"
            if goal is not None:
                relation, bound = goal.split()
                words, holds = {"<=": ("≤", operator.le), ">=": ("≥", operator.ge)}[relation]
                goal, met = f"{words} {bound}", "yes" if holds(ratio["value"], float(bound)) else "**no**"
            lines.append(f"| `{script}.py` | {' | '.join(sides)} | {ratio['value']:.3f} | {goal or '-'} | {met} |")
    return "\n".join(lines)


def _with_ms(name: str, results: dict[str, Any]) -> str:
    return f"{name}: {results[name]['median_ms']:,.0f} ms" if name in results else name


def files(contents: Sequence[dict[str, Any]]) -> str:
    """Return what a file costs from disk to answer as a Markdown table, against both ways to read it densely."""
    lines = ["| file | one pass | seeking | this | against one pass | against the faster | frames decoded |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    results = {name: row for content in contents for name, row in content["results"].items()}
    for name in dict.fromkeys(name.rpartition(": ")[0] for name in results):
        once, seeking, ours = (results[f"{name}: {key}"]["median_ms"] for key in ("one pass", "seeking", "ours"))
        cells = [name, *(f"{time:,.0f}" for time in (once, seeking, ours))]
        cells += [f"{ours / once:.3f}", f"{ours / min(once, seeking):.3f}", str(results[f"{name}: ours"]["decoded"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu(content: dict[str, Any]) -> str:
    """Return what videos take on a GPU as a Markdown table, against the dense network and the bare stages."""
    results = {name: row["median_ms"] for name, row in content["results"].items()}

    def cell(name: str, other: str = "") -> str:
        if name not in results or (other and other not in results):
            return "-"
        return f"{results[name] / results[other]:.2f}" if other else f"{results[name]:,.1f}"

    lines = ["| | videos | dense | bare stages | clip | clip / dense | clip / bare | online |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, count in [name.rsplit(", clip ", 1) for name in results if ", clip " in name]:
        dense, bare, clip, online = (f"{name}, {way} {count}" for way in ("dense", "bare", "clip", "online"))
        cells = [name, count, cell(dense), cell(bare), cell(clip), cell(clip, dense), cell(clip, bare), cell(online)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu_streams(content: dict[str, Any]) -> str:
    """Return how many videos a second come out of streams on a GPU as a Markdown table."""
    results = {name: f"{row['videos_per_s']:,.0f}" for name, row in content["results"].items() if "videos_per_s" in row}
    lines = ["| | streams | videos/s | the same rows in full batches, no gates |", "|---|---:|---:|---:|"]
    for name, count in [name.rsplit(", streams ", 1) for name in results if ", streams " in name]:
        bare = results[f"{name}, bare in batches of {count}"]
        lines.append(f"| {name} | {count} | {results[f'{name}, streams {count}']} | {bare} |")
    return "\n".join(lines)


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def page(text: str) -> str:
    """Put the tables of the results into the page, in the place of those that it has."""
    tables = {
        "ratios": ratios({name: read(name) for name in MEASURED}),
        "files": files([read("file_to_answer"), read("file_to_answer_1h_360p")]),
        "gpu": gpu(read("gpu")),
        "gpu streams": gpu_streams(read("gpu")),
    }
    for name, table in tables.items():
        text = re.sub(f"(?<=<!-- {name} -->\n\n).*?(?=\n\n)", table, text, flags=re.DOTALL)
    return text


def per_video(content: dict[str, Any], dark: bool = False) -> Figure:
    """Draw how long a video takes in each way, as bars."""
    results, theme = content["results"], DARK if dark else LIGHT
    figure, axes = canvas("One video of 16 frames", content["machine"], 1.3 + 0.36 * len(results), theme)
    names = sorted(results, key=lambda name: -results[name]["median_ms"])
    times = [results[name]["median_ms"] for name in names]
    colours = [CLIP if name.startswith("clip") else DENSE for name in names]
    bars = axes.barh(names, times, color=colours, height=0.62)
    labels = [f"{results[name]['median_ms']:.0f} ms, {results[name]['gmacs']:.1f} GMACs" for name in names]
    axes.bar_label(bars, labels, padding=4, color=theme.muted, fontsize=9)
    axes.set_xlim(0, 1.3 * max(times))
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a video (median)", color=theme.ink)
    axes.grid(axis="x", color=theme.track)
    return figure


def streams(content: dict[str, Any], dark: bool = False) -> Figure:
    """Draw frames a second against the number of streams."""
    results, theme = content["results"], DARK if dark else LIGHT
    counts = [int(name.split()[0]) for name in results]
    figure, axes = canvas("Many streams", content["machine"], 3.8, theme)
    for key, label, style in (
        (
            "batched_frames_per_s",
            "the same rows in full batches, no gates",
            {"color": theme.muted, "linestyle": (0, (4, 3))},
        ),
        ("frames_per_s", "measured", {"color": CLIP, "marker": "o"}),
    ):
        axes.plot(counts, [row[key] for row in results.values()], label=label, linewidth=2, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("streams", color=theme.ink)
    axes.set_ylabel("frames a second", color=theme.ink)
    axes.grid(axis="y", color=theme.track)
    axes.legend(frameon=False, labelcolor=theme.ink, loc="lower right")
    return figure


def canvas(title: str, machine: dict[str, Any], height: float, theme: Theme) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, height), facecolor=theme.background, layout="constrained")
    axes = figure.add_subplot(facecolor=theme.background)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.muted)
    axes.tick_params(colors=theme.ink, length=0)
    axes.set_axisbelow(True)
    hardware = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    figure.suptitle(f"{title} ({hardware})", x=0.01, ha="left", color=theme.ink, fontsize=12)
    return figure, axes


def main() -> None:
    images, one_video, many_streams = ROOT / "docs" / "images", read("per_video"), read("many_streams")
    common.save_pair(lambda dark: per_video(one_video, dark), images / "per_video.svg")
    common.save_pair(lambda dark: streams(many_streams, dark), images / "streams.svg")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
