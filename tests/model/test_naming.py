"""Where a prompt is cut, and what the keys of its blocks tell apart."""

import pytest
from qwen3_vl_memory_optimizations.model.prompt_blocks import Span, cut, find_spans

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


def test_blocks_cover_the_prompt_and_end_where_pictures_do():
    ids = [1] * 10 + [IMAGE] * 9 + [2] * 11
    blocks = cut(ids, [Span(10, 19, "x", "image", 0)], "root", 4)
    assert [(block.start, block.stop) for block in blocks] == [
        *[(0, 4), (4, 8), (8, 10)],
        *[(10, 14), (14, 18), (18, 19)],
        *[(19, 23), (23, 27)],
    ]
    assert [block.stop for block in blocks if block.ends_whole] == [4, 8, 10, 19, 23, 27]


def keys(ids, spans=(), root="root"):
    return [block.key for block in cut(ids, spans, root, 4)]


def test_prompts_share_keys_as_far_as_they_are_the_same():
    one, other = keys([1] * 8 + [2] * 8), keys([1] * 8 + [2, 2, 3, 2] + [2] * 4)
    assert one[:2] == other[:2]
    assert not set(one[2:]) & set(other[2:])
    assert keys([1] * 8 + [2] * 3) == one[:2]


def test_a_key_depends_on_all_before_it_on_what_is_shown_and_on_the_root():
    ids = [1] * 4 + [IMAGE] * 8 + [2] * 4
    plain = keys(ids, [Span(4, 12, "x", "image", 0)])
    assert len(set(plain)) == 4
    changed = keys(ids, [Span(4, 12, "y", "image", 0)])
    assert changed[0] == plain[0]
    assert not set(changed[1:]) & set(plain[1:])
    assert not set(keys([2] * 4 + [2] * 4)) & set(keys([1] * 4 + [2] * 4))
    assert not set(keys(ids, [Span(4, 12, "x", "image", 0)], "another")) & set(plain)


def test_a_picture_of_two_blocks_is_not_one_of_its_own_in_each():
    two = [Span(0, 4, "x", "image", 0), Span(4, 8, "x", "image", 1)]
    assert keys([IMAGE] * 8, [Span(0, 8, "x", "image", 0)])[1] != keys([IMAGE] * 8, two)[1]
