"""map: one operation over every line of a file, wherever there is a free place."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TextIO

from aivillage.cli import show
from aivillage.cli.client import Client
from aivillage.cli.node import amount, connect
from aivillage.cli.output import writing
from aivillage.protocols.errors import EXIT_JOB_FAILED, EXIT_OK, NodeError, RequestError
from aivillage.protocols.types import MicroCredits, as_credits

LINE_BYTES_MAX: Final = 900 << 10
"""What a frame to the node holds; a longer line fails alone."""
BATCH_BYTES: Final = 128 << 10
BATCH_LINES: Final = 500
LOOK_SECONDS: Final = 0.5
"""Between two looks at how far it is."""

Line = tuple[int, str | None]


def run_map(args: argparse.Namespace) -> int:
    """Results, in order, to standard output or --output; progress to standard error."""
    with connect(args) as client:
        name = args.resume or _begun(client, args)
        if args.resume:
            client.ask("map_start", map=name, budget_micro_credits=_budget(args))
        try:
            ended = _followed(client, name, quiet=args.json)
        except KeyboardInterrupt:
            show.note("\nstopping; what was delivered is paid")
            ended = client.patient().ask("map_stop", map=name)
        if ended["state"] == "interrupted":
            raise NodeError(
                "the node could not go on with the map",
                next_step=f"see its log, then: aivillage-node map --resume {name}",
            )
        _written(client, name, args, ended)
    return EXIT_OK if _is_whole(ended) else EXIT_JOB_FAILED


def _begun(client: Client, args: argparse.Namespace) -> str:
    """The id of a new map, which has all its lines and runs."""
    if not args.operation or not args.input:
        raise RequestError(
            "which operation, over which lines?",
            next_step="aivillage-node map OPERATION --input FILE",
        )
    made = client.ask(
        "map_new",
        operation=args.operation,
        reduce=args.reduce,
        parallel=args.parallel,
    )
    name = str(made["map"])
    with _reading(args.input) as file:
        for batch in _batches(_lines(file)):
            client.ask("map_add", map=name, lines=batch)
    begun = client.ask("map_start", map=name, budget_micro_credits=_budget(args))
    if not args.json:
        most = as_credits(begun["budget_micro_credits"])
        show.note(f"[map {name}: {begun['total']} tasks, for at most {most} credits]")
    return name


def _budget(args: argparse.Namespace) -> MicroCredits | None:
    return amount(args.max_price) if args.max_price else None


@contextmanager
def _reading(path: str) -> Iterator[TextIO]:
    """Raises: RequestError: it cannot be read."""
    try:
        if path == "-":
            yield sys.stdin
        else:
            with Path(path).open(encoding="utf-8") as file:
                yield file
    except (OSError, UnicodeError) as error:
        raise RequestError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is no UTF-8'}",
            next_step="name a file of one JSON object a line with --input",
        ) from None


def _lines(file: TextIO) -> Iterator[Line]:
    """Number and text of every line that is not blank; None for a text that is too long."""
    for number, text in enumerate(file, 1):
        if text.strip():
            yield number, text if len(text.encode()) <= LINE_BYTES_MAX else None


def _batches(lines: Iterator[Line]) -> Iterator[list[Line]]:
    """As many as a frame holds; a long line goes alone."""
    size = 0
    batch: list[Line] = []
    for line in lines:
        length = len((line[1] or "").encode())
        if batch and (size + length > BATCH_BYTES or len(batch) >= BATCH_LINES):
            yield batch
            size, batch = 0, []
        size, batch = size + length, [*batch, line]
    if batch:
        yield batch


def _followed(client: Client, name: str, *, quiet: bool) -> dict[str, Any]:
    """How the map ended; until then a line whenever it has got further."""
    told = ""
    while True:
        found: dict[str, Any] = client.ask("map_wait", map=name, seconds=LOOK_SECONDS)
        line = _progress(found)
        if not quiet and line != told:
            show.note(line)
            told = line
        if found["state"] != "running":
            return found


def _progress(found: dict[str, Any]) -> str:
    failed = f", {found['failed']} failed" if found["failed"] else ""
    rest = f", {found['under_way']} under way" if found["state"] == "running" else ""
    spent = as_credits(found["micro_credits"])
    return f"[{found['done']}/{found['total']} done{failed}{rest}; {spent} credits]"


def _written(client: Client, name: str, args: argparse.Namespace, ended: dict[str, Any]) -> None:
    """Every line's end, in the order of the input."""
    if args.json:
        lines = list(_ends(client, name))
        if args.output:
            with writing(args.output) as file:
                _write(file, lines)
        show.as_json(ended if args.output else ended | {"lines": lines})
        return
    with writing(args.output) as file:
        _write(file, _ends(client, name))
        if ended["reduced"] is not None:
            _write(file, [ended["reduced"]])
    if not _is_whole(ended):
        show.note(f"[not whole; to go on with it: aivillage-node map --resume {name}]")


def _write(file: TextIO, lines: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> None:
    file.writelines(show.json_line(line) + "\n" for line in lines)


def _ends(client: Client, name: str) -> Iterator[dict[str, Any]]:
    after = 0
    while True:
        page = client.ask("map_lines", map=name, after=after)
        for line in page["lines"]:
            result = {"result": show.with_numbers(line["result"])} if "result" in line else {}
            yield line | result
        if not page["more"]:
            return
        after = page["lines"][-1]["line"]


def _is_whole(ended: dict[str, Any]) -> bool:
    reduced = ended["reduced"]
    return ended["done"] == ended["total"] and not (reduced and "error" in reduced)
