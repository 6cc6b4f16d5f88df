"""A model packed in INT4: what goes into it, that it runs within a budget, and what it costs."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from qwen3_vl_memory_optimizations import ConfigurationError, create_optimized_model
from qwen3_vl_memory_optimizations.compression import codec_names, create_codec
from qwen3_vl_memory_optimizations.compression.registry import _FACTORIES, register_codec
from qwen3_vl_memory_optimizations.model.checkpoint import skeleton
from qwen3_vl_memory_optimizations.model.checkpoint.packing import CODECS_KEY, pack_checkpoint
from qwen3_vl_memory_optimizations.native import core
from qwen3_vl_memory_optimizations.storage import Checkpoint

from . import tiny

ENCODED_BYTES = 1_491_456


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def load(cache_dir, **settings):
    return create_optimized_model(tiny.DIRECTORY, {"codec": "int4", "cache_dir": cache_dir, **settings})


@torch.no_grad()
def test_agreement_accuracy_and_bytes(cache_dir):
    model = load(cache_dir, tensor_budget=ENCODED_BYTES // 2)
    images, tasks, questions, answers = tiny.heldout()
    chosen = [index for index, task in enumerate(tasks) if task != "digits"][::2]
    agreeing = tokens = right = right_before = 0
    for start in range(0, len(chosen), 50):
        rows = chosen[start : start + 50]
        inputs = tiny.batch([tiny.prompt(questions[row]) for row in rows], images[rows])
        expected, found = tiny.reference()(**inputs).logits.argmax(-1), model(**inputs).logits.argmax(-1)
        real = inputs["attention_mask"].bool()
        agreeing, tokens = agreeing + int((expected == found)[real].sum()), tokens + int(real.sum())
        wanted = torch.tensor([tiny.ids_of(answers[row])[0] for row in rows])
        right, right_before = (
            right + int((found[:, -1] == wanted).sum()),
            right_before + int((expected[:, -1] == wanted).sum()),
        )
    print(f"top-1 agreement {agreeing / tokens:.4f} of {tokens}; right {right}, before {right_before} of {len(chosen)}")
    assert agreeing / tokens >= 0.9
    assert abs(right - right_before) / len(chosen) <= 0.03
    stats = model.memory_optimizer.get_memory_efficiency_stats()
    encoded = {name: use["encoded_bytes"] for name, use in stats["codecs"].items()}
    assert encoded == {"int4": 1_474_560, "int8": ENCODED_BYTES - 1_474_560}
    assert encoded["int4"] == stats["codecs"]["int4"]["logical_bytes"] / 4 * 4.5 / 8
    assert stats["paging"]["bytes_read"] > ENCODED_BYTES  # it did not fit, and came again
    model.memory_optimizer.close()


@torch.no_grad()
def test_weights_in_several_pages_give_the_same(cache_dir, tmp_path, monkeypatch):
    inputs = tiny.cases()["image"]
    model = load(cache_dir)
    expected, ids = model(**inputs).logits, model.generate(**inputs, max_new_tokens=8, do_sample=False)
    model.memory_optimizer.close()
    monkeypatch.setattr(skeleton, "PAGE_BYTES", 10_000)
    # Without the native core decoded rows are held too.
    cut = load(tmp_path, tensor_budget=ENCODED_BYTES // 2 if core() else ENCODED_BYTES)
    pages = {name: len(entry.pages) for name, entry in cut.memory_optimizer.pager.entries.items()}
    assert pages["model.language_model.layers.0.mlp.up_proj.weight"] > 2
    for _ in range(3):
        assert torch.equal(cut(**inputs).logits, expected)
    assert torch.equal(cut.generate(**inputs, max_new_tokens=8, do_sample=False), ids)
    cut.memory_optimizer.close()


def test_the_vocabulary_is_kept_in_int8_and_the_format_is_recorded(cache_dir):
    packed = Checkpoint.open(pack_checkpoint(tiny.DIRECTORY, codec="int4", config=config(cache_dir)))
    codecs = json.loads(packed.metadata[CODECS_KEY])
    stored = create_codec("int4").stored_name
    assert packed.directory.name.endswith(f"-{stored}")
    assert {name for name, codec in codecs.items() if codec == "int8"} == {
        "model.language_model.embed_tokens.weight",
        "model.visual.pos_embed.weight",
    }
    assert set(codecs.values()) == {"int8", stored}


def config(cache_dir):
    from qwen3_vl_memory_optimizations.config import MemoryConfig

    return MemoryConfig(cache_dir=cache_dir)


@torch.no_grad()
def test_a_loaded_model_is_taken_over_and_its_weights_can_be_read(tmp_path):
    from transformers import Qwen3VLForConditionalGeneration

    loaded = Qwen3VLForConditionalGeneration.from_pretrained(tiny.DIRECTORY, dtype=torch.float32).eval()
    original = loaded.model.language_model.layers[0].mlp.up_proj.weight.detach().clone()
    model = create_optimized_model(loaded, {"codec": "int4", "cache_dir": tmp_path})
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    assert (weight.codec, weight.shape) == ("int4", original.shape)
    values = weight * 1
    assert float((values - original).norm() / original.norm()) < 0.15
    rows = torch.tensor([[3, 3], [0, 200]])
    assert torch.equal(F.embedding(rows, weight), values[rows])
    model.memory_optimizer.close()


def test_a_registered_codec_is_a_setting_at_once(tmp_path):
    class Mine(type(create_codec("none"))):
        name = "mine"

    with pytest.raises(ConfigurationError, match=r"codec: 'mine' is not one of auto, .*int8.*did you mean"):
        load(tmp_path, codec="mine")
    assert not any(tmp_path.iterdir())
    register_codec("mine", Mine)
    try:
        assert "mine" in codec_names()
        with load(tmp_path, codec="mine").memory_optimizer as optimizer:
            assert {use.codec for use in optimizer.pager.usage()} == {"mine"}
    finally:
        del _FACTORIES["mine"]
