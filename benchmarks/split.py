"""A model split over stages: is it the same answer, what does it cost, and what does guessing gain?

    python benchmarks/split.py [--quick] [--json]

`split_identical_fraction`: answers of 2, 3 and 5 stages, several in flight, with guesses, that are
the unsplit engine's token for token, text and end included. In this process, one kernel class.

`speculation_gain`: steps (tokens) a second with guesses over those without, two stages whose every
way takes 50 ms (slept, in this process), for prompts that the answer copies; for one that it does
not copy, `speculation_gain_plain`.

The rest is real daemons on loopback, credits on. The workers of each may have 800 MB, so that none
holds the model: a buyer, two stages and a spare one. `split2_over_local`: rounds a second of the
split answer over tokens a second of the unsplit engine in this process; rounds, so that no guess
flatters it. `stage_resume_s`: from the SIGKILL of a stage, its workers included, at a random token
to the next token, where the stand-in had the layers loaded; `cold_resume_s` where it had not.
`books_exact` is 1 where all books agree in the end and sum to 0.

Elsewhere, not measured here: Petals over its own unsplit model 0.69 to 0.89; patched Petals goes on
after 3.1 s, stock Petals never. On a busy machine trust ratios more than seconds.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from claims import Claims, main
from yard import books_exact, known

from aivillage.models.inference import catalogue, tokenizer
from aivillage.models.inference.engine_torch import TorchEngine
from aivillage.models.inference.generate import GenerateRequest
from aivillage.models.inference.split import DRAFT_TOKENS_MAX, SplitAnswer
from aivillage.models.inference.stages import OPERATION
from aivillage.protocols import messages
from tests.integration.daemons import Daemon, DaemonError, Yard
from tests.integration.split_chain import MODEL, Chain

FLIGHT = 8
WAY_SECONDS = 0.05
TOO_LITTLE_MB = 800
TOKENS = 32
PROMPT = "Explain in a few sentences why the sky is blue, and why the evening sky is red."
REQUEST: dict[str, Any] = {"prompt": PROMPT, "max_tokens": TOKENS}
TOPICS = ("rain", "a fox", "the number 12", "bread", "why cats sleep", "a small house", "Mars",
          "how to boil an egg", "snow", "a poem about tea")  # fmt: skip
FORMS = ("Tell me about {}.", "List three facts about {}.", "Write a title for a story about {}.",
         "Translate to French: {}.", "Repeat ten times: {}. {}. {}. {}.")  # fmt: skip
COPIED = ("The quick brown fox jumps over the lazy dog. " * 10,
          "Repeat: 'la la la la la la la la la la la la la la la la'")  # fmt: skip
PLAIN = ("List the numbers from 1 to 30, one per line.",)
SPLIT_BAR, GAIN_BAR, RESUME_SECONDS, RESUME_GOAL = 0.9, 1.8, 2.0, 0.5


def measure(claims: Claims, args: argparse.Namespace) -> None:
    engine = TorchEngine(catalogue.known(catalogue.DEFAULT))
    chains = [Chain(parts) for parts in ((2,) if args.quick else (2, 3, 5))]
    same(claims, engine, chains, 8 if args.quick else 50)
    guessing(claims, chains[0], quick=args.quick)
    chains.clear()
    local = local_speed(engine)
    with tempfile.TemporaryDirectory() as folder, Yard(Path(folder)) as yard:
        yard.environment["AIVILLAGE_WORKER_MEMORY_MB"] = str(TOO_LITTLE_MB)
        yard.environment["AIVILLAGE_ENABLE"] = OPERATION
        yard.environment["AIVILLAGE_OFFER_SECONDS"] = "2"
        nodes = yard.village("buyer", "one", "two", "three")
        buyer, *stages = nodes
        known(buyer, stages, OPERATION)
        answer(buyer)  # layers are loaded
        wanted = [answer(buyer) for _ in range(1 if args.quick else 3)]
        rounds = rounds_of(wanted[0].token_ids)
        split = max((rounds - 1) / one.seconds for one in wanted)
        claims.add("local_tokens_per_second", local)
        claims.add("split2_rounds_per_second", split)
        claims.add("split2_over_local", split / local, at_least=SPLIT_BAR)
        runs = [killed(seed, buyer, stages) for seed in range(2 if args.quick else 20)]
        tell(claims, runs)
        identical = [run.token_ids == wanted[0].token_ids for run in (*wanted, *runs)]
        claims.add("resumed_identical_fraction", statistics.mean(identical), at_least=1.0)
        claims.add("books_exact", books_exact(nodes), at_least=1)


# --------------------------------------------------------------------------- in this process


def same(claims: Claims, engine: TorchEngine, chains: list[Chain], count: int) -> None:
    prompts = [form.replace("{}", topic) for topic in TOPICS for form in FORMS][:count]
    equal, tokens, rounds = [], 0, 0
    for at in range(0, count, FLIGHT):
        asked = [GenerateRequest(prompt=p, max_tokens=12) for p in prompts[at : at + FLIGHT]]
        wanted = unsplit(engine, asked)
        for chain in chains:
            got = chain.together(asked)
            equal += [mine[:3] == theirs for mine, theirs in zip(got, wanted, strict=True)]
            tokens += sum(len(one[0]) for one in got)
            rounds += sum(one[3] for one in got)
    claims.note("split_stages", [len(chain.engines) for chain in chains])
    claims.note("split_answers", len(equal))
    claims.add("split_identical_fraction", statistics.mean(equal), at_least=1.0)
    claims.add("tokens_per_round", tokens / rounds)


def unsplit(
    engine: TorchEngine, requests: list[GenerateRequest]
) -> list[tuple[list[int], str, str]]:
    ids: list[list[int]] = [[] for _ in requests]
    text, ends = [""] * len(requests), [""] * len(requests)
    for number, request in enumerate(requests):
        engine.add(number, request, ())
        engine.allow(number, 10**6)
    while frames := engine.step():
        for frame in frames:
            ids[frame.session] += frame.token_ids
            text[frame.session] += frame.text
            ends[frame.session] = frame.finished
    return list(zip(ids, text, ends, strict=True))


class Slow(Chain):
    """A chain whose every way to a stage and back is slept."""

    def __init__(self, chain: Chain) -> None:
        self.engines = chain.engines
        self.first_seconds = 0.0

    def pass_through(self, fed: Any) -> Any:
        time.sleep(2 * WAY_SECONDS * len(self.engines))
        drawn = super().pass_through(fed)
        if not self.first_seconds and any(drawn.values()):
            self.first_seconds = time.perf_counter()
        return drawn


def guessing(claims: Claims, chain: Chain, *, quick: bool) -> None:
    slow, tokens = Slow(chain), 24 if quick else 40

    def gain(prompt: str) -> float:
        speeds = []
        for drafts_max in (DRAFT_TOKENS_MAX, 0):
            slow.first_seconds = 0.0  # reading the prompt is the same with guesses and without
            asked = [GenerateRequest(prompt=prompt, max_tokens=tokens)]
            ((ids, *_),) = slow.together(asked, drafts_max)
            speeds.append((len(ids) - 1) / (time.perf_counter() - slow.first_seconds))
        return speeds[0] / speeds[1]

    copied = [gain(prompt) for prompt in COPIED[: 1 if quick else 2]]
    claims.add("speculation_gain", min(copied), at_least=GAIN_BAR)
    if not quick:
        claims.add("speculation_gain_plain", min(gain(prompt) for prompt in PLAIN))


def local_speed(engine: TorchEngine) -> float:
    """Tokens a second of one unsplit answer, after its first one."""
    engine.add(0, GenerateRequest(**REQUEST), ())
    engine.allow(0, 10**6)
    tokens, began = 0, 0.0
    while frames := engine.step():
        if tokens == 0 and frames[0].token_ids:
            began = time.perf_counter()
        tokens += len(frames[0].token_ids)
    return (tokens - 1) / (time.perf_counter() - began)


def rounds_of(token_ids: list[int]) -> int:
    """Rounds that the driver needs for this answer; the model's part is known already."""
    driver = SplitAnswer(GenerateRequest(**REQUEST), tokenizer.of_model(MODEL))
    while not driver.finished:
        draws, at = driver.inputs()[-1].draws, len(driver.token_ids)
        driver.take([*token_ids[at : at + draws], *[0] * draws][:draws])
    assert driver.token_ids == token_ids, "a guess was taken that was wrong"
    return driver.rounds


# --------------------------------------------------------------------------- real daemons


class Answered(NamedTuple):
    """`seconds` from the first text to the end; `resume_seconds` from the kill to the next text."""

    token_ids: list[int]
    seconds: float
    resume_seconds: float = 0.0
    was_warm: bool = False


def answer(buyer: Daemon, tokens: int = TOKENS) -> Answered:
    first = 0.0
    for frame in buyer.follow("inference.generate", **(REQUEST | {"max_tokens": tokens})):
        if isinstance(frame, messages.Text) and not first:
            first = time.monotonic()
        if isinstance(frame, messages.Answer):
            return Answered(frame.value["result"]["token_ids"], time.monotonic() - first)
        if isinstance(frame, messages.Failure):
            raise DaemonError(f"{frame.code} {frame.message}\n{buyer.log_end()}")
    raise DaemonError("frames end with an answer or an error")


LOADED: set[tuple[int, str]] = set()
"""(process, layers): what each worker was seen to compute."""


def warm(buyer: Daemon, stages: list[Daemon]) -> None:
    """Whoever is left computes once without each of them: most layers are loaded twice then."""
    for absent in stages:
        buyer.run("block", absent.peer)
        answer(buyer, 1)
        buyer.run("unblock", absent.peer)
        note_loaded(buyer, stages)


def note_loaded(buyer: Daemon, stages: list[Daemon]) -> list[tuple[Daemon, str]]:
    """Who computed which layers of the latest job."""
    by_peer = {stage.peer: stage for stage in stages}
    served = [(by_peer[peer], layers) for peer, layers in served_by(buyer)]
    LOADED.update((stage.pid, layers) for stage, layers in served if stage.running())
    return served


def killed(seed: int, buyer: Daemon, stages: list[Daemon]) -> Answered:
    """One answer, a stage of which is killed at a random token; it is back after, and cold."""
    draw, pieces, lost, resumed = random.Random(seed), 0, 0.0, 0.0
    at, victim = draw.randrange(2, 12), stages[0]
    by_peer = {stage.peer: stage for stage in stages}
    warm(buyer, stages)
    for frame in buyer.follow("inference.generate", **REQUEST):
        if isinstance(frame, messages.Text):
            pieces += 1
            if lost and not resumed:
                resumed = time.monotonic() - lost
            if pieces == at:
                victim = by_peer[draw.choice(serving(buyer))]
                lost = time.monotonic()
                os.killpg(victim.pid, signal.SIGKILL)
        if isinstance(frame, messages.Failure):
            raise DaemonError(f"{frame.code} {frame.message}\n{buyer.log_end()}")
        if isinstance(frame, messages.Answer):
            victim.kill()
            loaded = set(LOADED)
            stand_in, layers = note_loaded(buyer, stages)[-1]
            was_warm = (stand_in.pid, layers) in loaded
            victim.restart()
            known(buyer, stages, OPERATION)
            return Answered(frame.value["result"]["token_ids"], 0.0, resumed, was_warm)
    raise DaemonError("frames end with an answer or an error")


def serving(buyer: Daemon) -> list[str]:
    """Who has the stages of the latest job."""
    attempts = buyer.ask("job", job=latest(buyer))["attempts"]
    return [one["seller"] for one in attempts if one["outcome"] == "running"]


def served_by(buyer: Daemon) -> list[tuple[str, str]]:
    """All stages of the latest job, which has ended: (peer, layers and digest), as called."""
    attempts = buyer.run("explain", latest(buyer), "--json").json["attempts"]
    return [(one["seller"], one["kernel"].rpartition("/")[2]) for one in attempts]


def latest(buyer: Daemon) -> str:
    return str(buyer.ask("jobs", limit=1)[0]["job"])


def tell(claims: Claims, runs: list[Answered]) -> None:
    warm = sorted(run.resume_seconds for run in runs if run.was_warm)
    cold = [run.resume_seconds for run in runs if not run.was_warm]
    claims.note("resume_seeds", len(runs))
    claims.note("resume_warm", len(warm))
    claims.note("stage_resume_s_goal", RESUME_GOAL)
    if warm:
        claims.add("stage_resume_s_p50", statistics.median(warm))
        p95 = warm[-(-95 * len(warm) // 100) - 1]
        claims.add("stage_resume_s_p95", p95, at_most=RESUME_SECONDS)
    if cold:
        claims.add("cold_resume_s", statistics.median(cold))


if __name__ == "__main__":
    sys.exit(main(measure, __doc__ or ""))
