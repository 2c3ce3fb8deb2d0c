"""Which results are done again, what two answers say of each other, and what a bad one costs.

Pure: values in, values out. `reputation.py` keeps what follows from it, `replication.py` does the
work. Adaptive replication as in BOINC: trust is earned by results that were done again, and only
by those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal

import msgspec

from aivillage.protocols.types import AttemptId, MicroCredits, PeerId, Seconds

TRUSTED_FROM: Final = 10
"""Below so many results in a row that were done again and found right, every one is done again."""
CHANCE_MIN: Final = 0.01
"""However long it went well, one result in a hundred is done again."""
CUT_OFF_SECONDS: Final = 3600.0
CUT_OFF_GROWTH: Final = 4
CUT_OFF_SECONDS_MAX: Final = 30 * 86_400.0
"""After the first wrong result an hour, then four times as long each time, at most 30 days."""
ALLOWANCE_MICRO_CREDITS: Final = 100_000
"""What checks may cost before there was any spending: as much as one job without --max-price."""

Finding = Literal["same", "different", "best effort"]
"""`best effort`: the two cannot be compared honestly, so nothing follows."""
Judgement = Literal["first", "second", "nobody"]
"""Whose answer the third one shows to be wrong."""


class Trust(msgspec.Struct, frozen=True):
    """What is known of one peer at one operation, model and kernel class."""

    count: int = 0
    """Results in a row that were done again and found right: what chance follows from."""
    done: int = 0
    checked: int = 0
    """Of those done, the ones that were done again and could be compared."""
    failed: int = 0
    unsettled: int = 0
    """Disagreements that no third could decide: nobody is accused of them."""

    @property
    def chance(self) -> float:
        """Of the next result being done again; never 0."""
        return 1.0 if self.count < TRUSTED_FROM else max(1 / self.count, CHANCE_MIN)

    def after_done(self) -> Trust:
        """A result came; its count waits for a check."""
        return msgspec.structs.replace(self, done=self.done + 1)

    def after_same(self) -> Trust:
        return msgspec.structs.replace(self, count=self.count + 1, checked=self.checked + 1)

    def after_wrong(self) -> Trust:
        return msgspec.structs.replace(
            self, count=0, checked=self.checked + 1, failed=self.failed + 1
        )

    def after_unsettled(self) -> Trust:
        """Every result is done again until it is clear whom to believe."""
        return msgspec.structs.replace(
            self, count=min(self.count, TRUSTED_FROM - 1), unsettled=self.unsettled + 1
        )


class CutOff(msgspec.Struct, frozen=True):
    """A peer gets no jobs of one operation until `until`, for the `faults`-th wrong result."""

    faults: int = 0
    since: float = 0.0
    until: float = 0.0

    def after_wrong(self, now: float) -> CutOff:
        return CutOff(self.faults + 1, now, now + cut_off_seconds(self.faults + 1))


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """What one attempt gave of an answer: its tokens begin at `first`, and are `count`."""

    attempt: AttemptId
    seller: PeerId
    kernel: str
    identical: str
    first: int
    count: int
    quote: bytes = b""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer and who made which part of it, in order."""

    token_ids: tuple[int, ...]
    shares: tuple[Share, ...]
    result: bytes = b""
    fingerprints: tuple[bytes, ...] = ()
    """As they came, in order; each lies within one share."""
    logprobs: bytes = b""
    """Of all tokens as they travel, where they were asked for."""
    in_format: bool = False
    """A grammar had its say in every token."""
    by_result: bool = False
    """No tokens: its items are held against another's by their operation's rule, in any class."""

    @property
    def kernel(self) -> str:
        """The class of its beginning, where that guarantees the same bits; else empty."""
        first = self.shares[0] if self.shares else None
        return first.kernel if first and first.identical == "guaranteed" else ""

    @property
    def is_whole(self) -> bool:
        return len(self.leading()) == len(self.shares)

    def leading(self) -> tuple[Share, ...]:
        """The parts up to the first one of another kernel class, where that matters."""
        if self.by_result:
            return self.shares
        found = []
        for share in self.shares:
            if share.kernel != self.kernel or share.identical != "guaranteed":
                break
            found.append(share)
        return tuple(found)

    def judged(self) -> int:
        """How many of its tokens can be compared."""
        return sum(share.count for share in self.leading())

    def said(self, count: int) -> list[tuple[int, bytes]]:
        """The first `count` tokens, each with its log-probabilities."""
        size = len(self.logprobs) // max(1, len(self.token_ids))
        return [
            (token, self.logprobs[at * size : (at + 1) * size])
            for at, token in enumerate(self.token_ids[:count])
        ]

    def sellers(self) -> tuple[PeerId, ...]:
        """Who made what can be compared."""
        return tuple(dict.fromkeys(share.seller for share in self.leading()))

    def maker_of(self, position: int) -> Share:
        """Whose token is at `position`; past the end, who ended the answer."""
        for share in self.shares:
            if position < share.first + share.count:
                return share
        return self.shares[-1]


def compare(first: Answer, second: Answer) -> tuple[Finding, int]:
    """What two answers to one request say of each other, and where they part.

    Tokens and what is said of them are compared one by one, and only where both come from one
    kernel class that guarantees the same bits. Where one went on at another class only its
    beginning counts.
    """
    if not first.kernel or first.kernel != second.kernel:
        return "best effort", 0
    if first.is_whole and second.is_whole:
        count = max(len(first.token_ids), len(second.token_ids))
    else:
        count = min(first.judged(), second.judged())
    if not count:
        return "best effort", 0
    position = _parting(first.said(count), second.said(count))
    return ("same", count) if position is None else ("different", position)


def _parting(one: Sequence[object], other: Sequence[object]) -> int | None:
    """The first place at which two answers differ; a shorter one differs where it ends."""
    for position, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return position
    return None if len(one) == len(other) else min(len(one), len(other))


Rule = Callable[[Answer, Answer], tuple[Finding, int]]
"""As `compare`, for one operation."""


def judge(first: Answer, second: Answer, third: Answer | None, rule: Rule = compare) -> Judgement:
    """Two of three that agree are right; three that all differ accuse nobody."""
    if third is None:
        return "nobody"
    if rule(first, third)[0] == "same":
        return "second"
    return "first" if rule(second, third)[0] == "same" else "nobody"


def cut_off_seconds(faults: int) -> Seconds:
    """How long a peer is left out for its `faults`-th wrong result."""
    growth = float(CUT_OFF_GROWTH) ** min(faults - 1, 10)
    return min(CUT_OFF_SECONDS * growth, CUT_OFF_SECONDS_MAX)


def room(jobs: MicroCredits, checks: MicroCredits, percent: int) -> MicroCredits:
    """What checks may still cost: a percentage of what jobs did, and the allowance."""
    return max(0, jobs * percent // 100 + ALLOWANCE_MICRO_CREDITS - checks)
