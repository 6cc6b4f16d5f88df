"""`adapt_parameters_based_on_usage`: the two rules of section 8.2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import MemoryConfig
from ..errors import ConfigurationError, format_bytes
from .parameters import COMPACTION_BOUNDS_S, Parameter

LOW_HIT_RATE = 0.6
COMPACTION_FRAGMENTATION = 0.35
L2_GROWTH = 1.2
COMPACTION_SPEEDUP = 2.0


@dataclass(frozen=True, slots=True)
class Adaptation:
    """A setting that was changed or, if `applied` is `False`, should be.

    Attributes:
        parameter: configuration key.
        before, after: values in `unit`.
        unit: `bytes` or `s`.
        why: the metric and the rule behind the change.
        applied: whether a live optimizer now uses `after`.
    """

    parameter: str
    before: float
    after: float
    unit: str
    why: str
    applied: bool


def adapt_parameters_based_on_usage(observed_metrics: Mapping[str, Any], target: Any = None) -> list[Adaptation]:
    """Adapt the L2 cache size and the pool compaction interval to observed metrics.

    - `cache_hit_rate` below 0.6: the L2 cache grows by a factor of 1.2, up to `l2_cache_max`.
    - `fragmentation` (share of pool memory without a tensor) above 0.35: `pool_compaction_interval` is halved, down to
      half a second.

    Args:
        observed_metrics: the two metrics, each a share from 0 to 1. Missing or `None` ones (not measurable yet) and
            other keys are ignored.
        target: the `MemoryOptimizer` to change, or a model with one (`.memory_optimizer`). Without a target, nothing
            changes and the list contains recommendations relative to the defaults of `MemoryConfig`.

    Returns:
        The changes with reasons; empty if no rule applies or all settings are at their bounds.

    Raises:
        ConfigurationError: a metric is not a share, or the target has no memory optimizer.
    """
    hit_rate, fragmentation = (_share(observed_metrics, name) for name in ("cache_hit_rate", "fragmentation"))
    applied, parameters = target is not None, _defaults() if target is None else _parameters_of(target)
    found: list[Adaptation] = []
    l2, interval = parameters.get("l2_cache_size"), parameters.get("pool_compaction_interval")
    if l2 is not None and hit_rate is not None and hit_rate < LOW_HIT_RATE:
        most = format_bytes(int(l2.most))
        why = f"cache_hit_rate {hit_rate:.2f} is below {LOW_HIT_RATE}: grown by a factor of {L2_GROWTH}, at most {most}"
        found += _moved(l2, l2.read() * L2_GROWTH, why, applied)
    if interval is not None and fragmentation is not None and fragmentation > COMPACTION_FRAGMENTATION:
        why = f"fragmentation {fragmentation:.2f} is above {COMPACTION_FRAGMENTATION}: compacted twice as often"
        found += _moved(interval, interval.read() / COMPACTION_SPEEDUP, why, applied)
    return found


def _moved(parameter: Parameter, wanted: float, why: str, applied: bool) -> list[Adaptation]:
    before, after = parameter.read(), parameter.clamped(wanted)
    if after == before:
        return []
    if applied:
        parameter.set(after)
    return [Adaptation(parameter.name, before, after, parameter.unit, why, applied)]


def _parameters_of(target: Any) -> Mapping[str, Parameter]:
    owner = getattr(target, "memory_optimizer", target)
    parameters = getattr(owner, "parameters", None)
    if not isinstance(parameters, Mapping):  # `parameters` of a torch model is a method
        raise ConfigurationError(
            f"{type(target).__name__} has no memory optimizer; make the model with create_optimized_model"
        )
    return parameters


def _defaults() -> dict[str, Parameter]:
    config = MemoryConfig()

    def fixed(name: str, unit: str, value: float, least: float, most: float) -> Parameter:
        return Parameter(name, unit, least, most, lambda: value, lambda value: None)

    return {
        "l2_cache_size": fixed("l2_cache_size", "bytes", config.l2_cache_size, 1, config.most_l2_bytes()),
        "pool_compaction_interval": fixed(
            "pool_compaction_interval", "s", config.pool_compaction_interval, *COMPACTION_BOUNDS_S
        ),
    }


def _share(metrics: Mapping[str, Any], name: str) -> float | None:
    value = metrics.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigurationError(f"{name}: expected a number from 0 to 1, got {value!r}")
    if not 0 <= value <= 1:
        raise ConfigurationError(f"{name}: {value!r} is outside [0, 1]")
    return float(value)
