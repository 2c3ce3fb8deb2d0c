"""What the last layers of a split answer draw, in the answer's format.

A round may draw after guesses, whose ids the last stage never sees. It need not: each draw goes on
from the draw before it, and where a guess was another token, its driver uses nothing that follows.
"""

from __future__ import annotations

from torch import Tensor

from aivillage.models.inference import logprobs, sampling
from aivillage.models.inference.constraint import Constraint
from aivillage.models.inference.stages import StageRequest
from aivillage.protocols.errors import RequestError


class StageDraws:
    """Of one session. `constraint`: of the request's format, at its beginning."""

    def __init__(self, request: StageRequest, constraint: Constraint | None) -> None:
        self._request = request
        self._constraint = constraint
        self._ids = list(request.drawn)
        self._followed = 0
        """So many of them the constraint has taken."""

    def draw(self, lines: Tensor, position: int) -> tuple[tuple[int, ...], bytes]:
        """The tokens at `position` and after it, one a row of `lines` (draws, vocabulary).

        And their log-probabilities, as they travel. What is drawn after a wrong guess means
        nothing, so an error there is none: the next round shows whether it counts.

        Raises:
            RequestError: the format cannot go on, or what came before is not known here.
        """
        walker = self._at(position)
        said = b""
        for n, line in enumerate(lines):
            try:
                if walker is not None and n:
                    walker.advance(self._ids[-1])
                token = self._draw(line, position + n, walker)
            except RequestError:
                if not n:
                    raise
                break
            self._ids.append(token)
            if self._request.logprobs:
                found = sampling.log_probabilities(line, token, self._request.logprobs)
                said += logprobs.packed(found)
        drawn = self._ids[-len(lines) :] if walker is None else self._ids[position:]
        missing = len(lines) - len(drawn)
        said += bytes(missing * logprobs.token_size(self._request.logprobs))
        return (*drawn, *[0] * missing), said

    def _draw(self, line: Tensor, position: int, walker: Constraint | None) -> int:
        """As the unsplit engine draws."""
        request = self._request
        u = sampling.uniform(request.seed, max(0, position))
        allowed = line if walker is None else walker.masked(line)
        return sampling.choose(allowed, temperature=request.temperature, top_p=request.top_p, u=u)

    def _at(self, position: int) -> Constraint | None:
        """What may be said from `position` on; a copy, since guesses may be wrong."""
        if self._constraint is None:
            self._ids.clear()
            return None
        if not self._followed <= position <= len(self._ids):
            raise RequestError(
                f"a draw at {position} of an answer of {len(self._ids)} known tokens"
            )
        for token in self._ids[self._followed : position]:
            self._constraint.advance(token)
        self._followed = position
        del self._ids[position:]
        return self._constraint.copy()
