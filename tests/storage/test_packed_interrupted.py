"""Packing that is killed, run twice at once, or runs out of disk: real processes and a real small disk."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from safetensors import safe_open

from qwen3_vl_memory_optimizations.errors import InsufficientDiskSpaceError
from qwen3_vl_memory_optimizations.storage import Checkpoint, PackedEntry, PackedLayout, PackedWriter, pack_lock

PACK = """
import random, sys, time
from pathlib import Path
from qwen3_vl_memory_optimizations.storage import PackedEntry, PackedLayout, PackedWriter, pack_lock

final = Path(sys.argv[1])
sizes = [random.Random(i).randrange(1, 300_000) for i in range(60)]
layout = PackedLayout(PackedEntry(f"t{i}", "U8", (n,), n, 65536) for i, n in enumerate(sizes))

def chunks(i):
    content = random.Random(-i).randbytes(sizes[i])
    for start in range(0, len(content), 50_000):
        yield content[start : start + 50_000]

print("started", flush=True)
with pack_lock(final, lambda: print("waiting", flush=True)):
    if final.exists():
        print("already there", flush=True)
        sys.exit()
    with PackedWriter(final, layout, {"source": "test"}) as writer:
        done = writer.open()
        print("resumed", len(done), flush=True)
        for i in range(60):
            if f"t{i}" not in done:
                writer.append(f"t{i}", chunks(i))
        writer.finish([Path(sys.argv[2])])
print("packed", flush=True)
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    processes = []

    def start(final):
        command = [sys.executable, "-c", PACK, str(final), str(tmp_path / "config.json")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "started\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def finish(process):
    # Not communicate(): it would lose what readline() has buffered.
    lines = process.stdout.read().splitlines()
    assert process.wait() == 0, lines
    return lines


def test_killed_at_any_moment_and_taken_up_gives_the_same_file(tmp_path, start):
    start_s = time.perf_counter()
    finish(start(tmp_path / "whole"))
    whole_s = time.perf_counter() - start_s
    delays = random.Random(7)
    killed = 0
    for _ in range(8):
        process = start(tmp_path / "out")
        time.sleep(delays.uniform(0, whole_s / 4))
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            killed += 1
            assert not (tmp_path / "out").exists() or Checkpoint.open(tmp_path / "out").check() is None
    assert killed >= 3
    finish(start(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    Checkpoint.open(tmp_path / "out").check()
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        sizes = [random.Random(i).randrange(1, 300_000) for i in range(60)]
        for i, n_bytes in enumerate(sizes):
            assert file.get_tensor(f"t{i}").tobytes() == random.Random(-i).randbytes(n_bytes)


def test_of_two_processes_one_packs_and_the_other_finds_it_done(tmp_path, start):
    with pack_lock(tmp_path / "out"):
        processes = [start(tmp_path / "out") for _ in range(2)]
        assert [process.stdout.readline() for process in processes] == ["waiting\n"] * 2
    assert sorted(map(finish, processes)) == [["already there"], ["resumed 0", "packed"]]
    Checkpoint.open(tmp_path / "out").check()


def test_the_lock_of_a_killed_process_is_free(tmp_path, start):
    process = start(tmp_path / "out")
    assert process.stdout.readline() == "resumed 0\n"
    process.kill()
    process.wait()
    waited = []
    with pack_lock(tmp_path / "out", lambda: waited.append(1)):
        assert not (tmp_path / "out").exists()
    assert waited == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"this machine does not allow mounting: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_midway(tmp_path, small_disk):
    half = 700 << 10
    layout = PackedLayout(PackedEntry(name, "U8", (half,), half) for name in "ab")
    ballast = small_disk / "ballast"
    with PackedWriter(small_disk / "out", layout, {}) as writer:
        writer.open()
        writer.append("a", [b"a" * half])
        ballast.write_bytes(bytes(1000 << 10))
        with pytest.raises(InsufficientDiskSpaceError, match=r"run it again.*out\.partial"):
            writer.append("b", [b"b" * half])
    with PackedWriter(small_disk / "out", layout, {}) as writer, pytest.raises(InsufficientDiskSpaceError) as caught:
        writer.open()
    assert caught.value.available_bytes < caught.value.required_bytes <= half + 8192
    ballast.unlink()
    with PackedWriter(small_disk / "out", layout, {}) as writer:
        assert writer.open() == {"a"}
        writer.append("b", [b"b" * half])
        writer.finish()
    with safe_open(small_disk / "out" / "model.safetensors", "np") as file:
        assert file.get_tensor("a").tobytes() + file.get_tensor("b").tobytes() == b"a" * half + b"b" * half
