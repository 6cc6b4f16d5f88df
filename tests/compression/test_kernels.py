"""The kernel of a product follows from its shape and dtype, and its bits from nothing else."""

import pytest
import torch

from qwen3_vl_memory_optimizations.compression import Scratch, create_codec, int8, kernels, rotated
from qwen3_vl_memory_optimizations.compression.int8 import kernel_for

from .contract import product

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def machine(monkeypatch):
    """Return a function that makes this machine another one."""

    def become(bf16_cost, saturates):
        monkeypatch.setattr(kernels._bf16_cost, "value", bf16_cost)
        monkeypatch.setattr(int8, "int8_product_saturates", lambda: saturates)

    return become


@pytest.mark.parametrize(
    ("bf16_cost", "saturates", "rows", "dtype", "expected"),
    [
        (0.25, False, 1, BF16, "row"),
        (0.25, False, 16, BF16, "packed"),
        (0.25, False, 17, BF16, "split"),
        (0.25, False, 127, BF16, "split"),
        (0.25, False, 128, BF16, "decoded"),
        (0.25, False, 128, FP32, "split"),
        (1.25, False, 128, BF16, "split"),  # computes in bf16, to save memory
        (3.8, True, 24, FP32, "packed"),
        (3.8, True, 25, FP32, "split"),
        (3.8, True, 1024, BF16, "split"),
    ],
)
def test_the_kernel_of_an_int8_product(machine, bf16_cost, saturates, rows, dtype, expected):
    machine(bf16_cost, saturates)
    assert kernel_for(rows, 2048, dtype) == expected


def test_columns_that_torch_does_not_pack(machine):
    machine(0.25, False)
    assert [kernel_for(rows, 2056, BF16) for rows in (1, 2, 128)] == ["decoded", "split", "decoded"]


def test_the_first_figure_of_the_machine_stays(machine):
    machine(None, False)
    kernels.use_bf16_cost(1.9)
    kernels.use_bf16_cost(2.1)
    assert kernels.bf16_cost() == 1.9 and kernels.fastest_dtype() == BF16 and not kernels.has_native_bf16()
    machine(2.0, False)
    assert kernels.fastest_dtype() == FP32


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n_rows", [1, 2, 5, 16, 20, 40, 130])
@pytest.mark.parametrize("name", ["int8", "int8_rotated", "int4"])
def test_bits_depend_neither_on_ranges_nor_on_threads(name, n_rows, dtype):
    """Ranges of rows are what is in memory; how many threads there are depends on other processes."""
    codec = create_codec(name)
    n, columns = (2112, 1024) if name == "int4" else (704, 1024)
    generator = torch.Generator().manual_seed(n_rows)
    encoded = codec.encode(torch.randn(n, columns, generator=generator))
    x = torch.randn(n_rows, columns, generator=generator)
    x[:, ::97] *= 20
    x = x.to(dtype)
    whole = product(codec, x, encoded)
    block = codec.row_block((n, columns))
    cuts = [*range(0, n, block), n] if block > 1 else [0, 16, 144, 272, n]
    assert len(cuts) > 2
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


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n", [20, 23])
@pytest.mark.parametrize("n_rows", [1, 3])
def test_ranges_that_torch_does_not_pack_have_the_bits_of_the_whole(n, n_rows, dtype):
    codec, x = create_codec("int8"), torch.randn(n_rows, 256).to(dtype)
    encoded = codec.encode(torch.randn(n, 256))
    whole = product(codec, x, encoded)
    for cut in (1, 2, 4, 8, 16, n - 1):
        parts = [product(codec, x, {k: v[part] for k, v in encoded.items()}) for part in (slice(cut), slice(cut, n))]
        assert torch.equal(torch.cat(parts, dim=1), whole), cut


@pytest.mark.parametrize("fast", [True, False])
def test_one_rotated_row_is_multiplied_by_digits_where_that_is_fast(monkeypatch, fast):
    monkeypatch.setattr(rotated, "has_fast_int8_row", lambda: fast)
    codec = create_codec("int8_rotated")
    for rows, digits in ((1, fast), (2, False), (5, True)):
        x = rotated.RotatedInput(torch.randn(rows, 1024))
        if x.digits is None:
            pytest.skip("without VNNI there is no product of digits")
        assert (codec._kernel(x) is rotated._digit_product) == digits
        assert codec._kernel(x)(x, codec.encode(torch.randn(8, 1024)), Scratch()).shape == (rows, 8)
