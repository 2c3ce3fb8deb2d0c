"""A blob on a mesh of real daemons: paid, a source killed, the buyer killed, and books exact."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from aivillage.node.paths import paths
from aivillage.protocols import messages
from aivillage.protocols.errors import RequestError
from aivillage.protocols.manifest import CHUNK_BYTES
from tests.integration.daemons import Daemon, Yard, settled, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

CHUNKS = 40
RATE = 6 << 20
"""Bytes a second that each source may send: the fetch lasts long enough to be killed in."""
PRICE = 100


@pytest.fixture(scope="module")
def village(tmp_path_factory):
    with Yard(tmp_path_factory.mktemp("yard")) as yard:
        yield yard.village("ann", "bob", "cyd")


def added(daemon: Daemon, file: os.PathLike[str]) -> dict:
    done = daemon.run("blobs", "add", str(file), "--json")
    assert done.code == 0, done
    return done.json


def until(buyer: Daemon, cid: str, size_bytes: int) -> str:
    """Begins a fetch, or goes on with it in another job; its id once so much is there."""
    job = ""
    for frame in buyer.follow("mesh.fetch", cid=cid):
        if isinstance(frame, messages.Progress) and frame.note.startswith("job "):
            job = frame.note.removeprefix("job ")
        if isinstance(frame, messages.Progress) and frame.done >= size_bytes:
            break
    return job


def met(buyer: Daemon, *sources: Daemon) -> None:
    wanted = {source.peer for source in sources}
    wait_for(lambda: wanted <= buyer.sellers_known("mesh.fetch"), 40, "the offers came")


def sparse_bytes(path: Path) -> int:
    """What of a draft was written."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def test_the_command_pays_members_and_says_so_and_a_limit_holds(village, tmp_path):
    ann, bob, cyd = village
    (tmp_path / "model").write_bytes(os.urandom(5 * CHUNK_BYTES))
    there = added(ann, tmp_path / "model")
    assert added(bob, tmp_path / "model") == there
    met(cyd, ann, bob)
    with pytest.raises(RequestError, match="no work for a map"):
        cyd.ask("map_new", operation="mesh.fetch")
    before = ann.ask("balance")["net"]
    dear = cyd.run("blobs", "get", there["cid"], "--max-price", "0.000499", "--json")
    assert dear.code == 5
    assert "PRICE_ABOVE_CEILING" in dear.text
    words = ("--from", ann.peer[-8:], "--root", there["root"], "--max-price", "0.0005", "--json")
    done = cyd.run("blobs", "get", there["cid"], *words)
    assert done.code == 0, done
    assert done.json["receipt"]["sellers"] == [ann.peer]
    assert done.json["receipt"]["price_micro_credits"] == 5 * PRICE
    again = cyd.run("blobs", "get", there["cid"], "--json")
    assert "receipt" not in again.json, "it is here now"
    settled(village, 30)
    assert ann.ask("balance")["net"] == before + 5 * PRICE


def test_a_fetch_survives_a_killed_source_and_a_killed_buyer_and_the_books_agree(village, tmp_path):
    ann, bob, cyd = village
    body = os.urandom(CHUNKS * CHUNK_BYTES - 5)
    cid = hashlib.sha256(body).hexdigest()
    (tmp_path / "model").write_bytes(body)
    for source in (ann, bob):
        assert added(source, tmp_path / "model")["cid"] == cid
        source.ask("limits_set", words={"sent_bytes_per_second_max": str(RATE)})
    met(cyd, ann, bob)

    before = cyd.ask("balance")["net"]
    job = until(cyd, cid, 6 * CHUNK_BYTES)
    bob.kill()
    until_more = cyd.ask("job", job=job)
    assert {attempt["seller"] for attempt in until_more["attempts"]} == {ann.peer, bob.peer}
    draft = paths(str(cyd.data_dir)).blobs / f".fetch-{cid}"
    wait_for(lambda: sparse_bytes(draft) >= 14 * CHUNK_BYTES, 60, "more came from ann")
    cyd.kill()
    there = sparse_bytes(draft)
    cyd.restart()
    bob.restart()

    found = cyd.job_ended(job, 90)
    assert found["state"] == "done", found
    got = cyd.run("blobs", "get", cid, "--output", str(tmp_path / "copy"))
    assert got.code == 0, got
    assert (tmp_path / "copy").read_bytes() == body
    settled(village, 60)
    for daemon in village:
        assert daemon.run("audit").code == 0
    assert cyd.run("explain", job).code == 0

    paid = before - cyd.ask("balance")["net"]
    came_again = paid // PRICE - CHUNKS
    print(f"{there >> 20} MiB were there when the buyer was killed; {came_again} chunks paid twice")
    assert paid % PRICE == 0
    assert CHUNKS * PRICE <= paid <= (CHUNKS + 6) * PRICE, "what was there was not bought again"
