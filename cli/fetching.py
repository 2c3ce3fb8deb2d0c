"""Fetches a blob through the running node, and shows how far it is. For commands and programs.

path = fetch_blob(paths(None), "9f86d0...", max_price_micro_credits=50_000)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from aivillage.cli import show
from aivillage.cli.client import Client
from aivillage.models.mesh.fetch import NAME, FetchRequest
from aivillage.node.paths import Paths
from aivillage.protocols import codec, messages
from aivillage.protocols.messages import Progress
from aivillage.protocols.types import MicroCredits

MIB: Final = 1 << 20
SHOWN_SECONDS: Final = 0.2
"""Between two lines of progress."""


def fetch_blob(
    where: Paths,
    cid: str,
    *,
    root: str = "",
    sources: Sequence[str] = (),
    max_price_micro_credits: MicroCredits | None = None,
    progress: Callable[[Progress], None] = lambda _frame: None,
) -> Path:
    """Where the bytes of `cid` (hexadecimal) lie, once members brought them; checked.

    `root`: of its manifest, where it is known. `sources`: only these peers.

    Raises:
        NoDaemonError: no node runs there.
        AivillageError: nobody has it, or it costs too much; what came is kept for the next try.
    """
    request = FetchRequest(cid=cid, root=root, sources=tuple(sources))
    fetch(where, request, max_price_micro_credits, progress)
    return where.blobs / cid[:2] / cid


def fetch(
    where: Paths,
    request: FetchRequest,
    max_price: MicroCredits | None,
    progress: Callable[[Progress], None],
) -> dict[str, Any]:
    """The job's answer, with its receipt. Ctrl-C ends the fetch, and pays what came.

    Raises:
        AivillageError: as `fetch_blob`.
    """
    with Client(where.socket) as client:
        call = client.next_id()
        submit = messages.Submit(
            id=call,
            operation=NAME,
            request=codec.pack(request),
            ceiling_micro_credits=max_price,
        )
        client.patient().send(submit)
        try:
            return _answer(client, call, progress)
        except KeyboardInterrupt:
            client.send(messages.Cancel(id=call))
            show.note("\nstopping; what came is paid and kept: the same command goes on with it")
            return _answer(client, call, lambda _frame: None)


def _answer(client: Client, call: int, progress: Callable[[Progress], None]) -> dict[str, Any]:
    for frame in client.frames(call):
        if isinstance(frame, Progress):
            progress(frame)
        elif isinstance(frame, messages.Answer):
            found: dict[str, Any] = frame.value
            return found
    raise AssertionError("frames end with an answer or an error")


class Meter:
    """One line on a terminal that grows; elsewhere only what happened to sources."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._shown_at = 0.0
        self._begun: tuple[float, float] | None = None

    def __call__(self, frame: Progress) -> None:
        if not frame.total:
            if not frame.note.startswith("job "):
                show.note(f"[{show.one_line(frame.note)}]")
            return
        now = time.monotonic()
        if self._begun is None:
            self._begun = now, frame.done  # what an earlier fetch brought is no speed
        if not frame.note.startswith("from "):
            show.note(("\n" if self._is_terminal else "") + f"[{show.one_line(frame.note)}]")
        is_last = frame.done >= frame.total
        if self._is_terminal and (is_last or now - self._shown_at > SHOWN_SECONDS):
            self._shown_at = now
            print(f"\r{self._line(frame, now)}", end="\n" if is_last else "", file=sys.stderr)
            sys.stderr.flush()

    def _line(self, frame: Progress, now: float) -> str:
        assert self._begun is not None, "set by the first frame"
        at, done = self._begun
        speed = (frame.done - done) / MIB / max(now - at, 1e-3)
        share = f"{frame.done / MIB:.1f}/{frame.total / MIB:.1f} MiB"
        return f"{share}, {speed:.1f} MiB/s {show.one_line(frame.note)}".ljust(60)
