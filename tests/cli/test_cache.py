import json

import pytest

from qwen3_vl_memory_optimizations.cache import CacheItem, SSDCache, digest


@pytest.fixture
def kept(tmp_path):
    """A cache directory with three entries."""
    import torch

    cache = SSDCache(10**7, tmp_path / "reuse")
    for i in range(3):
        item = CacheItem({"values": torch.full((5000,), float(i))})
        cache.store(digest(i), item, saved_s=1.5, kind="vision" if i else "prefix")
    cache.load(digest(2))
    cache.close()
    return tmp_path


def test_ls_lists_what_is_kept(run, kept):
    text = run("cache", "ls", "--cache-dir", kept)
    assert text.exit_code == 0, text.stderr
    assert digest(1)[:12] in text.stdout
    assert "1.50 s" in text.stdout
    listed = json.loads(run("cache", "ls", "--cache-dir", kept, "--json").stdout)
    assert listed["directory"] == str(kept / "reuse")
    assert {row["key"] for row in listed["results"]} == {digest(i) for i in range(3)}
    assert listed["results"][0]["key"] == digest(2)
    assert listed["results"][0]["hits"] == 1
    totals = listed["totals"]
    assert {name: row["count"] for name, row in totals.items()} == {
        "pictures": 2,
        "prefix": 1,
        "packed models": 0,
        "recorded runs": 0,
    }


def test_one_result_is_removed(run, kept):
    removed = json.loads(run("cache", "rm", digest(1)[:12], "--cache-dir", kept, "--json").stdout)
    assert removed["removed"] == digest(1) and removed["freed_bytes"] > 0
    left = json.loads(run("cache", "ls", "--cache-dir", kept, "--json").stdout)["results"]
    assert {row["key"] for row in left} == {digest(0), digest(2)}
    for unknown in (digest(1)[:12], digest(2)[:2]):
        found = run("cache", "rm", unknown, "--cache-dir", kept)
        assert found.exit_code == 2 and "cache ls" in found.stderr


def test_entries_of_earlier_versions_are_listed(run, kept):
    index = kept / "reuse" / "index.json"
    content = json.loads(index.read_text())
    for _, facts in content["entries"].values():
        del facts["made_at"]
    content["entries"][digest(0)][1].clear()
    index.write_text(json.dumps(content))
    listed = json.loads(run("cache", "ls", "--cache-dir", kept, "--json").stdout)["results"]
    assert {row["kind"] for row in listed} == {"pictures", "unknown"}
    assert run("cache", "ls", "--cache-dir", kept).exit_code == 0


def test_nothing_kept_is_said(run, tmp_path):
    found = run("cache", "ls", "--cache-dir", tmp_path)
    assert (found.exit_code, "is empty" in found.stdout) == (0, True)
    assert json.loads(run("cache", "stats", "--cache-dir", tmp_path, "--json").stdout)["entries"] == 0
    assert list(tmp_path.iterdir()) == []


def test_stats_count_by_kind(run, kept):
    stats = json.loads(run("cache", "stats", "--cache-dir", kept, "--json").stdout)
    assert {name: row["entries"] for name, row in stats["kinds"].items()} == {"pictures": 2, "prefix": 1}
    assert stats["entries"] == 3
    assert stats["n_bytes"] == sum(path.stat().st_size for path in (kept / "reuse" / "objects").rglob("?" * 64))
    assert stats["read_bytes_per_s"] > 0
    assert "2 entries" in run("cache", "stats", "--cache-dir", kept).stdout


def test_verify_finds_damage_and_says_where(run, kept):
    assert run("cache", "verify", "--cache-dir", kept).exit_code == 0
    path = next((kept / "reuse").rglob(digest(1)))
    content = bytearray(path.read_bytes())
    content[-5000] ^= 255
    path.write_bytes(content)
    found = run("cache", "verify", "--cache-dir", kept, "--json")
    assert found.exit_code == 1
    problems = json.loads(found.stdout)["problems"]
    assert [each["path"] for each in problems] == [str(path.relative_to(kept / "reuse"))]
    assert digest(1) in run("cache", "verify", "--cache-dir", kept).stdout


def test_clear_asks_and_removes(run, kept):
    refused = run("cache", "clear", "--cache-dir", kept)
    assert refused.exit_code == 1
    assert json.loads(run("cache", "stats", "--cache-dir", kept, "--json").stdout)["entries"] == 3
    done = run("cache", "clear", "--cache-dir", kept, "--yes")
    assert (done.exit_code, "removed 3 entries" in done.stdout) == (0, True)
    assert list((kept / "reuse" / "objects").rglob("?" * 64)) == []
    assert json.loads(run("cache", "clear", "--cache-dir", kept, "--json").stdout)["removed"] == 0


@pytest.mark.parametrize("command", ["ls", "rm", "stats", "verify", "clear"])
def test_help_shows_an_example(run, command):
    text = run("cache", command, "--help")
    assert text.exit_code == 0
    assert f"qwen3vl-mem cache {command}" in text.stdout


def test_generate_in_private_keeps_nothing(run, tiny, tmp_path, demo_images):
    image = sorted(demo_images.glob("*.png"))[0]
    arguments = ("generate", tiny, "-i", image, "-p", "what is it?", "--max-new-tokens", 2, "--cache-dir", tmp_path)
    assert run(*arguments, "--private").exit_code == 0
    assert not (tmp_path / "reuse").exists()
    assert run(*arguments).exit_code == 0
    kinds = json.loads(run("cache", "stats", "--cache-dir", tmp_path, "--json").stdout)["kinds"]
    assert "pictures" in kinds


def test_results_are_named_after_file_and_prompt(run, tiny, tmp_path, demo_images):
    image = sorted(demo_images.glob("*.png"))[0]
    question = "what is it? " * 120  # more than one block of keys and values
    arguments = ("generate", tiny, "-i", image, "--max-new-tokens", 2, "--codec", "int8", "--cache-dir", tmp_path)
    assert run(*arguments, "-p", question).exit_code == 0
    assert run(*arguments, "-p", f"{question} and now?").exit_code == 0
    results = json.loads(run("cache", "ls", "--cache-dir", tmp_path, "--json").stdout)["results"]
    labels = {row["kind"]: row["label"] for row in results}
    assert len(results) == 2 and labels["pictures"] == image.name
    assert labels["keys and values"] == f"{image.name}: {question[:57]}..."
    (prompts,) = (row for row in results if row["kind"] == "keys and values")
    assert prompts["entries"] > 1 and prompts["hits"] >= 1
    assert run("cache", "rm", prompts["key"][:12], "--cache-dir", tmp_path).exit_code == 0
    left = json.loads(run("cache", "ls", "--cache-dir", tmp_path, "--json").stdout)["results"]
    assert [row["kind"] for row in left] == ["pictures"]
