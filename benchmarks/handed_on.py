"""Stages that hand their states to each other, beside a buyer that carries them: what does it gain?

    python benchmarks/handed_on.py [--quick] [--json] [--save]

Real daemons, credits on, the packaged model over two lenders. One buyer lets stages hand on, the
other one (`stage_pass_on=false`) deals with each alone; an answer of the one follows one of the
other, and the median of these pairs counts, by the time from the first text to the last.

`far_gain`: both lenders in one place, both buyers in another, 50 ms away, one packet in a hundred
lost: as two machines of a friend are. A round takes two long ways in place of four. It needs two
network namespaces, so root; elsewhere it says why it was not measured. `near_gain`: all on
loopback, where a way costs half a millisecond; no bar. `_identical_fraction`: answers that are
those of the other kind, token for token. `_share`: of the rounds of the last answer with handing
on, those that went on without their buyer.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from claims import Claims, main
from split import ALIKE, LENDS, TOKENS, TOKENS_QUICK, Heard, events, heard
from yard import books_exact, known

from aivillage.models.inference.stages import OPERATION
from tests.integration import wan
from tests.integration.daemons import Daemon, Yard

DELAY_SECONDS, LOSS = 0.05, 0.01
PAIRS, PAIRS_QUICK = 10, 2
FAR_BAR = 1.3
Move = Callable[[Daemon, str], Daemon]


def measure(claims: Claims, args: argparse.Namespace) -> None:
    reason = wan.missing()
    if reason:
        claims.note("far_gain", f"not measured: {reason}")
    else:
        with wan.Wan(delay_seconds=DELAY_SECONDS, loss=LOSS) as line:
            over_daemons(claims, "far", line.move, FAR_BAR, quick=args.quick)
    if not args.quick:
        over_daemons(claims, "near", lambda daemon, _end: daemon, None, quick=False)


def over_daemons(claims: Claims, where: str, move: Move, bar: float | None, *, quick: bool) -> None:
    with tempfile.TemporaryDirectory() as folder, Yard(Path(folder)) as yard:
        handing, alone = (move(yard.daemon(name), "left") for name in ("handing", "alone"))
        lenders = [move(yard.daemon(name), "right") for name in ("one", "two")]
        handing.start(*ALIKE, "--set", "serve=false")
        join = ("--join", handing.ask("invite", uses=3)["token"])
        alone.start(*join, *ALIKE, "--set", "serve=false", "--set", "stage_pass_on=false")
        for lender in lenders:
            lender.start(*join, *LENDS)
        for buyer in (handing, alone):
            known(buyer, lenders, OPERATION)
        pairs = asked(handing, alone, quick=quick)
        tell(claims, where, pairs, bar)
        claims.add(f"{where}_share", share(handing), at_least=0.9)
        claims.note(f"{where}_share_alone", share(alone))
        claims.add(f"{where}_books_exact", books_exact([handing, alone, *lenders]), at_least=1)


def asked(handing: Daemon, alone: Daemon, *, quick: bool) -> list[tuple[Heard, Heard]]:
    """Pairs of answers, after a first one of each for which layers are loaded and speeds known."""
    tokens = TOKENS_QUICK if quick else TOKENS
    for buyer in (handing, alone):
        heard(buyer, [], max_tokens=tokens)
    count = PAIRS_QUICK if quick else PAIRS
    return [
        (heard(handing, [], max_tokens=tokens), heard(alone, [], max_tokens=tokens))
        for _ in range(count)
    ]


def tell(claims: Claims, where: str, pairs: list[tuple[Heard, Heard]], bar: float | None) -> None:
    middle = statistics.median
    claims.note(f"{where}_pairs", len(pairs))
    claims.add(f"{where}_handing_seconds", middle(one.seconds for one, _ in pairs))
    claims.add(f"{where}_alone_seconds", middle(other.seconds for _, other in pairs))
    gain = middle(other.seconds / one.seconds for one, other in pairs)
    claims.add(f"{where}_gain", gain, at_least=bar)
    same = [one.token_ids == pairs[0][0].token_ids for pair in pairs for one in pair]
    claims.add(f"{where}_identical_fraction", statistics.mean(same), at_least=1.0)


def share(buyer: Daemon) -> float:
    """Of the inputs of its last answer, those that the first stage handed to the second."""
    last = events(buyer, "split_ended")[-1]
    return float(last["handed_on"] / max(1, last["inputs"]))


if __name__ == "__main__":
    sys.exit(main(measure, __doc__ or ""))
