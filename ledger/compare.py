"""Two books about one pair, side by side: what one has and the other lacks.

Pure: the views come from `view`, or over the mesh from the peer, which may write what it likes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Final, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Meta

from aivillage.ledger.queries import Query
from aivillage.protocols.types import AMOUNT_MAX, Amount, MicroCredits, PeerId, as_credits, peer_id
from aivillage.protocols.vouchers import Count, Lane

LANES_MAX: Final = 8192
"""Either way: ten boots a day for two years. A view of as many is 610 KB at most: one frame."""


class LaneView(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The highest voucher of one lane that a book has."""

    lane: Lane
    n: Count
    cum: Amount


Lanes: TypeAlias = Annotated[tuple[LaneView, ...], Meta(max_length=LANES_MAX)]
Net: TypeAlias = Annotated[int, Meta(ge=-AMOUNT_MAX, le=AMOUNT_MAX)]


class View(msgspec.Struct, frozen=True, kw_only=True):
    """What the book of `owner` says about `peer`.

    `out`: lanes on which the owner pays; `into`: those on which the peer does. `balance`: what
    the peer owes.
    """

    owner: PeerId
    peer: PeerId
    out: Lanes
    into: Lanes
    balance: Net


Whose: TypeAlias = Literal["ours", "theirs", "both"]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One thing on which the books differ. `lacking`: whose book must change, or is in doubt.

    `amount`: how much money it is about. `in_transit`: it is on its way, and heals by itself.
    """

    lacking: Whose
    in_transit: bool
    amount: MicroCredits
    text: str
    lane: bytes = b""
    n: int = 0


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """`agree`: nothing differs but what is in transit. The gravest difference comes first."""

    agree: bool
    differences: list[Difference]

    @property
    def first(self) -> str:
        """The gravest difference in words; empty where there is none."""
        return self.differences[0].text if self.differences else ""


_LANES: Final = {
    "out": "SELECT lane, n, cum FROM lane_out WHERE peer = ? ORDER BY lane",
    "into": "SELECT lane, n, cum FROM lane_in WHERE peer = ? ORDER BY lane",
}


def view(peer: PeerId) -> Query[View]:
    """What this book says about `peer`; a stranger's view is empty."""
    ((key,),) = yield "SELECT public_key FROM identity ORDER BY n DESC LIMIT 1", ()
    out = yield _LANES["out"], (peer,)
    into = yield _LANES["into"], (peer,)
    balance = yield "SELECT amount FROM bal WHERE peer = ?", (peer,)
    return View(
        owner=peer_id(key),
        peer=peer,
        out=tuple(LaneView(*row) for row in out),
        into=tuple(LaneView(*row) for row in into),
        balance=balance[0][0] if balance else 0,
    )


class _Words(NamedTuple):
    """How one direction is told: `payer` and `payee` as `Whose`."""

    payer: Whose
    payee: Whose
    voucher: str
    not_booked: str
    unknown: str


_OURS: Final = _Words(
    "ours",
    "theirs",
    "our voucher",
    "they have not booked our voucher",
    "they hold a voucher of ours that we do not know:",
)
_THEIRS: Final = _Words(
    "theirs",
    "ours",
    "their voucher",
    "we have not booked their voucher",
    "we hold a voucher of theirs that they do not know:",
)


def compare(ours: View, theirs: View) -> Comparison:
    """All differences between our view of a peer and its view of us."""
    if (ours.owner, ours.peer) != (theirs.peer, theirs.owner):
        text = f"this view is by {theirs.owner} about {theirs.peer}, not the other side of ours"
        return _told([Difference(lacking="theirs", in_transit=False, amount=0, text=text)])
    found = [
        *_twice(ours, "ours"),
        *_twice(theirs, "theirs"),
        *_lanes(ours.out, theirs.into, _OURS),
        *_lanes(theirs.out, ours.into, _THEIRS),
        *_balances(ours, theirs),
    ]
    return _told(found)


def _told(found: list[Difference]) -> Comparison:
    ordered = sorted(found, key=lambda difference: difference.in_transit)
    return Comparison(agree=all(d.in_transit for d in ordered), differences=ordered)


def _twice(view: View, whose: Whose) -> Iterable[Difference]:
    """A book has one row a lane; a view with two says nothing certain."""
    for lanes in (view.out, view.into):
        for lane, count in Counter(lane.lane for lane in lanes).items():
            if count > 1:
                text = f"the view of {view.owner} names lane {lane.hex()} {count} times"
                yield Difference(lacking=whose, in_transit=False, amount=0, text=text, lane=lane)


def _lanes(
    signed: Sequence[LaneView], booked: Sequence[LaneView], words: _Words
) -> Iterable[Difference]:
    """`signed`: what the payer's book has of its lanes; `booked`: what the payee's has."""
    at_payer = {lane.lane: lane for lane in signed}
    at_payee = {lane.lane: lane for lane in booked}
    for name in sorted(at_payer.keys() | at_payee.keys()):
        none = LaneView(name, 0, 0)
        found = _lane(at_payer.get(name, none), at_payee.get(name, none), words)
        if found is not None:
            yield found


def _lane(payer: LaneView, payee: LaneView, words: _Words) -> Difference | None:
    if payer == payee:
        return None
    lane = payer.lane
    amount = abs(payer.cum - payee.cum)
    more, less = (payer, payee) if payer.n >= payee.n else (payee, payer)
    at = f"n {more.n} on lane {lane.hex()}"
    if payer.n == payee.n or more.cum < less.cum:
        text = (
            f"{words.voucher} {at} contradicts n {less.n} of the other book:"
            f" {as_credits(payer.cum)} signed, {as_credits(payee.cum)} booked"
        )
        return Difference(
            lacking="both", in_transit=False, amount=amount, text=text, lane=lane, n=more.n
        )
    late = more is payer
    text = f"{words.not_booked if late else words.unknown} {at}: " + (
        f"in transit {as_credits(amount)}" if late else f"{as_credits(amount)} more than signed"
    )
    return Difference(
        lacking=words.payee if late else words.payer,
        in_transit=late,
        amount=amount,
        text=text,
        lane=lane,
        n=more.n,
    )


def _balances(ours: View, theirs: View) -> Iterable[Difference]:
    """A balance is what the lanes say; if it is not, that book contradicts itself."""
    sides: tuple[tuple[View, Whose, str], ...] = (
        (ours, "ours", "our"),
        (theirs, "theirs", "their"),
    )
    for view, whose, name in sides:
        signed = sum(lane.cum for lane in view.into) - sum(lane.cum for lane in view.out)
        if view.balance != signed:
            text = (
                f"{name} balance is {as_credits(view.balance)},"
                f" {name} vouchers give {as_credits(signed)}"
            )
            amount = abs(view.balance - signed)
            yield Difference(lacking=whose, in_transit=False, amount=amount, text=text)
