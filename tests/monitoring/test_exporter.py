"""What Prometheus gets, and whether dashboards and rules ask for what is there."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from qwen3_vl_memory_optimizations import ConfigurationError, MemoryOptimizer
from qwen3_vl_memory_optimizations.figures import METRICS
from qwen3_vl_memory_optimizations.monitoring import AlertLimits, AlertMonitor, MetricsExporter, exported_names

MIB = 2**20
GRAFANA = Path(__file__).parents[2] / "grafana"
DASHBOARDS = ("allocation", "cache", "compression")
RULES = GRAFANA / "alerts.yml"
_NAME = re.compile(r"qwen3vl_mem_\w+")


def samples(text):
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def read(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def test_figures_are_those_of_the_optimizer_and_what_is_not_there_has_no_sample(make_optimizer):
    optimizer = make_optimizer(8 * MIB, memory_pool_size=16 * MIB)
    tensors = [optimizer.allocate_tensor((MIB,), torch.uint8) for _ in range(9)]
    with MetricsExporter(optimizer, monitor=AlertMonitor(AlertLimits(hold_s=0.0))) as exporter:
        found = samples(generate_latest(exporter.registry).decode())
    prefix = "qwen3vl_mem_"
    assert found[prefix + "memory_bytes", (("codec", "none"), ("kind", "general"), ("tier", "cpu"))] == 8 * MIB
    assert found[prefix + "memory_bytes", (("codec", "none"), ("kind", "general"), ("tier", "ssd"))] == MIB
    assert found[prefix + "pool_used_bytes", (("pool", "general"),)] == 9 * MIB == 9 * tensors[0].numel()
    assert found[prefix + "pool_allocations_total", (("pool", "general"),)] == 9
    assert found[prefix + "undroppable_ratio", ()] == 1.0
    assert found[prefix + "swap_operations_count", ()] == 1
    assert found[prefix + "alert_active", (("alert", "memory"),)] == 1
    assert found[prefix + "alert_active", (("alert", "fragmentation"),)] == 0
    assert (prefix + "cache_hit_rate", ()) not in found
    assert {name for name, _ in found} <= exported_names()
    assert {prefix + name for name in METRICS} <= exported_names()


def test_a_registry_of_the_application_gets_the_figures_and_is_left_again(make_optimizer):
    registry = CollectorRegistry()
    exporter = MetricsExporter(make_optimizer(8 * MIB), registry=registry)
    assert b"qwen3vl_mem_uptime_seconds " in generate_latest(registry)
    with pytest.raises(ValueError, match="[Dd]uplicated"):
        MetricsExporter(make_optimizer(8 * MIB), registry=registry)
    exporter.close()
    assert b"qwen3vl_mem" not in generate_latest(registry)


def test_figures_are_served_on_this_machine_until_it_is_closed(make_optimizer):
    optimizer = make_optimizer(8 * MIB)
    exporter = MetricsExporter(optimizer)
    url = exporter.serve(0)
    assert url.startswith("http://127.0.0.1:")
    found = samples(read(url))
    assert found["qwen3vl_mem_allocation_speedup", ()] > 1, "measured before the first scrape"
    with pytest.raises(ConfigurationError, match="already"):
        exporter.serve(0)
    port = urllib.parse.urlsplit(url).port
    other = MetricsExporter(optimizer)
    with pytest.raises(ConfigurationError, match=f"port {port}"):
        other.serve(port)
    exporter.close()
    with pytest.raises(OSError):
        read(url)


def test_an_optimizer_that_is_gone_exports_nothing(tmp_path):
    optimizer = MemoryOptimizer(memory_config={"cache_dir": tmp_path})
    exporter = MetricsExporter(optimizer)
    optimizer.close()
    assert b"qwen3vl_mem_uptime_seconds " in generate_latest(exporter.registry), "closed, its counters are there"
    del optimizer
    assert generate_latest(exporter.registry) == b""


# --- dashboards and rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_asks_for_what_is_exported(name):
    board = json.loads((GRAFANA / f"{name}.json").read_text())
    asked = {each for panel in board["panels"] for target in panel["targets"] for each in _NAME.findall(target["expr"])}
    assert len(asked) > 5 and asked <= exported_names()
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len(places) and len({panel["id"] for panel in board["panels"]}) == len(places)


def test_the_rules_are_the_alerts_and_ask_for_what_is_exported():
    rules = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    limits = AlertLimits()
    texts = {rule["alert"]: rule["expr"] for rule in rules}
    assert set(texts) == {"CacheHitRateLow", "FragmentationHigh", "ResponseSlow", "MemoryHigh", "BudgetExceeded"}
    assert set(_NAME.findall(" ".join(texts.values()))) <= exported_names()
    assert f"< {limits.hit_rate:.2f}" in texts["CacheHitRateLow"]
    assert f"> {limits.fragmentation:.2f}" in texts["FragmentationHigh"]
    assert f"> {limits.memory:.2f}" in texts["MemoryHigh"]


def tool(name):
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian package prometheus)")
    return path


def test_promtool_accepts_rules_and_figures_and_the_rules_fire_and_clear(make_optimizer):
    promtool = tool("promtool")
    scraped = generate_latest(MetricsExporter(make_optimizer(8 * MIB)).registry)
    for command, given in (
        (["check", "rules", "--lint-fatal", str(RULES)], b""),
        (["check", "metrics"], scraped),
        (["test", "rules", str(GRAFANA / "alerts_test.yml")], b""),
    ):
        done = subprocess.run([promtool, *command], input=given, capture_output=True, timeout=60)
        # Names of section 7.1 are as they are: `_count` and no unit.
        problems = [
            line for line in done.stderr.decode().splitlines() if "swap_operations_count" not in line and line.strip()
        ]
        assert command[:2] == ["check", "metrics"] or done.returncode == 0, (command, done.stdout, done.stderr)
        assert command[:2] != ["check", "metrics"] or not problems, problems


@contextlib.contextmanager
def prometheus(tmp_path, target):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    settings = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "qwen3vl-mem", "static_configs": [{"targets": [target]}]}],
    }
    config = tmp_path / "prometheus.yml"
    config.write_text(yaml.safe_dump(settings))
    arguments = [f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [tool("prometheus"), *arguments, f"--web.listen-address={address}"], stdout=log, stderr=log
        )
        try:
            yield f"http://{address}/api/v1/"
        finally:
            server.terminate()
            server.wait(20)


def until(found, seconds=60):
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            value = found()
            if value:
                return value
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_real_prometheus_scrapes_the_figures_and_loads_the_rules(make_optimizer, tmp_path):
    tool("prometheus")
    optimizer = make_optimizer(8 * MIB)
    tensors = [optimizer.allocate_tensor((MIB,), torch.uint8) for _ in range(7)]
    with MetricsExporter(optimizer) as exporter:
        target = urllib.parse.urlsplit(exporter.serve(0)).netloc
        with prometheus(tmp_path, target) as api:

            def rules():
                groups = json.loads(read(api + "rules"))["data"]["groups"]
                found = {rule["name"]: rule for group in groups for rule in group["rules"]}
                return found if found.get("MemoryHigh", {}).get("state") == "pending" else None

            def value():
                result = json.loads(read(api + "query?query=qwen3vl_mem_undroppable_bytes"))["data"]["result"]
                return float(result[0]["value"][1]) if result else None

            assert until(value) == 7 * MIB == MIB * len(tensors)
            found = until(rules)
            assert len(found) == 5 and {rule["health"] for rule in found.values()} == {"ok"}
            assert {name for name, rule in found.items() if rule["state"] != "inactive"} == {"MemoryHigh"}
