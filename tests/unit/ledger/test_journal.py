"""The journal, judged by beancount itself: no errors, the same balances, and no forgery passes."""

import re
from decimal import Decimal

import pytest
from beancount import loader
from beancount.core.data import Balance, Open, Transaction
from beancount.core.realization import compute_balance, realize

from aivillage.ledger import books, corrections, queries
from aivillage.ledger.journal import ACCOUNTS, account_name, beancount, decimal
from aivillage.protocols.types import AMOUNT_MAX
from tests.unit.ledger.pairs import NAMES, traded
from tests.unit.ledger.test_steps import BUYER, SELLER, WALLET, A, book


def journal(db):
    pieces = []
    count = queries.run(db, beancount(pieces.append))
    return "".join(pieces), count


def loaded(text):
    entries, errors, _ = loader.load_string(text)
    return entries, [error.message for error in errors]


def held(entries, account):
    """What beancount makes of an account, in micro-credits."""
    found = realize(entries)
    for part in account.split(":"):
        found = found.get(part)
    position = compute_balance(found).get_only_position()
    return int(position.units.number * 1_000_000)


def test_beancount_finds_no_error_and_the_same_balances():
    for db, peer, net in zip(traded(), (SELLER, BUYER), (-60, 55), strict=True):
        text, count = journal(db)
        entries, errors = loaded(text)
        assert errors == []
        assert count == len([e for e in entries if isinstance(e, Transaction)])
        assert held(entries, f"Assets:Mesh:{peer}") == net
        assert queries.run(db, queries.balance()).net == net
        (assertion,) = (e for e in entries if isinstance(e, Balance))
        assert assertion.amount.number == Decimal(net) / 1_000_000


def test_a_transaction_says_which_voucher_and_attempt_it_is():
    buyer, _ = traded()
    entries, _ = loaded(journal(buyer)[0])
    third = [entry for entry in entries if isinstance(entry, Transaction)][2]
    assert third.meta["kind"] == "pay"
    assert (third.meta["seq"], third.meta["voucher_n"], third.meta["lane"]) == (
        3,
        3,
        WALLET.lane.hex(),
    )
    assert third.payee == SELLER
    attempts = [posting.meta.get("attempt") for posting in third.postings]
    assert attempts == [None, NAMES[1].hex(), NAMES[2].hex()]


def test_a_changed_amount_fails_by_as_little_as_one_micro_credit():
    text, _ = journal(traded()[0])
    amounts = list(re.finditer(r"(-?\d+\.\d{6})(?= (?:~ 0 )?MESH$)", text, re.MULTILINE))
    assert len(amounts) == 12
    for amount in amounts:
        more = f"{Decimal(amount[1]) + Decimal('0.000001'):f}"
        _, errors = loaded(text[: amount.start()] + more + text[amount.end() :])
        assert errors, text[amount.start() - 60 : amount.end()]


def test_a_dropped_entry_fails():
    text, _ = journal(traded()[0])
    parts = re.split(r"\n(?=\d{4}-\d\d-\d\d \*)", text)
    for index in range(1, len(parts) - 1):
        _, errors = loaded("\n".join(parts[:index] + parts[index + 1 :]))
        assert errors


def test_a_correction_is_a_transaction_without_a_voucher():
    _, seller = traded()
    with seller:
        corrections.write_off(seller, BUYER, 20, "gone", 86_400_000)
    entries, errors = loaded(journal(seller)[0])
    assert errors == []
    last = [entry for entry in entries if isinstance(entry, Transaction)][-1]
    assert (last.meta["kind"], "lane" in last.meta, "voucher_n" in last.meta) == (
        "write-off",
        False,
        False,
    )
    assert held(entries, "Assets:MeshDoubtful") == -20
    assert held(entries, "Expenses:Mesh:Writeoff") == 20
    assert held(entries, f"Assets:Mesh:{BUYER}") == 55


def test_every_account_of_the_schema_is_in_the_table():
    ((sql,),) = book(A).execute("SELECT sql FROM sqlite_schema WHERE name = 'posting'").fetchall()
    names = re.search(r"account IN \(([^)]*)\)", sql)
    assert set(re.findall(r"'(\w+)'", names[1])) == {"peer", *ACCOUNTS}


def test_large_amounts_stay_exact():
    db = book(A)
    with db:
        books.ensure_peer(db, SELLER)
        legs = [books.Leg("peer", None, -AMOUNT_MAX), books.Leg("unlabelled", None, AMOUNT_MAX)]
        books.post(db, books.Cause(SELLER, WALLET.lane, 1, b"", "pay"), legs, 1)
    entries, errors = loaded(journal(db)[0])
    assert errors == []
    assert held(entries, "Equity:Mesh:Unlabelled") == AMOUNT_MAX


@pytest.mark.parametrize(
    ("account", "name"),
    [
        ("earned", "Income:Mesh:Earned"),
        ("doubtful", "Assets:MeshDoubtful"),
        ("something new", "Equity:Mesh:Something-New"),
        ("grant:2nd", "Equity:Mesh:Grant-2nd"),
    ],
)
def test_any_account_of_a_book_has_a_name_that_beancount_takes(account, name):
    assert account_name(account, SELLER) == name
    entries, errors = loaded(f"1970-01-01 open {name} MESH\n")
    assert (errors, [e.account for e in entries if isinstance(e, Open)]) == ([], [name])


def test_an_empty_book_is_an_empty_journal():
    text, count = journal(book(A))
    assert count == 0
    assert loaded(text)[1] == []


def test_decimals_are_exact():
    assert [decimal(n) for n in (0, 1, -1_000_000, -269)] == [
        "0.000000",
        "0.000001",
        "-1.000000",
        "-0.000269",
    ]
