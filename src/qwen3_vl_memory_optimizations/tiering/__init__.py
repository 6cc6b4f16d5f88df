"""Where runtime tensors lie, by when they are expected to be used."""

from ..prediction import LightweightMLPredictor
from .system import MemoryTieringSystem

__all__ = ["LightweightMLPredictor", "MemoryTieringSystem"]
