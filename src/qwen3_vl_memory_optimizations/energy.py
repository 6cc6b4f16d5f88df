"""Cost of computing: CPU seconds of this process, and joules if the machine measures them.

Joules come from RAPL (processor packages, and their memory if measured) and from NVML (NVIDIA GPUs from Volta on). They
are those of the **whole machine**, including everything else that runs on it. What a machine does not measure is
reported as absent, with the reason; nothing is estimated.
"""

from __future__ import annotations

import dataclasses
import os
import re
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from .process import read_int, read_lines

WATCH_INTERVAL_S = 30.0
"""Time between counter readings: at 1 kW the smallest counter (65 kJ) wraps around after 65 s."""

_POWERCAP = "sys/class/powercap"
_DOMAIN = re.compile(r"intel-rapl:(\d+)(:\d+)?")


class _Counter(Protocol):
    """Counts the energy of one part of the machine."""

    name: str
    range_uj: int | None

    def read_uj(self) -> int:
        """Return the count in microjoules; it wraps around to 0 after `range_uj`, if that is a number."""
        ...


class EnergyMeter:
    """Measures the machine's energy use from `start` on.

    Its methods are thread-safe. Its own thread reads the counters every `watch_interval_s` between `start` and `close`,
    so that no wraparound is missed; without counters there is no thread.

    Args:
        root: root of the tree that holds `/sys`.
        watch_interval_s: time between its own readings.

    Attributes:
        counters: names of the counters: `package-0` (a processor), `package-0/dram` (its memory), `gpu-0`.
        absent: `processor` or `gpu`, if not measured, with the reason.
    """

    def __init__(self, *, root: str | os.PathLike[str] = "/", watch_interval_s: float = WATCH_INTERVAL_S) -> None:
        self.absent: dict[str, str] = {}
        self._nvml: Any = None
        self._counters: list[_Counter] = [*self._open_rapl(Path(root)), *self._open_nvml()]
        self._watch_interval_s = watch_interval_s
        self._lock = threading.Lock()
        self._last_uj: dict[str, int] = {}
        self._taken_uj: dict[str, int] = {}
        self._is_whole = True
        self._stopped = threading.Event()
        self._watch: threading.Thread | None = None

    @property
    def counters(self) -> tuple[str, ...]:
        """The names of the counters."""
        return tuple(counter.name for counter in self._counters)

    def start(self) -> None:
        """Start measuring from zero; calling it again restarts."""
        with self._lock:
            self._last_uj, self._taken_uj, self._is_whole = {}, {}, True
            self._look()
        if self._counters and self._watch is None:
            self._watch = threading.Thread(target=self._keep_looking, name="energy-meter", daemon=True)
            self._watch.start()

    def read(self) -> float | None:
        """Return the joules since `start`, summed over all counters.

        `None`: not started, a counter was lost since, or the processors are not measured, because the energy of a GPU
        alone is not that of a run.
        """
        parts = self.read_parts()
        if not self._is_whole or not any(name.startswith("package") for name in parts):
            return None
        return sum(parts.values())

    def read_parts(self) -> dict[str, float]:
        """Return the joules since `start`, by counter."""
        with self._lock:
            if self._last_uj:
                self._look()
            return {name: taken / 1e6 for name, taken in self._taken_uj.items()}

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return what is measured of `processor` and `gpu`, or why not, as plain values, ready for JSON."""
        return {
            part: {
                "counters": [counter.name for counter in self._counters if _part_of(counter) == part],
                "absent": self.absent.get(part),
            }
            for part in ("processor", "gpu")
        }

    def close(self) -> None:
        """Stop permanently."""
        self._stopped.set()
        if self._watch is not None:
            self._watch.join()
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
            self._nvml = None

    def __enter__(self) -> EnergyMeter:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- counting -----------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Add the energy used since the last reading. The lock is held."""
        for counter in list(self._counters):
            try:
                now = counter.read_uj()
            except Exception as error:  # NVML's errors and file errors share no base class
                self._lose(counter, f"{counter.name}: reading failed after earlier successes ({error})")
                continue
            taken = now - self._last_uj.get(counter.name, now)
            if taken < 0:
                if counter.range_uj is None:
                    self._lose(counter, f"{counter.name}: the counter was reset")
                    continue
                taken += counter.range_uj
            self._last_uj[counter.name] = now
            self._taken_uj[counter.name] = self._taken_uj.get(counter.name, 0) + taken

    def _lose(self, counter: _Counter, reason: str) -> None:
        """Drop a counter and all others in the same sum, because a partial sum is not a valid figure."""
        part = _part_of(counter)
        self.absent[part] = reason
        self._is_whole = False
        for each in [each for each in self._counters if _part_of(each) == part]:
            self._counters.remove(each)
            self._last_uj.pop(each.name, None)
            self._taken_uj.pop(each.name, None)

    def _keep_looking(self) -> None:
        while not self._stopped.wait(self._watch_interval_s):
            with self._lock:
                self._look()

    # --- what there is ------------------------------------------------------------------------------------------------

    def _open_rapl(self, root: Path) -> list[_Counter]:
        base = root / _POWERCAP
        domains = {path.name: path for path in base.glob("intel-rapl:*") if _DOMAIN.fullmatch(path.name)}
        names = {domain: next(iter(read_lines(path / "name")), "").strip() for domain, path in domains.items()}
        # A package contains its cores and graphics, but not its memory, although the tree shows memory below it.
        # `psys` contains the packages, and `intel-rapl-mmio` lists them again: neither is counted.
        counters: list[_Counter] = []
        for domain, path in sorted(domains.items()):
            above = domain.rsplit(":", 1)[0]
            if names[domain].startswith("package"):
                name = names[domain]
            elif names[domain] == "dram" and names.get(above, "").startswith("package"):
                name = f"{names[above]}/dram"
            else:
                continue
            try:
                counters.append(_RaplCounter(name, path))
            except PermissionError:
                self.absent["processor"] = (
                    f"{path / 'energy_uj'} is readable by root only (since Linux 5.10, as it can leak data); "
                    f"until the next boot, this opens it: sudo chmod a+r /{_POWERCAP}/intel-rapl:*/energy_uj"
                )
                return []
            except (OSError, ValueError) as error:
                self.absent["processor"] = f"{path / 'energy_uj'} cannot be read: {error}"
                return []
        if not counters:
            self.absent["processor"] = (
                f"the system shows no package in {base}: most virtual machines and containers do not; elsewhere, load "
                "the modules intel_rapl_common and intel_rapl_msr"
            )
        return counters

    def _open_nvml(self) -> list[_Counter]:
        try:
            import pynvml
        except ImportError:
            self.absent["gpu"] = "nvidia-ml-py is not installed; for an NVIDIA GPU, install the extra `energy`"
            return []
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            self.absent["gpu"] = f"no NVIDIA driver ({error})"
            return []
        counters: list[_Counter] = []
        try:
            for index in range(pynvml.nvmlDeviceGetCount()):
                counters.append(_NvmlCounter(f"gpu-{index}", pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)))
        except pynvml.NVMLError as error:
            pynvml.nvmlShutdown()
            self.absent["gpu"] = f"gpu-{len(counters)} does not measure its energy ({error}); GPUs from Volta on do"
            return []
        if not counters:
            pynvml.nvmlShutdown()
            self.absent["gpu"] = "there is no NVIDIA GPU"
            return []
        self._nvml = pynvml
        return counters


class _RaplCounter:
    """A RAPL domain: a file that counts microjoules and wraps around to 0 after its range."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self._path = name, directory / "energy_uj"
        self.range_uj: int | None = read_int(directory / "max_energy_range_uj") or None
        self.read_uj()

    def read_uj(self) -> int:
        return int(self._path.read_text())


class _NvmlCounter:
    """A GPU: counts from driver start in 64 bits, which never wrap around."""

    def __init__(self, name: str, nvml: Any, handle: Any) -> None:
        self.name, self._nvml, self._handle = name, nvml, handle
        self.range_uj: int | None = None
        self.read_uj()

    def read_uj(self) -> int:
        return 1000 * int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))


def _part_of(counter: _Counter) -> str:
    return "processor" if counter.name.startswith("package") else "gpu"


# --- a token ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Resources used so far.

    Attributes:
        cpu_s: CPU time of all threads of this process, in user and system mode.
        joules: of the machine; `None`: not measured.
    """

    cpu_s: float
    joules: float | None

    @classmethod
    def now(cls, meter: EnergyMeter | None = None) -> Cost:
        """Return the cost so far, with the joules of a started meter."""
        return cls(cpu_s=time.process_time(), joules=None if meter is None else meter.read())

    def per_token(self, until: Cost, tokens: int) -> dict[str, float | None]:
        """Return `cpu_s_per_token` and `joules_per_token` between this cost and a later one."""
        joules = None
        if tokens and self.joules is not None and until.joules is not None:
            joules = (until.joules - self.joules) / tokens
        return {
            "cpu_s_per_token": (until.cpu_s - self.cpu_s) / tokens if tokens else None,
            "joules_per_token": joules,
        }
