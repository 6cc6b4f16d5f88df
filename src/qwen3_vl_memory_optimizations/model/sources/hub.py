"""Turn the name of a model into a path: a local path, or the id of a model of the hub (`local_path`)."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ...errors import CheckpointError, format_bytes

logger = logging.getLogger(__name__)

CONFIG_FILES = ("config.json", "adapter_config.json")
SINGLE_FILES = ("model.safetensors", "adapter_model.safetensors")
INDEX_FILE = "model.safetensors.index.json"
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.\-]*"
_ID = re.compile(rf"(?P<repo>{_PART}/{_PART})(@(?P<revision>[^@\s]+))?")
DEFAULT_REVISION = "main"


class HubName(NamedTuple):
    """A model of the hub: `owner/name`, or `owner/name@revision`."""

    repo: str
    revision: str

    def __str__(self) -> str:
        return self.repo if self.revision == DEFAULT_REVISION else f"{self.repo}@{self.revision}"


def hub_name(name: str) -> HubName | None:
    """Return the hub id that a text spells, or `None`; whether the model exists is not checked."""
    match = _ID.fullmatch(name)
    if match is None or ".." in name or "--" in name:
        return None
    return HubName(match["repo"], match["revision"] or DEFAULT_REVISION)


def local_path(name: str | os.PathLike[str], progress: Callable[[str, int, int], None] | None = None) -> Path:
    """Return the path of a model: `name` itself, or the snapshot in the hub cache if it is an id.

    A path that exists comes first. A model that is not complete in the hub cache is downloaded, unless `HF_HUB_OFFLINE`
    is set.

    Args:
        name: a path, `owner/name` or `owner/name@revision`.
        progress: called with a description, the bytes done and the total bytes of a download.

    Raises:
        CheckpointError: an id that is not in the hub cache and cannot be downloaded.
        InsufficientDiskSpaceError: the disk lacks room for the download.
    """
    path = Path(name)
    try:
        path = path.expanduser()
    except RuntimeError:  # `~` of a user without a home directory
        pass
    hub = hub_name(name) if isinstance(name, str) else hub_name(str(name))
    if hub is None or path.exists():
        return path
    directory = snapshot(hub)
    if directory is not None and not missing_files(directory):
        return directory
    from .download import plan_download

    try:
        download = plan_download(hub)
    except CheckpointError as error:
        if directory is not None:
            raise
        raise CheckpointError(f"no such path on this machine; as an id of the hub, {error}", path=path) from error
    logger.info("downloading %s: %s to %s", hub, format_bytes(download.missing_bytes), hub_cache())
    return download.run(progress)


def hub_cache() -> Path:
    """Return the directory of the hub cache: `HF_HUB_CACHE`, or `hub` in `HF_HOME`."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def snapshot(hub: HubName, cache: Path | None = None) -> Path | None:
    """Return the directory of a model in the hub cache, possibly incomplete; `None` if there is none.

    Args:
        hub: the model.
        cache: the hub cache; default: that of huggingface_hub.
    """
    from huggingface_hub import try_to_load_from_cache

    for name in CONFIG_FILES:
        found = try_to_load_from_cache(hub.repo, name, cache_dir=cache or hub_cache(), revision=hub.revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def missing_files(directory: Path) -> list[str]:
    """Return the names of files that a checkpoint needs and its directory lacks; empty if it is complete."""
    if any((directory / name).is_file() for name in SINGLE_FILES) or any(directory.glob("*.gguf")):
        return []
    try:
        weights = json.loads((directory / INDEX_FILE).read_bytes())["weight_map"]
        shards = sorted({str(name) for name in weights.values()})
    except FileNotFoundError:
        return [SINGLE_FILES[0]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [INDEX_FILE]
    return [name for name in shards if not (directory / name).is_file()]


def name_of_snapshot(directory: Path) -> str | None:
    """Return the hub id of a directory in a hub cache (`models--owner--name/snapshots/...`), or `None`."""
    folder = directory.parent.parent.name
    if directory.parent.name != "snapshots" or not folder.startswith("models--"):
        return None
    return folder.removeprefix("models--").replace("--", "/")
