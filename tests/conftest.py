import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported: no test waits for the hub

import pytest  # noqa: E402

from qwen3_vl_memory_optimizations import MemoryOptimizer  # noqa: E402


@pytest.fixture
def make_optimizer(tmp_path):
    """Return a function that makes optimizers with a budget for tensors alone; all are closed after the test."""
    made = []

    def make(budget_bytes=None, **settings):
        # Nothing comes back or leaves by itself while a test counts.
        quiet = {"tier_migration_interval": 1000.0, "gc_collection_interval": 1000.0}
        settings = {"cache_dir": tmp_path / "cache", "memory_pool_size": 64 * 2**20, **quiet, **settings}
        made.append(MemoryOptimizer(memory_config={"tensor_budget": budget_bytes, **settings}))
        return made[-1]

    yield make
    for optimizer in made:
        optimizer.close()
