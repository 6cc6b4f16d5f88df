"""Store the machine measurements that determine how to compute, so that all processes compute alike."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path

from ...compression.kernels import bf16_cost, use_bf16_cost
from ...compression.speeds import machine_name
from ...config import MemoryConfig

logger = logging.getLogger(__name__)

MACHINE_FILE = "machine.json"


def recall_bf16_cost(config: MemoryConfig) -> None:
    """Use the cost of bf16 products measured by the first process on this machine; the first process stores it.

    It is stored per machine, instruction set and torch version in `machine.json` in the cache directory, unless
    `private` is set. Read and write errors are logged, and this process uses its own measurement.

    Args:
        config: locates the caches.
    """
    path = config.base_dir / MACHINE_FILE
    kept, name = _read(path), machine_name()
    if name in kept:
        use_bf16_cost(kept[name])
    elif not config.private:
        _write(path, {**kept, name: bf16_cost()})


def _read(path: Path) -> dict[str, float]:
    try:
        return {str(name): float(cost) for name, cost in json.loads(path.read_bytes())["bf16_cost"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be used (%s: %s); writing a new one", path, type(error).__name__, str(error))
        return {}


def _write(path: Path, costs: dict[str, float]) -> None:
    """Replace the file atomically: of processes that start together, one leaves its figures."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            json.dump({"bf16_cost": costs}, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("%s: the machine's measurements were not stored: %s", path, str(error))
