"""List the models on this machine, and remove one (`list_models`, `remove_model`)."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from ...config import MemoryConfig
from ...errors import ConfigurationError, StorageError
from .hub import CONFIG_FILES, hub_cache, missing_files, name_of_snapshot
from .uses import Use, forget_uses, noted_uses

CHECKPOINT, PACKED = "checkpoint", "packed"
_PACKED_NAME = re.compile(r"(?P<model>.+)-[0-9a-f]{12}-(?P<codec>\w+)(?P<partial>\.partial)?")
_WEIGHTS = (".safetensors", ".gguf")


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A checkpoint or a packed form.

    Attributes:
        name: hub id, directory of a checkpoint, or name of a packed form; accepted by `remove_model`.
        kind: `checkpoint` or `packed`.
        codec: of a packed form.
        source: name of the checkpoint that a packed form was made from, if it is known.
        n_bytes: size on the disk.
        used_at: last use by this library in seconds since 1970; `None`: none recorded.
        complete: no file is missing, and packing has ended.
        directory: where it is; for a model of the hub its folder with all revisions.
        removable: it lies in the hub cache or the cache directory.
    """

    name: str
    kind: str
    codec: str | None
    source: str | None
    n_bytes: int
    used_at: float | None
    complete: bool
    directory: Path
    removable: bool


def list_models(config: MemoryConfig | None = None) -> list[LocalModel]:
    """Return the checkpoints in the hub cache, those that were used from elsewhere, and all packed forms."""
    config = config or MemoryConfig()
    uses = noted_uses(config)
    return [*_of_hub(uses), *_of_elsewhere(uses), *packed_forms(config)]


def _of_hub(uses: list[Use]) -> Iterator[LocalModel]:
    cache = hub_cache()
    for folder in sorted(cache.glob("models--*")) if cache.is_dir() else ():
        snapshots = [
            each for each in folder.glob("snapshots/*") if any((each / name).exists() for name in CONFIG_FILES)
        ]
        if not snapshots and not any(folder.glob("blobs/*.incomplete")):
            continue  # only a tokenizer, or another kind of model
        name = folder.name.removeprefix("models--").replace("--", "/")
        used = [use.used_at for use in uses if use.source is not None and _is_below(Path(use.source), folder)]
        complete = any(not missing_files(each) for each in snapshots)
        size = disk_bytes(folder)
        yield LocalModel(name, CHECKPOINT, None, None, size, max(used, default=None), complete, folder, True)


def _of_elsewhere(uses: list[Use]) -> Iterator[LocalModel]:
    seen: set[str] = set()
    for use in uses:
        if use.source is None or use.source in seen:
            continue
        seen.add(use.source)
        directory = Path(use.source)
        if name_of_snapshot(directory) is not None or not directory.is_dir():
            continue
        size = sum(path.stat().st_size for path in directory.iterdir() if path.suffix in _WEIGHTS and path.is_file())
        complete = not missing_files(directory)
        yield LocalModel(use.source, CHECKPOINT, None, None, size, use.used_at, complete, directory, False)


def packed_forms(config: MemoryConfig) -> Iterator[LocalModel]:
    """Yield the packed forms in the cache directory, unfinished ones included."""
    uses, parent = noted_uses(config), config.packed_dir
    for directory in sorted(parent.iterdir()) if parent.is_dir() else ():
        match = _PACKED_NAME.fullmatch(directory.name)
        if match is None or not directory.is_dir():
            continue
        final = str(parent.absolute() / directory.name.removesuffix(".partial"))
        mine = [use for use in uses if use.packed == final]
        source = next((use.source for use in mine if use.source is not None), None)
        yield LocalModel(
            directory.name,
            PACKED,
            match["codec"],
            None if source is None else name_of_snapshot(Path(source)) or source,
            disk_bytes(directory),
            max((use.used_at for use in mine), default=None),
            match["partial"] is None,
            directory.absolute(),
            True,
        )


def find_model(name: str, config: MemoryConfig | None = None) -> LocalModel:
    """Return the model with a name, or the only one whose name begins with it.

    Raises:
        ConfigurationError: there is none, or more than one.
    """
    models = list_models(config)
    found = [model for model in models if model.name == name] or [
        model for model in models if model.name.startswith(name) or model.name.rpartition("/")[2] == name
    ]
    if len(found) != 1:
        what = ", ".join(model.name for model in found[:4]) or "no model with this name"
        raise ConfigurationError(f"{name}: {what}; name one as qwen3vl-mem models shows it")
    return found[0]


def require_removable(model: LocalModel) -> None:
    """Check that a model may be removed.

    Raises:
        ConfigurationError: it lies in a directory that this library does not manage.
        StorageError: a running process has its files open.
    """
    if not model.removable:
        raise ConfigurationError(
            f"{model.directory}: not in the hub cache or the cache directory; remove this directory yourself"
        )
    users = processes_using(model.directory)
    if users:
        shown = ", ".join(f"{name} (process {pid})" for pid, name in users[:3])
        raise StorageError(
            f"{model.name}: in use by {shown}; remove it when the process has ended", path=model.directory
        )


def remove_model(model: LocalModel, config: MemoryConfig | None = None) -> int:
    """Remove a model and the files that belong to it; return the bytes freed.

    Raises:
        ConfigurationError, StorageError: see `require_removable`; or a file cannot be removed.
    """
    require_removable(model)
    n_bytes = disk_bytes(model.directory)
    try:
        shutil.rmtree(model.directory)
        if model.kind == PACKED:
            final = model.directory.with_name(model.directory.name.removesuffix(".partial"))
            if not final.exists():
                for suffix in (".plan.json", ".lock"):
                    final.with_name(final.name + suffix).unlink(missing_ok=True)
        else:
            shutil.rmtree(model.directory.parent / ".locks" / model.directory.name, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"{error.filename or model.directory}: cannot be removed: {error.strerror}", path=model.directory
        ) from error
    if model.kind == PACKED:
        forget_uses(config or MemoryConfig(), model.directory)
    return n_bytes


def processes_using(directory: Path) -> list[tuple[int, str]]:
    """Return the running processes, by id and name, that have files of a directory open; only those we may inspect."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            links = Path(f"/proc/{process.pid}/fd")
            if any(_is_below(Path(os.readlink(link)), directory.resolve()) for link in _links(links)):
                found.append((process.pid, process.name()))
    return found


def _links(directory: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):  # ended, or of another user
        for link in directory.iterdir():
            with contextlib.suppress(OSError):
                os.readlink(link)
                yield link


def _is_below(path: Path, directory: Path) -> bool:
    return path.is_relative_to(directory)


def disk_bytes(directory: Path) -> int:
    """Return the bytes that the files of a directory occupy; links are not followed."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(folder, name))
                total += status.st_blocks * 512
    return total
