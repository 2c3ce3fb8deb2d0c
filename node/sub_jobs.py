"""Work that a running module has done by others: `context.call`, with its bounds.

Whoever runs the module pays, so a call may spend what is left of the run's own ceiling and no
more. A run's calls come one after the other; each ends with the run.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import trio

from aivillage.protocols.errors import AivillageError, RefusedError, RequestError
from aivillage.protocols.types import MicroCredits, Seconds, as_credits

SUB_JOBS_MAX: Final = 8
"""In one run, those of its local sub-jobs included: more is a loop, or a job of its own."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """One sub-job. `parent` is the attempt or the local job that wants it."""

    operation: str
    request: bytes
    budget: MicroCredits
    deadline_seconds: Seconds
    parent: str
    local: bool = False
    sub_jobs: SubJobs | None = None
    """What a local sub-job may itself ask for: the rest of what the run may."""


class Bought(msgspec.Struct, frozen=True, kw_only=True):
    """How a sub-job ended; `spent` in any case."""

    result: bytes | None
    spent: MicroCredits
    error: AivillageError | None


Buy = Callable[[Order], Awaitable[Bought]]
"""Returns at the sub-job's end; cancelling it cancels the sub-job.

Raises AivillageError where nothing was begun.
"""


class SubJobs:
    """What one run may have done for it. An instance is the run's `OnCall`."""

    def __init__(
        self,
        buy: Buy,
        *,
        parent: str,
        ceiling: MicroCredits,
        deadline_seconds: Seconds,
        local: bool = False,
    ) -> None:
        self._buy = buy
        self._parent = parent
        self._left = ceiling
        self._deadline = trio.current_time() + deadline_seconds
        self._local = local
        self._count = 0

    async def __call__(self, operation: str, request: bytes, budget: MicroCredits) -> bytes:
        """The result of a sub-job.

        Raises:
            RequestError: PRICE_ABOVE_CEILING, `budget` is more than what is left.
            RefusedError: OWNER_LIMIT, the run has had its number of sub-jobs.
            AivillageError: whatever befell the sub-job.
        """
        if budget < 0:
            raise RequestError(f"a budget of {budget} micro-credits is none")
        if budget > self._left:
            raise RequestError(
                f"a sub-job may cost {as_credits(budget)} credits, the job leaves "
                f"{as_credits(self._left)}",
                code="PRICE_ABOVE_CEILING",
                next_step="submit the job with a higher ceiling",
            )
        if self._count >= SUB_JOBS_MAX:
            raise RefusedError(
                f"a job has at most {SUB_JOBS_MAX} sub-jobs",
                code="OWNER_LIMIT",
                next_step="ask for less at a time",
            )
        self._count += 1
        order = Order(
            operation=operation,
            request=request,
            budget=budget,
            deadline_seconds=max(1.0, self._deadline - trio.current_time()),
            parent=self._parent,
            local=self._local,
            sub_jobs=self if self._local else None,
        )
        bought = await self._buy(order)
        self._left -= bought.spent
        if bought.error is not None:
            raise bought.error
        assert bought.result is not None, "what did not fail has a result"
        return bought.result


async def buy_nothing(_order: Order) -> Bought:
    """Of a node that nobody has given a buyer."""
    raise RefusedError("this node buys nothing for the jobs of others", code="OWNER_LIMIT")
