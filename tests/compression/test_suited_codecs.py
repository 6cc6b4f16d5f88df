"""FP16, SVD and sparse: the contract, what each is for, and what each refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vl_memory_optimizations import CodecError
from qwen3_vl_memory_optimizations.compression import FP16Codec, LinearInput, SparseCodec, SVDCodec, create_codec
from qwen3_vl_memory_optimizations.compression.codecs import svd
from qwen3_vl_memory_optimizations.native import core

from .contract import DTYPES, CodecContract, assert_snr, decoded, product

BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def same_bits(a, b):
    return torch.equal(a.contiguous().view(BITS[a.dtype]), b.contiguous().view(BITS[b.dtype]))


class TestFP16(CodecContract):
    name = "fp16"
    floor_db = 70
    product_floor_db = 43

    def test_16_bits_stay_as_they_are(self, codec):
        for dtype in (torch.bfloat16, torch.float16):
            values = torch.tensor([[math.nan, math.inf, -math.inf, -0.0, 1e-7, 60000]]).to(dtype)
            encoded = codec.encode(values)
            assert encoded["data"].dtype == dtype
            torch.testing.assert_close(decoded(codec, encoded, dtype), values, rtol=0, atol=0, equal_nan=True)

    def test_nan_and_infinities_are_kept_and_cost_the_others_nothing(self, codec):
        values = torch.randn(3, 64)
        values[1, :3] = torch.tensor([math.nan, math.inf, -math.inf])
        found = decoded(codec, codec.encode(values), torch.float32)
        assert found[1, 0].isnan() and found[1, 1] == math.inf and found[1, 2] == -math.inf
        assert_snr(values[1, 3:], found[1, 3:], 70)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
    def test_error_bound(self, numbers):
        values, codec = torch.tensor([numbers]), FP16Codec()
        found = decoded(codec, codec.encode(values), torch.float64)
        largest = values.abs().max().double()
        bound = torch.maximum(values.abs().double() * 2.0**-11, largest * 2.0**-39).clamp(min=2.0**-148)
        assert bool(((found - values.double()).abs() <= bound).all()), (found, values)

    def test_many_rows_of_bf16_are_multiplied_as_they_are(self, codec):
        values, x, bias = torch.randn(32, 64).bfloat16(), torch.randn(17, 64).bfloat16(), torch.randn(32).bfloat16()
        assert torch.equal(product(codec, x, codec.encode(values), bias), F.linear(x, values, bias))

    @pytest.mark.skipif(core() is None, reason="the native core is not built")
    @pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
    def test_few_rows_are_multiplied_in_fp32(self, codec, stored):
        values, x = (torch.randn(33, 100) * 1e-3).to(stored), torch.randn(5, 100)
        encoded = codec.encode(values)
        exact = F.linear(x.double(), decoded(codec, encoded, torch.float64, 100))
        assert_snr(exact, product(codec, x, encoded), 130)


class TestSVD(CodecContract):
    name = "svd"
    floor_db = 40
    product_floor_db = 40
    shapes = ((64, 96), (7, 33), (130, 514), (514, 130), (4, 3, 5, 2))

    def values(self, *shape):
        return (torch.randn(shape[0], 2) @ torch.randn(2, math.prod(shape[1:]))).view(shape)

    def test_rank_and_error(self, codec):
        for rank in (1, 5, 30):
            values = torch.randn(200, rank) @ torch.randn(rank, 300)
            fitted = codec.fit(lambda values=values: values)
            assert fitted.rank <= rank
            error = (decoded(fitted, fitted.encode(values), torch.float64, 300) - values).norm() / values.norm()
            assert error <= codec.tolerance

    @pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.02])
    def test_energy_and_tolerance_are_both_kept(self, tolerance):
        values = torch.randn(256, 256) @ torch.diag(0.9 ** torch.arange(256.0)) @ torch.randn(256, 200)
        fitted = SVDCodec(tolerance=tolerance).fit(lambda: values)
        error = (decoded(fitted, fitted.encode(values), torch.float64, 200) - values).norm() / values.norm()
        assert error <= min(tolerance, math.sqrt(0.05) + 2**-8)
        fewer = SVDCodec(rank=fitted.rank - 1, right=fitted._right[:-1])
        worse = (decoded(fewer, fewer.encode(values), torch.float64, 200) - values).norm() / values.norm()
        assert worse > min(tolerance - 2**-8, math.sqrt(0.05))  # no rank below would do

    def test_dense_values_are_refused(self, codec):
        with pytest.raises(CodecError, match=r"rank \d+ of 64"):
            codec.fit(lambda: torch.randn(64, 96))
        with pytest.raises(CodecError, match="NaN"):
            codec.fit(lambda: torch.full((4, 4), math.nan))

    def test_what_was_stored_is_read_and_not_written(self, codec):
        values, x = self.values(64, 96), torch.randn(3, 96)
        fitted = codec.fit(lambda: values)
        encoded = fitted.encode(values)
        stored = create_codec(fitted.stored_name)
        assert stored.segments((64, 96), torch.bfloat16) == fitted.segments((64, 96), torch.float32)
        assert torch.equal(product(stored, x, encoded), product(fitted, x, encoded))
        with pytest.raises(CodecError, match="encodes only the tensor"):
            stored.encode(values)
        with pytest.raises(CodecError, match="no rank"):
            codec.segments((64, 96), torch.float32)

    def test_the_first_product_is_shared_by_all_ranges_of_rows(self, codec):
        values, x = self.values(64, 96), LinearInput(torch.randn(3, 96))
        fitted = codec.fit(lambda: values)
        encoded = fitted.encode(values)
        halves = [{**encoded, "left": encoded["left"][rows]} for rows in (slice(0, 32), slice(32, 64))]
        for half in halves:
            fitted.linear(x, half, None, None)
            assert len(x._derived) == 1

    @pytest.mark.parametrize("rank", [1, 20, 32, 33, 70])
    def test_a_sketch_finds_the_rank_that_the_whole_has(self, monkeypatch, codec, rank):
        values = torch.randn(300, rank) @ torch.randn(rank, 280)
        monkeypatch.setattr(svd, "SKETCHES", ())
        exact = codec.fit(lambda: values).rank
        monkeypatch.setattr(svd, "SKETCHES", (32, 128))
        monkeypatch.setattr(svd, "_spectrum", None)  # is not called
        assert exact <= codec.fit(lambda: values).rank <= min(exact + 1, rank)


class TestSparse(CodecContract):
    name = "sparse"
    product_floor_db = 43
    shapes = ((64, 96), (7, 33), (130, 514), (4, 3, 5, 20), (1, 40000))
    share = 0.1

    def values(self, *shape):
        dense = torch.randn(shape)
        kept = torch.rand(shape) < self.share
        kept.view(shape[0], -1)[:, 8:] &= torch.rand(shape).view(shape[0], -1)[:, 8:] < 0.9
        return torch.where(kept, dense, 0.0)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("share", [0.0, 0.01, 0.3])
    def test_every_bit_is_kept(self, codec, dtype, share):
        values = torch.where(torch.rand(20, 301) < share, torch.randn(20, 301), 0.0).to(dtype)
        if share:
            values[2, :5] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-7]).to(dtype)
        fitted = codec.fit(lambda: values)
        encoded = fitted.encode(values)
        assert same_bits(decoded(fitted, encoded, dtype, 301), values)
        assert encoded["data"].nbytes < values.nbytes
        stored = create_codec(fitted.stored_name)
        assert stored.segments((20, 301), torch.uint8)[0].n_bytes == encoded["data"].nbytes
        assert same_bits(decoded(stored, encoded, dtype, 301), values)

    def test_the_smaller_form_is_taken(self, codec):
        for n_kept, form in ((1, "csr"), (30, "csr"), (40, "mask"), (300, "mask")):
            values = torch.zeros(4, 512, dtype=torch.bfloat16)
            values[:, :n_kept] = 1
            fitted = codec.fit(lambda values=values: values)
            assert fitted.form == form
            mask_bytes, csr_bytes = 512 // 8 + 2 * n_kept, 4 * n_kept
            assert fitted.segments((4, 512), values.dtype)[0].n_bytes == 4 * min(mask_bytes, csr_bytes)

    def test_dense_values_and_one_full_row_are_refused(self, codec):
        values = self.values(64, 96)
        values[5] = 1
        for bad in (torch.randn(64, 96), values):
            with pytest.raises(CodecError, match="fullest row"):
                codec.fit(lambda bad=bad: bad)

    def test_more_values_than_have_a_place_are_refused(self, codec):
        fitted = codec.fit(lambda: self.values(64, 96))
        with pytest.raises(CodecError, match="was fitted to"):
            fitted.encode(torch.randn(64, 96))

    def test_a_threshold_drops_what_is_small_and_nothing_else(self):
        values = torch.randn(50, 200)
        fitted = SparseCodec(threshold=1.0).fit(lambda: values)
        found = decoded(fitted, fitted.encode(values), torch.float32, 200)
        assert torch.equal(found, torch.where(values.abs() > 1, values, 0.0))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("n_rows", [1, 6])
    def test_both_kernels(self, codec, n_rows, dtype):
        self.share = 0.03
        values, x = self.values(64, 512).to(dtype), torch.randn(n_rows, 512).to(dtype)
        fitted = codec.fit(lambda: values)
        encoded = fitted.encode(values)
        exact = F.linear(x.double(), values.double())
        assert fitted.form == "csr"
        assert_snr(exact, fitted._csr_product(LinearInput(x), encoded), 43)
        for _ in range(6):
            assert_snr(exact, product(fitted, x, encoded), 43)
