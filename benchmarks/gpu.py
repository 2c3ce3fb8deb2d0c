"""The torch engine on a GPU in bfloat16, beside the reference: itself on the CPU in float32.

    python benchmarks/gpu.py [--quick] [--json]

Without a GPU that torch can use it says so in `note`, measures nothing, and is no failure. No bar
is set: nobody has run it on a GPU yet (docs/decisions/0029-gpu.md).

`cuda_b1` and `cuda_b8` are tokens a wall second with so many sessions, `cuda_prefill` prompt tokens
a wall second, `cuda_load_s` seconds to load; the engine is in this process, unfenced.
`same_likeliest` is the share of 40 tokens of a text after which both hold the same token for the
likeliest, `nats_a_token_apart` the mean divergence of their distributions. `probe_passed`: whether
the rows of the self-test had the same bits in every company; the engine says `best effort` all the
same.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from claims import Claims, main

from aivillage.models import gpu
from aivillage.models.inference import catalogue, engine_choice
from aivillage.models.inference.generate import GenerateRequest

TOKENS, PROMPT_TOKENS, ALL_UNITS = 48, 512, 10**6
TEXT = (
    "The village lies at the foot of a mountain. In the morning the farmers walk to their "
    "fields, and in the evening they come home, tired and hungry, to eat soup and bread."
)


def decoded_a_second(engine: Any, sessions: int) -> float:
    """Tokens a wall second from where all have begun to where the first ends."""
    for number in range(sessions):
        prompt = f"Write a long story about the number {number}."
        engine.add(number, GenerateRequest(prompt=prompt, max_tokens=TOKENS), ())
        engine.allow(number, ALL_UNITS)
    while sum(1 for frame in engine.step() if frame.token_ids) < sessions:
        pass
    made, began, ended = 0, time.monotonic(), False
    while not ended:
        frames = engine.step()
        made += sum(len(frame.token_ids) for frame in frames)
        ended = any(frame.finished for frame in frames)
    seconds = time.monotonic() - began
    for number in range(sessions):
        engine.cancel(number)
    return made / seconds


def read_a_second(engine: Any) -> float:
    request = GenerateRequest(prompt="alpha " * PROMPT_TOKENS, max_tokens=1)
    began = time.monotonic()
    engine.add(0, request, ())
    engine.allow(0, ALL_UNITS)
    while not any(frame.finished for frame in engine.step()):
        pass
    return PROMPT_TOKENS / (time.monotonic() - began)


def log_probabilities(engine: Any, ids: tuple[int, ...]) -> Any:
    """Of every token after each of `ids`: (tokens, vocabulary), float32 on the CPU."""
    import torch

    from aivillage.models.inference.llama import Span

    states = engine._model.forward([Span(0, 0, ids)])[: len(ids)]
    logits = torch.cat([engine._model.logits(part).float().cpu() for part in states.split(8)])
    return torch.log_softmax(logits, dim=1)


def measure(claims: Claims, args: argparse.Namespace) -> None:
    import torch

    if not torch.cuda.is_available():
        claims.note("note", "no GPU here: nothing was measured")
        return
    from aivillage.models.inference import sameness

    model = catalogue.known(catalogue.DEFAULT)
    there = engine_choice.engine_of(model, slots=8, engine="torch", device=gpu.Device("cuda"))
    here: Any = engine_choice.engine_of(model, slots=1, engine="torch")
    engine: Any = there
    claims.note("kernel_class", there.info().kernel_class)
    claims.add("cuda_load_s", there.load_seconds)
    rounds = 1 if args.quick else 3
    for sessions in (1, 8):
        rates = [decoded_a_second(engine, sessions) for _ in range(rounds)]
        claims.add(f"cuda_b{sessions}", max(rates))
    claims.add("cuda_prefill", max(read_a_second(engine) for _ in range(rounds)))
    ids = tuple(here.tokenizer.encode(TEXT))[:40]
    exact, near = log_probabilities(here, ids), log_probabilities(engine, ids)
    same = exact.argmax(dim=1) == near.argmax(dim=1)
    claims.add("same_likeliest", float(same.float().mean()))
    claims.add("nats_a_token_apart", float((exact.exp() * (exact - near)).sum(dim=1).mean()))
    found = sameness.probe(engine._model, slots=8, context_tokens=engine.info().context_tokens)
    claims.note("probe_passed", found.passed)


if __name__ == "__main__":
    raise SystemExit(main(measure, __doc__ or ""))
