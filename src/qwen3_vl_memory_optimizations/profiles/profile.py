"""A hardware profile: a TOML file with conditions, settings and a reason."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config import MemoryConfig, parse_size
from ..errors import ConfigurationError, format_bytes
from ..hardware import STORAGE_TYPES, HardwareProfile

RAM_SHARES = ("ram_budget", "tensor_budget", "l2_cache_size", "memory_pool_size")
"""Settings that may be a share of memory, such as `"60%"`."""
GPU_SHARES = ("gpu_budget", "l1_cache_size")
"""Settings that may be a share of GPU memory."""

_KEYS = ("why", "priority", "match", "memory_config")
_MATCH_KEYS = (
    *("ram_from", "ram_below", "gpu", "gpu_memory_from", "gpu_memory_below"),
    *("gpu_compute_capability", "storage", "cpu_model"),
)
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """A condition of a profile, and what the machine has.

    Attributes:
        wanted: such as `memory from 6 GB to below 12 GB`.
        found: such as `8.2 GB`.
    """

    wanted: str
    found: str
    met: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Settings for a class of machines.

    Attributes:
        name: file name without its suffix.
        of_user: added by the user; preferred over shipped profiles.
        why: its purpose, in one line.
        priority: the highest of several matching profiles wins.
        match: conditions; without any, every machine matches.
        memory_config: keys of `MemoryConfig`; sizes may be shares.
    """

    name: str
    path: Path
    of_user: bool
    why: str
    priority: int
    match: Mapping[str, Any]
    memory_config: Mapping[str, Any]

    def conditions(self, hardware: HardwareProfile) -> tuple[Condition, ...]:
        """Return each condition with what the machine has; the profile matches if all are met."""
        match, gpu, found = self.match, hardware.gpu, []
        gpu_text = "none" if gpu is None else f"{gpu.name}, {format_bytes(gpu.total_bytes)}"
        if "ram_from" in match or "ram_below" in match:
            wanted, met = _within("memory", match.get("ram_from"), match.get("ram_below"), hardware.ram_bytes)
            found.append(Condition(wanted=wanted, found=format_bytes(hardware.ram_bytes), met=met))
        if "gpu" in match:
            wanted = "a GPU" if match["gpu"] == "any" else "no GPU"
            found.append(Condition(wanted=wanted, found=gpu_text, met=(gpu is not None) == (match["gpu"] == "any")))
        if "gpu_memory_from" in match or "gpu_memory_below" in match:
            size = None if gpu is None else gpu.total_bytes
            wanted, met = _within("GPU memory", match.get("gpu_memory_from"), match.get("gpu_memory_below"), size)
            found.append(Condition(wanted=wanted, found=gpu_text, met=met))
        if "gpu_compute_capability" in match:
            capability = "none" if gpu is None else "{}.{}".format(*gpu.compute_capability)
            wanted = f"GPU of compute capability {' or '.join(match['gpu_compute_capability'])}"
            met = capability in match["gpu_compute_capability"]
            found.append(Condition(wanted=wanted, found=capability, met=met))
        if "storage" in match:
            wanted = f"storage {' or '.join(match['storage'])}"
            met = hardware.storage_type in match["storage"]
            found.append(Condition(wanted=wanted, found=hardware.storage_type, met=met))
        if "cpu_model" in match:
            met = re.search(match["cpu_model"], hardware.cpu_model, re.IGNORECASE) is not None
            found.append(Condition(wanted=f"processor {match['cpu_model']}", found=hardware.cpu_model, met=met))
        return tuple(found)

    def settings(self, hardware: HardwareProfile) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the settings for a machine, sizes in bytes, and the ignored settings with the reason."""
        settings: dict[str, Any] = {}
        left_out = {}
        for key, value in self.memory_config.items():
            share = _share(key, value)
            if share is None:
                settings[key] = value
            elif key in RAM_SHARES:
                settings[key] = int(hardware.ram_bytes * share)
            elif hardware.gpu is not None:
                settings[key] = int(hardware.gpu.total_bytes * share)
            else:
                left_out[key] = f"{value} of GPU memory, but there is no GPU"
        config = MemoryConfig.from_mapping(settings)
        return {key: getattr(config, key) for key in settings}, left_out


def load_profile(path: Path, *, of_user: bool = True) -> Profile:
    """Load a profile from a file.

    Raises:
        ConfigurationError: not TOML, an unknown key (with the nearest valid one) or an invalid value; the error names
            the file and, if known, the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot read this profile ({error})") from error
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        number = int(line[1]) if line else max(1, len(text.splitlines()))
        raise ConfigurationError(f"{path}, line {number}: not TOML: {error}") from error
    checked = _Checked(path, text)
    checked.known("", table, _KEYS)
    match = checked.table("match", table)
    checked.known("match", match, _MATCH_KEYS)
    settings = checked.table("memory_config", table)
    for key, value in settings.items():
        with checked.at("memory_config", key):
            if key == "profile":
                raise ConfigurationError("memory_config: a profile cannot refer to another profile; remove this key")
            MemoryConfig.from_mapping({key: value if _share(key, value) is None else 2**30})
    return Profile(
        name=path.stem,
        path=path,
        of_user=of_user,
        why=checked.text("why", table),
        priority=checked.priority(table),
        match={key: checked.condition(key, value) for key, value in match.items()},
        memory_config=settings,
    )


def _within(what: str, least: int | None, below: int | None, found: int | None) -> tuple[str, bool]:
    """Return a range as text, and whether a figure is within it; `None` is not."""
    parts = [] if least is None else [f"from {format_bytes(least)}"]
    parts += [] if below is None else [f"below {format_bytes(below)}"]
    met = found is not None and (least is None or found >= least) and (below is None or found < below)
    return f"{what} {' to '.join(parts)}", met


def _share(key: str, value: object) -> float | None:
    """Return the share that a setting is given as; `None`: not a share.

    Raises:
        ConfigurationError: this setting cannot be a share, or the share is outside (0 %, 100 %].
    """
    match = _SHARE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    if key not in RAM_SHARES + GPU_SHARES:
        raise ConfigurationError(
            f"{key}: {value!r}: percentages are only for {', '.join(RAM_SHARES + GPU_SHARES)}; use a size"
        )
    share = float(match[1]) / 100
    if not 0 < share <= 1:
        raise ConfigurationError(f"{key}: {value!r} is outside 0 % to 100 %")
    return share


class _Checked:
    """Validates the parts of one file; errors name the file and line."""

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._lines = path, text.splitlines()

    @contextlib.contextmanager
    def at(self, section: str, key: str) -> Iterator[None]:
        """Add the location of a key to each `ConfigurationError` of a block."""
        try:
            yield
        except ConfigurationError as error:
            number = self._line_of(section, key)
            place = f"{self._path}" if number is None else f"{self._path}, line {number}"
            raise ConfigurationError(f"{place}: {error}") from error

    def _line_of(self, section: str, key: str) -> int | None:
        current = ""
        for number, line in enumerate(self._lines, 1):
            header = re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line)
            if header is not None:
                current = header[1]
                if not section and current == key:
                    return number
            elif current == section and re.match(rf"""\s*["']?{re.escape(key)}["']?\s*=""", line):
                return number
        return None

    def known(self, section: str, table: Mapping[str, Any], keys: Iterable[str]) -> None:
        """Reject keys that are not in `keys`."""
        for key in table:
            if key not in keys:
                near = difflib.get_close_matches(key, list(keys), n=1, cutoff=0.0)[0]
                with self.at(section, key):
                    raise ConfigurationError(f"{section or 'profile'}: unknown key {key!r}; did you mean {near!r}?")

    def table(self, key: str, table: Mapping[str, Any]) -> dict[str, Any]:
        """Return a required table."""
        with self.at("", key):
            if not isinstance(table.get(key), dict):
                raise ConfigurationError(f"a profile needs a table [{key}]; add it, even if empty")
        return dict(table[key])

    def text(self, key: str, table: Mapping[str, Any]) -> str:
        """Return a required line of text."""
        with self.at("", key):
            value = table.get(key)
            if not isinstance(value, str) or not value.strip() or "\n" in value:
                raise ConfigurationError(f"{key}: expected a line of text, got {value!r}")
            return value.strip()

    def priority(self, table: Mapping[str, Any]) -> int:
        """Return the priority; default 0."""
        with self.at("", "priority"):
            value = table.get("priority", 0)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigurationError(f"priority: expected a whole number, got {value!r}")
            return value

    def condition(self, key: str, value: object) -> Any:
        """Return a condition as `Profile.conditions` expects it."""
        with self.at("match", key):
            if key in ("ram_from", "ram_below", "gpu_memory_from", "gpu_memory_below"):
                return parse_size(value, key=key)
            if key == "gpu":
                if value not in ("any", "none"):
                    raise ConfigurationError(f"gpu: {value!r} is not one of any, none")
                return value
            if key == "cpu_model":
                return _pattern(value)
            texts = [value] if isinstance(value, str) else value
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise ConfigurationError(f"{key}: expected a string or a list of strings, got {value!r}")
            wrong = [text for text in texts if not _is_allowed(key, text)]
            if wrong:
                allowed = ", ".join(STORAGE_TYPES) if key == "storage" else "strings such as '6.1'"
                raise ConfigurationError(f"{key}: {wrong[0]!r} is not one of {allowed}")
            return texts


def _is_allowed(key: str, text: str) -> bool:
    return text in STORAGE_TYPES if key == "storage" else re.fullmatch(r"\d+\.\d+", text) is not None


def _pattern(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigurationError(f"cpu_model: expected a regular expression, got {value!r}")
    try:
        re.compile(value)
    except re.error as error:
        raise ConfigurationError(f"cpu_model: {value!r} is not a regular expression: {error}") from error
    return value
