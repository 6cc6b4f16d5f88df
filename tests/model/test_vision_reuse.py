"""An image that was seen before is not encoded again, and nothing else changes."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_vl_memory_optimizations import create_optimized_model

from . import tiny

CASES = ("image", "two images", "video", "left-padded batch")


@pytest.fixture
def fresh(tmp_path):
    """Make models on one cache directory, and close them."""
    models = []

    def fresh(directory=tiny.DIRECTORY, **settings):
        model = create_optimized_model(directory, {"codec": "none", "cache_dir": tmp_path / "cache", **settings})
        models.append(model)
        model.encoded_patches = []
        model.model.visual.register_forward_pre_hook(
            tiny.observing(
                lambda module, args, kwargs: model.encoded_patches.append(
                    int((args[0] if args else kwargs["hidden_states"]).shape[0])
                )
            ),
            with_kwargs=True,
        )
        return model

    yield fresh
    for model in models:
        model.memory_optimizer.close()


def stats_of(model):
    return model.memory_optimizer.get_memory_efficiency_stats()["cache"]


def answer(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=8, min_new_tokens=4, do_sample=False, **options)


def logits(model, inputs):
    """The logits of the first token that `generate` computes."""
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**inputs, **options).logits[0]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_second_time_no_image_is_encoded_and_the_logits_are_the_same_bits(fresh, case):
    model, inputs = fresh(), tiny.cases()[case]
    first = logits(model, inputs)
    assert torch.equal(first, logits(tiny.reference(), inputs))
    encoded = sum(model.encoded_patches)
    assert encoded == sum(inputs[name].shape[0] for name in inputs if name.startswith("pixel_values"))
    assert torch.equal(logits(model, inputs), first)
    assert sum(model.encoded_patches) == encoded
    assert stats_of(model)["levels"]["cpu"]["hits"] == encoded // 64


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_after_a_restart_the_features_come_from_the_ssd(fresh, case):
    inputs = tiny.cases()[case]
    before = fresh()
    first = logits(before, inputs)
    before.memory_optimizer.close()
    model = fresh()
    model.memory_optimizer.cache.l3_cache._measured_bytes_per_s = 1e12  # the tiny tower is faster than any disk
    assert torch.equal(logits(model, inputs), first)
    assert model.encoded_patches == []
    assert stats_of(model)["levels"]["ssd"]["hits"] == sum(
        len(grids) for name, grids in inputs.items() if name.endswith("grid_thw")
    )


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@torch.no_grad()
def test_generate_uses_them_too(fresh, options):
    model, inputs = fresh(), tiny.cases()["two images"]
    first = answer(model, inputs, **options)
    assert torch.equal(first, answer(tiny.reference(), inputs, **options))
    encoded = list(model.encoded_patches)
    assert torch.equal(answer(model, inputs, **options), first)
    assert model.encoded_patches == encoded


@torch.no_grad()
def test_outside_generate_the_whole_output_of_the_tower_is_there(fresh):
    """`image_outputs` has the states of the patches, which are not kept."""
    model, inputs = fresh(), tiny.cases()["image"]
    first = model(**inputs)
    answer(model, inputs)
    encoded = len(model.encoded_patches)
    again = model(**inputs)
    assert torch.equal(again.logits, first.logits)
    assert len(again.image_outputs.to_tuple()) == len(first.image_outputs.to_tuple())
    assert torch.equal(again.image_outputs.last_hidden_state, first.image_outputs.last_hidden_state)
    model.config.return_dict = False
    images = {"pixel_values": inputs["pixel_values"], "image_grid_thw": inputs["image_grid_thw"]}
    assert isinstance(model.get_image_features(**images), tuple)
    model.config.return_dict = True
    assert len(model.encoded_patches) == encoded + 2


@torch.no_grad()
def test_the_image_in_another_conversation_is_found_and_only_new_ones_are_encoded(fresh):
    model = fresh()
    images, _, questions, _ = tiny.heldout()
    logits(model, tiny.batch([tiny.prompt(questions[0])], images[:1]))
    two = tiny.batch([tiny.prompt(questions[1], n_images=2)], images[:2])
    found = logits(model, two)
    assert model.encoded_patches == [64, 64]
    expected = logits(tiny.reference(), two)
    assert torch.allclose(found, expected, atol=1e-4), (found - expected).abs().max()


@torch.no_grad()
def test_one_image_twice_in_a_call_is_encoded_once(fresh):
    model = fresh()
    images, _, questions, _ = tiny.heldout()
    twice = tiny.batch([tiny.prompt(questions[1], n_images=2)], images[[3, 3]])
    expected = logits(tiny.reference(), twice)
    for _ in range(2):
        found = logits(model, twice)
        assert torch.allclose(found, expected, atol=1e-4), (found - expected).abs().max()
    assert model.encoded_patches == [64]


@torch.no_grad()
def test_the_same_checkpoint_packed_by_another_plan_finds_nothing(fresh, tmp_path):
    inputs = tiny.cases()["image"]
    before = fresh(codec="auto")
    logits(before, inputs)
    before.memory_optimizer.close()
    (path,) = (tmp_path / "cache" / "packed").glob("*.plan.json")
    plan = path.read_text()
    assert '"codec": "int8_rotated"' in plan
    path.write_text(plan.replace('"codec": "int8_rotated"', '"codec": "fp16"'))
    model = fresh(codec="auto")
    logits(model, inputs)
    assert model.encoded_patches == [64]


@torch.no_grad()
def test_a_changed_pixel_is_another_image(fresh):
    model, inputs = fresh(), tiny.cases()["image"]
    logits(model, inputs)
    pixels = inputs["pixel_values"].clone()
    pixels[17, 100] += 2**-8
    changed = {**inputs, "pixel_values": pixels}
    assert torch.equal(logits(model, changed), logits(tiny.reference(), changed))
    assert model.encoded_patches == [64, 64]


@torch.no_grad()
def test_the_same_pixels_in_another_grid_are_another_image(fresh):
    model, inputs = fresh(), tiny.cases()["image"]
    logits(model, inputs)
    changed = {**inputs, "image_grid_thw": torch.tensor([[1, 4, 16]])}
    assert torch.equal(logits(model, changed), logits(tiny.reference(), changed))
    assert model.encoded_patches == [64, 64]


@torch.no_grad()
def test_another_model_finds_nothing(fresh, tmp_path):
    inputs = tiny.cases()["image"]
    model = fresh()
    logits(model, inputs)
    model.memory_optimizer.close()
    other_directory = tmp_path / "other"
    shutil.copytree(tiny.DIRECTORY, other_directory)
    weights = load_file(tiny.DIRECTORY / "model.safetensors")
    weights["model.visual.merger.linear_fc2.bias"] += 0.1
    save_file(weights, other_directory / "model.safetensors", metadata={"format": "pt"})
    for directory, settings in ((other_directory, {}), (tiny.DIRECTORY, {"codec": "int8"})):
        other = fresh(directory, **settings)
        other.memory_optimizer.cache.l3_cache._measured_bytes_per_s = 1e12
        logits(other, inputs)
        assert other.encoded_patches == [64]


@torch.no_grad()
def test_changed_weights_find_nothing(fresh):
    model, inputs = fresh(), tiny.cases()["image"]
    logits(model, inputs)
    model.model.visual.blocks[1].norm1.weight.mul_(1.5)
    changed = logits(model, inputs)
    assert model.encoded_patches == [64, 64]
    reference = copy.deepcopy(tiny.reference())
    reference.model.visual.blocks[1].norm1.weight.mul_(1.5)
    assert torch.equal(changed, logits(reference, inputs))

    model.model.visual.blocks[0].mlp.linear_fc1.weight.mul_(0.5)  # a managed one
    reference.model.visual.blocks[0].mlp.linear_fc1.weight.mul_(0.5)
    assert torch.equal(logits(model, inputs), logits(reference, inputs))
    assert model.encoded_patches == [64, 64, 64]


@torch.no_grad()
def test_a_hook_that_changes_features_is_heeded(fresh):
    model, inputs = fresh(), tiny.cases()["image"]
    plain = logits(model, inputs)
    hook = model.model.visual.merger.register_forward_hook(lambda module, args, out: out * 2)
    assert not torch.equal(logits(model, inputs), plain)
    hook.remove()
    assert torch.equal(logits(model, inputs), plain)


@torch.no_grad()
def test_a_model_of_memory_reuses_in_memory_and_writes_nothing(tmp_path):
    model = create_optimized_model(copy.deepcopy(tiny.reference()), {"codec": "none", "cache_dir": tmp_path / "cache"})
    inputs = tiny.cases()["image"]
    first = logits(model, inputs)
    assert torch.equal(logits(model, inputs), first)
    assert stats_of(model)["levels"]["cpu"]["hits"] == 1
    model.memory_optimizer.close()
    assert not (tmp_path / "cache" / "reuse").exists()


@torch.no_grad()
def test_private_writes_nothing_and_reuses_in_memory(fresh, tmp_path):
    model, inputs = fresh(private=True), tiny.cases()["image"]
    first = logits(model, inputs)
    assert torch.equal(logits(model, inputs), first)
    assert model.encoded_patches == [64]
    model.memory_optimizer.close()
    assert not (tmp_path / "cache" / "reuse").exists()


@torch.no_grad()
def test_switched_off_every_image_is_encoded(fresh):
    model, inputs = fresh(enable_cache_hierarchy=False), tiny.cases()["image"]
    for _ in range(2):
        logits(model, inputs)
    assert model.encoded_patches == [64, 64]
    assert stats_of(model) is None
    assert model.memory_optimizer.get_cache_hit_rate() is None


@torch.no_grad()
def test_hidden_states_are_those_of_the_tower(fresh):
    model, inputs = fresh(), tiny.cases()["image"]
    logits(model, inputs)
    images = {"pixel_values": inputs["pixel_values"], "image_grid_thw": inputs["image_grid_thw"]}
    found = model.get_image_features(**images, output_hidden_states=True)
    assert found.hidden_states is not None
    assert model.encoded_patches == [64, 64]


@torch.no_grad()
def test_what_is_handed_out_can_be_written_to(fresh):
    model, inputs = fresh(), tiny.cases()["image"]
    first = logits(model, inputs)
    images = {"pixel_values": inputs["pixel_values"], "image_grid_thw": inputs["image_grid_thw"]}
    for _ in range(2):
        model.get_image_features(**images).pooler_output[0].zero_()
    assert torch.equal(logits(model, inputs), first)


@torch.no_grad()
def test_features_of_the_wrong_shape_are_no_answer(fresh):
    from qwen3_vl_memory_optimizations.cache import CacheItem

    model, inputs = fresh(), tiny.cases()["image"]
    first = logits(model, inputs)
    cache = model.memory_optimizer.cache
    key = next(iter(cache.l2_cache._entries))
    cache.clear()
    cache.put(key, CacheItem({"pooled": torch.zeros(16, 128)}), saved_s=1.0)
    assert torch.equal(logits(model, inputs), first)
    assert model.encoded_patches == [64, 64]


@torch.no_grad()
def test_within_a_budget_that_weights_fill_nothing_is_taken_from_them(fresh):
    model, inputs = fresh(tensor_budget=3_600_000), tiny.cases()["image"]
    first = logits(model, inputs)
    assert torch.equal(logits(model, inputs), first)
    stats = model.memory_optimizer.get_memory_efficiency_stats()
    assert stats["cache"]["levels"]["cpu"]["used_bytes"] == 0
    assert stats["cache"]["levels"]["cpu"]["refused"] >= 1
    assert stats["budget"]["accounts_bytes"].get("cache", 0) == 0


@torch.no_grad()
def test_what_the_cache_holds_is_in_the_account_and_leaves_for_tensors(fresh):
    model, inputs = fresh(tensor_budget=14_000_000), tiny.cases()["image"]
    logits(model, inputs)
    optimizer = model.memory_optimizer
    stats = optimizer.get_memory_efficiency_stats()
    held = stats["cache"]["levels"]["cpu"]["used_bytes"]
    assert held == stats["budget"]["accounts_bytes"]["cache"] == 4 * 16 * 128 * 4
    spare = optimizer.pager.spare_bytes()
    tensor = optimizer.allocate_tensor((spare + 4096,), torch.uint8)
    assert optimizer.get_memory_efficiency_stats()["budget"]["accounts_bytes"]["cache"] == 0
    assert optimizer.get_memory_efficiency_stats()["cache"]["levels"]["cpu"]["used_bytes"] == 0
    del tensor


@torch.no_grad()
def test_what_others_take_of_the_budget_leaves_the_cache_before_a_pass(fresh):
    model, inputs = fresh(tensor_budget=14_000_000), tiny.cases()["image"]
    first = logits(model, inputs)
    optimizer = model.memory_optimizer
    assert stats_of(model)["levels"]["cpu"]["used_bytes"] > 0
    optimizer.pager.ledger.add("others", optimizer.pager.spare_bytes() + 4096)
    assert torch.equal(logits(model, inputs), first)
    assert stats_of(model)["levels"]["cpu"]["used_bytes"] == 0
    assert optimizer.pager.spare_bytes() >= 0
