"""What watching costs: the same answers with and without it, in turns; and its parts by themselves.

With it: the shadow LRU at each access, the times of responses, a look at alerts every two seconds, and a scrape of the
exporter every five seconds. Without: none of them. Writes the table of `README.md` beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import statistics
import sys
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
_LOOK_S, _SCRAPE_S = 2.0, 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cache-dir", type=Path, required=True)
    parser.add_argument("--codec", default="int8_rotated")
    parser.add_argument("--tensor-budget", default=None)
    parser.add_argument("--tokens", type=int, default=200, help="of an answer")
    parser.add_argument("--rounds", type=int, default=8, help="of four answers: with, without, without, with")
    parser.add_argument("--write", action="store_true", help="the table of README.md")
    arguments = parser.parse_args()

    import torch
    import transformers

    from benchmarks.results import BEGIN, END, write_between
    from qwen3_vl_memory_optimizations import create_optimized_model

    settings = {"cache_dir": arguments.cache_dir, "codec": arguments.codec, "enable_cache_hierarchy": False}
    model = create_optimized_model(arguments.model, {**settings, "tensor_budget": arguments.tensor_budget})
    with model.memory_optimizer as optimizer:
        watched = Watched(model, optimizer)
        step_s: dict[bool, list[float]] = {True: [], False: []}
        tokens_s: dict[bool, list[float]] = {True: [], False: []}
        answer(model, arguments.tokens)  # warms up
        for _ in range(arguments.rounds):
            for on in (True, False, False, True):
                with watched.on() if on else watched.off():
                    seconds = answer(model, arguments.tokens)
                    tokens_s[on] += seconds
                    step_s[on].append(statistics.mean(seconds))
        parts = watched.parts(arguments.tokens)
    ratios = [
        sum(step_s[True][turn : turn + 2]) / sum(step_s[False][turn : turn + 2])
        for turn in range(0, 2 * arguments.rounds, 2)
    ]
    noise = [
        step_s[False][turn] / step_s[False][turn + 1] for turn in range(0, 2 * arguments.rounds, 2)
    ]  # without against without
    token_s = statistics.median(step_s[False])
    own_s = (
        parts["accesses per token"] * parts["time per access, us"] / 1e6 + parts["response hooks per token, us"] / 1e6
    )
    own_s += token_s * (parts["time per snapshot, us"] / _LOOK_S + parts["time per scrape, us"] / _SCRAPE_S) / 1e6
    lines = [
        "",
        f"Machine: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}. "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}. Model: {arguments.model.name}, "
        f"codec {arguments.codec}, budget {arguments.tensor_budget or 'none'}; {arguments.rounds} rounds of four "
        f"answers of {arguments.tokens} tokens.",
        "",
        "| figure | value |",
        "|---|---|",
        f"| time per token without monitoring, ms (median) | {1e3 * token_s:.2f} |",
        f"| time per token with monitoring, ms (median) | {1e3 * statistics.median(step_s[True]):.2f} |",
        f"| with / without, median of all tokens | {_ratio(tokens_s, statistics.median):.4f} |",
        f"| with / without, mean of the middle 80 % of all tokens | {_ratio(tokens_s, _middle):.4f} |",
        f"| with / without, fastest answers | {_ratio(step_s, min):.4f} |",
        f"| with / without, median of rounds | {statistics.median(ratios):.4f} |",
        f"| with / without, quartiles of rounds | {_quartiles(ratios)} |",
        f"| without / without, quartiles of rounds (noise) | {_quartiles(noise)} |",
        *(f"| {name} | {value:.1f} |" for name, value in parts.items()),
        f"| **sum of the parts, share of the time per token** | **{100 * own_s / token_s:.3f} %** |",
        "",
    ]
    print("\n".join(lines))
    if arguments.write:
        write_between(Path(__file__).with_name("README.md"), BEGIN, END, lines)


def _ratio(seconds: dict[bool, list[float]], figure) -> float:
    return figure(seconds[True]) / figure(seconds[False])


def _middle(seconds: list[float]) -> float:
    cut = len(seconds) // 10
    return statistics.mean(sorted(seconds)[cut:-cut])


def _quartiles(ratios: list[float]) -> str:
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"{low:.4f} to {high:.4f}"


def answer(model, n_tokens: int) -> list[float]:
    """Return the seconds of each token after the first."""
    import torch

    class Times:
        def __init__(self) -> None:
            self.s: list[float] = []

        def put(self, value) -> None:
            self.s.append(time.perf_counter())

        def end(self) -> None:
            pass

    times = Times()
    ids = torch.arange(100, 132)[None]
    model.generate(input_ids=ids, max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False, streamer=times)
    return [after - before for before, after in itertools.pairwise(times.s[1:])]


class Watched:
    """Turns all that watches a model on and off."""

    def __init__(self, model, optimizer) -> None:
        from qwen3_vl_memory_optimizations.monitoring import MetricsExporter

        self._model, self._optimizer = model, optimizer
        self._exporter = MetricsExporter(optimizer)
        self._exporter.serve(0)

    @contextlib.contextmanager
    def on(self):
        from qwen3_vl_memory_optimizations.monitoring import AlertMonitor, AlertWatch

        ended = threading.Event()

        def scrape() -> None:
            while not ended.wait(_SCRAPE_S):
                urllib.request.urlopen(self._exporter.url, timeout=10).read()

        scraping = threading.Thread(target=scrape)
        scraping.start()
        with AlertWatch(self._optimizer, AlertMonitor(), _LOOK_S):
            yield
        ended.set()
        scraping.join()

    @contextlib.contextmanager
    def off(self):
        access, model = self._optimizer.pager._access, self._model
        recorders, access.recorders = access.recorders, ()
        times = self._optimizer.figures.responses
        times.begin = lambda: None
        times.end = lambda n_tokens=0, length=0: None
        pre_hooks, hooks = dict(model._forward_pre_hooks), dict(model._forward_hooks)
        for table in (model._forward_pre_hooks, model._forward_hooks):
            for key in [key for key, hook in table.items() if hook.__module__.endswith("response_times")]:
                del table[key]
        try:
            yield
        finally:
            access.recorders = recorders
            del times.begin, times.end
            model._forward_pre_hooks.update(pre_hooks)
            model._forward_hooks.update(hooks)

    def parts(self, n_tokens: int) -> dict[str, float]:
        """Return what each part takes by itself."""
        from qwen3_vl_memory_optimizations.monitoring import take_snapshot
        from qwen3_vl_memory_optimizations.runtime_policy import ShadowLRU

        pager, uses = self._optimizer.pager, []
        with pager.recording(lambda *use: uses.append(use)):
            answer(self._model, n_tokens)
        shadow = ShadowLRU(pager.stats, lambda: pager.frames.limit_bytes, pager.entries)
        times = self._optimizer.figures.responses

        def replay() -> None:
            for use in uses:
                shadow(*use)

        def hooks() -> None:
            times.begin()
            for _ in range(1000):
                times.forward_begins()
                times.forward_ended()
            times.end()

        def scrape() -> None:
            urllib.request.urlopen(self._exporter.url, timeout=10).read()

        return {
            "accesses per token": len(uses) / n_tokens,
            "time per access, us": 1e6 * least_s(replay) / len(uses),
            "response hooks per token, us": 1e6 * least_s(hooks) / 1000,
            "time per snapshot, us": 1e6 * least_s(lambda: take_snapshot(self._optimizer)),
            "time per scrape, us": 1e6 * least_s(scrape),
        }


def least_s(run, runs: int = 7) -> float:
    seconds = []
    for _ in range(runs):
        start_s = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start_s)
    return min(seconds)


if __name__ == "__main__":
    main()
