import io

from rich.console import Console

from qwen3_vl_memory_optimizations.cli import _output


def use_terminal(monkeypatch, *, is_terminal: bool) -> io.StringIO:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=is_terminal, width=80)
    monkeypatch.setattr(_output, "error_console", lambda: terminal)
    return screen


def test_progress_is_shown_on_a_terminal(monkeypatch):
    screen = use_terminal(monkeypatch, is_terminal=True)
    with _output.progress_bar() as progress:
        progress("packing", 0, 2_000_000)
        progress("packing", 1_000_000, 2_000_000)
        progress("loading", 5, 10)
    assert "packing" in screen.getvalue()
    assert "1.0/2.0 MB" in screen.getvalue()
    assert "loading" in screen.getvalue()


def test_progress_is_not_shown_elsewhere(monkeypatch):
    for is_terminal, quiet in ((False, False), (True, True)):
        screen = use_terminal(monkeypatch, is_terminal=is_terminal)
        with _output.progress_bar(quiet=quiet) as progress, _output.working("busy", quiet=quiet):
            progress("packing", 1, 2)
        assert screen.getvalue() == ""


def test_a_share_is_a_percentage():
    assert (_output.percent(0.256), _output.percent(None)) == ("26 %", "-")
