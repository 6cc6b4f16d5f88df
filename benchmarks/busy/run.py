"""Decoding beside processes that keep cores busy: with all threads, and with those that have a processor.

One process, in turns; the busy ones count upwards. Results go to one JSON file; then the table in README.md is written.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

import torch  # noqa: E402

from benchmarks import results  # noqa: E402
from qwen3_vl_memory_optimizations import create_optimized_model  # noqa: E402
from qwen3_vl_memory_optimizations.model.layers.decode_threads import FreeProcessors  # noqa: E402

HERE = Path(__file__).parent
TOKENS, WARM_S = 24, 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint directory")
    parser.add_argument("--cache-dir", default=None, help="where packed checkpoints lie")
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 1], help="how many cores others keep busy")
    parser.add_argument("--repeat", type=int, default=5)
    results.add_result_options(parser, HERE, adds=False)
    arguments = parser.parse_args()
    if not arguments.report:
        results.keep(measure(arguments), arguments.json)
    results.publish(report(json.loads(arguments.json.read_text())), arguments.json, HERE)


def measure(arguments: argparse.Namespace) -> dict:
    """Return milliseconds a token, by how many cores are busy and whether threads follow it."""
    settings = {"codec": "int8_rotated", "cache_dir": arguments.cache_dir, "enable_cache_hierarchy": False}
    model = create_optimized_model(arguments.model, settings)
    free, everything = FreeProcessors.free, lambda self: float(len(os.sched_getaffinity(0)))
    token_ms(model)  # kernels are chosen
    rows = []
    for busy in arguments.busy:
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            row: dict[str, Any] = {"busy": busy, "all": [], "free": []}
            for _ in range(arguments.repeat):
                for name, method in (("all", everything), ("free", free)):
                    FreeProcessors.free = method
                    row[name].append(round(token_ms(model), 1))
            rows.append(row)
            print(json.dumps(row), flush=True)
        finally:
            for other in others:
                other.kill()
                other.wait()
    machine = results.machine() | {"model": Path(arguments.model).name, "threads": torch.get_num_threads()}
    return {"environment": machine, "date": results.now(), "commit": results.commit(), "rows": rows}


@torch.no_grad()
def token_ms(model: Any) -> float:
    """Return the median of the tokens of one answer, without those of its first seconds."""
    times: list[float] = []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            return

    ids = torch.arange(1000, 1032).view(1, -1)
    options = {"max_new_tokens": 512, "do_sample": False, "eos_token_id": None, "streamer": Streamer()}
    mask = torch.ones_like(ids)
    model.generate(input_ids=ids, attention_mask=mask, stopping_criteria=[_Enough(times)], **options)
    late = times[-TOKENS:]
    return 1000 * statistics.median(after - before for before, after in zip(late, late[1:], strict=False))


class _Enough:
    """A stopping criterion of transformers: so many tokens after the first seconds."""

    def __init__(self, times: list[float]) -> None:
        self._times = times

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        enough = len(self._times) > TOKENS and self._times[-TOKENS] > self._times[0] + WARM_S
        return torch.full((ids.shape[0],), enough, dtype=torch.bool)


def report(content: dict) -> Iterator[str]:
    """Give the lines of the report."""
    here = content["environment"]
    yield ""
    yield f"{results.machine_line(here)} {here['threads']} threads."
    yield f"Model: {here['model']}, INT8, in memory. {content['date']}, at {content['commit']}."
    yield ""
    yield (
        "| cores busy with other processes | all threads, ms per token "
        "| one thread per free core, ms per token | ratio |"
    )
    yield "|---|---|---|---|"
    for row in content["rows"]:
        whole, chosen = row["all"], row["free"]
        share = statistics.median(b / a for a, b in zip(whole, chosen, strict=True))
        yield f"| {row['busy']} | {_spread(whole)} | {_spread(chosen)} | {share:.2f} |"


def _spread(values: list[float]) -> str:
    return f"**{statistics.median(values):.0f}** ({min(values):.0f} to {max(values):.0f})"


if __name__ == "__main__":
    main()
