"""Replay of a recorded trace of uses through an algorithm at a given capacity, for its hit rate."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen3_vl_memory_optimizations.errors import ConfigurationError, MemoryBudgetExceeded, format_bytes
from qwen3_vl_memory_optimizations.runtime_policy import SwappingAlgorithm


@dataclass(frozen=True)
class Trace:
    """A sequence of uses.

    Attributes:
        keys: int32 `[uses]`, indices into `n_bytes`.
        n_bytes: int64 `[keys]`.
        kinds: str `[keys]`.
    """

    keys: np.ndarray
    n_bytes: np.ndarray
    kinds: np.ndarray

    def save(self, path: Path) -> None:
        """Write a compressed `.npz`."""
        np.savez_compressed(path, keys=self.keys, n_bytes=self.n_bytes, kinds=self.kinds)

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read what `save` wrote; nothing in the file is executed.

        Raises:
            ConfigurationError: no such file, or not a trace.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                return cls(stored["keys"], stored["n_bytes"], stored["kinds"])
        except (OSError, ValueError, KeyError) as error:
            raise ConfigurationError(f"{path}: not a trace ({type(error).__name__}: {error})") from error

    @property
    def total_bytes(self) -> int:
        """Total bytes of all keys."""
        return int(self.n_bytes.sum())


@dataclass(frozen=True)
class Replayed:
    """The result of a replay.

    Attributes:
        hit_rate: share of uses whose key was in memory.
        byte_hit_rate: hit rate weighted by bytes.
    """

    hit_rate: float
    byte_hit_rate: float


def replay(trace: Trace, algorithm: SwappingAlgorithm, capacity_bytes: int) -> Replayed:
    """Replay a trace; each missing key is inserted unless it is larger than the capacity.

    Raises:
        MemoryBudgetExceeded: the algorithm does not evict enough.
    """
    sizes = trace.n_bytes.tolist()
    hits = hit_bytes = 0
    for key in trace.keys.tolist():
        if key in algorithm.n_bytes:
            hits += 1
            hit_bytes += sizes[key]
            algorithm.touch(key)
        elif sizes[key] <= capacity_bytes:
            excess_bytes = algorithm.resident_bytes + sizes[key] - capacity_bytes
            if algorithm.evict(excess_bytes) is None:
                raise MemoryBudgetExceeded(
                    f"replay: {type(algorithm).__name__} cannot evict {format_bytes(excess_bytes)} of the "
                    f"{format_bytes(algorithm.resident_bytes)} it holds for a key of {format_bytes(sizes[key])}; "
                    "its order() must yield every key in memory",
                    requested_bytes=sizes[key],
                    available_bytes=max(0, capacity_bytes - algorithm.resident_bytes),
                    budget_bytes=capacity_bytes,
                    owner="replay",
                )
            algorithm.insert(key, sizes[key])
    return _replayed(trace, hits, hit_bytes)


def replay_belady(trace: Trace, capacity_bytes: int) -> Replayed:
    """Replay with the victim whose next use is farthest, known from the trace itself (Belady 1966).

    As in a real run, a key in use must be in memory. For keys of one size this is optimal; for mixed sizes optimality
    is not proven, but few policies come close.
    """
    keys = trace.keys.tolist()
    sizes = trace.n_bytes.tolist()
    never = len(keys)
    following = [never] * len(keys)
    next_use: dict[int, int] = {}
    for position in range(len(keys) - 1, -1, -1):
        following[position] = next_use.get(keys[position], never)
        next_use[keys[position]] = position
    inside: dict[int, int] = {}  # key -> its next use
    farthest: list[tuple[int, int]] = []  # (-next use, key); stale entries are skipped
    used = hits = hit_bytes = 0
    for position, key in enumerate(keys):
        if key in inside:
            hits += 1
            hit_bytes += sizes[key]
            inside[key] = following[position]
            heapq.heappush(farthest, (-following[position], key))
            continue
        if sizes[key] > capacity_bytes:
            continue
        used += sizes[key]
        while used > capacity_bytes:
            when, victim = heapq.heappop(farthest)
            if inside.get(victim) == -when:
                del inside[victim]
                used -= sizes[victim]
        inside[key] = following[position]
        heapq.heappush(farthest, (-following[position], key))
    return _replayed(trace, hits, hit_bytes)


class TraceRecorder:
    """Records uses; each call costs a dictionary lookup and an append."""

    def __init__(self) -> None:
        self._index: dict[str, int] = {}
        self._keys: list[int] = []
        self._n_bytes: list[int] = []
        self._kinds: list[str] = []

    def __call__(self, key: str, n_bytes: int, kind: str) -> None:
        """Record a use."""
        index = self._index.get(key)
        if index is None:
            index = self._index[key] = len(self._n_bytes)
            self._n_bytes.append(n_bytes)
            self._kinds.append(kind)
        self._keys.append(index)

    def trace(self) -> Trace:
        """Return the trace recorded so far."""
        return Trace(np.array(self._keys, np.int32), np.array(self._n_bytes, np.int64), np.array(self._kinds, np.str_))


def _replayed(trace: Trace, hits: int, hit_bytes: int) -> Replayed:
    uses = len(trace.keys)
    used_bytes = int(trace.n_bytes[trace.keys].sum()) if uses else 0
    return Replayed(hits / uses if uses else 0.0, hit_bytes / used_bytes if used_bytes else 0.0)
