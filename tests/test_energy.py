"""Energy: what a tree of `/sys` counts, what it hides, and a library of NVIDIA's that is played by a stand-in."""

import os
import shutil
import stat
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

import pytest

from qwen3_vl_memory_optimizations.energy import Cost, EnergyMeter

RANGE_UJ = 262_143_328_850


class Machine:
    """A `/sys/class/powercap` whose counters are set by hand."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = root / "sys/class/powercap"
        (self.base / "intel-rapl").mkdir(parents=True)

    def add(self, domain: str, name: str, uj: int = 0, range_uj: int | None = RANGE_UJ) -> None:
        directory = self.base / domain
        directory.mkdir()
        (directory / "name").write_text(f"{name}\n")
        if range_uj is not None:
            (directory / "max_energy_range_uj").write_text(f"{range_uj}\n")
        self.set(domain, uj)

    def set(self, domain: str, uj: int) -> None:
        # Replaced at once: a meter's own thread may be reading it.
        path = self.base / domain / "energy_uj"
        path.with_name("new").write_text(f"{uj}\n")
        path.with_name("new").replace(path)

    def meter(self, **options) -> EnergyMeter:
        return EnergyMeter(root=self.root, **options)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture(autouse=True)
def no_nvml(monkeypatch):
    """Play a machine without the library of NVIDIA, unless a test plays another one."""
    monkeypatch.setitem(sys.modules, "pynvml", None)


def test_packages_and_their_memory_are_added_and_nothing_twice(machine):
    # A server with two sockets; cores and graphics are in the package, the platform contains both packages.
    machine.add("intel-rapl:0", "package-0")
    machine.add("intel-rapl:0:0", "core")
    machine.add("intel-rapl:0:1", "uncore")
    machine.add("intel-rapl:0:2", "dram")
    machine.add("intel-rapl:1", "package-1")
    machine.add("intel-rapl:1:0", "dram")
    machine.add("intel-rapl:2", "psys")
    machine.add("intel-rapl-mmio:0", "package-0")
    joules = {
        "intel-rapl:0": 1,
        "intel-rapl:0:0": 10,
        "intel-rapl:0:1": 100,
        "intel-rapl:0:2": 1_000,
        "intel-rapl:1": 10_000,
        "intel-rapl:1:0": 100_000,
        "intel-rapl:2": 1_000_000,
        "intel-rapl-mmio:0": 10_000_000,
    }
    with machine.meter() as meter:
        assert meter.counters == ("package-0", "package-0/dram", "package-1", "package-1/dram")
        for domain, taken in joules.items():
            machine.set(domain, taken * 1_000_000)
        assert meter.read_parts() == {
            "package-0": 1,
            "package-0/dram": 1_000,
            "package-1": 10_000,
            "package-1/dram": 100_000,
        }
        assert meter.read() == 111_001


def test_joules_are_those_since_the_start(machine):
    machine.add("intel-rapl:0", "package-0", uj=5_000_000)
    with machine.meter() as meter:
        assert meter.read() == 0.0
        machine.set("intel-rapl:0", 7_500_000)
        assert meter.read() == 2.5
        assert meter.read() == 2.5, "reading takes nothing away"
        machine.set("intel-rapl:0", 8_000_000)
        assert meter.read() == 3.0
        meter.start()
        machine.set("intel-rapl:0", 8_250_000)
        assert meter.read() == 0.25


def test_a_counter_that_turned_over_goes_on(machine):
    machine.add("intel-rapl:0", "package-0", uj=RANGE_UJ - 1_000_000)
    with machine.meter() as meter:
        machine.set("intel-rapl:0", 2_000_000)
        assert meter.read() == 3.0
        machine.set("intel-rapl:0", 1_000_000)
        assert meter.read() == pytest.approx(3.0 + (RANGE_UJ - 1_000_000) / 1e6)


def test_a_counter_turns_over_as_often_as_it_likes_between_two_reads(machine):
    machine.add("intel-rapl:0", "package-0", range_uj=10_000_000)
    with machine.meter(watch_interval_s=0.002) as meter:
        for uj in (6_000_000, 2_000_000, 8_000_000, 4_000_000):  # 6 J each
            machine.set("intel-rapl:0", uj)
            deadline = time.monotonic() + 10
            while meter._last_uj["package-0"] != uj and time.monotonic() < deadline:
                time.sleep(0.001)
        assert meter.read() == 24.0


def test_a_counter_that_was_set_back_and_has_no_range_is_given_up(machine):
    machine.add("intel-rapl:0", "package-0", uj=5_000_000, range_uj=None)
    with machine.meter() as meter:
        machine.set("intel-rapl:0", 1_000_000)
        assert meter.read() is None
        assert meter.absent["processor"] == "package-0: the counter was reset"
        assert meter.counters == ()


def test_a_sum_that_lost_a_part_is_none(machine):
    machine.add("intel-rapl:0", "package-0")
    machine.add("intel-rapl:0:0", "dram")
    with machine.meter() as meter:
        assert meter.read() == 0.0
        (machine.base / "intel-rapl:0:0/energy_uj").unlink()
        machine.set("intel-rapl:0", 1_000_000)
        assert meter.read() is None
        assert meter.read_parts() == {}
        assert meter.absent["processor"].startswith("package-0/dram: reading failed after earlier successes")


def test_what_is_for_root_alone_is_absent_with_the_remedy():
    # Not below `tmp_path`: its parents are for root alone as well, where root runs the tests.
    root = Path(tempfile.mkdtemp())
    try:
        root.chmod(0o755)
        machine = Machine(root)
        machine.add("intel-rapl:0", "package-0")
        path = machine.base / "intel-rapl:0/energy_uj"
        path.chmod(stat.S_IRUSR if os.geteuid() == 0 else 0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            meter = machine.meter()
        finally:
            os.seteuid(user)
    finally:
        shutil.rmtree(root)
    assert meter.counters == ()
    meter.start()
    assert meter.read() is None
    reason = meter.absent["processor"]
    assert reason.startswith(f"{path} is readable by root only")
    assert reason.endswith("sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj")


@pytest.mark.parametrize("there", [True, False])
def test_a_machine_that_counts_nothing_says_so(tmp_path, there):
    if there:
        Machine(tmp_path).add("intel-rapl:0", "psys")
    meter = EnergyMeter(root=tmp_path)
    before = threading.active_count()
    meter.start()
    assert threading.active_count() == before, "nothing to look at"
    assert meter.read() is None
    assert meter.read_parts() == {}
    assert "shows no package" in meter.absent["processor"]
    assert "nvidia-ml-py is not installed" in meter.absent["gpu"]
    assert meter.to_dict() == {part: {"counters": [], "absent": meter.absent[part]} for part in ("processor", "gpu")}
    meter.close()


def test_a_counter_that_is_no_number_is_absent(machine):
    machine.add("intel-rapl:0", "package-0")
    (machine.base / "intel-rapl:0/energy_uj").write_text("soon\n")
    assert "cannot be read" in machine.meter().absent["processor"]


def test_before_the_start_and_with_the_meter_closed_no_thread_is_left(machine):
    machine.add("intel-rapl:0", "package-0", uj=4_000_000)
    meter = machine.meter()
    assert meter.read() is None
    with meter:
        assert meter.read() == 0.0
        assert any(thread.name == "energy-meter" for thread in threading.enumerate())
    assert not any(thread.name == "energy-meter" for thread in threading.enumerate())
    meter.close()  # twice is no mistake


# --- NVML ---------------------------------------------------------------------------------------------------------


class Nvml(types.ModuleType):
    """What `nvidia-ml-py` gives, with devices that count what a test says (millijoules; `None`: they do not count)."""

    class NVMLError(Exception):
        pass

    def __init__(self, *devices: int | None, driver: bool = True) -> None:
        super().__init__("pynvml")
        self.devices, self.driver, self.opened = list(devices), driver, 0

    def nvmlInit(self):
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")
        self.opened += 1

    def nvmlShutdown(self):
        self.opened -= 1

    def nvmlDeviceGetCount(self):
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if self.devices[handle] is None:
            raise self.NVMLError("Not Supported")
        return self.devices[handle]


@pytest.fixture
def play(monkeypatch):
    def nvml(*devices, **options):
        module = Nvml(*devices, **options)
        monkeypatch.setitem(sys.modules, "pynvml", module)
        return module

    return nvml


def test_gpus_are_added_to_the_processors(machine, play):
    nvml = play(5000, 7000)
    machine.add("intel-rapl:0", "package-0")
    with machine.meter() as meter:
        machine.set("intel-rapl:0", 1_000_000)
        nvml.devices[:] = 5500, 9000
        assert meter.read_parts() == {"package-0": 1.0, "gpu-0": 0.5, "gpu-1": 2.0}
        assert meter.read() == 3.5
        assert meter.to_dict()["gpu"] == {"counters": ["gpu-0", "gpu-1"], "absent": None}
    assert nvml.opened == 0


def test_a_gpu_alone_is_not_what_a_run_takes(tmp_path, play):
    nvml = play(0)
    with EnergyMeter(root=tmp_path) as meter:
        nvml.devices[0] = 3000
        assert meter.read() is None
        assert meter.read_parts() == {"gpu-0": 3.0}


@pytest.mark.parametrize(
    ("devices", "driver", "reason"),
    [
        ((), False, "no NVIDIA driver (Driver Not Loaded)"),
        ((), True, "there is no NVIDIA GPU"),
        ((5, None), True, "gpu-1 does not measure its energy (Not Supported); GPUs from Volta on do"),
    ],
)
def test_gpus_that_do_not_count_are_absent_with_the_reason(tmp_path, play, devices, driver, reason):
    nvml = play(*devices, driver=driver)
    meter = EnergyMeter(root=tmp_path)
    assert meter.absent["gpu"] == reason
    assert nvml.opened == 0


def test_a_gpu_that_is_lost_takes_the_sum_with_it_until_the_next_start(machine, play):
    nvml = play(0)
    machine.add("intel-rapl:0", "package-0")
    with machine.meter() as meter:
        nvml.devices[0] = None
        assert meter.read() is None
        assert meter.read_parts() == {"package-0": 0.0}
        meter.start()
        machine.set("intel-rapl:0", 2_000_000)
        assert meter.read() == 2.0


def test_the_real_library_of_nvidia_is_asked_without_a_failure(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "pynvml")
    pytest.importorskip("pynvml")
    with EnergyMeter(root=tmp_path) as meter:
        found = meter.to_dict()["gpu"]
        assert bool(found["counters"]) != bool(found["absent"])


# --- a token ------------------------------------------------------------------------------------------------------


def test_cpu_seconds_are_those_of_all_threads():
    def burn() -> None:
        until = time.thread_time() + 0.15
        while time.thread_time() < until:
            pass

    before = Cost.now()
    threads = [threading.Thread(target=burn) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = Cost.now()
    assert 0.3 <= after.cpu_s - before.cpu_s < 0.6
    assert after.joules is None


def test_costs_of_a_token(machine):
    before, after = Cost(cpu_s=1.0, joules=10.0), Cost(cpu_s=3.0, joules=15.0)
    assert before.per_token(after, 4) == {"cpu_s_per_token": 0.5, "joules_per_token": 1.25}
    assert before.per_token(after, 0) == {"cpu_s_per_token": None, "joules_per_token": None}
    lost = Cost(cpu_s=3.0, joules=None)
    assert before.per_token(lost, 4) == {"cpu_s_per_token": 0.5, "joules_per_token": None}
    machine.add("intel-rapl:0", "package-0")
    with machine.meter() as meter:
        machine.set("intel-rapl:0", 2_000_000)
        assert Cost.now(meter).joules == 2.0
