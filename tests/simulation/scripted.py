"""Workers without processes: an engine whose every token is a hash, honest or not, as scripted."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import trio

from aivillage.models.inference import catalogue, vectors
from aivillage.models.inference.embed import MODULE as EMBED
from aivillage.models.inference.embed import EmbedRequest, EmbedResult, Encoded
from aivillage.models.inference.fingerprint import SPAN_TOKENS_MAX, Fingerprint, in_order, packed
from aivillage.models.inference.generate import (
    BYTES_PER_QUAD,
    GenerateRequest,
    GenerateResult,
    _count_fault,
    prompt_bytes,
)
from aivillage.models.inference.logprobs import TokenLogprobs, packed_all
from aivillage.models.mesh.noop import NoopRequest, NoopResult
from aivillage.node.workers import Workers, WorkerSettings
from aivillage.protocols.codec import unpack
from aivillage.protocols.errors import AivillageError, JobError
from aivillage.protocols.ports import (
    EngineInfo,
    Event,
    PartEvent,
    ResultEvent,
    SessionFrame,
    Verdict,
)
from aivillage.protocols.rechecking import Claim, Deviation, Finding, OddDraw

TEXT = "the mesh is made of many machines that lend each other what they have"
WORDS = tuple(TEXT.split())
SLICE_QUADS = 32
INFO = EngineInfo(
    engine="scripted", model="hash", kernel_class="scripted/1", identical="guaranteed",
    active_parameters=1, context_tokens=2048, vocabulary=49_152, weights_sha256="",
)  # fmt: skip


def token(request: GenerateRequest, number: int, key: str = "") -> int:
    """Token `number` of the answer; another key gives another model."""
    named = f"{key}|{request.prompt}|{request.seed}|{number}".encode()
    return 3 + int.from_bytes(hashlib.sha256(named).digest()[:4], "big") % 40_000


def word(number: int) -> str:
    return WORDS[number % len(WORDS)] + " "


def likely(made: int, count: int) -> TokenLogprobs:
    """The log-probabilities of a token that was the likeliest."""
    ids, values = range(made, made + count), (-1.0 - n for n in range(count))
    return TokenLogprobs(-1.0, tuple(ids), tuple(values))


def answer(request: GenerateRequest, key: str = "") -> GenerateResult:
    """What an honest engine says."""
    ids = tuple(token(request, n, key) for n in range(request.max_tokens))
    return GenerateResult(
        text="".join(map(word, ids)),
        token_ids=ids,
        finish_reason="length",
        prompt_bytes=prompt_bytes(request),
        logprobs=tuple(likely(n, request.logprobs) for n in ids if request.logprobs),
    )


def vector_of(text: str) -> bytes:
    """As long as the default model's, and of unit length."""
    places = catalogue.MODELS[catalogue.EMBEDDER].width
    seed = int.from_bytes(text.encode()[:8], "big")
    numbers = [(seed * (n + 1)) % 97 - 48 for n in range(places)]
    length = sum(n * n for n in numbers) ** 0.5
    return vectors.packed(n / length for n in numbers)


class Fake(NamedTuple):
    """Another answer than the engine's."""

    token_ids: tuple[int, ...]
    finish_reason: str = "length"
    words: Callable[[int], str] = word


@dataclass
class Script:
    """How one node's engine behaves; a test may change it at any time."""

    key: str = ""
    step_seconds: float = 0.0
    die_after: int | None = None
    """The engine fails once it has made this many tokens."""
    pause_at: int | None = None
    """It stops before this token until `go` is set; `paused` says that it got there."""
    extra_tokens: int = 0
    cheat: Callable[[GenerateRequest], Fake | None] = lambda _request: None
    """What it says instead of the answer to a request, if anything."""
    kernel_class: str = "scripted/1"
    identical: str = "guaranteed"
    rechecks: bool = False
    """Its engine looks at answers of others in one pass."""
    rechecked: int = 0
    blur: float = 0.0
    """Its states are off by so much of themselves: another precision."""
    mark: Callable[[bytes], bytes] = bytes
    """What it sends for a fingerprint."""
    likelihood: Callable[[bytes], bytes] = bytes
    """What it sends for a token's log-probabilities."""
    is_check_cheap: bool = False
    """Its check looks at what the product's looks at, and at no model."""
    vector: Callable[[int, bytes], bytes] = lambda _place, value: value
    """What it says for the vector of the text at a place."""
    embedded: Callable[[EmbedResult], EmbedResult] = lambda result: result
    """What it says in the end."""
    load_failure: AivillageError | None = None
    check_failures: list[AivillageError] = field(default_factory=list)
    check_gate: trio.Event | None = None
    words_gate: trio.Event | None = None
    """Until it is set, the driver of a split answer says nothing of what was drawn."""
    checking: trio.Event = field(default_factory=trio.Event)
    paused: trio.Event = field(default_factory=trio.Event)
    go: trio.Event = field(default_factory=trio.Event)
    made: int = 0
    """Tokens computed on this node, over all sessions."""
    open_sessions: int = 0
    scopes: list[bytes] = field(default_factory=list)


class ScriptedSession:
    """One answer; follows its allowance as the real engine does."""

    def __init__(self, script: Script, request: GenerateRequest, delivered: Sequence[int]) -> None:
        self._script = script
        self._request = request
        self._fake = script.cheat(request)
        self._count = self._marked = len(delivered)
        self._values: list[float] = []
        self._quads = -(-prompt_bytes(request) // BYTES_PER_QUAD)
        self._read_quads = 0
        self._reported = self._quads if delivered else 0
        self._allowed = 0
        self._more = trio.Event()
        self._ended = False

    def allow(self, units: int) -> None:
        self._allowed = max(self._allowed, units)
        self._more.set()
        self._more = trio.Event()

    def __aiter__(self) -> ScriptedSession:
        return self

    async def __anext__(self) -> SessionFrame:
        if self._ended:
            raise StopAsyncIteration
        await trio.sleep(self._script.step_seconds)
        while self._read_quads < self._quads:
            while self._allowed <= self._read_quads:
                await self._more.wait()
            self._read_quads = min(self._quads, self._read_quads + SLICE_QUADS, self._allowed)
            if self._read_quads > self._reported:
                self._reported = self._read_quads
                return self._frame((), "")
        if self._fake is not None:
            return await self._next_fake(self._fake)
        last = self._request.max_tokens + self._script.extra_tokens
        if self._count >= last:
            return self._frame((), "length")
        return await self._next_token(last)

    async def _next_token(self, last: int) -> SessionFrame:
        script = self._script
        while self._allowed < self._quads + self._count + 1:
            await self._more.wait()
        if script.pause_at == self._count:
            script.paused.set()
            await script.go.wait()
        if script.die_after is not None and self._count >= script.die_after:
            raise JobError("the engine died", code="JOB_FAILED")
        made = token(self._request, self._count, script.key)
        self._count += 1
        script.made += 1
        return self._frame((made,), "length" if self._count == last else "")

    async def _next_fake(self, fake: Fake) -> SessionFrame:
        while self._allowed < self._quads + self._count + 1:
            await self._more.wait()
        made = fake.token_ids[self._count]
        self._count += 1
        finished = fake.finish_reason if self._count == len(fake.token_ids) else ""
        return self._frame((made,), finished, fake.words)

    def _frame(
        self, ids: tuple[int, ...], finished: str, words: Callable[[int], str] = word
    ) -> SessionFrame:
        self._ended = bool(finished)
        read = min(prompt_bytes(self._request), self._reported * BYTES_PER_QUAD)
        self._values += [float(made) * (1 + self._script.blur) for made in ids]
        mark = b""
        if self._values and (finished or len(self._values) == SPAN_TOKENS_MAX):
            mark = self._script.mark(packed(Fingerprint(self._marked, tuple(self._values))))
            self._marked, self._values = self._count, []
        text = "".join(map(words, ids))
        count = self._request.logprobs
        said = b"".join(self._script.likelihood(packed_all([likely(n, count)])) for n in ids)
        return SessionFrame(
            1, ids, text, read, finished, fingerprint=mark, logprobs=said if count else b""
        )


class ScriptedEngine:
    """Stands where an `EngineClient` would."""

    is_full = False

    def __init__(self, script: Script) -> None:
        self._script = script
        self.info = msgspec.structs.replace(
            INFO,
            kernel_class=script.kernel_class,
            identical=script.identical,
            rechecks=script.rechecks,
        )

    async def recheck(self, request: bytes, claim: Claim) -> Finding:
        """Its states are its tokens: what the product's engine finds, without a model."""
        asked, script = unpack(GenerateRequest, request), self._script
        if script.die_after is not None:
            raise JobError("the engine died", code="JOB_FAILED")
        script.rechecked += 1
        right = [token(asked, n, script.key) for n in range(len(claim.token_ids))]
        odd = [n for n, made in enumerate(claim.token_ids) if made != right[n]]
        spans = [
            Deviation(
                span.first,
                len(span.values),
                max(abs(v / right[n] - 1) for n, v in enumerate(span.values, span.first)),
            )
            for span in in_order(claim.fingerprints, len(right))
        ]
        return Finding(len(right), tuple(OddDraw(n, near=False) for n in odd), tuple(spans))

    @asynccontextmanager
    async def open_session(
        self, request: bytes, delivered: Sequence[int] = (), scope: bytes = b""
    ) -> AsyncIterator[ScriptedSession]:
        self._script.scopes.append(scope)
        self._script.open_sessions += 1
        try:
            yield ScriptedSession(self._script, unpack(GenerateRequest, request), delivered)
        finally:
            self._script.open_sessions -= 1


def _cheap_fault(request: GenerateRequest, result: GenerateResult) -> str:
    """The product's own look at ids and counts, and the text said again in our words."""
    reason = _count_fault(request, result, catalogue.known(request.model))
    spoken = "".join(map(word, result.token_ids))
    return reason or ("" if result.text == spoken else "another text")


class ScriptedWorkers(Workers):
    """The real description, estimate and meter; `check`, `run` and `engine` without a process."""

    def __init__(
        self,
        nursery: trio.Nursery,
        folder: Path,
        script: Script,
        settings: WorkerSettings | None = None,
    ) -> None:
        super().__init__(nursery, settings or WorkerSettings(), folder)
        self.script = script
        self.shelf.is_here = lambda _model: True  # whether or not its package is installed

    async def check(self, operation: str, request: bytes, result: bytes) -> Verdict:
        """The whole answer, compared token by token and letter by letter."""
        self.script.checking.set()
        if self.script.check_gate is not None:
            await self.script.check_gate.wait()
        await trio.lowlevel.checkpoint()
        if self.script.check_failures:
            raise self.script.check_failures.pop(0)
        if operation == "inference.embed":
            return EMBED.check(unpack(EmbedRequest, request), unpack(EmbedResult, result))
        if operation == "mesh.noop":
            asked, got = unpack(NoopRequest, request), unpack(NoopResult, result)
            same = got == NoopResult(note=asked.note, parts=asked.parts)
        elif self.script.is_check_cheap:
            reason = _cheap_fault(unpack(GenerateRequest, request), unpack(GenerateResult, result))
            return Verdict(ok=not reason, reason=reason)
        else:
            same = unpack(GenerateResult, result) == answer(unpack(GenerateRequest, request))
        return Verdict(ok=same, reason="" if same else "not the answer")

    def places_of(self, kind: str) -> int:
        """No engine of ours is ever full."""
        return 256

    async def engine(self, operation_or_model: str) -> Any:
        await trio.lowlevel.checkpoint()
        if self.script.load_failure is not None:
            raise self.script.load_failure
        return ScriptedEngine(self.script)

    @asynccontextmanager
    async def run(  # type: ignore[override]
        self, operation: str, request: bytes, *, delivered: Sequence[bytes] = (), **_: Any
    ) -> AsyncIterator[AsyncIterator[Event]]:
        self.describe(operation)
        self.script.open_sessions += 1
        try:
            if operation == "inference.embed":
                work = self._embed(unpack(EmbedRequest, request), delivered)
            else:
                work = self._noop(unpack(NoopRequest, request), len(delivered))
            async with aclosing(work) as events:
                yield events
        finally:
            self.script.open_sessions -= 1

    async def _embed(
        self, request: EmbedRequest, delivered: Sequence[bytes]
    ) -> AsyncGenerator[Event, None]:
        """A part for each text, goes on from what was delivered, and sends all of it at the end."""
        parts = [unpack(Encoded, body) for body in delivered]
        for place in range(len(parts), len(request.text)):
            if self.script.pause_at == place:
                self.script.paused.set()
                await self.script.go.wait()
            if self.script.die_after == place:
                raise JobError("the worker died", code="JOB_FAILED")
            value = self.script.vector(place, vector_of(request.text[place]))
            self.script.made += 1
            parts.append(Encoded((value,), ()))
            yield PartEvent(body=msgspec.msgpack.encode(parts[-1]))
        result = EmbedResult(
            model=request.model,
            weights_sha256=catalogue.known(request.model).sha256,
            kernel_class=self.script.kernel_class,
            dimension=len(vector_of("")) // vectors.FLOAT_BYTES,
            vectors=tuple(value for part in parts for value in part.values),
        )
        yield ResultEvent(body=msgspec.msgpack.encode(self.script.embedded(result)))

    async def _noop(self, request: NoopRequest, first: int) -> AsyncGenerator[Event, None]:
        for part in range(first, request.parts):
            if self.script.pause_at == part:
                self.script.paused.set()
                await self.script.go.wait()
            await trio.sleep(request.sleep_seconds / request.parts)
            yield PartEvent(body=msgspec.msgpack.encode(part))
        result = NoopResult(note=self.script.key + request.note, parts=request.parts)
        yield ResultEvent(body=msgspec.msgpack.encode(result))
