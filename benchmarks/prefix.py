"""What the next turn of a conversation costs an engine that kept the last one's keys.

    python benchmarks/prefix.py [--quick] [--json] [--save]

Six turns, each with every question and answer before it, in a fenced worker as a node runs it, one
thread. Each turn is asked twice: under the conversation's own name (`warm`), and under one that
nobody had before (`cold`), which shares the template's tokens only. `ENGINE_turnN_warm_cpu` is the
worker's processor seconds until the first token; `turn6_prefill_cpu_over_cold` is warm over cold in
the last turn, of the engine that gains least, in the better of two conversations unless `--quick`.
`identical_fraction` is of turns whose tokens and fingerprints are the same both times.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil
import trio
from claims import Claims, main

from aivillage.models.inference import engine_choice, fingerprint
from aivillage.models.inference.generate import ChatMessage, GenerateRequest
from aivillage.node.engines import EngineClient
from aivillage.node.workers import WorkerSettings, open_workers

QUESTIONS = (
    "I want to grow food behind my house. The soil is heavy and wet. What should I plant first?",
    "How much sun do they need, and what do I do if a tall wall keeps the light away in spring?",
    "My neighbour says that I should dig in sand before anything else. Is that a good idea or not?",
    "Something eats the leaves at night and leaves silver marks on the stones. What could it be?",
    "I do not want to use any poison, since we have a dog and two small children. What else works?",
    "Thank you. Say it all again in a few words, so that I can write it on a piece of paper.",
)
COLD_TOKENS, ALL_UNITS = 4, 10**6
RATIO_MOST = 0.35


class Size(NamedTuple):
    """Of a run: tokens an answer, the turns that are asked cold too, conversations."""

    answer_tokens: int
    cold_turns: tuple[int, ...]
    conversations: int


FULL, QUICK = Size(24, (2, 3, 4, 5, 6), 2), Size(20, (2, 6), 1)


class Turn(NamedTuple):
    """`cpu`: seconds to the first token. `marks`: of each token's state."""

    ids: list[int]
    text: str
    marks: list[float]
    cpu: float


def spent(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def turn(engine: EngineClient, request: GenerateRequest, scope: bytes) -> Turn:
    process = psutil.Process(engine.pid)
    ids: list[int] = []
    marks: list[float] = []
    began, cpu, text = spent(process), 0.0, ""
    async with engine.open_session(msgspec.msgpack.encode(request), scope=scope) as session:
        session.allow(ALL_UNITS)
        async for frame in session:
            if frame.token_ids and not ids:
                cpu = spent(process) - began
            ids += frame.token_ids
            text += frame.text
            marks += fingerprint.read(frame.fingerprint).values if frame.fingerprint else ()
    return Turn(ids, text, marks, cpu)


async def conversation(
    engine: EngineClient, seed: int, size: Size
) -> tuple[dict[str, float], list[bool]]:
    """Processor seconds by turn, and whether each turn that was asked twice is the same."""
    messages: tuple[ChatMessage, ...] = ()
    found: dict[str, float] = {}
    same: list[bool] = []
    scope = os.urandom(16)
    for number, question in enumerate(QUESTIONS, 1):
        messages += (ChatMessage(content=question),)
        request = GenerateRequest(
            messages=messages, max_tokens=size.answer_tokens, temperature=0.8, seed=seed
        )
        warm = await turn(engine, request, scope)
        found[f"turn{number}_warm_cpu"] = warm.cpu
        if number in size.cold_turns:
            short = msgspec.structs.replace(request, max_tokens=COLD_TOKENS)
            cold = await turn(engine, short, os.urandom(16))
            found[f"turn{number}_cold_cpu"] = cold.cpu
            count = len(cold.ids)
            same.append(warm.ids[:count] == cold.ids and warm.marks[:count] == cold.marks)
        messages += (ChatMessage(role="assistant", content=warm.text),)
    return found, same


async def measured(name: str, size: Size) -> tuple[dict[str, float], list[bool]]:
    """The better conversation of an engine, by its last turn."""
    with tempfile.TemporaryDirectory() as folder:
        where: dict[str, Any] = {
            "cache_folder": Path(folder) / "c",
            "scratch_folder": Path(folder) / "s",
        }
        async with open_workers(WorkerSettings(engine=name), **where) as workers:
            engine = await workers.engine("inference.generate")
            await turn(engine, GenerateRequest(prompt="Warm up.", max_tokens=2), os.urandom(16))
            runs = [await conversation(engine, seed, size) for seed in range(size.conversations)]
            figures = min((found for found, _ in runs), key=ratio)
            told = engine.prefix_tokens
            return (
                figures | {"tokens_read": told.read, "tokens_reused": told.reused},
                [one for _, same in runs for one in same],
            )


def ratio(figures: dict[str, float]) -> float:
    return figures["turn6_warm_cpu"] / figures["turn6_cold_cpu"]


def measure(claims: Claims, args: argparse.Namespace) -> None:
    ratios, same = {}, []
    size = QUICK if args.quick else FULL
    for name in engine_choice.installed():
        figures, alike = trio.run(functools.partial(measured, name, size))
        for key, value in figures.items():
            claims.add(f"{name}_{key}", value)
        ratios[name] = ratio(figures)
        claims.add(f"{name}_turn6_prefill_cpu_over_cold", ratios[name])
        same += alike
    claims.add("turn6_prefill_cpu_over_cold", max(ratios.values()), at_most=RATIO_MOST)
    claims.add("identical_fraction", sum(same) / len(same), at_least=1.0)


if __name__ == "__main__":
    sys.exit(main(measure, __doc__.splitlines()[0]))
