"""The budget: what each owner holds, and what remains for page frames."""

from __future__ import annotations

from ...errors import MemoryBudgetExceeded, format_bytes

PROCESS = "process"
TENSORS = "tensors"

_UNLIMITED = 1 << 62


class Ledger:
    """Accounts by owner under two limits.

    `ram_budget_bytes` bounds the whole process (accounts of both scopes). `tensor_budget_bytes` bounds the managed
    tensors, their resident segments and their workspace (scope `tensors`). Page frames use what the accounts leave.

    Args:
        ram_budget_bytes: limit of the process, `None` for no limit.
        tensor_budget_bytes: limit of the managed tensors, `None` for no limit.
    """

    def __init__(self, ram_budget_bytes: int | None, tensor_budget_bytes: int | None) -> None:
        self.ram_budget_bytes = ram_budget_bytes
        self.tensor_budget_bytes = tensor_budget_bytes
        self.frames_floor_bytes = 0
        self._accounts: dict[str, dict[str, int]] = {PROCESS: {}, TENSORS: {}}

    @property
    def limited(self) -> bool:
        """Return whether any limit is set."""
        return self.ram_budget_bytes is not None or self.tensor_budget_bytes is not None

    def held_bytes(self, owner: str) -> int:
        """Return what an owner holds."""
        return sum(accounts.get(owner, 0) for accounts in self._accounts.values())

    def accounts(self, scope: str | None = None) -> dict[str, int]:
        """Return owner -> bytes, for one scope or both."""
        return {**self._accounts[PROCESS], **self._accounts[TENSORS]} if scope is None else {**self._accounts[scope]}

    def frames_limit_bytes(self) -> int:
        """Return what is left for page frames under both limits."""
        return max(0, self._left_bytes())

    def _left_bytes(self) -> int:
        """Return what the accounts leave; negative if they exceed a limit."""
        tensors = sum(self._accounts[TENSORS].values())
        process = sum(self._accounts[PROCESS].values())
        of_tensors = _UNLIMITED if self.tensor_budget_bytes is None else self.tensor_budget_bytes - tensors
        of_process = _UNLIMITED if self.ram_budget_bytes is None else self.ram_budget_bytes - tensors - process
        return min(of_tensors, of_process)

    def most_bytes(self, owner: str) -> int:
        """Return the most that an owner could hold if page frames shrank to their minimum.

        `tensor_budget` does not bound owners of scope `PROCESS`.
        """
        left = self.frames_limit_bytes()
        if self.ram_budget_bytes is not None and owner not in self._accounts[TENSORS]:
            left = self.ram_budget_bytes - sum(sum(accounts.values()) for accounts in self._accounts.values())
        return self.held_bytes(owner) + max(0, left - self.frames_floor_bytes)

    def set(self, owner: str, n_bytes: int, scope: str = TENSORS) -> None:
        """Set what an owner holds; call it before the memory is taken.

        Raises:
            MemoryBudgetExceeded: page frames would have less than their minimum; nothing was changed.
        """
        before = self._accounts[scope].get(owner, 0)
        self._accounts[scope][owner] = n_bytes
        left = self._left_bytes()
        if n_bytes > before and left < self.frames_floor_bytes:
            self._accounts[scope][owner] = before
            available = max(0, n_bytes - (self.frames_floor_bytes - left))
            budget = (self.tensor_budget_bytes if scope == TENSORS else None) or self.ram_budget_bytes or 0
            raise MemoryBudgetExceeded(
                f"{owner}: {format_bytes(n_bytes)} do not fit beside the {format_bytes(self.frames_floor_bytes)} "
                f"that the weights need at least; {format_bytes(available)} are left of the budget of "
                f"{format_bytes(budget)}",
                requested_bytes=n_bytes,
                available_bytes=available,
                budget_bytes=budget,
                owner=owner,
            )

    def add(self, owner: str, n_bytes: int, scope: str = TENSORS) -> None:
        """Add to what an owner holds; negative subtracts."""
        self.set(owner, self._accounts[scope].get(owner, 0) + n_bytes, scope)
