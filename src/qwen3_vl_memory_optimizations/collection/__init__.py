"""Predictive garbage collection: frees the memory of tensors not expected to be used again (specification 2.6)."""

from ..prediction import SimpleMLPredictor
from .collector import CollectionStats, PredictiveGarbageCollector
from .lifecycle import Leak, TensorLife, TensorLifecycleTracker
from .store import CollectableStore, Held, RuntimeStore

__all__ = [
    "CollectableStore",
    "CollectionStats",
    "Held",
    "Leak",
    "PredictiveGarbageCollector",
    "RuntimeStore",
    "SimpleMLPredictor",
    "TensorLife",
    "TensorLifecycleTracker",
]
