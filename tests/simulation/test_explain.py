"""explain on real books: two sellers, and what it recomputes is what the ledger signed."""

import functools
import json

import apsw
import trio
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from aivillage.cli import main
from aivillage.node.backup import backup, restore
from tests.simulation.mesh import PRICE, price_of, settled, until
from tests.simulation.test_market import PROMPT
from tests.simulation.test_market_failures import paused_job, three


async def explained(node, job, capsys):
    """(exit code, the JSON) of the command, as typed beside the running node."""
    words = ["explain", job, "--json", "--data-dir", str(node.paths.data_dir)]
    code = await trio.to_thread.run_sync(main.main, words)
    return code, json.loads(capsys.readouterr().out)


async def test_a_failover_is_explained_to_the_micro_credit(tmp_path, capsys):
    async with three(tmp_path) as (mesh, buyer, first, second):
        running = await paused_job(buyer, first)
        first.tamper = lambda _frame: ()
        mesh.network.cut("buyer", "first")
        mesh.network.partition(["first"])
        with trio.fail_after(5):
            await running.ended.wait()
        await settled(buyer, second, 7 * PRICE)
        mesh.network.heal()
        first.tamper = lambda frame: (frame,)
        await settled(buyer, first, price_of(PROMPT, 5))
        job = running.pursuit.row.id
        code, found = await explained(buyer, job[:12], capsys)
        assert (code, found["ok"], found["state"]) == (0, True, "done")
        sums = [attempt["sum_micro_credits"] for attempt in found["attempts"]]
        assert sums == [price_of(PROMPT, 5), 7 * PRICE]
        signed = [attempt["signed"]["amount_micro_credits"] for attempt in found["attempts"]]
        assert signed == sums
        assert [a["seller"] for a in found["attempts"]] == [first.peer, second.peer]
        waived = {line["unit"]: line["waived"] for line in found["attempts"][1]["lines"]}
        assert waived == {"prompt_quads": price_of(PROMPT, 0) // PRICE, "output_tokens": 5}
        assert {a["quote"] for a in found["attempts"]} == {"signed"}
        assert found["sum_micro_credits"] == running.pursuit.receipt().price_micro_credits
        shown = [a["lines"][1] for a in found["attempts"]]
        assert [line["price_micro_credits"] for line in shown] == [PRICE, PRICE]


async def test_after_a_restore_what_came_back_is_no_fault_and_nothing_is_paid_twice(
    tmp_path, capsys
):
    async with three(tmp_path) as (mesh, buyer, first, _second):
        pem = buyer.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        buyer.paths.key.write_bytes(pem)
        buyer.paths.key.chmod(0o600)
        running = await paused_job(buyer, first)
        await until(lambda: buyer.ledger.view(first.peer).owed_by_me)
        await trio.to_thread.run_sync(backup, buyer.paths, tmp_path / "b.tar")
        first.script.go.set()
        await running.ended.wait()
        await settled(buyer, first, price_of(PROMPT, 12))
        await buyer.stop()
        put_back = functools.partial(restore, force=True)
        await trio.to_thread.run_sync(put_back, buyer.paths, tmp_path / "b.tar")
        await mesh.start(buyer)
        await mesh.link(buyer, first)
        await until(lambda: buyer.ledger.view(first.peer).synced)
        await settled(buyer, first, price_of(PROMPT, 12))
        code, found = await explained(buyer, running.pursuit.row.id, capsys)
        (attempt,) = found["attempts"]
        assert (code, found["ok"], found["state"]) == (0, True, "cancelled")
        assert attempt["signed"]["amount_micro_credits"] == price_of(PROMPT, 12)
        assert attempt["signed"]["recovered_micro_credits"] > 0
        assert "forgotten" in attempt["note"]


async def test_a_running_job_is_explained_as_far_as_it_came(tmp_path, capsys):
    async with three(tmp_path) as (_, buyer, first, _second):
        running = await paused_job(buyer, first)
        code, found = await explained(buyer, running.pursuit.row.id, capsys)
        (attempt,) = found["attempts"]
        assert (code, attempt["outcome"], attempt["quote"]) == (0, "running", "signed")
        assert found["sum_micro_credits"] == found["stored_micro_credits"] == price_of(PROMPT, 5)
        assert found["signed_micro_credits"] <= price_of(PROMPT, 5)
        words = ["explain", running.pursuit.row.id, "--data-dir", str(buyer.paths.data_dir)]
        assert await trio.to_thread.run_sync(main.main, words) == 0
        assert "output tokens: 5 x 0.000269 = 0.001345" in capsys.readouterr().out


async def test_a_price_changed_on_the_disk_is_found_and_ends_with_7(tmp_path, capsys):
    async with three(tmp_path) as (_, buyer, first, _second):
        running = await buyer.ask(PROMPT, tokens=4)
        await settled(buyer, first, price_of(PROMPT, 4))
        job = running.pursuit.row.id
        assert (await explained(buyer, job, capsys))[0] == 0
        db = apsw.Connection(str(buyer.paths.jobs))
        ((envelope,),) = db.execute("SELECT quote FROM attempt").fetchall()
        cheaper = envelope.replace(PRICE.to_bytes(2, "big"), (PRICE - 1).to_bytes(2, "big"))
        assert cheaper != envelope
        db.execute("UPDATE attempt SET quote = ?", (cheaper,))
        db.close()
        code, found = await explained(buyer, job, capsys)
        assert (code, found["ok"]) == (7, False)
        assert found["attempts"][0]["quote"] == "does not match the signed quote"
        words = ["explain", job, "--data-dir", str(buyer.paths.data_dir)]
        assert await trio.to_thread.run_sync(main.main, words) == 7
        assert "WRONG: the stored quote does not match" in capsys.readouterr().out


async def test_a_job_that_nobody_knows_is_a_usage_error(tmp_path, capsys):
    async with three(tmp_path) as (_, buyer, _first, _second):
        words = ["explain", "abcdef", "--data-dir", str(buyer.paths.data_dir)]
        assert await trio.to_thread.run_sync(main.main, words) == 2
        assert "jobs list" in capsys.readouterr().err
