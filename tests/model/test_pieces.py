"""A prompt that runs in pieces gives what it gives whole."""

from __future__ import annotations

import pytest
import torch

from qwen3_vl_memory_optimizations import create_optimized_model
from qwen3_vl_memory_optimizations.model.kv.cache import ManagedKVCache
from qwen3_vl_memory_optimizations.model.run.run_budget import RunBudget

from . import tiny
from .test_kv_cache import CACHE, ids

PIECE = 96
WANTED = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}


def make_model(directory, **settings):
    model = create_optimized_model(tiny.DIRECTORY, {"codec": "none", "cache_dir": directory, **settings})
    model.lengths, model.encoded = [], []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: model.lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    model.model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: model.encoded.append(len(args[0])), with_kwargs=True
    )
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that reads prompts in pieces of 96 tokens, into blocks of 32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunBudget, "choose", lambda self, given, length, batch, past, whole=False, trains=False: PIECE)
        model = make_model(tmp_path_factory.mktemp("cache"), tensor_budget=10**9)
    yield model
    model.memory_optimizer.close()


@pytest.fixture(autouse=True)
def forget(model, monkeypatch):
    monkeypatch.setattr("qwen3_vl_memory_optimizations.model.kv.cache.BLOCK_TOKENS", 32)
    model.lengths.clear()
    model.encoded.clear()
    for each in (model, tiny.reference()):
        each.model.rope_deltas = None  # transformers keeps that of the last prompt with a picture


def text(n_tokens, seed=0):
    return torch.randint(7, 60, (n_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def picture(placeholder=tiny.IMAGE):
    return [tiny.VISION_START, *[placeholder] * 16, tiny.VISION_END]


def cases():
    images = tiny.heldout()[0]
    video = tiny.batch([text(60) + picture(tiny.VIDEO) + text(5) + picture(tiny.VIDEO) + text(100)], None)
    video |= {
        "mm_token_type_ids": (video["input_ids"] == tiny.VIDEO).int() * 2,
        "pixel_values_videos": tiny.patches(images[5:7]),
        "video_grid_thw": torch.tensor([[2, 8, 8]]),
    }
    cut = picture() + text(68) + picture() + text(70)
    assert tiny.IMAGE in cut[PIECE - 3 : PIECE] and tiny.IMAGE in cut[PIECE : PIECE + 3]
    return {
        "text": tiny.batch([text(250)], None),
        "two images": tiny.batch([text(10) + picture() + text(60) + picture() + text(100)], images[1:3]),
        "image cut by a piece": tiny.batch([cut], images[[4, 7]]),
        "video cut by a piece": video,
        "left-padded batch": tiny.batch([cut, picture() + text(51), text(130)], images[[4, 7, 8]]),
        "as long as a piece": tiny.batch([text(PIECE)], None),
        "one token more": tiny.batch([text(PIECE + 1)], None),
    }


CASES = tuple(cases())


def assert_close(found, expected, mask=None):
    assert found.shape == expected.shape
    if mask is not None:
        seen = mask[:, -found.shape[1] :].bool()
        found, expected = found[seen], expected[seen]
    worst, scale = float((found - expected).abs().max()), float(expected.abs().max())
    assert worst <= 1e-5 * scale, f"differs by {worst:.2e} at a scale of {scale:.2e}"


@pytest.mark.parametrize("keep", [0, 1, 5, 110])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_those_of_a_whole_prompt(model, case, keep):
    inputs = cases()[case]
    length = inputs["input_ids"].shape[1]
    if keep > length:
        pytest.skip("there are not that many tokens")
    expected = tiny.reference()(**inputs, logits_to_keep=keep)
    found = model(**inputs, logits_to_keep=keep)
    assert_close(found.logits, expected.logits, inputs["attention_mask"])
    assert model.lengths == [PIECE] * (length // PIECE) + [length % PIECE] * (length % PIECE > 0)
    assert len(model.encoded) <= 1  # pictures are encoded once
    assert found[CACHE].get_seq_length() == length


@pytest.mark.parametrize("case", ["text", "two images", "left-padded batch"])
@torch.no_grad()
def test_without_a_cache_none_is_returned(model, case):
    inputs = cases()[case]
    expected = tiny.reference()(**inputs, use_cache=False)
    found = model(**inputs, use_cache=False)
    assert_close(found.logits, expected.logits, inputs["attention_mask"])
    assert len(model.lengths) > 1
    assert found.get(CACHE) is None


@torch.no_grad()
def test_a_tuple_is_returned_where_one_is_asked_for(model):
    inputs = cases()["two images"]
    expected = tiny.reference()(**inputs, return_dict=False)
    found = model(**inputs, return_dict=False)
    assert isinstance(found, tuple)
    assert_close(found[0], expected[0])


@torch.no_grad()
def test_embeddings_and_positions_that_are_given_are_cut_too(model):
    inputs = cases()["text"]
    embeds = tiny.reference().get_input_embeddings()(inputs["input_ids"])
    expected = tiny.reference()(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    assert_close(model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits, expected.logits)
    positions = (torch.arange(embeds.shape[1]) * 2)[None, None].expand(3, 1, -1)
    expected = tiny.reference()(input_ids=inputs["input_ids"], position_ids=positions)
    assert_close(model(input_ids=inputs["input_ids"], position_ids=positions).logits, expected.logits)
    assert max(model.lengths) == PIECE


@torch.no_grad()
def test_what_asks_for_all_tokens_at_once_runs_whole(model):
    inputs = cases()["text"]
    for options in ({"labels": inputs["input_ids"]}, {"output_hidden_states": True}):
        expected, found = (each(**inputs, **options) for each in (tiny.reference(), model))
        assert_close(found.logits, expected.logits)
        if "labels" in options:
            assert float((found.loss - expected.loss).abs()) < 1e-4
        else:
            assert [each.shape for each in found.hidden_states] == [each.shape for each in expected.hidden_states]
    assert model.lengths == [inputs["input_ids"].shape[1]] * 2


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_turns_go_on_in_a_cache_that_is_given(model, batch):
    from transformers import DynamicCache

    tokens = ids(520, batch=batch)
    cache = ManagedKVCache(model.config, pager=model.memory_optimizer.pager)
    theirs = DynamicCache()
    start = 0
    for length in (150, 1, 200, 96, 3, 70):
        part = tokens[:, start : start + length]
        start += length
        found = model(input_ids=part, **{CACHE: cache}, use_cache=True)
        expected = tiny.reference()(input_ids=part, **{CACHE: theirs}, use_cache=True)
        assert_close(found.logits, expected.logits)
        assert cache.get_seq_length() == start
    assert cache.layers[0].n_blocks == (520 - 64) // 32


@pytest.mark.parametrize("case", ["text", "image cut by a piece", "video cut by a piece", "left-padded batch"])
@torch.no_grad()
def test_generate_computes_the_logits_of_the_last_row_only(model, case):
    inputs, rows = cases()[case], []
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    try:
        found = model.generate(**inputs, **WANTED, output_logits=True)
    finally:
        hook.remove()
    expected = tiny.reference().generate(**inputs, **WANTED, output_logits=True)
    assert torch.equal(found.sequences, expected.sequences)
    assert_close(torch.stack(found.logits), torch.stack(expected.logits))
    assert rows == [1] * 6
    assert max(model.lengths) == PIECE


@torch.no_grad()
def test_without_a_budget_and_a_codec_a_prompt_runs_whole_and_bit_by_bit_as_in_transformers(tmp_path):
    model = make_model(tmp_path)
    try:
        images = tiny.heldout()[0]
        for inputs in (
            tiny.batch([text(1500)], None),
            tiny.batch([text(700) + picture() + text(600), picture() + text(9)], images[:2]),
        ):
            expected = tiny.reference()(**inputs)
            model.lengths.clear()
            assert torch.equal(model(**inputs).logits, expected.logits)
            assert model.lengths == [inputs["input_ids"].shape[1]]
    finally:
        model.memory_optimizer.close()


@torch.no_grad()
def test_within_a_budget_a_long_prompt_runs_in_pieces_by_itself(tmp_path):
    model = make_model(tmp_path, tensor_budget=10**9)
    try:
        inputs = tiny.batch([text(1500)], None)
        expected = tiny.reference().generate(**inputs, **WANTED, output_logits=True)
        found = model.generate(**inputs, **WANTED, output_logits=True)
        assert torch.equal(found.sequences, expected.sequences)
        assert_close(torch.stack(found.logits), torch.stack(expected.logits))
        assert len(model.lengths) > 6 and max(model.lengths) <= 1024
    finally:
        model.memory_optimizer.close()


@torch.no_grad()
def test_an_error_in_a_piece_leaves_the_model_as_it_was(model, monkeypatch):
    inputs, calls = cases()["two images"], []
    expected = tiny.reference()(**inputs).logits

    def fail(module, args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("on the way")

    hook = model.model.language_model.layers[2].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="on the way"):
            model(**inputs)
    finally:
        hook.remove()
    assert_close(model(**inputs).logits, expected)


@torch.no_grad()
def test_what_cannot_be_cut_runs_whole(model):
    inputs = cases()["two images"]
    without = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        model(**without)
    text = cases()["text"]
    model.config.output_hidden_states = True
    try:
        states = model(**text).hidden_states
    finally:
        model.config.output_hidden_states = False
    assert states is None or states[-1].shape[1] == text["input_ids"].shape[1]
