"""Imported first, lets a script use data sets of `dynskip.video` on a machine without PyAV, as GPU machines often are.

`dynskip.video` loads PyAV with its readers. A stand-in takes its place; what would decode with it fails.
"""

from __future__ import annotations

import sys
from unittest.mock import MagicMock

try:
    import av  # noqa: F401
except ImportError:
    sys.modules |= {name: MagicMock() for name in ("av", "av.video", "av.video.reformatter")}
