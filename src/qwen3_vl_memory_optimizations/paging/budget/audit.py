"""`MemoryAudit`: a check mode that compares the resident set with the ledger at each pass.

It is on where the environment variable `QWEN3VL_MEM_AUDIT` is set. What the process used at most since the pass before
is what the kernel says (its high-water mark, which is set back); what was announced is what the accounts hold. What is
over is named by the pass and its phase, and is logged.
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
"""Accounts that follow what is measured: to compare with them would explain everything."""


@dataclass(frozen=True, slots=True)
class Undeclared:
    """Memory that no account had announced.

    Attributes:
        passes: how many passes there were.
        phase: what was computed before this was seen.
        n_bytes: above what was announced, and above what was found before.
        accounts: what was announced, by owner.
    """

    passes: int
    phase: str
    n_bytes: int
    accounts: dict[str, int]


class MemoryAudit:
    """Looks at each pass. Used under the Pager's lock.

    Args:
        pager: whose ledger it is.
        phase: returns what is being computed.

    Attributes:
        found: undeclared growth, the latest last.
        baseline_bytes: of the process besides what is announced; set by `begin`.
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
        """Whether the environment asks for it."""
        return bool(os.environ.get(ENVIRONMENT_VARIABLE))

    def begin(self, baseline_bytes: int) -> None:
        """Take what the process uses now, besides what is announced, as explained: between runs it is the caller's."""
        self.baseline_bytes = max(baseline_bytes, self.baseline_bytes or 0)
        self._remember()
        reset_peak_rss()

    def rest_bytes(self) -> int:
        """Return the resident memory that nothing explains, after what the allocator keeps was given back."""
        trim_heap()
        accounts = self._accounts()
        explained = self._pager.touched_bytes + sum(accounts.values()) - accounts.get("activations", 0)
        return process_memory().anonymous_bytes - explained

    def look(self) -> None:
        """Compare what was used at most since the last look with what was announced then and now."""
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
