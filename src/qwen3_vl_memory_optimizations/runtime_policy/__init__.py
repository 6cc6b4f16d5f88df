"""Eviction and prefetching of runtime tensors."""

from ..prediction import LightweightMLPredictor
from .algorithm import SwappingAlgorithm
from .predictive import PredictiveSwappingAlgorithm
from .recency import ClockSwappingAlgorithm, LRUSwappingAlgorithm
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
    "ShadowLRU",
    "SwappingAlgorithm",
    "create_swapping_algorithm",
    "tier_memory",
]
