"""The typed pools of section 2.1: each kind of runtime tensor has its own address range."""

from __future__ import annotations

from contextlib import ExitStack

from ..errors import TensorFreedError
from .allocator import RangeAllocator
from .virtual import FRAME_BYTES, reserve, unreserve


class TensorPool:
    """Page-aligned blocks of one kind of tensor. Manages addresses; the memory behind them is the `FramePool`'s.

    Args:
        size_bytes: address space to reserve (it takes no memory until it is used).
        page_size: granularity in bytes.
    """

    kind = "general"

    def __init__(self, size_bytes: int, page_size: int = FRAME_BYTES) -> None:
        self._blocks = RangeAllocator(size_bytes, page_size)
        self._base = reserve(self._blocks.size_bytes)
        self._closed = False
        self.allocations = 0

    def allocate(self, n_bytes: int) -> int:
        """Return the address of a block of at least `n_bytes`.

        Raises:
            MemoryBudgetExceeded: the pool's address space is used up.
            TensorFreedError: the pool is closed.
        """
        if self._closed:
            raise TensorFreedError(f"the {self.kind} pool is closed")
        address = self._base + self._blocks.allocate(n_bytes, owner=self.kind)
        self.allocations += 1
        return address

    def free(self, address: int) -> None:
        """Free a block and coalesce it with its neighbours."""
        self._blocks.free(address - self._base)
        self._unreserve_closed()

    def stats(self) -> dict[str, float | int | None]:
        """Return bytes, allocations and fragmentation of this pool."""
        return {
            "size_bytes": self._blocks.size_bytes,
            "used_bytes": self._blocks.granted_bytes,
            "requested_bytes": self._blocks.requested_bytes,
            "utilization": self._blocks.granted_bytes / self._blocks.size_bytes,
            "allocations": self.allocations,
            "internal_fragmentation": self._blocks.internal_fragmentation,
            "external_fragmentation": self._blocks.external_fragmentation,
        }

    def close(self) -> None:
        """Release the address space once the last block is freed. No more blocks are allocated."""
        if not self._closed:
            self._closed = True
            self._unreserve_closed()

    def _unreserve_closed(self) -> None:
        if self._closed and not self._blocks.granted_bytes:
            unreserve(self._base, self._blocks.size_bytes)


class GeneralTensorPool(TensorPool):
    """Tensors of no particular kind."""


class KVCachePool(TensorPool):
    """Keys and values."""

    kind = "kv_cache"


class VisionFeaturePool(TensorPool):
    """Outputs of the vision tower."""

    kind = "vision_features"


class TextEmbeddingPool(TensorPool):
    """Embedded text."""

    kind = "text_embeddings"


class AdvancedMemoryPool:
    """The four typed pools (section 2.1).

    Args:
        initial_size: address space of each pool, in bytes.
        page_size: granularity in bytes.

    Attributes:
        pools: kind -> pool.
    """

    def __init__(self, initial_size: int, page_size: int = FRAME_BYTES) -> None:
        self.initial_size = initial_size
        self.page_size = page_size
        self.pools: dict[str, TensorPool] = {}
        with ExitStack() as undo:  # release the first pools if there is no address space for the last
            for make in (GeneralTensorPool, KVCachePool, VisionFeaturePool, TextEmbeddingPool):
                self.pools[make.kind] = make(initial_size, page_size)
                undo.callback(self.pools[make.kind].close)
            undo.pop_all()

    def stats(self) -> dict[str, dict[str, float | int | None]]:
        """Return the figures of each pool."""
        return {kind: pool.stats() for kind, pool in self.pools.items()}

    def close(self) -> None:
        """Release the address space."""
        for pool in self.pools.values():
            pool.close()
