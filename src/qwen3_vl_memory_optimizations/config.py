"""`MemoryConfig`: all settings of the memory system, validated on construction.

Keys and defaults follow sections 4.1 and 5.2 of the specification; `profile`, `ram_budget`, `tensor_budget`,
`gpu_budget`, `cache_dir`, `private`, `reuse_codec`, `prefix_reuse`, `codec`, `kv_codec`, `swap_algorithm`,
`swap_dir`, `swap_size`, `image_policy`, `detail`, `first_token_s`, `fused_modules`, `l2_cache_max`,
`pool_compaction_interval` and `auto_tune` are additions of this library.
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
DETAILS = ("low", "medium", "document", "high", "auto")

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
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|min|m|h)?\s*", re.IGNORECASE)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
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
    "detail": DETAILS,
    "fused_modules": ("auto", "on", "off"),
    "kv_codec": ("auto", "none", "int8", "int4"),
    "reuse_codec": ("lossless", "int8"),
    "prefix_reuse": ("auto", "on", "off"),
}


def parse_size(value: object, *, key: str = "size") -> int:
    """Return a size in bytes.

    Args:
        value: a number of bytes, such as `2.5 * 1024**3`, or a string such as `"4GB"`, `"512 MiB"`, `"1.6G"`. GB is
            10**9 bytes, GiB is 2**30.
        key: name for error messages.

    Raises:
        ConfigurationError: not a size, not finite, or not above zero.
    """
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        if match is None:
            raise ConfigurationError(
                f"{key}: {value!r} is not a size; use a number of bytes, or a string such as '4GB' or '512MiB'"
            )
        number = float(match[1]) * _UNITS[(match[2] or "").upper()]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    else:
        raise ConfigurationError(
            f"{key}: expected a size in bytes or a string such as '4GB', got {type(value).__name__}"
        )
    if not math.isfinite(number) or number < 1:
        raise ConfigurationError(f"{key}: {value!r} is not a usable size; it must be at least one byte")
    return int(number)


def parse_duration(value: object, *, key: str = "duration") -> float:
    """Return a duration in seconds, given as a number of seconds or a string such as `"30s"`, `"1.5min"`, `"500ms"`.

    Raises:
        ConfigurationError: not a duration, not finite, or not above zero.
    """
    number = math.nan
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is not None:
        number = float(match[1]) * _SECONDS[(match[2] or "s").lower()]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    if not math.isfinite(number) or number <= 0:
        raise ConfigurationError(
            f"{key}: {value!r} is not a duration; use seconds above zero, or such as '30s', '2min'"
        )
    return number


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """Settings of a `MemoryOptimizer`. Sizes are in bytes; floats and strings such as `"4GB"` are accepted.

    Attributes:
        profile: hardware profile: `auto`, a name or a file; explicit settings override it (`profiles.configure`).
            `None`: no profile.
        ram_budget: memory limit of the whole process, interpreter and libraries included; `None`: the machine's memory.
        tensor_budget: memory limit of the managed tensors and their workspace; for embedding in a larger application.
        gpu_budget: device memory limit; ignored without a GPU.
        cache_dir: directory of packed checkpoints and cached results; default `$QWEN3VL_MEM_CACHE`, else
            `~/.cache/qwen3vl-mem`.
        codec: format of large weights: `auto` chooses per weight by measurement (`planning.make_plan`), `none` leaves
            them unchanged; else the name of a codec registered when the weights are loaded or packed.
        kv_codec: format of the KV cache except its newest tokens: `none` unchanged, `int8` half the size of 16 bits,
            `int4` a quarter; `auto` is `int8` with lossy weights, if there is a budget or prompt prefixes are kept.
        fused_modules: decoder layers with fewer, larger operations (`model.layers.decoder_layer`): `auto` is `on` with
            lossy weights; with `off`, results of codec `none` are bit-identical to those of transformers.
        private: nothing derived from prompts or images is written to disk: no `l3` cache. (The swap file has no name
            and vanishes with the process.)
        reuse_codec: format of cached results: `lossless`, or `int8` for half the bytes.
        prefix_reuse: `generate` skips the longest prompt prefix that it has computed before: `auto` is `on` with lossy
            weights, since prefill in two parts rounds differently.
        enable_cache_hierarchy: cache and reuse image features and prompt prefixes.
        l1_cache_size, l2_cache_size, l3_cache_size: maximum size of cached results on the GPU, in RAM (part of the
            budget, while nothing else needs it) and on the SSD.
        enable_memory_pooling: reuse page frames and blocks instead of returning them to the system at once.
        enable_compression: with `False`, `codec="auto"` means `"none"`.
        enable_int8_quantization, enable_sparse_compression: with `False`, `codec="auto"` does not choose these.
        swap_dir: directory of the swap file, created at the first swap-out. `None`: `swap` in `cache_dir`; if that is
            not on a disk (`tmpfs` is memory) or not writable, the first suitable one of `~/.cache/qwen3vl-mem/swap`,
            `/var/tmp` and the current directory.
        swap_size: maximum size of the swap file; `None`: 80 % of the free disk space.
        swap_algorithm: eviction algorithm of runtime tensors: `lru`, `clock` or `predictive`.
        swap_pressure_threshold: with `ram_budget`, the share of tensor memory above which runtime tensors are swapped
            out ahead of demand.
        enable_swapping, enable_memory_swapping: with either `False`, the least recently used tensor is evicted, and
            only on demand.
        enable_tiering, enable_memory_tiering: prefetch runtime tensors into free memory, every
            `tier_migration_interval` seconds.
        l2_cache_max: maximum that `l2_cache_size` may grow to at run time; `None`: half of `ram_budget`, or of the
            machine's memory.
        pool_compaction_interval: free page frames unused for this many seconds are returned to the system.
        auto_tune: try other settings at run time, one at a time, and keep improvements (`tuning`).
        image_policy: images too large for the budget are scaled down (`downsize`) or refused (`refuse`).
        detail: pixels of each picture (`model.inputs.detail`): `low`, `medium`, `document`, `high` (its own size, or
            150 dots per inch for a page), or `auto`: the most with which the first token is expected in
            `first_token_s`.
        first_token_s: target of `auto`, in seconds, or a string such as `"30s"`.
        memory_pool_size: address space reserved per pool of runtime tensors.

    Raises:
        ConfigurationError: a value of the wrong type or out of range; the error names its key.
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
    detail: str = "high"
    first_token_s: float = 30.0
    fused_modules: str = "auto"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field.name, getattr(self, field.name)))

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any] | MemoryConfig | None) -> MemoryConfig:
        """Return a `MemoryConfig` from a dict of keys (4.1, 5.2), a `MemoryConfig`, or `None` for the defaults.

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
        """Base directory of all persistent files.

        Raises:
            ConfigurationError: no directory is set and the user has no home directory.
        """
        given = os.environ.get("QWEN3VL_MEM_CACHE")
        return self.cache_dir or _expanded("QWEN3VL_MEM_CACHE", given or Path("~", ".cache", "qwen3vl-mem"))

    @property
    def packed_dir(self) -> Path:
        """Directory of packed checkpoints."""
        return self.base_dir / "packed"

    @property
    def reuse_dir(self) -> Path:
        """Directory of cached results."""
        return self.base_dir / "reuse"

    def most_l2_bytes(self) -> int:
        """Return the maximum of `l2_cache_size`, with `l2_cache_max` resolved; at least its current value."""
        most = self.l2_cache_max or (self.ram_budget or usable_memory()[0]) // 2
        return max(self.l2_cache_size, most)

    def weight_codec(self) -> str:
        """Return the codec of a checkpoint's large weights; `auto` means one codec per weight, by measurement."""
        return "none" if self.codec == "auto" and not self.enable_compression else self.codec

    def unmeasured_codec(self) -> str:
        """Return the codec for unmeasured large weights: randomly initialized ones, or those already in memory."""
        codec = self.weight_codec()
        if codec != "auto":
            return codec
        return "int8_rotated" if self.enable_int8_quantization else "none"

    def cache_codec(self) -> str:
        """Return the codec of the KV cache, with `auto` resolved."""
        if self.kv_codec != "auto":
            return self.kv_codec
        limited = self.ram_budget is not None or self.tensor_budget is not None
        return "int8" if (limited or self.reuses_prefixes()) and self.weight_codec() != "none" else "none"

    def reuses_prefixes(self) -> bool:
        """Return whether prompt prefixes are reused, with `auto` and the switches resolved."""
        wanted = self.prefix_reuse == "on" or (self.prefix_reuse == "auto" and self.weight_codec() != "none")
        return wanted and self.enable_cache_hierarchy

    def most_resting_bytes(self) -> int:
        """Return the maximum bytes of the KV cache of resting sequences, in memory and in the swap file."""
        limited = self.ram_budget is not None or self.tensor_budget is not None
        in_memory = self.l2_cache_size if self.enable_l2_cpu_cache else 0
        on_ssd = self.l3_cache_size if limited and self.enable_l3_ssd_cache and self.enable_swapping else 0
        return in_memory + on_ssd

    def fuses_modules(self) -> bool:
        """Return whether decoder layers are fused, with `auto` resolved."""
        return self.fused_modules == "on" or (self.fused_modules == "auto" and self.weight_codec() != "none")


def jsonable(settings: Mapping[str, Any] | MemoryConfig) -> dict[str, Any]:
    """Return settings as a dict ready for JSON; for a `MemoryConfig`, only those that differ from the defaults."""
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
    if key == "first_token_s":
        return parse_duration(value, key=key)
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
            raise ConfigurationError(f"{key}: {value!r} s must be above zero")
        return float(value)
    if hint is str and not isinstance(value, str):
        raise ConfigurationError(f"{key}: expected a name, got {value!r}")
    if key == "codec":
        return value  # the codec registry validates names
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
            raise ConfigurationError(f"{key}: is empty; name a directory, or omit the key")
        return _expanded(key, value)
    raise AssertionError(f"no rule for the setting {key}")


def _expanded(key: str, path: str | os.PathLike[str]) -> Path:
    """Return a path with `~` replaced by the home directory."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigurationError(
            f"{key}: cannot resolve {os.fspath(path)!r}, since this user has no home directory; set "
            "QWEN3VL_MEM_CACHE or cache_dir to a directory on a disk"
        ) from None
