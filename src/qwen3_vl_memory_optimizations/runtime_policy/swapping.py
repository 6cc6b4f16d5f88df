"""`MemorySwappingSystem`: the swapping algorithms by name, and the one that chooses a Pager's eviction victims."""

from __future__ import annotations

import difflib

from ..errors import ConfigurationError
from ..paging import Pager
from .algorithm import SwappingAlgorithm
from .predictive import PredictiveSwappingAlgorithm
from .recency import ClockSwappingAlgorithm, LRUSwappingAlgorithm

ALGORITHMS: dict[str, type[SwappingAlgorithm]] = {
    each.name: each for each in (LRUSwappingAlgorithm, ClockSwappingAlgorithm, PredictiveSwappingAlgorithm)
}


def create_swapping_algorithm(name: str) -> SwappingAlgorithm:
    """Return a new algorithm by name.

    Raises:
        ConfigurationError: unknown name.
    """
    if name not in ALGORITHMS:
        near = difflib.get_close_matches(name, ALGORITHMS, n=1, cutoff=0.0)[0]
        raise ConfigurationError(
            f"swap_algorithm: {name!r} is not one of {', '.join(ALGORITHMS)}; did you mean {near!r}?"
        )
    return ALGORITHMS[name]()


class MemorySwappingSystem:
    """Decides which runtime tensors leave memory, and when (specification 2.4).

    Weights are evicted by their schedule, runtime tensors in the order of `algorithm`. When runtime tensors alone fill
    more than `memory_pressure_threshold` of the memory for managed tensors, `look` swaps some out ahead of demand;
    `PressureMonitor` calls it.

    Args:
        memory_pressure_threshold: share of the memory, above 0 and at most 1.
        algorithm: name of the algorithm that decides.

    Attributes:
        swapping_algorithms: name -> algorithm.
        swapped_ahead_bytes: bytes swapped out ahead of demand.

    Raises:
        ConfigurationError: a threshold outside its range, or an unknown algorithm.
    """

    def __init__(self, memory_pressure_threshold: float = 0.8, algorithm: str = "predictive") -> None:
        self.memory_pressure_threshold = memory_pressure_threshold
        self.swapping_algorithms = {name: create_swapping_algorithm(name) for name in ALGORITHMS}
        self.algorithm = create_swapping_algorithm(algorithm)
        self.swapping_algorithms[algorithm] = self.algorithm
        self.swapped_ahead_bytes = 0

    @property
    def memory_pressure_threshold(self) -> float:
        """Share of memory above which runtime tensors are swapped out ahead of demand."""
        return self._memory_pressure_threshold

    @memory_pressure_threshold.setter
    def memory_pressure_threshold(self, share: float) -> None:
        if not 0 < share <= 1:
            raise ConfigurationError(f"memory_pressure_threshold: {share!r} is outside (0, 1]")
        self._memory_pressure_threshold = share

    def look(self, pager: Pager) -> None:
        """Swap out runtime tensors until they fill no more than the threshold."""
        self.swapped_ahead_bytes += pager.runtime.swap_ahead(self.memory_pressure_threshold)
