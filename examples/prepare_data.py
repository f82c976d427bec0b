"""Check a data set before training: is every video there, does it decode, what does it show?"""

from __future__ import annotations

import json
import multiprocessing
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from video_data import SPLITS, FrameCache, Item, VideoError, sample_frames

from dynskip import DynskipError


@dataclass(frozen=True)
class Finding:
    """What one video turned out to be."""

    frames: int = 0
    missing: bool = False
    error: str = ""
    kept: bool = False  # in the cache


def check_video(item: Item, cache: FrameCache | None) -> Finding:
    """Decode a video from end to end, and keep its frames where there is a cache."""
    if not item.path.exists():
        return Finding(missing=True)
    try:
        if cache is None:
            return Finding(sample_frames(item.path, 1, 32)[1])
        frames = cache.read(item.path, range(cache.num_frames))[1]  # checks every frame that was kept
        return Finding(frames, kept=cache.file(item.path).is_file())
    except VideoError as error:
        return Finding(error=str(error))


def check_videos(items: Sequence[Item], cache: FrameCache | None, workers: int) -> list[Finding]:
    """Check videos in `workers` processes (0: in this one), in order.

    Raises:
        DynskipError: if a process dies; the message names the videos that it may have been reading.
    """
    check = partial(check_video, cache=cache)
    if not workers:
        return list(_progress(map(check, items), len(items)))
    findings: list[Finding] = []
    # Forking a process that runs threads may hang: start from a clean one.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context) as pool:
            for finding in _progress(pool.map(check, items), len(items)):
                findings.append(finding)
    except BrokenProcessPool as error:
        suspects = ", ".join(str(item.path) for item in items[len(findings) : len(findings) + workers])
        raise DynskipError(
            f"A process that reads videos died after {len(findings)} of {len(items)}: out of memory, or killed by a "
            f"damaged file. It may have been reading one of {suspects}. Try --workers 1 to find out; what is in the "
            "cache stays."
        ) from error
    return findings


def _progress(findings: Iterator[Finding], total: int) -> Iterator[Finding]:
    return iter(tqdm(findings, "prepare", total, leave=False, disable=None))


def report_on(items: Sequence[Item], findings: Sequence[Finding], num_frames: int, cache: bool) -> dict[str, Any]:
    """Sum up what was found, as plain values for JSON.

    Args:
        items: the videos.
        findings: what `check_videos` said of each.
        num_frames: frames that the network will see; videos with fewer are short.
        cache: whether frames were to be kept.
    """
    both = list(zip(items, findings, strict=True))
    good = [(item, finding) for item, finding in both if finding.frames]
    trained = {label for item, _ in good if item.split == "train" for label in item.labels}
    report: dict[str, Any] = {
        "videos": len(items),
        "readable": len(good),
        "missing": [str(item.path) for item, finding in both if finding.missing],
        "unreadable": [finding.error for _, finding in both if finding.error],
        "short": [f"{item.path}: {finding.frames} frames" for item, finding in good if finding.frames < num_frames],
        "fewer_frames_than_annotated": [
            f"{item.path}: {finding.frames} of {item.num_frames}"
            for item, finding in good
            if item.num_frames and finding.frames < 0.99 * item.num_frames
        ],
        "several_labels": [str(item.path) for item, _ in good if len(item.labels) > 1],
        "labels_without_training_videos": sorted({label for item, _ in good for label in item.labels} - trained),
        "splits": {},
    }
    if cache:
        report["not_in_cache"] = [str(item.path) for item, finding in good if not finding.kept]
    for split in SPLITS:
        chosen = [(item, finding) for item, finding in both if item.split == split]
        if not chosen:
            continue
        frames = [finding.frames for _, finding in chosen if finding.frames]
        labels = Counter(label for item, finding in chosen if finding.frames for label in item.labels)
        covered = [share for item, _ in chosen if (share := coverage(item)) is not None]
        report["splits"][split] = {
            "videos": len(chosen),
            "readable": len(frames),
            "frames": [min(frames), statistics.median(frames), max(frames)] if frames else None,
            "annotated_with_segments": len(covered),
            "mean_share_of_length_in_segments": statistics.mean(covered) if covered else None,
            "videos_per_class": dict(sorted(labels.items())),
        }
    return report


def coverage(item: Item) -> float | None:
    """Share of a video's length that its segments cover, if its annotation tells."""
    if not item.segments or not item.duration:
        return None
    covered, end = 0.0, 0.0
    for segment in sorted(item.segments, key=lambda segment: segment.start):
        covered += max(min(segment.end, item.duration) - max(segment.start, end), 0.0)
        end = max(end, segment.end)
    return covered / item.duration


LISTS = {
    "missing": "are missing",
    "unreadable": "cannot be read",
    "short": "have fewer frames than the network sees, which repeats some",
    "fewer_frames_than_annotated": "have fewer frames than annotated",
    "labels_without_training_videos": "labels have no training videos",
    "not_in_cache": "could not be kept in the cache",
}


def is_clean(report: dict[str, Any]) -> bool:
    """Whether nothing stands in the way of training on all of it."""
    return not any(report.get(key) for key in LISTS if key != "short")


def summary(report: dict[str, Any]) -> str:
    """Lay the report out for reading."""
    lines = [f"{report['readable']} of {report['videos']} videos can be read."]
    for split, facts in report["splits"].items():
        classes = facts["videos_per_class"]
        line = f"  {split}: {facts['readable']} of {facts['videos']} videos, {len(classes)} classes"
        if classes:
            line += f" of {min(classes.values())} to {max(classes.values())} videos"
        if facts["frames"]:
            line += ", {} to {} frames (median {:g})".format(facts["frames"][0], facts["frames"][2], facts["frames"][1])
        if facts["annotated_with_segments"]:
            share = 100 * facts["mean_share_of_length_in_segments"]
            line += f"; segments cover {share:.0f} % of {facts['annotated_with_segments']} videos"
        lines.append(line)
    if report["several_labels"]:
        lines.append(f"{len(report['several_labels'])} have several labels.")
    for key, what in LISTS.items():
        if found := report.get(key):
            lines += [f"{len(found)} {what}:", *(f"  {entry}" for entry in found[:5])]
            lines += [f"  ... and {len(found) - 5} more, in the report"] * (len(found) > 5)
    return "\n".join(lines)


def write_report(report: dict[str, Any], file: Path) -> None:
    """Write the report as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
