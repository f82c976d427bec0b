"""Points of a curve: what thresholds reach and cost, kept as data and set on models."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from dynskip.errors import DynskipError

if TYPE_CHECKING:
    from dynskip.early_exit import EarlyExit
    from dynskip.terminate import EarlyTerminator
    from dynskip.wrapper import StopOrForward


Gated: TypeAlias = "StopOrForward | EarlyExit"
"""A model that can be calibrated."""

Termination: TypeAlias = "float | tuple[tuple[str, float], ...] | None"
"""When videos end: the terminator's threshold; names and values of its own parameters; `None` for never."""


@dataclass(frozen=True)
class CurvePoint:
    """Accuracy and cost of a model on a set of videos, and the thresholds that lead to them.

    Attributes:
        accuracy: by the metric asked for, top-1 by default; from 0 to 1.
        macs: mean executed MACs (multiply-adds) a video, gates and head included; in the cost table's unit.
        forward_threshold: forward probability that a frame must exceed, one a gate; empty without gates.
        termination_threshold: probability that ends a video; names and values of the parameters of a terminator that
            has others; `None` reads every video to its end.
        band: confidence band of the accuracy, lowest and highest; `None` where it was not asked for.
    """

    accuracy: float
    macs: float
    forward_threshold: tuple[float, ...] = ()
    termination_threshold: Termination = None
    band: tuple[float, float] | None = None

    def apply(self, model: Gated) -> None:
        """Set a model's thresholds to these.

        Args:
            model: the model that was calibrated, or one with as many gates.

        Raises:
            DynskipError: if it has another number of gates, or no terminator to set.
        """
        check_fits(self, model)
        model.forward_threshold = self.forward_threshold
        if self.termination_threshold is None:
            model.terminator = None
        elif model.terminator is not None:
            set_termination(model.terminator, self.termination_threshold)


@dataclass(frozen=True)
class Calibration:
    """The thresholds chosen, and the other good ones.

    Attributes:
        point: the choice.
        curve: the points that no other one beats, from the cheapest to the most accurate.
        dense: every frame through the whole network, without gates.
        held_out: what the same search reaches on videos that it has not seen, with its band; `None` without groups. It
            has the thresholds of `point`.
    """

    point: CurvePoint
    curve: tuple[CurvePoint, ...]
    dense: CurvePoint
    held_out: CurvePoint | None = None

    def apply(self, model: Gated) -> None:
        """Set a model's thresholds to the chosen ones; see `CurvePoint.apply`."""
        self.point.apply(model)


def write_curves(file: str | Path, curves: Mapping[str, Sequence[CurvePoint]]) -> None:
    """Write curves as data, for other programs.

    Args:
        file: `.json` for an object with a list of points a curve; `.csv` for a table with a row a point, one column for
            each gate's threshold.
        curves: points by the name of their curve.

    Raises:
        DynskipError: if the file's name has another ending.
    """
    path = Path(file)
    table = {name: [asdict(point) for point in points] for name, points in curves.items()}
    if path.suffix == ".json":
        path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        rows = []
        for name, points in table.items():
            for point in points:
                gates = {f"forward_threshold_{n}": each for n, each in enumerate(point.pop("forward_threshold"))}
                if isinstance(own := point["termination_threshold"], tuple):
                    del point["termination_threshold"]
                    gates |= {f"termination_{parameter}": value for parameter, value in own}
                if (edges := point.pop("band")) is not None:
                    gates |= {"lowest": edges[0], "highest": edges[1]}
                rows.append({"curve": name, **point, **gates})
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, dict.fromkeys(itertools.chain(*rows)), restval="")
            writer.writeheader()
            writer.writerows(rows)
    else:
        raise DynskipError(f"Cannot write curves to {path.name}: its name must end in .csv or .json.")


def set_termination(terminator: EarlyTerminator, termination: Termination) -> None:
    """Set a terminator's parameters to those of a point that ends videos."""
    own = termination if isinstance(termination, tuple) else (("threshold", termination),)
    for name, value in own:
        setattr(terminator, name, value)


def check_fits(point: CurvePoint, model: Gated) -> None:
    if len(point.forward_threshold) != model.backbone.num_stages:
        raise DynskipError(
            f"The point has thresholds for {len(point.forward_threshold)} gates and the model has "
            f"{model.backbone.num_stages}. Calibrate this model."
        )
    if point.termination_threshold is not None and model.terminator is None:
        raise DynskipError(
            "The point ends videos early and the model has no terminator. Give it the one it was calibrated with, "
            "such as `model.terminator = EarlyTerminator(min_frames=3)`."
        )
