"""Grants: a village's guarantee that one member is good for so much more, for a while.

The founder signs, within a cap of its own for any 30 days; the holder's hello shows it; each
member adds what the grants say to the holder's line, up to a cap of that member's own. Nobody
counts what others lent on the same grant, so that the cap is what over-use can cost each of them.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.ledger.ledger import NodeBook
from aivillage.node import token, village
from aivillage.node.config import Settings
from aivillage.node.identity import peer_of
from aivillage.node.jobs import Jobs
from aivillage.node.membership import Membership
from aivillage.node.village import DAY_MS
from aivillage.protocols import codec
from aivillage.protocols.envelope import seal, unseal
from aivillage.protocols.errors import PeerError, RefusedError, RequestError
from aivillage.protocols.messages import CERTIFICATES_MAX, GRANTS_MAX, Granted
from aivillage.protocols.papers import Certificate, Grant
from aivillage.protocols.types import MicroCredits, PeerId

TOKEN_PREFIX: Final = "aivg1."  # noqa: S105
DAYS_MAX: Final = 365
CAP_DAYS: Final = 30
ISSUED_MAX: Final = 1000
"""Listed at a time: each is a signature, and people get them, not machines."""
HELD_MAX: Final = 64
PAPERS_MAX: Final = 4
"""Certificates that travel with a grant: those of a founder whose key changed that often."""
_ISSUED: Final = "grants_issued"
_HELD: Final = "grants_held"
_Rows = list[tuple[int, bytes]]


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """A grant as `grants` lists it."""

    id: str
    issuer: PeerId
    holder: PeerId
    amount_micro_credits: MicroCredits
    not_after_unix_ms: int


class Grants:
    """Those that this node issued, those that it holds, and those that its neighbours show."""

    def __init__(
        self,
        key: Ed25519PrivateKey,
        settings: Settings,
        membership: Membership,
        book: NodeBook,
        jobs: Jobs,
    ) -> None:
        self.held: tuple[bytes, ...] = ()
        self._key = key
        self._settings = settings
        self._membership = membership
        self._book = book
        self._jobs = jobs
        self._issued: _Rows = []
        self._changing = trio.Lock()
        self._neighbours: dict[PeerId, tuple[bytes, ...]] = {}
        self._ends: dict[PeerId, int] = {}

    async def load(self) -> None:
        """What former runs issued and took."""
        issued = await self._jobs.setting(_ISSUED)
        self._issued = msgspec.msgpack.decode(issued, type=_Rows) if issued else []
        held = await self._jobs.setting(_HELD)
        self.held = msgspec.msgpack.decode(held, type=tuple[bytes, ...]) if held else ()

    # ------------------------------------------------------------------ issuing
    async def issue(self, holder: PeerId, amount: MicroCredits, days: int) -> Granted:
        """A grant for `holder`, counted durably against the cap before it exists.

        Raises:
            RequestError: BAD_REQUEST, no amount, or no number of days.
            RefusedError: OWNER_LIMIT, this node is no founder, or the cap is reached.
        """
        if amount <= 0 or not 0 < days <= DAYS_MAX:
            raise RequestError(
                "a grant is of some credits, for 1 to 365 days", next_step="grant PEER 5 --days 30"
            )
        if village.village_of(self._book.names[-1]) != self._membership.village:
            raise RefusedError(
                "only the founder of this village can grant", code="OWNER_LIMIT",
                next_step="ask the founder",
            )  # fmt: skip
        async with self._changing:
            now = _now()
            rows = self._counted(now)
            self._check_cap(rows, amount, now)
            grant = Grant(
                village=self._membership.village, issuer=peer_of(self._key), holder=holder,
                amount_micro_credits=amount, id=secrets.token_bytes(16),
                not_after_unix_ms=now + days * DAY_MS,
            )  # fmt: skip
            envelope = seal(self._key, "grant", grant)
            rows.append((now, envelope))
            await self._jobs.set_durably(_ISSUED, msgspec.msgpack.encode(rows))
            self._issued = rows
        return Granted(envelope=envelope, certificates=self._papers())

    def _counted(self, now: int) -> _Rows:
        """Without those that are over and count against no cap any more."""
        since = now - CAP_DAYS * DAY_MS
        return [row for row in self._issued if row[0] > since or _ends(row[1]) >= now]

    def _check_cap(self, rows: _Rows, amount: MicroCredits, now: int) -> None:
        since = now - CAP_DAYS * DAY_MS
        spent = sum(_read(row[1])[1].amount_micro_credits for row in rows if row[0] > since)
        left = self._settings.grant_cap_micro_credits - spent
        if amount > left or len(rows) >= ISSUED_MAX:
            raise RefusedError(
                f"the cap on grants leaves {max(0, left):,} micro-credits for now",
                code="OWNER_LIMIT",
                next_step=f"wait ({CAP_DAYS} days bring it back), or raise grant_cap_micro_credits",
            )

    def _papers(self) -> tuple[bytes, ...]:
        """What proves a founder that goes by a later key; the first needs nothing."""
        if peer_of(self._key) == self._book.names[-1]:
            return ()
        return self._membership.certificates[:PAPERS_MAX]

    # ------------------------------------------------------------------ holding
    async def take(self, granted: Granted) -> bool:
        """Keeps a grant to this node; False where it had it.

        Raises:
            RequestError: BAD_REQUEST, it is for somebody else, over, or not of this village.
        """
        now, names = _now(), self._book.names
        papers = self._papers_of(granted.certificates[:PAPERS_MAX], now)
        if self._good(granted.envelope, names, papers, now) is None:
            raise token.bad("grant", "it is for another node, another village, or over")
        async with self._changing:
            if granted.envelope in self.held:
                return False
            if granted.certificates:
                home = self._membership.village
                await self._membership.store(home, granted.certificates[:PAPERS_MAX])
            good = [envelope for envelope in self.held if _ends(envelope) >= now]
            self.held = (*good, granted.envelope)[-HELD_MAX:]
            await self._jobs.set_setting(_HELD, msgspec.msgpack.encode(self.held))
        return True

    def said(self) -> tuple[bytes, ...]:
        """What the hello carries: the largest that are not over."""
        now = _now()
        good = [envelope for envelope in self.held if _ends(envelope) >= now]
        good.sort(key=lambda envelope: -_read(envelope)[1].amount_micro_credits)
        return tuple(good[:GRANTS_MAX])

    # ------------------------------------------------------------------ lending
    def met(self, peer: PeerId, envelopes: Sequence[bytes]) -> None:
        """What a neighbour's hello shows."""
        self._neighbours[peer] = tuple(envelopes[:GRANTS_MAX])

    def showed(self, peer: PeerId, envelope: bytes) -> bool:
        """A neighbour shows one more, in the place of the oldest; False where it is old news."""
        known = self._neighbours.get(peer)
        if known is None or envelope in known:
            return False
        self._neighbours[peer] = (*known, envelope)[-GRANTS_MAX:]
        return True

    def left(self, peer: PeerId) -> None:
        self._neighbours.pop(peer, None)
        self._ends.pop(peer, None)

    def guaranteed(self, peer: PeerId, certificates: Iterable[bytes]) -> MicroCredits:
        """What grants let a neighbour owe on top of its certificate's line: at most our cap."""
        now, names = _now(), self._book.names_of(peer)
        papers = self._papers_of(certificates, now)
        grants = {}
        for envelope in self._neighbours.get(peer, ()):
            grant = self._good(envelope, names, papers, now)
            if grant is not None:
                grants[grant.id] = grant  # shown twice, it counts once
        if grants:
            self._ends[peer] = min(grant.not_after_unix_ms for grant in grants.values())
        cap = self._settings.village_grant_cap_micro_credits
        cap = self._settings.village_line_micro_credits if cap is None else cap
        return min(cap, sum(grant.amount_micro_credits for grant in grants.values()))

    def over(self) -> list[PeerId]:
        """The neighbours with a grant that counted and is over since the last look."""
        now = _now()
        found = [peer for peer, end in self._ends.items() if end < now]
        for peer in found:
            del self._ends[peer]
        return found

    def _papers_of(self, certificates: Iterable[bytes], now: int) -> list[Certificate]:
        """Of theirs and ours, those that are right: whoever issues may be known to either."""
        home = self._membership.village
        theirs = tuple(certificates)[:CERTIFICATES_MAX]
        return village.checked((*theirs, *self._membership.certificates), home, now)

    def _good(
        self, envelope: bytes, names: Sequence[PeerId], papers: Sequence[Certificate], now: int
    ) -> Grant | None:
        """The grant, if somebody who may signed it to a peer of these ids and it is not over."""
        try:
            signer, grant = _read(envelope)
        except PeerError:
            return None  # one forged grant must not hide a good one
        is_current = now <= grant.not_after_unix_ms <= now + (DAYS_MAX + 1) * DAY_MS
        home = self._membership.village
        if signer != grant.issuer or grant.village != home or grant.holder not in names:
            return None
        issuers = self._book.names_of(grant.issuer)
        return grant if is_current and village.may_invite(papers, issuers, home) else None

    # ------------------------------------------------------------------ shown
    def listing(self) -> dict[str, list[Shown]]:
        """Issued and held, those that are over left out."""
        now = _now()
        issued = [envelope for _, envelope in self._issued if _ends(envelope) >= now]
        held = [envelope for envelope in self.held if _ends(envelope) >= now]
        return {"issued": [_shown(e) for e in issued], "held": [_shown(e) for e in held]}


def to_token(granted: Granted) -> str:
    """A grant as a word to hand on."""
    return token.to_text(TOKEN_PREFIX, codec.encode(granted))


def from_token(text: str) -> Granted:
    """Raises: RequestError: BAD_REQUEST, the token is cut, changed or not one."""
    raw = token.from_text(TOKEN_PREFIX, text, "grant")
    try:
        granted = codec.decode(raw)
    except PeerError as error:
        raise token.bad("grant", error.message) from None
    if not isinstance(granted, Granted):
        raise token.bad("grant", "it is something else")
    return granted


def _read(envelope: bytes) -> tuple[PeerId, Grant]:
    return unseal(envelope, "grant", Grant)


def _ends(envelope: bytes) -> int:
    return _read(envelope)[1].not_after_unix_ms


def _shown(envelope: bytes) -> Shown:
    _, grant = _read(envelope)
    return Shown(
        id=grant.id.hex(), issuer=grant.issuer, holder=grant.holder,
        amount_micro_credits=grant.amount_micro_credits,
        not_after_unix_ms=grant.not_after_unix_ms,
    )  # fmt: skip


def _now() -> int:
    return int(time.time() * 1000)
