"""The schedule, and the residency chosen from it, on traces whose best possible figures are known."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_vl_memory_optimizations.prediction import PassSchedule, choose_kept

LAYERS = ["l0", "l1", "l2", "l3", "head"]
VISION = ["v0", "v1", "v2"]


def play(schedule, *passes):
    return [schedule.record(item) for items in passes for item in items]


def test_a_cycle_is_learnt_without_a_hint():
    schedule = PassSchedule()
    begins = play(schedule, LAYERS, LAYERS, ["l0", "l1"])
    assert [index for index, begin in enumerate(begins) if begin] == [0, 5, 10]
    assert schedule.passes == 2
    assert list(schedule.upcoming())[:5] == ["l2", "l3", "head", "l0", "l1"]
    assert schedule.cycles() == [LAYERS]


def test_during_the_first_pass_a_hint_foretells_the_rest():
    schedule = PassSchedule(VISION + LAYERS)
    assert schedule.cycles() == [VISION + LAYERS]
    schedule.record("l0")
    assert list(schedule.upcoming()) == ["l1", "l2", "l3", "head"]
    assert not list(PassSchedule().upcoming())


def test_after_the_last_item_the_first_comes_again():
    schedule = PassSchedule()
    play(schedule, LAYERS, LAYERS)
    assert list(schedule.upcoming()) == LAYERS
    assert schedule.distances() == {"l0": 1, "l1": 2, "l2": 3, "l3": 4, "head": 5}


def test_a_prefill_with_vision_is_followed_by_text_passes():
    schedule = PassSchedule()
    play(schedule, VISION + LAYERS, LAYERS, LAYERS, LAYERS)
    assert list(schedule.upcoming()) == LAYERS
    assert schedule.cycles()[0] == LAYERS, "the most frequent sort of pass comes first"
    assert VISION + LAYERS in schedule.cycles()


def test_the_second_prefill_is_foretold_from_its_first_tensor_and_decoding_after_it():
    schedule = PassSchedule()
    play(schedule, VISION + LAYERS, LAYERS, LAYERS, ["v0"])
    assert list(schedule.upcoming())[:7] == ["v1", "v2", *LAYERS]
    assert list(schedule.upcoming())[7:] == LAYERS, "a decode step came after the prefill before"


def test_a_later_prefill_does_not_change_what_a_decode_step_is():
    schedule = PassSchedule()
    play(schedule, *[VISION + LAYERS, LAYERS, LAYERS] * 2, ["l0"])
    assert sorted(schedule.cycles()) == sorted([VISION + LAYERS, LAYERS])
    assert schedule.passes == 6


def test_the_first_decode_step_is_known_from_the_prefill_before_it():
    schedule = PassSchedule()
    play(schedule, VISION + LAYERS, ["l0"])
    assert list(schedule.upcoming())[:4] == ["l1", "l2", "l3", "head"]


def test_a_changed_order_replaces_the_old_one_after_a_pass():
    schedule = PassSchedule()
    swapped = ["l0", "l2", "l1", "l3", "head"]
    play(schedule, LAYERS, swapped, ["l0"])
    assert list(schedule.upcoming())[:4] == swapped[1:]


def test_an_item_out_of_order_resynchronises():
    schedule = PassSchedule()
    play(schedule, LAYERS, LAYERS, ["l0", "l3"])
    assert next(schedule.upcoming()) == "head"
    schedule.record("never seen")
    assert next(schedule.upcoming()) == "head"


DRAFT = ["d/l0", "d/head"]


def two_models():
    return PassSchedule(VISION + LAYERS + DRAFT, lambda item: item.startswith("d/"))


def test_a_pass_never_mixes_two_models():
    schedule = two_models()
    begins = play(schedule, VISION, DRAFT, DRAFT, LAYERS, DRAFT, ["d/l0"])
    assert [index for index, begin in enumerate(begins) if begin] == [0, 3, 5, 7, 12, 14]
    assert sorted(schedule.cycles()) == sorted([VISION, DRAFT, LAYERS])
    assert schedule.cycles()[0] == DRAFT


def test_a_model_that_did_not_run_yet_is_guessed_from_the_hint():
    schedule = two_models()
    assert schedule.cycles() == [VISION + LAYERS, DRAFT]
    schedule.record("d/l0")
    assert schedule.cycles() == [DRAFT, VISION + LAYERS], "the one that runs comes first"
    play(schedule, ["d/head"], ["l0"])
    assert schedule.cycles() == [DRAFT, LAYERS], "a text pass begins behind the vision tower"
    assert list(schedule.upcoming()) == LAYERS[1:]


def test_a_better_guess_is_a_new_revision():
    schedule = two_models()
    play(schedule, DRAFT, DRAFT)
    before = schedule.revision
    schedule.record("l0")
    assert schedule.revision > before


def test_what_was_frequent_long_ago_counts_no_more():
    schedule = two_models()
    play(schedule, *[LAYERS] * 1000, *[DRAFT, DRAFT, DRAFT, LAYERS] * 10)
    assert schedule.cycles()[0] == DRAFT
    play(schedule, *[LAYERS] * 40)
    assert schedule.cycles()[0] == LAYERS


def test_models_that_take_turns_do_not_change_the_plan_at_each_pass():
    schedule = two_models()
    play(schedule, *[LAYERS] * 50, *[DRAFT, LAYERS] * 40)
    before = schedule.revision
    play(schedule, *[DRAFT, LAYERS] * 40)
    assert schedule.revision == before


@given(st.lists(st.integers(0, 5), max_size=60), st.lists(st.integers(0, 5), max_size=6))
def test_no_sequence_upsets_it(trace, hint):
    schedule = PassSchedule(hint)
    passes = sum(play(schedule, trace))
    assert schedule.passes == max(0, passes - 1)
    assert all(distance >= 1 for distance in schedule.distances().values())
    assert set(schedule.upcoming()) <= set(trace) | set(hint)


# --- which pages to keep ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 1000), max_size=80), st.integers(-10, 50_000))
def test_the_kept_pages_never_exceed_the_capacity(sizes, capacity):
    kept = choose_kept(sizes, capacity)
    kept_bytes = sum(size for size, keep in zip(sizes, kept, strict=True) if keep)
    assert kept_bytes <= max(0, capacity)
    assert all(kept) == (sum(sizes) <= capacity or not sizes)
    rejected = [size for size, keep in zip(sizes, kept, strict=True) if not keep]
    assert all(kept_bytes + size > capacity for size in rejected), "one more would have fitted"


@given(st.integers(2, 200), st.integers(1, 199))
def test_equal_pages_are_kept_at_even_distances(n_pages, capacity):
    capacity = min(capacity, n_pages - 1)
    kept = [index for index, keep in enumerate(choose_kept([4] * n_pages, 4 * capacity)) if keep]
    assert len(kept) == capacity
    for first, next_one in zip(kept, kept[1:], strict=False):
        assert next_one - first <= 2.7 * n_pages / capacity + 1
    runs = "".join("-" if index in kept else "m" for index in range(n_pages)).split("-")
    assert max(map(len, runs)) <= 2.7 * n_pages / capacity


@given(st.integers(2, 200), st.data())
def test_more_memory_keeps_what_less_did(n_pages, data):
    few, many = sorted(data.draw(st.lists(st.integers(0, n_pages), min_size=2, max_size=2)))
    less, more = (choose_kept([4] * n_pages, 4 * capacity) for capacity in (few, many))
    assert all(keep for keep, kept in zip(more, less, strict=True) if kept)


def test_what_is_expected_first_is_foretold_before_anything_was_seen():
    schedule = PassSchedule(VISION + LAYERS)
    schedule.expect(LAYERS)
    assert list(schedule.upcoming()) == LAYERS
    assert schedule.cycles() == [LAYERS]
    before = schedule.cycles()
    play(schedule, LAYERS[:2])
    assert list(schedule.upcoming())[:3] == LAYERS[2:] and schedule.cycles() == before
    schedule.expect(VISION)  # too late: it knows better
    assert list(schedule.upcoming())[:3] == LAYERS[2:]
    another = PassSchedule(VISION + LAYERS)
    another.expect(LAYERS)
    play(another, VISION[:1])  # an image came
    assert list(another.upcoming())[:4] == [*VISION[1:], *LAYERS[:2]]


def lru_hits(trace, capacity):
    held, hits = [], 0
    for page in trace:
        hits += page in held
        held = [other for other in held if other != page] + [page]
        held = held[-capacity:]
    return hits


def belady_hits(trace, capacity):
    held, hits = set(), 0
    for now, page in enumerate(trace):
        hits += page in held
        if page not in held and len(held) == capacity:
            rest = trace[now + 1 :]
            held.remove(max(held, key=lambda other: rest.index(other) if other in rest else len(rest)))
        held.add(page)
    return hits


def kept_hits(trace, capacity):
    """The subset chosen from the learnt schedule, with one frame to stream the others through."""
    schedule, held, hits = PassSchedule(), set(), 0
    kept = set()
    for page in trace:
        if schedule.record(page):
            cycle = schedule.cycles()[0]
            flags = choose_kept([1] * len(cycle), capacity - 1)
            kept = {item for item, keep in zip(cycle, flags, strict=True) if keep}
        hits += page in held
        held = (held | {page}) & (kept | {page})
        assert len(held) <= capacity
    return hits


@pytest.mark.parametrize("capacity", [2, 4, 7, 12, 15])
def test_on_a_cycle_the_kept_subset_comes_within_its_window_of_the_optimum_where_lru_never_hits(capacity):
    n_pages, n_passes = 16, 30
    trace = list(range(n_pages)) * n_passes
    assert lru_hits(trace, capacity) == 0
    best = (capacity - 1) / (n_pages - 1)
    assert belady_hits(trace, capacity) / len(trace) == pytest.approx(best, rel=0.06)
    warm = kept_hits(trace, capacity) - kept_hits(trace[: 3 * n_pages], capacity)
    assert warm == (capacity - 1) * (n_passes - 3), "every pass hits each kept page"
    assert warm / (n_pages * (n_passes - 3)) >= best - 1 / n_pages


@pytest.mark.parametrize("capacity", [16, 17])
def test_what_fits_is_kept_whole(capacity):
    assert choose_kept([1] * 16, capacity) == [True] * 16
