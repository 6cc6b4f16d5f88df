"""`get_memory_performance_metrics` (section 7.1)."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigurationError
from ..optimizer import MemoryOptimizer


def get_memory_performance_metrics(model: Any) -> dict[str, float | int | None]:
    """Return the section 7.1 metrics of an optimized model by key; `None`: not measurable, or not measured yet.

    The first call takes 0.3 s to measure memory bandwidth and allocations. `docs/metrics.md` defines each metric.

    Args:
        model: a model with a `memory_optimizer`.

    Raises:
        ConfigurationError: the model has none.
    """
    optimizer = getattr(model, "memory_optimizer", None)
    if not isinstance(optimizer, MemoryOptimizer):
        raise ConfigurationError(
            f"{type(model).__name__} is not an optimized model; make one with create_optimized_model"
        )
    return optimizer.metrics()
