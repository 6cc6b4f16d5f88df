"""Small tensors come together, whole and checked."""

import pytest
import torch
from safetensors.torch import save_file

from qwen3_vl_memory_optimizations import CorruptDataError
from qwen3_vl_memory_optimizations.config import MemoryConfig
from qwen3_vl_memory_optimizations.model.checkpoint.packing import pack_checkpoint
from qwen3_vl_memory_optimizations.model.checkpoint.small_tensors import read_small_tensors
from qwen3_vl_memory_optimizations.storage import Checkpoint, DirectFile, read_header

from . import tiny


class CountingFile(DirectFile):
    requests = 0

    def read_into(self, address, offset_bytes, n_bytes):
        self.requests += 1
        return super().read_into(address, offset_bytes, n_bytes)


def test_neighbours_come_with_one_request(tmp_path):
    tensors = {f"t{number}": torch.randn(number, 3) for number in range(8)}  # one is empty
    tensors |= {"scalar": torch.tensor(2.5), "bf16": torch.randn(5).bfloat16(), "u8": torch.arange(7).byte()}
    tensors["large"] = torch.randn(1000, 1000)  # alone: it does not make the others wait for a copy of itself
    save_file(tensors, tmp_path / "t.safetensors")
    header, file = read_header(tmp_path / "t.safetensors"), CountingFile(tmp_path / "t.safetensors")
    found = read_small_tensors(header.tensors.values(), lambda extent: file)
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        assert found[name].dtype == values.dtype and torch.equal(found[name], values), name
    assert file.requests <= 3


def test_each_one_has_memory_of_its_own(tmp_path):
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "t.safetensors")
    header, file = read_header(tmp_path / "t.safetensors"), DirectFile(tmp_path / "t.safetensors")
    found = read_small_tensors(header.tensors.values(), lambda extent: file)
    found["a"].zero_()
    assert found["b"].sum() == 4


def test_a_damaged_one_is_refused(tmp_path):
    packed = Checkpoint.open(pack_checkpoint(tiny.DIRECTORY, config=MemoryConfig(cache_dir=tmp_path)))
    extent = next(extent for name, extent in packed.tensors.items() if name.endswith(".scale"))
    with open(extent.path, "r+b") as file:
        file.seek(extent.offset_bytes)
        file.write(b"\xff")
    direct = DirectFile(extent.path)
    with pytest.raises(CorruptDataError, match=r"\.scale: the checksum of page 0"):
        read_small_tensors([extent], lambda extent: direct)
