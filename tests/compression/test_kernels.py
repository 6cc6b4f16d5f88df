"""What is measured of this machine, and that the bits of a product follow from its operands alone."""

import pytest
import torch

from qwen3_vl_memory_optimizations.compression import create_codec, kernels
from qwen3_vl_memory_optimizations.native import core

from .contract import product

BF16, FP32 = torch.bfloat16, torch.float32
needs_core = pytest.mark.skipif(core() is None, reason="the native core is not built")


def test_the_first_figure_of_the_machine_stays(monkeypatch):
    monkeypatch.setattr(kernels._bf16_cost, "value", None)
    kernels.use_bf16_cost(1.9)
    kernels.use_bf16_cost(2.1)
    assert kernels.bf16_cost() == 1.9 and kernels.fastest_dtype() == BF16 and not kernels.has_native_bf16()
    monkeypatch.setattr(kernels._bf16_cost, "value", 2.0)
    assert kernels.fastest_dtype() == FP32


@needs_core
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n_rows", [1, 2, 5, 16, 20, 40, 130])
@pytest.mark.parametrize("name", ["int8", "int8_rotated", "int4"])
def test_bits_depend_neither_on_ranges_nor_on_threads(name, n_rows, dtype):
    """Ranges of rows are what is in memory; how many threads there are depends on other processes."""
    codec = create_codec(name)
    n, columns = 704, 1024
    generator = torch.Generator().manual_seed(n_rows)
    encoded = codec.encode(torch.randn(n, columns, generator=generator))
    x = torch.randn(n_rows, columns, generator=generator)
    x[:, ::97] *= 20
    x = x.to(dtype)
    whole = product(codec, x, encoded)
    cuts = [0, 16, 144, 272, n]
    parts = [
        product(codec, x, {key: segment[start:stop] for key, segment in encoded.items()})
        for start, stop in zip(cuts, cuts[1:], strict=False)
    ]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(product(codec, x, encoded), whole)
    finally:
        torch.set_num_threads(n_threads)
