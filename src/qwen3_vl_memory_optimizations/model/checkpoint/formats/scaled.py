"""Decode matrices stored as codes with scales, the common form of FP8, INT8 and INT4 in all layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .parts import UnreadParts
from .tensors import Files, LogicalTensor, Rows


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales, and optional zero points, of blocks of a matrix.

    Attributes:
        scales: fp32 `[row blocks, column groups]`.
        zeros: of the same shape; `None`: codes are signed around zero.
        rows_per_block: rows of the matrix per row of scales.
        groups: columns per group, in order; or int64 `[columns]`, the group of each column.
    """

    scales: torch.Tensor
    zeros: torch.Tensor | None
    rows_per_block: int
    groups: int | torch.Tensor

    def apply(self, codes: torch.Tensor, start: int) -> torch.Tensor:
        """Return the values of codes `[rows, columns]` that begin at row `start`, in fp32."""
        values = codes.to(torch.float32)
        blocks = torch.arange(start, start + len(codes)) // self.rows_per_block
        if self.zeros is not None:
            values -= self._spread(self.zeros[blocks], values.shape[1])
        return values.mul_(self._spread(self.scales[blocks], values.shape[1]))

    def _spread(self, rows: torch.Tensor, columns: int) -> torch.Tensor:
        if isinstance(self.groups, torch.Tensor):
            return rows[:, self.groups]
        return rows if rows.shape[1] == 1 else rows.repeat_interleave(self.groups, dim=1)[:, :columns]


class ScaledMatrix(LogicalTensor):
    """A matrix `[rows, columns]` stored as codes and scales.

    Args:
        name: of the weight.
        path: the file of the codes.
        shape: of the weight.
        dtype: to read it in.
        codes: given open files, returns a function that reads rows of codes.
        grid: given open files, reads scales and zero points.
        held_bytes: memory held by both.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        shape: tuple[int, int],
        dtype: torch.dtype,
        codes: Callable[[Files], Rows],
        grid: Callable[[Files], Grid],
        held_bytes: int,
    ) -> None:
        super().__init__(name, path, shape, dtype)
        self._codes, self._grid, self.held_bytes = codes, grid, held_bytes

    def reader(self, files: Files) -> Rows:
        """Return a function that decodes rows; it holds the scales."""
        try:
            codes, grid = self._codes(files), self._grid(files)
        except UnreadParts as error:
            raise self.error(str(error)) from error
        return lambda start, stop: grid.apply(codes(start, stop), start)


def group_size(columns: int, n_groups: int, declared: int | None) -> int:
    """Return the columns per group, in order; the last group may be smaller.

    Args:
        columns: of the matrix.
        n_groups: number of groups with scales.
        declared: the group size in config.json.

    Raises:
        UnreadParts: that many groups do not cover the columns.
    """
    if declared is not None and -(-columns // declared) == n_groups:
        return declared
    if columns % n_groups:
        raise UnreadParts(f"{n_groups} groups of scales for {columns} columns")
    return columns // n_groups


def stored_groups(stored: torch.Tensor, n_groups: int) -> int | torch.Tensor:
    """Return the stored groups of columns, or the group size if they are in order.

    Raises:
        UnreadParts: a group has no scales.
    """
    groups = stored.long()
    if int(groups.min()) < 0 or int(groups.max()) >= n_groups:
        raise UnreadParts(f"g_idx names groups {int(groups.min())} to {int(groups.max())}; there are {n_groups}")
    size = int((groups == groups[0]).sum())
    return size if torch.equal(groups, torch.arange(len(groups)) // size) else groups
