"""The stages of one split answer, one behind the other, and a stand-in where one is lost.

Everything that a stage was fed is kept here while the answer lasts: a stand-in reads it again, and
goes on with the same bits. A stage hands its states to the next one where both can, and shows them
to the buyer, who holds against them what the next one says it was handed. Where anything is odd or
lost, the buyer feeds the next stage itself (a star), from then on.
"""

from __future__ import annotations

import collections
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import trio

from aivillage.models.inference.split import Draws
from aivillage.models.inference.stages import INPUT_ROWS_MAX, STATE_BYTES, StageInput, StageOutput
from aivillage.node.split_plan import Placed
from aivillage.node.stage_call import StageCall
from aivillage.protocols.errors import AivillageError
from aivillage.protocols.types import MicroCredits

STAND_INS_MAX: Final = 8
"""Of one answer: as many as a job has attempts."""

PASSED_INPUTS_MAX: Final = 16
"""Of a round whose states stages hand on: more could wait at a slow one than it takes."""

Replace = Callable[["Hop", AivillageError], Awaitable[StageCall]]


class Hop:
    """One place in the chain: whoever serves it now, and what it was fed."""

    def __init__(self, placed: Placed, call: StageCall, row_bytes: int, replace: Replace) -> None:
        self.placed = placed
        self.call = call
        self._row_bytes = row_bytes
        self._replace = replace
        self._rows: list[Any] = []
        """One of every position: a token id at the first stage, else the bytes of its state."""
        self._waiting: collections.deque[StageInput] = collections.deque()
        self._read_again = 0
        self._fed = trio.Event()

    def feed(self, fed: StageInput, hops: int = 0, draws: int = 0) -> None:
        """One input; a lost stage is noticed, and replaced, where its output is waited for.

        `hops`, `draws`: as of `StageCall.feed`.
        """
        self._note(fed)
        self._send(fed, hops, draws)

    def expect(self, fed: StageInput) -> None:
        """One input that the stage before handed over."""
        self._note(fed)
        try:
            self.call.expect(fed)
        except AivillageError:
            return  # whoever waits for the output hears why there is none

    def hands_to(self, other: Hop) -> bool:
        """Whether what it gives can go to `other` without us."""
        return self.call.passing.to == other.call.seller and not other.call.is_alone

    def _note(self, fed: StageInput) -> None:
        del self._rows[fed.position :]
        self._rows += fed.token_ids or self._cut(fed.states)
        self._waiting.append(fed)
        self._fed.set()

    async def next(self) -> StageOutput:
        """The output of the oldest input without one, by whomever.

        Raises:
            AivillageError: the stage failed, and so did all that could stand in.
        """
        while not self._waiting:  # the stage before has not answered yet
            self._fed = trio.Event()
            await self._fed.wait()
        while True:
            try:
                output = await self.call.next()
            except AivillageError as error:
                self.call = await self._replace(self, error)
                self._feed_again()
            else:
                if not self._read_again:
                    self._waiting.popleft()
                    return output
                self._read_again -= 1

    def _feed_again(self) -> None:
        """What the lost stage had read, then what it had not answered."""
        end = self._waiting[0].position
        starts = range(0, end, INPUT_ROWS_MAX)
        self._read_again = len(starts)
        for at in starts:
            rows = self._rows[at : min(at + INPUT_ROWS_MAX, end)]
            if self.placed.first == 0:
                self._send(StageInput(at, tuple(rows)))
            else:
                self._send(StageInput(at, (), b"".join(rows)))
        for fed in self._waiting:
            self._send(fed)

    def _send(self, fed: StageInput, hops: int = 0, draws: int = 0) -> None:
        try:
            self.call.feed(fed, hops, draws)
        except AivillageError:
            return  # whoever waits for the output hears why there is none

    def _cut(self, states: bytes) -> list[bytes]:
        size = self._row_bytes
        return [states[at : at + size] for at in range(0, len(states), size)]


class Chain:
    """Rounds go through its hops; several slices of a prompt are under way at once."""

    def __init__(self, hops: Sequence[Hop]) -> None:
        self.hops = tuple(hops)
        self.passed_count = 0
        """Inputs that one stage handed to the next."""
        self.fed_count = 0
        """Inputs of the first stage."""
        self._inputs: Sequence[StageInput] = ()

    def price_of(self, inputs: Sequence[StageInput]) -> MicroCredits:
        """Of a round, all stages together."""
        rows, draws = sum(len(fed.token_ids) for fed in inputs), inputs[-1].draws
        last = self.hops[-1]
        return sum(hop.call.price_of(rows, draws if hop is last else 0) for hop in self.hops)

    @property
    def row_price(self) -> MicroCredits:
        """Of a row through all stages, with its draw."""
        last = self.hops[-1]
        return sum(hop.call.price_of(1, int(hop is last)) for hop in self.hops)

    async def round(self, inputs: Sequence[StageInput]) -> Draws:
        """What the last stage drew for `inputs` of the first one.

        Raises:
            AivillageError: a stage was lost for good.
        """
        self.begin(inputs)
        return await self.finish()

    def begin(self, inputs: Sequence[StageInput]) -> None:
        """Feeds the first stage; `finish` does the rest of the round."""
        self._inputs = inputs
        self.fed_count += len(inputs)
        for fed in inputs:
            first = _of_draws(fed, 0) if len(self.hops) > 1 else fed
            self.hops[0].feed(first, *self._further(0, fed.draws))

    async def finish(self) -> Draws:
        """What the last stage drew. Raises: AivillageError: a stage was lost for good."""
        inputs, last = self._inputs, len(self.hops) - 1
        drawn: list[int] = []
        said: list[bytes] = []
        errors: list[AivillageError] = []

        async def pump(at: int) -> None:
            try:
                for fed in inputs:
                    output = await self.hops[at].next()
                    if at == last:
                        drawn.extend(output.token_ids)
                        said.append(output.logprobs)
                    else:
                        draws = fed.draws if at + 1 == last else 0
                        self._go_on(at, StageInput(fed.position, (), output.states, draws), fed)
            except AivillageError as error:
                errors.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for at in range(len(self.hops)):
                if len(inputs) == 1:
                    await pump(at)  # one after the other: no task is needed
                else:
                    nursery.start_soon(pump, at)
        if errors:
            raise errors[0]
        return Draws(tuple(drawn), b"".join(said))

    def _go_on(self, at: int, states: StageInput, fed: StageInput) -> None:
        """What stage `at` gave is the next one's input: handed over, or fed by us."""
        following = self.hops[at + 1]
        if self._hands_on(at):
            if self.hops[at].call.has_passed:
                self.passed_count += 1
                following.expect(states)
                return
            following.call.is_alone = True  # what could not be passed now would come out of turn
        following.feed(states, *self._further(at + 1, fed.draws))

    def _hands_on(self, at: int) -> bool:
        """Whether what stage `at` gives in this round goes to the next one without us."""
        is_short = len(self._inputs) <= PASSED_INPUTS_MAX
        return is_short and self.hops[at].hands_to(self.hops[at + 1])

    def _further(self, at: int, draws: int) -> tuple[int, int]:
        """How many stages after `at` an input goes through without us, and what the last draws."""
        end = at
        while end + 1 < len(self.hops) and self._hands_on(end):
            end += 1
        return end - at, draws if end > at else 0

    async def close(self, outcome: str) -> None:
        """Ends every stage, and settles with all of them at once."""
        async with trio.open_nursery() as nursery:
            for hop in self.hops:
                nursery.start_soon(hop.call.close, outcome)


def _of_draws(fed: StageInput, draws: int) -> StageInput:
    return StageInput(fed.position, fed.token_ids, fed.states, draws)


def row_bytes(width: int) -> int:
    """Of one state on the wire."""
    return STATE_BYTES * width
