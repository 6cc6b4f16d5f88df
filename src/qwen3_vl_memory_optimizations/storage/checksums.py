"""Checksums of a tensor's pages, xxh3-64 each, so that a single page can be read and checked."""

from __future__ import annotations

import xxhash


def page_count(n_bytes: int, page_bytes: int) -> int:
    """Return the number of pages, and thus checksums, of a tensor; an empty tensor has one.

    Args:
        n_bytes: the size of the tensor.
        page_bytes: the size of a page; 0: the whole tensor.
    """
    return max(1, -(-n_bytes // page_bytes)) if page_bytes else 1


class PageChecksums:
    """Computes the checksums of one tensor from pieces of any size.

    Args:
        n_bytes: the size of the tensor.
        page_bytes: the size of a page; 0: the whole tensor.

    Attributes:
        done_bytes: bytes received so far.
    """

    def __init__(self, n_bytes: int, page_bytes: int) -> None:
        self._page_bytes = page_bytes or n_bytes
        self._digest = xxhash.xxh3_64()
        self._digest_bytes = 0
        self._finished: list[int] = []
        self.done_bytes = 0

    def update(self, piece: memoryview) -> None:
        """Add the next bytes."""
        while len(piece):
            if self._digest_bytes == self._page_bytes:
                self._next_page()
            part = piece[: self._page_bytes - self._digest_bytes]
            self._digest.update(part)
            self._digest_bytes += len(part)
            self.done_bytes += len(part)
            piece = piece[len(part) :]

    def result(self) -> tuple[int, ...]:
        """Return the checksums of the pages received so far."""
        return (*self._finished, self._digest.intdigest())

    def _next_page(self) -> None:
        self._finished.append(self._digest.intdigest())
        self._digest.reset()
        self._digest_bytes = 0
