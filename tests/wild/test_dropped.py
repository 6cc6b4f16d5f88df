"""What nobody refers to any more is closed: threads, files and memory."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref

import pytest
import torch

from qwen3_vl_memory_optimizations import MemoryOptimizer, create_optimized_model

from ..model import tiny


def n_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def until(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        gc.collect()
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize(
    "settings", [{"codec": "none"}, {"codec": "int8", "tensor_budget": 3 << 20}, {"codec": "int8", "auto_tune": True}]
)
def test_models_that_were_dropped_leave_nothing(settings, tmp_path):
    def use():
        model = create_optimized_model(tiny.DIRECTORY, {**settings, "cache_dir": tmp_path})
        model.generate(input_ids=torch.randint(7, 60, (1, 90)), max_new_tokens=2, do_sample=False)
        return weakref.ref(model.memory_optimizer.pager)

    use()  # what is imported and kept for good
    until(lambda: "close-dropped" not in {thread.name for thread in threading.enumerate()}, 5)
    gc.collect()
    time.sleep(0.5)
    threads, files = threading.active_count(), n_open()
    pagers = [use() for _ in range(4)]
    assert until(lambda: threading.active_count() <= threads), [thread.name for thread in threading.enumerate()]
    assert until(lambda: n_open() <= files)
    assert until(lambda: all(pager() is None for pager in pagers))


def test_an_optimizer_that_was_dropped_leaves_nothing(tmp_path):
    threads = threading.active_count()
    optimizer = MemoryOptimizer(memory_config={"cache_dir": tmp_path, "tensor_budget": 1 << 20})
    optimizer.allocate_tensor((1000,))
    pager = weakref.ref(optimizer.pager)
    del optimizer
    assert until(lambda: threading.active_count() <= threads), [thread.name for thread in threading.enumerate()]
    assert until(lambda: pager() is None)


def test_a_tensor_keeps_its_optimizer(tmp_path):
    tensor = MemoryOptimizer(memory_config={"cache_dir": tmp_path}).allocate_tensor((10,), torch.float32)
    gc.collect()
    time.sleep(0.2)
    tensor.fill_(3)
    assert float(tensor.sum()) == 30


def test_a_weight_keeps_its_optimizer(tmp_path):
    model = create_optimized_model(tiny.DIRECTORY, {"codec": "int8", "cache_dir": tmp_path})
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    del model
    gc.collect()
    time.sleep(0.2)
    assert bool(torch.isfinite(weight + 0).all())
