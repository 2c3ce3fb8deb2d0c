"""What a running module may have done for it."""

from __future__ import annotations

import pytest

from aivillage.node.sub_jobs import SUB_JOBS_MAX, Bought, SubJobs, buy_nothing
from aivillage.protocols.errors import JobError, RefusedError, RequestError


class Shop:
    """Sells everything at `price`; `error` is how it ends."""

    def __init__(self, price=10, error=None):
        self.price = price
        self.error = error
        self.orders = []

    async def buy(self, order):
        self.orders.append(order)
        result = None if self.error else b"done"
        return Bought(result=result, spent=self.price, error=self.error)

    def sub_jobs(self, ceiling=100, **more):
        return SubJobs(self.buy, parent="ab", ceiling=ceiling, deadline_seconds=60, **more)


async def test_a_sub_job_names_its_parent_its_budget_and_the_time_that_is_left(autojump_clock):
    import trio

    shop = Shop()
    call = shop.sub_jobs()
    await trio.sleep(20)
    assert await call("mesh.noop", b"\x80", 100) == b"done"
    (order,) = shop.orders
    assert (order.operation, order.request, order.budget) == ("mesh.noop", b"\x80", 100)
    assert (order.parent, order.local, order.sub_jobs) == ("ab", False, None)
    assert order.deadline_seconds == pytest.approx(40)


async def test_a_budget_at_what_is_left_is_allowed_and_one_more_is_not():
    shop = Shop(price=30)
    call = shop.sub_jobs(ceiling=100)
    await call("a", b"", 100)
    with pytest.raises(RequestError) as caught:
        await call("a", b"", 71)
    assert caught.value.code == "PRICE_ABOVE_CEILING"
    await call("a", b"", 70)
    assert len(shop.orders) == 2


async def test_what_a_failed_sub_job_has_cost_is_gone_too():
    shop = Shop(price=40, error=JobError("it broke"))
    call = shop.sub_jobs(ceiling=100)
    with pytest.raises(JobError, match="it broke"):
        await call("a", b"", 50)
    with pytest.raises(RequestError):
        await call("a", b"", 61)


async def test_the_ninth_sub_job_is_refused():
    shop = Shop(price=0)
    call = shop.sub_jobs()
    for _ in range(SUB_JOBS_MAX):
        await call("a", b"", 1)
    with pytest.raises(RefusedError) as caught:
        await call("a", b"", 1)
    assert caught.value.code == "OWNER_LIMIT"
    assert len(shop.orders) == SUB_JOBS_MAX == 8


async def test_a_negative_budget_is_a_bad_request():
    shop = Shop()
    with pytest.raises(RequestError) as caught:
        await shop.sub_jobs()("a", b"", -1)
    assert (caught.value.code, shop.orders) == ("BAD_REQUEST", [])


async def test_a_local_sub_job_may_ask_for_the_rest_of_what_its_run_may():
    shop = Shop(price=0)
    call = shop.sub_jobs(local=True)
    await call("a", b"", 1)
    (order,) = shop.orders
    assert order.local
    assert order.sub_jobs is call


async def test_a_node_without_a_buyer_buys_nothing():
    with pytest.raises(RefusedError) as caught:
        await SubJobs(buy_nothing, parent="", ceiling=1, deadline_seconds=1)("a", b"", 1)
    assert caught.value.code == "OWNER_LIMIT"
