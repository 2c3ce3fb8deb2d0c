"""Does the fast engine answer as the reference does? Perplexity, agreement, answers, fingerprints.

    python benchmarks/engine_quality.py [--quick] [--json]

Both engines read the same text, WikiText-2's validation split (`AIVILLAGE_TEST_DATA`), in windows
of 1,024 tokens, as a prompt is read. `agreement` is the share of tokens after which both hold the
same one for the likeliest, `kl_micronats` how far the distributions are from each other, a token.
`answers_alike` is the share of short questions that get the same greedy answer from both, token by
token, drawn one by one. `deviation` is the most that a fingerprint of one was off when the other
read its answer again, relative to the states; from `DEVIATION_MAX` on it is held against its maker.

`--quick` reads 512 tokens and asks three questions.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from claims import ROOT, Claims, main

from aivillage.models.inference import catalogue, engine_choice
from aivillage.models.inference.fingerprint import DEVIATION_MAX
from aivillage.models.inference.generate import GenerateRequest
from aivillage.models.inference.llama import Span
from aivillage.protocols.rechecking import Claim

DATA = Path(os.environ.get("AIVILLAGE_TEST_DATA", ROOT.parent / "shared" / "data"))
TEXT = DATA / "wikitext-2" / "valid.txt"
WINDOW, SLICE = 1_024, 32
TOKENS, TOKENS_QUICK = 20 * WINDOW, 512
ANSWER_TOKENS, ALL_UNITS = 20, 10**6
QUESTIONS = (
    "What is the capital of France?", "What is 7 times 8?", "Who wrote Hamlet?",
    "How many legs has a spider?", "What colour is the sky?", "Name three fruits.",
    "What is water made of?", "Translate 'good morning' into French.",
    "Who was the first man on the moon?", "What is the largest planet?", "Why is grass green?",
    "How do birds fly?", "Write a haiku about rain.", "What is a prime number?",
    "What is the opposite of hot?", "When did the Second World War end?",
    "Spell the word 'village'.", "What is the speed of light?", "Explain gravity in one sentence.",
    "What do bees make?", "Give me a recipe for pancakes.", "What is Python used for?",
    "Who painted the Mona Lisa?", "How far is the moon?", "What is the boiling point of water?",
    "List the days of the week.", "What is an atom?", "Is the earth flat?",
    "Say hello in Spanish.", "What comes after Monday?",
)  # fmt: skip
AGREEMENT_LEAST, KL_MOST, PERPLEXITY_MOST, ALIKE_LEAST = 0.995, 1e-6, 1.0005, 0.9


def read(engine: Any, at: int, ids: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities after each of `ids`: (tokens, vocabulary)."""
    states = engine._model.forward([Span(0, at, ids)])[: len(ids)]
    return torch.log_softmax(engine._model.logits(states), dim=-1)


def text_read(engines: dict[str, Any], count: int) -> dict[str, float]:
    text = TEXT.read_text(encoding="utf-8")[: count * 8]
    ids = tuple(engines["torch"].tokenizer.encode(text))[: count + 1]
    losses, kl, agreed = dict.fromkeys(engines, 0.0), 0.0, 0
    for start in range(0, count, SLICE):
        part, after = ids[start : start + SLICE], torch.tensor(ids[start + 1 : start + SLICE + 1])
        found = {name: read(engine, start % WINDOW, part) for name, engine in engines.items()}
        for name, lines in found.items():
            losses[name] -= float(lines.gather(1, after[:, None]).double().sum())
        theirs, ours = found["torch"], found["openvino"]
        kl += float((theirs.exp() * (theirs - ours)).double().sum())
        agreed += int((theirs.argmax(dim=1) == ours.argmax(dim=1)).sum())
    perplexity = {f"{name}_perplexity": math.exp(loss / count) for name, loss in losses.items()}
    return perplexity | {"agreement": agreed / count, "kl_nats": abs(kl) / count}


def answer(engine: Any, request: GenerateRequest) -> Claim:
    engine.add(0, request, ())
    engine.allow(0, ALL_UNITS)
    ids: list[int] = []
    marks: list[bytes] = []
    while frames := engine.step():
        ids += frames[0].token_ids
        marks += [frames[0].fingerprint] if frames[0].fingerprint else []
    return Claim(token_ids=tuple(ids), fingerprints=tuple(marks))


def deviation(engine: Any, request: GenerateRequest, claim: Claim) -> float:
    engine.recheck(0, request, claim)
    while True:
        for frame in engine.step():
            if frame.finding is not None:
                return max(float(span.relative) for span in frame.finding.spans)


def questions_asked(engines: dict[str, Any], count: int) -> dict[str, float]:
    alike, worst = 0, 0.0
    for question in QUESTIONS[:count]:
        request = GenerateRequest(prompt=question, max_tokens=ANSWER_TOKENS)
        claims = {name: answer(engine, request) for name, engine in engines.items()}
        alike += claims["torch"].token_ids == claims["openvino"].token_ids
        for maker, reader in (("torch", "openvino"), ("openvino", "torch")):
            worst = max(worst, deviation(engines[reader], request, claims[maker]))
    return {"answers_alike": alike / count, "deviation": worst}


def measure(claims: Claims, args: argparse.Namespace) -> None:
    model = catalogue.known(catalogue.DEFAULT)
    engines = {
        name: engine_choice.engine_of(model, slots=1, engine=name) for name in ("torch", "openvino")
    }
    tokens = TOKENS_QUICK if args.quick else TOKENS
    found = text_read(engines, tokens)
    found |= questions_asked(engines, 3 if args.quick else len(QUESTIONS))
    claims.note("tokens", tokens)
    for name in ("torch_perplexity", "openvino_perplexity"):
        claims.add(name, found[name])
    ratio = found["openvino_perplexity"] / found["torch_perplexity"]
    claims.add("perplexity_ratio", ratio, at_most=PERPLEXITY_MOST)
    claims.add("agreement", found["agreement"], at_least=AGREEMENT_LEAST)
    claims.add("kl_micronats", 1e6 * found["kl_nats"], at_most=1e6 * KL_MOST)
    claims.add("answers_alike", found["answers_alike"], at_least=ALIKE_LEAST)
    claims.add("deviation_of_most", found["deviation"] / DEVIATION_MAX, at_most=1 / 3)


if __name__ == "__main__":
    sys.exit(main(measure, __doc__.splitlines()[0]))
