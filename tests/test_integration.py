"""`OptimizedVisionLanguageModel` and its parts beside the classes of transformers."""

from __future__ import annotations

import gc
import json
import shutil

import pytest
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLTextModel, Qwen3VLVisionModel

from qwen3_vl_memory_optimizations import (
    CheckpointError,
    ConfigurationError,
    ManagedTensor,
    MemoryConfig,
    MemoryOptimizer,
    OptimizedTextDecoder,
    OptimizedVisionEncoder,
    OptimizedVisionLanguageModel,
    create_optimized_model,
)

from .model import tiny

THIRD_BYTES = 3_600_000  # of the 10.8 MB that the weights take


@pytest.fixture
def settings(tmp_path):
    return {"codec": "none", "tensor_budget": THIRD_BYTES, "cache_dir": tmp_path / "cache"}


@pytest.fixture
def optimizer(settings):
    with MemoryOptimizer(memory_config=settings) as optimizer:
        yield optimizer


@pytest.fixture
def config():
    return Qwen3VLConfig.from_pretrained(tiny.DIRECTORY)


@pytest.fixture
def carrying(tmp_path):
    """A copy of the tiny checkpoint whose `config.json` has settings."""
    copy = tmp_path / "carrying"
    shutil.copytree(tiny.DIRECTORY, copy)
    values = json.loads((copy / "config.json").read_text())
    values["memory_optimization_config"] = {"codec": "none", "tensor_budget": "3.6MB"}
    (copy / "config.json").write_text(json.dumps(values))
    return copy


def generated(model, inputs):
    return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)


def within_budget(optimizer):
    """Whether the frames stayed below the budget, and pages had to move for it."""
    stats = optimizer.get_memory_efficiency_stats()
    return stats["budget"]["frames_peak_bytes"] <= THIRD_BYTES and stats["paging"]["faults"] > 0


def same_outputs(mine, reference):
    assert torch.equal(mine.last_hidden_state, reference.last_hidden_state)
    for name in ("pooler_output", "deepstack_features", "hidden_states"):
        values = reference.get(name)
        values = [values] if isinstance(values, torch.Tensor) else values or []
        other = mine.get(name)
        other = [other] if isinstance(other, torch.Tensor) else other or []
        assert len(values) == len(other) and all(map(torch.equal, other, values)), name


@torch.no_grad()
@pytest.mark.parametrize("case", list(tiny.cases()))
def test_a_checkpoint_gives_what_transformers_gives(settings, case):
    model = OptimizedVisionLanguageModel.from_pretrained(tiny.DIRECTORY, settings)
    assert type(model) is OptimizedVisionLanguageModel and isinstance(model, Qwen3VLForConditionalGeneration)
    inputs, reference = tiny.cases()[case], tiny.reference()
    labels = inputs["input_ids"]
    for _ in range(2):
        mine = model(**inputs, labels=labels, output_hidden_states=True)
        other = reference(**inputs, labels=labels, output_hidden_states=True)
        assert torch.equal(mine.logits, other.logits) and torch.equal(mine.loss, other.loss)
        assert all(map(torch.equal, mine.hidden_states, other.hidden_states))
    assert torch.equal(generated(model, inputs), generated(reference, inputs))
    assert within_budget(model.memory_optimizer)
    model.memory_optimizer.close()


@torch.no_grad()
def test_the_parts_of_a_model_are_those_in_its_path(settings):
    model = OptimizedVisionLanguageModel.from_pretrained(tiny.DIRECTORY, settings)
    assert model.encoder is model.model.visual and type(model.encoder) is OptimizedVisionEncoder
    assert model.decoder is model.model.language_model and type(model.decoder) is OptimizedTextDecoder
    assert model.encoder.memory_optimizer is model.decoder.memory_optimizer is model.memory_optimizer
    assert model.lm_head.weight is model.decoder.embed_tokens.weight
    assert isinstance(model.encoder.blocks[0].attn.qkv.weight, ManagedTensor)
    inputs, reference = tiny.cases()["two images"], tiny.reference().model
    features = model.encoder(inputs["pixel_values"], inputs["image_grid_thw"])
    same_outputs(features, reference.visual(inputs["pixel_values"], inputs["image_grid_thw"]))
    assert model.memory_optimizer.migrate_for_compute(features.pooler_output) is features.pooler_output
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    text = {"attention_mask": mask, "output_hidden_states": True}
    same_outputs(model.decoder(ids, **text), reference.language_model(ids, **text))
    model.memory_optimizer.close()


@torch.no_grad()
def test_a_configuration_gives_drawn_weights_within_its_budget(config, settings):
    config.memory_optimization_config = settings
    torch.manual_seed(3)
    model = OptimizedVisionLanguageModel(config)
    assert model.memory_optimizer.config == MemoryConfig.from_mapping(settings)
    assert not any(parameter.is_meta for parameter in model.parameters()) and not model.training
    assert type(model.encoder) is OptimizedVisionEncoder and type(model.decoder) is OptimizedTextDecoder
    plain = Qwen3VLForConditionalGeneration(config).eval()
    plain.load_state_dict(model.state_dict())
    inputs = tiny.cases()["image"]
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(
        model(**inputs, labels=inputs["input_ids"]).loss, plain(**inputs, labels=inputs["input_ids"]).loss
    )
    assert torch.equal(generated(model, inputs), generated(plain, inputs))
    assert within_budget(model.memory_optimizer)
    model.memory_optimizer.close()


def test_weights_are_drawn_with_the_deviation_of_their_own_part(config, settings):
    config.memory_optimization_config = settings | {"tensor_budget": None}
    config.vision_config.initializer_range, config.text_config.initializer_range = 0.5, 0.02
    model = OptimizedVisionLanguageModel(config)
    assert model.encoder.blocks[0].mlp.linear_fc1.weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert model.decoder.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(model.decoder.norm.weight, torch.ones(128))
    model.memory_optimizer.close()


@torch.no_grad()
@pytest.mark.parametrize("whole", [True, False])
def test_an_encoder_by_itself_agrees_with_the_vision_tower(config, optimizer, whole):
    encoder = OptimizedVisionEncoder(config if whole else config.vision_config, optimizer)
    assert isinstance(encoder, Qwen3VLVisionModel) and encoder.memory_optimizer is optimizer
    inputs, reference = tiny.cases()["two images"], tiny.reference().model.visual
    drawn = Qwen3VLVisionModel(config.vision_config).eval()
    drawn.load_state_dict(encoder.state_dict())
    arguments = (inputs["pixel_values"], inputs["image_grid_thw"])
    same_outputs(encoder(*arguments), drawn(*arguments))
    encoder.load_state_dict(reference.state_dict())
    same_outputs(encoder(*arguments), reference(*arguments))


@torch.no_grad()
@pytest.mark.parametrize("whole", [True, False])
def test_a_decoder_by_itself_agrees_with_the_language_model(config, settings, whole):
    optimizer = MemoryOptimizer(memory_config=settings | {"tensor_budget": THIRD_BYTES // 3})
    decoder = OptimizedTextDecoder(config if whole else config.text_config, optimizer)
    assert isinstance(decoder, Qwen3VLTextModel) and decoder.memory_optimizer is optimizer
    inputs, reference = tiny.cases()["left-padded batch"], tiny.reference().model.language_model
    decoder.load_state_dict(reference.state_dict())
    text = {"attention_mask": inputs["attention_mask"], "output_hidden_states": True}
    same_outputs(decoder(inputs["input_ids"], **text), reference(inputs["input_ids"], **text))
    assert within_budget(optimizer)
    optimizer.close()


@torch.no_grad()
def test_parts_share_an_optimizer_and_return_their_memory(config, optimizer):
    inputs = tiny.cases()["image"]
    arguments = (inputs["pixel_values"], inputs["image_grid_thw"])
    parts = [OptimizedVisionEncoder(config, optimizer) for _ in range(2)]
    first, second = (part(*arguments).pooler_output for part in parts)
    assert not torch.equal(first, second)  # each has its own weights
    OptimizedTextDecoder(config, optimizer)(inputs["input_ids"])
    del parts
    gc.collect()
    assert optimizer.pager.usage() == []


@torch.no_grad()
def test_a_part_by_itself_reserves_memory_before_it_runs(config, tmp_path):
    with MemoryOptimizer(memory_config={"ram_budget": "4GB", "cache_dir": tmp_path}) as optimizer:
        held = optimizer.pager.ledger.held_bytes
        inputs = tiny.cases()["image"]
        for kind, arguments in (
            (OptimizedVisionEncoder, (inputs["pixel_values"], inputs["image_grid_thw"])),
            (OptimizedTextDecoder, (inputs["input_ids"],)),
        ):
            part = kind(config, optimizer)
            optimizer.reserve_activations(0)
            part(*arguments)
            assert held("activations") > 0


@torch.no_grad()
def test_settings_in_a_checkpoint_are_read(carrying, tmp_path):
    for model in (create_optimized_model(carrying), OptimizedVisionLanguageModel.from_pretrained(str(carrying))):
        assert model.memory_optimizer.config == MemoryConfig(codec="none", tensor_budget=THIRD_BYTES)
        model.memory_optimizer.close()
    model = create_optimized_model(carrying, {"codec": "none", "cache_dir": tmp_path})
    assert model.memory_optimizer.config.tensor_budget is None  # those that are given count, and no others
    model.memory_optimizer.close()


def test_settings_of_a_model_are_read(config, settings):
    config.memory_optimization_config = MemoryConfig.from_mapping(settings)
    loaded = Qwen3VLForConditionalGeneration(config)
    for given in (config, loaded):
        with create_optimized_model(given).memory_optimizer as optimizer:
            assert optimizer.config == MemoryConfig.from_mapping(settings)


@pytest.mark.parametrize("form", [dict, MemoryConfig.from_mapping])
def test_a_configuration_with_settings_can_be_saved(config, settings, form, tmp_path):
    config.memory_optimization_config = form(settings)
    model = OptimizedVisionLanguageModel(config)
    model.config.save_pretrained(tmp_path / "saved")
    saved = Qwen3VLConfig.from_pretrained(tmp_path / "saved").memory_optimization_config
    assert MemoryConfig.from_mapping(saved) == model.memory_optimizer.config == MemoryConfig.from_mapping(settings)
    model.memory_optimizer.close()


@torch.no_grad()
def test_a_saved_model_is_one_of_transformers(settings, tmp_path):
    model = OptimizedVisionLanguageModel.from_pretrained(tiny.DIRECTORY, settings)
    model.save_pretrained(tmp_path / "saved", max_shard_size="1MB")  # a shard is in memory while it is written
    model.memory_optimizer.close()
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == [
        "Qwen3VLForConditionalGeneration"
    ]
    inputs = tiny.cases()["image"]
    again = OptimizedVisionLanguageModel.from_pretrained(tmp_path / "saved", settings)
    assert torch.equal(again(**inputs).logits, tiny.reference()(**inputs).logits)
    again.memory_optimizer.close()


def test_an_unknown_setting_is_named(config, carrying):
    config.memory_optimization_config = {"enable_tierring": True}
    with pytest.raises(ConfigurationError, match="'enable_tierring'.*'enable_tiering'"):
        OptimizedVisionLanguageModel(config)
    values = json.loads((carrying / "config.json").read_text()) | {"memory_optimization_config": {"ram": 1}}
    (carrying / "config.json").write_text(json.dumps(values))
    for make in (create_optimized_model, OptimizedVisionLanguageModel.from_pretrained):
        with pytest.raises(ConfigurationError, match="'ram'"):
            make(carrying)


def test_what_cannot_work_is_refused(config, carrying, optimizer):
    with pytest.raises(ConfigurationError, match="Qwen3VLConfig, got dict"):
        OptimizedVisionLanguageModel({"codec": "none"})
    with pytest.raises(ConfigurationError, match="MemoryOptimizer, got dict"):
        OptimizedVisionEncoder(config, {})
    (carrying / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}')
    with pytest.raises(CheckpointError, match="Qwen3ForCausalLM; OptimizedVisionLanguageModel is not"):
        OptimizedVisionLanguageModel.from_pretrained(carrying)
    assert torch.get_default_dtype() == torch.float32
