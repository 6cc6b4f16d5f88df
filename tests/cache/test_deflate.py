import pytest
import torch

from qwen3_vl_memory_optimizations.cache.deflate import deflate
from qwen3_vl_memory_optimizations.cache.item import CacheItem, decode, encode
from qwen3_vl_memory_optimizations.cache.memory import CPUCache
from qwen3_vl_memory_optimizations.cache.ssd import SSDCache

KEY, OTHER = "a" * 64, "b" * 64


def values(dtype, n=1 << 16):
    return torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype, share", [(torch.bfloat16, 0.72), (torch.float16, 0.85), (torch.float32, 0.85)])
def test_values_take_fewer_bytes_and_come_back_bit_by_bit(dtype, share):
    special = torch.tensor([float("nan"), float("inf"), -0.0, 0.0], dtype=dtype)
    item = CacheItem({"kv": torch.cat([values(dtype), special]), "ids": torch.arange(5)}, {"n": 1})
    packed = deflate(encode(item))
    assert packed is not None and packed.n_bytes < share * item.n_bytes
    back = decode(packed.inflate(), copy=False)
    assert back.meta == item.meta
    for name, tensor in item.tensors.items():
        assert back.tensors[name].dtype == tensor.dtype
        assert torch.equal(back.tensors[name].view(torch.uint8), tensor.view(torch.uint8))


def test_what_is_dense_already_is_left_as_it_is():
    noise = torch.randint(256, (1 << 16,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert deflate(encode(CacheItem({"x": noise}))) is None


@pytest.mark.parametrize("shape", [(0,), (), (3, 0, 2), (1,)])
def test_odd_shapes_are_packed_or_left(shape):
    encoded = encode(CacheItem({"x": torch.zeros(shape, dtype=torch.bfloat16), "y": values(torch.bfloat16)}))
    packed = deflate(encoded)
    assert packed is not None
    assert decode(packed.inflate(), copy=False).tensors["x"].shape == shape


def test_an_entry_is_packed_in_place_and_found_as_it_was():
    cache = CPUCache(1 << 24)
    item = CacheItem({"kv": values(torch.bfloat16)})
    assert cache.store(KEY, item, saved_s=1.0, kind="prefix")
    before = cache.used_bytes
    freed = cache.deflate(KEY)
    assert freed > 0.28 * before and cache.used_bytes == before - freed
    assert cache.deflate(KEY) == 0 and cache.deflate(OTHER) == 0
    for copy in (True, False):
        assert torch.equal(cache.load(KEY, copy=copy).tensors["kv"], item.tensors["kv"])
    assert cache.remove(KEY) == before - freed and cache.used_bytes == 0
    assert cache.remove(KEY) == 0


def test_a_dense_entry_is_tried_once():
    cache = CPUCache(1 << 24)
    noise = torch.randint(256, (1 << 16,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    cache.store(KEY, CacheItem({"x": noise}), saved_s=1.0)
    assert cache.deflate(KEY) == 0 and cache.entries()[KEY].dense


def test_a_packed_entry_goes_down_as_what_it_was(tmp_path):
    ssd = SSDCache(1 << 24, tmp_path)
    moved = {}

    def move_down(key, encoded, saved_s, kind):
        moved[key] = kind
        ssd.store_encoded(key, encoded, saved_s=saved_s, kind=kind)

    cache = CPUCache(1 << 24, on_evict=move_down)
    item = CacheItem({"kv": values(torch.bfloat16)})
    cache.store(KEY, item, saved_s=1.0, kind="prefix")
    cache.deflate(KEY)
    held = cache.used_bytes
    assert cache.may_leave(KEY) and cache.evict(KEY) == held and cache.used_bytes == 0
    assert moved == {KEY: "prefix"} and cache.counters.evictions == 1
    assert torch.equal(ssd.load(KEY).tensors["kv"], item.tensors["kv"])
    assert cache.evict(KEY) == 0 and not cache.may_leave(KEY)
