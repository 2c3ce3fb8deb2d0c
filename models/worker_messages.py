"""What a daemon and its worker say to each other: u32 length, then one tagged msgpack map.

`id` names a call of the daemon's. A worker serves one engine and any number of its sessions, or one
module call at a time.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from aivillage.models import gpu
from aivillage.models.inference.engine_choice import DEFAULT_ENGINE, ON_CPU
from aivillage.protocols.errors import AivillageError, NodeError
from aivillage.protocols.messages import OperationInfo
from aivillage.protocols.ports import (
    EngineInfo,
    Event,
    Machine,
    SessionFrame,
    Verdict,
)
from aivillage.protocols.prefixes import PrefixTokens
from aivillage.protocols.rechecking import Claim

FRAME_BYTES_MAX: Final = 4 << 20
"""Requests and results travel in frames of 1 MiB between peers; their wrapping is small."""
LENGTH_BYTES: Final = 4


class Start(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    """The first command: the limits that the worker puts on itself.

    `scratch` is its folder; empty: the one that it was started in.
    """

    scratch: str
    memory_bytes_max: int
    nice: int
    sandbox: bool
    readable: tuple[str, ...] = ()
    library: str = ""
    """Where models were pulled to."""
    gpu: bool = False
    """An engine will compute on a GPU here: its devices are open, and data memory has no limit."""


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """A whole model, a stage of its `layers` (first, one after the last), or the driver of both."""

    model: str
    slots: int
    engine: str = DEFAULT_ENGINE
    part: Literal["whole", "stage", "driver"] = "whole"
    layers: tuple[int, int] = (0, 0)
    weights_sha256: str = ""
    """Of the model that is meant by its name; a stage's."""
    way_out: int = -1
    """The descriptor over which the daemon hands connections to a remote model's server."""
    device: gpu.Device = ON_CPU


class Add(msgspec.Struct, frozen=True, kw_only=True, tag="add"):
    """A session that answers `request`, or looks at the answer that is claimed for it.

    `scope` is a name of the daemon's for whom it answers; it says nothing to a worker but who else
    is the same.
    """

    session: int
    request: bytes
    delivered: tuple[int, ...] = ()
    claim: Claim | None = None
    scope: bytes = b""


class Allow(msgspec.Struct, frozen=True, kw_only=True, tag="allow"):
    session: int
    units: int


class Feed(msgspec.Struct, frozen=True, kw_only=True, tag="feed"):
    """One input of a session that takes them."""

    session: int
    body: bytes


class CancelSession(msgspec.Struct, frozen=True, kw_only=True, tag="cancel_session"):
    session: int


class Describe(msgspec.Struct, frozen=True, kw_only=True, tag="describe"):
    id: int
    operation: str


class Estimate(msgspec.Struct, frozen=True, kw_only=True, tag="estimate"):
    id: int
    operation: str
    request: bytes
    machine: Machine


class Meter(msgspec.Struct, frozen=True, kw_only=True, tag="meter"):
    id: int
    operation: str
    request: bytes
    result: bytes


class Check(msgspec.Struct, frozen=True, kw_only=True, tag="check"):
    id: int
    operation: str
    request: bytes
    result: bytes


class Run(msgspec.Struct, frozen=True, kw_only=True, tag="run"):
    id: int
    operation: str
    request: bytes
    delivered: tuple[bytes, ...]
    deadline_seconds: float
    seed: int
    scratch: str


class CancelRun(msgspec.Struct, frozen=True, kw_only=True, tag="cancel_run"):
    id: int


class CallAnswer(msgspec.Struct, frozen=True, kw_only=True, tag="call_answer"):
    """What a sub-job gave: a result, or a code."""

    id: int
    result: bytes = b""
    code: str = ""
    message: str = ""
    next_step: str = ""


class Started(msgspec.Struct, frozen=True, kw_only=True, tag="started"):
    """`sandboxed`: no network and no other process; `fenced`: no file but its own."""

    sandboxed: bool
    fenced: bool
    why_not: str = ""


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    info: EngineInfo
    load_seconds: float


class Frames(msgspec.Struct, frozen=True, kw_only=True, tag="frames"):
    frames: list[SessionFrame]
    prefix: PrefixTokens = PrefixTokens()
    """Of the engine since it was loaded."""


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The typed end of a call (`id`), of a session, or of loading (`id` 0)."""

    id: int = 0
    session: int | None = None
    code: str
    message: str
    next_step: str = ""


class Described(msgspec.Struct, frozen=True, kw_only=True, tag="described"):
    id: int
    info: OperationInfo


class Estimated(msgspec.Struct, frozen=True, kw_only=True, tag="estimated"):
    id: int
    usage: dict[str, int]
    seconds: float


class Metered(msgspec.Struct, frozen=True, kw_only=True, tag="metered"):
    id: int
    usage: dict[str, int]


class Checked(msgspec.Struct, frozen=True, kw_only=True, tag="checked"):
    id: int
    verdict: Verdict


class Ran(msgspec.Struct, frozen=True, kw_only=True, tag="ran"):
    """One event of a run."""

    id: int
    event: Event


class RunEnded(msgspec.Struct, frozen=True, kw_only=True, tag="run_ended"):
    id: int


class SubCall(msgspec.Struct, frozen=True, kw_only=True, tag="sub_call"):
    """The running module wants work done on the mesh; a `CallAnswer` follows."""

    id: int
    operation: str
    request: bytes
    budget: int


ModuleCommand = Describe | Estimate | Meter | Check | Run
Command = Start | Load | Add | Allow | Feed | CancelSession | ModuleCommand | CancelRun | CallAnswer
ModuleReply = Described | Estimated | Metered | Checked | Ran | RunEnded | SubCall | Failed
Reply = Started | Loaded | Frames | ModuleReply

_encoder: Final = msgspec.msgpack.Encoder()
commands: Final[msgspec.msgpack.Decoder[Command]] = msgspec.msgpack.Decoder(Command)
replies: Final[msgspec.msgpack.Decoder[Reply]] = msgspec.msgpack.Decoder(Reply)


def framed(message: Command | Reply) -> bytes:
    """Raises: NodeError: INTERNAL, the message is over `FRAME_BYTES_MAX`."""
    body = _encoder.encode(message)
    if len(body) > FRAME_BYTES_MAX:
        raise NodeError(f"a message of {len(body):,} bytes does not fit a worker's pipe")
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def failed(error: AivillageError, *, call: int = 0, session: int | None = None) -> Failed:
    return Failed(
        id=call,
        session=session,
        code=error.code,
        message=error.message,
        next_step=error.next_step,
    )
