"""Results that are lists of items are done again too: who lies in one is found, whoever else made
a part of it."""

from __future__ import annotations

from contextlib import asynccontextmanager

import msgspec
import pytest
import trio

from aivillage.models.inference import catalogue, vectors
from aivillage.models.inference.embed import EmbedRequest, EmbedResult
from aivillage.node.reputation import Key
from aivillage.node.verifier import Trust
from aivillage.protocols.codec import pack, unpack
from aivillage.protocols.messages import Submit
from tests.simulation.mesh import open_mesh, settled
from tests.simulation.scripted import vector_of
from tests.simulation.test_explain import explained

OPERATION = "inference.embed"
TEXTS = tuple(f"text {n}" for n in range(6))
DEARER = 50
"""Times as dear as the one before: no moment's delay makes up for that."""
PRICE = 22 * sum(-(-len(text) // 4) for text in TEXTS)


def of(buyer, node) -> Trust:
    return buyer.desk.replicator.reputation.of(Key(node.peer, OPERATION, catalogue.EMBEDDER, ""))


@asynccontextmanager
async def village(folder, *sellers, dearer=False, **settings):
    """`dearer`: each costs far more than the one before, which so is chosen."""
    async with open_mesh(folder) as mesh:
        chosen = {"serve": False, "verify_percent_max": 50} | settings
        buyer = await mesh.add("buyer", **chosen)
        percents = [100 * (DEARER**n if dearer else 1) for n in range(len(sellers))]
        nodes = [
            await mesh.add(name, price_percent=percent)
            for name, percent in zip(sellers, percents, strict=True)
        ]
        await mesh.knows(buyer, *nodes, operation=OPERATION)
        yield mesh, buyer, *nodes


async def bought(buyer, seller=None, **options):
    """A job, and what was done about it afterwards."""
    submit = Submit(
        id=1, operation=OPERATION, request=pack(EmbedRequest(text=TEXTS)),
        peer=seller.peer if seller else None, mesh=True, **options,
    )  # fmt: skip
    running = await buyer.desk.buyer.submit(submit, lambda _frame: None)
    with trio.fail_after(20):
        await running.ended.wait()
        await buyer.desk.replicator.idle.wait()
    return running


def said(running) -> tuple[bytes, ...]:
    return unpack(EmbedResult, running.pursuit.result).vectors


def right(*, besides: dict[int, bytes] | None = None) -> tuple[bytes, ...]:
    found = dict(enumerate(map(vector_of, TEXTS))) | (besides or {})
    return tuple(found.values())


def turned(_place: int, vector: bytes) -> bytes:
    """Of unit length, and of another text."""
    return vectors.packed(reversed(vectors.numbers(vector)))


async def test_another_does_it_again_and_both_are_trusted_more(tmp_path):
    async with village(tmp_path, "one", "two") as (_, buyer, one, two):
        running = await bought(buyer, one)
        assert said(running) == right()
        assert (one.script.made, two.script.made) == (6, 6)
        assert of(buyer, one) == Trust(count=1, done=1, checked=1)
        assert of(buyer, two) == Trust(count=1, done=0, checked=1)
        await settled(buyer, one, PRICE)


async def test_other_kernels_agree_up_to_rounding(tmp_path):
    async with village(tmp_path, "one", "two") as (_, buyer, one, two):
        two.script.kernel_class = "another"
        two.script.vector = lambda _n, v: vectors.packed(x + 1e-7 for x in vectors.numbers(v))
        await bought(buyer, one)
        assert of(buyer, one) == Trust(count=1, done=1, checked=1)


@pytest.mark.parametrize("place", [0, 5])
async def test_one_wrong_vector_is_found_and_its_maker_cut_off(tmp_path, place):
    async with village(tmp_path, "liar", "two", "three") as (_, buyer, liar, two, three):
        liar.script.vector = lambda n, v: turned(n, v) if n == place else v
        running = await bought(buyer, liar)
        assert running.error is None  # the answer was there before anybody knew
        assert of(buyer, liar) == Trust(count=0, done=1, checked=1, failed=1)
        assert (of(buyer, two).count, of(buyer, three).count) == (1, 1)
        (kept,) = await buyer.desk.replicator.reputation.evidence(liar.peer)
        assert kept.reason.startswith(f"item {place} is not what")
        assert (await bought(buyer)).pursuit.receipt().sellers != (liar.peer,)


async def test_a_node_that_serves_needs_no_third(tmp_path):
    async with village(tmp_path, "liar", serve=True) as (_, buyer, liar):
        await bought(buyer, liar)
        assert (of(buyer, liar).count, buyer.script.made) == (1, 6)
        liar.script.vector = turned
        await bought(buyer, liar)
        assert of(buyer, liar).failed == 1
        assert buyer.desk.replicator.reputation.checks_spent == 0


async def test_three_that_all_differ_accuse_nobody(tmp_path):
    async with village(tmp_path, "one", "two", "three") as (_, buyer, *sellers):
        for n, seller in enumerate(sellers):
            seller.script.vector = lambda place, v, n=n: (v, turned(place, v))[place == n]
        await bought(buyer, sellers[0])
        assert [of(buyer, seller).failed for seller in sellers] == [0, 0, 0]
        assert of(buyer, sellers[0]).unsettled == 1


async def test_who_made_the_wrong_part_is_accused_not_who_went_on_from_it(tmp_path):
    async with village(tmp_path, "liar", "two", serve=True, dearer=True) as (_, buyer, liar, two):
        liar.script.vector = lambda n, v: turned(n, v) if n == 1 else v
        liar.script.die_after = 3
        running = await bought(buyer)
        assert said(running) == right(besides={1: turned(1, vector_of(TEXTS[1]))})
        assert (liar.script.made, two.script.made) == (3, 3)
        assert of(buyer, liar).failed == 1
        assert of(buyer, two).failed == 0


async def test_who_changes_what_another_had_made_is_accused_itself(tmp_path):
    async with village(tmp_path, "one", "liar", serve=True, dearer=True) as (_, buyer, one, liar):
        one.script.die_after = 3
        liar.script.embedded = lambda result: msgspec.structs.replace(
            result, vectors=right(besides={1: turned(1, vector_of(TEXTS[1]))})
        )
        running = await bought(buyer)
        assert running.error is None
        assert (one.script.made, liar.script.made) == (3, 3)
        assert of(buyer, liar).failed == 1
        assert of(buyer, one).failed == 0


async def test_each_part_is_paid_once_to_whoever_made_it(tmp_path, capsys):
    async with village(tmp_path, "one", "two", dearer=True) as (_, buyer, one, two):
        one.script.die_after = 2
        running = await bought(buyer)
        assert said(running) == right()
        assert (one.script.made, two.script.made) == (2, 4)
        half = PRICE * 2 // 6
        await settled(buyer, one, half)
        await settled(buyer, two, DEARER * (PRICE - half))
        assert running.pursuit.receipt().price_micro_credits == half + DEARER * (PRICE - half)
        code, found = await explained(buyer, running.pursuit.row.id, capsys)
        assert (code, found["ok"]) == (0, True)
        sums = [attempt["sum_micro_credits"] for attempt in found["attempts"]]
        assert sums == [half, DEARER * (PRICE - half)]


async def test_a_part_of_the_wrong_form_is_refused_as_it_comes(tmp_path):
    async with village(tmp_path, "liar", "two", dearer=True) as (_, buyer, liar, two):
        liar.script.vector = lambda n, v: vectors.packed([1.5, *vectors.numbers(v)[1:]])
        running = await bought(buyer)
        assert said(running) == right()
        assert two.script.made == 6, "nothing of it was gone on from"
        await settled(buyer, liar, 0)
        await settled(buyer, two, DEARER * PRICE)


async def test_a_job_that_asks_for_it_is_checked_before_it_is_paid(tmp_path):
    async with village(tmp_path, "liar", "two", serve=True, dearer=True) as (_, buyer, liar, two):
        liar.script.vector = turned
        running = await bought(buyer, verify=True)
        assert said(running) == right()
        assert running.pursuit.receipt().checked == "the same at this node"
        await settled(buyer, liar, 0)
        await settled(buyer, two, DEARER * PRICE)


@pytest.mark.parametrize(
    "lie",
    [
        lambda result: msgspec.structs.replace(result, vectors=result.vectors[:-1]),
        lambda result: msgspec.structs.replace(
            result, vectors=(bytes(len(result.vectors[0])), *result.vectors[1:])
        ),
        lambda result: msgspec.structs.replace(
            result,
            dimension=192,
            vectors=tuple(vectors.packed([1.0] + [0.0] * 191) for _ in result.vectors),
        ),
    ],
    ids=["one too few", "no length", "another dimension"],
)
async def test_a_result_of_the_wrong_form_is_not_paid(tmp_path, lie):
    async with village(tmp_path, "liar", "two", dearer=True) as (_, buyer, liar, two):
        liar.script.embedded = lie
        assert said(await bought(buyer)) == right()
        assert liar.script.made >= 6
        await settled(buyer, liar, 0)
        await settled(buyer, two, DEARER * PRICE)
