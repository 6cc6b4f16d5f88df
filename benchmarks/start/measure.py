"""One start in one process: import, load a packed model, answer with one token; print the stages as JSON.

Run by `run.py`, which says in `BENCHMARK_START_S` (of `time.monotonic`) when it started the process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

MAIN_S = time.monotonic()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
PROBE_BYTES = 512 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--ram-budget", default=None)
    parser.add_argument("--cache-dir", default=None)
    parser.add_argument("--image-px", type=int, default=0, help="side of a square image; 0: text only")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    arguments = parser.parse_args()

    started_s = float(os.environ.get("BENCHMARK_START_S", MAIN_S))
    stages = {"interpreter": MAIN_S - started_s}
    last_s = MAIN_S

    def end_stage(name: str) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        stages[name], last_s = now_s - last_s, now_s

    from qwen3_vl_memory_optimizations import create_optimized_model

    end_stage("import")
    model = create_optimized_model(
        arguments.model,
        {
            "ram_budget": arguments.ram_budget,
            "codec": "int8",
            "cache_dir": arguments.cache_dir,
            "enable_cache_hierarchy": False,
        },
    )
    end_stage("load")
    optimizer = model.memory_optimizer
    stats = optimizer.pager.stats
    read_before = stats.bytes_read
    import torch

    sys.path.insert(0, str(ROOT))
    from benchmarks.budget.measure import make_inputs

    inputs = make_inputs(model.config, arguments.image_px, arguments.prompt_tokens, model.dtype)
    with torch.no_grad():
        model.generate(**inputs, max_new_tokens=1, min_new_tokens=1, do_sample=False)
    end_stage("first token")
    first_token_s = last_s - started_s
    small_bytes = optimizer.get_memory_efficiency_stats()["budget"]["accounts_bytes"].get("small weights", 0)
    figures = {
        "first_token_s": round(first_token_s, 3),
        "stages_s": {name: round(seconds, 3) for name, seconds in stages.items()},
        "needed_bytes": stats.hit_bytes + stats.miss_bytes + stats.row_bytes_read + small_bytes,
        "read_bytes": stats.bytes_read + stats.row_bytes_read + small_bytes,
        "read_while_loading_bytes": read_before,
        "stall_s": round(stats.stall_s, 3),
    }
    # The same with all of it warm: what of the first token was computing.
    start_s = time.monotonic()
    with torch.no_grad():
        model.generate(**inputs, max_new_tokens=1, min_new_tokens=1, do_sample=False)
    figures["second_answer_s"] = round(time.monotonic() - start_s, 3)

    from qwen3_vl_memory_optimizations.storage import measure_read_bandwidth

    packed = next(iter(optimizer.pager.entries.values())).source.file.path
    figures["ssd_bytes_per_s"] = round(measure_read_bandwidth(packed, total_bytes=PROBE_BYTES))
    print(json.dumps(figures))
    optimizer.close()


if __name__ == "__main__":
    main()
