"""`ManagedKVCache` holds what `DynamicCache` does, whatever `generate` does with it."""

from __future__ import annotations

import copy
import gc
import inspect

import pytest
import torch
from transformers import DynamicCache, Qwen3VLTextModel

from qwen3_vl_memory_optimizations import MemoryBudgetExceeded, TensorFreedError, create_optimized_model
from qwen3_vl_memory_optimizations.model.kv.cache import ManagedKVCache
from qwen3_vl_memory_optimizations.process import rss_bytes

from . import tiny

CACHE = "cache" if "cache" in inspect.signature(Qwen3VLTextModel.forward).parameters else "past_key_values"
BLOCK = 64
LAYERS = 4
MIB = 2**20


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory):
    """Weights as they are and layers as transformers wrote them, so that the cache alone differs."""
    settings = {"codec": "none", "tensor_budget": 10**9, "cache_dir": tmp_path_factory.mktemp("cache")}
    model = create_optimized_model(tiny.DIRECTORY, settings)
    yield model
    model.memory_optimizer.close()


def ids(length, batch=1):
    return torch.randint(7, 60, (batch, length), generator=torch.Generator().manual_seed(length))


def our_cache(model, codec="none", block_tokens=BLOCK):
    return ManagedKVCache(model.config, codec=codec, pager=model.memory_optimizer.pager, block_tokens=block_tokens)


@torch.no_grad()
def run(model, tokens, chunks, cache, mask=None):
    """Return the logits of tokens that are read some at a time."""
    model.model.rope_deltas = None  # transformers keeps that of the last prompt with a picture
    found, start = [], 0
    for length in chunks:
        part = None if mask is None else mask[:, : start + length]
        inputs = {"input_ids": tokens[:, start : start + length], "attention_mask": part, CACHE: cache}
        found.append(model(**inputs, use_cache=True).logits)
        start += length
    return torch.cat(found, dim=1)


def assert_close(found, expected, tolerance):
    scale = float(expected.abs().max())
    worst = float((found - expected).abs().max())
    assert worst <= tolerance * scale, f"differs by {worst:.2e} at a scale of {scale:.2e}"


@pytest.mark.parametrize("chunks", [(100,), (60, 40), (97, 1, 1, 1), (1,) * 20])
def test_without_a_codec_short_contexts_are_those_of_dynamic_cache_bit_by_bit(plain_weights, chunks):
    tokens = ids(sum(chunks))
    expected = run(tiny.reference(), tokens, chunks, DynamicCache())
    cache = our_cache(plain_weights, "none")
    assert torch.equal(run(plain_weights, tokens, chunks, cache), expected)
    assert cache.get_seq_length() == sum(chunks)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_behind_a_codec_with_loss_the_tail_has_16_bits(plain_weights, codec):
    tokens, chunks = ids(103), (60, 40, 1, 1, 1)
    expected = run(tiny.reference(), tokens, chunks, DynamicCache())
    cache = our_cache(plain_weights, codec)
    found = run(plain_weights, tokens, chunks, cache)
    assert torch.equal(found[:, :60], expected[:, :60])  # attended to where they were computed
    assert_close(found, expected, 0.01)
    keys, values = cache.layers[0].tail()
    assert keys.dtype == values.dtype == torch.bfloat16
    assert cache.layers[0].n_blocks == 0 and cache.get_seq_length() == sum(chunks)


def test_without_a_codec_and_a_budget_every_context_is_that_of_dynamic_cache_bit_by_bit(tmp_path):
    model = create_optimized_model(tiny.DIRECTORY, {"codec": "none", "cache_dir": tmp_path})
    try:
        tokens, chunks = ids(700), (500, 130, *[1] * 70)
        expected = run(tiny.reference(), tokens, chunks, DynamicCache())
        assert torch.equal(run(model, tokens, chunks, our_cache(model)), expected)
    finally:
        model.memory_optimizer.close()


@pytest.mark.parametrize("chunks", [(400,), (300, 100), (130, 150, 20, 1, 1, 1), (390,) + (1,) * 70])
@pytest.mark.parametrize(("codec", "tolerance"), [("none", 1e-5), ("int8", 0.01), ("int4", 0.2)])
def test_long_contexts_are_close(plain_weights, chunks, codec, tolerance):
    tokens = ids(sum(chunks))
    expected = run(tiny.reference(), tokens, chunks, DynamicCache())
    cache = our_cache(plain_weights, codec)
    assert_close(run(plain_weights, tokens, chunks, cache), expected, tolerance)
    assert all(layer.n_blocks == (sum(chunks) - 64) // BLOCK for layer in cache.layers)


@pytest.mark.parametrize(("codec", "tolerance"), [("none", 1e-5), ("int8", 0.02)])
def test_left_padding_hides_what_it_hides(plain_weights, codec, tolerance):
    tokens, mask = ids(300, batch=3), torch.ones(3, 300, dtype=torch.long)
    mask[1, :150] = 0  # two whole blocks and a part
    mask[2, :7] = 0
    chunks = (200, 90, *[1] * 10)
    expected = run(tiny.reference(), tokens, chunks, DynamicCache(), mask)
    found = run(plain_weights, tokens, chunks, our_cache(plain_weights, codec), mask)
    seen = mask.bool()
    assert_close(found[seen], expected[seen], tolerance)


@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("removed", [1, 40, 64, 100, 190, 300])
def test_tokens_that_are_taken_back_leave_no_trace(plain_weights, codec, removed):
    tokens = ids(300)
    cache = our_cache(plain_weights, codec)
    run(plain_weights, tokens, (250, 50), cache)
    cache.crop(-removed)
    assert cache.get_seq_length() == 300 - removed
    again = torch.cat((tokens[:, : 300 - removed], ids(120)), dim=1)
    expected = run(tiny.reference(), again, (again.shape[1],), DynamicCache())
    chunks = (60, *[1] * 60)
    found = run(plain_weights, again[:, 300 - removed :], chunks, cache)
    assert_close(found, expected[:, 300 - removed :], 1e-5 if codec == "none" else 0.02)


@pytest.mark.parametrize("codec", ["none", "int8", "int4"])
@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([2, 1])),
        lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
        lambda cache: copy.deepcopy(cache),
        lambda cache: cache.reset(),
    ],
    ids=["reorder", "repeat", "select", "select by mask", "deep copy", "reset"],
)
def test_sequences_are_moved_as_in_dynamic_cache(plain_weights, codec, change):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = our_cache(plain_weights, codec), DynamicCache()
    for length in (150, 50, 1):
        for layer in range(LAYERS):
            states = torch.randn((2, 3, 2, length, 32), generator=generator)
            theirs.update(*states, layer)
            ours.update(*states, layer)
    before = [(layer.keys, layer.values) for layer in ours.layers]
    ours, theirs = change(ours) or ours, change(theirs) or theirs
    assert ours.get_seq_length() == theirs.get_seq_length()
    kept = {"none": 0.0, "int8": 0.02, "int4": 0.4}[codec]
    for layer, other, (keys, _) in zip(ours.layers, theirs.layers, before, strict=True):
        if not ours.get_seq_length():
            continue
        assert layer.keys.shape == other.keys.shape
        assert float((layer.keys - other.keys).abs().max()) <= kept * float(keys.abs().max())
        assert float((layer.values - other.values).abs().max()) <= kept * float(keys.abs().max())


def test_another_attention_gets_the_decoded_tokens(plain_weights):
    tokens, chunks = ids(300), (250, 49, 1)
    config = plain_weights.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, "eager"
    try:
        found = run(plain_weights, tokens, chunks, our_cache(plain_weights))
    finally:
        config._attn_implementation = before
    assert_close(found, run(tiny.reference(), tokens, chunks, DynamicCache()), 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_return_sequences": 2, "num_beams": 2},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 50},
    ],
    ids=["beams", "several beams", "prompt lookup", "prefill in chunks"],
)
def test_generation_behind_a_long_prompt_gives_the_same_ids(plain_weights, options, monkeypatch):
    monkeypatch.setattr("qwen3_vl_memory_optimizations.model.kv.cache.BLOCK_TOKENS", BLOCK)
    inputs = {"input_ids": ids(200), "attention_mask": torch.ones(1, 200, dtype=torch.long)}
    settings = {"max_new_tokens": 90, "min_new_tokens": 90, "do_sample": False, "return_dict_in_generate": True}
    expected = tiny.reference().generate(**inputs, **settings, **options)
    found = plain_weights.generate(**inputs, **settings, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert isinstance(found[CACHE], ManagedKVCache)
    assert found[CACHE].layers[0].n_blocks


def test_a_cache_that_is_asked_for_wins(plain_weights):
    inputs = tiny.cases()["text"]
    settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    given = DynamicCache()
    assert plain_weights.generate(**inputs, **settings, **{CACHE: given})[CACHE] is given
    for implementation in ("dynamic", "static"):
        found = plain_weights.generate(**inputs, **settings, cache_implementation=implementation)
        assert not isinstance(found[CACHE], ManagedKVCache)
    assert isinstance(plain_weights.generate(**inputs, **settings)[CACHE], ManagedKVCache)


def test_the_caches_of_a_model_and_its_draft_are_ours(tmp_path):
    draft = tiny.make_draft(tmp_path / "draft")
    settings = {"codec": "none", "cache_dir": tmp_path}
    model = create_optimized_model(tiny.DIRECTORY, settings, assistant=draft)
    try:
        inputs = tiny.cases()["text"]
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
        expected = tiny.reference().generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options), expected)
    finally:
        model.memory_optimizer.close()


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, "int8"),
        ({"prefix_reuse": "off"}, "none"),
        ({"kv_codec": "int8"}, "int8"),
        ({"tensor_budget": 40 * MIB}, "int8"),
        ({"tensor_budget": 40 * MIB, "codec": "none"}, "none"),
        ({"tensor_budget": 40 * MIB, "kv_codec": "none"}, "none"),
    ],
)
def test_the_codec_is_that_of_the_settings(chosen, expected, tmp_path):
    settings = {"codec": "int8", "cache_dir": tmp_path, **chosen}
    model = create_optimized_model(tiny.DIRECTORY, settings)
    try:
        found = model.generate(**tiny.cases()["text"], max_new_tokens=2, return_dict_in_generate=True)
        assert found[CACHE].codec.name == expected
    finally:
        model.memory_optimizer.close()


def test_bytes_are_accounted_while_the_cache_lives(tmp_path):
    settings = {"codec": "none", "tensor_budget": 40 * MIB, "cache_dir": tmp_path}
    model = create_optimized_model(tiny.DIRECTORY, settings)
    try:
        frames = model.memory_optimizer.pager.frames
        run(model, ids(10), (10,), DynamicCache())
        used = frames.used_bytes
        cache = our_cache(model, "int8")
        run(model, ids(700), (700,), cache)
        blocks = [stored.block for layer in cache.layers for row in layer.rows for stored in row]
        tails = [layer._tail.pinned.block for layer in cache.layers]
        assert len(blocks) == LAYERS * ((700 - 64) // BLOCK)
        assert cache.storage_bytes() == sum(block.n_bytes for block in (*blocks, *tails))
        assert frames.used_bytes - used >= cache.storage_bytes()
        assert all(page.pins for tail in tails for page in tail.entry.pages)  # tails stay
        assert not any(page.pins for block in blocks for page in block.entry.pages)
        del cache, blocks, tails
        gc.collect()
        model.memory_optimizer.pager.trim()
        assert frames.used_bytes == used
    finally:
        model.memory_optimizer.close()


def test_a_context_larger_than_the_budget_is_decoded_from_the_swap_file(tmp_path):
    budget = 8 * MIB
    model = create_optimized_model(tiny.DIRECTORY, {"codec": "none", "tensor_budget": budget, "cache_dir": tmp_path})
    try:
        chunks = (*[500] * 8, *[1] * 5)
        tokens = ids(sum(chunks))
        cache = our_cache(model, "none", block_tokens=256)
        found = run(model, tokens, chunks, cache)
        assert cache.storage_bytes() > budget // 2
        assert model.memory_optimizer.pager.swap_used_bytes > 0
        assert model.memory_optimizer.pager.frames.peak_bytes <= budget
        assert_close(found, run(tiny.reference(), tokens, chunks, DynamicCache()), 1e-5)
    finally:
        model.memory_optimizer.close()


def test_a_cache_of_a_closed_model_is_refused(tmp_path):
    model = create_optimized_model(tiny.DIRECTORY, {"codec": "none", "cache_dir": tmp_path})
    cache = our_cache(model, "int8")
    run(model, ids(300), (300,), cache)
    model.memory_optimizer.close()
    with pytest.raises(TensorFreedError, match="closed"):
        cache.layers[0].decoded()


def test_what_does_not_fit_is_refused_before_any_layer_took_it(tmp_path):
    settings = {"codec": "none", "ram_budget": rss_bytes() + 300 * MIB, "cache_dir": tmp_path}
    model = create_optimized_model(tiny.DIRECTORY, settings)
    try:
        pager = model.memory_optimizer.pager
        pager.reserve("another", pager.ledger.most_bytes("another") - 4 * MIB)
        cache = our_cache(model, "none", block_tokens=8192)
        states = torch.zeros(1, 2, 4000, 32)
        with pytest.raises(MemoryBudgetExceeded, match="kv_cache") as caught:
            cache.update(states, states, 0)
        assert caught.value.requested_bytes > caught.value.available_bytes
        assert [layer.get_seq_length() for layer in cache.layers] == [0] * LAYERS
    finally:
        model.memory_optimizer.close()
