"""pause, resume, limits, price: what others get of this machine."""

from __future__ import annotations

import argparse
import re
import time
from typing import Any, Final

from aivillage.cli import show
from aivillage.cli.node import connect
from aivillage.protocols.errors import RequestError
from aivillage.protocols.types import as_credits

_SPAN: Final = re.compile(r"(\d{1,6})([smhd])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def span_seconds(text: str) -> float:
    """`2h` -> 7200.0. Raises: RequestError: BAD_REQUEST, it is no span of time."""
    found = _SPAN.fullmatch(text)
    if found is None:
        raise RequestError(f"{text!r} is no span of time", next_step="write 90s, 30m, 2h or 1d")
    return float(found[1]) * _SECONDS[found[2]]


def _ask(args: argparse.Namespace, what: str, **more: Any) -> Any:
    """The daemon's answer; as JSON it is printed at once."""
    with connect(args) as client:
        found = client.ask(what, **more)
    if args.json:
        show.as_json(found)
    return found


def pause(args: argparse.Namespace) -> int:
    """Returns when the node takes no work of others any more, and its jobs for them were told."""
    span = {} if args.span is None else {"seconds": span_seconds(args.span)}
    found = _ask(args, "pause", **span)
    if not args.json:
        print(f"paused {_until(found['until_unix'])}: no work for others; your own jobs go on")
        if found["ended"]:
            show.note(f"{found['ended']} jobs of others ended here; what they had is paid")
    return 0


def resume(args: argparse.Namespace) -> int:
    found = _ask(args, "resume")
    if not args.json:
        was = "work for others goes on" if found["was_paused"] else "it was not paused"
        print(f"still closed: {found['refusal']}" if found["refusal"] else was)
    return 0


def limits(args: argparse.Namespace) -> int:
    """Shows them, or first sets some: `KEY=VALUE`, or `KEY=` for no limit."""
    words = dict(_word(item) for item in args.words)
    found = _ask(args, "limits_set", words=words) if words else _ask(args, "limits")
    if not args.json:
        _show(found)
    return 0


def _word(item: str) -> tuple[str, str]:
    key, equals, text = item.partition("=")
    if not equals:
        raise RequestError(
            f"{item}: no value", next_step=f"write {key}=VALUE, or {key}= for no limit"
        )
    return key, text


def _show(found: dict[str, Any]) -> None:
    from aivillage.node.limits import describe

    refusal = found["refusal"]
    print(f"work for others: {'refused, ' + refusal['message'] if refusal else 'taken'}")
    for other in found["reasons"]:
        if refusal and refusal["message"] != other:
            print(f"         and also: {other}")
    if found["paused"]:
        print(f"paused {_until(found['paused']['until_unix'])}")
    rows = [
        (key, _value(found["limits"][key]), _now(key, found), text)
        for key, text in describe().items()
    ]
    show.table(rows, ("limit", "value", "now", "meaning"))
    for key in found["unknown"]:
        show.note(f"{key} holds nobody off: this machine does not say how things are")
    print("from config.toml, at the next start: " + _pairs(found["at_start"]))
    if found["blocked"]:
        print("blocked: " + ", ".join(map(show.short, found["blocked"])))


def _value(value: Any) -> str:
    """As one would type it."""
    if isinstance(value, list):
        return ",".join(value) or "-"
    if isinstance(value, bool):
        return "true" if value else "-"
    return "-" if value is None else str(value)


def _now(key: str, found: dict[str, Any]) -> str:
    now = found["now"]
    if key == "quiet_hours":
        return str(now["local_time"])[11:16]
    if key == "mains_only":
        return {True: "on mains", False: "on battery", None: "unknown"}[now["on_mains"]]
    if key == "peer_day_micro_credits":
        return str(max(now[key].values(), default=0))
    shown = now.get(key.removesuffix("_max"), "")
    return "unknown" if shown is None else str(shown)


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {str(value).lower()}" for key, value in values.items())


def price(args: argparse.Namespace) -> int:
    """Shows what each operation costs here, or first sets the least that one may."""
    if (args.operation is None) != (args.floor is None):
        raise RequestError(
            "price takes an operation and its floor, or neither",
            next_step="aivillage-node price mesh.noop --floor 150",
        )
    wanted = {"operation": args.operation, "floor_percent": args.floor}
    found = _ask(args, "price") if args.operation is None else _ask(args, "price_set", **wanted)
    if not args.json:
        show.table(
            [
                (row["operation"], unit, as_credits(default), as_credits(mine), _why(row))
                for row in found
                for unit, default, mine in _units(row)
            ],
            ("operation", "a", "default credits", "here", "since"),
        )
    return 0


def _units(row: dict[str, Any]) -> list[tuple[str, int, int]]:
    mine = row["price_micro_credits"]
    return [(unit, price, mine[unit]) for unit, price in row["default_micro_credits"].items()]


def _why(row: dict[str, Any]) -> str:
    if "setting" in row:
        return str(row["setting"]) + ("" if row["enabled"] else "; switched off")
    percent, floor = row["percent"], row["floor_percent"]
    which = f"price_percent = {percent}" if percent >= floor else f"a floor of {floor} %"
    return which + ("" if row["enabled"] else "; not enabled")


def _until(until_unix: float | None) -> str:
    if until_unix is None:
        return "until `aivillage-node resume`"
    return "until " + time.strftime("%Y-%m-%d %H:%M", time.localtime(until_unix))
