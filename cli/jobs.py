"""submit, jobs, operations. The flags of `submit` come from the operation's own schema."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, TextIO

import msgspec

from aivillage.cli import choice, show
from aivillage.cli.client import Client
from aivillage.cli.node import amount, connect
from aivillage.protocols import messages
from aivillage.protocols.errors import RequestError
from aivillage.protocols.types import as_credits


def submit(args: argparse.Namespace) -> int:
    """Streams the answer to standard output, progress and the receipt to standard error."""
    if args.wants_help:
        return _help(args)
    if args.operation is None:
        raise RequestError("which operation?", next_step="aivillage-node operations")
    with connect(args) as client:
        operation = _operation(client, args.operation)
        wanted = _wanted(args, client.next_id(), _request(operation, args.rest))
        if args.dry_run:
            return choice.dry_run(args, client, wanted)
        client.patient().send(wanted)
        try:
            answer = _follow(client, wanted.id, quiet=args.json)
        except KeyboardInterrupt:
            client.send(messages.Cancel(id=wanted.id))
            show.note("\ncancelling; what was delivered is paid")
            answer = _follow(client, wanted.id, quiet=True)
        if "result" in answer:
            answer["result"] = show.with_numbers(answer["result"])
        if args.explain and not args.detach:
            answer["choices"] = choice.of_job(client, answer["job"])
    if args.json:
        show.as_json(answer)
    elif args.detach:
        print(answer["job"])
    else:
        _show_result(answer)
        for made in answer.get("choices", []):
            choice.table(made, sys.stderr)
    return 0


def _wanted(args: argparse.Namespace, call: int, request: dict[str, Any]) -> messages.Submit:
    return messages.Submit(
        id=call,
        operation=args.operation,
        request=msgspec.msgpack.encode(request),
        ceiling_micro_credits=amount(args.max_price) if args.max_price else None,
        deadline_seconds=args.deadline,
        peer=args.peer,
        follow=not args.detach,
        local=args.local,
        verify=args.verify,
        stand_by=args.stand_by,
        draft=args.draft or "",
        mesh=args.mesh,
        prefer=args.prefer or "",
    )


def _operation(client: Client, name: str) -> dict[str, Any]:
    known = {operation["name"]: operation for operation in client.ask("operations")}
    if name not in known:
        raise RequestError(
            f"no operation is called {name!r}",
            code="UNKNOWN_OPERATION",
            next_step="aivillage-node operations",
        )
    found: dict[str, Any] = known[name]
    return found


def _help(args: argparse.Namespace) -> int:
    """The command's own flags, and those of the operation where one is named."""
    args.parser.print_help()
    if args.operation is not None:
        with connect(args) as client:
            operation = _operation(client, args.operation)
        print()
        _flags_of(operation).print_help()
    return 0


def _request(operation: dict[str, Any], rest: list[str]) -> dict[str, Any]:
    """Flags -> request; only what was said, so that defaults stay the module's."""
    said = vars(_flags_of(operation).parse_args(rest))
    found = {k: v for k, v in said.items() if v is not None and ":" not in k}
    positional = operation.get("positional", "")
    if positional and found.get(positional) == "-":
        found[positional] = sys.stdin.read()
    for name, field in _fields(operation.get("request_schema", {})).items():
        if _is_texts(field) and (texts := _texts(name, said)):
            found[name] = texts
    return found


def _texts(name: str, said: dict[str, Any]) -> list[str]:
    """All that was said of a field that takes several: bare, by its flag, then a file's lines."""
    found = [*(said.get(f"{name}:bare") or ()), *(said.get(name) or ())]
    if found == ["-"]:
        return _lines(sys.stdin)
    if path := said.get(f"{name}:file"):
        try:
            with Path(path).open(encoding="utf-8") as file:
                found += _lines(file)
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{path} cannot be read: {error}") from None
    return found


def _lines(file: TextIO) -> list[str]:
    """Without those that are blank."""
    return [line.rstrip("\r\n") for line in file if line.strip()]


def _is_texts(field: dict[str, Any]) -> bool:
    return field.get("type") == "array" and field.get("items", {}).get("type") == "string"


def _flags_of(operation: dict[str, Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"aivillage-node submit {operation['name']}",
        description=operation.get("title", ""),
        add_help=False,
    )
    fields = _fields(operation.get("request_schema", {}))
    positional = operation.get("positional", "")
    if positional:
        about = fields.get(positional, {}).get("description", "")
        if _is_texts(fields.get(positional, {})):
            parser.add_argument(f"{positional}:bare", nargs="*", metavar=positional, help=about)
        else:
            parser.add_argument(positional, nargs="?", default=None, help=about)
    for name, field in fields.items():
        if name != positional or _is_texts(field):
            _add_flag(parser, name, field, is_bare=name == positional)
    return parser


def _fields(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    definitions = schema.get("$defs", {})
    root = definitions.get(schema.get("$ref", "").rpartition("/")[2], schema)
    found: dict[str, dict[str, Any]] = root.get("properties", {})
    return found


def _add_flag(
    parser: argparse.ArgumentParser, name: str, field: dict[str, Any], *, is_bare: bool
) -> None:
    """`is_bare`: it is also what is said without any flag."""
    flag = "--" + name.replace("_", "-")
    about = field.get("description", "")
    if field.get("default") not in (None, [], ""):
        about += f" (default {field['default']})"
    about = about.replace("%", "%%")
    kind = field.get("type")
    if kind == "boolean":
        parser.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, help=about)
    elif _is_texts(field):
        parser.add_argument(flag, dest=name, action="append", metavar="TEXT", help=about)
        more = f"{flag[2:].replace('-', ' ')}: one a line"
        flags = [f"{flag}-file", *(["--file"] if is_bare else [])]
        parser.add_argument(*flags, dest=f"{name}:file", metavar="FILE", help=more)
    else:
        convert = {"integer": int, "number": float, "string": str}.get(str(kind), _from_json)
        meta = str(kind).upper() if kind in {"integer", "number", "string"} else "JSON"
        parser.add_argument(flag, dest=name, type=convert, metavar=meta, help=about)


def _from_json(text: str) -> Any:
    """Raises: argparse.ArgumentTypeError: it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"that is no JSON: {error}") from None


def _follow(client: Client, call: int, *, quiet: bool) -> dict[str, Any]:
    """Shows what comes until the answer. Raises: AivillageError: the job failed."""
    for frame in client.frames(call):
        if isinstance(frame, messages.Answer):
            found: dict[str, Any] = frame.value
            return found
        if not quiet:
            _show_frame(frame)
    raise AssertionError("frames end with an answer or an error")


def _show_frame(frame: messages.Frame) -> None:
    if isinstance(frame, messages.Text):
        print(show.plain(frame.text), end="", flush=True)
    elif isinstance(frame, messages.Progress):
        share = f"{frame.done:g}/{frame.total:g} " if frame.total else ""
        show.note(f"[{share}{frame.note}]")


def _show_result(answer: dict[str, Any]) -> None:
    result = answer["result"]
    if not (isinstance(result, dict) and "text" in result):
        show.as_json(result)
    else:
        print()
    show.note(receipt_line(answer["receipt"]))


def receipt_line(receipt: dict[str, Any]) -> str:
    """One line: who, what, how long, how much, why."""
    sellers = " then ".join(show.short(seller) for seller in receipt["sellers"]) or "nobody"
    usage = receipt["usage"].items()
    checked = f"; {receipt['checked']}" if receipt.get("checked") else ""
    made = ", ".join(_counted(count, unit) for unit, count in usage if count) or "nothing"
    return (
        f"[by {sellers}: {made} in {receipt['seconds']:.1f} s for "
        f"{as_credits(receipt['price_micro_credits'])} credits; {receipt['why']}; "
        f"identical: {receipt['identical']}{checked}]"
    )


def _counted(count: int, unit: str) -> str:
    """`1 call`, `12 output tokens`."""
    name = unit.replace("_", " ")
    return f"{count} {name.removesuffix('s') if count == 1 else name}"


def jobs(args: argparse.Namespace) -> int:
    with connect(args) as client:
        if args.action == "list":
            return _list(args, client.ask("jobs", limit=args.limit))
        found = client.ask("job" if args.action == "show" else "cancel", job=args.job)
    if "result" in found:
        found["result"] = show.with_numbers(found["result"])
    if args.json:
        show.as_json(found)
        return 0
    receipt, attempts = found.pop("receipt", None), found.pop("attempts", [])
    show.pairs({name: value for name, value in found.items() if value not in (None, "")})
    for attempt in attempts:
        price = as_credits(attempt["price_micro_credits"])
        outcome = show.one_line(attempt["outcome"])
        print(f"  {show.short(attempt['seller'])}: {outcome}, {price} credits")
        if attempt["choice"]:
            choice.table(attempt["choice"])
    if receipt:
        print(show.plain(receipt_line(receipt)))
    return 0


def _list(args: argparse.Namespace, found: list[dict[str, Any]]) -> int:
    if args.json:
        show.as_json(found)
        return 0
    show.table(
        [
            (
                job["job"][:8],
                job["operation"],
                job["state"],
                show.ago(job["created_unix"]),
                as_credits(job["receipt"]["price_micro_credits"]) if job["receipt"] else "",
                job["message"] or _check_of(job["parent"]),
            )
            for job in found
        ],
        ("job", "operation", "state", "asked", "credits", ""),
    )
    return 0


def _check_of(parent: str) -> str:
    """The job that this one does again, if it does."""
    return parent[:17] if parent.startswith("check of ") else ""


def operations(args: argparse.Namespace) -> int:
    with connect(args) as client:
        found = client.ask("operations")
    if args.json:
        show.as_json(found)
        return 0
    show.table(
        [
            (
                operation["name"],
                operation.get("title", ""),
                operation.get("stability", "stable")
                + ("" if operation.get("enabled", True) else ", off"),
                ", ".join(
                    f"{as_credits(price)} a {unit.replace('_', ' ').removesuffix('s')}"
                    for unit, price in (operation.get("terms") or {})
                    .get("prices_micro_credits", {})
                    .items()
                ),
                len(operation["offered_by"]),
            )
            for operation in found
        ],
        ("operation", "what it does", "stability", "my price in credits", "peers"),
    )
    return 0
