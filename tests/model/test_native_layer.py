"""A few tokens through decoder layers in the native core: what torch's operations compute, up to rounding."""

from __future__ import annotations

import inspect

import pytest
import torch

from qwen3_vl_memory_optimizations import create_optimized_model
from qwen3_vl_memory_optimizations.model.compat import cache_name
from qwen3_vl_memory_optimizations.model.kv.cache import ManagedKVCache
from qwen3_vl_memory_optimizations.model.layers import decoder_layer, native_layers
from qwen3_vl_memory_optimizations.native import core

from . import tiny

pytestmark = pytest.mark.skipif(core() is None, reason="the native core is not built")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request, tmp_path_factory):
    settings = {"codec": "int8_rotated", "cache_dir": tmp_path_factory.mktemp("cache")}
    model = create_optimized_model(tiny.DIRECTORY, settings, dtype=request.param)
    yield model
    model.memory_optimizer.close()


@pytest.fixture
def computed(monkeypatch):
    """The numbers of the layers that the native core computed."""
    found = []
    run = native_layers._Built.run

    def counted(self, native, first, stop, *args):
        output = run(self, native, first, stop, *args)
        if output is not None:
            found.extend(range(first, stop))
        return output

    monkeypatch.setattr(native_layers._Built, "run", counted)
    return found


def prompts(batch: int) -> torch.Tensor:
    text = "what colour is the large square to the left of the small circle, and how many are there? " * 4
    ids = tiny.ids_of(text)[:100]
    return torch.tensor([ids[row:] + ids[:row] for row in range(batch)])


def logits(model, ids, steps, codec):
    """Logits of the tokens of each step, after a prompt of all the others."""
    cache = ManagedKVCache(model.config, codec=codec, block_tokens=32, keeps_all=False)
    name = cache_name(inspect.signature(model.forward).parameters)
    first = ids.shape[1] - sum(steps)
    with torch.no_grad():
        found = [model(input_ids=ids[:, :first], **{name: cache}).logits[:, -1:]]
        for length in steps:
            found.append(model(input_ids=ids[:, first : first + length], **{name: cache}).logits)
            first += length
    return torch.cat(found, dim=1).float()


@pytest.mark.parametrize("codec", ["int8", "none", "int4"])
@pytest.mark.parametrize(("batch", "steps"), [(1, [1] * 20), (3, [1] * 5), (1, [5, 3, 1, 16]), (2, [4, 8, 1])])
def test_layers_differ_by_rounding_alone(model, computed, monkeypatch, codec, batch, steps):
    ids, n_layers = prompts(batch), model.config.text_config.num_hidden_layers
    found = logits(model, ids, steps, codec)
    assert computed == list(range(n_layers)) * len(steps)
    monkeypatch.setattr(decoder_layer, "core", lambda: None)
    expected = logits(model, ids, steps, codec)
    assert len(computed) == len(steps) * n_layers
    assert (found - expected).abs().max() < (0.02 if model.dtype == torch.float32 else 0.2) * expected.std()


def decode(model, ids, cache=None, **options):
    """The output of the last token after all others."""
    name = cache_name(inspect.signature(model.forward).parameters)
    cache = cache or ManagedKVCache(model.config, codec="int8", block_tokens=32, keeps_all=False)
    with torch.no_grad():
        model(input_ids=ids[:, :-1], **{name: cache})
        return model(input_ids=ids[:, -1:], **{name: cache}, **options)


def test_a_hook_on_a_layer_sees_what_the_layer_computed(model, computed):
    ids, n_layers = prompts(1), model.config.text_config.num_hidden_layers
    expected = decode(model, ids).logits
    seen = []
    layers = model.model.language_model.layers
    handles = [layer.register_forward_hook(lambda *each: seen.append(each[2].clone())) for layer in layers]
    try:
        found = decode(model, ids).logits
    finally:
        for handle in handles:
            handle.remove()
    assert computed == list(range(n_layers)) * 2  # each for itself the second time
    assert torch.equal(found, expected)
    assert len({each[0, -1, 0].item() for each in seen[n_layers:]}) == n_layers


def test_hidden_states_of_each_layer_are_its_own(model, computed):
    ids = prompts(1)
    states = decode(model, ids, output_hidden_states=True).hidden_states
    assert len({state[0, -1, 0].item() for state in states}) == len(states)
    logits = decode(model, ids, output_hidden_states=True).logits
    computed.clear()
    assert torch.allclose(decode(model, ids).logits, logits, atol=0.1 * float(logits.std()))
    assert computed  # what transformers installed to collect them is still there, and looks on


def test_a_changed_part_is_used(model, computed):
    ids, mlp = prompts(1), model.model.language_model.layers[2].mlp
    expected, part = decode(model, ids).logits, mlp.down_proj
    mlp.down_proj = torch.nn.Sequential(part)
    computed.clear()
    try:
        assert torch.allclose(decode(model, ids).logits, expected, atol=0.1 * float(expected.std()))
        assert computed
        assert 2 not in computed
    finally:
        mlp.down_proj = part
    assert torch.equal(decode(model, ids).logits, expected)


def test_a_norm_that_was_written_to_is_used(model):
    ids, norm = prompts(1), model.model.language_model.layers[1].input_layernorm
    expected = decode(model, ids).logits
    before = norm.weight.detach().clone()
    try:
        with torch.no_grad():
            norm.weight.mul_(2)
        assert not torch.equal(decode(model, ids).logits, expected)
    finally:
        with torch.no_grad():
            norm.weight.copy_(before)
    assert torch.equal(decode(model, ids).logits, expected)


def test_layers_above_memory_are_computed_for_themselves(tmp_path, computed):
    settings = {"codec": "int8_rotated", "cache_dir": tmp_path, "tensor_budget": 1_800_000}
    with create_optimized_model(tiny.DIRECTORY, settings, dtype=torch.float32) as small:
        ids = prompts(1)
        found = [decode(small, ids).logits for _ in range(3)]
    assert torch.equal(found[0], found[1])
    with create_optimized_model(tiny.DIRECTORY, {**settings, "tensor_budget": None}, dtype=torch.float32) as whole:
        assert torch.allclose(decode(whole, ids).logits, found[0], atol=0.02 * float(found[0].std()))
