"""Draws the pictures of docs/speed.md from the results.

python benchmarks/plot.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
INK, MUTED, TRACK = "#1f2328", "#59636e", "#e6e9ed"
# From Okabe and Ito's palette, which keeps its contrasts for colour-blind readers.
DENSE, CLIP, IDEAL = "#E69F00", "#009E73", "#59636e"


def per_video(content: dict[str, Any]) -> Figure:
    """Draw how long a video takes in each way, as bars."""
    results = content["results"]
    figure, axes = canvas("One video of 16 frames", content["machine"], 0.8 + 0.36 * len(results))
    names = sorted(results, key=lambda name: -results[name]["median_ms"])
    times = [results[name]["median_ms"] for name in names]
    colours = [CLIP if name.startswith("clip") else DENSE for name in names]
    bars = axes.barh(names, times, color=colours, height=0.62)
    labels = [f"{results[name]['median_ms']:.0f} ms, {results[name]['gmacs']:.1f} GMACs" for name in names]
    axes.bar_label(bars, labels, padding=4, color=MUTED, fontsize=9)
    axes.set_xlim(0, 1.3 * max(times))
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    return figure


def streams(content: dict[str, Any]) -> Figure:
    """Draw frames a second against the number of streams."""
    results = content["results"]
    counts = [int(name.split()[0]) for name in results]
    figure, axes = canvas("Many streams", content["machine"], 3.8)
    for key, label, style in (
        ("ideal_frames_per_s", "ideal: the same rows in full batches", {"color": IDEAL, "linestyle": (0, (4, 3))}),
        ("frames_per_s", "measured", {"color": CLIP, "marker": "o"}),
    ):
        axes.plot(counts, [row[key] for row in results.values()], label=label, linewidth=2, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("streams", color=INK)
    axes.set_ylabel("frames a second", color=INK)
    axes.grid(axis="y", color=TRACK)
    axes.legend(frameon=False, labelcolor=INK, loc="lower right")
    return figure


def canvas(title: str, machine: dict[str, Any], height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.5, height), dpi=150, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, length=0)
    axes.set_axisbelow(True)
    hardware = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    axes.set_title(f"{title} ({hardware})", loc="left", color=INK, fontsize=12)
    return figure, axes


def main() -> None:
    for name, source, draw in (("per_video", "per_video", per_video), ("streams", "many_streams", streams)):
        content = json.loads((ROOT / "benchmarks" / "results" / f"{source}.json").read_text(encoding="utf-8"))
        draw(content).savefig(ROOT / "docs" / "images" / f"{name}.png")


if __name__ == "__main__":
    main()
