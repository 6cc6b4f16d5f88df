"""Every codec keeps the contract of `Codec`; INT8 and its kernels are held to figures."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vl_memory_optimizations import CodecError, ConfigurationError
from qwen3_vl_memory_optimizations.compression import (
    INT8Codec,
    KernelSelector,
    LinearInput,
    RawCodec,
    RotatedINT8Codec,
    Scratch,
    codec_names,
    create_codec,
    int8_kernels,
    register_codec,
)
from qwen3_vl_memory_optimizations.compression.base import bf16_at_least, linear_in_steps
from qwen3_vl_memory_optimizations.compression.int8_kernels import dequantize
from qwen3_vl_memory_optimizations.compression.kernels import int8_product_saturates, row_class
from qwen3_vl_memory_optimizations.compression.rotation import rotate, rotate_back

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((64, 96), (1, 32), (7, 33), (3, 1), (130, 514), (4, 3, 5, 2))
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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

    def test_blocks_of_rows_are_encoded_independently(self, codec):
        """Encoded in pieces, a weight has the bytes it has encoded at once; a piece may be the end of the weight."""
        block = codec.row_block((1, 64))
        n_rows = 3 * block + self.rows
        values = self.values(n_rows, 64)
        codec = codec.fit(lambda: values)
        whole = codec.encode(values)
        shared = {segment.name for segment in codec.segments((n_rows, 64), values.dtype) if segment.shared}
        assert n_rows > codec.row_block((n_rows, 64)) == block
        for part in (slice(block, 3 * block), slice(2 * block, n_rows)):
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
        for _ in range(12):  # each kernel has its turn
            found = product(codec, x, encoded)
            assert_snr(exact, found, 33, f"{self.name} {n_rows} rows {dtype}, outliers in {outliers}")
        if not int8_product_saturates() and n_rows < 5:
            assert any("digit" in choice.runs for choice in codec.kernels.choices().values())

    def test_activations_that_stay_uneven_go_to_exact_kernels(self, codec, monkeypatch):
        """The rotation can make a spike, of what it makes of one."""
        monkeypatch.setattr(RotatedINT8Codec, "kernel_functions", int8_kernels.KERNELS)
        encoded = codec.encode(torch.randn(32, 2048))
        spike = torch.zeros(2048)
        spike[7] = 1
        uneven = rotate_back(spike[None]) + torch.randn(1, 2048) * 1e-3
        for n_rows in (1, 8):
            x = torch.cat([torch.randn(n_rows - 1, 2048), uneven])
            exact = F.linear(x.double(), decoded(codec, encoded, torch.float64))
            for _ in range(12):
                assert_snr(exact, product(codec, x, encoded), 44)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", [1, 5, 32])
def test_packed_kernel_with_outliers(n_rows, dtype):
    _, x, encoded, exact = outlier_problem(n_rows, dtype=dtype)
    assert_snr(exact, int8_kernels._packed_product(LinearInput(x), encoded, Scratch()), 44, f"packed {dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_folded_kernel_with_outliers(dtype):
    _, x, encoded, exact = outlier_problem(1, dtype=dtype)
    found = int8_kernels._folded_product(LinearInput(x), encoded, Scratch())
    assert found.dtype == dtype and found.shape == exact.shape
    assert_snr(exact, found, 44, f"folded {dtype}")


@pytest.mark.parametrize(("dtype", "floor_db"), [(torch.float32, 120), (torch.float16, 60), (torch.bfloat16, 43)])
@pytest.mark.parametrize("n_rows", [1, 5, 40])
@pytest.mark.parametrize("slot_bytes", [1, 16 * 2**20])
def test_decoding_kernel_with_outliers(n_rows, dtype, floor_db, slot_bytes):
    codec, x, encoded, exact = outlier_problem(n_rows, dtype=dtype)
    found = linear_in_steps(LinearInput(x), encoded, None, codec.decode, Scratch(slot_bytes=slot_bytes))
    assert_snr(exact, found, floor_db, f"decoded {dtype}")


@pytest.fixture(params=["7-bit", "8-bit"])
def digits(request, monkeypatch):
    if request.param == "8-bit" and int8_product_saturates():
        pytest.skip("this machine's INT8 product saturates with 8-bit digits")
    monkeypatch.setattr(int8_kernels, "int8_product_saturates", lambda: request.param == "7-bit")
    return request.param


@pytest.mark.parametrize(("dtype", "floor_db"), [(torch.float32, 60), (torch.float16, 58), (torch.bfloat16, 48)])
@pytest.mark.parametrize(("n_rows", "n", "k"), [(5, 96, 512), (40, 96, 512), (9, 7, 33), (1, 1, 1), (6, 130, 514)])
def test_split_kernel_with_outliers(digits, n_rows, n, k, dtype, floor_db):
    _, x, encoded, exact = outlier_problem(n_rows, n, max(k, 3), dtype)
    found = int8_kernels._split_product(LinearInput(x), encoded, Scratch())
    assert_snr(exact, found, floor_db, f"split {digits} {dtype} {(n_rows, n, k)}")


def test_split_kernel_at_the_ends_of_its_ranges(digits):
    """Every product at its largest: the case in which 16-bit sums saturate."""
    codec, k = INT8Codec(), 4096
    for x_sign in (1, -1):
        for w_sign in (1, -1):
            encoded = codec.encode(torch.full((32, k), float(w_sign)))
            x = torch.full((8, k), 3.0 * x_sign)
            exact = F.linear(x.double(), decoded(codec, encoded, torch.float64))
            assert_snr(
                exact,
                int8_kernels._split_product(LinearInput(x), encoded, Scratch()),
                60,
                f"{digits} {x_sign} {w_sign}",
            )


def test_split_kernel_with_a_zero_row_of_activations(digits):
    codec = INT8Codec()
    x = torch.randn(6, 64)
    x[2] = 0
    found = int8_kernels._split_product(LinearInput(x), codec.encode(torch.randn(8, 64)), Scratch())
    assert float(found[2].abs().max()) == 0


@pytest.mark.parametrize(("n", "k"), [(6, 64), (8, 40), (1, 32), (5, 33), (3, 31)])
@pytest.mark.parametrize("n_rows", [1, 4, 16])
def test_shapes_that_crash_the_packed_kernel_never_reach_it(monkeypatch, n, k, n_rows):
    def refuse(*args):
        raise AssertionError(f"packed kernel called with n={n}, k={k}")

    monkeypatch.setattr(torch, "_weight_int8pack_mm", refuse)
    codec = INT8Codec()
    encoded, x = codec.encode(torch.randn(n, k)), torch.randn(n_rows, k)
    exact = F.linear(x.double(), decoded(codec, encoded, torch.float64))
    for _ in range(2):
        assert_snr(exact, product(codec, x, encoded), 60, f"{n}x{k}")


def test_a_choice_made_for_one_shape_is_not_forced_on_another():
    """A last page of rows that 4 does not divide must not go to the packed kernel."""
    codec = INT8Codec(KernelSelector(timer=iter_timer([9] * 3 + [1, 9, 9] * 30)))
    weights = torch.randn(10, 64)
    encoded = codec.encode(weights)
    x = torch.randn(6, 64)
    for rows in [slice(0, 8)] * 12 + [slice(8, 10)]:
        part = {name: segment[rows] for name, segment in encoded.items()}
        exact = F.linear(x.double(), decoded(codec, part, torch.float64))
        assert_snr(exact, product(codec, x, part), 44, f"{rows}")


def iter_timer(durations):
    """A clock that says each timed run took so many seconds, in turn."""
    now, starting, left = 0.0, True, iter(durations)

    def timer():
        nonlocal now, starting
        if not starting:
            now += next(left)
        starting = not starting
        return now

    return timer


@pytest.mark.parametrize(
    ("exact", "rough", "chosen"),
    [
        ([50, 50, 50], [10, 10, 10], "rough"),
        ([50, 50, 50], [48, 48, 48], "exact"),  # not faster by the margin
        ([90, 90, 20], [50, 50, 50], "exact"),  # the best run counts
        ([50, 50, 50], [90, 10, 90], "rough"),
    ],
)
def test_candidates_take_turns_and_the_fastest_stays(exact, rough, chosen):
    warming_up = [999, 999]
    turns = [seconds for pair in zip(exact, rough, strict=True) for seconds in pair]
    selector = KernelSelector(timer=iter_timer(warming_up + turns))
    calls = []

    def kernel(name):
        return lambda: calls.append(name) or torch.tensor(float(len(name)))

    candidates = {"exact": kernel("exact"), "rough": kernel("rough")}
    for turn in range(8):
        assert not selector.choices() or not selector.choices()["key"].name
        assert selector.run("key", candidates) == len(("exact", "rough")[turn % 2])
    assert calls == ["exact", "rough"] * 4
    selector.run("key", candidates)
    assert calls[8:] == [chosen]
    assert selector.choices()["key"].name == chosen
    assert selector.choices()["key"].seconds == {"exact": min(exact), "rough": min(rough)}


def test_a_choice_made_in_a_bad_moment_is_mended():
    disturbed = [1, 1] + [9, 12] * 3  # the second candidate was slow while others ran
    selector = KernelSelector(timer=iter_timer([*disturbed, 9, 5]))
    candidates = {"exact": lambda: torch.tensor(0.0), "rough": lambda: torch.tensor(1.0)}
    chosen = []
    for _ in range(8 + 16):
        selector.run("key", candidates)
        chosen.append(selector.choices()["key"].name)
    assert (chosen[8], chosen[-1]) == ("exact", "rough")


def test_a_kernel_that_is_far_slower_is_not_tried_again():
    selector = KernelSelector(timer=iter_timer([1, 1] + [9, 90] * 3 + [9] * 100))
    calls = []
    candidates = {"exact": lambda: torch.tensor(0.0), "rough": lambda: calls.append(1) or torch.tensor(1.0)}
    for _ in range(200):
        selector.run("key", candidates)
    assert len(calls) == 4


def test_times_are_compared_a_unit_of_work():
    selector = KernelSelector(timer=iter_timer([1, 1] + [30, 20] * 3))
    candidates = {"exact": lambda: torch.tensor(0.0), "rough": lambda: torch.tensor(1.0)}
    for turn in range(8):
        selector.run("key", candidates, work=(3, 1)[turn % 2])
    assert selector.choices()["key"].name == "exact"


def test_rows_are_classed_by_powers_of_two():
    assert [row_class(n) for n in (1, 2, 3, 5, 8, 9, 1000, 5000)] == [1, 2, 4, 8, 8, 16, 1024, 1024]


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


@pytest.mark.skipif(os.environ.get("ATEN_CPU_CAPABILITY") == "avx2", reason="this is the run with AVX2")
def test_the_codecs_keep_their_contract_with_avx2_alone():
    """The instruction set of the small machines: without VNNI the INT8 product saturates, and the digits differ."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, **AVX2},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-4000:]
