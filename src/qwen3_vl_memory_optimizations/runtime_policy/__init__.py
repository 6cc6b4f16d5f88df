"""Which runtime tensors leave memory first, and which come back before they are used."""

from ..prediction import LightweightMLPredictor
from .algorithm import SwappingAlgorithm
from .predictive import PredictiveSwappingAlgorithm
from .recency import ClockSwappingAlgorithm, LRUSwappingAlgorithm
from .replay import Replayed, Trace, TraceRecorder, replay, replay_belady
from .shadow_lru import ShadowLRU
from .swapping import ALGORITHMS, MemorySwappingSystem, create_swapping_algorithm
from .tiering import MemoryTieringSystem, tier_memory

__all__ = [
    "ALGORITHMS",
    "ClockSwappingAlgorithm",
    "LRUSwappingAlgorithm",
    "LightweightMLPredictor",
    "MemorySwappingSystem",
    "MemoryTieringSystem",
    "PredictiveSwappingAlgorithm",
    "Replayed",
    "ShadowLRU",
    "SwappingAlgorithm",
    "Trace",
    "TraceRecorder",
    "create_swapping_algorithm",
    "replay",
    "replay_belady",
    "tier_memory",
]
