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
from typing import Any

import numpy.random  # noqa: F401 - imported while locks are watched, it would make all of its own watched ones

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
        self._lock = threading.Lock()
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
        lock = factory()  # type: ignore[operator]
        event = False
        while frame is not None and frame.f_code.co_filename == threading.__file__:
            maker = frame.f_locals.get("self")
            if isinstance(maker, threading.Thread):  # waits for it to start, which it does
                return lock
            event = event or isinstance(maker, threading.Event)
            frame = frame.f_back  # a condition or an event makes its own
        while frame is not None and type(frame.f_locals.get("self")).__name__ == "ShieldedLock":
            frame = frame.f_back  # it is the lock of who makes it
        if frame is None or not frame.f_code.co_filename.startswith(SOURCE):
            return lock
        return self.noted(lock, type(frame.f_locals["self"]).__name__, event=event)

    def noted(self, lock: object, name: str, *, event: bool = False) -> NotedLock:
        """Return a lock of which is noted what is done with it; of an event only who waits for it."""
        self.names.add(name)
        return NotedLock(lock, name, self, event=event)

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
            gate = frozenset(held - {each})
            if gate not in self.gates.get((each, name), ()):
                with self._lock:
                    self.gates.setdefault((each, name), {}).setdefault(gate, _place())

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
    """A lock, or a re-entrant one, that tells a graph what is done with it; conditions can use it."""

    def __init__(self, lock: Any, name: str, graph: LockGraph, *, event: bool) -> None:
        self._lock, self._name, self._graph, self._event = lock, name, graph, event
        if hasattr(lock, "_is_owned"):
            self._is_owned = lock._is_owned

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if blocking and not self._event:
            self._graph.taking(self._name)
        taken: bool = self._lock.acquire(blocking, timeout)
        if taken and not self._event:
            self._graph.stack().append(self._name)
        return taken

    def release(self) -> None:
        if not self._event:
            stack = self._graph.stack()
            del stack[len(stack) - 1 - stack[::-1].index(self._name)]
        self._lock.release()

    def _release_save(self) -> tuple[int, Any]:
        """Called by a condition whose change is waited for."""
        self._graph.waiting(self._name)
        stack = self._graph.stack()
        count = stack.count(self._name)
        stack[:] = [name for name in stack if name != self._name]
        return count, self._lock._release_save() if hasattr(self._lock, "_release_save") else self._lock.release()

    def _acquire_restore(self, state: tuple[int, Any]) -> None:
        if not self._event:
            self._graph.taking(self._name)
        if hasattr(self._lock, "_acquire_restore"):
            self._lock._acquire_restore(state[1])
        else:
            self._lock.acquire()
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
