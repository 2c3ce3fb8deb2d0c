"""What the holder of a reservation pays, and when it leaves."""

from __future__ import annotations

from typing import Any

import pytest

from aivillage.node.fares import BILLS_WAITING_MAX, Fare, Fares, LeftError
from aivillage.protocols.errors import RefusedError
from aivillage.protocols.relaying import (
    BILL_BYTES,
    Bill,
    Granted,
    mark,
    price_of,
    tolerance_bytes,
)
from tests.conftest import make_peer

A_BYTE = 1 << 30
"""A price a GiB at which a byte is a micro-credit."""
RELAY, ME = make_peer(1), make_peer(2)


class Signed:
    """What of a book a fare touches: it writes down what is to be signed."""

    def __init__(self) -> None:
        self.intended: list[int] = []
        self.accepted: list[tuple[int, bytes]] = []
        self.settled: list[tuple[int, bytes]] = []

    def intend(self, _peer: str, _attempt: bytes, _quote: bytes, ceiling: int) -> None:
        self.intended.append(ceiling)

    def accept(self, _peer: str, _attempt: bytes, amount: int, out_hash: bytes) -> None:
        self.accepted.append((amount, out_hash))

    async def settle(self, _peer: str, _attempt: bytes, amount: int, out_hash: bytes) -> None:
        self.settled.append((amount, out_hash))


def begun(price: int = A_BYTE, ceiling: int = 10 * BILL_BYTES) -> tuple[Signed, Fare]:
    book: Any = Signed()
    fares = Fares(ME, book, A_BYTE, ceiling)
    granted = Granted(nonce=b"n" * 16, price_micro_credits_per_gib=price)
    return book, fares.begin(RELAY, fares.ask(), granted)


def test_a_price_at_the_limit_is_taken_and_one_more_is_not():
    book, fare = begun(A_BYTE)
    assert (fare.price, book.intended) == (A_BYTE, [10 * BILL_BYTES])
    with pytest.raises(RefusedError) as caught:
        begun(A_BYTE + 1)
    assert caught.value.code == "PRICE_ABOVE_CEILING"


async def test_what_is_free_is_neither_intended_nor_signed():
    book, fare = begun(0)
    fare.count(1 << 40)
    fare.require_more()
    await fare.close()
    assert (book.intended, book.accepted, book.settled) == ([], [], [])
    with pytest.raises(LeftError):
        fare.take(Bill(carried_bytes=1))


async def test_a_bill_is_paid_once_so_much_was_counted_here_and_not_a_byte_before():
    book, fare = begun()
    fare.take(Bill(carried_bytes=1000))
    fare.count(999)
    assert book.accepted == []
    fare.count(1)
    assert book.accepted == [(1000, mark(fare.agreed, 1000))]
    fare.take(Bill(carried_bytes=1500))
    await fare.close()
    assert book.settled == [(1000, mark(fare.agreed, 1000))]


@pytest.mark.parametrize("circuits", [0, 3])
def test_a_bill_may_be_ahead_by_what_is_under_way_and_by_no_byte_more(circuits):
    most = 5 + tolerance_bytes(circuits)
    for bill, fits in ((most, True), (most + 1, False)):
        _, fare = begun()
        fare.circuits = circuits
        fare.count(5)
        if fits:
            fare.take(Bill(carried_bytes=bill))
            continue
        with pytest.raises(LeftError, match="more than passed here"):
            fare.take(Bill(carried_bytes=bill))


def test_a_bill_at_the_ceiling_is_paid_and_one_above_is_not():
    book, fare = begun(ceiling=1000)
    fare.count(2000)
    fare.take(Bill(carried_bytes=1000))
    assert book.accepted[-1][0] == 1000
    with pytest.raises(LeftError, match="used up"):
        fare.take(Bill(carried_bytes=1001))


def test_who_has_room_for_a_bill_under_the_ceiling_goes_on():
    for counted, goes_on in ((0, True), (1, False)):
        _, fare = begun(ceiling=BILL_BYTES)
        fare.count(counted)
        if goes_on:
            fare.require_more()
            continue
        with pytest.raises(LeftError, match="used up"):
            fare.require_more()


def test_a_bill_that_costs_no_more_than_the_last_is_an_offence():
    _, fare = begun()
    fare.count(100)
    fare.take(Bill(carried_bytes=100))
    with pytest.raises(LeftError, match="billed before"):
        fare.take(Bill(carried_bytes=100))


def test_more_bills_than_may_wait_lose_none_of_the_money():
    book, fare = begun()
    for number in range(BILLS_WAITING_MAX + 1):
        fare.take(Bill(carried_bytes=number + 1))
    fare.count(BILLS_WAITING_MAX + 1)
    assert len(book.accepted) == BILLS_WAITING_MAX
    assert book.accepted[-1][0] == BILLS_WAITING_MAX + 1


def test_both_ends_round_a_part_of_a_micro_credit_down():
    assert price_of((1 << 30) - 1, 1) == 0
    assert price_of(1 << 30, 1) == 1
    assert price_of(BILL_BYTES, 100_000) == 97
