"""Products of the native core against fp64: shapes, alignments, values; the same bits however they are computed."""

from __future__ import annotations

import ctypes
import math
import mmap
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vl_memory_optimizations.compression.codecs.rotation import rotate, rotation_signs
from qwen3_vl_memory_optimizations.native import DTYPES, Integers, core

CORE = core()
pytestmark = pytest.mark.skipif(CORE is None, reason="the native core is not built")

SETS = ("portable", "avx2", "avxvnni", "avx512vnni", "amx")
ROUNDING = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-10}
SMALLEST = {torch.float32: 1e-37, torch.bfloat16: 1e-37, torch.float16: 2**-24}


@pytest.fixture(params=SETS)
def native(request):
    """The core with one instruction set."""
    best = CORE.isa
    if SETS.index(request.param) > SETS.index(best):
        pytest.skip(f"this processor has {best} at most")
    CORE.select(request.param)
    yield CORE
    CORE.select(best)


def problem(rows, columns, n, seed, dtype=torch.float32, unaligned=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator).to(dtype)
    memory = torch.randint(-127, 128, (n * columns + unaligned,), generator=generator, dtype=torch.int8)
    return x, memory[unaligned:].view(n, columns), torch.rand(n, generator=generator) * 0.01 + 1e-3


def check(native, x, weights, scale, dtype, as_bytes=False):
    """Compare with fp64; the bound follows from the arithmetic, so nothing worse can hide in it."""
    integers = native.quantize(x, as_bytes=as_bytes)
    found = native.linear(integers, weights, scale, dtype).double()
    wide, values = x.double(), weights.double() * scale.double()[:, None]
    exact = wide @ values.T
    size = wide.abs() @ values.abs().T
    unit = integers.scale.double()[:, None] / 2 * values.abs().sum(dim=1)
    bound = unit * 1.001 + size * 2**-21 + (size + unit) * ROUNDING[dtype] + SMALLEST[dtype]
    assert ((found - exact).abs() <= bound).all()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.one_of(st.integers(1, 70), st.integers(1000, 1100), st.just(3000)),
    n=st.integers(1, 70),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(list(DTYPES)),
    unaligned=st.integers(0, 3),
    as_bytes=st.booleans(),
)
def test_products_are_within_the_rounding_of_activations(rows, columns, n, seed, dtype, unaligned, as_bytes):
    check(CORE, *problem(rows, columns, n, seed, dtype, unaligned), dtype, as_bytes)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("rows", [1, 2, 5, 15, 16, 17, 300])
def test_each_instruction_set_has_the_same_bits(native, rows, dtype):
    x, weights, scale = problem(rows, 2060, 70, rows, dtype)
    part = x[:, :2048].contiguous()

    def results():
        integers = [native.quantize(x), native.quantize(x, as_bytes=True), native.quantize(part, rotation_signs(2048))]
        products = [native.linear(each, weights, scale, dtype) for each in integers[:2]]
        return [each.bytes for each in integers], [
            *(tensor for each in integers for tensor in (each.values, each.scale)),
            *products,
        ]

    fits, found = results()
    native.select("portable")
    assert fits == results()[0] == [False, True, False]
    for one, other in zip(found, results()[1], strict=True):
        assert torch.equal(one, other)


def test_a_row_with_a_peak_keeps_14_bits_among_rows_of_8(native):
    x, weights, scale = problem(40, 2048, 70, 1)
    x[7, 100] = 100.0  # a crest of 40
    integers = native.quantize(x, as_bytes=True)
    assert not integers.bytes
    assert integers.values.abs().amax(dim=1).tolist() == [127] * 7 + [16383] + [127] * 32
    check(native, x, weights, scale, torch.float32, as_bytes=True)


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16, 40])
def test_a_result_depends_on_its_own_rows_alone(native, rows, as_bytes):
    x, weights, scale = problem(rows, 1500, 133, 7)

    def product(x, weights, scale):
        return native.linear(native.quantize(x, as_bytes=as_bytes), weights, scale, torch.float32)

    whole = product(x, weights, scale)
    for first, stop in ((0, 1), (5, 133), (130, 133)):
        assert torch.equal(product(x, weights[first:stop], scale[first:stop]), whole[:, first:stop])
    for row in range(rows):
        assert torch.equal(product(x[row : row + 1], weights, scale)[0], whole[row])


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("rows", [1, 40])
def test_bits_do_not_depend_on_threads(native, rows, as_bytes):
    x, weights, scale = problem(rows, 2048, 1000, 3)
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 7):
            torch.set_num_threads(n_threads)
            integers = native.quantize(x, as_bytes=as_bytes)
            found.append(native.linear(integers, weights, scale, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_several_threads_compute_at_once(native):
    x, weights, scale = problem(20, 2048, 1000, 3)
    expected, wrong = native.linear(native.quantize(x), weights, scale, torch.float32), []

    def work():
        for _ in range(30):
            if not torch.equal(native.linear(native.quantize(x), weights, scale, torch.float32), expected):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("k", [64, 384, 2048, 2560, 4304, 6144])
def test_rotation_is_that_of_the_codec(native, k):
    x = torch.randn(3, k)
    integers, expected = native.quantize(x, rotation_signs(k)), rotate(x)
    found = integers.values[:, :k].float() * integers.scale[:, None]
    assert (found - expected).abs().max() <= 0.51 * integers.scale.max()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_with_a_value_that_is_no_number_gives_none(native, value):
    x, weights, scale = problem(3, 100, 20, 1)
    x[1, 37] = value
    found = native.linear(native.quantize(x), weights, scale, torch.float32)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("factor", [0.0, 1e-42, 1e-30, 1e-20, 1e20, 1e36])
def test_rows_of_any_size(native, factor):
    x, weights, scale = problem(2, 200, 10, 2)
    found = native.linear(native.quantize(x * factor), weights, scale, torch.float32)
    expected = (x * factor).double() @ (weights.double() * scale.double()[:, None]).T
    assert torch.allclose(found.double(), expected, rtol=1e-2, atol=1e-27 + 1e-4 * float(expected.abs().max()))


def test_outliers_keep_14_bits(native):
    x, weights, scale = problem(2, 512, 10, 2)
    x[0, 5] = 200.0
    check(native, x, weights, scale, torch.float32)


def test_the_ends_of_the_range_do_not_overflow(native):
    x = torch.full((17, 3000), 1.0)
    x[::2] = -1.0
    for w in (127, -127):
        weights = torch.full((33, 3000), w, dtype=torch.int8)
        for as_bytes in (False, True):
            check(native, x, weights, torch.ones(33), torch.float32, as_bytes)
        check(native, x[:1], weights, torch.ones(33), torch.float32)


def test_no_rows_and_no_columns(native):
    x, weights, scale = problem(0, 64, 5, 0)
    assert native.linear(native.quantize(x), weights, scale, torch.float32).shape == (0, 5)
    x, weights, scale = problem(2, 64, 0, 0)
    assert native.linear(native.quantize(x), weights, scale, torch.float32).shape == (2, 0)


def test_rows_that_lie_apart(native):
    x, weights, scale = problem(4, 100, 20, 4)
    wide = torch.zeros(4, 130)
    wide[:, 10:110] = x
    out = torch.full((4, 50), 7.0)
    native.linear(native.quantize(wide[:, 10:110]), weights, scale, torch.float32, out=out[:, 5:25])
    assert torch.equal(out[:, 5:25], native.linear(native.quantize(x), weights, scale, torch.float32))
    assert (out[:, :5] == 7).all()
    assert (out[:, 25:] == 7).all()


def test_columns_after_the_last_are_zeros(native):
    integers = native.quantize(torch.randn(2, 37))
    assert isinstance(integers, Integers)
    assert integers.values.shape == (2, 64)
    assert not integers.values[:, 37:].any()


def guarded(values: torch.Tensor) -> torch.Tensor:
    """Copy into memory that ends where the process may not read."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page, n_bytes = mmap.PAGESIZE, values.nbytes
    size = -(-n_bytes // page) * page
    start = libc.mmap(None, size + page, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert libc.mprotect(start + size, page, 0) == 0
    memory = (ctypes.c_char * n_bytes).from_address(start + size - n_bytes)
    return torch.frombuffer(memory, dtype=values.dtype).view(values.shape).copy_(values)


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "n"), [(1, 2048, 33), (3, 37, 5), (20, 2048, 40), (20, 512, 16), (17, 70, 3), (300, 70, 64)]
)
def test_nothing_is_read_behind_the_operands(native, rows, columns, n, as_bytes):
    x, weights, scale = problem(rows, columns, n, 5)
    integers = native.quantize(guarded(x), as_bytes=as_bytes)
    given = Integers(guarded(integers.values), guarded(integers.scale), columns, integers.bytes)
    out = native.linear(given, guarded(weights), guarded(scale), torch.float32, out=guarded(torch.empty(rows, n)))
    assert torch.equal(out, native.linear(integers, weights, scale, torch.float32))
