"""`Dashboard`: serves the page of a run from a thread on 127.0.0.1."""

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
    """Serves the page of a run until `close`.

    Args:
        source: the run.
        port: port to listen on; 0 for any free port.
        recorder: closed together with the page.

    Attributes:
        url: address of the page.

    Raises:
        ConfigurationError: starlette and uvicorn are not installed, or the port is in use.
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
        """Stop the page, and the recording if it started with it. Further calls do nothing."""
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
    """Serve a live page of an optimizer from a thread and return immediately.

    Args:
        model_or_optimizer: a model from `create_optimized_model`, or a `MemoryOptimizer`; held by a weak reference.
        port: port to listen on; 0 for any free port.
        path: run file to record to; `None` for none.
        monitor: evaluates alerts; default: one with the default limits.
        about: labels for the run, such as the `command`.

    Raises:
        ConfigurationError: starlette and uvicorn are not installed, the port is in use, or the object is neither.
        StorageError: the run file cannot be created.
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
    """Return the optimizer of a model, or the optimizer itself.

    Raises:
        ConfigurationError: the object is neither.
    """
    from ...optimizer import MemoryOptimizer

    optimizer = getattr(model_or_optimizer, "memory_optimizer", model_or_optimizer)
    if not isinstance(optimizer, MemoryOptimizer):
        name = type(model_or_optimizer).__name__
        raise ConfigurationError(f"expected a MemoryOptimizer or an optimized model, got {name}")
    return optimizer


@contextlib.contextmanager
def serve_run(path: Path, port: int = 0) -> Iterator[Dashboard]:
    """Serve the page of a recorded run, live or ended, during a block.

    Raises:
        ConfigurationError: the run cannot be read, or the page cannot be served.
    """
    with Dashboard(RunFile(path), port=port) as dashboard:
        yield dashboard


def check_installed() -> None:
    """Check that the dashboard's dependencies are installed.

    Raises:
        ConfigurationError: one is not installed.
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
        listener.listen()  # now, not in the thread: callers may connect as soon as they have the URL
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"dashboard: cannot use port {port}: {error.strerror}; choose another, or 0 for any free port"
        ) from error
    return listener
