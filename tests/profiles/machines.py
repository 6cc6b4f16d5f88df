"""Machines as the operating system describes them: a `/proc`, a `/sys` and, by a patched detection, a GPU."""

import os
from pathlib import Path

from qwen3_vl_memory_optimizations.hardware import GpuInfo, HardwareProfile, detect_hardware

GIB = 2**30
GTX_1050 = GpuInfo(name="NVIDIA GeForce GTX 1050 Mobile", compute_capability=(6, 1), total_bytes=2 * GIB)
RTX_3060 = GpuInfo(name="NVIDIA GeForce RTX 3060", compute_capability=(8, 6), total_bytes=12 * GIB)


def describe(
    root: Path,
    monkeypatch,
    *,
    ram_bytes: float,
    cpu: str = "AMD Ryzen 5",
    gpu: GpuInfo | None = None,
    disk: str = "sda",
) -> HardwareProfile:
    """Write a machine below `root`, whose files lie on `disk`, and return what is detected of it."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/cpuinfo").write_text(f"processor\t: 0\nmodel name\t: {cpu}\nflags\t\t: avx2\n")
    (root / "proc/meminfo").write_text(f"MemTotal: {int(ram_bytes) // 1024} kB\nMemAvailable: 1000000 kB\n")
    (root / "proc/self/cgroup").write_text("0::/\n")
    block = root / "sys/devices" / disk / "queue"
    block.mkdir(parents=True)
    (block / "rotational").write_text("0\n")
    device = root.stat().st_dev
    table = root / "sys/dev/block"
    table.mkdir(parents=True)
    (table / f"{os.major(device)}:{os.minor(device)}").symlink_to(block.parent)
    monkeypatch.setattr("qwen3_vl_memory_optimizations.hardware.detect_gpu", lambda: gpu)
    return detect_hardware(root, root=root)
