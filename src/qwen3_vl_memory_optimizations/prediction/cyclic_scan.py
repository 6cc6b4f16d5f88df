"""Which pages to keep when a cyclic scan does not fit.

On a cycle of N pages and memory for C, every policy by recency hits 0 %; the optimum (Belady) hits (C-1)/(N-1). Keeping
a fixed subset and streaming the rest through a small window comes within the window of it, and a subset that is
*evenly spaced* lets reads and computation overlap all along the pass instead of taking turns.

Pages are taken in the order of the multiples of the golden ratio, of which any first few are evenly spread. A larger
capacity so keeps what a smaller one did and adds to it: when the memory for weights changes by a little, little has to
be read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_GOLDEN = (math.sqrt(5) - 1) / 2


def choose_kept(sizes_bytes: Sequence[int], capacity_bytes: int) -> list[bool]:
    """Choose an evenly spaced subset; that of a smaller capacity is part of it, but for sizes that just do not fit.

    Args:
        sizes_bytes: the pages of a cycle, in order.
        capacity_bytes: how much may be kept.

    Returns:
        One flag a page; the kept ones hold at most `capacity_bytes`.
    """
    kept = [False] * len(sizes_bytes)
    left = max(0, capacity_bytes)
    for index in sorted(range(len(sizes_bytes)), key=lambda index: index * _GOLDEN % 1):
        if sizes_bytes[index] <= left:
            kept[index] = True
            left -= sizes_bytes[index]
    return kept
