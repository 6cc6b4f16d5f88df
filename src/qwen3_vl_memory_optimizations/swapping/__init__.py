"""Which tensors leave memory first, and what a recorded run would have found in memory."""

from .base import SwappingAlgorithm
from .predictive import PredictiveSwappingAlgorithm
from .recency import ClockSwappingAlgorithm, LRUSwappingAlgorithm
from .replay import Replayed, Trace, TraceRecorder, replay, replay_belady
from .shadow import ShadowLRU
from .system import ALGORITHMS, MemorySwappingSystem, create_swapping_algorithm

__all__ = [
    "ALGORITHMS",
    "ClockSwappingAlgorithm",
    "LRUSwappingAlgorithm",
    "MemorySwappingSystem",
    "PredictiveSwappingAlgorithm",
    "Replayed",
    "ShadowLRU",
    "SwappingAlgorithm",
    "Trace",
    "TraceRecorder",
    "create_swapping_algorithm",
    "replay",
    "replay_belady",
]
