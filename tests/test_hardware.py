import dataclasses
import json
import os
from pathlib import Path

import pytest

from qwen3_vl_memory_optimizations import hardware
from qwen3_vl_memory_optimizations.errors import ConfigurationError
from qwen3_vl_memory_optimizations.hardware import GpuInfo, HardwareProfile, detect_hardware

GIB = 2**30
AVX512_BF16_FLAGS = "fpu sse4_2 avx avx2 fma f16c avx512f avx512bw avx512_bf16"
LAPTOP_FLAGS = "fpu sse4_2 avx f16c fma avx2"


def make_machine(root: Path, *, flags: str = LAPTOP_FLAGS, memory_bytes: int = 8 * GIB, cgroup: str = "0::/\n") -> Path:
    """Write the `/proc` of a laptop with 4 cores of 2 threads."""
    (root / "proc/self").mkdir(parents=True)
    threads = [
        f"processor\t: {n}\nmodel name\t: Intel(R) Core(TM) i5-10210U CPU\n"
        f"physical id\t: 0\ncore id\t: {n % 4}\nflags\t\t: {flags}\n"
        for n in range(8)
    ]
    (root / "proc/cpuinfo").write_text("\n".join(threads))
    (root / "proc/meminfo").write_text(
        f"MemTotal: {memory_bytes // 1024} kB\nMemAvailable: {memory_bytes // 2048} kB\n"
    )
    (root / "proc/self/cgroup").write_text(cgroup)
    return root


def add_group(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)


def add_block_device(root: Path, name: str, *, rotational: int, number: str | None = None) -> Path:
    device = root / "sys/devices" / name
    (device / "queue").mkdir(parents=True)
    (device / "queue/rotational").write_text(f"{rotational}\n")
    if number is not None:
        link_device(root, number, device)
    return device


def link_device(root: Path, number: str, device: Path) -> None:
    table = root / "sys/dev/block"
    table.mkdir(parents=True, exist_ok=True)
    (table / number).symlink_to(device)


def device_number(path: Path) -> str:
    device = path.stat().st_dev
    return f"{os.major(device)}:{os.minor(device)}"


def test_a_laptop_is_described(tmp_path):
    profile = detect_hardware(tmp_path, root=make_machine(tmp_path))

    assert profile.cpu_model == "Intel(R) Core(TM) i5-10210U CPU"
    assert (profile.physical_cores, profile.logical_cores) == (4, 8)
    assert profile.isa == ("sse4_2", "avx", "f16c", "fma", "avx2")
    assert not profile.fast_bf16
    assert (profile.ram_bytes, profile.available_ram_bytes) == (8 * GIB, 4 * GIB)
    assert profile.requested_gpu_model is None


def test_this_machine_is_described():
    profile = detect_hardware()

    assert profile.cpu_model
    assert 1 <= profile.physical_cores <= profile.logical_cores
    assert 0 < profile.available_ram_bytes <= profile.ram_bytes
    assert profile.storage_type in hardware.STORAGE_TYPES
    assert json.loads(json.dumps(profile.to_dict()))["cpu_model"] == profile.cpu_model


def test_a_profile_is_frozen_and_slotted(tmp_path):
    profile = detect_hardware(root=make_machine(tmp_path))
    with pytest.raises(dataclasses.FrozenInstanceError):
        profile.ram_bytes = 1
    assert not hasattr(profile, "__dict__")


@pytest.mark.parametrize(
    ("flags", "capability", "environment", "expected"),
    [
        ({"avx512_bf16"}, "AVX512", {}, True),
        ({"amx_bf16"}, "AVX512", {"ONEDNN_MAX_CPU_ISA": "ALL"}, True),
        ({"avx512_bf16"}, "AVX512", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True),
        ({"avx512_bf16"}, "AVX512", {"ONEDNN_MAX_CPU_ISA": "avx512_core_vnni"}, False),
        ({"avx512_bf16"}, "AVX512", {"DNNL_MAX_CPU_ISA": "AVX2"}, False),
        ({"avx512_bf16"}, "AVX2", {}, False),
        ({"avx512f"}, "AVX512", {}, False),
    ],
)
def test_fast_bf16_needs_the_instructions_and_nothing_that_caps_them(flags, capability, environment, expected):
    assert hardware._has_fast_bf16(flags, capability, environment) is expected


def test_the_cap_of_the_environment_is_honoured(tmp_path, monkeypatch):
    root = make_machine(tmp_path, flags=AVX512_BF16_FLAGS)
    monkeypatch.setattr(hardware, "_torch_cpu_capability", lambda: "AVX512")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert detect_hardware(root=root).fast_bf16
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert not detect_hardware(root=root).fast_bf16


@pytest.mark.parametrize("inside_container", [False, True])
def test_control_group_v2_limits_memory(tmp_path, inside_container):
    root = make_machine(tmp_path, cgroup="0::/user.slice/job\n")
    group = root / "sys/fs/cgroup" if inside_container else root / "sys/fs/cgroup/user.slice/job"
    statistics = f"anon 1\ninactive_file {GIB // 2}\n"
    add_group(group, memory__max=f"{2 * GIB}\n", memory__current=f"{GIB}\n", memory__stat=statistics)

    profile = detect_hardware(root=root)

    assert (profile.ram_bytes, profile.available_ram_bytes) == (2 * GIB, 2 * GIB - GIB // 2)


def test_the_smallest_enclosing_group_counts(tmp_path):
    root = make_machine(tmp_path, cgroup="0::/outer/inner\n")
    add_group(root / "sys/fs/cgroup/outer/inner", memory__max="max\n", memory__current="0\n")
    add_group(root / "sys/fs/cgroup/outer", memory__max=f"{3 * GIB}\n", memory__current="0\n")
    assert detect_hardware(root=root).ram_bytes == 3 * GIB


def test_control_group_v1_limits_memory(tmp_path):
    root = make_machine(tmp_path, cgroup="5:cpu:/x\n4:memory:/job\n0::/\n")
    add_group(
        root / "sys/fs/cgroup/memory/job",
        memory__limit_in_bytes=f"{GIB}\n",
        memory__usage_in_bytes=f"{GIB // 2}\n",
        memory__stat=f"total_inactive_file {GIB // 4}\n",
    )
    # What version 1 writes where there is no limit.
    add_group(root / "sys/fs/cgroup/memory", memory__limit_in_bytes="9223372036854771712\n")

    profile = detect_hardware(root=root)

    assert (profile.ram_bytes, profile.available_ram_bytes) == (GIB, GIB - GIB // 4)


@pytest.mark.parametrize(
    ("name", "rotational", "expected"),
    [("nvme0n1", 0, "nvme"), ("sda", 0, "ssd"), ("sda", 1, "hdd"), ("vda", 1, "unknown"), ("vda", 0, "ssd")],
)
def test_storage_type_of_the_device_that_holds_the_path(tmp_path, name, rotational, expected):
    root = make_machine(tmp_path)
    add_block_device(root, name, rotational=rotational, number=device_number(tmp_path))
    assert detect_hardware(tmp_path / "not" / "yet" / "there", root=root).storage_type == expected


def test_a_partition_has_the_type_of_its_disk(tmp_path):
    root = make_machine(tmp_path)
    disk = add_block_device(root, "nvme0n1", rotational=0)
    add_group(disk / "nvme0n1p2", partition="2\n")
    link_device(root, device_number(tmp_path), disk / "nvme0n1p2")
    assert detect_hardware(tmp_path, root=root).storage_type == "nvme"


def test_the_slowest_disk_of_a_stack_decides(tmp_path):
    root = make_machine(tmp_path)
    volume = add_block_device(root, "dm-0", rotational=0, number=device_number(tmp_path))
    (volume / "slaves").mkdir()
    for disk in (
        add_block_device(root, "nvme0n1", rotational=0),
        add_block_device(root, "sda", rotational=1),
    ):
        (volume / "slaves" / disk.name).symlink_to(disk)
    assert detect_hardware(tmp_path, root=root).storage_type == "hdd"


def test_a_file_system_with_its_own_device_number_is_found_in_the_mount_table(tmp_path):
    root = make_machine(tmp_path)
    (root / "sys/class/block").mkdir(parents=True)
    (root / "sys/class/block/nvme0n1").symlink_to(add_block_device(root, "nvme0n1", rotational=0))
    line = f"36 35 {device_number(tmp_path)} /root / rw,noatime shared:1 - btrfs /dev/nvme0n1 rw\n"
    (root / "proc/self/mountinfo").write_text(line)
    assert detect_hardware(tmp_path, root=root).storage_type == "nvme"


def test_without_proc_and_sys_the_machine_is_still_described(tmp_path):
    profile = detect_hardware(root=tmp_path)
    assert profile.ram_bytes > 0
    assert profile.logical_cores >= 1
    assert profile.storage_type == "unknown"


def test_the_example_of_the_specification_never_fakes_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "detect_gpu", lambda: None)
    config = {
        "cpu_model": "Intel i5-10210U",
        "gpu_model": "NVIDIA SM61",
        "memory_size": 4 * GIB,
        "storage_type": "nvme",
    }

    profile = HardwareProfile.from_mapping(config, root=make_machine(tmp_path))

    assert profile.cpu_model == "Intel i5-10210U"
    assert profile.storage_type == "nvme"
    assert (profile.gpu, profile.requested_gpu_model) == (None, "NVIDIA SM61")
    assert (profile.ram_bytes, profile.available_ram_bytes) == (4 * GIB, 4 * GIB)


@pytest.mark.parametrize(
    ("asked", "recorded"),
    [
        ("NVIDIA SM61", None),
        ("geforce gtx 1050", None),
        ("NVIDIA SM86", "NVIDIA SM86"),
        ("RTX 4090", "RTX 4090"),
    ],
)
def test_a_gpu_that_is_there_is_not_recorded_as_requested(tmp_path, monkeypatch, asked, recorded):
    gpu = GpuInfo(name="NVIDIA GeForce GTX 1050", compute_capability=(6, 1), total_bytes=2 * GIB)
    monkeypatch.setattr(hardware, "detect_gpu", lambda: gpu)
    profile = HardwareProfile.from_mapping({"gpu_model": asked}, root=make_machine(tmp_path))
    assert (profile.gpu, profile.requested_gpu_model) == (gpu, recorded)


def test_more_memory_than_the_machine_has_is_not_planned_with(tmp_path):
    assert HardwareProfile.from_mapping({"memory_size": 64.0 * GIB}, root=make_machine(tmp_path)).ram_bytes == 8 * GIB


def test_a_profile_and_nothing_are_accepted(tmp_path):
    profile = HardwareProfile.from_mapping(None, root=make_machine(tmp_path))
    assert profile.ram_bytes == 8 * GIB
    assert HardwareProfile.from_mapping(profile) is profile


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"cpu_modell": "x"}, "did you mean 'cpu_model'"),
        ({"memory_size": 0}, "memory_size"),
        ({"memory_size": "8GB"}, "memory_size"),
        ({"memory_size": True}, "memory_size"),
        ({"memory_size": float("nan")}, "memory_size"),
        ({"storage_type": "floppy"}, "nvme, ssd, hdd, unknown"),
        ({"cpu_model": 5}, "cpu_model"),
        (["cpu_model"], "list"),
    ],
)
def test_a_wrong_configuration_is_refused_with_its_key(config, words):
    with pytest.raises(ConfigurationError, match=words):
        HardwareProfile.from_mapping(config)
