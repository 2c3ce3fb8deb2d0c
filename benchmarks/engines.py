"""What each engine does with a processor second, beside the library that it is made of.

    python benchmarks/engines.py [--quick] [--json]

Each arm is a process of its own, one thread, the packaged model, greedy. `ARM_bN` is tokens per
processor second with N sequences at once, `ARM_prefill` prompt tokens per processor second,
`ARM_load_s` wall seconds until it could answer, `ARM_rss_mb` the most memory it had.

Arms: `openvino` and `torch` are workers as a node runs them, fenced, over their pipe, the worker's
time alone; `openvino_bare` is the library fed by a loop that does nothing but take the likeliest
token; `genai_bare` is openvino-genai where it is installed, whose own reading of the file rounds
the weights (docs/decisions/0011-engines.md). `worker_over_bare_*` compares the first with the
third, best of two rounds each. With 32 sequences `openvino` is the engine in this process: a node
sells at most 8 slots of an engine.

`--quick` measures `openvino` and `openvino_bare` again and takes the rest from the kept results.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import trio
from claims import ROOT, Claims, main, script_sha256

from aivillage.models.inference import catalogue, engine_choice
from aivillage.models.inference.generate import GenerateRequest

TOKENS, ALL_UNITS = 48, 10**6
PROMPT_TOKENS = 512
B1_LEAST, B8_LEAST = 0.95, 0.9
Figures = dict[str, float]


@contextmanager
def timed(found: Figures, key: str, count: Callable[[], int]) -> Iterator[None]:
    """Counted things per processor second of this process; the best round is kept."""
    began = time.process_time()
    yield
    found[key] = max(found.get(key, 0.0), count() / (time.process_time() - began))


def closed(found: Figures, load_seconds: float) -> Figures:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found | {"load_s": load_seconds, "rss_mb": most}


def token_ids(count: int) -> list[int]:
    return [(7919 * n + 11) % 49_152 for n in range(count)]


# --------------------------------------------------------------------------- bare libraries


def openvino_bare(rounds: int) -> Figures:
    """Graph and library without sessions, stop strings, draws, allowances or a pipe."""
    from aivillage.models.inference.gguf_file import GgufFile
    from aivillage.models.inference.gguf_model import read_shape
    from aivillage.models.inference.llama import Span
    from aivillage.models.inference.openvino_model import PagedLlama

    began, found = time.monotonic(), Figures()
    file = GgufFile(catalogue.weights_path(catalogue.known(catalogue.DEFAULT)))
    model = PagedLlama(file, read_shape(file), slots=32, context_tokens=1024)
    load_seconds = time.monotonic() - began
    for batch in (1, 8, 32) * rounds:
        ids = token_ids(40)
        for slot in range(batch):
            model.forward([Span(slot, 0, tuple(ids))])
        latest, steps = [5] * batch, TOKENS if batch < 32 else TOKENS // 2
        with timed(found, f"b{batch}", lambda total=steps * batch: total):
            for step in range(steps):
                spans = [Span(n, 40 + step, (t,), drawn=True) for n, t in enumerate(latest)]
                latest = model.logits(model.forward(spans)).argmax(dim=1).tolist()
    with timed(found, "prefill", lambda: PROMPT_TOKENS):
        for at in range(0, PROMPT_TOKENS, 32):
            model.forward([Span(0, at, tuple(token_ids(PROMPT_TOKENS)[at : at + 32]))])
    return closed(found, load_seconds)


def genai_bare(rounds: int) -> Figures:
    """openvino-genai's own batching pipeline, with its defaults."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    began, found = time.monotonic(), Figures()
    schedule = genai.SchedulerConfig()
    schedule.cache_size, schedule.max_num_seqs = 1, 40
    path = catalogue.weights_path(catalogue.known(catalogue.DEFAULT))
    settings = {"INFERENCE_NUM_THREADS": 1}
    pipeline = genai.ContinuousBatchingPipeline(str(path), schedule, "CPU", settings)
    load_seconds = time.monotonic() - began

    def run(batch: int, prompt: list[int], tokens: int, key: str, unit: int) -> None:
        config = genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True)
        ids = ov.Tensor(np.array([prompt], dtype=np.int64))
        handles = [pipeline.add_request(n, ids, config) for n in range(batch)]
        steps = 0
        if tokens > 1:
            pipeline.step()  # reads the prompts
        with timed(found, key, lambda: steps * unit):
            while pipeline.has_non_finished_requests():
                pipeline.step()
                steps += 1
        del handles

    for batch in (1, 8, 32) * rounds:
        run(batch, token_ids(40), TOKENS, f"b{batch}", batch)
    pipeline_steps = -(-PROMPT_TOKENS // schedule.max_num_batched_tokens)
    run(1, token_ids(PROMPT_TOKENS), 1, "prefill", PROMPT_TOKENS // pipeline_steps)
    return closed(found, load_seconds)


# --------------------------------------------------------------------------- engines


def story(number: int) -> GenerateRequest:
    return GenerateRequest(
        prompt=f"Write a long story about the number {number}.", max_tokens=TOKENS
    )


def in_process_32(_rounds: int) -> Figures:
    """The openvino engine with 32 sessions, here."""
    from aivillage.models.inference.engine_openvino import OpenvinoEngine

    engine = OpenvinoEngine(catalogue.known(catalogue.DEFAULT), slots=32)
    found, made = Figures(), 0
    for number in range(32):
        engine.add(number, story(number), ())
        engine.allow(number, ALL_UNITS)
    while sum(1 for frame in engine.step() if frame.token_ids) < 32:
        pass
    with timed(found, "b32", lambda: made):
        for _ in range(TOKENS // 3):  # while all of them go on
            made += sum(len(frame.token_ids) for frame in engine.step())
    return found


def worker(name: str, rounds: int) -> Figures:
    return trio.run(_worker, name, rounds)


async def _worker(name: str, rounds: int) -> Figures:
    from aivillage.node.workers import WorkerSettings, open_workers

    with tempfile.TemporaryDirectory() as folder:
        settings = WorkerSettings(engine=name)
        where = {"cache_folder": Path(folder) / "c", "scratch_folder": Path(folder) / "s"}
        async with open_workers(settings, **where) as workers:
            began = time.monotonic()
            engine = await workers.engine("inference.generate")
            found = {"load_s": time.monotonic() - began}
            process = psutil.Process(engine.pid)
            for batch in (1, 8) * rounds:
                rate = await _decode(engine, process, batch)
                found[f"b{batch}"] = max(found.get(f"b{batch}", 0.0), rate)
            found["prefill"] = await _prefill(engine, process)
            found["rss_mb"] = process.memory_info().rss / 2**20
            return found


def _spent(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def _decode(engine: Any, process: psutil.Process, batch: int) -> float:
    """Tokens per processor second from where all have begun until the first ends."""
    made, begun, state = 0, set(), {"from": 0.0, "to": 0.0}
    async with trio.open_nursery() as nursery:

        async def one(number: int) -> None:
            nonlocal made
            async with engine.open_session(msgspec.msgpack.encode(story(number))) as session:
                session.allow(ALL_UNITS)
                async for frame in session:
                    if frame.token_ids and number not in begun:
                        begun.add(number)
                        if len(begun) == batch:
                            state["from"], made = _spent(process), 0
                    elif len(begun) == batch and not state["to"]:
                        made += len(frame.token_ids)
                    if frame.finished and not state["to"]:
                        state["to"] = _spent(process)

        for number in range(batch):
            nursery.start_soon(one, number)
    return made / (state["to"] - state["from"])


async def _prefill(engine: Any, process: psutil.Process) -> float:
    request = GenerateRequest(prompt="alpha " * PROMPT_TOKENS, max_tokens=1)
    began = _spent(process)
    async with engine.open_session(msgspec.msgpack.encode(request)) as session:
        session.allow(ALL_UNITS)
        async for _ in session:
            pass
    return PROMPT_TOKENS / (_spent(process) - began)


# --------------------------------------------------------------------------- all together

ARMS: dict[str, Callable[[int], Figures]] = {
    "openvino": functools.partial(worker, "openvino"),
    "openvino_bare": openvino_bare,
    "openvino_32": in_process_32,
    "torch": functools.partial(worker, "torch"),
    "genai_bare": genai_bare,
}


def arm(name: str, rounds: int) -> Figures:
    """Runs one arm in a process of its own."""
    command = [sys.executable, __file__, "--arm", name, "--rounds", str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Figures)


def present() -> list[str]:
    """The arms whose libraries are here."""
    names = list(engine_choice.installed())
    names += ["openvino_bare", "openvino_32"] if "openvino" in names else []
    return names + (["genai_bare"] if importlib.util.find_spec("openvino_genai") else [])


def measure(claims: Claims, args: argparse.Namespace) -> None:
    again = [name for name in present() if not args.quick or name in ("openvino", "openvino_bare")]
    found = {name: arm(name, 1 if args.quick else 2) for name in again}
    for name, figures in found.items():
        for key, value in figures.items():
            label = "openvino" if name == "openvino_32" else name
            claims.add(f"{label}_{key}", value)
    if args.quick:
        stamped(claims)
    if "openvino" in found:
        ours, bare = found["openvino"], found["openvino_bare"]
        for key, least in (("b1", B1_LEAST), ("b8", B8_LEAST)):
            claims.add(f"worker_over_bare_{key}", ours[key] / bare[key], at_least=least)
    claims.note("default", engine_choice.installed()[0])


def stamped(claims: Claims) -> None:
    """What a quick run does not measure again, from the kept results of today's script."""
    kept = json.loads((ROOT / "benchmarks" / "results" / "engines.json").read_text())
    claims.note("stamped", value=True)
    claims.note("stamped_ok", kept.get("script_sha256") == script_sha256())
    for key, value in kept.items():
        is_figure = key.startswith(("torch_", "genai_", "openvino_b32"))
        if is_figure and key not in claims.found:
            claims.note(key, value)


if __name__ == "__main__":
    if "--arm" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--arm", choices=ARMS)
        parser.add_argument("--rounds", type=int)
        one = parser.parse_args()
        print(json.dumps(ARMS[one.arm](one.rounds)))
    else:
        sys.exit(main(measure, __doc__.splitlines()[0]))
