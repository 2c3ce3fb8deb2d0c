"""A small model of the buyer's guesses for one that is split: what does it gain, and where?

    python benchmarks/draft.py [--quick] [--json] [--save]

Real daemons, credits on. The packaged model is split over two lenders whose every way takes 50 ms
(tests/integration/far_node.py: an input is read, and answered, 100 ms late), then over two on this
machine, near. Prompts ask for new text, so that prompt lookup, which goes first, guesses little.

Two models guess: the split one itself, whose guesses are all right, which is the most that can be
gained; and `thin`, the same without some of its layers, which is often wrong. A real pair, such as
this one for SmolLM2-1.7B, could not be had here, and lies somewhere between them.

`draft_gain`, `thin_gain`: tokens a second with guesses over those of the same answer without, far
away, from first text to last; the median of prompts. `thin_right`: of its guesses. `near_ratio`:
the same of the split model's own guesses where stages are near and no guess pays; `near_guesses`:
how many it made all the same. `thin_cost`: what an answer costs, over one without its guesses.

`--quick`: one prompt and fewer tokens, without `thin`; its gain is told without a bar.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
from claims import Claims, main
from split import ALIKE, COLD, Heard, heard
from yard import books_exact, known

from aivillage.models.inference import catalogue
from aivillage.models.inference.stages import OPERATION
from tests.integration.daemons import Daemon, DaemonError, Yard

TOKENS, TOKENS_QUICK = 64, 24
LEFT_OUT = (12, 17)
"""Layers that `thin` does not have."""
GAIN_BAR = 1.5
THIN = "thin"
PROMPTS = (
    "Explain in a few sentences why the sky is blue, and why the evening sky is red.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "How does a bicycle stay upright? Answer for a child of ten.",
    "What should one look for when buying an old house?",
)


class Asked(NamedTuple):
    """One answer: how fast, for how much, and how many guesses of a model were right and made."""

    heard: Heard
    credits: int
    right: int
    made: int

    @property
    def speed(self) -> float:
        return self.heard.steps / self.heard.seconds


def measure(claims: Claims, args: argparse.Namespace) -> None:
    prompts = PROMPTS[:1] if args.quick else PROMPTS
    tokens = TOKENS_QUICK if args.quick else TOKENS
    with tempfile.TemporaryDirectory() as name, Yard(Path(name)) as yard:
        buyer = yard.daemon("buyer")
        drafts = [catalogue.DEFAULT] if args.quick else [catalogue.DEFAULT, thin(buyer, Path(name))]
        buyer.start(*ALIKE, "--set", "serve=false", "--set", "engine=torch")
        token = buyer.ask("invite", uses=4)["token"]
        far = lenders(yard, buyer, token, "far")
        compare(claims, buyer, "draft", drafts, prompts, tokens)
        for lender in far:
            lender.stop()
        near = lenders(yard, buyer, token, "near")
        compare(claims, buyer, "near", drafts[:1], prompts, tokens)
        for lender in far:
            lender.restart()
        claims.add("draft_books_exact", books_exact([buyer, *far, *near]), at_least=1)


def lenders(yard: Yard, buyer: Daemon, token: str, where: str) -> list[Daemon]:
    """Two that have room for a half each."""
    found = [yard.daemon(f"{where}{n}") for n in (1, 2)]
    for lender in found:
        lender.module = "tests.integration.far_node" if where == "far" else "aivillage"
        lender.start("--join", token, *COLD)
    known(buyer, found, OPERATION)
    return found


def thin(buyer: Daemon, folder: Path) -> str:
    """Pulls the packaged model without some of its layers."""
    read = gguf.GGUFReader(catalogue.weights_path(catalogue.known(catalogue.DEFAULT)))
    path = folder / "thin.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    kept = [n for n in range(catalogue.known(catalogue.DEFAULT).layers) if n not in LEFT_OUT]
    for field in read.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = len(kept) if field.name == "llama.block_count" else field.contents()
        sub_type = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, value, field.types[0], sub_type)
    for tensor in read.tensors:
        head, _, rest = tensor.name.removeprefix("blk.").partition(".")
        name = tensor.name
        if name.startswith("blk."):
            if int(head) not in kept:
                continue
            name = f"blk.{kept.index(int(head))}.{rest}"
        writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for words in (("init",), ("models", "pull", f"file:{path}", "--name", THIN)):
        done = buyer.run(*words, seconds=300)
        if done.code:
            raise DaemonError(f"{words}: {done}")
    return THIN


def compare(
    claims: Claims,
    buyer: Daemon,
    where: str,
    drafts: Sequence[str],
    prompts: Sequence[str],
    tokens: int,
) -> None:
    """Every prompt without guesses of a model and with those of each."""
    names = {catalogue.DEFAULT: where, THIN: THIN}
    got: dict[str, list[Asked]] = {name: [] for name in ("none", *drafts)}
    for draft in got:  # layers and models are loaded
        asked(buyer, draft, PROMPTS[0], 2)
    for prompt in prompts:
        for draft, found in got.items():
            found.append(asked(buyer, draft, prompt, tokens))
    plain = got.pop("none")
    claims.add(f"{where}_plain_tokens_per_second", statistics.median(one.speed for one in plain))
    same: list[bool] = []
    for draft, found in got.items():
        pairs = list(zip(found, plain, strict=True))
        same += [a.heard.token_ids == b.heard.token_ids for a, b in pairs]
        gains = [a.speed / b.speed for a, b in pairs]
        tell(claims, names[draft], gains, found)
        costs = statistics.median(a.credits / b.credits for a, b in pairs)
        claims.add(f"{names[draft]}_cost", costs)
    claims.add(f"{where}_identical_fraction", statistics.mean(same), at_least=1.0)


def tell(claims: Claims, name: str, gains: list[float], found: list[Asked]) -> None:
    gain, made = statistics.median(gains), sum(one.made for one in found)
    if name == "near":
        claims.add("near_ratio", gain)
    else:
        is_whole = name == "draft" and len(found) == len(PROMPTS)
        claims.add(f"{name}_gain", gain, at_least=GAIN_BAR if is_whole else None)
    claims.note(f"{name}_gains", [round(one, 2) for one in gains])
    claims.add(f"{name}_guesses", made, at_most=0 if name == "near" else None)
    claims.add(f"{name}_right", sum(one.right for one in found) / max(1, made))


def asked(buyer: Daemon, draft: str, prompt: str, tokens: int) -> Asked:
    request: dict[str, Any] = {"prompt": prompt, "max_tokens": tokens}
    got = heard(buyer, [], draft=draft, mesh=True, **request)
    receipt = buyer.ask("jobs", limit=1)[0]["receipt"]
    said = receipt["why"].rpartition("; ")[2].split()
    right, made = (int(said[0]), int(said[2])) if "guesses of" in receipt["why"] else (0, 0)
    return Asked(got, receipt["price_micro_credits"], right, made)


if __name__ == "__main__":
    sys.exit(main(measure, __doc__ or ""))
