"""Choose the pages to keep when a cyclic scan does not fit.

On a cycle of N pages and memory for C, every recency-based policy hits 0 %; the optimum (Belady) hits (C-1)/(N-1).
Keeping a fixed subset and streaming the rest through a small window comes within the window of the optimum. If the
subset is *evenly spaced*, reads and computation overlap during the whole pass instead of alternating.

Pages are chosen in the order of multiples of the golden ratio; any prefix of that order is evenly spread. So a larger
capacity keeps what a smaller one did and adds to it: a small change of the memory for weights causes few reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_GOLDEN = (math.sqrt(5) - 1) / 2


def choose_kept(sizes_bytes: Sequence[int], capacity_bytes: int) -> list[bool]:
    """Choose an evenly spaced subset; a larger capacity extends it, except for sizes that just do not fit.

    Args:
        sizes_bytes: the pages of a cycle, in order.
        capacity_bytes: maximum bytes to keep.

    Returns:
        One flag per page; the kept pages hold at most `capacity_bytes`.
    """
    kept = [False] * len(sizes_bytes)
    left = max(0, capacity_bytes)
    for index in sorted(range(len(sizes_bytes)), key=lambda index: index * _GOLDEN % 1):
        if sizes_bytes[index] <= left:
            kept[index] = True
            left -= sizes_bytes[index]
    return kept
