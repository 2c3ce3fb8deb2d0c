"""Sellers that say something else than the engine does, now and then, and whom nobody looks at."""

from __future__ import annotations

import random
from collections.abc import Callable

from aivillage.models.inference import catalogue
from aivillage.models.inference.generate import GenerateRequest
from tests.simulation.scripted import Fake, answer, word

Cheat = Callable[[GenerateRequest], Fake]
Choose = Callable[[GenerateRequest], Fake | None]
"""None: this time it is honest."""


def wrong_text(request: GenerateRequest) -> Fake:
    """The right tokens under another text: the check of every result sees it."""
    return Fake(answer(request).token_ids, words=lambda number: word(number + 1))


def truncated(request: GenerateRequest) -> Fake:
    """Half of the answer, and then the end token as if the model had ended there."""
    end = catalogue.known(request.model).end_token_id
    return Fake((*answer(request).token_ids[: request.max_tokens // 2], end), "eos")


def of_another_request(request: GenerateRequest) -> Fake:
    """What the engine says to another prompt: made once, sold many times."""
    other = GenerateRequest(prompt="another request", max_tokens=request.max_tokens)
    return Fake(answer(other).token_ids)


def of_a_cheaper_model(request: GenerateRequest) -> Fake:
    """Tokens of a model that costs less to run."""
    return Fake(answer(request, "a cheaper model").token_ids)


CHEATS: dict[str, Cheat] = {
    "truncated": truncated,
    "another request": of_another_request,
    "cheaper model": of_a_cheaper_model,
}
"""Those that pass the check of every result."""


def now_and_then(cheat: Cheat, percent: float, rng: random.Random) -> Choose:
    """Cheats on so many of its answers."""
    return lambda request: cheat(request) if rng.random() * 100 < percent else None


def after(cheat: Cheat, honest_jobs: int) -> Choose:
    """Honest for so many answers, and never again."""
    made = [0]

    def choose(request: GenerateRequest) -> Fake | None:
        made[0] += 1
        return cheat(request) if made[0] > honest_jobs else None

    return choose
