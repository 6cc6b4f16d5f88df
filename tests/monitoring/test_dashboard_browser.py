"""The page in a real browser, while a real model answers within its budget."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch

import qwen3_vl_memory_optimizations as q
from qwen3_vl_memory_optimizations.monitoring import AlertLimits, AlertMonitor, start_dashboard
from qwen3_vl_memory_optimizations.monitoring.dashboard import serve_run
from qwen3_vl_memory_optimizations.monitoring.rendering.charts import CHARTS
from qwen3_vl_memory_optimizations.monitoring.rendering.formatting import show as show_figure
from tests.model.tiny import DIRECTORY, cases

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver"
)

SETTLE_S = 3.0
PHASES = {None: "Idle", "pictures": "Pictures", "prompt": "Prompt", "answer": "Answer"}
PAGE_FUNCTIONS = (Path(__file__).parent / "page.js").read_text()
SHOW = "const part = document.getElementById(arguments[0]); part.open = true; part.scrollIntoView(); return true"
UNFOLD = "for (const part of document.querySelectorAll('details')) part.open = true"


@pytest.fixture(scope="module")
def run_path(tmp_path_factory):
    return tmp_path_factory.mktemp("run") / "run.jsonl"


@pytest.fixture(scope="module")
def page(tmp_path_factory, run_path):
    """The page of a model that answers questions all the time, in a thread."""
    settings = {"cache_dir": tmp_path_factory.mktemp("cache"), "tensor_budget": "1.6MB", "codec": "int8"}
    model = q.create_optimized_model(DIRECTORY, settings)
    optimizer, ended = model.memory_optimizer, threading.Event()
    kept = [optimizer.allocate_tensor((64, 1000), torch.float32, kind) for kind in ("general", "kv_cache")]

    def answer():
        while not ended.is_set():
            model.generate(**cases()["image"], do_sample=False, max_new_tokens=12)
            kept[0].sum()
            time.sleep(0.02)

    monitor = AlertMonitor(AlertLimits(response_s=1e-6, hold_s=0.0))
    about = {"command": "test", "model": "tiny-qwen3vl"}
    with optimizer, start_dashboard(model, path=run_path, monitor=monitor, about=about) as dashboard:
        thread = threading.Thread(target=answer)
        thread.start()
        yield dashboard
        ended.set()
        thread.join()


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.add_argument("--headless=new")
    options.add_argument("--no-sandbox")  # the tests may run as root
    options.add_argument("--disable-dev-shm-usage")
    options.add_argument("--disable-background-networking")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def ask(browser, call):
    """Return what a function of `page.js` returns."""
    return browser.execute_script(f"{PAGE_FUNCTIONS}\nreturn {call}")


def wait_for(browser, script, *arguments, timeout_s=20.0):
    end_s = time.monotonic() + timeout_s
    while not (result := browser.execute_script(script, *arguments)):
        assert time.monotonic() < end_s, f"never true on the page: {script}"
        time.sleep(0.05)
    return result


def show(browser, width, theme):
    """Unfold the page in a window of a width, in a theme."""
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    # As high as the page, so that all of it is in sight.
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_script(UNFOLD)
    height = browser.execute_script("return document.documentElement.scrollHeight")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size | {"height": height + 2000})
    time.sleep(SETTLE_S)


@pytest.fixture
def opened(browser, page):
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(page.url)
    wait_for(browser, "return document.body.dataset.status === 'live' && document.body.dataset.t > 1")
    return browser


def value_at(sample, path):
    for key in path.split("."):
        sample = sample[key] if sample is not None else None
    return sample


def assert_equal_to(sample, shown):
    assert len(shown["tiles"]) == 14 and len(shown["metrics"]) == 14
    pairs = [(value_at(sample, path), *rest) for path, *rest in shown["tiles"]]
    pairs += [(sample["metrics"][name], *rest) for name, *rest in shown["metrics"]]
    for expected, value, text in pairs:
        assert float(value) == expected if expected is not None else value == ""
        assert (text == "not measured") == (expected is None)
    names = {"memory": "cpu", "SSD only": "ssd"}
    found = {
        (names[tier], kind.replace(" ", "_"), codec, int(tensors)) for tier, kind, codec, tensors, _ in shown["map"]
    }
    assert found == {(row["tier"], row["kind"], row["codec"], row["tensors"]) for row in sample["memory_map"]}
    overview = shown["overview"]
    assert overview["verdict"] == sample["verdict"]["text"]
    assert overview["limit"] == {"SSD": "SSD", "memory": "Memory", "processor": "Processor"}.get(
        sample["verdict"]["limit"], "not measured"
    )
    assert overview["phase"] in ("Ended", PHASES[(sample["progress"] or {"phase": None})["phase"]])
    assert overview["memory"].endswith(f" of {show_figure(sample['budget']['tensor_budget_bytes'], 'bytes')}")
    assert overview["alerts"] == [row["message"] for row in sample["alerts"] if row["active"]]


def test_the_page_shows_what_the_api_says_while_the_model_answers(opened, page):
    show(opened, 1280, "light")
    first, seen = ask(opened, "readPage()"), []
    for _ in range(3):
        time.sleep(0.7)
        seen.append(ask(opened, "readPage()"))
    assert len({shown["t"] for shown in (first, *seen)}) >= 3, "it moves on"
    samples = {sample["t"]: sample for sample in httpx.get(page.url + "api/run.json").json()["samples"]}
    for shown in (first, *seen):
        assert_equal_to(samples[shown["t"]], shown)
    tokens = [value for shown in (first, seen[-1]) for path, value, _ in shown["tiles"] if path == "paging.bytes_read"]
    assert float(tokens[1]) > float(tokens[0]), "it is read from the SSD all the while"


def test_every_chart_is_drawn_or_says_that_nothing_was_measured(opened):
    show(opened, 1280, "light")
    drawn = ask(opened, "readCharts()")
    assert set(drawn) == {chart.key for chart in CHARTS}
    empty = {key: text for key, text in drawn.items() if text is not True}
    assert set(empty.values()) <= {"not measured"}
    assert not {"phases", "migrations", "traffic", "tokens", "process", "hit_rate", "ratio", "lives"} & set(empty)


def test_the_map_has_a_square_for_each_page_where_it_is(opened, page):
    opened.execute_script(SHOW, "pages")
    blue, orange = "11,98,184", "184,83,0"
    wait_for(opened, "return document.getElementById('map-ssd').height > 50")
    opened.execute_script("document.getElementById('live').click()")
    time.sleep(1)
    memory, ssd = ask(opened, "['map-cpu', 'map-ssd'].map(readMap)")
    weights = httpx.get(page.url + "api/snapshot").json()["snapshot"]["kinds"]["weights"]
    share = weights["resident_bytes"] / weights["encoded_bytes"]
    assert 0.1 < share < 0.45
    assert memory[blue] / (memory[blue] + ssd[blue]) == pytest.approx(share, abs=0.1)
    assert memory.get(orange, 0) + ssd.get(orange, 0) > 500, "a tensor of another kind is in one of them"


@pytest.mark.parametrize(("width", "height", "screens"), [(1280, 800, 2), (390, 844, 4)])
def test_what_is_not_folded_fits_a_few_screens(opened, width, height, screens):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    time.sleep(SETTLE_S)
    assert opened.execute_script("return document.documentElement.scrollHeight") <= screens * height
    first = opened.execute_script("return document.querySelector('.figures').getBoundingClientRect().bottom")
    assert first <= height, "verdict and figures are on the first screen"


def test_no_request_leaves_this_machine_and_nothing_goes_wrong(opened, page):
    show(opened, 1280, "dark")
    opened.execute_script("document.getElementById('theme').click()")
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    ]
    assert page.url in asked and page.url + "api/events" in asked
    assert all(url.startswith((page.url, "data:")) for url in asked), asked
    assert opened.get_log("browser") == []
    opened.execute_script("localStorage.clear()")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_window_in_both_themes_and_can_be_read(opened, width, theme):
    show(opened, width, theme)
    widths = opened.execute_script(
        "return [document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]"
    )
    assert max(widths[:2]) <= width, "nothing sticks out at the side"
    assert opened.execute_script("return document.documentElement.dataset.theme") == theme
    contrast = ask(opened, "readContrast()")
    assert len(contrast) > 20
    assert min(contrast.values()) >= 4.5, sorted(contrast.items(), key=lambda row: row[1])[:3]


def test_controls_and_pictures_have_names(opened):
    show(opened, 1280, "light")
    assert ask(opened, "readNameless()") == []


def test_one_can_look_back_and_return(opened, page):
    opened.execute_script(
        "const cursor = document.getElementById('cursor'); cursor.value = 1; cursor.dispatchEvent(new Event('input'));"
    )
    time.sleep(1.2)
    back = ask(opened, "readPage()")
    times = [sample["t"] for sample in httpx.get(page.url + "api/run.json").json()["samples"]]
    assert back["t"] == times[1], "it stays where one looks, though the run goes on"
    opened.execute_script("document.getElementById('live').click()")
    wait_for(opened, "return Number(document.body.dataset.t) > arguments[0]", times[-1])


def test_alerts_that_fire_are_seen(opened):
    show(opened, 1280, "light")
    wait_for(opened, "return document.querySelector('#alerts-table tr.active')?.textContent.includes('response time')")
    assert "response_time fires" in opened.execute_script("return document.getElementById('events').textContent")


def share_in_memory(rows):
    there = sum(row["n_bytes"] * sum(letter in "rplw" for letter in row["states"]) / row["n_pages"] for row in rows)
    return there / sum(row["n_bytes"] for row in rows)


def assert_layers_equal_to(pages, shown):
    layers, parts = shown
    assert [number for number, *_ in layers] == ["0", "1", "2", "3"]
    for number, share, text in layers:
        rows = [row for row in pages if f"language_model.layers.{number}." in row["tensor_id"]]
        assert share == pytest.approx(share_in_memory(rows), abs=1e-6)
        assert text.startswith(f"{number}: ") and text.endswith("% in memory")
    assert {"Embedding", "Vision tower", "Keys and values", "Other runtime tensors"} <= set(parts)


def test_a_recorded_run_is_shown_to_its_end(browser, page, run_path, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(run_path.read_bytes())
    with serve_run(copy) as recorded:
        browser.get(recorded.url)
        wait_for(browser, "return document.body.dataset.status === 'ended'")
        wait_for(browser, "return document.querySelectorAll('#layers li').length > 0")
        show(browser, 1280, "light")
        shown = ask(browser, "readPage()")
        layers = ask(browser, "readLayers()")
        sample = httpx.get(recorded.url + "api/run.json").json()["samples"][-1]
        pages = httpx.get(recorded.url + "api/snapshot").json()["memory_map"]
    assert_layers_equal_to(pages, layers)
    assert shown["overview"]["phase"] == "Ended"
    assert shown["t"] == sample["t"]
    assert_equal_to(sample, shown)
