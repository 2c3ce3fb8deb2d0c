"""Whether guesses that take time and money pay, by what one answer measured so far. Pure.

A round gives one token, and with each guess that is right one more. With `k` guesses, each right
with probability `a` if those before it are, it gives 1 + a + ... + a^k tokens, and costs

    round + k x guess,    guess = its own time and price, and those of its row in the stages

in micro-credits: a second is worth what the answer's owner says that it is. The `k` with the least
cost a token is taken, and none where that is hardly less than without.

Source: Leviathan et al., arXiv 2211.17192, section 3.3, for the tokens of a round.
"""

from __future__ import annotations

import math
from typing import Final

from aivillage.protocols.types import MicroCredits, Seconds

ROUNDS_MIN: Final = 2
"""Measured before anything is guessed: the first one may have waited for something."""
RIGHT_AT_FIRST: Final = 0.5
"""How many guesses are right, before any was checked."""
WEIGHT_AT_FIRST: Final = 8.0
"""Of guesses: what that is worth beside those that were checked."""
FADES: Final = 0.9
"""What a round leaves of the weight of those before it."""
ROUNDS_WITHOUT_MAX: Final = 64
"""Then what is known of right and wrong guesses is of another passage: it is forgotten."""
GAIN_MIN: Final = 1.1
"""Less may be noise."""
RIGHT_MIN: Final = 1 / 8
"""A row of the stages is bought where it gives a token at least so often."""
SLOW_FACTOR: Final = 2.0
"""A round counts as at most so much slower than usual: a stage may have been lost in it."""


class Mean:
    """A running mean that forgets."""

    def __init__(self) -> None:
        self.value = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) / min(self.count, 4)


class Pace:
    """Told how long rounds and guesses took and which were right; says how many are worth it."""

    def __init__(self, *, row_price: MicroCredits, second_price: MicroCredits) -> None:
        """`row_price`: of one row through all stages; `second_price`: what a second is worth."""
        self._row_price = row_price
        self._second_price = second_price
        self._round = Mean()
        self._row = Mean()
        self._guess = Mean()
        self._right = self._tried = 0.0
        self._without = 0
        self._forget()

    @property
    def round_seconds(self) -> Seconds:
        """Of a round without guesses."""
        return self._round.value

    @property
    def guess_seconds(self) -> Seconds:
        return self._guess.value

    def round_took(self, seconds: Seconds, guesses: int) -> None:
        """A round that read one token and so many guesses, whosever they are."""
        known = self._round.value
        if self._round.count:
            seconds = min(seconds, SLOW_FACTOR * known)
        if not guesses or seconds < known:
            self._round.add(seconds)
        elif self._round.count:
            self._row.add((seconds - known) / guesses)

    def guessed(self, seconds: Seconds, count: int) -> None:
        """So many guesses took so long; none: as long as one at least."""
        self._guess.add(seconds / max(1, count))

    def checked(self, made: int, right: int) -> None:
        """Of `made` guesses the first `right` were right; those after a wrong one say nothing."""
        if not made:
            self._without += 1
            if self._without >= ROUNDS_WITHOUT_MAX:
                self._forget()
            return
        self._without = 0
        self._right = FADES * self._right + right
        self._tried = FADES * self._tried + min(made, right + 1)

    def worth(self, most: int) -> int:
        """How many of at most `most` guesses the next round should have."""
        if self._round.count < ROUNDS_MIN or not self._guess.count:
            return 0
        best, least = 0, self._cost(0) / GAIN_MIN
        for count in range(1, most + 1):
            if self._chance**count < RIGHT_MIN:
                break
            if self._cost(count) < least:
                best, least = count, self._cost(count)
        return best

    @property
    def _chance(self) -> float:
        return self._right / self._tried

    def _cost(self, guesses: int) -> float:
        """Micro-credits a token of a round with so many guesses, time included."""
        tokens = math.fsum(self._chance**n for n in range(guesses + 1))
        seconds = self._round.value + guesses * (self._guess.value + self._row.value)
        return (seconds * self._second_price + (1 + guesses) * self._row_price) / tokens

    def _forget(self) -> None:
        self._right, self._tried = RIGHT_AT_FIRST * WEIGHT_AT_FIRST, WEIGHT_AT_FIRST
        self._without = 0
