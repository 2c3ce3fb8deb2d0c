"""What this node found out about others by doing their work again, kept in jobs.db.

In memory while the node runs, so that a choice waits for no disk. Only what was seen here counts:
nobody's word about somebody else is taken.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

import apsw
import msgspec

from aivillage.node import verifier
from aivillage.node.jobs import CHECK_OF, Jobs
from aivillage.node.store import Work as Writing
from aivillage.node.verifier import Answer, CutOff, Trust
from aivillage.protocols.errors import AivillageError, PeerError
from aivillage.protocols.types import JobId, MicroCredits, PeerId

KEYS_PER_PEER_MAX: Final = 64
"""Kernel classes are a peer's own word: one that makes them up is a newcomer in one row."""
EVIDENCE_MAX: Final = 200
"""The newest are kept: each has two or three whole answers."""
SPENDING_SECONDS: Final = 30 * 86_400.0
"""Back to where spending counts when the node starts."""

# Made at need, so that an older program can go on with the file; it passes them over.
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS trust(
  peer TEXT NOT NULL, operation TEXT NOT NULL, model TEXT NOT NULL, kernel TEXT NOT NULL,
  count INTEGER NOT NULL, done INTEGER NOT NULL, checked INTEGER NOT NULL, failed INTEGER NOT NULL,
  unsettled INTEGER NOT NULL, PRIMARY KEY(peer, operation, model, kernel)) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cut_off(
  peer TEXT NOT NULL, operation TEXT NOT NULL, faults INTEGER NOT NULL, since REAL NOT NULL,
  until REAL NOT NULL, PRIMARY KEY(peer, operation)) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS evidence(
  id INTEGER PRIMARY KEY, at REAL NOT NULL, loser TEXT NOT NULL, operation TEXT NOT NULL,
  job TEXT NOT NULL, reason TEXT NOT NULL, answers BLOB NOT NULL) STRICT;
"""


class Key(NamedTuple):
    """What trust is about: it does not pass from one model or machine to another."""

    peer: PeerId
    operation: str
    model: str
    kernel: str


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """Why somebody was found wrong: every answer with its makers' quotes, as they signed them.

    `loser` is empty where two disagreed and nobody could decide.
    """

    at: float
    loser: str
    operation: str
    job: str
    reason: str
    answers: tuple[Answer, ...] = ()


class Reputation:
    """Trust by key, cut-offs by peer and operation, and what checks cost."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._trust: dict[Key, Trust] = {}
        self._cut: dict[tuple[PeerId, str], CutOff] = {}
        self.jobs_spent: MicroCredits = 0
        self.checks_spent: MicroCredits = 0
        self.trusted_jobs_spent: MicroCredits = 0
        """Part of `jobs_spent` at peers that were trusted by then; since this start."""
        self.trusted_checks_spent: MicroCredits = 0
        self.unchecked: dict[str, int] = {}
        """Why a result that should have been done again was not, and how often since the start."""

    async def load(self) -> None:
        """What former runs found out."""
        since = time.time() - SPENDING_SECONDS

        def work(db: apsw.Connection) -> tuple[list[Any], list[Any], list[Any]]:
            db.execute(_SCHEMA)
            spent = "SELECT substr(job.parent, 1, ?) = ?, sum(attempt.price) FROM attempt"
            spent += " JOIN job ON job.id = attempt.job WHERE attempt.created >= ? GROUP BY 1"
            return (
                db.execute("SELECT * FROM trust").fetchall(),
                db.execute("SELECT * FROM cut_off").fetchall(),
                db.execute(spent, (len(CHECK_OF), CHECK_OF, since)).fetchall(),
            )

        trust, cut, spending = await self._jobs.transaction(work)
        self._trust = {Key(*row[:4]): Trust(*row[4:]) for row in trust}
        self._cut = {(row[0], row[1]): CutOff(*row[2:]) for row in cut}
        for is_check, amount in spending:
            self.spent(amount or 0, is_check=bool(is_check))

    async def rename(self, old: PeerId, new: PeerId) -> None:
        """A peer changed its key: what it did follows it, the wrong as well."""
        for key in [key for key in self._trust if key.peer == old]:
            self._trust[key._replace(peer=new)] = self._trust.pop(key)
        for place in [place for place in self._cut if place[0] == old]:
            self._cut[new, place[1]] = self._cut.pop(place)

        def work(db: apsw.Connection) -> None:
            for sql in (
                "UPDATE OR REPLACE trust SET peer=? WHERE peer=?",
                "UPDATE OR REPLACE cut_off SET peer=? WHERE peer=?",
                "UPDATE evidence SET loser=? WHERE loser=?",
            ):
                db.execute(sql, (new, old))

        await self._jobs.transaction(work)

    # ------------------------------------------------------------------ asked
    def of(self, key: Key) -> Trust:
        return self._trust.get(key, Trust())

    def kernels_of(self, peer: PeerId, operation: str, model: str) -> set[str]:
        """The kernel classes in which it did this before."""
        wanted = (peer, operation, model)
        return {key.kernel for key in self._trust if key[:3] == wanted}

    def is_cut_off(self, peer: PeerId, operation: str) -> bool:
        return self._cut.get((peer, operation), CutOff()).until > time.time()

    def cut_off(self, operation: str) -> Mapping[PeerId, AivillageError]:
        """Who gets no job of this operation now, and why, for whoever asks."""
        return {
            peer: PeerError(
                f"cut off until {_clock(cut.until)} for a wrong result",
                code="BAD_REQUEST",
                next_step=f"aivillage-node reputation {peer[-8:]}",
            )
            for (peer, about), cut in self._cut.items()
            if about == operation and cut.until > time.time()
        }

    def room(self, percent: int) -> MicroCredits:
        """What checks may still cost."""
        return verifier.room(self.jobs_spent, self.checks_spent, percent)

    # ------------------------------------------------------------------ told
    def spent(self, amount: MicroCredits, *, is_check: bool) -> None:
        """Books what a job or a check cost."""
        if is_check:
            self.checks_spent += amount
        else:
            self.jobs_spent += amount

    def spent_at_trusted(self, job: MicroCredits, check: MicroCredits) -> None:
        """A result of peers that are trusted, and what checking it cost."""
        self.trusted_jobs_spent += job
        self.trusted_checks_spent += check

    def left_out(self, reason: str) -> None:
        self.unchecked[reason] = self.unchecked.get(reason, 0) + 1

    def change(self, keys: Iterable[Key], how: Callable[[Trust], Trust]) -> None:
        """Moves what is known of each key one step on, and stores it soon."""
        changed = dict.fromkeys(map(self._kept_key, keys))
        for key in changed:
            self._trust[key] = how(self.of(key))
        self._jobs.later(self._stored(changed))

    def done(self, keys: Iterable[Key]) -> None:
        """A result came of each: counted at once, stored with many others."""
        for key in dict.fromkeys(map(self._kept_key, keys)):
            self._trust[key] = self.of(key).after_done()
            self._jobs.seldom(("trust", key), functools.partial(self._stored, [key]))

    def _stored(self, keys: Iterable[Key]) -> Writing[None]:
        """What stores these, as they are now."""
        rows = [(*key, *msgspec.structs.astuple(self.of(key))) for key in keys]
        sql = "INSERT OR REPLACE INTO trust VALUES(?,?,?,?,?,?,?,?,?)"

        def work(db: apsw.Connection) -> None:
            db.executemany(sql, rows)

        return work

    def _kept_key(self, key: Key) -> Key:
        """The key itself, or where its peer made up too many the one for all further ones."""
        if key in self._trust:
            return key
        known = sum(other.peer == key.peer for other in self._trust)
        return key if known < KEYS_PER_PEER_MAX else key._replace(model="", kernel="")

    async def found_wrong(self, key: Key, job: JobId, reason: str, *answers: Answer) -> None:
        """A result of its was wrong: trust begins anew, and it is left out for a while."""
        place = (key.peer, key.operation)
        self._cut[place] = cut = self._cut.get(place, CutOff()).after_wrong(time.time())
        self.change([key], Trust.after_wrong)
        await self._store_cut(place, cut)
        await self.keep_evidence(key.peer, key.operation, job, reason, *answers)

    async def forgive(self, peer: PeerId) -> int:
        """Ends what was held against a peer; how many operations that were. Trust stays at 0."""
        places = [place for place in self._cut if place[0] == peer]
        for place in places:
            self._cut[place] = CutOff()
            await self._store_cut(place, CutOff())
        return len(places)

    async def _store_cut(self, place: tuple[PeerId, str], cut: CutOff) -> None:
        row = (*place, *msgspec.structs.astuple(cut))
        await self._jobs.transaction(
            lambda db: db.execute("INSERT OR REPLACE INTO cut_off VALUES(?,?,?,?,?)", row)
        )

    async def keep_evidence(
        self, loser: str, operation: str, job: JobId, reason: str, *answers: Answer
    ) -> None:
        body = msgspec.msgpack.encode(answers)
        row = (time.time(), loser, operation, job, reason, body)

        def work(db: apsw.Connection) -> None:
            db.execute(
                "INSERT INTO evidence(at, loser, operation, job, reason, answers)"
                " VALUES(?,?,?,?,?,?)",
                row,
            )
            db.execute(
                "DELETE FROM evidence WHERE id <= (SELECT max(id) FROM evidence) - ?",
                (EVIDENCE_MAX,),
            )

        await self._jobs.transaction(work)

    async def evidence(self, peer: PeerId | None = None, limit: int = 20) -> list[Evidence]:
        """The newest first; of one peer, or of all."""
        sql = "SELECT at, loser, operation, job, reason, answers FROM evidence"
        sql += " WHERE loser = ? OR ? = '' ORDER BY id DESC LIMIT ?"
        rows: list[tuple[Any, ...]] = await self._jobs.transaction(
            lambda db: db.execute(sql, (peer or "", peer or "", limit)).fetchall()
        )
        return [
            Evidence(
                at=row[0], loser=row[1], operation=row[2], job=row[3], reason=row[4],
                answers=msgspec.msgpack.decode(row[5], type=tuple[Answer, ...]),
            )
            for row in rows
        ]  # fmt: skip

    # ------------------------------------------------------------------ shown
    def peers(self) -> list[PeerId]:
        """Everybody of whom anything is known, by name."""
        return sorted({key.peer for key in self._trust} | {peer for peer, _ in self._cut})

    def listing(self, peer: PeerId) -> list[dict[str, Any]]:
        """A row for each key of one peer, with its cut-off."""
        rows = []
        for key in sorted(key for key in self._trust if key.peer == peer):
            trust, cut = self.of(key), self._cut.get((peer, key.operation), CutOff())
            row = key._asdict() | msgspec.structs.asdict(trust) | msgspec.structs.asdict(cut)
            rows.append(row | {"chance": round(trust.chance, 4)})
        return rows

    def spending(self, percent: int) -> dict[str, Any]:
        """What checks cost, beside what jobs did, within 30 days before this start and since."""
        return {
            "jobs_micro_credits": self.jobs_spent,
            "checks_micro_credits": self.checks_spent,
            "checks_percent": round(100 * self.checks_spent / max(1, self.jobs_spent), 1),
            "room_micro_credits": self.room(percent),
            "verify_percent_max": percent,
            "trusted_checks_percent": round(
                100 * self.trusted_checks_spent / max(1, self.trusted_jobs_spent), 1
            ),
            "unchecked": dict(self.unchecked),
        }


def _clock(unix: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix))
