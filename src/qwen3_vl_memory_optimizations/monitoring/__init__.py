"""Monitoring of an optimizer: snapshots, metrics, alerts, a Prometheus exporter, recorded runs and a dashboard."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .alerts import ALERTS, Alert, AlertLimits, AlertMonitor, AlertWatch, alert_rows
    from .dashboard import Dashboard, start_dashboard
    from .metrics import get_memory_performance_metrics
    from .prometheus import MetricsExporter, exported_names
    from .recording.recorder import Recorder
    from .rendering.report import write_report
    from .snapshot import take_snapshot

# Lazy, so that viewing a recorded run does not import torch.
_LAZY = {
    "ALERTS": ".alerts",
    "Alert": ".alerts",
    "AlertLimits": ".alerts",
    "AlertMonitor": ".alerts",
    "AlertWatch": ".alerts",
    "Dashboard": ".dashboard",
    "MetricsExporter": ".prometheus",
    "Recorder": ".recording.recorder",
    "alert_rows": ".alerts",
    "exported_names": ".prometheus",
    "get_memory_performance_metrics": ".metrics",
    "start_dashboard": ".dashboard",
    "take_snapshot": ".snapshot",
    "write_report": ".rendering.report",
}

__all__ = [
    "ALERTS",
    "Alert",
    "AlertLimits",
    "AlertMonitor",
    "AlertWatch",
    "Dashboard",
    "MetricsExporter",
    "Recorder",
    "alert_rows",
    "exported_names",
    "get_memory_performance_metrics",
    "start_dashboard",
    "take_snapshot",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
