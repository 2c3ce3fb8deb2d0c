"""Which invites this node made: how often each may be used, by whom it was, what was taken back.

Tables of their own in jobs.db, made when first needed: an older program leaves them alone. The
token itself is not kept here; whoever has it can join, and a backup or a log is no place for it.
"""

from __future__ import annotations

import time
from typing import Any, Final

import apsw
import msgspec

from aivillage.node.jobs import Jobs
from aivillage.protocols.errors import RefusedError, RequestError
from aivillage.protocols.papers import Invite
from aivillage.protocols.types import MicroCredits, PeerId

USES_MAX: Final = 1000
DAYS_MAX: Final = 365
NOTE_MAX: Final = 200
"""Characters."""
LISTED_MAX: Final = 200
GUESTS_LISTED_MAX: Final = 50
"""Of each invite: what surely fits a frame."""
ID_DIGITS: Final = 8
ID_LEAST: Final = 4

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS invite(
  nonce BLOB PRIMARY KEY, uses INTEGER NOT NULL, line INTEGER NOT NULL, note TEXT NOT NULL,
  made REAL NOT NULL, ends REAL NOT NULL, revoked REAL) STRICT;
CREATE TABLE IF NOT EXISTS invite_use(
  nonce BLOB NOT NULL, guest TEXT NOT NULL, at REAL NOT NULL,
  PRIMARY KEY(nonce, guest)) STRICT, WITHOUT ROWID;
"""


class Guest(msgspec.Struct, frozen=True):
    """Who came by an invite, and when."""

    peer: PeerId
    at_unix: float


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """One invite as its maker sees it. `state`: open, used up, expired or revoked."""

    id: str
    state: str
    uses: int
    uses_left: int
    line_micro_credits: MicroCredits
    note: str
    made_unix: float
    ends_unix: float
    guests: tuple[Guest, ...]


class Invites:
    """The store. Every method is one transaction."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._ready = False

    async def _run(self, work: Any) -> Any:
        def transaction(db: apsw.Connection) -> Any:
            if not self._ready:
                _prepare(db)
            return work(db)

        found = await self._jobs.transaction(transaction)
        self._ready = True
        return found

    async def add(self, invite: Invite, uses: int, note: str) -> None:
        row = (invite.nonce, uses, invite.line_micro_credits, note, time.time(),
               invite.not_after_unix_ms / 1000)  # fmt: skip
        await self._run(
            lambda db: db.execute(
                "INSERT INTO invite(nonce, uses, line, note, made, ends) VALUES(?,?,?,?,?,?)", row
            )
        )

    async def use(self, nonce: bytes, guest: PeerId) -> None:
        """Counts `guest` as one use. The same guest may ask again: its answer may have been lost.

        An invite that is not in the table is of an earlier version of this program: good once.

        Raises:
            RefusedError: OWNER_LIMIT, it was taken back or is used up.
        """

        def work(db: apsw.Connection) -> str:
            uses, revoked = db.execute(
                "SELECT uses, revoked FROM invite WHERE nonce=?", (nonce,)
            ).get or (1, None)
            if revoked is not None:
                return "this invite was revoked by its maker"
            guests = {
                g for (g,) in db.execute("SELECT guest FROM invite_use WHERE nonce=?", (nonce,))
            }
            if guest in guests:
                return ""
            if len(guests) >= uses:
                return "this invite was used already" + (f", {uses} times" if uses > 1 else "")
            row = (nonce, guest, time.time())
            db.execute("INSERT INTO invite_use(nonce, guest, at) VALUES(?,?,?)", row)
            return ""

        refusal = await self._run(work)
        if refusal:
            raise RefusedError(
                refusal,
                code="OWNER_LIMIT",
                next_step="ask for a new one: `aivillage-node invite`",
            )

    async def revoke(self, name: str) -> Listed:
        """Takes back the invite whose id begins with `name`; who came by it stays a member.

        Raises:
            RequestError: BAD_REQUEST, there is not exactly one.
        """
        name = name.lower()
        found = [one for one in await self.listing() if one.id.startswith(name)]
        if len(name) < ID_LEAST or len(found) != 1:
            raise RequestError(
                f"no single invite begins with {name!r}", next_step="aivillage-node invite --list"
            )

        def work(db: apsw.Connection) -> None:
            db.execute(
                "UPDATE invite SET revoked=coalesce(revoked, ?) WHERE hex(nonce) LIKE ?",
                (time.time(), found[0].id + "%"),
            )

        await self._run(work)
        return msgspec.structs.replace(found[0], state="revoked", uses_left=0)

    async def listing(self) -> list[Listed]:
        """The newest first."""

        def work(db: apsw.Connection) -> list[Listed]:
            rows = db.execute(
                "SELECT nonce, uses, line, note, made, ends, revoked FROM invite"
                " ORDER BY made DESC LIMIT ?",
                (LISTED_MAX,),
            ).fetchall()
            return [_listed(db, row, time.time()) for row in rows]

        found: list[Listed] = await self._run(work)
        return found


def _prepare(db: apsw.Connection) -> None:
    """Makes the tables, and takes over what an earlier version noted of its invites."""
    db.execute(_SCHEMA)
    if db.execute("SELECT 1 FROM sqlite_master WHERE name='used_invite'").get:
        db.execute("INSERT OR IGNORE INTO invite_use SELECT nonce, guest, at FROM used_invite")


def _listed(db: apsw.Connection, row: tuple[Any, ...], now: float) -> Listed:
    nonce, uses, line, note, made, ends, revoked = row
    count = db.execute("SELECT count(*) FROM invite_use WHERE nonce=?", (nonce,)).get
    guests: list[Any] = db.execute(
        "SELECT guest, at FROM invite_use WHERE nonce=? ORDER BY at LIMIT ?",
        (nonce, GUESTS_LISTED_MAX),
    ).fetchall()
    state = "open"
    if revoked is not None:
        state = "revoked"
    elif count >= uses:
        state = "used up"
    elif ends < now:
        state = "expired"
    return Listed(
        id=nonce.hex()[:ID_DIGITS],
        state=state,
        uses=uses,
        uses_left=uses - count if state == "open" else 0,
        line_micro_credits=line,
        note=note,
        made_unix=made,
        ends_unix=ends,
        guests=tuple(Guest(peer, at) for peer, at in guests),
    )


def check(uses: int, days: int, note: str) -> None:
    """Raises: RequestError: BAD_REQUEST, one of them is out of bounds."""
    if not 1 <= uses <= USES_MAX:
        raise RequestError(f"an invite has 1 to {USES_MAX} uses, not {uses}", next_step="--uses 5")
    if not 1 <= days <= DAYS_MAX:
        raise RequestError(
            f"an invite lasts 1 to {DAYS_MAX} days, not {days}", next_step="--days 7"
        )
    if len(note) > NOTE_MAX:
        raise RequestError(f"a note has at most {NOTE_MAX} characters", next_step="make it shorter")
