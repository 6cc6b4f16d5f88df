"""`PredictiveGarbageCollector`: frees tensors not expected to be used again, in stages."""

from __future__ import annotations

import logging
import random
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import MemoryOptimizationError
from ..periodic import Periodic
from ..prediction import SimpleMLPredictor, Situation
from .lifecycle import IDLE, TensorLifecycleTracker
from .store import CollectableStore

logger = logging.getLogger(__name__)

_CALM = {"compress": 0.9, "swap": 0.95, "free": 0.98}
"""Required probability of no use within the horizon when all memory is free,"""
_PRESSED = {"compress": 0.5, "swap": 0.6, "free": 0.8}
"""and when none is."""
_FULL = 0.95
_ASKED_A_ROUND = 64
_MOST_COMPRESSED_BYTES = 64 << 20
"""Per collection: compression takes time that a request may need."""
_REMEMBERED_HORIZONS = 8
_MOST_REMEMBERED = 8192
_JUDGED = 256
_FORGET = 0.98
_PRIOR_HALF_LIFE = 0.4
"""Share of the horizon after which an idle tensor is half as likely to be used: the rule."""


@dataclass(slots=True)
class CollectionStats:
    """Counters since the start.

    Attributes:
        rounds, collections: see `TensorLifecycleTracker`, `collect`.
        compressed, swapped, freed: items, and the bytes of memory each released.
        decided: swapped or freed items with a known outcome: needed within the horizon or not.
        needed_again: those of them that were needed, then or later.
        predictions: predictions with a known outcome.
    """

    rounds: int = 0
    collections: int = 0
    compressed: int = 0
    compressed_bytes: int = 0
    swapped: int = 0
    swapped_bytes: int = 0
    freed: int = 0
    freed_bytes: int = 0
    decided: int = 0
    needed_again: int = 0
    predictions: int = 0


@dataclass(slots=True)
class _Question:
    """A prediction of use within the horizon, labelled later by what happens."""

    features: list[float]
    situation: Situation
    due: int
    decided: str
    answers: dict[str, float]


class PredictiveGarbageCollector:
    """Predicts which items in memory are used within a horizon, and releases the others.

    An item goes down one stage per collection: compressed losslessly, on the SSD only, freed. The required certainty
    falls as memory fills. Referenced tensors are never freed; a wrong prediction costs time, never data.

    Each round samples some items; their use within the horizon trains `ml_predictor`. Until it proves better than a
    simple rule (the longer idle, the less likely), the rule decides.

    Args:
        prediction_horizon: rounds (see `TensorLifecycleTracker`); with `generate`, about one round per request.
        tracker: lifecycle tracker; default: a new one.

    Attributes:
        tensor_lifecycle_tracker, ml_predictor: as in section 2.6 of the specification.
        stores: stores to collect from.
        counters: counters since the start.
    """

    def __init__(self, prediction_horizon: int = 10, tracker: TensorLifecycleTracker | None = None) -> None:
        self.prediction_horizon = prediction_horizon
        self.tensor_lifecycle_tracker = tracker or TensorLifecycleTracker()
        self.ml_predictor = SimpleMLPredictor()
        self.stores: list[CollectableStore] = []
        self.counters = CollectionStats()
        self._events: deque[tuple[Hashable, int, str] | None] = deque()  # uses, and ends of rounds
        self._questions: dict[Hashable, deque[_Question]] = {}
        self._collected: OrderedDict[Hashable, tuple[int, bool]] = OrderedDict()  # -> round, decided
        self._outcomes: deque[tuple[bool, bool]] = deque(maxlen=_JUDGED)  # prediction was right, was used
        self._errors = {"rule": 0.25, "regression": 0.25}
        self._random = random.Random(0)
        self._active = False
        self._lock = threading.RLock()  # before the locks of the stores
        self._periodic: Periodic | None = None

    # --- events -------------------------------------------------------------------------------------------------------

    def note(self, key: Hashable, n_bytes: int, kind: str) -> None:
        """Record a use of an unowned item, such as a cached result, and track new ones. Never blocks."""
        self._events.append((key, n_bytes, kind))

    def end_round(self) -> None:
        """End a round; the thread processes it, or this call if there is no thread."""
        self._events.append(None)
        if self._periodic is None:
            self.look()
        else:
            self._periodic.wake()

    def look(self) -> None:
        """Learn from finished rounds, and collect if due.

        Outside sessions, a round ends if anything was used; inside, nearly full memory triggers a collection.
        """
        with self._lock:
            ended = self._drain()
            if not self.tensor_lifecycle_tracker.sessions_open:
                self._poll()
                if self._active:
                    self._end_round()
                    ended = True
            if ended or any(store.pressure() >= _FULL for store in self.stores):
                self.collect()

    def _drain(self) -> bool:
        """Process events in order; return whether a round ended."""
        ended = False
        while self._events:
            event = self._events.popleft()
            if event is None:
                self._end_round()
                ended = True
            else:
                self._used_or_new(*event)
        return ended

    def _used_or_new(self, key: Hashable, n_bytes: int, kind: str) -> None:
        self._active = True
        if key in self.tensor_lifecycle_tracker.lives:
            self._used(key)
        else:
            self.tensor_lifecycle_tracker.born(key, kind, n_bytes, kind, owned=False)

    def _poll(self) -> None:
        for store in self.stores:
            for key in store.used():
                self._active = True
                self._used(key)

    def _end_round(self) -> None:
        """Record uses, learn from outcomes and sample new predictions."""
        self._poll()
        self._active = False
        self.tensor_lifecycle_tracker.next_round()
        self.counters.rounds += 1
        self._answer_due()
        self._forget_old()
        self._ask()
        self.ml_predictor.train()

    def _used(self, key: Hashable) -> None:
        self.tensor_lifecycle_tracker.used(key)
        for question in self._questions.pop(key, ()):
            self._answer(question, used=True)
        if key in self._collected:
            _, decided = self._collected.pop(key)
            self.counters.decided += not decided
            self.counters.needed_again += 1

    # --- predictions --------------------------------------------------------------------------------------------------

    @property
    def decides(self) -> str:
        """What predicts now: `regression`, or `rule` while that is at least as good."""
        better = self._errors["regression"] < self._errors["rule"]
        return "regression" if self.ml_predictor.ready and better else "rule"

    def reuse_probability(self, key: Hashable) -> float | None:
        """Return the probability that an item is used within the horizon; `None`: unknown item."""
        with self._lock:
            life = self.tensor_lifecycle_tracker.lives.get(key)
            return None if life is None else self._answers(self.tensor_lifecycle_tracker.situation(life))[self.decides]

    def _answers(self, situation: Situation, features: list[float] | None = None) -> dict[str, float]:
        answers = {"rule": self._rule(situation)}
        if self.ml_predictor.ready:
            features = features or self.ml_predictor.features_of(situation, answers["rule"])
            answers["regression"] = float(self.ml_predictor.predict([features])[0])
        return answers

    def _rule(self, situation: Situation) -> float:
        return 0.5 ** (situation.idle / (_PRIOR_HALF_LIFE * self.prediction_horizon))

    def _ask(self) -> None:
        tracker = self.tensor_lifecycle_tracker
        recent = tracker.now - self.prediction_horizon
        lives = tracker.select(lambda life: life.last_use >= recent)
        for life in self._random.sample(lives, min(_ASKED_A_ROUND, len(lives))):
            situation = tracker.situation(life)
            features = self.ml_predictor.features_of(situation, self._rule(situation))
            answers = self._answers(situation, features)
            question = _Question(features, situation, tracker.now + self.prediction_horizon, self.decides, answers)
            self._questions.setdefault(life.key, deque()).append(question)

    def _answer_due(self) -> None:
        now, lives = self.tensor_lifecycle_tracker.now, self.tensor_lifecycle_tracker.lives
        for key in list(self._questions):
            questions = self._questions[key]
            while questions and (questions[0].due <= now or key not in lives):
                self._answer(questions.popleft(), used=False)
            if not questions:
                del self._questions[key]
        for key, (collected, decided) in self._collected.items():
            if not decided and (now - collected >= self.prediction_horizon or key not in lives):
                self._collected[key] = (collected, True)
                self.counters.decided += 1

    def _answer(self, question: _Question, *, used: bool) -> None:
        counters = self.counters
        counters.predictions += 1
        self._outcomes.append(((question.answers[question.decided] >= 0.5) == used, used))
        for name, given in question.answers.items():
            self._errors[name] += (1 - _FORGET) * ((given - used) ** 2 - self._errors[name])
        self.ml_predictor.observe(question.features, question.situation, used)

    def _forget_old(self) -> None:
        """Forget items that are in no store and have long been unused."""
        tracker = self.tensor_lifecycle_tracker
        oldest = tracker.now - _REMEMBERED_HORIZONS * self.prediction_horizon
        here = {key for store in self.stores for key in store.held()}
        for life in tracker.select(lambda life: not life.owned and life.key not in here and life.last_use < oldest):
            tracker.died(life.key)
        while len(self._collected) > _MOST_REMEMBERED:
            self._collected.popitem(last=False)

    # --- collection ---------------------------------------------------------------------------------------------------

    def collect(self) -> int:
        """Move items not expected to be used again down one stage; return the bytes of memory freed."""
        with self._lock:
            self._drain()
            self._poll()
            self.counters.collections += 1
            return sum(self._collect_from(store) for store in self.stores)

    def _collect_from(self, store: CollectableStore) -> int:
        tracker = self.tensor_lifecycle_tracker
        pressure = min(max(store.pressure(), 0.0), 1.0)
        sure = {stage: calm + pressure * (_PRESSED[stage] - calm) for stage, calm in _CALM.items()}
        # Compression would compete with computing threads for the processor.
        freed, left = 0, _MOST_COMPRESSED_BYTES if tracker.phase == IDLE else 0
        for key, held in store.held().items():
            life = tracker.lives.get(key)
            if life is None or life.last_use == tracker.now:
                continue
            unused = 1 - self._answers(tracker.situation(life))[self.decides]
            if not held.compressed and unused >= sure["compress"] and held.n_bytes <= left:
                left -= held.n_bytes
                freed += self._compress(store, key)
            elif unused >= sure["swap"]:
                freed += self._let_go(store, key, may_free=unused >= sure["free"] and not life.owned)
        return freed

    def _compress(self, store: CollectableStore, key: Hashable) -> int:
        n_bytes = store.compress(key)
        self.counters.compressed += n_bytes > 0
        self.counters.compressed_bytes += n_bytes
        return n_bytes

    def _let_go(self, store: CollectableStore, key: Hashable, *, may_free: bool) -> int:
        """Swap an item out, or free it if it is unowned and would first have to be written."""
        frees = may_free and not store.is_stored(key)
        n_bytes = store.free(key) if frees else store.swap(key)
        if n_bytes:
            self._collected[key] = (self.tensor_lifecycle_tracker.now, False)
            if frees:
                self.counters.freed += 1
                self.counters.freed_bytes += n_bytes
            else:
                self.counters.swapped += 1
                self.counters.swapped_bytes += n_bytes
        return n_bytes

    def has_collected(self, key: Hashable) -> bool:
        """Return whether an item was released because no use of it is expected."""
        return key in self._collected

    # --- figures ------------------------------------------------------------------------------------------------------

    def success_rate(self) -> float | None:
        """Return the share of swapped or freed items not needed again; `None` before the first outcome.

        An outcome is known once an item is needed or its horizon ends; items needed even later count as needed.
        """
        decided = self.counters.decided
        return 1 - self.counters.needed_again / decided if decided else None

    def lifetime_accuracy(self) -> float | None:
        """Return the share of correct predictions of use within the horizon among the last 256, or `None`."""
        with self._lock:
            return sum(right for right, _ in self._outcomes) / len(self._outcomes) if self._outcomes else None

    def stats(self) -> dict[str, Any]:
        """Return counters, ratios, what predicts and why, and lifetimes.

        `base_rate` is the accuracy of always predicting the more common outcome.
        """
        with self._lock:
            n = len(self._outcomes)
            share = sum(used for _, used in self._outcomes) / n if n else None
            return {
                **asdict(self.counters),
                "success_rate": self.success_rate(),
                "lifetime_accuracy": self.lifetime_accuracy(),
                "base_rate": None if share is None else max(share, 1 - share),
                "decides": self.decides,
                "explanation": self.ml_predictor.explain(),
                "life_cycles": self.tensor_lifecycle_tracker.stats(),
            }

    # --- thread -------------------------------------------------------------------------------------------------------

    def start(self, interval_s: float) -> None:
        """Call `look` at each interval and end of a round, in a thread that ends with the collector or `close`."""
        reference = weakref.ref(self)

        def work() -> bool:
            collector = reference()
            if collector is None:
                return False
            try:
                collector.look()
            except MemoryOptimizationError as error:  # closed meanwhile, or the SSD is full
                logger.debug("collection failed: %s", str(error))
            return True

        self._periodic = Periodic(work, interval_s, "memory-collection")
        self._periodic.start()

    def close(self) -> None:
        """Stop the thread; later `end_round` calls process their rounds themselves."""
        if self._periodic is not None:
            self._periodic.close()
            self._periodic = None
