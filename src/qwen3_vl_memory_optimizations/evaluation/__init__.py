"""What an optimisation costs in accuracy: metrics, comparison of two models, data to measure on."""

from .codecs import CodecResult, Task, evaluate_codecs
from .comparison import AccuracyImpact, evaluate_accuracy_impact, score
from .data import ImageQuestion, QuestionBatches, text_windows
from .metrics import ScoredOutput, calculate_metrics

__all__ = [
    "AccuracyImpact",
    "CodecResult",
    "ImageQuestion",
    "QuestionBatches",
    "ScoredOutput",
    "Task",
    "calculate_metrics",
    "evaluate_accuracy_impact",
    "evaluate_codecs",
    "score",
    "text_windows",
]
