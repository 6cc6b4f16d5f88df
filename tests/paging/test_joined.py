"""Tensors that lie side by side are multiplied as one while all are in memory, and one by one otherwise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qwen3_vl_memory_optimizations import create_optimized_model
from qwen3_vl_memory_optimizations.paging import ManagedTensor, PageState, join, linear_joined

from ..model import tiny


@pytest.fixture(params=[None, 900_000], ids=["unlimited", "a third of the weights"])
def model(request, tmp_path):
    model = create_optimized_model(tiny.DIRECTORY, {"cache_dir": tmp_path, "tensor_budget": request.param})
    yield model
    model.memory_optimizer.close()


def weights(model, layer=0):
    attention = model.model.language_model.layers[layer].self_attn
    return attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight


@torch.no_grad()
def test_the_product_is_that_of_each(model):
    for n_rows in (1, 3, 40):
        for layer in (0, 1, 2, 3, 0):
            x = torch.randn(2, n_rows, 128)
            parts = weights(model, layer)
            expected = torch.cat([F.linear(x, part.decoded()) for part in parts], dim=-1)
            found = linear_joined(x, parts)
            assert found.shape == expected.shape
            error = float((found - expected).norm() / expected.norm())
            assert error < 0.02, (n_rows, layer, error)


@torch.no_grad()
def test_accesses_count_for_each_tensor(model):
    stats = model.memory_optimizer.pager.stats
    parts = weights(model)
    pages = sum(len(part.entry.pages) for part in parts)
    before = stats.hits + stats.misses
    linear_joined(torch.randn(1, 128), parts)
    assert stats.hits + stats.misses == before + pages
    assert all(page.pins == 0 for part in parts for page in part.entry.pages)


@torch.no_grad()
def test_what_is_written_to_one_is_seen_in_the_product(model):
    query, key, value = weights(model)
    key.zero_()
    found = linear_joined(torch.randn(5, 128), (query, key, value))
    rows = query.shape[0]
    assert not found[:, rows : rows + key.shape[0]].any()
    assert found[:, :rows].any() and found[:, rows + key.shape[0] :].any()


@torch.no_grad()
def test_plain_tensors_are_taken_too(model):
    x, plain = torch.randn(4, 128), torch.randn(8, 128)
    found = linear_joined(x, (weights(model)[0], plain))
    assert torch.equal(found[:, -8:], F.linear(x, plain))


def test_tensors_apart_are_not_joined(model):
    query, _, value = weights(model)
    assert not join([query.entry, value.entry])
    assert query.entry.joined is not None and len(query.entry.joined.entries) == 3


@torch.no_grad()
def test_pages_that_are_not_kept_leave_after_the_product(tmp_path):
    model = create_optimized_model(tiny.DIRECTORY, {"cache_dir": tmp_path, "tensor_budget": 900_000})
    inputs = tiny.cases()["text"]
    for _ in range(3):
        model(**inputs)
    managed = [p for p in model.parameters() if isinstance(p, ManagedTensor)]
    resident = [page for p in managed for page in p.entry.pages if page.state is PageState.RESIDENT]
    assert all(page.kept or page.unused for page in resident)
    assert all(page.pins == 0 for p in managed for page in p.entry.pages)
    model.memory_optimizer.close()
