"""A few ratios in under three minutes, compared with committed ones: has something become slower?

Each figure is a ratio of two measurements of one run, interleaved, median of several: the speed of the machine drops
out, its noise does not, so a figure fails only below half of what is committed. What an instruction set makes of bf16
does not drop out either: ratios are kept for each processor, and one that is not known has to reach half of the least.
The model is the 2B shape with 4 of its layers (random weights, written at the first run). Instructions of the native
core's kernels are counted too (`instructions.py`), where valgrind is installed.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

import torch  # noqa: E402

from benchmarks.make_checkpoint import make_checkpoint  # noqa: E402
from benchmarks.quick import instructions  # noqa: E402
from benchmarks.results import cpu_name, machine_name  # noqa: E402
from qwen3_vl_memory_optimizations import create_optimized_model  # noqa: E402
from qwen3_vl_memory_optimizations.storage import measure_read_bandwidth  # noqa: E402

COMMITTED = Path(__file__).with_name("ratios.json")
LEAST_SHARE = 0.5
ROUNDS, DECODE_TOKENS, PREFILL_TOKENS = 5, 8, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench-dir", type=Path, default=Path(".bench"), help="where the checkpoint lies, or will")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    parser.add_argument(
        "--commit",
        action="store_true",
        help="take what is measured as the ratios of this processor, and the counts of this compiler",
    )
    arguments = parser.parse_args()
    measured = {name: round(value, 3) for name, value in measure(arguments.bench_dir).items()}
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n")
    committed = json.loads(COMMITTED.read_text())
    machine = machine_name(cpu_name())
    if arguments.commit:
        committed[machine] = measured
        COMMITTED.write_text(json.dumps(committed, indent=1) + "\n")
    failed = compare(measured, expected_of(committed, machine))
    longer = instructions.check(commit=arguments.commit)
    if failed:
        sys.exit(f"slower than half of what is committed: {', '.join(failed)}")
    if longer:
        sys.exit(f"more instructions than committed: {', '.join(longer)}")


def expected_of(committed: dict[str, dict[str, float]], machine: str) -> dict[str, float]:
    """Return the ratios of a machine; of one that is not known, the least of all."""
    if machine in committed:
        return committed[machine]
    print(f"no ratios of {machine} are committed: compared with the least of {', '.join(committed)}")
    names = dict.fromkeys(name for ratios in committed.values() for name in ratios)
    return {name: min(ratios[name] for ratios in committed.values() if name in ratios) for name in names}


def compare(measured: dict[str, float], committed: dict[str, float]) -> list[str]:
    """Print both, and return the names of the ratios that fell below the share of the committed ones."""
    failed = []
    for name, expected in committed.items():
        value = measured.get(name, 0.0)
        ok = value >= LEAST_SHARE * expected
        print(f"{'ok  ' if ok else 'FAIL'} {name:<55} {value:7.3f}   committed {expected:.3f}")
        if not ok:
            failed.append(name)
    return failed


def measure(bench_dir: Path) -> dict[str, float]:
    """Return the ratios; each is better when larger."""
    directory = bench_dir / "2B-4layers"
    if not (directory / "config.json").is_file():
        make_checkpoint("2B", directory, layers=4, vision_layers=4)
    cache = {"enable_cache_hierarchy": False, "cache_dir": bench_dir / "cache"}
    ours = create_optimized_model(directory, {"codec": "int8_rotated", **cache})
    plain = _plain(directory)
    times = {name: Times(model) for name, model in (("plain", plain), ("ours", ours))}
    for _ in range(ROUNDS + 1):  # the first round warms up, and times kernels
        for timed in times.values():
            timed.round()
    ratios = {
        f"{work}: INT8 in memory / plain bf16": times["plain"].median(work) / times["ours"].median(work)
        for work in ("decode", "prefill")
    }
    in_memory_s = times["ours"].median("decode")
    ours.memory_optimizer.close()
    del plain, times
    ratios |= _above_memory(directory, cache, in_memory_s)
    return ratios


def _plain(directory: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.bfloat16).eval()


class Times:
    """Seconds of a prefill and of decoding a token, by work, without the first round."""

    def __init__(self, model: Any) -> None:
        self.model = model
        # Its name since transformers 5.24, and before.
        self.cache = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self.rounds: list[dict[str, float]] = []
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1000, 100_000, (1, PREFILL_TOKENS), generator=generator)

    @torch.no_grad()
    def round(self) -> None:
        prefill_s, output = _timed(lambda: self.model(input_ids=self.ids, use_cache=True, logits_to_keep=1))
        steps = []
        for _ in range(DECODE_TOKENS):
            token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            seconds, output = _timed(
                lambda t=token, c=cache: self.model(input_ids=t, use_cache=True, **{self.cache: c})
            )
            steps.append(seconds)
        self.rounds.append({"prefill": prefill_s, "decode": statistics.median(steps)})

    def median(self, work: str) -> float:
        return statistics.median(times[work] for times in self.rounds[1:])


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def _above_memory(directory: Path, cache: dict[str, Any], in_memory_s: float) -> dict[str, float]:
    """Decode with 60 % of the decoder's bytes: the share of what SSD and processor allow, and of Belady's hit rate."""
    probe = create_optimized_model(directory, {"codec": "int8_rotated", **cache})
    entries = probe.memory_optimizer.pager.entries.values()
    decoder_bytes = sum(entry.n_bytes for entry in entries if "visual" not in entry.tensor_id)
    probe.memory_optimizer.close()
    model = create_optimized_model(
        directory, {"codec": "int8_rotated", "tensor_budget": int(0.6 * decoder_bytes), **cache}
    )
    stats, timed = model.memory_optimizer.pager.stats, Times(model)
    packed = next(iter(model.memory_optimizer.pager.entries.values())).source.file.path
    timed.round()
    before = (stats.hit_bytes, stats.miss_bytes, stats.bytes_read, stats.reading_s)
    bandwidths = [measure_read_bandwidth(packed)]
    timed.round()
    timed.round()
    bandwidths.append(measure_read_bandwidth(packed))
    hits, misses, read, reading_s = (
        after - old
        for after, old in zip(
            (stats.hit_bytes, stats.miss_bytes, stats.bytes_read, stats.reading_s), before, strict=True
        )
    )
    # The SSD as the probes found it, or as it was while the decode read: the faster of the two.
    bandwidth = max(statistics.mean(bandwidths), read / reading_s)
    passes = 2 * (DECODE_TOKENS + 1)
    possible_s = max(in_memory_s, misses / passes / bandwidth)
    limit = model.memory_optimizer.pager.frames.limit_bytes
    model.memory_optimizer.close()
    return {
        "decode at 60 % of the bytes / what SSD and memory allow": possible_s / timed.median("decode"),
        "hit rate at 60 % of the bytes / Belady's": hits / (hits + misses) * decoder_bytes / limit,
    }


if __name__ == "__main__":
    main()
