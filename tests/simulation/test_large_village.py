"""Offers at scale: who hears of whom, within which bounds, whoever misbehaves."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import msgspec
import pytest
import trio

from aivillage.node import exchange, market, views, villagers
from aivillage.node.config import Settings
from aivillage.node.discovery import Discovery
from aivillage.node.freshness import CLOCK_SKEW_MS_MAX
from aivillage.node.views import ByteBudget
from aivillage.protocols.errors import JobError
from aivillage.protocols.messages import (
    Accepted,
    Gossip,
    OffersAnswer,
    OffersQuestion,
    OperationInfo,
)
from aivillage.protocols.pricing import Terms
from tests.conftest import make_key
from tests.simulation import large_village
from tests.simulation.large_village import COMMON, NEWS, RARE, Plan, Village

ROUND_SECONDS = 5.0


@contextlib.asynccontextmanager
async def settled(size: int, **options: object) -> AsyncIterator[Village]:
    async with trio.open_nursery() as nursery:
        home = Village(Plan(size=size, **options), nursery)  # type: ignore[arg-type]
        await home.settle()
        yield home
        nursery.cancel_scope.cancel()


@pytest.fixture
def few_links(monkeypatch):
    """Far fewer than there are members, so that news has a way to go."""
    monkeypatch.setattr(villagers, "NEIGHBOURS", 4)


@pytest.fixture
def small_views(monkeypatch):
    monkeypatch.setattr(exchange, "VIEW_MAX", 12)


def bound_bytes(settings: Settings, seconds: float) -> float:
    """The most that a node may say in that time: its rate, and one burst."""
    return settings.gossip_bytes_per_second * (seconds + ByteBudget.BURST_SECONDS)


def test_thirty_nodes_hear_of_one_another_within_a_few_rounds(few_links):
    async def life():
        async with settled(30) as home:
            home.clear_counts()
            await trio.sleep(6 * ROUND_SECONDS)
            everybody = {member.peer for member in home.members}
            for member in home.members:
                heard = {held.offer.seller for held in member.discovery.held()}
                assert heard == everybody - {member.peer}
            assert home.degrees()[len(home.members) // 2] < 15
            most = bound_bytes(home.plan.settings, 6 * ROUND_SECONDS)
            assert 0 < max(member.sent_bytes for member in home.members) <= most

    large_village.run(life)


def test_in_small_views_everybody_still_hears_of_the_rare_seller(few_links, small_views):
    async def life():
        async with settled(30) as home:
            await trio.sleep(8 * ROUND_SECONDS)
            for _ in range(6):  # for longer than an offer lives
                await trio.sleep(30)
                assert home.knows(RARE) == 30
            for member in home.members:
                linked = len(member.villagers.members())
                assert len(member.discovery.held()) <= 12 + linked

    large_village.run(life)


def test_traffic_is_the_same_in_a_small_village_and_in_a_larger_one(few_links, small_views):
    def a_minute(size):
        async def life():
            async with settled(size) as home:
                await trio.sleep(60)
                home.clear_counts()
                await trio.sleep(120)
                return sum(home.sent(NEWS)) / size / 120

        return large_village.run(life)

    small, large = a_minute(10), a_minute(40)
    assert large < 1.5 * small
    assert small < 1.5 * large


def test_an_operation_that_nobody_has_heard_of_is_found_by_an_ad(few_links, monkeypatch):
    monkeypatch.setattr(exchange, "ROUNDS_PER_BEAT", 0.01)  # nobody asks for news meanwhile
    monkeypatch.setattr(market, "SEEK_SECONDS", 60.0)

    async def life():
        async with settled(30, rare_sellers=0) as home:
            await trio.sleep(20)
            seller, buyer = home.members[11], home.members[23]
            assert home.knows(RARE) == 0
            seller.workers.skills = (COMMON, RARE)
            running = await buyer.ask(RARE)
            assert running.error is None
            assert running.pursuit.receipt().sellers == (seller.peer,)
            assert home.knows(RARE) < 25  # it was no flood
            await trio.sleep(5)  # what is signed is on its way
            assert home.sum_of_balances() == 0
            return buyer.found_seconds[0]

    assert large_village.run(life) < 30


def test_a_job_counts_as_failed_where_a_seller_was_there_for_long_enough(few_links):
    async def life():
        async with settled(3, rare_sellers=1) as home:
            seller, other = home.members[1], home.members[2]
            began = trio.current_time()
            assert seller.could(RARE, began)  # it failed at once: no absence explains it
            assert not other.could(RARE, began)
            seller.stop()
            await trio.sleep(6)
            assert not seller.could(RARE, began)
            await home.start(seller)
            await trio.sleep(large_village.NOTICED_SECONDS - 0.5)
            assert not seller.could(RARE, began)
            await trio.sleep(1)
            assert seller.could(RARE, began)

    large_village.run(life)


def test_a_founder_with_few_bytes_left_leaves_no_newcomer_alone(few_links, small_views):
    """Whoever knows the founder only finds nobody that the founder does not name.

    Forty who come within four seconds ask more than it may say for minutes.
    """
    settings = msgspec.structs.replace(Plan(size=1).settings, gossip_bytes_per_second=256)

    async def life():
        async with settled(40, join_seconds=0.1, settings=settings) as home:
            await trio.sleep(50)
            alone = [member for member in home.members if len(member.villagers.members()) < 2]
            assert len(alone) < 25  # more than 30 where everybody is answered, be it with nothing

    large_village.run(life)


async def answered(asker, asked, **question):
    """What `asked` says to a question for offers."""
    link = asker.links.get(asked.peer)
    return await link.ask(OffersQuestion(id=link.next_id(), **question), timeout_seconds=5.0)


def test_the_last_bytes_are_one_offer_for_who_knows_few():
    async def life():
        async with settled(12) as home:
            await trio.sleep(20)
            asked, asker = home.members[3], home.members[4]
            size_bytes = min(len(held.envelope) for held in asked.discovery.held())
            strangers = [
                msgspec.structs.replace(asked.discovery.offers()[0], seller=str(n))
                for n in range(views.FEW)
            ]

            async def told(knows):
                # Two offers' worth for others: half of it, less a frame, is too little for one.
                asked.exchange.budget = ByteBudget(size_bytes / 3)
                have = views.said(strangers[:knows])
                return len((await answered(asker, asked, have=have, room=10)).envelopes)

            assert await told(0) == await told(views.FEW - 1) == 1
            with pytest.raises(JobError, match="no answer"):  # rather than one that says nothing
                await told(views.FEW)

    large_village.run(life)


def test_an_older_member_is_told_what_it_understands_within_the_budget(few_links):
    async def life():
        async with settled(12) as home:
            old = home.members[5]
            old.stop()
            await trio.sleep(1)
            old.minor = 1
            await home.start(old)
            heard = []
            message = old.links.on_message

            def on_message(link, frame):
                heard.append(frame)
                message(link, frame)

            async def asks_nobody(_link):
                await trio.lowlevel.checkpoint()

            old.links.on_message = on_message
            old.exchange._visit = asks_nobody
            home.clear_counts()
            await trio.sleep(150)  # longer than an offer lives
            assert not [f for f in heard if isinstance(f, OffersQuestion | OffersAnswer)]
            assert [f for f in heard if isinstance(f, Gossip) and f.hops]
            assert len(old.discovery.held()) == 11
            most = bound_bytes(home.plan.settings, 150)
            assert max(member.sent_bytes for member in home.members) <= most
            running = await old.ask(RARE)
            assert running.error is None

    large_village.run(life)


# ------------------------------------------------------------------ who misbehaves


def an_offer(number, operation, lives_seconds=100.0):
    info = OperationInfo(name=operation, terms=Terms(prices_micro_credits={"calls": 1}))
    return Discovery(make_key(number)).make_offer([info], ["/memory/x"], 1, lives_seconds)


def test_a_flooding_member_hides_nobody_and_fills_no_more_than_a_view(few_links, small_views):
    async def life():
        async with settled(20) as home:
            await trio.sleep(30)
            flooder = home.members[7]
            victims = [link.peer for link in flooder.villagers.members()]
            for number in range(300):
                gossip = Gossip(topic="offer", envelope=an_offer(1000 + number, COMMON), hops=1)
                for link in flooder.villagers.members():
                    link.send(gossip)
                await trio.sleep(0.05)
            await trio.sleep(30)
            assert victims
            assert home.knows(RARE) == 20
            for member in home.members:
                assert len(member.discovery.held()) <= 12 + len(member.villagers.members())

    large_village.run(life)


def test_who_asks_without_end_is_answered_within_the_budget():
    settings = msgspec.structs.replace(Plan(size=1).settings, gossip_bytes_per_second=1024)

    async def life():
        async with settled(12, settings=settings) as home:
            asker, asked = home.members[3], home.members[4]
            await trio.sleep(30)
            link = asker.links.get(asked.peer)
            home.clear_counts()
            for _ in range(20 * 60):
                link.send(OffersQuestion(id=link.next_id(), room=1000))
                await trio.sleep(0.05)
            assert 0 < asked.sent_bytes <= bound_bytes(settings, 60)
            assert asked.sent["OffersAnswer"] > 5
            assert asked.sent["Gossip"] > 2  # its own offers are not silenced by that

    large_village.run(life)


@pytest.mark.parametrize("kind", ["forged", "expired", "another kind"])
def test_an_answer_that_lies_teaches_nothing(kind):
    async def life():
        async with settled(3) as home:
            await trio.sleep(20)
            liar, asker = home.members[1], home.members[2]
            with trio.fail_after(120):  # now and then they have not met after twenty seconds
                while asker.links.get(liar.peer) is None:
                    await trio.sleep(1)
            envelope = an_offer(99, RARE, 100.0)
            if kind == "expired":  # whatever the clocks are
                await trio.sleep(101 + CLOCK_SKEW_MS_MAX / 1000)
            if kind == "forged":
                envelope = envelope[:-1] + bytes([envelope[-1] ^ 1])
            before = {held.offer.seller for held in asker.discovery.held()}

            def lie(link, question):
                answer = OffersAnswer(id=question.id, envelopes=(envelope,))
                if kind == "another kind":
                    answer = Accepted(id=question.id)
                link.send(answer)

            liar.switch._routes[OffersQuestion] = lie
            link = asker.links.get(liar.peer)
            await asker.exchange._visit(link)
            assert {held.offer.seller for held in asker.discovery.held()} == before
            assert bool(link.closed_because) == (kind != "expired")

    large_village.run(life)


def test_a_stranger_is_told_of_nobody():
    async def life():
        async with settled(4) as home:
            await trio.sleep(20)
            asker, asked = home.members[1], home.members[2]
            del asked.villagers._members[asker.peer]
            assert (await answered(asker, asked, room=100)).envelopes == ()

    large_village.run(life)


def test_who_never_pays_gains_what_each_node_lends_and_no_more():
    async def life():
        settings = Settings(heartbeat_seconds=60.0, village_exposure_micro_credits=50)
        async with settled(12, liars=1, settings=settings) as home:
            await trio.sleep(10)
            with trio.move_on_after(30):
                await home.greed(home.members[-1])
            gains = list(home.gains())
            assert len(gains) == 11
            assert all(gain <= most for gain, most in gains)
            assert 5 <= home.stolen <= 55

    large_village.run(life)


def test_what_begins_to_be_sold_is_found_by_who_asked_for_it():
    async def life():
        async with settled(6) as home:
            found = await home.find_cold(2)
            assert len(found) == 2
            assert max(found) < market.SEEK_SECONDS

    large_village.run(life)
