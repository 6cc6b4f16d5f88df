"""`Dashboard`: serves the page of a run from a thread, on 127.0.0.1."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigurationError
from ..recording.run_file import RunFile
from .source import RunSource

if TYPE_CHECKING:
    from ...optimizer import MemoryOptimizer
    from ..alerts import AlertMonitor
    from ..recording.recorder import Recorder

ADDRESS = "127.0.0.1"

_END_S = 2


class Dashboard:
    """The page of a run, until `close`.

    Args:
        source: the run.
        port: 0: any that is free.
        recorder: ends with the page.

    Attributes:
        url: of the page.

    Raises:
        ConfigurationError: starlette and uvicorn are not installed, or the port is taken.
    """

    def __init__(self, source: RunSource, *, port: int = 0, recorder: Recorder | None = None) -> None:
        check_installed()
        import uvicorn

        from .app import make_app

        self.source = source
        self._recorder = recorder
        self._closing = threading.Event()
        listener = _listen(port)
        self.url = f"http://{ADDRESS}:{listener.getsockname()[1]}/"
        config = uvicorn.Config(
            make_app(source, self._closing),
            log_level="error",
            access_log=False,
            lifespan="off",
            ws="none",
            http="h11",
            loop="asyncio",
            timeout_graceful_shutdown=_END_S,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([listener],), name="memory-dashboard", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End the page, and the recording if it began with it. A second call does nothing."""
        if self._recorder is not None:
            self._recorder.close()
        self._closing.set()
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self) -> Dashboard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_dashboard(
    model_or_optimizer: Any,
    port: int = 0,
    *,
    path: Path | None = None,
    monitor: AlertMonitor | None = None,
    about: dict[str, Any] | None = None,
) -> Dashboard:
    """Serve a page that shows an optimizer at work, from a thread; return at once.

    Args:
        model_or_optimizer: a model of `create_optimized_model`, or a `MemoryOptimizer`. It is not kept alive.
        port: 0: any that is free.
        path: of a file for the record of the run; `None`: none.
        monitor: decides on alerts; default: one with the usual limits.
        about: what the page says of the run, such as the `command`.

    Raises:
        ConfigurationError: starlette and uvicorn are not installed, the port is taken, or it is no such object.
        StorageError: the file cannot be made.
    """
    check_installed()
    from ..recording.recorder import Recorder

    optimizer = optimizer_of(model_or_optimizer)
    recorder = Recorder(optimizer, path=path, monitor=monitor, about=about)
    try:
        return Dashboard(recorder, port=port, recorder=recorder)
    except BaseException:
        recorder.close()
        raise


def optimizer_of(model_or_optimizer: Any) -> MemoryOptimizer:
    """Return the optimizer that is meant.

    Raises:
        ConfigurationError: there is none.
    """
    from ...optimizer import MemoryOptimizer

    optimizer = getattr(model_or_optimizer, "memory_optimizer", model_or_optimizer)
    if not isinstance(optimizer, MemoryOptimizer):
        name = type(model_or_optimizer).__name__
        raise ConfigurationError(f"expected a MemoryOptimizer or a model that has one, got {name}")
    return optimizer


@contextlib.contextmanager
def serve_run(path: Path, port: int = 0) -> Iterator[Dashboard]:
    """Serve the page of a recorded run, which may still be written, for a block.

    Raises:
        ConfigurationError: it cannot be read, or the page cannot be served.
    """
    with Dashboard(RunFile(path), port=port) as dashboard:
        yield dashboard


def check_installed() -> None:
    """Raise where what serves the page is not installed.

    Raises:
        ConfigurationError: it is not.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f"the dashboard needs {error.name}: pip install 'qwen3-vl-memory-optimizations[dashboard]'"
        ) from error


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((ADDRESS, port))
        listener.listen()  # now, and not when the thread comes to it: who has the address may ask at once
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"dashboard: port {port} cannot be used: {error.strerror}") from error
    return listener
