"""Pictures are as large as the budget has room for, told before the work."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen3_vl_memory_optimizations import MemoryBudgetExceeded, create_optimized_model
from qwen3_vl_memory_optimizations.model.inputs.images import OpenImage
from qwen3_vl_memory_optimizations.model.inputs.picture_budget import picture_cost, prepare_within_budget
from qwen3_vl_memory_optimizations.model.inputs.processor import load_processor
from qwen3_vl_memory_optimizations.process import rss_bytes

from . import tiny

QUESTION = "what shape is in the image?"
LARGE = 16 * 2**20


@pytest.fixture(scope="module")
def processor():
    """The processor of the tiny model, which takes images and videos of up to 16 megapixels."""
    processor = load_processor(tiny.DIRECTORY)
    processor.image_processor.size = {"shortest_edge": 64 * 64, "longest_edge": LARGE}
    video = dataclasses.replace(processor.video, max_pixels=LARGE, max_tokens_per_frame=LARGE)
    processor = dataclasses.replace(processor, video=video)
    return processor


def load(**settings):
    return create_optimized_model(tiny.DIRECTORY, {"codec": "none", **settings})


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 900),
    st.integers(1, 900),
    st.one_of(st.none(), st.integers(256, 200_000)),
)
def test_grids_are_told_from_sizes(processor_of_all, width, height, max_pixels):
    if max(width, height) > 200 * min(width, height):
        return
    image = Image.new("RGB", (width, height))
    found = processor_of_all.prepare(QUESTION, [image], max_pixels=max_pixels)["image_grid_thw"][0].tolist()
    assert found == [1, *processor_of_all.image_grid(width, height, max_pixels=max_pixels)]


@pytest.fixture(scope="module")
def processor_of_all(processor):
    return processor


def test_the_cost_of_pictures_is_that_of_their_patches_and_tokens():
    config = tiny.reference().config
    one = picture_cost(config, [[1, 8, 8]], text_tokens=10, itemsize=4)
    assert (one.patches, one.tokens) == (64, 26)
    two = picture_cost(config, [[1, 8, 8], [2, 64, 64]], text_tokens=10, itemsize=4)
    assert (two.patches, two.tokens) == (64 + 8192, 26 + 2048)
    assert two.n_bytes > one.n_bytes + 8192 * 384 * 8  # their pixels alone


def test_a_photo_that_does_not_fit_is_scaled_down_and_answered(processor):
    photo = Image.new("RGB", (4000, 3000), (200, 30, 30))
    limit = rss_bytes() + 300_000_000
    model = load(ram_budget=limit)
    try:
        inputs, notes = prepare_within_budget(processor, model, QUESTION, [photo])
        rows, columns = inputs["image_grid_thw"][0, 1:].tolist()
        assert notes == [f"image 1: scaled from 4000 x 3000 to {columns * 8} x {rows * 8} to fit the memory budget"]
        assert 0.7 < rows / columns / 0.75 < 1.3
        free = model.memory_optimizer.free_for_activations()
        cost = picture_cost(model.config, inputs["image_grid_thw"].tolist(), text_tokens=30, itemsize=4)
        assert 0.5 * free < cost.n_bytes < free  # as large as it may be
    finally:
        model.memory_optimizer.close()


def test_memory_is_set_aside_before_a_photo_is_decoded_and_before_it_is_cut_into_patches(
    processor, monkeypatch, tmp_path
):
    Image.new("RGB", (2000, 1500), (200, 30, 30)).save(tmp_path / "photo.jpg")
    model = load(ram_budget=rss_bytes() + 400_000_000)
    ledger, held = model.memory_optimizer.pager.ledger, []
    for owner, name in ((OpenImage, "decode"), (type(processor), "prepare")):
        real = getattr(owner, name)

        def note(*args, real=real, **kwargs):
            held.append(ledger.held_bytes("activations"))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, note)
    try:
        inputs, _ = prepare_within_budget(processor, model, QUESTION, [tmp_path / "photo.jpg"])
        _, decoding, preparing, *_ = held  # the text alone was first
        cost = picture_cost(model.config, inputs["image_grid_thw"].tolist(), text_tokens=30, itemsize=4)
        assert decoding >= 2000 * 1500 * 12
        assert preparing >= cost.n_bytes
    finally:
        model.memory_optimizer.close()


def test_what_fits_and_what_has_no_budget_stays_as_it_is(processor):
    photo = Image.new("RGB", (640, 480))
    for settings_ in ({}, {"ram_budget": rss_bytes() + 1_000_000_000}):
        model = load(**settings_)
        inputs, notes = prepare_within_budget(processor, model, QUESTION, [photo])
        assert (inputs["image_grid_thw"].tolist(), notes) == ([[1, 60, 80]], [])
        model.memory_optimizer.close()


def test_a_photo_is_refused_where_the_policy_says_so(processor):
    model = load(ram_budget=rss_bytes() + 300_000_000, image_policy="refuse")
    try:
        with pytest.raises(
            MemoryBudgetExceeded, match=r"188000 patches and 470\d\d tokens.*at most \d+ pixels"
        ) as caught:
            prepare_within_budget(processor, model, QUESTION, [Image.new("RGB", (4000, 3000))])
        assert caught.value.requested_bytes > caught.value.available_bytes > 0
        assert prepare_within_budget(processor, model, QUESTION, [Image.new("RGB", (64, 64))])[1] == []
    finally:
        model.memory_optimizer.close()


@pytest.mark.parametrize("n_images", [0, 1])
def test_a_video_is_scaled_down_too(processor, n_images, monkeypatch):
    frames = [Image.new("RGB", (512, 512), (40 * index, 0, 0)) for index in range(4)]
    images = [Image.new("RGB", (64, 64))] * n_images
    model = load(ram_budget=rss_bytes() + 300_000_000)
    try:
        whole = processor.prepare(QUESTION, (), frames)
        free = picture_cost(model.config, whole["video_grid_thw"].tolist(), text_tokens=60, itemsize=4).n_bytes
        # Of which eight tenths may be used.
        monkeypatch.setattr(type(model.memory_optimizer), "free_for_activations", lambda self: free)
        inputs, notes = prepare_within_budget(processor, model, QUESTION, images, frames)
        cost = picture_cost(model.config, inputs["video_grid_thw"].tolist(), text_tokens=60, itemsize=4)
        assert cost.n_bytes < 0.8 * free
        assert inputs["video_grid_thw"].prod() < whole["video_grid_thw"].prod()
        assert [note for note in notes if "frames scaled" in note]
    finally:
        model.memory_optimizer.close()
