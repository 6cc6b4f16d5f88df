"""Defaults of options that the user sets: environment variables, and the config file."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigurationError

PREFIX = "QWEN3VL_MEM_"


def option_name(param: Any) -> str:
    """Return the long name of an option without its dashes, as the config file has it."""
    return str(max(param.opts, key=len)).lstrip("-")


def environment_name(param: Any) -> str | None:
    """Return the environment variable of an option; `None`: it is one of a single call, such as a question."""
    if param.envvar is not None:
        return str(param.envvar)
    if not param.allow_from_autoenv or option_name(param) == "help":
        return None
    return PREFIX + option_name(param).upper().replace("-", "_")


def config_file() -> Path:
    """Return the path of the config file: `qwen3vl-mem/config.toml` in `$XDG_CONFIG_HOME`, else in `~/.config`."""
    from ...profiles import user_directory

    return user_directory().parent / "config.toml"


def file_defaults(program: Any) -> dict[str, Any]:
    """Return the defaults in the config file, by command and parameter, as `Context.default_map` takes them.

    Keys at the top are for each command that has the option; a table is for one command, and wins.

    Args:
        program: the group of all commands.

    Raises:
        ConfigurationError: not TOML, an unknown key or command, or a value of another type.
    """
    table = _read(config_file())
    commands = program.commands
    options = {name: _options(command) for name, command in commands.items()}
    common = {key: value for key, value in table.items() if not isinstance(value, dict)}
    every = dict.fromkeys(key for each in options.values() for key in each)
    for key, value in table.items():
        if isinstance(value, dict):
            _check("", key, commands)
            for inner in value:
                _check(key, inner, options[key])
        else:
            _check("", key, every)
    found: dict[str, Any] = {}
    for name, command in commands.items():
        given = {**_named(common), **_named(table.get(name, {}))}
        found[name] = _values(command, given)
    return found


def active_defaults(program: Any) -> list[tuple[str, str, str]]:
    """Return the defaults that are set: option, value and where it comes from; a variable before the file."""
    rows = []
    names = dict.fromkeys(
        variable
        for command in program.commands.values()
        for param in _options(command).values()
        if (variable := environment_name(param)) is not None
    )
    rows += [(name, os.environ[name], "environment") for name in names if os.environ.get(name)]
    path = config_file()
    for key, value in _read(path).items():
        inner = value.items() if isinstance(value, dict) else [(key, value)]
        section = f"[{key}] " if isinstance(value, dict) else ""
        rows += [(f"{section}{name}", str(setting), str(path)) for name, setting in inner]
    return rows


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot read this config file ({error})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path}: not TOML: {error}") from error


def _options(command: Any) -> dict[str, Any]:
    """Return the options of a command and of its subcommands that may have a default, by name."""
    found = {
        option_name(param): param
        for param in command.params
        if param.param_type_name == "option" and environment_name(param) is not None
    }
    for subcommand in getattr(command, "commands", {}).values():
        found |= _options(subcommand)
    return found


def _named(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("_", "-"): value for key, value in table.items()}


def _values(command: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values for a command by parameter, and those of its subcommands by their names."""
    values: dict[str, Any] = {
        param.name: _value(option_name(param), param, given[option_name(param)])
        for param in command.params
        if param.param_type_name == "option" and environment_name(param) is not None and option_name(param) in given
    }
    for name, subcommand in getattr(command, "commands", {}).items():
        values[name] = _values(subcommand, given)
    return values


def _value(key: str, param: Any, value: Any) -> Any:
    """Return a value as the command line would have it."""
    if param.is_flag:
        if not isinstance(value, bool):
            raise ConfigurationError(f"{config_file()}: {key}: expected true or false, got {value!r}")
        return value
    several = value if isinstance(value, list) else [value]
    if any(isinstance(each, bool) or not isinstance(each, str | int | float) for each in several):
        raise ConfigurationError(f"{config_file()}: {key}: expected a string or a number, got {value!r}")
    if param.multiple:
        return [str(each) for each in several]
    if isinstance(value, list):
        raise ConfigurationError(f"{config_file()}: {key}: expected one value, got {value!r}")
    return str(value)


def _check(section: str, key: str, known: Iterable[str]) -> None:
    """Raise an error with the nearest name if a key is unknown."""
    if key.replace("_", "-") in known:
        return
    near = difflib.get_close_matches(key.replace("_", "-"), list(known), n=1, cutoff=0.0)[0]
    place = f"[{section}] " if section else ""
    raise ConfigurationError(f"{config_file()}: unknown key {place}{key!r}; did you mean {near!r}?")
