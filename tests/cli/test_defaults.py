"""Options set in the environment and in the config file."""

import json

import pytest


@pytest.fixture
def config(run, cache_dir):
    """Write the config file; removed afterwards."""
    path = cache_dir / "config/qwen3vl-mem/config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path.write_text
    path.unlink(missing_ok=True)


def packed_codec(run, tiny, *options):
    result = run("pack", tiny, "--json", *options)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["codec"]


def test_a_flag_wins_over_the_environment_and_that_over_the_file(run, tiny, config, monkeypatch):
    config('codec = "int8"\n')
    assert packed_codec(run, tiny) == "int8"
    monkeypatch.setenv("QWEN3VL_MEM_CODEC", "fp16")
    assert packed_codec(run, tiny) == "fp16"
    assert packed_codec(run, tiny, "--codec", "int4") == "int4"


def test_a_table_is_for_one_command_and_wins(run, tiny, config):
    config('codec = "int8"\n[pack]\ncodec = "int4"\n')
    assert packed_codec(run, tiny) == "int4"
    config('codec = "int8"\n[generate]\ncodec = "int4"\nram_budget = "1GB"\n')
    assert packed_codec(run, tiny) == "int8"


def test_the_file_wins_over_a_profile(run, tiny, config, tmp_path):
    (tmp_path / "mine.toml").write_text('why = "a test"\n[match]\n[memory_config]\ncodec = "int4"\n')
    config(f'profile = "{tmp_path / "mine.toml"}"\n')
    assert packed_codec(run, tiny) == "int4"
    config(f'profile = "{tmp_path / "mine.toml"}"\ncodec = "int8"\n')
    assert packed_codec(run, tiny) == "int8"


def test_flags_and_numbers_are_taken_as_typed(run, tiny, demo_images, config, monkeypatch):
    config("[generate]\njson = true\nmax-new-tokens = 2\nrecord = false\n")
    arguments = ["generate", tiny, "-i", demo_images / "digits_0.png", "-p", "read the digits."]
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["new_tokens"] == 2
    monkeypatch.setenv("QWEN3VL_MEM_JSON", "0")
    monkeypatch.setenv("QWEN3VL_MEM_MAX_NEW_TOKENS", "1")
    assert not run(*arguments).stdout.startswith("{")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('ram-bugdet = "2GB"', "unknown key 'ram-bugdet'; did you mean 'ram-budget'?"),
        ('[genrate]\nram-budget = "2GB"', "unknown key 'genrate'; did you mean 'generate'?"),
        ("[pack]\nmax-new-tokens = 3", "unknown key [pack] 'max-new-tokens'; did you mean"),
        ("prompt = 'what?'", "unknown key 'prompt'; did you mean"),
        ("record = 'no'", "record: expected true or false, got 'no'"),
        ("ram-budget = true", "ram-budget: expected a string or a number, got True"),
        ("codec = [1, 2]", "codec: expected one value, got [1, 2]"),
        ("codec = ", "config.toml: not TOML: "),
    ],
)
def test_a_mistake_in_the_file_is_one_line_and_no_help_is_lost(run, tiny, config, content, message):
    config(content)
    result = run("pack", tiny)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert "config.toml" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert run("pack", "--help").exit_code == 0
    assert json.loads(run("pack", tiny, "--json").stdout)["error"]["type"] == "ConfigurationError"


def test_a_wrong_value_is_reported_with_its_place(run, tiny, config, monkeypatch):
    config("max-new-tokens = 'many'")
    result = run("generate", tiny, "-p", "?")
    assert result.exit_code == 2
    assert "config.toml: max-new-tokens: " in result.stderr and "integer" in result.stderr
    monkeypatch.setenv("QWEN3VL_MEM_MAX_NEW_TOKENS", "0")
    result = run("generate", tiny, "-p", "?")
    assert result.stderr.startswith("error: QWEN3VL_MEM_MAX_NEW_TOKENS: ")
    assert len(result.stderr.strip().splitlines()) == 1
    monkeypatch.delenv("QWEN3VL_MEM_MAX_NEW_TOKENS")
    assert "'--max-new-tokens'" in run("generate", tiny, "-p", "?", "--max-new-tokens", "0").stderr


def test_doctor_says_where_a_default_comes_from(run, tmp_path, config, monkeypatch):
    config('[generate]\nram-budget = "3GB"\n')
    monkeypatch.setenv("QWEN3VL_MEM_DETAIL", "low")
    text = " ".join(run("doctor", "--quick", "-v", "--path", tmp_path).stdout.split())
    assert "QWEN3VL_MEM_DETAIL low (environment)" in text
    assert "[generate] ram-budget 3GB (" in text
