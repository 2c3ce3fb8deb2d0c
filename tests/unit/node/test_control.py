"""The control socket: nothing that a peer, a job or a client says may fell the daemon."""

from __future__ import annotations

import secrets
import time
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio

from aivillage.models.mesh.noop import NoopRequest, NoopResult
from aivillage.node.control import UNSENT_BYTES_MAX, Control, _SocketStream
from aivillage.node.desk import HISTORY_LISTED_MAX
from aivillage.node.events import Events
from aivillage.node.framing import FrameReader
from aivillage.node.jobs import JobRow
from aivillage.protocols import codec
from aivillage.protocols.messages import Answer, Ask, Failure, Hello, Part, Progress, Submit
from tests.conftest import make_hello
from tests.simulation.mesh import open_mesh


def deep(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


class Client:
    def __init__(self, stream):
        self.wire = _SocketStream(stream)
        self.reader = FrameReader(self.wire, 1 << 30)

    async def say(self, frame):
        await self.wire.write(codec.frame(frame))

    async def hear(self):
        with trio.fail_after(5):
            return codec.decode(await self.reader.next())

    async def ask(self, what, **args):
        await self.say(Ask(id=1, what=what, args=args))
        return await self.hear()


@asynccontextmanager
async def talking(control):
    async with trio.open_nursery() as nursery:
        ours, theirs = trio.socket.socketpair()
        nursery.start_soon(control.serve, trio.SocketStream(theirs))
        client = Client(trio.SocketStream(ours))
        assert isinstance(await client.hear(), Hello)
        yield client
        await client.wire.close()


def control(buyer=None, **handlers):
    return Control(handlers, buyer, make_hello, Events())


@asynccontextmanager
async def owner_of(node):
    stream = await trio.open_unix_socket(str(node.paths.socket))
    client = Client(stream)
    await client.hear()
    yield client
    await stream.aclose()


def done_job(result, operation="mesh.noop"):
    return JobRow(
        id=secrets.token_hex(16),
        operation=operation,
        request=codec.pack(NoopRequest(note="x")),
        state="new",
        ceiling=100,
        deadline=None,
        peer="",
        created=time.time(),
    ), msgspec.msgpack.encode(result)


@pytest.mark.parametrize(
    ("value", "code"),
    [(deep(20), "BAD_REQUEST"), ("x" * (1 << 20), "TOO_LARGE"), ([0] * 140_000, "BAD_REQUEST")],
    ids=["deep", "large", "many"],
)
async def test_an_answer_that_cannot_travel_is_a_typed_failure_and_the_next_one_comes(value, code):
    async def odd(_args):
        return value

    async def fine(_args):
        return "fine"

    async with talking(control(odd=odd, fine=fine)) as client:
        failure = await client.ask("odd")
        assert isinstance(failure, Failure)
        assert (failure.id, failure.code) == (1, code)
        assert (await client.ask("fine")).value == "fine"


async def test_an_error_that_a_peer_wrote_is_cut_and_made_unicode():
    async def odd(_args):
        raise ValueError("\ud800" + "x" * (2 << 20))

    async with talking(control(odd=odd)) as client:
        failure = await client.ask("odd")
        assert failure.code == "BAD_REQUEST"
        assert len(failure.message) < 5000


class ShowingBuyer:
    """Shows a job's way in frames that no socket takes."""

    def __init__(self, *frames, error=None):
        self.frames = frames
        self.error = error or codec.RequestError("that was all")
        self.nursery = None

    def start_soon(self, work, *args):
        self.nursery.start_soon(work, *args)

    async def pursue(self, _submit, say, _recorded, _begun):
        for frame in self.frames:
            say(frame)
        raise self.error


@asynccontextmanager
async def showing(buyer):
    """A client of that buyer, whose jobs outlast it."""
    async with trio.open_nursery() as buyer.nursery, talking(control(buyer)) as client:
        yield client


async def test_progress_of_a_mebibyte_is_not_shown_and_fells_nobody():
    """It came in a frame that just fits; with an id of ours it does not."""
    note = "x" * ((1 << 20) - 40)
    buyer = ShowingBuyer(
        Progress(id=0, done=0.5, total=0.75, note=note), Part(id=0, seq=0, body=b"x" * (1 << 20))
    )
    async with showing(buyer) as client:
        await client.say(Submit(id=2**40, operation="mesh.noop", request=b""))
        failure = await client.hear()
        assert (failure.id, failure.message) == (2**40, "that was all")


async def test_a_client_that_reads_nothing_is_cut_off_by_bytes_too():
    frame = Progress(id=0, done=0, note="x" * (1 << 19))
    buyer = ShowingBuyer(*[frame] * (UNSENT_BYTES_MAX // (1 << 19) + 2))
    async with showing(buyer) as client:
        await client.say(Submit(id=1, operation="mesh.noop", request=b""))
        with pytest.raises(codec.PeerError):
            while True:
                await client.hear()


async def test_a_defect_in_one_submission_is_said_and_fells_neither_client_nor_jobs():
    async with showing(ShowingBuyer(error=ZeroDivisionError("a defect"))) as client:
        for call in (1, 2):
            await client.say(Submit(id=call, operation="mesh.noop", request=b""))
            failure = await client.hear()
            assert (failure.id, failure.code) == (call, "INTERNAL")
            assert "a defect" in failure.message


async def test_a_defect_in_one_connection_is_an_event_and_not_the_end():
    served = control()
    served._hello = lambda: 1 / 0
    ours, theirs = trio.socket.socketpair()
    with ours:
        await served.serve(trio.SocketStream(theirs))
    assert served._events.counts["client_crashed"] == 1


async def test_a_stored_result_of_any_shape_is_shown_or_said_to_be_none(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        node = await mesh.add("node")
        good = msgspec.to_builtins(NoopResult(note="hi"))
        stored = {
            "extra": good | {"since_9_9": deep(20)},
            "good": good,
            "wrong": [1],
        }
        foreign = {"deep": deep(20), "cut": None}
        jobs = {}
        for name, result in (stored | foreign).items():
            operation = "other.thing" if name in foreign else "mesh.noop"
            row, body = done_job(result, operation)
            await node.desk.jobs.add(row)
            await node.desk.jobs.end(row.id, "done", result=b"\x92" if name == "cut" else body)
            jobs[name] = row.id
        async with owner_of(node) as owner:
            shown = {name: (await owner.ask("job", job=job)).value for name, job in jobs.items()}
            for name in ("extra", "good"):
                assert shown[name]["result"] == good, name
                assert "result_fault" not in shown[name]
            for name in ("wrong", "deep", "cut"):
                assert shown[name]["result"] is None, name
                assert shown[name]["result_fault"], name
            assert isinstance(await owner.ask("status"), Answer)


async def test_more_history_than_an_answer_holds_is_refused_with_the_number(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        node = await mesh.add("node")
        async with owner_of(node) as owner:
            for wrong in (HISTORY_LISTED_MAX + 1, 20_000, 0, -1):
                failure = await owner.ask("history", limit=wrong)
                assert failure.code == "BAD_REQUEST", wrong
                assert f"{HISTORY_LISTED_MAX:,}" in failure.message
            assert isinstance(await owner.ask("history", limit=HISTORY_LISTED_MAX), Answer)
