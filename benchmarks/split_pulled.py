"""A pulled model that no lender holds whole, split over two daemons, beside one peer that holds it.

    python benchmarks/split_pulled.py [--quick] [--json] [--save]

What a split adds to a token is a few milliseconds of ways and wakings, whatever the model; what
share that is depends on how long the model works. `benchmarks/split.py` has the packaged model of
135 million weights, which nobody needs to split. Here it is one of the size at which a small
machine's worker ends: the width of SmolLM2-1.7B and 8 of its 24 layers, 640 million weights, with
SmolLM2's tokenizer. No model of that size comes with a package, so the weights are random, and the
tokens are drawn at temperature 1: text without sense, at the cost of any other.

All as in split.py: real daemons on loopback, credits on, an answer of the one kind after one of the
other. `split2_over_local`: rounds a second over tokens a second, the median of the pairs;
`split2_cpu_over_local` the same of processor seconds. `--quick` has two layers of that model
and tells no ratio but that of the processor: its worth is that the answers and books are the same.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from claims import Claims, main
from split import ALIKE, Heard, Pair, both, resting
from yard import books_exact, known

from aivillage.models.inference import catalogue
from aivillage.models.inference.gguf_file import GgufFile
from aivillage.models.inference.stages import OPERATION, memory_bytes
from aivillage.models.library import manifest
from tests.integration.daemons import Daemon, DaemonError, Yard

NAME = "random"
WIDTH, INNER, HEADS, CONTEXT = 2048, 8192, 32, 2048
LAYERS, LAYERS_QUICK = 8, 2
PAIRS, PAIRS_QUICK = 8, 2
SPLIT_BAR = 0.9
ASKED: dict[str, Any] = {
    "model": NAME, "temperature": 1.0, "seed": 1, "max_tokens": 24,
}  # fmt: skip


def measure(claims: Claims, args: argparse.Namespace) -> None:
    layers = LAYERS_QUICK if args.quick else LAYERS
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        source = write_model(folder / "random.gguf", layers)
        (folder / "yard").mkdir()
        with Yard(folder / "yard") as yard:
            nodes = village(yard, source)
            claims.note("pulled_weights", weights_of(layers))
            over_daemons(claims, nodes, quick=args.quick)


def weights_of(layers: int) -> int:
    """That one token multiplies."""
    return sum(int(np.prod(shape)) for name, shape in shapes(layers) if len(shape) == 2)


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "token_embd.weight", (49_152, WIDTH)
    yield "output_norm.weight", (WIDTH,)
    for layer in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield f"blk.{layer}.{name}.weight", (WIDTH, WIDTH)
        for name in ("ffn_gate", "ffn_up"):
            yield f"blk.{layer}.{name}.weight", (INNER, WIDTH)
        yield f"blk.{layer}.ffn_down.weight", (WIDTH, INNER)
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}.weight", (WIDTH,)


def write_model(path: Path, layers: int) -> Path:
    """Half floats out of one random block, begun elsewhere in each tensor."""
    packaged = GgufFile(catalogue.weights_path(catalogue.known(catalogue.DEFAULT))).metadata
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "block_count": layers,
        "embedding_length": WIDTH,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS,
        "context_length": CONTEXT,
    }.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.rope.freq_base", 130_000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key in ("ggml.model", "ggml.pre"):
        writer.add_string(f"tokenizer.{key}", packaged[f"tokenizer.{key}"])
    for key in ("tokens", "token_type", "merges"):
        writer.add_array(f"tokenizer.ggml.{key}", packaged[f"tokenizer.ggml.{key}"])
    writer.add_uint32("tokenizer.ggml.eos_token_id", packaged["tokenizer.ggml.eos_token_id"])
    writer.add_string("tokenizer.chat_template", packaged["tokenizer.chat_template"])
    draw = np.random.default_rng(1)
    block = (draw.standard_normal(1 << 22) * 0.02).astype(np.float16)
    for at, (name, shape) in enumerate(shapes(layers)):
        value = np.resize(np.roll(block, 7 * at), shape)
        writer.add_tensor(name, value if len(shape) == 2 else np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def village(yard: Yard, source: Path) -> list[Daemon]:
    """The buyer, the peer that has the model whole, and two that have room for just a half."""
    nodes = [yard.daemon(name) for name in ("buyer", "whole", "one", "two")]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda node: pulled(node, source), nodes))
    buyer, whole, *lenders = nodes
    folder = buyer.data_dir / "models" / NAME
    model = catalogue.pulled(manifest.read(folder), folder)
    lender_mb = -(-memory_bytes(model, 0, model.layers // 2) >> 20) + 1
    buyer.start(*ALIKE, "--set", "serve=false", "--set", "ceiling_micro_credits=10000000")
    join = ("--join", buyer.ask("invite", uses=4)["token"], *ALIKE)
    lend = ("--set", "village_exposure_micro_credits=1000000")
    whole.start(*join, *lend, "--set", "engine=torch", "--set", "worker_memory_mb=8192")
    for lender in lenders:
        lender.start(
            *join, *lend, "--enable", OPERATION, "--set", f"worker_memory_mb={lender_mb}",
            "--set", "stage_stand_by=false",
        )  # fmt: skip
    known(buyer, [whole], "inference.generate")
    known(buyer, lenders, OPERATION)
    return nodes


def pulled(node: Daemon, source: Path) -> None:
    for words in (("init",), ("models", "pull", f"file:{source}", "--name", NAME)):
        done = node.run(*words, seconds=300)
        if done.code:
            raise DaemonError(f"{words}: {done}")


def over_daemons(claims: Claims, nodes: list[Daemon], *, quick: bool) -> None:
    buyer, whole, *_ = nodes
    sellers = nodes[1:]
    first = both(buyer, whole, sellers, **ASKED)
    rest = resting(*nodes)
    pairs = []
    for _ in range(PAIRS_QUICK if quick else PAIRS):
        local, split = both(buyer, whole, sellers, **ASKED)
        pairs.append(Pair(local, split, local.steps, rest))
    tell(claims, first, pairs, quick=quick)
    claims.add("pulled_books_exact", books_exact(nodes), at_least=1)


def tell(claims: Claims, first: tuple[Heard, Heard], pairs: list[Pair], *, quick: bool) -> None:
    wanted, middle = first[0].token_ids, statistics.median
    heard = [*first, *(one for pair in pairs for one in (pair.local, pair.split))]
    same = [one.token_ids == wanted for one in heard]
    claims.add("pulled_identical_fraction", statistics.mean(same), at_least=1.0)
    claims.note("pulled_pairs", len(pairs))
    ways = [pair.cpu_ms() for pair in pairs]
    claims.add("pulled_local_cpu_ms_per_token", middle(local for local, _ in ways))
    claims.add("split2_cpu_ms_per_round", middle(split for _, split in ways))
    cpu_over = middle(local / split for local, split in ways)
    if quick:
        claims.add("pulled_quick_cpu_over_local", cpu_over)
        return
    seconds = [(pair.local.seconds, pair.split.seconds) for pair in pairs]
    steps = pairs[0].local.steps
    claims.add("pulled_local_ms_per_token", middle(1000 * one / steps for one, _ in seconds))
    claims.add("split2_ms_per_round", middle(1000 * two / steps for _, two in seconds))
    claims.add("split2_over_local", middle(p.speed() for p in pairs), at_least=SPLIT_BAR)
    claims.add("split2_cpu_over_local", cpu_over, at_least=SPLIT_BAR)


if __name__ == "__main__":
    sys.exit(main(measure, __doc__ or ""))
