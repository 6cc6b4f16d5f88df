"""`HierarchicalCacheSystem`: the cache levels, and movement between them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..config import MemoryConfig
from ..errors import MemoryBudgetExceeded
from ..interrupts import shield
from ..prediction import UseCounts
from .budget import STAGE_BYTES, CacheBudget, Unlimited
from .collecting import CacheStore
from .flights import Flight, Flights
from .item import CacheItem, EncodedItem
from .memory import CPUCache, GPUCache
from .ssd import SSDCache

_NEW_SHARE = 0.3
_CHEAPER = 0.9
"""A read must be predicted to take less than this share of the compute time, because predictions are inexact."""


class HierarchicalCacheSystem:
    """Content-addressed entries in GPU memory, RAM and on the SSD.

    Computed results go to memory and to the SSD, each with its own admission. SSD hits move up to memory if they are
    now worth it. Entries evicted from memory move down unless they are already there. An SSD entry is read only if
    that is predicted to be faster than recomputing it.

    Args:
        config: sizes, switches, private mode and directory.
        budget: budget for the memory.
        directory: directory of the SSD level; overrides the configuration.
        timer: a monotonic clock in seconds.

    Attributes:
        l1_cache, l2_cache, l3_cache: the levels; `None`: switched off.
    """

    def __init__(
        self,
        config: MemoryConfig | None = None,
        *,
        budget: CacheBudget | None = None,
        directory: str | Path | None = None,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        config = config or MemoryConfig()
        self._budget = budget or Unlimited()
        self.l1_cache = GPUCache(config.l1_cache_size) if config.enable_l1_gpu_cache else None
        self.l2_cache = None
        if config.enable_l2_cpu_cache:
            self.l2_cache = CPUCache(
                config.l2_cache_size, budget=budget, codec=config.reuse_codec, on_evict=self._move_down
            )
        self.l3_cache = None
        if config.enable_l3_ssd_cache and not config.private:
            self.l3_cache = SSDCache(
                config.l3_cache_size, directory or config.reuse_dir, codec=config.reuse_codec, timer=timer
            )
        self._listeners: tuple[Callable[[str, int, str], None], ...] = ()
        self._timer = timer
        self._counts = UseCounts()
        self._counts_lock = threading.Lock()
        self._flights = Flights()
        self._seconds_per_unit: dict[str, float] = {}
        self._computed_s = 0.0

    # --- entries ------------------------------------------------------------------------------------------------------

    def get(self, key: str, *, compute_s: float | None = None, copy: bool = True) -> CacheItem | None:
        """Return an entry, or `None`.

        Args:
            key: 64 hexadecimal digits (see `digest`).
            compute_s: expected time to recompute it; `None`: the time recorded when it was stored.
            copy: return separate memory; otherwise the entry may share memory with the cache and must not be modified.
        """
        item = self._found(key, compute_s, copy)
        if item is not None:
            self._tell(key, item, "general")
        return item

    def listen(self, listener: Callable[[str, int, str], None]) -> None:
        """Call `listener` at each use of an entry, found or new, with its key, bytes and kind.

        The kind is that of `put`; it is `general` for a found entry that was not reported to any listener before.
        """
        self._listeners = (*self._listeners, listener)

    def _tell(self, key: str, item: CacheItem, kind: str) -> None:
        for listener in self._listeners:
            listener(key, item.n_bytes, kind)

    def _found(self, key: str, compute_s: float | None, copy: bool) -> CacheItem | None:
        with self._counts_lock:
            self._counts.record(key)
            uses = self._counts.of(key)
        start_s = self._timer()
        for level in (self.l1_cache, self.l2_cache):
            item = None if level is None else level.load(key, uses=uses, copy=copy)
            if level is not None and item is not None:
                level.counters.saved_s += max(0.0, (compute_s or 0.0) - (self._timer() - start_s))
                return item
        return self._from_ssd(key, compute_s, uses)

    def _from_ssd(self, key: str, compute_s: float | None, uses: int) -> CacheItem | None:
        level = self.l3_cache
        if level is None:
            return None
        if compute_s is None:
            compute_s = level.noted_saved_s(key)
        read_s = level.predict_read_s(key)
        if read_s is not None and compute_s is not None and read_s > _CHEAPER * compute_s:
            level.counters.declined += 1
            return None
        start_s = self._timer()
        item = level.load(key, uses=uses)
        if item is None:
            return None
        level.counters.saved_s += max(0.0, (compute_s or 0.0) - (self._timer() - start_s))
        if self.l2_cache is not None and self.l2_cache.store(key, item, saved_s=compute_s or 0.0, uses=uses, kind=""):
            self.l2_cache.counters.migrations += 1
        return item

    def put(
        self,
        key: str,
        item: CacheItem,
        *,
        saved_s: float,
        kind: str = "general",
        persist: bool = True,
        label: str | None = None,
    ) -> None:
        """Offer an item to the levels.

        Args:
            key: 64 hexadecimal digits.
            item: copied by each level that stores it.
            saved_s: expected seconds saved per hit.
            kind: a label for display.
            persist: also offer it to the SSD.
            label: what it was made from, for listing the SSD.
        """
        uses = self._counts.of(key)
        self._tell(key, item, kind)
        if self.l1_cache is not None and self.l1_cache.available:
            self.l1_cache.store(key, item, saved_s=saved_s, uses=uses)
        if self.l2_cache is not None:
            self.l2_cache.store(key, item, saved_s=saved_s, uses=uses, kind=kind if persist else None)
        if persist and self.l3_cache is not None:
            try:
                with self._budget.workspace(STAGE_BYTES):
                    self.l3_cache.store(key, item, saved_s=saved_s, uses=uses, kind=kind, label=label)
            except MemoryBudgetExceeded:  # no room for the write buffer: the entry will be recomputed
                self.l3_cache.counters.refused += 1

    def get_or_compute(
        self, key: str, compute: Callable[[], CacheItem], *, kind: str = "general", units: float = 1.0
    ) -> CacheItem:
        """Return an entry, computing it with `compute` if missing; concurrent requests compute it once.

        Args:
            key: 64 hexadecimal digits.
            compute: called without arguments.
            kind: kind of the item; compute time within a kind is assumed proportional to the units.
            units: work for this item, in any unit.
        """
        return self.resolve([key], lambda indices: [compute()], kind=kind, units=[units])[0]

    def resolve(
        self,
        keys: Sequence[str],
        compute: Callable[[list[int]], Sequence[CacheItem]],
        *,
        kind: str,
        units: Sequence[float],
        accepts: Callable[[int, CacheItem], bool] = lambda index, item: True,
        persist: bool = True,
        labels: Sequence[str] = (),
    ) -> list[CacheItem]:
        """Return several entries; missing ones are computed in one call.

        Args:
            keys: 64 hexadecimal digits each; duplicates are allowed.
            compute: called with the positions of the missing entries, each key once; returns their items.
            kind: as in `get_or_compute`.
            units: work for each item.
            accepts: returns whether the caller can use an entry that was found.
            persist: also store new ones on the SSD.
            labels: what each was made from, for listing the SSD; may be empty.
        """
        found: dict[str, CacheItem] = {}
        position: dict[str, int] = {}
        for index, key in enumerate(keys):
            position.setdefault(key, index)
        while len(found) < len(position):
            mine: dict[str, Flight] = {}
            others: dict[str, Flight] = {}
            try:
                with shield:
                    mine, others = self._flights.claim(key for key in position if key not in found)
                missing = []
                for key, flight in list(mine.items()):
                    index = position[key]
                    item = self.get(key, compute_s=self.predict_compute_s(kind, units[index]))
                    if item is not None and accepts(index, item):
                        found[key] = item
                        with shield:
                            self._flights.land(key, mine.pop(key), item)
                        del flight
                    else:
                        missing.append(index)
                if missing:
                    for index, item in zip(missing, self._computed(compute, missing, kind, units), strict=True):
                        key = keys[index]
                        found[key] = item
                        with shield:
                            self._flights.land(key, mine.pop(key), item)
                        saved_s = self.predict_compute_s(kind, units[index]) or 0.0
                        label = labels[index] if index < len(labels) else None
                        self.put(key, item, saved_s=saved_s, kind=kind, persist=persist, label=label)
            finally:
                with shield:
                    for key, flight in mine.items():
                        self._flights.land(key, flight, None)
            for key, flight in others.items():
                shared = flight.wait()
                if shared is not None:
                    found[key] = CacheItem({name: each.clone() for name, each in shared.tensors.items()}, shared.meta)
        return [found[key] for key in keys]

    def _computed(
        self,
        compute: Callable[[list[int]], Sequence[CacheItem]],
        missing: list[int],
        kind: str,
        units: Sequence[float],
    ) -> Sequence[CacheItem]:
        start_s = self._timer()
        items = compute(missing)
        self.note_compute_s(kind, sum(units[index] for index in missing), self._timer() - start_s)
        return items

    # --- predictions --------------------------------------------------------------------------------------------------

    def predict_compute_s(self, kind: str, units: float) -> float | None:
        """Return the expected time for this much work of a kind, or `None` before the first measurement."""
        rate = self._seconds_per_unit.get(kind)
        if rate is None and self.l3_cache is not None:
            stored = self.l3_cache.store_files.index().state.get(_rate_name(kind))
            rate = float(stored) if isinstance(stored, int | float) else None
            if rate is not None:
                self._seconds_per_unit[kind] = rate
        return None if rate is None else rate * units

    def note_compute_s(self, kind: str, units: float, seconds: float) -> None:
        """Record how long work of a kind took."""
        if units > 0 and seconds >= 0:
            self._computed_s += seconds
            rate, before = seconds / units, self._seconds_per_unit.get(kind)
            self._seconds_per_unit[kind] = rate if before is None else before + _NEW_SHARE * (rate - before)

    def predict_load_s(self, key: str) -> float | None:
        """Return the expected load time of an entry, or `None` if no level has it."""
        if any(level is not None and key in level for level in (self.l1_cache, self.l2_cache)):
            return 0.0
        return None if self.l3_cache is None else self.l3_cache.predict_read_s(key)

    # --- the whole ----------------------------------------------------------------------------------------------------

    def collectable(self) -> CacheStore | None:
        """Return the entries that a collector may release; `None` without a level in memory."""
        return None if self.l2_cache is None else CacheStore(self.l2_cache, self.l3_cache)

    def make_room(self, growth_bytes: int = 0) -> None:
        """Give back the memory that the budget needs now, and for `growth_bytes` about to be reserved."""
        if self.l2_cache is not None:
            self.l2_cache.fit(growth_bytes)

    def stats(self) -> dict[str, Any]:
        """Return the figures of each level and the overall `hit_rate`: requests served by any level.

        The entry of a level that is switched off is `None`; a GPU level without a device reports that.
        """
        levels = {"gpu": self.l1_cache, "cpu": self.l2_cache, "ssd": self.l3_cache}
        rows = {name: None if level is None else level.stats() for name, level in levels.items()}
        there = [row for row in rows.values() if row is not None]
        hits = sum(row["hits"] for row in there)
        lookups = sum(self._lookups())
        return {
            "levels": rows,
            "hits": hits,
            "misses": lookups - hits if there else 0,
            "hit_rate": hits / lookups if lookups else None,
            "saved_s": sum(row["saved_s"] for row in there),
            "computed_s": self._computed_s,
            "seconds_per_unit": dict(self._seconds_per_unit),
        }

    def _lookups(self) -> tuple[int, int]:
        """Return requests that ended in a level above the lowest, and those that reached the lowest."""
        levels = [level for level in (self.l1_cache, self.l2_cache, self.l3_cache) if level is not None]
        if not levels:
            return 0, 0
        *above, lowest = (level.counters for level in levels)
        return sum(each.hits for each in above), lowest.hits + lowest.misses + lowest.declined

    def clear(self) -> None:
        """Remove all entries, including those on the SSD."""
        for level in (self.l1_cache, self.l2_cache, self.l3_cache):
            if level is not None:
                level.clear()

    def close(self) -> None:
        """Release the memory; save learned figures beside the SSD entries, which stay."""
        for level in (self.l1_cache, self.l2_cache):
            if level is not None:
                level.clear()
        if self.l3_cache is not None:
            rates = {_rate_name(kind): rate for kind, rate in self._seconds_per_unit.items()}
            self.l3_cache.close(rates)

    def _move_down(self, key: str, encoded: EncodedItem, saved_s: float, kind: str | None) -> None:
        level = self.l3_cache
        if level is None or kind is None or level.store_files.size_of(key) is not None:
            return
        if level.store_encoded(key, encoded, saved_s=saved_s, uses=self._counts.of(key), kind=kind):
            level.counters.migrations += 1


def _rate_name(kind: str) -> str:
    return f"seconds_per_unit {kind}"
