"""`SimpleMLPredictor`: the probability that an object is used again soon, learned from actual uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEATURES = ("like it", "idle", "uses", "age", "overdue", "rhythm", "bytes", "session open", "constant")
_EXAMPLES = 2048
_BATCH = 64
_LEAST_EXAMPLES = 16
_RATE, _BETA1, _BETA2, _EPSILON = 0.05, 0.9, 0.999, 1e-8
_MOST_OVERDUE = 4.0
_KEPT = 0.5 ** (1 / 256)
"""Decay per object of a sort: after 256 of them, an observation counts half."""
_PRIOR_WEIGHT = 2.0
"""Weight of the prior for a sort, as a number of objects."""


@dataclass(frozen=True, slots=True)
class Situation:
    """State of an object at prediction time; times in rounds.

    Attributes:
        idle: since its last use; age: since its creation; gap: mean between its uses, 0: used once.
        uses: number of uses.
        n_bytes: its size.
        creator: the code that created it; objects of one creator are expected to behave alike.
        session_open: whether the session it was created in is still open.
    """

    idle: int
    uses: int
    age: int
    gap: float
    n_bytes: int
    creator: str
    session_open: bool


class SimpleMLPredictor:
    """Logistic regression, trained with Adam on a ring of 2,048 examples; below 64 it is not `ready`.

    Args:
        seed: seed of sampling.

    Attributes:
        n_examples: examples seen so far.
    """

    def __init__(self, seed: int = 0) -> None:
        self._draw = np.random.default_rng(seed)
        n = len(FEATURES)
        self._weights = np.zeros(n)
        self._weights[FEATURES.index("like it")] = 1.0  # at first, only the behaviour of similar objects counts
        self._first, self._second = np.zeros(n), np.zeros(n)
        self._steps = 0
        self._inputs = np.zeros((_EXAMPLES, n))
        self._labels = np.zeros(_EXAMPLES)
        self._sorts: dict[tuple[str, int], tuple[float, float]] = {}  # objects, and those of them used again
        self.n_examples = 0

    @property
    def ready(self) -> bool:
        """Return whether it has enough examples to predict."""
        return self._steps > 0

    def features_of(self, situation: Situation, prior: float = 0.5) -> list[float]:
        """Return the inputs of the regression: a log odds, and the others scaled to about 0 to 1.

        Args:
            situation: of the object.
            prior: expected probability for similar objects before any observation.
        """
        rate = self.return_rate(situation, prior)
        overdue = situation.idle / situation.gap if situation.gap else 0.0
        return [
            math.log(rate / (1 - rate)),
            math.log1p(situation.idle) / 4,
            math.log1p(situation.uses) / 4,
            math.log1p(situation.age) / 4,
            min(overdue, _MOST_OVERDUE) / _MOST_OVERDUE,
            float(situation.gap > 0),
            math.log2(max(situation.n_bytes, 1)) / 32,
            float(situation.session_open),
            1.0,
        ]

    def return_rate(self, situation: Situation, prior: float = 0.5) -> float:
        """Return the share of objects of its creator, idle about as long, that were used again."""
        things, returned = self._sorts.get(_sort_of(situation), (0.0, 0.0))
        prior = min(max(prior, 0.01), 0.99)
        return (returned + _PRIOR_WEIGHT * prior) / (things + _PRIOR_WEIGHT)

    def observe(self, features: Sequence[float], situation: Situation, used_again: bool) -> None:
        """Learn from the outcome of an object.

        Args:
            features: its `features_of` at prediction time.
            situation: its situation then.
            used_again: whether it was used within the horizon.
        """
        place = self.n_examples % _EXAMPLES
        self._inputs[place] = features
        self._labels[place] = float(used_again)
        self.n_examples += 1
        things, returned = self._sorts.get(_sort_of(situation), (0.0, 0.0))
        self._sorts[_sort_of(situation)] = things * _KEPT + 1, returned * _KEPT + used_again

    def train(self, steps: int = 16) -> None:
        """Take some steps on examples sampled from the ring; does nothing before there are enough."""
        there = min(self.n_examples, _EXAMPLES)
        for _ in range(steps if there >= _LEAST_EXAMPLES else 0):
            chosen = self._draw.integers(there, size=_BATCH)
            rows = self._inputs[chosen]
            gradient = rows.T @ (_sigmoid(rows @ self._weights) - self._labels[chosen]) / _BATCH
            self._steps += 1
            self._first += (1 - _BETA1) * (gradient - self._first)
            self._second += (1 - _BETA2) * (gradient**2 - self._second)
            first, second = self._first / (1 - _BETA1**self._steps), self._second / (1 - _BETA2**self._steps)
            self._weights -= _RATE * first / (np.sqrt(second) + _EPSILON)

    def predict(self, features: Sequence[Sequence[float]]) -> np.ndarray:
        """Return the probability of a use within the horizon for each row of features, float64 `[rows]`."""
        return _sigmoid(np.asarray(features, np.float64).reshape(-1, len(FEATURES)) @ self._weights)

    def explain(self) -> dict[str, float]:
        """Return each feature's weight times its variation, by name; above 0: it makes a use more likely."""
        there = self._inputs[: min(self.n_examples, _EXAMPLES)]
        varies = there.std(axis=0) if len(there) else np.zeros(len(FEATURES))
        return dict(zip(FEATURES, (self._weights * varies).tolist(), strict=True))


def _sort_of(situation: Situation) -> tuple[str, int]:
    """Return its creator, and its idle time to a factor of two."""
    return situation.creator, situation.idle.bit_length()


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(values, -30.0, 30.0)))
