"""`LightweightMLPredictor`: a small network that learns how long each key waits for its next use."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigurationError
from .next_use import UseHistory

KINDS = ("weights", "kv_cache", "vision_features", "text_embeddings", "general")
FEATURES = ("age", "gap", "unsteadiness", "uses", "life", "bytes", *KINDS)
_HIDDEN = 16
_EXAMPLES = 4096
_BATCH = 64
_LEAST_EXAMPLES = 256
_RATE, _BETA1, _BETA2, _EPSILON = 0.01, 0.9, 0.999, 1e-8
_MOST_LOG = 30.0
_JUDGED = 0.2
"""Weight of the newest examples against all earlier ones, each time they are evaluated."""
_FORMAT = "qwen3vl-mem wait predictor, version 1"


def features_of(history: UseHistory, now: int, n_bytes: int, kind: str) -> list[float]:
    """Return the network's inputs: recency, gaps, counts, size and kind, scaled to about 0 to 1.

    Args:
        history: of the key.
        now: in uses of all keys, not before its last use.
        n_bytes: size of the key's tensor.
        kind: kind of the tensor; an unknown one matches none of `KINDS`.
    """
    return [
        math.log1p(now - history.last) / 8,
        math.log1p(history.gap) / 8,
        math.log1p(history.spread) / 8,
        math.log1p(history.weight) / 4,
        math.log1p(now - history.first) / 8,
        math.log2(max(n_bytes, 1)) / 32,
        *(float(kind == each) for each in KINDS),
    ]


class LightweightMLPredictor:
    """One hidden layer of 16, trained with Adam on examples from a ring of 4,096.

    Each use of a key gives an example: its features at a random moment since the previous use, and the remaining wait
    as a logarithm. Keys that never return give none. Below 256 examples it makes no prediction.

    New examples are evaluated before they are learned, against the prediction of a simple rule; `better` is true when
    the network is at least as good.

    Args:
        seed: seed of the initial weights and of sampling.

    Attributes:
        n_examples: examples seen so far.
        error: mean absolute error of the last batch before it was learned, in natural logarithms; `None`: none yet.
        errors: the same for new examples, older ones weighted less: `network` and `rule`; `None`: none yet.
    """

    def __init__(self, seed: int = 0) -> None:
        self._draw = np.random.default_rng(seed)
        n = len(FEATURES)
        self._parameters = {
            "w1": self._draw.normal(0, 1 / math.sqrt(n), (n, _HIDDEN)),
            "b1": np.zeros(_HIDDEN),
            "w2": self._draw.normal(0, 1 / math.sqrt(_HIDDEN), _HIDDEN),
            "b2": np.zeros(1),
        }
        self._moments = {name: (np.zeros_like(value), np.zeros_like(value)) for name, value in self._parameters.items()}
        self._steps = 0
        self._inputs = np.zeros((_EXAMPLES, n))
        self._labels = np.zeros(_EXAMPLES)
        self._ruled = np.zeros(_EXAMPLES)
        self._n_judged = 0
        self._was_loaded = False
        self.n_examples = 0
        self.error: float | None = None
        self.errors: dict[str, float | None] = {"network": None, "rule": None}

    def observe(
        self, history: UseHistory, now: int, n_bytes: int, kind: str, rule: Callable[[int], float] | None = None
    ) -> None:
        """Learn from a use.

        Args:
            history: of the key, without this use.
            now: time of the use, in uses of all keys.
            n_bytes, kind: of the key.
            rule: returns the predicted wait of the key at a moment, in uses of all keys; `None`: there is no rule.
        """
        gap = now - history.last
        if gap < 1:
            return
        moment = history.last + int(self._draw.integers(gap))
        place = self.n_examples % _EXAMPLES
        self._inputs[place] = features_of(history, moment, n_bytes, kind)
        self._labels[place] = math.log1p(now - moment)
        self._ruled[place] = math.nan if rule is None else min(math.log1p(rule(moment)), _MOST_LOG)
        self.n_examples += 1

    @property
    def ready(self) -> bool:
        """Return whether it has enough examples to predict."""
        return self._steps > 0 and (self._was_loaded or self.n_examples >= _LEAST_EXAMPLES)

    @property
    def better(self) -> bool:
        """Return whether it is `ready`, and no worse than the rule so far."""
        network, rule = self.errors["network"], self.errors["rule"]
        return self.ready and (network is None or rule is None or network <= rule)

    def train(self, steps: int = 8) -> None:
        """Take some steps on examples sampled from the ring; does nothing before there are enough."""
        self._judge()
        there = min(self.n_examples, _EXAMPLES)
        for _ in range(steps if there >= _LEAST_EXAMPLES else 0):
            chosen = self._draw.integers(there, size=_BATCH)
            self._step(self._inputs[chosen], self._labels[chosen])

    def _judge(self) -> None:
        """Compare the network and the rule on the examples added since the last comparison."""
        new = min(self.n_examples - self._n_judged, _EXAMPLES)
        self._n_judged = self.n_examples
        if not self.ready or not new:
            return
        places = np.arange(self.n_examples - new, self.n_examples) % _EXAMPLES
        found = np.clip(self._forward(self._inputs[places])[1], 0.0, _MOST_LOG)
        for name, given in (("network", found), ("rule", self._ruled[places])):
            error, before = float(np.abs(given - self._labels[places]).mean()), self.errors[name]
            if math.isfinite(error):
                self.errors[name] = error if before is None else before + _JUDGED * (error - before)

    def predict(self, features: Sequence[Sequence[float]]) -> np.ndarray:
        """Return the predicted wait for each row of `features_of`, in uses of all keys, float64 `[rows]`."""
        rows = np.asarray(features, np.float64).reshape(-1, len(FEATURES))
        return np.expm1(np.clip(self._forward(rows)[1], 0.0, _MOST_LOG))

    def explain(self) -> dict[str, float]:
        """Return each feature's influence on the prediction: its mean effect times its variation, by name."""
        there = self._inputs[: min(self.n_examples, _EXAMPLES)]
        if not len(there):
            return dict.fromkeys(FEATURES, 0.0)
        hidden, _ = self._forward(there)
        slopes = ((1 - hidden**2) * self._parameters["w2"]) @ self._parameters["w1"].T
        return dict(zip(FEATURES, (np.abs(slopes).mean(axis=0) * there.std(axis=0)).tolist(), strict=True))

    def save(self, path: Path) -> None:
        """Write the weights as `.npz`."""
        arrays: dict[str, Any] = {"format": np.array(_FORMAT), **self._parameters}
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> LightweightMLPredictor:
        """Return a saved predictor, which can continue learning; nothing in the file is executed.

        Raises:
            ConfigurationError: there is no such file, or it holds no predictor in this format.
        """
        predictor = cls()
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                if str(stored["format"]) != _FORMAT:
                    raise ValueError(f"its format is not {_FORMAT!r}")
                for name, value in predictor._parameters.items():
                    found = stored[name].astype(np.float64)
                    if found.shape != value.shape or not np.isfinite(found).all():
                        raise ValueError(f"{name} has shape {found.shape}, or is not finite")
                    predictor._parameters[name] = found
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ConfigurationError(f"{path}: no predictor ({type(error).__name__}: {error})") from error
        predictor._steps = 1
        predictor._was_loaded = True
        return predictor

    def _forward(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        hidden = np.tanh(rows @ self._parameters["w1"] + self._parameters["b1"])
        return hidden, hidden @ self._parameters["w2"] + self._parameters["b2"][0]

    def _step(self, rows: np.ndarray, labels: np.ndarray) -> None:
        hidden, found = self._forward(rows)
        difference = found - labels
        self.error = float(np.abs(difference).mean())
        # Huber loss: an unpredictable wait must not dominate the others.
        slope = np.clip(difference, -1.0, 1.0) / len(rows)
        inner = slope[:, None] * self._parameters["w2"] * (1 - hidden**2)
        gradients = {
            "w1": rows.T @ inner,
            "b1": inner.sum(axis=0),
            "w2": hidden.T @ slope,
            "b2": np.array([slope.sum()]),
        }
        self._steps += 1
        for name, gradient in gradients.items():
            first, second = self._moments[name]
            first += (1 - _BETA1) * (gradient - first)
            second += (1 - _BETA2) * (gradient**2 - second)
            unbiased = first / (1 - _BETA1**self._steps), second / (1 - _BETA2**self._steps)
            self._parameters[name] = self._parameters[name] - _RATE * unbiased[0] / (np.sqrt(unbiased[1]) + _EPSILON)
