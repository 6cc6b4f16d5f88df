"""A prompt that begins as an earlier one is computed from where they differ, with the same result."""

from __future__ import annotations

import pytest
import torch

from qwen3_vl_memory_optimizations import create_optimized_model
from qwen3_vl_memory_optimizations.errors import MemoryBudgetExceeded
from qwen3_vl_memory_optimizations.process import rss_bytes

from . import tiny
from .test_kv_cache import CACHE

BLOCK = 32
QUESTIONS = ("what shape is in the image?", "what color is the shape?")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Make models on one cache directory."""
    monkeypatch.setattr("qwen3_vl_memory_optimizations.model.kv.cache.BLOCK_TOKENS", BLOCK)
    models = []

    def fresh(**settings):
        given = {"codec": "none", "prefix_reuse": "on", "cache_dir": tmp_path / "cache", **settings}
        model = create_optimized_model(tiny.DIRECTORY, given)
        models.append(model)
        model.prefilled, model.encoded = [], []
        model.model.language_model.register_forward_pre_hook(
            tiny.observing(lambda module, args, kwargs: model.prefilled.append(kwargs["inputs_embeds"].shape[1])),
            with_kwargs=True,
        )
        model.model.visual.register_forward_pre_hook(
            tiny.observing(lambda module, args, kwargs: model.encoded.append(len(args[0]))), with_kwargs=True
        )
        return model

    yield fresh
    for model in models:
        model.memory_optimizer.close()


def answer(model, inputs, **options):
    found = model.generate(
        **inputs,
        **{"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options},
        return_dict_in_generate=True,
        output_logits=True,
    )
    return found.sequences, torch.stack(found.logits)


def first_length(model, inputs):
    """Answer, and return how many tokens the first forward had."""
    model.prefilled.clear()
    answer(model, inputs)
    return model.prefilled[0]


def prompt_of(case, question):
    images = tiny.heldout()[0]
    if case.endswith("text"):
        story = "the image is a digit. the digit is " * (20 if case == "long text" else 1)
        text = f"<|im_start|>user\n{story}{question}<|im_end|>\n<|im_start|>assistant\n"
        return tiny.batch([tiny.ids_of(text)], None)
    if case.endswith("video"):
        groups = 3 if case == "longer video" else 1
        ids = tiny.prompt(question, n_images=groups, placeholder=tiny.VIDEO)
        if groups > 1:  # something is said between its frames
            ids = [each for token in ids for each in ((token, 8) if token == tiny.VISION_END else (token,))]
        inputs = tiny.batch([ids], None)
        return {
            **inputs,
            "mm_token_type_ids": (inputs["input_ids"] == tiny.VIDEO).int() * 2,
            "pixel_values_videos": tiny.patches(images[5 : 5 + groups]),
            "video_grid_thw": torch.tensor([[groups, 8, 8]]),
        }
    n = {"image": 1, "several images": 3, "many images": 10, "wide image": 1}[case]
    inputs = tiny.batch([tiny.prompt(question, n_images=n)], images[:n])
    if case == "wide image":  # rows and columns differ: positions in the plane run ahead of those in the text
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 16]])
    return inputs


CASES = ("text", "long text", "image", "several images", "many images", "wide image", "video", "longer video")


def continued_by_transformers(first, second, past):
    """Logits of `second` where the keys and values of its first `past` tokens are those computed with `first`."""
    from transformers import DynamicCache

    model = tiny.reference()
    cache = DynamicCache(config=model.config.get_text_config())
    model(**first, cache=cache)
    cache.crop(past - cache.get_seq_length())
    pictures = {name: value for name, value in second.items() if name.endswith("grid_thw")}
    ids, mask = second["input_ids"], second["attention_mask"]
    positions = torch.arange(ids.shape[1])[None, None].expand(3, 1, -1)
    if pictures:
        positions, _ = model.model.get_rope_index(
            ids, mm_token_type_ids=second["mm_token_type_ids"], attention_mask=mask, **pictures
        )
    text = torch.arange(ids.shape[1])[None, None]
    positions = torch.cat([text, positions])[..., past:]
    return model(input_ids=ids[:, past:], position_ids=positions, cache=cache, logits_to_keep=1).logits[:, -1]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_another_question_is_computed_behind_what_is_known(fresh, case):
    model = fresh()
    first, second = (prompt_of(case, question) for question in QUESTIONS)
    sequences, logits = answer(model, first)
    expected_sequences, expected_logits = answer(tiny.reference(), first)
    assert torch.equal(sequences, expected_sequences)
    assert torch.allclose(logits, expected_logits, atol=1e-4), (logits - expected_logits).abs().max()

    encoded = list(model.encoded)
    model.prefilled.clear()
    sequences, logits = answer(model, second)
    past = second["input_ids"].shape[1] - model.prefilled[0]
    assert past >= (8 if case.endswith("text") else int((second["mm_token_type_ids"] != 0).nonzero()[-1, 1]) + 1)
    assert model.encoded == encoded
    expected_sequences, expected_logits = answer(tiny.reference(), second)
    assert torch.equal(sequences, expected_sequences)
    assert torch.allclose(logits, expected_logits, atol=1e-4), (logits - expected_logits).abs().max()
    continued = continued_by_transformers(first, second, past)
    assert torch.allclose(logits[0], continued, atol=1e-4), (logits[0] - continued).abs().max()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_same_prompt_again_computes_one_token(fresh, case):
    model, inputs = fresh(), prompt_of(case, QUESTIONS[0])
    expected = answer(model, inputs)
    assert first_length(model, inputs) == 1
    sequences, logits = answer(model, inputs)
    assert torch.equal(sequences, expected[0])
    assert torch.allclose(logits, expected[1], atol=1e-4), (logits - expected[1]).abs().max()


@pytest.mark.parametrize("case", ["text", "long text", "several images", "many images", "longer video"])
@torch.no_grad()
def test_after_a_restart_it_goes_on_from_the_ssd(fresh, case):
    first, second = (prompt_of(case, question) for question in QUESTIONS)
    before = fresh()
    answer(before, first)
    before.memory_optimizer.close()
    model = fresh()
    assert first_length(model, second) <= second["input_ids"].shape[1] - 8
    assert model.encoded == []
    sequences, logits = answer(model, second)
    expected_sequences, expected_logits = answer(tiny.reference(), second)
    assert torch.equal(sequences, expected_sequences)
    assert torch.allclose(logits, expected_logits, atol=1e-4), (logits - expected_logits).abs().max()
    assert model.memory_optimizer.kv_store.stats()["blocks_from_ssd"] > 0
    assert model.memory_optimizer.cache.stats()["levels"]["ssd"]["hits"] > 0


@torch.no_grad()
def test_a_changed_image_at_the_same_place_is_computed(fresh):
    model, inputs = fresh(), prompt_of("image", QUESTIONS[0])
    answer(model, inputs)
    other = {**inputs, "pixel_values": tiny.patches(tiny.heldout()[0][7:8])}
    start = int((inputs["mm_token_type_ids"] != 0).nonzero()[0, 1])
    model.prefilled.clear()
    sequences, logits = answer(model, other)
    assert model.prefilled[0] == inputs["input_ids"].shape[1] - start
    assert model.encoded == [64, 64]
    expected_sequences, expected_logits = answer(tiny.reference(), other)
    assert torch.equal(sequences, expected_sequences)
    assert torch.allclose(logits, expected_logits, atol=1e-4), (logits - expected_logits).abs().max()


@torch.no_grad()
def test_of_several_images_those_behind_the_changed_one_are_computed(fresh):
    model, inputs = fresh(), prompt_of("several images", QUESTIONS[0])
    answer(model, inputs)
    images = tiny.heldout()[0]
    other = {**inputs, "pixel_values": tiny.patches(images[[0, 8, 2]])}
    sequences, logits = answer(model, other)
    assert model.encoded == [192, 64]  # the third image has its features, not its keys and values
    expected_sequences, expected_logits = answer(tiny.reference(), other)
    assert torch.equal(sequences, expected_sequences)
    assert torch.allclose(logits, expected_logits, atol=1e-4), (logits - expected_logits).abs().max()


@torch.no_grad()
def test_the_next_turn_begins_behind_the_answer(fresh):
    model, inputs = fresh(), prompt_of("image", QUESTIONS[0])
    sequence = answer(model, inputs)[0]
    more = torch.tensor([tiny.ids_of(f"<|im_end|>\n<|im_start|>user\n{QUESTIONS[1]}<|im_end|>\n")])
    ids = torch.cat([sequence, more], dim=1)
    turn = {
        **inputs,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == tiny.IMAGE).int(),
    }
    model.prefilled.clear()
    sequences, logits = answer(model, turn)
    assert ids.shape[1] - model.prefilled[0] > inputs["input_ids"].shape[1]
    expected_sequences, expected_logits = answer(tiny.reference(), turn)
    assert torch.equal(sequences, expected_sequences)
    assert torch.allclose(logits, expected_logits, atol=1e-4), (logits - expected_logits).abs().max()


@torch.no_grad()
def test_a_second_image_in_the_next_turn_is_encoded_and_placed(fresh):
    model = fresh()
    images = tiny.heldout()[0]
    answer(model, prompt_of("image", QUESTIONS[0]))
    both = tiny.batch([tiny.prompt(QUESTIONS[0]) + tiny.prompt(QUESTIONS[1])], images[[0, 4]])
    sequences, logits = answer(model, both)
    assert model.encoded == [64, 64]
    expected_sequences, expected_logits = answer(tiny.reference(), both)
    assert torch.equal(sequences, expected_sequences)
    assert torch.allclose(logits, expected_logits, atol=1e-4), (logits - expected_logits).abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"num_return_sequences": 2, "do_sample": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_other_ways_to_generate_are_left_as_they_are(fresh, options):
    model, inputs = fresh(), prompt_of("text", QUESTIONS[0])
    answer(model, inputs)
    for _ in range(2):
        torch.manual_seed(0)
        found = model.generate(**inputs, **{"max_new_tokens": 6, "do_sample": False, **options})
        torch.manual_seed(0)
        expected = tiny.reference().generate(**inputs, **{"max_new_tokens": 6, "do_sample": False, **options})
        assert torch.equal(found, expected)


@torch.no_grad()
def test_tensors_that_mark_another_way_to_generate_are_left_as_they_are(fresh):
    model, inputs = fresh(), prompt_of("text", QUESTIONS[0])
    embeds = tiny.reference().get_input_embeddings()(inputs["input_ids"])
    positions = torch.arange(embeds.shape[1])[None, None].expand(4, 1, -1)
    options = {"max_new_tokens": 6, "do_sample": False}
    for given in ({"inputs_embeds": embeds}, {"position_ids": positions}):
        expected = tiny.reference().generate(**inputs, **given, **options)
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, **given, **options), expected)
    assert model.memory_optimizer.kv_store.stats()["lookups"] == 0


@torch.no_grad()
def test_a_cache_that_generate_returns_can_be_gone_on_in(fresh):
    model, inputs = fresh(), prompt_of("long text", QUESTIONS[0])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    more = torch.tensor([tiny.ids_of(f"<|im_end|>\n<|im_start|>user\n{QUESTIONS[1]}<|im_end|>\n")])
    found = []
    for each in (model, tiny.reference()):
        first = each.generate(**inputs, **options)
        ids = torch.cat([first.sequences, more], dim=1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: first[CACHE]}
        found.append(each.generate(**given, **options, output_logits=True))
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert torch.allclose(torch.stack(found[0].logits), torch.stack(found[1].logits), atol=1e-4)
    assert model.memory_optimizer.kv_store.stats()["resting_tails"] == 1
    assert first_length(model, inputs) == 1


@torch.no_grad()
def test_a_batch_is_left_as_it_is(fresh):
    model, inputs = fresh(), tiny.cases()["left-padded batch"]
    for _ in range(2):
        assert torch.equal(
            model.generate(**inputs, max_new_tokens=6, do_sample=False),
            tiny.reference().generate(**inputs, max_new_tokens=6, do_sample=False),
        )
    assert model.memory_optimizer.kv_store.stats()["lookups"] == 0


@torch.no_grad()
def test_sampling_draws_the_same_tokens(fresh):
    model, inputs = fresh(), prompt_of("image", QUESTIONS[0])
    answer(model, inputs)
    found = []
    for each in (model, tiny.reference()):
        torch.manual_seed(3)
        found.append(each.generate(**inputs, max_new_tokens=8, do_sample=True, temperature=0.9))
    assert torch.equal(*found)


@torch.no_grad()
def test_positional_ids_and_a_call_without_a_mask_work(fresh):
    model = fresh()
    ids = prompt_of("text", QUESTIONS[0])["input_ids"]
    expected = tiny.reference().generate(ids, max_new_tokens=6, do_sample=False)
    for _ in range(2):
        model.prefilled.clear()
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
    assert model.prefilled[0] == 1


@torch.no_grad()
def test_an_interrupted_answer_leaves_the_model_as_it_was(fresh):
    class Stop:
        def put(self, value):
            raise KeyboardInterrupt

        def end(self):
            pass

    model, inputs = fresh(), prompt_of("image", QUESTIONS[0])
    expected = answer(model, inputs)[0]
    with pytest.raises(KeyboardInterrupt):
        model.generate(**inputs, max_new_tokens=6, streamer=Stop())
    assert torch.equal(answer(model, inputs)[0], expected)
    assert first_length(model, inputs) == 1


@torch.no_grad()
def test_without_room_for_what_is_known_all_is_computed(fresh, monkeypatch):
    model, inputs = fresh(), prompt_of("image", QUESTIONS[0])
    expected = answer(model, inputs)[0]

    def refuse(match, cache):
        raise MemoryBudgetExceeded("no", requested_bytes=1, available_bytes=0, budget_bytes=0, owner="x")

    with monkeypatch.context() as patched:
        patched.setattr(model.memory_optimizer.kv_store, "adopt", refuse)
        assert first_length(model, inputs) == inputs["input_ids"].shape[1]
    assert torch.equal(answer(model, inputs)[0], expected)


@torch.no_grad()
def test_it_works_within_a_budget_of_the_process(fresh):
    model = fresh(ram_budget=rss_bytes() + 1_000_000_000)
    first_length(model, prompt_of("image", QUESTIONS[0]))
    inputs = prompt_of("image", QUESTIONS[1])
    assert first_length(model, inputs) < inputs["input_ids"].shape[1] // 2


@torch.no_grad()
def test_a_hook_that_may_change_results_turns_it_off(fresh):
    model, inputs = fresh(), prompt_of("image", QUESTIONS[0])
    model.model.language_model.layers[1].register_forward_hook(lambda module, args, output: output * 1.5)
    assert [first_length(model, inputs) for _ in range(2)] == [inputs["input_ids"].shape[1]] * 2


def test_it_is_off_where_results_are_those_of_transformers_and_on_where_weights_are_encoded(fresh):
    for settings, expected in (({"codec": "none", "prefix_reuse": "auto"}, False), ({"codec": "int8"}, True)):
        model, inputs = fresh(**settings), prompt_of("image", QUESTIONS[0])
        answer(model, inputs)
        assert (first_length(model, inputs) == 1) == expected


@torch.no_grad()
def test_private_keeps_beginnings_in_memory(fresh, tmp_path):
    model, inputs = fresh(private=True), prompt_of("image", QUESTIONS[0])
    answer(model, inputs)
    assert first_length(model, inputs) == 1
    assert not (tmp_path / "cache" / "reuse").exists()
