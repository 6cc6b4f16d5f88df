"""`MemorySwappingSystem`: the algorithms by name, and the one that a Pager asks which runtime tensors leave first."""

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
    """Return a new algorithm.

    Raises:
        ConfigurationError: none has this name.
    """
    if name not in ALGORITHMS:
        near = difflib.get_close_matches(name, ALGORITHMS, n=1, cutoff=0.0)[0]
        raise ConfigurationError(f"swap_algorithm: {name!r} is not one of {', '.join(ALGORITHMS)}; meant {near!r}?")
    return ALGORITHMS[name]()


class MemorySwappingSystem:
    """What leaves memory, and from when on (specification 2.4).

    Weights follow their schedule and leave by that. Runtime tensors leave in the order of `algorithm`. Where they alone
    fill more than `memory_pressure_threshold` of the memory for managed tensors, `look` swaps some out before anybody
    waits for the room; `PressureMonitor` calls it.

    Args:
        memory_pressure_threshold: share of the memory, above 0 and at most 1.
        algorithm: name of the one that decides.

    Attributes:
        swapping_algorithms: name -> algorithm.
        swapped_ahead_bytes: what left before it had to.

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
        """Share of the memory above which runtime tensors leave ahead of need."""
        return self._memory_pressure_threshold

    @memory_pressure_threshold.setter
    def memory_pressure_threshold(self, share: float) -> None:
        if not 0 < share <= 1:
            raise ConfigurationError(f"memory_pressure_threshold: {share!r} is outside (0, 1]")
        self._memory_pressure_threshold = share

    def look(self, pager: Pager) -> None:
        """Let runtime tensors leave as far as they fill more than the threshold."""
        self.swapped_ahead_bytes += pager.runtime.swap_ahead(self.memory_pressure_threshold)
