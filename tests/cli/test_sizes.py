import pytest
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from qwen3_vl_memory_optimizations.cli import _sizes
from qwen3_vl_memory_optimizations.cli._sizes import MODELS, encoded_bytes, estimate


@pytest.mark.parametrize("shape", MODELS, ids=lambda shape: shape.name)
def test_the_sizes_are_those_of_the_model_itself(shape):
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 151936,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": shape.tied,
        },
        vision_config={
            "depth": shape.vision_blocks,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_mlp,
            "out_hidden_size": shape.hidden,
        },
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration._from_config(config)

    assert shape.n_parameters == sum(parameter.numel() for parameter in model.parameters())
    decoder = [*model.model.language_model.layers.parameters(), model.lm_head.weight]
    matrices = [parameter for parameter in decoder if parameter.dim() == 2]
    assert encoded_bytes(shape.decoder_matrices(), "none") == sum(2 * matrix.numel() for matrix in matrices)


def test_int8_takes_a_byte_a_weight_and_a_little_a_row():
    bf16, int8 = (encoded_bytes(MODELS[0].decoder_matrices(), codec) for codec in ("none", "int8"))
    assert bf16 / 2 < int8 < bf16 / 2 * 1.01


def test_an_estimate_reads_what_does_not_fit():
    shape = MODELS[2]
    decoder = encoded_bytes(shape.decoder_matrices(), "int8")
    bandwidths = {"ssd_bytes_per_s": 2e9, "memory_bytes_per_s": 16e9}
    tight = estimate(shape, "int8", ram_budget_bytes=_sizes.PROCESS_BYTES + 5_000_000_000, **bandwidths)
    assert tight.read_bytes_per_token == decoder - 5_000_000_000
    assert tight.tokens_per_s == pytest.approx(2e9 / tight.read_bytes_per_token)
    assert tight.bound_by == "ssd"

    roomy = estimate(shape, "int8", ram_budget_bytes=32_000_000_000, **bandwidths)
    assert (roomy.read_bytes_per_token, roomy.bound_by) == (0, "memory")
    assert roomy.tokens_per_s == pytest.approx(16e9 / decoder)

    tiny = estimate(shape, "int8", ram_budget_bytes=1_000, **bandwidths)
    assert (tiny.resident_bytes, tiny.read_bytes_per_token) == (0, decoder)


def test_without_a_measured_ssd_there_is_no_figure():
    bandwidths = {"ssd_bytes_per_s": None, "memory_bytes_per_s": 16e9}
    assert estimate(MODELS[2], "none", ram_budget_bytes=4_000_000_000, **bandwidths).tokens_per_s is None
    assert estimate(MODELS[0], "int8", ram_budget_bytes=4_000_000_000, **bandwidths).tokens_per_s is not None
