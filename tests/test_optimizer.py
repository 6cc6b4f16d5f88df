import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from qwen3_vl_memory_optimizations import (
    ConfigurationError,
    InsufficientDiskSpaceError,
    ManagedTensor,
    MemoryBudgetExceeded,
    MemoryConfig,
    MemoryOptimizer,
    StorageError,
    UnknownTensorError,
)
from qwen3_vl_memory_optimizations.process import rss_bytes

MIB = 2**20
SECTION_4_2 = """
from memory_optimization_api import MemoryOptimizer

mem_optimizer = MemoryOptimizer(
    hardware_config={
        'cpu_model': 'Intel i5-10210U',
        'gpu_model': 'NVIDIA SM61',
        'memory_size': 8 * 1024 * 1024 * 1024,  # 8GB
        'storage_type': 'nvme'
    }
)

def allocate_tensor_optimized(shape, dtype=torch.float16, tensor_type='general'):
    return mem_optimizer.allocate_tensor(shape, dtype, tensor_type)

kv_tensor = mem_optimizer.allocate_tensor(
    shape=(batch_size, num_heads, seq_len, head_dim),
    dtype=torch.float16,
    tensor_type='kv_cache'
)

def get_memory_stats():
    return mem_optimizer.get_memory_efficiency_stats()
"""


@pytest.fixture
def optimizer(tmp_path):
    settings = {"tensor_budget": 8 * MIB, "cache_dir": tmp_path, "tier_migration_interval": 1000.0}
    with MemoryOptimizer(memory_config=settings) as made:
        yield made


def test_the_example_of_the_specification_runs_as_written():
    names = {"torch": torch, "batch_size": 2, "num_heads": 8, "seq_len": 64, "head_dim": 32}
    exec(SECTION_4_2, names)
    with names["mem_optimizer"] as optimizer:
        kv = names["kv_tensor"]
        assert (kv.shape, kv.dtype, kv.kind) == ((2, 8, 64, 32), torch.float16, "kv_cache")
        assert optimizer.hardware.cpu_model == "Intel i5-10210U"
        assert optimizer.hardware.storage_type == "nvme"
        other = names["allocate_tensor_optimized"]((4, 4))
        assert (other.dtype, other.kind, float(other.sum())) == (torch.float16, "general", 0)
        stats = names["get_memory_stats"]()
        assert stats["kinds"]["kv_cache"]["logical_bytes"] == 2 * 8 * 64 * 32 * 2


def test_the_figures_are_there_and_add_up(optimizer):
    tensors = [
        optimizer.allocate_tensor((MIB,), torch.uint8, kind)
        for kind in ("kv_cache", "vision_features", "text_embeddings", "general", "general")
    ]
    stats = optimizer.get_memory_efficiency_stats()
    assert set(stats) == {
        "budget",
        "paging",
        "tiers",
        "pools",
        "kinds",
        "codecs",
        "cache",
        "gc",
        "tuning",
        "sessions_open",
        "kv",
    }
    assert set(stats["budget"]) == {
        "ram_budget_bytes",
        "tensor_budget_bytes",
        "baseline_bytes",
        "accounts_bytes",
        "tensor_accounts_bytes",
        "pressure_reliefs",
        "frames_limit_bytes",
        "frames_used_bytes",
        "frames_peak_bytes",
        "process_rss_bytes",
        "process_peak_rss_bytes",
    }
    assert {"hits", "misses", "hit_rate", "prefetch_accuracy", "stall_s", "bytes_read_per_pass"} <= set(stats["paging"])
    assert stats["kinds"]["general"] == {
        "tensors": 2,
        "logical_bytes": 2 * MIB,
        "original_bytes": 2 * MIB,
        "encoded_bytes": 2 * MIB,
        "resident_bytes": 2 * MIB,
    }
    assert stats["codecs"]["none"]["tensors"] == len(tensors) == 5
    assert stats["budget"]["frames_used_bytes"] == stats["tiers"]["cpu"]["resident_bytes"] == 5 * MIB
    assert stats["budget"]["tensor_budget_bytes"] == 8 * MIB and stats["budget"]["ram_budget_bytes"] is None
    assert stats["pools"]["general"]["used_bytes"] == 2 * MIB
    assert stats["tiers"]["ssd"] == {"only_there_bytes": 0, "swap_used_bytes": 0}
    more = optimizer.allocate_tensor((6 * MIB,), torch.uint8)
    stats = optimizer.get_memory_efficiency_stats()
    assert stats["tiers"]["ssd"] == {"only_there_bytes": 3 * MIB, "swap_used_bytes": 3 * MIB}
    assert stats["budget"]["frames_peak_bytes"] <= 8 * MIB
    assert more.tier == "cpu"


def test_without_a_budget_there_is_no_limit_to_report(tmp_path):
    with MemoryOptimizer(memory_config=MemoryConfig(cache_dir=tmp_path, enable_memory_pooling=False)) as optimizer:
        stats = optimizer.get_memory_efficiency_stats()
        assert stats["budget"]["frames_limit_bytes"] is None and stats["pools"] == {}
        assert stats["paging"]["hit_rate"] is None


def test_an_access_that_was_recorded_keeps_a_tensor_in_memory(optimizer):
    tensors = [optimizer.allocate_tensor((2 * MIB,), torch.uint8) for _ in range(4)]
    for index in (0, 2, 3):
        optimizer.record_tensor_access(tensors[index].tensor_id)
    another = optimizer.allocate_tensor((2 * MIB,), torch.uint8)
    assert [tensor.tier for tensor in (*tensors, another)] == ["cpu", "ssd", "cpu", "cpu", "cpu"]
    with pytest.raises(UnknownTensorError, match="no managed tensor has the id 'general-99'"):
        optimizer.record_tensor_access("general-99")


def test_threads_do_not_get_the_same_address(optimizer, monkeypatch):
    """The second thread comes while the first one has looked for an address and not taken it yet."""
    blocks, tensors, threads = optimizer.pool.pools["general"]._blocks, [], []
    real = blocks._remove_hole

    def allocate():
        tensors.append(optimizer.allocate_tensor((MIB,), torch.uint8))

    def remove_hole(start):
        if not threads:
            threads.append(threading.Thread(target=allocate, daemon=True))
            threads[0].start()
            threads[0].join(0.2)
        real(start)

    monkeypatch.setattr(blocks, "_remove_hole", remove_hole)
    allocate()
    threads[0].join(10)
    addresses = sorted(tensor.entry.address for tensor in tensors)
    assert addresses[1] - addresses[0] >= MIB


def test_migrating_for_compute_gives_a_plain_tensor_over_the_same_bytes(optimizer):
    tensor = optimizer.allocate_tensor((4, 4), torch.float32).fill_(3)
    migrated = optimizer.migrate_for_compute(tensor)
    assert type(migrated) is torch.Tensor and migrated.sum() == 48
    migrated[0, 0] = 0
    assert tensor.sum() == 45
    plain = torch.ones(2)
    assert optimizer.migrate_for_compute(plain) is plain


def test_close_may_be_called_again_and_ends_a_with_statement_also_on_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="mine"), MemoryOptimizer(memory_config={"cache_dir": tmp_path}) as optimizer:
        tensor = optimizer.allocate_tensor((MIB,), torch.uint8)
        raise RuntimeError("mine")
    optimizer.close()
    assert optimizer.pager.frames.committed_bytes == 0
    assert not optimizer.pager._mover._queue._threads or not any(
        t.is_alive() for t in optimizer.pager._mover._queue._threads
    )
    with pytest.raises(UnknownTensorError):
        optimizer.record_tensor_access(tensor.tensor_id)
    optimizer.close()


def test_many_optimizers_leave_nothing_behind(tmp_path):
    def mapped_bytes():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[0]) * 4096

    def once():
        with MemoryOptimizer(memory_config={"cache_dir": tmp_path, "tensor_budget": 2 * MIB}) as optimizer:
            tensors = [optimizer.allocate_tensor((MIB,), torch.uint8) for _ in range(4)]
            assert [int(tensor.max()) for tensor in tensors] == [0] * 4

    once()
    gc.collect()
    before, threads, resident = mapped_bytes(), threading.active_count(), rss_bytes()
    for _ in range(5):
        once()
    gc.collect()
    assert mapped_bytes() - before < 2**30
    assert threading.active_count() <= threads and rss_bytes() - resident < 6 * MIB
    assert [path.name for path in tmp_path.rglob("*")] in ([], ["swap"]), "an empty directory at the most"


def test_sessions_nest_and_the_last_one_returns_free_frames(optimizer):
    with optimizer.inference_session() as same:
        assert same is optimizer
        optimizer.start_inference_session()
        tensor = optimizer.allocate_tensor((4 * MIB,), torch.uint8)
        del tensor
        free_bytes = optimizer.pager.frames.free_bytes
        optimizer.end_inference_session()
        assert optimizer.pager.frames.free_bytes == free_bytes
        assert optimizer.get_memory_efficiency_stats()["sessions_open"] == 1
    assert optimizer.pager.frames.free_bytes == 0
    with pytest.raises(ConfigurationError, match="no session"):
        optimizer.end_inference_session()
    with pytest.raises(KeyError), optimizer.inference_session():
        raise KeyError
    assert optimizer.get_memory_efficiency_stats()["sessions_open"] == 0


def test_sessions_overlap_in_threads(optimizer):
    def work():
        for _ in range(200):
            with optimizer.inference_session():
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert optimizer.get_memory_efficiency_stats()["sessions_open"] == 0


def test_what_cannot_be_allocated_is_named(optimizer):
    with pytest.raises(ConfigurationError, match="weights.*kv_cache"):
        optimizer.allocate_tensor((4,), tensor_type="weights")
    with pytest.raises(ConfigurationError, match="negative"):
        optimizer.allocate_tensor((4, -1))
    with pytest.raises(MemoryBudgetExceeded) as caught:
        optimizer.allocate_tensor((9 * MIB,), torch.uint8, "kv_cache")
    error = caught.value
    assert (error.requested_bytes, error.available_bytes, error.budget_bytes, error.owner) == (
        9 * MIB,
        8 * MIB,
        8 * MIB,
        "kv_cache",
    )
    assert optimizer.get_memory_efficiency_stats()["kinds"] == {}


def test_a_budget_below_what_the_process_uses_is_refused_with_the_numbers(tmp_path):
    with pytest.raises(MemoryBudgetExceeded, match="ram_budget of 50 MB is too small") as caught:
        MemoryOptimizer(memory_config={"ram_budget": "50MB", "cache_dir": tmp_path})
    assert caught.value.requested_bytes > caught.value.budget_bytes == 50_000_000
    with pytest.raises(ConfigurationError, match="cpu_modle"):
        MemoryOptimizer({"cpu_modle": "x"})


def test_tensors_are_zeroed_also_where_memory_is_reused(optimizer):
    for _ in range(3):
        tensor = optimizer.allocate_tensor((3 * MIB,), torch.uint8)
        assert isinstance(tensor, ManagedTensor) and int(tensor.max()) == 0
        tensor.fill_(255)
        del tensor


@pytest.mark.parametrize("n_bytes", [4096, 200_000, 512 * 1024 + 1, MIB])
def test_a_tensor_where_a_larger_one_was_keeps_its_contents(optimizer, n_bytes):
    """The frames of the one that was freed are handed on; those under the new one must not be."""
    first = optimizer.allocate_tensor((4096,), torch.uint8).fill_(5)
    large = optimizer.allocate_tensor((3 * MIB,), torch.uint8).fill_(255)
    del large
    small = optimizer.allocate_tensor((n_bytes,), torch.uint8).fill_(7)
    others = [optimizer.allocate_tensor((600_000,), torch.uint8).fill_(9) for _ in range(3)]
    optimizer.pager.trim()
    del others
    optimizer.pager.trim()
    assert (first.unique().tolist(), small.unique().tolist()) == ([5], [7])


def test_a_budget_for_the_process_leaves_what_the_process_uses(tmp_path):
    budget = rss_bytes() + 96 * MIB
    with MemoryOptimizer(memory_config={"ram_budget": budget, "cache_dir": tmp_path}) as optimizer:
        limit = optimizer.pager.frames.limit_bytes
        left = budget - optimizer.baseline_bytes
        assert 0.8 * left < limit <= left, "the kernel's share comes off"
        optimizer.reserve_activations(32 * MIB)
        assert optimizer.pager.frames.limit_bytes == limit - 32 * MIB
        with pytest.raises(MemoryBudgetExceeded):
            optimizer.allocate_tensor((limit - 16 * MIB,), torch.uint8)
        tensors = [optimizer.allocate_tensor((24 * MIB,), torch.uint8) for _ in range(6)]
        assert [int(tensor.max()) for tensor in tensors] == [0] * 6
        assert rss_bytes() <= budget


def test_what_nobody_closed_is_closed_when_the_interpreter_ends(tmp_path):
    """A thread that is inside torch when the interpreter goes aborts the process: one of five did."""
    code = (
        "import atexit, threading\n"
        "def tell():\n"
        "    print([each.name for each in threading.enumerate() if each is not threading.main_thread()])\n"
        "atexit.register(tell)  # registered first, it runs last\n"
        "from qwen3_vl_memory_optimizations import MemoryOptimizer\n"
        f"optimizer = MemoryOptimizer(memory_config={{'tensor_budget': '16MB', 'cache_dir': {str(tmp_path)!r}}})\n"
        "tensor = optimizer.allocate_tensor((1 << 20,))\n"
        "print(len(threading.enumerate()) > 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines() == ["True", "[]"], done.stderr


@pytest.mark.parametrize("part", ["MemoryFigures", "live_parameters", "AutoTuner", "AdvancedMemoryPool", "Compactor"])
def test_a_constructor_that_fails_leaves_no_thread_and_no_address_space(monkeypatch, tmp_path, part):
    from qwen3_vl_memory_optimizations import closing
    from qwen3_vl_memory_optimizations import optimizer as module
    from qwen3_vl_memory_optimizations.pools import typed
    from qwen3_vl_memory_optimizations.process import rss_bytes

    reserved: dict[int, int] = {}
    reserve, unreserve = typed.reserve, typed.unreserve

    def note_reserved(n_bytes):
        address = reserve(n_bytes)
        reserved[address] = n_bytes
        return address

    def note_unreserved(address, n_bytes):
        del reserved[address]
        unreserve(address, n_bytes)

    def fail(*arguments, **settings):
        raise ZeroDivisionError("no more")

    monkeypatch.setattr(typed, "reserve", note_reserved)
    monkeypatch.setattr(typed, "unreserve", note_unreserved)
    monkeypatch.setattr(module, part, fail)
    before, opened = set(threading.enumerate()), set(closing._open)
    settings = {"ram_budget": rss_bytes() + (256 << 20), "auto_tune": True, "cache_dir": tmp_path}
    with pytest.raises(ZeroDivisionError, match="no more"):
        module.MemoryOptimizer(memory_config=settings)
    assert set(threading.enumerate()) == before
    assert not reserved
    assert closing._open <= opened


def swap_something(optimizer):
    tensors = [optimizer.allocate_tensor((2**20,), torch.uint8) for _ in range(4)]
    assert optimizer.pager.swap_used_bytes > 0
    return tensors


def test_the_swap_file_lies_in_the_cache_directory_and_is_made_when_it_is_needed(make_optimizer, tmp_path, monkeypatch):
    monkeypatch.setattr("qwen3_vl_memory_optimizations.optimizer.disks_first", list)  # wherever the tests run
    optimizer = make_optimizer(2**21)
    there = tmp_path / "cache" / "swap"
    assert optimizer.pager.swap_dir == there and not there.exists()
    kept = swap_something(optimizer)
    assert there.is_dir() and list(there.iterdir()) == [], "the file has no name"
    assert int(kept[0].max()) == 0


def test_a_swap_directory_and_a_size_that_are_given_count(make_optimizer, tmp_path):
    optimizer = make_optimizer(2**21, swap_dir=tmp_path / "mine", swap_size="1MiB")
    assert optimizer.pager.swap_free_bytes == 2**20
    kept = [optimizer.allocate_tensor((2**20,), torch.uint8) for _ in range(3)]
    assert (tmp_path / "mine").is_dir() and optimizer.pager.swap_free_bytes == 0
    with pytest.raises(InsufficientDiskSpaceError, match="0 of 1048576 bytes.*raise swap_size"):
        optimizer.allocate_tensor((2**20,), torch.uint8)
    del kept[-1]  # else there is no room to exchange those in memory for the one in the swap file
    assert [int(tensor.max()) for tensor in kept] == [0, 0]


def test_a_home_that_cannot_be_written_hinders_neither_swapping_nor_what_never_swaps(
    make_optimizer, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    monkeypatch.delenv("QWEN3VL_MEM_CACHE", raising=False)
    optimizer = make_optimizer(2**21, cache_dir=None)
    optimizer.allocate_tensor((2**20,), torch.uint8)
    assert not [record for record in caplog.records if "swap" in record.getMessage()]
    swap_something(optimizer)
    assert "file/home/.cache/qwen3vl-mem/swap: cannot be created" in caplog.text
    assert optimizer.pager.swap_dir in (Path("/var/tmp"), Path.cwd())


def test_a_swap_directory_that_cannot_be_made_is_reported_only_when_something_has_to_leave(make_optimizer, tmp_path):
    (tmp_path / "file").touch()
    optimizer = make_optimizer(2**21, swap_dir=tmp_path / "file" / "swap")
    assert optimizer.pager.swap_free_bytes == 0
    kept = [optimizer.allocate_tensor((2**20,), torch.uint8) for _ in range(2)]
    with pytest.raises(StorageError, match=r"file/swap: cannot be created: .*set swap_dir"):
        optimizer.allocate_tensor((2**20,), torch.uint8)
    assert [int(tensor.max()) for tensor in kept] == [0, 0]
