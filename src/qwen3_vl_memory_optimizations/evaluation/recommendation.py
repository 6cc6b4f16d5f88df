"""`recommend`: the smallest evaluated codec that keeps the predictions of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .codecs import CodecResult
from .comparison import AccuracyImpact

LEAST_AGREEMENT = 0.98
MOST_PERPLEXITY_RATIO = 1.02
MOST_ACCURACY_LOSS = 0.01
MOST_LAYER_ERROR = 0.05
"""Decides where predictions are few: a codec can keep eight of them by chance."""
_SAME_SIZE = 1.01


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What to use.

    Attributes:
        codec: its name; `none` if no evaluated codec keeps the predictions.
        text: the recommendation as one line, with its numbers.
    """

    codec: str
    text: str


def recommend(results: Sequence[CodecResult]) -> Recommendation:
    """Return the smallest codec that keeps the predictions in every task; of two equal in size, the nearer one.

    A codec keeps them if it has the same first choice in 98 % of them, at most 2 % more perplexity, at most one point
    less accuracy, and at most 5 % of relative error in the output of any layer.
    """
    good = [result for result in results if result.codec != "none" and all(map(_keeps, result.impacts.values()))]
    if not good:
        names = ", ".join(result.codec for result in results)
        text = (
            f"Use none: {names} did not keep the predictions (first choice the same in {_percent(LEAST_AGREEMENT)}, "
            f"perplexity at most +{_percent(MOST_PERPLEXITY_RATIO - 1)}, "
            f"layer error at most {_percent(MOST_LAYER_ERROR)})."
        )
        return Recommendation("none", text)
    least_bytes = min(result.weight_bytes for result in good)
    chosen = min((each for each in good if each.weight_bytes <= least_bytes * _SAME_SIZE), key=_distance)
    agreement = min(impact["top1_agreement"] for impact in chosen.impacts.values())
    ratio = max(map(_perplexity_ratio, chosen.impacts.values()))
    n_predictions = sum(impact.n_positions for impact in chosen.impacts.values())
    text = (
        f"Use {chosen.codec}: {_percent(chosen.share_of_half)} of the bytes of 16 bits; first choice the same in "
        f"{_percent(agreement)} of {n_predictions:,} predictions, perplexity {100 * (ratio - 1):+.2f} %"
    )
    smaller = [each for each in results if each.weight_bytes * _SAME_SIZE < chosen.weight_bytes]
    if smaller:
        least = min(smaller, key=lambda each: each.weight_bytes)
        text += f". Where it does not fit, {least.codec} has {_percent(least.share_of_half)}, and is less exact"
    return Recommendation(chosen.codec, text + ".")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _keeps(impact: AccuracyImpact) -> bool:
    lost = impact.baseline["accuracy"] - impact.optimized["accuracy"]
    return (
        impact["top1_agreement"] >= LEAST_AGREEMENT
        and _perplexity_ratio(impact) <= MOST_PERPLEXITY_RATIO
        and lost <= MOST_ACCURACY_LOSS
        and impact.get("layer_relative_error", 0.0) <= MOST_LAYER_ERROR
    )


def _perplexity_ratio(impact: AccuracyImpact) -> float:
    before, after = impact.baseline["perplexity"], impact.optimized["perplexity"]
    return 1.0 if before == after else after / before if before else math.inf


def _distance(result: CodecResult) -> float:
    return max(impact["kl_divergence"] for impact in result.impacts.values())
