"""A server on loopback that speaks OpenAI's chat completions, well or badly."""

from __future__ import annotations

import http.server
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

Handler = http.server.BaseHTTPRequestHandler


class ChatServer:
    """Answers with `words`, a chunk each, until the block is left."""

    def __init__(self) -> None:
        self.words: list[str] = ["The ", "fox ", "met ", "a ", "☃ ", "and ", "slept."]
        self.finish = "stop"
        self.status = 200
        self.body_of_refusal = b""
        self.seconds_between = 0.0
        self.hang_after: int | None = None
        """So many words; then silence until `let_go`."""
        self.cut_after: int | None = None
        """So many words; then the connection ends."""
        self.write: Callable[[Handler], None] | None = None
        """Instead of all that."""
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.hung_up = threading.Semaphore(0)
        """One for each caller that left before its answer was whole."""
        self.let_go = threading.Event()
        server = self

        class Answer(Handler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:  # noqa: N802 - the library calls it so
                server.answer(self)

            def log_message(self, *_: Any) -> None:
                """Tests print what matters."""

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """Callers may leave at any time."""

        self._server = Server(("127.0.0.1", 0), Answer)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go.set()
        self._server.shutdown()
        self._server.server_close()

    def encrypt(self, context: ssl.SSLContext) -> None:
        """From now on over TLS."""
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = self.url.replace("http:", "https:")

    def answer(self, request: Handler) -> None:
        body = request.rfile.read(int(request.headers["Content-Length"]))
        self.asked.append(json.loads(body))
        self.headers.append(dict(request.headers))
        self.paths.append(request.path)
        request.close_connection = True
        if self.write is not None:
            self.write(request)
        elif self.status != 200:
            self._head(request, "application/json")
            request.wfile.write(self.body_of_refusal)
        else:
            self._stream(request)

    def _head(self, request: Handler, kind: str) -> None:
        request.send_response(self.status)
        request.send_header("Content-Type", kind)
        request.send_header("Connection", "close")
        request.end_headers()

    def _stream(self, request: Handler) -> None:
        self._head(request, "text/event-stream; charset=utf-8")
        try:
            for index, word in enumerate(self.words):
                if index == self.hang_after:
                    self._until_gone(request)
                    return
                if index == self.cut_after:
                    return
                send(request, {"choices": [{"index": 0, "delta": {"content": word}}]})
                time.sleep(self.seconds_between)
            send(request, {"choices": [{"index": 0, "delta": {}, "finish_reason": self.finish}]})
            send(request, {"choices": [], "usage": {"total_tokens": 9}})
            request.wfile.write(b": a comment\n\ndata: [DONE]\n\n")
        except OSError:
            self.hung_up.release()

    def _until_gone(self, request: Handler) -> None:
        """Silent until the caller hangs up, or the test lets go."""
        request.connection.settimeout(0.05)
        while not self.let_go.is_set():
            try:
                if not request.connection.recv(1):
                    self.hung_up.release()
                    return
            except TimeoutError:
                continue
            except OSError:
                self.hung_up.release()
                return


def send(request: Handler, chunk: dict[str, Any]) -> None:
    request.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\r\n\r\n")
    request.wfile.flush()


def free_port() -> int:
    """Where nobody listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
