"""An answer looked at in one pass: prompt and tokens are read together, nothing is drawn.

Each token is held against the draw that the request asks for at that place, after the tokens before
it, and each fingerprint against the states. Reading 40 rows at once costs a tenth of drawing them
one by one. It says what it found; what follows from that is `node/verifier.py`'s.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from aivillage.models.inference import logprobs, sampling
from aivillage.models.inference.constraint import Constraint
from aivillage.models.inference.fingerprint import (
    DRAW_MARGIN_MAX,
    LOGIT_MARGIN,
    LOGPROB_MARGIN,
    Fingerprint,
    in_order,
)
from aivillage.models.inference.generate import GenerateRequest
from aivillage.models.inference.kept import NOTHING, Kept
from aivillage.models.inference.llama import KEY_STEP, Span
from aivillage.models.inference.marks import marks
from aivillage.protocols.errors import RequestError
from aivillage.protocols.ports import SessionFrame
from aivillage.protocols.prefixes import PrefixTokens
from aivillage.protocols.rechecking import Claim, Deviation, Finding, OddDraw, OddValue

ODD_MAX: Final = 64
"""Draws told of: the first one decides."""


class Recheck:
    """Stands among an engine's sessions; reads only."""

    def __init__(
        self,
        number: int,
        slot: int,
        request: GenerateRequest,
        prompt_ids: tuple[int, ...],
        claim: Claim,
        constraint: Constraint | None = None,
    ) -> None:
        """Raises: RequestError: it answers nothing or too much, or something said is of no span."""
        if not claim.token_ids:
            raise RequestError("an answer without tokens")
        if len(claim.token_ids) > request.max_tokens:
            raise RequestError("an answer of more tokens than were asked for")
        self.number = number
        self.slot = slot
        self.finished = ""
        self._request = request
        self._claim = claim
        self._constraint = constraint
        self._left_format = False
        self._fingerprints = in_order(claim.fingerprints, len(claim.token_ids))
        said = claim.logprobs
        self._said = logprobs.read(said, len(claim.token_ids), request.logprobs) if said else ()
        self._ids = prompt_ids + claim.token_ids[:-1]
        self._first_row = len(prompt_ids) - 1
        self._read_tokens = 0
        self._odd: list[OddDraw] = []
        self._values: list[OddValue] = []
        self._marks: list[float] = []
        self._lengths: list[float] = []
        self._error = ""

    def allow(self, units: int) -> None:
        """Nothing is sold, so nothing is held back."""

    def next_span(self, rows_max: int) -> Span | None:
        """The next tokens to read; None at the end."""
        at, prompt_end = self._read_tokens, self._first_row + 1
        drawn = at >= prompt_end
        border = (at // KEY_STEP + 1) * KEY_STEP
        end = min(at + rows_max, border, len(self._ids) if drawn else prompt_end)
        return Span(self.slot, at, self._ids[at:end], drawn=drawn) if end > at else None

    def read(self, count: int) -> None:
        """The engine has read this many more tokens."""
        self._read_tokens += count

    def leaves(self) -> Kept:
        """Nothing: what a judgement read is nobody's conversation."""
        return NOTHING

    @property
    def prefix_tokens(self) -> PrefixTokens:
        """None: it is no prompt that anybody pays."""
        return PrefixTokens()

    @property
    def rows_due(self) -> int:
        """Of the rows just read, the last ones that drew a token."""
        return max(0, self._read_tokens - self._first_row - len(self._marks))

    def take(self, states: Tensor, logits: Tensor) -> None:
        """`states` (rows, width) and `logits` (rows, vocabulary) of the rows that were due."""
        first = len(self._marks)
        if not bool(torch.isfinite(logits).all()):
            self.finished, self._error = "error", "the model computed something that is no number"
            return
        self._marks += marks(states, first)
        self._lengths += states.double().norm(dim=1).tolist()
        try:
            for position, line in enumerate(logits, first):
                self._hold_values(position, line)
                self._hold(position, line)
        except RequestError as error:  # our engine would not have gone on here
            self.finished, self._error = "error", error.message
            return
        if self._read_tokens == len(self._ids):
            self.finished = "rechecked"

    def fail(self, why: str) -> None:
        """Ends it: the engine can do no more for it."""
        self.finished, self._error = "error", why

    @property
    def has_news(self) -> bool:
        return bool(self.finished)

    def report(self) -> SessionFrame:
        finding = None
        if self.finished == "rechecked":
            spans = tuple(self._deviation(span) for span in self._fingerprints)
            finding = Finding(
                tokens=len(self._marks),
                odd=tuple(self._odd),
                spans=spans,
                values=tuple(self._values),
            )
        return SessionFrame(
            self.number, (), "", 0, self.finished, self._error, finding=finding
        )  # fmt: skip

    def _hold_values(self, position: int, line: Tensor) -> None:
        """What is said of the claimed token's log-probabilities against ours, before any format."""
        if not self._said:
            return
        off = sampling.off_by(line, self._claim.token_ids[position], self._said[position])
        near = off <= LOGPROB_MARGIN
        is_news = not near or not any(value.near for value in self._values)
        if off and is_news and len(self._values) < ODD_MAX:
            self._values.append(OddValue(position, near))

    def _hold(self, position: int, line: Tensor) -> None:
        """The claimed token against the draw of this place."""
        request, token = self._request, self._claim.token_ids[position]
        if self._left_format:
            return  # no mask means anything after the token that was told of
        if self._constraint:
            line = self._constraint.masked(line)
        u = sampling.uniform(request.seed, position)
        drawn = sampling.choose(line, temperature=request.temperature, top_p=request.top_p, u=u)
        if drawn != token and len(self._odd) < ODD_MAX:
            self._odd.append(OddDraw(position, is_near(line, request, u, token)))
        self._left_format = bool(line[token] == -math.inf)
        if self._constraint and not self._left_format:
            self._constraint.advance(token)

    def _deviation(self, span: Fingerprint) -> Deviation:
        """Root mean square of what the marks miss, relative to the states' lengths."""
        here = slice(span.first, span.end)
        lost = [
            (said - mark) / max(length, 1e-9)
            for said, mark, length in zip(
                span.values, self._marks[here], self._lengths[here], strict=True
            )
        ]
        square = math.fsum(part * part for part in lost) / len(lost)
        return Deviation(span.first, len(span.values), math.sqrt(square))


def is_near(line: Tensor, request: GenerateRequest, u: float, token: int) -> bool:
    """Whether rounding alone may have drawn `token` from `line` (vocabulary,) in another class."""
    if request.temperature < LOGIT_MARGIN:
        return bool(line[token] >= line.max() - LOGIT_MARGIN)
    margin = min(LOGIT_MARGIN / request.temperature, DRAW_MARGIN_MAX)
    masses = [request.top_p]
    if request.top_p < 1:
        masses += [max(request.top_p - margin, 1e-9), min(1.0, request.top_p + margin)]
    intervals = [
        sampling.interval(line, temperature=request.temperature, top_p=mass, token=token)
        for mass in masses
    ]
    # Not only the draws at u +- margin: an unlikely token's interval lies between them.
    return any(found and found[0] - margin <= u <= found[1] + margin for found in intervals)
