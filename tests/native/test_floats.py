"""Products with 16-bit rows against fp64, and their bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vl_memory_optimizations.native import DTYPES, core

from .test_products import CORE, ROUNDING, SMALLEST, guarded, native  # noqa: F401

pytestmark = pytest.mark.skipif(core() is None, reason="the native core is not built")
STORED = (torch.bfloat16, torch.float16)


def problem(rows, columns, n, seed, stored, unaligned=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    memory = torch.randn(n * columns + unaligned, generator=generator).to(stored)
    return x, memory[unaligned:].view(n, columns), torch.rand(n, generator=generator) + 0.5


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.one_of(st.integers(1, 70), st.integers(1000, 1100), st.just(3000)),
    n=st.integers(1, 70),
    seed=st.integers(0, 2**16),
    stored=st.sampled_from(STORED),
    dtype=st.sampled_from(list(DTYPES)),
    unaligned=st.integers(0, 3),
    scaled=st.booleans(),
)
def test_products_are_those_of_fp32(rows, columns, n, seed, stored, dtype, unaligned, scaled):
    x, data, scale = problem(rows, columns, n, seed, stored, unaligned)
    found = CORE.float_linear(x, data, scale if scaled else None, dtype).double()
    values = data.double() * (scale.double()[:, None] if scaled else 1)
    size = x.double().abs() @ values.abs().T
    bound = size * (columns / 32 + 8) * 2**-24 + size * ROUNDING[dtype] + SMALLEST[dtype]
    assert bool(((found - x.double() @ values.T).abs() <= bound).all())


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16])
def test_each_instruction_set_has_the_same_bits(native, rows, stored):  # noqa: F811
    x, data, scale = problem(rows, 1070, 75, rows, stored)
    data[3, :4] = torch.tensor([1e-7, -6e-8, 6e4, 0.0]).to(stored)  # subnormal in fp16
    found = native.float_linear(x, data, scale, torch.float32)
    native.select("portable")
    assert torch.equal(native.float_linear(x, data, scale, torch.float32), found)


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_a_result_depends_on_its_own_rows_alone(native, rows):  # noqa: F811
    x, data, scale = problem(rows, 1500, 133, 7, torch.bfloat16)
    whole = native.float_linear(x, data, scale, torch.float32)
    for first, stop in ((0, 1), (5, 133), (130, 133)):
        part = native.float_linear(x, data[first:stop], scale[first:stop], torch.float32)
        assert torch.equal(part, whole[:, first:stop])
    for row in range(rows):
        alone = native.float_linear(x[row : row + 1], data, scale, torch.float32)
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("rows", "columns", "n"), [(1, 2048, 33), (3, 37, 5), (7, 70, 3)])
def test_nothing_is_read_behind_the_operands(native, rows, columns, n, stored):  # noqa: F811
    x, data, scale = problem(rows, columns, n, 5, stored)
    out = native.float_linear(guarded(x), guarded(data), guarded(scale), torch.float32)
    assert torch.equal(out, native.float_linear(x, data, scale, torch.float32))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_shows_in_its_row_and_column(native, value):  # noqa: F811
    x, data, _ = problem(3, 100, 5, 1, torch.bfloat16)
    data[2, 7] = value
    x[1, 99] = value
    found = native.float_linear(x, data, None, torch.float32).isfinite()
    assert found.tolist() == [[row != 1 and column != 2 for column in range(5)] for row in range(3)]
