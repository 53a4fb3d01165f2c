"""Metrics for Prometheus: of accesses, and an endpoint for them and for a mover's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol


class HasSummary(Protocol):
    """An ``AccessStatsCollector``, as its collector sees it."""

    def get_stats_summary(self) -> dict[str, Any]:
        """As ``AccessStatsCollector.get_stats_summary``."""


class AccessCollector:
    """A collector for ``prometheus_client``: ``REGISTRY.register(AccessCollector(stats))``.

    A scrape reads the collector's own counts. Needs ``pip install kvkernels[metrics]``.

    Parameters
    ----------
    stats : AccessStatsCollector
    prefix : str
        What the names of the metrics begin with.

    Raises
    ------
    ImportError
        ``prometheus_client`` is not installed.
    """

    def __init__(self, stats: HasSummary, prefix: str = "kvkernels_cache") -> None:
        self._core = _prometheus("AccessCollector").core
        self._stats = stats
        self._prefix = prefix

    def collect(self) -> Iterator[Any]:
        """The metric families, at a scrape."""
        said, core, prefix = self._stats.get_stats_summary(), self._core, self._prefix
        accesses = core.CounterMetricFamily(f"{prefix}_accesses", "Blocks that were looked for.", labels=("result",))
        accesses.add_metric(["hit"], said["total_hits"])
        accesses.add_metric(["miss"], said["total_misses"])
        yield accesses
        yield core.GaugeMetricFamily(f"{prefix}_blocks", "Different blocks that were seen.", said["unique_blocks"])


def serve_metrics(*collectors: Any, port: int = 0, host: str = "127.0.0.1") -> tuple[int, Callable[[], None]]:
    """Serve collectors' metrics over HTTP, from a thread.

    Parameters
    ----------
    *collectors
        ``AccessCollector``, ``kvkernels.transfer.MoverCollector``, or others of ``prometheus_client``.
    port : int
        0 takes one that is free.
    host : str
        Where to listen: this machine alone, unless told otherwise.

    Returns
    -------
    port : int
    stop : callable
        Ends the server.

    Raises
    ------
    ImportError
        ``prometheus_client`` is not installed.
    OSError
        The port is taken.
    """
    client = _prometheus("serve_metrics")
    registry = client.CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    server, thread = client.start_http_server(port, addr=host, registry=registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return int(server.server_port), stop


def _prometheus(what: str) -> Any:
    try:
        import prometheus_client
        import prometheus_client.core
    except ImportError as error:
        raise ImportError(f"{what}: prometheus_client must be installed: pip install kvkernels[metrics]") from error
    return prometheus_client
