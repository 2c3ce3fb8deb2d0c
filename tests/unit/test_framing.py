"""Frames off a stream that splits and joins them as it likes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from aivillage.node.framing import FrameReader, RateLimit
from aivillage.protocols.errors import PeerError

LIMIT = 1000


class Pieces:
    """A stream that gives its pieces one by one."""

    peer = "nobody"

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)

    async def read(self, size_bytes_max: int) -> bytes:
        return self.pieces.pop(0) if self.pieces else b""


def framed(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


async def all_frames(*pieces: bytes) -> list[bytes]:
    reader, frames = FrameReader(Pieces(*pieces), LIMIT), []
    while await reader.fill():
        frames += reader.ready
        reader.ready.clear()
    return frames


@given(st.lists(st.binary(max_size=50), max_size=10), st.data())
def test_frames_survive_any_way_of_cutting_the_stream(payloads, data):
    stream = b"".join(map(framed, payloads))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(stream) - 1)), max_size=8)))
    edges = [0, *cuts, len(stream)]
    pieces = [stream[a:b] for a, b in pairwise(edges) if a < b]
    assert trio.run(all_frames, *pieces) == payloads


async def test_a_frame_at_the_limit_passes_and_one_byte_more_is_refused_unread():
    assert await all_frames(framed(bytes(LIMIT))) == [bytes(LIMIT)]
    with pytest.raises(PeerError) as caught:
        await all_frames((LIMIT + 1).to_bytes(4, "big"))
    assert caught.value.code == "TOO_LARGE"


@pytest.mark.parametrize("cut", [1, 3, 4, 9])
async def test_an_end_inside_a_frame_is_peer_lost(cut):
    with pytest.raises(PeerError, match="inside a frame") as caught:
        await all_frames(framed(b"123456")[:cut])
    assert caught.value.code == "PEER_LOST"


async def test_next_waits_for_a_whole_frame_and_reports_the_end():
    reader = FrameReader(Pieces(framed(b"one") + framed(b"two")[:5], b"wo"), LIMIT)
    assert [await reader.next(), await reader.next()] == [b"one", b"two"]
    with pytest.raises(PeerError, match="ended"):
        await reader.next()


async def test_the_rate_limit_lets_a_second_pass_and_then_paces(autojump_clock):
    limit = RateLimit(100)
    began = trio.current_time()
    await limit.spend(100)
    assert trio.current_time() == began
    for _ in range(10):
        await limit.spend(50)
    assert trio.current_time() - began == pytest.approx(5)
