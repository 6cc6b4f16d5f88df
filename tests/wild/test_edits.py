"""Weights that somebody edits in place, in any way that torch knows, are edited; or it is refused."""

from __future__ import annotations

import pytest
import torch

from qwen3_vl_memory_optimizations import create_optimized_model

from ..model import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache")
    model = create_optimized_model(tiny.DIRECTORY, {"codec": "int8", "cache_dir": directory})
    yield model
    model.memory_optimizer.close()


@pytest.fixture
def weight(model):
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    before = weight.clone()
    yield weight
    weight.copy_(before)


def part_fill(weight):
    weight[5:7].fill_(1)


def transposed(weight):
    weight.T[:, 5:7] = 1


def row_of_rows(weight):
    weight[4:8][1:3].fill_(1)


def chunked(weight):
    weight.split(1)[5].fill_(1)
    weight.split(1)[6].fill_(1)


def augmented(weight):
    view = weight[5:7]
    view -= view.clone()
    view += 1


def out_of(weight):
    torch.add(torch.zeros(2, weight.shape[1]), 1, out=weight[5:7])


def data_of_a_part(weight):
    weight[5:7].data.fill_(1)


def itself(weight):
    weight[5:7] = 1


@pytest.mark.parametrize(
    "edit",
    [part_fill, transposed, row_of_rows, chunked, augmented, out_of, data_of_a_part, itself],
    ids=lambda edit: edit.__name__,
)
def test_an_edit_of_a_part_is_kept(weight, edit):
    others = weight.clone()[8:]
    edit(weight)
    torch.testing.assert_close(weight[5:7] + 0, torch.ones(2, weight.shape[1]), rtol=0, atol=0.02)
    torch.testing.assert_close(weight[8:] + 0, others, rtol=0.02, atol=0.01)
    x = torch.randn(3, weight.shape[1])
    torch.testing.assert_close(
        torch.nn.functional.linear(x, weight)[:, 5:7], x.sum(-1, keepdim=True).expand(-1, 2), rtol=0.05, atol=0.1
    )


def test_two_views_see_each_other(weight):
    first, second = weight[0:4], weight[2:6]
    first.fill_(1)
    assert float(second[0].mean()) == pytest.approx(1, abs=0.02)
    second.fill_(2)
    assert float(first[3].mean()) == pytest.approx(2, abs=0.02)
    weight.zero_()
    assert float(first.abs().max()) == 0


def test_what_is_no_view_is_a_plain_tensor(weight):
    for result in (weight + 1, weight.float().clone(), weight[3:5].clone(), weight.T @ torch.ones(weight.shape[0])):
        assert type(result) is torch.Tensor


def test_numpy_may_read_and_not_write(weight):
    values = weight.numpy()
    with pytest.raises(ValueError, match="read-only"):
        values[0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        weight[3:5].numpy()[0, 0] = 1
