"""What this machine is, and what this process uses of it.

Nothing here is configured: a figure is read from the operating system, or it says that it is unknown. Files
are read below an injectable `root`, so that other machines can be described in tests.
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
from pathlib import Path
from typing import Any

import psutil

from .errors import ConfigurationError

STORAGE_TYPES = ("nvme", "ssd", "hdd", "unknown")

_RELEVANT_FLAGS = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni"),
    *("avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
# Values of ONEDNN_MAX_CPU_ISA under which oneDNN does not use the bf16 instructions that the processor has.
_ONEDNN_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
_CONFIG_KEYS = ("cpu_model", "gpu_model", "memory_size", "storage_type")
# Control groups version 1 report "no limit" as the largest multiple of the page size below 2**63.
_UNLIMITED_BYTES = 2**60


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GpuInfo:
    """A CUDA device that is really there.

    Attributes:
        compute_capability: for example `(6, 1)`.
        total_bytes: its memory.
    """

    name: str
    compute_capability: tuple[int, int]
    total_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """What plans are made for: this machine, as this process may use it.

    Attributes:
        physical_cores: cores this process may run on.
        logical_cores: hardware threads this process may run on.
        isa: the instruction set extensions that matter here, of the processor.
        cpu_capability: the vector extension that torch uses (`DEFAULT`, `AVX2`, `AVX512`, ...);
            `ATEN_CPU_CAPABILITY` can hold it below what the processor has.
        fast_bf16: bf16 matrix products run on bf16 instructions. Where not, they are 2.5 to 50 times slower
            than fp32.
        ram_bytes: the smaller of the machine's memory and the control-group limit.
        available_ram_bytes: what of it can be used now without swapping.
        gpu: the first CUDA device; `None` without one.
        storage_type: of the device that holds the path given to `detect_hardware`: one of `STORAGE_TYPES`.
        requested_gpu_model: a GPU that the configuration names and this machine does not have; never used.
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
        """Return the profile that a `hardware_config` describes; what it does not name is detected.

        Args:
            hardware_config: any of `cpu_model`, `gpu_model`, `memory_size` (bytes; more than the machine has
                counts as what it has) and `storage_type`.
            path: where the files will lie, for the storage type.
            root: the root of the tree that holds `/proc` and `/sys`.

        Raises:
            ConfigurationError: an unknown key (with the nearest valid one) or a value that cannot be.
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """Resident memory of this process.

    Attributes:
        rss_bytes: all of it.
        anonymous_bytes: the part that no file backs, shared memory included: only swap could take it.
        file_bytes: mapped files; the kernel drops them when memory is short.
        peak_rss_bytes: the most `rss_bytes` has been.
    """

    rss_bytes: int
    anonymous_bytes: int
    file_bytes: int
    peak_rss_bytes: int


def detect_hardware(path: str | os.PathLike[str] = ".", *, root: str | os.PathLike[str] = "/") -> HardwareProfile:
    """Return what this machine is.

    Args:
        path: a file or directory (it may be still to come) on the storage device to describe.
        root: the root of the tree that holds `/proc` and `/sys`.
    """
    base = Path(root)
    processors = _read_cpuinfo(base)
    flags = _cpu_flags(processors)
    capability = _torch_cpu_capability()
    ram_bytes, available_bytes = _memory(base)
    return HardwareProfile(
        cpu_model=_cpu_model(processors),
        physical_cores=_physical_cores(processors),
        logical_cores=len(processors) or psutil.cpu_count() or 1,
        isa=tuple(flag for flag in _RELEVANT_FLAGS if flag in flags),
        cpu_capability=capability,
        fast_bf16=_has_fast_bf16(flags, capability, os.environ),
        ram_bytes=ram_bytes,
        available_ram_bytes=available_bytes,
        gpu=_detect_gpu(),
        storage_type=_storage_type(base, Path(path)),
    )


def process_memory(*, root: str | os.PathLike[str] = "/") -> ProcessMemory:
    """Return the resident memory of this process.

    Without a `/proc` all of it counts as anonymous: nothing is taken for reclaimable that may not be.
    """
    status = _read_colon_table(Path(root) / "proc/self/status")
    if "VmRSS" not in status:
        rss = psutil.Process().memory_info().rss
        return ProcessMemory(rss_bytes=rss, anonymous_bytes=rss, file_bytes=0, peak_rss_bytes=_peak_rss_bytes(rss))
    rss = _kilobytes(status["VmRSS"])
    return ProcessMemory(
        rss_bytes=rss,
        anonymous_bytes=_kilobytes(status.get("RssAnon", "0")) + _kilobytes(status.get("RssShmem", "0")),
        file_bytes=_kilobytes(status.get("RssFile", "0")),
        # The kernel raises the high-water mark lazily: it can lag behind the resident size.
        peak_rss_bytes=max(rss, _kilobytes(status.get("VmHWM", "0"))),
    )


def rss_bytes() -> int:
    """Return the resident memory of this process in bytes; about 10 us, cheap enough for every allocation."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return int(psutil.Process().memory_info().rss)


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
    """Return one table a hardware thread that this process may run on."""
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


def _detect_gpu() -> GpuInfo | None:
    import torch

    with warnings.catch_warnings():
        # An unusable driver is reported by a warning; here it means the same as no device.
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            return None
        properties = torch.cuda.get_device_properties(0)
    return GpuInfo(
        name=properties.name,
        compute_capability=(properties.major, properties.minor),
        total_bytes=properties.total_memory,
    )


# --- memory ---


def _read_colon_table(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _kilobytes(text: str) -> int:
    return int(text.split()[0]) * 1024


def _peak_rss_bytes(rss: int) -> int:
    try:
        import resource
    except ImportError:
        return rss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(rss, peak if platform.system() == "Darwin" else peak * 1024)


def _memory(base: Path) -> tuple[int, int]:
    """Return (usable, available now) bytes: the least that the machine and its control groups allow."""
    table = _read_colon_table(base / "proc/meminfo")
    if "MemTotal" in table:
        total = _kilobytes(table["MemTotal"])
        available = _kilobytes(table.get("MemAvailable") or table.get("MemFree", "0"))
    else:
        machine = psutil.virtual_memory()
        total, available = machine.total, machine.available
    for limit, used in _control_group_limits(base):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return total, available


def _control_group_limits(base: Path) -> list[tuple[int, int]]:
    """Return (limit, use without what the kernel can drop) of each control group that limits this process."""
    try:
        lines = (base / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    mount = base / "sys/fs/cgroup"
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            return _limits_upwards(mount / "memory", group, *files)
    unified = next((line.split(":", 2)[2] for line in lines if line.startswith("0::")), None)
    return [] if unified is None else _limits_upwards(mount, unified, "memory.max", "memory.current", "inactive_file")


def _limits_upwards(mount: Path, group: str, limit_name: str, use_name: str, droppable: str) -> list[tuple[int, int]]:
    limits = []
    inner = mount / group.strip("/")
    # Inside a container the path is often the host's: then only the mount, its own group, exists.
    for directory in (inner, *inner.parents):
        limit = _read_int(directory / limit_name)
        if limit is not None and limit < _UNLIMITED_BYTES:
            statistics = dict(line.split(" ", 1) for line in _read_lines(directory / "memory.stat") if " " in line)
            used = (_read_int(directory / use_name) or 0) - int(statistics.get(droppable, 0))
            limits.append((limit, max(0, used)))
        if directory == mount:
            break
    return limits


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _read_int(path: Path) -> int | None:
    first = next(iter(_read_lines(path)), "").strip()
    return int(first) if first.isdigit() else None


# --- storage ---


def _storage_type(base: Path, path: Path) -> str:
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    device = path.stat().st_dev
    block = base / f"sys/dev/block/{os.major(device)}:{os.minor(device)}"
    if not block.exists():
        # btrfs and others report a device number of their own; the mount table names the real one.
        source = _mount_source(base, device)
        if source is None:
            return "unknown"
        block = base / "sys/class/block" / Path(source).name
    return _block_storage_type(block)


def _mount_source(base: Path, device: int) -> str | None:
    for line in _read_lines(base / "proc/self/mountinfo"):
        fields = line.split()
        if len(fields) > 2 and fields[2] == f"{os.major(device)}:{os.minor(device)}" and "-" in fields:
            source = fields[fields.index("-") + 2]
            if source.startswith("/dev/"):
                return source
    return None


def _block_storage_type(block: Path) -> str:
    """Return the type of a block device; in a stack (LVM, RAID, encryption) the slowest decides."""
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
    rotational = _read_int(block / "queue/rotational")
    if rotational == 0:
        return "ssd"
    # Virtual disks say "rotational" whatever they stand on.
    if rotational is None or block.name.startswith(("vd", "xvd")):
        return "unknown"
    return "hdd"
