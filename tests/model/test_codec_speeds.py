"""Speeds are measured once, and again where they belong to something else or cannot be read."""

import dataclasses
import json

import pytest

from qwen3_vl_memory_optimizations.config import MemoryConfig
from qwen3_vl_memory_optimizations.model.checkpoint import codec_speeds as module
from qwen3_vl_memory_optimizations.model.checkpoint.codec_speeds import SPEEDS_FILE, codec_speeds


@pytest.fixture
def measured(monkeypatch):
    """Count the measurements; the first is a real one, which the others repeat."""
    calls, first = [], module.measure_codec_speeds(1e9)

    def counted(ssd_bytes_per_s):
        calls.append(ssd_bytes_per_s)
        return dataclasses.replace(first, ssd_bytes_per_s=ssd_bytes_per_s)

    monkeypatch.setattr(module, "measure_codec_speeds", counted)
    return calls


def test_once_for_a_machine(tmp_path, measured, caplog):
    config = MemoryConfig(cache_dir=tmp_path)
    first = codec_speeds(config)
    assert codec_speeds(config) == first and len(measured) == 1
    assert first.ssd_bytes_per_s == measured[0] > 1e6
    path = config.packed_dir / SPEEDS_FILE
    assert [entry.name for entry in path.parent.iterdir()] == [SPEEDS_FILE]
    assert not caplog.records

    codec_speeds(config, measure_again=True)
    assert len(measured) == 2
    path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": "another"}))
    codec_speeds(config)
    assert len(measured) == 3 and not caplog.records
    for damaged in ("{", "[]", '{"lines": {}}', "null"):
        path.write_text(damaged)
        codec_speeds(config)
        assert "measuring the codec speeds again" in caplog.text
        caplog.clear()
    assert len(measured) == 7
