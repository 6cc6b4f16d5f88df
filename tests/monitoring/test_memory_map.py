"""Maps are rebuilt from their changes, also where changes were merged."""

from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vl_memory_optimizations.monitoring.rendering.memory_map import MapWriter, MemoryMap, merge_changes, shorten
from qwen3_vl_memory_optimizations.paging import TensorPages

TENSORS = st.builds(
    TensorPages,
    tensor_id=st.sampled_from("abcdef"),
    kind=st.sampled_from(["weights", "general"]),
    codec=st.sampled_from(["int8", "none"]),
    n_bytes=st.integers(1, 3),
    states=st.text("rplws", min_size=0, max_size=4),
)
MAPS = st.lists(TENSORS, max_size=6, unique_by=lambda tensor: tensor.tensor_id)


def facts(tensor):
    return tensor.kind, tensor.codec, tensor.n_bytes, len(tensor.states)


@settings(deadline=None)
@given(st.lists(MAPS, min_size=1, max_size=6))
def test_a_map_follows_from_its_changes_whole_or_merged(maps):
    writer = MapWriter()
    changes = [writer.changes(each) for each in maps]
    followed, merged = MemoryMap(), {}
    for change, expected in zip(changes, maps, strict=True):
        followed = followed.after(change)
        merged = merge_changes(merged, change)
        for rebuilt in (followed, MemoryMap().after(merged)):
            assert rebuilt.states() == {tensor.tensor_id: tensor.states for tensor in expected}
            assert {key: tuple(row) for key, row in rebuilt.tensors.items()} == {
                tensor.tensor_id: facts(tensor) for tensor in expected
            }


def test_what_did_not_change_is_not_told():
    writer, tensor = MapWriter(), TensorPages("a", "weights", "int8", 8, "rrrs")
    assert writer.changes([tensor]) == {
        "tensors": {"remove": [], "add": [["a", "weights", "int8", 8, 4]]},
        "map": "3r1s",
    }
    assert writer.changes([tensor]) == {}
    assert shorten("") == "" and shorten("rsrr") == "1r1s2r"
