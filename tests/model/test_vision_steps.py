"""The vision tower in steps of rows gives the same bits, from less memory, and reads no weight again."""

from __future__ import annotations

import copy

import pytest
import torch

from qwen3_vl_memory_optimizations import create_optimized_model
from qwen3_vl_memory_optimizations.model.layers import vision_block as vision_steps
from qwen3_vl_memory_optimizations.native import Core, core
from qwen3_vl_memory_optimizations.paging import products
from tests.paging.weights import settle

from . import tiny

STEP_ROWS = 64
WEIGHTS_BYTES = 10_800_000


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(vision_steps, "STEP_ROWS", STEP_ROWS)


@pytest.fixture
def load(tmp_path):
    models = []

    def load(dtype=torch.float32, **settings):
        settings = {"codec": "none", "enable_cache_hierarchy": False, "cache_dir": tmp_path, **settings}
        models.append(create_optimized_model(tiny.DIRECTORY, settings, dtype=dtype))
        return models[-1]

    yield load
    for model in models:
        model.memory_optimizer.close()


def eight_images():
    images, _, questions, _ = tiny.heldout()
    return tiny.batch([tiny.prompt(questions[0], n_images=8)], images[:8])


def encode(model, inputs):
    """Return all that the tower gives for the images."""
    tower = model.model.visual
    found = tower(inputs["pixel_values"].to(tower.dtype), inputs["image_grid_thw"])
    return [found.pooler_output, found.last_hidden_state, *found.deepstack_features]


@pytest.fixture
def widest_rows(monkeypatch):
    """A list that grows by the rows that each activation of an MLP of the tower gets."""
    rows = []
    kind = type(tiny.reference().model.visual.blocks[0].mlp.act_fn)
    plain = kind.forward

    def forward(self, x):
        rows.append(x.shape[0])
        return plain(self, x)

    monkeypatch.setattr(kind, "forward", forward)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [None, WEIGHTS_BYTES // 3], ids=["no budget", "a third of the weights"])
@torch.no_grad()
def test_steps_give_the_same_bits(load, dtype, budget, monkeypatch, widest_rows):
    model, inputs = load(dtype=dtype, tensor_budget=budget), eight_images()
    found = encode(model, inputs)
    blocks = len(model.model.visual.blocks)
    assert widest_rows == [STEP_ROWS] * (8 * blocks)
    monkeypatch.setattr(vision_steps, "STEP_ROWS", 1 << 30)
    for part, whole in zip(found, encode(model, inputs), strict=True):
        assert torch.equal(part, whole)


@torch.no_grad()
def test_they_are_the_bits_of_transformers(load):
    model, inputs = load(), eight_images()
    for part, whole in zip(encode(model, inputs), encode(tiny.reference(), inputs), strict=True):
        assert torch.equal(part, whole)


@torch.no_grad()
def test_where_weights_have_no_room_together_steps_are_taken_all_the_same(load, monkeypatch, widest_rows):
    model, inputs = load(tensor_budget=WEIGHTS_BYTES // 3), eight_images()
    monkeypatch.setattr(products, "_WHOLE_SHARE", 1 << 20)
    found = encode(model, inputs)
    assert set(widest_rows) == {STEP_ROWS}
    for part, whole in zip(found, encode(tiny.reference(), inputs), strict=True):
        assert torch.equal(part, whole)


@torch.no_grad()
def test_several_images_attend_to_themselves_alone(load):
    model = load()
    images, _, questions, _ = tiny.heldout()
    inputs = tiny.batch([tiny.prompt(questions[0], n_images=4)], images[:4])
    pixels = inputs["pixel_values"]
    inputs["image_grid_thw"] = torch.tensor([[1, 8, 8], [1, 4, 16], [2, 8, 8]])
    for part, whole in zip(encode(model, inputs), encode(tiny.reference(), inputs), strict=True):
        assert torch.equal(part, whole)
    assert len(pixels) == 256


@torch.no_grad()
def test_weights_are_read_once_a_pass(load, monkeypatch):
    model, inputs = load(tensor_budget=WEIGHTS_BYTES // 3), eight_images()
    stats = model.memory_optimizer.pager.stats

    def bytes_of_a_pass():
        before = stats.bytes_read
        model(**inputs)
        settle(model.memory_optimizer.pager)
        return stats.bytes_read - before

    for _ in range(2):
        bytes_of_a_pass()
    in_steps = bytes_of_a_pass()
    monkeypatch.setattr(vision_steps, "STEP_ROWS", 1 << 30)
    bytes_of_a_pass()
    assert in_steps <= 1.1 * bytes_of_a_pass()


@torch.no_grad()
def test_a_part_with_hooks_runs_as_it_was_written(load, widest_rows):
    model, inputs = load(), eight_images()
    seen = []
    block = model.model.visual.blocks[0]
    block.mlp.linear_fc1.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    block.attn.qkv.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    expected = encode(tiny.reference(), inputs)
    widest_rows.clear()
    for part, whole in zip(encode(model, inputs), expected, strict=True):
        assert torch.equal(part, whole)
    assert [shape[0] for shape in seen] == [512, 512]
    assert widest_rows[0] == 512 and set(widest_rows[1:]) == {STEP_ROWS}


class Shifted(torch.nn.Module):
    """What an adapter does: another module in the place of a layer, with the layer inside and its weight handed out."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    @property
    def weight(self):
        return self.layer.weight

    @property
    def bias(self):
        return self.layer.bias

    def forward(self, x):
        return self.layer(x) + 0.5


@pytest.mark.parametrize(
    "owner, name", [("mlp", "linear_fc1"), ("mlp", "linear_fc2"), ("attn", "qkv"), ("attn", "proj")]
)
@torch.no_grad()
def test_a_layer_that_was_replaced_is_the_one_that_computes(load, monkeypatch, owner, name):
    model, inputs, reference = load(), eight_images(), copy.deepcopy(tiny.reference())
    plain = encode(reference, inputs)
    for each in (model, reference):
        part = getattr(each.model.visual.blocks[1], owner)
        setattr(part, name, Shifted(getattr(part, name)))
    expected = encode(reference, inputs)
    assert not torch.equal(expected[0], plain[0])
    for part, whole in zip(encode(model, inputs), expected, strict=True):
        assert torch.equal(part, whole)


@torch.no_grad()
def test_a_forward_that_somebody_replaced_before_stays(tmp_path):
    given = copy.deepcopy(tiny.reference())
    calls = []
    mlp = given.model.visual.blocks[0].mlp
    mlp.forward = lambda x: (calls.append(len(x)), type(mlp).forward(mlp, x))[1]
    inputs = eight_images()
    model = create_optimized_model(given, {"codec": "none", "enable_cache_hierarchy": False, "cache_dir": tmp_path})
    try:
        encode(model, inputs)
        assert calls == [512]
    finally:
        model.memory_optimizer.close()


@pytest.mark.skipif(core() is None, reason="the native core is not built")
@pytest.mark.parametrize(("codec", "used"), [("int8_rotated", True), ("none", False)])
@torch.no_grad()
def test_attention_is_computed_in_integers_where_weights_are(load, monkeypatch, codec, used):
    model, inputs = load(codec=codec), eight_images()
    calls, attend_all = [], Core.attend_all

    def counted(self, heads, scale):
        calls.append(len(heads))
        return attend_all(self, heads, scale)

    monkeypatch.setattr(Core, "attend_all", counted)
    found = encode(model, inputs)
    assert bool(calls) == used
    monkeypatch.setattr(vision_steps, "_native_core", lambda *_: None)
    for part, expected in zip(found, encode(model, inputs), strict=True):
        assert (part - expected).norm() <= 4e-3 * expected.norm()
