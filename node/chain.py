"""The stages of one split answer, one behind the other, and a stand-in where one is lost.

Everything that a stage was fed is kept here while the answer lasts: a stand-in reads it again, and
goes on with the same bits. States come back to the buyer between stages (a star): whoever fails is
replaced without a word to the others, at the cost of one way more a stage than a ring would have.
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

    def feed(self, fed: StageInput) -> None:
        """One input; a lost stage is noticed, and replaced, where its output is waited for."""
        del self._rows[fed.position :]
        self._rows += fed.token_ids or self._cut(fed.states)
        self._waiting.append(fed)
        self._fed.set()
        self._send(fed)

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

    def _send(self, fed: StageInput) -> None:
        try:
            self.call.feed(fed)
        except AivillageError:
            return  # whoever waits for the output hears why there is none

    def _cut(self, states: bytes) -> list[bytes]:
        size = self._row_bytes
        return [states[at : at + size] for at in range(0, len(states), size)]


class Chain:
    """Rounds go through its hops; several slices of a prompt are under way at once."""

    def __init__(self, hops: Sequence[Hop]) -> None:
        self.hops = tuple(hops)
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
        for fed in inputs:
            self.hops[0].feed(_of_draws(fed, 0) if len(self.hops) > 1 else fed)

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
                        passed_on = StageInput(fed.position, (), output.states, draws)
                        self.hops[at + 1].feed(passed_on)
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
