"""Every message between peers, and between a control socket and its daemon.

One tagged union of frozen maps (unknown optional fields pass, so 1.0 talks to 1.1), and one hot
frame, `Step`, that is an array. `id` multiplexes: it names a call on this stream, chosen by
whoever opened it. Decode once at the edge (`codec.py`); past it there are no dicts.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, TypeAlias

import msgspec

from aivillage.protocols.envelope import ENVELOPE_BYTES_MAX
from aivillage.protocols.job import Fingerprint
from aivillage.protocols.manifest import CHUNKS_MAX, HASH_BYTES, BlobName
from aivillage.protocols.passing import Passing, Ticket
from aivillage.protocols.pricing import UNITS_MAX, ModelPrices, Models, Terms
from aivillage.protocols.types import (
    U32,
    Address,
    Addresses,
    Amount,
    Count,
    InputBody,
    KernelName,
    Measure,
    MicroCredits,
    Name,
    Net,
    PeerId,
)
from aivillage.protocols.vouchers import BLOB_BYTES_MAX, Lane

JOB_PROTOCOL: Final = "/aivillage/job/1"
VERSION_MAJOR: Final = 1
VERSION_MINOR: Final = 4
CALLS_PER_PAIR_MAX: Final = 256
CERTIFICATES_MAX: Final = 8
SUCCESSIONS_MAX: Final = 4
"""Changes of key that a hello proves: a peer that missed more of them meets a stranger."""
GRANTS_MAX: Final = 4
"""In a hello: each costs a signature's check."""
PAIR_LANES_MAX: Final = 8192
"""Either way in one view: ten boots a day for two years, and 610 KB at most."""
HAVE_BYTES: Final = 14
"""Of one offer that an asker has: 8 of its seller's hash, 6 of the unix ms when it ends."""
HAVE_MAX: Final = 1024
"""In one question: eight times what a view holds, and 14 KB."""
OFFERS_PER_ANSWER_MAX: Final = 32
"""Each costs a signature's check, and the loop waits for all: 3 ms."""
LOGPROBS_BYTES_MAX: Final = 1 << 16
"""Of one step's tokens: 164 bytes a token with 20 alternatives."""
BLOBS_MAX: Final = 16
"""In one `Ledger` frame: each may cost a signature's check, and the loop waits for all."""

LedgerBlob: TypeAlias = Annotated[bytes, msgspec.Meta(max_length=BLOB_BYTES_MAX)]
Blobs: TypeAlias = Annotated[tuple[LedgerBlob, ...], msgspec.Meta(max_length=BLOBS_MAX)]
Enveloped: TypeAlias = Annotated[bytes, msgspec.Meta(max_length=ENVELOPE_BYTES_MAX)]
Certificates: TypeAlias = Annotated[
    tuple[Enveloped, ...], msgspec.Meta(max_length=CERTIFICATES_MAX)
]
Successions: TypeAlias = Annotated[tuple[Enveloped, ...], msgspec.Meta(max_length=SUCCESSIONS_MAX)]
Grants: TypeAlias = Annotated[tuple[Enveloped, ...], msgspec.Meta(max_length=GRANTS_MAX)]
Counts: TypeAlias = Annotated[dict[str, Count], msgspec.Meta(max_length=UNITS_MAX)]
"""Unit -> count, as in `Usage`."""


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="t"):
    """A frame on the stream."""


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """First frame of both sides. Another major version is refused, another minor is fine."""

    major: Count
    minor: Count
    agent: Name
    boot_epoch: Count
    clock_unix_ms: Count
    certificates: Certificates = ()
    kernel_classes: Annotated[tuple[Name, ...], msgspec.Meta(max_length=16)] = ()
    addresses: Addresses = ()
    max_frame_bytes: Count = 1 << 20
    successions: Successions = ()
    """Since 1.1: the latest changes of this node's key, the oldest first."""
    owner_certificate: Enveloped = b""
    """Since 1.1: whose device this is."""
    grants: Grants = ()
    """Since 1.1: what the village guarantees for this node."""


class Ping(Message, frozen=True, kw_only=True, tag="ping"):
    nonce: int


class Pong(Message, frozen=True, kw_only=True, tag="pong"):
    nonce: int


class Failure(Message, frozen=True, kw_only=True, tag="failure"):
    """The typed end of a call (`id`), or of the stream (`id` 0)."""

    id: Count
    code: str
    message: str = ""
    next_step: str = ""
    retry_after_seconds: Measure = 0.0
    """Since 1.3: when a busy node expects room; 0: it does not say."""


class OperationInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One operation as a peer lists it: MCP's tool shape plus what it costs."""

    name: str
    title: str = ""
    positional: str = ""
    stability: str = "stable"
    request_schema: dict[str, Any] = {}
    result_schema: dict[str, Any] = {}
    terms: Terms | None = None
    enabled: bool = True
    models: Models = ()
    """Since 1.3: which models do it; `terms` are those of the first."""
    memory_bytes: Count = 0
    """Since 1.3, as in an offer."""


class ListOperations(Message, frozen=True, kw_only=True, tag="list_operations"):
    id: Count


class Operations(Message, frozen=True, kw_only=True, tag="operations"):
    id: Count
    operations: tuple[OperationInfo, ...]


class QuoteRequest(Message, frozen=True, kw_only=True, tag="quote_request"):
    id: Count
    operation: str
    request: bytes


class QuoteReply(Message, frozen=True, kw_only=True, tag="quote"):
    """`quote` is an envelope around a `Quote`; the rest is advice for choosing. Room may be < 0."""

    id: Count
    quote: bytes
    room_micro_credits: MicroCredits = 0
    queue_length: Count = 0
    """Calls ahead of this one and beside it."""
    slots: Count = 0
    """Since 1.3: how many such calls it works at at once; 0: it does not say."""
    wait_seconds: Measure = 0.0
    """Since 1.3: how long this one would wait for its turn, were it called now."""


class Call(Message, frozen=True, kw_only=True, tag="call"):
    """Do this. `done` is usage accepted from earlier attempts: read again, not paid again."""

    id: Count
    attempt: bytes
    operation: str
    request: bytes
    quote_hash: bytes
    ceiling_micro_credits: Amount
    deadline_seconds: Measure
    delivered: tuple[bytes, ...] = ()
    done: Counts = {}
    fingerprints: bool = False
    passing: Passing = Passing()  # since 1.4


class Accepted(Message, frozen=True, kw_only=True, tag="accepted"):
    """The seller has it and will work: sent at once, before any work."""

    id: Count


class Started(Message, frozen=True, kw_only=True, tag="started"):
    """The engine is loaded and the work begins: what computes it, and how sure sameness is."""

    id: int
    kernel_class: KernelName = ""
    identical: Name = ""


class Progress(Message, frozen=True, kw_only=True, tag="progress"):
    id: Count
    done: Measure
    total: Measure = 0.0
    note: str = ""


class Part(Message, frozen=True, kw_only=True, tag="part"):
    """One piece of a module's result, numbered from 0 within the job."""

    id: Count
    seq: Count
    body: bytes
    hash8: bytes = b""
    passed: bool = False  # since 1.4: on to the next stage
    fed8: bytes = b""  # since 1.4: the hash of what came by the one before


class Input(Message, frozen=True, kw_only=True, tag="input"):
    """Since 1.3: one more input of a running call, numbered from 0; `end`: there are no more.

    Since 1.4: what it gives goes through `hops` more stages without the buyer, the last of which
    draws `draws` tokens. `alone`: nobody but the buyer feeds from here on.
    """

    id: Count
    seq: Count
    body: InputBody = b""
    end: bool = False
    hops: Count = 0
    draws: Count = 0
    alone: bool = False


class Passed(Message, frozen=True, kw_only=True, tag="passed"):
    """Since 1.4: an `Input` by the stage before. Who knows no such ticket drops it: it is late."""

    ticket: Ticket
    seq: Count
    body: InputBody
    hops: Count = 0
    draws: Count = 0


class Finished(Message, frozen=True, kw_only=True, tag="finished"):
    """The seller's last word on a call. The buyer recomputes usage and hash before it pays."""

    id: Count
    attempt: bytes
    result: bytes
    usage: Counts
    out_hash: bytes
    seconds: Measure = 0.0


class Cancel(Message, frozen=True, kw_only=True, tag="cancel"):
    id: Count


class Ledger(Message, frozen=True, kw_only=True, tag="ledger"):
    """Ledger blobs, at most 16 of at most 4 KiB, in order."""

    blobs: Blobs


class Gossip(Message, frozen=True, kw_only=True, tag="gossip"):
    """An enveloped `Offer` or `TaskAd` on its way through the village."""

    topic: Name
    envelope: Enveloped
    hops: Count = 0


class OffersQuestion(Message, frozen=True, kw_only=True, tag="offers_question"):
    """Since 1.2: which offers do you hold that are news to who has these, `room` unknown ones?"""

    id: Count
    have: Annotated[bytes, msgspec.Meta(max_length=HAVE_BYTES * HAVE_MAX)] = b""
    room: Count = 0


class OffersAnswer(Message, frozen=True, kw_only=True, tag="offers"):
    """Since 1.2: enveloped `Offer`s of others."""

    id: Count
    envelopes: Annotated[tuple[Enveloped, ...], msgspec.Meta(max_length=OFFERS_PER_ANSWER_MAX)] = ()


class Standing(Message, frozen=True, kw_only=True, tag="standing"):
    """What you may owe me, and how much of that unsigned: sent when I know, and when it changes."""

    line_micro_credits: Amount
    exposure_micro_credits: Amount


class Fetch(Message, frozen=True, kw_only=True, tag="fetch"):
    """Do you have this blob? With `hashes`: and what are the hashes of its chunks?

    A node of 1.2 and before answers NOT_OFFERED, as does one that has it not.
    """

    id: Count
    cid: BlobName
    hashes: bool = False


class Held(Message, frozen=True, kw_only=True, tag="held"):
    """Since 1.3: I have it. `root` is that of its `Manifest`, and binds all the rest."""

    id: Count
    size_bytes: Count
    root: BlobName
    hashes: Annotated[bytes, msgspec.Meta(max_length=HASH_BYTES * CHUNKS_MAX)] = b""


class Join(Message, frozen=True, kw_only=True, tag="join"):
    id: Count
    token: str


class Joined(Message, frozen=True, kw_only=True, tag="joined"):
    id: Count
    certificates: Certificates


class Granted(Message, frozen=True, kw_only=True, tag="granted"):
    """Since 1.1: a grant that is yours, or one that I hold. `certificates` prove its issuer."""

    envelope: Enveloped
    certificates: Certificates = ()


class PairLane(msgspec.Struct, frozen=True, array_like=True):
    """The highest voucher of one lane that a book has."""

    lane: Lane
    n: Count
    cum: Amount


PairLanes: TypeAlias = Annotated[tuple[PairLane, ...], msgspec.Meta(max_length=PAIR_LANES_MAX)]


class PairQuestion(Message, frozen=True, kw_only=True, tag="pair_question"):
    """Since 1.1: what does your book say about the two of us?"""

    id: Count


class PairView(Message, frozen=True, kw_only=True, tag="pair_view"):
    """Since 1.1: the sender pays on `out`, the asker on `into`, the newest boots first.

    `balance`: what the asker owes. The counts are of lanes that did not fit.
    """

    id: Count
    balance: Net
    out: PairLanes = ()
    into: PairLanes = ()
    out_left_out: Count = 0
    into_left_out: Count = 0


class Reach(Message, frozen=True, kw_only=True, tag="reach"):
    """Since 1.2: can you dial me at this address of mine?"""

    id: Count
    address: Address


class Reached(Message, frozen=True, kw_only=True, tag="reached"):
    """Since 1.2: whether the asker answered there; `seen_from` is where its link comes from."""

    id: Count
    reached: bool
    seen_from: Name = ""


class Tunnel(Message, frozen=True, kw_only=True, tag="tunnel"):
    """Raw bytes of a foreign protocol over the control socket; reserved for the MCP gateway."""

    id: Count
    body: bytes


class Ask(Message, frozen=True, kw_only=True, tag="ask"):
    """Control socket only: read or change something of the owner's own node."""

    id: Count
    what: str
    args: dict[str, Any] = {}


class Answer(Message, frozen=True, kw_only=True, tag="answer"):
    id: Count
    value: Any = None


class Submit(Message, frozen=True, kw_only=True, tag="submit"):
    """Control socket only: a job of the owner's. Streams `Text`/`Progress`, ends in `Answer`."""

    id: Count
    operation: str
    request: bytes
    ceiling_micro_credits: Amount | None = None
    deadline_seconds: Measure | None = None
    peer: PeerId | None = None
    follow: bool = True
    local: bool = False
    mesh: bool = False  # never on this machine
    prefer: str = ""
    """fast, cheap or balanced; empty: as the settings say."""
    verify: bool = False
    stand_by: bool = False
    """Another peer is to have the model loaded, should the first one be lost."""
    draft: str = ""  # a model of this node's that guesses where the answer's is split; `none`


class Text(Message, frozen=True, kw_only=True, tag="text"):
    """Control socket only: streamed text of a job of the owner's."""

    id: Count
    text: str


class StepItem(msgspec.Struct, frozen=True, array_like=True):
    """What one engine step gave one session.

    `first` is the position of `token_ids[0]` in the whole answer (earlier attempts included),
    `read_bytes` how much of the prompt has been read so far, `hash8` the running hash after it.
    `fingerprint`, where the call asked for it: of the tokens since the last one. `logprobs`, where
    the request asks for them: of `token_ids`, one after the other.
    """

    session: U32
    first: Count
    token_ids: tuple[U32, ...]
    text: str
    hash8: bytes
    read_bytes: Count = 0
    fingerprint: Fingerprint = b""
    logprobs: Annotated[bytes, msgspec.Meta(max_length=LOGPROBS_BYTES_MAX)] = b""


class Step(msgspec.Struct, frozen=True, array_like=True):
    """One engine step for all sequences of this peer; a ledger receipt may ride along."""

    seq: Count
    items: tuple[StepItem, ...]
    receipt: LedgerBlob | None = None


PEER_MESSAGES: Final = (
    Hello, Ping, Pong, Failure, ListOperations, Operations, QuoteRequest, QuoteReply, Call,
    Accepted, Started, Progress, Part, Finished, Cancel, Ledger, Gossip, Standing, Fetch, Join,
    Joined, Granted, PairQuestion, PairView, Reach, Reached, OffersQuestion, OffersAnswer,
    Held, Input, Passed, Step,
)  # fmt: skip
CONTROL_MESSAGES: Final = (
    Hello, Failure, Ask, Answer, Submit, Text, Progress, Cancel, Tunnel,
)  # fmt: skip
Frame = Message | Step


class Quote(msgspec.Struct, frozen=True, kw_only=True):
    """Posted terms of one seller for one operation, signed, good until `not_after_unix_ms`."""

    seller: PeerId
    operation: str
    terms: Terms
    not_after_unix_ms: Count
    estimate: Counts = {}
    seconds: Measure = 0.0
    model: Name = ""
    """Since 1.3: the terms are of this model; before, of the only one there was."""
    active_parameters: Count = 0
    """Since 1.3: of that model, which its default price follows from."""


class OfferedOperation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str
    prices_micro_credits: dict[str, Amount] = {}
    models: ModelPrices = {}
    """Since 1.3: model -> price of one unit, whichever; none said: the one model of 1.2."""
    memory_bytes: Count = 0
    """Since 1.3: what one engine of it may have here, where that decides what can be asked."""


class Offer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a node does and at what price, gossiped; at most 1 KiB, good for 120 s."""

    seller: PeerId
    seq: Count
    not_after_unix_ms: Count
    addresses: Addresses
    operations: tuple[OfferedOperation, ...]
    free_slots: Count = 0
    lifetime_ms: Count = 0
    """Since 1.2: how long it was good when it was made, for listeners whose clocks differ."""


class TaskAd(msgspec.Struct, frozen=True, kw_only=True):
    """Nobody offers what I need: able peers answer with an `Offer`."""

    buyer: PeerId
    seq: Count
    not_after_unix_ms: Count
    operation: str
    addresses: Addresses = ()
    lifetime_ms: Count = 0
    """Since 1.2, as of an offer."""
    model: Name = ""
    """Since 1.3: which model is wanted."""
