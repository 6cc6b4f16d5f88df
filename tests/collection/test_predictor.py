import random

import pytest

from qwen3_vl_memory_optimizations import SimpleMLPredictor
from qwen3_vl_memory_optimizations.prediction import Situation


def situation(idle=0, creator="a", **changes):
    values = {"uses": 1, "age": idle, "gap": 0.0, "n_bytes": 1 << 20, "session_open": False, **changes}
    return Situation(idle=idle, creator=creator, **values)


def learn(predictor, draw, n, outcome):
    for _ in range(n):
        seen = situation(draw.randrange(12), draw.choice(["prompt", "answer"]))
        predictor.observe(predictor.features_of(seen), seen, outcome(seen))
        predictor.train(2)


def test_below_16_examples_nothing_is_predicted():
    predictor = SimpleMLPredictor()
    learn(predictor, random.Random(0), 15, lambda seen: True)
    assert not predictor.ready
    learn(predictor, random.Random(0), 1, lambda seen: True)
    assert predictor.ready


def test_it_learns_that_what_was_unused_for_long_is_not_used_again():
    predictor, draw = SimpleMLPredictor(), random.Random(1)
    learn(predictor, draw, 600, lambda seen: seen.idle < 5)
    rows = [predictor.features_of(situation(idle)) for idle in (0, 2, 8, 11)]
    soon, early, late, last = predictor.predict(rows)
    assert soon > early > 0.6 and 0.4 > late > last
    weights = predictor.explain()
    assert weights["like it"] > 0 > weights["idle"]


def test_it_learns_whose_things_come_back():
    predictor, draw = SimpleMLPredictor(), random.Random(2)
    learn(predictor, draw, 600, lambda seen: seen.creator == "prompt")
    assert predictor.return_rate(situation(3, "prompt")) > 0.9 and predictor.return_rate(situation(3, "answer")) < 0.1
    assert predictor.return_rate(situation(3, "unknown")) == 0.5
    assert predictor.return_rate(situation(3, "unknown"), prior=0.2) == pytest.approx(0.2)
    prompt, answer = predictor.predict(
        [predictor.features_of(situation(3, "prompt")), predictor.features_of(situation(3, "answer"))]
    )
    assert prompt > 0.8 and answer < 0.2
    weights = predictor.explain()
    assert max(weights, key=lambda name: abs(weights[name])) == "like it"


def test_it_follows_when_things_change():
    predictor, draw = SimpleMLPredictor(), random.Random(3)
    learn(predictor, draw, 600, lambda seen: True)
    before = float(predictor.predict([predictor.features_of(situation(3))])[0])
    learn(predictor, draw, 2048, lambda seen: False)
    assert before > 0.9 > 0.1 > float(predictor.predict([predictor.features_of(situation(3))])[0])


def test_before_it_has_learnt_it_says_what_things_like_it_did():
    predictor = SimpleMLPredictor()
    for _ in range(20):
        seen = situation(3, "answer")
        predictor.observe(predictor.features_of(seen), seen, False)
    (found,) = predictor.predict([predictor.features_of(situation(3, "answer"))])
    assert found == pytest.approx(predictor.return_rate(situation(3, "answer"))) == pytest.approx(1 / 22, abs=0.01)
