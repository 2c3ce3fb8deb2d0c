"""What embedding through the mesh costs beside the bare library, and how well its vectors find.

    AIVILLAGE_TEST_DATA=FOLDER python benchmarks/embedding.py [--quick] [--json]

Two real nodes, a buyer and a seller with one worker. Abstracts of SciFact, sorted by length as
sentence-transformers does it, are embedded in jobs of 32: `mesh_texts_per_cpu_s` counts the
processor time of both daemons and all of their workers, ledger and checks included, less what they
use at rest. The bare library is transformers' BertModel in a child of this process, with the same
weights, one thread, in padded batches of the same 32. Mesh and library take turns, and the median
of these pairs is `mesh_over_bare`: a busy machine's minutes differ in processor time too. With
`--quick` it is one batch, again and again as far as the time goes.

`ndcg10`: of the mesh's vectors, cosine, binary gains, the first judged claims among the documents
that they need and others; `ndcg10_reference` of the bare library's on the very same. In full,
`hotpotqa_ndcg10` on all of that sample (by the engine itself: the same bits), beside a figure
measured before with other code. `worst_distance_e6`: between the two's vectors of one text, in
millionths. Without the data, it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from claims import Claims, main
from yard import books_exact, known

from aivillage.models.inference import vectors
from aivillage.protocols.messages import Answer
from tests.integration.daemons import Daemon, Yard

MEASURED_NDCG10 = 0.7841
"""Of the same model in 8 bits (ONNX), title and text, 256 tokens, on the same HotpotQA sample."""
BATCH = 32
JOBS_QUICK, JOBS = 1, 8
PAIRS_QUICK_MAX = 3
QUICK_SECONDS = 25.0
"""With `--quick`: then no further pair begins, but for the first."""
REST_SECONDS = 3.0
FLAGS = ("--set", "heartbeat_seconds=0.5", "--set", "module_workers=1")
SELLS = (*FLAGS, "--set", "village_exposure_micro_credits=100000")
"""32 long abstracts are 23,000: more than a seller delivers ahead of its pay by default."""
BUYS = (*FLAGS, "--set", "serve=false", "--set", "ceiling_micro_credits=10000000")


def measure(claims: Claims, args: argparse.Namespace) -> None:
    folder = Path(os.environ.get("AIVILLAGE_TEST_DATA", "")) / "retrieval" / "scifact"
    if not (folder / "corpus.jsonl").exists():
        claims.note("skipped", "AIVILLAGE_TEST_DATA has no retrieval/scifact")
        return
    count = BATCH * (JOBS_QUICK if args.quick else JOBS)
    documents, queries, judged = collection(folder, count)
    order = sorted(documents, key=lambda name: len(documents[name]))
    texts, asked = [documents[name] for name in order], list(queries.values())
    ends = time.monotonic() + QUICK_SECONDS
    with tempfile.TemporaryDirectory() as place, Yard(Path(place)) as yard, Bare() as bare:
        seller = yard.daemon("seller").start(*SELLS)
        buyer = yard.daemon("buyer").start("--join", seller.ask("invite")["token"], *BUYS)
        known(buyer, [seller], "inference.embed")
        mesh = Mesh([buyer, seller])
        pairs = [in_turn(mesh, bare, texts[at : at + BATCH]) for at in range(0, count, BATCH)]
        while args.quick and len(pairs) < PAIRS_QUICK_MAX and time.monotonic() < ends:
            pairs.append(in_turn(mesh, bare, texts))
        ours_asked, theirs_asked = mesh.embedded(asked).vectors, bare.embedded(asked, 1).vectors
        claims.add("books_exact", books_exact([buyer, seller]), at_least=1)
    tell_speed(claims, pairs)
    ours, theirs = ([v for pair in pairs for v in pair[n].vectors][:count] for n in (0, 1))
    claims.add("worst_distance_e6", 1e6 * max(map(math.dist, ours, theirs)), at_most=10)
    score = ndcg10(order, ours, dict(zip(queries, ours_asked, strict=True)), judged)
    same = ndcg10(order, theirs, dict(zip(queries, theirs_asked, strict=True)), judged)
    claims.note("documents", count)
    claims.note("queries", len(queries))
    claims.add("ndcg10", score)
    claims.add("ndcg10_reference", same)
    claims.add("ndcg10_over_reference", score / same, at_least=0.995)
    if not args.quick:
        whole(claims, folder.parent / "hotpotqa")


class Done(NamedTuple):
    vectors: list[list[float]]
    cpu_seconds: float


def in_turn(mesh: Mesh, bare: Bare, texts: list[str]) -> tuple[Done, Done]:
    return mesh.embedded(texts), bare.embedded(texts, BATCH)


def tell_speed(claims: Claims, pairs: list[tuple[Done, Done]]) -> None:
    for name, sides in zip(("mesh", "bare"), zip(*pairs, strict=True), strict=True):
        texts = sum(len(done.vectors) for done in sides)
        claims.add(f"{name}_texts_per_cpu_s", texts / sum(done.cpu_seconds for done in sides))
    claims.note("pairs", len(pairs))
    ratios = [bare.cpu_seconds / mesh.cpu_seconds for mesh, bare in pairs]
    claims.add("mesh_over_bare", statistics.median(ratios), at_least=0.85)


# ------------------------------------------------------------------ the data


def collection(
    folder: Path, count: int
) -> tuple[dict[str, str], dict[str, str], dict[str, set[str]]]:
    """So many documents, the first claims whose documents take a third of them, and by which."""
    judged: dict[str, set[str]] = {}
    for line in (folder / "qrels.tsv").read_text().splitlines()[1:]:
        query, document, gain = line.split("\t")
        if int(gain) > 0:
            judged.setdefault(query, set()).add(document)
    rows = list(map(json.loads, (folder / "corpus.jsonl").read_text().splitlines()))
    texts = {row["_id"]: f"{row['title']} {row['text']}" for row in rows}
    chosen: dict[str, set[str]] = {}
    wanted: set[str] = set()
    for query, found in judged.items():
        if 3 * len(wanted | found) > count and count < len(texts):
            break
        chosen[query] = found
        wanted |= found
    names = [*sorted(wanted), *(name for name in texts if name not in wanted)][:count]
    said = map(json.loads, (folder / "queries.jsonl").read_text().splitlines())
    queries = {row["_id"]: row["text"] for row in said if row["_id"] in chosen}
    return {name: texts[name] for name in names}, queries, chosen


def ndcg10(
    names: list[str], found: list[Any], asked: dict[str, Any], judged: dict[str, set[str]]
) -> float:
    """The mean over all queries."""
    import numpy as np

    matrix = np.array(found)
    total = 0.0
    for query, vector in asked.items():
        best = np.argsort(-(matrix @ np.array(vector)), kind="stable")[:10]
        gains = [names[n] in judged[query] for n in best]
        ideal = sum(1 / math.log2(n + 2) for n in range(min(10, len(judged[query]))))
        total += sum(1 / math.log2(n + 2) for n, gain in enumerate(gains) if gain) / ideal
    return total / len(asked)


# ------------------------------------------------------------------ the mesh


class Mesh:
    """The first node asks, and they are warm."""

    def __init__(self, nodes: list[Daemon]) -> None:
        self._nodes, self._rest = nodes, 0.0
        self.embedded(["warm"])
        before = cpu(nodes)
        time.sleep(REST_SECONDS)
        self._rest = (cpu(nodes) - before) / REST_SECONDS

    def embedded(self, texts: list[str]) -> Done:
        """With the processor time of everything that the nodes are, less that at rest."""
        began, cpu_before, found = time.monotonic(), cpu(self._nodes), []
        for first in range(0, len(texts), BATCH):
            batch = texts[first : first + BATCH]  # to ask for the end again and again would cost
            *_, last = self._nodes[0].follow("inference.embed", text=batch)
            if not isinstance(last, Answer):
                raise SystemExit(f"not done: {last}")
            found += [list(vectors.numbers(v)) for v in last.value["result"]["vectors"]]
        rest = self._rest * (time.monotonic() - began)
        return Done(found, cpu(self._nodes) - cpu_before - rest)


def cpu(nodes: list[Daemon]) -> float:
    total = 0.0
    for node in nodes:
        process = psutil.Process(node.pid)
        for each in (process, *process.children(recursive=True)):
            times = each.cpu_times()
            total += times.user + times.system
    return total


# ------------------------------------------------------------------ beside it

_BARE = """
import json, sys, time, torch, transformers
from aivillage.models.inference import catalogue
torch.set_num_threads(1)
folder = catalogue.weights_path(catalogue.MODELS[catalogue.EMBEDDER])
model = transformers.BertModel.from_pretrained(folder).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
def run(texts):
    given = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.inference_mode():
        states, mask = model(**given).last_hidden_state, given["attention_mask"].unsqueeze(-1)
        pooled = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(pooled, dim=1).tolist()
run(["warm"])
print(flush=True)
for line in sys.stdin:
    texts, size = json.loads(line)
    began, found = time.process_time(), []
    for first in range(0, len(texts), size):
        found += run(texts[first : first + size])
    print(json.dumps([found, time.process_time() - began]), flush=True)
"""


class Bare:
    """The library, loaded in a child."""

    def __enter__(self) -> Bare:
        """It loads meanwhile."""
        self._child = subprocess.Popen(
            [sys.executable, "-c", _BARE], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._is_loaded = False
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()

    def embedded(self, texts: list[str], batch: int) -> Done:
        assert self._child.stdin is not None
        self._is_loaded = self._is_loaded or bool(self._line())
        print(json.dumps([texts, batch]), file=self._child.stdin, flush=True)
        return Done(*json.loads(self._line()))

    def _line(self) -> str:
        assert self._child.stdout is not None
        if line := self._child.stdout.readline():
            return line
        raise SystemExit("the bare library failed; its own words are above")


def whole(claims: Claims, folder: Path) -> None:
    """All of a collection, by the engine."""
    from aivillage.models.inference.encoder import encoder_of

    encoder = encoder_of("all-MiniLM-L6-v2")
    documents, queries, judged = collection(folder, 1_000_000)
    began = time.process_time()
    found = [vectors.numbers(encoder.vector(text).value) for text in documents.values()]
    claims.add("engine_texts_per_cpu_s", len(found) / (time.process_time() - began))
    asked = {name: vectors.numbers(encoder.vector(text).value) for name, text in queries.items()}
    score = ndcg10(list(documents), found, asked, judged)
    claims.note("hotpotqa_documents", len(found))
    claims.note("hotpotqa_queries", len(queries))
    claims.note("hotpotqa_ndcg10_before", MEASURED_NDCG10)
    claims.add("hotpotqa_ndcg10", score, at_least=MEASURED_NDCG10 - 0.005)


if __name__ == "__main__":
    sys.exit(main(measure, __doc__ or ""))
