"""Any of the six systems may be off: the answers stay right in all 64 combinations."""

from __future__ import annotations

import itertools

import pytest
import torch

from qwen3_vl_memory_optimizations import create_optimized_model

from .model import tiny

FLAGS = (
    "enable_memory_pooling",
    "enable_cache_hierarchy",
    "enable_compression",
    "enable_swapping",
    "enable_tiering",
    "enable_predictive_gc",
)
ASKED = ("image", "text")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def expected():
    return {name: answer(tiny.reference(), name) for name in ASKED}


def answer(model, name):
    with torch.no_grad():
        return model.generate(**tiny.cases()[name], max_new_tokens=5, min_new_tokens=5, do_sample=False)


@pytest.mark.parametrize(
    "values", list(itertools.product((True, False), repeat=6)), ids=lambda v: "".join("01"[x] for x in v)
)
def test_answers_are_those_of_the_original(values, cache_dir, expected):
    settings = dict(zip(FLAGS, values, strict=True)) | {"tensor_budget": 6_000_000, "cache_dir": cache_dir}
    model = create_optimized_model(tiny.DIRECTORY, settings)
    try:
        for name in (*ASKED, ASKED[0]):
            assert torch.equal(answer(model, name), expected[name]), name
    finally:
        model.memory_optimizer.close()
