"""One answer of a server that speaks OpenAI's chat completions, as it streams in: a thread each.

The server is a stranger too: every line, every answer and every silence has a limit, redirects are
not followed, and nothing that it says in words goes further than its status number, since it may
repeat the key.

Source: OpenAI, API reference, "Create chat completion", streaming; WHATWG, server-sent events.
"""

from __future__ import annotations

import contextlib
import http.client
import queue
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import msgspec

from aivillage.models.inference.endpoint import Address

LINE_BYTES_MAX: Final = 1 << 16
"""A chunk has some hundred bytes; servers that send many tokens in one have some thousand."""
STREAM_BYTES_MAX: Final = 16 << 20
"""8 KB a token of the longest answer. A server that goes on beyond it is cut off."""
SILENCE_SECONDS_MAX: Final = 120.0
"""A slow server may read a long prompt for a minute before its first word."""
HEARD_WAITING_MAX: Final = 1_024
"""Of all answers together; a reader that finds it full waits, and so does its server."""
_PUT_SECONDS: Final = 0.2
_PREFIX: Final = b"data:"
_DONE: Final = b"[DONE]"
_ENDS: Final = {"stop": "eos", "length": "length"}

Dial = Callable[[], socket.socket]
"""A connection to the server's host and port. Raises: OSError: there is none."""


class Heard(msgspec.Struct, frozen=True):
    """`end`: "eos" or "length", with or without text; `error` ends the answer as well."""

    stream: ChatStream
    text: str = ""
    end: str = ""
    error: str = ""


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    index: int = 0
    delta: _Delta = _Delta()
    finish_reason: str | None = None


class _Chunk(msgspec.Struct, frozen=True):
    choices: tuple[_Choice, ...] = ()
    error: msgspec.Raw = msgspec.Raw()


class ServerError(Exception):
    """What is wrong with the server, in words of ours."""


_chunks: Final = msgspec.json.Decoder(_Chunk)


class ChatStream:
    """Asks once, and puts what it hears into `heard`: texts, then one end or error.

    After `close` nothing more is put there.
    """

    def __init__(
        self,
        address: Address,
        key: str,
        body: Mapping[str, Any],
        *,
        dial: Dial,
        tls: ssl.SSLContext | None,
        heard: queue.Queue[Heard],
    ) -> None:
        self._address = address
        self._key = key
        self._body = msgspec.json.encode(body)
        self._dial = dial
        self._tls = tls
        self._heard = heard
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether its thread still runs; after `close` it may for a moment."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Hangs up: the server may stop at once."""
        with self._lock:
            self._closed = True
            if self._socket is not None:
                _hang_up(self._socket)

    def _run(self) -> None:
        try:
            end = ""
            for choice in self._choices():
                if choice.delta.content:
                    self._put(Heard(self, text=choice.delta.content))
                if choice.finish_reason:
                    end = choice.finish_reason
            self._put(_ended(self, end))
        except ServerError as error:
            self._put(Heard(self, error=str(error)))
        except ssl.SSLCertVerificationError:
            self._put(Heard(self, error="its server shows no certificate that is trusted here"))
        except TimeoutError:
            self._put(Heard(self, error="its server fell silent"))
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._put(Heard(self, error=f"its server cannot be used ({type(error).__name__})"))
        finally:
            self.close()
            if self._socket is not None:
                self._socket.close()

    def _put(self, heard: Heard) -> None:
        is_put = False
        while not (is_put or self._closed):
            with contextlib.suppress(queue.Full):  # whoever reads is busy, or has just gone
                self._heard.put(heard, timeout=_PUT_SECONDS)
                is_put = True

    def _choices(self) -> Iterator[_Choice]:
        for data in _events(self._response()):
            try:
                chunk = _chunks.decode(data)
            except (msgspec.DecodeError, RecursionError):
                raise ServerError("its server sent what is no chunk of an answer") from None
            if bytes(chunk.error) not in {b"", b"null"}:
                raise ServerError("its server broke off with an error")
            yield from (choice for choice in chunk.choices if choice.index == 0)

    def _response(self) -> http.client.HTTPResponse:
        address = self._address
        connection = http.client.HTTPConnection(
            address.host, address.port, timeout=SILENCE_SECONDS_MAX
        )
        connection.sock = self._connected()
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connection.request("POST", address.path, self._body, headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ServerError(_refused(response.status))
        if response.headers.get_content_type() != "text/event-stream":
            raise ServerError("its server does not stream")
        return response

    def _connected(self) -> socket.socket:
        found = self._dial()
        found.settimeout(SILENCE_SECONDS_MAX)
        if self._tls is not None:
            host = self._address.host
            found = self._tls.wrap_socket(
                found, server_hostname=host, do_handshake_on_connect=False
            )
        with self._lock:
            self._socket = found
            if self._closed:
                raise ServerError("cancelled")
        if isinstance(found, ssl.SSLSocket):
            found.do_handshake()
        return found


def _hang_up(found: socket.socket) -> None:
    """Wakes whoever reads from it, who closes it. Not TLS's own: that may be in use just now."""
    with contextlib.suppress(OSError):  # it is closed already
        socket.socket.shutdown(found, socket.SHUT_RDWR)


def _events(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The data of each event, until the last one.

    Raises:
        ServerError: a line or the whole is too long, or it ends before its end.
    """
    total = 0
    while line := response.readline(LINE_BYTES_MAX + 1):
        total += len(line)
        if len(line) > LINE_BYTES_MAX or total > STREAM_BYTES_MAX:
            raise ServerError("its server sends more than an answer can have")
        if line.startswith(_PREFIX):
            data = line.removeprefix(_PREFIX).strip()
            if data == _DONE:
                return
            yield data
    raise ServerError("its server hung up in the middle")


def _ended(stream: ChatStream, reason: str) -> Heard:
    if reason in _ENDS:
        return Heard(stream, end=_ENDS[reason])
    why = "without a reason" if not reason else "for a reason of its own"
    return Heard(stream, error=f"its server ended the answer {why}")


def _refused(status: int) -> str:
    why = {
        400: "it does not take the request",
        401: "it does not take the key",
        403: "the key does not allow it",
        404: "it has no such model or path",
        429: "it has too much to do",
    }
    return f"its server says {status}: {why.get(status, 'it cannot answer')}"
