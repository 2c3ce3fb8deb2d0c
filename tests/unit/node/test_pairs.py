"""A view of a pair as it travels, and what is made of two of them."""

import msgspec

from aivillage.ledger.compare import LaneView, View
from aivillage.node import pairs
from aivillage.node.pairs import compared, said
from aivillage.protocols import codec
from aivillage.protocols.messages import PAIR_LANES_MAX
from aivillage.protocols.vouchers import lane_of
from tests.conftest import make_peer

ME, PEER = make_peer(1), make_peer(2)


def lanes(*rows):
    return tuple(LaneView(lane_of(epoch, bytes(8)), n, cum) for epoch, n, cum in rows)


def view(out=(), into=(), owner=ME, peer=PEER, wrong=0):
    out, into = lanes(*out), lanes(*into)
    balance = sum(lane.cum for lane in into) - sum(lane.cum for lane in out)
    return View(owner=owner, peer=peer, out=out, into=into, balance=balance + wrong)


def answer(out=(), into=(), *, wrong=0, size=1 << 20):
    return said(view(out, into, PEER, ME, wrong), 1, size)


def test_books_that_say_the_same_agree():
    ours = view([(1, 2, 30)], [(5, 1, 7)])
    found = compared(ours, ours, answer([(5, 1, 7)], [(1, 2, 30)]))
    assert (found.agree, found.first, found.differences) == (True, "", [])
    assert (found.in_transit, found.left_out) == (0, 0)


def test_what_is_signed_while_they_are_asked_is_no_difference():
    before, after = view([(1, 2, 30)], [(5, 1, 7)]), view([(1, 4, 50)], [(5, 3, 9)])
    theirs = answer([(5, 2, 8)], [(1, 3, 40)])
    found = compared(before, after, theirs)
    assert found.agree
    assert found.in_transit == 10 + 1
    assert not compared(after, after, theirs).agree  # one look would have said so


def test_a_voucher_that_they_deny_is_a_difference():
    ours = view([], [(5, 3, 9)])
    found = compared(ours, ours, answer([(5, 2, 8)], []))
    assert not found.agree
    assert found.first == found.differences[0].text


def test_a_balance_that_its_lanes_do_not_give_is_a_difference_on_either_side():
    good = view([(1, 2, 30)])
    assert compared(good, good, answer([], [(1, 2, 30)])).agree
    assert "their balance" in compared(good, good, answer([], [(1, 2, 30)], wrong=1)).first
    bad = view([(1, 2, 30)], wrong=5)
    assert "our balance" in compared(bad, bad, answer([], [(1, 2, 30)])).first


def test_of_many_lanes_the_newest_travel_and_the_others_are_counted():
    rows = [(epoch, 1, 1) for epoch in range(1, 20)]
    ours, small = view(rows, rows), pairs.OTHER_BYTES + 2 * 5 * pairs.LANE_BYTES
    theirs = answer(rows, rows, size=small)
    assert [lane.lane for lane in theirs.out] == [
        lane_of(epoch, bytes(8)) for epoch in (19, 18, 17, 16, 15)
    ]
    assert (theirs.out_left_out, theirs.into_left_out) == (14, 14)
    assert len(codec.encode(theirs)) <= small
    found = compared(ours, ours, theirs)
    assert (found.agree, found.left_out) == (True, 28)
    newest_differs = view([*rows[:-1], (19, 2, 5)], rows)
    assert compared(newest_differs, newest_differs, theirs).in_transit == 4


def test_the_longest_view_fits_the_frame():
    rows = [(epoch, 2**53 - 1, 2**53 - 1) for epoch in range(PAIR_LANES_MAX + 3)]
    ours = view(rows, rows, PEER, ME)
    theirs = said(msgspec.structs.replace(ours, balance=0), 2**53 - 1, 1 << 20)
    assert len(theirs.out) == len(theirs.into) == PAIR_LANES_MAX
    assert len(codec.encode(theirs)) <= 1 << 20
    assert said(ours, 1, 0).out == ()


def test_a_view_that_differs_everywhere_is_told_in_part():
    ours = view([(epoch, 1, 1) for epoch in range(100)])
    theirs = answer([], [(epoch, 1, 2) for epoch in range(100)])
    assert len(compared(ours, ours, theirs).differences) == pairs.DIFFERENCES_MAX
