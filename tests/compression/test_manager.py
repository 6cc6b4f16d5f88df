"""Runtime tensors of any shape and dtype: what comes back, what was lost, and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vl_memory_optimizations import (
    CodecError,
    ConfigurationError,
    FP16QuantizationCompressor,
    INT8QuantizationCompressor,
    MemoryCompressionManager,
    SparseCompressionCompressor,
    SVDDecompositionCompressor,
)
from qwen3_vl_memory_optimizations.compression import TOLERANCES, CompressionMethodSelector

from .test_selection import speeds

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = st.lists(st.integers(0, 9), min_size=0, max_size=4)


@pytest.fixture
def manager():
    return MemoryCompressionManager(CompressionMethodSelector(speeds()))


def check_round_trip(compressor, tensor, most_error):
    before = tensor.clone()
    compressed = compressor.compress(tensor)
    assert torch.equal(tensor, before)
    tensor.fill_(7)  # the encoded form shares nothing with it
    found = compressor.decompress(compressed)
    assert (found.shape, found.dtype) == (before.shape, before.dtype)
    assert compressed.original_bytes == before.nbytes
    error = (found.double() - before.double()).norm() / before.double().norm().clamp(min=1e-300)
    assert error <= most_error
    assert compressed.relative_error == pytest.approx(float(error), rel=0.05, abs=1e-6)
    return compressed


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.sampled_from(DTYPES), st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 1e3]))
def test_int8_of_any_shape(shape, dtype, seed, size):
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    compressed = check_round_trip(INT8QuantizationCompressor(), tensor, 0.02)
    assert compressed.method == ("int8" if tensor.numel() else "none")


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.sampled_from(DTYPES), st.integers(0, 2**31), st.sampled_from([1e-30, 1.0, 1e30]))
def test_fp16_of_any_shape_and_range(shape, dtype, seed, size):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if dtype == torch.float32:
        tensor *= size
    check_round_trip(FP16QuantizationCompressor(), tensor, 2**-11)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=0, max_size=3), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_sparse_is_exact_or_refuses(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = [*shape, 64]
    tensor = torch.where(torch.rand(shape, generator=generator) < 0.05, torch.randn(shape, generator=generator), 0.0)
    compressed = check_round_trip(SparseCompressionCompressor(), tensor.to(dtype), 0.0)
    assert compressed.ratio > 1
    with pytest.raises(CodecError):
        SparseCompressionCompressor().compress(torch.ones(shape, dtype=dtype))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(8, 40), st.integers(8, 40), st.integers(0, 2**31), st.sampled_from(DTYPES))
def test_svd_keeps_its_tolerance_or_refuses(rank, rows, columns, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(2, rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    check_round_trip(SVDDecompositionCompressor(), tensor.to(dtype), 0.01 + (2**-8 if dtype == torch.bfloat16 else 0))
    with pytest.raises(CodecError, match="rank"):
        SVDDecompositionCompressor().compress(torch.randn(rows, columns, generator=generator))


def test_values_that_are_no_numbers():
    tensor = torch.zeros(4, 64)
    tensor[1, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    for compressor in (INT8QuantizationCompressor(), SVDDecompositionCompressor()):
        with pytest.raises(CodecError, match="NaN"):
            compressor.compress(tensor)
    for compressor in (FP16QuantizationCompressor(), SparseCompressionCompressor()):
        compressed = compressor.compress(tensor)
        assert compressed.relative_error == 0
        torch.testing.assert_close(compressor.decompress(compressed), tensor, rtol=0, atol=0, equal_nan=True)


def test_a_tolerance_is_kept_or_the_tensor_refused():
    tensor = torch.randn(64, 64)
    assert INT8QuantizationCompressor(tolerance=0.02).compress(tensor).relative_error <= 0.02
    with pytest.raises(CodecError, match="above the tolerance of 0.001"):
        INT8QuantizationCompressor(tolerance=0.001).compress(tensor)
    with pytest.raises(CodecError, match="does not take a torch.int64 tensor"):
        INT8QuantizationCompressor().compress(torch.ones(3, 3, dtype=torch.int64))


def test_key_and_value_states_have_a_scale_for_each_token_and_head():
    states = torch.randn(1, 4, 16, 32) * torch.logspace(-3, 3, 4)[None, :, None, None]
    compressed = INT8QuantizationCompressor().compress(states)
    assert compressed.encoded["scale"].shape == (64,)
    error = (INT8QuantizationCompressor().decompress(compressed) - states).norm(dim=3) / states.norm(dim=3)
    assert float(error.max()) < 0.02


@settings(max_examples=100, deadline=None)
@given(
    SHAPES,
    st.sampled_from([*DTYPES, torch.int64, torch.bool, torch.uint8]),
    st.sampled_from(sorted(TOLERANCES)),
    st.sampled_from(["dense", "zeros", "nan"]),
    st.integers(0, 2**31),
)
def test_the_manager_takes_any_tensor(shape, dtype, kind, what, seed):
    manager = MemoryCompressionManager(CompressionMethodSelector(speeds()))
    tensor = torch.randn([*shape, 40], generator=torch.Generator().manual_seed(seed))
    if what == "zeros":
        tensor[tensor < 1.5] = 0
    if what == "nan" and tensor.numel():
        tensor.view(-1)[0] = math.nan
    tensor = tensor.nan_to_num().to(dtype) if not dtype.is_floating_point else tensor.to(dtype)
    before = tensor.clone()
    compressed = manager.compress(tensor, kind=kind)
    found = manager.decompress(compressed)
    assert (found.shape, found.dtype) == (before.shape, before.dtype)
    assert compressed.relative_error <= TOLERANCES[kind]
    assert compressed.n_bytes <= before.nbytes
    if compressed.method in ("none", "sparse"):
        torch.testing.assert_close(found, before, rtol=0, atol=0, equal_nan=True)


def test_the_kind_decides_how_much_may_be_lost(manager):
    tensor = torch.randn(2, 8, 64, 32)
    kv = manager.compress(tensor, kind="kv_cache")
    assert (kv.method, kv.ratio > 3) == ("int8", True)
    general = manager.compress(tensor, kind="general")
    assert general.method == "fp16" and general.relative_error < 1e-3
    assert manager.compress(tensor.bfloat16(), kind="general").method == "none"
    assert "fp16" in str(manager.explain(tensor))
    with pytest.raises(ConfigurationError, match="kind"):
        manager.compress(tensor, kind="kv")


def test_what_a_sample_of_rows_did_not_show_is_found_in_the_whole(manager):
    tensor = torch.randn(1024, 64)
    tensor[1::4, 5] *= 3000  # rows 0, 4, 8... are looked at
    compressed = manager.compress(tensor, kind="kv_cache")
    assert compressed.relative_error <= TOLERANCES["kv_cache"]
    hidden = tensor.clone()
    hidden[1] = math.nan
    assert manager.compress(hidden, kind="kv_cache").method in ("none", "fp16")


def test_the_names_of_the_specification_are_there():
    manager = MemoryCompressionManager()
    for name, kind in (
        ("int8_compressor", INT8QuantizationCompressor),
        ("fp16_compressor", FP16QuantizationCompressor),
        ("svd_compressor", SVDDecompositionCompressor),
        ("sparse_compressor", SparseCompressionCompressor),
        ("selector", CompressionMethodSelector),
    ):
        assert isinstance(getattr(manager, name), kind)
