"""The request of a map's last task: it gets the results of the others, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from aivillage.protocols.errors import RequestError
from aivillage.protocols.messages import OperationInfo


def require_reducer(info: OperationInfo) -> None:
    """Raises: RequestError: it takes neither a list nor a text, so it can reduce nothing."""
    _kind(info)


def reduce_request(info: OperationInfo, found: Sequence[Any]) -> bytes:
    """`found` as the positional argument of `info`: the list, or a text of one JSON value a line.

    Raises:
        RequestError: as `require_reducer`.
    """
    if _kind(info) == "array":
        return msgspec.msgpack.encode({info.positional: list(found)})
    text = "\n".join(msgspec.json.encode(result).decode() for result in found)
    return msgspec.msgpack.encode({info.positional: text})


def _kind(info: OperationInfo) -> str:
    schema = info.request_schema
    root = schema.get("$defs", {}).get(schema.get("$ref", "").rpartition("/")[2], schema)
    kind = root.get("properties", {}).get(info.positional, {}).get("type")
    if kind not in {"array", "string"}:
        raise RequestError(
            f"{info.name} takes no list and no text as its argument",
            next_step="name another operation with --reduce, or leave it out",
        )
    return str(kind)
