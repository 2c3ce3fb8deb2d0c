"""The error tree, and error code <-> exception both ways.

    AivillageError
    |-- ConfigError      the owner's settings or files are wrong; says which key and what to write
    |-- RequestError     the person asked for something that cannot be; nothing was spent
    |-- RefusedError     a peer, or this node for its owner, said no
    |-- PeerError        a peer misbehaved or vanished
    |-- JobError         the work itself failed, was cancelled or ran out of time
    |-- LedgerError      the books do not allow it
    `-- NodeError        this machine failed: disk, or a defect of ours

The wire carries the code; free text is for people only. Each error says what to do next.
"""

from __future__ import annotations

from typing import ClassVar, Final


class AivillageError(Exception):
    """Base of all our errors: a code, a sentence, the next step, and perhaps when to take it."""

    codes: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        next_step: str = "",
        retry_after_seconds: float = 0.0,
    ) -> None:
        """`retry_after_seconds`: when whoever refused expects to say yes; 0: it does not know."""
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
        self.code: str = code or (self.codes[0] if self.codes else "INTERNAL")
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        step = f" Next: {self.next_step}" if self.next_step else ""
        return f"{self.code}: {self.message}{step}"


class ConfigError(AivillageError):
    """A setting, file or port on this machine is wrong."""

    codes: ClassVar[tuple[str, ...]] = ("CONFIG",)


class RequestError(AivillageError):
    """The request cannot be done as asked, here or anywhere."""

    codes: ClassVar[tuple[str, ...]] = (
        "BAD_REQUEST",
        "TOO_LARGE",
        "UNKNOWN_OPERATION",
        "NOT_ENABLED",
        "PRICE_ABOVE_CEILING",
    )


class RefusedError(AivillageError):
    """Somebody said no, and why."""

    codes: ClassVar[tuple[str, ...]] = (
        "BUSY",
        "OWNER_LIMIT",
        "NOT_OFFERED",
        "QUOTE_EXPIRED",
        "NO_PEER",
    )


class PeerError(AivillageError):
    """A peer broke the protocol or is gone."""

    codes: ClassVar[tuple[str, ...]] = ("PEER_LOST", "VERSION_UNSUPPORTED", "REPLAYED")


class JobError(AivillageError):
    """The work did not end in a result."""

    codes: ClassVar[tuple[str, ...]] = ("JOB_FAILED", "CANCELLED", "DEADLINE")


class LedgerError(AivillageError):
    """The books do not allow it."""

    codes: ClassVar[tuple[str, ...]] = ("INSUFFICIENT_CREDITS",)


class NodeError(AivillageError):
    """This machine failed."""

    codes: ClassVar[tuple[str, ...]] = ("INTERNAL", "DISK_FULL")


TREE: Final = (
    ConfigError,
    RequestError,
    RefusedError,
    PeerError,
    JobError,
    LedgerError,
    NodeError,
)
CODES: Final[dict[str, type[AivillageError]]] = {c: kind for kind in TREE for c in kind.codes}

EXIT_OK: Final = 0
EXIT_INTERNAL: Final = 1
EXIT_USAGE: Final = 2
EXIT_CONFIG: Final = 3
EXIT_NO_DAEMON: Final = 4
EXIT_REFUSED: Final = 5
EXIT_JOB_FAILED: Final = 6
EXIT_AUDIT: Final = 7

_EXIT_BY_CLASS: Final = {
    ConfigError: EXIT_CONFIG,
    RequestError: EXIT_REFUSED,
    RefusedError: EXIT_REFUSED,
    LedgerError: EXIT_REFUSED,
    PeerError: EXIT_JOB_FAILED,
    JobError: EXIT_JOB_FAILED,
}


def exit_code(error: AivillageError) -> int:
    """The process exit code that stands for `error`."""
    if error.code == "BAD_REQUEST" and not isinstance(error, PeerError):
        return EXIT_USAGE  # a peer's malformed bytes are no fault of who typed the command
    return next((n for kind, n in _EXIT_BY_CLASS.items() if isinstance(error, kind)), EXIT_INTERNAL)


def from_code(
    code: str, message: str, next_step: str = "", retry_after_seconds: float = 0.0
) -> AivillageError:
    """The exception for a code off the wire; an unknown code is INTERNAL of the other side."""
    kind = CODES.get(code, NodeError)
    known = code if code in CODES else "INTERNAL"
    return kind(message, code=known, next_step=next_step, retry_after_seconds=retry_after_seconds)
