"""Settings that may change while a model runs, with their bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..cache import CPUCache, HierarchicalCacheSystem
from ..errors import ConfigurationError
from ..paging import PAGE_BYTES, Compactor, Pager
from ..runtime_policy import MemorySwappingSystem, MemoryTieringSystem

LEAST_L2_BYTES = 1 << 20
MOST_READ_AHEAD_BYTES = 64 * PAGE_BYTES
COMPACTION_BOUNDS_S = (0.5, 300.0)
MIGRATION_BOUNDS_S = (0.05, 10.0)
PRESSURE_BOUNDS = (0.3, 0.95)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A setting that may change at run time.

    Attributes:
        name: configuration key, if it has one.
        unit: `bytes`, `s` or `share`.
        least, most: bounds.
        read: returns the current value.
        write: sets the value.
    """

    name: str
    unit: str
    least: float
    most: float
    read: Callable[[], float]
    write: Callable[[float], None]

    def clamped(self, value: float) -> float:
        """Return the nearest value within the bounds; bytes are rounded down."""
        value = min(max(value, self.least), self.most)
        return int(value) if self.unit == "bytes" else value

    def set(self, value: float) -> None:
        """Set the value.

        Raises:
            ConfigurationError: outside the bounds; nothing was changed.
        """
        if not self.least <= value <= self.most:
            raise ConfigurationError(
                f"{self.name}: {value:g} {self.unit} is outside {self.least:g} to {self.most:g} {self.unit}"
            )
        self.write(value)


def live_parameters(
    pager: Pager,
    *,
    cache: HierarchicalCacheSystem | None = None,
    most_l2_bytes: int = 0,
    tiering: MemoryTieringSystem | None = None,
    swapping: MemorySwappingSystem | None = None,
    compactor: Compactor | None = None,
) -> dict[str, Parameter]:
    """Return the parameters of the given parts by name.

    Args:
        pager: provides `read_ahead_bytes`, if it has a budget.
        cache: provides `l2_cache_size`.
        most_l2_bytes: upper bound of `l2_cache_size`, raised to its current value.
        tiering: provides `tier_migration_interval`, once started.
        swapping: provides `swap_pressure_threshold`.
        compactor: provides `pool_compaction_interval`.
    """
    found: list[Parameter] = []
    if pager.ledger.limited:
        found.append(
            Parameter(
                "read_ahead_bytes",
                "bytes",
                PAGE_BYTES,
                MOST_READ_AHEAD_BYTES,
                lambda: pager.read_ahead_bytes,
                lambda value: pager.set_read_ahead(int(value)),
            )
        )
    if cache is not None and cache.l2_cache is not None:
        found.append(_l2_cache_size(cache.l2_cache, most_l2_bytes))
    if tiering is not None and tiering.interval_s is not None:
        start_s = tiering.interval_s
        found.append(
            _interval("tier_migration_interval", MIGRATION_BOUNDS_S, lambda: tiering.interval_s or start_s,
                      tiering.set_interval)
        )  # fmt: skip
    if compactor is not None:
        found.append(
            _interval("pool_compaction_interval", COMPACTION_BOUNDS_S, lambda: compactor.interval_s,
                      lambda value: setattr(compactor, "interval_s", value))
        )  # fmt: skip
    if swapping is not None:
        least, most = PRESSURE_BOUNDS
        share = swapping.memory_pressure_threshold
        found.append(
            Parameter(
                "swap_pressure_threshold",
                "share",
                min(least, share),
                max(most, share),
                lambda: swapping.memory_pressure_threshold,
                lambda value: setattr(swapping, "memory_pressure_threshold", value),
            )
        )
    return {each.name: each for each in found}


def _l2_cache_size(level: CPUCache, most_bytes: int) -> Parameter:
    start = level.size_bytes
    least, most = min(LEAST_L2_BYTES, start), max(most_bytes, start)
    return Parameter(
        "l2_cache_size", "bytes", least, most, lambda: level.size_bytes, lambda value: level.resize(int(value))
    )


def _interval(
    name: str, bounds_s: tuple[float, float], read: Callable[[], float], write: Callable[[float], None]
) -> Parameter:
    """Return an interval parameter; its bounds include the current value."""
    start = read()
    return Parameter(name, "s", min(bounds_s[0], start), max(bounds_s[1], start), read, write)
