"""Many sessions over one model, one batched step at a time, whoever computes the rows.

A step gives every session that has allowance some rows: one where it decodes, a slice of up to 40
where it still reads, so that a long prompt does not stall the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeVar

import msgspec
import torch

from aivillage.models.inference import constraint
from aivillage.models.inference.generate import GenerateRequest, conversation
from aivillage.models.inference.kept import Slots, to_read
from aivillage.models.inference.linear import ROW_SIZES
from aivillage.models.inference.llama import RowModel, Span
from aivillage.models.inference.placement import no_memory, on_host
from aivillage.models.inference.recheck import Recheck
from aivillage.models.inference.session import Session
from aivillage.models.inference.tokenizer import Prompt, Speaker, vocabulary_sha256
from aivillage.protocols.errors import RefusedError, RequestError
from aivillage.protocols.ports import EngineInfo, SessionFrame
from aivillage.protocols.prefixes import PrefixTokens
from aivillage.protocols.rechecking import Claim

STEP_ROWS: Final = ROW_SIZES[-1]
"""Of a step: one for each session, and what is left of 40 reads prompts in slices."""
T = TypeVar("T")


class SessionEngine:
    """An engine that is a `RowModel` and a tokenizer; what it is made of loads them."""

    load_seconds: float
    """Set by what loads it."""

    def __init__(
        self, model: RowModel, tokenizer: Speaker, info: EngineInfo, *, slots: int
    ) -> None:
        """`model` has room for `slots` sessions of `info.context_tokens` each."""
        self.tokenizer = tokenizer
        self._model = model
        self._info = msgspec.structs.replace(
            info, vocabulary_sha256=vocabulary_sha256(tokenizer, info.vocabulary)
        )
        self._slots = Slots(
            slots,
            keeps=info.identical == "guaranteed",
            drawn_as_prompt=model.draws_as_it_reads,
        )
        self._ended = PrefixTokens()
        self._sessions: dict[int, Session | Recheck] = {}
        self._turn = 0
        constraint.make_ready(tokenizer, info.vocabulary)

    def info(self) -> EngineInfo:
        return self._info

    def add(self, session: int, request: Any, delivered: Sequence[int], scope: bytes = b"") -> None:
        """Queues `request`, a `GenerateRequest`, to go on after the ids in `delivered`.

        What an earlier session of the same `scope` read is not read again.

        Raises:
            RequestError: it is for another model, too long for the context, `delivered`
                holds more than the request asks for, or its format cannot be taken.
            RefusedError: BUSY, no slot. NOT_OFFERED, no formats here.
        """
        prompt = self._prompt(session, request, delivered)
        format_ = self._constraint(request)
        place = self._slots.place(to_read(prompt, delivered, scope))
        added = Session(
            session, place.slot, request, prompt, self.tokenizer, format_,
            kept_tokens=place.tokens, scope=scope,
        )  # fmt: skip
        added.replay(delivered)
        self._slots.take(place.slot)
        if place.source != place.slot:
            self._model.copy_slot(place.source, place.slot, place.tokens)
        self._sessions[session] = added

    def recheck(self, session: int, request: Any, claim: Claim) -> None:
        """Queues a look at an answer to `request` that somebody else gave.

        It reads all of it: what is held against somebody rests on nothing computed before.

        Raises:
            RequestError: it cannot be an answer to it, or a fingerprint is of the wrong span.
            RefusedError: BUSY, no slot. NOT_OFFERED, no formats here.
        """
        prompt = self._prompt(session, request, claim.token_ids)
        slot, format_ = self._slots.oldest(), self._constraint(request)
        added = Recheck(session, slot, request, prompt.token_ids, claim, format_)
        self._slots.take(slot)
        self._sessions[session] = added

    def _constraint(self, request: GenerateRequest) -> constraint.Constraint | None:
        return constraint.of_format(request.format, self.tokenizer, self._info.vocabulary)

    def _prompt(self, session: int, request: Any, answered: Sequence[int]) -> Prompt:
        """The prompt of a session that there is room for.

        Raises:
            RequestError, RefusedError: there is none.
        """
        if session in self._sessions:
            raise RequestError(f"session {session} is running already")
        prompt = prompt_of(request, answered, self._info, self.tokenizer)
        if not self._slots:
            raise slots_taken()
        return prompt

    def allow(self, session: int, units: int) -> None:
        """Raises the units that the answer may hold in all, delivered ones included.

        Units are quads of prompt bytes plus output tokens. An unknown session is no error.
        """
        if session in self._sessions:
            self._sessions[session].allow(units)

    def step(self) -> list[SessionFrame]:
        """One batched pass: a frame for every session that moved; empty when none could."""
        plan: list[tuple[Session | Recheck, Span]] = []
        slice_rows = STEP_ROWS - len(self._sessions)
        for session in self._in_turn():
            span = None if session.finished else session.next_span(1 + slice_rows)
            if span is not None:
                slice_rows -= len(span.token_ids) - 1
                plan.append((session, span))
        if plan:
            self._try_forward(plan)
        moved = {session.number for session, _ in plan}
        frames = [s.report() for s in self._sessions.values() if s.number in moved or s.has_news]
        for session in [s for s in self._sessions.values() if s.finished]:
            self.cancel(session.number)
        return frames

    def cancel(self, session: int) -> None:
        """Frees the slot before the next step; an unknown session is no error."""
        gone = self._sessions.pop(session, None)
        if gone is not None:
            self._slots.give_back(gone.slot, gone.leaves())
            self._ended += gone.prefix_tokens

    @property
    def free_slots(self) -> int:
        return len(self._slots)

    @property
    def prefix_tokens(self) -> PrefixTokens:
        """Since it was loaded."""
        return self._ended

    def _in_turn(self) -> list[Session | Recheck]:
        self._turn += 1
        return in_turn(self._sessions.values(), self._turn)

    def _try_forward(self, plan: Sequence[tuple[Session | Recheck, Span]]) -> None:
        """A GPU that is full fails the sessions of the step, and neither the engine nor others."""
        try:
            self._forward(plan)
        except torch.OutOfMemoryError as error:
            why = no_memory(error)
            for session, _ in plan:
                session.fail(why)

    def _forward(self, plan: Sequence[tuple[Session | Recheck, Span]]) -> None:
        states = self._model.forward([span for _, span in plan])  # (rows, width)
        due: list[tuple[Session | Recheck, int]] = []
        rows: list[int] = []
        end = 0
        for session, span in plan:
            end += len(span.token_ids)
            session.read(len(span.token_ids))
            if count := session.rows_due:
                due.append((session, count))
                rows += range(end - count, end)
        if due:
            wanted = states[torch.tensor(rows, device=states.device)]
            logits = self._model.logits(wanted)  # (rows due, vocabulary)
            sizes = [count for _, count in due]
            parts = torch.split(on_host(wanted), sizes), torch.split(on_host(logits), sizes)
            for (session, _), own_states, own_logits in zip(due, *parts, strict=True):
                session.take(own_states, own_logits)


def prompt_of(
    request: Any, answered: Sequence[int], info: EngineInfo, tokenizer: Speaker
) -> Prompt:
    """The prompt of `request`, a `GenerateRequest` of which `answered` is there already.

    Raises:
        RequestError: it is for another model, too long for the context, or an id is none.
    """
    if not isinstance(request, GenerateRequest) or request.model != info.model:
        raise RequestError(f"this engine answers requests to {info.model}")
    prompt = tokenizer.prompt(conversation(request))
    if len(prompt.token_ids) + request.max_tokens > info.context_tokens:
        raise RequestError(
            f"the prompt has {len(prompt.token_ids)} tokens; with {request.max_tokens} more "
            f"it leaves the context of {info.context_tokens}",
            code="TOO_LARGE",
            next_step="shorten the prompt or ask for fewer tokens",
        )
    if any(not 0 <= token < info.vocabulary for token in answered):
        raise RequestError("a delivered token id is outside the vocabulary")
    return prompt


def slots_taken() -> RefusedError:
    return RefusedError("every slot of the engine is taken", next_step="try again")


def in_turn(sessions: Iterable[T], turn: int) -> list[T]:
    """All, another one first each time, so that none is always the one left out."""
    found = list(sessions)
    start = turn % max(1, len(found))
    return found[start:] + found[:start]
