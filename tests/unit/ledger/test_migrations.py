"""Books that older versions wrote, opened by this one."""

import shutil
from pathlib import Path

import apsw
import pytest

from aivillage.ledger import books
from aivillage.ledger.audit import audit
from aivillage.ledger.ledger import open_ledger
from aivillage.ledger.queries import balance, run
from aivillage.protocols.errors import ConfigError
from aivillage.protocols.types import peer_id
from tests.house import ROOT
from tests.unit.ledger.test_steps import B_KEY, BUYER, NOW, SELLER, A, B

DATA = ROOT / "tests" / "data"
NET = {"buyer": -1_920, "seller": 1_920}
KEYS = {"buyer": A, "seller": B}


@pytest.fixture
def old(tmp_path: Path):
    """A copy of a book that schema 1 wrote: 3 boots, 24 jobs, 48 vouchers, one lost."""

    def copy(name):
        path = tmp_path / f"{name}.db"
        shutil.copy(DATA / f"ledger_v1_{name}.db", path)
        return path

    return copy


def opened(path):
    db = apsw.Connection(str(path))
    books.configure(db)
    return db


def entries(db):
    return books.rows(db, "SELECT * FROM entry ORDER BY seq")


def columns(db, *tables):
    return {t: [name for _, name, *_ in books.rows(db, f"PRAGMA table_info({t})")] for t in tables}


def kept(db, shape):
    """All rows of these tables, as far as these columns go."""
    return {
        table: books.rows(db, f"SELECT {', '.join(names)} FROM {table} ORDER BY {', '.join(names)}")
        for table, names in shape.items()
    }


_MISPLACED = """
  SELECT count(*) FROM item i WHERE NOT EXISTS (
    SELECT 1 FROM voucher_out v WHERE i.mine = 1 AND v.id = i.voucher
      AND (v.peer, v.lane, v.n) = (i.peer, i.lane, i.last_n)
    UNION ALL SELECT 1 FROM voucher_in v WHERE i.mine = 0 AND v.id = i.voucher
      AND (v.peer, v.lane, v.n) = (i.peer, i.lane, i.last_n))
"""


@pytest.mark.parametrize("name", ["buyer", "seller"])
def test_a_book_of_schema_1_keeps_every_entry_proof_and_balance(old, name):
    db = opened(old(name))
    shape = columns(db, "posting", "voucher_in", "voucher_out", "item")
    before = kept(db, shape)
    was = entries(db)
    books.prepare(db, KEYS[name].public_key, NOW)
    assert entries(db) == was
    assert kept(db, shape) == before
    assert books.one(db, _MISPLACED) == (0,)
    report = run(db, audit(KEYS[name].verify))
    assert report.ok, report.first_error
    assert run(db, balance()).net == NET[name]
    assert books.one(db, "PRAGMA integrity_check") == ("ok",)
    assert books.rows(db, "PRAGMA foreign_key_check") == []
    assert not [t for (t,) in books.rows(db, "SELECT name FROM sqlite_schema") if "old_" in t]
    books.prepare(db, KEYS[name].public_key, NOW)  # and it is done once
    assert entries(db) == was


def test_what_counts_as_paid_and_confirmed_is_taken_over(old):
    seller, buyer = opened(old("seller")), opened(old("buyer"))
    books.prepare(seller, B.public_key, NOW)
    books.prepare(buyer, A.public_key, NOW)
    assert books.rows(seller, "SELECT service, sealed FROM lane_in ORDER BY lane") == [
        (640, 1), (640, 1), (640, 0),
    ]  # fmt: skip
    assert books.rows(buyer, "SELECT service, confirmed FROM lane_out") == [(640, 560)] * 3
    (pair,) = books.read_pairs(seller)
    assert (pair.known, pair.line, pair.exposure, pair.paid) == (1, 10_000, 2_000, 1_920)


def test_the_rules_of_today_hold_for_an_old_book(old):
    db = opened(old("buyer"))
    books.prepare(db, A.public_key, NOW)
    for statement in ("UPDATE entry SET at_ms = 1", "DELETE FROM voucher_out", "DELETE FROM item"):
        with pytest.raises(apsw.ConstraintError):
            db.execute(statement)


async def test_an_old_book_that_breaks_the_rules_is_refused_and_left_alone(old):
    path = old("seller")
    db = opened(path)
    db.execute("DROP TRIGGER posting_kept")
    db.execute("UPDATE posting SET amount = amount + 1 WHERE seq = 3 AND leg = 0")
    db.close()
    with pytest.raises(ConfigError, match="restore it from a backup"):
        async with open_ledger(path, B_KEY):
            pytest.fail("opened")
    db = opened(path)
    assert books.one(db, "PRAGMA user_version") == (1,)
    assert len(entries(db)) == 47


# ------------------------------------------------------------------ schemas 2 and 3


@pytest.fixture
def later(tmp_path: Path):
    """A copy of a book that schema 2 wrote: compacted, with corrections, favours and proofs.

    Or of the same one after schema 3 took it over.
    """

    def copy(name, version=2):
        path = tmp_path / f"{name}.db"
        shutil.copy(DATA / f"ledger_v{version}_{name}.db", path)
        return opened(path)

    return copy


_KEPT = ("entry", "posting", "memo", "voucher_in", "voucher_out", "item", "favour", "bal")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("name", ["buyer", "seller"])
def test_a_later_book_keeps_every_row_and_passes_the_audit_of_today(later, name, version):
    db = later(name, version)
    assert books.one(db, "PRAGMA user_version") == (version,)
    shape = columns(db, *_KEPT)
    before = kept(db, shape)
    books.prepare(db, KEYS[name].public_key, NOW)
    assert kept(db, shape) == before
    assert books.one(db, _MISPLACED) == (0,)
    report = run(db, audit(KEYS[name].verify))
    assert report.ok, report.first_error
    assert books.rows(db, "SELECT peer, worth FROM favour_sum") == [(THIRD, 18)]
    assert books.one(db, "PRAGMA integrity_check") == ("ok",)
    books.prepare(db, KEYS[name].public_key, NOW)  # and it is done once


THIRD = peer_id(bytes([7]) * 32)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_migrated_book_has_the_schema_of_a_new_one(later, old, version):
    db = later("seller", version) if version > 1 else opened(old("seller"))
    books.prepare(db, B.public_key, NOW)
    shape = "SELECT type, name, sql FROM sqlite_schema WHERE sql NOT NULL ORDER BY name"
    new = apsw.Connection(":memory:")
    books.prepare(new, B.public_key, NOW)
    assert books.rows(db, shape) == books.rows(new, shape)


def test_what_counts_as_confirmed_is_what_receipts_still_prove(later):
    """Compaction of schema 2 dropped receipts that nothing can be shown for any more."""
    db = later("buyer")
    assert books.rows(db, "SELECT confirmed FROM lane_out") == [(40,)]
    books.prepare(db, A.public_key, NOW)
    assert books.rows(db, "SELECT confirmed FROM lane_out") == [(0,)]


def test_a_proof_against_a_copy_of_oneself_no_longer_accuses_who_showed_it(later):
    db = later("buyer")
    assert books.rows(db, "SELECT payer FROM evidence") == [(SELLER,)]
    books.prepare(db, A.public_key, NOW)
    assert books.rows(db, "SELECT payer FROM evidence") == [(BUYER,)]


@pytest.mark.parametrize(
    ("legs", "kind"),
    [
        ([("peer", 1_000_000), ("gift", -1_000_000)], "write-back"),
        ([("doubtful", 1_000), ("writeoff", -1_000)], "write-back"),
        ([("doubtful", -5), ("writeoff", 6), ("gift", -1)], "write-off"),
    ],
)
def test_a_book_of_schema_2_that_credited_itself_is_refused_and_left_alone(later, legs, kind):
    db = later("seller")
    with db:
        wanted = [books.Leg(account, None, amount) for account, amount in legs]
        books.correct(db, BUYER, kind, "mine now", wanted, NOW)  # schema 2 let it in
    with pytest.raises(apsw.ConstraintError, match="is no correction"):
        books.prepare(db, B.public_key, NOW)
    assert books.one(db, "PRAGMA user_version") == (2,)
    assert books.rows(db, "SELECT name FROM sqlite_schema WHERE name = 'favour_sum'") == []
