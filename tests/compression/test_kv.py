"""Codecs of keys and values: what is decoded, and what attention over encoded blocks gives."""

import math

import pytest
import torch

from qwen3_vl_memory_optimizations import CodecError, ConfigurationError
from qwen3_vl_memory_optimizations.compression import KVBlock, Scratch, attend_plain, create_kv_codec, merge
from qwen3_vl_memory_optimizations.compression.kv_integers import INT8KV

HEADS, TOKENS, SIZE = 3, 64, 32
FLOOR_DB = {"none": math.inf, "int8": 37, "int4": 14}


def states(seed=0, tokens=TOKENS, dtype=torch.float32):
    """Keys whose channels differ in size, as those of real models do, and values."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn((2, HEADS, tokens, SIZE), generator=generator)
    return (keys * torch.linspace(0.2, 3, SIZE)).to(dtype), values.to(dtype)


def encoded(codec, keys, values):
    layout = codec.layout(*keys.shape, keys.dtype)
    block = KVBlock(torch.zeros(sum(segment.n_bytes for segment in layout), dtype=torch.uint8), layout)
    codec.encode(keys, values, block)
    return block


def decoded(codec, block, like):
    keys, values = torch.empty_like(like), torch.empty_like(like)
    codec.decode(block, keys, values)
    return keys, values


def snr_db(exact, found):
    error = float((exact.double() - found.double()).square().mean())
    return math.inf if error == 0 else 10 * math.log10(float(exact.double().square().mean()) / error)


def exact_attention(query, keys, values, scale, bias=None):
    scores = query.double() @ keys.double().transpose(1, 2) * scale
    weights = (scores if bias is None else scores + bias).softmax(-1)
    return weights @ values.double()


@pytest.mark.parametrize("name", FLOOR_DB)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoded_blocks_are_close(name, dtype):
    codec = create_kv_codec(name)
    keys, values = states(dtype=dtype)
    for exact, found in zip((keys, values), decoded(codec, encoded(codec, keys, values), keys), strict=True):
        assert snr_db(exact, found) >= FLOOR_DB[name], (name, snr_db(exact, found))


@pytest.mark.parametrize(("name", "share"), [("none", 1.0), ("int8", 0.516), ("int4", 0.27)])
def test_bytes_of_a_block_of_full_size(name, share):
    layout = create_kv_codec(name).layout(8, 512, 128, torch.bfloat16)
    assert sum(segment.n_bytes for segment in layout) <= share * 2 * 2 * 8 * 512 * 128


@pytest.mark.parametrize("name", FLOOR_DB)
@pytest.mark.parametrize("rows", [1, 2, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_that_over_the_decoded_blocks(name, rows, dtype):
    codec = create_kv_codec(name)
    pairs = [states(seed, dtype=dtype) for seed in range(3)]
    blocks = [encoded(codec, *pair) for pair in pairs]
    plain = [decoded(codec, block, pairs[0][0]) for block in blocks]
    query = torch.randn(HEADS, rows, SIZE, generator=torch.Generator().manual_seed(9)).to(dtype)
    keys, values = (torch.cat(parts, dim=1) for parts in zip(*plain, strict=True))
    exact = exact_attention(query, keys, values, 0.2)
    found = codec.attend(query, blocks, [None] * 3, 0.2, Scratch())
    assert snr_db(exact, found.out) >= 38, snr_db(exact, found.out)
    sums = (query.double() @ keys.double().transpose(1, 2) * 0.2).logsumexp(-1)
    assert torch.allclose(found.log_sum.double(), sums, atol=0.03)


def test_the_kernel_on_encoded_blocks_is_as_close_as_decoding_is():
    codec = INT8KV()
    keys, values = states()
    block, query = encoded(codec, keys, values), torch.randn(HEADS, 2, SIZE)
    exact = exact_attention(query, *decoded(codec, block, keys), 0.2)
    assert snr_db(exact, codec._attend_packed(query, [block], [None], 0.2).out) >= 38


@pytest.mark.parametrize("name", FLOOR_DB)
@pytest.mark.parametrize("rows", [2, 40])
def test_what_a_bias_hides_has_no_part(name, rows):
    codec = create_kv_codec(name)
    pairs = [states(seed) for seed in range(2)]
    blocks = [encoded(codec, *pair) for pair in pairs]
    query = torch.randn(HEADS, rows, SIZE)
    hidden = torch.finfo(torch.float32).min / 2
    first = torch.full((HEADS, rows, TOKENS), hidden)  # the whole first block
    second = torch.zeros(HEADS, rows, TOKENS)
    second[..., 40:] = hidden
    found = codec.attend(query, blocks, [first, second], 0.2, Scratch())
    keys, values = (part[:, :40] for part in decoded(codec, blocks[1], pairs[1][0]))
    exact = exact_attention(query, keys, values, 0.2)
    assert snr_db(exact, found.out) >= 38, snr_db(exact, found.out)


def test_parts_merge_into_the_whole():
    keys, values = states(tokens=96)
    query = torch.randn(HEADS, 5, SIZE)
    pieces = [(0, 10), (10, 11), (11, 96)]
    parts = [attend_plain(query, keys[:, a:b], values[:, a:b], None, 0.2) for a, b in pieces]
    assert torch.allclose(merge(parts).out.double(), exact_attention(query, keys, values, 0.2), atol=2e-6)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_without_a_scale_are_refused(name, bad):
    keys, values = states()
    values[1, 2, 3] = bad
    with pytest.raises(CodecError, match="NaN or infinite"):
        encoded(create_kv_codec(name), keys, values)


@pytest.mark.parametrize("name", FLOOR_DB)
def test_zeros_stay_zeros(name):
    codec = create_kv_codec(name)
    zeros = torch.zeros(HEADS, TOKENS, SIZE)
    keys, values = decoded(codec, encoded(codec, zeros, zeros), zeros)
    assert not keys.any() and not values.any()


def test_an_unknown_codec_is_refused_with_the_known_ones():
    with pytest.raises(ConfigurationError, match="none, int8, int4"):
        create_kv_codec("int2")
