from qwen3_vl_memory_optimizations.cli.common.output import percent


def test_a_share_is_a_percentage():
    assert (percent(0.256), percent(None)) == ("26 %", "-")
