"""A model that somebody changed answers as the changed one, whatever was kept of it before."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from qwen3_vl_memory_optimizations import create_optimized_model

from ..model import tiny

IDS = torch.randint(7, 60, (1, 400), generator=torch.Generator().manual_seed(3))
OPTIONS = {
    "max_new_tokens": 4,
    "min_new_tokens": 4,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}


def norm(model):
    return model.model.language_model.layers[1].input_layernorm


def mlp(model):
    return model.model.language_model.layers[1].mlp


@contextlib.contextmanager
def patched(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def hooked(handle):
    try:
        yield
    finally:
        handle.remove()


def scaled_weight(model):
    norm(model).weight.data.mul_(1.5)


def managed_weight(model):
    mlp(model).down_proj.weight.data.mul_(0.5)


def other_parameter(model):
    weight = mlp(model).down_proj.weight
    mlp(model).down_proj.weight = nn.Parameter(weight.float() * 0.5, requires_grad=False)


def swapped_weights(model):
    first, second = model.model.language_model.layers[0].mlp, model.model.language_model.layers[1].mlp
    first.up_proj.weight, second.up_proj.weight = second.up_proj.weight, first.up_proj.weight


def pre_hook(model):
    return hooked(mlp(model).register_forward_pre_hook(lambda module, args: (args[0] * 2,)))


def hook(model):
    return hooked(mlp(model).register_forward_hook(lambda module, args, output: output * 2))


def global_hook(model):
    def double(module, args, output):
        return output * 2 if module is mlp(model) else None

    return hooked(nn.modules.module.register_module_forward_hook(double))


def own_forward(model):
    plain = mlp(model).forward
    mlp(model).forward = lambda x: plain(x) * 2


def class_forward(model):
    kind = type(mlp(model))
    plain = kind.forward
    return patched(kind, "forward", lambda self, x: plain(self, x) * 2)


def function_of_the_file(model):
    import transformers.models.qwen3_vl.modeling_qwen3_vl as module

    def other(q, k, cos, sin, **kwargs):
        return q, k

    return patched(module, "apply_rotary_pos_emb", other)


def attribute(model):
    norm(model).variance_epsilon = 0.5


def configuration(model):
    model.config.text_config.hidden_act = "relu"
    model.model.language_model.layers[1].mlp.act_fn = nn.ReLU()


def buffer(model):
    model.model.language_model.rotary_emb.inv_freq.mul_(0.5)


def function_mode(model):
    from torch.overrides import TorchFunctionMode

    class Doubles(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            return result * 2 if func is torch.nn.functional.silu else result

    return Doubles()


CHANGES = [
    scaled_weight,
    managed_weight,
    other_parameter,
    swapped_weights,
    pre_hook,
    hook,
    global_hook,
    own_forward,
    class_forward,
    attribute,
    configuration,
    buffer,
    function_mode,
]


def make(directory, **settings):
    given = {"cache_dir": directory, "codec": "none", "prefix_reuse": "on", **settings}
    return create_optimized_model(tiny.DIRECTORY, given, dtype=torch.float32)


def answer(model, **more):
    result = model.generate(input_ids=IDS, **{**OPTIONS, **more})
    return result.sequences, torch.stack(result.logits)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_answers_as_the_changed_one(change, tmp_path):
    kept, plain = make(tmp_path), make(tmp_path / "plain", enable_cache_hierarchy=False)
    before, _ = answer(kept)
    answer(kept)
    assert kept.memory_optimizer.get_memory_efficiency_stats()["kv"]["hits"] == 1
    with change(plain) or contextlib.nullcontext():
        expected, expected_logits = answer(plain)
    with change(kept) or contextlib.nullcontext():
        for _ in range(2):
            found, logits = answer(kept)
            torch.testing.assert_close(logits, expected_logits, rtol=1e-3, atol=1e-2)
            assert torch.equal(found, expected)
    kept.memory_optimizer.close()
    plain.memory_optimizer.close()
    # and in the next process, the model as it is in its files
    again = make(tmp_path)
    found, _ = answer(again)
    assert torch.equal(found, before)
    again.memory_optimizer.close()


def test_a_change_that_is_taken_back_is_known_again(tmp_path):
    model = make(tmp_path)
    answer(model)
    weight = norm(model).weight.data
    values = weight.clone()
    weight.mul_(2)
    answer(model)
    weight.copy_(values)
    hits = model.memory_optimizer.get_memory_efficiency_stats()["kv"]["hits"]
    answer(model)
    assert model.memory_optimizer.get_memory_efficiency_stats()["kv"]["hits"] == hits + 1
    model.memory_optimizer.close()


def test_what_a_changed_model_leaves_is_not_on_the_disk(tmp_path):
    model = make(tmp_path)
    norm(model).weight.data.mul_(1.5)
    answer(model)
    stats = model.memory_optimizer.get_memory_efficiency_stats()["kv"]
    model.memory_optimizer.close()
    again = make(tmp_path)
    answer(again)
    assert stats["resting_tails"] == 1
    assert again.memory_optimizer.get_memory_efficiency_stats()["kv"]["hits"] == 0
    again.memory_optimizer.close()


def test_what_an_unchanged_model_leaves_is(tmp_path):
    for hits in (0, 1):
        model = make(tmp_path)
        answer(model)
        assert model.memory_optimizer.get_memory_efficiency_stats()["kv"]["hits"] == hits
        model.memory_optimizer.close()


def test_a_derived_class_is_kept_in_its_process_only(tmp_path):
    from transformers import Qwen3VLForConditionalGeneration

    class Mine(Qwen3VLForConditionalGeneration):
        pass

    for _ in range(2):
        model = create_optimized_model(
            tiny.DIRECTORY, {"cache_dir": tmp_path, "codec": "none", "prefix_reuse": "on"}, model_class=Mine
        )
        answer(model)
        answer(model)
        assert model.memory_optimizer.get_memory_efficiency_stats()["kv"]["hits"] == 1
        model.memory_optimizer.close()


def test_arguments_that_nobody_knows_are_not_kept(tmp_path):
    model = make(tmp_path)
    answer(model)
    with contextlib.suppress(ValueError):  # transformers may refuse it
        answer(model, scaling=0.1)
    assert model.memory_optimizer.get_memory_efficiency_stats()["kv"]["hits"] == 0
    model.memory_optimizer.close()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_an_adapter_that_is_switched_off_and_on(tmp_path):
    peft = pytest.importorskip("peft")
    kept, plain = make(tmp_path), make(tmp_path / "plain", enable_cache_hierarchy=False)
    answers = []
    for model in (kept, plain):
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["up_proj"], r=4, init_lora_weights=False)
        adapted = peft.get_peft_model(model, config).eval()
        with torch.no_grad():
            on = answer(adapted)[1]
            with adapted.disable_adapter():
                off = answer(adapted)[1]
            answers.append((on, off, answer(adapted)[1]))
    for found, expected in zip(*answers, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)
    assert not torch.allclose(answers[0][0], answers[0][1], atol=1e-2)
    kept.memory_optimizer.close()
    plain.memory_optimizer.close()
