"""Stages without weights: every layer folds what it reads into what it read before.

So a row is right only where each layer was fed every earlier row, in order and once: a stand-in
that reads too little, or a guess that is not taken back, changes all that follows.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio

from aivillage.models.inference import catalogue, stages
from aivillage.models.inference.generate import GenerateRequest, GenerateResult, conversation
from aivillage.models.inference.split import Draws, SplitAnswer
from aivillage.models.inference.stages import StageInput, StageOutput, StageRequest
from aivillage.models.inference.tokenizer import Prompt
from aivillage.models.worker_messages import Load
from aivillage.node.parts import Parts
from aivillage.node.workers import WorkerSettings
from aivillage.protocols.codec import pack, unpack
from aivillage.protocols.errors import JobError
from aivillage.protocols.ports import EngineInfo, SessionFrame, Verdict
from tests.simulation.scripted import INFO, Script, ScriptedWorkers, word

MODEL = catalogue.known(catalogue.DEFAULT)
COPIES = 4 * MODEL.width // 32
KINDS_OF_TOKENS = 4
"""So few that something is always guessed, and mostly wrong."""


class Words:
    """A tokenizer: every byte of the prompt is a token."""

    end_token_ids = MODEL.end_token_ids

    def token_bytes(self, token: int) -> bytes:
        return word(token).encode()

    def prompt(self, messages: Sequence[Any]) -> Prompt:
        body = "".join(message.content for message in messages).encode()
        return Prompt(tuple(3 + byte for byte in body), tuple(range(1, len(body) + 1)))


class Computing:
    """A stage's session: `keys[layer][position]`."""

    def __init__(self, request: StageRequest) -> None:
        self.request = request
        self.keys: dict[int, list[bytes]] = {n: [] for n in range(request.first, request.last)}

    def output(self, fed: StageInput) -> StageOutput:
        rows = [b"%d" % token for token in fed.token_ids]
        size = 4 * MODEL.width
        rows = rows or [fed.states[at : at + 32] for at in range(0, len(fed.states), size)]
        for layer, keys in self.keys.items():
            assert fed.position <= len(keys), "a gap"
            del keys[fed.position :]
            for n, row in enumerate(rows):
                before = keys[-1] if keys else b""
                rows[n] = hashlib.sha256(before + row + b"%d" % layer).digest()
                keys.append(rows[n])
        if self.request.last < MODEL.layers:
            return StageOutput(b"".join(row * COPIES for row in rows))
        drawn = rows[len(rows) - fed.draws :]
        return StageOutput(token_ids=tuple(3 + row[0] % KINDS_OF_TOKENS for row in drawn))


class StageSession:
    """Stands where an `EngineSession` would."""

    def __init__(self, script: Script, request: StageRequest) -> None:
        self._script = script
        self._computing = Computing(request)
        self._fed: list[StageInput] = []

    def feed(self, body: bytes) -> None:
        self._fed.append(unpack(StageInput, body))

    async def __anext__(self) -> SessionFrame:
        script = self._script
        await trio.sleep(script.step_seconds)
        if script.pause_at == script.made:
            script.paused.set()
            await script.go.wait()
        if script.die_after is not None and script.made >= script.die_after:
            raise JobError("the engine died", code="JOB_FAILED")
        script.made += 1
        output = self._computing.output(self._fed.pop(0))
        return SessionFrame(1, (), "", 0, body=pack(output))


class Resident:
    """Stands where an `EngineClient` would."""

    is_full = False

    def __init__(self, script: Script, info: EngineInfo, session: Any) -> None:
        self.info = info
        self.dead = False
        self.session_count = 0
        self._script = script
        self._session = session

    @asynccontextmanager
    async def open_session(self, request: bytes) -> AsyncIterator[Any]:
        self._script.open_sessions += 1
        self.session_count += 1
        try:
            yield self._session(request)
        finally:
            self._script.open_sessions -= 1
            self.session_count -= 1

    def idle_seconds(self) -> float:
        return 0.0

    async def put_away(self) -> None:
        self.dead = True
        await trio.lowlevel.checkpoint()

    stop = put_away


class DriverSession:
    """The product's driver with words of ours; `script.words_gate` holds it up."""

    def __init__(self, request: bytes, script: Script) -> None:
        words: Any = Words()
        self._script = script
        self._answer = SplitAnswer(unpack(GenerateRequest, request), words)
        self._frame = SessionFrame(1, (), "", 0, body=pack(self._answer.begun()))

    def feed(self, body: bytes) -> None:
        self._frame = self._answer.say(unpack(Draws, body).token_ids)

    async def __anext__(self) -> SessionFrame:
        await trio.lowlevel.checkpoint()
        if self._frame.token_ids and self._script.words_gate is not None:
            await self._script.words_gate.wait()
        return self._frame


class ScriptedParts(Parts):
    """The product's room for parts of models; what is loaded there has no process."""

    script: Script

    def loaded(self) -> set[tuple[int, int]]:
        return {load.layers for load in self._alive()}

    async def _load(self, load: Load) -> Any:
        await trio.lowlevel.checkpoint()
        if load.part == "driver":
            return Resident(self.script, INFO, lambda body: DriverSession(body, self.script))
        first, last = load.layers
        kernel = f"{self.script.kernel_class}/{first}-{last}{self.script.key}"
        return Resident(
            self.script,
            msgspec.structs.replace(INFO, kernel_class=kernel),
            lambda body: StageSession(self.script, unpack(StageRequest, body)),
        )


class StageWorkers(ScriptedWorkers):
    """Stages and drivers of split answers, and the check of them."""

    def __init__(
        self,
        nursery: trio.Nursery,
        folder: Path,
        script: Script,
        settings: WorkerSettings | None = None,
    ) -> None:
        super().__init__(nursery, folder, script, settings)
        limit = self._settings.limits.memory_bytes_max
        self._parts = self.parts = ScriptedParts(nursery, self._start_engine, limit)
        self.parts.script = script

    async def check(self, operation: str, request: bytes, result: bytes) -> Verdict:
        if operation != "inference.generate":
            return await super().check(operation, request, result)
        same = unpack(GenerateResult, result) == expected(unpack(GenerateRequest, request))
        return Verdict(ok=same, reason="" if same else "not the answer")


def expected(request: GenerateRequest) -> GenerateResult:
    """The answer of the whole model, one token at a time."""
    prompt = Words().prompt(conversation(request)).token_ids
    whole = Computing(StageRequest(first=0, last=MODEL.layers))
    ids: list[int] = []
    at = 0
    unread = prompt
    text, finished = "", "length"
    while len(ids) < request.max_tokens and finished == "length":
        (token,) = whole.output(StageInput(at, tuple(unread), b"", 1)).token_ids
        at += len(unread)
        ids.append(token)
        unread = (token,)
        text += word(token)
        for stop in request.stop:
            if stop in text:
                text, finished = text[: text.index(stop)], "stop"
    return GenerateResult(
        text=text,
        token_ids=tuple(ids),
        finish_reason=finished,
        prompt_bytes=len(prompt),
    )


def worth(rows: int, drawn: int) -> int:
    """Of so many rows through all layers."""
    prices = stages.MODULE.prices_micro_credits()
    return rows * MODEL.layers * prices["layer_tokens"] + drawn * prices["head_tokens"]
