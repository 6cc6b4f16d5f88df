"""`Climber`: hill climbing over settings. Pure: takes figures, returns changes.

A trial compares windows with the old setting (A) and the new one (B) in the order A B B A, so that drifting load
affects both. If the pairs are inconclusive, B B A follows, at most twice. If reverting loses the gain (a shrunk cache
forgets entries), the order is A B B.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import ConfigurationError
from .parameters import Parameter

PASS_RATE = "passes_per_s"
"""Guard figure: no change may make it much worse."""

_HOPELESS = -0.3
"""A trial this much worse after its first windows is aborted."""
_MOST_PAIRS = 6
_SURE = 1.5
"""Standard errors above zero that a gain needs; at twice that, measuring stops."""
_MOST_EMPTY = 8
"""A trial is abandoned after this many times its window count without its figure."""


@dataclass(frozen=True, slots=True)
class Knob:
    """A parameter to tune.

    Attributes:
        parameter: name of the parameter and of the figure that judges it (higher is better).
        factor: multiplier or divisor per step.
        directions: 1 and -1, in the order of trials.
        strides: steps per trial; longer strides are tried if shorter ones change nothing.
        reversible: whether reverting restores the previous state.
    """

    parameter: str
    factor: float = 2.0
    directions: Sequence[int] = (1, -1)
    strides: Sequence[int] = (1,)
    reversible: bool = True


@dataclass(frozen=True, slots=True)
class Change:
    """A value to set before the next window."""

    parameter: str
    value: float


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome of a trial.

    Attributes:
        window: number of windows seen so far.
        parameter: parameter tried.
        before, after: values compared.
        kept: whether `after` stays.
        figure_before, figure_after: medians over windows; `None` if not measured.
        why: reason in words.
    """

    window: int
    parameter: str
    before: float
    after: float
    kept: bool
    figure_before: float | None
    figure_after: float | None
    why: str


@dataclass(slots=True)
class _Trial:
    knob: Knob
    power: int
    before: float
    after: float
    phase: str = "A"  # A: old, B: new, C: old again
    settle: int = 0
    empty: int = 0
    figures: dict[str, list[float]] = field(default_factory=lambda: {"A": [], "B": [], "C": []})
    guards: dict[str, list[float]] = field(default_factory=lambda: {"A": [], "B": [], "C": []})
    gains: list[float] = field(default_factory=list)  # one per pair so far
    guard_gains: list[float] = field(default_factory=list)
    old: list[float] = field(default_factory=list)  # figures of finished rounds
    new: list[float] = field(default_factory=list)


class Climber:
    """Tries one knob at a time and keeps improvements.

    Args:
        parameters: parameters by name; only their values and bounds are read.
        knobs: knobs in the order of trials; those without a parameter are ignored.
        windows: windows per part of a trial, at least two.
        settle: windows ignored after each change.
        least_gain: minimum relative gain of a figure.
        most_loss: maximum relative loss of passes per second in favour of another figure, in both halves of a
            reversible trial.
        rest: windows without trials after no step of any knob was better.
        on_decision: called with each decision.

    Raises:
        ConfigurationError: fewer than two windows, too few to estimate their variance.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        knobs: Sequence[Knob],
        *,
        windows: int = 3,
        settle: int = 1,
        least_gain: float = 0.03,
        most_loss: float = 0.1,
        rest: int = 100,
        on_decision: Callable[[Decision], None] = lambda decision: None,
    ) -> None:
        if windows < 2:
            raise ConfigurationError(f"windows: {windows} per part of a trial is too few; use at least two")
        self._parameters = parameters
        self._knobs = [knob for knob in knobs if knob.parameter in parameters]
        self._windows, self._settle, self._rest = windows, settle, rest
        self._least_gain, self._most_loss = least_gain, most_loss
        self._on_decision = on_decision
        self._seen = 0
        self._resting = 0
        self._steps = self._round()
        self._step = 0
        self._kept_in_round = False
        self._trial: _Trial | None = None

    @property
    def resting(self) -> bool:
        """Whether trials pause because no step was better."""
        return self._resting > 0

    def step(self, figures: Mapping[str, float | None]) -> list[Change]:
        """Process the figures of the window that ended; return the changes to apply before the next.

        Args:
            figures: figures by the parameter they judge, and `PASS_RATE`; `None` or missing: not measurable in this
                window.
        """
        self._seen += 1
        if self._resting:
            self._resting -= 1
            return []
        if self._trial is None:
            self._trial = self._next_trial(figures)
        return [] if self._trial is None else self._advance(self._trial, figures)

    # --- trials -----------------------------------------------------------------------------------------------------

    def _round(self) -> list[tuple[Knob, int]]:
        """Return the steps to try: knobs with powers of their factors."""
        return [(knob, each * stride) for knob in self._knobs for each in knob.directions for stride in knob.strides]

    def _next_trial(self, figures: Mapping[str, float | None]) -> _Trial | None:
        """Return a trial of the next step with a figure and room within bounds; rest after a round without gains."""
        while self._step < len(self._steps):
            knob, power = self._steps[self._step]
            parameter = self._parameters[knob.parameter]
            before = parameter.read()
            after = parameter.clamped(before * knob.factor**power)
            if figures.get(knob.parameter) is not None and after != before:
                return _Trial(knob, power, before, after)
            self._step += 1
        self._steps, self._step = self._round(), 0
        vain, self._kept_in_round = not self._kept_in_round, False
        self._resting = self._rest if vain else 0
        return None

    def _advance(self, trial: _Trial, figures: Mapping[str, float | None]) -> list[Change]:
        if trial.settle:
            trial.settle -= 1
            return []
        figure = figures.get(trial.knob.parameter)
        if figure is None:
            trial.empty += 1
            if trial.empty > _MOST_EMPTY * self._windows:
                return self._end(trial, False, "nothing to measure any more")
            return []
        trial.figures[trial.phase].append(figure)
        guard = figures.get(PASS_RATE)
        if guard is not None:
            trial.guards[trial.phase].append(guard)
        count = len(trial.figures[trial.phase])
        if trial.phase == "A" and count == self._windows:
            trial.phase, trial.settle = "B", self._settle
            return [Change(trial.knob.parameter, trial.after)]
        if trial.phase == "B" and count == self._windows:
            before, after = (statistics.median(trial.figures[phase]) for phase in "AB")
            if _gain(before, after) < _HOPELESS:
                return self._end(trial, False, "worse")
        if trial.phase == "B" and count == 2 * self._windows and trial.knob.reversible:
            trial.phase, trial.settle = "C", self._settle
            return [Change(trial.knob.parameter, trial.before)]
        if count == (self._windows if trial.phase == "C" else 2 * self._windows) and trial.phase != "A":
            return self._judge(trial)
        return []

    def _judge(self, trial: _Trial) -> list[Change]:
        """Decide, or continue with B B A if the pairs are inconclusive and repeatable."""
        trial.gains += self._gains(trial.figures, trial.knob)
        if trial.knob.reversible:  # else new load from other processes would look like a slower setting
            trial.guard_gains += self._gains(trial.guards, trial.knob)
        trial.old += trial.figures["A"]
        trial.new += trial.figures["B"]
        gain, slower = statistics.mean(trial.gains), -max(trial.guard_gains, default=0.0)
        error = max(statistics.stdev(trial.gains) / len(trial.gains) ** 0.5, _error(trial.old, trial.new))
        shown = ", ".join(f"{100 * each:+.1f} %" for each in trial.gains)
        if slower > self._most_loss:
            return self._end(trial, False, f"{shown}, but {100 * slower:.1f} % fewer passes per second")
        better = gain >= self._least_gain and gain > _SURE * error
        unsure = gain < 2 * _SURE * error if better else gain + error >= self._least_gain
        if unsure and trial.knob.reversible and len(trial.gains) < _MOST_PAIRS:
            for table in (trial.figures, trial.guards):
                table["A"], table["B"], table["C"] = table["C"], [], []
            trial.phase, trial.settle = "B", self._settle
            return [Change(trial.knob.parameter, trial.after)]
        verdict = " better" if better else f": not reliably {100 * self._least_gain:g} % better"
        return self._end(trial, better, shown + verdict)

    def _gains(self, figures: Mapping[str, list[float]], knob: Knob) -> list[float]:
        """Return the gain of each half of the new windows over the adjacent old ones."""
        new, n = figures["B"], self._windows
        halves = [(figures["A"], new[:n]), (figures["C"] if knob.reversible else figures["A"], new[n:])]
        return [_gain(statistics.median(old), statistics.median(half)) for old, half in halves if old and half]

    def _end(self, trial: _Trial, kept: bool, why: str) -> list[Change]:
        old, new = trial.old + trial.figures["C"] or trial.figures["A"], trial.new or trial.figures["B"]
        self._on_decision(
            Decision(
                self._seen,
                trial.knob.parameter,
                trial.before,
                trial.after,
                kept,
                statistics.median(old) if old else None,
                statistics.median(new) if new else None,
                why,
            )
        )
        set_now = trial.after if trial.phase == "B" else trial.before
        self._trial = None
        if kept:
            self._kept_in_round = True  # repeat this step, and drop the opposite ones
            back = [step for step in self._steps if step[0] is trial.knob and step[1] * trial.power < 0]
            self._steps = [step for step in self._steps if step not in back]
            self._step = self._steps.index((trial.knob, trial.power))
        else:
            self._step += 1
        value = trial.after if kept else trial.before
        return [] if value == set_now else [Change(trial.knob.parameter, value)]


def _gain(before: float, after: float) -> float:
    """Return the relative growth of a figure; growth from zero counts as 1."""
    if before == 0:
        return 0.0 if after == 0 else 1.0
    return (after - before) / abs(before)


def _error(old: Sequence[float], new: Sequence[float]) -> float:
    """Return the standard error of the gain between two sets of windows, from their variances."""
    middle = abs(statistics.median(old))
    return sum(statistics.variance(each) / len(each) for each in (old, new)) ** 0.5 / middle if middle else 0.0
