"""Alerts (section 7.3): each fires once its condition has held for a while, and clears at a separate bound.

A breach of `ram_budget` fires at once and stays.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ConfigurationError
from ..optimizer import MemoryOptimizer
from ..periodic import Periodic
from .rendering.formatting import breach_text
from .snapshot import take_snapshot

logger = logging.getLogger(__name__)

ALERTS = ("cache_hit_rate", "fragmentation", "response_time", "memory", "budget")
"""The names of the alerts."""

_PERIOD_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertLimits:
    """Limits at which alerts fire and clear.

    Attributes:
        hit_rate, hit_rate_clear: result-cache hit rate over `window_s`, if that has at least `least_lookups` lookups.
        fragmentation, fragmentation_clear: see `MemoryFigures.fragmentation`.
        response_s, response_clear_s: time of the last or current response; `None`: no limit, and 0.9 of it.
        memory, memory_clear: non-evictable share of the capacity, see `MemoryFigures.occupancy`.
        hold_s: how long a condition must hold before its alert fires or clears.
        window_s: window for hit rates.
        least_lookups: with fewer lookups, the hit rate is unknown.

    Raises:
        ConfigurationError: a clear bound on the wrong side of its limit, or a time out of range.
    """

    hit_rate: float = 0.70
    hit_rate_clear: float = 0.75
    fragmentation: float = 0.40
    fragmentation_clear: float = 0.35
    response_s: float | None = None
    response_clear_s: float | None = None
    memory: float = 0.80
    memory_clear: float = 0.75
    hold_s: float = 10.0
    window_s: float = 300.0
    least_lookups: int = 20

    def __post_init__(self) -> None:
        if self.hit_rate_clear < self.hit_rate:
            raise ConfigurationError(
                f"hit_rate_clear: {self.hit_rate_clear} must not be below hit_rate, {self.hit_rate}"
            )
        for name in ("fragmentation", "response", "memory"):
            unit = "_s" if name == "response" else ""
            limit, clear = getattr(self, name + unit), getattr(self, f"{name}_clear{unit}")
            if limit is not None and clear is not None and clear > limit:
                raise ConfigurationError(f"{name}_clear{unit}: {clear} must not be above {name}{unit}, {limit}")
        if self.hold_s < 0 or self.window_s <= 0:
            raise ConfigurationError(
                f"hold_s: {self.hold_s} s must not be negative, and window_s: {self.window_s} s must be positive"
            )


@dataclass(frozen=True, slots=True)
class Alert:
    """The state of one alert.

    Attributes:
        active: whether it has fired and not cleared.
        value: the current value; `None`: unknown, so the alert cannot fire.
        limit: the value beyond which it fires; `None`: no limit is set.
        since_s: time in the current state; `None`: since the start.
        message: readable text.
    """

    name: str
    active: bool
    value: float | None
    limit: float | None
    since_s: float | None
    message: str


@dataclass(slots=True)
class _State:
    active: bool = False
    changed_s: float | None = None
    turning_s: float | None = None
    """When the value crossed to the other side."""


class AlertMonitor:
    """Decides from snapshots which alerts are active. Thread-safe.

    Args:
        limits: when they fire and clear.
        on_change: called without locks for each alert that fires or clears; its exceptions are logged.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        limits: AlertLimits | None = None,
        *,
        on_change: Callable[[Alert], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits or AlertLimits()
        self._on_change = on_change
        self._clock = clock
        self._lock = threading.Lock()
        self._states = {name: _State() for name in ALERTS}
        self._lookups: deque[tuple[float, int, int]] = deque()  # time, hits, lookups

    def evaluate(self, snapshot: Mapping[str, Any]) -> list[Alert]:
        """Return all alerts for a snapshot; log those that fire or clear, and pass them to `on_change`."""
        with self._lock:
            now_s, limits = self._clock(), self.limits
            hit_rate = self._hit_rate(snapshot["cache"], now_s)
            memory, response_s = snapshot["budget"]["undroppable_share"], snapshot["responses"]["current_s"]
            fragmentation, response_clear_s = snapshot["fragmentation"], limits.response_clear_s
            if response_clear_s is None and limits.response_s is not None:
                response_clear_s = 0.9 * limits.response_s
            judged = [
                self._judge("cache_hit_rate", hit_rate, limits.hit_rate, limits.hit_rate_clear, now_s, below=True),
                self._judge("fragmentation", fragmentation, limits.fragmentation, limits.fragmentation_clear, now_s),
                self._judge("response_time", response_s, limits.response_s, response_clear_s, now_s),
                self._judge("memory", memory, limits.memory, limits.memory_clear, now_s),
                self._judge_budget(snapshot["budget"], now_s),
            ]
        for alert, changed in judged:
            if changed:
                self._tell(alert)
        return [alert for alert, _ in judged]

    def _judge(
        self,
        name: str,
        value: float | None,
        limit: float | None,
        clear: float | None,
        now_s: float,
        below: bool = False,
    ) -> tuple[Alert, bool]:
        """Return an alert, and whether it changed.

        Args:
            name: name of the alert.
            value: current value.
            limit: value beyond which it fires.
            clear: bound at which it clears.
            now_s: current time.
            below: whether it fires below the limit.
        """
        state = self._states[name]
        bound = clear if state.active else limit
        beyond = value is not None and bound is not None and (value < bound if below else value > bound)
        changed = False
        if beyond == state.active:
            state.turning_s = None
        else:
            state.turning_s = now_s if state.turning_s is None else state.turning_s
            changed = now_s - state.turning_s >= self.limits.hold_s
        if changed:
            state.active, state.changed_s, state.turning_s = not state.active, now_s, None
        since_s = None if state.changed_s is None else now_s - state.changed_s
        side = "below" if below else "above"
        message = f"{name} {'fires' if state.active else 'is clear'}: " + (
            "unknown" if value is None else f"{value:.3g}"
        )
        if limit is not None:
            message += f" (fires {side} {limit:g}, clears at {clear:g})"
        return Alert(name, state.active, value, limit, since_s, message), changed

    def _judge_budget(self, budget: Mapping[str, Any], now_s: float) -> tuple[Alert, bool]:
        """Return the alert of a breach, which stays one, and whether it changed."""
        state = self._states["budget"]
        peak_bytes, limit_bytes = budget["peak_bytes"], budget["ram_budget_bytes"]
        text = breach_text(peak_bytes, limit_bytes)
        changed = text is not None and not state.active
        if changed:
            state.active, state.changed_s = True, now_s
        since_s = None if state.changed_s is None else now_s - state.changed_s
        value = None if limit_bytes is None else peak_bytes / limit_bytes
        message = f"budget {'fires' if state.active else 'is clear'}"
        message += f": {text}" if text else "" if value is None else f": peak {value:.3g} of the budget"
        return Alert("budget", state.active, value, None if limit_bytes is None else 1.0, since_s, message), changed

    def _hit_rate(self, cache: Mapping[str, Any] | None, now_s: float) -> float | None:
        """Return the hit rate over the window; `None`: too few lookups."""
        if cache is None:
            return None
        seen = self._lookups
        if not seen:
            seen.append((now_s - self.limits.window_s, 0, 0))  # start of the run
        seen.append((now_s, cache["hits"], cache["hits"] + cache["misses"]))
        while len(seen) > 2 and seen[1][0] <= now_s - self.limits.window_s:
            seen.popleft()
        lookups = seen[-1][2] - seen[0][2]
        return (seen[-1][1] - seen[0][1]) / lookups if lookups >= max(1, self.limits.least_lookups) else None

    def _tell(self, alert: Alert) -> None:
        logger.log(logging.WARNING if alert.active else logging.INFO, "alert %s", alert.message)
        if self._on_change is not None:
            try:
                self._on_change(alert)
            except Exception:  # a failing callback must not stop the monitor
                logger.exception("the callback of alert %s failed", alert.name)


class AlertWatch:
    """Thread that evaluates the alerts of an optimizer every two seconds until the optimizer or `close` ends it.

    Args:
        optimizer: the optimizer to watch.
        monitor: evaluates the alerts.
        period_s: seconds between evaluations.
    """

    def __init__(self, optimizer: MemoryOptimizer, monitor: AlertMonitor, period_s: float = _PERIOD_S) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._monitor = monitor
        self._periodic = Periodic(self._look, period_s, "memory-alerts")
        self._periodic.start()

    def _look(self) -> bool:
        optimizer = self._optimizer()
        if optimizer is not None:
            self._monitor.evaluate(take_snapshot(optimizer))
        return optimizer is not None

    def close(self) -> None:
        """Stop the thread."""
        self._periodic.close()

    def __enter__(self) -> AlertWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def alert_rows(alerts: list[Alert]) -> list[dict[str, Any]]:
    """Return alerts in the form of the `alerts` key of a snapshot."""
    return [asdict(alert) for alert in alerts]
