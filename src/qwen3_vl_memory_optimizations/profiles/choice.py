"""Which profile a machine gets, and the settings that follow."""

from __future__ import annotations

import dataclasses
import difflib
import logging
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
"""The profile that fits this machine, where others name one."""

logger = logging.getLogger(__name__)

_SHIPPED = Path(__file__).resolve().parent
_SUFFIX = ".toml"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Considered:
    """A profile beside a machine."""

    profile: Profile
    conditions: tuple[Condition, ...]

    @property
    def fits(self) -> bool:
        """Whether all conditions are met."""
        return all(condition.met for condition in self.conditions)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, ready for JSON."""
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
    """The profile that was chosen.

    Attributes:
        chosen: may be one that does not fit, where it was asked for by name.
        settings: keys of `MemoryConfig`, sizes in bytes.
        left_out: settings for what this machine does not have, with the reason.
        others: what else was considered, in the order in which it would have been chosen.
    """

    chosen: Considered
    settings: Mapping[str, Any]
    left_out: Mapping[str, str]
    others: tuple[Considered, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the choice as plain values, ready for JSON."""
        return {
            **self.chosen.to_dict(),
            "settings": dict(self.settings),
            "left_out": dict(self.left_out),
            "considered": [other.to_dict() for other in self.others],
        }


def user_directory() -> Path:
    """Return where the user's profiles lie: `profiles` in `$XDG_CONFIG_HOME/qwen3vl-mem`, or `~/.config` of that."""
    # By the XDG rules an empty or relative value counts as none.
    given = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    if not given.is_absolute():
        try:
            given = Path.home() / ".config"
        except RuntimeError:  # a user without a home directory has none there
            given = Path(os.devnull)
    return given / "qwen3vl-mem" / "profiles"


def choose(profile: str, hardware: HardwareProfile | None = None, *, path: str | os.PathLike[str] = ".") -> Choice:
    """Return the profile for a machine.

    Args:
        profile: `auto`, the name of a profile, or a path that ends in `.toml`. With `auto`, of those that fit, the
            user's go first, then the greatest priority, then the name. A named one is taken as it is, whether it fits
            or not.
        hardware: the machine; default: this one.
        path: where the files will lie, for the storage of this one.

    Raises:
        ConfigurationError: no profile has this name, none fits, or a file is wrong.
    """
    # Before this machine is looked at, which imports torch: a mistake is told at once.
    found = _all() if profile == AUTO else [_named(profile)]
    if hardware is None:
        hardware = detect_hardware(path)
    considered = [Considered(profile=each, conditions=each.conditions(hardware)) for each in found]
    chosen = next((each for each in considered if each.fits or profile != AUTO), None)
    if chosen is None:
        raise ConfigurationError(
            f"profile: none of {', '.join(each.name for each in found)} fits this machine; name one, or add one "
            f"in {user_directory()}"
        )
    settings, left_out = chosen.profile.settings(hardware)
    others = tuple(each for each in considered if each is not chosen)
    return Choice(chosen=chosen, settings=settings, left_out=left_out, others=others)


def configure(
    memory_config: Mapping[str, Any] | MemoryConfig | None = None, hardware: HardwareProfile | None = None
) -> MemoryConfig:
    """Return settings in which those of the profile stand where the caller gave none.

    Args:
        memory_config: the keys of `MemoryConfig`. All keys of a dict count as given; of an instance, those that are not
            at their default. Without `profile` nothing is chosen and nothing detected.
        hardware: the machine; default: this one, with the storage of `cache_dir`.

    Returns:
        A `MemoryConfig` whose own `profile` is `None`: it holds the settings now. A `ram_budget` above the limit of
        the control group of this process is lowered to it, with a warning.

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
    """Lower a budget for the process to what its control group allows: above that the kernel would end it."""
    limit = min((group.limit_bytes for group in limiting_groups()), default=None)
    if limit is None or config.ram_budget is None or config.ram_budget <= limit:
        return config
    logger.warning(
        "ram_budget of %s is above the %s that the control group of this process allows (memory limit of a container "
        "or service); %s are used: raise the limit of the group, or give no more",
        format_bytes(config.ram_budget),
        format_bytes(limit),
        format_bytes(limit),
    )
    return dataclasses.replace(config, ram_budget=limit)


def _files() -> dict[str, tuple[Path, bool]]:
    """Return the files of all profiles by name, and whether they are the user's: a name of theirs replaces ours."""
    files = {path.stem: (path, False) for path in sorted(_SHIPPED.glob(f"*{_SUFFIX}"))}
    return files | {path.stem: (path, True) for path in sorted(user_directory().glob(f"*{_SUFFIX}"))}


def _all() -> list[Profile]:
    """Return all profiles, in the order in which one that fits is chosen."""
    found = [load_profile(path, of_user=of_user) for path, of_user in _files().values()]
    return sorted(found, key=lambda each: (not each.of_user, -each.priority, each.name))


def _named(profile: str) -> Profile:
    if profile.endswith(_SUFFIX):
        return load_profile(Path(profile).expanduser())
    files = _files()
    if profile not in files:
        near = difflib.get_close_matches(profile, [*files, AUTO], n=1, cutoff=0.0)[0]
        raise ConfigurationError(
            f"profile: there is no {profile!r}; did you mean {near!r}? There are {AUTO}, {', '.join(files)}, and files "
            f"that end in {_SUFFIX}"
        )
    path, of_user = files[profile]
    return load_profile(path, of_user=of_user)
