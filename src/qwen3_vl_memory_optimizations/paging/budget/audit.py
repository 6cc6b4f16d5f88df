"""`MemoryAudit`: a check mode that compares the process's resident set size with the ledger at each pass.

It is enabled by the environment variable `QWEN3VL_MEM_AUDIT`. Peak use since the previous pass is the kernel's
high-water mark, which is then reset; declared use is the sum of the accounts. Any excess is logged with the pass and
its phase.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ...process import process_memory, reset_peak_rss, trim_heap
from ..pager import Pager

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "QWEN3VL_MEM_AUDIT"
_LEAST_BYTES = 1 << 20
_MOST_FOUND = 1024
_MEASURED = ("process", "system")
"""Accounts that are set from measurements; comparing with them would explain any growth."""


@dataclass(frozen=True, slots=True)
class Undeclared:
    """Memory that no account declared.

    Attributes:
        passes: number of passes so far.
        phase: what was being computed before this was seen.
        n_bytes: bytes above the declared use and above earlier findings.
        accounts: the declared use, by owner.
    """

    passes: int
    phase: str
    n_bytes: int
    accounts: dict[str, int]


class MemoryAudit:
    """Checks each pass. Used under the Pager's lock.

    Args:
        pager: owner of the ledger.
        phase: returns what is being computed.

    Attributes:
        found: undeclared growth, latest last.
        baseline_bytes: use of the process beyond the declared use; set by `begin`.
    """

    def __init__(self, pager: Pager, phase: Callable[[], str]) -> None:
        self._pager = pager
        self._phase = phase
        self._phase_before = phase()
        self._over_bytes = 0
        self._touched_bytes = 0
        self._announced: dict[str, int] = {}
        self.found: deque[Undeclared] = deque(maxlen=_MOST_FOUND)
        self.baseline_bytes: int | None = None

    @staticmethod
    def is_on() -> bool:
        """Return whether the environment enables the audit."""
        return bool(os.environ.get(ENVIRONMENT_VARIABLE))

    def begin(self, baseline_bytes: int) -> None:
        """Take the current undeclared use as the baseline: between runs it belongs to the caller."""
        self.baseline_bytes = max(baseline_bytes, self.baseline_bytes or 0)
        self._remember()
        reset_peak_rss()

    def rest_bytes(self) -> int:
        """Return the unexplained resident memory, after the allocator's free memory was released."""
        trim_heap()
        accounts = self._accounts()
        explained = self._pager.touched_bytes + sum(accounts.values()) - accounts.get("activations", 0)
        return process_memory().anonymous_bytes - explained

    def look(self) -> None:
        """Compare peak use since the last check with the use declared then and now."""
        if self.baseline_bytes is None:
            return
        now = self._accounts()
        most = sum(max(now.get(name, 0), self._announced.get(name, 0)) for name in {*now, *self._announced})
        touched = max(self._touched_bytes, self._pager.frames.high_bytes, self._pager.touched_bytes)
        over = process_memory().peak_rss_bytes - self.baseline_bytes - most - touched
        if over > self._over_bytes + _LEAST_BYTES:
            found = Undeclared(self._pager.schedule.passes, self._phase_before, over - max(0, self._over_bytes), now)
            self.found.append(found)
            text = "%d undeclared bytes in use before pass %d (%s)"
            logger.warning(text, found.n_bytes, found.passes, found.phase)
            self._over_bytes = over
        self._phase_before = self._phase()
        self._remember()
        reset_peak_rss()

    def _remember(self) -> None:
        self._announced, self._touched_bytes = self._accounts(), self._pager.touched_bytes

    def _accounts(self) -> dict[str, int]:
        return {name: held for name, held in self._pager.ledger.accounts().items() if name not in _MEASURED}
