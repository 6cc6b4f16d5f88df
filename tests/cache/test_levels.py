"""The levels of the cache: what they admit, what leaves, what they give back."""

import contextlib

import pytest
import torch

from qwen3_vl_memory_optimizations.cache import CacheItem, CPUCache, GPUCache, SSDCache, digest, digest_of_tensor
from qwen3_vl_memory_optimizations.errors import ConfigurationError

KB = 1000


def item_of(seed, n_bytes=10 * KB, dtype=torch.float32):
    values = torch.randn(n_bytes // dtype.itemsize, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return CacheItem({"values": values.view(-1, 5)}, {"seed": seed})


def key_of(i):
    return digest("key", i)


def same(found, item):
    return found.meta == item.meta and all(
        found.tensors[name].dtype == tensor.dtype and torch.equal(found.tensors[name], tensor)
        for name, tensor in item.tensors.items()
    )


@pytest.fixture(params=["cpu", "ssd"])
def level(request, tmp_path):
    size = 100 * KB
    return CPUCache(size) if request.param == "cpu" else SSDCache(size * 2, tmp_path / "reuse")


ITEMS = {
    "bfloat16": CacheItem({"a": torch.randn(7, 33).bfloat16()}),
    "several": CacheItem({"a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.randn(2, 2, 2).half()}, {"n": [1]}),
    "not contiguous": CacheItem({"a": torch.randn(30, 40).t()[::2]}),
    "one number, and none": CacheItem({"a": torch.tensor(3.5), "b": torch.empty(0, 4), "c": torch.tensor([True])}),
    "special values": CacheItem({"a": torch.tensor([float("inf"), -0.0, 1e-45])}),
    "mostly zero": CacheItem({"a": torch.nn.functional.pad(torch.randn(40, 8), (0, 120))}),
    "nothing": CacheItem({}, {"note": "x"}),
}


@pytest.mark.parametrize("name", ITEMS)
def test_what_comes_back_is_what_was_stored_bit_by_bit(level, name):
    item = ITEMS[name]
    assert level.store(key_of(1), item, saved_s=1.0)
    assert same(level.load(key_of(1)), item)
    assert level.load(key_of(2)) is None


def test_what_is_handed_out_can_be_written_to(level):
    item = item_of(1)
    level.store(key_of(1), item, saved_s=1.0)
    item.tensors["values"].zero_()
    level.load(key_of(1)).tensors["values"].fill_(7)
    assert same(level.load(key_of(1)), item_of(1))


def test_mostly_zero_values_take_less_and_lose_nothing():
    cache = CPUCache(10**7)
    values = torch.zeros(100, 4096)
    values[:, 5:300] = torch.randn(100, 295)
    cache.store(key_of(1), CacheItem({"a": values}), saved_s=1.0)
    assert torch.equal(cache.load(key_of(1)).tensors["a"], values)
    assert cache.used_bytes < values.nbytes / 5


def test_int8_takes_half_of_16_bit_and_loses_little():
    cache = CPUCache(10**7, codec="int8")
    values = torch.randn(256, 512).bfloat16()
    cache.store(key_of(1), CacheItem({"a": values}), saved_s=1.0)
    found = cache.load(key_of(1)).tensors["a"]
    assert cache.used_bytes < 0.52 * values.nbytes
    assert found.dtype == values.dtype
    error = (found.float() - values.float()).norm() / values.float().norm()
    assert 0 < error < 0.02, error


def test_an_unknown_codec_is_refused(tmp_path):
    for make in (lambda: CPUCache(1000, codec="zip"), lambda: SSDCache(1000, tmp_path, codec="zip")):
        with pytest.raises(ConfigurationError, match="lossless, int8"):
            make()


def test_it_never_holds_more_than_its_size(level):
    for i in range(50):
        level.store(key_of(i), item_of(i), saved_s=1.0)
        stats = level.stats()
        assert stats["used_bytes"] <= level.size_bytes
    assert stats["entries"] >= 7
    assert stats["evictions"] == stats["admitted"] - stats["entries"]
    assert same(level.load(key_of(49)), item_of(49))


def test_an_entry_larger_than_a_part_of_the_level_does_not_flush_it(level):
    for i in range(5):
        level.store(key_of(i), item_of(i), saved_s=1.0)
    assert not level.store(key_of(9), item_of(9, level.size_bytes // 4 + 1000), saved_s=1000.0)
    assert level.stats()["refused"] == 1
    assert all(level.load(key_of(i)) is not None for i in range(5))


def test_a_scan_of_what_is_used_once_leaves_what_is_used_often(level):
    for uses in (1, 2, 3, 4):
        level.store(key_of(0), item_of(0), saved_s=1.0, uses=uses)
        assert level.load(key_of(0), uses=uses) is not None
    if isinstance(level, SSDCache):
        level.close()  # what is noted is written with the next change
    for i in range(1, 16):
        level.store(key_of(i), item_of(i), saved_s=1.0)
    assert level.load(key_of(0), uses=5) is not None


def test_what_is_not_used_any_more_leaves_in_the_end(level):
    level.store(key_of(0), item_of(0), saved_s=1.0, uses=4)
    for i in range(1, 150):
        level.store(key_of(i), item_of(i), saved_s=1.0)
    assert level.load(key_of(0)) is None


def test_what_saves_more_a_byte_is_kept_before_what_saves_less(level):
    n = 10 if isinstance(level, CPUCache) else 200 * KB // (4 * 4096)  # it is full
    for i in range(n):
        level.store(key_of(i), item_of(i), saved_s=100.0)
    assert not any(level.store(key_of(100 + i), item_of(100 + i), saved_s=0.001) for i in range(20))
    assert all(level.load(key_of(i)) is not None for i in range(n))


def test_removed_and_cleared_entries_are_gone(level):
    for i in range(3):
        level.store(key_of(i), item_of(i), saved_s=1.0)
    level.remove(key_of(1))
    assert level.load(key_of(1)) is None
    level.clear()
    assert level.load(key_of(0)) is None
    assert level.stats()["used_bytes"] == level.stats()["entries"] == 0


def test_figures_of_a_level(level):
    level.store(key_of(0), item_of(0), saved_s=1.0)
    level.store(key_of(1), item_of(1), saved_s=1.0)
    assert level.stats()["hit_rate"] is None
    level.load(key_of(0))
    level.load(key_of(0))
    level.load(key_of(5))
    stats = level.stats()
    assert (stats["hits"], stats["misses"], stats["admitted"], stats["reused"]) == (2, 1, 2, 1)
    assert stats["hit_rate"] == pytest.approx(2 / 3)
    assert stats["prediction_efficiency"] == 0.5


class Budget:
    """So many bytes, for the cache and for something else."""

    def __init__(self, n_bytes):
        self.left = n_bytes

    def room_bytes(self):
        return self.left

    def take(self, n_bytes):
        if n_bytes > self.left:
            return False
        self.left -= n_bytes
        return True

    def workspace(self, n_bytes):
        return contextlib.nullcontext()

    def give(self, n_bytes):
        self.left += n_bytes


def test_the_budget_is_debited_for_what_is_held_and_credited_for_what_leaves():
    budget = Budget(200 * KB)
    cache = CPUCache(100 * KB, budget=budget)
    for i in range(20):
        cache.store(key_of(i), item_of(i), saved_s=1.0)
        assert budget.left == 200 * KB - cache.used_bytes
    assert cache.used_bytes == 100 * KB
    cache.remove(key_of(19))
    cache.shrink(50 * KB)
    assert (cache.used_bytes, budget.left) == (50 * KB, 150 * KB)
    cache.clear()
    assert budget.left == 200 * KB


def test_a_tight_budget_makes_the_level_smaller_and_none_switches_it_off():
    budget = Budget(45 * KB)
    cache = CPUCache(100 * KB, budget=budget)
    for i in range(20):
        cache.store(key_of(i), item_of(i), saved_s=1.0)
        assert 0 <= budget.left
    assert 0 < cache.used_bytes <= 45 * KB
    budget.left -= 30 * KB  # something else needs it
    cache.fit()
    assert budget.left >= 0
    assert cache.used_bytes <= 15 * KB
    cache.fit(growth_bytes=45 * KB)
    assert cache.used_bytes == 0
    budget.left = 0
    assert not cache.store(key_of(50), item_of(50), saved_s=1.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_level_is_absent():
    cache = GPUCache(10**6)
    assert not cache.store(key_of(1), item_of(1), saved_s=1.0)
    assert cache.load(key_of(1)) is None
    assert cache.stats()["available"] is False
    assert cache.stats()["used_bytes"] == cache.stats()["entries"] == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_with_a_gpu_entries_stay_on_it():
    cache = GPUCache(10**6)
    assert not cache.store(key_of(1), item_of(1), saved_s=1.0)
    on_device = CacheItem({"values": item_of(1).tensors["values"].cuda()})
    assert cache.store(key_of(1), on_device, saved_s=1.0)
    found = cache.load(key_of(1)).tensors["values"]
    assert found.is_cuda
    assert torch.equal(found, on_device.tensors["values"])


def test_a_restarted_process_finds_what_was_on_the_ssd(tmp_path):
    SSDCache(10**6, tmp_path / "reuse").store(key_of(1), item_of(1), saved_s=1.0)
    again = SSDCache(10**6, tmp_path / "reuse")
    assert again.predict_read_s(key_of(1)) > 0
    assert same(again.load(key_of(1)), item_of(1))
    assert again.predict_read_s(key_of(2)) is None


def test_a_damaged_entry_is_a_miss_that_is_logged_counted_and_removed(tmp_path, caplog):
    cache = SSDCache(10**6, tmp_path / "reuse")
    cache.store(key_of(1), item_of(1), saved_s=1.0)
    path = next(path for path in (tmp_path / "reuse").rglob(key_of(1)))
    content = bytearray(path.read_bytes())
    content[6000] ^= 1
    path.write_bytes(content)
    assert cache.load(key_of(1)) is None
    assert (cache.stats()["corrupt"], cache.stats()["misses"]) == (1, 1)
    assert key_of(1) in caplog.text
    assert not path.exists()
    assert cache.store(key_of(1), item_of(1), saved_s=1.0)
    assert same(cache.load(key_of(1)), item_of(1))


def test_an_entry_that_cannot_be_read_now_is_a_miss_and_stays(tmp_path, monkeypatch, caplog):
    cache = SSDCache(10**6, tmp_path / "reuse")
    cache.store(key_of(1), item_of(1), saved_s=1.0)
    with monkeypatch.context() as patched:
        patched.setattr("os.preadv", lambda *arguments: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        assert cache.load(key_of(1)) is None
    assert cache.stats()["failures"] == 1
    assert "cannot be read now" in caplog.text
    assert same(cache.load(key_of(1)), item_of(1))


def test_a_full_disk_means_no_entry_and_no_failure(tmp_path, monkeypatch, caplog):
    cache = SSDCache(10**6, tmp_path / "reuse")
    cache.store(key_of(1), item_of(1), saved_s=1.0)
    with monkeypatch.context() as patched:
        patched.setattr("os.pwrite", lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert not cache.store(key_of(2), item_of(2), saved_s=1.0)
    assert "not cached" in caplog.text
    assert cache.store_files.verify() == []
    assert same(cache.load(key_of(1)), item_of(1))
    assert cache.load(key_of(2)) is None


def test_digests_tell_shape_dtype_and_bytes_apart():
    values = torch.arange(12, dtype=torch.float32)
    tensors = [values, values.view(3, 4), values.view(4, 3), values.double(), values.view(torch.int32), values + 1]
    assert len({digest_of_tensor(tensor) for tensor in tensors}) == len(tensors)
    assert digest_of_tensor(values.view(3, 4).t()) == digest_of_tensor(values.view(3, 4).t().contiguous())
    assert digest("a", "bc") != digest("ab", "c")
    assert len(digest(1)) == 64
