"""Are cheats caught in one pass over an answer, is nobody honest accused, and what does it cost?

    python benchmarks/verified_generation.py [--quick] [--json]

The real model and engine; the rules are the product's (`node/recheck.py`). `cheats_caught_KIND` is
the part caught of those that claim our kernel class, `near_` of the same that claim another class
of its family, where rounding is forgiven. `honest_accused` is over answers made at one and two
threads, at batch sizes from 1 to 8, by two engines of our class and by others with other
instruction sets. `deviation_` is how far fingerprints were from ours, relative to the states'
length: the largest of honest ones, the smallest of a kind's answers. `recheck_over_generate` is CPU
time of looking at answers over that of making them one at a time; `_b8`: eight at a time.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor

import msgspec
import torch
from cheating_engines import OTHER_MODELS, OTHER_PRECISIONS, cheating
from claims import Claims, main

from aivillage.models.inference import catalogue
from aivillage.models.inference.engine_torch import TorchEngine
from aivillage.models.inference.fingerprint import (
    DEVIATION_MAX,
    SPAN_TOKENS_MAX,
    Fingerprint,
    packed,
    read,
)
from aivillage.models.inference.generate import GenerateRequest
from aivillage.models.inference.recheck import Recheck
from aivillage.node.recheck import judged
from aivillage.node.verifier import Answer, Share
from aivillage.protocols.ports import EngineInfo
from aivillage.protocols.rechecking import Claim, Finding
from aivillage.protocols.types import AttemptId, PeerId

BATCHES = (1, 2, 3, 5, 8)
TOPICS = ("rain", "a small house", "the sea at night", "bread", "why birds sing", "a lost key")
MACHINES = (
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "THREADS": "2"},
    {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "THREADS": "1"},
)
"""What another machine would have: older instruction sets, and another number of threads."""

QUICK_MODELS = ("layer_dropped", "weights_int4", "bfloat16")

Made = list[tuple[GenerateRequest, Claim]]


def requests(count: int, tokens: int) -> list[GenerateRequest]:
    """Greedy, drawn, and drawn from the likeliest, in turn; prompts of one to three sentences."""
    return [
        GenerateRequest(
            prompt=f"Write about {TOPICS[n % len(TOPICS)]}, part {n}. " * (1 + n % 3),
            max_tokens=tokens,
            temperature=(0.0, 0.9, 0.7)[n % 3],
            top_p=(1.0, 1.0, 0.9)[n % 3],
            seed=n,
        )
        for n in range(count)
    ]


def answers(engine: TorchEngine, asked: Sequence[GenerateRequest]) -> Made:
    """All of `asked` in one batch, as a seller gives them."""
    ids: dict[int, list[int]] = {n: [] for n in range(len(asked))}
    marks: dict[int, list[bytes]] = {n: [] for n in range(len(asked))}
    for number, request in enumerate(asked):
        engine.add(number, request, ())
        engine.allow(number, 10**6)
    while frames := engine.step():
        for frame in frames:
            ids[frame.session] += frame.token_ids
            marks[frame.session] += [frame.fingerprint] if frame.fingerprint else []
    return [(asked[n], Claim(tuple(ids[n]), tuple(marks[n]))) for n in ids]


def batched(engine: TorchEngine, asked: Sequence[GenerateRequest], sizes: Iterable[int]) -> Made:
    made: Made = []
    for size in sizes:
        made += answers(engine, asked[len(made) : len(made) + size])
        if len(made) == len(asked):
            break
    return made


def look(engine: TorchEngine, request: GenerateRequest, claim: Claim) -> Finding:
    """One pass, as a node makes it."""
    engine.recheck(0, request, claim)
    while frames := engine.step():
        for frame in frames:
            if frame.finding is not None:
                return frame.finding
    raise RuntimeError("no finding")


def accused(own: EngineInfo, claim: Claim, finding: Finding, kernel: str) -> bool:
    """Whether the product's rule finds the seller wrong that names this class."""
    share = Share(
        attempt=AttemptId(b"a"), seller=PeerId("seller"), kernel=kernel, identical="guaranteed",
        first=0, count=len(claim.token_ids),
    )  # fmt: skip
    said = Answer(token_ids=claim.token_ids, shares=(share,), fingerprints=claim.fingerprints)
    found = judged(said, own, finding)
    if not found.judged:
        raise RuntimeError(f"nobody could judge {kernel}")
    return found.wrong is not None


def another_class(kernel: str) -> str:
    """As a machine with other instructions would name it."""
    parts = kernel.split("/")
    return "/".join((*parts[:5], "ANOTHER", *parts[6:]))


def worst(finding: Finding) -> float:
    return max((span.relative for span in finding.spans), default=0.0)


# --------------------------------------------------------------------------- honest


def elsewhere(machine: dict[str, str], asked: list[GenerateRequest]) -> tuple[str, Made]:
    """In a process of its own, since instruction sets are chosen at the import of torch."""
    os.environ |= machine  # children have it from their start
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
            return pool.submit(as_machine, int(machine["THREADS"]), asked).result()
    finally:
        for name in machine:
            del os.environ[name]


def as_machine(threads: int, asked: list[GenerateRequest]) -> tuple[str, Made]:
    engine = TorchEngine(catalogue.known(catalogue.DEFAULT), threads=threads)
    return engine.info().kernel_class, batched(engine, asked, itertools.cycle((8, 5)))


def honest(claims: Claims, engine: TorchEngine, count: int, tokens: int, machines: int) -> None:
    """Two engines, all batch sizes, two thread counts, by our class's rule; other machines."""
    own = engine.info()
    asked = requests(count, tokens)
    far = count // 5  # at each other machine
    here = asked[: count - far * machines]
    half = len(here) // 2
    is_quick = machines < len(MACHINES)
    other = engine if is_quick else TorchEngine(catalogue.known(catalogue.DEFAULT), slots=5)
    made = batched(engine, here[:half], itertools.cycle(BATCHES))
    torch.set_num_threads(2)
    made += batched(other, here[half:], itertools.cycle(BATCHES[:4]))
    torch.set_num_threads(1)
    del other
    same = [(look(engine, *pair), pair[1]) for pair in made]
    wrong = sum(accused(own, claim, found, own.kernel_class) for found, claim in same)
    claims.add("honest_same_class", len(same))
    bits = sum(worst(found) == 0 and not found.odd for found, _ in same)
    claims.add("honest_same_class_bit_equal", bits / len(same))
    claims.add("deviation_max_honest_same_class_millionths", 1e6 * max(worst(f) for f, _ in same))
    print(f"# {wrong} of {len(same)} honest ones of our class accused", file=sys.stderr)
    near: list[Finding] = []
    for number in range(machines):
        start = len(here) + far * number
        kernel, away = elsewhere(MACHINES[number], asked[start : start + far])
        for request, claim in away:
            near.append(look(engine, request, claim))
            wrong += accused(own, claim, near[-1], kernel)
        print(f"# {wrong} accused with {len(away)} of {kernel}", file=sys.stderr)
    claims.add("honest_other_class", len(near))
    claims.add("deviation_max_honest_other_class_millionths", 1e6 * max(map(worst, near)))
    claims.add("honest_draws_moved_by_rounding", sum(len(found.odd) for found in near))
    claims.add("honest_answers", len(same) + len(near))
    claims.add("honest_accused", wrong, at_most=0)


# --------------------------------------------------------------------------- cheats


def of_tokens(engine: TorchEngine, made: Made) -> dict[str, Made]:
    """Cheats that need no other model: what they do with honest answers."""
    own = engine.info()
    end = catalogue.known(own.model).end_token_id
    altered, truncated, others, liars = [], [], [], []
    for number, (request, claim) in enumerate(made):
        ids = list(claim.token_ids)
        place = number % len(ids)
        ids[place] = (ids[place] + 1 + number) % own.vocabulary
        altered.append((request, Claim(tuple(ids), claim.fingerprints)))
        half = max(1, len(claim.token_ids) // 2)
        truncated.append((request, short(claim, (*claim.token_ids[:half], end))))
        neighbour = made[(number + 1) % len(made)][1]
        others.append((request, neighbour))
        lying = msgspec.structs.replace(
            request, temperature=0.0 if request.temperature else 0.9, seed=request.seed + 1
        )
        liars.append(lying)
    drawn = batched(engine, liars, itertools.repeat(8))
    sampled = [(pair[0], lie[1]) for pair, lie in zip(made, drawn, strict=True)]
    return {
        "altered_token": altered, "truncated": truncated, "anothers_result": others,
        "wrong_sampler": sampled,
    }  # fmt: skip


def short(claim: Claim, ids: tuple[int, ...]) -> Claim:
    """The honest numbers, as far as they go."""
    values = [value for body in claim.fingerprints for value in read(body).values]
    return Claim(ids, spans_of(values[: len(ids)]))


def spans_of(values: Sequence[float]) -> tuple[bytes, ...]:
    spans = range(0, len(values), SPAN_TOKENS_MAX)
    return tuple(packed(Fingerprint(at, tuple(values[at : at + SPAN_TOKENS_MAX]))) for at in spans)


def caught(claims: Claims, engine: TorchEngine, kind: str, made: Made) -> None:
    own = engine.info()
    findings = [(look(engine, *pair), pair[1]) for pair in made]
    for prefix, kernel in (("", own.kernel_class), ("near_", another_class(own.kernel_class))):
        seen = sum(accused(own, claim, found, kernel) for found, claim in findings)
        claims.add(f"{prefix}cheats_caught_{kind}", seen / len(made), at_least=1.0)
        print(f"# {seen} of {len(made)} {prefix}{kind} caught", file=sys.stderr)
    if kind in OTHER_MODELS or kind in OTHER_PRECISIONS:
        least = min(worst(found) for found, _ in findings)
        claims.add(f"deviation_min_{kind}_millionths", 1e6 * least)
        own_tokens = sum(not found.odd for found, _ in findings)
        claims.add(f"tokens_all_the_same_{kind}", own_tokens / len(made))


def cheats(
    claims: Claims, engine: TorchEngine, count: int, tokens: int, models: Sequence[str]
) -> None:
    asked = requests(count, tokens)
    truth = batched(engine, asked, itertools.repeat(8))
    for kind, made in of_tokens(engine, truth).items():
        caught(claims, engine, kind, made)
    borrowed: Made = []
    for kind in models:
        with cheating(engine, kind):
            made = batched(engine, asked, itertools.repeat(8))
        caught(claims, engine, kind, made)
        if kind == "weights_int4":
            borrowed = [(request, whitewashed(engine, request, c)) for request, c in made]
    caught(claims, engine, "honest_numbers_of_a_cheap_models_tokens", borrowed)
    claims.add("cheats_a_kind", count)


def whitewashed(engine: TorchEngine, request: GenerateRequest, claim: Claim) -> Claim:
    """The numbers that the honest model has for a cheaper one's tokens: one pass gives them."""
    engine.recheck(0, request, claim)
    session = engine._sessions[0]
    while engine.step():
        continue
    if not isinstance(session, Recheck):
        raise TypeError("no recheck")
    return Claim(claim.token_ids, spans_of(session._marks))


# --------------------------------------------------------------------------- cost


def cost(claims: Claims, engine: TorchEngine, count: int, tokens: int) -> None:
    """CPU seconds of both in one process, one thread; 1-minute load beside them."""
    asked = requests(count, tokens)
    begun = time.process_time()
    made = batched(engine, asked, itertools.repeat(1))
    alone = time.process_time() - begun
    begun = time.process_time()
    for pair in made:
        look(engine, *pair)
    looked = time.process_time() - begun
    claims.add("recheck_over_generate", looked / alone, at_most=0.15)
    answered = sum(len(claim.token_ids) for _, claim in made)
    claims.add("generate_cpu_ms_a_token", 1000 * alone / answered)
    claims.add("recheck_cpu_ms_a_token", 1000 * looked / answered)
    sizes = [len(b) for _, c in made for b in c.fingerprints if len(read(b).values) == 32]
    claims.add("fingerprint_bytes_per_32_tokens", max(sizes))
    claims.add("load_1_minute", os.getloadavg()[0])


def cost_beside_eight(claims: Claims, engine: TorchEngine, tokens: int) -> None:
    """Eight decode together at a fifth of the price each; looking at them costs as before."""
    eight = requests(8, tokens)
    begun = time.process_time()
    together = answers(engine, eight)
    eight_cpu = time.process_time() - begun
    begun = time.process_time()
    for pair in together:
        look(engine, *pair)
    claims.add("recheck_over_generate_b8", (time.process_time() - begun) / eight_cpu)


def measure(claims: Claims, args: argparse.Namespace) -> None:
    engine = TorchEngine(catalogue.known(catalogue.DEFAULT))
    claims.add("deviation_allowed_millionths", 1e6 * DEVIATION_MAX)
    if args.quick:
        cost(claims, engine, 1, 64)
        cheats(claims, engine, 2, 8, QUICK_MODELS)
        honest(claims, engine, 10, 8, machines=1)
    else:
        cost(claims, engine, 2, 128)
        cost_beside_eight(claims, engine, 128)
        cheats(claims, engine, 20, 33, (*OTHER_MODELS, *OTHER_PRECISIONS))
        honest(claims, engine, 200, 20, machines=2)


if __name__ == "__main__":
    raise SystemExit(main(measure, __doc__ or ""))
