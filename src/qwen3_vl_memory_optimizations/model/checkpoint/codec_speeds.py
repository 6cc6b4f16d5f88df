"""Measure codec speeds on this machine once, and store them beside the packed checkpoints."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path

from ...compression import CodecSpeeds, measure_codec_speeds
from ...compression.speeds import machine_name
from ...config import MemoryConfig
from ...storage import measure_scratch_bandwidth

logger = logging.getLogger(__name__)

SPEEDS_FILE = "codec-speeds.json"
_PROBE_BYTES = 64 << 20


def codec_speeds(config: MemoryConfig, *, measure_again: bool = False) -> CodecSpeeds:
    """Return this machine's codec speeds from `codec-speeds.json` in the directory of packed checkpoints.

    If the file is missing, or from another machine or torch version, they are measured (a few seconds) and stored.

    Args:
        config: locates the packed checkpoints.
        measure_again: ignore stored speeds.

    Raises:
        StorageError: the directory cannot be written, or its disk has no room for a probe of 64 MiB.
    """
    path = config.packed_dir / SPEEDS_FILE
    if not measure_again:
        stored = _read(path)
        if stored is not None and stored.machine == machine_name():
            return stored
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    speeds = measure_codec_speeds(measure_scratch_bandwidth(path.parent, total_bytes=_PROBE_BYTES))
    _write(path, speeds)
    return speeds


def _read(path: Path) -> CodecSpeeds | None:
    try:
        return CodecSpeeds.from_dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be used (%s); measuring the codec speeds again", path, str(error))
        return None


def _write(path: Path, speeds: CodecSpeeds) -> None:
    """Replace the file atomically; concurrent readers see the old or the new one."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        json.dump(speeds.to_dict(), file, indent=1)
    os.replace(file.name, path)
