"""Quick measurements of this machine: matrix-product throughput."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..compression import LinearInput, RotatedINT8Codec, Scratch
from ..figures import best_seconds

_COLUMNS, _ROWS = 2048, 2048


def product_speeds(rows: int, *, runs: int) -> dict[str, float]:
    """Measure the throughput of `rows` activations through a 2048 x 2048 layer, in operations/s.

    Args:
        rows: 1 for a decode step; many for a prompt or an image.
        runs: number of repetitions; the best one counts.

    Returns:
        One figure each for fp32, bf16 and INT8 weights (the last with fp32 activations, as the library computes).
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_ROWS, _COLUMNS, generator=generator, dtype=torch.float32)
    x = torch.randn(rows, _COLUMNS, generator=generator, dtype=torch.float32)
    codec, scratch = RotatedINT8Codec(), Scratch()
    encoded = codec.encode(weight)
    low_x, low_weight = x.bfloat16(), weight.bfloat16()
    products: dict[str, Callable[[], Any]] = {
        "float32": lambda: F.linear(x, weight),
        "bfloat16": lambda: F.linear(low_x, low_weight),
        "int8": lambda: codec.linear(LinearInput(x), encoded, bias=None, scratch=scratch),
    }
    operations = 2 * rows * _COLUMNS * _ROWS
    with torch.inference_mode():
        return {name: operations / best_seconds(run, runs) for name, run in products.items()}
