"""`TensorLifecycleTracker`: who made what, in which session and phase, and what outlives its session."""

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
    """A thing that takes memory, and its past. Times are rounds.

    Attributes:
        kind: of the tensor, or of the cached result.
        creator: what made it: a place in the caller's code, or the part of this library.
        session, phase: in which it was made; `session` is `None` outside of all.
        owned: it belongs to somebody: it goes when its last reference does, and nobody else may let it go.
        references: weak ones, to the objects through which it is used; a thing that is kept by nobody has none.
        gap: mean between uses; 0: used once.
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
        """How many of the objects through which it is used are alive."""
        return sum(reference() is not None for reference in self.references)


@dataclass(frozen=True, slots=True)
class Leak:
    """A tensor that was alive when the session it was made in ended."""

    tensor_id: str
    kind: str
    n_bytes: int
    creator: str
    session: int
    phase: str


class TensorLifecycleTracker:
    """Follows lives, in rounds: a round ends with a session, or with a while in which something was used outside one.

    Its lock is a leaf: nothing is called while it is held. What died is noted without it, as finalizers have to, and
    counted by whoever takes it next.

    Attributes:
        now: rounds so far.
    """

    def __init__(self) -> None:
        self.now = 0
        self._listeners: tuple[Callable[[str], None], ...] = ()
        self.lives: dict[Hashable, TensorLife] = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._open: dict[int, int] = {}  # session -> thread, the latest last
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
        """How many sessions are open, nested ones counted."""
        return len(self._open)

    def begin_session(self) -> int:
        """Open a session of this thread and return its number."""
        with self._locked():
            number = next(self._numbers)
            self._open[number] = threading.get_ident()
            return number

    def end_session(self) -> int:
        """Close the latest session of this thread, or of any where it has none, and return its number.

        What was made in it and is still referenced is noted as a leak (`leaks`).

        Raises:
            ConfigurationError: none is open.
        """
        with self._locked():
            if not self._open:
                raise ConfigurationError("end_inference_session: no session is open")
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
            logger.info("session %d ended; %d tensors outlive it, %s", number, len(found), format_bytes(n_bytes))
        return number

    def _session(self) -> int | None:
        """Return the latest session of this thread, or of any where it has none."""
        thread = threading.get_ident()
        mine = (number for number in reversed(self._open) if self._open[number] == thread)
        return next(mine, next(reversed(self._open), None))

    @property
    def phase(self) -> str:
        """What is being computed: `vision`, `prefill`, `decode`; `idle` once a session ended."""
        return self._phase

    def enter_phase(self, phase: str) -> None:
        """Note what is being computed from now on, in the session that is open."""
        if self._open:
            self._change_phase(phase)

    def _change_phase(self, phase: str) -> None:
        if phase != self._phase:
            self._phase = phase
            for listener in self._listeners:
                listener(phase)

    def listen(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Call `listener` with each phase that begins, in the thread that computes it; return what ends that."""
        with self._locked():
            self._listeners = (*self._listeners, listener)

        def end() -> None:
            with self._locked():
                self._listeners = tuple(each for each in self._listeners if each is not listener)

        return end

    def leaks(self) -> list[Leak]:
        """Return the latest tensors that outlived their session, and still do, the oldest first."""
        with self._locked():
            return [leak for leak in self._leaks if leak.tensor_id in self.lives]

    # --- lives --------------------------------------------------------------------------------------------------------

    def born(
        self, key: Hashable, kind: str, n_bytes: int, creator: str, *, owned: bool, reference: object | None = None
    ) -> TensorLife:
        """Note that something came, and was used.

        Args:
            key: of the thing, not known so far.
            kind, n_bytes, creator, owned: see `TensorLife`.
            reference: the object through which it is used.
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
        """Note an object through which something is used, and who made it. The thing may be unknown."""
        with self._locked():
            life = self.lives.get(key)
            if life is not None:
                life.references.append(weakref.ref(reference))
                life.creator = creator

    def used(self, key: Hashable) -> None:
        """Note a use. The thing may be unknown."""
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
        """Record whether callers hold these tensors from now on; the collector may free the others."""
        with self._locked():
            for key in keys:
                life = self.lives.get(key)
                if life is not None:
                    life.owned = owned

    def died(self, key: Hashable) -> None:
        """Note that something is gone for good; never waits. The thing may be unknown."""
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
        """End a round; return how many there were."""
        with self._locked():
            self.now += 1
            return self.now

    def situation(self, life: TensorLife) -> Situation:
        """Return what is known of something now."""
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
        """Return the lives for which `wanted` says so; it must call nothing of the tracker."""
        with self._locked():
            return [life for life in self.lives.values() if wanted(life)]

    def stats(self) -> dict[str, Any]:
        """Return births, deaths, mean length of finished lives in rounds and those alive, a kind; and leaks."""
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
