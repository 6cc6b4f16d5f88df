"""Remember which model was used when, and which packed form belongs to which checkpoint (`note_use`, `noted_uses`).

One small file per pair in `models` of the cache directory: processes write without a lock, and the directories of
checkpoints, which may be read-only, are left alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from ...config import MemoryConfig
from ...storage import Checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Use:
    """The last use of a checkpoint in one form.

    Attributes:
        source: directory of the checkpoint; `None`: the packed form was given itself.
        packed: directory of the packed form; `None`: the checkpoint was read directly.
        used_at: seconds since 1970.
    """

    source: str | None
    packed: str | None
    used_at: float


def uses_dir(config: MemoryConfig) -> Path:
    """Return the directory of the records."""
    return config.base_dir / "models"


def note_use(config: MemoryConfig, source: Checkpoint | None, used: Checkpoint | None) -> None:
    """Record that a checkpoint was opened, unless `private` is set; a failure is logged.

    Args:
        config: locates the records.
        source: the checkpoint as given.
        used: what its weights are read from: the packed form, or `source` itself.
    """
    if source is None or used is None or config.private:
        return
    original = None if source.packed else str(source.directory.absolute())
    packed = str(used.directory.absolute()) if used.packed else None
    directory = uses_dir(config)
    path = directory / f"{xxhash.xxh3_64_hexdigest(repr((original, packed)).encode())}.json"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=directory, prefix=".use.", delete=False) as file:
            json.dump(asdict(Use(original, packed, time.time())), file)
        os.replace(file.name, path)
    except OSError as error:
        logger.info("%s: the use of a model was not recorded: %s", path, str(error))


def noted_uses(config: MemoryConfig) -> list[Use]:
    """Return all records, latest first."""
    return [use for _, use in _records(config)]


def forget_uses(config: MemoryConfig, path: Path) -> None:
    """Remove the records of a directory."""
    for record, use in _records(config):
        if str(path) in (use.source, use.packed):
            with contextlib.suppress(OSError):
                record.unlink()


def _records(config: MemoryConfig) -> list[tuple[Path, Use]]:
    found = []
    for path in uses_dir(config).glob("*.json"):
        try:
            stored = json.loads(path.read_bytes())
            found.append((path, Use(stored["source"], stored["packed"], float(stored["used_at"]))))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # removed meanwhile, or not a record
    return sorted(found, key=lambda pair: pair[1].used_at, reverse=True)
