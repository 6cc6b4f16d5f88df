"""Where pictures are in a prompt, and what the names of its blocks tell apart."""

import pytest

from qwen3_vl_memory_optimizations.model.kv.naming import Span, block_names, find_spans, named_tokens

IMAGE, VIDEO = 5, 6
TOKENS = {"image": IMAGE, "video": VIDEO}


def spans_of(ids, images=(), videos=()):
    grids = {"image": list(images), "video": list(videos)}
    keys = {name: [f"{name}{i}" for i in range(len(given))] for name, given in grids.items()}
    return find_spans(ids, TOKENS, grids, keys, 2)


def test_images_and_videos_are_found_in_order():
    ids = [1, 3, *[VIDEO] * 2, 4, 9, 3, *[VIDEO] * 2, 4, 3, *[IMAGE] * 4, 4, 1, 3, IMAGE, 4]
    assert spans_of(ids, images=[[1, 4, 4], [1, 2, 2]], videos=[[2, 2, 4]]) == [
        Span(2, 9, "video0", "video", 0),
        Span(11, 15, "image0", "image", 0),
        Span(18, 19, "image1", "image", 1),
    ]
    assert spans_of([1, 2, 3]) == []


@pytest.mark.parametrize(
    ("ids", "images"),
    [
        ([IMAGE] * 4, []),
        ([IMAGE] * 4, [[1, 4, 4], [1, 4, 4]]),
        ([IMAGE] * 3, [[1, 4, 4]]),
        ([IMAGE] * 8, [[1, 4, 4], [1, 4, 4]]),
        ([1, 2], [[1, 2, 2]]),
    ],
)
def test_tokens_that_do_not_fit_the_grids_are_none_of_ours(ids, images):
    assert spans_of(ids, images) is None


def names(ids, spans=(), root="root"):
    return block_names(named_tokens(ids, spans), root, 4)


def test_whole_blocks_have_names():
    assert [len(names([1] * n)) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert len(set(names([1] * 40))) == 10


def test_the_tokens_of_a_picture_are_named_by_what_it_shows_and_their_place_in_it():
    ids = [1, 3, *[IMAGE] * 2, 4, 3, *[VIDEO] * 2, 7, VIDEO, 4]
    spans = [Span(2, 4, "x", "image", 0), Span(6, 10, "y", "video", 0)]
    assert named_tokens(ids, spans) == [
        *[1, 3, f"x:0:{IMAGE}", f"x:1:{IMAGE}", 4, 3],
        *[f"y:0:{VIDEO}", f"y:1:{VIDEO}", "y:2:7", f"y:3:{VIDEO}", 4],
    ]
    assert named_tokens(ids[:2], []) == [1, 3]


def test_prompts_share_names_as_far_as_they_are_the_same():
    one, other = names([1] * 8 + [2] * 8), names([1] * 8 + [2, 2, 3, 2] + [2] * 4)
    assert one[:2] == other[:2]
    assert not set(one[2:]) & set(other[2:])
    assert names([1] * 8 + [2] * 3) == one[:2]


def test_a_name_depends_on_all_before_it_on_what_is_shown_and_on_the_root():
    ids = [1] * 4 + [IMAGE] * 8 + [2] * 4
    plain = names(ids, [Span(4, 12, "x", "image", 0)])
    assert len(set(plain)) == 4
    changed = names(ids, [Span(4, 12, "y", "image", 0)])
    assert changed[0] == plain[0]
    assert not set(changed[1:]) & set(plain[1:])
    assert not set(names([2] * 4 + [2] * 4)) & set(names([1] * 4 + [2] * 4))
    assert not set(names(ids, [Span(4, 12, "x", "image", 0)], "another")) & set(plain)


def test_a_picture_of_two_blocks_is_not_one_of_its_own_in_each():
    two = [Span(0, 4, "x", "image", 0), Span(4, 8, "x", "image", 1)]
    assert names([IMAGE] * 8, [Span(0, 8, "x", "image", 0)])[1] != names([IMAGE] * 8, two)[1]
