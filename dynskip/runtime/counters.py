"""What a server counts, for each stream and in a line a minute."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class StreamCounters:
    """What became of a stream's frames since it was added.

    Of the frames that came, each was dropped, unseen, stopped or used, but for at most one that waits and one that is
    being looked at.

    Attributes:
        frames_in: frames that came.
        frames_dropped: frames that nothing was decided about: a newer one took their place, they did not fit, or the
            stream ended.
        frames_unseen: frames that were not looked at because their video had ended early.
        frames_stopped: frames that each gate stopped, `N` numbers.
        frames_used: frames that passed every gate.
        answers: videos that were answered.
        reconnects: how often the source had to connect again.
        macs: executed multiply-adds (in the cost table's unit), fallbacks included.
        lag: seconds from the coming of the latest decided frame to its decision.
        lag_sum: the same, summed over all decided frames.
        silent: seconds since the newest frame came.
    """

    frames_in: int = 0
    frames_dropped: int = 0
    frames_unseen: int = 0
    frames_stopped: tuple[int, ...] = ()
    frames_used: int = 0
    answers: int = 0
    reconnects: int = 0
    macs: float = 0.0
    lag: float = 0.0
    lag_sum: float = 0.0
    silent: float = 0.0

    @property
    def frames_seen(self) -> int:
        """Number of frames that were decided."""
        return self.frames_used + sum(self.frames_stopped)


SUMMED = ("frames_in", "frames_dropped", "frames_unseen", "frames_seen", "frames_used", "answers", "reconnects", "macs")


def summed(counters: Iterable[StreamCounters]) -> dict[str, float]:
    """Add up what can be added up."""
    every = list(counters)
    return {name: sum(getattr(each, name) for each in every) for name in (*SUMMED, "lag_sum")}


def log_line(streams: int, seconds: float, new: dict[str, float], longest_lag: float) -> str:
    """Say in a line what happened in some seconds; `new` is by how much the sums grew."""
    seen, used = int(new["frames_seen"]), int(new["frames_used"])
    mean = new["lag_sum"] / seen if seen else 0.0
    return (
        f"{streams} streams, {seconds:.0f} s: {new['frames_in']:.0f} frames in, {new['frames_dropped']:.0f} dropped, "
        f"{new['frames_unseen']:.0f} unseen, {seen - used} stopped, {used} used; {new['answers']:.0f} answers, "
        f"{new['macs'] / 1e9:.4g} GMACs; lag {mean:.3f} s, at most {longest_lag:.3f} s; "
        f"{new['reconnects']:.0f} reconnects"
    )
