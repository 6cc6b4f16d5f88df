"""The check mode that compares the resident set with the ledger."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20

CONVERSATION = """
import json, sys, torch
from qwen3_vl_memory_optimizations import create_optimized_model
from qwen3_vl_memory_optimizations.process import rss_bytes
from tests.model import tiny
torch.set_grad_enabled(False)
settings = {"codec": "int8", "cache_dir": sys.argv[1]}
model = create_optimized_model(tiny.DIRECTORY, {**settings, "ram_budget": rss_bytes() + 600_000_000})
audit = model.memory_optimizer.audit
draw = torch.Generator().manual_seed(0)
ids, rests = torch.randint(7, 60, (1, 300), generator=draw), []
for turn in range(50):
    ids = model.generate(input_ids=ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    ids = torch.cat([ids, torch.randint(7, 60, (1, 20), generator=draw)], dim=1)
    rests.append(audit.rest_bytes())
print(json.dumps({"rests": rests, "found": [[each.phase, each.n_bytes] for each in audit.found]}))
"""

HOLDS = """
import json, sys, torch
from qwen3_vl_memory_optimizations import create_optimized_model
from qwen3_vl_memory_optimizations.process import rss_bytes
from tests.model import tiny
torch.set_grad_enabled(False)
settings = {"codec": "int8", "cache_dir": sys.argv[1]}
model = create_optimized_model(tiny.DIRECTORY, {**settings, "ram_budget": rss_bytes() + 600_000_000})
inputs = tiny.cases()["text"]
model.generate(**inputs, max_new_tokens=2, do_sample=False)
held = []
hold = lambda *_: held.append(torch.ones(100 << 18)) if not held else None
model.model.language_model.register_forward_pre_hook(hold)
model.generate(**inputs, max_new_tokens=2, do_sample=False)
model.generate(**inputs, max_new_tokens=2, do_sample=False)
print(json.dumps([[each.phase, each.n_bytes] for each in model.memory_optimizer.audit.found]))
"""


def run(code, directory):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "QWEN3VL_MEM_AUDIT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(directory)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the high-water mark cannot be set back")
def test_fifty_turns_of_a_conversation_leave_nothing_unexplained(tmp_path):
    result = run(CONVERSATION, tmp_path)
    rests = result["rests"]
    assert max(rests[2:]) - rests[1] < 16 * MIB
    assert result["found"] == []


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the high-water mark cannot be set back")
def test_what_nobody_announced_is_named(tmp_path):
    found = run(HOLDS, tmp_path)
    assert found
    assert max(n_bytes for _, n_bytes in found) > 60 * MIB
    assert {phase for phase, _ in found} <= {"prefill", "decode", "idle"}
