"""The torch engine: many sessions, one batched step at a time, the same bits whatever the batch.

A step gives every session that has allowance some rows: one where it decodes, a slice of up to 40
where it still reads, so that a long prompt does not stall the others.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any, Final

import torch

from aivillage.models.inference import catalogue, gguf_model, sameness
from aivillage.models.inference.generate import GenerateRequest, conversation
from aivillage.models.inference.gguf_file import GgufFile
from aivillage.models.inference.linear import ROW_SIZES, rule
from aivillage.models.inference.llama import Llama, RowModel, Span
from aivillage.models.inference.recheck import Recheck
from aivillage.models.inference.session import Session
from aivillage.models.inference.tokenizer import ChatTokenizer, Prompt
from aivillage.protocols.errors import RefusedError, RequestError
from aivillage.protocols.ports import EngineInfo, SessionFrame
from aivillage.protocols.rechecking import Claim

ENGINE_VERSION: Final = 1
"""Raise it when a change of ours may change a bit of any answer."""
SLOTS: Final = 8
STEP_ROWS: Final = ROW_SIZES[-1]
"""Of a step: one for each session, and what is left of 40 reads prompts in slices."""


class TorchEngine:
    """Serves one Llama model from a GGUF file."""

    def __init__(
        self, model: catalogue.KnownModel, *, slots: int = SLOTS, threads: int = 1
    ) -> None:
        """Loads and tests itself: seconds. `threads` are the whole process's.

        Raises:
            ConfigError: the weights are not on this machine.
            RequestError: the file is damaged or of a kind that is not read here.
        """
        if not 1 <= slots <= SLOTS:
            raise ValueError(f"a step has rows for at most {SLOTS} sessions")
        torch.set_num_threads(threads)
        begun = time.monotonic()
        path = catalogue.weights_path(model)
        self.tokenizer = ChatTokenizer(GgufFile(path))
        weights = gguf_model.load(path)
        catalogue.require_same(model, weights.sha256)
        self._context_tokens = min(model.context_tokens, weights.shape.context_tokens)
        model_here = Llama(weights, slots=slots, context_tokens=self._context_tokens)
        self._model: RowModel = model_here
        same = sameness.probe(model_here, slots=slots, context_tokens=self._context_tokens)
        self._info = EngineInfo(
            engine="torch",
            model=model.name,
            kernel_class=kernel_class(weights.sha256, same.digest),
            identical="guaranteed" if same.passed else "best effort",
            active_parameters=model.active_parameters,
            context_tokens=self._context_tokens,
            vocabulary=weights.shape.vocabulary,
            weights_sha256=weights.sha256,
            rechecks=True,
        )
        self._free_slots = list(range(slots))
        self._sessions: dict[int, Session | Recheck] = {}
        self._turn = 0
        self.load_seconds = time.monotonic() - begun

    def info(self) -> EngineInfo:
        return self._info

    def add(self, session: int, request: Any, delivered: Sequence[int]) -> None:
        """Queues `request`, a `GenerateRequest`, to go on after the ids in `delivered`.

        Raises:
            RequestError: it is for another model, too long for the context, or `delivered`
                holds more than the request asks for.
            RefusedError: BUSY, no slot.
        """
        prompt = self._prompt(session, request, delivered)
        added = Session(session, self._free_slots[-1], request, prompt, self.tokenizer)
        added.replay(delivered)
        self._free_slots.pop()
        self._sessions[session] = added

    def recheck(self, session: int, request: Any, claim: Claim) -> None:
        """Queues a look at an answer to `request` that somebody else gave.

        Raises:
            RequestError: it cannot be an answer to it, or a fingerprint is of the wrong span.
            RefusedError: BUSY, no slot.
        """
        prompt = self._prompt(session, request, claim.token_ids)
        added = Recheck(session, self._free_slots[-1], request, prompt.token_ids, claim)
        self._free_slots.pop()
        self._sessions[session] = added

    def _prompt(self, session: int, request: Any, answered: Sequence[int]) -> Prompt:
        """The prompt of a session that there is room for.

        Raises:
            RequestError, RefusedError: there is none.
        """
        if not isinstance(request, GenerateRequest) or request.model != self._info.model:
            raise RequestError(f"this engine answers requests to {self._info.model}")
        if session in self._sessions:
            raise RequestError(f"session {session} is running already")
        prompt = self.tokenizer.prompt(conversation(request))
        if len(prompt.token_ids) + request.max_tokens > self._context_tokens:
            raise RequestError(
                f"the prompt has {len(prompt.token_ids)} tokens; with {request.max_tokens} more "
                f"it leaves the context of {self._context_tokens}",
                code="TOO_LARGE",
                next_step="shorten the prompt or ask for fewer tokens",
            )
        if any(not 0 <= token < self._info.vocabulary for token in answered):
            raise RequestError("a delivered token id is outside the vocabulary")
        if not self._free_slots:
            raise RefusedError("every slot of the engine is taken", next_step="try again")
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
            self._forward(plan)
        moved = {session.number for session, _ in plan}
        frames = [s.report() for s in self._sessions.values() if s.number in moved or s.has_news]
        for session in [s for s in self._sessions.values() if s.finished]:
            self.cancel(session.number)
        return frames

    def cancel(self, session: int) -> None:
        """Frees the slot before the next step; an unknown session is no error."""
        gone = self._sessions.pop(session, None)
        if gone is not None:
            self._free_slots.append(gone.slot)

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def _in_turn(self) -> list[Session | Recheck]:
        """All sessions, another one first each time: prompts take turns at the slice."""
        sessions = list(self._sessions.values())
        self._turn += 1
        start = self._turn % max(1, len(sessions))
        return sessions[start:] + sessions[:start]

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
            wanted = states[rows]
            logits = self._model.logits(wanted)  # (rows due, vocabulary)
            sizes = [count for _, count in due]
            parts = torch.split(wanted, sizes), torch.split(logits, sizes)
            for (session, _), own_states, own_logits in zip(due, *parts, strict=True):
                session.take(own_states, own_logits)


def kernel_class(weights_sha256: str, digest: str) -> str:
    """Who shares it computes the same bits: both have computed the same bits of a probe."""
    isa = torch.backends.cpu.get_cpu_capability()
    parts = (
        f"torch{ENGINE_VERSION}",
        torch.__version__,
        weights_sha256[:16],
        "float32",
        "cpu",
        isa,
        f"threads{torch.get_num_threads()}",
        f"{rule()}-{sameness.rule()}",
        digest,
    )
    return "/".join(parts)


@functools.cache
def shared_engine(model: str) -> TorchEngine:
    """This process's engine of `model`, loaded once.

    Raises:
        ConfigError: the weights are not on this machine.
        RequestError: no such model, or its file is damaged.
    """
    return TorchEngine(catalogue.known(model))
