"""Two views of one pair: what is in transit, what one forgot, and who contradicts whom."""

import msgspec
import pytest

from aivillage.ledger import queries
from aivillage.ledger.compare import LANES_MAX, LaneView, View, compare, view
from tests.unit.ledger.pairs import traded
from tests.unit.ledger.test_steps import BUYER, SELLER

L1, L2 = (bytes([n]) * 16 for n in (0xA1, 0xB2))


def views(buyer_out, seller_in, seller_out=(), buyer_in=()):
    """The buyer's view and the seller's, with the balances that their lanes give."""
    sides = ((BUYER, SELLER, buyer_out, buyer_in), (SELLER, BUYER, seller_out, seller_in))
    return [
        View(
            owner=owner,
            peer=peer,
            out=tuple(LaneView(*row) for row in out),
            into=tuple(LaneView(*row) for row in into),
            balance=sum(row[2] for row in into) - sum(row[2] for row in out),
        )
        for owner, peer, out, into in sides
    ]


def test_books_that_agree_differ_in_nothing():
    ours, theirs = views([(L1, 7, 100)], [(L1, 7, 100)], [(L2, 1, 5)], [(L2, 1, 5)])
    for found in (compare(ours, theirs), compare(theirs, ours)):
        assert (found.agree, found.differences, found.first) == (True, [], "")


def test_a_voucher_on_its_way_is_in_transit():
    ours, theirs = views([(L1, 7, 100)], [(L1, 5, 70)])
    found = compare(ours, theirs)
    told = f"they have not booked our voucher n 7 on lane {L1.hex()}: in transit 0.00003"
    assert (found.agree, found.first) == (True, told)
    (only,) = found.differences
    assert (only.lacking, only.amount, only.lane, only.n) == ("theirs", 30, L1, 7)
    assert compare(theirs, ours).first.startswith("we have not booked their voucher n 7")


def test_a_voucher_that_its_signer_forgot_is_named_and_is_no_transit():
    ours, theirs = views([(L1, 5, 70)], [(L1, 7, 100)])
    found = compare(ours, theirs)
    assert not found.agree
    assert found.first.startswith("they hold a voucher of ours that we do not know: n 7 on lane a1")
    assert found.differences[0].lacking == "ours"
    assert compare(theirs, ours).first.startswith("we hold a voucher of theirs")


def test_a_lane_that_only_one_side_has_is_compared_with_nothing():
    ours, theirs = views([(L1, 2, 9)], [], [(L2, 1, 4)], [])
    found = compare(ours, theirs)
    assert [d.amount for d in found.differences] == [9, 4]
    assert found.agree
    ours, theirs = views([], [(L1, 2, 9)])
    assert compare(ours, theirs).differences[0].lacking == "ours"


@pytest.mark.parametrize("booked", [(L1, 7, 99), (L1, 7, 101), (L1, 6, 101), (L1, 8, 99)])
def test_sums_that_cannot_both_be_signed_contradict_each_other(booked):
    ours, theirs = views([(L1, 7, 100)], [booked])
    for found in (compare(ours, theirs), compare(theirs, ours)):
        assert not found.agree
        assert "contradicts" in found.first
        assert found.differences[0].lacking == "both"


def test_the_gravest_difference_comes_first():
    ours, theirs = views([(L1, 7, 100), (L2, 1, 5)], [(L1, 5, 70), (L2, 2, 6)])
    found = compare(ours, theirs)
    assert [d.in_transit for d in found.differences] == [False, True]
    assert "n 2 on lane b2" in found.first


def test_a_balance_that_is_not_what_the_lanes_say_is_named():
    ours, theirs = views([(L1, 7, 100)], [(L1, 7, 100)])
    wrong = msgspec.structs.replace(theirs, balance=140)
    assert compare(ours, wrong).first == "their balance is 0.00014, their vouchers give 0.0001"
    assert compare(wrong, ours).differences[0].lacking == "ours"


def test_a_view_of_another_pair_is_refused():
    ours, theirs = views([], [])
    found = compare(ours, msgspec.structs.replace(theirs, peer=SELLER))
    assert not found.agree
    assert "not the other side of ours" in found.first


def test_a_view_that_names_a_lane_twice_says_nothing_certain():
    ours, theirs = views([(L1, 7, 100)], [(L1, 7, 100), (L1, 7, 100)])
    found = compare(ours, msgspec.structs.replace(theirs, balance=100))
    assert not found.agree
    assert "names lane" in found.first


def test_the_views_of_two_real_books_differ_by_what_is_in_transit():
    buyer, seller = traded()
    ours, theirs = queries.run(buyer, view(SELLER)), queries.run(seller, view(BUYER))
    assert (ours.balance, theirs.balance) == (-60, 55)
    found = compare(ours, theirs)
    assert found.agree
    assert [(d.lacking, d.amount) for d in found.differences] == [("theirs", 5)]


def test_a_view_survives_the_wire_and_a_wrong_one_does_not():
    ours, _ = views([(L1, 7, 100)], [], [], [(L2, 1, 5)])
    encoded = msgspec.msgpack.encode(ours)
    assert msgspec.msgpack.decode(encoded, type=View) == ours
    for wrong in (
        {"balance": 2**53},
        {"out": [(L1[:15], 7, 100)]},
        {"out": [(L1, 0, 100)]},
        {"into": [(L1, 7, -1)]},
    ):
        changed = msgspec.to_builtins(ours, builtin_types=(bytes,)) | wrong
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(msgspec.msgpack.encode(changed), type=View)


@pytest.mark.parametrize(("lanes", "fits"), [(LANES_MAX, True), (LANES_MAX + 1, False)])
def test_a_view_holds_so_many_lanes_and_fits_a_frame(lanes, fits):
    most = LaneView(L1, 2**53 - 1, 2**53 - 1)
    large = View(owner=BUYER, peer=SELLER, out=(most,) * lanes, into=(most,) * lanes, balance=0)
    encoded = msgspec.msgpack.encode(large)
    assert len(encoded) < 2**20
    if fits:
        assert msgspec.msgpack.decode(encoded, type=View) == large
    else:
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(encoded, type=View)
