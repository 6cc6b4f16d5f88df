"""`TensorLifecycleTracker`: creator, session and phase of each tensor, and tensors that outlive their session."""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import ConfigurationError, format_bytes
from ..interrupts import shield
from ..prediction import Situation

logger = logging.getLogger(__name__)

IDLE = "idle"
_GAP_WEIGHT = 0.4
_MOST_LEAKS = 256


@dataclass(slots=True)
class TensorLife:
    """An item in memory and its history. Times are in rounds.

    Attributes:
        kind: kind of the tensor or cached result.
        creator: a location in the caller's code, or a part of this library.
        session, phase: where it was created; `session` is `None` outside sessions.
        owned: callers hold it: it lives until its last reference is gone, and the collector must not free it.
        references: weak references to the objects that use it; none for unowned items.
        gap: mean rounds between uses; 0: used once.
    """

    key: Hashable
    kind: str
    n_bytes: int
    creator: str
    session: int | None
    phase: str
    owned: bool
    born: int
    last_use: int
    uses: int = 1
    gap: float = 0.0
    references: list[weakref.ReferenceType[Any]] = field(default_factory=list)

    @property
    def reference_count(self) -> int:
        """Number of live objects that use it."""
        return sum(reference() is not None for reference in self.references)


@dataclass(frozen=True, slots=True)
class Leak:
    """A tensor that was still alive at the end of the session that created it."""

    tensor_id: str
    kind: str
    n_bytes: int
    creator: str
    session: int
    phase: str


class TensorLifecycleTracker:
    """Tracks lifetimes in rounds: a round ends with a session, or after an interval with uses outside one.

    Its lock is a leaf: no calls happen while it is held. Finalizers record deaths without the lock; the next holder
    counts them.

    Attributes:
        now: current round.
    """

    def __init__(self) -> None:
        self.now = 0
        self._listeners: tuple[Callable[[str], None], ...] = ()
        self.lives: dict[Hashable, TensorLife] = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._open: dict[int, int] = {}  # session -> thread, latest last
        self._phase = IDLE
        self._dead: deque[Hashable] = deque()
        self._births: Counter[str] = Counter()
        self._deaths: Counter[str] = Counter()
        self._lived: Counter[str] = Counter()
        self._leaks: deque[Leak] = deque(maxlen=_MOST_LEAKS)
        self._n_leaks = 0

    # --- sessions -----------------------------------------------------------------------------------------------------

    @property
    def sessions_open(self) -> int:
        """Number of open sessions, including nested ones."""
        return len(self._open)

    def begin_session(self) -> int:
        """Open a session on this thread and return its number."""
        with self._locked():
            number = next(self._numbers)
            self._open[number] = threading.get_ident()
            return number

    def end_session(self) -> int:
        """Close the latest session of this thread, else of any thread, and return its number.

        Tensors created in it and still referenced are recorded as leaks (`leaks`).

        Raises:
            ConfigurationError: no session is open.
        """
        with self._locked():
            if not self._open:
                raise ConfigurationError(
                    "end_inference_session: no session is open; call start_inference_session first"
                )
            number = self._session()
            assert number is not None
            del self._open[number]
            found = [
                Leak(str(life.key), life.kind, life.n_bytes, life.creator, number, life.phase)
                for life in self.lives.values()
                if life.session == number and life.owned and life.reference_count
            ]
            self._leaks.extend(found)
            self._n_leaks += len(found)
        self._change_phase(IDLE)
        if found:
            n_bytes = sum(leak.n_bytes for leak in found)
            logger.info(
                "session %d ended; %d of its tensors are still alive, %s", number, len(found), format_bytes(n_bytes)
            )
        return number

    def _session(self) -> int | None:
        """Return the latest session of this thread, else of any thread."""
        thread = threading.get_ident()
        mine = (number for number in reversed(self._open) if self._open[number] == thread)
        return next(mine, next(reversed(self._open), None))

    @property
    def phase(self) -> str:
        """Current phase: `vision`, `prefill` or `decode`; `idle` after a session."""
        return self._phase

    def enter_phase(self, phase: str) -> None:
        """Set the phase, if a session is open."""
        if self._open:
            self._change_phase(phase)

    def _change_phase(self, phase: str) -> None:
        if phase != self._phase:
            self._phase = phase
            for listener in self._listeners:
                listener(phase)

    def listen(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Call `listener` at the start of each phase, in the computing thread; return a function that stops this."""
        with self._locked():
            self._listeners = (*self._listeners, listener)

        def end() -> None:
            with self._locked():
                self._listeners = tuple(each for each in self._listeners if each is not listener)

        return end

    def leaks(self) -> list[Leak]:
        """Return live tensors that outlived their session, among the latest 256, oldest first."""
        with self._locked():
            return [leak for leak in self._leaks if leak.tensor_id in self.lives]

    # --- lives --------------------------------------------------------------------------------------------------------

    def born(
        self, key: Hashable, kind: str, n_bytes: int, creator: str, *, owned: bool, reference: object | None = None
    ) -> TensorLife:
        """Record a new item and its first use.

        Args:
            key: key of the item, not yet known.
            kind, n_bytes, creator, owned: see `TensorLife`.
            reference: the object that uses it.
        """
        with self._locked():
            session = self._session() if self._open else None
            life = TensorLife(key, kind, n_bytes, creator, session, self._phase, owned, self.now, self.now)
            if reference is not None:
                life.references.append(weakref.ref(reference))
            self.lives[key] = life
            self._births[kind] += 1
            return life

    def refer(self, key: Hashable, reference: object, creator: str) -> None:
        """Record an object that uses an item, and its creator. Unknown keys are ignored."""
        with self._locked():
            life = self.lives.get(key)
            if life is not None:
                life.references.append(weakref.ref(reference))
                life.creator = creator

    def used(self, key: Hashable) -> None:
        """Record a use. Unknown keys are ignored."""
        with self._locked():
            life = self.lives.get(key)
            if life is None:
                return
            gap = self.now - life.last_use
            if gap:
                life.gap = gap if not life.gap else life.gap + _GAP_WEIGHT * (gap - life.gap)
            life.last_use = self.now
            life.uses += 1

    def own(self, keys: Iterable[Hashable], owned: bool) -> None:
        """Record whether callers hold these tensors; the collector may free unowned ones."""
        with self._locked():
            for key in keys:
                life = self.lives.get(key)
                if life is not None:
                    life.owned = owned

    def died(self, key: Hashable) -> None:
        """Record that an item is gone. Never blocks; unknown keys are ignored."""
        self._dead.append(key)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with shield, self._lock:
            while self._dead:
                life = self.lives.pop(self._dead.popleft(), None)
                if life is not None:
                    self._deaths[life.kind] += 1
                    self._lived[life.kind] += self.now - life.born
            yield

    def next_round(self) -> int:
        """End a round; return the number of rounds so far."""
        with self._locked():
            self.now += 1
            return self.now

    def situation(self, life: TensorLife) -> Situation:
        """Return the current situation of an item."""
        return Situation(
            idle=self.now - life.last_use,
            uses=life.uses,
            age=self.now - life.born,
            gap=life.gap,
            n_bytes=life.n_bytes,
            creator=life.creator,
            session_open=life.session in self._open,
        )

    def select(self, wanted: Callable[[TensorLife], bool]) -> list[TensorLife]:
        """Return the items that `wanted` accepts; it must not call the tracker."""
        with self._locked():
            return [life for life in self.lives.values() if wanted(life)]

    def stats(self) -> dict[str, Any]:
        """Return births, deaths, mean lifetime in rounds and live items per kind; and leaks."""
        leaks = [asdict(leak) for leak in self.leaks()]
        with self._locked():
            alive: Counter[str] = Counter(life.kind for life in self.lives.values())
            alive_bytes: Counter[str] = Counter()
            for life in self.lives.values():
                alive_bytes[life.kind] += life.n_bytes
            return {
                "rounds": self.now,
                "phase": self._phase,
                "sessions_open": len(self._open),
                "kinds": {
                    kind: {
                        "births": births,
                        "deaths": self._deaths[kind],
                        "alive": alive[kind],
                        "alive_bytes": alive_bytes[kind],
                        "mean_rounds": self._lived[kind] / self._deaths[kind] if self._deaths[kind] else None,
                    }
                    for kind, births in sorted(self._births.items())
                },
                "outlived_sessions": self._n_leaks,
                "leaks": leaks,
            }
