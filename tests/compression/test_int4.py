"""INT4: the contract of a codec, how exact it is, and the same rows without the native core."""

import math

import pytest
import torch
import torch.nn.functional as F

from qwen3_vl_memory_optimizations import CodecError
from qwen3_vl_memory_optimizations.compression import create_codec
from qwen3_vl_memory_optimizations.compression.codecs import int4, int8, rotated
from qwen3_vl_memory_optimizations.compression.codecs.int4_tables import tables
from qwen3_vl_memory_optimizations.compression.codecs.rotation import rotate
from qwen3_vl_memory_optimizations.native import core as native_core

from .contract import DTYPES, CodecContract, assert_snr, decoded, product


class TestINT4(CodecContract):
    name = "int4"
    floor_db = 23
    product_floor_db = 44
    shapes = ((6, 64), (9, 192), (5, 2, 32), (3, 6144))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_values_without_a_scale_are_refused(self, codec, bad):
        for dtype in DTYPES:
            values = torch.randn(64, 64).to(dtype)
            values[2, 5] = bad
            with pytest.raises(CodecError, match="NaN or infinite"):
                codec.encode(values)

    def test_columns_that_do_not_divide_are_not_supported(self, codec):
        assert not codec.supports((64, 64), torch.int32)
        for shape in ((64,), (0, 64), (64, 96), (64, 33), ()):
            assert not codec.supports(shape, torch.float32), shape

    def test_a_weight_takes_four_and_a_half_bits(self, codec):
        encoded = codec.encode(torch.randn(256, 2048))
        assert encoded["data"].nbytes == 256 * 2048 * 4.5 / 8
        assert encoded["scale"].nbytes == 256 * 4

    def test_the_error_is_that_of_the_tables_and_half_that_of_a_scale_per_32(self, codec):
        values = torch.randn(256, 2048, generator=torch.Generator().manual_seed(0))
        found = decoded(codec, codec.encode(values), torch.float32, 2048)
        error = float((found - values).square().mean())
        groups = values.view(256, -1, 32)
        unit = groups.gather(2, groups.abs().argmax(2, keepdim=True)) / -8  # Q4_0 of llama.cpp
        nearest = (groups / unit).round().clamp(-8, 7) * unit
        assert error < 0.0033
        assert error < 0.46 * float((nearest - groups).square().mean())

    @pytest.mark.parametrize("size", [1e-30, 1e-6, 1e4, 1e30])
    def test_quality_does_not_depend_on_the_size_of_values(self, codec, size):
        values = torch.randn(64, 256) * size
        assert_snr(values, decoded(codec, codec.encode(values), torch.float32, 256), 23, f"size {size}")

    @pytest.mark.parametrize("size", [1e-5, 1.0, 1e4])
    def test_quality_in_fp16_does_not_depend_on_the_size_of_values(self, codec, size):
        values = (torch.randn(64, 256) * size).half()
        assert_snr(values, decoded(codec, codec.encode(values), torch.float16, 256), 23, f"size {size}")

    def test_outliers_do_not_take_the_bits_of_their_row(self, codec):
        values = torch.randn(64, 2048)
        values[:, 7] = 60.0
        assert_snr(values, decoded(codec, codec.encode(values), torch.float32, 2048), 23)

    def test_a_value_far_from_all_others_of_its_rotated_row_keeps_its_size(self, codec):
        values = torch.randn(4, 64)
        values[2] = rotate(torch.eye(64))[:, 5] * 30  # becomes a single value
        assert_snr(values, decoded(codec, codec.encode(values), torch.float32, 64), 20)

    @pytest.mark.parametrize("n_rows", [1, 5, 20])
    def test_without_the_native_core_rows_and_products_are_the_same(self, codec, monkeypatch, n_rows):
        values, x = torch.randn(96, 1024), torch.randn(n_rows, 1024)
        encoded = codec.encode(values)
        expected = product(codec, x, encoded)
        for module in (int4, int8, rotated):
            monkeypatch.setattr(module, "core", lambda: None)
        for name, segment in codec.encode(values).items():
            assert torch.equal(segment, encoded[name]), name
        assert_snr(product(codec, x, encoded), expected, 36)

    def test_a_product_is_that_of_the_integers(self, codec):
        encoded, x = codec.encode(torch.randn(192, 512)), torch.randn(3, 512)
        x[:, ::170] *= 200
        exact = F.linear(x.double(), decoded(codec, encoded, torch.float64, 512))
        assert_snr(product(codec, x, encoded), exact, 60)


def test_tables_are_ascending_and_half_of_them_mirror_the_others():
    found = tables().int()
    assert found.shape == (256, 16)
    assert bool((found[:, 1:] >= found[:, :-1]).all())
    assert torch.equal(found[128:], -found[:128].flip(1))
    assert len({tuple(row) for row in found.tolist()}) == 256


def test_the_former_format_is_named_in_the_error():
    from qwen3_vl_memory_optimizations import ConfigurationError

    with pytest.raises(ConfigurationError, match="int4_64.*version 0.2.*pack the checkpoint again"):
        create_codec("int4_64")


needs_core = pytest.mark.skipif(native_core() is None, reason="errors are compensated by the native core alone")


@needs_core
class TestCompensation:
    def problem(self, columns=256, rows=96, inputs=1024):
        """Inputs with few large directions, and weights."""
        generator = torch.Generator().manual_seed(0)
        mixing = torch.randn(columns, columns, generator=generator) * torch.linspace(2, 0.02, columns)[:, None]
        x = torch.randn(inputs, columns, generator=generator) @ mixing
        return x, torch.randn(rows, columns, generator=generator) * 0.02

    def lost(self, codec, x, weight, encoded):
        found = decoded(codec, encoded, torch.float32, weight.shape[1])
        return float((x @ (found - weight).t()).norm() / (x @ weight.t()).norm())

    def test_outputs_lose_much_less(self):
        codec, (x, weight) = create_codec("int4"), self.problem()
        plain = self.lost(codec, x, weight, codec.encode(weight))
        compensated = self.lost(codec, x, weight, codec.encode_compensated(weight, codec.compensation(x)))
        assert compensated < 0.65 * plain

    def test_outliers_of_inputs_are_kept(self):
        codec, (x, weight) = create_codec("int4"), self.problem()
        x[:, 7] *= 300
        plain = self.lost(codec, x, weight, codec.encode(weight))
        assert self.lost(codec, x, weight, codec.encode_compensated(weight, codec.compensation(x))) < 0.1 * plain

    def test_rows_are_encoded_independently(self):
        codec, (x, weight) = create_codec("int4"), self.problem()
        compensation = codec.compensation(x)
        whole = codec.encode_compensated(weight, compensation)
        for start, stop in ((0, 16), (16, 96)):
            part = codec.encode_compensated(weight[start:stop], compensation)
            same = (part["data"] == whole["data"][start:stop]).float().mean()
            assert same > 0.95  # products of few rows are summed in another order
            assert torch.equal(part["scale"], whole["scale"][start:stop])

    @pytest.mark.parametrize("inputs", [torch.zeros(5, 128), torch.randn(1, 128), torch.randn(300, 128) * 1e-18])
    def test_inputs_that_determine_little(self, inputs):
        codec, weight = create_codec("int4"), torch.randn(32, 128)
        found = decoded(codec, codec.encode_compensated(weight, codec.compensation(inputs)), torch.float32, 128)
        assert_snr(weight, found, 15, "little")

    @pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
    def test_inputs_that_cannot_be_used_are_refused(self, bad):
        inputs = torch.randn(64, 128)
        inputs[3, 4] = bad
        with pytest.raises(CodecError, match="inputs"):
            create_codec("int4").compensation(inputs)

    def test_others_do_not(self):
        codec = create_codec("int8")
        assert not codec.compensates
        with pytest.raises(CodecError, match="does not compensate"):
            codec.compensation(torch.randn(4, 64))


def test_without_the_native_core_nothing_is_compensated(monkeypatch):
    monkeypatch.setattr(int4, "core", lambda: None)
    codec = create_codec("int4")
    assert not codec.compensates
    with pytest.raises(CodecError, match="native core"):
        codec.encode_compensated(torch.randn(2, 64), None)
