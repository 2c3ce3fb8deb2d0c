"""Bytes <-> message. Limits on size and depth; everything that does not fit is a typed refusal."""

from __future__ import annotations

import functools
import operator
from typing import Final, TypeVar

import msgspec

from aivillage.protocols import messages
from aivillage.protocols.errors import PeerError, RequestError
from aivillage.protocols.messages import Frame, Message, Step

FRAME_BYTES_MAX: Final = 1 << 20
"""A frame is small talk; bulk travels as blobs."""
DEPTH_MAX: Final = 16
"""Deeper nesting buys nothing and costs stack."""
LENGTH_BYTES: Final = 4

T = TypeVar("T")

_ALL: Final = tuple(
    dict.fromkeys(
        kind
        for kind in (*messages.PEER_MESSAGES, *messages.CONTROL_MESSAGES)
        if issubclass(kind, Message)
    )
)
_decode_map: Final[msgspec.msgpack.Decoder[Message]] = msgspec.msgpack.Decoder(
    functools.reduce(operator.or_, _ALL)
)
_decode_step: Final = msgspec.msgpack.Decoder(Step)
_encoder: Final = msgspec.msgpack.Encoder()


def encode(frame: Frame) -> bytes:
    """The payload of one frame, without its length.

    Raises:
        RequestError: TOO_LARGE, the frame is over `FRAME_BYTES_MAX`.
    """
    payload = _encoder.encode(frame)
    if len(payload) > FRAME_BYTES_MAX:
        raise RequestError(
            f"the message has {len(payload):,} bytes, at most {FRAME_BYTES_MAX:,} travel",
            code="TOO_LARGE",
            next_step="make the request smaller, or split it",
        )
    return payload


def frame(message: Frame) -> bytes:
    """One frame as it travels: u32 big-endian length, then the payload."""
    payload = encode(message)
    return len(payload).to_bytes(LENGTH_BYTES, "big") + payload


def decode(payload: bytes | bytearray | memoryview) -> Frame:
    """One frame's message.

    Raises:
        PeerError: BAD_REQUEST or TOO_LARGE; the bytes are no message of ours.
    """
    if len(payload) > FRAME_BYTES_MAX:
        raise PeerError(f"a frame of {len(payload):,} bytes", code="TOO_LARGE")
    if not payload:
        raise PeerError("an empty frame", code="BAD_REQUEST")
    is_array = 0x90 <= payload[0] <= 0x9F or payload[0] in (0xDC, 0xDD)
    # A Step's types bound its depth, and it is the hot frame; maps may carry free-form fields.
    if not is_array and depth_exceeds(payload, DEPTH_MAX):
        raise PeerError(f"a frame nested deeper than {DEPTH_MAX}", code="BAD_REQUEST")
    try:
        if is_array:
            return _decode_step.decode(payload)
        return _decode_map.decode(payload)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise PeerError(f"not a message: {error}", code="BAD_REQUEST") from None


def pack(value: msgspec.Struct) -> bytes:
    """A request, result or signed body as bytes."""
    return _encoder.encode(value)


def unpack(kind: type[T], data: bytes) -> T:
    """The typed value inside `data`.

    Raises:
        RequestError: BAD_REQUEST, with the path of the first wrong field.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise RequestError(f"not a {kind.__name__}: {error}") from None


# Header byte -> (bytes to skip after it, whether it opens a container).
_FIXED_SKIP: Final = {
    0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8,
    0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17,
}  # fmt: skip
_SIZED: Final = {0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0), 0xC7: (1, 1), 0xC8: (2, 1),
                 0xC9: (4, 1), 0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0)}  # fmt: skip
_CONTAINER: Final = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}


def depth_exceeds(data: bytes | bytearray | memoryview, limit: int) -> bool:
    """Whether the msgpack value in `data` nests deeper than `limit`, without building it.

    Truncated data is not this function's business: the decoder refuses it.
    """
    open_counts: list[int] = []
    at, end = 0, len(data)
    while at < end:
        at, children = _token(data, at)
        if children:
            open_counts.append(children)
            if len(open_counts) > limit:
                return True
            continue
        while open_counts:
            open_counts[-1] -= 1
            if open_counts[-1]:
                break
            open_counts.pop()
    return False


def _token(data: bytes | bytearray | memoryview, at: int) -> tuple[int, int]:
    """(where the next token starts, how many values the one at `at` contains)."""
    head = data[at]
    at += 1
    if 0x80 <= head <= 0x8F:
        return at, 2 * (head & 0x0F)
    if 0x90 <= head <= 0x9F:
        return at, head & 0x0F
    if 0xA0 <= head <= 0xBF:
        return at + (head & 0x1F), 0
    if head in _FIXED_SKIP:
        return at + _FIXED_SKIP[head], 0
    if head in _SIZED:
        width, extra = _SIZED[head]
        return at + width + extra + int.from_bytes(data[at : at + width], "big"), 0
    if head in _CONTAINER:
        width, factor = _CONTAINER[head]
        return at + width, factor * int.from_bytes(data[at : at + width], "big")
    return at, 0
