"""Points of a curve: what thresholds reach and execute, kept as data and set on models."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dynskip.backbone import StagedBackbone
from dynskip.errors import DynskipError
from dynskip.flops import FLOPsLookup
from dynskip.output import EncodedVideo, SkipOutput
from dynskip.terminate import EarlyTerminator


class Gated(Protocol):
    """What this module asks of a model: `StopOrForward` and `EarlyExit` have it."""

    backbone: StagedBackbone
    forward_threshold: tuple[float, ...]

    def encode(self, frames: Tensor, /) -> EncodedVideo:
        """Run the whole backbone."""

    def decide(self, encoded: EncodedVideo, /) -> SkipOutput:
        """Gate every frame from its stored features."""

    def lookup_for(self, image_size: tuple[int, int], /) -> FLOPsLookup:
        """Return the cost table for frames of a size."""


@dataclass(frozen=True)
class CurvePoint:
    """What one way of classifying a set of videos reaches, and what it executes.

    Attributes:
        accuracy: by the metric asked for, top-1 by default; from 0 to 1.
        macs: mean executed MACs (multiply-adds) a video, gates and head included; in the cost table's unit.
    """

    accuracy: float
    macs: float


@dataclass(frozen=True)
class OperatingPoint(CurvePoint):
    """Thresholds of a model, and what it reaches and executes with them.

    Attributes:
        forward_threshold: forward probability that a frame must exceed, one a gate.
        termination_threshold: probability that ends a video; `None` reads every video to its end.
    """

    forward_threshold: tuple[float, ...]
    termination_threshold: float | None

    def apply(self, model: Gated) -> None:
        """Set a model's thresholds to these.

        Args:
            model: the model that was calibrated, or one with as many gates.

        Raises:
            DynskipError: if it has another number of gates, or no terminator to set.
        """
        check_fits(self, model)
        model.forward_threshold, terminator = self.forward_threshold, terminator_of(model)
        if terminator is None:
            return
        if self.termination_threshold is None:
            model.terminator = None  # type: ignore[attr-defined]
        else:
            terminator.threshold = self.termination_threshold


@dataclass(frozen=True)
class Calibration:
    """The thresholds chosen, and what else could be had.

    Attributes:
        point: the choice.
        curve: the points that no other one beats, from the cheapest to the most accurate.
        dense: the plain backbone on every frame, without gates.
    """

    point: OperatingPoint
    curve: tuple[OperatingPoint, ...]
    dense: CurvePoint

    def apply(self, model: Gated) -> None:
        """Set a model's thresholds to the chosen ones; see `OperatingPoint.apply`."""
        self.point.apply(model)


def write_curves(file: str | Path, curves: Mapping[str, Sequence[CurvePoint]]) -> None:
    """Write curves as data, for other programs.

    Args:
        file: `.json` for an object with a list of points a curve; `.csv` for a table with a row a point, one column for
            each gate's threshold.
        curves: points by the name of their curve.

    Raises:
        DynskipError: if the file's name ends otherwise.
    """
    path = Path(file)
    if path.suffix == ".json":
        data = {name: [asdict(point) for point in points] for name, points in curves.items()}
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        rows = [{"curve": name, **_flat(point)} for name, points in curves.items() for point in points]
        columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
    else:
        raise DynskipError(f"Cannot write curves to {path.name}: its name must end in .csv or .json.")


def terminator_of(model: Gated) -> EarlyTerminator | None:
    return getattr(model, "terminator", None)


def check_fits(point: OperatingPoint, model: Gated) -> None:
    if len(point.forward_threshold) != model.backbone.num_stages:
        raise DynskipError(
            f"The point has thresholds for {len(point.forward_threshold)} gates and the model has "
            f"{model.backbone.num_stages}. Calibrate this model."
        )
    if point.termination_threshold is not None and terminator_of(model) is None:
        raise DynskipError(
            "The point ends videos early and the model has no terminator. Give it the one it was calibrated with, "
            "such as `model.terminator = EarlyTerminator(min_frames=3)`."
        )


def _flat(point: CurvePoint) -> dict[str, Any]:
    row = asdict(point)
    for n, threshold in enumerate(row.pop("forward_threshold", ())):
        row[f"forward_threshold_{n}"] = threshold
    return row
