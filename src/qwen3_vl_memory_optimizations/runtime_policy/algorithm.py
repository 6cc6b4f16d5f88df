"""`SwappingAlgorithm`: which of the tensors in memory should leave first (specification 2.4)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Hashable, Iterator
from typing import ClassVar


class SwappingAlgorithm(ABC):
    """Orders what is in memory. It moves nothing, does no I/O, locks nothing, reads no clock: time is counted in uses.

    What left memory may come back: `left` keeps what is known of it, `remove` forgets it. Not thread-safe.

    Attributes:
        name: the value of the setting `swap_algorithm`.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self.n_bytes: dict[Hashable, int] = {}
        """Key -> bytes, of what is in memory."""
        self.resident_bytes = 0

    def insert(self, key: Hashable, n_bytes: int) -> None:
        """Note that something came into memory because it is used.

        Args:
            key: not in memory so far.
            n_bytes: what it takes.
        """
        assert key not in self.n_bytes, key
        self.n_bytes[key] = n_bytes
        self.resident_bytes += n_bytes
        self._inserted(key)

    def touch(self, key: Hashable) -> None:
        """Note a use of something in memory."""
        assert key in self.n_bytes, key
        self._touched(key)

    def left(self, key: Hashable) -> None:
        """Note that something left memory to make room; it may come back."""
        self.resident_bytes -= self.n_bytes.pop(key)
        self._left(key, evicted=True)

    def remove(self, key: Hashable) -> None:
        """Forget something for good, wherever it is."""
        if key in self.n_bytes:
            self.resident_bytes -= self.n_bytes.pop(key)
            self._left(key, evicted=False)
        self._removed(key)

    def evict(self, n_bytes: int, protected: Container[Hashable] = ()) -> list[Hashable] | None:
        """Choose what leaves so that `n_bytes` become free, and note that it left.

        Args:
            n_bytes: how much must become free.
            protected: stays.

        Returns:
            The keys, first to leave first; `None` where even all would not do: then nothing changed.
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
        """Yield all keys in memory, first to leave first. Changes nothing."""

    @abstractmethod
    def _inserted(self, key: Hashable) -> None: ...

    @abstractmethod
    def _touched(self, key: Hashable) -> None: ...

    @abstractmethod
    def _left(self, key: Hashable, *, evicted: bool) -> None: ...

    def _removed(self, key: Hashable) -> None:  # noqa: B027 - what keeps no history has nothing to forget
        pass
