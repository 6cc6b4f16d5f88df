"""Attention of all tokens to all, in integers, against fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from qwen3_vl_memory_optimizations.native import DTYPES, core

CORE = core()
pytestmark = pytest.mark.skipif(CORE is None, reason="the native core is not built")
SETS = ("avx2", "avxvnni", "avx512vnni", "amx")


def exact(heads, scale):
    query, key, value = (part.double().transpose(0, 1)[None] for part in heads.unbind(1))
    found = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return found[0].transpose(0, 1).reshape(len(heads), -1)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(
    ("tokens", "n_heads", "size"), [(1, 1, 2), (7, 3, 16), (255, 2, 64), (257, 5, 72), (600, 2, 128), (100, 9, 34)]
)
def test_it_is_closer_than_bf16(tokens, n_heads, size, dtype):
    generator = torch.Generator().manual_seed(tokens)
    heads = torch.randn(tokens, 3, n_heads, size, generator=generator).to(dtype)
    expected = exact(heads, size**-0.5)
    found = CORE.attend_all(heads, size**-0.5).double()
    error = (found - expected).norm() / expected.norm()
    assert error < (2e-3 if dtype == torch.float32 else 6e-3), float(error)


def test_weights_of_very_different_size_all_count():
    """One token that outweighs each other one, but not all of them together."""
    heads = torch.zeros(1024, 3, 1, 64)
    heads[:, 0, 0, 0], heads[0, 1, 0, 0] = 1.0, 6.0
    heads[:, 2] = torch.randn(1024, 1, 64, generator=torch.Generator().manual_seed(1))
    expected = exact(heads, 1.0)
    assert (CORE.attend_all(heads, 1.0).double() - expected).norm() / expected.norm() < 2e-3


@pytest.mark.parametrize("n_threads", [1, 3])
def test_each_instruction_set_and_number_of_threads_gives_the_same_bits(n_threads):
    heads = torch.randn(300, 3, 6, 64)
    best, before, found = CORE.isa, torch.get_num_threads(), []
    try:
        for isa in ("portable", *SETS[: SETS.index(best) + 1 if best in SETS else 0]):
            CORE.select(isa)
            torch.set_num_threads(n_threads if found else 2)
            found.append(CORE.attend_all(heads, 0.125))
    finally:
        CORE.select(best)
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


def test_a_value_that_is_no_number_shows():
    heads = torch.randn(40, 3, 2, 16)
    heads[3, 0, 1, 5] = math.nan
    found = CORE.attend_all(heads, 0.25)
    assert found[3, 16:].isnan().all()
    assert found[:, :16].isfinite().all()
    heads[7, 1, 1, 0] = math.inf
    assert CORE.attend_all(heads, 0.25)[:, 16:].isnan().all()
