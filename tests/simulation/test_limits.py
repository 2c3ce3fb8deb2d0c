"""The owner's limits where the work runs: a buyer may ignore the offer, the seller does not."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from datetime import datetime

import pytest
import trio

from aivillage.models.inference.generate import GenerateRequest
from aivillage.models.mesh.noop import NoopRequest
from aivillage.node import facts
from aivillage.node.pricelist import quote_hash
from aivillage.protocols.codec import pack
from aivillage.protocols.errors import AivillageError
from aivillage.protocols.messages import Accepted, Call, Failure, Progress
from tests.simulation.mesh import PRICE, open_mesh, price_of, result_of, settled, until
from tests.simulation.test_market import PROMPT, expected, pair
from tests.simulation.test_people import ask, quote_from, refused

NOOP = pack(NoopRequest(note="x"))
GENERATE = pack(GenerateRequest(prompt=PROMPT, max_tokens=4))


def gate_of(node):
    return node.desk.seller.door._gate


@asynccontextmanager
async def three(folder, **settings):
    """A buyer that knows two sellers."""
    async with open_mesh(folder) as mesh:
        buyer = await mesh.add("buyer", serve=False)
        sellers = [await mesh.add(name, **settings) for name in ("first", "second")]
        await mesh.knows(buyer, *sellers)
        yield mesh, buyer, *sellers


async def call_with(buyer, seller, quote, operation="mesh.noop", request=NOOP, **more):
    """The first word on a call with a quote from before, whatever was offered since."""
    link = buyer.desk.links.get(seller.peer)
    call = Call(
        id=link.next_id(), attempt=bytes(8) + time.time_ns().to_bytes(8, "big"),
        operation=operation, request=request, quote_hash=quote_hash(quote.quote),
        ceiling_micro_credits=10_000, deadline_seconds=5.0, **more,
    )  # fmt: skip
    inbox = link.open_inbox(call.id)
    link.send(call)
    with trio.fail_after(5):
        return await inbox.receive()


async def refused_quote(buyer, seller, **more):
    with pytest.raises(AivillageError) as caught:
        await quote_from(buyer, seller, **more)
    assert caught.value.next_step
    return caught.value


# ------------------------------------------------------------------ pause


async def test_a_paused_seller_refuses_the_call_of_a_buyer_that_ignores_its_offer(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        quote = await quote_from(buyer, seller, request=NOOP)
        said = await ask(seller, "pause")
        assert (said["paused"], said["until_unix"], said["ended"]) == (True, None, 0)
        answer = await call_with(buyer, seller, quote)
        assert isinstance(answer, Failure)
        assert (answer.code, "paused" in answer.message) == ("OWNER_LIMIT", True)
        assert answer.next_step
        assert (await refused_quote(buyer, seller, request=NOOP)).code == "OWNER_LIMIT"
        status = await ask(seller, "status")
        assert "paused" in status["state"]
        assert status["serves"] == []
        await until(lambda: not buyer.desk.discovery.candidates("mesh.noop"))
        said = await ask(seller, "resume")
        assert (said["was_paused"], said["refusal"]) == (True, None)
        assert isinstance(await call_with(buyer, seller, quote), Accepted)
        await until(lambda: buyer.desk.discovery.candidates("mesh.noop"))
        assert (await ask(seller, "status"))["state"] == "ready"


async def test_what_runs_when_the_owner_pauses_ends_and_goes_on_elsewhere_paid_exactly(tmp_path):
    async with three(tmp_path) as (_, buyer, first, second):
        first.script.pause_at = second.script.pause_at = 3
        running = await buyer.submit(PROMPT, tokens=12)
        await until(lambda: first.script.paused.is_set() or second.script.paused.is_set())
        shut, other = (first, second) if first.script.paused.is_set() else (second, first)
        await until(lambda: len(running.pursuit.output.ids) == 3)
        other.script.pause_at = None
        assert (await ask(shut, "pause"))["ended"] == 1
        with trio.fail_after(10):
            await running.ended.wait()
        assert result_of(running) == expected(PROMPT, 12)
        assert running.pursuit.receipt().sellers == (shut.peer, other.peer)
        assert not shut.desk.seller.running()
        (ended,) = shut.events("sale_ended")
        assert (ended["outcome"], ended["micro_credits"]) == ("OWNER_LIMIT", price_of(PROMPT, 3))
        await settled(buyer, shut, price_of(PROMPT, 3))
        await settled(buyer, other, 9 * PRICE)
        assert buyer.desk.discovery.record_of(shut.peer).bad == 0


async def test_a_pause_outlasts_a_restart_and_its_end_comes_by_itself(tmp_path):
    async with pair(tmp_path) as (mesh, buyer, seller):
        await ask(seller, "pause", seconds=3600)
        await seller.stop()
        await mesh.start(seller)
        await mesh.link(buyer, seller)
        assert "paused" in (await ask(seller, "status"))["state"]
        assert (await refused_quote(buyer, seller, request=NOOP)).code == "OWNER_LIMIT"
        ends = gate_of(seller).pause.until_unix
        gate_of(seller).now = lambda: datetime.fromtimestamp(ends - 0.001).astimezone()
        assert (await ask(seller, "status"))["state"] != "ready"
        gate_of(seller).now = lambda: datetime.fromtimestamp(ends).astimezone()
        assert (await ask(seller, "status"))["state"] == "ready"
        assert await quote_from(buyer, seller, request=NOOP)
        assert (await ask(seller, "limits"))["paused"] is None


async def test_a_paused_nodes_own_jobs_go_on(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        mine = await mesh.add("mine")
        other = await mesh.add("other")
        await mesh.knows(mine, other)
        await ask(mine, "pause")
        assert result_of(await mine.ask(PROMPT, tokens=2)) == expected(PROMPT, 2)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), 366 * 86_400 + 1])
async def test_a_pause_of_no_sensible_length_is_refused(tmp_path, seconds):
    async with pair(tmp_path, serve=False) as (_, _buyer, seller):
        assert await refused(seller, "pause", seconds=seconds) == "BAD_REQUEST"
        assert gate_of(seller).pause is None


# ------------------------------------------------------------------ hours and operations


async def test_quiet_hours_refuse_a_call_and_end_what_runs_when_they_begin(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        clock = ["2026-11-27T21:59:59"]
        gate_of(seller).now = lambda: datetime.fromisoformat(clock[0]).astimezone()
        found = await ask(seller, "limits_set", words={"quiet_hours": "22:00-07:00"})
        assert (found["refusal"], found["limits"]["quiet_hours"]) == (None, ["22:00-07:00"])
        seller.script.pause_at = 3
        running = await buyer.submit(PROMPT, tokens=12, peer=seller.peer)
        await until(lambda: len(running.pursuit.output.ids) == 3)
        quote = await quote_from(buyer, seller, request=NOOP)
        clock[0] = "2026-11-27T22:00:00"
        answer = await call_with(buyer, seller, quote)
        assert (answer.code, "07:00" in answer.message) == ("OWNER_LIMIT", True)
        with trio.fail_after(10):
            await running.ended.wait()
        assert (running.error.code, "quiet" in running.error.message) == ("OWNER_LIMIT", True)
        await settled(buyer, seller, price_of(PROMPT, 3))
        await ask(seller, "limits_set", words={"day_micro_credits": "0"})
        found = await ask(seller, "limits")
        assert "07:00" in found["refusal"]["message"]
        assert all(w in why for w, why in zip(("07:00", "a day"), found["reasons"], strict=True))
        await ask(seller, "limits_set", words={"day_micro_credits": ""})
        clock[0] = "2026-11-28T07:00:00"
        assert (await ask(seller, "limits"))["refusal"] is None
        assert await quote_from(buyer, seller, request=NOOP)


async def test_a_denied_operation_is_neither_offered_nor_quoted_nor_called(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        quote = await quote_from(buyer, seller, request=NOOP)
        await ask(seller, "limits_set", words={"operations_denied": "mesh.noop"})
        assert (await call_with(buyer, seller, quote)).code == "OWNER_LIMIT"
        assert (await refused_quote(buyer, seller, request=NOOP)).code == "OWNER_LIMIT"
        serves = ["inference.generate", "inference.embed", "inference.rerank", "mesh.fetch"]
        assert (await ask(seller, "status"))["serves"] == serves
        await until(lambda: not buyer.desk.discovery.candidates("mesh.noop"))
        assert result_of(await buyer.ask(PROMPT, tokens=2)) == expected(PROMPT, 2)
        assert await refused(seller, "limits_set", words={"operations_denied": "no"}) == (
            "BAD_REQUEST"
        )


# ------------------------------------------------------------------ what a day holds


async def test_a_peer_gets_its_days_worth_exactly_and_then_no_more(tmp_path):
    async with pair(tmp_path) as (mesh, buyer, seller):
        most = price_of(PROMPT, 4) + price_of(PROMPT, 2)
        await ask(seller, "limits_set", words={"peer_day_micro_credits": str(most)})
        assert result_of(await buyer.ask(PROMPT, tokens=4)) == expected(PROMPT, 4)
        running = await buyer.ask(PROMPT, tokens=3)  # one token more than is left
        assert running.error.code == "OWNER_LIMIT"
        await settled(buyer, seller, most)
        assert gate_of(seller).day.peers == {buyer.peer: most}
        assert (await refused_quote(buyer, seller, request=NOOP)).code == "OWNER_LIMIT"
        await trio.sleep(1.1)  # counted on the disk within a second
        await seller.stop()
        await mesh.start(seller)
        await mesh.link(buyer, seller)
        assert (await refused_quote(buyer, seller, request=NOOP)).code == "OWNER_LIMIT"
        await ask(seller, "limits_set", words={"peer_day_micro_credits": str(most + 10)})
        assert await quote_from(buyer, seller, request=NOOP)


async def test_a_days_worth_for_all_closes_the_node_after_the_last_job_had_its_end(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        most = price_of(PROMPT, 4)
        await ask(seller, "limits_set", words={"day_micro_credits": str(most)})
        quote = await quote_from(buyer, seller, request=NOOP)
        assert result_of(await buyer.ask(PROMPT, tokens=4)) == expected(PROMPT, 4)
        await settled(buyer, seller, most)
        assert (await call_with(buyer, seller, quote)).code == "OWNER_LIMIT"
        assert "a day" in (await ask(seller, "status"))["state"]
        await until(lambda: not buyer.desk.discovery.candidates("mesh.noop"))
        tomorrow = datetime.fromtimestamp(time.time() + 86_400).astimezone()
        gate_of(seller).now = lambda: tomorrow
        assert isinstance(await call_with(buyer, seller, quote), Accepted)


async def test_work_for_nothing_counts_with_what_it_is_worth(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        most = price_of(PROMPT, 2)
        await ask(seller, "share", peers=[buyer.peer])
        await ask(seller, "limits_set", words={"peer_day_micro_credits": str(most)})
        assert result_of(await buyer.ask(PROMPT, tokens=2)) == expected(PROMPT, 2)
        assert gate_of(seller).day.peers == {buyer.peer: most}
        assert (await buyer.ask(PROMPT, tokens=2)).error.code == "OWNER_LIMIT"


async def test_a_module_that_would_be_above_the_day_is_not_even_run(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        two = pack(NoopRequest(note="x", parts=2))
        quote = await quote_from(buyer, seller, request=two)
        await ask(seller, "limits_set", words={"peer_day_micro_credits": "29"})
        assert isinstance(await call_with(buyer, seller, quote, request=two), Accepted)
        await until(lambda: seller.events("sale_ended"))
        assert seller.events("sale_ended")[0]["outcome"] == "OWNER_LIMIT"
        assert gate_of(seller).day.total == 0
        assert (await refused_quote(buyer, seller, request=two)).code == "OWNER_LIMIT"
        await ask(seller, "limits_set", words={"peer_day_micro_credits": "30"})
        running = await buyer.ask(operation="mesh.noop", request=two)
        assert running.error is None
        assert gate_of(seller).day.total == 30


# ------------------------------------------------------------------ rate, prices, slots


async def test_answers_leave_no_faster_than_the_owner_says(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        await ask(seller, "limits_set", words={"sent_bytes_per_second_max": "400"})
        said, began = [], trio.current_time()
        running = await buyer.ask(PROMPT, tokens=30, say=said.append)
        took = trio.current_time() - began
        assert result_of(running) == expected(PROMPT, 30)
        size = len(result_of(running).text.encode()) + 4 * 30
        assert took >= size / 400
        await settled(buyer, seller, price_of(PROMPT, 30))
        await ask(seller, "limits_set", words={"sent_bytes_per_second_max": "2"})
        running = await buyer.submit(PROMPT, tokens=30, say=said.append)
        with trio.fail_after(10):  # a sign of life, so that nobody takes it for lost
            while not any("limits what leaves" in f.note for f in said if isinstance(f, Progress)):
                await trio.sleep(0.05)
        buyer.desk.buyer.cancel(running.pursuit.row.id)
        await running.ended.wait()


async def test_no_call_begins_below_the_owners_floor(tmp_path):
    async with pair(tmp_path, price_percent=50) as (_, buyer, seller):
        assert (await buyer.ask(operation="mesh.noop", request=NOOP)).pursuit.spent == 5
        quote = await quote_from(buyer, seller, request=NOOP)
        (row,) = [
            row
            for row in await ask(seller, "price_set", operation="mesh.noop", floor_percent=150)
            if row["operation"] == "mesh.noop"
        ]
        assert row["price_micro_credits"] == {
            unit: -(-price * 3 // 2) for unit, price in row["default_micro_credits"].items()
        }
        assert (await call_with(buyer, seller, quote)).code == "QUOTE_EXPIRED"
        await until(
            lambda: (
                buyer.desk.discovery.candidates("mesh.noop")[0].offered.prices_micro_credits
                == row["price_micro_credits"]
            )
        )
        assert (await buyer.ask(operation="mesh.noop", request=NOOP)).pursuit.spent == 15
        assert await refused(seller, "price_set", operation="mesh.nop", floor_percent=1) == (
            "BAD_REQUEST"
        )
        rows = await ask(seller, "price_set", operation="mesh.noop", floor_percent=0)
        assert {row["floor_percent"] for row in rows} == {0}


async def test_a_full_share_of_the_disk_closes_the_node_until_there_is_room(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        await ask(seller, "limits_set", words={"disk_bytes_max": "50000"})
        seller.script.pause_at = 3
        running = await buyer.submit(PROMPT, tokens=12)
        await until(lambda: len(running.pursuit.output.ids) == 3)
        seller.paths.blobs.mkdir(exist_ok=True)
        (seller.paths.blobs / "large").write_bytes(bytes(100_000))
        with trio.fail_after(10):
            await running.ended.wait()
        assert (running.error.code, "disk" in running.error.message) == ("OWNER_LIMIT", True)
        await settled(buyer, seller, price_of(PROMPT, 3))
        found = await ask(seller, "limits")
        assert found["now"]["disk_bytes"] >= 100_000
        assert "disk" in found["refusal"]["message"]
        (seller.paths.blobs / "large").unlink()
        await until(lambda: gate_of(seller).refusal() is None)
        await until(lambda: buyer.desk.discovery.candidates("mesh.noop"))


async def test_a_machine_that_does_not_say_its_power_serves_and_says_so(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        found = await ask(seller, "limits_set", words={"mains_only": "true"})
        on_mains = facts.on_mains()
        assert found["now"]["on_mains"] is on_mains
        assert found["unknown"] == ([] if on_mains is not None else ["mains_only"])
        assert (found["refusal"] is not None) is (on_mains is False)
        if on_mains is not False:
            assert await quote_from(buyer, seller, request=NOOP)
