"""`ProcessAccounts`: charge `ram_budget` for what the process and the system around it use, as measured."""

from __future__ import annotations

import logging
from contextlib import suppress

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
"""Reserve 1/64 of the budget for page tables and file buffers that the kernel holds for the process. Control groups
count them, the resident set size does not. In a control group, its own figure is used instead."""
_LEAST_CODE_BYTES = 48 * 2**20
_CODE_SHARE = 32
"""Library code that computing runs (35 to 45 MB), or 1/32 of a small budget."""
_CACHE_SHARE = 16
"""A group's file cache is charged up to 1/16 of the budget; the kernel can drop the rest."""
_CACHE_SLACK_BYTES = 16 * 2**20


class ProcessAccounts:
    """Keeps the accounts `process`, `system` and `activations` of a Pager's ledger, and releases unneeded memory.

    Args:
        pager: its hooks `on_pass` and `on_growth` are set.
        budget_bytes: maximum memory of the process.
        baseline_bytes: memory the process uses now, before any tensor.

    Raises:
        MemoryBudgetExceeded: the budget leaves nothing for tensors.
    """

    def __init__(self, pager: Pager, budget_bytes: int, baseline_bytes: int) -> None:
        self._pager = pager
        self._budget_bytes = budget_bytes
        self.audit: MemoryAudit | None = None
        self._least_cached_bytes: dict[int, int] = {}  # by group limit
        pager.reserve("process", baseline_bytes)
        pager.reserve("system", self._system_bytes())
        pager.on_pass = self._on_pass
        pager.on_growth = self._before_growth

    def reserve_activations(self, n_bytes: int) -> None:
        """Reserve memory for the transient tensors of a forward pass that is about to run.

        Raises:
            MemoryBudgetExceeded: it does not fit beside the minimum that the weights need.
        """
        self._pager.reserve("activations", n_bytes)
        self._before_growth(n_bytes)

    def measure(self, *, release: bool = False) -> int:
        """Charge what the process uses now, including imported libraries, and return it.

        Args:
            release: return free heap and unneeded library code to the system first; takes about 100 ms.

        Raises:
            MemoryBudgetExceeded: it does not fit beside the minimum that the weights need.
        """
        if release:
            trim_heap()
            release_library_pages()
        unmanaged = self._unmanaged_bytes()
        self._account("process", unmanaged)
        self._account("system", self._system_bytes())
        if self.audit is not None:
            self.audit.begin(unmanaged)
        return unmanaged

    def _on_pass(self) -> None:
        """Update the accounts at the start of each pass: unmanaged memory may have grown or shrunk."""
        if self.audit is not None:
            self.audit.look()
        if self._unmanaged_bytes() > self._pager.ledger.held_bytes("process") + _SLACK_BYTES:
            trim_heap()
        read_again_bytes = 0
        if self._pager.schedule.passes == 1:
            release_library_pages()  # code that only the first prompt's prefill ran
            read_again_bytes = self._budget_bytes // _CACHE_SHARE  # needed code returns in this pass
        for owner, n_bytes in (
            ("process", self._unmanaged_bytes()),
            ("system", self._system_bytes() + read_again_bytes),
        ):
            try:
                self._account(owner, n_bytes)
            except MemoryBudgetExceeded as error:
                # The memory is already in use, and an admitted run finishes: evict as much as possible.
                logger.warning("memory use exceeds the budget; evicting as much as possible: %s", str(error))
                with suppress(MemoryBudgetExceeded):  # the next pass tries again
                    self._pager.reserve_most(owner)

    def _account(self, owner: str, n_bytes: int) -> None:
        if abs(n_bytes - self._pager.ledger.held_bytes(owner)) > _SLACK_BYTES:
            self._pager.reserve(owner, n_bytes)

    def _unmanaged_bytes(self) -> int:
        ledger = self._pager.ledger
        counted = sum(ledger.held_bytes(owner) for owner in ("small weights", "workspace", "kv_cache", "cache"))
        # Right after library code is released hardly any is resident: charge in advance for what will return.
        missing_code = max(0, min(_LEAST_CODE_BYTES, self._budget_bytes // _CODE_SHARE) - mapped_file_bytes())
        return max(0, rss_bytes() + missing_code - self._pager.touched_bytes - counted)

    def _system_bytes(self) -> int:
        """Budget withheld for the kernel and for other processes in our control group."""
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
        """Keep a control group that is as small as the budget from reaching its limit."""
        margin = self._budget_bytes // _CACHE_SHARE  # activations grow meanwhile, without calling this hook
        for group in limiting_groups():
            if group.used_bytes + n_bytes + margin > group.limit_bytes:
                self._without_read_ahead(group)

    def _without_read_ahead(self, group: GroupMemory) -> GroupMemory:
        """Drop library code that was read ahead, once enough has accumulated; return the group's new figures."""
        least = self._least_cached_bytes.get(group.limit_bytes, 0)
        if group.cached_bytes > least + _CACHE_SLACK_BYTES:
            drop_cached_libraries()
            group = next((after for after in limiting_groups() if after.limit_bytes == group.limit_bytes), group)
            least = group.cached_bytes
        self._least_cached_bytes[group.limit_bytes] = min(least, group.cached_bytes)
        return group
