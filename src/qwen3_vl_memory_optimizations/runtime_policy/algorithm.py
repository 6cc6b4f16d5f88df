"""`SwappingAlgorithm`: chooses which tensors leave memory (specification 2.4)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Hashable, Iterator
from typing import ClassVar


class SwappingAlgorithm(ABC):
    """Orders the tensors in memory for eviction, without I/O, locks or a clock: time is counted in uses.

    Evicted tensors may come back: `left` keeps their history, `remove` forgets it. Not thread-safe.

    Attributes:
        name: the value of the setting `swap_algorithm`.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self.n_bytes: dict[Hashable, int] = {}
        """Key -> bytes of each tensor in memory."""
        self.resident_bytes = 0

    def insert(self, key: Hashable, n_bytes: int) -> None:
        """Record that a tensor entered memory because it is used.

        Args:
            key: a tensor not yet in memory.
            n_bytes: its size.
        """
        assert key not in self.n_bytes, key
        self.n_bytes[key] = n_bytes
        self.resident_bytes += n_bytes
        self._inserted(key)

    def touch(self, key: Hashable) -> None:
        """Record a use of a tensor in memory."""
        assert key in self.n_bytes, key
        self._touched(key)

    def left(self, key: Hashable) -> None:
        """Record that a tensor was evicted; it may come back."""
        self.resident_bytes -= self.n_bytes.pop(key)
        self._left(key, evicted=True)

    def remove(self, key: Hashable) -> None:
        """Forget a tensor, wherever it is."""
        if key in self.n_bytes:
            self.resident_bytes -= self.n_bytes.pop(key)
            self._left(key, evicted=False)
        self._removed(key)

    def evict(self, n_bytes: int, protected: Container[Hashable] = ()) -> list[Hashable] | None:
        """Choose eviction victims that free `n_bytes`, and record their eviction.

        Args:
            n_bytes: number of bytes to free.
            protected: keys that must stay.

        Returns:
            The victims in eviction order; `None` if even all are too few, and then nothing changed.
        """
        chosen: list[Hashable] = []
        if n_bytes <= 0:
            return chosen
        for key in self.order():
            if key not in protected:
                chosen.append(key)
                n_bytes -= self.n_bytes[key]
                if n_bytes <= 0:
                    for each in chosen:
                        self.left(each)
                    return chosen
        return None

    @abstractmethod
    def order(self) -> Iterator[Hashable]:
        """Yield all keys in memory in eviction order, without side effects."""

    @abstractmethod
    def _inserted(self, key: Hashable) -> None: ...

    @abstractmethod
    def _touched(self, key: Hashable) -> None: ...

    @abstractmethod
    def _left(self, key: Hashable, *, evicted: bool) -> None: ...

    def _removed(self, key: Hashable) -> None:  # noqa: B027 - optional: only algorithms with a history need it
        pass
