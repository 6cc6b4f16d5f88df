"""Calls of `generate` as people write them."""

from __future__ import annotations

import pytest
import torch

from qwen3_vl_memory_optimizations import create_optimized_model

from ..model import tiny

IDS = torch.randint(7, 60, (1, 90), generator=torch.Generator().manual_seed(5))
OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache")
    model = create_optimized_model(
        tiny.DIRECTORY, {"codec": "none", "prefix_reuse": "on", "cache_dir": directory}, dtype=torch.float32
    )
    yield model
    model.memory_optimizer.close()


def positions(model):
    return {"input_ids": IDS, "position_ids": torch.arange(IDS.shape[1]).view(1, 1, -1).expand(4, 1, -1)}


def embeds(model):
    return {"input_ids": IDS, "inputs_embeds": model.get_input_embeddings()(IDS)}


def embeds_alone(model):
    return {"inputs_embeds": model.get_input_embeddings()(IDS)}


@pytest.mark.parametrize("arguments", [positions, embeds, embeds_alone], ids=lambda each: each.__name__)
def test_tensors_beside_the_prompt(model, arguments):
    expected = tiny.reference().generate(**arguments(tiny.reference()), **OPTIONS)
    for _ in range(2):
        assert torch.equal(model.generate(**arguments(model), **OPTIONS), expected)


def test_an_optimised_model_as_a_draft(model, tmp_path):
    draft = create_optimized_model(tiny.DIRECTORY, {"codec": "int8", "cache_dir": tmp_path}, dtype=torch.float32)
    expected = tiny.reference().generate(input_ids=IDS, **OPTIONS)
    assert torch.equal(model.generate(input_ids=IDS, assistant_model=draft, **OPTIONS), expected)
    assert torch.equal(model.generate(input_ids=IDS, **OPTIONS), expected)
    draft.memory_optimizer.close()
