"""The fused decoder layers compute what those of transformers do, and step aside where they could not."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from qwen3_vl_memory_optimizations import create_optimized_model
from qwen3_vl_memory_optimizations.model.layers.decoder_layer import joined_names

from . import tiny

WEIGHTS_BYTES = 10_800_000


@pytest.fixture(scope="module", params=[None, WEIGHTS_BYTES // 3], ids=["unlimited", "a third of the weights"])
def fused(request, tmp_path_factory):
    """Weights as they are, so that the forward alone differs."""
    settings = {"codec": "none", "fused_modules": "on", "tensor_budget": request.param}
    model = create_optimized_model(tiny.DIRECTORY, settings | {"cache_dir": tmp_path_factory.mktemp("cache")})
    yield model
    model.memory_optimizer.close()


@pytest.fixture
def packed(tmp_path_factory):
    model = create_optimized_model(tiny.DIRECTORY, {"cache_dir": tmp_path_factory.getbasetemp() / "packed"})
    yield model
    model.memory_optimizer.close()


def layers(model):
    return model.model.language_model.layers


@pytest.mark.parametrize("case", tiny.cases())
@torch.no_grad()
def test_logits_differ_by_rounding_alone(fused, case):
    inputs = tiny.cases()[case]
    expected = tiny.reference()(**inputs).logits
    for _ in range(3):
        found = fused(**inputs).logits
        assert torch.allclose(found, expected, atol=2e-4, rtol=1e-4), (found - expected).abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=["greedy", "beams", "no cache", "static cache"],
)
@torch.no_grad()
def test_generation_gives_the_same_ids(fused, options):
    inputs = tiny.cases()["image"]
    expected = tiny.reference().generate(**inputs, max_new_tokens=12, min_new_tokens=8, **options)
    assert torch.equal(fused.generate(**inputs, max_new_tokens=12, min_new_tokens=8, **options), expected)


@torch.no_grad()
def test_one_token_after_another_gives_the_logits_of_all_at_once(fused):
    inputs = tiny.cases()["text"]
    expected = tiny.reference()(**inputs).logits[0]
    name = "cache" if "cache" in inspect.signature(type(layers(fused)[0]).forward).parameters else "past_key_values"
    fused.model.rope_deltas = None  # transformers keeps that of the last image
    cache, rows = DynamicCache(config=fused.config), []  # named so since transformers 5.24
    for token in inputs["input_ids"][0]:
        rows.append(fused(input_ids=token.view(1, 1), **{name: cache}, use_cache=True).logits[0, 0])
    assert torch.allclose(torch.stack(rows), expected, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_hidden_states_and_attentions_are_seen(fused):
    inputs = tiny.cases()["text"]
    expected = tiny.reference()(**inputs, output_hidden_states=True)
    found = fused(**inputs, output_hidden_states=True)
    assert len(found.hidden_states) == len(expected.hidden_states)
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.allclose(one, other, atol=2e-4, rtol=1e-4)
    fused.set_attn_implementation("eager")
    try:
        attentions = fused(**inputs, output_attentions=True).attentions
    finally:
        fused.set_attn_implementation("sdpa")
    assert len(attentions) == len(layers(fused)) and attentions[0].shape[1] == 4


def differences(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class Adapter(nn.Module):
    """A linear layer with something added, as adapters do it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.weight = inner, inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 1.0


@torch.no_grad()
def test_replaced_and_hooked_parts_are_respected(packed):
    inputs = tiny.cases()["text"]
    before = packed(**inputs).logits
    attention = layers(packed)[1].self_attn
    attention.v_proj = Adapter(attention.v_proj)
    changed = packed(**inputs).logits
    attention.v_proj = attention.v_proj.inner
    assert differences(changed, before) > 0.1
    seen = []
    hook = layers(packed)[2].mlp.gate_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    packed(**inputs)
    hook.remove()
    assert seen == [(1, inputs["input_ids"].shape[1], 384)]
    assert differences(packed(**inputs).logits, before) < 0.02  # kernels, and so rounding, are chosen by time


def test_weights_of_one_input_lie_together(packed):
    entries = packed.memory_optimizer.pager.entries
    groups = joined_names(entries)
    assert len(groups) == 2 * len(layers(packed))
    for names in groups:
        together = [entries[name] for name in names]
        assert all(entry.joined is not None and list(entry.joined.entries) == together for entry in together)


def test_settings_decide(tmp_path):
    for settings, expected in (
        ({"codec": "none"}, False),
        ({"codec": "none", "fused_modules": "on"}, True),
        ({}, True),
        ({"fused_modules": "off"}, False),
    ):
        model = create_optimized_model(tiny.DIRECTORY, settings | {"cache_dir": tmp_path})
        assert all(("forward" in layer.__dict__) == expected for layer in layers(model)), settings
        model.memory_optimizer.close()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_attends_as_sdpa_does(tmp_path, dtype):
    """16 bits and fp32 take different kernels; both are those of transformers but for rounding."""
    from qwen3_vl_memory_optimizations.model.kv.attention import CachedStates

    calls, attend = [], CachedStates.attend_row
    settings = {"codec": "none", "cache_dir": tmp_path}
    ids = torch.arange(5, 45).view(1, -1)
    logits = {}
    for mode in ("off", "on"):
        model = create_optimized_model(tiny.DIRECTORY, settings | {"fused_modules": mode}, dtype=dtype)
        with model.memory_optimizer, pytest.MonkeyPatch.context() as patch:
            patch.setattr(CachedStates, "attend_row", lambda *args: calls.append(args) or attend(*args))
            answer = model.generate(
                input_ids=ids,
                max_new_tokens=8,
                min_new_tokens=8,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            logits[mode] = torch.stack(answer.logits).float()
            assert len(calls) == (7 * len(layers(model)) if mode == "on" else 0)
    assert differences(logits["on"], logits["off"]) < (1e-5 if dtype == torch.float32 else 2e-2)
