"""The engine of a stage: the inputs of many sessions, one batched pass at a time."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from aivillage.models.inference import catalogue, constraint, sameness, tokenizer
from aivillage.models.inference.engine_torch import SLOTS, kernel_class, promise
from aivillage.models.inference.linear import ROW_SIZES
from aivillage.models.inference.llama import Span
from aivillage.models.inference.placement import HOST, Placement, no_memory, on_host
from aivillage.models.inference.session_engine import in_turn, slots_taken
from aivillage.models.inference.stage import ProbedStage, Stage, bytes_of, spans_of, states_of
from aivillage.models.inference.stage_draws import StageDraws
from aivillage.models.inference.stages import (
    StageInput,
    StageOutput,
    StageRequest,
    rows_of,
    shape_of,
)
from aivillage.protocols.codec import pack, unpack
from aivillage.protocols.errors import RequestError
from aivillage.protocols.ports import EngineInfo, SessionFrame

INPUTS_WAITING_MAX: Final = 64
"""Of one session: a prompt of 2,048 tokens in slices."""


class _Session:
    """`read_tokens`: how many positions have keys; what lies beyond is stale, and masked."""

    def __init__(self, number: int, slot: int, request: StageRequest, draws: StageDraws) -> None:
        self.number = number
        self.slot = slot
        self.request = request
        self.draws = draws
        self.read_tokens = 0
        self.rows_left = request.rows
        self.waiting: collections.deque[tuple[StageInput, int]] = collections.deque()
        self.error = ""


class StageEngine:
    """Serves sessions of layers first..last-1 of one model.

    Nothing is kept for a later session: rows come as states, which say nothing of their tokens.
    """

    def __init__(
        self,
        model: catalogue.KnownModel,
        first: int,
        last: int,
        *,
        slots: int = SLOTS,
        at: Placement = HOST,
    ) -> None:
        """Loads and tests itself: seconds.

        Raises:
            ConfigError: the weights are not on this machine.
            RequestError: the file is damaged, of another kind, or has no such layers.
        """
        torch.set_num_threads(1)
        begun = time.monotonic()
        self.stage = Stage(
            catalogue.weights_path(model), first, last,
            slots=slots, context_tokens=model.context_tokens, at=at,
        )  # fmt: skip
        catalogue.require_same(model, self.stage.sha256)
        same = sameness.probe(
            ProbedStage(self.stage), slots=slots, context_tokens=self.stage.context_tokens
        )
        self._layers = first, last
        self._info = EngineInfo(
            engine="torch",
            model=model.name,
            kernel_class=kernel_class(self.stage.sha256, f"{first}-{last}-{same.digest}", at),
            identical=promise(same, at),
            active_parameters=model.layer_parameters * (last - first),
            context_tokens=self.stage.context_tokens,
            vocabulary=self.stage.shape.vocabulary,
            weights_sha256=self.stage.sha256,
            device=str(at.device),
        )
        self._free_slots = list(range(slots))
        self._sessions: dict[int, _Session] = {}
        self._turn = 0
        self.load_seconds = time.monotonic() - begun

    def info(self) -> EngineInfo:
        return self._info

    def add(self, session: int, request: Any, delivered: Sequence[int]) -> None:
        """A session without a row so far; what a lost stage had read is fed again.

        Raises:
            RequestError: it is for other layers, or its format cannot be taken.
            RefusedError: BUSY, no slot. NOT_OFFERED, no formats here.
        """
        if not isinstance(request, StageRequest) or request.model != self._info.model:
            raise RequestError(f"this engine serves stages of {self._info.model}")
        if (request.first, request.last) != self._layers or delivered:
            raise RequestError(f"this engine has layers {self._layers}, and no earlier rows")
        if session in self._sessions:
            raise RequestError(f"session {session} is running already")
        if shape_of(request).weights_sha256 != self.stage.sha256:
            raise RequestError(f"this engine's {request.model} has other weights")
        if not self._free_slots:
            raise slots_taken()
        draws = StageDraws(request, self._constraint(request))
        self._sessions[session] = _Session(session, self._free_slots.pop(), request, draws)

    def _constraint(self, request: StageRequest) -> constraint.Constraint | None:
        """The first one reads the tokenizer: half a second."""
        if request.format is None or not self.stage.is_last:
            return None
        speaker = tokenizer.of_model(catalogue.known(request.model))
        return constraint.of_format(request.format, speaker, self._info.vocabulary)

    def allow(self, session: int, units: int) -> None:
        """What was fed was allowed: whoever feeds has seen to the pay."""

    def feed(self, session: int, body: bytes) -> None:
        """Queues a `StageInput`; what is wrong with it ends its session. Unknown is no error."""
        fed_to = self._sessions.get(session)
        if fed_to is None or fed_to.error:
            return
        try:
            fed = unpack(StageInput, body)
            rows = rows_of(fed, fed_to.request)
            self._require_next(fed_to, fed, rows)
        except RequestError as error:
            fed_to.error = error.message
        else:
            fed_to.rows_left -= rows
            fed_to.waiting.append((fed, rows))

    def step(self) -> list[SessionFrame]:
        """One batched pass over the next input of every session whose rows fit."""
        plan: list[tuple[_Session, StageInput, int]] = []
        rows_left = ROW_SIZES[-1]
        for session in self._in_turn():
            if session.waiting and not session.error and session.waiting[0][1] <= rows_left:
                fed, rows = session.waiting.popleft()
                rows_left -= rows
                plan.append((session, fed, rows))
        frames = self._try_forward(plan) if plan else []
        for session in [one for one in self._sessions.values() if one.error]:
            frames.append(_frame(session.number, error=session.error))
            self.cancel(session.number)
        return frames

    def cancel(self, session: int) -> None:
        """Frees the slot before the next step; an unknown session is no error."""
        gone = self._sessions.pop(session, None)
        if gone is not None:
            self._free_slots.append(gone.slot)

    def _require_next(self, session: _Session, fed: StageInput, rows: int) -> None:
        """Raises: RequestError: a gap, too many rows, or too many inputs at once."""
        if len(session.waiting) >= INPUTS_WAITING_MAX:
            raise RequestError(f"more than {INPUTS_WAITING_MAX} inputs wait")
        if rows > session.rows_left:
            raise RequestError(f"a session of {session.request.rows} rows has had them")
        last = session.waiting[-1] if session.waiting else None
        end = last[0].position + last[1] if last else session.read_tokens
        if fed.position > end:
            raise RequestError(f"an input for position {fed.position} where {end} was read")

    def _in_turn(self) -> list[_Session]:
        self._turn += 1
        return in_turn(self._sessions.values(), self._turn)

    def _try_forward(self, plan: Sequence[tuple[_Session, StageInput, int]]) -> list[SessionFrame]:
        """A GPU that is full fails the sessions of the pass, and neither the engine nor others."""
        try:
            return self._forward(plan)
        except torch.OutOfMemoryError as error:
            why = no_memory(error)
            for session, _, _ in plan:
                session.error = why
            return []

    def _forward(self, plan: Sequence[tuple[_Session, StageInput, int]]) -> list[SessionFrame]:
        spans: list[Span] = []
        for session, fed, rows in plan:
            ids = fed.token_ids or (0,) * rows
            spans += spans_of(session.slot, fed.position, ids)
            session.read_tokens = fed.position + rows
        states = self.stage.read(spans, None if self.stage.is_first else self._states(plan))
        frames, row = [], 0
        for session, fed, rows in plan:
            own = states[row : row + rows]  # (rows, width)
            row += rows
            frames.append(self._output(session, fed, own))
        return frames

    def _states(self, plan: Sequence[tuple[_Session, StageInput, int]]) -> Tensor:
        width = self.stage.shape.width
        return torch.cat([states_of(fed.states, width) for _, fed, _ in plan])

    def _output(self, session: _Session, fed: StageInput, states: Tensor) -> SessionFrame:
        if not bool(torch.isfinite(states).all()):
            session.error = "the model computed something that is no number"
        if not self.stage.is_last:
            return _frame(session.number, StageOutput(bytes_of(states)))
        if not fed.draws:
            return _frame(session.number, StageOutput())
        lines = on_host(self.stage.logits(states[-fed.draws :]))  # (draws, vocabulary)
        position = fed.position + len(states) - fed.draws + 1 - session.request.prompt_tokens
        try:
            drawn, said = session.draws.draw(lines, position)
        except RequestError as error:
            session.error = error.message
            return _frame(session.number, StageOutput())
        return _frame(session.number, StageOutput(token_ids=drawn, logprobs=said))


def _frame(session: int, output: StageOutput | None = None, *, error: str = "") -> SessionFrame:
    body = pack(output) if output is not None else b""
    finished = "error" if error else ""
    return SessionFrame(session, (), "", 0, finished, error, body=body)
