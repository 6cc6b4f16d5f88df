"""Frames as large as those of a machine with 16 kB pages, on this one: each is four of its own."""

import subprocess
import sys

LARGE_PAGES = """
import mmap, sys
from pathlib import Path
mmap.PAGESIZE = 16384
import torch
import torch.nn.functional as F
from qwen3_vl_memory_optimizations import MemoryOptimizer, create_optimized_model
from qwen3_vl_memory_optimizations.pools import FRAME_BYTES
from tests.model.tiny import DIRECTORY, cases
from tests.paging.weights import COLUMNS, random_weights, register, settle

assert FRAME_BYTES == 16384
directory = Path(sys.argv[1])
settings = {"cache_dir": directory, "tensor_budget": 6 << 20, "memory_pool_size": 64 << 20}
with MemoryOptimizer(memory_config=settings) as optimizer:
    tensors = [optimizer.allocate_tensor(((1 << 20) + 5000,), torch.uint8) for _ in range(12)]
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    assert [int(tensor.min()) for tensor in tensors] == [int(tensor.max()) for tensor in tensors] == list(range(12))
    assert optimizer.pager.stats.swap_writes
    settle(optimizer.pager)
    optimizer.pager.check()
with MemoryOptimizer(memory_config={**settings, "tensor_budget": 1_000_000}) as optimizer:
    weights = random_weights(8, rows=256)
    managed = register(optimizer.pager, weights, directory / "w.safetensors", rows_per_page=64)
    x = torch.randn(1, COLUMNS).bfloat16()
    for _ in range(3):
        assert all(torch.equal(F.linear(x, managed[name]), F.linear(x, weights[name])) for name in weights)
    optimizer.pager.check()
model = create_optimized_model(DIRECTORY, {"cache_dir": directory, "tensor_budget": "2MB", "codec": "int8"})
with model.memory_optimizer:
    print(model.generate(**cases()["image"], max_new_tokens=4, do_sample=False).shape[0])
"""


def test_tensors_weights_and_a_packed_model_work_on_large_pages(tmp_path):
    command = [sys.executable, "-c", LARGE_PAGES, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "1", run.stderr
