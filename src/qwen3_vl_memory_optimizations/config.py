"""`MemoryConfig`: every setting of the memory system, checked once, where it enters.

Keys and defaults follow sections 4.1 and 5.2 of the specification; `profile`, `ram_budget`, `tensor_budget`,
`gpu_budget`, `cache_dir`, `private`, `reuse_codec`, `prefix_reuse`, `codec`, `kv_codec`, `swap_algorithm`,
`swap_dir`, `swap_size`, `image_policy`, `fused_modules`, `l2_cache_max`, `pool_compaction_interval` and `auto_tune`
are this library's own.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from .errors import ConfigurationError
from .process import usable_memory

SWAP_ALGORITHMS = ("lru", "clock", "predictive")
IMAGE_POLICIES = ("downsize", "refuse")

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", re.IGNORECASE)
_FRACTIONS = ("swap_pressure_threshold",)
_INTERVALS = ("tier_migration_interval", "gc_collection_interval", "pool_compaction_interval")
_SIZES = (
    "memory_pool_size",
    "l1_cache_size",
    "l2_cache_size",
    "l3_cache_size",
    "l2_cache_max",
    "ram_budget",
    "tensor_budget",
    "gpu_budget",
    "swap_size",
)
_PATHS = ("cache_dir", "swap_dir")
_CHOICES = {
    "swap_algorithm": SWAP_ALGORITHMS,
    "image_policy": IMAGE_POLICIES,
    "fused_modules": ("auto", "on", "off"),
    "kv_codec": ("auto", "none", "int8", "int4"),
    "reuse_codec": ("lossless", "int8"),
    "prefix_reuse": ("auto", "on", "off"),
}


def parse_size(value: object, *, key: str = "size") -> int:
    """Return a size in bytes.

    Args:
        value: a number of bytes (`2.5 * 1024**3` is fine) or a text such as `"4GB"`, `"512 MiB"`, `"1.6G"`.
            GB is 10**9 bytes, GiB is 2**30.
        key: the name to use in the error.

    Raises:
        ConfigurationError: not a size, not finite, or not above zero.
    """
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        if match is None:
            raise ConfigurationError(
                f"{key}: {value!r} is not a size; write bytes, or a text such as '4GB' or '512MiB'"
            )
        number = float(match[1]) * _UNITS[(match[2] or "").upper()]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    else:
        raise ConfigurationError(f"{key}: expected a size in bytes or a text such as '4GB', got {type(value).__name__}")
    if not math.isfinite(number) or number < 1:
        raise ConfigurationError(f"{key}: {value!r} is not a usable size; it must be at least one byte")
    return int(number)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """Settings of a `MemoryOptimizer`. All sizes are bytes; floats and texts such as `"4GB"` are accepted.

    Attributes:
        profile: `auto`, or a hardware profile by name or file, whose settings stand where none are given: see
            `profiles.configure`. `None`: no profile.
        ram_budget: the most the whole process may use, interpreter and libraries included; `None`: no limit
            but the machine's.
        tensor_budget: the most the managed tensors and their workspace may use; for embedding in a larger application.
        gpu_budget: the most device memory; without a GPU it has no effect.
        cache_dir: where packed checkpoints and cached results lie; default `$QWEN3VL_MEM_CACHE`, else
            `~/.cache/qwen3vl-mem`.
        codec: how large weights are stored: `auto` chooses for each by measurement (`planning.make_plan`), `none` keeps
            them as they are; else the name of a codec that is registered when the weights are loaded or packed.
        kv_codec: how keys and values are stored, all but the newest: `none` as they are, `int8` in half of 16 bits,
            `int4` in a quarter; `auto` is `int8` where there is a budget and weights are encoded with loss.
        fused_modules: decoder layers with fewer and larger operations (`model.fused`): `auto` is `on` where weights are
            encoded with loss; with `off`, results of codec `none` are those of transformers bit by bit.
        private: nothing that follows from prompts or images is written to the disk: no `l3` cache. (The swap file has
            no name, and is gone with the process.)
        reuse_codec: the form of cached results: `lossless`, or `int8` for half the bytes.
        prefix_reuse: `generate` begins behind the longest beginning of the prompt that it computed before: `auto` is
            `on` where weights are encoded with loss; a prompt in two pieces is rounded differently from one in one.
        enable_cache_hierarchy: image features and prefixes of prompts are kept and used again.
        l1_cache_size, l2_cache_size, l3_cache_size: the most that cached results take on the GPU, in RAM (out of the
            budget, where nothing else needs it) and on the SSD.
        enable_memory_pooling: page frames and blocks are reused instead of returned to the system at once.
        enable_compression: with `False`, `codec="auto"` means `"none"`.
        enable_int8_quantization, enable_sparse_compression: with `False`, `codec="auto"` does not choose these.
        swap_dir: where the swap file lies; the directory is made when something is first swapped out. `None`: `swap` in
            `cache_dir`; if that is not on a disk (`tmpfs` is memory) or cannot be written, the first that is of
            `~/.cache/qwen3vl-mem/swap`, `/var/tmp` and the current directory.
        swap_size: the most that the swap file may take on the disk; `None`: 80 % of what is free there.
        swap_algorithm: which runtime tensors leave memory first: `lru`, `clock` or `predictive`.
        swap_pressure_threshold: with `ram_budget`, the share of the memory for tensors above which runtime tensors are
            swapped out before the room is needed.
        enable_swapping, enable_memory_swapping: with either `False`, the longest unused leave, and none ahead of need.
        enable_tiering, enable_memory_tiering: runtime tensors come back before they are used, where there is room;
            looked at each `tier_migration_interval` seconds.
        l2_cache_max: the most that `l2_cache_size` may grow to while a model runs; `None`: half of `ram_budget`, or of
            the memory there is.
        pool_compaction_interval: free page frames that no tensor took for so many seconds go back to the system.
        auto_tune: settings are changed while a model runs, one at a time, and kept where that is better (`tuning`).
        image_policy: pictures that the budget has no room for are scaled down (`downsize`) or refused (`refuse`).
        memory_pool_size: address space reserved for each pool of runtime tensors.

    Raises:
        ConfigurationError: a value of the wrong type or out of its range, named with its key.
    """

    enable_memory_pooling: bool = True
    enable_cache_hierarchy: bool = True
    enable_compression: bool = True
    enable_swapping: bool = True
    enable_tiering: bool = True
    enable_predictive_gc: bool = True

    memory_pool_size: int = 2560 * 2**20
    enable_l1_gpu_cache: bool = True
    l1_cache_size: int = 512 * 2**20
    enable_l2_cpu_cache: bool = True
    l2_cache_size: int = 2**30
    enable_l3_ssd_cache: bool = True
    l3_cache_size: int = 5 * 2**30
    enable_int8_quantization: bool = True
    enable_sparse_compression: bool = True
    enable_memory_swapping: bool = True
    swap_pressure_threshold: float = 0.8
    enable_memory_tiering: bool = True
    tier_migration_interval: float = 0.5
    gc_collection_interval: float = 1.0

    pool_compaction_interval: float = 5.0
    l2_cache_max: int | None = None
    auto_tune: bool = False

    profile: str | None = None
    ram_budget: int | None = None
    tensor_budget: int | None = None
    gpu_budget: int | None = None
    cache_dir: Path | None = None
    private: bool = False
    reuse_codec: str = "lossless"
    prefix_reuse: str = "auto"
    codec: str = "auto"
    kv_codec: str = "auto"
    swap_algorithm: str = "predictive"
    swap_dir: Path | None = None
    swap_size: int | None = None
    image_policy: str = "downsize"
    fused_modules: str = "auto"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field.name, getattr(self, field.name)))

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any] | MemoryConfig | None) -> MemoryConfig:
        """Return a `MemoryConfig` from a dict of keys (4.1, 5.2), another `MemoryConfig`, or nothing (the defaults).

        Raises:
            ConfigurationError: an unknown key (with the nearest valid one) or a bad value.
        """
        if settings is None:
            return cls()
        if isinstance(settings, MemoryConfig):
            return settings
        if not isinstance(settings, Mapping):
            raise ConfigurationError(f"memory_config: expected a dict or MemoryConfig, got {type(settings).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in settings:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
                raise ConfigurationError(f"memory_config: unknown key {key!r}; did you mean {near!r}?")
        return cls(**settings)

    @property
    def base_dir(self) -> Path:
        """Where all that is kept on the disk lies.

        Raises:
            ConfigurationError: none is named, and the user has no home directory.
        """
        given = os.environ.get("QWEN3VL_MEM_CACHE")
        return self.cache_dir or _expanded("QWEN3VL_MEM_CACHE", given or Path("~", ".cache", "qwen3vl-mem"))

    @property
    def packed_dir(self) -> Path:
        """Where packed checkpoints are kept."""
        return self.base_dir / "packed"

    @property
    def reuse_dir(self) -> Path:
        """Where cached results are kept."""
        return self.base_dir / "reuse"

    def most_l2_bytes(self) -> int:
        """Return what `l2_cache_size` may grow to, with `l2_cache_max` resolved; never less than it is."""
        most = self.l2_cache_max or (self.ram_budget or usable_memory()[0]) // 2
        return max(self.l2_cache_size, most)

    def weight_codec(self) -> str:
        """Return the codec for the large weights of a checkpoint: `auto` where each gets its own, by measurement."""
        return "none" if self.codec == "auto" and not self.enable_compression else self.codec

    def unmeasured_codec(self) -> str:
        """Return the codec for large weights where nothing is measured: what is drawn, or was in memory already."""
        codec = self.weight_codec()
        if codec != "auto":
            return codec
        return "int8_rotated" if self.enable_int8_quantization else "none"

    def cache_codec(self) -> str:
        """Return the codec of keys and values, with `auto` resolved."""
        if self.kv_codec != "auto":
            return self.kv_codec
        limited = self.ram_budget is not None or self.tensor_budget is not None
        return "int8" if limited and self.weight_codec() != "none" else "none"

    def reuses_prefixes(self) -> bool:
        """Return whether beginnings of prompts are reused, with `auto` and the switches resolved."""
        wanted = self.prefix_reuse == "on" or (self.prefix_reuse == "auto" and self.weight_codec() != "none")
        return wanted and self.enable_cache_hierarchy

    def most_resting_bytes(self) -> int:
        """Return the most that keys and values of sequences that rest take, in memory and in the swap file."""
        limited = self.ram_budget is not None or self.tensor_budget is not None
        in_memory = self.l2_cache_size if self.enable_l2_cpu_cache else 0
        on_ssd = self.l3_cache_size if limited and self.enable_l3_ssd_cache and self.enable_swapping else 0
        return in_memory + on_ssd

    def fuses_modules(self) -> bool:
        """Return whether decoder layers are fused, with `auto` resolved."""
        return self.fused_modules == "on" or (self.fused_modules == "auto" and self.weight_codec() != "none")


def jsonable(settings: Mapping[str, Any] | MemoryConfig) -> dict[str, Any]:
    """Return settings as a dict that can be written as JSON; of a `MemoryConfig`, those that are not defaults."""
    if isinstance(settings, MemoryConfig):
        values = {field.name: (getattr(settings, field.name), field.default) for field in dataclasses.fields(settings)}
        settings = {key: value for key, (value, default) in values.items() if value != default}
    return {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in settings.items()}


def _checked(key: str, value: Any) -> Any:
    hint = get_type_hints(MemoryConfig)[key]
    if value is None and type(None) in get_args(hint):
        return None
    if key in _SIZES:
        return parse_size(value, key=key)
    if hint is bool:
        if not isinstance(value, bool):
            raise ConfigurationError(f"{key}: expected True or False, got {value!r}")
        return value
    if key in _FRACTIONS or key in _INTERVALS:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigurationError(f"{key}: expected a number, got {value!r}")
        if key in _FRACTIONS and not 0 < value <= 1:
            raise ConfigurationError(f"{key}: {value!r} is outside (0, 1]")
        if key in _INTERVALS and value <= 0:
            raise ConfigurationError(f"{key}: {value!r} s is not above zero")
        return float(value)
    if hint is str and not isinstance(value, str):
        raise ConfigurationError(f"{key}: expected a name, got {value!r}")
    if key == "codec":
        return value  # which names there are, the registry of codecs knows
    if key in _CHOICES:
        if value not in _CHOICES[key]:
            raise ConfigurationError(f"{key}: {value!r} is not one of {', '.join(_CHOICES[key])}")
        return value
    if key == "profile":
        if not isinstance(value, str | os.PathLike) or not os.fspath(value):
            raise ConfigurationError(f"profile: expected 'auto', a name or a path that ends in .toml, got {value!r}")
        return os.fspath(value)
    if key in _PATHS:
        if not isinstance(value, str | os.PathLike):
            raise ConfigurationError(f"{key}: expected a path, got {type(value).__name__}")
        if not os.fspath(value):
            raise ConfigurationError(f"{key}: is empty; name a directory, or leave it out")
        return _expanded(key, value)
    raise AssertionError(f"no rule for the setting {key}")


def _expanded(key: str, path: str | os.PathLike[str]) -> Path:
    """Return a path with `~` replaced by the home directory."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigurationError(
            f"{key}: {os.fspath(path)!r} cannot be resolved, since this user has no home directory; set "
            "QWEN3VL_MEM_CACHE, or cache_dir, to a directory on a disk"
        ) from None
