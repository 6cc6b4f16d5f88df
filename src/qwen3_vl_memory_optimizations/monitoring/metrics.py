"""`get_memory_performance_metrics` (section 7.1)."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigurationError
from ..optimizer import MemoryOptimizer


def get_memory_performance_metrics(model: Any) -> dict[str, float | int | None]:
    """Return the figures of section 7.1 of an optimized model, by their keys; `None`: not measurable, or not yet.

    The first call measures memory bandwidth and allocations, in 0.3 s. `docs/metrics.md` defines each figure.

    Args:
        model: has a `memory_optimizer`.

    Raises:
        ConfigurationError: it has none.
    """
    optimizer = getattr(model, "memory_optimizer", None)
    if not isinstance(optimizer, MemoryOptimizer):
        raise ConfigurationError(
            f"{type(model).__name__} is not an optimized model: create_optimized_model makes one of it"
        )
    return optimizer.figures.metrics()
