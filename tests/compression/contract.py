"""What holds for every codec, and how exactness is measured."""

import math

import pytest
import torch
import torch.nn.functional as F

from qwen3_vl_memory_optimizations.compression import LinearInput, Scratch, create_codec

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((64, 96), (1, 32), (7, 33), (3, 1), (130, 514), (4, 3, 5, 2))


def snr_db(exact: torch.Tensor, found: torch.Tensor) -> float:
    noise = (found.double() - exact.double()).square().sum()
    return math.inf if noise == 0 else 10 * math.log10(float(exact.double().square().sum() / noise))


def assert_snr(exact, found, floor_db, what=""):
    found_db = snr_db(exact, found)
    assert found_db >= floor_db, f"{what}: {found_db:.1f} dB, at least {floor_db} dB wanted"


def decoded(codec, encoded, dtype, columns=None):
    rows, width = next(iter(encoded.values())).shape
    return codec.decode(encoded, torch.full((rows, columns or width), 7.0, dtype=dtype))


def product(codec, x, encoded, bias=None, slot_bytes=16 * 2**20):
    return codec.linear(LinearInput(x), encoded, bias, Scratch(slot_bytes=slot_bytes))


class CodecContract:
    """What holds for every codec: `class TestMine(CodecContract)` with `name` and `floor_db`."""

    name: str
    floor_db = math.inf
    product_floor_db: float
    shapes = SHAPES
    rows = 36

    @pytest.fixture
    def codec(self):
        return create_codec(self.name)

    def values(self, *shape):
        """Values that suit the codec."""
        return torch.randn(shape)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_round_trip(self, codec, dtype):
        for shape in self.shapes:
            values = self.values(*shape).to(dtype)
            assert codec.supports(shape, dtype)
            codec = codec.fit(lambda values=values: values)
            encoded = codec.encode(values)
            found = decoded(codec, encoded, dtype, math.prod(shape[1:]))
            if codec.lossless:
                assert torch.equal(found.view(shape), values)
            else:
                assert_snr(values.view(shape[0], -1), found, self.floor_db, f"{self.name} {shape} {dtype}")

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_segments_describe_what_encode_makes(self, codec, dtype):
        for shape in self.shapes:
            values = self.values(*shape).to(dtype)
            codec = codec.fit(lambda values=values: values)
            encoded = codec.encode(values)
            segments = codec.segments(shape, dtype)
            assert list(encoded) == [segment.name for segment in segments]
            for segment in segments:
                found = encoded[segment.name]
                assert (found.dtype, tuple(found.shape)) == (segment.dtype, segment.shape), shape
                assert found.nbytes == segment.n_bytes
                assert segment.shared or segment.shape[0] == shape[0]
            assert not segments[0].shared

    def test_rows_are_encoded_independently(self, codec):
        """Encoded in pieces, a weight has the bytes it has encoded at once; a piece may be the end of the weight."""
        n_rows = 3 + self.rows
        values = self.values(n_rows, 64)
        codec = codec.fit(lambda: values)
        whole = codec.encode(values)
        shared = {segment.name for segment in codec.segments((n_rows, 64), values.dtype) if segment.shared}
        for part in (slice(1, 3), slice(2, n_rows)):
            for name, segment in codec.encode(values[part]).items():
                assert torch.equal(whole[name] if name in shared else whole[name][part], segment), name

    def test_zero_rows_stay_zero(self, codec):
        values = self.values(self.rows, 64)
        values[3] = 0
        codec = codec.fit(lambda: values)
        encoded = codec.encode(values)
        assert torch.equal(decoded(codec, encoded, torch.float32, 64)[3], torch.zeros(64))
        assert torch.equal(product(codec, torch.randn(6, 64), encoded)[:, 3], torch.zeros(6))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("n_rows", [1, 3, 6, 40])
    def test_linear_is_the_product_with_the_decoded_rows(self, codec, n_rows, dtype):
        values = self.values(self.rows, 128).to(dtype)
        codec = codec.fit(lambda: values)
        encoded = codec.encode(values)
        x, bias = torch.randn(n_rows, 128).to(dtype), torch.randn(self.rows).to(dtype)
        weights = decoded(codec, encoded, torch.float64, 128)
        found = product(codec, x, encoded, bias)
        assert found.dtype == dtype and found.shape == (n_rows, self.rows)
        exact = F.linear(x.double(), weights, bias.double())
        assert_snr(exact, found, self.product_floor_db, f"{self.name} {n_rows} rows {dtype}")

    def test_linear_takes_batches_as_rows(self, codec):
        values = self.values(self.rows, 64)
        codec = codec.fit(lambda: values)
        encoded = codec.encode(values)
        x = torch.randn(2, 3, 64)
        assert_snr(product(codec, x.reshape(6, 64), encoded), product(codec, x, encoded), 45)

    def test_a_product_leaves_its_operands_as_they_were(self, codec):
        values = self.values(self.rows, 64)
        codec = codec.fit(lambda: values)
        encoded = codec.encode(values)
        x, bias = torch.randn(6, 64), torch.randn(self.rows)
        before = [tensor.clone() for tensor in (x, bias, *encoded.values())]
        product(codec, x, encoded, bias)
        assert all(torch.equal(a, b) for a, b in zip(before, (x, bias, *encoded.values()), strict=True))
