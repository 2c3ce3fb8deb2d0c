"""statement, verify-statement, history and export as a person types them, without a daemon."""

import csv
import io
import json
import os
import subprocess
import sys

import apsw
import pytest
from beancount import loader

from aivillage.cli import main, output, times
from aivillage.node.attempts import attempts_of
from aivillage.protocols.errors import ConfigError, RequestError
from tests.unit.ledger.pairs import NAMES, traded
from tests.unit.ledger.test_steps import BUYER, SELLER, B, book, exposure, forged, item, take

JOB = "c0ffee" + "0" * 26


@pytest.fixture
def node(tmp_path):
    """The buyer's data folder: its book, and a job that took attempt 1."""
    buyer, _ = traded()
    buyer.execute("VACUUM INTO ?", (str(tmp_path / "ledger.db"),))
    jobs = apsw.Connection(str(tmp_path / "jobs.db"))
    jobs.execute("CREATE TABLE attempt(id BLOB PRIMARY KEY, job TEXT)")
    jobs.execute("INSERT INTO attempt VALUES (?, ?), (?, 'ab')", (NAMES[1], JOB, bytes(16)))
    jobs.close()
    return tmp_path


@pytest.fixture
def run(node, capsys):
    def command(*words):
        code = main.main([*map(str, words), "--data-dir", str(node)])
        told = capsys.readouterr()
        return code, told.out, told.err

    return command


def test_a_statement_goes_to_a_file_and_is_verified_where_there_is_no_node(run, node):
    path = node / "proof.json"
    code, out, err = run("statement", "--peer", SELLER[-8:], "--output", path)
    assert (code, "verify-statement" in out, "It says: " in err) == (0, True, True)
    done = subprocess.run(
        [sys.executable, "-m", "aivillage.cli.main", "verify-statement", str(path)],
        env=os.environ | {"AIVILLAGE_DATA_DIR": "/nowhere/at/all"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    proven, not_proven = done.stdout.splitlines()
    assert f"{BUYER} owes {SELLER} 0.00006" in proven
    assert "left out" in not_proven


def test_a_statement_on_standard_output_is_the_document_alone(run, node):
    code, out, _ = run("statement", "--peer", SELLER)
    assert (code, json.loads(out)["net"]) == (0, -60)
    (node / "x.json").write_text(out)
    assert run("statement", "--peer", SELLER, "--json")[1].count("\n") == 1
    code, out, _ = run("verify-statement", node / "x.json", "--json")
    assert (code, json.loads(out)["amount"]) == (0, -60)


def test_a_changed_statement_ends_with_7_and_says_what_is_wrong(run, node):
    _, out, _ = run("statement", "--peer", SELLER)
    path = node / "x.json"
    path.write_text(out.replace('"net": -60', '"net": 60'))
    code, out, err = run("verify-statement", path)
    assert (code, out) == (7, "")
    assert "its net is 60, what was signed gives -60" in err
    path.write_text("{}")
    assert run("verify-statement", path)[0] == 7


def test_a_job_is_found_by_its_own_id_and_by_its_attempt(run):
    for name in (JOB[:6], JOB, NAMES[1].hex()[:4], NAMES[1].hex().upper()):
        code, out, _ = run("statement", "--peer", SELLER, "--job", name)
        assert (code, json.loads(out)["amount"]) == (0, 70), name
    code, _, err = run("statement", "--peer", SELLER, "--job", "ab")
    assert (code, "nothing was signed" in err) == (2, True)


def test_a_damaged_book_cannot_be_stated(run, node):
    db = apsw.Connection(str(node / "ledger.db"))
    db.execute("DROP TRIGGER voucher_out_kept")
    db.execute("UPDATE voucher_out SET signature = zeroblob(65)")
    db.close()
    code, out, err = run("statement", "--peer", SELLER)
    assert (code, out) == (7, "")
    assert "aivillage-node audit" in err


def test_evidence_shows_both_bodies_and_is_verified_where_there_is_no_node(run, node):
    code, out, err = run("evidence")
    assert (code, out, "Nobody contradicted itself" in err) == (0, "", True)
    seller = book(B)
    exposure.certify(seller, BUYER, 1_000, 160, 1)
    for voucher in (forged(1, 20, item(1, 20)), forged(1, 10, item(2, 10))):
        take(seller, voucher)
    (node / "ledger.db").unlink()
    seller.execute("VACUUM INTO ?", (str(node / "ledger.db"),))
    ((first, second),) = seller.execute("SELECT first_body, second_body FROM evidence").fetchall()
    code, out, _ = run("evidence")
    assert (code, f"{BUYER} contradicted itself" in out) == (0, True)
    assert first.hex() in out
    assert second.hex() in out
    code, out, _ = run("evidence", "--peer", BUYER[-6:], "--output", node / "lie.json")
    assert (code, "verify-statement" in out) == (0, True)
    code, out, _ = run("verify-statement", node / "lie.json")
    assert (code, "contradicted itself in writing" in out) == (0, True)
    code, out, _ = run("evidence", "--peer", BUYER, "--json")
    assert json.loads(out)["proofs"] == json.loads((node / "lie.json").read_text())["proofs"]
    assert len(json.loads(run("evidence", "--json")[1])) == 1
    path = node / "lie.json"
    path.write_text(path.read_text().replace(first.hex(), second.hex()))
    code, out, err = run("verify-statement", path)
    assert (code, out, "do not contradict" in err) == (7, "", True)


def test_evidence_in_a_file_is_about_one_payer_who_is_accused(run, node):
    assert run("evidence", "--output", node / "x.json")[0] == 2
    assert run("evidence", "--peer", SELLER, "--output", node / "x.json")[0] == 2
    assert not (node / "x.json").exists()


def test_history_as_csv_has_a_header_and_every_voucher(run):
    code, out, _ = run("history", "--csv", "--limit", 3)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert (code, out.count("\r\n"), len(rows)) == (0, 4, 3)
    assert rows[0] == {
        "seq": "5",
        "at": "1970-01-01T00:33:20+00:00",
        "kind": "receive",
        "peer": SELLER,
        "account": "earned",
        "attempt": NAMES[3].hex(),
        "amount_micro_credits": "40",
    }


def test_history_takes_its_filters_and_refuses_what_is_none(run):
    code, out, _ = run("history", "--json", "--peer", SELLER[-5:], "--kind", "receive")
    assert (code, [row["amount"] for row in json.loads(out)]) == (0, [40])
    assert json.loads(run("history", "--json", "--since", "7d")[1]) == []
    assert len(json.loads(run("history", "--json", "--until", "1970-01-02")[1])) == 6
    assert "-0.00005" in run("history")[1]
    for words in (("--since", "yesterday"), ("--limit", 0), ("--peer", "x")):
        assert run("history", *words)[0] == 2, words


def test_the_journal_goes_to_a_file_that_beancount_takes(run, node):
    path = node / "book.beancount"
    code, out, _ = run("export", "--beancount", "--output", path)
    assert (code, "5 entries" in out) == (0, True)
    entries, errors, _ = loader.load_file(str(path))
    assert (errors, len(entries)) == ([], 10)
    assert run("export", "--beancount")[1] == path.read_text()
    assert json.loads(run("export", "--beancount", "--json")[1])["journal"] == path.read_text()
    assert json.loads(run("export", "--beancount", "--output", path, "--json")[1])["entries"] == 5


def test_a_file_that_cannot_be_written_or_read_is_a_plain_refusal(run, node):
    for words in (
        ("statement", "--peer", SELLER, "--output", node / "no" / "where"),
        ("export", "--beancount", "--output", node),
        ("verify-statement", node / "missing"),
    ):
        code, _, err = run(*words)
        assert (code, "cannot be" in err) == (2, True), words


def test_a_file_that_is_cut_off_does_not_appear(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(ZeroDivisionError), output.writing(str(path)) as file:
        file.write("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_times_are_read_as_people_write_them():
    day = times.unix_ms("2026-11-01")
    assert times.unix_ms("2026-11-01", end=True) - day == 86_399_999
    assert times.unix_ms("2026-11-01T12:30", end=True) - day == 45_000_000
    assert times.unix_ms("2h") - times.unix_ms("1d") == pytest.approx(22 * 3_600_000, abs=5_000)
    for wrong in ("", "7", "7w", "99999d9", "2026-13-01", "99999999d"):
        with pytest.raises(RequestError, match="is no time"):
            times.unix_ms(wrong)


def test_attempts_of_a_job_are_none_without_jobs_and_a_damaged_file_is_named(tmp_path, node):
    assert attempts_of(node / "jobs.db", JOB[:4]) == [NAMES[1]]
    assert attempts_of(tmp_path / "none.db", JOB) == []
    assert attempts_of(node / "jobs.db", "c*") == []
    (node / "jobs.db").write_bytes(b"no database" * 200)
    with pytest.raises(ConfigError, match="cannot be read"):
        attempts_of(node / "jobs.db", JOB)
