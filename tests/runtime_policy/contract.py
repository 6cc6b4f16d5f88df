"""What every swapping algorithm must do: `class TestMine(SwappingContract): name = "mine"`."""

from __future__ import annotations

import torch

from qwen3_vl_memory_optimizations.runtime_policy import create_swapping_algorithm
from tests.paging.weights import settle

MIB = 2**20


class SwappingContract:
    name = ""

    def make(self, sizes=None):
        algorithm = create_swapping_algorithm(self.name)
        for key, n_bytes in (sizes or {}).items():
            algorithm.insert(key, n_bytes)
        return algorithm

    def test_the_order_has_each_key_once_and_asking_changes_nothing(self):
        algorithm = self.make({key: 1 for key in range(300)})
        for key in (3, 200, 3, 17):
            algorithm.touch(key)
        first = list(algorithm.order())
        assert sorted(first) == list(range(300))
        if len(first) <= 128:
            assert list(algorithm.order()) == first

    def test_enough_leaves_and_no_more(self):
        algorithm = self.make({"a": 10, "b": 20, "c": 30})
        gone = algorithm.evict(25)
        assert sum({"a": 10, "b": 20, "c": 30}[key] for key in gone) >= 25
        assert (
            algorithm.resident_bytes
            == sum(algorithm.n_bytes.values())
            == 60 - sum({"a": 10, "b": 20, "c": 30}[key] for key in gone)
        )
        assert algorithm.evict(0) == []

    def test_where_all_would_not_do_nothing_leaves(self):
        algorithm = self.make({"a": 10, "b": 20})
        before = list(algorithm.order())
        assert algorithm.evict(31) is None
        assert algorithm.evict(15, protected={"b"}) is None
        assert (algorithm.n_bytes, list(algorithm.order())) == ({"a": 10, "b": 20}, before)

    def test_what_is_protected_stays(self):
        algorithm = self.make({key: 1 for key in "abcdef"})
        assert set(algorithm.evict(4, protected={"a", "c"})) == set("bdef")
        assert set(algorithm.n_bytes) == {"a", "c"}

    def test_what_left_may_come_back_and_what_was_removed_too(self):
        algorithm = self.make({key: 1 for key in "abc"})
        gone = algorithm.evict(2)
        for key in gone:
            algorithm.insert(key, 1)
        algorithm.remove("a")
        algorithm.remove("a")
        algorithm.insert("a", 5)
        assert algorithm.resident_bytes == 7
        assert sorted(algorithm.order()) == ["a", "b", "c"]

    def test_the_pager_evicts_what_it_chooses(self, make_optimizer, monkeypatch):
        optimizer = make_optimizer(8 * MIB, swap_algorithm=self.name)
        algorithm, chosen = optimizer.swapping.algorithm, []
        plain = algorithm.evict

        def evict(n_bytes, protected=()):
            victims = plain(n_bytes, protected)
            chosen.extend(victims or ())
            return victims

        monkeypatch.setattr(algorithm, "evict", evict)
        tensors = [optimizer.allocate_tensor((MIB,), torch.uint8) for _ in range(12)]
        settle(optimizer.pager)
        away = {tensor.tensor_id for tensor in tensors if tensor.tier == "ssd"}
        assert len(away) >= 4 and away <= set(chosen)
        assert set(algorithm.n_bytes) == {tensor.tensor_id for tensor in tensors} - away

    def test_a_tensor_in_use_is_not_chosen(self, make_optimizer):
        optimizer = make_optimizer(8 * MIB, swap_algorithm=self.name)
        tensors = [optimizer.allocate_tensor((MIB,), torch.uint8) for _ in range(8)]
        optimizer.pager.pin(optimizer.pager.entry(tensors[0].tensor_id))
        tensors += [optimizer.allocate_tensor((MIB,), torch.uint8) for _ in range(6)]
        assert tensors[0].tier == "cpu" and tensors[0].tensor_id in optimizer.swapping.algorithm.n_bytes
        optimizer.pager.unpin(optimizer.pager.entry(tensors[0].tensor_id))

    def test_what_stays_of_a_victim_leaves_next(self, make_optimizer):
        optimizer = make_optimizer(12 * MIB, swap_algorithm=self.name)
        large, _ = (optimizer.allocate_tensor((6 * MIB,), torch.uint8) for _ in range(2))
        optimizer.allocate_tensor((MIB,), torch.uint8)  # a part of a victim is enough
        settle(optimizer.pager)
        victim, other = sorted(optimizer.pager.usage()[:2], key=lambda use: use.resident_bytes)
        assert 0 < victim.resident_bytes < other.resident_bytes == 6 * MIB
        optimizer.allocate_tensor((MIB,), torch.uint8)
        settle(optimizer.pager)
        assert [use.resident_bytes == 6 * MIB for use in optimizer.pager.usage()[:2]].count(True) == 1
        assert bool((large == 0).all())
