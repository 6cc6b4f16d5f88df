"""The search, on machines whose best setting is known."""

import random

import pytest

from qwen3_vl_memory_optimizations.tuning import Climber, Knob, Parameter
from qwen3_vl_memory_optimizations.tuning.climb import PASS_RATE


class Machine:
    """Settings, and the figures that they give."""

    def __init__(self, rules, values, knobs=None, least=1, most=1024, noise=0.0, drift=0.0, **climbing):
        self.rules, self.values = rules, dict(values)
        self.noise, self.drift, self.draw, self.load = noise, drift, random.Random(1), 1.0
        self.decisions, self.history = [], []
        parameters = {
            name: Parameter(
                name,
                "s",
                least,
                most,
                lambda name=name: self.values[name],
                lambda value, name=name: self.set(name, value),
            )
            for name in values
        }
        self.parameters = parameters
        self.climber = Climber(
            parameters, knobs or [Knob(name) for name in values], on_decision=self.decisions.append, **climbing
        )

    def set(self, name, value):
        self.values[name] = value

    def figures(self):
        self.load *= 1 + self.drift
        found = {name: rule(self.values) for name, rule in self.rules.items()}
        return {
            name: None if value is None else value * self.load * (1 + self.noise * self.draw.uniform(-1, 1))
            for name, value in found.items()
        }

    def run(self, windows):
        for _ in range(windows):
            before = dict(self.values)
            for change in self.climber.step(self.figures()):
                self.parameters[change.parameter].set(change.value)
            changed = [name for name in before if before[name] != self.values[name]]
            assert len(changed) <= 1, "one at a time"
            self.history.append(dict(self.values))


def peak(best):
    return lambda name: lambda values: 100 / (1 + abs(values[name] - best) / best)


def test_it_finds_the_peak_and_rests_there():
    machine = Machine({"a": peak(64)("a")}, {"a": 8})
    machine.run(200)
    assert machine.values == {"a": 64} and machine.climber.resting
    assert [decision.after for decision in machine.decisions if decision.kept] == [16, 32, 64]


def test_it_goes_down_too_and_stays_within_the_bounds():
    machine = Machine({"a": lambda values: 100 / values["a"]}, {"a": 40}, least=8)
    machine.run(200)
    assert machine.values == {"a": 8}
    assert all(8 <= values["a"] <= 1024 for values in machine.history)


def test_noise_alone_moves_nothing():
    machine = Machine({"a": lambda values: 100}, {"a": 16}, noise=0.02, rest=5)
    machine.run(500)
    assert machine.values == {"a": 16} and len(machine.decisions) > 10
    assert not any(decision.kept for decision in machine.decisions)


def test_a_gain_is_found_in_noise_and_noise_is_seldom_taken_for_one():
    found, wrong, decided = 0, 0, 0
    for seed in range(20):
        rules = {"a": lambda values: 130 if values["a"] >= 64 else 100}
        machine = Machine(rules, {"a": 32}, most=64, noise=0.2, knobs=[Knob("a", directions=(1,))], rest=1)
        machine.draw = random.Random(seed)
        machine.run(80)
        found += machine.values["a"] == 64
        idle = Machine({"a": lambda values: 100}, {"a": 32}, noise=0.2, rest=1)
        idle.draw = random.Random(seed)
        idle.run(200)
        wrong += sum(decision.kept for decision in idle.decisions)
        decided += len(idle.decisions)
    assert found >= 18
    assert wrong <= decided // 5


@pytest.mark.parametrize("drift", [0.01, -0.01])
def test_a_load_that_changes_is_not_taken_for_a_gain_or_a_loss(drift):
    idle = Machine({"a": lambda values: 100}, {"a": 16}, drift=drift, rest=5)
    idle.run(200)
    assert not any(decision.kept for decision in idle.decisions)
    useful = Machine({"a": peak(64)("a")}, {"a": 16}, drift=drift)
    useful.run(100)
    assert useful.values == {"a": 64}


def test_two_knobs_are_turned_one_after_the_other():
    machine = Machine({"a": peak(8)("a"), "b": peak(128)("b")}, {"a": 32, "b": 32})
    machine.run(300)
    assert machine.values == {"a": 8, "b": 128}


def test_what_makes_passes_slower_is_taken_back_however_good_its_own_figure():
    rules = {"a": lambda values: values["a"], PASS_RATE: lambda values: 100 / values["a"]}
    machine = Machine(rules, {"a": 8}, knobs=[Knob("a", directions=(1,))])
    machine.run(30)
    assert machine.values == {"a": 8}
    assert "fewer passes" in machine.decisions[0].why and not machine.decisions[0].kept


def test_a_knob_without_a_figure_is_left_alone_and_a_trial_that_loses_it_is_given_up():
    machine = Machine({"a": lambda values: None}, {"a": 8})
    machine.run(50)
    assert machine.decisions == []
    machine = Machine(
        {"a": lambda values: 100 if values["a"] == 8 else None}, {"a": 8}, knobs=[Knob("a", directions=(1,))]
    )
    machine.run(40)
    assert machine.values == {"a": 8} and "nothing to measure" in machine.decisions[0].why


def test_what_cannot_be_undone_is_not_gone_back_on():
    machine = Machine(
        {"a": lambda values: values["a"]}, {"a": 8}, most=64, knobs=[Knob("a", directions=(1,), reversible=False)]
    )
    machine.run(60)
    sizes = [values["a"] for values in machine.history]
    assert sizes == sorted(sizes) and sizes[-1] == 64


def test_a_long_step_crosses_what_a_short_one_does_not():
    machine = Machine(
        {"a": lambda values: 0 if values["a"] < 100 else values["a"]},
        {"a": 8},
        most=512,
        knobs=[Knob("a", directions=(1,), strides=(1, 4), reversible=False)],
    )
    machine.run(100)
    assert machine.values == {"a": 512}
    assert [(decision.after, decision.kept) for decision in machine.decisions[:3]] == [
        (16, False),
        (128, True),
        (512, True),
    ]


def test_after_a_rest_it_looks_again():
    machine = Machine({"a": peak(16)("a")}, {"a": 16}, rest=20)
    machine.run(40)
    machine.rules["a"] = peak(64)("a")
    machine.run(200)
    assert machine.values == {"a": 64}
