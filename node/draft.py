"""A small model of this machine's that guesses for an answer whose large one is split.

What it guesses are rows that the stages read in a round, as those of prompt lookup: right or wrong,
they change no draw. It runs in its own worker, as any model of this node. Whatever becomes of it,
the answer goes on without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
import trio

from aivillage.models import registry
from aivillage.models.inference.generate import GenerateRequest
from aivillage.models.inference.pace import Pace
from aivillage.models.inference.split import DRAFT_TOKENS_MIN, Rounds
from aivillage.models.inference.stages import StageInput
from aivillage.node.engines import EngineClient
from aivillage.node.shelf import Shelf
from aivillage.node.workers import GENERATE, Workers
from aivillage.protocols.codec import pack, unpack
from aivillage.protocols.errors import AivillageError, JobError, RequestError
from aivillage.protocols.messages import Submit
from aivillage.protocols.ports import EngineInfo
from aivillage.protocols.types import AMOUNT_MAX, Seconds

NONE: Final = "none"
"""What an owner says who wants no guesses of a model."""
SMALLER: Final = 4
"""How many times more weights the split model has than one that guesses unasked."""
LOAD_SECONDS: Final[Seconds] = 60.0
"""To load it; the answer waits, for it is not begun with a model that may not fit."""
READ_SECONDS: Final[Seconds] = 60.0
"""To read the prompt, beside the stages."""
WRONG_PER_TOKEN_MAX: Final = 3
"""Of its guesses: what stages were told to expect has room for these beside those of lookup."""


def require_possible(submit: Submit, shelf: Shelf) -> None:
    """What of `--draft` can be told before anything is loaded.

    Raises:
        RequestError: nothing is split here, or it means other words by its token ids.
        RefusedError: NOT_OFFERED, no such model is here; OWNER_LIMIT, it is too large.
    """
    if submit.draft in ("", NONE):
        return
    if submit.local or not registry.is_served_by_engine(submit.operation):
        raise RequestError(
            "only an answer that peers compute has a model that guesses",
            next_step="leave out --draft, or --local",
        )
    model = shelf.require(submit.draft, GENERATE)
    split = shelf.find_divisible(unpack(GenerateRequest, submit.request).model)
    if split is not None and split.vocabulary != model.vocabulary:
        raise other_words(model.name, split.name)


def other_words(model: str, split: str) -> RequestError:
    return RequestError(
        f"{model} cannot guess for {split}: their token ids do not mean the same",
        next_step=f"--draft with a smaller model of the family of {split}, or --draft {NONE}",
    )


async def engine_of(said: str, driver: EngineInfo, workers: Workers) -> EngineClient | None:
    """The engine of the model that the owner `said`, or of one that is loaded anyhow, if any.

    Raises:
        RequestError: the model that was said means something else by its token ids.
        AivillageError: it cannot be loaded now.
    """
    if said == NONE:
        return None
    if not said:
        fit = [one for one in workers.loaded() if fits(one.info, driver)]
        fit = [x for x in fit if SMALLER * x.info.active_parameters <= _weights(driver, workers)]
        return min(fit, key=lambda one: one.info.active_parameters, default=None)
    with trio.move_on_after(LOAD_SECONDS):
        engine = await workers.engine(said)
        if not fits(engine.info, driver):
            raise other_words(said, driver.model)
        return engine
    raise JobError(f"{said} was not loaded within {LOAD_SECONDS:.0f} s")


def fits(info: EngineInfo, driver: EngineInfo) -> bool:
    """Whether both mean the same by every token id, as their workers read it in the files."""
    return bool(info.vocabulary_sha256) and info.vocabulary_sha256 == driver.vocabulary_sha256


def _weights(driver: EngineInfo, workers: Workers) -> int:
    """Of the split model, that a token multiplies."""
    return workers.shelf.require_divisible(driver.model).active_parameters


class Draft:
    """Guesses for one answer, as many as are worth their time and money."""

    def __init__(self, engine: EngineClient, request: GenerateRequest, pace: Pace) -> None:
        self.model = engine.info.model
        self.lost = ""
        """Why it guesses no more."""
        self.made = 0
        self.right = 0
        self._engine = engine
        self._request = msgspec.structs.replace(request, model=self.model, stop=(), logprobs=0)
        self._pace = pace
        self._is_ready = False
        self._own = 0
        """How many guesses of the round under way are ours."""
        self._began: Seconds = 0.0
        self._inputs: Sequence[StageInput] = ()

    async def read(self) -> None:
        """Reads the prompt, and measures itself: from then on it guesses. Cancel it at the end."""
        try:
            await self._answer((), 1, READ_SECONDS)
            begun = trio.current_time()
            found = await self._answer((), DRAFT_TOKENS_MIN, READ_SECONDS)
            self._pace.guessed(trio.current_time() - begun, len(found))
            self._is_ready = True
        except AivillageError as error:
            self.lost = error.message

    async def guesses(self, rounds: Rounds, spare: int) -> list[int]:
        """For the next round; `spare`: rows that its owner's ceiling has room for."""
        most = min(rounds.places, spare, self._wrong_left())
        count = self._pace.worth(most) if self._is_ready and most > 0 else 0
        if not count:
            return []
        limit = max(self._pace.round_seconds, 2 * count * self._pace.guess_seconds)
        begun = trio.current_time()
        try:
            found = await self._answer(rounds.token_ids, count, limit)
        except AivillageError as error:
            if error.code != "BUSY":  # others have its slots now: the next round asks again
                self._stop(error.message)
            return []
        self._pace.guessed(trio.current_time() - begun, len(found))
        if not found:
            self._stop(f"nothing came within {limit:.1f} s")
        return found

    def round_begins(self, inputs: Sequence[StageInput], *, own: bool) -> None:
        """`own`: whether the guesses in it are ours."""
        self._own = inputs[-1].draws - 1 if own else 0
        self._inputs, self._began = inputs, trio.current_time()

    def round_ended(self, right: int) -> None:
        """So many guesses of it were right, whosever they were."""
        guesses = self._inputs[-1].draws - 1
        if sum(len(fed.token_ids) for fed in self._inputs) == 1 + guesses:  # no prompt was read
            self._pace.round_took(trio.current_time() - self._began, guesses)
        right = right if self._own else 0
        self._pace.checked(self._own, right)
        self.made += self._own
        self.right += right

    def told(self) -> str:
        """What it did, for whoever pays it."""
        said = f"{self.right} of {self.made} guesses of {self.model} were right"
        if not self.made:
            said = f"{self.model} guessed nothing: that would not have paid"
        return f"{self.model} guessed no more: {self.lost}; {said}" if self.lost else said

    async def _answer(self, drawn: Sequence[int], count: int, limit_seconds: Seconds) -> list[int]:
        """What the model says after the tokens in `drawn`, as far as it comes in time.

        Raises:
            AivillageError: its worker is gone, has no room, or does not take the request.
        """
        request = msgspec.structs.replace(self._request, max_tokens=len(drawn) + count)
        found: list[int] = []
        with trio.move_on_after(limit_seconds):
            async with self._engine.open_session(pack(request), tuple(drawn)) as session:
                session.allow(AMOUNT_MAX)  # our own: nobody pays
                async for frame in session:
                    found += frame.token_ids
        return found[:count]

    def _wrong_left(self) -> int:
        return WRONG_PER_TOKEN_MAX * self._request.max_tokens - (self.made - self.right)

    def _stop(self, why: str) -> None:
        self._is_ready, self.lost = False, why
