"""The optimised model does what the original does (codec none: bit by bit; INT8: within its tolerance)."""

from __future__ import annotations

from threading import Thread

import pytest
import torch

from qwen3_vl_memory_optimizations import create_optimized_model

from . import tiny

WEIGHTS_BYTES = 10_800_000
CASES = ("text", "image", "two images", "video", "left-padded batch")


@pytest.fixture(scope="module", params=[None, WEIGHTS_BYTES // 3], ids=["unlimited", "a third of the weights"])
def exact(request, tmp_path_factory):
    model = create_optimized_model(
        tiny.DIRECTORY,
        {"codec": "none", "tensor_budget": request.param, "cache_dir": tmp_path_factory.mktemp("cache")},
    )
    yield model
    model.memory_optimizer.close()


@pytest.fixture(scope="module", params=[tiny.make_draft, tiny.make_text_draft], ids=["fewer layers", "text only"])
def assisted(request, tmp_path_factory):
    """With a draft, and a third of the model's weights for both."""
    directory = tmp_path_factory.mktemp("assisted")
    model = create_optimized_model(
        tiny.DIRECTORY,
        {"codec": "none", "tensor_budget": WEIGHTS_BYTES // 3, "cache_dir": directory / "cache"},
        assistant=request.param(directory / "draft"),
    )
    model.assistant.generation_config.assistant_confidence_threshold = 0  # drafts go on when they are not sure
    yield model
    model.memory_optimizer.close()


@pytest.fixture(
    scope="module",
    params=[("int8", None), ("int8", 900_000), ("int8_rotated", None), ("int8_rotated", 900_000)],
    ids=lambda param: f"{param[0]}, {'a third of the weights' if param[1] else 'unlimited'}",
)
def int8(request, tmp_path_factory):
    codec, budget_bytes = request.param
    model = create_optimized_model(
        tiny.DIRECTORY,
        {"codec": codec, "tensor_budget": budget_bytes, "cache_dir": tmp_path_factory.mktemp("cache")},
    )
    yield model
    model.memory_optimizer.close()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_bit_identical(exact, case):
    inputs = tiny.cases()[case]
    expected = tiny.reference()(**inputs).logits
    for _ in range(3):  # with an unknown, a guessed and a learnt schedule
        found = exact(**inputs).logits
        assert torch.equal(found, expected), (found - expected).abs().max()


def generate(model, inputs, **options):
    torch.manual_seed(0)
    return model.generate(**inputs, max_new_tokens=18, min_new_tokens=8, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
    ],
    ids=["greedy", "sampling", "beams", "prompt lookup"],
)
@torch.no_grad()
def test_generation_gives_the_same_ids(exact, options):
    # Prompt lookup may copy image placeholders of the prompt, which transformers then takes for images without pixels.
    inputs = tiny.cases()["text" if "prompt_lookup_num_tokens" in options else "image"]
    assert torch.equal(generate(exact, inputs, **options), generate(tiny.reference(), inputs, **options))


@torch.no_grad()
def test_generation_with_an_assistant_gives_the_same_ids(exact):
    inputs = tiny.cases()["text"]
    expected = generate(tiny.reference(), inputs, do_sample=False)
    assert torch.equal(generate(exact, inputs, do_sample=False, assistant_model=tiny.reference()), expected)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_generation_with_the_draft_of_the_same_budget_gives_the_same_ids(assisted, case):
    passes = tiny.count_forwards(assisted.assistant)
    inputs = tiny.cases()[case]
    expected = generate(tiny.reference(), inputs, do_sample=False)
    for _ in range(2):
        assert torch.equal(generate(assisted, inputs, do_sample=False), expected)
    assert bool(passes) == (case != "left-padded batch"), "a batch goes without the draft"


@torch.no_grad()
def test_streams_tokens_as_they_come(exact):
    from transformers import TextIteratorStreamer

    inputs = tiny.cases()["image"]
    streamer = TextIteratorStreamer(tiny.tokenizer(), skip_prompt=True)
    thread = Thread(target=generate, args=(exact, inputs), kwargs={"do_sample": False, "streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    expected = generate(tiny.reference(), inputs, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert streamed == tiny.tokenizer().decode(expected)


@torch.no_grad()
def test_int8_agrees_with_the_original_on_tokens_and_accuracy(int8):
    images, tasks, questions, answers = tiny.heldout()
    chosen = [index for index, task in enumerate(tasks) if task != "digits"]
    agreeing = tokens = 0
    right = {"original": 0, "int8": 0}
    for start in range(0, len(chosen), 50):
        rows = chosen[start : start + 50]
        inputs = tiny.batch([tiny.prompt(questions[row]) for row in rows], images[rows])
        expected, found = tiny.reference()(**inputs).logits.argmax(-1), int8(**inputs).logits.argmax(-1)
        real = inputs["attention_mask"].bool()
        agreeing += int((expected == found)[real].sum())
        tokens += int(real.sum())
        wanted = [tiny.ids_of(answers[row])[0] for row in rows]
        right["original"] += sum(int(a) == b for a, b in zip(expected[:, -1], wanted, strict=True))
        right["int8"] += sum(int(a) == b for a, b in zip(found[:, -1], wanted, strict=True))
    agreement = agreeing / tokens
    difference = abs(right["original"] - right["int8"]) / len(chosen)
    print(f"top-1 agreement {agreement:.4f} of {tokens} tokens; right {right} of {len(chosen)}")
    assert agreement >= 0.99
    assert difference <= 0.01
    assert right["original"] / len(chosen) > 0.85  # the measure itself works


@torch.no_grad()
def test_int8_reads_the_digits_as_the_original_does(int8):
    images, tasks, _, _ = tiny.heldout()
    rows = [index for index, task in enumerate(tasks) if task == "digits"][:10]
    same = []
    for start in range(0, len(rows), 2):  # the tails of more do not fit into the smallest budget
        part = rows[start : start + 2]
        inputs = tiny.batch([tiny.prompt("read the digits.")] * len(part), images[part])
        expected, found = (
            model.generate(**inputs, max_new_tokens=17, do_sample=False) for model in (tiny.reference(), int8)
        )
        same.append((found == expected)[:, inputs["input_ids"].shape[1] :].float())
    agreement = torch.cat(same).mean().item()
    assert agreement >= 0.99, agreement
