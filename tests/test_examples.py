import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run an example as a user would, and return what it printed; the checkpoint is packed once."""
    cache = tmp_path_factory.mktemp("cache")

    def run(name):
        path = os.pathsep.join(["src", *sys.path])
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / f"{name}.py")],
            env=os.environ | {"QWEN3VL_MEM_CACHE": str(cache), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            cwd=EXAMPLES.parent,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_one_page(run):
    assert run("one_page") == ["9 6 8 4 1 5 8 9 4 8 6 4 8 6 0 0"]


def test_folder(run):
    answers = dict(line.split(": ") for line in run("folder"))
    assert list(answers) == [f"vqa_{number}.png" for number in range(6)]
    assert answers["vqa_1.png"] == "triangle" and answers["vqa_4.png"] == "rectangle"


def test_conversation_reuses_the_turn_before(run):
    lines = run("conversation")
    assert lines[0].endswith("triangle")
    counts = [tuple(map(int, re.findall(r"\d+", line))) for line in lines if line.startswith("  ")]
    (first_reused, first_prompt), (reused, prompt) = counts
    assert reused - first_reused >= first_prompt and prompt > 2 * first_prompt


def test_draft_saves_passes_and_changes_no_answer(run):
    drafted, plain = (re.fullmatch(r".+?: (.+) \((\d+) tokens in (\d+) passes.*", line) for line in run("draft"))
    assert drafted[1] == plain[1] and drafted[2] == plain[2]
    assert int(drafted[3]) < int(plain[3]) == int(plain[2])


def test_metrics(run):
    lines = run("metrics")
    assert lines[0] == "budget 2000 MB"
    assert {"compression_ratio", "swap_efficiency"} <= {line.split()[0] for line in lines}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_names_its_command(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 40
    assert f"python examples/{path.name}\n" in text
