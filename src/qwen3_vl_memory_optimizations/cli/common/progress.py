"""Show on stderr what a command waits for: one line with the time left on a terminal, one line per phase elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import format_bytes
from ...model.run.progress import ANSWER, Progress, ProgressTracker
from .output import OUTPUT, error_console

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

QuietOption = Annotated[bool, typer.Option("--quiet", "-q", rich_help_panel=OUTPUT, help="Show no progress on stderr.")]

LIBRARIES, INPUT = "libraries", "input"

_IN_BYTES = ("downloading", "loading", "calibrating", "packing", "writing")
_FRAMES_PER_S = 5
_NAME_COLUMNS, _BAR_COLUMNS = 16, 24
_FIRST_AFTER_S = 1.0
"""Outside a terminal, a command that fails or ends sooner prints no phase."""
_LEAST_LEFT_AFTER_S = 1.0
"""Before, an estimate of the time left would jump."""


class ProgressLine:
    """The phase of a command. `progress_line` creates it.

    Args:
        screen: where phases are shown; `None`: nowhere.
    """

    def __init__(self, screen: Console | None) -> None:
        self._screen = screen
        self._own = ProgressTracker()
        self._followed: Callable[[], Progress | None] | None = None
        self._computes = False  # what is followed has begun
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._seconds: dict[str, float] = {}
        self._phase: tuple[str, float] | None = None  # name and start
        self._shown: str | None = None
        self._start_s = time.monotonic()
        self._thread: threading.Thread | None = None
        self._live = contextlib.ExitStack()

    def begin(self, phase: str) -> None:
        """Begin a phase without measurable progress."""
        self._followed, self._computes = None, False
        self._own.begin(phase, "", None)
        self._look()

    def report(self, phase: str, done: int, total: int) -> None:
        """Show that `done` of `total` are finished; the callback of packing, loading and evaluation."""
        now = self._own.now()
        if now is None or now.phase != phase:
            self._own.begin(phase, "bytes" if phase.startswith(_IN_BYTES) else "", total)
            self._look()
        self._own.advance(done)

    def follow(self, source: Callable[[], Progress | None]) -> None:
        """Show what a model computes from now on; until it computes anything, the current phase stays."""
        self._followed = source

    def answer_begins(self) -> None:
        """Prepare for text on stdout: end the line if it is on the same terminal or in the same file."""
        if self._screen is not None and _is_same_place():
            self.close()

    # --- shown --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start to show phases; later ones appear by themselves."""
        if self._screen is None:
            return
        if self._screen.is_terminal:
            from rich.live import Live

            # A terminal shows log messages above the line; results on stdout stay as they are.
            line = Live(
                get_renderable=self._render,
                console=self._screen,
                transient=True,
                refresh_per_second=_FRAMES_PER_S,
                redirect_stdout=False,
            )
            self._live.enter_context(line)
            line.refresh()  # now: an import may keep its thread from running for a second
        else:
            self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
            self._thread.start()

    def close(self, *, failed: bool = False) -> None:
        """End the line. Further calls do nothing.

        Args:
            failed: an error follows, and the seconds of the phases do not matter.
        """
        if self._screen is None or self._ended.is_set():
            return
        self._look()
        self._ended.set()
        self._live.close()
        if self._thread is not None:
            self._thread.join()
        if self._shown is not None and not failed:
            self._count(None)
            spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._seconds.items())
            self._print(spent)

    def _now(self) -> Progress | None:
        followed = None if self._followed is None else self._followed()
        self._computes = self._computes or followed is not None
        return followed if self._computes else self._own.now()

    def _watch(self) -> None:
        while not self._ended.wait(1 / _FRAMES_PER_S):
            self._look()

    def _look(self) -> None:
        """Outside a terminal, notice a phase that begins, and print it."""
        if self._screen is None or self._screen.is_terminal or self._ended.is_set():
            return
        now = self._now()
        with self._lock:
            if now is not None and (self._phase is None or self._phase[0] != now.phase):
                self._count(now)
            if now is not None and now.phase != self._shown and time.monotonic() - self._start_s >= _FIRST_AFTER_S:
                self._shown = now.phase
                amount = "" if now.total is None else f": {'at most ' * (now.phase == ANSWER)}{_of_all(now)}"
                self._print(f"{now.phase}{amount}")

    def _count(self, now: Progress | None) -> None:
        """Add up the time of the phase that ends, and begin that of the next."""
        start_s = time.monotonic() - (0.0 if now is None else now.elapsed_s)
        if self._phase is not None:
            name, before_s = self._phase
            self._seconds[name] = self._seconds.get(name, 0.0) + max(0.0, start_s - before_s)
        self._phase = None if now is None else (now.phase, start_s)

    def _print(self, text: str) -> None:
        if self._screen is not None and text:
            self._screen.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now = self._now()
        if now is None:
            return Text("")
        line = Table.grid(padding=(0, 2))
        cells: list[RenderableType] = [Text(now.phase.ljust(_NAME_COLUMNS), no_wrap=True)]
        if now.total and now.phase != ANSWER:  # an answer usually ends before its most tokens
            cells.append(ProgressBar(total=now.total, completed=now.done, width=_BAR_COLUMNS))
        cells.append(Text(status(now), style="dim", no_wrap=True, overflow="ellipsis"))
        line.add_row(*cells)
        return line


def status(now: Progress) -> str:
    """Return the figures of a phase as text."""
    parts = []
    if now.total:
        parts.append(f"{_amount(now.done, now.unit)} of {_of_all(now)}")
    elif now.done:
        parts.append(f"{_amount(now.done, now.unit)} {now.unit}".rstrip())
    if now.tokens_per_s is not None:
        parts.append(f"{now.tokens_per_s:.3g} tokens/s")
    if not now.left_s or now.elapsed_s < _LEAST_LEFT_AFTER_S:
        parts.append(duration(now.elapsed_s))
    else:
        parts.append(f"{'at most' if now.phase == ANSWER else 'about'} {duration(now.left_s)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Format a duration: `0.8 s`, `12 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest_s = divmod(whole, 60)
    return f"{minutes} min {rest_s} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _amount(amount: int, unit: str) -> str:
    return format_bytes(amount) if unit == "bytes" else f"{amount:,}"


def _of_all(now: Progress) -> str:
    assert now.total is not None
    return _amount(now.total, now.unit) + ("" if now.unit in ("", "bytes") else f" {now.unit}")


def _is_same_place() -> bool:
    """Return whether stdout and stderr are the same terminal or file."""
    try:
        out, err = (os.fstat(stream.fileno()) for stream in (sys.stdout, sys.stderr))
    except (OSError, ValueError, AttributeError):  # replaced by objects without a file
        return False
    return (out.st_dev, out.st_ino) == (err.st_dev, err.st_ino)


@contextlib.contextmanager
def progress_line(*, quiet: bool = False, first: str = LIBRARIES) -> Iterator[ProgressLine]:
    """Show the phases of a command on stderr during a block.

    On a terminal one line shows the phase, its progress and the time left, and disappears at the end. Elsewhere each
    phase prints a line when it begins, and the last line has the seconds of each; a quick command prints none.

    Args:
        quiet: show nothing.
        first: the first phase, shown at once.
    """
    line = ProgressLine(None if quiet else error_console())
    line.begin(first)
    line.start()
    try:
        yield line
    except BaseException:
        line.close(failed=True)
        raise
    line.close()


@contextlib.contextmanager
def working(message: str, *, quiet: bool = False) -> Iterator[None]:
    """Show a spinner on stderr during work without measurable progress."""
    screen = error_console()
    if quiet or not screen.is_terminal:
        yield
        return
    with screen.status(message):
        yield
