"""Choose thresholds for a budget, an accuracy or a risk, without training.

The backbone runs once on validation videos. Gates, with their memory, are then replayed on its stored features for each
set of thresholds. So every point of a curve is what the model does with these thresholds, not an estimate.
"""

import warnings
from typing import Any

from dynskip.calibrate._points import Calibration, CurvePoint, Gated, Termination, write_curves
from dynskip.calibrate._replay import Batches, Metric, dense, encode, random_frames, replay, uniform_frames
from dynskip.calibrate._risk import to_risk
from dynskip.calibrate._search import curve, to_accuracy, to_budget

__all__ = [
    "Batches",
    "Calibration",
    "CurvePoint",
    "Gated",
    "Metric",
    "Termination",
    "curve",
    "dense",
    "encode",
    "random_frames",
    "replay",
    "to_accuracy",
    "to_budget",
    "to_risk",
    "uniform_frames",
    "write_curves",
]


def __getattr__(name: str) -> Any:
    if name == "OperatingPoint":
        warnings.warn("`OperatingPoint` is now `dynskip.calibrate.CurvePoint`.", DeprecationWarning, stacklevel=2)
        return CurvePoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
