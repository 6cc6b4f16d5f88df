"""`qwen3vl-mem pull` in a process of its own, from a server on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ..model.sources.hub_server import COMMIT, REPO, Hub, serve

COMMAND = (sys.executable, "-m", "qwen3_vl_memory_optimizations")
LARGE = "model.safetensors"


@pytest.fixture
def hub(tiny):
    hub = Hub.of(tiny)
    server = serve(hub)
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def settings(hub, tmp_path):
    """Environment of a command that knows no other hub, and no cache but its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "QWEN3VL"))}
    caches = {"HF_HOME": str(tmp_path / "hf"), "QWEN3VL_MEM_CACHE": str(tmp_path / "cache")}
    return kept | caches | {"HF_ENDPOINT": hub.address, "XDG_CONFIG_HOME": str(tmp_path), "NO_COLOR": "1"}


@pytest.fixture
def command(settings):
    def run(*arguments, **more):
        environment = settings | {name: str(value) for name, value in more.items()}
        return subprocess.run(
            [*COMMAND, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=120
        )

    return run


def partial_files(tmp_path):
    return list((tmp_path / "hf" / "hub").rglob("*.incomplete"))


def one_line(result):
    """Return the error of a command that failed."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_a_model_is_pulled_once_and_used_by_its_id(command, hub, tiny, demo_images):
    first = command("pull", REPO, "--json")
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout)
    assert report["directory"].endswith(f"models--owner--tiny-qwen3vl/snapshots/{COMMIT}")
    names = set(os.listdir(report["directory"]))
    assert names == set(os.listdir(tiny))  # neither the README nor pickled weights
    assert report["total_bytes"] == sum(len(hub.files[name]) for name in names)
    again = command("pull", REPO)
    assert (again.returncode, "complete already" in again.stdout) == (0, True)
    assert hub.ranges == [None]
    hub.requests.clear()
    image = sorted(demo_images.glob("*.png"))[0]
    answer = command("generate", REPO, "-i", image, "-p", "what is it?", "--max-new-tokens", 2, "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["answer"]
    packed = command("pack", REPO, "--codec", "int8", "--json")
    assert "tiny-qwen3vl-" in json.loads(packed.stdout)["directory"]
    offline = command("pull", REPO, HF_HUB_OFFLINE=1)
    assert (offline.returncode, "complete already" in offline.stdout) == (0, True)
    assert hub.requests == []  # only `pull` asks the hub


def test_packing_afterwards(command, tmp_path):
    done = command("pull", REPO, "--pack", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["packed"].startswith(str(tmp_path / "cache" / "packed" / "tiny-qwen3vl-"))


def test_a_stopped_download_resumes(settings, command, hub, tmp_path):
    hub.pause_s = 0.05
    process = subprocess.Popen([*COMMAND, "pull", REPO], env=settings, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 1 << 18 for path in partial_files(tmp_path)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "are kept; the same command resumes there" in said and "Traceback" not in said
    (kept,) = partial_files(tmp_path)
    n_bytes = kept.stat().st_size
    hub.pause_s = 0
    resumed = command("pull", REPO, "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert hub.ranges[-1] == f"bytes={n_bytes}-"
    report = json.loads(resumed.stdout)
    assert report["downloaded_bytes"] < report["total_bytes"]
    assert partial_files(tmp_path) == []


def test_a_cut_connection_resumes(command, hub):
    hub.cut_after = (10 << 20) + (1 << 17)  # huggingface_hub writes pieces of 10 MiB
    done = command("pull", REPO, "--json")
    assert done.returncode == 0, done.stderr
    assert hub.ranges == [None, f"bytes={10 << 20}-"]


def test_a_damaged_file_is_removed(command, hub, tmp_path):
    hub.pause_s, whole = 0, hub.files[LARGE]
    assert command("pull", REPO, "--json").returncode == 0
    blob = next(path for path in (tmp_path / "hf").rglob("blobs/*") if path.stat().st_size == len(whole))
    (tmp_path / "hf/hub/models--owner--tiny-qwen3vl/snapshots" / COMMIT / LARGE).unlink()
    blob.rename(f"{blob}.incomplete")
    damaged = bytearray(whole[: 2 << 20])
    damaged[1000] ^= 255
    blob.with_name(f"{blob.name}.incomplete").write_bytes(damaged)
    assert "do not have the SHA-256" in one_line(command("pull", REPO))
    assert partial_files(tmp_path) == []
    assert command("pull", REPO).returncode == 0


def test_room_is_checked_before_the_first_byte(command, hub, tmp_path):
    hub.announced[LARGE] = 10**15
    line = one_line(command("pull", REPO))
    assert "1e+06 GB" in line and "free" in line and "HF_HUB_CACHE" in line
    assert not (tmp_path / "hf" / "hub").exists()


def test_what_the_hub_refuses_is_said_in_one_line(command, hub):
    hub.token = "right"
    assert "no such model, or it is private" in one_line(command("pull", REPO))
    assert command("pull", REPO, HF_TOKEN="right").returncode == 0
    assert "no revision 'v9'" in one_line(command("pull", REPO, "--revision", "v9", HF_TOKEN="right"))
    assert "no such model" in one_line(command("pull", "owner/other", HF_TOKEN="right"))
    hub.status, hub.error_code = 403, "GatedRepo"
    assert f"accept its terms at {hub.address}/{REPO}" in one_line(command("pull", REPO))
    assert "not the id of a model" in one_line(command("pull", "./tiny"))
    hub.status, hub.error_code = None, None
    hub.token = None
    del hub.files[LARGE]
    assert "has no config.json and safetensors files" in one_line(command("pull", REPO))


def test_without_a_hub_what_is_missing_is_named(command, hub, tmp_path):
    offline = one_line(command("pull", REPO, HF_HUB_OFFLINE=1))
    assert "HF_HUB_OFFLINE is set; nothing of this model is on this machine" in offline
    assert "did not deliver (ConnectError)" in one_line(command("pull", REPO, HF_ENDPOINT="http://127.0.0.1:9"))
    line = one_line(command("generate", REPO, "-p", "a", HF_HUB_OFFLINE=1))
    assert "no such path on this machine" in line and "HF_HUB_OFFLINE is set" in line
    assert command("pull", REPO).returncode == 0
    (tmp_path / "hf/hub/models--owner--tiny-qwen3vl/snapshots" / COMMIT / LARGE).unlink()
    offline = one_line(command("pull", REPO, HF_HUB_OFFLINE=1))
    assert f"missing on this machine: {LARGE}" in offline
    assert f"missing on this machine: {LARGE}" in one_line(command("pack", REPO, HF_HUB_OFFLINE=1))


def test_the_first_use_of_an_id_downloads_it(command, hub):
    answer = command("generate", REPO, "-p", "what is it?", "--max-new-tokens", 2, "--json")
    assert answer.returncode == 0, answer.stderr
    hub.requests.clear()
    assert command("generate", REPO, "-p", "what is it?", "--max-new-tokens", 2, HF_HUB_OFFLINE=1).returncode in (0, 1)
    assert not hub.requests
