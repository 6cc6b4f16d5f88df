"""Locks that note which was taken while which others were held, for the time of a test.

A set of threads can wait for each other for ever only if the locks they take make a cycle, each thread with another one
held; and not if two of them hold a third one in common meanwhile, for only one has that at a time (a gate). Taking a
lock only if it is free waits for nothing, and adds no edge; having it counts.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import qwen3_vl_memory_optimizations as package

SOURCE = str(Path(package.__file__).parent)
Edge = tuple[str, str]


class LockGraph:
    """What threads did with the locks of the package that were made inside `watching`.

    Attributes:
        gates: (held, taken) -> the sets of other locks that were held as well, each with where that was.
        waits: (waited on, held meanwhile) -> where: who waits for a condition or an event and has a lock.
        names: of all locks that were made.
    """

    def __init__(self) -> None:
        self.gates: dict[Edge, dict[frozenset[str], str]] = {}
        self.waits: dict[Edge, str] = {}
        self.names: set[str] = set()
        self._held = threading.local()

    @contextmanager
    def watching(self) -> Iterator[LockGraph]:
        """Have locks that the package makes in this block noted."""
        made = {name: getattr(threading, name) for name in ("Lock", "RLock")}
        threading.Lock = lambda: self._made(made["Lock"])  # type: ignore[assignment]
        threading.RLock = lambda: self._made(made["RLock"])  # type: ignore[assignment]
        try:
            yield self
        finally:
            for name, factory in made.items():
                setattr(threading, name, factory)

    def _made(self, factory: object) -> object:
        frame: types.FrameType | None = sys._getframe(2)
        inside = False
        while frame is not None and frame.f_code.co_filename == threading.__file__:
            inside, frame = True, frame.f_back  # a condition or an event makes its own
        lock = factory()  # type: ignore[operator]
        if frame is None or not frame.f_code.co_filename.startswith(SOURCE):
            return lock
        owner = frame.f_locals.get("self")
        name = type(owner).__name__ if owner is not None else Path(frame.f_code.co_filename).stem
        self.names.add(name)
        return NotedLock(lock, name, self, waited_on=inside)

    def stack(self) -> list[str]:
        """Return the names of the locks that this thread holds, the first one taken first."""
        if not hasattr(self._held, "names"):
            self._held.names = []
        return self._held.names

    def taking(self, name: str) -> None:
        """Note that this thread is about to wait for a lock."""
        held = set(self.stack())
        if name in held:
            return
        for each in held:
            self.gates.setdefault((each, name), {}).setdefault(frozenset(held - {each}), _place())

    def waiting(self, name: str) -> None:
        """Note that this thread gives a lock up to wait for a change."""
        for each in set(self.stack()) - {name}:
            self.waits.setdefault((name, each), _place())

    def cycles(self) -> list[list[str]]:
        """Return the cycles in which threads can wait for each other."""
        found: list[list[str]] = []
        after: dict[str, list[str]] = {}
        for held, taken in self.gates:
            after.setdefault(held, []).append(taken)

        def walk(path: list[str], gates: list[frozenset[str]]) -> None:
            for name in after.get(path[-1], ()):
                for gate in self.gates[path[-1], name]:
                    # Locks of the cycle itself are no gates.
                    if any(gate & other for other in gates):
                        continue
                    if name == path[0]:
                        if path[0] == min(path) and path not in found:
                            found.append(path)
                    elif name not in path:
                        walk([*path, name], [*gates, gate])

        for name in sorted(after):
            walk([name], [])
        return found

    def disorder(self, order: list[str], gate: str) -> dict[Edge, str]:
        """Return edges that go against an order, with a place where; those behind the gate are free to.

        Args:
            order: names, the first to be taken first. A name that is not in it is out of order with any other.
            gate: what is done by those who hold this one, and took it only because it was free, may be in any order.
        """
        rank = {name: number for number, name in enumerate(order)}
        wrong = {}
        for (held, taken), gates in self.gates.items():
            if held in rank and taken in rank and rank[held] < rank[taken]:
                continue
            for others, place in gates.items():
                if gate not in others and gate != held:
                    wrong[held, taken] = place
        return wrong


class NotedLock:
    """A lock, or a re-entrant one, that tells a graph of what is done with it; a condition can use it."""

    def __init__(self, lock: object, name: str, graph: LockGraph, *, waited_on: bool) -> None:
        self._lock, self._name, self._graph = lock, name, graph
        if hasattr(lock, "_is_owned"):
            self._is_owned = lock._is_owned
            self._release_save, self._acquire_restore = self._give_up, self._take_again
        self._waited_on = waited_on

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if blocking:
            self._graph.taking(self._name)
        taken: bool = self._lock.acquire(blocking, timeout)  # type: ignore[attr-defined]
        if taken:
            self._graph.stack().append(self._name)
        return taken

    def release(self) -> None:
        stack = self._graph.stack()
        del stack[len(stack) - 1 - stack[::-1].index(self._name)]
        self._lock.release()  # type: ignore[attr-defined]

    def _give_up(self) -> object:
        self._graph.waiting(self._name)
        stack = self._graph.stack()
        count = stack.count(self._name)
        stack[:] = [name for name in stack if name != self._name]
        return count, self._lock._release_save()  # type: ignore[attr-defined]

    def _take_again(self, state: tuple[int, object]) -> None:
        self._graph.taking(self._name)
        self._lock._acquire_restore(state[1])  # type: ignore[attr-defined]
        self._graph.stack().extend([self._name] * state[0])

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *details: object) -> None:
        self.release()


def _place() -> str:
    frame: types.FrameType | None = sys._getframe(2)
    lines = []
    while frame is not None and len(lines) < 8:
        if frame.f_code.co_filename.startswith(SOURCE):
            lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(lines)
