import dataclasses
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import qwen3_vl_memory_optimizations
from qwen3_vl_memory_optimizations.errors import CheckpointError, InputError
from qwen3_vl_memory_optimizations.model.inputs.images import load_image
from qwen3_vl_memory_optimizations.model.inputs.processor import load_processor
from qwen3_vl_memory_optimizations.model.inputs.video_files import FrameSampling
from qwen3_vl_memory_optimizations.model.inputs.video_patches import VideoSettings

TINY = Path(qwen3_vl_memory_optimizations.__file__).parent / "assets" / "tiny-qwen3vl"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def usable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@pytest.fixture(scope="module")
def processor():
    return load_processor(TINY)


def picture(width: int = 64, height: int = 64, *, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def prompt_ids(processor, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_one_image_makes_the_prompt_the_model_was_trained_on(processor):
    image = picture()
    tensors = processor.prepare("what shape is this?", [image])

    expected = (
        prompt_ids(processor, "<|im_start|>user\n<|vision_start|>")
        + [processor.tokens.image_id] * 16
        + prompt_ids(processor, "<|vision_end|>what shape is this?<|im_end|>\n<|im_start|>assistant\n")
    )
    assert tensors["input_ids"].tolist() == [expected]
    assert tensors["attention_mask"].tolist() == [[1] * len(expected)]
    assert tensors["mm_token_type_ids"].sum() == 16
    assert tensors["image_grid_thw"].tolist() == [[1, 8, 8]]
    # The first patch: 3 colours, the same picture twice in time, 8 x 8 pixels.
    patch = np.asarray(image, dtype=np.float32)[:8, :8].transpose(2, 0, 1) / 127.5 - 1
    stacked = np.stack([patch, patch], axis=1).ravel()
    assert np.abs(tensors["pixel_values"][0].numpy() - stacked).max() < 1e-5


def test_several_images_keep_their_order_and_their_own_size(processor):
    tensors = processor.prepare("which?", [picture(64, 64), picture(128, 32), picture(40, 100)])
    tokens = [grid[1] * grid[2] // 4 for grid in tensors["image_grid_thw"].tolist()]
    is_image = "".join(map(str, tensors["mm_token_type_ids"][0].tolist()))
    assert [len(run) for run in is_image.split("0") if run] == tokens
    assert len(tensors["pixel_values"]) == 4 * sum(tokens)


def test_text_alone_brings_no_pixels(processor):
    tensors = processor.prepare("what color?", system="is this yes or no?")
    assert set(tensors) == {"input_ids", "attention_mask", "mm_token_type_ids"}
    text = processor.tokenizer.decode(tensors["input_ids"][0])
    assert text.split()[:2] == ["<|im_start|>", "system"]


def test_max_pixels_bounds_images_and_frames(processor):
    tensors = processor.prepare("?", [picture(200, 100)], video=[picture(200, 100)] * 4, max_pixels=1024)
    for grid in tensors["image_grid_thw"].tolist() + tensors["video_grid_thw"].tolist():
        assert grid[1] * grid[2] * 8**2 <= 1024


def test_a_chat_template_that_knows_pictures_is_used(tmp_path):
    directory = copy_of_tiny(tmp_path)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    templated, plain = load_processor(directory), load_processor(TINY)
    assert templated.chat_template is not None
    for arguments in ({"images": [picture()] * 2}, {"video": [picture()] * 4, "system": "yes"}):
        ours, theirs = (p.prepare("what is this?", **arguments) for p in (templated, plain))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_chat_template_of_a_language_model_is_not_used_for_pictures(tmp_path):
    directory = copy_of_tiny(tmp_path)
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content + '' }}"}))
    assert load_processor(directory).prepare("what?", [picture()])["image_grid_thw"].tolist() == [[1, 8, 8]]


def test_a_video_is_groups_of_frames_with_their_times(processor):
    frames = [picture(seed=n) for n in range(5)]
    tensors = processor.prepare("what?", video=frames, video_fps=2.0)

    assert tensors["video_grid_thw"].tolist() == [[3, 8, 8]]
    values = tensors["pixel_values_videos"].reshape(3, 64, 3, 2, 8, 8)
    corner = np.asarray(frames[3], dtype=np.float32)[:8, :8].transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(values[1, 0, :, 1].numpy() - corner).max() < 1e-5
    # The fifth frame has no partner: it stands for two.
    assert torch.equal(values[2, :, :, 0], values[2, :, :, 1])

    unknown = "".join(
        f"<{second} seconds><|vision_start|>{'<|video_pad|>' * 16}<|vision_end|>" for second in (0.2, 1.2, 2.0)
    )
    question = f"<|im_start|>user\n{unknown}what?<|im_end|>\n<|im_start|>assistant\n"
    assert tensors["input_ids"].tolist() == [prompt_ids(processor, question)]
    assert (tensors["mm_token_type_ids"] == 2).sum() == 48


def test_one_frame_is_a_video(processor):
    assert processor.prepare("?", video=[picture()])["video_grid_thw"].tolist() == [[1, 8, 8]]


def test_a_directory_of_frames_is_read_in_the_order_of_their_numbers(processor, tmp_path):
    for number in (10, 9):
        picture(seed=number).save(tmp_path / f"frame_{number}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    ours = processor.prepare("?", video=tmp_path)
    given = processor.prepare("?", video=[picture(seed=9), picture(seed=10)])
    assert torch.equal(ours["pixel_values_videos"], given["pixel_values_videos"])


def test_frames_of_two_sizes_are_refused(processor):
    with pytest.raises(InputError, match=r"\(64, 64\) is followed by \(32, 64\)"):
        processor.prepare("?", video=[picture(), picture(32, 64)])


def test_frames_are_sampled_as_transformers_does():
    sampling = FrameSampling(frames_per_second=2, min_frames=4, max_frames=8)
    assert sampling.indices(100, 25.0) == [0, 14, 28, 42, 57, 71, 85, 99]
    assert sampling.indices(25, 25.0) == [0, 8, 16, 24]
    assert sampling.indices(2, 25.0) == [0, 1]
    assert len(sampling.indices(100_000, 25.0)) == 8


def test_more_frames_than_the_model_takes_are_thinned_out(processor):
    settings = dataclasses.replace(processor.video, sampling=FrameSampling(max_frames=4))
    few = dataclasses.replace(processor, video=settings)
    assert few.prepare("?", video=[picture()] * 9)["video_grid_thw"].tolist() == [[2, 8, 8]]


@pytest.mark.parametrize(
    ("frames", "height", "width", "expected"),
    [
        # Of transformers' smart_resize, with the settings of the published models.
        (4, 480, 640, (480, 640)),
        (9, 1080, 1920, (640, 1152)),
        (40, 720, 1280, (576, 1056)),
        (5, 20, 50, (32, 64)),
        (768, 1080, 1920, (128, 224)),
    ],
)
def test_frame_size_follows_the_reference(frames, height, width, expected):
    settings = VideoSettings(min_pixels=4096, max_pixels=25165824)
    assert settings.frame_size(frames, height, width) == expected


def test_exif_orientation_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture(40, 20).save(tmp_path / "turned.png", exif=exif)
    turned = load_image(tmp_path / "turned.png")
    assert turned.size == (20, 40)
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(picture(40, 20)), k=-1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16))
    else:
        image = Image.new("RGB", (8, 8), (128, 128, 128)).convert(mode)
    path = tmp_path / ("picture.tiff" if mode in ("CMYK", "YCbCr") else "picture.png")
    image.save(path)
    loaded = load_image(path)
    assert (loaded.mode, loaded.size) == ("RGB", (8, 8))
    if mode != "1":
        assert abs(int(np.asarray(loaded).mean()) - 128) <= 2


def test_transparency_is_laid_on_white():
    assert load_image(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


def damaged_png(directory: Path) -> Path:
    path = directory / "damaged.png"
    picture().save(path)
    path.write_bytes(path.read_bytes()[:2000])
    return path


def damaged_jpeg(directory: Path) -> Path:
    path = directory / "damaged.jpg"
    picture().save(path)
    path.write_bytes(path.read_bytes()[:900])
    return path


def text_file(directory: Path) -> Path:
    path = directory / "image.png"
    path.write_text("this is no image")
    return path


def empty_file(directory: Path) -> Path:
    path = directory / "empty.png"
    path.touch()
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (damaged_png, "damaged or truncated"),
        (damaged_jpeg, "damaged or truncated"),
        (text_file, "convert it to PNG"),
        (empty_file, "is empty"),
        (lambda directory: directory / "none.png", "no such image"),
        (lambda directory: directory, "is a directory"),
    ],
)
def test_an_image_that_cannot_be_read_is_named(processor, tmp_path, make, words):
    path = make(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        processor.prepare("what?", [path])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"images": [Image.new("RGB", (0, 5))]}, "no pixels"),
        ({"images": [Image.new("RGB", (2010, 10))]}, "200 times"),
        ({"video": [Image.new("RGB", (2010, 10))]}, "200 times"),
        ({"video": []}, "contains no images"),
        ({"video": "no-such.mp4"}, "no such video"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"images": [picture()], "max_pixels": 100}, "256 pixels of one token"),
    ],
)
def test_what_cannot_be_asked_is_refused(processor, arguments, words):
    with pytest.raises(InputError) as caught:
        processor.prepare(**{"prompt": "what?"} | arguments)
    assert words in str(caught.value)


def test_a_video_file_without_pyav_names_the_remedy(processor, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(InputError, match=r"pip install 'qwen3-vl-memory-optimizations\[video\]'"):
        processor.prepare("what?", video=tmp_path / "clip.mp4")


def write_clip(path: Path, n_frames: int, *, fps: int = 10) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(n_frames):
            level = np.full((64, 64, 3), 255 * number // (n_frames - 1), dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(level, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@pytest.mark.skipif(not usable("av"), reason="PyAV is not installed")
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_video_file_is_sampled_over_its_whole_length(processor, tmp_path, suffix):
    path = tmp_path / f"clip.{suffix}"
    write_clip(path, 31)
    tensors = processor.prepare("what?", video=path)
    grid = tensors["video_grid_thw"].tolist()[0]
    levels = tensors["pixel_values_videos"].reshape(grid[0], 64, 3, 2, 64).mean(dim=(1, 2, 4)).flatten()
    # 3.1 seconds at 2 frames a second: the first, the last and 4 between, evenly bright.
    assert np.allclose(levels.numpy(), np.linspace(-1, 1, 6), atol=0.05)


@pytest.mark.skipif(not usable("av"), reason="PyAV is not installed")
def test_a_file_that_is_no_video_is_named(processor, tmp_path):
    (tmp_path / "clip.mp4").write_text("this is no video")
    with pytest.raises(InputError, match=r"clip\.mp4 is not a video"):
        processor.prepare("what?", video=tmp_path / "clip.mp4")
    picture().save(tmp_path / "still.mp4", format="PNG")
    write_clip(tmp_path / "whole.mkv", 31)
    (tmp_path / "cut.mkv").write_bytes((tmp_path / "whole.mkv").read_bytes()[:300])
    with pytest.raises(InputError, match=r"cut\.mkv"):
        processor.prepare("what?", video=tmp_path / "cut.mkv")


@pytest.mark.skipif(not usable("torchvision"), reason="transformers' own processor needs torchvision")
def test_images_and_video_equal_transformers_own_processor(processor):
    from transformers import AutoProcessor

    reference = AutoProcessor.from_pretrained(TINY, local_files_only=True)
    frames = [picture(seed=n) for n in range(4)]
    placeholders = "<|vision_start|><|image_pad|><|vision_end|><|video_pad|>"
    expected = reference(
        text=[f"<|im_start|>user\n{placeholders}what?<|im_end|>\n<|im_start|>assistant\n"],
        images=[picture(100, 50)],
        videos=[np.stack([np.asarray(frame) for frame in frames])],
        videos_kwargs={
            "video_metadata": [{"total_num_frames": 4, "fps": 2.0, "frames_indices": [0, 1, 2, 3]}],
            "do_sample_frames": False,
            "cap_pixels_per_frame": True,
        },
        return_tensors="pt",
    )
    ours = processor.prepare("what?", [picture(100, 50)], video=frames, video_fps=2.0)
    assert set(ours) == set(expected)
    for key in expected:
        assert torch.allclose(ours[key], expected[key], atol=1e-5), key


def test_the_streamer_hands_over_the_answer_and_counts_tokens(processor):
    pieces: list[str] = []
    streamer = processor.streamer(pieces.append)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in prompt_ids(processor, "1 2 3"):
        streamer.put(torch.tensor([token]))
    streamer.put(torch.tensor([processor.tokenizer.eos_token_id]))
    streamer.end()
    assert "".join(pieces).strip() == "1 2 3"
    assert streamer.n_tokens == 4
    assert streamer.first_token_s <= streamer.last_token_s


def test_decode_leaves_special_tokens_out(processor):
    ids = prompt_ids(processor, "1 2<|im_end|>")
    assert processor.decode(ids) == processor.decode(torch.tensor(ids)) == "1 2"


def copy_of_tiny(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    shutil.copytree(TINY, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    return directory


@pytest.mark.parametrize("missing", ["tokenizer.json", "preprocessor_config.json", "config.json"])
def test_a_checkpoint_without_one_of_its_files_is_refused(tmp_path, missing):
    directory = copy_of_tiny(tmp_path)
    (directory / missing).unlink()
    with pytest.raises(CheckpointError) as caught:
        load_processor(directory)
    assert caught.value.path == directory


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        load_processor(tmp_path / "none")


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    directory = copy_of_tiny(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"image_token_id": 151655}))
    with pytest.raises(CheckpointError, match="lacks the vision tokens"):
        load_processor(directory)
