"""One session of an engine: what was read, drawn, said and allowed. No tensors but one row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aivillage.models.inference import logprobs, sampling
from aivillage.models.inference.constraint import Constraint
from aivillage.models.inference.generate import BYTES_PER_QUAD, GenerateRequest
from aivillage.models.inference.kept import NOTHING, Kept
from aivillage.models.inference.llama import KEY_STEP, Span
from aivillage.models.inference.marks import Recorder
from aivillage.models.inference.text_stream import TextStream
from aivillage.models.inference.tokenizer import Prompt, Speaker
from aivillage.protocols.errors import RequestError
from aivillage.protocols.ports import SessionFrame
from aivillage.protocols.prefixes import PrefixTokens


class Session:
    """`draw` follows `read`, which follows `next_span`; `report` says what came of it."""

    def __init__(
        self,
        number: int,
        slot: int,
        request: GenerateRequest,
        prompt: Prompt,
        tokenizer: Speaker,
        constraint: Constraint | None = None,
        *,
        kept_tokens: int = 0,
        scope: bytes = b"",
    ) -> None:
        """`constraint`: of the request's format, at its beginning.

        The keys of the first `kept_tokens` lie in `slot` already.
        """
        self.number = number
        self.slot = slot
        self.finished = ""
        self._request = request
        self._prompt = prompt
        self._end_token_ids = tokenizer.end_token_ids
        self._stream = TextStream(tokenizer.token_bytes, request.stop)
        self._ids = list(prompt.token_ids)
        self._kept_tokens = kept_tokens
        self._scope = scope
        self._read_tokens = 0
        self._reused_tokens = 0
        self._allowed_units = 0
        self._reported_bytes = 0
        self._new_ids: list[int] = []
        self._new_text = ""
        self._new_logprobs = b""
        self._error = ""
        self._constraint = constraint
        self._recorder = Recorder(0)

    @property
    def output_tokens(self) -> int:
        return len(self._ids) - len(self._prompt.token_ids)

    @property
    def draws_next(self) -> bool:
        return self._read_tokens == len(self._ids) and not self.finished

    def replay(self, delivered: Sequence[int]) -> None:
        """Takes `delivered` as drawn already: its text was said by an earlier engine.

        Raises:
            RequestError: the answer had ended before the last of them, or they leave its format.
        """
        for token in delivered:
            if self.finished:
                raise RequestError("the delivered tokens go on after the end of the answer")
            self._append(token)
        if delivered:
            self._reported_bytes = self._prompt.content_bytes[-1]
        self._new_ids.clear()
        self._new_text = ""
        self._recorder = Recorder(self.output_tokens)

    def allow(self, units: int) -> None:
        self._allowed_units = max(self._allowed_units, units)
        self._pass_over_kept()

    def next_span(self, rows_max: int) -> Span | None:
        """The next tokens to read, as many as allowance, `rows_max` and the borders permit.

        The end of the prompt is one: a span is of the prompt or of drawn tokens, never of both.
        """
        at, prompt_end = self._read_tokens, len(self._prompt.token_ids)
        drawn = at >= prompt_end
        border = (at // KEY_STEP + 1) * KEY_STEP
        end = min(at + rows_max, border, len(self._ids) if drawn else prompt_end)
        while end > at and not self._may_read(end):
            end -= 1
        return Span(self.slot, at, tuple(self._ids[at:end]), drawn=drawn) if end > at else None

    def read(self, count: int) -> None:
        """The engine has read this many more tokens."""
        self._read_tokens += count

    @property
    def prefix_tokens(self) -> PrefixTokens:
        """Of its prompt so far."""
        prompt_read = min(self._read_tokens, len(self._prompt.token_ids))
        reused = min(self._reused_tokens, prompt_read)
        return PrefixTokens(read=prompt_read - reused, reused=reused)

    def leaves(self) -> Kept:
        """What its slot holds now: of a session that went wrong nothing that can be used."""
        if self.finished == "error":
            return NOTHING
        held = max(self._read_tokens, self._kept_tokens)
        return Kept(tuple(self._ids[:held]), len(self._prompt.token_ids), self._scope)

    @property
    def rows_due(self) -> int:
        """Of the rows just read, how many of the last ones `take` wants."""
        return int(self.draws_next)

    def take(self, states: Tensor, logits: Tensor) -> None:
        """`states` (1, width) and `logits` (1, vocabulary) of the row that was due."""
        self._recorder.add(states[0])
        self.draw(logits[0])

    def fail(self, why: str) -> None:
        """Ends it: the engine can do no more for it."""
        self.finished, self._error = "error", why

    def draw(self, logits: Tensor) -> None:
        """Takes the next token from `logits` (vocabulary,)."""
        if not bool(torch.isfinite(logits).all()):
            self.finished, self._error = "error", "the model computed something that is no number"
            return
        try:
            self._append(token := self._chosen(logits))
        except RequestError as error:  # its format goes no further: no other session's step fails
            self.finished, self._error = "error", error.message
            return
        if self._request.logprobs:
            said = sampling.log_probabilities(logits, token, self._request.logprobs)
            self._new_logprobs += logprobs.packed(said)
        if self.finished:
            self._new_text += self._stream.flush()

    def _chosen(self, logits: Tensor) -> int:
        """Raises: RequestError: its format goes no further."""
        request = self._request
        allowed = self._constraint.masked(logits) if self._constraint else logits
        u = sampling.uniform(request.seed, self.output_tokens)
        return sampling.choose(allowed, temperature=request.temperature, top_p=request.top_p, u=u)

    @property
    def has_news(self) -> bool:
        """Whether a report would say anything although nothing was computed."""
        return bool(self.finished) or self._reportable_bytes() > self._reported_bytes

    def report(self) -> SessionFrame:
        """What is new since the last report."""
        read_bytes = self._reportable_bytes()
        frame = SessionFrame(
            session=self.number,
            token_ids=tuple(self._new_ids),
            text=self._new_text,
            read_bytes=read_bytes,
            finished=self.finished,
            error=self._error,
            fingerprint=self._recorder.taken(ended=bool(self.finished)),
            logprobs=self._new_logprobs,
        )
        self._reported_bytes = read_bytes
        self._new_ids, self._new_text, self._new_logprobs = [], "", b""
        return frame

    def _append(self, token: int) -> None:
        if self._constraint:
            self._constraint.advance(token)
        self._ids.append(token)
        self._new_ids.append(token)
        self._new_text += self._stream.push(token)
        if token in self._end_token_ids:
            self.finished = "eos"
        elif self._stream.stopped:
            self.finished = "stop"
        elif self.output_tokens == self._request.max_tokens:
            self.finished = "length"

    def _pass_over_kept(self) -> None:
        """Kept tokens count as read as far as they could have been: no bill shows them."""
        while self._read_tokens < self._kept_tokens and self._may_read(self._read_tokens + 1):
            self._read_tokens += 1
            self._reused_tokens += 1

    def _may_read(self, end: int) -> bool:
        """Whether reading up to token `end` stays within the allowance.

        A token of many bytes may be read once the allowance reaches into it, and is reported as
        the allowance grows: no token is too large for a small allowance.
        """
        if end == len(self._ids):  # reading the last one draws another
            return self._allowed_units >= self._prompt_units() + self.output_tokens + 1
        last = min(end, len(self._prompt.token_ids)) - 1
        read, payable = self._prompt.content_bytes, self._payable_bytes()
        starts = read[last - 1] if last else 0
        return payable > 0 and (read[last] <= payable or starts < payable)

    def _prompt_units(self) -> int:
        return -(-self._prompt.content_bytes[-1] // BYTES_PER_QUAD)

    def _payable_bytes(self) -> int:
        return BYTES_PER_QUAD * self._allowed_units

    def _reportable_bytes(self) -> int:
        if not self._read_tokens:
            return self._reported_bytes
        last = min(self._read_tokens, len(self._prompt.token_ids)) - 1
        read_bytes = min(self._prompt.content_bytes[last], self._payable_bytes())
        return max(self._reported_bytes, read_bytes)
