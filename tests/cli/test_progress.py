"""What a command waits for: one line on a terminal, one line per phase elsewhere."""

import io
import re
import time

import pytest
from rich.console import Console

from qwen3_vl_memory_optimizations.cli.common import progress as _progress
from qwen3_vl_memory_optimizations.model.run.progress import Progress


def use_terminal(monkeypatch, *, is_terminal: bool) -> io.StringIO:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=is_terminal, width=100)
    monkeypatch.setattr(_progress, "error_console", lambda: terminal)
    return screen


def until(condition):
    for _ in range(100):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("not in five seconds")


def test_a_terminal_shows_the_phase_its_progress_and_nothing_afterwards(monkeypatch):
    screen = use_terminal(monkeypatch, is_terminal=True)
    with _progress.progress_line() as line:
        assert "libraries" in screen.getvalue(), "at once"
        line.report("packing", 1_000_000, 2_000_000)
        until(lambda: "1 MB of 2 MB" in screen.getvalue())
        line.follow(lambda: Progress("pictures", 12, 24, "blocks", 5.0, left_s=5.0))
        until(lambda: "12 of 24 blocks, about 5.0 s left" in screen.getvalue())
    assert screen.getvalue().endswith(("\x1b[2K", "\x1b[?25h")), "the line is erased"


def test_elsewhere_each_phase_is_a_line_without_control_characters(monkeypatch):
    screen = use_terminal(monkeypatch, is_terminal=False)
    monkeypatch.setattr(_progress, "_FIRST_AFTER_S", 0.0)
    found = []
    with _progress.progress_line() as line:
        assert screen.getvalue() == "libraries\n"
        line.report("loading", 0, 2_000_000)
        line.report("loading", 2_000_000, 2_000_000)
        line.begin("input")
        line.follow(lambda: found[-1] if found else None)
        found.append(Progress("pictures", 1, 24, "blocks", 0.0))
        until(lambda: "pictures" in screen.getvalue())
        found.append(Progress("answer", 1, 256, "tokens", 0.0))
        until(lambda: "answer" in screen.getvalue())
        found.append(None)
        time.sleep(0.5)
    lines = screen.getvalue().splitlines()
    assert lines[:5] == ["libraries", "loading: 2 MB", "input", "pictures: 24 blocks", "answer: at most 256 tokens"]
    assert re.fullmatch(
        r"libraries [\d.]+ s, loading [\d.]+ s, input [\d.]+ s, pictures [\d.]+ s, answer [\d.]+ s", lines[5]
    )
    assert len(lines) == 6 and "\x1b" not in screen.getvalue() and "\r" not in screen.getvalue()


def test_elsewhere_a_command_that_fails_at_once_prints_no_phase(monkeypatch):
    screen = use_terminal(monkeypatch, is_terminal=False)
    with pytest.raises(ValueError, match="mine"), _progress.progress_line():
        raise ValueError("mine")
    assert screen.getvalue() == ""


@pytest.mark.parametrize("is_terminal", [False, True])
def test_quiet_shows_nothing(monkeypatch, is_terminal):
    screen = use_terminal(monkeypatch, is_terminal=is_terminal)
    with _progress.progress_line(quiet=True) as line:
        line.report("packing", 1, 2)
        line.answer_begins()
    assert screen.getvalue() == ""


def test_an_error_ends_the_line(monkeypatch):
    screen = use_terminal(monkeypatch, is_terminal=True)
    with pytest.raises(ValueError, match="mine"), _progress.progress_line():
        raise ValueError("mine")
    assert "\x1b[?25h" in screen.getvalue(), "the cursor is back"


def test_an_answer_shows_its_rate_and_the_most_time_left():
    now = Progress("answer", 12, 256, "tokens", 6.0, left_s=122.0, tokens_per_s=2.0, first_token_s=31.4)
    assert _progress.status(now) == ("12 of 256 tokens, 2 tokens/s, at most 2 min 2 s left")


def test_a_time_left_is_not_guessed_in_the_first_second():
    assert _progress.status(Progress("prompt", 10, 20, "tokens", 0.5, left_s=0.5)) == "10 of 20 tokens, 0.5 s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.84, "0.8 s"), (9.96, "10 s"), (59.7, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations(seconds, text):
    assert _progress.duration(seconds) == text
