"""`ProcessAccounts`: what the process and the system around it take of `ram_budget`, measured as it changes."""

from __future__ import annotations

import logging

from ...errors import MemoryBudgetExceeded
from ...process import (
    GroupMemory,
    drop_cached_libraries,
    limiting_groups,
    mapped_file_bytes,
    release_library_pages,
    rss_bytes,
    trim_heap,
)
from ..pager import Pager
from .audit import MemoryAudit

logger = logging.getLogger(__name__)

_SLACK_BYTES = 8 * 2**20
_KERNEL_SHARE = 64
"""One part in 64 of the budget is for page tables and file buffers that the kernel holds for the process; control
groups count them, the resident set does not. Where there is a group, what it says counts."""
_LEAST_CODE_BYTES = 48 * 2**20
_CODE_SHARE = 32
"""Of the code of libraries that computing runs (35 to 45 MB), or one part in 32 of a small budget."""
_CACHE_SHARE = 16
"""Cached files that a group holds count up to this part of the budget: more of them is left to the kernel to drop."""
_CACHE_SLACK_BYTES = 16 * 2**20


class ProcessAccounts:
    """Keeps the accounts `process`, `system` and `activations` of a Pager's ledger, and gives back what is not needed.

    Args:
        pager: its hooks `on_pass` and `on_growth` are taken.
        budget_bytes: the most the process may use.
        baseline_bytes: what it uses now, before any tensor.

    Raises:
        MemoryBudgetExceeded: nothing would be left.
    """

    def __init__(self, pager: Pager, budget_bytes: int, baseline_bytes: int) -> None:
        self._pager = pager
        self._budget_bytes = budget_bytes
        self.audit: MemoryAudit | None = None
        self._least_cached_bytes: dict[int, int] = {}  # by limit of the group
        pager.reserve("process", baseline_bytes)
        pager.reserve("system", self._system_bytes())
        pager.on_pass = self._on_pass
        pager.on_growth = self._before_growth

    def reserve_activations(self, n_bytes: int) -> None:
        """Set memory aside for the transient tensors of a forward that is about to run.

        Raises:
            MemoryBudgetExceeded: it does not fit beside what the weights need at least.
        """
        self._pager.reserve("activations", n_bytes)
        self._before_growth(n_bytes)

    def measure(self) -> int:
        """Account for what the process uses by now, libraries that were imported included; return it.

        Raises:
            MemoryBudgetExceeded: it does not fit beside what the weights need at least.
        """
        unmanaged = self._unmanaged_bytes()
        self._account("process", unmanaged)
        self._account("system", self._system_bytes())
        if self.audit is not None:
            self.audit.begin(unmanaged)
        return unmanaged

    def _on_pass(self) -> None:
        """At the start of each pass: what the process uses besides managed memory may have grown or shrunk."""
        if self.audit is not None:
            self.audit.look()
        if self._unmanaged_bytes() > self._pager.ledger.held_bytes("process") + _SLACK_BYTES:
            trim_heap()
        read_again_bytes = 0
        if self._pager.schedule.passes == 1:
            release_library_pages()  # what only the prefill of the first prompt ran
            read_again_bytes = self._budget_bytes // _CACHE_SHARE  # in this pass: what is needed, and is read around it
        for owner, n_bytes in (
            ("process", self._unmanaged_bytes()),
            ("system", self._system_bytes() + read_again_bytes),
        ):
            try:
                self._account(owner, n_bytes)
            except MemoryBudgetExceeded as error:
                # The memory is in use already, and an admitted run finishes: evict as much as can leave.
                logger.warning("more memory is used than the budget has room for: %s", str(error))
                self._pager.reserve(owner, self._pager.ledger.most_bytes(owner))

    def _account(self, owner: str, n_bytes: int) -> None:
        if abs(n_bytes - self._pager.ledger.held_bytes(owner)) > _SLACK_BYTES:
            self._pager.reserve(owner, n_bytes)

    def _unmanaged_bytes(self) -> int:
        ledger = self._pager.ledger
        counted = sum(ledger.held_bytes(owner) for owner in ("small weights", "workspace", "kv_cache", "cache"))
        # Right after library code was given back hardly any is there: what will be needed again counts already.
        missing_code = max(0, min(_LEAST_CODE_BYTES, self._budget_bytes // _CODE_SHARE) - mapped_file_bytes())
        return max(0, rss_bytes() + missing_code - self._pager.touched_bytes - counted)

    def _system_bytes(self) -> int:
        """What the kernel and others in the control group of the process take, as far as the budget is less for it."""
        budget, rss = self._budget_bytes, rss_bytes()
        held, counted = budget // _KERNEL_SHARE, budget // _CACHE_SHARE
        for group in limiting_groups():
            room = group.limit_bytes - group.used_bytes + group.cached_bytes
            if room < budget - rss + counted:
                group = self._without_read_ahead(group)
            beside = group.used_bytes - max(0, group.cached_bytes - counted) - rss
            held = max(held, budget - (group.limit_bytes - beside - 2 * _CACHE_SLACK_BYTES))
        return held

    def _before_growth(self, n_bytes: int) -> None:
        """Keep a control group that is as small as the budget from running into its limit."""
        margin = self._budget_bytes // _CACHE_SHARE  # activations grow meanwhile, and do not ask
        for group in limiting_groups():
            if group.used_bytes + n_bytes + margin > group.limit_bytes:
                self._without_read_ahead(group)

    def _without_read_ahead(self, group: GroupMemory) -> GroupMemory:
        """Drop the code of libraries that was read ahead, once enough of it has gathered; return what then holds."""
        least = self._least_cached_bytes.get(group.limit_bytes, 0)
        if group.cached_bytes > least + _CACHE_SLACK_BYTES:
            drop_cached_libraries()
            group = next((after for after in limiting_groups() if after.limit_bytes == group.limit_bytes), group)
            least = group.cached_bytes
        self._least_cached_bytes[group.limit_bytes] = min(least, group.cached_bytes)
        return group
