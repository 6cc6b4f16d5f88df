"""Tuning of settings while a model runs: by the rules of section 8.2, or by trials."""

from .auto import AutoTuner
from .climb import Change, Climber, Decision, Knob
from .parameters import Parameter, live_parameters
from .usage import COMPACTION_FRAGMENTATION, LOW_HIT_RATE, Adaptation, adapt_parameters_based_on_usage

__all__ = [
    "COMPACTION_FRAGMENTATION",
    "LOW_HIT_RATE",
    "Adaptation",
    "AutoTuner",
    "Change",
    "Climber",
    "Decision",
    "Knob",
    "Parameter",
    "adapt_parameters_based_on_usage",
    "live_parameters",
]
