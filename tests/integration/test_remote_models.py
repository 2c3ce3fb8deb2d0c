"""Remote models in fenced workers and real daemons: one way out, and nothing shown of the key."""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
import trio

from aivillage.models.inference import endpoint
from aivillage.models.inference.generate import GenerateRequest
from aivillage.models.library import remote_models, sources
from aivillage.models.library.store import Library
from aivillage.models.way_out import WayOut
from aivillage.node.way_out import Hatch, Place
from aivillage.node.worker_process import WorkerLimits
from aivillage.node.workers import WorkerSettings, open_workers
from aivillage.protocols.codec import pack
from aivillage.protocols.errors import ConfigError, JobError, RequestError
from tests.integration.chat_server import ChatServer, free_port
from tests.integration.daemons import Daemon, Yard, settled

pytestmark = pytest.mark.slow

NAME = "remote-fox"
KEY = "sk-a-very-secret-key-0123456789"
STORY = GenerateRequest(prompt="Tell me a story about a fox.", model=NAME, max_tokens=64)
PLENTY = 10**6


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer() as found:
        yield found


def add(folder: pathlib.Path, url: str) -> pathlib.Path:
    """The library with one remote model, whose key lies beside it."""
    key = folder / "key"
    key.touch(0o600)
    key.write_text(KEY)
    found = endpoint.new(url=url, model="fox-7b", key_file=str(key))
    library = Library(folder / "models")
    remote_models.add(library, NAME, found, price_micro_credits=50, context_tokens=4_096)
    return library.folder


def opened(folder: pathlib.Path):
    settings = WorkerSettings(limits=WorkerLimits(library=str(folder / "models")))
    return open_workers(settings, cache_folder=folder / "c", scratch_folder=folder / "s")


async def told(engine, request=STORY) -> str:
    with trio.fail_after(30):
        return await _told(engine, request)


async def _told(engine, request) -> str:
    async with engine.open_session(pack(request)) as session:
        session.allow(PLENTY)
        return "".join([frame.text async for frame in session])


async def test_a_fenced_worker_asks_its_server_and_nobody_else(tmp_path, server):
    add(tmp_path, server.url)
    server.seconds_between = 0.1  # several steps find nothing new
    async with opened(tmp_path) as workers:
        engine = await workers.engine(NAME)
        assert workers.fences is not None
        assert workers.fences.sandboxed
        assert await told(engine) == "".join(server.words)
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        assert threads_without_filter(engine.pid) == []


async def test_every_thread_of_a_worker_is_under_the_filter(tmp_path):
    async with opened(tmp_path) as workers:
        await workers.check("inference.generate", pack(STORY), pack(STORY))
        found = pids_of_workers()
        assert found
        assert [threads_without_filter(pid) for pid in found] == [[] for _ in found]


def pids_of_workers() -> list[int]:
    out = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "aivillage.models.worker"],
        capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    return [int(line) for line in out.split()]


def threads_without_filter(pid: int) -> list[str]:
    found = {
        path.parent.name: re.search(r"Seccomp:\s+(\d)", path.read_text())
        for path in pathlib.Path(f"/proc/{pid}/task").glob("*/status")
    }
    assert len(found) > 1, "a worker has a thread that reads beside the one that works"
    return [name for name, mode in found.items() if mode is None or mode[1] != "2"]


async def test_a_session_that_is_left_hangs_up_and_others_go_on(tmp_path, server):
    add(tmp_path, server.url)
    server.hang_after = 2
    async with opened(tmp_path) as workers:
        engine = await workers.engine(NAME)
        with trio.fail_after(20):
            async with engine.open_session(pack(STORY)) as session:
                session.allow(PLENTY)
                async for frame in session:
                    if frame.token_ids:
                        break
            assert await trio.to_thread.run_sync(server.hung_up.acquire, True, 10)
        server.hang_after = None
        assert await told(engine) == "".join(server.words)


async def test_a_lost_server_is_a_typed_failure_and_the_engine_lives(tmp_path, server):
    add(tmp_path, server.url)
    server.cut_after = 2
    async with opened(tmp_path) as workers:
        engine = await workers.engine(NAME)
        with pytest.raises(JobError, match="hung up"):
            await told(engine)
        server.cut_after = None
        assert await told(engine) == "".join(server.words)
        assert not engine.dead


async def test_nobody_at_the_url_is_a_typed_failure(tmp_path):
    add(tmp_path, f"http://127.0.0.1:{free_port()}/v1")
    async with opened(tmp_path) as workers:
        with pytest.raises(JobError, match="cannot be used"):
            await told(await workers.engine(NAME))


async def test_a_key_that_others_can_read_spoils_the_model_and_is_not_shown(tmp_path, server):
    add(tmp_path, server.url)
    (tmp_path / "key").chmod(0o644)
    async with opened(tmp_path) as workers:
        with pytest.raises(ConfigError, match="others can read") as caught:
            await workers.engine(NAME)
        assert KEY not in str(caught.value)
        assert not server.asked


# --------------------------------------------------------------------------- the hatch alone

FENCED = textwrap.dedent("""
    import errno, socket, sys
    from aivillage.models import sandbox
    from aivillage.models.way_out import WayOut
    assert not sandbox.deny_network(), sandbox.deny_network()
    for kind in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
        try:
            socket.socket(kind)
        except OSError as error:
            assert error.errno == errno.EPERM
        else:
            sys.exit("a socket of its own")
    found = WayOut(int(sys.argv[1])).dial()
    assert found.getpeername()[1] == int(sys.argv[2])
    found.settimeout(10)
    try:
        found.sendto(b"x", ("127.0.0.1", 9))
    except OSError as error:
        assert error.errno == errno.EPERM
    else:
        sys.exit("an address of its own")
    found.sendall(b"hello")
    print(found.recv(5).decode())
""")


async def test_what_is_handed_over_works_under_the_filter_and_goes_nowhere_else(nursery):
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]

    async def echo(stream):
        await stream.send_all(await stream.receive_some(5))

    nursery.start_soon(trio.serve_listeners, echo, listeners)
    hatch = Hatch(Place("127.0.0.1", port))
    nursery.start_soon(hatch.serve)
    descriptor = hatch.theirs.fileno()
    done = await trio.run_process(
        [sys.executable, "-c", FENCED, str(descriptor), str(port)],
        pass_fds=[descriptor], capture_stdout=True, capture_stderr=True, check=False,
    )  # fmt: skip
    hatch.theirs.close()
    assert (done.returncode, done.stdout) == (0, b"hello\n"), done.stderr.decode()


async def test_a_refused_connection_is_said_and_the_next_one_may_work(nursery):
    port = free_port()
    hatch = Hatch(Place("127.0.0.1", port))
    nursery.start_soon(hatch.serve)
    way_out = WayOut(hatch.theirs.detach())
    with pytest.raises(ConnectionRefusedError, match="no connection"):
        await trio.to_thread.run_sync(way_out.dial)
    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    found = await trio.to_thread.run_sync(way_out.dial)
    assert found.getpeername()[1] == port
    found.close()
    way_out._pair.close()
    await listeners[0].aclose()


async def test_a_daemon_that_is_gone_is_no_connection():
    ours, theirs = socket.socketpair()
    ours.close()
    way_out = WayOut(theirs.detach())
    with pytest.raises((BrokenPipeError, ConnectionRefusedError)):
        way_out.dial()
    way_out._pair.close()


# --------------------------------------------------------------------------- daemons


@pytest.fixture
def yard(tmp_path: pathlib.Path) -> Iterator[Yard]:
    with Yard(tmp_path) as made:
        yield made


def offered(yard: Yard, tmp_path: pathlib.Path, url: str) -> tuple[Daemon, Daemon]:
    """Ann sells the remote model, bob buys."""
    ann = yard.daemon("ann")
    assert ann.run("init").code == 0
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_text(KEY)
    done = ann.run(
        "models", "remote", NAME, f"--url={url}", "--model=fox-7b", f"--key-file={key}",
        "--price=70", "--context-tokens=4096", "--json",
    )  # fmt: skip
    assert done.code == 0, done
    assert KEY not in done.text
    ann.start()
    return ann, yard.daemon("bob").start("--join", ann.run("invite").out.strip())


@pytest.mark.timeout(200)
def test_a_remote_model_is_sold_over_the_mesh_and_counted_by_its_buyer(yard, tmp_path, server):
    ann, bob = offered(yard, tmp_path, server.url)
    done = bob.run(
        "submit", "inference.generate", STORY.prompt, f"--model={NAME}", "--max-tokens=64",
        "--mesh", "--json", seconds=90,
    )  # fmt: skip
    assert done.code == 0, done
    text = "".join(server.words)
    tokens = -(-len(text.encode()) // 3) + 1
    receipt = done.json["receipt"]
    assert done.json["result"]["text"] == text
    assert receipt["usage"] == {"prompt_quads": 7, "output_tokens": tokens}
    assert receipt["price_micro_credits"] == 70 * (7 + tokens)
    assert receipt["identical"] == "best effort"
    settled([ann, bob], 20)
    for daemon in (ann, bob):
        assert KEY not in daemon.log.read_text(errors="replace")
        assert KEY not in daemon.run("models", "info", NAME, "--json").text
    assert KEY not in ann.run("models", "list", "--json").text


def test_it_is_neither_pushed_nor_pulled_nor_called_otherwise(yard, server):
    ann = yard.daemon("ann")
    assert ann.run("init").code == 0
    words = [f"--url={server.url}", "--model=fox-7b"]
    refused = ann.run("models", "remote", "fox", *words)
    assert refused.code != 0
    assert "remote-fox" in refused.text
    assert ann.run("models", "remote", NAME, *words).code == 0
    assert "already" in ann.run("models", "remote", NAME, *words).text
    assert "nothing to push" in ann.run("models", "push", NAME).text
    assert ann.run("models", "verify").code == 0
    assert NAME not in ann.run("models", "recommend", "--json").text
    assert ann.run("models", "remove", NAME).code == 0


def test_a_strangers_endpoint_is_not_pulled(tmp_path, server):
    """It would have this node show its key to a server of the stranger's."""
    library = add(tmp_path, server.url)
    manifest = library / NAME / "manifest.json"
    cid = hashlib.sha256(manifest.read_bytes()).hexdigest()
    with pytest.raises(RequestError, match="answers elsewhere"):
        sources.parse(f"peer:{cid}", lambda _cid: manifest)
