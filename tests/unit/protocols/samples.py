"""One full and one spare example of every message kind."""

from __future__ import annotations

from aivillage.protocols.messages import (
    CONTROL_MESSAGES,
    PEER_MESSAGES,
    Accepted,
    Answer,
    Ask,
    Call,
    Cancel,
    Failure,
    Fetch,
    Finished,
    Frame,
    Gossip,
    Granted,
    Hello,
    Join,
    Joined,
    Ledger,
    ListOperations,
    OperationInfo,
    Operations,
    PairLane,
    PairQuestion,
    PairView,
    Part,
    Ping,
    Pong,
    Progress,
    QuoteReply,
    QuoteRequest,
    Standing,
    Started,
    Step,
    StepItem,
    Submit,
    Text,
    Tunnel,
)
from aivillage.protocols.pricing import Terms
from aivillage.protocols.types import PeerId

PEER = PeerId("12D3KooWQK1wnefoLrcVHbbnf5tLzbopUd3K3bFAoJpA7YJgL5pV")
TERMS = Terms(prices_micro_credits={"prompt_quads": 269, "output_tokens": 269})
OPERATION = OperationInfo(
    name="inference.generate",
    title="Generate text",
    stability="experimental",
    request_schema={"type": "object", "properties": {"prompt": {"type": "string"}}},
    result_schema={"type": "object"},
    terms=TERMS,
    enabled=False,
)

FULL: tuple[Frame, ...] = (
    Hello(
        major=1,
        minor=0,
        agent="aivillage/0.1.0",
        boot_epoch=1_790_000_000_000,
        clock_unix_ms=1_790_000_000_001,
        certificates=(b"certificate", b""),
        kernel_classes=("torch",),
        addresses=(f"/ip4/127.0.0.1/tcp/4051/p2p/{PEER}",),
        max_frame_bytes=4096,
        successions=(b"succession",),
        owner_certificate=b"owner",
        grants=(b"grant",),
    ),
    Ping(nonce=2**64 - 1),
    Pong(nonce=0),
    Failure(id=3, code="BUSY", message="no slot is free", next_step="try later"),
    ListOperations(id=4),
    Operations(id=4, operations=(OPERATION, OperationInfo(name="mesh.noop"))),
    QuoteRequest(id=5, operation="mesh.noop", request=b"\x80"),
    QuoteReply(
        id=5,
        quote=b"envelope",
        room_micro_credits=-7,
        queue_length=2,
    ),
    Call(
        id=6,
        attempt=bytes(range(16)),
        operation="inference.generate",
        request=b"\x81\xa6prompt\xa2hi",
        quote_hash=bytes(32),
        ceiling_micro_credits=2**53 - 1,
        deadline_seconds=10.5,
        delivered=(b"one", b"two"),
        done={"prompt_quads": 1, "output_tokens": 2},
    ),
    Accepted(id=6),
    Started(id=6, kernel_class="torch-2.13 fp32 avx2 t1", identical="guaranteed"),
    Progress(id=6, done=0.5, total=1.0, note="half way"),
    Part(id=6, seq=1, body=b"part", hash8=bytes(8)),
    Finished(
        id=6,
        attempt=bytes(16),
        result=b"\x80",
        usage={"output_tokens": 2},
        out_hash=bytes(32),
        seconds=0.25,
    ),
    Cancel(id=6),
    Ledger(blobs=(b"", bytes(4096))),
    Gossip(topic="/aivillage/offers/1/ab", envelope=b"offer", hops=2),
    Standing(line_micro_credits=10_000_000, exposure_micro_credits=20_000),
    Fetch(id=7, cid=bytes(range(32)), offset=4096),
    Join(id=7, token="invite"),
    Joined(id=7, certificates=(b"certificate",)),
    Granted(envelope=b"grant", certificates=(b"certificate",)),
    PairQuestion(id=7),
    PairView(
        id=7,
        balance=-(2**53) + 1,
        out=(PairLane(bytes(range(16)), 3, 500),),
        into=(PairLane(bytes(16), 1, 0),),
        out_left_out=1,
        into_left_out=2,
    ),
    Tunnel(id=8, body=b"{}"),
    Ask(id=9, what="peers", args={"all": True, "deep": [{"a": None}]}),
    Answer(id=9, value=[1, "two", 3.0, b"four", None, {"five": []}]),
    Submit(
        id=10,
        operation="mesh.noop",
        request=b"\x80",
        ceiling_micro_credits=100_000,
        deadline_seconds=30.0,
        peer=PEER,
        follow=False,
        local=True,
        mesh=True,
        prefer="cheap",
    ),
    Text(id=10, text="Zürich 🏔"),
    Step(
        seq=11,
        items=(
            StepItem(session=0, first=0, token_ids=(), text="", hash8=b""),
            StepItem(
                session=2**32 - 1,
                first=40,
                token_ids=(0, 49_151, 2**32 - 1),
                text=" né",
                hash8=bytes(8),
                read_bytes=12,
            ),
        ),
        receipt=b"receipt",
    ),
)
"""Every field set to something that is not its default."""

SPARE: tuple[Frame, ...] = (
    Hello(major=1, minor=0, agent="a", boot_epoch=0, clock_unix_ms=0),
    Failure(id=0, code="INTERNAL"),
    Operations(id=0, operations=()),
    QuoteReply(id=0, quote=b""),
    Progress(id=0, done=0.0),
    Part(id=0, seq=0, body=b""),
    Ledger(blobs=()),
    Fetch(id=0, cid=bytes(32)),
    Granted(envelope=b""),
    PairView(id=0, balance=0),
    Answer(id=0),
    Ask(id=0, what=""),
    Submit(id=0, operation="", request=b""),
    Step(seq=0, items=()),
)
"""Every optional field left out."""

KINDS = set(PEER_MESSAGES) | set(CONTROL_MESSAGES)


def name(frame: Frame) -> str:
    return type(frame).__name__
