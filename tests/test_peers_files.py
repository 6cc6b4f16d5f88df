"""The GGUF files that the comparison with other runtimes writes, read back by this project's own reader."""

import pytest
import torch

from qwen3_vl_memory_optimizations.cli.common import model_shapes
from qwen3_vl_memory_optimizations.cli.common.random_checkpoint import write_checkpoint
from qwen3_vl_memory_optimizations.model.checkpoint.formats import open_checkpoint, weights_of

pytest.importorskip("gguf", reason="the gguf package is not installed")

SHAPE = model_shapes.ModelShape(
    name="small",
    layers=1,
    hidden=64,
    mlp=96,
    heads=2,
    tied=True,
    vision_blocks=2,
    vision_hidden=64,
    vision_mlp=80,  # rows of 80 do not divide into blocks: one matrix of the tower stays F16
    deepstack=(1,),
)
TOKENS = model_shapes.SpecialTokens(
    end_of_text=600, end_of_turn=601, vision_start=602, vision_end=603, image=604, video=605
)


def test_decoder_and_tower_are_those_of_the_checkpoint(tmp_path, monkeypatch):
    from benchmarks.peers.write_gguf import write_gguf
    from benchmarks.peers.write_mmproj import write_mmproj

    monkeypatch.setattr(model_shapes, "VOCABULARY", 640)
    source, written = tmp_path / "source", tmp_path / "written"
    for directory in (source, written):
        directory.mkdir()
    write_checkpoint(SHAPE, source, tokens=TOKENS, drops_cached=False)
    write_gguf(source, written / "model.gguf", "Q8_0", "qwen3vl")
    write_mmproj(source, written / "mmproj.gguf", "Q8_0")
    given, read = open_checkpoint(source), open_checkpoint(written / "model.gguf")
    expected, found = weights_of(given), weights_of(read)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        values = tensor.whole().float()
        torch.testing.assert_close(found[name].whole().float(), values, rtol=0.01, atol=0.01 * values.abs().max())
    # The reader takes the configuration from the metadata of the files.
    assert read.config["text_config"]["rope_parameters"] == given.config["text_config"]["rope_parameters"]
    tower = read.config["vision_config"]
    assert tower == {key: given.config["vision_config"][key] for key in tower}
