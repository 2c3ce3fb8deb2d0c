"""What the torch engine does on this machine: tokens per second, load time, memory.

    python benchmarks/engine_torch.py

Decoding at 1 and 8 sessions, reading a prompt, and the longest step that a decoding neighbour
sees meanwhile. CPU seconds beside wall seconds: on a busy machine trust the former.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import msgspec

from aivillage.models.inference import catalogue
from aivillage.models.inference.engine_torch import TorchEngine
from aivillage.models.inference.generate import GenerateRequest

TOKENS = 48
ALL_UNITS = 10**6


def request(prompt: str, tokens: int = TOKENS) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, max_tokens=tokens)


def decode(engine: TorchEngine, sessions: int) -> dict[str, float]:
    for number in range(sessions):
        engine.add(number, request(f"Write a long story about the number {number}."), ())
        engine.allow(number, ALL_UNITS)
    while len([f for f in engine.step() if f.token_ids]) < sessions:
        pass
    wall, cpu, tokens = time.perf_counter(), time.process_time(), 0
    while frames := engine.step():
        tokens += sum(len(frame.token_ids) for frame in frames)
        if len(frames) < sessions:
            break
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    for number in range(sessions):
        engine.cancel(number)
    return {"tokens_per_second": tokens / wall, "tokens_per_cpu_second": tokens / cpu}


def prefill(engine: TorchEngine, words: int) -> dict[str, float]:
    prompt = "alpha " * words
    engine.add(0, request(prompt, 1), ())
    engine.allow(0, ALL_UNITS)
    tokens = len(engine.tokenizer.encode(prompt))
    wall, cpu = time.perf_counter(), time.process_time()
    while engine.step():
        pass
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "prompt_tokens": tokens,
        "tokens_per_second": tokens / wall,
        "tokens_per_cpu_second": tokens / cpu,
    }


def longest_gap_seconds(engine: TorchEngine) -> float:
    """Between two tokens of a session while a neighbour reads a long prompt."""
    engine.add(0, request("Count to one hundred."), ())
    engine.add(1, request("alpha " * 400, 1), ())
    for number in (0, 1):
        engine.allow(number, ALL_UNITS)
    gaps, last = [], time.perf_counter()
    for _ in range(14):
        frames = {frame.session: frame for frame in engine.step()}
        if frames[0].token_ids:
            now = time.perf_counter()
            gaps.append(now - last)
            last = now
    engine.cancel(0)
    engine.cancel(1)
    return max(gaps[1:])


def main() -> None:
    engine = TorchEngine(catalogue.known(catalogue.DEFAULT))
    figures: dict[str, Any] = {
        "info": msgspec.to_builtins(engine.info()),
        "load_seconds": engine.load_seconds,
        "decode_1": decode(engine, 1),
        "decode_8": decode(engine, 8),
        "prefill": prefill(engine, 512),
        "longest_gap_seconds": longest_gap_seconds(engine),
        "resident_bytes_max": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    json.dump(figures, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
