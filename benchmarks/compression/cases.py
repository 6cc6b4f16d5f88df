"""Drawn tensors of five sorts, and what is best for each when every method is tried on the whole of it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qwen3_vl_memory_optimizations import CodecError
from qwen3_vl_memory_optimizations.compression import Codec, create_codec
from qwen3_vl_memory_optimizations.compression.selection import CANDIDATES, admitted_cost, relative_error

SORTS = ("low rank", "90 % zeros", "dense Gaussian", "outlier columns", "constant")
ACCESS = ("hot", "streamed", "cold")

Seconds = Callable[[Codec, torch.Tensor], tuple[Codec, dict[str, float]]]
"""Fits a codec to a matrix, and says what encode, decode and linear take."""


def draw(number: int, dtype: torch.dtype, *, most_rows: int = 768) -> tuple[str, str, torch.Tensor]:
    """Return sort, access pattern and matrix of a case; the number is the seed, and goes through sorts and patterns."""
    generator = torch.Generator().manual_seed(number)
    sort, access = SORTS[number % 5], ACCESS[number // 5 % 3]

    def integer(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    rows, columns = 64 * integer(4, most_rows // 64), 64 * integer(4, most_rows // 64)
    if sort == "constant":
        return sort, access, torch.full((rows, columns), float(normal(1)), dtype=dtype)
    values = normal(rows, columns) * 10.0 ** integer(-3, 1)
    if sort == "low rank":
        rank = integer(1, 12)
        values = normal(rows, rank) @ normal(rank, columns)
    elif sort == "90 % zeros":
        values[torch.rand(rows, columns, generator=generator) < 0.9] = 0
    elif sort == "outlier columns":
        values[:, torch.randperm(columns, generator=generator)[: max(1, columns // 200)]] *= integer(20, 100)
    return sort, access, values.to(dtype)


def exhaustive(
    matrix: torch.Tensor, access: str, tolerance: float, ssd_bytes_per_s: float, seconds_of: Seconds
) -> dict[str, float]:
    """Return what each method costs, tried on the whole matrix; infinite where it is not admitted."""
    costs = {}
    for name in CANDIDATES:
        try:
            codec, seconds = seconds_of(create_codec(name), matrix)
            encoded = codec.encode(matrix)
        except CodecError:
            costs[name] = float("inf")
            continue
        error = relative_error(matrix, codec.decode(encoded, torch.empty_like(matrix)))
        n_bytes = sum(segment.nbytes for segment in encoded.values())
        costs[name], _ = admitted_cost(access, error, tolerance, n_bytes, matrix.nbytes, seconds, ssd_bytes_per_s, name)
    return costs
