"""The page map says of each page where it is."""

import torch

from qwen3_vl_memory_optimizations.paging import PINNED

MIB = 2**20


def test_each_page_has_its_letter_and_weights_come_first(make_optimizer):
    optimizer = make_optimizer(16 * MIB)
    kept = [optimizer.allocate_tensor((9 * MIB,), torch.uint8), optimizer.allocate_tensor((9 * MIB,), torch.uint8)]
    first, second = optimizer.pager.page_map()
    assert (first.kind, first.codec, first.n_bytes, len(first.states)) == ("general", "none", 9 * MIB, 3)
    # 18 MiB within 16: what was written last is there, and some of the first had to leave.
    assert "s" in first.states and set(second.states) == {"r"}
    held = optimizer.migrate_for_compute(kept[1])
    assert set(optimizer.pager.page_map()[1].states) == {PINNED}
    del held
    assert set(optimizer.pager.page_map()[1].states) == {"r"}
    kept.pop()
    assert len(optimizer.pager.page_map()) == 1


def test_the_map_agrees_with_what_is_held(make_optimizer):
    optimizer = make_optimizer(16 * MIB)
    kept = [optimizer.allocate_tensor((4 * MIB,), torch.uint8, kind) for kind in ["general"] * 3 + ["kv_cache"] * 3]
    resident = {use.tensor_id: use.resident_bytes for use in optimizer.pager.usage()}
    for pages in optimizer.pager.page_map():
        assert 4 * MIB * pages.states.count("r") == resident[pages.tensor_id]
    assert sum(resident.values()) == 16 * MIB and len(kept) == 6
