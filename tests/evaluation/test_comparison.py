"""An optimised model beside the original: a Qwen3-VL that was trained, and a random Llama."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qwen3_vl_memory_optimizations import (
    InputError,
    calculate_metrics,
    create_optimized_model,
    evaluate_accuracy_impact,
)
from qwen3_vl_memory_optimizations.compression import codec_names
from qwen3_vl_memory_optimizations.evaluation import QuestionBatches, score
from qwen3_vl_memory_optimizations.evaluation.data import shipped_questions
from qwen3_vl_memory_optimizations.model.inputs.processor import load_processor

from ..model import tiny

VOCABULARY = 97


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Products so small are computed by one thread: several would mostly wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,  # predictions that are sure of themselves
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def token_ids():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (2, 40), generator=generator) for _ in range(3)]


@pytest.fixture(scope="module", params=codec_names())
def optimized(request, llama, tmp_path_factory):
    """Each codec there is, within a third of the weights."""
    directory = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(directory / "model")
    settings = {"codec": request.param, "cache_dir": directory / "cache", "tensor_budget": 700_000}
    model = create_optimized_model(directory / "model", settings)
    yield model
    model.memory_optimizer.close()


def example_of_the_specification(model_with_optimizations, baseline_model, test_dataset):
    """Section 6.3 as it is written."""
    baseline_outputs = []
    optimized_outputs = []

    for batch in test_dataset:
        with torch.no_grad():
            baseline_out = baseline_model(batch)
            optimized_out = model_with_optimizations(batch)

            baseline_outputs.append(baseline_out)
            optimized_outputs.append(optimized_out)

    baseline_metrics = calculate_metrics(baseline_outputs)
    optimized_metrics = calculate_metrics(optimized_outputs)

    differences = {metric: abs(baseline_metrics[metric] - optimized_metrics[metric]) for metric in baseline_metrics}

    return differences


@pytest.fixture(scope="module")
def changed(llama):
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    return other


def test_differences_are_those_of_the_specification(llama, changed, token_ids):
    found = evaluate_accuracy_impact(changed, llama, token_ids)
    expected = example_of_the_specification(
        lambda batch: score(changed, batch), lambda batch: score(llama, batch), token_ids
    )
    assert set(expected) == {"perplexity", "accuracy", "f1"}
    assert {metric: found[metric] for metric in expected} == pytest.approx(expected)
    assert found["perplexity"] > 0
    assert found.layers["model.layers.0"] == 0 < found.layers["model.layers.1"]


def test_every_codec_is_compared_layer_by_layer(llama, optimized, token_ids):
    found = evaluate_accuracy_impact(optimized, llama, token_ids)
    assert found.n_positions == 3 * 2 * 39
    assert found["layer_relative_error"] == max(found.layers.values())
    assert set(found.layers) == {f"model.layers.{index}" for index in range(3)}
    lossless = {"perplexity": 0, "accuracy": 0, "f1": 0, "top1_agreement": 1, "kl_divergence": 0}
    codec = optimized.memory_optimizer.config.codec
    if codec == "none":
        assert found == lossless | {"layer_relative_error": 0}
    if codec == "int8":
        assert found["top1_agreement"] >= 0.9 and 0 < found["layer_relative_error"] < 0.1, dict(found)


def test_the_example_of_the_specification_runs_on_models_as_they_are(llama, optimized, token_ids):
    assert set(example_of_the_specification(optimized, llama, token_ids)) == {"prediction_perplexity"}


def test_perplexity_is_that_of_transformers(llama, token_ids):
    impact = evaluate_accuracy_impact(llama, llama, token_ids)
    with torch.no_grad():
        losses = [llama(ids, labels=ids).loss for ids in token_ids]
    assert impact.baseline["perplexity"] == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-5)


def test_padding_counts_nowhere(llama, changed, token_ids):
    ids = token_ids[0][:1]
    padded = {
        "input_ids": torch.cat([ids, ids[:, :5]], 1),
        "attention_mask": torch.cat([torch.ones_like(ids), torch.zeros_like(ids[:, :5])], 1),
    }
    plain, found = (evaluate_accuracy_impact(changed, llama, [batch]) for batch in (ids, padded))
    assert found == pytest.approx(plain, rel=1e-3)
    assert found.layers == pytest.approx(plain.layers, rel=1e-3)
    assert found.n_positions == plain.n_positions == 39


class Layered(nn.Module):
    """Layers that scale their input; what a layer returned is written into afterwards."""

    def __init__(self, *scales: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Scale(scale) for scale in scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
            x.add_(1)
        return x


class Scale(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def test_errors_of_layers_by_hand():
    rows, labels = torch.ones(2, 4), torch.zeros(2).long()
    first, second = Layered(2.0, 0.5), Layered(2.5, 0.5)
    impact = evaluate_accuracy_impact(second, first, [(rows, labels)])
    # 2.5 for 2, then (2.5 + 1) / 2 for (2 + 1) / 2
    assert impact.layers == pytest.approx({"blocks.0": 0.25, "blocks.1": 0.25 / 1.5})
    assert impact["layer_relative_error"] == pytest.approx(0.25)
    assert not any(block._forward_hooks for model in (first, second) for block in model.blocks)


def test_hooks_are_gone_after_a_failure():
    class Failing(Layered):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("in the middle")

    first, second = Layered(2.0), Failing(2.0)
    with pytest.raises(RuntimeError, match="in the middle"):
        evaluate_accuracy_impact(second, first, [(torch.ones(1, 4), torch.zeros(1).long())])
    assert not any(block._forward_hooks for model in (first, second) for block in model.blocks)


def test_errors_that_are_no_number_are_seen():
    impact = evaluate_accuracy_impact(Layered(1.0, math.nan), Layered(1.0, 1.0), [(torch.ones(1, 4), [0])])
    assert math.isnan(impact["layer_relative_error"])
    assert math.isnan(impact["perplexity"])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "empty"),
        ([torch.zeros(2, 3)], "must be token ids"),
        ([{"pixel_values": torch.zeros(2, 3)}], "must be token ids"),
    ],
)
def test_data_without_labels_are_refused(batches, message):
    with pytest.raises(InputError, match=message):
        evaluate_accuracy_impact(Layered(1.0), Layered(1.0), batches)


def test_models_of_different_sizes_are_refused():
    def wider(x):
        return torch.cat([x, x], -1)

    with pytest.raises(InputError, match="not two forms of one model"):
        evaluate_accuracy_impact(wider, Layered(1.0), [(torch.ones(1, 4), torch.zeros(1).long())])
    with pytest.raises(InputError, match="no logits"):
        evaluate_accuracy_impact(lambda x: None, Layered(1.0), [(torch.ones(1, 4), torch.zeros(1).long())])


def test_answers_about_images(tmp_path):
    """All tokens of an answer are predicted right where greedy decoding gives it."""
    batches = QuestionBatches(load_processor(tiny.DIRECTORY), shipped_questions())
    with_labels = next(iter(batches))
    assert (with_labels["labels"] != -100).sum() == 1
    model = create_optimized_model(tiny.DIRECTORY, {"codec": "int8", "cache_dir": tmp_path})
    try:
        impact = evaluate_accuracy_impact(model, tiny.reference(), batches)
    finally:
        model.memory_optimizer.close()
    assert impact.n_positions == 11 + 3 * 16
    assert impact.baseline["accuracy"] > 0.9
    assert impact["accuracy"] <= 0.02 and impact["top1_agreement"] >= 0.98
    assert 0 < impact["layer_relative_error"] < 0.05
    names = set(impact.layers)
    assert {"model.visual.blocks.0", "model.visual.deepstack_merger_list.0", "model.language_model.layers.3"} < names
