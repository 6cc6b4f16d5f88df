"""The speeds of codecs on this machine, measured once and kept beside the packed checkpoints."""

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
    """Return the speeds of this machine from `codec-speeds.json` in the directory of packed checkpoints.

    Where there are none, or those of another machine or version of torch, they are measured (a few seconds) and kept.

    Args:
        config: says where packed checkpoints lie.
        measure_again: whatever is kept.

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
        logger.warning("%s cannot be used (%s); the speeds of codecs are measured again", path, str(error))
        return None


def _write(path: Path, speeds: CodecSpeeds) -> None:
    """Replace the file in one step; whoever reads it meanwhile has the old one or the new one."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        json.dump(speeds.to_dict(), file, indent=1)
    os.replace(file.name, path)
