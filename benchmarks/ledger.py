"""What the ledger costs: payments a second, a million entries, ten thousand peers, the audit.

    python benchmarks/ledger.py [--quick] [--json]

Payments: 8 payers in one process, 8 payees in another, each payer with one payment to each payee
under way, so 64 vouchers are in flight (see payments.py). A payment is intended, delivered,
settled with a voucher of its own, durable in both books, receipted and attested; `p99_ms` is from
the call of settle to the receipt, whose signature says that the payee has it on disk. The books
batch what ends while one signs for the same peer, so `jobs_per_s`, 64 under way between two
nodes, counts jobs and `vouchers_per_job` says how many vouchers they took. `cpu_us_per_voucher`
is the process of one node with 64 neighbours, the dearer of payer and payee, wire included, with
receipts as the daemon gives them: up to 32 vouchers in one, within a second. `_eager` has a receipt
for each voucher, as the rates above; `verify_us` and `sign_us` say how fast this machine is.
Machines are noisy: of several rounds the best counts, and `_worst` is the other end.
`fsync_ms` is fdatasync of one page in the same folder, below /var/tmp: /tmp may be memory.

`bytes_per_job` is what a book grew, less an empty one, both after VACUUM INTO. The large book is
made by `payer.make_voucher` in large transactions, through every trigger, with a signer that does
not sign. `audit_entries_per_s` times the pass over chain, postings, causes and balances,
`audit_signatures_per_s` the pass over really signed vouchers; `ceiling_signatures_per_s` is what
`is_signed_by` alone does here on one core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import apsw
import psutil
import trio
from claims import ROOT, Claims, main, script_sha256
from payments import AMOUNT, OUT, QUOTE, WARM_JOBS, Crowd, Outcome, key_of, measured

from aivillage.ledger import audit, books, exposure, payer
from aivillage.ledger.ledger import open_ledger
from aivillage.ledger.queries import run
from aivillage.ledger.reader import read_audit, read_balance
from aivillage.ledger.signing import Ed25519Signer
from aivillage.protocols.envelope import is_signed_by, sign
from aivillage.protocols.types import PeerId, peer_id
from aivillage.protocols.vouchers import JOB, Item, lane_of

KEPT = ROOT / "benchmarks" / "results" / "ledger.json"
LARGE, SMALL, PEERS = 1_000_000, 100_000, 100
SIGNED = 20_000
KEY = key_of("payer", 0)
KNOWN = 10_000


def measure(claims: Claims, args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        claims.add("fsync_ms", fsync_ms(folder))
        measure_payments(claims, folder, *((40, 1) if args.quick else (150, 3)))
        measure_audit(claims, folder, quick=args.quick)
        measure_balance(claims, folder, quick=args.quick)
        measure_peers(claims, folder)


def fsync_ms(folder: Path) -> float:
    """p50 of writing a page and making it durable."""
    took = []
    with (folder / "page").open("wb") as file:
        for _ in range(200):
            file.write(bytes(4096))
            file.flush()
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took)


# payments


def measure_payments(claims: Claims, folder: Path, jobs: int, rounds: int) -> None:
    crowd = Crowd(8, 8, 1, jobs)
    outcomes = [paid(folder / f"crowd{number}", crowd) for number in range(rounds)]
    rates = [len(outcome.latencies) / outcome.seconds for outcome in outcomes]
    took = [sorted(1000 * seconds for seconds in outcome.latencies) for outcome in outcomes]
    p99_ms = [one[int(len(one) * 0.99)] for one in took]
    claims.add("durable_vouchers_per_s", max(rates), at_least=1000)
    claims.add("durable_vouchers_per_s_worst", min(rates))
    claims.add("p50_ms", min(map(statistics.median, took)))
    claims.add("p99_ms", min(p99_ms), at_most=100)
    claims.add("p99_ms_worst", max(p99_ms))
    measure_bytes(claims, folder / "crowd0", crowd)
    measure_node(claims, folder, jobs, rounds)
    outcome = paid(folder / "two", Crowd(1, 1, 64, jobs))
    claims.add("jobs_per_s", len(outcome.latencies) / outcome.seconds)
    ((vouchers, jobs_paid),) = ask(
        folder / "two" / "payer0" / "ledger.db",
        "SELECT (SELECT count(*) FROM voucher_out), (SELECT count(*) FROM item)",
    )
    claims.add("vouchers_per_job", vouchers / jobs_paid)


def measure_node(claims: Claims, folder: Path, jobs: int, rounds: int) -> None:
    """What a payment costs one node with 64 neighbours, as their payer and as their payee."""
    for index, (side, shape) in enumerate((("payer", (1, 64)), ("payee", (64, 1)))):
        for suffix, eager in (("", False), ("_eager", True)):
            spent = []
            for number in range(rounds):
                crowd = Crowd(*shape, 1, jobs, eager)
                outcome = paid(folder / f"{side}{suffix}{number}", crowd)
                spent.append(1e6 * outcome.cpu_seconds[index] / len(outcome.latencies))
            claims.add(f"{side}_cpu_us_per_voucher{suffix}", min(spent))
    dearer = max(claims.found[f"{side}_cpu_us_per_voucher"] for side in ("payer", "payee"))
    claims.add("cpu_us_per_voucher", dearer, at_most=300)


def paid(folder: Path, crowd: Crowd) -> Outcome:
    """A run whose books all pass: each job paid once, receipted, attested."""
    folder.mkdir()
    outcome = measured(crowd, folder)
    jobs = (crowd.jobs + WARM_JOBS) * crowd.depth * len(crowd.pairs)
    items = unpaid = vouchers = 0
    for path in folder.glob("*/ledger.db"):
        report = read_audit(path)
        if not report.ok:
            raise SystemExit(f"{path}: {report.first_error}")
        ((count, open_),) = ask(
            path,
            "SELECT (SELECT count(*) FROM item WHERE mine = 1 AND final = 1),"
            " (SELECT count(*) FROM voucher_out WHERE coalesce(attest, 0) = 0)",
        )
        items, unpaid, vouchers = items + count, unpaid + open_, vouchers + report.vouchers
    if items != jobs or unpaid or (crowd.depth == 1 and vouchers != 2 * jobs):
        raise SystemExit(f"{items} of {jobs} jobs paid, {unpaid} not attested, {vouchers} vouchers")
    return outcome


def ask(path: Path, sql: str) -> list[Any]:
    with closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)) as db:
        return db.execute(sql).fetchall()


def measure_bytes(claims: Claims, folder: Path, crowd: Crowd) -> None:
    empty = bytes_of(make_book(folder / "empty.db", PEERS))
    jobs = (crowd.jobs + WARM_JOBS) * crowd.payees
    for side in ("payer", "payee"):
        grown = bytes_of(folder / f"{side}0" / "ledger.db") - empty
        claims.add(f"{side}_bytes_per_job", grown / jobs)
    sizes = (claims.found[f"{side}_bytes_per_job"] for side in ("payer", "payee"))
    claims.add("bytes_per_job", max(sizes), at_most=1500)


def bytes_of(path: Path) -> int:
    packed = path.with_suffix(".packed")
    with closing(apsw.Connection(str(path))) as db:
        db.execute("VACUUM INTO ?", (str(packed),))
    return packed.stat().st_size


# large books


class Unsigned:
    """A signer for books whose signatures nobody checks."""

    public_key = key_of("payer", 0).public_key().public_bytes_raw()

    def sign(self, prefixed: bytes) -> bytes:
        return bytes(65)

    def verify(self, public_key: bytes, prefixed: bytes, signature: bytes) -> bool:
        return True


def peers(count: int) -> list[PeerId]:
    """Names of `count` peers."""
    return [peer_id(number.to_bytes(32, "big")) for number in range(1, count + 1)]


def make_book(path: Path, known: int) -> Path:
    with closing(apsw.Connection(str(path))) as db:
        books.configure(db)
        books.prepare(db, Unsigned.public_key, 1)
        with db:
            for peer in peers(known):
                exposure.certify(db, peer, 10**9, 10**6, 1)
    return path


def grow_book(path: Path, entries: int, signer: Any) -> Path:
    """`entries` more jobs of one voucher each, paid round to the peers of the book."""
    neighbours, wallet = peers(PEERS), payer.Wallet(signer, lane_of(1, b"the lane"))
    with closing(apsw.Connection(str(path))) as db:
        books.configure(db)
        ((first,),) = db.execute("SELECT coalesce(max(seq), 0) FROM entry").fetchall()
        for start in range(first, first + entries, 10_000):
            with db:
                for number in range(start, min(start + 10_000, first + entries)):
                    attempt = number.to_bytes(16, "big")
                    item = Item(JOB, attempt, QUOTE, AMOUNT, OUT, True)
                    payer.make_voucher(db, wallet, neighbours[number % PEERS], [item], number)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return path


def measure_balance(claims: Claims, folder: Path, *, quick: bool) -> None:
    path = grow_book(make_book(folder / "large.db", PEERS), SMALL, Unsigned())
    claims.add("balance_small_ms", best_ms(lambda: read_balance(path)))
    if quick:
        take_kept(claims, ("balance_ms", "large_book_build_s"))
        return
    began = time.perf_counter()
    grow_book(path, LARGE - SMALL, Unsigned())
    claims.add("large_book_build_s", time.perf_counter() - began)
    claims.add("balance_ms", best_ms(lambda: read_balance(path)), at_most=50)


def take_kept(claims: Claims, names: tuple[str, ...]) -> None:
    """What takes too long for a quick run, from the kept results of today's script."""
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    for name in names:
        for key in (name, f"{name}_bar", f"{name}_ok"):
            if key in kept:
                claims.note(key, kept[key])
    claims.note("stamped", value=True)
    claims.note("stamped_ok", kept.get("script_sha256") == script_sha256())


def best_ms(call: Callable[[], Any], rounds: int = 5) -> float:
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        took.append(1000 * (time.perf_counter() - began))
    return min(took)


# the audit


def measure_audit(claims: Claims, folder: Path, *, quick: bool) -> None:
    signed = SIGNED // 4 if quick else SIGNED
    path = make_book(folder / "signed.db", PEERS)
    grow_book(path, signed, Ed25519Signer(key_of("payer", 0)))
    began = time.process_time()
    report = read_audit(path)
    claims.add("audit_whole_entries_per_s", report.entries / (time.process_time() - began))
    seconds = passes(path)
    claims.add("audit_signatures_per_s", signed / seconds["vouchers out"], at_least=7000)
    claims.add("verify_us", 1e6 * verify_seconds(2000))
    claims.add("sign_us", 1e6 * cpu_seconds(lambda: sign(KEY, bytes(150)), 2000))
    claims.add("ceiling_signatures_per_s", 1e6 / claims.found["verify_us"])
    path = grow_book(
        make_book(folder / "chain.db", PEERS), SMALL // (4 if quick else 1), Unsigned()
    )
    seconds = passes(path, lambda *_: True)
    chain = seconds["entries"] + seconds["balances"]
    claims.add("audit_entries_per_s", SMALL // (4 if quick else 1) / chain, at_least=50_000)


def passes(path: Path, verify: Any = is_signed_by) -> dict[str, float]:
    """CPU seconds of each pass of the audit."""
    with closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)) as db:
        marks = [("", time.process_time())]
        note = lambda name: marks.append((name, time.process_time()))  # noqa: E731
        report = run(db, audit.audit(verify, note))
    if not report.ok:
        raise SystemExit(f"{path}: {report.first_error}")
    return {name: at - before for (_, before), (name, at) in pairwise(marks)}


def verify_seconds(rounds: int) -> float:
    public, message = KEY.public_key().public_bytes_raw(), bytes(150)
    signature = sign(KEY, message)
    return cpu_seconds(lambda: is_signed_by(public, message, signature), rounds)


# many peers


def measure_peers(claims: Claims, folder: Path) -> None:
    path = make_book(folder / "peers.db", KNOWN)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=be_node, args=(path, theirs))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join(30)
    claims.add("rss_mb_10k_peers", found["rss_mb"], at_most=120)
    claims.add("tick_us_10k_peers", found["tick_us"])
    claims.add("tick_us_10k_links", found["tick_links_us"])


def be_node(path: Path, main_process: Any) -> None:
    """A process with the book open; tells what it weighs, and a tick with nobody and all here."""
    trio.run(_be_node, path, main_process)


async def _be_node(path: Path, main_process: Any) -> None:
    async with open_ledger(path, key_of("payer", 0)) as book:
        ledger = book._ledger
        for _ in range(10):
            ledger.tick()
        rss_mb = psutil.Process().memory_info().rss / 2**20
        alone_us = 1e6 * cpu_seconds(ledger.tick, 200)
        for peer in peers(KNOWN):
            book.connected(peer, 1, lambda _: None, 1)
        await trio.sleep(2)
        found = {"rss_mb": rss_mb, "tick_us": alone_us}
        main_process.send(found | {"tick_links_us": 1e6 * cpu_seconds(ledger.tick, 20)})


def cpu_seconds(call: Callable[[], Any], rounds: int) -> float:
    began = time.process_time()
    for _ in range(rounds):
        call()
    return (time.process_time() - began) / rounds


if __name__ == "__main__":
    sys.exit(main(measure, __doc__ or ""))
