"""`Climber`: which setting to try next, and whether to keep it. Pure: it is fed figures, and answers with changes.

A trial compares windows with the old setting (A) and the new one (B) in the order A B B A, so that a slow change of
the load meets both. Where those pairs differ too much to tell, B B A follows, twice at the most. Where going back costs
what was gained (a cache that shrinks forgets), the order is A B B.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import ConfigurationError
from .parameters import Parameter

PASS_RATE = "passes_per_s"
"""The figure that no change may make much worse."""

_HOPELESS = -0.3
"""What is so much worse at first is looked at no longer."""
_MOST_PAIRS = 6
_SURE = 1.5
"""So many standard errors a gain has to be above zero; with twice as many nothing more is measured."""
_MOST_EMPTY = 8
"""So many times as many windows as a trial needs may be without its figure; then it is given up."""


@dataclass(frozen=True, slots=True)
class Knob:
    """A parameter to turn.

    Attributes:
        parameter: name of the parameter, and of the figure that says whether a change of it was good (more is better).
        factor: a step multiplies or divides by it.
        directions: 1 and -1, in the order in which they are tried.
        strides: how many steps a trial goes; longer ones are tried where shorter ones change nothing.
        reversible: whether going back restores what was.
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
    """How a trial ended.

    Attributes:
        window: how many windows were seen by then.
        parameter: what was tried.
        before, after: the values compared.
        kept: whether `after` stays.
        figure_before, figure_after: medians over windows; `None` where there was nothing to measure.
        why: in words.
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
    gains: list[float] = field(default_factory=list)  # of each pair so far
    guard_gains: list[float] = field(default_factory=list)
    old: list[float] = field(default_factory=list)  # figures of rounds that are over
    new: list[float] = field(default_factory=list)


class Climber:
    """Turns one knob at a time and keeps what is better.

    Args:
        parameters: by name; only their values and bounds are read.
        knobs: in the order in which they are tried; those without a parameter are left out.
        windows: windows in each part of a trial, at least two.
        settle: windows that are not counted after each change.
        least_gain: the part by which a figure has to be better.
        most_loss: the part by which passes a second may become fewer for the sake of another figure, in both
            halves of a trial that can be undone.
        rest: windows without a trial, once no step of any knob was better.
        on_decision: called with each decision.

    Raises:
        ConfigurationError: fewer than two windows, which say nothing of how much windows differ.
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
            raise ConfigurationError(f"windows: {windows} in each part of a trial; at least two are needed")
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
        """Whether no step was better, and none is tried for a while."""
        return self._resting > 0

    def step(self, figures: Mapping[str, float | None]) -> list[Change]:
        """Take the figures of the window that ended; return what to set before the next, if anything.

        Args:
            figures: by name of the parameter that they judge, and `PASS_RATE`; `None` or missing: not measurable in
                this window.
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
        """Return the steps to try: a knob, and the power of its factor."""
        return [(knob, each * stride) for knob in self._knobs for each in knob.directions for stride in knob.strides]

    def _next_trial(self, figures: Mapping[str, float | None]) -> _Trial | None:
        """Return a trial of the first step from here on that has a figure and room; after a vain round, rest."""
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
                return self._end(trial, False, "there was nothing to measure any more")
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
        """Decide, or, where the pairs differ too much for that and can be repeated, go on with B B A."""
        trial.gains += self._gains(trial.figures, trial.knob)
        if trial.knob.reversible:  # else a machine that others began to use would look like a slower setting
            trial.guard_gains += self._gains(trial.guards, trial.knob)
        trial.old += trial.figures["A"]
        trial.new += trial.figures["B"]
        gain, slower = statistics.mean(trial.gains), -max(trial.guard_gains, default=0.0)
        error = max(statistics.stdev(trial.gains) / len(trial.gains) ** 0.5, _error(trial.old, trial.new))
        shown = ", ".join(f"{100 * each:+.1f} %" for each in trial.gains)
        if slower > self._most_loss:
            return self._end(trial, False, f"{shown}, but {100 * slower:.1f} % fewer passes a second")
        better = gain >= self._least_gain and gain > _SURE * error
        unsure = gain < 2 * _SURE * error if better else gain + error >= self._least_gain
        if unsure and trial.knob.reversible and len(trial.gains) < _MOST_PAIRS:
            for table in (trial.figures, trial.guards):
                table["A"], table["B"], table["C"] = table["C"], [], []
            trial.phase, trial.settle = "B", self._settle
            return [Change(trial.knob.parameter, trial.after)]
        verdict = " better" if better else f": not surely {100 * self._least_gain:g} % better"
        return self._end(trial, better, shown + verdict)

    def _gains(self, figures: Mapping[str, list[float]], knob: Knob) -> list[float]:
        """Return the gain of each half of the new windows over the old ones beside it."""
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
            self._kept_in_round = True  # the same step again, and not the way back
            back = [step for step in self._steps if step[0] is trial.knob and step[1] * trial.power < 0]
            self._steps = [step for step in self._steps if step not in back]
            self._step = self._steps.index((trial.knob, trial.power))
        else:
            self._step += 1
        value = trial.after if kept else trial.before
        return [] if value == set_now else [Change(trial.knob.parameter, value)]


def _gain(before: float, after: float) -> float:
    """Return by which part a figure grew; from nothing to something is all of it."""
    if before == 0:
        return 0.0 if after == 0 else 1.0
    return (after - before) / abs(before)


def _error(old: Sequence[float], new: Sequence[float]) -> float:
    """Return the standard error of the gain of some windows over others, by how much those of each set differ."""
    middle = abs(statistics.median(old))
    return sum(statistics.variance(each) / len(each) for each in (old, new)) ** 0.5 / middle if middle else 0.0
