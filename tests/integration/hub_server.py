"""A model hub on loopback: listing, files by range, and a hand on the tap."""

from __future__ import annotations

import hashlib
import http.server
import json
import pathlib
import threading
from typing import Any

COMMIT = "c0ffee" + "0" * 34


class Hub:
    """Serves `folder` as the repository `owner/name`, until the block is left."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str]] = []
        """(path, range) of each request for a file."""
        self.stop_after: int | None = None
        """So many bytes of a file; then the hub falls silent until `let_go`."""
        self.ignores_ranges = False
        self.lies: dict[str, Any] = {}
        """Changes to what the listing says of every file."""
        self.let_go = threading.Event()
        self.status = 200
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_: Any) -> None:
                """Tests print what matters."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        if self.status != 200:
            request.send_error(self.status)
        elif request.path.startswith("/api/models/owner/name/revision/"):
            self._send(request, json.dumps(self.listing()).encode())
        elif request.path.startswith(f"/owner/name/resolve/{COMMIT}/"):
            self._file(request)
        else:
            request.send_error(404)

    def listing(self) -> dict[str, Any]:
        siblings = []
        for path in sorted(self.folder.iterdir()):
            body = path.read_bytes()
            found = {"rfilename": path.name, "size": len(body)}
            if path.suffix in {".gguf", ".safetensors"}:
                found["lfs"] = {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()}
            siblings.append(found | self.lies)
        return {"sha": COMMIT, "siblings": siblings, "tags": ["license:mit"]}

    def _file(self, request: http.server.BaseHTTPRequestHandler) -> None:
        name = request.path.rpartition("/")[2]
        wanted = request.headers.get("Range", "")
        self.asked.append((name, wanted))
        body = (self.folder / name).read_bytes()
        offset = 0
        if wanted and not self.ignores_ranges:
            offset = int(wanted.removeprefix("bytes=").rstrip("-"))
        self._send(request, body[offset:], 206 if offset else 200)

    def _send(
        self, request: http.server.BaseHTTPRequestHandler, body: bytes, status: int = 200
    ) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        first = len(body) if self.stop_after is None else self.stop_after
        try:
            request.wfile.write(body[:first])
            if first < len(body):
                self.let_go.wait(60)
                request.wfile.write(body[first:])
        except OSError:
            request.close_connection = True  # whoever asked was killed
