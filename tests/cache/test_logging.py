"""What is logged of a failure keeps nothing alive."""

import gc
import logging

import torch

from qwen3_vl_memory_optimizations import StorageError
from qwen3_vl_memory_optimizations.cache import CacheItem
from qwen3_vl_memory_optimizations.storage import ContentStore


def test_a_handler_that_keeps_records_keeps_no_tensors_of_those_who_called(make_optimizer, monkeypatch, caplog):
    optimizer = make_optimizer(2**20)

    def fail(self, *arguments):
        raise StorageError("input/output error", path="nowhere")

    monkeypatch.setattr(ContentStore, "put", fail)
    monkeypatch.setattr(ContentStore, "read", fail)

    def work():
        tensor = optimizer.allocate_tensor((4096,), torch.uint8)
        optimizer.cache.put("0" * 64, CacheItem({"x": torch.zeros(9)}), saved_s=1.0)
        optimizer.cache.l3_cache.load("0" * 64)
        return tensor.tensor_id

    with caplog.at_level(logging.WARNING):
        tensor_id = work()
    assert len(caplog.records) == 2
    gc.collect()
    optimizer.pager.usage()  # what finalizers left is done
    assert tensor_id not in optimizer.pager.entries
