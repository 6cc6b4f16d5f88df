"""What all commands have in common: help, errors, and how little they import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qwen3_vl_memory_optimizations
from qwen3_vl_memory_optimizations import __version__

COMMANDS = ("demo", "generate", "pack", "doctor", "top", "report")
ALL = [
    *("demo", "generate", "pull", "pack", "evaluate", "doctor", "dashboard", "top", "report", "models", "cache"),
    *("models ls", "models rm", "cache ls", "cache rm", "cache stats", "cache verify", "cache clear"),
]


def test_the_program_lists_its_commands(run):
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself_with_an_example(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"qwen3vl-mem {command}" in result.stdout
    assert "--json" in result.stdout


@pytest.mark.parametrize("command", ALL)
def test_help_has_examples_before_grouped_options_with_plain_names(run, command):
    text = run(*command.split(), "--help").stdout
    example, options = text.index("Example:"), text.index("╭")
    assert example < options
    assert "─ Options ─" not in text
    assert "<" not in text and "{" not in text, "odd names of values"
    assert "QWEN3VL_MEM_RAM_BUDGET=2GB" in text or command in ("models", "cache")
    assert "--install-completion" not in text


def test_completion_is_installed_by_the_program_alone(run, monkeypatch):
    assert "--install-completion" in run("--help").stdout
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: "bash")
    assert "_QWEN3VL_MEM_COMPLETE" in run("--show-completion").stdout


def test_the_version_is_printed(run):
    assert run("--version").stdout.strip() == f"qwen3vl-mem {__version__}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["doctor", "--help"],
        ["generate", "x", "-p", "?", "--ram-budget", "x"],
        ["pack", "x", "--profile", "x"],
    ],
)
def test_help_and_mistakes_do_not_wait_for_torch(arguments):
    code = (
        "import sys\n"
        "from qwen3_vl_memory_optimizations.cli import app\n"
        f"try: app({arguments!r})\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'imported too much'\n"
    )
    source = str(Path(qwen3_vl_memory_optimizations.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": source}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "{tiny}", "-p", "?", "--ram-budget", "lots"], "'lots' is not a size"),
        (["generate", "{tiny}", "-p", "?", "--codec", "zip"], "codec: 'zip' is not one of"),
        (["generate", "/no/such/model", "-p", "?"], "/no/such/model"),
        (["generate", "{tiny}", "-p", "?", "-i", "/no/such.png"], "/no/such.png: no such image"),
        (["generate", "{tiny}", "-p", "?", "-i", "{tiny}/config.json"], "is not an image"),
        (["generate", "{tiny}", "-p", "?", "--video", "/no/such.mp4"], "no such video"),
        (["generate", "{tiny}", "-p", " "], "the prompt is empty"),
        (["generate", "{tiny}", "-p", "?", "--ram-budget", "1MB"], "ram_budget of 1 MB is too small"),
        (["pack", "/no/such/model"], "/no/such/model"),
        (["pack", "{tiny}", "--codec", "none"], "needs no packing"),
        (["generate", "{tiny}", "-p", "?", "--profile", "servr"], "did you mean 'server'"),
        (["pack", "{tiny}", "--profile", "/no/such.toml"], "/no/such.toml: cannot read this profile"),
        (["doctor", "--ram-budget", "-1GB"], "is not a size"),
        (["doctor", "--path", "/no/such/directory"], "not a directory"),
        (["demo", "--tensor-budget", "none"], "is not a size"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(run, tiny, arguments, words):
    filled = [argument.format(tiny=tiny) for argument in arguments]
    result = run(*filled)
    assert result.exit_code == 2
    assert result.stdout == ""
    phases = ("libraries", "input")  # shown where the machine is slow
    (line,) = (each for each in result.stderr.strip().splitlines() if not each.startswith(phases))
    assert line.startswith("error: ") and words in line


def test_a_mistake_is_an_object_for_machines(run):
    result = run("pack", "/no/such/model", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "CheckpointError"


def test_debug_shows_where_an_error_came_from(run):
    result = run("pack", "/no/such/model", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")


def test_ctrl_c_is_a_short_line(run, monkeypatch):
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen3_vl_memory_optimizations.planning.pack_model", interrupted)
    result = run("pack", Path(qwen3_vl_memory_optimizations.__file__).parent / "assets" / "tiny-qwen3vl")
    assert (result.exit_code, result.stderr) == (130, "stopped\n")
