"""Videos as input: files, frame folders and pictures; annotation formats; clips; the rendered demo set.

The extra `video` brings what it needs. `import dynskip` imports none of it.
"""

try:
    import av  # noqa: F401
    import PIL  # noqa: F401
    import safetensors  # noqa: F401
    import tqdm  # noqa: F401
except ImportError as error:
    raise ImportError(f"dynskip.video needs {error.name}. Install dynskip with the extra `video`.") from error

from dynskip.video.annotations import (
    Item,
    Segment,
    class_names,
    data_changes,
    held_out_split,
    list_videos,
    pick_split,
)
from dynskip.video.causes import MachineError
from dynskip.video.clips import (
    Batch,
    Clips,
    EvaluationLoader,
    collate_padded,
    derive_seed,
    training_batches,
)
from dynskip.video.files import open_video, to_array
from dynskip.video.formats import AnnotationReader, load_items, read_items, relevant_frames
from dynskip.video.lazy import LazyClips, lazy_frames
from dynskip.video.live import LinkLostError, LiveFrame, LiveSource, LiveVideo
from dynskip.video.lock import hold_folder
from dynskip.video.names import find_videos
from dynskip.video.newest import Newest
from dynskip.video.opening import open_source
from dynskip.video.preprocessing import Preprocessing
from dynskip.video.source import FrameSource, VideoError, notes_on, sample_frames
from dynskip.video.stick_figures import render_set
from dynskip.video.stored import StoredFeatures, encode_clips, fit_classifier

__all__ = [
    "AnnotationReader",
    "Batch",
    "Clips",
    "EvaluationLoader",
    "FrameSource",
    "Item",
    "LazyClips",
    "LinkLostError",
    "LiveFrame",
    "LiveSource",
    "LiveVideo",
    "MachineError",
    "Newest",
    "Preprocessing",
    "Segment",
    "StoredFeatures",
    "VideoError",
    "class_names",
    "collate_padded",
    "data_changes",
    "derive_seed",
    "encode_clips",
    "find_videos",
    "fit_classifier",
    "held_out_split",
    "hold_folder",
    "lazy_frames",
    "list_videos",
    "load_items",
    "notes_on",
    "open_source",
    "open_video",
    "pick_split",
    "read_items",
    "relevant_frames",
    "render_set",
    "sample_frames",
    "to_array",
    "training_batches",
]
