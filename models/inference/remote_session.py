"""One session of the openai engine: a text cut into pieces, handed out as it is allowed. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from aivillage.models.inference import remote
from aivillage.models.inference.generate import BYTES_PER_QUAD, GenerateRequest, prompt_bytes
from aivillage.models.inference.text_stream import TextStream
from aivillage.protocols.errors import RequestError
from aivillage.protocols.ports import SessionFrame

ANOTHER_ANSWER: Final = "its server answers otherwise than the one that was lost"


class RemoteSession:
    """`hear` what the server says, `allow` what may be handed out, `report` what was."""

    def __init__(self, number: int, request: GenerateRequest, delivered: Sequence[int]) -> None:
        """`delivered`: how the answer began, at a server that was lost.

        Raises:
            RequestError: no answer to `request` begins like that.
        """
        self.number = number
        self.request = request
        self.finished = ""
        self._stream = TextStream(remote.token_bytes, request.stop)
        self._pieces = remote.Pieces()
        self._pending: deque[int] = deque()
        """Not handed out yet: at most what may be sold, and what a line brought beyond it."""
        self.is_asked = False
        self._awaited = b"".join(map(remote.token_bytes, delivered))
        self._end = self._error = ""
        self._prompt_bytes = prompt_bytes(request)
        self._allowed_units = self._reported_bytes = self._count = 0
        self._new_ids: list[int] = []
        self._new_text = ""
        for token in delivered:
            self._take_delivered(token)
        if delivered:
            self._reported_bytes = self._prompt_bytes

    def _take_delivered(self, token: int) -> None:
        if self.finished or token == remote.END_TOKEN_ID:
            raise RequestError("the delivered tokens go on after the end of the answer")
        if not remote.is_full(token) or token >= remote.VOCABULARY:
            raise RequestError("a delivered token is no piece of a text")
        self._append(token)
        self._new_ids.clear()
        self._new_text = ""

    @property
    def may_ask(self) -> bool:
        """Whether the prompt and a token more are paid: the server bills its owner for them."""
        return not (self.is_asked or self.finished) and self._allowed_units > self._spent_units

    @property
    def has_enough(self) -> bool:
        """Whether nothing that the server may still say matters."""
        has_all = self._count + len(self._pending) >= self.request.max_tokens
        return bool(has_all or self.finished or self._end or self._error)

    @property
    def has_news(self) -> bool:
        """Whether a report would say anything."""
        is_read = self._readable_bytes > self._reported_bytes
        return bool(self._new_ids or self.finished) or is_read

    def allow(self, units: int) -> None:
        self._allowed_units = max(self._allowed_units, units)
        self._hand_out()

    def hear(self, text: str, end: str, error: str) -> None:
        """What the server said: text, or how it ended."""
        if self.has_enough:
            return
        self._pending.extend(self._pieces.push(self._new_part(remote.utf8(text))))
        if end:
            self._end = end
            self._pending.extend(self._pieces.flush())
            if self._awaited:
                error = ANOTHER_ANSWER
        self._error = self._error or error
        self._hand_out()

    def report(self) -> SessionFrame:
        """What is new since the last report."""
        self._reported_bytes = self._readable_bytes
        frame = SessionFrame(
            session=self.number,
            token_ids=tuple(self._new_ids),
            text=self._new_text,
            read_bytes=self._reported_bytes,
            finished=self.finished,
            error=self._error if self.finished == "error" else "",
        )
        self._new_ids, self._new_text = [], ""
        return frame

    def _new_part(self, said: bytes) -> bytes:
        """What `said` has beyond the text that was delivered before; that must come again."""
        seen = min(len(said), len(self._awaited))
        if said[:seen] != self._awaited[:seen]:
            self._error = ANOTHER_ANSWER
            return b""
        self._awaited = self._awaited[seen:]
        return said[seen:]

    def _hand_out(self) -> None:
        while not self.finished and self._pending and self._allowed_units > self._spent_units:
            self._append(self._pending.popleft())
        if self.finished or self._pending:
            return
        if self._error:
            self.finished = "error"
        elif self._end == "length" and self._count:
            self._finish("length")
        elif self._end == "length":
            self.finished, self._error = "error", "its server said nothing"
        elif self._end and self._allowed_units > self._spent_units:
            self._append(remote.END_TOKEN_ID)

    def _append(self, token: int) -> None:
        self._count += 1
        self._new_ids.append(token)
        self._new_text += self._stream.push(token)
        if token == remote.END_TOKEN_ID:
            self._finish("eos")
        elif self._stream.stopped:
            self._finish("stop")
        elif self._count == self.request.max_tokens:
            self._finish("length")

    def _finish(self, how: str) -> None:
        self.finished = how
        self._new_text += self._stream.flush()

    @property
    def _spent_units(self) -> int:
        return -(-self._prompt_bytes // BYTES_PER_QUAD) + self._count

    @property
    def _readable_bytes(self) -> int:
        most = min(self._prompt_bytes, BYTES_PER_QUAD * self._allowed_units)
        return max(self._reported_bytes, most)
