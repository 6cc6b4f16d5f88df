"""A model that was optimised is given back as it was."""

from __future__ import annotations

import copy

import pytest
import torch

from qwen3_vl_memory_optimizations import (
    ConfigurationError,
    MemoryBudgetExceeded,
    OptimizedVisionLanguageModel,
    TensorFreedError,
    optimized,
    release,
)
from qwen3_vl_memory_optimizations import create_optimized_model as optimize
from qwen3_vl_memory_optimizations.model import attachment

from .model import tiny

OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


NOT_COMPARED = ("_parameters", "_buffers", "_modules", "rope_deltas")


def look(model):
    """All that is to be as before: attributes of modules, hooks, the kinds of parameters, the attention."""
    found = {}
    for name, module in model.named_modules():
        state = module.__dict__
        found[name] = (
            {key: id(value) for key, value in state.items() if key not in NOT_COMPARED},
            {key: set(value) for key, value in state.items() if "hooks" in key and isinstance(value, dict)},
            {key: type(value) for key, value in module._parameters.items()},
        )
    return type(model), found, model.config.get_text_config()._attn_implementation


@pytest.mark.parametrize(
    "settings", [{"codec": "none"}, {"codec": "int8"}, {"codec": "none", "tensor_budget": 4_000_000}]
)
def test_the_same_modules_are_plain_again(settings, tmp_path):
    model = copy.deepcopy(tiny.reference()).train()
    before, reference = look(model), tiny.reference()
    inputs = tiny.cases()["image"]
    expected = reference.generate(**inputs, **OPTIONS)
    optimize(model, {**settings, "cache_dir": tmp_path})
    optimizer = model.memory_optimizer
    model.generate(**inputs, **OPTIONS)
    decoded = {name: weight.clone() for name, weight in model.named_parameters()}
    assert release(model) is model
    assert look(model) == before
    assert model.training and model.lm_head.weight is model.get_input_embeddings().weight
    for name, weight in model.named_parameters():
        assert torch.equal(weight, decoded[name]) and weight.requires_grad
    model.eval()
    if settings["codec"] == "none":
        assert torch.equal(model.generate(**inputs, **OPTIONS), expected)
    assert optimizer._parts.closed
    with pytest.raises(ConfigurationError, match="not an optimized model"):
        release(model)


def test_a_block_ends_with_the_plain_model_also_after_an_exception(tmp_path):
    model = copy.deepcopy(tiny.reference())
    before = look(model)
    with pytest.raises(ZeroDivisionError), optimized(model, {"codec": "none", "cache_dir": tmp_path}) as managed:
        assert managed is model and hasattr(model, "memory_optimizer")
        model.generate(**tiny.cases()["text"], **OPTIONS)
        raise ZeroDivisionError
    assert look(model) == before
    copy.deepcopy(model)


def test_a_with_block_closes_the_optimizer_also_after_an_exception(tmp_path):
    plain, expected = tiny.reference(), tiny.reference().generate(**tiny.cases()["text"], **OPTIONS)
    with pytest.raises(ZeroDivisionError), optimize(tiny.DIRECTORY, {"codec": "none", "cache_dir": tmp_path}) as model:
        optimizer = model.memory_optimizer
        assert isinstance(model, type(plain)) and type(model).__name__ == type(plain).__name__
        assert torch.equal(model.generate(**tiny.cases()["text"], **OPTIONS), expected)
        raise ZeroDivisionError
    assert optimizer._parts.closed
    with pytest.raises(TensorFreedError):
        model.generate(**tiny.cases()["text"], **OPTIONS)
    assert not hasattr(plain, "__enter__")


def test_a_model_that_is_released_within_its_block_stays_usable(tmp_path):
    with optimize(tiny.DIRECTORY, {"codec": "none", "cache_dir": tmp_path}) as model:
        release(model)
    assert type(model) is type(tiny.reference())
    model.generate(**tiny.cases()["text"], **OPTIONS)


def test_the_class_of_the_package_closes_itself_too(tmp_path):
    with OptimizedVisionLanguageModel.from_pretrained(tiny.DIRECTORY, {"cache_dir": tmp_path}) as model:
        assert type(model) is OptimizedVisionLanguageModel
    assert model.memory_optimizer._parts.closed


def test_a_released_model_can_be_optimised_again(tmp_path):
    model = copy.deepcopy(tiny.reference())
    expected = tiny.reference().generate(**tiny.cases()["text"], **OPTIONS)
    for _ in range(2):
        with optimized(model, {"codec": "none", "cache_dir": tmp_path}):
            assert torch.equal(model.generate(**tiny.cases()["text"], **OPTIONS), expected)


def test_what_others_attached_stays(tmp_path):
    model = copy.deepcopy(tiny.reference())
    calls = []
    model.lm_head.register_forward_hook(lambda module, args, output: calls.append("before"))
    optimize(model, {"codec": "none", "cache_dir": tmp_path})
    model.model.norm_of_mine = 3
    model.lm_head.register_forward_hook(lambda module, args, output: calls.append("after"))
    mine = model.forward = lambda *args, **kwargs: type(model).forward(model, *args, **kwargs)
    release(model)
    model(**tiny.cases()["text"])
    assert calls == ["before", "after"] and model.model.norm_of_mine == 3 and model.forward is mine


def test_a_loaded_checkpoint_and_its_draft(tmp_path):
    model = optimize(
        tiny.DIRECTORY, {"codec": "none", "cache_dir": tmp_path}, assistant=tiny.make_draft(tmp_path / "draft")
    )
    draft, expected = model.assistant, model.generate(**tiny.cases()["text"], **OPTIONS)
    release(model)
    assert not hasattr(model, "assistant")
    for each in (model, draft):
        assert {type(weight) for weight in each.parameters()} == {torch.nn.Parameter}
    assert torch.equal(model.generate(**tiny.cases()["text"], **OPTIONS), expected)
    assert torch.equal(model.generate(**tiny.cases()["text"], assistant_model=draft, **OPTIONS), expected)


def test_where_there_is_no_memory_nothing_is_changed(tmp_path, monkeypatch):
    model = optimize(tiny.DIRECTORY, {"codec": "int8", "cache_dir": tmp_path})
    monkeypatch.setattr(attachment, "usable_memory", lambda: (1, 1))
    with pytest.raises(MemoryBudgetExceeded, match="save_pretrained"):
        release(model)
    model.generate(**tiny.cases()["text"], **OPTIONS)
    model.memory_optimizer.close()
