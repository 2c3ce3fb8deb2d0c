"""What embedding through the mesh costs beside the bare library, and how well its vectors find.

    AIVILLAGE_TEST_DATA=FOLDER python benchmarks/embedding.py [--quick] [--json]

Two real nodes, a buyer and a seller with one worker. Abstracts of SciFact are embedded in jobs of
32: `mesh_texts_per_cpu_s` counts the processor time of both daemons and all of their workers,
ledger and checks included. The bare library is transformers' BertModel in a child of this process,
with the same weights, one thread, in padded batches of 32 sorted by length, before and after, as
sentence-transformers does it. `ndcg10`: of the mesh's vectors, cosine, binary gains, the first
judged claims among the documents that they need and others; `ndcg10_reference` of the bare
library's on the very same. In full, `hotpotqa_ndcg10` on all of that sample (by the engine itself:
the same bits), beside a figure measured before with other code. `worst_distance_e6`: between the
two's vectors of one text, in millionths. Without the data, it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from claims import Claims, main
from yard import books_exact, known

from aivillage.models.inference import vectors
from aivillage.protocols.messages import Answer
from tests.integration.daemons import Daemon, Yard

MEASURED_NDCG10 = 0.7841
"""Of the same model in 8 bits (ONNX), title and text, 256 tokens, on the same HotpotQA sample."""
BATCH = 32
JOBS_QUICK, JOBS = 2, 8
FLAGS = ("--set", "heartbeat_seconds=0.5", "--set", "module_workers=1")
BUYS = (*FLAGS, "--set", "serve=false", "--set", "ceiling_micro_credits=10000000")


def measure(claims: Claims, args: argparse.Namespace) -> None:
    folder = Path(os.environ.get("AIVILLAGE_TEST_DATA", "")) / "retrieval" / "scifact"
    if not (folder / "corpus.jsonl").exists():
        claims.note("skipped", "AIVILLAGE_TEST_DATA has no retrieval/scifact")
        return
    count = BATCH * (JOBS_QUICK if args.quick else JOBS)
    documents, queries, judged = collection(folder, count)
    names, texts = list(documents), list(documents.values())
    with tempfile.TemporaryDirectory() as place, Yard(Path(place)) as yard:
        seller = yard.daemon("seller").start(*FLAGS)
        buyer = yard.daemon("buyer").start("--join", seller.ask("invite")["token"], *BUYS)
        known(buyer, [seller], "inference.embed")
        embedded(buyer, texts[:1], [buyer, seller])  # warm
        sides = [bare(texts, list(queries.values()))]
        ours, cpu_seconds = embedded(buyer, texts, [buyer, seller])
        sides += [] if args.quick else [bare(texts)]
        asked, _ = embedded(buyer, list(queries.values()), [buyer, seller])
        claims.add("books_exact", books_exact([buyer, seller]), at_least=1)
    bare_seconds = sum(side["seconds"] for side in sides) / len(sides)
    mesh, library = count / cpu_seconds, count / bare_seconds
    claims.add("mesh_texts_per_cpu_s", mesh)
    claims.add("bare_texts_per_cpu_s", library)
    claims.add("mesh_over_bare", mesh / library, at_least=0.85)
    theirs, theirs_asked = sides[0]["vectors"][:count], sides[0]["vectors"][count:]
    claims.add("worst_distance_e6", 1e6 * max(map(math.dist, ours, theirs)), at_most=10)
    score = ndcg10(names, ours, dict(zip(queries, asked, strict=True)), judged)
    same = ndcg10(names, theirs, dict(zip(queries, theirs_asked, strict=True)), judged)
    claims.note("documents", count)
    claims.note("queries", len(queries))
    claims.add("ndcg10", score)
    claims.add("ndcg10_reference", same)
    claims.add("ndcg10_over_reference", score / same, at_least=0.995)
    if not args.quick:
        whole(claims, folder.parent / "hotpotqa")


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


def embedded(
    buyer: Daemon, texts: list[str], nodes: list[Daemon]
) -> tuple[list[list[float]], float]:
    """Vectors, and the processor time of everything that the nodes are."""
    began, found = cpu(nodes), []
    for first in range(0, len(texts), BATCH):
        batch = texts[first : first + BATCH]
        *_, last = buyer.follow("inference.embed", text=batch)  # asking again and again would cost
        if not isinstance(last, Answer):
            raise SystemExit(f"not done: {last}")
        found += [list(vectors.numbers(v)) for v in last.value["result"]["vectors"]]
    return found, cpu(nodes) - began


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
(texts, more), found = json.load(sys.stdin), {}
def run(places):
    given = tokenizer([texts[n] for n in places], padding=True, truncation=True, max_length=256,
                      return_tensors="pt")
    with torch.inference_mode():
        states, mask = model(**given).last_hidden_state, given["attention_mask"].unsqueeze(-1)
        pooled = (states * mask).sum(1) / mask.sum(1)
        rows = torch.nn.functional.normalize(pooled, dim=1).tolist()
    found.update(zip(places, rows))
run([0])
began = time.process_time()
order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
for first in range(0, len(texts), 32):
    run(order[first : first + 32])
seconds = time.process_time() - began
texts += more
for n in range(len(texts) - len(more), len(texts)):
    run([n])
print(json.dumps({"seconds": seconds, "vectors": [found[n] for n in range(len(texts))]}))
"""


def bare(texts: list[str], more: list[str] | None = None) -> dict[str, Any]:
    """Vectors of both; the processor time is of `texts` alone."""
    done = subprocess.run(
        [sys.executable, "-c", _BARE], input=json.dumps([texts, more or []]),
        capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"the bare library failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


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
