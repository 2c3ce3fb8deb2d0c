"""`inference.stage`: some layers of a language model, for an answer that others compute with us.

A session: states (or token ids, at the first layer) come in and states (or tokens, at the last
one) go out, input by input, as long as the session lasts. The daemon loads this file: standard
library and msgspec only at the top.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Annotated, Final

import msgspec

from aivillage.models.inference import catalogue
from aivillage.models.inference.catalogue import KnownModel
from aivillage.models.inference.formats import Format
from aivillage.models.inference.logprobs import ALTERNATIVES_MAX, token_size
from aivillage.models.library.layers import WIDTH_MAX, packing_bytes
from aivillage.models.library.manifest import Sha256
from aivillage.protocols.errors import JobError, RequestError
from aivillage.protocols.ports import Context, Event, Machine, Verdict
from aivillage.protocols.pricing import Usage, token_price
from aivillage.protocols.types import U32, Seconds

OPERATION: Final = "inference.stage"
INPUT_ROWS_MAX: Final = 32
"""Of one input: a slice of a prompt, or a token and its drafts; 73 KB of states in our model."""
ROWS_MAX: Final = 1 << 16
"""Of one session: the context many times over, since rejected drafts are read too."""
DRAWN_MAX: Final = 2_048
"""Tokens: what an answer may have."""
STATE_BYTES: Final = 4
"""Float32 on the wire: halving it would give other bits than an unsplit model."""
RUNTIME_BYTES: Final = 400 << 20
"""What a worker needs beside weights: torch itself, and matrices while they are packed."""
CONTEXT_BYTES_INCLUDED: Final = 100_000_000
"""Of keys and values, in the above: the packaged model's 94 MB are."""
_LAYER_ROWS_PER_SECOND_GUESS: Final = 300.0

Layer = Annotated[int, msgspec.Meta(ge=0, le=1024)]


class StageShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model as both sides must have it, its weights by their hash."""

    weights_sha256: Sha256
    layers: Layer
    width: Annotated[int, msgspec.Meta(ge=1, le=WIDTH_MAX)]
    vocabulary: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    context_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


class StageRequest(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Layers first..last-1. What follows `rows` says how the last layers' stage draws tokens.

    A field that nobody set does not travel: older sellers refuse those from `format` on. A model
    that somebody pulled is said with its `shape`, the packaged one without.
    """

    first: Layer
    last: Layer
    model: Annotated[str, msgspec.Meta(max_length=128, description="Name of the model.")] = (
        catalogue.DEFAULT
    )
    rows: Annotated[
        int, msgspec.Meta(ge=1, le=ROWS_MAX, description="Most rows that will be read in all.")
    ] = 4096
    prompt_tokens: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 0
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] = 0.0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    format: Format | None = None
    drawn: Annotated[tuple[U32, ...], msgspec.Meta(max_length=DRAWN_MAX)] = ()
    """The answer so far, for a stand-in that has to go on in its format."""
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=ALTERNATIVES_MAX)] = 0
    ahead: Annotated[
        bool, msgspec.Meta(description="Load the layers, for when a stage is lost, and no more.")
    ] = False
    shape: StageShape | None = None

    def __post_init__(self) -> None:
        if not self.first < self.last:
            raise ValueError("a stage has at least one layer")
        if not (self.temperature >= 0 and self.top_p > 0):  # NaN passes the schema's bounds
            raise ValueError("temperature and top_p are numbers")


class StageInput(msgspec.Struct, frozen=True, array_like=True):
    """Rows for `position`, `position + 1`, ...: `token_ids` at the first layer, else `states`.

    `position` may lie before what was read: the rest is forgotten, as after a rejected draft. A
    token is drawn for each of the last `draws` rows, at the last layer only.
    """

    position: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
    token_ids: Annotated[tuple[U32, ...], msgspec.Meta(max_length=INPUT_ROWS_MAX)] = ()
    states: bytes = b""
    """(rows, width), float32, little endian."""
    draws: Annotated[int, msgspec.Meta(ge=0, le=INPUT_ROWS_MAX)] = 0


class StageOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one input gave: the states of all its rows, or the tokens that were drawn."""

    states: bytes = b""
    token_ids: tuple[U32, ...] = ()
    logprobs: bytes = b""


class StageResult(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a session: what was computed in it."""

    layer_tokens: int = 0
    head_tokens: int = 0


def shape_of(request: StageRequest) -> StageShape:
    """Raises: RequestError: it says no shape of a model that was pulled, or no such layers."""
    shape = request.shape
    if shape is None:
        if request.model != catalogue.DEFAULT:
            raise RequestError(f"a stage of {request.model} says what that model is like")
        shape = PACKAGED
    if request.last > shape.layers:
        raise RequestError(f"{request.model} has {shape.layers} layers")
    return shape


def shape_said(model: KnownModel) -> StageShape | None:
    """What a request for layers of `model` says of it; of the packaged one nothing."""
    return None if model.name == catalogue.DEFAULT else shape_of_model(model)


def shape_of_model(model: KnownModel) -> StageShape:
    return StageShape(
        weights_sha256=model.sha256,
        layers=model.layers,
        width=model.width,
        vocabulary=model.vocabulary,
        context_tokens=model.context_tokens,
    )


PACKAGED: Final = shape_of_model(catalogue.MODELS[catalogue.DEFAULT])


def rows_of(fed: StageInput, request: StageRequest) -> int:
    """How many rows an input has.

    Raises:
        RequestError: it does not fit its session.
    """
    shape = shape_of(request)
    row_bytes = STATE_BYTES * shape.width
    rows = len(fed.token_ids) if request.first == 0 else len(fed.states) // row_bytes
    other = fed.states if request.first == 0 else fed.token_ids
    if other or len(fed.states) % row_bytes or not 1 <= rows <= INPUT_ROWS_MAX:
        raise RequestError(f"an input has 1 to {INPUT_ROWS_MAX} rows of its stage's kind")
    if any(token >= shape.vocabulary for token in fed.token_ids):
        raise RequestError("a token id is outside the vocabulary")
    if fed.draws > (rows if request.last == shape.layers else 0):
        raise RequestError("tokens are drawn at the last layer, one for a row at most")
    if fed.position + rows > shape.context_tokens:
        raise RequestError(f"{request.model} holds {shape.context_tokens} tokens", code="TOO_LARGE")
    return rows


def output_fault(out: StageOutput, rows: int, draws: int, request: StageRequest) -> str:
    """Why `out` cannot be what an input of so many rows gives; empty: it can."""
    shape = shape_of(request)
    is_last = request.last == shape.layers
    if len(out.token_ids) != draws or any(token >= shape.vocabulary for token in out.token_ids):
        return "it drew other tokens than it was asked for"
    if len(out.logprobs) != draws * token_size(request.logprobs):
        return "its log-probabilities are of another number of tokens"
    if len(out.states) != (0 if is_last else STATE_BYTES * shape.width * rows):
        return "its states are not those of the rows that it got"
    return ""


def input_hash8(fed: StageInput) -> bytes:
    """What a stage was handed, in 8 bytes: its buyer holds it against what it was shown."""
    head = fed.position.to_bytes(4, "big") + fed.draws.to_bytes(2, "big")
    return hashlib.sha256(head + fed.states).digest()[:8]


def units(layer_tokens: int, head_tokens: int) -> dict[str, int]:
    """Usage; both sides count it from the inputs: rows x layers, and tokens drawn."""
    return {"layer_tokens": layer_tokens, "head_tokens": head_tokens}


def used_by(rows: int, draws: int, request: StageRequest) -> tuple[int, int]:
    """Layer tokens and head tokens of one input."""
    return rows * (request.last - request.first), draws


def memory_bytes(model: KnownModel, first: int, last: int) -> int:
    """What a worker needs to hold these layers: about as measured, rather more."""
    ends = (first == 0) + (last == model.layers)
    return fixed_bytes(model) + layer_bytes(model) * (last - first) + end_bytes(model) * ends


def fixed_bytes(model: KnownModel) -> int:
    """Of any stage of it."""
    return RUNTIME_BYTES + packing_bytes(model.layer_parameters, model.head_parameters)


def layer_bytes(model: KnownModel) -> int:
    """Of one layer: its weights, and what one full context takes beyond a small one."""
    keys_and_values = max(0, model.context_bytes - CONTEXT_BYTES_INCLUDED) // max(1, model.layers)
    return STATE_BYTES * model.layer_parameters + keys_and_values


def end_bytes(model: KnownModel) -> int:
    """Of the table of words at the first stage, of the head at the last."""
    return STATE_BYTES * model.head_parameters


def prices_of(model: KnownModel) -> dict[str, int]:
    """Of a layer for one row, and of the head for one token: 2 operations for each weight."""
    return units(token_price(model.layer_parameters), token_price(model.head_parameters))


class Stage:
    """The module behind the name. Its sessions are served by a resident engine, and only so."""

    name = OPERATION
    title = "Compute some layers of a language model for a split answer"
    positional = "first"
    Request = StageRequest
    Result = StageResult

    def prices_micro_credits(self) -> dict[str, int]:
        return prices_of(catalogue.MODELS[catalogue.DEFAULT])

    def estimate(self, request: StageRequest, machine: Machine) -> tuple[Usage, Seconds]:
        """At most this much: every row of the session, each of them drawn.

        Raises:
            RequestError: no such model or layers.
        """
        del machine
        is_last = request.last == shape_of(request).layers
        most = units(*used_by(request.rows, request.rows if is_last else 0, request))
        return most, most["layer_tokens"] / _LAYER_ROWS_PER_SECOND_GUESS

    def meter(self, request: StageRequest, result: StageResult) -> Usage:
        del request
        return units(result.layer_tokens, result.head_tokens)

    def run(self, request: StageRequest, context: Context) -> Iterator[Event]:
        """Raises: JobError: it is no job of its own."""
        del request, context
        raise JobError(
            "a stage is part of an answer", next_step="submit inference.generate: it is split"
        )

    def check(self, request: StageRequest, result: StageResult) -> Verdict:
        ok = 0 <= result.layer_tokens <= request.rows * (request.last - request.first)
        return Verdict(ok=ok, reason="" if ok else "more rows than the session may have")


MODULE: Final = Stage()
