"""The shipped tiny Qwen3-VL, its inputs, and the unoptimised model to compare with."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import qwen3_vl_memory_optimizations

DIRECTORY = Path(qwen3_vl_memory_optimizations.__file__).parent / "assets" / "tiny-qwen3vl"
HELDOUT = Path(__file__).parents[1] / "data" / "heldout.npz"
IMAGE, VIDEO, VISION_START, VISION_END = 5, 6, 3, 4


@lru_cache(maxsize=1)
def reference() -> Any:
    """The model as plain transformers loads it, in fp32."""
    from transformers import Qwen3VLForConditionalGeneration

    return aligned(Qwen3VLForConditionalGeneration.from_pretrained(DIRECTORY, dtype=torch.float32).eval())


def aligned(model: Any) -> Any:
    """Move weights to where torch would allocate them; return the model.

    `from_pretrained` leaves them in the mapped file, at any multiple of 8. On some processors (AMD) a product with one
    row has other bits where the weight does not begin at a multiple of 16, so that transformers differs from itself.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DIRECTORY)


def ids_of(text: str) -> list[int]:
    return list(tokenizer()(text, add_special_tokens=False).input_ids)


def patches(images: np.ndarray) -> torch.Tensor:
    """uint8 `[B, 64, 64, 3]` -> pixel values `[B * 64, 384]` in the order of Qwen2VLImageProcessor."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    x = x.view(len(x), 3, 4, 2, 8, 4, 2, 8).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.reshape(len(images) * 64, 3, 1, 8, 8).expand(-1, -1, 2, -1, -1)
    return x.reshape(len(images) * 64, -1).contiguous()


def prompt(question: str, n_images: int = 1, placeholder: int = IMAGE) -> list[int]:
    """Token ids of a question about images."""
    picture = [VISION_START, *[placeholder] * 16, VISION_END]
    return [
        *ids_of("<|im_start|>user\n"),
        *picture * n_images,
        *ids_of(f"{question}<|im_end|>\n<|im_start|>assistant\n"),
    ]


def batch(prompts: list[list[int]], images: np.ndarray | None) -> dict[str, torch.Tensor]:
    """Left-padded inputs of the model."""
    length = max(len(ids) for ids in prompts)
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if images is not None:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
        inputs["pixel_values"] = patches(images)
        inputs["image_grid_thw"] = torch.tensor([[1, 8, 8]] * len(images))
    return inputs


def make_draft(directory: Path, n_layers: int = 2) -> Path:
    """Write a copy that has fewer text layers."""
    shutil.copytree(DIRECTORY, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((DIRECTORY / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = n_layers
    (directory / "config.json").write_text(json.dumps(config))
    prefix = "model.language_model.layers."
    tensors = load_file(DIRECTORY / "model.safetensors")
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith(prefix) or int(name.removeprefix(prefix).split(".")[0]) < n_layers
    }
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def make_text_draft(directory: Path, n_layers: int = 4) -> Path:
    """Write the text layers as a `Qwen3ForCausalLM`, which knows no images."""
    make_draft(directory, n_layers)
    config = json.loads((directory / "config.json").read_text())["text_config"]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
    config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = load_file(directory / "model.safetensors")
    prefix = "model.language_model."
    text = {f"model.{name.removeprefix(prefix)}": x for name, x in tensors.items() if name.startswith(prefix)}
    save_file(text, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def count_forwards(model: Any) -> list[int]:
    """Return a list that grows at each forward of a model, by the number of rows of its logits."""
    lengths: list[int] = []

    def note(module: Any, args: Any, out: Any) -> None:
        logits = out[0] if isinstance(out, tuple) else out.logits
        lengths.append(logits.shape[1])

    model.register_forward_hook(observing(note))
    return lengths


def observing(hook: Any) -> Any:
    """Mark a hook as one that only looks: results are kept and found beside it."""
    hook.changes_nothing = True
    return hook


@lru_cache(maxsize=1)
def heldout() -> tuple[np.ndarray, list[str], list[str], list[str]]:
    """Images, tasks, questions and answers the model was not trained on."""
    data = np.load(HELDOUT, allow_pickle=False)
    return data["images"], data["tasks"].tolist(), data["questions"].tolist(), data["answers"].tolist()


def cases() -> dict[str, dict[str, torch.Tensor]]:
    """One input of each sort the model takes."""
    images, _, questions, _ = heldout()
    video = {
        **batch([prompt("what shape is in the image?", placeholder=VIDEO)], None),
        "pixel_values_videos": patches(images[5:6]),
        "video_grid_thw": torch.tensor([[1, 8, 8]]),
    }
    video["mm_token_type_ids"] = (video["input_ids"] == VIDEO).int() * 2
    return {
        "text": batch(
            [ids_of("<|im_start|>user\nwhat shape is in the image?<|im_end|>\n<|im_start|>assistant\n")], None
        ),
        "image": batch([prompt(questions[0])], images[:1]),
        "two images": batch([prompt(questions[1], n_images=2)], images[1:3]),
        "video": video,
        "left-padded batch": batch([prompt(questions[0]), prompt("read the digits.")], images[3:5]),
    }


@torch.no_grad()
def share_right(model: Any, n_images: int) -> float:
    """Return the share of held-out images of which a model's first token is that of the right answer."""
    images, tasks, questions, answers = heldout()
    chosen = [index for index, task in enumerate(tasks) if task != "digits"][:n_images]
    right = 0
    for start in range(0, len(chosen), 50):
        rows = chosen[start : start + 50]
        inputs = batch([prompt(questions[row]) for row in rows], images[rows])
        found = model(**inputs).logits[:, -1].argmax(-1).tolist()
        right += sum(found[i] == ids_of(answers[row])[0] for i, row in enumerate(rows))
    return right / len(chosen)
