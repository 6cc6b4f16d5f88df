"""Single flight: one thread computes what several request at once."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from .item import CacheItem


class Flight:
    """A key that one thread looks up or computes while others wait.

    Attributes:
        item: the result, once available; `None` after a failure.
    """

    def __init__(self) -> None:
        self.item: CacheItem | None = None
        self._landed = threading.Event()

    def land(self, item: CacheItem | None) -> None:
        """Give waiting threads the result, or `None`, after which one of them must try."""
        self.item = item
        self._landed.set()

    def wait(self) -> CacheItem | None:
        """Wait for the result."""
        self._landed.wait()
        return self.item


class Flights:
    """The flights in progress, by key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_key: dict[str, Flight] = {}

    def claim(self, keys: Iterable[str]) -> tuple[dict[str, Flight], dict[str, Flight]]:
        """Return the flights that the caller must land, and those of other threads, which it may wait for.

        A caller lands its own flights before it waits for others, so that no two threads wait for each other.
        """
        mine: dict[str, Flight] = {}
        others: dict[str, Flight] = {}
        with self._lock:
            for key in keys:
                if key in mine or key in others:
                    continue
                flight = self._by_key.get(key)
                if flight is None:
                    mine[key] = self._by_key[key] = Flight()
                else:
                    others[key] = flight
        return mine, others

    def land(self, key: str, flight: Flight, item: CacheItem | None) -> None:
        """End a flight."""
        with self._lock:
            self._by_key.pop(key, None)
        flight.land(item)
