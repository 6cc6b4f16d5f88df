import pytest

from qwen3_vl_memory_optimizations.evaluation.codecs import CodecResult
from qwen3_vl_memory_optimizations.evaluation.comparison import AccuracyImpact
from qwen3_vl_memory_optimizations.evaluation.recommendation import recommend


def result(codec, weight_bytes, *, agreement=1.0, perplexity=1.5, accuracy=0.9, kl=0.001, error=0.01):
    impact = AccuracyImpact(
        {"top1_agreement": agreement, "kl_divergence": kl, "layer_relative_error": error},
        baseline={"perplexity": 1.5, "accuracy": 0.9, "f1": 0.9},
        optimized={"perplexity": perplexity, "accuracy": accuracy, "f1": 0.9},
        layers={},
        n_positions=100,
    )
    return CodecResult(
        codec=codec,
        baseline="plain",
        weight_bytes=weight_bytes,
        half_bytes=1000,
        stored_as={},
        impacts={"text": impact},
        seconds=1.0,
        tokens_per_s=10.0,
        whole_bytes=2000,
    )


def test_the_smallest_codec_that_keeps_the_predictions_is_recommended():
    advice = recommend([result("int8", 506), result("int4", 329)])
    assert advice.codec == "int4"
    assert "32.9 % of the bytes of 16 bits" in advice.text and "100 predictions" in advice.text


@pytest.mark.parametrize("loss", [{"agreement": 0.9}, {"perplexity": 1.6}, {"accuracy": 0.8}, {"error": 0.08}])
def test_a_codec_that_loses_predictions_is_not(loss):
    assert recommend([result("int8", 506), result("int4", 329, **loss)]).codec == "int8"


def test_a_smaller_codec_is_named_for_where_it_does_not_fit():
    assert (
        "Where it does not fit, int4 has 32.9 %"
        in recommend([result("int8", 506), result("int4", 329, error=0.08)]).text
    )


def test_of_two_of_one_size_the_nearer_is():
    assert recommend([result("int8", 505, kl=0.01), result("int8_rotated", 506, kl=0.001)]).codec == "int8_rotated"


def test_if_none_keeps_them_the_weights_stay():
    advice = recommend([result("int4", 329, agreement=0.5)])
    assert advice.codec == "none"
    assert advice.text.startswith("Use none: int4 did not keep")
