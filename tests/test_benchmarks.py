import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
REPORTS = {
    "accuracy": lambda run, stored: run.report(stored),
    "arithmetic": lambda run, stored: run.report(stored),
    "assistant": lambda run, stored: run.report(stored),
    "busy": lambda run, stored: run.report(stored),
    "collection": lambda run, stored: run.report(stored),
    "conversations": lambda run, stored: run.report(stored["cells"]),
    "eviction": lambda run, stored: run.report(stored),
    "kv": lambda run, stored: run.report(stored["runs"]),
    "pools": lambda run, stored: run.report(stored),
    "reuse": lambda run, stored: run.report(stored),
    "start": lambda run, stored: run.report(stored),
    "throughput": lambda run, stored: run.report(stored),
    "tuning": lambda run, stored: run.report(stored),
}


def published(name, begin):
    """Return the generated lines of a page that hold text; pictures need matplotlib and are left out."""
    page = (BENCHMARKS / name / "README.md").read_text(encoding="utf-8")
    generated = page.split(begin, 1)[1].split("<!-- results: end -->", 1)[0]
    return [line for line in generated.splitlines() if line and not line.startswith("![")]


def text_of(lines):
    return [line for line in "\n".join(lines).splitlines() if line and not line.startswith("![")]


@pytest.mark.parametrize("name", REPORTS)
def test_the_page_is_what_its_script_makes_of_the_stored_results(name):
    run = importlib.import_module(f"benchmarks.{name}.run")
    stored = json.loads((BENCHMARKS / name / "results.json").read_text(encoding="utf-8"))
    assert published(name, "<!-- results: begin (written by run.py) -->") == text_of(REPORTS[name](run, stored))


def test_the_page_beside_other_systems_is_what_its_script_makes_of_the_stored_results():
    report = importlib.import_module("benchmarks.peers.report")
    lines = []
    for path in sorted((BENCHMARKS / "peers").glob("results-*.json")):
        lines += report.report(json.loads(path.read_text(encoding="utf-8")), plots={})
    assert published("peers", report.BEGIN) == text_of(lines)
