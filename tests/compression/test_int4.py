"""INT4: the contract of a codec, the layouts of torch's kernel, and how exact it is."""

import math

import pytest
import torch
import torch.nn.functional as F

from qwen3_vl_memory_optimizations import CodecError
from qwen3_vl_memory_optimizations.compression import INT4Codec, LinearInput, Scratch, create_codec
from qwen3_vl_memory_optimizations.compression.codecs import int4
from qwen3_vl_memory_optimizations.compression.codecs.int4 import LAYOUTS, kernel_layout

from .contract import DTYPES, CodecContract, assert_snr, decoded, product


class INT4Contract(CodecContract):
    floor_db = 18
    product_floor_db = 44
    rows = 128
    shapes = ((64, 64), (128, 192), (192, 2, 32), (64, 6144))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_values_without_a_scale_are_refused(self, codec, bad):
        for dtype in DTYPES:
            values = torch.randn(64, 64).to(dtype)
            values[2, 5] = bad
            with pytest.raises(CodecError, match="NaN, infinite"):
                codec.encode(values)

    def test_values_whose_range_overflows_are_refused(self, codec):
        with pytest.raises(CodecError, match="huge"):
            codec.encode(torch.tensor([3e38, -3e38]).repeat(64, 32))

    def test_what_does_not_divide_is_not_supported(self, codec):
        assert not codec.supports((64, 64), torch.int32)
        for shape in ((64,), (0, 64), (codec.layout + 16, 64), (64, 96), (64, 33), ()):
            assert not codec.supports(shape, torch.float32), shape

    def test_each_weight_is_within_half_a_step_and_the_rounding_of_the_zero(self, codec):
        values = torch.randn(128, 192) + torch.randn(128, 1) * 4
        groups = values.view(128, 3, 64)
        least, most = groups.aminmax(dim=2)
        found = decoded(codec, codec.encode(values), torch.float32, 192)
        error = (found.view(128, 3, 64) - groups).abs().amax(dim=2)
        step = (most - least) / 15 * (1 + 2**-7)
        assert bool((error <= step / 2 + (least + 8 * step).abs() * 2**-8).all())

    def test_constant_rows_keep_their_value(self, codec):
        values = torch.linspace(-3, 3, 64)[:, None].expand(64, 128).bfloat16().float()
        assert torch.equal(decoded(codec, codec.encode(values), torch.float32, 128), values)

    @pytest.mark.parametrize("size", [1e-5, 1.0, 1e4])
    def test_quality_in_fp16_does_not_depend_on_the_size_of_values(self, codec, size):
        values = (torch.randn(64, 256) * size).half()
        assert_snr(values, decoded(codec, codec.encode(values), torch.float16, 256), 18, f"size {size}")

    @pytest.mark.parametrize("size", [1e-30, 1e-6, 1e4, 1e30])
    def test_quality_does_not_depend_on_the_size_of_values(self, codec, size):
        values = torch.randn(64, 256) * size
        assert_snr(values, decoded(codec, codec.encode(values), torch.float32, 256), 18, f"size {size}")

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("n_rows", [1, 4, 33])
    def test_products_of_several_blocks(self, monkeypatch, codec, n_rows, dtype):
        monkeypatch.setattr(int4, "_BLOCK_BYTES", 64 * 1024)
        values, x = torch.randn(1664, 128), torch.randn(n_rows, 128).to(dtype)
        assert 1664 // codec.row_block((1664, 128)) > 1 and 1664 % codec.row_block((1664, 128))
        encoded = codec.encode(values)
        exact = F.linear(x.double(), decoded(codec, encoded, torch.float64, 128))
        assert_snr(exact, product(codec, x, encoded), 44, f"{n_rows} rows {dtype}")
        ahead = torch.zeros(3, encoded["data"].shape[1], dtype=torch.uint8)  # as a view into a larger block of memory
        placed = torch.cat([ahead, encoded["data"]])[3:]
        assert torch.equal(product(codec, x, {"data": placed}), product(codec, x, encoded))

    @pytest.mark.parametrize("fitting_rows", [1, 100, 129, 5000])
    def test_rows_are_decoded_in_steps_that_fit(self, monkeypatch, codec, fitting_rows):
        monkeypatch.setattr(int4, "_BLOCK_BYTES", 64 * 1024)
        encoded, x = codec.encode(torch.randn(1664, 128)), torch.randn(6, 128)
        scratch = Scratch(slot_bytes=fitting_rows * 128 * 4)
        found = codec._decoded_product(LinearInput(x), encoded, scratch)
        assert_snr(F.linear(x.double(), decoded(codec, encoded, torch.float64, 128)), found, 100)
        step = max(fitting_rows // codec.layout, 1) * codec.layout
        rows = min(step, codec.row_block((1664, 128)))
        assert scratch.n_bytes == rows * 128 * 4 + rows * 128 // 2


class TestINT4(INT4Contract):
    name = "int4"

    def test_the_kernel_and_decoding_agree(self, codec):
        if not kernel_layout():
            pytest.skip("this build of torch has no INT4 kernel")
        encoded, x = codec.encode(torch.randn(192, 512)), torch.randn(3, 512)
        x[:, ::170] *= 200
        exact = F.linear(x.double(), decoded(codec, encoded, torch.float64, 512))
        assert_snr(exact, codec._packed_product(LinearInput(x), encoded), 44, "packed")
        assert_snr(exact, codec._decoded_product(LinearInput(x), encoded, Scratch()), 100, "decoded")

    def test_the_layout_is_that_of_torch(self, codec):
        if not kernel_layout():
            pytest.skip("this build of torch has no INT4 kernel")
        values = torch.randint(0, 16, (128, 64)).float()
        values[:, :2] = torch.tensor([0.0, 15.0])
        data = codec.encode(values)["data"].view(-1)
        expected = torch._convert_weight_to_int4pack_for_cpu(values.int(), 1)
        assert torch.equal(data[: expected.numel()], expected.view(-1))


class TestINT4OfAnotherMachine(INT4Contract):
    """What was packed elsewhere is decoded, and gives the same values."""

    name = f"int4_{LAYOUTS[0] if kernel_layout() == LAYOUTS[1] else LAYOUTS[1]}"

    def test_values_do_not_depend_on_the_layout(self, codec):
        values, own = torch.randn(192, 128), create_codec("int4")
        assert codec.layout != own.layout and codec.stored_name == self.name
        mine, other = own.encode(values), codec.encode(values)
        assert not torch.equal(mine["data"], other["data"])
        assert torch.equal(decoded(own, mine, torch.float32, 128), decoded(codec, other, torch.float32, 128))

    def test_the_kernel_never_sees_it(self, monkeypatch, codec):
        monkeypatch.delattr(torch, "_weight_int4pack_mm_for_cpu")
        encoded, x = codec.encode(torch.randn(64, 128)), torch.randn(1, 128)
        exact = F.linear(x.double(), decoded(codec, encoded, torch.float64, 128))
        assert_snr(exact, product(codec, x, encoded), 100)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_smaller_groups_are_more_exact_and_take_more_bytes(group):
    values = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    codec = INT4Codec(group=group)
    encoded = codec.encode(values)
    assert encoded["data"].nbytes == values.numel() * (1 / 2 + 4 / group)
    assert_snr(values, decoded(codec, encoded, torch.float32, 512), {32: 20.5, 64: 19.3, 128: 18}[group], f"{group}")
