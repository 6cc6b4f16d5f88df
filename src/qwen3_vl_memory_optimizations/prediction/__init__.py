"""Access history -> next use. Pure functions of recorded events; no I/O, locks or clocks."""

from .cyclic_scan import choose_kept
from .lifetime import SimpleMLPredictor, Situation
from .mlp import LightweightMLPredictor
from .next_use import NextUse, UseHistory
from .reuse import UseCounts, choose_victims, worth
from .schedule import PassSchedule

__all__ = [
    "LightweightMLPredictor",
    "NextUse",
    "PassSchedule",
    "SimpleMLPredictor",
    "Situation",
    "UseCounts",
    "UseHistory",
    "choose_kept",
    "choose_victims",
    "worth",
]
