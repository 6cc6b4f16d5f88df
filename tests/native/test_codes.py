"""4-bit rows in the native core: the products of the INT8 rows they stand for, with every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vl_memory_optimizations.compression.codecs.int4 import _integers, _look_up
from qwen3_vl_memory_optimizations.compression.codecs.int4_tables import tables
from qwen3_vl_memory_optimizations.native import DTYPES, Integers, core

from .test_products import CORE, guarded, native  # noqa: F401

pytestmark = pytest.mark.skipif(core() is None, reason="the native core is not built")


def problem(rows, blocks, n, seed, unaligned=0):
    """Random codes: activations, 4-bit rows and scales."""
    generator = torch.Generator().manual_seed(seed)
    row_bytes = blocks * 36
    memory = torch.randint(0, 256, (n * row_bytes + unaligned,), generator=generator, dtype=torch.uint8)
    x = torch.randn(rows, blocks * 64, generator=generator)
    return x, memory[unaligned:].view(n, row_bytes), torch.rand(n, generator=generator) * 0.01 + 1e-3


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    blocks=st.one_of(st.integers(1, 5), st.integers(15, 18), st.just(48)),
    n=st.integers(1, 70),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(list(DTYPES)),
    unaligned=st.integers(0, 3),
    as_bytes=st.booleans(),
)
def test_products_are_those_of_int8_rows(rows, blocks, n, seed, dtype, unaligned, as_bytes):
    x, data, scale = problem(rows, blocks, n, seed, unaligned)
    integers = CORE.quantize(x, as_bytes=as_bytes)
    found = CORE.linear(integers, data, scale, dtype, tables=tables())
    assert torch.equal(found, CORE.linear(integers, _integers(data), scale, dtype))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 16, 40, 300])
def test_each_instruction_set_has_the_same_bits(native, rows):  # noqa: F811
    x, data, scale = problem(rows, 33, 75, rows)
    integers = [native.quantize(x), native.quantize(x, as_bytes=True)]
    found = [native.linear(each, data, scale, torch.float32, tables=tables()) for each in integers]
    native.select("portable")
    for each, result in zip(integers, found, strict=True):
        assert torch.equal(native.linear(each, data, scale, torch.float32, tables=tables()), result)


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_a_result_depends_on_its_own_rows_alone(native, rows):  # noqa: F811
    x, data, scale = problem(rows, 24, 133, 7)
    integers = native.quantize(x)
    whole = native.linear(integers, data, scale, torch.float32, tables=tables())
    for first, stop in ((0, 1), (5, 133), (130, 133)):
        part = native.linear(integers, data[first:stop], scale[first:stop], torch.float32, tables=tables())
        assert torch.equal(part, whole[:, first:stop])
    for row in range(rows):
        alone = native.linear(native.quantize(x[row : row + 1]), data, scale, torch.float32, tables=tables())
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize(("rows", "n"), [(1, 33), (3, 5), (20, 40), (300, 64)])
def test_nothing_is_read_behind_the_operands(native, rows, n):  # noqa: F811
    x, data, scale = problem(rows, 5, n, 5)
    integers = native.quantize(x)
    given = Integers(guarded(integers.values), guarded(integers.scale), integers.columns, integers.bytes)
    memory = guarded(torch.empty(rows, n))
    out = native.linear(given, guarded(data), guarded(scale), torch.float32, out=memory, tables=guarded(tables()))
    assert torch.equal(out, native.linear(integers, data, scale, torch.float32, tables=tables()))


def test_rows_are_encoded_alike_with_every_instruction_set_and_number_of_threads(native):  # noqa: F811
    errors, nearest = _look_up()
    values = (torch.randn(37, 320, generator=torch.Generator().manual_seed(2)) * 60).round().clamp(-254, 254)
    values = values.to(torch.int16)
    values[3] = 0
    values[4, ::2], values[4, 1::2] = 254, -254

    def encoded():
        data = torch.empty(37, 180, dtype=torch.uint8)
        return data, native.encode(values, tables(), errors, nearest, data)

    data, products = encoded()
    integers = _integers(data).long()
    assert torch.equal(products, torch.stack([(integers * values).sum(1), (integers * integers).sum(1)], dim=1))
    before = torch.get_num_threads()
    native.select("portable")
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            again = encoded()
            assert torch.equal(again[0], data)
            assert torch.equal(again[1], products)
    finally:
        torch.set_num_threads(before)


def test_the_table_of_least_error_is_taken():
    errors, nearest = _look_up()
    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)) * 50
    values = values.round().clamp(-254, 254).to(torch.int16)
    data = torch.empty(8, 36, dtype=torch.uint8)
    CORE.encode(values, tables(), errors, nearest, data)
    groups = values.view(8, 1, 2, 4, 8).permute(0, 1, 3, 4, 2).reshape(8, 4, 16).double()
    sums = [(groups[..., None] - table).abs().amin(-1).square().sum(-1) for table in 2 * tables().double()]
    assert torch.equal(data[:, :4].long(), torch.stack(sums, dim=-1).argmin(-1))


def test_each_instruction_set_compensates_errors_with_the_same_bits(native):  # noqa: F811
    generator = torch.Generator().manual_seed(3)
    columns, rows = 192, 21
    feedback = torch.randn(64, 64, generator=generator).triu(1) * 0.3
    importance = torch.rand(64, generator=generator)
    errors, nearest = _look_up()
    found = []
    for name in (native.isa, "portable"):
        native.select(name)
        targets = torch.randn(rows, columns, generator=torch.Generator().manual_seed(4)) * 30
        fed_back = torch.randn(rows, 64, generator=torch.Generator().manual_seed(5)) * 4
        data = torch.zeros((rows, columns // 16 * 9), dtype=torch.uint8)
        given = targets.clone()
        native.encode_compensated(
            targets[:, 64:128], fed_back, feedback, importance, tables(), errors, nearest, data, 64
        )
        integers = _integers(data)[:, 64:128].view(rows, 2, 4, 8).permute(0, 2, 3, 1).reshape(rows, 64)
        torch.testing.assert_close(targets[:, 64:128], given[:, 64:128] - integers)
        assert torch.equal(targets[:, :64], given[:, :64]) and torch.equal(targets[:, 128:], given[:, 128:])
        found.append((targets, data))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
