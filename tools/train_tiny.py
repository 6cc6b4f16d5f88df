#!/usr/bin/env python3
"""Train the tiny Qwen3-VL that ships with the package: the real architecture at 2.7 M parameters.

Vision tower with DeepStack, M-RoPE text decoder and tied embeddings are those of transformers, trained from
random weights on the processor. The budget is wall clock, so two runs give different weights of about equal
accuracy.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import tiny_data
import torch
import torch.nn.functional as F
from tiny_data import IMAGE_SIDE, LabelledImages, MissingDataError, TinyData, Turn
from tiny_evaluation import evaluate
from tiny_prompts import GRID, MERGE, PATCH, TEMPORAL_PATCH, Prompts, build_tokenizer
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl import modeling_qwen3_vl

_EVALUATIONS = 5
_EVALUATION_QUESTIONS = 512
_LOG_STEPS = 100
_WARM_UP_STEPS = 100
_QUESTIONS_PER_IMAGE = 5


def build_model(args: argparse.Namespace, prompts: Prompts) -> Qwen3VLForConditionalGeneration:
    """The scaled-down model with random weights."""
    hidden = args.hidden
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(prompts.tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            hidden_act="silu",
            max_position_embeddings=2048,
            rms_norm_eps=1e-6,
            attention_bias=False,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            pad_token_id=prompts.pad_id,
            eos_token_id=prompts.eos_id,
            bos_token_id=None,
            tie_word_embeddings=True,
            initializer_range=args.init,
        ),
        vision_config=dict(
            depth=args.vision_depth,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_heads=4,
            in_channels=3,
            patch_size=PATCH,
            spatial_merge_size=MERGE,
            temporal_patch_size=TEMPORAL_PATCH,
            out_hidden_size=hidden,
            num_position_embeddings=GRID * GRID,
            deepstack_visual_indexes=[0, 1, 2][: max(1, args.vision_depth - 1)],
            hidden_act="gelu_pytorch_tanh",
            initializer_range=args.init,
        ),
        image_token_id=prompts.image_id,
        video_token_id=prompts.video_id,
        vision_start_token_id=prompts.vision_start_id,
        vision_end_token_id=prompts.vision_end_id,
        tie_word_embeddings=True,
    )
    return Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def _batched_attention(self, hidden_states, cu_seqlens, position_embeddings=None, max_seqlen=None, **kwargs):
    count, length = hidden_states.shape[0], GRID * GRID
    query, key, value = self.qkv(hidden_states).reshape(count, 3, self.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
    query, key = modeling_qwen3_vl.apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    query, key, value = (
        tensor.reshape(count // length, length, self.num_heads, -1).transpose(1, 2).to(value.dtype)
        for tensor in (query, key, value)
    )
    weights = torch.softmax((query @ key.transpose(-1, -2)).float() * self.scaling, -1).to(value.dtype)
    return self.proj((weights @ value).transpose(1, 2).reshape(count, -1))


@contextmanager
def batched_vision_attention() -> Iterator[None]:
    """Attend all images of a batch in one call.

    All training images have one size, where the model, which must serve any, makes one call an image.
    Evaluation runs outside this block, through the model as users have it.
    """
    attention = modeling_qwen3_vl.Qwen3VLVisionAttention
    original = attention.forward
    attention.forward = _batched_attention
    try:
        yield
    finally:
        attention.forward = original


class Sampler:
    """Draws training samples: a fixed mix of tasks, several questions an image, half the clothes mirrored."""

    def __init__(self, data: TinyData, tasks: tuple[str, ...], mix: list[float], batch: int, seed: int) -> None:
        counts = np.round(np.array(mix[: len(tasks)]) * batch).astype(int)
        self._counts = dict(zip(tasks, counts.tolist(), strict=True))
        self._data = data
        self._rng = np.random.default_rng(seed)
        self._shuffle = random.Random(seed).shuffle

    def draw(self) -> list[tuple[np.ndarray, list[Turn]]]:
        """One batch of (image, turns)."""
        return [self._draw_one(task) for task, count in self._counts.items() for _ in range(count)]

    def _draw_one(self, task: str) -> tuple[np.ndarray, list[Turn]]:
        if task == "digits":
            image, turn = self._data.pages["train"].draw(self._rng)
            return image, [turn]
        part: LabelledImages = self._data.images[task, "train"]
        index = int(self._rng.integers(len(part.images)))
        image, turns = part.images[index], list(part.turns[index])
        self._shuffle(turns)
        if task == "fashion" and self._rng.random() < 0.5:
            image = image[:, ::-1]
        return image, turns[:_QUESTIONS_PER_IMAGE]


def train(
    model: Qwen3VLForConditionalGeneration, prompts: Prompts, data: TinyData, args: argparse.Namespace
) -> dict[str, object]:
    """Train until the time budget is spent; evaluations do not count against it.

    Returns:
        The interim accuracies, the number of steps and the seconds spent.
    """
    sampler = Sampler(data, args.tasks, args.mix, args.batch, args.seed)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    # Prompts are short enough that plain attention trains faster than the fused kernel does on a processor.
    model.model.language_model.set_attn_implementation("eager")
    model.train()
    budget_s = args.minutes * 60
    interval_s = next_evaluation_s = budget_s / _EVALUATIONS
    start, evaluation_s, step = time.monotonic(), 0.0, 0
    losses: list[float] = []
    log: list[tuple[int, int, dict[str, float]]] = []
    while (elapsed_s := time.monotonic() - start - evaluation_s) < budget_s:
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * elapsed_s / budget_s))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / _WARM_UP_STEPS) * cosine
        losses.append(_step(model, optimizer, *prompts.training_batch(sampler.draw()), fp32=args.fp32))
        step += 1
        if step % _LOG_STEPS == 0:
            print(f"step {step} {elapsed_s:.0f} s, loss {np.mean(losses[-_LOG_STEPS:]):.4f}", flush=True)
        if elapsed_s > next_evaluation_s:
            began = time.monotonic()
            scores = evaluate(model, prompts, data, args.tasks, _EVALUATION_QUESTIONS)
            evaluation_s += time.monotonic() - began
            next_evaluation_s += interval_s
            log.append((round(elapsed_s), step, scores))
            print(f"after {elapsed_s:.0f} s: {scores}", flush=True)
    seconds = round(time.monotonic() - start - evaluation_s, 1)
    return {"log": log, "steps": step, "train_seconds": seconds}


def _step(model, optimizer, inputs: dict[str, torch.Tensor], labels: torch.Tensor, *, fp32: bool) -> float:
    with batched_vision_attention(), torch.autocast("cpu", torch.bfloat16, enabled=not fp32):
        hidden = model.model(**inputs).last_hidden_state
        # Only answers are labelled: the head need not run on the other positions.
        labelled = labels[:, 1:] != -100
        logits = model.lm_head(hidden[:, :-1][labelled])
    loss = F.cross_entropy(logits.float(), labels[:, 1:][labelled])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def save(out: Path, model: Qwen3VLForConditionalGeneration, prompts: Prompts, report: dict[str, object]) -> None:
    """Write a Hugging Face directory and the training report."""
    model.generation_config.eos_token_id = prompts.eos_id
    model.generation_config.pad_token_id = prompts.pad_id
    model.save_pretrained(out)
    prompts.tokenizer.save_pretrained(out)
    preprocessor = {
        "crop": None,
        "do_resize": True,
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": TEMPORAL_PATCH,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"shortest_edge": IMAGE_SIDE**2, "longest_edge": IMAGE_SIDE**2},
        "image_processor_type": "Qwen2VLImageProcessor",
    }
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1))
    (out / "training_report.json").write_text(json.dumps(report, indent=1))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; the defaults are those of the checkpoint that ships."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tiny-qwen3vl"), help="directory to write")
    parser.add_argument("--minutes", type=float, default=15, help="training time, evaluations apart")
    parser.add_argument("--tasks", default=",".join(tiny_data.TASKS), help="tasks to train")
    parser.add_argument("--mix", default="0.45,0.4,0.15", help="share of each task in a batch")
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size of both towers")
    parser.add_argument("--layers", type=int, default=4, help="text layers")
    parser.add_argument("--vision-depth", type=int, default=4, help="vision blocks")
    parser.add_argument("--init", type=float, default=0.06, help="std of the initial weights (0.02 stalls)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and samples")
    parser.add_argument("--eval-n", type=int, default=2000, help="questions a task in the last evaluation")
    parser.add_argument("--threads", type=int, help="processor threads; not given: torch decides")
    parser.add_argument("--fp32", action="store_true", help="train without bfloat16 autocast")
    parser.add_argument("--fashion-dir", type=Path, default=tiny_data.FASHION_DIR, help="Fashion-MNIST files")
    parser.add_argument("--digits", type=Path, default=tiny_data.DIGITS_FILE, help="OpenCV's digits.png")
    args = parser.parse_args(arguments)
    args.tasks = tuple(args.tasks.split(","))
    args.mix = [float(share) for share in args.mix.split(",")]
    if len(args.mix) < len(args.tasks):
        parser.error(f"--mix gives {len(args.mix)} shares for {len(args.tasks)} tasks")
    return args


def main() -> None:
    """Train, judge and save."""
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    try:
        data = tiny_data.load(args.tasks, fashion_dir=args.fashion_dir, digits_file=args.digits)
    except (MissingDataError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    prompts = Prompts(build_tokenizer(data))
    model = build_model(args, prompts)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {len(prompts.tokenizer)} words", flush=True)
    history = train(model, prompts, data, args)
    final = evaluate(model, prompts, data, args.tasks, args.eval_n)
    print(f"final: {final}", flush=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    save(args.out, model, prompts, {"final": final, **history, "args": settings, "params": parameters})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
