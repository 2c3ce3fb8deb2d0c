"""What a mesh keeps of its engine's speed, and how it shares the slots.

    python benchmarks/serving.py [--quick] [--json] [--save]

Three real daemons on this machine: a seller with the packaged model and the default engine, and
two buyers; credits on. By turns, so that a noisy minute hits both: 8 answers at once over the mesh,
and the same 8 from the bare engine worker. `mesh_over_bare_b8` is tokens a second of the one over
those of the other; `cpu_mesh_over_bare_b8` is processor time, both daemons and all workers against
worker and asker.

Then 32 answers at once, more than there are slots, each prompt and each seed another one: every
answer is held against the one that the bare engine gives to it alone. Meanwhile both daemons tell
how late their loops were. Last, a buyer with 30 jobs and one with 3 that comes after it: how long
the latter's waits are, over those of a turn-by-turn queue (every second turn is its own) and over
those in order of arrival.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
import trio
from claims import Claims, main
from processes import sum_when_settled, village

from aivillage.cli.client import Client
from aivillage.cli.village_process import NodeProcess
from aivillage.node.engines import EngineClient
from aivillage.node.workers import WorkerSettings, open_workers
from aivillage.protocols import messages
from aivillage.protocols.errors import from_code

OPERATION = "inference.generate"
SLOTS, STREAMS = 8, 32
HEAVY_JOBS, LIGHT_JOBS = 30, 3
PLENTY = 1 << 20
FLAGS = (
    "--set", "verify_percent_max=0",  # what checking costs is another benchmark's
    "--set", "heartbeat_seconds=2",
)  # fmt: skip


def request(number: int, tokens: int) -> dict[str, Any]:
    """Another answer for each number: at a temperature, drawn by the number."""
    prompt = f"Write a line about the number {number}."
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 1.0, "seed": number}


class Answer:
    """One answer as it came."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.first = 0.0
        self.ended = 0.0
        self.text = ""
        self.tokens = 0

    def said(self, text: str) -> None:
        self.first = self.first or time.perf_counter()
        self.text += text


class Batch:
    """Answers that were asked for at the same time."""

    def __init__(self, answers: list[Answer], cpu_seconds: float) -> None:
        self.answers = answers
        self.cpu_seconds = cpu_seconds
        self.tokens = sum(answer.tokens for answer in answers)
        began = min(answer.began for answer in answers)
        self.seconds = max(answer.ended for answer in answers) - began
        self.rate = self.tokens / self.seconds

    def first_ms(self) -> list[float]:
        return sorted(1000 * (answer.first - answer.began) for answer in self.answers)


# ------------------------------------------------------------------ over the mesh


def over_mesh(buyer: NodeProcess, seller: str, asked: list[dict[str, Any]]) -> list[Answer]:
    """All of them at once on one connection; raises where one is refused."""
    answers: dict[int, Answer] = {}
    with Client(buyer.where.socket).patient() as client:
        for each in asked:
            call = client.next_id()
            answers[call] = Answer(time.perf_counter())
            submit = messages.Submit(
                id=call, operation=OPERATION, request=msgspec.msgpack.encode(each), peer=seller,
                mesh=True, deadline_seconds=300.0,
            )  # fmt: skip
            client.send(submit)
        left = len(answers)
        while left:
            frame = client.receive()
            if isinstance(frame, messages.Failure):
                raise from_code(frame.code, frame.message, frame.next_step)
            if isinstance(frame, messages.Text):
                answers[frame.id].said(frame.text)
            elif isinstance(frame, messages.Answer):
                take_end(answers[frame.id], frame.value)
                left -= 1
    return list(answers.values())


def take_end(answer: Answer, value: dict[str, Any]) -> None:
    answer.ended = time.perf_counter()
    answer.first = answer.first or answer.ended
    result = value["result"]
    answer.text, answer.tokens = result["text"], len(result["token_ids"])


def cpu_of(pids: list[int]) -> float:
    """Seconds so far of these processes and all that they started."""
    total = 0.0
    for pid in pids:
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            times = each.cpu_times()
            total += times.user + times.system
    return total


def mesh_batch(nodes: list[NodeProcess], seller: str, asked: list[dict[str, Any]]) -> Batch:
    pids = [node.pid for node in nodes[:2]]
    before = cpu_of(pids)
    answers = over_mesh(nodes[0], seller, asked)
    return Batch(answers, cpu_of(pids) - before)


# ------------------------------------------------------------------ from the engine


async def bare_answer(engine: EngineClient, asked: dict[str, Any], into: list[Answer]) -> None:
    answer = Answer(time.perf_counter())
    async with engine.open_session(msgspec.msgpack.encode(asked)) as session:
        session.allow(PLENTY)
        async for frame in session:
            answer.tokens += len(frame.token_ids)
            if frame.token_ids:
                answer.said(frame.text)
    answer.ended = time.perf_counter()
    into.append(answer)


async def bare_batch(engine: EngineClient, asked: list[dict[str, Any]]) -> Batch:
    answers: list[Answer] = []
    before = cpu_of([engine.pid]) + time.process_time()
    async with trio.open_nursery() as nursery:
        for each in asked:
            nursery.start_soon(bare_answer, engine, each, answers)
    return Batch(answers, cpu_of([engine.pid]) + time.process_time() - before)


async def alone(engine: EngineClient, asked: list[dict[str, Any]]) -> list[str]:
    """What the engine says to each, one after the other."""
    texts = []
    for each in asked:
        found: list[Answer] = []
        await bare_answer(engine, each, found)
        texts.append(found[0].text)
    return texts


# ------------------------------------------------------------------ the claims


def measure(claims: Claims, args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder, village(Path(folder), 3, *FLAGS) as nodes:
        trio.run(measured, claims, Path(folder), nodes, args.quick)
        claims.add("sum_of_balances", sum_when_settled(nodes), at_most=0)
    claims.note("load_average", round(os.getloadavg()[0], 2))


async def measured(claims: Claims, folder: Path, nodes: list[NodeProcess], quick: bool) -> None:
    seller = nodes[1].ask("status")["peer"]
    async with open_workers(
        WorkerSettings(), cache_folder=folder / "cache", scratch_folder=folder / "scratch"
    ) as workers:
        engine = await workers.engine(OPERATION)
        await speeds(
            claims, engine, nodes, seller, rounds=1 if quick else 5, tokens=32 if quick else 96
        )
        await crossings(claims, engine, nodes, seller, tokens=6 if quick else 24)
    await trio.to_thread.run_sync(fairness, claims, nodes, seller, 6 if quick else 24)


async def speeds(
    claims: Claims,
    engine: EngineClient,
    nodes: list[NodeProcess],
    seller: str,
    *,
    rounds: int,
    tokens: int,
) -> None:
    asked = [request(number, tokens) for number in range(SLOTS)]
    short = [request(number, 2) for number in range(SLOTS)]
    await trio.to_thread.run_sync(mesh_batch, nodes, seller, short)  # loads, links, opens lines
    await bare_batch(engine, short)
    mesh, bare = [], []
    for _ in range(rounds):
        bare.append(await bare_batch(engine, asked))
        mesh.append(await trio.to_thread.run_sync(mesh_batch, nodes, seller, asked))
    ratios = [m.rate / b.rate for m, b in zip(mesh, bare, strict=True)]
    costs = [m.cpu_seconds / b.cpu_seconds for m, b in zip(mesh, bare, strict=True)]
    claims.add("bare_tokens_per_s_b8", statistics.median(b.rate for b in bare))
    claims.add("mesh_tokens_per_s_b8", statistics.median(m.rate for m in mesh))
    claims.add("mesh_over_bare_b8", statistics.median(ratios), at_least=0.85)
    claims.add("cpu_mesh_over_bare_b8", statistics.median(costs))
    for name, batches in (("bare", bare), ("mesh", mesh)):
        first = sorted(ms for batch in batches for ms in batch.first_ms())
        claims.add(f"{name}_first_token_ms_p50_b8", statistics.median(first))
        claims.add(f"{name}_first_token_ms_p95_b8", first[int(len(first) * 0.95)])


async def crossings(
    claims: Claims, engine: EngineClient, nodes: list[NodeProcess], seller: str, *, tokens: int
) -> None:
    asked = [request(1000 + number, tokens) for number in range(STREAMS)]
    right = await alone(engine, asked)
    batch = await trio.to_thread.run_sync(mesh_batch, nodes, seller, asked)
    for name, node in (("buyer", nodes[0]), ("seller", nodes[1])):
        lag = node.ask("status", lag_seconds=batch.seconds)["loop_lag_ms"]
        claims.add(f"{name}_loop_lag_p99_ms", lag["p99"], at_most=20)
    claims.add("distinct_references", len(set(right)))
    wrong = sum(a.text != text for a, text in zip(batch.answers, right, strict=True))
    claims.add("cross_talk", wrong, at_most=0)
    first = batch.first_ms()
    claims.add("first_token_ms_p50_32", statistics.median(first))
    claims.add("first_token_ms_p95_32", first[int(len(first) * 0.95)])
    claims.add("mesh_tokens_per_s_32", batch.rate)


def fairness(claims: Claims, nodes: list[NodeProcess], seller: str, tokens: int) -> None:
    """A buyer of 30 jobs; once 22 of them wait, one of 3."""
    found: dict[str, list[Answer]] = {}

    def buy(node: NodeProcess, count: int, name: str) -> None:
        asked = [request(2000 + number, tokens) for number in range(count)]
        found[name] = over_mesh(node, seller, asked)

    buy(nodes[2], 1, "warm")  # its link and its line
    heavy = threading.Thread(target=buy, args=(nodes[0], HEAVY_JOBS, "heavy"))
    heavy.start()
    waiting = queue_of(nodes[1], HEAVY_JOBS - SLOTS)
    buy(nodes[2], LIGHT_JOBS, "light")
    heavy.join()
    came = found["light"][0].began
    waits = sorted(a.first - came for a in found["light"])
    late = sorted(a.first - came for a in found["heavy"])[-waiting:]  # their turns came after it
    turns = sorted(waits + late)
    by_turns = [turns[2 * n] for n in range(LIGHT_JOBS)]
    by_arrival = turns[-LIGHT_JOBS:]
    claims.add("light_peer_wait_s", statistics.mean(waits))
    claims.add(
        "light_peer_wait_over_fair",
        statistics.mean(waits) / statistics.mean(by_turns),
        at_most=1.25,
    )
    claims.add("light_peer_wait_over_arrival", statistics.mean(waits) / statistics.mean(by_arrival))


def queue_of(seller: NodeProcess, most: int) -> int:
    """How many wait, once nearly all do that will."""
    deadline = time.monotonic() + 30
    while (waiting := int(seller.ask("status")["sales_waiting"])) < most - 2:
        if time.monotonic() > deadline:
            raise SystemExit("the queue did not fill")
        time.sleep(0.01)
    return waiting


if __name__ == "__main__":
    sys.exit(main(measure, __doc__ or ""))
