"""`demo`: a village of three on this machine does the whole story, with real work and real money.

A job is paid; a peer is killed in the middle of the next one and another finishes it, word for
word; the books of all three are settled and audited, and sum to zero.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from aivillage.cli import show
from aivillage.cli.client import Client
from aivillage.cli.jobs import receipt_line
from aivillage.cli.village_process import NodeProcess
from aivillage.protocols import messages
from aivillage.protocols.errors import EXIT_JOB_FAILED, EXIT_OK, NodeError
from aivillage.protocols.types import as_credits

PROMPT: Final = "Explain in a few sentences why the sky is blue."
WAIT_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.1


class Stage:
    """Says what happens, and how long it took."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        if not self._quiet:
            print(f"[{self.seconds():5.1f} s] {text}", flush=True)

    def stream(self, text: str) -> None:
        if not self._quiet:
            print(show.plain(text), end="", flush=True)

    def seconds(self) -> float:
        return time.monotonic() - self._started


def demo(args: argparse.Namespace) -> int:
    """Exit 0 only where everything came out right."""
    stage = Stage(quiet=args.json)
    folder = Path(tempfile.mkdtemp(prefix="aivillage-demo-"))
    with _village(folder, stage, keep=args.keep) as nodes:
        found = _story(nodes, stage, args.tokens)
    found["seconds"] = round(stage.seconds(), 1)
    ok = found["failover_ok"] and found["audit_ok"] and found["sum"] == 0
    if args.json:
        show.as_json(found)
    else:
        stage.say("all of it held" if ok else "SOMETHING DID NOT HOLD: see above")
    return EXIT_OK if ok else EXIT_JOB_FAILED


@contextlib.contextmanager
def _village(folder: Path, stage: Stage, *, keep: bool) -> Iterator[list[NodeProcess]]:
    """Ada founds it, Bob and Cyd join by invite; all are stopped at the end, whatever happens."""
    nodes = [NodeProcess(name, folder) for name in ("ada", "bob", "cyd")]
    ada, *others = nodes
    try:
        stage.say("starting three nodes, each a process with a folder and an identity of its own")
        ada.start()
        for node in others:
            node.start("--join", ada.ask("invite")["token"])
            stage.say(f"{node.name} ({show.short(node.peer)}) joined ada's village by invite")
        yield nodes
        stopped = [node.stop() for node in nodes]
        stage.say("all nodes stopped" + ("" if all(stopped) else ", NOT IN ORDER"))
    finally:
        for node in nodes:
            node.kill()
        if keep:
            stage.say(f"folders and logs: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _story(nodes: list[NodeProcess], stage: Stage, tokens: int) -> dict[str, Any]:
    ada = nodes[0]
    _wait(lambda: _offers(ada) >= 2, "both peers' offers", nodes)

    stage.say(f'ada asks: "{PROMPT}" (the first answer waits for a peer to load its model)')
    first = _ask(ada, stage, tokens)
    stage.say("receipt " + receipt_line(first["receipt"]))

    stage.say("ada asks again; the peer that answers is killed in the middle")
    second, victim = _ask_and_kill(nodes, stage, tokens)
    stage.say("receipt " + receipt_line(second["receipt"]))
    failover_ok = _compare(first, second, stage)

    stage.say(f"{victim.name} comes back")
    victim.start()
    stage.say("waiting until nothing is in transit")
    _wait(lambda: _is_settled(nodes), "the books to settle", nodes)
    balances = {node.name: node.ask("balance")["net"] for node in nodes}
    audits = {node.name: node.ask("audit") for node in nodes}
    for node in nodes:
        audit = audits[node.name]
        verdict = "right" if audit["ok"] else f"WRONG: {audit['first_error']}"
        stage.say(
            f"{node.name}: {as_credits(balances[node.name]):>9} credits; "
            f"audit of {audit['entries']} entries: {verdict}"
        )
    stage.say(f"sum of all balances: {as_credits(sum(balances.values()))}")
    return {
        "answer": first["result"]["text"],
        "served_by": first["receipt"]["sellers"][0],
        "receipt": first["receipt"],
        "failover_receipt": second["receipt"],
        "failover_ok": failover_ok,
        "balances": balances,
        "sum": sum(balances.values()),
        "audit_ok": all(audit["ok"] for audit in audits.values()),
    }


def _compare(first: dict[str, Any], second: dict[str, Any], stage: Stage) -> bool:
    """Same words, same bill, two sellers."""
    same_text = first["result"]["token_ids"] == second["result"]["token_ids"]
    bills = [answer["receipt"]["price_micro_credits"] for answer in (first, second)]
    two_sellers = len(second["receipt"]["sellers"]) == 2
    stage.say(
        f"identical to the undisturbed answer: {'yes' if same_text else 'NO'}; "
        f"bill {as_credits(bills[1])} against {as_credits(bills[0])}; "
        f"sellers paid: {len(second['receipt']['sellers'])}"
    )
    return same_text and bills[0] == bills[1] and two_sellers


def _ask(
    node: NodeProcess, stage: Stage, tokens: int, on_text: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Submits the prompt and follows it; `on_text` hears how many pieces have come."""
    request = {"prompt": PROMPT, "max_tokens": tokens}
    with Client(node.where.socket).patient() as client:
        call = client.next_id()
        client.send(
            messages.Submit(
                id=call, operation="inference.generate", request=msgspec.msgpack.encode(request)
            )
        )
        count = 0
        for frame in client.frames(call):
            if isinstance(frame, messages.Answer):
                stage.stream("\n")
                found: dict[str, Any] = frame.value
                return found
            if isinstance(frame, messages.Text):
                count += 1
                stage.stream(frame.text)
                if on_text:
                    on_text(count)
            elif isinstance(frame, messages.Progress):
                stage.say("  " + frame.note)
    raise AssertionError("frames end with an answer or an error")


def _ask_and_kill(
    nodes: list[NodeProcess], stage: Stage, tokens: int
) -> tuple[dict[str, Any], NodeProcess]:
    """The answer, and who was killed when a third of it had come."""
    ada, killed = nodes[0], list[NodeProcess]()

    def kill(count: int) -> None:
        if killed or count < max(2, tokens // 3):
            return
        job = ada.ask("jobs", limit=1)[0]["job"]
        seller = ada.ask("job", job=job)["attempts"][-1]["seller"]
        victim = next(node for node in nodes if node.peer == seller)
        victim.kill()
        killed.append(victim)
        stage.stream("\n")
        stage.say(f"killed {victim.name} ({show.short(victim.peer)}) with SIGKILL")

    answer = _ask(ada, stage, tokens, kill)
    if not killed:
        raise NodeError("the answer was over before anybody could be killed", next_step="--tokens")
    return answer, killed[0]


def _offers(node: NodeProcess) -> int:
    return sum("inference.generate" in peer["offers"] for peer in node.ask("peers"))


def _is_settled(nodes: list[NodeProcess]) -> bool:
    found = [node.ask("balance") for node in nodes]
    return not any(b["in_transit"] for b in found) and sum(b["net"] for b in found) == 0


def _wait(condition: Callable[[], bool], what: str, nodes: list[NodeProcess]) -> None:
    """Polls. Raises: NodeError: it did not happen in a minute."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise NodeError(
                f"waited {WAIT_SECONDS:.0f} s for {what}",
                next_step=f"run with --keep and read {nodes[0].log}",
            )
        time.sleep(POLL_SECONDS)
