"""Who gets a job: many buyers with old news in virtual time, and whole nodes that weigh it all."""

from __future__ import annotations

from random import Random

import msgspec
import pytest

from aivillage.models.mesh.noop import NoopRequest
from aivillage.node import choice
from aivillage.node.choice import Facts, Weighed, in_order, pick, weigh
from aivillage.protocols.codec import pack
from aivillage.protocols.errors import AivillageError, RequestError
from aivillage.protocols.messages import QuoteReply, Submit
from aivillage.protocols.types import PeerId
from tests.conftest import make_peer
from tests.simulation.mesh import NOOP, open_mesh, settled, until, without

BUYERS, SELLERS, JOBS = 100, 10, 4000
UNITS, SLOTS = 20, 8
OFFER_SECONDS, QUOTE_SECONDS = 30.0, 58.0
"""How old news of a seller can be: what its offer says, and what it told one buyer."""
LOAD = 0.7
"""Of what all sellers together can do."""


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """All quotes are compared, also on a machine that stands still for a moment."""
    monkeypatch.setattr("aivillage.node.market.OTHERS_SECONDS", 5.0)


# ------------------------------------------------------------------ a hundred buyers


class Crowd:
    """Buyers that all measured the same; sellers that do one job after the other."""

    def __init__(self, seed: int, *, draws: bool) -> None:
        self.random = Random(seed)
        self.draws = draws
        self.peers = [make_peer(n) for n in range(2, 2 + SELLERS)]
        self.speeds = {peer: 10.0 + self.random.uniform(0, 1.0) for peer in self.peers}
        self.ends: dict[str, list[float]] = {peer: [] for peer in self.peers}
        self.offers = dict.fromkeys(self.peers, (-OFFER_SECONDS, 0))
        self.quotes: dict[tuple[int, str], tuple[float, int]] = {}
        self.now = self.waited = 0.0
        self.longest = 0

    def run(self) -> None:
        rate = LOAD * sum(self.speeds.values()) / UNITS
        for _ in range(JOBS):
            self.now += self.random.expovariate(rate)
            self._give(self._choose(self.random.randrange(BUYERS)))

    def _queue(self, peer: str) -> list[float]:
        """When each job there ends."""
        self.ends[peer] = [end for end in self.ends[peer] if end > self.now]
        return self.ends[peer]

    def _choose(self, buyer: int) -> str:
        """As `Market` does: three are asked by their offers, then one is taken by their quotes."""
        for peer, (at, _) in self.offers.items():
            if self.now - at >= OFFER_SECONDS:
                self.offers[peer] = self.now, len(self._queue(peer))
        offered = [self._weighed(p, 0, 0.0, self.offers[p][1] < SLOTS) for p in self.peers]
        if self.draws:
            order = in_order(offered, 3, self.random, explore=False)
        else:
            order = sorted(offered, key=lambda one: one.total)
        quoted = [self._quoted(buyer, one.facts.peer) for one in order[:3]]
        if self.draws:
            return pick(quoted, self.random, explore=False).facts.peer
        return min(quoted, key=lambda one: one.total).facts.peer

    def _quoted(self, buyer: int, peer: str) -> Weighed:
        at, load = self.quotes.get((buyer, peer), (-QUOTE_SECONDS, 0))
        if self.now - at >= QUOTE_SECONDS:
            at, load = self.quotes[buyer, peer] = self.now, len(self._queue(peer))
        return self._weighed(peer, load, self.now - at, self.offers[peer][1] < SLOTS or not load)

    def _weighed(self, peer: str, load: int, age: float, has_room: bool) -> Weighed:
        facts = Facts(
            peer=PeerId(peer), units=UNITS, units_per_second=self.speeds[peer], load=load,
            has_room=has_room, rtt_seconds=0.01, neighbour=True, age_seconds=age,
        )  # fmt: skip
        return weigh(facts, choice.RATES["balanced"])

    def _give(self, peer: str) -> None:
        queue = self._queue(peer)
        end = max([self.now, *queue]) + UNITS / self.speeds[peer]
        queue.append(end)
        self.longest = max(self.longest, len(queue))
        self.waited += end - self.now


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_old_news_sends_a_crowd_to_one_seller_only_where_the_choice_is_greedy(seed):
    greedy, drawn = Crowd(seed, draws=False), Crowd(seed, draws=True)
    for crowd in (greedy, drawn):
        crowd.run()
        print(f"longest queue {crowd.longest}, mean {crowd.waited / JOBS:.1f} s")
    assert greedy.longest > 3 * SLOTS
    assert drawn.longest <= SLOTS, "nobody has to hear BUSY"
    assert drawn.waited < greedy.waited / 5


# ------------------------------------------------------------------ whole nodes


async def village(mesh, *names, **settings):
    """A buyer that sells nothing, and sellers it knows."""
    buyer = await mesh.add("buyer", serve=False, **settings)
    sellers = [await mesh.add(name) for name in names]
    await mesh.knows(buyer, *sellers)
    return buyer, sellers


def noop(**changes):
    return {"operation": "mesh.noop", "request": pack(NoopRequest(**changes))}


async def laid_open(buyer, running):
    """(outcomes by peer, the first attempt's whole choice) as `jobs show` has it."""
    (attempt, *_) = (await buyer.desk.on_job({"job": running.pursuit.row.id}))["attempts"]
    return {one["peer"]: one["outcome"] for one in attempt["choice"]["candidates"]}, attempt[
        "choice"
    ]


@pytest.mark.parametrize(("prefer", "chosen"), [("fast", 0), ("cheap", 1)])
async def test_the_owner_says_whether_time_or_money_counts(tmp_path, prefer, chosen):
    async with open_mesh(tmp_path) as mesh:
        buyer = await mesh.add("buyer", serve=False, prefer=prefer)
        quick = await mesh.add("quick", price_percent=500)
        cheap = await mesh.add("cheap", price_percent=100)
        await mesh.knows(buyer, quick, cheap)
        buyer.has_measured(quick.peer, 10.0)
        buyer.has_measured(cheap.peer, 5.0)
        running = await buyer.ask("abcd", tokens=9)
        assert running.pursuit.receipt().sellers == ((quick, cheap)[chosen].peer,)
        outcomes, laid = await laid_open(buyer, running)
        assert laid["prefer"] == prefer
        lost = outcomes[(cheap, quick)[chosen].peer]
        assert lost.startswith(("slower by 1", "too dear by 0.01076 credits")[chosen]), lost


async def test_speed_at_one_operation_says_nothing_of_another(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, (x, y) = await village(mesh, "x", "y")
        buyer.has_measured(x.peer, 9_000.0)
        buyer.has_measured(y.peer, 50.0)
        del buyer.desk.discovery.record_of(x.peer).speeds[NOOP, ""]
        assert (await buyer.ask(**noop(parts=99))).pursuit.receipt().sellers == (y.peer,)
        assert (await buyer.ask("abcd")).pursuit.receipt().sellers == (x.peer,)


async def test_what_is_measured_outlives_the_node(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, (seller,) = await village(mesh, "x")
        assert (await buyer.ask("abcd")).error is None
        assert (await buyer.ask(**noop(parts=2))).error is None
        records = buyer.desk.discovery.records
        assert {work.operation for work, _ in records[seller.peer].speeds} == {
            "inference.generate", "mesh.noop",
        }  # fmt: skip
        kernels = {kernel for work, kernel in records[seller.peer].speeds if work.model}
        assert kernels == {"scripted/1"}
        await buyer.stop()
        await mesh.start(buyer)
        assert buyer.desk.discovery.records == records


async def test_what_this_machine_does_faster_and_cheaper_is_not_shipped(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, sellers = await village(mesh, "x", "y", "z")
        for seller in sellers:
            buyer.has_measured(seller.peer, 10.0)
        asked = len(buyer.heard)
        buyer.has_measured(buyer.peer, 11.0)
        running = await buyer.ask("abcd", tokens=9)
        receipt = running.pursuit.receipt()
        assert receipt.sellers == (buyer.peer,)
        assert (receipt.price_micro_credits, receipt.why) == (
            0, "here: faster than the best of 3 peers",
        )  # fmt: skip
        heard = {type(frame).__name__ for frame in buyer.heard[asked:]}
        assert not heard & {"QuoteReply", "Accepted"}, "nobody had to be asked"
        outcomes, _ = await laid_open(buyer, running)
        assert outcomes.pop(buyer.peer) == "chosen"
        assert set(outcomes) == {seller.peer for seller in sellers}
        assert all(o.startswith("not asked: too dear by 0.00269") for o in outcomes.values()), (
            outcomes
        )
        assert (await buyer.desk.on_job({"job": running.pursuit.row.id}))["local"]
        for seller in sellers:
            await settled(buyer, seller, 0)


async def test_a_peer_that_is_worth_its_price_gets_what_this_machine_could_do(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, (seller,) = await village(mesh, "x")
        buyer.has_measured(seller.peer, 100.0)
        buyer.has_measured(buyer.peer, 5.0)
        running = await buyer.ask("abcd", tokens=9)
        assert running.pursuit.receipt().sellers == (seller.peer,)
        outcomes, _ = await laid_open(buyer, running)
        assert outcomes[buyer.peer].startswith("slower by 1"), outcomes


async def test_a_machine_that_never_did_such_a_job_for_its_owner_does_not_begin_unasked(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, (seller,) = await village(mesh, "x")
        for _ in range(2):
            assert (await buyer.ask(**noop())).pursuit.receipt().sellers == (seller.peer,)
        local = await buyer.desk.buyer.submit(Submit(id=1, local=True, **noop()), lambda _: None)
        await local.ended.wait()
        assert buyer.desk.discovery.record_of(buyer.peer).speed(NOOP) > 0
        buyer.has_measured(buyer.peer, 1e9)
        assert (await buyer.ask(**noop())).pursuit.receipt().sellers == (buyer.peer,)


async def test_a_job_for_the_mesh_or_a_peer_is_never_done_here(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, (seller,) = await village(mesh, "x")
        buyer.has_measured(buyer.peer, 1e9)
        for wish in ({"mesh": True}, {"peer": seller.peer}):
            assert (await buyer.ask(**noop(), **wish)).pursuit.receipt().sellers == (seller.peer,)
        with pytest.raises(RequestError, match="local job has no peer"):
            both = Submit(id=1, local=True, mesh=True, **noop())
            await buyer.desk.buyer.submit(both, lambda _: None)


async def test_this_machine_helps_itself_where_nobody_else_does_it(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer = await mesh.add("buyer", serve=False)
        buyer.has_measured(buyer.peer, 1.0)
        running = await buyer.ask(**noop())
        assert running.pursuit.receipt().why == "here: no peer offers it"
        dear = await mesh.add("dear")
        await mesh.knows(buyer, dear)
        buyer.has_measured(dear.peer, 1e9)
        running = await buyer.ask("abcd", tokens=9, ceiling=100)
        assert running.pursuit.receipt().why == "here: none of 1 peers said yes"
        outcomes, _ = await laid_open(buyer, running)
        assert outcomes[dear.peer].startswith("refused: PRICE_ABOVE_CEILING it may cost 0.00269")


async def test_this_machine_does_what_a_better_peer_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr("aivillage.node.market.QUOTE_SECONDS", 0.2)
    async with open_mesh(tmp_path) as mesh:
        buyer, (seller,) = await village(mesh, "x")
        buyer.has_measured(seller.peer, 100.0)
        buyer.has_measured(buyer.peer, 5.0)
        with without(seller, QuoteReply):
            running = await buyer.ask("abcd", tokens=9)
        assert running.error is None, running.error
        assert running.pursuit.receipt().sellers == (buyer.peer,)


async def test_one_peer_is_tried_before_this_machine_keeps_a_long_job(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, (seller,) = await village(mesh, "x")
        buyer.has_measured(buyer.peer, 6.0)
        running = await buyer.ask("abcd", tokens=9)
        assert running.pursuit.receipt().sellers == (seller.peer,)
        assert "tried once" in running.pursuit.receipt().why
        assert buyer.desk.discovery.record_of(seller.peer).units_per_second > 6.0


async def test_a_job_begun_at_a_peer_does_not_end_here(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, (x, y) = await village(mesh, "x", "y")
        buyer.has_measured(x.peer, 1_000.0)
        buyer.has_measured(buyer.peer, 10.0)
        x.script.die_after = 4
        running = await buyer.ask("abcd", tokens=9)
        assert running.error is None
        assert running.pursuit.receipt().sellers == (x.peer, y.peer)


async def test_a_dry_run_explains_and_buys_nothing(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, (x, y) = await village(mesh, "x", "y")
        z = await mesh.add("z", price_percent=100_000)
        await mesh.knows(buyer, z)
        buyer.has_measured(x.peer, 10.0)
        buyer.has_measured(y.peer, 1.0)
        buyer.has_measured(z.peer, 1e9)
        await until(lambda: buyer.ledger.view(x.peer).synced)
        asked = msgspec.to_builtins(Submit(id=0, **noop()))
        found = await buyer.desk.on_choose({k: v for k, v in asked.items() if k not in {"t", "id"}})
        outcomes = {one["peer"]: one["outcome"] for one in found["candidates"]}
        assert outcomes[x.peer] == "chosen"
        assert outcomes[y.peer].startswith("slower by 0.9")
        assert outcomes[z.peer].startswith("too dear by 0.00999 credits, which count as 1 s"), (
            outcomes
        )
        seconds = found["candidates"][0]["seconds"]
        assert seconds.pop("score") == pytest.approx(sum(seconds.values()), abs=1e-5)
        assert await buyer.desk.on_jobs({}) == []
        for seller in (x, y, z):
            assert not any(type(frame).__name__ == "Call" for frame in seller.heard)
            await settled(buyer, seller, 0)


async def test_a_refusal_stands_in_the_table_as_it_was_said(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, (x, y) = await village(mesh, "x", "y")
        y.desk.seller.door.refusal = lambda: AivillageError("its disk is full", code="DISK_FULL")
        running = await buyer.ask(**noop())
        outcomes, _ = await laid_open(buyer, running)
        assert outcomes == {x.peer: "chosen", y.peer: "refused: DISK_FULL its disk is full"}


async def test_who_prefers_nonsense_hears_what_there_is(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, _ = await village(mesh, "x")
        for ask in (buyer.desk.buyer.submit, lambda s, _: buyer.desk.buyer.explain(s)):
            with pytest.raises(RequestError, match="best") as caught:
                await ask(Submit(id=1, prefer="best", **noop()), lambda _: None)
            assert "fast, balanced, cheap" in caught.value.next_step
