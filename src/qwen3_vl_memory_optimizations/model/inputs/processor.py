"""Convert a prompt, images and a video into the tensors of a Qwen3-VL model, and token ids back to text.

Image pixels come from transformers' image processor: its torchvision back end if torchvision is usable, else its PIL
back end.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import TextStreamer

from ...errors import CheckpointError, InputError
from ..checkpoint.formats import files_directory
from .detail import detail_pixels
from .documents import DocumentPage, OpenPage
from .images import ImageSource, OpenImage, listed, open_image
from .names import file_name, name_inputs
from .video_files import VideoSource, load_video
from .video_patches import MAX_ASPECT_RATIO, VideoSettings, group_seconds, video_tensors

_PROMPT_PLACE, _SYSTEM_PLACE = "\uf8f1\uf8f0", "\uf8f1\uf8f2"  # private use, found in no text
_PLAIN_SYSTEM = "<|im_start|>system\n{}<|im_end|>\n"
_PLAIN_QUESTION = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def load_processor(directory: str | Path) -> Processor:
    """Return the processor of a checkpoint, given by any path that `open_checkpoint` accepts.

    Raises:
        CheckpointError: a file of the tokenizer or of the image processor is missing or cannot be read.
    """
    directory = files_directory(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; check the path", path=directory)
    _check_torchvision(directory)
    from transformers import AutoImageProcessor, AutoTokenizer

    config = _read_json(directory, "config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        image_processor = AutoImageProcessor.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory}: the tokenizer or image processor cannot be loaded ({error}); a checkpoint needs "
            "tokenizer.json, tokenizer_config.json and preprocessor_config.json",
            path=directory,
        ) from error
    return Processor(
        tokenizer=tokenizer,
        image_processor=image_processor,
        tokens=VisionTokens.of(config, tokenizer, directory),
        video=_video_settings(directory),
        chat_template=_chat_template(directory, tokenizer),
    )


def load_tokenizer(directory: Path) -> Any:
    """Return the tokenizer of a checkpoint, given by any path that `open_checkpoint` accepts.

    Raises:
        CheckpointError: there is no loadable tokenizer.
    """
    from transformers import AutoTokenizer

    directory = files_directory(directory)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: the tokenizer cannot be loaded ({error})", path=directory) from error
    if not tokenizer("a text", add_special_tokens=False)["input_ids"]:
        # If the files are missing, transformers creates a tokenizer with an empty vocabulary.
        raise CheckpointError(f"{directory}: there is no tokenizer; add tokenizer.json", path=directory)
    return tokenizer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VisionTokens:
    """The placeholder tokens of images and videos in a prompt; the ids are those of the model's configuration."""

    image: str
    video: str
    start: str
    end: str
    image_id: int
    video_id: int

    @classmethod
    def of(cls, config: dict[str, Any], tokenizer: Any, directory: Path) -> VisionTokens:
        """Return the vision tokens of a checkpoint.

        Raises:
            CheckpointError: the configuration names no vision tokens, or the tokenizer lacks them.
        """
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        missing = [name for name in names if not isinstance(config.get(name), int)]
        if missing:
            message = f"{directory}: config.json has no {', '.join(missing)}; pass a vision-language checkpoint"
            raise CheckpointError(message, path=directory)
        image, video, start, end = tokenizer.convert_ids_to_tokens([config[name] for name in names])
        if None in (image, video, start, end):
            message = f"{directory}: the tokenizer lacks the vision tokens that config.json names"
            raise CheckpointError(message, path=directory)
        ids = {"image_id": config["image_token_id"], "video_id": config["video_token_id"]}
        return cls(image=image, video=video, start=start, end=end, **ids)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """Prepares the input of a model, and decodes its output. Created by `load_processor`."""

    tokenizer: Any
    image_processor: Any
    tokens: VisionTokens
    video: VideoSettings
    chat_template: str | None

    def prepare(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        video: VideoSource | None = None,
        system: str | None = None,
        *,
        max_pixels: int | None = None,
        detail: str | None = None,
        video_fps: float | None = None,
        fetch: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Return the keyword arguments of the model's `generate` for one prompt.

        Args:
            prompt: the question. Text that spells a control token stays plain text.
            images: one or several in any form (`model.inputs.images.ImageSource`), placed in order before the question.
            video: a video file, a directory of frames, or frames; placed after the images.
            system: system prompt.
            max_pixels: the most pixels per image and per frame; larger ones are scaled down. One token covers
                `(patch_size * merge_size) ** 2` pixels.
            detail: a level that stands for `max_pixels`: `low`, `medium`, `document` or `high`.
            video_fps: the frame rate of frames given as images.
            fetch: fetch `http(s):` URLs of images.

        Returns:
            `input_ids`, `attention_mask` and `mm_token_type_ids` of shape (1, tokens); with images
            `pixel_values` (patches, values) and `image_grid_thw` (images, 3); with a video
            `pixel_values_videos` and `video_grid_thw`.

        Raises:
            InputError: there is no question, or an image or video cannot be used.
        """
        images = listed(images)
        if detail is not None and max_pixels is None:
            max_pixels = detail_pixels(detail)
        self._check(prompt, images, video, system, max_pixels)
        asked = prompt
        tensors: dict[str, torch.Tensor] = {}
        image_texts: list[str] = []
        video_text = ""
        if images:
            tensors |= self._image_tensors(images, max_pixels, fetch)
            merged = self.image_processor.merge_size**2
            grids = tensors["image_grid_thw"].tolist()
            image_texts = [self.tokens.image * (math.prod(grid) // merged) for grid in grids]
        if video is not None:
            settings = self.video.limited_to(max_pixels)
            frames = load_video(video, settings.sampling, settings.frame_size, fps=video_fps)
            tensors |= video_tensors(frames, settings)
            _, rows, columns = tensors["video_grid_thw"][0].tolist()
            pads = self.tokens.video * (rows * columns // settings.merge_size**2)
            shown = f"{self.tokens.start}{pads}{self.tokens.end}"
            video_text = "".join(f"<{second:.1f} seconds>{shown}" for second in group_seconds(frames, settings))
        texts = {} if self._is_plain(prompt, system or "") else {_PROMPT_PLACE: prompt, _SYSTEM_PLACE: system or ""}
        if texts:
            prompt, system = _PROMPT_PLACE, system and _SYSTEM_PLACE
        chat = self._chat_text(prompt, len(images), video is not None, system)
        inputs = self._text_tensors(self._with_placeholders(chat, image_texts, video_text), texts) | tensors
        name_inputs(inputs, images=[file_name(each) for each in images], video=file_name(video), prompt=asked)
        return inputs

    def check(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        video: VideoSource | None = None,
        system: str | None = None,
        *,
        max_pixels: int | None = None,
        fetch: bool = False,
    ) -> None:
        """Raise what `prepare` would, before a model is loaded; for a video, check only that it exists.

        Images are not decoded at full size, because memory may be too small for that.

        Raises:
            InputError: see `prepare`.
        """
        images = listed(images)
        self._check(prompt, images, video, system, max_pixels)
        for opened in self.open_images(images, max_pixels=max_pixels, fetch=fetch):
            opened.check()
        if isinstance(video, str | os.PathLike) and not Path(video).exists():
            load_video(video, self.video.sampling, self.video.frame_size)  # raises the right error

    def _check(
        self,
        prompt: str,
        images: Sequence[ImageSource],
        video: VideoSource | None,
        system: str | None,
        max_pixels: int | None,
    ) -> None:
        if not (prompt.strip() or images or video is not None):
            raise InputError("the prompt is empty and there is no image; pass at least one of them")
        for name, text in (("prompt", prompt), ("system", system or "")):
            if not text.isprintable() and any(0xD800 <= ord(letter) < 0xE000 for letter in text):
                raise InputError(f"{name}: not valid text (bytes that are not UTF-8?); pass UTF-8")
        self._check_max_pixels(max_pixels)

    def open_images(
        self, images: Sequence[ImageSource], *, max_pixels: int | None = None, fetch: bool = False
    ) -> list[OpenImage | OpenPage]:
        """Read the headers of images, and the sizes of pages, which are rendered with `max_pixels`.

        Raises:
            InputError: an image cannot be used.
        """
        opened: list[OpenImage | OpenPage] = []
        for number, source in enumerate(images, 1):
            if isinstance(source, DocumentPage):
                source = source.open(max_pixels)
            if isinstance(source, OpenPage):
                opened.append(source.at_most(int(self.image_processor.size["longest_edge"])))
            else:
                opened.append(open_image(source, number, fetch=fetch))
        for each in opened:
            if max(each.width, each.height) > MAX_ASPECT_RATIO * min(each.width, each.height):
                size = f"{each.width} x {each.height}"
                raise InputError(f"{each.name}: {size} is more than {MAX_ASPECT_RATIO} times as long as wide; crop it")
        return opened

    def ask_again(self, prompt: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the arguments of `generate` for another question about the pictures of a prepared prompt.

        The pixels are shared, so the pictures are known again even if their files or the budget changed.

        Args:
            prompt: the question.
            inputs: from `prepare`, with the system prompt and the pictures that also belong to this question.

        Raises:
            InputError: the question is not valid text.
        """
        self._check(prompt, [inputs], None, None, None)
        ids = inputs["input_ids"][0]
        end_id = self.tokenizer.convert_tokens_to_ids(self.tokens.end)
        kept = int((ids == end_id).nonzero()[-1]) + 1 if bool((ids == end_id).any()) else 0
        if not kept:
            raise InputError("the prepared prompt shows no picture; prepare each question on its own")
        texts = {} if self._is_plain(prompt) else {_PROMPT_PLACE: prompt}
        chat = self._chat_text(_PROMPT_PLACE if texts else prompt, 1, False, None)
        asked = self._text_tensors(chat, texts)
        start = int((asked["input_ids"][0] == end_id).nonzero()[-1]) + 1
        tensors = {
            name: torch.cat([inputs[name][:, :kept], asked[name][:, start:]], dim=1)
            for name in ("input_ids", "attention_mask", "mm_token_type_ids")
        }
        name_inputs(tensors, prompt=prompt)
        return {**inputs, **tensors}

    def decode(self, token_ids: Any) -> str:
        """Return the text of token ids (a list, or a one-dimensional tensor), without special tokens."""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def streamer(self, on_text: Callable[[str], None]) -> AnswerStreamer:
        """Return a streamer for `generate` that passes the answer on as it is generated."""
        return AnswerStreamer(self.tokenizer, on_text)

    def _is_plain(self, *texts: str) -> bool:
        """Return whether no text spells a control token."""
        added = self.tokenizer.added_tokens_decoder.values()
        control = {token.content for token in added if token.special}.union(dataclasses.astuple(self.tokens)[:4])
        return not any(token in text for token in control for text in texts)

    @property
    def least_pixels(self) -> int:
        """Pixels per token, which is the minimum per image."""
        return int((self.image_processor.patch_size * self.image_processor.merge_size) ** 2)

    def image_grid(self, width: int, height: int, *, max_pixels: int | None = None) -> tuple[int, int]:
        """Return the rows and columns of patches that `prepare` makes of an image of this size."""
        limits = self._limits(max_pixels)
        shortest, longest = min(width, height), max(width, height)
        if longest > MAX_ASPECT_RATIO * shortest:
            return 0, 0  # `prepare` rejects it
        side = self.image_processor.patch_size * self.image_processor.merge_size
        least, most = limits["shortest_edge"], limits["longest_edge"]
        # The rule of transformers (`smart_resize`), which returns only the product of the two.
        rows, columns = round(height / side) * side, round(width / side) * side
        if rows * columns > most:
            shrink = math.sqrt(height * width / most)
            rows, columns = (max(side, math.floor(extent / shrink / side) * side) for extent in (height, width))
        elif rows * columns < least:
            grow = math.sqrt(least / (height * width))
            rows, columns = (math.ceil(extent * grow / side) * side for extent in (height, width))
        return rows // self.image_processor.patch_size, columns // self.image_processor.patch_size

    def _limits(self, max_pixels: int | None) -> dict[str, int]:
        size = self.image_processor.size
        least, most = int(size["shortest_edge"]), int(size["longest_edge"])
        if max_pixels is None:
            return {"shortest_edge": least, "longest_edge": most}
        return {"shortest_edge": min(least, max_pixels), "longest_edge": min(most, max_pixels)}

    def _check_max_pixels(self, max_pixels: int | None) -> None:
        if max_pixels is not None and max_pixels < self.least_pixels:
            raise InputError(
                f"max_pixels={max_pixels} is less than the {self.least_pixels} pixels of one token; raise it"
            )

    def _image_tensors(
        self, images: Sequence[ImageSource], max_pixels: int | None, fetch: bool
    ) -> dict[str, torch.Tensor]:
        options = {} if max_pixels is None else {"size": self._limits(max_pixels)}
        parts: list[dict[str, torch.Tensor]] = []
        for opened in self.open_images(images, max_pixels=max_pixels, fetch=fetch):  # one decoded at a time
            parts.append(dict(self.image_processor([opened.decode()], return_tensors="pt", **options)))
        if len(parts) == 1:
            return parts[0]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _chat_text(self, prompt: str, n_images: int, has_video: bool, system: str | None) -> str:
        # A template without image tokens belongs to a language model; use Qwen's plain form instead.
        if self.chat_template is None or self.tokens.image not in self.chat_template:
            pictures = [self.tokens.image] * n_images + [self.tokens.video] * has_video
            shown = "".join(f"{self.tokens.start}{picture}{self.tokens.end}" for picture in pictures)
            return (_PLAIN_SYSTEM.format(system) if system else "") + _PLAIN_QUESTION.format(shown + prompt)
        kinds = ["image"] * n_images + ["video"] * has_video
        content = [{"type": kind} for kind in kinds] + [{"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        if system:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=True
        )
        if (text.count(self.tokens.image), text.count(self.tokens.video)) != (n_images, int(has_video)):
            raise InputError("the chat template of this checkpoint does not place one token per image and video")
        return str(text)

    def _with_placeholders(self, chat: str, image_texts: list[str], video_text: str) -> str:
        tokens = self.tokens
        # Each frame group brings its own start and end tokens. Remove the pair that templates put around a whole video,
        # as the model's original processor does; later versions of transformers keep it.
        whole_video = f"{tokens.start}{tokens.video}{tokens.end}"
        images = iter(image_texts)
        pattern = "|".join(map(re.escape, (whole_video, tokens.video, tokens.image)))
        return re.sub(pattern, lambda match: next(images) if match[0] == tokens.image else video_text, chat)

    def _text_tensors(self, text: str, texts: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """Return the tensors of a chat; `texts` maps its placeholders to literal text, whatever that spells."""
        found: list[int] = []
        for part in re.split(f"({'|'.join(texts)})", text) if texts else [text]:
            is_text = part in texts
            options = {"split_special_tokens": True} if is_text else {}
            found += self.tokenizer(texts[part] if is_text else part, add_special_tokens=False, **options)["input_ids"]
        ids = torch.tensor([found])
        kinds = (ids == self.tokens.image_id).long() + 2 * (ids == self.tokens.video_id).long()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}


class AnswerStreamer(TextStreamer):
    """Passes the answer on in pieces of text, and records when its tokens arrived.

    Attributes:
        n_tokens: tokens of the answer so far.
        n_first_tokens: number that arrived first, together: one, or more with speculative decoding.
        first_token_s: `time.perf_counter()` at the first token.
        last_token_s: the same at the last token.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.n_tokens = 0
        self.n_first_tokens = 0
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self._on_text = on_text

    def put(self, value: torch.Tensor) -> None:
        """Take new token ids from `generate`; the first call brings the prompt."""
        if not self.next_tokens_are_prompt:
            self.n_tokens += value.numel()
            self.last_token_s = time.perf_counter()
            if self.first_token_s is None:
                self.first_token_s = self.last_token_s
                self.n_first_tokens = self.n_tokens
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on a piece of text that later tokens cannot change."""
        if text:
            self._on_text(text)


def _check_torchvision(directory: Path) -> None:
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        # transformers would then assume torchvision is usable, and none of its image classes could be imported.
        raise CheckpointError(
            f"torchvision is installed but cannot be imported with torch {torch.__version__} ({error}); "
            "install the torchvision that matches this torch, or uninstall it: it is optional",
            path=directory,
        ) from error


def _chat_template(directory: Path, tokenizer: Any) -> str | None:
    separate = None
    if not (directory / "chat_template.jinja").exists():
        separate = _read_json(directory, "chat_template.json").get("chat_template")
    template = separate or tokenizer.chat_template
    return template if isinstance(template, str) else None


def _video_settings(directory: Path) -> VideoSettings:
    found = _read_json(directory, "processor_config.json").get("video_processor")
    found = found or _read_json(directory, "video_preprocessor_config.json")
    return VideoSettings.from_mapping(found or _read_json(directory, "preprocessor_config.json"))


def _read_json(directory: Path, name: str) -> dict[str, Any]:
    """Return a JSON file of a checkpoint; empty if it is missing."""
    try:
        table = json.loads((directory / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / name} cannot be read ({error})", path=directory) from error
    return table if isinstance(table, dict) else {}
