"""`MetricsExporter`: Prometheus metrics, computed at each scrape by the thread that serves it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from ..figures import METRICS
from ..optimizer import MemoryOptimizer
from .alerts import AlertMonitor, alert_rows
from .snapshot import take_snapshot

if TYPE_CHECKING:
    from prometheus_client.core import Metric
    from prometheus_client.registry import CollectorRegistry

NAMESPACE = "qwen3vl_mem"
"""Prefix of all metric names."""

_Samples = Iterable[tuple[tuple[str, ...], float | int | None]]
_Read = Callable[[Mapping[str, Any]], _Samples]


def _one(*path: str) -> _Read:
    """Return a reader of one unlabelled value."""

    def read(snapshot: Mapping[str, Any]) -> _Samples:
        value: Any = snapshot
        for key in path:
            value = None if value is None else value[key]
        return [((), value)]

    return read


def _each(column: str, *path: str) -> _Read:
    """Return a reader of one column of a table; row names are labels."""

    def read(snapshot: Mapping[str, Any]) -> _Samples:
        table: Any = snapshot
        for key in path:
            table = {} if table is None else table[key]
        return [((name,), row[column]) for name, row in (table or {}).items() if row is not None]

    return read


def _memory(snapshot: Mapping[str, Any]) -> _Samples:
    return [((row["tier"], row["kind"], row["codec"]), row["bytes"]) for row in snapshot["memory_map"]]


def _accounts(snapshot: Mapping[str, Any]) -> _Samples:
    return [((owner,), n_bytes) for owner, n_bytes in snapshot["budget"]["accounts_bytes"].items()]


def _requests(snapshot: Mapping[str, Any]) -> _Samples:
    cache = snapshot["cache"]
    return [((), None if cache is None else cache["hits"] + cache["misses"])]


def _alerts(snapshot: Mapping[str, Any]) -> _Samples:
    return [((row["name"],), int(row["active"])) for row in snapshot["alerts"]]


def _collector(snapshot: Mapping[str, Any]) -> _Samples:
    """Return the numeric counters of the collector."""
    return [
        ((name,), value)
        for name, value in (snapshot["gc"] or {}).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]


GAUGE, COUNTER = "gauge", "counter"
_LEVELS = ("cache", "levels")
FAMILIES: tuple[tuple[str, str, str, tuple[str, ...], _Read], ...] = (
    ("uptime_seconds", GAUGE, "Age of the optimizer.", (), _one("uptime_s")),
    ("process_resident_bytes", GAUGE, "Resident memory of the process.", (), _one("process", "rss_bytes")),
    ("process_cpu_seconds", COUNTER, "CPU seconds used by the process.", (), _one("process", "cpu_s")),
    # --- allocation
    ("memory_bytes", GAUGE, "Encoded bytes per tier, kind and codec.", ("tier", "kind", "codec"), _memory),
    ("account_bytes", GAUGE, "Budget bytes held per owner.", ("owner",), _accounts),
    ("capacity_bytes", GAUGE, "Memory budget, or the machine's memory.", (), _one("budget", "capacity_bytes")),
    ("undroppable_bytes", GAUGE, "Non-evictable memory.", (), _one("budget", "undroppable_bytes")),
    ("undroppable_ratio", GAUGE, "Non-evictable share of the capacity.", (), _one("budget", "undroppable_share")),
    ("frames_used_bytes", GAUGE, "Page frames in use.", (), _one("budget", "frames_used_bytes")),
    ("frames_free_bytes", GAUGE, "Free page frames kept for reuse.", (), _one("budget", "frames_free_bytes")),
    ("frames_limit_bytes", GAUGE, "Page frame limit.", (), _one("budget", "frames_limit_bytes")),
    ("pressure_reliefs", COUNTER, "Times memory was released under pressure.", (), _one("budget", "pressure_reliefs")),
    ("pool_size_bytes", GAUGE, "Address space per pool.", ("pool",), _each("size_bytes", "pools")),
    ("pool_used_bytes", GAUGE, "Granted bytes per pool.", ("pool",), _each("used_bytes", "pools")),
    ("pool_utilization_ratio", GAUGE, "Granted bytes / pool size.", ("pool",), _each("utilization", "pools")),
    ("pool_allocations", COUNTER, "Allocations per pool.", ("pool",), _each("allocations", "pools")),
    (
        "pool_internal_fragmentation_ratio",
        GAUGE,
        "1 - requested bytes / granted bytes.",
        ("pool",),
        _each("internal_fragmentation", "pools"),
    ),
    (
        "pool_external_fragmentation_ratio",
        GAUGE,
        "1 - largest hole / free bytes.",
        ("pool",),
        _each("external_fragmentation", "pools"),
    ),
    ("fragmentation_ratio", GAUGE, "Highest external fragmentation of any pool.", (), _one("fragmentation")),
    ("tensors", GAUGE, "Managed tensors.", ("kind",), _each("tensors", "kinds")),
    ("births", COUNTER, "Runtime tensors created.", ("kind",), _each("births", "life_cycles")),
    ("deaths", COUNTER, "Runtime tensors freed.", ("kind",), _each("deaths", "life_cycles")),
    (
        "life_rounds",
        GAUGE,
        "Mean lifetime of freed tensors, in rounds.",
        ("kind",),
        _each("mean_rounds", "life_cycles"),
    ),
    ("sessions_open", GAUGE, "Open inference sessions.", (), _one("sessions_open")),
    # --- paging
    ("page_hits", COUNTER, "Page accesses served from memory.", (), _one("paging", "hits")),
    ("page_misses", COUNTER, "Page accesses served by a new read.", (), _one("paging", "misses")),
    ("page_faults", COUNTER, "Misses that waited for a read.", (), _one("paging", "faults")),
    ("stall_seconds", COUNTER, "Stall time waiting for pages.", (), _one("paging", "stall_s")),
    ("read_bytes", COUNTER, "Bytes read from the SSD.", (), _one("paging", "bytes_read")),
    ("written_bytes", COUNTER, "Bytes written to the swap file.", (), _one("paging", "bytes_written")),
    ("page_migrations", COUNTER, "Pages moved between tiers.", (), _one("migrations", "pages")),
    ("prefetches", COUNTER, "Pages prefetched.", (), _one("paging", "prefetches")),
    ("prefetches_used", COUNTER, "Prefetched pages used before eviction.", (), _one("paging", "prefetches_used")),
    # --- cache
    ("cache_requests", COUNTER, "Cache lookups, all levels.", (), _requests),
    ("cache_request_hits", COUNTER, "Cache lookups that hit any level.", (), _one("cache", "hits")),
    ("cache_saved_seconds", COUNTER, "Compute seconds saved by hits.", (), _one("cache", "saved_s")),
    ("cache_hits", COUNTER, "Hits per level.", ("level",), _each("hits", *_LEVELS)),
    ("cache_misses", COUNTER, "Misses per level.", ("level",), _each("misses", *_LEVELS)),
    ("cache_migrations", COUNTER, "Entries moved in from another level.", ("level",), _each("migrations", *_LEVELS)),
    ("cache_used_bytes", GAUGE, "Bytes used per level.", ("level",), _each("used_bytes", *_LEVELS)),
    (
        "cache_prediction_efficiency_ratio",
        GAUGE,
        "Share of entries admitted to a level that were hit there later.",
        ("level",),
        _each("prediction_efficiency", *_LEVELS),
    ),
    # --- compression
    ("kind_compression_ratio", GAUGE, "Original / encoded bytes.", ("kind",), _each("compression_ratio", "kinds")),
    ("kind_relative_error", GAUGE, "Mean relative error.", ("kind",), _each("relative_error", "kinds")),
    ("encode_bytes_per_second", GAUGE, "Encoding speed.", ("kind",), _each("encode_bytes_per_s", "kinds")),
    ("decode_bytes_per_second", GAUGE, "Decoding speed.", ("kind",), _each("decode_bytes_per_s", "kinds")),
    ("encodes", COUNTER, "Encodings in this process.", ("kind",), _each("encodes", "kinds")),
    # --- responses
    ("responses", COUNTER, "Responses: generations and single forward passes.", (), _one("responses", "count")),
    ("tokens", COUNTER, "Generated tokens.", (), _one("responses", "tokens")),
    ("response_seconds", COUNTER, "Wall time of responses.", (), _one("responses", "seconds")),
    ("current_response_seconds", GAUGE, "Time of the last or current response.", (), _one("responses", "current_s")),
    (
        "tokens_per_second",
        GAUGE,
        "Decode speed per sequence, after the first token.",
        (),
        _one("responses", "tokens_per_s"),
    ),
    ("first_token_seconds", GAUGE, "Mean time to first token.", (), _one("responses", "first_token_s")),
    # --- the rest
    ("gc_stat", GAUGE, "Collector statistics by name.", ("stat",), _collector),
    ("alert_active", GAUGE, "1 while an alert is active.", ("alert",), _alerts),
    *((name, GAUGE, f"Section 7.1: {name}.", (), _one("metrics", name)) for name in METRICS),
)
"""Name, type, help, labels and snapshot reader of each metric. Counters get the suffix `_total`."""


class MetricsExporter:
    """A `prometheus_client` collector of snapshots.

    Args:
        optimizer: the optimizer to export; held by a weak reference.
        registry: registry to join; default: a new one.
        monitor: evaluates alerts at each scrape.

    Attributes:
        registry: the registry that holds this collector.
        url: address of the metrics once they are served.

    Raises:
        ConfigurationError: `prometheus-client` is not installed.
    """

    def __init__(
        self,
        optimizer: MemoryOptimizer,
        *,
        registry: CollectorRegistry | None = None,
        monitor: AlertMonitor | None = None,
    ) -> None:
        try:
            from prometheus_client import CollectorRegistry
        except ImportError as error:
            raise ConfigurationError(
                "the exporter needs prometheus-client: pip install 'qwen3-vl-memory-optimizations[monitoring]'"
            ) from error
        self.registry = CollectorRegistry() if registry is None else registry
        self.monitor = monitor or AlertMonitor()
        self.url: str | None = None
        self._optimizer = weakref.ref(optimizer)
        self._stop: Callable[[], None] | None = None
        self.registry.register(self)

    def describe(self) -> Iterator[Metric]:
        """Yield the metric families without samples; `prometheus_client` uses them to detect name clashes."""
        yield from _families(None)

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families of a new snapshot; `None` values have no sample."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        snapshot = take_snapshot(optimizer)
        snapshot["alerts"] = alert_rows(self.monitor.evaluate(snapshot))
        yield from _families(snapshot)

    def serve(self, port: int, *, address: str = "127.0.0.1") -> str:
        """Serve metrics over HTTP from a thread until `close`; return the URL.

        Args:
            port: port to listen on; 0 for any free port.
            address: address to listen on; the default is reachable from this machine only.

        Raises:
            ConfigurationError: metrics are already served, or the port is in use.
        """
        from prometheus_client import start_http_server

        if self._stop is not None:
            raise ConfigurationError(f"metrics are already served at {self.url}; close this exporter first")
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer.figures.measure()  # scrapes take no measurements
        try:
            server, thread = start_http_server(port, addr=address, registry=self.registry)
        except OSError as error:
            raise ConfigurationError(
                f"metrics: cannot use port {port}: {error.strerror}; choose another, or 0 for any free port"
            ) from error
        self.url = f"http://{address}:{server.server_port}/metrics"

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._stop = stop
        return self.url

    def close(self) -> None:
        """Stop serving and leave the registry."""
        if self._stop is not None:
            self._stop()
            self._stop = None
        self.registry.unregister(self)

    def __enter__(self) -> MetricsExporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _families(snapshot: Mapping[str, Any] | None) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    for name, sort, text, labels, read in FAMILIES:
        family = (GaugeMetricFamily if sort == GAUGE else CounterMetricFamily)(
            f"{NAMESPACE}_{name}", text, labels=labels
        )
        for values, figure in () if snapshot is None else read(snapshot):
            if figure is not None:
                family.add_metric(values, figure)
        yield family


def exported_names() -> set[str]:
    """Return the names of all series as Prometheus stores them."""
    return {f"{NAMESPACE}_{name}{'_total' if sort == COUNTER else ''}" for name, sort, *_ in FAMILIES}
