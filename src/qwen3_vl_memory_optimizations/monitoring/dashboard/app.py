"""The web application: the page, its event stream, and the run as JSON and CSV. It is local to this machine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..recording.history import to_line
from ..rendering.charts import charts_as_rows
from ..run_export import as_csv, as_json, state_of
from .files import STATIC
from .source import RunSource, newest, run_id

HOSTS = ["127.0.0.1", "localhost"]
"""Accepted host names, to block DNS rebinding by other sites."""

_LOOK_S = 0.4
_BEAT_S = 15.0
_BATCH = 200
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def make_app(source: RunSource, closing: threading.Event) -> Starlette:
    """Return the application for a run; its event streams end once `closing` is set."""

    def page(request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    def snapshot(request: Request) -> Response:
        return JSONResponse(newest(source))

    def run_json(request: Request) -> Response:
        return JSONResponse(as_json(source.header, state_of(_lines(source))), headers=_attachment("json"))

    def run_csv(request: Request) -> Response:
        text = as_csv(state_of(_lines(source)))
        return Response(text, media_type="text/csv", headers=_attachment("csv"))

    def events(request: Request) -> Response:
        # Sent by the browser when it reconnects: "run:number".
        run, _, number = request.headers.get("last-event-id", "").rpartition(":")
        after = int(number) if run == run_id(source) and number.isdigit() else 0
        return StreamingResponse(_events(source, after, closing), media_type="text/event-stream")

    routes = [
        Route("/", page),
        Route("/api/snapshot", snapshot),
        Route("/api/run.json", run_json),
        Route("/api/run.csv", run_csv),
        Route("/api/events", events),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False)
    return Starlette(routes=routes, middleware=[Middleware(_WithHeaders), hosts])


class _WithHeaders:
    """Adds the common headers to all responses."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


async def _events(source: RunSource, after: int, closing: threading.Event) -> AsyncIterator[str]:
    """Yield the records after a number, then new ones as they arrive."""
    run, history = run_id(source), source.history
    assert history is not None
    yield _event("header", {"run": run, "header": source.header, "charts": charts_as_rows()})
    idle_s, told_end, ends = 0.0, False, False
    while not ends:
        ends = closing.is_set()  # read first, so that earlier records are still sent
        source.poll()
        rows = history.after(after)
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            after = batch[-1][0]
            yield f"id: {run}:{after}\ndata: [{','.join(line for _, line in batch)}]\n\n"
        if not told_end and not source.running and not history.after(after):
            told_end = True
            yield _event("end", {})
        idle_s = 0.0 if rows else idle_s + _LOOK_S
        if idle_s > _BEAT_S:  # a heartbeat, to detect closed pages
            idle_s = 0.0
            yield ": \n\n"
        if not ends:
            await asyncio.sleep(_LOOK_S)


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {to_line(data)}\n\n"


def _lines(source: RunSource) -> list[str]:
    source.poll()
    assert source.history is not None
    return [line for _, line in source.history.after(0)]


def _attachment(ending: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="qwen3vl-mem-run.{ending}"'}
