"""Check a data set before training: is every video there, can it be decoded, what does it show?"""

from __future__ import annotations

import multiprocessing
import os
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dynskip.errors import DynskipError
from dynskip.video.annotations import SPLITS, Item
from dynskip.video.cache import FrameCache
from dynskip.video.causes import MachineError, explain
from dynskip.video.loading import ignoring_interrupts
from dynskip.video.names import count_suffixes, counts_text
from dynskip.video.opening import open_source
from dynskip.video.source import VideoError


@dataclass(frozen=True)
class Finding:
    """What one video turned out to be.

    Attributes:
        frames: number of frames; 0 where it cannot be read.
        missing: whether there is no such file.
        error: why it cannot be read.
        machine: why this machine could not check it, which says nothing about the video.
        kept: whether its frames are in the cache.
        damage: what of it is lost; a cache that has its frames does not tell.
    """

    frames: int = 0
    missing: bool = False
    error: str = ""
    machine: str = ""
    kept: bool = False
    damage: str = ""


def check_video(item: Item, cache: FrameCache | None = None) -> Finding:
    """Decode a video from start to end, and keep its frames where there is a cache."""
    try:
        if not item.path.exists():
            return Finding(missing=True)
        if cache is not None:
            known = cache.file(item.path).is_file()
            frames = cache.read(item.path, range(cache.num_frames))[1]  # checks every frame that was kept
            damage = "" if known else open_source(item.path).check()
            return Finding(frames, kept=cache.file(item.path).is_file(), damage=damage)
        source = open_source(item.path)
        damage = source.check()
        return Finding(len(source), damage=damage)
    except VideoError as error:
        return Finding(error=str(error))
    except MachineError as error:
        return Finding(machine=str(error))
    except OSError as error:
        return Finding(machine=str(explain(error, item.path)))


def check_videos(items: Sequence[Item], cache: FrameCache | None = None, workers: int = 0) -> Iterator[Finding]:
    """Check videos one after the other.

    Args:
        items: the videos.
        cache: where to keep decoded frames.
        workers: processes that decode; 0 decodes in this one.

    Yields:
        What each video turned out to be, in order.

    Raises:
        DynskipError: if a process dies; the message names the videos that it may have been reading.
    """
    check = partial(check_video, cache=cache)
    if not workers:
        yield from map(check, items)
        return
    done, others = 0, set(multiprocessing.active_children())
    with ignoring_interrupts():
        # Forking a process that runs threads may hang: start from a clean one.
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
        findings = pool.map(check, items)
    own = set(multiprocessing.active_children()) - others
    try:
        for finding in findings:
            yield finding
            done += 1
    except BrokenProcessPool as error:
        suspects = ", ".join(str(item.path) for item in items[done : done + workers])
        raise DynskipError(
            f"A process that reads videos died after {done} of {len(items)}: out of memory, or killed by a damaged "
            f"file. It may have been reading one of {suspects}. Try one worker to find out; the cache keeps the rest."
        ) from error
    except BaseException:  # Ctrl-C, or nobody asks for the rest: do not wait for videos that take minutes
        for process in own:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def left_out(items: Sequence[Item], annotations: Iterable[Path | None] = ()) -> list[Path]:
    """List the files that lie beside annotated videos and belong to none of them.

    Args:
        items: the annotated videos.
        annotations: files that describe them, which do not count.

    Returns:
        The files, sorted, without hidden ones, `labels.csv` and `segments.csv`.
    """
    known = {os.path.realpath(path) for path in (*filter(None, annotations), *(item.path for item in items))}
    beside = (file for folder in {item.path.parent for item in items} if folder.is_dir() for file in folder.iterdir())
    return sorted(
        file
        for file in beside
        if not (file.name.startswith(".") or file.name in ("labels.csv", "segments.csv") or file.is_dir())
        and os.path.realpath(file) not in known
    )


def report_on(
    items: Sequence[Item],
    findings: Sequence[Finding],
    num_frames: int,
    cache: bool,
    beside: Sequence[Path] = (),
) -> dict[str, Any]:
    """Sum up what was found.

    Args:
        items: the videos.
        findings: what `check_videos` said of each.
        num_frames: frames that the network will see; videos with fewer are short.
        cache: whether frames were to be kept.
        beside: what `left_out` found.

    Returns:
        Plain values for JSON.
    """
    both = list(zip(items, findings, strict=True))
    good = [(item, finding) for item, finding in both if finding.frames]
    trained = {label for item, _ in good if item.split == "train" for label in item.labels}
    return {
        "videos": len(items),
        "readable": len(good),
        "missing": [str(item.path) for item, finding in both if finding.missing],
        "unreadable": [finding.error for _, finding in both if finding.error],
        "not_checked": [finding.machine for _, finding in both if finding.machine],
        "damaged": [f"{item.path}: {finding.damage}" for item, finding in good if finding.damage],
        "short": [f"{item.path}: {finding.frames} frames" for item, finding in good if finding.frames < num_frames],
        "fewer_frames_than_annotated": [
            f"{item.path}: {finding.frames} of {item.num_frames}"
            for item, finding in good
            if item.num_frames and finding.frames < 0.99 * item.num_frames
        ],
        "several_labels": [str(item.path) for item, _ in good if len(item.labels) > 1],
        "labels_alike": _alike({label for item in items for label in item.labels}),
        "labels_without_training_videos": sorted({label for item, _ in good for label in item.labels} - trained),
        "not_in_cache": [str(item.path) for item, finding in good if cache and not finding.kept],
        "left_out": [str(file) for file in beside],
        "splits": {split: _split_facts(split, both) for split in SPLITS if any(i.split == split for i in items)},
    }


def _alike(labels: Iterable[str]) -> list[str]:
    """Group labels that differ in case or in what separates words: they are probably one class."""
    groups: dict[str, list[str]] = {}
    for label in sorted(labels):
        key = re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", label).casefold())
        groups.setdefault(key, []).append(label)
    return [", ".join(map(repr, group)) for group in groups.values() if len(group) > 1]


def _split_facts(split: str, both: Sequence[tuple[Item, Finding]]) -> dict[str, Any]:
    chosen = [(item, finding) for item, finding in both if item.split == split]
    frames = [finding.frames for _, finding in chosen if finding.frames]
    labels = Counter(label for item, finding in chosen if finding.frames for label in item.labels)
    covered = [share for item, _ in chosen if (share := coverage(item)) is not None]
    return {
        "videos": len(chosen),
        "readable": len(frames),
        "frames": [min(frames), statistics.median(frames), max(frames)] if frames else None,
        "annotated_with_segments": len(covered),
        "mean_share_of_length_in_segments": statistics.mean(covered) if covered else None,
        "videos_per_class": dict(sorted(labels.items())),
    }


def coverage(item: Item) -> float | None:
    """Return the share of a video's length that its segments cover, if its annotation tells."""
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
    "not_checked": "could not be checked, which is this machine's fault and not theirs",
    "damaged": "are damaged, and what is lost shows the frame before it",
    "short": "have fewer frames than the network sees, which repeats some",
    "fewer_frames_than_annotated": "have fewer frames than annotated",
    "labels_alike": "groups of labels differ only in case or spaces: each is probably one class",
    "labels_without_training_videos": "labels have no training videos",
    "not_in_cache": "could not be kept in the cache",
}


def is_clean(report: dict[str, Any]) -> bool:
    """Whether all videos can be trained on and evaluated."""
    return not any(report[key] for key in LISTS if key not in ("short", "damaged"))


def summary(report: dict[str, Any]) -> str:
    """Lay a report out for reading."""
    lines = []
    for split, facts in report["splits"].items():
        classes = facts["videos_per_class"]
        line = f"{split}: {facts['readable']} of {facts['videos']} videos, {len(classes)} classes"
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
    suffixes = counts_text(count_suffixes(report["left_out"]))
    for key, what in {**LISTS, "left_out": f"files beside the videos are in no annotation ({suffixes})"}.items():
        if found := report[key]:
            lines += [f"{len(found)} {what}:", *(f"  {entry}" for entry in found[:5])]
            lines += [f"  ... and {len(found) - 5} more, in the report"] * (len(found) > 5)
    return "\n".join(lines)
