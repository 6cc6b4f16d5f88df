"""A model and its draft within one budget."""

from __future__ import annotations

import logging

import pytest
import torch

from qwen3_vl_memory_optimizations import (
    CheckpointError,
    ConfigurationError,
    MemoryBudgetExceeded,
    TensorFreedError,
    create_optimized_model,
)
from qwen3_vl_memory_optimizations.model.layers.forward_memory import FIXED_RESERVE_BYTES

from . import tiny

BUDGET_BYTES = 3_900_000
"""Less than the text layers of the model and its draft together; the tails of keys and values count too."""


@pytest.fixture
def settings(tmp_path):
    return {"codec": "none", "tensor_budget": BUDGET_BYTES, "cache_dir": tmp_path / "cache"}


@pytest.fixture
def draft(tmp_path):
    return tiny.make_draft(tmp_path / "draft")


@pytest.fixture
def model(settings, draft):
    model = create_optimized_model(tiny.DIRECTORY, settings, assistant=draft)
    model.assistant.generation_config.num_assistant_tokens = 4
    model.assistant.generation_config.assistant_confidence_threshold = 0
    yield model
    model.memory_optimizer.close()


@pytest.fixture
def passes(model):
    """Grows with each forward of the draft."""
    return tiny.count_forwards(model.assistant)


@torch.no_grad()
def generate(model, case="text", **options):
    torch.manual_seed(0)
    return model.generate(**tiny.cases()[case], max_new_tokens=18, min_new_tokens=18, **{"do_sample": False, **options})


def text_pages(model, *, of_draft):
    return [
        page
        for name, entry in model.memory_optimizer.pager.entries.items()
        for page in entry.pages
        if name.startswith("assistant/") == of_draft and "visual" not in name
    ]


# --- the budget -------------------------------------------------------------------------------------------------------


def test_the_draft_stays_in_memory_once_the_passes_are_known(model, passes):
    for _ in range(2):
        generate(model)
    assert len(passes) > 20
    assert all(page.kept and page.resident for page in text_pages(model, of_draft=True))
    kept = [page.kept for page in text_pages(model, of_draft=False)]
    assert any(kept) and not all(kept), "the model gets what is left"
    assert model.memory_optimizer.pager.frames.peak_bytes <= BUDGET_BYTES


def test_the_draft_gets_its_place_after_the_model_ran_alone(model):
    expected = generate(tiny.reference())
    for _ in range(3):
        assert torch.equal(generate(model, assistant_model=None), expected)
    assert not all(page.kept for page in text_pages(model, of_draft=True))
    for _ in range(3):
        assert torch.equal(generate(model), expected)
    assert all(page.kept for page in text_pages(model, of_draft=True))


def test_statistics_count_both(model, settings):
    alone = create_optimized_model(tiny.DIRECTORY, settings).memory_optimizer
    both, one = (each.get_memory_efficiency_stats()["kinds"] for each in (model.memory_optimizer, alone))
    alone.close()
    drafted = [e for name, e in model.memory_optimizer.pager.entries.items() if name.startswith("assistant/")]
    assert both.keys() == {"weights"}
    assert both["weights"]["tensors"] == one["weights"]["tensors"] + len(drafted)
    assert both["weights"]["encoded_bytes"] == one["weights"]["encoded_bytes"] + sum(e.n_bytes for e in drafted)


def test_closing_closes_both(model):
    model.memory_optimizer.close()
    for each in (model, model.assistant):
        with pytest.raises(TensorFreedError):
            each(**tiny.cases()["text"])


def test_a_budget_too_small_for_both_is_refused(settings, draft):
    tensors = create_optimized_model(tiny.DIRECTORY, settings).memory_optimizer.pager.ledger
    least = tensors.frames_floor_bytes + tensors.held_bytes("small weights")
    create_optimized_model(tiny.DIRECTORY, settings | {"tensor_budget": least}).memory_optimizer.close()
    with pytest.raises(MemoryBudgetExceeded) as caught:
        create_optimized_model(tiny.DIRECTORY, settings | {"tensor_budget": least}, assistant=draft)
    assert caught.value.budget_bytes == least


def test_forwards_of_the_draft_do_not_lower_what_is_set_aside(tmp_path, draft):
    model = create_optimized_model(
        tiny.DIRECTORY, {"codec": "none", "ram_budget": "4GB", "cache_dir": tmp_path}, assistant=draft
    )
    ledger, held = model.memory_optimizer.pager.ledger, {"model": [], "draft": []}
    for name, each in (("model", model), ("draft", model.assistant)):
        each.register_forward_hook(lambda *_, name=name: held[name].append(ledger.held_bytes("activations")))
    generate(model, "two images")
    assert min(held["draft"]) > FIXED_RESERVE_BYTES
    assert min(held["draft"]) >= min(held["model"])
    before = ledger.held_bytes("activations")
    model.assistant(input_ids=torch.ones(1, 2, dtype=torch.long))
    assert ledger.held_bytes("activations") == before
    model.memory_optimizer.close()


# --- `generate` -------------------------------------------------------------------------------------------------------


def test_the_draft_is_no_part_of_the_model(model):
    assert dict(model.state_dict()).keys() == tiny.reference().state_dict().keys()
    assert model.assistant not in list(model.modules())
    assert model.assistant.memory_optimizer is model.memory_optimizer


def test_the_caller_may_go_without(model, passes):
    assert torch.equal(generate(model, assistant_model=None), generate(tiny.reference()))
    assert not passes


def test_the_caller_may_bring_another(model, passes):
    others = tiny.count_forwards(tiny.reference())
    expected = generate(tiny.reference())
    before = len(others)
    assert torch.equal(generate(model, assistant_model=tiny.reference()), expected)
    assert len(others) > before and not passes


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("text", {"num_beams": 3}),
        ("text", {"num_return_sequences": 2, "do_sample": True}),
        ("text", {"use_cache": False}),
        ("text", {"prompt_lookup_num_tokens": 3}),
        ("text", {"cache_implementation": "static"}),
        ("left-padded batch", {}),
    ],
    ids=["beams", "several answers", "no cache", "prompt lookup", "static cache", "batch"],
)
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_where_transformers_allows_no_draft_the_call_goes_on_without(model, passes, caplog, case, options):
    if "cache_implementation" in options:
        options = options | {"disable_compile": True}
    expected = generate(tiny.reference(), case, **options)
    with caplog.at_level(logging.WARNING, "qwen3_vl_memory_optimizations"):
        assert torch.equal(generate(model, case, **options), expected)
        assert not caplog.messages, "nobody asked for a draft"
        assert torch.equal(generate(model, case, assistant_model=model.assistant, **options), expected)
    assert not passes
    (message,) = caplog.messages
    assert message.startswith("generate: assistant_model is ignored: ")


def test_a_generation_config_is_heeded(model, passes):
    from transformers import GenerationConfig

    config = GenerationConfig(num_beams=2, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
    model.generate(**tiny.cases()["text"], generation_config=config)
    assert not passes
    model.generation_config.num_beams = 2
    generate(model)
    assert not passes


def test_the_draft_answers_by_itself_too(model):
    reply = generate(model.assistant, "image")
    assert reply.shape[1] == tiny.cases()["image"]["input_ids"].shape[1] + 18


def test_sampling_draws_from_the_draft_and_stops_where_the_model_does(model, passes):
    reply = generate(model, "image", do_sample=True, temperature=0.8)
    assert reply.shape[1] == tiny.cases()["image"]["input_ids"].shape[1] + 18
    assert passes


@pytest.mark.parametrize("case", ["text", "image", "video"])
def test_a_draft_that_is_the_same_sees_the_same(settings, case):
    """Transformers alone would not show it the images."""
    model = create_optimized_model(tiny.DIRECTORY, settings, assistant=tiny.DIRECTORY)
    model.assistant.generation_config.assistant_confidence_threshold = 0
    model.assistant.generation_config.num_assistant_tokens = 5
    rows = tiny.count_forwards(model)
    assert torch.equal(generate(model, case), generate(tiny.reference(), case))
    assert rows == [6, 6, 6], "all of the five drafts were right at each pass"
    model.memory_optimizer.close()


def test_pictures_are_not_proposed(model):
    """A placeholder among the proposals would be looked for among the encoded images, and fail."""
    with torch.no_grad():
        head = model.assistant.lm_head
        head.register_forward_hook(lambda _, args, out: out.index_fill(-1, torch.tensor([tiny.IMAGE]), 1e4))
    assert torch.equal(generate(model, "image"), generate(tiny.reference(), "image"))


# --- what is taken and refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["model", "configuration"])
def test_a_draft_may_be_a_model_or_a_configuration(settings, draft, form):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    if form == "model":
        given = Qwen3VLForConditionalGeneration.from_pretrained(draft, dtype=torch.float32)
    else:
        given = Qwen3VLConfig.from_pretrained(draft)
    model = create_optimized_model(tiny.DIRECTORY, settings, assistant=given)
    passes = tiny.count_forwards(model.assistant)
    assert torch.equal(generate(model), generate(tiny.reference()))
    assert passes
    model.memory_optimizer.close()


def test_int8_packs_both(settings, draft):
    model = create_optimized_model(
        tiny.DIRECTORY, settings | {"codec": "int8", "tensor_budget": 1_500_000}, assistant=draft
    )
    assert len(list((settings["cache_dir"] / "packed").glob("*-int8"))) == 2
    expected = generate(model, "image", assistant_model=None)
    assert torch.equal(generate(model, "image"), expected)
    model.memory_optimizer.close()


def test_another_vocabulary_is_refused_before_anything_is_loaded(settings, draft):
    config = draft / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 68', '"vocab_size": 69'))
    with pytest.raises(ConfigurationError, match="69 tokens.* 68"):
        create_optimized_model(tiny.DIRECTORY, settings | {"codec": "int8"}, assistant=draft)
    assert not settings["cache_dir"].exists()


def test_what_is_no_draft_is_refused(settings, tmp_path):
    with pytest.raises(ConfigurationError, match="assistant: expected a directory"):
        create_optimized_model(tiny.DIRECTORY, settings, assistant=3)
    with pytest.raises(CheckpointError, match="nowhere"):
        create_optimized_model(tiny.DIRECTORY, settings, assistant=tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="own draft"):
        create_optimized_model(tiny.reference(), settings, assistant=tiny.reference())


def test_a_draft_that_is_not_smaller_is_a_warning(settings, caplog):
    with caplog.at_level(logging.WARNING, "qwen3_vl_memory_optimizations"):
        create_optimized_model(tiny.DIRECTORY, settings, assistant=tiny.DIRECTORY).memory_optimizer.close()
    assert "not smaller" in caplog.text
