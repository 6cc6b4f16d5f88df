"""The metrics of section 7.1, counted or measured on this machine."""

from .figures import MemoryFigures, Occupancy
from .measured import Reading, allocation_speedup, memory_bandwidth, read_bandwidth, read_rates
from .metrics import METRICS, MemoryMetrics
from .verdict import Verdict, judge, tokens_per_s_with

__all__ = [
    "METRICS",
    "MemoryFigures",
    "MemoryMetrics",
    "Occupancy",
    "Reading",
    "Verdict",
    "allocation_speedup",
    "judge",
    "memory_bandwidth",
    "read_bandwidth",
    "read_rates",
    "tokens_per_s_with",
]
