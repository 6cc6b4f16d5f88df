"""Codecs chosen so that the weights fit: the least loss, by whole steps."""

from __future__ import annotations

import itertools
import random

import pytest

from qwen3_vl_memory_optimizations import ConfigurationError
from qwen3_vl_memory_optimizations.model.checkpoint.fitting import fit, loss_of, next_steps
from qwen3_vl_memory_optimizations.model.checkpoint.plan import Measured, PlannedWeight


def weight(*options, codec="none"):
    return PlannedWeight(codec, "", {name: Measured(n_bytes, error) for name, n_bytes, error in options})


def random_weights(n, seed):
    draw = random.Random(seed)
    weights = {}
    for number in range(n):
        size = draw.randrange(1, 20)
        options = [("int4", 4 * size, draw.uniform(0.02, 0.08)), ("int8_rotated", 8 * size, draw.uniform(0.003, 0.02))]
        weights[str(number)] = weight(*options, ("none", 16 * size, 0.0))
    return weights


def size_of(weights):
    return sum(each.n_bytes for each in weights.values())


@pytest.mark.parametrize("seed", range(20))
def test_it_is_nearly_the_best_of_all_combinations(seed):
    weights = random_weights(6, seed)
    least, most = (sum(pick(m.n_bytes for m in w.candidates.values()) for w in weights.values()) for pick in (min, max))
    limit = random.Random(seed).randrange(least, most)
    found = fit(weights, limit)
    assert size_of(found) <= limit
    best = min(
        sum(option.relative_error**2 for option in combination)
        for combination in itertools.product(*(each.candidates.values() for each in weights.values()))
        if sum(option.n_bytes for option in combination) <= limit
    )
    # Within what one step can save: the optimum for exactly the bytes used.
    largest_step = max(w.candidates["int4"].relative_error ** 2 for w in weights.values())
    assert best <= loss_of(found) + 1e-12 <= best + largest_step + 1e-12


def test_all_fit_at_their_best_and_too_little_is_refused():
    weights = random_weights(5, 3)
    assert {each.codec for each in fit(weights, 10**6).values()} == {"none"}
    least = sum(each.candidates["int4"].n_bytes for each in weights.values())
    assert {each.codec for each in fit(weights, least).values()} == {"int4"}
    with pytest.raises(ConfigurationError, match=f"take {least} B, more than {least - 1} B"):
        fit(weights, least - 1)


def test_codecs_that_others_beat_are_never_taken():
    weights = {"a": weight(("int8", 8, 0.02), ("int8_rotated", 8, 0.01), ("sparse", 12, 0.05), ("none", 16, 0.0))}
    assert fit(weights, 12)["a"].codec == "int8_rotated"
    assert fit(weights, 16)["a"].codec == "none"
    one_way = {"a": PlannedWeight("none", "", {"int4": Measured(None, None, "unsupported"), "none": Measured(16, 0.0)})}
    assert fit(one_way, 16)["a"].codec == "none"


def test_the_next_steps_are_those_that_gain_most_and_cost_least():
    weights = {
        "a": weight(("int4", 4, 0.05), ("int8_rotated", 8, 0.01), codec="int4"),
        "b": weight(("int4", 4, 0.08), ("int8_rotated", 8, 0.01), codec="int4"),
        "c": weight(("int4", 40, 0.03), ("int8_rotated", 80, 0.01), codec="int8_rotated"),
    }
    up, down = next_steps(weights)
    assert (up.weight, up.codec, up.n_bytes) == ("b", "int8_rotated", 4)
    assert up.loss == pytest.approx(0.01**2 - 0.08**2)
    assert (down.weight, down.codec, down.n_bytes) == ("c", "int4", -40)
    assert down.loss == pytest.approx(0.03**2 - 0.01**2)
    assert next_steps({"a": weight(("none", 16, 0.0))}) == (None, None)
