"""Codecs as such: `none` keeps the contract; scratch memory, the registry, left operands."""

import pytest
import torch
import torch.nn.functional as F

from qwen3_vl_memory_optimizations import ConfigurationError
from qwen3_vl_memory_optimizations.compression import (
    INT8Codec,
    LinearInput,
    RawCodec,
    Scratch,
    codec_names,
    create_codec,
    register_codec,
)

from .contract import DTYPES, CodecContract, assert_snr, product


class TestRaw(CodecContract):
    name = "none"
    product_floor_db = 44  # the rounding of a bf16 result

    def test_every_shape_and_dtype_is_kept(self):
        for shape, dtype in (((), torch.int64), ((0, 4), torch.float32), ((5,), torch.bool)):
            codec = RawCodec()
            values = torch.zeros(shape, dtype=dtype)
            segment = codec.segments(shape, dtype)[0]
            assert codec.supports(shape, dtype) and segment.n_bytes == values.nbytes

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("n_rows", [1, 2, 5, 33])
    @pytest.mark.parametrize("lead_bytes", [0, 8, 36])
    def test_slices_of_rows_give_the_bits_of_the_whole_product(self, n_rows, dtype, lead_bytes):
        weights = torch.randn(208, 200).to(dtype)
        buffer = torch.zeros(weights.nbytes + 128, dtype=torch.uint8)
        start = -buffer.data_ptr() % 64 + lead_bytes
        placed = buffer[start : start + weights.nbytes].view(dtype).view(weights.shape).copy_(weights)
        x, bias = torch.randn(n_rows, 200).to(dtype), torch.randn(208).to(dtype)
        whole = F.linear(x, weights, bias)
        steps = (208,) if RawCodec().wants_whole(LinearInput(x)) else (16, 48, 208)
        for step in steps:
            parts = [
                product(RawCodec(), x, {"data": placed[first : first + step]}, bias[first : first + step])
                for first in range(0, 208, step)
            ]
            found = torch.cat(parts, dim=1)
            differing = int((found != whole).sum())
            assert differing == 0, f"{differing} of {whole.numel()} values differ with steps of {step}"

    @pytest.mark.parametrize("n_rows", [1, 6])
    @pytest.mark.parametrize("fitting_rows", [1, 16, 45, 300])
    def test_rows_of_another_dtype_are_cast_in_steps_that_change_no_bit(self, n_rows, fitting_rows):
        weights, x, bias = torch.randn(208, 200).bfloat16(), torch.randn(n_rows, 200), torch.randn(208)
        scratch = Scratch(slot_bytes=fitting_rows * 200 * 4)
        found = RawCodec().linear(LinearInput(x), {"data": weights}, bias, scratch)
        exact = F.linear(x, weights.float(), bias)
        rows = {(1, 1): 16, (1, 16): 16, (1, 45): 32, (6, 1): 16, (6, 16): 64, (6, 45): 176}.get(
            (n_rows, fitting_rows), 208
        )
        assert scratch.n_bytes == rows * 200 * 4
        if n_rows == 1 or rows == 208:
            assert torch.equal(found, exact)
        else:  # no room for the whole: the rounding of fp32 remains
            assert_snr(exact, found, 120)


def test_scratch_asks_before_it_grows_and_keeps_its_memory_when_refused():
    asked = []

    def ask(n_bytes):
        if n_bytes > 1000:
            raise MemoryError
        asked.append(n_bytes)

    scratch = Scratch(ask)
    first = scratch.get("a", (10, 10), torch.float32)
    assert scratch.get("a", (5, 5), torch.float32).data_ptr() == first.data_ptr()
    scratch.get("a", (120,), torch.float32)
    assert asked == [400, 80] and scratch.n_bytes == 480
    with pytest.raises(MemoryError):
        scratch.get("a", (2000,), torch.float32)
    assert scratch.n_bytes == 480


def test_registry_names_what_it_knows_and_refuses_a_name_twice():
    with pytest.raises(ConfigurationError, match="int4, int8, int8_rotated, none, sparse, svd; did you mean"):
        create_codec("zip")
    with pytest.raises(ConfigurationError, match="already"):
        register_codec("int8", INT8Codec)
    assert {"int8", "none"} <= set(codec_names())


def test_left_operands_are_derived_once():
    x, calls = LinearInput(torch.randn(2, 3, 4)), []
    for _ in range(2):
        x.derived("key", lambda x2d: calls.append(x2d.shape))
    assert calls == [(6, 4)] and x.rows == 6


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_weights_of_several_codecs_may_share_an_input(rows):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 512, generator=generator), torch.randn(64, 512, generator=generator)
    codecs = [create_codec(name) for name in ("int8", "int8_rotated", "int4", "fp16", "int8")]
    encoded = [codec.encode(weight) for codec in codecs]
    shared, scratch = LinearInput(x), Scratch()
    for codec, each in zip(codecs, encoded, strict=True):
        alone = codec.linear(LinearInput(x), each, None, scratch).clone()
        assert torch.equal(codec.linear(shared, each, None, scratch), alone), codec.name
