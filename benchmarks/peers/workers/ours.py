"""This project, through `create_optimized_model`; the limit is the process budget."""

from __future__ import annotations

from benchmarks.peers.workers._measure import Request, run


def load(request: Request):
    """Load the model within the budget; it was packed beforehand."""
    import torch

    from qwen3_vl_memory_optimizations import create_optimized_model

    torch.set_num_threads(request.threads)
    settings = {
        "codec": request.variant,
        "cache_dir": str(request.layout.cache),
        "ram_budget": request.limit or None,
        "enable_cache_hierarchy": False,  # every run computes, and no image comes from the run before
    }
    model = create_optimized_model(str(request.layout.checkpoint(request.shape)), settings)

    from benchmarks.peers.workers._transformers import TransformersModel

    return TransformersModel(model)


if __name__ == "__main__":
    run(load)
