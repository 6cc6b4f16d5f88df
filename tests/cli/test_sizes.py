import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from qwen3_vl_memory_optimizations.cli.common.model_shapes import MODELS, SpecialTokens, build_config
from qwen3_vl_memory_optimizations.cli.common.model_sizes import encoded_bytes


@pytest.mark.parametrize(
    "shape", [*MODELS, MODELS[2].reduced(layers=2, vision_blocks=3)], ids=["2B", "4B", "8B", "reduced"]
)
def test_the_sizes_are_those_of_the_model_itself(shape):
    config = build_config(shape, SpecialTokens())
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration._from_config(config)

    assert shape.n_parameters == sum(parameter.numel() for parameter in model.parameters())
    decoder = [*model.model.language_model.layers.parameters(), model.lm_head.weight]
    matrices = [parameter for parameter in decoder if parameter.dim() == 2]
    assert encoded_bytes(shape.decoder_matrices(), "none") == sum(2 * matrix.numel() for matrix in matrices)


def test_int8_takes_a_byte_a_weight_and_a_little_a_row():
    bf16, int8 = (encoded_bytes(MODELS[0].decoder_matrices(), codec) for codec in ("none", "int8"))
    assert bf16 / 2 < int8 < bf16 / 2 * 1.01


def test_int4_leaves_the_head_in_int8():
    shape = MODELS[0]
    head = shape.decoder_matrices()[-1:]
    assert encoded_bytes(head, "int4") == encoded_bytes(head, "int8")
    layers = shape.decoder_matrices()[:-1]
    assert 0.5 < encoded_bytes(layers, "int4") / encoded_bytes(layers, "int8") < 0.6
