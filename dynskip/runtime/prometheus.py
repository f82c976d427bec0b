"""What a server counts, as Prometheus reads it. Needs the extra `serve`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

try:
    from prometheus_client import CollectorRegistry, Metric, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(
        f"dynskip.runtime.prometheus needs {error.name}. Install dynskip with the extra `serve`."
    ) from error

if TYPE_CHECKING:
    from dynskip.runtime.serving import StreamServer

COUNTERS = {
    "frames_in": "Frames that came.",
    "frames_dropped": "Frames that nothing was decided about.",
    "frames_unseen": "Frames not looked at because their video had ended early.",
    "frames_used": "Frames that passed every gate.",
    "answers": "Videos that were answered.",
    "reconnects": "How often the source had to connect again.",
    "macs": "Executed multiply-adds.",
}


class ServerCollector(Collector):
    """The counters of a server's streams as metrics, read whenever Prometheus asks.

    `prometheus_client.REGISTRY.register(ServerCollector(server))` adds them to a program's own metrics, which
    `prometheus_client.start_http_server(8000)` serves.

    Args:
        server: the server.
    """

    def __init__(self, server: StreamServer) -> None:
        self.server = server

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; see `StreamCounters` for what they mean."""
        counters = self.server.counters()
        yield GaugeMetricFamily("dynskip_streams", "Streams that are being served.", value=len(counters))
        for name, text in COUNTERS.items():
            metric = CounterMetricFamily(f"dynskip_{name}", text, labels=["stream"])
            for key, each in counters.items():
                metric.add_metric([key], getattr(each, name))
            yield metric
        stopped = CounterMetricFamily(
            "dynskip_frames_stopped", "Frames that a gate stopped.", labels=["stream", "gate"]
        )
        lag = SummaryMetricFamily("dynskip_lag_seconds", "From a frame's coming to its decision.", labels=["stream"])
        silent = GaugeMetricFamily("dynskip_silent_seconds", "Since the newest frame came.", labels=["stream"])
        for key, each in counters.items():
            for gate, count in enumerate(each.frames_stopped):
                stopped.add_metric([key, str(gate)], count)
            lag.add_metric([key], count_value=each.frames_seen, sum_value=each.lag_sum)
            silent.add_metric([key], each.silent)
        yield from (stopped, lag, silent)


def prometheus_text(server: StreamServer) -> str:
    """Return the counters of a server's streams in the text format that Prometheus reads.

    Args:
        server: the server.

    Returns:
        The text, to be sent as `text/plain; version=0.0.4`.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServerCollector(server))
    return generate_latest(registry).decode()
