"""A server on 127.0.0.1 that speaks as much of the hub's protocol as huggingface_hub needs to download a model."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "owner/tiny-qwen3vl"


@dataclass
class Hub:
    """One model, and how the server behaves.

    Attributes:
        files: name -> content.
        cut_after: bytes of a large file after which each connection is cut; `None`: never.
        status: answer everything with this status; `None`: serve.
        announced: name -> a size to announce instead of the true one.
        ranges: the `Range` header of each request for a large file.
        pause_s: seconds to wait per piece of a large file.
    """

    files: dict[str, bytes]
    cut_after: int | None = None
    status: int | None = None
    error_code: str | None = None
    announced: dict[str, int] = field(default_factory=dict)
    ranges: list[str | None] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    pause_s: float = 0.0
    token: str | None = None
    address: str = ""

    @classmethod
    def of(cls, directory: Path) -> Hub:
        """Return a hub whose model has the files of a directory, and some that no loader needs."""
        files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
        return cls(files | {"README.md": b"# A model\n", "pytorch_model.bin": bytes(3 << 20)})

    def size(self, name: str) -> int:
        return self.announced.get(name, len(self.files[name]))

    def is_large(self, name: str) -> bool:
        return len(self.files[name]) > 1 << 20

    def listed(self, name: str) -> dict[str, Any]:
        """Return what the hub says about a file."""
        row: dict[str, Any] = {"blobId": hashlib.sha1(self.files[name]).hexdigest(), "size": self.size(name)}
        if self.is_large(name):
            sha256 = hashlib.sha256(self.files[name]).hexdigest()
            row["lfs"] = {"sha256": sha256, "oid": sha256, "size": self.size(name), "pointerSize": 134}
        return row


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was stopped


def serve(hub: Hub) -> ThreadingHTTPServer:
    """Start a server in a thread; `hub.address` is where."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:  # noqa: N802
            self.do_GET()

        def do_GET(self) -> None:  # noqa: N802
            hub.requests.append(f"{self.command} {self.path}")
            path = self.path.partition("?")[0]
            denied = hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}"
            if hub.status is not None or denied:
                self._fail(hub.status or 401, hub.error_code or "RepoNotFound")
            elif path.startswith(f"/api/models/{REPO}/revision/"):
                if path.rpartition("/")[2] not in ("main", COMMIT):
                    self._fail(404, "RevisionNotFound")
                    return
                siblings = [{"rfilename": name, **hub.listed(name)} for name in hub.files]
                self._json({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings, "tags": []})
            elif path.startswith(f"/api/models/{REPO}/tree/"):
                rows = []
                for name in hub.files:
                    row = hub.listed(name)
                    rows.append({"type": "file", "path": name, "oid": row.pop("blobId"), **row})
                self._json(rows)
            elif path.startswith(f"/{REPO}/resolve/"):
                self._file(path.rpartition("/")[2])
            else:
                self._fail(404, "RepoNotFound")

        def _fail(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _json(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _file(self, name: str) -> None:
            content, row = hub.files[name], hub.listed(name)
            start, large = 0, hub.is_large(name)
            given = self.headers.get("Range")
            if large and self.command == "GET":
                hub.ranges.append(given)
            if given is not None:
                start = int(given.removeprefix("bytes=").partition("-")[0])
            self.send_response(206 if given else 200)
            if given:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            etag = row["lfs"]["sha256"] if large else row["blobId"]
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if self.command == "HEAD":
                return
            for position in range(start, len(content), 1 << 16):
                if large and hub.cut_after is not None and position - start >= hub.cut_after:
                    self.close_connection = True
                    self.connection.close()
                    return
                self.wfile.write(content[position : position + (1 << 16)])
                if large and hub.pause_s:
                    threading.Event().wait(hub.pause_s)

    server = _Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    return server
