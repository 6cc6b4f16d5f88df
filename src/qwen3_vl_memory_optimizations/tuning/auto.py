"""`AutoTuner`: splits the run into windows, measures each, and applies the changes that `Climber` chooses."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import statistics
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..cache import HierarchicalCacheSystem
from ..errors import MemoryOptimizationError
from ..paging import Pager
from ..periodic import Periodic
from .climb import PASS_RATE, Climber, Decision, Knob
from .parameters import Parameter

logger = logging.getLogger(__name__)

KNOBS = (
    Knob("read_ahead_bytes", strides=(1, 2)),
    Knob("l2_cache_size", factor=1.5, directions=(1,), strides=(1, 4), reversible=False),
    Knob("pool_compaction_interval"),
    Knob("tier_migration_interval"),
)
"""Knobs in the order of trials. A smaller cache cannot have more hits, so it is never tried. A cache that is far too
small has no hits until it is several times as large, hence the stride of 4."""

WINDOW_S = 1.0
WINDOW_PASSES = 8
_PAUSE = 5
_LOOKS = 4
"""Checks per window."""
_REMEMBERED_PASSES = 4096
_REMEMBERED_DECISIONS = 200


@dataclass(frozen=True, slots=True)
class Counters:
    """Counters at the end of a window; differences of two give the figures of a window.

    Attributes:
        hits, lookups: L2 cache hits and lookups.
        misses, faults: page accesses that needed a read, and those of them that stalled.
        swap_reads: pages read from the swap file.
        reused_bytes, backed_bytes: page frame bytes reused, and backed in total.
        fragmentation: current fragmentation of page frames.
    """

    hits: int
    lookups: int
    misses: int
    faults: int
    swap_reads: int
    reused_bytes: int
    backed_bytes: int
    fragmentation: float | None

    @classmethod
    def of(cls, pager: Pager, cache: HierarchicalCacheSystem | None) -> Counters:
        """Return the current counters."""
        level = None if cache is None else cache.l2_cache
        stats, frames = pager.stats, pager.frames
        return cls(
            hits=0 if level is None else level.counters.hits,
            lookups=0 if level is None else level.counters.hits + level.counters.misses,
            misses=stats.misses,
            faults=stats.faults,
            swap_reads=stats.swap_reads,
            reused_bytes=frames.reused_bytes,
            backed_bytes=frames.backed_bytes,
            fragmentation=frames.fragmentation,
        )


def figures_of(before: Counters, after: Counters, pass_starts_s: Sequence[float]) -> dict[str, float | None]:
    """Return the figures of a window by the parameter that each judges; higher is better.

    - `passes_per_s`: 1 / mean time between the starts of consecutive passes. Times above 5 times the median (a pause
      between requests, a long prompt) are excluded; SSD stalls are included.
    - `read_ahead_bytes`: the same, if pages had to be read.
    - `l2_cache_size`: hit rate of the L2 cache.
    - `pool_compaction_interval`: share of reused frames times share of held memory in use: a long interval reuses
      more, a short one holds less.
    - `tier_migration_interval`: share of page reads prefetched in time, if some came from the swap file.

    Args:
        before, after: counters at the start and end of the window.
        pass_starts_s: start times of its passes in seconds.
    """

    def share(part: int, whole: int) -> float | None:
        return part / whole if whole > 0 else None

    times = [stop - start for start, stop in itertools.pairwise(pass_starts_s)]
    longest_s = _PAUSE * statistics.median(times) if times else 0.0
    typical_s = statistics.mean(each for each in times if each <= longest_s) if times else 0.0
    rate = 1 / typical_s if typical_s > 0 else None
    misses, faults = after.misses - before.misses, after.faults - before.faults
    reuse = share(after.reused_bytes - before.reused_bytes, after.backed_bytes - before.backed_bytes)
    idle = after.fragmentation
    return {
        PASS_RATE: rate,
        "read_ahead_bytes": rate if misses else None,
        "l2_cache_size": share(after.hits - before.hits, after.lookups - before.lookups),
        "pool_compaction_interval": None if reuse is None or idle is None else reuse * (1 - idle),
        "tier_migration_interval": share(misses - faults, misses) if after.swap_reads > before.swap_reads else None,
    }


class AutoTuner:
    """Thread that tries one setting at a time while the model runs, and keeps the better ones.

    Args:
        pager: its `on_pass` hook is replaced; the previous hook is called first.
        parameters: parameters that may change.
        cache: cache whose hits are counted.
        knobs: knobs to try, in order.
        window_s, window_passes: minimum length of a window, in seconds and passes.
        timer: a monotonic clock in seconds.
        climbing: further arguments of `Climber`.

    Attributes:
        decisions: the latest decisions, oldest first.
    """

    def __init__(
        self,
        pager: Pager,
        parameters: Mapping[str, Parameter],
        *,
        cache: HierarchicalCacheSystem | None = None,
        knobs: Sequence[Knob] = KNOBS,
        window_s: float = WINDOW_S,
        window_passes: int = WINDOW_PASSES,
        timer: Callable[[], float] = time.monotonic,
        **climbing: Any,
    ) -> None:
        self.decisions: deque[Decision] = deque(maxlen=_REMEMBERED_DECISIONS)
        self._pager, self._parameters, self._cache = pager, parameters, cache
        self._climber = Climber(parameters, knobs, on_decision=self._note, **climbing)
        self._window_s, self._window_passes, self._timer = window_s, window_passes, timer
        self._windows = 0
        self._starts_s: deque[float] = deque(maxlen=_REMEMBERED_PASSES)
        self._before = Counters.of(pager, cache)
        before = pager.on_pass

        def on_pass() -> None:
            if before is not None:
                before()
            self._starts_s.append(timer())

        pager.on_pass = on_pass
        reference = weakref.ref(self)

        def work() -> bool:
            tuner = reference()
            if tuner is None:
                return False
            try:
                tuner.look()
            except MemoryOptimizationError:  # closed meanwhile
                return False
            return True

        self._periodic = Periodic(work, window_s / _LOOKS, "auto-tuning")

    def start(self) -> None:
        """Start the thread."""
        self._periodic.start()

    def close(self) -> None:
        """Stop the thread; current settings stay."""
        self._periodic.close()

    @property
    def resting(self) -> bool:
        """Whether trials pause because no step was better."""
        return self._climber.resting

    def look(self) -> bool:
        """End the window if it is full and apply changes; return whether it ended."""
        count = len(self._starts_s)
        if count <= self._window_passes or self._starts_s[count - 1] - self._starts_s[0] < self._window_s:
            return False
        starts_s = [self._starts_s.popleft() for _ in range(count - 1)]  # the last one starts the next window
        starts_s.append(self._starts_s[0])
        after = Counters.of(self._pager, self._cache)
        figures = figures_of(self._before, after, starts_s)
        self._before = after
        self._windows += 1
        for change in self._climber.step(figures):
            self._parameters[change.parameter].set(change.value)
        return True

    def _note(self, decision: Decision) -> None:
        self.decisions.append(decision)
        logger.info("%s", describe(decision, self._parameters[decision.parameter].unit))

    def log(self) -> list[str]:
        """Return the decisions as lines of text, oldest first."""
        return [describe(each, self._parameters[each.parameter].unit) for each in self.decisions]

    def stats(self) -> dict[str, Any]:
        """Return the number of windows, the current values and the decisions."""
        return {
            "windows": self._windows,
            "resting": self.resting,
            "values": {name: parameter.read() for name, parameter in self._parameters.items()},
            "decisions": [dataclasses.asdict(each) for each in self.decisions],
        }


def describe(decision: Decision, unit: str) -> str:
    """Return a decision as a line of text."""
    before, after = (
        f"{each:.4g}" if each is not None else "-" for each in (decision.figure_before, decision.figure_after)
    )
    verdict = "kept" if decision.kept else "reverted"
    return (
        f"window {decision.window}: {decision.parameter} {decision.before:g} -> {decision.after:g} {unit} {verdict}: "
        f"figure {before} -> {after}, {decision.why}"
    )
