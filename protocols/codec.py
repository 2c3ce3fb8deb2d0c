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
VALUES_MAX: Final = 1 << 17
"""Numbers, texts, keys and containers in one map: more than a megabyte of floats holds. Each costs
0.2 us to look at, so a hostile megabyte of tiny values may not hold the loop for a third of a
second. Hot frames (`Step`) are arrays and do not count."""
SMALL_BYTES: Final = 1024
"""Up to here it is quicker to count the bytes that may nest than to go from value to value."""
LENGTH_BYTES: Final = 4
FLAT: Final = (
    Step, messages.Call, messages.Accepted, messages.Started, messages.Progress, messages.Part,
    messages.Finished, messages.Ping, messages.Pong, messages.Ledger, messages.Submit,
)  # fmt: skip
"""Hot frames: their types nest a few deep, and a value takes a byte at least. So what we write of
them is not looked at again; what we read is."""

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
        RequestError: TOO_LARGE or BAD_REQUEST, the other side would refuse the frame.
    """
    payload = pack(frame)
    if len(payload) > FRAME_BYTES_MAX:
        raise RequestError(
            f"the message has {len(payload):,} bytes, at most {FRAME_BYTES_MAX:,} travel",
            code="TOO_LARGE",
            next_step="make the request smaller, or split it",
        )
    is_flat = isinstance(frame, FLAT) and len(payload) <= VALUES_MAX
    if not is_flat and (fault := shape_fault(payload)):
        raise RequestError(f"a message {fault}", next_step="make the request simpler, or split it")
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
    if not is_array and (fault := shape_fault(payload)):
        raise PeerError(f"a frame {fault}", code="BAD_REQUEST")
    try:
        if is_array:
            return _decode_step.decode(payload)
        return _decode_map.decode(payload)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise PeerError(f"not a message: {error}", code="BAD_REQUEST") from None


def pack(value: msgspec.Struct) -> bytes:
    """A request, result or signed body as bytes.

    Raises:
        RequestError: BAD_REQUEST, a text is no Unicode or a number leaves 64 bits.
    """
    try:
        return _encoder.encode(value)
    except (UnicodeEncodeError, OverflowError, RecursionError) as error:
        raise RequestError(f"this {type(value).__name__} cannot travel: {error}") from None


def unpack(kind: type[T], data: bytes) -> T:
    """The typed value inside `data`.

    Raises:
        RequestError: BAD_REQUEST, with the path of the first wrong field.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise RequestError(f"not a {kind.__name__}: {error}") from None


# Header byte -> bytes of a whole value whose size the header alone tells; 0: `_token` must look.
_LEAF_BYTES: Final = tuple(
    1 + (head & 0x1F) if 0xA0 <= head <= 0xBF
    else 0 if 0x80 <= head <= 0x9F or 0xC4 <= head <= 0xC9 or 0xD9 <= head <= 0xDF
    else {0xCA: 5, 0xCB: 9, 0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9,
          0xD4: 3, 0xD5: 4, 0xD6: 6, 0xD7: 10, 0xD8: 18}.get(head, 1)
    for head in range(256)
)  # fmt: skip
_NO_PARENT: Final = bytes(
    head for head in range(256) if not (0x80 <= head <= 0x9F or 0xDC <= head <= 0xDF)
)
"""What cannot be the head of a container with values in it."""
# Header byte -> (bytes of the length that follows, bytes after it on top of the length).
_SIZED: Final = {0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0), 0xC7: (1, 1), 0xC8: (2, 1),
                 0xC9: (4, 1), 0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0)}  # fmt: skip
# Header byte -> (bytes of the count that follows, values per count).
_CONTAINER: Final = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}


def shape_fault(data: bytes | bytearray | memoryview) -> str:
    """Why the msgpack value in `data` is refused for its shape, or "": it builds nothing.

    Truncated data is not this function's business: the decoder refuses it.
    """
    if len(data) <= SMALL_BYTES and len(bytes(data).translate(None, _NO_PARENT)) <= DEPTH_MAX:
        return ""  # fewer bytes that may begin a container than may be open
    expected: list[int] = []  # values still to come in each open container
    at, values, end = 0, 0, len(data)
    while at < end:
        values += 1
        if values > VALUES_MAX:
            return f"of more than {VALUES_MAX:,} values"
        children = 0
        if leaf_bytes := _LEAF_BYTES[data[at]]:
            at += leaf_bytes
        else:
            at, children = _token(data, at)
        if children:
            expected.append(children)
            if len(expected) > DEPTH_MAX:
                return f"nested deeper than {DEPTH_MAX}"
            continue
        while expected:
            expected[-1] -= 1
            if expected[-1]:
                break
            expected.pop()
    return ""


def _token(data: bytes | bytearray | memoryview, at: int) -> tuple[int, int]:
    """(where the next token starts, how many values the one at `at` contains)."""
    head = data[at]
    at += 1
    if head <= 0x8F:
        return at, 2 * (head & 0x0F)
    if head <= 0x9F:
        return at, head & 0x0F
    if head in _SIZED:
        width, extra = _SIZED[head]
        return at + width + extra + int.from_bytes(data[at : at + width], "big"), 0
    width, factor = _CONTAINER[head]
    return at + width, factor * int.from_bytes(data[at : at + width], "big")
