"""What the recorder and an open page cost a token: the same answers without, with a record, and with the page open.

The three take turns, there and back, in one process; besides, the processor time that the threads of the recorder and
the server took meanwhile, and the browser's. Writes the table of `README.md` beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MODES = ("without", "record", "page")
_THREADS = {"record": ("memory-recorder",), "page": ("memory-recorder", "memory-dashboard")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cache-dir", type=Path, required=True)
    parser.add_argument("--codec", default="int8_rotated")
    parser.add_argument("--tokens", type=int, default=200, help="of an answer")
    parser.add_argument("--rounds", type=int, default=5, help="of six answers: each mode twice")
    parser.add_argument("--write", action="store_true", help="the table of README.md")
    arguments = parser.parse_args()

    import torch
    import transformers

    from benchmarks.monitoring.run import answer
    from benchmarks.results import BEGIN, END, write_between
    from qwen3_vl_memory_optimizations import create_optimized_model

    settings = {"cache_dir": arguments.cache_dir, "codec": arguments.codec, "enable_cache_hierarchy": False}
    model = create_optimized_model(arguments.model, settings)
    tokens_s: dict[str, list[float]] = {mode: [] for mode in MODES}
    rounds: list[dict[str, float]] = []
    cpu_rounds: list[dict[str, float]] = []
    shares: dict[str, list[float]] = {"record": [], "page": [], "browser": []}
    with model.memory_optimizer as optimizer, Browser() as browser:
        answer(model, arguments.tokens)  # warms up
        for _ in range(arguments.rounds):
            seconds: dict[str, float] = dict.fromkeys(MODES, 0.0)
            cpu: dict[str, float] = dict.fromkeys(MODES, 0.0)
            for mode in (*MODES, *reversed(MODES)):
                with watched(optimizer, mode, browser):
                    before_s, page_s, start_s = thread_seconds(mode), browser.cpu_s(), time.perf_counter()
                    process_s = time.process_time()
                    found = answer(model, arguments.tokens)
                    wall_s = time.perf_counter() - start_s
                    cpu[mode] += time.process_time() - process_s
                    if mode != "without":
                        shares[mode].append((thread_seconds(mode) - before_s) / wall_s)
                    if mode == "page":
                        shares["browser"].append((browser.cpu_s() - page_s) / wall_s)
                tokens_s[mode] += found
                seconds[mode] += sum(found)
            rounds.append(seconds)
            cpu_rounds.append(cpu)
    token_ms = {mode: 1e3 * statistics.median(tokens_s[mode]) for mode in MODES}
    load = "/".join(f"{each:.0f}" for each in os.getloadavg())
    lines = [
        "",
        f"Machine: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}. "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}. Model: {arguments.model.name}, codec "
        f"{arguments.codec}, no budget; {arguments.rounds} rounds of six answers of {arguments.tokens} tokens; load of "
        f"the machine at the end (1, 5, 15 minutes): {load}.",
        "",
        "| figure | without | record | page open |",
        "|---|---|---|---|",
        "| time per token, ms (median) | " + " | ".join(f"{token_ms[mode]:.2f}" for mode in MODES) + " |",
        "| relative to without, median of all tokens | 1 | "
        + " | ".join(f"{token_ms[mode] / token_ms['without']:.4f}" for mode in MODES[1:])
        + " |",
        "| relative to without, median of rounds | 1 | "
        + " | ".join(f"{statistics.median(each[mode] / each['without'] for each in rounds):.4f}" for mode in MODES[1:])
        + " |",
        "| CPU time of the process, relative to without, median of rounds | 1 | "
        + " | ".join(
            f"{statistics.median(each[mode] / each['without'] for each in cpu_rounds):.4f}" for mode in MODES[1:]
        )
        + " |",
        "| CPU time of its threads, share of one core | 0 | "
        + " | ".join(f"{100 * statistics.mean(shares[mode]):.2f} %" for mode in MODES[1:])
        + " |",
        f"| CPU time of the browser, share of one core | 0 | 0 | {100 * statistics.mean(shares['browser']):.1f} % |",
        "",
    ]
    print("\n".join(lines))
    if arguments.write:
        write_between(Path(__file__).with_name("README.md"), BEGIN, END, lines)


@contextlib.contextmanager
def watched(optimizer, mode: str, browser: Browser):
    """Record, or record and show, for a block."""
    from qwen3_vl_memory_optimizations.monitoring import Recorder, start_dashboard

    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        path = Path(directory) / "run.jsonl"
        if mode == "record":
            stack.enter_context(Recorder(optimizer, path=path, history=0))
        elif mode == "page":
            page = stack.enter_context(start_dashboard(optimizer, path=path))
            stack.callback(browser.leave)
            browser.open(page.url)
        yield


def thread_seconds(mode: str) -> float:
    """Return the processor time of the threads that watch, as the system counts it: in steps of 10 ms."""
    total = 0.0
    for thread in threading.enumerate():
        if thread.name in _THREADS.get(mode, ()):
            fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


class Browser:
    """A browser with a window of 1280 x 900, whose page is in sight."""

    def __enter__(self) -> Browser:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
            options.add_argument(argument)
        self._driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        return self

    def open(self, url: str) -> None:
        self._driver.get(url)
        while self._driver.execute_script("return document.body.dataset.status") != "live":
            time.sleep(0.1)
        time.sleep(2)  # the first charts

    def leave(self) -> None:
        self._driver.get("about:blank")

    def cpu_s(self) -> float:
        import psutil

        children = psutil.Process().children(recursive=True)
        return sum(sum(child.cpu_times()[:2]) for child in children if "chrom" in child.name())

    def __exit__(self, *_: object) -> None:
        self._driver.quit()


if __name__ == "__main__":
    main()
