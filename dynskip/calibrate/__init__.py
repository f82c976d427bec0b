"""Choose thresholds for a budget or an accuracy, without training.

The backbone runs once on validation videos; what other thresholds would decide is replayed from its features, gates
with their memory included, so every point of a curve is what the model does with these thresholds.
"""

from dynskip.calibrate._baselines import dense, random_frames, uniform_frames
from dynskip.calibrate._points import Calibration, CurvePoint, Gated, OperatingPoint, write_curves
from dynskip.calibrate._replay import Batches, Metric, encode
from dynskip.calibrate._search import replay, to_accuracy, to_budget

__all__ = [
    "Batches",
    "Calibration",
    "CurvePoint",
    "Gated",
    "Metric",
    "OperatingPoint",
    "dense",
    "encode",
    "random_frames",
    "replay",
    "to_accuracy",
    "to_budget",
    "uniform_frames",
    "write_curves",
]
