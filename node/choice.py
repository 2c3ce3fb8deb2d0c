"""Which candidate gets a job, and why: pure, from facts to one number that says all in seconds.

    score = work + wait + distance + failures - owes us + price

Each term is in seconds; a price becomes seconds at the owner's rate (`RATES`). The least wins, and
every loser can be told which term it lost by. Where many buyers look at the same stale offers, the
least would send all of them to one seller: so among those that are about as good, two are drawn and
the less loaded one wins (power of two choices; Mitzenmacher 2001, theorem 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Final

import msgspec

from aivillage.protocols.types import MicroCredits, PeerId, Seconds, as_credits

RATES: Final[dict[str, MicroCredits]] = {"fast": 100_000, "balanced": 10_000, "cheap": 1_000}
"""What the owner gives for a second less. Balanced: what a second of a slow core earns, some 37
tokens of the default model at its default price."""
UNKNOWN_UNITS_PER_SECOND: Final = 5.0
"""A pessimistic guess for a peer never measured: never a veto."""
EXPLORE_EVERY: Final = 20
"""One choice in so many tries a peer never measured, that costs at most twice as much."""
LEARN_SECONDS: Final = 1.0
"""What takes no longer here is not worth learning who else does it."""
GOOD_FACTOR: Final = 1.3
"""Who comes within this of the best is about as good: measurements differ by as much."""
DEBTOR_BONUS: Final = 1.25
"""A seller that owes us the price counts as this much faster: what it owes us is worth something
only there, and our lines with others stay free. A good deal faster still wins."""
RETRY_SECONDS: Final = 10.0
"""What a failure costs beside the work: noticing it, and calling another one."""
DIAL_SECONDS: Final = 0.25
"""A peer without a link is dialled first."""
WAIT_SECONDS_MAX: Final = 300.0
"""Of a wait that a seller tells: longer ones are all the same."""
LINES_MAX: Final = 32
"""Candidates in an explanation: a screen, and some 10 KB in jobs.db."""
FRESH_SECONDS: Final = 5.0
"""What a seller said of its queue is worth something for so long."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of one candidate for one job."""

    peer: PeerId
    units: int
    """That are still to do."""
    units_per_second: float = 0.0
    """Measured by us, for this work; 0: never."""
    guess_seconds: Seconds = 0.0
    """Of the work, the longest of our own estimate and the seller's."""
    price: MicroCredits = 0
    load: int = 0
    """Jobs ahead of or beside ours."""
    slots: int = 1
    """How many of them are worked at at once."""
    wait_seconds: Seconds = 0.0
    """What it says that ours waits for its turn."""
    has_room: bool = True
    rtt_seconds: Seconds | None = None
    """None: there is no link."""
    neighbour: bool = False
    """A member of our village with a link."""
    failures: float = 0.0
    """The share of jobs that it failed."""
    owes_us: bool = False
    """At least the price: nobody has to lend for it."""
    age_seconds: Seconds = 0.0
    """Of what it said of its load."""
    here: bool = False
    """This very machine."""

    @property
    def measured(self) -> bool:
        return self.units_per_second > 0


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """The terms, in seconds."""

    work: Seconds
    wait: Seconds
    distance: Seconds
    failures: Seconds
    owes_us: Seconds
    """Zero or less."""
    price: Seconds

    @property
    def total(self) -> Seconds:
        return self.time + self.owes_us + self.price

    @property
    def time(self) -> Seconds:
        return self.work + self.wait + self.distance + self.failures


class Weighed(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate and what it comes to."""

    facts: Facts
    score: Score

    @property
    def total(self) -> Seconds:
        return self.score.total


def weigh(facts: Facts, rate: MicroCredits) -> Weighed:
    """`rate`: micro-credits that a second is worth to the owner."""
    if facts.measured:
        work = facts.units / facts.units_per_second
    else:
        work = max(facts.guess_seconds, facts.units / UNKNOWN_UNITS_PER_SECOND)
    wait = work * (facts.load + (not facts.has_room)) / facts.slots
    return Weighed(
        facts=facts,
        score=Score(
            work=work,
            wait=max(wait, min(facts.wait_seconds, WAIT_SECONDS_MAX)),  # it can only look worse
            distance=DIAL_SECONDS if facts.rtt_seconds is None else 2 * facts.rtt_seconds,
            failures=facts.failures * (RETRY_SECONDS + work),
            owes_us=(work + wait) * (1 / DEBTOR_BONUS - 1) if facts.owes_us else 0.0,
            price=facts.price / rate,
        ),
    )


def explores(turn: int, rivals: Sequence[Weighed], home: Weighed | None) -> bool:
    """Whether choice number `turn`, from 0, of some work tries somebody new.

    Against this machine a guess at peers says little: where none was ever measured, one is tried
    at once. What this machine does within `LEARN_SECONDS` stays: there is nothing to gain.
    """
    if home is not None and all(home.total <= one.total for one in rivals):
        if home.score.time <= LEARN_SECONDS:
            return False
        if not any(one.facts.measured for one in rivals):
            return True
    return turn % EXPLORE_EVERY == EXPLORE_EVERY - 1


def is_new(one: Weighed) -> bool:
    """Never measured at such work, and it never failed us: worth a try."""
    return not one.facts.measured and not one.facts.failures and not one.facts.here


def stays(home: Weighed | None, rivals: Sequence[Weighed], *, explore: bool) -> bool:
    """Whether this machine need not even ask: whatever their offers promise, none is better."""
    if home is None or (explore and any(map(is_new, rivals))):
        return False
    return all(home.total <= one.total for one in rivals)


def in_order(
    found: Sequence[Weighed], most: int, random: Random, *, explore: bool
) -> list[Weighed]:
    """Whom to ask first, `most` at a time: the best; where more are about as good, any of them.

    A peer that we neither measured nor have for a neighbour comes after those: a thousand fresh
    identities must not hide one known seller. An exploring choice asks one of them all the same.
    """
    by_score = sorted(found, key=lambda one: one.total)
    known = [one for one in by_score if one.facts.measured or one.facts.neighbour]
    good = about_as_good(known)
    if len(good) > most:
        good = _shuffled(good, random)
    first = {one.facts.peer for one in good}
    ordered = good + [one for one in known if one.facts.peer not in first]
    ordered += [one for one in by_score if one not in known]
    new = next((one for one in ordered if is_new(one)), None)
    if explore and new is not None and ordered.index(new) >= most:
        ordered.remove(new)
        ordered.insert(most - 1, new)
    return ordered


def about_as_good(found: Sequence[Weighed]) -> list[Weighed]:
    """Those within `GOOD_FACTOR` of the least score.

    On old news also those that would be, were nobody loaded: the one that had no queue then is the
    one that everybody goes to since.
    """
    good = _near_best(found, [one.total for one in found])
    if not any(one.facts.age_seconds > FRESH_SECONDS for one in found):
        return good
    idle = _near_best(found, [one.total - one.score.wait for one in found])
    return [one for one in found if one in good or one in idle]


def _near_best(found: Sequence[Weighed], scores: Sequence[Seconds]) -> list[Weighed]:
    limit = GOOD_FACTOR * min(scores, default=0.0)
    return [one for one, score in zip(found, scores, strict=True) if score <= limit]


def pick(found: Sequence[Weighed], random: Random, *, explore: bool) -> Weighed:
    """The winner among those that said yes; `found` is not empty.

    This machine never takes part in the draw: it wins where nobody scores less.
    """
    if len(found) == 1:
        return found[0]
    best = min(found, key=lambda one: one.total)
    peers = [one for one in found if not one.facts.here]
    new = [one for one in peers if is_new(one)]
    if explore and new and best.facts.measured:
        tried = min(new, key=lambda one: one.total)
        if tried.facts.price <= 2 * min(one.facts.price for one in peers):
            return tried
    return best if best.facts.here else _of_two(about_as_good(peers), random)


def _of_two(good: list[Weighed], random: Random) -> Weighed:
    """The less loaded of two drawn; where both are alike, the better, or on old news either."""
    drawn = _shuffled(good, random)[:2]
    one, other = drawn[0], drawn[-1]
    if one.facts.load != other.facts.load:
        return min(drawn, key=lambda each: each.facts.load)
    stale = max(each.facts.age_seconds for each in drawn) > FRESH_SECONDS
    return one if stale else min(drawn, key=lambda each: each.total)


def _shuffled(found: Sequence[Weighed], random: Random) -> list[Weighed]:
    """At random, those with the smaller score rather first.

    Source: weighted sampling without replacement, Efraimidis and Spirakis 2006, algorithm A.
    """
    keys = {id(one): random.random() ** max(one.total, 1e-9) for one in found}
    return sorted(found, key=lambda one: -keys[id(one)])


def why_not(loser: Weighed, winner: Weighed) -> str:
    """What a candidate lost by: the term that told most."""
    if loser.total <= winner.total:
        if winner.facts.here or winner.facts.measured:
            return "as good; the less loaded of two was taken"
        return "better known; one choice in twenty tries somebody new"
    mine, its = loser.score, winner.score
    terms = {
        "slower": mine.work - its.work,
        "busier": mine.wait - its.wait,
        "further away": mine.distance - its.distance,
        "fails more often": mine.failures - its.failures,
        "owes us less": mine.owes_us - its.owes_us,
        "too dear": mine.price - its.price,
    }
    name = max(terms, key=lambda term: terms[term])
    by = f"{as_seconds(terms[name])} s"
    if name == "too dear":
        by = f"by {as_credits(loser.facts.price - winner.facts.price)} credits, which count as {by}"
    elif name == "slower" and not loser.facts.measured:
        by = f"by {by}, as a guess: never measured"
    else:
        by = f"by {by}"
    return f"{name} {by}"


def why_of(
    winner: Weighed, quoted: Sequence[Weighed], refused: int, home: Weighed | None = None
) -> str:
    """Why the winner won, in a few words. `quoted`: the peers that said yes."""
    if winner.facts.here:
        return f"here: {_why_here(winner, quoted, refused)}"
    best = min(quoted, key=lambda one: one.total)
    if home is not None and home.total <= winner.total:
        return "new, so tried once in place of this machine"
    if len(quoted) == 1:
        return "the only one"
    if winner is best:
        return f"best of {len(quoted)}"
    if not winner.facts.measured and best.facts.measured:
        return f"new, so tried once; best of {len(quoted)} was another"
    return f"as good as the best of {len(quoted)}, drawn"


def _why_here(winner: Weighed, quoted: Sequence[Weighed], refused: int) -> str:
    if not quoted:
        return f"none of {refused} peers said yes" if refused else "no peer offers it"
    best = min(quoted, key=lambda one: one.total)
    them = f"the best of {len(quoted)} peers" if len(quoted) > 1 else "the one peer that offers it"
    if winner.score.time <= best.score.time:
        return f"faster than {them}"
    return f"slower than {them} by {as_seconds(winner.score.time - best.score.time)} s, but free"


def as_seconds(seconds: Seconds) -> str:
    """`12`, `0.31`, `0.0042`: two digits that say something."""
    return f"{seconds:.2g}" if abs(seconds) < 10 else f"{seconds:.0f}"


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate as the owner sees it."""

    peer: PeerId
    here: bool
    outcome: str
    """`chosen`, or what it lost by."""
    units_per_second: float
    load: int
    price_micro_credits: MicroCredits
    seconds: dict[str, Seconds]
    """Each term, and their sum as `score`."""


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """A choice, laid open: the winner first, then as the others were looked at."""

    why: str
    prefer: str
    micro_credits_a_second: MicroCredits
    candidates: tuple[Line, ...]
    left_out: int = 0
    """Candidates beyond `LINES_MAX`."""


def line(one: Weighed, outcome: str) -> Line:
    score, facts = one.score, one.facts
    seconds = {name: getattr(score, name) for name in Score.__struct_fields__}
    return Line(
        peer=facts.peer,
        here=facts.here,
        outcome=outcome,
        units_per_second=round(facts.units_per_second, 3),
        load=facts.load,
        price_micro_credits=facts.price,
        seconds={name: round(value, 6) for name, value in (seconds | {"score": one.total}).items()},
    )


def known_of(facts: Facts) -> str:
    """What is known of a candidate, in half a line."""
    speed = f"{facts.units_per_second:.0f} units/s measured" if facts.measured else "new"
    wait = f", {facts.load} ahead" if facts.load else ""
    owes = ", owes us" if facts.owes_us else ""
    return f"{speed}, {(facts.rtt_seconds or 0) * 1000:.0f} ms away{wait}{owes}"
