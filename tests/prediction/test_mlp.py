"""The small network learns waits, says what it goes by, and is kept without pickle."""

from __future__ import annotations

import numpy as np
import pytest

from qwen3_vl_memory_optimizations import ConfigurationError, LightweightMLPredictor
from qwen3_vl_memory_optimizations.prediction import NextUse
from qwen3_vl_memory_optimizations.prediction.mlp import FEATURES, features_of


def taught(uses=6000):
    """Keys of one kind are used every 8 uses or so, those of another every 200 or so."""
    draw, next_use, predictor = np.random.default_rng(0), NextUse(), LightweightMLPredictor(seed=1)
    kinds = {f"often {n}": "kv_cache" for n in range(6)} | {f"seldom {n}": "general" for n in range(50)}
    often, seldom = list(kinds)[:6], list(kinds)[6:]
    for number in range(uses):
        key = str(draw.choice(often if draw.random() < 0.75 else seldom))
        history = next_use.history(key)
        if history is not None:
            predictor.observe(history, next_use.now + 1, 1000, kinds[key])
        next_use.use(key, 40)
        if number % 50 == 0:
            predictor.train(10)
    return predictor, next_use, kinds


def rows(next_use, kinds):
    keys = [key for key in kinds if next_use.history(key) is not None]
    return keys, [features_of(next_use.history(key), next_use.now, 1000, kinds[key]) for key in keys]


def test_nothing_is_predicted_before_there_are_examples():
    predictor = LightweightMLPredictor()
    predictor.train()
    assert not predictor.ready and predictor.error is None
    assert set(predictor.explain()) == set(FEATURES)


def test_it_learns_which_keys_come_back_soon():
    predictor, next_use, kinds = taught()
    assert predictor.ready and predictor.error < 1.0
    keys, features = rows(next_use, kinds)
    waits = dict(zip(keys, predictor.predict(features), strict=True))
    often = np.mean([wait for key, wait in waits.items() if kinds[key] == "kv_cache"])
    seldom = np.mean([wait for key, wait in waits.items() if kinds[key] == "general"])
    assert 2 < often < 20 < seldom < 400
    constant = np.abs(predictor._labels[: predictor.n_examples] - np.median(predictor._labels[:4096])).mean()
    assert predictor.error < 0.8 * constant, "better than always saying the median"


def test_it_says_what_it_goes_by():
    predictor, _, _ = taught()
    effects = predictor.explain()
    assert set(effects) == set(FEATURES)
    assert effects["bytes"] == pytest.approx(0, abs=1e-6), "all keys have the same size"
    assert effects["weights"] == 0, "there were none"
    assert max(effects, key=effects.get) in ("gap", "uses", "kv_cache", "general", "unsteadiness", "age")


def test_it_is_kept_without_pickle_and_goes_on_learning(tmp_path):
    predictor, next_use, kinds = taught()
    predictor.save(tmp_path / "predictor.npz")
    again = LightweightMLPredictor.load(tmp_path / "predictor.npz")
    _, features = rows(next_use, kinds)
    assert np.array_equal(again.predict(features), predictor.predict(features))
    assert again.ready
    np.savez(tmp_path / "object.npz", w1=np.array([object()]))
    np.savez(tmp_path / "other.npz", format=np.array("else"))
    with np.load(tmp_path / "predictor.npz") as stored:
        np.savez(tmp_path / "nan.npz", **{**stored, "w2": stored["w2"] * np.nan})
    for name in ("object", "other", "nan", "missing"):
        with pytest.raises(ConfigurationError, match=name):
            LightweightMLPredictor.load(tmp_path / f"{name}.npz")


def test_extremes_stay_finite():
    predictor, next_use, _ = taught(2000)
    history = next_use.history("often 0")
    history.gap, history.spread, history.weight = 1e12, 1e12, 1e12
    assert np.isfinite(predictor.predict([features_of(history, next_use.now + 10**9, 1 << 60, "unheard of")])).all()


def judged(rule_error):
    """A network that was taught, beside a rule that is off by so much in logarithms."""
    draw, next_use, predictor = np.random.default_rng(0), NextUse(), LightweightMLPredictor(seed=1)
    for number in range(3000):
        key = int(draw.integers(30))
        history = next_use.history(key)
        if history is not None:
            now = next_use.now + 1
            predictor.observe(
                history, now, 1000, "general", lambda moment, now=now: np.expm1(np.log1p(now - moment) + rule_error)
            )
        next_use.use(key, 30)
        if number % 50 == 0:
            predictor.train(10)
    return predictor


def test_a_rule_that_is_always_right_decides():
    predictor = judged(rule_error=0.0)
    assert predictor.ready and not predictor.better
    assert predictor.errors["rule"] < 0.01 < predictor.errors["network"]


def test_the_network_decides_beside_a_rule_that_is_worse():
    predictor = judged(rule_error=3.0)
    assert predictor.better
    assert predictor.errors["network"] < predictor.errors["rule"] == pytest.approx(3.0, abs=0.01)


def test_one_that_was_loaded_predicts_at_once(tmp_path):
    predictor = judged(rule_error=3.0)
    predictor.save(tmp_path / "waits.npz")
    loaded = LightweightMLPredictor.load(tmp_path / "waits.npz")
    assert loaded.ready and loaded.better and loaded.n_examples == 0
    loaded.train()  # there is nothing to learn yet, and nothing is forgotten
    features = [features_of(history_of(3), 10, 1000, "general")]
    assert loaded.predict(features) == pytest.approx(predictor.predict(features))


def history_of(last):
    next_use = NextUse()
    next_use.now = last - 1
    next_use.use("a", 1)
    return next_use.history("a")
