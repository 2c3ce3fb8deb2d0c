"""The openai engine: answers come from a server behind a URL, not from weights that are here.

It sells under the same rules as any engine: nothing beyond the allowance, ends and stop strings as
asked for. What it cannot do it says: `best effort`, no fingerprints. The server bills its owner as
soon as it is asked, so the prompt is paid before that.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import socket
import ssl
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from aivillage.models.inference import catalogue, endpoint, remote
from aivillage.models.inference.chat_stream import (
    HEARD_WAITING_MAX,
    ChatStream,
    Dial,
    Heard,
)
from aivillage.models.inference.generate import GenerateRequest, conversation
from aivillage.models.inference.remote_session import RemoteSession
from aivillage.models.library import manifest as manifests
from aivillage.models.library.hashing import require_whole
from aivillage.protocols.errors import RefusedError, RequestError
from aivillage.protocols.ports import EngineInfo, SessionFrame

ENGINE_VERSION: Final = 1
SLOTS: Final = 8
WAIT_SECONDS: Final = 0.02
"""A step waits so long for the servers, and a cancel or an allowance at most so long for it."""
DIAL_SECONDS_MAX: Final = 10.0
THREADS_PER_SLOT_MAX: Final = 4
"""Calls that were hung up while they were dialled live on until they hear of it."""


class OpenaiEngine:
    """Serves one remote model."""

    def __init__(
        self, model: catalogue.KnownModel, *, slots: int = SLOTS, dial: Dial | None = None
    ) -> None:
        """Reads where to ask, and the key. Nobody is asked yet.

        `dial` connects to the server; without one this process does.

        Raises:
            ConfigError: they cannot be read, or were changed.
            RequestError: the URL is none that is asked.
        """
        begun = time.monotonic()
        folder = Path(model.folder)
        require_whole(folder, manifests.read(folder))
        self._endpoint = endpoint.read(folder)
        self._address = endpoint.address_of(self._endpoint)
        self._key = endpoint.key_of(self._endpoint)
        self._tls = ssl.create_default_context() if self._address.is_encrypted else None
        self._dial = dial or functools.partial(
            socket.create_connection, (self._address.host, self._address.port), DIAL_SECONDS_MAX
        )
        self._slots = slots
        self._sessions: dict[int, RemoteSession] = {}
        self._streams: dict[int, ChatStream] = {}
        self._closing: list[ChatStream] = []
        self._heard: queue.Queue[Heard] = queue.Queue(HEARD_WAITING_MAX)
        self._info = EngineInfo(
            engine="openai",
            model=model.name,
            kernel_class=f"openai{ENGINE_VERSION}/{model.sha256[:16]}",
            identical="best effort",
            active_parameters=model.active_parameters,
            context_tokens=model.context_tokens,
            vocabulary=remote.VOCABULARY,
            weights_sha256=model.sha256,
            device="remote",
        )
        self.load_seconds = time.monotonic() - begun

    def info(self) -> EngineInfo:
        return self._info

    @property
    def waits(self) -> bool:
        """Whether servers are at work: a step may give something although none did just now."""
        return bool(self._streams)

    def add(self, session: int, request: Any, delivered: Sequence[int]) -> None:
        """Queues `request`; after `delivered` it goes on only if the server says the same again.

        Raises:
            RequestError: it is for another model, or `delivered` is no beginning of an answer.
            RefusedError: BUSY, no slot; NOT_OFFERED, it asks for what no server promises.
        """
        if session in self._sessions:
            raise RequestError(f"session {session} is running already")
        if not isinstance(request, GenerateRequest) or request.model != self._info.model:
            raise RequestError(f"this engine answers requests to {self._info.model}")
        if request.format is not None or request.logprobs:
            raise RefusedError(
                "models that answer elsewhere take no formats and tell no log-probabilities",
                code="NOT_OFFERED",
                next_step="ask for a model that is computed on a node",
            )
        added = RemoteSession(session, request, delivered)
        self._closing = [stream for stream in self._closing if stream.is_alive]
        waiting = len(self._closing) >= self._slots * (THREADS_PER_SLOT_MAX - 1)
        if len(self._sessions) >= self._slots or waiting:
            raise RefusedError("every slot of the engine is taken", next_step="try again")
        self._sessions[session] = added

    def allow(self, session: int, units: int) -> None:
        """Raises the units that the answer may hold in all, delivered ones included."""
        if session in self._sessions:
            self._sessions[session].allow(units)

    def step(self) -> list[SessionFrame]:
        """What servers have said since, as far as it is allowed; waits a moment for them."""
        for number, session in self._sessions.items():
            if session.may_ask:
                session.is_asked = True
                self._streams[number] = self._ask(session.request)
        self._listen()
        frames = [s.report() for s in self._sessions.values() if s.has_news]
        for number in [n for n, s in self._sessions.items() if s.finished]:
            self.cancel(number)
        return frames

    def cancel(self, session: int) -> None:
        """Frees the slot and hangs up; an unknown session is no error."""
        self._sessions.pop(session, None)
        self._hang_up(session)

    def _hang_up(self, session: int) -> None:
        stream = self._streams.pop(session, None)
        if stream is not None:
            stream.close()
            self._closing.append(stream)

    def _listen(self) -> None:
        """Hands round what came; waits for it only where there is nothing else to tell."""
        has_news = any(session.has_news for session in self._sessions.values())
        wait = bool(self._streams) and not has_news
        with contextlib.suppress(queue.Empty):  # that was all of it
            self._hand(self._heard.get(wait, WAIT_SECONDS))
            while True:
                self._hand(self._heard.get_nowait())

    def _hand(self, heard: Heard) -> None:
        """To its session, unless that is gone."""
        for number, stream in list(self._streams.items()):
            if stream is heard.stream:
                session = self._sessions[number]
                session.hear(heard.text, heard.end, heard.error)
                if session.has_enough:
                    self._hang_up(number)

    def _ask(self, request: GenerateRequest) -> ChatStream:
        body: dict[str, Any] = {
            "model": self._endpoint.model,
            "messages": [
                {"role": message.role, "content": message.content}
                for message in conversation(request)
            ],
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "stream": True,
        }
        if request.seed:  # some servers refuse what they do not know
            body["seed"] = request.seed
        return ChatStream(
            self._address, self._key, body, dial=self._dial, tls=self._tls, heard=self._heard
        )
