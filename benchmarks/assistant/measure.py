"""One measurement in one process: load within a budget, decode copied and free text; print figures as JSON.

Run by `run.py` inside a control group; on its own it measures without one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HELP = ("none", "prompt lookup", "assistant")
TEXTS = ("copied", "free")
ROWS = (1, 2, 4, 8, 16)
WARM_UP_TOKENS = 12
_PASSES = 12
_PASSAGE = (
    "The keeper of the lighthouse counted the ships that passed in the night, wrote their names into a grey book, and "
    "in the morning, when the lamp was out, read them aloud to the gulls, who had heard stranger things from the sea."
)
_QUESTIONS = {
    "copied": f"Repeat this text twice, word for word, and say nothing else: {_PASSAGE}",
    "free": "Write a story about a gardener who finds a clock that runs backwards.",
}
# A small model does not copy because it is told to, but it goes on copying once it has begun.
_BEGUN = {"copied": f"{_PASSAGE}\n\nThe keeper of the lighthouse counted", "free": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--help-with", choices=HELP, default="none")
    parser.add_argument("--assistant", default=None)
    parser.add_argument("--ram-budget", default=None)
    parser.add_argument("--weights-share", type=float, default=None, help="tensor_budget, as a part of the weights")
    parser.add_argument("--codec", default="int8")
    parser.add_argument("--cache-dir", default=None)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--lookup-tokens", type=int, default=8)
    parser.add_argument("--turns", type=int, default=1, help="decode each text so often; the middle one counts")
    parser.add_argument("--draft-tokens", type=int, default=None, help="most tokens drafted a pass")
    arguments = parser.parse_args()

    import torch

    from qwen3_vl_memory_optimizations import create_optimized_model

    torch.manual_seed(0)
    is_assisted = arguments.help_with == "assistant"
    settings = {
        "ram_budget": arguments.ram_budget,
        "codec": arguments.codec,
        "cache_dir": arguments.cache_dir,
        "enable_cache_hierarchy": False,
    }
    if arguments.weights_share:
        with create_optimized_model(arguments.model, settings).memory_optimizer as optimizer:
            encoded = sum(use.encoded_bytes for use in optimizer.pager.usage())
        settings["tensor_budget"] = round(arguments.weights_share * encoded)
    model = create_optimized_model(arguments.model, settings, assistant=arguments.assistant if is_assisted else None)
    options: dict[str, Any] = {"do_sample": False}
    if arguments.help_with == "prompt lookup":
        options["prompt_lookup_num_tokens"] = arguments.lookup_tokens
    if is_assisted and arguments.draft_tokens:
        model.assistant.generation_config.num_assistant_tokens = arguments.draft_tokens
    figures: dict[str, Any] = {"compute_dtype": str(model.dtype).removeprefix("torch.")}
    for text in TEXTS:
        prompt, figures["prompt"] = make_prompt(Path(arguments.model), model.config, text)
        decode(model, prompt, WARM_UP_TOKENS, options)  # the schedule is learnt, kernels are chosen
        runs = [decode(model, prompt, arguments.tokens, options) for _ in range(arguments.turns)]
        figures[text] = sorted(runs, key=lambda run: run["token_per_s"] or 0)[len(runs) // 2]
    if arguments.help_with == "none":
        figures["costs"] = {str(rows): cost_of_pass(model, prompt, rows) for rows in ROWS}
    figures["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(figures))
    model.memory_optimizer.close()


def decode(model: Any, prompt: list[int], n_tokens: int, options: dict[str, Any]) -> dict[str, Any]:
    """Generate exactly `n_tokens` and return what it took from the first token on."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    from qwen3_vl_memory_optimizations.energy import Cost, EnergyMeter

    stats = model.memory_optimizer.pager.stats
    puts: list[tuple[float, int, int]] = []  # when, how many tokens, bytes read until then
    costs: list[Cost] = []

    class Clock(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            puts.append((time.perf_counter(), value.numel(), stats.bytes_read))
            costs.append(Cost.now(meter))

        def end(self) -> None:
            return

    drafted: list[int] = []
    draft = getattr(model, "assistant", None)
    hook = draft.register_forward_hook(lambda *_: drafted.append(1)) if draft is not None else None
    ids = torch.tensor([prompt])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if hasattr(model.config, "vision_config"):
        inputs["mm_token_type_ids"] = torch.zeros_like(ids)
    with EnergyMeter() as meter:
        out = model.generate(**inputs, max_new_tokens=n_tokens, min_new_tokens=n_tokens, streamer=Clock(), **options)
    if hook is not None:
        hook.remove()
    answer = out[0, len(prompt) :].tolist()
    # The first put is the prompt, each other one what a pass of the model gave; the prefill gave the first of them.
    first, last = puts[1], puts[-1]
    after = sum(count for _, count, _ in puts[2:])
    passes = len(puts) - 2
    return {
        "new_tokens": len(answer),
        "passes": passes,
        "draft_passes": len(drafted),
        "tokens_per_pass": round(after / passes, 3) if passes else None,
        "token_per_s": round(after / (last[0] - first[0]), 4) if passes else None,
        "bytes_read_per_token": (last[2] - first[2]) // after if passes else None,
        **costs[1].per_token(costs[-1], after),
        "answer": hashlib.sha256(repr(answer).encode()).hexdigest()[:12],
    }


def cost_of_pass(model: Any, prompt: list[int], rows: int) -> dict[str, float]:
    """Return what a pass over so many new tokens after a prompt takes: the middle of several."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config())
    ids = torch.tensor([prompt])
    new = ids[:, :1].expand(1, rows).contiguous()
    length = len(prompt)
    seconds, read = [], []
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for _ in range(_PASSES):
            before = model.memory_optimizer.pager.stats.bytes_read
            start = time.perf_counter()
            positions = torch.arange(length, length + rows)[None]
            model(input_ids=new, past_key_values=cache, use_cache=True, position_ids=positions)
            seconds.append(time.perf_counter() - start)
            read.append(model.memory_optimizer.pager.stats.bytes_read - before)
            cache.crop(-rows)
    warm = sorted(seconds[_PASSES // 3 :])
    return {"pass_s": round(warm[len(warm) // 2], 5), "read_bytes": sorted(read)[len(read) // 2]}


def make_prompt(directory: Path, config: Any, text: str) -> tuple[list[int], str]:
    """Return token ids, and what they are: text, or random where a checkpoint has no tokenizer."""
    if (directory / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory)
        chat = f"<|im_start|>user\n{_QUESTIONS[text]}<|im_end|>\n<|im_start|>assistant\n{_BEGUN[text]}"
        return list(tokenizer(chat, add_special_tokens=False)["input_ids"]), "text"
    vocabulary = config.get_text_config().vocab_size
    source = random.Random(text)
    draw = range(min(1000, vocabulary // 2), min(100_000, vocabulary))
    if text == "free":
        return [source.choice(draw) for _ in range(96)], "random ids"
    return [source.choice(draw) for _ in range(24)] * 4, "random ids"


if __name__ == "__main__":
    main()
