"""`MemoryTieringSystem`: prefetches runtime tensors from the SSD into free memory (specification 2.5)."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..config import MemoryConfig
from ..errors import ConfigurationError, MemoryOptimizationError
from ..hardware import detect_gpu
from ..paging import Pager, PageState
from ..periodic import Periodic
from ..prediction import LightweightMLPredictor, NextUse
from ..prediction.mlp import features_of
from ..process import usable_memory

logger = logging.getLogger(__name__)

_SHARES = {"gpu": (0.7, 1), "cpu": (0.5, 2), "ssd": (0.8, 3)}
_MOST_BROUGHT = 8
"""Per round: predictions farther ahead may change before the next."""


def tier_memory(path: Path | None = None) -> dict[str, int | None]:
    """Return the size of each tier of this machine in bytes; `None`: no such tier.

    Args:
        path: a file or directory, existing or not, on the disk of the `ssd` tier; default: the cache directory.
    """
    gpu = detect_gpu()
    path = (MemoryConfig().base_dir if path is None else path).absolute()
    there = next(each for each in (path, *path.parents) if each.exists())
    return {
        "gpu": None if gpu is None else gpu.total_bytes,
        "cpu": usable_memory()[0],
        "ssd": shutil.disk_usage(there).free,
    }


class MemoryTieringSystem:
    """Follows the uses of runtime tensors and, at each interval, prefetches those expected soonest.

    It fills only free memory, up to the capacity of the tier, one read at a time at the lowest priority, so it evicts
    nothing and delays nothing. (`MemorySwappingSystem` decides evictions; weights follow their schedule.) Until the
    network has enough examples, or while it is worse, each tensor's own history ranks the tensors (`NextUse`).

    Args:
        memory: size of each tier in bytes by name; `None` or missing: no such tier. Default: this machine's
            (`tier_memory`).

    Attributes:
        tiers: name -> `capacity` (a share of the tier's size, in bytes, or `None`) and `priority`.
        predictor: predicts waits until the next use.
        unwanted: returns whether a tensor on the SSD is not expected to be used, and should stay there.
        migrations: tensors prefetched; `useful_migrations`: those of them used before they left again.
    """

    def __init__(self, memory: Mapping[str, int | None] | None = None) -> None:
        there = tier_memory() if memory is None else memory
        self.tiers: dict[str, dict[str, Any]] = {}
        for name, (share, priority) in _SHARES.items():
            n_bytes = there.get(name)
            self.tiers[name] = {"capacity": None if n_bytes is None else int(share * n_bytes), "priority": priority}
        self.predictor = LightweightMLPredictor()
        self.unwanted: Callable[[str], bool] | None = None
        self.migrations = 0
        self.useful_migrations = 0
        self._next_use = NextUse()
        self._known: dict[str, tuple[int, str]] = {}  # id -> bytes, kind
        self._brought: set[str] = set()  # prefetched, and neither used nor evicted since
        self._coming: dict[str, bool] = {}  # being prefetched -> used meanwhile
        self._pager: weakref.ref[Pager] | None = None
        self._lock = threading.Lock()
        self._path: Path | None = None
        self._periodic: Periodic | None = None

    def note(self, tensor_id: str, n_bytes: int, kind: str) -> None:
        """Record a use; uses of weights are ignored."""
        if kind == "weights":
            return
        with self._lock:
            history = self._next_use.history(tensor_id)
            if history is not None:
                rule = functools.partial(self._next_use.wait, tensor_id)
                self.predictor.observe(history, self._next_use.now + 1, n_bytes, kind, rule)
            self._next_use.use(tensor_id, len(self._known))
            self._known[tensor_id] = (n_bytes, kind)
            if tensor_id in self._brought or tensor_id in self._coming:
                used = not self._has_left(tensor_id)
                if tensor_id in self._brought:
                    self._brought.discard(tensor_id)
                    self.useful_migrations += used
                else:
                    self._coming[tensor_id] = used

    def _has_left(self, tensor_id: str) -> bool:
        """Return whether part of a tensor is, or will be, on the SSD only. The Pager's lock is held."""
        pager = None if self._pager is None else self._pager()
        entry = None if pager is None else pager.entries.get(tensor_id)
        leaving = (PageState.SWAPPED, PageState.WRITING)
        return entry is not None and any(page.state in leaving for page in entry.pages)

    def forget(self, tensor_id: str) -> None:
        """Forget a tensor that was freed."""
        with self._lock:
            self._known.pop(tensor_id, None)
            self._brought.discard(tensor_id)
            self._next_use.forget(tensor_id)

    def effectiveness(self) -> float | None:
        """Return the share of prefetched tensors used before they left again; `None` before the first."""
        return self.useful_migrations / self.migrations if self.migrations else None

    def waits(self, tensor_ids: list[str]) -> dict[str, float]:
        """Return the predicted wait of each known tensor, counted in uses of any runtime tensor."""
        with self._lock:
            known = [(each, self._next_use.history(each)) for each in tensor_ids if each in self._known]
            there = [(each, history) for each, history in known if history is not None]
            if not self.predictor.better:
                return {each: self._next_use.wait(each) for each, _ in there}
            now = self._next_use.now
            rows = [features_of(history, now, *self._known[each]) for each, history in there]
            return dict(zip((each for each, _ in there), self.predictor.predict(rows).tolist(), strict=True))

    def migrate(self, pager: Pager) -> int:
        """Train briefly and prefetch the tensors expected soonest; return how many are being read."""
        with self._lock:
            self.predictor.train()
            gone = [each for each in self._known if each not in pager.entries]
        for each in gone:
            self.forget(each)
        self._pager = weakref.ref(pager)
        out = pager.runtime.swapped_out()
        with self._lock:
            self._brought.difference_update(out)  # evicted again without a use
        away = [each for each in out if self.unwanted is None or not self.unwanted(each)]
        waits = self.waits(away)
        wanted = sorted(waits, key=lambda each: waits[each])[:_MOST_BROUGHT]
        fitting = self._within_capacity(pager, wanted)
        with self._lock:
            self._coming = dict.fromkeys(fitting, False)
        brought = pager.runtime.bring(fitting)  # lock order: the Pager's before this one (docs/locking.md)
        with self._lock:
            used = {each for each in brought if self._coming.get(each)}  # another round may have started
            self._coming = {}
            self._brought.update(set(brought) - used)
            self.migrations += len(brought)
            self.useful_migrations += len(used)
            self._brought.intersection_update(self._known)
        return len(brought)

    def _within_capacity(self, pager: Pager, tensor_ids: list[str]) -> list[str]:
        """Return the leading tensors that fit the memory allowed for runtime tensors."""
        capacity = self.tiers["cpu"]["capacity"]
        if capacity is None:
            return tensor_ids
        room = capacity - sum(use.resident_bytes for use in pager.usage() if use.kind != "weights")
        fitting = []
        for tensor_id in tensor_ids:
            room -= self._known.get(tensor_id, (0, ""))[0]
            if room < 0:
                break
            fitting.append(tensor_id)
        return fitting

    def explain(self) -> dict[str, Any]:
        """Return what ranks tensors now, both prediction errors, and the influence of each feature on the network."""
        with self._lock:
            return {
                "decides": "network" if self.predictor.better else "history",
                "errors": dict(self.predictor.errors),
                "examples": self.predictor.n_examples,
                "explanation": self.predictor.explain(),
            }

    def remember(self, path: Path) -> None:
        """Load the predictor saved by an earlier run, if any, and save this one on close.

        An invalid file is logged and replaced.
        """
        self._path = path
        if path.exists():
            try:
                self.predictor = LightweightMLPredictor.load(path)
            except ConfigurationError as error:
                logger.warning("tiering: the saved predictor is not used: %s", str(error))

    def _leave(self) -> None:
        if self._path is None or not self.predictor.n_examples or not self.predictor.ready:
            return
        partial = self._path.with_name(f"{self._path.stem}.{os.getpid()}.npz")
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            self.predictor.save(partial)
            os.replace(partial, self._path)
        except OSError as error:
            logger.warning("tiering: the predictor was not saved: %s", str(error))
            partial.unlink(missing_ok=True)

    def start(self, pager: Pager, interval_s: float) -> None:
        """Migrate at each interval in a thread that ends with the Pager or `close`."""
        reference = weakref.ref(pager)

        def work() -> bool:
            pager = reference()
            if pager is None:
                return False
            try:
                self.migrate(pager)
            except MemoryOptimizationError:  # closed meanwhile
                return False
            return True

        self._periodic = Periodic(work, interval_s, "memory-tiering")
        self._periodic.start()

    @property
    def interval_s(self) -> float | None:
        """Seconds between migrations; `None`: not started."""
        return None if self._periodic is None else self._periodic.interval_s

    def set_interval(self, interval_s: float) -> None:
        """Set the interval between migrations.

        Raises:
            ConfigurationError: not above zero, or `start` was not called.
        """
        if self._periodic is None:
            raise ConfigurationError(f"tiering: call start() before setting the interval to {interval_s!r} s")
        self._periodic.interval_s = interval_s

    def close(self) -> None:
        """Stop the thread and save the predictor (`remember`)."""
        if self._periodic is not None:
            self._periodic.close()
        with self._lock:
            self._leave()
            self._path = None
