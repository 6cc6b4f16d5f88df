"""Which pages to keep when a cyclic scan does not fit.

On a cycle of N pages and memory for C, every policy by recency hits 0 %; the optimum (Belady) hits (C-1)/(N-1). Keeping
a fixed subset and streaming the rest through a small window comes within the window of it, and a subset that is
*evenly spaced* lets reads and computation overlap all along the pass instead of taking turns.
"""

from __future__ import annotations

from collections.abc import Sequence


def choose_kept(sizes_bytes: Sequence[int], capacity_bytes: int) -> list[bool]:
    """Choose an evenly spaced subset.

    Args:
        sizes_bytes: the pages of a cycle, in order.
        capacity_bytes: how much may be kept.

    Returns:
        One flag a page; the kept ones hold at most `capacity_bytes`.
    """
    total = sum(sizes_bytes)
    capacity_bytes = max(0, capacity_bytes)
    if total <= capacity_bytes:
        return [True] * len(sizes_bytes)
    share = capacity_bytes / total
    kept, due, kept_bytes = [], 0.0, 0
    for size in sizes_bytes:
        due += size * share
        keep = kept_bytes + size <= min(due + size / 2, capacity_bytes)
        kept_bytes += size if keep else 0
        kept.append(keep)
    for index, size in enumerate(sizes_bytes):  # what rounding left over
        if not kept[index] and kept_bytes + size <= capacity_bytes:
            kept[index] = True
            kept_bytes += size
    return kept
