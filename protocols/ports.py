"""The seams of the house: what a transport, a book, a module and an engine must be.

Structural types; nothing inherits from them. Async methods belong to whatever loop calls them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec

from aivillage.protocols.errors import AivillageError, PeerError
from aivillage.protocols.pricing import Usage
from aivillage.protocols.rechecking import Claim, Finding
from aivillage.protocols.types import AttemptId, MicroCredits, PeerId, Seconds

# --------------------------------------------------------------------------- transport


class Stream(Protocol):
    """One ordered, authenticated byte stream with a peer. Timeouts are the caller's."""

    @property
    def peer(self) -> PeerId: ...

    async def read(self, size_bytes_max: int) -> bytes:
        """1..size bytes, or `b""` at the end.

        Raises:
            PeerError: PEER_LOST, the stream broke.
        """

    async def write(self, data: bytes) -> None:
        """Returns when the bytes are with the operating system. Never cancelled half way.

        Raises:
            PeerError: PEER_LOST, the stream broke.
        """

    async def close(self) -> None:
        """Ends the stream; never raises, never blocks for longer than a second."""


class PromptStream(Stream, Protocol):
    """One that a transport opened."""

    def write_now(self, data: bytes) -> bool:
        """All of it without a turn of the loop, or nothing, as where it would wait; whether so."""

    def listen(self, take: Callable[[bytes], bool]) -> None:
        """Where it can, `take` has small pieces in the turn in which they come, while `read` waits.

        Each is the next one of the stream. False: it is left to be read. `take` never raises.
        """


StreamHandler = Callable[[PromptStream], Awaitable[None]]


class SomebodyElseError(PeerError):
    """At the address is not the peer that it names, but `found`, who proved it."""

    def __init__(self, message: str, found: PeerId) -> None:
        super().__init__(message, code="PEER_LOST", next_step="dial the peer again")
        self.found = found


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """Where another node sees a connection of ours come from, and where it leaves this machine.

    `address`: `/ip4/<ip>/tcp/<port>`; `source`: the number and port here.
    """

    address: str
    source: tuple[str, int]


class Transport(Protocol):
    """Carries streams between peers that are who they say they are."""

    @property
    def peer(self) -> PeerId: ...

    village_key: bytes | None
    """What whoever connects from now on must have too; None: nobody needs any."""

    def refused(self) -> tuple[int, str]:
        """How many connections of others it kept out, and `HOST: why` of the last."""
        ...

    def addresses(self) -> tuple[str, ...]:
        """Where others can dial this node, each ending in `/p2p/<peer id>`."""
        ...

    async def dial(self, address: str) -> PeerId:
        """Connects to `address`; returns at once if already connected.

        Raises:
            SomebodyElseError: PEER_LOST, another peer lives at the address.
            PeerError: PEER_LOST, nobody there.
            RequestError: `address` is malformed.
        """

    async def probe(self, address: str) -> None:
        """Returns once the peer that `address` names has proved to be there.

        Over a connection of its own, also where one is open, and which is gone afterwards.

        Raises:
            PeerError: PEER_LOST, nobody there, or somebody else.
            RequestError: `address` is malformed.
        """

    def host_of(self, peer: PeerId) -> str:
        """Where a connected peer comes from, as in an address; empty where that is not known."""
        ...

    async def open_stream(self, peer: PeerId, protocol: str) -> PromptStream:
        """Raises: PeerError: PEER_LOST, not connected, or the peer does not speak it."""
        ...

    def serve(self, protocol: str, handler: StreamHandler) -> None:
        """Runs `handler` for every inbound stream; an exception fells that stream only."""
        ...

    async def hang_up(self, peer: PeerId) -> None:
        """Drops every connection with `peer`; never raises."""
        ...

    async def adopt(self, stream: Stream, peer: PeerId | None) -> PeerId:
        """Makes a stream that a relay joined to another node a connection with that node.

        Both ends call it: who dials says whom it means, who is dialled says None. The other end
        proves who it is, as on every connection; `stream.peer` is only the relay. The stream is
        the transport's from now on, which closes it with the connection. Direct connections are
        preferred to adopted ones, and `dial` makes one where only an adopted one is there.

        Raises:
            SomebodyElseError: PEER_LOST, another peer is at the other end.
            PeerError: PEER_LOST, nobody is.
        """

    async def seen_by(self, peer: PeerId) -> Seen | None:
        """Where `peer` sees this node; None: it does not say, or there is no telling here.

        Raises:
            PeerError: PEER_LOST, it is not connected directly.
        """

    async def meet(self, source: tuple[str, int], address: str, *, begins: bool) -> None:
        """Connects from `source` with the node at `address`, which dials us at this moment.

        One of the two `begins`. The other proves who it is, as on every connection.

        Raises:
            PeerError: PEER_LOST, they did not meet, or it is somebody else.
        """

    def met(self) -> tuple[PeerId, ...]:
        """With whom this node met: that they are connected does not say that others can dial."""
        ...

    def callers(self) -> tuple[PeerId, ...]:
        """Who is connected because it dialled an address of this node directly, alone."""
        ...


# --------------------------------------------------------------------------- ledger


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What is in force for one peer: its owner's word here, else its village's.

    `exposure`: the most that it may have unpaid; strangers have theirs together. `shared`: work
    for it is free. `blocked`: none is done for it.
    """

    known: bool
    exposure: MicroCredits
    blocked: bool
    shared: bool


class Book(Protocol):
    """The ledger as buyer and seller see it. Plain calls touch memory only; awaits are durable.

    `amount` is cumulative within an attempt everywhere. Callers are on one event loop.
    """

    @property
    def epoch(self) -> int:
        """This boot: max(stored + 1, unix ms), committed before the first frame."""
        ...

    # links
    def connected(
        self, peer: PeerId, peer_epoch: int, send: Callable[[bytes], None], minor: int = 0
    ) -> None:
        """A link is up: SYNC starts both ways. `send` takes one ledger blob, never blocks.

        `minor` is the protocol's minor version that the peer's hello says.
        """

    def disconnected(self, peer: PeerId) -> None: ...

    def receive(self, peer: PeerId, blob: bytes) -> None:
        """One ledger blob off the wire, handled in order.

        Raises:
            PeerError: the blob is malformed or forged.
        """

    def take_receipt(self, peer: PeerId) -> bytes | None:
        """A receipt blob that wants to ride on a frame that is about to leave."""
        ...

    # policy
    async def set_line(
        self, peer: PeerId, line: MicroCredits, exposure: MicroCredits, owner: str | None = None
    ) -> None:
        """What `peer` may owe me (line), and how much of it unsigned (exposure). Durable.

        All devices of one `owner` share the line. The owner's own word beats this one.
        """

    def policy(self, peer: PeerId) -> Policy:
        """What is in force for `peer` now."""
        ...

    async def favour(
        self, peer: PeerId, attempt: AttemptId, worth: MicroCredits, *, mine: bool
    ) -> None:
        """Notes what work for nothing was worth. `mine`: it was done for me. Durable."""
        ...

    async def set_received(self, peer: PeerId, line: MicroCredits, exposure: MicroCredits) -> None:
        """What `peer` says that I may owe it (line), and how much of it unsigned. Durable."""
        ...

    # buyer
    def intend(
        self,
        peer: PeerId,
        attempt: AttemptId,
        quote_hash: bytes,
        ceiling: MicroCredits,
        *,
        soon: bool = False,
    ) -> None:
        """An intent row in the next group commit; nobody waits for it.

        `soon`: within a twentieth of a second, and none where the attempt is signed for by then.
        """

    def accept(
        self, peer: PeerId, attempt: AttemptId, amount: MicroCredits, out_hash: bytes
    ) -> None:
        """Work worth `amount` in all was accepted. Vouchers follow by policy (X/2, 250 ms)."""
        ...

    async def settle(
        self, peer: PeerId, attempt: AttemptId, amount: MicroCredits, out_hash: bytes
    ) -> None:
        """The final item: returns when the voucher that carries it is durable here."""
        ...

    def settle_soon(
        self,
        peer: PeerId,
        attempt: AttemptId,
        amount: MicroCredits,
        out_hash: bytes,
        failed: Callable[[AivillageError], None],
    ) -> None:
        """As `settle`, for who does not wait: its voucher may carry the ends of 16 attempts.

        It goes out at once where the unsigned work reaches X/2, else within a tenth of a second.
        `failed` hears of a book that cannot be written.

        Raises:
            LedgerError: as `accept`.
        """

    async def abandon(self, peer: PeerId, attempt: AttemptId) -> None:
        """A rejected attempt: signs no more for it, returns once no claim on it can be paid.

        What was signed, or handed to the writer to be signed, before the call stays signed.
        """

    def owed_to(self, peer: PeerId) -> MicroCredits:
        """What I owe `peer`, signed."""
        ...

    # seller
    def begin_sale(
        self, peer: PeerId, attempt: AttemptId, quote_hash: bytes, ceiling: MicroCredits
    ) -> None:
        """Remembers a running attempt, for receipts and claims."""
        ...

    def room(self, peer: PeerId) -> MicroCredits:
        """How much more may be delivered to `peer` right now (durably reserved)."""
        ...

    def headroom(self, peer: PeerId) -> MicroCredits:
        """What `peer` may still run up with me before it must pay or earn (line and pool)."""
        ...

    def want_room(self, peer: PeerId, amount: MicroCredits) -> None:
        """Raise the reservation ahead so that a unit of `amount` fits, if the rules allow."""
        ...

    def deliver(
        self, peer: PeerId, attempt: AttemptId, amount: MicroCredits, out_hash: bytes
    ) -> bool:
        """Counts the attempt's delivered value up to `amount`; False: no room, nothing counted."""
        ...

    async def room_changed(self, peer: PeerId) -> None:
        """Returns at the next voucher, reservation or healing that may have made room."""
        ...

    def end_sale(self, peer: PeerId, attempt: AttemptId) -> None: ...


# --------------------------------------------------------------------------- modules


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What `estimate` may know of the machine."""

    cpu_count: int = 1
    memory_bytes: int = 0


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    ok: bool
    reason: str = ""


class ProgressEvent(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    done: float
    total: float = 0.0
    note: str = ""


class PartEvent(msgspec.Struct, frozen=True, kw_only=True, tag="part"):
    """One piece of the result, as msgpack; kept by the buyer, handed to a later attempt."""

    body: bytes


class ResultEvent(msgspec.Struct, frozen=True, kw_only=True, tag="result"):
    """The end: the msgpack of the module's Result."""

    body: bytes


Event = ProgressEvent | PartEvent | ResultEvent


class Context(Protocol):
    """What a running module has. `delivered` is what an earlier attempt had delivered."""

    @property
    def delivered(self) -> Sequence[bytes]: ...
    @property
    def deadline_seconds(self) -> Seconds: ...
    @property
    def seed(self) -> int: ...
    @property
    def scratch(self) -> str: ...

    def cancelled(self) -> bool: ...

    def call(self, operation: str, request: msgspec.Struct, budget: MicroCredits) -> bytes:
        """A sub-job on the mesh, paid by whoever runs this module, up to `budget`."""
        ...


class Module(Protocol):
    """One call, one piece of work. A module is an instance with these members.

    `estimate` and `meter` are pure and fast; built-in modules' files import only the standard
    library and msgspec at the top, since the daemon loads them. `run` is synchronous code in a
    worker process. `positional` names the Request field that the command line takes bare.
    """

    name: str
    title: str
    positional: str
    Request: type[msgspec.Struct]
    Result: type[msgspec.Struct]

    def prices_micro_credits(self) -> dict[str, int]:
        """Default price of one of each unit that `meter` counts."""
        ...

    def estimate(self, request: Any, machine: Machine) -> tuple[Usage, Seconds]: ...

    def meter(self, request: Any, result: Any) -> Usage:
        """Usage recomputable by the buyer from request and (partial) result alone."""
        ...

    def run(self, request: Any, context: Context) -> Iterator[Event]: ...

    def check(self, request: Any, result: Any) -> Verdict:
        """Cheaper than `run`; the buyer calls it in a worker on every result."""
        ...


# --------------------------------------------------------------------------- engines


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    engine: str
    model: str
    kernel_class: str
    identical: str
    """`guaranteed` (self-test at load passed) or `best effort`."""
    active_parameters: int
    context_tokens: int
    vocabulary: int
    weights_sha256: str
    rechecks: bool = False  # whether it is a `RecheckingEngine`
    device: str = "cpu"
    """What computes: `cpu`, `cuda:N`, or `remote` where another server does."""
    vocabulary_sha256: str = ""  # who shares it means the same by every token id; empty: unknown


class SessionFrame(msgspec.Struct, frozen=True, array_like=True):
    """What one step gave one session.

    `finished`: "", "length", "stop", "eos", "rechecked" or an error. `fingerprint`: of tokens up
    to this frame's, where a span of them is full or the last.
    """

    session: int
    token_ids: tuple[int, ...]
    text: str
    read_bytes: int
    finished: str = ""
    error: str = ""
    fingerprint: bytes = b""
    finding: Finding | None = None
    body: bytes = b""
    """What an engine of sessions with inputs gave for one of them."""
    logprobs: bytes = b""
    """Of `token_ids`, where they were asked for: `logprobs.packed`, one after the other."""


class Engine(Protocol):
    """A resident model that serves many sessions at once, one batched step at a time."""

    def info(self) -> EngineInfo: ...

    def add(self, session: int, request: Any, delivered: Sequence[int]) -> None:
        """Queues a session that goes on after the token ids in `delivered`.

        Raises:
            RequestError: the request does not fit the model.
            RefusedError: BUSY, no slot.
        """

    def allow(self, session: int, units: int) -> None:
        """Raises the number of units (prompt quads + output tokens) it may produce in all."""
        ...

    def step(self) -> list[SessionFrame]:
        """Advances every session that has allowance; empty when none could move."""
        ...

    def cancel(self, session: int) -> None:
        """Frees the slot before the next step; an unknown session is no error."""
        ...


@runtime_checkable
class RecheckingEngine(Protocol):
    """An engine that looks at answers of others as it draws its own; `EngineInfo.rechecks`."""

    def recheck(self, session: int, request: Any, claim: Claim) -> None:
        """Queues a session that reads `request` and `claim`; its last frame has the finding.

        Raises:
            RequestError: they do not fit the model or each other.
            RefusedError: BUSY, no slot.
        """


class FedEngine(Engine, Protocol):
    """An engine whose sessions take inputs while they last."""

    def feed(self, session: int, body: bytes) -> None:
        """Queues one input; what is wrong with it ends its session. Unknown is no error."""
        ...
