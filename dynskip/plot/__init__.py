"""Pictures of what was decided: frames of one video, shares over many, costs of stages, accuracy against cost.

Needs matplotlib (extra `plot`), except for `timeline_text`. Figures are returned, never shown, and
leave no global state behind: save one with `figure.savefig("timeline.png")`.
"""

from dynskip.plot._charts import accuracy_compute, frame_usage, stage_macs
from dynskip.plot._letters import Font, find_font
from dynskip.plot._timeline import timeline, timeline_text

__all__ = ["Font", "accuracy_compute", "find_font", "frame_usage", "stage_macs", "timeline", "timeline_text"]
