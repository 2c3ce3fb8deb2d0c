"""The process of `start`: the daemon on trio, and what the person sees of it."""

from __future__ import annotations

import functools
import sys

import trio

from aivillage.cli import show
from aivillage.node import daemon
from aivillage.node.config import Origin, Settings
from aivillage.node.desk import Desk
from aivillage.node.events import configure_logging
from aivillage.node.paths import Paths
from aivillage.protocols.errors import AivillageError


def serve(
    settings: Settings, origins: list[Origin], where: Paths, *, join: str | None, as_json: bool
) -> int:
    """Runs until stopped. Raises: AivillageError: it could not start, or lost its ledger."""
    configure_logging("debug" if settings.dev_mode else settings.log_level)
    ready = functools.partial(_ready_json if as_json else _ready_text, dev_mode=settings.dev_mode)
    try:
        trio.run(functools.partial(daemon.run, settings, origins, where, ready, join=join))
    except* AivillageError as group:
        raise _first(group) from None
    return 0


def _ready_text(desk: Desk, *, dev_mode: bool) -> None:
    addresses = ", ".join(desk.addresses())
    print(f"ready: node {desk.villagers.peer}", flush=True)
    print(f"peers reach it at {addresses}", flush=True)
    if dev_mode:
        print("DEVELOPMENT MODE: unfenced modules run, logs tell all", flush=True)
    show.note("Ctrl-C stops it. In another terminal: aivillage-node status")


def _ready_json(desk: Desk, *, dev_mode: bool) -> None:
    show.as_json({"ready": True, "peer": desk.villagers.peer, "dev_mode": dev_mode})
    sys.stdout.flush()


def _first(group: BaseExceptionGroup[AivillageError]) -> AivillageError:
    """The first of ours inside a nursery's wrapping."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, AivillageError)
    return error
