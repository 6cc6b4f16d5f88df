"""Learn the tables of the codec `int4` and write `compression/codecs/int4_tables.py`. Takes two minutes.

Lloyd's algorithm for groups: each group of 16 normally distributed values takes the table with the least squared error,
and each entry of a table moves to the mean of the values that took it. The deviations of groups vary a little, as those
of rotated weights do. Only half of the tables are learned: values are as likely as their mirror images.
"""

from __future__ import annotations

import argparse
import base64
from pathlib import Path

import torch
import torch.nn.functional as F

OUT = Path(__file__).resolve().parents[1] / "src/qwen3_vl_memory_optimizations/compression/codecs/int4_tables.py"
GROUP, TABLES, ENTRIES = 16, 256, 16
UNITS_PER_DEVIATION = 25.4
HALF = TABLES // 2
GRID = torch.arange(-400, 401) / (2 * UNITS_PER_DEVIATION)
DEVIATIONS = 0.08  # of the logarithm
LEAST_USES = 20

MODULE = '''"""The 256 tables of `int4`, learned from normally distributed values.

`tools/train_int4_tables.py` writes this file.
"""

from __future__ import annotations

import base64
from functools import lru_cache

import torch

UNITS_PER_DEVIATION = {units}
"""Integers of the tables per standard deviation of the values: 127 are five."""

_HALF = (
{lines}
)
"""128 tables of 16 ascending bytes; the others are their mirror images."""


@lru_cache(maxsize=1)
def tables() -> torch.Tensor:
    """Return int8 `[256, 16]`, ascending in each row."""
    with torch.inference_mode(False):
        half = torch.frombuffer(bytearray(base64.b85decode("".join(_HALF))), dtype=torch.int8).view(128, 16)
        return torch.cat([half, -half.flip(1)])
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--groups", type=int, default=100_000, help="random groups per round")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    half = first_tables()
    for number in range(arguments.rounds):
        half = improved(half, sample(arguments.groups))
        print(f"round {number + 1}: squared error {error(both(half), sample(20_000)):.5f}", flush=True)
    integers = (half * UNITS_PER_DEVIATION).round().clamp(-127, 127)
    spread = torch.randn(100_000, GROUP)
    print(f"as bytes: {error(both(integers / UNITS_PER_DEVIATION), spread):.5f} of normally distributed values")
    text = base64.b85encode(integers.to(torch.int8).numpy().tobytes()).decode()
    lines = "\n".join(f'    "{text[start : start + 108]}"' for start in range(0, len(text), 108))
    OUT.write_text(MODULE.format(units=UNITS_PER_DEVIATION, lines=lines))
    print(f"wrote {OUT}")


def first_tables() -> torch.Tensor:
    """Return what the best single table becomes when scaled and shifted."""
    values = torch.randn(200_000)
    table = torch.quantile(values[:100_000], torch.linspace(0.5 / ENTRIES, 1 - 0.5 / ENTRIES, ENTRIES))
    for _ in range(60):
        code = torch.bucketize(values, (table[1:] + table[:-1]) / 2)
        uses = torch.bincount(code, minlength=ENTRIES)
        table = torch.bincount(code, values, minlength=ENTRIES) / uses.clamp(min=1)
    return table * torch.linspace(0.35, 1.5, HALF)[:, None] + 0.25 * torch.rand(HALF, 1)


def sample(groups: int) -> torch.Tensor:
    """Return random groups."""
    return torch.randn(groups, GROUP) * torch.exp(DEVIATIONS * torch.randn(groups, 1))


def both(half: torch.Tensor) -> torch.Tensor:
    """Return tables and their mirror images."""
    return torch.cat([half, -half.flip(1)])


def assigned(tables: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best table of each group, and its squared error."""
    middles = ((tables[:, 1:] + tables[:, :-1]) / 2).contiguous()
    nearest = torch.searchsorted(middles, GRID.expand(len(tables), -1).contiguous())
    errors = (tables.gather(1, nearest) - GRID).square().t().contiguous()
    at = (groups * 2 * UNITS_PER_DEVIATION).round().clamp(-400, 400).int() + 400
    return tuple(reversed(F.embedding_bag(at, errors, mode="sum").min(dim=1)))  # type: ignore[return-value]


def improved(half: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return tables whose entries are the means of the values that took them."""
    table, _ = assigned(both(half), groups)
    groups = torch.where((table >= HALF)[:, None], -groups, groups)
    table = table % HALF
    middles = ((half[:, 1:] + half[:, :-1]) / 2)[table].contiguous()
    entry = (table[:, None] * ENTRIES + torch.searchsorted(middles, groups.contiguous())).flatten()
    uses = torch.bincount(entry, minlength=HALF * ENTRIES).view(HALF, ENTRIES)
    sums = torch.bincount(entry, groups.flatten(), minlength=HALF * ENTRIES).view(HALF, ENTRIES)
    found = torch.where(uses > 0, sums / uses.clamp(min=1), half)
    of_tables = torch.bincount(table, minlength=HALF)
    for idle in (of_tables < LEAST_USES).nonzero().flatten().tolist():  # becomes a neighbour of the busiest
        busiest = int(of_tables.argmax())
        found[idle] = found[busiest] * (1 + 0.05 * torch.randn(1)) + 0.03 * torch.randn(1)
        of_tables[busiest] //= 2
    return found.sort(dim=1).values


def error(tables: torch.Tensor, groups: torch.Tensor) -> float:
    """Return the squared error per value."""
    return float(assigned(tables, groups)[1].mean()) / GROUP


if __name__ == "__main__":
    main()
