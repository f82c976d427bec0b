"""Open whatever holds the frames of a video."""

from __future__ import annotations

import stat
from pathlib import Path

from dynskip.video.causes import check_regular, explain
from dynskip.video.files import VideoFile
from dynskip.video.pictures import PICTURE_SUFFIXES, Pictures, list_pictures
from dynskip.video.source import FrameSource


def open_source(path: Path) -> FrameSource:
    """Open a video file, a folder of extracted frames or a still picture.

    Args:
        path: where it is. A picture is a video of one frame.

    Returns:
        Its frames.

    Raises:
        VideoError: if there is nothing, it is no regular file, or a folder holds no frames.
        MachineError: if this machine cannot look at it.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise explain(error, path) from error
    check_regular(path, mode)
    if stat.S_ISDIR(mode):
        return Pictures(path, list_pictures(path))
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return Pictures(path, [path])
    return VideoFile(path)
