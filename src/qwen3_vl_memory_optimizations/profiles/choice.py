"""Choice of a hardware profile and the resulting settings."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import MemoryConfig
from ..errors import ConfigurationError, format_bytes
from ..hardware import HardwareProfile, detect_hardware
from ..process import limiting_groups
from .profile import Condition, Profile, load_profile

AUTO = "auto"
"""Selects the best matching profile for this machine."""

logger = logging.getLogger(__name__)

_SHIPPED = Path(__file__).resolve().parent
_SUFFIX = ".toml"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Considered:
    """A profile with its conditions evaluated on a machine."""

    profile: Profile
    conditions: tuple[Condition, ...]

    @property
    def fits(self) -> bool:
        """Whether the machine meets all conditions."""
        return all(condition.met for condition in self.conditions)

    def to_dict(self) -> dict[str, Any]:
        """Return the profile and its conditions, ready for JSON."""
        return {
            "name": self.profile.name,
            "file": str(self.profile.path),
            "why": self.profile.why,
            "priority": self.profile.priority,
            "of_user": self.profile.of_user,
            "fits": self.fits,
            "conditions": [dataclasses.asdict(condition) for condition in self.conditions],
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The chosen profile.

    Attributes:
        chosen: the profile; one requested by name may not match the machine.
        settings: keys of `MemoryConfig`, sizes in bytes.
        left_out: settings ignored for lack of hardware, with the reason.
        others: the other candidates, in order of preference.
    """

    chosen: Considered
    settings: Mapping[str, Any]
    left_out: Mapping[str, str]
    others: tuple[Considered, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the choice, ready for JSON."""
        return {
            **self.chosen.to_dict(),
            "settings": dict(self.settings),
            "left_out": dict(self.left_out),
            "considered": [other.to_dict() for other in self.others],
        }


def user_directory() -> Path:
    """Return the directory of user profiles: `qwen3vl-mem/profiles` in `$XDG_CONFIG_HOME`, else in `~/.config`."""
    # The XDG rules ignore empty and relative values.
    given = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    if not given.is_absolute():
        try:
            given = Path.home() / ".config"
        except RuntimeError:  # a user without a home directory has no profiles
            given = Path(os.devnull)
    return given / "qwen3vl-mem" / "profiles"


def choose(profile: str, hardware: HardwareProfile | None = None, *, path: str | os.PathLike[str] = ".") -> Choice:
    """Choose the hardware profile for a machine.

    Args:
        profile: `auto`, the name of a profile, or a path that ends in `.toml`. With `auto`, matching profiles
            are ordered by user profiles first, then highest priority, then name. A named profile is used whether or
            not it matches.
        hardware: the machine; default: this one.
        path: location of the files, to detect the storage type of this machine.

    Raises:
        ConfigurationError: unknown name, no match, or an invalid file.
    """
    # Before hardware detection, which imports torch, so that mistakes are reported at once.
    found = _all() if profile == AUTO else [_named(profile)]
    if hardware is None:
        hardware = detect_hardware(path)
    considered = [Considered(profile=each, conditions=each.conditions(hardware)) for each in found]
    chosen = next((each for each in considered if each.fits or profile != AUTO), None)
    if chosen is None:
        raise ConfigurationError(
            f"profile: none of {', '.join(each.name for each in found)} matches this machine; name one, or add one "
            f"in {user_directory()}"
        )
    settings, left_out = chosen.profile.settings(hardware)
    others = tuple(each for each in considered if each is not chosen)
    return Choice(chosen=chosen, settings=settings, left_out=left_out, others=others)


def configure(
    memory_config: Mapping[str, Any] | MemoryConfig | None = None, hardware: HardwareProfile | None = None
) -> MemoryConfig:
    """Return the settings of the profile, overridden by explicit ones.

    Args:
        memory_config: keys of `MemoryConfig`; explicit keys win. All keys of a dict are explicit; of an instance, those
            that differ from their defaults. Without `profile`, no profile is chosen and no hardware detected.
        hardware: the machine; default: this one, with the storage of `cache_dir`.

    Returns:
        A `MemoryConfig` with the resulting settings and `profile` `None`. A `ram_budget` above the control group limit
        of this process is lowered to it, with a warning.

    Raises:
        ConfigurationError: a bad setting, or see `choose`.
    """
    config = MemoryConfig.from_mapping(memory_config)
    if config.profile is None:
        return _within_group(config)
    choice = choose(config.profile, hardware, path=config.base_dir)
    given: Mapping[str, Any]
    if isinstance(memory_config, Mapping):
        given = memory_config
    else:
        values = {field.name: (getattr(config, field.name), field.default) for field in dataclasses.fields(config)}
        given = {key: value for key, (value, default) in values.items() if value != default}
    name = choice.chosen.profile.name
    logger.info("profile %s: %s", name, {key: value for key, value in choice.settings.items() if key not in given})
    return _within_group(MemoryConfig.from_mapping({**choice.settings, **given, "profile": None}))


def _within_group(config: MemoryConfig) -> MemoryConfig:
    """Lower a process budget to its control group limit: above it, the kernel would kill the process."""
    limit = min((group.limit_bytes for group in limiting_groups()), default=None)
    if limit is None or config.ram_budget is None or config.ram_budget <= limit:
        return config
    lowered = dataclasses.replace(config, ram_budget=limit)
    if config.ram_budget - limit < mmap.PAGESIZE:  # the kernel rounds limits down to pages
        return lowered
    logger.warning(
        "ram_budget of %s exceeds the control group limit of %s for this process (container or service memory limit); "
        "using %s: raise that limit, or lower ram_budget",
        format_bytes(config.ram_budget),
        format_bytes(limit),
        format_bytes(limit),
    )
    return lowered


def _files() -> dict[str, tuple[Path, bool]]:
    """Return the files of all profiles by name, and whether they are user profiles; those replace shipped ones."""
    files = {path.stem: (path, False) for path in sorted(_SHIPPED.glob(f"*{_SUFFIX}"))}
    return files | {path.stem: (path, True) for path in sorted(user_directory().glob(f"*{_SUFFIX}"))}


def _all() -> list[Profile]:
    """Return all profiles in order of preference."""
    found = [load_profile(path, of_user=of_user) for path, of_user in _files().values()]
    return sorted(found, key=lambda each: (not each.of_user, -each.priority, each.name))


def _named(profile: str) -> Profile:
    if profile.endswith(_SUFFIX):
        return load_profile(Path(profile).expanduser())
    files = _files()
    if profile not in files:
        near = difflib.get_close_matches(profile, [*files, AUTO], n=1, cutoff=0.0)[0]
        raise ConfigurationError(
            f"profile: unknown profile {profile!r}; did you mean {near!r}? Use {AUTO}, {', '.join(files)}, or a path "
            f"that ends in {_SUFFIX}"
        )
    path, of_user = files[profile]
    return load_profile(path, of_user=of_user)
