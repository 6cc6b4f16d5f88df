"""Where runtime tensors lie, by when they are expected to be used."""

from ..prediction import LightweightMLPredictor
from .system import MemoryTieringSystem, tier_memory

__all__ = ["LightweightMLPredictor", "MemoryTieringSystem", "tier_memory"]
