"""What the process and its control group take of the budget. The groups are made up; test_budget.py has real ones."""

import pytest

from qwen3_vl_memory_optimizations import MemoryBudgetExceeded
from qwen3_vl_memory_optimizations.paging import BlockSpace, Ledger, Pager, ProcessAccounts
from qwen3_vl_memory_optimizations.paging.budget import process_accounts as accounts
from qwen3_vl_memory_optimizations.process import GroupMemory

MIB = 2**20
BUDGET = 4096 * MIB


@pytest.fixture
def group(monkeypatch):
    """A control group as large as the budget, in which only this process lives; a test may change it."""
    state = {"limit": BUDGET, "kernel": 20 * MIB, "cached": 0, "others": 0, "rss": 400 * MIB, "dropped": 0}

    def groups():
        used = state["rss"] + state["kernel"] + state["cached"] + state["others"]
        yield GroupMemory(limit_bytes=state["limit"], used_bytes=used, cached_bytes=state["cached"], droppable_bytes=0)

    def drop():
        state["dropped"] += 1
        state["cached"] = min(state["cached"], 60 * MIB)

    monkeypatch.setattr(accounts, "limiting_groups", groups)
    monkeypatch.setattr(accounts, "rss_bytes", lambda: state["rss"])
    monkeypatch.setattr(accounts, "drop_cached_libraries", drop)
    monkeypatch.setattr(accounts, "release_library_pages", lambda: None)
    return state


@pytest.fixture
def pager(tmp_path):
    pager = Pager(Ledger(BUDGET, None), swap_dir=tmp_path)
    yield pager
    pager.close()


def test_the_group_leaves_room_for_what_lives_beside_the_process(group, pager):
    ProcessAccounts(pager, BUDGET, group["rss"])
    held = pager.ledger.held_bytes("system")
    assert 20 * MIB < held < 100 * MIB, "page tables, and a margin for what is cached meanwhile"
    group["others"] = 1000 * MIB
    pager.on_pass()
    assert pager.ledger.held_bytes("system") - held == pytest.approx(1000 * MIB, abs=BUDGET // 16 + 32 * MIB)
    limit = pager.frames.limit_bytes
    group["others"] = 0
    pager.on_pass()
    assert pager.frames.limit_bytes >= limit + 900 * MIB


def test_free_heap_is_released_on_demand(pager, monkeypatch):
    monkeypatch.setattr(accounts, "release_library_pages", lambda: None)
    kept, n_blocks, block_bytes = [], 2000, 100_000
    blocks = []
    for _ in range(n_blocks):  # small ones between keep the heap from shrinking as a whole
        blocks.append(bytearray(block_bytes))
        kept.append(bytearray(600))
    accounted = ProcessAccounts(pager, BUDGET, 0)
    full = accounted.measure()
    blocks.clear()  # how much the C library returns by itself depends on what ran before in this process
    assert accounted.measure(release=True) < full - n_blocks * block_bytes * 3 // 4
    del kept


def test_code_that_was_given_back_counts_before_it_is_read_again(group, pager, monkeypatch):
    accounted = ProcessAccounts(pager, BUDGET, group["rss"])
    there = accounted.measure()
    monkeypatch.setattr(accounts, "mapped_file_bytes", lambda: 5 * MIB)
    group["rss"] -= 60 * MIB  # of code
    assert accounted.measure() == there - 60 * MIB + 43 * MIB


def test_a_large_group_takes_nothing_but_the_share_of_the_kernel(group, pager):
    group["limit"] = 4 * BUDGET
    ProcessAccounts(pager, BUDGET, group["rss"])
    assert pager.ledger.held_bytes("system") == BUDGET // 64


def test_cached_code_is_dropped_before_the_group_is_full_and_only_when_there_is_some(group, pager):
    ProcessAccounts(pager, BUDGET, group["rss"])
    group["rss"] = BUDGET - 600 * MIB
    group["cached"] = 300 * MIB
    pager.on_growth(4 * MIB)
    assert group["dropped"] == 0, "there is room"
    group["rss"] = BUDGET - 400 * MIB
    pager.on_growth(4 * MIB)
    assert (group["dropped"], group["cached"]) == (1, 60 * MIB)
    group["rss"] = BUDGET - 90 * MIB
    for _ in range(5):
        pager.on_growth(4 * MIB)
    assert group["dropped"] == 1, "what cannot be dropped is not tried again"


def test_files_cached_by_others_count_up_to_a_share(group, pager, monkeypatch):
    monkeypatch.setattr(accounts, "drop_cached_libraries", lambda: None)  # they are not ours to drop
    group["cached"] = BUDGET - 500 * MIB
    ProcessAccounts(pager, BUDGET, group["rss"])
    assert pager.ledger.held_bytes("system") < BUDGET // 16 + 100 * MIB


def test_a_group_without_room_is_refused(group, tmp_path):
    group["others"] = BUDGET
    pager = Pager(Ledger(BUDGET, None), swap_dir=tmp_path)
    pager.ledger.frames_floor_bytes = 8 * MIB
    with pytest.raises(MemoryBudgetExceeded, match="system"):
        ProcessAccounts(pager, BUDGET, group["rss"])
    pager.close()


def test_a_run_goes_on_where_what_it_holds_is_more_than_is_left(group, pager, caplog):
    ProcessAccounts(pager, BUDGET, group["rss"])
    space = BlockSpace(pager)
    held, idle = space.allocate(16 * MIB), space.allocate(16 * MIB)
    pager.ledger.frames_floor_bytes = 4 * MIB
    group["others"] = BUDGET
    with space.held([held]):
        pager.on_pass()
        assert "exceeds the budget" in caplog.text
        assert pager.frames.limit_bytes == pager.frames.used_bytes == 16 * MIB
        assert (held.entry.pages[0].resident, idle.entry.pages[0].resident) == (True, False)
    pager.on_pass()
    assert pager.frames.limit_bytes == 4 * MIB
    group["others"] = 0
    pager.on_pass()
    assert pager.frames.limit_bytes > BUDGET // 2
