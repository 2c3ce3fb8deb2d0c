"""The legal life of a job, as one table, and the running hash of what it delivers.

new -> seeking -> calling -> working -> checking -> settling -> done
          ^          |          |           |
          +----------+----------+-----------+   the seller failed: another attempt
any state before settling -> failed | cancelled
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Final, Literal, TypeAlias

import msgspec

from aivillage.protocols.types import AttemptId

FINGERPRINT_BYTES_MAX: Final = 256
"""Of at most 32 tokens; 133 are used."""
Fingerprint: TypeAlias = Annotated[bytes, msgspec.Meta(max_length=FINGERPRINT_BYTES_MAX)]
"""What the states behind some tokens leave behind: it counts in the running hash."""

State = Literal[
    "new", "seeking", "calling", "working", "checking", "settling", "done", "failed", "cancelled"
]
JobEvent = Literal[
    "seek", "call", "acknowledged", "finished", "passed", "settled", "retry", "fail", "cancel"
]

TABLE: Final[dict[tuple[State, JobEvent], State]] = {
    ("new", "seek"): "seeking",
    ("seeking", "call"): "calling",
    ("calling", "acknowledged"): "working",
    ("working", "finished"): "checking",
    ("checking", "passed"): "settling",
    ("settling", "settled"): "done",
    ("calling", "retry"): "seeking",
    ("working", "retry"): "seeking",
    ("checking", "retry"): "seeking",
    ("new", "fail"): "failed",
    ("seeking", "fail"): "failed",
    ("calling", "fail"): "failed",
    ("working", "fail"): "failed",
    ("checking", "fail"): "failed",
    ("new", "cancel"): "cancelled",
    ("seeking", "cancel"): "cancelled",
    ("calling", "cancel"): "cancelled",
    ("working", "cancel"): "cancelled",
    ("checking", "cancel"): "cancelled",
}
ENDED: Final[frozenset[State]] = frozenset({"done", "failed", "cancelled"})


class IllegalStepError(AssertionError):
    """A defect of ours: the job was asked to do what its state forbids."""


def step(state: State, event: JobEvent) -> State:
    """The state after `event`. Raises IllegalStepError where the table has no such step."""
    try:
        return TABLE[state, event]
    except KeyError:
        raise IllegalStepError(f"a job that is {state} cannot {event}") from None


def running_hash(previous: bytes, attempt: AttemptId, number: int, body: bytes) -> bytes:
    """h_n = sha256(h_(n-1) | attempt | n | body): what the buyer has accepted, in order."""
    return hashlib.sha256(previous + attempt + number.to_bytes(8, "big") + body).digest()


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian u32, the body that a Step item adds to the running hash."""
    return b"".join(token.to_bytes(4, "little") for token in token_ids)
