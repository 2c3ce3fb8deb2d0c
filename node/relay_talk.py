"""Questions and answers about circuits, on a stream that may become one."""

from __future__ import annotations

from typing import Final

import msgspec

from aivillage.protocols.codec import LENGTH_BYTES, pack
from aivillage.protocols.errors import AivillageError, PeerError, from_code
from aivillage.protocols.ports import Stream
from aivillage.protocols.relaying import (
    TALK_BYTES_MAX,
    Answer,
    Bill,
    Granted,
    Question,
    Refused,
    Talk,
)

_talk: Final[msgspec.msgpack.Decoder[Question | Answer | Bill]] = msgspec.msgpack.Decoder(
    Question | Answer | Bill
)


async def say(stream: Stream, talk: Talk) -> None:
    """Raises: PeerError: PEER_LOST."""
    payload = pack(talk)
    await stream.write(len(payload).to_bytes(LENGTH_BYTES, "big") + payload)


async def hear(stream: Stream) -> Question | Answer | Bill:
    """The next question, answer or bill, and not a byte of what follows it.

    Raises:
        PeerError: PEER_LOST, BAD_REQUEST or TOO_LARGE.
    """
    size_bytes = int.from_bytes(await _exactly(stream, LENGTH_BYTES), "big")
    if size_bytes > TALK_BYTES_MAX:
        raise PeerError(
            f"{size_bytes:,} bytes of talk with a relay, at most {TALK_BYTES_MAX:,} pass",
            code="TOO_LARGE",
        )
    try:
        return _talk.decode(await _exactly(stream, size_bytes))
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise PeerError(f"no talk with a relay: {error}", code="BAD_REQUEST") from None


async def ask(stream: Stream, question: Question) -> Granted:
    """How it was granted.

    Raises:
        AivillageError: the other side's refusal, typed by its code; PEER_LOST, BAD_REQUEST.
    """
    await say(stream, question)
    answer = await hear(stream)
    if isinstance(answer, Refused):
        raise from_code(answer.code, answer.message, answer.next_step)
    if not isinstance(answer, Granted):
        raise PeerError(f"{type(answer).__name__} is no answer", code="BAD_REQUEST")
    return answer


def refusal(error: AivillageError) -> Refused:
    return Refused(code=error.code, message=error.message[:200], next_step=error.next_step[:200])


async def _exactly(stream: Stream, size_bytes: int) -> bytes:
    found = bytearray()
    while len(found) < size_bytes:
        chunk = await stream.read(size_bytes - len(found))
        if not chunk:
            raise PeerError("the stream with a relay ended", code="PEER_LOST")
        found += chunk
    return bytes(found)
