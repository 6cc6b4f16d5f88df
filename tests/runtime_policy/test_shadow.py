"""A shadow LRU on traces that are followed by hand."""

from __future__ import annotations

from qwen3_vl_memory_optimizations.paging import PagingStats
from qwen3_vl_memory_optimizations.runtime_policy import ShadowLRU
from qwen3_vl_memory_optimizations.runtime_policy import shadow_lru as shadow


def run(trace, capacity_bytes, hits=(), entries="abcdef"):
    """Use keys of one byte; at the positions in `hits` the Pager found them."""
    stats = PagingStats()
    lru = ShadowLRU(stats, lambda: capacity_bytes, set(entries))
    for position, key in enumerate(trace):
        stats.hit_bytes += position in hits
        lru(key, 1, "general")
    return lru


def test_a_cycle_larger_than_memory_finds_nothing():
    lru = run("abcabcabc", 2, hits=(3, 6, 7))
    assert (lru.used_bytes, lru.shadow_bytes, lru.found_bytes) == (6, 0, 3)
    assert lru.improvement == 0.5


def test_what_is_used_again_soon_is_found_and_first_uses_do_not_count():
    lru = run("aabbacab", 2, hits=(0, 1))  # found at the first use: a tensor that was just made
    assert lru.used_bytes == 5
    assert lru.shadow_bytes == 4  # a, b, a, a; b left for c
    assert lru.improvement == (1 - 4) / 5


def test_before_a_second_use_there_is_nothing_to_compare():
    assert run("abc", 2).improvement is None


def test_what_is_larger_than_memory_never_comes_in():
    lru = run("aaa", 0)
    assert (lru.used_bytes, lru.shadow_bytes) == (2, 0)


def test_tensors_that_were_freed_are_forgotten(monkeypatch):
    monkeypatch.setattr(shadow, "_FORGET_EVERY", 3)
    stats, entries = PagingStats(), {"a", "b"}
    lru = ShadowLRU(stats, lambda: 100, entries)
    for number in range(50):
        entries.add(f"x{number}")
        lru(f"x{number}", 1, "kv_cache")
        entries.discard(f"x{number}")
    assert len(lru._known) <= 4 and lru._inside_bytes == len(lru._inside) <= 4
