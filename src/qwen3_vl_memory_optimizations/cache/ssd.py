"""`SSDCache`: the level that survives the process, on a `ContentStore`.

Failures are logged as text: a handler that keeps the error would keep the frames of all callers, and their tensors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..config import MemoryConfig
from ..errors import ConfigurationError, CorruptDataError, StorageError
from ..prediction import choose_victims, worth
from ..storage import ContentStore, Facts, Index
from .item import CODECS, LOSSLESS, CacheItem, EncodedItem, decode, encode, split_payload
from .memory import MOST_SHARE
from .stats import LevelStats

logger = logging.getLogger(__name__)

_FIRST_BYTES_PER_S = 200e6
"""Read bandwidth assumed until it is measured: low, so that a first hit is worthwhile on any SSD."""
_FIXED_S = 0.0005
_NEW_SHARE = 0.3


class SSDCache:
    """Entries on the SSD; other processes may share the directory.

    Args:
        size: maximum bytes of its files.
        directory: directory of the files, created with the first entry; default: `reuse` in the cache directory.
        codec: `lossless`, or `int8` for floating-point tensors that lose less than 2 %.
        timer: a monotonic clock in seconds.

    Raises:
        ConfigurationError: an unknown codec.
    """

    level = "ssd"

    def __init__(
        self,
        size: int = 5 * 2**30,
        directory: str | Path | None = None,
        *,
        codec: str = LOSSLESS,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        if codec not in CODECS:
            raise ConfigurationError(f"codec: {codec!r} is not one of {', '.join(CODECS)}")
        self.size_bytes = int(size)
        self.codec = codec
        self.counters = LevelStats()
        self.store_files = ContentStore(MemoryConfig().reuse_dir if directory is None else directory)
        self._timer = timer
        self._measured_bytes_per_s: float | None = None
        self._mine: set[str] = set()  # stored by this process, and not found again yet

    @property
    def directory(self) -> Path:
        """Directory of the files."""
        return self.store_files.directory

    def predict_read_s(self, key: str) -> float | None:
        """Return the expected read time of an entry, or `None` if it is not stored."""
        n_bytes = self.store_files.size_of(key)
        return None if n_bytes is None else _FIXED_S + n_bytes / self.read_bytes_per_s()

    def noted_saved_s(self, key: str) -> float | None:
        """Return the seconds saved per hit as expected when the entry was written, or `None` if unknown."""
        entry = self.store_files.index().entries.get(key)
        return None if entry is None else _number(entry.facts, "saved_s") or None

    def read_bytes_per_s(self) -> float:
        """Return the measured read bandwidth of entries, including checks."""
        if self._measured_bytes_per_s is None:
            stored = self.store_files.index().state.get("read_bytes_per_s")
            self._measured_bytes_per_s = float(stored) if isinstance(stored, int | float) and stored > 0 else None
        return self._measured_bytes_per_s or _FIRST_BYTES_PER_S

    def load(self, key: str, *, uses: int = 1) -> CacheItem | None:
        """Return an entry, or `None`; a damaged file is logged and counted, and also gives `None`.

        Args:
            key: key of the entry.
            uses: number of recent requests for it.
        """
        start_s = self._timer()
        try:
            loaded = self.store_files.read(key)
            item = None
            if loaded is not None:
                item = decode(split_payload(loaded.meta, loaded.payload), copy=False)
        except (CorruptDataError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            logger.warning("a damaged cache entry is removed: %s", str(error))
            self.counters.corrupt += 1
            self._remove(key)
            loaded = item = None
        except StorageError as error:
            logger.warning("a cache entry cannot be read now: %s", str(error))
            self.counters.failures += 1
            loaded = item = None
        if loaded is None or item is None:
            self.counters.misses += 1
            return None
        self._note_read(loaded.file_bytes, self._timer() - start_s)
        self.counters.hits += 1
        self.counters.hit_bytes += loaded.file_bytes
        if key in self._mine:
            self._mine.discard(key)
            self.counters.reused += 1
        self._note_use(key, loaded.file_bytes, uses)
        return item

    def note_hit(self, key: str) -> None:
        """Record that an entry was found and read by other means than `load`."""
        n_bytes = self.store_files.size_of(key) or 0
        self.counters.hits += 1
        self.counters.hit_bytes += n_bytes
        if key in self._mine:
            self._mine.discard(key)
            self.counters.reused += 1
        self._note_use(key, n_bytes, 1)

    def store(
        self,
        key: str,
        item: CacheItem,
        *,
        saved_s: float,
        uses: int = 1,
        kind: str = "general",
        label: str | None = None,
    ) -> bool:
        """Write an item if it is worth more than what it would evict; return whether it is stored.

        Args:
            key: key of the entry.
            item: the item to write.
            saved_s: expected seconds saved per hit.
            uses: number of recent requests for it.
            kind: what the item is, for listing the directory.
            label: what it was made from, for listing: a file name, or the beginning of a prompt.
        """
        return self.store_encoded(key, encode(item, self.codec), saved_s=saved_s, uses=uses, kind=kind, label=label)

    def store_encoded(
        self,
        key: str,
        encoded: EncodedItem,
        *,
        saved_s: float,
        uses: int = 1,
        kind: str = "general",
        label: str | None = None,
        group: str | None = None,
    ) -> bool:
        """Store an item that another level has already encoded; otherwise like `store`.

        Args:
            key, encoded, saved_s, uses, kind, label: see `store`.
            group: entries with the same group are listed as one result.
        """
        if encoded.n_bytes > self.size_bytes // MOST_SHARE:
            self.counters.refused += 1
            return False
        if self.store_files.size_of(key) is not None:
            return True
        now = time.time()
        facts: Facts = {"kind": kind, "saved_s": saved_s, "uses": uses, "used_at": now, "made_at": now}
        facts |= {name: text for name, text in (("label", label), ("group", group)) if text}

        def make_room(index: Index, file_bytes: int) -> list[str] | None:
            clock = float(index.state.get("clock", 0.0))
            facts["worth"] = worth(clock, uses, saved_s, file_bytes)
            by_use = sorted(index.entries.items(), key=lambda item: _number(item[1].facts, "used_at"))
            victims = choose_victims(
                {each: (_number(entry.facts, "worth"), entry.n_bytes) for each, entry in by_use},
                index.used_bytes + file_bytes - self.size_bytes,
                facts["worth"],
            )
            for victim in victims or ():
                index.state["clock"] = max(clock, _number(index.entries[victim].facts, "worth"))
                self.counters.evictions += 1
                self.counters.evicted_bytes += index.entries[victim].n_bytes
            return victims

        try:
            kept = self.store_files.put(key, encoded.description, encoded.pieces(), facts, make_room)
        except StorageError as error:
            logger.warning("an entry was not cached: %s", str(error))
            self.counters.failures += 1
            return False
        if not kept:
            self.counters.refused += 1
            return False
        self._mine.add(key)
        self.counters.admitted += 1
        self.counters.admitted_bytes += encoded.n_bytes
        return True

    def remove(self, key: str) -> None:
        """Remove an entry."""
        self.store_files.remove(key)

    def clear(self) -> int:
        """Remove all entries and return how many there were.

        Raises:
            StorageError: another process is writing, or the directory cannot be changed.
        """
        return self.store_files.clear()

    def close(self, learnt: Mapping[str, float] | None = None) -> None:
        """Save learned figures: uses, worth, the bandwidth.

        Args:
            learnt: other figures to keep beside the entries.
        """
        measured = self._measured_bytes_per_s

        def note(state: Facts) -> None:
            state.update(learnt or {})
            if measured is not None:
                state["read_bytes_per_s"] = measured

        try:
            self.store_files.flush(note)
        except StorageError as error:
            logger.warning("the learned figures of cache entries could not be saved: %s", str(error))

    def stats(self) -> dict[str, Any]:
        """Return counters, bytes held and ratios, and the read bandwidth (`None` before the first read)."""
        index = self.store_files.index()
        return {
            "directory": str(self.directory),
            **self.counters.as_dict(
                entries=len(index.entries), used_bytes=index.used_bytes, size_bytes=self.size_bytes
            ),
            "read_bytes_per_s": self._measured_bytes_per_s,
        }

    def _note_read(self, n_bytes: int, seconds: float) -> None:
        if seconds > 0:
            rate = n_bytes / seconds
            before = self._measured_bytes_per_s
            self._measured_bytes_per_s = rate if before is None else before + _NEW_SHARE * (rate - before)

    def _note_use(self, key: str, n_bytes: int, uses: int) -> None:
        clock = float(self.store_files.index().state.get("clock", 0.0))

        def change(facts: Facts) -> None:
            facts["uses"] = max(uses, int(_number(facts, "uses")) + 1)
            facts["used_at"] = time.time()
            facts["worth"] = worth(clock, facts["uses"], _number(facts, "saved_s"), n_bytes)

        self.store_files.note(key, change)

    def _remove(self, key: str) -> None:
        try:
            self.store_files.remove(key)
        except StorageError as error:
            logger.warning("a cache entry could not be removed: %s", str(error))


def _number(facts: Facts, name: str) -> float:
    value = facts.get(name, 0.0)
    return float(value) if isinstance(value, int | float) else 0.0
