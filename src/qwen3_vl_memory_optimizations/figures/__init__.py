"""The metrics of section 7.1, counted or measured on this machine."""

from .figures import METRICS, CollectorFigures, MemoryFigures, Occupancy
from .measured import allocation_speedup, best_seconds, memory_bandwidth
from .methods import FigureMethods

__all__ = [
    "METRICS",
    "CollectorFigures",
    "FigureMethods",
    "MemoryFigures",
    "Occupancy",
    "allocation_speedup",
    "best_seconds",
    "memory_bandwidth",
]
