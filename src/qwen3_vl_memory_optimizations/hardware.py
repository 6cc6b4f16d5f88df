"""Detect this machine's hardware.

Nothing here is configured: every figure comes from the operating system, or is reported as unknown. Files are read
below an injectable `root`, so that tests can describe other machines.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import platform
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from .errors import ConfigurationError
from .process import read_int, read_lines, usable_memory

STORAGE_TYPES = ("nvme", "ssd", "hdd", "unknown")

_RELEVANT_FLAGS = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni"),
    *("avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
# Values of ONEDNN_MAX_CPU_ISA with which oneDNN does not use the processor's bf16 instructions.
_ONEDNN_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
_CONFIG_KEYS = ("cpu_model", "gpu_model", "memory_size", "storage_type")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GpuInfo:
    """A CUDA device that is present.

    Attributes:
        compute_capability: for example `(6, 1)`.
        total_bytes: size of its memory.
    """

    name: str
    compute_capability: tuple[int, int]
    total_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """The machine to plan for, as far as this process may use it.

    Attributes:
        physical_cores: cores this process may run on.
        logical_cores: hardware threads this process may run on.
        isa: the processor's relevant instruction set extensions.
        cpu_capability: the vector extension that torch uses (`DEFAULT`, `AVX2`, `AVX512`, ...);
            `ATEN_CPU_CAPABILITY` can set it below what the processor has.
        fast_bf16: bf16 matrix products run on bf16 instructions. Otherwise they are 2.5 to 50 times slower than fp32.
        ram_bytes: the smaller of the machine's memory and the control-group limit.
        available_ram_bytes: the part of it that can be used now without swapping.
        gpu: the first CUDA device; `None` without one.
        storage_type: type of the device that holds the path given to `detect_hardware`: one of `STORAGE_TYPES`.
        requested_gpu_model: a GPU that is configured but not present on this machine; never used.
    """

    cpu_model: str
    physical_cores: int
    logical_cores: int
    isa: tuple[str, ...]
    cpu_capability: str
    fast_bf16: bool
    ram_bytes: int
    available_ram_bytes: int
    gpu: GpuInfo | None
    storage_type: str
    requested_gpu_model: str | None = None

    @classmethod
    def from_mapping(
        cls,
        hardware_config: Mapping[str, Any] | HardwareProfile | None,
        *,
        path: str | os.PathLike[str] = ".",
        root: str | os.PathLike[str] = "/",
    ) -> HardwareProfile:
        """Return the profile described by a `hardware_config`; missing keys are detected.

        Args:
            hardware_config: any of `cpu_model`, `gpu_model`, `memory_size` (bytes; capped at the machine's memory) and
                `storage_type`.
            path: location of the files, for the storage type.
            root: the root of the tree that holds `/proc` and `/sys`.

        Raises:
            ConfigurationError: an unknown key (with the nearest valid one) or an impossible value.
        """
        if isinstance(hardware_config, HardwareProfile):
            return hardware_config
        changes = _checked_hardware_config(hardware_config or {})
        profile = detect_hardware(path, root=root)
        gpu_model = changes.pop("gpu_model", None)
        if gpu_model is not None and not _is_gpu_model(profile.gpu, gpu_model):
            changes["requested_gpu_model"] = gpu_model
        memory_bytes = min(changes.pop("memory_size", profile.ram_bytes), profile.ram_bytes)
        return dataclasses.replace(
            profile,
            ram_bytes=memory_bytes,
            available_ram_bytes=min(profile.available_ram_bytes, memory_bytes),
            **changes,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as plain values, ready for JSON."""
        return dataclasses.asdict(self)


def detect_hardware(path: str | os.PathLike[str] = ".", *, root: str | os.PathLike[str] = "/") -> HardwareProfile:
    """Return the profile of this machine.

    Args:
        path: a file or directory (which need not exist yet) on the storage device to describe.
        root: the root of the tree that holds `/proc` and `/sys`.
    """
    base = Path(root)
    processors = _read_cpuinfo(base)
    flags = _cpu_flags(processors)
    capability = _torch_cpu_capability()
    ram_bytes, available_bytes = usable_memory(root=base)
    return HardwareProfile(
        cpu_model=_cpu_model(processors),
        physical_cores=_physical_cores(processors),
        logical_cores=len(processors) or psutil.cpu_count() or 1,
        isa=tuple(flag for flag in _RELEVANT_FLAGS if flag in flags),
        cpu_capability=capability,
        fast_bf16=_has_fast_bf16(flags, capability, os.environ),
        ram_bytes=ram_bytes,
        available_ram_bytes=available_bytes,
        gpu=detect_gpu(),
        storage_type=_storage_type(base, Path(path)),
    )


@lru_cache(maxsize=1)
def cpu_model() -> str:
    """Return the name of the processor."""
    return _cpu_model(_read_cpuinfo(Path("/")))


def _checked_hardware_config(config: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        raise ConfigurationError(f"hardware_config: expected a dict or HardwareProfile, got {type(config).__name__}")
    checked: dict[str, Any] = {}
    for key, value in config.items():
        if key not in _CONFIG_KEYS:
            near = difflib.get_close_matches(str(key), _CONFIG_KEYS, n=1, cutoff=0.0)[0]
            raise ConfigurationError(f"hardware_config: unknown key {key!r}; did you mean {near!r}?")
        if value is None:
            continue
        if key == "memory_size":
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or value < 1:
                raise ConfigurationError(f"memory_size: expected a number of bytes above zero, got {value!r}")
            checked[key] = int(value)
        elif not isinstance(value, str) or not value.strip():
            raise ConfigurationError(f"{key}: expected a text, got {value!r}")
        elif key == "storage_type":
            if value.lower() not in STORAGE_TYPES:
                raise ConfigurationError(f"storage_type: {value!r} is not one of {', '.join(STORAGE_TYPES)}")
            checked[key] = value.lower()
        else:
            checked[key] = value
    return checked


def _is_gpu_model(gpu: GpuInfo | None, model: str) -> bool:
    if gpu is None:
        return False
    asked = re.sub(r"[^a-z0-9]", "", model.lower())
    name = re.sub(r"[^a-z0-9]", "", gpu.name.lower())
    architecture = re.search(r"sm(\d+)", asked)
    if architecture is not None:
        return architecture[1] == "{}{}".format(*gpu.compute_capability)
    return asked in name or name in asked


# --- processor ---


def _read_cpuinfo(base: Path) -> list[dict[str, str]]:
    """Return one table per hardware thread that this process may run on."""
    try:
        text = (base / "proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return []
    processors = []
    for block in text.split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines() if ":" in line)
        table = {key.strip(): value.strip() for key, _, value in pairs}
        if "processor" in table:
            processors.append(table)
    if base == Path("/") and hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
        processors = [table for table in processors if int(table["processor"]) in allowed]
    return processors


def _cpu_model(processors: list[dict[str, str]]) -> str:
    named = (table.get("model name") or table.get("Model") for table in processors)
    return next(filter(None, named), None) or platform.processor() or platform.machine() or "unknown"


def _cpu_flags(processors: list[dict[str, str]]) -> set[str]:
    return {flag for table in processors[:1] for key in ("flags", "Features") for flag in table.get(key, "").split()}


def _physical_cores(processors: list[dict[str, str]]) -> int:
    cores = {(table.get("physical id", "0"), table["core id"]) for table in processors if "core id" in table}
    return len(cores) or len(processors) or psutil.cpu_count(logical=False) or 1


def _torch_cpu_capability() -> str:
    import torch

    return torch.backends.cpu.get_cpu_capability()


def _has_fast_bf16(flags: set[str], capability: str, environment: Mapping[str, str]) -> bool:
    cap = (environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA") or "").upper()
    return bool(
        flags & {"avx512_bf16", "amx_bf16"}
        and capability.upper().startswith("AVX512")
        and cap not in _ONEDNN_WITHOUT_BF16
    )


def detect_gpu() -> GpuInfo | None:
    """Return the first usable CUDA device, `None` without one."""
    import torch

    with warnings.catch_warnings():
        # An unusable driver only causes a warning; it counts as no device.
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            return None
        properties = torch.cuda.get_device_properties(0)
    return GpuInfo(
        name=properties.name,
        compute_capability=(properties.major, properties.minor),
        total_bytes=properties.total_memory,
    )


# --- storage ---


def _storage_type(base: Path, path: Path) -> str:
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    device = path.stat().st_dev
    block = base / f"sys/dev/block/{os.major(device)}:{os.minor(device)}"
    if not block.exists():
        # btrfs and others report their own device number; the mount table names the real one.
        source = _mount_source(base, device)
        if source is None:
            return "unknown"
        block = base / "sys/class/block" / Path(source).name
    return _block_storage_type(block)


def _mount_source(base: Path, device: int) -> str | None:
    for line in read_lines(base / "proc/self/mountinfo"):
        fields = line.split()
        if len(fields) > 2 and fields[2] == f"{os.major(device)}:{os.minor(device)}" and "-" in fields:
            source = fields[fields.index("-") + 2]
            if source.startswith("/dev/"):
                return source
    return None


def _block_storage_type(block: Path) -> str:
    """Return the type of a block device; in a stack (LVM, RAID, encryption) the slowest device decides."""
    if not block.exists():
        return "unknown"
    block = block.resolve()
    if (block / "partition").exists():
        block = block.parent
    slaves = sorted((block / "slaves").iterdir()) if (block / "slaves").is_dir() else []
    if slaves:
        found = [_block_storage_type(slave) for slave in slaves]
        return max(found, key=("nvme", "ssd", "unknown", "hdd").index)
    if block.name.startswith("nvme"):
        return "nvme"
    rotational = read_int(block / "queue/rotational")
    if rotational == 0:
        return "ssd"
    # Virtual disks report "rotational" regardless of their host's device.
    if rotational is None or block.name.startswith(("vd", "xvd")):
        return "unknown"
    return "hdd"
