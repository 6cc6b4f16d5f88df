"""Rates of this machine: measured in each `generate`, kept per machine, model and codec in `rates.json`."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ...compression.kernels import fastest_dtype
from ...compression.speeds import machine_name
from ...config import MemoryConfig

logger = logging.getLogger(__name__)

RATES_FILE = "rates.json"
VISION, TEXT, DECODE = "vision", "text", "decode"
KINDS = (VISION, TEXT, DECODE)
_NEW_SHARE = 0.5
_LEAST_WRITTEN_S = 0.2
"""Shorter passes are written only where nothing is known: each write takes a millisecond."""
_NEAR, _FAR = 1.0, 3.0
"""Powers of two beyond the measured work: up to the first its rate holds, up to the second it counts as measured."""
_LONG_S = 5.0
"""Work that took this long has the rate of any longer work."""
_USUAL_SHARE = {torch.bfloat16: 0.35, torch.float32: 0.7}
"""Share of the speed of one matrix product that a whole prompt reached in measured runs, rounded down."""
_PROBE_ROWS, _PROBE_COLUMNS, _PROBE_RUNS = 256, 1024, 3


def usual_share() -> float:
    """Return the share of the speed of one product, in the compute dtype, that a prompt usually reaches."""
    return _USUAL_SHARE[fastest_dtype()]


class RunRates:
    """The rates of one model: vision tower, prompt, and decode steps without what they waited for the SSD.

    They are kept per power of two of the work, since attention and small passes are slower per operation; each is the
    running mean of the runs with that much work.

    Args:
        config: locates the file; with `private` nothing is read or written.
        model: names the shapes of the model, its codec and its dtype (see `rates_name`).
        assumed_ops_per_s: where nothing was measured; default: from one matrix product.
    """

    def __init__(self, config: MemoryConfig, model: str, *, assumed_ops_per_s: float | None = None) -> None:
        self._path = None if config.private else config.base_dir / RATES_FILE
        self._model = model
        self._budget = "none" if config.ram_budget is None else str(config.ram_budget)
        self._lock = threading.Lock()
        self._seconds: dict[str, dict[int, float]] | None = None
        self._of_others: dict[str, dict[int, float]] = {}  # of the budget nearest in size
        self._assumed_ops_per_s = assumed_ops_per_s

    def seconds(self, kind: str, ops: float) -> tuple[float, bool]:
        """Return the expected time of work of a kind (see `KINDS`), and whether work of its size was measured.

        The rate is that of the measured work nearest in size. Short work says little of much longer work, since it
        pays for everything that a process does first: what goes beyond it is taken at the speed of a matrix product.
        """
        with self._lock:
            known = self._known()[kind] or self._of_others[kind]
            if not known:
                return ops / self._assumed(), False
            size = math.log2(max(ops, 1.0))
            nearest = min(known, key=lambda each: (abs(each + 0.5 - size), each))
            beyond = size - (nearest + 0.5)
            most_ops = 2.0 ** (nearest + 1)
            if beyond <= _NEAR or most_ops * known[nearest] >= _LONG_S:
                return ops * known[nearest], beyond <= _FAR
            rest_s = (ops - most_ops) * min(known[nearest], 1 / self._assumed())
            return most_ops * known[nearest] + rest_s, beyond <= _FAR

    def knows(self, kind: str) -> bool:
        """Return whether any work of a kind was measured, with this budget or another."""
        with self._lock:
            return bool(self._known()[kind] or self._of_others[kind])

    def note(self, work: dict[str, tuple[float, float]], *, steps: int = 1) -> None:
        """Record a pass: operations and seconds per kind. Errors of the file are logged; they never fail a run.

        Args:
            work: of a pass, or the mean of equal `steps`.
            steps: how many passes were measured.
        """
        with self._lock:
            known = self._known()
            is_new = False
            for kind, (ops, seconds) in work.items():
                if ops <= 0 or seconds <= 0:
                    continue
                size = int(math.log2(max(ops, 1.0)))
                before = known[kind].get(size)
                found = seconds / ops
                known[kind][size] = found if before is None else before + _NEW_SHARE * (found - before)
                is_new = is_new or before is None
            if self._path is not None and (is_new or steps * sum(s for _, s in work.values()) >= _LEAST_WRITTEN_S):
                self._write(self._path)

    def _assumed(self) -> float:
        if self._assumed_ops_per_s is None:
            self._assumed_ops_per_s = usual_share() * _product_ops_per_s()
        return self._assumed_ops_per_s

    def _known(self) -> dict[str, dict[int, float]]:
        """Return seconds per operation by kind and power of two; at first those of the file."""
        if self._seconds is None:
            budgets = {} if self._path is None else _read(self._path).get(machine_name(), {}).get(self._model, {})
            self._seconds = _parsed(budgets.get(self._budget, {}))
            self._of_others = _parsed(budgets.get(_nearest(self._budget, budgets), {}))
        return self._seconds

    def _write(self, path: Path) -> None:
        """Replace the file atomically, with what other processes wrote meanwhile."""
        assert self._seconds is not None
        table = _read(path)
        rates = {kind: {str(size): 1 / each for size, each in known.items()} for kind, known in self._seconds.items()}
        table.setdefault(machine_name(), {}).setdefault(self._model, {})[self._budget] = rates
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
                json.dump(table, file, indent=1)
            os.replace(file.name, path)
        except OSError as error:
            logger.warning("%s: the rates of this run were not stored: %s", path, str(error))


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_bytes())
        for models in table.values():
            for budgets in models.values():
                for kinds in budgets.values():
                    for rates in kinds.values():
                        if not all(float(ops) > 0 and int(size) >= 0 for size, ops in rates.items()):
                            raise ValueError("a rate is not above zero")
        return dict(table)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be used (%s: %s); writing a new one", path, type(error).__name__, str(error))
        return {}


def _parsed(rates: dict[str, Any]) -> dict[str, dict[int, float]]:
    return {kind: {int(size): 1 / ops for size, ops in rates.get(kind, {}).items()} for kind in KINDS}


def _nearest(budget: str, known: dict[str, Any]) -> str | None:
    """Return the budget nearest in size; no budget counts as the largest."""

    def size(text: str) -> float:
        return math.log(float(text)) if text.isdigit() else math.log(1e15)

    names = (each for each in known if each == "none" or each.isdigit())
    return min(names, default=None, key=lambda each: abs(size(each) - size(budget)))


def _product_ops_per_s() -> float:
    """Return the operations per second of one matrix product in the compute dtype; takes a few milliseconds."""
    dtype = fastest_dtype()
    x = torch.ones(_PROBE_ROWS, _PROBE_COLUMNS, dtype=dtype)
    weight = torch.ones(_PROBE_COLUMNS, _PROBE_COLUMNS, dtype=dtype)
    best = math.inf
    with torch.inference_mode():
        for _ in range(_PROBE_RUNS):
            start_s = time.perf_counter()
            F.linear(x, weight)
            best = min(best, time.perf_counter() - start_s)
    return 2 * _PROBE_ROWS * _PROBE_COLUMNS**2 / best
