"""Which video a name means: suffixes, spellings, times in names, links; and what a video is known by."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import NamedTuple

from dynskip.errors import DynskipError
from dynskip.video.files import VIDEO_SUFFIXES

_TIMES = re.compile(r"(_\d{6}_\d{6})+$")  # seconds that a clip was cut at, as in the names of Kinetics


def normal(text: str) -> str:
    """Return a name or label in one spelling: no spaces around it, accented letters as one character."""
    return unicodedata.normalize("NFC", text.strip())


def stamp(path: Path) -> str:
    """Return what changes when a video is replaced: size and time of its file, or of all files of its folder.

    Args:
        path: a video file, a folder of extracted frames, or a picture.

    Raises:
        OSError: if there is no such file.
    """
    if not path.is_dir():
        status = path.stat()
        return f"{status.st_size} {status.st_mtime_ns}"
    with os.scandir(path) as entries:  # a folder's own time stays when a picture in it is written over
        files = [(entry.name, entry.stat()) for entry in entries if not entry.name.startswith(".")]
    facts = sorted((name, status.st_size, status.st_mtime_ns) for name, status in files)
    return f"{len(facts)} files {hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}"


def find_videos(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Find the video files of a folder and of those in it. Links to folders are followed, each real folder once.

    Args:
        folder: where to look.

    Returns:
        The videos, sorted; and how many other files were left out, by suffix, as `count_suffixes` does.
    """
    videos: list[Path] = []
    left_out: list[str] = []
    closed = Counter[str]()
    seen: set[str] = set()
    starts = [os.fspath(folder)]
    while starts:  # what lies in the folder itself comes before what links lead to
        for place, folders, files in os.walk(starts.pop(0), onerror=lambda _: closed.update(["unreadable folder"])):
            if (real := os.path.realpath(place)) in seen:
                folders.clear()
                continue
            seen.add(real)
            starts += sorted(path for name in folders if os.path.islink(path := os.path.join(place, name)))
            for file in (Path(place, name) for name in files):
                if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file():
                    videos.append(file)
                else:
                    left_out.append(file.name)
    return sorted(videos), count_suffixes(left_out) + closed


def count_suffixes(names: Iterable[str]) -> Counter[str]:
    """Count file names by suffix in lower case."""
    return Counter(PurePath(name).suffix.lower() or "no suffix" for name in names)


def counts_text(counts: Counter[str]) -> str:
    """Write counts for reading: `.txt 3, .srt 1`."""
    shown = ", ".join(f"{name} {count}" for name, count in counts.most_common(10))
    return shown + ", ..." * (len(counts) > 10)


class VideoFolder:
    """Finds the videos of a folder by name: `NAME` or `v_NAME`, with a video suffix or as a folder of frames.

    On the disk a name may have the other Unicode form. It may also end in times (`NAME_000010_000020`) that the
    annotation leaves out, if a single file fits. A name that has times means these times alone.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._listings: dict[Path, _Listing] = {}

    def path(self, name: str) -> Path:
        """Return the path of a name as it is spelt on the disk, or where it would be."""
        exact, parent = self.root / name, str(PurePath(name).parent)
        if exact.exists() or parent == name:
            return exact
        return self._list(self.path(parent)).spelt.get(normal(exact.name), [exact])[0]

    def find(self, name: str) -> Path:
        """Return where a video is, or where it would be.

        Raises:
            DynskipError: if two files could be meant.
        """
        exact = self.path(name)
        if exact.exists():
            return exact
        listing, key = self._list(self.path(str(PurePath(name).parent))), _without_v(exact.name)
        found = listing.called.get(key) or listing.untimed.get(key, [])
        if len(found) > 1:
            raise DynskipError(f"{name!r} could be {found[0]} or {found[1]}. Keep one of them in the folder.")
        return found[0] if found else exact

    def _list(self, folder: Path) -> _Listing:
        if folder not in self._listings:
            listing = self._listings[folder] = _Listing({}, {}, {})
            for path in sorted(folder.iterdir()) if folder.is_dir() else []:
                listing.spelt.setdefault(normal(path.name), []).append(path)
                is_file = path.suffix.lower() in VIDEO_SUFFIXES
                if is_file or path.is_dir():
                    key = _without_v(path.stem if is_file else path.name)
                    listing.called.setdefault(key, []).append(path)
                    if (untimed := _TIMES.sub("", key)) != key:
                        listing.untimed.setdefault(untimed, []).append(path)
                if is_file:
                    listing.called.setdefault(_without_v(path.name), []).append(path)
        return self._listings[folder]


class _Listing(NamedTuple):
    """What a folder holds, by names in their normal spelling."""

    spelt: dict[str, list[Path]]  # all that there is, by full name
    called: dict[str, list[Path]]  # videos, by name with and without suffix, without v_
    untimed: dict[str, list[Path]]  # those whose names end in times, by what stands before


def _without_v(name: str) -> str:
    return normal(name).removeprefix("v_")
