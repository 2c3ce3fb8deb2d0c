"""`inference.generate`: a language model's answer to a prompt or a conversation.

The daemon loads this file: standard library and msgspec only at the top. `run` builds an engine of
its own, for library use and local jobs; a node serves sessions from a resident engine instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Final, Literal

import msgspec

from aivillage.models.inference import catalogue, grammar, logprobs, remote
from aivillage.models.inference.formats import Format
from aivillage.models.inference.logprobs import ALTERNATIVES_MAX, TokenLogprobs
from aivillage.protocols.errors import JobError, RequestError
from aivillage.protocols.ports import (
    Context,
    Event,
    Machine,
    PartEvent,
    ResultEvent,
    SessionFrame,
    Verdict,
)
from aivillage.protocols.pricing import Usage, token_price
from aivillage.protocols.types import Seconds

PROMPT_BYTES_MAX: Final = 1 << 16
MESSAGES_MAX: Final = 256
TOKENS_MAX: Final = 2_048
VOCABULARY_MAX: Final = 1 << 24
"""Of a model that is not known here."""
STOPS_MAX: Final = 4
STOP_CHARACTERS_MAX: Final = 64
BYTES_PER_QUAD: Final = 4
"""A prompt is priced by quads of its bytes, about one token each: no tokenizer is needed to pay."""

_TOKENS_PER_SECOND_GUESS: Final = 10.0
_QUADS_PER_SECOND_GUESS: Final = 200.0

Text = Annotated[str, msgspec.Meta(max_length=PROMPT_BYTES_MAX)]
Stop = Annotated[str, msgspec.Meta(min_length=1, max_length=STOP_CHARACTERS_MAX)]
FinishReason = Literal["", "length", "stop", "eos"]


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant"] = "user"
    content: Text


class GenerateRequest(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Either `prompt` or `messages`.

    A field that nobody set does not travel: older sellers refuse `format` and `logprobs`.
    """

    prompt: Annotated[Text, msgspec.Meta(description="One user message.")] = ""
    messages: Annotated[
        tuple[ChatMessage, ...],
        msgspec.Meta(max_length=MESSAGES_MAX, description="A conversation, oldest first."),
    ] = ()
    model: Annotated[str, msgspec.Meta(max_length=128, description="Name of the model.")] = (
        catalogue.DEFAULT
    )
    max_tokens: Annotated[
        int, msgspec.Meta(ge=1, le=TOKENS_MAX, description="Most tokens to generate.")
    ] = 128
    temperature: Annotated[
        float, msgspec.Meta(ge=0, le=2, description="0 always takes the likeliest token.")
    ] = 0.0
    top_p: Annotated[
        float, msgspec.Meta(gt=0, le=1, description="Draw from the likeliest tokens of this mass.")
    ] = 1.0
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1, description="Keys every draw.")] = 0
    stop: Annotated[
        tuple[Stop, ...],
        msgspec.Meta(max_length=STOPS_MAX, description="The answer ends before any of these."),
    ] = ()

    format: Annotated[
        Format | None,
        msgspec.Meta(description="What the answer looks like: choice, schema, regex or lark."),
    ] = None
    logprobs: Annotated[
        int,
        msgspec.Meta(
            ge=0,
            le=ALTERNATIVES_MAX,
            description="With each token its log-probability, and so many of the likeliest.",
        ),
    ] = 0

    def __post_init__(self) -> None:
        if self.format is not None and self.stop:
            raise ValueError("an answer in a format ends with it: leave out stop")
        if bool(self.prompt) == bool(self.messages):
            raise ValueError("give either a prompt or messages")
        if not (self.temperature >= 0 and self.top_p > 0):  # NaN passes the schema's bounds
            raise ValueError("temperature and top_p are numbers")
        if prompt_bytes(self) > PROMPT_BYTES_MAX:
            raise ValueError(f"a prompt has at most {PROMPT_BYTES_MAX} bytes")


class GenerateResult(msgspec.Struct, frozen=True, kw_only=True):
    """`token_ids` hold every token drawn, the end token and those of a stop string included.

    In a partial result `prompt_bytes` is how much was read so far and `finish_reason` is empty.
    Where a format was asked for, `text` matches it, unless it ends for `length`: then it is the
    beginning of what does. `logprobs`, one for each token where asked for: log-softmax of the
    model's logits in float32, at temperature 1 and before the format forbids any.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason = ""
    prompt_bytes: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """The body of one `PartEvent`: what one step gave. `read_bytes` counts from the start.

    `fingerprint`: of the tokens since the last one, if its seller sent any. `logprobs`: of
    `token_ids`, as `logprobs.packed` has them, where asked for.
    """

    token_ids: tuple[int, ...]
    text: str
    read_bytes: int
    fingerprint: bytes = b""
    logprobs: bytes = b""


def conversation(request: GenerateRequest) -> tuple[ChatMessage, ...]:
    """The messages of `request`; a bare prompt is one user message."""
    return request.messages or (ChatMessage(content=request.prompt),)


def prompt_bytes(request: GenerateRequest) -> int:
    """UTF-8 bytes of all message contents: what reading the prompt is priced by."""
    return sum(len(message.content.encode()) for message in conversation(request))


def prices_of(active_parameters: int) -> dict[str, int]:
    """The default price of each unit for a model of that size."""
    price = token_price(active_parameters)
    return {"prompt_quads": price, "output_tokens": price}


def require_fits(request: GenerateRequest, context_tokens: int) -> None:
    """Raises: RequestError: TOO_LARGE, more tokens than the model's context holds."""
    if request.max_tokens >= context_tokens:
        raise RequestError(
            f"{request.model} holds {context_tokens} tokens, prompt included",
            code="TOO_LARGE",
            next_step="ask for fewer tokens",
        )


def usage(read_bytes: int, output_tokens: int) -> dict[str, int]:
    """Units of `read_bytes` of prompt and `output_tokens` of answer, for whoever streams."""
    return {"prompt_quads": -(-read_bytes // BYTES_PER_QUAD), "output_tokens": output_tokens}


class Generate:
    """The module behind the name."""

    name = "inference.generate"
    title = "Answer a prompt with a language model"
    positional = "prompt"
    Request = GenerateRequest
    Result = GenerateResult

    def prices_micro_credits(self) -> dict[str, int]:
        """Of the default model."""
        return prices_of(catalogue.MODELS[catalogue.DEFAULT].active_parameters)

    def prices_of(self, active_parameters: int) -> dict[str, int]:
        """As `prices_of`."""
        return prices_of(active_parameters)

    def require_fits(self, request: GenerateRequest, context_tokens: int) -> None:
        """As `require_fits`."""
        require_fits(request, context_tokens)

    def estimate(self, request: GenerateRequest, machine: Machine) -> tuple[Usage, Seconds]:
        """At most this much, whichever model it is; an answer may end earlier.

        The guess of time is for the default model on one slow core: a quote may be beaten.
        A buyer need not know the model: whoever holds it says whether the request fits.

        Raises:
            RequestError: TOO_LARGE, more tokens than the context of a packaged model holds.
            RefusedError: NOT_OFFERED, its format cannot be compiled on this machine.
        """
        del machine
        if request.format is not None and not request.format.choice:
            grammar.require_installed()
        if packaged := catalogue.MODELS.get(request.model):
            require_fits(request, packaged.context_tokens)
        most = usage(prompt_bytes(request), request.max_tokens)
        seconds = most["prompt_quads"] / _QUADS_PER_SECOND_GUESS
        return most, seconds + request.max_tokens / _TOKENS_PER_SECOND_GUESS

    def validate(self, request: GenerateRequest) -> None:
        """What `estimate` cannot tell; in a worker.

        Raises:
            RequestError: the format is wrong, matches nothing, or is too large.
        """
        if request.format is not None:
            grammar.require_compiles(request.format)

    def meter(self, request: GenerateRequest, result: GenerateResult) -> Usage:
        """Of a partial or full result; never looks at the tokens, only counts them."""
        read_bytes = min(result.prompt_bytes, prompt_bytes(request))
        return usage(read_bytes, len(result.token_ids))

    def run(self, request: GenerateRequest, context: Context) -> Iterator[Event]:
        from aivillage.models.inference.engine_choice import shared_engine

        engine = shared_engine(request.model)
        delivered = tuple(
            token
            for body in context.delivered
            for token in msgspec.msgpack.decode(body, type=Piece).token_ids
        )
        engine.add(0, request, delivered)
        engine.allow(0, 2 * (PROMPT_BYTES_MAX + TOKENS_MAX))
        pieces = [msgspec.msgpack.decode(body, type=Piece) for body in context.delivered]
        try:
            while not context.cancelled():
                for frame in engine.step():  # none where it waits for a server
                    if frame.error:
                        raise JobError(frame.error)
                    pieces.append(piece_of(frame))
                    yield PartEvent(body=msgspec.msgpack.encode(pieces[-1]))
                    if frame.finished:
                        result = joined(request, pieces, frame.finished)
                        yield ResultEvent(body=msgspec.msgpack.encode(result))
                        return
        finally:
            engine.cancel(0)

    def check(self, request: GenerateRequest, result: GenerateResult) -> Verdict:
        """Everything that can be told without the weights; reads the tokenizer, not torch.

        Of a model that is not here only what its tokens need not be known for. That an answer is
        in its format is told of every model; that log-probabilities are the model's of none.
        """
        if remote.is_remote(request.model):
            reason = _remote_fault(request, result)
            return Verdict(ok=not reason, reason=reason)
        model = catalogue.find(request.model)
        reason = _count_fault(request, result, model)
        said = result.text.encode()
        if not reason and model is not None and catalogue.is_here(model):
            from aivillage.models.inference import tokenizer

            token_bytes = tokenizer.of_model(model).token_bytes
            said = b"".join(map(token_bytes, result.token_ids))
            reason = _text_fault(request, result, token_bytes)
        reason = reason or _format_fault(request, result, said)
        return Verdict(ok=not reason, reason=reason)


def piece_of(frame: SessionFrame) -> Piece:
    """What a step of this node's own engine gave."""
    return Piece(frame.token_ids, frame.text, frame.read_bytes, logprobs=frame.logprobs)


def joined(request: GenerateRequest, pieces: Sequence[Piece], finished: str) -> GenerateResult:
    """The result of an answer in pieces.

    Raises:
        RequestError: their log-probabilities are of another number of tokens.
    """
    ids = tuple(token for piece in pieces for token in piece.token_ids)
    said = b"".join(piece.logprobs for piece in pieces)
    return GenerateResult(
        text="".join(piece.text for piece in pieces),
        token_ids=ids,
        finish_reason=msgspec.convert(finished, FinishReason),
        prompt_bytes=pieces[-1].read_bytes,
        logprobs=logprobs.read(said, len(ids), request.logprobs),
    )


def _remote_fault(request: GenerateRequest, result: GenerateResult) -> str:
    """What is wrong with an answer of a remote model: all can be told, whoever looks."""
    fault = _count_fault(request, result, None) or remote.fault_of(result.token_ids)
    if fault:
        return fault
    if not _ends_as_said(result, frozenset({remote.END_TOKEN_ID})):
        return "the end token and the finish reason do not agree"
    return _text_fault(request, result, remote.token_bytes)


def _count_fault(
    request: GenerateRequest, result: GenerateResult, model: catalogue.KnownModel | None
) -> str:
    """What is wrong with ids and counts; empty: nothing."""
    count = len(result.token_ids)
    vocabulary = model.vocabulary if model else VOCABULARY_MAX
    if not all(0 <= token < vocabulary for token in result.token_ids):
        return "a token id is outside the vocabulary"
    if not 1 <= count <= request.max_tokens:
        return f"{count} tokens where 1 to {request.max_tokens} were asked for"
    if not result.finish_reason:
        return "not finished"
    if model and not _ends_as_said(result, model.end_token_ids):
        return "the end token and the finish reason do not agree"
    is_short = count != request.max_tokens and not remote.is_remote(request.model)
    if result.finish_reason == "length" and is_short:  # a remote model counts tokens of its own
        return "finished for length before the last token"
    if result.prompt_bytes != prompt_bytes(request):
        return "the prompt has another number of bytes"
    return logprobs.fault(result.logprobs, result.token_ids, request.logprobs, vocabulary)


def _ends_as_said(result: GenerateResult, end_token_ids: frozenset[int]) -> bool:
    ended = result.token_ids[-1] in end_token_ids
    early = any(token in end_token_ids for token in result.token_ids[:-1])
    return not early and ended == (result.finish_reason == "eos")


def _text_fault(
    request: GenerateRequest, result: GenerateResult, token_bytes: Callable[[int], bytes]
) -> str:
    """What is wrong with the text, told by saying the tokens again."""
    from aivillage.models.inference.text_stream import TextStream

    stream = TextStream(token_bytes, request.stop)
    text = ""
    for index, token in enumerate(result.token_ids):
        text += stream.push(token)
        if stream.stopped and index + 1 < len(result.token_ids):
            return "tokens after a stop string"
    if stream.stopped != (result.finish_reason == "stop"):
        return "the stop strings and the finish reason do not agree"
    return "" if text + stream.flush() == result.text else "the text is not what the tokens say"


def _format_fault(request: GenerateRequest, result: GenerateResult, said: bytes) -> str:
    """Why `said` is not in its format; where the answer was cut, only what is there is held."""
    if request.format is None:
        return ""
    whole = result.finish_reason != "length"
    broken = "\ufffd".encode()
    while not whole and said.endswith(broken):  # what is cut may end inside a character
        said = said.removesuffix(broken)
    return grammar.fault(request.format, said, whole=whole)


MODULE: Final = Generate()
