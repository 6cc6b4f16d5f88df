"""INT8, plain and rotated, and its kernels are held to figures."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vl_memory_optimizations import CodecError
from qwen3_vl_memory_optimizations.compression import INT8Codec, LinearInput, Scratch
from qwen3_vl_memory_optimizations.compression.base import bf16_at_least, linear_in_steps
from qwen3_vl_memory_optimizations.compression.codecs import int8, rotated
from qwen3_vl_memory_optimizations.compression.codecs.int8 import dequantize
from qwen3_vl_memory_optimizations.compression.codecs.rotation import rotate, rotate_back
from qwen3_vl_memory_optimizations.native import core

from .contract import DTYPES, CodecContract, assert_snr, decoded, product


class TestINT8(CodecContract):
    name = "int8"
    floor_db = 37
    product_floor_db = 44

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_values_without_a_scale_are_refused(self, codec, bad):
        for dtype in DTYPES:
            values = torch.randn(4, 8).to(dtype)
            values[2, 5] = bad
            with pytest.raises(CodecError, match="NaN or infinite"):
                codec.encode(values)

    def test_only_matrices_of_numbers_are_supported(self, codec):
        assert not codec.supports((8,), torch.float32)
        assert not codec.supports((8, 8), torch.int32)
        assert not codec.supports((0, 8), torch.float32)

    @pytest.mark.parametrize("size", [1e-5, 1.0, 1e4])
    def test_quality_in_fp16_does_not_depend_on_the_size_of_values(self, codec, size):
        values = (torch.randn(16, 256) * size).half()
        assert_snr(values, decoded(codec, codec.encode(values), torch.float16), 37, f"size {size}")

    @pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e4, 1e30])
    def test_quality_does_not_depend_on_the_size_of_values(self, codec, size):
        values = torch.randn(16, 256) * size
        assert_snr(values, decoded(codec, codec.encode(values), torch.float32), 37, f"size {size}")

    def test_no_value_is_clipped(self, codec):
        values = torch.randn(64, 256)
        encoded = codec.encode(values)
        error = (decoded(codec, encoded, torch.float32) - values).abs()
        assert bool((error <= encoded["scale"][:, None] * 0.5001).all())

    def test_row_sum_is_the_sum_of_a_row(self, codec):
        encoded = codec.encode(torch.randn(5, 3000).abs())
        assert torch.equal(encoded["row_sum"], encoded["data"].int().sum(dim=1).int())


class TestRotatedINT8(TestINT8):
    name = "int8_rotated"
    product_floor_db = 38  # 8 bits an activation

    def test_no_value_is_clipped(self, codec):
        values = torch.randn(64, 256)
        encoded = codec.encode(values)
        error = (dequantize(encoded, torch.empty(64, 256)) - rotate(values)).abs()
        assert bool((error <= encoded["scale"][:, None] * 0.5001).all())

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("n_rows", [1, 3, 6, 40])
    @pytest.mark.parametrize("outliers", ["weights", "activations", "both"])
    def test_outlier_channels_cost_no_precision(self, codec, n_rows, dtype, outliers):
        weights, x = torch.randn(96, 2048), torch.randn(n_rows, 2048)
        channels = torch.randperm(2048)[:10]
        if outliers != "activations":
            weights[:, channels] *= 50
        if outliers != "weights":
            x[:, channels] *= 50
        weights, x = weights.to(dtype), x.to(dtype)
        exact = F.linear(x.double(), weights.double())
        encoded = codec.encode(weights)
        found = product(codec, x, encoded)
        assert_snr(exact, found, 33, f"{self.name} {n_rows} rows {dtype}, outliers in {outliers}")

    def test_activations_that_stay_uneven_lose_nothing(self, codec):
        """The rotation can make a spike, of what it makes of one."""
        encoded = codec.encode(torch.randn(32, 2048))
        spike = torch.zeros(2048)
        spike[7] = 1
        uneven = rotate_back(spike[None]) + torch.randn(1, 2048) * 1e-3
        for n_rows in (1, 8):
            x = torch.cat([torch.randn(n_rows - 1, 2048), uneven])
            exact = F.linear(x.double(), decoded(codec, encoded, torch.float64))
            assert_snr(exact, product(codec, x, encoded), 44)


@pytest.fixture
def without_core(monkeypatch):
    """The products of torch, as where the native core is not built."""
    for module in (int8, rotated):
        monkeypatch.setattr(module, "core", lambda: None)


@pytest.mark.usefixtures("without_core")
class TestINT8WithTorch(TestINT8):
    pass


@pytest.mark.usefixtures("without_core")
class TestRotatedINT8WithTorch(TestRotatedINT8):
    pass


@pytest.mark.parametrize("columns", [1, 2, 33, 64, 96, 576, 2048, 2560, 4304, 9728, 12288])
def test_the_rotation_is_orthonormal_and_the_same_for_each_row(columns):
    x = torch.randn(9, columns)
    y = rotate(x)
    assert torch.allclose(rotate_back(y), x, atol=1e-5 * 30)
    assert torch.allclose(y.norm(dim=1), x.norm(dim=1), rtol=1e-5)
    for row in range(9):
        assert torch.allclose(rotate(x[row : row + 1])[0], y[row], atol=1e-5)


@pytest.mark.parametrize("pattern", ["one channel", "constant", "alternating", "half"])
def test_the_rotation_spreads_what_is_uneven(pattern):
    x = torch.zeros(1, 2048)
    match pattern:
        case "one channel":
            x[0, 100] = 1
        case "constant":
            x[:] = 1
        case "alternating":
            x[0, ::2], x[0, 1::2] = 1, -1
        case "half":
            x[0, :1024] = 1
    y = rotate(x)
    assert float(y.abs().max() / y.square().mean().sqrt()) < 10  # 45 without the random signs


def test_the_rotation_never_changes():
    """Encoded checkpoints depend on it."""
    row = rotate(torch.arange(1.0, 129.0)[None])[0]
    assert [round(float(value), 3) for value in row[:4]] == [-111.723, -56.569, 41.719, -299.106]


@settings(max_examples=300, deadline=None)
@given(st.floats(min_value=0, max_value=2.0**126, width=32))
def test_a_scale_is_the_smallest_bf16_value_not_below(value):
    exact = torch.tensor([value], dtype=torch.float32)
    scale = bf16_at_least(exact)
    assert torch.equal(scale.bfloat16().float(), scale)
    assert scale >= exact
    below = (scale.view(torch.int32) - 0x10000).view(torch.float32)
    assert value == 0 or below < exact


def outlier_problem(n_rows, n=96, k=512, dtype=torch.float32):
    """Activations with channels 200 times larger than the others, as trained models have."""
    x, codec = torch.randn(n_rows, k), INT8Codec()
    x[:, :: k // 3] *= 200
    encoded = codec.encode(torch.randn(n, k))
    x = x.to(dtype)
    return codec, x, encoded, F.linear(x.double(), decoded(codec, encoded, torch.float64))


@pytest.mark.parametrize(("dtype", "floor_db"), [(torch.float32, 60), (torch.float16, 58), (torch.bfloat16, 48)])
@pytest.mark.parametrize(("n_rows", "n", "k"), [(1, 96, 512), (5, 7, 33), (40, 96, 512), (6, 130, 514)])
def test_products_with_outliers(n_rows, n, k, dtype, floor_db):
    codec, x, encoded, exact = outlier_problem(n_rows, n, k, dtype)
    found = product(codec, x, encoded)
    assert found.dtype == dtype
    assert_snr(exact, found, floor_db if core() else 43, f"{dtype} {(n_rows, n, k)}")


@pytest.mark.parametrize(("dtype", "floor_db"), [(torch.float32, 120), (torch.float16, 60), (torch.bfloat16, 43)])
@pytest.mark.parametrize("n_rows", [1, 5, 40])
@pytest.mark.parametrize("slot_bytes", [1, 16 * 2**20])
def test_decoding_kernel_with_outliers(n_rows, dtype, floor_db, slot_bytes):
    codec, x, encoded, exact = outlier_problem(n_rows, dtype=dtype)
    found = linear_in_steps(LinearInput(x), encoded, None, codec.decode, Scratch(slot_bytes=slot_bytes))
    assert_snr(exact, found, floor_db, f"decoded {dtype}")
