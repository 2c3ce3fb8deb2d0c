"""A model split over stages: is it the same answer, what does it cost, and what does guessing gain?

    python benchmarks/split.py [--quick] [--json] [--save]

`split_identical_fraction`: answers over 2, 3 and 5 real stage processes, eight in flight, with
guesses, that are the unsplit engine's token for token, text and end included.

`speculation_gain`: steps (tokens) a second while decoding, with guesses over those without, over
two such stages whose every way takes 50 ms (slept where the rows come and go); the median of
prompts that ask for a copy, an edit of code, or a quoting summary. Those whose answer copies
nothing are counted apart (`speculation_gain_plain`): copied is an answer of which half of all runs
of three tokens were there before. `forwarding_gain_S`: what S stages that hand states to each other
save at these 50 ms, one way a stage, without guesses, by slept ways; handed_on.py has real ones.

The rest is real daemons on loopback, credits on. The workers of three may have 800 MB, so that none
holds the model, and those of a fourth may; its engine is torch, as that of stages is. No worker
is nice: else whatever runs on this machine goes before one that woke up, and stages wake up often.
`packaged_split2_over_local`: rounds a second of an answer split over two of them, over tokens a
second of the fourth's, each asked by the same buyer; rounds, so that no guess flatters it; from the
first text to the last (what then comes once an answer, its check and its pay, is `local_end_ms` and
`split2_end_ms`). An answer of the one kind follows one of the other, and the median of these pairs
counts: a noisy minute hits both. `packaged_split2_cpu_over_local` is the same of processor seconds,
all daemons and workers, less what they use at rest: on a busy machine it says more. Neither has a
bar: nobody needs to split a model of half a gigabyte, and the faster a machine computes it, the
larger the share of the ways. The bar is that of split_pulled.py, whose model is one to split.

`resume_s`: from the SIGKILL of a stage, its workers included, at a random token, to the next text,
where another peer had loaded its layers ahead; `cold_resume_s` where it had not. `books_exact` is 1
where all books agree in the end and sum to 0.

`--quick` measures the pairs, shorter ones, and their books; the rest is from the kept results.

Elsewhere, not measured here: Petals over its own unsplit model 0.69 to 0.89; patched Petals goes on
after 3.1 s, stock Petals never.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import trio
from claims import ROOT, Claims, main, script_sha256
from yard import books_exact, known

from aivillage.models.inference import tokenizer
from aivillage.models.inference.generate import GenerateRequest
from aivillage.models.inference.split import DRAFT_TOKENS_MAX, SplitAnswer
from aivillage.models.inference.stages import OPERATION
from aivillage.protocols import messages
from tests.integration.daemons import Daemon, DaemonError, Yard, wait_for
from tests.integration.split_chain import MODEL
from tests.integration.split_processes import (
    Answered,
    Stages,
    answer,
    answers,
    questions,
    stages,
    unsplit,
)

WAY_SECONDS = 0.05
ALIKE = ("--set", "worker_nice=0", "--set", "offer_seconds=2")
LENDS = (*ALIKE, "--enable", OPERATION, "--set", "worker_memory_mb=800")
COLD = (*LENDS, "--set", "stage_stand_by=false")
TOKENS = 32
REST_SECONDS = 3.0
PROMPT = "Explain in a few sentences why the sky is blue, and why the evening sky is red."
REQUEST: dict[str, Any] = {"prompt": PROMPT, "max_tokens": TOKENS}
TOKENS_QUICK = 12
SEEDS, PAIRS, PAIRS_MIN = 20, 12, 2
QUICK_SECONDS = 30.0
"""With `--quick`: then no further pair begins, whatever their number so far, but for the least."""
KEPT = ROOT / "benchmarks" / "results" / "split.json"
GAIN_BAR, RESUME_SECONDS, RESUME_GOAL = 1.8, 2.0, 0.5
FOX = "The quick brown fox jumps over the lazy dog while the old cat sleeps under the apple tree."
LIST = "apples, pears, plums, cherries, grapes, lemons, limes, melons, figs, dates, nuts, kiwis"
CODE = inspect.getsource(textwrap.indent).partition('"""')[0] + "    pass\n"
PROMPTS = (
    f"Repeat this text three times: {FOX}",
    f"Add a comment to this function:\n\n```python\n{CODE}```",
    f"Extract the sentences about cats: {FOX} {FOX}",
    f"Fix the typos: {FOX.replace('lazy', 'lazzy')}",
    f"Repeat this code exactly:\n\n```python\n{CODE}```",
    f"Rename prefix to start in this code, and print all of it:\n\n```python\n{CODE}```",
    f"Quote the first sentence of this text: {FOX} {PROMPT}",
    f"Copy this list exactly, then copy it again: {LIST}",
)
"""With AIVILLAGE_TEST_DATA two of WikiText-2 are added."""


def measure(claims: Claims, args: argparse.Namespace) -> None:
    if args.quick:
        take_kept(claims)
    else:
        trio.run(over_processes, claims)
    with tempfile.TemporaryDirectory() as folder, Yard(Path(folder)) as yard:
        over_daemons(claims, yard, quick=args.quick)


def take_kept(claims: Claims) -> None:
    """What a quick run does not measure, from the kept results of today's script; it goes first."""
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    for key, value in kept.items():
        if key.startswith(("split_", "speculation_", "forwarding_", "resume_", "cold_")):
            claims.note(key, value)
    claims.note("stamped", value=True)
    claims.note("stamped_ok", kept.get("script_sha256") == script_sha256())


# --------------------------------------------------------------------------- stage processes


async def over_processes(claims: Claims) -> None:
    requests = questions(50)
    wanted = unsplit(requests)
    equal, tokens, rounds = [], 0, 0
    for parts in (2, 3, 5):
        with tempfile.TemporaryDirectory() as folder:
            async with stages(parts, Path(folder)) as found:
                got = await answers(found, requests)
                equal += [one.said == two for one, two in zip(got, wanted, strict=True)]
                tokens += sum(len(one.token_ids) for one in got)
                rounds += sum(one.rounds for one in got)
                if parts == 2:
                    await guessing(claims, found)
                await forwarding(claims, found)
    claims.note("split_answers", len(equal))
    claims.add("split_identical_fraction", statistics.mean(equal), at_least=1.0)
    claims.add("tokens_per_round", tokens / rounds)


async def guessing(claims: Claims, found: Stages) -> None:
    """Every prompt with guesses and without, four of them in flight at once."""
    prompts = (*PROMPTS, *of_wikitext())
    copied: dict[bool, list[float]] = {True: [], False: []}
    for first in range(0, len(prompts), 4):
        for at, gain in (await gains(found, prompts[first : first + 4], 64)).items():
            copied[gain.is_copied].append(gain.speed)
            claims.note(f"speculation_gain_{first + at}", round(gain.speed, 2))
    claims.note("speculation_prompts_copied", len(copied[True]))
    claims.add("speculation_gain", statistics.median(copied[True] or [0.0]), at_least=GAIN_BAR)
    claims.add("speculation_gain_min", min(copied[True] or [0.0]))
    if copied[False]:
        claims.add("speculation_gain_plain", statistics.median(copied[False]))


class Gain(NamedTuple):
    is_copied: bool
    speed: float


async def gains(found: Stages, prompts: Sequence[str], tokens: int) -> dict[int, Gain]:
    got: dict[tuple[int, int], Answered] = {}
    away = star(len(found.clients))

    async def ask(at: int, drafts_max: int) -> None:
        request = GenerateRequest(prompt=prompts[at], max_tokens=tokens)
        got[at, drafts_max] = await answer(found, request, drafts_max=drafts_max, away_seconds=away)

    async with trio.open_nursery() as nursery:
        for at in range(len(prompts)):
            nursery.start_soon(ask, at, DRAFT_TOKENS_MAX)
            nursery.start_soon(ask, at, 0)
    gained = {}
    for at, prompt in enumerate(prompts):
        guessed, plain = got[at, DRAFT_TOKENS_MAX], got[at, 0]
        assert guessed.said == plain.said, "a guess changed the answer"
        speed = plain.decode_seconds / max(guessed.decode_seconds, 1e-9)
        gained[at] = Gain(is_copied(prompt, plain.token_ids), speed)
    return gained


def of_wikitext() -> list[str]:
    """Two prompts of paragraphs, where the data is there."""
    path = Path(os.environ.get("AIVILLAGE_TEST_DATA", "")) / "wikitext-2" / "valid.txt"
    if not path.is_file():
        return []
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    one, other, *_ = [line for line in lines if 300 < len(line) < 500]
    return [f"Summarize by quoting: {one}", f"{other}\n\nRepeat the text above word for word."]


def is_copied(prompt: str, token_ids: Sequence[int]) -> bool:
    """Whether half of the answer's runs of three tokens were there before."""
    request = GenerateRequest(prompt=prompt, max_tokens=1)
    read = SplitAnswer(request, tokenizer.of_model(MODEL)).prompt.token_ids
    seen = {tuple(read[at : at + 3]) for at in range(len(read) - 2)}
    again = 0
    for at in range(len(token_ids) - 2):
        run = tuple(token_ids[at : at + 3])
        again += run in seen
        seen.add(run)
    return again >= (len(token_ids) - 2) / 2


def star(parts: int) -> list[float]:
    """What a round spends on the way to each stage and back."""
    return [2 * WAY_SECONDS] * parts


def ring(parts: int) -> list[float]:
    """The same where each stage hands its states to the next one."""
    return [WAY_SECONDS] * (parts - 1) + [2 * WAY_SECONDS]


async def forwarding(claims: Claims, found: Stages) -> None:
    parts, request = len(found.clients), GenerateRequest(**(REQUEST | {"max_tokens": 16}))
    by_star, by_ring = [
        await answer(found, request, drafts_max=0, away_seconds=away(parts))
        for away in (star, ring)
    ]
    claims.add(f"forwarding_gain_{parts}", by_star.decode_seconds / by_ring.decode_seconds)


# --------------------------------------------------------------------------- real daemons


class Heard(NamedTuple):
    """One job: `seconds` from its first text to its last; `end_seconds` from there to the answer,
    which is checked and settled first; processor seconds of both."""

    token_ids: list[int]
    seconds: float
    cpu_seconds: float = 0.0
    resume_seconds: float = 0.0
    kind: str = ""
    end_seconds: float = 0.0

    @property
    def steps(self) -> int:
        """Tokens after the first."""
        return len(self.token_ids) - 1


class Pair(NamedTuple):
    """An answer of one peer, and the same one split; `rest`: processor seconds a second of all."""

    local: Heard
    split: Heard
    rounds: int
    rest: float

    def speed(self) -> float:
        return self.rounds / self.split.seconds / (self.local.steps / self.local.seconds)

    def cpu_ms(self) -> tuple[float, float]:
        """Of a token, and of a round."""
        local, split = (
            one.cpu_seconds - self.rest * (one.seconds + one.end_seconds) for one in self[:2]
        )
        return 1000 * local / self.local.steps, 1000 * split / self.rounds


def over_daemons(claims: Claims, yard: Yard, *, quick: bool) -> None:
    ends = time.monotonic() + QUICK_SECONDS
    buyer = yard.daemon("buyer").start(*ALIKE, "--set", "serve=false")
    join = ("--join", buyer.ask("invite", uses=4)["token"])
    whole, *lenders = [yard.daemon(name) for name in ("whole", "one", "two", "three")]
    if quick:
        del lenders[2:]
    with ThreadPoolExecutor() as pool:
        begun = [pool.submit(whole.start, *join, *ALIKE, "--set", "engine=torch")]
        begun += [pool.submit(lender.start, *join, *COLD) for lender in lenders]
        for one in begun:
            one.result()
    known(buyer, [whole], "inference.generate")
    known(buyer, lenders, OPERATION)
    enough = (lambda n: n >= PAIRS_MIN and time.monotonic() > ends) if quick else PAIRS.__le__
    tokens = TOKENS_QUICK if quick else TOKENS
    wanted = beside_local(claims, buyer, whole, lenders, tokens, enough)
    if not quick:
        lost_stages(claims, buyer, lenders, wanted)
    claims.add("books_exact", books_exact([buyer, whole, *lenders]), at_least=1)


def beside_local(
    claims: Claims,
    buyer: Daemon,
    whole: Daemon,
    lenders: list[Daemon],
    tokens: int,
    enough: Callable[[int], bool],
) -> list[int]:
    """The answer; after a first pair, for which layers are loaded, pairs until `enough`."""
    nodes = [whole, *lenders]
    first = both(buyer, whole, nodes, max_tokens=tokens)
    rest = resting(buyer, *nodes)
    wanted = first[0].token_ids
    rounds = rounds_of(wanted, tokens) - 1
    pairs: list[Pair] = []
    while not enough(len(pairs)):
        pairs.append(Pair(*both(buyer, whole, nodes, max_tokens=tokens), rounds, rest))
    same = [one.token_ids == wanted for one in first]
    same += [one.token_ids == wanted for pair in pairs for one in pair[:2]]
    claims.note("split2_pairs", len(pairs))
    claims.add("split2_pairs_identical", statistics.mean(same), at_least=1.0)
    middle = statistics.median
    claims.add("local_tokens_per_second", middle(p.local.steps / p.local.seconds for p in pairs))
    claims.add("split2_rounds_per_second", middle(rounds / p.split.seconds for p in pairs))
    claims.add("packaged_split2_over_local", middle(p.speed() for p in pairs))
    for at, name in enumerate(("local", "split2")):
        claims.note(f"{name}_end_ms", round(1000 * middle(p[at].end_seconds for p in pairs), 1))
    ways = [pair.cpu_ms() for pair in pairs]
    claims.add("local_cpu_ms_per_token", middle(local for local, _ in ways))
    claims.add("split2_cpu_ms_per_round", middle(split for _, split in ways))
    over = middle(local / split for local, split in ways)
    claims.add("packaged_split2_cpu_over_local", over)
    return wanted


def both(buyer: Daemon, whole: Daemon, nodes: list[Daemon], **changed: Any) -> tuple[Heard, Heard]:
    """An answer of the peer that has the whole model, and one split over the others."""
    local = heard(buyer, nodes, **changed)
    buyer.ask("block", peer=whole.peer)
    split = heard(buyer, nodes, **changed)
    buyer.ask("block", peer=whole.peer, stop=True)
    return local, split


def heard(buyer: Daemon, sellers: list[Daemon], **changed: Any) -> Heard:
    """One job to its end, undisturbed."""
    first = last = cpu = 0.0
    for frame in buyer.follow("inference.generate", **(REQUEST | changed)):
        if isinstance(frame, messages.Text):
            last = time.monotonic()
            if not first:
                first, cpu = last, cpu_of(buyer, *sellers)
        if isinstance(frame, messages.Answer):
            end = time.monotonic() - last
            used, ids = cpu_of(buyer, *sellers) - cpu, frame.value["result"]["token_ids"]
            return Heard(ids, last - first, used, end_seconds=end)
        fail(buyer, frame)
    raise DaemonError("frames end with an answer or an error")


def resting(*nodes: Daemon) -> float:
    """Processor seconds a second of daemons that do nothing: pings, offers, looks at the clock."""
    before, began = cpu_of(*nodes), time.monotonic()
    time.sleep(REST_SECONDS)
    return (cpu_of(*nodes) - before) / (time.monotonic() - began)


def fail(buyer: Daemon, frame: messages.Frame) -> None:
    if isinstance(frame, messages.Failure):
        raise DaemonError(f"{frame.code} {frame.message}\n{buyer.log_end()}")


def cpu_of(*nodes: Daemon) -> float:
    """Processor seconds so far, of the daemons and of all their workers."""
    used = 0.0
    for node in nodes:
        daemon = psutil.Process(node.pid)
        for process in (daemon, *daemon.children(recursive=True)):
            times = process.cpu_times()
            used += times.user + times.system
    return used


def rounds_of(token_ids: list[int], tokens: int) -> int:
    """Rounds that the driver needs for this answer; the model's part is known already."""
    request = GenerateRequest(**REQUEST | {"max_tokens": tokens})
    driver = SplitAnswer(request, tokenizer.of_model(MODEL))
    while not driver.finished:
        draws, at = driver.inputs()[-1].draws, len(driver.token_ids)
        driver.take([*token_ids[at : at + draws], *[0] * draws][:draws])
    assert driver.token_ids == token_ids, "a guess was taken that was wrong"
    return driver.rounds


# --------------------------------------------------------------------------- lost stages


def lost_stages(claims: Claims, buyer: Daemon, lenders: list[Daemon], wanted: list[int]) -> None:
    """`wanted`: the answer, whoever is lost in it."""
    buyer.ask("block", peer=buyer.sellers_known("inference.generate").pop())
    runs = [cold_run(0, buyer, lenders)]
    for lender in lenders:
        lender.kill()
        lender.start(*LENDS)
    known(buyer, lenders, OPERATION)
    runs += [warm_run(seed, buyer, lenders) for seed in range(SEEDS)]
    tell(claims, runs)
    identical = [run.token_ids == wanted for run in runs]
    claims.add("identical_fraction", statistics.mean(identical), at_least=1.0)


def cold_run(seed: int, buyer: Daemon, lenders: list[Daemon]) -> Heard:
    """Nobody loads ahead: who stands in begins with that, unless it had these layers before."""
    before = {placed for row in buyer.ask("jobs", limit=50) for placed in plan_of(buyer, row)}
    found = killed(seed, buyer, lenders)
    event = events(buyer, "stage_replaced")[-1]
    lost, by = event["peer"][-8:], event["by"][-8:]
    layers = dict(map(reversed, plan_of(buyer, buyer.ask("jobs", limit=1)[0]))).get(lost, "")
    return found._replace(kind="known" if (layers, by) in before else "cold")


def plan_of(buyer: Daemon, row: dict[str, Any]) -> list[tuple[str, str]]:
    """(layers, end of the peer's name) of each stage, as the job's plan says it."""
    return re.findall(r"(\d+-\d+) at (\w{8})", json.dumps(buyer.ask("job", job=row["job"])))


def warm_run(seed: int, buyer: Daemon, lenders: list[Daemon]) -> Heard:
    """A stage is killed once somebody stands by for each."""
    sought = times_sought(buyer)
    heard(buyer, [], max_tokens=1)
    wait_for(lambda: times_sought(buyer) > sought, 60, buyer.log_end)
    found = killed(seed, buyer, lenders)
    event = events(buyer, "stage_replaced")[-1]
    return found._replace(kind="warm" if event["was_ready"] else "cold")


def times_sought(buyer: Daemon) -> int:
    """How often it has looked for stand-ins; of events themselves only the latest are kept."""
    return int(buyer.ask("events")["counts"].get("stand_ins_sought", 0))


def killed(seed: int, buyer: Daemon, lenders: list[Daemon]) -> Heard:
    """One answer, a stage of which is killed at a random token; it is back after."""
    draw, pieces, lost, resumed = random.Random(seed), 0, 0.0, 0.0
    at, victim = draw.randrange(2, 12), lenders[0]
    by_peer = {lender.peer: lender for lender in lenders}
    for frame in buyer.follow("inference.generate", **REQUEST):
        fail(buyer, frame)
        if isinstance(frame, messages.Text):
            pieces += 1
            resumed = resumed or (time.monotonic() - lost if lost else 0.0)
            if pieces == at:
                latest = buyer.ask("jobs", limit=1)[0]["job"]
                victim = by_peer[draw.choice(sellers_of(buyer, latest, "running"))]
                lost = time.monotonic()
                os.kill(victim.pid, signal.SIGKILL)  # its workers end with it
        if isinstance(frame, messages.Answer):
            victim.kill()
            victim.restart()
            known(buyer, lenders, OPERATION)
            return Heard(frame.value["result"]["token_ids"], 0.0, resume_seconds=resumed)
    raise DaemonError("frames end with an answer or an error")


def sellers_of(buyer: Daemon, job: str, *outcomes: str) -> list[str]:
    """Of its stages, those that came to such an end; of all where none is named."""
    attempts = buyer.ask("job", job=job)["attempts"]
    return [one["seller"] for one in attempts if not outcomes or one["outcome"] in outcomes]


def events(buyer: Daemon, name: str) -> list[dict[str, Any]]:
    return [event for event in buyer.ask("events")["recent"] if event["event"] == name]


def tell(claims: Claims, runs: list[Heard]) -> None:
    by_kind = {
        kind: sorted(run.resume_seconds for run in runs if run.kind == kind)
        for kind in ("warm", "cold")
    }
    warm, cold = by_kind["warm"], by_kind["cold"]
    claims.note("resume_seeds", len(runs))
    claims.note("resume_warm", len(warm))
    claims.note("resume_s_goal", RESUME_GOAL)
    if warm:
        claims.add("resume_s_p50", statistics.median(warm))
        p95 = warm[-(-95 * len(warm) // 100) - 1]
        claims.add("resume_s_p95", p95, at_most=RESUME_SECONDS)
    if cold:
        claims.add("cold_resume_s", statistics.median(cold))


if __name__ == "__main__":
    sys.exit(main(measure, __doc__ or ""))
