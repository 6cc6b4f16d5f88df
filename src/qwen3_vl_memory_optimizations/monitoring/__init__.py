"""What happens inside an optimizer, shown: snapshots, metrics, alerts, and an exporter for Prometheus."""

from .alerts import ALERTS, Alert, AlertLimits, AlertMonitor, AlertWatch, alert_rows
from .exporter import MetricsExporter, exported_names
from .metrics import get_memory_performance_metrics
from .snapshot import take_snapshot

__all__ = [
    "ALERTS",
    "Alert",
    "AlertLimits",
    "AlertMonitor",
    "AlertWatch",
    "MetricsExporter",
    "alert_rows",
    "exported_names",
    "get_memory_performance_metrics",
    "take_snapshot",
]
